"""The front matter of a card, which the Hub reads: licence, task, base model, tags, and measured results.

huggingface_hub's classes make it; every string of the manifest is reduced to harmless characters first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.escape import plain
from redif_sdk.card.sections import KEPT_KEYS

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = [
    "BASELINES",
    "PIPELINE_TAGS",
    "front_matter",
    "hub_licence",
    "is_hub_teacher",
    "judge_title",
    "licence_url",
    "number",
    "own_rows",
]

#: The Hub has no task for images of a class, or of any arrays.
PIPELINE_TAGS = {
    "unconditional": "unconditional-image-generation",
    "class-conditional": "unconditional-image-generation",
    "text-to-image": "text-to-image",
    "array-conditional": "unconditional-image-generation",
}

#: Methods of quality rows that are not a trained student.
BASELINES = frozenset({"teacher", "ddim", "dpm-solver++"})

MOST_ROWS = 100  # of a student's own in the front matter

#: The judge's features by the name that rows give them.
_JUDGE = re.compile(r"efficientnet-lite0-(\d{1,5})px")

#: The Hub's licence ids (hub-docs, docs/hub/repositories-licenses.md); it refuses a card with another one.
_LISTED = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
pddl lgpl-lr deepfloyd-if-license llama2 gemma unknown other
"""
_LICENCES = frozenset(_LISTED.split())
#: Other spellings of licence ids, as SPELLING=ID.
_SPELLINGS = """
none=unknown apache=apache-2.0 apache2=apache-2.0 apache-2=apache-2.0 apache2.0=apache-2.0
apache-license-2.0=apache-2.0 apache-license-version-2.0=apache-2.0 mit-license=mit bsd-2=bsd-2-clause
bsd-3=bsd-3-clause cc0=cc0-1.0 creativeml=creativeml-openrail-m creativeml-open-rail-m=creativeml-openrail-m
creativeml-openrail=creativeml-openrail-m creativeml-openrail++-m=openrail++ openrail++-m=openrail++ gplv2=gpl-2.0
gplv3=gpl-3.0 lgplv3=lgpl-3.0 agplv3=agpl-3.0 odbl-1.0=odbl odc-by-1.0=odc-by pddl-1.0=pddl c-uda-1.0=c-uda
the-unlicense=unlicense
"""
_ALIASES = {"": "unknown"} | dict(pair.split("=", 1) for pair in _SPELLINGS.split())
_URL = re.compile(r"https?://[A-Za-z0-9][A-Za-z0-9.-]{0,200}(?::\d{1,5})?(?:/[A-Za-z0-9._~/%+-]{0,300})?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def hub_licence(licence: str) -> dict[str, str]:
    """Return the front matter entries of a licence: `license`, and the name and address of one without an id."""
    wanted = "-".join(licence.lower().replace("_", " ").replace(",", " ").split())
    wanted = re.sub(r"-(only|or-later)$|\+$(?<!\+\+)", "", wanted)
    known = _ALIASES.get(wanted, wanted)
    known = _ALIASES.get(known.removesuffix("-license").removesuffix("-licence"), known)
    for candidate in (known, known.removesuffix("-license").removesuffix("-licence")):
        if candidate in _LICENCES:
            return {"license": candidate}
    url = licence_url(licence)
    if url:
        return {"license": "other", "license_name": "custom", "license_link": url}
    name = re.sub(r"[^a-z0-9.]+", "-", wanted)[:64].strip("-.")
    return {"license": "other", "license_name": name or "custom"}


def licence_url(licence: str) -> str | None:
    """Return the licence if it is a web address, else None."""
    return licence.strip() if _URL.fullmatch(licence.strip()) else None


def is_hub_teacher(identifier: str) -> bool:
    """Whether a teacher's id is a Hub id: org/name."""
    return _HUB_ID.fullmatch(identifier) is not None and "--" not in identifier and ".." not in identifier


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a finite number of a row, or None for anything else."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def own_rows(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the quality rows of the student itself, one per number of steps."""
    method = manifest.distillation.method if manifest.distillation else "ddim"
    found: dict[int, dict[str, Any]] = {}
    for row in manifest.metrics:
        steps = row.get("num_inference_steps")
        if row.get("method") != method or steps not in manifest.supported_steps:
            continue
        # an imported student is called what untrained DDIM is called; the teacher may have other guidance
        if manifest.distillation or row.get("network_calls") == steps * manifest.network.calls_per_step:
            found.setdefault(int(steps), row)
    return [found[steps] for steps in sorted(found)[:MOST_ROWS]]


def front_matter(
    manifest: Manifest,
    *,
    name: str,
    plain_diffusers: bool,
    tags: Sequence[str],
    keys: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return the YAML between a card's ``---`` lines, without them."""
    import yaml
    from huggingface_hub import ModelCardData

    own = ["diffusion", "few-step", "distillation", "redif"]
    if manifest.distillation is None:
        own.remove("distillation")
    if manifest.graphs:
        own.append("onnx")
    if plain_diffusers:
        own.append("diffusers")
    if manifest.task == "class-conditional":
        own.append("class-conditional")
    if manifest.network.inpainting:
        own.append("inpainting")
    ours: dict[str, Any] = hub_licence(manifest.licence)
    if manifest.teacher is not None and is_hub_teacher(manifest.teacher.id):
        ours["base_model"] = manifest.teacher.id
        if manifest.distillation is not None:
            ours["base_model_relation"] = "finetune"
        elif any(graph.precision.startswith("int") for graph in manifest.graphs):
            ours["base_model_relation"] = "quantized"  # unset otherwise: the Hub knows no relation for a conversion
    results = [result for row in own_rows(manifest) for result in _results(manifest, row)]
    if results:
        ours |= {"eval_results": results, "model_name": plain(name)}
    data = ModelCardData(
        library_name="redif-sdk",
        pipeline_tag=PIPELINE_TAGS[manifest.task],
        tags=list(dict.fromkeys([*own, *map(plain, tags)])),
        **ours,
        **{key: value for key, value in keys.items() if key in KEPT_KEYS},
    )
    # On one line each: where a long string is folded, a line of it may begin with the dashes that end the front matter.
    entries: Any = data
    return str(yaml.safe_dump(entries.to_dict(), sort_keys=False, allow_unicode=True, width=math.inf)).strip()


#: Of a quality row: the metric's type, and its name without the circumstances.
_METRICS = {
    "fd_teacher": ("frechet_distance", "Frechet distance to the teacher"),
    "fd_real": ("frechet_distance", "Frechet distance to real images"),
    "kd_teacher": ("kernel_distance", "Kernel distance to the teacher"),
    "fd_unpaired": ("frechet_distance", "Frechet distance to the teacher's images of other noises"),
    "mse": ("mse", "Mean squared error to the teacher's image of the same noise"),
    "precision": ("precision", "Improved precision against the teacher"),
    "recall": ("recall", "Improved recall against the teacher"),
    "coverage": ("coverage", "Coverage of the teacher"),
}


def judge_title(features: str) -> str | None:
    """The judge's features as a card names them; None: they are not ours."""
    match = _JUDGE.fullmatch(features)
    return f"EfficientNet-Lite0 at {match[1]} pixels" if match else None


def _results(manifest: Manifest, row: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    data = plain(row.get("data") or "unnamed")
    steps, samples = row["num_inference_steps"], number(row, "num_samples")
    network = plain(judge_title(judge := str(row.get("features") or "unnamed features")) or judge)
    count = "" if samples is None else f", {samples:.0f} samples"
    around = f"({network}{count}, {steps} step{'s' * (steps != 1)})"
    return [
        EvalResult(
            task_type=PIPELINE_TAGS[manifest.task],
            dataset_type=data.lower().replace(" ", "-"),
            dataset_name=data,
            metric_type=kind,
            metric_name=f"{title} {around.replace(network + ', ', '', 1) if key == 'mse' else around}",
            metric_value=float(f"{value:.6g}"),
        )
        for key, (kind, title) in _METRICS.items()
        if (value := number(row, key)) is not None
    ]
