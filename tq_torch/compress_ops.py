"""The public operations that write and read packed vectors: check, choose the implementation, call it."""

from collections.abc import Callable
from functools import partial

import torch

from tq_torch import eager
from tq_torch.ops import QUANTIZER, _fields, _quantizer, check_devices, rotate
from tqcore import checks, kernels
from tqcore.packing import packed_dim
from tqcore.quantizer import PackedVectors, Quantizer

try:
    from tq_torch import triton_compress
except ImportError:  # a torch without Triton
    triton_compress = None

IMPLEMENTATIONS = ("eager", "triton")
ENCODERS = (*IMPLEMENTATIONS, "gluon")
NEEDS = {
    "triton": "'triton' needs Triton, head_dim 8 to 256, bytes of codes side by side, and CUDA tensors or "
    "TRITON_INTERPRET=1 in the environment",
    "gluon": "'gluon' needs a Hopper device, Triton with Gluon, bfloat16 of head_dim 64, 128 or 256, a Hadamard "
    "rotation, no center, vectors aligned to 16 bytes and bytes of codes side by side",
}


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
      implementation: "eager" (any device with float64), "triton" (CUDA, head_dim 8 to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), "gluon" (Hopper, bfloat16 of head_dim 64, 128 or 256 with a Hadamard
        rotation and without a center), or None: on CUDA the first of gluon (for many vectors) and triton that can do
        the case, else eager.

    Returns:
      PackedVectors: codes [..., S, P] uint8, norms [..., S] float32, center, and the residual or None.

    Raises:
      ValueError: x has another dtype or rank, its last axis is not `quantizer.head_dim`, or center does not fit it.

    Source: Zandieh et al., TurboQuant, arXiv:2504.19874, algorithm 1.
    """
    checks.check_implementation(implementation, ENCODERS)
    checks.check_vectors(x, quantizer, center)
    check_devices(x=x, center=center)
    x, fixed = x.detach(), None if center is None else center.detach()
    codes, norms = torch.ops.tq_torch.compress(x, fixed, *_fields(quantizer), implementation)
    residual = None
    if quantizer.residual is not None:
        x = x.float() if fixed is None else x.float() - fixed
        of_rest = None if implementation == "gluon" else implementation
        rest = x - torch.ops.tq_torch.decompress(codes, norms, *_fields(quantizer), "float32", False, of_rest)
        signs, lengths = torch.ops.tq_torch.compress(rest, None, *_fields(quantizer.residual), of_rest)
        residual = PackedVectors(signs, lengths, quantizer.residual)
    return PackedVectors(codes, norms, quantizer, center, residual)


def append(
    packed: PackedVectors,
    x: torch.Tensor,
    starts: torch.Tensor,
    *,
    page_table: torch.Tensor | None = None,
    implementation: str | None = None,
) -> PackedVectors:
    """Compresses vectors into their places of a cache: x[b, :, t] goes to position starts[b] + t of sequence b.

    Codes and norms are those of `compress(x, packed.quantizer, center=packed.center)`. A position outside 0 to S - 1
    is not written, nor is one on a page that does not exist: a start of -T or less leaves its sequence alone.
    Works under `torch.compile`, `torch.export` and CUDA graphs: nothing waits for the device. Carries no gradients.

    Args:
      packed: PackedVectors [B, K, S, D], S the capacity, or a pool [N, K, page, D]. A center has an S axis of 1, in a
        pool a first axis of 1 too, and is subtracted from x. No residual.
      x: [B, K, T, D] float32, bfloat16 or float16.
      starts: [B] int32.
      page_table: [B, M] int32. Position s of sequence b is then in page page_table[b, s // page]; S is M · page. No two
        sequences may write to one place.
      implementation: "eager" (any device with float64), "triton" (CUDA, head_dim 8 to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), "gluon" (Hopper, bfloat16 of head_dim 64, 128 or 256 with a Hadamard
        rotation and without a center), or None: on CUDA the first of gluon (for many vectors) and triton that can do
        the case, else eager.

    Returns:
      PackedVectors: `packed`, whose tensors were written to.

    Raises:
      ValueError: an argument does not fit.
    """
    checks.check_implementation(implementation, ENCODERS)
    checks.check_append(packed, x, starts, page_table)
    center = None if packed.center is None else packed.center.detach()
    tensors = {"codes": packed.codes, "norms": packed.norms, "x": x.detach(), "center": center, "starts": starts}
    check_devices(**tensors, page_table=page_table)
    torch.ops.tq_torch.append(*tensors.values(), page_table, *_fields(packed.quantizer), implementation)
    return packed


def decompress(
    packed: PackedVectors, *, dtype="float32", rotated: bool = False, implementation: str | None = None
) -> torch.Tensor:
    """x̂ = norm · Rᵀ centroids[index], plus the residual's x̂ and the center where there are any.

    Args:
      packed: codes [..., S, P], norms [..., S], center [..., 1 or S, D] or None, residual or None.
      dtype: float32, bfloat16 or float16.
      rotated: leaves R x̂, all of it, in place of x̂.
      implementation: "eager" (any device with float64), "triton" (CUDA, head_dim 8 to 256; on a CPU Triton's
        interpreter, under TRITON_INTERPRET=1), or None: triton where it can on CUDA, else eager.

    Returns:
      [..., S, D] of `dtype`.

    Raises:
      ValueError: codes and norms do not match the quantizer, or another dtype is asked for.
    """
    checks.check_implementation(implementation, IMPLEMENTATIONS)
    checks.check_decompress(packed, dtype, rotated)
    quantizer, residual, center = packed.quantizer, packed.residual, packed.center
    name = checks.dtype_name(dtype)
    alone = residual is None and center is None
    vectors = torch.ops.tq_torch.decompress(
        packed.codes, packed.norms, *_fields(quantizer), name if alone else "float32", rotated, implementation
    )
    if residual is not None:
        rest = decompress(residual, implementation=implementation)
        vectors = vectors + (rotate(rest, quantizer) if rotated else rest)
    if center is not None:
        vectors = vectors + (rotate(center, quantizer) if rotated else center)
    return vectors.to(getattr(torch, name))


# --- the operations as torch sees them: tensors and plain values, so that it can compile and export them --------------

_library = torch.library.Library("tq_torch", "FRAGMENT")
_library.define(f"compress(Tensor x, Tensor? center, {QUANTIZER}, str? implementation) -> (Tensor, Tensor)")
_library.define(
    "append(Tensor(a!) codes, Tensor(b!) norms, Tensor x, Tensor? center, Tensor starts, Tensor? page_table, "
    f"{QUANTIZER}, str? implementation) -> ()"
)
_library.define(
    f"decompress(Tensor codes, Tensor norms, {QUANTIZER}, str dtype, bool rotated, str? implementation) -> Tensor"
)


def _compress(x, center, *fields_and_implementation):
    *of_quantizer, implementation = fields_and_implementation
    quantizer = _quantizer(*of_quantizer)
    return _chosen("compress", implementation, x, quantizer, center)(x, quantizer, center)


def _append(codes, norms, x, center, starts, page_table, *fields_and_implementation):
    *of_quantizer, implementation = fields_and_implementation
    quantizer = _quantizer(*of_quantizer)
    if 0 not in (*x.shape, *codes.shape):
        append = _chosen("append", implementation, x, quantizer, center, codes)
        append(codes, norms, x, center, starts, page_table, quantizer)


def _decompress(codes, norms, *fields_and_options):
    *of_quantizer, dtype, rotated, implementation = fields_and_options
    quantizer, dtype = _quantizer(*of_quantizer), getattr(torch, dtype)
    return _chosen("decompress", implementation, codes, quantizer)(codes, norms, quantizer, dtype, rotated)


def _chosen(operation, implementation, tensor, quantizer, center=None, written=None) -> Callable:
    """What runs an operation; `written` are codes that are written in place."""
    if implementation == "eager" or 0 in tensor.shape or (implementation is None and not tensor.is_cuda):
        return getattr(eager, operation)
    many = implementation is None and kernels.are_many(tensor.shape[:-1].numel()) and kernels.gluon_is_tested()
    for name in (implementation,) if implementation else ("gluon", "triton") if many else ("triton",):
        if _can_do(name, operation, tensor, quantizer, center, written):
            return partial(getattr(triton_compress, operation), **{"gluon": True} if name == "gluon" else {})
    if implementation is None:
        return getattr(eager, operation)
    raise NotImplementedError(
        f"{NEEDS[implementation]}, got {list(tensor.shape)} {tensor.dtype}, head_dim={quantizer.head_dim} on "
        f"{tensor.device}; 'eager' has no such need."
    )


def _can_do(name, operation, tensor, quantizer, center, written):
    if triton_compress is None or (written is not None and written.stride(3) != 1):
        return False
    if name == "gluon":
        return operation != "decompress" and triton_compress.can_do_by_gluon(tensor, quantizer, center)
    return triton_compress.can_do(tensor, quantizer)


for _name, _function in (("compress", _compress), ("append", _append), ("decompress", _decompress)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("tq_torch::compress", lib=_library)
def _(x, center, head_dim, bits, *_):
    codes = x.new_empty((*x.shape[:-1], packed_dim(head_dim, bits)), dtype=torch.uint8)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tq_torch::append", lib=_library)
def _(*_):
    return None


@torch.library.register_fake("tq_torch::decompress", lib=_library)
def _(codes, norms, head_dim, bits, rotation, seed, norm, dtype, *_):
    return norms.new_empty((*norms.shape, head_dim), dtype=getattr(torch, dtype))
