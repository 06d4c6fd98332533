"""What a suite writes: rows, the JSON around them, and the table a person reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from profit.environment import git_commit, processor, versions
from profit.errors import ProfitError
from profit.files import target, write_atomic

from .timing import Spread, allocator

SCHEMA = 1
TIMES = ("median_s", "p20_s", "p80_s", "min_s")  # as in timing.Spread
OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@dataclass(frozen=True)
class Row:
    """One figure: seconds of one direction of one variant of one case; or, in `note`, why there is none.

    floor_s: the bytes that must move once over the copy bandwidth of the same run. kept_bytes: kept for the backward, without
    parameters. peak_bytes: the peak of a call above what was in use before it. status: "ok", "skipped" (cannot run here) or
    "failed" (a wrong result, or a process that died).
    """

    suite: str
    case: str
    variant: str
    direction: str
    device: str
    versions: str
    commit: str | None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    min_s: float | None = None
    floor_s: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    status: str = OK
    note: str = ""


@dataclass
class Report:
    """The rows of one run of a suite. Written after every case, so that a run cut short keeps what it has."""

    suite: str
    device: str
    settings: dict[str, Any]
    path: Path | None = None
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is not None:
            _check_writable(self.path)
        self._device_name, self._commit, self._versions = device_name(self.device), git_commit(), versions()
        self._created = datetime.now(UTC).isoformat(timespec="seconds")

    def add(
        self, case: str, variant: str, direction: str, spread: Spread | None = None, *, floor_s: float | None = None,
        kept_bytes: int | None = None, peak_bytes: int | None = None, status: str = OK, note: str = "",
    ) -> None:  # fmt: skip
        """Append a row; without a spread and bytes it needs a status and a note that says why."""
        times = dict(zip(TIMES, astuple(spread), strict=True)) if spread is not None else {}
        place = (self.suite, case, variant, direction, self._device_name, self.version_text, self._commit)
        memory = {"kept_bytes": kept_bytes, "peak_bytes": peak_bytes}
        self.rows.append(Row(*place, **times, floor_s=floor_s, **memory, status=status, note=note))

    @property
    def version_text(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self._versions.items() if version != "not installed")

    @property
    def failed(self) -> int:
        """How many rows hold a failure."""
        return sum(row.status == FAILED for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "schema": SCHEMA,
            "suite": self.suite,
            "created": self._created,
            "command": f"python -m benchmarks {' '.join(sys.argv[1:])}",
            "device": self._device_name,
            "threads": torch.get_num_threads(),
            "allocator": allocator(),
            "versions": self._versions,
            "commit": self._commit,
            "settings": self.settings,
            **self.facts,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self) -> None:
        """Write the JSON, if a file was asked for."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(self.to_dict(), indent=1) + "\n")

    def header(self) -> str:
        """What has to be known to read the figures."""
        return (
            f"suite {self.suite} on {self._device_name}, {torch.get_num_threads()} threads; {self.version_text}; "
            f"commit {self._commit}\nallocator: {allocator()}"
        )

    def finish(self) -> int:
        """Save, print header and table; the exit status: 1 if a row failed."""
        self.save()
        print(f"\n{self.header()}\n\n{table(self.rows)}")
        if self.path is not None:
            print(f"\nwrote {self.path}")
        if self.failed:
            message = f"error: {self.failed} of {len(self.rows)} rows have no figure because they failed; see the table"
            print(message, file=sys.stderr)
        return 1 if self.failed else 0


def _check_writable(path: Path) -> None:
    """Raise ProfitError where `write_atomic` could not write: before anything is measured, not after."""
    path = target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ProfitError(f"cannot write {path}: {error.strerror or error}") from None


def device_name(device: str) -> str:
    """The name of the GPU or of the processor."""
    return torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else processor()


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, case by case; `x auto`: time relative to the variant auto of that case and direction."""
    base = {(row.case, row.direction): row.median_s for row in rows if row.variant == "auto" and row.median_s}
    head = ("variant", "direction", "ms", "p20", "p80", "min", "floor", "x floor", "x auto", "kept MB", "peak MB", "")
    cells: list[tuple[str, ...] | str] = [head]
    case = None
    for row in rows:
        if row.case != case:
            case = row.case
            cells.append(case)
        relative = base.get((row.case, row.direction))
        floors = row.median_s / row.floor_s if row.median_s and row.floor_s else None
        cells.append(
            (
                "  " + row.variant, row.direction, *map(_milliseconds, (*(getattr(row, name) for name in TIMES), row.floor_s)),
                "" if floors is None else f"{floors:.2f}",
                f"{row.median_s / relative:.2f}" if relative and row.median_s else "",
                *("" if count is None else f"{count / 1e6:.1f}" for count in (row.kept_bytes, row.peak_bytes)),
                row.note if row.status == OK else f"{row.status}: {row.note}",
            )
        )  # fmt: skip
    widths = [max(len(line[i]) for line in cells if not isinstance(line, str)) for i in range(len(head) - 1)]
    lines = []
    for line in cells:
        if isinstance(line, str):
            lines.append(line)
            continue
        aligned = [c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(line[:-1], widths, strict=True))]
        lines.append("  ".join([*aligned, line[-1]]).rstrip())
    return "\n".join(lines)


