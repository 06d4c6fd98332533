"""How time and kept memory are measured.

Variants of one case are timed in turn (A B A B), so that drift of a shared machine meets all of them. Times are medians
with the 20th and 80th percentile. On a GPU: events around the call, the L2 cache flushed before it; the flush also gives
the host time to queue a call's launches. On the CPU: the clock around the call.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from profit.train.allocator import chosen, tunables


def tuned_environment() -> dict[str, str]:
    """The environment of a measuring process: the allocator tuned, unless the user has chosen one already. Untuned, the
    allocator decides every comparison (profit/train/allocator.py says why)."""
    return dict(os.environ) if chosen(os.environ) else {**os.environ, "GLIBC_TUNABLES": tunables()}


def allocator() -> str:
    """How memory is allocated in this process, in words."""
    return chosen(os.environ) or "the system's default, untuned"


@dataclass(frozen=True)
class Call:
    """Something to time. `setup` runs untimed before each call and its result is handed to `run`; both run inside
    `context()`, which holds a choice of backend."""

    run: Callable[[Any], Any]
    setup: Callable[[], Any] = lambda: None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass(frozen=True)
class Spread:
    """Median, 20th and 80th percentile and minimum of some seconds: on a machine that others use, the minimum says more."""

    median: float
    p20: float
    p80: float
    least: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        samples = list(samples)
        if len(samples) == 1:
            return cls(*samples * 4)
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[3], min(samples))


class CpuClock:
    """Seconds of one call."""

    def __call__(self, call: Call) -> float:
        state = call.setup()
        start = time.perf_counter()
        result = call.run(state)
        seconds = time.perf_counter() - start
        del result  # freed outside the time, alike for every variant
        return seconds


class CudaClock:
    """Seconds of one call on the GPU, with a cold L2 cache."""

    def __init__(self, device: str) -> None:
        # Larger than any L2 there is (H100, H200: 50 MB; MI300X: 256 MB).
        self._flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        state = call.setup()
        self._flush.zero_()
        self._start.record()
        result = call.run(state)
        self._end.record()
        self._end.synchronize()
        del result
        return self._start.elapsed_time(self._end) * 1e-3


def clock_for(device: str) -> CpuClock | CudaClock:
    """The clock of a device."""
    return CudaClock(device) if device.startswith("cuda") else CpuClock()


def turn(call: Call, clock: Callable[[Call], float], seconds: float, most: int) -> list[float]:
    """One variant's turn: calls until `seconds` are used or there are `most`, at least one."""
    samples: list[float] = []
    with call.context():
        while not samples or (sum(samples) < seconds and len(samples) < most):
            samples.append(clock(call))
    return samples


def interleaved(
    calls: Mapping[Any, Call], clock: Callable[[Call], float], *, rounds: int, turn_s: float = 0.05, most: int = 20
) -> dict[Any, Spread]:
    """Time every call in turn, `rounds` turns each after an untimed first one; with Python's collector switched off."""
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        turn(call, clock, 0.0, 1)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for key, call in calls.items():
                turn(call, clock, 0.0, 1)  # brings back this variant's data and code
                samples[key] += turn(call, clock, turn_s, most)
    finally:
        gc.enable()
    return {key: Spread.of(values) for key, values in samples.items()}


def copy_call(numel: int, dtype: torch.dtype, device: str) -> Call:
    """A copy of one tensor: 2 * numel elements moved, the measure of every floor."""
    source, target = torch.zeros(numel, dtype=dtype, device=device), torch.zeros(numel, dtype=dtype, device=device)
    return Call(lambda _: target.copy_(source))


def capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one step, captured after three on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def kept_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of `forward()`: each storage once, those of `parameters` left out."""
    excluded = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # alive until here, and with it every storage, so that no address was used twice
    return sum(kept.values())


def why_no_compile(device: str) -> str | None:
    """Why torch.compile cannot work here; None if it can."""
    compiler = os.environ.get("CXX", "g++")  # as torch._inductor chooses it on Linux
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, {compiler!r} is not on the PATH"
    if device.startswith("cuda") and not torch.utils._triton.has_triton():
        return "torch.compile needs Triton on a GPU, and finds none that works"
    return None


def copies(moved: Mapping[str, float], copy_s: float) -> dict[str, float]:
    """Floors in seconds from tensors moved, in units of the tensor copied (a copy moves two)."""
    return {direction: tensors / 2 * copy_s for direction, tensors in moved.items()}


class Budget:
    """Time for a suite: how much is left, and whether none is. Without a limit it never ends."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def used_up(self) -> bool:
        return self.left() <= 0
