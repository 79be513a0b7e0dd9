"""The same server beyond one machine: a Ray Serve application, for ``serve run redif_sdk.serving.ray_app:app``.

A deployment a student, of as many replicas as there is work for, each with an engine and a batcher of its own; before
them an ingress with the HTTP application of `app.py`. A picture depends on nothing but its own fields, so one that was
lost with its replica is simply made again by another. Nothing here knows HTTP, and nothing here batches.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray starts

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.util.metrics import Histogram

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest, RedifError, RuntimeUnavailable
from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.app import create_app
from redif_sdk.serving.backend import Picture
from redif_sdk.serving.local import LocalBackend
from redif_sdk.serving.logs import keep_prompts_out
from redif_sdk.serving.settings import ServeSettings, keys_of_environment

__all__ = ["Generator", "RayArguments", "RayBackend", "app"]

Pixels = NDArray[np.uint8]

#: The replica that was asked is gone, or its node: another one can make the same picture.
LOST = (RayActorError, WorkerCrashedError, ObjectLostError)
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 1.0  # seconds between two attempts


class RayArguments(BaseModel):
    """What ``serve run ... name=value`` and a config file's ``args`` may say.

    `student`: a folder that every node has, or an id on the Hub; several with commas between. `runtime`, `device`,
    `precision` and `revision` are those of `FastPipeline.from_pretrained`. Of one replica: `num_cpus`, which is also
    its engine's threads, and `num_gpus`. `min_replicas`, `max_replicas` and `target_ongoing_pictures` say how many
    replicas there are. `ingresses`: processes before them. The rest is `ServeSettings`, for each ingress; API keys
    come from REDIF_API_KEYS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    revision: str | None = None
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_pictures: float = Field(default=8, gt=0)
    ingresses: int = Field(default=1, ge=1)
    max_batch: int = 8
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_images: int = 16
    timeout: float = 60.0

    def settings(self, api_keys: tuple[str, ...] = ()) -> ServeSettings:
        """What each process is told. Raises InvalidRequest."""
        return ServeSettings(
            max_batch=self.max_batch,
            max_wait_ms=self.max_wait_ms,
            max_queue=self.max_queue,
            max_images=self.max_images,
            timeout_s=self.timeout,
            api_keys=api_keys,
        )


class Generator:
    """One replica of one student: the backend of one process, asked by ingresses."""

    async def __init__(self, student: str, arguments: RayArguments) -> None:  # type: ignore[misc]  # Ray awaits it
        keep_prompts_out()
        pipeline = await asyncio.to_thread(
            FastPipeline.from_pretrained,
            student,
            runtime=arguments.runtime,
            device=arguments.device,
            precision=arguments.precision,
            num_threads=max(1, int(arguments.num_cpus)),
            revision=arguments.revision,
        )
        self._name = pipeline.manifest.name
        batches = Histogram(
            "redif_batch_pictures", "Pictures a call of the engine.", [1, 2, 4, 8, 16, 32, 64], ("model",)
        )
        self._backend = LocalBackend(
            {self._name: pipeline},
            arguments.settings(),
            lambda model, pictures, seconds: batches.observe(pictures, tags={"model": model}),
        )
        await self._backend.start()

    def check_health(self) -> None:
        """Ray replaces a replica whose check raises."""
        if not self._backend.ready():
            raise RuntimeUnavailable("the replica has no engine")

    async def manifest(self) -> Manifest:
        """What the student is."""
        return self._backend.manifests[self._name]

    async def generate(self, picture: Picture) -> Pixels:
        """The picture, uint8 (H, W, C)."""
        return await self._backend.generate(picture)

    async def stream(self, picture: Picture) -> AsyncIterator[Pixels]:
        """The picture as it forms."""
        async for pixels in self._backend.stream(picture):
            yield pixels


class RayBackend:
    """The `Backend` of an ingress: asks the replicas, and asks again where one was lost."""

    def __init__(self, deployments: list[str]) -> None:
        self._deployments = deployments
        self._handles: dict[str, Any] = {}
        self._manifests: dict[str, Manifest] = {}

    @property
    def manifests(self) -> Mapping[str, Manifest]:
        return self._manifests

    def ready(self) -> bool:
        return bool(self._manifests)

    async def start(self) -> None:
        found: dict[str, Manifest] = {}
        for deployment in self._deployments:
            handle = serve.get_deployment_handle(deployment, app_name=serve.get_replica_context().app_name)
            manifest: Manifest = await handle.manifest.remote()
            if manifest.name in found:
                raise InvalidRequest(f"two students are named {manifest.name}; rename one")
            found[manifest.name] = manifest
            self._handles[manifest.name] = handle
        self._manifests = found

    async def stop(self) -> None:
        self._manifests = {}

    async def generate(self, picture: Picture) -> Pixels:
        """Until a replica gives it; the caller's time-out ends that."""
        wait = _FIRST_WAIT
        while True:
            try:
                pixels: Pixels = await self._handle(picture).generate.remote(picture)
            except LOST:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            except RayTaskError as error:
                raise _own(error) from error
            else:
                return pixels

    async def stream(self, picture: Picture) -> AsyncIterator[Pixels]:
        """Where a replica is lost on the way, another begins anew, and what was given already is left out."""
        given, wait = 0, _FIRST_WAIT
        while True:
            try:
                place = 0
                async for pixels in self._handle(picture).options(stream=True).stream.remote(picture):
                    place += 1
                    if place > given:
                        given = place
                        yield pixels
            except LOST:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            except RayTaskError as error:
                raise _own(error) from error
            else:
                return

    def _handle(self, picture: Picture) -> Any:
        if picture.model not in self._manifests:
            raise RuntimeUnavailable("the server is starting or stopping; try again")
        return self._handles[picture.model]


def _own(error: RayTaskError) -> Exception:
    """What the replica raised, if it is ours: Ray wraps it with its traceback as the message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RedifError) else error


def app(args: RayArguments | Mapping[str, Any]) -> Any:
    """The application, for ``serve run redif_sdk.serving.ray_app:app student=DIR`` and for config files.

    Raises InvalidRequest for settings that are unknown, or contradict each other.
    """
    if not isinstance(args, RayArguments):  # Ray gives the words of the command line as they are
        try:
            args = RayArguments.model_validate(dict(args))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            known = ", ".join(RayArguments.model_fields)
            raise InvalidRequest(f"{name}: {first['msg']}; this application takes {known}") from error
    settings = args.settings(keys_of_environment())
    if args.min_replicas > args.max_replicas:
        raise InvalidRequest(f"min_replicas is {args.min_replicas}, more than max_replicas, {args.max_replicas}")
    students = [student.strip() for student in args.student.split(",") if student.strip()]
    if not students:
        raise InvalidRequest("student is empty; give a folder or an id on the Hub")
    deployment: Any = serve.deployment
    names = [f"generator-{place}" for place in range(len(students))]
    generators = [
        deployment(Generator)
        .options(
            name=name,
            max_ongoing_requests=4 * args.max_batch,
            autoscaling_config={
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.target_ongoing_pictures,
            },
            ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
            graceful_shutdown_timeout_s=args.timeout + 5,
        )
        .bind(student, args)
        for name, student in zip(names, students, strict=True)
    ]

    def build() -> FastAPI:
        return create_app(RayBackend(names), settings)

    ingress = deployment(serve.ingress(build)()).options(
        name="ingress",
        num_replicas=args.ingresses,
        max_ongoing_requests=2 * args.max_queue,
        ray_actor_options={"num_cpus": 0.5},
        graceful_shutdown_timeout_s=args.timeout + 5,
    )
    return ingress.bind(*generators)
