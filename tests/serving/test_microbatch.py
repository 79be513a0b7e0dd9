"""The batcher alone: what goes together, in which order, and what happens to those who leave or fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from redif_sdk.errors import RuntimeUnavailable
from redif_sdk.serving.microbatch import MicroBatcher


class Recorder:
    """Doubles numbers; notes the batches; holds the first one until it is let go."""

    def __init__(self, hold: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.begun = threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.begun.set()
        assert self.go.wait(20)
        if -1 in items:
            raise ValueError("no")
        return [2 * item for item in items]


def batcher(compute: Recorder, **options: Any) -> MicroBatcher[int, int]:
    settings: dict[str, Any] = {"key": lambda item: item // 100, "max_batch": 4, "max_wait_s": 0.0}
    return MicroBatcher(compute, **(settings | options))


async def begun(compute: Recorder) -> None:
    await asyncio.to_thread(compute.begun.wait, 20)


def test_what_comes_while_a_batch_computes_goes_together_next() -> None:
    async def main() -> None:
        compute = Recorder(hold=True)
        batches = batcher(compute)
        tasks = [asyncio.create_task(batches.submit(0))]
        await begun(compute)
        tasks += [asyncio.create_task(batches.submit(item)) for item in range(1, 8)]
        await asyncio.sleep(0)
        compute.go.set()
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10, 12, 14]
        assert compute.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
        await batches.stop()

    asyncio.run(main())


def test_an_idle_engine_waits_a_little_for_more() -> None:
    async def main() -> None:
        compute = Recorder()
        batches = batcher(compute, max_wait_s=5.0)  # far longer than it takes to fill the batch
        assert await asyncio.gather(*(batches.submit(item) for item in range(4))) == [0, 2, 4, 6]
        assert compute.batches == [[0, 1, 2, 3]]
        await batches.stop()

    asyncio.run(main())


def test_only_what_is_alike_shares_a_batch_and_nobody_is_passed_over() -> None:
    async def main() -> None:
        compute = Recorder(hold=True)
        batches = batcher(compute)
        tasks = [asyncio.create_task(batches.submit(0))]
        await begun(compute)
        tasks += [asyncio.create_task(batches.submit(item)) for item in (100, 1, 101, 2)]
        await asyncio.sleep(0)
        compute.go.set()
        await asyncio.gather(*tasks)
        assert compute.batches == [[0], [100, 101], [1, 2]]
        await batches.stop()

    asyncio.run(main())


def test_who_leaves_before_the_batch_is_not_computed_and_who_leaves_during_it_harms_nobody() -> None:
    async def main() -> None:
        compute = Recorder(hold=True)
        batches = batcher(compute)
        first = asyncio.create_task(batches.submit(0))
        await begun(compute)
        second, third = (asyncio.create_task(batches.submit(item)) for item in (1, 2))
        await asyncio.sleep(0)
        assert batches.waiting == 2
        first.cancel()
        second.cancel()
        await asyncio.wait({first, second})
        assert batches.waiting == 1
        compute.go.set()
        assert await third == 4
        assert compute.batches == [[0], [2]]
        await batches.stop()

    asyncio.run(main())


def test_an_error_goes_to_its_own_batch_alone() -> None:
    async def main() -> None:
        compute = Recorder(hold=True)
        batches = batcher(compute)
        first = asyncio.create_task(batches.submit(0))
        await begun(compute)
        bad = [asyncio.create_task(batches.submit(item)) for item in (-1, -2)]
        good = asyncio.create_task(batches.submit(5))
        await asyncio.sleep(0)
        compute.go.set()
        results = await asyncio.gather(first, *bad, good, return_exceptions=True)
        assert [type(result) for result in results] == [int, ValueError, ValueError, int]
        await batches.stop()

    asyncio.run(main())


def test_stopping_computes_what_was_accepted_and_refuses_the_rest() -> None:
    async def main() -> None:
        compute = Recorder(hold=True)
        batches = batcher(compute, max_wait_s=60.0)
        tasks = [asyncio.create_task(batches.submit(item)) for item in range(6)]
        await begun(compute)
        stopping = asyncio.create_task(batches.stop())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeUnavailable, match="stopping"):
            await batches.submit(7)
        compute.go.set()
        await stopping
        assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]

    asyncio.run(main())
