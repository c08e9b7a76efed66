"""Four-bit indices in bytes: coordinate 2j in the high nibble of byte j, coordinate 2j+1 in the low one.

For arrays of any library; `xp` is theirs: numpy, jax.numpy or torch.
"""

from typing import Any


def pack(indices: Any) -> Any:
    """[..., D] uint8 indices below 16 -> [..., D/2] bytes."""
    return (indices[..., 0::2] << 4) | indices[..., 1::2]


def unpack(codes: Any, xp: Any) -> Any:
    """[..., D/2] bytes -> [..., D] indices."""
    return xp.stack([codes >> 4, codes & 15], -1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
