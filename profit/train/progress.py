"""What a run tells while it trains: a progress bar per phase, or plain lines; the lines always go to log.txt too."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from profit.errors import ProfitError
from profit.files import open_to_append
from profit.schedule import Phase


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    """Warnings as lines for people, complete when the block is left."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield lines
    lines += dict.fromkeys(f"warning: {' '.join(str(warning.message).split())}" for warning in found)


class Progress:
    """Progress on the terminal, in `log.txt` and, if wanted, for TensorBoard. A context manager.

    Args:
        folder: the run folder.
        quiet: plain lines instead of a moving bar.
        tensorboard: write curves to `folder`/tensorboard.
        first_epoch: later curve points of an earlier attempt are dropped (resume).
        stream: where lines go; standard output by default.
    """

    def __init__(
        self, folder: Path, *, quiet: bool, tensorboard: bool, first_epoch: int = 0, stream: TextIO | None = None
    ) -> None:
        self.quiet, self.stream = quiet, stream or sys.stdout
        log = folder / "log.txt"
        if log.exists() and not log.is_file():
            raise ProfitError(f"cannot write {log}: it is {'a folder' if log.is_dir() else 'no regular file'}")
        try:
            self._log = open_to_append(log)
        except OSError as error:
            raise ProfitError(f"cannot write the output folder {folder}: {error.strerror or error}") from None
        self._bar: Any = None
        self._curves: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def line(self, text: str) -> None:
        """One line for people and for the log."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.stream, flush=True)
        self._keep(text)

    def begin_phase(self, phase: Phase, label: str, steps: int, done: int) -> None:
        """Open the bar of a phase of `steps` optimizer steps, `done` of them done before; on a terminal only."""
        if self.quiet or not self.stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  acc {task.fields[accuracy]}  {task.fields[rate]:.0f} img/s"),
            TimeRemainingColumn(compact=True),
            console=Console(file=self.stream),
            refresh_per_second=4,
            transient=True,
        )
        description = f"{label} {phase.name} {phase.bits}"
        self._task = self._bar.add_task(
            description, total=steps, completed=done, loss=0.0, accuracy="  -  ", rate=0.0, start=True
        )
        self._phase_start, self._images = time.perf_counter(), 0
        self._bar.start()

    def step(self, loss: float, lr: float, images: int, steps: int = 1) -> None:
        """Optimizer steps were taken; `loss` is that of the last one."""
        if self._bar is None:
            return
        self._images += images
        rate = self._images / max(time.perf_counter() - self._phase_start, 1e-9)
        self._bar.update(self._task, advance=steps, loss=loss, rate=rate)

    def end_epoch(self, phase: Phase, label: str, row: dict[str, Any], images_per_s: float, global_epoch: int) -> None:
        """An epoch is over; `row` is its entry in the phase's history."""
        accuracy = _percent(row["accuracy"])
        if self._bar is not None:
            # the bar shows what the line would; the log keeps the line
            self._bar.update(self._task, accuracy=accuracy)
        text = (
            f"{label} {phase.name} {phase.bits} epoch {row['epoch']}/{phase.epochs} lr {row['lr']:.2e} "
            f"loss {row['train_loss']:.4f} acc {accuracy} ema {_percent(row['accuracy_ema'])} {images_per_s:.0f} img/s"
        )
        if self.quiet:
            print(text, file=self.stream, flush=True)
        self._keep(text)
        names = ("lr", "train_loss", "test_loss", "accuracy", "accuracy_ema")
        self._plot({**{name: row[name] for name in names if row[name] is not None}, "images_per_s": images_per_s}, global_epoch)

    def end_phase(self, label: str, row: dict[str, Any]) -> None:
        """A phase is over; `row` is its entry in results.json."""
        self._close_bar()
        self.line(
            f"{label} {row['name']} {row['bits']}: {row['epochs']} epochs, {row['frozen']} layers frozen, "
            f"accuracy {_percent(row['accuracy'])} (average of weights {_percent(row['accuracy_ema'])}), "
            f"{row['wall_s']:.1f} s"
        )

    def scores(self, scores: dict[str, float], global_epoch: int) -> None:
        """AIWQ per layer, for TensorBoard."""
        self._plot({f"aiwq/{name}": value for name, value in scores.items()}, global_epoch)

    def _keep(self, text: str) -> None:
        """A line of the log."""
        try:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()
        except OSError as error:
            raise ProfitError(f"cannot write {self._log.name}: {error.strerror or error}") from error

    def _plot(self, values: dict[str, float], step: int) -> None:
        """Points of TensorBoard's curves."""
        if self._curves is None:
            return
        try:
            for name, value in values.items():
                self._curves.add_scalar(name, value, step)
        except OSError as error:
            raise ProfitError(f"cannot write the curves for TensorBoard: {error.strerror or error}") from error

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def close(self) -> None:
        """Leave the terminal and the files in order."""
        self._close_bar()
        # on a full disk closing fails once more: the error that ends the run is the one to tell
        for file in (self._curves, self._log):
            if file is not None:
                with suppress(OSError):
                    file.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class NoProgress(Progress):
    """Says and writes nothing: every process but the first."""

    def __init__(self) -> None:
        self._bar = self._curves = None

    def line(self, text: str) -> None: ...

    def begin_phase(self, phase: Phase, label: str, steps: int, done: int) -> None: ...

    def end_epoch(self, phase: Phase, label: str, row: dict[str, Any], images_per_s: float, global_epoch: int) -> None: ...

    def end_phase(self, label: str, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def _percent(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.2f}%"
