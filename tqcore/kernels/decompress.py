"""Decoders in Triton, the inverse of `tqcore.kernels.compress` and laid out alike.

    x̂ = norm · Rᵀ centroids[index]

Source: docs/format.md, section 4.
"""

import triton
import triton.language as tl

from tqcore.kernels.compress import ROTATION, _flips, _hadamard, centroids, floats, places, table_words

SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit
def _join8(x0, x1, x2, x3, x4, x5, x6, x7, V: tl.constexpr, L: tl.constexpr):
    """The inverse of `_split8`."""
    even = tl.reshape(tl.join(tl.join(x0, x4), tl.join(x2, x6)), [V, L, 4])
    odd = tl.reshape(tl.join(tl.join(x1, x5), tl.join(x3, x7)), [V, L, 4])
    return tl.reshape(tl.join(even, odd), [V, L, 8])


@triton.jit
def _load(ptr, live, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """COUNT bytes as a word."""
    if COUNT == 4 and ALIGNED:
        word = tl.load(ptr.to(tl.pointer_type(tl.int32), bitcast=True), mask=live, other=0)
    elif COUNT == 2 and ALIGNED:
        word = tl.load(ptr.to(tl.pointer_type(tl.uint16), bitcast=True), mask=live, other=0).to(tl.int32)
    else:
        word = tl.load(ptr, mask=live, other=0).to(tl.int32)
        for i in tl.static_range(1, COUNT):
            word |= tl.load(ptr + i, mask=live, other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def _load_codes(codes_ptr, group, live, D: tl.constexpr, BITS: tl.constexpr, ALIGNED: tl.constexpr):
    """The inverse of `_store_codes`: a word of eight indices."""
    if BITS == 4:
        word = _load(codes_ptr + 4 * group, live, 4, ALIGNED)
    elif BITS == 1:
        word = _from_one_bit(_load(codes_ptr + group, live, 1, ALIGNED), 4, 2)
    else:
        low = _load(codes_ptr + 2 * group, live, 2, ALIGNED)
        word = ((low >> 4) & 0x000F) | ((low & 0x000F) << 8) | ((low << 4) & 0x0F0000) | ((low & 0x0F00) << 16)
        word = (word | (word << 2)) & 0x33333333
        if BITS == 3:
            word |= _from_one_bit(_load(codes_ptr + D // 4 + group, live, 1, ALIGNED), 2, 4) << 2
    return word


@triton.jit
def _from_one_bit(byte, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The inverse of `_one_bit`."""
    word = (byte >> 6) | ((byte >> FIRST & 3) << 8) | ((byte >> SECOND & 3) << 16) | ((byte & 3) << 24)
    return (word | (word << 3)) & 0x11111111


@triton.jit
def decompress_kernel(
    codes_ptr,  # [B, K, S, P] uint8, any strides along B, K and S
    norms_ptr,  # [B, K, S] float32, any strides
    table_ptr,  # int32: tqcore.kernels.compress_table
    out_ptr,  # [B·K·S, D] float32 | bfloat16 | float16
    vectors,  # B·K·S
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    K,
    S,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,  # leaves R x̂
    SCALE: tl.constexpr,  # 1/√D
    CENTROIDS: tl.constexpr,  # the positive ones, as `centroids` reads them
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether words of codes can be loaded at once
    PTX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    L: tl.constexpr,
):
    J: tl.constexpr = D // (8 * L)
    V: tl.constexpr = BLOCK_V
    b, k, s, live = places(vectors, K, S, V, TILED)
    row = (b * K + k) * S + s
    code_row_ptr = (codes_ptr + b * codes_stride_b + k * codes_stride_k + s * codes_stride_s)[:, None]
    norm_ptr = norms_ptr + b * norms_stride_b + k * norms_stride_k + s * norms_stride_s
    norm = tl.load(norm_ptr, mask=live, other=0.0)[:, None]
    lane, table = tl.arange(0, L), table_words(CENTROIDS, s)
    x = ()
    for j in tl.static_range(J):
        group = (j * L + lane)[None, :]
        index = _load_codes(code_row_ptr, group, live[:, None], D, BITS, ALIGNED).to(tl.uint32, bitcast=True)
        word = (index ^ _flips(index & (0x11111111 << (BITS - 1)), BITS)).to(tl.int32, bitcast=True)
        found = centroids(word, word >> 16, table, PTX)
        for i in tl.static_range(8):
            negative = (~index.to(tl.int32, bitcast=True) << (31 - 4 * (i ^ 1) - (BITS - 1))) & SIGN_BIT
            x += ((found[i ^ 1].to(tl.int32, bitcast=True) ^ negative).to(tl.float32, bitcast=True),)
    if not ROTATED:
        x = _hadamard(x, 0, V, L)
    within = lane[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    out_row_ptr = (out_ptr + row * D)[:, None, None]
    for j in tl.static_range(J):
        d = 8 * L * j + within
        part = _join8(
            x[8 * j],
            x[8 * j + 1],
            x[8 * j + 2],
            x[8 * j + 3],
            x[8 * j + 4],
            x[8 * j + 5],
            x[8 * j + 6],
            x[8 * j + 7],
            V,
            L,
        )
        if not ROTATED:
            part = part * SCALE * floats(tl.load(table_ptr + ROTATION + d))
        part = part * norm[:, :, None]
        tl.store(out_row_ptr + d, part.to(out_ptr.dtype.element_ty), mask=live[:, None, None])
