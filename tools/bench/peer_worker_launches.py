# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""mlx-lm's side of count_launches.py; runs in an environment of its own. Prints the launches of one step as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.qwen3 import Model, ModelArgs

from bench.launches import as_on_a_gpu, count


def step(sizes: dict[str, Any], form: dict[str, Any] | None, dtype: str) -> Counter[str]:
    """Count what `mlx_lm.generate.generate_step` computes for one token, greedily."""
    model = Model(ModelArgs(model_type="qwen3", **sizes))
    model.set_dtype(getattr(mx, dtype))
    if form:
        nn.quantize(model, **form)
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 9), dtype=mx.int32), cache=cache)
    token = mx.array([1])
    mx.eval(model.parameters(), token, [layer.state for layer in cache])
    logits = model(token[None], cache=cache)[:, -1, :]
    log_probabilities = logits - mx.logsumexp(logits, keepdims=True)
    return count(mx.argmax(log_probabilities, axis=-1), log_probabilities)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    with as_on_a_gpu():
        print(json.dumps(step(**request)))
