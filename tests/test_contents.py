"""What is inside a student's files: safetensors, npz, JSON and tokenizers, good and hostile, down to random bytes."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from redif_sdk.artifact.paths import check_kind
from redif_sdk.artifact.untrusted import contents
from redif_sdk.artifact.untrusted import json as strict_json
from redif_sdk.artifact.untrusted.npz import npz_arrays
from redif_sdk.artifact.untrusted.safetensors import safetensors_header, safetensors_header_size
from redif_sdk.errors import IntegrityError, ManifestError, RedifError


def safetensors(header: Any, buffer: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + buffer


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


arrays = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8),
    st.tuples(st.sampled_from([np.float32, np.float16, np.int64, np.uint8]), st.lists(st.integers(0, 3), max_size=3)),
    max_size=4,
)


@given(arrays)
def test_what_safetensors_writes_is_read(found: dict[str, tuple[Any, list[int]]]) -> None:
    data = save({name: np.zeros(shape, dtype) for name, (dtype, shape) in found.items()})
    contents.check("unet/w.safetensors", data, "w")
    size = safetensors_header_size(data[:8], len(data), "w")
    header = safetensors_header(data[8 : 8 + size], len(data) - 8 - size, "w")
    assert {name: shape for name, (_, shape) in header.items()} == {n: tuple(shape) for n, (_, shape) in found.items()}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it has 0 bytes"),
        (struct.pack("<Q", 10 << 30) + b"{}", "its header has 10737418240 bytes"),
        (struct.pack("<Q", 100) + b"{}", "its header has 100 bytes"),
        (safetensors(b"not json"), "not valid JSON"),
        (safetensors(b'{"a": 1, "a": 2}'), "comes twice"),
        (safetensors(b"[" * 100_000), "not valid JSON"),
        (safetensors({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12)), "overlaps"),
        (safetensors({"a": tensor(), "b": tensor()}, bytes(8)), "overlaps"),
        (safetensors({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20)), "leaves a gap"),
        (safetensors({"a": tensor()}, bytes(9)), "8 bytes, and the file has 9"),
        (safetensors({"a": tensor()}, bytes(4)), "8 bytes, and the file has 4"),
        (safetensors({"a": tensor(shape=[1 << 40])}, bytes(8)), "has 4398046511104 bytes"),
        (safetensors({"a": tensor(shape=[1 << 62, 1 << 62])}, bytes(8)), "offsets give it 8"),
        (safetensors({"a": tensor(shape=[-1])}, bytes(8)), "the entry of tensor 'a'"),
        (safetensors({"a": tensor(offsets=(8, 0))}, bytes(8)), "offsets give it -8"),
        (safetensors({"a": tensor(dtype="OBJECT")}, bytes(8)), "the entry of tensor 'a'"),
        (safetensors({"a": [1]}, bytes(8)), "the entry of tensor 'a'"),
        (safetensors({"__metadata__": {"a": {}}}), "metadata"),
    ],
)
def test_hostile_safetensors_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises((IntegrityError, ManifestError), match=reason):
        contents.check("w.safetensors", data, "w.safetensors")


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_what_numpy_writes_is_read(compressed: bool) -> None:
    wanted = {
        "x": np.arange(6, dtype=np.float32).reshape(2, 3),
        "seeds": np.array([[0, 2**63]], dtype=np.uint64),
        "images": np.zeros((0, 2, 1), np.uint8),
        "scalar": np.array(3.5),
        "prompts": np.array(["red heart", "\U0001f600"]),
        "tokens.input_ids": np.zeros((2, 3), np.int64),
    }
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **wanted)  # type: ignore[arg-type]
    found = npz_arrays(buffer.getvalue(), "x.npz")
    assert {name: (value.dtype, value.shape, value.tobytes()) for name, value in found.items()} == {
        name: (value.dtype, value.shape, value.tobytes()) for name, value in wanted.items()
    }


def bomb() -> bytes:
    """Some hundred kilobytes that unpack to 300 MB."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open("x.npy", "w") as f,
    ):
        for _ in range(300):
            f.write(bytes(1 << 20))
    return buffer.getvalue()


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a zip"),
        (b"PK\x03\x04 and nothing", "not a zip"),
        (npz(**{"..__..__evil.npy": npy(np.zeros(1))}), r"member '../../evil.npy'"),
        (npz(**{"__etc__x.npy": npy(np.zeros(1))}), "member '/etc/x.npy'"),
        (npz(**{"x.pkl": b"x"}), r"member 'x\.pkl'"),
        (npz(**{"x.npy": npy(np.array([{}], dtype=object))}), "not an array of numbers or text"),
        (npz(**{"x.npy": npy(np.zeros(2, dtype="S4"))}), "not an array of numbers or text"),
        (npz(**{"x.npy": npy(np.array(["\ud800"]))}), "holds invalid Unicode"),
        (npz(**{"x.npy": npy(np.array(["a"])).replace(b"a\x00\x00\x00", b"\xff" * 4)}), "holds invalid Unicode"),
        (npz(**{"x.npy": npy(np.array([""])).replace(b"<U1", b"<U0")}), "x"),
        (npz(**{"x.y.z.npy": npy(np.zeros(1))}), "is not a numpy array"),
        (npz(**{"x.npy": npy(np.asfortranarray(np.zeros((2, 3))))}), "not an array of numbers or text"),
        (npz(**{"x.npy": npy(np.zeros(2))[:-1]}), "15 bytes"),
        (npz(**{"x.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(HEADER) + 1) + HEADER + b"\n"}), "0 bytes"),
        (npz(**{"x.npy": b"\x93NUMPY\x03\x00" + bytes(200)}), "not an array of numbers or text"),
        (npz(**{f"x{index}.npy": npy(np.zeros(1)) for index in range(40)}), "too many"),
        (npz(**{f"x{index}.npy": b"" for index in range(1000)}), "too many"),
        (bomb(), "unpacks to more than"),
    ],
)
def test_hostile_npz_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        npz_arrays(data, "x.npz")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[1]", "not a JSON object"),
        (b'{"a": 1, "a": 1}', "comes twice"),
        (b'{"a": {"b": 1, "b": 1}}', "comes twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
        (b'{"a": [' + b"[]," * 300_000 + b"1]}", "more objects"),
        (b'{"a": [' + b"1," * 2_000_001 + b"1]}", "more objects"),
        (b'{"a": "\xff"}', "is not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "is not valid JSON"),
        (b'{"a": 1} x', "is not valid JSON"),
    ],
)
def test_hostile_json_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        strict_json.parse(text, "x.json")


def test_configurations_may_hold_the_infinities_of_diffusers() -> None:
    contents.check("scheduler/scheduler_config.json", b'{"lambda_min_clipped": -Infinity}', "x")


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 1000}}, "1000 characters in"),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "Prepend", "prepend": "x" * 99}]}}, "99 characters in"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+" * 999}}}, "pattern of 4995"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 100}}, "more than 64 ways"),
        ({"added_tokens": [{}] * 20_000}, "more than 10000 tokens"),
    ],
)
def test_tokenizers_that_explode_are_refused(document: dict[str, Any], reason: str) -> None:
    with pytest.raises(IntegrityError, match=reason):
        contents.check("tokenizer/tokenizer.json", json.dumps(document).encode(), "tokenizer.json")


@pytest.mark.parametrize(
    "document",
    [
        {"in_channels": 1 << 40},
        {"layers_per_block": 10**6},
        {"transformer_layers_per_block": [1, [2, 10**6]]},
        {"deeper": {"num_hidden_layers": 10**4}},
        {"block_out_channels": [32] * 20_000},
        {"num_train_timesteps": 1e12},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_configurations_that_ask_for_too_much_are_refused(document: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match=r"config\.json"):
        contents.check("unet/config.json", json.dumps(document).encode(), "unet/config.json")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin", 3])
def test_an_index_may_name_shards_beside_it_alone(shard: Any) -> None:
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    contents.check(name, json.dumps({"weight_map": {"w": "a-00001-of-00002.safetensors"}}).encode(), name)
    with pytest.raises(IntegrityError, match="names shards"):
        contents.check(name, json.dumps({"weight_map": {"w": shard}}).encode(), name)


def test_a_tokenizer_as_clip_has_it_is_read() -> None:
    document = {
        "added_tokens": [{"id": 49406, "content": "<|startoftext|>"}],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "NFC"},
                {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
                {"type": "Lowercase"},
            ],
        },
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"}},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
    }
    contents.check("tokenizer/tokenizer.json", json.dumps(document).encode(), "tokenizer.json")


@settings(max_examples=300)
@given(st.sampled_from(["a.safetensors", "a.npz", "a.json", "tokenizer.json"]), st.binary(max_size=200), st.data())
def test_any_bytes_are_read_or_refused(path: str, data: bytes, choice: st.DataObject) -> None:
    seeds = {
        "a.safetensors": save({"a": np.zeros(3, np.float32)}),
        "a.npz": npz(**{"x.npy": npy(np.zeros(2))}),
        "a.json": b'{"a": [1, 2.5, "x"]}',
        "tokenizer.json": b'{"normalizer": {"type": "NFC"}}',
    }
    start = choice.draw(st.integers(0, len(seeds[path])))
    mixed = seeds[path][:start] + data + seeds[path][start + len(data) :]
    for candidate in (data, mixed):
        with suppress(RedifError):
            contents.check(path, candidate, path)


@pytest.mark.parametrize(
    "path",
    [
        "unet/config.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "onnx/denoiser.fp32.onnx.data",
        "golden/steps-2-batch-1-36x28.npz",
        "samples/steps-2.png",
        "LICENSE",
    ],
)
def test_kinds_of_files_that_students_have(path: str) -> None:
    assert check_kind(path) == path


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("unet/config.jsοn", "ASCII"),  # a Greek omicron
        ("unet/config\u200b.json", "ASCII"),
        ("unet/сonfig.json", "ASCII"),  # a Cyrillic es
        ("unet/nul.json", "ASCII"),
        ("COM1/x.json", "ASCII"),
        ("unet/config.json.", "ASCII"),
        ("unet/config.json ", "ASCII"),
        ("unet/a:b.json", "ASCII"),
        ("onnx/*.onnx", "ASCII"),
        ("onnx/[ab].onnx", "ASCII"),
        (".hidden/x.json", "ASCII"),
        ("/".join("abcdefghi") + ".json", "ASCII"),
        ("a" * 200 + ".json", "ASCII"),
        ("unet/model.BIN", "pickle"),
        ("unet/model.pt.json", "pickle"),
        ("unet/../x.json", "unsafe path"),
        ("C:\\x.json", "unsafe path"),
        ("engines/sm89.engine", "engines never travel"),
        ("unet/lib.so", "engines never travel"),
        ("pipeline.py", "holds no files of this kind"),
        ("unet/config", "holds no files of this kind"),
    ],
)
def test_names_and_kinds_that_no_student_has(path: str, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        check_kind(path)


def test_what_this_project_exports_is_read(full_student: Path) -> None:
    for path in full_student.rglob("*"):
        if path.suffix in (".json", ".npz", ".safetensors"):
            contents.check(path.name, path.read_bytes(), path.name)
