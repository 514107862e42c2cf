"""Imports point one way, the machine is nobody's business, and the kernels stand alone: read from the source."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "squamata"
ROOMS = [
    *("errors", "text", "memory", "spec", "kernels", "scales", "models", "load", "calibrate", "transform", "quantize"),
    *("save", "run", "evaluate", "report", "hardware"),
]
VERBS = {"load", "calibrate", "transform", "quantize", "save", "run", "evaluate"}
DOORS = {"parts", "pipeline", "conversion", "cli", "serve", "__main__"}
MAY_SAY_CUDA = ("run", "kernels", "cli", "evaluate/profile")
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """``squamata/save/read.py`` -> save; ``squamata/pipeline.py`` -> pipeline; ``squamata/__init__.py`` -> ''."""
    inside = path.relative_to(PACKAGE)
    return "" if inside == Path("__init__.py") else inside.parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Full names of every module that a file imports, wherever in the file; ``from a import b`` gives a.b."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    """Rooms of ours that a file imports, its own left out; ``from squamata import __version__`` is no room."""
    parts = [name.split(".") for name in imported(path)]
    rooms = {part[1] for part in parts if part[0] == "squamata" and len(part) > 1 and not part[1].startswith("__")}
    return rooms - {room_of(path)}


IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def test_every_module_lives_in_a_known_room() -> None:
    assert {room_of(path) for path in FILES} - {""} <= set(ROOMS) | DOORS


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_rooms_import_only_rooms_above(path: Path) -> None:
    room, used = room_of(path), imported_rooms(path)
    if room == "":
        assert used <= {"pipeline", "conversion"}
    elif room in DOORS:
        assert used <= set(ROOMS) | {"parts", "pipeline", "conversion", "cli"} and (
            "cli" not in used or room == "__main__"
        )
    else:
        assert used <= set(ROOMS[: ROOMS.index(room)]), f"{room} imports {sorted(used)}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_verbs_never_call_each_other(path: Path) -> None:
    """Not even for a type: what one is handed from another's room it describes as a protocol."""
    if room_of(path) in VERBS:
        assert not imported_rooms(path) & VERBS


def test_the_package_itself_imports_nothing_of_ours_until_asked() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
    assert not any(name and name.startswith("squamata") for name in names)


@pytest.mark.parametrize(
    "path", [path for path in FILES if room_of(path) in ("spec", "hardware", "errors", "text")], ids=str
)
def test_spec_and_hardware_know_no_torch(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)}
    assert not outside & {"torch", "numpy", "numba", "safetensors", "transformers"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_environment_variable_steers_us(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")), node.lineno
    assert not {"os.environ", "os.getenv"} & set(imported(path))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_devices_are_named_only_where_code_runs_on_them(path: Path) -> None:
    inside = path.relative_to(PACKAGE).as_posix()
    if inside.startswith(MAY_SAY_CUDA):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda"))
        assert not (isinstance(node, ast.Attribute) and node.attr == "cuda")


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_errors_are_not_swallowed_and_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text()
    assert "TODO" not in text and "FIXME" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)


BLOCKED = [
    "huggingface_hub",
    "tokenizers",
    "typer",
    "rich",
    "numba",
    "transformers",
    "matplotlib",
    "safetensors",
    "psutil",
]
BLOCKER = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_kernels_need_only_torch() -> None:
    """And without numba they still compute: the reference takes the call."""
    code = f"""{BLOCKER}
import torch
import squamata.kernels.ops as ops
from squamata.kernels.partition import Layout
from squamata.kernels.site import Site
site = Site("in", Layout(("channel",), (4,)))
y, _ = ops.rms_norm(torch.full((1, 1, 4), 3.0), None, torch.ones(4), 0.0, site)
assert torch.equal(y, torch.ones(1, 1, 4)), y
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_spec_is_importable_without_torch() -> None:
    result = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "from squamata.spec.recipe import Recipe\n"
        "print(len(Recipe.read('quamba-w8a8').resolve(('mamba2',))))"
    )
    assert result.returncode == 0 and int(result.stdout) > 10, result.stderr


def test_verbs_stay_functions_in_every_import_order() -> None:
    """Rooms have the verbs' names: importing one must not put the module in the function's place."""
    modules = ["squamata.load.source", "squamata.quantize", "squamata.evaluate.perplexity", "squamata.pipeline"]
    orders = list(itertools.permutations(modules, 2)) + [(module,) for module in modules]
    code = "import sys\n"
    for order in orders:
        code += "for name in [n for n in sys.modules if n.split('.')[0] == 'squamata']: del sys.modules[name]\n"
        code += "".join(f"import {module}\n" for module in order)
        code += "import squamata\n"
        code += "for verb in ('quantize', 'load', 'evaluate', 'generate'):\n"
        code += f"    assert type(getattr(squamata, verb)).__name__ == 'function', (verb, {order})\n"
        code += "from squamata import load\nassert callable(load)\n"
    result = run_python(code)
    assert result.returncode == 0, result.stderr[-2000:]
    listed = run_python("import squamata; print(*dir(squamata))").stdout.split()
    assert {"quantize", "load", "evaluate", "generate", "__version__"} <= set(listed)
    assert run_python("import squamata; squamata.nothing").stderr.strip().endswith("has no attribute 'nothing'")
