"""A language model's keys in 4 bits: every backend returns the same scores, and what they cost the model.

tqjax compresses the keys and rotates the queries once; every implementation on this device, in NumPy, JAX and
torch, scores those arrays. Letters as in `tqcore`: H query heads, K key heads, T queries, S keys, D head_dim.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import tqcore
import tqjax

ON_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels of tq_torch are defined
    jax.config.update("jax_default_device", jax.devices("cpu")[0])

import tq_torch  # noqa: E402

HELD_OUT_FILE = "gzip.py"
HELD_OUT_BYTES = 2**13
FRAMEWORKS = {  # the package, its implementations, from JAX's array to its own, from its own to NumPy's
    "numpy": (tqcore, tqcore.reference.IMPLEMENTATIONS, np.asarray, np.asarray),
    "jax": (tqjax, tqjax.ops.IMPLEMENTATIONS, jnp.asarray, np.asarray),
    "torch": (tq_torch, tq_torch.ops.IMPLEMENTATIONS, torch.from_dlpack, methodcaller("numpy", force=True)),
}
console = Console(highlight=False)


class Text(NamedTuple):
    name: str
    data: bytes


class Layer(NamedTuple):
    """The float32 queries and keys of one layer, and its keys compressed."""

    q: jax.Array  # [1, H, T, D]
    k: jax.Array  # [1, K, T, D]
    keys: tqcore.PackedVectors  # [1, K, T, D]


class Fidelity(NamedTuple):
    """Scores from packed keys beside those from dense keys, [layers, H]: means over the query positions."""

    cosine: NDArray  # of the causal scores
    variation: NDArray  # total variation between the two softmaxes
    top1: NDArray  # share of positions whose largest score is at the same key


def prompt(path: str) -> Text:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"must be a readable file, got {path}: {error.strerror}") from error
    if len(data) < 2:
        raise argparse.ArgumentTypeError(f"must hold at least 2 bytes, got {len(data)} in {path}")
    return Text(Path(path).name, data)


def positions(value: str) -> int:
    limit = tiny_lm.Config.context
    if not value.isdecimal() or not 2 <= int(value) <= limit:
        raise argparse.ArgumentTypeError(f"must be an integer from 2 to {limit}, got {value}")
    return int(value)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    weights = Path(__file__).with_name("tiny_lm.safetensors")
    parser.add_argument("--prompt-file", type=prompt, help=f"text to read (default: {HELD_OUT_FILE}, held out)")
    parser.add_argument("--tokens", type=positions, default=512, help="most bytes of the text, from its start")
    parser.add_argument("--queries", type=positions, default=512 if ON_GPU else 32, help="last positions to compare")
    parser.add_argument("--weights", type=Path, default=weights, help="safetensors file of tiny_lm.save")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------
# Compute
# ---------------------------------------------------------------------------------------------------


def read(model: tiny_lm.TinyLM, data: bytes) -> list[Layer]:
    """The queries and keys of every layer as the model reads `data`, T = len(data)."""
    _, qkvs = model(np.frombuffer(data, np.uint8)[None], return_qkv=True)
    quantizer = tqjax.Quantizer(model.config.head_dim)
    return [Layer(q, k, tqjax.compress(k, quantizer)) for q, k, _ in qkvs]


def score_everywhere(layer: Layer, queries: int) -> Iterator[tuple[str, NDArray | NotImplementedError]]:
    """(backend, scores [1, H, queries, S] or why there are none) for each implementation, from the same arrays."""
    quantizer = layer.keys.quantizer
    q = tqjax.rotate(layer.q[:, :, -queries:], quantizer)
    arrays = q, layer.keys.codes, layer.keys.norms, jnp.asarray(quantizer.codebook.centroids)
    heads = {"n_q_heads": q.shape[1], "n_kv_heads": layer.keys.shape[1]}
    for framework, (package, implementations, receive, to_numpy) in FRAMEWORKS.items():
        own = [receive(array) for array in arrays]
        for implementation in implementations:
            try:
                scores = package.fused_qk_scores(*own, q.shape[-1] ** -0.5, **heads, implementation=implementation)
                yield f"{framework} {implementation}", to_numpy(scores)
            except NotImplementedError as error:
                yield f"{framework} {implementation}", error


def shares_memory(layer: Layer) -> bool:
    """Whether torch reads the packed keys where JAX wrote them."""
    ours, theirs = layer.keys, tq_torch.from_dlpack(layer.keys)
    return (ours.codes.unsafe_buffer_pointer(), ours.norms.unsafe_buffer_pointer()) == (
        theirs.codes.data_ptr(),
        theirs.norms.data_ptr(),
    )


def dense_and_packed(layer: Layer) -> tuple[NDArray, NDArray]:
    """Scores of all queries from the float32 keys and from the packed keys, [H, T, T] each."""
    q, k = np.asarray(layer.q[0]), np.asarray(layer.k[0])
    k = k.repeat(len(q) // len(k), axis=0)
    packed = tqjax.attention_scores(layer.q, layer.keys)
    return q @ k.swapaxes(1, 2) * q.shape[-1] ** -0.5, np.asarray(packed[0])


def softmax(scores: NDArray) -> NDArray:
    """Causal softmax, [H, T, T] -> [H, T, T]."""
    causal = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    weights = np.exp(causal - causal.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def fidelity(layers: list[Layer]) -> Fidelity:
    rows = []
    for dense, packed in map(dense_and_packed, layers):
        a, b = np.tril(dense), np.tril(packed)
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        a, b = softmax(dense), softmax(packed)
        rows.append((cosine, np.abs(a - b).sum(-1) / 2, a.argmax(-1) == b.argmax(-1)))
    return Fidelity(*(np.mean(values, axis=-1) for values in zip(*rows, strict=True)))


def packed_attention(*, pack_values: bool) -> tiny_lm.AttentionFn:
    """`tiny_lm.causal_attention` over 4-bit keys and, if asked, 4-bit values."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        quantizer = tqjax.Quantizer(q.shape[-1])
        scores = tqjax.attention_scores(q, tqjax.compress(k, quantizer))
        weights = jax.nn.softmax(scores, where=jnp.tri(q.shape[2], dtype=bool))
        v = tqjax.decompress(tqjax.compress(v, quantizer)) if pack_values else v
        return weights @ v.repeat(q.shape[1] // v.shape[1], axis=1)

    return attention


ATTENTIONS = {
    "float32 keys and values": tiny_lm.causal_attention,
    "4-bit keys": packed_attention(pack_values=False),
    "4-bit keys and values": packed_attention(pack_values=True),
}

# ---------------------------------------------------------------------------------------------------
# Show
# ---------------------------------------------------------------------------------------------------


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a table, its first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_header(args: argparse.Namespace, text: Text, config: tiny_lm.Config) -> None:
    device = jax.devices("gpu")[0].device_kind if ON_GPU else "CPU (Pallas and Triton kernels run interpreted)"
    versions = ", ".join(f"{name} {version(name)}" for name in ("tqjax", "jax", "torch", "triton", "numpy"))
    model = f"{config.n_layers} layers, H = {config.n_q_heads}, K = {config.n_kv_heads}, D = {config.head_dim}"
    console.print(f"model     {args.weights.name}: {model}")
    console.print(f"text      {text.name}, first {len(text.data)} bytes")
    console.print(f"device    {device}\nversions  {versions}")


def show_exact(layers: list[Layer], queries: int) -> bool:
    """Prints bytes and bits; returns whether all backends agree in every bit."""
    console.rule("Exact")
    dim = layers[0].k.shape[-1]
    dense = sum(layer.k.astype(jnp.bfloat16).nbytes for layer in layers)
    packed = sum(layer.keys.nbytes for layer in layers)
    bytes_rows = [
        ["bfloat16", f"2·D = {2 * dim}", f"{dense:,}"],
        ["4 bit", f"D/2 + 4 = {dim // 2 + 4}", f"{packed:,}"],
        ["ratio", f"{2 * dim / (dim // 2 + 4):.2f}", f"{dense / packed:.2f}"],
    ]
    show("Bytes", ["keys", "per key", "all layers, .nbytes"], bytes_rows)

    scores: dict[str, list[NDArray]] = {}
    refusals: dict[str, NotImplementedError] = {}
    with console.status("") as status:
        for index, layer in enumerate(layers):
            for name, result in score_everywhere(layer, queries):
                status.update(f"layer {index + 1} of {len(layers)}: {name} done")
                if isinstance(result, NotImplementedError):
                    refusals[name] = result
                else:
                    scores.setdefault(name, []).append(result)
    bits = [np.stack(arrays).view(np.int32) for arrays in scores.values()]
    counts = np.array([[np.count_nonzero(a != b) for b in bits] for a in bits])
    cells = [["equal" if count == 0 else f"{count:,} differ" for count in row] for row in counts]
    rows = [[name, *row] for name, row in zip(scores, cells, strict=True)]
    shape = " × ".join(map(str, (len(layers), *bits[0].shape[2:])))
    show(f"Scores, bit for bit: layers × H × T × S = {shape} = {bits[0].size:,} a backend", ["", *scores], rows)
    for name, reason in refusals.items():
        console.print(f"{name}: {reason}")
    same = all(map(shares_memory, layers))
    console.print(f"torch reads the packed keys at JAX's addresses (DLPack): {'yes' if same else 'no'}")
    return not counts.any()


def show_measured(model: tiny_lm.TinyLM, measured: Fidelity) -> None:
    """Prints what 4-bit keys change: scores and softmax per layer, bits per byte of the model."""
    console.rule("Measured")
    rows = [[str(i), *(f"{value.mean():.4f}" for value in layer)] for i, layer in enumerate(zip(*measured, strict=True))]
    header = ["layer", "cosine of scores", "total variation of softmax", "same top-1 key"]
    show("Packed against float32 keys, means over heads and query positions", header, rows)
    losses = {}
    for name, attention in ATTENTIONS.items():
        with console.status(f"reading {HELD_OUT_BYTES:,} held-out bytes: {name}"):
            losses[name] = tiny_lm.bits_per_byte(model, max_bytes=HELD_OUT_BYTES, attention=attention)
    dense = losses["float32 keys and values"]
    rows = [[name, f"{loss:.4f}", f"{loss - dense:+.4f}"] for name, loss in losses.items()]
    show(f"Model, {HELD_OUT_BYTES:,} held-out bytes", ["attention reads", "bits per byte", "change"], rows)


def draw(layers: list[Layer], measured: Fidelity, text: Text, path: Path) -> None:
    """Writes the attention of the head with the largest total variation, and each head's fidelity."""
    layer, head = np.unravel_index(measured.variation.argmax(), measured.variation.shape)
    causal = np.tri(len(text.data), dtype=bool)
    maps = [np.where(causal, softmax(scores)[head], np.nan) for scores in dense_and_packed(layers[layer])]
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplot_mosaic([["dense", "packed", "cosine"], ["dense", "packed", "variation"]], width_ratios=[3, 3, 2])
    for name, title, weights in zip(("dense", "packed"), ("float32 keys", "4-bit keys"), maps, strict=True):
        image = axes[name].imshow(weights, norm=LogNorm(1e-4, 1, clip=True), cmap="magma_r")
        axes[name].set(title=title, xlabel="key position")
    axes["dense"].set_ylabel("query position")
    figure.colorbar(image, ax=[axes["dense"], axes["packed"]], label="attention weight", shrink=0.8)
    for name, label in (("cosine", "cosine of scores"), ("variation", "total variation")):
        values = getattr(measured, name)
        axes[name].plot(values, "o", color="tab:gray", alpha=0.5)
        axes[name].plot(values.mean(-1), "k_", markersize=24)
        axes[name].set(title=label, xlabel="layer", xticks=range(len(layers)))
    figure.suptitle(f"layer {layer}, head {head}")
    figure.savefig(path, dpi=100)


def main() -> int:
    args = parse_args()
    text = args.prompt_file or Text(HELD_OUT_FILE, dict(tiny_lm.corpus("held_out"))[HELD_OUT_FILE])
    text = Text(text.name, text.data[: args.tokens])
    model, _ = tiny_lm.load(args.weights)
    show_header(args, text, model.config)
    with console.status("reading the text"):
        layers = read(model, text.data)
    agree = show_exact(layers, args.queries)
    measured = fidelity(layers)
    show_measured(model, measured)
    draw(layers, measured, text, args.out)
    console.print(f"picture: {args.out}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
