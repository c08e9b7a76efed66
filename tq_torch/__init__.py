"""TurboQuant KV-cache attention for PyTorch: packed 1- to 4-bit keys scored without decompressing them.

Letters, shapes and operations are those of `tqcore`; arrays are torch tensors.
"""

from tq_torch.attention_ops import attention, merge_attention
from tq_torch.cache import KVCache, from_dlpack, load_file, save_file
from tq_torch.compress_ops import append, compress, decompress
from tq_torch.ops import (
    attention_scores,
    fused_qk_scores,
    key_center,
    rotary_center,
    rotate,
    unrotate,
)
from tqcore import Codebook, PackedVectors, Quantizer, __version__

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
