"""The page of the demo: its components and their events.

`studio.py` generates what is shown. Gradio's analytics are switched off before it is imported, and the page loads
nothing from other servers.
"""

from __future__ import annotations

import html
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr
from gradio.events import api as named_endpoint

from redif_sdk.artifact.manifest import Manifest
from redif_sdk.demo import charts, style
from redif_sdk.demo.editor import image_editor, image_of, strength_slider
from redif_sdk.demo.present import ImageFiles, figures
from redif_sdk.demo.studio import NOTHING, Studio, parse_seed, random_seed, takes_negatives
from redif_sdk.errors import InvalidRequest, RedifError
from redif_sdk.inputs import LONGEST_PROMPT

if TYPE_CHECKING:
    from redif_sdk.marks.signature import ContentSigner

__all__ = ["DemoSettings", "build_demo", "launch"]

SMALL = 128  # pixels; smaller images are shown with hard edges
MOST_CHOICES = 2000  # classes in a dropdown; with more, the class is typed
MOST_LISTED = 20  # class names listed below the text box
_GENERATE = (
    "Images of a prompt or a class. Returns the images, those of the comparison, the images after each step, a line on "
    "the latency, and details: seeds, seconds, runtime. An empty seed gives a random one."
)
_KEPT_SECONDS = 3600  # that images stay on the server's disk


@dataclass(frozen=True)
class DemoSettings:
    """Limits of the demo; each from 1 to 10,000.

    Attributes:
        max_images: maximum images per request.
        concurrency: concurrent requests.
        max_queue: maximum number of waiting requests.
    """

    max_images: int = 16
    concurrency: int = 1
    max_queue: int = 64

    def __post_init__(self) -> None:
        for name in ("max_images", "concurrency", "max_queue"):
            if not 1 <= getattr(self, name) <= 10_000:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; give an integer from 1 to 10000")


def build_demo(
    studio: Studio,
    cards: Mapping[str, str],
    settings: DemoSettings | None = None,
    *,
    signer: ContentSigner | None = None,
) -> gr.Blocks:
    """The page for the studio's students.

    Args:
        studio: the students.
        cards: their cards by name, from `present.card_text`.
        settings: limits.
        signer: signs every image file (C2PA).
    """
    settings = settings or DemoSettings(max_images=studio.max_images)
    return _Page(studio, cards, settings, signer).blocks


def launch(
    demo: gr.Blocks,
    *,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    share: bool = False,
    open_browser: bool = False,
    root_path: str = "",
) -> str:
    """Serve the page in a thread and return its address. `port` None: the first free port from 7860.

    `root_path`: the path below which a proxy publishes the page, such as "/demo".

    Raises InvalidRequest if the port is in use.
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
            root_path=root_path or None,
            run_history=False,
            footer_links=["api"],
            theme=theme,
            css=style.CSS,
        )
    except OSError as error:
        raise InvalidRequest(f"cannot listen on {host}:{port}; is the port in use? give another --port") from error
    return str(shared or address).rstrip("/")


def _told(error: RedifError) -> gr.Error:
    """An error message for the visitor; Gradio shows it as HTML."""
    return gr.Error(html.escape(str(error)), duration=None, title="Invalid request", print_exception=False)


class _Page:
    """The components of the page, and their events."""

    def __init__(
        self, studio: Studio, cards: Mapping[str, str], settings: DemoSettings, signer: ContentSigner | None
    ) -> None:
        self.studio, self.cards, self.settings, self.signer = studio, cards, settings, signer
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
                charts.show(charts.points({name: studio.manifest(name) for name in studio.students}))
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
        self.number = gr.Slider(1, self.studio.max_images, value=min(4, self.studio.max_images), step=1, label="Images")
        with gr.Row():
            self.seed = gr.Textbox("0", label="Seed", max_lines=1, scale=3, min_width=110, info="7, or 7:2")
            self.random = gr.Button("Random", scale=1, min_width=90)
        self.keep = gr.Checkbox(False, label="Keep this seed")
        with gr.Row(visible=any(few)):
            self.height = gr.Number(height, label="Height", precision=0, interactive=few[0], min_width=90)
            self.width = gr.Number(width, label="Width", precision=0, interactive=few[1], min_width=90)
        with gr.Row():
            self.guidance = gr.Number(label="Guidance scale", step=0.5, min_width=90, **_guidance(manifest))
            self.negative = gr.Textbox(
                "", label="Negative prompt", max_lines=2, scale=3, min_width=150, visible=takes_negatives(manifest)
            )
        self.previews = gr.Checkbox(False, label="Show every step", interactive=True)
        comparisons = self.studio.comparisons()
        self.compare = gr.Dropdown(comparisons, value=NOTHING, label="Compare with", visible=len(comparisons) > 1)
        paints = any(self.studio.manifest(name).network.inpainting for name in names)
        with gr.Accordion("Start from an image", open=paints, elem_id="start"):
            gr.Markdown("Upload an image. Paint over what is to be made anew, or nothing for all of it.")
            self.editor, self.strength = image_editor(max(height, width)), strength_slider()
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", min_width=110, elem_id="generate")
            self.cancel = gr.Button("Cancel", min_width=90, elem_id="cancel")

    def _outputs(self, manifest: Manifest) -> None:
        looks = ["redif-small"] if max(manifest.image_shape[:2]) < SMALL else []
        shape: dict[str, Any] = {"format": "png", "object_fit": "contain", "elem_classes": looks, "interactive": False}
        buttons: Any = ["download", "download_all", "fullscreen"]
        self.report = gr.Markdown("Choose, and press Generate.", elem_id="report")
        self.gallery = gr.Gallery(label="Images", columns=4, height="auto", buttons=buttons, elem_id="images", **shape)
        self.compared = gr.Gallery(
            label="Comparison", columns=4, height="auto", buttons=buttons, visible=False, elem_id="compared", **shape
        )
        self.formed = gr.Gallery(
            label="After each step", columns=8, height="auto", buttons=buttons, visible=False, elem_id="formed", **shape
        )
        with gr.Row(equal_height=True):
            self.share = gr.Button("Copy a link to these images", size="sm", scale=1, min_width=160)
            self.link = gr.Textbox(
                show_label=False,
                placeholder="the link appears here",
                interactive=False,
                max_lines=1,
                scale=3,
                elem_id="link",
            )
        self.details = gr.JSON(label="Details", visible="hidden")

    def _field(self, manifest: Manifest) -> dict[str, Any]:
        """Settings of the prompt or class field: a text box if any student takes prompts, else a dropdown."""
        if not self.typed:
            return {"label": "Class", **_classes(manifest)}
        if manifest.text is not None:
            return {"label": "Prompt", "value": manifest.text.examples[0], "info": None, "visible": True}
        names = _names(manifest)
        listed = ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")
        return {"label": "Class", "value": names[0] if names else None, "info": listed, "visible": bool(names)}

    def _rows(self, manifest: Manifest) -> list[list[Any]]:
        """Example requests."""
        labels: list[Any] = (_names(manifest) if manifest.text is None else manifest.text.examples)[:5] or [None]
        steps = manifest.supported_steps
        return [[label, steps[-1 - place % len(steps)], str(place + 1), 4] for place, label in enumerate(labels)]

    def _examples(self, manifest: Manifest) -> None:
        """Examples; a click fills the form and runs."""
        self.examples = gr.Dataset(
            components=[self.prompt, self.steps, self.seed, self.number],
            samples=self._rows(manifest),
            headers=["prompt" if self.typed else "class", "steps", "seed", "images"],
            label="Examples",
            type="values",
            samples_per_page=5,
        )

    # ------------------------------------------------------------------ what happens

    def _events(self, blocks: gr.Blocks) -> None:
        many = len(self.studio.students) > 1
        inputs: list[Any] = [self.prompt, self.steps, self.seed, self.number, self.student, self.previews, self.compare]
        inputs += [self.height, self.width, self.editor, self.strength, self.guidance, self.negative]
        outputs = [self.gallery, self.compared, self.formed, self.report, self.details]
        address = [self.student, self.prompt, self.steps, self.seed, self.number]
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
        # The report shows the progress. Gradio's own indicator would often show "Error" over a cancelled run.
        running: dict[str, Any] = {"show_progress": "hidden", "concurrency_id": "images"}
        unnamed: dict[str, Any] = {**running, "api_visibility": "private"}

        drawn = self.generate.click(
            lambda seed, keep: seed if keep else random_seed(), [self.seed, self.keep], self.seed, **hidden
        )
        made = drawn.then(self._generate, inputs, outputs, api_name="generate", api_description=_GENERATE, **running)
        made.success(None, address, [], js=style.write_address(many))
        by_key = gr.on(
            [self.seed.submit, *([self.prompt.submit] if self.typed else [])],
            self._generate,
            inputs,
            outputs,
            **unnamed,
        )
        by_key.success(None, address, [], js=style.write_address(many))

        chosen = self.examples.click(
            lambda row: (*row, True),
            self.examples,
            [self.prompt, self.steps, self.seed, self.number, self.keep],
            **hidden,
        )
        shown = chosen.then(self._generate, inputs, outputs, **unnamed)

        linked = gr.State(False)
        opened = blocks.load(
            self._read_address,
            None,
            [self.student, self.prompt, self.steps, self.seed, self.number, self.keep, linked, self.card],
            **hidden,
        )
        followed = opened.then(
            lambda yes, *rest: (yield from self._generate(*rest)) if yes else (yield gr.skip()),
            [linked, *inputs],
            outputs,
            **unnamed,
        )
        ended = self.cancel.click(None, cancels=[made, by_key, shown, followed])
        # A moment later: the last update of the cancelled run may still be on its way, and none follows it.
        last = ended.then(lambda: time.sleep(0.3), None, None, **hidden)
        last.then(lambda: "Cancelled. Finished images are kept.", None, self.report, **hidden)
        self.random.click(lambda: (random_seed(), True), None, [self.seed, self.keep], **hidden)
        self.share.click(None, address, self.link, js=style.share(many))
        chosen_by_student = [self.prompt, self.steps, self.previews, self.height, self.width, self.card, self.examples]
        chosen_by_student += [self.guidance, self.negative]
        self.student.input(self._choose, self.student, chosen_by_student, **hidden)
        named_endpoint(self._students, api_name="students", api_description="The students, and what each supports.")

    def _students(self) -> list[dict[str, Any]]:
        """The students: name, supported steps (the first is the default), classes, example prompts, image size."""
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
        image: dict[str, Any] | None = None,
        strength: float | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the values of the outputs as images are finished."""
        try:
            begun, mask = image_of(image)
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
                image=begun,
                mask=mask,
                strength=strength,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
            )
            with tempfile.TemporaryDirectory(prefix="redif-demo-") as folder:
                name = f"{order.student}-{order.prompt}" if order.prompt else order.student
                files = ImageFiles(Path(folder), name, self.signer)
                for shown in self.studio.make(order):
                    compared, formed = files(shown.compared, order.compare), files(shown.formed)
                    yield (
                        files(shown.images),
                        gr.update(value=compared, visible=order.compare != NOTHING, label=order.compare.capitalize()),
                        gr.update(value=formed, visible=order.previews),
                        figures(shown),
                        {
                            "student": order.student,
                            "num_inference_steps": order.num_inference_steps,
                            "seeds": [[str(seed), index] for seed, index in order.seeds[: shown.done]],
                            "seconds": shown.seconds,
                            "teacher_seconds": shown.teacher_seconds,
                            "nsfw_content_detected": shown.blocked,
                            "runtime": {
                                key: shown.runtime.get(key) for key in ("runtime", "version", "precision", "device")
                            },
                        },
                    )
        except RedifError as error:
            raise _told(error) from error

    def _choose(self, student: str) -> tuple[Any, ...]:
        """Updates of the components that depend on the student."""
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
            gr.update(**_guidance(manifest)),
            gr.update(value="", visible=takes_negatives(manifest)),
        )

    def _read_address(self, request: gr.Request) -> tuple[Any, ...]:
        """The valid settings of a link, and whether it has a seed: then its images are generated at once."""
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


def _guidance(manifest: Manifest) -> dict[str, Any]:
    """Settings of the field of the guidance scale, which only some students take."""
    takes = manifest.guidance_at_run_time is not None
    low, high = manifest.network.guidance_range or (0, None)
    value = manifest.default_guidance if takes else None
    return {"value": value, "visible": takes, "minimum": low, "maximum": high}


def _names(manifest: Manifest) -> list[str]:
    """Class names, or numbers for classes without names."""
    classes = manifest.classes
    if classes is None:
        return []
    return list(classes.class_names or map(str, range(min(classes.num_classes, MOST_CHOICES))))


def _classes(manifest: Manifest) -> dict[str, Any]:
    """Settings of the class dropdown, which accepts typed values too."""
    names = _names(manifest)
    return {
        "choices": names[:MOST_CHOICES],
        "value": names[0] if names else None,
        "allow_custom_value": True,
        "visible": bool(names),
    }
