"""The encoders and decoders launched from JAX: what they lower to for CUDA, with or without a GPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_triton_call import abstract_gpu

import tqjax
from tqcore import PackedVectors, Quantizer


def lowered(name, head_dim, bits, paged, centered, *, implementation="triton", length=3):
    """The StableHLO of one operation for CUDA."""
    quantizer = Quantizer(head_dim, bits)
    x = jax.ShapeDtypeStruct((4, 2, length, head_dim), jnp.bfloat16)
    center = jax.ShapeDtypeStruct((2, 1, head_dim), jnp.float32) if centered else None
    packed = PackedVectors(
        jax.ShapeDtypeStruct((4, 2, 16, quantizer.packed_dim), jnp.uint8),
        jax.ShapeDtypeStruct((4, 2, 16), jnp.float32),
        quantizer,
        center,
    )
    starts = jax.ShapeDtypeStruct((4,), jnp.int32)
    table = jax.ShapeDtypeStruct((4, 5), jnp.int32) if paged else None

    def compress(x, center):
        return tqjax.compress(x, quantizer, center=center, implementation=implementation)

    def append(packed, x, starts, table):
        return tqjax.append(packed, x, starts, page_table=table, implementation=implementation)

    def decompress(packed):
        return tqjax.decompress(packed, dtype="bfloat16", implementation="triton")

    function, arguments = {
        "compress": (compress, (x, center)),
        "append": (append, (packed, x, starts, table)),
        "decompress": (decompress, (packed,)),
    }[name]
    with abstract_gpu():
        donated = 0 if name == "append" else ()
        traced = jax.jit(function, donate_argnums=donated).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("head_dim", "bits"), [(128, 4), (64, 3), (80, 4)])
@pytest.mark.parametrize(
    ("name", "paged", "centered"),
    [("compress", False, False), ("compress", False, True), ("append", False, True), ("append", True, False),
     ("decompress", False, True)],
)  # fmt: skip
def test_lowers_to_one_launch(in_compiling_process, name, head_dim, bits, paged, centered):
    text = in_compiling_process(lowered, name, head_dim, bits, paged, centered)
    assert text.count("__gpu$xla.gpu.ptx") == 1
    kernel = name.replace("append", "compress")
    assert re.search(rf'name = "{"" if head_dim != 80 else "dense_"}{kernel}_kernel"', text)
    assert ("output_operand_alias" in text) == (name == "append")
    if name == "append":  # codes and norms, as operands and results
        first = 3 + centered + paged  # after x, the center, the table, starts and pages
        aliases = re.findall(r"output_tuple_indices = \[(\d+)\],\s*operand_index = (\d+)", text)
        assert aliases == [("0", str(first)), ("1", str(first + 1))]
        assert text.count("tf.aliasing_output") == 2 + centered


@pytest.mark.cpu
def test_needs_cuda():
    with pytest.raises(NotImplementedError, match="'triton' needs CUDA, got a program for cpu"):
        tqjax.compress(np.ones((2, 3, 64), np.float32), Quantizer(64), implementation="triton")


def test_needs_a_head_dim():
    with pytest.raises(NotImplementedError, match="'triton' needs CUDA.*head_dim 8 to 256, got \\[3, 512\\] float32"):
        tqjax.compress(np.ones((3, 512), np.float32), Quantizer(512), implementation="triton")
