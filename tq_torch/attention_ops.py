"""The public operations on packed values: check, choose the implementation, call it."""

from dataclasses import astuple
from functools import partial

import torch

from tq_torch import dense_attention, eager_attention, ops
from tqcore import checks, softmax, tuning
from tqcore.kernels import gluon_is_tested
from tqcore.quantizer import PackedVectors

try:
    from tq_torch import triton_attention
except ImportError:  # a torch without Triton
    triton_attention = None

IMPLEMENTATIONS = ("eager", "dense", "triton", "gluon")
NEEDS = {
    "triton": "'triton' needs Triton, CUDA tensors (or TRITON_INTERPRET=1 in the environment)",
    "gluon": "'gluon' needs Triton with Gluon, CUDA tensors on a Hopper device",
}


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
      implementation: "eager" (any device with float64), "dense" (decompression to the query's dtype, then torch's own
        attention in that precision: no soft cap, sinks or log-sum-exp; NaN in values reaches every row), "triton"
        (CUDA, 2 to 4 bits, D up to 256, no residual, no center that varies along S; on a CPU Triton's interpreter,
        under TRITON_INTERPRET=1), "gluon" (the same on a Hopper device), or None: on CUDA dense for many query rows,
        else the first of gluon and triton that can do the case; else eager.

    Returns:
      [B, H, T, D] of the query's dtype; with `return_lse`, and lse [B, H, T] float32, the natural logarithm of the sum
      that the softmax divides by: centers and sinks included, -inf where nothing is seen and there is no sink. So
      `merge_attention` joins it with attention over other keys, the sinks being given to one of the two.

    Raises:
      ValueError: an argument does not fit. Lengths and page numbers out of range are seen in CPU tensors, outside of
        compilation; elsewhere they make their sequence NaN.
      NotImplementedError: the implementation asked for cannot do this case.

    Source: Dao, FlashAttention-2, arXiv:2307.08691; Xiao et al., StreamingLLM, arXiv:2309.17453, for sinks.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_attention(query, keys, values, kv_lengths, page_table, sinks)
    checks.check_flag("return_lse", return_lse)
    options = softmax.options(query, scale, is_causal, local_window_size, logits_soft_cap, num_splits)
    arrays = {"query": query, "keys.codes": keys.codes, "values.codes": values.codes}
    arrays |= {"kv_lengths": kv_lengths, "page_table": page_table, "sinks": sinks}
    ops.check_devices(**arrays)
    softmax.check_values(_on_host(kv_lengths), _on_host(page_table), query, keys, options)
    can_be_dense = not return_lse and sinks is None and options.soft_cap is None
    if implementation == "dense" or (implementation is None and can_be_dense and _has_many_rows(query, keys)):
        if not can_be_dense:
            raise NotImplementedError(
                f"'dense' needs no soft cap, no sinks and no log-sum-exp, got logits_soft_cap={logits_soft_cap}, "
                f"{'no ' if sinks is None else ''}sinks, return_lse={return_lse}; 'eager' has no such need."
            )
        return dense_attention.attention(query, keys, values, kv_lengths, page_table, options)
    if kv_lengths is None:
        size = softmax.context_size(keys, page_table)
        kv_lengths = torch.full(query.shape[:1], size, dtype=torch.int32, device=query.device)
    name = _choose(implementation, query, keys, values, page_table, options)
    attend = eager_attention.attention if name == "eager" else partial(_kernel_attention, name)
    out, lse = attend(query, keys, values, kv_lengths, page_table, sinks, options)
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
    ops.check_devices(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    out, lse = softmax.merge(out_a.float(), lse_a, out_b.float(), lse_b, torch)
    return out.to(out_a.dtype), lse


def _on_host(x):
    """As a NumPy array, or None where its values cannot be seen, or not without waiting for a device."""
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or x.device.type != "cpu":
        return None
    return x.numpy()


def _has_many_rows(query, keys):
    """Whether decompression pays, on a CUDA device."""
    return query.is_cuda and query.shape[2] * (query.shape[1] // keys.codes.shape[1]) >= _dense_rows(query.device)


@torch.compiler.assume_constant_result
def _dense_rows(device: torch.device) -> int:
    return tuning.dense_rows(torch.cuda.get_device_name(device))


def _choose(implementation, query, keys, values, page_table, options):
    """The implementation asked for, or the best that can."""
    if implementation == "eager":
        return "eager"
    name = _kernel_on(query.device, implementation)
    if name is not None and softmax.kernels_take(keys, values, page_table, options):
        return name
    if implementation is None:
        return "eager"
    raise NotImplementedError(
        f"{NEEDS[implementation]}, {softmax.KERNEL_NEEDS}, got {softmax.kernels_got(keys, values, options)} on "
        f"{query.device}; 'eager' has no such need."
    )


@torch.compiler.assume_constant_result
def _kernel_on(device: torch.device, implementation: str | None) -> str | None:
    """The kernel asked for, or the best for a caller who names none, if it runs on the device."""
    if triton_attention is None or (implementation is None and device.type != "cuda"):
        return None
    names = [implementation] if implementation else ["gluon", "triton"] if gluon_is_tested() else ["triton"]
    return next((name for name in names if triton_attention.can_do(name, device)), None)


def _kernel_attention(implementation, query, keys, values, kv_lengths, page_table, sinks, options):
    """Attention by kernels; centers, which they do not know, are added after them."""
    centered = keys.center is not None or values.center is not None
    out, lse = torch.ops.tq_torch.attention(
        query, keys.codes, keys.norms, values.codes, values.norms, kv_lengths, page_table, None if centered else sinks,
        *ops._fields(keys.quantizer), *ops._fields(values.quantizer), *astuple(options), implementation,
    )  # fmt: skip
    if centered:
        library = eager_attention.library_of(query)
        out, lse = softmax.with_centers(out.float(), lse, query, keys, values, sinks, options, library)
    return out.to(query.dtype), lse


# --- the kernels as torch sees them ----------------------------------------------------------------------------------

VALUE_QUANTIZER = "int v_head_dim, int v_bits, str v_rotation, int v_seed, str v_norm"
_library = torch.library.Library("tq_torch", "FRAGMENT")
_library.define(
    "attention(Tensor query, Tensor k_codes, Tensor k_norms, Tensor v_codes, Tensor v_norms, Tensor kv_lengths, "
    f"Tensor? page_table, Tensor? sinks, {ops.QUANTIZER}, {VALUE_QUANTIZER}, float scale, "
    "bool is_causal, int[]? window, float? soft_cap, int? num_splits, str implementation) -> (Tensor, Tensor)"
)
ARRAYS, FIELDS = 8, 5  # arguments of the op that are tensors; those of a quantizer


def _arguments(arguments):
    """The arguments of `eager_attention.attention`, and the implementation, from those of the op."""
    query, k_codes, k_norms, v_codes, v_norms, kv_lengths, page_table, sinks = arguments[:ARRAYS]
    of_keys, of_values = arguments[ARRAYS:][:FIELDS], arguments[ARRAYS + FIELDS :][:FIELDS]
    scale, is_causal, window, soft_cap, num_splits, implementation = arguments[ARRAYS + 2 * FIELDS :]
    options = softmax.Options(scale, is_causal, None if window is None else tuple(window), soft_cap, num_splits)
    keys = PackedVectors(k_codes, k_norms, ops._quantizer(*of_keys))
    values = PackedVectors(v_codes, v_norms, ops._quantizer(*of_values))
    return (query, keys, values, kv_lengths, page_table, sinks, options), implementation


def _attention(*arguments):
    given, implementation = _arguments(arguments)
    return triton_attention.attention(*given, implementation)  # type: ignore


_library.impl("attention", _attention, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::attention", lib=_library)
def _(query, *_):
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:ARRAYS])
    ctx.rest = inputs[ARRAYS:]


def _backward(ctx, *grads):
    """Through eager attention, by the query."""
    (query, *given), _ = _arguments((*ctx.saved_tensors, *ctx.rest))
    with torch.enable_grad():
        query = query.detach().requires_grad_()
        outputs = eager_attention.attention(query, *given)
        (of_query,) = torch.autograd.grad(outputs, query, grads)
    return of_query, *(None for _ in range(ARRAYS - 1 + len(ctx.rest)))


torch.library.register_autograd("tq_torch::attention", _backward, setup_context=_save, lib=_library)
