"""Attention over packed keys and values, in Triton: the device code that tq_torch and tqjax launch.

    out[r] = Σ_s softmax_s(score[r, s]) · norm[s] · level[index[s]]      scores as in `tqcore/kernels/scores.py`

A program reads its part of the positions of one key head once, for BLOCK_R of its R = T·G query rows; `merge_kernel`
joins the parts and rotates the values back. Its Pallas twin is `tqjax/pallas_attention.py`.

    y[s, r] = x[s, r] + log2 |norm[s]|      w[s, r] = 2^(y[s, r] - max y)      x: logits, in units of log 2

Weights w of values are at most 1, whatever their norms, so that float16 holds them; the softmax's own sum is that of
w / |norm|. Positions past the last weigh 2^-∞; those that only other rows see are left out by a selection after every
product.

Source: Dao, FlashAttention-2, arXiv:2307.08691; the exact integer score of docs/format.md.
"""

import math

import triton
import triton.language as tl

from tqcore.kernels import lookup
from tqcore.kernels.scores import (
    NOT_FINITE,
    _finite,
    _fixed_point,
    _indices,
    _level,
    _levels,
    _load_codes,
    _plane,
)

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
LEAST_NORM, LARGEST_NORM = tl.constexpr(2.0**-110), tl.constexpr(2.0**110)  # of which w / |norm| stays a float32
HALF_UNIT = tl.constexpr(2.0**-24)  # the least float16

OWN = tl.constexpr("""{
.reg .b32 lane;
mov.u32 lane, %laneid;
mul.lo.s32 lane, lane, $2;
shr.s32 lane, lane, 31;
xor.b32 $0, $1, lane;
}""")

HIGH_HALVES_2, LOW_HALVES_2, HIGH_HALVES_4, LOW_HALVES_4 = (
    tl.constexpr(text) for bits in (2, 4) for text in lookup.HALVES[bits]
)
HALVES_CONSTRAINTS = tl.constexpr(lookup.HALVES_CONSTRAINTS)
FRONT_2, BACK_2, FRONT_3, BACK_3 = (tl.constexpr(text) for bits in (2, 3) for text in lookup.NIBBLES[bits])
NIBBLES_2, NIBBLES_3 = (tl.constexpr(lookup.NIBBLES_CONSTRAINTS[bits]) for bits in (2, 3))


@triton.jit
def _beside(even, odd):
    """[rows, columns] twice -> [rows, 2·columns], one after the other: no byte leaves its register."""
    return tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 1]), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def _apply(x, ASM: tl.constexpr):
    """One instruction on each float."""
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _words(table_ptr, length, PTX: tl.constexpr):
    """The four words of a table."""
    return (
        _own(tl.load(table_ptr), length, PTX),
        _own(tl.load(table_ptr + 1), length, PTX),
        _own(tl.load(table_ptr + 2), length, PTX),
        _own(tl.load(table_ptr + 3), length, PTX),
    )


@triton.jit
def _own(word, length, PTX: tl.constexpr):
    """The word in a register of each thread, `prmt` taking none of those that a warp shares.

    So that ptxas cannot tell that all threads have the same, a zero is added: the sign of lane · (length / 32).
    """
    if PTX:
        return tl.inline_asm_elementwise(OWN, "=r,r,r", [word, length >> 5], dtype=tl.int32, is_pure=True, pack=1)
    return word


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    if PTX:
        return _apply(x, "ex2.approx.ftz.f32 $0, $1;")
    return tl.exp2(x)


@triton.jit
def _log2(x, PTX: tl.constexpr):
    if PTX:
        return _apply(x, "lg2.approx.ftz.f32 $0, $1;")
    return tl.log2(x)


@triton.jit
def _inverse(x, PTX: tl.constexpr):
    if PTX:
        return _apply(x, "rcp.approx.ftz.f32 $0, $1;")
    return 1.0 / x


@triton.jit
def _magnitudes(table_ptr, length, BITS: tl.constexpr, PTX: tl.constexpr):
    """Two words: the positive levels of sixteen, or those of fewer after the same reversed."""
    if BITS == 4:
        first, second = tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    else:
        second = tl.load(table_ptr + 1) if BITS == 3 else tl.load(table_ptr) >> 16
        first = (second >> 24) | (second >> 8 & 0xFF00) | (second << 8 & 0xFF0000) | second << 24
    return _own(first, length, PTX), _own(second, length, PTX)


@triton.jit
def _nibbles(codes, high, BITS: tl.constexpr, PTX: tl.constexpr):
    """Two indices a byte; at 2 and 3 bits plus 4 - 2^BITS / 2, of fields 0 and 1 of all bytes, then of the others."""
    if BITS == 4:
        nibbles = codes
    else:
        if PTX and BITS == 3:
            front = tl.inline_asm_elementwise(FRONT_3, NIBBLES_3, [codes, high], dtype=tl.uint8, is_pure=True, pack=4)
            back = tl.inline_asm_elementwise(BACK_3, NIBBLES_3, [codes, high], dtype=tl.uint8, is_pure=True, pack=4)
        elif PTX:
            front = tl.inline_asm_elementwise(FRONT_2, NIBBLES_2, [codes], dtype=tl.uint8, is_pure=True, pack=4)
            back = tl.inline_asm_elementwise(BACK_2, NIBBLES_2, [codes], dtype=tl.uint8, is_pure=True, pack=4)
        else:
            a, b, c, d = _indices(codes, high)
            least: tl.constexpr = 4 - 2**BITS // 2
            front, back = a + least << 4 | b + least, c + least << 4 | d + least
        nibbles = _beside(front, back)
    return nibbles


@triton.jit
def _half(nibbles, w0, w1, LOW: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """level · 2^-24 of the high or the low nibbles as float16.

    The assembly is not called pure, though it is: Triton then does not look through it to the loaded bytes, for whose
    width it would choose a layout of the product's operand that costs a move a register.
    """
    if PTX:
        of_16: tl.constexpr = LOW_HALVES_4 if LOW else HIGH_HALVES_4
        of_8: tl.constexpr = LOW_HALVES_2 if LOW else HIGH_HALVES_2
        half = tl.inline_asm_elementwise(
            of_16 if BITS == 4 else of_8, HALVES_CONSTRAINTS, [nibbles, w0, w1], dtype=tl.float16, is_pure=False, pack=4
        )
    else:
        index = nibbles & 15 if LOW else nibbles >> 4
        sign_bit: tl.constexpr = 8 if BITS == 4 else 4
        byte = tl.where(index < 8, 7 - index, index - 8) if BITS == 4 else index
        level = _level(byte, w0, w1, w0, w1).to(tl.float32) * HALF_UNIT
        half = tl.where(index < sign_bit, -level, level).to(tl.float16)
    return half


@triton.jit
def _hadamard(x, ROWS: tl.constexpr, D: tl.constexpr):
    """H x of [ROWS, D]: each pass adds and subtracts along the lowest bit of an index, and makes it the highest."""
    for bit in tl.static_range(10):
        if 2**bit < D:
            a, b = tl.split(tl.reshape(x, [ROWS, D // 2, 2]))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, D])
    return x


@triton.jit
def _query(q_ptr, signs_ptr, row, R, D: tl.constexpr, ROTATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Even and odd coordinates [ROWS, BLOCK_P] of the query rows, rotated."""
    d = tl.arange(0, 2 * BLOCK_P)
    x = tl.load(q_ptr + row[:, None].to(tl.int64) * D + d[None, :], mask=(row[:, None] < R) & (d[None, :] < D), other=0)
    x = x.to(tl.float32)
    if ROTATE:
        x = x * tl.load(signs_ptr + d, mask=d < D, other=0.0)[None, :]
        blocks: tl.constexpr = ROWS * (2 * BLOCK_P // D)
        x = tl.reshape(_hadamard(tl.reshape(x, [blocks, D]), blocks, D), [ROWS, 2 * BLOCK_P]) * (D**-0.5)
    return tl.split(tl.reshape(x, [ROWS, BLOCK_P, 2]))


@triton.jit
def _soft_cap(x, CAP: tl.constexpr):
    """CAP · tanh(x / CAP)."""
    return CAP - 2 * CAP / (1 + tl.exp2(x * (2 * LOG2_E / CAP)))


@triton.jit
def attention_kernel(
    q_ptr,  # [B·K, R, D] float32 | bfloat16 | float16, rows g·T + t
    signs_ptr,  # [D] float32: of the keys' Hadamard rotation; not read where q is rotated already
    k_codes_ptr,  # [B or N, K, S or page, P] uint8
    k_norms_ptr,  # [B or N, K, S or page] float32
    k_table_ptr,  # [5] int32: the levels' bytes, the bits of the table's step
    v_codes_ptr,
    v_norms_ptr,
    v_table_ptr,
    lengths_ptr,  # [B] int32
    pages_ptr,  # [B, M] int32; not read where PAGE is 0
    out_ptr,  # [B·K, splits, R, D] float32: Σ 2^(x - m) · norm · level
    ml_ptr,  # [B·K, splits, 2, R] float32: m, then Σ 2^(x - m)
    scale,  # float32
    k_codes_stride_b,
    k_codes_stride_k,
    k_norms_stride_b,
    k_norms_stride_k,
    v_codes_stride_b,
    v_codes_stride_k,
    v_norms_stride_b,
    v_norms_stride_k,
    K,
    R,
    T,
    S,
    M,
    N,
    splits,
    left,
    right,
    K_STRIDE_S: tl.constexpr,
    V_STRIDE_S: tl.constexpr,
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ROTATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PTX: tl.constexpr,
):
    BLOCK_P: tl.constexpr = 32 if D <= 64 else (64 if D <= 128 else 128)  # tuning.packed_block(D)
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    batch, kv_head = (head // K).to(tl.int64), (head % K).to(tl.int64)

    # The query rows, twice: their hi planes, then their lo planes; scale · step · 2^e · log2(e) of each row.
    i = tl.arange(0, 2 * BLOCK_R)
    row = tl.program_id(1) * BLOCK_R + i % BLOCK_R
    q_even, q_odd = _query(q_ptr + head.to(tl.int64) * R * D, signs_ptr, row, R, D, ROTATE, 2 * BLOCK_R, BLOCK_P)
    n_even, n_odd, e = _fixed_point(q_even, q_odd)
    q_even, q_odd = _plane(n_even, i[:, None] // BLOCK_R), _plane(n_odd, i[:, None] // BLOCK_R)
    q = _beside(q_even, q_odd)
    e = tl.max(tl.reshape(e, [2, BLOCK_R]), 0)
    power = ((e + 127) << 23).to(tl.float32, bitcast=True)
    factor = scale * tl.load(k_table_ptr + 4).to(tl.float32, bitcast=True) * power
    factor = tl.where(e == NOT_FINITE, float("nan"), factor) * (LOG2_E if SOFT_CAP == 0.0 else 1.0)
    length = tl.load(lengths_ptr + batch)
    k0, k1, k2, k3 = _words(k_table_ptr, length, PTX)
    v0, v1 = _magnitudes(v_table_ptr, length, V_BITS, PTX)

    # The positions that any row of the block sees, and of those the part of this program.
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    length = tl.minimum(tl.maximum(length, 0), S)
    at = length - T + r % T
    first, last = 0, length
    if CAUSAL:
        last = tl.minimum(last, tl.max(tl.where(r < R, at, -1)) + 1)
    if WINDOW:
        first = tl.maximum(first, tl.min(tl.where(r < R, at, S)) - left)
        last = tl.minimum(last, tl.max(tl.where(r < R, at, -1)) + right + 1)
    part = tl.cdiv(tl.cdiv(tl.maximum(last - first, 0), BLOCK_S), splits) * BLOCK_S
    first += split * part
    last = tl.minimum(last, first + part)

    column = tl.arange(0, BLOCK_S)
    place = first.to(tl.int64)
    if PAGE != 0:
        pages_ptr += batch * M
        batch, place = batch * 0, place * 0
    k_codes_ptr += batch * k_codes_stride_b + kv_head * k_codes_stride_k + place * K_STRIDE_S
    k_norms_ptr += batch * k_norms_stride_b + kv_head * k_norms_stride_k + place
    v_codes_ptr += batch * v_codes_stride_b + kv_head * v_codes_stride_k + place * V_STRIDE_S
    v_norms_ptr += batch * v_norms_stride_b + kv_head * v_norms_stride_k + place
    m = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_R], tl.float32)
    out_even = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    out_odd = tl.zeros([BLOCK_P, BLOCK_R], tl.float32)
    for start in range(0, last - first, BLOCK_S):
        s = start + column
        inside = s < last - first
        wide = s.to(tl.int64)
        k_code, k_norm, v_code, v_norm = wide * K_STRIDE_S, wide, wide * V_STRIDE_S, wide
        there = inside
        if PAGE != 0:
            page = tl.load(pages_ptr + (first + s) // PAGE, mask=inside, other=0)
            there = inside & (page >= 0) & (page < N)
            page, slot = tl.where(there, page, 0).to(tl.int64), (first + s) % PAGE
            k_code, k_norm = page * k_codes_stride_b + slot * K_STRIDE_S, page * k_norms_stride_b + slot
            v_code, v_norm = page * v_codes_stride_b + slot * V_STRIDE_S, page * v_norms_stride_b + slot
        codes, high = _load_codes(k_codes_ptr + k_code[:, None], inside[:, None], D, BLOCK_P, K_BITS, PTX)
        norm = tl.load(k_norms_ptr + k_norm, mask=there, other=0.0)
        if PAGE != 0:
            norm = tl.where(there | ~inside, norm, float("nan"))
        norm = _finite(norm, PTX)
        even, odd = _levels(codes, high, k0, k1, k2, k3, K_BITS, PTX)
        products = tl.dot(_beside(even, odd), q.T, out_dtype=tl.int32)
        hi, lo = tl.split(tl.permute(tl.reshape(products, [BLOCK_S, 2, BLOCK_R]), [0, 2, 1]))
        x, unit = (hi * 128 + lo).to(tl.float32), norm[:, None] * factor[None, :]
        if SOFT_CAP != 0.0:
            x, unit = _soft_cap(x * unit, SOFT_CAP), LOG2_E
        seen = inside[:, None]
        if CAUSAL:
            seen = seen & ((first + s)[:, None] <= at[None, :])
        if WINDOW:
            seen = seen & ((first + s)[:, None] >= at[None, :] - left) & ((first + s)[:, None] <= at[None, :] + right)

        codes, high = _load_codes(v_codes_ptr + v_code[:, None], inside[:, None], D, BLOCK_P, V_BITS, PTX)
        norm = _finite(tl.load(v_norms_ptr + v_norm, mask=there, other=0.0), PTX)
        size = tl.minimum(tl.maximum(tl.abs(norm), LEAST_NORM), LARGEST_NORM)
        inverse = _inverse(size, PTX)
        y = tl.fma(x, unit, tl.where(inside, _log2(size, PTX), float("-inf"))[:, None])
        if CAUSAL or WINDOW:
            y = tl.where(seen, y, float("-inf"))
        peak = tl.maximum(m, tl.max(y, 0))
        reference = tl.where(peak == float("-inf"), 0.0, peak)
        weights = _exp2(y - reference[None, :], PTX)
        shrink = _exp2(m - reference, PTX)
        total = tl.fma(weights, inverse[:, None], total * shrink[None, :])
        weights = weights * (norm * inverse)[:, None]
        if CAUSAL or WINDOW:
            weights = tl.where(seen, weights, 0.0)
        weights = weights.to(tl.float16)
        # One product after the other: the operand of both takes the same shared memory.
        nibbles = _nibbles(codes, high, V_BITS, PTX)
        even = _half(nibbles, v0, v1, False, V_BITS, PTX)
        out_even = tl.dot(even.T, weights, out_even * shrink[None, :])
        odd = _half(nibbles, v0, v1, True, V_BITS, PTX)
        out_odd = tl.dot(odd.T, weights, out_odd * shrink[None, :])
        m = peak

    # m becomes that of the logits alone, so that Σ 2^(x - m) is 1 to 2.
    total = tl.sum(total, 0)
    exponent = tl.where(total > 0.0, (total.to(tl.int32, bitcast=True) >> 23) - 127, 0)
    power = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    out_row = (head.to(tl.int64) * splits + split) * R + r[None, :]
    p = tl.arange(0, BLOCK_P)[:, None]
    d = 2 * p if V_BITS == 4 else 4 * (p % (BLOCK_P // 2)) + 2 * (p // (BLOCK_P // 2))
    live = (d < D) & (r[None, :] < R)
    tl.store(out_ptr + out_row * D + d, out_even * (1.0 / HALF_UNIT) * power[None, :], mask=live)
    tl.store(out_ptr + out_row * D + d + 1, out_odd * (1.0 / HALF_UNIT) * power[None, :], mask=live)
    ml_ptr += (head.to(tl.int64) * splits + split) * 2 * R
    tl.store(ml_ptr + r, m + exponent, mask=r < R)
    tl.store(ml_ptr + R + r, total * power, mask=r < R)


@triton.jit
def _part(out_ptr, first, split, splits, r, R, d, D: tl.constexpr):
    """Outputs of row r of some of the parts."""
    row, live = (first + split) * R + r, (split[:, None] < splits) & (d[None, :] < D)
    return tl.load(out_ptr + row[:, None] * D + d[None, :], mask=live, other=0.0)


@triton.jit
def merge_kernel(
    out_ptr,  # [B·K, splits, R, D] float32 of attention_kernel
    ml_ptr,  # [B·K, splits, 2, R] float32
    v_table_ptr,  # [5] int32
    signs_ptr,  # [D] float32: of the values' Hadamard rotation; not read where the output stays rotated
    lengths_ptr,  # [B] int32
    sinks_ptr,  # [H] float32; not read without SINKS
    result_ptr,  # [B·K, R, D] of the query's dtype
    lse_ptr,  # [B·K, R] float32
    K,
    R,
    T,
    S,
    splits,
    BLOCK_SPLITS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SINKS: tl.constexpr,
    UNROTATE: tl.constexpr,
    EARLY: tl.constexpr,  # whether it may start before the attention kernel has ended
):
    head, r = tl.program_id(0) // R, tl.program_id(0) % R
    batch, first = head // K, head.to(tl.int64) * splits
    CHUNK: tl.constexpr = 64 if BLOCK_SPLITS > 64 else BLOCK_SPLITS
    split, d = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    length, step = tl.load(lengths_ptr + batch), tl.load(v_table_ptr + 4).to(tl.float32, bitcast=True)
    if UNROTATE:
        signs = tl.load(signs_ptr + d)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    part = _part(out_ptr, first, split, splits, r, R, d, D)  # the first, while its weights are found
    i = tl.arange(0, BLOCK_SPLITS)
    ml_ptr += first * 2 * R + r
    m = tl.load(ml_ptr + i * (2 * R), mask=i < splits, other=float("-inf"))
    visible = tl.load(ml_ptr + i * (2 * R) + R, mask=i < splits, other=0.0)
    peak = tl.max(m)
    if SINKS:
        sink = tl.load(sinks_ptr + head % K * (R // T) + r // T)
        peak = tl.maximum(peak, sink * LOG2_E)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    visible = tl.sum(tl.exp2(m - peak) * visible)
    total, nothing = visible, float("-inf")
    if SINKS:
        total, nothing = visible + tl.exp2(sink * LOG2_E - peak), sink
    lse = tl.where(visible == 0.0, nothing, (peak + tl.log2(total)) * LN_2)

    out = tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(0, splits, CHUNK):
        weight = tl.load(ml_ptr + (chunk + split) * (2 * R), mask=chunk + split < splits, other=float("-inf"))
        out += tl.sum(part * tl.exp2(weight - peak)[:, None], 0)
        part = _part(out_ptr, first, chunk + CHUNK + split, splits, r, R, d, D)
    out = out * (step / tl.where(total == 0.0, 1.0, total))
    if UNROTATE:
        out = tl.reshape(_hadamard(tl.reshape(out, [1, D]), 1, D), [D]) * (D**-0.5) * signs
    fits = (length >= 0) & (length <= S)
    row = head.to(tl.int64) * R + r
    tl.store(result_ptr + row * D + d, tl.where(fits, out, float("nan")), mask=d < D)
    tl.store(lse_ptr + row, tl.where(fits, lse, float("nan")))
