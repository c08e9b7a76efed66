"""The score kernels of Triton and Gluon, instruction by instruction, against the oracle: the same bits, on CPUs."""

import numpy as np
import ptx
import pytest
from test_compile import HEADS, KEYS, SIGNATURE, gluon_kernel, triton_kernel

import tqcore
from tqcore import fixed_point, tuning
from tqcore.packing import packed_dim

KV_HEADS, S = 2, 96
KERNELS = {"gluon": (gluon_kernel, 90), "triton": (triton_kernel, 80)}  # where products are `mma`, not `wgmma`


def compiled(implementation, head_dim, bits, planes, rows):
    """Names of parameters, and PTX."""
    from tqcore.kernels import load

    kernel, capability = KERNELS[implementation]
    names = [name for name in load(implementation).arg_names if name in SIGNATURE]
    return names, kernel(head_dim, bits, planes, rows, "fp32", capability).asm["ptx"]


def inputs(head_dim, bits, planes, rows):
    """q, codes, norms and a table of so many planes; among them NaN, infinity, subnormals and zeros."""
    rng = np.random.default_rng(head_dim + bits)
    q = rng.standard_normal((1, KV_HEADS * rows, 1, head_dim)).astype(np.float32)
    q[0, 0] *= 1e-39
    q[0, 1, 0, 3], q[0, 2] = np.nan, 0
    codes = rng.integers(0, 256, (1, KV_HEADS, S, packed_dim(head_dim, bits)), np.uint8)
    norms = rng.standard_normal((1, KV_HEADS, S)).astype(np.float32)
    norms[0, 0, 5], norms[0, 1, 7] = np.inf, 1e-40
    table = np.sort(rng.standard_normal(2**bits)).astype(np.float32)
    if planes == 1:
        table = np.sort(rng.choice(np.arange(-127, 128), 2**bits, replace=False)).astype(np.float32) / 512
    return q, codes, norms, table


@pytest.mark.parametrize(
    ("head_dim", "bits", "planes", "rows"),
    [(128, 4, 1, 4), (128, 3, 1, 4), (64, 2, 1, 8), (128, 4, 2, 4), (64, 3, 2, 4), (80, 4, 1, 16), (256, 4, 1, 4)],
)
@pytest.mark.parametrize("implementation", KERNELS)
def test_their_instructions_give_the_oracles_bits(in_compiling_process, implementation, head_dim, bits, planes, rows):
    names, text = in_compiling_process(compiled, implementation, head_dim, bits, planes, rows)
    q, codes, norms, table = inputs(head_dim, bits, planes, rows)
    scale, config = np.float32(head_dim**-0.5), tuning.score_config(implementation, rows, KEYS, HEADS, head_dim)
    words = fixed_point.score_table(table).words
    assert len(words) == 4 * planes + 1
    out = np.full((KV_HEADS, rows, S), 3, np.float32)
    given = {"q_ptr": q, "codes_ptr": codes, "norms_ptr": norms, "table_ptr": words, "scale": scale, "out_ptr": out}
    given |= ptx.strides("codes", codes, "bk") | ptx.strides("norms", norms, "bk")
    given |= {"K": KV_HEADS, "R": rows, "S": S, "blocks": config.blocks}
    programs_s, _, programs_r = config.grid(rows, S, KV_HEADS)
    ptx.run(text, names, given, (programs_s * KV_HEADS, programs_r, 1))
    heads = {"n_q_heads": KV_HEADS * rows, "n_kv_heads": KV_HEADS}
    expected = tqcore.fused_qk_scores(q, codes, norms, table, float(scale), **heads).reshape(out.shape)
    same = (out.view(np.int32) == expected.view(np.int32)) | (np.isnan(out) & np.isnan(expected))
    assert same.all() and np.isnan(out).any() and (out == 0).any()
    codes[0, 1, 9, 0] ^= 0x10  # another code is another score
    changed = tqcore.fused_qk_scores(q, codes, norms, table, float(scale), **heads).reshape(out.shape)
    assert not np.array_equal(out[1, :, 9], changed[1, :, 9])
