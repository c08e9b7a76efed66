"""Sequences and key heads over the devices of a mesh: outputs of one device, and no cache brought together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import CUDA, assert_same_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from several import COLLECTIVES

import tqjax
from tqcore import fixed_point
from tqcore.quantizer import Quantizer
from tqjax import partition, triton_call

B, K, G, S, T, D = 2, 4, 2, 40, 3, 32
MESHES = {"heads": ((2,), ("k",)), "sequences": ((2,), ("b",))}
PLACES = {"heads": P(None, "k"), "sequences": P("b")}
IMPLEMENTATIONS = ["xla", "pallas_triton", *(["triton", "gluon"] if CUDA else []), None]
LIMIT = 2e-3

pytestmark = pytest.mark.two_devices


def mesh_of(name):
    shape, axes = MESHES[name]
    kinds = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(shape, axes, axis_types=kinds, devices=jax.devices()[: np.prod(shape)])


def vectors(rng, quantizer, *shape):
    return tqjax.compress(jnp.asarray(rng.standard_normal((*shape, D)), jnp.float32), quantizer)


def scores(implementation):
    """fused_qk_scores, its arrays, and on which of them the mesh's axis lies."""
    rng, quantizer = np.random.default_rng(1), Quantizer(D)
    packed, q = vectors(rng, quantizer, B, K, S), jnp.asarray(rng.standard_normal((B, K * G, T, D)), jnp.float32)

    def function(q, codes, norms):
        return tqjax.fused_qk_scores(
            q, codes, norms, quantizer.codebook.centroids, D**-0.5,
            n_q_heads=q.shape[1], n_kv_heads=codes.shape[1], implementation=implementation,
        )  # fmt: skip

    return function, (q, packed.codes, packed.norms)


def attention(implementation, *, centered=False):
    rng = np.random.default_rng(2)
    keys, values = vectors(rng, Quantizer(D), B, K, S), vectors(rng, Quantizer(D, 3, seed=1), B, K, S)
    if centered:
        keys = dataclasses.replace(keys, center=jnp.asarray(rng.standard_normal((B, K, 1, D)), jnp.float32))
    query = jnp.asarray(rng.standard_normal((B, K * G, T, D)), jnp.float32)
    lengths = jnp.asarray([S, 17], jnp.int32)

    def function(query, keys, values, lengths):
        options = {"is_causal": True, "implementation": implementation}
        return tqjax.attention(query, keys, values, kv_lengths=lengths, **options)

    return function, (query, keys, values, lengths)


def append(implementation):
    rng = np.random.default_rng(3)
    packed, starts = vectors(rng, Quantizer(D), B, K, S), jnp.asarray([5, S - 1], jnp.int32)
    x = jnp.asarray(rng.standard_normal((B, K, T, D)), jnp.float32)

    def function(packed, x, starts):
        packed = tqjax.append(packed, x, starts, implementation=implementation)
        return packed.codes, packed.norms

    return function, (packed, x, starts)


def compress(implementation):
    x = jnp.asarray(np.random.default_rng(4).standard_normal((B, K, S, D)), jnp.bfloat16)

    def function(x):
        packed = tqjax.compress(x, Quantizer(D), implementation=implementation)
        restored = tqjax.decompress(packed, implementation=implementation)
        return packed.codes, packed.norms, restored

    return function, (x,)


def specs(arrays, name):
    """Each array's: those of one axis or more have sequences first, and heads next if there are any."""
    return jax.tree.map(lambda x: P(*PLACES[name][: x.ndim]) if len(PLACES[name]) <= x.ndim else P(), arrays)


def run(function, arrays, name, *, by_shard_map, check_vma=True):
    """Outputs, and the program that made them."""
    mesh, of = mesh_of(name), specs(arrays, name)
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), arrays, of)
    if by_shard_map:
        outs = specs(jax.eval_shape(function, *arrays), name)
        function = jax.shard_map(function, mesh=mesh, in_specs=of, out_specs=outs, check_vma=check_vma)
    compiled = jax.jit(function).lower(*placed).compile()
    return compiled(*placed), compiled


def collectives(compiled):
    return [line.strip()[:200] for line in compiled.as_text().splitlines() if any(c in line for c in COLLECTIVES)]


def agree(got, expected, exact):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        if exact:
            assert_same_bits(one, other)
        else:
            np.testing.assert_allclose(one, other, atol=LIMIT * np.abs(other).max())


CASES = {"scores": (scores, True), "attention": (attention, False), "append": (append, True)}
CASES |= {"compress": (compress, False), "centered": (functools.partial(attention, centered=True), False)}
PAIRS = [
    (name, case) for name in IMPLEMENTATIONS for case in CASES if name != "gluon" or case not in ("append", "compress")
]


@pytest.mark.parametrize("by_shard_map", [False, True], ids=["automatic", "shard_map"])
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize(("implementation", "case"), PAIRS, ids=str)
def test_each_device_does_its_part(implementation, case, name, by_shard_map):
    make, exact = CASES[case]
    if implementation is not None and not CUDA and by_shard_map and name == "sequences":
        return  # as of the heads, whose interpretation is slow enough
    function, arrays = make(implementation)
    expected = jax.jit(function)(*arrays)
    got, compiled = run(function, arrays, name, by_shard_map=by_shard_map)
    agree(got, expected, exact)
    assert not collectives(compiled)
    for out in jax.tree.leaves(got):
        assert len(out.sharding.device_set) == 2 and not out.sharding.is_fully_replicated


def test_pages_are_read_by_every_sequence():
    """A pool has no sequences: heads alone are split, and batches of queries where all devices hold the pool."""
    rng, quantizer = np.random.default_rng(5), Quantizer(D)
    keys, values = vectors(rng, quantizer, 8, K, 8), vectors(rng, quantizer, 8, K, 8)
    table = jnp.asarray(rng.permutation(8).reshape(B, 4), jnp.int32)
    query = jnp.asarray(rng.standard_normal((B, K * G, 1, D)), jnp.float32)
    lengths = jnp.asarray([32, 9], jnp.int32)

    def function(query, keys, values, lengths, table):
        return tqjax.attention(query, keys, values, kv_lengths=lengths, page_table=table)

    expected = jax.jit(function)(query, keys, values, lengths, table)
    for name in MESHES:
        mesh, pool = mesh_of(name), P(None, "k") if name == "heads" else P()
        of = (
            PLACES[name],
            jax.tree.map(lambda x, pool=pool: pool, keys),
            jax.tree.map(lambda x, pool=pool: pool, values),
        )
        of += (P(), P()) if name == "heads" else (P("b"), P("b"))
        arrays = query, keys, values, lengths, table
        placed = jax.tree.map(lambda x, spec, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec)), arrays, of)
        compiled = jax.jit(function).lower(*placed).compile()
        agree(compiled(*placed), expected, exact=False)
        assert not collectives(compiled)


def test_one_key_head_serves_all_devices():
    """Query heads are split, and the key head that they share lies on each device."""
    rng, quantizer = np.random.default_rng(6), Quantizer(D)
    packed, q = vectors(rng, quantizer, B, 1, S), jnp.asarray(rng.standard_normal((B, 2, T, D)), jnp.float32)
    function = functools.partial(tqjax.attention_scores)
    expected = jax.jit(function)(q, packed)
    mesh = mesh_of("heads")
    placed = jax.device_put(q, NamedSharding(mesh, P(None, "k"))), jax.device_put(packed, NamedSharding(mesh, P()))
    compiled = jax.jit(function).lower(*placed).compile()
    got = compiled(*placed)
    agree(got, expected, exact=True)
    assert got.sharding.spec == P(None, "k") and not collectives(compiled)


def test_vmap_and_gradient():
    mesh = mesh_of("heads")
    function, (query, keys, values, lengths) = attention("xla" if not CUDA else None)
    many = jnp.stack([query, 2 * query])
    mapped = jax.vmap(function, (0, None, None, None))
    expected = jax.jit(mapped)(many, keys, values, lengths)
    place = functools.partial(NamedSharding, mesh)
    placed = jax.device_put((keys, values), place(P(None, "k")))
    got = jax.jit(mapped)(jax.device_put(many, place(P(None, None, "k"))), *placed, lengths)
    agree(got, expected, exact=False)
    gradient = jax.grad(lambda query, *rest: (function(query, *rest) ** 2).sum())
    expected = jax.jit(gradient)(query, keys, values, lengths)
    agree(jax.jit(gradient)(jax.device_put(query, place(P(None, "k"))), *placed, lengths), expected, exact=False)


def test_a_kernel_alone_is_gathered():
    """What `partition` is for: the same function, unsplit, brings keys together on each device."""
    words = fixed_point.score_words(Quantizer(D).codebook.centroids, D**-0.5)
    function, arrays = scores("xla")
    opaque = functools.partial(jax.pure_callback, lambda q, *_: np.zeros((*q.shape[:3], S), np.float32))

    def alone(q, codes, norms):
        out = jax.ShapeDtypeStruct((B, K * G, T, S), jnp.float32)
        return opaque(out, q, codes, norms) if not CUDA else triton_call.fused_qk_scores(q, codes, norms, words)

    _, compiled = run(alone, arrays, "heads", by_shard_map=False)
    assert any("all-gather" in line for line in collectives(compiled))
    _, compiled = run(function, arrays, "heads", by_shard_map=False)
    assert not collectives(compiled)


def test_names_of_axes():
    assert partition.axes_of((2, 1, 1, 8), "bkSD", {"b": 2, "k": 4}) == "bKSD"
    assert partition.axes_of((4, 1, 8), "bkSD", {"b": 2, "k": 4}) == "kSD"
    rule = partition._rule(("bhTD", "bkSP", "W"), ("bhTS",), {"b": 2, "h": 8, "k": 4})
    assert rule["sharding_rule"] == "b (k g) whole1 whole2, b k whole3 whole4, whole5 -> b (k g) whole6 whole7"
    assert rule["g"] == 2 and rule["need_replication_factors"] == ("g", *(f"whole{i}" for i in range(1, 8)))
    rule = partition._rule(("bhTD", "bkSP"), ("bhtS",), {"b": 2, "h": 4, "k": 4})
    assert rule["sharding_rule"] == "b k whole0 whole1, b k whole2 whole3 -> b k t whole4" and "g" not in rule
