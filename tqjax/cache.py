"""`KVCache` of JAX arrays: a pytree whose methods return a new cache, in place where `jit` is given the old one."""

import dataclasses
import functools
from collections.abc import Mapping
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import tqcore
from tqcore.cache_config import CacheLibrary
from tqcore.quantizer import PackedVectors
from tqjax import attention_ops, compress_ops, ops


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", *tqcore.KVCache.ARRAYS],
    meta_fields=["config"],
)
@dataclasses.dataclass(eq=False)
class KVCache(tqcore.KVCache):
    __doc__ = tqcore.KVCache.__doc__

    def attend(self, query, *, sinks=None, **options):
        return _attend(self, query, sinks, **options)

    attend.__doc__ = tqcore.KVCache.attend.__doc__

    def _written(self, key, value, counts, whole, blocked):
        return _written(self, key, value, counts, whole, blocked)

    def _replaced(self, changed):
        return dataclasses.replace(self, **changed)


def from_dlpack(packed: PackedVectors | tqcore.KVCache) -> PackedVectors | KVCache:
    """The same vectors or cache as JAX arrays over the same memory, from any library that speaks DLPack."""
    return _map(packed, jax.dlpack.from_dlpack)


def save_file(packed: PackedVectors | KVCache | Mapping[str, PackedVectors | KVCache], path: str | PathLike) -> None:
    """Writes packed vectors or a cache, or a dict of them by name; see `tqcore.save_file`."""
    tqcore.save_file(_map(packed, np.asarray), path)


def load_file(path: str | PathLike) -> PackedVectors | KVCache | dict[str, PackedVectors | KVCache]:
    """Reads what `save_file` wrote, onto the default device; see `tqcore.load_file`."""
    return _map(tqcore.load_file(path), _from_bits)


def _map(held: Any, function: Any) -> Any:
    if isinstance(held, PackedVectors):
        return held.map(function)
    if isinstance(held, tqcore.KVCache):
        return KVCache.of(held, function)
    return {name: _map(part, function) for name, part in held.items()}


def _from_bits(x):
    return jnp.asarray(x.view(jnp.bfloat16) if x.dtype == np.uint16 else x)


@functools.partial(jax.jit, static_argnames="whole")
def _written(cache, key, value, counts, whole, blocked):
    return tqcore.KVCache._written(cache, key, value, counts, whole, blocked)


STATIC = ("is_causal", "local_window_size", "logits_soft_cap", "scale", "return_lse", "implementation")


@functools.partial(jax.jit, static_argnames=STATIC)
def _attend(cache, query, sinks, **options):
    return tqcore.KVCache.attend(cache, query, sinks=sinks, **options)


def _zeros(shape, dtype, device=None):
    return jnp.zeros(shape, dtype, device=device)


def _take(x, index):
    return jnp.take_along_axis(x, index[:, None, :, None], axis=2, mode="clip")


KVCache.library = CacheLibrary(
    xp=jnp,
    zeros=_zeros,
    arange=lambda count, like: jnp.arange(count, dtype=jnp.int32),
    wide=lambda x: x.astype(jnp.float32),
    cast=lambda x, like: x.astype(like.dtype),
    matmul=functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST),
    take=_take,
    keep=lambda old, new: new,
    check_devices=ops.check_devices,
    on_host=attention_ops._on_host,
    append=compress_ops.append,
    attention=attention_ops.attention,
    merge_attention=attention_ops.merge_attention,
    decompress=compress_ops.decompress,
    key_center=ops.key_center,
)
