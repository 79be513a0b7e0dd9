"""The timing loop of all benchmarks: contenders take turns, so that a slow phase of the machine slows all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Clock", "interleave"]

MIN_SECONDS = 0.05  # that one contender computes in a turn
MAX_CALLS = 100  # timed calls in a turn
SETTLE_SECONDS = 0.02  # pause before a turn, in which the threads of the previous contender go to sleep
LONG_CALL = 0.25  # seconds; longer calls need no untimed call before them

Clock = Callable[[], float]


def _order(names: Sequence[str], index: int) -> list[str]:
    """The order of round `index`: rotated by one per round, and every second round backwards."""
    start = index % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if index % 2 else turned


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    min_seconds: float = MIN_SECONDS,
    settle: bool = True,
    clock: Clock = time.perf_counter,
    pause: Callable[[float], object] = time.sleep,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> dict[str, list[list[float]]]:
    """Time contenders in interleaved rounds. Each is called twice before the first round, to warm up.

    Every contender has one turn per round, in an order that changes, so that none always follows the same one. A turn
    is a pause, an untimed call (where calls are short), and as many timed calls as fill `min_seconds`.

    Args:
        calls: what to time, by contender.
        rounds: number of rounds.
        min_seconds: seconds of timed calls per turn; 0 for one call.
        settle: False leaves out pauses and untimed calls.
        clock: returns seconds.
        pause: waits that many seconds.
        progress: called as ``progress(done, rounds)`` after every round.

    Returns:
        Seconds of the single calls, by contender and round.
    """
    repeats, long = {}, {}
    for name, call in calls.items():
        call()
        seconds = max(_timed(call, clock), 1e-9)
        repeats[name] = min(MAX_CALLS, max(1, math.ceil(min_seconds / seconds)))
        long[name] = seconds >= LONG_CALL
    times: dict[str, list[list[float]]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in _order(list(calls), index):
            if settle:
                pause(SETTLE_SECONDS)
            if settle and not long[name]:
                calls[name]()
            times[name].append([_timed(calls[name], clock) for _ in range(repeats[name])])
        progress(index + 1, rounds)
    return times


def _timed(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start
