"""Which backends an ordinary call looks at."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, torch, squamata
from squamata.load.hub import bundled
squamata.load(bundled())(torch.tensor([[1, 2, 3]]))
print(*[name for name in sys.modules if name == "triton" or name.startswith("squamata.kernels.gpu_")])
"""


def test_a_model_on_a_cpu_imports_no_gpu_kernels() -> None:
    """Importing them takes seconds, and fixes for the whole process whether Triton interprets."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
