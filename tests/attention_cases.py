"""The one table of attention cases, for every backend, and a dense attention to hold the oracle to."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cases import DTYPES

import tqcore
from tqcore import rotation
from tqcore.quantizer import PackedVectors, Quantizer

NOWHERE = (-1, -(2**31), 2**31 - 1)  # page numbers where no page is looked at


@dataclass(frozen=True)
class AttentionCase:
    """Shapes in the letters of tqcore, and the options; `bits`, `centers` and `qjl` are those of keys and values.

    Centers are "none", "static" [B, K, 1, D], "head" [K, 1, D] or "varying" [B, K, S, D]; pools hold no static ones.
    """

    B: int = 3
    K: int = 2
    G: int = 2
    T: int = 1
    S: int = 70
    D: int = 64
    dtype: str = "float32"
    bits: tuple[int, int] = (4, 4)
    centers: tuple[str, str] = ("none", "none")
    qjl: tuple[bool, bool] = (False, False)
    lengths: str = "ragged"
    page: int | None = None
    causal: bool = False
    window: tuple[int, int] | int | None = None
    cap: float | None = None
    sinks: bool = False
    scale: float | None = None
    splits: int | None = None

    def __str__(self) -> str:
        default = AttentionCase()
        changed = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "-".join(f"{name}{value}".replace(" ", "") for name, value in changed.items()) or "base"


@dataclass(frozen=True)
class AttentionInputs:
    """Arguments of `attention` as NumPy arrays."""

    query: np.ndarray
    keys: PackedVectors
    values: PackedVectors
    arrays: dict[str, np.ndarray]
    static: dict[str, Any]


PLAIN = AttentionCase()
CAUSAL = replace(PLAIN, T=5, causal=True)
EVERYTHING = replace(CAUSAL, window=(23, 0), cap=5.0, sinks=True, page=16, splits=3, bits=(3, 2))
ATTENTION_CASES = [
    PLAIN,
    CAUSAL,
    *(replace(PLAIN, S=S, lengths=lengths) for S, lengths in ((1, "full"), (64, "full"), (257, "ragged"), (0, "full"))),
    *(replace(PLAIN, lengths=lengths, sinks=sinks) for lengths in ("full", "zero") for sinks in (False, True)),
    *(replace(PLAIN, T=3, G=G) for G in (1, 7, 8)),
    *(replace(CAUSAL, D=D) for D in (8, 80, 128, 256)),
    *(replace(CAUSAL, dtype=dtype, D=128) for dtype in ("bfloat16", "float16")),
    *(replace(CAUSAL, bits=bits) for bits in ((3, 4), (4, 2), (2, 3), (1, 1))),
    *(replace(PLAIN, T=5, window=window) for window in (0, 9, (9, 0), (0, 9), (500, 500), (2**40, 0))),
    *(replace(CAUSAL, window=window) for window in (9, (9, 4), (0, 0))),
    *(replace(CAUSAL, T=T, S=S) for T, S in ((17, 70), (70, 70), (80, 70), (0, 70))),
    *(replace(CAUSAL, cap=cap) for cap in (0.5, 30.0)),
    replace(CAUSAL, sinks=True),
    *(replace(CAUSAL, scale=scale) for scale in (0.0, -0.3)),
    *(replace(PLAIN, T=2, centers=(key, "none")) for key in ("static", "head", "varying")),
    *(replace(PLAIN, T=2, centers=("none", value), sinks=True) for value in ("static", "varying")),
    *(replace(CAUSAL, centers=("static", "static"), cap=cap, sinks=True) for cap in (None, 5.0)),
    *(replace(CAUSAL, qjl=qjl) for qjl in ((True, False), (False, True))),
    *(replace(PLAIN, splits=splits) for splits in (1, 2, 7)),
    replace(PLAIN, S=11, splits=1000),
    *(replace(CAUSAL, S=700, G=3, page=page, splits=4) for page in (None, 48)),
    *(replace(CAUSAL, page=page, S=S, lengths="full") for page, S in ((16, 64), (64, 128), (256, 300), (1, 9))),
    *(replace(CAUSAL, page=16, centers=(c, c), qjl=(True, True)) for c in ("none", "head", "varying")),
    replace(CAUSAL, page=16, window=(9, 0)),
    replace(PLAIN, page=16, lengths="zero"),
    replace(PLAIN, page=16, S=0, lengths="full"),
    replace(PLAIN, B=0),
    EVERYTHING,
    replace(EVERYTHING, centers=("varying", "head"), D=128, dtype="bfloat16"),
    replace(EVERYTHING, T=1, G=7, page=None, qjl=(True, False)),
]


def attention_inputs(case: AttentionCase) -> AttentionInputs:
    """The same values for the same case but for its pages and splits; what no query sees is NaN."""
    rng = np.random.default_rng(zlib.crc32(str(replace(case, page=None, splits=None)).encode()))
    query = 2 * rng.standard_normal((case.B, case.K * case.G, case.T, case.D))
    lengths = {
        "full": np.full(case.B, case.S),
        "ragged": np.resize([case.S, case.S // 3, 1], case.B),
        "zero": np.resize([0, case.S, 0], case.B),
    }[case.lengths].astype(np.int32)
    static = {
        "is_causal": case.causal, "local_window_size": case.window, "logits_soft_cap": case.cap, "scale": case.scale,
        "num_splits": case.splits,
    }  # fmt: skip
    unseen = ~seen(case, lengths).any(1)
    keys, values = (
        _packed(case, Quantizer(case.D, bits, seed=seed, qjl=qjl), center, unseen, rng)
        for bits, qjl, center, seed in zip(case.bits, case.qjl, case.centers, (1, 2), strict=True)
    )
    arrays = {} if case.lengths == "full" and not case.page else {"kv_lengths": lengths}
    if case.sinks:
        arrays["sinks"] = rng.standard_normal(case.K * case.G).astype(np.float32)
    if case.page:
        arrays["page_table"] = _page_table(case, unseen, rng)
        keys, values = (_pooled(packed, arrays["page_table"], case.page) for packed in (keys, values))
    return AttentionInputs(query.astype(DTYPES[case.dtype]), keys, values, arrays, static)


def attention_oracle(inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    return tqcore.attention(inputs.query, inputs.keys, inputs.values, **inputs.arrays, **inputs.static, return_lse=True)  # type: ignore


def seen(case: AttentionCase, lengths: np.ndarray) -> np.ndarray:
    """[B, T, S], position by position."""
    left, right = case.window if isinstance(case.window, tuple) else (case.window, case.window)
    result = np.zeros((case.B, case.T, case.S), bool)
    for b, t, s in np.ndindex(*result.shape):
        distance = s - (int(lengths[b]) - case.T + t)
        ahead = not case.causal or distance <= 0
        near = case.window is None or -left <= distance <= right
        result[b, t, s] = s < lengths[b] and ahead and near
    return result


def dense_attention(case: AttentionCase, fixed_point: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, log-sum-exp and Σ w·|v̂| in float64, head by head from decompressed vectors; no pages, no splits.

    With `fixed_point`, codes are scored with the query rounded as docs/format.md says, which leaves no other error.
    """
    inputs = attention_inputs(replace(case, page=None, splits=None))
    lengths, sinks = (inputs.arrays.get(name) for name in ("kv_lengths", "sinks"))
    visible = seen(case, np.full(case.B, case.S) if lengths is None else lengths)
    logits = _dense_logits(inputs, case.D**-0.5 if case.scale is None else case.scale, fixed_point)
    vectors = np.nan_to_num(tqcore.decompress(inputs.values).astype(np.float64))
    out, size = np.zeros((2, *inputs.query.shape))
    lse = np.full(inputs.query.shape[:3], -np.inf)
    for b, h, t in np.ndindex(*lse.shape):
        at = np.flatnonzero(visible[b, t])
        x, v = logits[b, h, t, at], vectors[b, h // case.G, at]
        x = x if case.cap is None else case.cap * np.tanh(x / case.cap)
        x = x if sinks is None else np.append(x, sinks[h])
        if len(x):
            powers = np.exp(x - x.max())
            lse[b, h, t] = np.log(powers.sum()) + x.max()
            weights = powers[: len(at)] / powers.sum()
            out[b, h, t], size[b, h, t] = weights @ v, weights @ np.abs(v)
    return out, lse, size


def _dense_logits(inputs, scale, fixed_point):
    """scale · ⟨query, k̂⟩ [B, H, T, S], the parts of k̂ each with its own query."""
    groups, keys = inputs.query.shape[1] // inputs.keys.codes.shape[1], inputs.keys
    total = 0.0
    for part in (keys, keys.residual):
        if part is not None:
            query = _fixed_point(inputs.query, part.quantizer) if fixed_point else inputs.query.astype(np.float64)
            vectors = tqcore.decompress(
                PackedVectors(part.codes, part.norms, replace(part.quantizer, bits=part.quantizer.code_bits, qjl=False))
            )
            total = total + query @ np.repeat(vectors, groups, 1).astype(np.float64).swapaxes(-1, -2)
    if keys.center is not None:
        center = np.repeat(np.broadcast_to(keys.center, keys.shape), groups, 1).astype(np.float64)
        total = total + inputs.query.astype(np.float64) @ center.swapaxes(-1, -2)
    return total * scale


def _fixed_point(query, quantizer):
    """The query, rounded in the rotated space to integers of at most 16319 times a power of two."""
    rotated = tqcore.rotate(query, quantizer).astype(np.float64)
    step = 2.0 ** np.ceil(np.log2(np.abs(rotated).max(-1, keepdims=True, initial=1e-30) / 16319))
    return np.rint(rotated / step) * step @ rotation.matrix(quantizer).astype(np.float64)


def _packed(case, quantizer, center, unseen, rng):
    """Random codes and norms [B, K, S], NaN where `unseen`."""

    def part(quantizer, size):
        codes = rng.integers(0, 256, (case.B, case.K, case.S, quantizer.packed_dim), dtype=np.uint8)
        norms = size * case.D**0.5 * np.exp(0.3 * rng.standard_normal(codes.shape[:3]))
        return codes, np.where(unseen[:, None], np.nan, norms).astype(np.float32)

    shape = {"static": (case.B, case.K, 1), "head": (case.K, 1), "varying": (case.B, case.K, case.S)}
    offset = None if center == "none" else rng.standard_normal((*shape[center], case.D)).astype(np.float32)
    if center == "varying":
        offset = np.where(unseen[:, None, :, None], np.float32(np.nan), offset)
    residual = quantizer.residual and PackedVectors(*part(quantizer.residual, 0.2), quantizer.residual)
    return PackedVectors(*part(quantizer, 1.0), quantizer, offset, residual)


def _page_table(case, unseen, rng):
    """[B, M] distinct pages of a pool of three more than are needed."""
    pages = -(-case.S // case.page)
    table = rng.permutation(case.B * pages + 3)[: case.B * pages].reshape(case.B, pages).astype(np.int32)
    padded = np.pad(unseen, ((0, 0), (0, pages * case.page - case.S)), constant_values=True)
    unused = padded.reshape(case.B, pages, case.page).all(-1)
    return np.where(unused, np.resize(np.array(NOWHERE, np.int32), table.shape), table)


def _pooled(packed, table, page):
    """Vectors [B, K, S, D] as a pool [N, K, page, D], NaN and 255 where nothing was put."""
    batch, kv_heads, size = packed.codes.shape[:3]

    def pool(x):
        nothing = 255 if x.dtype == np.uint8 else np.nan
        result = np.full((table.size + 3, kv_heads, page, *x.shape[3:]), nothing, x.dtype)
        for b, s in np.ndindex(batch, size):
            if 0 <= table[b, s // page] < len(result):
                result[table[b, s // page], :, s % page] = x[b, :, s]
        return result

    center = packed.center if packed.center is None or packed.center.ndim == 3 else pool(packed.center)
    return replace(replace(packed, center=None).map(pool), center=center)
