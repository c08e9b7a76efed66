"""The public operations: check, choose the implementation, call it through `torch.library`."""

from os import PathLike

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

import tqcore
from tq_torch import eager
from tqcore import checks, fixed_point
from tqcore.quantizer import PackedVectors, Quantizer

try:
    from tq_torch import triton_call
except ImportError:  # a torch without Triton
    triton_call = None

IMPLEMENTATIONS = ("eager", "triton")


def rotate(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """y = R x for each vector of x.

    Args:
      x: [..., D] float32, bfloat16 or float16.
      quantizer: names R.

    Returns:
      [..., D] float32.

    Raises:
      ValueError: x has another dtype, or its last axis is not `quantizer.head_dim`.
    """
    checks.check_rotated(x, quantizer)
    return eager.rotate(x, quantizer)


def unrotate(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """x = Rᵀ y, the inverse of `rotate`; the same arguments, result and errors."""
    checks.check_rotated(x, quantizer)
    return eager.unrotate(x, quantizer)


def compress(x: torch.Tensor, quantizer: Quantizer) -> PackedVectors:
    """Quantises vectors: norm = ‖x‖, index_d = number of boundaries b with b·‖x‖ < (R x)_d.

    A coordinate on a boundary takes the lower index. A vector whose largest magnitude is below 2^-100
    counts as zero: norm 0, codes of +0. A vector with NaN or infinity gets a NaN norm and the codes of +0.
    Codes and norms do not carry gradients.

    Args:
      x: [..., S, D] float32, bfloat16 or float16.
      quantizer: the rotation and the codebook.

    Returns:
      PackedVectors: codes [..., S, D/2] uint8, norms [..., S] float32.

    Raises:
      ValueError: x has another dtype or rank, or its last axis is not `quantizer.head_dim`.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_vectors(x, quantizer)
    return eager.compress(x.detach(), quantizer)


def decompress(packed: PackedVectors, *, dtype="float32") -> torch.Tensor:
    """x̂ = norm · Rᵀ centroids[index].

    Args:
      packed: codes [..., S, P], norms [..., S].
      dtype: float32, bfloat16 or float16.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
    """
    checks.check_packed("packed", packed)
    checks.check_dtype(dtype)
    return eager.decompress(packed, getattr(torch, checks.dtype_name(dtype)))


def fused_qk_scores(
    q_rotated: torch.Tensor,
    packed_indices: torch.Tensor,
    norms: torch.Tensor,
    centroids: torch.Tensor,
    scale: float,
    *,
    n_q_heads: int,
    n_kv_heads: int,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attention scores from packed keys: score[b,h,t,s] = scale · norm[b,k,s] · ⟨q[b,h,t], centroids[index[b,k,s]]⟩.

    Query head h reads key head k = h // (H // K). The inner product is an exact sum of integers, and
    three roundings to float32 follow it (docs/format.md), so every implementation returns the same bits.
    NaN or infinity in a query makes its row NaN; a norm that is not finite makes its column NaN.
    Works under `torch.compile`, `torch.export` and CUDA graphs. Differentiates as the linear map that it
    approximates, in float32.

    Args:
      q_rotated: [B, H, T, D] float32, bfloat16 or float16, already rotated; D even, up to 1024.
      packed_indices: [B, K, S, D/2] uint8, two indices a byte, the even coordinate in the high nibble. Any
        strides along B, K and S: a slice of a larger cache is read in place.
      norms: [B, K, S] float32.
      centroids: [L] float32, 1 to 16 finite values, ascending. An index past L reads the last one. Read to the
        host once per tensor and version: change it and the next call waits for the device.
      scale: finite; usually 1/√D.
      n_q_heads: H, a multiple of K.
      n_kv_heads: K.
      implementation: "eager" (any device with float64), "triton" (CUDA, D up to 256; on a CPU Triton's interpreter,
        under TRITON_INTERPRET=1), or None: triton on CUDA where it can do the case, eager elsewhere.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax. Empty where S or T is 0.

    Raises:
      ValueError: an argument does not fit; nothing is cast, cropped or replaced.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_scores(q_rotated, packed_indices, norms, centroids, scale, n_q_heads, n_kv_heads)
    named = {"q_rotated": q_rotated, "packed_indices": packed_indices, "norms": norms, "centroids": centroids}
    checks.check_devices({name: tensor.device for name, tensor in named.items()})
    return torch.ops.tq_torch.fused_qk_scores(*named.values(), float(scale), implementation)


def attention_scores(query: torch.Tensor, keys: PackedVectors, *, scale: float | None = None) -> torch.Tensor:
    """scale · ⟨query, k̂⟩ for every packed key, without decompressing it: ⟨q, norm·Rᵀc⟩ = norm·⟨R q, c⟩.

    Args:
      query: [B, H, T, D] float32, bfloat16 or float16, not rotated.
      keys: PackedVectors [B, K, S, D], K dividing H.
      scale: None means 1/√D.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax.

    Raises:
      ValueError: query and keys do not fit each other.
    """
    checks.check_attention_scores(query, keys, scale)
    return fused_qk_scores(
        rotate(query, keys.quantizer),
        keys.codes,
        keys.norms,
        eager.centroids(keys.quantizer, keys.codes.device),
        query.shape[-1] ** -0.5 if scale is None else scale,
        n_q_heads=query.shape[1],
        n_kv_heads=keys.codes.shape[1],
    )


def from_dlpack(packed: PackedVectors) -> PackedVectors:
    """The same vectors as torch tensors over the same memory, from any library that speaks DLPack."""
    return packed.map(torch.from_dlpack)


def save_file(packed: PackedVectors | dict[str, PackedVectors], path: str | PathLike) -> None:
    """Writes packed vectors, or a dict of them by name; see `tqcore.save_file`."""
    tqcore.save_file(_map_file(packed, lambda tensor: tensor.cpu().numpy()), path)


def load_file(path: str | PathLike) -> PackedVectors | dict[str, PackedVectors]:
    """Reads what `save_file` wrote, as CPU tensors; see `tqcore.load_file`."""
    return _map_file(tqcore.load_file(path), torch.from_numpy)


def _map_file(packed, function):
    if isinstance(packed, PackedVectors):
        return packed.map(function)
    return {name: vectors.map(function) for name, vectors in packed.items()}


_library = torch.library.Library("tq_torch", "DEF")
_library.define(
    "fused_qk_scores(Tensor q_rotated, Tensor packed_indices, Tensor norms, Tensor centroids, float scale, "
    "str? implementation) -> Tensor"
)


def _implement(q, codes, norms, centroids, scale, implementation):
    """Calls one implementation; the values of `centroids` are checked here, where they are concrete."""
    words = _table_words(centroids)
    batch, heads, length, head_dim = q.shape
    if 0 in (*q.shape, *codes.shape):
        return q.new_empty(batch, heads, length, codes.shape[2], dtype=torch.float32)
    kernel = triton_call if triton_call is not None and triton_call.can_do(q) else None
    if implementation == "triton" and kernel is None:
        raise NotImplementedError(
            "'triton' needs head_dim up to 256 and CUDA tensors, or TRITON_INTERPRET=1 in the environment, "
            f"got head_dim={head_dim} on {q.device}; 'eager' has no such need."
        )
    if kernel is not None and (implementation == "triton" or (implementation is None and q.is_cuda)):
        return kernel.fused_qk_scores(q, codes, norms, words, scale)
    return eager.fused_qk_scores(q, codes, norms, words, scale)


_library.impl("fused_qk_scores", _implement, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::fused_qk_scores", lib=_library)
def _(q, codes, norms, centroids, scale, implementation):
    return q.new_empty(*q.shape[:3], codes.shape[2], dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    q, codes, norms, centroids, ctx.scale, _ = inputs
    ctx.save_for_backward(q, codes, norms, centroids)


def _backward(ctx, grad):
    q, codes, norms, centroids = ctx.saved_tensors
    of_q, of_norms, of_centroids = eager.score_gradients(grad, q, codes, norms, centroids, ctx.scale)
    return of_q, None, of_norms, of_centroids, None, None


torch.library.register_autograd("tq_torch::fused_qk_scores", _backward, setup_context=_save_for_backward, lib=_library)

_WORDS = WeakTensorKeyDictionary()


def _table_words(centroids: torch.Tensor) -> torch.Tensor:
    """`ScoreTable.words` on the device of `centroids`, kept with the tensor until it changes or goes."""
    version = 0 if centroids.is_inference() else centroids._version
    known = _WORDS.get(centroids)
    if known is None or known[0] != version:
        values = centroids.detach().cpu().numpy()
        checks.check_centroid_values(values)
        words = torch.from_numpy(fixed_point.score_table(np.ascontiguousarray(values)).words).to(centroids.device)
        known = _WORDS[centroids] = version, words
    return known[1]
