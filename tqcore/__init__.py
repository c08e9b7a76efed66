"""TurboQuant's packed 1- to 4-bit format in NumPy: the codebook, the rotation, the bytes and the oracle.

Letters, everywhere: B batch · T query positions · S cached positions · H query heads · K key/value heads ·
G = H // K · D head_dim · P packed bytes per vector · L entries of a table. Arrays are head-first:
queries [B, H, T, D], codes [B, K, S, P], norms [B, K, S], scores [B, H, T, S].
"""

from tqcore.cache import KVCache, from_dlpack
from tqcore.codebook import Codebook
from tqcore.file import load_file, save_file
from tqcore.quantizer import PackedVectors, Quantizer
from tqcore.reference import (
    append,
    attention_scores,
    compress,
    decompress,
    fused_qk_scores,
    key_center,
    rotary_center,
)
from tqcore.reference_attention import attention, merge_attention
from tqcore.rotation import rotate, unrotate
from tqcore.version import __version__

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
