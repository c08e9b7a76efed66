"""What packed scores are compared with: dense products in torch and in JAX, the original algorithm, and the floor.

Letters as in `tqcore`. Dense queries [B, H, T, D] come with the scale already in them, dense keys [B, K, S, D] with
their norms, both rotated, so that a baseline is one product. Key head k serves the rows of its G·T queries at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import timing
import torch
import triton
import triton.language as tl


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


ORIGINAL_CONFIGS = tuple(OriginalConfig(*pair) for pair in ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4), (128, 4)))


@triton.jit
def original_kernel(
    q_ptr,  # [B·H·T, D] float32, rows Q_STRIDE apart
    codes_ptr,  # [B·K, S, P] uint8
    norms_ptr,  # [B·K, S] float32
    centroids_ptr,  # [16] float32
    scale,  # float32
    out_ptr,  # [B·H·T, S] float32, rows OUT_STRIDE apart
    R,  # G·T
    S,
    Q_STRIDE,
    OUT_STRIDE,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    p = tl.arange(0, BLOCK_P)
    inside, live = s < S, p < D // 2
    q_even = tl.load(q_ptr + row * Q_STRIDE + 2 * p, mask=live, other=0.0)
    q_odd = tl.load(q_ptr + row * Q_STRIDE + 2 * p + 1, mask=live, other=0.0)

    key = row // R * S + s
    codes = tl.load(codes_ptr + key[:, None] * (D // 2) + p[None, :], mask=inside[:, None] & live[None, :], other=0)
    even = tl.load(centroids_ptr + (codes >> 4).to(tl.int32))
    odd = tl.load(centroids_ptr + (codes & 15).to(tl.int32))
    product = tl.sum(even * q_even[None, :] + odd * q_odd[None, :], 1)
    norm = tl.load(norms_ptr + key, mask=inside, other=0.0)
    tl.store(out_ptr + row * OUT_STRIDE + s, product * norm * scale, mask=inside)


def original_scores(
    q_rotated: torch.Tensor,
    packed_indices: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    *,
    config: OriginalConfig = ORIGINAL_CONFIGS[0],
    loop: bool = False,
) -> torch.Tensor:
    """The algorithm of the first Triton kernel for this op, in float32: one program per query row and key block.

    Every query head reads its keys for itself, and the table is loaded by index. Two things differ from that kernel:
    the grid follows from the block, and without `loop` all T positions take one launch.

    Args:
      q_rotated: [B, H, T, D] float32.
      packed_indices: [B, K, S, D/2] uint8.
      norms: [B, K, S] float32.
      centroids: [16] float32.
      loop: one launch per query position, as the kernel was used.

    Returns:
      [B, H, T, S] float32 in natural units.

    Source: the algorithm of `turboquant_vllm.triton.fused_qk_attention`, written anew.
    """
    batch, heads, length, head_dim = q_rotated.shape
    kv_heads, positions = norms.shape[1:]
    out = q_rotated.new_empty(batch, heads, length, positions)
    step = 1 if loop else length
    for t in range(0, length, step):
        original_kernel[batch * heads * step, triton.cdiv(positions, config.block_s)](
            q_rotated[:, :, t:],
            packed_indices,
            norms,
            centroids,
            scale,
            out[:, :, t:],
            heads // kv_heads * step,
            positions,
            length // step * head_dim,
            length // step * positions,
            D=head_dim,
            BLOCK_S=config.block_s,
            BLOCK_P=triton.next_power_of_2(head_dim // 2),
            num_warps=config.num_warps,
        )
    return out


def tune_original(groups: list[list[tuple]], *table_and_scale) -> OriginalConfig:
    """The fastest of ORIGINAL_CONFIGS on (q_rotated, packed_indices, norms) of `groups`."""

    def of(config: OriginalConfig) -> Callable[..., torch.Tensor]:
        return lambda *packed: original_scores(*packed, *table_and_scale, config=config)

    return timing.fastest({config: of(config) for config in ORIGINAL_CONFIGS}, groups)


@dataclass(frozen=True)
class FloorConfig:
    block_s: int
    blocks: int
    num_warps: int


FLOOR_CONFIGS = tuple(FloorConfig(*three) for three in ((32, 1, 1), (128, 1, 4), (256, 1, 4), (512, 1, 8), (128, 4, 4)))
LARGEST_FLOOR_BLOCK = 2**13  # scores


@triton.jit(do_not_specialize=["R"])
def floor_kernel(
    words_ptr,  # [B·K, S, W] int32
    norms_ptr,  # [B·K, S] float32
    out_ptr,  # [B·K, R, S] float32
    R,
    S,
    W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    programs_s = tl.cdiv(S, BLOCKS * BLOCK_S)
    head = (tl.program_id(0) // programs_s).to(tl.int64)
    start = (tl.program_id(0) % programs_s).to(tl.int64) * BLOCKS * BLOCK_S
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    w = tl.arange(0, BLOCK_W)
    for block in tl.range(0, BLOCKS, num_stages=3):
        s = start + block * BLOCK_S + tl.arange(0, BLOCK_S)
        inside = s < S
        key = head * S + s
        words = tl.load(words_ptr + key[:, None] * W + w[None, :], mask=inside[:, None] & (w[None, :] < W), other=0)
        norm = tl.load(norms_ptr + key, mask=inside, other=0.0)
        value = tl.xor_sum(words, 1).to(tl.float32) + norm
        out = tl.broadcast_to(value[None, :], [BLOCK_R, BLOCK_S])
        tl.store(out_ptr + (head * R + r[:, None]) * S + s[None, :], out, mask=(r[:, None] < R) & inside[None, :])


def floor_scores(
    q_rotated: torch.Tensor, packed_indices: torch.Tensor, norms: torch.Tensor, *, config: FloorConfig
) -> torch.Tensor:
    """No scores: reads codes [B, K, S, P] and norms, writes [B, H, T, S] float32, one exclusive or a 32-bit word."""
    batch, heads, length, _ = q_rotated.shape
    kv_heads, positions, words = norms.shape[1], norms.shape[2], packed_indices.shape[3] // 4
    rows = heads // kv_heads * length
    block_r = min(triton.next_power_of_2(rows), LARGEST_FLOOR_BLOCK // config.block_s)
    programs_s = triton.cdiv(positions, config.block_s * config.blocks)
    out = q_rotated.new_empty(batch, heads, length, positions)
    floor_kernel[batch * kv_heads * programs_s, triton.cdiv(rows, block_r)](
        packed_indices.view(torch.int32),
        norms,
        out,
        rows,
        positions,
        W=words,
        BLOCK_R=block_r,
        BLOCK_S=config.block_s,
        BLOCK_W=triton.next_power_of_2(words),
        BLOCKS=config.blocks,
        num_warps=config.num_warps,
    )
    return out


def tune_floor(groups: list[list[tuple]]) -> FloorConfig:
    """The fastest of FLOOR_CONFIGS on (q_rotated, packed_indices, norms) of `groups`."""
    functions = {config: functools.partial(floor_scores, config=config) for config in FLOOR_CONFIGS}
    return timing.fastest(functions, groups)
