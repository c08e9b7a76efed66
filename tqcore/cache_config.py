"""What is static in a cache, and what a cache needs of a library of arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tqcore.quantizer import PackedVectors, Quantizer


@dataclass(frozen=True)
class CacheConfig:
    """What is static in a cache: hashable, holds no arrays. `KVCache.zeros` describes its fields."""

    keys: Quantizer
    values: Quantizer
    dtype: str
    window: int = 0
    block: int = 1
    first: int = 0
    calibrate: bool = False

    @property
    def ring(self) -> int:
        """Slots for recent positions."""
        return self.window + self.block - 1 if self.window else 0

    @property
    def slots(self) -> int:
        """Dense positions."""
        return self.first + self.ring


@dataclass(frozen=True)
class CacheLibrary:
    """What a cache needs of a library.

    Args:
      xp: numpy, jax.numpy or torch.
      zeros: shape, name of a dtype, device or None -> an array.
      arange: n, an array -> [n] int32, where the array is.
      wide: an array in float32, or wider.
      cast: an array, another -> the first in the dtype of the other.
      matmul: [..., R, C] × [..., C, D] -> [..., R, D].
      take: x [B, K, S, D], index [B, R] int32 within S -> [B, K, R, D].
      keep: the array of a cache and its new value -> the one that the cache holds from now on.
      check_devices: arrays by name; ValueError where they lie on several devices.
      on_host: an array -> NumPy, or None where that must wait for a device or cannot be.
      append, attention, merge_attention, decompress, key_center: the operations.
    """

    xp: Any
    zeros: Callable[..., Any]
    arange: Callable[[int, Any], Any]
    wide: Callable[[Any], Any]
    cast: Callable[[Any, Any], Any]
    matmul: Callable[[Any, Any], Any]
    take: Callable[[Any, Any], Any]
    keep: Callable[[Any, Any], Any]
    check_devices: Callable[..., None]
    on_host: Callable[[Any], Any]
    append: Callable[..., PackedVectors]
    attention: Callable[..., Any]
    merge_attention: Callable[..., Any]
    decompress: Callable[..., Any]
    key_center: Callable[[Any], Any]
