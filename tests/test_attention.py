"""Attention: the oracle against a dense one, every backend against the oracle, and what must not change the result."""

from dataclasses import replace

import numpy as np
import pytest
from attention_cases import (
    ATTENTION_CASES,
    CAUSAL,
    EVERYTHING,
    PLAIN,
    AttentionCase,
    attention_inputs,
    attention_oracle,
    dense_attention,
    seen,
)
from backends import (
    ATTENTION_BACKENDS,
    EVERY_CASE,
    PACKAGES,
    assert_close_attention,
    assert_same_bits,
    attention_arguments,
    attention_tolerance,
    to_array,
    to_numpy,
)
from cases import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tq_torch
import tqcore
import tqjax
from tqcore.quantizer import PackedVectors, Quantizer

by_name = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
by_backend = pytest.mark.parametrize("backend", EVERY_CASE, ids=str)


def attention(package, inputs, **changed):
    """Output and log-sum-exp in NumPy, of float32 inputs."""
    query, keys, values, arrays = attention_arguments(package, inputs)
    changed = {name: to_array(package, x) if isinstance(x, np.ndarray) else x for name, x in changed.items()}
    out, lse = package.attention(query, keys, values, **{**arrays, **inputs.static, "return_lse": True, **changed})
    return to_numpy(out), to_numpy(lse)


def merged(package, *arrays):
    return tuple(to_numpy(x) for x in package.merge_attention(*(to_array(package, x) for x in arrays)))


def check(backend, case):
    """The result of a case, or the error of an implementation that does not take it."""
    inputs = attention_inputs(case)
    if backend.takes(case):
        assert_close_attention(backend.attention(inputs), attention_oracle(inputs), case.dtype)
    else:
        with pytest.raises(NotImplementedError, match="'(eager|xla)' has no such need"):
            backend.attention(inputs)


# --- the oracle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_oracle_is_dense_attention_with_rounded_queries(case):
    """Decompression in float32 is the only error left."""
    case = replace(case, dtype="float32")
    (got, got_lse), (out, lse, size) = attention_oracle(attention_inputs(case)), dense_attention(case)
    assert (got.dtype, got_lse.dtype) == (np.float32, np.float32)
    assert np.all(np.abs(got - out) <= 1e-5 * size)
    assert_same_bits(np.isfinite(got_lse), np.isfinite(lse))
    got_lse, lse = got_lse[np.isfinite(lse)], lse[np.isfinite(lse)]
    assert np.all(np.abs(got_lse - lse) <= 1e-5 * (1 + np.abs(lse)))


@pytest.mark.parametrize("case", [replace(CAUSAL, S=300, D=D, lengths="full") for D in (64, 128)], ids=str)
def test_rounding_of_queries_costs_what_it_must(case):
    """|⟨q - q', k̂⟩| ≤ step/2 · √D · ‖k̂‖, which moves a weight by a factor of e^±2Δ at most."""
    inputs = attention_inputs(case)
    (got, got_lse), (out, lse, size) = attention_oracle(inputs), dense_attention(case, fixed_point=False)
    step = np.abs(tqcore.rotate(inputs.query, inputs.keys.quantizer)).max() / 8159
    logit = step / 2 * np.linalg.norm(tqcore.decompress(inputs.keys), axis=-1).max()  # · √D · 1/√D
    assert np.all(np.abs(got - out) <= np.expm1(2 * logit) * size) and np.all(np.abs(got_lse - lse) <= logit)
    assert np.abs(got - out).max() > 1e-6  # the rounding is there


# --- backends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@by_backend
def test_attention(backend, case):
    check(backend, case)


@pytest.mark.parametrize("case", [EVERYTHING, replace(EVERYTHING, centers=("head", "varying"))], ids=str)
@pytest.mark.parametrize("backend", [b for b in ATTENTION_BACKENDS if b not in EVERY_CASE], ids=str)
def test_traced_attention(backend, case):
    check(backend, case)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    case=st.builds(
        AttentionCase,
        B=st.integers(1, 3),
        K=st.integers(1, 3),
        G=st.integers(1, 5),
        T=st.integers(1, 6),
        S=st.integers(1, 90),
        D=st.integers(1, 12).map(lambda eighth: 8 * eighth),
        bits=st.tuples(*[st.integers(1, 4)] * 2),
        centers=st.tuples(*[st.sampled_from(["none", "head", "varying"])] * 2),
        qjl=st.tuples(st.booleans(), st.booleans()).map(lambda pair: (pair[0], False)),
        lengths=st.sampled_from(["full", "ragged", "zero"]),
        page=st.sampled_from([None, 16, 32]),
        causal=st.booleans(),
        window=st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20)),
        cap=st.sampled_from([None, 8.0]),
        sinks=st.booleans(),
        splits=st.sampled_from([None, 3]),
    ).filter(lambda case: not case.qjl[0] or case.bits[0] > 1),
    backend=st.sampled_from(EVERY_CASE),
)
def test_any_shape(case, backend):
    check(backend, case)


@by_name
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_scores_inside_are_exact(package, bits):
    """A query that sees one position has its score for log-sum-exp, where powers are natural ones."""
    case = replace(PLAIN, T=70, lengths="full", window=0, bits=(bits, 4))
    inputs = attention_inputs(case)
    plain = {tqcore: "numpy", tqjax: "xla", tq_torch: "eager"}[package]
    _, lse = attention(package, inputs, implementation=plain)
    query, keys, *_ = attention_arguments(package, inputs)
    scores = to_numpy(package.attention_scores(query, keys))
    assert_same_bits(lse, np.ascontiguousarray(np.diagonal(scores, axis1=-2, axis2=-1)))


# --- what must not change the result -----------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("case", [CAUSAL, replace(EVERYTHING, page=None, splits=None)], ids=str)
def test_pages_and_splits_change_nothing(package, case):
    expected = attention(package, attention_inputs(case))
    for page, splits in ((16, None), (64, None), (None, 2), (None, 9), (32, 5)):
        got = attention(package, attention_inputs(replace(case, page=page, splits=splits)))
        assert_close_attention(got, expected, "float32")


@by_name
def test_five_causal_steps_are_five_single_steps(package):
    for case in (replace(CAUSAL, window=(20, 0), sinks=True), replace(CAUSAL, lengths="full")):
        inputs = attention_inputs(case)
        lengths = inputs.arrays.get("kv_lengths", np.full(case.B, case.S, np.int32))
        whole = attention(package, inputs)
        for t in range(5):
            step = replace(inputs, query=inputs.query[:, :, t : t + 1])
            alone = attention(package, step, kv_lengths=np.maximum(lengths - 4 + t, 0))
            assert_close_attention(alone, (whole[0][:, :, t : t + 1], whole[1][:, :, t : t + 1]), "float32")


@by_name
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("center", ["none", "static", "varying"])
def test_merge_of_packed_and_dense_is_the_whole(package, center, cap):
    """Old keys packed, with a center; recent ones dense; sinks with either."""
    case = replace(PLAIN, T=2, lengths="full", centers=(center, center), cap=cap, sinks=True)
    inputs = attention_inputs(case)
    rng = np.random.default_rng(41)
    recent, recent_values = rng.standard_normal((2, case.B, case.K, 9, case.D))
    old, old_values = (tqcore.decompress(x).astype(np.float64) for x in (inputs.keys, inputs.values))
    sinks, query = inputs.arrays["sinks"].astype(np.float64), inputs.query.astype(np.float64)

    def dense(keys, values, sinks):
        x = query @ np.repeat(keys, case.G, 1).swapaxes(-1, -2) / case.D**0.5
        x = x if cap is None else cap * np.tanh(x / cap)
        powers = np.exp(x)
        total = powers.sum(-1) + np.exp(sinks)[:, None]
        return powers @ np.repeat(values, case.G, 1) / total[..., None], np.log(total)

    whole = dense(np.concatenate([old, recent], 2), np.concatenate([old_values, recent_values], 2), sinks)
    none = np.full_like(sinks, -np.inf)
    for packed_sinks, dense_sinks in ((sinks, none), (none, sinks)):
        packed_part = attention(package, inputs, sinks=packed_sinks.astype(np.float32))
        dense_part = (x.astype(np.float32) for x in dense(recent, recent_values, dense_sinks))
        out, lse = merged(package, *packed_part, *dense_part)
        assert out.dtype == lse.dtype == np.float32
        assert np.linalg.norm(out - whole[0]) <= 5e-4 * np.linalg.norm(whole[0])  # of queries rounded for codes alone
        assert np.abs(lse - whole[1]).max() <= 1e-3


@by_name
def test_merge_of_halves_is_the_whole(package):
    inputs = attention_inputs(replace(PLAIN, lengths="full", centers=("varying", "static")))

    def part(packed, at):
        center = packed.center if packed.center.shape[2] == 1 else packed.center[:, :, at]
        return PackedVectors(packed.codes[:, :, at], packed.norms[:, :, at], packed.quantizer, center)

    halves = [
        attention(package, replace(inputs, keys=part(inputs.keys, at), values=part(inputs.values, at)))
        for at in (slice(0, 29), slice(29, 70))
    ]
    assert_close_attention(merged(package, *halves[0], *halves[1]), attention(package, inputs), "float32")


@by_name
def test_merge_with_nothing(package):
    """A part of lse -inf adds nothing, though its output be NaN; two of them make zeros; NaN stays."""
    out, lse = np.ones((2, 3), np.float32), np.array([1.5, -np.inf], np.float32)
    nothing = np.full((2, 3), np.nan, np.float32), np.full(2, -np.inf, np.float32)
    for parts in ((out, lse, *nothing), (*nothing, out, lse)):
        got, got_lse = merged(package, *parts)
        assert_same_bits(got, np.array([[1, 1, 1], [0, 0, 0]], np.float32))
        assert_same_bits(got_lse, lse)
    got, got_lse = merged(package, out, np.full(2, np.nan, np.float32), out, np.zeros(2, np.float32))
    assert np.isnan(got).all() and np.isnan(got_lse).all()


@by_name
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge_keeps_the_dtype(package, dtype):
    a, b = (to_array(package, np.full((2, 4), x, DTYPES[dtype])) for x in (1, 3))
    lse = to_array(package, np.zeros(2, np.float32))
    out, total = package.merge_attention(a, lse, b, lse)
    assert str(out.dtype).removeprefix("torch.") == dtype
    assert bool((out == 2).all())
    np.testing.assert_allclose(to_numpy(total), np.log(2), rtol=1e-6)


# --- nothing to see, and NaN -------------------------------------------------------------------------------------


@by_name
def test_nothing_seen_gives_zeros(package):
    """Lengths of 0, and queries before the first position; where there is a sink, the log-sum-exp is the sink."""
    case = replace(PLAIN, T=3, causal=True)
    inputs = attention_inputs(case)
    lengths, sinks = np.array([0, 2, 70], np.int32), np.arange(4, dtype=np.float32)
    empty = np.array([[True, True, True], [True, False, False], [False, False, False]])[:, None]
    inputs = replace(inputs, **vars(attention_inputs(replace(case, lengths="full"))))
    for given_sinks in (None, sinks):
        out, lse = attention(package, inputs, kv_lengths=lengths, sinks=given_sinks)
        nothing = np.full(4, -np.inf, np.float32) if given_sinks is None else sinks
        assert_same_bits((out == 0).all(-1), np.broadcast_to(empty, (3, 4, 3)))
        assert_same_bits(np.where(empty, lse, 0), np.where(empty, nothing[:, None], 0).astype(np.float32))
        assert np.isfinite(lse[~np.broadcast_to(empty, lse.shape)]).all()


@by_name
def test_what_is_not_finite_makes_its_row_nan(package):
    inputs = attention_inputs(replace(PLAIN, lengths="full", T=2))
    inputs.query[0, 1, 0, 3], inputs.query[1, 2, 1, 4] = np.nan, np.inf
    inputs.keys.norms[2, 1, 69] = np.nan
    out, lse = attention(package, inputs)
    expected = np.zeros((3, 4, 2), bool)
    expected[0, 1, 0], expected[1, 2, 1], expected[2, 2:] = True, True, True
    assert_same_bits(np.isnan(out).all(-1), expected)
    assert_same_bits(np.isnan(lse), expected)
    inputs.values.norms[0, 0, 5] = np.inf
    assert np.isnan(attention(package, inputs)[0][0, 0]).all()


# --- the helpers see what is wrong -------------------------------------------------------------------------------


def test_wrong_outputs_are_seen():
    case = replace(CAUSAL, S=257)
    inputs = attention_inputs(case)
    out, lse = expected = attention_oracle(inputs)
    one = np.zeros(lse.shape, np.float32)
    one[1, 2, 3] = 1
    limit = attention_tolerance("float32", case.D)
    wrong = [
        (out * (1 + 2 * limit * one[..., None]), lse),
        (out, lse + 2 * limit * (1 + abs(lse[1, 2, 3])) * one),
        (np.where(one[..., None] > 0, np.nan, out), lse),
        (out, np.where(one > 0, np.nan, lse)),
        (out, np.where(one > 0, -np.inf, lse)),
        (out[:, :, :4], lse[:, :, :4]),
        attention_oracle(replace(inputs, static=inputs.static | {"is_causal": False})),
        attention_oracle(replace(inputs, static=inputs.static | {"local_window_size": 250})),
        attention_oracle(replace(inputs, static=inputs.static | {"scale": 0.1251})),
        attention_oracle(replace(inputs, arrays=inputs.arrays | {"sinks": np.full(4, -7, np.float32)})),
        attention_oracle(replace(inputs, values=replace(inputs.values, quantizer=Quantizer(64, seed=1)))),
    ]
    for got in wrong:
        with pytest.raises(AssertionError):
            assert_close_attention(got, expected, "float32")
    assert_close_attention(expected, expected, "float32")
    nothing = np.zeros((1, 1, 1, 4)), np.full((1, 1, 1), -np.inf)
    with pytest.raises(AssertionError):
        assert_close_attention((nothing[0] + 1e-30, nothing[1]), nothing, "float32")


def test_tolerance_is_within_what_was_promised():
    assert attention_tolerance("float32", 128) <= 1e-3


def test_cases_differ():
    """A table whose options change nothing would prove little."""
    cases = {replace(c, page=None, splits=None, dtype="float32") for c in ATTENTION_CASES if c.S and c.T and c.B}
    outputs = {attention_oracle(attention_inputs(case))[0].tobytes() for case in cases if case.lengths != "zero"}
    assert len(outputs) == len([case for case in cases if case.lengths != "zero"])


def test_seen_by_hand():
    case = AttentionCase(B=1, T=3, S=6, causal=True, window=(2, 0))
    expected = ["011100", "001110", "000111"]
    rows = seen(case, np.array([6]))[0].astype(int)
    assert ["".join(map(str, row)) for row in rows] == expected
    assert seen(replace(case, window=None), np.array([1]))[0].sum(-1).tolist() == [0, 0, 1]
