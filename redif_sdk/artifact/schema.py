"""The JSON Schema of ``redif.json``, generated from the code: ``python -m redif_sdk.artifact.schema`` prints it.

It is published as ``docs/schema/redif-1.json`` (``make schema``), for readers in other languages. Digest, hashes and
consistent tables cannot be expressed in it; `Manifest.from_bytes` checks them.
"""

from __future__ import annotations

import json
from typing import Any

from redif_sdk.artifact.manifest import FORMAT_VERSION, Manifest

__all__ = ["schema", "text"]


def schema() -> dict[str, Any]:
    """The schema as a document: JSON Schema, draft 2020-12."""
    generated = Manifest.model_json_schema(mode="serialization")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:redif-sdk:redif-{FORMAT_VERSION.partition('.')[0]}",
        "title": f"redif.json, format {FORMAT_VERSION}",
    } | {key: value for key, value in generated.items() if key != "title"}


def text() -> str:
    """The schema as it is published."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(), end="")
