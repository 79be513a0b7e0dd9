"""Prompts to token ids: those of transformers' tokenizers, cut and padded alike, and said so where something is cut."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from redif_sdk.artifact.folder import StudentFolder, write_manifest
from redif_sdk.artifact.manifest import Manifest
from redif_sdk.artifact.records import TensorSpec, Tokenizer
from redif_sdk.errors import IntegrityError, ManifestError, UnsupportedModel
from redif_sdk.tokenizer import PromptTokenizer
from tests.prompted import BOS, EOS, LENGTH, byte_pairs, captions, clip_tokenizer, manifest_of

Copy = Callable[[Path], Path]

ODD = [
    "",
    " ",
    "\n\t \u3000",
    "red heart",
    "RED  \u00a0 Heart\u2028",
    "e\u0301te\u0301 \ufb01n \u0130stanbul \u1e9e \u0345",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd \ufe0f \u20e3 \U0001f1e8\U0001f1ed",
    f"{EOS} inside {BOS}, <|endoftext",
    "it's, we'll, they've: DON'T 'S",
    "0123456789 \u0663 \u2163 1/2 x\u00b2",
    "\u65e5\u672c\u306e\u57ce \u05e9\u05dc\u05d5\u05dd \ufdfa \u0e19\u0e49\u0e33",
    "\x00\x01\x7f \ufffd \U0010ffff \u200b\u202e",
    "a" * 500,
    "red heart " * 100,
    "</s> <pad> <unk> <extra_id_0> \u2581",
]


def student(folder: Path, backend: str, **facts: Any) -> StudentFolder:
    """A folder with that tokenizer, and nothing that computes."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer/tokenizer.json").write_text(backend, encoding="utf-8")
    manifest = manifest_of(clip_tokenizer())
    assert manifest.text is not None
    part = manifest.text.tokenizers[0].model_copy(update=facts)
    text = manifest.text.model_copy(update={"tokenizers": [part]})
    write_manifest(folder, manifest.model_copy(update={"condition": text}))
    return StudentFolder(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    return PromptTokenizer(student(tmp_path_factory.mktemp("clip"), clip_tokenizer().to_str()))


def expected(theirs: Any, prompts: list[str], length: int) -> dict[str, Any]:
    """What transformers makes of them, as diffusers' pipelines ask it."""
    found = theirs(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}


@pytest.mark.parametrize("length", [LENGTH, 77])
@pytest.mark.parametrize("pad", [EOS, "!"])
def test_clip_s_ids_are_transformers(tmp_path: Path, length: int, pad: str) -> None:
    """As its own class writes the file: CLIP pads with the end's id, SDXL's second tokenizer with that of "!"."""
    transformers = pytest.importorskip("transformers")
    vocabulary, merges = byte_pairs(captions(300))
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad)
    theirs.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved/tokenizer.json").read_text(encoding="utf-8")
    folder = student(
        tmp_path / "student", saved, max_length=length, pad_token_id=theirs.pad_token_id, mask="attention_mask"
    )
    prompts = captions(1000) + ODD
    wanted, ours = expected(theirs, prompts, length), PromptTokenizer(folder)(prompts)
    assert list(ours) == list(wanted)
    for name, array in ours.items():
        assert array.dtype == np.int64
        assert np.array_equal(array, wanted[name]), name
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert np.array_equal(expected(again, prompts, length)["input_ids"], ours["input_ids"])


@pytest.mark.parametrize("length", [16, 120])
def test_t5_s_ids_are_transformers(tmp_path: Path, length: int) -> None:
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(captions(300), trainer)
    pieces = [(piece, score) for piece, score in json.loads(backend.to_str())["model"]["vocab"]]
    theirs = transformers.T5Tokenizer(vocab=pieces)
    theirs.save_pretrained(tmp_path / "saved")
    saved = (tmp_path / "saved/tokenizer.json").read_text(encoding="utf-8")
    prompts = captions(1000) + ODD
    for lowercase in (False, True):
        facts = {"max_length": length, "pad_token_id": theirs.pad_token_id, "lowercase": lowercase}
        ours = PromptTokenizer(student(tmp_path / f"student-{lowercase}", saved, **facts))(prompts)
        given = [prompt.lower().strip() for prompt in prompts] if lowercase else prompts  # as PixArt's pipeline does
        for name, array in expected(theirs, given, length).items():
            assert np.array_equal(ours[name], array), name


def test_what_the_file_says_of_length_and_padding_is_not_asked(tmp_path: Path, clip: PromptTokenizer) -> None:
    backend = clip_tokenizer()
    backend.enable_truncation(3, direction="left", stride=1)
    backend.enable_padding(length=5, pad_id=7, direction="left")
    prompts = [*captions(20), *ODD]
    ours = PromptTokenizer(student(tmp_path, backend.to_str()))(prompts)
    assert all(np.array_equal(array, clip(prompts)[name]) for name, array in ours.items())


def test_shapes_ends_and_padding(clip: PromptTokenizer) -> None:
    backend = clip_tokenizer()
    begin, end = (backend.token_to_id(word) for word in (BOS, EOS))
    arrays = clip(["", "red heart", "red heart " * 50])
    ids, mask = arrays["input_ids"], arrays["attention_mask"]
    assert ids.shape == mask.shape == (3, LENGTH)
    assert ids[0].tolist() == [begin] + [end] * (LENGTH - 1)
    assert mask[0].tolist() == [1, 1] + [0] * (LENGTH - 2)
    assert (ids[2, 0], ids[2, -1]) == (begin, end)
    assert end not in ids[2, 1:-1]
    assert mask[2].all()
    assert clip([])["input_ids"].shape == (0, LENGTH)
    assert np.array_equal(clip(["red heart"])["input_ids"][0], ids[1])


def test_what_is_cut_off_is_said(clip: PromptTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        clip(["red heart", "red heart " * 5])
    assert caplog.records == []
    words = [f"heart{number}" for number in range(20)]
    with caplog.at_level(logging.WARNING):
        clip([" ".join(words)])
    (record,) = caplog.records
    assert record.name == "redif_sdk.tokenizer"
    said = record.getMessage()
    assert f"because input_ids takes {LENGTH} tokens: " in said
    cut = said.rpartition(": ")[2].strip("'")
    assert " ".join(words).endswith(cut)
    kept = " ".join(words).removesuffix(cut)
    ids = clip([kept])["input_ids"]
    assert np.array_equal(ids, clip([" ".join(words)])["input_ids"])


def test_two_tokenizers_and_no_mask(tmp_path: Path, clip: PromptTokenizer) -> None:
    folder = student(tmp_path, clip_tokenizer().to_str())
    assert folder.manifest.text is not None
    first = folder.manifest.text.tokenizers[0].model_copy(update={"mask": None})
    second = Tokenizer(file=first.file, input="input_ids_2", max_length=20, pad_token_id=0)
    text = folder.manifest.text.model_copy(update={"tokenizers": [first, second]})
    write_manifest(tmp_path, folder.manifest.model_copy(update={"condition": text}))
    arrays = PromptTokenizer(StudentFolder(tmp_path))(["red heart"])
    assert {name: array.shape for name, array in arrays.items()} == {"input_ids": (1, LENGTH), "input_ids_2": (1, 20)}
    assert np.array_equal(arrays["input_ids"], clip(["red heart"])["input_ids"])
    assert arrays["input_ids_2"][0, -1] == 0


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"tokenizer/tokenizer\.json .* is not a usable tokenizer"):
        PromptTokenizer(student(tmp_path / "a", '{"version": "1.0"}'))
    with pytest.raises(ManifestError, match="no room for a prompt in 2 tokens"):
        PromptTokenizer(student(tmp_path / "b", clip_tokenizer().to_str(), max_length=2))
    folder = student(tmp_path / "c", clip_tokenizer().to_str())
    with (tmp_path / "c/tokenizer/tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"tokenizer/tokenizer\.json"):
        PromptTokenizer(folder)
    large = json.loads(clip_tokenizer().to_str())
    large["normalizer"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    with pytest.raises(IntegrityError, match="puts 1000 characters in place of one"):
        PromptTokenizer(student(tmp_path / "d", json.dumps(large)))


def test_a_tokenizer_must_be_listed_and_have_its_name(tmp_path: Path) -> None:
    """Under another name nobody would look into it before it is used."""
    student(tmp_path, clip_tokenizer().to_str())
    (tmp_path / "tokenizer/words.json").write_text(clip_tokenizer().to_str())
    for file, error in (("tokenizer/words.json", ManifestError), ("tokenizer_2/tokenizer.json", IntegrityError)):
        manifest = StudentFolder(tmp_path).manifest
        assert manifest.text is not None
        part = manifest.text.tokenizers[0].model_copy(update={"file": file})
        text = manifest.text.model_copy(update={"tokenizers": [part]})
        write_manifest(tmp_path, manifest.model_copy(update={"condition": text}))
        with pytest.raises(error, match=file.replace(".", r"\.")):
            StudentFolder(tmp_path)
        write_manifest(tmp_path, manifest)


def test_a_student_without_prompts_has_none(tmp_path: Path) -> None:
    folder = student(tmp_path, clip_tokenizer().to_str())
    update = {"condition": None, "task": "unconditional"}
    write_manifest(tmp_path, folder.manifest.model_copy(update=update))
    with pytest.raises(UnsupportedModel, match="is not a text-to-image model"):
        PromptTokenizer(StudentFolder(tmp_path))


def test_the_manifest_of_a_prompted_student_is_its_condition_s() -> None:
    manifest: Manifest = manifest_of(clip_tokenizer())
    assert manifest.condition_tensors[1] == TensorSpec(name="pooled_projections", dtype="float32", shape=["batch", 4])
    assert manifest.image_shape == (16, 16, 3)
