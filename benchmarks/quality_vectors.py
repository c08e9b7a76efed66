"""What norms, centers and residual signs are worth for keys of many kinds: tables of `quality.py`.

Synthetic keys, values and queries are means over draws, D = 128; "tiny_lm" are those of the model of the examples as it
reads a held-out text, D = 64, under its causal mask, means over layers and heads. Runs in NumPy but for that model.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import tiny_lm
from flax import nnx
from numpy.typing import NDArray

import tqcore
from tqcore import Quantizer

D, S, T, DRAWS = 128, 1024, 32, 12
SPREAD = 3.0  # standard deviation of synthetic scores along S, the center's left out
TEXT, LENGTH = "gzip.py", 512
Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Sample:
    """Vectors of one draw or model, [B, H, T, D] or [B, K, S, D] float32, and what centers are there."""

    query: NDArray
    keys: NDArray
    values: NDArray
    bias: NDArray | None = None  # [..., K, D] of keys before rotary embedding at positions 0 to S - 1
    causal: bool = False

    def scores(self, keys: NDArray) -> NDArray:
        """⟨query, key⟩ / √D in float64, [B, H, T, S]."""
        keys = keys.astype(np.float64).repeat(self.query.shape[1] // keys.shape[1], axis=1)
        return self.query.astype(np.float64) @ keys.swapaxes(-1, -2) / self.query.shape[-1] ** 0.5

    def softmax(self, scores: NDArray) -> NDArray:
        scores = np.where(np.tri(*scores.shape[-2:]), scores, -np.inf) if self.causal else scores
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    def attend(self, probabilities: NDArray, values: NDArray) -> NDArray:
        return probabilities @ values.repeat(probabilities.shape[1] // values.shape[1], axis=1)


# --- keys of many kinds ---------------------------------------------------------------------------------------


def synthetic(shape: Callable[[np.random.Generator], Callable[[int], NDArray]], aligned: bool, draw: int) -> Sample:
    """Keys and values of one kind; queries of the same where `aligned`, else Gaussian."""
    rng = np.random.default_rng(draw)
    make = shape(rng)
    keys, values, query = make(S), make(S), make(T) if aligned else rng.standard_normal((T, D))
    scores = query @ keys.T
    query *= SPREAD * D**0.5 / (scores - scores.mean(-1, keepdims=True)).std()
    return Sample(*(x.astype(np.float32)[None, None] for x in (query, keys, values)))


def gaussian(rng):
    return lambda n: rng.standard_normal((n, D))


def scaled_coordinates(rng):
    scale = np.exp(rng.standard_normal(D))
    return lambda n: rng.standard_normal((n, D)) * scale


def four_outliers(rng):
    return lambda n: rng.standard_normal((n, D)) * np.where(np.arange(D) < 4, 10, 1)


def low_rank(rng):
    basis = rng.standard_normal((8, D)) / 8**0.5
    return lambda n: rng.standard_normal((n, 8)) @ basis + 0.3 * rng.standard_normal((n, D))


def offset(rng):
    constant = 10 * rng.standard_normal(D)
    return lambda n: rng.standard_normal((n, D)) + constant


def rotated_bias(low_frequency: bool, draw: int) -> Sample:
    """Gaussian keys plus a rotary-embedded bias in all frequency pairs, or in the slowest quarter of them."""
    rng = np.random.default_rng(draw)
    bias = 10 * rng.standard_normal((1, D)).astype(np.float32)
    if low_frequency:
        bias[:, np.arange(D) % (D // 2) < 3 * D // 8] = 0
    spread, query, values = (rng.standard_normal((1, 1, n, D)).astype(np.float32) for n in (S, T, S))
    keys = spread + tqcore.rotary_center(bias, np.arange(S))
    return Sample(query * np.float32(SPREAD), keys, values, bias)


@cache
def model_keys() -> Sample:
    """Layers as the batch."""
    model, _ = tiny_lm.load(Path(__file__).parents[1] / "examples/tiny_lm.safetensors")
    tokens = np.frombuffer(dict(tiny_lm.corpus("held_out"))[TEXT][:LENGTH], np.uint8)[None]
    _, layers = nnx.jit(type(model).__call__, static_argnames="return_qkv")(model, tokens, return_qkv=True)
    q, k, v = (np.concatenate([np.asarray(x) for x in group]) for group in zip(*layers, strict=True))
    biases = np.stack([np.asarray(layer.attention.key.bias) for layer in model.layers])
    return Sample(q, k, v, biases.reshape(len(biases), k.shape[1], k.shape[-1]), causal=True)


def draws(name: str) -> Iterator[Sample]:
    if name == "tiny_lm":
        return iter([model_keys()])
    return (KINDS[name](draw) for draw in range(DRAWS))


KINDS: dict[str, Callable[[int], Sample]] = {
    "Gaussian": partial(synthetic, gaussian, False),
    "scaled coordinates": partial(synthetic, scaled_coordinates, True),
    "four outlier coordinates": partial(synthetic, four_outliers, True),
    "low rank": partial(synthetic, low_rank, True),
    "constant offset": partial(synthetic, offset, False),
    "slow rotated bias": partial(rotated_bias, True),
    "rotated bias": partial(rotated_bias, False),
}


# --- measurements ---------------------------------------------------------------------------------------------


def measure(sample: Sample, quantizer: Quantizer, center: NDArray | None = None) -> dict[str, float]:
    """Of keys, and of values under exact probabilities."""
    packed = tqcore.compress(sample.keys, quantizer, center=center)
    restored, exact = tqcore.decompress(packed).astype(np.float64), sample.scores(sample.keys)
    scores = sample.scores(restored)
    error, probabilities = scores - exact, sample.softmax(exact)
    variation = np.abs(sample.softmax(scores) - probabilities).sum(-1).mean() / 2
    seen = np.broadcast_to(np.tri(*exact.shape[-2:], dtype=bool) if sample.causal else True, exact.shape)
    values = tqcore.decompress(tqcore.compress(sample.values, quantizer)).astype(np.float64)
    output = sample.attend(probabilities, sample.values)
    return {
        "mse": ((restored - sample.keys) ** 2).sum() / (sample.keys**2).sum(),
        "slope": (error * exact)[seen].sum() / (exact[seen] ** 2).sum(),
        "rmse": (error[seen] ** 2).mean() ** 0.5,
        "variation": variation,
        "output": np.linalg.norm(sample.attend(probabilities, values) - output) / np.linalg.norm(output),
    }


def means(name: str, quantizer: Callable[[int], Quantizer], center: str = "none") -> dict[str, float]:
    """Means of `measure` over draws; `quantizer` of head_dim."""
    results = []
    for sample in draws(name):
        centers = {
            "none": lambda s: None,
            "mean": lambda s: tqcore.key_center(s.keys),
            "rotary": lambda s: tqcore.rotary_center(s.bias, np.arange(s.keys.shape[-2])),
        }
        results.append(measure(sample, quantizer(sample.keys.shape[-1]), centers[center](sample)))
    return {key: float(np.mean([result[key] for result in results])) for key in results[0]}


def norms() -> list[list[str]]:
    rows = []
    for name in ("Gaussian", "scaled coordinates", "four outlier coordinates", "low rank", "tiny_lm"):
        for bits in (4, 3, 2):
            of = [means(name, partial(Quantizer, bits=bits, norm=norm)) for norm in ("plain", "corrected")]
            formats = {"mse": "{:.4f}", "slope": "{:+.4f}", "variation": "{:.4f}", "output": "{:.4f}"}
            pairs = [" / ".join(form.format(m[key]) for m in of) for key, form in formats.items()]
            rows.append([name, str(bits), *pairs])
    return rows


def centers() -> list[list[str]]:
    rows = []
    for name in ("constant offset", "slow rotated bias", "rotated bias", "tiny_lm"):
        for bits in (4, 3, 2):
            known = ("none", "mean") if name == "constant offset" else ("none", "mean", "rotary")
            found = [f"{means(name, partial(Quantizer, bits=bits), center)['variation']:.4f}" for center in known]
            rows.append([name, str(bits), *found, *["–"] * (3 - len(found))])
    return rows


def signs() -> list[list[str]]:
    rows = []
    for name in ("Gaussian", "four outlier coordinates", "low rank", "tiny_lm"):
        for bits in (4, 3, 2):
            of = [means(name, partial(Quantizer, bits=bits, norm=norm)) for norm in ("plain", "corrected")]
            of.append(means(name, partial(Quantizer, bits=bits, qjl=True)))
            formats = {"slope": "{:+.4f}", "rmse": "{:.3f}", "variation": "{:.3f}"}
            rows.append(
                [name, str(bits), *(" / ".join(form.format(m[key]) for m in of) for key, form in formats.items())]
            )
    return rows


PAIR = "plain / corrected"
TABLES: dict[str, Callable[[], Table]] = {
    "norms": lambda: (
        ["keys", "bits", "‖k̂ − k‖² / ‖k‖²", "bias", "softmax total variation", f"values: output error ({PAIR} each)"],
        norms(),
    ),
    "centers": lambda: (["keys", "bits", "no center", "`key_center`", "`rotary_center`"], centers()),
    "residual signs": lambda: (
        ["keys", "bits", "bias", "score RMSE", f"softmax total variation ({PAIR} / qjl each)"],
        signs(),
    ),
}
