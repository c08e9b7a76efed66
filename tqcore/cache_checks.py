"""The checks of caches, and their messages."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore import checks


def check_cache_shape(batch, kv_heads, capacity, keys, values, dtype, window, block, first) -> None:
    """The arguments of `KVCache.zeros` that are no arrays, but for pages."""
    for name, size, least in (
        ("batch", batch, 1), ("kv_heads", kv_heads, 1), ("capacity", capacity, 1), ("window", window, 0),
        ("block", block, 1), ("first", first, 0),
    ):  # fmt: skip
        if not checks.is_count(size) or size < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {size!r}.")
    for name, quantizer in (("keys", keys), ("values", values)):
        checks.check_quantizer(name, quantizer)
        if quantizer.qjl or quantizer.head_dim != keys.head_dim:
            raise ValueError(
                "`keys` and `values` must be quantizers of one head_dim, without qjl, "
                f"got {name} of head_dim={quantizer.head_dim}, qjl={quantizer.qjl}, and keys of {keys.head_dim}."
            )
    checks.check_dtype(dtype)
    if first + window > capacity:
        raise ValueError(
            f"`first` and `window` must fit into `capacity`, got first={first}, window={window}, capacity={capacity}."
        )


def check_pages(page_size, pages, page_table, batch: int, positions: int) -> None:
    if not checks.is_count(page_size) or not 16 <= page_size <= 256:
        raise ValueError(f"`page_size` must be None or an integer from 16 to 256, got {page_size!r}.")
    if pages is not None and not (checks.is_count(pages) and pages > 0):
        raise ValueError(f"`pages` must be None or an integer of at least 1, got {pages!r}.")
    if page_table is not None:
        checks.check_axes("page_table", page_table, "[B, M]", "int32", "batch size", batch)
        if page_table.shape[1] * page_size < positions:
            raise ValueError(
                f"`page_table` must have pages for {positions} packed positions, "
                f"got shape {list(page_table.shape)}, page_size={page_size}."
            )


def check_cache_center(center, rows: int, kv_heads: int, head_dim: int) -> None:
    checks.check_array("center", center, "[B, K, 1, D]", ("float32",))
    shape = tuple(center.shape)
    if shape[0] not in (1, rows) or shape[1:] != (kv_heads, 1, head_dim):
        raise ValueError(
            f"`center` must be an array [1 or {rows}, {kv_heads}, 1, {head_dim}], True or None, got {list(shape)}."
        )


def check_cache_append(key: Any, value: Any, counts: Any, cache: Any) -> None:
    """Shapes and dtypes of what is put into a cache."""
    wanted = (cache.batch, cache.kv_heads, cache.config.keys.head_dim)
    for name, x in (("key", key), ("value", value)):
        checks.check_array(name, x, "[B, K, T, D]", checks.FLOATS)
        shape = tuple(x.shape)
        if (*shape[:2], shape[3]) != wanted or shape[2] != key.shape[2]:
            raise ValueError(
                "`key` and `value` must be arrays [B, K, T, D] with the cache's B, K and D and one T, "
                f"got {name} of shape {list(shape)} for B={wanted[0]}, K={wanted[1]}, D={wanted[2]}."
            )
        if checks.dtype_name(x.dtype) != cache.config.dtype:
            raise ValueError(
                f"`{name}` must be of the cache's dtype {cache.config.dtype}, got {checks.dtype_name(x.dtype)}."
            )
    if counts is not None:
        checks.check_axes("counts", counts, "[B]", "int32", "batch size", cache.batch)


def check_room(lengths: NDArray[np.int32], counts: NDArray[np.int32], capacity: int) -> None:
    """What can be seen of the lengths of a cache only once they are concrete."""
    if np.any(lengths + counts > capacity):
        raise ValueError(
            f"the cache must have room for {counts.max()} more positions, "
            f"got lengths {lengths.tolist()} of a capacity of {capacity}."
        )


def check_thawed(blocked: NDArray[np.bool_]) -> None:
    """Whether no sequence is to write a frozen page, once that is concrete."""
    if np.any(blocked):
        raise ValueError(
            f"pages to be written must not be frozen, got frozen ones of sequences {np.flatnonzero(blocked)}."
        )


def check_crop(lengths: Any, batch: int) -> None:
    if checks.is_count(lengths):
        return
    if not hasattr(lengths, "shape"):
        raise ValueError(f"`lengths` must be an integer of at least 0 or an array [B] of int32, got {lengths!r}.")
    checks.check_axes("lengths", lengths, "[B]", "int32", "batch size", batch)


def check_cache(name: str, cache: Any) -> None:
    """Whether the arrays of a cache fit each other and its configuration."""
    config, table = cache.config, cache.page_table
    for part in ("keys", "values"):
        checks.check_packed(f"{name}.{part}", getattr(cache, part))
        checks.check_array(f"{name}.{part}.codes", getattr(cache, part).codes, "[B, K, S, P]", ("uint8",))
    for part in ("lengths", "packed_lengths"):
        checks.check_array(f"{name}.{part}", getattr(cache, part), "[B]", ("int32",))
    batch, (rows, kv_heads, _, head_dim) = cache.lengths.shape[0], cache.keys.shape
    slots = (batch, kv_heads, config.slots, head_dim) if config.slots else None
    shapes = {part: tuple(x.shape) for part, x in cache.arrays().items()}
    wanted = {"packed_lengths": (batch,), "dense_keys": slots, "dense_values": slots}
    wanted |= {"frozen": None if table is None else (rows,)}
    wrong = [part for part, shape in wanted.items() if shapes.get(part) != shape]
    if tuple(cache.keys.shape) != tuple(cache.values.shape) or (table is None and rows != batch):
        wrong.append("keys")
    if table is not None and (len(table.shape) != 2 or table.shape[0] != batch):
        wrong.append("page_table")
    if wrong:
        raise ValueError(f"the arrays of `{name}` must fit each other and {config}, got {wrong[0]} that does not.")
