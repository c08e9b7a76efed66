"""The codebook, the rotation and the oracle, against what they are by definition."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from backends import assert_close
from cases import BASE, Case, inputs, oracle
from scipy.integrate import quad

import tqcore
from tqcore import codebook, fixed_point, packing, rotation
from tqcore.codebook import LITERALS, Codebook, expected_distortion, lloyd_max, solve_dyadic

DIMS = [32, 64, 80, 96, 112, 128, 160, 192, 256, 512]


# --- codebook -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", DIMS)
def test_literals_are_the_solution(head_dim):
    for bits in (1, 2, 3, 4):
        assert LITERALS[head_dim, bits] == solve_dyadic(head_dim, bits)


@pytest.mark.parametrize("head_dim", [4, 64, 128])
def test_moments_match_quadrature(head_dim):
    edges = np.array([-1.0, -0.2, 0.05, 0.3, 1.0])
    weight = quad(lambda x: (1 - x * x) ** ((head_dim - 3) / 2), -1, 1)[0]

    def integral(power):
        return [
            quad(lambda x: x**power * (1 - x * x) ** ((head_dim - 3) / 2) / weight, a, b)[0] for a, b in pairwise(edges)
        ]

    np.testing.assert_allclose(codebook.cell_mass(edges, head_dim), integral(0), atol=1e-9)
    np.testing.assert_allclose(codebook.cell_moment(edges, head_dim), integral(1), atol=1e-9)


@pytest.mark.parametrize("head_dim", [2, 4, 30, 100, *DIMS, 1024])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_dyadic_distortion_is_near_the_optimum(head_dim, bits):
    book = Codebook(head_dim, bits)
    optimum = expected_distortion(lloyd_max(head_dim, bits), head_dim)
    assert 1 - 1e-9 <= book.distortion / optimum <= 1.006


def test_distortion_anchors():
    """D·MSE at D = 128, from peers.md: absolute, since backends can agree on a wrong number."""
    for bits, anchor in ((1, 0.3609), (2, 0.1160), (3, 0.0340), (4, 0.00931)):
        assert abs(expected_distortion(lloyd_max(128, bits), 128) / anchor - 1) < 1.5e-3


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_sampled_distortion_within_one_percent_of_the_optimum(head_dim, bits):
    x = np.random.default_rng(7).standard_normal((20_000, head_dim)).astype(np.float32)
    restored = tqcore.decompress(tqcore.compress(x, tqcore.Quantizer(head_dim, bits, norm="plain")))
    sampled = np.mean(np.sum((x - restored) ** 2, -1) / np.sum(x**2, -1))
    optimum = expected_distortion(lloyd_max(head_dim, bits), head_dim)
    assert abs(sampled / optimum - 1) < 0.01


def test_codebook_arrays_are_exact():
    for head_dim in DIMS:
        book = Codebook(head_dim, 4)
        assert book.levels.dtype == np.int8 and np.array_equal(book.levels, -book.levels[::-1])
        for dtype in (np.float16, np.float32):
            assert np.array_equal(book.centroids.astype(dtype).astype(np.float64) * 2.0**book.exponent, book.levels)
        assert np.array_equal(book.boundaries * 2, book.centroids[1:] + book.centroids[:-1])
        with pytest.raises(ValueError, match="read-only"):
            book.centroids[0] = 0


# --- rotation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantizer", [tqcore.Quantizer(64), tqcore.Quantizer(96), tqcore.Quantizer(128, rotation="haar")]
)
def test_rotation_is_orthogonal_and_inverted(quantizer):
    R = rotation.matrix(quantizer).astype(np.float64)
    np.testing.assert_allclose(R @ R.T, np.eye(quantizer.head_dim), atol=3e-7)
    x = np.random.default_rng(1).standard_normal((50, quantizer.head_dim)).astype(np.float32)
    np.testing.assert_allclose(tqcore.rotate(x, quantizer), x @ R.T, atol=5e-6)
    np.testing.assert_allclose(tqcore.unrotate(tqcore.rotate(x, quantizer), quantizer), x, atol=2e-6)


def test_hadamard_is_sylvesters():
    H = np.array([[1.0]])
    for _ in range(5):
        H = np.block([[H, H], [H, -H]])
    assert np.array_equal(rotation.hadamard(np.eye(32), np), H)


def test_seeds_give_other_rotations_and_never_the_plain_stream():
    first, second = (rotation.signs(tqcore.Quantizer(128, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(first, second)
    plain = np.random.PCG64(np.random.SeedSequence(0)).random_raw(2).astype("<u8").view(np.uint8)
    assert not np.array_equal(first < 0, np.unpackbits(plain, bitorder="little").astype(bool))


def test_keys_with_a_constant_offset_survive():
    """Unsigned Hadamard puts a constant vector on one axis: relative error 0.37 in place of 0.009."""
    x = np.random.default_rng(2).standard_normal((2_000, 128)).astype(np.float32) * 0.1 + 3
    restored = tqcore.decompress(tqcore.compress(x, tqcore.Quantizer(128)))
    assert np.mean(np.sum((x - restored) ** 2, -1) / np.sum(x**2, -1)) < 0.02


# --- quantiser ------------------------------------------------------------------------------------------------


def test_a_coordinate_on_a_boundary_takes_the_lower_index():
    quantizer = tqcore.Quantizer(4, 2)
    boundary = float(quantizer.codebook.boundaries[2])
    rest = np.float32(np.sqrt((1 - boundary**2) / 3))
    rotated = np.array([[boundary, rest, rest, rest]], np.float32)
    x = tqcore.unrotate(rotated, quantizer)
    again = tqcore.rotate(x, quantizer)[0, 0]
    norm = np.float32(tqcore.compress(x, quantizer).norms[0])
    index = packing.unpack(tqcore.compress(x, quantizer).codes, np, 2)[0, 0]
    assert index == 2 + (again > np.float32(boundary) * norm)
    zero = packing.unpack(tqcore.compress(np.zeros((1, 4), np.float32), quantizer).codes, np, 2)
    assert np.all(zero == 1)  # +0 lies on the middle boundary


@pytest.mark.parametrize("magnitude", [2.0**-99, 1e-20, 1.0, 1e20, 2.0**120])
def test_norms_hold_over_the_float_range(magnitude):
    x = (np.random.default_rng(3).standard_normal((20, 64)) * magnitude).astype(np.float32)
    packed = tqcore.compress(x, tqcore.Quantizer(64, norm="plain"))
    np.testing.assert_allclose(packed.norms, np.linalg.norm(x.astype(np.float64), axis=-1), rtol=3e-7)
    scaled = (
        tqcore.compress(x / np.float32(magnitude), tqcore.Quantizer(64, norm="plain"))
        if magnitude in (2.0**-99, 2.0**120)
        else packed
    )
    assert np.array_equal(packed.codes, scaled.codes)


def test_zero_subnormal_and_non_finite_vectors():
    x = np.ones((5, 64), np.float32)
    x[0], x[1], x[2, 3], x[3, 0] = 0, 1e-39, np.nan, np.inf
    packed = tqcore.compress(x, tqcore.Quantizer(64, norm="plain"))
    assert np.array_equal(packed.norms[:2], [0, 0]) and np.all(np.isnan(packed.norms[2:4])) and packed.norms[4] == 8
    assert np.all(packed.codes[:4] == 0x77)


def test_nbytes_and_shape():
    for bits in (1, 2, 3, 4):
        packed = tqcore.compress(np.ones((2, 3, 5, 128), np.float32), tqcore.Quantizer(128, bits))
        assert packed.shape == (2, 3, 5, 128)
        assert packed.nbytes == 2 * 3 * 5 * (16 * bits + 4)


# --- scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["dyadic", "gaussian", "eight", "random", "largest"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_scores_are_near_the_float64_product(table, head_dim):
    given = inputs(Case(D=head_dim, T=3, table=table))
    centroids = np.pad(given.centroids, (0, 16 - len(given.centroids)), mode="edge").astype(np.float64)
    keys = centroids[packing.unpack(given.packed_indices, np)] * given.norms[..., None]
    keys = np.repeat(keys, given.n_q_heads // given.n_kv_heads, axis=1)
    assert_close(oracle(given), given.q_rotated.astype(np.float64) @ keys.swapaxes(-1, -2) * given.scale, 2e-4)


def test_scores_follow_the_format_in_rational_arithmetic():
    """docs/format.md, step by step, on one score, in exact fractions."""
    given = inputs(BASE)
    q, norm = given.q_rotated[0, 0, 0], given.norms[0, 0, 5]
    indices = packing.unpack(given.packed_indices, np)[0, 0, 5]
    largest, e = Fraction(float(np.abs(q).max())), -100
    while largest > fixed_point.QUERY_LIMIT * Fraction(2) ** e:
        e += 1
    n = [round(Fraction(float(value)) / Fraction(2) ** e) for value in q]
    book = Codebook(64, 4)
    total = sum(a * int(book.levels[i]) for a, i in zip(n, indices, strict=True))
    row = np.float32(given.scale) * np.float32(2.0 ** (e - book.exponent))
    assert oracle(given)[0, 0, 0, 5] == np.float32(total) * (norm * row)


@pytest.mark.parametrize("limit", [fixed_point.QUERY_LIMIT, fixed_point.LEVEL_LIMIT, 1])
def test_exponent_is_the_smallest(limit):
    values = np.concatenate([
        limit * 2.0 ** np.arange(-90, 100),
        np.nextafter(np.float32(limit) * np.float32(2) ** np.arange(-90, 100, dtype=np.float32), np.float32(np.inf)),
        np.random.default_rng(4).random(1000) * 1e6,
    ]).astype(np.float32)  # fmt: skip
    e = fixed_point.exponent(values.view(np.int32), limit).astype(np.float64)
    assert np.all(values <= limit * 2.0**e) and np.all(values > limit * 2.0 ** (e - 1))


@pytest.mark.parametrize("table", ["dyadic", "eight", "one", "random", "gaussian"])
def test_one_plane_and_two_give_the_same_bits(table):
    """A traced table is always read as two planes."""
    given = inputs(Case(table=table, D=128))
    one = fixed_point.score_table(given.centroids)
    if len(one.planes) == 2:
        assert table in ("random", "gaussian", "one")
        return
    two = fixed_point.ScoreTable(np.stack([np.zeros_like(one.planes[0]), one.planes[0]]), one.step)
    n = np.random.default_rng(5).integers(-16319, 16320, (1, 2, 4, 128)).astype(np.int32)
    indices = packing.unpack(given.packed_indices, np)[:1]
    products = [tqcore.reference._integer_products(n, t.planes, indices) for t in (one, two)]
    assert np.array_equal(*products)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_packing_is_a_bijection(bits):
    everything = np.stack(np.meshgrid(*[np.arange(256, dtype=np.uint8)[::5]] * 3), -1).reshape(-1, 3)
    indices = packing.unpack(everything, np, bits)
    assert indices.shape[-1] == 24 // bits and indices.max() < 2**bits
    assert np.array_equal(packing.pack(indices, np, bits), everything)


def test_packing_is_that_of_the_format():
    """docs/format.md, bit by bit."""
    indices = np.random.default_rng(6).integers(0, 8, (5, 48), dtype=np.uint8)
    bit = {k: (indices >> k & 1).astype(int) for k in range(3)}
    four, two, one = (packing.pack(indices & (2**bits - 1), np, bits).astype(int) for bits in (4, 2, 1))
    three = packing.pack(indices, np, 3).astype(int)
    for d in range(48):
        nibble = four[:, d // 2] >> (4 if d % 2 == 0 else 0)
        assert np.array_equal(nibble & 15, indices[:, d])
        for plane in (two, three[:, :12]):
            pair = plane[:, d // 4] >> (6 - 2 * (d % 4))
            assert np.array_equal(pair & 3, indices[:, d] & 3)
        assert np.array_equal(one[:, d // 8] >> (7 - d % 8) & 1, bit[0][:, d])
        place = [0, 1, 4, 5, 2, 3, 6, 7].index(d % 8)
        assert np.array_equal(three[:, 12 + d // 8] >> (7 - place) & 1, bit[2][:, d])


def test_three_bit_nibbles_stand_beside_each_other():
    """What lets a kernel put the planes together by shifts and masks: a nibble of highs serves two of lows."""
    codes = packing.pack(np.arange(8, dtype=np.uint8)[None], np, 3)[0].astype(int)
    low, high = codes[:2], codes[2]
    for shift in (4, 0):
        pairs = [(byte >> shift & 15) >> place & 3 for byte in low for place in (2, 0)]
        highs = [high >> shift >> place & 1 for place in (3, 2, 1, 0)]
        together = [4 * h + p for h, p in zip(highs, pairs, strict=True)]
        assert together == ([0, 1, 4, 5] if shift else [2, 3, 6, 7])
