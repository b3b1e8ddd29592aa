"""What importing the package loads, and which module may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hessinit

PACKAGE = Path(hessinit.__file__).parent

# Each module imports only from rows above its own.
ROWS = [
    {"layout", "quadrature", "losses", "progress"},
    {"rules", "draw", "batches", "spectrum", "budget", "networks.torch_samples"},
    {"networks.base"},
    {"networks.graph", "networks.torch_autodiff", "networks.jax_autodiff", "networks.tensorflow_autodiff"},
    {"networks.torch_derived", "networks.torch_functional"},
    {
        "networks.torch_follow",
        "networks.torch_loss",
        "networks.torch_group",
        "networks.keras_autodiff",
        "networks.keras_loss",
    },
    {"networks.torch", "networks.keras"},
    {"networks"},
    {"objective"},
    {"operators", "probe"},
    {"curvature", "calibration"},
    {"report"},
    {"bases"},
    {"model"},
    {"torch", "keras", "inspection"},
    {""},  # the package itself: lazy names
    {"experiments"},
    {"experiments.data", "experiments.rivals"},
    {"experiments.hugging_face", "experiments.learned"},
    {"experiments.baselines", "experiments.make_mini", "experiments.models"},
    {"experiments.parallel", "experiments.statistics"},
    {"experiments.training", "experiments.plots"},
    {"experiments.kappa", "experiments.study"},
    {"experiments.sweep"},
    {"experiments.cli"},
]
HEIGHT = {module: row for row, modules in enumerate(ROWS) for module in modules}


def modules():
    for path in PACKAGE.rglob("*.py"):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."), path


def imported(tree):
    """Modules of the package that a tree imports, ``from package import module`` counted as the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "hessinit":
                parts = name.split(".")[1:]
                while ".".join(parts) not in HEIGHT:
                    parts.pop()
                yield ".".join(parts)


def upward(name, tree):
    return sorted({other for other in imported(tree) if other != name and HEIGHT[other] >= HEIGHT[name]})


def test_every_module_has_a_row():
    assert {name for name, _ in modules()} == set(HEIGHT)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda v: v if isinstance(v, str) else "")
def test_no_import_goes_up(name, path):
    tree = ast.parse(path.read_text())
    if name == "":  # the names it offers come from above, for type checkers only
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If))]
    assert upward(name, tree) == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("rules", "from hessinit.model import init_"),
        ("layout", "import hessinit.rules"),
        ("networks.torch", "from hessinit.networks import keras"),
        ("report", "def f():\n    from hessinit import model"),
    ],
)
def test_an_upward_import_would_be_found(name, code):
    assert upward(name, ast.parse(code)) != []


FRAMEWORKS = {"torch", "keras", "jax", "tensorflow"}


def loaded_after(code):
    script = f"import sys\n{code}\nprint(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import hessinit",
        "import hessinit.rules, hessinit.draw, hessinit.report, hessinit.model, hessinit.inspection",
        "import hessinit\nhessinit.init_",
        "from hessinit.experiments import cli, sweep, plots",
    ],
)
def test_importing_loads_no_framework(code):
    assert not loaded_after(code) & FRAMEWORKS


def test_importing_the_package_loads_nothing_that_it_does_not_need():
    assert not loaded_after("import hessinit") & {"numpy", "scipy", "matplotlib", "typer"}


def test_torch_side_loads_no_keras():
    code = "import torch, hessinit\nhessinit.init_(torch.nn.Sequential(torch.nn.Linear(2, 2)))"
    assert not loaded_after(code) & {"keras", "jax", "tensorflow"}


def test_public_names_are_there():
    assert set(hessinit.__all__) <= set(dir(hessinit))
    for name in hessinit.__all__:
        assert getattr(hessinit, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        hessinit.nope  # noqa: B018
