"""The Pallas twin of the encoders and decoders, against the oracle. XLA compiles what is interpreted: small vectors."""

import jax.numpy as jnp
import numpy as np
import pytest
from backends import CUDA, assert_same_bits
from test_compress import Case, check, vectors

import tqcore
from tqjax import pallas_compress

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
    codes, norms = pallas_compress.compress(jnp.asarray(x), case.quantizer, given, interpret=not CUDA)
    check(case, np.asarray(codes), np.asarray(norms), tqcore.compress(x, case.quantizer, center=center))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_decoders_agree(case, rotated):
    x, center = vectors(case)
    packed = tqcore.compress(x, case.quantizer, center=None if rotated else center)
    expected = tqcore.decompress(packed, rotated=rotated)
    given = None if packed.center is None else jnp.asarray(center)
    arrays = jnp.asarray(packed.codes), jnp.asarray(packed.norms)
    got = pallas_compress.decompress(*arrays, case.quantizer, given, rotated=rotated, interpret=not CUDA)
    limit = 1e-5 * np.abs(expected).max(-1, keepdims=True, initial=0)
    assert ((np.abs(got - expected) <= limit) | (np.isnan(got) & np.isnan(expected))).all()


def test_another_seed_is_seen():
    case = Case(D=8)
    x, _ = vectors(case)
    codes, _ = pallas_compress.compress(jnp.asarray(x), case.quantizer, interpret=not CUDA)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(np.asarray(codes), tqcore.compress(x, tqcore.Quantizer(8, seed=1)).codes)
