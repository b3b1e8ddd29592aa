"""The closed form: fans, gains, and the scale at which curvature neither grows nor fades with depth.

Take the plain net ``z = W_L φ(W_{L-1} … φ(W_1 x))`` with widths ``n_0 … n_L`` and weights of standard deviation
``σ_k``. The trace of layer k's block of the approximate Hessian (the generalized Gauss-Newton matrix) is in expectation

    h_k = ‖x‖² · tr(D²_z ℓ) · ∏_{hidden i} n_i · ∏_{i<k} p_i · ∏_{i≥k} d_i · ∏_{j≠k} σ_j²

with the moments ``p = E φ(u)² / E u²`` met forward and ``d = E φ'(u)²`` met backward. Each hidden width appears once;
split evenly between its two neighbours it makes every layer neutral when

    σ_k² = 1 / (g² · sqrt(fan_in · fan_out)),        g² = sqrt(p · d).

He's rule is the case fan_out = fan_in; Glorot's takes the arithmetic mean of the fans. An average over K positions,
taken as independent, keeps 1/K of the signal forward and 1/K of the squared slopes backward: it divides ``g²`` by K.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special
from scipy.optimize import brentq

from hessinit.layout import Fans, Layout
from hessinit.quadrature import Activation, kinks, moments

INPUT_VARIANCE = 0.5
"""Variance of the first pre-activations where the inputs are known; see :func:`input_layer_std`."""
FEW_INPUTS = 100
"""Numbers in a sample up to which biases matter beside it; see :func:`input_bias_std`."""
BESIDE_NORM = 0.25
"""Factor on a weight whose outputs are added to a norm's, which at one they would drown. In some draws a shortcut's
drown a batch norm's; not so a group norm's (the budget's losses are 1 to 3 % lower with it at larger rates, and 12 %
higher under Adam at 0.0001). Where a norm takes the sum, as in post-norm transformers, what came before fades with
every block (Xiong et al., ICML 2020). Four blocks of PyTorch's under Adam at 0.0001 and 0.001 end at 3.29 and 2.42 with
a factor of one, 3.06 and 2.39 with a half, 2.95 and 2.39 with a quarter, 2.87 and 2.38 with an eighth; a small
post-norm ViT prefers a quarter or more at 0.0001."""
SAME = 0.2
"""Factor on an embedding whose outputs are the same for every sample, as a position's: as large as the others it would
be half of what the stream begins with. Post- and pre-norm language models of three blocks under Adam, in torch and of
Hugging Face, end 1 to 6 % lower at 0.001 and 0.003, a twentieth is as good, and a half half as good."""

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda u: u,
    "relu": lambda u: np.maximum(u, 0),
    "relu6": lambda u: np.clip(u, 0, 6),
    "elu": lambda u: np.where(u > 0, u, np.expm1(np.minimum(u, 0))),
    "selu": lambda u: SELU_SCALE * np.where(u > 0, u, SELU_ALPHA * np.expm1(np.minimum(u, 0))),
    "gelu": lambda u: u * special.ndtr(u),
    "silu": lambda u: u * special.expit(u),
    "mish": lambda u: u * np.tanh(np.logaddexp(0, u)),
    "sigmoid": special.expit,
    "hardsigmoid": lambda u: np.clip(u / 6 + 0.5, 0, 1),
    "hardswish": lambda u: u * np.clip(u / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
    "hardtanh": lambda u: np.clip(u, -1, 1),
    "softplus": lambda u: np.logaddexp(0, u),
    "softsign": lambda u: u / (1 + np.abs(u)),
    "logsigmoid": special.log_expit,
    "sin": np.sin,
}
_ALIASES = {"identity": "linear", "swish": "silu", "hardsilu": "hardswish"}
NEGATIVE_SLOPE = 0.01


def activation(nonlinearity: str | Activation, param: float | None = None) -> Activation:
    """The activation of a name; a callable is its own.

    Args:
        nonlinearity: a vectorised function of one NumPy array, a key of ``ACTIVATIONS``, or ``"leaky_relu"``. Case,
            ``_`` and ``-`` do not matter; ``identity``, ``swish`` and ``hard_silu`` are understood.
        param: negative slope of ``"leaky_relu"``, default 0.01.

    Raises:
        ValueError: unknown name, or ``param`` for anything but ``"leaky_relu"``.
        TypeError: neither a name nor callable.
    """
    if not callable(nonlinearity) and not isinstance(nonlinearity, str):
        raise TypeError(f"gain: nonlinearity must be a name or a function of one array; got {nonlinearity!r}.")
    name = "" if callable(nonlinearity) else nonlinearity.lower().replace("_", "").replace("-", "")
    if name == "leakyrelu":
        slope = NEGATIVE_SLOPE if param is None else float(param)
        return lambda u: np.where(u > 0, u, slope * u)
    if param is not None:
        raise ValueError(f"gain: param must be None unless nonlinearity is 'leaky_relu'; got {param!r}.")
    if callable(nonlinearity):
        return nonlinearity
    name = _ALIASES.get(name, name)
    if name not in ACTIVATIONS:
        known = ", ".join(sorted([*ACTIVATIONS, "leaky_relu"]))
        raise ValueError(
            f"gain: nonlinearity must be one of {known}, or a function of one array; got {nonlinearity!r}."
        )
    return ACTIVATIONS[name]


def gain(nonlinearity: str | Activation = "relu", param: float | None = None, *, depth: int | None = None) -> float:
    """The g of the closed form: ``σ² = 1 / (g² sqrt(fan_in fan_out))``. It divides, where torch's gain multiplies.

    One layer: ``g² = sqrt(E φ(u)² · E φ'(u)²)`` for ``u ~ N(0, 1)``, by quadrature.

    A net of known depth: the variance q_k of the pre-activations moves with depth unless φ is homogeneous, and with it
    the moments. The gain is then the one at which the growths of signal (forward) and slope (backward) cancel over the
    whole net,

        g⁴ = geometric mean over k = 1 … depth - 1 of  E φ(u_k)² / q_k · E φ'(u_k)²,      q_{k+1} = E φ(u_k)² / g²,

    from ``q_1 = 1``, the one layer's view, of which this is the extension: two layers, with one activation, have the
    same gain. A gain for unit variance at every depth makes a deep tanh net chaotic and a deep GELU net fade.
    Homogeneous activations (linear, ReLU, leaky ReLU) have one gain for all depths. ``paper_figures/fig_depth.py``
    compares the rule with others in curvature, ``fig_depth_training.py`` in training. Its limit: a GELU or SiLU net
    without norms has no stable variance to aim at, and from about 20 layers on may diverge under any gain.

    Args:
        nonlinearity: name or vectorised function, see :func:`activation`.
        param: negative slope of ``"leaky_relu"``.
        depth: number of weight layers in the chain, at least 1; None or 1 for the one-layer gain.

    Returns:
        g > 0.

    Raises:
        ValueError: unknown name, ``depth`` < 1, or an activation that cannot be integrated, is constant, or has no such
            gain. TypeError: wrong type.

    Cost: well under a millisecond for one layer, some milliseconds for a deep net.

    Example:
        >>> [round(gain(name) ** 2, 4) for name in ("linear", "relu", "tanh", "gelu", "silu")]
        [1.0, 0.5, 0.4279, 0.4403, 0.3674]
        >>> [round(gain("tanh", depth=depth) ** 2, 3) for depth in (3, 6, 20, 50)]
        [0.438, 0.47, 0.566, 0.654]

    References:
        Skorski, Temperoni, Theobald, "Revisiting Weight Initialization of Deep Neural Networks", ACML 2021.
        Poole et al., "Exponential expressivity in deep neural networks through transient chaos", NeurIPS 2016 (the
        two recursions).
    """
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or depth < 1):
        raise ValueError(f"gain: depth must be a positive integer or None; got {depth!r}.")
    function = activation(nonlinearity, param)
    try:
        probe = np.asarray(function(_SIGNATURE))
        return _gain(_Known(probe.tobytes(), function), int(depth or 1))
    except Exception as error:  # of any kind: the function is the caller's
        raise ValueError(f"gain: nonlinearity must have a finite gain; got {nonlinearity!r}: {error}.") from error


def pair_gain(nonlinearity: str | Activation = "relu") -> float | None:
    """The gain of units in pairs of opposite weights, ``u`` and ``-u``, where such pairs pass signals on linearly.

    Where ``φ(u) - φ(-u) = a u``, as for ReLU, leaky ReLU, GELU, SiLU and softplus, pairs that the next layer takes with
    opposite weights act as a linear layer of slope a: no depth distorts the signal, and ``g = a / √2`` for any depth
    and any variance. The units differ from the first step on, each being active where its partner is not.

    Args:
        nonlinearity: name or vectorised function, see :func:`activation`.

    Returns:
        g > 0; None for an activation of which pairs are not linear (tanh), or alike (a linear one).

    Example:
        >>> round(pair_gain("relu"), 4), round(pair_gain("gelu"), 4), pair_gain("tanh")  # that of ReLU is its own
        (0.7071, 0.7071, None)

    References:
        Balduzzi et al., "The Shattered Gradients Problem: If resnets are the answer, then what is the question?",
        ICML 2017, section 4 (the "looks linear" initialization).
    """
    parts = _odd_and_even(nonlinearity)
    if parts is None:
        return None
    odd, even = parts
    slope = float(_PAIRS @ odd / (_PAIRS @ _PAIRS))
    bent = np.linalg.norm(odd - slope * _PAIRS)
    if not (slope > 0 and bent <= 0.01 * np.linalg.norm(odd) and np.linalg.norm(even) >= 0.1 * np.linalg.norm(odd)):
        return None
    return slope / 2**0.5


def is_odd(nonlinearity: str | Activation) -> bool:
    """Whether ``φ(-u) = -φ(u)``, as of tanh: without biases the whole net is such a function, then.

    Args:
        nonlinearity: name or vectorised function, see :func:`activation`.

    Example:
        >>> [name for name in ACTIVATIONS if is_odd(name)]
        ['linear', 'tanh', 'hardtanh', 'softsign', 'sin']
    """
    parts = _odd_and_even(nonlinearity)
    return parts is not None and bool(np.linalg.norm(parts[1]) <= 0.01 * np.linalg.norm(parts[0]))


def is_homogeneous(nonlinearity: str | Activation) -> bool:
    """Whether ``φ(2u) = 2 φ(u)``, as of ReLU, for u up to 3: smaller weights make no more linear a net, then.

    Args:
        nonlinearity: name or vectorised function, see :func:`activation`.

    Example:
        >>> [name for name in ACTIVATIONS if is_homogeneous(name)]
        ['linear', 'relu', 'relu6']
    """
    single, double = (_odd_and_even(nonlinearity, scale) for scale in (1.0, 2.0))
    if single is None or double is None:
        return False
    off = [np.linalg.norm(b - 2 * a) for a, b in zip(single, double, strict=True)]
    return bool(max(off) <= 0.01 * np.linalg.norm(double))


def _odd_and_even(
    nonlinearity: str | Activation, scale: float = 1.0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """``φ(u) - φ(-u)`` and ``φ(u) + φ(-u)``; None of a function that cannot be evaluated."""
    u = scale * _PAIRS
    try:
        up, down = (np.asarray(activation(nonlinearity)(v), np.float64) for v in (u, -u))
        return up - down, up + down
    except Exception:  # of any kind: the function is the caller's
        return None


_PAIRS = np.linspace(0.1, 3.0, 30)
_SIGNATURE = np.random.default_rng(0).normal(size=64) * np.geomspace(0.1, 20, 64)


@dataclass(frozen=True)
class _Known:
    """An activation that compares equal to another of the same values, so that equal layers share one quadrature."""

    values: bytes
    function: Activation = field(compare=False)

    def moments(self, variance: float) -> tuple[float, float]:
        return moments(self.function, variance, _kinks(self))


@functools.lru_cache(maxsize=256)
def _kinks(known: _Known) -> npt.NDArray[np.float64]:
    return kinks(known.function)


@functools.lru_cache(maxsize=256)
def _gain(known: _Known, depth: int) -> float:
    p, d = known.moments(1.0)
    if p <= 1e-24 or d <= 1e-24:
        raise ValueError("it does not vary")
    if depth == 1:
        return float((p * d) ** 0.25)

    def excess(log_square: float) -> float:
        """Mean log growth, forward and backward together, of one layer at ``g² = exp(log_square)``."""
        total, variance = 0.0, 1.0
        for layer in range(depth - 1):
            p, d = known.moments(variance)
            growth = np.log(p / variance * d)
            following = p * np.exp(-log_square)
            if abs(following / variance - 1) < 1e-12:  # a fixed point: all further layers are alike
                return float((total + growth * (depth - 1 - layer)) / (depth - 1) - 2 * log_square)
            total, variance = total + growth, float(np.clip(following, 1e-12, 1e12))
        return float(total / (depth - 1) - 2 * log_square)

    centre = np.log(p * d) / 2
    low, high = centre - 3.0, centre + 3.0
    if excess(low) < 0 or excess(high) > 0:
        raise ValueError(f"no scale keeps curvature level over {depth} layers")
    return float(np.exp(brentq(excess, low, high, xtol=1e-10) / 2))


def fans(shape: Sequence[int], layout: str | Layout = "oi...", *, groups: int = 1, stride: int = 1) -> Fans:
    """Effective fans of a weight.

    Args:
        shape: of the weight.
        layout: its axes, a string or a :class:`~hessinit.layout.Layout`; ``"oi..."`` is torch's order, ``"...io"`` that
            of Keras. A transposed convolution needs a ``Layout(..., transposed=True)``.
        groups: groups of a convolution whose axis is written ``(go)`` or ``(gi)``; only with a string.
        stride: product of its strides; only with a string.

    Example:
        >>> fans((128, 784)), fans((784, 128), "...io"), fans((3, 3, 32, 1), "...go")  # the last one depthwise
        (Fans(fan_in=784, fan_out=128), Fans(fan_in=784, fan_out=128), Fans(fan_in=9, fan_out=9))
        >>> fans((64, 32, 4, 4), Layout("io...", stride=4, transposed=True))  # ConvTranspose2d(64, 32, 4, stride=2)
        Fans(fan_in=256, fan_out=512)
    """
    if isinstance(layout, str):
        layout = Layout(layout, groups=groups, stride=stride)
    return layout.fans(shape)


def curvature_neutral_std(fan_in: float, fan_out: float, gain: float, averaged: float = 1) -> float:
    """Standard deviation at which a layer neither adds to nor takes from curvature.

    Args:
        fan_in: connections into an output unit, > 0.
        fan_out: connections out of an input unit, > 0.
        gain: g of :func:`gain`, > 0.
        averaged: K, positions that an average pooling after the layer takes together, > 0; 1 for none. Real positions
            are alike in part, and an average of them keeps more; yet on LeNet-5 K is about the best of K/4 … 2 K, and
            1 or 2 for max pooling (``paper_figures/fig_pooling.py``).

    Returns:
        ``sqrt(K) / (g (fan_in fan_out)^(1/4))``.

    Raises:
        ValueError: an argument is not a finite positive number.

    Example:
        >>> round(curvature_neutral_std(128, 128, gain("relu")), 9)  # He's sqrt(2/128), for a square layer
        0.125
    """
    for name, value in (("fan_in", fan_in), ("fan_out", fan_out), ("gain", gain), ("averaged", averaged)):
        if not np.isfinite(value) or value <= 0:
            raise ValueError(f"curvature_neutral_std: {name} must be a finite positive number; got {value!r}.")
    return float(np.sqrt(averaged) / (gain * np.sqrt(np.sqrt(float(fan_in) * float(fan_out)))))


def input_layer_std(fan_in: float, second_moment: float, averaged: float = 1) -> float:
    """Standard deviation of the first layer of a chain whose inputs are known.

    It takes the inputs' scale out: the first pre-activations get variance ``INPUT_VARIANCE``, whatever the inputs'
    own. Without it, images standardised to unit variance train worse: six layers under SGD at 0.01 reach 0.54 to 0.60
    by activation instead of 0.43 to 0.44 (``paper_figures/fig_depth_training.py``).

    An embedding that a residual stream or a recurrent layer begins with is such a layer, which takes a single one. A
    mean of many words, which mean nothing before they are learned, is better off with less.

    Args:
        fan_in: connections into an output unit.
        second_moment: mean square of the inputs' entries, > 0.
        averaged: as for :func:`curvature_neutral_std`.

    Returns:
        ``sqrt(K INPUT_VARIANCE / (fan_in · second_moment))``.
    """
    return float(np.sqrt(averaged * INPUT_VARIANCE / (fan_in * second_moment)))


def beside_small_embedding(fan_in: float, fan_out: float) -> float:
    """Factor on weights that write to the residual stream of an embedding that is the output layer too.

    As an output layer the embedding is small, and the ends of branches would drown it; as small as it is, large steps
    turn them too far. They meet it half way: the square root of what it lacks to an embedding's own size.

    Args:
        fan_in: of the output layer.
        fan_out: of the output layer.
    """
    small, own = curvature_neutral_std(fan_in, fan_out, 1.0), input_layer_std(1, 1.0)
    return float(np.sqrt(min(small / own, 1.0)))


def input_bias_std(numbers: int, averaged: float = 1) -> float:
    """Standard deviation of the biases of the first layer of a chain whose inputs are known.

    A bias is the weight of one more input, which is always one: it gets the size of the others' part in the
    pre-activations. Without biases an odd activation makes an odd net, ReLU one that is homogeneous, and pairs of
    opposite units a linear one; what is none of these they have to learn first, and for a few numbers it is much of
    what there is to learn. Among hundreds of inputs one more is nothing, and biases are zero.

    Args:
        numbers: in a sample of the inputs, > 0.
        averaged: as for :func:`curvature_neutral_std`.

    Returns:
        ``sqrt(K INPUT_VARIANCE / numbers)``; 0 for more than ``FEW_INPUTS`` numbers.
    """
    return input_layer_std(numbers, 1.0, averaged) if numbers <= FEW_INPUTS else 0.0


def layer_curvatures(
    widths: Sequence[int],
    stds: Sequence[float],
    nonlinearity: str | Activation = "relu",
    *,
    second_moment: float = 1.0,
    loss_trace: float = 1.0,
) -> npt.NDArray[np.float64]:
    """Expected layer curvature ``h_k`` of a random plain net, the formula at the top of this module.

    Exact in expectation for ReLU and linear nets with independent normal weights; for others the moments follow the
    variance of the pre-activations from layer to layer, which is exact as widths grow.

    Args:
        widths: ``n_0 … n_L``.
        stds: ``σ_1 … σ_L``.
        nonlinearity: after every layer but the last.
        second_moment: mean square of the inputs' entries.
        loss_trace: ``tr(D²_z ℓ)``; 2 for the mean squared error, ``1 - Σ p²`` for cross-entropy.

    Returns:
        ``h_1 … h_L``.

    Example:
        >>> h = layer_curvatures([784, 128, 84, 10], [0.3, 0.3, 0.3])
        >>> bool(np.allclose(h, h[0]))  # equal std, equal curvature, whatever the widths: Euler's identity for ReLU
        True
    """
    if len(stds) != len(widths) - 1:
        raise ValueError(f"layer_curvatures: stds must have one entry a layer ({len(widths) - 1}); got {len(stds)}.")
    function = activation(nonlinearity)
    at = kinks(function)
    signal = [widths[0] * second_moment]  # ‖a_{k-1}‖²
    slopes = []
    for width, std in zip(widths[1:-1], stds[:-1], strict=True):
        p, d = moments(function, std**2 * signal[-1], at)
        signal.append(width * p)
        slopes.append(d)
    backward = [loss_trace]  # ‖R ∂z/∂u_k‖², from the last layer down
    for width, d, std in zip(widths[-2:0:-1], slopes[::-1], stds[:0:-1], strict=True):
        backward.append(backward[-1] * std**2 * width * d)
    return np.asarray(np.array(signal) * np.array(backward[::-1]), dtype=np.float64)
