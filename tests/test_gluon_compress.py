"""The Gluon encoder: its tables, where it is taken, what it compiles to, and on a Hopper device what it returns."""

from functools import partial

import numpy as np
import ptx
import pytest
import torch
from backends import assert_same_bits, to_array, to_numpy
from test_compress import ulps
from test_triton_compress import lowered

import tq_torch
import tqcore
import tqjax
from tqcore import PackedVectors, Quantizer, kernels
from tqcore.packing import unpack

FLIPS_PER_MILLION = 2
NORM_ULPS = {"plain": 0, "corrected": 8}


# --- tables and choices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim", [8, 32, 64, 128, 256, 512])
def test_a_tangent_tells_boundaries_apart(head_dim, bits):
    quantizer = Quantizer(head_dim, bits)
    limit, steepness = kernels.companding(quantizer)
    boundaries, half = quantizer.codebook.boundaries.astype(np.float64), 2 ** (bits - 1)
    y = np.concatenate([boundaries, np.linspace(-1, 1, 4001)])
    named = np.rint(limit * np.tanh(steepness * y)).astype(int)
    assert np.array_equal(named[: len(boundaries)], np.arange(1 - half, half))
    table = kernels.place_table(quantizer)
    above, below = y > table[named % 32] + 1e-7, y < table[named % 32] - 1e-7
    index = named + half - 1 + above
    sure = (above | below) & (np.abs(y[:, None] - boundaries).min(1) > 1e-6)
    assert np.array_equal(index[sure], (y[:, None] > boundaries).sum(1)[sure]) and sure.sum() > 3900


def test_one_bit_has_one_boundary():
    assert kernels.companding(Quantizer(64, 1)) == (0.0, 1.0)
    assert not kernels.place_table(Quantizer(64, 1)).any()


@pytest.mark.parametrize(
    ("takes", "quantizer", "shape", "dtype", "centered"),
    [
        (True, Quantizer(128), (2, 3, 32), "bfloat16", False),
        (True, Quantizer(64, 1, norm="plain", seed=5), (1, 1, 16), "bfloat16", False),
        (True, Quantizer(256, 2), (2, 3, 1), "bfloat16", False),
        (False, Quantizer(32), (2, 3, 32), "bfloat16", False),
        (False, Quantizer(128, rotation="haar"), (2, 3, 32), "bfloat16", False),
        (True, Quantizer(128), (2, 3, 25), "bfloat16", False),
        (False, Quantizer(128), (2, 3, 32), "float16", False),
        (False, Quantizer(128), (2, 3, 32), "bfloat16", True),
        (False, Quantizer(128), (2**16, 3, 32), "bfloat16", False),
    ],
)
def test_what_it_takes(takes, quantizer, shape, dtype, centered):
    assert kernels.gluon_takes(quantizer, shape, dtype, centered) == takes


@pytest.mark.parametrize(
    ("shape", "steps"), [((1, 1, 1), 1), ((2, 3, 9), 1), ((64, 16, 129), 4), ((8, 8, 32768), 8), ((1, 1, 2**24 + 1), 8)]
)
def test_programs_are_enough_for_all_positions(shape, steps):
    constants, grid, _ = kernels.gluon_compress_launch(Quantizer(128), shape)
    assert constants["STEPS"] == steps and grid[1:] == shape[1::-1]
    assert (grid[0] - 1) * 8 * steps < shape[2] <= grid[0] * 8 * steps


@pytest.mark.cpu
@pytest.mark.parametrize("package", [tq_torch, tqjax], ids=lambda package: package.__name__)
def test_needs_a_hopper(package):
    x = to_array(package, np.ones((1, 1, 16, 64), np.float32))
    with pytest.raises(NotImplementedError, match=r"'gluon' needs a Hopper device.*got \[1, 1, 16, 64\].*float32"):
        package.compress(x, Quantizer(64), implementation="gluon")
    with pytest.raises(ValueError, match="must be None or one of"):
        package.decompress(package.compress(x, Quantizer(64)), implementation="gluon")


# --- compilation -------------------------------------------------------------------------------------------------

POINTERS = {"x_ptr": "*bf16", "table_ptr": "*i32", "codes_ptr": "*u8", "norms_ptr": "*fp32"}
POINTERS |= {"starts_ptr": "*i32", "pages_ptr": "*i32", "N": "i32", "M": "i32", "T": "i32"}


STEPS = 4  # of a program here


def compiled(quantizer, paged, aligned):
    """Names of parameters, PTX, and what ptxas says of it."""
    from cubin import compile_kernel, resources

    constants, _, options = kernels.gluon_compress_launch(quantizer, (1, 1, 2**16), aligned=aligned)
    constants["STEPS"] = STEPS
    none = ["codes_in_ptr", "norms_in_ptr", *([] if paged else ["starts_ptr", "pages_ptr"])]
    constants |= dict.fromkeys(none) | {"norms_stride_s": 1}
    kernel = kernels.load("gluon_compress")
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name, "i32:16") for name in names}
    signature |= {name: "i32" for name in names if name.startswith("codes_stride") and quantizer.packed_dim % 16}
    made = compile_kernel(kernel, signature, constants, 90, **options, enable_fp_fusion=False)
    return names, made.asm["ptx"], resources(made, 90)


@pytest.mark.parametrize(
    ("head_dim", "bits", "paged"), [(128, 4, False), (128, 4, True), (64, 3, False), (128, 1, False), (256, 4, False)]
)
def test_compiles(in_compiling_process, head_dim, bits, paged, record_property):
    _, _, taken = in_compiling_process(compiled, Quantizer(head_dim, bits), paged, True)
    record_property(
        "resources",
        f"gluon_compress   sm_90   D={head_dim:<4} bits={bits} pages={paged!s:<5}: {taken.registers:>3} registers, "
        f"{taken.spill_bytes} bytes spilled, {taken.shared_bytes:>6} bytes shared",
    )
    assert taken.spill_bytes == 0 and taken.registers <= (96 if head_dim <= 128 else 144)


def interpreted(in_compiling_process, quantizer, x, packed, starts=None, pages=None, aligned=True):
    """Writes x [B, K, T, D], bfloat16 in float32, into codes and norms of `packed`, instruction by instruction."""
    names, text, _ = in_compiling_process(compiled, quantizer, pages is not None, aligned)
    rows, _, size, _ = packed.codes.shape
    bits = (x.view(np.uint32) >> 16).astype(np.uint16)
    given = {"x_ptr": bits, "table_ptr": kernels.gluon_compress_table(quantizer), "codes_ptr": packed.codes}
    given |= {"norms_ptr": packed.norms, "starts_ptr": starts, "pages_ptr": pages, "S": size, "N": rows}
    given |= {"T": x.shape[2], "M": 0 if pages is None else pages.shape[1]}
    given |= ptx.strides("x", x, "bkt") | ptx.strides("codes", packed.codes, "bks")
    given |= ptx.strides("norms", packed.norms, "bks")
    ptx.run(text, names, given, (-(-x.shape[2] // (8 * STEPS)), x.shape[1], x.shape[0]))


@pytest.mark.parametrize(
    ("head_dim", "bits", "norm", "aligned"),
    [(128, 4, "corrected", True), (128, 4, "plain", False), (128, 3, "corrected", True), (128, 2, "plain", True),
     (128, 1, "corrected", True), (64, 4, "corrected", True), (64, 3, "plain", False), (256, 4, "corrected", True)],
)  # fmt: skip
def test_its_instructions_give_the_oracles_codes(in_compiling_process, head_dim, bits, norm, aligned):
    quantizer, x = Quantizer(head_dim, bits, norm=norm, seed=bits), vectors(43, head_dim)
    packed = PackedVectors(
        np.full((2, 3, 44, quantizer.packed_dim), 7, np.uint8), np.full((2, 3, 44), 3, np.float32), quantizer
    )
    interpreted(in_compiling_process, quantizer, x, packed, aligned=aligned)
    assert (packed.codes[:, :, 43] == 7).all() and (packed.norms[:, :, 43] == 3).all()  # there is no such vector
    check(packed.codes[:, :, :43], packed.norms[:, :, :43], tqcore.compress(x, quantizer), quantizer)


def test_its_instructions_append_to_pages(in_compiling_process):
    quantizer, x = Quantizer(128), vectors(32, 128)[:, :2].copy()
    starts, pages = np.array([5, 40], np.int32), np.array([[4, 0, 7, 2], [8, 3, 1, 5]], np.int32)
    ours, oracle = (
        PackedVectors(np.full((9, 2, 16, 64), 7, np.uint8), np.full((9, 2, 16), 3, np.float32), quantizer)
        for _ in range(2)
    )
    interpreted(in_compiling_process, quantizer, x, ours, starts, pages)
    oracle = tqcore.append(oracle, x, starts, page_table=pages)
    check(ours.codes, ours.norms, oracle, quantizer)
    assert_same_bits(ours.norms == 3, oracle.norms == 3)  # what is past the end is not written


def test_another_sign_is_seen(in_compiling_process):
    quantizer, x = Quantizer(64, 3), vectors(16, 64)
    packed = PackedVectors(np.zeros((2, 3, 16, 24), np.uint8), np.zeros((2, 3, 16), np.float32), quantizer)
    interpreted(in_compiling_process, quantizer, x, packed)
    with pytest.raises(AssertionError):
        check(packed.codes, packed.norms, tqcore.compress(x, Quantizer(64, 3, seed=1)), quantizer)


@pytest.mark.parametrize(("name", "paged"), [("compress", False), ("append", True)])
def test_lowers_to_one_launch(in_compiling_process, name, paged):
    text = in_compiling_process(partial(lowered, implementation="gluon", length=32), name, 128, 4, paged, False)
    assert text.count("__gpu$xla.gpu.ptx") == 1 and 'name = "compress_kernel"' in text
    assert ("output_operand_alias" in text) == (name == "append")


# --- on a device -------------------------------------------------------------------------------------------------


def vectors(length, head_dim, seed=0):
    """[2, 3, length, head_dim] bfloat16, in float32: of every size, with zeros, NaN, infinities and subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, 3, length, head_dim)).astype(np.float32)
    x[1] *= np.exp2(rng.integers(-110, 100, x[1].shape[:-1]))[..., None].astype(np.float32)
    x[0, 0, 0], x[0, 0, 1], x[0, 1, 2] = 0, -0.0, 1
    x[0, 2, 0, 3], x[0, 1, 4, 0], x[1, 1, 5, -1] = np.nan, np.inf, -np.inf
    x[0, 2, 3, 1:], x[0, 2, 4] = 0, 2.0**-130
    return torch.from_numpy(x).bfloat16().float().numpy()


def bfloat16(package, x):
    x = to_array(package, x)
    return x.bfloat16() if package is tq_torch else x.astype("bfloat16")


def check(codes, norms, expected, quantizer):
    got, wanted = (unpack(x, np, quantizer.code_bits).astype(int) for x in (codes, expected.codes))
    steps = np.abs(got - wanted)
    assert steps.max(initial=0) <= 1 and np.count_nonzero(steps) <= 1 + FLIPS_PER_MILLION * steps.size / 1e6
    same = (steps == 0).all(-1)
    assert ulps(norms[same], expected.norms[same]) <= NORM_ULPS[quantizer.norm]


@pytest.mark.gpu
@pytest.mark.parametrize("package", [tq_torch, tqjax], ids=lambda package: package.__name__)
@pytest.mark.parametrize("norm", ["plain", "corrected"])
@pytest.mark.parametrize(("head_dim", "bits"), [(64, 1), (64, 3), (64, 4), (128, 2), (128, 3), (128, 4), (256, 4)])
def test_codes_and_norms(package, norm, head_dim, bits):
    quantizer = Quantizer(head_dim, bits, norm=norm, seed=bits)
    x = vectors(1021, head_dim)
    packed = package.compress(bfloat16(package, x), quantizer, implementation="gluon")
    check(to_numpy(packed.codes), to_numpy(packed.norms), tqcore.compress(x, quantizer), quantizer)


@pytest.mark.gpu
def test_both_frameworks_return_the_same_bits():
    quantizer, x = Quantizer(128), vectors(4096, 128, seed=1)
    ours = tq_torch.compress(bfloat16(tq_torch, x), quantizer, implementation="gluon")
    theirs = tqjax.compress(bfloat16(tqjax, x), quantizer, implementation="gluon")
    assert_same_bits(to_numpy(ours.codes), to_numpy(theirs.codes))
    assert_same_bits(to_numpy(ours.norms), to_numpy(theirs.norms))


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
def test_appends_to_strided_and_paged_caches(paged):
    quantizer = Quantizer(128)
    x = torch.from_numpy(vectors(32, 128)[:, :2]).cuda().bfloat16()
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    rows, size = (9, 16) if paged else (2, 64)
    starts = torch.tensor([5, 40], dtype=torch.int32, device="cuda")  # the second one runs past the end
    table = torch.tensor([[4, 0, 7, 2], [8, 3, 1, 5]], dtype=torch.int32, device="cuda") if paged else None
    caches = []
    for implementation in ("gluon", "triton"):
        codes = torch.full((rows, 2, size, 64), 7, dtype=torch.uint8, device="cuda")
        packed = PackedVectors(codes, torch.full((rows, 2, size), 3.0, device="cuda"), quantizer)
        caches.append(tq_torch.append(packed, x, starts, page_table=table, implementation=implementation))
    gluon, triton = caches
    check(to_numpy(gluon.codes), to_numpy(gluon.norms), triton.map(to_numpy), quantizer)


@pytest.mark.gpu
def test_it_is_taken_for_many_vectors_alone(monkeypatch):
    from tq_torch import triton_compress

    seen, encode = [], triton_compress._encode
    monkeypatch.setattr(triton_compress, "_encode", lambda *arguments: seen.append(arguments[-1]) or encode(*arguments))
    for length, dtype in ((4096, "bfloat16"), (16, "bfloat16"), (4096, "float32"), (4095, "bfloat16")):
        tq_torch.compress(torch.ones(1, 4, length, 128, dtype=getattr(torch, dtype), device="cuda"), Quantizer(128))
    shifted = torch.ones(4 * 4096 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(1, 4, 4096, 128)
    tq_torch.compress(shifted, Quantizer(128))
    assert seen == [True, False, False, True, False]
