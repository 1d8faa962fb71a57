"""Golden tensors are float32 on the CPU: the one device whose arithmetic is the same everywhere."""

from collections.abc import Iterator

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    """Compute on the CPU, whatever else the machine has."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)
