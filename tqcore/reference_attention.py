"""The oracle of `attention`: exact scores, then float64."""

import numpy as np
from numpy.typing import NDArray

from tqcore import checks, reference, rotation, softmax
from tqcore.packing import unpack
from tqcore.quantizer import PackedVectors

IMPLEMENTATIONS = ("numpy",)


def attention(
    query: NDArray,
    keys: PackedVectors,
    values: PackedVectors,
    *,
    kv_lengths: NDArray | None = None,
    page_table: NDArray | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: NDArray | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> NDArray | tuple[NDArray, NDArray]:
    """Attention over packed keys and values: out[b,h,t] = Σ_s softmax_s(scale · ⟨query[b,h,t], k̂[b,k,s]⟩) · v̂[b,k,s].

    k̂ and v̂ are what `decompress` returns, centers and residuals included; query head h reads head k = h // (H // K).
    Query t stands at p = kv_length - T + t, and sees position s where s < kv_length, with `is_causal` s ≤ p, and with a
    window p - left ≤ s ≤ p + right. One that sees nothing gets zeros; NaN and infinity that it sees make it NaN. Scores
    of codes are those of `fused_qk_scores`, exact; what follows agrees within a tolerance (docs/format.md).

    Args:
      query: [B, H, T, D] float32, bfloat16 or float16, not rotated.
      keys: PackedVectors [B, K, S, D], K dividing H.
      values: PackedVectors of the same shape; bits, rotation and norm may differ.
      kv_lengths: [B] int32, 0 to S: the positions in use. What lies beyond is not looked at. None means S.
      page_table: [B, M] int32. Keys and values are then pools [N, K, page, D], and position s of sequence b is in page
        page_table[b, s // page]; S is M · page. Entries of which no position is seen are not looked at.
      is_causal: whether a query sees no position after its own, the last query standing at the last position.
      local_window_size: (left, right), or one integer for both: how far a query sees. None means without a bound. A
        causal sliding window of w positions is `is_causal=True` with (w - 1, 0).
      logits_soft_cap: c > 0 turns logits x into c · tanh(x / c) before masking.
      sinks: [H] float32: one more logit for each head, whose value is zero.
      scale: None means 1/√D.
      num_splits: into how many parts S is split, merged by their log-sum-exp. None leaves it to the implementation.
      return_lse: whether the log-sum-exp is returned too.
      implementation: "numpy" or None.

    Returns:
      [B, H, T, D] of the query's dtype; with `return_lse`, and lse [B, H, T] float32, the natural logarithm of the sum
      that the softmax divides by: centers and sinks included, -inf where nothing is seen and there is no sink. So
      `merge_attention` joins it with attention over other keys, the sinks being given to one of the two.

    Raises:
      ValueError: an argument does not fit. Lengths and page numbers out of range are seen too.

    Source: Dao, FlashAttention-2, arXiv:2307.08691; Xiao et al., StreamingLLM, arXiv:2309.17453, for sinks.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_attention(query, keys, values, kv_lengths, page_table, sinks)
    checks.check_flag("return_lse", return_lse)
    options = softmax.options(query, scale, is_causal, local_window_size, logits_soft_cap, num_splits)
    softmax.check_values(kv_lengths, page_table, query, keys, options)
    if kv_lengths is None:
        kv_lengths = np.full(len(query), softmax.context_size(keys, page_table), np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        out, lse = softmax.attention(query, keys, values, kv_lengths, page_table, sinks, options, LIBRARY)
        out = out.astype(query.dtype)
    return (out, lse.astype(np.float32)) if return_lse else out


def merge_attention(
    out_a: NDArray, lse_a: NDArray[np.float32], out_b: NDArray, lse_b: NDArray[np.float32]
) -> tuple[NDArray, NDArray[np.float32]]:
    """Attention over two disjoint sets of keys, from attention over each: Σ exp(lse_i) · out_i / Σ exp(lse_i).

    A part whose lse is -inf adds nothing, whatever its output; where both are, zeros and -inf.

    Args:
      out_a, out_b: [..., D] float32, bfloat16 or float16, both of one dtype.
      lse_a, lse_b: [...] float32, natural logarithms.

    Returns:
      out [..., D] of that dtype, lse [...] float32.

    Raises:
      ValueError: shapes or dtypes do not match.
    """
    checks.check_merge(out_a, lse_a, out_b, lse_b)
    with np.errstate(invalid="ignore"):
        out, lse = softmax.merge(_wide(out_a), _wide(lse_a), _wide(out_b), _wide(lse_b), np)
    return out.astype(out_a.dtype), lse.astype(np.float32)


def _wide(x):
    return x.astype(np.float64)


def _dequantize(packed):
    quantizer = packed.quantizer
    return _wide(quantizer.codebook.centroids)[unpack(packed.codes, np, quantizer.code_bits)] * packed.norms[..., None]


LIBRARY = softmax.Library(
    xp=np,
    arange=lambda count: np.arange(count, dtype=np.int32),
    wide=_wide,
    matmul=np.matmul,
    scores=lambda query, packed, scale: _wide(reference.packed_scores(query, packed, scale)),
    dequantize=_dequantize,
    rotate=lambda x, quantizer: x @ _wide(rotation.matrix(quantizer)).T,
    unrotate=lambda x, quantizer: x @ _wide(rotation.matrix(quantizer)),
)
