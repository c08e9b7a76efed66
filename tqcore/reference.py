"""The oracle: every operation in NumPy, written to be read beside docs/format.md.

Scores are exact: each backend returns the bits that `fused_qk_scores` returns here. Encoders and whatever
follows a softmax agree within a tolerance.
"""

from functools import partial

import numpy as np
from numpy.typing import NDArray

from tqcore import center as center_of
from tqcore import checks
from tqcore.fixed_point import (
    INFINITY_BITS,
    MIN_EXPONENT_BITS,
    QUERY_LIMIT,
    exponent,
    flush,
    magnitude_bits,
    power_of_two,
    score_table,
    split,
    tree_sum,
    unit,
)
from tqcore.packing import pack, slots, unpack
from tqcore.quantizer import PackedVectors, Quantizer
from tqcore.rotation import rotate, unrotate

IMPLEMENTATIONS = ("numpy",)


def compress(
    x: NDArray, quantizer: Quantizer, *, center: NDArray | None = None, implementation: str | None = None
) -> PackedVectors:
    """Quantises vectors, less their center: norm = ‖x‖, index_d = number of boundaries b with b·‖x‖ < (R x)_d.

    A coordinate on a boundary takes the lower index. A vector whose largest magnitude is below 2^-100
    counts as zero: norm 0, codes of +0. A vector with NaN or infinity gets a NaN norm and the codes of +0.

    Args:
      x: [..., S, D] float32, bfloat16 or float16.
      quantizer: the rotation, the codebook, the kind of norm, and whether signs of the residual are kept too.
      center: [..., 1 or S, D] float32, broadcast to x and subtracted in float32 first, such as `key_center` or
        `rotary_center`; None subtracts nothing. It is kept as given, and `decompress` adds it back.
      implementation: "numpy" or None.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_vectors(x, quantizer, center)
    x = x.astype(np.float32)
    residual = None
    with np.errstate(over="ignore", invalid="ignore"):
        if center is not None:
            x = x - center
        codes, norms = _encode(x, quantizer)
        if quantizer.residual is not None:
            rest = x - _decode(codes, norms, quantizer)
            residual = PackedVectors(*_encode(rest, quantizer.residual), quantizer.residual)
    return PackedVectors(codes, norms, quantizer, center, residual)


def append(
    packed: PackedVectors,
    x: NDArray,
    starts: NDArray[np.int32],
    *,
    page_table: NDArray[np.int32] | None = None,
    implementation: str | None = None,
) -> PackedVectors:
    """Compresses vectors into their places of a cache: x[b, :, t] goes to position starts[b] + t of sequence b.

    Codes and norms are those of `compress(x, packed.quantizer, center=packed.center)`. A position outside 0 to S - 1
    is not written, nor is one on a page that does not exist: a start of -T or less leaves its sequence alone.

    Args:
      packed: PackedVectors [B, K, S, D], S the capacity, or a pool [N, K, page, D]. A center has an S axis of 1, in a
        pool a first axis of 1 too, and is subtracted from x. No residual.
      x: [B, K, T, D] float32, bfloat16 or float16.
      starts: [B] int32.
      page_table: [B, M] int32. Position s of sequence b is then in page page_table[b, s // page]; S is M · page. No two
        sequences may write to one place.
      implementation: "numpy" or None.

    Returns:
      PackedVectors: `packed`, whose arrays were written to.

    Raises:
      ValueError: an argument does not fit.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_append(packed, x, starts, page_table)
    new = compress(x, packed.quantizer, center=packed.center)
    batch, steps = np.arange(x.shape[0], dtype=np.int32)[:, None], np.arange(x.shape[2], dtype=np.int32)[None, :]
    row, slot, inside = slots(packed.codes, starts, batch, steps, page_table, np)
    b, t = np.nonzero(inside)
    packed.codes[row[b, t], :, slot[b, t]] = new.codes[b, :, t]
    packed.norms[row[b, t], :, slot[b, t]] = new.norms[b, :, t]
    return packed


def decompress(
    packed: PackedVectors, *, dtype="float32", rotated: bool = False, implementation: str | None = None
) -> NDArray:
    """x̂ = norm · Rᵀ centroids[index], plus the residual's x̂ and the center where there are any.

    Args:
      packed: codes [..., S, P], norms [..., S], center [..., 1 or S, D] or None, residual or None.
      dtype: float32, bfloat16 or float16.
      rotated: leaves R x̂, all of it, in place of x̂.
      implementation: "numpy" or None.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_decompress(packed, dtype, rotated)
    quantizer, residual = packed.quantizer, packed.residual
    turn = partial(rotate, quantizer=quantizer) if rotated else np.asarray
    vectors = (_centroids_at if rotated else _directions)(packed.codes, quantizer) * packed.norms[..., None]
    if residual is not None:
        vectors = vectors + turn(_decode(residual.codes, residual.norms, residual.quantizer))
    if packed.center is not None:
        vectors = vectors + turn(packed.center)
    return vectors.astype(checks.dtype_name(dtype))


def fused_qk_scores(
    q_rotated: NDArray,
    packed_indices: NDArray[np.uint8],
    norms: NDArray[np.float32],
    centroids: NDArray[np.float32],
    scale: float,
    *,
    n_q_heads: int,
    n_kv_heads: int,
    implementation: str | None = None,
) -> NDArray[np.float32]:
    """Attention scores from packed keys: score[b,h,t,s] = scale · norm[b,k,s] · ⟨q[b,h,t], centroids[index[b,k,s]]⟩.

    Query head h reads key head k = h // (H // K). The inner product is an exact sum of integers, and
    three roundings to float32 follow it (docs/format.md), so every implementation returns the same bits.
    NaN or infinity in a query makes its row NaN; a norm that is not finite makes its column NaN.

    Args:
      q_rotated: [B, H, T, D] float32, bfloat16 or float16, already rotated; D even, up to 1024.
      packed_indices: [B, K, S, P] uint8, indices of 1 to 4 bits as `tqcore.packing` lays them out: P = D·bits/8.
      norms: [B, K, S] float32.
      centroids: [L] float32, 1 to 2^bits finite values, ascending. An index past L reads the last one.
      scale: finite; usually 1/√D.
      n_q_heads: H, a multiple of K.
      n_kv_heads: K.
      implementation: "numpy" or None.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax. Empty where S or T is 0.

    Raises:
      ValueError: an argument does not fit; nothing is cast, cropped or replaced.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    code_bits = checks.check_scores(q_rotated, packed_indices, norms, scale, n_q_heads, n_kv_heads)
    checks.check_centroids(centroids, code_bits)
    checks.check_centroid_values(centroids)
    batch, heads, length, head_dim = q_rotated.shape
    groups = heads // n_kv_heads
    q = q_rotated.astype(np.float32).reshape(batch, n_kv_heads, groups * length, head_dim)
    table = score_table(centroids)

    bits = magnitude_bits(q)
    e = exponent(bits, QUERY_LIMIT)
    with np.errstate(all="ignore"):
        n = np.rint(np.where((bits < INFINITY_BITS)[..., None], q * power_of_two(-e)[..., None], 0)).astype(np.int32)
        row = np.where(
            bits < INFINITY_BITS, flush(unit(checks.as_scale(scale), table) * power_of_two(e)), np.float32(np.nan)
        )
        column = np.where(np.isfinite(norms), flush(norms), np.float32(np.nan))
        total = _integer_products(n, table.planes, unpack(packed_indices, np, code_bits))
        scores = flush(total * flush(column[:, :, None, :] * row[..., None]))
    return scores.reshape(batch, heads, length, norms.shape[-1])


def attention_scores(
    query: NDArray, keys: PackedVectors, *, scale: float | None = None, add_center: bool | None = None
) -> NDArray[np.float32]:
    """scale · ⟨query, k̂⟩ for every packed key, without decompressing it: ⟨q, norm·Rᵀc⟩ = norm·⟨R q, c⟩.

    Args:
      query: [B, H, T, D] float32, bfloat16 or float16, not rotated.
      keys: PackedVectors [B, K, S, D], K dividing H.
      scale: None means 1/√D.
      add_center: whether scale · ⟨query, center⟩ is included, a dense float32 product. None means where the center
        varies along S. A center with an S axis of 1 adds one number to all scores of a row, which a softmax does not
        see: it is left out unless True.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax.

    Raises:
      ValueError: query and keys do not fit each other, or `add_center` is False where the center varies along S.
    """
    checks.check_attention_scores(query, keys, scale, add_center)
    scale = checks.as_scale(query.shape[-1] ** -0.5 if scale is None else scale)
    scores = packed_scores(query, keys, scale)
    if keys.residual is not None:
        scores = scores + packed_scores(query, keys.residual, scale)
    if center_of.is_added(keys, add_center):
        scores = scores + center_of.scores(query.astype(np.float32), keys.center, scale, keys.codes.shape[1], _matmul)
    return scores


def key_center(keys: NDArray) -> NDArray:
    """The mean of keys over positions, for `compress(keys, quantizer, center=...)`: such as that of a prefill.

    Args:
      keys: [..., S, D] float32, bfloat16 or float16, S at least 1.

    Returns:
      [..., 1, D] float32.

    Raises:
      ValueError: keys have another dtype or rank, or no position.
    """
    checks.check_keys(keys)
    return center_of.mean(keys.astype(np.float32), np)


def rotary_center(bias: NDArray, positions: NDArray, *, theta: float = 10_000.0, interleaved: bool = False) -> NDArray:
    """The bias of a key projection after rotary embedding, exact where `key_center` of rotated keys is not.

    Coordinates i and i + D/2 turn by position · theta^(-2i/D). For scaled frequencies, pass `compress` a center of
    your own; for scaled positions, scale `positions`. The center of a single position looks like one that all share:
    where its scores join those of others, ask `attention_scores` for `add_center=True`.

    Args:
      bias: [..., D] float32, bfloat16 or float16, usually [K, D].
      positions: [S] integers or floats.
      theta: the base of the frequencies.
      interleaved: coordinates 2i and 2i + 1 turn, in place of i and i + D/2.

    Returns:
      [..., S, D] float32.

    Raises:
      ValueError: bias or positions have another dtype or rank, D is odd, or theta is not positive.

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    checks.check_rotary(bias, positions, theta)
    angles = positions.astype(np.float32)[:, None] * center_of.frequencies(bias.shape[-1], theta)
    return center_of.rotary(bias.astype(np.float32), angles, interleaved, np)


def _encode(x: NDArray[np.float32], quantizer: Quantizer) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and norms, without a residual."""
    bits = magnitude_bits(x)
    finite = bits < INFINITY_BITS
    usable = finite & (bits >= MIN_EXPONENT_BITS)
    e = np.where(usable, exponent(bits, QUERY_LIMIT), 0)
    scaled = np.where(usable[..., None], x, np.float32(0)) * power_of_two(-e)[..., None]
    squares = tree_sum(scaled * scaled, np)
    length = np.sqrt(squares)
    rotated, radius = rotate(scaled, quantizer), np.where(usable, length, np.float32(1))[..., None]
    indices = np.zeros(rotated.shape, np.uint8)
    for boundary in quantizer.codebook.boundaries:
        indices += rotated > boundary * radius
    if quantizer.norm == "corrected":
        along = tree_sum(rotated * quantizer.codebook.centroids[indices], np)  # ⟨x̃, Rᵀc⟩
        length = squares / np.where(usable, along, np.float32(1))
    return pack(indices, np, quantizer.code_bits), np.where(finite, length * power_of_two(e), np.float32(np.nan))


def _decode(codes: NDArray[np.uint8], norms: NDArray[np.float32], quantizer: Quantizer) -> NDArray[np.float32]:
    """norm · Rᵀ centroids[index]."""
    return _directions(codes, quantizer) * norms[..., None]


def _directions(codes: NDArray[np.uint8], quantizer: Quantizer) -> NDArray[np.float32]:
    """Rᵀ centroids[index]."""
    return unrotate(_centroids_at(codes, quantizer), quantizer)


def _centroids_at(codes: NDArray[np.uint8], quantizer: Quantizer) -> NDArray[np.float32]:
    return quantizer.codebook.centroids[unpack(codes, np, quantizer.code_bits)]


def packed_scores(query: NDArray, keys: PackedVectors, scale: float) -> NDArray[np.float32]:
    """Scores of the codes and norms alone."""
    return fused_qk_scores(
        rotate(query, keys.quantizer),
        keys.codes,
        keys.norms,
        keys.quantizer.codebook.centroids,
        scale,
        n_q_heads=query.shape[1],
        n_kv_heads=keys.codes.shape[1],
    )


def _matmul(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.float32)


def _integer_products(
    n: NDArray[np.int32], planes: NDArray[np.int8], indices: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Σ_d n_d · table[index_d] as float32, [B,K,R,D] × [B,K,S,D] -> [B,K,R,S].

    The float64 products are exact: every partial sum is an integer below 2^53.
    """

    def product(left, right):
        return np.matmul(left.astype(np.float64), right[indices].astype(np.float64).swapaxes(-1, -2))

    if len(planes) == 1:
        return product(n, planes[0]).astype(np.float32)
    hi, lo = split(n)
    high = product(hi, planes[0]).astype(np.float32)
    middle = (product(hi, planes[1]) + product(lo, planes[0])).astype(np.float32)
    low = product(lo, planes[1]).astype(np.float32)
    return (high * np.float32(128) + middle) * np.float32(128) + low
