"""The settings of a run: each is read by the chosen method, or refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from redif_sdk.distill import DistillConfig, distill
from redif_sdk.distill.config import COMMON, applicable, setting_names
from redif_sdk.distill.methods import METHODS, make_method
from redif_sdk.distill.options import ESTIMATORS, MODELS, SameStateOptions, model_of
from redif_sdk.distill.presets import UPDATES, as_yaml, resolve
from redif_sdk.errors import InvalidRequest
from tests.gaussian import make_teacher

#: Every method and estimator, with all that it can do switched on.
ARMS: dict[str, dict[str, Any]] = {
    "redif, same-state": {"dmd_weight": 0.5, "calibration": 8, "intermediate_step_fraction": 0.5},
    "redif, pathwise": {"estimator": "pathwise", "dmd_weight": 0.5, "calibration": 8},
    "redif, trajectory": {"estimator": "trajectory", "reward": "distribution", "kl": 0.1},
    "redif, critic": {"estimator": "critic", "dmd_weight": 0.5, "critic_memory": 32},
    "regression": {},
    "progressive": {},
    "consistency": {},
    "dmd": {"gan_weight": 0.1},
    "dmd2": {},
    "cdm": {"regression_weight": 0.5},
    "sgmd": {"regression_weight": 0.5},
    "draft": {"reward": "distribution"},
    "grpo": {"reward": "distribution", "kl": 0.1, "regression_weight": 0.5},
}
SMALL = {"num_inference_steps": 2, "updates": 6, "batch_size": 8, "pool_size": 16, "group_size": 4, "warm_start": 0.5}


def config_of(arm: str, **more: Any) -> DistillConfig:
    chosen = {"method": arm.split(",")[0], **ARMS[arm]}
    shared = {**SMALL, "reward": "pixel", "segments": 0.2, "schedule_updates": 1, "exploration_rank": 2}
    return DistillConfig.checked(**applicable({**shared, **chosen}), **more)


@pytest.mark.parametrize("arm", ARMS)
def test_every_setting_is_read_or_refused(arm: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read: set[str] = set()
    original = BaseModel.__getattribute__

    def spy(self: BaseModel, name: str) -> Any:
        read.add(name)
        return original(self, name)

    config = config_of(arm)
    for model in (DistillConfig, type(config.options)):
        monkeypatch.setattr(model, "__getattribute__", spy)
    distill(make_teacher(), config, folder=tmp_path)
    own = type(config.options).model_fields
    assert {*COMMON, *own} - read == set(), "accepted, but not read"
    chosen = {name: own[name].default for name in ("method", "estimator") if name in own}
    for name in set(setting_names()) - {*COMMON, *own}:
        reader = next(model for model in (*MODELS.values(), *ESTIMATORS.values()) if name in model.model_fields)
        with pytest.raises(InvalidRequest, match=rf"^the method {arm.split(',')[0]}\b.* does not read {name};"):
            DistillConfig.checked(**{**chosen, name: reader.model_fields[name].default})


def test_every_method_has_options_and_a_reward_where_it_follows_one() -> None:
    assert set(MODELS) == set(METHODS)
    for name, model in MODELS.items():
        assert make_method(name).rewarded == ("reward" in model.model_fields)


@pytest.mark.parametrize("arm", ARMS)
def test_a_config_is_flat_and_comes_back(arm: str, tmp_path: Path) -> None:
    config = config_of(arm, seed=3)
    file = tmp_path / "run.yaml"
    file.write_text(as_yaml(config))
    assert resolve({}, file=file) == config
    assert DistillConfig(**config.model_dump()) == config
    assert DistillConfig.model_validate_json(config.model_dump_json()) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config.replaced() == config
    assert config.settings() == config.model_dump()


def test_settings_are_given_flat_and_read_flat() -> None:
    config = DistillConfig(num_inference_steps=2, method="redif", exploration=0.06)
    assert config.exploration == 0.06  # type: ignore[attr-defined]
    assert config == DistillConfig(num_inference_steps=2, options=SameStateOptions(exploration=0.06))
    assert (config.method, config.get("exploration"), config.get("gan_weight", 0.5)) == ("redif", 0.06, 0.5)
    with pytest.raises(AttributeError, match="the method redif with the estimator same-state does not read gan_weight"):
        _ = config.gan_weight  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="nothing"):
        _ = config.nothing  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="has no GrpoOptions"):
        config.options_as(MODELS["grpo"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "redifs"}, "unknown method 'redifs'; known: cdm, consistency, dmd, dmd2, draft, grpo"),
        ({"estimator": "path"}, "unknown estimator 'path'; known: same-state, pathwise, trajectory"),
        ({"exploring": 1}, "unknown setting 'exploring'; did you mean 'exploration'"),
        ({"exploration": -1}, "exploration: Input should be greater than 0, not -1"),
        ({"group_size": 3}, "group_size must be even, not 3"),
        ({"updates": 0}, "updates: Input should be greater than or equal to 1, not 0"),
        ({"method": "regression", "reward": "pixel"}, "regression does not read reward; .* huber, regression_last_k"),
    ],
)
def test_what_is_wrong_is_said_with_the_choices(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        DistillConfig.checked(**settings)


def test_a_copy_with_another_method_leaves_out_what_it_does_not_read() -> None:
    config = config_of("redif, same-state", seed=5)
    other = config.replaced(method="regression", huber=0.3)
    assert (other.method, other.seed, other.get("huber"), other.get("exploration")) == ("regression", 5, 0.3, None)
    with pytest.raises(InvalidRequest, match="does not read kl"):
        config.replaced(kl=0.5)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", UPDATES)
def test_a_preset_gives_every_method_what_it_reads(name: str, arm: str) -> None:
    chosen = {"method": arm.split(",")[0], "num_inference_steps": 2}
    chosen |= {"estimator": ARMS[arm]["estimator"]} if "estimator" in ARMS[arm] else {}
    config = resolve(chosen, name=name)
    assert isinstance(config.options, model_of(*[chosen[key] for key in ("method", "estimator") if key in chosen]))
    assert config.batch_size == 32
    with pytest.raises(InvalidRequest, match="does not read"):  # by hand it is not left out
        resolve({"method": "regression", "exploration": 0.1}, name=name)
