"""Times the score kernels on one NVIDIA GPU, after a gate: no number unless every timed output is right.

    python3 benchmarks/bench.py                 all cases, to benchmarks/results/<device>/fused_qk_scores.json
    python3 benchmarks/bench.py --quick         the main case, to --out only
    python3 benchmarks/bench.py --dry-run       the whole path on a CPU, tiny cases, interpreted kernels, to --out only

Exit status: 0, or 1 where the gate is red, or 2 where CUDA is missing.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COPY_BYTES = 2**32
DRY_BYTES = 2**20
CASE_KEYS = ("B", "K", "G", "S", "T", "D", "bits")
RATIOS = ("vs_bf16", "vs_bf16_f32out", "vs_fp32", "vs_fp32_highest", "vs_original", "vs_floor")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; None: benchmarks/results/<device>")
    parser.add_argument("--quick", action="store_true", help="only the main case")
    parser.add_argument("--minutes", type=float, help="start no case after as many; None: all cases")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU; nothing goes to the results")
    arguments = parser.parse_args()
    prepare_environment(arguments.dry_run)

    # These read the environment when they are imported.
    import compare
    import jax
    import scores
    import timing
    import torch

    if not arguments.dry_run and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        print("bench.py needs an NVIDIA GPU that both torch and JAX can use; --dry-run needs none.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    console, start = Console(stderr=True), time.perf_counter()
    copy = timing.copy_gbps(device, size=DRY_BYTES if arguments.dry_run else COPY_BYTES)
    lead = timing.Lead(device, size=DRY_BYTES if arguments.dry_run else timing.LEAD_BYTES)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1)
        seen = set()

        def advance(case: str, share: float) -> None:
            progress.update(task, description=case, advance=share)
            if case not in seen and not console.is_terminal:
                console.print(f"{time.perf_counter() - start:6.1f} s  {case}", highlight=False)
            seen.add(case)

        outcome = scores.run(
            quick=arguments.quick, dry_run=arguments.dry_run, lead=lead, device=device, advance=advance,
            deadline=start + 60 * (arguments.minutes or math.inf),
        )  # fmt: skip
    if outcome.red:
        for line in outcome.red:
            console.print(f"red: {line}", markup=False, highlight=False, soft_wrap=True)
        console.print(f"The gate is red {len(outcome.red)} times; no time is reported.")
        return 1

    for row in outcome.rows:
        row["floor_us"] = round(row["bytes"] / copy / 1e3, 3)
        row["copy_share"] = round(row["floor_us"] / row["us"], 4)
    report = describe(device, arguments.dry_run, timing.METHOD) | {"copy_gbps": round(copy, 1)}
    report |= {"dispatch_us": lead.dispatch_us(), "seconds": round(time.perf_counter() - start, 1)}
    report |= {"rows": outcome.rows, "not_run": outcome.not_run}
    name = f"{scores.OP}.json"
    tell(report)
    print(compare.report(outcome.rows, results_folder(report) / name))
    if arguments.out or not (arguments.quick or arguments.dry_run):
        write(report, (arguments.out or results_folder(report)) / ("dry_run.json" if arguments.dry_run else name))
    return 0


def prepare_environment(dry_run: bool) -> None:
    """What torch, Triton and JAX read at import, and where Python finds this repository."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["OMP_NUM_THREADS"] = "1"


def describe(device, dry_run: bool, method: str) -> dict:
    """Where, when, with what and how."""
    import jax
    import torch
    import triton

    commit = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": "cpu" if dry_run else torch.cuda.get_device_name(device),
        "driver": None if dry_run or driver is None else driver.splitlines()[0],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "jax": jax.__version__,
        },
        "commit": os.environ.get("TQ_COMMIT") or commit,
        "command": " ".join(["python3", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": "dry run" if dry_run else method,
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def tell(report: dict, ratios: tuple[str, ...] = RATIOS) -> None:
    """The table, and what a reader of it should know."""
    Console(width=None if sys.stdout.isatty() else 160).print(table(report, ratios))
    for one in report["not_run"]:
        what = f"{one['front']}/{one['implementation']}" if one["front"] else "all"
        print(f"not run: {one['case']} {what}: {one['reason'][:200]}")
    for row in report["rows"]:
        if not row["host_ahead"] and report["method"] != "dry run":
            print(f"host not ahead, an upper bound: {label(row)} {row['front']}/{row['implementation']}")
    print(f"one more burst adds, µs: {report['dispatch_us']}; {report['seconds']} s in all")


def table(report: dict, ratios: tuple[str, ...]) -> Table:
    """The rows case by case, fastest first."""
    dry = "Dry run, the times mean nothing. " if report["method"] == "dry run" else ""
    title = f"{dry}{report['rows'][0]['op']}, {report['device']}, copy {report['copy_gbps']:.0f} GB/s"
    caption = "on the right: how many times faster than that baseline; floor: how many times slower"
    found = Table(title=title, caption=caption)
    headings = ("implementation", "µs", "10–90 %", "of copy", "error", "extra bytes")
    for heading in (*headings, *(name.removeprefix("vs_").replace("_", " ") for name in ratios)):
        found.add_column(heading, justify="left" if heading == "implementation" else "right")
    last = None
    for row in report["rows"]:
        case = label(row)
        if case != last:
            found.add_section()
            found.add_row(f"[bold]{case}")
            last = case
        found.add_row(
            f"{row['front']}/{row['implementation']}",
            f"{row['us']:.1f}",
            f"{row['us_low']:.1f}–{row['us_high']:.1f}",
            f"{row['copy_share']:.0%}",
            "–" if row["error"] is None else f"{row['error']:.0e}",
            "–" if row["extra_bytes"] is None else f"{row['extra_bytes']:,}",
            *("–" if row[name] is None else f"{row[name]:.2f}" for name in ratios),
        )
    return found


def label(row: dict) -> str:
    keys = (*CASE_KEYS, *(key for key in ("bits", "page") if row["op"] == "attention" and row[key]))
    return " ".join(f"{key}{row[key]}" for key in keys)


def results_folder(report: dict) -> Path:
    """Of the device of `report`."""
    return RESULTS / report["device"].lower().replace(" ", "-")


def write(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(path, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
