"""The report of `tqcore.verify` as a table, a picture and JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from tqcore.verify import LIMITS, Loss, Report, Verdict
from tqcore.version import __version__

SCHEMA = 1
LOG_WIDTH = 140  # of the table, where there is no terminal to ask


def as_json(report: Report, source: str) -> dict[str, Any]:
    """Everything measured, as JSON types: lists run over query heads, or for outliers over key heads."""
    layers = []
    for layer in report.layers:
        losses = [
            asdict(loss.setting)
            | {"bytes": loss.nbytes, "safe": loss.safe}
            | {name: x.tolist() for name, x in loss.heads.items()}
            for loss in layer.losses
        ]
        layers.append(
            {
                "layer": layer.index,
                "shape": layer.shape,
                "safe": layer.safe_at(report.bits),
                "recommended": None if layer.recommended is None else asdict(layer.recommended.setting),
                "outliers": {name: x.tolist() for name, x in layer.outliers.items()},
                "settings": losses,
            }
        )
    head = {"schema": SCHEMA, "tqcore": __version__, "source": source, "bits": list(report.bits), "limits": LIMITS}
    return head | {"safe": report.safe, "layers": layers}


def progress(layers: Sequence[Any]) -> Iterable[Any]:
    """A progress bar over layers on stderr, for `verify(track=progress)`."""
    from rich.console import Console
    from rich.progress import track

    return track(layers, "measuring layers", console=Console(stderr=True), transient=True)


def print_table(report: Report, file: TextIO) -> None:
    """A row per layer: its keys, the bits asked for with no center, and the setting recommended; worst heads each."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(file=file, width=None if file.isatty() else LOG_WIDTH, highlight=False)
    bits = "/".join(map(str, report.bits))
    table = Table(box=SIMPLE, title=f"Attention from packed keys and values, asked for at {bits} bits")
    columns = ["\nlayer", "mean\n/ std", "channel\n/ rms", "token 0\n/ median", f"{bits} no center:\nvariation"]
    columns += ["\nrecommended", "\nbytes", "score\nRMSE", "\n/ std", "vari-\nation", "\ntop-1", "output\ncosine"]
    for name in columns:
        table.add_column(name, justify="left" if "recommended" in name else "right", no_wrap=True)
    for layer in report.layers:
        table.add_row(*_row(layer, report.bits))
    console.print(table)
    limits = f"variation ≤ {LIMITS['variation']}, output cosine ≥ {LIMITS['cosine']}"
    console.print(f"Figures are those of a layer's worst head. Safe: {limits}.\n", soft_wrap=True)
    unsafe = [str(layer.index) for layer in report.layers if not layer.safe_at(report.bits)]
    centered = [str(x.index) for x in report.layers if _needs_center(x, report.bits)]
    if centered:
        console.print(f"At {bits} bits, safe with a center only: layers {', '.join(centered)}.")
    if unsafe:
        console.print(f"UNSAFE at {bits} bits: layers {', '.join(unsafe)}.")
    else:
        console.print(f"Every layer has a safe setting at {bits} bits.")


def draw(report: Report, path: str | PathLike) -> None:
    """Writes heat maps, layers by heads, of outliers, of the bits asked for, and of the setting recommended."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    bits = "/".join(map(str, report.bits))
    shown = [layer.recommended or layer.best_at(report.bits) for layer in report.layers]
    plain = [layer.best_at(report.bits, ("none",)) for layer in report.layers]
    names = {"score_relative": "relative score RMSE", "variation": "total variation", "cosine": "1 - output cosine"}
    panels: list[tuple[str, list[NDArray], float | None]] = []
    panels += [("keys: mean / std", [layer.outliers["mean_ratio"] for layer in report.layers], None)]
    panels += [(f"{bits}, no center:\ntotal variation", [x.heads["variation"] for x in plain], LIMITS["variation"])]
    for name, title in names.items():
        values = [1 - x.heads[name] if name == "cosine" else x.heads[name] for x in shown]
        limit = {"variation": LIMITS["variation"], "cosine": 1 - LIMITS["cosine"]}.get(name)
        panels.append((f"as recommended:\n{title}", values, limit))
    height = max(3.0, 1.8 + 0.22 * len(report.layers))
    figure = Figure(figsize=(3.1 * len(panels), height), layout="constrained")
    for axes, (title, rows, limit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        image = axes.imshow(_rectangle(rows), aspect="auto", cmap="magma_r", vmin=0, vmax=limit and 2 * limit)
        bar = figure.colorbar(image, ax=axes)
        if limit is not None:
            bar.ax.axhline(limit, color="tab:cyan", linewidth=2)
        axes.set(title=title, xlabel="key head" if limit is None and "keys" in title else "query head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yticks(range(len(shown)), [str(layer.index) for layer in report.layers])
    figure.axes[0].set_ylabel("layer")
    figure.suptitle("What packed keys and values change, by layer and head (cyan: the limit)")
    figure.savefig(path, dpi=120)


def _row(layer: Verdict, bits: Sequence[int]) -> list[str]:
    ratios = [layer.outliers[name].max() for name in ("mean_ratio", "channel_ratio", "first_token")]
    plain = layer.best_at(bits, ("none",))
    loss = layer.recommended or layer.best_at(bits)
    setting = f"{loss.setting}" if layer.recommended else f"[red]leave dense[/], not {loss.setting}"
    row = [str(layer.index), *(f"{ratio:.2f}" for ratio in ratios), _marked(plain, "variation"), setting]
    row += [str(loss.nbytes), f"{loss.worst['score_rmse']:.3g}", f"{loss.worst['score_relative']:.3f}"]
    return [*row, _marked(loss, "variation"), f"{loss.worst['top1']:.3f}", _marked(loss, "cosine")]


def _marked(loss: Loss, name: str) -> str:
    """A worst head's figure, red and with a mark where it is beyond its limit."""
    value = loss.worst[name]
    beyond = value > LIMITS[name] if name == "variation" else value < LIMITS[name]
    return f"[red]! {value:.3f}[/]" if beyond else f"{value:.3f}"


def _needs_center(layer: Verdict, bits: Sequence[int]) -> bool:
    return layer.safe_at(bits) and not any(x.safe for x in layer.at(bits) if x.setting.center == "none")


def _rectangle(rows: Sequence[NDArray]) -> NDArray:
    """Rows of different lengths as one array, NaN where they end."""
    widest = max(len(row) for row in rows)
    return np.stack([np.pad(row.astype(np.float64), (0, widest - len(row)), constant_values=np.nan) for row in rows])
