"""The files that diffusers and transformers read: tokenizers, the network's configuration, the scheduler's."""

from __future__ import annotations

import json
import shutil
from typing import Any

from .student import CONFIG, MIB, WEIGHTS, WHOLE, Student, case, each

_REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * MIB}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "replace_by_a_megabyte": {"normalizer": _REPLACE},
    "many_normalizers": {"normalizer": {"type": "Sequence", "normalizers": [_REPLACE | {"content": "aa"}] * 1000}},
    "nested_normalizers": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Sequence", "normalizers": [_REPLACE | {"content": "a" * 60}] * 10}] * 10,
        }
    },
    "huge_regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+" * 100_000}, "behavior": "Removed"}},
    "prepend_a_megabyte": {"normalizer": {"type": "Prepend", "prepend": "x" * MIB}},
    "decoder": {"decoder": _REPLACE},
    "many_added_tokens": {"added_tokens": [{"id": index, "content": str(index)} for index in range(20_000)]},
    "added_tokens_object": {"added_tokens": {"a": 1}},
}


@each("tokenizers", WHOLE, r"tokenizer\.json", TOKENIZERS)
def tokenizer(student: Student, document: dict[str, Any]) -> None:
    student.put("tokenizer/tokenizer.json", json.dumps(document).encode())


@case("tokenizers", WHOLE, r"vocab\.json.*twice")
def vocabulary_with_a_key_twice(student: Student) -> None:
    student.put("tokenizer/vocab.json", b'{"a": 0, "a": 1}')


@case("tokenizers", WHOLE, r"merges\.txt.*at most")
def merges_of_100_mb(student: Student) -> None:
    student.sparse("tokenizer/merges.txt", 100 * MIB)


@case("tokenizers", WHOLE, r"tokenizer\.json")
def tokenizer_deep(student: Student) -> None:
    student.put("tokenizer/tokenizer.json", b'{"normalizer":' * 50_000 + b"1" + b"}" * 50_000)


# ---------------------------------------------------------------- the network's configuration

CONFIGS: dict[str, dict[str, Any]] = {
    "channels": {"block_out_channels": [1 << 40, 1 << 40]},
    "channels_30_gb": {"block_out_channels": [32768, 32768], "norm_num_groups": 32},
    "layers": {"layers_per_block": 1_000_000},
    "blocks": {
        "block_out_channels": [32] * 100_000,
        "down_block_types": ["DownBlock2D"] * 100_000,
        "up_block_types": ["UpBlock2D"] * 100_000,
    },
    "classes": {"num_class_embeds": 1 << 50},
    "heads": {"attention_head_dim": 0},
    "block_type": {"down_block_types": ["os.system", "DownBlock2D"]},
    "channels_text": {"block_out_channels": "evil"},
    "norm": {"norm_num_groups": 0},
    "negative": {"in_channels": -4},
    "activation": {"act_fn": "__import__('os').system"},
}


@each("network", ("network", "student"), "config|weights|unet|no network", CONFIGS, error="RedifError")
def network(student: Student, change: dict[str, Any]) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | change).encode())


@case("network", ("student",), "sample_size|config|size", error="RedifError")
def network_size_text(student: Student) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | {"sample_size": "evil"}).encode())


@each(
    "network",
    ("student",),
    "scheduler|timesteps|beta|schedule",
    {
        "timesteps": {"num_train_timesteps": 10**12},
        "timesteps_text": {"num_train_timesteps": "x"},
        "betas": {"trained_betas": [None]},
    },
    error="RedifError",
)
def scheduler(student: Student, change: dict[str, Any]) -> None:
    path = "scheduler/scheduler_config.json"
    config = json.loads((student.folder / path).read_text())
    student.put(path, json.dumps(config | change).encode())


@case("network", ("student",), "not in the list|leaves the folder|missing", error="RedifError")
def config_unlisted_and_linked(student: Student) -> None:
    """What is not listed is not hashed: it must not be read either."""
    shutil.move(student.folder / CONFIG, student.outside / "config.json")
    (student.folder / CONFIG).symlink_to("../../outside/config.json")
    student.drop(CONFIG)


@case("network", ("student",), "not in the list|leaves the folder|missing|no safetensors|weights", error="RedifError")
def weights_unlisted_and_linked(student: Student) -> None:
    shutil.move(student.folder / WEIGHTS, student.outside / "w.safetensors")
    (student.folder / WEIGHTS).symlink_to("../../outside/w.safetensors")
    student.drop(WEIGHTS)


@case("network", ("student",), "not in the list|leaves the folder|index", error="RedifError")
def shard_index_outside(student: Student) -> None:
    shutil.move(student.folder / WEIGHTS, student.outside / "w.safetensors")
    student.drop(WEIGHTS)
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside/w.safetensors"}}
    path = "unet/diffusion_pytorch_model.safetensors.index.json"
    student.put(path, json.dumps(index).encode(), listed=False)


@each("network", ("student",), "weights|index|shard|outside|unet", {"up": False, "absolute": True}, error="RedifError")
def shard_index_listed(student: Student, absolute: bool) -> None:
    """A true index, hashed and listed, of weights that lie elsewhere."""
    data = (student.folder / WEIGHTS).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    place = student.outside / "w.safetensors"
    shutil.move(student.folder / WEIGHTS, place)
    student.drop(WEIGHTS)
    where = str(place) if absolute else f"{'../' * 12}{place}"
    index = {"metadata": {"total_size": 1}, "weight_map": {name: where for name in header if name != "__metadata__"}}
    student.put(f"{WEIGHTS}.index.json", json.dumps(index).encode())


@each(
    "network",
    ("student",),
    "quantization|quantizer|network|config|unet",
    {
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "gguf": {"quant_method": "gguf", "compute_dtype": "float32"},
        "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
        "unknown": {"quant_method": "evil"},
        "text": "evil",
    },
    error="RedifError",
)
def quantization(student: Student, change: Any) -> None:
    config = json.loads((student.folder / CONFIG).read_text())
    student.put(CONFIG, json.dumps(config | {"quantization_config": change}).encode())
