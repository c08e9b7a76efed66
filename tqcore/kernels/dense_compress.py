"""Encoders and decoders for rotations that are no Hadamard transform, in Triton.

A program multiplies an array [BLOCK_V, BLOCK_D] by R in float32. Constants come in one array: boundaries, words,
centroids, and the rotation (`tqcore.kernels.compress_table`).

Source: docs/format.md, section 4.
"""

import triton
import triton.language as tl

from tqcore.kernels.compress import ABS_MASK, ROTATION, exponent, floats, places, power_of_two, slots

CHUNK = tl.constexpr(16)  # coordinates that a step of a dense product takes
WORDS, CENTROIDS = tl.constexpr(8), tl.constexpr(16)  # where they start in the table


@triton.jit
def _search(y, bounds, words, BITS: tl.constexpr):
    """Index, and magnitude of the centroid, of each coordinate: a binary search of |y| among boundaries times radius.

    Boundaries are symmetric. A coordinate on one takes the lower index, so that of a negative y the magnitude counts
    as the next float. The word of a centroid is its bits and its place among the positive ones in the lowest three.
    """
    half: tl.constexpr = 1 << (BITS - 1)
    positive = y > 0
    a = y.to(tl.int32, bitcast=True) & ABS_MASK
    a = tl.where(positive, a, a + 1)
    if BITS == 1:
        word = tl.where(positive, words[0], words[0])
    elif BITS == 2:
        word = tl.where(a > bounds[0], words[1], words[0])
    elif BITS == 3:
        high = a > bounds[1]
        low = a > tl.where(high, bounds[2], bounds[0])
        word = tl.where(low, tl.where(high, words[3], words[1]), tl.where(high, words[2], words[0]))
    else:
        high = a > bounds[3]
        middle = a > tl.where(high, bounds[5], bounds[1])
        low = a > tl.where(middle, tl.where(high, bounds[6], bounds[2]), tl.where(high, bounds[4], bounds[0]))
        even = tl.where(middle, tl.where(high, words[6], words[2]), tl.where(high, words[4], words[0]))
        odd = tl.where(middle, tl.where(high, words[7], words[3]), tl.where(high, words[5], words[1]))
        word = tl.where(low, odd, even)
    return (word & 7) ^ tl.where(positive, half, half - 1), floats(word & -8)


@triton.jit
def _bounds(radius, table_ptr, BITS: tl.constexpr):
    """The bits of the positive boundaries times radius."""
    bounds = ()
    for i in tl.static_range((1 << (BITS - 1)) - 1):
        bounds += ((floats(tl.load(table_ptr + i)) * radius).to(tl.int32, bitcast=True),)
    return bounds


@triton.jit
def _words(table_ptr, BITS: tl.constexpr):
    words = ()
    for i in tl.static_range(1 << (BITS - 1)):
        words += (tl.load(table_ptr + WORDS + i),)
    return words


@triton.jit
def _joined(x, V: tl.constexpr, N: tl.constexpr, SHIFT: tl.constexpr):
    """[V, N] -> [V, N/2]: each even element, shifted, with the odd one after it."""
    a, b = tl.split(tl.reshape(x, [V, N // 2, 2]))
    return (a << SHIFT) | b


@triton.jit
def _packed(index, V: tl.constexpr, N: tl.constexpr, BITS: tl.constexpr):
    """[V, N·BITS/8] bytes of 1, 2 or 4 bits a field."""
    if BITS == 4:
        return _joined(index, V, N, 4)
    elif BITS == 2:
        return _joined(_joined(index, V, N, 2), V, N // 2, 4)
    else:
        return _joined(_joined(_joined(index, V, N, 1), V, N // 2, 2), V, N // 4, 4)


@triton.jit
def _high_bits(index, V: tl.constexpr, N: tl.constexpr):
    """[V, N/8] bytes of the high bits, in the order of tqcore.packing.HIGH_BITS."""
    return _joined(_joined(_joined(index >> 2, V, N, 1), V, N // 2, 4), V, N // 4, 2)


@triton.jit
def _rotated(x_row_ptr, center_row_ptr, usable, inverse, live, table_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_V: tl.constexpr):  # fmt: skip
    """R x̃ [BLOCK_V, BLOCK_D] by a product in float32, of x read once more."""
    i = tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first in range(0, D, CHUNK):
        d = first + tl.arange(0, CHUNK)
        x = _scaled(x_row_ptr, center_row_ptr, d, usable, inverse, live, D)
        inside = (i[None, :] < D) & (d[:, None] < D)
        r = floats(tl.load(table_ptr + ROTATION + i[None, :] * D + d[:, None], mask=inside, other=0))
        y += tl.dot(x, r, input_precision="ieee")
    return y


@triton.jit
def _scaled(x_row_ptr, center_row_ptr, d, usable, inverse, live, D: tl.constexpr):
    x = _loaded(x_row_ptr, center_row_ptr, d, live, D)
    return tl.where(usable[:, None], x, 0.0) * inverse[:, None]


@triton.jit
def _loaded(x_row_ptr, center_row_ptr, d, live, D: tl.constexpr):
    """Coordinates d of each vector in float32, less their center."""
    inside = live[:, None] & (d[None, :] < D)
    x = tl.load(x_row_ptr + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if center_row_ptr is not None:
        x -= tl.load(center_row_ptr + d[None, :], mask=inside, other=0.0)
    return x


@triton.jit
def dense_compress_kernel(
    x_ptr,  # [B, K, T, D] float32 | bfloat16 | float16, any strides along B, K and T
    center_ptr,  # the same of float32, or None
    table_ptr,  # int32: tqcore.kernels.compress_table
    starts_ptr,  # [B] int32: x[b, :, t] goes to position starts[b] + t; None: to t
    pages_ptr,  # [B, M] int32, or None
    codes_in_ptr,  # codes_ptr and norms_ptr once more, or None: XLA wants what is written in place to be read too
    norms_in_ptr,
    codes_ptr,  # [N, K, S, P] uint8, any strides along N, K and S
    norms_ptr,  # [N, K, S] float32, any strides
    vectors,  # B·K·T
    x_stride_b,
    x_stride_k,
    x_stride_t,
    center_stride_b,
    center_stride_k,
    center_stride_t,
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    K,
    T,
    S,
    N,
    M,
    D: tl.constexpr,
    BITS: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, k, t, live = places(vectors, K, T, BLOCK_V, False)
    row, position, inside = slots(b, k, t, live, starts_ptr, pages_ptr, S, N, M)
    x_row_ptr = (x_ptr + b * x_stride_b + k * x_stride_k + t * x_stride_t)[:, None]
    center_row_ptr = None
    if center_ptr is not None:
        center_row_ptr = (center_ptr + b * center_stride_b + k * center_stride_k + t * center_stride_t)[:, None]
    norm_ptr = norms_ptr + row * norms_stride_b + k * norms_stride_k + position * norms_stride_s
    code_row_ptr = (codes_ptr + row * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]

    # x̃ = x·2^-e, and zeros for what has no direction.
    d = tl.arange(0, BLOCK_D)
    x = _loaded(x_row_ptr, center_row_ptr, d, live, D)
    finite, usable, e = exponent(tl.max(x.to(tl.int32, bitcast=True) & ABS_MASK, 1))
    inverse = power_of_two(-e)
    scaled = tl.where(usable[:, None], x, 0.0) * inverse[:, None]
    squares = tl.sum(scaled * scaled, 1)
    length = tl.sqrt_rn(squares)

    y = _rotated(x_row_ptr, center_row_ptr, usable, inverse, live, table_ptr, D, BLOCK_D, BLOCK_V)
    bounds = _bounds(tl.where(usable, length, 1.0)[:, None], table_ptr, BITS)
    index, magnitude = _search(y, bounds, _words(table_ptr, BITS), BITS)
    if CORRECTED:
        along = tl.sum(tl.where(d[None, :] < D, tl.abs(y) * magnitude, 0.0), 1)
        length = tl.div_rn(squares, tl.where(usable, along, 1.0))
    tl.store(norm_ptr, tl.where(finite, length * power_of_two(e), float("nan")), mask=inside)
    if BITS == 3:
        _store_row(code_row_ptr, _packed(index & 3, BLOCK_V, BLOCK_D, 2), inside, D // 4, BLOCK_D // 4)
        _store_row(code_row_ptr + D // 4, _high_bits(index, BLOCK_V, BLOCK_D), inside, D // 8, BLOCK_D // 8)
    else:
        codes = _packed(index, BLOCK_V, BLOCK_D, BITS)
        _store_row(code_row_ptr, codes, inside, D * BITS // 8, BLOCK_D * BITS // 8)


@triton.jit
def _store_row(row_ptr, codes, live, COUNT: tl.constexpr, N: tl.constexpr):
    """The first COUNT of N bytes a vector."""
    p = tl.arange(0, N)[None, :]
    tl.store(row_ptr + p, codes.to(tl.uint8), mask=live[:, None] & (p < COUNT))


@triton.jit
def dense_decompress_kernel(
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
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b, k, s, live = places(vectors, K, S, BLOCK_V, False)
    code_row_ptr = (codes_ptr + b * codes_stride_b + k * codes_stride_k + s * codes_stride_s)[:, None]
    norm = tl.load(norms_ptr + b * norms_stride_b + k * norms_stride_k + s * norms_stride_s, mask=live, other=0.0)
    d = tl.arange(0, BLOCK_D)
    if ROTATED:
        x = floats(tl.load(table_ptr + CENTROIDS + _indices(code_row_ptr, d, live, D, BITS)))
    else:
        x = _unrotated(code_row_ptr, live, table_ptr, D, BITS, BLOCK_D, BLOCK_V)
    out_row_ptr = (out_ptr + ((b * K + k) * S + s) * D)[:, None]
    inside = live[:, None] & (d[None, :] < D)
    tl.store(out_row_ptr + d[None, :], (x * norm[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


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
        c = floats(tl.load(table_ptr + CENTROIDS + _indices(code_row_ptr, d, live, D, BITS)))
        inside = (i[None, :] < D) & (d[:, None] < D)
        r = floats(tl.load(table_ptr + ROTATION + d[:, None] * D + i[None, :], mask=inside, other=0))
        x += tl.dot(c, r, input_precision="ieee")
    return x
