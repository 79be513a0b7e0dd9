"""The model card: ``README.md`` of a student, made from its manifest alone, with the sections that its user wrote.

The text is `card.md.j2`, a jinja2 template. A manifest may be a stranger's, so every value that the template shows is
escaped for Markdown (`escape.markdown`) unless a filter of `escape.py` has made it safe; nothing can be forgotten. What
a card's *user* writes is not looked at: who shows a card (the Hub, Gradio in ``redif demo``) sanitises its HTML.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redif_sdk.artifact.atomic import atomic_write
from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import CARD_LIMIT, CARD_NAME, Manifest
from redif_sdk.artifact.paths import ORIGIN, read_checked
from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.card import escape, figures
from redif_sdk.card.diffusers_usage import stock_sampler
from redif_sdk.card.figures import MOST
from redif_sdk.card.metadata import front_matter, hub_licence, is_hub_teacher, licence_url
from redif_sdk.card.sections import HINTS, body, check_section, is_generated, user_keys, user_sections, user_tags
from redif_sdk.errors import InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = [
    "check_writable",
    "origin",
    "read_card",
    "render",
    "render_folder",
    "render_over",
    "shown_prompts",
    "write_card",
]

MOST_PROMPTS = 8  # columns of the sample images
LARGE = 256  # pixels; images this wide have fewer columns, since they take long and a card is narrow
LARGE_COLUMNS = 4


def render(
    manifest: Manifest,
    *,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    keys: Mapping[str, Any] | None = None,
    user_sections: Mapping[str, str] | None = None,
) -> str:
    """Return the whole ``README.md``. The same arguments give the same text.

    Args:
        repo_id: where the card will be on the Hub; its lines then load the student from there. None: they load a folder
            of the manifest's name.
        tags: further tags of the front matter.
        keys: further entries of the front matter, of `sections.KEPT_KEYS`.
        user_sections: text by name, as `sections.user_sections` reads it from a card.

    Raises:
        InvalidRequest: a section has a name or a text that could not be read back.
    """
    name = repo_id.rpartition("/")[2] if repo_id else manifest.name
    sections = dict.fromkeys(("about", "end"), "") | dict(user_sections or {})
    stock = stock_sampler(manifest)
    more = [section for section in sections if section not in ("about", "end")]
    text = _template().render(
        m=manifest, name=name, repo_id=repo_id, stock=stock, sections=more, **_facts(manifest, repo_id)
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
    for section, content in sections.items():
        check_section(section, content)
        start = f"<!-- user:{section} start -->\n"
        content = content.replace("\r\n", "\n") or HINTS.get(section, "")
        text = text.replace(start, f"{start}{content}\n")
    head = front_matter(manifest, name=name, plain_diffusers=stock is not None, tags=tags, keys=keys or {})
    return f"---\n{head}\n---\n\n{text}"


@cache
def _template() -> Template:
    """The template, which escapes for Markdown whatever is not marked as safe, and refuses undefined names."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def safe(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape.markdown(value))

    def listed(items: Iterable[object], last: str = " and ") -> Markup:
        """As one writes a list: commas, and `last` before the last item."""
        found = [safe(item) for item in items]
        return Markup(last).join([Markup(", ").join(found[:-1]), found[-1]]) if len(found) > 1 else Markup().join(found)

    environment = Environment(
        autoescape=True, finalize=safe, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "cells": lambda values: Markup(" | ").join(map(safe, values)),
        "code": lambda value: Markup(escape.code(value)),
        "listed": listed,
        "python": lambda value: Markup(escape.python_string(value)),
        "shell": lambda value, otherwise: Markup(escape.shell(value, otherwise)),
    }
    return environment.from_string((Path(__file__).with_name("card.md.j2")).read_text(encoding="utf-8"))


def _facts(manifest: Manifest, repo_id: str | None) -> dict[str, Any]:
    """What the template shows besides the manifest's own fields."""
    run, teacher = manifest.distillation, manifest.teacher
    place = repo_id or manifest.name
    return {
        "place": place,
        "folder": place.rpartition("/")[2] if repo_id else place,
        "most": MOST,
        "how": [name for name in (run.estimator, *run.rewards[:MOST]) if name] if run else [],
        "settings": escape.json_text(run.configuration) if run and run.configuration else "",
        "prompts": [prompt[:100] for prompt in shown_prompts(manifest)],
        "teacher_on_hub": teacher is not None and is_hub_teacher(teacher.id),
        "licence_url": licence_url(manifest.licence),
        "licence_unknown": hub_licence(manifest.licence)["license"] == "unknown",
        "samples": figures.samples(manifest),
        "quality": figures.quality(manifest),
        "speed": (speed := figures.speed(manifest)),
        "machines": [*dict.fromkeys(str(row["machine"]) for row in speed if row["machine"])],
        "parity": figures.parity(manifest),
        "files": figures.files(manifest),
        "limits": figures.unmeasured(manifest),
    }


def shown_prompts(manifest: Manifest) -> list[str]:
    """Return the prompts of a text-to-image student's sample images, one per column."""
    large = max(manifest.image_shape[:2]) >= LARGE
    most = 1 if manifest.is_large else LARGE_COLUMNS if large else MOST_PROMPTS
    return manifest.text.examples[:most] if manifest.text else []


def render_over(manifest: Manifest, old: str | None, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """Return the card that replaces `old`, with its user's sections, tags and keys.

    A text that redif-sdk did not make and that has no sections is kept whole, in the section ``about``.

    Raises:
        InvalidRequest: `old` has malformed sections or front matter.
    """
    if old is None:
        return render(manifest, repo_id=repo_id, tags=tags)
    sections = user_sections(old)
    if not is_generated(old) and body(old).strip():
        sections = {"about": body(old).strip("\n")}
    kept = [*user_tags(old), *tags]
    return render(manifest, repo_id=repo_id, tags=kept, keys=user_keys(old), user_sections=sections)


def read_card(folder: str | Path) -> str | None:
    """Return the card of a student's folder, or None; raise InvalidRequest unless it is UTF-8 text."""
    folder = Path(folder)
    if not (folder / CARD_NAME).exists():
        return None
    try:
        return read_checked(folder, CARD_NAME, limit=CARD_LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{folder / CARD_NAME} is not UTF-8 text; correct it, or remove it") from error


def render_folder(folder: Path, manifest: Manifest, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """Return the card that replaces the one in `folder`, for the repository that the folder was pulled from, if any."""
    return render_over(manifest, read_card(folder), repo_id=repo_id or origin(folder), tags=tags)


def origin(folder: Path) -> str | None:
    """Return the repository that a folder was pulled from, if it notes one."""
    if not (folder / ORIGIN).is_file():
        return None
    noted = strict_json.parse(read_checked(folder, ORIGIN, limit=1 << 16), ORIGIN).get("repo_id")
    return noted if isinstance(noted, str) and is_hub_teacher(noted) else None


def check_writable(folder: Path, name: str) -> None:
    """Raise InvalidRequest if `name` is a link: the Hub's cache must not be written to."""
    if (folder / name).is_symlink():
        raise InvalidRequest(
            f"{folder / name} is a link, as in the Hub's cache; copy the student (save_pretrained) and change the copy"
        )


def write_card(folder: str | Path, *, repo_id: str | None = None, tags: Sequence[str] = ()) -> str:
    """Make ``README.md`` of a student's folder anew, with its user's sections and tags; return it.

    Raises:
        ManifestError: the folder is not a student.
        InvalidRequest: the card has malformed sections. Nothing is written.
    """
    student = StudentFolder(folder)
    check_writable(student.path, CARD_NAME)
    text = render_folder(student.path, student.manifest, repo_id=repo_id, tags=tags)
    atomic_write(student.path / CARD_NAME, text.encode())
    return text
