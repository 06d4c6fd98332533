"""`python -m profit` is the same as `profit`. Without the packages of the extra `train`, `doctor` still answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from profit.errors import missing_extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (see profit.cli.main)."""
    try:
        from profit.cli import main as command_line

        return command_line(argv)
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        if list(sys.argv[1:] if argv is None else argv) == ["doctor"]:
            from profit.doctor import doctor

            doctor()
            return 0
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the imports of a command are under way
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
