"""Writing into a cache: the oracle against a loop over `compress`, the packages against the oracle, errors."""

import re
from dataclasses import dataclass, fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import PACKAGES, assert_close, assert_same_bits, cpu_array, to_array, to_numpy, tolerance
from cases import DTYPES

import tq_torch
import tqcore
import tqjax
from tqcore.quantizer import PackedVectors, Quantizer

IMPLEMENTATIONS = {tqcore: "numpy", tqjax: "xla", tq_torch: "eager"}
by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
K, S = 3, 37
TABLE = {16: 3, 7: 6}  # pages of a sequence, by the size of a page
POOL = 25
RAGGED = (0, 17, 35, -2)
EDGES = (-1, 36, 41, -5)  # 36 and 41 are the last positions of S, and of pages of 7
FAR = (2**31 - 1, -(2**31), 2**31 - 4, 100)


@dataclass(frozen=True)
class Case:
    """What is appended to a cache of random bytes, at which starts, through which pages."""

    T: int = 5
    D: int = 64
    bits: int = 4
    norm: str = "plain"
    dtype: str = "float32"
    center: str | None = None
    starts: tuple[int, ...] = RAGGED
    page: int | None = None
    wrong_pages: bool = False

    def __str__(self):
        values = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        odd = [f"{name}{value}" for name, value, default in values if value != default]
        return "-".join(odd).replace(" ", "") or "plain"


PLAIN = Case()
CASES = [
    PLAIN,
    *(Case(bits=bits, norm=norm) for bits in (1, 2, 3, 4) for norm in ("plain", "corrected")),
    *(Case(D=D, T=1) for D in (8, 128, 256)),
    *(Case(dtype=dtype, center=center) for dtype in DTYPES for center in ("head", "sequence")),
    *(Case(T=T, page=page, starts=starts) for T in (0, 1, 5) for page in (None, 7) for starts in (RAGGED, EDGES)),
    *(Case(page=page, wrong_pages=wrong) for page in (16, 7) for wrong in (False, True)),
    *(Case(page=page, starts=FAR) for page in (None, 16)),
    Case(T=50, starts=(-20, 0, 30, 3)),
    Case(T=50, starts=(-20, 0, 30, 3), page=7),
    Case(starts=()),
    Case(starts=(), page=16),
    Case(bits=3, norm="corrected", dtype="bfloat16", center="head", page=7, starts=EDGES, wrong_pages=True),
]
EVERYTHING, NOTHING = CASES[-1], Case(starts=FAR, page=16)


def inputs(case):
    """packed, x and the arrays of integers, NumPy's; no page is used twice."""
    rng = np.random.default_rng(len(str(case)))
    batch, page = len(case.starts), case.page
    shape = (batch, K, S) if page is None else (POOL, K, page)
    quantizer = Quantizer(case.D, case.bits, norm=case.norm)
    codes = rng.integers(0, 256, (*shape, quantizer.packed_dim), dtype=np.uint8)
    norms = rng.standard_normal(shape).astype(np.float32)
    center = {None: None, "head": (K, 1, case.D), "sequence": (batch, K, 1, case.D)}[case.center]
    center = None if center is None else rng.standard_normal(center).astype(np.float32)
    x = (3 * rng.standard_normal((batch, K, case.T, case.D)) + 1).astype(DTYPES[case.dtype])
    arrays = {"starts": np.array(case.starts, np.int32)}
    if page is not None:
        table = rng.permutation(POOL)[: batch * TABLE[page]].reshape(batch, TABLE[page]).astype(np.int32)
        if case.wrong_pages:
            table[0, 0], table[1, 17 // page] = -1, POOL
        arrays["page_table"] = table
    return PackedVectors(codes, norms, quantizer, center), x, arrays


def copied(packed):
    return packed.map(np.copy)


def oracle(case):
    packed, x, arrays = inputs(case)
    return tqcore.append(copied(packed), x, **arrays)


def loop(case):
    """`append` said in Python: one vector at a time."""
    packed, x, arrays = inputs(case)
    packed, page = copied(packed), case.page
    for b, start in enumerate(case.starts):
        for t in range(case.T):
            n, s = b, start + t
            if page is not None:
                if not 0 <= s < TABLE[page] * page:
                    continue
                n, s = arrays["page_table"][b, s // page], s % page
            if not (0 <= s < packed.codes.shape[2] and 0 <= n < len(packed.codes)):
                continue
            center = packed.center
            if center is not None and center.ndim == 4:
                center = center[b]
            one = tqcore.compress(x[b, :, t : t + 1], packed.quantizer, center=center)
            packed.codes[n, :, s], packed.norms[n, :, s] = one.codes[:, 0], one.norms[:, 0]
    return packed


def own(package, x, array=cpu_array):
    """As the package's own on the CPU; bfloat16 by way of float32, which holds it."""
    if isinstance(x, PackedVectors):
        return x.map(partial(own, package, array=array))
    if not isinstance(x, np.ndarray):
        return x
    if package is tq_torch and x.dtype.name == "bfloat16":
        return array(package, x.astype(np.float32)).bfloat16()
    return array(package, x)


def arguments(package, case):
    packed, x, arrays = inputs(case)
    return own(package, packed), own(package, x), {name: own(package, array) for name, array in arrays.items()}


def assert_same(got, expected):
    assert got.quantizer == expected.quantizer
    assert_same_bits(to_numpy(got.codes), expected.codes)
    assert_same_bits(to_numpy(got.norms), expected.norms)
    assert (got.center is None) == (expected.center is None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle(case):
    assert_same(oracle(case), loop(case))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
def test_packages(package, case):
    """Bit for bit on the CPU, D being a power of two."""
    packed, x, arrays = arguments(package, case)
    got = package.append(packed, x, **arrays, implementation=IMPLEMENTATIONS[package])
    assert_same(got, oracle(case))
    if package is tq_torch:
        assert got is packed


def test_wrong_answers_are_seen():
    """What the comparison must not take: one place not written, or one too many."""
    before, _, _ = inputs(PLAIN)
    expected = oracle(PLAIN)
    for b, s in ((0, 0), (1, 21), (2, 36), (3, 2), (0, 5), (3, 3)):
        wrong = copied(expected)
        wrong.norms[b, 0, s] = before.norms[b, 0, s] if expected.norms[b, 0, s] != before.norms[b, 0, s] else 7
        with pytest.raises(AssertionError, match="elements differ"):
            assert_same(wrong, expected)


def test_table_writes_and_leaves():
    """Each case of a start or page out of range leaves something, and all but those far away write something."""
    for case in CASES:
        if 0 in (case.T, len(case.starts)):
            continue
        changed = oracle(case).norms != inputs(case)[0].norms
        assert changed.any() == (case.starts is not FAR) and not changed.all()


@by_name
def test_several_steps_are_one(package):
    packed, x, arrays = arguments(package, PLAIN)
    for t in range(5):
        packed = package.append(packed, x[:, :, t : t + 1], arrays["starts"] + t)
    assert_same(packed, oracle(PLAIN))


@by_name
@pytest.mark.parametrize("sizes", [{"page": 0}, {"table": 0}, {"pool": 0}, {"S": 0}, {"K": 0}], ids=str)
def test_nothing_to_write_to(package, sizes):
    kv_heads, pool = sizes.get("K", K), sizes.get("pool", 5)
    codes = np.ones((2 if "S" in sizes else pool, kv_heads, sizes.get("page", sizes.get("S", 7)), 32), np.uint8)
    arrays = {"starts": np.zeros(2, np.int32)}
    if "S" not in sizes:
        arrays["page_table"] = np.zeros((2, sizes.get("table", 3)), np.int32)
    packed = PackedVectors(codes, np.ones(codes.shape[:-1], np.float32), Quantizer(64))
    x = np.ones((2, kv_heads, 5, 64), np.float32)
    got = package.append(
        own(package, copied(packed)), own(package, x), **{n: own(package, a) for n, a in arrays.items()}
    )
    assert_same(got, packed)


# --- decompress -----------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("qjl", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_decompress_rotated(package, qjl, center):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 5, 64)).astype(np.float32)
    packed = tqcore.compress(x, Quantizer(64, 3, qjl=qjl), center=x[:, :1] if center else None)
    name = IMPLEMENTATIONS[package]
    got = to_numpy(package.decompress(packed.map(partial(to_array, package)), rotated=True, implementation=name))
    expected = tqcore.rotate(tqcore.decompress(packed), packed.quantizer)
    assert_close(got, expected, tolerance("float32", 64))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(tqcore.decompress(packed), expected, tolerance("float32", 64))


@by_name
def test_compress_names_its_implementation(package):
    x = own(package, np.ones((1, 3, 64), np.float32))
    for name in (None, IMPLEMENTATIONS[package]):
        assert_same(
            package.compress(x, Quantizer(64), implementation=name), tqcore.compress(to_numpy(x), Quantizer(64))
        )


# --- errors ---------------------------------------------------------------------------------------------------

X = np.ones((2, 2, 3, 64), np.float32)
PACKED = tqcore.compress(np.ones((2, 2, 5, 64), np.float32), Quantizer(64))
PAGES = tqcore.compress(np.ones((7, 2, 16, 64), np.float32), Quantizer(64))
NUMBERS, STARTS = np.zeros((2, 3), np.int32), np.array([5, 0], np.int32)
GOOD = {"packed": PACKED, "x": X, "starts": STARTS}
PAGED = {"packed": PAGES, "page_table": NUMBERS}
CENTER = np.ones((2, 5, 64), np.float32)
BAD = {
    "packed type": ({"packed": X}, "`packed` must be PackedVectors, got an object of type "),
    "packed rank": ({"packed": PACKED.map(lambda x: x[0])}, "`packed.codes` must be an array [B, K, S, P] of uint8, got shape [2, 5, 32], dtype uint8."),
    "pool rank": (PAGED | {"packed": PAGES.map(lambda x: x[0])}, "`packed.codes` must be an array [N, K, page, P] of uint8, got shape [2, 16, 32], dtype uint8."),
    "norms": ({"packed": replace(PACKED, norms=PACKED.norms[:1])}, "`packed.norms` must have the shape of `packed.codes` without its last axis, got [1, 2, 5] and [2, 2, 5, 32]."),
    "residual": ({"packed": tqcore.compress(np.ones((2, 2, 5, 64), np.float32), Quantizer(64, qjl=True))}, "`packed` must be without a residual where it is written to, got qjl=True."),
    "varying center": ({"packed": replace(PACKED, center=CENTER)}, "`packed.center` must have an S axis of 1 where `packed` is written to, got shape [2, 5, 64]."),
    "centers of pages": (PAGED | {"packed": replace(PAGES, center=np.ones((7, 2, 1, 64), np.float32))}, "`packed.center` must be the same for all pages where they are written to, got shape [7, 2, 1, 64]."),
    "x dtype": ({"x": X.astype(np.int32)}, "`x` must be an array [B, K, T, D] of float32, bfloat16 or float16, got shape [2, 2, 3, 64], dtype int32."),
    "x rank": ({"x": X[0]}, "`x` must be an array [B, K, T, D] of float32, bfloat16 or float16, got shape [2, 3, 64], dtype float32."),
    "x D": ({"x": X[..., :32]}, "the last axis of `x` must be the quantizer's head_dim, got shape [2, 2, 3, 32], head_dim=64."),
    "heads": ({"x": X[:, :1]}, "`x` and `packed` must have the same heads, got 1 and 2 heads."),
    "batch": ({"x": X[:1]}, "`x` and `packed` must have one batch size, got 1 and 2."),
    "starts dtype": ({"starts": STARTS.astype(np.float32)}, "`starts` must be an array [B] of int32, got shape [2], dtype float32."),
    "starts number": ({"starts": 3}, "`starts` must be an array [B] of int32, got an object of type int."),
    "starts batch": ({"starts": STARTS[:1]}, "the first axis of `starts` must be the batch size of `x`, got shape [1], 2."),
    "pages dtype": (PAGED | {"page_table": NUMBERS.astype(np.uint8)}, "`page_table` must be an array [B, M] of int32, got shape [2, 3], dtype uint8."),
    "pages rank": (PAGED | {"page_table": NUMBERS[0]}, "`page_table` must be an array [B, M] of int32, got shape [3], dtype int32."),
    "pages batch": (PAGED | {"page_table": NUMBERS[:1]}, "the first axis of `page_table` must be the batch size of `x`, got shape [1, 3], 2."),
    "implementation": ({"implementation": "cuda"}, "`implementation` must be None or one of '"),
}  # fmt: skip


@by_name
@pytest.mark.parametrize("name", BAD)
def test_bad_append(package, name):
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        package.append(**{key: own(package, value) for key, value in (GOOD | changed).items()})


@by_name
def test_bad_implementations_and_flags(package):
    message = f"`implementation` must be None or one of '{IMPLEMENTATIONS[package]}"
    x, packed = own(package, X), own(package, PACKED)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        package.compress(x, Quantizer(64), implementation="cuda")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        package.decompress(packed, implementation="cuda")
    with pytest.raises(ValueError, match="^`rotated` must be True or False, got 1"):
        package.decompress(packed, rotated=1)


def test_different_devices():
    packed, x, starts = (own(tq_torch, value) for value in GOOD.values())
    with pytest.raises(ValueError, match="must be on one device, got .*starts on meta"):
        tq_torch.append(packed, x, starts.to("meta"))
    first, second = jax.devices()[0], jax.devices("cpu")[-1]
    packed = PACKED.map(lambda x: jax.device_put(x, first))
    with pytest.raises(ValueError, match="must be on one device, got x on .*, packed.codes on "):
        tqjax.append(packed, jax.device_put(X, second), STARTS)


# --- jax ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, Case(page=7, center="head"), NOTHING], ids=str)
def test_jax_donation(case):
    """The same bits, in the memory that was given."""
    packed, x, arrays = arguments(tqjax, case)
    packed = packed.map(jnp.copy)
    pointers = packed.codes.unsafe_buffer_pointer(), packed.norms.unsafe_buffer_pointer()
    got = jax.jit(tqjax.append, donate_argnums=0)(packed, x, **arrays)
    assert_same(got, oracle(case))
    assert packed.codes.is_deleted() and packed.norms.is_deleted()
    assert (got.codes.unsafe_buffer_pointer(), got.norms.unsafe_buffer_pointer()) == pointers


def test_jax_leaves_what_is_not_donated():
    packed, x, arrays = arguments(tqjax, PLAIN)
    tqjax.append(packed, x, **arrays)
    assert_same(packed, inputs(PLAIN)[0])


def test_jax_scan():
    packed, x, arrays = arguments(tqjax, EVERYTHING)

    def step(carry, vectors):
        packed, starts = carry
        packed = tqjax.append(packed, vectors[:, :, None], starts, page_table=arrays["page_table"])
        return (packed, starts + 1), None

    (got, _), _ = jax.jit(partial(jax.lax.scan, step))((packed, arrays["starts"]), jnp.moveaxis(x, 2, 0))
    assert_same(got, oracle(EVERYTHING))


def test_jax_vmap():
    packed, x, arrays = arguments(tqjax, Case(center="sequence"))

    def one(packed, x, start):
        got = tqjax.append(jax.tree.map(lambda a: a[None], packed), x[None], start[None])
        return jax.tree.map(lambda a: a[0], got)

    assert_same(jax.vmap(one)(packed, x, arrays["starts"]), oracle(Case(center="sequence")))


def test_jax_compiles_once():
    packed, x, arrays = arguments(tqjax, PLAIN)
    before = tqjax.compress_ops._append._cache_size()
    for start in (0, 3, -7, 90):
        tqjax.append(packed, x, arrays["starts"] + start)
    assert tqjax.compress_ops._append._cache_size() - before <= 1


# --- torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, NOTHING], ids=str)
def test_torch_strides(case):
    """x whose heads come last but one, and a cache that is every other place of a larger one."""
    packed, x, arrays = arguments(tq_torch, case)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)

    def inside(tensor):
        larger = torch.full((len(tensor), 2 * K, 2 * tensor.shape[2], *tensor.shape[3:]), 77, dtype=tensor.dtype)
        larger[:, ::2, 1::2] = tensor
        return larger

    larger = [inside(packed.codes), inside(packed.norms)]
    sliced = replace(packed, **{n: t[:, ::2, 1::2] for n, t in zip(("codes", "norms"), larger, strict=True)})
    assert tq_torch.append(sliced, x, **arrays) is sliced
    assert_same(sliced, oracle(case))
    for tensor in larger:
        assert (tensor[:, 1::2] == 77).all() and (tensor[:, :, ::2] == 77).all()


@pytest.mark.parametrize(
    ("backend", "case"),
    [("aot_eager", PLAIN), ("aot_eager", EVERYTHING), ("inductor", Case(page=7, center="head"))],
    ids=str,
)
def test_torch_compile(backend, case):
    packed, x, arrays = arguments(tq_torch, case)

    def step(packed, x, arrays):
        tq_torch.append(packed, x, **arrays)
        return tq_torch.decompress(packed)

    got = torch.compile(step, fullgraph=True, backend=backend)(packed, x, arrays)
    assert_same(packed, oracle(case))
    assert_close(to_numpy(got), tqcore.decompress(oracle(case)), tolerance("float32", case.D))


def test_torch_compiles_once():
    packed, x, arrays = arguments(tq_torch, PLAIN)
    compiled = torch.compile(tq_torch.append, fullgraph=True, backend="aot_eager")
    compiled(packed, x, arrays["starts"] - 90)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(packed, x, arrays["starts"])
    assert_same(packed, oracle(PLAIN))


def test_torch_opcheck():
    packed, x, arrays = arguments(tq_torch, EVERYTHING)
    quantizer = tq_torch.ops.fields_of(packed.quantizer)
    given = packed.codes, packed.norms, x, packed.center, arrays["starts"], arrays["page_table"], *quantizer, None
    torch.library.opcheck(torch.ops.tq_torch.append.default, given)


def test_torch_inputs_with_gradients():
    packed, x, arrays = arguments(tq_torch, PLAIN)
    tq_torch.append(packed, x.requires_grad_(), **arrays)
    assert_same(packed, oracle(PLAIN))
    assert not packed.norms.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("case", [PLAIN, EVERYTHING, NOTHING], ids=str)
def test_torch_cuda_graph(case):
    """Which also shows that nothing waits for the device; starts change between replays."""
    packed, x, arrays = inputs(case)
    packed, x = (own(tq_torch, value, to_array) for value in (packed, x))
    arrays = {name: to_array(tq_torch, array) for name, array in arrays.items()}
    expected = packed.map(torch.clone)
    tq_torch.append(expected, x, **arrays)
    starts = arrays["starts"].clone()
    arrays["starts"].fill_(-100)
    tq_torch.append(packed, x, **arrays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tq_torch.append(packed, x, **arrays)
    arrays["starts"].copy_(starts)
    graph.replay()
    assert_same(packed, expected.map(to_numpy))
