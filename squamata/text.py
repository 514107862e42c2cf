"""Text files: the one reader that calibration and evaluation share, and the one writer of what a verb found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from squamata.errors import SquamataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, in file order, byte for byte.

    A ``.txt`` file is one document; a ``.jsonl`` file has one JSON object a line with a ``text`` field, and documents
    that are blank are left out. SquamataError, one line, for a missing file, another suffix, bytes that are not UTF-8,
    a line that is not such an object, and a file without any text.
    """
    return read_fingerprinted(path)[0]


def read_fingerprinted(path: str | Path) -> tuple[list[str], str]:
    """``read_documents``, and the SHA-256 of the very bytes that gave them."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".txt") and path.is_dir():
        raise _is_folder(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise SquamataError(f"{path}: text must be a .txt file or a .jsonl file with a 'text' field a line")
    content = _read(path)
    text = _decode(path, content)
    documents = [row["text"] for row in _rows(path, text, {"text": str})] if path.suffix == ".jsonl" else [text]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise SquamataError(f"{path} holds no text: give a file with at least one document that is not blank")
    return documents, hashlib.sha256(content).hexdigest()


def read_rows(path: str | Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    """The JSON objects of a JSONL file; every one must have the named fields with values of the given types.

    Blank lines are skipped. SquamataError names the line number and what is wrong with it.
    """
    path = Path(path)
    return _rows(path, _decode(path, _read(path)), fields)


def _rows(path: Path, text: str, fields: dict[str, type]) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_parse_row(line, fields, f"{path}, line {number}"))
    if not rows:
        raise SquamataError(f"{path} is empty: give a JSONL file with one object a line ({', '.join(fields)})")
    return rows


def _parse_row(line: str, fields: dict[str, type], place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SquamataError(f"{place}: not JSON ({error.msg} at column {error.colno}); mend or remove it") from None
    if not isinstance(row, dict):
        raise SquamataError(f"{place}: a JSON {type(row).__name__}, not an object with {_quoted(fields)}")
    for field, kind in fields.items():
        if field not in row:
            raise SquamataError(f"{place}: no field '{field}'; it has {_quoted(row) or 'none'}")
        if not isinstance(row[field], kind):
            found = type(row[field]).__name__
            raise SquamataError(f"{place}: field '{field}' must be of type {kind.__name__}, not {found}")
    if any(isinstance(row[field], str) and _SURROGATE.search(row[field]) for field in fields):
        raise SquamataError(f"{place}: half of a \\u surrogate pair; such a character has no UTF-8 form")
    return row


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name[:40]}'" for name in islice(names, 8))


def _read(path: Path) -> bytes:
    if path.is_dir():
        raise _is_folder(path)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SquamataError(f"no such file: {path}") from None
    except OSError as error:
        raise SquamataError(f"cannot read {path}: {error.strerror}") from None


def _is_folder(path: Path) -> SquamataError:
    return SquamataError(f"{path} is a folder: give a .txt or .jsonl file")


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise SquamataError(f"{path} is not UTF-8 (byte {error.start}): convert it to UTF-8 first") from None


def check_name(folder: str | Path) -> None:
    """Refuse a folder whose name has no UTF-8: safetensors cannot open what is in it."""
    if _SURROGATE.search(str(folder)):
        raise SquamataError(
            f"{folder}: the name of this folder is not UTF-8, in which checkpoints cannot be: rename it"
        )


def check_writable(path: Path | None, option: str) -> None:
    """Refuse, before any work is done, a file that could not be written after it; ``option``: what asked for it."""
    if path is None:
        return
    folder = path.absolute().parent
    if path.is_dir():
        raise SquamataError(f"{path} is a folder: give a file to {option}")
    if not folder.is_dir():
        raise SquamataError(f"{option} {path}: no folder '{path.parent}' to write it to")
    if path.exists() and not os.access(path, os.W_OK):
        raise SquamataError(f"{option} {path}: the file there cannot be written to")
    if not _is_special(path) and not os.access(folder, os.W_OK):
        raise SquamataError(f"{option} {path}: the folder '{path.parent}' cannot be written to")


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all, in place of what was there, whose permissions it keeps.

    What a link names is replaced, not the link. A device or a pipe (``/dev/null``, ``/dev/stdout``) is written to.
    """
    partial = None
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
            return
        path = Path(os.path.realpath(path))
        partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
        if path.exists():
            partial.chmod(stat.S_IMODE(path.stat().st_mode))
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise SquamataError(f"cannot write {path}: {error.strerror}") from None


def _is_special(path: Path) -> bool:
    """Whether a path is there and no regular file, or names an open stream of this process."""
    folder = os.path.realpath(path.absolute().parent)
    return path.exists() and (not path.is_file() or folder == "/dev" or folder.startswith("/proc/"))
