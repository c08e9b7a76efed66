"""Trains the byte-level model of tiny_lm.py on the Python standard library and saves it as safetensors."""

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_lm
from flax import nnx

PEAK_RATE = 2e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.1
REPORTS = 12


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=4.0, help="limit of training, compilation included")
    parser.add_argument("--steps", type=int, help="limit of training, if reached before --minutes")
    parser.add_argument("--batch", type=int, default=64, help="windows per step")
    parser.add_argument("--context", type=int, default=1024, help="bytes per window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-bytes", type=int, default=2**20, help="most held-out bytes per evaluation")
    return parser.parse_args()


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up over steps, cosine decay to zero over progress from 0 to 1."""
    return PEAK_RATE * min(1.0, step / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * progress))


def adamw() -> optax.GradientTransformation:
    """Clipped AdamW at learning rate 1; the step scales its updates."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(WEIGHT_DECAY, mask=partial(jax.tree.map, lambda x: x.ndim > 1)),
    )


def make_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """The jitted (params, state, windows [B, T + 1], step, rate) -> (params, state, bits per byte)."""

    def loss(params: nnx.State, windows: jax.Array, dropout_key: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return tiny_lm.window_bits(model, windows, rngs=nnx.Rngs(dropout=dropout_key))

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(
        params: nnx.State, state: optax.OptState, windows: jax.Array, step: int, rate: float
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        dropout_key = jax.random.fold_in(jax.random.key(seed), step)
        bits, gradients = jax.value_and_grad(loss)(params, windows, dropout_key)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda update: -rate * update, updates))
        return params, state, bits

    return train_step


def train(model: tiny_lm.TinyLM, args: argparse.Namespace) -> tuple[tiny_lm.TinyLM, list]:
    """The trained model and its loss curve, [[step, train, held-out bits per byte], ...].

    The train figure is the mean, dropout on, over the steps since the previous entry.
    """
    graphdef, params = nnx.split(model)
    optimizer = adamw()
    state = optimizer.init(params)
    train_step = make_step(graphdef, optimizer, args.seed)
    windows = tiny_lm.batches(tiny_lm.text("train"), args.batch, args.context, args.seed)

    started, progress, step = time.monotonic(), 0.0, 0
    curve, losses = [], []
    while progress < 1.0:
        step += 1
        rate = learning_rate(step, progress)
        params, state, loss = train_step(params, state, next(windows), step, rate)
        losses.append(loss)
        losses[max(0, len(losses) - 2)].block_until_ready()  # keeps dispatch one step ahead of the device
        elapsed = time.monotonic() - started
        progress = max(elapsed / (60 * args.minutes), step / args.steps if args.steps else 0.0)
        if progress >= min(1.0, (len(curve) + 1) / REPORTS):
            held_out = tiny_lm.bits_per_byte(nnx.merge(graphdef, params), max_bytes=args.eval_bytes)
            train_bits = float(np.mean(jax.device_get(losses)))
            curve.append([step, round(train_bits, 4), round(held_out, 4)])
            losses = []
            print(
                f"step {step:6d}  {elapsed:6.1f} s  rate {rate:.2e}"
                f"  train {train_bits:.3f}  held-out {held_out:.3f} bits per byte",
                flush=True,
            )
    return nnx.merge(graphdef, params), curve


def git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("TQ_COMMIT", "unknown")


def describe(args: argparse.Namespace, parameters: int, curve: list) -> dict[str, str]:
    """How the weights came to be, as safetensors metadata."""
    return {
        "command": shlex.join(["python3", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": str(curve[-1][0]),
        "batch": str(args.batch),
        "parameters": str(parameters),
        "loss_curve": json.dumps(curve),
    }


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    model = tiny_lm.TinyLM(tiny_lm.Config(context=args.context), nnx.Rngs(args.seed), dtype=dtype)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{parameters:,} parameters, {jnp.dtype(dtype).name} on {jax.devices()[0].device_kind}", flush=True)

    model, curve = train(model, args)
    metadata = describe(args, parameters, curve)
    tiny_lm.save(model, args.out, metadata)
    model, metadata = tiny_lm.load(args.out)
    held_out = tiny_lm.bits_per_byte(model, max_bytes=args.eval_bytes)
    tiny_lm.save(model, args.out, metadata | {"held_out_bits_per_byte": f"{held_out:.4f}"})
    print(
        f"{args.out}: {args.out.stat().st_size:,} bytes, {curve[-1][0]} steps, "
        f"{held_out:.4f} held-out bits per byte as float16",
    )


if __name__ == "__main__":
    main()
