"""Exact: every backend returns the oracle's bits, for every case."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import torch
from backends import BACKENDS, CUDA, assert_same_bits, to_array, to_numpy
from cases import BASE, CASES, Case, inputs, oracle
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tq_torch
import tqcore
import tqjax
from tq_torch import triton_call
from tqcore import fixed_point
from tqcore.kernels import lookup
from tqcore.tuning import ScoreConfig
from tqjax import pallas_scores

KERNELS = ("triton", "pallas_triton", "gluon")  # "gluon_long" is the second half of "gluon", for many rows
GLUON = any(backend.implementation == "gluon" for backend in BACKENDS)
CONFIGS = [
    ScoreConfig(8, 64, 1, 4, 1),
    ScoreConfig(8, 64, 3, 4, 3),
    ScoreConfig(8, 128, 16, 4, 3),
    ScoreConfig(8, 256, 2, 8, 2),
    ScoreConfig(16, 128, 2, 4, 2),
    ScoreConfig(32, 64, 2, 4, 3),
]
TABLES = [("dyadic", 4), ("random", 4)]
if CUDA:  # narrow codes differ in layouts, which interpreters do not have
    TABLES += [("random", 3), ("dyadic", 2)]


def can_do(backend, case):
    return case.bits in lookup.BITS or backend.implementation not in KERNELS


@pytest.mark.parametrize(
    ("backend", "case"), [(backend, case) for backend in BACKENDS for case in CASES if can_do(backend, case)], ids=str
)
def test_scores(backend, case):
    given = inputs(case)
    assert_same_bits(backend.scores(given), oracle(given))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("table", "bits"), TABLES)
@pytest.mark.parametrize("kernel", ["pallas_triton", "triton", *(["gluon", "gluon_long"] if GLUON else [])])
def test_every_launch_configuration(kernel, table, bits, config):
    given = inputs(Case(B=1, K=2, G=3, T=23 if kernel == "gluon_long" else 3, S=777, D=128, table=table, bits=bits))
    words = fixed_point.score_table(given.centroids).words
    unit_words = fixed_point.score_words(given.centroids, given.scale)
    of_gluon = {
        "gluon": replace(config, block_s=min(64, config.block_s), num_warps=1),
        "gluon_long": replace(config, block_s=128, num_warps=4, num_stages=max(2, config.num_stages)),
    }
    package, launch = {
        "pallas_triton": (tqjax, partial(pallas_scores.fused_qk_scores, config=config, interpret=not CUDA)),
        "triton": (tq_torch, partial(triton_call.fused_qk_scores, scale=given.scale, config=config)),
    }.get(kernel) or (
        tq_torch,
        partial(triton_call.fused_qk_scores, scale=given.scale, implementation="gluon", config=of_gluon[kernel]),
    )
    table_words = unit_words if package is tqjax else words
    arrays = [to_array(package, x) for x in (given.q_rotated, given.packed_indices, given.norms, table_words)]
    assert_same_bits(to_numpy(launch(*arrays)), oracle(given))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    case=st.builds(
        Case,
        B=st.integers(1, 3),
        K=st.integers(1, 3),
        G=st.integers(1, 9),
        T=st.integers(1, 6),
        S=st.integers(1, 200),
        D=st.integers(1, 128).map(lambda half: 2 * half),
        bits=st.sampled_from([4, 3, 2, 1]),
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        table=st.sampled_from(["gaussian", "random", "largest"]),
        values=st.sampled_from(["normal", "limits", "tiny", "huge"]),
    ),
    backend=st.sampled_from([backend for backend in BACKENDS if not backend.traced]),
)
def test_any_shape(case, backend):
    case = case if case.bits == 4 else replace(case, D=-(-case.D // 8) * 8)
    assume(can_do(backend, case))
    given = inputs(case)
    assert_same_bits(backend.scores(given), oracle(given))


@pytest.mark.parametrize("bits", lookup.BITS)
def test_strided_cache_is_read_in_place(bits):
    given = inputs(replace(BASE, B=2, K=3, S=100, D=128, bits=bits))
    q, codes, norms, centroids = (to_array(tq_torch, x) for x in given.arrays)
    buffer = torch.full((2, 3, 160, 16 * bits), 255, dtype=torch.uint8, device=codes.device)
    norm_buffer = torch.full((2, 3, 160), float("nan"), device=codes.device)
    buffer[:, :, 7:107], norm_buffer[:, :, 7:107] = codes, norms
    for implementation in ("eager", "triton", *(["gluon"] if GLUON else [])):
        scores = tq_torch.fused_qk_scores(
            q, buffer[:, :, 7:107], norm_buffer[:, :, 7:107], centroids, given.scale,
            **given.heads, implementation=implementation,
        )  # fmt: skip
        assert_same_bits(to_numpy(scores), oracle(given))
    transposed = codes.transpose(1, 2).contiguous().transpose(1, 2)
    scores = tq_torch.fused_qk_scores(
        q, transposed, norms, centroids, given.scale, **given.heads, implementation="triton"
    )
    assert_same_bits(to_numpy(scores), oracle(given))


def test_wide_heads_in_xla_and_eager():
    given = inputs(replace(BASE, D=1024, S=33, table="largest"))
    for backend in BACKENDS:
        if backend.implementation in ("xla", "eager"):
            assert_same_bits(backend.scores(given), oracle(given))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.implementation in KERNELS], ids=str)
def test_more_than_2_gib_of_codes(backend):
    """The last keys of a cache of 2.25 GiB: an offset in int32 would wrap."""
    shape, tail = (1, 4, 9 * 2**20 + 5, 64), 999
    small = inputs(Case(B=1, K=4, G=1, S=tail, D=128))
    codes, norms = np.zeros(shape, np.uint8), np.ones(shape[:3], np.float32)
    codes[:, :, -tail:], norms[:, :, -tail:] = small.packed_indices, small.norms
    scores = backend.scores(replace(small, packed_indices=codes, norms=norms))
    assert_same_bits(scores[..., -tail:], oracle(small))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.implementation in KERNELS], ids=str)
def test_more_than_65535_heads(backend):
    """What a launch grid holds along its second axis."""
    given = inputs(Case(B=16400, K=4, G=1, S=3, D=32))
    assert_same_bits(backend.scores(given), oracle(given))


def test_jax_computes_where_torch_does():
    assert jax.default_backend() == ("gpu" if CUDA else "cpu")


def test_poison_reaches_torch():
    from backends import POISONED

    with POISONED["tq_torch"]((3,)):
        assert torch.empty(3).new_empty(5).isnan().all()


def test_wrong_scores_are_seen():
    expected = oracle(inputs(BASE))
    for wrong in (
        np.nextafter(expected, np.float32(np.inf)),
        np.where(np.arange(expected.shape[-1]) == 64, np.float32(np.nan), expected),
        np.where(expected == expected.max(), -expected, expected),
        expected[..., :-1],
        expected.astype(np.float64),
    ):
        with pytest.raises(AssertionError):
            assert_same_bits(wrong, expected)
    with pytest.raises(AssertionError):
        assert_same_bits(np.array([-0.0], np.float32), np.array([0.0], np.float32))
    assert_same_bits(expected.copy(), expected)


def test_oracle_differs_between_cases():
    """A table of cases whose inputs coincide would prove little."""
    seen = {oracle(inputs(case)).tobytes() for case in CASES if case.S and case.T}
    zero = sum(case.values == "zero norms" or case.scale == 0.0 for case in CASES)
    assert len(seen) >= len([case for case in CASES if case.S and case.T]) - zero
    assert tqcore.__version__
