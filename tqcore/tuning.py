"""How kernels are launched: block sizes from `tuning.json`, measured per device, and the grid that follows."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MAX_HEAD_DIM = 256  # of the kernels
ROW_GROUP = 8  # query rows that are converted, and padded, together
LONG_ROWS = 32  # query rows a key head, past which scores are a product of matrices
START = 2  # blocks that an attention program could do in the time that it takes to begin and end
UNKNOWN = "NVIDIA H200"  # whose parameters other devices take


@dataclass(frozen=True)
class ScoreConfig:
    """The launch of a score kernel over R query rows and S keys a key head.

    Args:
      block_r: query rows of a block.
      block_s: keys of a block.
      blocks: blocks that a program takes: along S, or, in the kernel for many rows, along R.
      num_warps, num_stages: as in Triton.
    """

    block_r: int
    block_s: int
    blocks: int
    num_warps: int
    num_stages: int

    def grid(self, rows: int, keys: int, heads: int) -> tuple[int, int, int]:
        """(programs along S, key heads, programs along R) of a kernel whose programs go along S."""
        return ceil_div(keys, self.block_s * self.blocks), heads, ceil_div(rows, self.block_r)

    def long_grid(self, rows: int, keys: int, heads: int) -> tuple[int, int, int]:
        """The same of one whose programs go along R."""
        return ceil_div(keys, self.block_s), heads, ceil_div(rows, self.block_r * self.blocks)


@dataclass(frozen=True)
class AttentionConfig:
    """The launch of an attention kernel over R query rows and S positions a key head.

    Args:
      block_r: query rows of a block.
      block_s: positions of a block.
      splits: into how many parts the positions are split.
      num_warps, num_stages: as in Triton.
      max_registers: that a thread may take, or None for what ptxas chooses.
    """

    block_r: int
    block_s: int
    splits: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def grid(self, rows: int, heads: int) -> tuple[int, int]:
        """(programs along the parts of all key heads, programs along R)."""
        return self.splits * heads, ceil_div(rows, self.block_r)

    @property
    def merge_warps(self) -> int:
        """Of a program that joins the parts of a row."""
        return 4 if self.splits > 8 else 1


def score_config(
    kernel: str, rows: int, keys: int, heads: int, head_dim: int, device: str | None = None
) -> ScoreConfig:
    """The launch of "triton" (or its Pallas twin), "gluon" or "gluon_long" for R rows, S keys, B·K key heads and D.

    Of the device's list, the first entry whose `rows` and `head_dim` are not exceeded; then as many blocks a program,
    up to `longest`, as make whole waves of programs, `resident` of them a processor. Block sizes, warps and stages
    never depend on S, so that a growing cache compiles nothing new.
    """
    entry, wave = _entry(kernel, rows, head_dim, device)
    row_blocks, key_blocks = ceil_div(rows, entry["block_r"]), ceil_div(keys, entry["block_s"])
    along, across = (row_blocks, key_blocks) if kernel == "gluon_long" else (key_blocks, row_blocks)
    blocks = steps(heads * across, along, wave, entry["longest"])
    return ScoreConfig(entry["block_r"], entry["block_s"], blocks, entry["num_warps"], entry["num_stages"])


def attention_config(
    kernel: str,
    rows: int,
    positions: int,
    heads: int,
    head_dim: int,
    device: str | None = None,
    splits: int | None = None,
    bits: tuple[int, int] = (4, 4),
    paged: bool = False,
) -> AttentionConfig:
    """The launch of "attention" (or its Pallas twin) or "gluon_attention" for R rows, S positions, B·K key heads and D.

    The entry is chosen as in `score_config`, those with `bits` being for keys or values of so many, those with `paged`
    for pools; with its `registers`, `resident` programs fit a processor. There are as many parts as make the fewest
    steps of whole waves of programs, of at least `least` blocks each, or `splits`, as far as
    there are blocks. S is the capacity, so that a filling cache compiles nothing new.
    """
    entry, wave = _entry(kernel, rows, head_dim, device, bits, paged)
    blocks, programs = ceil_div(positions, entry["block_s"]), max(1, heads * ceil_div(rows, entry["block_r"]))
    if splits is None:
        most = max(1, blocks // entry["least"])
        choices = [max(1, min(most, waves * wave // programs)) for waves in range(1, 5)]
        splits = min(choices, key=lambda parts: ceil_div(programs * parts, wave) * (ceil_div(blocks, parts) + START))
    splits = max(1, min(splits, blocks))
    launch = entry["num_warps"], entry["num_stages"], entry.get("registers")
    return AttentionConfig(entry["block_r"], entry["block_s"], splits, *launch)


def dense_rows(device: str | None = None) -> int:
    """From how many query rows a key head on attention decompresses keys and values first."""
    return _entries(device)["dense_rows"]


def steps(programs: int, blocks: int, wave: int, longest: int) -> int:
    """Blocks that a program takes so that whole waves of programs cover `programs` times `blocks`."""
    waves = max(1, ceil_div(programs * blocks, wave * longest))
    programs_along = max(1, wave * waves // max(1, programs))
    return min(longest, max(1, ceil_div(blocks, programs_along)))


def _entry(
    kernel: str, rows: int, head_dim: int, device: str | None, bits: tuple[int, ...] = (), paged: bool = False
) -> tuple[dict[str, int], int]:
    """Of the device's list, the first entry whose `rows` and `head_dim` are not exceeded; its programs at a time."""
    entries = _entries(device)
    for entry in entries[kernel]:
        fits = rows <= entry.get("rows", rows) and head_dim <= entry.get("head_dim", head_dim)
        if fits and ("bits" not in entry or entry["bits"] in bits) and entry.get("paged", paged) == paged:
            return entry, entries["processors"] * entry["resident"]
    raise LookupError(f"tuning.json has no entry for {kernel}, rows={rows}, head_dim={head_dim}.")


@cache
def _entries(device: str | None) -> dict[str, Any]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    return table.get(device, table[UNKNOWN])


def packed_block(head_dim: int) -> int:
    """Pairs of coordinates of a key that a program holds: D/2 up to a power of two, at least what an int8 dot takes."""
    return max(32, next_power_of_two(head_dim // 2))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
