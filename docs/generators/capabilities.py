"""The capability matrix: what works with what, asked of the code's own registries and checks.

A refusal is stated only where the code has the message that refuses (`errors.messages`); the page fails to build when
the message is gone.
"""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from importlib import import_module
from typing import Any

from docs.generators.errors import messages
from docs.generators.text import code, markdown, table

__all__ = ["methods", "page", "pipelines"]

YES, NO = "yes", "no"


def _refused(text: str) -> bool:
    """Whether the code has a message with this text.

    Raises:
        LookupError: it has none, so what the page says is out of date.
    """
    if not any(text in message.text for message in messages()):
        raise LookupError(f"docs/generators/capabilities.py relies on a refusal that the code does not have: {text}")
    return True


# ---------------------------------------------------------------------- pipelines


@cache
def pipelines() -> tuple[str, ...]:
    """Every pipeline that has an adapter, and the network whose pipelines share one."""
    import redif_sdk.distill.teachers  # noqa: F401  registers the adapters
    from redif_sdk.distill.teachers.registry import UNET_2D, supported

    return (*supported(), UNET_2D)


@cache
def _network(class_name: str) -> Any:
    """A network of the class with its default configuration, of one layer where it is a transformer, without memory."""
    import diffusers
    import torch

    kind = getattr(diffusers, class_name)
    shallow = {"num_layers", "num_single_layers"} & set(inspect.signature(kind.__init__).parameters)
    with torch.device("meta"):
        return kind(**dict.fromkeys(shallow, 1))


def _network_class(pipeline: str) -> tuple[str, set[str]]:
    """The class of a pipeline's network, and the names of its parts."""
    import diffusers

    if not pipeline.endswith("Pipeline"):
        return pipeline, {"unet", "scheduler"}
    parts = inspect.signature(getattr(diffusers, pipeline).__init__).parameters
    name = "transformer" if "transformer" in parts else "unet"
    annotation: Any = parts[name].annotation
    return getattr(annotation, "__name__", str(annotation)).rpartition(".")[2], set(parts)


def _sizes(network: Any) -> str:
    from redif_sdk.errors import UnsupportedModel
    from redif_sdk.export.onnx import largest_extent, size_multiple

    try:
        size_multiple(network)
    except UnsupportedModel:
        return NO
    return YES if largest_extent(network) is None else "yes, to a limit"


def _int8(network: Any) -> str:
    """int8 quantises all convolutions but the first and the last, and is refused where there is none between."""
    import torch

    _refused("int8 quantises all but the first and the last")
    return YES if sum(isinstance(part, torch.nn.Conv2d) for part in network.modules()) > 2 else NO


def _range(network: Any, *, takes_scale: bool) -> str:
    """Whether a student can learn a range of guidance scales; ``takes_scale``: its class may have the input."""
    from redif_sdk.errors import UnsupportedModel
    from redif_sdk.models.scales import check_takes_scale

    _refused("cannot learn a range of guidance scales: its class")
    try:
        check_takes_scale(network)
    except UnsupportedModel:
        return "if it takes the scale" if takes_scale else NO
    return YES


def _negative(pipeline: str) -> str:
    """How negative prompts are taken: by an imported pipeline's guidance, or by the graph "nag"."""
    from redif_sdk.distill.teachers import adapters
    from redif_sdk.models.nag import ALPHA

    kind = adapters._KINDS.get(pipeline)
    if kind is None:
        return NO
    ways = ["import" if kind.guidance != 1 else "", "nag" if _network_class(pipeline)[0] in ALPHA else ""]
    return ", ".join(filter(None, ways)) or NO


def _distilled(pipeline: str) -> str:
    """Whether a pipeline's network is distilled; one of inpainting is only where it takes latents alone."""
    from redif_sdk.distill.teachers import adapters

    kind = adapters._KINDS.get(pipeline)
    return "not of 9 channels" if kind and kind.paints and _refused("which is not distilled") else YES


def _from_image(pipeline: str) -> str:
    """Whether a student takes an image; inpainting networks always do."""
    from redif_sdk.distill.teachers import adapters

    kind = adapters._KINDS.get(pipeline)
    return "required of 9 channels" if kind and kind.paints and _refused("is an inpainting model: give") else YES


def _pipeline_row(pipeline: str) -> list[str]:
    from redif_sdk.distill.teachers import adapters
    from redif_sdk.models.families import LAYOUTS

    class_name, parts = _network_class(pipeline)
    kind = adapters._KINDS.get(pipeline)
    text, decoder = pipeline in LAYOUTS, "vae" in parts
    guidance = "input" if kind is not None and kind.embedded is not None else "2 → 1"
    network = _network(class_name)
    return [
        code(pipeline) if pipeline.endswith("Pipeline") else f"any with a {code(pipeline)}",
        "text" if text else "class" if pipeline == "DiTPipeline" else "class, or none",
        guidance,
        _range(network, takes_scale=guidance == "input"),
        _negative(pipeline),
        _distilled(pipeline),
        YES,
        _sizes(network),
        _int8(network),
        _from_image(pipeline),
        NO if decoder or text else YES,
    ]


def _pipelines() -> str:
    _refused("which is not supported in a page; serve it instead")
    head = (
        *("pipeline", "condition", "guided calls", "range of scales", "negative prompts", "distil", "import"),
        *("free sizes", "int8", "from an image", "in a page"),
    )
    rows = [_pipeline_row(pipeline) for pipeline in pipelines()]
    rows.append(["any function", "class, or none", "2 → 1", NO, NO, YES, NO, "note", "note", YES, YES])
    networks = ", ".join(dict.fromkeys(code(_network_class(pipeline)[0]) for pipeline in pipelines()))
    return (
        table(head, rows) + f"- Networks: {networks}; of a function any `torch.nn.Module` "
        "([`Teacher.from_callable`](api/redif_sdk.distill/Teacher.md)). Its sizes are free with `latents.multiple` in "
        "the manifest, and int8 needs three convolutions.\n"
        "- *Guided calls* a step: of the teacher, and of its student; or the scale is an input of the network.\n"
        "- *Range of scales* ([how](../guidance.md#students-of-a-range-of-scales)): a student can learn one, and takes "
        "the scale in each call.\n"
        "- *Negative prompts* ([how](../guidance.md)): of a pipeline that was imported, and by the graph of "
        "`redif export --nag`.\n"
        "- *Free sizes*: `--sizes`. *From an image*: where there is an autoencoder, by the graph `encoder` "
        "([how](../image-to-image.md)). *In a page*: `--target web`.\n"
        "- All of them take fp32, fp16, bf16, int8wo and int4wo. int8 is for networks of convolutions.\n\n"
    )


# ---------------------------------------------------------------------- methods


def methods() -> tuple[str, ...]:
    """Every method, in the order of the registry."""
    from redif_sdk.distill.methods.registry import METHODS

    return tuple(METHODS)


def _methods() -> str:
    from redif_sdk.distill.compute import parallel
    from redif_sdk.distill.config import RANGED
    from redif_sdk.distill.methods.registry import METHODS
    from redif_sdk.distill.options import MODELS, Supervised
    from redif_sdk.distill.student import decision

    _refused("cannot learn a range of guidance scales (guidance_range)")
    _refused("keeps a copy of the network, which cannot be sharded")
    rows = []
    for name, method in METHODS.items():
        options = MODELS[name]
        regression = "all of it" if issubclass(options, Supervised) else NO
        if "warm_start" in options.model_fields:
            regression = f"{options.model_fields['warm_start'].default:g} of the run"
        about = (inspect.getdoc(import_module(method.__module__)) or "").split("\n\n")[0]
        rows.append(
            [
                code(name),
                markdown(about),
                YES if method.rewarded else NO,
                regression,
                YES if "segments" in options.model_fields else NO,
                NO if name in decision._BY_TIMES else YES,
                YES if name in parallel.METHODS else NO,
                YES if name in RANGED else NO,
            ]
        )
    head = (
        *("method", "what it does", "follows a reward", "regression first"),
        *("segments", "EDM's noise levels", "`--shard`", "range of guidance scales"),
    )
    return table(head, rows)


def _estimators() -> str:
    from redif_sdk.distill.options import ESTIMATORS

    rows = [
        (
            code(name),
            NO if "group_size" in model.model_fields else YES,
            YES if "group_noise" in model.model_fields else NO,
            YES if "dmd_weight" in model.model_fields else NO,
        )
        for name, model in ESTIMATORS.items()
    ]
    return table(
        ("estimator of `redif`", "needs the reward's gradient", "groups of several noises", "DMD's term"), rows
    )


# ---------------------------------------------------------------------- engines


def _on(engine: str, precision: str) -> str:
    """What an engine does with a precision."""
    from redif_sdk.runtimes import loops_in_numpy, openvino

    if engine == "onnxruntime" and precision == "bf16" and _refused("onnxruntime has no bf16 arithmetic on the CPU"):
        return "on a GPU"
    if engine == "openvino":
        if precision not in openvino.HINTS:
            return NO
        if openvino.HINTS[precision][1] != "FP32":
            return "where the processor has it; steps in numpy"
    if engine.startswith("tensorrt") and precision == "int4wo":
        _refused("tensorrt-rtx cannot build")
        return NO
    if engine == "tensorrt-rtx" and loops_in_numpy(engine, precision):
        return "builds; steps in numpy; not run"
    if engine.startswith("tensorrt"):
        return "builds; not run" if engine == "tensorrt-rtx" else "not run"
    return YES


def _engines() -> str:
    from redif_sdk.export.parity import THRESHOLDS
    from redif_sdk.runtimes import AUTO, AUTO_LARGE, PRECISIONS, RUNTIMES

    engines = {name: engine for name, engine in RUNTIMES.items() if engine.module is not None}
    rows = []
    for precision in PRECISIONS:
        network, images = THRESHOLDS[precision]
        gate = f"relative RMSE ≤ {network.bound:g}; " + (
            f"PSNR ≥ {images.bound:g} dB" if images.measure == "psnr" else f"within {images.bound:g} level of 255"
        )
        rows.append([code(precision), *(_on(name, precision) for name in engines), gate])
    matrix = table(("precision", *(code(name) for name in engines), "parity gate: network; images"), rows)
    devices = table(
        ("engine", "devices", "install"),
        ([code(name), ", ".join(engine.devices), code(f'pip install "redif-sdk[{engine.extra}]"')]
         for name, engine in engines.items()),
    )  # fmt: skip
    choice = " → ".join(f"{choice.runtime} in {choice.precision}" for choice in AUTO)
    large = " → ".join(f"{choice.runtime} in {choice.precision}" for choice in AUTO_LARGE)
    return (
        f'{matrix}{devices}`runtime="auto"` takes the first that is available: {choice}. Of networks of 200 million '
        f"weights and more: {large}. An NVIDIA GPU comes before the processor.\n\n"
    )


def _is_table(name: str) -> str:
    """Whether a scheduler with its default settings is a step table at four steps, which is compared with it."""
    import diffusers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, by diffusers
        return _samples_as_its_table(getattr(diffusers, name)())


def _samples_as_its_table(scheduler: Any) -> str:
    from redif_sdk.distill.teachers.known_schedulers import full_config, noise_process
    from redif_sdk.distill.teachers.own_scheduler import OwnScheduler
    from redif_sdk.errors import RedifError

    try:
        schedule, prediction_type, shift = noise_process(full_config(scheduler))
        OwnScheduler(scheduler, schedule, prediction_type, shift=shift).table(4)
    except RedifError:
        return NO
    return YES


def _schedulers() -> str:
    from redif_sdk.distill.teachers.known_schedulers import KNOWN

    rows = [(code(name), YES, _is_table(name)) for name in sorted(KNOWN)]
    return table(("scheduler", "as a teacher's", "imported as it is"), rows)


def page() -> str:
    """The page of the capability matrix."""
    return (
        "# Capability matrix\n\n"
        "What works with what, asked of the code when this page was built. **Not run** means that no machine was there "
        "to run it on; everything else is tested on networks with few weights "
        "([what was run at real sizes](../performance.md#real-sizes)).\n\n"
        "## Pipelines\n\n"
        "[Adapters](../adapters.md) says what each handles.\n\n"
        + _pipelines()
        + "## Schedulers\n\nWith their default settings. A pipeline whose scheduler is not imported as it is can be "
        "imported with another one (`--scheduler DDIMScheduler`). Other classes are refused by name. "
        "[Schedulers](../schedulers.md) has every setting of each.\n\n"
        + _schedulers()
        + "## Methods\n\n[Choose a method](../how-to/choose-a-method.md) compares them by what was measured.\n\n"
        + _methods()
        + _estimators()
        + "## Engines and precisions\n\n[Precisions](../performance.md#precisions) says what each costs.\n\n"
        + _engines()
    )
