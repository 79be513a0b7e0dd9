"""A model card's metadata, as far as the Hub checks and shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .repository import Blob

_LICENCES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-2.0 cc-by-3.0 "
    "cc-by-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m gemma gpl "
    "gpl-2.0 gpl-3.0 isc lgpl lgpl-3.0 llama2 llama3 mit mpl-2.0 odc-by openrail openrail++ other unknown "
    "unlicense wtfpl zlib"
)
LICENCES = frozenset(_LICENCES.split())


def check_card(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) of a card's metadata, for the fields that matter here."""
    match = re.match(r"\ufeff?---\r?\n(.*?)\r?\n?---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ['"yaml" must be an object'], []
    errors = []
    licence = data.get("license")
    for name in licence if isinstance(licence, list) else [licence]:
        if name is not None and name not in LICENCES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENCES))}]')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    errors += [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "license_link")
        if not isinstance(data.get(key, ""), str)
    ]
    for result in data.get("model-index") or []:
        if not isinstance(result, dict) or not isinstance(result.get("name"), str) or "results" not in result:
            errors.append('"model-index[0]" must have "name" and "results"')
    return errors, []


def metadata(files: Mapping[str, Blob]) -> dict[str, Any]:
    card = files["README.md"].data.decode(errors="replace") if "README.md" in files else ""
    if check_card(card) != ([], []):
        return {}
    return dict(yaml.safe_load(card.split("---")[1]))
