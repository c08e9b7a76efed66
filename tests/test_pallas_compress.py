"""The Pallas twin of the encoders and decoders, against the oracle. XLA compiles what is interpreted: small vectors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from backends import assert_same_bits
from test_compress import Case, check, vectors

import tqcore
import tqjax
from tqcore import PackedVectors, Quantizer, kernels
from tqcore.rotation import signs
from tqjax import pallas_compress, triton_compress

CASES = [
    Case(D=16, bits=4),
    Case(D=16, bits=3, norm="plain"),
    Case(D=16, bits=2, dtype="bfloat16", center=True),
    Case(D=8, bits=1, norm="corrected"),
    Case(D=24, bits=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gives_the_oracles_bits(case):
    x, center = vectors(case)
    given = None if center is None else jnp.asarray(center)
    got = tqjax.compress(jnp.asarray(x), case.quantizer, center=given, implementation="pallas_triton")
    check(case, np.asarray(got.codes), np.asarray(got.norms), tqcore.compress(x, case.quantizer, center=center))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_decoders_agree(case, rotated):
    packed = tqcore.compress(vectors(case)[0], case.quantizer)
    expected = tqcore.decompress(packed, rotated=rotated)
    got = tqjax.decompress(packed.map(jnp.asarray), rotated=rotated, implementation="pallas_triton")
    limit = 1e-5 * np.abs(expected).max(-1, keepdims=True, initial=0)
    assert ((np.abs(got - expected) <= limit) | (np.isnan(got) & np.isnan(expected))).all()


def test_another_seed_is_seen():
    case = Case(D=8)
    x, _ = vectors(case)
    codes = tqjax.compress(jnp.asarray(x), case.quantizer, implementation="pallas_triton").codes
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(np.asarray(codes), tqcore.compress(x, Quantizer(8, seed=1)).codes)


def test_appends_and_maps():
    """Under `jit` and `vmap`; XLA writes what the kernel encodes."""
    quantizer, rng = Quantizer(16), np.random.default_rng(0)
    x = rng.standard_normal((2, 1, 3, 5, 16)).astype(np.float32)
    expected = tqcore.compress(x, quantizer)

    def append(codes, norms, x):
        packed = PackedVectors(codes, norms, quantizer)
        return tqjax.append(packed, x, jnp.zeros(1, jnp.int32), implementation="pallas_triton")

    got = jax.jit(jax.vmap(append))(jnp.zeros_like(expected.codes), jnp.zeros_like(expected.norms), x)
    assert_same_bits(np.asarray(got.codes), expected.codes)
    assert_same_bits(np.asarray(got.norms), expected.norms)


def test_says_what_it_cannot_do(monkeypatch):
    needs = (
        "'pallas_triton' needs .*2 GiB and head_dim 8 to 256, got \\[{}\\] float32, {} bytes; 'xla' has no such need"
    )
    with pytest.raises(NotImplementedError, match=needs.format("3, 512", 6144)):
        tqjax.compress(np.ones((3, 512), np.float32), Quantizer(512), implementation="pallas_triton")
    many = jax.ShapeDtypeStruct((2**22 + 1, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match=needs.format("4194305, 128", 2**31 + 512)):
        jax.eval_shape(lambda x: tqjax.compress(x, Quantizer(128), implementation="pallas_triton").codes, many)


def test_none_takes_triton_alone(monkeypatch):
    """What no card has compared with the oracle is taken where it is asked for."""

    def program(**options):
        jax.clear_caches()
        vectors = jax.ShapeDtypeStruct((3, 64), jnp.float32)
        return str(jax.make_jaxpr(lambda x: tqjax.compress(x, Quantizer(64), **options).codes)(vectors))

    assert "tq_triton_compress" in program() and "pallas_call" not in program()
    monkeypatch.setattr(triton_compress, "INSTALLED", False)
    assert "tq_triton_compress" not in program() and "pallas_call" not in program()
    assert "pallas_call" in program(implementation="pallas_triton")
    jax.clear_caches()


def compiled(capability):
    """Resources of the encoder of many vectors."""
    from cubin import compile_ttir, pallas_ttir, resources

    encode = partial(pallas_compress.compress, quantizer=Quantizer(128))
    ((text, num_warps, num_stages),) = pallas_ttir(encode, jax.ShapeDtypeStruct((2**16, 128), jnp.bfloat16))
    return resources(compile_ttir(text, capability, num_warps=num_warps, num_stages=num_stages), capability)


def test_compiles(in_compiling_process, record_property):
    taken = in_compiling_process(compiled, 90)
    record_property("resources", f"pallas_compress  sm_90 : {taken.registers} registers, {taken.spill_bytes} spilled")
    assert taken.spill_bytes == 0 and taken.registers <= 168


def encoder_ptx(quantizer, rows, dtype):
    """PTX of the encoder of many vectors, whatever their number."""
    from cubin import compile_ttir, pallas_ttir

    kernels.FEW_VECTORS = 0  # in a process of its own
    encode = partial(pallas_compress.compress, quantizer=quantizer)
    x = jax.ShapeDtypeStruct((rows, quantizer.head_dim), jnp.dtype(dtype))
    ((text, num_warps, num_stages),) = pallas_ttir(encode, x)
    return compile_ttir(text, 90, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False).asm["ptx"]


@pytest.mark.parametrize(
    "case",
    [Case(D=128, S=8, dtype="bfloat16"), Case(D=64, bits=3), Case(D=64, bits=2, dtype="float16"), Case(D=64, bits=1)],
    ids=str,
)
def test_its_instructions_give_the_oracles_bits(in_compiling_process, case):
    """What no interpreter runs: the assembly, and what Triton makes of the rest."""
    x, _ = vectors(case)
    quantizer, rows = case.quantizer, x[..., 0].size
    text = in_compiling_process(encoder_ptx, quantizer, rows, case.dtype)
    codes, norms = np.full((*x.shape[:3], quantizer.packed_dim), 7, np.uint8), np.full(x.shape[:3], 3, np.float32)
    given = {"x": x.view(f"u{x.itemsize}"), "signs": signs(quantizer), "places": kernels.place_table(quantizer)}
    given |= {"codes": codes, "norms": norms}
    lanes = min(4, case.D // 8)
    ptx.run(text, [*given], given, (-(-rows // (32 // lanes)), 1, 1))
    check(case, codes, norms, tqcore.compress(x, quantizer))
