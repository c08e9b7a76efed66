"""How kernels are launched: block sizes and the grid that follows from them."""

from dataclasses import dataclass

MAX_HEAD_DIM = 256  # of the kernels
PROCESSORS = 132  # of an H200; launches on other devices follow the same rule
LONGEST = 16  # steps of a program, where shorter ones fill the device too


@dataclass(frozen=True)
class ScoreConfig:
    """The launch of a score kernel over R query rows and S keys a key head.

    Args:
      block_r: query rows a program scores, a power of two from 8.
      block_s: keys a step of its loop reads, a power of two.
      blocks: steps it takes.
      num_warps, num_stages: as in Triton.
    """

    block_r: int
    block_s: int
    blocks: int
    num_warps: int
    num_stages: int

    def grid(self, rows: int, keys: int, heads: int) -> tuple[int, int, int]:
        """(programs along S, key heads, programs along R)."""
        return ceil_div(keys, self.block_s * self.blocks), heads, ceil_div(rows, self.block_r)


def score_config(rows: int, keys: int, heads: int, head_dim: int) -> ScoreConfig:
    """For R rows, S keys, B·K key heads and D: whole waves of programs, long ones where many rows share the keys."""
    block_r = min(32, max(8, next_power_of_two(rows)))
    block_s = 128 if head_dim <= 128 and (block_r <= 16 or rows > 64) else 64
    resident, longest = (5, LONGEST) if rows <= 64 else (6, keys)
    blocks = steps(heads * ceil_div(rows, block_r), ceil_div(keys, block_s), resident, longest)
    return ScoreConfig(block_r, block_s, blocks, num_warps=4, num_stages=3)


def gluon_score_config(rows: int, keys: int, heads: int, head_dim: int) -> ScoreConfig:
    """The same for the Gluon kernel, whose programs are single warps."""
    block_r = 8 if rows <= 8 else 16
    block_s = 64 if head_dim > 64 and rows <= 16 else 32
    blocks = steps(heads * ceil_div(rows, block_r), ceil_div(keys, block_s), resident=16, longest=LONGEST)
    return ScoreConfig(block_r, block_s, blocks, num_warps=1, num_stages=1)


def steps(programs: int, key_blocks: int, resident: int, longest: int) -> int:
    """Steps of a program so that whole waves of `resident` programs a processor cover `programs` times `key_blocks`."""
    wave = PROCESSORS * resident
    waves = max(1, ceil_div(programs * key_blocks, wave * max(1, longest)))
    programs_s = max(1, wave * waves // max(1, programs))
    return max(1, ceil_div(key_blocks, programs_s))


def packed_block(head_dim: int) -> int:
    """Bytes of codes per key that a program holds: D/2 up to a power of two, at least what an int8 dot takes."""
    return max(32, next_power_of_two(head_dim // 2))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
