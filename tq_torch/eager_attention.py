"""`attention` in plain torch: exact scores, then float32, in sums that a device's reduced precision cannot touch."""

from functools import partial

import torch

from tq_torch import eager, ops
from tqcore import softmax


def attention(query, keys, values, kv_lengths, page_table, sinks, options):
    """The arguments of `tqcore.softmax.attention` -> out of query's dtype, lse."""
    library = library_of(query)
    out, lse = softmax.attention(query, keys, values, kv_lengths, page_table, sinks, options, library)
    return out.to(query.dtype), lse


def library_of(query):
    return softmax.Library(
        xp=torch,
        arange=partial(torch.arange, dtype=torch.int32, device=query.device),
        wide=torch.Tensor.float,
        matmul=eager.matmul,
        scores=partial(ops.packed_scores, implementation="eager"),
        dequantize=ops.dequantize,
        rotate=ops.rotate,
        unrotate=ops.unrotate,
    )
