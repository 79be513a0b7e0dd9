"""The server on several machines: a Ray Serve application, for ``serve run redif_sdk.serving.ray_app:app``.

One deployment per student, with autoscaled replicas that each have an engine and batch by ``@serve.batch``; in front of
them an ingress with the HTTP application of `app.py`. An image depends on its own fields alone, so one that was lost
with its replica is generated again by another.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from itertools import groupby
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
from redif_sdk.inputs import refuse_arrays
from redif_sdk.pipeline import FastPipeline
from redif_sdk.serving.app import create_app
from redif_sdk.serving.backend import ImageJob
from redif_sdk.serving.local import Rendered, batch_key, first_job, previews, render
from redif_sdk.serving.logs import keep_prompts_out
from redif_sdk.serving.settings import ServeSettings, keys_of_environment

__all__ = ["Generator", "RayArguments", "RayBackend", "app"]

Pixels = NDArray[np.uint8]

#: The replica or its node is gone; another one can generate the same image.
LOST = (RayActorError, WorkerCrashedError, ObjectLostError)
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 1.0  # seconds between two attempts


class RayArguments(BaseModel):
    """The arguments of ``serve run ... name=value`` and of a config file's ``args``.

    Attributes:
        student: a folder that every node has, or an id on the Hub; several separated by commas.
        runtime: as in `FastPipeline.from_pretrained`; so are `device`, `precision`, `revision` and
            `safety_filter`, a file that every node has.
        num_cpus: CPUs and engine threads per replica.
        num_gpus: GPUs per replica.
        min_replicas: with `max_replicas` and `target_ongoing_images`, how many replicas there are.
        ingresses: processes that serve HTTP.
        max_batch: as in `ServeSettings`; so are the rest, for each ingress. API keys come from REDIF_API_KEYS.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: str
    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    revision: str | None = None
    safety_filter: str | None = None
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_images: float = Field(default=8, gt=0)
    ingresses: int = Field(default=1, ge=1)
    max_batch: int = 8
    max_wait_ms: float = 2.0
    max_queue: int = 256
    max_images: int = 16
    timeout: float = 60.0
    root_path: str = ""

    def settings(self, api_keys: tuple[str, ...] = ()) -> ServeSettings:
        """The settings of each process. Raises InvalidRequest."""
        return ServeSettings(
            max_batch=self.max_batch,
            max_wait_ms=self.max_wait_ms,
            max_queue=self.max_queue,
            max_images=self.max_images,
            timeout_s=self.timeout,
            api_keys=api_keys,
            root_path=self.root_path.rstrip("/"),
        )


class Generator:
    """One replica of one student."""

    async def __init__(self, student: str, arguments: RayArguments) -> None:  # type: ignore[misc]  # Ray awaits it
        keep_prompts_out()
        self._pipeline = await asyncio.to_thread(
            FastPipeline.from_pretrained,
            student,
            runtime=arguments.runtime,
            device=arguments.device,
            precision=arguments.precision,
            num_threads=max(1, int(arguments.num_cpus)),
            revision=arguments.revision,
            safety_filter=arguments.safety_filter,
        )
        self._observed = Histogram(
            "redif_batch_images", "Images per engine call.", [1, 2, 4, 8, 16, 32, 64], ("model",)
        )
        batch: Any = self._batch
        batch.set_max_batch_size(arguments.max_batch)
        batch.set_batch_wait_timeout_s(arguments.max_wait_ms / 1000)
        await self.generate(first_job(self._pipeline.manifest.name, self._pipeline.manifest))

    async def manifest(self) -> Manifest:
        """The student's manifest."""
        return self._pipeline.manifest

    @serve.batch
    async def _batch(self, jobs: list[ImageJob]) -> list[Rendered]:
        """The images of jobs that came together; those of one size and number of steps by one engine call."""
        order = sorted(range(len(jobs)), key=lambda place: batch_key(jobs[place]))
        results: dict[int, Rendered] = {}
        for _, group in groupby(order, key=lambda place: batch_key(jobs[place])):
            places = list(group)
            images = await asyncio.to_thread(render, self._pipeline, [jobs[place] for place in places])
            self._observed.observe(len(places), tags={"model": jobs[0].model})
            results |= zip(places, images, strict=True)
        return [results[place] for place in range(len(jobs))]

    async def generate(self, job: ImageJob) -> Pixels:
        """The image, uint8 (H, W, C). Raises NonFiniteOutput and UnsafeContent."""
        batch: Any = self._batch
        result: Rendered = await batch(job)
        if isinstance(result, Exception):
            raise result
        return result

    async def stream(self, job: ImageJob) -> AsyncIterator[Pixels]:
        """Yield the previews of single steps, and last the image, by the fused graph like every other."""
        step = await asyncio.to_thread(previews, self._pipeline, job)  # may load the graphs of single steps
        for _ in range(job.steps_run - 1):
            yield await asyncio.to_thread(step)
        yield await self.generate(job)


class RayBackend:
    """The `Backend` of an ingress: calls the replicas, and repeats a call whose replica was lost."""

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
            refuse_arrays(manifest, "redif serve")
            if manifest.name in found:
                raise InvalidRequest(f"two students are named {manifest.name}; rename one")
            found[manifest.name] = manifest
            self._handles[manifest.name] = handle
        self._manifests = found

    async def stop(self) -> None:
        self._manifests = {}

    async def generate(self, job: ImageJob) -> Pixels:
        """The image, from whichever replica answers; the caller's time-out is the limit."""
        wait = _FIRST_WAIT
        while True:
            try:
                pixels: Pixels = await self._handle(job).generate.remote(job)
            except LOST:
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            except RayTaskError as error:
                raise _own(error) from error
            else:
                return pixels

    async def stream(self, job: ImageJob) -> AsyncIterator[Pixels]:
        """The stream of a replica. If it is lost, another one starts again, and what was sent already is skipped."""
        given, wait = 0, _FIRST_WAIT
        while True:
            try:
                place = 0
                async for pixels in self._handle(job).options(stream=True).stream.remote(job):
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

    def _handle(self, job: ImageJob) -> Any:
        if job.model not in self._manifests:
            raise RuntimeUnavailable("the server is starting or stopping; try again")
        return self._handles[job.model]


def _own(error: RayTaskError) -> Exception:
    """The replica's error, if it is one of ours: Ray wraps it, with its traceback as the message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RedifError) else error


def app(args: RayArguments | Mapping[str, Any]) -> Any:
    """The application, for ``serve run redif_sdk.serving.ray_app:app student=DIR`` and for config files.

    Raises InvalidRequest for settings that are unknown or contradict each other.
    """
    if not isinstance(args, RayArguments):  # the arguments of the command line, as text
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
                "target_ongoing_requests": args.target_ongoing_images,
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
