"""Launches the kernels of `tqcore.kernels`, Triton and Gluon, on JAX arrays, as PTX that XLA's own kernel call takes.

The kernel is compiled while JAX lowers for CUDA, never while it traces: `lax.platform_dependent` traces every branch
on every platform. XLA's call passes arrays only, so that all else is a constant of the compiled kernel; the scale is in
the table's words.

Source: xla/service/gpu/kernel_call.cc reads the attributes that `launch` writes.
"""

import contextlib
import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive

from tqcore import tuning
from tqcore.kernels import load, score_constants, stages
from tqcore.packing import code_bits
from tqjax import device

INSTALLED = importlib.util.find_spec("triton") is not None
TARGET = "__gpu$xla.gpu.ptx"
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "uint8": "*u8", "int8": "*i8", "int32": "*i32"}
SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}  # a block may take, by compute capability
LEAST_SHARED_KIB = 99  # on the other ones from 8.0

fused_qk_scores_p = Primitive("tq_triton_fused_qk_scores")
fused_qk_scores_p.def_impl(functools.partial(apply_primitive, fused_qk_scores_p))


def fused_qk_scores(q, codes, norms, words, *, implementation="triton", config=None):
    """q [B, H, T, D], codes [B, K, S, P], norms [B, K, S], words with the scale in them -> [B, H, T, S] float32."""
    return fused_qk_scores_p.bind(q, codes, norms, words, implementation=implementation, config=config)


@fused_qk_scores_p.def_abstract_eval
def _shape(q, codes, norms, words, **options):
    return ShapedArray((*q.shape[:3], codes.shape[2]), jnp.float32)


def _batch(arrays, axes, **options):
    """A batch of queries alone joins T, so that keys are read once; one of keys joins B; tables go one by one."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)

    def score(i):
        at_i = (
            x if axis is None else lax.dynamic_index_in_dim(x, i, axis, keepdims=False)
            for x, axis in zip(arrays, axes, strict=True)
        )
        return fused_qk_scores_p.bind(*at_i, **options)

    q, codes, norms, words = arrays
    if axes[3] is not None:
        return lax.map(score, jnp.arange(size)), 0
    if axes[1] is None and axes[2] is None:
        q = jnp.moveaxis(q, axes[0], 2)
        folded, axis = (lax.collapse(q, 2, 4), codes, norms), 2
    else:
        q, codes, norms = (
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(arrays[:3], axes[:3], strict=True)
        )
        folded, axis = [lax.collapse(x, 0, 2) for x in (q, codes, norms)], 0
    out = fused_qk_scores_p.bind(*folded, words, **options)
    return out.reshape(*q.shape[:4], out.shape[3]), axis


def _lower_for_cuda(ctx, *operands, **options):
    function = functools.partial(_scores, **options, capability=_capability(ctx))
    return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)


def _lower_for_others(ctx, *operands, implementation, config):
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise NotImplementedError(f"{implementation!r} needs CUDA, got a program for {platforms}; 'xla' has no such need.")


batching.primitive_batchers[fused_qk_scores_p] = _batch
mlir.register_lowering(fused_qk_scores_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(fused_qk_scores_p, _lower_for_others)


def _scores(q, codes, norms, words, *, implementation, config, capability):
    batch, heads, length, head_dim = q.shape
    kv_heads, keys, packed_dim = codes.shape[1:]
    rows, kv = heads // kv_heads * length, batch * kv_heads
    if implementation == "gluon" and capability // 10 != 9:
        raise NotImplementedError(f"'gluon' needs a Hopper device, got one of sm_{capability}; 'xla' has no such need.")
    name = "gluon_long" if implementation == "gluon" and rows > tuning.LONG_ROWS else implementation
    config = config or tuning.score_config(name, rows, keys, kv, head_dim, device.cuda_kind())
    strides = {
        "codes_stride_b": kv_heads * keys * packed_dim,
        "codes_stride_k": keys * packed_dim,
        "norms_stride_b": kv_heads * keys,
        "norms_stride_k": keys,
    }
    shape = score_constants(config, head_dim, code_bits(packed_dim, head_dim), words.shape[0] // 4, packed_dim)
    constants = shape | strides | {"K": kv_heads, "R": rows, "S": keys, "blocks": config.blocks}
    out = jax.ShapeDtypeStruct((batch, heads, length, keys), jnp.float32)
    options = {"capability": capability, "num_warps": config.num_warps, "num_stages": config.num_stages}
    if name == "gluon_long":
        planes, factor = _converted_queries(q, words, rows, kv, shape, capability)
        programs_s, _, programs_r = config.long_grid(rows, keys, kv)
        arrays, constants["STAGES"] = [planes, factor, codes, norms, words], config.num_stages
    else:
        programs_s, _, programs_r = config.grid(rows, keys, kv)
        arrays, constants["scale"] = [q, codes, norms, words], 1.0
        if name == "gluon":
            constants["STAGES"] = stages(config, packed_dim)
        else:
            constants["PTX"] = True
    (out,) = launch(load(name), arrays, [out], constants, grid=(programs_s * kv, programs_r), **options)
    return out


def _converted_queries(q, words, rows, kv, shape, capability):
    """Planes [B·K, padded R, 2, 2·BLOCK_P] int8 and factors [B·K, padded R] float32 of all query rows."""
    groups = tuning.ceil_div(rows, tuning.ROW_GROUP)
    planes = jax.ShapeDtypeStruct((kv, groups * tuning.ROW_GROUP, 2, 2 * shape["BLOCK_P"]), jnp.int8)
    factor = jax.ShapeDtypeStruct((kv, groups * tuning.ROW_GROUP), jnp.float32)
    constants = {name: shape[name] for name in ("D", "BITS", "PLANES", "BLOCK_P")} | {"R": rows, "scale": 1.0}
    return launch(
        load("gluon_queries"), [q, words], [planes, factor], constants,
        grid=(groups * kv, 1), capability=capability, num_warps=1,
    )  # fmt: skip


def launch(kernel, arrays, outs, constants, *, grid, capability, aliases=None, **options):
    """Calls a Triton or Gluon kernel whose pointers are `arrays`, then `outs`; `constants` are the rest, by name.

    `aliases` says which of `arrays` is which of `outs`, by number.
    """
    types = tuple(TYPES[x.dtype.name] for x in (*arrays, *outs))
    compiled = _compile(kernel, types, tuple(constants.items()), capability, tuple(options.items()))
    ptx, metadata = compiled.asm["ptx"], compiled.metadata
    name, parameters = re.findall(r"\.entry\s+(\w+)\((.*?)\)", ptx, re.DOTALL)[0]
    _check_memory(metadata, capability)
    scratch = [jax.ShapeDtypeStruct((16,), jnp.int8)] * (parameters.count(".param") - len(types))
    sizes = {"grid_x": grid[0], "grid_y": grid[1], "grid_z": (*grid, 1)[2], "shared_mem_bytes": metadata.shared}
    sizes |= {"block_x": 32 * metadata.num_warps, "block_y": 1, "block_z": 1}
    attributes = {"name": name, "kernel_type": "ptx", "kernel_data": ptx} | {k: np.int32(v) for k, v in sizes.items()}
    call = jax.ffi.ffi_call(TARGET, [*outs, *scratch], input_output_aliases=aliases)
    return call(*arrays, **attributes)[: len(outs)]


@functools.cache
def _compile(kernel, types, constants, capability, options) -> Any:
    """`types` of the arguments that are no `constants`, in their order; pointers are taken as multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction):
        raise NotImplementedError(
            "'triton' needs a process without TRITON_INTERPRET=1 in its environment, got kernels that Triton "
            "interprets; 'xla' has no such need."
        )
    constants = dict(constants)
    pointers = dict(zip((name for name in kernel.arg_names if name not in constants), types, strict=True))
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(
        kernel,
        {name: pointers.get(name, "constexpr") for name in kernel.arg_names},
        constants,
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"enable_fp_fusion": False, **dict(options)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _check_memory(metadata, capability):
    """Raises where a kernel needs what XLA's call does not give."""
    scratch = (metadata.global_scratch_size or 0) + (metadata.profile_scratch_size or 0)
    limit = 1024 * SHARED_KIB.get(capability, LEAST_SHARED_KIB)
    if scratch or metadata.shared > limit:
        raise NotImplementedError(
            f"A kernel launched from JAX must take no scratch memory and at most {limit} bytes of shared memory on "
            f"sm_{capability}, got {scratch} and {metadata.shared} bytes of {metadata.name}; 'xla' has no such need."
        )


def _capability(ctx) -> int:
    """Ten times the compute capability of the GPU lowered for, else of JAX's abstract device, else 90."""
    devices = getattr(ctx.module_context.axis_context, "device_assignment", None) or ()
    for one in (*devices, *device.cuda_devices()):
        if version := getattr(one, "compute_capability", None):
            return int(version.replace(".", ""))
    with contextlib.suppress(ImportError, AttributeError, ValueError):  # from jax 0.11 on, if told of a GPU
        return importlib.import_module("jax.experimental.pallas.triton").get_gpu_info().compute_capability
    return 90
