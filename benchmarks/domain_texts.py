"""The texts of studies/domains.yaml: books cut into chapters, and Pile documents in two parts, one to judge on.

    python benchmarks/domain_texts.py --books FOLDER --pile DATA/pile-calibration-512.jsonl --out DATA

FOLDER: novels as plain text, one file each, chapters beginning with a line such as "Chapter 3" or "CHAPTER III" (for
docs/findings.md: the six novels of Jane Austen, as the R package janeaustenr has them). Every third chapter of each
book is kept to judge on, the books in turn, so that any number of tokens sees all of them; the rest is for
calibration. Of the Pile documents the last 128 are kept to judge on.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path

CHAPTER = re.compile(r"^\s*chapter\s+(?:[ivxlc]+|\d+)\.?\s*$", re.IGNORECASE | re.MULTILINE)
KEPT = 3  # every third chapter is judged on
PILE_KEPT = 128
SHORTEST = 2000  # characters; what is shorter is a heading


def chapters(text: str) -> list[str]:
    """A book's chapters, lines of a paragraph joined, without what stands before the first."""
    found = (part.strip() for part in CHAPTER.split(text)[1:])
    return [joined(chapter) for chapter in found if len(chapter) > SHORTEST]


def joined(chapter: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", chapter))


def in_turn(books: Iterable[list[str]]) -> list[str]:
    """The first chapter of every book, then the second ..."""
    return [chapter for chapter in chain.from_iterable(zip_longest(*books)) if chapter is not None]


def write(path: Path, documents: Iterable[str]) -> None:
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True)
    parser.add_argument("--pile", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    books = [chapters(path.read_text(encoding="utf-8")) for path in sorted(arguments.books.glob("*.txt"))]
    if not any(books):
        raise SystemExit(f"{arguments.books}: no .txt file with chapters")
    write(arguments.out / "books-heldout.jsonl", in_turn(book[KEPT - 1 :: KEPT] for book in books))
    write(
        arguments.out / "books-calibration.jsonl",
        in_turn([chapter for n, chapter in enumerate(book, 1) if n % KEPT] for book in books),
    )
    pile = [json.loads(line)["text"] for line in arguments.pile.read_text(encoding="utf-8").split("\n") if line]
    write(arguments.out / "pile-heldout.jsonl", pile[-PILE_KEPT:])
    write(arguments.out / "pile-calibration.jsonl", pile[:-PILE_KEPT])


if __name__ == "__main__":
    main()
