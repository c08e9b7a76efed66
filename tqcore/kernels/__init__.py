"""Device code that both front-ends launch, by name. Triton is imported when a kernel is asked for."""

from collections.abc import Callable
from typing import Any

from tqcore import tuning


def score_kernel(implementation: str) -> tuple[Any, Callable[[int, int, int, int], tuning.ScoreConfig]]:
    """The score kernel "triton" or "gluon", and the rule of its launches; ImportError where Triton lacks it."""
    if implementation == "gluon":
        from tqcore.kernels import gluon_scores

        return gluon_scores.scores_kernel, tuning.gluon_score_config
    from tqcore.kernels import scores

    return scores.scores_kernel, tuning.score_config


def score_constants(config: tuning.ScoreConfig, head_dim: int, planes: int, codes_stride_s: int) -> dict[str, int]:
    """What both score kernels are compiled for."""
    return {
        "CODES_STRIDE_S": codes_stride_s,
        "D": head_dim,
        "PLANES": planes,
        "BLOCK_R": config.block_r,
        "BLOCK_S": config.block_s,
        "BLOCK_P": tuning.packed_block(head_dim),
    }
