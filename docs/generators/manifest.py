"""The manifest redif.json field by field, from its published JSON Schema, and the versions of all formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docs.generators.text import code, markdown, table

__all__ = ["SCHEMA", "fields", "formats_page", "manifest_page"]

SCHEMA = Path(__file__).resolve().parents[1] / "schema" / "redif-1.json"


def _document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return found


def fields() -> set[str]:
    """The names of all fields, those of the records as RECORD.FIELD."""
    document = _document()
    records = {f"{name}.{field}" for name, kind in document["$defs"].items() for field in kind.get("properties", {})}
    return records | set(document["properties"])


def _kind(schema: dict[str, Any]) -> str:
    """A schema's type as text, with links to records."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(code(json.dumps(value)) for value in schema["enum"])
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"object of {_kind(inner)}" if isinstance(inner, dict) else "object"
    return str(schema.get("type", "any"))


def _fields(kind: dict[str, Any]) -> str:
    required = kind.get("required", [])
    rows = []
    for name, schema in kind.get("properties", {}).items():
        default = schema.get("default", "required" if name in required else None)
        shown = default if default == "required" else code(json.dumps(default))
        rows.append((code(name), _kind(schema), shown))
    return table(("field", "type", "default"), rows)


def manifest_page() -> str:
    """The page of the manifest."""
    document = _document()
    parts = [
        f"# The manifest\n\n`redif.json`, {document['title'].partition(', ')[2]}. Generated from the "
        "[JSON Schema](../schema/redif-1.json); [design](../design.md#3-the-artifact-a-student-folder) says what the "
        "fields are for and what readers refuse. From Python: `Manifest`.\n\n",
        _fields(document),
        "## Records\n\n",
    ]
    for name, kind in sorted(document["$defs"].items()):
        if "properties" in kind:
            parts.append(f"### {name}\n\n{markdown(kind.get('description'))}\n\n{_fields(kind)}")
        else:
            parts.append(f"### {name}\n\n{markdown(kind.get('description'))}\n\n{_kind(kind)}\n\n")
    return "".join(parts)


def formats_page() -> str:
    """The page of the formats and their versions."""
    from redif_sdk import results
    from redif_sdk.artifact import manifest, web_folder
    from redif_sdk.artifact.untrusted import onnx as untrusted
    from redif_sdk.export import precision, tensorrt_graph, trace, weight_only

    read = f"opset {untrusted.OPSETS[0]} to {untrusted.OPSETS[-1]}"
    rows = [
        ("a student's manifest, `redif.json`", code(manifest.FORMAT_VERSION), "[fields](manifest.md), "
         "[JSON Schema](../schema/redif-1.json)"),
        ("results of `--json`", code(results.SCHEMA), "[rows](../design.md#7-machine-readable-results)"),
        ("the page of `--target web`, `student.json`", code(web_folder.FORMAT), "[the browser]"
         "(../serving.md#in-the-browser)"),
        ("a reward server", "none", "[JSON Schema](../schema/reward.json), [rewards](../rewards.md)"),
        ("graphs in fp32, fp16, int8, int8wo", f"ONNX opset {trace.OPSET}", "[export](../export.md#precisions)"),
        ("graphs in bf16", f"ONNX opset {precision.BF16_OPSET}", "ONNX's convolutions have the type from there on"),
        ("graphs in int4wo", f"ONNX opset {weight_only.INT4_OPSET}", "int4 and blocks from there on"),
        ("graphs that are loaded", read, "others are refused"),
        ("graphs that TensorRT gets", f"opset {tensorrt_graph.OPSETS[0]} to {tensorrt_graph.OPSETS[-1]}", ""),
    ]  # fmt: skip
    return (
        "# Format versions\n\n"
        f"This release writes format {manifest.FORMAT_VERSION} of the manifest and reads every format of the same "
        "major version up to it; a later one is refused. Within a major version fields are only added.\n\n"
        + table(("what", "version", "see"), rows)
    )
