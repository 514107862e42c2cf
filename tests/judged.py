"""What the tests judge: the recipes that ship, the bundled model, and larger ones where they are."""

from __future__ import annotations

from pathlib import Path

from squamata.load.hub import bundled
from squamata.spec.recipe import Recipe, recipe_names

SHIPPED = tuple(recipe_names())
ON_THEIR_KINDS = [(kind, name) for name in SHIPPED for kind in Recipe.read(name).architectures]  # (kind, recipe)


def shared_folder() -> Path | None:
    """The optional folder ``shared`` beside the repository (larger models, test texts), or None."""
    folder = Path(__file__).parents[2] / "shared"
    return folder if folder.is_dir() else None


def model_folders(largest: str = "24m") -> list[Path]:
    """The bundled model, and those of the shared folder where it is there: parametrise over it, never skip."""
    shared = shared_folder()
    names = ["mamba1-5m"] + (["mamba1-24m", "mamba2-24m"] if largest == "24m" else [])
    folders = [shared / "models" / name for name in names] if shared else []
    return [bundled(), *(folder for folder in folders if folder.is_dir())]
