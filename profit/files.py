"""Files as every part of this package writes them: the old one or the new one, never half of one; and their digests.

New content goes to `.NAME.<16 hex digits>.tmp` beside the file, a name that nobody can guess, made anew so that no link is
followed, and then takes the file's place. The temporary file is locked while it is written: one without a lock was left by a
process that died. It is removed when the same file is written again, or when a run starts in its folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from profit.errors import ProfitError

if TYPE_CHECKING:
    from torch import Tensor

_ANY_LEFTOVER = re.compile(r"\..+\.tmp")
_STEM = 50  # characters of a name that its temporary name repeats: both must fit into 255 bytes


def write_atomic(path: str | Path, content: bytes | str, *, follow: bool = True) -> None:
    """Replace `path` by `content`: temporary file beside it, fsync, rename, fsync of the folder.

    A new file gets the rights that the umask leaves, a replaced one keeps no more than it had.

    Args:
        follow: a link stays and its target is replaced; without, the link itself is replaced (files whose names the user has
            not chosen, so that a link may be a trap).

    Raises:
        ProfitError: the folder cannot be written (full disk, no permission, ...), or `path` is a folder, a device or a pipe.
    """
    path = target(path, follow)
    data = content.encode() if isinstance(content, str) else content
    try:
        clear_leftovers(path.parent, path.name)
        handle, temporary = _temporary(path)
        with open(handle, "wb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
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


def target(path: str | Path, follow: bool = True) -> Path:
    """The file that writing `path` replaces: the end of a link. Raises ProfitError for a folder, a device or a pipe."""
    path = Path(os.path.realpath(path)) if follow else Path(os.path.realpath(Path(path).parent), Path(path).name)
    if path.exists() and not path.is_file() and (follow or not path.is_symlink()):
        raise ProfitError(f"cannot write {path}: it is {'a folder' if path.is_dir() else 'no regular file'}")
    return path


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that processes left in `folder` when they died; what is being written now stays.

    Args:
        name: of this file only. None: of all, also those that earlier versions did not lock; for a folder in which nobody
            else may write.
    """
    pattern = _ANY_LEFTOVER if name is None else re.compile(rf"\.{re.escape(name[:_STEM])}\.[0-9a-f]{{16}}\.tmp")
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if pattern.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for entry in found:
        with suppress(OSError):  # somebody else's, or gone meanwhile
            handle = os.open(entry.path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(entry.path).unlink()
            finally:
                os.close(handle)


def _temporary(path: Path) -> tuple[int, Path]:
    """A new, locked file beside `path`, open for writing."""
    while True:
        temporary = path.with_name(f".{path.name[:_STEM]}.{secrets.token_hex(8)}.tmp")
        # opened with its final rights, not chmodded: the umask belongs to all threads and can only be asked by changing it
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if _locked(handle):
                _restrict(handle, path)
                return handle, temporary
        except BaseException:
            os.close(handle)
            temporary.unlink(missing_ok=True)
            raise
        os.close(handle)
        temporary.unlink(missing_ok=True)


def _locked(handle: int) -> bool:
    """Lock a temporary file. False: between its making and now another process took it for a leftover."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where nobody can take it for a leftover either
        return True
    return os.fstat(handle).st_nlink > 0


def _restrict(handle: int, path: Path) -> None:
    """Take away the rights that the file at `path` does not give."""
    with suppress(FileNotFoundError):
        old, new = (stat.S_IMODE(status.st_mode) for status in (os.lstat(path), os.fstat(handle)))
        if new & ~old:
            os.fchmod(handle, new & old)


def open_to_append(path: Path) -> TextIO:
    """Open a text file to write at its end, one that is made if it is missing; what UTF-8 cannot hold is written as `\\udc80`.

    Raises:
        OSError: a link, which might lead anywhere; no regular file; or no right to write it.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a pipe without reader would wait for one

    try:
        file = open(path, "a", encoding="utf-8", errors="backslashreplace", opener=opener)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a link, which is not followed: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, f"{path.name} is no regular file")
    return file


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


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's content. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(head: str, tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of `head` and of every tensor with its name, dtype, shape and bytes, in the order of the names."""
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(raw_bytes(value).numpy())
    return digest.hexdigest()


def raw_bytes(value: Tensor) -> Tensor:
    """The bytes of a tensor `[any shape]` as uint8 `[numel * itemsize]`, on the CPU."""
    import torch

    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
