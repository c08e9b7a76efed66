"""Device code that both front-ends launch, by name. Triton is imported when a kernel is asked for."""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore import tuning
from tqcore.fixed_point import score_table
from tqcore.quantizer import Quantizer
from tqcore.rotation import inverse_sqrt, matrix, signs

KERNELS = {
    "triton": ("scores", "scores_kernel"),
    "gluon": ("gluon_scores", "scores_kernel"),
    "gluon_queries": ("gluon_long_scores", "queries_kernel"),
    "gluon_long": ("gluon_long_scores", "scores_kernel"),
    "compress": ("compress", "compress_kernel"),
    "dense_compress": ("compress", "dense_compress_kernel"),
    "decompress": ("decompress", "decompress_kernel"),
    "dense_decompress": ("decompress", "dense_decompress_kernel"),
}
FEW_VECTORS = 16384  # up to so many a warp encodes each, where otherwise a thread does
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


@cache
def compress_table(quantizer: Quantizer) -> NDArray[np.int32]:
    """[32 + D or D²] int32, bits of float32, for encoders and decoders: the positive boundaries from 0 on; at 7 the
    step that all centroids are multiples of; from 8 on the positive centroids, their place in 16ths of a step added,
    each less the one before; from 16 on all centroids; from 32 on signs or R."""
    codebook, half = quantizer.codebook, 2 ** (quantizer.code_bits - 1)
    table = np.zeros(32, np.float32)
    table[: half - 1] = codebook.boundaries[half:]
    table[7] = step = score_table(codebook.centroids).step
    table[8 : 8 + half] = np.diff(codebook.centroids[half:] + (np.arange(half) + 0.5) * step / 16, prepend=0)
    table[16 : 16 + 2 * half] = codebook.centroids
    of_hadamard = quantizer.rotation == "hadamard"
    rotation = signs(quantizer) if of_hadamard else matrix(quantizer).reshape(-1)
    return np.concatenate([table, rotation]).view(np.int32)


def can_compress(quantizer: Quantizer) -> bool:
    """Whether the encoders and decoders take this quantizer."""
    return 8 <= quantizer.head_dim <= tuning.MAX_HEAD_DIM


def compress_launch(
    quantizer: Quantizer, itemsize: int, vectors: int, *, encode: bool
) -> tuple[str, dict[str, Any], int]:
    """Name, constants and warps of an encoder of vectors, or a decoder to vectors, of `itemsize` bytes a coordinate."""
    head_dim, bits = quantizer.head_dim, quantizer.code_bits
    constants: dict[str, Any] = {"D": head_dim, "BITS": bits}
    if encode:
        constants["CORRECTED"] = quantizer.norm == "corrected"
    name = "compress" if encode else "decompress"
    if quantizer.rotation != "hadamard":
        block_d = max(32, tuning.next_power_of_two(head_dim))
        return f"dense_{name}", constants | {"BLOCK_V": 16 if block_d > 128 else 32, "BLOCK_D": block_d}, 4
    constants["SCALE"] = float(inverse_sqrt(head_dim))
    if encode:
        constants["SHARED"] = vectors <= FEW_VECTORS
        if constants["SHARED"]:
            return name, constants | {"BLOCK_V": 4, "CHUNK_X": head_dim, "CHUNK_P": head_dim}, 4
    constants |= {"BLOCK_V": 32, "CHUNK_X": min(head_dim, 16 // itemsize)}
    return name, constants | {"CHUNK_P": 16}, 1


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


def stages(config: tuning.ScoreConfig, *addresses: int) -> int:
    """STAGES of the Gluon kernel: asynchronous copies take 16 bytes, so all bases, strides and rows must allow it."""
    return config.num_stages if all(address % 16 == 0 for address in addresses) else 1
