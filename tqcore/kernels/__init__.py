"""Device code that both front-ends launch, by name. Triton is imported when a kernel is asked for."""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore import tuning
from tqcore.quantizer import Quantizer
from tqcore.rotation import hadamard, inverse_sqrt, matrix, signs

KERNELS = {
    "triton": ("scores", "scores_kernel"),
    "gluon": ("gluon_scores", "scores_kernel"),
    "gluon_queries": ("gluon_long_scores", "queries_kernel"),
    "gluon_long": ("gluon_long_scores", "scores_kernel"),
    "attention": ("attention", "attention_kernel"),
    "gluon_attention": ("gluon_attention", "attention_kernel"),
    "merge": ("attention", "merge_kernel"),
    "compress": ("compress", "compress_kernel"),
    "gluon_compress": ("gluon_compress", "compress_kernel"),
    "dense_compress": ("dense_compress", "dense_compress_kernel"),
    "decompress": ("decompress", "decompress_kernel"),
    "dense_decompress": ("dense_compress", "dense_decompress_kernel"),
}
FEW_VECTORS = 8192  # up to which they are spread over more lanes and programs
GLUON_STEPS, GLUON_PROGRAMS = 8, 4096  # steps of a program of the Gluon encoder; programs that fill a device
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
def can_load(name: str) -> bool:
    """Whether `load` can."""
    try:
        load(name)
    except ImportError:
        return False
    return True


def compress_table(quantizer: Quantizer) -> NDArray[np.int32]:
    """[32 + D or D²] int32 for encoders and decoders: bits of the positive boundaries from 0 on; from 8 on those of the
    positive centroids, with their place in the lowest three; from 16 on all centroids; from 32 on signs or R."""
    codebook, half = quantizer.codebook, 2 ** (quantizer.code_bits - 1)
    table = np.zeros(32, np.float32)
    table[: half - 1] = codebook.boundaries[half:]
    table[8 : 8 + half] = codebook.centroids[half:]
    table[16 : 16 + 2 * half] = codebook.centroids
    of_hadamard = quantizer.rotation == "hadamard"
    rotation = signs(quantizer) if of_hadamard else matrix(quantizer).reshape(-1)
    words = np.concatenate([table, rotation]).view(np.int32)
    words[8 : 8 + half] |= np.arange(half, dtype=np.int32)
    return words


@cache
def companding(quantizer: Quantizer) -> tuple[float, float]:
    """(limit, steepness) such that limit · tanh(steepness · y), rounded, names the one boundary to compare y with.

    Boundaries count from the one at zero on. That of each is nearest to its own number, with a hundredth to spare.

    Raises:
      ValueError: a hyperbolic tangent does not tell the boundaries apart.
    """
    half = 2 ** (quantizer.code_bits - 1)
    if half == 1:
        return 0.0, 1.0
    boundaries, numbers = quantizer.codebook.boundaries[half:].astype(np.float64), np.arange(1, half)
    limits = half - 0.5 - np.geomspace(0.005, 0.5, 100)[:, None]
    steepness = np.linspace(0.2, 3, 400) / boundaries[-1]
    room = 0.5 - np.abs(limits[..., None] * np.tanh(steepness[:, None] * boundaries) - numbers).max(-1)
    room = np.minimum(room, half - 0.5 - limits)
    best = np.unravel_index(np.argmax(room), room.shape)
    if room[best] < 0.01:
        raise ValueError(f"A hyperbolic tangent must tell boundaries apart, got {boundaries}.")
    return float(limits[best[0], 0]), float(steepness[best[1]])


def place_table(quantizer: Quantizer) -> NDArray[np.float32]:
    """[32]: boundary n, from the one at zero on, is number n % 32."""
    half, table = 2 ** (quantizer.code_bits - 1), np.zeros(32, np.float32)
    table[np.arange(1 - half, half)] = quantizer.codebook.boundaries
    return table


def gluon_compress_table(quantizer: Quantizer) -> NDArray[np.int32]:
    """[288 + D/2] int32 for the Gluon encoder: the bits of `place_table`; from 32 on eight words of each lane 4·g + q;
    from 288 on the signs of coordinates, by twos, as what takes bfloat16 to its product by exclusive or.

    A lane's words are rows 2·q and 2·q + 1 of column g of H = the Hadamard matrix of eight, in bfloat16: what it has of
    the columns (H, H) and (H, −H) of the one of sixteen, and of the negatives of both.
    """
    eight = hadamard(np.eye(8, dtype=np.float32), np).reshape(32, 2)
    parts = np.stack([eight, eight, eight, -eight, -eight, -eight, -eight, eight], 1)
    zeros = np.copysign(np.float32(0), signs(quantizer))
    return np.concatenate([place_table(quantizer).view(np.int32), _bfloat16_pairs(parts), _bfloat16_pairs(zeros)])


def _bfloat16_pairs(x):
    """float32 that bfloat16 can hold, two by two."""
    return (x.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.int32)


def are_many(vectors: int) -> bool:
    """Whether so many vectors fill a device, each of them in few lanes."""
    return vectors > FEW_VECTORS


def can_compress(quantizer: Quantizer) -> bool:
    """Whether the encoders and decoders take this quantizer."""
    return 8 <= quantizer.head_dim <= tuning.MAX_HEAD_DIM


def compress_launch(
    quantizer: Quantizer, shape: Sequence[int], *, encode: bool, aligned: bool = True, ptx: bool = True
) -> tuple[str, dict[str, Any], tuple[int, int, int], int]:
    """Name, constants, grid and warps of an encoder or decoder of vectors.

    Args:
      shape: [B, K, T] of the vectors.
      aligned: whether addresses and strides of codes are multiples of four bytes.
      ptx: whether the kernel is compiled for NVIDIA's devices.
    """
    head_dim, bits, (batch, heads, length) = quantizer.head_dim, quantizer.code_bits, shape
    constants: dict[str, Any] = {"D": head_dim, "BITS": bits}
    vectors = batch * heads * length
    if encode:
        constants["CORRECTED"] = quantizer.norm == "corrected"
    name = "compress" if encode else "decompress"
    if quantizer.rotation != "hadamard":
        block_d = max(32, tuning.next_power_of_two(head_dim))
        block_v = 16 if block_d > 128 else 32
        grid = tuning.ceil_div(vectors, block_v), 1, 1
        return f"dense_{name}", constants | {"BLOCK_V": block_v, "BLOCK_D": block_d}, grid, 4
    half, codebook = 2 ** (bits - 1), quantizer.codebook
    if encode:
        constants["BOUNDARIES"] = tuple(codebook.boundaries[half:].tolist())
    many = max(2, head_dim // 64) if encode else 4
    lanes = min(many if are_many(vectors) else (16 if encode else 8), head_dim // 8)
    block_v = 32 // lanes  # one warp, in which Triton's layouts of [BLOCK_V, lanes] agree
    tiled = length % block_v == 0 and max(batch, heads) < 2**16
    grid = (length // block_v, heads, batch) if tiled else (tuning.ceil_div(vectors, block_v), 1, 1)
    constants |= {"SCALE": float(inverse_sqrt(head_dim)), "CENTROIDS": centroid_words(codebook.centroids[half:])}
    constants |= {"TILED": tiled, "ALIGNED": aligned, "PTX": ptx, "BLOCK_V": block_v, "L": lanes}
    return name, constants, grid, 1


def gluon_takes(quantizer: Quantizer, shape: Sequence[int], dtype: str, centered: bool) -> bool:
    """Whether the Gluon encoder takes vectors [B, K, T] of that type."""
    fits = quantizer.rotation == "hadamard" and quantizer.head_dim in (64, 128, 256)
    return fits and dtype == "bfloat16" and not centered and max(shape[:2]) < 2**16


def gluon_compress_launch(
    quantizer: Quantizer, shape: Sequence[int], *, aligned: bool = True
) -> tuple[dict[str, Any], tuple[int, int, int], dict[str, int]]:
    """Constants, grid and options of the Gluon encoder; as `compress_launch`."""
    head_dim, bits, (batch, heads, length) = quantizer.head_dim, quantizer.code_bits, shape
    limit, steepness = companding(quantizer)
    steps = min(GLUON_STEPS, tuning.next_power_of_two(max(1, batch * heads * length // (8 * GLUON_PROGRAMS))))
    constants = {
        "D": head_dim,
        "BITS": bits,
        "CORRECTED": quantizer.norm == "corrected",
        "SCALE": float(inverse_sqrt(head_dim)),
        "LIMIT": limit,
        "STEEPNESS": steepness,
        "CENTROIDS": centroid_words(quantizer.codebook.centroids[2 ** (bits - 1) :]),
        "ALIGNED": aligned,
        "STEPS": steps,
    }
    grid = tuning.ceil_div(length, 8 * steps), heads, batch
    return constants, grid, {"num_warps": 1, "num_stages": 1, "maxnreg": 96 if head_dim <= 128 else 144}


def centroid_words(centroids: NDArray[np.float32]) -> tuple[int, ...]:
    """The first bytes of up to eight centroids in two words, then the second ones; all others are 0."""
    first, second = centroids.view(np.uint8).reshape(-1, 4)[:, :1:-1].T
    words = np.stack([np.pad(row, (0, 8 - len(row))) for row in (first, second)]).view("<i4")
    return tuple(words.reshape(-1).tolist())


def score_constants(
    config: tuning.ScoreConfig, head_dim: int, bits: int, planes: int, codes_stride_s: int
) -> dict[str, int]:
    """What every score kernel is compiled for."""
    return {
        "CODES_STRIDE_S": codes_stride_s,
        "D": head_dim,
        "BITS": bits,
        "PLANES": planes,
        "BLOCK_R": config.block_r,
        "BLOCK_S": config.block_s,
        "BLOCK_P": tuning.packed_block(head_dim),
    }


def attention_constants(
    config: tuning.AttentionConfig, options: Any, keys: Quantizer, values: Quantizer, page: int | None, *strides_s: int
) -> dict[str, Any]:
    """What every attention kernel is compiled for; `options` as in `tqcore.softmax`, `strides_s` of codes along S."""
    return {
        "K_STRIDE_S": strides_s[0],
        "V_STRIDE_S": strides_s[1],
        "D": keys.head_dim,
        "K_BITS": keys.code_bits,
        "V_BITS": values.code_bits,
        "PAGE": page or 0,
        "CAUSAL": options.is_causal,
        "WINDOW": options.window is not None,
        "SOFT_CAP": options.soft_cap or 0.0,
        "ROTATE": keys.rotation == "hadamard",
        "BLOCK_R": config.block_r,
        "BLOCK_S": config.block_s,
    }


def merge_constants(splits: int, values: Quantizer, sinks: bool, early: bool = False) -> dict[str, Any]:
    """What the kernel that joins the parts of attention is compiled for.

    `early`: it is launched by programmatic dependent launch behind a kernel that lets it start (Gluon's).
    """
    return {
        "BLOCK_SPLITS": tuning.next_power_of_two(splits),
        "D": values.head_dim,
        "BLOCK_D": tuning.next_power_of_two(values.head_dim),
        "SINKS": sinks,
        "UNROTATE": values.rotation == "hadamard",
        "EARLY": early,
    }


def stages(config: Any, *addresses: int) -> int:
    """STAGES of the Gluon kernel: asynchronous copies take 16 bytes, so all bases, strides and rows must allow it."""
    return config.num_stages if all(address % 16 == 0 for address in addresses) else 1
