"""`attention` in plain JAX: exact scores, then float32."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tqcore import softmax
from tqjax import ops, xla


def attention(query, keys, values, kv_lengths, page_table, sinks, options):
    """The arguments of `tqcore.softmax.attention` -> out of query's dtype, lse."""
    out, lse = softmax.attention(query, keys, values, kv_lengths, page_table, sinks, options, LIBRARY)
    return out.astype(query.dtype), lse


def merge(out_a, lse_a, out_b, lse_b):
    out, lse = softmax.merge(_wide(out_a), lse_a, _wide(out_b), lse_b, jnp)
    return out.astype(out_a.dtype), lse


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


LIBRARY = softmax.Library(
    xp=jnp,
    arange=functools.partial(jnp.arange, dtype=jnp.int32),
    wide=_wide,
    matmul=functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST),
    scores=functools.partial(ops.packed_scores, implementation="xla"),
    dequantize=xla.dequantize,
    rotate=xla.rotate,
    unrotate=xla.unrotate,
)
