"""The same on an accelerator as on the CPU; skipped where there is none."""

import copy
import gc

import pytest
import torch
from torch import nn

import hessinit
from hessinit import curvature

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(8, 16, num_layers=2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 96), nn.Linear(32, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


def convolutions():
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2)
    return nn.Sequential(nn.Unflatten(1, (1, 10)), *layers, nn.Flatten(), nn.Linear(252, 4))


def encoder():
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(80, 4))


NETS = {
    "convolutions": convolutions,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "encoder": encoder,
}
every = pytest.mark.parametrize("name", NETS)


def data(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 10, 8, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return x.to(device, dtype), y.to(device)


def pair(name, dtype=torch.float32):
    """The same net on both."""
    net = hessinit.init_(NETS[name](), data("cpu")[0], seed=0).to(dtype)
    return {device: copy.deepcopy(net).to(device) for device in ("cpu", "cuda")}


@every
def test_a_seed_means_the_same_weights_on_every_device(name):
    on = {device: hessinit.init_(NETS[name]().to(device), data(device)[0], seed=0) for device in ("cpu", "cuda")}
    for ours, theirs in zip(*(model.parameters() for model in on.values()), strict=True):
        assert theirs.device.type == "cuda"
        assert torch.allclose(ours, theirs.cpu(), rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
def test_the_budget_is_that_of_the_cpu_and_the_random_state_stays(name, rule):
    found = []
    for device, model in pair(name).items():
        state = torch.cuda.get_rng_state()
        optimizer = rule(model.parameters(), lr=0.01)
        _, report = hessinit.init_(
            model, data(device), "cross_entropy", optimizer=optimizer, seed=0, return_report=True
        )
        found.append([row.scale for row in report if row.role == "weight"])
        assert torch.equal(state, torch.cuda.get_rng_state())
    assert found[0] == pytest.approx(found[1], rel=0.05)


@every
@pytest.mark.parametrize("exact", [False, True])
def test_curvature_is_that_of_the_cpu(name, exact):
    products, traces = [], []
    for device, model in pair(name, torch.float64).items():
        operator = curvature.hessian(model, data(device, torch.float64), "cross_entropy", exact=exact)
        v = torch.linspace(-1, 1, operator.shape[1], dtype=torch.float64, device=device)
        products.append((operator @ v).cpu())
        traces.append(operator.trace(num_probes=3))
    assert torch.allclose(products[0], products[1], rtol=1e-6, atol=1e-10)
    assert float(traces[0]) == pytest.approx(float(traces[1]), rel=1e-6)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model = pair(name)["cuda"].to(dtype)
    hessinit.init_(model, data("cuda", dtype), "cross_entropy", lr=0.01, seed=0)
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())


def test_the_layout_of_memory_stays():
    model = convolutions().to("cuda", memory_format=torch.channels_last)
    before = [(p.stride(), p.data_ptr()) for p in model.parameters()]
    hessinit.init_(model, data("cuda"), "cross_entropy", lr=0.1)
    assert [(p.stride(), p.data_ptr()) for p in model.parameters()] == before


def test_many_calls_leave_its_memory_flat():
    def calls(number):
        for _ in range(number):
            hessinit.init_(model, batch, "cross_entropy", lr=0.1, seed=0)
            curvature.hessian(model, batch, "cross_entropy").eigsh(k=1)
        gc.collect()
        return torch.cuda.memory_allocated()

    model, batch = pair("attention")["cuda"], data("cuda")
    assert calls(20) <= calls(3)


def test_out_of_its_memory_every_weight_is_as_it_was():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(80, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, x):
            calls.append(0)
            if len(calls) > 4:
                torch.empty(2**42, device=x.device)
            return self.net(x)

    calls: list[int] = []
    model = Grows().to("cuda")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="memory"):
        hessinit.init_(model, data("cuda"), "cross_entropy", lr=0.1)
    assert len(calls) > 4
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def images():
    """A net that is not whole before it has seen data, and a batch for it, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(64, 1, 8, 8, generator=generator), torch.randint(0, 4, (64,), generator=generator)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)), batch


def test_a_lazy_net_has_the_budget_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model, batch = images()
        x, y = (t.to(device) for t in batch)
        model = hessinit.init_(model.to(device), x, seed=0)
        _, report = hessinit.init_(model, (x, y), "cross_entropy", lr=0.1, seed=0, return_report=True)
        found.append([row.scale for row in report if row.role == "weight"])
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_layer_traces_are_those_of_the_cpu():
    model, batch = images()
    model = hessinit.init_(model, batch[0], seed=0)
    ours = curvature.layer_traces(model, batch, "cross_entropy", seed=0)
    on_device = tuple(t.to("cuda") for t in batch)
    theirs = curvature.layer_traces(model.to("cuda"), on_device, "cross_entropy", seed=0)
    assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=1e-3)
