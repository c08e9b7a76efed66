"""Attention as each framework's users call it: errors, transforms, compilation, gradients."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from attention_cases import CAUSAL, EVERYTHING, PLAIN, attention_inputs, attention_oracle
from backends import (
    PACKAGES,
    assert_close,
    assert_close_attention,
    attention_arguments,
    cpu_array,
    to_array,
    to_numpy,
)

import tq_torch
import tqcore
import tqjax
from tqcore.quantizer import PackedVectors, Quantizer

by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
EVERY_PART = replace(EVERYTHING, centers=("varying", "head"), qjl=(True, False))

# --- errors ---------------------------------------------------------------------------------------------------

QUERY = np.ones((2, 4, 3, 64), np.float32)
KEYS = tqcore.compress(np.ones((2, 2, 5, 64), np.float32), Quantizer(64))
POOL = tqcore.compress(np.ones((7, 2, 16, 64), np.float32), Quantizer(64))
TABLE, LENGTHS = np.zeros((2, 3), np.int32), np.array([5, 0], np.int32)
OUT, LSE = QUERY, QUERY[..., 0]
GOOD = {"query": QUERY, "keys": KEYS, "values": KEYS}
PAGED = {"keys": POOL, "values": POOL, "page_table": TABLE}
WINDOW = "`local_window_size` must be None, an integer of at least 0 or a pair (left, right) of them, got "
NARROW = tqcore.compress(np.ones((2, 2, 5, 32), np.float32), Quantizer(32))
BAD = {
    "query dtype": ({"query": QUERY.astype(np.int32)}, "`query` must be an array [B, H, T, D] of float32, bfloat16 or float16, got shape [2, 4, 3, 64], dtype int32."),
    "keys type": ({"keys": QUERY}, "`keys` must be PackedVectors, got an object of type "),
    "values type": ({"values": QUERY}, "`values` must be PackedVectors, got an object of type "),
    "values norms": ({"values": replace(KEYS, norms=KEYS.norms[:1])}, "`values.norms` must have the shape of `values.codes` without its last axis, got [1, 2, 5] and [2, 2, 5, 32]."),
    "keys rank": ({"keys": KEYS.map(lambda x: x[0])}, "`keys.codes` must be an array [B, K, S, P] of uint8, got shape [2, 5, 32], dtype uint8."),
    "values S": ({"values": KEYS.map(lambda x: x[:, :, :4])}, "`keys` and `values` must have one shape, got [2, 2, 5, 64] and [2, 2, 4, 64]."),
    "values D": ({"values": NARROW}, "`keys` and `values` must have one shape, got [2, 2, 5, 64] and [2, 2, 5, 32]."),
    "values heads": ({"values": KEYS.map(lambda x: x[:, :1])}, "`keys` and `values` must have one shape, got [2, 2, 5, 64] and [2, 1, 5, 64]."),
    "query D": ({"query": QUERY[..., :32]}, "the last axis of `query` must be the keys' head_dim, got shape [2, 4, 3, 32], head_dim=64."),
    "heads": ({"query": QUERY[:, :3]}, "the heads of `query` must be a multiple of those of `keys`, got 3 and 2 heads."),
    "batch": ({"query": QUERY[:1]}, "`query` and `keys` must have one batch size, got 1 and 2."),
    "lengths dtype": ({"kv_lengths": LENGTHS.astype(np.uint8)}, "`kv_lengths` must be an array [B] of int32, got shape [2], dtype uint8."),
    "lengths batch": ({"kv_lengths": LENGTHS[:1]}, "the first axis of `kv_lengths` must be the batch size of `query`, got shape [1], 2."),
    "lengths beyond S": ({"kv_lengths": LENGTHS + 1}, "`kv_lengths` must be 0 to 5, the positions there are, got [6, 1]."),
    "lengths below 0": ({"kv_lengths": LENGTHS - 1}, "`kv_lengths` must be 0 to 5, the positions there are, got [4, -1]."),
    "lengths beyond the pages": (PAGED | {"kv_lengths": LENGTHS + 44}, "`kv_lengths` must be 0 to 48, the positions there are, got [49, 44]."),
    "pages dtype": (PAGED | {"page_table": TABLE.astype(np.uint8)}, "`page_table` must be an array [B, M] of int32, got shape [2, 3], dtype uint8."),
    "pages rank": (PAGED | {"page_table": TABLE[0]}, "`page_table` must be an array [B, M] of int32, got shape [3], dtype int32."),
    "pages batch": (PAGED | {"page_table": TABLE[:1]}, "the first axis of `page_table` must be the batch size of `query`, got shape [1, 3], 2."),
    "page number": (PAGED | {"page_table": TABLE + 7}, "the entries of `page_table` must be 0 to 6, pages of the pool, got 7."),
    "page number below 0": (PAGED | {"page_table": TABLE - 1, "kv_lengths": LENGTHS}, "the entries of `page_table` must be 0 to 6, pages of the pool, got -1."),
    "no pages": (PAGED | {x: POOL.map(lambda x: x[:0]) for x in ("keys", "values")}, "`keys` must hold at least one page and position, got shape [0, 2, 16, 64]."),
    "pool rank": (PAGED | {"keys": POOL.map(lambda x: x[0])}, "`keys.codes` must be an array [N, K, page, P] of uint8, got shape [2, 16, 32], dtype uint8."),
    "sinks dtype": ({"sinks": np.ones(4, np.float16)}, "`sinks` must be an array [H] of float32, got shape [4], dtype float16."),
    "sinks heads": ({"sinks": np.ones(2, np.float32)}, "the first axis of `sinks` must be the heads of `query`, got shape [2], 4."),
    "causal": ({"is_causal": 1}, "`is_causal` must be True or False, got 1."),
    "window of one": ({"local_window_size": (3,)}, WINDOW + "(3,)."),
    "window below 0": ({"local_window_size": (3, -1)}, WINDOW + "(3, -1)."),
    "window float": ({"local_window_size": 2.5}, WINDOW + "2.5."),
    "cap": ({"logits_soft_cap": 0.0}, "`logits_soft_cap` must be None or a positive number within float32, got 0.0."),
    "cap NaN": ({"logits_soft_cap": float("nan")}, "`logits_soft_cap` must be None or a positive number within float32, got nan."),
    "scale": ({"scale": float("inf")}, "`scale` must be a finite number within float32, got inf."),
    "splits": ({"num_splits": 0}, "`num_splits` must be None or an integer of at least 1, got 0."),
    "lse": ({"return_lse": None}, "`return_lse` must be True or False, got None."),
    "implementation": ({"implementation": "cuda"}, "`implementation` must be None or one of '"),
}  # fmt: skip
BAD_MERGES = {
    "shapes": ((OUT, LSE, OUT[:1], LSE[:1]), "`out_a` and `out_b` must have one shape and dtype, got [2, 4, 3, 64] float32 and [1, 4, 3, 64] float32."),
    "dtypes": ((OUT, LSE, OUT.astype(np.float16), LSE), "`out_a` and `out_b` must have one shape and dtype, got [2, 4, 3, 64] float32 and [2, 4, 3, 64] float16."),
    "lse dtype": ((OUT, LSE, OUT, LSE.astype(np.float16)), "`lse_b` must be an array [...] of float32, got shape [2, 4, 3], dtype float16."),
    "lse shape": ((OUT, LSE[..., None], OUT, LSE), "`lse_a` must have the shape of `out_a` without its last axis, got [2, 4, 3, 1] and [2, 4, 3, 64]."),
    "out dtype": ((OUT.astype(np.int32), LSE, OUT, LSE), "`out_a` must be an array [..., D] of float32, bfloat16 or float16, got shape [2, 4, 3, 64], dtype int32."),
    "no axis": ((OUT[0, 0, 0, 0], LSE[0, 0, 0], OUT[0, 0, 0, 0], LSE[0, 0, 0]), "`out_a` must be an array [..., D] of float32, bfloat16 or float16, got shape [], dtype float32."),
}  # fmt: skip


def own(package, x, convert=to_array):
    if isinstance(x, PackedVectors):
        return x.map(partial(convert, package))
    return convert(package, x) if isinstance(x, np.ndarray) else x


@by_name
@pytest.mark.parametrize("name", BAD)
def test_bad_attention(package, name):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        package.attention(**{key: own(package, value, cpu_array) for key, value in (GOOD | changed).items()})


@by_name
@pytest.mark.parametrize("name", BAD_MERGES)
def test_bad_merges(package, name):
    arrays, message = BAD_MERGES[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        package.merge_attention(*(to_array(package, np.asarray(x)) for x in arrays))


def test_different_devices():
    query, keys, sinks = (own(tq_torch, x) for x in (QUERY, KEYS, np.ones(4, np.float32)))
    with pytest.raises(ValueError, match="must be on one device, got query on (cpu|cuda:0), .*sinks on meta"):
        tq_torch.attention(query, keys, keys, sinks=sinks.to("meta"))
    first, second = jax.devices()[0], jax.devices("cpu")[-1]
    keys = KEYS.map(lambda x: jax.device_put(x, first))
    with pytest.raises(ValueError, match="must be on one device, got query on .*, values.codes on "):
        tqjax.attention(jax.device_put(QUERY, first), keys, KEYS.map(lambda x: jax.device_put(x, second)))


UNSEEN_VALUES = {
    "length": {"kv_lengths": np.array([70, 71, 1], np.int32)},
    "negative length": {"kv_lengths": np.array([70, -1, 1], np.int32)},
    "page": {"page_table": np.array([[0], [5], [1]], np.int32)},
    "negative page": {"page_table": np.array([[0], [-1], [1]], np.int32)},
}


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", UNSEEN_VALUES)
def test_values_that_cannot_be_seen_make_their_sequence_nan(framework, name):
    """Lengths and page numbers out of range under `jit` and `torch.compile`."""
    inputs = attention_inputs(replace(PLAIN, lengths="full"))
    package = {"jax": tqjax, "torch": tq_torch}[framework]
    query, keys, values, _ = attention_arguments(package, inputs)
    arrays = {key: to_array(package, x) for key, x in UNSEEN_VALUES[name].items()}
    compiled = {"jax": jax.jit, "torch": partial(torch.compile, fullgraph=True, backend="aot_eager")}[framework]
    function = partial(package.attention, return_lse=True)
    out, lse = (to_numpy(x) for x in compiled(function)(query, keys, values, **arrays))
    for x in (out, lse[..., None]):
        assert np.isnan(x[1]).all() and np.isfinite(x[[0, 2]]).all()
    query, keys, values = (own(package, x, cpu_array) for x in (inputs.query, inputs.keys, inputs.values))
    with pytest.raises(ValueError, match="`kv_lengths` must be 0 to 70|entries of `page_table` must be 0 to 2"):
        function(query, keys, values, **{key: cpu_array(package, x) for key, x in UNSEEN_VALUES[name].items()})


# --- gradients ------------------------------------------------------------------------------------------------


def dense_gradient(case, weights, lse_weights):
    """By the query, of Σ weights · out + Σ lse_weights · lse, in float64 from decompressed vectors; no pages."""
    inputs = attention_inputs(case)
    query = torch.tensor(inputs.query.astype(np.float64), requires_grad=True)
    keys, values = (torch.tensor(tqcore.decompress(x)).double() for x in (inputs.keys, inputs.values))
    keys, values = (x.nan_to_num().repeat_interleave(case.G, 1) for x in (keys, values))
    x = query @ keys.mT / case.D**0.5
    x = case.cap * torch.tanh(x / case.cap)
    lengths = torch.tensor(inputs.arrays["kv_lengths"])[:, None, None, None]
    distance = torch.arange(case.S) - (lengths - case.T + torch.arange(case.T)[:, None])
    x = torch.where((distance <= 0) & (distance >= -case.window[0]), x, -torch.inf)
    x = torch.cat([x, torch.tensor(inputs.arrays["sinks"])[:, None, None].expand(*x.shape[:3], 1)], -1)
    out = x.softmax(-1)[..., :-1] @ values
    ((out * weights).sum() + (x.logsumexp(-1) * lse_weights).sum()).backward()
    return query.grad.numpy()


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("case", [EVERYTHING, EVERY_PART], ids=str)
def test_gradients_are_those_of_dense_attention(framework, case):
    inputs, rng = attention_inputs(case), np.random.default_rng(42)
    weights = rng.standard_normal(inputs.query.shape).astype(np.float32)
    lse_weights = rng.standard_normal(inputs.query.shape[:3]).astype(np.float32)
    package = {"jax": tqjax, "torch": tq_torch}[framework]
    query, keys, values, arrays = attention_arguments(package, inputs)
    function = partial(package.attention, **arrays, **inputs.static, return_lse=True)
    if framework == "jax":

        def loss(query):
            out, lse = function(query, keys, values)
            return jnp.sum(out * weights) + jnp.sum(lse * lse_weights)

        gradient = jax.jit(jax.grad(loss))(query)
        half = query.astype(jnp.bfloat16)
        assert jax.eval_shape(jax.grad(lambda query: loss(query).astype(jnp.float32)), half).dtype == jnp.bfloat16
    else:
        query.requires_grad_()
        out, lse = function(query, keys, values)
        ((out * to_array(tq_torch, weights)).sum() + (lse * to_array(tq_torch, lse_weights)).sum()).backward()
        gradient = query.grad
    expected = dense_gradient(replace(case, page=None, splits=None), torch.tensor(weights), torch.tensor(lse_weights))
    assert_close(to_numpy(gradient), expected, 1e-3)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_gradients_are_finite_where_nothing_is_seen(framework):
    inputs = attention_inputs(replace(CAUSAL, lengths="zero"))
    package = {"jax": tqjax, "torch": tq_torch}[framework]
    query, keys, values, arrays = attention_arguments(package, inputs)
    if framework == "jax":
        gradient = jax.grad(lambda query: package.attention(query, keys, values, **arrays).sum())(query)
    else:
        package.attention(query.requires_grad_(), keys, values, **arrays).sum().backward()
        gradient = query.grad
    gradient = to_numpy(gradient)
    assert np.isfinite(gradient).all() and not gradient[[0, 2]].any() and gradient[1].any()


# --- JAX ------------------------------------------------------------------------------------------------------


def test_jax_compiles_once_as_the_cache_fills():
    inputs = attention_inputs(replace(PLAIN, page=16, sinks=True))
    query, keys, values, arrays = attention_arguments(tqjax, inputs)
    table = np.arange(3 * arrays["page_table"].shape[1], dtype=np.int32).reshape(3, -1)
    traces = []

    @jax.jit
    def step(query, keys, values, lengths, table, sinks):
        traces.append(1)
        return tqjax.attention(query, keys, values, kv_lengths=lengths, page_table=table, sinks=sinks)

    before = tqjax.attention_ops._attention._cache_size()
    for length in range(0, 70, 7):
        lengths = np.array([length, 70 - length, 1], np.int32)
        step(query, keys, values, lengths, table[::-1], arrays["sinks"] + length)
        tqjax.attention(query, keys, values, kv_lengths=lengths, page_table=table, sinks=arrays["sinks"])
    assert len(traces) == 1
    assert tqjax.attention_ops._attention._cache_size() - before <= 1


def test_jax_vmap():
    inputs = attention_inputs(replace(EVERY_PART, page=None))
    query, keys, values, arrays = attention_arguments(tqjax, inputs)
    function = partial(tqjax.attention, **inputs.static, sinks=arrays["sinks"], return_lse=True)

    def one(query, keys, values, lengths):
        packed = (jax.tree.map(lambda x: x[None], x) for x in (keys, values))
        return jax.tree.map(lambda x: x[0], function(query[None], *packed, kv_lengths=lengths[None]))

    shared = values.center
    values = replace(values, center=jnp.broadcast_to(shared, (3, *shared.shape)))
    got = jax.vmap(one)(query, keys, values, arrays["kv_lengths"])
    assert_close_attention(tuple(map(np.asarray, got)), attention_oracle(inputs), "float32")


# --- torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "case"),
    [("aot_eager", EVERYTHING), ("aot_eager", EVERY_PART), ("inductor", replace(EVERYTHING, splits=None))],
    ids=str,
)
def test_torch_compile(backend, case):
    inputs = attention_inputs(case)
    query, keys, values, arrays = attention_arguments(tq_torch, inputs)
    function = partial(tq_torch.attention, **inputs.static, return_lse=True)
    got = torch.compile(function, fullgraph=True, backend=backend)(query, keys, values, **arrays)
    assert_close_attention(tuple(map(to_numpy, got)), attention_oracle(inputs), "float32")


def test_torch_compiles_once_as_the_cache_grows():
    """Sizes as symbols: `dynamic=True`, or what torch turns to when a size changes."""
    compiled = torch.compile(tq_torch.attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (70, 90, 133):
        inputs = attention_inputs(replace(PLAIN, S=size, centers=("varying", "static")))
        query, keys, values, arrays = attention_arguments(tq_torch, inputs)
        with torch.compiler.set_stance("default" if size == 70 else "fail_on_recompile"):
            got = compiled(query, keys, values, **arrays, return_lse=True)
        assert_close_attention(tuple(map(to_numpy, got)), attention_oracle(inputs), "float32")


class Attention(torch.nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.quantizers, self.static = (inputs.keys.quantizer, inputs.values.quantizer), inputs.static

    def forward(self, query, codes, norms, value_codes, value_norms, arrays):
        keys = PackedVectors(codes, norms, self.quantizers[0])
        values = PackedVectors(value_codes, value_norms, self.quantizers[1])
        return tq_torch.attention(query, keys, values, **arrays, **self.static, return_lse=True)


def test_torch_export():
    inputs = attention_inputs(EVERYTHING)
    query, keys, values, arrays = attention_arguments(tq_torch, inputs)
    arguments = query, keys.codes, keys.norms, values.codes, values.norms, arrays
    program = torch.export.export(Attention(inputs), arguments)
    got = program.module()(*arguments)
    assert_close_attention(tuple(map(to_numpy, got)), attention_oracle(inputs), "float32")


def test_torch_opcheck_of_dequantize():
    _, keys, _, _ = attention_arguments(tq_torch, attention_inputs(replace(PLAIN, lengths="full")))
    torch.library.opcheck(torch.ops.tq_torch.dequantize.default, (keys.codes, keys.norms, 64, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [EVERY_PART, EVERYTHING], ids=str)  # eager, and the best kernel
def test_torch_cuda_graph(case):
    """Which also shows that nothing waits for the device; lengths and pages change between replays."""
    inputs = attention_inputs(case)
    query, keys, values, arrays = attention_arguments(tq_torch, inputs)
    lengths = arrays["kv_lengths"].clone()
    function = partial(tq_torch.attention, query, keys, values, **arrays, **inputs.static, return_lse=True)
    function()
    graph = torch.cuda.CUDAGraph()
    arrays["kv_lengths"].zero_()
    with torch.cuda.graph(graph):
        got = function()
    arrays["kv_lengths"].copy_(lengths)
    graph.replay()
    assert_close_attention(tuple(map(to_numpy, got)), attention_oracle(inputs), "float32")


def test_parts_of_two_frameworks_merge():
    """The same keys twice, once from each: the same output, twice the sum."""
    inputs = attention_inputs(replace(PLAIN, lengths="full"))
    ours, theirs = (
        package.attention(*attention_arguments(package, inputs)[:3], return_lse=True) for package in (tqjax, tq_torch)
    )
    out, lse = tq_torch.merge_attention(*map(torch.from_dlpack, ours), *theirs)
    expected, expected_lse = attention_oracle(inputs)
    assert_close_attention((to_numpy(out), to_numpy(lse)), (expected, expected_lse + np.log(np.float32(2))), "float32")
