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
QUICKLY_COMPILED = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"  # most of JAX's time


def run(backend, flags):
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *CHECKS, "-n", "0", "-p", "no:cacheprovider"]
    environment |= {"XLA_FLAGS": flags, "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_keras_on(backend):
    done = run(backend, QUICKLY_COMPILED if backend == "jax" else "")
    if "Unknown flag" in done.stderr:  # of another version of JAX
        done = run(backend, "")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 230
