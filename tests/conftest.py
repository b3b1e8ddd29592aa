"""Keras picks its backend at import; tests that need another one run in a process of their own."""

import os
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel processes, on small problems
sys.modules["torchvision"] = None  # no test needs it, and transformers is of no use with one that is for another torch


class Unused(Loader):
    """TensorFlow where Keras has another backend, and would take seconds to import it for its seed alone."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return ModuleSpec(name, cls()) if name == "tensorflow" != os.environ["KERAS_BACKEND"] else None

    def exec_module(self, module):
        raise ImportError(f"not to be imported: {module.__name__}")


sys.meta_path.insert(0, Unused)
LONGEST = ("test_keras.py", "test_notebooks.py", "test_style.py")


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no process is left with one when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
