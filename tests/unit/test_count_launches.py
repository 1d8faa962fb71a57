"""Counting launches: graphs whose launches are known, and the steps that are compared."""

import mlx.core as mx
import pytest

import count_launches
from bench.launches import as_on_a_gpu, count, kernel_factory, one_launch

SIZES = count_launches.small("0.6b") | {"num_hidden_layers": 2}


@mx.compile
def fused(x: mx.array) -> mx.array:
    return mx.exp(x) * mx.sin(x) + 1


def computed(*shape: int) -> mx.array:
    x = mx.ones(shape)
    mx.eval(x)
    return x


@pytest.mark.parametrize(
    ("build", "launches"),
    [
        (lambda x: x, 0),
        (lambda x: x.swapaxes(1, 2)[:, :, 1:].reshape(1, -1)[None], 0),
        (lambda x: mx.split(x, 2, axis=-1)[0], 0),
        (lambda x: mx.exp(x) + x, 2),
        (lambda x: mx.exp(x) + mx.exp(x), 3),
        (lambda x: fused(fused(x)), 2),
        (lambda x: x @ x.swapaxes(2, 3), 1),
        (lambda x: x.astype(mx.bfloat16), 1),
        (lambda x: mx.concatenate([x, x, x]), 3),
        (lambda x: mx.argmax(x), 1),
        (lambda x: one_launch([x], [(2,), (3,)], [mx.float32, mx.int32])[1], 1),
        (lambda x: sum(one_launch([x], [(2,), (2,)], [mx.float32, mx.float32])), 3),  # sum begins with a zero
    ],
)
def test_known_graphs(build, launches):
    assert count(build(computed(1, 2, 3, 4))).total() == launches


def test_writing_into_a_slice_is_one_launch():
    x = computed(1, 2, 3, 4)
    x[:, :, 1:2] = computed(1, 2, 1, 4)
    assert count(x) == {"SliceUpdate": 1}


def test_fused_operations_count_once():
    x = computed(1, 2, 3, 4)
    with as_on_a_gpu():
        y = mx.fast.rope(mx.fast.rms_norm(x, computed(4), 1e-6), 4, traditional=False, base=1e6, scale=1.0, offset=3)
        y = mx.fast.scaled_dot_product_attention(y, x, x, scale=1.0)
        assert y.shape == x.shape
        assert count(y).total() == 3
        assert mx.default_device().type == mx.gpu
    assert count(mx.fast.rms_norm(x, computed(4), 1e-6)).total() > 1
    assert mx.default_device() == mx.Device(mx.cpu)


def test_a_custom_kernel_counts_once():
    launch = kernel_factory(name="any")
    a, b = launch(
        inputs=[computed(3)], output_shapes=[(2,), (5,)], output_dtypes=[mx.int32, mx.float32], grid=(1, 1, 1)
    )
    assert (a.shape, b.dtype) == ((2,), mx.float32)
    assert count(a, b).total() == 1


@pytest.mark.parametrize("form", count_launches.FORMS.values())
def test_each_way_launches_less_than_the_one_before(form):
    apart = count_launches.own_step(SIZES, form, kernels=False, join=False)
    joined = count_launches.own_step(SIZES, form, kernels=False, join=True)
    kernels = count_launches.own_step(SIZES, form, kernels=True, join=True)
    layers = SIZES["num_hidden_layers"]
    assert apart.total() - joined.total() == 3 * layers
    assert kernels.total() <= joined.total() - 3 * layers
