"""The outermost frame of the command line: a command ends with its output, or with one line on stderr and an exit status.

Nothing here imports torch, so that it stands before anything slow or large begins.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from profit.errors import ProfitError, missing_extra, one_line, out_of_memory

EXIT_ERROR, EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_CLOSED_OUTPUT = 2, 70, 130, 141

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
_GB = 1e9

# What an interruption leaves, for its line; a command says so as soon as there is something.
kept: Callable[[], str] | None = None
_interrupted = False


def guarded(call: Callable[[], int]) -> int:
    """The exit status of `call`; whatever it raises becomes one line on stderr and a status.

    2 for what was foreseen, 70 for what was not, 130 for Ctrl-C, 141 where nobody reads the output any more. With
    PROFIT_TRACEBACK=1 in the environment a traceback goes before the line.
    """
    try:
        return call()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # the one broad except of this program: beyond it there are only tracebacks
        if os.environ.get("PROFIT_TRACEBACK") == "1":
            import traceback

            traceback.print_exc()
        status, line = _ending(error)
        if line is not None:
            say(line)
        return status


def say(line: str) -> None:
    """One line on stderr, whatever it holds, if anybody listens."""
    with suppress(OSError, ValueError, AttributeError):  # closed, or none
        print(one_line(line), file=sys.stderr, flush=True)


def _ending(error: BaseException) -> tuple[int, str | None]:
    """Exit status and line of an error."""
    if isinstance(error, KeyboardInterrupt) or (_interrupted and not isinstance(error, ProfitError)):
        return EXIT_INTERRUPTED, _interruption()
    if isinstance(error, BrokenPipeError):
        return EXIT_CLOSED_OUTPUT, None if kept is None else f"interrupted: nobody reads the output any more; {kept()}"
    foreseen = _foreseen(error)
    if foreseen is not None:
        return EXIT_ERROR, f"error: {foreseen}"
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return EXIT_INTERNAL, f"internal error: {text}; PROFIT_TRACEBACK=1 shows where; please report it"


def _foreseen(error: BaseException) -> str | None:
    """The message of an error that is no fault of this program."""
    if isinstance(error, ProfitError) or _is_backend_error(error):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (message := missing_extra(error)) is not None:
        return message
    if out_of_memory(error):
        asked = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"out of memory ({asked}): lower data.batch_size, data.eval_batch_size or data.image_size, or free memory"
    if isinstance(error, RecursionError):
        return "something is nested deeper than Python follows (RecursionError): look for deep nesting in the files given"
    if isinstance(error, UnicodeEncodeError):
        return (
            f"{error.object[error.start : error.end]!r} cannot be written in the encoding {error.encoding} of this system: "
            "use plain names, or PYTHONUTF8=1"
        )
    if isinstance(error, OSError):
        place = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes, os.PathLike)) else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk{place}: free some; a run is carried on with --resume"
        if error.errno is not None:
            return f"the system refuses{place}: {error.strerror}"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"a process that loads images was ended from outside (out of memory?): lower data.workers; {str(error)}"
    return None


def _is_backend_error(error: BaseException) -> bool:
    """Without an import of the kernels, which nobody may have needed so far."""
    dispatch = sys.modules.get("profit_kernels.dispatch")
    return dispatch is not None and isinstance(error, dispatch.BackendError)


def _interruption() -> str:
    return "interrupted" if kept is None else f"interrupted: {kept()}"


def process(call: Callable[[], int]) -> int:
    """`guarded`, in a process that does nothing else: signals, streams and warnings are set up for it, and stay so."""
    _catch_interrupts()
    _prepare_streams()
    status = guarded(lambda: _told_first(call))
    return max(status, guarded(_flushed)) if status != EXIT_CLOSED_OUTPUT else _without_output(status)


def _told_first(call: Callable[[], int]) -> int:
    for argument in sys.argv[1:]:
        if not argument.isascii() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise ProfitError(f"the argument {argument!r} is no text in {sys.getfilesystemencoding()}: rename the file, or set "
                              "PYTHONUTF8=1 where the terminal is not in UTF-8")  # fmt: skip
    _check_address_space()
    return call()


def _catch_interrupts() -> None:
    """Ctrl-C ends the process with one line, also where an import turns it into an error of its own or swallows it."""
    import signal

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as in the background of a shell: it stays so
    here = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _interrupted
        again, _interrupted = _interrupted, True
        while frame is not None and frame.f_code.co_filename != _IMPORT_SYSTEM:
            frame = frame.f_back
        if os.getpid() == here and (frame is not None or again):
            _leave()
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt) and os.getpid() == here:
            _leave()
        sys.__unraisablehook__(lost)

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = unraisable


def _leave() -> None:
    """End now. Imports cannot be interrupted in order, and files are written so that any moment will do."""
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        sys.stdout.flush()
    say(_interruption())
    os._exit(EXIT_INTERRUPTED)


def _prepare_streams() -> None:
    """No text is refused by a terminal, a closed stream is an empty one, and libraries' warnings are not ours to tell."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("PROFIT_TRACEBACK") == "1" or sys.warnoptions:
        return
    import logging
    import warnings

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"profit\b")
    warnings.showwarning = lambda message, *where, **more: say(f"warning: {message}")
    logging.getLogger().addHandler(logging.NullHandler())


def _check_address_space() -> None:
    """Loading torch into less than it needs ends in an abort of its C++ code, which nothing catches."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    from importlib.util import find_spec
    from pathlib import Path

    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        return
    needed = 4 * sum(file.stat().st_size for file in Path(torch.origin).parent.glob("lib/*.so*")) + (1 << 28)
    if limit < needed:
        raise ProfitError(f"out of memory: this process may use {limit / _GB:.1f} GB (ulimit -v), and torch alone takes up to "
                          f"{needed / _GB:.1f} GB of addresses: raise the limit")  # fmt: skip


def _flushed() -> int:
    """What is printed may fail as late as here."""
    import signal

    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        _without_output(0)
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and told
    return 0


def _without_output(status: int) -> int:
    """The interpreter flushes once more when it ends; nobody would read that."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(nowhere, stream.fileno())
    return status
