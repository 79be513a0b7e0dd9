"""The model card: ``README.md`` of a student, made from its manifest alone, with the sections that its user wrote.

What the Hub reads of it is `metadata.py`, the lines for plain diffusers are `diffusers_usage.py`; how strings
become harmless Markdown, and what no card may hold, is `text.py`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import CARD_NAME, Manifest
from redif_sdk.artifact.paths import ORIGIN, read_checked
from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.artifact.untrusted.markdown import CARD_LIMIT
from redif_sdk.card import measured as card_measured
from redif_sdk.card.diffusers_usage import no_plain_diffusers, plain_diffusers
from redif_sdk.card.measured import MOST, listed
from redif_sdk.card.metadata import KEPT_KEYS, front_matter, hub_licence, is_hub_teacher, licence_url
from redif_sdk.card.samples import shown_prompts
from redif_sdk.card.text import (
    code,
    has_marker,
    markdown,
    marked,
    merge,
    python_string,
    split_front_matter,
    table,
    user_sections,
)
from redif_sdk.errors import InvalidRequest

__all__ = [
    "CARD_NAME",
    "body",
    "check_writable",
    "is_foreign",
    "is_generated",
    "merge",
    "origin",
    "read_card",
    "render",
    "render_folder",
    "render_over",
    "user_keys",
    "user_sections",
    "user_tags",
    "write_card",
]

SAMPLES = "samples"

#: The tags that the front matter makes by itself; others in an existing card are the user's.
_OWN_TAGS = frozenset({"diffusion", "few-step", "distillation", "redif", "onnx", "diffusers", "class-conditional"})
LARGEST_FRONT_MATTER = 1 << 16  # characters that are parsed


def render(
    manifest: Manifest,
    *,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    user_sections: Mapping[str, str] | None = None,
) -> str:
    """The whole ``README.md``. The same manifest gives the same text.

    `repo_id`: where it will stand on the Hub, so that its lines work against it; None: they take a folder of the
    manifest's name. `tags` go beside ours, and `keys` of `KEPT_KEYS` into the front matter. `user_sections`: text by
    name, as the function `user_sections` reads it from a card.
    Raises InvalidRequest for a section that cannot be written back.
    """
    sections = dict(user_sections or {})
    place = repo_id or manifest.name
    plain = plain_diffusers(manifest, place)
    end = marked("end", sections.pop("end", ""))
    about = marked("about", sections.pop("about", ""))
    name = repo_id.rpartition("/")[2] if repo_id else manifest.name
    parts = [
        f"# {markdown(name)}",
        _introduction(manifest),
        _samples(manifest),
        about,
        _usage(manifest, place, repo_id is not None),
        plain or no_plain_diffusers(manifest),
        _origin(manifest),
        _budget(manifest),
        card_measured.quality(manifest),
        card_measured.speed(manifest),
        card_measured.parity(manifest),
        card_measured.files(manifest),
        card_measured.limits(manifest),
        _checking(manifest, place, repo_id),
        *(marked(section, text) for section, text in sections.items()),
        end,
    ]
    head = front_matter(manifest, name=name, plain_diffusers=bool(plain), tags=tags, keys=keys or {})
    return f"---\n{head}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def render_over(manifest: Manifest, old: str | None, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """The card that replaces `old`: with its user's sections, tags and keys.

    A text that is no card of ours and has no sections is kept whole, in the section ``about``. Raises InvalidRequest
    for malformed sections.
    """
    if old is None:
        return render(manifest, repo_id=repo_id, tags=tags)
    sections = user_sections(old)
    if not is_generated(old) and body(old).strip():
        sections = {"about": body(old).strip("\n")}
    kept = [*user_tags(old), *tags]
    return render(manifest, repo_id=repo_id, tags=kept, keys=user_keys(old), user_sections=sections)


def user_tags(text: str) -> list[str]:
    """The tags of a card that are not ours."""
    found = _parse(split_front_matter(text.replace("\r\n", "\n"))[0]).get("tags")
    return [tag for tag in found if isinstance(tag, str) and tag not in _OWN_TAGS] if isinstance(found, list) else []


def user_keys(text: str) -> dict[str, Any]:
    """What a card's front matter says that only its user can know: `KEPT_KEYS`, such as the words of a gate."""
    found = _parse(split_front_matter(text.replace("\r\n", "\n"))[0])
    return {key: value for key, value in found.items() if key in KEPT_KEYS}


def is_foreign(text: str) -> bool:
    """Whether somebody wrote the whole card by hand: metadata and text, and no sections of ours."""
    head, rest = split_front_matter(text.replace("\r\n", "\n"))
    return bool(head.strip()) and bool(rest.strip()) and not is_generated(text)


def is_generated(text: str) -> bool:
    """Whether a card was made here: it has marked sections, or is of the kind that releases before them wrote."""
    return has_marker(text) or "\nA few-step diffusion student of `" in text


def body(text: str) -> str:
    """A card without its front matter."""
    return split_front_matter(text.replace("\r\n", "\n"))[1]


def _parse(front: str) -> dict[str, Any]:
    import yaml

    if len(front) > LARGEST_FRONT_MATTER:
        raise InvalidRequest(f"the front matter of {CARD_NAME} has more than {LARGEST_FRONT_MATTER} characters")
    try:
        parsed = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequest(f"the front matter of {CARD_NAME} is no YAML: {reason}; put it right") from error
    return parsed if isinstance(parsed, dict) else {}


def read_card(folder: str | Path) -> str | None:
    """The card of a student's folder, if there is one. InvalidRequest unless it is text of at most 1 MiB."""
    folder = Path(folder)
    if not (folder / CARD_NAME).exists():
        return None
    try:
        return read_checked(folder, CARD_NAME, limit=CARD_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{folder / CARD_NAME} is not UTF-8 text; put it right, or remove it") from error


def render_folder(folder: Path, manifest: Manifest, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """The card that the student in `folder` should have: over the one that it has, for where it came from."""
    return render_over(manifest, read_card(folder), repo_id=repo_id or origin(folder), tags=tags)


def origin(folder: Path) -> str | None:
    """The repository that a pulled student's folder notes to be a copy of, if there is such a note."""
    if not (folder / ORIGIN).is_file():
        return None
    noted = strict_json.parse(read_checked(folder, ORIGIN, limit=1 << 16), ORIGIN).get("repo_id")
    return noted if isinstance(noted, str) and is_hub_teacher(noted) else None


def check_writable(folder: Path, name: str) -> None:
    """Raise InvalidRequest where `name` is a link: the Hub's cache must not be written into."""
    if (folder / name).is_symlink():
        raise InvalidRequest(
            f"{folder / name} is a link, as in the Hub's cache; copy the student (save_pretrained) and change the copy"
        )


def write_card(folder: str | Path, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """Make ``README.md`` of a student's folder anew, with its user's sections and tags; returns it.

    Raises ManifestError for what is no student, InvalidRequest for malformed sections; then nothing is written.
    """
    student = StudentFolder(folder)
    check_writable(student.path, CARD_NAME)
    text = render_folder(student.path, student.manifest, repo_id=repo_id, tags=tags)
    atomic_write(student.path / CARD_NAME, text.encode())
    return text


# ---------------------------------------------------------------- what it is and how it is used


def _introduction(manifest: Manifest) -> str:
    steps = listed(map(str, manifest.supported_steps[:MOST]))
    calls = manifest.network.calls_per_step
    plural = "step" if manifest.supported_steps == [1] else "steps"
    teacher = f" of {code(manifest.teacher.id)}" if manifest.teacher else ""
    height, width, channels = manifest.image_shape
    colours = {1: "grey", 3: "colour"}.get(channels, f"{channels}-channel")
    made = manifest.distillation
    if made is None:
        how = "Its weights are the teacher's own: nothing was trained." if teacher else ""
    else:
        rewards = f" with the reward {listed(map(code, made.rewards[:MOST]), ' + ')}" if made.rewards else ""
        how = f"It was distilled by {code(made.method)}{rewards}, seed {made.seed}."
    return (
        f"A few-step {manifest.task} diffusion student{teacher}: {colours} pictures of {height} x {width} in {steps} "
        f"{plural} of {calls} network call{'s' * (calls > 1)} each. {how}"
    ).rstrip()


def _samples(manifest: Manifest) -> str:
    files = [entry.path for entry in manifest.files if re.fullmatch(rf"{SAMPLES}/[A-Za-z0-9._-]+\.png", entry.path)]
    files = sorted(files, key=lambda path: (len(path), path))[:MOST]
    if not files:
        return ""
    order = ", one column a class" if manifest.classes is not None else ""
    if prompts := shown_prompts(manifest):
        order = f", one column a prompt ({', '.join(code(prompt[:100]) for prompt in prompts)})"
    pictures = "\n\n".join(f"![{markdown(_described(path))}]({path})" for path in files)
    return f"{pictures}\n\nSeed 0{order}, not picked."


def _described(path: str) -> str:
    steps = re.fullmatch(rf"{SAMPLES}/steps-(\d+)\.png", path)
    return f"Samples at {steps[1]} step{'s' * (steps[1] != '1')}" if steps else "Samples"


def _usage(manifest: Manifest, place: str, on_hub: bool) -> str:
    call, option, about = "seed=0", "", ""
    where = "" if on_hub else ", from the folder that holds this one"
    if manifest.classes is not None:
        call, option = "class_labels=[0], seed=0", " --class-label 0"
        names = manifest.classes.class_names or []
        shown = ", ".join(f"{index} {markdown(name)}" for index, name in enumerate(names[:MOST]))
        more = f", and {len(names) - MOST} more" if len(names) > MOST else ""
        about = f"\n\nIts {manifest.classes.num_classes} classes" + (
            f": {shown}{more}." if names else " have no names."
        )
    elif manifest.text is not None:
        example = manifest.text.examples[0]
        call, option = f"{python_string(example)}, seed=0", f" {_shell_text(example)}"
        length = min(tokenizer.max_length for tokenizer in manifest.text.tokenizers)
        about = f"\n\nA prompt may have {length} tokens; what is beyond is cut off, with a warning."
    return f"""## How to use it

With redif-sdk, without torch (`pip install "redif-sdk[cpu]"`){where}:

```python
from redif_sdk import FastPipeline

pipe = FastPipeline.from_pretrained({python_string(place)})
image = pipe({call}).images[0]
```

```bash
redif generate {_shell(place)}{option} --seed 0 -o out.png
```

The same seed gives the same picture, in every batch; engines differ by rounding alone.{about}"""


def _shell(place: str) -> str:
    """A folder or Hub id for a command line; one with unusual characters is not written out."""
    return shlex.quote(place) if re.fullmatch(r"[A-Za-z0-9.][A-Za-z0-9 ._/-]{0,200}", place) else "FOLDER"


def _shell_text(prompt: str) -> str:
    """A prompt for a command line; one with unusual characters is not written out."""
    return shlex.quote(prompt) if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ,.'_-]{0,200}", prompt) else "PROMPT"


# ---------------------------------------------------------------- where it comes from


def _origin(manifest: Manifest) -> str:
    teacher, lines = manifest.teacher, []
    if teacher is not None:
        name = code(teacher.id)
        if is_hub_teacher(teacher.id):
            name = f"[{markdown(teacher.id)}](https://huggingface.co/{teacher.id})"
        lines.append(["Teacher", name])
        if teacher.revision:
            lines.append(["Its revision", code(teacher.revision)])
        if teacher.hash:
            lines.append(["SHA-256 of its weights", code(teacher.hash[:12])])
        guidance = f", guidance {teacher.guidance_scale:g}" if teacher.guidance_scale != 1 else ""
        lines.append(["It samples with", f"{teacher.num_inference_steps} steps{guidance}"])
    url = licence_url(manifest.licence)
    licence = f"[{markdown(url)}]({url})" if url else code(manifest.licence)
    if hub_licence(manifest.licence)["license"] == "unknown":
        licence = "unknown: ask who made the teacher before you use it"
    if teacher is not None:
        lines.append(["Licence of the teacher's weights", licence])
    lines.append(["Licence of this student", f"{licence}{', as it derives from them' if teacher else ''}"])
    return f"## Where it comes from\n\n{table(['', ''], lines)}"


def _budget(manifest: Manifest) -> str:
    if manifest.distillation is None:
        return ""
    spent = manifest.distillation.budget
    rows = [
        ["Teacher calls", f"{spent.teacher_calls:,}"],
        ["Student calls", f"{spent.student_calls:,}"],
        ["Gradient samples", f"{spent.gradient_samples:,}"],
        ["Forward-equivalents", f"{spent.forward_equivalents:,.0f}"],
        ["Updates", f"{spent.updates:,}"],
        ["Seconds", f"{spent.seconds:,.0f}"],
    ]
    versions = ", ".join(
        f"{code(name)} {code(value)}" for name, value in [*manifest.distillation.versions.items()][:MOST]
    )
    made = f"\n\nMade with {versions}." if versions else ""
    return f"""## What it cost

{table(["spent on the distillation", ""], rows)}

A network call on one picture is one forward-equivalent, a sample that is differentiated through is three.{made}"""


def _checking(manifest: Manifest, place: str, repo_id: str | None) -> str:
    folder = place.rpartition("/")[2] if repo_id else place
    pull = f"redif pull {_shell(place)} -o {_shell(folder)}\n" if repo_id else ""
    digest = f"\n\nDigest of the manifest: `{manifest.digest}`" if re.fullmatch("[0-9a-f]{64}", manifest.digest) else ""
    return f"""## Check it yourself

```bash
{pull}redif verify {_shell(folder)}
```

It hashes every file and compares the graphs with the recorded outputs; torch is not needed.{digest}"""
