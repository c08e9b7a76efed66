"""How the Gluon attention kernel reads a cache: pages, asynchronous copies into stages of shared memory, registers.

A *stream* is that of keys or of values: pointers to codes and norms, their strides between pages (or sequences), and,
where copies are asynchronous, the shared memory of codes, of the high plane of 3 bits, and of norms.
"""

import math

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
    keys, values, block, s, first, stop, pages_ptr, pages, N, largest, LN: gl.constexpr,
    PAGE: gl.constexpr, K_STRIDE_S: gl.constexpr, V_STRIDE_S: gl.constexpr, D: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Codes, high planes and norms of the block at s, in registers, while the copy of a later one is under way.

    `pages` are of that later block when given, and of the one behind it when returned: asked for as early as this, none
    is waited for.
    """
    K_BYTES: gl.constexpr = _code_bytes(BLOCK_P, K_BITS)
    V_BYTES: gl.constexpr = _code_bytes(BLOCK_P, V_BITS)
    LK: gl.constexpr = _codes_layout(BLOCK_S, K_BYTES)
    LKH: gl.constexpr = _codes_layout(BLOCK_S, K_BYTES // 2)
    LV: gl.constexpr = _values_layout(BLOCK_S, V_BYTES)
    LVH: gl.constexpr = _values_layout(BLOCK_S, V_BYTES // 2, 2)
    if STAGES > 1:
        async_copy.wait_group(STAGES - 2)
        largest = _copies(
            keys, values, (block + STAGES - 1) % STAGES, s + (STAGES - 1) * BLOCK_S, stop, pages, N, largest,
            PAGE, K_STRIDE_S, V_STRIDE_S, D, K_BITS, V_BITS, BLOCK_S, BLOCK_P,
        )  # fmt: skip
        pages = _pages(s + STAGES * BLOCK_S, first, stop, pages_ptr, PAGE, BLOCK_S)
        k_codes, k_high, k_norm = _staged(keys, block % STAGES, LK, LKH, LN, K_BITS)
        v_codes, v_high, v_norm = _staged(values, block % STAGES, LV, LVH, LN, V_BITS)
    else:
        pages, largest = _existing(pages, N, largest)
        k_codes, k_high, k_norm = _load(
            keys, s, stop, pages, LK, LKH, LN, PAGE, K_STRIDE_S, D, K_BITS, BLOCK_S, BLOCK_P
        )
        v_codes, v_high, v_norm = _load(
            values, s, stop, pages, LV, LVH, LN, PAGE, V_STRIDE_S, D, V_BITS, BLOCK_S, BLOCK_P
        )
        pages = _pages(s + BLOCK_S, first, stop, pages_ptr, PAGE, BLOCK_S)
    return k_codes, k_high, k_norm, v_codes, v_high, v_norm, pages, largest


@gluon.constexpr_function
def _pages_of(PAGE, BLOCK_S):
    """The most pages on which a block lies that starts at a multiple of BLOCK_S."""
    return (PAGE - math.gcd(PAGE, BLOCK_S) + BLOCK_S - 1) // PAGE + 1 if PAGE else 0


@gluon.jit
def _pages(s, first, stop, pages_ptr, PAGE: gl.constexpr, BLOCK_S: gl.constexpr):
    """What the table says of the pages of the block at s, as uint32; 0 for a page of which no position is seen."""
    pages = ()
    for i in gl.static_range(_pages_of(PAGE, BLOCK_S)):
        start = s // PAGE * PAGE + i * PAGE
        page = gl.load(pages_ptr + s // PAGE + i, mask=(start + PAGE > first) & (start < stop), other=0)
        pages += (page.to(gl.uint32, bitcast=True),)
    return pages


@gluon.jit
def _existing(pages, N, largest):
    """The same where a page exists, else one that does; and the largest given so far: if it is below N, all exist."""
    readable = ()
    for i in gl.static_range(len(pages)):
        largest = gl.maximum(largest, pages[i])
        readable += (gl.minimum(pages[i], N - 1),)
    return readable, largest


@gluon.jit
def _rows(ptr, s, pages, stride_b, L: gl.constexpr, PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr):
    """Pointers and offsets, whose sums are where a block's positions are in an array with that stride between pages."""
    row = gl.arange(0, BLOCK_S, layout=L)
    if PAGE == 0:
        ptr += s.to(gl.int64) * STRIDE_S + gl.zeros([BLOCK_S], gl.int64, L)
    else:
        if PAGE % BLOCK_S == 0:
            ptr += s // BLOCK_S % (PAGE // BLOCK_S) * BLOCK_S * STRIDE_S
        elif BLOCK_S % PAGE > 0:
            row += s % PAGE
        page = pages[0] + gl.zeros([BLOCK_S], gl.uint32, L)
        for i in gl.static_range(1, len(pages)):
            page = gl.where(row < i * PAGE, page, pages[i])
        # A stride of 32 bits as uint32, so that this is one multiplication of 32 by 32 bits.
        ptr += (page.to(gl.uint64) * (page * 0 + stride_b).to(gl.uint64)).to(gl.int64)
        row = row % PAGE
    return ptr, row * STRIDE_S


@gluon.jit
def _copies(
    keys, values, to, s, stop, pages, N, largest,
    PAGE: gl.constexpr, K_STRIDE_S: gl.constexpr, V_STRIDE_S: gl.constexpr, D: gl.constexpr,
    K_BITS: gl.constexpr, V_BITS: gl.constexpr, BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """Starts the copy of the block at s into stage `to`, if it is one; what lies from `stop` on is undefined there."""
    if s < stop:
        pages, largest = _existing(pages, N, largest)
        if PAGE > 0 or s + BLOCK_S <= stop:  # what is behind `stop` can be read of a page
            _copy(keys, to, s, stop, pages, PAGE, K_STRIDE_S, D, K_BITS, BLOCK_S, BLOCK_P, True)
            _copy(values, to, s, stop, pages, PAGE, V_STRIDE_S, D, V_BITS, BLOCK_S, BLOCK_P, True)
        else:
            _copy(keys, to, s, stop, pages, PAGE, K_STRIDE_S, D, K_BITS, BLOCK_S, BLOCK_P, False)
            _copy(values, to, s, stop, pages, PAGE, V_STRIDE_S, D, V_BITS, BLOCK_S, BLOCK_P, False)
    async_copy.commit_group()
    return largest


@gluon.jit
def _copy(
    stream, to, s, stop, pages,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """The same of one stream, all of whose positions can be read if WHOLE."""
    codes_ptr, norms_ptr, codes_stride_b, norms_stride_b, codes_smem, high_smem, norms_smem = stream
    LN: gl.constexpr = _norms_copy_layout(BLOCK_S)
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    ALL: gl.constexpr = WHOLE and 2 * BLOCK_P == D
    ptr, key, p = _plane(codes_ptr, s, pages, codes_stride_b, PAGE, STRIDE_S, BLOCK_S, BYTES)
    _copy_plane(codes_smem.index(to), ptr, key, p, stop, LIVE, ALL)
    if BITS == 3:
        ptr, key, p = _plane(codes_ptr + LIVE, s, pages, codes_stride_b, PAGE, STRIDE_S, BLOCK_S, BYTES // 2)
        _copy_plane(high_smem.index(to), ptr, key, p, stop, D // 8, ALL)
    norms_ptr, at = _rows(norms_ptr, s, pages, norms_stride_b, LN, PAGE, 1, BLOCK_S)
    norms_ptr += at
    if WHOLE:
        async_copy.async_copy_global_to_shared(norms_smem.index(to), norms_ptr)
    else:
        inside = s + gl.arange(0, BLOCK_S, layout=LN) < stop
        async_copy.async_copy_global_to_shared(norms_smem.index(to), norms_ptr, mask=inside)


@gluon.jit
def _plane(
    ptr, s, pages, stride_b, PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr
):
    """Where the bytes [BLOCK_S, BYTES] of a plane are, their positions and places."""
    L: gl.constexpr = _copy_layout(BYTES)
    LR: gl.constexpr = gl.SliceLayout(1, L)
    ptr, at = _rows(ptr, s, pages, stride_b, LR, PAGE, STRIDE_S, BLOCK_S)
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    return ptr[:, None] + (at[:, None] + p), (s + gl.arange(0, BLOCK_S, layout=LR))[:, None], p


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
    stream, s, stop, pages, L: gl.constexpr, LH: gl.constexpr, LN: gl.constexpr,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, D: gl.constexpr, BITS: gl.constexpr,
    BLOCK_S: gl.constexpr, BLOCK_P: gl.constexpr,
):  # fmt: skip
    """The same without shared memory, zeros from `stop` on."""
    codes_ptr, norms_ptr, codes_stride_b, norms_stride_b = stream
    BYTES: gl.constexpr = _code_bytes(BLOCK_P, BITS)
    LIVE: gl.constexpr = _code_bytes(D // 2, BITS)
    codes = _load_bytes(codes_ptr, s, stop, pages, codes_stride_b, L, LIVE, PAGE, STRIDE_S, BLOCK_S, BYTES)
    high = codes
    if BITS == 3:
        high = _load_bytes(
            codes_ptr + LIVE, s, stop, pages, codes_stride_b, LH, D // 8, PAGE, STRIDE_S, BLOCK_S, BYTES // 2
        )
    norms_ptr, at = _rows(norms_ptr, s, pages, norms_stride_b, LN, PAGE, 1, BLOCK_S)
    norms_ptr += at
    return codes, high, gl.load(norms_ptr, mask=s + gl.arange(0, BLOCK_S, layout=LN) < stop, other=0.0)


@gluon.jit
def _load_bytes(
    ptr, s, stop, pages, stride_b, L: gl.constexpr, LIVE: gl.constexpr,
    PAGE: gl.constexpr, STRIDE_S: gl.constexpr, BLOCK_S: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    LR: gl.constexpr = gl.SliceLayout(1, L)
    ptr, at = _rows(ptr, s, pages, stride_b, LR, PAGE, STRIDE_S, BLOCK_S)
    p = gl.arange(0, BYTES, layout=gl.SliceLayout(0, L))[None, :]
    inside = (s + gl.arange(0, BLOCK_S, layout=LR) < stop)[:, None] & (p < LIVE)
    return gl.load(ptr[:, None] + (at[:, None] + p), mask=inside, other=0)
