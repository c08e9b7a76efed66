"""How the Gluon attention kernel reads a cache: pages, asynchronous copies into stages of shared memory, registers.

A *stream* is that of keys or of values: pointers to codes and norms, their strides between pages (or sequences), and,
where copies are asynchronous, the shared memory of codes, of the high plane of 3 bits, and of norms.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcore.kernels.gluon_scores import _bits, _code_bytes, _codes_layout, _copy_plane


@gluon.constexpr_function
def _values_layout(BLOCK_S, BYTES, WORD=4):
    """[BLOCK_S, BYTES]: lane t has positions 4·t to 4·t + 3 of sixteen, lane g an eighth of the bytes, WORD in turn."""
    registers = [[0, x] for x in _bits(1, WORD)] + [[1, 0], [2, 0]]
    registers += [[0, x] for x in _bits(WORD, BYTES // 8)] + [[x, 0] for x in _bits(16, BLOCK_S)]
    lanes = [[4, 0], [8, 0], [0, BYTES // 8], [0, BYTES // 4], [0, BYTES // 2]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [BLOCK_S, BYTES])


@gluon.constexpr_function
def _values_stage_layout(BYTES):
    """[BLOCK_S, BYTES] in shared memory, so that few lanes of a phase read one bank."""
    return gl.SwizzledSharedLayout(16, 2, BYTES // 16, [1, 0])


@gluon.constexpr_function
def _copy_layout(BYTES):
    """[BLOCK_S, BYTES]: 16 bytes a lane, rows side by side."""
    return gl.BlockedLayout([1, 16], [512 // BYTES, BYTES // 16], [1, 1], [1, 0])


@gluon.constexpr_function
def _norms_copy_layout(BLOCK_S):
    return gl.BlockedLayout([BLOCK_S // 32], [32], [1], [0])


@gluon.jit
def _stream(
    codes_ptr, norms_ptr, codes_stride_b, codes_stride_k, norms_stride_b, norms_stride_k, batch, kv_head,
    L: gl.constexpr, STAGES: gl.constexpr, BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """The stream of a head; L is the layout of codes in shared memory."""
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
    codes_ptr += batch * codes_stride_b + kv_head * codes_stride_k
    norms_ptr += batch * norms_stride_b + kv_head * norms_stride_k
    stream = codes_ptr, norms_ptr, codes_stride_b, norms_stride_b
    if STAGES > 1:
        codes_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_S, BYTES], L)
        high_smem = codes_smem
        if BITS == 3:
            high_smem = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_S, BYTES // 2], plain)
        norms_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_S], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        stream = codes_ptr, norms_ptr, codes_stride_b, norms_stride_b, codes_smem, high_smem, norms_smem
    return stream


@gluon.jit
def _block(
    keys, values, block, s, first, stop, pages_ptr, N, missing, LN: gl.constexpr,
    PAGE: gl.constexpr, K_STRIDE_S: gl.constexpr, V_STRIDE_S: gl.constexpr, D: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Codes, high planes and norms of the block at s, in registers, while the copy of a later one is under way."""
    K_BYTES: gl.constexpr = _code_bytes(BLOCK_P, K_BITS)
    V_BYTES: gl.constexpr = _code_bytes(BLOCK_P, V_BITS)
    LK: gl.constexpr = _codes_layout(BLOCK_S, K_BYTES)
    LKH: gl.constexpr = _codes_layout(BLOCK_S, K_BYTES // 2)
    LV: gl.constexpr = _values_layout(BLOCK_S, V_BYTES)
    LVH: gl.constexpr = _values_layout(BLOCK_S, V_BYTES // 2, 2)
    if STAGES > 1:
        async_copy.wait_group(STAGES - 2)
        missing = _copies(
            keys, values, (block + STAGES - 1) % STAGES, s + (STAGES - 1) * BLOCK_S, first, stop, pages_ptr, N, missing,
            PAGE, K_STRIDE_S, V_STRIDE_S, D, K_BITS, V_BITS, BLOCK_S, BLOCK_P,
        )  # fmt: skip
        k_codes, k_high, k_norm = _staged(keys, block % STAGES, LK, LKH, LN, K_BITS)
        v_codes, v_high, v_norm = _staged(values, block % STAGES, LV, LVH, LN, V_BITS)
    else:
        k_codes, k_high, k_norm, exists = _load(
            keys, s, first, stop, pages_ptr, N, LK, LKH, LN, PAGE, K_STRIDE_S, D, K_BITS, BLOCK_S, BLOCK_P
        )
        v_codes, v_high, v_norm, exists = _load(
            values, s, first, stop, pages_ptr, N, LV, LVH, LN, PAGE, V_STRIDE_S, D, V_BITS, BLOCK_S, BLOCK_P
        )
        missing |= gl.where(exists, 0, 1)
    return k_codes, k_high, k_norm, v_codes, v_high, v_norm, missing


@gluon.jit
def _pages(
    s, first, stop, pages_ptr, N, L: gl.constexpr, PAGE: gl.constexpr, BLOCK_S: gl.constexpr,
):  # fmt: skip
    """The page of each position of a block, in layout L, and whether it exists; 0 where it does not, or is not seen."""
    if PAGE == 0:
        page = gl.zeros([BLOCK_S], gl.int32, L)
        exists = page == 0
    elif PAGE % BLOCK_S == 0:
        page = gl.zeros([BLOCK_S], gl.int32, L) + gl.load(pages_ptr + s // PAGE, mask=s < stop, other=0)
        exists = (page >= 0) & (page < N)
    elif BLOCK_S % PAGE == 0:
        row = gl.arange(0, BLOCK_S, layout=L).reshape([BLOCK_S // PAGE, PAGE])
        LP: gl.constexpr = gl.SliceLayout(1, row.type.layout)
        start = s + PAGE * gl.arange(0, BLOCK_S // PAGE, layout=LP)
        seen = (start + PAGE > first) & (start < stop)
        page = gl.load(pages_ptr + start // PAGE, mask=seen, other=0)[:, None] + row * 0
        page = gl.convert_layout(page.reshape([BLOCK_S]), L, assert_trivial=True)
        exists = (page >= 0) & (page < N)
    else:
        position = s + gl.arange(0, BLOCK_S, layout=L)
        page = gl.load(pages_ptr + position // PAGE, mask=(position >= first) & (position < stop), other=0)
        exists = (page >= 0) & (page < N)
    return gl.where(exists, page, 0), exists


@gluon.jit
def _places(s, page, stride_b, L: gl.constexpr, PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr):
    """Offsets of a block's positions in an array with that stride between pages."""
    row = gl.arange(0, BLOCK_S, layout=L)
    if PAGE == 0:
        at = s.to(gl.int64) * STRIDE_S + row * STRIDE_S
    elif PAGE % BLOCK_S == 0:
        at = page.to(gl.int64) * stride_b + (s % PAGE) * STRIDE_S + row * STRIDE_S
    elif BLOCK_S % PAGE == 0:
        at = page.to(gl.int64) * stride_b + row % PAGE * STRIDE_S
    else:
        at = page.to(gl.int64) * stride_b + (s + row) % PAGE * STRIDE_S
    return at


@gluon.jit
def _copies(
    keys, values, to, s, first, stop, pages_ptr, N, missing,
    PAGE: gl.constexpr, K_STRIDE_S: gl.constexpr, V_STRIDE_S: gl.constexpr, D: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Starts the copy of the block at s into stage `to`, if it is one; `missing` notes pages that do not exist."""
    if s < stop:
        LN: gl.constexpr = _norms_copy_layout(BLOCK_S)
        page, exists = _pages(s, first, stop, pages_ptr, N, LN, PAGE, BLOCK_S)
        _copy(keys, to, s, page, first, stop, pages_ptr, N, PAGE, K_STRIDE_S, D, K_BITS, BLOCK_S, BLOCK_P)
        _copy(values, to, s, page, first, stop, pages_ptr, N, PAGE, V_STRIDE_S, D, V_BITS, BLOCK_S, BLOCK_P)
        missing |= gl.where(exists, 0, 1)
    async_copy.commit_group()
    return missing


@gluon.jit
def _copy(
    stream, to, s, page, first, stop, pages_ptr, N,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """The same of one stream; what lies from `stop` on is undefined there."""
    codes_ptr, norms_ptr, codes_stride_b, norms_stride_b, codes_smem, high_smem, norms_smem = stream
    LN: gl.constexpr = _norms_copy_layout(BLOCK_S)
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    WHOLE: gl.constexpr = 2 * BLOCK_P == D
    norms_ptr += _places(s, page, norms_stride_b, LN, PAGE, 1, BLOCK_S)
    low, key, p = _plane(codes_ptr, s, first, stop, pages_ptr, N, codes_stride_b, PAGE, STRIDE_S, BLOCK_S, BYTES)
    if BITS == 3:
        high, high_key, high_p = _plane(
            codes_ptr + LIVE, s, first, stop, pages_ptr, N, codes_stride_b, PAGE, STRIDE_S, BLOCK_S, BYTES // 2
        )
    if s + BLOCK_S <= stop:
        _copy_plane(codes_smem.index(to), low, key, p, stop, LIVE, WHOLE)
        if BITS == 3:
            _copy_plane(high_smem.index(to), high, high_key, high_p, stop, D // 8, WHOLE)
        async_copy.async_copy_global_to_shared(norms_smem.index(to), norms_ptr)
    else:
        _copy_plane(codes_smem.index(to), low, key, p, stop, LIVE, False)
        if BITS == 3:
            _copy_plane(high_smem.index(to), high, high_key, high_p, stop, D // 8, False)
        inside = s + gl.arange(0, BLOCK_S, layout=LN) < stop
        async_copy.async_copy_global_to_shared(norms_smem.index(to), norms_ptr, mask=inside)


@gluon.jit
def _plane(
    ptr, s, first, stop, pages_ptr, N, stride_b,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """Where the bytes [BLOCK_S, BYTES] of a plane are, their positions and places."""
    L: gl.constexpr = _copy_layout(BYTES)
    LR: gl.constexpr = gl.SliceLayout(1, L)
    page, _ = _pages(s, first, stop, pages_ptr, N, LR, PAGE, BLOCK_S)
    at = _places(s, page, stride_b, LR, PAGE, STRIDE_S, BLOCK_S)
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    return ptr + (at[:, None] + p), (s + gl.arange(0, BLOCK_S, layout=LR))[:, None], p


@gluon.jit
def _staged(stream, stage, L: gl.constexpr, LH: gl.constexpr, LN: gl.constexpr, BITS: gl.constexpr):
    """Codes, high plane and norms of a block that has arrived."""
    _, _, _, _, codes_smem, high_smem, norms_smem = stream
    codes = codes_smem.index(stage).load(L)
    high = codes
    if BITS == 3:
        high = high_smem.index(stage).load(LH)
    return codes, high, norms_smem.index(stage).load(LN)


@gluon.jit
def _load(
    stream, s, first, stop, pages_ptr, N, L: gl.constexpr, LH: gl.constexpr, LN: gl.constexpr,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """The same without shared memory, zeros from `stop` on, and whether the positions' pages exist."""
    codes_ptr, norms_ptr, codes_stride_b, norms_stride_b = stream
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    codes = _load_bytes(
        codes_ptr, s, first, stop, pages_ptr, N, codes_stride_b, L, LIVE, PAGE, STRIDE_S, BLOCK_S, BYTES
    )
    high = codes
    if BITS == 3:
        high = _load_bytes(
            codes_ptr + LIVE, s, first, stop, pages_ptr, N, codes_stride_b, LH, D // 8, PAGE, STRIDE_S, BLOCK_S,
            BYTES // 2,
        )  # fmt: skip
    page, exists = _pages(s, first, stop, pages_ptr, N, LN, PAGE, BLOCK_S)
    norms_ptr += _places(s, page, norms_stride_b, LN, PAGE, 1, BLOCK_S)
    return codes, high, gl.load(norms_ptr, mask=s + gl.arange(0, BLOCK_S, layout=LN) < stop, other=0.0), exists


@gluon.jit
def _load_bytes(
    ptr, s, first, stop, pages_ptr, N, stride_b, L: gl.constexpr, LIVE: gl.constexpr,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    LR: gl.constexpr = gl.SliceLayout(1, L)
    page, _ = _pages(s, first, stop, pages_ptr, N, LR, PAGE, BLOCK_S)
    at = _places(s, page, stride_b, LR, PAGE, STRIDE_S, BLOCK_S)
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    inside = (s + gl.arange(0, BLOCK_S, layout=LR) < stop)[:, None] & (p < LIVE)
    return gl.load(ptr + (at[:, None] + p), mask=inside, other=0)
