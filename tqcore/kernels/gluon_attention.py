"""Attention over packed keys and values, in Gluon for Hopper: both are multiplied as int8, neither is decompressed.

    x[r, s] = log2(e) · scale · ⟨q[r], k̂[s]⟩,   p = 2^(x - m[r]),   out[r] = Σ_s p · norm_v[s] · level_v[s],   l = Σ_s p

A program takes one part of the positions of one key head: it reads D + 8 bytes a position, once for eight rows, and
writes out, m and l, which `tqcore.kernels.attention.merge_kernel` joins. Scores are those of `gluon_scores`, before
their last rounding. Weights p · norm_v are written, block by block and row by row, as 15-bit integers times the
block's largest over 32512, and those as two int8 planes: an error of 2^-16 of the block's largest weight. Of its one
warp, lane 4·g + t holds, of each sixteen positions,

    keys     two, a quarter of the bytes each, as in `gluon_scores`
    scores   row g of eight against positions 4·t to 4·t + 3: as planes, the left operand of m16n8k32
    values   positions 4·t to 4·t + 3, an eighth of the bytes each: 4 × 4 bytes transposed and looked up are four
             positions of one coordinate a register, the right operand

so that every change of layout in the loop is a renaming of registers (`assert_trivial`).

Source: Dao, FlashAttention-2, arXiv:2307.08691; Flash-Decoding for the parts; docs/format.md for the scores.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tqcore import fixed_point
from tqcore.kernels import lookup
from tqcore.kernels.gluon_cache import _block, _copies, _pages, _stream, _values_stage_layout
from tqcore.kernels.gluon_scores import (
    NOT_FINITE,
    _bits,
    _code_bytes,
    _finite,
    _fixed_point,
    _products,
    _query_layout,
    _query_operands,
    _stage_layout,
    _sums,
)

ROUNDER = gl.constexpr(fixed_point.ROUNDER)
LOG2E = gl.constexpr(1.4426950408889634)
LOWEST = gl.constexpr(-3.0e38)  # below any score
LOOKUP_2, LOOKUP_3, LOOKUP_4 = (gl.constexpr(lookup.in_order(bits)) for bits in lookup.BITS)
CONSTRAINTS_2, CONSTRAINTS_3, CONSTRAINTS_4 = (
    gl.constexpr(lookup.constraints(bits, lookup.FIELDS[bits])) for bits in lookup.BITS
)
LARGEST_WEIGHT = gl.constexpr(32512.0)  # 127·256
LEAST_WEIGHT = gl.constexpr(1e-30)  # of a block, so that it can be divided by

# Byte j of register i to byte i of register j.
TRANSPOSE = gl.constexpr("""{
.reg .b32 a, b, c, d;
prmt.b32 a, $4, $5, 0x5140;
prmt.b32 b, $6, $7, 0x5140;
prmt.b32 c, $4, $5, 0x7362;
prmt.b32 d, $6, $7, 0x7362;
prmt.b32 $0, a, b, 0x5410;
prmt.b32 $1, a, b, 0x7632;
prmt.b32 $2, c, d, 0x5410;
prmt.b32 $3, c, d, 0x7632;
}""")
# The same of two bytes of four positions, $4 and $5, to $0 and $1; to $2 and $3 for the odd bytes of the low plane.
TRANSPOSE_HIGH = gl.constexpr("""{
prmt.b32 $0, $4, $5, 0x6420;
prmt.b32 $1, $4, $5, 0x7531;
shl.b32 $2, $0, 2;
shl.b32 $3, $1, 2;
}""")
# Of four integers u + 128 in the low two bytes of $2 to $5, the high bytes to $0 and the low ones less 128 to $1.
PLANES = gl.constexpr("""{
.reg .b32 a, b;
prmt.b32 a, $2, $3, 0x5140;
prmt.b32 b, $4, $5, 0x5140;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 a, a, b, 0x5410;
xor.b32 $1, a, 0x80808080;
}""")


# $1, in a register of each lane though all have the same: `prmt` takes none of those that a warp shares. $2 is 0.
OWN = gl.constexpr("""{
.reg .b32 t;
mov.u32 t, %tid.x;
and.b32 t, t, $2;
or.b32 $0, $1, t;
}""")


# $1; the next kernel may start, and waits by itself for what this one writes.
LET_NEXT_START = gl.constexpr("""{
griddepcontrol.launch_dependents;
mov.b32 $0, $1;
}""")


@gluon.constexpr_function
def _columns_layout(BLOCK_R, BLOCK_D):
    """[BLOCK_R, BLOCK_D]: lane t holds coordinates t, t + 4, …, lane g rows g, g + 8, …"""
    registers = [[0, x] for x in _bits(4, BLOCK_D)] + [[x, 0] for x in _bits(8, BLOCK_R)]
    return gl.DistributedLinearLayout(registers, [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [], [], [BLOCK_R, BLOCK_D])


@gluon.constexpr_function
def _packed_block(head_dim, v_bits):
    """Pairs of coordinates that a program holds: a lane takes four bytes of codes of a value."""
    return max(32 if v_bits == 4 else 64, 1 << (head_dim // 2 - 1).bit_length())


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.constexpr_function
def _inverse_sqrt(D):
    return D**-0.5


@gluon.jit
def _butterfly(x, WIDTH: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr):
    """Sums and differences of coordinates that stand WIDTH apart."""
    pairs = x.reshape([BLOCK_R, BLOCK_D // (2 * WIDTH), 2, WIDTH]).permute([0, 1, 3, 2])
    a, b = gl.split(pairs)
    return gl.join(a + b, a - b).permute([0, 1, 3, 2]).reshape([BLOCK_R, BLOCK_D])


@gluon.jit
def _rotated(q, signs, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr):
    """H · (signs ⊙ q) / √D of each row, in the order of `tqcore.rotation.hadamard`."""
    L: gl.constexpr = _query_layout(BLOCK_R, BLOCK_D)
    LC: gl.constexpr = _columns_layout(BLOCK_R, BLOCK_D)
    x = q * signs[None, :]
    for i in gl.static_range(_log2(D)):
        if 2 ** (i + 2) == BLOCK_D:  # the next two widths lie on lanes
            x = gl.convert_layout(x, LC)
        x = _butterfly(x, 2**i, BLOCK_R, BLOCK_D)
    return gl.convert_layout(x, L) * _inverse_sqrt(D)


@gluon.jit
def _load_query(
    q_ptr, signs_ptr, head, first_row, R,
    D: gl.constexpr, ROTATE: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Rows [BLOCK_R, BLOCK_D] of the query, and the signs of its rotation."""
    L: gl.constexpr = _query_layout(BLOCK_R, BLOCK_D)
    row = first_row + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, L))
    live = (row[:, None] < R) & (d[None, :] < D)
    q = gl.load(q_ptr + (head * R + row[:, None]) * D + d[None, :], mask=live, other=0.0)
    signs = d
    if ROTATE:
        signs = gl.load(signs_ptr + d, mask=d < D, other=0.0)
    return q, signs


@gluon.jit
def _query(
    q, signs, table, scale, D: gl.constexpr, K_BITS: gl.constexpr, ROTATE: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Two left operands of BLOCK_R rows as in `gluon_scores`, and scale · step · 2^e of each row."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    q = q.to(gl.float32)
    if ROTATE:
        q = _rotated(q, signs, D, BLOCK_R, 2 * BLOCK_P)
    n, e = _fixed_point(q)
    first, second = _query_operands(n, BLOCK_R, BLOCK_P, K_BITS, gl.DotOperandLayout(0, mma, 4))
    power = gl.where(e == NOT_FINITE, float("nan"), ((e + 127) << 23).to(gl.float32, bitcast=True))
    factor = power * (table[4].to(gl.float32, bitcast=True) * scale)
    sums, _ = _sums(gl.zeros([2 * BLOCK_R, BLOCK_S], gl.int32, mma), BLOCK_R, BLOCK_S)
    return first, second, gl.convert_layout(factor, gl.SliceLayout(1, sums.type.layout))


@gluon.jit
def _scores(
    codes, high, norm, words, q_first, q_second, factor, BITS: gl.constexpr, SOFT_CAP: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_R, BLOCK_S] of a block of keys, times log2(e)."""
    hi, lo = _products(codes, high, words, q_first, q_second, BITS, BLOCK_R, BLOCK_S, BLOCK_P)
    x = (hi * 128 + lo).to(gl.float32) * (_finite(norm)[None, :] * factor[:, None])
    if SOFT_CAP > 0:
        x = SOFT_CAP * LOG2E - 2 * SOFT_CAP * LOG2E / (1.0 + gl.exp2(x * (2 * LOG2E / SOFT_CAP)))
    return x


@gluon.jit
def _load_table(table_ptr):
    """The four words of levels, and the bits of the step."""
    return (
        gl.load(table_ptr),
        gl.load(table_ptr + 1),
        gl.load(table_ptr + 2),
        gl.load(table_ptr + 3),
        gl.load(table_ptr + 4),
    )


@gluon.jit
def _words(table, zero):
    """The words of levels, each in a register of every lane."""
    return _own(table[0], zero), _own(table[1], zero), _own(table[2], zero), _own(table[3], zero)


@gluon.jit
def _own(word, zero):
    return gl.inline_asm_elementwise(OWN, "=r,r,r", [word, zero], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _largest(a, b):
    return gl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def _weights(p, norm, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr):
    """p · norm as a left operand [2·BLOCK_R, BLOCK_S] of planes, 256·hi + lo, and the unit of each row's integers."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    weights = p * _finite(norm)[None, :]
    largest = _largest(gl.reduce(weights, 1, _largest), LEAST_WEIGHT)
    n = gl.fma(weights, (LARGEST_WEIGHT / largest)[:, None], ROUNDER + 128.0).to(gl.int32, bitcast=True)
    hi, lo = gl.inline_asm_elementwise(
        PLANES, "=&r,=r,r,r,r,r", [n], dtype=(gl.int8, gl.int8), is_pure=True, pack=4
    )  # fmt: skip
    planes = gl.join(hi, lo).reshape([BLOCK_R // 8, 8, BLOCK_S, 2]).permute([0, 3, 1, 2])
    planes = planes.reshape([2 * BLOCK_R, BLOCK_S])
    planes = gl.convert_layout(planes, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)
    return planes, largest * (1.0 / LARGEST_WEIGHT)


@gluon.jit
def _value_levels(codes, high, words, BITS: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr):
    """The int8 table entries of even and of odd coordinates, [BLOCK_S, pairs] each.

    codes [BLOCK_S, BYTES]; at 3 bits of the low plane, with `high` [BLOCK_S, BYTES / 2] of the high one.
    """
    codes = gl.inline_asm_elementwise(
        TRANSPOSE, "=&r,=&r,=&r,=r,r,r,r,r", [codes], dtype=gl.uint8, is_pure=True, pack=16
    )
    codes = codes.reshape([BLOCK_S // 4, 4, BYTES // 4, 4]).permute([0, 3, 2, 1]).reshape([BLOCK_S, BYTES])
    if BITS == 4:
        even, odd = gl.inline_asm_elementwise(
            LOOKUP_4, CONSTRAINTS_4, [codes, words[0], words[1], words[2], words[3]], dtype=(gl.int8, gl.int8),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        if BITS == 3:
            high, shifted = gl.inline_asm_elementwise(
                TRANSPOSE_HIGH, "=&r,=&r,=r,=r,r,r", [high], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=8
            )
            high = gl.join(high, shifted).reshape([BLOCK_S // 4, 2, 2, BYTES // 4, 2, 2]).permute([0, 2, 4, 3, 1, 5])
            high = gl.convert_layout(high.reshape([BLOCK_S, BYTES]), codes.type.layout, assert_trivial=True)
            a, b, c, d = gl.inline_asm_elementwise(
                LOOKUP_3, CONSTRAINTS_3, [codes, high, words[0], words[1]], dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            a, b, c, d = gl.inline_asm_elementwise(
                LOOKUP_2, CONSTRAINTS_2, [codes, words[0]], dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
                is_pure=True, pack=4,
            )  # fmt: skip
        even, odd = gl.join(a, c).reshape([BLOCK_S, 2 * BYTES]), gl.join(b, d).reshape([BLOCK_S, 2 * BYTES])
    return even, odd


@gluon.jit
def _value_sums(planes, levels, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr):
    """Σ_s n[r, s] · level[s, pair] as float32 [BLOCK_R, BLOCK_P], pair 8·i + g being g·BLOCK_P/8 + i of a position."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    levels = levels.reshape([BLOCK_S, 8, BLOCK_P // 8]).permute([0, 2, 1]).reshape([BLOCK_S, BLOCK_P])
    levels = gl.convert_layout(levels, gl.DotOperandLayout(1, mma, 4), assert_trivial=True)
    return _row_sums(mma_v2(planes, levels, gl.zeros([2 * BLOCK_R, BLOCK_P], gl.int32, mma)), BLOCK_R, BLOCK_P)


@gluon.jit
def _row_sums(acc, BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr):
    """Accumulators [2·BLOCK_R, BLOCK_P] of planes as 256·hi + lo [BLOCK_R, BLOCK_P]."""
    hi, lo = gl.split(acc.reshape([BLOCK_R // 8, 2, 8, BLOCK_P]).permute([0, 2, 3, 1]))
    return (hi * 256 + lo).reshape([BLOCK_R, BLOCK_P]).to(gl.float32)


@gluon.jit
def _attend(
    x, v_codes, v_high, v_norm, v_words, m, total, even, odd,
    V_BITS: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """m, l and out once a block of logits x and its values are taken in."""
    LO: gl.constexpr = gl.SliceLayout(1, even.type.layout)
    peak = gl.maximum(m, gl.max(x, 1))
    decay = gl.exp2(m - peak)
    p = gl.exp2(x - peak[:, None])
    total = gl.fma(total, decay, gl.sum(p, 1))
    planes, unit = _weights(p, v_norm, BLOCK_R, BLOCK_S)
    decay = gl.convert_layout(decay, LO, assert_trivial=True)[:, None]
    unit = gl.convert_layout(unit, LO, assert_trivial=True)[:, None]
    v_even, v_odd = _value_levels(v_codes, v_high, v_words, V_BITS, BLOCK_S, _code_bytes(BLOCK_P, V_BITS))
    even = gl.fma(unit, _value_sums(planes, v_even, BLOCK_R, BLOCK_S, BLOCK_P), even * decay)
    odd = gl.fma(unit, _value_sums(planes, v_odd, BLOCK_R, BLOCK_S, BLOCK_P), odd * decay)
    return peak, total, even, odd


@gluon.jit
def _span(
    length, t, live, T, split, splits, left, right, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, BLOCK_S: gl.constexpr
):
    """This part's positions [start, stop), those that every row sees, and the first that any row sees."""
    earliest = length - T + gl.min(gl.where(live, t, T), 0)
    latest = length - T + gl.max(gl.where(live, t, 0), 0)
    first, stop, all_from, all_to = earliest * 0, length, earliest * 0, length
    if CAUSAL:
        stop, all_to = gl.minimum(stop, latest + 1), gl.minimum(all_to, earliest + 1)
    if WINDOW:
        first, all_from = gl.maximum(earliest - left, 0), latest - left
        stop, all_to = gl.minimum(stop, latest + right + 1), gl.minimum(all_to, earliest + right + 1)
    start = first // BLOCK_S * BLOCK_S
    part = gl.cdiv(gl.cdiv(gl.maximum(stop - start, 0), BLOCK_S), splits) * BLOCK_S
    start += split * part
    return start, gl.minimum(stop, start + part), all_from, all_to, first


@gluon.jit
def _visible(place, position, left, right, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Whether rows that stand at `place` see a position."""
    visible = (position >= 0) & (place >= place)
    if CAUSAL:
        visible &= position <= place
    if WINDOW:
        visible &= (position >= place - left) & (position <= place + right)
    return visible


@gluon.jit
def _store_rows(out_ptr, even, odd, first_row, R, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr):
    """Writes rows of out, whose pairs of coordinates stand as in `_value_sums`."""
    out = gl.join(even, odd).reshape([BLOCK_R, BLOCK_P // 8, 8, 2]).permute([0, 2, 1, 3])
    out = out.reshape([BLOCK_R, 2 * BLOCK_P])
    L: gl.constexpr = out.type.layout
    row = first_row + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, L))[:, None]
    d = gl.arange(0, 2 * BLOCK_P, layout=gl.SliceLayout(0, L))[None, :]
    gl.store(out_ptr + row * D + d, out, mask=(row < R) & (d < D))


@gluon.jit
def attention_kernel(
    q_ptr,  # [B·K, R, D] float32 | bfloat16 | float16
    signs_ptr,  # [D] float32
    k_codes_ptr,  # [B or N, K, S or page, P] uint8
    k_norms_ptr,  # [B or N, K, S or page] float32
    k_table_ptr,  # [5] int32: the levels' bytes, the bits of the table's step
    v_codes_ptr,
    v_norms_ptr,
    v_table_ptr,
    lengths_ptr,  # [B] int32
    pages_ptr,  # [B, M] int32
    out_ptr,  # [B·K, splits, R, D] float32
    ml_ptr,  # [B·K, splits, 2, R] float32
    scale,
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
    K_STRIDE_S: gl.constexpr,
    V_STRIDE_S: gl.constexpr,
    D: gl.constexpr,
    K_BITS: gl.constexpr,
    V_BITS: gl.constexpr,
    PAGE: gl.constexpr,
    CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr,
    SOFT_CAP: gl.constexpr,
    ROTATE: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_S: gl.constexpr,
    STAGES: gl.constexpr,
):
    BLOCK_P: gl.constexpr = _packed_block(D, V_BITS)
    split = gl.program_id(0) % splits
    head = (gl.program_id(0) // splits).to(gl.int64)
    batch, kv_head = head // K, head % K
    first_row = gl.program_id(1) * BLOCK_R

    # What a lane holds of scores (LS), and of outputs.
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    sums, _ = _sums(gl.zeros([2 * BLOCK_R, BLOCK_S], gl.int32, mma), BLOCK_R, BLOCK_S)
    LS: gl.constexpr = sums.type.layout
    even = _row_sums(gl.zeros([2 * BLOCK_R, BLOCK_P], gl.int32, mma), BLOCK_R, BLOCK_P)
    odd = even

    # Asked for before the copies: behind them this would wait for all that the copies fetch.
    length = gl.load(lengths_ptr + batch)
    q, signs = _load_query(q_ptr, signs_ptr, head, first_row, R, D, ROTATE, BLOCK_R, 2 * BLOCK_P)
    k_table, v_table = _load_table(k_table_ptr), _load_table(v_table_ptr)

    # The positions of this part.
    r = first_row + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, LS))
    length = gl.inline_asm_elementwise(LET_NEXT_START, "=r,r", [length], dtype=gl.int32, is_pure=False, pack=1)
    zero = length >> 31  # where it is a length
    length = gl.where((length >= 0) & (length <= S), length, 0)
    start, stop, all_from, all_to, first = _span(
        length, r % T, r < R, T, split, splits, left, right, CAUSAL, WINDOW, BLOCK_S
    )
    place = (length - T + r % T)[:, None]
    LN: gl.constexpr = gl.SliceLayout(0, LS)
    column = gl.arange(0, BLOCK_S, layout=LN)
    if PAGE > 0:
        pages_ptr += batch * M
        batch *= 0
    keys = _stream(
        k_codes_ptr, k_norms_ptr, k_codes_stride_b, k_codes_stride_k, k_norms_stride_b, k_norms_stride_k, batch,
        kv_head, _stage_layout(_code_bytes(BLOCK_P, K_BITS)), STAGES, K_BITS, BLOCK_S, BLOCK_P,
    )  # fmt: skip
    values = _stream(
        v_codes_ptr, v_norms_ptr, v_codes_stride_b, v_codes_stride_k, v_norms_stride_b, v_norms_stride_k, batch,
        kv_head, _values_stage_layout(_code_bytes(BLOCK_P, V_BITS)), STAGES, V_BITS, BLOCK_S, BLOCK_P,
    )  # fmt: skip
    largest = length.to(gl.uint32) * 0  # number of a page
    pages = _pages(start, first, stop, pages_ptr, PAGE, BLOCK_S)
    for i in gl.static_range(STAGES - 1):
        largest = _copies(
            keys, values, i, start + i * BLOCK_S, stop, pages, N, largest,
            PAGE, K_STRIDE_S, V_STRIDE_S, D, K_BITS, V_BITS, BLOCK_S, BLOCK_P,
        )  # fmt: skip
        pages = _pages(start + (i + 1) * BLOCK_S, first, stop, pages_ptr, PAGE, BLOCK_S)

    # The query's fixed point, while the copies are under way.
    scale = scale * (1.0 if SOFT_CAP > 0 else LOG2E)
    q_first, q_second, factor = _query(q, signs, k_table, scale, D, K_BITS, ROTATE, BLOCK_R, BLOCK_S, BLOCK_P)
    k_words, v_words = _words(k_table, zero), _words(v_table, zero)
    m = gl.full([BLOCK_R], LOWEST, gl.float32, gl.SliceLayout(1, LS))
    total = gl.zeros([BLOCK_R], gl.float32, gl.SliceLayout(1, LS))
    for block in range(gl.cdiv(gl.maximum(stop - start, 0), BLOCK_S)):
        s = start + block * BLOCK_S
        k_codes, k_high, k_norm, v_codes, v_high, v_norm, pages, largest = _block(
            keys, values, block, s, first, stop, pages_ptr, pages, N, largest, LN, PAGE, K_STRIDE_S, V_STRIDE_S,
            D, K_BITS, V_BITS, BLOCK_S, BLOCK_P, STAGES,
        )  # fmt: skip
        x = _scores(
            k_codes, k_high, k_norm, k_words, q_first, q_second, factor, K_BITS, SOFT_CAP, BLOCK_R, BLOCK_S, BLOCK_P
        )
        if (s < all_from) | (s + BLOCK_S > all_to):
            position = s + column
            seen = _visible(place, position[None, :], left, right, CAUSAL, WINDOW) & (position < stop)[None, :]
            x = gl.where(seen, x, -float("inf"))
            v_norm = gl.where((position >= first) & (position < stop), v_norm, 0.0)
        m, total, even, odd = _attend(
            x, v_codes, v_high, v_norm, v_words, m, total, even, odd, V_BITS, BLOCK_R, BLOCK_S, BLOCK_P
        )

    if PAGE > 0:
        total = gl.where(largest < N, total, float("nan"))
    at = head * splits + split
    gl.store(ml_ptr + at * 2 * R + r, gl.where(m == LOWEST, -float("inf"), m), mask=r < R)
    gl.store(ml_ptr + (at * 2 + 1) * R + r, total, mask=r < R)
    _store_rows(out_ptr + at * R * D, even, odd, first_row, R, D, BLOCK_R, BLOCK_P)
