"""python -m tqcore verify: what it measures, what it decides, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import tqcore
import tqjax.capture
from tqcore import report, verify
from tqcore.file import load_arrays, save_arrays

ROOT = Path(__file__).parent.parent
H, K, S, D = 4, 2, 96, 64
THETA = 10_000.0


def layer(bias_ratio=0.0, rotary=True, seed=0, queries=S):
    """Gaussian queries, keys and values, the keys with a bias of `bias_ratio` times their spread."""
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((1, n, S, D)).astype(np.float32) for n in (H, K, K))
    bias = bias_ratio * rng.standard_normal((K, D)).astype(np.float32)
    key += tqcore.rotary_center(bias, np.arange(S), theta=THETA) if rotary else bias[:, None]
    arrays = {"query": query[:, :, S - queries :], "key": key, "value": value}
    return arrays | ({"key_bias": bias} if rotary else {})


BENIGN = layer(rotary=False)
QWEN = layer(100.0)


def test_benign_layer_is_safe_as_it_is():
    (verdict,) = verify.verify(verify.name_arrays([BENIGN])).layers
    assert verdict.safe_at((4, 4)) and verdict.best_at((4, 4), ("none",)).safe
    assert verdict.recommended.setting.center == "none"
    assert verdict.outliers["mean_ratio"].max() < 0.3


def test_constant_offset_needs_the_mean():
    (verdict,) = verify.verify(verify.name_arrays([layer(100.0, rotary=False)])).layers
    assert not any(loss.safe for loss in verdict.at((4, 4)) if loss.setting.center == "none")
    assert verdict.safe_at((4, 4)) and verdict.recommended.setting.center == "mean"
    assert verdict.outliers["mean_ratio"].min() > 50


def test_rotated_bias_needs_a_rotary_center():
    (verdict,) = verify.verify(verify.name_arrays([QWEN], THETA)).layers
    assert not any(loss.safe for loss in verdict.at((4, 4)) if loss.setting.center in ("none", "mean"))
    assert verdict.safe_at((4, 4)) and verdict.recommended.setting.center.startswith("rotary")
    assert verdict.outliers["bias_ratio"].min() > 50


def test_without_theta_a_rotated_bias_is_left_dense():
    arrays = {name: array for name, array in QWEN.items() if name != "key_bias"}
    found = verify.verify(verify.name_arrays([BENIGN, arrays]))
    assert found.layers[1].recommended is None
    assert [x.safe_at((4, 4)) for x in found.layers] == [True, False] and not found.safe


def test_cheapest_safe_setting_is_recommended():
    """Fewest bytes, rotary centers after all others."""

    def loss(bits, center, variation, cosine=1.0):
        heads = {"variation": np.array([0.0, variation]), "top1": np.ones(2), "cosine": np.array([cosine, 1.0])}
        return verify.Loss(verify.Setting(*bits, "plain", center), sum(bits), heads)

    dear, cheap, rotary = loss((4, 4), "mean", 0.1), loss((4, 3), "none", 0.11), loss((2, 2), "rotary mean", 0.0)
    bad = [loss((2, 2), "none", 0.13), loss((2, 2), "none", 0.0, cosine=0.96)]
    for losses, wanted in (
        ([dear, cheap, rotary, *bad], cheap),
        ([rotary, dear], dear),
        ([rotary], rotary),
        (bad, None),
    ):
        assert verify.Verdict(0, {}, {}, losses).recommended is wanted


@pytest.mark.parametrize("queries", [S, 7])
@pytest.mark.parametrize("center", ["none", "mean", "rotary mean", "rotary bias"])
def test_figures_equal_a_direct_computation(center, queries):
    """In float64, row by row, from decompressed keys and values."""
    arrays = layer(3.0, queries=queries)
    (verdict,) = verify.verify(verify.name_arrays([arrays], THETA), queries=S).layers
    (loss,) = (x for x in verdict.at((4, 3)) if x.setting == verify.Setting(4, 3, "plain", center))
    key, half = arrays["key"][0], S // 2
    pairs = np.arange(half)[:, None] * THETA ** (-np.arange(0, D, 2) / D)
    turned = (key[:, :half, : D // 2] + 1j * key[:, :half, D // 2 :]) * np.exp(-1j * pairs)
    mean = np.concatenate([turned.real, turned.imag], -1).mean(1).astype(np.float32)
    centers = {
        "none": None,
        "mean": key[:, :half].mean(1, keepdims=True),
        "rotary mean": tqcore.rotary_center(mean, np.arange(S), theta=THETA),
        "rotary bias": tqcore.rotary_center(arrays["key_bias"], np.arange(S), theta=THETA),
    }
    packed = tqcore.decompress(tqcore.compress(key, tqcore.Quantizer(D, 4, norm="plain"), center=centers[center]))
    value = tqcore.decompress(tqcore.compress(arrays["value"][0], tqcore.Quantizer(D, 3)))
    for h in range(H):
        k, errors, exact_scores, rows = h // (H // K), [], [], []
        for t, query in enumerate(arrays["query"][0, h].astype(np.float64)):
            n = S - queries + t + 1
            exact, found = (x[k, :n].astype(np.float64) @ query / D**0.5 for x in (key, packed))
            p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (exact, found))
            a, b = p @ arrays["value"][0, k, :n], q @ value[k, :n]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            rows.append([np.abs(p - q).sum() / 2, p.argmax() == q.argmax(), cosine])
            errors.append(found - exact)
            exact_scores.append(exact - exact.mean())
        rmse, spread = (np.sqrt(np.mean(np.concatenate(x) ** 2)) for x in (errors, exact_scores))
        wanted = dict(zip(("variation", "top1", "cosine"), np.mean(rows, axis=0), strict=True))
        wanted |= {"score_rmse": rmse, "score_relative": rmse / spread}
        for name, number in wanted.items():
            assert loss.heads[name][h] == pytest.approx(number, rel=2e-3, abs=1e-5), name


def test_outliers_equal_a_direct_computation():
    (one,) = verify.read_layers(verify.name_arrays([QWEN], THETA))
    found, key = verify.outliers(one), QWEN["key"][0].astype(np.float64)
    for k in range(K):
        deviation = np.mean([np.linalg.norm(x - key[k].mean(0)) ** 2 for x in key[k]]) ** 0.5
        assert found["mean_ratio"][k] == pytest.approx(np.linalg.norm(key[k].mean(0)) / deviation)
        channels = [np.mean(channel**2) ** 0.5 for channel in key[k].T]
        assert found["channel_ratio"][k] == pytest.approx(max(channels) / np.mean(key[k] ** 2) ** 0.5)
        lengths = [np.linalg.norm(x) for x in key[k]]
        assert found["first_token"][k] == pytest.approx(lengths[0] / np.median(lengths))


def test_batch_is_averaged():
    both = {name: np.concatenate([BENIGN[name], layer(rotary=False, seed=1)[name]]) for name in BENIGN}
    one, two, mean = (
        verify.verify(verify.name_arrays([arrays])).layers[0].losses[0].heads["variation"]
        for arrays in (BENIGN, layer(rotary=False, seed=1), both)
    )
    np.testing.assert_allclose(mean, (one + two) / 2)


def test_constant_values_and_zero_queries():
    """No division by zero."""
    arrays = BENIGN | {"value": np.zeros_like(BENIGN["value"]), "query": np.zeros_like(BENIGN["query"])}
    (verdict,) = verify.verify(verify.name_arrays([arrays])).layers
    for loss in verdict.losses:
        assert loss.worst == {"score_rmse": 0, "score_relative": 0, "variation": 0, "top1": 1, "cosine": 1}


def bad_inputs():
    good, name = verify.name_arrays([QWEN], THETA), "layers.0."
    nan = QWEN["key"].copy()
    nan[0, 0, 0, 0] = np.nan
    without = {part: {x: y for x, y in good.items() if x != name + part} for part in ("query", "key", "value")}
    return {
        "no layer": ({}, "at least one layer of attention"),
        "weights": ({"model.embed": np.ones(3)}, "names must be 'layers.INDEX.PART'"),
        **{f"no {part}": (arrays, f"got none named {name}{part}") for part, arrays in without.items()},
        "NaN": (good | {name + "key": nan}, f"must be finite, got 1 of {nan.size} values"),
        "infinity": (good | {name + "value": np.full_like(nan, np.inf)}, "must be finite"),
        "integers": (good | {name + "query": np.ones((1, H, S, D), np.int32)}, "must be an array [B, H, T, D]"),
        "rank": (good | {name + "query": QWEN["query"][0]}, "must be an array [B, H, T, D] of float32"),
        "empty": (good | {name + "query": QWEN["query"][:, :, :0]}, "must not be empty, got shape [1, 4, 0, 64]"),
        "heads": (good | {name + "query": QWEN["query"][:, :3]}, "H a multiple of K"),
        "more queries than keys": (good | {name + "query": QWEN["query"].repeat(2, 2)}, "T at most S"),
        "value": (good | {name + "value": QWEN["value"][:, :, 1:]}, "must share B, K, S and D"),
        "bias": (good | {name + "key_bias": QWEN["key_bias"][:1]}, "must have the shape [2, 64] of a key, got [1, 64]"),
        "odd D": ({x: y[..., 1:] for x, y in verify.name_arrays([BENIGN]).items()}, "`head_dim` must be an even"),
        "no theta": (verify.name_arrays([QWEN]), "`theta` must be given where there is a bias"),
        "theta": (good | {"rotary_theta": np.float32([-1])}, "`theta` must be a positive number"),
        "two thetas": (good | {"rotary_theta": np.ones(2, np.float32)}, "must be one floating-point number"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", bad_inputs())
def test_bad_input(kind, tmp_path, capsys):
    from tqcore.__main__ import main

    arrays, message = bad_inputs()[kind]
    with pytest.raises(ValueError) as error:
        verify.verify(arrays)
    assert message in str(error.value)
    save_arrays(arrays, tmp_path / "bad.safetensors")
    assert main(["verify", str(tmp_path / "bad.safetensors"), "--plot", str(tmp_path / "out.png")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out and not (tmp_path / "out.png").exists()


def test_bad_arguments():
    tensors = verify.name_arrays([BENIGN])
    for arguments, message in (
        ({"bits": (5, 4)}, "`bits` must be 1, 2, 3 or 4, got 5"),
        ({"bits": 4}, "`bits` must be a pair"),
        ({"queries": 0}, "`queries` must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError) as error:
            verify.verify(tensors, **arguments)
        assert message in str(error.value)
    narrow = {name: array[..., :20] for name, array in tensors.items()}
    assert {x.setting.key_bits for x in verify.verify(narrow).layers[0].losses} == {4, 2}  # 3 bits of 20 are no bytes
    with pytest.raises(ValueError, match="`head_dim` must be a multiple of 8 for 3-bit codes, got 20"):
        verify.verify(narrow, bits=(3, 3))


def run(*arguments, cwd):
    command = [sys.executable, "-m", "tqcore", "verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, timeout=300)


def test_command(tmp_path):
    """Exit statuses, the table, the picture and the JSON."""
    hidden = {name: array for name, array in QWEN.items() if name != "key_bias"}
    save_arrays(verify.name_arrays([BENIGN, QWEN], THETA), tmp_path / "good.safetensors")
    save_arrays(verify.name_arrays([BENIGN, hidden]), tmp_path / "unsafe.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-9])

    good = run("good.safetensors", "--json", cwd=tmp_path)
    assert good.returncode == 0, good.stderr
    assert (tmp_path / "verify.png").read_bytes()[:4] == b"\x89PNG"
    assert "At 4/4 bits, safe with a center only: layers 1." in good.stderr
    found = json.loads(good.stdout)
    assert found.keys() == {"schema", "tqcore", "source", "bits", "limits", "safe", "layers"}
    assert found["safe"] is True and found["bits"] == [4, 4] and found["limits"] == verify.LIMITS
    for one in found["layers"]:
        assert one.keys() == {"layer", "shape", "safe", "recommended", "outliers", "settings"}
        assert one["shape"] == {"B": 1, "H": H, "K": K, "T": S, "S": S, "D": D}
        assert all(len(x) == K for x in one["outliers"].values())
        measures = "score_rmse", "score_relative", "variation", "top1", "cosine"
        for setting in one["settings"]:
            assert setting.keys() == {"key_bits", "value_bits", "norm", "center", "bytes", "safe", *measures}
            assert all(len(setting[name]) == H for name in measures)
    assert (
        len({json.dumps([x[y] for y in ("key_bits", "value_bits", "norm", "center")]) for x in one["settings"]}) == 40
    )

    unsafe = run("unsafe.safetensors", cwd=tmp_path)
    assert unsafe.returncode == 1 and "UNSAFE at 4/4 bits: layers 1." in unsafe.stdout
    for arguments, message in (
        (["torn.safetensors"], "must be a whole safetensors file"),
        (["none.safetensors"], "must be a safetensors file, got no file"),
        (["good.safetensors", "--bits", "4"], "`--bits` must be KEYS/VALUES"),
        (["good.safetensors", "--bits", "9/9"], "`bits` must be 1, 2, 3 or 4"),
        (["good.safetensors", "--plot", "no/such.png"], "must lie in a folder that exists"),
        (["some/model"], "`--text` must be given"),
        (["--what"], "usage:"),
    ):
        bad = run(*arguments, cwd=tmp_path)
        assert bad.returncode == 2 and message in bad.stderr and "Traceback" not in bad.stderr and not bad.stdout


def test_command_calls_a_function(tmp_path):
    """Of a file of one's own: the model of the examples, and one that raises."""
    (tmp_path / "text.txt").write_text("def main():\n    return 0\n" * 10)
    model = f"{ROOT / 'examples/tiny_lm.py'}:capture"
    found = run(model, "--text", "text.txt", "--tokens", 64, "--json", "--save", "c.safetensors", cwd=tmp_path)
    assert found.returncode in (0, 1), found.stderr
    assert len(json.loads(found.stdout)["layers"]) == 4
    saved = load_arrays(tmp_path / "c.safetensors")
    assert saved["layers.3.query"].shape == (1, 8, 64, 64) and saved["layers.0.key_bias"].shape == (2, 64)
    (tmp_path / "mine.py").write_text("def broken(text, tokens):\n    return {}[text]\n")
    bad = run("mine.py:broken", "--text", "text.txt", cwd=tmp_path)
    assert bad.returncode == 2 and "must give a capture, got KeyError" in bad.stderr and "Traceback" not in bad.stderr


def test_files_of_every_float(tmp_path):
    """bfloat16 is read without a NumPy type of that name."""
    x = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    dtypes = {"a": np.float32, "b": np.float16, "c": ml_dtypes.bfloat16, "d": np.float64}
    save_arrays({name: x.astype(dtype) for name, dtype in dtypes.items()}, tmp_path / "x.safetensors")
    found = load_arrays(tmp_path / "x.safetensors")
    for name, dtype in dtypes.items():
        np.testing.assert_array_equal(found[name], x.astype(dtype).astype(np.float64))
    save_arrays({"bool": np.ones(2, bool)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="numbers of 8 to 64 bits, got dtype BOOL"):
        load_arrays(tmp_path / "x.safetensors")


def test_picture_of_layers_that_differ(tmp_path):
    few = {name: array[:, :2] if array.ndim == 4 else array for name, array in BENIGN.items()}
    found = verify.verify(verify.name_arrays([BENIGN, few]))
    report.draw(found, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


@pytest.mark.usefixtures("exact_products")
def test_flax_capture():
    """What is captured gives the module's own output, and the module is left as it was."""
    module = nnx.MultiHeadAttention(num_heads=4, in_features=64, decode=False, rngs=nnx.Rngs(0))
    x, before = jax.random.normal(jax.random.key(0), (2, 16, 64)), module.attention_fn
    tensors = tqjax.capture.capture(module, x, mask=nnx.make_causal_mask(jnp.ones((2, 16))))
    assert module.attention_fn is before
    (one,) = verify.read_layers(tensors)
    scores = one.query @ one.key.swapaxes(-1, -2) / 4
    mixed = verify.softmax(scores, verify.visible(16, 16)) @ one.value
    output = module(x, mask=nnx.make_causal_mask(jnp.ones((2, 16))))
    np.testing.assert_allclose(module.out(jnp.asarray(mixed.swapaxes(1, 2), jnp.float32)), output, atol=2e-5)
    for call, message in (
        (lambda: tqjax.capture.capture(module, x), "attention must be causal"),
        (lambda: tqjax.capture.capture(nnx.Linear(64, 2, rngs=nnx.Rngs(0)), x), "got Linear, which calls none"),
        (lambda: nnx.jit(tqjax.capture.capture)(module, x), "outside jit"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Mamba", "Gemma2"])
def test_transformers_capture(kind):
    """Captured queries and keys give the model's own attention, and its own implementation comes back."""
    transformers = pytest.importorskip("transformers")
    from tq_torch.capture import capture

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} if kind != "Mamba" else {"state_size": 4}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    ids = torch.randint(0, 50, (2, 24))
    if kind in ("Mamba", "Gemma2"):
        message = "which calls none" if kind == "Mamba" else "got softcap"
        with pytest.raises(ValueError, match=message):
            capture(model, ids)
        return
    before = model.config._attn_implementation
    tensors = capture(model, ids)
    assert model.config._attn_implementation == before
    assert ("layers.0.key_bias" in tensors) == (kind == "Qwen2") and tensors["rotary_theta"] == 10_000
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    for one, wanted in zip(verify.read_layers(tensors), attentions, strict=True):
        scores = one.query @ one.key.repeat(2, axis=1).swapaxes(-1, -2) / one.query.shape[-1] ** 0.5
        np.testing.assert_allclose(verify.softmax(scores, verify.visible(24, 24)), wanted.numpy(force=True), atol=1e-5)
