"""Keras picks its backend at import; tests that need another one run in a process of their own."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel processes, on small problems

LONGEST = ("test_keras.py", "test_notebooks.py", "test_style.py")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left with one when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
