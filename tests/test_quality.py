"""The benchmark of quality: that it measures what it says. No figure of a model is asserted."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import quality
import quality_model
import tiny_lm
from quality_model import Way

ROOT = Path(__file__).parent.parent
TOKENS = np.frombuffer(b"def f(x):\n    return x + 1\n" * 2, np.uint8)[None]


@pytest.fixture(scope="module")
def model():
    return tiny_lm.load(ROOT / "examples/tiny_lm.safetensors")[0]


@pytest.fixture(scope="module")
def copy(model):
    return quality_model.with_large_biases(model)


@pytest.mark.parametrize("dim, bits", [(64, 1), (64, 4), (128, 2)])
def test_distortion_is_what_theory_says(dim, bits):
    found = quality.distortion(dim, bits)
    assert found["mse"] == pytest.approx(found["mse_exact"], rel=0.01)  # levels are dyadic
    assert abs(found["product"] - found["product_expected"]) < 4 * found["product_error"]
    assert found["product"] < 0.5 * found["product_paper_form"]


def test_levels_beyond_a_quantizer_are_the_same_rule():
    y = np.linspace(-0.3, 0.3, 1026)[None].repeat(2, 0)
    assert len(np.unique(quality.quantised(y, 3))) == 8
    narrow = quality.quantised(y[:, :64], 4)
    assert set(np.unique(narrow)) <= set(quality.codebook.Codebook(64, 4).centroids.astype(np.float64))


@pytest.mark.usefixtures("exact_products")
def test_dense_ways_are_dense_attention(model):
    dense, packed = (
        model(TOKENS, attention=attention)
        for attention in (tiny_lm.causal_attention, quality_model.uniform(model, Way(0, 0)))
    )
    np.testing.assert_allclose(dense, packed, atol=1e-3)
    other, recent, all_recent = (
        model(TOKENS, attention=quality_model.uniform(model, Way(2, 2, window=window)))
        for window in (0, 4, TOKENS.size)
    )
    assert np.abs(dense - other).max() > 0.1
    np.testing.assert_allclose(dense, all_recent, atol=1e-3)
    np.testing.assert_allclose(dense[:, :4], recent[:, :4], atol=1e-3)
    assert np.abs(dense[:, 4:] - recent[:, 4:]).max() > 0.1


def test_every_layer_has_its_own_way(model):
    ways = [Way(0, 0), Way(0, 0), Way(2, 2), Way(0, 0)]
    captured = []
    for chosen in (ways, [Way(0, 0)] * 4):
        _, qkvs = model(TOKENS, return_qkv=True, attention=quality_model.Packed(model, chosen))
        captured.append([np.asarray(k) for _, k, _ in qkvs])
    differs = [np.abs(a - b).max() > 1e-3 for a, b in zip(*captured, strict=True)]
    assert differs == [False, False, False, True]


def test_copy_has_large_biases_that_scores_do_not_see(copy):
    """Its keys have the outliers, and its logits stay when the biases of the same pairs change."""
    report, ways = quality_model.recommended(copy, TOKENS[0].tobytes(), (4, 4))
    for layer in report.layers:
        assert layer.outliers["bias_ratio"].min() > quality_model.RATIO / 2
        assert not layer.best_at((4, 4), ("none",)).safe
    assert all(way.center.startswith("rotary") for way in ways)
    before = copy(TOKENS)
    halved = tiny_lm.nnx.clone(copy)
    for block in halved.layers:
        bias = block.attention.key.bias
        large = jnp.abs(bias[...]) > 10 * jnp.median(jnp.abs(bias[...]))
        assert int(large.sum()) == 2 * 2 * quality_model.PAIRS
        bias[...] = jnp.where(large, bias[...] / 2, bias[...])
    np.testing.assert_allclose(halved(TOKENS), before, atol=1e-3)


def test_documents_show_the_results():
    """Tables of docs/quality.md are those of the committed results."""
    report = json.loads((ROOT / "benchmarks/results/cpu/quality.json").read_text())
    text = (ROOT / "docs/quality.md").read_text()
    for table in (quality.distortion_table(report["distortion"]), quality.model_table(report["model"])):
        assert quality.markdown(table) in text
