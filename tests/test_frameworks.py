"""What each framework's users expect of the operations: errors, transforms, compilation, interchange."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import CUDA, DEVICE, PACKAGES, assert_close, assert_same_bits, cpu_array, to_array, to_numpy, tolerance
from cases import BASE, inputs, oracle

import tq_torch
import tqcore
import tqjax
from tqcore import packing
from tqcore.quantizer import PackedVectors, Quantizer

by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)


# --- errors ---------------------------------------------------------------------------------------------------

Q = np.ones((2, 8, 1, 64), np.float32)
CODES = np.zeros((2, 2, 5, 32), np.uint8)
NORMS = np.ones((2, 2, 5), np.float32)
TABLE = np.linspace(-1, 1, 16, dtype=np.float32)
GOOD = {
    "q_rotated": Q, "packed_indices": CODES, "norms": NORMS, "centroids": TABLE,
    "scale": 0.125, "n_q_heads": 8, "n_kv_heads": 2,
}  # fmt: skip
BAD_SCORES = {
    "q dtype": ({"q_rotated": Q.astype(np.int32)}, "`q_rotated` must be an array [B, H, T, D] of float32, bfloat16 or float16, got shape [2, 8, 1, 64], dtype int32."),
    "q rank": ({"q_rotated": Q[0]}, "`q_rotated` must be an array [B, H, T, D] of float32, bfloat16 or float16, got shape [8, 1, 64], dtype float32."),
    "q type": ({"q_rotated": 3}, "`q_rotated` must be an array [B, H, T, D] of float32, bfloat16 or float16, got an object of type int."),
    "codes dtype": ({"packed_indices": CODES.astype(np.int8)}, "`packed_indices` must be an array [B, K, S, P] of uint8, got shape [2, 2, 5, 32], dtype int8."),
    "codes rank": ({"packed_indices": CODES[0]}, "`packed_indices` must be an array [B, K, S, P] of uint8, got shape [2, 5, 32], dtype uint8."),
    "norms dtype": ({"norms": NORMS.astype(np.float16)}, "`norms` must be an array [B, K, S] of float32, got shape [2, 2, 5], dtype float16."),
    "norms rank": ({"norms": NORMS[..., None]}, "`norms` must be an array [B, K, S] of float32, got shape [2, 2, 5, 1], dtype float32."),
    "centroids dtype": ({"centroids": TABLE.astype(np.float16)}, "`centroids` must be an array [L] of float32, got shape [16], dtype float16."),
    "odd D": ({"q_rotated": Q[..., :63]}, "`head_dim` must be an even integer from 2 to 1024, got 63."),
    "packed D": ({"packed_indices": CODES[..., :31]}, "the last axis of `packed_indices` must be head_dim * bits / 8 for bits of 1, 2, 3 or 4, got shape [2, 2, 5, 31], head_dim=64."),
    "mismatching S": ({"norms": NORMS[..., :4]}, "`norms` must have the shape of `packed_indices` without its last axis, got [2, 2, 4] and [2, 2, 5, 32]."),
    "mismatching batch": ({"q_rotated": Q[:1]}, "`q_rotated` and `packed_indices` must have one batch size, got 1 and 2."),
    "head counts": ({"n_q_heads": 4}, "`n_q_heads` and `n_kv_heads` must be the head axes of `q_rotated` and `packed_indices`, got n_q_heads=4, n_kv_heads=2 for 8 and 2 heads."),
    "heads that do not divide": ({"q_rotated": Q[:, :7], "n_q_heads": 7}, "`n_q_heads` must be a multiple of `n_kv_heads`, got n_q_heads=7, n_kv_heads=2."),
    "no heads": ({"packed_indices": CODES[:, :0], "norms": NORMS[:, :0], "n_kv_heads": 0}, "`n_q_heads` must be a multiple of `n_kv_heads`, got n_q_heads=8, n_kv_heads=0."),
    "17 centroids": ({"centroids": np.linspace(-1, 1, 17, dtype=np.float32)}, "`centroids` must have 1 to 16 entries, got 17, bits=4."),
    "no centroids": ({"centroids": TABLE[:0]}, "`centroids` must have 1 to 16 entries, got 0, bits=4."),
    "too many centroids": ({"packed_indices": CODES[..., :16]}, "`centroids` must have 1 to 4 entries, got 16, bits=2."),
    "no codes": ({"packed_indices": CODES[..., :0]}, "the last axis of `packed_indices` must be head_dim * bits / 8 for bits of 1, 2, 3 or 4, got shape [2, 2, 5, 0], head_dim=64."),
    "5 bits": ({"packed_indices": np.zeros((2, 2, 5, 40), np.uint8)}, "the last axis of `packed_indices` must be head_dim * bits / 8 for bits of 1, 2, 3 or 4, got shape [2, 2, 5, 40], head_dim=64."),
    "unsorted centroids": ({"centroids": TABLE[:2][::-1].copy()}, f"`centroids` must be finite and ascending, got {TABLE[:2][::-1].tolist()}."),
    "infinite centroids": ({"centroids": np.array([0, np.inf], np.float32)}, "`centroids` must be finite and ascending, got [0.0, inf]."),
    "NaN centroids": ({"centroids": np.array([np.nan, 0], np.float32)}, "`centroids` must be finite and ascending, got [nan, 0.0]."),
    "scale NaN": ({"scale": float("nan")}, "`scale` must be a finite number within float32, got nan."),
    "scale too large": ({"scale": 1e39}, "`scale` must be a finite number within float32, got 1e+39."),
    "scale text": ({"scale": "1"}, "`scale` must be a finite number within float32, got '1'."),
}  # fmt: skip
X, PACKED = np.ones((3, 64), np.float32), tqcore.compress(np.ones((1, 2, 3, 64), np.float32), Quantizer(64))
BAD_CALLS = {
    "x dtype": (lambda p, a: p.compress(a(X.astype(np.int32)), Quantizer(64)), "`x` must be an array [..., S, D] of float32, bfloat16 or float16, got shape [3, 64], dtype int32."),
    "x rank": (lambda p, a: p.compress(a(X[0]), Quantizer(64)), "`x` must be an array [..., S, D] of float32, bfloat16 or float16, got shape [64], dtype float32."),
    "x width": (lambda p, a: p.compress(a(X), Quantizer(128)), "the last axis of `x` must be the quantizer's head_dim, got shape [3, 64], head_dim=128."),
    "no quantizer": (lambda p, a: p.compress(a(X), 4), "`quantizer` must be a Quantizer, got an object of type int."),
    "rotate width": (lambda p, a: p.rotate(a(X), Quantizer(32)), "the last axis of `x` must be the quantizer's head_dim, got shape [3, 64], head_dim=32."),
    "unrotate dtype": (lambda p, a: p.unrotate(a(CODES), Quantizer(32)), "`x` must be an array [..., D] of float32, bfloat16 or float16, got shape [2, 2, 5, 32], dtype uint8."),
    "decompress type": (lambda p, a: p.decompress(a(X)), "`packed` must be PackedVectors, got an object of type "),
    "decompress dtype": (lambda p, a: p.decompress(PACKED.map(a), dtype="float64"), "`dtype` must be float32, bfloat16 or float16, got float64."),
    "packed width": (lambda p, a: p.decompress(PackedVectors(a(CODES), a(NORMS), Quantizer(128))), "the last axis of `packed.codes` must be head_dim * bits / 8, got shape [2, 2, 5, 32], head_dim=128, bits=4."),
    "packed bits": (lambda p, a: p.decompress(PackedVectors(a(CODES), a(NORMS), Quantizer(64, 3))), "the last axis of `packed.codes` must be head_dim * bits / 8, got shape [2, 2, 5, 32], head_dim=64, bits=3."),
    "packed norms": (lambda p, a: p.decompress(PackedVectors(a(CODES), a(NORMS[0]), Quantizer(64))), "`packed.norms` must have the shape of `packed.codes` without its last axis, got [2, 5] and [2, 2, 5, 32]."),
    "query width": (lambda p, a: p.attention_scores(a(Q[..., :32]), PACKED.map(a)), "the last axis of `query` must be the keys' head_dim, got shape [2, 8, 1, 32], head_dim=64."),
    "query rank": (lambda p, a: p.attention_scores(a(Q[0]), PACKED.map(a)), "`query` must be an array [B, H, T, D] of float32, bfloat16 or float16, got shape [8, 1, 64], dtype float32."),
    "keys rank": (lambda p, a: p.attention_scores(a(Q[:1]), PACKED.map(lambda x: a(x[0]))), "`keys.codes` must be an array [B, K, S, P] of uint8, got shape [2, 3, 32], dtype uint8."),
    "query heads": (lambda p, a: p.attention_scores(a(Q[:1, :7]), PACKED.map(a)), "`n_q_heads` must be a multiple of `n_kv_heads`, got n_q_heads=7, n_kv_heads=2."),
    "query batch": (lambda p, a: p.attention_scores(a(Q), PACKED.map(a)), "`q_rotated` and `packed_indices` must have one batch size, got 2 and 1."),
    "query scale": (lambda p, a: p.attention_scores(a(Q[:1]), PACKED.map(a), scale=float("inf")), "`scale` must be a finite number within float32, got inf."),
    "bits": (lambda p, a: p.Quantizer(64, 5), "`bits` must be 1, 2, 3 or 4, got 5."),
    "no bits": (lambda p, a: p.Quantizer(64, 0), "`bits` must be 1, 2, 3 or 4, got 0."),
    "head_dim odd": (lambda p, a: p.Quantizer(65), "`head_dim` must be an even integer from 2 to 1024, got 65."),
    "head_dim large": (lambda p, a: p.Codebook(1026, 4), "`head_dim` must be an even integer from 2 to 1024, got 1026."),
    "head_dim of 2 bits": (lambda p, a: p.Quantizer(66, 2), "`head_dim` must be a multiple of 4 for 2-bit codes, got 66."),
    "head_dim of 3 bits": (lambda p, a: p.Quantizer(68, 3), "`head_dim` must be a multiple of 8 for 3-bit codes, got 68."),
    "head_dim of 1 bit": (lambda p, a: p.Quantizer(68, 1), "`head_dim` must be a multiple of 8 for 1-bit codes, got 68."),
    "hadamard 96": (lambda p, a: p.Quantizer(96, rotation="hadamard"), "`rotation` must be None, 'haar', or, where head_dim is a power of two, 'hadamard', got rotation='hadamard', head_dim=96."),
    "seed": (lambda p, a: p.Quantizer(64, seed=-1), "`seed` must be an integer of at least 0, got -1."),
}  # fmt: skip


@by_name
@pytest.mark.parametrize("name", BAD_SCORES)
def test_bad_scores(package, name):
    changed, message = BAD_SCORES[name]
    arguments = {
        key: to_array(package, value) if isinstance(value, np.ndarray) else value
        for key, value in (GOOD | changed).items()
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        package.fused_qk_scores(**arguments)


@by_name
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(package, name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(package, lambda x: to_array(package, x))


@by_name
def test_unknown_implementation(package):
    arguments = {k: to_array(package, v) if isinstance(v, np.ndarray) else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match="`implementation` must be None or one of '.*', got 'cuda'"):
        package.fused_qk_scores(**arguments, implementation="cuda")


def test_different_devices():
    arrays = [to_array(tq_torch, x) for x in (Q, CODES, NORMS, TABLE)]
    with pytest.raises(
        ValueError, match="must be on one device, got q_rotated on meta, packed_indices on (cpu|cuda:0)"
    ):
        tq_torch.fused_qk_scores(arrays[0].to("meta"), *arrays[1:], 0.1, n_q_heads=8, n_kv_heads=2)
    first, second = (jax.devices()[0], jax.devices("cpu")[-1])
    assert first != second
    arrays = [jax.device_put(x, first) for x in (Q, CODES, NORMS, TABLE)]
    with pytest.raises(ValueError, match="must be on one device, got q_rotated on .*, packed_indices on "):
        tqjax.fused_qk_scores(jax.device_put(Q, second), *arrays[1:], 0.1, n_q_heads=8, n_kv_heads=2)


def test_implementations_say_what_they_cannot_do():
    cases = {
        "head_dim=512": replace(BASE, D=512, S=3),
        "bits=1": replace(BASE, bits=1),
    }
    for package, name in ((tqjax, "pallas_triton"), (tq_torch, "triton"), (tq_torch, "gluon")):
        for came, case in cases.items():
            given = inputs(case)
            arrays = [to_array(package, x) for x in given.arrays]
            needs = f"'{name}' needs .*codes of 2 to 4 bits.*head_dim up to 256.*got .*{came}.*has no such need"
            with pytest.raises(NotImplementedError, match=needs):
                package.fused_qk_scores(*arrays, given.scale, **given.heads, implementation=name)
            assert_same_bits(to_numpy(package.fused_qk_scores(*arrays, given.scale, **given.heads)), oracle(given))


# --- the whole path -------------------------------------------------------------------------------------------


def keys_and_query(head_dim=64, bits=4, dtype=np.float32):
    rng = np.random.default_rng(11)
    keys = rng.standard_normal((2, 2, 70, head_dim)).astype(dtype)
    return keys, rng.standard_normal((2, 8, 3, head_dim)).astype(dtype), Quantizer(head_dim, bits)


@by_name
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_attention_scores_of_compressed_keys(package, head_dim, bits):
    """Measured: against float64 products with the decompressed keys, and near the uncompressed ones."""
    keys, query, quantizer = keys_and_query(head_dim, bits)
    packed = package.compress(to_array(package, keys), quantizer)
    scores = to_numpy(package.attention_scores(to_array(package, query), packed))
    restored = to_numpy(package.decompress(packed)).astype(np.float64)

    def product(k):
        return query.astype(np.float64) @ np.repeat(k, 4, axis=1).swapaxes(-1, -2) / head_dim**0.5

    assert_close(scores, product(restored), 2e-4)
    assert_close(scores, product(keys), 1.25 * quantizer.codebook.distortion**0.5)


@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, "float32"), (4, "bfloat16"), (4, "float16"), (3, "float32"), (2, "float32"), (1, "float32")]
)
def test_encoders_agree_with_the_oracle(package, head_dim, bits, dtype):
    """On a CPU exact where D is a power of two; elsewhere at most one level, about 1 in 10^6; norms within 2 ulp, corrected 8."""
    keys = np.random.default_rng(12).standard_normal((3, 4000, head_dim)).astype(np.float32)
    keys = np.asarray(jnp.asarray(keys).astype(dtype))
    quantizer = Quantizer(head_dim, bits)
    expected = tqcore.compress(keys, quantizer)
    packed = package.compress(to_array(package, keys), quantizer).map(to_numpy)
    got, wanted = (packing.unpack(x.codes, np, bits).astype(int) for x in (packed, expected))
    flips = np.abs(got - wanted)
    ulps = np.abs(packed.norms.view(np.int32).astype(int) - expected.norms.view(np.int32))
    if not CUDA and head_dim & (head_dim - 1) == 0:
        assert not flips.any() and not ulps.any()
    assert flips.max() <= 1 and np.mean(flips) <= 5e-6
    assert ulps[~flips.any(-1)].max() <= {"plain": 2, "corrected": 8}[quantizer.norm]


@by_name
@pytest.mark.parametrize("direction", ["rotate", "unrotate"])
def test_hadamard_is_bitwise_the_same_in_every_framework_on_the_cpu(package, direction):
    x = np.random.default_rng(13).standard_normal((500, 128)).astype(np.float32)
    expected = getattr(tqcore, direction)(x, Quantizer(128))
    rotate = getattr(package, direction)
    assert_same_bits(to_numpy(rotate(cpu_array(package, x), Quantizer(128))), expected)
    if package is tqjax:
        assert_same_bits(np.asarray(jax.jit(rotate, static_argnums=1)(cpu_array(package, x), Quantizer(128))), expected)


@by_name
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_decompress_dtypes(package, dtype):
    keys, _, quantizer = keys_and_query()
    packed = tqcore.compress(keys, quantizer)
    restored = package.decompress(packed.map(lambda x: to_array(package, x)), dtype=dtype)
    assert str(restored.dtype).removeprefix("torch.") == dtype and tuple(restored.shape) == keys.shape
    restored = restored.float() if package is tq_torch else restored
    assert_close(to_numpy(restored), tqcore.decompress(packed), tolerance(dtype, 64))


# --- JAX ------------------------------------------------------------------------------------------------------


def jax_arguments(case=BASE):
    given = inputs(case)
    return [jnp.asarray(x) for x in given.arrays], given


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton", None])
def test_jax_vmap(implementation):
    (q, codes, norms, centroids), given = jax_arguments()

    def scores(q, codes, norms):
        return tqjax.fused_qk_scores(
            q[None], codes[None], norms[None], centroids, given.scale, **given.heads, implementation=implementation
        )[0]

    assert_same_bits(np.asarray(jax.vmap(scores)(q, codes, norms)), oracle(given))
    assert_same_bits(
        np.asarray(jax.jit(jax.vmap(scores, in_axes=(0, None, None)))(q, codes[0], norms[0]))[0], oracle(given)[0]
    )


@pytest.mark.parametrize("implementation", ["xla", "pallas_triton", None])
def test_jax_gradients_are_those_of_the_linear_map(implementation):
    (q, codes, norms, centroids), given = jax_arguments(replace(BASE, T=2, D=80))
    weights = jnp.asarray(np.random.default_rng(14).standard_normal((*q.shape[:3], norms.shape[2])), jnp.float32)

    def loss(q, norms, centroids):
        scores = tqjax.fused_qk_scores(
            q, codes, norms, centroids, given.scale, **given.heads, implementation=implementation
        )
        return jnp.sum(scores * weights)

    def dense(q, norms, centroids):
        keys = jnp.repeat(centroids[packing.unpack(given.packed_indices, np)] * norms[..., None], 4, axis=1)
        return jnp.sum(jnp.einsum("bhtd,bhsd->bhts", q, keys, precision="highest") * given.scale * weights)

    got = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, norms, centroids)
    expected = jax.grad(dense, argnums=(0, 1, 2))(q, norms, centroids)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(np.asarray(a), np.asarray(b), tolerance("float32", 80) * 10)
    half = jax.grad(lambda q: loss(q, norms, centroids))(q.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_jax_packed_vectors_pass_through_transforms():
    keys, query, quantizer = keys_and_query()
    packed = jax.jit(tqjax.compress, static_argnums=1)(keys, quantizer)
    assert isinstance(packed, PackedVectors) and packed.quantizer == quantizer
    scores = jax.jit(tqjax.attention_scores)(query, packed)
    assert_same_bits(np.asarray(scores), np.asarray(tqjax.attention_scores(jnp.asarray(query), packed)))
    _, stacked = jax.lax.scan(lambda carry, k: (carry, tqjax.compress(k, quantizer)), 0, jnp.asarray(keys))
    assert_same_bits(np.asarray(stacked.codes), np.asarray(packed.codes))


def test_jax_checks_under_jit_what_can_be_seen():
    (q, codes, norms, centroids), given = jax_arguments()
    with pytest.raises(ValueError, match="`scale` must be a finite number"):
        jax.jit(lambda *a: tqjax.fused_qk_scores(*a, **given.heads))(q, codes, norms, centroids, 0.1)


# --- torch ----------------------------------------------------------------------------------------------------


def torch_arguments(case=BASE):
    given = inputs(case)
    return [to_array(tq_torch, x) for x in given.arrays], given


class Scores(torch.nn.Module):
    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, q, codes, norms, centroids):
        return tq_torch.fused_qk_scores(q, codes, norms, centroids, self.given.scale, **self.given.heads)


@pytest.mark.parametrize("implementation", ["eager", "triton", None])
def test_torch_opcheck(implementation):
    arrays, given = torch_arguments()
    arrays[0].requires_grad_(), arrays[2].requires_grad_()
    op = torch.ops.tq_torch.fused_qk_scores.default
    torch.library.opcheck(op, (*arrays, None, given.scale, implementation))
    torch.library.opcheck(op, (*arrays[:3], None, 4, given.scale, implementation))


@pytest.mark.parametrize(("head_dim", "norm"), [(64, "corrected"), (96, "plain")])
def test_torch_opcheck_of_the_quantiser(head_dim, norm):
    keys, _, quantizer = keys_and_query(head_dim)
    keys, fields = to_array(tq_torch, keys), (head_dim, 4, quantizer.rotation, 0, norm)
    codes, norms = torch.ops.tq_torch.compress(keys, None, *fields, None)
    torch.library.opcheck(torch.ops.tq_torch.compress.default, (keys, None, *fields, None))
    torch.library.opcheck(torch.ops.tq_torch.decompress.default, (codes, norms, *fields, "float32", False, None))
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.tq_torch.rotate.default, (keys.requires_grad_(), *fields, inverse))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    arrays, given = torch_arguments()
    compiled = torch.compile(Scores(given), fullgraph=True, backend=backend)
    assert_same_bits(to_numpy(compiled(*arrays)), oracle(given))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_torch_compile_of_attention_scores(head_dim):
    keys, query, quantizer = keys_and_query(head_dim)
    packed = tq_torch.compress(to_array(tq_torch, keys), quantizer)
    query = to_array(tq_torch, query)
    compiled = torch.compile(tq_torch.attention_scores, fullgraph=True, backend="aot_eager")
    assert_same_bits(to_numpy(compiled(query, packed)), to_numpy(tq_torch.attention_scores(query, packed)))
    again = torch.compile(tq_torch.compress, fullgraph=True, backend="aot_eager")(to_array(tq_torch, keys), quantizer)
    assert_same_bits(to_numpy(again.codes), to_numpy(packed.codes))


def test_torch_compile_keeps_two_quantizers_apart():
    keys, query, _ = keys_and_query()
    keys, query = to_array(tq_torch, keys), to_array(tq_torch, query)
    first, second = (tq_torch.compress(keys, Quantizer(64, bits, seed=bits)) for bits in (4, 2))

    def both(query, first, second):
        return tq_torch.attention_scores(query, first), tq_torch.attention_scores(query, second)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(query, first, second), both(query, first, second), strict=True):
        assert_same_bits(to_numpy(got), to_numpy(expected))


def test_torch_export():
    arrays, given = torch_arguments()
    program = torch.export.export(Scores(given), tuple(arrays))
    assert_same_bits(to_numpy(program.module()(*arrays)), oracle(given))


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_torch_gradients_are_those_of_the_linear_map(implementation):
    (q, codes, norms, centroids), given = torch_arguments(replace(BASE, T=2, D=80))
    leaves = [x.clone().requires_grad_() for x in (q, norms, centroids)]
    twins = [x.clone().requires_grad_() for x in (q, norms, centroids)]
    scores = tq_torch.fused_qk_scores(
        leaves[0], codes, leaves[1], leaves[2], given.scale, **given.heads, implementation=implementation
    )
    weights = torch.randn_like(scores)
    (scores * weights).sum().backward()
    indices = torch.tensor(packing.unpack(given.packed_indices, np).astype(np.int64), device=DEVICE)
    keys = (twins[2][indices] * twins[1][..., None]).repeat_interleave(4, 1)
    (twins[0] @ keys.mT * given.scale * weights).sum().backward()
    for got, expected in zip(leaves, twins, strict=True):
        assert_close(to_numpy(got.grad), to_numpy(expected.grad), tolerance("float32", 80) * 10)


def test_torch_centroids_changed_in_place_are_read_again():
    (q, codes, norms, centroids), given = torch_arguments()
    module = Scores(given)
    before = module(q, codes, norms, centroids)
    centroids.mul_(2)
    assert_same_bits(to_numpy(module(q, codes, norms, centroids)), to_numpy(before * 2))
    centroids[0] = 9
    with pytest.raises(ValueError, match="`centroids` must be finite and ascending"):
        module(q, codes, norms, centroids)


def test_torch_centroids_changed_in_inference_mode_are_read_again():
    (q, codes, norms, _), given = torch_arguments()
    with torch.inference_mode():
        centroids = torch.tensor(given.centroids, device=DEVICE)
        before = Scores(given)(q, codes, norms, centroids)
        centroids.mul_(2)
        assert_same_bits(to_numpy(Scores(given)(q, codes, norms, centroids)), to_numpy(before * 2))


def test_torch_inference_mode_first_then_training():
    keys, query, _ = keys_and_query()
    quantizer = Quantizer(64, seed=123)
    with torch.inference_mode():
        packed = tq_torch.compress(to_array(tq_torch, keys), quantizer)
        tq_torch.attention_scores(to_array(tq_torch, query), packed)
    packed = tq_torch.compress(to_array(tq_torch, keys), quantizer)
    query = to_array(tq_torch, query).requires_grad_()
    tq_torch.attention_scores(query, packed).sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.gpu
def test_torch_cuda_graph():
    arrays, given = torch_arguments(replace(BASE, S=1000, D=128))
    module = Scores(given)
    module(*arrays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = module(*arrays)
    scores.fill_(float("nan"))
    graph.replay()
    assert_same_bits(to_numpy(scores), oracle(given))


# --- interchange ----------------------------------------------------------------------------------------------


def pointer(array):
    return array.data_ptr() if isinstance(array, torch.Tensor) else array.unsafe_buffer_pointer()


def test_dlpack_both_ways_without_a_copy():
    keys, query, quantizer = keys_and_query()
    ours = tqjax.compress(jnp.asarray(keys), quantizer)
    theirs = tq_torch.from_dlpack(ours)
    back = tqjax.from_dlpack(theirs)
    for a, b, c in ((ours.codes, theirs.codes, back.codes), (ours.norms, theirs.norms, back.norms)):
        assert pointer(a) == pointer(b) == pointer(c)
    rotated = tqcore.rotate(query, quantizer)
    heads = {"n_q_heads": 8, "n_kv_heads": 2}
    scores = [
        to_numpy(package.fused_qk_scores(to_array(package, rotated), packed.codes, packed.norms, to_array(package, quantizer.codebook.centroids), 0.125, **heads))
        for package, packed in ((tqjax, ours), (tq_torch, theirs))
    ]  # fmt: skip
    assert_same_bits(*scores)
    if not CUDA:
        host = tqcore.from_dlpack(theirs)
        assert host.codes.ctypes.data == pointer(ours.codes) and host.norms.ctypes.data == pointer(ours.norms)
