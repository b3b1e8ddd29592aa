"""What goes wrong before or in the middle: one clear error, and all else is as it was."""

import copy
import math
import random
import signal
import sys

import numpy as np
import pytest
import torch
from torch import nn
from unchanged import changed, everything, same

import hessinit
from hessinit import curvature

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3
REAL = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))


def times_one(operator):
    return operator @ torch.ones(operator.shape[1])


# Every way in, as a function of (model, batch, loss, optimizer), and the name in front of its errors.
CALLS = {
    "closed form": ("init_", lambda m, b, loss, o: hessinit.init_(m, b[0], seed=0)),
    "budget": ("init_", lambda m, b, loss, o: hessinit.init_(m, b, loss, optimizer=o, seed=0)),
    "rescale": ("init_", lambda m, b, loss, o: hessinit.rescale_(m, b, loss, optimizer=o, seed=0)),
    "trace": ("hessian", lambda m, b, loss, o: curvature.hessian(m, b, loss).trace(num_probes=2)),
    "product": ("hessian", lambda m, b, loss, o: times_one(curvature.hessian(m, b, loss))),
    "exact": ("hessian", lambda m, b, loss, o: times_one(curvature.hessian(m, b, loss, exact=True))),
    "step sharpness": ("step_sharpness", curvature.step_sharpness),
}
PROBED = [name for name in CALLS if name != "closed form"]  # with targets
PRESENT = [name for name in PROBED if name != "budget"]  # at the weights that are there
every_call = pytest.mark.parametrize("call", CALLS)


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    made[3].eval()
    return made


class Around(nn.Module):
    """A net, and what ``spoil`` makes of its outputs at the n-th call, counted from 1."""

    def __init__(self, spoil):
        super().__init__()
        self.net, self.spoil, self.calls = net(), spoil, []

    def forward(self, x):
        self.calls.append(1)
        return self.spoil(self.net(x), len(self.calls))


class Loader:
    """Yields some batches, then raises."""

    def __init__(self, good, error=None):
        self.good, self.error = good, error

    def __iter__(self):
        for k in range(self.good):
            yield X[8 * k : 8 * k + 8], LABELS[8 * k : 8 * k + 8]
        if self.error is not None:
            raise self.error


def broken(name, frozen=False):
    """A net with a weight that is not a number."""
    made = net()
    with torch.no_grad():
        made.get_parameter(name)[0, 0] = math.nan
    made.get_parameter(name).requires_grad_(not frozen)
    return made


def with_bad_entry(x, value=math.nan):
    x = x.clone()
    x[1, 1] = value
    return x


def used(model):
    """An optimizer that has a state, and gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def fails(call, model, batch, loss, kind, message):
    """One error of one line, not met while another was handled; and nothing has changed."""
    function, run = CALLS[call]
    optimizer = used(model)
    before = everything(model, optimizer)
    with pytest.raises(kind, match=message) as caught:
        run(model, batch, loss, optimizer)
    assert not changed(before, everything(model, optimizer))
    error = caught.value
    assert str(error).startswith(f"{function}: ")
    assert "\n" not in str(error)
    while error is not None:
        assert error.__context__ is error.__cause__
        error = error.__cause__


# ---- data, weights, loaders, outputs -------------------------------------------------------------------------------

OWN = "the model's outputs must be finite; parameter '4.weight' is not"
BAD = {
    "NaN inputs": (net, (with_bad_entry(X), LABELS), "cross_entropy", "batch must be finite; got NaN or inf", CALLS),
    "infinite inputs": (net, (with_bad_entry(X, math.inf), LABELS), "cross_entropy", "batch must be finite", CALLS),
    "NaN targets": (net, (X, with_bad_entry(REAL)), "mse", "targets must be finite; got NaN or infinity", PROBED),
    "infinite targets": (net, (X, with_bad_entry(REAL, -math.inf)), "huber", "targets must be finite", PROBED),
    "NaN shares": (net, (X, with_bad_entry(REAL.softmax(1))), "cross_entropy", "targets must be finite", PROBED),
    "NaN bits": (net, (X, with_bad_entry(REAL.sigmoid())), "bce_with_logits", "targets must be finite", PROBED),
    "NaN loss": (net, (X, with_bad_entry(REAL)), lambda z, y: (z - y).square().mean(), "must be (fin|a num)", PROBED),
    "NaN weight": (lambda: broken("4.weight"), (X, LABELS), "cross_entropy", OWN, PRESENT),
    "NaN frozen weight": (lambda: broken("4.weight", frozen=True), (X, LABELS), "cross_entropy", OWN, PROBED),
    "large labels": (net, (X, LABELS + 1), "cross_entropy", "labels must be in 0 … 2; got 1 … 3, outputs", PROBED),
    "labels below zero": (net, (X, LABELS - 1), "cross_entropy", "labels must be in 0 … 2; got -1 … 1", PROBED),
    "loader of nothing": (net, Loader(0), "cross_entropy", "batch must not be empty; got a loader", PROBED),
}  # fmt: skip
for raised in (OSError("disk"), RuntimeError("disk"), KeyError("disk")):
    for good in (0, 2):
        message = f"batch must be a loader .*; after {good} batches it raised {type(raised).__name__}: '?disk"
        BAD[f"{type(raised).__name__} after {good}"] = (net, Loader(good, raised), "cross_entropy", message, PROBED)


@pytest.mark.parametrize(("name", "call"), [(name, call) for name, row in BAD.items() for call in row[-1]])
def test_bad_data_and_weights_are_one_error(name, call):
    model, batch, loss, message, _ = BAD[name]
    fails(call, model(), batch, loss, ValueError, message)


@pytest.mark.parametrize("name", ["NaN weight", "first NaN weight"])
def test_a_weight_that_is_drawn_anew_may_have_been_anything(name):
    model = broken("4.weight" if name == "NaN weight" else "0.weight")
    for batch in (None, X, (X, LABELS)):
        hessinit.init_(model, batch, seed=0, **({"loss": "cross_entropy", "lr": 0.1} if type(batch) is tuple else {}))
        assert all(p.isfinite().all() for p in model.parameters())


SHAPES = {
    "fewer classes": lambda z: z[:, :2],
    "fewer samples": lambda z: z[1:],
    "one sample": lambda z: z[:1],
    "another axis": lambda z: z[:, :, None],
    "flat": torch.flatten,
    "a pair": lambda z: (z, z),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("call", "at"), [*((call, 2) for call in PRESENT[1:]), ("rescale", 3), ("budget", 9)])
def test_outputs_that_change_their_shape_are_one_error(call, at, shape):
    model = Around(lambda z, n: SHAPES[shape](z) if n >= at else z)
    kind = TypeError if shape == "a pair" else ValueError
    message = "outputs must be one tensor; got tuple" if kind is TypeError else r"one shape at every call; got .* after"
    fails(call, model, (X, LABELS), "cross_entropy", kind, message)


# ---- models that draw, and that write to themselves ----------------------------------------------------------------

NOISE = {
    "torch": lambda z: z + 0.1 * torch.randn_like(z),
    "numpy": lambda z: z + 0.1 * torch.from_numpy(np.random.standard_normal((len(z), 1))).float(),
    "numpy, in pairs": lambda z: z + 0.1 * np.random.randn(),  # the second of two stays in the state
    "python": lambda z: z + 0.1 * random.gauss(0, 1),
    "hidden dropout": lambda z: z * (torch.rand_like(z) > 0.3),
}


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    np.random.randn(seed % 2)  # one more normal number in waiting, or none


@every_call
@pytest.mark.parametrize("noise", NOISE)
def test_a_model_that_draws_gives_the_same_every_time_and_leaves_the_random_states(noise, call):
    found = []
    for seed in (1, 2):
        model = Around(lambda z, n: NOISE[noise](z))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seed_all(seed)
        before = everything(model)
        result = CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
        after = everything(model)
        assert {"values"} >= set(changed(before, after))
        found.append((after["values"] if result is model else result, len(model.calls)))
    assert same(*found)


@pytest.mark.parametrize("inputs", [None, X])
def test_layers_that_draw_leave_the_random_states_with_the_closed_form_too(inputs):
    class Draws(nn.Module):
        def forward(self, x):
            return x + np.random.randn() + random.random() + torch.randn(())

    model = nn.Sequential(nn.Linear(6, 8), Draws(), nn.Linear(8, 3))
    before = everything(model)
    hessinit.init_(model, inputs, seed=0)
    assert changed(before, everything(model)) == ["values"]


class Writes(nn.Module):
    """Changes all that a module can of itself while it runs."""

    def __init__(self):
        super().__init__()
        self.net, self.steps, self.seen, self.head = net(), 0, None, None
        self.register_buffer("added", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.steps += 1
        self.added += 1
        self.replaced = self.replaced + 1
        self.absent = x.detach().sum()
        self.net[1].momentum = 0.5
        self.net[3].train()
        if not hasattr(self, "made"):
            self.made = nn.Identity()
            self.register_forward_hook(lambda *_: None)
        self.seen = self.net(x)
        return self.seen


@every_call
@pytest.mark.parametrize("at", [None, 1, 2])
def test_a_forward_that_writes_to_its_module_leaves_it_as_it_was(call, at):
    model = Writes()
    optimizer = used(model)
    before = everything(model, optimizer)
    if at is not None:
        calls, forward = [], model.net[4].forward

        def stopping(x):
            calls.append(1)
            if len(calls) == at:
                raise MemoryError
            return forward(x)

        model.net[4].forward = stopping
        before = everything(model, optimizer)
        if call == "closed form" and at == 2:
            return  # it has one pass
        with pytest.raises(MemoryError):
            CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
        assert not changed(before, everything(model, optimizer))
        return
    CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
    expected = ["values"] if CALLS[call][0] == "init_" else []
    assert changed(before, everything(model, optimizer)) == expected
    assert all(same(b, torch.zeros(2)) for b in (model.added, model.replaced))


# ---- interruptions -------------------------------------------------------------------------------------------------

STOPS = [KeyboardInterrupt("stop"), MemoryError("stop"), torch.OutOfMemoryError("stop"), SystemExit("stop")]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: type(stop).__name__)
@pytest.mark.parametrize(
    ("call", "at"),
    [*((call, 1) for call in CALLS), *((call, 2) for call in PROBED), *(("budget", at) for at in (3, 5, 7, 9))],
)
@pytest.mark.parametrize("backward", [False, True])
def test_a_stop_goes_through_as_it_is_and_leaves_everything(call, at, stop, backward):
    reached = []

    def spoil(z, n):
        if backward and z.requires_grad:
            z.register_hook(hit)
        elif not backward:
            hit()
        return z

    def hit(gradient=None):
        reached.append(1)
        if len(reached) == at:
            raise stop

    model = Around(spoil)
    optimizer = used(model)
    before = everything(model, optimizer)
    raised = None
    try:
        CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
    except type(stop) as error:
        raised = error
    if raised is None:
        assert backward  # forward passes are more than enough
        assert len(reached) < at
    else:
        assert raised is stop
        assert raised.__context__ is None
        assert len(reached) == at  # nothing was tried again
        assert not changed(before, everything(model, optimizer))


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("call", ["budget", "rescale"])
def test_a_sigint_in_the_middle_leaves_weights_whole(call, at):
    def spoil(z, n):
        if n == at:
            signal.raise_signal(signal.SIGINT)
        return z

    model = Around(spoil)
    optimizer = used(model)
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt):
        CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
    assert not changed(before, everything(model, optimizer))


class Interrupted:
    """Stops at one of the places where Python looks for signals: when a function begins, when a built-in one ends.

    Args:
        stop: which of them, counted from 1, in our own code.
    """

    def __init__(self, stop=None):
        self.stop, self.count, self.place = stop, 0, "after the end"

    def look(self, frame, event, argument):
        caller = frame.f_back if "contextlib" in frame.f_code.co_filename else frame
        ours = "hessinit/" in caller.f_code.co_filename and frame.f_code.co_name != "<genexpr>"
        if event in ("call", "c_return") and ours:
            self.count += 1
            if self.count == self.stop:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self.look)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


@pytest.mark.parametrize(("call", "times"), [("closed form", 150), ("rescale", 50), ("step sharpness", 150)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interruption_anywhere_leaves_everything(call, times):
    model = net()
    optimizer = used(model)
    saved = copy.deepcopy(model.state_dict())

    def run(stop=None):
        model.load_state_dict(saved)
        before = everything(model, optimizer)
        stopped = False
        with Interrupted(stop) as interrupted:
            try:
                CALLS[call][1](model, (X, LABELS), "cross_entropy", optimizer)
            except KeyboardInterrupt:
                stopped = True
        return stopped, interrupted, changed(before, everything(model, optimizer))

    run()  # what is computed once and kept
    count = run()[1].count
    found = [run(stop) for stop in range(1, count, count // times)]
    assert all(left == [] for stopped, _, left in found if stopped), [i.place for _, i, left in found if left]
    # Python itself drops a few, in generators that it closes.
    assert sum(stopped for stopped, _, _ in found) > 0.9 * times
