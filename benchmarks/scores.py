"""The timed cases of `fused_qk_scores`: inputs, what runs on them, the gate, and the rows."""

import functools
import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import baselines
import jax
import numpy as np
import timing
import torch

import tq_torch.ops
import tqcore
import tqjax.ops
from tqcore import tuning

OP = "fused_qk_scores"
BITS = 4
LARGEST_BURST = 16
CODE_BYTES = 3 * 60 * 2**20  # three times the L2 of an H200
SLOW = ("eager", "xla")  # timed on the main case only, and without a CUDA graph

Name = tuple[str, str]  # (front, implementation)


@dataclass(frozen=True)
class Case:
    """B batch, K key heads, G query heads a key head, S cached positions, T query positions, D head_dim."""

    B: int
    K: int
    G: int
    S: int
    T: int = 1
    D: int = 128

    def __str__(self) -> str:
        return f"B{self.B} K{self.K} G{self.G} S{self.S} T{self.T} D{self.D}"

    @property
    def bursts(self) -> list[int]:
        """The number of input sets in each burst."""
        sets = max(4, tuning.ceil_div(CODE_BYTES, self.B * self.K * self.S * self.D // 2))
        bursts = tuning.ceil_div(sets, LARGEST_BURST)
        return [tuning.ceil_div(sets, bursts)] * bursts

    def bytes(self, key_bytes: int, score_bytes: int) -> int:
        """Bytes of keys and scores that must move."""
        return self.B * self.K * self.S * (key_bytes + score_bytes * self.G * self.T)


class DryCase(Case):
    @property
    def bursts(self) -> list[int]:
        return [2, 2]


CASES = (
    Case(B=8, K=8, G=4, S=32768),  # the main one
    Case(B=1, K=8, G=4, S=131072),
    Case(B=64, K=8, G=4, S=2048),
    Case(B=8, K=8, G=8, S=32768),
    Case(B=8, K=8, G=1, S=32768),
    Case(B=8, K=8, G=4, S=32768, D=64),
    Case(B=1, K=8, G=4, S=4096),
    Case(B=8, K=8, G=4, S=32768, T=4),
)
DRY_CASES = (DryCase(B=2, K=2, G=2, S=160, D=64), DryCase(B=1, K=2, G=4, S=96, T=2, D=64))


class InputSets:
    """Random inputs of a case, grouped by burst, on one device; JAX reads the memory of torch."""

    def __init__(self, case: Case, centroids: np.ndarray, device: torch.device, seed: int):
        self.scale, self.table = case.D**-0.5, torch.tensor(centroids, device=device)
        generator = torch.Generator(device).manual_seed(seed)
        normal = functools.partial(torch.randn, generator=generator, device=device)
        codes = functools.partial(torch.randint, 0, 256, dtype=torch.uint8, generator=generator, device=device)
        q_shape, norms_shape = (case.B, case.K * case.G, case.T, case.D), (case.B, case.K, case.S)
        packed = [
            [(normal(q_shape), codes((*norms_shape, case.D // 2)), normal(norms_shape).exp() * 8) for _ in range(burst)]
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
        even, odd = self.table[(codes >> 4).int()], self.table[(codes & 15).int()]
        keys = torch.stack([even, odd], -1).flatten(-2) * norms[..., None]
        return (q * self.scale).to(dtype), keys.to(dtype)


@dataclass(frozen=True)
class Candidate:
    """What is timed under a name.

    Args:
      function: (*inputs) -> [B, H, T, S].
      dtype: of dense inputs; None takes packed ones.
      key_bytes, score_bytes: that must move, of a key and of a score.
      tolerance: largest ‖scores - exact‖ / ‖exact‖; None asks for the bits of the oracle.
    """

    function: Callable[..., Any]
    dtype: str | None
    key_bytes: int
    score_bytes: int
    tolerance: float | None


def make_candidates(case: Case, main: bool, sets: InputSets, centroids: np.ndarray) -> dict[Name, Candidate]:
    heads = {"n_q_heads": case.K * case.G, "n_kv_heads": case.K}
    packed_bytes = case.D // 2 + 4
    found = {}
    for front, ops, table in (("torch", tq_torch.ops, sets.table), ("jax", tqjax.ops, centroids)):
        for name in ops.IMPLEMENTATIONS:
            if main or name not in SLOW:
                call = _packed_call(ops.fused_qk_scores, table, sets.scale, **heads, implementation=name)
                found[front, name] = Candidate(call, None, packed_bytes, 4, None)
        for name, dense in baselines.DENSE[front].items():
            key_bytes = case.D * getattr(torch, dense.dtype).itemsize
            found[front, name] = Candidate(dense.function, dense.dtype, key_bytes, dense.score_bytes, dense.tolerance)
    config = baselines.tune_original(*sets.packed[0], sets.table, sets.scale, **heads)
    call = _packed_call(baselines.original_scores, sets.table, sets.scale, **heads, config=config)
    found["torch", "original"] = Candidate(call, None, packed_bytes, 4, baselines.ORIGINAL_TOLERANCE)
    return found


def _packed_call(op, centroids, scale, **options):
    return lambda q, codes, norms: op(q, codes, norms, centroids, scale, **options)


@dataclass(frozen=True)
class Reference:
    """Scores [G, T, S] of one key head of one input set: from the oracle, and in float64 from decompressed keys."""

    batch: int
    heads: slice
    oracle: np.ndarray
    exact: np.ndarray


def make_references(case: Case, sets: InputSets, centroids: np.ndarray) -> list[Reference]:
    """One key head of each set, from the first head of the first set to the last head of the last."""
    references = []
    for i, (q, codes, norms) in enumerate(sets.packed):
        batch, kv_head = divmod(i * (case.B * case.K - 1) // (len(sets.packed) - 1), case.K)
        heads = slice(kv_head * case.G, (kv_head + 1) * case.G)
        q, codes, norms = (x.cpu().numpy() for x in (q[batch, heads], codes[batch, kv_head], norms[batch, kv_head]))
        packed = q[None], codes[None, None], norms[None, None], centroids, sets.scale
        oracle = tqcore.fused_qk_scores(*packed, n_q_heads=case.G, n_kv_heads=1)[0]
        indices = np.stack([codes >> 4, codes & 15], -1).reshape(case.S, case.D)
        keys = centroids.astype(np.float64)[indices] * norms[:, None]
        references.append(Reference(batch, heads, oracle, sets.scale * (q.astype(np.float64) @ keys.T)))
    return references


class Red(Exception):
    """A timed implementation gave a wrong score."""


def check(
    tolerance: float | None, outputs: Iterator[torch.Tensor], references: list[Reference], agreed: list[torch.Tensor]
) -> float:
    """The gate: returns the largest relative error against float64, or raises Red.

    Without a tolerance: the bits of the oracle on the slices of `references`, and everywhere the bits of `agreed`,
    the outputs of the first implementation that came through; where it is empty, it becomes these outputs.
    """
    errors, kept = [], []
    for i, (out, reference) in enumerate(zip(outputs, references, strict=True)):
        unwritten = int((~torch.isfinite(out)).sum())
        if unwritten:
            raise Red(f"set {i}: {unwritten} of {out.numel()} scores are not written, or not finite.")
        scores = out[reference.batch, reference.heads].float().cpu().numpy()
        errors.append(float(np.linalg.norm(scores - reference.exact) / np.linalg.norm(reference.exact)))
        if tolerance is not None:
            if not errors[-1] <= tolerance:
                raise Red(f"set {i}: relative error {errors[-1]:.2e}, above {tolerance:.0e}.")
            continue
        wrong = np.count_nonzero(scores.view(np.int32) != reference.oracle.view(np.int32))
        if wrong:
            raise Red(f"set {i}, batch {reference.batch}: {wrong} of {scores.size} scores differ from the oracle.")
        if agreed and not torch.equal(out.view(torch.int32), agreed[i].view(torch.int32)):
            wrong = int((out.view(torch.int32) != agreed[i].view(torch.int32)).sum())
            raise Red(f"set {i}: {wrong} of {out.numel()} scores differ between implementations.")
        kept.append(out)
    agreed[:] = agreed or kept
    return max(errors)


@dataclass
class Outcome:
    """Rows; what the gate found wrong; what did not run, and why."""

    rows: list[dict] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    not_run: list[dict] = field(default_factory=list)


def run_case(case: Case, main: bool, device: torch.device, advance: Callable[[float], None], outcome: Outcome) -> None:
    """Checks every candidate on a case and, while nothing is red, times them."""
    centroids = tqcore.Quantizer(case.D, BITS).codebook.centroids
    sets = InputSets(case, centroids, device, seed=case.S + case.G)
    references = make_references(case, sets, centroids)
    candidates = make_candidates(case, main, sets, centroids)
    bursts, errors, agreed = {}, {}, []
    for (front, name), candidate in candidates.items():
        make = functools.partial(timing.TorchBursts, capture=name not in SLOW) if front == "torch" else timing.JaxBursts
        try:
            made = make(candidate.function, sets.of(front, candidate.dtype))
            errors[front, name] = check(candidate.tolerance, made.outputs(), references, agreed)
            bursts[front, name] = made
        except Red as error:
            outcome.red.append(f"{case}, {front}/{name}, {error}")
        except Exception as error:
            if candidate.tolerance is not None or isinstance(error, NotImplementedError):
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                outcome.not_run.append({"case": str(case), "front": front, "implementation": name, "reason": reason})
            else:
                outcome.red.append(f"{case}, {front}/{name}, {traceback.format_exc()}")
        advance(0.5 / len(candidates))
    if not outcome.red:
        spreads = timing.measure(bursts, seed=0, advance=lambda share: advance(share / 2))
        outcome.rows += make_rows(case, candidates, spreads, errors)


def make_rows(
    case: Case, candidates: dict[Name, Candidate], spreads: dict[Name, timing.Spread], errors: dict[Name, float]
) -> list[dict]:
    """A row an implementation, fastest first."""

    def times_faster(us: float, baseline: Name) -> float | None:
        return round(spreads[baseline].us / us, 3) if baseline in spreads else None

    rows = []
    for (front, name), spread in sorted(spreads.items(), key=lambda item: item[1].us):
        candidate = candidates[front, name]
        row = {"op": OP, "front": front, "implementation": name, **vars(case), "bits": BITS}
        row |= {key: round(value, 3) for key, value in vars(spread).items()}
        row["bytes"] = case.bytes(candidate.key_bytes, candidate.score_bytes)
        row |= {"sets": sum(case.bursts), "calls_per_burst": case.bursts[0]}
        row["error"] = float(f"{errors[front, name]:.3g}")
        for suffix in ("bf16", "bf16_f32out", "fp32", "fp32_highest"):
            row[f"vs_{suffix}"] = times_faster(spread.us, (front, f"dense_{suffix}"))
        row["vs_original"] = times_faster(spread.us, ("torch", "original"))
        rows.append(row)
    return rows


def run(*, quick: bool, dry_run: bool, device: torch.device, advance: Callable[[str, float], None]) -> Outcome:
    """All cases, one after the other; `advance` takes the case and the share of the work done since the last time."""
    cases = DRY_CASES if dry_run else CASES
    cases = cases[:1] if quick else cases
    outcome = Outcome()
    for i, case in enumerate(cases):
        report = functools.partial(lambda case, share: advance(str(case), share / len(cases)), case)
        run_case(case, i == 0, device, report, outcome)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome
