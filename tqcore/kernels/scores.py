"""Attention scores from packed keys, in Triton: the device code that tq_torch and tqjax launch.

    score[r, s] = (Σ_d n[r, d] · level[index[s, d]]) · (norm[s] · (unit · 2^e[r]))       q[r] ≈ n[r] · 2^e[r]

Reads P + 4 bytes a key, P = D·BITS/8, once for all R = T·G query rows of a key head, and writes 4·R bytes.
Equals `tqcore.reference.fused_qk_scores` bit for bit. Its Pallas twin is `tqjax/pallas_scores.py`.

Source: the exact integer score of docs/format.md; byte permutes: PTX ISA, `prmt`.
"""

import triton
import triton.language as tl

from tqcore import fixed_point
from tqcore.kernels import lookup

CARRY, BIAS = (tl.constexpr(value) for value in fixed_point.exponent_bias(fixed_point.QUERY_LIMIT))
ABS_MASK = tl.constexpr(fixed_point.ABS_MASK)
INFINITY_BITS = tl.constexpr(fixed_point.INFINITY_BITS)
MIN_EXPONENT = tl.constexpr(fixed_point.MIN_EXPONENT)
ROUNDER = tl.constexpr(fixed_point.ROUNDER)
ROUNDER_BITS = tl.constexpr(fixed_point.ROUNDER_BITS)
SMALLEST_NORMAL = tl.constexpr(fixed_point.SMALLEST_NORMAL)
NOT_FINITE = tl.constexpr(128)  # in place of an exponent

LOOKUP_2, LOOKUP_3, LOOKUP_4 = (tl.constexpr(lookup.in_order(bits)) for bits in lookup.BITS)
CONSTRAINTS_2, CONSTRAINTS_3, CONSTRAINTS_4 = (
    tl.constexpr(lookup.constraints(bits, lookup.FIELDS[bits])) for bits in lookup.BITS
)
SHIFT, SHIFT_CONSTRAINTS = tl.constexpr(lookup.SHIFT), tl.constexpr(lookup.SHIFT_CONSTRAINTS)


@triton.jit
def _load_codes(key_ptr, inside, D: tl.constexpr, BLOCK_P: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Codes of keys that start at key_ptr [keys, 1], zeros where not `inside`: what `_levels` takes.

    Bytes of codes, or of the low plane, and for each of them a byte with its high bits.
    """
    BYTES: tl.constexpr = BLOCK_P if BITS == 4 else BLOCK_P // 2
    LIVE: tl.constexpr = D // 2 if BITS == 4 else D // 4
    p = tl.arange(0, BYTES)[None, :]
    codes = tl.load(key_ptr + p, mask=inside & (p < LIVE), other=0)
    high = tl.zeros_like(codes)
    if BITS == 3:
        half = tl.arange(0, BYTES // 2)[None, :]
        plane = tl.load(key_ptr + LIVE + half, mask=inside & (half < D // 8), other=0)
        if PTX:
            shifted = tl.inline_asm_elementwise(SHIFT, SHIFT_CONSTRAINTS, [plane], dtype=tl.uint8, is_pure=True, pack=4)
        else:
            shifted = plane << 2
        high = tl.reshape(tl.join(plane, shifted), codes.shape)
    return codes, high


@triton.jit
def _levels(codes, high, w0, w1, w2, w3, BITS: tl.constexpr, PTX: tl.constexpr):
    """The int8 table entries of the even and of the odd coordinates."""
    if BITS == 4:
        if PTX:
            even, odd = tl.inline_asm_elementwise(
                LOOKUP_4, CONSTRAINTS_4, [codes, w0, w1, w2, w3], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            even, odd = _level(codes >> 4, w0, w1, w2, w3), _level(codes & 15, w0, w1, w2, w3)
    else:
        if PTX and BITS == 3:
            a, b, c, d = tl.inline_asm_elementwise(
                LOOKUP_3, CONSTRAINTS_3, [codes, high, w0, w1], dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
                is_pure=True, pack=4,
            )  # fmt: skip
        elif PTX:
            a, b, c, d = tl.inline_asm_elementwise(
                LOOKUP_2, CONSTRAINTS_2, [codes, w0], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
            )
        else:
            a, b, c, d = _indices(codes, high)
            a, b = _level(a, w0, w1, w2, w3), _level(b, w0, w1, w2, w3)
            c, d = _level(c, w0, w1, w2, w3), _level(d, w0, w1, w2, w3)
        even = tl.reshape(tl.join(a, c), [codes.shape[0], 2 * codes.shape[1]])
        odd = tl.reshape(tl.join(b, d), [codes.shape[0], 2 * codes.shape[1]])
    return even, odd


@triton.jit
def _indices(codes, high):
    """The four indices of each byte of a low plane and of what `_load_codes` puts beside it."""
    return (
        codes >> 6 | (high >> 5 & 4),
        (codes >> 4 & 3) | (high >> 4 & 4),
        (codes >> 2 & 3) | (high >> 1 & 4),
        (codes & 3) | (high & 4),
    )


@triton.jit
def _level(index, w0, w1, w2, w3):
    """The int8 table entry of each index, by shifts."""
    index = index.to(tl.int32)
    word = tl.where(index < 8, tl.where(index < 4, w0, w1), tl.where(index < 12, w2, w3))
    return (word >> (index % 4 * 8)).to(tl.int8)


@triton.jit
def _multiply(a, b, PTX: tl.constexpr):
    """a · b rounded once, never fused with an addition, subnormals as zeros."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return _flush(_flush(a) * _flush(b))


@triton.jit
def _finite(x, PTX: tl.constexpr):
    """x, or NaN where it is not finite: x·0 + x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "fma.rn.ftz.f32 $0, $1, 0f00000000, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.where((x.to(tl.int32, bitcast=True) & ABS_MASK) < INFINITY_BITS, x, float("nan"))


@triton.jit
def _flush(x):
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, x * 0.0, x)


@triton.jit
def _fixed_point(q_even, q_odd):
    """Rows of floats as integers n times 2^e; e = NOT_FINITE for a row with NaN or infinity."""
    bits_even = tl.max(q_even.to(tl.int32, bitcast=True) & ABS_MASK, 1)
    bits_odd = tl.max(q_odd.to(tl.int32, bitcast=True) & ABS_MASK, 1)
    bits = tl.minimum(tl.maximum(bits_even, bits_odd), INFINITY_BITS)
    e = tl.maximum(((bits + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    inverse = ((127 - e) << 23).to(tl.float32, bitcast=True)[:, None]
    n_even = (q_even * inverse + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    n_odd = (q_odd * inverse + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
    return n_even, n_odd, tl.where(bits < INFINITY_BITS, e, NOT_FINITE)


@triton.jit
def _plane(n, plane):
    """n = 128·hi + lo as int8: hi where plane is 0, else lo."""
    hi = (n + 64) >> 7
    return tl.where(plane == 0, hi, n - 128 * hi).to(tl.int8)


@triton.jit
def _products(levels_even, levels_odd, q_even, q_odd, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr):
    """⟨level, hi⟩ and ⟨level, lo⟩ of every key and row, [BLOCK_S, BLOCK_R] int32 each."""
    acc = tl.dot(levels_even, q_even.T, out_dtype=tl.int32)
    acc = tl.dot(levels_odd, q_odd.T, acc, out_dtype=tl.int32)
    return tl.split(tl.permute(tl.reshape(acc, [BLOCK_S, 2, BLOCK_R]), [0, 2, 1]))


@triton.jit
def scores_kernel(
    q_ptr,  # [B·K, R, D] float32 | bfloat16 | float16
    codes_ptr,  # [B, K, S, P] uint8
    norms_ptr,  # [B, K, S] float32
    table_ptr,  # [4·PLANES + 1] int32: the levels' bytes, the bits of the table's step
    scale,  # float32
    out_ptr,  # [B·K, R, S] float32
    codes_stride_b,
    codes_stride_k,
    norms_stride_b,
    norms_stride_k,
    K,
    R,
    S,
    blocks,
    CODES_STRIDE_S: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PTX: tl.constexpr,
):
    programs_s = tl.cdiv(S, blocks * BLOCK_S)  # in one axis with the heads: CUDA's others end at 65535
    head = tl.program_id(0) // programs_s
    batch, kv_head = (head // K).to(tl.int64), (head % K).to(tl.int64)

    # The query rows, twice: their hi planes, then their lo planes.
    i = tl.arange(0, 2 * BLOCK_R)
    row = tl.program_id(1) * BLOCK_R + i % BLOCK_R
    p = tl.arange(0, BLOCK_P)
    q_row_ptr = q_ptr + (head.to(tl.int64) * R + row[:, None]) * D
    live = (row[:, None] < R) & (p[None, :] < D // 2)
    q_even = tl.load(q_row_ptr + 2 * p[None, :], mask=live, other=0.0).to(tl.float32)
    q_odd = tl.load(q_row_ptr + 2 * p[None, :] + 1, mask=live, other=0.0).to(tl.float32)
    n_even, n_odd, e = _fixed_point(q_even, q_odd)
    q_even, q_odd = _plane(n_even, i[:, None] // BLOCK_R), _plane(n_odd, i[:, None] // BLOCK_R)

    # unit · 2^e of each row; the two halves of e are alike.
    w0, w1, w2, w3 = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    step = tl.load(table_ptr + 4 * PLANES).to(tl.float32, bitcast=True)
    e = tl.max(tl.reshape(e, [2, BLOCK_R]), 0)
    power = ((e + 127) << 23).to(tl.float32, bitcast=True)
    unit = _multiply(scale, step, PTX)
    factor = _multiply(unit, tl.where(e == NOT_FINITE, float("nan"), power), PTX)

    # This program's keys: codes_ptr, norms_ptr and out_ptr point at the first of `count`.
    start = (tl.program_id(0) % programs_s).to(tl.int64) * blocks * BLOCK_S
    count = tl.minimum(S - start, blocks * BLOCK_S).to(tl.int32)
    codes_ptr += batch * codes_stride_b + kv_head * codes_stride_k + start * CODES_STRIDE_S
    norms_ptr += batch * norms_stride_b + kv_head * norms_stride_k + start
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    out_row_ptr = out_ptr + (head.to(tl.int64) * R + r[None, :]) * S + start
    column = tl.arange(0, BLOCK_S)
    norm_ahead = tl.load(norms_ptr + column, mask=column < count, other=0.0)
    for first in range(0, count, BLOCK_S):
        s = first + column
        inside = s < count
        norm = _finite(norm_ahead, PTX)  # loaded a step ahead, since Triton stages only what dots take
        norm_ahead = tl.load(norms_ptr + BLOCK_S + s, mask=BLOCK_S + s < count, other=0.0)
        codes, high = _load_codes(codes_ptr + s[:, None] * CODES_STRIDE_S, inside[:, None], D, BLOCK_P, BITS, PTX)
        levels_even, levels_odd = _levels(codes, high, w0, w1, w2, w3, BITS, PTX)
        hi, lo = _products(levels_even, levels_odd, q_even, q_odd, BLOCK_S, BLOCK_R)
        if PLANES == 1:
            total = (hi * 128 + lo).to(tl.float32)
        else:
            w4, w5 = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
            w6, w7 = tl.load(table_ptr + 6), tl.load(table_ptr + 7)
            levels_even, levels_odd = _levels(codes, high, w4, w5, w6, w7, BITS, PTX)
            hi_low, lo_low = _products(levels_even, levels_odd, q_even, q_odd, BLOCK_S, BLOCK_R)
            total = hi.to(tl.float32) * 128.0 + (hi_low + lo).to(tl.float32)
            total = total * 128.0 + lo_low.to(tl.float32)
        scores = _multiply(total, _multiply(norm[:, None], factor[None, :], PTX), PTX)
        tl.store(out_row_ptr + s[:, None], scores, mask=inside[:, None] & (r[None, :] < R))
