"""Attention scores of many query rows from packed keys, in Gluon for Hopper: a product of matrices in two launches.

`queries_kernel` converts each query row once, to hi and lo planes; `scores_kernel` looks a block of keys up once, keeps
it in registers as the left operand of wgmma, and multiplies it by block after block of rows. The same scores, bit for
bit, as `tqcore.kernels.gluon_scores`, which does all in one launch and suits few rows. Of a program's four warps,

    keys     warp w has 32 of 128, lane 4·g + t a quarter of the bytes of keys 4·g to 4·g + 3
    scores   the same keys, against rows t, t + 4, …: hi and lo sums are neighbours among the lane's accumulators,
             four keys are a store of 16 bytes, eight lanes' stores are one line

and every change of layout is a renaming of registers (`assert_trivial`).

Reads P + 4 bytes a key and, from the cache, 2·D + 4 a row for every block of keys; writes 4 bytes a score.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from tqcore import tuning
from tqcore.kernels.gluon_scores import (
    NOT_FINITE,
    _bits,
    _code_bytes,
    _finite,
    _fixed_point,
    _levels,
    _load,
    _multiply,
    _query_layout,
    _query_operands,
)  # fmt: skip

GROUP = gl.constexpr(tuning.ROW_GROUP)  # rows that a program of queries_kernel converts


@gluon.constexpr_function
def _codes_layout(BLOCK_S, BYTES):
    """[BLOCK_S, BYTES]: lane t holds a quarter of the bytes of keys 4·g to 4·g + 3 of its warp's 32."""
    registers = [[0, x] for x in _bits(1, BYTES // 4)] + [[1, 0], [2, 0]] + [[x, 0] for x in _bits(128, BLOCK_S)]
    lanes = [[0, BYTES // 4], [0, BYTES // 2], [4, 0], [8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[32, 0], [64, 0]], [], [BLOCK_S, BYTES])


@gluon.constexpr_function
def _scores_layout(BLOCK_S, BLOCK_R):
    """[BLOCK_S, BLOCK_R]: the same keys, of rows t, t + 4, …"""
    registers = [[1, 0], [2, 0]] + [[0, x] for x in _bits(4, BLOCK_R)] + [[x, 0] for x in _bits(128, BLOCK_S)]
    lanes = [[0, 1], [0, 2], [4, 0], [8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[32, 0], [64, 0]], [], [BLOCK_S, BLOCK_R])


@gluon.jit
def queries_kernel(
    q_ptr,  # [B·K, R, D] float32 | bfloat16 | float16
    table_ptr,  # [4·PLANES + 1] int32: the levels' bytes, the bits of the table's step
    scale,  # float32
    planes_ptr,  # [B·K, groups·GROUP, 2, 2·BLOCK_P] int8: hi, then lo, of each row
    factor_ptr,  # [B·K, groups·GROUP] float32: unit·2^e
    R,
    D: gl.constexpr,
    BITS: gl.constexpr,
    PLANES: gl.constexpr,
    BLOCK_P: gl.constexpr,
):
    groups = gl.cdiv(R, GROUP)
    head, group = (gl.program_id(0) // groups).to(gl.int64), gl.program_id(0) % groups
    LQ: gl.constexpr = _query_layout(GROUP, 2 * BLOCK_P)
    row = group * GROUP + gl.arange(0, GROUP, layout=gl.SliceLayout(1, LQ))
    d = gl.arange(0, 2 * BLOCK_P, layout=gl.SliceLayout(0, LQ))
    live = (row[:, None] < R) & (d[None, :] < D)
    q = gl.load(q_ptr + (head * R + row[:, None]) * D + d[None, :], mask=live, other=0.0).to(gl.float32)
    n, e = _fixed_point(q)

    step = gl.load(table_ptr + 4 * PLANES).to(gl.float32, bitcast=True)
    power = gl.where(e == NOT_FINITE, float("nan"), ((e + 127) << 23).to(gl.float32, bitcast=True))
    gl.store(factor_ptr + head * (groups * GROUP) + row, _multiply(_multiply(scale, step), power))

    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    L: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    first, second = _query_operands(n, GROUP, BLOCK_P, BITS, L)
    i = gl.arange(0, 2 * GROUP, layout=gl.SliceLayout(1, L))[:, None]
    line = (head * groups + group) * 2 * GROUP + i % GROUP * 2 + i // GROUP
    at = planes_ptr + line * 2 * BLOCK_P + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(0, L))[None, :]
    gl.store(at, first)
    gl.store(at + BLOCK_P, second)


@gluon.jit
def _copy(planes_ptr, to, line, lines, LINES: gl.constexpr, BLOCK_P: gl.constexpr):
    """Starts the copy of lines [LINES, 2·BLOCK_P] into shared memory; what lies from `lines` on is undefined there."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [256 // BLOCK_P, BLOCK_P // 8], [4, 1], [1, 0])
    line += gl.arange(0, LINES, layout=gl.SliceLayout(1, L))[:, None]
    byte = gl.arange(0, 2 * BLOCK_P, layout=gl.SliceLayout(0, L))[None, :]
    async_copy.async_copy_global_to_shared(to, planes_ptr + line * 2 * BLOCK_P + byte, mask=line < lines)
    async_copy.commit_group()


@gluon.jit
def _key_operand(
    codes, high, words, mma: gl.constexpr, BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr
):
    """Levels [BLOCK_S, 2·BLOCK_P] as a left operand: what `_levels` returns first, then the other."""
    first, second = _levels(codes, high, words, BITS)
    levels = gl.join(first, second).reshape([BLOCK_S // 128, 4, 8, 2, 2, 4, BLOCK_P // 16, 4, 2])
    levels = levels.permute([0, 3, 1, 4, 2, 8, 6, 5, 7]).reshape([BLOCK_S, 2 * BLOCK_P])
    return gl.convert_layout(levels, gl.DotOperandLayout(0, mma, 4), assert_trivial=True)


@gluon.jit
def _sums(acc, BLOCK_R: gl.constexpr, BLOCK_S: gl.constexpr):
    """Accumulators [BLOCK_S, 2·BLOCK_R] as hi and lo sums [BLOCK_S, BLOCK_R], keys in their order."""
    acc = acc.reshape([BLOCK_S // 128, 2, 4, 2, 8, BLOCK_R, 2]).permute([0, 2, 4, 1, 3, 5, 6])
    hi, lo = gl.split(acc.reshape([BLOCK_S, BLOCK_R, 2]))
    L: gl.constexpr = _scores_layout(BLOCK_S, BLOCK_R)
    return gl.convert_layout(hi, L, assert_trivial=True), gl.convert_layout(lo, L, assert_trivial=True)


@gluon.jit
def scores_kernel(
    planes_ptr,  # [B·K, groups·GROUP, 2, 2·BLOCK_P] int8
    factor_ptr,  # [B·K, groups·GROUP] float32
    codes_ptr,  # [B, K, S, P] uint8
    norms_ptr,  # [B, K, S] float32
    table_ptr,  # [4·PLANES + 1] int32
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
    programs_s = gl.cdiv(S, BLOCK_S)
    head = gl.program_id(0) // programs_s
    batch, kv_head = (head // K).to(gl.int64), (head % K).to(gl.int64)
    start = (gl.program_id(0) % programs_s).to(gl.int64) * BLOCK_S
    count = gl.minimum(S - start, BLOCK_S).to(gl.int32)
    padded = gl.cdiv(R, GROUP) * GROUP

    # The copies of the first rows.
    planes_ptr += head.to(gl.int64) * padded * (4 * BLOCK_P)
    first = gl.program_id(1) * blocks
    L: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * BLOCK_P), 8)
    planes_smem = gl.allocate_shared_memory(gl.int8, [STAGES, 2 * BLOCK_R, 2 * BLOCK_P], L)
    for i in gl.static_range(STAGES - 1):
        _copy(planes_ptr, planes_smem.index(i), (first + i) * 2 * BLOCK_R, 2 * padded, 2 * BLOCK_R, BLOCK_P)

    # The block of keys, as left operands.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_R, 32])
    LS: gl.constexpr = _scores_layout(BLOCK_S, BLOCK_R)
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LK: gl.constexpr = _codes_layout(BLOCK_S, BYTES)
    LH: gl.constexpr = _codes_layout(BLOCK_S, BYTES // 2)
    LN: gl.constexpr = gl.SliceLayout(1, LS)
    codes_ptr += batch * codes_stride_b + kv_head * codes_stride_k + start * CODES_STRIDE_S
    norms_ptr += batch * norms_stride_b + kv_head * norms_stride_k + start
    codes, high, norm = _load(
        codes_ptr, norms_ptr, 0, count, LK, LH, LN, CODES_STRIDE_S, D, BITS, BLOCK_S, BLOCK_P
    )  # fmt: skip
    norm = _finite(norm)
    words = gl.load(table_ptr), gl.load(table_ptr + 1), gl.load(table_ptr + 2), gl.load(table_ptr + 3)
    keys = _key_operand(codes, high, words, mma, BITS, BLOCK_S, BLOCK_P)
    if PLANES == 2:
        words = gl.load(table_ptr + 4), gl.load(table_ptr + 5), gl.load(table_ptr + 6), gl.load(table_ptr + 7)
        low_keys = _key_operand(codes, high, words, mma, BITS, BLOCK_S, BLOCK_P)

    row = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, LS))
    column = gl.arange(0, BLOCK_S, layout=gl.SliceLayout(1, LS))
    factor_ptr += head.to(gl.int64) * padded + row
    out_ptr += head.to(gl.int64) * R * S + start + row[None, :].to(gl.int64) * S + column[:, None]
    zeros = gl.zeros([BLOCK_S, 2 * BLOCK_R], gl.int32, mma)
    for block in range(first, gl.minimum(first + blocks, gl.cdiv(R, BLOCK_R))):
        ahead = block - first + STAGES - 1
        async_copy.wait_group(STAGES - 2)
        _copy(
            planes_ptr, planes_smem.index(ahead % STAGES), (first + ahead) * 2 * BLOCK_R, 2 * padded, 2 * BLOCK_R,
            BLOCK_P,
        )  # fmt: skip
        r = block * BLOCK_R + row
        factor = gl.load(factor_ptr + block * BLOCK_R, mask=r < R, other=0.0)
        fence_async_shared()
        planes = planes_smem.index((block - first) % STAGES).permute((1, 0))
        hi, lo = _sums(warpgroup_mma(keys, planes, zeros, use_acc=False), BLOCK_R, BLOCK_S)
        if PLANES == 1:
            total = (hi * 128 + lo).to(gl.float32)
        else:
            hi_low, lo_low = _sums(warpgroup_mma(low_keys, planes, zeros, use_acc=False), BLOCK_R, BLOCK_S)
            total = hi.to(gl.float32) * 128.0 + (hi_low + lo).to(gl.float32)
            total = total * 128.0 + lo_low.to(gl.float32)
        scores = _multiply(total, _multiply(norm[:, None], factor[None, :]))
        mask = (r[None, :] < R) & (column[:, None] < count)
        # ".cs": scores of many rows do not fit the L2 cache, and must not push the planes out of it.
        gl.store(out_ptr + (block * BLOCK_R).to(gl.int64) * S, scores, mask=mask, cache_modifier=".cs")
