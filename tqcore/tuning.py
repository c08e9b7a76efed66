"""How kernels are launched: block sizes and the grid that follows from them."""

from dataclasses import dataclass

LARGEST_BLOCK_R = 32
FULL_DEVICE = 1024  # programs that keep a large GPU busy


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
    """For R rows, S keys, B·K key heads and D: first enough programs for the device, then longer loops."""
    block_r = min(LARGEST_BLOCK_R, max(8, next_power_of_two(rows)))
    block_s = 128 if head_dim <= 128 and block_r <= 16 else 64
    programs = heads * ceil_div(rows, block_r) * ceil_div(keys, block_s)
    return ScoreConfig(block_r, block_s, blocks=max(1, min(16, programs // FULL_DEVICE)), num_warps=4, num_stages=3)


def packed_block(head_dim: int) -> int:
    """Bytes of codes per key that a program holds: D/2 up to a power of two, at least what an int8 dot takes."""
    return max(32, next_power_of_two(head_dim // 2))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
