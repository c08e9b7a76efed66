"""Encoders in Triton: the device code that tq_torch and tqjax launch.

    norm, index_d = number of boundaries b with b·‖x‖ < (R x)_d

Reads each vector once and writes D·bits/8 + 4 bytes. A vector lies in L lanes: coordinate d = 8·(L·j + lane) + k is
number 8·j + k of a tuple of [V, L] tensors, so that all butterflies but log2(L), and all packing, stay within a thread,
and every sum has the order of `tqcore.reference`. Its Pallas twin is `tqjax/pallas_compress.py`.

Source: docs/format.md, section 4; byte permutes: PTX ISA, `prmt`.
"""

import triton
import triton.language as tl

from tqcore import fixed_point

CARRY, BIAS = (tl.constexpr(value) for value in fixed_point.exponent_bias(fixed_point.QUERY_LIMIT))
ABS_MASK = tl.constexpr(fixed_point.ABS_MASK)
INFINITY_BITS = tl.constexpr(fixed_point.INFINITY_BITS)
MIN_EXPONENT = tl.constexpr(fixed_point.MIN_EXPONENT)
MIN_EXPONENT_BITS = tl.constexpr(fixed_point.MIN_EXPONENT_BITS)
MAGIC = tl.constexpr(8388608.0)  # 2^23: the low bits of MAGIC + n are n
SMALLEST_SQUARE = tl.constexpr(fixed_point.SMALLEST_SQUARE)
LARGEST_SQUARE = tl.constexpr(fixed_point.LARGEST_SQUARE)
ROTATION = tl.constexpr(32)  # where the signs start in `tqcore.kernels.compress_table`

# The centroids of four nibbles of $8 and of four of $9, by three bits of each, from the lowest on; the fourth bit is 0.
# Their float32 end in two bytes of zeros: $10 $11 are the first bytes of the eight, $12 $13 the second ones. A selector
# of `prmt` with its fourth bit set repeats a byte's sign, which is zero.
LOOKUP = tl.constexpr("""{
.reg .b32 first, second;
prmt.b32 first, $10, $11, $8;
prmt.b32 second, $12, $13, $8;
prmt.b32 $0, first, second, 0x0488;
prmt.b32 $1, first, second, 0x1599;
prmt.b32 $2, first, second, 0x26AA;
prmt.b32 $3, first, second, 0x37BB;
prmt.b32 first, $10, $11, $9;
prmt.b32 second, $12, $13, $9;
prmt.b32 $4, first, second, 0x0488;
prmt.b32 $5, first, second, 0x1599;
prmt.b32 $6, first, second, 0x26AA;
prmt.b32 $7, first, second, 0x37BB;
}""")
LOOKUP_CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r")

# By BITS - 1: $0 = $2 + the bits of an index, each of its own weight from $3 on, the lowest first, by a binary search
# among bounds. Predicates select bounds and add; the magnitude comes from a register of integers, so that ptxas takes
# it for free.
FIND = tl.constexpr(
    tuple(
        "{.reg .pred p1, p2, p3; .reg .f32 z, t, u; "
        "add.rz.f32 z, $1, 0f00000001; abs.f32 z, z; mov.f32 $0, $2; " + text + "}"
        for text in (
            "",
            "setp.ge.f32 p1, z, $4; @p1 add.f32 $0, $0, $3;",
            "setp.ge.f32 p1, z, $6; selp.f32 t, $7, $5, p1; setp.ge.f32 p2, z, t; "
            "@p1 add.f32 $0, $0, $4; @p2 add.f32 $0, $0, $3;",
            "setp.ge.f32 p1, z, $9; selp.f32 t, $11, $7, p1; setp.ge.f32 p2, z, t; "
            "selp.f32 t, $10, $6, p1; selp.f32 u, $12, $8, p1; selp.f32 t, u, t, p2; setp.ge.f32 p3, z, t; "
            "@p1 add.f32 $0, $0, $5; @p2 add.f32 $0, $0, $4; @p3 add.f32 $0, $0, $3;",
        )
    )
)
HALVES = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")  # of two bfloat16, as float32


@triton.jit
def floats(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exponent(bits):
    """Whether a vector whose largest magnitude has these bits is finite, has a direction too, and its exponent."""
    finite = bits < INFINITY_BITS
    usable = finite & (bits >= MIN_EXPONENT_BITS)
    e = tl.maximum(((tl.minimum(bits, INFINITY_BITS) + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    return finite, usable, tl.where(usable, e, 0)


@triton.jit
def power_of_two(e):
    return floats((127 + e) << 23)


@triton.jit
def slots(b, k, t, live, starts_ptr, pages_ptr, S, N, M):
    """Row of the first axis, position and whether there is such a place, of vector t of head k of sequence b."""
    row, position, inside = b + t * 0, t, live
    if starts_ptr is not None:
        position += tl.load(starts_ptr + row, mask=live, other=0)
        if pages_ptr is None:
            inside = live & (position >= 0) & (position < S)
        else:
            inside = live & (position >= 0) & (position < M * S)
            page = row * M + tl.where(inside, position, 0) // S
            row = tl.load(pages_ptr + page, mask=inside, other=-1).to(tl.int64)
            inside = inside & (row >= 0) & (row < N)
            position = position % S
    return row, position, inside


@triton.jit
def _split8(x, V: tl.constexpr, L: tl.constexpr):
    """[V, L, 8] as eight of [V, L], in order."""
    even, odd = tl.split(tl.reshape(x, [V, L, 4, 2]))
    x04, x26 = tl.split(tl.reshape(even, [V, L, 2, 2]))
    x15, x37 = tl.split(tl.reshape(odd, [V, L, 2, 2]))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _hadamard(x, FIRST: tl.constexpr, V: tl.constexpr, L: tl.constexpr):
    """H x by the butterflies of `tqcore.rotation.hadamard`, in its order, from width 2^FIRST on."""
    for i in tl.static_range(FIRST, 3):
        x = _between(x, 1 << i)
    for i in tl.static_range(4):
        if (1 << i) < L:
            x = _across(x, V, L, 1 << i)
    for i in tl.static_range(3, 10):
        if (1 << i) < len(x):
            x = _between(x, 1 << i)
    return x


@triton.jit
def _between(x, WIDTH: tl.constexpr):
    """Butterflies of tensors WIDTH apart."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (x[i ^ WIDTH] - x[i] if i & WIDTH else x[i] + x[i ^ WIDTH],)
    return y


@triton.jit
def _across(x, V: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr):
    """Butterflies of lanes WIDTH apart: the other lane's value is a reduction's, by exclusive or, without one's own."""
    sign = tl.where((tl.arange(0, L)[None, :] & WIDTH) == 0, 1.0, -1.0)
    y = ()
    for i in tl.static_range(len(x)):
        bits = tl.reshape(x[i].to(tl.int32, bitcast=True), [V, L // (2 * WIDTH), 2, WIDTH])
        other = tl.reshape(bits ^ tl.xor_sum(bits, 2, keep_dims=True), [V, L]).to(tl.float32, bitcast=True)
        y += (tl.fma(x[i], sign, other),)
    return y


@triton.jit
def _tree_sum(x, V: tl.constexpr, L: tl.constexpr):
    """The sum [V] of all coordinates by halving them, `tqcore.fixed_point.tree_sum`."""
    for _ in tl.static_range(7):
        if len(x) > 8:
            x = _halve(x)
    lanes = ()
    for i in tl.static_range(8):
        total = x[i]
        for k in tl.static_range(4):
            if (L >> k) > 1:
                total = tl.sum(tl.reshape(total, [V, 2, L >> (k + 1)]), 1)
        lanes += (tl.reshape(total, [V]),)
    return _halve(_halve(_halve(lanes)))[0]


@triton.jit
def _square(x, HALF: tl.constexpr, V: tl.constexpr, L: tl.constexpr):
    """‖x‖² [V]; squares of 16-bit floats are exact, so that a sum of two may be fused."""
    squares = ()
    if HALF and len(x) > 8:
        for i in tl.static_range(len(x) // 2):
            other = x[i + len(x) // 2]
            squares += (tl.fma(x[i], x[i], other * other),)
    else:
        for i in tl.static_range(len(x)):
            squares += (x[i] * x[i],)
    return _tree_sum(squares, V, L)


@triton.jit
def _scaled(x, usable, inverse):
    """x times a power of two, and zeros for what has no direction."""
    y = ()
    for i in tl.static_range(len(x)):
        y += (tl.where(usable, x[i], 0.0) * inverse,)
    return y


@triton.jit
def _halve(x):
    y = ()
    for i in tl.static_range(len(x) // 2):
        y += (x[i] + x[i + len(x) // 2],)
    return y


@triton.jit
def _find(opposite, word, bounds, FIRST: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr):
    """word + the BITS − 1 bits of the index of a magnitude, the lowest at bit FIRST.

    Args:
      opposite: −y. Where its sign is set, y is positive and counts as the next smaller magnitude, and a magnitude on a
        boundary is above it: so a coordinate on a boundary goes down on both sides of zero.
      word: MAGIC + an integer.
      bounds: the positive boundaries times the radius.
    """
    if BITS == 1:
        found = word
    elif PTX:
        arguments = (opposite, word)
        for n in tl.static_range(BITS - 1):
            arguments += (1.0 * (1 << (FIRST + n)),)
        found = tl.inline_asm_elementwise(
            FIND[BITS - 1], "=&f,f,f" + ",f" * (BITS - 1 + len(bounds)), arguments + bounds, tl.float32, True, 1
        )
    else:
        bits = opposite.to(tl.int32, bitcast=True)
        z = tl.abs((bits + (bits >> 31)).to(tl.float32, bitcast=True))
        index = tl.where(z >= bounds[0], 1.0, 0.0)
        for i in tl.static_range(1, len(bounds)):
            index += tl.where(z >= bounds[i], 1.0, 0.0)
        found = word + index * (1 << FIRST)
    return found


@triton.jit
def table_words(CENTROIDS: tl.constexpr, t):
    """CENTROIDS + 0 · t, t the places of vectors: else ptxas keeps them in uniform registers, unfit for `prmt`."""
    zero = (t.to(tl.int32) >> 31)[:, None]
    return CENTROIDS[0] + zero, CENTROIDS[1] + zero, CENTROIDS[2] + zero, CENTROIDS[3] + zero


@triton.jit
def centroids(low, high, table, PTX: tl.constexpr):
    """The positive centroids of four nibbles of `low`, from the lowest on, then of `high`; no nibble is above 7."""
    if PTX:
        found = tl.inline_asm_elementwise(
            LOOKUP,
            LOOKUP_CONSTRAINTS,
            [low, high, table[0], table[1], table[2], table[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        found = ()
        for i in tl.static_range(8):
            index = ((low if i < 4 else high) >> (4 * (i % 4))) & 7
            first = (tl.where(index < 4, table[0], table[1]) >> (index % 4 * 8)) & 255
            second = (tl.where(index < 4, table[2], table[3]) >> (index % 4 * 8)) & 255
            found += (((first << 24) | (second << 16)).to(tl.float32, bitcast=True),)
    return found


@triton.jit
def _low_halves(low, high, PTX: tl.constexpr):
    """The lowest 16 bits of two words as one."""
    if PTX:
        return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], tl.int32, True, 1)
    else:
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def _flips(positive, BITS: tl.constexpr):
    """What takes nibbles of magnitudes to indices, and indices to magnitudes and back, by exclusive or.

    A magnitude's bits are reversed where bit BITS − 1 of its nibble is not set in `positive`, else that bit is added.
    """
    return (positive >> (BITS - 1)) + (2 ** (BITS - 1) - 1) * 0x11111111


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
def _store(ptr, word, live, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """The lowest COUNT bytes of a word."""
    if COUNT == 4 and ALIGNED:
        tl.store(ptr.to(tl.pointer_type(tl.int32), bitcast=True), word, mask=live)
    elif COUNT == 2 and ALIGNED:
        tl.store(ptr.to(tl.pointer_type(tl.int16), bitcast=True), word.to(tl.int16), mask=live)
    else:
        for i in tl.static_range(COUNT):
            tl.store(ptr + i, (word >> (8 * i)).to(tl.uint8), mask=live)


@triton.jit
def _store_codes(codes_ptr, lane, FIRST: tl.constexpr, word, live, D: tl.constexpr, BITS: tl.constexpr,
                 ALIGNED: tl.constexpr):  # fmt: skip
    """Eight indices of each vector, of the coordinates from 8·(FIRST + lane) on; codes_ptr [V, 1] are the vectors'."""
    if BITS == 4:
        _store(codes_ptr + 4 * lane + 4 * FIRST, word, live, 4, ALIGNED)
    elif BITS == 1:
        _store(codes_ptr + lane + FIRST, _one_bit(word, 4, 2), live, 1, ALIGNED)
    else:
        _store(codes_ptr + 2 * lane + 2 * FIRST, _two_bits(word), live, 2, ALIGNED)
        if BITS == 3:
            _store(codes_ptr + lane + (D // 4 + FIRST), _one_bit(word >> 2, 2, 4), live, 1, ALIGNED)


@triton.jit
def places(vectors, K, T, V: tl.constexpr, TILED: tl.constexpr):
    """(b, k, t, whether there is such a vector) of a program's V vectors of [B, K, T]; TILED: a grid [T / V, K, B]."""
    if TILED:
        t = tl.program_id(0) * V + tl.arange(0, V)
        k, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
        return b, k, t.to(tl.int64), tl.full([V], 1, tl.int1)
    else:
        v = tl.program_id(0).to(tl.int64) * V + tl.arange(0, V)
        head = v // T
        return head // K, head % K, v % T, v < vectors


@triton.jit
def _load(x_row_ptr, center_row_ptr, live, D: tl.constexpr, V: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
          PTX: tl.constexpr):  # fmt: skip
    """x less its center, as 8·J tensors of [V, L] float32."""
    within = tl.arange(0, L)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    x = ()
    for j in tl.static_range(J):
        d = 8 * L * j + within
        inside = live[:, None, None]
        part = tl.load(x_row_ptr[:, None, None] + d, mask=inside, other=0.0)
        if PTX and part.dtype == tl.bfloat16:
            part = tl.inline_asm_elementwise(HALVES, "=&r,=r,r", [part], tl.int32, True, 2)
            part = part.to(tl.float32, bitcast=True)
        part = part.to(tl.float32)
        if center_row_ptr is not None:
            part = part - tl.load(center_row_ptr[:, None, None] + d, mask=inside, other=0.0)
        x = x + _split8(part, V, L)
    return x


@triton.jit
def _rotate(x, table_ptr, V: tl.constexpr, L: tl.constexpr, J: tl.constexpr, PTX: tl.constexpr):
    """H (signs ⊙ x): R x but for the factor."""
    within = tl.arange(0, L)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    y = ()
    for j in tl.static_range(J):
        signs = _split8(floats(tl.load(table_ptr + ROTATION + 8 * L * j + within)), 1, L)
        for i in tl.static_range(0, 8, 2):  # the first butterflies: a product by 1 or -1 is exact
            first = x[8 * j + i] * signs[i]
            second = x[8 * j + i + 1]
            y += (tl.fma(second, signs[i + 1], first), _less(first, second, signs[i + 1], PTX))
    return _hadamard(y, 1, V, L)


@triton.jit
def _less(a, b, c, PTX: tl.constexpr):
    """a − b · c, rounded once; Triton would negate by a subtraction."""
    if PTX:
        text: tl.constexpr = "{.reg .f32 n; neg.f32 n, $2; fma.rn.f32 $0, n, $3, $1;}"
        return tl.inline_asm_elementwise(text, "=f,f,f,f", [a, b, c], tl.float32, True, 1)
    else:
        return tl.fma(b, -c, a)


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
    SCALE: tl.constexpr,  # 1/√D
    BOUNDARIES: tl.constexpr,  # the positive ones
    CENTROIDS: tl.constexpr,  # the positive ones, as `centroids` reads them
    TILED: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether words of codes can be stored at once
    PTX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    L: tl.constexpr,
):
    J: tl.constexpr = D // (8 * L)
    V: tl.constexpr = BLOCK_V
    b, k, t, live = places(vectors, K, T, V, TILED)
    row, position, inside = slots(b, k, t, live, starts_ptr, pages_ptr, S, N, M)
    x_row_ptr = x_ptr + b * x_stride_b + k * x_stride_k + t * x_stride_t
    center_row_ptr = center_ptr
    if center_ptr is not None:
        center_row_ptr = center_ptr + b * center_stride_b + k * center_stride_k + t * center_stride_t
    norm_ptr = norms_ptr + row * norms_stride_b + k * norms_stride_k + position * norms_stride_s
    code_row_ptr = (codes_ptr + row * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]

    lane = tl.arange(0, L)[None, :]
    HALF: tl.constexpr = center_ptr is None and x_ptr.dtype.element_ty.primitive_bitwidth == 16
    x = _load(x_row_ptr, center_row_ptr, live, D, V, L, J, PTX)
    square = _square(x, HALF, V, L)
    # A vector whose ‖x‖² is ordinary needs no power of two: scaled or not, all sums have the same bits.
    finite, usable, e = square == square, square == square, tl.zeros([V], tl.int32)
    ordinary = ((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE)).to(tl.int32)
    if not HALF or tl.min(tl.reshape(ordinary[:, None] + 0 * lane, [V * L]), 0) == 0:
        largest = tl.abs(x[0])
        for i in tl.static_range(1, 8 * J):
            largest = tl.maximum(largest, tl.abs(x[i]), propagate_nan=tl.PropagateNan.ALL)
        finite, usable, e = exponent(tl.max(largest.to(tl.int32, bitcast=True) & ABS_MASK, 1))
        x = _scaled(x, usable[:, None], power_of_two(-e)[:, None])
        square = _square(x, HALF, V, L)
    length = tl.sqrt_rn(square)

    y = _rotate(x, table_ptr, V, L, J, PTX)
    radius = tl.where(usable, length, 1.0)[:, None] + tl.zeros([V, L], tl.float32)
    bounds = ()
    for i in tl.static_range(len(BOUNDARIES)):
        bounds += (BOUNDARIES[i] * radius,)
    table = table_words(CENTROIDS, t)
    products = ()
    for j in tl.static_range(J):
        low, high = tl.full([V, L], MAGIC, tl.float32), tl.full([V, L], MAGIC, tl.float32)
        signs = tl.zeros([V, L], tl.int32)
        magnitudes = ()
        for i in tl.static_range(8):  # from the highest nibble on
            opposite = tl.fma(y[8 * j + (7 - i ^ 1)], -SCALE, 0.0)  # never -0
            if i < 4:
                high = _find(opposite, high, bounds, 12 - 4 * i, BITS, PTX)
            else:
                low = _find(opposite, low, bounds, 28 - 4 * i, BITS, PTX)
            bits = opposite.to(tl.int32, bitcast=True)
            if i == 0:
                signs = bits >> 28  # its own sign above leaves the word at the top
            else:
                signs = (signs << 4) | (bits.to(tl.uint32, bitcast=True) >> 28).to(tl.int32, bitcast=True)
            magnitudes += (tl.abs(opposite),)
        low, high = low.to(tl.int32, bitcast=True), high.to(tl.int32, bitcast=True)
        positive = (signs.to(tl.uint32, bitcast=True) >> (4 - BITS)) & (0x11111111 << (BITS - 1))
        index = _low_halves(low, high, PTX).to(tl.uint32, bitcast=True) ^ _flips(positive, BITS)
        _store_codes(code_row_ptr, lane, j * L, index, inside[:, None], D, BITS, ALIGNED)
        if CORRECTED:
            found = centroids(low, high, table, PTX)
            for i in tl.static_range(8):
                products += (magnitudes[7 - i ^ 1] * found[i ^ 1],)
    norm = length
    if CORRECTED:
        along = _tree_sum(products, V, L)
        norm = tl.div_rn(square, tl.where(usable, along, 1.0))
    tl.store(norm_ptr, tl.where(finite, norm * power_of_two(e), float("nan")), mask=inside)
