"""Random configurations of components: every one is taken or refused by an error of ours, for as long as one likes.

``python -m benchmarks.config_fuzz --minutes 5`` prints the findings and exits with 1 if there are any. A component is
an entry of `COMPONENTS`: a hypothesis strategy of configurations, and what to do with one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.scheduler_walk import ALPHABET, classes, imported, options, target
from redif_sdk.distill.teachers.known_schedulers import KNOWN
from redif_sdk.errors import RedifError
from redif_sdk.sampling.scheduler_keys import STRAY
from redif_sdk.sampling.table import StepTable

Config = dict[str, Any]
BATCH = 25  # examples between looks at the clock


class Component(NamedTuple):
    """``draw``: configurations with their ``_class_name``. ``use``: raises RedifError, or returns "" or a finding."""

    draw: st.SearchStrategy[Config]
    use: Callable[[Config], str]


#: What a file may hold in place of the right value.
odd = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2000),
    st.sampled_from([0.0, -1.0, 1e-12, 1e30, float("inf"), float("-inf"), float("nan"), 2**70]),
    st.floats(-2, 2, allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(0, 2), max_size=1),
)


@st.composite
def schedulers(draw: st.DrawFn) -> Config:
    """A class with up to four of its options, one in five of them with a value of a wrong kind."""
    name = draw(st.sampled_from([*sorted(KNOWN) * 3, *classes(), "NoScheduler", ""]))
    config: Config = {"_class_name": name, "num_train_timesteps": draw(st.sampled_from([1000, 1000, 50, 7, 1]))}
    own = sorted({key for option in options(name) for key in option} & set(ALPHABET)) or sorted(ALPHABET)
    for key in draw(st.lists(st.sampled_from(own), max_size=4, unique=True)):
        config[key] = draw(st.sampled_from(ALPHABET[key]))
    if draw(st.integers(0, 4)) == 0:
        config[draw(st.sampled_from(sorted(STRAY)))] = draw(odd)
    return config


def use_scheduler(config: Config) -> str:
    """A finding where targets or a table differ from diffusers' own loop."""
    settings = {key: value for key, value in config.items() if key != "_class_name"}
    found = (target(config["_class_name"], settings), imported(config["_class_name"], settings))
    StepTable.from_scheduler(config, num_inference_steps=3)
    return "".join(f"different by {verdict.detail}" for verdict in found if verdict.word == "different")


COMPONENTS = {"scheduler": Component(schedulers(), use_scheduler)}


def attempt(component: Component, config: Config) -> str:
    """What is wrong with the answer to ``config``; "" where it is taken, or refused by an error of ours in one line."""
    try:
        return component.use(config)
    except RedifError as error:
        return "the message has several lines" if "\n" in str(error) else ""
    except Exception as error:  # what a fuzz looks for
        return f"{type(error).__name__}: {error}"


def fuzz(name: str, seconds: float, start: int = 0) -> tuple[int, dict[str, Config]]:
    """The number of configurations that were tried in ``seconds``, and one for each kind of finding."""
    component, findings, tried, end = COMPONENTS[name], {}, 0, time.monotonic() + seconds
    batch = start

    while time.monotonic() < end:

        @seed(batch)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(component.draw)
        def once(config: Config) -> None:
            nonlocal tried
            tried += 1
            if time.monotonic() < end and (said := attempt(component, config)):
                findings.setdefault(said[:80], config)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            once()
        batch += 1
    return tried, findings


def main() -> None:
    """Fuzz the components for some minutes and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all components together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--component", choices=sorted(COMPONENTS), action="append", help="may be repeated; default: all"
    )
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    names, bad = asked.component or sorted(COMPONENTS), 0
    for name in names:
        tried, findings = fuzz(name, 60 * asked.minutes / len(names), asked.seed)
        print(f"{name}: {tried} configurations, {len(findings)} findings")
        for said, config in findings.items():
            print(f"  {said}\n    {config}")
        bad += len(findings)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
