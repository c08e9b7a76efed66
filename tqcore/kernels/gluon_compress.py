"""Encoders in Gluon for many vectors of bfloat16.

    norm, index_d = number of boundaries b with b < (R x)_d / ‖x‖

A warp encodes sixteen vectors. Both lanes of a vector read all its words, pairs of coordinates; lane 0 takes from the
first butterflies the sums and lane 1 the differences, so that number i of a tuple of [16, 2] tensors is coordinate
2·i + lane, and no other butterfly leaves a thread. Signs are constants: no coordinate is multiplied by its own, but a
butterfly adds or subtracts as they differ, and the sign of the first one joins the factor.

R x and ‖x‖² have the order of `tqcore.reference`, and so its bits. Dividing by ‖x‖ is rounded, where the oracle
multiplies boundaries: a coordinate within rounding of a boundary may fall on its other side. `compress.py` has no such
exception, and takes all that this does not.

Source: docs/format.md, section 4; `prmt`, `shfl` and `tanh`: PTX ISA.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from tqcore import fixed_point
from tqcore.kernels import GLUON_VECTORS
from tqcore.kernels.compress import (
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

V = gl.constexpr(GLUON_VECTORS)
ROUNDER_NIBBLES = gl.constexpr(fixed_point.ROUNDER_NIBBLES)

# Of a pair of bfloat16 the lane's own as float32, and the other.
OWN = gl.constexpr("prmt.b32 $0, $2, 0, $3; prmt.b32 $1, $2, 0, $4;")

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
LANE = gl.constexpr("mov.u32 $0, %laneid; // $1")

# Both lanes hold nibbles of two words by turns, lane 0 the high ones of their bytes and lane 1 the low ones. Each takes
# one word: $2 turns its own nibbles into place, which $3 masks.
EXCHANGE = gl.constexpr("""{
.reg .b32 own, other;
shfl.sync.bfly.b32 other, $1, 1, 31, -1;
shf.l.wrap.b32 own, $1, $1, $2;
lop3.b32 $0, own, other, $3, 0xE4;
}""")
HIGH_NIBBLES = gl.constexpr(0xF0F0F0F0 - 2**32)


@gluon.constexpr_function
def _words_layout():
    """[V, 2, 4]: four words in turn, in both lanes of a vector."""
    lanes = [[0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2]], lanes, [], [], [16, 2, 4])


@gluon.constexpr_function
def _lanes_layout():
    """[V, 2]: a vector's lanes side by side."""
    return gl.DistributedLinearLayout([], [[0, 1], [1, 0], [2, 0], [4, 0], [8, 0]], [], [], [16, 2])


@gluon.constexpr_function
def _sign(SIGNS, lane, i):
    """What the first butterflies leave out of number i; bit d of SIGNS is set where sign d is −1."""
    return 1 - 2 * (SIGNS >> (2 * i) & 1) if lane == 0 else 2 * (SIGNS >> (2 * i + 1) & 1) - 1


@gluon.constexpr_function
def _ratio(SIGNS, lane, i, WIDTH):
    """The sign of the second operand over that of the first, in the butterfly that makes number i."""
    first = i & ~(2 * WIDTH - 1)
    return _sign(SIGNS, lane, first) * _sign(SIGNS, lane, first | WIDTH) * (-1 if i & WIDTH else 1)


@gluon.constexpr_function
def _first_ratio(SIGNS, i):
    """The same in the first butterfly, for lane 0; for lane 1 it is the opposite."""
    return _sign(SIGNS, 0, i) * -_sign(SIGNS, 1, i)


@gluon.constexpr_function
def _place(i, N):
    """That of number i among N in which fours lie by the bits of their numbers, reversed."""
    bits = (N // 4).bit_length() - 1
    return 4 * int(format(i // 4, f"0{bits}b")[::-1], 2) + i % 4


@gluon.jit
def _plus(a, b, lane_sign, R0: gl.constexpr, R1: gl.constexpr):
    """a + R0 · b in lane 0, a + R1 · b in lane 1."""
    if R0 != R1:
        y = gl.fma(b, lane_sign[0 if R0 > 0 else 1], a)
    elif R0 > 0:
        y = a + b
    else:
        y = a - b
    return y


@gluon.jit
def _four(stage, first: gl.constexpr):
    """Words first to first + 3 of each vector, in both lanes, as four of [V, 2]."""
    LW: gl.constexpr = _words_layout()
    LV: gl.constexpr = _lanes_layout()
    words = gl.expand_dims(stage.slice(first, 4, 1).load(gl.SliceLayout(1, LW)), 1).broadcast_to([V, 2, 4])
    even, odd = gl.split(words.reshape([V, 2, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(w0, LV, assert_trivial=True),
        gl.convert_layout(w1, LV, assert_trivial=True),
        gl.convert_layout(w2, LV, assert_trivial=True),
        gl.convert_layout(w3, LV, assert_trivial=True),
    )


@gluon.jit
def _own(word, select):
    return gl.inline_asm_elementwise(
        OWN, "=&f,=f,r,r,r", [word, select[0], select[1]], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.jit
def _first_of(stage, part: gl.constexpr, STEP: gl.constexpr, select, lane_sign, SIGNS: gl.constexpr):
    """The first butterflies of fours of words part, part + STEP, …, of those D/4 further on, and their sums of squares.

    Depth first, so that few sums wait for others and few words for their turn.
    """
    HALF: gl.constexpr = stage.shape[1] // 2
    front, back, squares = (), (), ()
    if 4 * STEP == HALF:
        a_words, b_words = _four(stage, 4 * part), _four(stage, 4 * part + HALF)
        for n in gl.static_range(4):
            a, a_other = _own(a_words[n], select)
            b, b_other = _own(b_words[n], select)
            front += (gl.fma(a_other, lane_sign[0 if _first_ratio(SIGNS, 4 * part + n) > 0 else 1], a),)
            back += (gl.fma(b_other, lane_sign[0 if _first_ratio(SIGNS, 4 * part + n + HALF) > 0 else 1], b),)
            squares += (gl.fma(a, a, b * b),)  # squares of bfloat16 are exact
    else:
        even = _first_of(stage, part, 2 * STEP, select, lane_sign, SIGNS)
        odd = _first_of(stage, part + STEP, 2 * STEP, select, lane_sign, SIGNS)
        front, back, squares = even[0] + odd[0], even[1] + odd[1], _halve(even[2] + odd[2])
    return front, back, squares


@gluon.jit
def _first(stage, select, lane_sign, SIGNS: gl.constexpr):
    """The first butterflies of all words, in order, and ‖x‖² [V]."""
    front, back, squares = _first_of(stage, 0, 1, select, lane_sign, SIGNS)
    y = ()
    for i in gl.static_range(len(front)):
        y += (front[_place(i, len(front))],)
    for i in gl.static_range(len(back)):
        y += (back[_place(i, len(back))],)
    return y, _sum(squares)


@gluon.jit
def _sum(x):
    """The sum [V] of a tuple by halving it, `tqcore.fixed_point.tree_sum`."""
    for _ in gl.static_range(7):
        if len(x) > 1:
            x = _halve(x)
    return gl.sum(x[0], 1)


@gluon.jit
def _butterflies(y, lane_sign, WIDTH: gl.constexpr, SIGNS: gl.constexpr):
    """Those of numbers WIDTH apart."""
    z = ()
    for i in gl.static_range(len(y)):
        a, b = y[i & ~WIDTH], y[i | WIDTH]
        z += (_plus(a, b, lane_sign, _ratio(SIGNS, 0, i, WIDTH), _ratio(SIGNS, 1, i, WIDTH)),)
    return z


@gluon.jit
def _largest(words):
    """[V]: the bits of the largest magnitude of pairs of bfloat16, as float32."""
    return gl.max(gl.maximum(words & 0x7FFF, (words >> 16) & 0x7FFF), 1) << 16


@gluon.jit
def _scaled(words, usable, inverse):
    """Pairs of bfloat16 times a power of two, or zeros."""
    LR: gl.constexpr = gl.SliceLayout(1, words.type.layout)
    usable, inverse = gl.convert_layout(usable, LR)[:, None], gl.convert_layout(inverse, LR)[:, None]
    low = ((words << 16).to(gl.float32, bitcast=True) * inverse).to(gl.uint32, bitcast=True) >> 16
    high = ((words & -65536).to(gl.float32, bitcast=True) * inverse).to(gl.int32, bitcast=True) & -65536
    return gl.where(usable, low.to(gl.int32, bitcast=True) | high, 0)


@gluon.jit
def _two_words(y, along, n: gl.constexpr, factor, bounds, table, code_row_ptr, inside, lane, turn, own, D: gl.constexpr,
               BITS: gl.constexpr, CORRECTED: gl.constexpr, LIMIT: gl.constexpr, ALIGNED: gl.constexpr):  # fmt: skip
    """Stores words n + 4·(n // 4) and the fourth after it, of eight coordinates each; adds to |y| · centroid."""
    FIRST: gl.constexpr = n // 4 * 8 + n % 4
    index = gl.zeros([V, 2], gl.int32, _lanes_layout())
    magnitudes, sums = (), ()
    for i in gl.static_range(8):  # from the highest nibble on, the words by turns
        one = y[4 * (FIRST + 4 * (1 - i % 2)) + 3 - i // 2] * factor
        arguments = [one, bounds, LIMIT]
        place = gl.inline_asm_elementwise(FIND, "=&r,f,f,f", arguments, dtype=gl.int32, is_pure=False, pack=1)
        index = (index << 4) + place
        magnitudes += (gl.abs(one),)
    index += (2 ** (BITS - 1) - 1) * 0x11111111 - ROUNDER_NIBBLES
    word = gl.inline_asm_elementwise(EXCHANGE, "=r,r,r,r", [index, turn, own], dtype=gl.int32, is_pure=False, pack=1)
    _store_codes(code_row_ptr, 4 * lane, FIRST, word, inside, D, BITS, ALIGNED)
    if CORRECTED:
        index = index.to(gl.uint32, bitcast=True)
        index = (index ^ _flips(index & (0x11111111 << (BITS - 1)), BITS)).to(gl.int32, bitcast=True)
        found = centroids(index, index >> 16, table, True)
        for i in gl.static_range(8):
            sums += (gl.fma(magnitudes[7 - i], found[i], along[i]),)
    return sums


@gluon.jit
def compress_kernel(
    x_ptr,  # [B, K, T, D] bfloat16, T a multiple of V; addresses and strides along B, K and T of 16 bytes
    places_ptr,  # [32] float32: tqcore.kernels.place_table
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
    S,
    N,
    M,
    D: gl.constexpr,
    BITS: gl.constexpr,
    CORRECTED: gl.constexpr,
    SIGNS: gl.constexpr,  # bit d is set where the sign of coordinate d is −1
    SCALE: gl.constexpr,  # 1/√D
    LIMIT: gl.constexpr,  # and STEEPNESS: tqcore.kernels.companding
    STEEPNESS: gl.constexpr,
    CENTROIDS: gl.constexpr,  # the positive ones, as `centroids` reads them
    ALIGNED: gl.constexpr,  # whether words of codes can be stored at once
):
    WORDS: gl.constexpr = D // 2
    LV: gl.constexpr = _lanes_layout()
    LR: gl.constexpr = gl.SliceLayout(1, LV)
    LX: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [1, 1], [1, 0])
    k, b = gl.program_id(1).to(gl.int64), gl.program_id(2).to(gl.int64)
    first = gl.program_id(0) * V

    stage = gl.allocate_shared_memory(gl.int32, [V, WORDS], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    x_ptr += b * x_stride_b + k * x_stride_k + first.to(gl.int64) * x_stride_t
    at = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + gl.arange(0, WORDS, layout=gl.SliceLayout(0, LX))[None, :]
    at += gl.arange(0, V, layout=gl.SliceLayout(1, LX))[:, None] * (x_stride_t // 2)
    async_copy.async_copy_global_to_shared(stage, at)
    async_copy.commit_group()
    zeros = gl.zeros([V, 2], gl.int32, LV)
    lane = gl.arange(0, 2, layout=gl.SliceLayout(0, LV))[None, :] + zeros
    thread = gl.inline_asm_elementwise(LANE, "=r,r", [zeros], dtype=gl.int32, is_pure=True, pack=1)
    bounds = gl.load(places_ptr + thread) * STEEPNESS
    select = gl.where(lane == 0, 0x1044, 0x3244), gl.where(lane == 0, 0x3244, 0x1044)
    lane_sign = gl.where(lane == 0, 1.0, -1.0), gl.where(lane == 0, -1.0, 1.0)
    async_copy.wait_group(0)

    # A vector whose ‖x‖² is ordinary needs no power of two: scaled or not, all sums have the same bits.
    y, square = _first(stage, select, lane_sign, SIGNS)
    finite, usable, e = square == square, square == square, gl.zeros([V], gl.int32, LR)
    ordinary = ((square > SMALLEST_SQUARE) & (square < LARGEST_SQUARE))[:, None].to(gl.int32) + zeros
    if gl.min(ordinary.reshape([2 * V]), 0) == 0:
        words = stage.load(LX)
        finite, usable, e = exponent(gl.convert_layout(_largest(words), LR))
        stage.store(_scaled(words, usable, power_of_two(-e)))
        y, square = _first(stage, select, lane_sign, SIGNS)
    for n in gl.static_range(6):
        if (1 << n) < len(y):
            y = _butterflies(y, lane_sign, 1 << n, SIGNS)

    zero = (first + thread) >> 31  # which the compiler does not know: `prmt` cannot read what it knows to be uniform
    table = CENTROIDS[0] + zero, CENTROIDS[1] + zero, CENTROIDS[2] + zero, CENTROIDS[3] + zero
    turn, own = gl.where(lane == 0, 4, 28), gl.where(lane == 0, HIGH_NIBBLES, ~HIGH_NIBBLES)
    length = gl.sqrt_rn(square)
    size = gl.where(usable, length, 1.0)
    inverse = gl.rsqrt(gl.where(usable, square, 1.0))
    inverse = gl.fma(inverse, gl.fma(-size, inverse, 1.0), inverse)  # Newton's step
    factor = inverse[:, None] * gl.where(lane == 0, _sign(SIGNS, 0, 0), _sign(SIGNS, 1, 0)) * (SCALE * STEEPNESS)
    t = (first + gl.arange(0, V, layout=LR)).to(gl.int64)
    row, position, inside = slots(b, k, t, gl.full([V], True, gl.int1, LR), starts_ptr, pages_ptr, S, N, M)
    norm_ptr = norms_ptr + row * norms_stride_b + k * norms_stride_k + position * norms_stride_s
    code_row_ptr = (codes_ptr + row * codes_stride_b + k * codes_stride_k + position * codes_stride_s)[:, None]
    nothing = zeros.to(gl.float32)
    along = nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing
    for n in gl.static_range(D // 16):
        along = _two_words(
            y, along, n, factor, bounds, table, code_row_ptr, inside[:, None], lane, turn, own,
            D, BITS, CORRECTED, LIMIT, ALIGNED,
        )  # fmt: skip
    norm = length
    if CORRECTED:
        norm = gl.div_rn(square, gl.where(usable, _sum(along) * (length / STEEPNESS), 1.0))
    gl.store(norm_ptr, gl.where(finite, norm * power_of_two(e), float("nan")), mask=inside)
