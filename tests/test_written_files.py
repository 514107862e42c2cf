"""``write_whole``: a file that is replaced whole or not at all, and what is never replaced."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from squamata.errors import SquamataError
from squamata.text import check_writable, write_whole


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(umask: int, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(umask)
    try:
        for name in ("new", "old"):
            write_whole(tmp_path / name, "é")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "new") == 0o666 & ~umask and mode_of(tmp_path / "old") == 0o640
    assert all((tmp_path / name).read_bytes() == "é".encode() for name in ("new", "old"))
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for target in ("file", "below/none yet"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / target)
        write_whole(tmp_path / "link", target)
        assert (tmp_path / "link").is_symlink() and (tmp_path / target).read_text() == target


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """And so is a device: as root, ``--json /dev/null`` made a plain file of it."""
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "through")
    reader.join(timeout=10)
    assert read == ["through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="needs /dev/stdout")
def test_an_open_stream_is_written_to(tmp_path: Path) -> None:
    """Even one that goes to a file, whose place another would take."""
    code = "from pathlib import Path; from squamata.text import check_writable as check, write_whole\n"
    code += "path = Path('/dev/stdout'); check(path, '--json'); print('before', flush=True); write_whole(path, 'it')"
    out = tmp_path / "out"
    with out.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
        assert os.fstat(file.fileno()).st_ino == out.stat().st_ino
    assert "it" in out.read_text() and Path("/dev/stdout").is_symlink()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("x")
    (tmp_path / "kept").chmod(0o444)
    with pytest.raises(SquamataError, match="cannot be written to"):
        check_writable(tmp_path / "kept", "--json")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * 255), "y")
    with pytest.raises(SquamataError, match="cannot write"):
        write_whole(tmp_path / ("x" * 256), "y")
    assert len(list(tmp_path.iterdir())) == 1
