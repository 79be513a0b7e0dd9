"""What a card says of figures: quality, speed, parity with torch, files, and the limits that follow from them.

Every function takes a manifest and returns Markdown, empty where there is nothing to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.metadata import BASELINES, FEATURES, number, own_rows
from redif_sdk.card.text import code, markdown, table

__all__ = ["MOST", "files", "limits", "listed", "parity", "quality", "speed"]

MOST = 100  # rows of a table, names of a list: a manifest of a stranger may hold millions


def _figure(row: Mapping[str, Any], key: str, digits: int) -> str:
    value = number(row, key)
    return "" if value is None else f"{value:,.{digits}f}"


def quality(manifest: Manifest) -> str:
    rows = [row for row in manifest.metrics if "method" in row][:MOST]
    if not rows:
        return ""
    own = own_rows(manifest)
    columns = {
        "steps": ("num_inference_steps", 0),
        "calls": ("network_calls", 0),
        "FD to teacher": ("fd_teacher", 2),
        "best gain": ("fd_teacher_gain", 2),
        "std match": ("fd_teacher_std", 2),
        "FD to real": ("fd_real", 2),
        "paired MSE": ("mse", 4),
        "precision": ("precision", 2),
        "recall": ("recall", 2),
    }
    cells = []
    for row in rows:
        mine = any(row is one for one in own)
        untrained = str(row["method"]) in BASELINES - {"teacher"} and not mine
        name = markdown(row["method"]) + (", untrained" if untrained else "")
        shown = [_figure(row, key, digits) for key, digits in columns.values()]
        cells.append([f"**this student ({name})**" if mine else name, *shown])
    some = (own or rows)[0]
    judge = str(some.get("features") or "a network without a name")
    features = f"{FEATURES[judge]}, which gave no reward" if judge in FEATURES else markdown(judge)
    samples = _figure(some, "num_samples", 0)
    over = f", over {samples} held-out noises" if samples else ""
    data = f" Data: {markdown(some['data'])}." if some.get("data") else ""
    return f"""## Quality

{table(["", *columns], cells)}

FD is the Frechet distance in features of {features}{over}: to the teacher's own
pictures for the same noises, so that a perfect student is at 0, and to real pictures. It is not the distance in
Inception features, and figures of other feature networks do not compare with it. Under "best gain" and "std match" the
contrast of the pictures was corrected first: a lead that vanishes there only restored contrast. Paired MSE is taken on
pictures in [-1, 1]. Precision is the share of pictures that look like the teacher's, recall the share of the teacher's
variety that is reached.{data}"""


def speed(manifest: Manifest) -> str:
    rows = [row for row in manifest.metrics if "contender" in row and number(row, "seconds_median") is not None][:MOST]
    if not rows:
        return ""
    cells = []
    for row in rows:
        batch, ratio = number(row, "batch") or 1.0, number(row, "ratio")
        seconds = (number(row, "seconds_median") or 0.0) / max(batch, 1.0)
        against = "" if ratio is None else f"{ratio:.2f} x {markdown(row.get('ratio_to') or 'the reference')}"
        names = [markdown(row.get(key) or "") for key in ("contender", "runtime", "precision")]
        cells.append([*names, _figure(row, "num_inference_steps", 0), f"{batch:.0f}", f"{seconds:.4g}", against])
    machines = dict.fromkeys(str(row["machine"]) for row in rows if row.get("machine"))
    where = f" Measured on: {', '.join(map(markdown, machines))}." if machines else ""
    head = ["contender", "runtime", "precision", "steps", "batch", "seconds a picture", "times as fast"]
    return f"## Speed\n\n{table(head, cells)}\n\nMedians of interleaved rounds.{where}"


def parity(manifest: Manifest) -> str:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in manifest.verification:
        key = (str(row.get("component")), str(row.get("precision")), str(row.get("runtime")))
        groups.setdefault(key, []).append(row)
    if not groups:
        return ""
    cells = []
    for key, rows in [*groups.items()][:MOST]:
        worst = [value for row in rows if (value := number(row, "max_abs")) is not None]
        psnr = [value for row in rows if (value := number(row, "psnr")) is not None]
        passed = all(row.get("passed") is True for row in rows)
        cells.append(
            [
                *map(markdown, key),
                f"{len(rows)}",
                f"{max(worst):.2g}" if worst else "",
                f"{min(psnr):.1f} dB" if psnr else "",
                "yes" if passed else "**no**",
            ]
        )
    head = ["part", "precision", "runtime", "checks", "worst difference", "worst PSNR", "passed"]
    text = (
        ' "tokenizer" and "text_encoder" are what prompts become, "decoder" is pictures of recorded latents.'
        if manifest.text is not None
        else ""
    )
    return f"""## Does it compute what torch computed?

{table(head, cells)}

Each graph against outputs that torch gave at export. "denoiser" is the network's own output, "loop" and "generator" are
pictures (differences in levels of 255), stepped outside and inside the graph. Equal pictures have no PSNR.{text}"""


def files(manifest: Manifest) -> str:
    sizes = {entry.path: entry.bytes for entry in manifest.files}
    if not sizes:
        return ""
    rows = []
    for graph in manifest.graphs[:MOST]:
        size = sum(sizes.get(path, 0) for path in (graph.file, *graph.data))
        rows.append([code(graph.file), f"{graph.component} in {graph.precision}, opset {graph.opset}", _bytes(size)])
    listed = {path for graph in manifest.graphs for path in (graph.file, *graph.data)}
    folders: dict[str, list[int]] = {}
    for path, size in sizes.items():
        if path not in listed:
            first, _, rest = path.partition("/")
            folders.setdefault(f"{first}/" if rest else first, []).append(size)
    for folder, found in [*folders.items()][:MOST]:
        count = f"{len(found)} file{'s' * (len(found) != 1)}" if folder.endswith("/") else "file"
        rows.append([code(folder), count, _bytes(sum(found))])
    return f"## Files\n\n{table(['', '', 'size'], rows)}\n\n{_bytes(sum(sizes.values()))} in all."


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def limits(manifest: Manifest) -> str:
    latents, scale = manifest.latents, manifest.postprocess.scale
    height, width, _ = manifest.image_shape
    steps = listed(map(str, manifest.supported_steps[:MOST]))
    lines = [f"It runs in {steps} step{'s' * (manifest.supported_steps != [1])}; any other number is refused."]
    if latents.dynamic:
        axes = listed(latents.dynamic)
        lines.append(
            f"It was made for {height} x {width}; {axes} may differ by multiples of {latents.multiple * scale}."
        )
    else:
        lines.append(f"It makes pictures of {height} x {width} alone.")
    if manifest.distillation is not None:
        seed = manifest.distillation.seed
        lines.append(f"It is one training run, of seed {seed}: another would differ, and nobody looked by how much.")
    measured = own_rows(manifest)
    if not measured:
        lines.append("Its quality was not measured (`redif eval --save` would).")
    elif missing := [
        count for count in manifest.supported_steps if count not in {r["num_inference_steps"] for r in measured}
    ]:
        lines.append(f"Its quality was not measured at {listed(map(str, missing[:MOST]))} steps.")
    if not any("contender" in row for row in manifest.metrics):
        lines.append("Its speed was not measured (`redif bench --save` would).")
    lines += _unverified(manifest)
    lines.append(
        "Nothing filters what it makes, and whatever is wrong with its teacher's pictures may be wrong with its own."
    )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _unverified(manifest: Manifest) -> list[str]:
    if not manifest.graphs:
        return ["It has no graphs yet, so only torch runs it (`redif export` makes them)."]
    if not manifest.verification:
        return ["**Its graphs were not verified**: the parity gate was not run, or not passed."]
    lines, rows = [], [row for row in manifest.verification if row.get("runtime") != "numpy"]
    if any(row.get("passed") is not True for row in rows):
        lines.append("**Its graphs did not pass the parity gate**: see the table above.")
    checked = {str(row.get("precision")) for row in rows}
    if missing := [p for p in dict.fromkeys(graph.precision for graph in manifest.graphs) if p not in checked]:
        lines.append(f"**Not verified in {listed(missing)}.**")
    real = [row for row in rows if row.get("runtime") != "emulated"]
    where = dict.fromkeys(f"{markdown(row.get('runtime'))} ({markdown(row.get('device'))})" for row in real)
    if where:
        lines.append(f"Verified on {listed([*where][:MOST])}, and nowhere else.")
    if len(real) < len(rows):
        lines.append("bf16 was verified by emulation: no engine at hand computes it.")
    return lines


def listed(items: Iterable[str], last: str = " and ") -> str:
    """As one writes a list: commas, and `last` before the last one."""
    found = list(items)
    return last.join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else "".join(found)
