"""The documentation site: what is generated holds all that the code has; built, it is whole and loads nothing."""

from __future__ import annotations

import os
import posixpath
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.generators import api, commands, errors, manifest, outside, pages, settings
from redif_sdk.distill.config import COMMON, DistillConfig

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_has_a_page() -> None:
    made = api.pages() | {"reference/errors.md": errors.errors_page()}
    for package, names in api.public_names().items():
        for name in names:
            assert f"{package}.{name}" in made[api.place(f"{package}.{name}")], name


def test_the_navigation_has_every_page_of_the_api() -> None:
    named = re.findall(r"reference/[\w./]+\.md", str(api.nav()))
    assert set(named) == set(api.pages())


def test_every_command_and_option_is_in_the_page_of_the_command_line() -> None:
    page = commands.page()
    for name, command in commands.commands().items():
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert parameter.opts[-1] in section, f"{name} {parameter.name}"


def test_every_setting_is_in_the_page_of_the_settings() -> None:
    page = settings.page()
    for name in COMMON:
        assert f"| `{name}` |" in page.partition("## By method")[0], name
        assert " ".join(str(DistillConfig.model_fields[name].description).split()) in page
    for title, model in settings.models().items():
        section = page.partition(f"### {title}\n")[2].partition("\n### ")[0]
        for name, field in model.model_fields.items():
            if name not in ("method", "estimator"):
                assert f"| `{name}` |" in section, f"{title}: {name}"
                assert field.description in section, f"{title}: {name}"


def test_every_field_of_the_manifest_is_in_its_page() -> None:
    page = manifest.manifest_page()
    for field in manifest.fields():
        record, _, name = field.rpartition(".")
        section = page.partition(f"### {record}\n")[2].partition("\n### ")[0] if record else page.partition("## ")[0]
        assert f"| `{name}` |" in section, field


def test_every_error_and_every_message_is_in_the_reference() -> None:
    page, listed = errors.errors_page(), errors.messages_page()
    for kind in errors.classes():
        assert f"## {kind.__name__} " in page
    assert len(errors.messages()) > 400
    for message in errors.messages():
        assert message.text.replace("|", "\\|") in listed
    assert sum(remedy.message in page for remedy in errors.remedies()) > 45


def test_links_that_leave_docs_lead_to_files_of_the_site() -> None:
    seen: list[str] = []
    text = outside.rewritten("[a](../SECURITY.md) [b](safety.md) ![c](images/x.png#y)", "design.md", seen.append)
    assert text == "[a](repository/SECURITY.md) [b](safety.md) ![c](images/x.png#y)"
    assert seen == ["SECURITY.md"]
    back = outside.rewritten("[a](docs/design.md#rooms) [b](LICENSE)", "repository/CONTRIBUTING.md")
    assert back == "[a](../design.md#rooms) [b](LICENSE)"


def test_every_link_of_a_page_leads_to_a_page_or_a_file() -> None:
    """Of all pages but the capability matrix; anchors are checked when the site is built."""
    made = {place: make() for place, make in pages.PAGES.items() if "capabilities" not in place}
    written = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    known = {*made, *written, *api.pages(), "reference/capabilities.md"}
    for page, text in (written | made).items():
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
            assert place in known or (ROOT / "docs" / place).exists(), f"{page}: {target}"


@pytest.mark.slow
def test_the_capability_matrix_has_every_pipeline_method_precision_and_scheduler() -> None:
    from docs.generators import capabilities
    from redif_sdk.distill.teachers.known_schedulers import KNOWN
    from redif_sdk.runtimes import PRECISIONS

    page = capabilities.page()
    for name in (*capabilities.pipelines(), *capabilities.methods(), *PRECISIONS, *KNOWN):
        assert f"`{name}`" in page, name


class _Loaded(HTMLParser):
    """The addresses from which a page loads scripts, styles, fonts and images, and its inline styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found += [given.get("src") or "", given.get("srcset") or ""]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.found.append(given.get("href") or "")


def loaded_from_elsewhere(site: Path) -> list[str]:
    """What pages and styles of a site load from other hosts."""
    found = []
    for page in site.rglob("*.html"):
        parser = _Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        found += [f"{page.name}: {address}" for address in parser.found if re.match(r"(https?:)?//", address)]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found += [
            f"{style.name}: {url}" for url in re.findall(r"(?:url\(|@import )['\"]?((?:https?:)?//[^)'\"]+)", text)
        ]
    return found


def test_what_is_loaded_from_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<script src="https://x.org/a.js"></script><link rel="stylesheet" href="//y/b.css">'
    )
    (tmp_path / "a.css").write_text("@font-face { src: url(https://fonts.org/f.woff) } a { color: url(#b) }")
    assert len(loaded_from_elsewhere(tmp_path)) == 3


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    """As make docs does: no broken link, no missing anchor. Without a network where that can be had."""
    site = tmp_path / "site"
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^docs:[^\n]*\n\t\$\(BIN\)/python (.*)$", makefile, re.MULTILINE)
    assert recipe is not None
    variables = dict(re.findall(r"^docs .*: export (\w+) := (\w+)$", makefile, re.MULTILINE))
    command = [sys.executable, *recipe[1].split(), "--site-dir", str(site)]
    alone = ["unshare", "--user", "--net", "--map-root-user"]
    if shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True, check=False).returncode == 0:
        command = [*alone, *command]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=3000, check=False
    )
    assert "--strict" in command
    assert "--quiet" not in command
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search("WARNING|ERROR", done.stdout + done.stderr)
    assert loaded_from_elsewhere(site) == []
    for package, names in api.public_names().items():
        for name in names:
            if callable(getattr(__import__(package, fromlist=[name]), name)):
                place = site / api.place(f"{package}.{name}").removesuffix(".md") / "index.html"
                assert f'id="{package}.{name}"' in place.read_text(encoding="utf-8"), name


def test_pages_that_the_navigation_does_not_name_are_listed_under_more() -> None:
    from docs.generators.hooks import MORE, _filled, _places

    nav = [{"How-to": ["a.md", {"Deep": "b.md"}, {MORE: []}]}, {"Start": "index.md"}]
    assert _places(nav) == {"a.md", "b.md", "index.md"}
    assert _filled(nav, MORE, ["new.md"])[0]["How-to"][2] == {MORE: ["new.md"]}
    assert _filled(nav, MORE, []) == [{"How-to": ["a.md", {"Deep": "b.md"}]}, {"Start": "index.md"}]


def test_a_refusal_that_the_code_does_not_have_any_more_is_not_stated() -> None:
    from docs.generators.capabilities import _refused

    assert _refused("onnxruntime has no bf16 arithmetic on the CPU")
    with pytest.raises(LookupError, match="the code does not have: no such message"):
        _refused("no such message")
