"""New rows against committed ones."""

import json
import subprocess
from pathlib import Path

KEY = ("op", "front", "implementation", "B", "K", "G", "S", "T", "D", "bits")
THRESHOLD = 1.03


def committed_rows(path: Path) -> tuple[list[dict], str]:
    """The rows of `path` as of HEAD, else as it is on disk, else none; and where they are from."""
    show = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        return json.loads(subprocess.run(show, capture_output=True, text=True, check=True).stdout)["rows"], "HEAD"
    except (OSError, subprocess.CalledProcessError):
        pass
    if path.exists():
        return json.loads(path.read_text())["rows"], str(path)
    return [], "nowhere"


def compare(new: list[dict], old: list[dict]) -> tuple[list[str], list[str]]:
    """(regressed, improved): a line a row whose spread lies beyond the old one and whose median by over 3 %."""
    known = {tuple(row[key] for key in KEY): row for row in old}
    regressed, improved = [], []
    for row in new:
        before = known.get(tuple(row[key] for key in KEY))
        if before is None:
            continue
        case = " ".join(f"{key}{row[key]}" for key in "BKGSTD")
        times = f"{before['us']:.1f} µs, now {row['us']:.1f} ({row['us'] / before['us'] - 1:+.1%})"
        line = f"{case} {row['front']}/{row['implementation']}: {times}"
        if row["us_low"] > before["us_high"] and row["us"] > THRESHOLD * before["us"]:
            regressed.append(line)
        if row["us_high"] < before["us_low"] and row["us"] * THRESHOLD < before["us"]:
            improved.append(line)
    return regressed, improved


def report(new: list[dict], path: Path) -> str:
    """What changed since the committed results of `path`."""
    old, source = committed_rows(path)
    if not old:
        return f"No committed results at {path}."
    regressed, improved = compare(new, old)
    known = {tuple(row[key] for key in KEY) for row in old}
    both = sum(tuple(row[key] for key in KEY) in known for row in new)
    lines = [f"Against the committed results ({source}), {both} rows in both: {len(regressed)} regressed"]
    lines[0] += f" by more than the spread and 3 %, {len(improved)} improved."
    lines += [f"regressed: {line}" for line in regressed] + [f"improved:  {line}" for line in improved]
    return "\n".join(lines)
