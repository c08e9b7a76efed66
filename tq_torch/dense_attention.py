"""`attention` by decompression, then torch's own: faster than kernels for many query rows, as in a long prefill.

Keys and values are decompressed to the query's dtype; the softmax is torch's. Memory grows with S, not with T · S.
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from tq_torch import compress_ops, eager_attention
from tqcore import softmax

MASK_BYTES = 2**26  # of one call: so many query positions are taken at a time


def attention(query, keys, values, kv_lengths, page_table, options):
    """The arguments of `tqcore.softmax.attention` without sinks, `kv_lengths` [B] or None -> out of query's dtype."""
    (batch, heads, steps, head_dim), kv_heads = query.shape, keys.codes.shape[1]
    size = softmax.context_size(keys, page_table)
    if 0 in (*query.shape, size):
        return torch.zeros_like(query)
    dense = {"scale": options.scale, "dropout_p": 0.0}
    if kv_lengths is None and page_table is None and options.window is None and steps <= size:
        mask = causal_lower_right(steps, size) if options.is_causal and steps > 1 else None
        keys, values = (compress_ops.decompress(packed, dtype=query.dtype) for packed in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, enable_gqa=heads != kv_heads, **dense)
    if kv_lengths is None:
        kv_lengths = torch.full((batch,), size, dtype=torch.int32, device=query.device)
    keys, values = softmax.seen_alone(
        keys, values, kv_lengths, page_table, steps, options, eager_attention.library_of(query)
    )
    keys, values = (compress_ops.decompress(packed, dtype=query.dtype) for packed in (keys, values))
    rows = query.reshape(batch, kv_heads, heads // kv_heads, steps, head_dim)
    positions, outs = torch.arange(size, dtype=torch.int32, device=query.device), []
    chunk = max(1, MASK_BYTES // (batch * rows.shape[2] * size))
    for start in range(0, steps, chunk):
        at = torch.arange(start, min(start + chunk, steps), dtype=torch.int32, device=query.device)
        visible = softmax.visible_positions(kv_lengths, at, positions, options, steps).expand(-1, len(at), -1)
        part = rows[:, :, :, start : start + chunk]
        mask = visible.repeat(1, rows.shape[2], 1)[:, None]
        out = scaled_dot_product_attention(part.flatten(2, 3), keys, values, mask, **dense).reshape(part.shape)
        outs.append(torch.where(visible.any(-1)[:, None, None, :, None], out, 0.0))
    out = torch.cat(outs, 3).reshape(query.shape)
    fits = (kv_lengths >= 0) & (kv_lengths <= size)
    return torch.where(fits[:, None, None, None], out, float("nan")).to(query.dtype)
