"""Writing into a cache: `append` against the oracle, and the oracle against a loop over positions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import DEVICE, PACKAGES, assert_same_bits, cpu_array, to_array, to_numpy
from cases import DTYPES

import tq_torch
import tqcore
import tqjax
from tqcore import PackedVectors, Quantizer

by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
STARTS = {
    # B, T, capacity, starts, page_table; a page holds `capacity` positions
    "ragged": (3, 4, 9, [0, 2, 5], None),
    "one token": (4, 1, 7, [6, 0, 3, 2], None),
    "out of range": (5, 3, 8, [-1, -2, -3, 6, 8], None),
    "far out of range": (3, 3, 8, [-(2**31), 2**31 - 2, 1000], None),
    "pages": (2, 6, 4, [3, 1], [[5, 0, 2], [1, 4, 3]]),
    "missing pages": (3, 5, 2, [-1, 0, 2], [[-1, 0], [7, 1], [2, 99]]),
    "past the table": (2, 4, 2, [3, -2], [[0, 1], [3, 2]]),
    "no sequence": (0, 3, 8, [], None),
    "no token": (2, 0, 8, [0, 1], None),
    "no capacity": (2, 2, 0, [0, 1], None),
    "no page in the table": (2, 2, 4, [0, 1], [[], []]),
}
POOL, HEADS = 6, 2


def given(name, quantizer, dtype="float32", center=False):
    """(packed, x, starts, page_table) of NumPy; the cache holds bytes of its own, to see what is overwritten."""
    batch, length, size, starts, pages = STARTS[name]
    rng = np.random.default_rng(len(name))
    rows = batch if pages is None else POOL
    packed = PackedVectors(
        rng.integers(0, 256, (rows, HEADS, size, quantizer.packed_dim), np.uint8),
        rng.standard_normal((rows, HEADS, size)).astype(np.float32),
        quantizer,
        rng.standard_normal((HEADS, 1, quantizer.head_dim)).astype(np.float32) if center else None,
    )
    x = rng.standard_normal((batch, HEADS, length, quantizer.head_dim)).astype(DTYPES[dtype])
    table = None if pages is None else np.array(pages, np.int32).reshape(batch, -1)
    return packed, x, np.array(starts, np.int32), table


def expected(packed, x, starts, page_table):
    """Position by position."""
    codes, norms = packed.codes.copy(), packed.norms.copy()
    new, size = tqcore.compress(x, packed.quantizer, center=packed.center), packed.codes.shape[2]
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            row, position = b, int(starts[b]) + t
            if page_table is not None and position >= 0:
                page, position = divmod(position, size)
                row = int(page_table[b, page]) if page < page_table.shape[1] else -1
            if 0 <= row < len(codes) and 0 <= position < size:
                codes[row, :, position], norms[row, :, position] = new.codes[b, :, t], new.norms[b, :, t]
    return codes, norms


def written(package, arguments, implementation=None):
    packed, *arrays = arguments
    put = partial(cpu_array, package)
    packed = packed.map(lambda x: put(x.copy()))
    x, starts, page_table = (None if a is None else put(a) for a in arrays)
    found = package.append(packed, x, starts, page_table=page_table, implementation=implementation)
    return to_numpy(found.codes), to_numpy(found.norms)


@by_name
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("bits", [4, 3])
def test_writes_where_it_should(package, name, bits):
    arguments = given(name, Quantizer(32, bits), center=bits == 3)
    for got, wanted in zip(written(package, arguments), expected(*arguments), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_kernel_writes_where_it_should(name, bits):
    packed, *arrays = given(name, Quantizer(32, bits), "bfloat16", center=bits == 3)
    larger = PackedVectors(
        np.repeat(packed.codes, 2, 1), np.repeat(packed.norms, 2, 1), packed.quantizer, packed.center
    )
    on_device = larger.map(lambda a: to_array(tq_torch, a.copy()))
    inside = PackedVectors(on_device.codes[:, ::2], on_device.norms[:, ::2], packed.quantizer, on_device.center)
    x, starts = (to_array(tq_torch, a) for a in arrays[:2])
    table = None if arrays[2] is None else to_array(tq_torch, arrays[2])
    tq_torch.append(inside, x, starts, page_table=table, implementation="triton")
    codes, norms = expected(packed, *arrays)
    assert_same_bits(to_numpy(inside.codes), codes)
    assert_same_bits(to_numpy(inside.norms), norms)
    assert_same_bits(to_numpy(on_device.codes[:, 1::2]), packed.codes)


def test_a_wrong_start_is_seen():
    packed, x, starts, table = given("ragged", Quantizer(32))
    wanted = expected(packed, x, starts, table)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(written(tqcore, (packed, x, starts + np.int32(1), table))[0], wanted[0])


@by_name
def test_appended_in_steps_equals_compressed_at_once(package):
    quantizer = Quantizer(64)
    x = np.random.default_rng(0).standard_normal((2, 3, 10, 64)).astype(np.float32)
    whole = tqcore.compress(x, quantizer)
    packed = whole.map(lambda a: cpu_array(package, np.zeros_like(a)))
    for first, last in ((0, 4), (4, 5), (5, 10)):
        starts = cpu_array(package, np.full(2, first, np.int32))
        packed = package.append(packed, cpu_array(package, x[:, :, first:last].copy()), starts)
    assert_same_bits(to_numpy(packed.codes), whole.codes)
    assert_same_bits(to_numpy(packed.norms), whole.norms)


BAD = {
    "heads": (lambda a: a | {"x": a["x"][:, :1]}, "`x` and `packed` must have one number of heads, got 1 and 2."),
    "batch": (
        lambda a: a | {"x": a["x"][:2], "starts": a["starts"][:2]},
        "`x` and `packed` must have one batch size, got 2 and 3.",
    ),
    "starts": (lambda a: a | {"starts": a["starts"][:2]}, "the first axis of `starts` must be the batch size of `x`"),
    "starts dtype": (
        lambda a: a | {"starts": a["starts"].astype(np.float32)},
        "`starts` must be an array [B] of int32, got shape [3], dtype float32.",
    ),
    "width": (lambda a: a | {"x": a["x"][..., :16]}, "the last axis of `x` must be the quantizer's head_dim"),
    "implementation": (lambda a: a | {"implementation": "cuda"}, "`implementation` must be None or one of "),
}


@by_name
@pytest.mark.parametrize("name", BAD)
def test_bad_appends(package, name):
    change, message = BAD[name]
    packed, x, starts, _ = given("ragged", Quantizer(32))
    arguments = change({"packed": packed, "x": x, "starts": starts})
    arguments = {k: to_array(package, v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    arguments["packed"] = packed.map(partial(to_array, package))
    with pytest.raises(ValueError) as raised:
        package.append(**arguments)
    assert str(raised.value).startswith(message)


@by_name
def test_centers_and_residuals_that_do_not_fit(package):
    packed, x, starts, _ = given("ragged", Quantizer(32))
    put = partial(to_array, package)
    varying = PackedVectors(packed.codes, packed.norms, packed.quantizer, np.zeros((2, 9, 32), np.float32)).map(put)
    with pytest.raises(ValueError, match="`packed.center` must be one for all positions"):
        package.append(varying, put(x), put(starts))
    signed = tqcore.compress(np.ones((3, 2, 9, 32), np.float32), Quantizer(32, qjl=True)).map(put)
    with pytest.raises(ValueError, match="`packed` must have no residual"):
        package.append(signed, put(x), put(starts))


@by_name
@pytest.mark.parametrize("quantizer", [Quantizer(32), Quantizer(24, 3), Quantizer(32, 3, qjl=True)], ids=str)
def test_rotated_is_the_rotation_of_what_is_decompressed(package, quantizer):
    rng = np.random.default_rng(1)
    center = rng.standard_normal((1, quantizer.head_dim)).astype(np.float32)
    packed = tqcore.compress(
        rng.standard_normal((2, 5, quantizer.head_dim)).astype(np.float32), quantizer, center=center
    )
    packed = packed.map(partial(cpu_array, package))
    plain, rotated = package.decompress(packed), package.decompress(packed, rotated=True)
    np.testing.assert_allclose(to_numpy(rotated), to_numpy(package.rotate(plain, quantizer)), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="`rotated` must be True or False, got 1"):
        package.decompress(packed, rotated=1)


# --- JAX ------------------------------------------------------------------------------------------------------


def in_place(compiled) -> int:
    """Bytes of results that lie where arguments lay."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.alias_size_in_bytes


def test_jax_writes_in_place_when_donated():
    packed, x, starts, _ = given("ragged", Quantizer(32))
    append = jax.jit(tqjax.append, donate_argnums=0)
    compiled = append.lower(packed.map(jnp.asarray), x, starts).compile()
    assert in_place(compiled) == packed.nbytes
    kept = jax.jit(tqjax.append).lower(packed.map(jnp.asarray), x, starts).compile()
    assert in_place(kept) == 0


def test_jax_scans_and_maps():
    packed, x, starts, _ = given("out of range", Quantizer(32))
    codes, norms = expected(packed, x, starts, None)

    def step(cache, at):
        return tqjax.append(cache, jnp.take(x, at[None], 2), starts + at), None

    scanned, _ = jax.jit(lambda cache: jax.lax.scan(step, cache, jnp.arange(3, dtype=jnp.int32)))(
        packed.map(jnp.asarray)
    )
    assert_same_bits(np.asarray(scanned.codes), codes)
    assert_same_bits(np.asarray(scanned.norms), norms)
    one = lambda packed, x, starts: tqjax.append(packed, x, starts)  # noqa: E731
    mapped = jax.vmap(one)(packed.map(lambda a: jnp.stack([a, a])), np.stack([x, x]), np.stack([starts, starts]))
    assert_same_bits(np.asarray(mapped.codes), np.stack([codes, codes]))


# --- torch ----------------------------------------------------------------------------------------------------


def test_torch_writes_into_slices_in_place_and_compiles():
    packed, x, starts, _ = given("out of range", Quantizer(32))
    codes, norms = expected(packed, x, starts, None)
    larger = torch.zeros(5, 4, 9, 16, dtype=torch.uint8), torch.zeros(5, 4, 9)
    inside = PackedVectors(larger[0][:, 1:3, :8], larger[1][:, 1:3, :8], packed.quantizer)
    x, starts = torch.from_numpy(x).transpose(1, 2).contiguous().transpose(1, 2), torch.from_numpy(starts)
    compiled = torch.compile(
        lambda cache, x, starts: tq_torch.append(cache, x, starts).norms * 1, fullgraph=True, backend="aot_eager"
    )
    for append in (lambda *a: tq_torch.append(*a).norms, compiled):
        inside.codes.copy_(torch.from_numpy(packed.codes))
        inside.norms.copy_(torch.from_numpy(packed.norms))
        assert_same_bits(append(inside, x, starts).numpy(), norms)
        assert_same_bits(inside.codes.numpy(), codes)
    assert not larger[0][:, ::3].any() and not larger[0][:, :, 8:].any()


def test_torch_says_what_it_changes():
    packed, x, starts, table = given("pages", Quantizer(32))
    tensors = [torch.from_numpy(a).to(DEVICE) for a in (packed.codes, packed.norms, x)]
    arguments = (*tensors, None, torch.from_numpy(starts).to(DEVICE), torch.from_numpy(table).to(DEVICE))
    torch.library.opcheck(torch.ops.tq_torch.append.default, (*arguments, 32, 4, "hadamard", 0, "corrected", None))
