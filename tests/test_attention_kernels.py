"""The attention kernels: what they compile to, what makes them compile anew, what memory and gradients they take."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_cases import CAUSAL, PLAIN, attention_inputs, attention_oracle
from backends import (
    ATTENTION_BACKENDS,
    DEVICE,
    EVERY_CASE,
    assert_close,
    assert_close_attention,
    attention_arguments,
    to_array,
    to_numpy,
)
from cubin import compile_kernel, compile_ttir, pallas_ttir, resources

import tq_torch
import tqjax
from tq_torch import dense_attention, triton_attention
from tqcore import kernels, softmax, tuning
from tqcore.kernels import attention, attention_constants, gluon_attention, merge_constants, stages
from tqcore.quantizer import PackedVectors, Quantizer
from tqjax import dense_attention as jax_dense_attention
from tqjax import pallas_attention

PLAIN_OPTIONS = softmax.Options(0.1, False, None, None, None)
ALL_OPTIONS = softmax.Options(0.1, True, (9, 4), 5.0, None)
POSITIONS, HEADS = 32768, 64
SHAPES = [
    # head_dim, bits, rows, query dtype, page, options
    (128, (4, 4), 4, "fp32", None, PLAIN_OPTIONS),
    (128, (4, 4), 4, "bf16", 16, PLAIN_OPTIONS),
    (128, (4, 4), 4, "fp32", 64, ALL_OPTIONS),
    (128, (3, 2), 4, "fp32", None, PLAIN_OPTIONS),
    (128, (4, 4), 16, "fp32", None, PLAIN_OPTIONS),
    (128, (4, 4), 68, "fp16", None, ALL_OPTIONS),
    (64, (4, 4), 4, "fp32", None, PLAIN_OPTIONS),
    (80, (4, 4), 4, "fp32", None, PLAIN_OPTIONS),
    (256, (2, 3), 4, "fp32", 48, PLAIN_OPTIONS),
]
MOST_SPILLED = 80  # bytes of a thread, with pages: three programs a processor in place of two are worth more
MOST = 24  # variants of a cache that grows: kinds of S and of the number of parts


def signature(kernel, constants, dtype):
    """Types by argument: pointers by what they hold, sizes and strides as torch passes them."""
    floats = ("signs", "norms", "sinks", "out", "ml", "lse")
    types = {"q_ptr": f"*{dtype}", "result_ptr": f"*{dtype}", "scale": "fp32"}
    for name in kernel.arg_names:
        if name.endswith("_ptr") and name not in types:
            kind = "u8" if "codes" in name else "fp32" if any(x in name for x in floats) else "i32"
            types[name] = f"*{kind}"
        types.setdefault(name, "i32:16" if "stride" in name else "i32")
    return {name: types[name] for name in kernel.arg_names if name not in constants}


def triton_kernel(head_dim, bits, rows, dtype, page, options, capability):
    config = tuning.attention_config("attention", rows, POSITIONS, HEADS, head_dim, bits=bits, paged=page is not None)
    quantizers = [Quantizer(head_dim, each) for each in bits]
    strides = [quantizer.packed_dim for quantizer in quantizers]
    constants = attention_constants(config, options, *quantizers, page, *strides) | {"PTX": True}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}
    launch["enable_fp_fusion"] = False
    types = signature(attention.attention_kernel, constants, dtype)
    return compile_kernel(attention.attention_kernel, types, constants, capability, **launch)


def gluon_kernel(head_dim, bits, rows, dtype, page, options, capability):
    config = tuning.attention_config("gluon_attention", rows, POSITIONS, HEADS, head_dim)
    quantizers = [Quantizer(head_dim, each) for each in bits]
    strides = [quantizer.packed_dim for quantizer in quantizers]
    constants = attention_constants(config, options, *quantizers, page, *strides)
    constants["STAGES"] = stages(config, *strides)
    kernel = gluon_attention.attention_kernel
    types = signature(kernel, constants, dtype)
    launch = {"num_warps": config.num_warps, "maxnreg": config.max_registers, "enable_fp_fusion": False}
    return compile_kernel(kernel, types, constants, capability, **launch)


def merge_kernel(head_dim, bits, rows, dtype, page, options, capability):
    constants = merge_constants(rows, Quantizer(head_dim, bits[1]), page is not None, early=capability >= 90)
    types = signature(attention.merge_kernel, constants, dtype)
    return compile_kernel(attention.merge_kernel, types, constants, capability, num_warps=1, enable_fp_fusion=False)


def pallas_kernel(head_dim, bits, rows, dtype, page, options, capability):
    slots = (8, 8, 1024) if page is None else (128, 8, page)
    quantizers = [Quantizer(head_dim, each) for each in bits]
    shapes = [jax.ShapeDtypeStruct((8, 8 * rows, 1, head_dim), getattr(jnp, {"fp32": "float32"}.get(dtype, "float16")))]
    for quantizer in quantizers:
        shapes.append(jax.ShapeDtypeStruct((*slots, quantizer.packed_dim), jnp.uint8))
        shapes.append(jax.ShapeDtypeStruct(slots, jnp.float32))
    shapes.append(jax.ShapeDtypeStruct((8,), jnp.int32))
    shapes += [] if page is None else [jax.ShapeDtypeStruct((8, 16), jnp.int32)]

    def attend(query, k_codes, k_norms, v_codes, v_norms, lengths, table=None):
        packed = (PackedVectors(k_codes, k_norms, quantizers[0]), PackedVectors(v_codes, v_norms, quantizers[1]))
        return pallas_attention.attention(query, *packed, lengths, table, None, options)

    ((text, num_warps, num_stages),) = pallas_ttir(attend, *shapes)
    return compile_ttir(text, capability, num_warps=num_warps, num_stages=num_stages)


def compile_and_measure(kernel, shape, capability):
    compiled = kernel(*shape, capability)
    return resources(compiled, capability), compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("kernel", "capability", "shape"),
    [
        *((kernel, 90, shape) for kernel in (triton_kernel, gluon_kernel) for shape in SHAPES),
        *((triton_kernel, capability, SHAPES[2]) for capability in (80, 100)),
        *((kernel, 90, shape) for kernel in (merge_kernel, pallas_kernel) for shape in SHAPES[::3]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value[:5] if isinstance(value, tuple) else value)),
)
def test_compiles(in_compiling_process, kernel, capability, shape, record_property):
    taken, ptx = in_compiling_process(compile_and_measure, kernel, shape, capability)
    record_property(
        "resources",
        f"attention {kernel.__name__:<14} sm_{capability:<4} {shape[:5]}: {taken.registers:>3} registers, "
        f"{taken.spill_bytes} bytes spilled, {taken.shared_bytes:>6} bytes shared",
    )
    assert taken.cubin_bytes > 0 and taken.registers > 0
    if kernel is not merge_kernel:
        assert "prmt.b32" in ptx and "ex2.approx" in ptx and ("cp.async" in ptx or shape[0] == 80)
    if capability == 90 and shape[2] <= 16:
        assert taken.spill_bytes <= (MOST_SPILLED if shape[4] and kernel is triton_kernel else 0)


@pytest.mark.parametrize("kernel", ["attention", "gluon_attention"])
def test_parts_fill_the_device(kernel):
    """Few positions are one part; many are whole waves of programs; what is asked for is done, as far as it goes."""

    def parts(positions, heads, rows=4, **options):
        return tuning.attention_config(kernel, rows, positions, heads, 128, **options).splits

    assert [parts(positions, 8) for positions in (0, 1, 64)] == [1, 1, 1]
    for positions, heads in ((32768, 64), (2**17, 8), (2048, 512), (2**20, 1)):
        config = tuning.attention_config(kernel, 4, positions, heads, 128)
        _, wave = tuning._entry(kernel, 4, 128, None, (4, 4))
        programs = config.splits * heads
        assert programs / wave / tuning.ceil_div(programs, wave) > 0.8
        assert config.splits * config.block_s <= positions
    assert parts(32768, 64, splits=5) == 5 and parts(300, 64, splits=1000) <= 10
    assert parts(8, 2**20, rows=10**4) == 1


# --- launches ------------------------------------------------------------------------------------------------------


def test_torch_specialises_little(monkeypatch):
    """As the lengths grow nothing is compiled anew, and as the cache itself grows little is."""
    inputs = attention_inputs(replace(PLAIN, B=1, K=2, G=4, S=1000, D=128, lengths="full"))
    query, keys, values, _ = attention_arguments(tq_torch, inputs)
    seen = set()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **constants):
            kinds = [(x == 1, x % 16 == 0) if isinstance(x, int) else None for x in arguments]
            seen.add((self.name, *kinds, *constants.items()))

    monkeypatch.setattr(triton_attention, "load", Kernel)

    def attend(size, length):
        of_size = [packed.map(lambda x: x[:, :, :size]) for packed in (keys, values)]
        lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        triton_attention.attention(query, *of_size, lengths, None, None, PLAIN_OPTIONS, "triton")

    for length in range(1, 1001, 9):
        attend(1000, length)
    assert len(seen) == 2
    for size in range(1, 1001):
        attend(size, size)
    assert len(seen) <= MOST, f"{len(seen)} variants: {sorted(map(str, seen))}"


@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
def test_gradient_is_that_of_the_plain_implementation(package):
    inputs = attention_inputs(replace(CAUSAL, B=1, centers=("static", "head"), sinks=True, page=None))
    query, keys, values, arrays = attention_arguments(package, inputs)
    names = {tqjax: ("xla", "pallas_triton"), tq_torch: ("eager", "triton")}[package]
    gradients = []
    for name in names:
        options = {**arrays, **inputs.static, "return_lse": True, "implementation": name}
        if package is tqjax:
            total = lambda query: sum(x.sum() for x in tqjax.attention(query, keys, values, **options))  # noqa: B023, E731
            gradients.append(to_numpy(jax.grad(total)(query)))
        else:
            leaf = query.clone().requires_grad_()
            sum(x.sum() for x in tq_torch.attention(leaf, keys, values, **options)).backward()
            gradients.append(to_numpy(leaf.grad))
    assert_close(gradients[1], gradients[0], 1e-3)
    assert np.abs(gradients[0]).max() > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", sorted({b.implementation for b in ATTENTION_BACKENDS} & {"triton", "gluon"}))
def test_extra_memory_is_that_of_the_parts(implementation):
    """Beyond the output: of each part a float32 output, m and l; no allocation grows with S."""
    taken = []
    for size in (4096, 16384):
        inputs = attention_inputs(replace(PLAIN, B=2, K=4, G=4, S=size, D=128, lengths="full", splits=8))
        query, keys, values, _ = attention_arguments(tq_torch, inputs)
        lengths = torch.full((2,), size, dtype=torch.int32, device=DEVICE)
        options = {"kv_lengths": lengths, "num_splits": 8, "implementation": implementation}
        tq_torch.attention(query, keys, values, **options)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = tq_torch.attention(query, keys, values, **options)
        torch.cuda.synchronize()
        taken.append(torch.cuda.max_memory_allocated() - before - out.nbytes)
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    parts = 4 * 8 * rows * (128 + 2)
    assert taken[0] == taken[1] <= parts + 4 * rows + 4 * 512  # and the log-sum-exp; blocks of 512 bytes


@pytest.mark.gpu
@pytest.mark.parametrize("front", ["torch", "jax"])
def test_decode_loop_compiles_few(front):
    """2,000 steps of a filling cache; nothing is compiled after the first few."""
    inputs = attention_inputs(replace(PLAIN, B=1, K=2, G=4, S=2000, D=128, lengths="full"))
    package = {"torch": tq_torch, "jax": tqjax}[front]
    query, keys, values, _ = attention_arguments(package, inputs)
    step = jax.jit(lambda lengths: tqjax.attention(query, keys, values, kv_lengths=lengths))
    lengths = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def compiled():
        if front == "jax":
            return step._cache_size()
        names = [name for name in ("attention", "gluon_attention", "merge") if kernels.can_load(name)]
        return sum(len(each[0]) for name in names for each in kernels.load(name).device_caches.values())

    for length in range(1, 2001):
        if front == "jax":
            step(jnp.array([length], jnp.int32))
        else:
            tq_torch.attention(query, keys, values, kv_lengths=lengths.fill_(length))
        if length == 4:
            first = compiled()
    assert compiled() == first


@pytest.mark.parametrize("name", sorted({b.implementation for b in EVERY_CASE if b.package is tqjax} - {"xla"}))
@pytest.mark.parametrize("shared", ["nothing", "keys", "query"])
def test_jax_vmap_of_kernels(name, shared):
    inputs = attention_inputs(replace(CAUSAL, S=150, B=3, sinks=True))
    query, keys, values, arrays = attention_arguments(tqjax, inputs)
    axes = {"nothing": (0, 0, 0, 0), "keys": (0, None, None, 0), "query": (None, 0, 0, 0)}[shared]

    def one(query, keys, values, length):
        packed = (packed.map(lambda x: x[None]) for packed in (keys, values))
        options = {"kv_lengths": length[None], "sinks": arrays["sinks"], "is_causal": True, "implementation": name}
        return tqjax.attention(query[None], *packed, **options, return_lse=True)

    def all_of(x, axis):
        return x if axis == 0 else jax.tree.map(lambda x: x[0], x)

    def repeated(x, axis):
        return x if axis == 0 else jax.tree.map(lambda x: np.repeat(np.asarray(x)[:1], 3, 0), x)

    given = [all_of(x, axis) for x, axis in zip((query, keys, values, arrays["kv_lengths"]), axes, strict=True)]
    got = [np.asarray(x)[:, 0] for x in jax.vmap(one, axes)(*given)]
    parts = [repeated(x, axis) for x, axis in zip((inputs.query, inputs.keys, inputs.values), axes[:3], strict=True)]
    expected = attention_oracle(replace(inputs, query=parts[0], keys=parts[1], values=parts[2]))
    assert_close_attention(tuple(got), expected, "float32")


def test_wrong_parts_are_seen(monkeypatch):
    """A merge that leaves out a part, and one of parts that overlap, are no attention."""
    case = replace(PLAIN, S=700, lengths="full", splits=4)
    inputs = attention_inputs(case)
    query, keys, values, _ = attention_arguments(tq_torch, inputs)
    lengths = torch.full((case.B,), case.S, dtype=torch.int32, device=DEVICE)
    expected = attention_oracle(inputs)

    def attend(**changed):
        options = replace(PLAIN_OPTIONS, scale=case.D**-0.5, num_splits=4)
        with np.errstate(all="ignore"):
            given = (query, keys, values, changed.get("lengths", lengths), None, None, options)
            return tuple(map(to_numpy, triton_attention.attention(*given, "triton")))

    assert_close_attention(attend(), expected, "float32")
    for wrong in (lengths - 128, lengths // 4 * 3):
        with pytest.raises(AssertionError):
            assert_close_attention(attend(lengths=wrong), expected, "float32")


DENSE_CASES = [
    replace(CAUSAL, lengths="full"),
    replace(CAUSAL, T=70),
    replace(PLAIN, T=9, window=(9, 3), page=16),
    replace(CAUSAL, D=80, centers=("varying", "static"), qjl=(True, False), bits=(3, 2)),
    replace(PLAIN, lengths="zero"),
    replace(CAUSAL, T=80, dtype="bfloat16", D=128),
]


@pytest.mark.parametrize("chunk", [2**26, 400])
@pytest.mark.parametrize("case", DENSE_CASES, ids=str)
@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
def test_dense(monkeypatch, package, case, chunk):
    """As near the oracle as the query's dtype allows, a chunk of queries at a time."""
    monkeypatch.setattr(dense_attention, "MASK_BYTES", chunk)
    monkeypatch.setattr(jax_dense_attention, "SCORES", chunk)
    tqjax.attention_ops._dense.clear_cache()
    inputs = attention_inputs(case)
    query, keys, values, arrays = attention_arguments(package, inputs)
    out = package.attention(query, keys, values, **arrays, **inputs.static, implementation="dense")
    out = to_numpy(out.float() if package is tq_torch else out).astype(np.float64)
    expected = attention_oracle(inputs)[0].astype(np.float64)
    error, size = (np.linalg.norm(x, axis=-1) for x in (out - expected, expected))
    limit = {"float32": 1e-3, "bfloat16": 5e-2}[case.dtype]
    assert np.all(error <= limit * size) and np.all((out == 0) | (expected != 0))


@pytest.mark.parametrize(
    "changed", [{"logits_soft_cap": 5.0}, {"return_lse": True}, {"sinks": np.zeros(4, np.float32)}]
)
@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
def test_dense_says_what_it_lacks(package, changed):
    query, keys, values, _ = attention_arguments(package, attention_inputs(replace(PLAIN, lengths="full")))
    changed = {name: to_array(package, x) if isinstance(x, np.ndarray) else x for name, x in changed.items()}
    with pytest.raises(NotImplementedError, match="'dense' needs no soft cap, .* has no such need"):
        package.attention(query, keys, values, **changed, implementation="dense")
