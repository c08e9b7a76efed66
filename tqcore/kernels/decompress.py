"""Decoders in Triton, the inverse of `tqcore.kernels.compress` and laid out alike.

    x̂ = norm · Rᵀ centroids[index]

Source: docs/format.md, section 4.
"""

import triton
import triton.language as tl

from tqcore.kernels.compress import CENTROIDS, CHUNK, ROTATION, _apart, _float, _hadamard, _side_by_side, _signs


@triton.jit
def _indices(code_row_ptr, d, live, D: tl.constexpr, BITS: tl.constexpr):
    """Indices of coordinates d."""
    inside = live[:, None] & (d[None, :] < D)
    if BITS == 3:
        low = tl.load(code_row_ptr + d[None, :] // 4, mask=inside, other=0).to(tl.int32)
        high = tl.load(code_row_ptr + D // 4 + d[None, :] // 8, mask=inside, other=0).to(tl.int32)
        place = (d & 1) | (d & 2) << 1 | (d & 4) >> 1  # of its high bit, in the order of tqcore.packing.HIGH_BITS
        return (low >> (6 - 2 * (d[None, :] % 4))) & 3 | ((high >> (7 - place[None, :])) & 1) << 2
    each: tl.constexpr = 8 // BITS
    codes = tl.load(code_row_ptr + d[None, :] // each, mask=inside, other=0).to(tl.int32)
    return (codes >> (8 - BITS * (d[None, :] % each + 1))) & ((1 << BITS) - 1)


@triton.jit
def _unrotated(code_row_ptr, live, table_ptr, D: tl.constexpr, BITS: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_V: tl.constexpr):  # fmt: skip
    """Rᵀ centroids[index] by a product in float32."""
    i = tl.arange(0, BLOCK_D)
    x = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first in range(0, D, CHUNK):
        d = first + tl.arange(0, CHUNK)
        c = _float(tl.load(table_ptr + CENTROIDS + _indices(code_row_ptr, d, live, D, BITS)))
        inside = (i[None, :] < D) & (d[:, None] < D)
        r = _float(tl.load(table_ptr + ROTATION + d[:, None] * D + i[None, :], mask=inside, other=0))
        x += tl.dot(c, r, input_precision="ieee")
    return x


@triton.jit
def _store_vectors(out_ptr, x, center_row_ptr, v, d, live, D: tl.constexpr):
    """Coordinates d of each vector, with the center added."""
    inside = live[:, None] & (d[None, :] < D)
    if center_row_ptr is not None:
        x += tl.load(center_row_ptr + d[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + v[:, None] * D + d[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _separate(codes, V: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """[V, N] -> [V, 2·N]: the field above SHIFT of each element, then that below; the inverse of `_joined`."""
    return tl.reshape(tl.join(codes >> SHIFT, codes & MASK), [V, 2 * N])


@triton.jit
def _fields(codes, V: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """[V, N] bytes -> [V, 8·N/BITS], the inverse of `_packed`."""
    if BITS == 4:
        return _separate(codes, V, N, 4, 15)
    elif BITS == 2:
        return _separate(_separate(codes, V, N, 4, 15), V, 2 * N, 2, 3)
    else:
        return _separate(_separate(_separate(codes, V, N, 4, 15), V, 2 * N, 2, 3), V, 4 * N, 1, 1)


@triton.jit
def _load_bytes(row_ptr, live, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    """[V, N] bytes as int32, CHUNK of a vector at once."""
    width: tl.constexpr = min(CHUNK, N)
    parts = ()
    for i in tl.static_range(N // width):
        part = tl.load(row_ptr + i * width + tl.arange(0, width)[None, :], mask=live[:, None], other=0)
        parts += (part.to(tl.int32),)
    return _side_by_side(parts, 0, N // width, V, width)


@triton.jit
def decompress_kernel(
    codes_ptr,  # [B, K, S, P] uint8, any strides along B, K and S
    norms_ptr,  # [B, K, S] float32, any strides
    center_ptr,  # [B, K, S, D] float32, any strides along B, K and S; or None
    table_ptr,  # int32: tqcore.kernels.compress_table
    out_ptr,  # [B·K·S, D] float32 | bfloat16 | float16
    vectors,  # B·K·S
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    center_stride_b,
    center_stride_k,
    center_stride_s,
    K,
    S,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,  # leaves R x̂
    SCALE: tl.constexpr,  # 1/√D
    BLOCK_V: tl.constexpr,
    CHUNK_X: tl.constexpr,  # coordinates that a thread stores at once
    CHUNK_P: tl.constexpr,  # bytes that it loads at once
):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = v < vectors
    b, k, s = v // (K * S), v // S % K, v % S
    code_row_ptr = (codes_ptr + b * codes_stride_b + k * codes_stride_k + s * codes_stride_s)[:, None]
    norm = tl.load(norms_ptr + b * norms_stride_b + k * norms_stride_k + s * norms_stride_s, mask=live, other=0.0)
    center_row_ptr = None
    if center_ptr is not None:
        center_row_ptr = (center_ptr + b * center_stride_b + k * center_stride_k + s * center_stride_s)[:, None]
    if BITS == 3:
        index = _fields(_load_bytes(code_row_ptr, live, BLOCK_V, D // 4, CHUNK_P), BLOCK_V, D // 4, 2)
        high = _load_bytes(code_row_ptr + D // 4, live, BLOCK_V, D // 8, CHUNK_P)
        high = _separate(_separate(high, BLOCK_V, D // 8, 2, 51), BLOCK_V, D // 4, 4, 3)
        index |= _separate(high, BLOCK_V, D // 2, 1, 1) << 2
    else:
        codes = _load_bytes(code_row_ptr, live, BLOCK_V, D * BITS // 8, CHUNK_P)
        index = _fields(codes, BLOCK_V, D * BITS // 8, BITS)
    x = _float(tl.load(table_ptr + CENTROIDS + index))
    if not ROTATED:
        x = _hadamard(x, BLOCK_V, D) * SCALE * _signs(table_ptr, tl.where(live, 0, 0), D, BLOCK_V)
    parts = _apart(x * norm[:, None], BLOCK_V, D, D // CHUNK_X)
    for chunk in tl.static_range(D // CHUNK_X):
        d = chunk * CHUNK_X + tl.arange(0, CHUNK_X)
        _store_vectors(out_ptr, parts[chunk], center_row_ptr, v, d, live, D)


@triton.jit
def dense_decompress_kernel(
    codes_ptr,  # [B, K, S, P] uint8, any strides along B, K and S
    norms_ptr,  # [B, K, S] float32, any strides
    center_ptr,  # [B, K, S, D] float32, any strides along B, K and S; or None
    table_ptr,  # int32: tqcore.kernels.compress_table
    out_ptr,  # [B·K·S, D] float32 | bfloat16 | float16
    vectors,  # B·K·S
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    center_stride_b,
    center_stride_k,
    center_stride_s,
    K,
    S,
    D: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,  # leaves R x̂
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = v < vectors
    b, k, s = v // (K * S), v // S % K, v % S
    code_row_ptr = (codes_ptr + b * codes_stride_b + k * codes_stride_k + s * codes_stride_s)[:, None]
    norm = tl.load(norms_ptr + b * norms_stride_b + k * norms_stride_k + s * norms_stride_s, mask=live, other=0.0)
    center_row_ptr = None
    if center_ptr is not None:
        center_row_ptr = (center_ptr + b * center_stride_b + k * center_stride_k + s * center_stride_s)[:, None]
    d = tl.arange(0, BLOCK_D)
    if ROTATED:
        x = _float(tl.load(table_ptr + CENTROIDS + _indices(code_row_ptr, d, live, D, BITS)))
    else:
        x = _unrotated(code_row_ptr, live, table_ptr, D, BITS, BLOCK_D, BLOCK_V)
    _store_vectors(out_ptr, x * norm[:, None], center_row_ptr, v, d, live, D)
