"""Attention over packed keys and values, in Pallas lowered through Triton.

    out[r] = Σ_s softmax_s(score[r, s]) · norm[s] · level[index[s]]      scores as in `tqjax/pallas_scores.py`

Its Triton twin is `tqcore/kernels/attention.py`, which says how weights fit float16. Query and output are rotated, and
the parts of the positions merged, by XLA.

Source: Dao, FlashAttention-2, arXiv:2307.08691; the exact integer score of docs/format.md.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tqcore import fixed_point, softmax, tuning
from tqcore.kernels import lookup
from tqjax import device, partition, xla
from tqjax.pallas_scores import (
    MAX_INDEXED_BYTES,
    NOT_FINITE,
    _assembly,
    _bits,
    _dot,
    _finite,
    _fixed_point,
    _float,
    _indices,
    _level,
    _levels,
    _load_codes,
    _plane,
)

LOG2_E = math.log2(math.e)
LEAST_NORM, LARGEST_NORM = 2.0**-110, 2.0**110  # of which w / |norm| stays a float32
HALF_UNIT = np.float32(2.0**-24)  # the least float16
NAN, NOTHING = np.float32(np.nan), np.float32(-np.inf)


def _beside(even, odd):
    """[rows, columns] twice -> [rows, 2·columns], one after the other: no byte leaves its register.

    For int8 alone: of float16, XLA's Triton (jax 0.11.2) swapped the parity of a column with its lowest bit on an H100.
    """
    rows, columns = even.shape
    return jnp.stack([even, odd], -1).transpose(0, 2, 1).reshape(rows, 2 * columns)


def _apply(x, asm):
    """One instruction on each float."""
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return plgpu.elementwise_inline_asm(asm, args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape])[0]


def _exp2(x, ptx):
    return _apply(x, "ex2.approx.ftz.f32 $0, $1;") if ptx else jnp.exp2(x)


def _log2(x, ptx):
    return _apply(x, "lg2.approx.ftz.f32 $0, $1;") if ptx else jnp.log2(x)


def _inverse(x, ptx):
    return _apply(x, "rcp.approx.ftz.f32 $0, $1;") if ptx else 1.0 / x


def _magnitudes(table_ref, bits):
    """Two words: the positive levels of sixteen, or those of fewer after the same reversed."""
    if bits == 4:
        return table_ref[2], table_ref[3]
    word = table_ref[1] if bits == 3 else table_ref[0] >> 16
    return word >> 24 | (word >> 8 & 0xFF00) | (word << 8 & 0xFF0000) | word << 24, word


def _nibbles(codes, high, bits, ptx):
    """Two indices a byte; at 2 and 3 bits plus 4 - 2^bits / 2, of fields 0 and 1 of all bytes, then of the others."""
    if bits == 4:
        return codes
    if ptx:
        arguments = [codes, *([high] if bits == 3 else [])]
        front, back = (
            _assembly(text, lookup.NIBBLES_CONSTRAINTS[bits], *arguments).astype(jnp.uint8)
            for text in lookup.NIBBLES[bits]
        )
    else:
        a, b, c, d = (index + (4 - 2**bits // 2) for index in _indices(codes, high))
        front, back = a << 4 | b, c << 4 | d
    return _beside(front, back)


def _half(nibbles, words, low, bits, ptx):
    """level · 2^-24 of the high or the low nibbles as float16."""
    if ptx:
        shape = jax.ShapeDtypeStruct(nibbles.shape, jnp.float16)
        arguments = [nibbles, *(jnp.broadcast_to(word, nibbles.shape) for word in words)]
        return plgpu.elementwise_inline_asm(
            lookup.HALVES[bits][low], args=arguments, constraints=lookup.HALVES_CONSTRAINTS, pack=4,
            result_shape_dtypes=[shape],
        )[0]  # fmt: skip
    index = nibbles & 15 if low else nibbles >> 4
    byte = jnp.where(index < 8, 7 - index, index - 8) if bits == 4 else index
    level = _level(byte, [*words, *words]).astype(jnp.float32) * HALF_UNIT
    return jnp.where(index < (8 if bits == 4 else 4), -level, level).astype(jnp.float16)


def _query(q_ref, row, block_p):
    """Even and odd coordinates [rows, block_p] of the query rows."""
    (R, D), p = q_ref.shape, jnp.arange(block_p)[None, :]
    live = (row[:, None] < R) & (p < D // 2)
    halves = (plgpu.load(q_ref.at[row[:, None], 2 * p + odd], mask=live, other=0.0) for odd in (0, 1))
    return [half.astype(jnp.float32) for half in halves]


def _soft_cap(x, cap, ptx):
    """cap · tanh(x / cap)."""
    return cap - 2 * cap / (1 + _exp2(x * (2 * LOG2_E / cap), ptx))


def _attention_kernel(
    q_ref,  # [R, D] float32 | bfloat16 | float16, rows g·T + t, rotated
    k_codes_ref,  # [(B or N)·K·(S or page), P] uint8
    k_norms_ref,  # [(B or N)·K·(S or page)] float32
    k_table_ref,  # [5] int32: the levels' bytes, the bits of the table's step
    v_codes_ref,
    v_norms_ref,
    v_table_ref,
    lengths_ref,  # [B] int32
    *refs,  # pages [B·M] int32 where there are any; then
    # out [R, D] float32: Σ 2^(x - m) · norm · level
    # ml [2, R] float32: m, then Σ 2^(x - m)
    steps,
    slots,
    kv_heads,
    page,
    bits,
    options,
    config,
    block_p,
    ptx,
):
    (R, D), block_r, block_s = q_ref.shape, config.block_r, config.block_s
    *pages_ref, out_ref, ml_ref = refs
    split, head = pl.program_id(0), pl.program_id(1)
    batch, kv_head = head // kv_heads, head % kv_heads

    # The query rows, twice: their hi planes, then their lo planes; scale · step · 2^e · log2(e) of each row.
    i = jnp.arange(2 * block_r)
    q_even, q_odd = _query(q_ref, pl.program_id(2) * block_r + i % block_r, block_p)
    n_even, n_odd, e = _fixed_point(q_even, q_odd)
    q = _beside(_plane(n_even, i[:, None] // block_r), _plane(n_odd, i[:, None] // block_r))
    e = jnp.max(e.reshape(2, block_r), axis=0)
    factor = np.float32(options.scale) * _float(k_table_ref[4]) * _float((e + 127) << 23)
    factor = jnp.where(e == NOT_FINITE, NAN, factor) * np.float32(1.0 if options.soft_cap else LOG2_E)
    k_words = [k_table_ref[word] for word in range(4)]
    v_words = _magnitudes(v_table_ref, bits[1])

    # The positions that any row of the block sees, and of those the part of this program.
    r = pl.program_id(2) * block_r + jnp.arange(block_r)
    length = jnp.minimum(jnp.maximum(lengths_ref[batch], 0), slots)
    at = length - steps + r % steps
    first, last = jnp.int32(0), length
    left, right = options.window or (0, 0)
    if options.is_causal:
        last = jnp.minimum(last, jnp.max(jnp.where(r < R, at, -1)) + 1)
    if options.window:
        first = jnp.maximum(first, jnp.min(jnp.where(r < R, at, slots)) - left)
        last = jnp.minimum(last, jnp.max(jnp.where(r < R, at, -1)) + right + 1)
    blocks = (jnp.maximum(last - first, 0) + block_s - 1) // block_s
    part = (blocks + config.splits - 1) // config.splits * block_s
    first = first + split * part
    last = jnp.minimum(last, first + part)

    def attend(block, carry):
        m, total, out_even, out_odd = carry
        s = first + block * block_s + jnp.arange(block_s)
        inside = there = s < last
        slot = head * slots + s
        if page:
            number = plgpu.load(pages_ref[0].at[batch * (slots // page) + s // page], mask=inside, other=0)
            pool = k_norms_ref.shape[0] // (kv_heads * page)
            there = inside & (number >= 0) & (number < pool)
            slot = (jnp.where(there, number, 0) * kv_heads + kv_head) * page + s % page
        codes, high = _load_codes(k_codes_ref, slot[:, None], inside[:, None], D, block_p, bits[0], ptx)
        norm = plgpu.load(k_norms_ref.at[slot], mask=there, other=0.0)
        if page:
            norm = jnp.where(there | ~inside, norm, NAN)
        norm = _finite(norm, ptx)
        levels = _beside(*_levels(codes, high, k_words, bits[0], ptx))
        hi, lo = jnp.split(_dot(levels, q), 2, axis=1)
        x = (hi * 128 + lo).astype(jnp.float32) * (norm[:, None] * factor[None, :])
        if options.soft_cap:
            x = _soft_cap(x, options.soft_cap, ptx) * LOG2_E
        seen = inside[:, None]
        if options.is_causal:
            seen = seen & (s[:, None] <= at[None, :])
        if options.window:
            seen = seen & (s[:, None] >= at[None, :] - left) & (s[:, None] <= at[None, :] + right)

        codes, high = _load_codes(v_codes_ref, slot[:, None], inside[:, None], D, block_p, bits[1], ptx)
        norm = _finite(plgpu.load(v_norms_ref.at[slot], mask=there, other=0.0), ptx)
        size = jnp.minimum(jnp.maximum(jnp.where(norm == norm, jnp.abs(norm), 1.0), LEAST_NORM), LARGEST_NORM)
        inverse = _inverse(size, ptx)
        y = x + jnp.where(inside, _log2(size, ptx), NOTHING)[:, None]
        if options.is_causal or options.window:
            y = jnp.where(seen, y, NOTHING)
        peak = jnp.maximum(m, jnp.max(y, axis=0))
        reference = jnp.where(peak == NOTHING, 0.0, peak)
        weights, shrink = _exp2(y - reference[None, :], ptx), _exp2(m - reference, ptx)
        total = total * shrink[None, :] + weights * inverse[:, None]
        weights = weights * (norm * inverse)[:, None]
        if options.is_causal or options.window:
            weights = jnp.where(seen, weights, 0.0)
        weights = weights.astype(jnp.float16)
        # One product after the other: the operand of both takes the same shared memory.
        nibbles = _nibbles(codes, high, bits[1], ptx)
        even = _half(nibbles, v_words, False, bits[1], ptx)
        out_even = out_even * shrink[None, :] + _dot_values(even, weights)
        odd = _half(nibbles, v_words, True, bits[1], ptx)
        out_odd = out_odd * shrink[None, :] + _dot_values(odd, weights)
        return peak, total, out_even, out_odd

    zeros = jnp.zeros((block_p, block_r), jnp.float32)
    carry = jnp.full(block_r, NOTHING), jnp.zeros((block_s, block_r), jnp.float32), zeros, zeros
    count = (jnp.maximum(last - first, 0) + block_s - 1) // block_s
    m, total, out_even, out_odd = lax.fori_loop(0, count, attend, carry)

    # m becomes that of the logits alone, so that Σ 2^(x - m) is 1 to 2.
    total = jnp.sum(total, axis=0)
    exponent = jnp.where(total > 0.0, (_bits(total) >> 23) - 127, 0)
    power = _float((127 - exponent) << 23)
    p = jnp.arange(block_p)[:, None]
    d = 2 * p if bits[1] == 4 else 4 * (p % (block_p // 2)) + 2 * (p // (block_p // 2))
    live = (d < D) & (r[None, :] < R)
    plgpu.store(out_ref.at[r[None, :], d], out_even * (1 / HALF_UNIT) * power[None, :], mask=live)
    plgpu.store(out_ref.at[r[None, :], d + 1], out_odd * (1 / HALF_UNIT) * power[None, :], mask=live)
    plgpu.store(ml_ref.at[jnp.zeros_like(r), r], m + exponent.astype(jnp.float32), mask=r < R)
    plgpu.store(ml_ref.at[jnp.ones_like(r), r], total * power, mask=r < R)


def _dot_values(levels, weights):
    """[S, D/2] × [S, R] -> [D/2, R]."""
    return lax.dot_general(levels, weights, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _merge(parts, ml, values, kv_lengths, sinks, shape, slots):
    """The parts of all positions as one: output [B, H, T, D] float32, log-sum-exp [B, H, T]."""
    batch, heads, steps, _ = shape
    m, visible = ml[:, :, 0], ml[:, :, 1]
    peak = jnp.max(m, axis=1, keepdims=True)
    peak = jnp.where(peak == NOTHING, 0.0, peak)
    weights = jnp.exp2(m - peak)
    total = jnp.sum(weights * visible, axis=1)
    step = fixed_point.score_table(values.quantizer.codebook.centroids).step
    share = step / jnp.where(total == 0.0, 1.0, total)
    out = (jnp.sum(weights[..., None] * parts, axis=1) * share[..., None]).reshape(shape)
    lse = jnp.where(total == 0.0, NOTHING, (peak[:, 0] + jnp.log2(total)) * math.log(2)).reshape(batch, heads, steps)
    if sinks is not None:
        out, lse = softmax.merge(out, lse, jnp.zeros_like(out), sinks[:, None], jnp)
    fits = ((kv_lengths >= 0) & (kv_lengths <= slots))[:, None, None]
    return jnp.where(fits[..., None], xla.unrotate(out, values.quantizer), NAN), jnp.where(fits, lse, NAN)


def attention(query, keys, values, kv_lengths, page_table, sinks, options, *, interpret=False, config=None):
    """The arguments of `tqcore.softmax.attention`, without centers and residuals -> out of query's dtype, lse."""
    (batch, heads, steps, head_dim), (kv_heads, page) = query.shape, keys.codes.shape[1:3]
    rows, kv, slots = heads // kv_heads * steps, batch * kv_heads, softmax.context_size(keys, page_table)
    if 0 in query.shape or slots == 0:
        nothing = jnp.full(query.shape[:3], NOTHING)
        return _merge_nothing(query, nothing, sinks)
    shape = rows, slots, kv, head_dim, device.cuda_kind()
    bits = keys.quantizer.code_bits, values.quantizer.code_bits
    config = config or tuning.attention_config("attention", *shape, options.num_splits, bits)
    arrays = [xla.rotate(query, keys.quantizer).reshape(kv, rows, head_dim)]
    for packed in (keys, values):
        if MAX_INDEXED_BYTES < packed.codes.size <= 2 * MAX_INDEXED_BYTES:
            raise NotImplementedError("'pallas_triton' cannot index 2 to 4 GiB of codes; 'xla' has no such need.")
        words = fixed_point.score_table(packed.quantizer.codebook.centroids).words
        arrays += [packed.codes.reshape(-1, packed.codes.shape[3]), packed.norms.reshape(-1), jnp.asarray(words)]
    arrays += [kv_lengths] if page_table is None else [kv_lengths, page_table.reshape(-1)]
    kernel = functools.partial(
        _attention_kernel, steps=steps, slots=slots, kv_heads=kv_heads, page=0 if page_table is None else page,
        bits=bits, options=options, config=config,
        block_p=tuning.packed_block(head_dim), ptx=not interpret,
    )  # fmt: skip

    def part(*shape):  # of a head and a split
        return pl.BlockSpec((None, None, *shape), lambda split, head, r: (head, split, *(0 for _ in shape)))

    whole = [pl.BlockSpec(x.shape, lambda *_, rank=x.ndim: (0,) * rank) for x in arrays[1:]]
    parts, ml = pl.pallas_call(
        kernel,
        grid=(config.splits, kv, config.grid(rows, kv)[1]),
        in_specs=[pl.BlockSpec((None, rows, head_dim), lambda split, head, r: (head, 0, 0)), *whole],
        out_specs=[part(rows, head_dim), part(2, rows)],
        out_shape=[
            partition.struct((kv, config.splits, *shape), jnp.float32) for shape in ((rows, head_dim), (2, rows))
        ],
        compiler_params=plgpu.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="tq_attention",
    )(*arrays)
    out, lse = _merge(parts, ml, values, kv_lengths, sinks, query.shape, slots)
    return out.astype(query.dtype), lse


def _merge_nothing(query, lse, sinks):
    """Where there is no query, or no position."""
    if sinks is not None:
        lse = jnp.broadcast_to(sinks[:, None], lse.shape)
    return jnp.zeros_like(query), lse
