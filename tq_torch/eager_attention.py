"""`attention` in plain torch: exact scores, then float32, in sums that a device's reduced precision cannot touch."""

from functools import partial

import torch

from tq_torch import compress_ops, eager, ops
from tqcore import softmax


def attention(query, keys, values, kv_lengths, page_table, sinks, options):
    """The arguments of `tqcore.softmax.attention`, `kv_lengths` [B] or None -> out of query's dtype, lse."""
    if kv_lengths is None:
        size = softmax.context_size(keys, page_table)
        kv_lengths = torch.full(query.shape[:1], size, dtype=torch.int32, device=query.device)
    library = softmax.Library(
        xp=torch,
        arange=partial(torch.arange, dtype=torch.int32, device=query.device),
        wide=torch.Tensor.float,
        matmul=eager.matmul,
        scores=partial(ops.packed_scores, implementation="eager"),
        dequantize=compress_ops.dequantize,
        rotate=ops.rotate,
        unrotate=ops.unrotate,
    )
    out, lse = softmax.attention(query, keys, values, kv_lengths, page_table, sinks, options, library)
    return out.to(query.dtype), lse
