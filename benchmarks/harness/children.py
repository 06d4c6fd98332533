"""Variants timed in turn although each lives in a process of its own.

The parent starts one process per variant, waits until each is ready (built, checked, warm), and then gives out turns. A
process that dies costs its own figures only; its traceback is on standard error.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from .peak import peak_bytes
from .timing import Budget, Call, Spread, clock_for, kept_bytes, turn


class Unavailable(Exception):
    """A variant that cannot run here; the message says why."""


class WrongResult(Exception):
    """A variant whose result is not that of the reference; the message says how far off it is."""


@dataclass(frozen=True)
class Prepared:
    """A variant ready to be timed. `forward`, `parameters`: what kept_bytes is counted on; `facts`: for the report."""

    call: Call
    device: str
    forward: Callable[[], Any] | None = None
    parameters: tuple[torch.Tensor, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def _serve(connection: Connection, prepare: Callable[[Any], Prepared], job: Any) -> None:
    """The child: prepare, then answer ("turn", seconds, most), ("kept",) and ("peak",) until the parent hangs up."""
    try:
        prepared = prepare(job)
    except Unavailable as reason:
        connection.send(("skipped", str(reason)))
        return
    except WrongResult as reason:
        connection.send(("failed", str(reason)))
        return
    clock = clock_for(prepared.device)
    turn(prepared.call, clock, 0.0, 1)
    release(prepared.device)
    connection.send(("ok", prepared.facts))
    while True:
        try:
            message, *arguments = connection.recv()
        except EOFError:
            return
        if message == "turn":
            gc.collect()
            gc.disable()
            turn(prepared.call, clock, 0.0, 1)  # brings back this variant's data
            connection.send(turn(prepared.call, clock, *arguments))
            gc.enable()
            release(prepared.device)
        elif message == "peak":
            with prepared.call.context():
                setup = prepared.call.setup()
                peak = peak_bytes(lambda: prepared.call.run(setup), prepared.device, prepared.parameters)  # noqa: B023
            connection.send(peak)
        else:
            with prepared.call.context():
                count = None if prepared.forward is None else kept_bytes(prepared.forward, prepared.parameters)
            connection.send(count)


def release(device: str) -> None:
    """Give cached memory of the GPU back: the next variant may need all of it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


@dataclass
class Outcome:
    """What became of a variant: "ok" with times, or "skipped" / "failed" with a note."""

    status: str
    note: str = ""
    spread: Spread | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class _Child:
    def __init__(self, prepare: Callable[[Any], Prepared], job: Any) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, prepare, job), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, timeout_s: float) -> Any:
        """The next message; raises _Lost where none comes."""
        try:
            if self.connection.poll(timeout_s):
                return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise _Lost(f"its process ended with status {self.process.exitcode}; its output is above the table") from None
        raise _Lost(f"no answer within {timeout_s:g} s")

    def ask(self, timeout_s: float, *message: Any) -> Any:
        try:
            self.connection.send(message)
        except BrokenPipeError:
            pass  # receive says what happened
        return self.receive(timeout_s)

    def close(self) -> None:
        self.connection.close()  # a child that waits for a turn ends by this; one that compiles does not
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Lost(Exception):
    """A child that does not answer."""


def measure(
    prepare: Callable[[Any], Prepared], jobs: Mapping[str, Any], *, rounds: int, turn_s: float, most: int = 20,
    timeout_s: float = 1800.0, at_once: int = 1, say: Callable[[str], None] = lambda text: None,
    budget: Budget | None = None, peak: bool = False,
) -> dict[str, Outcome]:  # fmt: skip
    """Time `prepare(job)` of every job in turn, `rounds` turns of `turn_s` seconds (at most `most` calls) each.

    Args:
        prepare: an importable function; runs in the child, may raise Unavailable or WrongResult.
        jobs: variant -> what `prepare` takes.
        timeout_s: for a child to prepare, and for a turn.
        at_once: how many children prepare at the same time; none is timed meanwhile.
        rounds: 0 times nothing.
        peak: measure the peak memory of a call, too (peak.py).
        budget: variants not prepared when it ends are skipped, and no further round begins after the first.
    """
    budget = budget or Budget(None)
    outcomes: dict[str, Outcome] = {}
    ready: dict[str, _Child] = {}
    waiting: dict[str, _Child] = {}
    samples: dict[str, list[float]] = {}
    queue = list(jobs)
    try:
        for name in jobs:
            while queue and len(waiting) < at_once and not budget.used_up():
                waiting[queue[0]] = _Child(prepare, jobs[queue[0]])
                queue.pop(0)
            child = waiting.get(name)
            if child is None:
                outcomes[name] = Outcome("skipped", "no time left")
                continue
            outcomes[name] = _prepared(child, timeout_s, budget)
            waiting.pop(name)
            if outcomes[name].status == "ok":
                ready[name] = child
            else:
                child.close()
            say(f"{name}: {outcomes[name].status}{outcomes[name].note and f' ({outcomes[name].note})'}")
        for done in range(rounds):
            if done and budget.used_up():
                break
            for name, child in list(ready.items()):
                try:
                    samples.setdefault(name, []).extend(child.ask(timeout_s, "turn", turn_s, most))
                except _Lost as reason:
                    outcomes[name] = Outcome("failed", str(reason))
                    ready.pop(name).close()
        for name, child in ready.items():
            outcomes[name].spread = Spread.of(samples[name]) if rounds else None
            try:
                outcomes[name].kept_bytes = child.ask(timeout_s, "kept")
                outcomes[name].peak_bytes = child.ask(timeout_s, "peak") if peak else None
            except _Lost as reason:
                outcomes[name] = Outcome("failed", str(reason))
    finally:
        for child in (*ready.values(), *waiting.values()):
            child.close()
    return {name: outcomes[name] for name in jobs}


def _prepared(child: _Child, timeout_s: float, budget: Budget) -> Outcome:
    """Wait until a child is ready, or the time is over."""
    left = max(budget.left(), 0.1)
    try:
        status, content = child.receive(min(timeout_s, left))
    except _Lost as reason:
        late = budget.used_up() and child.process.is_alive()
        return Outcome("skipped", "not ready when the time was over") if late else Outcome("failed", str(reason))
    return Outcome(status, facts=content) if status == "ok" else Outcome(status, content)
