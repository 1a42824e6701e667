"""A reader sees the old file or the new one; errors of the system are sentences."""

import os
import resource
import stat
import sys
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files import Taken, atomic_write, atomic_write_bytes, atomic_write_text, read_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    atomic_write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    assert read_text(path) == "grüße\n"
    assert names(path.parent) == ["file.txt"]


def test_nothing_is_at_the_path_before_the_block_ends(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_bytes() == b"half"


@pytest.mark.parametrize("links", [True, False])
def test_a_new_name_is_given_once(tmp_path, monkeypatch, links):
    """On file systems without hard links too."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os.open(tmp_path, os.O_WRONLY))  # some OSError
    path = tmp_path / "file"
    atomic_write_bytes(path, b"first", new=True)
    with pytest.raises(Taken):
        atomic_write_bytes(path, b"second", new=True)
    assert path.read_bytes() == b"first" and names(tmp_path) == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask() -> int:
    before = os.umask(0)
    os.umask(before)
    return before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path, error):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_results_are_as_readable_as_any_other_file(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "inside", tmp_path / "file" / "further" / "inside"):
        with pytest.raises(UserError, match=r"a file where a folder is needed \(.*file.*\) while writing .*inside"):
            atomic_write_bytes(path, b"")


def test_a_file_that_is_a_folder_or_has_too_long_a_name(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a folder where a file is needed \(\S+/folder\) while writing \S+/folder;"):
        atomic_write_bytes(tmp_path / "folder", b"")
    with pytest.raises(UserError, match=r"a folder where a file is needed \(\S+/folder\) while reading \S+/folder;"):
        read_text(tmp_path / "folder")
    with pytest.raises(UserError, match=r"the name is too long while writing"):
        atomic_write_bytes(tmp_path / ("x" * 300), b"")
    assert names(tmp_path) == ["folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(
        UserError, match=r"permission denied while writing .*; choose a path that you may read and write"
    ):
        atomic_write_bytes(tmp_path / "file", b"")


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk():
    from ldm.errors import explain_os_error

    try:
        with open("/dev/full", "wb") as full:
            full.write(b"x")
    except OSError as error:
        assert "no space left on the disk while writing it" in str(explain_os_error(error, "writing it"))


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_write_that_fails_in_its_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            atomic_write_bytes(path, bytes(100_000))
        except UserError as error:
            os._exit(0 if "file-size limit" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbftext")
    assert read_text(tmp_path / "file") == "text"
