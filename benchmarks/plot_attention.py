"""Draws the results of attention.py: times over bfloat16 attention by case, and the time of a decode step against S."""

import json
from pathlib import Path

import plot
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, MultipleLocator

STYLES = plot.STYLES | {
    ("torch", "dense"): ("torch, decompressed", "#c9a227", "v", "-"),
    ("jax", "dense"): ("JAX, decompressed", "#e0c66e", "v", "--"),
}
CASES_A_LINE = 8
BASELINES = {"torch": "sdpa", "jax": "cudnn"}


def label(row: dict) -> str:
    """What sets a case apart from the others."""
    name = " ".join(f"{key}{row[key]}" for key in ("B", "G", "S", "T", "D") if key != "T" or row["T"] > 1)
    return name + f"\n{row['bits']} bits" + (f", page {row['page']}" if row["page"] else "")


def draw_cases(report: dict, path: Path) -> Path | None:
    """Time over the best bfloat16 attention of the same framework, a group of bars a case."""
    cases: dict[str, dict] = {}
    for row in report["rows"]:
        cases.setdefault(label(row), {})[row["front"], row["implementation"]] = row["us"]
    names = [name for name in STYLES if any(name in found for found in cases.values()) and "bf16" not in name[1]]
    best = {
        (case, front): min(us)
        for case, found in cases.items()
        for front, prefix in BASELINES.items()
        if (us := [us for (at, name), us in found.items() if at == front and name.startswith(prefix)])
    }
    cases = {case: found for case, found in cases.items() if any((case, front) in best for front in BASELINES)}
    if not best or not names:
        return None
    lines = -(-len(cases) // CASES_A_LINE)
    figure, grid = plt.subplots(lines, figsize=(16, 1.2 + 4.4 * lines), squeeze=False, sharey=True)
    for line, axes in enumerate(grid[:, 0]):
        labels = list(cases)[line * CASES_A_LINE :][:CASES_A_LINE]
        _draw_line(axes, labels, cases, names, best)
    first, last = grid[0, 0], grid[-1, 0]
    for name in names:
        first.bar(0, 0, color=STYLES[name][1], label=STYLES[name][0])
    first.set_title("Attention over packed keys and values; on the bars: µs a call")
    first.legend(loc="upper left", fontsize=11, ncols=3)
    last.set_ylim(0, last.get_ylim()[1] * 1.3)
    return plot.finish(figure, report, path)


def _draw_line(axes, labels, cases, names, best):
    """Some of the cases, side by side."""
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        for x, case in enumerate(labels):
            if name in cases[case] and (case, name[0]) in best:
                share = cases[case][name] / best[case, name[0]]
                at = x + (i - (len(names) - 1) / 2) * width
                axes.bar(at, share, 0.94 * width, color=STYLES[name][1])
                axes.text(at, share + 0.01, plot.number(cases[case][name]), ha="center", va="bottom", fontsize=9)
    axes.axhline(1, color="#c8553d", lw=2, label="bfloat16: torch's best of flash and cuDNN / JAX's cuDNN", zorder=1.5)
    axes.set_xticks(range(len(labels)), labels, fontsize=10)
    axes.set_xlim(-0.6, max(CASES_A_LINE, len(labels)) - 0.4 if len(cases) > CASES_A_LINE else len(labels) - 0.4)
    axes.set_ylabel("time over bfloat16; lower is better")
    axes.grid(axis="x", visible=False)


def draw_decode(report: dict, path: Path) -> Path:
    """Microseconds a step against the length of the cache, but for the first steps, which compile."""
    figure, axes = plt.subplots()
    for front, line, colours in (("torch", "-", ("#0b6e4f", "#c8553d")), ("jax", "--", ("#1d4e89", "#e8a598"))):
        found = report["fronts"][front]
        for (name, us), colour in zip(found["us"].items(), colours, strict=False):
            axes.plot(found["lengths"][1:], us[1:], line, color=colour, lw=2, label=f"{front}, {name}")
    compiled = ", ".join(f"{front} {found['compiled']['all_steps']}" for front, found in report["fronts"].items())
    axes.xaxis.set_major_locator(MultipleLocator(max(1, max(found["lengths"]) // 8)))
    axes.xaxis.set_major_formatter(FuncFormatter(plot.binary))
    axes.set_ylim(0)
    axes.set_xlabel("cached positions, S")
    axes.set_ylabel("µs a step, by the host's clock")
    axes.set_title(f"Steps of a filling cache (B8 K8 G4 D128); compiled in all: {compiled}")
    axes.legend(loc="upper left")
    return plot.finish(figure, report, path)


def draw(results: Path) -> list[Path]:
    """Every picture that a file suffices for."""
    report = json.loads(results.read_text())
    path = results.with_suffix(".png")
    with plt.rc_context(plot.PLAIN):
        drawn = draw_decode(report, path) if report.get("op") == "attention_decode" else draw_cases(report, path)
    return [drawn] if drawn else []
