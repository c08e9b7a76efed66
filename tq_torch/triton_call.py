"""Launches the kernels of `tqcore.kernels`, Triton and Gluon, on torch tensors."""

from functools import cache

import torch
from triton.runtime.jit import JITFunction

from tqcore import tuning
from tqcore.kernels import load, lookup, score_constants, stages
from tqcore.packing import code_bits

INTERPRETED = not isinstance(load("triton"), JITFunction)  # TRITON_INTERPRET=1 when it was imported
PTX = not INTERPRETED and torch.version.hip is None  # whether kernels may hold NVIDIA's assembly


def can_do(implementation: str, q: torch.Tensor, bits: int) -> bool:
    """Whether a kernel takes queries of this device and head_dim, and codes of as many bits."""
    if q.shape[-1] > tuning.MAX_HEAD_DIM or bits not in lookup.BITS:
        return False
    return _can_run_gluon(q.device) if implementation == "gluon" else q.is_cuda or INTERPRETED


def fused_qk_scores(
    q: torch.Tensor,  # [B, H, T, D]
    codes: torch.Tensor,  # [B, K, S, P], any strides along B, K and S
    norms: torch.Tensor,  # [B, K, S], any strides along B and K
    words: torch.Tensor,  # ScoreTable.words
    scale: float,
    *,
    implementation: str = "triton",
    config: tuning.ScoreConfig | None = None,
) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    kv_heads, keys, packed_dim = codes.shape[1:]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    name = "gluon_long" if implementation == "gluon" and rows > tuning.LONG_ROWS else implementation
    config = config or tuning.score_config(name, rows, keys, kv, head_dim, _device_name(q.device))
    q = q.contiguous()
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    norms = norms if norms.stride(2) == 1 else norms.contiguous()
    out = q.new_empty(batch, heads, length, keys, dtype=torch.float32)
    strides = codes.stride(0), codes.stride(1), norms.stride(0), norms.stride(1)
    constants = score_constants(config, head_dim, code_bits(packed_dim, head_dim), words.shape[0] // 4, codes.stride(2))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    sizes = (*strides, kv_heads, rows, keys, config.blocks)
    if name == "gluon_long":
        planes, factor = _converted_queries(q, words, scale, rows, kv, constants)
        programs_s, _, programs_r = config.long_grid(rows, keys, kv)
        load(name)[programs_s * kv, programs_r](
            planes, factor, codes, norms, words, out, *sizes, **constants, STAGES=config.num_stages, **options
        )
        return out
    if name == "gluon":
        constants["STAGES"] = stages(config, packed_dim, codes.data_ptr(), *codes.stride()[:3])
    else:
        constants["PTX"] = PTX
    programs_s, _, programs_r = config.grid(rows, keys, kv)
    load(name)[programs_s * kv, programs_r](q, codes, norms, words, scale, out, *sizes, **constants, **options)
    return out


def _converted_queries(q, words, scale, rows, kv, constants):
    """Planes [B·K, padded R, 2, 2·BLOCK_P] int8 and factors [B·K, padded R] float32 of all query rows."""
    block_p, groups = constants["BLOCK_P"], tuning.ceil_div(rows, tuning.ROW_GROUP)
    planes = q.new_empty(kv, groups * tuning.ROW_GROUP, 2, 2 * block_p, dtype=torch.int8)
    factor = q.new_empty(kv, groups * tuning.ROW_GROUP, dtype=torch.float32)
    shape = {name: constants[name] for name in ("D", "BITS", "PLANES", "BLOCK_P")}
    load("gluon_queries")[(groups * kv,)](
        q, words, scale, planes, factor, rows, **shape, num_warps=1, enable_fp_fusion=False
    )
    return planes, factor


@cache
def _device_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


@cache
def _can_run_gluon(device: torch.device, name: str = "gluon_long") -> bool:
    """A Hopper device, and a Triton whose Gluon is the one that the kernel of that name is written in."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        load(name)
    except ImportError:
        return False
    return True
