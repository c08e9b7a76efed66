"""A decode loop in each framework while the cache fills: what is compiled, and the time of a step beside bfloat16."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from attention_inputs import Case, InputSets, vectors
from torch.nn.attention import SDPBackend, sdpa_kernel

import tq_torch
import tqjax
from tqcore import kernels

CHUNK = 50  # steps between two looks at the clock
WARM_UP = 16  # steps after which nothing may be compiled


class FillingCase(Case):
    @property
    def bursts(self) -> list[int]:
        return [1]  # one cache


def run(steps: int, device: torch.device, small: bool) -> dict[str, Any]:
    """Of each front: lengths, microseconds a step of each implementation, and compilations."""
    case = FillingCase(B=1, K=2, G=2, S=64, D=64) if small else FillingCase(B=8, K=8, G=4, S=2**17)
    sets = InputSets(case, device, seed=0)
    lengths = [max(1, case.S * (step + 1) // steps) for step in range(steps)]
    torch_dense, jax_dense = (_torch_dense, _jax_dense) if device.type == "cuda" else (None, None)
    return {
        "torch": _loop(lengths, sets, "torch", "dense", _torch_packed(case), _compiled_by_triton, torch_dense),
        "jax": _loop(lengths, sets, "jax", "dense_bsk", *_jax_packed(case), jax_dense),
    }


def _loop(lengths, sets, front, form, packed: Callable, compiled: Callable[[], int], dense: Callable | None):
    packed_inputs = sets.of(front, "packed")[0][0]
    wait = jax.block_until_ready if front == "jax" else _synchronize
    found = {"lengths": lengths[CHUNK - 1 :: CHUNK], "us": {}}
    start = compiled()
    for name, function, inputs in (
        ("packed", packed, packed_inputs),
        ("bfloat16", dense, dense and sets.of(front, form)[0][0]),
    ):
        if function is None:
            continue
        us, warm = [], None
        clock = time.perf_counter()
        for step, length in enumerate(lengths):
            out = function(length, *inputs)
            if step + 1 == WARM_UP:
                warm = compiled()
            if (step + 1) % CHUNK == 0:
                wait(out)
                us.append(round((time.perf_counter() - clock) / CHUNK * 1e6, 2))
                clock = time.perf_counter()
        found["us"][name] = us
        if name == "packed":
            found["compiled"] = {"first_steps": warm and warm - start, "all_steps": compiled() - start}
    return found


def _synchronize(out):
    if out.is_cuda:
        torch.cuda.synchronize()


def _torch_packed(case):
    def step(length, query, *packed):
        keys, values, lengths, pages = vectors(case, *packed)
        lengths.fill_(length)
        return tq_torch.attention(query, keys, values, kv_lengths=lengths, page_table=pages)

    return step


def _compiled_by_triton() -> int:
    names = [name for name in ("attention", "gluon_attention", "merge") if kernels.can_load(name)]
    caches = [getattr(kernels.load(name), "device_caches", {}) for name in names]
    return sum(len(each[0]) for found in caches for each in found.values())


def _torch_dense(length, query, keys, values):
    """Flash alone: cuDNN builds a plan for every length, which takes it 40 ms."""
    query = query.reshape(*keys.shape[:2], -1, query.shape[-1])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(query, keys[:, :, :length], values[:, :, :length])


def _jax_packed(case):
    @jax.jit
    def attend(query, k_codes, k_norms, v_codes, v_norms, lengths):
        keys, values, lengths, _ = vectors(case, k_codes, k_norms, v_codes, v_norms, lengths)
        return tqjax.attention(query, keys, values, kv_lengths=lengths)

    def step(length, query, *packed):
        return attend(query, *packed[:4], jnp.full(case.B, length, jnp.int32))

    return step, attend._cache_size


@jax.jit
def _jax_dense_step(query, keys, values, lengths):
    return jax.nn.dot_product_attention(query, keys, values, key_value_seq_lengths=lengths, implementation="cudnn")


def _jax_dense(length, query, keys, values):
    return _jax_dense_step(query, keys, values, jnp.full(len(query), length, jnp.int32))
