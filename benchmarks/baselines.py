"""What a user would run in place of packed scores: dense products in torch and in JAX, and the original algorithm.

Letters as in `tqcore`. Dense queries [B, H, T, D] come with the scale already in them, dense keys [B, K, S, D] with
their norms, both rotated, so that a baseline is one product. Key head k serves the rows of its G·T queries at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
import triton
import triton.language as tl

from tqcore import tuning


@dataclass(frozen=True)
class Dense:
    """A dense product.

    Args:
      dtype: of queries and keys.
      score_bytes: of one score.
      tolerance: largest ‖scores - exact‖ / ‖exact‖, the rounding of queries and keys to `dtype` included.
      function: (q_rotated, keys) -> [B, H, T, S].
    """

    dtype: str
    score_bytes: int
    tolerance: float
    function: Callable[[Any, Any], Any]


def torch_scores(q_rotated: torch.Tensor, keys: torch.Tensor, **options) -> torch.Tensor:
    """⟨q, key⟩ as one batched product, [B, H, T, D] × [B, K, S, D] -> [B, H, T, S]; `options` as in `torch.bmm`."""
    batch, kv_heads, positions, head_dim = keys.shape
    q = q_rotated.reshape(batch * kv_heads, -1, head_dim)
    scores = torch.bmm(q, keys.reshape(batch * kv_heads, positions, head_dim).mT, **options)
    return scores.reshape(*q_rotated.shape[:3], positions)


def jax_scores(q_rotated: jax.Array, keys: jax.Array, **options) -> jax.Array:
    """⟨q, key⟩ as one batched product, [B, H, T, D] × [B, K, S, D] -> [B, H, T, S]; `options` as in `jnp.einsum`."""
    batch, kv_heads, positions, head_dim = keys.shape
    q = q_rotated.reshape(batch, kv_heads, -1, head_dim)
    scores = jnp.einsum("bkrd,bksd->bkrs", q, keys, **options)
    return scores.reshape(*q_rotated.shape[:3], positions)


_torch_float32_out = functools.partial(torch_scores, out_dtype=torch.float32)
_jax_float32_out = functools.partial(jax_scores, preferred_element_type=jnp.float32)
_jax_highest = functools.partial(jax_scores, precision="highest")

DENSE: dict[str, dict[str, Dense]] = {
    "torch": {
        "dense_bf16": Dense("bfloat16", 2, 1e-2, torch_scores),
        "dense_bf16_f32out": Dense("bfloat16", 4, 1e-2, _torch_float32_out),  # CUDA only, and not in every torch
        "dense_fp32": Dense("float32", 4, 1e-5, torch_scores),  # torch's default: no TF32
    },
    "jax": {
        "dense_bf16": Dense("bfloat16", 2, 1e-2, jax_scores),
        "dense_bf16_f32out": Dense("bfloat16", 4, 1e-2, _jax_float32_out),
        "dense_fp32": Dense("float32", 4, 2e-3, jax_scores),  # JAX's default: TF32 on CUDA
        "dense_fp32_highest": Dense("float32", 4, 1e-5, _jax_highest),
    },
}

ORIGINAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class OriginalConfig:
    block_s: int
    num_warps: int

    def grid(self, rows: int, keys: int) -> tuple[int, int]:
        """(query rows, key blocks)."""
        return rows, tuning.ceil_div(keys, self.block_s)


ORIGINAL_CONFIGS = tuple(OriginalConfig(*pair) for pair in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4)))


@triton.jit
def original_kernel(
    q_ptr,  # [B·H·T, D] float32
    codes_ptr,  # [B·K, S, P] uint8
    norms_ptr,  # [B·K, S] float32
    centroids_ptr,  # [16] float32
    scale,  # float32
    out_ptr,  # [B·H·T, S] float32
    R,  # G·T
    S,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.arange(0, BLOCK_P)
    inside, live = s < S, p < D // 2
    q_even = tl.load(q_ptr + row * D + 2 * p, mask=live, other=0.0)
    q_odd = tl.load(q_ptr + row * D + 2 * p + 1, mask=live, other=0.0)

    key = row // R * S + s
    codes = tl.load(codes_ptr + key[:, None] * (D // 2) + p[None, :], mask=inside[:, None] & live[None, :], other=0)
    even = tl.load(centroids_ptr + (codes >> 4).to(tl.int32))
    odd = tl.load(centroids_ptr + (codes & 15).to(tl.int32))
    product = tl.sum(even * q_even[None, :] + odd * q_odd[None, :], 1)
    norm = tl.load(norms_ptr + key, mask=inside, other=0.0)
    tl.store(out_ptr + row * S + s, product * norm * scale, mask=inside)


def original_scores(
    q_rotated: torch.Tensor,
    packed_indices: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    *,
    n_q_heads: int,
    n_kv_heads: int,
    config: OriginalConfig = ORIGINAL_CONFIGS[0],
) -> torch.Tensor:
    """The algorithm of the first Triton kernel for this op, in float32: one program per query row and key block.

    Every query head reads its keys for itself, and the table is loaded by index. Two things differ from that kernel:
    the grid follows from the block, and all T positions take one launch.

    Args:
      q_rotated: [B, H, T, D] float32.
      packed_indices: [B, K, S, D/2] uint8.
      norms: [B, K, S] float32.
      centroids: [16] float32.

    Returns:
      [B, H, T, S] float32 in natural units.

    Source: the algorithm of `turboquant_vllm.triton.fused_qk_attention`, written anew.
    """
    batch, _, length, head_dim = q_rotated.shape
    positions = norms.shape[2]
    out = q_rotated.new_empty(batch, n_q_heads, length, positions)
    original_kernel[config.grid(batch * n_q_heads * length, positions)](
        q_rotated,
        packed_indices,
        norms,
        centroids,
        scale,
        out,
        n_q_heads // n_kv_heads * length,
        positions,
        D=head_dim,
        BLOCK_S=config.block_s,
        BLOCK_P=tuning.next_power_of_two(head_dim // 2),
        num_warps=config.num_warps,
    )
    return out


def tune_original(*arguments, **options) -> OriginalConfig:
    """The fastest of ORIGINAL_CONFIGS on the arguments of `original_scores`; on a CPU the first of them."""
    if not arguments[0].is_cuda:
        return ORIGINAL_CONFIGS[0]

    def milliseconds(config: OriginalConfig) -> float:
        call = functools.partial(original_scores, *arguments, **options, config=config)
        return triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median")

    return min(ORIGINAL_CONFIGS, key=milliseconds)
