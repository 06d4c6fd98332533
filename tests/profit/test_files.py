"""Writing files: nobody's link is followed, nothing half written stays, the umask counts."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import subprocess
import sys

import pytest
import torch

from profit.errors import ProfitError
from profit.files import clear_leftovers, open_to_append, sha256_of_file, sha256_of_tensors, write_atomic

LEFTOVER = ".f.json.0123456789abcdef.tmp"


@pytest.fixture
def umask():
    """Sets the umask for a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def temporary_names(folder, monkeypatch) -> list[str]:
    """The temporary names of two writes of one file."""
    found, replace = [], os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: (found.append(os.fspath(source)), replace(source, target)))
        for text in "ab":
            write_atomic(folder / "f.json", text)
    return [os.path.basename(name) for name in found]


def test_temporary_names_cannot_be_foreseen(tmp_path, monkeypatch) -> None:
    one, two = temporary_names(tmp_path, monkeypatch)
    assert one != two and all(name.startswith(".f.json.") and len(name) == len(LEFTOVER) for name in (one, two))
    assert names(tmp_path) == ["f.json"] and (tmp_path / "f.json").read_text() == "b"


def test_a_link_where_the_temporary_file_would_be_is_not_followed(tmp_path, monkeypatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    tries = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr("secrets.token_hex", lambda count: next(tries))  # an attacker who could foresee the name
    (tmp_path / f".f.json.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(ProfitError, match="cannot write .*f.json: File exists"):
        write_atomic(tmp_path / "f.json", "new")
    assert victim.read_text() == "mine" and not (tmp_path / "f.json").exists()
    for old in (".f.json.tmp", "f.json.tmp"):  # names of other programs and of earlier versions
        (tmp_path / old).symlink_to(victim)
    write_atomic(tmp_path / "f.json", "new")
    assert victim.read_text() == "mine" and (tmp_path / "f.json").read_text() == "new"


def test_a_link_in_place_of_a_file_of_our_own_naming_is_replaced(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "results.json").symlink_to(victim)
    write_atomic(tmp_path / "results.json", "new", follow=False)
    assert victim.read_text() == "mine"
    assert not (tmp_path / "results.json").is_symlink() and (tmp_path / "results.json").read_text() == "new"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path, umask, mask, expected) -> None:
    umask(mask)
    write_atomic(tmp_path / "f", "text")
    assert mode(tmp_path / "f") == expected


def test_a_replaced_file_gets_no_more_rights_than_it_had(tmp_path, umask) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(0o600)
    write_atomic(path, "new")
    assert mode(path) == 0o600
    path.chmod(0o644)
    umask(0o077)
    write_atomic(path, "newer")
    assert mode(path) == 0o600


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_one_stays(tmp_path) -> None:
    (tmp_path / LEFTOVER).write_text("half")
    (tmp_path / ".other.json.0123456789abcdef.tmp").write_text("of another file")
    living = tmp_path / ".f.json.ffffffffffffffff.tmp"
    with open(living, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_atomic(tmp_path / "f.json", "new")
        assert names(tmp_path) == [living.name, ".other.json.0123456789abcdef.tmp", "f.json"]
        clear_leftovers(tmp_path)
        assert names(tmp_path) == [living.name, "f.json"]
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["f.json"]


def test_a_writer_that_is_killed_holds_no_lock_any_more(tmp_path) -> None:
    script = (
        "import os, sys, signal\nfrom profit.files import write_atomic\n"
        "os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)\nwrite_atomic(sys.argv[1], 'new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f.json")])
    assert killed.returncode == -9 and len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".f.json.")
    write_atomic(tmp_path / "f.json", "new")
    assert names(tmp_path) == ["f.json"]


def test_long_names(tmp_path) -> None:
    for name in ("x" * 255, "ä" * 127):
        write_atomic(tmp_path / name, "text")
    assert len(names(tmp_path)) == 2


def test_a_log_follows_no_link_and_waits_for_no_pipe(tmp_path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "link").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError):
            open_to_append(tmp_path / name)
    assert victim.read_text() == "mine"
    for text in ("a", "b"):
        with open_to_append(tmp_path / "log") as file:
            file.write(text)
    assert (tmp_path / "log").read_text() == "ab"


def test_digests(tmp_path, rng) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
    tensors = {"b": torch.randn(2, 3, generator=rng), "a": torch.tensor([1, 2]), "half": torch.zeros(1).bfloat16()}
    expected = hashlib.sha256(
        b"head\na torch.int64 (2,) " + tensors["a"].numpy().tobytes() + b"\nb torch.float32 (2, 3) "
        + tensors["b"].numpy().tobytes() + b"\nhalf torch.bfloat16 (1,) \0\0"
    ).hexdigest()  # fmt: skip
    assert sha256_of_tensors("head", tensors) == expected
    tensors["b"] = tensors["b"].t()  # the values count as they are read, not as they lie
    assert sha256_of_tensors("head", tensors) != expected
