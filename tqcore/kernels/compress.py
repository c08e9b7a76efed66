"""Vectors to packed codes and back, in Triton: the device code that tq_torch and tqjax launch.

    y = R x̃,  index_d = number of boundaries b with b·‖x̃‖ < y_d,  x̃ = (x − center)·2^−e        x̂ = norm · Rᵀ c + center

Reads D elements of a vector and writes its codes and norm, or the other way round. With a Hadamard rotation compression
equals `tqcore.reference.compress` bit for bit. A vector lies in L lanes: coordinate d = 8·(L·j + lane) + k is number
8·j + k of a tuple of [R, L] tensors, so that all butterflies but log2(L) and all packing stay within a thread. Its
Pallas twin is `tqjax/pallas_compress.py`.

Source: docs/format.md, section 4; byte permutes: PTX ISA, `prmt`.
"""

import triton
import triton.language as tl

from tqcore import fixed_point

CARRY, BIAS = (tl.constexpr(value) for value in fixed_point.exponent_bias(fixed_point.QUERY_LIMIT))
ABS_MASK = tl.constexpr(fixed_point.ABS_MASK)
INFINITY_BITS = tl.constexpr(fixed_point.INFINITY_BITS)
MIN_EXPONENT_BITS = tl.constexpr(fixed_point.MIN_EXPONENT_BITS)
MAGIC = tl.constexpr(8388608.0)  # 2^23: the low bits of MAGIC + n are n
SIGN_BIT = tl.constexpr(-(2**31))
DENSE_STEP = tl.constexpr(32)  # rows of the matrix that a step of a dense rotation takes

# The centroids of the eight nibbles of $8, by three bits of each, from the lowest nibble on. Their float32 end in two
# bytes of zeros: $9 $10 are the first bytes of the eight, $11 $12 the second ones. A selector of `prmt` with its fourth
# bit set repeats a byte's sign, which is zero.
CENTROIDS = tl.constexpr("""{
.reg .b32 select, first, second;
and.b32 select, $8, 0x77777777;
prmt.b32 first, $9, $10, select;
prmt.b32 second, $11, $12, select;
prmt.b32 $0, first, second, 0x0488;
prmt.b32 $1, first, second, 0x1599;
prmt.b32 $2, first, second, 0x26AA;
prmt.b32 $3, first, second, 0x37BB;
shr.u32 select, select, 16;
prmt.b32 first, $9, $10, select;
prmt.b32 second, $11, $12, select;
prmt.b32 $4, first, second, 0x0488;
prmt.b32 $5, first, second, 0x1599;
prmt.b32 $6, first, second, 0x26AA;
prmt.b32 $7, first, second, 0x37BB;
}""")
CENTROIDS_CONSTRAINTS = tl.constexpr("=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r")


@triton.jit
def _split8(x, R: tl.constexpr, L: tl.constexpr):
    """[R, L, 8] as eight of [R, L], in order."""
    even, odd = tl.split(tl.reshape(x, [R, L, 4, 2]))
    x04, x26 = tl.split(tl.reshape(even, [R, L, 2, 2]))
    x15, x37 = tl.split(tl.reshape(odd, [R, L, 2, 2]))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _join8(x0, x1, x2, x3, x4, x5, x6, x7, R: tl.constexpr, L: tl.constexpr):
    """The inverse of `_split8`."""
    even = tl.reshape(tl.join(tl.join(x0, x4), tl.join(x2, x6)), [R, L, 4])
    odd = tl.reshape(tl.join(tl.join(x1, x5), tl.join(x3, x7)), [R, L, 4])
    return tl.reshape(tl.join(even, odd), [R, L, 8])


@triton.jit
def _hadamard(x, FIRST: tl.constexpr, R: tl.constexpr, L: tl.constexpr):
    """H x by the butterflies of `tqcore.rotation.hadamard`, in its order, from width 2^FIRST on."""
    for i in tl.static_range(FIRST, 3):
        x = _between(x, 1 << i)
    for i in tl.static_range(4):
        if (1 << i) < L:
            x = _across(x, R, L, 1 << i)
    for i in tl.static_range(3, 10):
        if (1 << i) < len(x):
            x = _between(x, 1 << i)
    return x


@triton.jit
def _between(x, WIDTH: tl.constexpr):
    """Butterflies of tensors WIDTH apart."""
    y = ()
    for i in tl.static_range(len(x)):
        if i & WIDTH:
            y = y + (x[i ^ WIDTH] - x[i],)
        else:
            y = y + (x[i] + x[i ^ WIDTH],)
    return y


@triton.jit
def _across(x, R: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr):
    """Butterflies of lanes WIDTH apart: the other lane's value is a reduction's, by exclusive or, without one's own."""
    sign = tl.where((tl.arange(0, L)[None, :] & WIDTH) == 0, 1.0, -1.0)
    y = ()
    for i in tl.static_range(len(x)):
        bits = tl.reshape(x[i].to(tl.int32, bitcast=True), [R, L // (2 * WIDTH), 2, WIDTH])
        other = tl.reshape(bits ^ tl.xor_sum(bits, 2, keep_dims=True), [R, L]).to(tl.float32, bitcast=True)
        y = y + (tl.fma(x[i], sign, other),)
    return y


@triton.jit
def _tree_sum(x, R: tl.constexpr, L: tl.constexpr):
    """The sum [R] of all coordinates by halving them, `tqcore.fixed_point.tree_sum`."""
    for _ in tl.static_range(7):
        if len(x) > 8:
            x = _halve(x)
    lanes = ()
    for i in tl.static_range(8):
        total = x[i]
        for k in tl.static_range(4):
            if (L >> k) > 1:
                total = tl.sum(tl.reshape(total, [R, 2, L >> (k + 1)]), 1)
        lanes = lanes + (tl.reshape(total, [R]),)
    return _halve(_halve(_halve(lanes)))[0]


@triton.jit
def _halve(x):
    y = ()
    for i in tl.static_range(len(x) // 2):
        y = y + (x[i] + x[i + len(x) // 2],)
    return y


@triton.jit
def _search(opposite, r, BOUNDARIES: tl.constexpr, BITS: tl.constexpr):
    """The BITS − 1 bits of the index of a magnitude, the highest first, each 0.0 or 1.0.

    Args:
      opposite: −y. Where its sign is set, y is positive and counts as the next smaller magnitude, and a magnitude on a
        boundary is above it: so a coordinate on a boundary goes down on both sides of zero.
      r: the radius.
      BOUNDARIES: the positive ones.
    """
    bits = opposite.to(tl.int32, bitcast=True)
    z = tl.abs((bits + (bits >> 31)).to(tl.float32, bitcast=True))
    found = ()
    if BITS == 2:
        found = (_reaches(z, BOUNDARIES[0] * r),)
    if BITS == 3:
        m1 = _reaches(z, BOUNDARIES[1] * r)
        m2 = _reaches(z, tl.fma(m1, BOUNDARIES[2] - BOUNDARIES[0], BOUNDARIES[0]) * r)
        found = (m1, m2)
    if BITS == 4:
        m1 = _reaches(z, BOUNDARIES[3] * r)
        m2 = _reaches(z, tl.fma(m1, BOUNDARIES[5] - BOUNDARIES[1], BOUNDARIES[1]) * r)
        lower = tl.fma(m1, BOUNDARIES[4] - BOUNDARIES[0], BOUNDARIES[0])
        steps: tl.constexpr = BOUNDARIES[2] - BOUNDARIES[0]
        step = tl.fma(m1, BOUNDARIES[6] - BOUNDARIES[4] - steps, steps)
        found = (m1, m2, _reaches(z, tl.fma(m2, step, lower) * r))
    return found


@triton.jit
def _place(found, word, FIRST: tl.constexpr, BITS: tl.constexpr):
    """word + the bits found, the last of them at bit FIRST."""
    for n in tl.static_range(BITS - 1):
        word = tl.fma(found[n], 1.0 * (1 << (FIRST + BITS - 2 - n)), word)
    return word


@triton.jit
def _reaches(a, b):
    return tl.where(a >= b, 1.0, 0.0)


@triton.jit
def _centroids(word, TABLE: tl.constexpr, PTX: tl.constexpr):
    """The positive centroid of each nibble of a word, the lowest first, by three bits of it."""
    if PTX:
        found = tl.inline_asm_elementwise(
            CENTROIDS,
            CENTROIDS_CONSTRAINTS,
            [word, TABLE[0], TABLE[1], TABLE[2], TABLE[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        found = ()
        for i in tl.static_range(8):
            index = (word >> (4 * i)) & 7
            first = (tl.where(index < 4, TABLE[0], TABLE[1]) >> (index % 4 * 8)) & 255
            second = (tl.where(index < 4, TABLE[2], TABLE[3]) >> (index % 4 * 8)) & 255
            found = found + (((first << 24) | (second << 16)).to(tl.float32, bitcast=True),)
    return found


@triton.jit
def _indices(word, BITS: tl.constexpr):
    """Nibbles of sign and magnitude as indices: a magnitude's bits are reversed where the sign is not set."""
    negative = (~word >> (BITS - 1)) & 0x11111111
    return word ^ (negative * (2 ** (BITS - 1) - 1))


@triton.jit
def _two_bits(word):
    """Two bits of each nibble, in 16 bits as they are packed."""
    word = word & 0x33333333
    word = (word | (word >> 2)) & 0x0F0F0F0F
    word = (word << 4) | (word >> 8)
    return (word & 0xFF) | ((word >> 8) & 0xFF00)


@triton.jit
def _one_bit(word, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """One bit of each nibble, in 8 bits; FIRST and SECOND are the places of the middle pairs."""
    word = word & 0x11111111
    word = (word | (word >> 3)) & 0x03030303
    return ((word << 6) & 0xC0) | ((word >> 8 & 3) << FIRST) | ((word >> 16 & 3) << SECOND) | (word >> 24)


@triton.jit
def _store_codes(codes_ptr, group, word, live, D: tl.constexpr, BITS: tl.constexpr):
    """Eight indices of each vector, of the coordinates from 8·group on; codes_ptr [R, 1] are those of the vectors."""
    if BITS == 4:
        tl.store((codes_ptr + 4 * group).to(tl.pointer_type(tl.int32), bitcast=True), word, mask=live)
    elif BITS == 1:
        tl.store(codes_ptr + group, _one_bit(word, 4, 2).to(tl.uint8), mask=live)
    else:
        low_ptr = (codes_ptr + 2 * group).to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(low_ptr, _two_bits(word).to(tl.int16), mask=live)
        if BITS == 3:
            tl.store(codes_ptr + D // 4 + group, _one_bit(word >> 2, 2, 4).to(tl.uint8), mask=live)


@triton.jit
def _places(K, S, rows, R: tl.constexpr, TILED: tl.constexpr):
    """(b, k, s, whether it exists) of each of a program's R vectors; TILED: all of one head."""
    if TILED:
        blocks = tl.cdiv(S, R)
        head = tl.program_id(0) // blocks
        s = tl.program_id(0) % blocks * R + tl.arange(0, R)
        live = s < S
    else:
        row = tl.program_id(0) * R + tl.arange(0, R)
        head, s, live = row // S, row % S, row < rows
    return (head // K).to(tl.int64), (head % K).to(tl.int64), s.to(tl.int64), live


@triton.jit
def compress_kernel(
    x_ptr,  # [B, K, S, D] float32 | bfloat16 | float16
    rotation_ptr,  # signs [D] float32, or Rᵀ [D, D] float32 where DENSE
    center_ptr,  # float32, broadcast to x by strides of 0, or None
    codes_ptr,  # [B, K, S, P] uint8, or [pages, K, PAGE, P] with a table
    norms_ptr,  # float32, like codes without P
    starts_ptr,  # [B] int32: where a sequence's vectors go in S, or None: all where they come from
    table_ptr,  # [B, M] int32: the pages of a sequence, or None
    x_stride_b,
    x_stride_k,
    x_stride_s,
    center_stride_b,
    center_stride_k,
    center_stride_s,
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    K,
    S,
    rows,  # B·K·S
    capacity,  # positions of a sequence in codes
    pages,
    table_stride_b,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    BOUNDARIES: tl.constexpr,  # the positive ones
    TABLE: tl.constexpr,  # the positive centroids, as `_centroids` reads them
    FACTOR: tl.constexpr,  # 1/√D
    CORRECTED: tl.constexpr,
    DENSE: tl.constexpr,
    TILED: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    J: tl.constexpr,
    PTX: tl.constexpr,
):
    b, k, s, live = _places(K, S, rows, R, TILED)
    x_row_ptr = x_ptr + b * x_stride_b + k * x_stride_k + s * x_stride_s
    center_row_ptr = center_ptr
    if center_ptr is not None:
        center_row_ptr = center_ptr + b * center_stride_b + k * center_stride_k + s * center_stride_s

    lane = tl.arange(0, L)
    x = _load(x_row_ptr, center_row_ptr, live, D, R, L, J)
    largest = tl.abs(x[0])
    for i in tl.static_range(1, 8 * J):
        largest = tl.maximum(largest, tl.abs(x[i]), propagate_nan=tl.PropagateNan.ALL)
    bits = tl.max(largest.to(tl.int32, bitcast=True), 1)
    usable = (bits < INFINITY_BITS) & (bits >= MIN_EXPONENT_BITS)
    e = tl.where(usable, ((bits + CARRY) >> 23) - BIAS, 0)
    inverse = tl.where(usable, (127 - e) << 23, 0).to(tl.float32, bitcast=True)[:, None]
    scaled = ()
    squares = ()
    for i in tl.static_range(8 * J):
        scaled = scaled + (x[i] * inverse,)
        squares = squares + (scaled[i] * scaled[i],)
    square = _tree_sum(squares, R, L)
    length = tl.sqrt_rn(square)

    if DENSE:
        y = _dense(x_row_ptr, center_row_ptr, rotation_ptr, inverse, live, D, R, L, J)
    else:
        y = _rotate(scaled, rotation_ptr, R, L, J)
    radius = tl.where(usable, length, 1.0)[:, None]
    if starts_ptr is not None:
        b += s * 0  # of each vector, which a mask needs
        s += tl.load(starts_ptr + b, mask=live, other=0)
        live &= (s >= 0) & (s < capacity)
        if table_ptr is not None:
            b = tl.load(table_ptr + b * table_stride_b + s // PAGE, mask=live, other=-1).to(tl.int64)
            live &= (b >= 0) & (b < pages)
            s = s % PAGE
    codes_row_ptr = (codes_ptr + b * codes_stride_b + k * codes_stride_k + s * codes_stride_s)[:, None]
    products = ()
    for j in tl.static_range(J):
        low, high = tl.full([R, L], MAGIC, tl.float32), tl.full([R, L], MAGIC, tl.float32)
        signs = tl.zeros([R, L], tl.uint32)
        magnitudes = ()
        for i in tl.static_range(8):  # from the highest nibble on
            opposite = tl.fma(y[8 * j + (7 - i ^ 1)], -FACTOR, 0.0)  # never -0
            found = _search(opposite, radius, BOUNDARIES, BITS)
            if i < 4:
                high = _place(found, high, 12 - 4 * i, BITS)
            else:
                low = _place(found, low, 28 - 4 * i, BITS)
            signs = (signs << 4) | (opposite.to(tl.uint32, bitcast=True) >> 28)
            magnitudes = magnitudes + (tl.abs(opposite),)
        word = (low.to(tl.int32, bitcast=True) & 0xFFFF) | (high.to(tl.int32, bitcast=True) << 16)
        positive = (signs.to(tl.int32, bitcast=True) >> 3 & 0x11111111) << (BITS - 1)
        index = _indices(tl.where(usable[:, None], word | positive, 0), BITS)
        group = (j * L + lane)[None, :]
        _store_codes(codes_row_ptr, group, index, live[:, None] & (group < D // 8), D, BITS)
        if CORRECTED:
            centroids = _centroids(word, TABLE, PTX)
            for i in tl.static_range(8):
                products = products + (magnitudes[7 - i ^ 1] * centroids[i ^ 1],)
    norm = length
    if CORRECTED:
        along = _tree_sum(products, R, L)
        norm = tl.div_rn(square, tl.where(usable, along, 1.0))
    norm *= ((e + 127) << 23).to(tl.float32, bitcast=True)
    norm = tl.where(bits < INFINITY_BITS, norm, float("nan"))
    tl.store(norms_ptr + b * norms_stride_b + k * norms_stride_k + s * norms_stride_s, norm, mask=live)


@triton.jit
def _load(x_row_ptr, center_row_ptr, live, D: tl.constexpr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """x less its center, as 8·J tensors of [R, L] float32."""
    within = tl.arange(0, L)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x = ()
    for j in tl.static_range(J):
        d = 8 * L * j + within
        inside = live[:, None, None] & (d < D)
        part = tl.load(x_row_ptr[:, None, None] + d, mask=inside, other=0.0).to(tl.float32)
        if center_row_ptr is not None:
            part = part - tl.load(center_row_ptr[:, None, None] + d, mask=inside, other=0.0)
        x = x + _split8(part, R, L)
    return x


@triton.jit
def _rotate(x, signs_ptr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """H (signs ⊙ x): R x but for the factor."""
    within = tl.arange(0, L)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    y = ()
    for j in tl.static_range(J):
        signs = _split8(tl.load(signs_ptr + 8 * L * j + within), 1, L)
        for i in tl.static_range(0, 8, 2):  # the first butterflies: a product by 1 or -1 is exact
            first = x[8 * j + i] * signs[i]
            second = x[8 * j + i + 1]
            y = y + (tl.fma(second, signs[i + 1], first), tl.fma(second, -signs[i + 1], first))
    return _hadamard(y, 1, R, L)


@triton.jit
def _dense(
    x_row_ptr, center_row_ptr, matrix_ptr, inverse, live,
    D: tl.constexpr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """R x̃ as 8·J tensors of [R, L]."""
    column = tl.arange(0, 8 * L * J)[None, :]
    acc = tl.zeros([R, 8 * L * J], tl.float32)
    for first in range(0, D, DENSE_STEP):
        d = first + tl.arange(0, DENSE_STEP)
        inside = live[:, None] & (d[None, :] < D)
        part = tl.load(x_row_ptr[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if center_row_ptr is not None:
            part = part - tl.load(center_row_ptr[:, None] + d[None, :], mask=inside, other=0.0)
        matrix = tl.load(matrix_ptr + d[:, None] * D + column, mask=(d[:, None] < D) & (column < D), other=0.0)
        acc = tl.dot(part * inverse, matrix, acc, input_precision="ieee")
    return _columns(acc, R, L, J)


@triton.jit
def _columns(x, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """[R, 8·L·J] as 8·J tensors of [R, L]."""
    if J == 1:
        y = _split8(tl.reshape(x, [R, L, 8]), R, L)
    else:
        front, back = tl.split(tl.permute(tl.reshape(x, [R, 2, 4 * L * J]), [0, 2, 1]))
        y = _columns(front, R, L, J // 2) + _columns(back, R, L, J // 2)
    return y


@triton.jit
def decompress_kernel(
    codes_ptr,  # [rows, P] uint8
    norms_ptr,  # [rows] float32
    rotation_ptr,  # signs [D] float32, or R [D, D] float32 where DENSE; not read where ROTATED
    center_ptr,  # float32, broadcast to [B, K, S, D] by strides of 0, or None
    out_ptr,  # [rows, D] float32 | bfloat16 | float16
    center_stride_b,
    center_stride_k,
    center_stride_s,
    K,
    S,
    rows,  # B·K·S
    D: tl.constexpr,
    BITS: tl.constexpr,
    TABLE: tl.constexpr,  # the positive centroids, as `_centroids` reads them
    FACTOR: tl.constexpr,  # 1/√D
    ROTATED: tl.constexpr,  # whether the result stays so
    DENSE: tl.constexpr,
    TILED: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    J: tl.constexpr,
    PTX: tl.constexpr,
):
    b, k, s, live = _places(K, S, rows, R, TILED)
    row = (b * K + k) * S + s
    norm = tl.load(norms_ptr + row, mask=live, other=0.0)[:, None]
    lane = tl.arange(0, L)
    codes_row_ptr = codes_ptr + row[:, None] * (D * BITS // 8)
    x = ()
    for j in tl.static_range(J):
        group = (j * L + lane)[None, :]
        index = _load_codes(codes_row_ptr, group, live[:, None] & (group < D // 8), D, BITS)
        word = _indices(index, BITS)  # its own inverse
        centroids = _centroids(word & (0x11111111 * (2 ** (BITS - 1) - 1)), TABLE, PTX)
        for i in tl.static_range(8):
            negative = (~word << (31 - 4 * (i ^ 1) - (BITS - 1))) & SIGN_BIT
            x = x + ((centroids[i ^ 1].to(tl.int32, bitcast=True) ^ negative).to(tl.float32, bitcast=True),)
    if not ROTATED:
        if DENSE:
            x = _dense_back(x, rotation_ptr, D, R, L, J)
        else:
            x = _hadamard(x, 0, R, L)
    within = lane[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    out_row_ptr = (out_ptr + row * D)[:, None, None]
    if center_ptr is not None:
        center_row_ptr = center_ptr + b * center_stride_b + k * center_stride_k + s * center_stride_s
    for j in tl.static_range(J):
        d = 8 * L * j + within
        inside = live[:, None, None] & (d < D)
        part = _join8(
            x[8 * j], x[8 * j + 1], x[8 * j + 2], x[8 * j + 3], x[8 * j + 4], x[8 * j + 5], x[8 * j + 6], x[8 * j + 7], R, L
        )
        if not ROTATED and not DENSE:
            part = part * FACTOR * tl.load(rotation_ptr + d)
        part = part * norm[:, :, None]
        if center_ptr is not None:
            part += tl.load(center_row_ptr[:, None, None] + d, mask=inside, other=0.0)
        tl.store(out_row_ptr + d, part.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_codes(codes_ptr, group, live, D: tl.constexpr, BITS: tl.constexpr):
    """The inverse of `_store_codes`: a word of eight indices."""
    if BITS == 4:
        word = tl.load((codes_ptr + 4 * group).to(tl.pointer_type(tl.int32), bitcast=True), mask=live, other=0)
    elif BITS == 1:
        word = _from_one_bit(tl.load(codes_ptr + group, mask=live, other=0).to(tl.int32), 4, 2)
    else:
        low_ptr = (codes_ptr + 2 * group).to(tl.pointer_type(tl.uint16), bitcast=True)
        low = tl.load(low_ptr, mask=live, other=0).to(tl.int32)
        word = ((low >> 4) & 0x000F) | ((low & 0x000F) << 8) | ((low << 4) & 0x0F0000) | ((low & 0x0F00) << 16)
        word = (word | (word << 2)) & 0x33333333
        if BITS == 3:
            high = tl.load(codes_ptr + D // 4 + group, mask=live, other=0).to(tl.int32)
            word |= _from_one_bit(high, 2, 4) << 2
    return word


@triton.jit
def _from_one_bit(byte, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The inverse of `_one_bit`."""
    word = (byte >> 6) | ((byte >> FIRST & 3) << 8) | ((byte >> SECOND & 3) << 16) | ((byte & 3) << 24)
    return (word | (word << 3)) & 0x11111111


@triton.jit
def _dense_back(x, matrix_ptr, D: tl.constexpr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """Rᵀ x as 8·J tensors of [R, L], by rank-8·L updates."""
    column = tl.arange(0, 8 * L * J)[None, :]
    acc = tl.zeros([R, 8 * L * J], tl.float32)
    for j in tl.static_range(J):
        part = _join8(
            x[8 * j], x[8 * j + 1], x[8 * j + 2], x[8 * j + 3], x[8 * j + 4], x[8 * j + 5], x[8 * j + 6], x[8 * j + 7], R, L
        )
        d = 8 * L * j + tl.arange(0, 8 * L)[:, None]
        matrix = tl.load(matrix_ptr + d * D + column, mask=(d < D) & (column < D), other=0.0)
        acc = tl.dot(tl.reshape(part, [R, 8 * L]), matrix, acc, input_precision="ieee")
    return _columns(acc, R, L, J)
