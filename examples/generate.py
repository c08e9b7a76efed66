"""The tiny language model generates from dense and from compressed caches, in Flax and in Hugging Face transformers.

Prompts are held-out texts. Bits per byte are those of their true continuations, read a byte at a time.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import generate_flax
import generate_transformers
import jax.numpy as jnp
import numpy as np
import tiny_lm
import torch
import transformers
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import tqjax
from tq_torch.transformers import TurboQuantCache

console = Console(highlight=False, markup=False)
LN2 = np.log(2)


def texts(count: int, length: int) -> NDArray[np.uint8]:
    """[count, length] bytes of held-out text, spread evenly."""
    data = tiny_lm.text("held_out")
    return data[np.linspace(0, len(data) - length, count).astype(int)[:, None] + np.arange(length)]


class Flax:
    """The model in Flax; a dense cache is one whose window holds everything."""

    name = "Flax"

    def __init__(self, batch: int, length: int, window: int):
        self.models = {
            "dense": generate_flax.load(batch, length, window=length),
            "compressed": generate_flax.load(batch, length, window=window),
        }

    def start(self, kind: str) -> Callable[[NDArray], NDArray]:
        """Forgets; returns tokens [B, T] -> logits [B, T, vocab]."""
        model = self.models[kind]
        for layer in model.layers:
            layer.attention.inner.cache.set_value(layer.attention.inner.cache.get_value().reset())
        return lambda tokens: np.asarray(generate_flax.read(model, jnp.asarray(tokens)))

    def nbytes(self, kind: str) -> int:
        return sum(layer.attention.inner.cache.get_value().nbytes for layer in self.models[kind].layers)

    def save(self, path: Path) -> None:
        layers = self.models["compressed"].layers
        tqjax.save_file({f"layer.{i}": x.attention.inner.cache.get_value() for i, x in enumerate(layers)}, path)


class Transformers:
    """The model in transformers; its dense cache is theirs."""

    name = "Hugging Face"

    def __init__(self, batch: int, length: int, window: int):
        self.model, self.window, self.caches = generate_transformers.load(), window, {}

    def start(self, kind: str) -> Callable[[NDArray], NDArray]:
        config = self.model.config
        if kind == "dense":
            return self.over(kind, transformers.DynamicCache(config=config), "sdpa")
        return self.over(kind, TurboQuantCache(config, window=self.window), "turboquant")

    def over(self, kind: str, cache: transformers.Cache, implementation: str) -> Callable[[NDArray], NDArray]:
        self.caches[kind] = cache
        self.model.set_attn_implementation(implementation)

        @torch.inference_mode()
        def read(tokens: NDArray) -> NDArray:
            return self.model(torch.tensor(tokens.astype(np.int64)), past_key_values=cache).logits.numpy()

        return read

    def nbytes(self, kind: str) -> int:
        cache = self.caches[kind]
        if kind == "compressed":
            return cache.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def greedy(read: Callable[[NDArray], NDArray], prompts: NDArray, count: int) -> tuple[NDArray, float]:
    """The likeliest next bytes [B, count], and bytes a second."""
    found = [read(prompts)[:, -1:].argmax(-1)]
    found.append(read(found[-1])[:, -1:].argmax(-1))  # what the first step compiles is not counted
    started = time.perf_counter()
    for _ in range(count - 2):
        found.append(read(found[-1])[:, -1:].argmax(-1))
    rate = len(prompts) * (count - 2) / (time.perf_counter() - started)
    return np.concatenate(found, 1).astype(np.uint8), rate


def bits_per_byte(read: Callable[[NDArray], NDArray], prompts: NDArray, continuations: NDArray) -> float:
    """Of `continuations` [B, count] after `prompts`, each byte read before the next."""
    logits, total = read(prompts)[:, -1:], 0.0
    for i in range(continuations.shape[1]):
        x = logits[:, 0].astype(np.float64)
        peak = x.max(-1, keepdims=True)
        logs = x - peak - np.log(np.exp(x - peak).sum(-1, keepdims=True))
        total -= np.take_along_axis(logs, continuations[:, i : i + 1].astype(int), 1).sum()
        if i + 1 < continuations.shape[1]:
            logits = read(continuations[:, i : i + 1])
    return total / continuations.size / LN2


def divergence(a: NDArray, b: NDArray) -> list[int]:
    """By sequence, how many bytes agree before the first that does not."""
    return [int(np.argmax(row)) if row.any() else a.shape[1] for row in a != b]


def same_file(flax: Flax, hugging: Transformers, prompts: NDArray, count: int) -> bool:
    """Whether both frameworks continue one file with the same bytes: Flax reads the prompt, and saves its cache."""
    read = flax.start("compressed")
    first = read(prompts)[:, -1:].argmax(-1)
    with tempfile.TemporaryDirectory() as folder:
        flax.save(Path(folder, "cache.safetensors"))
        cache = TurboQuantCache(hugging.model.config, window=hugging.window)
        moved = hugging.over("moved", cache.load(Path(folder, "cache.safetensors")), "turboquant")
    return all(np.array_equal(*(greedy(go, first, count - 1)[0] for go in pair)) for pair in [(read, moved)])


def compare(count: int, prompt: int, tokens: int, window: int, show: int) -> tuple[dict[tuple[str, str], float], bool]:
    """Generates `tokens` bytes from `count` prompts; prints a table and `show` of the texts.

    Returns bits per byte, and whether both frameworks continue one file alike.
    """
    data = texts(count, prompt + tokens)
    prompts, continuations = data[:, :prompt], data[:, prompt:]
    sides = [kind(count, prompt + tokens, window) for kind in (Flax, Transformers)]
    rows, found, bits = [], {}, {}
    for side in sides:
        for kind in ("dense", "compressed"):
            bits[side.name, kind] = bits_per_byte(side.start(kind), prompts, continuations)
            found[side.name, kind], rate = greedy(side.start(kind), prompts, tokens)
            agree = divergence(found[side.name, kind], found[side.name, "dense"])
            change = bits[side.name, kind] / bits[side.name, "dense"] - 1
            rows.append(
                [
                    f"{side.name}, {kind}", f"{bits[side.name, kind]:.4f}", f"{100 * change:+.2f} %",
                    f"{side.nbytes(kind):,}", f"{rate:.0f}", f"{np.median(agree):.0f} ({min(agree)})",
                ]
            )  # fmt: skip
    _table(f"{count} prompts of {prompt} bytes, {tokens} more; 4/4 bits, the last {window} positions dense", rows)
    console.print("  bytes as dense: how many agree before the first that does not, median (least)")
    for index in range(show):
        for kind in ("dense", "compressed"):
            text = bytes(found["Flax", kind][index]).decode(errors="replace")
            console.print(f"  {kind:>10}  {text!r}", soft_wrap=True)
    pairs = zip(found["Flax", "compressed"], found["Hugging Face", "compressed"], strict=True)
    equal = sum(np.array_equal(*pair) for pair in pairs)
    console.print(f"  compressed texts equal in both frameworks: {equal} of {count}")
    alike = same_file(*sides, prompts, tokens)
    console.print(f"  one cache file, continued by both with the same bytes: {'yes' if alike else 'no'}")
    return bits, alike


def _table(title: str, rows: list[list[str]]) -> None:
    header = [
        "cache",
        "bits per byte",
        "change",
        "cache bytes",
        "bytes a second",
        "bytes as dense",
    ]
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--prompt-bytes", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--show", type=int, default=3, help="texts to print")
    args = parser.parse_args()
    compare(args.prompts, args.prompt_bytes, args.tokens, args.window, args.show)


if __name__ == "__main__":
    main()
