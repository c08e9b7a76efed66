"""One way to time torch and JAX: bursts of calls over rotating inputs, between two reads of the host clock."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

SAMPLE_SECONDS = 0.01
REPEATS = 30
SLOW_PASS_SECONDS = 0.02
SLOW_REPEATS = 7

METHOD = f"""\
Host clock from the first dispatch to a synchronised device, divided by the number of calls; nothing is subtracted. \
A sample takes at least {SAMPLE_SECONDS * 1e3:.0f} ms and visits every input set equally often, in turn. Calls go out \
in bursts, one call per input set of a group of up to 16: torch replays a CUDA graph of the burst (eager, whose calls \
take milliseconds, makes plain calls), JAX dispatches one jitted function that makes the calls and returns every \
output (XLA command buffers off, so that the calls of a burst run one after the other). The packed codes of all input \
sets exceed three times the L2 cache, and there are at least four sets. Samples of all implementations of a case are \
taken in shuffled order: {REPEATS} of each, {SLOW_REPEATS} where one pass over the sets takes over \
{SLOW_PASS_SECONDS * 1e3:.0f} ms. us is their median, us_low and us_high their 10th and 90th percentiles. Queries are \
float32 and rotated before the clock starts; dense queries have the scale in them by then too."""


@dataclass(frozen=True)
class Spread:
    """Microseconds a call: median, 10th and 90th percentile of the samples."""

    us: float
    us_low: float
    us_high: float


class Bursts(Protocol):
    """A function to be called on every input set of each group; one dispatch makes the calls of a group."""

    groups: Sequence[Sequence[tuple]]

    def dispatch(self, group: int) -> None:
        """Enqueues one call per input set of the group."""

    def wait(self) -> None:
        """Returns when the device has finished."""

    def outputs(self) -> Iterator[torch.Tensor]:
        """The output of each input set, in order, written where there was NaN before."""


class TorchBursts:
    """Bursts as one CUDA graph per group; on a CPU, or without `capture`, plain calls."""

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

    def outputs(self) -> Iterator[torch.Tensor]:
        for group, results in enumerate(self.results):
            for result in results:
                result.fill_(float("nan"))
            del result
            if not self.graphs:
                results.clear()  # whose memory the next call is likely to get
            self.dispatch(group)
            self.wait()
            yield from self.results[group]


class JaxBursts:
    """Bursts as one jitted function that makes the calls of a group."""

    def __init__(self, function: Callable[..., jax.Array], groups: Sequence[Sequence[tuple]]):
        self.groups = groups
        self.burst = jax.jit(lambda group: [function(*inputs) for inputs in group])
        self.results: list[Any] = [self.burst(group) for group in groups]
        self.wait()

    def dispatch(self, group: int) -> None:
        self.results[group] = self.burst(self.groups[group])

    def wait(self) -> None:
        jax.block_until_ready(self.results)

    def outputs(self) -> Iterator[torch.Tensor]:
        for group, results in enumerate(self.results):
            shapes = [(result.shape, result.dtype) for result in results]
            results.clear()
            poison = [jnp.full(shape, jnp.nan, dtype) for shape, dtype in shapes]
            jax.block_until_ready(poison)
            del poison  # whose memory the next call is likely to get
            self.dispatch(group)
            self.wait()
            yield from (torch.from_dlpack(result) for result in self.results[group])


def measure(bursts: dict[Any, Bursts], seed: int, advance: Callable[[float], None]) -> dict[Any, Spread]:
    """Times each of `bursts`, samples in shuffled order; calls `advance` with the share done since the last time."""
    passes, schedule = {}, []
    for name, each in bursts.items():
        _seconds(each, 1)
        seconds = _seconds(each, 1)
        passes[name] = math.ceil(SAMPLE_SECONDS / seconds)
        _seconds(each, passes[name])
        schedule += [name] * (SLOW_REPEATS if seconds > SLOW_PASS_SECONDS else REPEATS)
    random.Random(seed).shuffle(schedule)
    samples = {name: [] for name in bursts}
    for name in schedule:
        calls = passes[name] * sum(map(len, bursts[name].groups))
        samples[name].append(_seconds(bursts[name], passes[name]) / calls * 1e6)
        advance(1 / len(schedule))
    return {name: Spread(*map(float, np.percentile(each, (50, 10, 90)))) for name, each in samples.items()}


def _seconds(bursts: Bursts, passes: int) -> float:
    """Seconds of `passes` passes over all input sets."""
    bursts.wait()
    start = time.perf_counter()
    for _ in range(passes):
        for group in range(len(bursts.groups)):
            bursts.dispatch(group)
    bursts.wait()
    return time.perf_counter() - start


def copy_gbps(device: torch.device, size: int, repeats: int = 20) -> float:
    """GB/s of a copy of `size` bytes on one device, bytes read plus bytes written; the median of `repeats`."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = TorchBursts(lambda source: target.copy_(source), [[(source,)] * 4], capture=False)
    _seconds(copies, 2)
    return 8 * size / float(np.median([_seconds(copies, 1) for _ in range(repeats)])) / 1e9
