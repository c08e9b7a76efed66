"""Encoders in Triton: the device code that tq_torch and tqjax launch.

    norm, index_d = number of boundaries b with b·‖x‖ < (R x)_d

Reads each vector once and writes D·bits/8 + 4 bytes. With a Hadamard rotation a thread holds a whole vector, which it
loads and stores 16 bytes at a time, and no butterfly leaves it; of few vectors a warp shares each, and butterflies are
shuffles. Every sum has the order of `tqcore.reference`. With any other rotation (`dense_*`) a program multiplies an
array [BLOCK_V, BLOCK_D] by R in float32.
Constants come in one array: boundaries, words, centroids, and the rotation (`tqcore.kernels.compress_table`).

Source: docs/format.md, section 4.
"""

import triton
import triton.language as tl

from tqcore import fixed_point

CARRY, BIAS = (tl.constexpr(value) for value in fixed_point.exponent_bias(fixed_point.QUERY_LIMIT))
ABS_MASK = tl.constexpr(fixed_point.ABS_MASK)
INFINITY_BITS = tl.constexpr(fixed_point.INFINITY_BITS)
MIN_EXPONENT = tl.constexpr(fixed_point.MIN_EXPONENT)
MIN_EXPONENT_BITS = tl.constexpr(fixed_point.MIN_EXPONENT_BITS)
CHUNK = tl.constexpr(16)  # coordinates that a step of a dense product takes
SIGN_BIT = tl.constexpr(-(2**31))
SHARP = tl.constexpr(2.0**48)
STEP, WORDS, CENTROIDS, ROTATION = (tl.constexpr(i) for i in (7, 8, 16, 32))  # where they start in the table


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _side_by_side(parts, FIRST: tl.constexpr, COUNT: tl.constexpr, V: tl.constexpr, N: tl.constexpr):
    """[V, COUNT·N] of COUNT arrays [V, N] from parts[FIRST] on."""
    if COUNT == 1:
        return parts[FIRST]
    else:
        half: tl.constexpr = COUNT // 2
        left, right = _side_by_side(parts, FIRST, half, V, N), _side_by_side(parts, FIRST + half, half, V, N)
        return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [V, COUNT * N])


@triton.jit
def _apart(x, V: tl.constexpr, N: tl.constexpr, COUNT: tl.constexpr):
    """The inverse of `_side_by_side` of [V, N]."""
    if COUNT == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [V, 2, N // 2]), [0, 2, 1]))
        return _apart(left, V, N // 2, COUNT // 2) + _apart(right, V, N // 2, COUNT // 2)


@triton.jit
def _tree_sum(x, V: tl.constexpr, N: tl.constexpr):
    """[V, N] -> [V]: the sum by halving, a fixed order of additions."""
    for i in tl.static_range(N.bit_length() - 1):
        a, b = tl.split(tl.permute(tl.reshape(x, [V, 2, N >> (i + 1)]), [0, 2, 1]))
        x = a + b
    return tl.reshape(x, [V])


@triton.jit
def _tree_max(x, V: tl.constexpr, N: tl.constexpr):
    """[V, N] -> [V]: NaN where there is one."""
    for i in tl.static_range(N.bit_length() - 1):
        a, b = tl.split(tl.permute(tl.reshape(x, [V, 2, N >> (i + 1)]), [0, 2, 1]))
        x = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return tl.reshape(x, [V])


@triton.jit
def _hadamard(x, V: tl.constexpr, N: tl.constexpr):
    """H x of [V, N] by butterflies of width 1, 2, 4, …"""
    for i in tl.static_range(N.bit_length() - 1):
        a, b = tl.split(tl.permute(tl.reshape(x, [V, N >> (i + 1), 2, 1 << i]), [0, 1, 3, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [V, N])
    return x


@triton.jit
def _partners(x, V: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """x[:, d ^ WIDTH], by shuffles where threads share a vector."""
    return tl.gather(x, tl.broadcast_to((tl.arange(0, N) ^ WIDTH)[None, :], [V, N]), 1)


@triton.jit
def _shared_tree_sum(x, V: tl.constexpr, N: tl.constexpr):
    """`_tree_sum` where threads share a vector: every place adds the same two numbers."""
    for i in tl.static_range(N.bit_length() - 1):
        x += _partners(x, V, N, N >> (i + 1))
    return _float(tl.max(x.to(tl.int32, bitcast=True), 1))


@triton.jit
def _shared_hadamard(x, V: tl.constexpr, N: tl.constexpr):
    """`_hadamard` where threads share a vector."""
    for i in tl.static_range(N.bit_length() - 1):
        first = ((tl.arange(0, N) >> i) & 1 == 0)[None, :]
        x = _partners(x, V, N, 1 << i) + tl.where(first, x, -x)
    return x


@triton.jit
def _sum(x, V: tl.constexpr, N: tl.constexpr, SHARED: tl.constexpr):
    if SHARED:
        return _shared_tree_sum(x, V, N)
    else:
        return _tree_sum(x, V, N)


@triton.jit
def _signs(table_ptr, zero, D: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr = 4):
    """[V, D]: every thread loads all of its own, CHUNK at once."""
    signs = ()
    for chunk in tl.static_range(D // CHUNK):
        signs += (_float(tl.load(table_ptr + ROTATION + chunk * CHUNK + tl.arange(0, CHUNK)[None, :] + zero[:, None])),)
    return _side_by_side(signs, 0, D // CHUNK, V, CHUNK)


@triton.jit
def _above(a, bound, PTX: tl.constexpr):
    """1.0 where a > bound, else 0.0: (a - bound)·2^48, rounded once and held to [0, 1]; bound is 2^-20 to 2^20."""
    if PTX:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f57800000, $2;", "=f,f,f", [a, bound * -SHARP], tl.float32, is_pure=True, pack=1
        )
    return tl.where(a > bound, 1.0, 0.0)


@triton.jit
def _sized(y, PTX: tl.constexpr):
    """(a, u): a is y where y > 0, else the next float after |y|; u > 0 where y <= 0."""
    if PTX:
        u = tl.inline_asm_elementwise(
            "fma.rz.f32 $0, $1, 0fBF800001, 0f00000001;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.maximum(y, u), u
    bits = y.to(tl.int32, bitcast=True) & ABS_MASK
    return tl.where(y > 0, y, _float(bits + 1)), tl.where(y > 0, -1.0, 1.0)


@triton.jit
def _floor_sum(a, b, PTX: tl.constexpr):
    """a + b > 0, rounded down to a float; b is 1.5·2^23 units, and a a multiple of half a unit."""
    if PTX:
        return tl.inline_asm_elementwise(
            "add.rz.f32 $0, $1, $2;", "=f,f,f", [a, b + tl.zeros_like(a)], dtype=tl.float32, is_pure=True, pack=1
        )
    total = a + b
    return tl.where(total - b > a, _float(total.to(tl.int32, bitcast=True) - 1), total)


@triton.jit
def _search(y, radius, table_ptr, BITS: tl.constexpr, PTX: tl.constexpr):
    """Index of each coordinate, and its centroid: |y| among the positive boundaries times radius.

    Boundaries are symmetric. A coordinate on one takes the lower index, so that of a negative y the magnitude counts
    as the next float. One sum over the boundaries below it holds the centroid, a multiple of `step`, and the place m
    among the positive ones as (m + 1/2)·step/16; with the sign of y and `unit` it ends in the bits of the index.
    """
    half: tl.constexpr = 1 << (BITS - 1)
    a, u = _sized(y, PTX)
    word = _float(tl.load(table_ptr + WORDS)) + tl.zeros_like(y)
    for i in tl.static_range(half - 1):
        bound = _float(tl.load(table_ptr + i)) * radius
        rise = _float(tl.load(table_ptr + WORDS + 1 + i))
        word = _accumulated(_above(a, bound, PTX), rise, word, PTX)
    word = _float(word.to(tl.int32, bitcast=True) | (~u.to(tl.int32, bitcast=True) & SIGN_BIT))
    step = _float(tl.load(table_ptr + STEP))
    index = _floor_sum(word, step * (786432.0 + half / 16), PTX).to(tl.int32, bitcast=True) & (2 * half - 1)
    rounder = step * 12582912.0
    return index, (word + rounder) - rounder


@triton.jit
def _accumulated(a, b, c, PTX: tl.constexpr):
    """a·b + c, exact."""
    if PTX:
        b += tl.zeros_like(a)
        return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, True, 1)
    return a * b + c


@triton.jit
def _exponent(bits):
    """Whether a vector whose largest magnitude has these bits is finite, has a direction too, and its exponent."""
    finite = bits < INFINITY_BITS
    usable = finite & (bits >= MIN_EXPONENT_BITS)
    e = tl.maximum(((tl.minimum(bits, INFINITY_BITS) + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    return finite, usable, tl.where(usable, e, 0)


@triton.jit
def _power_of_two(e):
    return _float((127 + e) << 23)


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
def _store_bytes(row_ptr, codes, live, V: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr):
    """[V, N] bytes, CHUNK of a vector at once."""
    width: tl.constexpr = min(CHUNK, N)
    parts = _apart(codes.to(tl.uint8), V, N, N // width)
    for i in tl.static_range(N // width):
        tl.store(row_ptr + i * width + tl.arange(0, width)[None, :], parts[i], mask=live[:, None])


@triton.jit
def _slots(v, live, starts_ptr, pages_ptr, K, T, S, N, M):
    """Row of the first axis, head, position and whether there is such a place, of vector v of [B, K, T]."""
    row, k, position, inside = (v // (K * T)).to(tl.int64), (v // T % K).to(tl.int64), (v % T).to(tl.int64), live
    if starts_ptr is not None:
        position += tl.load(starts_ptr + row, mask=live, other=0)
        if pages_ptr is None:
            inside = live & (position >= 0) & (position < S)
        else:
            inside = live & (position >= 0) & (position < M * S)
            place = tl.where(inside, position, 0).to(tl.int32)
            row = tl.load(pages_ptr + row * M + place // S, mask=inside, other=-1).to(tl.int64)
            inside = inside & (row >= 0) & (row < N)
            position = place % S
    return row, k, position, inside


@triton.jit
def compress_kernel(
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
    PTX: tl.constexpr,
    SCALE: tl.constexpr,  # 1/√D
    BLOCK_V: tl.constexpr,
    SHARED: tl.constexpr,  # whether threads share a vector
    CHUNK_X: tl.constexpr,  # coordinates that a thread loads at once
    CHUNK_P: tl.constexpr,  # bytes that it stores at once
):
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = v < vectors
    row, k, position, inside = _slots(v, live, starts_ptr, pages_ptr, K, T, S, N, M)
    b, t = (v // (K * T)).to(tl.int64), (v % T).to(tl.int64)
    x_row_ptr = (x_ptr + b * x_stride_b + k * x_stride_k + t * x_stride_t)[:, None]
    center_row_ptr = None
    if center_ptr is not None:
        center_row_ptr = (center_ptr + b * center_stride_b + k * center_stride_k + t * center_stride_t)[:, None]
    norm_ptr = norms_ptr + row * norms_stride_b + k * norms_stride_k + position * norms_stride_s
    code_row_ptr = (codes_ptr + row * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]

    # x̃ = x·2^-e; x·0 for what has no direction, whose coordinates, zeros or NaN, get the codes of +0.
    x = ()
    for chunk in tl.static_range(D // CHUNK_X):
        d = chunk * CHUNK_X + tl.arange(0, CHUNK_X)
        x += (_loaded(x_row_ptr, center_row_ptr, d, live, D),)
    x = _side_by_side(x, 0, D // CHUNK_X, BLOCK_V, CHUNK_X)
    if SHARED:
        largest = tl.max(x.to(tl.int32, bitcast=True) & ABS_MASK, 1)
    else:
        largest = _tree_max(tl.abs(x), BLOCK_V, D).to(tl.int32, bitcast=True)
    finite, usable, e = _exponent(largest)
    scaled = x * tl.where(usable, _power_of_two(-e), 0.0)[:, None]
    squares = _sum(scaled * scaled, BLOCK_V, D, SHARED)
    length = tl.sqrt_rn(squares)

    y = scaled * _signs(table_ptr, tl.where(live, 0, 0), D, BLOCK_V, D if SHARED else 4)
    y = (_shared_hadamard(y, BLOCK_V, D) if SHARED else _hadamard(y, BLOCK_V, D)) * SCALE
    index, centroid = _search(y, tl.where(usable, length, 1.0)[:, None], table_ptr, BITS, PTX)
    if CORRECTED:
        length = tl.div_rn(squares, tl.where(usable, _sum(y * centroid, BLOCK_V, D, SHARED), 1.0))
    tl.store(norm_ptr, tl.where(finite, length * _power_of_two(e), float("nan")), mask=inside)
    if BITS == 3:
        _store_bytes(code_row_ptr, _packed(index & 3, BLOCK_V, D, 2), inside, BLOCK_V, D // 4, CHUNK_P)
        _store_bytes(code_row_ptr + D // 4, _high_bits(index, BLOCK_V, D), inside, BLOCK_V, D // 8, CHUNK_P)
    else:
        _store_bytes(code_row_ptr, _packed(index, BLOCK_V, D, BITS), inside, BLOCK_V, D * BITS // 8, CHUNK_P)


@triton.jit
def _rotated(x_row_ptr, center_row_ptr, inverse, live, table_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_V: tl.constexpr):  # fmt: skip
    """R x̃ [BLOCK_V, BLOCK_D] by a product in float32, of x read once more."""
    i = tl.arange(0, BLOCK_D)
    y = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first in range(0, D, CHUNK):
        d = first + tl.arange(0, CHUNK)
        x = _loaded(x_row_ptr, center_row_ptr, d, live, D) * inverse[:, None]
        inside = (i[None, :] < D) & (d[:, None] < D)
        r = _float(tl.load(table_ptr + ROTATION + i[None, :] * D + d[:, None], mask=inside, other=0))
        y += tl.dot(x, r, input_precision="ieee")
    return y


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
    PTX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    live = v < vectors
    row, k, position, inside = _slots(v, live, starts_ptr, pages_ptr, K, T, S, N, M)
    b, t = (v // (K * T)).to(tl.int64), (v % T).to(tl.int64)
    x_row_ptr = (x_ptr + b * x_stride_b + k * x_stride_k + t * x_stride_t)[:, None]
    center_row_ptr = None
    if center_ptr is not None:
        center_row_ptr = (center_ptr + b * center_stride_b + k * center_stride_k + t * center_stride_t)[:, None]
    norm_ptr = norms_ptr + row * norms_stride_b + k * norms_stride_k + position * norms_stride_s
    code_row_ptr = (codes_ptr + row * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]

    # x̃ = x·2^-e; x·0 for what has no direction, whose coordinates, zeros or NaN, get the codes of +0.
    d = tl.arange(0, BLOCK_D)
    x = _loaded(x_row_ptr, center_row_ptr, d, live, D)
    finite, usable, e = _exponent(tl.max(x.to(tl.int32, bitcast=True) & ABS_MASK, 1))
    inverse = tl.where(usable, _power_of_two(-e), 0.0)
    scaled = x * inverse[:, None]
    squares = tl.sum(scaled * scaled, 1)
    length = tl.sqrt_rn(squares)

    y = _rotated(x_row_ptr, center_row_ptr, inverse, live, table_ptr, D, BLOCK_D, BLOCK_V)
    index, centroid = _search(y, tl.where(usable, length, 1.0)[:, None], table_ptr, BITS, PTX)
    if CORRECTED:
        along = tl.sum(tl.where(d[None, :] < D, y * centroid, 0.0), 1)
        length = tl.div_rn(squares, tl.where(usable, along, 1.0))
    tl.store(norm_ptr, tl.where(finite, length * _power_of_two(e), float("nan")), mask=inside)
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
