import numpy as np
import pytest
import torch
from torch import nn

from hessinit.layout import Layout

# shape, layout, fan_in, fan_out: counted by hand
CASES = [
    ((128, 784), Layout("oi"), 784, 128),
    ((784, 128), Layout("io"), 784, 128),
    ((64, 32, 3), Layout("oi..."), 96, 192),
    ((64, 32, 3, 5), Layout("oi..."), 480, 960),
    ((3, 5, 32, 64), Layout("...io"), 480, 960),
    ((64, 32, 3, 3, 3), Layout("oi..."), 864, 1728),
    ((64, 8, 3, 3), Layout("(go)i...", groups=4), 72, 144),
    ((3, 3, 8, 64), Layout("...i(go)", groups=4), 72, 144),
    ((32, 1, 3, 3), Layout("(go)i...", groups=32), 9, 9),
    ((3, 3, 32, 2), Layout("...go"), 9, 18),
    ((64, 32, 4, 4), Layout("io...", stride=4, transposed=True), 256, 512),
    ((64, 4, 4, 4), Layout("(gi)o...", groups=8, stride=4, transposed=True), 32, 64),
    ((4, 4, 32, 64), Layout("...oi", stride=4, transposed=True), 256, 512),
    ((256, 3, 16, 16), Layout("oi...", stride=256), 768, 256),
    ((3 * 32, 32), Layout("(go)i", groups=3), 32, 32),
    ((50_000, 64), Layout("vo"), 1, 64),
    ((8, 2, 3), Layout("oii"), 6, 8),
]


@pytest.mark.parametrize(("shape", "layout", "fan_in", "fan_out"), CASES)
def test_fans_are_those_counted_by_hand(shape, layout, fan_in, fan_out):
    assert layout.fans(shape) == (fan_in, fan_out)


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, bias=False), Layout("oi..."), (4, 30)),
    (nn.Conv2d(4, 6, 4, stride=2, bias=False), Layout("oi...", stride=4), (4, 34, 34)),
    (nn.Conv2d(4, 8, 3, groups=2, bias=False), Layout("(go)i...", groups=2), (4, 20, 20)),
    (nn.ConvTranspose2d(4, 6, 4, stride=2, bias=False), Layout("io...", stride=4, transposed=True), (4, 20, 20)),
    (nn.ConvTranspose1d(4, 6, 6, stride=3, bias=False), Layout("io...", stride=3, transposed=True), (4, 60)),
    (
        nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2, bias=False),
        Layout("(gi)o...", groups=2, stride=4, transposed=True),
        (4, 20, 20),
    ),
]


@pytest.mark.parametrize(("module", "layout", "shape"), CONVOLUTIONS)
def test_fans_are_the_connections_that_the_layer_makes(module, layout, shape):
    """With all weights and inputs one, an output is its number of connections; its gradient is an input's."""
    module = module.double()
    nn.init.ones_(module.weight)
    x = torch.ones(1, *shape, dtype=torch.float64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    middle = tuple(slice(n // 3, n // 3 + 6) for n in y.shape[2:])  # away from the border, whole periods of the stride
    inner = tuple(slice(n // 3, n // 3 + 6) for n in x.shape[2:])
    fans = layout.fans(module.weight.shape)
    assert y[(0, slice(None), *middle)].mean().item() == pytest.approx(fans.fan_in, rel=1e-12)
    assert x.grad[(0, slice(None), *inner)].mean().item() == pytest.approx(fans.fan_out, rel=1e-12)


@pytest.mark.parametrize("shape_layout", [c[:2] for c in CASES if c[0][0] < 1000])
def test_blocks_put_each_matrix_where_its_connections_are(shape_layout):
    shape, layout = shape_layout
    stack, sorted_shape, back = layout.blocks(shape)
    assert np.prod(stack) == np.prod(shape)
    copies = np.broadcast_to(np.arange(stack[0])[:, None, None], stack)
    laid = copies.reshape(sorted_shape).transpose(back).reshape(shape)
    axes = layout.expand(shape)
    unpacked = laid.reshape([a.size for a in axes])
    group_axes = [j for j, a in enumerate(axes) if a.letter == "g"]
    other = tuple(j for j in range(len(axes)) if j not in group_axes)
    assert (np.ptp(unpacked, axis=other) == 0).all()  # one matrix for each copy


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout("oz"), "axes must be made of i, o, k, g, v"),
        (lambda: Layout(""), "axes must be made of"),
        (lambda: Layout("o......i"), "at most one"),
        (lambda: Layout("oi", groups=0), "groups must be a positive integer; got 0"),
        (lambda: Layout("oi", stride=1.5), "stride must be a positive integer; got 1.5"),
        (lambda: Layout("oi").fans((2, 3, 4)), r"axes must fit the shape; got 'oi' for shape \(2, 3, 4\)"),
        (lambda: Layout("oi...").fans((2,)), r"for shape \(2,\)"),
        (lambda: Layout("(go)i", groups=3).fans((4, 5)), r"multiple of groups=3; got 4 in shape \(4, 5\)"),
    ],
)
def test_bad_layouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
