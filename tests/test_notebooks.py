"""Notebooks are committed executed, run from start to end with fewer repetitions, and end in assertions that hold."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FIRST = f"%reset -f\nimport sys\nsys.path.append({str(Path(__file__).parent)!r})\nimport conftest"
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
FEWER = {
    "02_curvature": {
        "repeats=20": "repeats=3",
        "in range(10)": "in range(4)",
        "in range(5)": "in range(2)",
        "k=5)[0]": "k=1)[0]",
        "num_probes=4, steps=30": "num_probes=2, steps=10",
    },
    "03_budget": {
        "in range(2)": "in range(1)",
        "LRS = (0.003, 0.01, 0.03, 0.1, 0.3)": "LRS = (0.003, 0.01, 0.03)",
        "adam_lrs = (1e-4, 3e-4, 1e-3, 3e-3)": "adam_lrs = (1e-4, 1e-3)",
    },
    "04_fashion_mnist": {"range(3), 20": "range(3), 8", "kappa.FIRST_SEED + 10": "kappa.FIRST_SEED + 3"},
    "05_learning_rates": {
        "range(3), 600": "range(2), 600",
        "WITHIN = 0.95": "WITHIN = 0.5",
        '"glorot_uniform", "lsuv", ': "",
        '"sgd": (0.003, 0.01, 0.04, 0.15, 0.6), "adam": (1e-4, 5e-4, 2e-3, 1e-2)': (
            '"sgd": (0.003, 0.01, 0.15), "adam": (1e-4, 5e-4, 2e-3)'
        ),
    },
    "06_your_model": {"seed in range(3)": "seed in range(2)", "[:50]": "[:30]"},
}


@pytest.fixture(scope="module")
def client():
    """With one kernel for all, emptied before each: most of a short notebook's time goes into imports."""
    made = NotebookClient(nbformat.v4.new_notebook(), timeout=300)
    with made.setup_kernel():
        yield made


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_notebook_is_executed_and_runs(path, tmp_path, client):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "assert " in code[-1].source
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert errors == []
    for many, few in FEWER.get(path.stem, {}).items():
        (cell,) = [cell for cell in code if many in cell.source]
        cell.source = cell.source.replace(many, few)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"{FIRST}\n%cd -q {tmp_path}"))
    client.nb = notebook
    client.execute(cleanup_kc=False)


def test_there_is_a_quickstart():
    assert "01_quickstart" in [path.stem for path in NOTEBOOKS]
