"""A decode step of JAX on one GPU and on several, the key heads of its caches split over them.

    python3 benchmarks/several.py               to benchmarks/results/<device>/several.json
    python3 benchmarks/several.py --dry-run     tiny sizes on two CPU devices, to --out only

A step appends a token to each of four caches and attends over it: B8 K8 G4 D128, 4/4 bits. A compiled function, whose
caches are donated, makes one step or a scan of 16, by automatic partitioning and by `shard_map`; microseconds a layer,
by the host's clock. One step a call shows what dispatching to several devices from Python costs, 16 what the devices
take. Before a time is taken: scores and codes have the bits of one device, attention is within LIMIT of it, and the
compiled function has no collective.

Exit status: 0, or 1 where something differs, or 2 where there are not two GPUs.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

import bench
import cache
import numpy as np

POSITIONS = (32768, 131072)
CALL_STEPS = (1, 16)
LIMIT = 1e-3  # of the relative difference between one device and several
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; None: benchmarks/results/<device>")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; nothing goes to the results")
    arguments = parser.parse_args()
    bench.prepare_environment(arguments.dry_run)
    if arguments.dry_run:
        os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"

    # These read the environment when they are imported.
    import jax
    import torch

    dry, devices = arguments.dry_run, jax.devices()
    if len(devices) < 2 or not (dry or jax.default_backend() == "gpu"):
        print("several.py needs two GPUs; --dry-run needs two CPU devices.", file=sys.stderr)
        return 2
    report = bench.describe(torch.device("cpu" if dry else "cuda"), dry, __doc__.split("\n\n")[2])
    report |= {"op": "several", "devices": [str(device) for device in devices[:2]]}
    rows = []
    for batch, size in [(2, 64)] if dry else [(cache.BATCH, size) for size in POSITIONS]:
        rows += run(devices[:2], batch, size)
        if not all(row["right"] for row in rows):
            print("red: something differs; no time is reported", file=sys.stderr)
            return 1
        bench.write(report | {"rows": rows}, (arguments.out or bench.results_folder(report)) / "several.json")
    return 0


def run(devices, batch, size) -> list[dict]:
    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    caches, tokens, query = inputs(batch, size)
    q, k_codes, k_norms = query, caches[0].keys.codes, caches[0].keys.norms
    mesh = jax.make_mesh((len(devices),), ("heads",), axis_types=(AxisType.Auto,), devices=devices)
    specs = jax.tree.map(lambda x: P(None, "heads") if x.ndim > 2 else P(), (caches, tokens, query))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    one_scores = scores(q, k_codes, k_norms)
    spread = scores(*jax.device_put((q, k_codes, k_norms), NamedSharding(mesh, P(None, "heads"))))
    same_scores = bool((np.asarray(one_scores).view(np.int32) == np.asarray(spread).view(np.int32)).all())
    rows = []
    for steps in CALL_STEPS:
        decode = functools.partial(decode_steps, steps)
        split = jax.shard_map(decode, mesh=mesh, in_specs=specs, out_specs=(specs[0], P(None, None, "heads")))
        ways = {"one device": (decode, None), "automatic": (decode, places), "shard_map": (split, places)}
        one, codes, expected = None, None, None
        for name, (function, where) in ways.items():
            function = jax.jit(function, donate_argnums=0)
            given = jax.tree.map(jax.numpy.copy, (caches, tokens, query))
            given = given if where is None else jax.device_put(given, where)
            compiled = function.lower(*given).compile()
            text = compiled.as_text()
            found = sorted({kind for kind in COLLECTIVES if kind in text})
            held, outs = compiled(*given)
            out = np.stack(list(map(np.asarray, outs)))
            after = np.asarray(held[-1].keys.codes[..., size : size + steps, :])
            expected, codes = (out, after) if expected is None else (expected, codes)
            error = float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
            right = same_scores and not found and error <= LIMIT and bool((after == codes).all())
            us = round(timed(function, held, given[1:], size) / steps, 2)
            one = us if one is None else one
            row = {"op": "decode", "way": name, "devices": 1 if where is None else len(devices), "S": size}
            row |= {"steps_per_call": steps, "us": us, "error": error, "collectives": found}
            rows.append(row | {"same_scores": same_scores, "right": right, "vs_one": round(one / us, 3)})
            print(rows[-1], flush=True)
            del held, given
    return rows


def inputs(batch, size):
    import jax
    import jax.numpy as jnp

    draws = iter(jax.random.split(jax.random.key(0), 1000))

    def new(*shape):
        return jax.random.normal(next(draws), shape, jnp.bfloat16)

    caches = cache.jax_caches(size, batch, new)
    token = batch, cache.KV_HEADS, 1, cache.HEAD_DIM
    tokens = [(new(*token), new(*token)) for _ in caches]
    return caches, tokens, new(batch, cache.KV_HEADS * cache.GROUP, 1, cache.HEAD_DIM)


def decode_steps(steps, caches, tokens, query):
    """The caches, and every layer's outputs of all steps: XLA leaves out what is not returned."""
    import jax

    def step(caches, _):
        done, outs = [], []
        for one, (key, value) in zip(caches, tokens, strict=True):
            one = one.append(key, value)
            outs.append(one.attend(query).astype("float32"))
            done.append(one)
        return done, outs

    return jax.lax.scan(step, caches, length=steps)


def scores(q, codes, norms):
    import jax

    import tqjax

    table = tqjax.Quantizer(cache.HEAD_DIM).codebook.centroids
    heads = {"n_q_heads": cache.KV_HEADS * cache.GROUP, "n_kv_heads": cache.KV_HEADS}
    return jax.jit(functools.partial(tqjax.fused_qk_scores, centroids=table, scale=cache.HEAD_DIM**-0.5, **heads))(
        q, packed_indices=codes, norms=norms
    )


def timed(function, held, rest, size) -> float:
    """Microseconds a layer of a jitted function: a `Compiled` is called from Python, more slowly."""
    import jax

    crop = jax.jit(lambda caches: [one.crop(size) for one in caches], donate_argnums=0)
    places = jax.tree.map(lambda x: x.sharding, held)
    return cache.jax_time(lambda held: function(held, *rest), held, lambda held: jax.device_put(crop(held), places))


if __name__ == "__main__":
    sys.exit(main())
