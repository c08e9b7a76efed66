"""The public operations that encode and decode: check, choose the implementation, call it through `torch.library`."""

import torch

from tq_torch import eager, ops
from tqcore import checks
from tqcore.packing import packed_dim
from tqcore.quantizer import PackedVectors, Quantizer

IMPLEMENTATIONS = ("eager",)


def compress(
    x: torch.Tensor, quantizer: Quantizer, *, center: torch.Tensor | None = None, implementation: str | None = None
) -> PackedVectors:
    """Quantises vectors, less their center: norm = ‖x‖, index_d = number of boundaries b with b·‖x‖ < (R x)_d.

    A coordinate on a boundary takes the lower index. A vector whose largest magnitude is below 2^-100
    counts as zero: norm 0, codes of +0. A vector with NaN or infinity gets a NaN norm and the codes of +0.
    Codes and norms do not carry gradients.

    Args:
      x: [..., S, D] float32, bfloat16 or float16.
      quantizer: the rotation, the codebook, the kind of norm, and whether signs of the residual are kept too.
      center: [..., 1 or S, D] float32, broadcast to x and subtracted in float32 first, such as `key_center` or
        `rotary_center`; None subtracts nothing. It is kept as given, and `decompress` adds it back.
      implementation: "eager" or None: eager, on any device with float64.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_vectors(x, quantizer, center)
    x = x.detach()
    if center is not None:
        checks.check_devices({"x": x.device, "center": center.device})
        x = x.float() - center.detach()
    codes, norms = torch.ops.tq_torch.compress(x, *ops.fields_of(quantizer), implementation)
    residual = None
    if quantizer.residual is not None:
        rest = x.float() - _decode(PackedVectors(codes, norms, quantizer), False, implementation)
        signs, lengths = torch.ops.tq_torch.compress(rest, *ops.fields_of(quantizer.residual), implementation)
        residual = PackedVectors(signs, lengths, quantizer.residual)
    return PackedVectors(codes, norms, quantizer, center, residual)


def decompress(
    packed: PackedVectors, *, dtype="float32", rotated: bool = False, implementation: str | None = None
) -> torch.Tensor:
    """x̂ = norm · Rᵀ centroids[index], plus the residual's x̂ and the center where there are any.

    Args:
      packed: codes [..., S, P], norms [..., S], center [..., 1 or S, D] or None, residual or None.
      dtype: float32, bfloat16 or float16.
      rotated: whether R x̂ is returned instead, which leaves out rotating back.
      implementation: "eager" or None: eager, on any device with float64.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_packed("packed", packed)
    checks.check_dtype(dtype)
    checks.check_flag("rotated", rotated)
    quantizer, parts = packed.quantizer, []
    if packed.residual is not None:
        parts.append(_decode(packed.residual, False, implementation))
    if packed.center is not None:
        parts.append(packed.center)
    vectors = _decode(packed, rotated, implementation)
    for part in parts:
        vectors = vectors + (ops.rotate(part, quantizer) if rotated else part)
    return vectors.to(getattr(torch, checks.dtype_name(dtype)))


def append(
    packed: PackedVectors,
    x: torch.Tensor,
    starts: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    implementation: str | None = None,
) -> PackedVectors:
    """Compresses vectors into a cache: what `compress` makes of x[b,:,t] goes to position starts[b] + t of sequence b.

    A position outside 0 to S - 1, or in a page outside the pool, is not written: a start of -T leaves a sequence alone.
    Of two vectors that go to one place, as where sequences share a page, either stays.
    Works under `torch.compile` and CUDA graphs: nothing waits for the device. Carries no gradients.

    Args:
      packed: PackedVectors [B, K, S, D] without a residual, S the capacity, such as slices of larger
        tensors; a center has an S axis of 1.
      x: [B, K, T, D] float32, bfloat16 or float16, of any strides.
      starts: [B] int32, any values.
      page_table: [B, M] int32. `packed` is then a pool [N, K, page, D] whose center is the same for all pages, and
        position s of sequence b is in page page_table[b, s // page]; S is M · page.
      implementation: "eager" or None: eager, on any device with float64.

    Returns:
      `packed`, whose codes and norms are written in place.

    Raises:
      ValueError: an argument does not fit; starts and page numbers out of range are no error.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_append(packed, x, starts, page_table)
    center = None if packed.center is None else packed.center.detach()
    arrays = {"packed.codes": packed.codes, "packed.norms": packed.norms, "packed.center": center, "x": x}
    arrays |= {"starts": starts, "page_table": page_table}
    checks.check_devices({name: tensor.device for name, tensor in arrays.items() if tensor is not None})
    fields = ops.fields_of(packed.quantizer)
    torch.ops.tq_torch.append(
        packed.codes, packed.norms, x.detach(), center, starts, page_table, *fields, implementation
    )
    return packed


def dequantize(packed):
    """norm · centroids[index] [..., S, D], not rotated back."""
    return _decode(packed, True, "eager")


def _decode(packed, rotated, implementation):
    """norm · Rᵀ centroids[index], or without Rᵀ."""
    fields = ops.fields_of(packed.quantizer)
    return torch.ops.tq_torch.decompress(packed.codes, packed.norms, *fields, rotated, implementation)


# --- the operations as torch sees them: each calls one implementation ------------------------------------------------

ops.LIBRARY.define(f"compress(Tensor x, {ops.QUANTIZER}, str? implementation) -> (Tensor, Tensor)")
ops.LIBRARY.define(
    f"decompress(Tensor codes, Tensor norms, {ops.QUANTIZER}, bool rotated, str? implementation) -> Tensor"
)
ops.LIBRARY.define(
    "append(Tensor(a!) codes, Tensor(b!) norms, Tensor x, Tensor? center, Tensor starts, Tensor? page_table, "
    f"{ops.QUANTIZER}, str? implementation) -> ()"
)


def _compress(x, *fields_and_implementation):
    *fields, _ = fields_and_implementation
    return eager.compress(x, ops.quantizer_of(*fields))


def _decompress(codes, norms, *fields_and_choices):
    *fields, rotated, _ = fields_and_choices
    decode = eager.dequantize if rotated else eager.decompress
    return decode(codes, norms, ops.quantizer_of(*fields))


def _append(codes, norms, x, center, starts, page_table, *fields_and_implementation):
    *fields, _ = fields_and_implementation
    if 0 not in (*codes.shape, *x.shape):
        eager.append(codes, norms, x, center, starts, page_table, ops.quantizer_of(*fields))


for _name, _function in (("compress", _compress), ("decompress", _decompress), ("append", _append)):
    ops.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::compress", lib=ops.LIBRARY)
def _(x, head_dim, bits, *_):
    codes = x.new_empty((*x.shape[:-1], packed_dim(head_dim, bits)), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tq_torch::decompress", lib=ops.LIBRARY)
def _(codes, norms, head_dim, *_):
    return norms.new_empty((*norms.shape, head_dim))


@torch.library.register_fake("tq_torch::append", lib=ops.LIBRARY)
def _(*_):
    return None
