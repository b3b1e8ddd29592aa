"""Keras picks its backend at import; tests that need another one run in a process of their own."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel processes, on small problems
