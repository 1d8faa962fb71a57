"""The launches that a GPU would make for a graph of MLX operations, counted without a GPU.

MLX builds a graph before it runs anything, and names its operations in `mx.export_to_dot`. On a machine without a GPU
it would take its fused operations apart and refuse custom kernels; `as_on_a_gpu` puts in the place of each a single
operation that stands for one launch, so that the graph has the shape that it has on a GPU.

Operations that only look at memory in another way are no launches; what ``mx.compile`` joined is one. Reshapes count as
views, which they are for the single row of a decoding step. MLX may still split an operation over several launches (an
attention over many keys is two), which is left out for all alike.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "ExpandDims", "Flatten", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
STAND_IN = "Depends"
"""The operation that stands for a fused one or a custom kernel."""

_NODE = re.compile(r'\{ (?P<id>\w+) \[label ="(?P<name>\w+)", shape=rectangle\]; \}')
_EDGE = re.compile(r'^"\w+" -> (?P<id>\w+)$', re.MULTILINE)


def count(*outputs: mx.array) -> Counter[str]:
    """Return the launches of a graph by the name of the operation.

    Args:
        outputs: What is to be computed; what was computed before costs nothing.
    """
    text = io.StringIO()
    mx.export_to_dot(text, *outputs)
    inputs = Counter(found["id"] for found in _EDGE.finditer(text.getvalue()))
    launches: Counter[str] = Counter()
    for found in _NODE.finditer(text.getvalue()):  # what was compiled is one operation in all places, a line for each
        if found["name"] not in VIEWS:
            # Each part that is put together is a copy of its own.
            launches[found["name"]] += inputs[found["id"]] if found["name"] == "Concatenate" else 1
    return launches


def one_launch(inputs: Sequence[Any], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]) -> list[mx.array]:
    """Return arrays of zeros that come out of one operation on the inputs."""
    zeros = [mx.array(np.zeros(shape, dtype=np.float32)).astype(t) for shape, t in zip(shapes, dtypes, strict=True)]
    mx.eval(zeros)
    outputs: list[mx.array] = mx.depends(zeros, [x for x in inputs if isinstance(x, mx.array)])
    return outputs


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let graphs be built as if there were a GPU; their numbers mean nothing."""

    def like_first(x: mx.array, *others: Any, **options: Any) -> mx.array:
        return one_launch([x, *others, *options.values()], [x.shape], [x.dtype])[0]

    def dequantize(weight: mx.array, *others: Any, bits: int, **options: Any) -> mx.array:
        shape = (*weight.shape[:-1], weight.shape[-1] * 32 // bits)
        return one_launch([weight, *others, *options.values()], [shape], [mx.bfloat16])[0]

    with ExitStack() as stack:
        for name in ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention"):
            stack.enter_context(mock.patch.object(mx.fast, name, like_first))
        stack.enter_context(mock.patch.object(mx, "dequantize", dequantize))
        stack.enter_context(mock.patch.object(mx, "default_device", return_value=mx.Device(mx.gpu, 0)))
        yield


def kernel_factory(**_: Any) -> Callable[..., list[mx.array]]:
    """Build a custom kernel that is one launch; in the place of `mx.fast.metal_kernel`."""

    def launch(*, inputs: Sequence[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
        return one_launch(inputs, output_shapes, output_dtypes)

    return launch
