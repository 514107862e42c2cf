"""What the tests of the laboratory share: the pipeline's verbs, and a study of a few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from squamata import pipeline
from squamata.report.verbs import Verbs

QUICK: dict[str, Any] = {
    "name": "quick",
    "models": ["bundled"],
    "recipes": ["float", "quamba-w8a8", "w4a16"],
    "text": "bundled",
    "samples": 4,
    "length": 48,
    "max_tokens": 96,
    "window": 32,
}


@pytest.fixture(scope="session")
def verbs() -> Verbs:
    return Verbs(pipeline.quantize, pipeline.load, pipeline.evaluate, pipeline.check)


@pytest.fixture
def write_study(tmp_path: Path) -> Any:
    """``write_study(seeds=[0, 1])``: a YAML file of the quick study with these fields."""

    def write(**fields: Any) -> Path:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(QUICK | fields, sort_keys=False))
        return path

    return write
