"""Memory stays flat over many calls, and threads do not disturb each other."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import hessinit
from hessinit import curvature

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def hessian(model):
    operator = curvature.hessian(model, (X, Y), "cross_entropy")
    return operator @ torch.ones(operator.shape[1]), operator.trace(num_probes=2), operator.eigsh(k=1)


CALLS = {
    "closed form": lambda model: hessinit.init_(model, X, seed=0),
    "budget": lambda model: hessinit.init_(
        model, (X, Y), "cross_entropy", optimizer=torch.optim.SGD(model.parameters(), 0.1), seed=0
    ),
    "hessian": hessian,
    "rayleigh": lambda model: curvature.rayleigh(model, (X, Y), "cross_entropy"),
    "layer traces": lambda model: curvature.layer_traces(model, (X, Y), "cross_entropy", num_probes=2),
    "approximation error": lambda model: curvature.approximation_error(model, (X, Y), "cross_entropy", block=False),
    "step sharpness": lambda model: curvature.step_sharpness(model, (X, Y), "cross_entropy", 0.1),
}


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("call", CALLS)
def test_two_hundred_calls_leave_no_tensor_and_no_model(call):
    model = net()
    for _ in range(3):
        CALLS[call](model)
    before = tensors()
    for _ in range(200):
        CALLS[call](model)
    assert tensors() <= before + 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Noisy(nn.Module):
    """Dropout, attention and noise: kernels are switched, and random numbers drawn from the global state."""

    def __init__(self):
        super().__init__()
        self.embed, self.drop = nn.Linear(6, 8), nn.Dropout(0.5)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        h = self.drop(torch.relu(self.embed(x)))[:, None]
        h = h + 0.1 * torch.randn(h.shape)
        return self.head(self.attention(h, h, h)[0][:, 0])


def test_threads_get_what_they_would_alone():
    def weights(seed):
        model = hessinit.init_(models[seed], (X, Y), "cross_entropy", lr=0.1, seed=seed)
        error = float(curvature.step_sharpness(model, (X, Y), "cross_entropy", 0.1))
        return [p.detach().clone() for p in model.parameters() if p.ndim > 1], error

    def work(seed):
        try:
            for _ in range(8):
                found[seed].append(weights(seed))
        except BaseException as error:
            found[seed].append(error)

    models = {seed: Noisy() for seed in (0, 1)}
    alone = {seed: weights(seed) for seed in (0, 1)}
    found = {0: [], 1: []}
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    kernels = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    running = [threading.Thread(target=work, args=(seed,)) for seed in found]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert torch.equal(torch.get_rng_state(), state)
    for seed, results in found.items():
        assert len(results) == 8
        for one in results:
            assert not isinstance(one, BaseException), one
            assert all(torch.equal(a, b) for a, b in zip(one[0], alone[seed][0], strict=True))
            assert one[1] == alone[seed][1]
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == kernels
