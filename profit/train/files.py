"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from profit.errors import ProfitError


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Replace `path` by `content`: temporary file beside it, fsync, rename, fsync of the folder. A link stays, its target is
    replaced.

    Raises:
        ProfitError: the folder cannot be written (full disk, no permission, ...), or `path` is a folder, a device or a pipe.
    """
    path = target(path)
    temporary = path.with_name(f".{path.name}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # what is left of a write that failed
        sync_folder(path.parent)
    except OSError as error:
        raise ProfitError(f"cannot write {path}: {error.strerror or error}") from error


def read_text(path: Path, limit: int | None = None) -> str:
    """The text of a regular file in UTF-8; a pipe, which might never end, is refused like a folder.

    Raises:
        OSError: as `open`, and for what is no regular file or longer than `limit` bytes. UnicodeDecodeError: another encoding.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file")
    if limit is not None and status.st_size > limit:
        raise OSError(None, f"it is longer than {limit:,} bytes")
    return path.read_text(encoding="utf-8")


def target(path: str | Path) -> Path:
    """The file that writing `path` replaces: the end of a link. Raises ProfitError for a folder, a device or a pipe."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ProfitError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}")
    return path


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` (after a rename, say) survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()
