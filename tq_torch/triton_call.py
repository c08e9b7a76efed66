"""Launches the kernels of `tqcore.kernels`, Triton and Gluon, on torch tensors."""

from functools import cache
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from tqcore import tuning
from tqcore.kernels import scores

try:
    from tqcore.kernels import gluon_scores
except ImportError:  # a Triton without Gluon, or with another one
    gluon_scores = None

INTERPRETED = not isinstance(scores.scores_kernel, JITFunction)  # TRITON_INTERPRET=1 when the kernel was imported
GLUON_TESTED_WITH = ("3.6.", "3.7.")  # versions of Triton; Gluon is an experimental dialect
GLUON_ROWS = 512  # past which the work is a matmul, and Triton's warpgroups do it faster


def can_do(implementation: str, q: torch.Tensor) -> bool:
    """Whether a kernel takes queries of this device and head_dim."""
    if implementation == "gluon":
        return gluon_scores is not None and q.shape[-1] <= gluon_scores.MAX_HEAD_DIM and _is_hopper(q.device)
    return q.shape[-1] <= scores.MAX_HEAD_DIM and (q.is_cuda or INTERPRETED)


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
    if implementation == "gluon" and gluon_scores is not None:
        options = {}
        kernel: Any = gluon_scores.scores_kernel
        config = config or tuning.gluon_score_config(rows, keys, kv, head_dim)
    else:
        options = {"PTX": not INTERPRETED and torch.version.hip is None}
        kernel = scores.scores_kernel
        config = config or tuning.score_config(rows, keys, kv, head_dim)
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
        CODES_STRIDE_S=codes.stride(2),
        D=head_dim,
        PLANES=words.shape[0] // 4,
        BLOCK_R=config.block_r,
        BLOCK_S=config.block_s,
        BLOCK_P=tuning.packed_block(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **options,
    )
    return out


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
