"""Runs the files in ``CHECKS`` once a backend, in a process of its own.

Keras picks its backend at import.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECKS = ["tests/keras_checks.py", "tests/keras_curvature_checks.py", "tests/keras_budget_checks.py"]


@pytest.mark.parametrize("backend", ["torch", "jax", "tensorflow"])
def test_keras_on(backend):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *CHECKS, "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 230
