"""Launches the attention kernels of `tqcore.kernels`, Triton and Gluon, on torch tensors."""

import torch

from tq_torch import eager, ops
from tq_torch.triton_call import INTERPRETED, PTX, _can_run_gluon, _device_name
from tqcore import softmax, tuning
from tqcore.kernels import attention_constants, load, merge_constants, stages

KERNELS = {"triton": "attention", "gluon": "gluon_attention"}


def can_do(implementation: str, device: torch.device) -> bool:
    """Whether a kernel runs on a device."""
    if implementation == "gluon":
        return _can_run_gluon(device, KERNELS["gluon"])
    return device.type == "cuda" or INTERPRETED


def attention(query, keys, values, kv_lengths, page_table, sinks, options, implementation, config=None):
    """The arguments of `tqcore.softmax.attention`, without centers and residuals -> out of query's dtype, lse."""
    batch, heads, steps, head_dim = query.shape
    kv_heads, page = keys.codes.shape[1:3]
    rows, kv, positions = heads // kv_heads * steps, batch * kv_heads, softmax.context_size(keys, page_table)
    out, lse = (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        query.new_empty(batch, heads, steps, dtype=torch.float32),
    )
    if 0 in query.shape:
        return out, lse
    name = KERNELS[implementation]
    shape = rows, positions, kv, head_dim, _device_name(query.device)
    bits = keys.quantizer.code_bits, values.quantizer.code_bits
    config = config or tuning.attention_config(name, *shape, options.num_splits, bits, page_table is not None)
    kv_lengths, page_table, sinks = (x if x is None else x.contiguous() for x in (kv_lengths, page_table, sinks))
    parts = query.new_empty(kv, config.splits, rows, head_dim, dtype=torch.float32)
    ml = query.new_empty(kv, config.splits, 2, rows, dtype=torch.float32)
    rotated = query if keys.quantizer.rotation == "hadamard" else ops.rotate(query, keys.quantizer)
    words = [ops.table_words(packed.quantizer, query.device) for packed in (keys, values)]
    arrays = [x for packed in (keys, values) for x in _rows_first(packed)]
    k_codes, k_norms, v_codes, v_norms = arrays
    constants = attention_constants(
        config, options, keys.quantizer, values.quantizer, None if page_table is None else page,
        k_codes.stride(2), v_codes.stride(2),
    )  # fmt: skip
    if implementation == "gluon":
        addresses = (x for codes in (k_codes, v_codes) for x in (codes.data_ptr(), *codes.stride()[:3]))
        constants["STAGES"] = stages(config, *addresses)
    else:
        constants["PTX"] = PTX
    limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
    load(name)[config.grid(rows, kv)](
        rotated.contiguous(), _signs(keys, query.device), k_codes, k_norms, words[0], v_codes, v_norms, words[1],
        kv_lengths, page_table, parts, ml, options.scale, *(x for array in arrays for x in array.stride()[:2]),
        kv_heads, rows, steps, positions, 0 if page_table is None else page_table.shape[1], keys.codes.shape[0],
        config.splits, *(options.window or (0, 0)),
        **constants, num_warps=config.num_warps, num_stages=config.num_stages, **limit, enable_fp_fusion=False,
    )  # fmt: skip
    unrotated = values.quantizer.rotation == "hadamard"
    result = out if unrotated else out.new_empty(out.shape, dtype=torch.float32)
    early = implementation == "gluon"
    load("merge")[(kv * rows,)](
        parts, ml, words[1], _signs(values, query.device), kv_lengths, sinks, result, lse,
        kv_heads, rows, steps, positions, config.splits,
        **merge_constants(config.splits, values.quantizer, sinks is not None, early),
        num_warps=config.merge_warps, enable_fp_fusion=False, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return (out if unrotated else out.copy_(ops.unrotate(result, values.quantizer))), lse


def _rows_first(packed):
    """Codes and norms whose bytes of a vector, and norms along S, lie side by side."""
    codes, norms = packed.codes, packed.norms
    return codes if codes.stride(3) == 1 else codes.contiguous(), norms if norms.stride(2) == 1 else norms.contiguous()


def _signs(packed, device):
    """Those of a Hadamard rotation; None where the kernel does not rotate."""
    return eager.signs(packed.quantizer, device) if packed.quantizer.rotation == "hadamard" else None
