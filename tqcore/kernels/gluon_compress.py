"""Encoders in Gluon for many vectors of bfloat16.

    norm, index_d = number of boundaries b with b < (R x)_d / ‖x‖

A warp encodes eight vectors at a time. Lane 4·g + q has of vector g the coordinates 8·q to 8·q + 7 of every 32, as it
reads and as it writes them: number n of a tuple of [8, 4] tensors is coordinate 32·(n // 8) + 8·q + n % 8, and word i
holds numbers 2·i and 2·i + 1. Tensor cores do all butterflies of the Hadamard matrix but of coordinates two apart:
of every four words, the first and the third are one row of a product, the second and the fourth another.

‖x‖ has the order of sums of `tqcore.reference`, and so its bits. Tensor cores truncate, and dividing by ‖x‖ is rounded,
where the oracle multiplies boundaries: a coordinate within rounding of a boundary may fall on its other side.
`compress.py` has no such exception, and takes all that this does not.

Source: docs/format.md, section 4; `mma`, `prmt`, `shfl` and `tanh`: PTX ISA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tqcore import fixed_point
from tqcore.kernels.compress import (
    HALVES,
    LARGEST_SQUARE,
    SMALLEST_SQUARE,
    _flips,
    _halve,
    _store_codes,
    centroids,
    exponent,
    power_of_two,
    slots,
)

MATRIX, SIGNS = gl.constexpr(32), gl.constexpr(288)  # where they start in `tqcore.kernels.gluon_compress_table`
ROUNDER_NIBBLES = gl.constexpr(fixed_point.ROUNDER_NIBBLES)

# Sixteen rows of as many bfloat16, times eight columns, and what is there already.
PRODUCT = gl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)

# $0 = ROUNDER + the place of a coordinate $1, that of the last boundary below it and 1, counted from the boundary at
# zero. A hyperbolic tangent and $3 tell which boundary is in question; lane `place % 32` holds that one in $2.
FIND = gl.constexpr("""{
.reg .pred above;
.reg .f32 t;
tanh.approx.f32 t, $1;
fma.rn.f32 t, t, $3, 0f4B400000;
mov.b32 $0, t;
shfl.sync.idx.b32 t, $2, $0, 31, -1;
setp.gt.f32 above, $1, t;
@above add.s32 $0, $0, 1;
}""")


@gluon.constexpr_function
def _words_layout():
    """[8, 4, 4]: four words a lane."""
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2]], lanes, [], [], [8, 4, 4])


@gluon.constexpr_function
def _lanes_layout():
    """[8, 4]: one word a lane."""
    return gl.DistributedLinearLayout([], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [], [], [8, 4])


@gluon.constexpr_function
def _odd(a, b):
    """Whether row a and column b of a Hadamard matrix meet in −1."""
    return (a & b).bit_count() % 2


@gluon.jit
def _axes():
    """g [8, 1, 1] and q [1, 4, 1], in the layout of four words a lane."""
    LW: gl.constexpr = _words_layout()
    g = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, LW)))
    q = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LW)))
    return g[:, None, None], q[None, :, None]


@gluon.jit
def _four(ptr, live):
    """Four words that lie side by side, as four of [8, 4]; ptr [8, 4, 1]."""
    LW: gl.constexpr = _words_layout()
    LV: gl.constexpr = _lanes_layout()
    at = ptr + gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LW)))[None, None, :]
    even, odd = gl.split(gl.load(at, mask=live).reshape([8, 4, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(w0, LV, assert_trivial=True),
        gl.convert_layout(w1, LV, assert_trivial=True),
        gl.convert_layout(w2, LV, assert_trivial=True),
        gl.convert_layout(w3, LV, assert_trivial=True),
    )


@gluon.jit
def _load(x_ptr, stride, first, T, live, D: gl.constexpr):
    """The words of vectors first to first + 7, or of the last one where there are none."""
    g, q = _axes()
    row_ptr = (x_ptr + gl.minimum(first + g, T - 1).to(gl.int64) * stride).to(gl.pointer_type(gl.int32), bitcast=True)
    words = ()
    for j in gl.static_range(D // 32):
        words += _four(row_ptr + (16 * j + 4 * q), live)
    return words


@gluon.jit
def _matrix(table_ptr):
    """A lane's eight words of it."""
    g, q = _axes()
    at = table_ptr + (MATRIX + 8 * (4 * g + q))
    return _four(at, True) + _four(at + 4, True)


@gluon.jit
def _signed(words, table_ptr):
    """signs ⊙ x."""
    g, q = _axes()
    signed = ()
    for j in gl.static_range(len(words) // 4):
        signs = _four(table_ptr + (SIGNS + 16 * j + 4 * q + 0 * g), True)
        for i in gl.static_range(4):
            signed += (words[4 * j + i] ^ signs[i],)
    return signed


@gluon.jit
def _halves(word):
    return gl.inline_asm_elementwise(HALVES, "=&f,=f,r", [word], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)


@gluon.jit
def _square(words):
    """‖x‖² [8] by halving, `tqcore.fixed_point.tree_sum`; squares of bfloat16 are exact: a sum of two may be fused."""
    HALF: gl.constexpr = len(words) // 2
    squares = ()
    for i in gl.static_range(HALF):
        a0, a1 = _halves(words[i])
        b0, b1 = _halves(words[i + HALF])
        squares += (gl.fma(a0, a0, b0 * b0), gl.fma(a1, a1, b1 * b1))
    for _ in gl.static_range(2):
        if len(squares) > 8:
            squares = _halve(squares)
    rows = ()
    for i in gl.static_range(8):
        rows += (gl.sum(squares[i], 1),)
    return _halve(_halve(_halve(rows)))[0]


@gluon.jit
def _scaled(words):
    """Whether vectors are finite, have a direction too, their exponents, and their words times 2^−exponent or zeros."""
    largest = words[0] & 0x7FFF
    for i in gl.static_range(len(words)):
        largest = gl.maximum(largest, gl.maximum(words[i] & 0x7FFF, (words[i] >> 16) & 0x7FFF))
    finite, usable, e = exponent(gl.max(largest, 1) << 16)
    inverse, scaled = power_of_two(-e)[:, None], ()
    for i in gl.static_range(len(words)):
        low = (words[i] << 16).to(gl.float32, bitcast=True) * inverse
        high = (words[i] & -65536).to(gl.float32, bitcast=True) * inverse
        low = (low.to(gl.uint32, bitcast=True) >> 16).to(gl.int32, bitcast=True)
        scaled += (gl.where(usable[:, None], low | (high.to(gl.int32, bitcast=True) & -65536), 0),)
    return finite, usable, e, scaled


@gluon.jit
def _product(words, first: gl.constexpr, matrix, part: gl.constexpr, sums):
    """sums + four words, from `first` on, times two words of the matrix, from `part` on."""
    a0, a1, a2, a3 = words[first], words[first + 1], words[first + 2], words[first + 3]
    arguments = [a0, a1, a2, a3, matrix[part], matrix[part + 1], sums[0], sums[1], sums[2], sums[3]]
    return gl.inline_asm_elementwise(
        PRODUCT, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", arguments,
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _rotate(words, matrix, factor):
    """factor · H x. Products that sums have in common are computed once: the compiler sees to it."""
    zero = gl.zeros([8, 4], gl.float32, _lanes_layout())
    y = ()
    for j in gl.static_range(len(words) // 4):
        for half in gl.static_range(2):
            z = zero, zero, zero, zero
            for i in gl.static_range(len(words) // 4):
                z = _product(words, 4 * i, matrix, 4 * _odd(i, j) + 2 * half, z)
            # Fused, a difference of zero would not stay one.
            y += ((z[0] + z[2]) * factor, (z[1] + z[3]) * factor, (z[0] - z[2]) * factor, (z[1] - z[3]) * factor)
    return y


@gluon.jit
def _indices(y, first: gl.constexpr, bounds, BITS: gl.constexpr, LIMIT: gl.constexpr):
    """Those of eight numbers, in nibbles as they are packed."""
    index = gl.zeros([8, 4], gl.int32, _lanes_layout())
    for i in gl.static_range(8):  # from the highest nibble on
        arguments = [y[first + (7 - i ^ 1)], bounds, LIMIT]
        place = gl.inline_asm_elementwise(FIND, "=&r,f,f,f", arguments, dtype=gl.int32, is_pure=False, pack=1)
        index = (index << 4) + place
    return (index + ((2 ** (BITS - 1) - 1) * 0x11111111 - ROUNDER_NIBBLES)).to(gl.uint32, bitcast=True)


@gluon.jit
def _along(y, first: gl.constexpr, index, table, sums, BITS: gl.constexpr):
    """sums + |y| · the centroids of eight numbers."""
    magnitude = (index ^ _flips(index & (0x11111111 << (BITS - 1)), BITS)).to(gl.int32, bitcast=True)
    found, more = centroids(magnitude, magnitude >> 16, table, True), ()
    for i in gl.static_range(8):
        more += (gl.fma(gl.abs(y[first + (i ^ 1)]), found[i], sums[i]),)
    return more


@gluon.jit
def compress_kernel(
    x_ptr,  # [B, K, T, D] bfloat16; addresses and strides along B, K and T of 16 bytes
    table_ptr,  # int32: tqcore.kernels.gluon_compress_table
    starts_ptr,  # [B] int32: x[b, :, t] goes to position starts[b] + t; None: to t
    pages_ptr,  # [B, M] int32, or None
    codes_in_ptr,  # codes_ptr and norms_ptr once more, or None: XLA wants what is written in place to be read too
    norms_in_ptr,
    codes_ptr,  # [N, K, S, P] uint8, any strides along N, K and S
    norms_ptr,  # [N, K, S] float32, any strides
    x_stride_b,
    x_stride_k,
    x_stride_t,
    codes_stride_b,
    codes_stride_k,
    codes_stride_s,
    norms_stride_b,
    norms_stride_k,
    norms_stride_s,
    T,
    S,
    N,
    M,
    D: gl.constexpr,
    BITS: gl.constexpr,
    CORRECTED: gl.constexpr,
    SCALE: gl.constexpr,  # 1/√D
    LIMIT: gl.constexpr,  # and STEEPNESS: tqcore.kernels.companding
    STEEPNESS: gl.constexpr,
    CENTROIDS: gl.constexpr,  # the positive ones, as `centroids` reads them
    ALIGNED: gl.constexpr,  # whether words of codes can be stored at once
    STEPS: gl.constexpr,  # of eight vectors each, at most
):
    LV: gl.constexpr = _lanes_layout()
    LR: gl.constexpr = gl.SliceLayout(1, LV)
    k, b = gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64)
    first = gl.program_id(0) * (8 * STEPS)
    steps = gl.minimum((T - first + 7) // 8, STEPS)
    x_ptr += b * x_stride_b + k * x_stride_k
    words = _load(x_ptr, x_stride_t, first, T, True, D)

    matrix = _matrix(table_ptr)
    row = gl.arange(0, 8, layout=LR)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, LV))[None, :] + gl.zeros([8, 4], gl.int32, LV)
    thread = 4 * row[:, None] + lane
    bounds = gl.load(table_ptr + thread).to(gl.float32, bitcast=True) * STEEPNESS
    zero = (first + thread) >> 31  # which the compiler does not know: `prmt` cannot read what it knows to be uniform
    table = CENTROIDS[0] + zero, CENTROIDS[1] + zero, CENTROIDS[2] + zero, CENTROIDS[3] + zero

    for step in range(steps):
        square = _square(words)
        # A vector whose ‖x‖² is ordinary needs no power of two: scaled or not, all sums have the same bits.
        finite, usable, e = square == square, square == square, gl.zeros([8], gl.int32, LR)
        ordinary = ((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))[:, None].to(gl.int32) + 0 * lane
        if gl.min(ordinary.reshape([32]), 0) == 0:
            finite, usable, e, words = _scaled(words)
            square = _square(words)
        length = gl.sqrt_rn(square)
        inverse = gl.rsqrt(gl.where(usable, square, 1.0))
        inverse = gl.fma(inverse, gl.fma(-gl.where(usable, length, 1.0), inverse, 1.0), inverse)  # Newton's step
        factor = inverse * (SCALE * STEEPNESS)
        y = _rotate(_signed(words, table_ptr), matrix, factor[:, None])
        words = _load(x_ptr, x_stride_t, first + 8 * step + 8, T, step + 1 < steps, D)  # while these are encoded

        t = first + 8 * step + row
        page, position, inside = slots(b, k, t.to(gl.int64), t < T, starts_ptr, pages_ptr, S, N, M)
        norm_ptr = norms_ptr + page * norms_stride_b + k * norms_stride_k + position * norms_stride_s
        code_row_ptr = (codes_ptr + page * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]
        nothing = gl.zeros([8, 4], gl.float32, LV)
        along = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
        for j in gl.static_range(D // 32):
            index = _indices(y, 8 * j, bounds, BITS, LIMIT)
            _store_codes(code_row_ptr, lane, 4 * j, index, inside[:, None], D, BITS, ALIGNED)
            if CORRECTED:
                along = _along(y, 8 * j, index, table, along, BITS)
        norm = length
        if CORRECTED:
            total = gl.sum(_halve(_halve(_halve(along)))[0], 1)
            norm = gl.div_rn(square * factor, gl.where(usable, total * SCALE, 1.0))
        gl.store(norm_ptr, gl.where(finite, norm * power_of_two(e), float("nan")), mask=inside)
