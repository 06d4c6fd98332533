"""Where the tests' random numbers come from: fresh in every run, repeated by PROFIT_TEST_SEED."""

from __future__ import annotations

import os
import secrets
import zlib

# Set before xdist starts its workers, which take it over.
BASE_SEED = os.environ.setdefault("PROFIT_TEST_SEED", str(secrets.randbelow(10**6)))


def seed_of(name: str) -> int:
    """The seed of a test, a file or whatever else has a name of its own."""
    return zlib.crc32(f"{BASE_SEED}:{name}".encode())
