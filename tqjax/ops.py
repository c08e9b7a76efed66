"""The public operations: check, choose the implementation, call it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from numpy.typing import NDArray

from tqcore import center as center_of
from tqcore import checks, fixed_point, tuning
from tqcore.kernels import gluon_is_tested, lookup
from tqcore.packing import code_bits
from tqcore.quantizer import PackedVectors, Quantizer
from tqjax import device, partition, triton_call, xla

try:
    from tqjax import pallas_scores
except ImportError:  # a JAX without Pallas-Triton
    pallas_scores = None

IMPLEMENTATIONS = ("xla", "pallas_triton", "triton", "gluon")
FEW_KEYS = 2**16  # up to which a call takes as long as its launch does, which is shorter for Pallas
NEEDS = {
    "pallas_triton": "'pallas_triton' needs a JAX with Pallas-Triton and codes of 2 to 4 bits of head_dim up to 256",
    "triton": "'triton' needs CUDA, an installed Triton and codes of 2 to 4 bits of head_dim up to 256",
    "gluon": "'gluon' needs a Hopper device, an installed Triton and codes of 2 to 4 bits of head_dim up to 256",
}


def rotate(x: jax.Array, quantizer: Quantizer) -> jax.Array:
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
    return _rotate(jnp.asarray(x), quantizer)


def unrotate(x: jax.Array, quantizer: Quantizer) -> jax.Array:
    """x = Rᵀ y, the inverse of `rotate`; the same arguments, result and errors."""
    checks.check_rotated(x, quantizer)
    return _unrotate(jnp.asarray(x), quantizer)


def fused_qk_scores(
    q_rotated: jax.Array,
    packed_indices: jax.Array,
    norms: jax.Array,
    centroids: jax.Array | NDArray[np.float32],
    scale: float,
    *,
    n_q_heads: int,
    n_kv_heads: int,
    implementation: str | None = None,
) -> jax.Array:
    """Attention scores from packed keys: score[b,h,t,s] = scale · norm[b,k,s] · ⟨q[b,h,t], centroids[index[b,k,s]]⟩.

    Query head h reads key head k = h // (H // K). The inner product is an exact sum of integers, and
    three roundings to float32 follow it (docs/format.md), so every implementation returns the same bits.
    NaN or infinity in a query makes its row NaN; a norm that is not finite makes its column NaN.
    Works under `jit`, with `centroids` concrete or traced, and `vmap`. Differentiates as the linear map
    that it approximates, in float32.

    Args:
      q_rotated: [B, H, T, D] float32, bfloat16 or float16, already rotated; D even, up to 1024.
      packed_indices: [B, K, S, P] uint8, indices of 1 to 4 bits as `tqcore.packing` lays them out: P = D·bits/8.
      norms: [B, K, S] float32.
      centroids: [L] float32, 1 to 2^bits finite values, ascending. An index past L reads the last one.
      scale: finite; usually 1/√D. A Python number, also under `jit`.
      n_q_heads: H, a multiple of K.
      n_kv_heads: K.
      implementation: "xla" (any device), "pallas_triton" (CUDA, 2 to 4 bits, D up to 256; interpreted on a CPU),
        "triton" (CUDA and an installed Triton, 2 to 4 bits, D up to 256), "gluon" (the same, Hopper), or None: on CUDA
        the first of gluon (if all devices are Hoppers and the keys not few), pallas_triton, triton and xla that can do
        the case; xla elsewhere.

    Returns:
      [B, H, T, S] float32 in natural units; no mask, no softmax. Empty where S or T is 0.

    Raises:
      ValueError: an argument does not fit; nothing is cast, cropped or replaced.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    bits = checks.check_scores(q_rotated, packed_indices, norms, scale, n_q_heads, n_kv_heads)
    checks.check_centroids(centroids, bits)
    check_devices(q_rotated=q_rotated, packed_indices=packed_indices, norms=norms, centroids=centroids)
    arrays = [jnp.asarray(x) for x in (q_rotated, packed_indices, norms, centroids)]
    scale = checks.as_scale(scale)
    if isinstance(centroids, Tracer):
        words = xla.score_words(arrays[3], scale)
    else:
        values = np.asarray(centroids)
        checks.check_centroid_values(values)
        words = jnp.asarray(_words(values.tobytes(), scale))
    return _scores(*arrays, words, scale, implementation)


def attention_scores(
    query: jax.Array, keys: PackedVectors, *, scale: float | None = None, add_center: bool | None = None
) -> jax.Array:
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
    scores = packed_scores(query, keys, scale)
    if keys.residual is not None:
        scores = scores + packed_scores(query, keys.residual, scale)
    if center_of.is_added(keys, add_center):
        scores = scores + _center_scores(jnp.asarray(query), keys.center, scale, keys.codes.shape[1])
    return scores


def key_center(keys: jax.Array) -> jax.Array:
    """The mean of keys over positions, for `compress(keys, quantizer, center=...)`: such as that of a prefill.

    Args:
      keys: [..., S, D] float32, bfloat16 or float16, S at least 1.

    Returns:
      [..., 1, D] float32.

    Raises:
      ValueError: keys have another dtype or rank, or no position.
    """
    checks.check_keys(keys)
    return _key_center(jnp.asarray(keys))


def rotary_center(
    bias: jax.Array, positions: jax.Array, *, theta: float = 10_000.0, interleaved: bool = False
) -> jax.Array:
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
    return _rotary_center(jnp.asarray(bias), jnp.asarray(positions), float(theta), bool(interleaved))


_rotate = jax.jit(xla.rotate, static_argnums=1)
_unrotate = jax.jit(xla.unrotate, static_argnums=1)
_key_center = jax.jit(xla.key_center)
_rotary_center = jax.jit(xla.rotary_center, static_argnums=(2, 3))
_center_scores = jax.jit(xla.center_scores, static_argnums=(2, 3))


def packed_scores(query, keys, scale, implementation=None):
    """Scores of the codes and norms alone."""
    return fused_qk_scores(
        rotate(query, keys.quantizer),
        keys.codes,
        keys.norms,
        keys.quantizer.codebook.centroids,
        scale,
        n_q_heads=query.shape[1],
        n_kv_heads=keys.codes.shape[1],
        implementation=implementation,
    )


@functools.lru_cache(maxsize=64)
def _words(centroids: bytes, scale: float) -> NDArray[np.int32]:
    """`fixed_point.score_words` of a table given by its bytes, kept for calls outside `jit`."""
    return fixed_point.score_words(np.frombuffer(centroids, np.float32), scale)


@functools.partial(jax.jit, static_argnums=4)
def _implement(q, codes, norms, words, implementation):
    function = functools.partial(_scores_here, implementation=implementation)
    return partition.split(function, ("bhtD", "bksP", "bks", "W"), ("bhts",), (q, codes, norms, words))[0]


def _scores_here(*arrays, implementation):
    """Calls one implementation; `None` and "pallas_triton" choose by the platform that this is lowered for."""
    q, codes, _, _ = arrays
    batch, heads, length, head_dim = q.shape
    if 0 in (*q.shape, *codes.shape):
        return jnp.zeros((batch, heads, length, codes.shape[2]), jnp.float32)
    plain = xla.fused_qk_scores
    bits = code_bits(codes.shape[-1], head_dim)
    kernels = _kernels(head_dim, bits)
    name = implementation or _preferred(kernels, keys=batch * codes.shape[1] * codes.shape[2])
    if name == "xla":
        return plain(*arrays)
    if name not in kernels:
        raise NotImplementedError(f"{NEEDS[name]}, got head_dim={head_dim}, bits={bits}; 'xla' has no such need.")
    compiled = kernels[name]
    if implementation is None:
        return lax.platform_dependent(*arrays, cuda=compiled, default=plain)
    if name != "pallas_triton":
        return compiled(*arrays)
    return lax.platform_dependent(*arrays, cuda=compiled, cpu=functools.partial(compiled, interpret=True))


def _kernels(head_dim, bits):
    """The kernels that can do this head_dim and width on CUDA."""
    kernels = {}
    if bits not in lookup.BITS:
        return kernels
    if pallas_scores is not None and head_dim <= tuning.MAX_HEAD_DIM:
        kernels["pallas_triton"] = pallas_scores.fused_qk_scores
    if triton_call.INSTALLED and head_dim <= tuning.MAX_HEAD_DIM:
        for name in ("triton", "gluon"):
            kernels[name] = functools.partial(triton_call.fused_qk_scores, implementation=name)
    return kernels


def _preferred(kernels, keys):
    """Of `kernels`, the one for a caller who names none; `keys` are those of all key heads together."""
    gluon = "gluon" in kernels and device.all_hopper() and gluon_is_tested()
    if gluon and (keys > FEW_KEYS or "pallas_triton" not in kernels):
        return "gluon"
    return next(iter(kernels), "xla")


def _scores_primal(q, codes, norms, centroids, words, scale, implementation):
    return _implement(q, codes, norms, words, implementation)


def _scores_forward(q, codes, norms, centroids, words, scale, implementation):
    return _implement(q, codes, norms, words, implementation), (q, codes, norms, centroids, words)


def _scores_backward(scale, implementation, saved, cotangent):
    q, codes, norms, centroids, words = saved

    def dense(q, norms, centroids):
        return xla.dense_scores(q, codes, norms, centroids, scale)

    _, pullback = jax.vjp(dense, q, norms, centroids)
    of_q, of_norms, of_centroids = pullback(cotangent)
    nothing = [np.zeros(x.shape, jax.dtypes.float0) for x in (codes, words)]
    return of_q, nothing[0], of_norms, of_centroids, nothing[1]


_scores = jax.custom_vjp(_scores_primal, nondiff_argnums=(5, 6))
_scores.defvjp(_scores_forward, _scores_backward)


def check_devices(**arrays):
    """Arrays that JAX would refuse to bring together: those committed to different devices."""
    devices = {
        name: ", ".join(sorted(map(str, x.devices())))
        for name, x in arrays.items()
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.committed
    }
    checks.check_devices(devices)
