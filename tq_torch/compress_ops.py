"""The public operations that encode and decode: check, choose the implementation, call it through `torch.library`."""

import torch

from tq_torch import eager, ops
from tqcore import checks
from tqcore.packing import packed_dim
from tqcore.quantizer import PackedVectors, Quantizer

try:
    from tq_torch import triton_compress
except ImportError:  # a torch without Triton
    triton_compress = None

IMPLEMENTATIONS = ("eager", "triton")
NEEDS = (
    "'triton' needs Triton, a head_dim that is a multiple of 8 and up to 256, codes whose addresses and strides are "
    "multiples of a vector's words, and CUDA tensors, or TRITON_INTERPRET=1 in the environment"
)


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
      implementation: "eager" (any device with float64), "triton" (CUDA, D a multiple of 8 up to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), or None: triton on CUDA where it can do the case, else eager.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.
      NotImplementedError: the implementation asked for cannot do this case.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_vectors(x, quantizer, center)
    x, origin = x.detach(), None if center is None else center.detach()
    if origin is not None:
        checks.check_devices({"x": x.device, "center": origin.device})
    codes, norms = torch.ops.tq_torch.compress(x, origin, *ops.fields_of(quantizer), implementation)
    residual = None
    if quantizer.residual is not None:
        rest = x.float() if origin is None else x.float() - origin
        rest = rest - _decode(PackedVectors(codes, norms, quantizer), implementation)
        signs, lengths = torch.ops.tq_torch.compress(rest, None, *ops.fields_of(quantizer.residual), implementation)
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
      implementation: "eager" (any device with float64), "triton" (CUDA, D a multiple of 8 up to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), or None: triton on CUDA where it can do the case, else eager.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
      NotImplementedError: the implementation asked for cannot do this case.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_packed("packed", packed)
    checks.check_dtype(dtype)
    checks.check_flag("rotated", rotated)
    dtype = checks.dtype_name(dtype)
    if packed.residual is None and (packed.center is None or not rotated):
        return _decode(packed, implementation, center=packed.center, dtype=dtype, rotated=rotated)
    vectors = _decode(packed, implementation, rotated=rotated)
    for part in (packed.residual, packed.center):
        if part is not None:
            part = _decode(part, implementation) if isinstance(part, PackedVectors) else part
            vectors = vectors + (ops.rotate(part, packed.quantizer) if rotated else part)
    return vectors.to(getattr(torch, dtype))


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
      implementation: "eager" (any device with float64), "triton" (CUDA, D a multiple of 8 up to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), or None: triton on CUDA where it can do the case, else eager.

    Returns:
      `packed`, whose codes and norms are written in place.

    Raises:
      ValueError: an argument does not fit; starts and page numbers out of range are no error.
      NotImplementedError: the implementation asked for cannot do this case.
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
    return _decode(packed, "eager", rotated=True)


def _decode(packed, implementation, *, center=None, dtype="float32", rotated=False):
    """norm · Rᵀ centroids[index] + center, or norm · centroids[index]."""
    fields = ops.fields_of(packed.quantizer)
    return torch.ops.tq_torch.decompress(packed.codes, packed.norms, center, *fields, dtype, rotated, implementation)


# --- the operations as torch sees them: each calls one implementation ------------------------------------------------

ops.LIBRARY.define(
    f"compress(Tensor x, Tensor? center, {ops.QUANTIZER}, str? implementation) -> (Tensor, Tensor)"
)
ops.LIBRARY.define(
    f"decompress(Tensor codes, Tensor norms, Tensor? center, {ops.QUANTIZER}, str dtype, bool rotated, "
    "str? implementation) -> Tensor"
)
ops.LIBRARY.define(
    "append(Tensor(a!) codes, Tensor(b!) norms, Tensor x, Tensor? center, Tensor starts, Tensor? page_table, "
    f"{ops.QUANTIZER}, str? implementation) -> ()"
)


def _compress(x, center, *fields_and_implementation):
    *fields, implementation = fields_and_implementation
    quantizer = ops.quantizer_of(*fields)
    if _takes_kernel(x, quantizer, implementation):
        return triton_compress.compress(x, quantizer, center)
    return eager.compress(x if center is None else x.float() - center, quantizer)


def _decompress(codes, norms, center, *fields_and_choices):
    *fields, dtype, rotated, implementation = fields_and_choices
    quantizer, dtype = ops.quantizer_of(*fields), getattr(torch, dtype)
    if _takes_kernel(codes, quantizer, implementation):
        return triton_compress.decompress(codes, norms, quantizer, center, dtype=dtype, rotated=rotated)
    vectors = (eager.dequantize if rotated else eager.decompress)(codes, norms, quantizer)
    return (vectors if center is None else vectors + center).to(dtype)


def _append(codes, norms, x, center, starts, page_table, *fields_and_implementation):
    *fields, implementation = fields_and_implementation
    quantizer = ops.quantizer_of(*fields)
    if 0 in (*codes.shape, *x.shape):
        return
    if _takes_kernel(x, quantizer, implementation, codes):
        triton_compress.append(codes, norms, x, starts, quantizer, center, page_table)
    else:
        eager.append(codes, norms, x, center, starts, page_table, quantizer)


def _takes_kernel(x, quantizer, implementation, codes=None):
    """Whether the kernel does a case; `codes` are what it writes to, if that is not its own."""
    if implementation == "eager" or (implementation is None and not x.is_cuda):
        return False
    can = triton_compress is not None and triton_compress.can_do(x, quantizer)
    can = can and (codes is None or triton_compress.can_write(codes, quantizer))
    if not can and implementation is not None:
        raise NotImplementedError(
            f"{NEEDS}, got head_dim={quantizer.head_dim} on {x.device}; 'eager' has no such need."
        )
    return can


for _name, _function in (("compress", _compress), ("decompress", _decompress), ("append", _append)):
    ops.LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::compress", lib=ops.LIBRARY)
def _(x, center, head_dim, bits, *_):
    codes = x.new_empty((*x.shape[:-1], packed_dim(head_dim, bits)), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tq_torch::decompress", lib=ops.LIBRARY)
def _(codes, norms, center, head_dim, bits, rotation, seed, norm, dtype, *_):
    return norms.new_empty((*norms.shape, head_dim), dtype=getattr(torch, dtype))


@torch.library.register_fake("tq_torch::append", lib=ops.LIBRARY)
def _(*_):
    return None
