"""Packed vectors in a safetensors file, with the format version and the quantizers in its metadata.

Arrays are named "<name>.codes" and "<name>.norms"; a single PackedVectors has the empty name and is
stored as "codes" and "norms".
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike

import numpy as np

from tqcore import checks
from tqcore.packing import pack, unpack
from tqcore.quantizer import PackedVectors, Quantizer

FORMAT = "turboquant"
VERSION = "2"
READABLE = ("1", "2")  # in version 1, indices of every width lie in four bits


def save_file(packed: PackedVectors | Mapping[str, PackedVectors], path: str | PathLike) -> None:
    """Writes packed vectors, or a dict of them by name, to `path`.

    Raises:
      ValueError: codes and norms do not match their quantizer, or a name is empty.
    """
    from safetensors.numpy import save_file as save_arrays

    named = {"": packed} if isinstance(packed, PackedVectors) else dict(packed)
    if not isinstance(packed, PackedVectors) and "" in named:
        raise ValueError("names of packed vectors must not be empty, got ''.")
    arrays = {}
    for name, vectors in named.items():
        checks.check_packed(name or "packed", vectors)
        codes, norms = _array_names(name)
        arrays[codes] = np.ascontiguousarray(vectors.codes)
        arrays[norms] = np.ascontiguousarray(vectors.norms)
    quantizers = {name: asdict(vectors.quantizer) for name, vectors in named.items()}
    metadata = {"format": FORMAT, "version": VERSION, "quantizers": json.dumps(quantizers)}
    save_arrays(arrays, path, metadata)


def load_file(path: str | PathLike) -> PackedVectors | dict[str, PackedVectors]:
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
    quantizers = _read_quantizers(path, metadata["quantizers"])
    wanted = {array for name in quantizers for array in _array_names(name)}
    if wanted != set(arrays):
        raise ValueError(f"{path} must hold the arrays {sorted(wanted)}, got {sorted(arrays)}.")
    packed = {}
    for name, quantizer in quantizers.items():
        codes, norms = (arrays[array] for array in _array_names(name))
        if metadata["version"] == "1":
            codes = pack(unpack(codes, np), np, quantizer.bits)
        packed[name] = PackedVectors(codes, norms, quantizer)
        checks.check_packed(name or "packed", packed[name])
    return packed.get("", packed)


def _array_names(name: str) -> tuple[str, str]:
    prefix = f"{name}." if name else ""
    return f"{prefix}codes", f"{prefix}norms"


def _check_version(path: str | PathLike, metadata: Mapping[str, str]) -> None:
    came = metadata.get("format"), metadata.get("version")
    if came[0] != FORMAT or came[1] not in READABLE or "quantizers" not in metadata:
        raise ValueError(
            f"{path} must be of format {FORMAT!r}, version {' or '.join(map(repr, READABLE))}, "
            f"got format {came[0]!r}, version {came[1]!r}."
        )


def _read_quantizers(path: str | PathLike, text: str) -> dict[str, Quantizer]:
    try:
        return {name: Quantizer(**fields) for name, fields in json.loads(text).items()}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} must describe its quantizers in JSON, got {text!r}.") from error
