"""What cannot be exported is refused before any work, by one function, in the same words at every door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from blackbox import CONFIG, SETTINGS, black_box
from networks import Tiny
from pipelines import UNET_LAYERS, lora, pixels
from torch import Tensor, nn
from typer.testing import CliRunner

from redif_sdk.artifact.folder import StudentFolder
from redif_sdk.cli.main import app
from redif_sdk.distill import DistillConfig, Teacher, distill, import_pipeline, load_student
from redif_sdk.distill.evaluation.examine import examine_teacher
from redif_sdk.errors import InvalidRequest, RedifError, UnsupportedModel
from redif_sdk.export.networks import load_decoder, load_encoders, load_network
from redif_sdk.sampling.noise_schedule import NoiseSchedule, Preconditioning

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::redif_sdk.errors.WorseThanStart"),
]
PROMPTS = pipelines.PROMPTS


def call(network: Any) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x, states = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 3, 32, generator=draw)
    with torch.no_grad():
        out: Tensor = network(x, torch.tensor([5, 900]), encoder_hidden_states=states).sample
    return out


def exports(folder: Path) -> Any:
    """The network that export loads, after its other parts have loaded too."""
    student = StudentFolder(folder)
    assert load_encoders(student) is not None
    assert load_decoder(student) is not None
    return load_network(student)


# ---------------------------------------------------------------- what is taken off, or merged, in a copy


def with_lora(pipe: Any) -> None:
    lora(pipe.unet, UNET_LAYERS)


def with_two_loras(pipe: Any) -> None:
    lora(pipe.unet, UNET_LAYERS, "one")
    lora(pipe.unet, ["to_k"], "two", seed=1)
    pipe.unet.set_adapters(["one", "two"], [0.5, 2.0])


def with_lora_switched_off(pipe: Any) -> None:
    lora(pipe.unet, UNET_LAYERS)
    pipe.unet.disable_adapters()


def with_fused_lora(pipe: Any) -> None:
    lora(pipe.unet, UNET_LAYERS)
    pipe.unet.fuse_lora()


def compiled(pipe: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


def compiled_inside(pipe: Any) -> None:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend="eager")


def compiled_in_place(pipe: Any) -> None:
    pipe.unet.compile(backend="eager")


def in_data_parallel(pipe: Any) -> None:
    pipe.unet = nn.DataParallel(pipe.unet)


def in_a_peft_model(pipe: Any) -> None:
    from peft import LoraConfig, get_peft_model

    pipe.unet = get_peft_model(pipe.unet, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def offloaded_to_the_cpu(pipe: Any) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.unet, "cpu")


WRAPPED = [with_lora, with_two_loras, with_lora_switched_off, with_fused_lora, compiled, compiled_inside]
WRAPPED += [compiled_in_place, in_data_parallel, in_a_peft_model, offloaded_to_the_cpu]


@pytest.mark.parametrize("change", WRAPPED, ids=lambda change: change.__name__)
def test_what_is_around_a_network_is_taken_off_in_a_copy(change: Callable[[Any], None], tmp_path: Path) -> None:
    """The student's folder computes what the pipeline computes, and has a plain network of diffusers."""
    pipe = pipelines.stable_diffusion()
    plain = call(pipe.unet)
    change(pipe)
    network = pipe.unet
    wanted = call(network.module if isinstance(network, nn.DataParallel) else network)
    manifest = import_pipeline(pipe, tmp_path / "student", [2], prompts=PROMPTS)
    assert manifest.network.class_path == "diffusers.UNet2DConditionModel"
    found = call(exports(tmp_path / "student"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert pipe.unet is network
    changes = change in (with_lora, with_two_loras, with_fused_lora, in_a_peft_model)
    assert torch.allclose(found, plain, atol=1e-3) is not changes


def test_an_adapter_of_a_text_encoder_is_merged(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    lora(pipe.text_encoder, ["q_proj", "v_proj"])
    ids = torch.arange(pipelines.LENGTH)[None]
    with torch.no_grad():
        wanted = pipe.text_encoder(ids)[0]
    import_pipeline(pipe, tmp_path / "student", [2], prompts=PROMPTS)
    encoders = load_encoders(StudentFolder(tmp_path / "student"))
    assert encoders is not None
    with torch.no_grad():
        torch.testing.assert_close(encoders(ids)[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_student_of_a_pipeline_with_an_adapter_is_exported(tmp_path: Path) -> None:
    from redif_sdk.export import export

    pipe = pipelines.stable_diffusion(**pipelines.ONE_BLOCK)
    lora(pipe.unet, UNET_LAYERS)
    teacher = Teacher.from_diffusers(pipe, prompts=PROMPTS, num_inference_steps=2)
    distill(teacher, CONFIG, progress=False).save_pretrained(tmp_path / "student")
    assert export(tmp_path / "student", batches=(1,), runtimes=["onnxruntime"]).graphs


# ---------------------------------------------------------------- what is refused, in the same words everywhere


def nan_in(part: str, key: str, value: float = float("nan")) -> Callable[[Any], None]:
    def change(pipe: Any) -> None:
        with torch.no_grad():
            getattr(pipe, part).get_parameter(key).view(-1)[3] = value

    return change


def bert(pipe: Any) -> None:
    from transformers import BertConfig, BertModel

    pipe.text_encoder = BertModel(
        BertConfig(
            vocab_size=len(pipe.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).eval()  # fmt: skip


def free_u(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def hooked(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda module, given, output: 0 * output)


def patched(pipe: Any) -> None:
    pipe.unet.mid_block.forward = lambda hidden_states, *given, **named: hidden_states


def on_meta(pipe: Any) -> None:
    pipe.vae.to("meta")


def quantised(pipe: Any) -> None:
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    pipe.unet.time_embedding.linear_1.__class__ = kind


def in_float8(pipe: Any) -> None:
    pipe.unet.to(torch.float8_e4m3fn)


def layerwise_casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def more_weights(pipe: Any) -> None:
    pipe.unet.mid_block.added = nn.Linear(2, 2)


def another_layer(pipe: Any) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    pipe.unet.conv_out = Scaled(16, 4, 3, padding=1)


def another_setting(pipe: Any) -> None:
    pipe.unet.mid_block.resnets[0].output_scale_factor = 2.0


def a_class_of_its_own(pipe: Any) -> None:
    from diffusers import UNet2DConditionModel

    class Mine(UNet2DConditionModel):
        pass

    pipe.unet.__class__ = Mine


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "nan": (nan_in("unet", "conv_in.weight"), r"unet: 1 of \d+ values of conv_in\.weight are NaN or infinite"),
    "inf-in-vae": (nan_in("vae", "decoder.conv_in.weight", float("inf")), r"vae: 1 of \d+ values of decoder\.conv_in"),
    "nan-in-text-encoder": (
        nan_in("text_encoder", "embeddings.token_embedding.weight"),
        r"text_encoder: 1 of \d+ values of .*token_embedding\.weight",
    ),
    "bert": (bert, "the pipeline's text_encoder is a BertModel, which is not supported; use CLIPTextModel"),
    "freeu": (free_u, r"unet\.up_blocks\.0: FreeU is on"),
    "hook": (hooked, r"unet\.mid_block has forward hooks"),
    "patch": (patched, r"unet\.mid_block has another forward than its class"),
    "meta": (on_meta, "vae has tensors without values: .*offloading"),
    "quantised": (quantised, r"unet is quantised \(time_embedding\.linear_1 is a bitsandbytes Linear4bit\)"),
    "float8": (in_float8, "unet is quantised .*float8"),
    "layerwise": (layerwise_casting, "unet.* has hooks of diffusers"),
    "weights": (more_weights, r"unet\.mid_block\.added is a Linear, and its configuration makes nothing of it"),
    "layer": (another_layer, r"unet\.conv_out is a Scaled, and its configuration makes a Conv2d of it"),
    "setting": (another_setting, r"resnets\.0\.output_scale_factor is 2\.0"),
    "class": (a_class_of_its_own, r"unet is a .*Mine, which is no class of diffusers"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_every_door_refuses_alike_and_before_any_work(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = REFUSED[case]
    pipe = pipelines.stable_diffusion()
    change(pipe)
    monkeypatch.setattr(Teacher, "follow", lambda *_: pytest.fail("the teacher was sampled"))
    doors: list[Callable[[], Any]] = [
        lambda: import_pipeline(pipe, tmp_path / "student", [2], prompts=PROMPTS),
        lambda: distill(pipe, CONFIG, prompts=PROMPTS, progress=False),
        lambda: Teacher.load(pipe, prompts=PROMPTS),
    ]
    words = []
    for door in doors:
        with pytest.raises((UnsupportedModel, InvalidRequest), match=said) as refused:
            door()
        words.append(str(refused.value))
    assert len(set(words)) == 1
    assert not (tmp_path / "student").exists()


def broken_folder(folder: Path) -> Path:
    pipe = pixels()
    nan_in("unet", "conv_in.weight")(pipe)
    pipe.save_pretrained(folder)
    return folder


def test_the_commands_refuse_a_folder_in_the_same_line(tmp_path: Path) -> None:
    folder, output = broken_folder(tmp_path / "nan"), tmp_path / "student"
    commands = [
        ["import", str(folder), "-o", str(output), "--steps", "2"],
        ["distill", str(folder), "-o", str(output), "--steps", "2"],
        ["distill", str(folder), "-o", str(output), "--steps", "2", "--dry-run"],
        ["doctor", "--distill", str(folder)],
    ]
    lines = set()
    for command in commands:
        with pytest.raises(UnsupportedModel) as refused:
            CliRunner().invoke(app, command, catch_exceptions=False)
        lines.add(str(refused.value))
    assert len(lines) == 1
    assert "conv_in.weight are NaN" in lines.pop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan"]


def test_a_folder_saved_with_its_adapters_says_how_to_save_it(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    lora(pipe.unet, UNET_LAYERS)
    pipe.unet.fuse_lora()
    pipe.save_pretrained(tmp_path / "fused")
    with pytest.raises(UnsupportedModel, match=r"unet/.* was saved with LoRA layers in it .*unload_lora_weights"):
        import_pipeline(tmp_path / "fused", tmp_path / "student", [2], prompts=PROMPTS)
    pipe.unet.unload_lora()
    pipe.save_pretrained(tmp_path / "plain")
    assert import_pipeline(tmp_path / "plain", tmp_path / "student", [2], prompts=PROMPTS)


def test_the_doctor_takes_prompts(tmp_path: Path) -> None:
    pipelines.stable_diffusion(**pipelines.ONE_BLOCK).save_pretrained(tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("red heart\na blue circle\n")
    asked = ["doctor", "--distill", str(tmp_path / "sd"), "--steps", "1", "--reward", "pixel", "--json", "-"]
    with pytest.raises(InvalidRequest, match="--prompts FILE"):
        CliRunner().invoke(app, asked, catch_exceptions=False)
    about = tmp_path / "sd" / "redif_teacher.json"
    about.write_text(json.dumps({"num_inference_steps": 2}))
    found = CliRunner().invoke(app, [*asked, "--prompts", str(tmp_path / "prompts.txt")])
    rows = {row["subject"]: row["status"] for row in json.loads(found.stdout)["rows"]}
    assert rows["supported"] == rows["gradient"] == "ok"


# ---------------------------------------------------------------- runs that would fail after the pool


def zero_snr(prediction_type: str) -> Teacher:
    schedule = NoiseSchedule.from_config({"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True})
    return black_box(schedule=schedule, prediction_type=prediction_type)


class Wider(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 8), nn.SiLU(), nn.Linear(8, 16))


EDM = {"schedule": NoiseSchedule.of_edm(Preconditioning()), "prediction_type": "edm"}
LATE: dict[str, tuple[Callable[[], Teacher], dict[str, Any], str]] = {
    "pool": (black_box, {"pool_size": 8, "batch_size": 16}, "batch_size 16 is more than the pool's 8 pairs"),
    "zero-snr": (lambda: zero_snr("epsilon"), {}, "no signal at a visited time"),
    "edm": (lambda: black_box(**EDM), {"method": "consistency"}, "noise levels, not times"),
    "edm-times": (
        lambda: black_box(**EDM),
        {"method": "redif", "schedule_updates": 4, "num_inference_steps": 2},
        "set schedule_updates to 0",
    ),
    "segments": (black_box, {"num_inference_steps": 8, "segments": 1.0}, "set segments to 0"),
    "reward": (black_box, {"method": "redif", "reward": "clip:absent+feature"}, "absent holds no model"),
    "calibration": (black_box, {"method": "redif", "forward_equivalents": 1.0, "calibration": 64}, "calibration"),
    "lora": (lambda: black_box(Scale()), {"lora_rank": 2}, "no linear or convolutional layer"),
    "nan": (lambda: black_box(Broken()), {}, r"the student: 2 of \d+ values of body\.0\.bias are NaN"),
    "shape": (lambda: black_box(nn.Identity()), {}, "has no weights"),
}


class Scale(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return self.scale * x


class Broken(Tiny):
    def __init__(self) -> None:
        super().__init__()
        bias: Any = self.body[0].bias
        with torch.no_grad():
            bias[:2] = torch.tensor([float("nan"), float("-inf")])


@pytest.mark.parametrize("case", list(LATE))
def test_a_run_that_cannot_end_does_not_begin(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, settings, said = LATE[case]
    config = DistillConfig.checked(**{**SETTINGS, "method": "regression", **settings})
    teacher = make()
    monkeypatch.setattr(Teacher, "follow", lambda *_: pytest.fail("the teacher was sampled"))
    with pytest.raises((UnsupportedModel, InvalidRequest), match=said):
        distill(teacher, config, progress=False)
    rows = {row["subject"]: row["detail"] for row in examine_teacher(teacher, config=config, device="cpu")}
    assert said in rows["supported"] or "values of" in rows["supported"]
    assert "samples" not in rows


def test_a_start_of_another_network_is_refused_before_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    start = distill(black_box(Wider()), CONFIG, progress=False)
    monkeypatch.setattr(Teacher, "follow", lambda *_: pytest.fail("the teacher was sampled"))
    with pytest.raises(InvalidRequest, match="the start is another network than the student"):
        distill(black_box(), CONFIG, start=start, progress=False)


def test_a_teacher_that_gives_nan_is_told_so() -> None:
    broken = Teacher.from_callable(
        lambda x, t, c: x * float("nan"), shape=(1, 4, 4), student=Tiny(), prediction_type="sample",
        schedule=NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"}),
    )  # fmt: skip
    with pytest.raises(RedifError, match="gives NaN or infinite values"):
        distill(broken, CONFIG, progress=False)


def test_a_student_that_cannot_be_called_is_told_how_it_is_called() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            return out

    with pytest.raises(UnsupportedModel, match=r"cannot be called .*student\(x, t, condition\)"):
        distill(black_box(), CONFIG, student=Other(), progress=False)
    with pytest.raises(UnsupportedModel, match="must have the shape of x"):
        distill(black_box(), CONFIG, student=Flat(), progress=False)


class Flat(Scale):
    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return self.scale * x.flatten(1)


def test_what_import_writes_is_loaded_again(tmp_path: Path) -> None:
    """Of a pipeline whose parts are plain: the same network in torch and in export."""
    pipe = pixels()
    import_pipeline(pipe, tmp_path / "student", [2])
    ours, theirs = load_student(tmp_path / "student").inner, load_network(StudentFolder(tmp_path / "student"))
    for key, value in pipe.unet.state_dict().items():
        assert np.array_equal(ours.state_dict()[key], value)
        assert np.array_equal(theirs.state_dict()[key], value)
