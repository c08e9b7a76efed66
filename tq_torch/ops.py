"""The public operations: check, choose the implementation, call it through `torch.library`."""

from functools import cache

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from tq_torch import eager
from tqcore import center as center_of
from tqcore import checks, fixed_point
from tqcore.codebook import Codebook
from tqcore.kernels import gluon_is_tested
from tqcore.packing import code_bits
from tqcore.quantizer import PackedVectors, Quantizer

try:
    from tq_torch import triton_call
except ImportError:  # a torch without Triton
    triton_call = None

IMPLEMENTATIONS = ("eager", "triton", "gluon")


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
    return torch.ops.tq_torch.rotate(x, *_fields(quantizer), False)


def unrotate(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    """x = Rᵀ y, the inverse of `rotate`; the same arguments, result and errors."""
    checks.check_rotated(x, quantizer)
    return torch.ops.tq_torch.rotate(x, *_fields(quantizer), True)


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
      packed_indices: [B, K, S, P] uint8, indices of 1 to 4 bits as `tqcore.packing` lays them out: P = D·bits/8. Any
        strides along B, K and S: a slice of a larger cache is read in place.
      norms: [B, K, S] float32.
      centroids: [L] float32, 1 to 2^bits finite values, ascending. An index past L reads the last one. Read to the
        host once per tensor and version (made in inference mode: at every call), which waits for the device.
      scale: finite; usually 1/√D.
      n_q_heads: H, a multiple of K.
      n_kv_heads: K.
      implementation: "eager" (any device with float64), "triton" (CUDA, 2 to 4 bits, D up to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), "gluon" (Hopper, 2 to 4 bits, D up to 256), or None: the first of gluon,
        triton and eager that can do the case on this device.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax. Empty where S or T is 0.

    Raises:
      ValueError: an argument does not fit; nothing is cast, cropped or replaced.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    bits = checks.check_scores(q_rotated, packed_indices, norms, scale, n_q_heads, n_kv_heads)
    checks.check_centroids(centroids, bits)
    named = {"q_rotated": q_rotated, "packed_indices": packed_indices, "norms": norms, "centroids": centroids}
    check_devices(**named)
    return torch.ops.tq_torch.fused_qk_scores(*named.values(), None, checks.as_scale(scale), implementation)


def attention_scores(
    query: torch.Tensor, keys: PackedVectors, *, scale: float | None = None, add_center: bool | None = None
) -> torch.Tensor:
    """scale · ⟨query, k̂⟩ for every packed key, without decompressing it: ⟨q, norm·Rᵀc⟩ = norm·⟨R q, c⟩.

    Args:
      query: [B, H, T, D] float32, bfloat16 or float16, not rotated.
      keys: PackedVectors [B, K, S, D], K dividing H.
      scale: None means 1/√D.
      add_center: whether scale · ⟨query, center⟩ is included, a dense float32 product. None means where the center
        varies along S. A center with an S axis of 1 adds one number to all scores of a row, which a softmax does not
        see: it is left out unless True.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax.

    Raises:
      ValueError: query and keys do not fit each other, or `add_center` is False where the center varies along S.
    """
    checks.check_attention_scores(query, keys, scale, add_center)
    scale = checks.as_scale(query.shape[-1] ** -0.5 if scale is None else scale)
    named = {"query": query, "keys.codes": keys.codes, "keys.norms": keys.norms, "keys.center": keys.center}
    check_devices(**named)
    scores = packed_scores(query, keys, scale)
    if keys.residual is not None:
        scores = scores + packed_scores(query, keys.residual, scale)
    if center_of.is_added(keys, add_center):
        scores = scores + center_of.scores(query.float(), keys.center, scale, keys.codes.shape[1], eager.matmul)
    return scores


def key_center(keys: torch.Tensor) -> torch.Tensor:
    """The mean of keys over positions, for `compress(keys, quantizer, center=...)`: such as that of a prefill.

    Args:
      keys: [..., S, D] float32, bfloat16 or float16, S at least 1.

    Returns:
      [..., 1, D] float32.

    Raises:
      ValueError: keys have another dtype or rank, or no position.
    """
    checks.check_keys(keys)
    return center_of.mean(keys.float(), torch)


def rotary_center(
    bias: torch.Tensor, positions: torch.Tensor, *, theta: float = 10_000.0, interleaved: bool = False
) -> torch.Tensor:
    """The bias of a key projection after rotary embedding, exact where `key_center` of rotated keys is not.

    Coordinates i and i + D/2 turn by position · theta^(-2i/D). For scaled frequencies, pass `compress` a center of
    your own; for scaled positions, scale `positions`. The center of a single position looks like one that all share:
    where its scores join those of others, ask `attention_scores` for `add_center=True`.

    Args:
      bias: [..., D] float32, bfloat16 or float16, usually [K, D].
      positions: [S] integers or floats.
      theta: the base of the frequencies.
      interleaved: coordinates 2i and 2i + 1 turn, in place of i and i + D/2.

    Returns:
      [..., S, D] float32.

    Raises:
      ValueError: bias or positions have another dtype or rank, D is odd, or theta is not positive.

    Source: Su et al., RoFormer, arXiv:2104.09864.
    """
    checks.check_rotary(bias, positions, theta)
    check_devices(bias=bias, positions=positions)
    turns = torch.from_numpy(center_of.frequencies(bias.shape[-1], theta)).to(bias.device)
    return center_of.rotary(bias.float(), positions.float()[:, None] * turns, interleaved, torch)


def packed_scores(query, keys, scale, implementation=None):
    """Scores of the codes and norms alone."""
    rotated, bits = rotate(query, keys.quantizer), keys.quantizer.code_bits
    checks.check_scores(rotated, keys.codes, keys.norms, scale, query.shape[1], keys.codes.shape[1])
    return torch.ops.tq_torch.fused_qk_scores(rotated, keys.codes, keys.norms, None, bits, scale, implementation)


def dequantize(packed):
    """norm · centroids[index] [..., S, D], not rotated back."""
    quantizer = packed.quantizer
    return torch.ops.tq_torch.dequantize(packed.codes, packed.norms, quantizer.head_dim, quantizer.code_bits)


def check_devices(**tensors):
    """Tensors by the names of their arguments, or None."""
    checks.check_devices({name: tensor.device for name, tensor in tensors.items() if tensor is not None})


# --- the operations as torch sees them: tensors and plain values, so that it can compile and export them --------------

NEEDS = {
    "triton": "'triton' needs Triton, codes of 2 to 4 bits of head_dim up to 256 and CUDA tensors, or "
    "TRITON_INTERPRET=1 in the environment",
    "gluon": "'gluon' needs Triton with Gluon, codes of 2 to 4 bits of head_dim up to 256 and CUDA tensors on a Hopper "
    "device",
}
QUANTIZER = "int head_dim, int bits, str rotation, int seed, str norm"
_library = torch.library.Library("tq_torch", "DEF")
_library.define(f"rotate(Tensor x, {QUANTIZER}, bool inverse) -> Tensor")
_library.define("dequantize(Tensor codes, Tensor norms, int head_dim, int bits) -> Tensor")
_library.define(
    "fused_qk_scores(Tensor q_rotated, Tensor packed_indices, Tensor norms, Tensor? centroids, int? bits, "
    "float scale, str? implementation) -> Tensor"
)
_library.define(
    "fused_qk_scores_backward(Tensor grad, Tensor q_rotated, Tensor packed_indices, Tensor norms, Tensor? centroids, "
    "int? bits, float scale) -> (Tensor, Tensor, Tensor)"
)


def _fields(quantizer):
    """What encodes the codes and norms, without a residual."""
    return quantizer.head_dim, quantizer.code_bits, quantizer.rotation, quantizer.seed, quantizer.norm


def _quantizer(head_dim, bits, rotation, seed, norm):
    return Quantizer(head_dim, bits, rotation=rotation, seed=seed, norm=norm)


def _rotate(x, *fields_and_inverse):
    *fields, inverse = fields_and_inverse
    quantizer = _quantizer(*fields)
    return eager.unrotate(x, quantizer) if inverse else eager.rotate(x, quantizer)


def _dequantize(codes, norms, head_dim, bits):
    return eager.dequantize(codes, norms, Quantizer(head_dim, bits))


def _scores(q, codes, norms, centroids, bits, scale, implementation):
    """Calls one implementation. The table is `centroids`, whose values are concrete and checked here, or of `bits`."""
    batch, heads, length, head_dim = q.shape
    words = _codebook_words(head_dim, bits, q.device) if centroids is None else _table_words(centroids)
    if 0 in (*q.shape, *codes.shape):
        return q.new_empty(batch, heads, length, codes.shape[2], dtype=torch.float32)
    width = code_bits(codes.shape[-1], head_dim)
    implementation = implementation or _fastest(q, width)
    if implementation == "eager":
        return eager.fused_qk_scores(q, codes, norms, words, scale)
    if triton_call is None or not triton_call.can_do(implementation, q, width):
        raise NotImplementedError(
            f"{NEEDS[implementation]}, got head_dim={head_dim}, bits={width} on {q.device}; 'eager' has no such need."
        )
    return triton_call.fused_qk_scores(q, codes, norms, words, scale, implementation=implementation)


def _fastest(q, width):
    """The implementation for a caller who names none."""
    if triton_call is None or not q.is_cuda:
        return "eager"
    preferred = ["gluon", "triton"] if gluon_is_tested() else ["triton"]
    return next((name for name in preferred if triton_call.can_do(name, q, width)), "eager")


def _score_gradients(grad, q, codes, norms, centroids, bits, scale):
    if centroids is None:
        centroids = eager.centroids(Quantizer(q.shape[-1], bits), q.device)
    return eager.score_gradients(grad, q, codes, norms, centroids, scale)


for _name, _function in (
    ("rotate", _rotate),
    ("dequantize", _dequantize),
    ("fused_qk_scores", _scores),
    ("fused_qk_scores_backward", _score_gradients),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::rotate", lib=_library)
def _(x, *_):
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("tq_torch::dequantize", lib=_library)
def _(codes, norms, head_dim, *_):
    return norms.new_empty((*norms.shape, head_dim))


@torch.library.register_fake("tq_torch::fused_qk_scores", lib=_library)
def _(q, codes, *_):
    return q.new_empty((*q.shape[:3], codes.shape[2]), dtype=torch.float32)


@torch.library.register_fake("tq_torch::fused_qk_scores_backward", lib=_library)
def _(grad, q, codes, norms, centroids, bits, scale):
    table = norms.new_empty(2**bits) if centroids is None else torch.empty_like(centroids)
    return torch.empty_like(q), torch.empty_like(norms), table


def _save_rotation(ctx, inputs, output):
    x, *ctx.fields, ctx.inverse = inputs
    ctx.dtype = x.dtype


def _rotate_backward(ctx, grad):
    of_x = torch.ops.tq_torch.rotate(grad, *ctx.fields, not ctx.inverse).to(ctx.dtype)
    return of_x, *(None for _ in ctx.fields), None


def _save_scores(ctx, inputs, output):
    q, codes, norms, centroids, ctx.bits, ctx.scale, _ = inputs
    ctx.save_for_backward(q, codes, norms, centroids)


def _scores_backward(ctx, grad):
    q, codes, norms, centroids = ctx.saved_tensors
    of_q, of_norms, of_table = torch.ops.tq_torch.fused_qk_scores_backward(
        grad, q, codes, norms, centroids, ctx.bits, ctx.scale
    )
    return of_q, None, of_norms, None if centroids is None else of_table, None, None, None


torch.library.register_autograd("tq_torch::rotate", _rotate_backward, setup_context=_save_rotation, lib=_library)
torch.library.register_autograd("tq_torch::fused_qk_scores", _scores_backward, setup_context=_save_scores, lib=_library)

_WORDS = WeakTensorKeyDictionary()


def _table_words(centroids: torch.Tensor) -> torch.Tensor:
    """`ScoreTable.words` on the device of `centroids`, kept with the tensor until it changes or goes."""
    version = None if centroids.is_inference() else centroids._version  # an inference tensor counts no changes
    known = _WORDS.get(centroids)
    if version is None or known is None or known[0] != version:
        values = centroids.detach().cpu().numpy()
        checks.check_centroid_values(values)
        known = _WORDS[centroids] = version, _words_on(values, centroids.device)
    return known[1]


def table_words(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    """`ScoreTable.words` of a quantizer's codebook."""
    return _codebook_words(quantizer.head_dim, quantizer.code_bits, device)


@cache
def _codebook_words(head_dim: int, bits: int, device: torch.device) -> torch.Tensor:
    return _words_on(Codebook(head_dim, bits).centroids, device)


def _words_on(centroids, device):
    return torch.from_numpy(fixed_point.score_table(np.ascontiguousarray(centroids)).words).to(device)
