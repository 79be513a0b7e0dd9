"""Micro-batching: single items are gathered into batches, for which the first item waits a little.

A batcher does not know what is computed. It is used from one event loop; the computation runs in its own threads.
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
    """Gathers items with the same key into batches, first come, first served.

    Args:
        compute: called as ``compute(items)`` in a thread; returns one result per item, in order. A result that is an
            exception is raised for its item alone; an exception that `compute` raises goes to all items of the batch.
        key: items with equal keys may share a batch.
        max_batch: largest number of items in a batch.
        max_wait_s: seconds that the first item waits for others while nothing is computed.
        concurrency: largest number of simultaneous calls of `compute`.
        observe: called with the batch size and the seconds after every batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Item]], Sequence[Result | Exception]],
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
        """Number of items that are not in a batch yet."""
        return len(self._waiting)

    async def submit(self, item: Item) -> Result:
        """The result of `item`. Cancelling removes the item, or drops its result if its batch has begun.

        Raises what `compute` raised or returned for it, and RuntimeUnavailable after `stop`.
        """
        if self._stopping:
            raise RuntimeUnavailable("the server is stopping; try another one")
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
        """Compute what was accepted, and end. Further items are refused."""
        self._stopping = True
        self._changed.set()
        await asyncio.gather(*self._workers)
        self._threads.shutdown(wait=True)

    async def _work(self) -> None:
        while batch := await self._next():
            await self._answer(batch)

    async def _next(self) -> list[_Entry[Item, Result]]:
        """The next batch; an empty one at the end."""
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
        """Wait until an item comes or the batcher stops; at most `seconds`."""
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
        except Exception as error:  # it belongs to the callers, and must not end the worker
            _log.exception("a batch of %d failed", len(items), exc_info=error)
            for entry in batch:
                if not entry.future.done():
                    entry.future.set_exception(error)
            return
        if self._observe is not None:
            self._observe(len(items), monotonic() - begun)
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():  # its caller has gone
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
