"""Attention scores from packed keys, in Gluon for Hopper: codes go from memory to tensor-core operands in registers.

    score[r, s] = (Σ_d n[r, d] · level[index[s, d]]) · (norm[s] · (unit · 2^e[r]))       q[r] ≈ n[r] · 2^e[r]

Reads P + 4 bytes a key, P = D·BITS/8, once for all R = T·G query rows of a key head, and writes 4·R bytes.
Equals `tqcore.reference.fused_qk_scores` bit for bit. A program is one warp, lane 4·g + t of which holds

    keys     two of sixteen, of each plane bytes t·P/4 to (t+1)·P/4 of its P: what `prmt` returns is the right-hand
             operand of m16n8k32, if the query's columns are permuted alike
    query    row g of eight, the same quarter of its coordinates, as hi and lo planes: operand rows g and g + 8
    scores   row g of eight against keys 4·t to 4·t + 3 of sixteen: hi and lo sums are two accumulators of the lane

so that every change of layout below is a renaming of registers (`assert_trivial`).

Source: the exact integer score of docs/format.md; byte permutes and m16n8k32: PTX ISA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from tqcore import fixed_point
from tqcore.kernels import lookup

CARRY, BIAS = (gl.constexpr(value) for value in fixed_point.exponent_bias(fixed_point.QUERY_LIMIT))
ABS_MASK = gl.constexpr(fixed_point.ABS_MASK)
INFINITY_BITS = gl.constexpr(fixed_point.INFINITY_BITS)
MIN_EXPONENT = gl.constexpr(fixed_point.MIN_EXPONENT)
ROUNDER = gl.constexpr(fixed_point.ROUNDER)
ROUNDER_BITS = gl.constexpr(fixed_point.ROUNDER_BITS)
NOT_FINITE = gl.constexpr(128)  # in place of an exponent

LOOKUP_2, LOOKUP_3, LOOKUP_4 = (gl.constexpr(lookup.as_they_come(bits)) for bits in lookup.BITS)
CONSTRAINTS_2, CONSTRAINTS_3, CONSTRAINTS_4 = (
    gl.constexpr(lookup.constraints(bits, lookup.FIELDS[bits])) for bits in lookup.BITS
)
SHIFT, SHIFT_CONSTRAINTS = gl.constexpr(lookup.SHIFT), gl.constexpr(lookup.SHIFT_CONSTRAINTS)


@gluon.constexpr_function
def _bits(start, stop):
    """The powers of two from start up to stop."""
    return [2**i for i in range(start.bit_length() - 1, stop.bit_length() - 1)]


@gluon.constexpr_function
def _code_bytes(BLOCK_P, BITS):
    """Bytes of codes, or of the low plane, of BLOCK_P pairs of coordinates."""
    return BLOCK_P if BITS == 4 else BLOCK_P // 2


@gluon.constexpr_function
def _codes_layout(BLOCK_S, BYTES):
    """[BLOCK_S, BYTES]: lane t has a quarter of the bytes; of sixteen keys, lane g has 4·(g // 2) + g % 2 + {0, 2}.

    So lane t has keys 4·t to 4·t + 3 of sixteen among its scores: stores of 16 bytes that make up whole sectors.
    """
    registers = [[0, x] for x in _bits(1, BYTES // 4)] + [[2, 0]] + [[x, 0] for x in _bits(16, BLOCK_S)]
    lanes = [[0, BYTES // 4], [0, BYTES // 2], [1, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [BLOCK_S, BYTES])


@gluon.constexpr_function
def _stage_layout(BYTES):
    """[BLOCK_S, BYTES] in shared memory, so that the eight lanes of a phase read eight banks of 16 bytes."""
    return gl.SwizzledSharedLayout(16, 1, BYTES // 16 if BYTES > 64 else 1, [1, 0])


@gluon.constexpr_function
def _query_layout(BLOCK_R, BLOCK_D):
    """[BLOCK_R, BLOCK_D]: lane t holds a quarter of the coordinates, lane g rows g, g + 8, …"""
    registers = [[0, x] for x in _bits(1, BLOCK_D // 4)] + [[x, 0] for x in _bits(8, BLOCK_R)]
    lanes = [[0, BLOCK_D // 4], [0, BLOCK_D // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [BLOCK_R, BLOCK_D])


@gluon.jit
def _levels(codes, high, words, BITS: gl.constexpr):
    """The int8 table entries of the coordinates as two operands [keys, BLOCK_P]; `_query_operands` match them.

    codes [keys, bytes]; at 3 bits of the low plane, with `high` [keys, bytes / 2] of the high one.
    """
    if BITS == 4:
        first, second = gl.inline_asm_elementwise(
            LOOKUP_4, CONSTRAINTS_4, [codes, words[0], words[1], words[2], words[3]], dtype=(gl.int8, gl.int8),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        if BITS == 3:
            shifted = gl.inline_asm_elementwise(SHIFT, SHIFT_CONSTRAINTS, [high], dtype=gl.uint8, is_pure=True, pack=4)
            high = gl.join(high, shifted).reshape(codes.shape)
            high = gl.convert_layout(high, codes.type.layout, assert_trivial=True)
            a, b, c, d = gl.inline_asm_elementwise(
                LOOKUP_3, CONSTRAINTS_3, [codes, high, words[0], words[1]], dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
                is_pure=True, pack=4,
            )  # fmt: skip
        else:
            a, b, c, d = gl.inline_asm_elementwise(
                LOOKUP_2, CONSTRAINTS_2, [codes, words[0]], dtype=(gl.int8, gl.int8, gl.int8, gl.int8),
                is_pure=True, pack=4,
            )  # fmt: skip
        first, second = _in_turn(a, b), _in_turn(c, d)
    return first, second


@gluon.jit
def _in_turn(a, b):
    """Words of four bytes of a [keys, bytes] and of b, in turn."""
    KEYS: gl.constexpr = a.shape[0]
    BYTES: gl.constexpr = a.shape[1]
    words = gl.join(a, b).reshape([KEYS, BYTES // 4, 4, 2]).permute([0, 1, 3, 2])
    return words.reshape([KEYS, 2 * BYTES])


@gluon.jit
def _multiply(a, b):
    """a · b rounded once, never fused with an addition, subnormals as zeros."""
    return gl.inline_asm_elementwise(
        "mul.rn.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _finite(x):
    """x, or NaN where it is not finite: x·0 + x."""
    return gl.inline_asm_elementwise(
        "fma.rn.ftz.f32 $0, $1, 0f00000000, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _unknown(i):
    """i, which Triton takes for no constant: it cannot compile copies in branches that it knows to be dead."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [i], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _fixed_point(q):
    """Rows of floats as integers n times 2^e; e = NOT_FINITE for a row with NaN or infinity."""
    bits = gl.minimum(gl.max(q.to(gl.int32, bitcast=True) & ABS_MASK, 1), INFINITY_BITS)
    e = gl.maximum(((bits + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    inverse = ((127 - e) << 23).to(gl.float32, bitcast=True)[:, None]
    n = (q * inverse + ROUNDER).to(gl.int32, bitcast=True) - ROUNDER_BITS
    return n, gl.where(bits < INFINITY_BITS, e, NOT_FINITE)


@gluon.jit
def _query_operands(n, BLOCK_R: gl.constexpr, BLOCK_P: gl.constexpr, BITS: gl.constexpr, L: gl.constexpr):
    """n = 128·hi + lo as two left operands [2·BLOCK_R, BLOCK_P] int8 whose columns match those of `_levels`.

    Eight rows of hi, then the eight of lo, in turn. A lane's quarter of the coordinates is words of eight. At 4 bits
    they are [half, pair, parity]; `_levels` returns a half of each word, in every pair the odd coordinate first. At 2
    and 3 bits they are [byte, pair, parity]; it returns the even ones, then the odd, in every byte the last pair first.
    """
    hi = (n + 64) >> 7
    lo = n - 128 * hi
    planes = gl.join(hi.to(gl.int8), lo.to(gl.int8))
    planes = planes.reshape([BLOCK_R // 8, 8, 4, BLOCK_P // 16, 2, 2, 2, 2])
    planes = planes.permute([0, 7, 1, 3, 2, 5, 4, 6]) if BITS == 4 else planes.permute([0, 7, 1, 3, 2, 4, 6, 5])
    front, back = gl.split(planes)
    first, second = gl.split(gl.join(back, front).permute([0, 1, 2, 3, 4, 5, 7, 6]))
    first, second = first.reshape([2 * BLOCK_R, BLOCK_P]), second.reshape([2 * BLOCK_R, BLOCK_P])
    return gl.convert_layout(first, L, assert_trivial=True), gl.convert_layout(second, L, assert_trivial=True)


@gluon.jit
def _key_operand(levels, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr, L: gl.constexpr):
    """Levels [BLOCK_S, BLOCK_P] as a right operand [BLOCK_P, BLOCK_S]."""
    levels = levels.reshape([BLOCK_S // 16, 4, 2, 2, 4, BLOCK_P // 16, 4]).permute([0, 2, 1, 3, 5, 4, 6])
    return gl.convert_layout(levels.reshape([BLOCK_S, BLOCK_P]).permute([1, 0]), L, assert_trivial=True)


@gluon.jit
def _sums(acc, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr):
    """Accumulators [2·BLOCK_R, BLOCK_S] as hi and lo sums [BLOCK_R, BLOCK_S], keys in their order."""
    acc = acc.reshape([BLOCK_R // 8, 2, 8, BLOCK_S // 16, 2, 4, 2]).permute([0, 2, 3, 5, 4, 6, 1])
    hi, lo = gl.split(acc)
    return hi.reshape([BLOCK_R, BLOCK_S]), lo.reshape([BLOCK_R, BLOCK_S])


@gluon.jit
def _products(
    codes, high, words, q_first, q_second,
    BITS: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """⟨level, hi⟩ and ⟨level, lo⟩ of every row and key, [BLOCK_R, BLOCK_S] int32 each."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    L: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    first, second = _levels(codes, high, words, BITS)
    acc = gl.zeros([2 * BLOCK_R, BLOCK_S], gl.int32, mma)
    acc = mma_v2(q_first, _key_operand(first, BLOCK_S, BLOCK_P, L), acc)
    acc = mma_v2(q_second, _key_operand(second, BLOCK_S, BLOCK_P, L), acc)
    return _sums(acc, BLOCK_R, BLOCK_S)


@gluon.jit
def _scores(
    codes, high, norm, words, low_words, q_first, q_second, factor,
    BITS: gl.constexpr, PLANES: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_R, BLOCK_S] of a block of keys."""
    hi, lo = _products(codes, high, words, q_first, q_second, BITS, BLOCK_R, BLOCK_S, BLOCK_P)
    if PLANES == 1:
        total = (hi * 128 + lo).to(gl.float32)
    else:
        hi_low, lo_low = _products(codes, high, low_words, q_first, q_second, BITS, BLOCK_R, BLOCK_S, BLOCK_P)
        total = hi.to(gl.float32) * 128.0 + (hi_low + lo).to(gl.float32)
        total = total * 128.0 + lo_low.to(gl.float32)
    return _multiply(total, _multiply(_finite(norm)[None, :], factor[:, None]))


@gluon.jit
def _load(
    codes_ptr, norms_ptr, s, count, LK: gl.constexpr, LH: gl.constexpr, LN: gl.constexpr,
    CODES_STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Codes [BLOCK_S, bytes], high plane and norms [BLOCK_S] of the keys from s on, zeros from `count` on."""
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    codes = _load_bytes(codes_ptr, s, count, LK, LIVE, CODES_STRIDE_S, BLOCK_S, BYTES)
    high = codes
    if BITS == 3:
        high = _load_bytes(codes_ptr + LIVE, s, count, LH, D // 8, CODES_STRIDE_S, BLOCK_S, BYTES // 2)
    column = s + gl.arange(0, BLOCK_S, layout=LN)
    return codes, high, gl.load(norms_ptr + column, mask=column < count, other=0.0)


@gluon.jit
def _load_bytes(
    ptr, s, count, L: gl.constexpr, LIVE: gl.constexpr,
    CODES_STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    key = s + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, L))[:, None]
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    return gl.load(ptr + key * CODES_STRIDE_S + p, mask=(key < count) & (p < LIVE), other=0)


@gluon.jit
def _copy(
    codes_ptr, norms_ptr, codes_to, high_to, norms_to, s, count,
    CODES_STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Starts the copy of the same into shared memory; what lies from `count` on is undefined there."""
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    WHOLE: gl.constexpr = 2 * BLOCK_P == D
    low, key, p = _plane(codes_ptr, s, CODES_STRIDE_S, BLOCK_S, BYTES)
    if BITS == 3:
        high, high_key, high_p = _plane(codes_ptr + LIVE, s, CODES_STRIDE_S, BLOCK_S, BYTES // 2)
    column = s + gl.arange(0, BLOCK_S, layout=gl.BlockedLayout([BLOCK_S // 32], [32], [1], [0]))
    norms_ptr += column
    if s + BLOCK_S <= count:
        _copy_plane(codes_to, low, key, p, count, LIVE, WHOLE)
        if BITS == 3:
            _copy_plane(high_to, high, high_key, high_p, count, D // 8, WHOLE)
        async_copy.async_copy_global_to_shared(norms_to, norms_ptr)
    else:
        _copy_plane(codes_to, low, key, p, count, LIVE, False)
        if BITS == 3:
            _copy_plane(high_to, high, high_key, high_p, count, D // 8, False)
        async_copy.async_copy_global_to_shared(norms_to, norms_ptr, mask=column < count)


@gluon.jit
def _plane(ptr, s, CODES_STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr):
    """Where the bytes [BLOCK_S, BYTES] of a plane are, their keys and places."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BYTES, BYTES // 16], [1, 1], [1, 0])
    key = s + gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, L))[:, None]
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    return ptr + (key * CODES_STRIDE_S + p), key, p


@gluon.jit
def _copy_plane(to, ptr, key, p, count, LIVE: gl.constexpr, WHOLE: gl.constexpr):
    """Starts the copy of the `LIVE` bytes of the keys below `count`, which are all where WHOLE."""
    if WHOLE:
        async_copy.async_copy_global_to_shared(to, ptr)
    else:
        async_copy.async_copy_global_to_shared(to, ptr, mask=(p < LIVE) & (key < count))


@gluon.jit
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
    CODES_STRIDE_S: gl.constexpr,
    D: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    BLOCK_R: gl.constexpr,
    BLOCK_S: gl.constexpr,
    BLOCK_P: gl.constexpr,
    STAGES: gl.constexpr,
):
    programs_s = gl.cdiv(S, blocks * BLOCK_S)  # in one axis with the heads: CUDA's others end at 65535
    head = gl.program_id(0) // programs_s
    batch, kv_head = (head // K).to(gl.int64), (head % K).to(gl.int64)

    # The query rows, as hi and lo planes.
    LQ: gl.constexpr = _query_layout(BLOCK_R, 2 * BLOCK_P)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    row = gl.program_id(1) * BLOCK_R + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, LQ))
    d = gl.arange(0, 2 * BLOCK_P, layout=gl.SliceLayout(0, LQ))
    q_row_ptr = q_ptr + (head.to(gl.int64) * R + row[:, None]) * D
    q = gl.load(q_row_ptr + d[None, :], mask=(row[:, None] < R) & (d[None, :] < D), other=0.0).to(gl.float32)
    n, e = _fixed_point(q)
    q_first, q_second = _query_operands(n, BLOCK_R, BLOCK_P, BITS, gl.DotOperandLayout(0, mma, 4))

    # unit · 2^e of each row, where the scores of a lane are.
    words = gl.load(table_ptr), gl.load(table_ptr + 1), gl.load(table_ptr + 2), gl.load(table_ptr + 3)
    low_words = words
    if PLANES == 2:
        low_words = gl.load(table_ptr + 4), gl.load(table_ptr + 5), gl.load(table_ptr + 6), gl.load(table_ptr + 7)
    step = gl.load(table_ptr + 4 * PLANES).to(gl.float32, bitcast=True)
    power = gl.where(e == NOT_FINITE, float("nan"), ((e + 127) << 23).to(gl.float32, bitcast=True))
    sums, _ = _sums(gl.zeros([2 * BLOCK_R, BLOCK_S], gl.int32, mma), BLOCK_R, BLOCK_S)
    LS: gl.constexpr = sums.type.layout
    factor = gl.convert_layout(_multiply(_multiply(scale, step), power), gl.SliceLayout(1, LS))

    # This program's keys: codes_ptr, norms_ptr and out_ptr point at the first of `count`.
    start = gl.program_id(0) % programs_s
    if blocks * BLOCK_S >= S:
        start = _unknown(start)
    start = start.to(gl.int64) * blocks * BLOCK_S
    count = gl.minimum(S - start, blocks * BLOCK_S).to(gl.int32)
    codes_ptr += batch * codes_stride_b + kv_head * codes_stride_k + start * CODES_STRIDE_S
    norms_ptr += batch * norms_stride_b + kv_head * norms_stride_k + start
    r = gl.program_id(1) * BLOCK_R + gl.arange(0, BLOCK_R, layout=gl.SliceLayout(1, LS))[:, None]
    column = gl.arange(0, BLOCK_S, layout=gl.SliceLayout(0, LS))[None, :]
    out_ptr += head.to(gl.int64) * R * S + start + r.to(gl.int64) * S + column

    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LK: gl.constexpr = _codes_layout(BLOCK_S, BYTES)
    LH: gl.constexpr = _codes_layout(BLOCK_S, BYTES // 2)
    LN: gl.constexpr = gl.SliceLayout(0, LS)
    if STAGES > 1:
        codes_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_S, BYTES], _stage_layout(BYTES))
        high_smem = codes_smem
        if BITS == 3:
            high_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_S, BYTES // 2], _stage_layout(BYTES // 2))
        norms_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_S], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        for first in gl.static_range(STAGES - 1):
            _copy(
                codes_ptr, norms_ptr, codes_smem.index(first), high_smem.index(first), norms_smem.index(first),
                first * BLOCK_S, count, CODES_STRIDE_S, D, BITS, BLOCK_S, BLOCK_P,
            )  # fmt: skip
            async_copy.commit_group()
    for block in range(gl.cdiv(count, BLOCK_S)):
        s = block * BLOCK_S
        if STAGES > 1:
            stage, ahead = block % STAGES, block + STAGES - 1
            async_copy.wait_group(STAGES - 2)
            codes, norm = codes_smem.index(stage).load(LK), norms_smem.index(stage).load(LN)
            high = codes
            if BITS == 3:
                high = high_smem.index(stage).load(LH)
            if ahead * BLOCK_S < count:
                to = ahead % STAGES
                _copy(
                    codes_ptr, norms_ptr, codes_smem.index(to), high_smem.index(to), norms_smem.index(to),
                    ahead * BLOCK_S, count, CODES_STRIDE_S, D, BITS, BLOCK_S, BLOCK_P,
                )  # fmt: skip
            async_copy.commit_group()
        else:
            codes, high, norm = _load(
                codes_ptr, norms_ptr, s, count, LK, LH, LN, CODES_STRIDE_S, D, BITS, BLOCK_S, BLOCK_P
            )
        scores = _scores(
            codes, high, norm, words, low_words, q_first, q_second, factor, BITS, PLANES, BLOCK_R, BLOCK_S, BLOCK_P
        )
        if s + BLOCK_S <= count:
            gl.store(out_ptr + s, scores, mask=r < R)
        else:
            gl.store(out_ptr + s, scores, mask=(r < R) & (s + column < count))
