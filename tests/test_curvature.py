"""The approximate and the exact Hessian of every kind of model against dense truth in float64."""

import copy
import functools
import random

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import dense_truth
from torch import nn

from hessinit import curvature
from hessinit.networks.torch_autodiff import TorchArrays
from hessinit.spectrum import eigenpairs

MODELS = cases.models()
every_model = pytest.mark.parametrize("name", MODELS)


def close(x, y, rtol=1e-10):
    x, y = torch.as_tensor(np.asarray(x)).double(), torch.as_tensor(np.asarray(y)).double()
    assert torch.linalg.norm(x - y) <= rtol * torch.linalg.norm(y), (x, y)


@functools.cache
def truth(name):
    """(G, H, gradient) of a case."""
    return dense_truth(MODELS[name].model, MODELS[name].batch, MODELS[name].torch_loss)


def operators(name):
    case = MODELS[name]
    return (curvature.hessian(case.model, case.batch, case.loss, exact=exact) for exact in (False, True))


@every_model
def test_every_part_against_dense_truth(name):
    for operator, true in zip(operators(name), truth(name), strict=False):
        n = true.shape[0]
        assert operator.shape == (n, n)
        close(operator.dense(), true)
        v = torch.from_numpy(np.random.default_rng(0).normal(size=(n, 2)))
        close(operator @ v[:, 0], true @ v[:, 0])
        close(operator @ v, true @ v)
        close(operator.quadratic_form(v[:, 0]), v[:, 0] @ true @ v[:, 0])
        close(operator.flatten(operator.diagonal()), true.diagonal())
        close(operator.trace(), true.trace())
        close(operator.norm(), torch.linalg.norm(true))
        close(operator.norm(2), torch.linalg.matrix_norm(true, 2), 1e-8)
        first, last = operator.rows[0], operator.rows[-1]
        at = {key: slice(*where) for key, where in places(operator).items()}
        close(operator.block(last, first).dense(), true[at[last], at[first]])
        close(
            operator.block(first).quadratic_form(v[at[first], 0]),
            v[at[first], 0] @ true[at[first], at[first]] @ v[at[first], 0],
        )
        traces = operator.traces()
        for key in operator.rows:
            assert abs(traces[key] - true[at[key], at[key]].trace()) <= 1e-10 * max(1e-3, abs(true.trace()))


def places(operator):
    stops = np.cumsum([operator.block(name).shape[0] for name in operator.rows]).tolist()
    return dict(zip(operator.rows, zip([0, *stops[:-1]], stops, strict=True), strict=True))


@every_model
def test_rayleigh_quotients_traces_and_errors_by_layer(name):
    case, (approximate, exact, gradient) = MODELS[name], truth(name)
    operator, _ = operators(name)
    where = places(operator)
    kappa = curvature.rayleigh(case.model, case.batch, case.loss)
    traces = curvature.layer_traces(case.model, case.batch, case.loss, num_probes=None)
    errors = curvature.approximation_error(case.model, case.batch, case.loss, tol=1e-6)
    assert list(kappa) == list(traces) == list(errors)
    for layer in kappa:
        names = [n for n in where if operator.objective.parameters[n].layer == layer]
        index = np.concatenate([np.arange(*where[n]) for n in names])
        g, a, e = gradient[index], approximate[np.ix_(index, index)], exact[np.ix_(index, index)]
        close(kappa[layer], g @ a @ g / (g @ g))
        close(traces[layer], a.trace())
        off = abs(g @ (e - a) @ g)
        assert abs(errors[layer].gradient - off / (g @ g)) <= 1e-10 * abs(g @ e @ g) / (g @ g)
        assert abs(errors[layer].relative - off / abs(g @ e @ g)) <= 1e-9 * max(1, off / abs(g @ e @ g))
        close(errors[layer].exact, g @ e @ g / (g @ g))
        block = torch.linalg.matrix_norm(e - a, 2) / torch.linalg.matrix_norm(e, 2)
        assert abs(errors[layer].block - block) <= 1e-4 * block + 1e-12


@every_model
def test_exactness_is_what_the_dense_matrices_say(name):
    approximate, exact, _ = truth(name)
    operator, exact_operator = operators(name)
    where = places(operator)
    for one in operator.rows:
        for other in operator.rows:
            block = operator.block(one, other)
            same = (
                exact[slice(*where[one]), slice(*where[other])] - approximate[slice(*where[one]), slice(*where[other])]
            )
            # A block without curvature effect is exact; with it, by chance never zero.
            assert (block.exactness == "exact") == bool(same.abs().max() <= 1e-12 * exact.abs().max()), (one, other)
    assert operator.exactness == "approximate"
    assert operator.trace().exactness in ("exact", "approximate")
    assert exact_operator.exactness == "exact"
    assert exact_operator.block(operator.rows[0], operator.rows[-1]).exactness.reason == "it is the exact Hessian"


def test_exactness_of_piecewise_linear_nets_and_of_the_last_layer():
    for name in ("relu mlp", "conv relu max-pool"):
        operator, _ = operators(name)
        layers = {operator.objective.parameters[n].layer for n in operator.rows}
        assert all(operator.block(f"{layer}.*").exactness == "exact" for layer in layers)
        assert operator.trace().exactness == "exact"
        assert set(operator.diagonal().exactness.values()) == {"exact"}
        crossed = operator.block(operator.rows[0], operator.rows[-2])
        assert crossed.exactness == "approximate"
        assert "neglected" in crossed.exactness.reason
    tanh, _ = operators("tanh mlp")
    assert [str(tanh.block(f"{k}.*").exactness) for k in (0, 2, 4)] == ["approximate", "approximate", "exact"]
    assert tanh.trace().exactness == "approximate"
    assert curvature.rayleigh(MODELS["tanh mlp"].model, MODELS["tanh mlp"].batch, "cross_entropy").exactness == {
        "0": "approximate", "2": "approximate", "4": "exact",
    }  # fmt: skip


# ---- vectors -------------------------------------------------------------------------------------------------------


def test_the_same_kind_of_vector_out_as_in():
    operator, _ = operators("tanh mlp")
    true = truth("tanh mlp")[0]
    flat = torch.randn(operator.shape[0], 3).double()
    for v in (flat[:, 0], flat):
        for form in (v, v.numpy(), operator.unflatten(v)):
            product = operator @ form
            assert type(product) is type(form)
            close(operator.flatten(product) if isinstance(product, dict) else product, true @ v)
    named = operator.unflatten(flat[:, 0])
    assert {n: tuple(t.shape) for n, t in named.items()} == {
        n: tuple(p.shape) for n, p in MODELS["tanh mlp"].model.named_parameters()
    }
    assert (operator @ flat.numpy().astype(np.float32)).dtype == np.float32
    half = operator.block("4.*", "0.*")
    assert half.shape == (15, 25)
    assert set(half @ {n: named[n] for n in half.cols}) == {"4.weight", "4.bias"}
    close(half.T.dense(), half.dense().T)


def test_scipy_eigenvalues_and_spectral_density():
    for k, operator in enumerate(operators("tanh mlp")):
        true = truth("tanh mlp")[k]
        values, vectors = operator.eigsh(3)
        expected = np.linalg.eigvalsh(true.numpy())
        largest = np.sort(expected[np.argsort(-abs(expected))[:3]])
        close(values, largest, 1e-8)
        close(true.numpy() @ vectors, vectors * values, 1e-6)
        close(operator.eigsh(2, which="LA")[0], expected[-2:], 1e-8)
        close(
            operator.block("4.bias").eigsh(2)[0], np.linalg.eigvalsh(true[-3:, -3:].numpy())[-2:]
        )  # too small for Lanczos
        scipy = operator.block("4.weight", "0.weight").to_scipy()
        u, v = np.random.default_rng(0).normal(size=(2, 20))[:, : scipy.shape[0]], np.ones(scipy.shape[1])
        assert abs(u[0] @ scipy.matvec(v) - scipy.rmatvec(u[0]) @ v) < 1e-12
        density = operator.spectral_density(num_probes=20, steps=45, width=0.02)
        assert abs(np.trapezoid(density.density, density.grid) - 1) < 1e-3
        for power, moment in ((1, true.trace()), (2, true.square().sum())):
            mean, error = density.moment(power)
            assert abs(mean - moment / true.shape[0]) < 4 * error + 1e-10
        smooth = np.exp(-(((density.grid - expected[:, None]) / 0.02) ** 2) / 2).mean(0) / (0.02 * np.sqrt(2 * np.pi))
        assert np.mean(np.abs(density.density - smooth) <= 4 * density.standard_error + 1e-3) > 0.95


def test_the_largest_eigenvalue_in_single_precision_takes_few_products():
    case = MODELS["lenet tanh"]
    operator = curvature.hessian(copy.deepcopy(case.model).float(), (case.batch[0].float(), case.batch[1]), case.loss)
    true, vectors = np.linalg.eigh(truth("lenet tanh")[0].numpy())
    products = []
    plain = type(operator.objective).product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operator.objective), "product", lambda *args: products.append(1) or plain(*args))
        values, found = operator.eigsh(k=1)
    close(values, true[-1:], 1e-5)
    assert abs(found[:, 0] @ vectors[:, -1]) == pytest.approx(1, abs=1e-5)
    assert 3 <= len(products) < 10


def test_eigenpairs_of_any_end_from_any_start():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.standard_normal((60, 60)))
    spectrum = np.concatenate([[-9.0, -4.0], np.linspace(-1, 1.1, 54), [3.0, 5.0, 5.0, 7.0]])
    matrix = (q * spectrum) @ q.T
    start = rng.standard_normal(60)
    for which, k, expected in (("LM", 3, [-9, 5, 7]), ("LA", 4, [3, 5, 5, 7]), ("SA", 2, [-9, -4]), ("LM", 1, [-9])):
        for ncv in (k + 2, None, 60):  # with few vectors, restarts
            values, vectors = eigenpairs(lambda v: matrix @ v, start, k, which, ncv=ncv)
            np.testing.assert_allclose(values, expected, atol=1e-9)
            np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-6)
            np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-9)
    close(
        eigenpairs(lambda v: matrix @ v, start, 1, "SM", tol=1e-6)[0], np.array([spectrum[np.abs(spectrum).argmin()]])
    )
    values, _ = eigenpairs(lambda v: matrix @ v, q[:, -1] + 1e-12 * start, 2, "LA")  # in an invariant space
    np.testing.assert_allclose(values, [5, 7], atol=1e-9)
    values, vectors = eigenpairs(lambda v: 0 * v, start, 2)
    np.testing.assert_array_equal(values, [0, 0])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(2), atol=1e-12)
    with pytest.raises(RuntimeError, match="1 of 1 eigenvalues have not converged after 2 restarts"):
        eigenpairs(lambda v: matrix @ v, start, 1, "SM", ncv=3, maxiter=2)


def test_arrays_handed_over_are_not_written_again(monkeypatch):
    """A framework may share their memory and read it later, as JAX does: what is still to be read would be another."""
    case, given, asarray = MODELS["tanh mlp"], [], TorchArrays.asarray

    def recorded(self, x, like):
        given.extend([(x, x.copy())] if isinstance(x, np.ndarray) else [])
        return asarray(self, x, like)

    monkeypatch.setattr(TorchArrays, "asarray", recorded)
    operator = curvature.hessian(case.model, case.batch, case.loss).block("4.*")
    for work in (operator.dense, operator.diagonal):
        given.clear()
        work()
        operator.traces(3)
        assert len(given) >= 3
        assert all(np.array_equal(x, before) for x, before in given)


# ---- estimates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_estimates_are_within_their_errors_and_reject_ten_percent(exact):
    case = MODELS["tanh mlp"]
    operator = curvature.hessian(case.model, case.batch, case.loss, exact=exact, seed=1).block("4.*")
    true = truth("tanh mlp")[int(exact)][-15:, -15:]
    probes = 1500 if exact else 600
    for estimate, value in (
        (operator.trace(probes), true.trace()),
        (operator.norm(num_probes=probes), torch.linalg.norm(true)),
    ):
        assert estimate.num_probes == probes
        assert abs(estimate - value) < 4 * estimate.standard_error
        assert abs(estimate - 1.1 * value) > 4 * estimate.standard_error
    diagonal = operator.diagonal(num_probes=probes)
    estimate, error = operator.flatten(diagonal), operator.flatten(diagonal.standard_error)
    assert ((estimate - true.diagonal()).abs() < 4 * error).all()
    assert ((estimate - 1.1 * true.diagonal()).abs() > 4 * error).any()


def test_layer_traces_by_probes():
    case = MODELS["lenet tanh"]
    full = curvature.layer_traces(case.model, case.batch, case.loss, num_probes=None)
    some = curvature.layer_traces(case.model, case.batch, case.loss, num_probes=1000)
    for layer, value in full.items():
        assert abs(some[layer] - value) < 4 * some.standard_error[layer]
        assert abs(some[layer] - 1.1 * value) > some.standard_error[layer]
    one, again, other = (
        dict(curvature.layer_traces(case.model, case.batch, case.loss, num_probes=20, seed=seed)) for seed in (0, 0, 5)
    )
    assert one == again != other
    assert full.standard_error == {}
    assert curvature.layer_traces(case.model, case.batch, case.loss, num_probes=1).standard_error["0"] == float("inf")


def test_any_loss_has_traces_too():
    case = MODELS["tanh mlp"]
    x, target = case.batch[0], torch.randn(6, 3).double()

    def loss(z, y):  # not convex: D²_z ℓ has negative eigenvalues
        return torch.cos(z - y).mean() + (z**2).mean()

    true, exact, _ = dense_truth(case.model, (x, target), loss)
    operator = curvature.hessian(case.model, (x, target), loss)
    close(operator.dense(), true)
    close(operator.flatten(operator.diagonal()), true.diagonal())
    trace = operator.trace(num_probes=800)
    assert abs(trace - true.trace()) < 4 * trace.standard_error

    def coupled(z, y):  # samples are not separate terms
        return (z.mean(0) ** 2).sum() + z.std()

    true, exact, _ = dense_truth(case.model, (x, target), coupled)
    close(curvature.hessian(case.model, (x, target), coupled).trace(), true.trace())
    close(curvature.hessian(case.model, (x, target), coupled, exact=True).dense(), exact)


# ---- data ----------------------------------------------------------------------------------------------------------


def test_splits_of_the_data_change_nothing():
    torch.manual_seed(0)
    x, y = torch.randn(10, 4).double(), torch.tensor([0, 1, 2, -100, -100, 1, 0, -100, 2, 2])
    model = MODELS["tanh mlp"].model
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    whole = curvature.hessian(model, (x, y), loss)
    dense, v = whole.dense(), torch.randn(whole.shape[0]).double()
    loaders = [
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4),  # last one short
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3, shuffle=True),
        [(x[:1], y[:1]), (x[1:], y[1:])],
        [(x[3:5], y[3:5]), (x[:3], y[:3]), (x[5:], y[5:])],  # the first without a term
        [{"input": x[:7], "labels": y[:7]}, {"input": x[7:], "labels": y[7:]}],
    ]
    for loader in loaders:
        close(curvature.hessian(model, loader, loss).dense(), dense)
        close(curvature.hessian(model, loader, loss).trace(), dense.trace())
        close(
            curvature.hessian(model, loader, loss, exact=True) @ v,
            curvature.hessian(model, (x, y), loss, exact=True) @ v,
        )
        assert list(curvature.rayleigh(model, loader, loss).values()) == pytest.approx(
            list(curvature.rayleigh(model, (x, y), loss).values()), rel=1e-10
        )
    close(curvature.hessian(model, (x, y), loss, chunk_size=3).dense(), dense)
    close(curvature.hessian(model, {"input": x, "y": y}, loss).dense(), dense)
    summed = nn.CrossEntropyLoss(weight=loss.weight, reduction="sum")
    close(curvature.hessian(model, loaders[0], summed).dense(), dense * loss.weight[y[y >= 0]].sum())


def test_forward_for_any_structure_and_outputs_with_logits():
    class Output(dict):
        logits = property(lambda self: self["logits"])

    class Wrapped(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, features):
            return Output(logits=self.body(features["x"]), hidden=features["x"])

    x, y = MODELS["tanh mlp"].batch
    body = MODELS["tanh mlp"].model
    plain = curvature.hessian(body, (x, y), "cross_entropy").dense()

    def forward(model, batch):
        return model(batch["nested"][0]), batch["nested"][1]["label"]

    given = curvature.hessian(body, {"nested": [x, {"label": y}]}, "cross_entropy", forward=forward, chunk_size=4)
    close(given.dense(), plain)
    wrapped = curvature.hessian(Wrapped(body), {"features": {"x": x}, "labels": y}, "cross_entropy")
    close(wrapped.dense(), plain)


def test_a_model_that_mixes_samples_refuses_chunks():
    case = MODELS["batch norm, training"]
    with pytest.raises(ValueError, match="chunk_size must be None for this model; got 3"):
        curvature.hessian(case.model, case.batch, case.loss, chunk_size=3)
    curvature.hessian(case.model, case.batch, case.loss, chunk_size=3, training=False)


# ---- parameters ----------------------------------------------------------------------------------------------------


def test_names_and_globs():
    case = MODELS["attention module, tied"]
    operator = curvature.hessian(case.model, case.batch, case.loss, params=["head.weight", "norm.*"])
    assert operator.rows == ("embed.weight", "norm.weight", "norm.bias")  # the tie by its first name
    frozen = MODELS["frozen"]
    assert "0.weight" not in curvature.hessian(frozen.model, frozen.batch, frozen.loss).rows
    named = curvature.hessian(frozen.model, frozen.batch, frozen.loss, params="0.*")
    assert named.rows == ("0.weight", "0.bias")
    free = copy.deepcopy(frozen.model).requires_grad_(True)
    close(named.dense(), curvature.hessian(free, frozen.batch, frozen.loss, params="0.*").dense())
    assert not frozen.model[0].weight.requires_grad


def test_dropout_is_off_unless_asked_for_and_then_one_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x, y = MODELS["tanh mlp"].batch
    off = curvature.hessian(model, (x, y), "cross_entropy", params="3.*").dense()
    close(off, curvature.hessian(copy.deepcopy(model).eval(), (x, y), "cross_entropy", params="3.*").dense())
    on = curvature.hessian(model, (x, y), "cross_entropy", params="3.*", dropout=True)
    dense = on.dense()
    close(dense, on.dense())
    assert (dense - off).norm() > 0.1 * off.norm()
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones(6, 30).double(), 0.5)
    h = torch.cat([torch.tanh(model[0](x)) * mask, torch.ones(6, 1).double()], 1)
    assert torch.linalg.matrix_rank(dense) == torch.linalg.matrix_rank(off)
    p = torch.softmax(model[3](torch.tanh(model[0](x)) * mask), 1)
    second = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    true = torch.einsum("nab,ni,nj->aibj", second, h, h).reshape(93, 93) / 6
    order = torch.tensor([31 * c + i for c in range(3) for i in range(30)] + [31 * c + 30 for c in range(3)])
    close(dense, true[order][:, order].detach())


LOWER = [
    (torch.float32, 1e-5, "lstm"),
    (torch.float32, 1e-5, "attention module, tied"),
    (torch.bfloat16, 0.1, "residual"),
]


@pytest.mark.parametrize(("dtype", "tolerance", "one"), LOWER)
def test_lower_precision(dtype, tolerance, one):
    for name in ("relu mlp", "lenet tanh", one):
        case = MODELS[name]
        model = copy.deepcopy(case.model).to(dtype)
        batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in case.batch)
        operator = curvature.hessian(model, batch, case.loss)
        close(operator.dense().double(), truth(name)[0], tolerance)
        close(operator.trace(), truth(name)[0].trace(), tolerance)
        assert operator.exactness == "approximate"
        if "tied" not in name:
            assert operator.block(operator.rows[-1]).exactness == "exact"


# ---- what changes: nothing -----------------------------------------------------------------------------------------


def state(model):
    return {
        "values": {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "ids": [id(p) for p in model.parameters()] + [id(b) for b in model.buffers()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
        "accelerator seeds": [call and call[0] for call in torch.cuda._lazy_seed_tracker.get_calls()],
        "switches": (
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.mkldnn.enabled,
        ),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@every_model
def test_nothing_of_the_model_or_the_global_state_changes(name):
    case = MODELS[name]
    model = case.model
    for p in list(model.parameters())[:2]:
        p.grad = torch.ones_like(p)
    before = state(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*case.batch), batch_size=3, shuffle=True)
    for data in (case.batch, loader):
        operator = curvature.hessian(model, data, case.loss, dropout=True)
        vector = torch.ones(operator.shape[0]).double()
        _ = operator @ vector, operator.quadratic_form(vector), operator.trace(2), str(operator.exactness)
        _ = curvature.hessian(model, data, case.loss, exact=True) @ vector
        _ = curvature.step_sharpness(model, data, case.loss, torch.optim.Adam(model.parameters()))
    bad = (case.batch[0], torch.full_like(case.batch[1], 99))
    with pytest.raises(ValueError, match="labels"):
        curvature.hessian(model, bad, case.loss)
    assert same(before, state(model))
    for p in model.parameters():
        p.grad = None


# ---- step sharpness ------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum, decay": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, maximize=False),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Lion": lambda p: Lion(p, lr=1e-4),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2], "lr": 0.5}, {"params": p[2:]}], lr=0.1),
    "some only": lambda p: torch.optim.SGD(p[2:], lr=0.1),
}


class Lion(torch.optim.Optimizer):
    """Written by a user: the sign of a moving average."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(group["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
                m.mul_(0.99).add_(0.01 * p.grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_step_sharpness_is_that_of_the_step_the_optimizer_takes(name, steps):
    case = MODELS["tanh mlp"]
    model = copy.deepcopy(case.model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))

    def gradient():
        optimizer.zero_grad()
        F.cross_entropy(model(case.batch[0]), case.batch[1]).backward()

    for _ in range(steps):
        gradient()
        optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    rho = curvature.step_sharpness(model, case.batch, case.loss, optimizer)
    assert same(saved, optimizer.state_dict())
    true, _, g = dense_truth(model, case.batch, F.cross_entropy)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    gradient()
    optimizer.step()
    step = torch.cat([p.detach().reshape(-1) for p in model.parameters()]) - before
    close(rho, step @ true @ step / abs(g @ step), 1e-9)


def test_step_sharpness_of_a_rate_a_schedule_and_hooks():
    case = MODELS["relu mlp"]
    model = copy.deepcopy(case.model)
    true, _, g = dense_truth(model, case.batch, F.cross_entropy)
    rho = curvature.step_sharpness(model, case.batch, case.loss, 0.05)
    close(rho, 0.05 * (g @ true @ g) / (g @ g))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1)  # wraps optimizer.step
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before = state(model)
    close(curvature.step_sharpness(model, case.batch, case.loss, optimizer), rho)
    assert same(before, state(model))
    assert not calls
    assert schedule.last_epoch == 0
    with pytest.raises(TypeError, match="must take a step without a closure; LBFGS does not"):
        curvature.step_sharpness(model, case.batch, case.loss, torch.optim.LBFGS(model.parameters()))
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="step_sharpness: optimizer_or_lr must be a positive, finite"):
            curvature.step_sharpness(model, case.batch, case.loss, wrong)
    for wrong in ("sgd", True, None):
        with pytest.raises(TypeError, match="step_sharpness: optimizer must be a learning rate or a torch"):
            curvature.step_sharpness(model, case.batch, case.loss, wrong)


# ---- another library -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu mlp", "tanh mlp", "lenet tanh", "residual"])
def test_against_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    case = MODELS[name]
    model = copy.deepcopy(case.model).eval()
    parameters = list(model.parameters())
    given = (model, nn.CrossEntropyLoss(), parameters, [case.batch])
    for exact, theirs in ((False, curvlinops.GGNLinearOperator), (True, curvlinops.HessianLinearOperator)):
        operator = curvature.hessian(model, case.batch, case.loss, exact=exact)
        v = torch.randn(operator.shape[0]).double()
        close(operator @ v, (theirs(*given) @ v).detach(), 1e-6)


# ---- bad input -----------------------------------------------------------------------------------------------------


class Opaque(nn.Module):
    def forward(self, x):
        return cases.Undifferentiable.apply(x)


def bad_inputs():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    integers = nn.Sequential(nn.Linear(4, 3))
    integers.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    nan = x.clone()
    nan[2, 1] = float("nan")
    broken = copy.deepcopy(net)
    broken[2].weight.data[0, 0] = float("inf")
    pair, frozen = (x, y), copy.deepcopy(net).requires_grad_(False)
    return {
        "no such parameter": (net, pair, {"params": "fc9.*"}, ValueError, "got .fc9.*., which matches none of"),
        "not a name": (net, pair, {"params": [3]}, ValueError, "got 3"),
        "integer parameter": (integers, pair, {"params": "table"}, ValueError, "got 'table' of type int64"),
        "nothing trains": (frozen, pair, {}, ValueError, "model must have parameters that train"),
        "not a model": (3, pair, {}, TypeError, "model must be a torch.nn.Module or a keras.Model; got int"),
        "NaN in the data": (net, (nan, y), {}, ValueError, "batch must be finite"),
        "infinite weight": (broken, pair, {}, ValueError, "outputs must be finite; parameter '2.weight' is not"),
        "no samples": (net, (x[:0], y[:0]), {}, ValueError, "batch must not be empty; got no samples"),
        "no batches": (net, [], {}, ValueError, "batch must not be empty; got a loader that yields nothing"),
        "iterator": (net, iter([pair]), {}, TypeError, "a loader that can be read more than once"),
        "number": (net, 5, {}, TypeError, "batch must be a pair"),
        "triple": (net, (x, y, y), {}, ValueError, "got 3 parts"),
        "wrong width": (net, (x[:, :3], y), {}, ValueError, r"in module 0 \(Linear\)"),
        "all ignored": (net, (x, torch.full((6,), -100)), {}, ValueError, "must hold a term of the loss"),
        "dict without targets": (net, {"input": x}, {}, ValueError, "must hold its targets under one of labels"),
        "chunk_size": (net, pair, {"chunk_size": 0}, ValueError, "chunk_size must be a positive integer"),
        "float labels": (net, (x, y.float()), {}, ValueError, "labels must be integers"),
        "two outputs": (nn.LSTM(4, 3), pair, {}, TypeError, "outputs must be one tensor; got tuple"),
    }  # fmt: skip


BAD = bad_inputs()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name):
    model, batch, options, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        curvature.hessian(model, batch, "cross_entropy", **options)
    assert str(caught.value).startswith("hessian: ")
    assert "\n" not in str(caught.value)


def test_errors_of_methods():
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    operator = curvature.hessian(net, (x, y), "cross_entropy")
    for call, kind, message in [
        (lambda: operator @ torch.ones(7), ValueError, r"v must be of shape \(43,\) or \(43, K\); got \(7,\)"),
        (lambda: operator @ "v", TypeError, "got str"),
        (lambda: operator @ {"0.weight": torch.ones(5, 4)}, ValueError, "wrong in 0.bias, 2.bias, 2.weight"),
        (lambda: operator.block("0.bias") @ {"0.bias": torch.ones(3)}, ValueError, r"must be of shape \(5,\)"),
        (lambda: operator.block("2.bias", "0.bias").trace(), ValueError, "same rows and columns"),
        (lambda: operator.block("nope"), ValueError, "rows must be names or globs"),
        (lambda: operator.trace(num_probes=0), ValueError, "num_probes must be a positive integer or None; got 0"),
        (lambda: operator.norm("nuc"), ValueError, 'kind must be "fro" or 2'),
        (lambda: operator.eigsh(0), ValueError, r"k must be in 1 … 43; got 0"),
        (lambda: operator.eigsh(2, ncv=3), ValueError, r"ncv must be at least k \+ 2 = 4; got 3"),
        (lambda: operator.eigsh(2, "largest"), ValueError, "which must be 'LM', 'LA', 'SA' or 'SM'; got 'largest'"),
        (lambda: operator.eigsh(2, "SM", 1e-6, ncv=4, maxiter=1), ValueError, "have not converged after 1 restarts"),
        (lambda: operator.quadratic_form(torch.ones(43, 2)), ValueError, "one vector"),
    ]:
        with pytest.raises(kind, match=f"^hessian: .*{message}"):
            call()


def test_what_cannot_be_differentiated_names_module_and_remedy():
    net = nn.Sequential(nn.Linear(4, 5), Opaque(), nn.Linear(5, 3))
    batch = torch.randn(6, 4), torch.arange(6) % 3
    operator = curvature.hessian(net, batch, "cross_entropy")
    message = r"neither a forward-mode derivative .* leave out the parameters .*, in module 1 \(Opaque\)"
    with pytest.raises(ValueError, match=message):
        operator.quadratic_form(torch.ones(operator.shape[0]))
    assert operator.trace(num_probes=3) > 0  # one backward pass needs no more than a gradient does
    rest = curvature.hessian(net, batch, "cross_entropy", params="2.*")
    assert rest.quadratic_form(torch.arange(18.0)) > 0
