"""`KVCache` of torch tensors: its methods change it in place, and none waits for the device."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np
import torch

import tqcore
from tq_torch import attention_ops, compress_ops, eager, ops
from tqcore import checks
from tqcore.cache_config import CacheLibrary
from tqcore.quantizer import PackedVectors


class KVCache(tqcore.KVCache):
    __doc__ = tqcore.KVCache.__doc__


def from_dlpack(packed: PackedVectors | tqcore.KVCache) -> PackedVectors | KVCache:
    """The same vectors or cache as torch tensors over the same memory, from any library that speaks DLPack."""
    return _map(packed, torch.from_dlpack)


def save_file(packed: PackedVectors | KVCache | Mapping[str, PackedVectors | KVCache], path: str | PathLike) -> None:
    """Writes packed vectors or a cache, or a dict of them by name; see `tqcore.save_file`."""
    tqcore.save_file(_map(packed, _to_bits), path)


def load_file(path: str | PathLike) -> PackedVectors | KVCache | dict[str, PackedVectors | KVCache]:
    """Reads what `save_file` wrote, as CPU tensors, moved by `.map(lambda x: x.to(device))`; see `tqcore.load_file`."""
    return _map(tqcore.load_file(path), _from_bits)


def _map(held: Any, function: Any) -> Any:
    if isinstance(held, PackedVectors):
        return held.map(function)
    if isinstance(held, tqcore.KVCache):
        return KVCache.of(held, function)
    return {name: _map(part, function) for name, part in held.items()}


def _to_bits(x):
    """On the host, bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).cpu().numpy()


def _from_bits(x):
    return torch.from_numpy(x).view(torch.bfloat16) if x.dtype == np.uint16 else torch.from_numpy(x)


def _zeros(shape, dtype, device=None):
    return torch.zeros(shape, dtype=getattr(torch, checks.dtype_name(dtype)), device=device)


def _take(x, index):
    index = index.long()[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index)


def _keep(old, new):
    """Into the tensor that is there, where it fits."""
    if new is old or new is None or old is None or old.shape != new.shape:
        return new
    return old.copy_(new)


KVCache.library = CacheLibrary(
    xp=torch,
    zeros=_zeros,
    arange=lambda count, like: torch.arange(count, dtype=torch.int32, device=like.device),
    wide=lambda x: x.float(),  # torch 2.11 does not trace a method that is no function
    cast=lambda x, like: x.to(like.dtype),
    matmul=eager.matmul,
    take=_take,
    keep=_keep,
    check_devices=ops.check_devices,
    on_host=attention_ops._on_host,
    append=compress_ops.append,
    attention=attention_ops.attention,
    merge_attention=attention_ops.merge_attention,
    decompress=compress_ops.decompress,
    key_center=ops.key_center,
)
