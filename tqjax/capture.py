"""Queries, keys and values of a Flax model, for `tqcore.verify`."""

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from tqcore.verify import name_arrays, visible


def capture(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, NDArray]:
    """Calls model(*args, **kwargs) and returns what its `nnx.MultiHeadAttention` modules read, in order of their calls.

    Their `attention_fn` is wrapped for the call and put back. A model of other attention modules hands its own queries,
    keys and values to `tqcore.verify.name_arrays`, as `examples/tiny_lm.py` does.

    Args:
      model: called outside `jit`, so that values can be read.
      *args: of the model.
      **kwargs: of the model.

    Returns:
      Arrays by name, as `tqcore.verify` describes them, of the dtype that the model computes in.

    Raises:
      ValueError: no such module is called, one is called under `jit`, or its attention is not causal.
    """
    modules = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.MultiHeadAttention)]
    before, layers = [module.attention_fn for module in modules], []
    try:
        for module, function in zip(modules, before, strict=True):
            module.attention_fn = partial(_record, layers, function)
        model(*args, **kwargs)
    finally:
        for module, function in zip(modules, before, strict=True):
            module.attention_fn = function
    if not layers:
        raise ValueError(f"`model` must call nnx.MultiHeadAttention, got {type(model).__name__}, which calls none.")
    return name_arrays(layers)


def _record(
    layers: list, function: Any, query: jax.Array, key: jax.Array, value: jax.Array, **kwargs: Any
) -> jax.Array:
    """`function`, [..., T, H, D] each; what it reads is kept head-first."""
    try:
        heads = [np.asarray(x).reshape(-1, *x.shape[-3:]).swapaxes(1, 2) for x in (query, key, value)]
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError("`model` must be called outside jit to be captured, got traced queries.") from error
    causal, mask = visible(query.shape[-3], key.shape[-3]), kwargs.get("mask")
    if not kwargs.get("is_causal") and (mask is None or not np.all(np.asarray(mask) == causal)):
        raise ValueError("attention must be causal to be captured, got another mask or none.")
    layers.append(dict(zip(("query", "key", "value"), heads, strict=True)))
    return function(query, key, value, **kwargs)
