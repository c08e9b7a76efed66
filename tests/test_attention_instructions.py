"""Attention kernels of Triton and Gluon, and the merge of parts, instruction by instruction, against the oracle."""

import numpy as np
import ptx
import pytest
from backends import assert_close_attention
from test_attention_kernels import signature

import tqcore
from tqcore import fixed_point, softmax, tuning
from tqcore.kernels import attention_constants, load, merge_constants, stages
from tqcore.quantizer import Quantizer
from tqcore.rotation import signs

BATCH, KV_HEADS, GROUP = 2, 1, 4


def compiled(name, quantizers, strides, page, options, splits, sinks):
    """PTX, and names of parameters, of attention and of the merge."""
    from cubin import compile_kernel

    keys, values = quantizers
    config = tuning.attention_config(name, GROUP, 2**15, 64, keys.head_dim)
    constants = attention_constants(config, options, keys, values, page, *strides)
    constants |= {"STAGES": stages(config, *strides)} if name == "gluon_attention" else {"PTX": True}
    capability = 90 if name == "gluon_attention" else 80  # where products are `mma`, not `wgmma`
    launch = {"num_warps": config.num_warps, "maxnreg": config.max_registers}
    of_merge = merge_constants(splits, values, sinks, early=name == "gluon_attention")
    made = []
    for kernel, given, options in ((load(name), constants, launch), (load("merge"), of_merge, {"num_warps": 1})):
        types = signature(kernel, given, "fp32")
        types |= {key: "i32:16" if "codes" in key else "i32" for key in types if "stride" in key}
        options["enable_fp_fusion"] = False
        text = compile_kernel(kernel, types, given, capability, **options).asm["ptx"]
        made.append((text, list(types)))
    return made


CASES = {
    "plain": {"positions": 160, "lengths": [160, 131]},
    "3 and 2 bits": {"positions": 96, "lengths": [70, 96], "bits": (3, 2)},
    "pages, causal, soft cap": {
        "positions": 128, "lengths": [99, 128], "page": 16, "options": {"is_causal": True, "soft_cap": 5.0},
    },
    "sinks, an empty sequence": {"positions": 64, "lengths": [0, 64], "sinks": True},
    "64 coordinates": {"positions": 96, "lengths": [96, 33], "head_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", ["gluon_attention", "attention"])
def test_their_instructions_attend(in_compiling_process, kernel, name):
    case = {"bits": (4, 4), "page": None, "options": {}, "sinks": False, "head_dim": 128} | CASES[name]
    rng, head_dim, positions, page = np.random.default_rng(0), case["head_dim"], case["positions"], case["page"]
    quantizers, splits = [Quantizer(head_dim, bits) for bits in case["bits"]], 2
    shape = BATCH, KV_HEADS, positions
    pages = None
    if page is not None:
        shape = BATCH * positions // page, KV_HEADS, page
        pages = rng.permutation(shape[0]).astype(np.int32).reshape(BATCH, -1)
    packed = [
        tqcore.compress(rng.standard_normal((*shape, head_dim)).astype(np.float32), quantizer)
        for quantizer in quantizers
    ]
    query = rng.standard_normal((BATCH, KV_HEADS * GROUP, 1, head_dim)).astype(np.float32)
    lengths = np.array(case["lengths"], np.int32)
    sinks = rng.standard_normal(KV_HEADS * GROUP).astype(np.float32) if case["sinks"] else None
    scale = head_dim**-0.5
    options = softmax.Options(
        scale, case["options"].get("is_causal", False), None, case["options"].get("soft_cap"), None
    )
    strides = [one.codes.strides[2] for one in packed]
    attend, merge = in_compiling_process(
        compiled, kernel, quantizers, strides, page, options, splits, sinks is not None
    )

    rows, kv = GROUP, BATCH * KV_HEADS
    parts, ml = np.full((kv, splits, rows, head_dim), 3, np.float32), np.full((kv, splits, 2, rows), 3, np.float32)
    out, lse = np.full(query.shape, 3, np.float32), np.full(query.shape[:3], 3, np.float32)
    given = {"q_ptr": query, "signs_ptr": signs(quantizers[0]), "scale": np.float32(scale), "lengths_ptr": lengths}
    given |= {"pages_ptr": lengths if pages is None else pages, "out_ptr": parts, "ml_ptr": ml, "K": KV_HEADS}
    given |= {"R": rows, "T": 1, "S": positions, "M": 0 if pages is None else pages.shape[1], "N": shape[0]}
    given |= {"splits": splits, "left": 0, "right": 0, "result_ptr": out, "lse_ptr": lse}
    given["sinks_ptr"] = lengths if sinks is None else sinks
    for side, one in zip("kv", packed, strict=True):
        words = fixed_point.score_table(one.quantizer.codebook.centroids).words
        given |= {f"{side}_codes_ptr": one.codes, f"{side}_norms_ptr": one.norms, f"{side}_table_ptr": words}
        given |= ptx.strides(f"{side}_codes", one.codes, "bk") | ptx.strides(f"{side}_norms", one.norms, "bk")
    ptx.run(*attend, given, (splits * kv, 1, 1))
    given["signs_ptr"] = signs(quantizers[1])
    ptx.run(*merge, given, (kv * rows, 1, 1))

    expected, expected_lse = tqcore.attention(
        query, *packed, kv_lengths=lengths, page_table=pages, sinks=sinks, return_lse=True,
        is_causal=options.is_causal, logits_soft_cap=options.soft_cap,
    )  # fmt: skip
    assert_close_attention((out, lse), (expected, expected_lse), "float32")
