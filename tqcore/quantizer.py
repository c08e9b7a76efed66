"""How vectors are quantised, and what comes out."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any

from tqcore import checks, packing
from tqcore.codebook import Codebook


@dataclass(frozen=True)
class Quantizer:
    """The static description of a quantiser: hashable, holds no arrays.

    Args:
      head_dim: D, 2 to 1024: even for 4 bits, a multiple of 4 for 2, of 8 for 3 and 1.
      bits: 1 to 4 bits a coordinate.
      rotation: "hadamard" (D a power of two), "haar" (any D), or None: hadamard where D allows it, else haar.
      seed: draws the rotation.

    Raises:
      ValueError: an argument out of its range.
    """

    head_dim: int
    bits: int = 4
    _: KW_ONLY
    rotation: str | None = None
    seed: int = 0

    def __post_init__(self):
        checks.check_head_dim(self.head_dim)
        checks.check_bits(self.bits)
        checks.check_packable(self.head_dim, self.bits)
        checks.check_seed(self.seed)
        if self.rotation is None:
            power_of_two = checks.is_power_of_two(self.head_dim)
            object.__setattr__(self, "rotation", "hadamard" if power_of_two else "haar")
        checks.check_rotation(self.rotation, self.head_dim)

    @property
    def codebook(self) -> Codebook:
        """The levels of one coordinate."""
        return _codebook(self.head_dim, self.bits)

    @property
    def packed_dim(self) -> int:
        """P, bytes of codes per vector."""
        return packing.packed_dim(self.head_dim, self.bits)


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """Quantised vectors: x̂ = norm · Rᵀ centroids[index].

    A plain container, never validated when built: JAX and torch rebuild it with placeholders.

    Args:
      codes: [..., S, P] uint8 of NumPy, JAX or torch.
      norms: [..., S] float32.
      quantizer: what encoded them.
    """

    codes: Any
    norms: Any
    quantizer: Quantizer

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., S, D], the shape of the vectors."""
        return (*self.codes.shape[:-1], self.quantizer.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and norms."""
        return self.codes.nbytes + self.norms.nbytes

    def map(self, function: Callable[[Any], Any]) -> "PackedVectors":
        """The same vectors with `function` applied to codes and to norms, such as a move to a device."""
        return PackedVectors(function(self.codes), function(self.norms), self.quantizer)


@cache
def _codebook(head_dim: int, bits: int) -> Codebook:
    return Codebook(head_dim, bits)
