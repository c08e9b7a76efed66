"""Floats as integers times a power of two: what makes a score the same bits on every backend.

A row of floats becomes integers n = rint(x · 2^-e), |n| ≤ limit, with the smallest e that allows it.
An integer splits into two int8 planes, n = 128·hi + lo. A codebook becomes one such plane where its
entries are int8 multiples of a power of two, else two planes.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

QUERY_LIMIT = 16319  # 127·128 + 63: both planes fit int8
LEVEL_LIMIT = 127
MIN_EXPONENT = -100  # keeps every power of two and its inverse a normal float32
MIN_EXPONENT_BITS = (MIN_EXPONENT + 127) << 23  # of 2^MIN_EXPONENT; vectors below it count as zero
ABS_MASK = 0x7FFFFFFF
INFINITY_BITS = 0x7F800000  # of a float32; the bits of |x| are at least this where x is not finite
ROUNDER = 12582912.0  # 1.5·2^23: x + ROUNDER holds rint(x) in its low bits, for |x| < 2^22
ROUNDER_BITS = 0x4B400000
ROUNDER_NIBBLES = ROUNDER_BITS * 0x11111111 % 2**32  # eight of ROUNDER_BITS, each shifted by a nibble more, summed up
SMALLEST_SQUARE, LARGEST_SQUARE = 2.0**-40, 2.0**40  # of vectors of 16-bit floats whose sums need no power of two
SMALLEST_NORMAL = 2.0**-126


def exponent_bias(limit: int) -> tuple[int, int]:
    """(carry, bias) such that e = ((bits(a) + carry) >> 23) - bias is the smallest e with a ≤ limit·2^e."""
    whole = limit.bit_length() - 1
    last_mantissa = limit * 2 ** (23 - whole) - 2**23
    return 2**23 - 1 - last_mantissa, 127 + whole


def magnitude_bits(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """The bits of max|x| over the last axis; ordered like the floats, and above INFINITY_BITS for NaN."""
    return np.max(np.ascontiguousarray(x).view(np.int32) & ABS_MASK, axis=-1, initial=0)


def exponent(bits: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
    """The smallest e ≥ MIN_EXPONENT with a ≤ limit·2^e, from the bits of a ≥ 0."""
    carry, bias = exponent_bias(limit)
    return np.maximum(((np.minimum(bits, INFINITY_BITS) + carry) >> 23) - bias, MIN_EXPONENT)


def power_of_two(e: NDArray[np.int32] | int) -> NDArray[np.float32]:
    """2^e as float32 for -126 ≤ e ≤ 127, built from its bits."""
    return ((np.asarray(e, np.int32) + 127) << 23).view(np.float32)


def split(n: Any) -> tuple[Any, Any]:
    """Integers of any library as n = 128·hi + lo with lo in [-64, 63]."""
    hi = (n + 64) >> 7
    return hi, n - 128 * hi


def tree_sum(x: Any, xp: Any) -> Any:
    """Sum over the last axis by halving it: x[i] + x[i + half], an odd last element carried.

    A fixed order of float32 additions. `xp` is the library of x: numpy, jax.numpy or torch.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = xp.concatenate([x[..., :half] + x[..., half : 2 * half], x[..., 2 * half :]], -1)
    return x[..., 0]


def flush(x: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    """Subnormals as zeros of their sign: some devices compute so, hence all must."""
    return np.where(np.abs(x) < np.float32(SMALLEST_NORMAL), np.copysign(np.float32(0), x), x)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """A codebook in int8: centroid_i = (planes[0]_i) · step, or (128·planes[0]_i + planes[1]_i) · step.

    Args:
      planes: [1 or 2, 16] int8; an index past the end of the table reads its last entry.
      step: a power of two.
    """

    ENTRIES: ClassVar[int] = 16

    planes: NDArray[np.int8]
    step: np.float32

    @property
    def words(self) -> NDArray[np.int32]:
        """[4·planes + 1] int32: the planes' bytes in little-endian order, then the bits of step."""
        levels = self.planes.reshape(-1).view("<i4").astype(np.int32)
        return np.append(levels, self.step.view(np.int32))


def pad_table(table: NDArray[np.float32]) -> NDArray[np.float32]:
    """[L] -> [16], the last entry repeated."""
    return np.pad(table, (0, ScoreTable.ENTRIES - len(table)), mode="edge")


def score_table(centroids: NDArray[np.float32]) -> ScoreTable:
    """The int8 form of a table of 1 to 16 ascending finite entries."""
    bits = magnitude_bits(centroids)
    padded = pad_table(centroids)
    e = exponent(bits, LEVEL_LIMIT)
    levels = padded * power_of_two(-e)
    if np.all(levels == np.rint(levels)):
        return ScoreTable(levels.astype(np.int8)[None], np.float32(power_of_two(e)))
    e = exponent(bits, QUERY_LIMIT)
    hi, lo = split(np.rint(padded * power_of_two(-e)).astype(np.int32))
    return ScoreTable(np.stack([hi, lo]).astype(np.int8), np.float32(power_of_two(e)))


def unit(scale: float, table: ScoreTable) -> np.float32:
    """scale · step, subnormals as zeros: what a score of one level, one unit of n and norm 1 is worth."""
    return np.float32(flush(flush(np.float32(scale)) * table.step))


def score_words(centroids: NDArray[np.float32], scale: float) -> NDArray[np.int32]:
    """`ScoreTable.words` with the bits of `unit` in place of those of step."""
    table = score_table(centroids)
    return np.append(table.words[:-1], unit(scale, table).view(np.int32))
