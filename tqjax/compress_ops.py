"""The public operations that encode and decode: check, choose the implementation, call it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from tqcore import checks
from tqcore.kernels import can_compress
from tqcore.quantizer import PackedVectors, Quantizer
from tqjax import ops, triton_call, triton_compress, xla

try:
    from tqjax import pallas_compress
except ImportError:  # a JAX without Pallas-Triton
    pallas_compress = None

IMPLEMENTATIONS = ("xla", "pallas_triton", "triton")
NEEDS = {
    "pallas_triton": "'pallas_triton' needs a JAX with Pallas-Triton and a head_dim that is a multiple of 8 and up to 256",
    "triton": "'triton' needs CUDA, an installed Triton and a head_dim that is a multiple of 8 and up to 256",
}


def compress(
    x: jax.Array, quantizer: Quantizer, *, center: jax.Array | None = None, implementation: str | None = None
) -> PackedVectors:
    """Quantises vectors, less their center: norm = ‖x‖, index_d = number of boundaries b with b·‖x‖ < (R x)_d.

    A coordinate on a boundary takes the lower index. A vector whose largest magnitude is below 2^-100
    counts as zero: norm 0, codes of +0. A vector with NaN or infinity gets a NaN norm and the codes of +0.

    Args:
      x: [..., S, D] float32, bfloat16 or float16.
      quantizer: the rotation, the codebook, the kind of norm, and whether signs of the residual are kept too.
      center: [..., 1 or S, D] float32, broadcast to x and subtracted in float32 first, such as `key_center` or
        `rotary_center`; None subtracts nothing. It is kept as given, and `decompress` adds it back.
      implementation: "xla" (any device), "pallas_triton" (CUDA; on a CPU Pallas' interpreter), "triton" (CUDA), both
        for D a multiple of 8 up to 256, or None: on CUDA triton or pallas_triton where one can do the case, else xla.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.
      NotImplementedError: the implementation asked for cannot do this case.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_vectors(x, quantizer, center)
    if center is None:
        return _compress(jnp.asarray(x), quantizer, None, implementation)
    ops.check_devices(x=x, center=center)
    center = jnp.asarray(center)
    return dataclasses.replace(_compress(jnp.asarray(x), quantizer, center, implementation), center=center)


def decompress(
    packed: PackedVectors, *, dtype="float32", rotated: bool = False, implementation: str | None = None
) -> jax.Array:
    """x̂ = norm · Rᵀ centroids[index], plus the residual's x̂ and the center where there are any.

    Args:
      packed: codes [..., S, P], norms [..., S], center [..., 1 or S, D] or None, residual or None.
      dtype: float32, bfloat16 or float16.
      rotated: whether R x̂ is returned instead, which leaves out rotating back.
      implementation: "xla" (any device), "pallas_triton" (CUDA; on a CPU Pallas' interpreter), "triton" (CUDA), both
        for D a multiple of 8 up to 256, or None: on CUDA triton or pallas_triton where one can do the case, else xla.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_packed("packed", packed)
    checks.check_dtype(dtype)
    checks.check_flag("rotated", rotated)
    return _decompress(packed.map(jnp.asarray), checks.dtype_name(dtype), rotated, implementation)


def append(
    packed: PackedVectors,
    x: jax.Array,
    starts: jax.Array,
    *,
    page_table: jax.Array | None = None,
    implementation: str | None = None,
) -> PackedVectors:
    """Compresses vectors into a cache: what `compress` makes of x[b,:,t] goes to position starts[b] + t of sequence b.

    A position outside 0 to S - 1, or in a page outside the pool, is not written: a start of -T leaves a sequence alone.
    Of two vectors that go to one place, as where sequences share a page, either stays.
    Works under `jit`, `vmap` and loops such as `lax.scan`.

    Args:
      packed: PackedVectors [B, K, S, D] without a residual, S the capacity; a center has an S axis of 1.
      x: [B, K, T, D] float32, bfloat16 or float16.
      starts: [B] int32, any values.
      page_table: [B, M] int32. `packed` is then a pool [N, K, page, D] whose center is the same for all pages, and
        position s of sequence b is in page page_table[b, s // page]; S is M · page.
      implementation: "xla" (any device), "pallas_triton" (CUDA; on a CPU Pallas' interpreter), "triton" (CUDA), both
        for D a multiple of 8 up to 256, or None: on CUDA triton or pallas_triton where one can do the case, else xla.

    Returns:
      New PackedVectors, with the center of `packed`. Where `packed` is donated (`jax.jit(..., donate_argnums=...)`) or
      the carry of a loop, its memory is written in place.

    Raises:
      ValueError: an argument does not fit; starts and page numbers out of range are no error.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_append(packed, x, starts, page_table)
    named = {"packed.codes": packed.codes, "packed.center": packed.center, "page_table": page_table}
    ops.check_devices(x=x, starts=starts, **{name: array for name, array in named.items() if array is not None})
    new = _append(packed.map(jnp.asarray), *map(jnp.asarray, (x, starts)), page_table, implementation)
    return dataclasses.replace(new, center=packed.center)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _compress(x, quantizer, center, implementation):
    def plain(x, *center):
        return xla.compress(x, quantizer, *(center or (None,)))

    def compiled(module, x, *center, **options):
        codes, norms = module.compress(x, quantizer, *center, **options)
        residual = None
        if quantizer.residual is not None:
            rest = functools.reduce(jnp.subtract, center, x.astype(jnp.float32))
            rest = rest - module.decompress(codes, norms, quantizer, **options)
            signs = module.compress(rest, quantizer.residual, **options)
            residual = PackedVectors(*signs, quantizer.residual)
        return PackedVectors(codes, norms, quantizer, None, residual)

    arrays = (x,) if center is None else (x, center)
    return _implement(arrays, plain, compiled, quantizer, implementation)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _decompress(packed, dtype, rotated, implementation):
    def plain(packed):
        return xla.decompress(packed, dtype, rotated)

    def compiled(module, packed, **options):
        decompress = functools.partial(module.decompress, **options)
        arrays, quantizer = (packed.codes, packed.norms), packed.quantizer
        if packed.residual is None and (packed.center is None or not rotated):
            return decompress(*arrays, quantizer, packed.center, dtype=dtype, rotated=rotated)
        vectors = decompress(*arrays, quantizer, rotated=rotated)
        if packed.residual is not None:
            rest = decompress(packed.residual.codes, packed.residual.norms, packed.residual.quantizer)
            vectors = vectors + (xla.rotate(rest, quantizer) if rotated else rest)
        if packed.center is not None:
            vectors = vectors + (xla.rotate(packed.center, quantizer) if rotated else packed.center)
        return vectors.astype(dtype)

    return _implement((packed,), plain, compiled, packed.quantizer, implementation)


@functools.partial(jax.jit, static_argnums=4)
def _append(packed, x, starts, page_table, implementation):
    new = _compress(x, packed.quantizer, packed.center, implementation)
    return xla.append(packed, new, starts, page_table)


def _implement(arrays, plain, compiled, quantizer, implementation):
    """Calls one implementation: `plain`, or `compiled` with the module of kernels.

    `None` and "pallas_triton" choose by the platform that this is lowered for.
    """
    if implementation == "xla" or any(0 in x.shape for x in jax.tree.leaves(arrays)):
        return plain(*arrays)
    modules = {}
    if can_compress(quantizer.head_dim):
        modules |= {"triton": triton_compress} if triton_call.INSTALLED else {}
        modules |= {} if pallas_compress is None else {"pallas_triton": pallas_compress}
    name = implementation or next(iter(modules), "xla")
    if implementation is None and not modules:
        return plain(*arrays)
    if name not in modules:
        raise NotImplementedError(f"{NEEDS[name]}, got head_dim={quantizer.head_dim}; 'xla' has no such need.")
    kernel = functools.partial(compiled, modules[name])
    if implementation is None:
        return lax.platform_dependent(*arrays, cuda=kernel, default=plain)
    if name != "pallas_triton":
        return kernel(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, cpu=functools.partial(kernel, interpret=True))
