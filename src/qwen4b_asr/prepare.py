"""A filled model made ready for the device that it will run on: the same results, sooner."""

from __future__ import annotations

import mlx.core as mx

from ._blas import leave_cores_to_numpy, loaded_blas
from .cpu.columns import lay_out_by_columns, lay_out_for_numpy
from .cpu.decoder import use_numpy_layers
from .cpu.heap import keep_freed_memory
from .cpu.listening import listen_with_numpy
from .cpu.products import multiply_by_numpy, numpy_multiplies
from .decoder import Qwen3
from .joined import join_projections
from .model import SpeechModel


def prepare(model: SpeechModel) -> None:
    """Do to every stage what helps on the default device.

    What NumPy computes differs from MLX's by rounding. Differentiate the model in training mode, where MLX computes;
    compile or vmap one that is not prepared.

    Args:
        model: Filled, with its adapters beside the layers. It is changed in place.
    """
    if "decoder" in model:
        prepare_decoder(model.decoder)
    if numpy_multiplies():
        _make_room_for_numpy()
        multiply_by_numpy(model)
        listen_with_numpy(model)


def prepare_decoder(decoder: Qwen3) -> None:
    """Join what one launch can compute; on a CPU, lay dense weights out for its BLAS and leave products to NumPy.

    Dense weights then lie by columns; those that NumPy multiplies with the same rows, side by side.
    """
    join_projections(decoder)
    if numpy_multiplies():
        _make_room_for_numpy()
        lay_out_for_numpy(decoder)
        multiply_by_numpy(decoder)
        use_numpy_layers(decoder)
    elif mx.default_device().type == mx.DeviceType.cpu and "openblas" in (loaded_blas() or ""):
        lay_out_by_columns(decoder)


def _make_room_for_numpy() -> None:
    keep_freed_memory()
    leave_cores_to_numpy()
