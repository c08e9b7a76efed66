"""Encoders and decoders against the oracle."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import ptx
import pytest
from backends import _TorchPoison, assert_same_bits, to_array, to_numpy
from cases import DTYPES

import tq_torch
import tqcore
from tqcore import Quantizer, kernels
from tqcore.packing import unpack


@dataclass(frozen=True)
class Case:
    """Vectors [2, 3, S, D] and their quantizer."""

    D: int
    bits: int = 4
    S: int = 7
    dtype: str = "float32"
    norm: str | None = None
    rotation: str | None = None
    center: bool = False
    seed: int = 0

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer(self.D, self.bits, norm=self.norm, rotation=self.rotation, seed=self.seed)


CASES = [
    *(Case(D=64, bits=bits, norm=norm) for bits in (1, 2, 3, 4) for norm in ("plain", "corrected")),
    Case(D=8, bits=3, S=1),
    Case(D=8, bits=4, S=40),
    Case(D=128, S=11, dtype="bfloat16"),
    Case(D=128, bits=3, dtype="float16", center=True),
    Case(D=128, bits=2, S=33, dtype="bfloat16", seed=3),
    Case(D=256, bits=4, S=2),
    Case(D=16, bits=4, S=16, center=True),  # programs of one head each
    *(Case(D=80, bits=bits) for bits in (1, 2, 3, 4)),
    Case(D=80, dtype="bfloat16", center=True, norm="plain"),
    Case(D=64, rotation="haar", S=9),
    Case(D=192, bits=3, S=3),
]


def vectors(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """x, among it vectors of every kind, and a center or None."""
    rng = np.random.default_rng(case.D + case.bits)
    x = rng.standard_normal((2, 3, case.S, case.D)).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 12, (2, 3, case.S, 1))).astype(np.float32)
    if case.S > 6 and not case.center:
        x[0, 0, 0], x[0, 0, 1], x[0, 1, 2] = 0, -0.0, 1
        x[0, 2, 0, 3], x[1, 0, 4, 0], x[1, 1, 5, -1] = np.nan, np.inf, -np.inf
        x[1, 2, 3], x[1, 2, 4] = 0, 2.0**-110
        x[1, 2, 3, 1] = 7
    if case.dtype == "float16":
        x = np.clip(x, -(2.0**13), 2.0**13)
    center = rng.standard_normal((3, 1, case.D)).astype(np.float32) if case.center else None
    return x.astype(DTYPES[case.dtype]), center


def ulps(got: np.ndarray, expected: np.ndarray) -> int:
    """The largest distance in floats; any NaN equals any NaN."""
    either = np.isnan(got) & np.isnan(expected)
    bits = [np.where(either, 0, np.ascontiguousarray(x).view(np.int32)).astype(np.int64) for x in (got, expected)]
    return int(np.abs(bits[0] - bits[1]).max(initial=0))


def check(case: Case, codes: np.ndarray, norms: np.ndarray, expected) -> None:
    """The oracle's bits, where sums have its order; else few indices one level off, and norms within 8 ulp."""
    if case.quantizer.rotation == "hadamard":
        assert_same_bits(codes, expected.codes)
        assert_same_bits(norms, expected.norms)
        return
    got, wanted = (unpack(x, np, case.bits).astype(int) for x in (codes, expected.codes))
    assert np.abs(got - wanted).max(initial=0) <= 1 and np.mean(got != wanted) <= 1e-3
    same = (got == wanted).all(-1)
    assert ulps(norms[same], expected.norms[same]) <= 8


def encoded(case, strided=False):
    values, shift = vectors(case)
    x, center = to_array(tq_torch, values), None if shift is None else to_array(tq_torch, shift)
    if strided:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    with _TorchPoison(()), np.errstate(all="ignore"):
        packed = tq_torch.compress(x, case.quantizer, center=center, implementation="triton")
    return to_numpy(packed.codes), to_numpy(packed.norms)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("few", [False, True], ids=["contiguous", "strided, in more lanes"])
def test_encoders_give_the_oracles_bits(monkeypatch, case, few):
    monkeypatch.setattr(kernels, "FEW_VECTORS", kernels.FEW_VECTORS if few else 0)
    x, center = vectors(case)
    check(case, *encoded(case, few), tqcore.compress(x, case.quantizer, center=center))


def test_another_seed_is_seen():
    case = Case(D=64)
    wrong = tqcore.compress(vectors(case)[0], Quantizer(64, seed=1))
    with pytest.raises(AssertionError, match="elements differ"):
        check(case, *encoded(case), wrong)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", [case for case in CASES if not case.center], ids=str)
def test_decoders_agree(monkeypatch, case, rotated):
    monkeypatch.setattr(kernels, "FEW_VECTORS", kernels.FEW_VECTORS if rotated else 0)
    packed = tqcore.compress(vectors(case)[0], case.quantizer)
    expected = tqcore.decompress(packed, rotated=rotated)
    for dtype in ("float32", case.dtype):
        given = packed.map(partial(to_array, tq_torch))
        with _TorchPoison(()), np.errstate(all="ignore"):
            got = tq_torch.decompress(given, dtype=dtype, rotated=rotated, implementation="triton")
        got = to_numpy(got.float())
        size = np.abs(expected).max(-1, keepdims=True, initial=0)
        limit = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 2.0**-7}[
            dtype
        ]  # Triton's interpreter truncates bfloat16
        same = np.isnan(got) & np.isnan(expected)
        assert (same | (np.abs(got - expected) <= limit * size)).all()


# --- compilation ----------------------------------------------------------------------------------------------


POINTERS = {"x_ptr": "*bf16", "codes_ptr": "*u8", "norms_ptr": "*fp32", "table_ptr": "*i32", "out_ptr": "*bf16"}
POINTERS |= {"starts_ptr": "*i32", "pages_ptr": "*i32"}


def make(quantizer, shape, capability=90, *, encode=True, appends=False, x="*bf16", sizes="i32"):
    """One kernel, compiled; the names of its parameters, and its grid for vectors [B, K, T]."""
    from cubin import compile_kernel

    name, constants, grid, num_warps = kernels.compress_launch(quantizer, shape, encode=encode)
    none = "center_ptr", "codes_in_ptr", "norms_in_ptr", *(() if appends else ("starts_ptr", "pages_ptr"))
    constants |= dict.fromkeys(none) | {f"center_stride_{axis}": 0 for axis in "bkt"}
    constants |= {"norms_stride_s": 1, "ROTATED": False}
    kernel = kernels.load(name)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name, sizes) for name in names}
    signature |= {"x_ptr": x} if encode else {}
    signature |= {name: "i32" for name in ("K", "N", "M", "vectors") if name in names}
    options = {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": False}
    return compile_kernel(kernel, signature, constants, capability, **options), names, grid


def compiled(name, head_dim, bits, vectors, capability):
    """Resources of one kernel, which appends to pages where it encodes few vectors."""
    from cubin import resources

    encode, few = not name.endswith("decompress"), not kernels.are_many(vectors)
    shape = 1, 1, vectors
    made, _, _ = make(Quantizer(head_dim, bits), shape, capability, encode=encode, appends=few, sizes="i32:16")
    return resources(made, capability)


@pytest.mark.parametrize(
    ("name", "head_dim", "bits", "vectors", "capability"),
    [*((*case, capability) for capability in (80, 90, 100) for case in (
        ("compress", 128, 4, 2**16), ("compress", 64, 3, 2**16), ("compress", 128, 4, 512),
        ("decompress", 128, 4, 2**16), ("dense_compress", 80, 3, 2), ("dense_decompress", 80, 4, 2))),
     ("compress", 128, 2, 2**16, 90), ("compress", 256, 4, 2**16, 90)],
)  # fmt: skip
def test_compiles(in_compiling_process, name, head_dim, bits, vectors, capability, record_property):
    taken = in_compiling_process(compiled, name, head_dim, bits, vectors, capability)
    record_property(
        "resources",
        f"{name:<16} sm_{capability:<4} D={head_dim:<4} bits={bits} vectors={vectors:<5}: {taken.registers:>3} "
        f"registers, {taken.spill_bytes} bytes spilled, {taken.shared_bytes:>6} bytes shared",
    )
    assert taken.cubin_bytes > 0 and taken.shared_bytes < 99 * 1024
    assert taken.spill_bytes == 0 and (name.startswith("dense") or taken.registers <= 168)


def encoder_ptx(quantizer, shape, x, few):
    """PTX, names of parameters and grid of the encoder."""
    kernels.FEW_VECTORS = kernels.FEW_VECTORS if few else 0  # in a process of its own
    made, names, grid = make(quantizer, shape, x=x)
    return made.asm["ptx"], names, grid


@pytest.mark.parametrize(
    ("case", "few"),
    [(Case(D=128, S=16, dtype="bfloat16"), False), (Case(D=128, S=11, dtype="bfloat16"), True),
     (Case(D=128, bits=2, S=16, dtype="bfloat16"), False), (Case(D=64, bits=3), False), (Case(D=64, bits=1), False)],
    ids=str,
)  # fmt: skip
def test_its_instructions_give_the_oracles_bits(in_compiling_process, case, few):
    """What an interpreter leaves out: the assembly."""
    x, _ = vectors(case)
    shape, quantizer = x.shape[:3], case.quantizer
    half = case.dtype == "bfloat16"
    text, names, grid = in_compiling_process(encoder_ptx, quantizer, shape, "*bf16" if half else "*fp32", few)
    codes, norms = np.full((*shape, quantizer.packed_dim), 7, np.uint8), np.full(shape, 3, np.float32)
    given = {"x_ptr": x.view(np.uint16) if half else x, "table_ptr": kernels.compress_table(quantizer)}
    given |= {"codes_ptr": codes, "norms_ptr": norms, "vectors": norms.size}
    given |= {"N": shape[0], "K": shape[1], "T": shape[2], "S": shape[2], "M": 0}
    given |= ptx.strides("x", x, "bkt") | ptx.strides("codes", codes, "bks") | ptx.strides("norms", norms, "bks")
    ptx.run(text, names, given, grid)
    check(case, codes, norms, tqcore.compress(x, quantizer))
