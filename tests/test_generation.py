"""The examples: a model generates from compressed caches in both frameworks."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
import generate
import generate_flax
import generate_transformers

EXAMPLES = Path(generate.__file__).parent


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Where products are exact enough for the likeliest bytes to be the same."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def test_the_model_is_one_in_both_frameworks(capsys):
    """Tokens and bits per byte, from one file too; a small case of examples/generate.py."""
    bits, alike = generate.compare(count=2, prompt=48, tokens=12, window=16, show=1)
    assert alike
    for kind in ("dense", "compressed"):
        assert abs(bits["Flax", kind] / bits["Hugging Face", kind] - 1) < 1e-3
        assert 0 < bits["Flax", kind] < 4
    printed = capsys.readouterr().out
    assert "compressed texts equal in both frameworks: 2 of 2" in printed


def test_a_window_of_everything_generates_as_a_dense_cache():
    prompt = generate.texts(2, 40)
    model = generate_transformers.load()
    ids = torch.tensor(prompt.astype(np.int64))
    plain = transformers.DynamicCache(config=model.config)
    expected = model.generate(ids, past_key_values=plain, max_new_tokens=12, do_sample=False)[:, 40:].numpy()
    assert np.array_equal(generate_transformers.generate(model, prompt, 12, window=64), expected)
    assert np.array_equal(generate_flax.generate(generate_flax.load(2, 64, window=64), prompt, 12), expected)


def test_divergence_sees_a_difference():
    a = np.arange(10)[None]
    assert generate.divergence(a, a) == [10] and generate.divergence(a, a + (a == 4)) == [4]


def test_examples_to_copy_are_short():
    for name in ("generate_flax.py", "generate_transformers.py"):
        assert len(re.findall("\n", (EXAMPLES / name).read_text())) <= 60, name
