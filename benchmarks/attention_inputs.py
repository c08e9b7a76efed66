"""The timed cases of attention, their inputs, what runs on them, and the gate."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gate
import jax
import jax.numpy as jnp
import torch
import triton
from inputs import CACHE_BYTES, LARGEST_BURST
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import tq_torch
import tq_torch.attention_ops
import tqjax
import tqjax.attention_ops
from tq_torch import eager_attention
from tqcore import rotation, softmax
from tqcore.packing import packed_dim, unpack
from tqcore.quantizer import PackedVectors, Quantizer

OURS, DENSE = 1e-3, 5e-2  # largest relative errors: of packed implementations, and of bfloat16 ones
PLAIN_IMPLEMENTATIONS = ("eager", "xla")
PREFILL = 256  # query positions, from which on lengths are not given and "dense" is timed, with bfloat16 queries


@dataclass(frozen=True)
class Case:
    """B, K, G, S, T and D as in `inputs.Case`; the bits of keys and values; the positions of a page, if paged."""

    B: int
    K: int
    G: int
    S: int
    T: int = 1
    D: int = 128
    bits: tuple[int, int] = (4, 4)
    page: int | None = None

    def __str__(self) -> str:
        name = f"B{self.B} K{self.K} G{self.G} S{self.S} T{self.T} D{self.D} bits{self.bits[0]}/{self.bits[1]}"
        return f"{name} page{self.page}" if self.page else name

    @property
    def causal(self) -> bool:
        return self.T > 1

    @property
    def bursts(self) -> list[int]:
        """The number of input sets in each burst, as in `inputs.Case`."""
        sets = max(4, triton.cdiv(CACHE_BYTES, self.bytes("packed")))
        bursts = triton.cdiv(sets, LARGEST_BURST)
        return [triton.cdiv(sets, bursts)] * bursts

    def bytes(self, form: str) -> int:
        """Of keys and values, which must move."""
        each = sum(packed_dim(self.D, bits) + 4 for bits in self.bits) if form == "packed" else 4 * self.D
        return self.B * self.K * self.S * each

    def row(self) -> dict[str, Any]:
        return vars(self) | {"bits": f"{self.bits[0]}/{self.bits[1]}"}


class DryCase(Case):
    @property
    def bursts(self) -> list[int]:
        return [2, 2]


MAIN = Case(B=8, K=8, G=4, S=32768)
CASES = [
    MAIN,
    replace(MAIN, B=1, S=2**17),
    replace(MAIN, B=64, S=2048),
    replace(MAIN, B=1, S=8192),
    *(replace(MAIN, page=page) for page in (16, 64)),
    *(replace(MAIN, G=G) for G in (1, 2, 8)),
    *(replace(MAIN, D=D) for D in (64, 256)),
    *(replace(MAIN, bits=bits) for bits in ((4, 3), (3, 3), (4, 2), (2, 2))),
    replace(MAIN, T=5),
    Case(B=1, K=8, G=4, S=8192, T=1024),
]
DRY_CASES = [DryCase(B=1, K=2, G=2, S=96, D=64), DryCase(B=2, K=1, G=2, S=40, T=2, D=64, page=16)]


def quantizers(case: Case) -> tuple[Quantizer, Quantizer]:
    return Quantizer(case.D, case.bits[0], seed=1), Quantizer(case.D, case.bits[1], seed=2)


def vectors(case: Case, k_codes, k_norms, v_codes, v_norms, lengths, pages=None):
    """Keys, values, lengths and page table of packed inputs."""
    of_keys, of_values = quantizers(case)
    return PackedVectors(k_codes, k_norms, of_keys), PackedVectors(v_codes, v_norms, of_values), lengths, pages


class InputSets:
    """Random inputs of a case, grouped by burst, on one device; JAX reads the memory of torch.

    "packed": query [B, H, T, D] float32, codes and norms of keys and values, lengths, and pages where there are any.
    "dense": rotated query, keys and values in bfloat16, [B, H, T, D] and [B, K, S, D]; "dense_bsk": with S before K.
    """

    def __init__(self, case: Case, device: torch.device, seed: int):
        self.case = case
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device
        self._known: dict = {("torch", "packed"): [[self._packed() for _ in range(burst)] for burst in case.bursts]}

    def _packed(self):
        case, like = self.case, {"generator": self.generator, "device": self.device}
        slots = (case.B, case.K, case.S)
        table = ()
        if case.page:
            pages = case.B * triton.cdiv(case.S, case.page)
            slots = (pages, case.K, case.page)
            table = (torch.randperm(pages, **like).to(torch.int32).reshape(case.B, -1),)
        arrays = []
        for bits in case.bits:
            codes = torch.randint(0, 256, (*slots, packed_dim(case.D, bits)), dtype=torch.uint8, **like)
            arrays += [codes, (torch.randn(slots, **like) * 0.3).exp() * case.D**0.5]
        query = torch.randn((case.B, case.K * case.G, case.T, case.D), **like)
        lengths = torch.full((case.B,), case.S, dtype=torch.int32, device=self.device)
        return query, *arrays, lengths, *table

    def of(self, front: str, form: str) -> list[list[tuple]]:
        if (front, form) not in self._known:
            if front == "jax":
                found = jax.tree.map(jax.dlpack.from_dlpack, self.of("torch", form))
            else:
                found = [[self._dense(form, *inputs) for inputs in group] for group in self.of("torch", "packed")]
            self._known[front, form] = found
        return self._known[front, form]

    def _dense(self, form, query, *packed):
        keys, values, _, pages = vectors(self.case, *packed)
        dense = [tq_torch.rotate(query, keys.quantizer).bfloat16()]
        for vector in (keys, values):
            table = torch.tensor(vector.quantizer.codebook.centroids, device=query.device)
            x = table[unpack(vector.codes, torch, vector.quantizer.bits).int()] * vector.norms[..., None]
            if pages is not None:
                x = x[pages.long()].swapaxes(1, 2).flatten(2, 3)[:, :, : self.case.S]
            dense.append(x.bfloat16())
        return tuple(x.swapaxes(1, 2).contiguous() for x in dense) if form == "dense_bsk" else tuple(dense)


@dataclass(frozen=True)
class Candidate:
    """What is timed: a function of inputs in a form; `rotated`: its output is in the rotated space of the values."""

    function: Callable[..., Any]
    form: str
    tolerance: float
    rotated: bool = False


def candidates(case: Case) -> dict[tuple[str, str], Candidate]:
    """By (front, implementation)."""
    found = {}
    for front, package in (("torch", tq_torch), ("jax", tqjax)):
        for name in package.attention_ops.IMPLEMENTATIONS:
            if name not in PLAIN_IMPLEMENTATIONS and (name != "dense" or case.T >= PREFILL):
                tolerance = OURS if name != "dense" else DENSE
                found[front, name] = Candidate(functools.partial(_ours, case, package, name), "packed", tolerance)
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        for folded in (False, True) if case.T == 1 and case.G > 1 else (False,):
            function = functools.partial(_sdpa, case, backend, folded)
            found["torch", f"sdpa_{name}_folded" if folded else f"sdpa_{name}"] = Candidate(
                function, "dense", DENSE, rotated=True
            )
    for folded in (False, True) if case.T == 1 and case.G > 1 else (False,):
        function = functools.partial(_jax_dense, case, folded)
        name = "cudnn_bf16_folded" if folded else "cudnn_bf16"
        found["jax", name] = Candidate(function, "dense_bsk", DENSE, rotated=True)
    return found


def _ours(case, package, implementation, query, *packed):
    keys, values, lengths, pages = vectors(case, *packed)
    options = {"is_causal": case.causal, "implementation": implementation}
    if case.T >= PREFILL:
        lengths = None
    if implementation == "dense":
        query = query.astype(jnp.bfloat16) if package is tqjax else query.bfloat16()
    return package.attention(query, keys, values, kv_lengths=lengths, page_table=pages, **options)


def _sdpa(case, backend, folded, query, keys, values):
    """torch's attention; `folded`: the query heads of a key head as positions of one head."""
    if folded:
        query = query.reshape(case.B, case.K, case.G, case.D)
    mask = causal_lower_right(case.T, keys.shape[2]) if case.causal else None
    with sdpa_kernel(backend):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, enable_gqa=not folded and case.G > 1
        )
    return out.reshape(case.B, case.K * case.G, case.T, case.D)


def _jax_dense(case, folded, query, keys, values):
    """JAX's attention, of arrays with S before K."""
    if folded:
        query = query.reshape(case.B, case.K, case.G, case.D).swapaxes(1, 2)
    mask = None
    if case.causal:
        size = keys.shape[1]
        mask = (jnp.arange(size) <= size - case.T + jnp.arange(case.T)[:, None])[None, None]
    out = jax.nn.dot_product_attention(query, keys, values, mask=mask, implementation="cudnn")
    out = out.swapaxes(1, 2) if folded or case.T > 1 else out
    return out.reshape(case.B, case.K * case.G, case.T, case.D)


@dataclass(frozen=True)
class Reference:
    """Attention [G, T, D] of one key head of one input set, in float64: rotated back, and not."""

    batch: int
    heads: slice
    out: torch.Tensor
    rotated: torch.Tensor


def references(case: Case, sets: InputSets) -> list[Reference]:
    """One key head of each set, from the first of the first set to the last of the last."""
    inputs = [each for group in sets.of("torch", "packed") for each in group]
    heads = (i * (case.B * case.K - 1) // (len(inputs) - 1) for i in range(len(inputs)))
    return [_reference(case, *divmod(head, case.K), *each) for head, each in zip(heads, inputs, strict=True)]


def _reference(case, batch, head, query, *packed):
    keys, values, lengths, pages = vectors(case, *packed)
    heads = slice(head * case.G, (head + 1) * case.G)
    query, sequence = query[batch : batch + 1, heads], slice(batch, batch + 1)

    def part(x):
        x = x[:, head : head + 1]
        return x[sequence] if pages is None else x[pages[batch].long()].swapaxes(0, 1).flatten(1, 2)[None]

    keys, values = keys.map(part), values.map(part)
    matrix = torch.tensor(rotation.matrix(values.quantizer), device=query.device).double()
    library = replace(
        eager_attention.library_of(query),
        wide=torch.Tensor.double,
        matmul=torch.matmul,
        scores=lambda *given: tq_torch.ops.packed_scores(*given, implementation="eager").double(),
        dequantize=lambda packed: tq_torch.ops.dequantize(packed).double(),
        unrotate=lambda x, quantizer: x,
    )
    options = softmax.Options(case.D**-0.5, case.causal, None, None, None)
    rotated = softmax.attention(query, keys, values, lengths[sequence], None, None, options, library)[0][0]
    return Reference(batch, heads, rotated @ matrix, rotated)


def check(candidate: Candidate, outputs, references: list[Reference]) -> float:
    """Returns the largest relative error of a query row against float64, or raises Red."""
    worst = 0.0
    for i, out in outputs:
        reference = references[i]
        if not bool(torch.isfinite(out).all()):
            raise gate.Red(f"set {i}: outputs that are not finite, or not written.")
        exact = reference.rotated if candidate.rotated else reference.out
        got = out[reference.batch, reference.heads].double()
        error = float(((got - exact).norm(dim=-1) / exact.norm(dim=-1)).max())
        if not error <= candidate.tolerance:
            raise gate.Red(f"set {i}: relative error {error:.2e}, above {candidate.tolerance:.0e}.")
        worst = max(worst, error)
    return worst
