"""Every operation in plain torch: runs on any device, and says in array terms what the kernels do."""

from functools import cache

import torch

from tqcore import fixed_point
from tqcore import rotation as core_rotation
from tqcore.fixed_point import (
    ABS_MASK,
    INFINITY_BITS,
    MIN_EXPONENT,
    MIN_EXPONENT_BITS,
    QUERY_LIMIT,
    SMALLEST_NORMAL,
    ScoreTable,
    split,
    tree_sum,
)
from tqcore.packing import code_bits, pack, slots, unpack
from tqcore.quantizer import Quantizer


def rotate(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    if quantizer.rotation == "hadamard" and x.device.type == "cpu":
        rotated = core_rotation.hadamard(x.float() * signs(quantizer, x.device), torch)
        return rotated * float(core_rotation.inverse_sqrt(quantizer.head_dim))
    return (x.double() @ matrix(quantizer, x.device).mT).float()


def unrotate(x: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    if quantizer.rotation == "hadamard" and x.device.type == "cpu":
        unsigned = core_rotation.hadamard(x.float(), torch) * float(core_rotation.inverse_sqrt(quantizer.head_dim))
        return unsigned * signs(quantizer, x.device)
    return (x.double() @ matrix(quantizer, x.device)).float()


def compress(
    x: torch.Tensor, quantizer: Quantizer, center: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float() if center is None else x.float() - center
    bits = magnitude_bits(x)
    finite = bits < INFINITY_BITS
    usable = finite & (bits >= MIN_EXPONENT_BITS)
    e = torch.where(usable, exponent(bits, QUERY_LIMIT), 0)
    scaled = torch.where(usable[..., None], x, 0.0) * power_of_two(-e)[..., None]
    squares = tree_sum(scaled * scaled, torch)
    length = squares.double().sqrt().float()  # torch's float32 root is not always the nearest
    rotated, radius = rotate(scaled, quantizer), torch.where(usable, length, 1.0)[..., None]
    indices = torch.zeros(rotated.shape, dtype=torch.uint8, device=x.device)
    for boundary in quantizer.codebook.boundaries.tolist():
        indices += rotated > boundary * radius
    if quantizer.norm == "corrected":
        along = tree_sum(rotated * centroids(quantizer, x.device)[indices.long()], torch)  # ⟨x̃, Rᵀc⟩
        length = squares / torch.where(usable, along, 1.0)
    return pack(indices, torch, quantizer.code_bits), torch.where(finite, length * power_of_two(e), float("nan"))


def append(codes, norms, x, center, starts, page_table, quantizer) -> None:
    """Adds what differs from what is there, modulo 2^8 or 2^32: nothing where x has no place. Waits for no device."""
    new = compress(x, quantizer, center)
    batch, heads, steps = (torch.arange(size, dtype=torch.int32, device=x.device) for size in x.shape[:3])
    row, slot, inside = slots(codes, starts, batch[:, None], steps[None, :], page_table, torch)
    places, inside = (row[:, None, :], heads[:, None], slot[:, None, :]), inside[:, None, :]
    for old, put in ((codes, new[0]), (norms.view(torch.int32), new[1].view(torch.int32))):
        changes = torch.where(inside[..., None] if put.ndim == 4 else inside, put - old[places], 0)
        old.index_put_(places, changes.to(old.dtype), accumulate=True)


def decompress(codes: torch.Tensor, norms: torch.Tensor, quantizer: Quantizer, dtype, rotated) -> torch.Tensor:
    directions = _centroids_at(codes, quantizer)
    return ((directions if rotated else unrotate(directions, quantizer)) * norms[..., None]).to(dtype)


def dequantize(codes: torch.Tensor, norms: torch.Tensor, quantizer: Quantizer) -> torch.Tensor:
    return _centroids_at(codes, quantizer) * norms[..., None]


def fused_qk_scores(q, codes, norms, words, scale):
    """q [B, H, T, D], codes [B, K, S, P], norms [B, K, S], words as in ScoreTable -> [B, H, T, S] float32."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    q = q.float().reshape(batch, kv_heads, heads // kv_heads * length, head_dim)
    planes, step = words[:-1].view(torch.int8).view(-1, ScoreTable.ENTRIES), words[-1:].view(torch.float32)
    bits = magnitude_bits(q)
    e = exponent(bits, QUERY_LIMIT)
    n = torch.round(q * power_of_two(-e)[..., None]).nan_to_num(0.0, 0.0, 0.0).int()
    unit = flush(flush(torch.full_like(step, scale)) * step)
    row = torch.where(bits < INFINITY_BITS, flush(unit * power_of_two(e)), float("nan"))
    column = torch.where(torch.isfinite(norms), flush(norms), float("nan"))
    total = _integer_products(n, planes, _unpack(codes, head_dim))
    scores = flush(total * flush(column[:, :, None, :] * row[..., None]))
    return scores.reshape(batch, heads, length, keys)


def score_gradients(grad, q, codes, norms, centroids, scale):
    """Gradients by q, norms and centroids of the linear map that the scores approximate, in float32.

    grad [B, H, T, S] -> [B, H, T, D] of q's dtype, [B, K, S], [L].
    """
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = codes.shape[1:3]
    rows = (batch, kv_heads, heads // kv_heads * length)
    grad = grad.float().reshape(*rows, keys) * scale
    queries, indices = q.float().reshape(*rows, head_dim), _unpack(codes, head_dim)
    directions = _pad(centroids)[indices]
    of_q = ((grad * norms[:, :, None, :]) @ directions).reshape(q.shape).to(q.dtype)
    of_keys = grad.mT @ queries
    of_norms = (of_keys * directions).sum(-1)
    of_entries = (of_keys * norms[..., None]).flatten()
    last = len(centroids) - 1
    of_centroids = torch.zeros_like(centroids).index_add(0, indices.clamp(max=last).flatten(), of_entries)
    return of_q, of_norms, of_centroids


@cache
def centroids(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    return _constant(quantizer.codebook.centroids, device)


@cache
def signs(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    return _constant(core_rotation.signs(quantizer), device)


@cache
def matrix(quantizer: Quantizer, device: torch.device) -> torch.Tensor:
    """R as float64, in which a device's reduced-precision float32 products cannot touch it."""
    return _constant(core_rotation.matrix(quantizer).astype("float64"), device)


def _constant(array, device):
    with torch.inference_mode(False):  # usable by autograd whoever asks first
        return torch.tensor(array, device=device)


def magnitude_bits(x):
    if x.shape[-1] == 0:
        return torch.zeros(x.shape[:-1], dtype=torch.int32, device=x.device)
    return (x.contiguous().view(torch.int32) & ABS_MASK).amax(-1)


def exponent(bits, limit):
    carry, bias = fixed_point.exponent_bias(limit)
    return (((bits.clamp(max=INFINITY_BITS) + carry) >> 23) - bias).clamp(min=MIN_EXPONENT)


def power_of_two(e):
    return ((e + 127) << 23).view(torch.float32)


def flush(x):
    return torch.where(x.abs() < SMALLEST_NORMAL, torch.copysign(torch.zeros_like(x), x), x)


def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """float32 product by way of float64, which a device's reduced-precision float32 products cannot touch."""
    return (left.double() @ right.double()).float()


def _centroids_at(codes, quantizer):
    """centroids[index] [..., D]."""
    return centroids(quantizer, codes.device)[unpack(codes, torch, quantizer.code_bits).long()]


def _integer_products(n, planes, indices):
    """Σ_d n_d · table[index_d] as float32, [B,K,R,D] × [B,K,S,D] -> [B,K,R,S].

    The float64 products are exact: every partial sum is an integer below 2^53.
    """

    def product(left, right):
        return left.double() @ right.double()[indices].mT

    if len(planes) == 1:
        return product(n, planes[0]).float()
    hi, lo = split(n)
    high = product(hi, planes[0]).float()
    middle = (product(hi, planes[1]) + product(lo, planes[0])).float()
    low = product(lo, planes[1]).float()
    return (high * 128.0 + middle) * 128.0 + low


def _unpack(codes, head_dim):
    """[..., P] bytes -> [..., D] indices that index."""
    return unpack(codes, torch, code_bits(codes.shape[-1], head_dim)).long()


def _pad(table):
    return torch.cat([table, table[-1:].expand(ScoreTable.ENTRIES - len(table))])
