"""The CUDA devices of this process, as JAX knows them."""

import functools
from typing import Any

import jax


@functools.cache
def cuda_devices() -> tuple[Any, ...]:
    """Empty where there is none."""
    try:
        return tuple(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return ()


def cuda_kind() -> str | None:
    """What `tuning.json` calls the first of them."""
    return next((device.device_kind for device in cuda_devices()), None)


def all_hopper() -> bool:
    """Whether there are any, and all are of compute capability 9."""
    devices = cuda_devices()
    return bool(devices) and all(device.compute_capability.startswith("9.") for device in devices)
