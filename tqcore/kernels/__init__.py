"""Device code that both front-ends launch, by name. Triton is imported when a kernel is asked for."""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from tqcore import tuning
from tqcore.quantizer import Quantizer
from tqcore.rotation import inverse_sqrt

KERNELS = {
    "triton": ("scores", "scores_kernel"),
    "gluon": ("gluon_scores", "scores_kernel"),
    "gluon_queries": ("gluon_long_scores", "queries_kernel"),
    "gluon_long": ("gluon_long_scores", "scores_kernel"),
    "compress": ("compress", "compress_kernel"),
    "decompress": ("compress", "decompress_kernel"),
}
GLUON_TESTED_WITH = ("3.6.", "3.7.")  # versions of Triton; Gluon is an experimental dialect


@cache
def load(name: str) -> Any:
    """The kernel of that name; ImportError where Triton lacks what it is written in."""
    module, kernel = KERNELS[name]
    return getattr(import_module(f"tqcore.kernels.{module}"), kernel)


@cache
def gluon_is_tested() -> bool:
    """Whether Triton is of a version that the Gluon kernels were tested with."""
    try:
        import triton

        load("gluon_long")
    except ImportError:
        return False
    return triton.__version__.startswith(GLUON_TESTED_WITH)


def score_constants(config: tuning.ScoreConfig, head_dim: int, planes: int, codes_stride_s: int) -> dict[str, int]:
    """What every score kernel is compiled for."""
    return {
        "CODES_STRIDE_S": codes_stride_s,
        "D": head_dim,
        "PLANES": planes,
        "BLOCK_R": config.block_r,
        "BLOCK_S": config.block_s,
        "BLOCK_P": tuning.packed_block(head_dim),
    }


def can_compress(head_dim: int) -> bool:
    """Whether the kernels that compress and decompress take vectors of this size: whole groups of eight."""
    return head_dim % 8 == 0 and head_dim <= tuning.MAX_HEAD_DIM


def compress_constants(quantizer: Quantizer, config: tuning.CompressConfig, tiled: bool) -> dict[str, Any]:
    """What the kernels that compress and decompress are compiled for."""
    bits, dense = quantizer.code_bits, quantizer.rotation != "hadamard"
    centroids = quantizer.codebook.centroids[2 ** (bits - 1) :]  # exact in bfloat16: their last 16 bits are 0
    first, second = centroids.view(np.uint8).reshape(-1, 4)[:, :1:-1].T
    words = np.stack([np.pad(row, (0, 8 - len(row))) for row in (first, second)]).view("<i4")
    return {
        "D": quantizer.head_dim,
        "BITS": bits,
        "TABLE": tuple(words.reshape(-1).tolist()),
        "FACTOR": 1.0 if dense else float(inverse_sqrt(quantizer.head_dim)),
        "DENSE": dense,
        "TILED": tiled,
        "R": config.rows,
        "L": config.lanes,
        "J": tuning.next_power_of_two(quantizer.head_dim) // (8 * config.lanes),
    }


def stages(config: tuning.ScoreConfig, *addresses: int) -> int:
    """STAGES of the Gluon kernel: asynchronous copies take 16 bytes, so all bases, strides and rows must allow it."""
    return config.num_stages if all(address % 16 == 0 for address in addresses) else 1
