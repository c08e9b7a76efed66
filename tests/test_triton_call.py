"""The Triton kernel launched from JAX: what it lowers to, and how it batches. A CUDA device also checks its bits."""

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BASE, Case, inputs, oracle

import tqjax
from tqcore import tuning
from tqjax import device, ops, triton_call

PRIMITIVE = "tq_triton_fused_qk_scores"
CASES = [
    Case(B=2, K=2, G=4, T=1, S=65, D=64),
    Case(B=8, K=8, G=4, T=1, S=32768, D=128, dtype="bfloat16"),
    Case(B=1, K=2, G=4, T=17, S=100, D=80, dtype="float16", table="random"),
    Case(B=1, K=1, G=1, T=1, S=1, D=128),
    Case(B=16400, K=4, G=1, T=1, S=3, D=32),
    Case(B=2, K=4, G=1, T=1, S=9 * 2**20 + 5, D=128),  # strides past 2^31
]
BROKEN = "A release of JAX or XLA changed the kernel call that tqjax/triton_call.py is built on; see its Source: "


def shapes(case):
    """Arguments of `fused_qk_scores` without values."""
    queries, keys = (case.B, case.K * case.G, case.T, case.D), (case.B, case.K, case.S)
    return [
        jax.ShapeDtypeStruct(queries, jnp.dtype(case.dtype)),
        jax.ShapeDtypeStruct((*keys, case.D // 2), jnp.uint8),
        jax.ShapeDtypeStruct(keys, jnp.float32),
        jax.ShapeDtypeStruct((16,), jnp.float32),
    ]


def scores(q, codes, norms, centroids, implementation="triton"):
    return tqjax.fused_qk_scores(
        q, codes, norms, centroids, 0.125,
        n_q_heads=q.shape[1], n_kv_heads=codes.shape[1], implementation=implementation,
    )  # fmt: skip


def kernel_calls(case, implementation, without_pallas):
    """(target, attributes, number of operands and of results) of each custom call in the program for CUDA."""
    from jax.interpreters.mlir import ir

    if without_pallas:
        ops.pallas_scores = None
    with abstract_gpu():
        lowered = jax.jit(scores, static_argnums=4).trace(*shapes(case), implementation)
        module = lowered.lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call":
            target = ir.StringAttr(operation.attributes["call_target_name"]).value
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            attributes = {attribute.name: plain(attribute.attr) for attribute in config}
            found.append((target, attributes, len(operation.operands), len(operation.results)))
        return ir.WalkResult.ADVANCE

    def plain(attribute):
        text = str(attribute)
        return int(text.removesuffix(" : i32")) if text.endswith(" : i32") else ir.StringAttr(attribute).value

    with module.context:
        module.operation.walk(visit)
    return found


def abstract_gpu():
    """JAX from 0.11 on can be told of a device to lower for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.fixture
def lowered(in_compiling_process):
    return lambda case, implementation="triton", without_pallas=False: in_compiling_process(
        kernel_calls, case, implementation, without_pallas
    )


@pytest.fixture
def fresh_traces():
    jax.clear_caches()
    yield
    jax.clear_caches()


# --- lowering for CUDA, with or without a GPU -----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["triton", "gluon"])
def test_lowers_to_a_launch_of_the_kernel(lowered, implementation, case):
    rows, heads = case.G * case.T, case.B * case.K
    long = implementation == "gluon" and rows > tuning.LONG_ROWS
    *converted, (_, call, operands, results) = lowered(case, implementation)
    assert len(converted) == long
    config = tuning.score_config("gluon_long" if long else implementation, rows, case.S, heads, case.D)
    programs_s, programs_kv, programs_r = (config.long_grid if long else config.grid)(rows, case.S, heads)
    assert (call["grid_x"], call["grid_y"], call["grid_z"]) == (programs_s * programs_kv, programs_r, 1)
    assert (call["block_x"], call["block_y"], call["block_z"]) == (32 * config.num_warps, 1, 1)
    ptx = call["kernel_data"]
    entry, parameters = re.findall(r"\.entry (\w+)\((.*?)\)", ptx, re.DOTALL)[0]
    assert entry == call["name"] and parameters.count(".param") == operands + results
    assert all(text in ptx for text in (".target sm_", "prmt.b32", "mul.rn.ftz.f32")) and "fma.rn.f32" not in ptx


def test_xla_still_has_the_kernel_call(lowered):
    """On a CPU only what JAX writes; that XLA reads it is for test_conformance.py on a CUDA device."""
    try:
        ((target, call, operands, results),) = lowered(BASE)
    except Exception as error:
        raise AssertionError(BROKEN + repr(error)) from error
    assert target == "__gpu$xla.gpu.ptx" and operands == 4 and results >= 1, BROKEN + target
    sizes = {f"{what}_{axis}" for what in ("grid", "block") for axis in "xyz"} | {"shared_mem_bytes"}
    assert {key for key, value in call.items() if isinstance(value, int)} == sizes, BROKEN + str(sorted(call))
    assert call.keys() - sizes == {"name", "kernel_type", "kernel_data"}, BROKEN + str(sorted(call))
    assert call["kernel_type"] == "ptx", BROKEN + call["kernel_type"]


def test_none_falls_back_on_cuda(lowered):
    ((target, call, _, _),) = lowered(BASE, None, True)
    assert target == triton_call.TARGET and call["name"] == "scores_kernel"


# --- the choice of an implementation --------------------------------------------------------------------------


def primitives(case=BASE):
    return str(jax.make_jaxpr(lambda *a: scores(*a, implementation=None))(*shapes(case)))


@pytest.mark.parametrize("hopper", [False, True])
def test_none_is_gluon_on_hoppers(monkeypatch, fresh_traces, hopper):
    monkeypatch.setattr(device, "all_hopper", lambda: hopper)
    monkeypatch.setattr(ops, "gluon_is_tested", lambda: True)
    many = replace(BASE, S=ops.FEW_KEYS)
    assert ("implementation=gluon" in primitives(many)) == hopper
    assert PRIMITIVE not in primitives()
    monkeypatch.setattr(ops, "pallas_scores", None)
    jax.clear_caches()
    assert ("implementation=gluon" in primitives()) == hopper and PRIMITIVE in primitives()


def test_none_without_pallas(monkeypatch, fresh_traces):
    assert PRIMITIVE not in primitives()
    jax.clear_caches()
    monkeypatch.setattr(ops, "pallas_scores", None)
    assert PRIMITIVE in primitives()
    given = inputs(BASE)
    with jax.default_device(jax.devices("cpu")[0]):
        out = tqjax.fused_qk_scores(*map(jnp.asarray, given.arrays), given.scale, **given.heads)
    np.testing.assert_array_equal(np.asarray(out).view(np.int32), oracle(given).view(np.int32))
    jax.clear_caches()
    monkeypatch.setattr(triton_call, "INSTALLED", False)
    assert PRIMITIVE not in primitives()
    with pytest.raises(NotImplementedError, match="'triton' needs CUDA, an installed Triton .*'xla' has no such need"):
        scores(*(jnp.ones(x.shape, x.dtype) for x in shapes(BASE)))


@pytest.mark.parametrize("disable_jit", [False, True])
def test_cpu_is_refused(disable_jit):
    message = "^'triton' needs CUDA, got a program for cpu; 'xla' has no such need."
    with jax.default_device(jax.devices("cpu")[0]), jax.disable_jit(disable_jit):
        arrays = [jnp.ones(x.shape, x.dtype) for x in shapes(BASE)]
        with pytest.raises(NotImplementedError, match=message):
            scores(*arrays)


def test_wide_heads_are_refused():
    with pytest.raises(NotImplementedError, match="'triton' needs .*head_dim up to 256, got head_dim=512.*"):
        jax.eval_shape(scores, *shapes(Case(D=512)))


def test_interpreted_kernels_are_refused():
    with pytest.raises(NotImplementedError, match="'triton' needs a process without TRITON_INTERPRET=1"):
        triton_call._compile(lambda: None, (), (), 90, ())


@pytest.mark.parametrize(("scratch", "shared"), [(1, 0), (0, 227 * 1024 + 1)])
def test_what_a_launch_cannot_give_is_refused(scratch, shared):
    needs = SimpleNamespace(name="k", global_scratch_size=scratch, profile_scratch_size=None, shared=shared)
    with pytest.raises(NotImplementedError, match=f"no scratch memory .* got {scratch} and {shared} bytes of k"):
        triton_call._check_memory(needs, 90)
    triton_call._check_memory(SimpleNamespace(**{**vars(needs), "global_scratch_size": 0, "shared": 227 * 1024}), 90)


# --- transforms -----------------------------------------------------------------------------------------------

AXES = {
    "queries": ((4, None, None, None), (2, 8, 7 * 3, 64), (2, 2, 65, 32)),
    "all": ((0, 0, 0, None), (7 * 2, 8, 3, 64), (7 * 2, 2, 65, 32)),
    "codes": ((None, 2, None, None), (7 * 2, 8, 3, 64), (7 * 2, 2, 65, 32)),
    "norms": ((None, None, 3, None), (7 * 2, 8, 3, 64), (7 * 2, 2, 65, 32)),
    "table": ((None, None, None, 0), (2, 8, 3, 64), (2, 2, 65, 32)),
    "queries and table": ((1, None, None, 1), (2, 8, 3, 64), (2, 2, 65, 32)),
}


def with_axis(x, axis, size=7):
    shape = x.shape if axis is None else (*x.shape[:axis], size, *x.shape[axis:])
    return jax.ShapeDtypeStruct(shape, x.dtype)


@pytest.mark.parametrize("name", AXES)
def test_vmap_folds(name):
    axes, q_shape, codes_shape = AXES[name]
    arguments = [with_axis(x, axis) for x, axis in zip(shapes(Case(T=3)), axes, strict=True)]
    function = jax.vmap(scores, in_axes=axes)
    assert jax.eval_shape(function, *arguments).shape == (7, 2, 8, 3, 65)
    (equation,) = equations(jax.make_jaxpr(function)(*arguments).jaxpr, PRIMITIVE)
    assert [x.aval.shape for x in equation.invars[:2]] == [q_shape, codes_shape]


def test_vmap_of_queries_copies_no_keys():
    arguments = [with_axis(x, axis) for x, axis in zip(shapes(BASE), (0, None, None, None), strict=True)]
    jaxpr = jax.make_jaxpr(jax.vmap(scores, in_axes=(0, None, None, None)))(*arguments).jaxpr
    (implement,) = equations(jaxpr, "jit", lambda equation: equation.params["name"] == "_implement")
    inner = implement.params["jaxpr"].jaxpr
    (split,) = equations(inner, "tq_split")
    (call,) = equations(inner, PRIMITIVE)
    for i in (1, 2):
        assert split.invars[i] in inner.invars and call.invars[i] in split.params["jaxpr"].jaxpr.invars


def test_gradients_trace():
    gradients = jax.grad(lambda *a: scores(*a).sum(), argnums=(0, 2, 3))
    out = jax.eval_shape(gradients, *shapes(BASE))
    assert [x.shape for x in out] == [x.shape for i, x in enumerate(shapes(BASE)) if i != 1]


def equations(jaxpr, primitive, condition=lambda equation: True):
    """Those of a jaxpr and of all within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive and condition(equation):
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, primitive, condition)


@pytest.mark.gpu
@pytest.mark.parametrize("name", AXES)
def test_vmap_bits(name):
    axes, _, _ = AXES[name]
    given = [inputs(Case(T=3, scale=0.125, values=values)) for values in ("normal", "zero rows", "limits")]
    arguments = [
        np.stack([x.arrays[i] for x in given], axis) if axis is not None else given[0].arrays[i]
        for i, axis in enumerate(axes)
    ]
    function = jax.vmap(scores, in_axes=axes)
    expected = jax.vmap(lambda *a: scores(*a, implementation="xla"), in_axes=axes)
    got, expected = (np.asarray(jax.jit(f)(*arguments)).view(np.int32) for f in (function, expected))
    np.testing.assert_array_equal(got, expected)
