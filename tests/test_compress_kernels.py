"""Kernels that compress and decompress: the oracle's bits in the interpreters, flips counted on a GPU, cubins."""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import CUDA, DEVICE, assert_close, assert_same_bits, tolerance
from cases import DTYPES
from cubin import compile_kernel, resources

import tqcore
from tq_torch import compress_ops, triton_compress
from tqcore import Quantizer, tuning
from tqcore.kernels import compress_constants, load
from tqjax import pallas_compress
from tqjax import triton_compress as jax_triton_compress


@dataclass(frozen=True)
class Case:
    """Vectors [B, K, S, D] of a dtype, how they are quantised, and what is odd about them."""

    D: int = 64
    bits: int = 4
    norm: str = "corrected"
    dtype: str = "float32"
    center: tuple[int, ...] | None = None
    rotation: str | None = None
    strided: bool = False
    S: int = 21

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in vars(self).items() if value != getattr(BASE, name)) or "plain"

    @property
    def quantizer(self) -> Quantizer:
        return Quantizer(self.D, self.bits, norm=self.norm, rotation=self.rotation, seed=self.D + self.bits)


BASE = Case()
CASES = [
    *(replace(BASE, bits=bits, norm=norm) for bits in (1, 2, 3, 4) for norm in ("plain", "corrected")),
    *(replace(BASE, D=D, bits=bits) for D, bits in ((8, 4), (8, 3), (8, 1), (16, 2), (128, 4), (128, 3), (256, 4))),
    *(replace(BASE, dtype=dtype, bits=bits) for dtype, bits in (("bfloat16", 4), ("float16", 3))),
    *(replace(BASE, center=center, bits=2) for center in ((1, 64), (3, 1, 64), (2, 1, 21, 64))),
    replace(BASE, dtype="bfloat16", center=(21, 64), strided=True),
    replace(BASE, strided=True, S=1),
]
HAAR = [replace(BASE, D=80, bits=bits, norm=norm) for bits, norm in ((4, "corrected"), (3, "plain"), (1, "corrected"))]
HAAR += [replace(BASE, rotation="haar", center=(1, 64), dtype="float16")]


def name_of(value) -> str:
    return getattr(value, "__name__", str(value))


def vectors(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """x [2, 3, S, D] with rows of every kind, and a center."""
    rng = np.random.default_rng(case.D + case.bits)
    x = rng.standard_normal((2, 3, case.S, case.D)).astype(np.float32)
    center = None if case.center is None else rng.standard_normal(case.center).astype(np.float32)
    rows = x.reshape(-1, case.D)
    rows[0], rows[1, 3], rows[2, -1], rows[3, 0] = 0, np.nan, np.inf, -np.inf
    rows[4], rows[5] = 1, np.arange(case.D) - case.D // 2
    if case.dtype != "float16":
        with np.errstate(under="ignore"):
            rows[5] *= np.float32(2.0**-120)
            if case.S > 1:
                rows[6], rows[7] = rows[6] * np.float32(2.0**100), rows[7] * np.float32(2.0**-90)
                rows[8], rows[9] = rows[8] * np.float32(2.0**-140), -0.0
    return x.astype(DTYPES[case.dtype]), center


def as_torch(x: np.ndarray, case: Case) -> torch.Tensor:
    x = torch.tensor(x.astype(np.float32), device=DEVICE).to(getattr(torch, case.dtype))
    if case.strided:
        wide = torch.full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 8), torch.nan, dtype=x.dtype, device=DEVICE)
        wide[:, :, 2:-1, 8:] = x
        x = wide.transpose(0, 1).contiguous().transpose(0, 1)[:, :, 2:-1, 8:]
    return x


def by_torch(case: Case, x: np.ndarray, center: np.ndarray | None):
    center = None if center is None else torch.tensor(center, device=DEVICE)
    packed = compress_ops.compress(as_torch(x, case), case.quantizer, center=center, implementation="triton")
    return packed.codes.cpu().numpy(), packed.norms.cpu().numpy()


def by_pallas(case: Case, x: np.ndarray, center: np.ndarray | None):
    center = None if center is None else jnp.asarray(center)
    codes, norms = pallas_compress.compress(jnp.asarray(x), case.quantizer, center, interpret=not CUDA)
    return np.asarray(codes), np.asarray(norms)


def by_jax_triton(case: Case, x: np.ndarray, center: np.ndarray | None):
    center = None if center is None else jnp.asarray(center)
    codes, norms = jax_triton_compress.compress(jnp.asarray(x), case.quantizer, center)
    return np.asarray(codes), np.asarray(norms)


ENCODERS = [by_torch, by_pallas]
GPU_ENCODERS = [*ENCODERS, by_jax_triton]
by_name = pytest.mark.parametrize("encoder", ENCODERS, ids=lambda f: f.__name__)


@pytest.fixture(autouse=True)
def deterministic():
    """torch.empty returns NaN inside; Pallas' interpreter starts from it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def oracle(case: Case, x: np.ndarray, center: np.ndarray | None):
    with np.errstate(all="ignore"):
        packed = tqcore.compress(x, case.quantizer, center=center)
    return packed.codes, packed.norms


# XLA takes many seconds to compile what Pallas interprets, hence small vectors.
PALLAS_CASES = [
    *(replace(BASE, D=16, bits=bits, norm=norm) for bits, norm in ((4, "corrected"), (3, "plain"), (1, "corrected"))),
    replace(BASE, D=16, bits=2, dtype="bfloat16", center=(3, 1, 16)),
]
HAAR_CASES = [*((by_torch, case) for case in HAAR), (by_pallas, replace(BASE, D=24, bits=3, center=(1, 24)))]


@pytest.mark.parametrize(
    ("encoder", "case"), [*((by_torch, case) for case in CASES), *((by_pallas, case) for case in PALLAS_CASES)], ids=str
)
def test_bits_of_the_oracle(encoder, case):
    given = vectors(case)
    with np.errstate(all="ignore"):
        got = encoder(case, *given)
    for ours, theirs in zip(got, oracle(case, *given), strict=True):
        if CUDA:  # a device's reciprocals and contractions are its own: flips are counted below
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert np.mean(np.not_equal(ours, theirs) & ~(np.isnan(ours) & np.isnan(theirs))) < 0.01
        else:
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize(("encoder", "case"), HAAR_CASES, ids=name_of)
def test_near_the_oracle_with_a_dense_rotation(encoder, case):
    """A coordinate within rounding of a boundary may fall either way, but for the first rows, whose results are exact."""
    given = vectors(case)
    with np.errstate(all="ignore"):
        codes, norms = encoder(case, *given)
    wanted, wanted_norms = oracle(case, *given)
    assert np.count_nonzero(codes != wanted) <= 2
    finite = np.isfinite(wanted_norms)
    np.testing.assert_array_equal(np.isfinite(norms), finite)
    np.testing.assert_array_max_ulp(norms[finite], wanted_norms[finite], 8)


@by_name
def test_a_wrong_answer_is_seen(encoder, monkeypatch):
    """A boundary one unit in the last place higher sends coordinates that stand on it down."""
    x = np.zeros((1, 1, 1, 8), np.float32)
    x[..., 0] = 1
    case = replace(BASE, D=8, S=1)
    good = oracle(case, x, None)[0]
    table = case.quantizer.codebook
    monkeypatch.setitem(table.__dict__, "boundaries", np.float32(table.boundaries * 1.4))
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(encoder(case, x, None)[0], good)


@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
@pytest.mark.parametrize(
    ("front", "case"),
    [*(("torch", case) for case in (*CASES[1:8:2], CASES[8], CASES[17], HAAR[0])), ("pallas", PALLAS_CASES[3])],
    ids=name_of,
)
def test_decompression(front, case, rotated):
    x, center = vectors(case)
    rows = np.isfinite(x.astype(np.float32)).all(-1)
    with np.errstate(all="ignore"):
        packed = tqcore.compress(x, case.quantizer, center=center)
        center = None if rotated else center
        wanted = tqcore.decompress(replace(packed, center=center), rotated=rotated)
    args = packed.codes, packed.norms
    if front == "torch":
        center = None if center is None else torch.tensor(center, device=DEVICE)
        args = (torch.tensor(array, device=DEVICE) for array in args)
        got = triton_compress.decompress(*args, case.quantizer, center, rotated=rotated).cpu().numpy()
    else:
        center = None if center is None else jnp.asarray(center)
        options = {"rotated": rotated, "interpret": not CUDA}
        got = np.asarray(pallas_compress.decompress(*map(jnp.asarray, args), case.quantizer, center, **options))
    assert np.isnan(got[~rows]).all()
    moderate = rows & (np.abs(wanted).max(-1) < 2.0**60)
    assert_close(got[moderate], wanted[moderate], tolerance("float32", case.D))


@pytest.mark.gpu
@pytest.mark.parametrize("encoder", GPU_ENCODERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("D", "bits"), [(128, 4), (64, 3), (96, 4), (128, 2)])
def test_flips_of_ten_million_coordinates(encoder, D, bits, record_property):
    case = replace(BASE, D=D, bits=bits, dtype="bfloat16", norm="corrected", S=10**7 // D // 6)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, case.S, D), np.float32).astype(DTYPES["bfloat16"])
    codes, norms = encoder(case, x, None)
    wanted, wanted_norms = oracle(case, x, None)
    steps = np.abs(
        tqcore.packing.unpack(codes, np, bits).astype(np.int8) - tqcore.packing.unpack(wanted, np, bits).astype(np.int8)
    )
    assert steps.max() <= 1 and np.count_nonzero(steps) <= 2e-6 * steps.size
    same = ~steps.any(-1)
    np.testing.assert_array_max_ulp(norms[same], wanted_norms[same], 2)


SIGNATURE = {"x_ptr": "*bf16", "rotation_ptr": "*fp32", "center_ptr": "*fp32", "codes_ptr": "*u8", "norms_ptr": "*fp32"}
SIGNATURE |= {"starts_ptr": "*i32", "table_ptr": "*i32", "out_ptr": "*bf16"}


def compiled_resources(name, head_dim, bits, absent, vectors, capability):
    """Resources of a kernel for so many vectors; pointers in `absent` are None."""
    quantizer = Quantizer(head_dim, bits)
    config = tuning.compress_config(vectors, head_dim)
    constants = compress_constants(quantizer, config, config.tiled(vectors)) | {"PTX": True} | dict.fromkeys(absent)
    if name == "compress":
        boundaries = tuple(quantizer.codebook.boundaries[2 ** (bits - 1) :].tolist())
        constants |= {"PAGE": 16, "BOUNDARIES": boundaries, "CORRECTED": quantizer.norm == "corrected"}
    else:
        constants |= {"ROTATED": False}
    kernel = load(name)
    signature = {n: SIGNATURE.get(n, "i32") for n in kernel.arg_names if n not in constants}
    options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    return resources(compile_kernel(kernel, signature, constants, capability, **options), capability)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "head_dim", "bits", "absent", "count"),
    [
        ("compress", 128, 4, ("center_ptr", "starts_ptr", "table_ptr"), 2**20),
        ("compress", 128, 3, (), 512),
        ("compress", 96, 2, ("table_ptr",), 2**20),
        ("decompress", 128, 4, ("center_ptr",), 2**20),
        ("decompress", 80, 3, (), 512),
    ],
)
def test_compiles(in_compiling_process, name, head_dim, bits, absent, count, capability, record_property):
    taken = in_compiling_process(compiled_resources, name, head_dim, bits, absent, count, capability)
    line = f"{name:<14} sm_{capability:<4} D={head_dim:<4} bits={bits} {taken.registers:>3} registers"
    record_property("resources", f"{line}, {taken.spill_bytes} bytes spilled, {taken.shared_bytes:>6} bytes shared")
    assert taken.cubin_bytes > 0 and taken.spill_bytes == 0


def test_what_the_kernels_cannot_do_names_what_can():
    x = torch.zeros(1, 1, 2, 12)
    with pytest.raises(NotImplementedError, match="'eager' has no such need"):
        compress_ops.compress(x, Quantizer(12), implementation="triton")
    with pytest.raises(NotImplementedError, match="'xla' has no such need"):
        import tqjax

        tqjax.compress(jnp.zeros((1, 2, 12)), Quantizer(12), implementation="pallas_triton")
