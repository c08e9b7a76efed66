"""How kernels are launched: block sizes from `tuning.json`, measured per device, and the grid that follows."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MAX_HEAD_DIM = 256  # of the kernels
ROW_GROUP = 8  # query rows that are converted, and padded, together
LONG_ROWS = 32  # query rows a key head, past which scores are a product of matrices
FEW_VECTORS = 8192  # up to which a launch that compresses takes as long as one vector does
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


def score_config(
    kernel: str, rows: int, keys: int, heads: int, head_dim: int, device: str | None = None
) -> ScoreConfig:
    """The launch of "triton" (or its Pallas twin), "gluon" or "gluon_long" for R rows, S keys, B·K key heads and D.

    Of the device's list, the first entry whose `rows` and `head_dim` are not exceeded; then as many blocks a program,
    up to `longest`, as make whole waves of programs, `resident` of them a processor. Block sizes, warps and stages
    never depend on S, so that a growing cache compiles nothing new.
    """
    entries = _entries(device)
    wave = entries["processors"]
    for entry in entries[kernel]:
        if rows <= entry.get("rows", rows) and head_dim <= entry.get("head_dim", head_dim):
            break
    else:
        raise LookupError(f"tuning.json has no entry for {kernel}, rows={rows}, head_dim={head_dim}.")
    wave *= entry["resident"]
    row_blocks, key_blocks = ceil_div(rows, entry["block_r"]), ceil_div(keys, entry["block_s"])
    along, across = (row_blocks, key_blocks) if kernel == "gluon_long" else (key_blocks, row_blocks)
    blocks = steps(heads * across, along, wave, entry["longest"])
    return ScoreConfig(entry["block_r"], entry["block_s"], blocks, entry["num_warps"], entry["num_stages"])


@dataclass(frozen=True)
class CompressConfig:
    """The launch of a kernel that compresses or decompresses.

    Args:
      lanes: of a warp that share a vector, a power of two.
      num_warps: as in Triton.
    """

    lanes: int
    num_warps: int

    @property
    def rows(self) -> int:
        """Vectors of a program."""
        return 32 // self.lanes * self.num_warps

    def tiled(self, length: int) -> bool:
        """Whether a program's vectors are of one head, which saves divisions, for heads of so many."""
        return length >= 8 * self.rows

    def programs(self, heads: int, length: int) -> int:
        """How many programs take all vectors."""
        return heads * ceil_div(length, self.rows) if self.tiled(length) else ceil_div(heads * length, self.rows)


def compress_config(vectors: int, head_dim: int) -> CompressConfig:
    """The launch for so many vectors of D coordinates: few of them are spread over more lanes and programs."""
    lanes = min(next_power_of_two(head_dim) // 8, 4 if vectors > FEW_VECTORS else 8)
    return CompressConfig(lanes, 4 if vectors > FEW_VECTORS else 1)


def steps(programs: int, blocks: int, wave: int, longest: int) -> int:
    """Blocks that a program takes so that whole waves of programs cover `programs` times `blocks`."""
    waves = max(1, ceil_div(programs * blocks, wave * longest))
    programs_along = max(1, wave * waves // max(1, programs))
    return min(longest, max(1, ceil_div(blocks, programs_along)))


@cache
def _entries(device: str | None) -> dict[str, Any]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    return table.get(device, table[UNKNOWN])


def packed_block(head_dim: int) -> int:
    """Bytes of codes per key that a program holds: D/2 up to a power of two, at least what an int8 dot takes."""
    return max(32, next_power_of_two(head_dim // 2))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
