"""Four-bit indices in bytes: coordinate 2j in the high nibble of byte j, coordinate 2j+1 in the low one."""

import numpy as np
from numpy.typing import NDArray


def pack(indices: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., D] indices below 16 -> [..., D/2] bytes."""
    return (indices[..., 0::2] << np.uint8(4)) | indices[..., 1::2]


def unpack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[..., D/2] bytes -> [..., D] indices."""
    return np.stack([codes >> np.uint8(4), codes & np.uint8(15)], axis=-1).reshape(
        *codes.shape[:-1], 2 * codes.shape[-1]
    )
