"""Packed vectors in a safetensors file, with the format version and the quantizers in its metadata.

The arrays of the PackedVectors named "layer" are "layer.codes" and "layer.norms", "layer.center" where it has one, and
"layer.residual_codes" and "layer.residual_norms" where its quantizer has qjl=True. A single PackedVectors has the empty
name, and its arrays are stored as "codes", "norms" and so on. A KVCache named "layer" is the PackedVectors "layer.keys"
and "layer.values", and the arrays "layer.lengths" and so on by the names of its fields; a single one has no name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tqcore import cache_checks, checks
from tqcore.cache import KVCache
from tqcore.cache_config import CacheConfig
from tqcore.packing import pack, unpack
from tqcore.quantizer import PackedVectors, Quantizer

FORMAT = "turboquant"
VERSION = "2"
CACHED = ("keys", "values")
READABLE = ("1", "2")  # in version 1, indices of every width lie in four bits


def save_file(packed: PackedVectors | KVCache | Mapping[str, PackedVectors | KVCache], path: str | PathLike) -> None:
    """Writes packed vectors or a cache, or a dict of them by name, to `path`.

    Raises:
      ValueError: codes and norms do not match their quantizer, arrays of a cache do not fit, or a name is empty.
    """
    from safetensors.numpy import save_file as save

    named = dict(packed) if isinstance(packed, Mapping) else {"": packed}
    if isinstance(packed, Mapping) and "" in named:
        raise ValueError("names of packed vectors must not be empty, got ''.")
    arrays, vectors, caches = {}, {}, {}
    for name, held in named.items():
        if not isinstance(held, KVCache):
            vectors[name] = held
            continue
        cache_checks.check_cache(name or "cache", held)
        vectors |= {_array_name(name, part): getattr(held, part) for part in CACHED}
        arrays |= {_array_name(name, part): _bits(x) for part, x in held.arrays().items()}
        caches[name] = {"arrays": sorted(held.arrays()), **_fields(held.config)}
    for name, held in vectors.items():
        checks.check_packed(name or "packed", held)
        arrays |= {_array_name(name, part): np.ascontiguousarray(x) for part, x in _parts(held).items()}
    quantizers = {name: _fields(held.quantizer) for name, held in vectors.items()}
    centered = [name for name, held in vectors.items() if held.center is not None]
    metadata = {"quantizers": json.dumps(quantizers), "centered": json.dumps(centered)}
    metadata |= {"caches": json.dumps(caches)} if caches else {}
    metadata |= {"format": FORMAT, "version": VERSION}
    save(arrays, path, metadata)


def load_file(path: str | PathLike) -> PackedVectors | KVCache | dict[str, PackedVectors | KVCache]:
    """Reads what `save_file` wrote.

    Raises:
      ValueError: the file is truncated, of another format or version, or its arrays are not those that
        its metadata names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}.") from error
    quantizers, centered, caches = _read_metadata(path, metadata)
    parts = {
        name: ["codes", "norms"]
        + ["center"] * (name in centered)
        + ["residual_codes", "residual_norms"] * (quantizer.residual is not None)
        for name, quantizer in quantizers.items()
    }
    wanted = {_array_name(name, part) for name, known in parts.items() for part in known}
    wanted |= {_array_name(name, part) for name, (held, _) in caches.items() for part in held}
    if wanted != set(arrays):
        raise ValueError(f"{path} must hold the arrays {sorted(wanted)}, got {sorted(arrays)}.")
    packed = {}
    for name, quantizer in quantizers.items():
        packed[name] = _packed({part: arrays[_array_name(name, part)] for part in parts[name]}, quantizer, metadata)
        checks.check_packed(name or "packed", packed[name])
    for name, (held, described) in caches.items():
        packed[name] = _cache(name, {part: arrays[_array_name(name, part)] for part in held}, described, packed)
    return packed.get("", packed)


def load_arrays(path: str | PathLike) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file by name; bfloat16 ones as float32, for which NumPy has no type of its own.

    Raises:
      ValueError: the file is not a whole safetensors file, or holds a dtype other than numbers of 8 to 64 bits.
    """
    from safetensors import SafetensorError, deserialize

    if not Path(path).is_file():
        raise ValueError(f"{path} must be a safetensors file, got no file.")
    try:
        parts = deserialize(Path(path).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file, got: {error}.") from error
    arrays = {}
    for name, part in parts:
        dtype, data = part["dtype"], part["data"]
        if dtype == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif re.fullmatch("[IUF](8|16|32|64)", dtype):
            array = np.frombuffer(data, f"<{dtype[0].lower()}{int(dtype[1:]) // 8}")
        else:
            raise ValueError(f"{path} must hold numbers of 8 to 64 bits, got dtype {dtype} of {name!r}.")
        arrays[name] = array.reshape(part["shape"])
    return arrays


def save_arrays(arrays: Mapping[str, np.ndarray], path: str | PathLike) -> None:
    """Writes arrays by name to a safetensors file."""
    from safetensors.numpy import save_file as save

    save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _parts(vectors: PackedVectors) -> dict[str, np.ndarray]:
    """The arrays by the last part of their names."""
    parts = {"codes": vectors.codes, "norms": vectors.norms, "center": vectors.center}
    if vectors.residual is not None:
        parts |= {"residual_codes": vectors.residual.codes, "residual_norms": vectors.residual.norms}
    return {part: array for part, array in parts.items() if array is not None}


def _packed(parts: Mapping[str, np.ndarray], quantizer: Quantizer, metadata: Mapping[str, str]) -> PackedVectors:
    """The inverse of `_parts`."""
    codes, residual = parts["codes"], None
    if metadata["version"] == "1":
        codes = pack(unpack(codes, np), np, quantizer.code_bits)
    if quantizer.residual is not None:
        residual = PackedVectors(parts["residual_codes"], parts["residual_norms"], quantizer.residual)
    return PackedVectors(codes, parts["norms"], quantizer, parts.get("center"), residual)


def _cache(name: str, arrays: Mapping[str, np.ndarray], described: Mapping[str, Any], packed: dict) -> KVCache:
    """The cache `name`, whose keys and values leave `packed`."""
    keys, values = (packed.pop(_array_name(name, part)) for part in CACHED)
    config = CacheConfig(keys.quantizer, values.quantizer, **described)
    absent = dict.fromkeys(KVCache.ARRAYS)
    cache = KVCache(keys, values, config=config, **(absent | dict(arrays)))
    cache_checks.check_cache(name or "cache", cache)
    return cache


def _bits(array: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16, since NumPy has no type of its own for it."""
    return np.ascontiguousarray(array.view(np.uint16) if array.dtype.name == "bfloat16" else array)


def _array_name(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _fields(described: Quantizer | CacheConfig) -> dict[str, Any]:
    """The arguments that make it again, but for quantizers."""
    named = {field.name: getattr(described, field.name) for field in fields(described) if field.init}
    return {name: value for name, value in named.items() if not isinstance(value, Quantizer)}


def _check_version(path: str | PathLike, metadata: Mapping[str, str]) -> None:
    came = metadata.get("format"), metadata.get("version")
    if came[0] != FORMAT or came[1] not in READABLE or "quantizers" not in metadata:
        raise ValueError(
            f"{path} must be of format {FORMAT!r}, version {' or '.join(map(repr, READABLE))}, "
            f"got format {came[0]!r}, version {came[1]!r}."
        )


def _read_metadata(path: str | PathLike, metadata: Mapping[str, str]) -> tuple[dict[str, Quantizer], list[str], dict]:
    """The quantizers by name, the names of vectors with a center, and the arrays and the configuration of caches."""
    missing = {"norm": "plain"} if metadata["version"] == "1" else {}
    text, centered, cached = metadata["quantizers"], metadata.get("centered", "[]"), metadata.get("caches", "{}")
    try:
        quantizers = {name: Quantizer(**(missing | described)) for name, described in json.loads(text).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} must describe its quantizers in JSON, got {text!r}.") from error
    try:
        named = [name for name in json.loads(centered) if name in quantizers]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} must list in JSON which vectors have a center, got {centered!r}.") from error
    try:
        caches = {name: (described.pop("arrays"), described) for name, described in json.loads(cached).items()}
        for name, (held, described) in caches.items():
            if not set(held) <= set(KVCache.ARRAYS):
                raise TypeError
            keys, values = (quantizers[_array_name(name, part)] for part in CACHED)
            CacheConfig(keys, values, **described)
    except (json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} must describe its caches in JSON, got {cached!r}.") from error
    return quantizers, named, caches
