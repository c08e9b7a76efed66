"""Every kernel compiles for sm_80, sm_90 and sm_100, here and now, with no GPU; the main ones spill nothing."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from cubin import compile_kernel, compile_ttir, pallas_ttir, resources

from tqcore import tuning
from tqcore.kernels import gluon_long_scores, gluon_scores, score_constants, scores, stages
from tqcore.packing import packed_dim
from tqjax import pallas_scores

CAPABILITIES = [80, 90, 100]
SHAPES = [
    # head_dim, bits, planes, rows, query dtype
    (128, 4, 1, 4, "fp32"),
    (128, 4, 1, 4, "bf16"),
    (128, 4, 1, 16, "fp32"),
    (128, 4, 1, 68, "fp32"),
    (128, 4, 2, 4, "fp32"),
    (64, 4, 1, 4, "fp32"),
    (80, 4, 1, 4, "fp16"),
    (256, 4, 1, 4, "fp32"),
    (256, 4, 2, 68, "fp32"),
    (128, 3, 1, 4, "fp32"),
    (128, 2, 1, 4, "fp32"),
    (128, 3, 1, 68, "bf16"),
    (64, 3, 2, 4, "fp32"),
    (80, 2, 2, 16, "fp32"),
    (256, 3, 2, 68, "fp32"),
]
KEYS, HEADS = 4096, 16
SIGNATURE = {
    "q_ptr": "*fp32",
    "codes_ptr": "*u8",
    "norms_ptr": "*fp32",
    "table_ptr": "*i32",
    "scale": "fp32",
    "out_ptr": "*fp32",
    "codes_stride_b": "i32:16",
    "codes_stride_k": "i32:16",
    "norms_stride_b": "i32:16",
    "norms_stride_k": "i32:16",
    "K": "i32",
    "R": "i32",
    "S": "i32:16",
    "blocks": "i32",
}


def triton_kernel(head_dim, bits, planes, rows, dtype, capability, **options):
    config = tuning.score_config("triton", rows, KEYS, HEADS, head_dim)
    constants = score_constants(config, head_dim, bits, planes, packed_dim(head_dim, bits)) | {"PTX": True}
    return _compiled(scores.scores_kernel, {"q_ptr": f"*{dtype}"}, constants, config, capability, options)


def gluon_kernel(head_dim, bits, planes, rows, dtype, capability, **options):
    config = tuning.score_config("gluon", rows, KEYS, HEADS, head_dim)
    constants = score_constants(config, head_dim, bits, planes, packed_dim(head_dim, bits))
    constants["STAGES"] = stages(config, packed_dim(head_dim, bits))
    return _compiled(gluon_scores.scores_kernel, {"q_ptr": f"*{dtype}"}, constants, config, capability, options)


def gluon_queries_kernel(head_dim, bits, planes, rows, dtype, capability, **options):
    signature = {"q_ptr": f"*{dtype}", "table_ptr": "*i32", "scale": "fp32"}
    signature |= {"planes_ptr": "*i8", "factor_ptr": "*fp32", "R": "i32"}
    constants = {"D": head_dim, "BITS": bits, "PLANES": planes, "BLOCK_P": tuning.packed_block(head_dim)}
    options |= {"num_warps": 1, "enable_fp_fusion": False}
    return compile_kernel(gluon_long_scores.queries_kernel, signature, constants, capability, **options)


def gluon_long_kernel(head_dim, bits, planes, rows, dtype, capability, **options):
    config = tuning.score_config("gluon_long", 8 * rows, KEYS, HEADS, head_dim)
    constants = score_constants(config, head_dim, bits, planes, packed_dim(head_dim, bits))
    constants["STAGES"] = config.num_stages
    first = {"planes_ptr": "*i8", "factor_ptr": "*fp32"}
    return _compiled(gluon_long_scores.scores_kernel, first, constants, config, capability, options)


def _compiled(kernel, first, constants, config, capability, options):
    """`first` of its signature; the rest is SIGNATURE, in the order of the kernel's arguments."""
    options |= {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    signature = {name: (SIGNATURE | first)[name] for name in kernel.arg_names if name not in constants}
    return compile_kernel(kernel, signature, constants, capability, **options)


def pallas_kernel(head_dim, bits, planes, rows, dtype, capability):
    def scores(q, codes, norms, words):
        return pallas_scores.fused_qk_scores(q, codes, norms, words)

    dtype = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}[dtype]
    shapes = [
        jax.ShapeDtypeStruct((2, 8 * rows, 1, head_dim), dtype),
        jax.ShapeDtypeStruct((2, 8, KEYS, packed_dim(head_dim, bits)), jnp.uint8),
        jax.ShapeDtypeStruct((2, 8, KEYS), jnp.float32),
        jax.ShapeDtypeStruct((4 * planes + 1,), jnp.int32),
    ]
    ((text, num_warps, num_stages),) = pallas_ttir(scores, *shapes)
    return compile_ttir(text, capability, num_warps=num_warps, num_stages=num_stages)


def compile_and_measure(kernel, shape, capability, options):
    """(Resources, PTX) of one kernel."""
    compiled = kernel(*shape, capability, **options)
    return resources(compiled, capability), compiled.asm["ptx"]


@pytest.fixture
def compiler(in_compiling_process):
    return lambda *arguments, **options: in_compiling_process(compile_and_measure, *arguments, options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kernel", "capability"),
    [
        *itertools.product([triton_kernel, pallas_kernel], CAPABILITIES),
        *((kernel, 90) for kernel in (gluon_kernel, gluon_queries_kernel, gluon_long_kernel)),
    ],
    ids=lambda value: getattr(value, "__name__", f"sm_{value}"),
)
def test_compiles(compiler, kernel, shape, capability, record_property):
    taken, ptx = compiler(kernel, shape, capability)
    head_dim, bits, planes, rows, dtype = shape
    record_property(
        "resources",
        f"{kernel.__name__:<14} sm_{capability:<4} D={head_dim:<4} bits={bits} planes={planes} rows={rows:<3} {dtype}: "
        f"{taken.registers:>3} registers, {taken.spill_bytes} bytes spilled, {taken.shared_bytes:>6} bytes shared",
    )
    assert taken.cubin_bytes > 0 and taken.registers > 0
    assert "mul.rn.ftz.f32" in ptx and ("prmt.b32" in ptx or kernel is gluon_queries_kernel)
    if (head_dim == 128 and planes == 1) or kernel in (gluon_kernel, gluon_queries_kernel):
        assert taken.spill_bytes == 0
    if kernel.__name__.startswith("gluon"):
        assert "st.shared" not in ptx  # layouts change in registers


def test_spills_are_seen(compiler):
    """A kernel held to 32 registers spills, and `resources` says so."""
    taken, _ = compiler(triton_kernel, (128, 4, 2, 68, "fp32"), 80, maxnreg=32)
    assert taken.registers <= 32 and taken.spill_bytes > 0
