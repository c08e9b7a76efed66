"""Indices of 1 to 4 bits in bytes, D·bits/8 of them per vector, the first coordinate in the highest bits.

- 1, 2 and 4 bits: byte i holds the 8/bits coordinates from i·8/bits on, in order.
- 3 bits: a plane of the low two bits as above, D/4 bytes, then a plane of the high bits, D/8 bytes, whose byte j
  holds those of coordinates 8j + HIGH_BITS: each of its nibbles serves the same nibbles of bytes 2j and 2j+1 of
  the first plane.

For arrays of any library; `xp` is theirs: numpy, jax.numpy or torch.
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

HIGH_BITS = (0, 1, 4, 5, 2, 3, 6, 7)  # its own inverse


def pack(indices: Any, xp: Any, bits: int = 4) -> Any:
    """[..., D] uint8 indices below 2^bits -> [..., D·bits/8] bytes."""
    if bits == 3:
        return xp.concatenate([pack(indices & 3, xp, 2), _join(indices >> 2, HIGH_BITS)], -1)
    return _join(indices, range(8 // bits))


def unpack(codes: Any, xp: Any, bits: int = 4) -> Any:
    """[..., D·bits/8] bytes -> [..., D] indices."""
    if bits == 3:
        low = codes.shape[-1] // 3 * 2
        return unpack(codes[..., :low], xp, 2) | _separate(codes[..., low:], HIGH_BITS, xp) << 2
    return _separate(codes, range(8 // bits), xp)


def packed_dim(head_dim: int, bits: int) -> int:
    """P, bytes of codes per vector."""
    return head_dim * bits // 8


def code_bits(packed_dim: int, head_dim: int) -> int:
    """Bits of an index, from P and D."""
    return 8 * packed_dim // head_dim


def slots(codes: Any, starts: Any, batch: Any, steps: Any, page_table: Any, xp: Any) -> tuple[Any, Any, Any]:
    """Where `append` puts x[b, :, t]: the index along the first axis, that along S, and whether there is such a place.

    Args:
      codes: [B, K, S, P], or a pool [N, K, page, P].
      starts: [B] int32.
      batch, steps: 0, 1, … as [B, 1] and [1, T] int32.
      page_table: [B, M] int32 or None.

    Returns:
      Three arrays [B, T]; the first two are 0 where the third is False.
    """
    rows, _, size = codes.shape[:3]
    pages = 1 if page_table is None else page_table.shape[1]
    position = starts[:, None] + steps
    row = batch + 0 * steps
    inside = (position >= 0) & (position < pages * size) & (rows > 0)
    position = xp.where(inside, position, 0)
    if page_table is not None and pages * size:
        row = page_table[row, position // size]
        inside = inside & (row >= 0) & (row < rows)
        position = position % size
    return xp.where(inside, row, 0), xp.where(inside, position, 0), inside


def _join(fields: Any, order: Sequence[int]) -> Any:
    """Bytes of len(order) fields each, the highest that of coordinate order[0]."""
    count = len(order)
    width = 8 // count
    return reduce(or_, (fields[..., k::count] << (8 - width * (i + 1)) for i, k in enumerate(order)))


def _separate(codes: Any, order: Sequence[int], xp: Any) -> Any:
    """The inverse of `_join`, for an order that is its own inverse."""
    count = len(order)
    width = 8 // count
    fields = [codes >> (8 - width * (k + 1)) & (2**width - 1) for k in order]
    return xp.stack(fields, -1).reshape(*codes.shape[:-1], count * codes.shape[-1])
