"""The demo's page: which parts it has, and what happens when they are touched.

What is shown is made by `studio.py`. Gradio is told not to phone home before it is imported, and nothing on the page
is loaded from anybody else's server.
"""

from __future__ import annotations

import base64
import html
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from gradio.events import api as named_endpoint

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.card.render import read_card, render
from redif_sdk.card.sections import body
from redif_sdk.demo import charts, style
from redif_sdk.demo.studio import NOTHING, Captioned, Shown, Studio, parse_seed, random_seed
from redif_sdk.errors import InvalidRequest, RedifError
from redif_sdk.inputs import LONGEST_PROMPT

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["DemoSettings", "build_demo", "card_text", "launch"]

SMALL = 128  # pixels: smaller pictures are shown with hard edges
MOST_CHOICES = 2000  # classes in a list that a browser draws; with more, the class is typed
MOST_LISTED = 20  # classes named below a box that they are typed into
_GENERATE = (
    "Pictures of a prompt, or of a class. Returns the pictures, those of the teacher, the steps in between, a sentence "
    "on the latency, and details: seeds, seconds, runtime. An empty seed is drawn."
)
_KEPT_SECONDS = 3600  # how long pictures stay on the server's disk
_UNUSUAL = re.compile(r"[^A-Za-z0-9.-]+")
_IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]*)[^)]*\)")


@dataclass(frozen=True)
class DemoSettings:
    """`max_images`: most pictures a wish. `concurrency`: wishes at once; `max_queue`: most that wait."""

    max_images: int = 16
    concurrency: int = 1
    max_queue: int = 64

    def __post_init__(self) -> None:
        for name in ("max_images", "concurrency", "max_queue"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; give a whole number of at least 1")


def card_text(manifest: Manifest, folder: StudentFolder | None = None) -> str:
    """A student's card as the page shows it: without what only the Hub reads, its pictures inside the text.

    `folder`: where its card and samples lie; without, the card is made from the manifest. A picture from anywhere else
    is shown as its description: a page must not make visitors ask strangers.
    """
    written = read_card(folder.path) if folder is not None else None
    text = body(written if written is not None else render(manifest))

    def picture(found: re.Match[str]) -> str:
        described, place = found[1], found[2]
        if folder is None or place not in folder.files("samples") or not place.endswith(".png"):
            return f"*{described}*" if described else ""
        data = base64.b64encode(folder.read(place)).decode()
        return f"![{described}](data:image/png;base64,{data})"

    return _IMAGE.sub(picture, text)


def build_demo(studio: Studio, cards: Mapping[str, str], settings: DemoSettings | None = None) -> gr.Blocks:
    """The page of the studio's students. `cards`: their texts by name, as `card_text` makes them."""
    settings = settings or DemoSettings(max_images=studio.max_images)
    return _Page(studio, cards, settings).blocks


def launch(
    demo: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
    open_browser: bool = False,
) -> str:
    """Start serving the page in a thread, and return its address. `port` None: the first that is free from 7860 on.

    Raises InvalidRequest where the port is taken.
    """
    theme = gr.themes.Default(primary_hue="indigo", font=style.FONTS, font_mono=style.MONOSPACE)
    try:
        _, address, shared = demo.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            ssr_mode=False,
            run_history=False,
            footer_links=["api"],
            theme=theme,
            css=style.CSS,
        )
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {host}:{port}; is the port in use? give another --port") from error
    return str(shared or address).rstrip("/")


def _told(error: RedifError) -> gr.Error:
    """An error for the visitor; Gradio shows it as HTML."""
    return gr.Error(html.escape(str(error)), duration=None, title="That cannot be made", print_exception=False)


def _figures(shown: Shown) -> str:
    """Latency and pictures a second, of what is finished."""
    if not shown.done:
        return "Making the first picture"
    each = shown.seconds / shown.done
    engine = f"{shown.runtime.get('runtime')}, {shown.runtime.get('precision')}, {shown.runtime.get('device')}"
    text = (
        f"**{shown.done} picture{'s' * (shown.done != 1)}** in {_time(shown.seconds)}: {_time(each)} each, "
        f"**{1 / each:,.3g} a second** ({engine})"
    )
    if shown.compared and shown.teacher_seconds:
        teacher = shown.teacher_seconds / len(shown.compared)
        text += f". Beside them: {_time(teacher)} each, {teacher / each:.3g} times as long"
    return text + (f" ... {shown.note}" if shown.note else "")


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


class _Files:
    """Pictures as files, each written once: Gradio copies them when they are shown, and the folder goes afterwards.

    Given pictures themselves, it would write all of them anew whenever one comes, while browsers read them.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._written: dict[int, tuple[Image, str]] = {}  # by id, with the picture, so that no id comes twice

    def __call__(self, pictures: list[Captioned], kind: str = "") -> list[tuple[str, str]]:
        return [(self._file(picture, f"{self._name}-{caption}-{kind}"), caption) for picture, caption in pictures]

    def _file(self, picture: Image, name: str) -> str:
        if id(picture) not in self._written:
            folder = self._folder / str(len(self._written))
            folder.mkdir()
            file = folder / f"{_UNUSUAL.sub('_', name).strip('_-')[:120]}.png"
            picture.save(file)
            self._written[id(picture)] = picture, str(file)
        return self._written[id(picture)][1]


class _Page:
    """The parts of the page, made once, and what they do."""

    def __init__(self, studio: Studio, cards: Mapping[str, str], settings: DemoSettings) -> None:
        self.studio, self.cards, self.settings = studio, cards, settings
        self.first = next(iter(studio.students))
        manifest = studio.manifest(self.first)
        title = manifest.name if len(studio.students) == 1 else "Few-step students"
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as blocks:
            gr.Markdown(f"# {html.escape(title)}")
            with gr.Tab("Generate"):
                with gr.Row():
                    with gr.Column(scale=2, min_width=280):
                        self._inputs(manifest)
                    with gr.Column(scale=5, min_width=300):
                        self._outputs(manifest)
                self._examples(manifest)
            with gr.Tab("Figures"):
                gr.HTML(charts.chart(charts.points({name: studio.manifest(name) for name in studio.students})))
            with gr.Tab("Card"):
                self.card = gr.Markdown(cards.get(self.first, ""), elem_id="card", sanitize_html=True)
            self._events(blocks)
        blocks.queue(
            max_size=settings.max_queue, default_concurrency_limit=settings.concurrency, status_update_rate="auto"
        )
        self.blocks: gr.Blocks = blocks

    # ------------------------------------------------------------------ parts

    def _inputs(self, manifest: Manifest) -> None:
        names = list(self.studio.students)
        steps = manifest.supported_steps
        few = "height" in manifest.latents.dynamic, "width" in manifest.latents.dynamic
        height, width, _ = manifest.image_shape
        self.student = gr.Dropdown(names, value=self.first, label="Student", visible=len(names) > 1)
        self.typed = any(self.studio.manifest(name).text is not None for name in names)
        field = self._field(manifest)
        self.prompt: Any = gr.Textbox(max_lines=4, **field) if self.typed else gr.Dropdown(filterable=True, **field)
        self.steps = gr.Radio(steps, value=steps[0], label="Steps")
        self.number = gr.Slider(
            1, self.studio.max_images, value=min(4, self.studio.max_images), step=1, label="Pictures"
        )
        with gr.Row():
            self.seed = gr.Textbox("0", label="Seed", max_lines=1, scale=3, min_width=110, info="7, or 7:2")
            self.random = gr.Button("Random", scale=1, min_width=90)
        self.keep = gr.Checkbox(False, label="Keep this seed")
        with gr.Row(visible=any(few)):
            self.height = gr.Number(height, label="Height", precision=0, interactive=few[0], min_width=90)
            self.width = gr.Number(width, label="Width", precision=0, interactive=few[1], min_width=90)
        self.previews = gr.Checkbox(False, label="Show every step", interactive=True)
        comparisons = self.studio.comparisons()
        self.compare = gr.Dropdown(comparisons, value=NOTHING, label="Beside it", visible=len(comparisons) > 1)
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", min_width=110, elem_id="generate")
            self.cancel = gr.Button("Cancel", min_width=90, elem_id="cancel")

    def _outputs(self, manifest: Manifest) -> None:
        looks = ["redif-small"] if max(manifest.image_shape[:2]) < SMALL else []
        shape: dict[str, Any] = {"format": "png", "object_fit": "contain", "elem_classes": looks, "interactive": False}
        buttons: Any = ["download", "download_all", "fullscreen"]
        self.report = gr.Markdown("Choose, and press Generate.", elem_id="report")
        self.gallery = gr.Gallery(
            label="Pictures", columns=4, height="auto", buttons=buttons, elem_id="pictures", **shape
        )
        self.compared = gr.Gallery(
            label="Beside it", columns=4, height="auto", buttons=buttons, visible=False, elem_id="compared", **shape
        )
        self.formed = gr.Gallery(
            label="How they formed", columns=8, height="auto", buttons=buttons, visible=False, elem_id="formed", **shape
        )
        with gr.Row(equal_height=True):
            self.share = gr.Button("Copy a link to these pictures", size="sm", scale=1, min_width=160)
            self.link = gr.Textbox(
                show_label=False,
                placeholder="the link comes here",
                interactive=False,
                max_lines=1,
                scale=3,
                elem_id="link",
            )
        self.details = gr.JSON(label="Details", visible="hidden")

    def _field(self, manifest: Manifest) -> dict[str, Any]:
        """What is drawn: a box to type in where any student here takes prompts, else a list of classes."""
        if not self.typed:
            return {"label": "Class", **_classes(manifest)}
        if manifest.text is not None:
            return {"label": "Prompt", "value": manifest.text.examples[0], "info": None, "visible": True}
        names = _names(manifest)
        listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
        return {"label": "Class", "value": names[0] if names else None, "info": listed, "visible": bool(names)}

    def _rows(self, manifest: Manifest) -> list[list[Any]]:
        """Some wishes."""
        labels: list[Any] = (_names(manifest) if manifest.text is None else manifest.text.examples)[:5] or [None]
        steps = manifest.supported_steps
        return [[label, steps[-1 - place % len(steps)], str(place + 1), 4] for place, label in enumerate(labels)]

    def _examples(self, manifest: Manifest) -> None:
        """Wishes ready to click: they fill the form and run."""
        self.examples = gr.Dataset(
            components=[self.prompt, self.steps, self.seed, self.number],
            samples=self._rows(manifest),
            headers=["prompt" if self.typed else "class", "steps", "seed", "pictures"],
            label="Examples",
            type="values",
            samples_per_page=5,
        )

    # ------------------------------------------------------------------ what happens

    def _events(self, blocks: gr.Blocks) -> None:
        many = len(self.studio.students) > 1
        wish: list[Any] = [self.prompt, self.steps, self.seed, self.number, self.student, self.previews, self.compare]
        wish += [self.height, self.width]
        outputs = [self.gallery, self.compared, self.formed, self.report, self.details]
        address = [self.student, self.prompt, self.steps, self.seed, self.number]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        # The report says how far it is. Gradio's own sign would often say "Error" over a run that was cancelled.
        running: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "pictures"}
        unnamed: dict[str, Any] = {**running, "api_visibility": "private"}

        drawn = self.generate.click(
            lambda seed, keep: seed if keep else random_seed(), [self.seed, self.keep], self.seed, **hidden
        )
        made = drawn.then(self._generate, wish, outputs, api_name="generate", api_description=_GENERATE, **running)
        made.success(None, address, [], js=style.write_address(many))
        by_key = gr.on(
            [self.seed.submit, *([self.prompt.submit] if self.typed else [])], self._generate, wish, outputs, **unnamed
        )
        by_key.success(None, address, [], js=style.write_address(many))

        chosen = self.examples.click(
            lambda row: (*row, True),
            self.examples,
            [self.prompt, self.steps, self.seed, self.number, self.keep],
            **hidden,
        )
        shown = chosen.then(self._generate, wish, outputs, **unnamed)

        linked = gr.State(False)
        opened = blocks.load(
            self._read_address,
            None,
            [self.student, self.prompt, self.steps, self.seed, self.number, self.keep, linked, self.card],
            **hidden,
        )
        followed = opened.then(
            lambda yes, *rest: (yield from self._generate(*rest)) if yes else (yield gr.skip()),
            [linked, *wish],
            outputs,
            **unnamed,
        )
        ended = self.cancel.click(None, cancels=[made, by_key, shown, followed])
        ended.then(lambda: "Cancelled. What was finished stays.", None, self.report, **hidden)  # nothing comes after it
        self.random.click(lambda: (random_seed(), True), None, [self.seed, self.keep], **hidden)
        self.share.click(None, address, self.link, js=style.share(many))
        self.student.input(
            self._choose,
            self.student,
            [self.prompt, self.steps, self.previews, self.height, self.width, self.card, self.examples],
            **hidden,
        )
        named_endpoint(self._students, api_name="students", api_description="The students, and what each can do.")

    def _students(self) -> list[dict[str, Any]]:
        """The students: name, numbers of steps (the first is the default), classes, examples of prompts, and the size
        of a picture."""
        found = []
        for name in self.studio.students:
            manifest = self.studio.manifest(name)
            height, width, _ = manifest.image_shape
            classes = None if manifest.classes is None else _names(manifest)
            prompts = None if manifest.text is None else manifest.text.examples
            found.append(
                {"name": name, "num_inference_steps": manifest.supported_steps, "classes": classes, "prompts": prompts}
                | {"height": height, "width": width}
            )
        return found

    def _generate(
        self,
        prompt: str | None,
        num_inference_steps: int | None = None,
        seed: str | None = None,
        num_images: float = 1,
        student: str | None = None,
        previews: bool = False,
        compare: str | None = None,
        height: float | None = None,
        width: float | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """The values of the outputs, as pictures come."""
        try:
            order = self.studio.order(
                student,
                prompt,
                num_inference_steps,
                seed,
                num_images,
                height=height,
                width=width,
                previews=previews,
                compare=compare,
            )
            with tempfile.TemporaryDirectory(prefix="redif-demo-") as folder:
                files = _Files(Path(folder), f"{order.student}-{order.prompt}" if order.prompt else order.student)
                for shown in self.studio.make(order):
                    compared, formed = files(shown.compared, order.compare), files(shown.formed)
                    yield (
                        files(shown.pictures),
                        gr.update(value=compared, visible=order.compare != NOTHING, label=order.compare.capitalize()),
                        gr.update(value=formed, visible=order.previews),
                        _figures(shown),
                        {
                            "student": order.student,
                            "num_inference_steps": order.num_inference_steps,
                            "seeds": [[str(seed), index] for seed, index in order.seeds[: shown.done]],
                            "seconds": shown.seconds,
                            "teacher_seconds": shown.teacher_seconds,
                            "runtime": {
                                key: shown.runtime.get(key) for key in ("runtime", "version", "precision", "device")
                            },
                        },
                    )
        except RedifError as error:
            raise _told(error) from error

    def _choose(self, student: str) -> tuple[Any, ...]:
        """What changes with the student."""
        manifest = self.studio.manifest(student)
        steps = manifest.supported_steps
        height, width, _ = manifest.image_shape
        return (
            gr.update(**self._field(manifest)),
            gr.update(choices=steps, value=steps[0]),
            gr.update(value=False, interactive=manifest.supported_steps != [1]),
            gr.update(value=height, interactive="height" in manifest.latents.dynamic),
            gr.update(value=width, interactive="width" in manifest.latents.dynamic),
            self.cards.get(student, ""),
            gr.update(samples=self._rows(manifest)),
        )

    def _read_address(self, request: gr.Request) -> tuple[Any, ...]:
        """What a link says, as far as it is possible here; and whether it names pictures, which are then made."""
        asked = dict(request.query_params)
        student = asked.get("student") if asked.get("student") in self.studio.students else self.first
        manifest = self.studio.manifest(str(student))
        prompt: str | None = asked.get("prompt", "")[:LONGEST_PROMPT]
        if manifest.text is None:
            prompt = next((name for name in _names(manifest) if name.casefold() == str(prompt).casefold()), None)
        steps = {str(count): count for count in manifest.supported_steps}
        try:
            parse_seed(asked.get("seed", ""))
            linked = True
        except InvalidRequest:
            linked = False
        number = asked.get("n", "")
        count = int(number) if number.isdecimal() and len(number) < 6 else 4
        return (
            student,
            gr.update(**(self._field(manifest) | ({"value": prompt} if prompt else {}))),
            gr.update(choices=[*steps.values()], value=steps.get(asked.get("steps", ""), manifest.supported_steps[0])),
            asked["seed"] if linked else random_seed(),
            min(max(count, 1), self.studio.max_images),
            linked,
            linked,
            self.cards.get(str(student), ""),
        )


def _names(manifest: Manifest) -> list[str]:
    """Classes by name, or by number where they have none."""
    classes = manifest.classes
    if classes is None:
        return []
    return list(classes.class_names or map(str, range(min(classes.num_classes, MOST_CHOICES))))


def _classes(manifest: Manifest) -> dict[str, Any]:
    """The class picker: a list to choose from, or a field to type in where there are too many."""
    names = _names(manifest)
    return {
        "choices": names[:MOST_CHOICES],
        "value": names[0] if names else None,
        "allow_custom_value": True,
        "visible": bool(names),
    }
