"""Encoders in Pallas lowered through Triton.

    y = R x̃,  index_d = number of boundaries b with b·‖x̃‖ < y_d,  x̃ = (x − center)·2^−e

Reads D elements of a vector and writes its codes and norm. With a Hadamard rotation compression
equals `tqcore.reference.compress` bit for bit. A vector lies in L lanes: coordinate d = 8·(L·j + lane) + k is number
8·j + k of a list of [R, L] arrays, so that all butterflies but log2(L) and all packing stay within a thread. Its
Triton twin is `tqcore/kernels/compress.py`, which has two lanes a vector in place of four and finds an index by
predicates, where this looks a boundary up across the warp.

Source: docs/format.md, section 4; `prmt`, `shfl` and `tanh`: PTX ISA.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tqcore import fixed_point, tuning
from tqcore.fixed_point import ABS_MASK, INFINITY_BITS, MIN_EXPONENT_BITS, QUERY_LIMIT
from tqcore.kernels import are_many, can_compress, centroid_words, companding, place_table
from tqcore.rotation import inverse_sqrt, matrix, signs
from tqjax import partition

MAX_INDEXED_BYTES = 2**31  # Pallas indexes arrays by signed 32-bit offsets

CARRY, BIAS = fixed_point.exponent_bias(fixed_point.QUERY_LIMIT)
DENSE_STEP = 32  # rows of the matrix that a step of a dense rotation takes

# $0 = ROUNDER + the place of a coordinate $1, that of the last boundary below it and 1, counted from the boundary at
# zero. A hyperbolic tangent of factors $2 and $5 tells which boundary is in question; lane `place % 32` holds that one
# in $4, and $3 is the radius.
FIND = """{
.reg .pred above;
.reg .f32 t;
mul.f32 t, $1, $2;
tanh.approx.f32 t, t;
fma.rn.f32 t, t, $5, 0f4B400000;
mov.b32 $0, t;
shfl.sync.idx.b32 t, $4, $0, 31, -1;
mul.rn.f32 t, t, $3;
setp.gt.f32 above, $1, t;
@above add.s32 $0, $0, 1;
}"""

# The centroid of a nibble of $1, by three bits of it. The float32 of centroids end in two bytes of zeros: $2 $3 are
# the first bytes of the eight, $4 $5 the second ones. A selector of `prmt` with its fourth bit set repeats the sign of
# a byte, which is zero. (Pallas takes one result a call; ptxas merges what the eight calls share.)
CENTROID = """{
.reg .b32 select, first, second;
shr.u32 select, $1, %d;
prmt.b32 first, $2, $3, select;
prmt.b32 second, $4, $5, select;
prmt.b32 $0, first, second, 0x%s;
}"""
PICKS = ("0488", "1599", "26AA", "37BB")


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _split8(x):
    """[R, L, 8] as eight of [R, L], in order."""
    x0, x4, x2, x6, x1, x5, x3, x7 = (
        half for pair in _halves(x) for quarter in _halves(pair) for half in _halves(quarter)
    )
    return [x.reshape(x.shape[:2]) for x in (x0, x1, x2, x3, x4, x5, x6, x7)]


def _halves(x):
    """The even and the odd elements of the last axis."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return [half.reshape(half.shape[:-1]) for half in lax.split(pairs, (1, 1), axis=-1)]


def _join(parts):
    """The inverse, of two, four or eight parts [R, L]."""
    if len(parts) == 1:
        return parts[0][..., None]
    joined = jnp.stack([_join(parts[::2]), _join(parts[1::2])], -1)
    return joined.reshape(*parts[0].shape, len(parts))


def _hadamard(x, first=0):
    """H x by the butterflies of `tqcore.rotation.hadamard`, in its order, from width 2^first on."""
    lanes = x[0].shape[1]
    for i in range(first, 3):
        x = _between(x, 1 << i)
    for i in range(lanes.bit_length() - 1):
        x = _across(x, 1 << i)
    for i in range(3, len(x).bit_length() - 1):
        x = _between(x, 1 << i)
    return x


def _between(x, width):
    """Butterflies of arrays `width` apart."""
    return [x[i ^ width] - x[i] if i & width else x[i] + x[i ^ width] for i in range(len(x))]


def _across(x, width):
    """Butterflies of lanes `width` apart: the other lane's value is a sum of bits without one's own."""
    rows, lanes = x[0].shape
    sign = jnp.where((jnp.arange(lanes)[None, :] & width) == 0, 1.0, -1.0)
    y = []
    for one in x:
        bits = _bits(one).reshape(rows, lanes // (2 * width), 2, width)
        total = jnp.broadcast_to(jnp.sum(bits, axis=2)[:, :, None, :], bits.shape)
        y.append(_float((total - bits).reshape(rows, lanes)) + one * sign)
    return y


def _tree_sum(x):
    """The sum [R] of all coordinates by halving them, `tqcore.fixed_point.tree_sum`."""
    while len(x) > 8:
        x = _halve(x)
    lanes = []
    for one in x:
        rows, width = one.shape
        while width > 1:
            width //= 2
            one = jnp.sum(one.reshape(rows, 2, width), axis=1)
        lanes.append(one.reshape(rows))
    return _halve(_halve(_halve(lanes)))[0]


def _square(x, half, ptx):
    """‖x‖² [R]; squares of 16-bit floats are exact, so that a sum of two may be fused."""
    n = len(x) // 2
    if half and n >= 8:
        return _tree_sum([x[i] * x[i] + _multiply(x[i + n], x[i + n], ptx) for i in range(n)])
    return _tree_sum([_multiply(one, one, ptx) for one in x])


def _scaled(x, half, ptx):
    """x times a power of two, and zeros for what has no direction; ‖x̃‖² and e; whether x has one, is finite: 1 or 0."""
    magnitude = functools.reduce(jnp.maximum, (_bits(one) & ABS_MASK for one in x))
    magnitude = jnp.max(magnitude, axis=1)
    finite = magnitude < INFINITY_BITS
    usable = finite & (magnitude >= MIN_EXPONENT_BITS)
    e = jnp.where(usable, ((magnitude + CARRY) >> 23) - BIAS, 0)
    inverse = _float((127 - e) << 23)[:, None]
    x = [jnp.where(usable[:, None], one, 0.0) * inverse for one in x]
    return (*x, _square(x, half, ptx), e, usable.astype(jnp.int32), finite.astype(jnp.int32))


def _halve(x):
    half = len(x) // 2
    return [x[i] + x[i + half] for i in range(half)]


def _find(y, steepness, radius, bounds, limit, boundaries):
    """Bits of ROUNDER + the place of each coordinate: of the last boundary below it and 1, from that at zero on.

    Args:
      bounds: what lanes hold of the boundaries, or None where nothing is assembled.
      limit: of `tqcore.kernels.companding`.
      boundaries: all of them.
    """
    if bounds is not None and len(boundaries) > 1:
        limit = jnp.full(y.shape, limit, jnp.float32)
        return _assembly(FIND, "=&r,f,f,f,f,f", y, steepness, radius, bounds, limit, dtype=jnp.int32)
    place = jnp.full(y.shape, fixed_point.ROUNDER_BITS - len(boundaries) // 2, jnp.int32)
    return place + sum((y > boundary * radius).astype(jnp.int32) for boundary in boundaries)


def _centroids(word, table, ptx):
    """The positive centroid of each nibble of a word, the lowest first, by three bits of it."""
    found = []
    for i in range(8):
        if ptx:
            arguments = [word, *(jnp.full(word.shape, part, jnp.int32) for part in table)]
            found.append(_assembly(CENTROID % (16 * (i // 4), PICKS[i % 4]), "=f,r,r,r,r,r", *arguments))
        else:
            index = (word >> (4 * i)) & 7
            first = (jnp.where(index < 4, table[0], table[1]) >> (index % 4 * 8)) & 255
            second = (jnp.where(index < 4, table[2], table[3]) >> (index % 4 * 8)) & 255
            found.append(_float((first << 24) | (second << 16)))
    return found


def _indices(word, bits):
    """Nibbles of sign and magnitude as indices: a magnitude's bits are reversed where the sign is not set."""
    negative = (~word >> (bits - 1)) & 0x11111111
    return word ^ (negative * (2 ** (bits - 1) - 1))


def _two_bits(word):
    """Two bits of each nibble, in 16 bits as they are packed."""
    word = word & 0x33333333
    word = (word | (word >> 2)) & 0x0F0F0F0F
    word = (word << 4) | (word >> 8)
    return (word & 0xFF) | ((word >> 8) & 0xFF00)


def _one_bit(word, first, second):
    """One bit of each nibble, in 8 bits; `first` and `second` are the places of the middle pairs."""
    word = word & 0x11111111
    word = (word | (word >> 3)) & 0x03030303
    return ((word << 6) & 0xC0) | ((word >> 8 & 3) << first) | ((word >> 16 & 3) << second) | (word >> 24)


def _store_codes(codes_ref, row, group, word, live, head_dim, bits):
    """Eight indices of each vector, of the coordinates from 8·group on."""

    def store(first, word, count):
        parts = [(word >> (8 * i)).astype(jnp.uint8) for i in range(count)]
        column = first + count * group[:, :, None] + jnp.arange(count)[None, None, :]
        plgpu.store(codes_ref.at[row[:, None, None], column], _join(parts), mask=live[:, :, None])

    if bits == 4:
        store(0, word, 4)
    elif bits == 1:
        store(0, _one_bit(word, 4, 2), 1)
    else:
        store(0, _two_bits(word), 2)
        if bits == 3:
            store(head_dim // 4, _one_bit(word >> 2, 2, 4), 1)


def _assembly(text, constraints, *arguments, dtype=jnp.float32):
    result = jax.ShapeDtypeStruct(arguments[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        text, args=list(arguments), constraints=constraints, pack=1, result_shape_dtypes=[result]
    )[0]


def _multiply(a, b, ptx):
    """a · b rounded once, never fused with an addition: on a CPU by a minimum that changes nothing."""
    b = jnp.broadcast_to(b, a.shape)
    return _assembly("mul.rn.f32 $0, $1, $2;", "=f,f,f", a, b) if ptx else jnp.minimum(a * b, QUERY_LIMIT**2)


def _load(x_ref, center_ref, row, live, center, d):
    """x less its center at coordinates d [1, ...], float32."""
    row, live = (one.reshape(-1, *(1,) * (d.ndim - 1)) for one in (row, live))
    inside = live & (d < x_ref.shape[1])
    x = plgpu.load(x_ref.at[row, d], mask=inside, other=0.0).astype(jnp.float32)
    if center_ref is None:
        return x
    return x - plgpu.load(center_ref.at[center(row), d], mask=inside, other=0.0)


def _rotate(x, signs_ref, within):
    """H (signs ⊙ x): R x but for the factor."""
    y = []
    for j in range(len(x) // 8):
        d = 8 * within.shape[1] * j + within
        signs = _split8(plgpu.load(signs_ref.at[d]))
        for i in range(0, 8, 2):  # the first butterflies: a product by 1 or -1 is exact
            first, second = x[8 * j + i] * signs[i], x[8 * j + i + 1] * signs[i + 1]
            y += [first + second, first - second]
    return _hadamard(y, 1)


def _dense(load, matrix_ref, inverse, usable, constants):
    """R x̃ as 8·J arrays of [R, L]."""
    D, width = constants["D"], 8 * constants["L"] * constants["J"]
    column = jnp.arange(width)[None, :]
    step = min(DENSE_STEP, width)

    def add(i, acc):
        d = i * step + jnp.arange(step)
        part = jnp.where(usable[:, None], load(d[None, :]), 0.0) * inverse
        inside = (d[:, None] < D) & (column < D)
        rows = plgpu.load(matrix_ref.at[d[:, None], column], mask=inside, other=0.0)
        return acc + jnp.dot(part, rows, precision=lax.Precision.HIGHEST)

    acc = jnp.zeros((constants["R"], width), jnp.float32)
    return _columns(lax.fori_loop(0, tuning.ceil_div(D, step), add, acc), constants["J"], constants["L"])


def _columns(x, J, L):
    """[R, 8·L·J] as 8·J arrays of [R, L]."""
    if J == 1:
        return _split8(x.reshape(x.shape[0], L, 8))
    halves = x.reshape(x.shape[0], 2, x.shape[1] // 2).transpose(0, 2, 1)
    front, back = (half.reshape(half.shape[:2]) for half in lax.split(halves, (1, 1), axis=2))
    return _columns(front, J // 2, L) + _columns(back, J // 2, L)


def _compress_kernel(x_ref, rotation_ref, places_ref, *refs, constants, center, corrected, boundaries, ptx):
    """x [rows, D] to codes [rows, P] and norms [rows]; refs: the center's, if any, and those."""
    *center_ref, codes_ref, norms_ref = refs
    R, L, J, D, bits = (constants[name] for name in ("R", "L", "J", "D", "BITS"))
    row = pl.program_id(0) * R + jnp.arange(R)
    live = row < x_ref.shape[0]
    load = functools.partial(_load, x_ref, *(center_ref or (None,)), row, live, center)

    within = jnp.arange(L)[None, :, None] * 8 + jnp.arange(8)[None, None, :]
    x = [one for j in range(J) for one in _split8(load(8 * L * j + within))]
    half = x_ref.dtype.itemsize == 2 and not center_ref
    scale = functools.partial(_scaled, x, half, ptx)
    if half:
        square = _square(x, half, ptx)
        # A vector whose ‖x‖² is ordinary needs no power of two: scaled or not, all sums have the same bits.
        ordinary = ((square > fixed_point.SMALLEST_SQUARE) & (square < fixed_point.LARGEST_SQUARE)).astype(jnp.int32)
        zeros = jnp.zeros(R, jnp.int32)
        *x, square, e, usable, finite = lax.cond(
            jnp.min(ordinary) == 1, lambda: (*x, square, zeros, zeros + 1, zeros + 1), scale
        )
    else:
        *x, square, e, usable, finite = scale()
    usable = usable == 1
    length = _assembly("sqrt.rn.f32 $0, $1;", "=f,f", square) if ptx else jnp.sqrt(square)

    dense = constants["DENSE"]
    inverse = _float((127 - e) << 23)[:, None]
    y = _dense(load, rotation_ref, inverse, usable, constants) if dense else _rotate(x, rotation_ref, within)
    zeros = jnp.zeros((R, L), jnp.float32)
    radius = jnp.where(usable, length, 1.0)[:, None] + zeros
    steepness, bounds = constants["STEEPNESS"] / radius, None
    if ptx:
        lane = _assembly("mov.u32 $0, %laneid; // $1", "=r,r", zeros, dtype=jnp.int32)
        bounds = plgpu.load(places_ref.at[lane])
    products = []
    for j in range(J):
        index = jnp.zeros((R, L), jnp.int32)
        ones = []
        for i in range(8):  # from the highest nibble on
            one = _multiply(y[8 * j + (7 - i ^ 1)], np.float32(constants["FACTOR"]), ptx)
            index = (index << 4) + _find(one, steepness, radius, bounds, constants["LIMIT"], boundaries)
            ones.append(jnp.abs(one))
        index = index + ((2 ** (bits - 1) - 1) * 0x11111111 - fixed_point.ROUNDER_NIBBLES)
        group = (j * L + jnp.arange(L))[None, :]
        _store_codes(codes_ref, row, group, index, live[:, None] & (group < D // 8), D, bits)
        if corrected:
            word = _indices(index, bits) & (0x11111111 * (2 ** (bits - 1) - 1))
            centroids = _centroids(word, constants["TABLE"], ptx)
            products += [_multiply(ones[7 - i ^ 1], centroids[i ^ 1], ptx) for i in range(8)]
    norm = length
    if corrected:
        along = jnp.where(usable, _tree_sum(products), 1.0)
        norm = _assembly("div.rn.f32 $0, $1, $2;", "=f,f,f", square, along) if ptx else square / along
    norm = jnp.where(finite == 1, norm * _float((e + 127) << 23), np.float32(np.nan))
    plgpu.store(norms_ref.at[row], norm, mask=live)


def can_do(quantizer, vectors):
    """Whether the kernels take this quantizer and so many vectors."""
    return can_compress(quantizer) and vectors.size * vectors.dtype.itemsize <= MAX_INDEXED_BYTES


def compress(x, quantizer, center=None, *, interpret=False):
    """x [..., S, D] -> codes [..., S, P], norms [..., S]."""
    shape, rows = x.shape, x.size // x.shape[-1]
    constants = _constants(quantizer, rows)
    kernel = functools.partial(
        _compress_kernel, constants=constants, center=_center_row(center, shape),
        corrected=quantizer.norm == "corrected", ptx=not interpret,
        boundaries=quantizer.codebook.boundaries.tolist(),
    )  # fmt: skip
    arrays = [x.reshape(rows, shape[-1]), _rotation(quantizer, False), jnp.asarray(place_table(quantizer))]
    arrays += [] if center is None else [center.reshape(-1, shape[-1])]
    outs = [
        partition.struct((rows, quantizer.packed_dim), jnp.uint8),
        partition.struct((rows,), jnp.float32),
    ]
    codes, norms = _call(kernel, arrays, outs, constants["R"], rows, interpret, "tq_compress")
    return codes.reshape(*shape[:-1], quantizer.packed_dim), norms.reshape(shape[:-1])


def _call(kernel, arrays, outs, block, rows, interpret, name):
    def whole(x):  # Pallas does not mask blocks that overrun an array, before jax 0.12
        return pl.BlockSpec(x.shape, lambda i: (0,) * len(x.shape))

    return pl.pallas_call(
        kernel,
        grid=(tuning.ceil_div(rows, block),),
        in_specs=[whole(x) for x in arrays],
        out_specs=[whole(x) for x in outs],
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=name,
    )(*arrays)


def _constants(quantizer, rows):
    """What both kernels are compiled for."""
    bits, dense = quantizer.code_bits, quantizer.rotation != "hadamard"
    limit, steepness = companding(quantizer)
    padded = tuning.next_power_of_two(quantizer.head_dim)
    lanes = min(4 if are_many(rows) else 8, padded // 8)
    return {
        "D": quantizer.head_dim,
        "BITS": bits,
        "TABLE": centroid_words(quantizer.codebook.centroids[2 ** (bits - 1) :]),
        "LIMIT": limit,
        "STEEPNESS": steepness,
        "FACTOR": 1.0 if dense else float(inverse_sqrt(quantizer.head_dim)),
        "DENSE": dense,
        "R": 32 // lanes,
        "L": lanes,
        "J": padded // (8 * lanes),
    }


def _center_row(center, shape):
    """The row of a center, as [..., D] of fewer or shorter axes, that belongs to a row of vectors."""
    if center is None:
        return None
    axes = (1,) * (len(shape) - center.ndim) + center.shape

    def find(row):
        found, step = 0, 1
        for size, ours in zip(reversed(shape[:-1]), reversed(axes[:-1]), strict=True):
            if ours > 1:
                found = found + row % size * step
                step *= ours
            row = row // size
        return found + jnp.zeros_like(row)

    return find


def _rotation(quantizer, inverse):
    """Signs, or the matrix that rows are multiplied by."""
    if quantizer.rotation == "hadamard":
        return jnp.asarray(signs(quantizer))
    return jnp.asarray(matrix(quantizer) if inverse else matrix(quantizer).T)
