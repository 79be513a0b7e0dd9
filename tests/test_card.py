"""The model card: what it says, that the Hub takes it, that its lines run, and that no stranger can write into it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from redif_sdk import FastPipeline
from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import CARD_LIMIT, Manifest
from redif_sdk.artifact.records import Condition, Distillation, TeacherInfo
from redif_sdk.card.escape import code, json_text, markdown, python_string
from redif_sdk.card.metadata import hub_licence
from redif_sdk.card.record import kind_of, record, speed_rows
from redif_sdk.card.render import read_card, render, render_over, write_card
from redif_sdk.card.sections import body, is_generated, merge, user_sections
from redif_sdk.cli.main import main
from redif_sdk.errors import IntegrityError, InvalidRequest
from redif_sdk.export.samples import sample_grid
from redif_sdk.images import to_uint8
from redif_sdk.sampling.noise import noise

Copy = Callable[[Path], Path]


def quality(method: str, steps: int, calls: int, **figures: Any) -> dict[str, Any]:
    return {
        "data": "fashion-mnist",
        "teacher": "fashion-mnist",
        "method": method,
        "num_inference_steps": steps,
        "network_calls": calls,
        "fd_teacher": 4.0925,
        "fd_teacher_gain": 4.08,
        "fd_teacher_std": 3.83,
        "fd_real": None,
        "kd_teacher": 0.0017,
        "fd_unpaired": 5.214,
        "mse": 0.022,
        "precision": 0.898,
        "recall": 0.7,
        "coverage": 0.81,
        "spread": 0.957,
        "features": "efficientnet-lite0-32px",
        "num_samples": 2000,
        "budget": {},
    } | figures


def speed(contender: str, seconds: float | None, **figures: Any) -> dict[str, Any]:
    return {
        "contender": contender,
        "runtime": "onnxruntime",
        "precision": "fp32",
        "num_inference_steps": 2,
        "batch": 8,
        "seconds_median": seconds,
        "ratio": 3.5,
        "ratio_to": "teacher",
        "round_seconds": [[0.1]],
    } | figures


ROWS = [quality("teacher", 50, 100), quality("ddim", 2, 4), quality("redif", 2, 2), speed("student-2", 0.04)]


def full(manifest: Manifest, **fields: Any) -> Manifest:
    """The same student with everything that a card can show; `fields` replace some of it."""
    content: dict[str, Any] = manifest.model_dump(mode="json") | {
        "licence": "MIT",
        "teacher": {"id": "org/teacher", "revision": "main", "hash": "ab" * 32, "num_inference_steps": 50},
        "distillation": {
            "method": "redif",
            "estimator": "same-state",
            "rewards": ["texture", "pixel"],
            "seed": 3,
            "budget": {"updates": 270},
            "configuration": {"learning_rate": 0.001, "reward": ["texture", "pixel"]},
        },
        "metrics": ROWS,
    }
    return Manifest.model_validate(content | fields)


@pytest.fixture(scope="module")
def manifest(tiny_student: Path) -> Manifest:
    return StudentFolder(tiny_student).manifest


# ---------------------------------------------------------------- what it says, and the Hub


def test_the_front_matter_is_what_the_hub_takes(manifest: Manifest) -> None:
    card = ModelCard(render(full(manifest), repo_id="me/student", tags=["garments", "onnx"]))
    data = card.data.to_dict()
    assert data["library_name"] == "redif-sdk"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "mit"
    assert (data["base_model"], data["base_model_relation"]) == ("org/teacher", "finetune")
    assert data["tags"] == [
        *("diffusion", "few-step", "distillation", "redif", "onnx", "diffusers", "class-conditional", "garments")
    ]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "student"
    assert eval_results_to_model_index(name, results) == data["model-index"]
    assert ModelCardData(**data).to_dict() == data
    found = {result.metric_name: result.metric_value for result in results}
    assert found["Frechet distance to the teacher (EfficientNet-Lite0 at 32 pixels, 2000 samples, 2 steps)"] == 4.0925
    assert {result.metric_type for result in results} == {
        *("frechet_distance", "kernel_distance", "mse", "precision", "recall", "coverage")
    }
    assert len(results) == 7  # of the student's own row alone; what was not measured is not there
    assert "fid" not in json.dumps(data).lower()
    assert set(data["model-index"][0]) == {"name", "results"}
    for result in data["model-index"][0]["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert result["dataset"]["name"]
        assert result["dataset"]["type"]
        assert all(isinstance(metric["value"], float) for metric in result["metrics"])


def test_what_was_not_measured_is_not_there(manifest: Manifest) -> None:
    text = render(manifest)
    data = ModelCard(text).data.to_dict()
    assert "model-index" not in data
    assert "base_model" not in data
    assert "distillation" not in data["tags"]
    for absent in ("## Quality", "## Speed", "## What it cost", "| Teacher |"):
        assert absent not in text
    for present in ("Its quality was not measured", "Its speed was not measured", "2 and 3 steps; any other number"):
        assert present in text
    bare = manifest.model_copy(update={"graphs": [], "verification": [], "golden": []})
    assert "It has no graphs yet" in render(bare)
    assert "onnx" not in ModelCard(render(bare)).data.tags
    assert "were not verified" in render(manifest.model_copy(update={"verification": []}))
    failed = [dict(row, passed=False) for row in manifest.verification]
    assert "did not pass" in render(manifest.model_copy(update={"verification": failed}))


def test_every_measured_contender_stands_beside_the_student(manifest: Manifest) -> None:
    text = render(full(manifest))
    assert "| teacher | 50 | 100 | 4.09 |" in text
    assert "| ddim, untrained | 2 | 4 |" in text
    assert (
        "| **this student (redif)** | 2 | 2 | 4.09 | 4.08 | 3.83 | 5.21 |  | 0.0220 | 0.90 | 0.70 | 0.81 | 0.96 |"
        in text
    )
    assert "| student-2 | onnxruntime | fp32 | 2 | 8 | 0.005 | 3.50 x teacher |" in text
    assert "| generator | fp32 | onnxruntime |" in text
    assert "Its quality was not measured at 3 steps." in text
    assert "`onnx/generator.fp32.onnx` | generator in fp32, opset 20" in text
    assert "[org/teacher](https://huggingface.co/org/teacher)".replace("/t", "/t") in text
    assert full(manifest).digest in text


def test_it_says_how_the_student_was_made(manifest: Manifest) -> None:
    text = render(full(manifest))
    assert "distilled by `redif` (`same-state`, `texture`, `pixel`), seed 3." in text
    assert "| Estimator | `same-state` |\n| Reward | `texture` + `pixel` |" in text
    details = text.partition("<details>")[2].partition("</details>")[0]
    assert json.loads(details.partition("```json\n")[2].partition("```")[0])["learning_rate"] == 0.001
    made = full(manifest).distillation
    assert made is not None
    large = made.model_copy(update={"configuration": {"a": "x" * 50_000}})
    assert "<details>" not in render(full(manifest).model_copy(update={"distillation": large}))


def test_an_imported_pipeline_is_no_finetune(manifest: Manifest) -> None:
    imported = full(manifest, distillation=None, metrics=[quality("ddim", 2, 4), quality("ddim", 2, 2)])
    data = ModelCard(render(imported)).data.to_dict()
    assert data["base_model"] == "org/teacher"
    assert "base_model_relation" not in data
    metrics = data["model-index"][0]["results"][0]["metrics"]  # the teacher's guided DDIM is another row
    assert [metric["type"] for metric in metrics].count("kernel_distance") == 1
    assert "nothing was trained" in render(imported)


@pytest.mark.parametrize(
    ("licence", "keys"),
    [
        ("MIT", {"license": "mit"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("Apache License 2.0", {"license": "apache-2.0"}),
        ("CreativeML Open RAIL-M", {"license": "creativeml-openrail-m"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("CreativeML OpenRAIL++-M License", {"license": "openrail++"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("LGPL-3.0+", {"license": "lgpl-3.0"}),
        ("CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("", {"license": "unknown"}),
        ("unknown", {"license": "unknown"}),
        ("Our Own Terms, v2", {"license": "other", "license_name": "our-own-terms-v2"}),
        ("///", {"license": "other", "license_name": "custom"}),
        (
            "https://example.org/terms",
            {"license": "other", "license_name": "custom", "license_link": "https://example.org/terms"},
        ),
        ("https://x.org/)[a](javascript:b", {"license": "other", "license_name": "https-x.org-a-javascript-b"}),
    ],
)
def test_licences_are_the_hub_s(licence: str, keys: dict[str, str], manifest: Manifest) -> None:
    assert hub_licence(licence) == keys
    data = ModelCard(render(full(manifest, licence=licence))).data.to_dict()
    assert {key: data[key] for key in keys} == keys


def test_the_same_manifest_gives_the_same_card(tiny_student: Path, manifest: Manifest) -> None:
    text = read_card(tiny_student)
    assert text == render_over(manifest, text)
    assert manifest.digest in (text or "")
    assert is_generated(text or "")


# ---------------------------------------------------------------- its lines run


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def distilled(which: str, teacher_folder: Path, folder: Path) -> None:
    """A student whose table is not plain DDIM, exported."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from redif_sdk.distill import DistillConfig, distill
    from redif_sdk.export import export

    settings: dict[str, Any] = {
        "calibrated": {"method": "redif", "reward": "pixel", "calibration": 16},
        "consistency": {"method": "consistency"},
        "flow": {"method": "regression"},
    }[which]
    source = folder.with_name("teacher of it")
    shutil.copytree(teacher_folder, source)
    if which == "flow":
        FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(source / "scheduler")
    config = DistillConfig(num_inference_steps=3, updates=1, batch_size=4, pool_size=16, **settings)
    student = distill(source, config)
    if which == "calibrated":
        student.tables = [student.tables[0].with_gain(1.1)]  # whatever so short a run found
    student.save_pretrained(folder)
    export(folder, runtimes=["onnxruntime"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2.4
@pytest.mark.parametrize(
    "which",
    [
        *("tiny_student", "plain_student", "calibrated", "consistency", "flow"),
        pytest.param("guided", marks=pytest.mark.slow),  # its images are in test_trainer.py
    ],
)
def test_the_lines_of_the_card_give_the_same_picture(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of FastPipeline and of plain diffusers, from the noise of seed 0."""
    import torch
    from diffusers.schedulers import scheduling_lcm

    if which == "guided":
        from redif_sdk.distill import Teacher, import_pipeline
        from redif_sdk.export import export

        folder = tmp_path / "guided one"
        teacher = Teacher.load(request.getfixturevalue("teacher_folder")).guided(3.0)
        import_pipeline(teacher, folder, [2])
        export(folder, runtimes=["onnxruntime"])
    elif which in ("calibrated", "consistency", "flow"):
        folder = tmp_path / "of ours"
        distilled(which, request.getfixturevalue("teacher_folder"), folder)
    else:
        folder = request.getfixturevalue(which)
    manifest = StudentFolder(folder).manifest
    shutil.copytree(folder, tmp_path / "here" / manifest.name)  # the lines name the student, not where it lies
    monkeypatch.chdir(tmp_path / "here")
    ours, theirs = code_blocks(read_card(folder) or "")
    names: dict[str, Any] = {}
    exec(ours, names)
    assert isinstance(names["image"], Image.Image)
    latents, table = manifest.latents, manifest.tables[0]
    drawn = noise([(0, 0)], (latents.channels, latents.height, latents.width), slices=table.noise_slices)
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.tensor(drawn[0]).reshape(shape))
    later = iter(drawn[1:])
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda shape, **_: torch.tensor(next(later)))
    exec(theirs, names)
    if which != "flow":
        assert f"timesteps={[int(t) for t in table.timesteps]})" in theirs
    pictures = to_uint8(names["images"].numpy(), manifest.postprocess.model_copy(update={"pixel_shuffle": 1}))
    difference = np.abs(pictures[0, :, :, 0].astype(int) - np.asarray(names["image"]).astype(int))
    assert difference.max() <= 1


def test_lines_for_the_hub_name_the_repository(manifest: Manifest) -> None:
    ours, theirs = code_blocks(render(manifest, repo_id="me/student"))
    assert 'from_pretrained("me/student")' in ours
    assert 'source = "me/student"' in theirs
    assert "redif pull me/student -o student\nredif verify student\n" in render(manifest, repo_id="me/student")


def test_what_no_stock_class_samples_has_no_such_lines(manifest: Manifest) -> None:
    stochastic = manifest.model_copy(update={"step_tables": manifest.step_tables[::-1]})
    assert len(code_blocks(render(stochastic))) == 1
    assert "diffusers" not in ModelCard(render(stochastic)).data.tags
    network = manifest.network.model_copy(update={"class_path": "my.Net"})
    assert len(code_blocks(render(manifest.model_copy(update={"network": network})))) == 1


# ---------------------------------------------------------------- the user's sections

OWN = "I made this.\n\n```python\n# indented\n    x = 1\n```\n\n| a | b |\n|---|---|\n"


def test_user_sections_survive_three_regenerations(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    text = read_card(folder) or ""
    assert user_sections(text) == {"about": "# tiny", "end": ""}  # what conftest put there: a card by hand
    text = text.replace("# tiny\n", OWN)
    text = text.replace(
        "<!-- user:end start -->", "<!-- user:more start -->\nMore.\n<!-- user:more end -->\n\n<!-- user:end start -->"
    )
    text = re.sub("(user:end start -->\n).*\n", "\\1The end\u00e9.\n", text)
    (folder / "README.md").write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")
    wanted = {
        "about": OWN.rstrip("\n") + "\n" * (OWN.count("\n") - OWN.rstrip("\n").count("\n") - 1),
        "more": "More.",
        "end": "The end\u00e9.",
    }
    assert user_sections(text) == wanted
    for count in range(3):
        record(folder, [speed("student", 0.1 + count)])
        assert write_card(folder) == read_card(folder)
        assert user_sections(read_card(folder) or "") == wanted
    names = re.findall(r"user:(\w+) start", read_card(folder) or "")
    assert names == ["about", "more", "end"]
    StudentFolder(folder).check_all()


def test_export_and_distill_keep_them(teacher_folder: Path, tmp_path: Path) -> None:
    from redif_sdk.distill import import_pipeline
    from redif_sdk.export import export

    folder = tmp_path / "student"
    import_pipeline(str(teacher_folder), folder, [1])
    text = (read_card(folder) or "").replace("tags:\n", "tags:\n- mine\n")
    (folder / "README.md").write_text(re.sub(r"(user:about start -->\n).*\n", r"\1Mine.\n", text))
    export(folder, runtimes=["onnxruntime"])
    assert user_sections(read_card(folder) or "") == {"about": "Mine.", "end": ""}
    import_pipeline(str(teacher_folder), folder, [1, 2], overwrite=True)
    assert user_sections(read_card(folder) or "") == {"about": "Mine.", "end": ""}
    assert "mine" in ModelCard(read_card(folder) or "").data.tags
    for config in ("unet/config.json", "scheduler/scheduler_config.json"):
        assert str(teacher_folder.parent) not in (folder / config).read_text()
        assert "_name_or_path" not in json.loads((folder / config).read_text())
    (folder / "README.md").write_text("<!-- user:about start -->\nnever closed\n")
    for again in (lambda: import_pipeline(str(teacher_folder), folder, [1], overwrite=True), lambda: export(folder)):
        with pytest.raises(InvalidRequest, match="line 1"):
            again()
    assert not (folder / "onnx").exists()


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("a\n<!-- user:x start -->\nb\n", 2),
        ("<!-- user:x start -->\n<!-- user:y start -->\n<!-- user:y end -->\n<!-- user:x end -->\n", 2),
        ("<!-- user:x start -->\n<!-- user:x end -->\n<!-- user:x start -->\n<!-- user:x end -->\n", 3),
        ("<!-- user:x end -->\n", 1),
        ("<!-- user:x start -->\n<!-- user:y end -->\n", 2),
        ("---\na: b\n---\n\ntext <!-- user:x start --> text\n", 5),
        ("<!-- user:x begin -->\n", 1),
        ("<!-- user: start -->\n", 1),
        ("<!--user:x start\n-->\n", 1),
        ("<!-- USER:x start -->\n", 1),
    ],
)
def test_malformed_markers_are_refused_with_their_line(lines: str, line: int) -> None:
    with pytest.raises(InvalidRequest, match=rf"line {line}, "):
        user_sections(lines)


def test_a_section_that_could_not_be_read_back_is_refused(manifest: Manifest) -> None:
    for sections in ({"about": "<!-- user:end start -->"}, {"a b": "text"}, {"": "text"}):
        with pytest.raises(InvalidRequest):
            render(manifest, user_sections=sections)
    given = {"about": "", "first": "  1\n", "second": "\n2", "end": ""}
    assert user_sections(render(manifest, user_sections=given)) == given


def test_merge_prefers_the_new_and_loses_nothing() -> None:
    old, new = {"about": "old", "mine": "kept", "end": ""}, {"about": "new", "end": "", "more": "x"}
    assert merge(old, new) == {"about": "new", "mine": "kept", "end": "", "more": "x"}
    assert merge(old, {"about": ""}) == old


def test_a_card_by_hand_is_kept_whole(manifest: Manifest) -> None:
    by_hand = "---\nlicense: mit\ntags: [mine, 3, onnx]\n---\n\n# My model\n\nHello.\n"
    assert not is_generated(by_hand)
    assert body(by_hand) == "\n# My model\n\nHello.\n"
    text = render_over(manifest, by_hand)
    assert user_sections(text)["about"] == "# My model\n\nHello."
    assert "mine" in ModelCard(text).data.tags
    assert render_over(manifest, text) == text


@pytest.mark.parametrize("front", ["a: [", "a: &x [*x", "'", "[" * 50_000, "x" * 70_000, "a: !!python/name:os.system"])
def test_a_front_matter_that_is_none_is_refused(front: str, manifest: Manifest) -> None:
    with pytest.raises(InvalidRequest, match="front matter"):
        render_over(manifest, f"---\n{front}\n---\n# x\n")


# ---------------------------------------------------------------- nobody else writes into it

HOSTILE = [
    "<script>alert(1)</script>",
    "](javascript:alert(1))",
    "[x](http://evil.example)",
    "![x](http://evil.example/a.png)",
    "<http://evil.example>",
    "http://evil.example www.evil.example a@evil.example",
    "a|b|c",
    "`code` ``` ~~~",
    "\n\n# heading\n\n- item\n",
    "a\n```\n<img src=x onerror=alert(1)>",
    "&lt;script&gt; &#60;script&#62; &copy;",
    "<!-- user:about start -->",
    "--> <!-- user:end end -->",
    "\u202egnp.exe\u2066 \u200b\x00\x1b[31m",
    "---\nlicense: mit\n---",
    "*a* _b_ ~~c~~ **d** $x$ [^1] \\",
    "'\"; rm -rf / #\"\"\"'''",
    "{{ 7*7 }} {% x %}",
    "1. x",
    "javascript:alert(1)",
    "url(javascript:alert(1))=javascript:a]: data:text/html,x",
    "\ud7ff\uffff\U0001f600",
]
strings = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from(list("<>[]()!|`*_~#&;:/\\\"'@.\n -=+$")), max_size=30).map("".join),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=4).map("".join),
)
PARSER = MarkdownIt("gfm-like", {"html": True, "linkify": False})
OURS = re.compile(r"https://huggingface\.co/[\w.-]+/[\w.-]+|https?://[\w./~%+:-]+|samples/steps-\d+\.png")
GFM_LINK = re.compile(r"https?://|www\.|[\w.+-]@[\w-]", re.IGNORECASE)


def assert_harmless(text: str, name: str) -> None:
    """No HTML but the comments of our sections, no link but ours, no table or block that we did not write."""
    front = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(front, dict)
    assert ModelCard(text).data.to_dict()["library_name"] == "redif-sdk"
    assert user_sections(text) == {"about": "", "end": ""}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200b-\u200f]", text)
    tokens = PARSER.parse(body(text))
    blocks = [token.content for token in tokens if token.type == "html_block"]
    details = [block for block in blocks if "user:" not in block and "Your own text" not in block]
    assert [block.strip() for block in details] in (
        [],
        ["<details>\n<summary>All settings of the run</summary>", "</details>"],
    )
    assert sum("user:" in block for block in blocks) == 4
    assert sum(token.type == "heading_open" for token in tokens) == len(re.findall(r"(?m)^##? ", text))
    titles = [token.content for token in tokens if token.type == "inline" and token.level == 1]
    assert titles.count("Limits") == 1
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if set(line) == set("| -")]
    assert len(columns) == sum(token.type == "table_open" for token in tokens)
    assert [token.info for token in tokens if token.type == "fence"] == [
        "python",
        "bash",
        "python",
        *["json"] * ("<details>" in text),
        "bash",
    ]
    for token in tokens:
        for child in token.children or []:
            assert child.type not in ("html_inline", "em_open", "strong_open_"), name
            if child.type in ("link_open", "image"):
                address = str(child.attrs.get("href") or child.attrs.get("src"))
                assert OURS.fullmatch(address), address
            if child.type == "text":
                inside = any(other.type == "link_open" for other in token.children or [])
                assert inside or not GFM_LINK.search(child.content), child.content
    for block in code_blocks(text):
        compile(block, "card", "exec")


@settings(max_examples=20, deadline=None)
@given(name=strings, classes=st.tuples(strings, strings), licence=strings, teacher=strings, row=strings)
def test_no_string_of_a_manifest_breaks_out(
    manifest: Manifest, name: str, classes: tuple[str, str], licence: str, teacher: str, row: str
) -> None:
    first, second = classes
    names = [f"{first}0", f"{second}1", *"cdefghij"]
    hostile = manifest.model_copy(
        update={
            "name": name,
            "licence": licence,
            "teacher": TeacherInfo.model_construct(
                id=teacher, revision=name, hash=row, num_inference_steps=3, guidance_scale=1.0
            ),
            "condition": Condition.model_construct(num_classes=10, class_names=names),
            "distillation": Distillation.model_construct(
                method=row,
                rewards=[name, row],
                seed=0,
                budget=full(manifest).distillation.budget,
                versions={name: row},  # type: ignore[union-attr]
                estimator=name,
                configuration={name: row, "nested": [{"name": licence}], "reward": [teacher]},
            ),
            "metrics": [
                quality(row, 2, 2, data=name, features=licence),
                quality(name, 2, 2),
                speed(name, 1.0, runtime=row, precision=name, ratio_to=teacher, machine=licence),
            ],
            "verification": [
                {
                    "component": name,
                    "precision": row,
                    "runtime": teacher,
                    "device": licence,
                    "passed": True,
                    "max_abs": 1,
                }
            ],
        }
    )
    text = render(hostile)
    assert_harmless(text, name)
    place = re.search(r"from_pretrained\((.*)\)\n", text)
    assert place
    assert eval(place[1]) == name


def test_rows_of_any_shape_make_a_card(manifest: Manifest) -> None:
    """Whatever JSON a stranger puts into metrics and verification."""
    strange: list[Any] = [[], {}, "x", None, True, 10**400, -1, 1e308, ["a"], {"b": []}]
    keys = [
        "method",
        "num_inference_steps",
        "network_calls",
        "fd_teacher",
        "num_samples",
        "data",
        "features",
        "contender",
    ]
    keys += [
        "seconds_median",
        "batch",
        "ratio",
        "ratio_to",
        "machine",
        "component",
        "precision",
        "runtime",
        "passed",
        "psnr",
    ]
    metrics = [quality("redif", 2, 2) | speed("x", 1.0) | {key: value} for key in keys for value in strange]
    text = render(full(manifest).model_copy(update={"metrics": metrics, "verification": metrics}))
    assert len(text) < 100_000
    ModelCard(text)


@settings(max_examples=300, deadline=None)
@given(strings)
def test_python_strings_are_what_they_were(text: str) -> None:
    written = python_string(text)
    assert eval(written) == text
    assert not set("<>&`\n\r") & set(written)
    assert json.loads(json_text({"a": text})) == {"a": text}
    assert not set("<>&`") & set(json_text(text))
    assert "|" not in code(text).replace("&#124;", "")
    assert "\n" not in markdown(text)


HUGE = [
    "<",
    "[",
    "&#",
    "&#1",
    "&",
    "<a",
    "< ",
    "<a ",
    "<a on",
    " on",
    "](",
    "](<",
    "j",
    "java ",
    "javascript",
    "=",
    '"',
]
HUGE += [
    "<a '",
    '<a "=',
    "\\",
    "`",
    "&#0",
    "&a",
    "\n",
    "]:\n",
    "data:",
    "<x:",
    "<!--",
    "user:",
    "a onclick",
    "[x](\t",
    "o",
    "<a o",
]


@pytest.mark.parametrize("part", HUGE)
def test_a_megabyte_of_anything_takes_a_moment(part: str) -> None:
    text = (part * (CARD_LIMIT // len(part)))[:CARD_LIMIT]
    for hostile in (text, "<a " + text[3:], "---\n" + text[4:]):
        began = time.perf_counter()
        with contextlib.suppress(InvalidRequest):
            user_sections(hostile)
        assert time.perf_counter() - began < 8  # a quadratic one takes hours


def test_a_larger_card_is_refused(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    (folder / "README.md").write_bytes(b"x" * (CARD_LIMIT + 1))
    with pytest.raises(IntegrityError):
        write_card(folder)
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match="UTF-8"):
        write_card(folder)


# ---------------------------------------------------------------- samples and figures


def test_samples_show_a_class_a_column(tiny_student: Path, manifest: Manifest) -> None:
    pipe = FastPipeline(StudentFolder(tiny_student), runtime="onnxruntime", device="cpu", precision="fp32")
    for count in (2, 3):
        sheet = np.asarray(Image.open(tiny_student / f"samples/steps-{count}.png"))
        assert sheet.shape == (4 * 56, 10 * 56)
        assert np.array_equal(sheet, np.asarray(sample_grid(pipe, count)))
        labels = [index % 10 for index in range(40)]
        pictures = pipe(class_labels=labels, num_inference_steps=count, seed=0, output_type="uint8").images
        for index in (0, 9, 23, 39):
            tile = sheet[index // 10 * 56 : index // 10 * 56 + 56, index % 10 * 56 : index % 10 * 56 + 56]
            assert np.array_equal(tile, pictures[index, :, :, 0].repeat(2, 0).repeat(2, 1))
    assert {entry.path for entry in manifest.files} >= {"samples/steps-2.png", "samples/steps-3.png"}
    assert "](samples/steps-2.png)" in (read_card(tiny_student) or "")


def test_samples_without_classes_and_again(plain_student: Path, copy_of: Copy) -> None:
    from redif_sdk.export import export

    with Image.open(plain_student / "samples/steps-2.png") as sheet:
        assert sheet.size == (8 * 56, 4 * 56)
    folder = copy_of(plain_student)
    (folder / "samples/old.png").write_bytes((folder / "samples/steps-2.png").read_bytes())
    write_manifest(folder, StudentFolder(folder).manifest)
    export(folder, runtimes=["onnxruntime"])
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["steps-2.png", "steps-3.png"]
    StudentFolder(folder).check_all()


def test_recorded_rows_replace_those_of_their_kind(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    record(folder, ROWS)
    manifest = record(folder, speed_rows([speed("new", 0.5, ratio=np.float32(2)), speed("skipped", None)]))
    assert [row.get("method") or row["contender"] for row in manifest.metrics] == ["teacher", "ddim", "redif", "new"]
    row = manifest.metrics[-1]
    assert row["machine"]
    assert row["ratio"] == 2.0
    assert "round_seconds" not in row
    assert StudentFolder(folder).manifest == manifest
    assert "| new | onnxruntime |" in (read_card(folder) or "")
    StudentFolder(folder).check_all()
    before = (folder / "redif.json").read_bytes()
    for wrong in ({"method": "x", "mse": float("nan")}, {"method": Path("x")}, {"neither": 1}):
        with pytest.raises(InvalidRequest):
            record(folder, [wrong])
    assert record(folder, []) == manifest
    assert (folder / "redif.json").read_bytes() == before
    assert kind_of({"contender": 1}) == "speed"


def test_recording_makes_no_altered_file_good(tiny_student: Path, copy_of: Copy) -> None:
    folder = copy_of(tiny_student)
    (folder / "onnx/generator.fp32.onnx").write_bytes(b"other")
    record(folder, ROWS)
    with pytest.raises(IntegrityError, match=r"generator\.fp32\.onnx"):
        StudentFolder(folder).check_all()


def test_a_hub_cache_is_not_written_into(tiny_student: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/c"
    shutil.copytree(tiny_student, blobs)
    snapshot.mkdir(parents=True)
    for name in ("redif.json", "README.md"):
        (snapshot / name).symlink_to(blobs / name)
    for write in (lambda: write_card(snapshot), lambda: record(snapshot, ROWS)):
        with pytest.raises(InvalidRequest, match="is a link"):
            write()


# ---------------------------------------------------------------- the command


def redif(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["redif", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_command_writes_and_checks(
    tiny_student: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_student)
    assert redif("card", folder, "--check", monkeypatch=monkeypatch) == 0
    assert "up to date" in capsys.readouterr().out
    (folder / "README.md").unlink()
    assert redif("card", folder, "--check", "--json", "-", monkeypatch=monkeypatch) == 1
    out, errors = capsys.readouterr()
    assert errors.count("\n") == 1
    assert json.loads(out)["rows"][0]["up_to_date"] is False
    assert not (folder / "README.md").exists()
    assert redif("card", folder, "--quiet", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr() == ("", "")
    assert redif("card", folder, "--check", monkeypatch=monkeypatch) == 0
    with (folder / "README.md").open("a") as file:
        file.write("<!-- user:x start -->\n")
    assert redif("card", folder, monkeypatch=monkeypatch) == 2
    assert redif("card", folder.parent, monkeypatch=monkeypatch) == 2


@pytest.mark.slow
def test_measuring_writes_only_when_asked(
    tiny_student: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_student)
    before = (folder / "redif.json").read_bytes()
    quick = ["--contender", "fastpipeline", "--runtime", "onnxruntime", "--rounds", 1, "--batch", 1, "--no-cold-start"]
    arguments = ["bench", folder, *quick, "--precision", "fp32", "--quiet"]
    assert redif(*arguments, monkeypatch=monkeypatch) == 0
    assert (folder / "redif.json").read_bytes() == before
    assert redif(*arguments, "--save", monkeypatch=monkeypatch) == 0
    assert [row["contender"] for row in StudentFolder(folder).manifest.metrics] == ["fastpipeline"]
    evaluate = ["eval", folder, "--against", "fashion-mnist", "--num-samples", 16, "--no-baselines", "--quiet"]
    monkeypatch.setattr("redif_sdk.distill.evaluation.arena.evaluate_folder", lambda *_, **__: [quality("ddim", 2, 2)])
    assert redif(*evaluate, monkeypatch=monkeypatch) == 0
    assert len(StudentFolder(folder).manifest.metrics) == 1
    assert redif(*evaluate, "--save", monkeypatch=monkeypatch) == 0
    assert len(StudentFolder(folder).manifest.metrics) == 2
    assert redif("card", folder, "--check", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err == ""
