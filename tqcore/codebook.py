"""The scalar codebook: exact Lloyd-Max for a coordinate of a unit vector, then its dyadic form.

A coordinate x of a vector drawn uniformly from the unit sphere in D dimensions has the density

    p(x) ∝ (1 - x²)^((D-3)/2)   on [-1, 1].

`lloyd_max` solves for the levels of least mean squared error under p. `solve_dyadic` finds the best
levels of the form integer · 2^-exponent with |integer| ≤ 127: exact in float32, bfloat16, float16
and, as integers, in int8.

Source: Lloyd, "Least squares quantization in PCM", 1982; Zandieh et al., TurboQuant, arXiv:2504.19874.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, betaln

from tqcore import checks

MAX_LEVEL = 127

# (head_dim, bits) -> (exponent, the positive levels). `tests/test_core.py` solves each one again.
LITERALS: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
    (32, 1): (9, (73,)),
    (32, 2): (8, (20, 67)),
    (32, 3): (8, (11, 34, 60, 94)),
    (32, 4): (8, (6, 17, 29, 42, 56, 71, 90, 116)),
    (64, 1): (10, (103,)),
    (64, 2): (9, (29, 96)),
    (64, 3): (8, (8, 24, 43, 68)),
    (64, 4): (8, (4, 12, 21, 30, 40, 51, 65, 85)),
    (80, 1): (8, (23,)),
    (80, 2): (8, (13, 43)),
    (80, 3): (9, (14, 43, 76, 121)),
    (80, 4): (8, (4, 11, 19, 27, 36, 46, 58, 76)),
    (96, 1): (8, (21,)),
    (96, 2): (9, (24, 79)),
    (96, 3): (9, (13, 40, 70, 111)),
    (96, 4): (8, (3, 10, 17, 24, 32, 41, 53, 70)),
    (112, 1): (10, (77,)),
    (112, 2): (9, (22, 73)),
    (112, 3): (9, (12, 37, 65, 103)),
    (112, 4): (9, (6, 18, 31, 45, 60, 77, 98, 127)),
    (128, 1): (7, (9,)),
    (128, 2): (7, (5, 17)),
    (128, 3): (9, (11, 34, 60, 96)),
    (128, 4): (9, (6, 18, 30, 43, 57, 73, 93, 122)),
    (160, 1): (10, (65,)),
    (160, 2): (10, (37, 122)),
    (160, 3): (9, (10, 31, 55, 87)),
    (160, 4): (9, (5, 15, 26, 38, 51, 65, 83, 109)),
    (192, 1): (10, (59,)),
    (192, 2): (10, (33, 111)),
    (192, 3): (9, (9, 28, 50, 79)),
    (192, 4): (9, (5, 15, 25, 35, 47, 60, 76, 100)),
    (256, 1): (10, (51,)),
    (256, 2): (10, (29, 97)),
    (256, 3): (9, (8, 24, 43, 69)),
    (256, 4): (9, (4, 12, 21, 30, 40, 52, 66, 87)),
    (512, 1): (8, (9,)),
    (512, 2): (8, (5, 17)),
    (512, 3): (10, (11, 34, 61, 97)),
    (512, 4): (10, (6, 18, 30, 43, 57, 73, 93, 123)),
}


def cell_mass(edges: NDArray, head_dim: int) -> NDArray:
    """Probability that a coordinate falls between consecutive `edges`, shape [n] -> [n - 1]."""
    half = (head_dim - 1) / 2
    return np.diff(betainc(half, half, (1 + edges) / 2))


def cell_moment(edges: NDArray, head_dim: int) -> NDArray:
    """Integral of x·p(x) between consecutive `edges`, shape [n] -> [n - 1].

    The antiderivative is closed: -(1 - x²)^((D-1)/2) / ((D-1)·B(1/2, (D-1)/2)).
    """
    half = (head_dim - 1) / 2
    tail = np.maximum(1 - edges**2, 0.0) ** half
    return -np.diff(tail) / (2 * half * np.exp(betaln(0.5, half)))


def expected_distortion(levels: NDArray, head_dim: int) -> float:
    """E‖x - x̂‖² for a unit vector x whose coordinates go to the nearest of the ascending `levels` [L]."""
    edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
    mass, moment = cell_mass(edges, head_dim), cell_moment(edges, head_dim)
    return float(1 + head_dim * np.sum(levels * (levels * mass - 2 * moment)))


def lloyd_max(head_dim: int, bits: int, *, tolerance: float = 1e-13, max_steps: int = 20_000) -> NDArray:
    """The 2^bits levels of least distortion, float64 ascending, by Lloyd's fixed-point iteration."""
    count = 2**bits
    levels = np.linspace(-1, 1, 2 * count + 1)[1::2] * min(1.0, 3 / np.sqrt(head_dim))
    for _ in range(max_steps):
        edges = np.concatenate([[-1.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        updated = cell_moment(edges, head_dim) / cell_mass(edges, head_dim)
        updated = (updated - updated[::-1]) / 2
        if np.max(np.abs(updated - levels)) < tolerance:
            return updated
        levels = updated
    raise RuntimeError(f"Lloyd-Max must converge in {max_steps} steps, got head_dim={head_dim}, bits={bits}")


def solve_dyadic(head_dim: int, bits: int) -> tuple[int, tuple[int, ...]]:
    """The exponent and the 2^(bits-1) positive integer levels of least distortion.

    The distortion of a symmetric table is a sum over neighbouring pairs of levels, so the best levels
    on a grid of step 2^-exponent are a shortest path, found exactly by dynamic programming.
    """
    candidates = [_best_on_grid(head_dim, 2 ** (bits - 1), exponent) for exponent in range(4, 16)]
    _, exponent, levels = min(candidates)
    while all(level % 2 == 0 for level in levels):  # the same table on a coarser grid
        exponent, levels = exponent - 1, tuple(level // 2 for level in levels)
    return exponent, levels


def _best_on_grid(head_dim: int, count: int, exponent: int) -> tuple[float, int, tuple[int, ...]]:
    """Least distortion with `count` positive levels on the grid of step 2^-exponent."""
    top = min(MAX_LEVEL, 2**exponent)
    if top < count:
        return np.inf, exponent, ()
    grid = np.arange(2 * top + 1) / 2 ** (exponent + 1)  # half steps: levels and the midpoints between them
    mass = np.concatenate([[0.0], np.cumsum(cell_mass(grid, head_dim))])
    moment = np.concatenate([[0.0], np.cumsum(cell_moment(grid, head_dim))])
    total = cell_mass(np.array([0.0, 1.0]), head_dim)[0], cell_moment(np.array([0.0, 1.0]), head_dim)[0]
    level = np.arange(1, top + 1)
    value = level / 2**exponent

    def part(value, start, stop):  # ∫ (value² - 2·value·x) p(x) dx between two half-step indices
        return value * (value * (mass[stop] - mass[start]) - 2 * (moment[stop] - moment[start]))

    low, high = level[:, None], level[None, :]
    pair = part(value[:, None], 2 * low, low + high) + part(value[None, :], low + high, 2 * high)
    pair = np.where(low < high, pair, np.inf)
    tail = value * (value * (total[0] - mass[2 * level]) - 2 * (total[1] - moment[2 * level]))

    cost, came_from = part(value, 0, 2 * level), []
    for _ in range(count - 1):
        paths = cost[:, None] + pair
        came_from.append(np.argmin(paths, axis=0))
        cost = np.min(paths, axis=0)
    last = int(np.argmin(cost + tail))
    levels = [last]
    for step in reversed(came_from):
        levels.append(int(step[levels[-1]]))
    return float(cost[last] + tail[last]), exponent, tuple(i + 1 for i in reversed(levels))


@dataclass(frozen=True)
class Codebook:
    """The dyadic levels for one coordinate: centroid_i = levels[i] · 2^-exponent, ascending, antisymmetric.

    Args:
      head_dim: even, 2 to 1024. Other dimensions than those shipped are solved on first use and cached.
      bits: 1 to 4.

    Raises:
      ValueError: `head_dim` or `bits` out of range.
    """

    head_dim: int
    bits: int

    def __post_init__(self):
        checks.check_head_dim(self.head_dim)
        checks.check_bits(self.bits)

    @property
    def exponent(self) -> int:
        """Centroids are integer multiples of 2^-exponent."""
        return _solution(self.head_dim, self.bits)[0]

    @cached_property
    def levels(self) -> NDArray[np.int8]:
        """[2^bits] int8, ascending."""
        positive = _solution(self.head_dim, self.bits)[1]
        return frozen(np.array([-level for level in reversed(positive)] + list(positive), np.int8))

    @cached_property
    def centroids(self) -> NDArray[np.float32]:
        """[2^bits] float32, ascending, exact."""
        return frozen(np.ldexp(self.levels.astype(np.float32), -self.exponent))

    @cached_property
    def boundaries(self) -> NDArray[np.float32]:
        """[2^bits - 1] float32, the exact midpoints between centroids; a coordinate on one goes down."""
        return frozen((self.centroids[1:] + self.centroids[:-1]) / 2)

    @cached_property
    def distortion(self) -> float:
        """Expected ‖x - x̂‖² / ‖x‖² over directions x uniform on the sphere: D times the coordinate's MSE."""
        return expected_distortion(self.centroids.astype(np.float64), self.head_dim)


def frozen(array: NDArray) -> NDArray:
    """The array, read-only from now on."""
    array.setflags(write=False)
    return array


@cache
def _solution(head_dim: int, bits: int) -> tuple[int, tuple[int, ...]]:
    return LITERALS.get((head_dim, bits)) or solve_dyadic(head_dim, bits)
