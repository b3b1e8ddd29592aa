"""Several processes that share a batch, on real ``torch.distributed`` (gloo)."""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch

import hessinit

SCRIPT = Path(__file__).with_name("distributed.py")


SIZES = (2, 4)


@functools.cache
def everything():
    """What each process of each group said, of every case, one after another in the same group."""
    with tempfile.TemporaryDirectory() as path:
        folders = {size: Path(path) / str(size) for size in SIZES}
        for folder in folders.values():
            folder.mkdir()
        command = [sys.executable, "-W", "ignore", str(SCRIPT), *map(str, folders.values())]
        subprocess.run(command, timeout=240, check=True)
        return {
            size: [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
            for size, folder in folders.items()
        }


def together(case, size):
    return [said[case] for said in everything()[size]]


def alone(batch=None, *args, **options):
    return distributed.result(hessinit.init_(distributed.net(), batch, *args, seed=0, **options))


def scales(said):
    """Root mean squares of the weights, of which a budget changes nothing else."""
    return [np.sqrt(np.mean(np.square(w))) for w in said if np.any(w)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ["plain", "replicated", "plain after errors"])
def test_processes_end_with_the_same_weights_and_measure_all_shares(case, size):
    said = together(case, size)
    assert all(one == said[0] for one in said)
    assert said[0]["samples"] == 256
    whole = alone(distributed.data(), "cross_entropy", lr=0.1)
    assert scales(said[0]["weights"]) == pytest.approx(scales(whole), rel=0.1)  # other random signs
    for ours, theirs in zip(said[0]["weights"], whole, strict=True):
        if np.any(theirs):
            assert np.corrcoef(ours, theirs)[0, 1] == pytest.approx(1, abs=1e-6)  # the same draw


@pytest.mark.parametrize("size", SIZES)
def test_without_a_seed_the_first_process_decides(size):
    said = together("seedless", size)
    assert all(one == said[0] for one in said)


@pytest.mark.parametrize("size", SIZES)
def test_the_closed_form_takes_the_scale_of_all_inputs(size):
    said = together("closed form", size)
    assert all(one == said[0] for one in said)
    x, _ = distributed.data()
    for ours, theirs in zip(said[0]["weights"], alone(x), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_sharded_models_get_the_weights_of_one_process(size):
    said = together("sharded", size)
    assert all(one["weights"] == alone() for one in said)


@pytest.mark.parametrize("size", SIZES)
def test_the_budget_of_a_sharded_model_is_one_clear_error(size):
    for one in together("sharded, budget", size):
        assert one["error"].startswith("ValueError: init_: model must not be sharded")
        assert "before fully_shard" in one["error"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("bad labels", "labels"),
        ("no samples", "batch must not be empty"),
        ("bad argument", "max_scale must be at least 1"),
    ],
)
@pytest.mark.parametrize("size", SIZES)
def test_a_process_that_fails_makes_all_fail_with_its_message(case, text, size):
    said = together(case, size)
    for rank, one in enumerate(said):
        assert text in one["error"]
        assert rank == 1 or f"process 1 of {size}" in one["error"]
        assert one["whole"]


def test_wrappers_do_not_change_the_draw():
    plain = alone()
    for wrap in torch.compile, torch.nn.DataParallel:
        assert distributed.result(hessinit.init_(wrap(distributed.net()), seed=0)) == plain


def test_a_keras_model_has_no_process_group():
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(TypeError, match="process_group must be None for a Keras model"):
        hessinit.init_(model, process_group=object())
