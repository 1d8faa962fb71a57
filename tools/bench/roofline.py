"""What the device can do at best: bytes copied and matrix products computed per second, measured in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

TRIES = 7
# On a CPU larger than its caches, yet below the 32 MiB from which glibc maps a block anew for each call: the faults of
# that would be measured, and the cases do not have them.
COPY_MIB = {"cpu": 28, "gpu": 256}
SQUARE = {"cpu": {"float32": 1024}, "gpu": {}}  # the CPU's products of half types are slow: smaller ones will do
OTHER_SQUARE = {"cpu": 384, "gpu": 4096}


@dataclass(frozen=True)
class Floor:
    """The least time that a case can take.

    Attributes:
        seconds: The larger of what its bytes and what its FLOPs take.
        bound: Which of the two it is.
    """

    seconds: float
    bound: Literal["bytes", "flops"]


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings of a device.

    Attributes:
        bytes_per_second: Read plus written, by a copy that is far larger than the caches.
        flops_per_second: Of a large matrix product, by name of the element type. A type whose own products are slower
            than float32's is held to those: whoever wants the result may widen first, as MLX itself does at times.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float] = field(default_factory=dict)

    def floor(self, moved: int | None, flops: int | None, dtype: str) -> Floor | None:
        """Return the least time of a case, None if nothing is known of it.

        Args:
            moved: Bytes that have to be read and written.
            flops: Multiplications and additions.
            dtype: Element type of the case.
        """
        floors = []
        if moved:
            floors.append(Floor(moved / self.bytes_per_second, "bytes"))
        if flops and (own := self.flops_per_second.get(dtype)):
            fastest = max(own, self.flops_per_second.get("float32", 0.0))
            floors.append(Floor(flops / fastest, "flops"))
        return max(floors, key=lambda floor: floor.seconds, default=None)


def measure_roofline(device: str, dtypes: Sequence[str]) -> Roofline:
    """Measure the default device.

    Args:
        device: ``cpu`` or ``gpu``; decides the sizes.
        dtypes: Element types whose products to time.
    """
    elements = COPY_MIB[device] * 2**20 // 4
    source = mx.random.normal((elements,))
    copy = _best(mx.negative, source)  # a plain copy would share the buffer
    products = {}
    for dtype in dict.fromkeys(("float32", *dtypes)):
        size = SQUARE[device].get(dtype, OTHER_SQUARE[device])
        a, b = (mx.random.normal((size, size)).astype(getattr(mx, dtype)) for _ in range(2))
        products[dtype] = 2 * size**3 / _best(mx.matmul, a, b)
    mx.clear_cache()
    return Roofline(2 * 4 * elements / copy, products)


def _best(function: Callable[..., mx.array], *arrays: mx.array) -> float:
    """Return the least seconds of several tries: a ceiling is what the device reaches undisturbed."""
    mx.eval(arrays)
    times = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        mx.eval(function(*arrays))
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])
