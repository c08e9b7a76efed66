"""Launches the kernels of `tqcore.kernels`, Triton and Gluon, on torch tensors."""

from functools import cache

import torch
import triton
from triton.runtime.jit import JITFunction

from tqcore import tuning
from tqcore.kernels import score_constants, score_kernel

INTERPRETED = not isinstance(score_kernel("triton")[0], JITFunction)  # TRITON_INTERPRET=1 when it was imported
GLUON_TESTED_WITH = ("3.6.", "3.7.")  # versions of Triton; Gluon is an experimental dialect
GLUON_ROWS = 512  # past which the work is a matmul, and Triton's warpgroups do it faster


def can_do(implementation: str, q: torch.Tensor) -> bool:
    """Whether a kernel takes queries of this device and head_dim."""
    if q.shape[-1] > tuning.MAX_HEAD_DIM:
        return False
    return _can_run_gluon(q.device) if implementation == "gluon" else q.is_cuda or INTERPRETED


def prefers_gluon(rows: int) -> bool:
    """Whether Gluon is to be chosen for R = T·G rows where the caller names no implementation."""
    return rows <= GLUON_ROWS and triton.__version__.startswith(GLUON_TESTED_WITH)


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
    kv_heads, keys = codes.shape[1:3]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    kernel, rule = score_kernel(implementation)
    config = config or rule(rows, keys, kv, head_dim)
    ptx = {"PTX": not INTERPRETED and torch.version.hip is None} if implementation == "triton" else {}
    q = q.contiguous()
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    norms = norms if norms.stride(2) == 1 else norms.contiguous()
    out = q.new_empty(batch, heads, length, keys, dtype=torch.float32)
    programs_s, programs_kv, programs_r = config.grid(rows, keys, kv)
    kernel[programs_s * programs_kv, programs_r](
        q,
        codes,
        norms,
        words,
        scale,
        out,
        codes.stride(0),
        codes.stride(1),
        norms.stride(0),
        norms.stride(1),
        kv_heads,
        rows,
        keys,
        config.blocks,
        **score_constants(config, head_dim, words.shape[0] // 4, codes.stride(2)),
        **ptx,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out


@cache
def _can_run_gluon(device: torch.device) -> bool:
    """A Hopper device, and a Triton whose Gluon is the one that the kernel is written in."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        score_kernel("gluon")
    except ImportError:
        return False
    return True
