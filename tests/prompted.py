"""A text-to-image student of a few hundred weights, made of ONNX nodes and a small tokenizer, without torch."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from redif_sdk.artifact.folder import write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import (
    Component,
    Decoder,
    Graph,
    Latents,
    Network,
    Postprocess,
    TensorSpec,
    TextCondition,
    TextEncoder,
    Tokenizer,
)
from redif_sdk.export.fuse import generator_model
from redif_sdk.export.weights import LazyModel
from redif_sdk.sampling.table import StepTable

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 12  # tokens
EXAMPLES = ["red heart", "blue star", "a small green tree"]
OPSET = 20
TYPES = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


def captions(count: int) -> list[str]:
    """Captions, drawn alike each time: plain ones, and such with accents, emoji, numbers and odd blanks."""
    drawn = random.Random(0)
    colours = ["red", "Blue", "GREEN", "pale yellow", "noir", "grün", "violet-ish"]
    things = [
        "heart",
        "star",
        "tree",
        "cat's paw",
        "naïve café",
        "日本の城",
        "smiley 😀",
        "family 👩‍👩‍👧",
        "flag 🇨🇭",
        "№ 42",
    ]
    ends = ["", ".", "!?", " on a white background", "  in   the\tsnow ", ", 4k, highly detailed", " (x2)", " — why?"]
    return [
        f"{drawn.choice(['', 'a ', 'The ', 'two '])}{drawn.choice(colours)} {drawn.choice(things)}{drawn.choice(ends)}"
        for _ in range(count)
    ]


def byte_pairs(text: list[str], size: int = 700) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of the kind that CLIP has: every byte, inside a word and at its end, and learnt pairs."""
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator((word for line in text for word in line.lower().split()), trainer)
    learnt = json.loads(backend.to_str())["model"]["merges"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in learnt]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    return {word: place for place, word in enumerate(dict.fromkeys(words))}, merges


def clip_tokenizer() -> tokenizers.Tokenizer:
    """What transformers' CLIPTokenizer is made of, with a small vocabulary."""
    vocabulary, merges = byte_pairs(captions(300))
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=EOS
        )
    )
    backend.add_special_tokens([BOS, EOS])
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    ends = [(word, vocabulary[word]) for word in (EOS, BOS)]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    return backend


def floats(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=["batch", *shape])


HIDDEN, POOLED, MASK = (
    floats("encoder_hidden_states", LENGTH, 4),
    floats("pooled_projections", 4),
    floats("encoder_attention_mask", LENGTH),
)
IDS = [TensorSpec(name=name, dtype="int64", shape=["batch", LENGTH]) for name in ("input_ids", "attention_mask")]


def manifest_of(backend: tokenizers.Tokenizer) -> Manifest:
    text = TextCondition(
        kind="text",
        tokenizers=[
            Tokenizer(
                file="tokenizer/tokenizer.json",
                mask="attention_mask",
                max_length=LENGTH,
                pad_token_id=backend.token_to_id(EOS),
            )
        ],
        encoders=[TextEncoder(class_path="transformers.CLIPTextModel", folder="text_encoder")],
        tensors=[HIDDEN, POOLED, MASK],
        examples=EXAMPLES,
    )
    decoder = Decoder(
        class_path="diffusers.AutoencoderKL", folder="vae", scale=2, scaling_factor=0.5, shift_factor=0.25
    )
    return Manifest(
        name="prompted",
        licence="mit",
        task="text-to-image",
        step_tables=[
            StepTable.flow_euler(num_inference_steps=2).to_dict(),
            StepTable.flow_euler(num_inference_steps=3, eta=1.0).to_dict(),
        ],
        latents=Latents(channels=4, height=8, width=8, dynamic=["height", "width"], multiple=2),
        condition=text,
        postprocess=Postprocess(decoder=decoder),
        network=Network(class_path="diffusers.UNet2DConditionModel", folder="unet", pipeline="StableDiffusionPipeline"),
    )


def model(
    name: str, inputs: list[TensorSpec], outputs: list[TensorSpec], nodes: list[Any], weights: dict[str, NDArray[Any]]
) -> onnx.ModelProto:
    def values(specs: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.shape) for spec in specs]

    made = [
        helper.make_node(kind, taken, [given], name=f"{given}/{kind}", **more) for kind, taken, given, more in nodes
    ]
    kept = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    graph = helper.make_graph(made, name, values(inputs), values(outputs), initializer=kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def networks(manifest: Manifest, words: int) -> dict[Component, onnx.ModelProto]:
    """Every graph: small random weights, all inputs used, the padding's states left out by the mask."""
    drawn = np.random.default_rng(0)

    def weights(*shape: int, size: float = 1.0) -> NDArray[np.float32]:
        return (size * drawn.standard_normal(shape)).astype(np.float32)

    places = np.linspace(0.5, 1.5, LENGTH, dtype=np.float32)[:, None]
    axes = {name: np.array(value, np.int64) for name, value in {"one": [1], "two": [2], "last": [2, 3]}.items()}
    encoder = model(
        "text_encoder",
        IDS,
        [HIDDEN, POOLED, MASK],
        [
            ("Gather", ["words", "input_ids"], "found", {"axis": 0}),
            ("Mul", ["found", "places"], HIDDEN.name, {}),
            ("ReduceMean", [HIDDEN.name, "one"], POOLED.name, {"keepdims": 0}),
            ("Cast", ["attention_mask"], MASK.name, {"to": onnx.TensorProto.FLOAT}),
        ],
        {"words": weights(words, 4), "places": places, "one": axes["one"]},
    )
    x = floats("sample", 4, "height", "width")
    denoiser = model(
        "denoiser",
        [x, floats("timestep"), HIDDEN, POOLED, MASK],
        [floats("f", 4, "height", "width")],
        [
            ("Unsqueeze", [MASK.name, "two"], "seen", {}),
            ("Mul", [HIDDEN.name, "seen"], "states", {}),
            ("ReduceSum", ["states", "one"], "sum", {"keepdims": 0}),
            ("Add", ["sum", POOLED.name], "asked", {}),
            ("Mul", ["timestep", "thousandth"], "moment", {}),
            ("Unsqueeze", ["moment", "one"], "moments", {}),
            ("Add", ["asked", "moments"], "shift", {}),
            ("Unsqueeze", ["shift", "last"], "shifts", {}),
            ("Add", ["sample", "shifts"], "moved", {}),
            ("Conv", ["moved", "kernel"], "mixed", {"pads": [1, 1, 1, 1]}),
            ("Tanh", ["mixed"], "f", {}),
        ],
        {"kernel": weights(4, 4, 3, 3, size=0.3), "thousandth": np.array([1e-3], np.float32), **axes},
    )
    post = manifest.postprocess.decoder
    assert post is not None
    decoder = model(
        "decoder",
        [floats("latents", 4, "height", "width")],
        [floats("sample", 3, "image_height", "image_width")],
        [
            ("Mul", ["latents", "factor"], "scaled", {}),
            ("Add", ["scaled", "offset"], "shifted", {}),
            ("Conv", ["shifted", "colours"], "wide", {}),
            ("DepthToSpace", ["wide"], "pixels", {"blocksize": 2, "mode": "CRD"}),
            ("Tanh", ["pixels"], "sample", {}),
        ],
        {
            "factor": np.array([1 / post.scaling_factor], np.float32),
            "offset": np.array([post.shift_factor], np.float32),
            "colours": weights(12, 4, 1, 1, size=0.3),
        },
    )
    return {
        "text_encoder": encoder,
        "denoiser": denoiser,
        "decoder": decoder,
        "generator": generator_model(LazyModel(denoiser), manifest, LazyModel(decoder)).proto,
    }


def spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    """An input or output of a graph as the manifest lists it."""
    names = {code: name for name, code in TYPES.items()} | {onnx.TensorProto.UINT8: "uint8"}
    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return TensorSpec(name=value.name, dtype=names[kind.elem_type], shape=shape)


def build_prompted(folder: Path, *, without: tuple[str, ...] = (), **changes: Any) -> Path:
    """Write the student into `folder`, without some of its graphs. `changes`: fields of its manifest."""
    backend = clip_tokenizer()
    manifest = manifest_of(backend)
    for name in ("tokenizer", "onnx"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer/tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    graphs = []
    for component, made in networks(manifest, backend.get_vocab_size()).items():
        if component in without:
            continue
        file = f"onnx/{component}.fp32.onnx"
        (folder / file).write_bytes(made.SerializeToString())
        graphs.append(
            Graph(
                component=component,
                precision="fp32",
                file=file,
                opset=OPSET,
                inputs=[spec_of(value) for value in made.graph.input],
                outputs=[spec_of(value) for value in made.graph.output],
            )
        )
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs, **changes}))
    return folder
