"""Every operation in plain JAX: runs on any device, and says in array terms what the kernels do."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tqcore import center as center_of
from tqcore import fixed_point
from tqcore.fixed_point import (
    ABS_MASK,
    INFINITY_BITS,
    LEVEL_LIMIT,
    MIN_EXPONENT,
    MIN_EXPONENT_BITS,
    QUERY_LIMIT,
    SMALLEST_NORMAL,
    ScoreTable,
    split,
    tree_sum,
)
from tqcore.packing import code_bits, pack, slots, unpack
from tqcore.quantizer import PackedVectors, Quantizer
from tqcore.rotation import hadamard, inverse_sqrt, matrix, signs


def rotate(x: jax.Array, quantizer: Quantizer) -> jax.Array:
    x = x.astype(jnp.float32)
    if quantizer.rotation == "hadamard":
        return hadamard(x * signs(quantizer), jnp) * inverse_sqrt(quantizer.head_dim)
    return jnp.matmul(x, matrix(quantizer).T, precision=lax.Precision.HIGHEST)


def unrotate(x: jax.Array, quantizer: Quantizer) -> jax.Array:
    x = x.astype(jnp.float32)
    if quantizer.rotation == "hadamard":
        return hadamard(x, jnp) * inverse_sqrt(quantizer.head_dim) * signs(quantizer)
    return jnp.matmul(x, matrix(quantizer), precision=lax.Precision.HIGHEST)


def compress(x: jax.Array, quantizer: Quantizer, center: jax.Array | None, encode, decode) -> PackedVectors:
    """All but the center itself. `encode` and `decode` are those of this module, or kernels."""
    codes, norms = encode(x, quantizer, center)
    residual = None
    if quantizer.residual is not None:
        rest = _centered(x, center) - decode(codes, norms, quantizer)
        signs, lengths = encode(rest, quantizer.residual, None)
        residual = PackedVectors(signs, lengths, quantizer.residual)
    return PackedVectors(codes, norms, quantizer, None, residual)


def append(codes, norms, x, center, starts, page_table, quantizer, encode):
    """Codes and norms with x in its places; what has none goes past the first axis, and is dropped there."""
    new_codes, new_norms = encode(x, quantizer, center)
    batch, steps = (jnp.arange(x.shape[axis], dtype=jnp.int32) for axis in (0, 2))
    row, slot, inside = slots(codes, starts, batch[:, None], steps[None, :], page_table, jnp)
    row = jnp.where(inside, row, codes.shape[0])

    def put(old, new):
        return old.at[row, :, slot].set(jnp.swapaxes(new, 1, 2), mode="drop")

    return put(codes, new_codes), put(norms, new_norms)


def decompress(packed: PackedVectors, dtype, rotated, decode) -> jax.Array:
    turn = functools.partial(rotate, quantizer=packed.quantizer) if rotated else jnp.asarray
    residual, center = packed.residual, packed.center
    alone = residual is None and center is None
    vectors = decode(packed.codes, packed.norms, packed.quantizer, dtype if alone else "float32", rotated)
    if residual is not None:
        vectors = vectors + turn(decode(residual.codes, residual.norms, residual.quantizer, "float32", False))
    if center is not None:
        vectors = vectors + turn(center)
    return vectors.astype(dtype)


def key_center(keys: jax.Array) -> jax.Array:
    return center_of.mean(_rounded(keys.astype(jnp.float32)), jnp)


def rotary_center(bias: jax.Array, positions: jax.Array, theta: float, interleaved: bool) -> jax.Array:
    angles = positions.astype(jnp.float32)[:, None] * center_of.frequencies(bias.shape[-1], theta)
    return center_of.rotary(bias.astype(jnp.float32), angles, interleaved, jnp)


def center_scores(query, center, scale, kv_heads):
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    return center_of.scores(query.astype(jnp.float32), center, scale, kv_heads, matmul)


def _rounded(x):
    """x, by a select that keeps XLA from fusing a product that x comes from into a sum."""
    return jnp.where(jnp.isfinite(x), x, x + x)


def _centered(x, center):
    x = x.astype(jnp.float32)
    return x if center is None else _rounded(x) - _rounded(center)


def encode(x, quantizer, center=None):
    """Codes and norms, without a residual.

    A product that is added to passes through a minimum that changes nothing, which keeps XLA from fusing the two.
    """
    x = _centered(x, center)
    bits = magnitude_bits(x)
    finite = bits < INFINITY_BITS
    usable = finite & (bits >= MIN_EXPONENT_BITS)
    e = jnp.where(usable, exponent(bits, QUERY_LIMIT), 0)
    scaled = jnp.where(usable[..., None], x, 0.0) * power_of_two(-e)[..., None]
    squares = tree_sum(jnp.minimum(scaled * scaled, QUERY_LIMIT**2), jnp)
    length = jnp.sqrt(squares)
    rotated, radius = rotate(scaled, quantizer), jnp.where(usable, length, 1.0)[..., None]
    above = [rotated > boundary * radius for boundary in quantizer.codebook.boundaries]
    indices = functools.reduce(jnp.add, above, jnp.uint8(0))
    if quantizer.norm == "corrected":
        products = rotated * jnp.asarray(quantizer.codebook.centroids)[indices]
        along = tree_sum(jnp.minimum(products, QUERY_LIMIT**2), jnp)  # ⟨x̃, Rᵀc⟩
        length = squares / jnp.where(usable, along, 1.0)
    return pack(indices, jnp, quantizer.code_bits), jnp.where(finite, length * power_of_two(e), jnp.nan)


def decode(codes, norms, quantizer, dtype="float32", rotated=False):
    """norm · Rᵀ centroids[index], or not rotated back."""
    directions = _centroids_at(codes, quantizer)
    return ((directions if rotated else unrotate(directions, quantizer)) * norms[..., None]).astype(dtype)


def dequantize(packed: PackedVectors) -> jax.Array:
    """norm · centroids[index] [..., S, D], not rotated back."""
    return _centroids_at(packed.codes, packed.quantizer) * packed.norms[..., None]


def _centroids_at(codes, quantizer):
    return jnp.asarray(quantizer.codebook.centroids)[unpack(codes, jnp, quantizer.code_bits)]


def fused_qk_scores(q, codes, norms, words):
    """q [B, H, T, D], codes [B, K, S, P], norms [B, K, S], words with the scale in them -> [B, H, T, S] float32."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    q = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    planes, unit = _unpack_words(words)
    bits = magnitude_bits(q)
    e = exponent(bits, QUERY_LIMIT)
    n = jnp.rint(q * power_of_two(-e)[..., None]).astype(jnp.int32)
    row = jnp.where(bits < INFINITY_BITS, flush(unit * power_of_two(e)), jnp.nan)
    column = jnp.where(jnp.isfinite(norms), flush(norms), jnp.nan)
    total = _integer_products(split(n), planes, _unpack(codes, head_dim))
    scores = flush(total * flush(column[:, :, None, :] * row[..., None]))
    return scores.reshape(batch, heads, length, keys)


def dense_scores(q, codes, norms, centroids, scale):
    """The map that the scores approximate, in float32: what differentiates in their place."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    q = q.astype(jnp.float32).reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    vectors = _pad(centroids)[_unpack(codes, head_dim)] * norms[..., None]
    scores = jnp.einsum("bkrd,bksd->bkrs", q, vectors, precision=lax.Precision.HIGHEST) * scale
    return scores.reshape(batch, heads, length, keys)


def score_words(centroids: jax.Array, scale: float) -> jax.Array:
    """`tqcore.fixed_point.score_words(centroids, scale)` of a traced table: two planes, the first 0 if one will do."""
    bits = magnitude_bits(centroids)
    padded = _pad(centroids)
    e_one, e_two = exponent(bits, LEVEL_LIMIT), exponent(bits, QUERY_LIMIT)
    levels = padded * power_of_two(-e_one)
    one_plane = jnp.all(levels == jnp.rint(levels))
    hi, lo = split(jnp.rint(padded * power_of_two(-e_two)).astype(jnp.int32))
    planes = jnp.stack([jnp.where(one_plane, 0, hi), jnp.where(one_plane, levels.astype(jnp.int32), lo)])
    step = power_of_two(jnp.where(one_plane, e_one, e_two))
    levels = lax.bitcast_convert_type(planes.astype(jnp.int8).reshape(8, 4), jnp.int32)
    unit = flush(flush(jnp.float32(scale)) * step)
    return jnp.append(levels, lax.bitcast_convert_type(unit, jnp.int32))


def magnitude_bits(x: jax.Array) -> jax.Array:
    return jnp.max(lax.bitcast_convert_type(x, jnp.int32) & ABS_MASK, axis=-1, initial=0)


def exponent(bits: jax.Array, limit: int) -> jax.Array:
    carry, bias = fixed_point.exponent_bias(limit)
    return jnp.maximum(((jnp.minimum(bits, INFINITY_BITS) + carry) >> 23) - bias, MIN_EXPONENT)


def power_of_two(e: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type((e + 127) << 23, jnp.float32)


def flush(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, jnp.copysign(0.0, x), x)


def _integer_products(query_planes, table_planes, indices):
    """Σ_d n_d · table[index_d] as float32, [B,K,R,D] × [B,K,S,D] -> [B,K,R,S], from int8 products.

    On CUDA, jax 0.11.2 returns twice some int8 products whose D is no multiple of 4; int32 ones are right.
    """
    dtype = jnp.int32 if indices.shape[-1] % 4 else jnp.int8

    def product(left, right):
        left, right = left.astype(dtype), right[indices].astype(dtype)
        return jnp.einsum("bkrd,bksd->bkrs", left, right, preferred_element_type=jnp.int32)

    hi, lo = query_planes
    if len(table_planes) == 1:
        return (product(hi, table_planes[0]) * 128 + product(lo, table_planes[0])).astype(jnp.float32)
    high = product(hi, table_planes[0]).astype(jnp.float32)
    middle = (product(hi, table_planes[1]) + product(lo, table_planes[0])).astype(jnp.float32)
    low = product(lo, table_planes[1]).astype(jnp.float32)
    return (high * 128.0 + middle) * 128.0 + low


def _unpack(codes, head_dim):
    """[..., P] bytes -> [..., D] indices."""
    return unpack(codes, jnp, code_bits(codes.shape[-1], head_dim))


def _unpack_words(words):
    """([1 or 2, 16] int8, unit) of `score_words`."""
    levels = lax.bitcast_convert_type(words[:-1], jnp.int8).reshape(-1, 16)
    return levels, lax.bitcast_convert_type(words[-1], jnp.float32)


def _pad(centroids):
    return jnp.pad(centroids, (0, ScoreTable.ENTRIES - centroids.shape[0]), mode="edge")
