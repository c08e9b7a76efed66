"""Launches the attention kernels of `tqcore.kernels`, Triton and Gluon, on JAX arrays, as `tqjax/triton_call.py` does.

All sizes are constants of the compiled kernels; lengths and pages are arrays, so that a filling cache compiles nothing.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive

from tqcore import fixed_point, rotation, softmax, tuning
from tqcore.kernels import attention_constants, load, merge_constants, stages
from tqcore.quantizer import PackedVectors
from tqjax import device, xla
from tqjax.triton_call import _capability, launch

KERNELS = {"triton": "attention", "gluon": "gluon_attention"}

attention_p = Primitive("tq_triton_attention")
attention_p.multiple_results = True
attention_p.def_impl(functools.partial(apply_primitive, attention_p))


def attention(query, keys, values, kv_lengths, page_table, sinks, options, implementation, config=None):
    """The arguments of `tqcore.softmax.attention`, without centers and residuals -> out of query's dtype, lse."""
    optional = {"page_table": page_table, "sinks": sinks}
    given = tuple(name for name, x in optional.items() if x is not None)
    arrays = query, keys.codes, keys.norms, values.codes, values.norms, kv_lengths, *(optional[name] for name in given)
    quantizers = keys.quantizer, values.quantizer
    static = {"options": options, "implementation": implementation, "config": config}
    return tuple(attention_p.bind(*arrays, given=given, quantizers=quantizers, **static))


@attention_p.def_abstract_eval
def _shapes(query, *_, **__):
    return [ShapedArray(query.shape, query.dtype), ShapedArray(query.shape[:3], jnp.float32)]


def _batch(arrays, axes, *, given, **options):
    """A batch joins B; one of sinks, or with pages, goes one by one."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    bind = functools.partial(attention_p.bind, given=given, **options)
    joined = len(arrays) - len(given)
    if "page_table" in given or axes[joined:] not in ((), (None,)):

        def attend(i):
            pairs = zip(arrays, axes, strict=True)
            at_i = (x if axis is None else lax.dynamic_index_in_dim(x, i, axis, keepdims=False) for x, axis in pairs)
            return bind(*at_i)

        return lax.map(attend, jnp.arange(size)), [0, 0]
    whole = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(arrays[:joined], axes[:joined], strict=True)
    ]
    results = bind(*(lax.collapse(x, 0, 2) for x in whole), *arrays[joined:])
    return [x.reshape(*whole[0].shape[:2], *x.shape[1:]) for x in results], [0, 0]


def _lower_for_cuda(ctx, *operands, **options):
    function = functools.partial(_attention, **options, capability=_capability(ctx))
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _lower_for_others(ctx, *operands, implementation, **options):
    platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
    raise NotImplementedError(f"{implementation!r} needs CUDA, got a program for {platforms}; 'xla' has no such need.")


batching.primitive_batchers[attention_p] = _batch
mlir.register_lowering(attention_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(attention_p, _lower_for_others)


def _attention(query, *arrays, given, quantizers, options, implementation, config, capability):
    if implementation == "gluon" and capability // 10 != 9:
        raise NotImplementedError(f"'gluon' needs a Hopper device, got one of sm_{capability}; 'xla' has no such need.")
    k_codes, k_norms, v_codes, v_norms, kv_lengths, *optional = arrays
    optional = dict(zip(given, optional, strict=True))
    page_table, sinks = optional.get("page_table"), optional.get("sinks")
    keys, values = PackedVectors(k_codes, k_norms, quantizers[0]), PackedVectors(v_codes, v_norms, quantizers[1])
    batch, heads, steps, head_dim = query.shape
    kv_heads = k_codes.shape[1]
    rows, kv, positions = heads // kv_heads * steps, batch * kv_heads, softmax.context_size(keys, page_table)
    if 0 in query.shape:
        return jnp.zeros_like(query), jnp.zeros(query.shape[:3], jnp.float32)
    shape = rows, positions, kv, head_dim, device.cuda_kind()
    bits = quantizers[0].code_bits, quantizers[1].code_bits
    choice = options.num_splits, bits, page_table is not None
    config = config or tuning.attention_config(KERNELS[implementation], *shape, *choice)
    sizes = {"K": kv_heads, "R": rows, "T": steps, "S": positions}
    parts = _parts(query, keys, values, kv_lengths, page_table, options, implementation, config, sizes, capability)
    unrotated = values.quantizer.rotation == "hadamard"
    outs = jax.ShapeDtypeStruct(query.shape, query.dtype if unrotated else jnp.float32), _float(query.shape[:3])
    signs = {} if unrotated else {"signs_ptr": None}
    constants = merge_constants(config.splits, values.quantizer, sinks is not None) | sizes | signs
    constants["splits"] = config.splits
    given = [*parts, _words(values), *_signs(values), kv_lengths]
    if sinks is None:
        constants["sinks_ptr"] = None
    else:
        given.append(sinks)
    launched = {"grid": (kv * rows, 1), "capability": capability, "num_warps": config.merge_warps}
    out, lse = launch(load("merge"), given, outs, constants, **launched)
    return (out if unrotated else xla.unrotate(out, values.quantizer).astype(query.dtype)), lse


def _parts(query, keys, values, kv_lengths, page_table, options, implementation, config, sizes, capability):
    """What the attention kernel writes of each part of the positions."""
    page, packed = keys.codes.shape[2], (keys, values)
    strides_s = [x.codes.shape[3] for x in packed]
    constants = attention_constants(
        config, options, keys.quantizer, values.quantizer, None if page_table is None else page, *strides_s
    )
    for name, stride in zip("kv", strides_s, strict=True):
        for array, width in (("codes", page * stride), ("norms", page)):
            constants |= {f"{name}_{array}_stride_b": sizes["K"] * width, f"{name}_{array}_stride_k": width}
    left, right = options.window or (0, 0)
    constants |= sizes | {"scale": options.scale, "splits": config.splits, "left": left, "right": right}
    constants |= {"M": 0 if page_table is None else page_table.shape[1], "N": keys.codes.shape[0]}
    if implementation == "gluon":
        constants["STAGES"] = stages(config, *strides_s)
    else:
        constants["PTX"] = True
    rotated = query if keys.quantizer.rotation == "hadamard" else xla.rotate(query, keys.quantizer)
    arrays = [rotated, *_signs(keys), keys.codes, keys.norms, _words(keys), values.codes, values.norms, _words(values)]
    arrays.append(kv_lengths)
    if page_table is None:
        constants["pages_ptr"] = None
    else:
        arrays.append(page_table)
    if keys.quantizer.rotation != "hadamard":
        constants["signs_ptr"] = None
    grid = config.grid(sizes["R"], query.shape[0] * sizes["K"])
    shape = grid[0] // config.splits, config.splits
    outs = [_float((*shape, sizes["R"], query.shape[3])), _float((*shape, 2, sizes["R"]))]
    launched = {"grid": grid, "capability": capability, "num_warps": config.num_warps, "num_stages": config.num_stages}
    launched["maxnreg"] = config.max_registers
    return launch(load(KERNELS[implementation]), arrays, outs, constants, **launched)


def _float(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _words(packed):
    return jnp.asarray(fixed_point.score_table(packed.quantizer.codebook.centroids).words)


def _signs(packed):
    """Those of a Hadamard rotation, as a list; an empty one where the kernel does not rotate."""
    return [jnp.asarray(rotation.signs(packed.quantizer))] if packed.quantizer.rotation == "hadamard" else []
