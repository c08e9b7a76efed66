"""Where positions of a cache lie, with pages and without; for arrays of NumPy, JAX and torch."""

from collections.abc import Callable, Sequence
from typing import Any


def places(
    starts: Any, length: int, page_table: Any, shape: Sequence[int], arange: Callable[[int], Any], xp: Any
) -> tuple[Any, Any, Any]:
    """Where `append` writes x[b, :, t]: cache[sequence, :, slot], where `written`; elsewhere the two mean nothing.

    Args:
      starts: [B] integers.
      length: T.
      page_table: [B, M] integers or None.
      shape: of the cache: [B, K, S, ...], or [N, K, page, ...] with pages.
      arange: n -> [n] integers, where the arrays are; with a start they may wrap around to negative ones.
      xp: numpy, jax.numpy or torch.

    Returns:
      sequence, slot, written: [B, T].
    """
    positions = starts[:, None] + arange(length)
    rows = xp.broadcast_to(arange(starts.shape[0])[:, None], positions.shape)
    if page_table is None:
        return rows, positions, (positions >= 0) & (positions < shape[2])
    size, pages = shape[2], page_table.shape[1]
    if 0 in (size, pages):
        return rows, positions, positions != positions
    entries = positions // size
    numbers = page_table[rows, xp.clip(entries, 0, pages - 1)]
    written = (positions >= 0) & (entries < pages) & (numbers >= 0) & (numbers < shape[0])
    return numbers, positions % size, written
