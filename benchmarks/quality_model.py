"""What packed keys and values cost the tiny language model, and a copy of it with key biases as large as Qwen's.

The copy: in each layer and key head, the frequency pairs that queries use least are taken from the queries (weights and
biases set to 0), and the key bias of those pairs is set to RATIO times the spread of the keys. Scores of dense keys do
not see that bias at all, so the copy's dense bits per byte differ from the model's only by what the pairs were worth;
keys have the outliers that break 4-bit codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
from flax import nnx
from numpy.typing import NDArray

import tqcore.center
import tqjax
from tqcore import verify

RATIO = 100.0
PAIRS = 2  # of head_dim / 2, per key head
PREFILL = 512  # positions that centers are estimated on
CALIBRATION = 8  # windows of training text


@dataclass(frozen=True)
class Way:
    """How one layer's keys and values are packed; 0 bits are dense."""

    key_bits: int
    value_bits: int
    norm: str | None = None
    center: str = "none"  # as in `tqcore.verify`, or "calibrated": a rotary center from training text
    first: int = 0  # first tokens left dense
    window: int = 0  # last positions before each query, its own among them, left dense


class Packed:
    """An attention function of `tiny_lm` with one Way for each layer."""

    def __init__(self, model: tiny_lm.TinyLM, ways: Sequence[Way], means: NDArray | None = None):
        """`means` [layers, K, D]: of keys before rotary embedding, for "calibrated"."""
        self.ways, self.means, self.calls = ways, means, count()
        self.biases, self.theta = key_biases(model), model.config.rope_theta

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        layer = next(self.calls) % len(self.ways)  # layers are traced in order
        way, groups = self.ways[layer], q.shape[1] // k.shape[1]
        exact = q @ k.repeat(groups, axis=1).swapaxes(-1, -2) * q.shape[-1] ** -0.5
        positions = jnp.arange(k.shape[-2])
        scores, center = exact, self.center(way.center, layer, k)
        causal = jnp.tri(k.shape[-2], dtype=bool)
        dense = (positions < way.first) | (causal & ~jnp.tri(k.shape[-2], k=-way.window, dtype=bool))
        if way.key_bits:
            packed = tqjax.compress(k, tqjax.Quantizer(k.shape[-1], way.key_bits, norm=way.norm), center=center)
            scores = tqjax.attention_scores(q, packed, add_center=True)
            scores = jnp.where(dense, exact, scores)
        weights = jax.nn.softmax(scores, where=causal)
        if not way.value_bits:
            return weights @ v.repeat(groups, axis=1)
        restored = tqjax.decompress(tqjax.compress(v, tqjax.Quantizer(v.shape[-1], way.value_bits)))
        exact, restored = (x.repeat(groups, axis=1) for x in (v, restored))
        return jnp.where(dense, 0.0, weights) @ restored + jnp.where(dense, weights, 0.0) @ exact

    def center(self, name: str, layer: int, k: jax.Array) -> jax.Array | None:
        positions = jnp.arange(k.shape[-2])
        if name == "mean":
            return tqjax.key_center(k[..., :PREFILL, :])
        if name == "rotary mean":
            return tqjax.rotary_center(unrotated_mean(k[..., :PREFILL, :], self.theta), positions, theta=self.theta)
        if name == "rotary bias":
            return tqjax.rotary_center(self.biases[layer], positions, theta=self.theta)
        if name == "calibrated":
            return tqjax.rotary_center(jnp.asarray(self.means[layer]), positions, theta=self.theta)
        return None


def uniform(model: tiny_lm.TinyLM, way: Way, means: NDArray | None = None) -> Packed:
    return Packed(model, [way] * model.config.n_layers, means)


def key_biases(model: tiny_lm.TinyLM) -> jax.Array:
    """[layers, K, D]."""
    config = model.config
    biases = jnp.stack([block.attention.key.bias[...] for block in model.layers])
    return biases.reshape(-1, config.n_kv_heads, config.head_dim)


def unrotated_mean(k: jax.Array, theta: float) -> jax.Array:
    """Mean over positions of keys [..., S, D] turned back by their positions, [..., D]."""
    angles = jnp.arange(k.shape[-2])[:, None, None] * tqcore.center.frequencies(k.shape[-1], theta)
    return tqcore.center.rotary(k, -angles, False, jnp)[..., 0, :].mean(-2)


def calibrate(model: tiny_lm.TinyLM) -> list[tuple[jax.Array, jax.Array]]:
    """Queries and keys by layer on training text."""
    windows = next(tiny_lm.batches(tiny_lm.text("train"), CALIBRATION, model.config.context, seed=0))[:, :-1]
    _, layers = nnx.jit(type(model).__call__, static_argnames="return_qkv")(model, windows, return_qkv=True)
    return [(q, k) for q, k, _ in layers]


def calibrated_means(model: tiny_lm.TinyLM) -> NDArray:
    """[layers, K, D]."""
    return np.stack([unrotated_mean(k, model.config.rope_theta).mean(0) for _, k in calibrate(model)])


def with_large_biases(model: tiny_lm.TinyLM) -> tiny_lm.TinyLM:
    """The copy."""
    copy, config = nnx.clone(model), model.config
    half, groups = config.head_dim // 2, config.n_q_heads // config.n_kv_heads
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (config.n_layers, config.n_kv_heads, 2 * PAIRS))
    for layer, (q, k) in enumerate(calibrate(model)):
        attention = copy.layers[layer].attention
        parameters = attention.query.kernel, attention.query.bias, attention.key.bias
        weight, offset, bias = (np.array(x[...]) for x in parameters)
        for head in range(config.n_kv_heads):
            queries, keys = q[:, head * groups : (head + 1) * groups], k[:, head]
            squares = [jnp.mean(x**2, axis=tuple(range(x.ndim - 1))).reshape(2, half).sum(0) for x in (queries, keys)]
            pairs = np.argsort(squares[0] * squares[1])[:PAIRS]
            pairs = np.concatenate([pairs, pairs + half])
            for reader in range(head * groups, (head + 1) * groups):
                weight[:, reader * config.head_dim + pairs] = 0
                offset[reader * config.head_dim + pairs] = 0
            spread = float(jnp.sqrt(((keys - keys.mean(-2, keepdims=True)) ** 2).sum(-1).mean()))
            bias[head * config.head_dim + pairs] = RATIO * spread / len(pairs) ** 0.5 * signs[layer, head]
        attention.query.kernel[...], attention.query.bias[...] = jnp.asarray(weight), jnp.asarray(offset)
        attention.key.bias[...] = jnp.asarray(bias)
    return copy


def recommended(model: tiny_lm.TinyLM, text: bytes, bits: tuple[int, int]) -> tuple[verify.Report, list[Way]]:
    """What `verify` says of the model as it reads `text`, and by layer its cheapest safe one at `bits`, or dense."""
    found = verify.verify(tiny_lm.arrays(model, text), bits=bits)
    safe = [layer.recommended_at(bits) for layer in found.layers]
    ways = [Way(0, 0) if x is None else Way(*bits, norm=x.setting.norm, center=x.setting.center) for x in safe]
    return found, ways
