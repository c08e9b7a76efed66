"""Decoders in Pallas lowered through Triton, the inverse of `tqjax.pallas_compress` and laid out alike.

    x̂ = norm · Rᵀ centroids[index]

Its Triton twin is `tqcore/kernels/decompress.py`.

Source: docs/format.md, section 4.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tqjax import partition
from tqjax.pallas_compress import (
    _bits,
    _call,
    _centroids,
    _columns,
    _constants,
    _float,
    _hadamard,
    _indices,
    _join,
    _rotation,
)  # fmt: skip

SIGN_BIT = -(2**31)


def _decompress_kernel(codes_ref, norms_ref, rotation_ref, out_ref, *, constants, rotated, ptx):
    """codes [rows, P] and norms [rows] to vectors [rows, D]."""
    R, L, J, D, bits, dense = (constants[name] for name in ("R", "L", "J", "D", "BITS", "DENSE"))
    row = pl.program_id(0) * R + jnp.arange(R)
    live = row < norms_ref.shape[0]
    norm = plgpu.load(norms_ref.at[row], mask=live, other=0.0)[:, None, None]
    x = []
    for j in range(J):
        group = (j * L + jnp.arange(L))[None, :]
        index = _load_codes(codes_ref, row, group, live[:, None] & (group < D // 8), D, bits)
        word = _indices(index, bits)  # its own inverse
        centroids = _centroids(word & (0x11111111 * (2 ** (bits - 1) - 1)), constants["TABLE"], ptx)
        for i in range(8):
            negative = (~word << (31 - 4 * (i ^ 1) - (bits - 1))) & SIGN_BIT
            x.append(_float(_bits(centroids[i ^ 1]) ^ negative))
    if not rotated:
        x = _dense_back(x, rotation_ref, constants) if dense else _hadamard(x)
    within = jnp.arange(L)[None, :, None] * 8 + jnp.arange(8)[None, None, :]
    for j in range(J):
        d = 8 * L * j + within
        inside = live[:, None, None] & (d < D)
        part = _join(x[8 * j : 8 * j + 8])
        if not rotated and not dense:
            part = part * np.float32(constants["FACTOR"]) * plgpu.load(rotation_ref.at[d])
        part = part * norm
        plgpu.store(out_ref.at[row[:, None, None], d], part.astype(out_ref.dtype), mask=inside)


def _load_codes(codes_ref, row, group, live, head_dim, bits):
    """The inverse of `_store_codes`: a word of eight indices."""

    def load(first, count):
        parts = []
        for i in range(count):
            place = codes_ref.at[row[:, None], first + count * group + i]
            parts.append(plgpu.load(place, mask=live, other=0).astype(jnp.int32) << (8 * i))
        return functools.reduce(jnp.bitwise_or, parts)

    if bits == 4:
        return load(0, 4)
    if bits == 1:
        return _from_one_bit(load(0, 1), 4, 2)
    low = load(0, 2)
    word = ((low >> 4) & 0x000F) | ((low & 0x000F) << 8) | ((low << 4) & 0x0F0000) | ((low & 0x0F00) << 16)
    word = (word | (word << 2)) & 0x33333333
    return word if bits == 2 else word | (_from_one_bit(load(head_dim // 4, 1), 2, 4) << 2)


def _from_one_bit(byte, first, second):
    """The inverse of `_one_bit`."""
    word = (byte >> 6) | ((byte >> first & 3) << 8) | ((byte >> second & 3) << 16) | ((byte & 3) << 24)
    return (word | (word << 3)) & 0x11111111


def _dense_back(x, matrix_ref, constants):
    """Rᵀ x as 8·J arrays of [R, L], by rank-8·L updates."""
    R, L, J, D = (constants[name] for name in ("R", "L", "J", "D"))
    column = jnp.arange(8 * L * J)[None, :]
    acc = jnp.zeros((R, 8 * L * J), jnp.float32)
    for j in range(J):
        part = _join(x[8 * j : 8 * j + 8]).reshape(R, 8 * L)
        d = 8 * L * j + jnp.arange(8 * L)[:, None]
        rows = plgpu.load(matrix_ref.at[d, column], mask=(d < D) & (column < D), other=0.0)
        acc = acc + jnp.dot(part, rows, precision=lax.Precision.HIGHEST)
    return _columns(acc, J, L)


def decompress(codes, norms, quantizer, dtype, rotated, *, interpret=False):
    """codes [..., S, P], norms [..., S] -> norm · Rᵀ c [..., S, D], or norm · c if rotated."""
    shape, rows = (*norms.shape, quantizer.head_dim), norms.size
    out = partition.struct((rows, quantizer.head_dim), jnp.dtype(dtype))
    constants = _constants(quantizer, rows)
    kernel = functools.partial(_decompress_kernel, constants=constants, rotated=rotated, ptx=not interpret)
    arrays = [codes.reshape(rows, codes.shape[-1]), norms.reshape(rows), _rotation(quantizer, True)]
    (out,) = _call(kernel, arrays, [out], constants["R"], rows, interpret, "tq_decompress")
    return out.reshape(shape)
