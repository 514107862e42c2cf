"""The peak is this process's own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from squamata.memory import peak_rss_bytes

CHILD = "from squamata.memory import peak_rss_bytes; print(peak_rss_bytes())"


def test_a_child_does_not_inherit_its_parents_peak() -> None:
    held = np.ones(2**29, np.uint8)
    ours = peak_rss_bytes()
    theirs = int(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout)
    assert ours > held.nbytes > 2 * theirs > 0
