"""Attention scores from packed keys, in Pallas lowered through Triton.

    score[r, s] = (Σ_d n[r, d] · level[index[s, d]]) · (norm[s] · (unit · 2^e[r]))       q[r] ≈ n[r] · 2^e[r]

Reads D/2 + 4 bytes a key, once for all R = T·G query rows of a key head, and writes 4·R bytes.
Equals `tqcore.reference.fused_qk_scores` bit for bit. Its Triton twin is `tqcore/kernels/scores.py`.

Source: the exact integer score of docs/format.md; byte permutes: PTX ISA, `prmt`.
"""

import functools
import math
import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tqcore import fixed_point
from tqcore.fixed_point import ABS_MASK, INFINITY_BITS, MIN_EXPONENT, ROUNDER, ROUNDER_BITS, SMALLEST_NORMAL

MAX_HEAD_DIM = 256
MAX_INDEXED_BYTES = 2**31  # Pallas indexes arrays of up to 2^32 bytes by signed 32-bit offsets

CARRY, BIAS = fixed_point.exponent_bias(fixed_point.QUERY_LIMIT)
NOT_FINITE = 128  # in place of an exponent

# Eight nibbles of $1 through the 16-byte table $2 $6 $10 $14. LOOKUP_FIRST gives the bytes
# [low 0, high 0, low 1, high 1], LOOKUP_SECOND the same of bytes 2 and 3. A selector takes 8 table bytes;
# bit 3 of each nibble picks the half. (Pallas takes one result a call; ptxas merges what they share.)
LOOKUP = """{{
.reg .b32 select, pick, a, b;
and.b32 select, $1, 0x77777777;
shr.u32 pick, $1, 1;
lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA;
{shift}prmt.b32 a, $2, $6, select;
prmt.b32 b, $10, $14, select;
prmt.b32 $0, a, b, pick;
}}"""
LOOKUP_FIRST = LOOKUP.format(shift="")
LOOKUP_SECOND = LOOKUP.format(shift="shr.u32 select, select, 16;\nshr.u32 pick, pick, 16;\n")
LOOKUP_CONSTRAINTS = "=r,r" + ",r" * 16

warnings.filterwarnings("ignore", message=".*Pallas Triton backend is deprecated")


@dataclass(frozen=True)
class Config:
    """How the kernel is launched.

    Args:
      block_r: query rows a program scores, a power of two from 8.
      block_s: keys a step of the loop reads, a power of two.
      blocks: steps a program takes.
      num_warps, num_stages: as in Triton.
    """

    block_r: int
    block_s: int
    blocks: int
    num_warps: int
    num_stages: int


def default_config(rows: int, head_dim: int) -> Config:
    """For R rows and D."""
    block_r = min(32, max(8, pl.next_power_of_2(rows)))
    block_s = 128 if head_dim <= 128 and block_r <= 16 else 64
    return Config(block_r, block_s, blocks=1, num_warps=4, num_stages=1)


def grid(config: Config, rows: int, keys: int, heads: int) -> tuple[int, int, int]:
    """(blocks of keys, key heads, blocks of rows)."""
    return pl.cdiv(keys, config.block_s * config.blocks), heads, pl.cdiv(rows, config.block_r)


def _columns(block_p, ptx):
    """The coordinates that the two operands of `_levels` hold, in their order."""
    c = jnp.arange(block_p)
    if ptx:
        first = 8 * (c // 4) + 2 * (c % 4 // 2) + 1 - c % 2
        return first, first + 4
    return 2 * c, 2 * c + 1


def _levels(codes, words, ptx):
    """The int8 table entries of both nibbles of each byte, as two operands shaped like `codes`."""
    if ptx:
        arguments = [codes, *(jnp.broadcast_to(word, codes.shape) for word in words)]
        return tuple(
            plgpu.elementwise_inline_asm(
                asm, args=arguments, constraints=LOOKUP_CONSTRAINTS, pack=4,
                result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int8)],
            )[0]
            for asm in (LOOKUP_FIRST, LOOKUP_SECOND)
        )  # fmt: skip
    return _level(codes >> 4, words), _level(codes & 15, words)


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


def _flush(x):
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, x * 0.0, x)


def _fixed_point(q_first, q_second):
    """Rows of floats as integers n times 2^e; e = NOT_FINITE for a row with NaN or infinity."""
    bits_first = jnp.max(_bits(q_first) & ABS_MASK, axis=1)
    bits_second = jnp.max(_bits(q_second) & ABS_MASK, axis=1)
    bits = jnp.minimum(jnp.maximum(bits_first, bits_second), INFINITY_BITS)
    e = jnp.maximum(((bits + CARRY) >> 23) - BIAS, MIN_EXPONENT)
    inverse = _float((127 - e) << 23)[:, None]
    n_first = _bits(q_first * inverse + ROUNDER) - ROUNDER_BITS
    n_second = _bits(q_second * inverse + ROUNDER) - ROUNDER_BITS
    return n_first, n_second, jnp.where(bits < INFINITY_BITS, e, NOT_FINITE)


def _plane(n, plane):
    """n = 128·hi + lo as int8: hi where plane is 0, else lo."""
    hi = (n + 64) >> 7
    return jnp.where(plane == 0, hi, n - 128 * hi).astype(jnp.int8)


def _products(levels_first, levels_second, q_first, q_second):
    """⟨level, hi⟩ and ⟨level, lo⟩ of every row and key, [block_r, block_s] int32 each."""
    acc = _dot(q_first, levels_first) + _dot(q_second, levels_second)
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
    table_ref,  # [4·planes + 1] int32: the levels' bytes, the bits of the table's step
    out_ref,  # [R, S] float32
    *,
    scale,
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
    first, second = _columns(block_p, ptx)
    live = row[:, None] < R
    q_first = plgpu.load(q_ref.at[row[:, None], first[None, :]], mask=live & (first[None, :] < D), other=0.0)
    q_second = plgpu.load(q_ref.at[row[:, None], second[None, :]], mask=live & (second[None, :] < D), other=0.0)
    n_first, n_second, e = _fixed_point(q_first.astype(jnp.float32), q_second.astype(jnp.float32))
    q_first, q_second = _plane(n_first, i[:, None] // block_r), _plane(n_second, i[:, None] // block_r)

    # unit · 2^e of each row; the two halves of e are alike.
    words = [table_ref[word] for word in range(4 * planes)]
    step = _float(table_ref[4 * planes])
    e = jnp.max(e.reshape(2, block_r), axis=0)
    power = _float((e + 127) << 23)
    unit = _multiply(jnp.full(block_r, scale, jnp.float32), jnp.broadcast_to(step, block_r), ptx)
    factor = _multiply(unit, jnp.where(e == NOT_FINITE, np.float32(np.nan), power), ptx)

    r = pl.program_id(2) * block_r + jnp.arange(block_r)
    p = jnp.arange(block_p)
    start = pl.program_id(0) * config.blocks * block_s

    def score_block(block, carry):
        s = start + block * block_s + jnp.arange(block_s)
        inside = s < S
        codes = plgpu.load(codes_ref.at[s[:, None], p[None, :]], mask=inside[:, None] & (p[None, :] < D // 2), other=0)
        norm = plgpu.load(norms_ref.at[s], mask=inside, other=0.0)
        norm = jnp.where((_bits(norm) & ABS_MASK) < INFINITY_BITS, norm, np.float32(np.nan))

        levels_first, levels_second = _levels(codes, words[:4], ptx)
        hi, lo = _products(levels_first, levels_second, q_first, q_second)
        if planes == 1:
            total = (hi * 128 + lo).astype(jnp.float32)
        else:
            levels_first, levels_second = _levels(codes, words[4:], ptx)
            hi_low, lo_low = _products(levels_first, levels_second, q_first, q_second)
            total = hi.astype(jnp.float32) * 128.0 + (hi_low + lo).astype(jnp.float32)
            total = total * 128.0 + lo_low.astype(jnp.float32)
        scores = _multiply(total, _multiply(norm[None, :], factor[:, None], ptx), ptx)
        plgpu.store(out_ref.at[r[:, None], s[None, :]], scores, mask=(r[:, None] < R) & inside[None, :])
        return carry

    lax.fori_loop(0, config.blocks, score_block, None)


def fused_qk_scores(q, codes, norms, words, scale, *, interpret=False, config=None):
    """q [B, H, T, D], codes [B, K, S, P], norms [B, K, S], words as in ScoreTable -> [B, H, T, S] float32."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys, packed_dim = codes.shape[1:]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    q, codes, norms = q.reshape(kv, rows, head_dim), codes.reshape(kv, keys, packed_dim), norms.reshape(kv, keys)
    config = config or default_config(rows, head_dim)
    call = functools.partial(_call, words=words, scale=scale, interpret=interpret, config=config)
    if MAX_INDEXED_BYTES < math.prod(codes.shape) <= 2 * MAX_INDEXED_BYTES:
        if kv == 1:
            raise NotImplementedError("'pallas_triton' cannot index 2 to 4 GiB of codes of one key head; 'xla' can.")
        parts = (call(q[part], codes[part], norms[part]) for part in (slice(kv // 2), slice(kv // 2, None)))
        out = jnp.concatenate(list(parts))
    else:
        out = call(q, codes, norms)
    return out.reshape(batch, heads, length, keys)


def _call(q, codes, norms, *, words, scale, interpret, config):
    """q [N, R, D], codes [N, S, P], norms [N, S] -> [N, R, S] float32, N = B·K."""
    (heads, rows, head_dim), keys = q.shape, norms.shape[1]
    kernel = functools.partial(
        _scores_kernel, scale=scale, planes=words.shape[0] // 4, config=config, ptx=not interpret,
        block_p=max(32, pl.next_power_of_2(head_dim // 2)),
    )  # fmt: skip
    of_head = lambda *shape: pl.BlockSpec((None, *shape), lambda s, head, r: (head, *(0 for _ in shape)))  # noqa: E731
    return pl.pallas_call(
        kernel,
        grid=grid(config, rows, keys, heads),
        in_specs=[
            of_head(rows, head_dim),
            of_head(keys, codes.shape[2]),
            of_head(keys),
            pl.BlockSpec(words.shape, lambda s, head, r: (0,)),
        ],
        out_specs=of_head(rows, keys),
        out_shape=jax.ShapeDtypeStruct((heads, rows, keys), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="tq_fused_qk_scores",
    )(q, codes, norms, words)
