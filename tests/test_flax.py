"""Flax modules with compressed caches: against nnx's own attention, and against themselves step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import assert_close, assert_same_bits, attention_tolerance
from flax import linen, nnx

import tqjax
from tqjax.flax import CompressedAttention, CompressedAttentionLinen, compress_attention, init_cache

B, T, C, D = 2, 21, 64, 32
LIMIT = attention_tolerance("float32", D)

pytestmark = pytest.mark.usefixtures("exact_products")


def rotary(x, positions):
    """[B, T, H, D] turned by [B, T]."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * 100.0 ** (-jnp.arange(half) / half)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * jnp.cos(angles) - b * jnp.sin(angles), b * jnp.cos(angles) + a * jnp.sin(angles)], -1)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, C, qkv_features=4 * D, num_kv_heads=2, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(C, rngs=rngs)

    def __call__(self, x, decode=False):
        return x + self.attention(self.norm(x), decode=decode, is_causal=True)


class Model(nnx.Module):
    def __init__(self, rngs, blocks=0):
        self.blocks = nnx.List([Block(rngs) for _ in range(blocks)])
        self.last = Block(rngs)

    def __call__(self, x, decode=False):
        for block in [*self.blocks, self.last]:
            x = block(x, decode)
        return x


def inputs(batch=B):
    return jax.random.normal(jax.random.key(1), (batch, T, C))


@nnx.jit
def generate(model, x):
    """A prefill and steps."""
    outs = [model(x[:, : T - 2], decode=True)]
    outs += [model(x[:, i : i + 1], decode=True) for i in range(T - 2, T)]
    return jnp.concatenate(outs, 1)


@pytest.mark.parametrize("turn", [None, rotary])
def test_swapped_model_is_the_model_where_all_is_dense(turn):
    """Without `decode` always; with it where the window holds everything."""
    model = Model(nnx.Rngs(0))
    expected = np.asarray(model(inputs())) if turn is None else None
    before = jax.tree.leaves(nnx.state(model, nnx.Param))
    swapped = compress_attention(model, rotary=turn, window=T)
    assert swapped is model and all(type(b.attention) is CompressedAttention for b in [*model.blocks, model.last])
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model, nnx.Param)), strict=True))
    whole = np.asarray(model(inputs()))
    if turn is None:
        assert_same_bits(whole, expected)
    init_cache(model, B, T)
    assert_close(np.asarray(generate(model, inputs())), whole, LIMIT)


def test_cache_holds_no_raw_keys():
    model = compress_attention(Model(nnx.Rngs(0)), keys=4, values=2)
    init_cache(model, B, T)
    out, whole = np.asarray(generate(model, inputs())), np.asarray(model(inputs()))
    with pytest.raises(AssertionError):
        assert_close(out, whole, LIMIT)
    assert_close(out, whole, 0.3)  # of 4-bit keys, 2-bit values
    leaves = jax.tree.leaves(nnx.state(model, nnx.Cache))
    per_layer = B * 2 * T * (D // 2 + D // 4 + 2 * 4) + 2 * 4 * B
    assert sum(x.nbytes for x in leaves) == per_layer
    cache = model.last.attention.cache.get_value()
    assert isinstance(cache, tqjax.KVCache) and cache.lengths.tolist() == [T] * B


def test_only_chosen_layers():
    model = compress_attention(Model(nnx.Rngs(0), blocks=2), only=lambda path, module: path[0] == "blocks")
    assert type(model.last.attention) is nnx.MultiHeadAttention
    assert [type(block.attention) for block in model.blocks] == [CompressedAttention] * 2
    init_cache(model, B, T)
    assert model.last.attention.cached_key.shape == (B, T, 2, D)
    alone = compress_attention(nnx.MultiHeadAttention(4, C, rngs=nnx.Rngs(0)))
    assert type(alone) is CompressedAttention


def test_ragged_prefill():
    """The first `counts` positions of a sequence, as if it came alone."""
    make = lambda: CompressedAttention(  # noqa: E731
        4, C, 4 * D, num_kv_heads=2, rotary=rotary, cache_options={"window": 4}, decode=True, rngs=nnx.Rngs(0)
    )
    together, counts = make(), jnp.asarray([T - 1, 9], jnp.int32)
    init_cache(together, B, 2 * T)
    out = together(inputs(), counts=counts)
    step = together(inputs()[:, :1])
    for row, count in ((1, 9),):
        alone = make()
        init_cache(alone, 1, 2 * T)
        assert_close(np.asarray(out[row : row + 1, :count]), np.asarray(alone(inputs()[row : row + 1, :count])), LIMIT)
        assert_close(np.asarray(step[row : row + 1]), np.asarray(alone(inputs()[row : row + 1, :1])), LIMIT)


def test_linen_twin():
    """The same parameters give the same outputs and cache."""
    options = {"window": 4, "first": 1}
    nnx_module = CompressedAttention(
        4, C, 4 * D, num_kv_heads=2, rotary=rotary, cache_options=options, decode=True, rngs=nnx.Rngs(0)
    )
    init_cache(nnx_module, B, T)
    module = CompressedAttentionLinen(4, T, 2, 4 * D, rotary=rotary, cache_options=options, decode=True)
    variables = module.init(jax.random.key(0), inputs()[:, :1])
    params = nnx.to_pure_dict(nnx.state(nnx_module, nnx.Param))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    cache = {"cache": variables["cache"]}
    apply = jax.jit(lambda cache, x: module.apply({"params": params} | cache, x, mutable="cache"))
    for part in (inputs()[:, : T - 2], inputs()[:, T - 2 : T - 1], inputs()[:, T - 1 :]):
        out, cache = apply(cache, part)
        assert_close(np.asarray(out), np.asarray(nnx_module(part)), LIMIT)
    assert cache["cache"]["kv"].lengths.tolist() == [T] * B
    whole = CompressedAttentionLinen(4, T, 2, 4 * D, rotary=rotary).apply({"params": params}, inputs())
    assert_close(np.asarray(whole), np.asarray(nnx_module(inputs(), decode=False, is_causal=True)), LIMIT)
    assert isinstance(module, linen.Module)


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "`init_cache` must be called before decoding"),
        ({"mask": jnp.ones((B, 1, T, T), bool)}, "causal self-attention without dropout, got `mask`"),
        ({"inputs_k": inputs()}, "causal self-attention without dropout, got `inputs_k`"),
        ({"deterministic": False}, "got dropout"),
    ],
)
def test_refused(call, message):
    module = CompressedAttention(4, C, dropout_rate=0.1 if "deterministic" in call else 0.0, rngs=nnx.Rngs(0))
    if call:
        init_cache(module, B, T)
    with pytest.raises(ValueError, match=message):
        module(inputs(), decode=True, **call)
    if call:
        assert not module.cache.get_value().lengths.any()


@pytest.mark.cpu
def test_too_many_positions_are_refused():
    module = CompressedAttention(4, C, rngs=nnx.Rngs(0))
    init_cache(module, B, T)
    with pytest.raises(ValueError, match="must have room"):
        module(jnp.zeros((B, T + 1, C)), decode=True)
