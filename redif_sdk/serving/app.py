"""The HTTP application: OpenAI's images API in front of any `Backend`, with health, metrics and documentation.

It does not know engines, threads or replicas: batching is the backend's task, and requests are checked in `api.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

import redif_sdk
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.errors import InvalidRequest, NonFiniteOutput, RedifError, RuntimeUnavailable, UnsafeContent
from redif_sdk.marks.xmp import Mark
from redif_sdk.serving import documented
from redif_sdk.serving.admission import Admission, Busy
from redif_sdk.serving.api import ImageRequest, jobs_of, mark_of_job, model_card
from redif_sdk.serving.backend import Backend, ImageJob, Source
from redif_sdk.serving.body import BadBody, CheckedRoute, field_message, shown
from redif_sdk.serving.edits import edit_of, form_schema
from redif_sdk.serving.encode import KeptFiles, encode
from redif_sdk.serving.events import EventStream, gone_client, image_event
from redif_sdk.serving.guard import Guard, Prefix, RequestId, error_body
from redif_sdk.serving.metrics import Metrics
from redif_sdk.serving.page import page
from redif_sdk.serving.settings import ServeSettings

__all__ = ["create_app"]

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


class _Gone(Exception):  # noqa: N818
    """The client closed the connection."""


def create_app(backend: Backend, settings: ServeSettings | None = None, metrics: Metrics | None = None) -> FastAPI:
    """The application. Its lifespan starts and stops `backend`."""
    settings = settings or ServeSettings()
    metrics = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await backend.start()
        try:
            yield
        finally:
            await backend.stop()

    app = FastAPI(
        title="redif-sdk",
        version=redif_sdk.__version__,
        summary="Images from few-step diffusion students, with OpenAI's images API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect would not know what is before the proxy
    )
    _add_errors(app)
    _Images(backend, settings, metrics).add_to(app)
    _add_health(app, backend, metrics)
    # The one added last sees a request first: a CORS preflight carries no key.
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_middleware(RequestId)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if settings.root_path:
        app.add_middleware(Prefix, root_path=settings.root_path)
    return app


def _add_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape; internal ones are logged, and not described to the client."""

    @app.exception_handler(InvalidRequest)
    async def _invalid(request: Request, error: InvalidRequest) -> Response:
        return JSONResponse(error_body(400, str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def _malformed(request: Request, error: RequestValidationError) -> Response:
        message, param = field_message(error.errors(), list(ImageRequest.model_fields))
        return JSONResponse(error_body(400, message, param=param), 400)

    @app.exception_handler(BadBody)
    async def _unreadable(request: Request, error: BadBody) -> Response:
        return JSONResponse(error_body(error.status, str(error), param=error.param), error.status)

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> Response:
        message = _routing_message(request, error) or str(error.detail)
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(Busy)
    async def _busy(request: Request, error: Busy) -> Response:
        return JSONResponse(
            error_body(429, str(error), code="queue_full"), 429, {"Retry-After": str(error.retry_after)}
        )

    @app.exception_handler(RuntimeUnavailable)
    async def _unavailable(request: Request, error: RuntimeUnavailable) -> Response:
        return JSONResponse(error_body(503, str(error)), 503, {"Retry-After": "1"})

    @app.exception_handler(UnsafeContent)
    async def _flagged(request: Request, error: UnsafeContent) -> Response:
        return JSONResponse(_failure(error), 400)

    @app.exception_handler(RedifError)
    async def _failed(request: Request, error: RedifError) -> Response:
        _log.error("request failed", exc_info=error)
        return JSONResponse(_failure(error), 500)

    @app.exception_handler(TimeoutError)
    async def _late(request: Request, error: TimeoutError) -> Response:
        return JSONResponse(error_body(504, "the images were not ready in time; ask for fewer, or try later"), 504)

    @app.exception_handler(_Gone)
    async def _gone(request: Request, error: _Gone) -> Response:
        return Response(status_code=499)  # nobody receives it


def _routing_message(request: Request, error: HTTPException) -> str | None:
    """What to say of a path or a method that no route has; None for the errors of routes."""
    path = shown(request.scope["path"])
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        return f"{path} does not support {shown(request.method)}; use {allowed}"
    if error.status_code == 404 and error.detail == "Not Found":
        posts = "POST /v1/images/generations, /v1/images/edits and /v1/images/variations"
        return f"there is no {path}; this server has {posts} and GET /v1/models, see /docs"
    return None


def _add_get(app: FastAPI, path: str, answer: Callable[..., Any], tag: str, **options: Any) -> None:
    """Add a route for GET, and for HEAD, which proxies and monitors send."""
    app.get(path, tags=[tag], response_model=None, **options)(answer)
    app.head(path, include_in_schema=False)(answer)


def _failure(error: Exception) -> dict[str, Any]:
    """The body of an answer to a valid request that failed: with status 400 for flagged images, else 500."""
    if isinstance(error, UnsafeContent):
        message = "the safety filter rejected the generated image; give another prompt or seed"
        return error_body(400, message, code="content_policy_violation")
    if isinstance(error, NonFiniteOutput):
        message = "the generated image holds NaN or infinite values; try another seed, or ask the server's operator"
        return error_body(500, message, code="non_finite_output")
    return error_body(500, "the image could not be generated; see the server's log")


def _add_health(app: FastAPI, backend: Backend, metrics: Metrics) -> None:
    async def healthz() -> dict[str, str]:
        """Whether the process responds."""
        return {"status": "ok"}

    async def readyz() -> Response:
        """Whether images can be generated: 200, or 503."""
        ready = backend.ready()
        return JSONResponse({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def docs(request: Request) -> Response:
        return HTMLResponse(page(app.openapi(), backend.manifests, request.scope.get("root_path", "")))

    _add_get(app, "/healthz", healthz, "health", responses=documented.HEALTHY)
    _add_get(app, "/readyz", readyz, "health", responses=documented.READY)
    _add_get(app, "/metrics", prometheus, "health", responses=documented.METRICS, response_class=PlainTextResponse)
    for path in ("/", "/docs"):
        _add_get(app, path, docs, "health", include_in_schema=False)


class _Images:
    """The routes below ``/v1``."""

    def __init__(self, backend: Backend, settings: ServeSettings, metrics: Metrics) -> None:
        self._backend = backend
        self._settings = settings
        self._metrics = metrics
        self._admission = Admission(settings.max_queue, metrics)
        self._files = KeptFiles(settings.kept_bytes, settings.kept_s)

    def add_to(self, app: FastAPI) -> None:
        _add_get(app, "/v1/models", self.models, "models", responses=documented.MODELS)
        _add_get(app, "/v1/models/{name:path}", self.model, "models", responses=documented.MODEL)
        app.router.add_api_route(
            "/v1/images/generations",
            self.generations,
            methods=["POST"],
            tags=["images"],
            responses=documented.IMAGES,
            route_class_override=CheckedRoute,
        )
        for path, answer, mask in (("edits", self.edits, True), ("variations", self.variations, False)):
            schema = form_schema(mask=mask)
            app.post(f"/v1/images/{path}", tags=["images"], responses=documented.IMAGES, openapi_extra=schema)(answer)
        _add_get(
            app,
            "/v1/images/files/{name}",
            self.file,
            "images",
            name="image_file",
            responses=documented.FILE,
            response_class=Response,
        )

    async def models(self) -> dict[str, Any]:
        """The students that this server runs."""
        cards = [model_card(name, manifest) for name, manifest in self._backend.manifests.items()]
        return {"object": "list", "data": cards}

    async def model(self, name: str) -> dict[str, Any]:
        """One student."""
        return model_card(*self._student(name))

    def _student(self, name: str | None) -> tuple[str, Manifest]:
        manifests = self._backend.manifests
        if name is None:
            return next(iter(manifests.items()))
        if name not in manifests:
            raise HTTPException(404, f"there is no model {name!r:.100}; this server has {', '.join(manifests)}")
        return name, manifests[name]

    async def file(self, name: str) -> Response:
        """An image that was requested as a URL, as long as it is kept."""
        found = self._files.get(name)
        if found is None:
            raise HTTPException(404, "there is no such image, or it is no longer kept")
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "private, immutable, max-age=3600"})

    async def generations(self, body: ImageRequest, request: Request) -> Response:
        """Generate images.

        `data` has one entry per image; `seeds` has (seed, index) of each, which as `seed` give the same images again.
        With ``stream``, server-sent events: up to `partial_images` previews, and then the image; only one is allowed.
        """
        return await self._answer(body, request, None)

    async def edits(self, request: Request) -> Response:
        """Images from an image: a form with the file ``image``, and ``mask`` for what is to be painted anew.

        A mask that is transparent somewhere is painted anew there, another one where it is white. `strength` is the
        share of the steps that are run from the image. The answer is that of a generation; so is a stream, whose events
        are called ``image_edit.partial_image`` and ``image_edit.completed``.
        """
        return await self._answer(*await self._uploaded(request, mask=True))

    async def variations(self, request: Request) -> Response:
        """Images from an image without a prompt, or of its class: a form with the file ``image``."""
        return await self._answer(*await self._uploaded(request, mask=False))

    async def _uploaded(self, request: Request, *, mask: bool) -> tuple[ImageRequest, Request, Source]:
        body, source = await edit_of(request, mask=mask)
        if not mask and body.prompt is None and self._student(body.model)[1].text is not None:
            body.prompt = ""
        return body, request, source

    async def _answer(self, body: ImageRequest, request: Request, source: Source | None) -> Response:
        """The answer to a generation, or to an edit of ``source``."""
        name, manifest = self._student(body.model)
        limits = self._settings
        asked = partial(jobs_of, body, name, manifest, most=limits.max_images, pixels=limits.max_pixels, source=source)
        jobs = asked() if source is None else await asyncio.to_thread(asked)  # which decodes the image
        if body.stream and len(jobs) != 1:
            raise InvalidRequest(f"a stream sends one image, not {len(jobs)}; leave n out")
        request.state.log = {"model": name, "images": len(jobs)}
        if not self._backend.ready():
            raise RuntimeUnavailable("the server is starting or stopping; try again")
        self._admission.enter(len(jobs))
        if body.stream:
            return EventStream(self._events(body, jobs[0]), self._stream_ended)
        try:
            images = await self._while_connected(request, self._generate(jobs))
        except (NonFiniteOutput, UnsafeContent) as error:
            self._count(error, name)
            raise
        finally:
            self._admission.leave(len(jobs))
        self._metrics.images.labels(name).inc(len(images))
        entries = zip(images, jobs, strict=True)
        data = [await self._entry(body, request, image, self._mark(job)) for image, job in entries]
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": data,
                "background": "opaque",
                "output_format": body.output_format or "png",
                "size": f"{jobs[0].width}x{jobs[0].height}",
                "model": name,
                "num_inference_steps": jobs[0].num_inference_steps,
                "seeds": [[job.seed, job.index] for job in jobs],
            }
        )

    def _count(self, error: Exception, name: str) -> None:
        """Count a request whose images cannot be shown."""
        if isinstance(error, NonFiniteOutput):
            self._metrics.nonfinite.labels(name).inc()
        elif isinstance(error, UnsafeContent):
            self._metrics.flagged.labels(name).inc()

    def _stream_ended(self, client_left: bool) -> None:
        self._admission.leave(1)
        if client_left:
            self._metrics.cancelled.inc()

    async def _generate(self, jobs: list[ImageJob]) -> list[NDArray[np.uint8]]:
        async with asyncio.timeout(self._settings.timeout_s):
            tasks = [asyncio.ensure_future(self._backend.generate(job)) for job in jobs]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:  # if one failed, the others are not needed
                    task.cancel()

    async def _while_connected(self, request: Request, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`, which is cancelled if the client disconnects."""
        task, gone = asyncio.create_task(work), asyncio.create_task(gone_client(request.receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._metrics.cancelled.inc()
                raise _Gone
            return task.result()
        finally:
            for one in (task, gone):
                one.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def _mark(self, job: ImageJob) -> Mark | None:
        return mark_of_job(job, self._backend.manifests[job.model]) if self._settings.marks else None

    async def _entry(
        self, body: ImageRequest, request: Request, image: NDArray[np.uint8], mark: Mark | None
    ) -> dict[str, str]:
        output = body.output_format or "png"
        data = await _encoded(image, output, body.output_compression, mark)
        if body.response_format == "url":
            return {"url": _url(request, self._files.keep(data, output))}
        return {"b64_json": b64encode(data).decode()}

    async def _events(self, body: ImageRequest, job: ImageJob) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream. An error is an event too, since the status was sent already."""
        wanted = body.partial_images or 0
        output = body.output_format or "png"
        last = job.steps_run - 1
        shown = 0
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                if not wanted:
                    image = await self._backend.generate(job)
                else:
                    step = 0
                    async for image in self._backend.stream(job):
                        if last - wanted <= step < last:
                            data = await _encoded(image, output, body.output_compression, self._mark(job))
                            yield image_event(job, data, output, shown)
                            shown += 1
                        step += 1
                data = await _encoded(image, output, body.output_compression, self._mark(job))
        except Exception as error:  # whatever it is, it is logged, and the client is told
            _log.error("stream failed", exc_info=error)
            self._count(error, job.model)
            late = error_body(504, "the image was not ready in time")
            yield {"type": "error", **(late if isinstance(error, TimeoutError) else _failure(error))}
            return
        self._metrics.images.labels(job.model).inc()
        yield image_event(job, data, output, None)


def _url(request: Request, name: str) -> str:
    """Where a client finds a kept image, behind a proxy too. Raises InvalidRequest for a Host that is none."""
    try:
        return str(request.url_for("image_file", name=name))
    except ValueError:
        host = shown(request.headers.get("host", ""))
        raise InvalidRequest(f"the Host header is {host}, so there is no URL; use response_format b64_json") from None


async def _encoded(image: NDArray[np.uint8], output: str, compression: int | None, mark: Mark | None) -> bytes:
    """The encoded file; large images are encoded in a thread, for small ones the thread would cost more."""
    if image.size <= 1 << 16:
        return encode(image, output, compression, mark)
    return await asyncio.to_thread(encode, image, output, compression, mark)
