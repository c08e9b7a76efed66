"""Attention scores from packed keys, in Pallas lowered through Triton.

    score[r, s] = (Σ_d n[r, d] · level[index[s, d]]) · (norm[s] · (unit · 2^e[r]))       q[r] ≈ n[r] · 2^e[r]

Reads P + 4 bytes a key, once for all R = T·G query rows of a key head, and writes 4·R bytes.
Equals `tqcore.reference.fused_qk_scores` bit for bit. Its Triton twin is `tqcore/kernels/scores.py`.

Source: the exact integer score of docs/format.md; byte permutes: PTX ISA, `prmt`.
"""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tqcore import fixed_point, tuning
from tqcore.fixed_point import ABS_MASK, INFINITY_BITS, MIN_EXPONENT, ROUNDER, ROUNDER_BITS, SMALLEST_NORMAL
from tqcore.kernels import lookup
from tqcore.packing import code_bits
from tqjax import device, partition

MAX_INDEXED_BYTES = 2**31  # Pallas indexes arrays of up to 2^32 bytes by signed 32-bit offsets

CARRY, BIAS = fixed_point.exponent_bias(fixed_point.QUERY_LIMIT)
NOT_FINITE = 128  # in place of an exponent

warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated")


def _load_codes(codes_ref, key, inside, head_dim, block_p, bits, ptx):
    """Codes of keys [keys, 1], zeros where not `inside`: what `_levels` takes.

    Bytes of codes, or of the low plane, and for each of them a byte with its high bits.
    """
    width, live = (block_p, head_dim // 2) if bits == 4 else (block_p // 2, head_dim // 4)
    p = jnp.arange(width)[None, :]
    codes = plgpu.load(codes_ref.at[key, p], mask=inside & (p < live), other=0)
    if bits != 3:
        return codes, jnp.zeros_like(codes)
    p = jnp.arange(width // 2)[None, :]
    high = plgpu.load(codes_ref.at[key, live + p], mask=inside & (p < head_dim // 8), other=0)
    shifted = _assembly(lookup.SHIFT, lookup.SHIFT_CONSTRAINTS, high).astype(jnp.uint8) if ptx else high << 2
    return codes, jnp.stack([high, shifted], -1).reshape(codes.shape)


def _levels(codes, high, words, bits, ptx):
    """The int8 table entries of the even and of the odd coordinates."""
    if ptx:
        table = (jnp.broadcast_to(word, codes.shape) for word in words[: lookup.WORDS[bits]])
        arguments = [codes, *([high] if bits == 3 else []), *table]
        fields = [
            _assembly(lookup.of_field(bits, field), lookup.constraints(bits, 1), *arguments)
            for field in range(lookup.FIELDS[bits])
        ]
    elif bits == 4:
        fields = [_level(codes >> 4, words), _level(codes & 15, words)]
    else:
        fields = [_level(index, words) for index in _indices(codes, high)]
    if bits == 4:
        return fields
    shape = codes.shape[0], 2 * codes.shape[1]
    return jnp.stack(fields[::2], -1).reshape(shape), jnp.stack(fields[1::2], -1).reshape(shape)


def _indices(codes, high):
    """The four indices of each byte of a low plane and of what `_load_codes` puts beside it."""
    return (
        codes >> 6 | (high >> 5 & 4),
        (codes >> 4 & 3) | (high >> 4 & 4),
        (codes >> 2 & 3) | (high >> 1 & 4),
        (codes & 3) | (high & 4),
    )


def _assembly(text, constraints, *arguments):
    """int8, four in a register. Pallas takes one result a call; ptxas merges what calls share."""
    shape = jax.ShapeDtypeStruct(arguments[0].shape, jnp.int8)
    return plgpu.elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=4, result_shape_dtypes=[shape]
    )[0]


def _level(index, words):
    """The int8 table entry of each index, by shifts."""
    w0, w1, w2, w3 = words
    index = index.astype(jnp.int32)
    word = jnp.where(index < 8, jnp.where(index < 4, w0, w1), jnp.where(index < 12, w2, w3))
    return (word >> (index % 4 * 8)).astype(jnp.int8)


def _multiply(a, b, ptx):
    """a · b rounded once, never fused with an addition, subnormals as zeros."""
    if ptx:
        shape = jnp.broadcast_shapes(a.shape, b.shape)
        return plgpu.elementwise_inline_asm(
            "mul.rn.ftz.f32 $0, $1, $2;", args=[jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)],
            constraints="=f,f,f", pack=1, result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
        )[0]  # fmt: skip
    return _flush(_flush(a) * _flush(b))


def _finite(x, ptx):
    """x, or NaN where it is not finite: x·0 + x."""
    if ptx:
        return plgpu.elementwise_inline_asm(
            "fma.rn.ftz.f32 $0, $1, 0f00000000, $1;", args=[x], constraints="=f,f", pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
        )[0]  # fmt: skip
    return jnp.where((_bits(x) & ABS_MASK) < INFINITY_BITS, x, np.float32(np.nan))


def _flush(x):
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, x * 0.0, x)


def _fixed_point(q_even, q_odd):
    """Rows of floats as integers n times 2^e; e = NOT_FINITE for a row with NaN or infinity."""
    bits_even = jnp.max(_bits(q_even) & ABS_MASK, axis=1)
    bits_odd = jnp.max(_bits(q_odd) & ABS_MASK, axis=1)
    bits = jnp.minimum(jnp.maximum(bits_even, bits_odd), INFINITY_BITS)
    e = jnp.maximum(((bits + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    inverse = _float((127 - e) << 23)[:, None]
    n_even = _bits(q_even * inverse + ROUNDER) - ROUNDER_BITS
    n_odd = _bits(q_odd * inverse + ROUNDER) - ROUNDER_BITS
    return n_even, n_odd, jnp.where(bits < INFINITY_BITS, e, NOT_FINITE)


def _plane(n, plane):
    """n = 128·hi + lo as int8: hi where plane is 0, else lo."""
    hi = (n + 64) >> 7
    return jnp.where(plane == 0, hi, n - 128 * hi).astype(jnp.int8)


def _products(levels_even, levels_odd, q_even, q_odd):
    """⟨level, hi⟩ and ⟨level, lo⟩ of every row and key, [block_r, block_s] int32 each."""
    acc = _dot(q_even, levels_even) + _dot(q_odd, levels_odd)
    return jnp.split(acc, 2)


def _dot(a, b):
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _scores_kernel(
    q_ref,  # [R, D] float32 | bfloat16 | float16
    codes_ref,  # [S, P] uint8
    norms_ref,  # [S] float32
    table_ref,  # [4·planes + 1] int32: the levels' bytes, the bits of unit: scale times the table's step
    out_ref,  # [R, S] float32
    *,
    bits,
    planes,
    block_p,
    config,
    ptx,
):
    (R, D), S = q_ref.shape, norms_ref.shape[0]
    block_r, block_s = config.block_r, config.block_s

    # The query rows, twice: their hi planes, then their lo planes.
    i = jnp.arange(2 * block_r)
    row = pl.program_id(2) * block_r + i % block_r
    p = jnp.arange(block_p)
    live = (row[:, None] < R) & (p[None, :] < D // 2)
    q_even = plgpu.load(q_ref.at[row[:, None], 2 * p[None, :]], mask=live, other=0.0)
    q_odd = plgpu.load(q_ref.at[row[:, None], 2 * p[None, :] + 1], mask=live, other=0.0)
    n_even, n_odd, e = _fixed_point(q_even.astype(jnp.float32), q_odd.astype(jnp.float32))
    q_even, q_odd = _plane(n_even, i[:, None] // block_r), _plane(n_odd, i[:, None] // block_r)

    # unit · 2^e of each row; the two halves of e are alike.
    words = [table_ref[word] for word in range(4 * planes)]
    e = jnp.max(e.reshape(2, block_r), axis=0)
    power = _float((e + 127) << 23)
    unit = _float(table_ref[4 * planes])
    factor = _multiply(jnp.broadcast_to(unit, block_r), jnp.where(e == NOT_FINITE, np.float32(np.nan), power), ptx)

    r = pl.program_id(2) * block_r + jnp.arange(block_r)
    start = pl.program_id(0) * config.blocks * block_s

    def score_block(block, carry):
        s = start + block * block_s + jnp.arange(block_s)
        inside = s < S
        codes, high = _load_codes(codes_ref, s[:, None], inside[:, None], D, block_p, bits, ptx)
        norm = _finite(plgpu.load(norms_ref.at[s], mask=inside, other=0.0), ptx)

        levels_even, levels_odd = _levels(codes, high, words[:4], bits, ptx)
        hi, lo = _products(levels_even, levels_odd, q_even, q_odd)
        if planes == 1:
            total = (hi * 128 + lo).astype(jnp.float32)
        else:
            levels_even, levels_odd = _levels(codes, high, words[4:], bits, ptx)
            hi_low, lo_low = _products(levels_even, levels_odd, q_even, q_odd)
            total = hi.astype(jnp.float32) * 128.0 + (hi_low + lo).astype(jnp.float32)
            total = total * 128.0 + lo_low.astype(jnp.float32)
        scores = _multiply(total, _multiply(norm[None, :], factor[:, None], ptx), ptx)
        plgpu.store(out_ref.at[r[:, None], s[None, :]], scores, mask=(r[:, None] < R) & inside[None, :])
        return carry

    lax.fori_loop(0, config.blocks, score_block, None)


def fused_qk_scores(q, codes, norms, words, *, interpret=False, config=None):
    """q [B, H, T, D], codes [B, K, S, P], norms [B, K, S], words with the scale in them -> [B, H, T, S] float32."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys, packed_dim = codes.shape[1:]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    q, codes, norms = q.reshape(kv, rows, head_dim), codes.reshape(kv, keys, packed_dim), norms.reshape(kv, keys)
    config = config or tuning.score_config("triton", rows, keys, kv, head_dim, device.cuda_kind())
    call = functools.partial(_call, words=words, interpret=interpret, config=config)
    if MAX_INDEXED_BYTES < math.prod(codes.shape) <= 2 * MAX_INDEXED_BYTES:
        if kv == 1:
            raise NotImplementedError("'pallas_triton' cannot index 2 to 4 GiB of codes of one key head; 'xla' can.")
        parts = (call(q[part], codes[part], norms[part]) for part in (slice(kv // 2), slice(kv // 2, None)))
        out = jnp.concatenate(list(parts))
    else:
        out = call(q, codes, norms)
    return out.reshape(batch, heads, length, keys)


def _call(q, codes, norms, *, words, interpret, config):
    """q [N, R, D], codes [N, S, P], norms [N, S] -> [N, R, S] float32, N = B·K."""
    (heads, rows, head_dim), keys = q.shape, norms.shape[1]
    kernel = functools.partial(
        _scores_kernel, bits=code_bits(codes.shape[2], head_dim), planes=words.shape[0] // 4,
        block_p=tuning.packed_block(head_dim), config=config, ptx=not interpret,
    )  # fmt: skip

    def of_head(*shape):  # all of one key head: Pallas does not mask blocks that overrun an array, before jax 0.12
        return pl.BlockSpec((None, *shape), lambda s, head, r: (head, *(0 for _ in shape)))

    return pl.pallas_call(
        kernel,
        grid=config.grid(rows, keys, heads),
        in_specs=[
            of_head(rows, head_dim),
            of_head(keys, codes.shape[2]),
            of_head(keys),
            pl.BlockSpec(words.shape, lambda s, head, r: (0,)),
        ],
        out_specs=of_head(rows, keys),
        out_shape=partition.struct((heads, rows, keys), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="tq_fused_qk_scores",
    )(q, codes, norms, words)
