"""Batches out of single requests, as they come: the first waits a little for others, and then they go together.

Nothing here knows what is computed. One event loop uses a batcher; the computation runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

from redif_sdk.errors import RuntimeUnavailable

__all__ = ["MicroBatcher"]

_log = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    key: Hashable
    future: asyncio.Future[Result]
    arrived: float = field(default_factory=monotonic)


class MicroBatcher(Generic[Item, Result]):
    """Gathers items that have the same key into batches, first come, first served.

    `compute(items)` gives one result an item, in order; it is called in a thread, by at most `concurrency` at once.
    `key(item)` says which items may share a batch. An error of `compute` goes to the items of its batch alone.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        key: Callable[[Item], Hashable],
        max_batch: int,
        max_wait_s: float,
        concurrency: int = 1,
        observe: Callable[[int, float], None] | None = None,
    ) -> None:
        self._compute = compute
        self._key = key
        self._max_batch = max_batch
        self._max_wait = max_wait_s
        self._observe = observe
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._changed = asyncio.Event()
        self._stopping = False
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="redif-batch")
        self._workers = [asyncio.create_task(self._work()) for _ in range(concurrency)]

    @property
    def waiting(self) -> int:
        """Items that no batch has taken yet."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """The result of `item`. Cancelling takes the item out, unless its batch was begun: then its result is dropped.

        Raises what `compute` raised, and RuntimeUnavailable after `stop`.
        """
        if self._stopping:
            raise RuntimeUnavailable("the server is stopping; ask another one")
        entry: _Entry[Item, Result] = _Entry(item, self._key(item), asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._changed.set()
        try:
            return await entry.future
        finally:
            if entry in self._waiting:  # cancelled before any batch took it
                self._waiting.remove(entry)

    async def run(self, work: Callable[[], Other]) -> Other:
        """`work()` in one of the batcher's threads, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def stop(self) -> None:
        """Compute what was accepted, and end. Nothing is accepted from now on."""
        self._stopping = True
        self._changed.set()
        await asyncio.gather(*self._workers)
        self._threads.shutdown(wait=True)

    async def _work(self) -> None:
        while batch := await self._next():
            await self._answer(batch)

    async def _next(self) -> list[_Entry[Item, Result]]:
        """The next batch; an empty one when there will be no more."""
        while True:
            while not self._waiting:
                if self._stopping:
                    return []
                await self._change(None)
            first = self._waiting[0]
            left = first.arrived + self._max_wait - monotonic()
            alike = sum(entry.key == first.key for entry in self._waiting)
            if alike >= self._max_batch or left <= 0 or self._stopping:
                return self._take(first.key)
            await self._change(left)

    async def _change(self, seconds: float | None) -> None:
        """Wait until something came or the batcher stops; at most `seconds`."""
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _take(self, key: Hashable) -> list[_Entry[Item, Result]]:
        taken: list[_Entry[Item, Result]] = []
        left: deque[_Entry[Item, Result]] = deque()
        for entry in self._waiting:
            (taken if entry.key == key and len(taken) < self._max_batch else left).append(entry)
        self._waiting = left
        return taken

    async def _answer(self, batch: list[_Entry[Item, Result]]) -> None:
        items = [entry.item for entry in batch]
        begun = monotonic()
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._threads, self._compute, items)
        except Exception as error:  # whatever it is belongs to those who wait for it, and must not end the worker
            _log.exception("a batch of %d failed", len(items), exc_info=error)
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
            return
        if self._observe is not None:
            self._observe(len(items), monotonic() - begun)
        for entry, result in zip(batch, results, strict=True):
            if not entry.future.done():  # else its caller has gone
                entry.future.set_result(result)
