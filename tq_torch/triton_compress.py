"""Launches the kernels of `tqcore.kernels.compress` on torch tensors."""

from functools import cache

import torch

from tq_torch.triton_call import INTERPRETED
from tqcore import tuning
from tqcore.kernels import can_compress, compress_constants, load
from tqcore.quantizer import Quantizer
from tqcore.rotation import matrix, signs


def can_do(x: torch.Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernels take vectors of this device and head_dim."""
    return can_compress(quantizer.head_dim) and (x.is_cuda or INTERPRETED)


def can_write(codes: torch.Tensor, quantizer: Quantizer) -> bool:
    """Whether the kernel writes into these codes: bytes in order, each vector's where words of them can be stored."""
    word = {1: 1, 2: 2, 3: 2, 4: 4}[quantizer.code_bits]
    return codes.stride(-1) == 1 and not any(n % word for n in (codes.data_ptr(), *codes.stride()[:-1]))


def compress(
    x: torch.Tensor, quantizer: Quantizer, center: torch.Tensor | None = None, *, config=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., S, D] of any strides -> codes [..., S, P], norms [..., S]."""
    codes = x.new_empty(*x.shape[:-1], quantizer.packed_dim, dtype=torch.uint8)
    norms = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if norms.numel():
        center = None if center is None else _four_axes(center.expand(x.shape))
        _launch(_four_axes(x), quantizer, center, _four_axes(codes), _three_axes(norms), config=config)
    return codes, norms


def append(
    codes: torch.Tensor,  # [B, K, S, P], or [pages, K, page, P]
    norms: torch.Tensor,
    x: torch.Tensor,  # [B, K, T, D]
    starts: torch.Tensor,  # [B] int32
    quantizer: Quantizer,
    center: torch.Tensor | None = None,  # that broadcasts to x
    page_table: torch.Tensor | None = None,  # [B, M] int32
    *,
    config=None,
) -> None:
    """Writes x[b, :, t] to position starts[b] + t, where there is one."""
    if x.numel() and codes.numel():
        center = None if center is None else center.expand(x.shape)
        _launch(x, quantizer, center, codes, norms, starts, page_table, config=config)


def _launch(x, quantizer, center, codes, norms, starts=None, page_table=None, *, config=None):
    x = x if x.stride(3) == 1 else x.contiguous()
    center = center if center is None or center.stride(3) == 1 else center.contiguous()
    kv_heads, length = x.shape[1:3]
    rows = x.shape[0] * kv_heads * length
    config = config or tuning.compress_config(rows, quantizer.head_dim)
    page, capacity, table_stride = 1, codes.shape[2], 0
    if page_table is not None:
        page_table = page_table if page_table.stride(1) == 1 else page_table.contiguous()
        page, capacity, table_stride = codes.shape[2], codes.shape[2] * page_table.shape[1], page_table.stride(0)
    load("compress")[(config.programs(x.shape[0] * kv_heads, length),)](
        x,
        _rotation(quantizer, False, x.device),
        center,
        codes,
        norms,
        starts if starts is None else starts.contiguous(),
        page_table,
        *x.stride()[:3],
        *((0, 0, 0) if center is None else center.stride()[:3]),
        *codes.stride()[:3],
        *norms.stride(),
        kv_heads,
        length,
        rows,
        capacity,
        codes.shape[0],
        table_stride,
        PAGE=page,
        BOUNDARIES=tuple(quantizer.codebook.boundaries[2 ** (quantizer.code_bits - 1) :].tolist()),
        CORRECTED=quantizer.norm == "corrected",
        **_constants(quantizer, config, length),
    )


def decompress(
    codes: torch.Tensor,
    norms: torch.Tensor,
    quantizer: Quantizer,
    center: torch.Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    rotated: bool = False,
    config=None,
) -> torch.Tensor:
    """codes [..., S, P], norms [..., S] -> norm · Rᵀ centroids[index] + center, or norm · centroids[index] if rotated."""
    out = codes.new_empty(*codes.shape[:-1], quantizer.head_dim, dtype=dtype)
    if not norms.numel():
        return out
    center = None if center is None else _four_axes(center.expand(out.shape))
    center = center if center is None or center.stride(3) == 1 else center.contiguous()
    kv_heads, length = _three_axes(norms).shape[1:]
    rows = norms.numel()
    config = config or tuning.compress_config(rows, quantizer.head_dim)
    load("decompress")[(config.programs(rows // length, length),)](
        codes.contiguous(),
        norms.contiguous(),
        _rotation(quantizer, True, codes.device),
        center,
        out,
        *((0, 0, 0) if center is None else center.stride()[:3]),
        kv_heads,
        length,
        rows,
        ROTATED=rotated,
        **_constants(quantizer, config, length),
    )
    return out


def _constants(quantizer, config, length):
    """What both kernels are compiled for, and with what options."""
    constants = compress_constants(quantizer, config, config.tiled(length)) | {"PTX": not INTERPRETED and torch.version.hip is None}
    return constants | {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}


@cache
def _rotation(quantizer: Quantizer, inverse: bool, device: torch.device) -> torch.Tensor:
    """Signs, or the matrix that rows are multiplied by."""
    if quantizer.rotation == "hadamard":
        return torch.tensor(signs(quantizer), device=device)
    return torch.tensor(matrix(quantizer) if inverse else matrix(quantizer).T.copy(), device=device)


def _four_axes(x):
    """[..., S, D] as [B, K, S, D]."""
    return x.reshape(-1, *x.shape[-3:]) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


def _three_axes(norms):
    """[..., S] as [B, K, S]."""
    return _four_axes(norms[..., None])[..., 0]
