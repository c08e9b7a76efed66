"""Caches: against an oracle that keeps everything, in place, in files, and what they refuse."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from backends import (
    DEVICE,
    PACKAGES,
    assert_close,
    assert_same_bits,
    attention_tolerance,
    to_array,
    to_numpy,
    tolerance,
)
from cache_oracle import OracleCache

import tq_torch
import tqcore
import tqjax
from tqjax import triton_call

B, K, G, D, CAPACITY = 3, 2, 2, 32, 72
KEYS, VALUES = tqcore.Quantizer(D, 4), tqcore.Quantizer(D, 3, seed=1)
OPTIONS = {
    "packed": {},
    "window": {"window": 8},
    "first": {"first": 3},
    "blocks": {"window": 6, "block": 4, "first": 3},
    "centered": {"window": 5, "center": True},
    "dense": {"window": CAPACITY},
    "pages": {"page_size": 16},
    "pages-window": {"page_size": 16, "window": 5, "first": 2},
}
LIMIT = attention_tolerance("float32", D)


def random(rng, heads, steps, batch=B, dtype=np.float32):
    return rng.standard_normal((batch, heads, steps, D)).astype(dtype)


def zeros(package, batch=B, **options):
    device = DEVICE if package is tq_torch else None
    return package.KVCache.zeros(batch, K, CAPACITY, KEYS, VALUES, device=device, **options)


def given(package, *arrays):
    return [to_array(package, x) for x in arrays]


def check(package, cache, oracle, rng, steps):
    query = random(rng, K * G, steps, cache.batch)
    assert_close(to_numpy(cache.attend(*given(package, query))), oracle.attend(query), LIMIT)
    assert_same_bits(to_numpy(cache.lengths), oracle.lengths)


def random_walk(package, options, count, seed, verify=check):
    """Appends, crops, reorders, batch changes; attention compared after each."""
    rng, paged = np.random.default_rng(seed), "page_size" in options
    cache, oracle = zeros(package, **options), OracleCache(B, K, KEYS, VALUES, **options)
    for _ in range(count):
        move, full = rng.random(), oracle.lengths.max() + 20 > CAPACITY
        if full or move < 0.1:
            lengths = rng.integers(0, oracle.lengths.max() + 1, cache.batch).astype(np.int32)
            cache = cache.crop(int(lengths[0]) if move < 0.02 else to_array(package, lengths))
            oracle.crop(lengths[0] if move < 0.02 else lengths)
        elif move < 0.2:
            batch = cache.batch if move < 0.15 else int(rng.choice([2, 3]))
            indices = rng.permutation(cache.batch)[:batch] if paged else rng.integers(0, cache.batch, batch)
            cache = cache.select(to_array(package, indices.astype(np.int32)))
            oracle.select(indices)
        else:
            steps = int(rng.choice([1, 1, 1, 20]))
            key, value = random(rng, K, steps, cache.batch), random(rng, K, steps, cache.batch)
            cache = cache.append(*given(package, key, value))
            oracle.append(key, value)
            verify(package, cache, oracle, rng, steps)
    return cache


@pytest.mark.parametrize(
    "package, options",
    [
        *((package, options) for package in (tqcore, tq_torch) for options in OPTIONS),
        *((tqjax, options) for options in ("blocks", "pages-window")),  # compiling takes the time
    ],
)
def test_equals_oracle(package, options, request):
    """Through random appends, crops, reorders and batch changes; 10,000 of them with --cache-steps 10000."""
    count = request.config.getoption("--cache-steps")
    before = tqjax.cache._written._cache_size()
    random_walk(package, OPTIONS[options], count, seed=len(options))
    if package is tqjax:  # one program a batch size and number of steps, and a kind of lengths
        assert tqjax.cache._written._cache_size() - before <= 12


def test_comparison_with_the_oracle_can_fail():
    def forgetful(package, cache, oracle, rng, steps):
        check(package, cache.crop(max(0, int(oracle.lengths.max()) - 1)), oracle, rng, steps)

    with pytest.raises(AssertionError):
        random_walk(tqcore, OPTIONS["window"], 40, 0, forgetful)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("package", [tqcore, tq_torch])
def test_dense_is_what_attention_sees(package, options):
    rng = np.random.default_rng(3)
    cache, oracle = zeros(package, **OPTIONS[options]), OracleCache(B, K, KEYS, VALUES, **OPTIONS[options])
    for steps in (20, 1, 1):
        key, value = random(rng, K, steps), random(rng, K, steps)
        cache = cache.append(*given(package, key, value))
        oracle.append(key, value)
    for got, expected in zip(cache.dense(), zip(*map(oracle.dense, range(B)), strict=True), strict=True):
        expected = np.stack(expected)
        assert_close(to_numpy(got)[:, :, : expected.shape[2]], expected, tolerance("float32", D))
        assert not to_numpy(got)[:, :, expected.shape[2] :].any() and got.shape[2] == cache.capacity >= CAPACITY


@pytest.mark.parametrize("package", PACKAGES)
def test_nbytes_are_those_of_the_arrays(package):
    cache = zeros(package, window=8, dtype="float16")
    packed = B * K * (CAPACITY - 8) * (D // 2 + 3 * D // 8 + 2 * 4)
    assert cache.nbytes == packed + 2 * B * K * 8 * D * 2 + 2 * B * 4


@pytest.mark.parametrize("package", [tqjax, tq_torch])
def test_all_options_of_attention(package):
    """Those of `attention`, over a cache that is packed, and over one that is dense in part."""
    rng, sinks = np.random.default_rng(5), np.linspace(-1, 1, K * G).astype(np.float32)
    key, value, query = random(rng, K, 40), random(rng, K, 40), random(rng, K * G, 3)
    options = {"logits_soft_cap": 5.0, "scale": 0.3, "return_lse": True}
    sinks, key, value, query = given(package, sinks, key, value, query)
    windowed, plain = zeros(package, first=4).append(key, value), zeros(package).append(key, value)
    whole = plain.attend(query, local_window_size=(9, 0), sinks=sinks, **options)
    same = package.attention(
        query, plain.keys, plain.values, kv_lengths=plain.lengths, is_causal=True, local_window_size=(9, 0),
        sinks=sinks, **options,
    )  # fmt: skip
    near = windowed.attend(query, local_window_size=(9, 0), sinks=sinks, **options)
    for got, expected, other in zip(whole, same, near, strict=True):
        assert_close(to_numpy(got), to_numpy(expected), LIMIT)  # the first four are out of sight
        assert_close(to_numpy(other), to_numpy(expected), LIMIT)
    dense = zeros(package, window=CAPACITY).append(key, value)
    out, lse = dense.attend(query, sinks=sinks, **options)
    keys, values = (np.repeat(to_numpy(x), G, 1).astype(float) for x in (key, value))
    logits = 5 * np.tanh(to_numpy(query).astype(float) @ keys.swapaxes(-1, -2) * 0.3 / 5)
    logits = np.where(np.arange(40) <= 37 + np.arange(3)[:, None], logits, -np.inf)
    total = np.exp(logits).sum(-1) + np.exp(to_numpy(sinks))[:, None]
    assert_close(to_numpy(lse), np.log(total), LIMIT)
    assert_close(to_numpy(out), np.exp(logits) @ values / total[..., None], LIMIT)
    with pytest.raises(NotImplementedError, match="a cache without a dense window"):
        dense.attend(query, local_window_size=3)


@pytest.mark.parametrize(
    "options, dtype", [("blocks", "float32"), ("centered", "float32"), ("pages-window", "bfloat16")]
)
@pytest.mark.parametrize("first, second", [(tqjax, tq_torch), (tq_torch, tqjax), (tqcore, tq_torch)])
def test_continues_in_another_framework(first, second, options, dtype, tmp_path):
    """Saved by one and read by the other: the same codes and scores as without the detour."""
    dtype = "float16" if first is tqcore and dtype == "bfloat16" else dtype  # of which NumPy has none
    rng = np.random.default_rng(7)
    chunks = [tuple(random(rng, K, steps) for _ in "kv") for steps in (20, 1, 1, 1)]

    def rounded(package, x):
        x = to_array(package, x)
        return x.to(getattr(torch, dtype)) if package is tq_torch else x.astype(dtype)

    def fill(package, cache, chunks):
        for key, value in chunks:
            cache = cache.append(rounded(package, key), rounded(package, value))
        return cache

    half = fill(first, zeros(first, dtype=dtype, **OPTIONS[options]), chunks[:2])
    first.save_file({"layer": half}, tmp_path / "cache.safetensors")
    moved = second.load_file(tmp_path / "cache.safetensors")["layer"]
    moved = moved.map(lambda x: x.to(DEVICE)) if second is tq_torch else moved
    assert isinstance(moved, second.KVCache) and moved.config == half.config
    query = random(rng, K * G, 1)
    there, here = fill(second, moved, chunks[2:]), fill(first, half, chunks[2:])
    for mine, theirs in ((there.keys, here.keys), (there.values, here.values)):
        assert_same_bits(to_numpy(mine.codes), to_numpy(theirs.codes))
        assert_same_bits(to_numpy(mine.norms), to_numpy(theirs.norms))
    if "page_size" not in OPTIONS[options]:
        scores = [
            to_numpy(package.attention_scores(to_array(package, query), cache.keys))
            for package, cache in ((first, here), (second, there))
        ]
        assert_same_bits(*scores)
    outs = [to_numpy(c.attend(to_array(p, query))) for p, c in ((first, here), (second, there))]
    assert_close(*outs, LIMIT)


@pytest.mark.cpu  # pointers on a GPU are compared by test_dlpack_of_packed
@pytest.mark.parametrize("options", ["blocks", "pages"])
def test_dlpack_shares_memory(options):
    rng = np.random.default_rng(8)
    key, value = random(rng, K, 20), random(rng, K, 20)
    ours = zeros(tqjax, **OPTIONS[options]).append(*given(tqjax, key, value))
    theirs = tq_torch.from_dlpack(ours)
    back = tqjax.from_dlpack(theirs)
    assert isinstance(theirs, tq_torch.KVCache) and isinstance(back, tqjax.KVCache)
    for a, b, c in zip(jax.tree.leaves(ours), jax.tree.leaves(back), tensors(theirs), strict=True):
        assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer() == c.data_ptr()


def tensors(cache):
    """The arrays in the order of the pytree's leaves."""
    found = []
    cache.map(lambda x: found.append(x) or x)
    return found


# --- JAX ------------------------------------------------------------------------------------------------------------


def step(cache, key, value, query):
    cache = cache.append(key, value)
    return cache, cache.attend(query)


def test_jax_updates_donated_caches_in_place():
    rng = np.random.default_rng(9)
    compiled = jax.jit(step, donate_argnums=0)
    cache = zeros(tqjax, window=4, first=2)
    keep = zeros(tqjax, window=4, first=2)
    where = [cache.keys.codes.unsafe_buffer_pointer(), cache.values.norms.unsafe_buffer_pointer()]
    for _ in range(40):
        arrays = given(tqjax, random(rng, K, 1), random(rng, K, 1), random(rng, K * G, 1))
        before, (cache, _) = cache, compiled(cache, *arrays)
        keep = keep.append(*arrays[:2])
        assert before.keys.codes.is_deleted()
    assert compiled._cache_size() == 1
    assert where == [cache.keys.codes.unsafe_buffer_pointer(), cache.values.norms.unsafe_buffer_pointer()]
    for got, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(keep), strict=True):
        assert_same_bits(np.asarray(got), np.asarray(expected))


def test_jax_scan_and_vmap():
    rng = np.random.default_rng(10)
    keys, values, queries = (jnp.asarray(np.stack([random(rng, h, 1) for _ in range(12)])) for h in (K, K, K * G))
    cache = zeros(tqjax)
    end, outs = jax.lax.scan(lambda c, x: step(c, *x), cache, (keys, values, queries))
    for x in zip(keys, values, queries, strict=True):
        cache, out = step(cache, *x)
    assert_same_bits(np.asarray(end.keys.codes), np.asarray(cache.keys.codes))
    assert_close(np.asarray(outs[-1]), np.asarray(out), LIMIT)
    two = jax.tree.map(lambda x: jnp.stack([x, x]), cache)
    new = [jnp.stack([x[0], 2 * x[1]]) for x in (keys, values, queries)]
    many, outs = jax.vmap(step)(two, *new)
    one, out = step(cache, *(x[1] for x in new))
    assert_same_bits(np.asarray(many.keys.codes[1]), np.asarray(one.keys.codes))
    assert_close(np.asarray(outs[1]), np.asarray(out), LIMIT)


def test_jax_export_of_a_decode_step():
    rng = np.random.default_rng(11)
    cache = zeros(tqjax, window=4)
    arrays = given(tqjax, random(rng, K, 1), random(rng, K, 1), random(rng, K * G, 1))
    leaves, tree = jax.tree.flatten(cache)

    def flat(leaves, *arrays):
        cache, out = step(jax.tree.unflatten(tree, leaves), *arrays)
        return jax.tree.leaves(cache), out

    kernels = (triton_call.TARGET, "__gpu$xla.gpu.triton")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in kernels]
    exported = jax.export.export(jax.jit(flat), disabled_checks=unchecked)(leaves, *arrays)
    if importlib.util.find_spec("flatbuffers"):  # which a machine without a network may lack
        exported = jax.export.deserialize(exported.serialize())
    got, out = exported.call(leaves, *arrays)
    expected, same = step(cache, *arrays)
    assert_close(np.asarray(out), np.asarray(same), LIMIT)
    for a, b in zip(got, jax.tree.leaves(expected), strict=True):
        assert_same_bits(np.asarray(a), np.asarray(b))


def shardings(mesh, cache, split):
    """Heads over the mesh; what has no heads on every device."""
    P = jax.sharding.PartitionSpec
    heads = {2: None, 3: P(None, "h"), 4: P(None, "h")}
    return jax.tree.map(lambda x: split(mesh, heads.get(x.ndim) or P()), cache)


@pytest.mark.two_devices
def test_heads_over_a_mesh():
    """By `shard_map` and by automatic partitioning: equal outputs, and no cache gathered on a device."""
    rng, P = np.random.default_rng(12), jax.sharding.PartitionSpec
    mesh = jax.make_mesh((2,), ("h",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    cache = zeros(tqjax, window=4, center=True)
    cache = cache.append(*given(tqjax, random(rng, K, 20), random(rng, K, 20)))
    arrays = given(tqjax, random(rng, K, 1), random(rng, K, 1), random(rng, K * G, 1))
    expected, out = step(cache, *arrays)
    places = shardings(mesh, cache, jax.sharding.NamedSharding)
    placed = jax.device_put(cache, places)
    heads = jax.sharding.NamedSharding(mesh, P(None, "h"))
    split = [jax.device_put(x, heads) for x in arrays]
    specs = jax.tree.map(lambda place: place.spec, places)
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(specs, *[P(None, "h")] * 3), out_specs=(specs, P(None, "h")))
    )
    automatic = jax.jit(step, out_shardings=(places, heads))
    for traced in (mapped, automatic):
        compiled = traced.lower(placed, *split).compile()
        after, got = compiled(placed, *split)
        assert_close(np.asarray(got), np.asarray(out), LIMIT)
        assert_same_bits(np.asarray(after.keys.codes), np.asarray(expected.keys.codes))
        text = compiled.as_text()
        assert "all-gather" not in text and "all-to-all" not in text, gathers(text)
    whole = jax.jit(lambda cache: cache.keys.norms + 1, out_shardings=jax.sharding.NamedSharding(mesh, P()))
    assert "all-gather" in whole.lower(placed).compile().as_text()


def gathers(text):
    return [line.strip()[:200] for line in text.splitlines() if "all-gather" in line or "all-to-all" in line]


# --- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["blocks", "pages-window"])
def test_torch_changes_in_place(options):
    rng = np.random.default_rng(13)
    cache = zeros(tq_torch, **OPTIONS[options])
    before = [x.data_ptr() for x in tensors(cache)]
    for steps in (5, 1, 1):
        assert cache.append(*given(tq_torch, random(rng, K, steps), random(rng, K, steps))) is cache
    cache.crop(6).select(torch.arange(B - 1, -1, -1, device=DEVICE))
    assert before == [x.data_ptr() for x in tensors(cache)]


@pytest.mark.parametrize("options", ["packed", "blocks", "pages-window"])
def test_torch_compiles_whole(options):
    """One graph, so nothing waits for the device; compiled once as the cache grows."""
    rng, counter = np.random.default_rng(14), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    cache, plain = zeros(tq_torch, **OPTIONS[options]), zeros(tq_torch, **OPTIONS[options])
    for _ in range(12):
        arrays = given(tq_torch, random(rng, K, 1), random(rng, K, 1), random(rng, K * G, 1))
        (_, out), (_, expected) = compiled(cache, *arrays), step(plain, *arrays)
        assert_close(to_numpy(out), to_numpy(expected), LIMIT)
    assert counter.frame_count <= 2
    assert_same_bits(to_numpy(cache.keys.codes), to_numpy(plain.keys.codes))


def test_torch_heads_over_ranks():
    """A rank of tensor parallelism has a cache of its own heads, which gives its part of the outputs."""
    rng = np.random.default_rng(17)
    arrays = given(tq_torch, random(rng, K, 20), random(rng, K, 20), random(rng, K * G, 20))
    _, whole = step(zeros(tq_torch, window=4), *arrays)
    for rank in range(K):
        cache = tq_torch.KVCache.zeros(B, 1, CAPACITY, KEYS, VALUES, window=4, device=DEVICE)
        _, out = step(
            cache, arrays[0][:, rank : rank + 1], arrays[1][:, rank : rank + 1], arrays[2][:, rank * G :][:, :G]
        )
        assert_close(to_numpy(out), to_numpy(whole[:, rank * G :][:, :G]), LIMIT)


# --- what caches refuse ---------------------------------------------------------------------------------------------


def snapshot(cache):
    return [np.array(to_numpy(x)) for x in tensors(cache)]


@pytest.mark.cpu  # lengths on a GPU are not looked at: see test_lost_sequences_are_nan
@pytest.mark.parametrize("package", PACKAGES)
def test_refused_appends_change_nothing(package):
    rng = np.random.default_rng(15)
    cache = zeros(package, page_size=16, window=4).append(*given(package, random(rng, K, 60), random(rng, K, 60)))
    before = snapshot(cache)
    wrong = random(rng, K, 1)
    for key, value, message in (
        (random(rng, K, 40), random(rng, K, 40), "must have room for 40 more positions"),
        (random(rng, K, 1)[..., :16], random(rng, K, 1)[..., :16], "with the cache's B, K and D"),
        (random(rng, K + 1, 1), random(rng, K + 1, 1), "with the cache's B, K and D"),
        (random(rng, K, 1), random(rng, K, 2), "and one T"),
        (random(rng, K, 1, B - 1), random(rng, K, 1, B - 1), "with the cache's B, K and D"),
        (random(rng, K, 1, dtype=np.float16), wrong, "must be of the cache's dtype float32, got float16"),
        (random(rng, K, 1), np.zeros(wrong.shape, np.int32), "must be an array"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.append(*given(package, key, value))
    after = snapshot(cache)
    last = to_numpy(cache.page_table)[0, 3:4]  # of the first sequence
    cache = cache.freeze(to_array(package, last))
    frozen = snapshot(cache)
    with pytest.raises(ValueError, match="must not be frozen"):
        cache.append(*given(package, wrong, wrong))
    for state, expected in ((after, before), (snapshot(cache), frozen)):
        for got, same in zip(state, expected, strict=True):
            assert_same_bits(got, same)


def test_devices_of_appends():
    rng = np.random.default_rng(16)
    cache = zeros(tq_torch, window=4)
    key, value = given(tq_torch, random(rng, K, 1), random(rng, K, 1))
    before = snapshot(cache)
    with pytest.raises(ValueError, match="must be on one device, got key on meta, value on .*, cache on "):
        cache.append(key.to("meta"), value)
    for got, expected in zip(snapshot(cache), before, strict=True):
        assert_same_bits(got, expected)


def test_lost_sequences_are_nan():
    """Where lengths cannot be seen, a full sequence and one with a frozen page say NaN, and the others do not."""
    rng = np.random.default_rng(16)
    cache = zeros(tqjax, page_size=16, window=8).append(*given(tqjax, random(rng, K, 60), random(rng, K, 60)))
    cache = cache.crop(jnp.asarray([60, 60, 20], jnp.int32)).freeze(jnp.asarray([7], jnp.int32))
    codes = np.asarray(cache.keys.codes)
    key, value, query = given(tqjax, random(rng, K, 20), random(rng, K, 20), random(rng, K * G, 20))
    after, out = jax.jit(step)(cache, key, value, query)
    assert np.isnan(np.asarray(out)[:2]).all() and np.isfinite(np.asarray(out)[2]).all()
    assert_same_bits(np.asarray(after.keys.codes)[7], codes[7])
    assert np.isfinite(np.asarray(jax.jit(lambda c: c.crop(30).attend(query))(after))).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"capacity": 0}, "`capacity` must be an integer of at least 1"),
        ({"window": -1}, "`window` must be an integer of at least 0"),
        ({"window": 70, "first": 4}, "must fit into `capacity`"),
        ({"values": tqcore.Quantizer(64)}, "quantizers of one head_dim"),
        ({"keys": tqcore.Quantizer(D, 4, qjl=True)}, "without qjl"),
        ({"dtype": "int8"}, "`dtype` must be"),
        ({"page_size": 8}, "`page_size` must be None or an integer from 16 to 256"),
        ({"page_size": 16, "pages": 0}, "`pages` must be"),
        ({"page_size": 16, "page_table": np.zeros((B, 2), np.int32)}, "`page_table` must have pages for"),
        ({"center": np.zeros((B, K, 2, D), np.float32)}, "`center` must be an array"),
    ],
)
def test_zeros_refuses(arguments, message):
    arguments = {"batch": B, "kv_heads": K, "capacity": CAPACITY, "keys": KEYS} | arguments
    for package in PACKAGES:
        with pytest.raises(ValueError, match=message):
            package.KVCache.zeros(**arguments)


def test_files_that_do_not_fit(tmp_path):
    cache, path = zeros(tqcore, window=4), tmp_path / "cache.safetensors"
    with pytest.raises(ValueError, match="must fit each other"):
        tqcore.save_file(dataclasses.replace(cache, packed_lengths=np.zeros(B + 1, np.int32)), path)
    with pytest.raises(ValueError, match="must not be frozen|needs a cache with pages"):
        cache.freeze(np.array([0]))
    with pytest.raises(ValueError, match="`lengths` must be"):
        cache.crop(-1)
    tqcore.save_file(cache, path)
    text = path.read_bytes().replace(b'\\"window\\": 4', b'\\"widnow\\": 4')
    path.write_bytes(text)
    with pytest.raises(ValueError, match="must describe its caches in JSON"):
        tqcore.load_file(path)
