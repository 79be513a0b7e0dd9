"""The page at ``/docs``: the routes and an example, as plain HTML that loads nothing from other servers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from redif_sdk.artifact.manifest import Manifest

__all__ = ["page"]


def page(openapi: Mapping[str, Any], manifests: Mapping[str, Manifest], root_path: str = "") -> str:
    """The page for an application's OpenAPI document and its students, published below `root_path`."""
    name, manifest = next(iter(manifests.items()))
    names = manifest.classes.class_names if manifest.classes is not None else None
    prompt = manifest.text.examples[0] if manifest.text is not None else names[0] if names else ""
    body: dict[str, Any] = {"model": name, "prompt": prompt, "n": 1, "response_format": "b64_json", "seed": 0}
    if manifest.classes is not None and not names:
        body["class_label"] = 0
    environment = Environment(loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("page.html.j2")
    return template.render(openapi=openapi, students=list(manifests), example=json.dumps(body), root=root_path)
