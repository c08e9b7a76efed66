"""Every check of an argument and every message: what must hold, then what came.

Arrays are looked at through `shape` and `dtype` alone, so NumPy, JAX and torch arrays share the checks.
The front-ends call these before they compute; constructors of classes that hold arrays do not.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore.packing import code_bits

MAX_HEAD_DIM = 1024  # an integer score stays below 2^31, and each of its parts below 2^24
FLOAT32_MAX = float(np.finfo(np.float32).max)
NORMS = ("plain", "corrected")
FLOATS = ("float32", "bfloat16", "float16")


def dtype_name(dtype: Any) -> str:
    """'float32' for numpy.float32, jax.numpy.float32, torch.float32 and 'float32' alike."""
    return np.dtype(dtype).name if isinstance(dtype, type) else str(dtype).removeprefix("torch.")


def check_head_dim(head_dim: Any) -> None:
    if not isinstance(head_dim, int | np.integer) or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"`head_dim` must be an even integer from 2 to {MAX_HEAD_DIM}, got {head_dim!r}.")


def check_bits(bits: Any) -> None:
    if not isinstance(bits, int | np.integer) or not 1 <= bits <= 4:
        raise ValueError(f"`bits` must be 1, 2, 3 or 4, got {bits!r}.")


def check_packable(head_dim: int, bits: int) -> None:
    """Whether packed vectors are whole bytes."""
    multiple = 8 // math.gcd(8, bits)
    if head_dim % multiple:
        raise ValueError(f"`head_dim` must be a multiple of {multiple} for {bits}-bit codes, got {head_dim}.")


def check_seed(seed: Any) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`seed` must be an integer of at least 0, got {seed!r}.")


def check_norm(norm: Any) -> None:
    if norm not in NORMS:
        raise ValueError(f"`norm` must be None, 'plain' or 'corrected', got {norm!r}.")


def check_qjl(qjl: Any, bits: int) -> None:
    check_flag("qjl", qjl)
    if qjl and bits < 2:
        raise ValueError(f"`bits` must be at least 2 where qjl is True, one of them for signs, got {bits}.")


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def check_rotation(rotation: Any, head_dim: int) -> None:
    if rotation != "haar" and not (rotation == "hadamard" and is_power_of_two(head_dim)):
        raise ValueError(
            "`rotation` must be None, 'haar', or, where head_dim is a power of two, 'hadamard', "
            f"got rotation={rotation!r}, head_dim={head_dim}."
        )


def check_array(name: str, array: Any, axes: str, dtypes: Sequence[str]) -> None:
    """`axes` as in "[B, H, T, D]"; a leading "..." stands for any number of axes."""
    needed = axes.count(",") + 1
    at_least = axes.startswith("[...")
    shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
    rank_fits = shape is not None and (len(shape) >= needed - 1 if at_least else len(shape) == needed)
    if not rank_fits or dtype_name(dtype) not in dtypes:
        came = f"an object of type {type(array).__name__}"
        if shape is not None:
            came = f"shape {list(shape)}, dtype {dtype_name(dtype)}"
        raise ValueError(f"`{name}` must be an array {axes} of {_one_of(dtypes)}, got {came}.")


def check_implementation(implementation: Any, known: Sequence[str]) -> None:
    if implementation is not None and implementation not in known:
        names = ", ".join(repr(name) for name in known)
        raise ValueError(f"`implementation` must be None or one of {names}, got {implementation!r}.")


def check_dtype(dtype: Any) -> None:
    if dtype_name(dtype) not in FLOATS:
        raise ValueError(f"`dtype` must be {_one_of(FLOATS)}, got {dtype_name(dtype)}.")


def check_scale(scale: Any) -> None:
    if not isinstance(scale, int | float | np.number) or not -FLOAT32_MAX <= scale <= FLOAT32_MAX:
        raise ValueError(f"`scale` must be a finite number within float32, got {scale!r}.")


def as_scale(scale: Any) -> float:
    """A checked scale as the float that counts: -0 as +0, since caches of compiled programs take the two for one."""
    return float(scale) + 0.0


def check_centroid_values(centroids: NDArray[np.float32]) -> None:
    """What can be seen of `centroids` only once they are concrete."""
    if not np.all(np.isfinite(centroids)) or np.any(centroids[1:] < centroids[:-1]):
        raise ValueError(f"`centroids` must be finite and ascending, got {centroids.tolist()}.")


def check_devices(devices: Mapping[str, Any]) -> None:
    """`devices` from argument name to where it lies."""
    if len(set(devices.values())) > 1:
        names = ", ".join(f"`{name}`" for name in devices)
        came = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{names} must be on one device, got {came}.")


def check_vectors(x: Any, quantizer: Any, center: Any = None) -> None:
    _check_width("x", x, "[..., S, D]", quantizer)
    if center is not None:
        _check_center("center", center, x.shape)


def check_append(packed, x, starts, page_table) -> None:
    """The arguments of `append`. Values of starts and page numbers are never wrong: they say what is written."""
    check_packed("packed", packed)
    check_array("packed.codes", packed.codes, "[B, K, S, P]" if page_table is None else "[N, K, page, P]", ("uint8",))
    check_array("x", x, "[B, K, T, D]", FLOATS)
    _check_width("x", x, "[B, K, T, D]", packed.quantizer)
    if packed.residual is not None:
        raise ValueError("`packed` must have no residual to be appended to, got vectors with qjl=True.")
    (batch, kv_heads), (sequences, held) = x.shape[:2], packed.codes.shape[:2]
    if kv_heads != held:
        raise ValueError(f"`x` and `packed` must have one number of heads, got {kv_heads} and {held}.")
    if page_table is None and batch != sequences:
        raise ValueError(f"`x` and `packed` must have one batch size, got {batch} and {sequences}.")
    check_axes("starts", starts, "[B]", "int32", "batch size of `x`", batch)
    if page_table is not None:
        check_axes("page_table", page_table, "[B, M]", "int32", "batch size of `x`", batch)
    if packed.center is not None:
        axes = (1,) * (4 - len(packed.center.shape)) + tuple(packed.center.shape)
        if axes[2] != 1 or (page_table is not None and axes[0] != 1):
            raise ValueError(
                "`packed.center` must be one for all positions, and in a pool for all pages, "
                f"got shape {list(packed.center.shape)}."
            )


def check_decompress(packed: Any, dtype: Any, rotated: Any) -> None:
    check_packed("packed", packed)
    check_dtype(dtype)
    check_flag("rotated", rotated)


def check_keys(keys: Any) -> None:
    """The argument of `key_center`."""
    check_array("keys", keys, "[..., S, D]", FLOATS)
    if keys.shape[-2] < 1:
        raise ValueError(f"`keys` must have at least one position along S, got shape {list(keys.shape)}.")


def check_rotary(bias: Any, positions: Any, theta: Any) -> None:
    """The arguments of `rotary_center`."""
    check_array("bias", bias, "[..., D]", FLOATS)
    check_array("positions", positions, "[S]", (*FLOATS, "int32", "int64"))
    if bias.shape[-1] % 2:
        raise ValueError(f"the last axis of `bias` must be even, got shape {list(bias.shape)}.")
    if not isinstance(theta, int | float | np.number) or not 0 < theta <= FLOAT32_MAX:
        raise ValueError(f"`theta` must be a positive number within float32, got {theta!r}.")


def check_rotated(x: Any, quantizer: Any) -> None:
    _check_width("x", x, "[..., D]", quantizer)


def check_packed(name: str, packed: Any) -> None:
    if not all(hasattr(packed, field) for field in ("codes", "norms", "quantizer", "center", "residual")):
        raise ValueError(f"`{name}` must be PackedVectors, got an object of type {type(packed).__name__}.")
    check_quantizer(f"{name}.quantizer", packed.quantizer)
    check_array(f"{name}.codes", packed.codes, "[..., S, P]", ("uint8",))
    check_array(f"{name}.norms", packed.norms, "[..., S]", ("float32",))
    head_dim, bits = packed.quantizer.head_dim, packed.quantizer.code_bits
    if packed.codes.shape[-1] != packed.quantizer.packed_dim:
        raise ValueError(
            f"the last axis of `{name}.codes` must be head_dim * bits / 8, "
            f"got shape {list(packed.codes.shape)}, head_dim={head_dim}, bits={bits}."
        )
    _check_norms(f"{name}.codes", packed.codes, f"{name}.norms", packed.norms)
    if packed.center is not None:
        _check_center(f"{name}.center", packed.center, packed.shape)
    _check_residual(name, packed)


def check_centroids(centroids: Any, bits: int) -> None:
    """Dtype and size of a table for indices of `bits`; its values are for `check_centroid_values`."""
    check_array("centroids", centroids, "[L]", ("float32",))
    if not 1 <= centroids.shape[0] <= 2**bits:
        raise ValueError(f"`centroids` must have 1 to {2**bits} entries, got {centroids.shape[0]}, bits={bits}.")


def check_scores(q_rotated, packed_indices, norms, scale, n_q_heads, n_kv_heads) -> int:
    """The arguments of `fused_qk_scores`, but for `centroids`. Returns the bits of an index."""
    check_array("q_rotated", q_rotated, "[B, H, T, D]", FLOATS)
    check_array("packed_indices", packed_indices, "[B, K, S, P]", ("uint8",))
    check_array("norms", norms, "[B, K, S]", ("float32",))
    batch, heads, _, head_dim = q_rotated.shape
    check_head_dim(head_dim)
    packed, bits = packed_indices.shape[-1], code_bits(packed_indices.shape[-1], head_dim)
    if not 1 <= bits <= 4 or 8 * packed != head_dim * bits:
        raise ValueError(
            "the last axis of `packed_indices` must be head_dim * bits / 8 for bits of 1, 2, 3 or 4, "
            f"got shape {list(packed_indices.shape)}, head_dim={head_dim}."
        )
    _check_norms("packed_indices", packed_indices, "norms", norms)
    if batch != packed_indices.shape[0]:
        raise ValueError(
            f"`q_rotated` and `packed_indices` must have one batch size, got {batch} and {packed_indices.shape[0]}."
        )
    if (heads, packed_indices.shape[1]) != (n_q_heads, n_kv_heads):
        raise ValueError(
            "`n_q_heads` and `n_kv_heads` must be the head axes of `q_rotated` and `packed_indices`, "
            f"got n_q_heads={n_q_heads}, n_kv_heads={n_kv_heads} for {heads} and {packed_indices.shape[1]} heads."
        )
    if n_kv_heads < 1 or n_q_heads % n_kv_heads:
        raise ValueError(
            f"`n_q_heads` must be a multiple of `n_kv_heads`, got n_q_heads={n_q_heads}, n_kv_heads={n_kv_heads}."
        )
    check_scale(scale)
    return bits


def check_attention_scores(query, keys, scale, add_center) -> None:
    """The arguments of `attention_scores`, before the query is rotated."""
    check_array("query", query, "[B, H, T, D]", FLOATS)
    check_packed("keys", keys)
    check_array("keys.codes", keys.codes, "[B, K, S, P]", ("uint8",))
    _check_query_width(query, keys)
    if scale is not None:
        check_scale(scale)
    if add_center is False and keys.center is not None and keys.center.shape[-2] != 1:
        raise ValueError(
            "`add_center` must be None or True where `keys.center` varies along S, since a softmax would see it, "
            f"got False for a center of shape {list(keys.center.shape)}."
        )
    if not (add_center is None or isinstance(add_center, bool)):
        raise ValueError(f"`add_center` must be None, True or False, got {add_center!r}.")


def check_attention(query, keys, values, kv_lengths, page_table, sinks) -> None:
    """The arrays of `attention`, but for the values of lengths and page numbers."""
    check_array("query", query, "[B, H, T, D]", FLOATS)
    for name, packed in (("keys", keys), ("values", values)):
        check_packed(name, packed)
        axes = "[B, K, S, P]" if page_table is None else "[N, K, page, P]"
        check_array(f"{name}.codes", packed.codes, axes, ("uint8",))
    if tuple(keys.shape) != tuple(values.shape):
        raise ValueError(f"`keys` and `values` must have one shape, got {list(keys.shape)} and {list(values.shape)}.")
    _check_query_width(query, keys)
    (batch, heads), (sequences, kv_heads, page) = query.shape[:2], keys.codes.shape[:3]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"the heads of `query` must be a multiple of those of `keys`, got {heads} and {kv_heads} heads."
        )
    if page_table is None and batch != sequences:
        raise ValueError(f"`query` and `keys` must have one batch size, got {batch} and {sequences}.")
    if page_table is not None:
        check_axes("page_table", page_table, "[B, M]", "int32", "batch size of `query`", batch)
        if 0 in (sequences, page):
            raise ValueError(f"`keys` must hold at least one page and position, got shape {list(keys.shape)}.")
    if kv_lengths is not None:
        check_axes("kv_lengths", kv_lengths, "[B]", "int32", "batch size of `query`", batch)
    if sinks is not None:
        check_axes("sinks", sinks, "[H]", "float32", "heads of `query`", heads)


def check_attention_options(scale, is_causal, local_window_size, logits_soft_cap, num_splits) -> None:
    """The arguments of `attention` that are no arrays."""
    if scale is not None:
        check_scale(scale)
    check_flag("is_causal", is_causal)
    window = local_window_size if isinstance(local_window_size, tuple) else (local_window_size,) * 2
    if local_window_size is not None and not (len(window) == 2 and all(is_count(x) for x in window)):
        raise ValueError(
            "`local_window_size` must be None, an integer of at least 0 or a pair (left, right) of them, "
            f"got {local_window_size!r}."
        )
    cap = logits_soft_cap
    if cap is not None and not (isinstance(cap, int | float | np.number) and 0 < cap <= FLOAT32_MAX):
        raise ValueError(f"`logits_soft_cap` must be None or a positive number within float32, got {cap!r}.")
    if num_splits is not None and not (is_count(num_splits) and num_splits > 0):
        raise ValueError(f"`num_splits` must be None or an integer of at least 1, got {num_splits!r}.")


def check_lengths(kv_lengths: NDArray[np.int32], positions: int) -> None:
    """What can be seen of `kv_lengths` only once they are concrete."""
    if np.any((kv_lengths < 0) | (kv_lengths > positions)):
        raise ValueError(f"`kv_lengths` must be 0 to {positions}, the positions there are, got {kv_lengths.tolist()}.")


def check_page_numbers(page_table: NDArray[np.int32], used: NDArray[np.bool_], pages: int) -> None:
    """What can be seen of `page_table` only once it is concrete; `used` [B, M] says which entries count."""
    wrong = page_table[used & ((page_table < 0) | (page_table >= pages))]
    if len(wrong):
        raise ValueError(f"the entries of `page_table` must be 0 to {pages - 1}, pages of the pool, got {wrong[0]}.")


def check_merge(out_a, lse_a, out_b, lse_b) -> None:
    """The arguments of `merge_attention`."""
    for name, out in (("out_a", out_a), ("out_b", out_b)):
        check_array(name, out, "[..., D]", FLOATS)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_array(name, lse, "[...]", ("float32",))
    if tuple(out_a.shape) != tuple(out_b.shape) or dtype_name(out_a.dtype) != dtype_name(out_b.dtype):
        raise ValueError(
            "`out_a` and `out_b` must have one shape and dtype, "
            f"got {list(out_a.shape)} {dtype_name(out_a.dtype)} and {list(out_b.shape)} {dtype_name(out_b.dtype)}."
        )
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if not out_a.shape or tuple(lse.shape) != tuple(out_a.shape[:-1]):
            raise ValueError(
                f"`{name}` must have the shape of `out_a` without its last axis, "
                f"got {list(lse.shape)} and {list(out_a.shape)}."
            )


def check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise ValueError(f"`{name}` must be True or False, got {flag!r}.")


def is_count(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and int(x) >= 0


def check_axes(name: str, array: Any, axes: str, dtype: str, what: str, size: int) -> None:
    """Rank and dtype, and a first axis of `size`."""
    check_array(name, array, axes, (dtype,))
    if array.shape[0] != size:
        raise ValueError(f"the first axis of `{name}` must be the {what}, got shape {list(array.shape)}, {size}.")


def _check_query_width(query: Any, keys: Any) -> None:
    if query.shape[-1] != keys.quantizer.head_dim:
        raise ValueError(
            "the last axis of `query` must be the keys' head_dim, "
            f"got shape {list(query.shape)}, head_dim={keys.quantizer.head_dim}."
        )


def _check_width(name: str, x: Any, axes: str, quantizer: Any) -> None:
    """Floats whose last axis is the quantizer's head_dim."""
    check_array(name, x, axes, FLOATS)
    check_quantizer("quantizer", quantizer)
    if not x.shape or x.shape[-1] != quantizer.head_dim:
        raise ValueError(
            f"the last axis of `{name}` must be the quantizer's head_dim, "
            f"got shape {list(x.shape)}, head_dim={quantizer.head_dim}."
        )


def check_quantizer(name: str, quantizer: Any) -> None:
    if not hasattr(quantizer, "head_dim"):
        raise ValueError(f"`{name}` must be a Quantizer, got an object of type {type(quantizer).__name__}.")


def _check_center(name: str, center: Any, shape: Sequence[int]) -> None:
    """float32 that broadcasts to vectors of `shape`."""
    check_array(name, center, "[..., 1 or S, D]", ("float32",))
    axes, excess = tuple(center.shape), len(center.shape) - len(shape)
    fits = excess <= 0 and all(a == 1 or a == b for a, b in zip(axes, tuple(shape)[-len(axes) :], strict=True))
    if not fits or axes[-1] != shape[-1]:
        raise ValueError(
            f"`{name}` must be an array [..., 1 or S, D] that broadcasts to the vectors' shape, "
            f"got {list(axes)} for vectors of shape {list(shape)}."
        )


def _check_residual(name: str, packed: Any) -> None:
    wanted = packed.quantizer.residual
    if (packed.residual is None) != (wanted is None):
        raise ValueError(
            f"`{name}.residual` must be PackedVectors where qjl is True, and None elsewhere, "
            f"got an object of type {type(packed.residual).__name__}, qjl={packed.quantizer.qjl}."
        )
    if wanted is not None:
        check_packed(f"{name}.residual", packed.residual)
        if packed.residual.quantizer != wanted or tuple(packed.residual.shape) != tuple(packed.shape):
            raise ValueError(
                f"`{name}.residual` must be vectors of `{name}`'s shape and of {wanted}, "
                f"got shape {list(packed.residual.shape)}, {packed.residual.quantizer}."
            )


def _check_norms(codes_name: str, codes: Any, norms_name: str, norms: Any) -> None:
    if tuple(norms.shape) != tuple(codes.shape[:-1]):
        raise ValueError(
            f"`{norms_name}` must have the shape of `{codes_name}` without its last axis, "
            f"got {list(norms.shape)} and {list(codes.shape)}."
        )


def _one_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
