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

from .timing import Call, Spread, clock_for, kept_bytes, turn


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
    """The child: prepare, then answer ("turn", seconds, most) and ("kept",) until the parent hangs up."""
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
            if prepared.device.startswith("cuda"):
                torch.cuda.empty_cache()  # the next variant may need all the memory
        else:
            with prepared.call.context():
                count = None if prepared.forward is None else kept_bytes(prepared.forward, prepared.parameters)
            connection.send(count)


@dataclass
class Outcome:
    """What became of a variant: "ok" with times, or "skipped" / "failed" with a note."""

    status: str
    note: str = ""
    spread: Spread | None = None
    kept_bytes: int | None = None
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
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Lost(Exception):
    """A child that does not answer."""


def measure(
    prepare: Callable[[Any], Prepared], jobs: Mapping[str, Any], *, rounds: int, turn_s: float, most: int = 20,
    timeout_s: float = 1800.0, say: Callable[[str], None] = lambda text: None, used_up: Callable[[], bool] = lambda: False,
) -> dict[str, Outcome]:  # fmt: skip
    """Time `prepare(job)` of every job in turn, `rounds` turns of `turn_s` seconds (at most `most` calls) each.

    Args:
        prepare: an importable function; runs in the child, may raise Unavailable or WrongResult.
        jobs: variant -> what `prepare` takes; prepared one after the other.
        timeout_s: for a child to prepare, and for a turn.
        used_up: whether the time for the suite is over; the variants not prepared by then are skipped, and no further
            round begins after the first.
    """
    outcomes: dict[str, Outcome] = {}
    children: dict[str, _Child] = {}
    samples: dict[str, list[float]] = {}
    try:
        for name, job in jobs.items():
            if used_up():
                outcomes[name] = Outcome("skipped", "no time left")
                continue
            child = _Child(prepare, job)
            try:
                status, content = child.receive(timeout_s)
            except _Lost as reason:
                status, content = "failed", str(reason)
            if status == "ok":
                children[name], samples[name] = child, []
                outcomes[name] = Outcome(status, facts=content)
            else:
                child.close()
                outcomes[name] = Outcome(status, content)
            say(f"{name}: {status}{'' if status == 'ok' else f' ({content})'}")
        for done in range(rounds):
            if done and used_up():
                break
            for name, child in children.items():
                if outcomes[name].status != "ok":
                    continue
                try:
                    samples[name] += child.ask(timeout_s, "turn", turn_s, most)
                except _Lost as reason:
                    outcomes[name] = Outcome("failed", str(reason))
        for name, child in children.items():
            if outcomes[name].status == "ok":
                try:
                    outcomes[name].kept_bytes = child.ask(timeout_s, "kept")
                    outcomes[name].spread = Spread.of(samples[name])
                except _Lost as reason:
                    outcomes[name] = Outcome("failed", str(reason))
    finally:
        for child in children.values():
            child.close()
    return {name: outcomes[name] for name in jobs}
