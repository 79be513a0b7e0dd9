"""The page at ``/docs``: the routes and an example, as plain HTML that loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from redif_sdk.artifact.manifest import Manifest

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font: 14px/1.5 ui-monospace, monospace; }
pre { padding: .8rem 1rem; overflow-x: auto; background: #8881; border-radius: 6px; }
h2 { margin: 2rem 0 .3rem; font-size: 1.1rem; }
p { margin: .3rem 0; }
.method { font-weight: 600; }
"""


def page(openapi: Mapping[str, Any], manifests: Mapping[str, Manifest]) -> str:
    """The page for an application's OpenAPI document and its students."""
    name, manifest = next(iter(manifests.items()))
    names = manifest.classes.class_names if manifest.classes is not None else None
    prompt = manifest.text.examples[0] if manifest.text is not None else names[0] if names else ""
    body = {"model": name, "prompt": prompt, "n": 1, "response_format": "b64_json", "seed": 0}
    if manifest.classes is not None and not names:
        body["class_label"] = 0
    routes = [
        f'<h2><span class="method">{escape(method.upper())}</span> <code>{escape(path)}</code></h2>'
        f"<p>{escape(' '.join(str(route.get('description', '')).split()))}</p>"
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    ]
    fields = openapi["components"]["schemas"]["ImageRequest"]["properties"]
    example = (
        f"curl http://HOST:PORT/v1/images/generations -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>redif-sdk</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style>'
        f"<h1>redif-sdk {escape(str(openapi['info']['version']))}</h1>"
        f"<p>Students: {', '.join(f'<code>{escape(student)}</code>' for student in manifests)}. "
        f'OpenAPI: <a href="openapi.json">openapi.json</a>.</p>'
        f"<pre>{escape(example)}</pre>{''.join(routes)}"
        f"<h2>Fields of a request for pictures</h2>"
        f"<p>{', '.join(f'<code>{escape(field)}</code>' for field in fields)}</p></html>"
    )
