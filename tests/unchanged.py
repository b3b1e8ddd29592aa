"""Everything that a call has to leave as it was: of a model, of an optimizer and of the process."""

import copy
import random

import numpy as np
import torch
from torch.autograd import forward_ad

from hessinit.batches import ONE_AT_A_TIME

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


class Itself:
    """Equal to nothing but the same object."""

    def __init__(self, held):
        self.held = held

    def __eq__(self, other):
        return self.held is other.held

    __hash__ = None


def everything(model, optimizer=None):
    modules = list(model.modules())
    return {
        "values": {n: t.clone() for n, t in model.state_dict(keep_vars=True).items()},
        "tensors": [Itself(t) for t in [*model.parameters(), *model.buffers()]],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in modules],
        "attributes": [{name: Itself(value) for name, value in m.__dict__.items()} for m in modules],
        "hooks": [{kind: list(getattr(m, kind)) for kind in HOOKS} for m in modules],
        "optimizer": optimizer and copy.deepcopy(optimizer.state_dict()),
        **process(),
    }


def process():
    """What all models and threads share."""
    return {
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)),
        "generator": Itself(np.random.mtrand.get_bit_generator()),
        "accelerator seeds": [call and call[0] for call in torch.cuda._lazy_seed_tracker.get_calls()],
        "switches": (
            torch.is_grad_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
        ),
        "modes of functions": (torch._C._len_torch_function_stack(), forward_ad._current_level),
        "lock": ONE_AT_A_TIME._is_owned(),
    }


def same(a, b):
    """Bit for bit, NaN included."""
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bits(x):
    if isinstance(x, np.ndarray):
        return x.tobytes()
    return x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def changed(a, b):
    """The parts of :func:`everything` that differ, for a message."""
    return [key for key in a if not same(a[key], b[key])]
