"""`attention` by decompression, then JAX's own: faster than kernels for many query rows, as in a long prefill.

Keys and values are decompressed to the query's dtype; the softmax is JAX's. Memory grows with S, not with T · S.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tqcore import checks, softmax
from tqjax import compress_ops, device, xla_attention

SCORES = 2**26  # of one call: so many query positions are taken at a time
CUDNN_DIM = 128  # up to which cuDNN takes any head_dim that is a multiple of 8


def attention(query, keys, values, kv_lengths, page_table, options):
    """The arguments of `tqcore.softmax.attention` without sinks -> out of query's dtype."""
    (batch, heads, steps, head_dim), kv_heads = query.shape, keys.codes.shape[1]
    size = softmax.context_size(keys, page_table)
    if 0 in (*query.shape, size):
        return jnp.zeros_like(query)
    keys, values = softmax.seen_alone(keys, values, kv_lengths, page_table, steps, options, xla_attention.LIBRARY)
    dtype = checks.dtype_name(query.dtype)
    keys, values = (compress_ops.decompress(packed, dtype=dtype).swapaxes(1, 2) for packed in (keys, values))
    chunk = min(steps, max(1, SCORES // (batch * heads * size)))
    chunks = -(-steps // chunk)
    rows = query.reshape(batch, kv_heads, heads // kv_heads, steps, head_dim).transpose(3, 0, 2, 1, 4)
    rows = jnp.pad(rows, ((0, chunks * chunk - steps), *((0, 0),) * 4)).reshape(chunks, chunk, *rows.shape[1:])
    fast = device.cuda_devices() and dtype != "float32" and head_dim % 8 == 0 and head_dim <= CUDNN_DIM
    positions = jnp.arange(size, dtype=jnp.int32)

    def attend(part):
        start, rows = part  # [chunk, B, G, K, D]
        at = start + jnp.arange(chunk, dtype=jnp.int32)
        visible = softmax.visible_positions(kv_lengths, at, positions, options, steps)
        visible = jnp.broadcast_to(visible, (batch, chunk, size))
        groups = rows.shape[2]
        folded = rows.transpose(1, 0, 2, 3, 4).reshape(batch, chunk * groups, kv_heads, head_dim)
        with jax.default_matmul_precision("highest"):  # where it is float32, else it may be TF32
            out = jax.nn.dot_product_attention(
                folded, keys, values, mask=jnp.repeat(visible, groups, 1)[:, None], scale=options.scale,
                implementation="cudnn" if fast else "xla",
            )  # fmt: skip
        out = out.reshape(batch, chunk, groups, kv_heads, head_dim)
        return jnp.where(visible.any(-1)[..., None, None, None], out, 0).astype(query.dtype)

    outs = lax.map(attend, (jnp.arange(chunks, dtype=jnp.int32) * chunk, rows))  # [chunks, B, chunk, G, K, D]
    out = outs.transpose(1, 4, 3, 0, 2, 5).reshape(batch, heads, chunks * chunk, head_dim)[:, :, :steps]
    fits = (kv_lengths >= 0) & (kv_lengths <= size)
    return jnp.where(fits[:, None, None, None], out, jnp.nan).astype(query.dtype)
