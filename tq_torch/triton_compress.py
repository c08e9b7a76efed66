"""Launches the encoders and decoders of `tqcore.kernels` on torch tensors."""

from functools import cache

import torch

from tq_torch.triton_call import INTERPRETED, PTX, _can_run_gluon
from tqcore.kernels import (
    can_compress,
    compress_launch,
    compress_table,
    gluon_compress_launch,
    gluon_compress_table,
    gluon_takes,
    load,
)
from tqcore.quantizer import Quantizer


def can_do(x: torch.Tensor, quantizer: Quantizer) -> bool:
    """Whether a kernel takes tensors of this device and this quantizer."""
    return can_compress(quantizer) and (x.is_cuda or INTERPRETED)


def can_do_by_gluon(x: torch.Tensor, quantizer: Quantizer, center: torch.Tensor | None) -> bool:
    """Whether the Gluon encoder takes such vectors: it reads 16 bytes at a time."""
    if not _can_run_gluon(x.device, "gluon_compress"):
        return False
    x = _in_four_axes(x)
    whole = x.stride(3) == 1 and not any(n % 8 for n in x.stride()[:3]) and x.data_ptr() % 16 == 0
    return whole and gluon_takes(quantizer, x.shape[:3], str(x.dtype).removeprefix("torch."), center is not None)


def compress(x, quantizer, center=None, *, gluon=False):
    """x [..., S, D] -> codes [..., S, P], norms [..., S]."""
    codes = x.new_empty((*x.shape[:-1], quantizer.packed_dim), dtype=torch.uint8)
    norms = x.new_empty(x.shape[:-1], dtype=torch.float32)
    center = None if center is None else _in_four_axes(center.expand(x.shape))
    x = _in_four_axes(x)
    _encode(x, center, None, None, codes.view(*x.shape[:3], -1), norms.view(x.shape[:3]), quantizer, gluon)
    return codes, norms


def append(codes, norms, x, center, starts, page_table, quantizer, *, gluon=False):
    """Writes x [B, K, T, D] into codes [N, K, S, P], contiguous along P, and norms [N, K, S]."""
    center = None if center is None else center.expand(x.shape)
    table = None if page_table is None else page_table.contiguous()
    _encode(x, center, starts.contiguous(), table, codes, norms, quantizer, gluon)


def _in_four_axes(x):
    return x if x.ndim == 4 else x.reshape(1, -1, x.shape[-2], x.shape[-1])


def _encode(x, center, starts, page_table, codes, norms, quantizer, gluon):
    aligned, pages = _aligned(codes), 0 if page_table is None else page_table.shape[1]
    outs = codes.shape[2], codes.shape[0], pages
    if gluon:
        constants, grid, options = gluon_compress_launch(quantizer, x.shape[:3], aligned=aligned)
        load("gluon_compress")[grid](
            x, _gluon_table(quantizer, x.device), starts, page_table, None, None, codes, norms,
            *x.stride()[:3], *codes.stride()[:3], *norms.stride(), x.shape[2], *outs,
            **constants, **options, enable_fp_fusion=False,
        )  # fmt: skip
        return
    x = x if x.stride(3) == 1 else x.contiguous()
    if center is not None and center.stride(3) != 1:
        center = center.contiguous()
    name, constants, grid, num_warps = compress_launch(quantizer, x.shape[:3], encode=True, aligned=aligned, ptx=PTX)
    load(name)[grid](
        x, center, _table(quantizer, x.device), starts, page_table, None, None, codes, norms, x.shape[:3].numel(),
        *x.stride()[:3], *((0, 0, 0) if center is None else center.stride()[:3]), *codes.stride()[:3], *norms.stride(),
        x.shape[1], x.shape[2], *outs,
        **constants, num_warps=num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def decompress(codes, norms, quantizer, dtype, rotated):
    """codes [..., S, P], norms [..., S] -> [..., S, D]."""
    out = norms.new_empty((*norms.shape, quantizer.head_dim), dtype=dtype)
    if codes.ndim != 4:
        codes, norms = codes.reshape(1, -1, *codes.shape[-2:]), norms.reshape(1, -1, norms.shape[-1])
    codes = codes if codes.stride(3) == 1 else codes.contiguous()
    name, constants, grid, num_warps = compress_launch(
        quantizer, norms.shape, encode=False, aligned=_aligned(codes), ptx=PTX
    )
    load(name)[grid](
        codes, norms, _table(quantizer, codes.device), out, norms.numel(),
        *codes.stride()[:3], *norms.stride(), codes.shape[1], codes.shape[2],
        **constants, ROTATED=rotated, num_warps=num_warps, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _aligned(codes):
    return not any(n % 4 for n in (codes.data_ptr(), *codes.stride()[:3]))


@cache
def _table(quantizer, device):
    with torch.inference_mode(False):
        return torch.tensor(compress_table(quantizer), device=device)


@cache
def _gluon_table(quantizer, device):
    with torch.inference_mode(False):
        return torch.tensor(gluon_compress_table(quantizer), device=device)
