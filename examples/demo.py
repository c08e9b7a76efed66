"""A language model's keys in 4 bits: every backend returns the same scores, and what they cost the model.

tqjax compresses the keys and rotates the queries once; every implementation on this device, in NumPy, JAX and
torch, scores those arrays. Letters as in `tqcore`, with the layers of the model as the batch: B layers,
H query heads, K key heads, T queries, S keys, D head_dim.
"""

import argparse
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny_lm
import torch
from flax import nnx
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tqcore.reference
import tqjax.ops

ON_GPU = torch.cuda.is_available() and jax.default_backend() == "gpu"
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels of tq_torch are defined
    jax.config.update("jax_default_device", jax.devices("cpu")[0])

import generate  # noqa: E402

import tq_torch.ops  # noqa: E402

HELD_OUT_FILE = "gzip.py"
HELD_OUT_BYTES = 2**13
PACKAGES = (  # a package, its implementations, from JAX's array to its own, from its own to NumPy's
    (tqcore, tqcore.reference.IMPLEMENTATIONS, np.asarray, np.asarray),
    (tqjax, tqjax.ops.IMPLEMENTATIONS, jnp.asarray, np.asarray),
    (tq_torch, tq_torch.ops.IMPLEMENTATIONS, torch.from_dlpack, lambda tensor: tensor.numpy(force=True)),
)
COSINE, VARIATION, TOP1 = "cosine of scores", "total variation of softmax", "same top-1 key"
console = Console(highlight=False, markup=False)


def parse_args() -> tuple[argparse.Namespace, bytes]:
    """The arguments, and the text that they name."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    weights, limit = Path(__file__).with_name("tiny_lm.safetensors"), tiny_lm.Config.context
    parser.add_argument("--prompt-file", type=Path, help=f"text to read (default: {HELD_OUT_FILE}, held out)")
    parser.add_argument("--tokens", type=int, default=512, help="most bytes of the text, from its start")
    parser.add_argument("--queries", type=int, default=512 if ON_GPU else 32, help="last positions to compare")
    parser.add_argument("--weights", type=Path, default=weights, help="safetensors file of tiny_lm.save")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="picture to write")
    args = parser.parse_args()
    for path in filter(None, (args.prompt_file, args.weights)):
        if not path.is_file():
            parser.error(f"`--prompt-file` and `--weights` must be files, got {path}")
    if not args.out.parent.is_dir():
        parser.error(f"`--out` must lie in a folder that exists, got {args.out}")
    if not 2 <= args.tokens <= limit or not 1 <= args.queries <= limit:
        came = f"got {args.tokens} and {args.queries}"
        parser.error(f"`--tokens` must be from 2 to {limit} and `--queries` from 1 to {limit}, {came}")
    data = args.prompt_file.read_bytes() if args.prompt_file else dict(tiny_lm.corpus("held_out"))[HELD_OUT_FILE]
    if len(data) < 2:
        parser.error(f"`--prompt-file` must hold at least 2 bytes, got {len(data)} in {args.prompt_file}")
    return args, data[: args.tokens]


def read(model: tiny_lm.TinyLM, data: bytes) -> tuple[jax.Array, jax.Array]:
    """Queries [B, H, T, D] and keys [B, K, T, D] of all layers as the model reads `data`, T = len(data)."""
    forward = nnx.jit(type(model).__call__, static_argnames="return_qkv")
    _, qkvs = forward(model, np.frombuffer(data, np.uint8)[None], return_qkv=True)
    q, k, _ = map(jnp.concatenate, zip(*qkvs, strict=True))
    return q, k


def score_everywhere(q: jax.Array, keys: tqcore.PackedVectors) -> dict[str, NDArray | NotImplementedError]:
    """Scores [B, H, T, S] by implementation, all from the same arrays, or why there are none."""
    centroids = jnp.asarray(keys.quantizer.codebook.centroids)
    arrays = tqjax.rotate(q, keys.quantizer), keys.codes, keys.norms, centroids
    heads = {"n_q_heads": q.shape[1], "n_kv_heads": keys.shape[1]}
    jobs = [(package, name, *convert) for package, names, *convert in PACKAGES for name in names]
    results = {}
    for package, implementation, receive, to_numpy in track(jobs, "scoring", console=console, transient=True):
        name = f"{package.__name__} {implementation}"
        own = map(receive, arrays)
        try:
            scores = package.fused_qk_scores(*own, q.shape[-1] ** -0.5, **heads, implementation=implementation)
            results[name] = to_numpy(scores)
        except NotImplementedError as error:
            results[name] = error
    return results


def dense_scores(q: jax.Array, k: jax.Array) -> NDArray:
    """Scores from float32 keys, [B, H, T, D] and [B, K, S, D] -> [B, H, T, S]."""
    grouped = np.asarray(k).repeat(q.shape[1] // k.shape[1], axis=1)
    return np.asarray(q) @ grouped.swapaxes(2, 3) * q.shape[-1] ** -0.5


def shares_memory(packed: tqcore.PackedVectors) -> bool:
    """Whether torch reads the codes at the address where JAX wrote them."""
    return packed.codes.unsafe_buffer_pointer() == tq_torch.from_dlpack(packed).codes.data_ptr()


def causal_softmax(scores: jax.Array | NDArray) -> jax.Array:
    """[..., T, T] -> [..., T, T]."""
    return jax.nn.softmax(scores, where=jnp.tri(scores.shape[-1], dtype=bool))


def fidelity(dense: NDArray, packed: NDArray) -> dict[str, NDArray]:
    """Compares scores [B, H, T, T] under the causal mask: means over the queries, [B, H] each."""
    a, b = np.tril(dense), np.tril(packed)
    p, p_packed = np.asarray(causal_softmax(dense)), np.asarray(causal_softmax(packed))
    cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return {
        COSINE: cosine.mean(-1),
        VARIATION: np.abs(p - p_packed).sum(-1).mean(-1) / 2,
        TOP1: np.mean(p.argmax(-1) == p_packed.argmax(-1), axis=-1),
    }


def packed_attention(*, pack_values: bool) -> tiny_lm.AttentionFn:
    """`tiny_lm.causal_attention` over 4-bit keys and, if asked, 4-bit values."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        quantizer = tqjax.Quantizer(q.shape[-1])
        scores = tqjax.attention_scores(q, tqjax.compress(k, quantizer))
        v = tqjax.decompress(tqjax.compress(v, quantizer)) if pack_values else v
        return causal_softmax(scores) @ v.repeat(q.shape[1] // v.shape[1], axis=1)

    return attention


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a table, its first column left-aligned and the others right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="", box=SIMPLE)
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_header(args: argparse.Namespace, data: bytes, config: tiny_lm.Config) -> None:
    device = jax.devices("gpu")[0].device_kind if ON_GPU else "CPU; Pallas and Triton kernels are interpreted"
    name = args.prompt_file or f"{HELD_OUT_FILE} (Python library, held out of training)"
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in (tqjax, jax, torch, np))
    shape = f"{config.n_layers} layers, H = {config.n_q_heads}, K = {config.n_kv_heads}, D = {config.head_dim}"
    console.print(f"model     {args.weights.name}: {shape}\ntext      {name}, {len(data)} bytes")
    console.print(f"device    {device}\nversions  {versions}\n")


def show_bytes(k: jax.Array, keys: tqcore.PackedVectors) -> None:
    """Prints what a key takes by the formula, and what the arrays of all layers take."""
    dim, dense = k.shape[-1], k.astype(jnp.bfloat16)
    rows = [
        ["bfloat16", f"2·D = {2 * dim}", f"{dense.nbytes:,}"],
        ["4 bit", f"D/2 + 4 = {dim // 2 + 4}", f"{keys.nbytes:,}"],
        ["ratio", f"{2 * dim / (dim // 2 + 4):.2f}", f"{dense.nbytes / keys.nbytes:.2f}"],
    ]
    show("Bytes of the keys", ["", "per key", ".nbytes of all layers"], rows)


def show_bits(results: dict[str, NDArray | NotImplementedError]) -> bool:
    """Prints how many scores differ for each pair of implementations; returns whether none does."""
    bits = {name: x.view(np.int32) for name, x in results.items() if isinstance(x, np.ndarray)}
    counts = [[np.count_nonzero(a != b) for b in bits.values()] for a in bits.values()]
    rows = [[name, *(f"{n:,} differ" if n else "equal" for n in row)] for name, row in zip(bits, counts, strict=True)]
    layers, heads, queries, keys = bits["tqcore numpy"].shape
    count = layers * heads * queries * keys
    title = f"Bits of the scores: {layers} layers · {heads} heads · {queries} queries · {keys} keys = {count:,}"
    show(title, ["", *(name.replace(" ", "\n") for name in bits)], rows)
    for name, result in results.items():
        if name not in bits:
            console.print(f"  {name}: {result}")
    return not np.any(counts)


def show_fidelity(measured: dict[str, NDArray]) -> None:
    means = np.stack([values.mean(-1) for values in measured.values()], axis=-1)
    rows = [[str(layer), *(f"{mean:.4f}" for mean in row)] for layer, row in enumerate(means)]
    show("Packed keys against float32 keys: means over heads and queries", ["layer", *measured], rows)


def show_bits_per_byte(model: tiny_lm.TinyLM) -> None:
    attentions = {
        "float32 keys and values": tiny_lm.causal_attention,
        "4-bit keys": packed_attention(pack_values=False),
        "4-bit keys and values": packed_attention(pack_values=True),
    }
    bits = [
        tiny_lm.bits_per_byte(model, max_bytes=HELD_OUT_BYTES, attention=attention)
        for attention in track(attentions.values(), "reading held-out text", console=console, transient=True)
    ]
    rows = [[name, f"{x:.4f}", f"{x - bits[0]:+.4f}"] for name, x in zip(attentions, bits, strict=True)]
    show(f"The model on {HELD_OUT_BYTES:,} held-out bytes", ["attention reads", "bits per byte", "change"], rows)


def draw(dense: NDArray, packed: NDArray, measured: dict[str, NDArray], path: Path) -> None:
    """Writes the attention maps of the head with the largest total variation beside the fidelity of all heads."""
    layer, head = np.unravel_index(measured[VARIATION].argmax(), measured[VARIATION].shape)
    figure = Figure(figsize=(11.6, 4.8), layout="constrained")
    panels = [["float32 keys", "4-bit keys", COSINE], ["float32 keys", "4-bit keys", VARIATION]]
    axes = figure.subplot_mosaic(panels, width_ratios=[5, 5, 3])
    for name, scores in (("float32 keys", dense), ("4-bit keys", packed)):
        image = axes[name].imshow(causal_softmax(scores[layer, head]), norm=LogNorm(1e-4, 1), cmap="magma_r")
        axes[name].set(title=name, xlabel="key position", ylabel="query position")
        axes[name].spines[["top", "right"]].set_visible(False)
    bar = axes["float32 keys"].inset_axes((0.5, 0.9, 0.45, 0.035))
    figure.colorbar(image, cax=bar, orientation="horizontal", label="attention weight")
    note = f"{COSINE} {measured[COSINE][layer, head]:.4f}\n{VARIATION} {measured[VARIATION][layer, head]:.3f}"
    axes["4-bit keys"].text(0.97, 0.95, note, transform=axes["4-bit keys"].transAxes, ha="right", va="top")
    for name, limits in ((COSINE, (None, 1)), (VARIATION, (0, None))):
        axes[name].plot(measured[name], "o", color="tab:purple", alpha=0.4, clip_on=False)
        axes[name].plot(measured[name].mean(-1), "k_", markersize=26)
        axes[name].set(title=name, xticks=range(len(dense)), xmargin=0.15, ylim=limits)
    axes[VARIATION].set_xlabel("layer (dot: head, line: mean)")
    figure.suptitle(f"Attention of layer {layer}, head {head}: of all heads, the one that 4-bit keys change most")
    figure.savefig(path, dpi=120)


def main() -> int:
    args, data = parse_args()
    model, _ = tiny_lm.load(args.weights)
    show_header(args, data, model.config)
    q, k = read(model, data)
    keys = tqjax.compress(k, tqjax.Quantizer(k.shape[-1]))
    console.rule("Exact")
    show_bytes(k, keys)
    agree = show_bits(score_everywhere(q[:, :, -args.queries :], keys))
    console.print(f"  torch reads the codes where JAX wrote them: {'yes' if shares_memory(keys) else 'no'}")
    console.rule("Measured on this model and text")
    dense, packed = dense_scores(q, k), np.asarray(tqjax.attention_scores(q, keys))
    measured = fidelity(dense, packed)
    show_fidelity(measured)
    show_bits_per_byte(model)
    draw(dense, packed, measured, args.out)
    console.print(f"picture: {args.out}", soft_wrap=True)
    console.rule("Generated from dense and from compressed caches, in JAX and in PyTorch")
    _, alike = generate.compare(count=2, prompt=96, tokens=32, window=32, show=2)
    return 0 if agree and alike else 1


if __name__ == "__main__":
    sys.exit(main())
