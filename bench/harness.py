"""One case of a benchmark: `measure` checks every contender, then `compare` times them in turn.

Contenders take turns round by round, so that what else the machine does falls on all alike. On CUDA
they are timed by events, over rotated inputs that together exceed the cache.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.peak import peak_bytes
from tests.operator_checks import relative_error

CACHE_BYTES = 256 << 20  # more than the last-level cache of any GPU so far
ROUNDS = 30
ROUND_SECONDS = 2e-2  # a contender repeats its call until one turn takes about so long
LONG_SECONDS = 0.5  # a call that takes so long loses nothing by a cold cache

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured: contenders[0] is ours.

    `inputs()` makes fresh arguments, all of which get gradients. `bytes` and `flop` are what one
    call must at least move and compute; `tolerance` bounds each contender's relative error against
    `reference`, which is given the arguments in `reference_dtype`. `floors` are timed too, but
    compute something less. `memory` names those whose peak memory is measured on a CPU, too.
    """

    contenders: dict[str, Function]
    reference: Function
    inputs: Callable[[], tuple[Tensor, ...]]
    direction: str  # "forward", "backward" or "both"
    bytes: int
    flop: int
    tolerance: float
    floors: dict[str, Function] = field(default_factory=dict)
    reference_dtype: torch.dtype = torch.float64
    memory: Sequence[str] = ()


def measure(benchmark: Any, case: Case, rounds: int = ROUNDS) -> None:
    """Check `case`, time it, and put the figures into benchmark.extra_info."""
    first = case.inputs()
    device = first[0].device
    copies = 1
    if device.type == "cuda":
        size = sum(tensor.nbytes for tensor in first)
        copies = max(2, -(-CACHE_BYTES // size))
    inputs = [first, *(case.inputs() for _ in range(copies - 1))]
    _check(case, first)
    functions = case.contenders | case.floors
    timed = {name: calls(function, case.direction, inputs) for name, function in functions.items()}
    compare(benchmark, timed, device, case.direction, case.bytes, case.flop, rounds)
    if device.type == "cuda":
        peaks = {name: cuda_peak_bytes(call) for name, call in timed.items()}
    else:
        make = {
            name: partial(calls, functions[name], case.direction, [first]) for name in case.memory
        }
        peaks = {name: peak_bytes(make[name]) for name in case.memory}
    if peaks:
        benchmark.extra_info["peak_bytes"] = peaks


def compare(
    benchmark: Any,
    timed: dict[str, Callable[[], Any]],
    device: torch.device,
    direction: str,
    bytes: int,
    flop: int,
    rounds: int,
) -> None:
    """Time the calls, ours first; medians in seconds and the shares of the limits `bytes` and
    `flop` go to benchmark.extra_info."""
    timed = timed | {"copy": _copies(bytes, device)}
    turns = {name: _Turn(call, device) for name, call in timed.items()}
    ours, *peers = turns

    def let_peers_go() -> None:
        for peer in peers:
            turns[peer].go()

    benchmark.pedantic(turns[ours].go, setup=let_peers_go, rounds=rounds)
    medians = {name: statistics.median(turn.seconds) for name, turn in turns.items()}
    benchmark.extra_info |= {
        "device": _device_name(device),
        "direction": direction,
        "bytes": bytes,
        "flop": flop,
        "median_seconds": medians,
        "spread": {name: turn.spread() for name, turn in turns.items()},
        "share_of_copy": medians["copy"] / medians[ours],
        "flop_per_second": flop / medians[ours],
    }


class _Turn:
    """A contender's turns: calls per turn, and seconds per call of each turn taken."""

    def __init__(self, calls: Callable[[], Any], device: torch.device) -> None:
        self.calls, self.device = calls, device
        self.repeats = 1
        self.long = False
        self.seconds: list[float] = []
        once = self._time()
        self.long = once > LONG_SECONDS
        if not self.long:
            once = [self._time() for _ in range(2)][-1]
        self.repeats = max(1, round(ROUND_SECONDS / once))

    def go(self) -> None:
        self.seconds.append(self._time())

    def spread(self) -> float:
        """Interquartile range over median."""
        low, middle, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / middle

    def _time(self) -> float:
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(self.repeats):
                self.calls()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.repeats
        if not self.long:
            self.calls()  # the contender before has filled the cache with data of its own
        start_time = time.perf_counter()
        for _ in range(self.repeats):
            self.calls()
        return (time.perf_counter() - start_time) / self.repeats


def calls(
    function: Function, direction: str, inputs: Sequence[tuple[Tensor, ...]]
) -> Callable[[], Any]:
    """A call of no arguments that goes through `inputs` in turn."""
    rotation = itertools.cycle(range(len(inputs)))
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs[next(rotation)])

        return forward
    # What a compiled contender saved for backward is needed again at the next call.
    torch._functorch.config.donated_buffer = False
    leaves = [tuple(t.detach().requires_grad_() for t in args) for args in inputs]
    if direction == "both":
        # One by one: the graphs of all copies would not fit beside each other.
        cotangents = [torch.randn_like(function(*args)) for args in leaves]

        def both() -> tuple[Tensor, ...]:
            i = next(rotation)
            return torch.autograd.grad(function(*leaves[i]), leaves[i], cotangents[i])

        return both

    outputs = [function(*args) for args in leaves]
    cotangents = [torch.randn_like(output) for output in outputs]

    def backward() -> tuple[Tensor, ...]:
        i = next(rotation)
        return torch.autograd.grad(outputs[i], leaves[i], cotangents[i], retain_graph=True)

    return backward


def _check(case: Case, args: tuple[Tensor, ...]) -> None:
    """Each contender's output, and its gradients unless only forward is timed, beforehand."""
    truth = _results(case, case.reference, [arg.to(case.reference_dtype) for arg in args])
    for name, function in case.contenders.items():
        for actual, true in zip(_results(case, function, args), truth, strict=True):
            error = relative_error(actual, true)
            if not error <= case.tolerance:
                raise AssertionError(f"{name} is wrong: relative error {error:.2e}")


def _results(case: Case, function: Function, args: Sequence[Tensor]) -> list[Tensor]:
    if case.direction == "forward":
        with torch.no_grad():
            return [function(*args)]
    leaves = [tensor.detach().requires_grad_() for tensor in args]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]


def _copies(total_bytes: int, device: torch.device) -> Callable[[], Any]:
    """A copy that moves as many bytes as the case must: the memory limit, measured."""
    count = max(2, -(-CACHE_BYTES // total_bytes)) if device.type == "cuda" else 1
    sources = [
        torch.randint(255, (total_bytes // 2,), device=device, dtype=torch.uint8)
        for _ in range(count)
    ]
    targets = [torch.empty_like(source) for source in sources]
    rotation = itertools.cycle(range(count))

    def copy() -> Tensor:
        i = next(rotation)
        return targets[i].copy_(sources[i])

    return copy


def cuda_peak_bytes(call: Callable[[], Any], before: int | None = None) -> int:
    """Device memory at the peak of one call, above `before` or what stood before the call."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    if before is None:
        before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
