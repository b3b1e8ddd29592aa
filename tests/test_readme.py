"""The README shows only what runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_its_python_runs_and_prints_what_it_shows(number, capsys):
    exec(PYTHON[number], {"__name__": "readme"})
    assert len(PYTHON[number].strip().splitlines()) <= 14
    if printed := capsys.readouterr().out:
        assert f"```text\n{printed}```" in README


def test_its_python_prints_something():
    assert any("print(" in block for block in PYTHON)


@pytest.mark.parametrize("command", ["compare", "figures", "inspect"])
def test_its_options_are_those_of_the_command(command):
    import typer

    from hessinit.experiments.cli import app

    listed = re.search(rf"hessinit {command}  (.*(\n {{10,}}.*)*)", README)[1].split()
    options = [option for one in typer.main.get_command(app).commands[command].params for option in one.opts]
    assert {option for option in listed if option.startswith("--")} == {o for o in options if o.startswith("--")}


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 4
    for link in links:
        assert (Path(__file__).parent.parent / link).exists(), link
