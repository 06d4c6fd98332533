"""`python -m profit` is the same as `profit`."""

import sys

from profit.cli import main

if __name__ == "__main__":
    sys.exit(main())
