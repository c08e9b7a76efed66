"""Draws the results of bench.py and attention.py.

python3 benchmarks/plot.py [RESULTS.json ...]      by default those of every device; PNGs go beside each
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of backend
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

RESULTS = Path(__file__).resolve().parent / "results"
DENSE = "dense_bf16_f32out"
STYLES = {  # (front, implementation): label, colour, marker, line
    ("torch", "gluon"): ("torch, Gluon", "#0b6e4f", "o", "-"),
    ("torch", "triton"): ("torch, Triton", "#3fa34d", "s", "-"),
    ("jax", "gluon"): ("JAX, Gluon", "#1d4e89", "o", "--"),
    ("jax", "triton"): ("JAX, Triton", "#3f88c5", "s", "--"),
    ("jax", "pallas_triton"): ("JAX, Pallas", "#8ab6d6", "^", "--"),
    ("torch", "dense_bf16"): ("torch, dense bfloat16", "#c8553d", "D", "-"),
    ("jax", "dense_bf16"): ("JAX, dense bfloat16", "#e8a598", "D", "--"),
    ("torch", "floor"): ("no arithmetic, the same bytes", "#777777", "x", "-"),
}
OURS = [name for name in STYLES if not name[1].startswith(("dense", "floor"))]
PATCH = {"facecolor": "white", "edgecolor": "none", "pad": 1}
PLAIN = {
    "figure.figsize": (12, 6.2), "figure.dpi": 100, "font.size": 13, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e3e3e3", "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 15, "axes.titlepad": 14, "legend.frameon": False, "savefig.facecolor": "white",
}  # fmt: skip


def select(rows: list[dict], **fixed) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in fixed.items())]


def by_name(rows: list[dict], key: str) -> dict[tuple[str, str], dict[int, dict]]:
    """Rows by (front, implementation) and by the value of `key`, which ascends."""
    found = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row[key]):
        found[row["front"], row["implementation"]][row[key]] = row
    return found


def source(report: dict) -> str:
    """Device, driver, versions, commit and copy bandwidth, if known, in a line."""
    versions = report["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "jax"))
    commit = (report["commit"] or "unknown")[:7] + ("-dirty" if "dirty" in (report["commit"] or "") else "")
    line = f"{report['device']}, driver {report['driver']}, {libraries}, commit {commit}, {report['date'][:10]}"
    return f"{line}; copy {report['copy_gbps']:.0f} GB/s" if "copy_gbps" in report else line


def finish(figure, report: dict, path: Path) -> Path:
    figure.text(0.012, 0.012, source(report), fontsize=9.5, color="#666666")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path)
    plt.close(figure)
    return path


def number(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def binary(value: float, _=None) -> str:
    """A count of keys in units of 2^10 or 2^20."""
    return f"{value / 2**20:g} M" if value >= 2**20 else f"{value / 2**10:g} K"


def draw_keys(report: dict, path: Path) -> Path | None:
    """Time against S, and the time that moving the bytes takes at copy bandwidth."""
    found = by_name(select(report["rows"], B=1, K=8, G=4, T=1, D=128), "S")
    ours = next((found[name] for name in OURS if len(found.get(name, ())) > 1), None)
    if ours is None:
        return None
    figure, axes = plt.subplots()
    for name, (label, colour, marker, line) in STYLES.items():
        if name in found:
            us = [row["us"] for row in found[name].values()]
            axes.plot(list(found[name]), us, line, marker=marker, color=colour, label=label, lw=2, ms=6)
    floor = [row["bytes"] / report["copy_gbps"] / 1e3 for row in ours.values()]
    axes.plot(list(ours), floor, ":", color="black", lw=2, label="bytes at copy bandwidth")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ours)))
    axes.xaxis.set_major_formatter(FuncFormatter(binary))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("cached keys a head, S")
    axes.set_ylabel("µs a call")
    axes.set_title("Scores of one query against S packed keys (B1 K8 G4 T1 D128)")
    axes.legend(loc="upper left", fontsize=12)
    return finish(figure, report, path)


def draw_bars(report: dict, key: str, fixed: dict, path: Path) -> Path | None:
    """Time over that of dense bfloat16 with float32 output in the same framework, for each value of `key`."""
    found = by_name(select(report["rows"], **fixed), key)
    dense = {front: {value: row["us"] for value, row in found[front, DENSE].items()} for front in ("torch", "jax")}
    bars = {name: {value: row["us"] for value, row in found[name].items() if value in dense[name[0]]} for name in OURS}
    bars = {name: us for name, us in bars.items() if us}
    if not bars:
        return None
    values = sorted({value for us in bars.values() for value in us})
    highest = max(1.0, *(us / dense[front][value] for (front, _), of in bars.items() for value, us in of.items()))
    figure, axes = plt.subplots()
    width = 0.84 / len(bars)
    for i, (name, us) in enumerate(bars.items()):
        label, colour, _, _ = STYLES[name]
        x = [values.index(value) + (i - (len(bars) - 1) / 2) * width for value in us]
        share = [us[value] / dense[name[0]][value] for value in us]
        axes.bar(x, share, 0.94 * width, color=colour, label=label)
        for at, height, text in zip(x, share, map(number, us.values()), strict=True):
            axes.text(at, height + 0.01 * highest, text, ha="center", va="bottom", fontsize=11, bbox=PATCH)
    axes.axhline(1, color="#c8553d", lw=2, label="dense bfloat16, float32 output (torch / JAX)", zorder=1.5)
    ticks = []
    for value in values:
        us = " / ".join(number(of[value]) if value in of else "–" for of in dense.values())
        ticks.append(f"{key} = {value}\ndense {us} µs")
    axes.set_xticks(range(len(values)), ticks)
    axes.set_ylim(0, highest * 1.28)
    axes.set_ylabel("time over dense; lower is better")
    shape = " ".join(f"{name}{value}" for name, value in fixed.items())
    what = {"T": "query positions", "G": "query heads a key head"}[key]
    axes.set_title(f"Scores for {key} {what} ({shape}); on the bars: µs a call")
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper left", fontsize=12, ncols=3)
    return finish(figure, report, path)


def draw(results: Path) -> list[Path]:
    """Every picture that the rows suffice for."""
    report = json.loads(results.read_text())
    report["rows"] = select(report["rows"], bits=4)
    stem = results.with_suffix("")
    with plt.rc_context(PLAIN):
        drawn = [
            draw_keys(report, Path(f"{stem}_S.png")),
            draw_bars(report, "T", {"B": 1, "K": 8, "G": 4, "S": 8192, "D": 128}, Path(f"{stem}_T.png")),
            draw_bars(report, "G", {"B": 8, "K": 8, "S": 32768, "T": 1, "D": 128}, Path(f"{stem}_G.png")),
        ]
    return [path for path in drawn if path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="JSON of bench.py or attention.py")
    arguments = parser.parse_args()
    import plot_attention  # which takes its style from here

    known = [path for name in ("fused_qk_scores", "attention*") for path in sorted(RESULTS.glob(f"*/{name}.json"))]
    for results in arguments.results or known:
        of_attention = results.name.startswith("attention")
        for path in (plot_attention.draw if of_attention else draw)(results):
            print(path)


if __name__ == "__main__":
    main()
