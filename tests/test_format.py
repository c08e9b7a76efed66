"""Exact: the bytes of format version 2, as docs/format.md gives them."""

import hashlib
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from backends import PACKAGES, assert_same_bits, cpu_array, to_array, to_numpy

import tq_torch
import tqcore
import tqjax
from tqcore import fixed_point, packing, rotation
from tqcore.quantizer import PackedVectors, Quantizer

# Vectors that anyone can write down: x[i, j] = ((37·(128·i + j)) mod 101 - 50) / 16.
GOLDEN_X = (((np.arange(3 * 128).reshape(3, 128) * 37) % 101) - 50).astype(np.float32) / 16
GOLDEN_CODES = (
    "9e5269c78a5d44bd47b358629c678ab85555c85b88b1f6b769b4db78f8763c49"
    "db8c3988cc556d66a9c91ca96898b95db79c488bc386c8b803952c238d7c54c5"
)
GOLDEN_NORMS = {  # bits of float32
    "plain": [1101336799, 1101354601, 1101330792],
    "corrected": [1101436827, 1101502601, 1101461997],
}
GOLDEN_SIGNS = {0: "5115e2b0b89e9f5c1cd4d27246924df2", 1: "bb93e49446eb848d176e0a6110d71084"}
GOLDEN_SHA = {1: "b327350f11211847", 2: "53ab1fcfbdbb6318", 3: "b599b70c1a41bb20", 4: "9731d8e08201cc60"}
GOLDEN_PACKED = {1: "55", 2: "1b1b", 3: "1b1b33", 4: "01234567"}  # of the indices 0, 1, ..., 7, their low bits
GOLDEN_SCORES = [1108681584, 1097065472, -1075309581]  # of query GOLDEN_X[0] against the three keys
GOLDEN_HAAR = [
    [-0.1798556, 0.6528863, 0.10558615, -0.61805755, 0.3165511, -0.21918789],
    [-0.46875703, -0.23153086, -0.43046853, -0.066215, -0.25116476, -0.6883959],
]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_golden_codes_and_norms(package):
    x = cpu_array(package, GOLDEN_X)
    for norm, golden in GOLDEN_NORMS.items():
        packed = package.compress(x, Quantizer(128, norm=norm)).map(to_numpy)
        assert packed.codes[0].tobytes().hex() == GOLDEN_CODES
        assert packed.norms.view(np.int32).tolist() == golden
    for bits, digest in GOLDEN_SHA.items():
        codes = to_numpy(package.compress(x, Quantizer(128, bits)).codes)
        assert hashlib.sha256(codes.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("bits", GOLDEN_PACKED)
def test_golden_packing(package, bits):
    xp = {tqcore: np, tqjax: jnp, tq_torch: torch}[package]
    indices = np.arange(8, dtype=np.uint8) % 2**bits
    codes = packing.pack(cpu_array(package, indices[None]), xp, bits)
    assert to_numpy(codes).tobytes().hex() == GOLDEN_PACKED[bits]
    assert_same_bits(to_numpy(packing.unpack(codes, xp, bits))[0], indices)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_golden_scores(package):
    quantizer = Quantizer(128, norm="plain")
    packed = tqcore.compress(GOLDEN_X[None, None], quantizer).map(lambda x: to_array(package, x))
    centroids = to_array(package, Quantizer(128).codebook.centroids)
    query = to_array(package, tqcore.rotate(GOLDEN_X[None, None, :1], Quantizer(128)))
    scores = package.fused_qk_scores(query, packed.codes, packed.norms, centroids, 128**-0.5, n_q_heads=1, n_kv_heads=1)
    assert to_numpy(scores).view(np.int32).ravel().tolist() == GOLDEN_SCORES


def test_golden_rotations():
    for seed, bits in GOLDEN_SIGNS.items():
        signs = rotation.signs(Quantizer(128, seed=seed))
        assert np.packbits(signs < 0, bitorder="little").tobytes().hex() == bits
    np.testing.assert_allclose(rotation.matrix(Quantizer(6))[:2], GOLDEN_HAAR, atol=1e-6)


def test_golden_table_words():
    dyadic = fixed_point.score_table(Quantizer(128).codebook.centroids)
    levels = np.array([-122, -93, -73, -57, -43, -30, -18, -6, 6, 18, 30, 43, 57, 73, 93, 122], np.int8)
    assert dyadic.words.tobytes() == levels.tobytes() + struct.pack("<f", 2.0**-9)
    free = fixed_point.score_table(np.array([-1.0, 0.3], np.float32))
    assert free.step == 2.0**-13 and free.planes[:, 0].tolist() == [-64, 0]
    assert free.planes[:, 1:].tolist() == [[19] * 15, [26] * 15]  # rint(0.3·2^13) = 2458 = 128·19 + 26


def test_file_is_safetensors_with_the_quantizer_in_its_metadata(tmp_path):
    packed = tqcore.compress(GOLDEN_X, Quantizer(128, 3, seed=5))
    tqcore.save_file(packed, tmp_path / "keys.safetensors")
    raw = (tmp_path / "keys.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    assert header["__metadata__"]["format"] == "turboquant" and header["__metadata__"]["version"] == "2"
    assert json.loads(header["__metadata__"]["quantizers"]) == {
        "": {"head_dim": 128, "bits": 3, "rotation": "hadamard", "seed": 5, "norm": "corrected", "qjl": False}
    }
    for name, array in (("codes", packed.codes), ("norms", packed.norms)):
        start, stop = header[name]["data_offsets"]
        assert data[start:stop] == array.tobytes() and header[name]["shape"] == list(array.shape)


@pytest.mark.parametrize("writer", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("reader", PACKAGES, ids=lambda package: package.__name__)
def test_file_written_by_any_is_read_by_any(writer, reader, tmp_path):
    packed = tqcore.compress(GOLDEN_X, Quantizer(128))
    named = {"layer 0": packed, "layer 1": tqcore.compress(GOLDEN_X[:, :96], Quantizer(96, 2))}
    theirs = {name: vectors.map(lambda x: to_array(writer, x)) for name, vectors in named.items()}
    writer.save_file(theirs, tmp_path / "many")
    writer.save_file(theirs["layer 0"], tmp_path / "one")
    many, one = reader.load_file(tmp_path / "many"), reader.load_file(tmp_path / "one")
    for got, expected in [(many[name], named[name]) for name in named] + [(one, packed)]:
        assert isinstance(got, PackedVectors) and got.quantizer == expected.quantizer
        assert_same_bits(to_numpy(got.codes), expected.codes)
        assert_same_bits(to_numpy(got.norms), expected.norms)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_files_of_version_1_are_read(package, bits, tmp_path):
    """Their indices lie in four bits, whatever their width."""
    from safetensors.numpy import save_file

    packed = tqcore.compress(GOLDEN_X, Quantizer(128, bits, norm="plain"))
    codes = packing.pack(packing.unpack(packed.codes, np, bits), np, 4)
    fields = {"head_dim": 128, "bits": bits, "rotation": "hadamard", "seed": 0}
    metadata = {"format": "turboquant", "version": "1", "quantizers": json.dumps({"": fields})}
    save_file({"codes": codes, "norms": packed.norms}, tmp_path / "old", metadata)
    got = package.load_file(tmp_path / "old")
    assert got.quantizer == packed.quantizer
    assert_same_bits(to_numpy(got.codes), packed.codes)
    assert_same_bits(to_numpy(got.norms), packed.norms)


def rewrite(path, change):
    """Rewrites the header of a safetensors file."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_bad_files_are_refused(package, tmp_path):
    path = tmp_path / "keys"

    def written():
        tqcore.save_file(tqcore.compress(GOLDEN_X, Quantizer(128)), path)
        return path

    rewrite(written(), lambda header: header["__metadata__"].update(version="3"))
    with pytest.raises(ValueError, match="must be of format 'turboquant', version '1' or '2', got .* version '3'"):
        package.load_file(path)
    rewrite(written(), lambda header: header.pop("__metadata__"))
    with pytest.raises(ValueError, match="got format None, version None"):
        package.load_file(path)
    rewrite(written(), lambda header: header.update(norm=header.pop("norms")))
    with pytest.raises(ValueError, match=r"must hold the arrays \['codes', 'norms'\], got \['codes', 'norm'\]"):
        package.load_file(path)
    rewrite(written(), lambda header: header["codes"].update(shape=[64, 3]))
    with pytest.raises(
        ValueError, match=r"the last axis of `packed.codes` must be head_dim \* bits / 8, got shape \[64, 3\]"
    ):
        package.load_file(path)
    rewrite(written(), lambda header: header["__metadata__"].update(quantizers='{"": {"head_dim": 127}}'))
    with pytest.raises(ValueError, match="`head_dim` must be an even integer from 2 to 1024, got 127"):
        package.load_file(path)
    rewrite(written(), lambda header: header["__metadata__"].update(quantizers='["", {"bits": 4}]'))
    with pytest.raises(ValueError, match="must describe its quantizers"):
        package.load_file(path)
    path.write_bytes(written().read_bytes()[:-1])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        package.load_file(path)
    path.write_bytes(b"not a file of ours")
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        package.load_file(path)
    with pytest.raises(ValueError, match="names of packed vectors must not be empty"):
        package.save_file({"": package.load_file(written())}, path)
