"""TurboQuant KV-cache attention for JAX: packed 1- to 4-bit keys scored without decompressing them.

Letters, shapes and operations are those of `tqcore`; arrays are JAX's.
"""

import jax

from tqcore import Codebook, PackedVectors, Quantizer, __version__
from tqjax.attention_ops import attention, merge_attention
from tqjax.cache import KVCache, from_dlpack, load_file, save_file
from tqjax.compress_ops import append, compress, decompress
from tqjax.ops import (
    attention_scores,
    fused_qk_scores,
    key_center,
    rotary_center,
    rotate,
    unrotate,
)

jax.tree_util.register_dataclass(
    PackedVectors, data_fields=["codes", "norms", "center", "residual"], meta_fields=["quantizer"]
)

__all__ = [
    "Codebook",
    "KVCache",
    "PackedVectors",
    "Quantizer",
    "__version__",
    "append",
    "attention",
    "attention_scores",
    "compress",
    "decompress",
    "from_dlpack",
    "fused_qk_scores",
    "key_center",
    "load_file",
    "merge_attention",
    "rotary_center",
    "rotate",
    "save_file",
    "unrotate",
]
