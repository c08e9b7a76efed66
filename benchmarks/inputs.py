"""The timed cases of `fused_qk_scores` and their inputs."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
import torch
import triton

from tqcore.packing import packed_dim, unpack

CACHE_BYTES = 3 * 60 * 2**20  # three times the L2 of an H200
LARGEST_BURST = 48

ALWAYS = ("dense_bf16", "floor")
USUAL = (*ALWAYS, "dense_bf16_f32out")
FLOAT32 = (*USUAL, "dense_fp32", "dense_fp32_highest", "original")


@dataclass(frozen=True)
class Case:
    """B batch, K key heads, G query heads a key head, S cached positions, T query positions, D head_dim;
    keys of as many bits."""

    B: int
    K: int
    G: int
    S: int
    T: int = 1
    D: int = 128
    bits: int = 4

    def __str__(self) -> str:
        return f"B{self.B} K{self.K} G{self.G} S{self.S} T{self.T} D{self.D} bits{self.bits}"

    @property
    def bursts(self) -> list[int]:
        """The number of input sets in each burst; between two uses of a set, CACHE_BYTES are read or written."""
        sets = max(4, triton.cdiv(CACHE_BYTES, self.bytes(self.packed_dim, 2)))
        bursts = triton.cdiv(sets, LARGEST_BURST)
        return [triton.cdiv(sets, bursts)] * bursts

    @property
    def packed_dim(self) -> int:
        """Bytes of codes a key."""
        return packed_dim(self.D, self.bits)

    def bytes(self, key_bytes: int, score_bytes: int) -> int:
        """Bytes of keys and scores that must move."""
        return self.B * self.K * self.S * (key_bytes + score_bytes * self.G * self.T)


class DryCase(Case):
    @property
    def bursts(self) -> list[int]:
        return [2, 2]


# What runs on each case besides the packed implementations; the first case is the main one, and the order is that of
# interest, since --minutes may end a run before the last.
CASES: dict[Case, tuple[str, ...]] = {
    Case(B=8, K=8, G=4, S=32768): (*FLOAT32, "eager", "xla"),
    Case(B=8, K=8, G=4, S=32768, bits=3): USUAL,
    Case(B=8, K=8, G=4, S=32768, bits=2): USUAL,
    Case(B=1, K=8, G=4, S=2**17): USUAL,
    Case(B=64, K=8, G=4, S=2048): USUAL,
    Case(B=1, K=8, G=4, S=2**12): USUAL,
    Case(B=1, K=8, G=4, S=8192, T=128): (*FLOAT32, "original_loop"),
    Case(B=8, K=8, G=1, S=32768): USUAL,
    Case(B=8, K=8, G=16, S=32768): USUAL,
    Case(B=8, K=8, G=4, S=32768, D=64): USUAL,
    Case(B=8, K=8, G=4, S=32768, D=256): USUAL,
    Case(B=1, K=8, G=4, S=8192, T=16): USUAL,
    Case(B=1, K=8, G=4, S=8192, T=1024): USUAL,
    Case(B=1, K=8, G=4, S=2**16): ALWAYS,
    Case(B=1, K=8, G=4, S=2**20): ALWAYS,
    Case(B=8, K=8, G=4, S=32768, D=96): USUAL,
    Case(B=8, K=8, G=8, S=32768): USUAL,
    Case(B=8, K=8, G=4, S=32768, T=4): USUAL,
    Case(B=1, K=8, G=4, S=2**10): ALWAYS,
    Case(B=1, K=8, G=4, S=2**14): ALWAYS,
    Case(B=1, K=8, G=4, S=2**18): ALWAYS,
}
DRY_CASES: dict[Case, tuple[str, ...]] = {
    DryCase(B=1, K=2, G=2, S=48, D=64): (*FLOAT32, "eager", "xla"),
    DryCase(B=1, K=1, G=2, S=40, T=2, D=64): (*ALWAYS, "original", "original_loop"),
    DryCase(B=1, K=1, G=2, S=40, D=128, bits=3): ALWAYS,
}


class InputSets:
    """Random inputs of a case, grouped by burst, on one device; JAX reads the memory of torch."""

    def __init__(self, case: Case, centroids: np.ndarray, device: torch.device, seed: int):
        self.scale, self.table = case.D**-0.5, torch.tensor(centroids, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        codes = functools.partial(torch.randint, 0, 256, dtype=torch.uint8, generator=generator, device=device)
        q_shape, norms_shape = (case.B, case.K * case.G, case.T, case.D), (case.B, case.K, case.S)
        codes_shape, self.bits = (*norms_shape, case.packed_dim), case.bits
        packed = [
            [(normal(q_shape), codes(codes_shape), normal(norms_shape).exp() * 8) for _ in range(burst)]
            for burst in case.bursts
        ]
        self._known: dict = {("torch", None): packed}

    @property
    def packed(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of each set: queries [B, H, T, D] float32, codes [B, K, S, P] uint8, norms [B, K, S] float32."""
        return [inputs for group in self.of("torch", None) for inputs in group]

    def of(self, front: str, dtype: str | None) -> list[list[tuple]]:
        """Packed inputs, or of `dtype`: queries times scale [B, H, T, D], rotated dense keys [B, K, S, D]."""
        if (front, dtype) not in self._known:
            if front == "jax":
                found = jax.tree.map(jax.dlpack.from_dlpack, self.of("torch", dtype))
            else:
                dense = functools.partial(self._dense, dtype=getattr(torch, dtype))
                found = [[dense(*inputs) for inputs in group] for group in self.of("torch", None)]
            self._known[front, dtype] = found
        return self._known[front, dtype]

    def _dense(self, q, codes, norms, dtype):
        keys = self.table[unpack(codes, torch, self.bits).int()] * norms[..., None]
        return (q * self.scale).to(dtype), keys.to(dtype)
