"""Every backend behind one call: Inputs in, a NumPy array out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from attention_cases import AttentionCase, AttentionInputs
from cases import Inputs

import tq_torch
import tqcore
import tqjax

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass(frozen=True)
class Backend:
    """One implementation of one package, called as a user would call it."""

    name: str
    package: ModuleType
    implementation: str
    traced: bool = False

    def __str__(self) -> str:
        return self.name

    def scores(self, inputs: Inputs) -> np.ndarray:
        """`fused_qk_scores` into memory that held NaN before."""
        arrays = [to_array(self.package, x) for x in inputs.arrays]
        shape = (*inputs.q_rotated.shape[:3], inputs.norms.shape[2])
        function = partial(
            self.package.fused_qk_scores, scale=inputs.scale, implementation=self.implementation, **inputs.heads
        )
        # Triton's interpreter computes in NumPy, which warns where IEEE arithmetic overflows.
        with POISONED[self.package.__name__](shape), np.errstate(all="ignore"):
            return to_numpy(jax.jit(function)(*arrays) if self.traced else function(*arrays))

    def takes(self, case: AttentionCase) -> bool:
        """Whether the implementation does such a case; else it is NotImplementedError."""
        if self.implementation in ("xla", "eager"):
            return True
        moved = case.centers[0] != "none" and case.cap is not None
        return min(case.bits) > 1 and not any(case.qjl) and "varying" not in case.centers and not moved

    def attention(self, inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
        """`attention` into memory that held NaN before, and its log-sum-exp."""
        query, keys, values, arrays = attention_arguments(self.package, inputs)
        function = partial(self.package.attention, **inputs.static, return_lse=True, implementation=self.implementation)
        with POISONED[self.package.__name__](inputs.query.shape), np.errstate(all="ignore"):
            out, lse = (_compiled(function) if self.traced else function)(query, keys, values, **arrays)
        out = out.float() if out.dtype == torch.bfloat16 else out
        return to_numpy(out), to_numpy(lse)


def _compiled(function):
    """By JAX; on a CPU, where Pallas' interpreter is a large program that runs once, without optimising it."""
    return jax.jit(function, compiler_options=None if CUDA else {"xla_backend_optimization_level": 0})


BACKENDS = [
    Backend("tqjax-xla", tqjax, "xla"),
    Backend("tqjax-xla-traced", tqjax, "xla", traced=True),
    Backend("tqjax-pallas_triton", tqjax, "pallas_triton"),
    Backend("tqjax-pallas_triton-traced", tqjax, "pallas_triton", traced=True),
    Backend("tq_torch-eager", tq_torch, "eager"),
    Backend("tq_torch-triton", tq_torch, "triton"),
]
if CUDA:
    BACKENDS += [
        Backend("tqjax-triton", tqjax, "triton"),
        Backend("tqjax-triton-traced", tqjax, "triton", traced=True),
    ]
if CUDA and torch.cuda.get_device_capability()[0] == 9:
    BACKENDS += [
        Backend("tq_torch-gluon", tq_torch, "gluon"),
        Backend("tqjax-gluon", tqjax, "gluon"),
        Backend("tqjax-gluon-traced", tqjax, "gluon", traced=True),
    ]
ATTENTION_BACKENDS = BACKENDS
EVERY_CASE = [b for b in BACKENDS if b.traced == (b.implementation == "pallas_triton" and not CUDA)]
PACKAGES = [tqcore, tqjax, tq_torch]


def to_array(package: ModuleType, x: np.ndarray) -> Any:
    """A NumPy array as the package's own, on the device under test."""
    if package is tqcore:
        return x
    if package is tqjax:
        return jnp.asarray(x)
    if x.dtype.name == "bfloat16":
        return torch.tensor(x.astype(np.float32), device=DEVICE).bfloat16()
    return torch.tensor(x, device=DEVICE)


def attention_arguments(package: ModuleType, inputs: AttentionInputs) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Query, keys, values and the other arrays, as the package's own."""
    arrays = {name: to_array(package, x) for name, x in inputs.arrays.items()}
    packed = (vectors.map(partial(to_array, package)) for vectors in (inputs.keys, inputs.values))
    return to_array(package, inputs.query), *packed, arrays


def cpu_array(package: ModuleType, x: np.ndarray) -> Any:
    """A NumPy array as the package's own, on the CPU: where encoders and rotations promise bits."""
    if package is tqjax:
        return jax.device_put(x, jax.devices("cpu")[0])
    return torch.from_numpy(x) if package is tq_torch else x


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


class _TorchPoison:
    """torch.empty returns NaN inside."""

    def __init__(self, shape: tuple[int, ...]):
        pass

    def __enter__(self):
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *exception):
        torch.use_deterministic_algorithms(self.before)


class _JaxPoison:
    """Pallas' interpreter starts outputs from NaN; on a GPU the allocator hands out what just held NaN."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __enter__(self):
        if CUDA:
            for _ in range(4):
                jnp.full(self.shape, jnp.nan, jnp.float32).block_until_ready().delete()

    def __exit__(self, *exception):
        pass


POISONED: dict[str, Callable[[tuple[int, ...]], Any]] = {"tqjax": _JaxPoison, "tq_torch": _TorchPoison}


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal shapes, dtypes and bits, the sign of zero included; any NaN equals any NaN."""
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), f"got {got.shape} {got.dtype}"
    bits = np.dtype(f"i{got.dtype.itemsize}")
    same = np.ascontiguousarray(got).view(bits) == np.ascontiguousarray(expected).view(bits)
    if got.dtype.kind == "f":
        same |= np.isnan(got) & np.isnan(expected)
    wrong = np.argwhere(~same)
    first = tuple(wrong[0]) if len(wrong) else ()
    assert not len(wrong), (
        f"{len(wrong)} of {got.size} elements differ, first at {first}: "
        f"got {got[first]!r}, expected {expected[first]!r}"
    )


def tolerance(dtype: str, head_dim: int) -> float:
    """Largest relative error of a sum of D products rounded to `dtype`: the one formula for what is not exact."""
    epsilon = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    return 2 * epsilon * np.log2(2 * head_dim)


def assert_close(got: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """‖got - expected‖ ≤ limit · ‖expected‖, both finite."""
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    assert got.shape == expected.shape, f"got {got.shape}, expected {expected.shape}"
    error, size = np.linalg.norm(got - expected), np.linalg.norm(expected)
    assert np.isfinite(error) and error <= limit * size, f"relative error {error / size:.3g} exceeds {limit:.3g}"


def attention_tolerance(dtype: str, head_dim: int) -> float:
    """Largest relative error of an output row, which is rounded to `dtype`, and its logits, of up to 16, to float32.

    A rotation that is not exact may take a coordinate of the query to the next of its 2^14 steps, and kernels round the
    weights of values to float16.
    """
    rounded = UNIT_ROUNDOFF[dtype] + UNIT_ROUNDOFF["float16"]
    return rounded + 2 * 2.0**-14 + 16 * tolerance("float32", head_dim)


UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def assert_close_attention(got: tuple, expected: tuple, dtype: str) -> None:
    """Each output row and log-sum-exp; zeros, infinities and NaN where they are expected, and only there."""
    (out, lse), (wanted, wanted_lse) = got, expected
    assert (out.shape, lse.shape) == (wanted.shape, wanted_lse.shape), f"got {out.shape}, {lse.shape}"
    out, wanted = out.astype(np.float64), wanted.astype(np.float64)
    error, size = np.linalg.norm(out - wanted, axis=-1), np.linalg.norm(wanted, axis=-1)
    limit = attention_tolerance(dtype, out.shape[-1])
    fits = (error <= limit * size) | (np.isnan(out).all(-1) & np.isnan(wanted).all(-1))
    with np.errstate(invalid="ignore"):
        fits_lse = np.abs(lse - wanted_lse) <= attention_tolerance("float32", out.shape[-1]) * (1 + np.abs(wanted_lse))
        fits_lse = np.where(
            np.isfinite(wanted_lse), fits_lse, (lse == wanted_lse) | np.isnan(lse) & np.isnan(wanted_lse)
        )
    for name, fit, a, b in (("outputs", fits, out, wanted), ("log-sum-exps", fits_lse, lse, wanted_lse)):
        wrong = np.argwhere(~fit)
        first = tuple(wrong[0]) if len(wrong) else ()
        assert not len(wrong), f"{len(wrong)} of {fit.size} {name} differ, first at {first}: {a[first]}, not {b[first]}"
