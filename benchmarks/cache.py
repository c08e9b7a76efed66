"""Memory of a model's cache as the allocator counts it, and the time of a decode step, append included, on one GPU.

    python3 benchmarks/cache.py               to benchmarks/results/<device>/cache.json
    python3 benchmarks/cache.py --dry-run     tiny sizes on a CPU, to --out only

The shape is Llama-3.1-8B's: 32 layers, 8 key heads of 128, 32 query heads; batch 8. Memory: caches of all layers,
filled in chunks, against bfloat16 tensors of the same capacity. Time: a step of four layers, each of which appends a
token and attends over S, in torch as a CUDA graph, in JAX as one compiled function whose caches are donated; bfloat16
writes its token into a tensor and attends by the better of flash and cuDNN (torch), or by cuDNN (JAX). Microseconds a
layer, medians of samples.

Exit status: 0, or 1 where an output is wrong, or 2 where CUDA is missing.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
from pathlib import Path

import bench

LAYERS, BATCH, KV_HEADS, GROUP, HEAD_DIM = 32, 8, 8, 4, 128
STEP_LAYERS = 4
POSITIONS = (8192, 32768, 131072)
MEMORY_POSITIONS, CHUNK = 32768, 4096
ROOM = 512  # positions past S, for the steps that are timed
SAMPLES, STEPS = 9, 20
LIMIT = 0.05  # of the relative difference from bfloat16 attention over what the cache holds, decompressed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; None: benchmarks/results/<device>")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; nothing goes to the results")
    arguments = parser.parse_args()
    bench.prepare_environment(arguments.dry_run)

    # These read the environment when they are imported.
    import jax
    import torch

    if not arguments.dry_run and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        print("cache.py needs an NVIDIA GPU that both torch and JAX can use.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    batch, positions = (2, (64,)) if arguments.dry_run else (BATCH, POSITIONS)
    report = bench.describe(device, arguments.dry_run, __doc__.split("\n\n")[2])
    rows = memory(device) if device.type == "cuda" else []  # first: JAX keeps what it allocates
    for front, steps in (("torch", torch_steps), ("jax", jax_steps)):
        for size in positions:
            found = [{"op": "decode", "front": front, "S": size} | row for row in steps(size, batch, device)]
            rows += found
            print(*found, sep="\n", file=sys.stderr, flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for row in rows:
        print(row)
    if any(row.get("error", 0) > LIMIT for row in rows):
        print("A time is not reported: an output is wrong.", file=sys.stderr)
        return 1
    bench.write(report | {"op": "cache", "rows": rows}, (arguments.out or bench.results_folder(report)) / "cache.json")
    return 0


def memory(device) -> list[dict]:
    """Bytes that the allocator holds for the caches of all layers, and the most while they are filled."""
    import torch

    import tq_torch

    def bfloat16():
        shape = BATCH, KV_HEADS, MEMORY_POSITIONS, HEAD_DIM
        return [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2 * LAYERS)]

    def packed(**options):
        quantizer = tq_torch.Quantizer(HEAD_DIM)
        make = functools.partial(tq_torch.KVCache.zeros, BATCH, KV_HEADS, MEMORY_POSITIONS, quantizer)
        caches = [make(dtype="bfloat16", device=device, **options) for _ in range(LAYERS)]
        for _ in range(MEMORY_POSITIONS // CHUNK):
            for cache in caches:
                token = torch.randn(BATCH, KV_HEADS, CHUNK, HEAD_DIM, dtype=torch.bfloat16, device=device)
                cache.append(token, token)
        return caches

    rows = []
    for name, make in (
        ("bfloat16", bfloat16),
        ("4/4", packed),
        ("4/4 window 128", functools.partial(packed, window=128, block=16)),
    ):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = make()
        torch.cuda.synchronize()
        taken, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        rows.append({"op": "memory", "cache": name, "S": MEMORY_POSITIONS, "bytes": taken, "peak_bytes": peak})
        if name != "bfloat16":
            rows[-1]["nbytes"] = sum(cache.nbytes for cache in held)
            rows[-1]["smaller"] = round(rows[0]["bytes"] / taken, 3)
        del held
    return rows


def torch_steps(size, batch, device) -> list[dict]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import tq_torch

    new = functools.partial(torch.randn, dtype=torch.bfloat16, device=device)
    tokens = [new(batch, KV_HEADS, 1, HEAD_DIM) for _ in range(2 * STEP_LAYERS)]
    query = new(batch, KV_HEADS * GROUP, 1, HEAD_DIM)
    make = functools.partial(tq_torch.KVCache.zeros, batch, KV_HEADS, size + ROOM, tq_torch.Quantizer(HEAD_DIM))
    caches = [make(dtype="bfloat16", device=device) for _ in range(STEP_LAYERS)]
    for cache in caches:
        for start in range(0, size, CHUNK):
            shape = batch, KV_HEADS, min(CHUNK, size - start), HEAD_DIM
            cache.append(new(shape), new(shape))
    dense_caches = [cache.dense() for cache in caches]

    def packed():
        for i, cache in enumerate(caches):
            cache.append(tokens[2 * i], tokens[2 * i + 1])
            out = cache.attend(query)
        return out

    def reset():
        for cache in caches:
            cache.lengths.fill_(size)
            cache.packed_lengths.fill_(size)

    def dense():
        for i, (keys, values) in enumerate(dense_caches):
            keys[:, :, size] = tokens[2 * i][:, :, 0]
            values[:, :, size] = tokens[2 * i + 1][:, :, 0]
            seen = keys[:, :, : size + 1], values[:, :, : size + 1]
            out = torch.nn.functional.scaled_dot_product_attention(query, *seen, enable_gqa=True)
        return out

    got, expected = packed(), dense()
    error = float((got.float() - expected.float()).norm() / expected.float().norm())
    rows = [{"implementation": "4/4", "us": _torch_time(packed, reset, device), "error": error}]
    if device.type == "cuda":
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            with sdpa_kernel(backend):
                us = _torch_time(dense, lambda: None, device)
            rows.append({"implementation": f"bfloat16 {backend.name.split('_')[0].lower()}", "us": us})
    return _compared(rows)


def _torch_time(function, reset, device) -> float:
    import torch

    reset()
    function()
    if device.type == "cuda":
        reset()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        call, wait = graph.replay, torch.cuda.synchronize
    else:
        call, wait = function, lambda: None

    def sample():
        reset()
        call()
        wait()
        start = time.perf_counter()
        for _ in range(STEPS):
            call()
        wait()
        return (time.perf_counter() - start) / STEPS * 1e6 / STEP_LAYERS

    return round(statistics.median(sample() for _ in range(SAMPLES)), 2)


def jax_steps(size, batch, device) -> list[dict]:
    import jax
    import jax.numpy as jnp

    import tqjax

    draws = iter(jax.random.split(jax.random.key(0), 10_000))

    def new(*shape):
        return jax.random.normal(next(draws), shape, jnp.bfloat16)

    tokens = [(new(batch, KV_HEADS, 1, HEAD_DIM), new(batch, KV_HEADS, 1, HEAD_DIM)) for _ in range(STEP_LAYERS)]
    query = new(batch, KV_HEADS * GROUP, 1, HEAD_DIM)
    caches = jax_caches(size, batch, new)
    held = [jax.jit(tqjax.KVCache.dense)(cache) for cache in caches]
    dense_caches = [tuple(jnp.swapaxes(x[:, :, : size + 1], 1, 2) for x in pair) for pair in held]  # [B, S, K, D]
    del held

    @functools.partial(jax.jit, donate_argnums=0)
    def packed(caches):
        done, outs = [], []
        for cache, (key, value) in zip(caches, tokens, strict=True):
            cache = cache.append(key, value)
            outs.append(cache.attend(query))
            done.append(cache)
        return done, outs

    @functools.partial(jax.jit, donate_argnums=0)
    def reset(caches):
        return [cache.crop(size) for cache in caches]

    implementation = "cudnn" if device.type == "cuda" else "xla"

    @functools.partial(jax.jit, donate_argnums=0)
    def dense(caches):
        done, outs = [], []
        for (keys, values), (key, value) in zip(caches, tokens, strict=True):
            keys = jax.lax.dynamic_update_slice(keys, jnp.swapaxes(key, 1, 2), (0, size, 0, 0))
            values = jax.lax.dynamic_update_slice(values, jnp.swapaxes(value, 1, 2), (0, size, 0, 0))
            rows = jnp.swapaxes(query, 1, 2)
            outs.append(jax.nn.dot_product_attention(rows, keys, values, implementation=implementation))
            done.append((keys, values))
        return done, outs

    caches, outs = packed(caches)
    got = jnp.float32(outs[-1])
    dense_caches, outs = dense(dense_caches)
    expected = jnp.float32(jnp.swapaxes(outs[-1], 1, 2))
    error = float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))
    rows = [{"implementation": "4/4", "us": jax_time(packed, caches, reset), "error": error}]
    del caches
    rows.append({"implementation": "bfloat16 cudnn", "us": jax_time(dense, dense_caches, lambda held: held)})
    return _compared(rows)


def jax_caches(size, batch, new) -> list:
    """Of STEP_LAYERS layers, with `size` positions and room for more; `new` draws an array of a shape."""
    import jax

    import tqjax

    fill = jax.jit(tqjax.KVCache.append, donate_argnums=0)
    caches = []
    for _ in range(STEP_LAYERS):
        cache = tqjax.KVCache.zeros(batch, KV_HEADS, size + ROOM, tqjax.Quantizer(HEAD_DIM), dtype="bfloat16")
        for start in range(0, size, CHUNK):
            shape = batch, KV_HEADS, min(CHUNK, size - start), HEAD_DIM
            cache = fill(cache, new(*shape), new(*shape))
        caches.append(cache)
    return caches


def jax_time(step, held, reset) -> float:
    """Microseconds a layer of step(held) -> (held, outputs)."""
    import jax

    samples = []
    for _ in range(SAMPLES):
        held, outs = step(reset(held))
        jax.block_until_ready((held, outs))
        start = time.perf_counter()
        for _ in range(STEPS):
            held, outs = step(held)
        jax.block_until_ready((held, outs))
        samples.append((time.perf_counter() - start) / STEPS * 1e6 / STEP_LAYERS)
    return round(statistics.median(samples), 2)


def _compared(rows) -> list[dict]:
    """Rows with how many times faster the first is than the best of the others."""
    if len(rows) > 1:
        rows[0]["vs_bf16"] = round(min(row["us"] for row in rows[1:]) / rows[0]["us"], 3)
    return rows


if __name__ == "__main__":
    sys.exit(main())
