"""Flax attention modules that own a compressed cache: raw keys and values are never written to one.

    model = compress_attention(model, window=32)        # nnx.MultiHeadAttention modules become CompressedAttention ones
    init_cache(model, batch=1, max_length=4096)
    logits = model(prompt)                              # with decode=True inside: a prefill, then steps, in one nnx.jit

Source: https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/attention.html.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax.typing import DTypeLike

from tqcore import cache_checks
from tqcore.quantizer import Quantizer
from tqjax.cache import KVCache

Rotary = Callable[[jax.Array, jax.Array], jax.Array]
MODULES = ("query", "key", "value", "out", "query_ln", "key_ln", "rngs")  # what one module takes from another


class CompressedAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` whose cache is a `KVCache`; grouped-query heads by `num_kv_heads`.

    Args:
      *args, **kwargs: of nnx.MultiHeadAttention.
      rotary: x [B, T, H, D], positions [B, T] -> x turned, for queries and keys, or None.
      keys, values: bits of a coordinate, 1 to 4, or a Quantizer.
      cache_options: what else `KVCache.zeros` takes: window, block, first, center, page_size.
    """

    def __init__(
        self,
        *args: Any,
        rotary: Rotary | None = None,
        keys: int | Quantizer = 4,
        values: int | Quantizer = 4,
        cache_options: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.rotary, self.keys, self.values = rotary, keys, values
        self.cache_options = tuple(sorted(cache_options.items()))
        if rotary is not None:
            self.attention_fn = partial(_rotated, rotary, self.attention_fn)
        self.cache: Any = nnx.data(None)  # nnx.Cache of a KVCache, once `init_cache` made it

    @classmethod
    def of(cls, module: nnx.MultiHeadAttention, **options: Any) -> "CompressedAttention":
        """A module with the projections of another, which the two then share."""
        copied = (
            "num_heads", "in_features", "qkv_features", "out_features", "num_kv_heads", "in_kv_features", "dtype",
            "param_dtype", "broadcast_dropout", "dropout_rate", "deterministic", "precision", "use_bias",
            "attention_fn", "decode", "normalize_qk", "qkv_promote_dtype", "out_promote_dtype", "ln_promote_dtype",
        )  # fmt: skip
        arguments = {name: getattr(module, name) for name in copied}
        made = nnx.eval_shape(lambda: cls(**arguments, **options, rngs=nnx.Rngs(0)))
        for name in MODULES:
            setattr(made, name, getattr(module, name))
        return made

    def init_cache(self, input_shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> None:
        """Makes an empty cache.

        Args:
          input_shape: (B, longest sequence, features), as of nnx.MultiHeadAttention.
          dtype: in which keys and values come, and the dense ones are kept.
        """
        batch, max_length, _ = input_shape
        keys, values = (_quantizer(bits, self.head_dim) for bits in (self.keys, self.values))
        self.cache = nnx.Cache(
            KVCache.zeros(
                batch, self.num_kv_heads, max_length, keys, values, dtype=jnp.dtype(dtype).name,
                **dict(self.cache_options),
            )
        )  # fmt: skip

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        decode: bool | None = None,
        counts: jax.Array | None = None,
        mask: jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """As nnx.MultiHeadAttention, without `decode` the very same.

        With it, inputs_q [B, T, C] are the next T positions, a prefill or a step, and attention is causal.

        Args:
          counts: [B] int32, how many of the T positions a sequence has, the last ones being padding; None means T.

        Raises:
          ValueError: with `decode`, other inputs, a mask or dropout are given, or there is no cache or no room in it.
        """
        if not (self.decode if decode is None else decode):
            return super().__call__(inputs_q, inputs_k, inputs_v, mask=mask, decode=False, **kwargs)
        dropout = self.dropout_rate > 0 and not (kwargs.get("deterministic") or self.deterministic)
        cache_checks.check_flax_decode(self.cache is not None, inputs_k is not None, mask is not None, dropout)
        query, key, value = self.query(inputs_q), self.key(inputs_q), self.value(inputs_q)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        out, cache = _cached(self.cache.get_value(), query, key, value, self.rotary, counts)
        self.cache.set_value(cache)
        return self.out(out)


def compress_attention(
    model: nnx.Module, *, only: Callable[[tuple, nnx.MultiHeadAttention], bool] | None = None, **options: Any
) -> Any:
    """Swaps the `nnx.MultiHeadAttention` modules of a model for `CompressedAttention` ones, in place.

    Args:
      model: its modules keep their parameters.
      only: path, module -> whether to swap it; None swaps all. The others keep nnx's dense cache.
      **options: of `CompressedAttention`: rotary, keys, values; any others are `cache_options`.

    Returns:
      The model, or what has taken its place.
    """
    own = {name: options.pop(name) for name in ("rotary", "keys", "values") if name in options}
    make = partial(CompressedAttention.of, **own, cache_options=options)
    found = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if type(module) is nnx.MultiHeadAttention and (only is None or only(path, module))
    ]
    for path, module in found:
        if not path:
            return make(module)
        parent: Any = model
        for name in path[:-1]:
            parent = parent[name] if isinstance(name, int) else getattr(parent, str(name))
        if isinstance(path[-1], int):
            parent[path[-1]] = make(module)
        else:
            setattr(parent, str(path[-1]), make(module))
    return model


def init_cache(model: nnx.Module, batch: int, max_length: int, dtype: DTypeLike = jnp.float32) -> None:
    """Makes empty caches for all attention modules of a model, those of nnx included."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.MultiHeadAttention):
            module.init_cache((batch, max_length, module.in_features), dtype)


class CompressedAttentionLinen(linen.Module):
    """The Linen twin of `CompressedAttention`, for self-attention; its cache is the variable "kv" of "cache".

    Args:
      num_heads, qkv_features, out_features, num_kv_heads, dtype, param_dtype, use_bias, decode: as of nnx.
      max_length: the positions that a cache can hold.
      rotary, keys, values, cache_options: as of `CompressedAttention`.
    """

    num_heads: int
    max_length: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    decode: bool = False
    rotary: Rotary | None = None
    keys: int | Quantizer = 4
    values: int | Quantizer = 4
    cache_options: Mapping[str, Any] = field(default_factory=dict)

    @linen.compact
    def __call__(self, inputs: jax.Array, counts: jax.Array | None = None) -> jax.Array:
        """Causal self-attention [B, T, C] -> [B, T, C]; with `decode` these are the next positions of the cache."""
        head_dim = (self.qkv_features or inputs.shape[-1]) // self.num_heads
        kv_heads = self.num_kv_heads or self.num_heads
        dense = partial(linen.DenseGeneral, dtype=self.dtype, param_dtype=self.param_dtype, use_bias=self.use_bias)
        query = dense(features=(self.num_heads, head_dim), name="query")(inputs)
        key, value = (dense(features=(kv_heads, head_dim), name=name)(inputs) for name in ("key", "value"))
        out_dense = dense(features=self.out_features or inputs.shape[-1], name="out", axis=(-2, -1))
        if not self.decode:
            return out_dense(self._dense(query, key, value))
        started = self.has_variable("cache", "kv")
        quantizers = [_quantizer(bits, head_dim) for bits in (self.keys, self.values)]
        make = partial(
            KVCache.zeros, inputs.shape[0], kv_heads, self.max_length, *quantizers, dtype=key.dtype.name,
            **self.cache_options,
        )  # fmt: skip
        variable: Any = self.variable("cache", "kv", make)
        if not started:
            return out_dense(self._dense(query, key, value))
        out, variable.value = _cached(variable.value, query, key, value, self.rotary, counts)
        return out_dense(out)

    def _dense(self, query, key, value):
        attend = partial(jax.nn.dot_product_attention, is_causal=True)
        return attend(query, key, value) if self.rotary is None else _rotated(self.rotary, attend, query, key, value)


def _cached(cache, query, key, value, rotary, counts):
    """Appends keys and values [B, T, K, D] and attends with queries [B, T, H, D] -> [B, T, H, D], cache."""
    steps = query.shape[1]
    if rotary is not None:
        positions = cache.lengths[:, None] + jnp.arange(steps, dtype=jnp.int32)
        query, key = rotary(query, positions), rotary(key, positions)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    if counts is not None:  # the queries of a cache are its last positions
        late = jnp.arange(steps, dtype=jnp.int32) - (steps - counts[:, None])
        query = jnp.take_along_axis(query, jnp.maximum(late, 0)[:, None, :, None], 2)
    cache = cache.append(key, value, counts)
    out = jnp.swapaxes(cache.attend(query), 1, 2)
    if counts is not None:
        early = jnp.arange(steps, dtype=jnp.int32) + (steps - counts[:, None])
        out = jnp.take_along_axis(out, jnp.minimum(early, steps - 1)[:, :, None, None], 1)
    return out, cache


def _rotated(rotary, attention, query, key, value, **kwargs):
    """`attention` of queries and keys [B, T, H, D] turned by their positions from 0 on."""
    positions = jnp.broadcast_to(jnp.arange(query.shape[-3], dtype=jnp.int32), query.shape[:-2])
    return attention(rotary(query, positions), rotary(key, positions), value, **kwargs)


def _quantizer(bits: int | Quantizer, head_dim: int) -> Quantizer:
    return bits if isinstance(bits, Quantizer) else Quantizer(head_dim, bits)
