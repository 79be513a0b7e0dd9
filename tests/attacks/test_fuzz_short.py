"""The readers of strangers' bytes under ten seconds of mutated inputs; `benchmarks/fuzz.py` does it for longer."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz.py"
SECONDS = 10


def _module() -> ModuleType:
    spec = spec_from_file_location("redif_fuzz", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


fuzz = _module()


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_but_our_own_errors(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    done = fuzz.plain(target, SECONDS / len(fuzz.TARGETS), seed=0)
    faults = [json.loads(Path(name).with_suffix(".json").read_text())["fault"] for name in done.findings]
    assert faults == []
    assert done.executions > 20


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself: a raw error and a hang are findings, our own errors and a normal return are none."""
    from redif_sdk.errors import ManifestError

    def read(data: bytes) -> None:
        if data == b"ours":
            raise ManifestError("x")
        if data == b"raw":
            raise KeyError("x")
        while data == b"hang":
            pass

    monkeypatch.setattr(fuzz, "SLOWEST", 0.05)
    monkeypatch.setattr(fuzz, "TARGETS", {"mine": fuzz.Target(read, lambda: [b"raw"])})
    assert fuzz.run_one("mine", b"ours") is None
    assert fuzz.run_one("mine", b"") == ""
    assert fuzz.run_one("mine", b"raw").startswith("KeyError at test_fuzz_short.py")
    assert fuzz.run_one("mine", b"hang") == "hang"
    monkeypatch.setattr(fuzz, "FOUND", tmp_path)
    assert (tmp_path / Path(fuzz.keep("mine", "hang", b"hang", "plain")).name).read_bytes() == b"hang"
