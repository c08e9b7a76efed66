"""The public operations on packed values: check, choose the implementation, call it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from tqcore import checks, softmax, tuning
from tqcore.kernels import can_load, gluon_is_tested
from tqcore.quantizer import PackedVectors
from tqjax import dense_attention, device, ops, partition, triton_attention, triton_call, xla_attention

try:
    from tqjax import pallas_attention
except ImportError:  # a JAX without Pallas-Triton
    pallas_attention = None

IMPLEMENTATIONS = ("xla", "dense", "pallas_triton", "triton", "gluon")
NEEDS = {
    "pallas_triton": "'pallas_triton' needs a JAX with Pallas-Triton",
    "triton": "'triton' needs CUDA, an installed Triton",
    "gluon": "'gluon' needs a Hopper device, an installed Triton with Gluon",
}


def attention(
    query: jax.Array,
    keys: PackedVectors,
    values: PackedVectors,
    *,
    kv_lengths: jax.Array | None = None,
    page_table: jax.Array | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over packed keys and values: out[b,h,t] = Σ_s softmax_s(scale · ⟨query[b,h,t], k̂[b,k,s]⟩) · v̂[b,k,s].

    k̂ and v̂ are what `decompress` returns, centers and residuals included; query head h reads head k = h // (H // K).
    Query t stands at p = kv_length - T + t, and sees position s where s < kv_length, with `is_causal` s ≤ p, and with a
    window p - left ≤ s ≤ p + right. One that sees nothing gets zeros; NaN and infinity that it sees make it NaN. Scores
    of codes are those of `fused_qk_scores`, exact; what follows agrees within a tolerance (docs/format.md).
    Works under `jit`, with nothing compiled anew as lengths and pages change, and `vmap`. Differentiates by the query
    as the function that it approximates.

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
      implementation: "xla" (any device), "dense" (decompression to the query's dtype, then JAX's own attention in that
        precision: no soft cap, sinks or log-sum-exp; NaN in values reaches every row), "pallas_triton" (CUDA, 2 to 4
        bits, D up to 256, no residual, no center that varies along S; interpreted on a CPU), "triton" (the same with an
        installed Triton, CUDA alone), "gluon" (the same on a Hopper device), or None: on CUDA dense for many query
        rows, else the first of gluon (if all devices are Hoppers), triton and pallas_triton that can do the case; else
        xla.

    Returns:
      [B, H, T, D] of the query's dtype; with `return_lse`, and lse [B, H, T] float32, the natural logarithm of the sum
      that the softmax divides by: centers and sinks included, -inf where nothing is seen and there is no sink. So
      `merge_attention` joins it with attention over other keys, the sinks being given to one of the two.

    Raises:
      ValueError: an argument does not fit. Lengths and page numbers out of range are seen where they are concrete and
        on a CPU; elsewhere they make their sequence NaN.
      NotImplementedError: the implementation asked for cannot do this case.

    Source: Dao, FlashAttention-2, arXiv:2307.08691; Xiao et al., StreamingLLM, arXiv:2309.17453, for sinks.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_attention(query, keys, values, kv_lengths, page_table, sinks)
    checks.check_flag("return_lse", return_lse)
    options = softmax.options(query, scale, is_causal, local_window_size, logits_soft_cap, num_splits)
    named = {"kv_lengths": kv_lengths, "page_table": page_table, "sinks": sinks}
    named = {name: x for name, x in named.items() if x is not None}
    ops.check_devices(query=query, **{"keys.codes": keys.codes, "values.codes": values.codes}, **named)
    softmax.check_values(_on_host(kv_lengths), _on_host(page_table), query, keys, options)
    arrays = jnp.asarray(query), keys.map(jnp.asarray), values.map(jnp.asarray), kv_lengths, page_table, sinks
    can_be_dense = not return_lse and sinks is None and options.soft_cap is None
    if implementation == "dense" or (implementation is None and can_be_dense and _has_many_rows(query, keys)):
        if not can_be_dense:
            raise NotImplementedError(
                f"'dense' needs no soft cap, no sinks and no log-sum-exp, got logits_soft_cap={logits_soft_cap}, "
                f"{'no ' if sinks is None else ''}sinks, return_lse={return_lse}; 'xla' has no such need."
            )
        return _dense(*arrays[:5], options)
    name = _choose(implementation, keys, values, page_table, options)
    out, lse = _attention(*arrays, options, name, implementation is None)
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
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
    return _merge(*map(jnp.asarray, (out_a, lse_a, out_b, lse_b)))


@functools.partial(jax.jit, static_argnums=5)
def _dense(query, keys, values, kv_lengths, page_table, options):
    if kv_lengths is None:
        kv_lengths = jnp.full(query.shape[0], softmax.context_size(keys, page_table), jnp.int32)
    return dense_attention.attention(query, keys, values, kv_lengths, page_table, options)


@functools.partial(jax.jit, static_argnums=(6, 7, 8))
def _attention(query, keys, values, kv_lengths, page_table, sinks, options, name, by_platform):
    """One implementation; `by_platform`: on CUDA, and xla elsewhere."""
    if kv_lengths is None:
        kv_lengths = jnp.full(query.shape[0], softmax.context_size(keys, page_table), jnp.int32)
    arrays = query, keys, values, kv_lengths, page_table, sinks
    if name == "xla":
        return xla_attention.attention(*arrays, options)
    return _kernel_attention(*arrays, options, name, by_platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _kernel_attention(query, keys, values, kv_lengths, page_table, sinks, options, name, by_platform):
    sizes = dict(zip("bhk", (*query.shape[:2], keys.codes.shape[1]), strict=True))
    first = "b" if page_table is None else "N"

    def axes(packed):
        center = None if packed.center is None else partition.axes_of(packed.center.shape, f"{first}kSD", sizes)
        return dataclasses.replace(packed, codes=f"{first}kSP", norms=f"{first}kS", center=center)

    attend = functools.partial(_attention_here, options=options, name=name, by_platform=by_platform)
    optional = None if page_table is None else "bM", None if sinks is None else "h"
    arrays = query, keys, values, kv_lengths, page_table, sinks
    return tuple(partition.split(attend, ("bhTD", axes(keys), axes(values), "b", *optional), ("bhTD", "bhT"), arrays))


def _attention_here(query, keys, values, kv_lengths, page_table, sinks, options, name, by_platform):
    arrays = query, keys, values, kv_lengths, page_table, sinks
    if name == "pallas_triton" and pallas_attention is not None:
        attend, elsewhere = pallas_attention.attention, functools.partial(pallas_attention.attention, interpret=True)
    else:
        attend = elsewhere = functools.partial(triton_attention.attention, implementation=name)
    kernel = functools.partial(_centered, attend, options)
    if by_platform:
        plain = functools.partial(xla_attention.attention, options=options)
        return lax.platform_dependent(*arrays, cuda=kernel, default=plain)
    if attend is elsewhere:
        return kernel(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, cpu=functools.partial(_centered, elsewhere, options))


def _kernel_forward(*arguments):
    return _kernel_attention(*arguments), arguments[:6]


def _kernel_backward(options, name, by_platform, arrays, cotangents):
    _, pullback = jax.vjp(functools.partial(xla_attention.attention, options=options), *arrays)
    return pullback(tuple(cotangents))


_kernel_attention.defvjp(_kernel_forward, _kernel_backward)
_merge = jax.jit(xla_attention.merge)


def _centered(attend, options, query, keys, values, kv_lengths, page_table, sinks):
    """Attention by kernels; centers, which they do not know, are added after them."""
    if keys.center is None and values.center is None:
        return attend(query, keys, values, kv_lengths, page_table, sinks, options)
    out, lse = attend(query, keys, values, kv_lengths, page_table, None, options)
    library = xla_attention.LIBRARY
    out, lse = softmax.with_centers(library.wide(out), lse, query, keys, values, sinks, options, library)
    return out.astype(query.dtype), lse


def _has_many_rows(query, keys):
    """Whether decompression pays, on a CUDA device."""
    rows = query.shape[2] * (query.shape[1] // keys.codes.shape[1])
    return bool(device.cuda_devices()) and rows >= tuning.dense_rows(device.cuda_kind())


def _choose(implementation, keys, values, page_table, options):
    """The implementation asked for, or the best that can, on CUDA."""
    if implementation == "xla":
        return "xla"
    kernels = _kernels() if softmax.kernels_take(keys, values, page_table, options) else []
    if implementation is None:
        best = next((name for name in kernels if name != "gluon" or (device.all_hopper() and gluon_is_tested())), "xla")
        return best if device.cuda_devices() else "xla"
    if implementation not in kernels:
        raise NotImplementedError(
            f"{NEEDS[implementation]}, {softmax.KERNEL_NEEDS}, got {softmax.kernels_got(keys, values, options)}; "
            "'xla' has no such need."
        )
    return implementation


@functools.cache
def _kernels() -> list[str]:
    """What there is here, the best first."""
    found = [name for name, kernel in triton_attention.KERNELS.items() if triton_call.INSTALLED and can_load(kernel)]
    return [*sorted(found), *(["pallas_triton"] if pallas_attention else [])]


def _on_host(x):
    """As a NumPy array, or None where its values cannot be seen without waiting for a device."""
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and any(d.platform != "cpu" for d in x.devices())):
        return None
    return None if x is None else np.asarray(x)
