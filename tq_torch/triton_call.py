"""Launches the Triton kernels of `tqcore.kernels` on torch tensors."""

import torch
import triton

from tqcore.fixed_point import ScoreTable
from tqcore.kernels import scores


def fused_qk_scores(
    q: torch.Tensor,  # [B, H, T, D]
    codes: torch.Tensor,  # [B, K, S, P]
    norms: torch.Tensor,  # [B, K, S]
    words: torch.Tensor,  # ScoreTable.words
    scale: float,
    config: scores.Config | None = None,
) -> torch.Tensor:
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    rows = heads // kv_heads * length
    config = config or scores.default_config(rows, head_dim, keys, batch * kv_heads)
    q = q.contiguous()
    out = q.new_empty(batch, heads, length, keys, dtype=torch.float32)
    if codes.stride(3) != 1:
        codes = codes.contiguous()
    if norms.stride(2) != 1:
        norms = norms.contiguous()
    scores.scores_kernel[scores.grid(config, rows, keys, batch * kv_heads)](
        q, codes, norms, words, scale, out,
        codes.stride(0), codes.stride(1), norms.stride(0), norms.stride(1),
        kv_heads, rows, keys, config.blocks,
        CODES_STRIDE_S=codes.stride(2), D=head_dim, PLANES=words.shape[0] // 4,
        BLOCK_R=config.block_r, BLOCK_S=config.block_s, BLOCK_P=max(32, triton.next_power_of_2(head_dim // 2)),
        PTX=q.is_cuda and torch.version.hip is None, num_warps=config.num_warps, num_stages=config.num_stages,
        enable_fp_fusion=False,
    )
    return out
