"""Attention over a cache: that over its packed positions, and that over its dense ones."""

from collections.abc import Callable
from typing import Any

from tqcore import softmax


def attend_packed(cache: Any, query: Any, is_causal: bool, call: Callable[..., Any]) -> tuple[Any, Any]:
    """Attention over packed positions. Of a query behind all of them, `attention` cannot know how far behind.

    With d dense recent positions, query t stands where query t + d of the last T packed positions does, and from
    t + d = T - 1 on sees them all.
    """
    xp, steps, ring = cache.library.xp, query.shape[2], cache.config.ring
    if not is_causal or steps == 1 or not ring:
        return call(query, is_causal=is_causal and not ring)
    steps_at = cache.library.arange(steps, cache.lengths)
    behind = xp.clip(cache.lengths - cache.config.first - cache.packed_lengths, 0, None)[:, None]
    among = call(cache.library.take(query, xp.clip(steps_at - behind, 0, None)), is_causal=True)
    last = min(steps, ring)
    beyond = call(query[:, :, steps - last :], is_causal=False)
    is_among = steps_at + behind < steps
    index = xp.clip(steps_at + behind, None, steps - 1)
    rest = xp.clip(steps_at - (steps - last), 0, None) + 0 * behind

    def choose(a, b):
        a, b = (x if x.ndim == 4 else x[..., None] for x in (a, b))
        return xp.where(is_among[:, None, :, None], cache.library.take(a, index), cache.library.take(b, rest))

    return choose(among[0], beyond[0]), choose(among[1], beyond[1])[..., 0]


def attend_dense(cache: Any, query: Any, options: softmax.Options) -> tuple[Any, Any]:
    """Attention over dense positions, of the query's dtype, and its log-sum-exp."""
    lib, (batch, heads, steps, head_dim) = cache.library, query.shape
    positions = cache.slot_positions(cache.lengths)
    at = cache.lengths[:, None] - steps + lib.arange(steps, cache.lengths)
    visible = cache.is_dense(positions)[:, None]
    if options.is_causal:
        visible = visible & (positions[:, None] <= at[..., None])
    if options.window is not None:
        left, right = options.window
        away = positions[:, None] - at[..., None]
        visible = visible & (away >= -left) & (away <= right)
    keys, values = lib.wide(cache.dense_keys), lib.wide(cache.dense_values)
    rows = lib.wide(query).reshape(batch, cache.kv_heads, -1, head_dim)
    logits = (lib.matmul(rows, keys.swapaxes(-1, -2)) * options.scale).reshape(batch, heads, steps, -1)
    if options.soft_cap is not None:
        logits = lib.xp.tanh(logits / options.soft_cap) * options.soft_cap
    out, lse = softmax.attend_part(logits, values, visible[:, None], lib)
    return lib.cast(out, query), lib.cast(lse, cache.keys.norms)
