"""``hessinit inspect``: what it says of models, that it says nothing of healthy ones, and that it changes none."""

import json
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessinit
from hessinit.experiments import cli
from hessinit.inspection import inspect, random_inputs

NETS = """
import torch
import hessinit
from torch import nn

def mlp(*widths, act=nn.ReLU, bias=True):
    layers = [m for i, o in zip(widths, widths[1:]) for m in (nn.Linear(i, o, bias=bias), act())]
    return nn.Sequential(*layers[:-1])

def changed(net, **tensors):  # of names with _ for dots
    with torch.no_grad():
        for name, change in tensors.items():
            change(net.get_parameter(name[1:].replace("_", ".")))
    return net

def default(): return mlp(784, 128, 84, 10)
def tanh(): return mlp(20, 64, 64, 64, 4, act=nn.Tanh)
def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Dropout(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10))
class Block(nn.Module):
    def __init__(self, planes, zero):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        if zero:
            nn.init.zeros_(self.bn2.weight)
    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
def resnet(zero=False):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Block(16, zero), Block(16, zero),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
def resnet_of_zero_branches(): return resnet(zero=True)
class Text(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.places = nn.Embedding(50, 32), nn.Parameter(torch.zeros(16, 32))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.head = nn.Linear(32, 50, bias=False)
        nn.init.normal_(self.embed.weight, std=0.1)
        if tied:
            self.head.weight = self.embed.weight
    def forward(self, t):
        return self.head(self.blocks(self.embed(t) + self.places))
def tied(): return Text(tied=True)
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(5, 16, batch_first=True), nn.Linear(16, 3)
    def forward(self, x):
        return {"logits": self.out(self.rnn(x)[0][:, -1])}
class Pooled(nn.Module):  # an embedding that is the same for all samples
    def __init__(self):
        super().__init__()
        self.token, self.place, self.out = nn.Embedding(50, 32), nn.Embedding(12, 32), nn.Linear(32, 5)
    def forward(self, t):
        return self.out((self.token(t) + self.place(torch.arange(12).expand(len(t), 12))).mean(1))
def zero_head(): return changed(default(), _4_weight=nn.init.zeros_, _4_bias=nn.init.zeros_)
def regression(): return mlp(8, 64, 64, 1)
def autoencoder(): return mlp(32, 16, 32)
def closed_form(): return hessinit.init_(default(), torch.randn(64, 784), seed=0)
def closed_form_of_convolutions(): return hessinit.init_(resnet(), torch.randn(64, 3, 16, 16), seed=0)
def budget():
    batch = torch.randn(64, 1, 28, 28), torch.arange(64) % 10
    return hessinit.init_(lenet(), batch, "cross_entropy", lr=0.1, seed=0)
module_level = default()

def cut(share):
    return changed(mlp(20, 64, 64, 5), _0_bias=lambda b: b[: int(share * 64)].fill_(-10))
def some_dead(): return cut(0.25)
def dead(): return cut(0.75)
def all_dead(): return cut(1)
def vanished(): return changed(mlp(20, 64, 64, 5, bias=False), _2_weight=lambda w: w.mul_(1e-4))
def vanished_at_once(): return changed(mlp(20, 64, 64, 5, bias=False), _0_weight=lambda w: w.mul_(1e-4))
def constant(): return changed(mlp(20, 64, 64, 64, 5), _2_weight=lambda w: w.mul_(1e-4))
def exploding(): return changed(mlp(20, 64, 64, 5), _2_weight=lambda w: w.mul_(1e4))
def exploding_at_once(): return changed(mlp(20, 64, 64, 5), _0_weight=lambda w: w.mul_(1e4))
def not_finite(): return changed(mlp(20, 64, 64, 5), _2_weight=lambda w: w[0].fill_(float("inf")))
def large_logits(): return changed(default(), _4_weight=lambda w: w.mul_(100))

def raises(): raise RuntimeError("no such luck")
def leaves(): raise SystemExit(3)
def talks():
    print("talk")
    return default()
def number(): return 7
def no_weights(): return nn.ReLU()
def needs(width): return default()
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """The command in a folder with ``mynets.py``: its exit code, standard output and standard error."""
    (tmp_path / "mynets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hessinit", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *capsys.readouterr()

    yield run
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


HEALTHY = [
    ("default", "784"),
    ("tanh", "20"),
    ("lenet", "1,28,28"),
    ("resnet", "3,16,16"),
    ("resnet_of_zero_branches", "3,16,16"),
    ("Text", "16", "--integers", "50"),
    ("Recurrent", "7,5"),
    ("Pooled", "12", "--integers", "50"),
    ("zero_head", "784"),
    ("regression", "8"),
    ("autoencoder", "32"),
    ("closed_form", "784"),
    ("closed_form_of_convolutions", "3,16,16"),
    ("budget", "1,28,28"),
    ("module_level", "784"),
    ("some_dead", "20"),
]
ILL = [
    ("dead", "20", ["dead units, which no sample moves: 75% of 0.weight$"]),
    (
        "all_dead",
        "20",
        [
            "no gradient reaches 0.weight, 2.weight: ",
            "vanished signal, less than 0.1% of it differs between samples: 2.weight, 4.weight$",
        ],
    ),
    ("vanished", "20", [r"vanished signal, against rms 0.\d+ of 0.weight: 2.weight \(.*e-05\), 4.weight \(.*e-06\)$"]),
    ("vanished_at_once", "20", [r"vanished signal, against rms 1 of the inputs: 0.weight \(.*e-05\)$"]),
    ("constant", "20", ["vanished signal, less than 0.1% of it differs .*: 2.weight, 4.weight, 6.weight$"]),
    (
        "exploding",
        "20",
        [r"exploding signal, against rms 0.\d+ of 0.weight: 2.weight \(.*, 4.weight", "first loss .*e"],
    ),
    ("exploding_at_once", "20", [r"exploding signal, against rms 1 of the inputs: 0.weight \(.*\)$", "first loss "]),
    ("not_finite", "20", ["signal not finite from 2.weight on$"]),
    ("large_logits", "784", [r"first loss [\d.]+, where a uniform guess has 2.3: logits of rms [\d.]+ are too large$"]),
    ("tied", "16", ["tied weights: head.weight is embed.weight$"], "--integers", "50"),
]


@pytest.mark.parametrize(("name", "shape", "options"), [(n, s, o) for n, s, *o in HEALTHY])
def test_a_healthy_model_has_no_warning(command, name, shape, options):
    code, out, err = command("inspect", f"mynets:{name}", "--input-shape", shape, *options)
    assert (code, err) == (0, "")
    assert "warning" not in out
    assert re.search(r"\d parameters, output rms [\d.e-]+", out)


@pytest.mark.parametrize(("name", "shape", "expected", "options"), [(n, s, e, o) for n, s, e, *o in ILL])
def test_each_ill_has_its_warning_and_no_other(command, name, shape, expected, options):
    code, out, err = command("inspect", f"mynets:{name}", "--input-shape", shape, *options)
    assert (code, err) == (0, "")
    warnings = [line.removeprefix("warning: ") for line in out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == len(expected), warnings
    for warning, pattern in zip(warnings, expected, strict=True):
        assert re.match(pattern, warning), warning


def test_json_is_one_object_with_the_same_numbers(command):
    _, table, _ = command("inspect", "mynets:talks", "--input-shape", "784")
    code, out, err = command("inspect", "mynets:talks", "--input-shape", "784", "--json")
    assert (code, err) == (0, "talk\n")  # what the factory prints is no part of the object
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == ["0.weight", "2.weight", "4.weight"]
    assert found["layers"][1]["shape"] == [84, 128]
    assert found["parameters"] == 784 * 128 + 128 + 128 * 84 + 84 + 84 * 10 + 10
    assert found["uniform_loss"] == pytest.approx(math.log(10))
    assert found["warnings"] == []
    for layer in found["layers"]:
        line = next(line for line in table.splitlines() if line.startswith(layer["name"]))
        cells = [
            layer["kind"],
            "x".join(map(str, layer["shape"])),
            *(f"{layer[k]:.4g}" for k in ("std", "closed_form")),
        ]
        assert line.split() == [layer["name"], *cells, f"{layer['rms']:.4g}", f"{layer['variation']:.0%}", "0%"]


def test_json_has_null_for_what_is_no_number(command):
    _, out, _ = command("inspect", "mynets:not_finite", "--input-shape", "20", "--json")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert [layer["rms"] is None for layer in found["layers"]] == [False, True, True]
    assert found["first_loss"] is None
    assert found["layers"][0]["rms"] > 0


def test_the_seed_decides_samples_and_weights(command):
    for name in ("default", "module_level"):  # the latter has weights of its own: only samples differ
        arguments = ("inspect", f"mynets:{name}", "--input-shape", "784", "--json", "--seed")
        outs = [command(*arguments, seed)[1] for seed in ("0", "0", "1")]
        assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mynets"], "inspect: target must be package.module:factory; got 'mynets'."),
        (
            ["nowhere:default"],
            "inspect: target must be importable; got 'nowhere:default' and ModuleNotFoundError: No module",
        ),
        (
            ["mynets:nothing"],
            "target must be importable; got 'mynets:nothing' and AttributeError: module 'mynets' has no",
        ),
        (["mynets:raises"], "got 'mynets:raises' and RuntimeError: no such luck"),
        (["mynets:leaves"], "got 'mynets:leaves' and SystemExit: 3"),
        (["mynets:needs"], "factory that works without arguments; got 'mynets:needs' and TypeError: needs() missing 1"),
        (["mynets:number"], "model must be a torch.nn.Module or a keras.Model; got int from 'mynets:number'."),
        (["mynets:no_weights"], "inspect: model must have a weight that init_ knows, with values; got ReLU."),
        (["mynets:default", "--input-shape", "3,32"], "got shape (64, 3, 32) and RuntimeError in 0 (Linear): mat1 and"),
        (["mynets:default", "--input-shape", "3,32"], "(--input-shape 3,32)"),
        (
            ["mynets:default", "--input-shape", "28x28"],
            "input_shape must be positive integers with commas between; got '28x28'",
        ),
        (
            ["mynets:default", "--input-shape", "0"],
            "input_shape must be positive integers with commas between; got '0'",
        ),
        (["mynets:Text", "--input-shape", "16"], "(--input-shape 16; tokens need --integers)"),
        (
            ["mynets:Text", "--input-shape", "16", "--integers", "99"],
            "index out of range in self (--input-shape 16 --integers 99)",
        ),
        (
            ["mynets:default", "--classes", "7"],
            "classes must be 0, or the length, above 1, of the outputs' last or second",
        ),
        (["mynets:default", "--batch-size", "1"], "--batch-size"),
        (["mynets:default", "--nope"], "--nope"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(command, arguments, message):
    code, out, err = command("inspect", *arguments, *([] if "--input-shape" in arguments else ["--input-shape", "784"]))
    assert (code, out) == (2, "")
    assert err.startswith("hessinit: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_module_that_fails_is_one_line_too(command, tmp_path):
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    code, _, err = command("inspect", "broken_nets:net", "--input-shape", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "got 'broken_nets:net' and ZeroDivisionError: division by zero" in err


def test_help_needs_no_framework_and_the_current_folder_is_searched_first(tmp_path):
    code = (
        "import sys, hessinit.experiments.cli as cli\ntry:\n    cli.main()\nfinally:\n    print('torch' in sys.modules)"
    )

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "inspect" in run("--help")
    assert run("--help").endswith("False\n")
    (tmp_path / "wave.py").write_text("from torch import nn\nnet = nn.Linear(3, 2)")  # a name of the standard library
    assert "weight  Linear  2x3" in run("inspect", "wave:net", "--input-shape", "3")


# ---- the numbers -----------------------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rms(x):
    return float(x.detach().double().square().mean().sqrt())


def convolutional():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 24, 3),
            nn.BatchNorm2d(24),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(384, 7),
        )


def test_signals_are_those_of_a_training_step_without_dropout():
    net, x = convolutional().eval(), 3 * normal(32, 2, 6, 6) + 1
    found = inspect(net, x)
    u = net[0](x)
    normed = (u - u.mean((0, 2, 3), keepdim=True)) / (u.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
    z = net[5](normed.relu().flatten(1))
    for name, output in (("0.weight", u), ("5.weight", z)):
        layer = found[name]
        assert layer.rms == pytest.approx(rms(output), rel=1e-5)
        assert layer.variation == pytest.approx(rms(output - output.mean(0)) / rms(output), rel=1e-5)
        assert layer.std == pytest.approx(rms(net.get_parameter(name)), rel=1e-6)
    assert found.output_rms == found["5.weight"].rms
    assert (found["0.weight"].units, found["5.weight"].units) == (24, 7)
    loss = sum(F.cross_entropy(z, torch.full((32,), label)) for label in range(7)) / 7
    assert found.first_loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert found.uniform_loss == pytest.approx(math.log(7))


def test_dead_units_are_those_that_the_rectifier_cuts_off_for_all_samples():
    net, x = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)), normal(20, 6)
    with torch.no_grad():
        net[0].bias.copy_(torch.linspace(-4, 4, 40))
    dead = float((net[0](x) <= 0).all(0).double().mean())
    assert 0.1 < dead < 0.5
    assert inspect(net, x)["0.weight"].dead == pytest.approx(dead)


def test_dead_channels_are_found_behind_a_norm_and_a_zero_head():
    net, x = convolutional(), normal(32, 2, 6, 6)
    with torch.no_grad():
        net[1].bias[:6] = -20
        net[5].weight.zero_()
        net[5].bias.zero_()
    found = inspect(net, x)
    assert found["0.weight"].dead == pytest.approx(6 / 24)
    assert found["5.weight"].note == "zero"
    assert found["5.weight"].dead == 0


def test_the_closed_form_is_that_of_init_():
    net, x = nn.Sequential(nn.Linear(30, 50), nn.Tanh(), nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 4)), normal(64, 30)
    before = inspect(net, x)
    _, report = hessinit.init_(net, x, seed=0, return_report=True)
    for name in ("0.weight", "2.weight", "4.weight"):
        assert before[name].closed_form == pytest.approx(report[name].std)
    assert inspect(net, x)["2.weight"].std == pytest.approx(report["2.weight"].std, rel=0.01)


def test_classes_are_on_the_last_or_the_second_axis():
    net = nn.Conv2d(1, 5, 1)
    x = normal(8, 1, 4, 4)
    assert math.isnan(inspect(net, x).first_loss)
    found = inspect(net, x, classes=5)
    z = net(x).detach()
    assert found.first_loss == pytest.approx(float((z.logsumexp(1) - z.mean(1)).mean()), rel=1e-5)
    assert math.isnan(inspect(nn.Linear(3, 5), normal(8, 3), classes=0).first_loss)
    with pytest.raises(
        ValueError, match=r"^inspect: classes must be 0, or .*; got 6 for outputs of shape \(8, 5, 4, 4\)"
    ):
        inspect(net, x, classes=6)


def test_a_layer_that_takes_no_part_is_not_used_and_one_that_comes_twice_has_both_signals():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.twice(self.twice(x))

    net, x = Odd(), normal(16, 4)
    found = inspect(net, x)
    assert found["idle.weight"].note == "not used"
    assert math.isnan(found["idle.weight"].dead)
    once = net.twice(x)
    assert found["twice.weight"].rms == pytest.approx(rms(torch.cat([once, net.twice(once)])), rel=1e-5)
    assert found.warnings == ()


def test_an_axis_of_other_things_than_samples_shows_no_variation():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.along, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.along(x.transpose(0, 1))[-1])

    found = inspect(Turned(), normal(16, 7, 4))
    assert math.isnan(found["along.weight"].variation)
    assert 0.1 < found["out.weight"].variation < 1


def test_weights_computed_from_others_and_several_inputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
            self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))

        def forward(self, x, scale):
            return self.spectral(self.normed(x) * scale)

    net, x = Pair(), normal(16, 6)
    found = inspect(net, {"x": x, "scale": torch.full((16, 1), 2.0)})
    names = ["normed.parametrizations.weight.original0", "spectral.parametrizations.weight.original"]
    assert [layer.name for layer in found.layers] == names
    assert [layer.kind for layer in found.layers] == ["Linear", "Linear"]
    assert found[names[0]].rms == pytest.approx(rms(net.normed(x)), rel=1e-5)
    assert found[names[0]].shape == (4, 6)
    assert not math.isnan(found[names[0]].closed_form)
    assert inspect(net, (x, 2.0))[names[1]].rms == found[names[1]].rms


# ---- what stays ------------------------------------------------------------------------------------------------------


class Touchy(nn.Module):
    """Of layers that write to buffers, to weights and to the global random states, in mixed modes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16, max_norm=0.5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
        self.norm, self.drop, self.out = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 4)
        self.calls = 0
        self.fails = False

    def forward(self, t):
        self.calls += 1
        x = self.drop(self.norm(self.spectral(self.embed(t).mean(1))))
        x = x + random.random() + np.random.rand() + torch.rand(())
        if self.fails:
            raise RuntimeError("as asked")
        return self.out(x)


def state(net):
    tensors = {name: t.clone() for name, t in net.state_dict().items()}
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    hooks = [len(m._forward_hooks) for m in net.modules()]
    modes = [m.training for m in net.modules()]
    return tensors, gradients, [hooks, modes, [p.requires_grad for p in net.parameters()], net.calls]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_or_the_random_states_changes(fails):
    net = Touchy()
    net.norm.eval()
    net.embed.weight.requires_grad_(False)
    tokens = torch.arange(64).reshape(16, 4) % 50
    net(tokens).sum().backward()
    with torch.no_grad():
        net.embed.weight.mul_(10)  # so that one more pass would write to it
    net.fails = fails
    before, states = state(net), (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())
    if fails:
        with pytest.raises(
            ValueError, match=r"^inspect: inputs must be .* got shape \(16, 4\) and RuntimeError in the model"
        ):
            inspect(net, tokens)
    else:
        assert len(inspect(net, tokens).layers) == 3
    after = state(net)
    for one, two in zip(before[:2], after[:2], strict=True):
        assert list(one) == list(two)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(before[1]) > 0
    assert before[2] == after[2]
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    net.fails = False
    net(tokens)  # a pass of one's own does change it, so the comparison can tell
    assert not all(torch.equal(t, after[0][name]) for name, t in net.state_dict().items())


def test_the_samples_are_of_the_models_type():
    x = random_inputs(nn.Linear(5, 2).double(), [5], batch_size=4000)
    assert (x.dtype, tuple(x.shape)) == (torch.float64, (4000, 5))
    assert abs(float(x.mean())) < 5 / math.sqrt(20000)
    assert float(x.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / 20000))
    tokens = random_inputs(nn.Embedding(9, 2), [7], integers=9)
    assert tokens.dtype == torch.int64
    assert sorted(set(tokens.flatten().tolist())) == list(range(9))
    assert random_inputs(nn.Linear(5, 2, device="meta"), [5]).device.type == "meta"
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert inspect(lazy, random_inputs(lazy, [5]))["0.weight"].shape == (3, 5)


def test_a_model_in_keras():
    import keras

    layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(20, 3, activation="relu"), keras.layers.BatchNormalization()]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dropout(0.5), keras.layers.Dense(6)])
    convolution = model.layers[0]
    convolution.bias.assign(np.where(np.arange(20) < 18, -30.0, 0.0))
    x = np.random.default_rng(0).standard_normal((16, 8, 8, 1)).astype("float32")
    saved = model.get_weights()
    found = inspect(model, x)
    assert [layer.kind for layer in found.layers] == ["Conv2D", "Dense"]
    kernel = found[convolution.kernel.path]
    output = keras.ops.convert_to_numpy(convolution(x))
    assert kernel.rms == pytest.approx(math.sqrt(np.mean(output.astype(float) ** 2)), rel=1e-4)
    assert kernel.dead == 0.9
    assert found.warnings == (f"dead units, which no sample moves: 90% of {convolution.kernel.path}",)
    assert found.uniform_loss == pytest.approx(math.log(6))
    assert all(np.array_equal(a, b) for a, b in zip(saved, model.get_weights(), strict=True))
    assert all("call" not in vars(layer) for layer in model._flatten_layers())
