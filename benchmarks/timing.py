"""One way to time torch and JAX: bursts of calls over rotating inputs, enqueued while the device is still busy."""

import gc
import math
import random
import re
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

SAMPLE_SECONDS = 0.004
REPEATS = 25
SLOW_PASS_SECONDS = 0.02
SLOW_REPEATS = 7
LEAD_BYTES = 2**32
LARGEST_LEAD = 16
JAX_BURST_CALLS = 16
JAX_BURST_BYTES = 2**31

METHOD = f"""\
Device time, read from the host clock. A sample is a lead (sums over {LEAD_BYTES / 2**30:.0f} GiB of other data, about \
a millisecond each) and, right behind it, bursts of calls for at least {SAMPLE_SECONDS * 1e3:.0f} ms; the host \
enqueues the calls while the device still works on the lead, so that how long it takes to do so is not in the result. \
The clock runs from the first dispatch to a synchronised device; the median time of the lead alone is subtracted, and \
with it what launching and waiting cost once; the rest is divided by the number of calls. host_ahead says whether the \
lead lasted until the last call was enqueued (medians); where it did not, us is an upper bound. dispatch_us is what \
one more burst, of one small kernel, adds behind a lead. A burst calls once per input set of a group of up to 48: \
torch replays a CUDA graph (eager, whose calls take milliseconds, makes plain calls); JAX runs one compiled function \
that makes the calls and returns every output. There a group is repeated up to at least {JAX_BURST_CALLS} calls (or \
{JAX_BURST_BYTES / 2**30:.0f} GiB of scores), and every argument of every call is a parameter of its own, so that XLA \
has nothing to merge; that it merged nothing is read off the compiled HLO (kernels: its kernels a call). XLA command \
buffers are off, so that the calls of a burst run one after the other. Between two uses of an input set at least three \
times the L2 cache is read or written, and there are at least four sets. Samples of all implementations of a case are \
taken in shuffled order: {REPEATS} of each, {SLOW_REPEATS} where one pass over the sets takes over \
{SLOW_PASS_SECONDS * 1e3:.0f} ms. us is their median, us_low and us_high their 10th and 90th percentiles. Queries are \
float32 and rotated before the clock starts; dense queries have the scale in them by then too."""


@dataclass(frozen=True)
class Spread:
    """Microseconds a call: median, 10th and 90th percentile of the samples; whether the host was ahead."""

    us: float
    us_low: float
    us_high: float
    host_ahead: bool


class Bursts(Protocol):
    """A function to be called on every input set of each group; one dispatch makes the calls of a group."""

    groups: Sequence[Sequence[tuple]]
    kernels: int | None

    def dispatch(self, group: int) -> None:
        """Enqueues the calls of the group."""

    def wait(self) -> None:
        """Returns when the device has finished."""

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The input set and the output of each call, in order, written where there was NaN before."""


class TorchBursts:
    """Bursts as one CUDA graph per group; on a CPU, or without `capture`, plain calls."""

    kernels = None  # not counted

    def __init__(
        self, function: Callable[..., torch.Tensor], groups: Sequence[Sequence[tuple]], *, capture: bool = True
    ):
        self.function, self.groups = function, groups
        self.on_cuda = groups[0][0][0].is_cuda
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.results = [[function(*inputs) for inputs in group] for group in groups]
        self.wait()
        for group in range(len(groups) if capture and self.on_cuda else 0):
            self.results[group].clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX has threads of its own
                self.results[group] += [function(*inputs) for inputs in groups[group]]
            self.graphs.append(graph)

    def dispatch(self, group: int) -> None:
        if self.graphs:
            self.graphs[group].replay()
        else:
            self.results[group] = [self.function(*inputs) for inputs in self.groups[group]]

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        sets = 0
        for group, results in enumerate(self.results):
            for result in results:
                result.fill_(float("nan"))
            if results:
                del result
            if not self.graphs:
                results.clear()  # whose memory the next call is likely to get
            self.dispatch(group)
            self.wait()
            yield from enumerate(self.results[group], sets)
            sets += len(self.groups[group])


LARGE_OPS = ("custom-call", "dot", "while", "call", "conditional")
FREE_OPS = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element")


class Merged(Exception):
    """A compiled burst has not one kernel, or more, for every call."""


class JaxBursts:
    """Bursts as one compiled function of a group, repeated until it has `calls` calls or JAX_BURST_BYTES of outputs."""

    def __init__(
        self, function: Callable[..., jax.Array], groups: Sequence[Sequence[tuple]], *, calls: int = JAX_BURST_CALLS
    ):
        out = jax.eval_shape(function, *groups[0][0])
        fit = JAX_BURST_BYTES // (len(groups[0]) * out.size * out.dtype.itemsize)
        repeats = max(1, min(fit, math.ceil(calls / len(groups[0]))))
        self.sets, self.groups = len(groups[0]), [list(group) * repeats for group in groups]
        self.burst = jax.jit(lambda group: [function(*inputs) for inputs in group]).lower(self.groups[0]).compile()
        self.kernels = kernels_per_call(self.burst.as_text(), len(self.groups[0]))
        self.results: list[Any] = [None] * len(groups)
        for group in range(len(groups)):
            self.dispatch(group)
        self.wait()

    def dispatch(self, group: int) -> None:
        self.results[group] = self.burst(self.groups[group])

    def wait(self) -> None:
        """Returns when the device has finished; the outputs go back to JAX's pool."""
        jax.block_until_ready(self.results)
        self.results = [None] * len(self.groups)

    def outputs(self) -> Iterator[tuple[int, torch.Tensor]]:
        for group in range(len(self.groups)):
            poison = [jnp.full(one.shape, jnp.nan, one.dtype) for one in self.burst.out_info]
            jax.block_until_ready(poison)
            del poison  # whose memory the next call is likely to get
            results = jax.block_until_ready(self.burst(self.groups[group]))
            for call, result in enumerate(results):
                yield group * self.sets + call % self.sets, torch.from_dlpack(result)


def kernels_per_call(hlo: str, calls: int) -> int:
    """Kernels a call in the entry computation of a burst of `calls` calls; raises Merged where that is no integer.

    Counts custom calls, custom fusions, products and loops; where there are none, whatever computes.
    """
    entry = hlo[hlo.index("\nENTRY") :].partition("\n}")[0]
    found = re.findall(r"^ +(?:ROOT )?%?\S+ = .*? ([a-z][a-z0-9-]*)\((.*)$", entry, re.M)
    large = [op for op, rest in found if op in LARGE_OPS or (op == "fusion" and "kind=kCustom" in rest)]
    count = len(large) or sum(op not in FREE_OPS for op, _ in found)
    if count == 0 or count % calls:
        raise Merged(f"{calls} calls were compiled to {count} kernels.")
    return count // calls


class Lead:
    """Work that keeps the device busy while the host enqueues calls behind it."""

    def __init__(self, device: torch.device, size: int = LEAD_BYTES):
        x = torch.rand(size // 4, device=device)
        y = jax.dlpack.from_dlpack(x)
        total, small = (lambda x: x.sum(0)), slice(0, 256)
        self.bursts: dict[str, Bursts] = {
            "torch": TorchBursts(total, [[(x,)]], capture=False),
            "jax": JaxBursts(total, [[(y,)]], calls=1),
        }
        self.small: dict[str, Bursts] = {
            "torch": TorchBursts(total, [[(x[small],)]]),
            "jax": JaxBursts(total, [[(y[small],)]], calls=1),
        }
        self.seconds = {front: self._median(front, 4) / 4 for front in self.bursts}

    def _median(self, front: str, times: int, *then: tuple[Bursts, int]) -> float:
        return float(np.median([sample((self.bursts[front], times), *then)[0] for _ in range(9)]))

    def times(self, front: str, enqueue_seconds: float) -> int:
        """How many dispatches of the lead take twice as long as it takes to enqueue the calls behind it."""
        return min(LARGEST_LEAD, max(2, math.ceil(2 * enqueue_seconds / self.seconds[front])))

    def dispatch_us(self) -> dict[str, float]:
        """Of each front: microseconds that one more burst, of one small kernel, adds behind a lead."""
        found = {}
        for front, small in self.small.items():
            seconds = self._median(front, 4, (small, 16)) - self._median(front, 4)
            found[front] = round(seconds / 16 * 1e6, 2)
        return found


def measure(
    bursts: dict[tuple[str, str], Bursts],
    lead: Lead,
    seed: int,
    advance: Callable[[float], None],
    repeats: int = REPEATS,
) -> dict[tuple[str, str], Spread]:
    """Times `bursts` by (front, implementation), in shuffled order; tells `advance` the share done since last time."""
    plans, schedule = {}, []
    for (front, name), each in bursts.items():
        sample((each, 1))
        pass_seconds, _ = sample((each, 1))
        passes = math.ceil(SAMPLE_SECONDS / pass_seconds)
        _, enqueue_seconds = sample((lead.bursts[front], 4), (each, passes))
        plans[front, name] = passes, lead.times(front, enqueue_seconds)
        schedule += [(front, name)] * (min(repeats, SLOW_REPEATS) if pass_seconds > SLOW_PASS_SECONDS else repeats)
    leads = sorted({(front, times) for (front, _), (_, times) in plans.items()})
    schedule += leads * repeats
    random.Random(seed).shuffle(schedule)
    samples: dict[Hashable, list[tuple[float, float]]] = {name: [] for name in schedule}
    gc.collect()
    gc.disable()
    for front, name in schedule:
        if isinstance(name, int):
            found = sample((lead.bursts[front], name))
        else:
            passes, times = plans[front, name]
            found = sample((lead.bursts[front], times), (bursts[front, name], passes))
        samples[front, name].append(found)
        advance(1 / len(schedule))
    gc.enable()
    spreads = {}
    for (front, name), (passes, times) in plans.items():
        lead_seconds = float(np.median([seconds for seconds, _ in samples[front, times]]))
        seconds, enqueue_seconds = np.array(samples[front, name]).T
        calls = passes * sum(map(len, bursts[front, name].groups))
        us = (np.percentile(seconds, (50, 10, 90)) - lead_seconds) / calls * 1e6
        spreads[front, name] = Spread(*map(float, us), bool(np.median(enqueue_seconds) < lead_seconds))
    return spreads


def sample(*work: tuple[Bursts, int]) -> tuple[float, float]:
    """Seconds of passes over all groups of each of `work`, one behind the other; and until they were enqueued."""
    for bursts, _ in work:
        bursts.wait()
    start = time.perf_counter()
    for bursts, passes in work:
        for _ in range(passes):
            for group in range(len(bursts.groups)):
                bursts.dispatch(group)
    enqueued = time.perf_counter()
    for bursts, _ in reversed(work):
        bursts.wait()
    return time.perf_counter() - start, enqueued - start


def fastest(functions: dict[Any, Callable[..., torch.Tensor]], groups: Sequence[Sequence[tuple]]) -> Any:
    """The key of the function that takes least time over `groups`; on a CPU the first key."""
    if not groups[0][0][0].is_cuda:
        return next(iter(functions))
    seconds = {}
    for key, function in functions.items():
        bursts = TorchBursts(function, groups)
        passes = math.ceil(SAMPLE_SECONDS / sample((bursts, 1))[0])
        seconds[key] = np.median([sample((bursts, passes))[0] for _ in range(5)]) / passes
    return min(seconds, key=seconds.get)


def copy_gbps(device: torch.device, size: int, repeats: int = 20) -> float:
    """GB/s of a copy of `size` bytes on one device, bytes read plus bytes written; the median of `repeats`."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = TorchBursts(lambda source: target.copy_(source), [[(source,)] * 4], capture=False)
    sample((copies, 2))
    return 8 * size / float(np.median([sample((copies, 1))[0] for _ in range(repeats)])) / 1e9
