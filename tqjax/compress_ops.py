"""The public operations that write and read packed vectors: check, choose the implementation, call it."""

import contextlib
import dataclasses
import functools
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from tqcore import checks
from tqcore.kernels import are_many, gluon_is_tested
from tqcore.quantizer import PackedVectors, Quantizer
from tqjax import device, partition, triton_compress, xla
from tqjax.ops import check_devices

PALLAS = {}
with contextlib.suppress(ImportError):  # a JAX without Pallas-Triton
    from tqjax import pallas_compress, pallas_decompress

    PALLAS = {"compress": pallas_compress, "decompress": pallas_decompress}

IMPLEMENTATIONS = ("xla", "pallas_triton", "triton")
ENCODERS = (*IMPLEMENTATIONS, "gluon")
NEEDS = {
    "pallas_triton": "'pallas_triton' needs a JAX with Pallas-Triton, vectors of up to 2 GiB and head_dim 8 to 256",
    "triton": "'triton' needs CUDA, an installed Triton and head_dim 8 to 256",
    "gluon": "'gluon' needs a Hopper device, an installed Triton with Gluon, bfloat16 of head_dim 64, 128 or 256, "
    "a Hadamard rotation and no center",
}
XLA = {
    "compress": xla.encode,
    "append": functools.partial(xla.append, encode=xla.encode),
    "decompress": xla.decode,
}
ARGUMENTS = {
    "compress": ("x", "center"),
    "append": ("codes", "norms", "x", "center", "starts", "page_table"),
    "decompress": ("codes", "norms"),
}
LEADING = "abcdefgijlmnopqrstu"  # axes of vectors, for `partition`


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
      implementation: "xla" (any device); "pallas_triton" (CUDA, interpreted on a CPU) or "triton" (CUDA, an installed
        Triton), both for head_dim 8 to 256; "gluon" (the same on a Hopper device, bfloat16 of head_dim 64, 128 or
        256 with a Hadamard rotation and without a center); or None: on CUDA the first of gluon (for many vectors, if
        all devices are Hoppers) and triton that can do the case, else xla.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, ENCODERS)
    checks.check_vectors(x, quantizer, center)
    if center is None:
        return _compress(jnp.asarray(x), quantizer, None, implementation)
    check_devices(x=x, center=center)
    center = jnp.asarray(center)
    return dataclasses.replace(_compress(jnp.asarray(x), quantizer, center, implementation), center=center)


def append(
    packed: PackedVectors,
    x: jax.Array,
    starts: jax.Array,
    *,
    page_table: jax.Array | None = None,
    implementation: str | None = None,
) -> PackedVectors:
    """Compresses vectors into their places of a cache: x[b, :, t] goes to position starts[b] + t of sequence b.

    Codes and norms are those of `compress(x, packed.quantizer, center=packed.center)`. A position outside 0 to S - 1
    is not written, nor is one on a page that does not exist: a start of -T or less leaves its sequence alone.
    Works under `jit`, `scan` and `vmap`; where `packed` is donated, or carried by a loop, it is written in place.

    Args:
      packed: PackedVectors [B, K, S, D], S the capacity, or a pool [N, K, page, D]. A center has an S axis of 1, in a
        pool a first axis of 1 too, and is subtracted from x. No residual.
      x: [B, K, T, D] float32, bfloat16 or float16.
      starts: [B] int32.
      page_table: [B, M] int32. Position s of sequence b is then in page page_table[b, s // page]; S is M · page. No two
        sequences may write to one place.
      implementation: as for `compress`; "pallas_triton" encodes, and XLA writes.

    Returns:
      PackedVectors: `packed` with other arrays.

    Raises:
      ValueError: an argument does not fit.
    """
    checks.check_implementation(implementation, ENCODERS)
    checks.check_append(packed, x, starts, page_table)
    check_devices(x=x, starts=starts, page_table=page_table, codes=packed.codes)
    page_table = None if page_table is None else jnp.asarray(page_table)
    vectors = packed.map(jnp.asarray)
    codes, norms = _append(vectors, jnp.asarray(x), jnp.asarray(starts), page_table, implementation)
    return dataclasses.replace(packed, codes=codes, norms=norms)


def decompress(
    packed: PackedVectors, *, dtype="float32", rotated: bool = False, implementation: str | None = None
) -> jax.Array:
    """x̂ = norm · Rᵀ centroids[index], plus the residual's x̂ and the center where there are any.

    Args:
      packed: codes [..., S, P], norms [..., S], center [..., 1 or S, D] or None, residual or None.
      dtype: float32, bfloat16 or float16.
      rotated: leaves R x̂, all of it, in place of x̂.
      implementation: "xla" (any device); "pallas_triton" (CUDA, interpreted on a CPU) or "triton" (CUDA, an installed
        Triton), both for head_dim 8 to 256; or None: triton where it can on CUDA, else xla.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_decompress(packed, dtype, rotated)
    return _decompress(packed.map(jnp.asarray), checks.dtype_name(dtype), rotated, implementation)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _compress(x, quantizer, center, implementation):
    """All but the center itself, which need not pass through `jit`."""
    of_rest = None if implementation == "gluon" else implementation

    def encode(x, part, center=None):
        return _encode(x, part, center, implementation if part == quantizer else of_rest)

    decode = functools.partial(_decode, dtype="float32", rotated=False, implementation=of_rest)
    return xla.compress(x, quantizer, center, encode, decode)


def _encode(x, quantizer, center, implementation):
    leading = LEADING[: x.ndim - 1]
    sizes = dict(zip(leading, x.shape, strict=False))
    of_center = None if center is None else partition.axes_of(center.shape, f"{leading}D", sizes)
    encode = functools.partial(_call, implementation, "compress", {"quantizer": quantizer}, x.dtype)
    return tuple(partition.split(encode, (f"{leading}D", of_center), (f"{leading}P", leading), (x, center)))


@functools.partial(jax.jit, static_argnums=4)
def _append(packed, x, starts, page_table, implementation):
    paged, center = page_table is not None, packed.center
    first, batch = ("N", "B") if paged else ("b", "b")  # any sequence may write to any page
    sizes = dict(zip("bk", packed.codes.shape, strict=False))
    of_center = None if center is None else partition.axes_of(center.shape, f"{first}kSD", sizes)
    axes = f"{first}kSP", f"{first}kS", f"{batch}kTD", of_center, batch, "BM" if paged else None
    write = functools.partial(_call, implementation, "append", {"quantizer": packed.quantizer}, x.dtype)
    return partition.split(write, axes, axes[:2], (packed.codes, packed.norms, x, center, starts, page_table))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _decompress(packed, dtype, rotated, implementation):
    decode = functools.partial(_decode, implementation=implementation)
    return xla.decompress(packed, dtype, rotated, decode)


def _decode(codes, norms, quantizer, dtype, rotated, implementation):
    leading = LEADING[: norms.ndim]
    options = {"quantizer": quantizer, "dtype": dtype, "rotated": rotated}
    decode = functools.partial(_call, implementation, "decompress", options, dtype)
    return partition.split(decode, (f"{leading}P", leading), (f"{leading}D",), (codes, norms))[0]


def _call(implementation, operation, options, dtype, *arrays):
    """Calls one implementation; `dtype` is that of the dense vectors."""

    def bound(function):
        return lambda *arrays: function(**dict(zip(ARGUMENTS[operation], arrays, strict=True)), **options)

    given, quantizer = dict(zip(ARGUMENTS[operation], arrays, strict=True)), options["quantizer"]
    rows = given["norms"].shape if operation == "decompress" else given["x"].shape[:-1]
    vectors = jax.ShapeDtypeStruct((*rows, quantizer.head_dim), jnp.dtype(dtype))
    many = are_many(prod(vectors.shape[:-1])) and device.all_hopper()
    gluon = operation != "decompress" and (implementation == "gluon" or (many and gluon_is_tested()))
    gluon = gluon and triton_compress.can_do_by_gluon(quantizer, vectors, given["center"] is not None)
    kernels, plain = _kernels(operation, quantizer, vectors, gluon), bound(XLA[operation])
    name = implementation or next((name for name in ("gluon", "triton") if name in kernels), "xla")
    if name == "xla" or any(0 in x.shape for x in arrays if x is not None):
        return plain(*arrays)
    if name not in kernels:
        raise NotImplementedError(
            f"{NEEDS[name]}, got {list(vectors.shape)} {vectors.dtype.name}, "
            f"{vectors.size * vectors.dtype.itemsize} bytes; 'xla' has no such need."
        )
    kernel = bound(kernels[name])
    if implementation is None:
        return lax.platform_dependent(*arrays, cuda=kernel, default=plain)
    if name in ("triton", "gluon"):
        return kernel(*arrays)
    return lax.platform_dependent(*arrays, cuda=kernel, cpu=bound(_pallas(operation, interpret=True)))


def _kernels(operation, quantizer, vectors, gluon):
    """The kernels that can do this on CUDA, by name; `gluon`: whether the Gluon encoder can and is wanted."""
    kernels = {}
    if gluon:
        kernels["gluon"] = functools.partial(getattr(triton_compress, operation), gluon=True)
    if triton_compress.can_do(quantizer):
        kernels["triton"] = getattr(triton_compress, operation)
    if PALLAS and PALLAS["compress"].can_do(quantizer, vectors):
        kernels["pallas_triton"] = _pallas(operation)
    return kernels


def _pallas(operation, interpret=False):
    """Encodes or decodes; what is appended, XLA writes."""
    if operation == "append":
        return functools.partial(xla.append, encode=_pallas("compress", interpret))
    return functools.partial(getattr(PALLAS[operation], operation), interpret=interpret)
