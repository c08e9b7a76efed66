"""Launches the Triton kernels of `tqcore.kernels` on torch tensors."""

from typing import Any

import torch
from triton.runtime.jit import JITFunction

from tqcore import tuning
from tqcore.kernels.scores import MAX_HEAD_DIM, scores_kernel

INTERPRETED = not isinstance(scores_kernel, JITFunction)  # TRITON_INTERPRET=1 when the kernel was imported


def can_do(q: torch.Tensor) -> bool:
    """Whether the kernels take queries of this device and head_dim."""
    return q.shape[-1] <= MAX_HEAD_DIM and (q.is_cuda or INTERPRETED)


def fused_qk_scores(
    q: torch.Tensor,  # [B, H, T, D]
    codes: torch.Tensor,  # [B, K, S, P], any strides along B, K and S
    norms: torch.Tensor,  # [B, K, S], any strides along B and K
    words: torch.Tensor,  # ScoreTable.words
    scale: float,
    config: tuning.ScoreConfig | None = None,
) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    config = config or tuning.score_config(rows, keys, kv, head_dim)
    q = q.contiguous()
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    norms = norms if norms.stride(2) == 1 else norms.contiguous()
    out = q.new_empty(batch, heads, length, keys, dtype=torch.float32)
    programs_s, programs_kv, programs_r = config.grid(rows, keys, kv)
    launch: Any = scores_kernel[programs_s * programs_kv, programs_r]
    launch(
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
        PTX=not INTERPRETED and torch.version.hip is None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out
