"""Makes batches in another process, ahead of the training loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

from .batches import Batch, Sampler

_sampler: Sampler | None = None


def _start(sampler: Sampler) -> None:
    global _sampler
    _sampler = sampler


def _make(number: int) -> Batch:
    assert _sampler is not None
    return _sampler.batch(number)


class Loader:
    """A `loop.BatchSource` that a worker process fills.

    One worker, because consecutive batches come from one pool of strings; it keeps ahead by `ahead` batches.

    Args:
        sampler: Draws the batches.
        ahead: Batches to prepare.
    """

    def __init__(self, sampler: Sampler, ahead: int = 12) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start, initargs=(sampler,))
        self._ahead = ahead

    def __call__(self, first: int, count: int) -> Iterator[Batch]:
        """Yield batches `first` .. `first + count - 1`."""
        waiting: deque[Future[Batch]] = deque()
        try:
            for number in range(first, first + count + self._ahead):
                if number < first + count:
                    waiting.append(self._pool.submit(_make, number))
                if number >= first + self._ahead:
                    yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
