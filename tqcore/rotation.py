"""Random rotations y = R x that make the coordinates of any vector look alike.

- hadamard: y = H · (signs ⊙ x) / √D with Sylvester's H, for D a power of two.
- haar: the Q of a Gaussian matrix, columns signed so that it is uniform over the orthogonal group.

Both are drawn from PCG64 seeded by SeedSequence(seed, spawn_key=b"turboquant.rotation"), so that no
stream of test data or weights under the same seed is correlated with them. Only its raw 64-bit words
are used, whose sequence NumPy guarantees.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tqcore import checks
from tqcore.codebook import frozen
from tqcore.quantizer import Quantizer

SPAWN_KEY = tuple(b"turboquant.rotation")


def rotate(x: NDArray, quantizer: Quantizer) -> NDArray[np.float32]:
    """y = R x for each vector of x.

    Args:
      x: [..., D] float32, bfloat16 or float16.
      quantizer: names R.

    Returns:
      [..., D] float32.

    Raises:
      ValueError: x has another dtype, or its last axis is not `quantizer.head_dim`.
    """
    checks.check_rotated(x, quantizer)
    x = x.astype(np.float32)
    if quantizer.rotation == "hadamard":
        return hadamard(x * signs(quantizer), np) * inverse_sqrt(quantizer.head_dim)
    return (x.astype(np.float64) @ matrix(quantizer).T).astype(np.float32)


def unrotate(x: NDArray, quantizer: Quantizer) -> NDArray[np.float32]:
    """x = Rᵀ y, the inverse of `rotate`; the same arguments, result and errors."""
    checks.check_rotated(x, quantizer)
    x = x.astype(np.float32)
    if quantizer.rotation == "hadamard":
        return hadamard(x, np) * inverse_sqrt(quantizer.head_dim) * signs(quantizer)
    return (x.astype(np.float64) @ matrix(quantizer)).astype(np.float32)


def hadamard(x: Any, xp: Any) -> Any:
    """H x without the scale, by log2(D) passes of butterflies in a fixed order.

    Only additions and subtractions, each rounded once, so that NumPy, XLA and torch return the same bits.

    Args:
      x: [..., D], D a power of two.
      xp: the array library of x: numpy, jax.numpy or torch.
    """
    shape, width = x.shape, 1
    while width < shape[-1]:
        pairs = x.reshape(*shape[:-1], shape[-1] // (2 * width), 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = xp.stack((a + b, a - b), -2).reshape(shape)
        width *= 2
    return x


def inverse_sqrt(head_dim: int) -> np.float32:
    """1/√D rounded to float32."""
    return np.float32(head_dim**-0.5)


@cache
def signs(quantizer: Quantizer) -> NDArray[np.float32]:
    """[D] of ±1: coordinate i is negated where bit i % 64 of the stream's word i // 64 is set."""
    words = _raw_words(quantizer.seed, -(-quantizer.head_dim // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: quantizer.head_dim]
    return frozen(np.where(bits, np.float32(-1), np.float32(1)))


@cache
def matrix(quantizer: Quantizer) -> NDArray[np.float32]:
    """R as [D, D] float32, so that rotate(x) is x @ R.T."""
    head_dim = quantizer.head_dim
    if quantizer.rotation == "hadamard":
        return frozen(rotate(np.eye(head_dim, dtype=np.float32), quantizer).T.copy())
    uniform = ((_raw_words(quantizer.seed, head_dim**2) >> np.uint64(11)) + 0.5) * 2.0**-53
    q, r = np.linalg.qr(ndtri(uniform).reshape(head_dim, head_dim))
    return frozen((q * np.sign(np.diagonal(r))).astype(np.float32))


def _raw_words(seed: int, count: int) -> NDArray[np.uint64]:
    return np.random.PCG64(np.random.SeedSequence(seed, spawn_key=SPAWN_KEY)).random_raw(count)
