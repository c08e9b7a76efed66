"""Times attention over packed keys and values on one NVIDIA GPU, after a gate: no number unless its output is right.

An implementation that is wrong on a case is not timed there; the results name it, and the others are timed.

    python3 benchmarks/attention.py               all cases, to benchmarks/results/<device>/attention.json
    python3 benchmarks/attention.py --minutes 5   the main case first; starts no case after as many minutes
    python3 benchmarks/attention.py --only TEXT   the cases whose names contain it, to --out only
    python3 benchmarks/attention.py --sweep       launch configurations at the main case, fastest first
    python3 benchmarks/attention.py --decode N    N steps of a filling cache in each framework: compilations, times
    python3 benchmarks/attention.py --dry-run     tiny cases on a CPU, interpreted kernels, to --out only

Exit status: 0, or 1 where an output is wrong, or 2 where CUDA is missing.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import sys
import time
import traceback
from pathlib import Path

import bench

RATIOS = ("vs_sdpa_bf16", "vs_cudnn_bf16")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results; None: benchmarks/results/<device>")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after as many")
    parser.add_argument("--only", default="", help="the cases whose names contain it")
    parser.add_argument("--sweep", action="store_true", help="time launch configurations")
    parser.add_argument("--decode", type=int, metavar="N", help="steps of a decode loop")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU; nothing goes to the results")
    arguments = parser.parse_args()
    bench.prepare_environment(arguments.dry_run)

    # These read the environment when they are imported.
    import attention_decode
    import attention_inputs
    import jax
    import timing
    import torch

    if not arguments.dry_run and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        print("attention.py needs an NVIDIA GPU that both torch and JAX can use.", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    cases = attention_inputs.DRY_CASES if arguments.dry_run else attention_inputs.CASES
    cases = [case for case in cases if arguments.only in str(case)]
    if arguments.sweep:
        return sweep(cases[0], device)
    start = time.perf_counter()
    report = bench.describe(device, arguments.dry_run, timing.METHOD)
    folder = arguments.out or bench.results_folder(report)
    if arguments.decode:
        found = attention_decode.run(arguments.decode, device, small=arguments.dry_run)
        print(json.dumps({front: one["compiled"] for front, one in found.items()}))
        bench.write(report | {"op": "attention_decode", "fronts": found}, folder / "attention_decode.json")
        return 0
    size = bench.DRY_BYTES if arguments.dry_run else bench.COPY_BYTES
    copy = timing.copy_gbps(device, size=size)
    lead = timing.Lead(device, size=bench.DRY_BYTES if arguments.dry_run else timing.LEAD_BYTES)
    rows, red, not_run = [], [], []
    for i, case in enumerate(cases):
        if time.perf_counter() > start + 60 * arguments.minutes:
            not_run.append(skipped(case, None, None, "no time was left for it"))
            continue
        print(f"{time.perf_counter() - start:6.1f} s  {case}", file=sys.stderr)
        run_case(case, device, lead, i == 0, rows, red, not_run, repeats=2 if arguments.dry_run else timing.REPEATS)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for line in red:
        print(f"red: {line}", file=sys.stderr)
    if not rows:
        print("No output is right; no time is reported.", file=sys.stderr)
        return 1
    for row in rows:
        row["floor_us"] = round(row["bytes"] / copy / 1e3, 3)
        row["copy_share"] = round(row["floor_us"] / row["us"], 4)
    report |= {"copy_gbps": round(copy, 1), "dispatch_us": lead.dispatch_us()}
    report |= {"seconds": round(time.perf_counter() - start, 1), "rows": rows, "not_run": not_run, "red": red}
    bench.tell(report, RATIOS)
    if arguments.out or not (arguments.only or arguments.dry_run):
        bench.write(report, folder / "attention.json")
    return 1 if red else 0


def skipped(case, front, name, reason):
    return {"case": str(case), "front": front, "implementation": name, "reason": reason}


def run_case(case, device, lead, main_case, rows, red, not_run, repeats):
    """Checks every candidate on a case, and times those that are right."""
    import attention_inputs
    import gate
    import scores
    import timing

    sets = attention_inputs.InputSets(case, device, seed=case.S + case.G)
    references = attention_inputs.references(case, sets)
    candidates = attention_inputs.candidates(case)
    bursts, errors, extra = {}, {}, {}
    for (front, name), one in candidates.items():
        try:
            inputs = sets.of(front, one.form)
            make = timing.TorchBursts if front == "torch" else timing.JaxBursts
            made = make(one.function, inputs)
            errors[front, name] = attention_inputs.check(one, made.outputs(), references)
            if main_case and one.form == "packed":
                extra[front, name] = scores.extra_bytes(front, one.function, inputs[0][0])
            bursts[front, name] = made
        except gate.Red as wrong:
            red.append(f"{case}, {front}/{name}, {wrong}")
        except Exception as raised:
            if one.form == "packed" and not isinstance(raised, (NotImplementedError, timing.Merged)):
                red.append(f"{case}, {front}/{name}, {traceback.format_exc()}")
            else:
                not_run.append(skipped(case, front, name, f"{type(raised).__name__}: {raised}".partition("\n")[0]))
    if not bursts:
        return
    spreads = timing.measure(bursts, lead, 0, lambda share: None, repeats)
    baselines = {
        "vs_sdpa_bf16": [one.us for (front, name), one in spreads.items() if name.startswith("sdpa")],
        "vs_cudnn_bf16": [one.us for (front, name), one in spreads.items() if name.startswith("cudnn")],
    }
    for (front, name), spread in sorted(spreads.items(), key=lambda item: item[1].us):
        made = bursts[front, name]
        row = {"op": "attention", "front": front, "implementation": name, **case.row()}
        row |= {key: round(getattr(spread, key), 3) for key in ("us", "us_low", "us_high")}
        row["bytes"] = case.bytes(candidates[front, name].form)
        row |= {"sets": sum(case.bursts), "calls_per_burst": len(made.groups[0])}
        row |= {"kernels": made.kernels, "host_ahead": spread.host_ahead}
        row |= {"error": float(f"{errors[front, name]:.3g}"), "extra_bytes": extra.get((front, name))}
        for ratio, times in baselines.items():
            row[ratio] = round(min(times) / spread.us, 3) if times else None
        rows.append(row)


SWEEP = {
    "triton": ((8,), (64, 128, 256), (4, 8), (2, 3, 4), (2, 3, 4, 6, 8, 12, 16)),
    "gluon": ((8,), (32, 64), (1,), (2, 3, 4), (8, 16, 24, 32)),
}


def sweep(case, device) -> int:
    """Times (block_r, block_s, num_warps, num_stages, splits) and prints them, fastest first."""
    import attention_inputs
    import timing

    from tq_torch import triton_attention
    from tqcore import softmax, tuning

    sets = attention_inputs.InputSets(case, device, seed=0)
    options = softmax.Options(case.D**-0.5, case.causal, None, None, None)
    for name, space in SWEEP.items():
        found = []
        for block_r, block_s, num_warps, num_stages, splits in itertools.product(*space):
            config = tuning.AttentionConfig(block_r, block_s, splits, num_warps, num_stages)
            call = functools.partial(triton_attention.attention, implementation=name, config=config)

            def function(query, *packed, call=call):
                keys, values, lengths, pages = attention_inputs.vectors(case, *packed)
                return call(query, keys, values, lengths, pages, None, options)[0]

            try:
                bursts = timing.TorchBursts(function, sets.of("torch", "packed"))
                passes = math.ceil(timing.SAMPLE_SECONDS / timing.sample((bursts, 1))[0])
                seconds = sorted(timing.sample((bursts, passes))[0] for _ in range(5))[2]
                found.append((seconds / passes / sum(case.bursts) * 1e6, vars(config)))
            except Exception as raised:
                print(f"{name} {vars(config)}: {type(raised).__name__}: {str(raised)[:80]}", file=sys.stderr)
        for us, config in sorted(found, key=lambda pair: pair[0])[:40]:
            print(f"{case} {name} {us:8.1f} µs  {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
