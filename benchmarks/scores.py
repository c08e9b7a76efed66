"""The rows of `fused_qk_scores`: what runs on each case, through the gate, and how long it takes."""

import functools
import gc
import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import baselines
import gate
import jax
import numpy as np
import timing
import torch
from gate import BITS_OF_THE_ORACLE, EVERY_SCORE_WRITTEN
from inputs import CASES, DRY_CASES, Case, InputSets

import tq_torch.ops
import tqcore
import tqjax.ops

OP = "fused_qk_scores"
OPTIONAL = ("eager", "xla")  # the packed implementations that run only on the cases that name them
NOT_CAPTURED = ("eager",)

Name = tuple[str, str]  # (front, implementation)


@dataclass(frozen=True)
class Candidate:
    """What is timed under a name.

    Args:
      function: of packed inputs, or of dense ones of `dtype`.
      dtype: of dense queries and keys; None: packed.
      key_bytes, score_bytes: that must move, of a key and of a score.
      tolerance: as in `gate.check`.
      ours: an implementation of this package.
    """

    function: Callable[..., Any]
    dtype: str | None
    key_bytes: int
    score_bytes: int
    tolerance: float
    ours: bool = False


def make_candidates(
    case: Case, optional: tuple[str, ...], sets: InputSets, centroids: np.ndarray
) -> dict[Name, Candidate]:
    heads = {"n_q_heads": case.K * case.G, "n_kv_heads": case.K}
    packed_bytes = case.packed_dim + 4
    found = {}
    for front, ops, table in (("torch", tq_torch.ops, sets.table), ("jax", tqjax.ops, centroids)):
        for name in ops.IMPLEMENTATIONS:
            if name in optional or name not in OPTIONAL:
                call = _packed_call(ops.fused_qk_scores, table, sets.scale, **heads, implementation=name)
                found[front, name] = Candidate(call, None, packed_bytes, 4, BITS_OF_THE_ORACLE, ours=True)
        for name, dense in baselines.DENSE[front].items():
            if name in optional:
                bytes_ = case.D * getattr(torch, dense.dtype).itemsize, dense.score_bytes
                found[front, name] = Candidate(dense.function, dense.dtype, *bytes_, dense.tolerance)
    groups = sets.of("torch", None)
    if "original" in optional:
        config = baselines.tune_original(groups, sets.table, sets.scale)
        for name in ("original", "original_loop"):
            if name in optional:
                loop = {"config": config, "loop": name == "original_loop"}
                call = _packed_call(baselines.original_scores, sets.table, sets.scale, **loop)
                found["torch", name] = Candidate(call, None, packed_bytes, 4, baselines.ORIGINAL_TOLERANCE)
    if "floor" in optional:
        call = functools.partial(baselines.floor_scores, config=baselines.tune_floor(groups))
        found["torch", "floor"] = Candidate(call, None, packed_bytes, 4, EVERY_SCORE_WRITTEN)
    return found


def _packed_call(op, centroids, scale, **options):
    return lambda q, codes, norms: op(q, codes, norms, centroids, scale, **options)


def extra_bytes(front: str, function: Callable, inputs: tuple) -> int | None:
    """Peak bytes on the device beyond inputs and output, of one call; None for torch on a CPU."""
    if front == "jax":
        return jax.jit(function).lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    if not inputs[0].is_cuda:
        return None
    function(*inputs)  # what it keeps, such as the table, is an input from then on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    output = function(*inputs)
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del output
    return peak - after


@dataclass
class Outcome:
    """Rows; what the gate found wrong; what did not run, and why."""

    rows: list[dict] = field(default_factory=list)
    red: list[str] = field(default_factory=list)
    not_run: list[dict] = field(default_factory=list)


@dataclass
class Measured:
    """What is known of a candidate that came through the gate."""

    bursts: timing.Bursts
    error: float
    extra_bytes: int | None = None
    spread: timing.Spread | None = None


@dataclass
class Run:
    """What all cases share, and what they add to."""

    lead: timing.Lead
    device: torch.device
    repeats: int
    outcome: Outcome = field(default_factory=Outcome)


def prepare(
    run: Run,
    case: Case,
    main: bool,
    sets: InputSets,
    candidates: dict[Name, Candidate],
    references: list[gate.Reference],
    advance: Callable[[float], None],
) -> dict[Name, Measured]:
    """Builds the bursts of every candidate and puts their outputs through the gate."""
    measured, agreed = {}, {}
    for (front, name), candidate in candidates.items():
        try:
            inputs = sets.of(front, candidate.dtype)
            capture = functools.partial(timing.TorchBursts, capture=name not in NOT_CAPTURED)
            bursts = (capture if front == "torch" else timing.JaxBursts)(candidate.function, inputs)
            error = gate.check(candidate.tolerance, bursts.outputs(), references, agreed)
            extra = extra_bytes(front, candidate.function, inputs[0][0]) if main and candidate.ours else None
            measured[front, name] = Measured(bursts, error, extra)
        except gate.Red as wrong:
            run.outcome.red.append(f"{case}, {front}/{name}, {wrong}")
        except Exception as raised:
            if not candidate.ours or isinstance(raised, (NotImplementedError, timing.Merged)):
                reason = f"{type(raised).__name__}: {raised}".partition("\n")[0]
                skipped = {"case": str(case), "front": front, "implementation": name, "reason": reason}
                run.outcome.not_run.append(skipped)
            else:
                run.outcome.red.append(f"{case}, {front}/{name}, {traceback.format_exc()}")
        advance(0.5 / len(candidates))
    return measured


def make_rows(case: Case, candidates: dict[Name, Candidate], measured: dict[Name, Measured]) -> list[dict]:
    """A row an implementation, fastest first."""

    def times_faster(us: float, *baselines: Name) -> float | None:
        """Than the first of `baselines` that ran."""
        return next((round(measured[name].spread.us / us, 3) for name in baselines if name in measured), None)

    rows = []
    for (front, name), one in sorted(measured.items(), key=lambda item: item[1].spread.us):
        candidate, us = candidates[front, name], one.spread.us
        row = {"op": OP, "front": front, "implementation": name, **vars(case)}
        row |= {key: round(getattr(one.spread, key), 3) for key in ("us", "us_low", "us_high")}
        row["bytes"] = case.bytes(candidate.key_bytes, candidate.score_bytes)
        row |= {"sets": sum(case.bursts), "calls_per_burst": len(one.bursts.groups[0])}
        row |= {"kernels": one.bursts.kernels, "host_ahead": one.spread.host_ahead}
        row["error"] = None if candidate.tolerance == EVERY_SCORE_WRITTEN else float(f"{one.error:.3g}")
        row["extra_bytes"] = one.extra_bytes
        for suffix in ("bf16", "bf16_f32out", "fp32", "fp32_highest"):
            row[f"vs_{suffix}"] = times_faster(us, (front, f"dense_{suffix}"))
        row["vs_original"] = times_faster(us, ("torch", "original_loop"), ("torch", "original"))
        floor = measured.get(("torch", "floor"))
        row["vs_floor"] = floor and round(us / floor.spread.us, 3)
        rows.append(row)
    return rows


def run_case(run: Run, case: Case, optional: tuple[str, ...], main: bool, advance: Callable[[float], None]) -> None:
    """Checks every candidate on a case and, while nothing is red, times them."""
    centroids = tqcore.Quantizer(case.D, case.bits).codebook.centroids
    sets = InputSets(case, centroids, run.device, seed=case.S + case.G)
    references = gate.make_references(case, sets, centroids)
    candidates = make_candidates(case, optional, sets, centroids)
    measured = prepare(run, case, main, sets, candidates, references, advance)
    if run.outcome.red:
        return
    bursts = {name: one.bursts for name, one in measured.items()}
    spreads = timing.measure(bursts, run.lead, 0, lambda share: advance(share / 2), run.repeats)
    for name, spread in spreads.items():
        measured[name].spread = spread
    run.outcome.rows += make_rows(case, candidates, measured)


def run(
    *,
    quick: bool,
    dry_run: bool,
    lead: timing.Lead,
    device: torch.device,
    advance: Callable[[str, float], None],
    deadline: float = math.inf,
) -> Outcome:
    """All cases, one after the other, of which none starts after `deadline`, in seconds of `time.perf_counter`.

    `advance` takes the case and the share of the work done since the last time.
    """
    cases = list((DRY_CASES if dry_run else CASES).items())
    cases = cases[:1] if quick else cases
    shared = Run(lead, device, repeats=2 if dry_run else timing.REPEATS)
    for i, (case, optional) in enumerate(cases):
        if time.perf_counter() > deadline:
            left = {"case": str(case), "front": None, "implementation": None, "reason": "no time was left for it"}
            shared.outcome.not_run.append(left)
            continue
        report = functools.partial(lambda case, share: advance(str(case), share / len(cases)), case)
        run_case(shared, case, optional, i == 0, report)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return shared.outcome
