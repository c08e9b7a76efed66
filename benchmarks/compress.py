"""Times encoders, decoders and the append of one token on one NVIDIA GPU, after their outputs were checked.

    python3 benchmarks/compress.py              4, 3 and 2 bits, to benchmarks/results/<device>/compress.json
    python3 benchmarks/compress.py --quick      4 bits, to --out only
    python3 benchmarks/compress.py --dry-run    tiny cases on a CPU, interpreted kernels; the times mean nothing

Exit status: 0, or 1 where an output is wrong, or 2 where CUDA is missing.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import bench
import numpy as np

FLIPS_PER_MILLION = 2
NORM_ULPS = {"plain": 2, "corrected": 8}
CHECKED = 78_125  # vectors of 128 coordinates: 10^7
LARGE = {"B": 8, "K": 8, "S": 32768, "T": None, "D": 128}
TOKEN = {"B": 64, "K": 8, "S": 4096, "T": 1, "D": 128}
REPEATS = 15
APPENDS = 16  # of keys and values, in one program of JAX


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the results; None: benchmarks/results/<device>")
    parser.add_argument("--quick", action="store_true", help="only 4 bits")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no case after as many")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU; nothing goes to the results")
    arguments = parser.parse_args()
    bench.prepare_environment(arguments.dry_run)

    import jax
    import timing
    import torch

    dry = arguments.dry_run
    if not dry and not (torch.cuda.is_available() and jax.default_backend() == "gpu"):
        print("compress.py needs an NVIDIA GPU that both torch and JAX can use; --dry-run needs none.", file=sys.stderr)
        return 2
    start, device = time.perf_counter(), torch.device("cpu" if dry else "cuda")
    copy = timing.copy_gbps(device, size=bench.DRY_BYTES if dry else bench.COPY_BYTES)
    lead = timing.Lead(device, size=bench.DRY_BYTES if dry else timing.LEAD_BYTES)
    report = bench.describe(device, dry, timing.METHOD) | {"copy_gbps": round(copy, 1), "accuracy": [], "rows": []}
    report["not_run"] = []
    for bits in (4,) if arguments.quick or dry else (4, 3, 2):
        for cases in (accuracy, append, encode_and_decode):
            if time.perf_counter() - start > 60 * arguments.minutes:
                report["not_run"].append(f"{cases.__name__}, {bits} bits")
                continue
            for row in cases(bits, device, lead, dry):
                if row.get("us"):
                    row["copy_share"] = round(row["bytes"] / copy / 1e3 / row["us"], 4)
                print(row, flush=True)
                report["accuracy" if cases is accuracy else "rows"].append(row)
    report["seconds"] = round(time.perf_counter() - start, 1)
    if arguments.out or not (arguments.quick or dry):
        bench.write(report, (arguments.out or bench.results_folder(report)) / "compress.json")
    wrong = [row for row in report["accuracy"] if not row["right"]]
    for row in wrong:
        print(f"red: {row}")
    return 1 if wrong else 0


def accuracy(bits, device, lead, dry) -> Iterator[dict]:
    """Flips per million coordinates and the norms' distance from the oracle, of 10^7 coordinates."""
    import jax.numpy as jnp
    import torch

    import tq_torch
    import tqcore
    import tqjax
    from tqcore.packing import unpack

    x = np.random.default_rng(bits).standard_normal((1, 8 if dry else CHECKED, 128)).astype(np.float32)
    for norm, dtype in (("plain", "float32"), ("corrected", "bfloat16")):
        quantizer = tqcore.Quantizer(128, bits, norm=norm)
        given = torch.from_numpy(x).to(device).to(getattr(torch, dtype))
        expected = tqcore.compress(given.float().cpu().numpy(), quantizer)
        wanted = unpack(expected.codes, np, bits).astype(int)
        of_jax = jnp.asarray(given.float().cpu().numpy()).astype(dtype)
        fronts = [("torch", tq_torch, given, "triton")]
        if not dry:
            fronts += [("jax", tqjax, of_jax, name) for name in ("triton", "pallas_triton")]
        if not dry and dtype == "bfloat16":
            fronts += [("torch", tq_torch, given, "gluon"), ("jax", tqjax, of_jax, "gluon")]
        for front, package, argument, name in fronts:
            packed = package.compress(argument, quantizer, implementation=name)
            codes, norms = (np.asarray(a.cpu() if front == "torch" else a) for a in (packed.codes, packed.norms))
            steps = np.abs(unpack(codes, np, bits).astype(int) - wanted)
            same = (steps == 0).all(-1)
            ulps = np.abs(norms[same].view(np.int32).astype(np.int64) - expected.norms[same].view(np.int32)).max()
            flips = float(np.count_nonzero(steps) / steps.size * 1e6)
            right = bool(flips <= FLIPS_PER_MILLION and steps.max() <= 1 and ulps <= NORM_ULPS[norm])
            yield (
                {"op": "accuracy", "front": front, "implementation": name, "bits": bits, "norm": norm}
                | {"dtype": dtype, "coordinates": steps.size, "flips_per_million": round(flips, 4)}
                | {"largest_step": int(steps.max()), "norm_ulps": int(ulps), "right": right}
            )


def encode_and_decode(bits, device, lead, dry) -> list[dict]:
    """Many vectors of bfloat16, and back; keys of a row are those of benchmarks/scores.py."""
    import jax
    import torch

    import tq_torch
    import tqcore

    case = LARGE | ({"B": 1, "K": 1, "S": 8} if dry else {})
    quantizer = tqcore.Quantizer(128, bits)
    sets = [torch.randn(case["B"], case["K"], case["S"], 128, device=device).bfloat16() for _ in range(2)]
    packed = [tq_torch.compress(x, quantizer) for x in sets]
    to_jax = jax.dlpack.from_dlpack
    bytes_ = case["B"] * case["K"] * case["S"] * (2 * 128 + quantizer.packed_dim + 4)
    rows = []
    for op in ("compress", "decompress"):
        functions = {}
        gluon = ("gluon",) if op == "compress" and not dry else ()
        for name in ("triton", "eager", *gluon):
            call = functools.partial(_torch_call, op, quantizer, name)
            groups = [(x,) for x in sets] if op == "compress" else [(one.codes, one.norms) for one in packed]
            functions["torch", name] = call, groups
        for name in () if dry else ("triton", "pallas_triton", "xla", *gluon):
            call = functools.partial(_jax_call, op, quantizer, name)
            groups = [tuple(map(to_jax, given)) for given in functions["torch", "triton"][1]]
            functions["jax", name] = call, groups
        rows += _timed(op, functions, case, bits, bytes_, lead, dry)
    return rows


def _torch_call(op, quantizer, implementation, first, *norms):
    import tq_torch
    from tqcore import PackedVectors

    if op == "compress":
        return tq_torch.compress(first, quantizer, implementation=implementation).codes
    return tq_torch.decompress(
        PackedVectors(first, norms[0], quantizer), dtype="bfloat16", implementation=implementation
    )


def _jax_call(op, quantizer, implementation, first, *norms):
    import tqjax
    from tqcore import PackedVectors

    if op == "compress":
        packed = tqjax.compress(first, quantizer, implementation=implementation)
        return packed.codes, packed.norms
    return tqjax.decompress(PackedVectors(first, norms[0], quantizer), dtype="bfloat16", implementation=implementation)


def append(bits, device, lead, dry) -> list[dict]:
    """One token's keys and values, two launches: a CUDA graph in torch, one donated program in JAX."""
    import torch

    import tq_torch
    import tqcore
    from tqcore import PackedVectors

    case = TOKEN | ({"B": 2, "K": 2, "S": 8} if dry else {})
    quantizer, shape = tqcore.Quantizer(128, bits), (case["B"], case["K"], case["S"])
    codes = [torch.zeros(*shape, quantizer.packed_dim, dtype=torch.uint8, device=device) for _ in range(2)]
    norms = [torch.zeros(shape, device=device) for _ in range(2)]
    x = [torch.randn(*shape[:2], 1, 128, device=device).bfloat16() for _ in range(2)]
    starts = [torch.full((case["B"],), i % case["S"], dtype=torch.int32, device=device) for i in range(16)]
    bytes_ = 2 * case["B"] * case["K"] * (2 * 128 + quantizer.packed_dim + 4)

    def both(name, at):
        for one in range(2):
            tq_torch.append(PackedVectors(codes[one], norms[one], quantizer), x[one], at, implementation=name)
        return codes[0]

    groups = [(at,) for at in starts]
    functions: dict = {("torch", name): (functools.partial(both, name), groups) for name in ("triton", "eager")}
    for name in () if dry else ("triton", "xla"):
        functions["jax", name] = _JaxAppends(name, quantizer, codes, norms, x, starts), None
    return _timed("append", functions, case, bits, bytes_, lead, dry)


class _JaxAppends:
    """Bursts of appends to donated caches."""

    kernels = None

    def __init__(self, name, quantizer, codes, norms, x, starts):
        import jax
        import jax.numpy as jnp

        import tqjax
        from tqcore import PackedVectors

        def burst(caches, vectors, starts):
            for at in starts:
                caches = [
                    tqjax.append(cache, one, at, implementation=name)
                    for cache, one in zip(caches, vectors, strict=True)
                ]
            return caches

        of_jax = [jnp.asarray(one.float().cpu().numpy()).astype(jnp.bfloat16) for one in x]
        self.starts = [jnp.asarray(at.cpu().numpy()) for at in starts[:APPENDS]]
        self.caches = [
            PackedVectors(jnp.zeros(c.shape, jnp.uint8), jnp.zeros(n.shape, jnp.float32), quantizer)
            for c, n in zip(codes, norms, strict=True)
        ]
        self.vectors, self.groups = of_jax, [self.starts]
        lowered = jax.jit(burst, donate_argnums=0).lower(self.caches, of_jax, self.starts)
        self.burst, self.wait_for = lowered.compile(), jax.block_until_ready
        self.dispatch(0)
        self.wait()

    def dispatch(self, group):
        self.caches = self.burst(self.caches, self.vectors, self.starts)

    def wait(self):
        self.wait_for(self.caches)


class _JaxCalls:
    """Bursts of one function with several outputs."""

    kernels = None

    def __init__(self, function, groups):
        import jax

        self.groups, self.wait_for, self.results = groups, jax.block_until_ready, []
        self.burst = jax.jit(lambda group: [function(*given) for given in group]).lower(groups[0]).compile()
        self.dispatch(0)
        self.wait()

    def dispatch(self, group):
        self.results = self.burst(self.groups[group])

    def wait(self):
        self.wait_for(self.results)
        self.results = []


def _timed(op, functions, case, bits, bytes_, lead, dry) -> list[dict]:
    import timing

    bursts = {}
    for (front, name), (function, sets) in functions.items():
        if front == "torch":
            bursts[front, name] = timing.TorchBursts(function, [sets], capture=name != "eager")
        else:
            bursts[front, name] = function if sets is None else _JaxCalls(function, [sets])
    spreads = timing.measure(bursts, lead, 0, lambda share: None, 2 if dry else REPEATS)
    return [
        {"op": op, "front": front, "implementation": name, **case, "bits": bits, "bytes": bytes_}
        | {key: round(getattr(spread, key), 3) for key in ("us", "us_low", "us_high")}
        | {"host_ahead": spread.host_ahead}
        for (front, name), spread in sorted(spreads.items(), key=lambda item: item[1].us)
    ]


if __name__ == "__main__":
    sys.exit(main())
