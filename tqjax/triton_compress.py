"""Launches the kernels of `tqcore.kernels.compress` on JAX arrays, as `tqjax.triton_call` launches those of scores."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive

from tqcore import tuning
from tqcore.kernels import compress_constants, load
from tqcore.rotation import matrix, signs
from tqjax import triton_call

compress_p = Primitive("tq_triton_compress")
compress_p.multiple_results = True
decompress_p = Primitive("tq_triton_decompress")


def compress(x, quantizer, center=None, *, config=None):
    """x [..., S, D] -> codes [..., S, P], norms [..., S]."""
    shape = x.shape
    given = [_four_axes(x)] if center is None else [_four_axes(x), _broadcast_axes(center, shape)]
    codes, norms = compress_p.bind(*given, _rotation(quantizer, False), quantizer=quantizer, config=config)
    return codes.reshape(*shape[:-1], quantizer.packed_dim), norms.reshape(shape[:-1])


def decompress(codes, norms, quantizer, center=None, *, dtype="float32", rotated=False, config=None):
    """codes [..., S, P], norms [..., S] -> norm · Rᵀ centroids[index] + center, or norm · centroids[index] if rotated."""
    shape = (*norms.shape, quantizer.head_dim)
    given = [_four_axes(codes), _four_axes(norms[..., None])[..., 0]]
    given += [] if center is None else [_broadcast_axes(center, shape)]
    options = {"quantizer": quantizer, "dtype": jnp.dtype(dtype), "rotated": rotated, "config": config}
    return decompress_p.bind(*given, _rotation(quantizer, True), **options).reshape(shape)


@compress_p.def_abstract_eval
def _compressed(x, *_, quantizer, config):
    rows = x.shape[:-1]
    return ShapedArray((*rows, quantizer.packed_dim), jnp.uint8), ShapedArray(rows, jnp.float32)


@decompress_p.def_abstract_eval
def _decompressed(codes, *_, quantizer, dtype, **options):
    return ShapedArray((*codes.shape[:-1], quantizer.head_dim), dtype)


def _launch_compress(x, *center_and_rotation, quantizer, config, capability):
    *center, rotation = center_and_rotation
    (heads, kv_heads, length), rows = x.shape[:3], x.size // x.shape[3]
    packed_dim, bits = quantizer.packed_dim, quantizer.code_bits
    config = config or tuning.compress_config(rows, quantizer.head_dim)
    constants = _constants(quantizer, config, center, x.shape) | {
        "starts_ptr": None,
        "table_ptr": None,
        **_strides("x", x.shape),
        **_strides("codes", (heads, kv_heads, length, packed_dim)),
        **_strides("norms", (heads, kv_heads, length, 1)),
        "capacity": length,
        "pages": 1,
        "table_stride_b": 0,
        "PAGE": 1,
        "BOUNDARIES": tuple(quantizer.codebook.boundaries[2 ** (bits - 1) :].tolist()),
        "CORRECTED": quantizer.norm == "corrected",
    }
    outs = [
        jax.ShapeDtypeStruct((heads, kv_heads, length, packed_dim), jnp.uint8),
        jax.ShapeDtypeStruct((heads, kv_heads, length), jnp.float32),
    ]
    return triton_call.launch(
        load("compress"), [x, rotation, *center], outs, constants, capability=capability, num_stages=1,
        grid=(config.programs(heads * kv_heads, length), 1), num_warps=config.num_warps,
    )  # fmt: skip


def _launch_decompress(codes, norms, *center_and_rotation, quantizer, dtype, rotated, config, capability):
    *center, rotation = center_and_rotation
    heads, kv_heads, length = norms.shape
    config = config or tuning.compress_config(norms.size, quantizer.head_dim)
    shape = (heads, kv_heads, length, quantizer.head_dim)
    constants = _constants(quantizer, config, center, shape) | {"ROTATED": rotated}
    (out,) = triton_call.launch(
        load("decompress"), [codes, norms, rotation, *center], [jax.ShapeDtypeStruct(shape, dtype)], constants,
        capability=capability, grid=(config.programs(heads * kv_heads, length), 1), num_warps=config.num_warps,
        num_stages=1,
    )  # fmt: skip
    return out


def _constants(quantizer, config, center, shape):
    """What both kernels are compiled for: all but the arrays."""
    axes = center[0].shape if center else (1, 1, 1, quantizer.head_dim)
    nothing = {} if center else {"center_ptr": None}
    strides = {
        name: stride if size > 1 else 0
        for (name, stride), size in zip(_strides("center", axes).items(), axes[:3], strict=True)
    }
    sizes = {"K": shape[1], "S": shape[2], "rows": shape[0] * shape[1] * shape[2], "PTX": True}
    return compress_constants(quantizer, config, config.tiled(shape[2])) | nothing | strides | sizes


def _strides(name, shape):
    _, kv_heads, length, width = shape
    steps = kv_heads * length * width, length * width, width
    return {f"{name}_stride_{axis}": step for axis, step in zip("bks", steps, strict=True)}


def _batch(primitive, arrays, axes, **options):
    """A batch joins B; rotations have none."""
    *arrays, rotation = arrays
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=False) if axis is not None)
    batch = max(x.shape[0 if axis != 0 else 1] for x, axis in zip(arrays, axes, strict=False))

    def folded(x, axis):
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        return lax.collapse(jnp.broadcast_to(x, (size, batch, *x.shape[2:])), 0, 2)

    out = primitive.bind(*(folded(x, axis) for x, axis in zip(arrays, axes, strict=False)), rotation, **options)
    split = functools.partial(jax.tree.map, lambda x: x.reshape(size, -1, *x.shape[1:]))
    return split(out), jax.tree.map(lambda _: 0, out)


def _lower_for_cuda(launch, multiple, ctx, *operands, **options):
    function = functools.partial(launch, **options, capability=triton_call.capability(ctx))
    return mlir.lower_fun(function, multiple_results=multiple)(ctx, *operands)


def _lower_for_others(ctx, *operands, **options):
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise NotImplementedError(f"'triton' needs CUDA, got a program for {platforms}; 'xla' has no such need.")


for _primitive, _launch in ((compress_p, _launch_compress), (decompress_p, _launch_decompress)):
    _primitive.def_impl(functools.partial(apply_primitive, _primitive))
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _primitive)
    _for_cuda = functools.partial(_lower_for_cuda, _launch, _primitive.multiple_results)
    mlir.register_lowering(_primitive, _for_cuda, platform="cuda")
    mlir.register_lowering(_primitive, _lower_for_others)


def _rotation(quantizer, inverse):
    """Signs, or the matrix that rows are multiplied by."""
    if quantizer.rotation == "hadamard":
        return jnp.asarray(signs(quantizer))
    return jnp.asarray(matrix(quantizer) if inverse else matrix(quantizer).T)


def _four_axes(x):
    """[..., S, D] as [B, K, S, D]."""
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x.reshape((1,) * (4 - x.ndim) + x.shape)


def _broadcast_axes(center, shape):
    """A center of vectors of this shape, as [1 or B, 1 or K, 1 or S, D]."""
    if len(shape) > 4:
        center = jnp.broadcast_to(center, (*shape[:-3], *(1,) * (3 - min(3, center.ndim)), *center.shape[-3:]))
    return _four_axes(center)
