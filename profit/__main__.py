"""`python -m profit` is the same as `profit`. Without the packages of the extra `train`, `doctor` still answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

try:
    from profit.errors import missing_extra
    from profit.frame import guarded, process
except KeyboardInterrupt:  # in the few milliseconds before the frame stands
    os.write(2, b"interrupted\n")
    os._exit(130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (see profit.cli.main).

    Without `argv` it is that of this process, whose signals, streams and warnings are set for it (see profit.frame).
    """
    if argv is None:
        return process(lambda: _command_line(sys.argv[1:]))
    return guarded(lambda: _command_line(argv))


def _command_line(argv: Sequence[str]) -> int:
    try:
        from profit.cli import main as command_line

        return command_line(argv)
    except ModuleNotFoundError as error:
        if missing_extra(error) is None or list(argv) != ["doctor"]:
            raise
        from profit.doctor import doctor

        doctor()
        return 0


if __name__ == "__main__":
    sys.exit(main())
