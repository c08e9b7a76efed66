"""What attention does with exact scores: masks, pages, the softmax, sinks, and the merge of parts.

Written once, for arrays of any library: float64 in the oracle, float32 in `xla` and `eager`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tqcore import center as center_of
from tqcore import checks, tuning
from tqcore.quantizer import PackedVectors

KERNEL_BITS, KERNEL_DIM = (2, 3, 4), tuning.MAX_HEAD_DIM  # what kernels take: bits of an index, largest D
KERNEL_NEEDS = (
    f"codes of 2, 3 or 4 bits, head_dim up to {KERNEL_DIM}, no residual signs, and centers with an S axis of 1, alike "
    "on all pages and, for keys, without a soft cap"
)
UNBOUNDED = 2**30  # a window that reaches past any context; sums with it stay within int32


@dataclass(frozen=True)
class Options:
    """What is static in a call of `attention`; `window` is (left, right), and None stands for no such option."""

    scale: float
    is_causal: bool
    window: tuple[int, int] | None
    soft_cap: float | None
    num_splits: int | None


@dataclass(frozen=True)
class Library:
    """What `attention` needs of a library, in whose widest dtype it works.

    Args:
      xp: numpy, jax.numpy or torch.
      arange: n -> [n] int32, where the arrays are.
      wide: an array in the dtype of the work.
      matmul: [..., R, C] × [..., C, D] -> [..., R, D].
      scores: query [B, H, T, D], packed [B, K, S, D], scale -> [B, H, T, S], exact: those of codes and norms alone.
      dequantize: packed -> norm · centroids[index] [..., S, D], not rotated back.
      rotate, unrotate: x [..., D], quantizer -> [..., D].
    """

    xp: Any
    arange: Callable[[int], Any]
    wide: Callable[[Any], Any]
    matmul: Callable[[Any, Any], Any]
    scores: Callable[[Any, PackedVectors, float], Any]
    dequantize: Callable[[PackedVectors], Any]
    rotate: Callable[..., Any]
    unrotate: Callable[..., Any]


def options(query, scale, is_causal, local_window_size, logits_soft_cap, num_splits) -> Options:
    """The static arguments of `attention`, checked."""
    checks.check_attention_options(scale, is_causal, local_window_size, logits_soft_cap, num_splits)
    window = None
    if local_window_size is not None:
        left, right = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
        window = min(int(left), UNBOUNDED), min(int(right), UNBOUNDED)
    return Options(
        checks.as_scale(query.shape[-1] ** -0.5 if scale is None else scale),
        is_causal,
        window,
        None if logits_soft_cap is None else float(logits_soft_cap),
        num_splits,
    )


def check_values(kv_lengths, page_table, query, keys, options: Options) -> None:
    """What can be seen of lengths and page numbers only once they are NumPy arrays; None is not looked at."""
    positions = context_size(keys, page_table)
    if kv_lengths is not None:
        checks.check_lengths(kv_lengths, positions)
    if page_table is not None:
        batch, pages = page_table.shape
        lengths = np.full(batch, positions, np.int32) if kv_lengths is None else kv_lengths
        used = used_positions(lengths, query.shape[2], np.arange(positions, dtype=np.int32), options)
        checks.check_page_numbers(page_table, used.reshape(batch, pages, keys.codes.shape[2]).any(-1), len(keys.codes))


def context_size(keys: PackedVectors, page_table: Any) -> int:
    """S, or M · page."""
    return keys.codes.shape[2] * (1 if page_table is None else page_table.shape[1])


def attention(
    query: Any,
    keys: PackedVectors,
    values: PackedVectors,
    kv_lengths: Any,
    page_table: Any,
    sinks: Any,
    options: Options,
    library: Library,
) -> tuple[Any, Any]:
    """The output [B, H, T, D] and its log-sum-exp [B, H, T], both in the dtype of the work.

    Args:
      query: [B, H, T, D] float32, bfloat16 or float16, not rotated.
      keys, values: PackedVectors [B, K, S, D], or pools [N, K, page, D].
      kv_lengths: [B] int32.
      page_table: [B, M] int32 or None.
      sinks: [H] float32 or None.
      options: the rest.
      library: of the arrays.
    """
    xp, size = library.xp, context_size(keys, page_table)
    positions = library.arange(size)
    keys, values = seen_alone(keys, values, kv_lengths, page_table, query.shape[2], options, library)
    visible = visible_positions(kv_lengths, library.arange(query.shape[2]), positions, options)
    logits, shift = _logits(query, keys, options, library)
    out, lse = _attend(logits, _rotated_values(values, library), visible[:, None], options.num_splits or 1, library)
    out = library.unrotate(out, values.quantizer)
    if shift is not None:
        lse = lse + shift[..., 0]
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks, library)
    fits = ((kv_lengths >= 0) & (kv_lengths <= size))[:, None, None]
    return xp.where(fits[..., None], out, math.nan), xp.where(fits, lse, math.nan)


def seen_alone(keys, values, kv_lengths, page_table, steps, options, library):
    """Keys and values [B, K, S, D] without pages, zeros where no query sees them."""
    used = used_positions(kv_lengths, steps, library.arange(context_size(keys, page_table)), options)
    if page_table is not None:
        keys, values = gathered(keys, values, page_table, used, library.xp)
    return tuple(_blanked(packed, used[:, None], library.xp) for packed in (keys, values))


def with_centers(out, lse, query, keys, values, sinks, options, library):
    """Output and log-sum-exp of keys and values less their centers, which do not vary along S -> those with them.

    Args:
      out, lse: in the dtype of the work, of attention without sinks.
      query, keys, values, sinks, options, library: as in `attention`.
    """
    if keys.center is not None:
        lse = lse + _shift(query, keys, options, library)[..., 0]
    if values.center is not None:
        batch, kv_heads = len(lse), keys.codes.shape[1]
        center = library.xp.broadcast_to(library.wide(values.center), (batch, kv_heads, 1, out.shape[-1]))
        with_center = out.reshape(batch, kv_heads, -1, out.shape[-1]) + center
        out = library.xp.where((lse == -math.inf)[..., None], out, with_center.reshape(out.shape))
    return (out, lse) if sinks is None else _with_sinks(out, lse, sinks, library)


def kernels_take(keys: PackedVectors, values: PackedVectors, page_table: Any, options: Options) -> bool:
    """Whether kernels can: codes of their bits, no residuals, and centers that `with_centers` can add.

    Such a center varies neither along S nor from page to page, and moves no logits that are then capped.
    """
    centers = [packed.center for packed in (keys, values) if packed.center is not None]
    constant = all(center.shape[-2] == 1 and (page_table is None or not _varies(center)) for center in centers)
    plain = all(
        packed.residual is None and quantizer.code_bits in KERNEL_BITS and quantizer.head_dim <= KERNEL_DIM
        for packed, quantizer in ((keys, keys.quantizer), (values, values.quantizer))
    )
    return plain and constant and (keys.center is None or options.soft_cap is None)


def kernels_got(keys: PackedVectors, values: PackedVectors, options: Options) -> str:
    """What of the arguments `kernels_take` looks at."""
    bits, qjl = ([getattr(x.quantizer, name) for x in (keys, values)] for name in ("code_bits", "qjl"))
    centers = ["none" if x.center is None else list(x.center.shape) for x in (keys, values)]
    return (
        f"head_dim={keys.quantizer.head_dim}, bits={bits}, qjl={qjl}, centers {centers[0]} and {centers[1]}, "
        f"logits_soft_cap={options.soft_cap}"
    )


def visible_positions(lengths: Any, steps: Any, positions: Any, options: Options, count: int | None = None) -> Any:
    """Which of `positions` [S] the queries of `steps` see -> [B, 1 or T, S]: query t stands at length - T + t.

    T is `count`, or None where `steps` are all.
    """
    lengths = lengths[:, None, None]
    query = lengths - (steps.shape[0] if count is None else count) + steps[:, None]
    visible = positions < lengths
    if options.is_causal:
        visible = visible & (positions <= query)
    if options.window is not None:
        left, right = options.window
        visible = visible & (positions >= query - left) & (positions <= query + right)
    return visible


def used_positions(lengths: Any, steps: int, positions: Any, options: Options) -> Any:
    """Which of `positions` [S] any of the last `steps` queries sees -> [B, S]; the others are not looked at."""
    lengths = lengths[:, None]
    used = positions < lengths
    return used if options.window is None else used & (positions >= lengths - steps - options.window[0])


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, xp: Any) -> tuple[Any, Any]:
    """Attention over two sets of keys from that over each: out [..., D], lse [...]; a part of lse -inf adds nothing."""
    peak = xp.maximum(lse_a, lse_b)
    peak = xp.where(peak == -math.inf, 0.0, peak)
    a, b = xp.exp(lse_a - peak), xp.exp(lse_b - peak)
    total, lse = _total(a + b, peak, xp)
    parts = (xp.where((x == 0)[..., None], 0.0, out) * (x / total)[..., None] for x, out in ((a, out_a), (b, out_b)))
    return sum(parts), lse


def _with_sinks(out, lse, sinks, library):
    return merge(out, lse, library.xp.zeros_like(out), library.wide(sinks)[:, None], library.xp)


def _total(total, peak, xp):
    """A sum of powers that can be divided by, and peak + log of the sum, -inf where that is 0."""
    none = total == 0
    total = xp.where(none, 1.0, total)
    return total, xp.where(none, -math.inf, peak + xp.log(total))


def _attend(logits, vectors, visible, num_splits, library):
    """`attend_part` over `num_splits` parts of S, merged; S stays a symbol where there is one part."""
    if num_splits == 1:
        return attend_part(logits, vectors, visible, library)
    size = max(1, -(-logits.shape[-1] // num_splits))

    def part(start):
        at = slice(start, start + size)
        return attend_part(logits[..., at], vectors[:, :, at], visible[..., at], library)

    out, lse = part(0)
    for start in range(size, logits.shape[-1], size):
        out, lse = merge(out, lse, *part(start), library.xp)
    return out, lse


def attend_part(logits, vectors, visible, library):
    """logits [B, H, T, S], vectors [B, K, S, D], visible [B, 1, 1 or T, S] -> out [B, H, T, D], lse [B, H, T]."""
    xp, (batch, heads, steps, size) = library.xp, logits.shape
    logits = xp.where(visible, logits, -math.inf)
    peak = xp.amax(logits, axis=-1) if size else logits.sum(-1) - math.inf
    peak = xp.where(peak == -math.inf, 0.0, peak)
    powers = xp.exp(logits - peak[..., None])
    total, lse = _total(powers.sum(-1), peak, xp)
    kv_heads, head_dim = vectors.shape[1], vectors.shape[-1]
    rows = (powers / total[..., None]).reshape(batch, kv_heads, heads // kv_heads * steps, size)
    return library.matmul(rows, vectors).reshape(batch, heads, steps, head_dim), lse


def _logits(query, keys, options, library):
    """Logits, and what is left out of them because all positions of a row share it, [B, H, T, 1] or None."""
    logits = library.scores(query, keys, options.scale)
    if keys.residual is not None:
        logits = logits + library.scores(query, keys.residual, options.scale)
    shift = None
    if keys.center is not None:
        shift = _shift(query, keys, options, library)
        if keys.center.shape[-2] != 1 or options.soft_cap is not None:
            logits, shift = logits + shift, None
    if options.soft_cap is not None:
        logits = library.xp.tanh(logits / options.soft_cap) * options.soft_cap
    return logits, shift


def _shift(query, keys, options, library):
    """What the center adds to logits, [B, H, T, 1 or S]."""
    center = library.wide(keys.center)
    return center_of.scores(library.wide(query), center, options.scale, keys.codes.shape[1], library.matmul)


def _rotated_values(values, library):
    """R x̂ [B, K, S, D]: what codes mean before they are rotated back, plus the rotated residual and center."""
    vectors, residual = library.dequantize(values), values.residual
    if residual is not None:
        restored = library.unrotate(library.dequantize(residual), residual.quantizer)
        vectors = vectors + library.rotate(restored, values.quantizer)
    if values.center is not None:
        vectors = vectors + library.rotate(library.wide(values.center), values.quantizer)
    return vectors


def _blanked(packed, used, xp):
    """Zeros where no position is `used` [B, 1, S]: whatever lies there, a weight of zero times it is zero."""
    center = packed.center
    if center is not None and center.shape[-2] != 1:
        center = xp.where(used[..., None], center, 0.0)
    residual = None if packed.residual is None else _blanked(packed.residual, used, xp)
    return replace(packed, norms=xp.where(used, packed.norms, 0.0), center=center, residual=residual)


def gathered(keys, values, page_table, used, xp):
    """Keys and values [B, K, M·page, D] of the pools; a used page that does not exist has keys of norm NaN."""
    (batch, pages), (pool, kv_heads, page) = page_table.shape, keys.codes.shape[:3]
    numbers = xp.clip(page_table, 0, pool - 1)
    missing = (numbers != page_table) & used.reshape(batch, pages, page).any(-1)
    missing = xp.broadcast_to(missing[:, None, :, None], (batch, kv_heads, pages, page))

    def take(x):
        taken = xp.swapaxes(x[numbers], 1, 2)  # [B, K, M, page, ...]
        return taken.reshape(batch, kv_heads, pages * page, *x.shape[3:])

    def vectors(packed):
        center = packed.center
        if center is not None and _varies(center):
            center = take(xp.broadcast_to(center, packed.shape))
        residual = None if packed.residual is None else packed.residual.map(take)
        return PackedVectors(take(packed.codes), take(packed.norms), packed.quantizer, center, residual)

    keys = vectors(keys)
    norms = xp.where(missing.reshape(batch, kv_heads, pages * page), math.nan, keys.norms)
    return replace(keys, norms=norms), vectors(values)


def _varies(center):
    """Whether a pool's center differs from position to position, or from page to page."""
    return center.shape[-2] != 1 or (center.ndim > 3 and center.shape[0] != 1)
