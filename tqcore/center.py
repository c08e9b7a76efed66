"""Centers of keys: what many keys share, subtracted before they are quantised.

A center that is the same at every position adds one number to all scores of a row, which a softmax does not see. For
arrays of any library; `xp` is theirs: numpy, jax.numpy or torch.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore.fixed_point import tree_sum


def mean(x: Any, xp: Any) -> Any:
    """[..., S, D] float32 -> [..., 1, D], summed by halving, times 1/S rounded to float32."""
    total = tree_sum(xp.swapaxes(x, -1, -2), xp)
    return total[..., None, :] * float(np.float32(1 / x.shape[-2]))


def frequencies(head_dim: int, theta: float) -> NDArray[np.float32]:
    """[D/2] radians a position: theta^(-2i/D)."""
    return (float(theta) ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def rotary(bias: Any, angles: Any, interleaved: bool, xp: Any) -> Any:
    """`bias` [..., D] at each position of `angles` [S, D/2] -> [..., S, D]: coordinate pairs turned by the angles."""
    half = bias.shape[-1] // 2
    pairs = bias.reshape(*bias.shape[:-1], 1, half, 2) if interleaved else bias.reshape(*bias.shape[:-1], 1, 2, half)
    axis = -1 if interleaved else -2
    a, b = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[..., 0, :], pairs[..., 1, :])
    cos, sin = xp.cos(angles), xp.sin(angles)
    turned = xp.stack([a * cos - b * sin, a * sin + b * cos], axis)
    return turned.reshape(*turned.shape[:-2], bias.shape[-1])


def is_added(packed: Any, add_center: bool | None) -> bool:
    """Whether scores include the center's: where asked for, and where it varies along S."""
    return packed.center is not None and (bool(add_center) or packed.center.shape[-2] != 1)


def scores(query: Any, center: Any, scale: float, kv_heads: int, matmul: Callable[[Any, Any], Any]) -> Any:
    """scale · ⟨query, center⟩ for query [B, H, T, D] and center [..., 1 or S, D] -> [B, H, T, 1 or S]."""
    batch, heads, length, head_dim = query.shape
    rows = query.reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    products = matmul(rows, center.swapaxes(-1, -2)) * scale
    return products.reshape(batch, heads, length, products.shape[-1])
