"""``redif serve-reward``: a user's function as a server that `EndpointReward` asks.

The function takes what it names of ``images`` (PIL), ``targets`` (PIL), ``prompts``, ``class_labels`` and
``class_names``, each a list, and ``conditions``, what images are conditioned on by name: a list of PIL images
or an array (N, ...) each. It gives a list of numbers, or ``{name: list of numbers}``.
"""

from __future__ import annotations

import base64
import importlib
import importlib.util
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from numpy.typing import NDArray
from PIL import Image

from redif_sdk.errors import InvalidRequest, first_line
from redif_sdk.inputs.images import open_image
from redif_sdk.reward_server.protocol import RewardAnswer, RewardRequest

__all__ = ["create_app", "load_scorer"]

_log = logging.getLogger(__name__)

Scorer = Callable[..., Any]
GIVEN = ("images", "targets", "prompts", "class_labels", "class_names", "conditions")
LARGEST_IMAGE = 1 << 24  # pixels


def load_scorer(name: str) -> Scorer:
    """The function ``MODULE:FUNCTION``, or ``FILE.py:FUNCTION``.

    Raises:
        InvalidRequest: there is none, or it needs arguments that a reward is not given.
    """
    where, colon, function = name.rpartition(":")
    if not colon or not function:
        raise InvalidRequest(f"{name!r} names no function; give MODULE:FUNCTION or FILE.py:FUNCTION")
    try:
        module = _of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # a user's module may raise anything
        raise InvalidRequest(f"{where} cannot be imported: {first_line(error, None)}") from error
    found: Scorer | None = getattr(module, function, None)
    if found is None or not callable(found):
        raise InvalidRequest(f"{where} has no function {function}")
    wanted_by(found)
    return found


def wanted_by(scorer: Scorer) -> list[str]:
    """Which of `GIVEN` a function takes, by the names of its arguments.

    Raises:
        InvalidRequest: it needs another argument, or takes none of them.
    """
    parameters = signature(scorer).parameters
    if any(part.kind is Parameter.VAR_KEYWORD for part in parameters.values()):
        return list(GIVEN)
    unknown = [
        name
        for name, part in parameters.items()
        if name not in GIVEN and part.default is Parameter.empty and part.kind is not Parameter.VAR_POSITIONAL
    ]
    wanted = [name for name in GIVEN if name in parameters]
    if unknown or not wanted:
        raise InvalidRequest(
            f"{getattr(scorer, '__name__', scorer)} takes {', '.join(parameters) or 'nothing'}; a reward's function "
            f"takes some of {', '.join(GIVEN)}"
        )
    return wanted


def create_app(scorer: Scorer, *, max_images: int = 256) -> FastAPI:
    """The application: ``POST /score`` asks ``scorer``, one call at a time; ``GET /health`` says that it is there."""
    app, wanted, lock = FastAPI(title="A reward", version="1"), wanted_by(scorer), Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/score", response_model=RewardAnswer, response_model_exclude_none=True)
    def score(request: RewardRequest) -> RewardAnswer:
        if len(request.images) > max_images:
            raise HTTPException(413, f"{len(request.images)} images; at most {max_images} in one request")
        given: dict[str, Any] = {name: getattr(request, name) for name in wanted}
        for name in ("images", "targets"):
            if given.get(name) is not None:
                given[name] = [_image(text, place, name) for place, text in enumerate(given[name])]
        if given.get("conditions") is not None:
            given["conditions"] = {name: _condition(values, name) for name, values in given["conditions"].items()}
        missing = [name for name in wanted if given[name] is None and _needed(scorer, name)]
        if missing:
            raise HTTPException(422, f"the request has no {', '.join(missing)}, which the reward needs")
        with lock:
            try:
                answer = scorer(**{name: value for name, value in given.items() if value is not None})
            except Exception as error:  # a user's function may raise anything; it is logged, and the run is told
                _log.exception("the reward failed")
                raise HTTPException(500, f"the reward failed: {first_line(error, None)}") from error
        return _answer(answer, len(request.images))

    return app


def _needed(scorer: Scorer, name: str) -> bool:
    """Whether ``scorer`` has an argument of that name, and no default for it."""
    part = signature(scorer).parameters.get(name)
    return part is not None and part.default is Parameter.empty


def _of_file(path: Path) -> Any:
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _image(text: str, place: int, name: str) -> Image.Image:
    try:
        return open_image(base64.b64decode(text, validate=True), "it", formats=("PNG",), most=LARGEST_IMAGE)
    except ValueError as error:  # of base64, and of what is no image
        raise HTTPException(422, f"{name}[{place}] is no PNG in base64: {first_line(error, None)}") from error


def _condition(values: list[Any], name: str) -> list[Image.Image] | NDArray[np.float64]:
    """A condition of all images: as images, or as one array of numbers."""
    if values and all(isinstance(value, str) for value in values):
        return [_image(text, place, f"conditions.{name}") for place, text in enumerate(values)]
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise HTTPException(422, f"conditions.{name} is no images and no numbers: {first_line(error, None)}") from error


def _numbers(values: Any, count: int, of: str) -> list[float | None]:
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != count:
        got = f"{len(listed)} numbers" if isinstance(listed, Sequence) else f"a {type(values).__name__}"
        raise HTTPException(500, f"the reward gave {got}{of} for {count} images")
    try:
        numbers = [None if value is None else float(value) for value in listed]
    except (TypeError, ValueError) as error:
        raise HTTPException(500, f"the reward gave no number{of}: {first_line(error, None)}") from error
    return [value if value is None or math.isfinite(value) else None for value in numbers]


def _answer(answer: Any, count: int) -> RewardAnswer:
    if isinstance(answer, Mapping):
        return RewardAnswer(scores={str(k): _numbers(v, count, f" of {k}") for k, v in answer.items()})
    return RewardAnswer(rewards=_numbers(answer, count, ""))
