"""What the format's choices are worth: distortion, keys of many kinds, and a model's bits per byte. NumPy and JAX, CPU.

Writes quality.json and pictures to --out, and with --docs the tables of docs/quality.md.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples"))  # of the model

import flax
import jax
import numpy as np
import quality_model
import quality_vectors
import scipy
import tiny_lm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from quality_model import Way
from rich.progress import Progress
from scipy.special import gammaln

import tqcore
from tqcore import codebook, verify

WIDTHS, VECTORS = (64, 128, 256, 1536), 4096
PAPER_MSE, PAPER_PRODUCT = (0.36, 0.117, 0.03, 0.009), (1.57, 0.56, 0.18, 0.047)
BITS = ((4, 4), (4, 3), (3, 3), (4, 2), (2, 2))
CENTERS = ("none", "mean", "rotary mean")
TEXT, LENGTH = "gzip.py", 512
Table = tuple[list[str], list[list[str]]]


# --- distortion of vectors, the paper's table -----------------------------------------------------------------


def haar(dim: int, seed: int) -> NDArray:
    q, r = np.linalg.qr(np.random.default_rng([seed, dim]).standard_normal((dim, dim)))
    return q * np.sign(np.diagonal(r))


def quantised(y: NDArray, bits: int) -> NDArray:
    """The dyadic levels nearest to the coordinates of unit vectors y [N, D], for D beyond those of a Quantizer too."""
    exponent, positive = codebook.solve_dyadic(y.shape[1], bits) if y.shape[1] > 1024 else (None, None)
    if positive is None:
        centroids = codebook.Codebook(y.shape[1], bits).centroids.astype(np.float64)
    else:
        centroids = np.array([-x for x in reversed(positive)] + list(positive)) / 2.0**exponent
    return centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, y)]


def distortion(dim: int, bits: int) -> dict[str, float]:
    """Of uniform unit vectors x, y: E‖x̂ - x‖² and D · E⟨y, x̂ - x⟩², measured beside their exact values.

    `product` is the paper's inner-product form: b - 1 bits and the signs of the residual, here under a Haar rotation
    with a corrected norm. Rotations are Haar matrices of this file and levels those of `tqcore.codebook`, without a
    Quantizer, so that D = 1536 is done as all others are.
    """
    rng = np.random.default_rng([dim, bits])
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, VECTORS, dim)))
    rotation, other = haar(dim, 0), haar(dim, 1)
    mse = ((quantised(x @ rotation.T, bits) @ rotation - x) ** 2).sum(1)
    rest = x if bits == 1 else x - quantised(x @ rotation.T, bits - 1) @ rotation
    signs = np.sign(rest @ other.T) @ other
    signs *= ((rest**2).sum(1) / (rest * signs).sum(1))[:, None]
    product = dim * ((y * (rest - signs)).sum(1)) ** 2
    absolute = np.exp(gammaln(dim / 2) - gammaln((dim + 1) / 2)) / np.sqrt(np.pi)  # E|coordinate|
    below = 1.0 if bits == 1 else codebook.expected_distortion(codebook.lloyd_max(dim, bits - 1), dim)
    return {
        "D": dim,
        "bits": bits,
        "mse": float(mse.mean()),
        "mse_error": float(mse.std() / VECTORS**0.5),
        "mse_exact": codebook.expected_distortion(codebook.lloyd_max(dim, bits), dim),
        "mse_paper": PAPER_MSE[bits - 1],
        "product": float(product.mean()),
        "product_error": float(product.std() / VECTORS**0.5),
        "product_expected": below * (1 / (dim * absolute**2) - 1),
        "product_paper_form": below * np.pi / 2,
        "product_paper": PAPER_PRODUCT[bits - 1],
    }


def distortion_table(rows: list[dict[str, float]]) -> Table:
    header = ["D", "bits", "MSE", "exact", "paper", "D · product error", "expected", "paper's form", "paper"]
    names = "mse", "mse_exact", "mse_paper", "product", "product_expected", "product_paper_form", "product_paper"
    return header, [
        [
            str(row["D"]),
            str(row["bits"]),
            *(f"{row[n]:.4g} ± {row[n + '_error']:.1g}" if n + "_error" in row else f"{row[n]:.4g}" for n in names),
        ]
        for row in rows
    ]


# --- bits per byte of the model -------------------------------------------------------------------------------


def model_cases(model: tiny_lm.TinyLM) -> Iterator[tuple[str, str, str, Any]]:
    """(bits, center, note, attention) of the model as it is."""
    means = quality_model.calibrated_means(model)
    for bits in BITS:
        for center in CENTERS:
            yield "/".join(map(str, bits)), center, "", quality_model.uniform(model, Way(*bits, center=center))
    extras = {
        "plain norms": Way(4, 4, norm="plain"),
        "first 4 tokens dense": Way(4, 4, center="rotary mean", first=4),
        "last 32 positions dense": Way(4, 4, center="rotary mean", window=32),
        "last 32 dense, no center": Way(4, 4, window=32),
        "dense values": Way(4, 0, center="rotary mean"),
        "dense keys": Way(0, 4),
        "center of the bias": Way(4, 4, center="rotary bias"),
        "center from training text": Way(4, 4, center="calibrated"),
    }
    for note, way in extras.items():
        bits = f"{way.key_bits or 'dense'}/{way.value_bits or 'dense'}"
        yield bits, way.center, note, quality_model.uniform(model, way, means)


def copy_cases(copy: tiny_lm.TinyLM) -> Iterator[tuple[str, str, str, Any]]:
    """Those of the copy with large biases, the setting that `verify` recommends among them."""
    text = dict(tiny_lm.corpus("held_out"))[TEXT][:LENGTH]
    for center in CENTERS:
        yield "4/4", center, "", quality_model.uniform(copy, Way(4, 4, center=center))
    report, ways = quality_model.recommended(copy, text, (4, 4))
    chosen = ", ".join(f"{way.center}, {way.norm}" for way in ways)
    verdict = "safe" if report.safe else "unsafe"
    yield "4/4", "verify's choice", f"verify: {verdict}; by layer: {chosen}", quality_model.Packed(copy, ways)


def bits_per_byte(
    name: str, model: tiny_lm.TinyLM, cases: Callable[..., Iterator], size: int, progress: Progress
) -> list[dict[str, Any]]:
    task = progress.add_task(name, total=None)
    dense = tiny_lm.bits_per_byte(model, max_bytes=size)
    rows = [{"model": name, "bits": "dense", "center": "none", "note": "", "bits_per_byte": dense, "change": 0.0}]
    todo = list(cases(model))
    progress.update(task, total=len(todo))
    for bits, center, note, attention in todo:
        found = tiny_lm.bits_per_byte(model, max_bytes=size, attention=attention)
        row = {"bits": bits, "center": center, "note": note, "bits_per_byte": found, "change": found / dense - 1}
        rows.append({"model": name} | row)
        progress.console.print(rows[-1])
        progress.advance(task)
    add_verdicts(rows, model)
    return rows


def add_verdicts(rows: list[dict[str, Any]], model: tiny_lm.TinyLM) -> None:
    """What `verify` measures of the settings of `rows`, worst layer and head: "variation", "cosine" and "safe"."""
    report = verify.verify(tiny_lm.arrays(model, dict(tiny_lm.corpus("held_out"))[TEXT][:LENGTH]))
    for row in rows:
        if row["note"] or row["center"] not in CENTERS or row["bits"] == "dense":
            continue
        widths = tuple(map(int, row["bits"].split("/")))
        norm = tqcore.Quantizer(model.config.head_dim, widths[0]).norm
        wanted = verify.Setting(*widths, norm, row["center"])
        losses = [loss for layer in report.layers for loss in layer.losses if loss.setting == wanted]
        row["variation"] = max(loss.worst["variation"] for loss in losses)
        row["cosine"] = min(loss.worst["cosine"] for loss in losses)
        row["safe"] = all(loss.safe for loss in losses)


def model_table(rows: list[dict[str, Any]]) -> Table:
    header = ["model", "keys / values", "center", "", "bits per byte", "change", "variation", "cosine", "verify"]
    table = []
    for row in rows:
        cells = [row["model"], row["bits"], row["center"], row["note"], f"{row['bits_per_byte']:.4f}"]
        verdict = ["", "", ""]
        if "safe" in row:
            verdict = [f"{row['variation']:.3f}", f"{row['cosine']:.3f}", "safe" if row["safe"] else "unsafe"]
        table.append([*cells, f"{row['change']:+.2%}", *verdict])
    return header, table


# --- output ---------------------------------------------------------------------------------------------------


def draw(report: dict[str, Any], folder: Path) -> None:
    """quality_distortion.png and quality_model.png."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, name, exact in zip(figure.subplots(1, 2), ("mse", "product"), ("exact", "expected"), strict=True):
        for dim in WIDTHS:
            rows = [row for row in report["distortion"] if row["D"] == dim]
            (line,) = axes.plot([x["bits"] for x in rows], [x[name] for x in rows], "o", label=f"D = {dim}")
            axes.plot([x["bits"] for x in rows], [x[f"{name}_{exact}"] for x in rows], color=line.get_color())
        axes.plot(range(1, 5), [x[f"{name}_paper"] for x in rows], "k_", markersize=16, label="paper")
        title = {"mse": "‖x̂ - x‖² of unit vectors", "product": "D · ⟨y, x̂ - x⟩², inner-product form"}[name]
        axes.set(title=title, xlabel="bits", xticks=range(1, 5), yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(folder / "quality_distortion.png", dpi=120)

    rows = [row for row in report["model"] if row["center"] == "verify's choice" or (row["change"] and not row["note"])]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['model']}  {row['bits']}  {row['center']}" for row in rows]
    bars = axes.barh(names, [100 * row["change"] for row in rows], color="tab:purple")
    axes.bar_label(bars, [f"{row['change']:+.2%}" for row in rows], padding=3)
    axes.set(title="Held-out bits per byte against dense keys and values, %", xscale="log")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "quality_model.png", dpi=120)


def markdown(table: Table) -> str:
    header, rows = table
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(header)}", *lines[1:]])


def write_docs(tables: dict[str, Table]) -> None:
    """Each between <!-- NAME --> and <!-- end --> of docs/quality.md."""
    path = ROOT / "docs/quality.md"
    text = path.read_text()
    for name, table in tables.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)"
        text, found = re.subn(pattern, lambda m, t=table: m[1] + markdown(t) + m[2], text, flags=re.S)
        if found != 1:
            raise ValueError(f"{path} must have one place for the table {name!r}, got {found}")
    path.write_text(text)


def environment() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    modules = {"numpy": np, "scipy": scipy, "jax": jax, "flax": flax, "tqcore": tqcore}
    return {
        "command": shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: module.__version__ for name, module in modules.items()},
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/cpu", help="folder to write to")
    parser.add_argument("--bytes", type=int, default=2**16, help="held-out bytes that the model reads")
    parser.add_argument("--skip-vectors", action="store_true", help="leave out the tables of keys of many kinds")
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/quality.md too")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model, _ = tiny_lm.load(ROOT / "examples/tiny_lm.safetensors")
    with Progress() as progress:
        pairs = [(dim, bits) for dim in WIDTHS for bits in range(1, 5)]
        report = environment() | {"bytes": args.bytes}
        report["distortion"] = [distortion(*pair) for pair in progress.track(pairs, description="distortion")]
        report["model"] = bits_per_byte("tiny_lm", model, model_cases, args.bytes, progress)
        copy = quality_model.with_large_biases(model)
        report["model"] += bits_per_byte("large biases", copy, copy_cases, args.bytes, progress)
        tables = {"distortion": distortion_table(report["distortion"]), "model": model_table(report["model"])}
        if not args.skip_vectors:
            makers = progress.track(quality_vectors.TABLES.items(), description="keys of many kinds")
            tables |= {name: make() for name, make in makers}
            report["vectors"] = {name: tables[name] for name in quality_vectors.TABLES}
    for name, table in tables.items():
        print(f"\n{name}\n{markdown(table)}")
    (args.out / "quality.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    draw(report, args.out)
    if args.docs:
        write_docs(tables)


if __name__ == "__main__":
    main()
