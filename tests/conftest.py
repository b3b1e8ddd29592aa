"""Keras picks its backend at import; tests that need another one run in a process of their own."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
