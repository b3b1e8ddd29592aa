"""The contract of the four tensor initializers, in the manner of torch.nn.init."""

import math
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessinit
from hessinit import rules
from hessinit import torch as ht
from hessinit.layout import Layout

FILLS = [ht.hessian_normal_, ht.hessian_uniform_, ht.hessian_truncated_normal_, ht.hessian_orthogonal_]
fills = pytest.mark.parametrize("fill", FILLS, ids=lambda f: f.__name__)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@fills
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fills_in_place_without_grad_and_keeps_dtype(fill, dtype):
    w = nn.Parameter(torch.zeros(64, 256, dtype=dtype))
    assert fill(w, generator=generator()) is w
    assert w.dtype == dtype
    assert w.requires_grad
    assert w.grad_fn is None
    expected = rules.curvature_neutral_std(256, 64, rules.gain("relu"))
    assert w.detach().double().square().mean().sqrt().item() == pytest.approx(expected, rel=0.03)


@fills
def test_half_precision_is_the_cast_of_single(fill):
    single = fill(torch.empty(32, 48), generator=generator())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(fill(torch.empty(32, 48, dtype=dtype), generator=generator()), single.to(dtype))


@fills
def test_generator_decides_everything(fill):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = fill(torch.empty(8, 9), generator=generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(one, fill(torch.empty(8, 9), generator=generator(5)))
    assert not torch.equal(one, fill(torch.empty(8, 9), generator=generator(6)))


@fills
def test_without_generator_the_global_one_is_used_and_advances(fill):
    torch.manual_seed(1)
    one, two = fill(torch.empty(8, 9)), fill(torch.empty(8, 9))
    assert not torch.equal(one, two)
    torch.manual_seed(1)
    assert torch.equal(one, fill(torch.empty(8, 9)))


@fills
def test_meta_and_zero_size_tensors_return_as_they_are(fill):
    meta = torch.empty(3, 4, device="meta")
    assert fill(meta) is meta
    for shape in [(0, 3), (3, 0), (2, 0, 3, 3)]:
        empty = torch.empty(shape)
        assert fill(empty) is empty


@fills
def test_a_strided_view_is_filled_and_nothing_else(fill):
    base = torch.zeros(6, 10)
    fill(base[:, ::2], generator=generator())
    assert base[:, ::2].abs().min() > 0
    assert (base[:, 1::2] == 0).all()


@fills
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((128, 784), "oi"),
        ((784, 128), "io"),
        ((64, 1, 3, 3), Layout("(go)i...", groups=64)),
        ((64, 32, 4, 4), Layout("io...", stride=4, transposed=True)),
        ((96, 32), Layout("(go)i", groups=3)),
        ((5, 64, 64), "goi"),
    ],
)
def test_scale_follows_layout_gain_and_depth(fill, shape, layout):
    fans = rules.fans(shape, layout)
    for keywords, g in [({}, 0.5**0.5), ({"gain": 2.0}, 2.0), ({"nonlinearity": "tanh", "depth": 20}, None)]:
        w = fill(torch.empty(shape), layout=layout, generator=generator(), **keywords).double()
        std = rules.curvature_neutral_std(*fans, g or rules.gain("tanh", depth=20))
        assert w.square().mean().sqrt().item() == pytest.approx(std, rel=4 / math.sqrt(w.numel()))


@fills
@pytest.mark.parametrize(
    ("tensor", "keywords", "error", "message"),
    [
        (np.zeros((2, 2)), {}, TypeError, "tensor must be a torch.Tensor; got ndarray"),
        (torch.zeros(3), {}, ValueError, r"at least two axes; got a tensor of shape \(3,\)"),
        (torch.zeros(2, 2, dtype=torch.int64), {}, TypeError, "real floating-point dtype; got torch.int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), {}, TypeError, "got torch.complex64"),
        (torch.zeros(2, 2), {"nonlinearity": "swosh"}, ValueError, r"got 'swosh'.*\(for a tensor of shape \(2, 2\)\)"),
        (torch.zeros(2, 2), {"gain": -1.0}, ValueError, "gain must be a finite positive number; got -1.0"),
        (torch.zeros(2, 2), {"gain": math.nan}, ValueError, "gain must be"),
        (torch.zeros(2, 2), {"layout": "oikk"}, ValueError, "axes must fit the shape"),
        (torch.zeros(2, 2), {"layout": "xy"}, ValueError, "axes must be made of"),
        (torch.zeros(2, 2), {"depth": 0}, ValueError, "depth must be"),
        (nn.parameter.UninitializedParameter(), {}, ValueError, "must be materialised"),
    ],
    ids=str,
)
def test_bad_input_is_named_and_nothing_is_written(fill, tensor, keywords, error, message):
    with pytest.raises(error, match=f"{fill.__name__}: .*{message}"):
        fill(tensor, generator=generator(), **keywords)
    if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.parameter.UninitializedParameter):
        assert (tensor == 0).all()


@pytest.mark.parametrize(
    ("nonlinearity", "name"),
    [
        (nn.GELU(), "gelu"),
        (F.silu, "silu"),
        (torch.tanh, "tanh"),
        (nn.ReLU6(), "relu6"),
        (np.tanh, "tanh"),
        (nn.Mish(), "mish"),
    ],
)
def test_calculate_gain_takes_modules_and_functions(nonlinearity, name):
    assert ht.calculate_gain(nonlinearity) == pytest.approx(rules.gain(name), rel=1e-9)


def test_calculate_gain_is_the_gain_of_the_initializers():
    one = ht.hessian_normal_(torch.empty(4, 4), "gelu", generator=generator())
    two = ht.hessian_normal_(torch.empty(4, 4), gain=ht.calculate_gain("gelu"), generator=generator())
    assert torch.equal(one, two)
    assert ht.calculate_gain("leaky_relu", 0.2) ** 2 == pytest.approx(0.52)
    assert ht.calculate_gain("tanh", depth=20) == rules.gain("tanh", depth=20)


class Trainer:
    """What a Lightning trainer shows to a callback when training starts."""

    def __init__(self, model, **changed):
        generator = torch.Generator().manual_seed(0)
        batches = [(torch.randn(32, 12, generator=generator), torch.arange(32) % 3) for _ in range(4)]
        self.train_dataloader, self.optimizers = batches, [torch.optim.Adam(model.parameters(), 1e-2)]
        self.global_step, self.world_size = 0, 1
        vars(self).update(changed)


def test_the_lightning_callback_joins_the_processes_of_the_trainer(lightning, monkeypatch):
    given = {}
    monkeypatch.setattr(ht, "init_", lambda *args, **options: (given.update(options), "report"))
    for size in (1, 2):
        model = lightning_model()
        ht.lightning_callback("cross_entropy").on_train_start(Trainer(model, world_size=size), model)
        assert ("process_group" in given) == (size == 2)


@pytest.fixture
def lightning(monkeypatch):
    """A module in Lightning's place, which cannot be imported beside the torchvision of the tests."""
    package, module = ModuleType("lightning"), ModuleType("lightning.pytorch")
    module.Callback, package.pytorch = type("Callback", (), {}), module
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    return module


def lightning_model():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def test_the_lightning_callback_sets_the_model_for_its_optimizer_before_the_first_step(lightning):
    model, same = lightning_model(), lightning_model()
    callback = ht.lightning_callback("cross_entropy", seed=0)
    assert isinstance(callback, lightning.Callback)
    assert callback.report is None
    callback.on_train_start(Trainer(model), model)
    trainer = Trainer(same)
    hessinit.init_(same, trainer.train_dataloader, "cross_entropy", optimizer=trainer.optimizers[0], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert callback.report.calibration.samples == 128
    before = [p.clone() for p in model.parameters()]
    callback.on_train_start(Trainer(model, global_step=7), model)  # resumed
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_lightning_callback_refuses_several_optimizers(lightning):
    model = lightning_model()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="^lightning_callback: optimizers of the trainer must be one; got 0"):
        ht.lightning_callback("cross_entropy").on_train_start(Trainer(model, optimizers=[]), model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
