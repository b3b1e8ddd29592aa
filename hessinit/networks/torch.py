"""The adapter for ``torch.nn.Module``: what each parameter is for, what follows it, how to write it."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hessinit import losses
from hessinit.layout import TORCH, Layout
from hessinit.networks import base, torch_loss
from hessinit.networks.base import Arrays, Derivatives, Follower, Named, Parameter
from hessinit.networks.graph import numpy_or
from hessinit.networks.torch_autodiff import TorchArrays, TorchDerivatives, cuda_devices, pure
from hessinit.networks.torch_derived import Derived, derived
from hessinit.networks.torch_follow import NORM, as_numpy_function, call, module_order, trace

Array = npt.NDArray[np.floating[Any]]
GATES = {"LSTM": 4, "LSTMCell": 4, "GRU": 3, "GRUCell": 3}
_CONV_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PACKED = {"qkv", "to_qkv", "in_proj", "qkv_proj", "Wqkv", "query_key_value", "c_attn"}  # query, key and value in one
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def accepts(model: object) -> bool:
    """Whether this adapter is the one for the model."""
    return isinstance(model, nn.Module)


def weight_layout(module: nn.Module, name: str, path: str = "") -> Layout | None:
    """The layout of a module's own parameter if it is a weight that the rule covers, else None.

    Args:
        module: that owns it.
        name: of the parameter in the module.
        path: of the module in the model, whose last part tells packed projections from other linear layers.
    """
    packed = path.rpartition(".")[2] in _PACKED
    if isinstance(module, (*_CONV, *_CONV_TRANSPOSED)) and name == "weight":
        transposed = isinstance(module, _CONV_TRANSPOSED)
        axes = "(gi)o..." if transposed else "(go)i..."
        return Layout(axes, groups=module.groups, stride=math.prod(module.stride), transposed=transposed)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name == "weight":
        return Layout("vo")
    if isinstance(module, nn.Bilinear) and name == "weight":
        return Layout("oii")
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_weight":
            return Layout("(go)i", groups=3)
        return TORCH if name in ("q_proj_weight", "k_proj_weight", "v_proj_weight") else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and name.startswith(("weight_ih", "weight_hh", "weight_hr")):
        kind = module.mode if isinstance(module, nn.RNNBase) else type(module).__name__
        gates = 1 if name.startswith("weight_hr") else GATES.get(kind, 1)
        return Layout("(go)i", groups=gates)
    if isinstance(module, nn.Linear) and name == "weight":
        return Layout("(go)i", groups=3) if packed and module.out_features == 3 * module.in_features else TORCH
    if name == "weight" and _is_transposed_linear(module):
        inputs, outputs = module.get_parameter("weight").shape
        return Layout("i(go)", groups=3) if packed and outputs == 3 * inputs else Layout("io")
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """GPT-2's linear layer in Hugging Face's transformers, of weights (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _role(module: nn.Module, name: str) -> str:
    if isinstance(module, NORM):
        return {"weight": base.NORM_SCALE, "bias": base.NORM_OFFSET}.get(name, base.OTHER)
    if weight_layout(module, name) is not None:
        return base.WEIGHT
    known = (nn.Linear, *_CONV, *_CONV_TRANSPOSED, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
    biased = isinstance(module, known) or _is_transposed_linear(module)
    return base.BIAS if biased and "bias" in name and name[-2:] not in ("_k", "_v") else base.OTHER


def _forget(module: nn.Module, name: str) -> tuple[int, int, float] | None:
    if isinstance(module, (nn.LSTM, nn.LSTMCell)) and name.startswith("bias_ih"):  # bias_hh is added to it
        return module.hidden_size, 2 * module.hidden_size, 0.0
    return None


def _original(plain: Parameter, of: Derived) -> Parameter:
    """A parameter that a weight is computed from; the first of them stands for the weight, if it can be written."""
    layout = weight_layout(of.module, of.local)
    if plain.name != of.originals[0] or layout is None or of.inverse is None:
        return replace(plain, role=base.OTHER, left=f"left: parametrized by {of.kind}")
    return replace(
        plain,
        role=base.WEIGHT,
        layout=layout,
        derived=of.kind,
        weight_shape=of.shape,
        proportional=of.proportional,
    )


def _why_left(parameter: nn.Parameter) -> str:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "left: not materialised (run one forward pass first)"
    if parameter.is_meta:
        return "left: on the meta device"
    if not parameter.is_floating_point():
        return f"left: {str(parameter.dtype).removeprefix('torch.')} is not a real floating-point type"
    return ""


class TorchNetwork:
    """A ``torch.nn.Module`` as a :class:`~hessinit.networks.base.Network`."""

    arrays: Arrays = TorchArrays()
    derivatives: Derivatives = TorchDerivatives()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors: dict[str, nn.Parameter] = {}
        self._derived: dict[str, Derived] = {}  # by every parameter that a weight is computed from

    def prepare(self, inputs: Any, function: str) -> None:
        lazy = any(isinstance(p, nn.parameter.UninitializedParameter) for p in self.model.parameters())
        if inputs is not None and any(map(_is_sharded, self.model.parameters())):
            raise ValueError(
                f"{function}: model must not be sharded where data goes through it; make the call before fully_shard, "
                "or init_ without a batch"
            )
        if inputs is not None and lazy:
            trace(self.model, inputs, {})

    def parameters(self) -> Sequence[Parameter]:
        found: list[Parameter] = []
        first: dict[int, str] = {}
        self._derived = {name: one for one in derived(self.model) for name in one.originals}
        for name, module, local, parameter in _owned_parameters(self.model):
            self._tensors[name] = parameter
            tied = first.setdefault(id(parameter), name)
            padding = getattr(module, "padding_idx", None)
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            plain = Parameter(
                name=name,
                layer=name.rpartition(".")[0].partition(".parametrizations")[0] or "model",
                key=name,
                shape=() if lazy else tuple(parameter.shape),
                dtype=str(parameter.dtype).removeprefix("torch."),
                role=_role(module, local),
                layout=weight_layout(module, local, name.rpartition(".")[0]),
                tied_to=None if tied == name else tied,
                frozen=not parameter.requires_grad,
                loaded=getattr(parameter, "_is_hf_initialized", False),
                differentiable=not lazy and not parameter.is_meta and parameter.is_floating_point(),
                left=_why_left(parameter),
                zero_row=padding if isinstance(padding, int) else None,
                forget=_forget(module, local),
            )
            of = self._derived.get(name)
            found.append(plain if of is None or plain.left else _original(plain, of))
        return found

    def originals(self, name: str, weight: Array) -> dict[str, Array]:
        of = self._derived[name]
        assert of.inverse is not None  # of those that are derived
        like = self._tensors[name]
        with torch.no_grad():
            values = of.inverse(torch.from_numpy(np.ascontiguousarray(weight)).to(like.device))
        return {part: value.cpu().numpy() for part, value in zip(of.originals, values, strict=True)}

    def buffers(self) -> Sequence[str]:
        return [name for name, _ in self.model.named_buffers()]

    def followers(self, inputs: Any) -> Mapping[str, Follower]:
        names: dict[int, str] = {}
        for name, module, local, parameter in _owned_parameters(self.model):
            if weight_layout(module, local) is not None:
                names.setdefault(id(parameter), name)
        computed = list(derived(self.model))
        if inputs is not None:
            return trace(self.model, inputs, names, computed, self._others())
        return module_order(self.model, names, computed)

    def _others(self) -> dict[str, nn.Parameter]:
        """The parameters of which no module tells what they are."""
        unknown = [p.name for p in self.parameters() if p.role == base.OTHER and p.tied_to is None and not p.left]
        return {name: self._tensors[name] for name in unknown}

    def nonlinearity(self, nonlinearity: Any) -> Any:
        return numpy_nonlinearity(nonlinearity)

    def snapshot(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().clone()

    def restore(self, name: str, saved: torch.Tensor) -> None:
        with torch.no_grad():
            self._tensors[name].copy_(saved)

    def inner(self) -> Any:
        model: Any = self.model
        while isinstance(model, _PARALLEL) or hasattr(model, "_orig_mod"):  # the latter of torch.compile
            model = model.module if isinstance(model, _PARALLEL) else model._orig_mod
        return model

    def group(self, process_group: Any) -> base.Group:
        replicated = isinstance(self.model, nn.parallel.DistributedDataParallel)
        group = self.model.process_group if process_group is None and replicated else process_group
        if group is None:
            return base.Alone()
        from hessinit.networks.torch_group import TorchGroup

        return TorchGroup(group)

    def write(self, name: str, values: Array) -> None:
        tensor, new = self._tensors[name], torch.from_numpy(np.ascontiguousarray(values))
        with torch.no_grad():
            tensor.copy_(_sharded_like(tensor, new) if _is_sharded(tensor) else new)

    def seed(self, generator: Any) -> int:
        if generator is None:
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"init_: generator must be a torch.Generator or None; got {generator!r}.")
        return draw_seed(generator)

    def values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: self._tensors[name] for name in names}

    def constants(self) -> Sequence[Any]:
        return []  # nothing is compiled

    def random_state(self) -> contextlib.AbstractContextManager[Any]:
        return torch.random.fork_rng(cuda_devices(self.model))

    def pure(
        self, training: bool | None, dropout: bool, seed: int
    ) -> contextlib.AbstractContextManager[Callable[[Named, Callable[[], Any]], Any]]:
        return pure(self.model, self._tensors, training, dropout, seed)

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)

    def targets(self, y: Any, z: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(y, device=z.device)

    def loss(self, loss: Any) -> losses.Loss:
        return losses.named(loss, self.arrays) if isinstance(loss, str) else torch_loss.translate(loss)

    def updates(
        self, optimizer: Any, gradients: Sequence[Named], values: Named | None = None, fresh: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a learning rate or a torch.optim.Optimizer; got {optimizer!r}")
        tensors = {name: self._tensors[name] for name in gradients[0]}
        return _updates(optimizer, tensors, gradients, values or {}, fresh)

    def compiled(self) -> tuple[Any, Any]:
        return None, None

    def where(self, error: BaseException) -> str:
        modules = self.model.named_modules()
        return base.innermost(error, {id(m): f"{n or 'the model'} ({type(m).__name__})" for n, m in modules})


def _is_sharded(tensor: torch.Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # without which there are none
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _sharded_like(tensor: Any, values: torch.Tensor) -> torch.Tensor:
    """Values that every process has in full, of which each keeps its own part."""
    from torch.distributed.tensor import distribute_tensor

    values = values.to(tensor.device, tensor.dtype)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _updates(
    optimizer: torch.optim.Optimizer, tensors: Named, gradients: Sequence[Named], values: Named, fresh: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Steps of a copy of the optimizer on copies of the parameters: in float64, so that nothing is rounded off.

    Fresh ones are in the parameters' own precision, at least float32, which takes half as much memory.
    """
    copies: dict[int, torch.Tensor] = {}
    placed = {id(tensors[name]): value for name, value in values.items() if name in tensors}
    private = copy.copy(optimizer)
    private.__dict__ = dict(optimizer.__dict__)
    private.__dict__.pop("step", None)  # a scheduler's wrapper steps the original
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        private.__dict__[hooks] = type(getattr(optimizer, hooks))()

    def wide(dtype: torch.dtype) -> torch.dtype:
        return torch.promote_types(dtype, torch.float32) if fresh else torch.float64

    def widened(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.detach().to(wide(x.dtype) if x.is_floating_point() else x.dtype, copy=True)
        return copy.deepcopy(x)

    private.param_groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            copies[id(p)] = widened(placed.get(id(p), p)).requires_grad_(p.requires_grad)
        rest = {key: widened(value) for key, value in group.items() if key != "params"}
        if fresh:
            rest["lr"] = _peak(rest)
        private.param_groups.append({**rest, "params": [copies[id(p)] for p in group["params"]]})
    private.state = type(optimizer.state)(dict)
    for p, state in {} if fresh else optimizer.state.items():
        private.state[copies[id(p)]] = {key: widened(value) for key, value in state.items()}
    begun = {name: placed.get(id(p), p.detach()) for name, p in tensors.items() if id(p) in copies}
    for k, gradient in enumerate(gradients):
        before = {name: copies[id(tensors[name])].detach().clone() if k else p for name, p in begun.items()}
        for name, p in tensors.items():
            if id(p) in copies:
                copies[id(p)].grad = gradient[name].detach().to(wide(p.dtype), copy=True)
        try:
            private.step()
        except TypeError as error:
            raise TypeError(
                f"optimizer must take a step without a closure; {type(optimizer).__name__} does not ({error})"
            ) from error
        for p in copies.values():
            p.grad = None
        yield {
            name: (copies[id(p)].detach() - before.pop(name)).to(p.dtype) if name in before else torch.zeros_like(p)
            for name, p in tensors.items()
        }


def _peak(group: Mapping[str, Any]) -> Any:
    """The learning rate that a scheduler will reach: it has written its first or largest one into the group."""
    return max((group[key] for key in ("lr", "initial_lr", "max_lr") if key in group), key=float)


def draw_seed(generator: torch.Generator | None) -> int:
    """One integer from a torch generator (None: the global one), from which NumPy draws the weights."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), generator=generator, device=device))


def numpy_nonlinearity(nonlinearity: Any) -> Any:
    """A torch module or function as one of NumPy arrays; names and NumPy functions are themselves."""
    return numpy_or(as_numpy_function, nonlinearity)


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every parameter with its full name, the module that owns it, and its name there; tied ones each time."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{local}".lstrip("."), module, local, parameter
