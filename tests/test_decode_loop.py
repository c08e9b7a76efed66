"""A decode loop compiles a few kernels at its start and none later, in either framework."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import BACKENDS, CUDA, DEVICE, assert_same_bits
from cases import Case, inputs, oracle

import tq_torch
import tqjax
from tq_torch import triton_call
from tqcore import kernels, tuning
from tqjax import triton_call as jax_triton_call

LENGTHS = range(1, 1001)
MOST = 16  # variants: whether S is 1, S and the blocks of a program multiples of 16, and the first few blocks
KERNELS = ["triton", "gluon"] if any(b.implementation == "gluon" for b in BACKENDS) else ["triton"]


def cache(given):
    q, codes, norms, centroids = (torch.tensor(x, device=DEVICE) for x in given.arrays)
    return q, codes, norms, centroids


@pytest.mark.parametrize("queries", [1, 17])
@pytest.mark.parametrize("implementation", ["triton", "gluon"])
def test_torch_specialises_little(monkeypatch, implementation, queries):
    """What Triton compiles anew for: constants, and whether an integer is 1 or a multiple of 16."""
    given = inputs(Case(B=1, K=2, G=4, T=queries, S=LENGTHS[-1], D=128))
    q, codes, norms, _ = cache(given)
    seen = set()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self.launch

        def launch(self, *arguments, **constants):
            kinds = [(x == 1, x % 16 == 0) if isinstance(x, int) else None for x in arguments]
            seen.add((self.name, *kinds, *constants.items()))

    monkeypatch.setattr(triton_call, "load", Kernel)
    for length in LENGTHS:
        args = q, codes[:, :, :length], norms[:, :, :length], torch.zeros(5, dtype=torch.int32)
        triton_call.fused_qk_scores(*args, 1.0, implementation=implementation)
    assert 1 <= len(seen) <= MOST, f"{len(seen)} variants: {sorted(map(str, seen))}"


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", KERNELS)
def test_torch_compiles_few(implementation):
    given = inputs(Case(B=1, K=2, G=4, T=1, S=LENGTHS[-1], D=128))
    q, codes, norms, centroids = cache(given)

    def compiled():
        return sum(len(caches[0]) for caches in kernels.load(implementation).device_caches.values())

    before = compiled()
    for length in LENGTHS:
        scores = tq_torch.fused_qk_scores(
            q, codes[:, :, :length], norms[:, :, :length], centroids, given.scale,
            **given.heads, implementation=implementation,
        )  # fmt: skip
    assert_same_bits(scores.cpu().numpy(), oracle(given))
    assert compiled() - before <= MOST


@pytest.mark.parametrize("implementation", [None, *(KERNELS if CUDA else [])])
def test_jax_compiles_once(implementation):
    """In JAX a cache has its full size from the start, and a traced length says how much of it is filled."""
    given = inputs(Case(B=1, K=2, G=4, T=1, S=128, D=128))
    q, codes, norms, centroids = given.arrays

    @jax.jit
    def step(cache_codes, cache_norms, position):
        at = (0, 0, position, 0)
        new_codes, new_norms = (jax.lax.dynamic_slice_in_dim(x, position, 1, 2) for x in (codes, norms))
        cache_codes = jax.lax.dynamic_update_slice(cache_codes, new_codes, at)
        cache_norms = jax.lax.dynamic_update_slice(cache_norms, new_norms, at[:3])
        scores = tqjax.fused_qk_scores(
            q, cache_codes, cache_norms, centroids, given.scale, **given.heads, implementation=implementation
        )
        return cache_codes, cache_norms, jnp.where(jnp.arange(norms.shape[2]) <= position, scores, -jnp.inf)

    before = jax_triton_call._compile.cache_info().misses
    state = jnp.zeros_like(codes), jnp.zeros_like(norms)
    for position in range(len(norms[0, 0])):
        *state, scores = step(*state, position)
    assert step._cache_size() == 1 and jax_triton_call._compile.cache_info().misses - before <= 1
    assert_same_bits(np.asarray(scores), oracle(given))


def test_block_sizes_do_not_depend_on_the_length():
    for kernel in ("triton", "gluon", "gluon_long"):
        configs = [tuning.score_config(kernel, 64, keys, 8, 128) for keys in (1, 100, 10**4, 10**6)]
        assert len({(c.block_r, c.block_s, c.num_warps, c.num_stages) for c in configs}) == 1
        assert len({c.blocks for c in configs}) > (kernel != "gluon_long")
