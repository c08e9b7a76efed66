"""The one table of score cases, for every backend."""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from scipy.special import ndtri

import tqcore

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """Shapes in the letters of tqcore, the table of centroids, and what is odd about the values."""

    B: int = 2
    K: int = 2
    G: int = 4
    T: int = 1
    S: int = 65
    D: int = 64
    dtype: str = "float32"
    table: str = "dyadic"
    values: str = "normal"
    scale: float | None = None
    bits: int = 4

    def __str__(self) -> str:
        odd = [f"{self.table}", *(x for x in (self.dtype, self.values) if x not in ("float32", "normal"))]
        scale = [] if self.scale is None else [f"scale{self.scale:g}"]
        bits = [] if self.bits == 4 else [f"{self.bits}bit"]
        return "-".join([f"B{self.B}K{self.K}G{self.G}T{self.T}S{self.S}D{self.D}", *bits, *odd, *scale])


BASE = Case()
CASES = [
    *(replace(BASE, S=S) for S in (1, 63, 64, 65, 257)),
    *(replace(BASE, G=G, D=128) for G in (1, 4, 5, 7, 8, 16)),
    *(replace(BASE, D=D, S=130) for D in (2, 6, 30, 64, 80, 96, 112, 128, 250, 256)),
    *(replace(BASE, T=T, G=G, S=100) for T in (1, 3, 17) for G in (1, 4, 7)),
    *(replace(BASE, dtype=dtype, D=D) for dtype in ("bfloat16", "float16") for D in (80, 128)),
    *(replace(BASE, table=table, D=D) for table in ("gaussian", "eight", "random", "one") for D in (64, 128)),
    *(replace(BASE, table=table, T=3, G=5, S=257, D=80) for table in ("dyadic", "random")),
    *(replace(BASE, table=table, D=256) for table in ("largest", "gaussian")),
    *(
        replace(BASE, values=v)
        for v in ("zero rows", "zero norms", "not finite", "subnormal", "tiny", "huge", "limits")
    ),
    *(replace(BASE, values=v, table="random") for v in ("not finite", "subnormal", "huge")),
    *(replace(BASE, values="subnormal", dtype=dtype) for dtype in ("bfloat16", "float16")),
    *(replace(BASE, T=17, G=3, S=260, D=D, table=table) for D in (2, 80, 128, 256) for table in ("dyadic", "random")),
    *(replace(BASE, T=40, values=v) for v in ("zero rows", "zero norms", "not finite", "subnormal", "huge")),
    replace(BASE, B=1, T=75, S=130, D=128, dtype="bfloat16"),
    *(replace(BASE, scale=scale) for scale in (0.0, -0.0, -1.5, 1e-40, 1e30)),
    replace(BASE, B=1, K=1, G=1, T=1, S=1, D=2),
    replace(BASE, B=3, K=5, G=3, T=2, S=129, D=96, table="random", dtype="bfloat16", values="not finite"),
    *(replace(BASE, S=0, T=T) for T in (1, 0)),
    replace(BASE, T=0),
    *(
        replace(BASE, bits=bits, D=D, T=T, G=G, S=100)
        for bits in (1, 2, 3)
        for D in (8, 80, 128)
        for T, G in ((1, 4), (3, 5))
    ),
    *(
        replace(BASE, bits=bits, D=D, S=S, G=G, T=T)
        for bits in (2, 3)
        for D, S, G, T in ((64, 65, 1, 1), (64, 257, 7, 1), (96, 63, 4, 1), (128, 193, 7, 3), (256, 130, 4, 1))
    ),
    *(
        replace(BASE, bits=bits, T=17, G=3, S=260, D=D, table="random")
        for bits in (2, 3)
        for D in (8, 64, 96, 128, 256)
    ),
    *(replace(BASE, bits=2, D=D) for D in (4, 36, 100)),
    *(replace(BASE, bits=bits, table=table) for bits in (1, 2, 3) for table in ("random", "one")),
    *(replace(BASE, bits=bits, values="not finite", dtype="bfloat16") for bits in (1, 2, 3)),
    *(replace(BASE, bits=bits, S=0) for bits in (1, 3)),
]


@dataclass(frozen=True)
class Inputs:
    """Arguments of `fused_qk_scores` as NumPy arrays."""

    q_rotated: np.ndarray
    packed_indices: np.ndarray
    norms: np.ndarray
    centroids: np.ndarray
    scale: float
    n_q_heads: int
    n_kv_heads: int

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.q_rotated, self.packed_indices, self.norms, self.centroids

    @property
    def heads(self) -> dict[str, int]:
        return {"n_q_heads": self.n_q_heads, "n_kv_heads": self.n_kv_heads}


def inputs(case: Case) -> Inputs:
    """The same arrays for the same case, in every process."""
    rng = np.random.default_rng(abs(hash_of(case)))
    q = rng.standard_normal((case.B, case.K * case.G, case.T, case.D))
    q *= np.exp(rng.standard_normal((*q.shape[:-1], 1)))
    codes = rng.integers(0, 256, (case.B, case.K, case.S, case.D * case.bits // 8), dtype=np.uint8)
    norms = np.exp(rng.standard_normal((case.B, case.K, case.S))).astype(np.float32) * np.float32(case.D**0.5)
    with np.errstate(over="ignore", under="ignore"):
        q, norms = VALUES[case.values](q, norms)
        q = q.astype(DTYPES[case.dtype])
    scale = case.D**-0.5 if case.scale is None else case.scale
    centroids = TABLES[case.table](case, rng).astype(np.float32)
    return Inputs(q, codes, norms, centroids, scale, case.K * case.G, case.K)


def hash_of(case: Case) -> int:
    return int.from_bytes(str(case).encode()[-16:].rjust(16), "little")


def oracle(inputs: Inputs) -> np.ndarray:
    return tqcore.fused_qk_scores(*inputs.arrays, inputs.scale, **inputs.heads)


TABLES = {
    "dyadic": lambda case, rng: tqcore.Codebook(case.D, case.bits).centroids,
    "gaussian": lambda case, rng: ndtri((np.arange(2**case.bits) + 0.5) / 2**case.bits) / np.sqrt(case.D),
    "eight": lambda case, rng: tqcore.Codebook(case.D, 3).centroids,
    "random": lambda case, rng: np.sort(rng.standard_normal(2**case.bits)),
    "one": lambda case, rng: np.array([0.3]),
    "largest": lambda case, rng: np.arange(-127, 128, 17)[: 2**case.bits] / 4,
}


def _zero_rows(q, norms):
    q[:, ::2] = 0
    q[0, 1] = -0.0
    return q, norms


def _not_finite(q, norms):
    q[0, 0, 0, 0], q[0, 1, 0, -1], q[-1, -1, -1, 1] = np.nan, np.inf, -np.inf
    norms[0, 0, 0], norms[0, -1, -1], norms[-1, 0, norms.shape[-1] // 2] = np.nan, np.inf, -np.inf
    return q, norms


def _subnormal(q, norms):
    q[:, ::2] *= 2.0**-130
    norms[:, :, ::3] = 2.0**-140
    return q, norms


def _tiny(q, norms):
    q *= 2.0 ** -np.arange(60, 60 + 10 * q.shape[1], 10)[None, :, None, None]
    return q, norms * np.float32(2.0**-60)


def _huge(q, norms):
    q *= 2.0 ** np.linspace(60, 123, q.shape[1])[None, :, None, None]
    return q, norms * np.float32(2.0**40)


def _limits(q, norms):
    """Rows whose largest magnitude stands on, just above and just below a step of the exponent, and half-way values."""
    tops = np.array([16319, 16319.001, 16318.999, 8159.5, 1.0, 0.5, 1.5, 2.5])
    steps = np.round(q * 500) + 0.5
    steps[..., 0] = np.resize(tops, steps.shape[:-1])
    return np.clip(steps, -8000, 16320), norms


VALUES = {
    "normal": lambda q, norms: (q, norms),
    "zero rows": _zero_rows,
    "zero norms": lambda q, norms: (q, norms * 0),
    "not finite": _not_finite,
    "subnormal": _subnormal,
    "tiny": _tiny,
    "huge": _huge,
    "limits": _limits,
}
