"""How vectors are quantised, and what comes out."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any

import numpy as np

from tqcore import checks, packing
from tqcore.codebook import Codebook

RESIDUAL_SPAWN_KEY = tuple(b"turboquant.residual")


@dataclass(frozen=True)
class Quantizer:
    """The static description of a quantiser: hashable, holds no arrays.

    Args:
      head_dim: D, 2 to 1024: even for 4 bits, a multiple of 4 for 2, of 8 for 3, 1 and `qjl`.
      bits: 1 to 4 bits a coordinate.
      rotation: "hadamard" (D a power of two), "haar" (any D), or None: hadamard where D allows it, else haar.
      seed: draws the rotation.
      norm: "plain" stores ‖x‖; "corrected" stores ‖x‖² / ⟨x, Rᵀc⟩, so that ⟨x, x̂⟩ = ‖x‖²: x̂ is then unbiased over
        haar rotations. None: corrected for 3 and 4 bits without `qjl`, else plain, as measured in docs/quality.md.
      qjl: spends one of the bits, of at least 2, on the signs of the residual x - x̂ under a rotation of its own, the
        paper's inner-product form. docs/quality.md says why it is not the default.

    Raises:
      ValueError: an argument out of its range.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874; Vargaftik et al., EDEN, 2022, for the corrected norm.
    """

    head_dim: int
    bits: int = 4
    _: KW_ONLY
    rotation: str | None = None
    seed: int = 0
    norm: str | None = None
    qjl: bool = False
    residual: "Quantizer | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self):
        checks.check_head_dim(self.head_dim)
        checks.check_bits(self.bits)
        checks.check_seed(self.seed)
        checks.check_qjl(self.qjl, self.bits)
        if self.norm is None:
            object.__setattr__(self, "norm", "corrected" if self.bits >= 3 and not self.qjl else "plain")
        checks.check_norm(self.norm)
        checks.check_packable(self.head_dim, self.code_bits)
        if self.rotation is None:
            power_of_two = checks.is_power_of_two(self.head_dim)
            object.__setattr__(self, "rotation", "hadamard" if power_of_two else "haar")
        checks.check_rotation(self.rotation, self.head_dim)
        if self.qjl:
            words = np.random.SeedSequence(self.seed, spawn_key=RESIDUAL_SPAWN_KEY).generate_state(1)
            residual = Quantizer(self.head_dim, 1, rotation="haar", seed=int(words[0]), norm="corrected")
            object.__setattr__(self, "residual", residual)

    @property
    def code_bits(self) -> int:
        """Bits of an index: one less than `bits` with `qjl`."""
        return self.bits - 1 if self.qjl else self.bits

    @property
    def codebook(self) -> Codebook:
        """The levels of one coordinate."""
        return _codebook(self.head_dim, self.code_bits)

    @property
    def packed_dim(self) -> int:
        """P, bytes of codes per vector, without those of a residual."""
        return packing.packed_dim(self.head_dim, self.code_bits)


@dataclass(frozen=True, eq=False)
class PackedVectors:
    """Quantised vectors: x̂ = norm · Rᵀ centroids[index], plus the center and the residual's x̂ where there are any.

    A plain container, never validated when built: JAX and torch rebuild it with placeholders.

    Args:
      codes: [..., S, P] uint8 of NumPy, JAX or torch.
      norms: [..., S] float32.
      quantizer: what encoded them.
      center: [..., 1 or S, D] float32, what was subtracted before, or None.
      residual: the signs of `Quantizer(qjl=True)`, encoded by `quantizer.residual`, or None.
    """

    codes: Any
    norms: Any
    quantizer: Quantizer
    center: Any = None
    residual: "PackedVectors | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., S, D], the shape of the vectors."""
        return (*self.codes.shape[:-1], self.quantizer.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        parts = (self.codes, self.norms, self.center, self.residual)
        return sum(part.nbytes for part in parts if part is not None)

    def map(self, function: Callable[[Any], Any]) -> "PackedVectors":
        """The same vectors with `function` applied to each array, such as a move to a device."""
        center = None if self.center is None else function(self.center)
        residual = None if self.residual is None else self.residual.map(function)
        return PackedVectors(function(self.codes), function(self.norms), self.quantizer, center, residual)


@cache
def _codebook(head_dim: int, bits: int) -> Codebook:
    return Codebook(head_dim, bits)
