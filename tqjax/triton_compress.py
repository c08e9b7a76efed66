"""Launches the encoders and decoders of `tqcore.kernels` on JAX arrays, as `tqjax.triton_call` launches scores."""

import functools
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive

from tqcore.kernels import (
    can_compress,
    can_load,
    compress_launch,
    compress_table,
    gluon_compress_launch,
    gluon_compress_table,
    gluon_takes,
    load,
)
from tqjax import triton_call

INSTALLED = triton_call.INSTALLED


def can_do(quantizer):
    """Whether a kernel takes this quantizer."""
    return INSTALLED and can_compress(quantizer)


def can_do_by_gluon(quantizer, vectors, centered):
    """Whether the Gluon encoder takes vectors [..., S, D]."""
    shape = _four_axes(vectors.shape)[:3]
    return INSTALLED and gluon_takes(quantizer, shape, vectors.dtype.name, centered) and can_load("gluon_compress")


def compress(x, quantizer, center=None, *, gluon=False):
    """x [..., S, D] -> codes [..., S, P], norms [..., S]."""
    shape = x.shape
    if center is not None:
        center = center.reshape((1,) * (x.ndim - center.ndim) + center.shape)
    if x.ndim != 4:
        center = None if center is None else _in_four_axes(jnp.broadcast_to(center, x.shape))
        x = _in_four_axes(x)
    options = {"quantizer": quantizer, "centered": center is not None, "gluon": gluon}
    codes, norms = compress_p.bind(*_present(x, center), **options)
    return codes.reshape(*shape[:-1], -1), norms.reshape(shape[:-1])


def append(codes, norms, x, center, starts, page_table, quantizer, *, gluon=False):
    """Codes [N, K, S, P] and norms [N, K, S] with x [B, K, T, D] in its places."""
    if center is not None:
        center = center.reshape((1,) * (4 - center.ndim) + center.shape)
    options = {"quantizer": quantizer, "centered": center is not None, "paged": page_table is not None, "gluon": gluon}
    return tuple(append_p.bind(*_present(codes, norms, x, starts, center, page_table), **options))


def decompress(codes, norms, quantizer, dtype, rotated):
    """codes [..., S, P], norms [..., S] -> [..., S, D]."""
    (out,) = decompress_p.bind(codes, norms, quantizer=quantizer, dtype=dtype, rotated=rotated)
    return out


def _compress(x, *center, quantizer, centered, gluon, capability):
    codes = jax.ShapeDtypeStruct((*x.shape[:3], quantizer.packed_dim), jnp.uint8)
    norms = jax.ShapeDtypeStruct(x.shape[:3], jnp.float32)
    none = {"starts_ptr": None, "pages_ptr": None, "codes_in_ptr": None, "norms_in_ptr": None}
    return _encode(x, center, [], [codes, norms], none, {}, quantizer, gluon, capability)


def _append(codes, norms, x, starts, *rest, quantizer, centered, paged, gluon, capability):
    center, pages = rest[:centered], rest[centered:]
    outs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (codes, norms)]
    first = 3 + centered + paged  # x, the center, the table, starts, pages
    none = {} if paged else {"pages_ptr": None}
    aliases = {first: 0, first + 1: 1}
    return _encode(x, center, [starts, *pages, codes, norms], outs, none, aliases, quantizer, gluon, capability)


def _encode(x, center, arrays, outs, none, aliases, quantizer, gluon, capability):
    aligned = quantizer.packed_dim % 4 == 0
    (rows, _, size, _), pages = outs[0].shape, [a for a in arrays if a.ndim == 2]
    strides = _strides("x", x.shape) | _strides("codes", outs[0].shape) | _strides("norms", (*outs[1].shape, 1))
    sizes = {"T": x.shape[2], "S": size, "N": rows, "M": pages[0].shape[1] if pages else 0}
    if gluon:
        if capability // 10 != 9:
            raise NotImplementedError(
                f"'gluon' needs a Hopper device, got one of sm_{capability}; 'xla' has no such need."
            )
        constants, grid, options = gluon_compress_launch(quantizer, x.shape[:3], aligned=aligned)
        return triton_call.launch(
            load("gluon_compress"), [x, jnp.asarray(gluon_compress_table(quantizer)), *arrays], outs,
            constants | none | strides | sizes, grid=grid, capability=capability, aliases=aliases, **options,
        )  # fmt: skip
    name, constants, grid, num_warps = compress_launch(quantizer, x.shape[:3], encode=True, aligned=aligned)
    batch, heads, length = x.shape[:3]
    constants |= none | strides | sizes
    constants |= _strides("center", center[0].shape, x.shape) if center else {"center_ptr": None}
    constants |= {} if center else {f"center_stride_{axis}": 0 for axis in "bkt"}
    constants |= {"vectors": batch * heads * length, "K": heads}
    return triton_call.launch(
        load(name), [x, *center, jnp.asarray(compress_table(quantizer)), *arrays], outs, constants,
        grid=grid, capability=capability, aliases=aliases, num_warps=num_warps, num_stages=1,
    )  # fmt: skip


def _decompress(codes, norms, *, quantizer, dtype, rotated, capability):
    out = jax.ShapeDtypeStruct((*norms.shape, quantizer.head_dim), jnp.dtype(dtype))
    size, vectors, packed_dim = norms.shape[-1], prod(norms.shape), codes.shape[-1]
    name, constants, grid, num_warps = compress_launch(
        quantizer, (1, vectors // size, size), encode=False, aligned=packed_dim % 4 == 0
    )
    constants |= _strides("codes", (1, vectors // size, size, packed_dim))
    constants |= _strides("norms", (1, vectors // size, size, 1)) | {"ROTATED": rotated}
    constants |= {"vectors": vectors, "K": vectors // size, "S": size}
    return triton_call.launch(
        load(name), [codes, norms, jnp.asarray(compress_table(quantizer))], [out], constants,
        grid=grid, capability=capability, num_warps=num_warps, num_stages=1,
    )  # fmt: skip


def _strides(name, shape, broadcast=None):
    """Of the first three of four axes; 0 along one that is broadcast."""
    axes = "bkt" if name in ("x", "center") else "bks"
    strides = [prod(shape[i + 1 :]) for i in range(3)]
    wide = broadcast or shape
    return {f"{name}_stride_{a}": strides[i] if shape[i] == wide[i] else 0 for i, a in enumerate(axes)}


def _in_four_axes(x):
    return x.reshape(_four_axes(x.shape))


def _four_axes(shape):
    return shape if len(shape) == 4 else (1, prod(shape[:-2]), *shape[-2:])


def _present(*arrays):
    return [x for x in arrays if x is not None]


# --- as JAX sees them: compiled while a program is lowered for CUDA ---------------------------------------------------


def _shape_of_compress(x, *_, quantizer, **options):
    return ShapedArray((*x.shape[:3], quantizer.packed_dim), jnp.uint8), ShapedArray(x.shape[:3], jnp.float32)


def _shape_of_append(codes, norms, *_, **options):
    return ShapedArray(codes.shape, codes.dtype), ShapedArray(norms.shape, norms.dtype)


def _shape_of_decompress(codes, norms, *, quantizer, dtype, **options):
    return (ShapedArray((*norms.shape, quantizer.head_dim), np.dtype(jnp.dtype(dtype))),)


def _primitive(name, function, shape):
    primitive = Primitive(f"tq_triton_{name}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    primitive.def_abstract_eval(shape)

    def lower_for_cuda(ctx, *operands, **options):
        of_capability = functools.partial(function, **options, capability=triton_call._capability(ctx))
        return mlir.lower_fun(of_capability, multiple_results=True)(ctx, *operands)

    def lower_for_others(ctx, *operands, **options):
        platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
        raise NotImplementedError(f"'triton' needs CUDA, got a program for {platforms}; 'xla' has no such need.")

    def batch(arrays, axes, **options):
        """One after the other."""
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)

        def at(i):
            return primitive.bind(
                *(
                    x if axis is None else lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
                    for x, axis in zip(arrays, axes, strict=True)
                ),
                **options,
            )

        found = lax.map(at, jnp.arange(size))
        return found, [0] * len(found)

    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower_for_cuda, platform="cuda")
    mlir.register_lowering(primitive, lower_for_others)
    return primitive


compress_p = _primitive("compress", _compress, _shape_of_compress)
append_p = _primitive("append", _append, _shape_of_append)
decompress_p = _primitive("decompress", _decompress, _shape_of_decompress)
