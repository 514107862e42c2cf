"""The shape of a Python tree in figures, and a failing exit where it is over budget.

    python tools/shape.py [FOLDER]

Modules and lines; lines a function (signature and docstring included); parameters; annotated functions (all parameters
or the return); clones: lines of code (comments, docstrings and imports left out, layout normalised) inside a block of
six lines that occurs more than once. Budget: host functions of 60 lines and 8
parameters (verbs: as many as they have options), modules of 400 lines. Bodies
that a kernel compiler reads (a decorator or a factory that names it) are counted apart.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FUNCTION_LINES, PARAMETERS, MODULE_LINES, CLONE_BLOCK = 60, 8, 400, 6
COMPILERS = ("njit", "jit", "intrinsic", "compiled", "kernel", "operation")  # decorators of kernels and their contracts

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Measured:
    """One function: where, how long, how many parameters, annotated, and whether a kernel compiler reads it."""

    place: str
    lines: int
    parameters: int
    annotated: bool
    kernel: bool


def functions(path: Path, tree: ast.AST, root: Path) -> Iterator[Measured]:
    inside = path.relative_to(root)
    for node in ast.walk(tree):
        if isinstance(node, Function):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [argument for argument in given if argument.arg not in ("self", "cls")]
            yield Measured(
                place=f"{inside}:{node.lineno} {node.name}",
                lines=(node.end_lineno or node.lineno) - node.lineno + 1,
                parameters=len(named),
                annotated=node.returns is not None or (bool(named) and all(a.annotation for a in named)),
                kernel="kernels" in inside.parts
                or any(word in ast.unparse(d) for d in node.decorator_list for word in COMPILERS),
            )


def code_lines(tree: ast.Module) -> list[str]:
    """Source without layout, comments, docstrings and imports."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not isinstance(part, ast.Import | ast.ImportFrom) and not _docstring(part)]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return [line.strip() for line in ast.unparse(tree).splitlines() if line.strip()]


def _docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def clone_share(modules: list[list[str]]) -> float:
    """Percent of all lines that lie in a repeated block."""
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for number, lines in enumerate(modules):
        for start in range(len(lines) - CLONE_BLOCK + 1):
            places[tuple(lines[start : start + CLONE_BLOCK])].append((number, start))
    repeated = {
        (number, start + offset)
        for found in places.values()
        if len(found) > 1
        for number, start in found
        for offset in range(CLONE_BLOCK)
    }
    return 100 * len(repeated) / max(1, sum(map(len, modules)))


def percentile(values: list[int], share: float) -> int:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main(root: Path) -> int:
    paths = [path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts]
    sizes = {path: len(path.read_text().splitlines()) for path in paths}
    trees = {path: ast.parse(path.read_text()) for path in paths}
    measured = [function for path in paths for function in functions(path, trees[path], root)]
    clones = clone_share([code_lines(tree) for tree in trees.values()])
    lengths = [function.lines for function in measured]
    filled = [size for size in sizes.values() if size]
    long = sum(length > FUNCTION_LINES for length in lengths)
    annotated = sum(function.annotated for function in measured)
    print(f"modules / lines          {len(filled)} / {sum(filled):,}")
    print(f"module median / max      {statistics.median(filled):.0f} / {max(filled)}")
    print(f"function med / p90 / max {statistics.median(lengths):.0f} / {percentile(lengths, 0.9)} / {max(lengths)}")
    print(f"functions > {FUNCTION_LINES} lines     {100 * long / len(lengths):.1f} %")
    print(f"max parameters           {max(function.parameters for function in measured)}")
    print(f"annotated                {100 * annotated / len(measured):.0f} %")
    print(f"clones                   {clones:.1f} %")
    over = [f"{path.relative_to(root)}: {size} lines" for path, size in sizes.items() if size > MODULE_LINES]
    for function in measured:
        if not function.kernel and function.lines > FUNCTION_LINES:
            over.append(f"{function.place}: {function.lines} lines")
        verb = function.place.startswith(("cli/", "pipeline.py"))  # the same options in Python
        if not function.kernel and not verb and function.parameters > PARAMETERS:
            over.append(f"{function.place}: {function.parameters} parameters")
    print("\n".join(["", "over budget:", *over] if over else ["", "within budget"]))
    return bool(over)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "squamata")))
