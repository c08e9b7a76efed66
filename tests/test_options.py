"""Corrected norms, centers and residuals: what they promise, in every package, and that the front-ends agree."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import PACKAGES, assert_close, assert_same_bits, cpu_array, to_array, to_numpy, tolerance
from scipy.special import gammaln

import tq_torch
import tqcore
import tqjax
from tqcore import packing
from tqcore.quantizer import PackedVectors, Quantizer

by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
KEYS = np.random.default_rng(21).standard_normal((2, 2, 70, 64)).astype(np.float32)
QUERY = np.random.default_rng(22).standard_normal((2, 8, 3, 64)).astype(np.float32)
CENTERS = {"none": None, "static": (2, 1, 64), "varying": (2, 70, 64), "whole": (2, 2, 70, 64)}


def center_of(name):
    shape = CENTERS[name]
    return None if shape is None else 5 * np.random.default_rng(23).standard_normal(shape).astype(np.float32)


def compressed(package, quantizer, center, keys=KEYS, array=to_array):
    center = None if center is None else array(package, center)
    return package.compress(array(package, keys), quantizer, center=center)


def dense(keys, query=QUERY):
    """⟨query, key⟩ / √D in float64."""
    groups = query.shape[1] // keys.shape[1]
    keys = np.repeat(keys.astype(np.float64), groups, axis=1)
    return query.astype(np.float64) @ keys.swapaxes(-1, -2) / query.shape[-1] ** 0.5


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def total_variation(scores, expected):
    return np.abs(softmax(scores) - softmax(expected)).sum(-1).mean() / 2


# --- bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", [tqjax, tq_torch], ids=lambda package: package.__name__)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", ["plain", "corrected"])
@pytest.mark.parametrize("positions", [None, 1, 3000])
@pytest.mark.parametrize("head_dim", [8, 128])
def test_encoders_return_the_oracles_bits_on_the_cpu(package, head_dim, positions, norm, bits):
    rng = np.random.default_rng(24)
    x = (rng.standard_normal((3000, head_dim)) * np.exp(rng.standard_normal((3000, 1)))).astype(np.float32)
    x[0], x[1, 2], x[2, 3], x[3], x[4], x[5] = 0, np.nan, np.inf, 1e-39, 3e38, 1e-30
    center = None if positions is None else rng.standard_normal((positions, head_dim)).astype(np.float32)
    quantizer = Quantizer(head_dim, bits, norm=norm)
    expected = tqcore.compress(x, quantizer, center=center)
    got = compressed(package, quantizer, center, x, cpu_array).map(to_numpy)
    assert_same_bits(got.codes, expected.codes)
    assert_same_bits(got.norms, expected.norms)


@by_name
def test_mean_of_keys_has_the_oracles_bits_on_the_cpu(package):
    keys = KEYS.astype(np.float16) + np.float16(3)
    expected = tqcore.key_center(keys)
    assert_same_bits(to_numpy(package.key_center(cpu_array(package, keys))), expected)
    assert_close(expected, keys.astype(np.float64).mean(-2, keepdims=True), 1e-6)


def test_jax_rounds_keys_and_their_center_before_the_difference():
    """Where one program computes all three, XLA would fuse the last product of either into the subtraction."""
    weights = np.random.default_rng(30).standard_normal(64).astype(np.float32)
    keys = (KEYS + 3) * weights
    center = tqcore.key_center(keys)
    expected = tqcore.compress(keys, Quantizer(64), center=center)

    def compress(x, weights):
        keys = x * weights
        return tqjax.compress(keys, Quantizer(64), center=tqjax.key_center(keys))

    arrays = cpu_array(tqjax, KEYS + 3), cpu_array(tqjax, weights)
    got = jax.tree.map(np.asarray, jax.jit(compress)(*arrays))
    for a, b in ((got.codes, expected.codes), (got.norms, expected.norms), (got.center, center)):
        assert_same_bits(a, b)


# --- norms -----------------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("rotation", ["hadamard", "haar"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_corrected_norms_restore_the_inner_product_with_oneself(package, bits, rotation):
    def ratios(norm):
        packed = compressed(package, Quantizer(64, bits, rotation=rotation, norm=norm), None)
        restored = to_numpy(package.decompress(packed)).astype(np.float64)
        return (restored * KEYS).sum(-1) / (KEYS.astype(np.float64) ** 2).sum(-1)

    np.testing.assert_allclose(ratios("corrected"), 1, rtol=2e-6)
    assert abs(ratios("plain").mean() - 1 + Quantizer(64, bits).codebook.distortion) < 0.01


def test_norms_where_none_is_asked_for():
    norms = [Quantizer(64, bits).norm for bits in (1, 2, 3, 4)]
    assert norms == ["plain", "plain", "corrected", "corrected"] and Quantizer(64, qjl=True).norm == "plain"


@by_name
@pytest.mark.parametrize("quantizer", [Quantizer(64, 3, norm="corrected"), Quantizer(64, 3, qjl=True)], ids=str)
@pytest.mark.parametrize("center", ["none", "static"])
def test_odd_vectors(package, quantizer, center):
    """NaN and infinity give a NaN norm; what is zero, or below 2^-100, after centering gives norm 0."""
    center = center_of(center)
    middle = np.zeros((2, 1, 64), np.float32) if center is None else center
    x = np.broadcast_to(middle, (2, 6, 64)).copy()
    x[:, 0, 3], x[:, 1, 4], x[:, 2, 5], x[:, 4] = np.nan, np.inf, -np.inf, x[:, 4] + 1
    if center is None:
        x[:, 3], x[:, 5] = 1e-39, 2.0**-101
    packed = compressed(package, quantizer, center, x)
    for part in (packed, packed.residual) if quantizer.qjl else (packed,):
        norms = to_numpy(part.norms)
        assert np.isnan(norms[:, :3]).all() and not norms[:, [3, 5]].any()
        assert np.isfinite(norms[:, 4]).all() and (norms[:, 4] > 0).all()
    restored = to_numpy(package.decompress(packed))
    assert np.isnan(restored[:, :3]).any(-1).all()
    assert_same_bits(restored[:, 3] + np.float32(0), np.broadcast_to(middle[:, 0], (2, 64)).copy())


@by_name
@pytest.mark.parametrize(
    "quantizer", [Quantizer(64), Quantizer(64, 2, norm="corrected"), Quantizer(64, qjl=True)], ids=str
)
@pytest.mark.parametrize("shape", [(2, 2, 0, 64), (0, 2, 5, 64)])
def test_empty_batches(package, quantizer, shape):
    center = np.ones((2, 1, 64), np.float32)
    packed = compressed(package, quantizer, center, np.zeros(shape, np.float32))
    assert packed.shape == shape and tuple(package.decompress(packed).shape) == shape
    query = to_array(package, np.ones((shape[0], 4, 3, 64), np.float32))
    scores = package.attention_scores(query, packed, add_center=True)
    assert tuple(scores.shape) == (shape[0], 4, 3, shape[2])


# --- centers ---------------------------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("center", CENTERS)
@pytest.mark.parametrize("qjl", [False, True])
def test_scores_of_centered_keys(package, center, qjl):
    """Those of the decompressed keys, or these less one number a row where the center is left out."""
    center, quantizer = center_of(center), Quantizer(64, qjl=qjl)
    offset = np.zeros_like(KEYS) if center is None else np.broadcast_to(center, KEYS.shape)
    packed = compressed(package, quantizer, center, KEYS + offset)
    query, restored = to_array(package, QUERY), to_numpy(package.decompress(packed))
    assert_close(restored - offset, KEYS, 0.15)
    assert_close(to_numpy(package.attention_scores(query, packed, add_center=True)), dense(restored), 2e-4)
    left_out = center is None or center.shape[-2] == 1
    expected = dense(restored - offset) if left_out else dense(restored)
    assert_close(to_numpy(package.attention_scores(query, packed)), expected, 2e-4)
    if left_out:
        assert_same_bits(
            to_numpy(package.attention_scores(query, packed, add_center=False)),
            to_numpy(package.attention_scores(query, packed)),
        )


@by_name
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_centering_saves_keys_with_an_offset(package, bits):
    """Keys with a constant offset ten times their spread, scores of standard deviation 3 besides."""
    rng = np.random.default_rng(25)
    keys = (rng.standard_normal((1, 2, 1024, 128)) + 10 * rng.standard_normal((1, 2, 1, 128))).astype(np.float32)
    query = 3 * rng.standard_normal((1, 4, 16, 128)).astype(np.float32)
    quantizer, expected = Quantizer(128, bits), dense(keys, query)
    variations = []
    for center in (None, to_numpy(package.key_center(to_array(package, keys)))):
        packed = compressed(package, quantizer, center, keys)
        scores = to_numpy(package.attention_scores(to_array(package, query), packed))
        variations.append(total_variation(scores.astype(np.float64), expected))
    without, centered = variations
    least, most = {2: (0.9, 0.45), 3: (0.8, 0.25), 4: (0.65, 0.15)}[bits]
    assert centered <= most and without >= least, (without, centered)


def rotated(x, positions, theta, interleaved):
    """Rotary embedding as complex numbers, float64."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (first + 1j * second) * np.exp(1j * positions[:, None] * theta ** (-np.arange(half) / half))
    if interleaved:
        return np.stack([turned.real, turned.imag], -1).reshape(*turned.shape[:-1], -1)
    return np.concatenate([turned.real, turned.imag], -1)


@by_name
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_center_is_the_rotated_bias(package, interleaved):
    rng = np.random.default_rng(26)
    bias, positions = rng.standard_normal((2, 64)).astype(np.float32), np.arange(7, 77, dtype=np.int32)
    expected = rotated(bias[:, None].astype(np.float64), positions, 1e6, interleaved)
    arrays = to_array(package, bias), to_array(package, positions)
    center = to_numpy(package.rotary_center(*arrays, theta=1e6, interleaved=interleaved))
    assert center.dtype == np.float32
    assert_close(center, expected, 1e-5)
    default = to_numpy(package.rotary_center(*arrays))
    assert_close(default, rotated(bias[:, None].astype(np.float64), positions, 1e4, False), 1e-5)


def test_rotary_center_saves_keys_that_their_mean_does_not():
    rng = np.random.default_rng(27)
    positions, bias = np.arange(1024), 10 * rng.standard_normal((2, 128))
    spread = rng.standard_normal((1, 2, 1024, 128))
    keys = (spread + rotated(bias[:, None], positions, 1e4, False)).astype(np.float32)
    query = 3 * rng.standard_normal((1, 4, 16, 128)).astype(np.float32)
    centers = tqcore.key_center(keys), tqcore.rotary_center(bias.astype(np.float32), positions)
    scores = [tqcore.attention_scores(query, tqcore.compress(keys, Quantizer(128), center=c)) for c in centers]
    mean, exact = (total_variation(s.astype(np.float64), dense(keys, query)) for s in scores)
    assert exact <= 0.15 and mean >= 3 * exact, (mean, exact)


# --- residuals -------------------------------------------------------------------------------------------------


def residual_errors(quantizers, x, q):
    """⟨q, x̂ - x⟩ / (‖q‖·‖x‖), a row for each quantizer."""
    errors = []
    for quantizer in quantizers:
        restored = tqcore.decompress(tqcore.compress(x, quantizer)).astype(np.float64)
        errors.append(((restored - x) * q).sum(-1))
    return np.array(errors) / (np.linalg.norm(q, axis=-1) * np.linalg.norm(x, axis=-1))


def test_residual_signs_are_unbiased():
    """Over rotations, 100 of them for each of 1000 fixed pairs; scores of 3 bits alone are not."""
    rng = np.random.default_rng(28)
    x = rng.standard_normal((1000, 32)).astype(np.float32)
    q = x + 0.5 * rng.standard_normal((1000, 32)) + 1
    means = residual_errors([Quantizer(32, 3, qjl=True, seed=seed) for seed in range(100)], x, q).mean(-1)
    assert abs(means.mean()) <= 3 * means.std(ddof=1) / 10
    biased = residual_errors([Quantizer(32, 3, norm="plain", seed=seed) for seed in range(100)], x, q).mean(-1)
    assert abs(biased.mean()) > 30 * biased.std(ddof=1) / 10


@pytest.mark.parametrize("head_dim", [32, 128])
def test_variance_of_signs(head_dim):
    """‖q‖² sin²φ · E[1/ρ² - 1] / (D - 1) for a unit vector, ρ its cosine with its signs; EDEN's estimate."""
    rng = np.random.default_rng(29)
    x = rng.standard_normal((100_000, head_dim)).astype(np.float32)
    q = rng.standard_normal((100_000, head_dim)) + 0.2 * x
    quantizer = Quantizer(head_dim, 1, rotation="haar", norm="corrected")
    (errors,) = residual_errors([quantizer], x, q)
    cosine = (q * x).sum(-1) / (np.linalg.norm(q, axis=-1) * np.linalg.norm(x, axis=-1))
    mean = np.exp(gammaln(head_dim / 2) - gammaln((head_dim + 1) / 2)) * (head_dim / np.pi) ** 0.5  # E ρ
    square = 1 / head_dim + (head_dim - 1) * 2 / (np.pi * head_dim)  # E ρ²
    inverse = 1 / mean**2 + 3 * (square - mean**2) / mean**4  # E 1/ρ², to second order
    expected = np.mean(1 - cosine**2) * (inverse - 1) / (head_dim - 1)
    assert abs(np.mean(errors**2) / expected - 1) < 0.02
    assert abs(np.mean(errors)) <= 3 * errors.std() / 100_000**0.5
    assert np.mean(errors**2) < np.pi / 2 / head_dim  # of signs of Gaussian projections, the paper's


@by_name
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_residuals_agree_with_the_oracle(package, bits, head_dim):
    """Haar products differ in the last place between libraries, so that a sign in 10^5 may."""
    keys, quantizer = np.resize(KEYS, (500, head_dim)), Quantizer(head_dim, bits, qjl=True)
    expected = tqcore.compress(keys, quantizer)
    packed = compressed(package, quantizer, None, keys)
    assert packed.residual.quantizer == quantizer.residual and packed.residual.codes.shape[-1] == head_dim // 8
    got = to_numpy(packed.residual.codes)
    assert np.mean(packing.unpack(got ^ expected.residual.codes, np, 1)) <= 1e-4
    assert packed.nbytes == 500 * (head_dim * bits // 8 + 8)
    restored = to_numpy(package.decompress(packed))
    assert_close(restored, tqcore.decompress(expected), 2e-3)
    assert_close(restored, keys, 1.1 * ((np.pi / 2 - 1) * Quantizer(head_dim, bits - 1).codebook.distortion) ** 0.5)


def test_the_residuals_rotation_is_of_a_stream_of_its_own():
    first, second = (Quantizer(64, qjl=True, rotation="haar", seed=seed) for seed in (0, 1))
    assert first.residual is not None and second.residual is not None
    assert len({first.seed, second.seed, first.residual.seed, second.residual.seed}) == 4
    assert first.residual.seed == 973335682


# --- as the frameworks see them --------------------------------------------------------------------------------

OPTIONS = [
    (Quantizer(64, 3), "static"),
    (Quantizer(64, 2), "varying"),
    (Quantizer(64, 4, qjl=True), "none"),
    (Quantizer(64, 2, qjl=True, norm="corrected"), "varying"),
]


@pytest.mark.parametrize(("quantizer", "center"), OPTIONS, ids=str)
def test_jax_transforms(quantizer, center):
    center = center_of(center)
    packed = jax.jit(tqjax.compress, static_argnums=1)(KEYS, quantizer, center=center)
    plain = tqjax.compress(jnp.asarray(KEYS), quantizer, center=center)
    assert_same_bits(np.asarray(packed.codes), np.asarray(plain.codes))
    scores = np.asarray(jax.jit(tqjax.attention_scores)(QUERY, packed))
    assert_close(scores, np.asarray(tqjax.attention_scores(jnp.asarray(QUERY), packed)), tolerance("float32", 64))
    gradient = jax.grad(lambda query: tqjax.attention_scores(query, packed, add_center=True).sum())(jnp.asarray(QUERY))
    restored = np.asarray(tqjax.decompress(packed)).repeat(4, axis=1)
    assert_close(np.asarray(gradient), np.broadcast_to(restored.sum(-2, keepdims=True) / 8, QUERY.shape), 1e-4)
    assert np.asarray(jax.vmap(lambda keys: tqjax.compress(keys, quantizer))(KEYS).codes).shape == packed.codes.shape
    assert jax.jit(tqjax.key_center)(KEYS).shape == (2, 2, 1, 64)


@pytest.mark.parametrize(("quantizer", "center"), OPTIONS, ids=str)
def test_torch_compile(quantizer, center):
    center = center_of(center)
    center = None if center is None else to_array(tq_torch, center)
    keys, query = to_array(tq_torch, KEYS), to_array(tq_torch, QUERY).requires_grad_()

    def both(keys, query, center):
        packed = tq_torch.compress(keys, quantizer, center=center)
        return packed.codes, tq_torch.attention_scores(query, packed), tq_torch.decompress(packed)

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(keys, query, center)
    expected = both(keys, query, center)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(to_numpy(a), to_numpy(b))
    packed = tq_torch.compress(keys, quantizer, center=center)
    tq_torch.attention_scores(query, packed, add_center=True).sum().backward()
    restored = to_numpy(tq_torch.decompress(packed)).repeat(4, axis=1)
    assert_close(to_numpy(query.grad), np.broadcast_to(restored.sum(-2, keepdims=True) / 8, QUERY.shape), 1e-4)


@pytest.mark.parametrize(("quantizer", "center"), OPTIONS, ids=str)
def test_dlpack_and_bytes(quantizer, center):
    ours = compressed(tqjax, quantizer, center_of(center))
    theirs = tq_torch.from_dlpack(ours)
    leaves = jax.tree.leaves(ours)
    assert ours.nbytes == theirs.nbytes == sum(leaf.nbytes for leaf in leaves)
    for a, b in zip(leaves, jax.tree.leaves(tqjax.from_dlpack(theirs)), strict=True):
        assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()


@pytest.mark.parametrize(("quantizer", "center"), OPTIONS, ids=str)
@pytest.mark.parametrize(("writer", "reader"), [(tqcore, tqjax), (tqjax, tq_torch), (tq_torch, tqcore)])
def test_files(writer, reader, quantizer, center, tmp_path):
    packed = compressed(writer, quantizer, center_of(center))
    plain = compressed(writer, Quantizer(64, 1), None)
    writer.save_file({"layer": packed, "layer.residual": plain}, tmp_path / "many")
    writer.save_file(packed, tmp_path / "one")
    many, one = reader.load_file(tmp_path / "many"), reader.load_file(tmp_path / "one")
    assert many["layer.residual"].center is None and many["layer.residual"].residual is None
    for got in (many["layer"], one):
        assert got.quantizer == quantizer and got.quantizer.residual == quantizer.residual
        expected, got = jax.tree.leaves(packed.map(to_numpy)), jax.tree.leaves(got.map(to_numpy))
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert_same_bits(a, b)


# --- errors ----------------------------------------------------------------------------------------------------

X, Q = KEYS[0], QUERY[:1]
QJL = Quantizer(64, 3, qjl=True)
STATIC, VARYING = (tqcore.compress(KEYS[:1], Quantizer(64), center=np.ones((2, s, 64), np.float32)) for s in (1, 70))
SIGNED = tqcore.compress(KEYS[:1], QJL)
FITS = "`center` must be an array [..., 1 or S, D] that broadcasts to the vectors' shape, "
BAD = {
    "center dtype": (lambda p, a: p.compress(a(X), Quantizer(64), center=a(X.astype(np.float16))), "`center` must be an array [..., 1 or S, D] of float32, got shape [2, 70, 64], dtype float16."),
    "center type": (lambda p, a: p.compress(a(X), Quantizer(64), center=1.0), "`center` must be an array [..., 1 or S, D] of float32, got an object of type float."),
    "center S": (lambda p, a: p.compress(a(X), Quantizer(64), center=a(X[:, :3])), FITS + "got [2, 3, 64] for vectors of shape [2, 70, 64]."),
    "center D": (lambda p, a: p.compress(a(X), Quantizer(64), center=a(X[:, :, :1])), FITS + "got [2, 70, 1] for vectors of shape [2, 70, 64]."),
    "center rank": (lambda p, a: p.compress(a(X), Quantizer(64), center=a(X[0, 0])), "`center` must be an array [..., 1 or S, D] of float32, got shape [64], dtype float32."),
    "center of more axes": (lambda p, a: p.compress(a(X), Quantizer(64), center=a(KEYS)), FITS + "got [2, 2, 70, 64] for vectors of shape [2, 70, 64]."),
    "packed center": (lambda p, a: p.decompress(replace(STATIC, center=np.ones((3, 1, 64), np.float32)).map(a)), FITS.replace("center", "packed.center") + "got [3, 1, 64] for vectors of shape [1, 2, 70, 64]."),
    "center left out": (lambda p, a: p.attention_scores(a(Q), VARYING.map(a), add_center=False), "`add_center` must be None or True where `keys.center` varies along S, since a softmax would see it, got False for a center of shape [2, 70, 64]."),
    "add_center": (lambda p, a: p.attention_scores(a(Q), STATIC.map(a), add_center="yes"), "`add_center` must be None, True or False, got 'yes'."),
    "no residual": (lambda p, a: p.attention_scores(a(Q), PackedVectors(a(SIGNED.codes), a(SIGNED.norms), QJL)), "`keys.residual` must be PackedVectors where qjl is True, and None elsewhere, got an object of type NoneType, qjl=True."),
    "a residual": (lambda p, a: p.decompress(replace(STATIC, residual=SIGNED.residual).map(a)), "`packed.residual` must be PackedVectors where qjl is True, and None elsewhere, got an object of type PackedVectors, qjl=False."),
    "another residual": (lambda p, a: p.decompress(replace(SIGNED, residual=tqcore.compress(KEYS[:1], Quantizer(64, 1))).map(a)), "`packed.residual` must be vectors of `packed`'s shape and of Quantizer(head_dim=64, bits=1, rotation='haar', seed=973335682, norm='corrected', qjl=False), got shape [1, 2, 70, 64], Quantizer("),
    "mean of nothing": (lambda p, a: p.key_center(a(X[:, :0])), "`keys` must have at least one position along S, got shape [2, 0, 64]."),
    "mean dtype": (lambda p, a: p.key_center(a(X.astype(np.int32))), "`keys` must be an array [..., S, D] of float32, bfloat16 or float16, got shape [2, 70, 64], dtype int32."),
    "bias D": (lambda p, a: p.rotary_center(a(X[0, 0, :63]), a(np.arange(3))), "the last axis of `bias` must be even, got shape [63]."),
    "positions": (lambda p, a: p.rotary_center(a(X[0, 0]), a(np.ones((1, 3), np.int32))), "`positions` must be an array [S] of float32, bfloat16, float16, int32 or int64, got shape [1, 3], dtype int32."),
    "theta": (lambda p, a: p.rotary_center(a(X[0, 0]), a(np.arange(3)), theta=0), "`theta` must be a positive number within float32, got 0."),
    "norm": (lambda p, a: p.Quantizer(64, norm="l2"), "`norm` must be None, 'plain' or 'corrected', got 'l2'."),
    "qjl": (lambda p, a: p.Quantizer(64, qjl=1), "`qjl` must be True or False, got 1."),
    "qjl of one bit": (lambda p, a: p.Quantizer(64, 1, qjl=True), "`bits` must be at least 2 where qjl is True, one of them for signs, got 1."),
    "qjl of D": (lambda p, a: p.Quantizer(66, 4, qjl=True), "`head_dim` must be a multiple of 8 for "),
}  # fmt: skip


@by_name
@pytest.mark.parametrize("name", BAD)
def test_bad_calls(package, name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(package, lambda x: to_array(package, x))


def test_devices_of_centers():
    keys, center = to_array(tq_torch, KEYS), torch.ones(1, 64, device="meta")
    with pytest.raises(ValueError, match="`x`, `center` must be on one device, got x on (cpu|cuda:0), center on meta"):
        tq_torch.compress(keys, Quantizer(64), center=center)
    first, second = jax.devices()[0], jax.devices("cpu")[-1]
    with pytest.raises(ValueError, match="`x`, `center` must be on one device"):
        tqjax.compress(
            jax.device_put(KEYS, first), Quantizer(64), center=jax.device_put(np.ones((1, 64), np.float32), second)
        )


@by_name
def test_files_that_lack_a_part(package, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    packed = tqcore.compress(KEYS, QJL, center=center_of("static"))
    tqcore.save_file({"layer": packed}, tmp_path / "whole")
    with safe_open(tmp_path / "whole", "numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sorted(arrays) == [
        f"layer.{part}" for part in ("center", "codes", "norms", "residual_codes", "residual_norms")
    ]

    def refused(changed, match, **changes):
        kept = {name: array for name, array in (arrays | changed).items() if array is not None}
        save_file(kept, tmp_path / "part", metadata | changes)
        with pytest.raises(ValueError, match=match):
            package.load_file(tmp_path / "part")

    for name in arrays:
        refused({name: None}, r"must hold the arrays \['layer.center', 'layer.codes', .*\], got \[")
    refused({"layer.scale": arrays["layer.norms"]}, "must hold the arrays .*, got .*'layer.scale'")
    refused({}, "must hold the arrays .*, got .*'layer.center'", centered="[]")
    refused({}, "must list in JSON which vectors have a center, got '5'", centered="5")
    refused({"layer.center": np.ones((3, 1, 64), np.float32)}, r"`layer.center` must be .*, got \[3, 1, 64\]")
    refused({"layer.center": np.ones((2, 1, 64), np.float64)}, "`layer.center` must be .* of float32, got .* float64")
    refused({"layer.residual_codes": arrays["layer.codes"]}, "the last axis of `layer.residual.codes` must be head_dim")
    refused({"layer.residual_norms": arrays["layer.norms"][:1]}, "`layer.residual.norms` must have the shape of")
