"""A route of your own application around FastPipeline: loaded once, a PNG for each request.

    python examples/fastapi_app.py --port 8000
    curl -o heart.png "http://127.0.0.1:8000/image?prompt=red+heart&seed=1"

`redif serve STUDENT` is the whole server (OpenAI's API, batches, limits, keys, metrics). This is for an application
that you have already: the model is one object, and a call of it one `await`.
"""

import argparse
import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Response
from shipped import shipped_student

from redif_sdk import FastPipeline, InvalidRequest


def create_app(student: str) -> FastAPI:
    """An application with the route /image, whose student lives as long as the application."""
    turn = asyncio.Semaphore(1)  # one call at a time has all cores; others wait here and not in the engine

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with FastPipeline.from_pretrained(student) as app.state.pipe:
            yield

    app = FastAPI(title="Images of a few-step student", lifespan=lifespan)

    @app.get("/image", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def image(prompt: str = Query(max_length=500), seed: int | None = Query(None, ge=0)) -> Response:
        async with turn:
            try:
                out = await app.state.pipe.agenerate(prompt, seed=seed)
            except InvalidRequest as error:  # an unknown class, a prompt that is too long: the caller's business
                raise HTTPException(422, str(error)) from error
        buffer = io.BytesIO()
        out.images[0].save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png", headers={"X-Seed": str(out.seeds[0][0])})

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", help="folder or Hub id; default: the one that ships")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(create_app(args.student or str(shipped_student())), host=args.host, port=args.port)
