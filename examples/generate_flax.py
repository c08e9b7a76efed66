"""Generates with a Flax model whose attention reads a compressed cache: `tqjax.flax` on examples/tiny_lm.py."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
from flax import nnx

from tqjax.flax import CompressedAttention, init_cache


class Attention(nnx.Module):
    """With a cache; for nnx.MultiHeadAttention, `tqjax.flax.compress_attention(model, window=32)` does it all."""

    def __init__(self, dense: tiny_lm.Attention, **cache_options):
        config = dense.config
        rotary = lambda x, positions: tiny_lm.rotary(x, config.rope_theta, positions[..., None])  # noqa: E731
        self.inner = CompressedAttention(
            config.n_q_heads, config.d_model, config.n_q_heads * config.head_dim, num_kv_heads=config.n_kv_heads,
            rotary=rotary, cache_options=cache_options, decode=True, rngs=nnx.Rngs(0),
        )  # fmt: skip
        for name in ("query", "key", "value", "out"):
            old, new = getattr(dense, name), getattr(self.inner, name)
            new.kernel[...] = old.kernel[...].reshape(new.kernel.shape)
            new.bias[...] = jnp.zeros(new.bias.shape) if old.bias is None else old.bias[...].reshape(new.bias.shape)

    def __call__(self, x: jax.Array, _) -> tuple[jax.Array, tuple]:
        return self.inner(x), ()


def load(batch: int, max_length: int, **cache_options) -> tiny_lm.TinyLM:
    """The model with empty caches, `cache_options` as of `tqjax.KVCache.zeros`."""
    model, _ = tiny_lm.load(Path(__file__).with_name("tiny_lm.safetensors"))
    for layer in model.layers:
        layer.attention = Attention(layer.attention, **cache_options)
    init_cache(model, batch, max_length)
    return model


@partial(nnx.jit, donate_argnums=0)  # the cache is written in place
def read(model: tiny_lm.TinyLM, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def generate(model: tiny_lm.TinyLM, prompt: np.ndarray, count: int) -> np.ndarray:
    """The `count` likeliest next bytes of prompts [B, T]."""
    found = [read(model, prompt)[:, -1:].argmax(-1)]
    for _ in range(count - 1):
        found.append(read(model, found[-1])[:, -1:].argmax(-1))
    return np.asarray(jnp.concatenate(found, 1), np.uint8)


if __name__ == "__main__":
    text = np.frombuffer(" ".join(sys.argv[1:] or ["def read_file(path):\n    "]).encode(), np.uint8)
    print((text.tobytes() + generate(load(1, 512, window=32), text[None], 200).tobytes()).decode())
