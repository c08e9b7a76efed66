"""A byte-level causal language model of 3.7 M parameters, its corpus and its file format.

The model exists to produce real queries, keys and values: `model(tokens, return_qkv=True)`.
Axes: B batch, H query heads, K key-value heads, T positions, D head_dim, C d_model.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file

from tqcore.verify import name_arrays

AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
QKV = tuple[jax.Array, jax.Array, jax.Array]

# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Hyperparameters of the model, stored with its weights."""

    n_layers: int = 4
    d_model: int = 256
    n_q_heads: int = 8
    n_kv_heads: int = 2
    head_dim: int = 64
    d_ff: int = 768
    vocab: int = 256
    context: int = 1024
    rope_theta: float = 10_000.0
    dropout: float = 0.1


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense causal attention, float32 softmax: q [B, H, T, D], k and v [B, K, T, D] -> [B, H, T, D]."""
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, is_causal=True), 1, 2)


def rotary(x: jax.Array, theta: float, positions: jax.Array | None = None) -> jax.Array:
    """Rotates the pairs (i, i + D / 2) of x [B, H, T, D] by angle t * theta^(-2 i / D) at position t.

    `positions` broadcast to x without its last axis; None means 0 to T - 1.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[-2]) if positions is None else positions
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions and biases on q, k and v."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        q_width, kv_width = config.n_q_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.config = config
        self.query = nnx.Linear(config.d_model, q_width, dtype=dtype, rngs=rngs)
        self.key = nnx.Linear(config.d_model, kv_width, dtype=dtype, rngs=rngs)
        self.value = nnx.Linear(config.d_model, kv_width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(q_width, config.d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, attention: AttentionFn) -> tuple[jax.Array, QKV]:
        """x [B, T, C] -> (output [B, T, C], (q [B, H, T, D], k [B, K, T, D], v [B, K, T, D]))."""
        batch, positions, _ = x.shape

        def heads(projected: jax.Array) -> jax.Array:
            return jnp.swapaxes(projected.reshape(batch, positions, -1, self.config.head_dim), 1, 2)

        q = rotary(heads(self.query(x)), self.config.rope_theta)
        k = rotary(heads(self.key(x)), self.config.rope_theta)
        v = heads(self.value(x))
        mixed = jnp.swapaxes(attention(q, k, v), 1, 2).reshape(batch, positions, -1)
        return self.out(mixed), (q, k, v)


class MLP(nnx.Module):
    """SwiGLU feed-forward layer, [B, T, C] -> [B, T, C]."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        self.gate = nnx.Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(config.d_ff, config.d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        self.attention_norm = nnx.RMSNorm(config.d_model, rngs=rngs)
        self.attention = Attention(config, rngs, dtype)
        self.mlp_norm = nnx.RMSNorm(config.d_model, rngs=rngs)
        self.mlp = MLP(config, rngs, dtype)
        self.dropout = nnx.Dropout(config.dropout)

    def __call__(self, x: jax.Array, attention: AttentionFn, rngs: nnx.Rngs | None) -> tuple[jax.Array, QKV]:
        mixed, qkv = self.attention(self.attention_norm(x), attention)
        x = x + self.dropout(mixed, deterministic=rngs is None, rngs=rngs)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)), deterministic=rngs is None, rngs=rngs)
        return x, qkv


class TinyLM(nnx.Module):
    """Byte-level causal language model; `dtype` is that of the matrix products in the layers."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embedding = nnx.Embed(config.vocab, config.d_model, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs, dtype) for _ in range(config.n_layers)])
        self.final_norm = nnx.RMSNorm(config.d_model, rngs=rngs)

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        return_qkv: bool = False,
        attention: AttentionFn = causal_attention,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array | tuple[jax.Array, list[QKV]]:
        """Logits of the next byte, float32 [B, T, vocab], for integer tokens [B, T].

        With `return_qkv`, also one float32 (q [B, H, T, D], k [B, K, T, D], v [B, K, T, D]) per layer,
        after rotary, as they enter `attention`. Dropout is on where `rngs` is given.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or tokens.shape[1] > self.config.context:
            raise ValueError(f"tokens must be [B, T] with T <= {self.config.context}, got {tokens.shape}")
        x, qkvs = self.embedding(tokens), []
        for layer in self.layers:
            x, qkv = layer(x, attention, rngs)
            qkvs.append(tuple(part.astype(jnp.float32) for part in qkv))
        logits = self.embedding.attend(self.final_norm(x))
        return (logits, qkvs) if return_qkv else logits


def capture(text: str, tokens: int) -> dict[str, np.ndarray]:
    """What attention reads of the first bytes of `text`, for `python -m tqcore verify examples/tiny_lm.py:capture`."""
    model, _ = load(Path(__file__).with_name("tiny_lm.safetensors"))
    return arrays(model, text.encode()[: min(tokens, model.config.context)])


def arrays(model: TinyLM, text: bytes) -> dict[str, np.ndarray]:
    """What attention reads of `text`, by the names of `tqcore.verify`."""
    config, data = model.config, np.frombuffer(text, np.uint8)
    _, qkvs = nnx.jit(TinyLM.__call__, static_argnames="return_qkv")(model, data[None], return_qkv=True)
    biases = [block.attention.key.bias[...].reshape(config.n_kv_heads, config.head_dim) for block in model.layers]
    parts = "query", "key", "value", "key_bias"
    layers = [dict(zip(parts, (*qkv, bias), strict=True)) for qkv, bias in zip(qkvs, biases, strict=True)]
    return name_arrays(layers, config.rope_theta)


# ---------------------------------------------------------------------------------------------------
# File format: float16 arrays named by their path in the model, the Config as JSON in the metadata
# ---------------------------------------------------------------------------------------------------


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save(model: TinyLM, path: str | Path, metadata: dict[str, str]) -> None:
    """Writes the parameters as float16 and `metadata` plus the Config to one safetensors file."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    arrays = {_name(keys): np.asarray(leaf, np.float16) for keys, leaf in leaves}
    save_file(arrays, path, metadata | {"config": json.dumps(asdict(model.config))})


def load(path: str | Path) -> tuple[TinyLM, dict[str, str]]:
    """Reads a file written by `save`: the model, parameters in float32, and its metadata."""
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    values, names = json.loads(metadata.get("config", "{}")), [field.name for field in fields(Config)]
    if sorted(values) != sorted(names):
        raise ValueError(f"{path}: metadata 'config' must hold {sorted(names)}, got {sorted(values)}")

    model = nnx.eval_shape(lambda: TinyLM(Config(**values), nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    required = {_name(keys): f"float16{list(leaf.shape)}" for keys, leaf in leaves}
    found = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
    for name in sorted(required | found):
        must, got = required.get(name, "absent"), found.get(name, "absent")
        if must != got:
            raise ValueError(f"{path}: array {name!r} must be {must}, got {got}")

    def value(keys: tuple, _: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(arrays[_name(keys)].astype(np.float32))

    nnx.update(model, jax.tree_util.tree_map_with_path(value, params))
    return model, metadata


# ---------------------------------------------------------------------------------------------------
# Corpus and evaluation
# ---------------------------------------------------------------------------------------------------

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
MAX_FILE_BYTES = 400_000
TOPICS = "pydoc_data/topics.py"  # the library's one large English text: in train despite its size
HELD_OUT_FRACTION = 0.05


def _split_of(name: str) -> str:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < HELD_OUT_FRACTION * 2**64
    return "held_out" if held_out and name != TOPICS else "train"


def _source_names(root: str) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - EXCLUDED_FOLDERS
        names = (Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py"))
        yield from (n for n in names if n == TOPICS or Path(root, n).stat().st_size <= MAX_FILE_BYTES)


def corpus(split: str) -> list[tuple[str, bytes]]:
    """The Python standard library's sources in `split`, "train" or "held_out": sorted (name, bytes)."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train' or 'held_out', got {split!r}")
    root = sysconfig.get_paths()["stdlib"]
    names = sorted(name for name in _source_names(root) if _split_of(name) == split)
    return [(name, Path(root, name).read_bytes()) for name in names]


def text(split: str) -> np.ndarray:
    """All bytes of `corpus(split)` in order, uint8 [N]."""
    return np.frombuffer(b"".join(data for _, data in corpus(split)), np.uint8)


def batches(data: np.ndarray, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Endless random windows of `data` uint8 [N], each uint8 [batch, context + 1]."""
    if len(data) <= context:
        raise ValueError(f"data must hold more than context = {context} bytes, got {len(data)}")
    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(len(data) - context, size=(batch, 1))
        yield data[starts + np.arange(context + 1)]


def window_bits(
    model: TinyLM,
    windows: ArrayLike,
    *,
    attention: AttentionFn = causal_attention,
    rngs: nnx.Rngs | None = None,
) -> jax.Array:
    """Mean bits per byte of bytes 1 to T of windows [B, T + 1], each given those before it: float32 []."""
    windows = jnp.asarray(windows, jnp.int32)
    logits = model(windows[:, :-1], attention=attention, rngs=rngs)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), windows[:, 1:, None], axis=-1)
    return -log_probs.mean() / jnp.log(2.0)


_jit_window_bits = nnx.jit(window_bits, static_argnames="attention")


def bits_per_byte(
    model: TinyLM,
    split: str = "held_out",
    *,
    max_bytes: int = 2**18,
    attention: AttentionFn = causal_attention,
) -> float:
    """Mean bits per byte over at most `max_bytes` of `split`, in disjoint full windows spread evenly."""
    data, context = text(split), model.config.context
    count = min(len(data) - 1, max_bytes) // context
    if count < 1:
        raise ValueError(f"split and max_bytes must hold a window of {context} bytes, got {max_bytes=}")
    starts = np.linspace(0, len(data) - 1 - context, count).astype(int)[:, None]
    windows = data[starts + np.arange(context + 1)]
    total = 0.0
    for first in range(0, count, 16):
        chunk = windows[first : first + 16]
        total += len(chunk) * float(_jit_window_bits(model, chunk, attention=attention))
    return total / count
