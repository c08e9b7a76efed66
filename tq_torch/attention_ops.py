"""The public operations on packed values: check, choose the implementation, call it."""

import torch

from tq_torch import eager_attention
from tqcore import checks, softmax
from tqcore.quantizer import PackedVectors

IMPLEMENTATIONS = ("eager",)


def attention(
    query: torch.Tensor,
    keys: PackedVectors,
    values: PackedVectors,
    *,
    kv_lengths: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed keys and values: out[b,h,t] = Σ_s softmax_s(scale · ⟨query[b,h,t], k̂[b,k,s]⟩) · v̂[b,k,s].

    k̂ and v̂ are what `decompress` returns, centers and residuals included; query head h reads head k = h // (H // K).
    Query t stands at p = kv_length - T + t, and sees position s where s < kv_length, with `is_causal` s ≤ p, and with a
    window p - left ≤ s ≤ p + right. One that sees nothing gets zeros; NaN and infinity that it sees make it NaN. Scores
    of codes are those of `fused_qk_scores`, exact; what follows agrees within a tolerance (docs/format.md).
    Works under `torch.compile`, `torch.export` and CUDA graphs: nothing waits for the device. Differentiates by the
    query as the function that it approximates.

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
      implementation: "eager" or None: eager, on any device with float64.

    Returns:
      [B, H, T, D] of the query's dtype; with `return_lse`, and lse [B, H, T] float32, the natural logarithm of the sum
      that the softmax divides by: centers and sinks included, -inf where nothing is seen and there is no sink. So
      `merge_attention` joins it with attention over other keys, the sinks being given to one of the two.

    Raises:
      ValueError: an argument does not fit. Lengths and page numbers out of range are seen in CPU tensors, outside of
        compilation; elsewhere they make their sequence NaN.

    Source: Dao, FlashAttention-2, arXiv:2307.08691; Xiao et al., StreamingLLM, arXiv:2309.17453, for sinks.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_attention(query, keys, values, kv_lengths, page_table, sinks)
    checks.check_flag("return_lse", return_lse)
    options = softmax.options(query, scale, is_causal, local_window_size, logits_soft_cap, num_splits)
    arrays = {"query": query, "keys.codes": keys.codes, "values.codes": values.codes}
    arrays |= {"kv_lengths": kv_lengths, "page_table": page_table, "sinks": sinks}
    checks.check_devices({name: x.device for name, x in arrays.items() if x is not None})
    softmax.check_values(_on_host(kv_lengths), _on_host(page_table), query, keys, options)
    out, lse = eager_attention.attention(query, keys, values, kv_lengths, page_table, sinks, options)
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
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
    checks.check_devices({"out_a": out_a.device, "lse_a": lse_a.device, "out_b": out_b.device, "lse_b": lse_b.device})
    out, lse = softmax.merge(out_a.float(), lse_a, out_b.float(), lse_b, torch)
    return out.to(out_a.dtype), lse


def _on_host(x):
    """As a NumPy array, or None where its values cannot be seen, or not without waiting for a device."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.device.type != "cpu":
        return None
    return x.numpy()
