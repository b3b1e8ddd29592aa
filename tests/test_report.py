"""What the report of a budget says."""

import pytest
import torch
from torch import nn

import hessinit


def batch(samples=64):
    return torch.randn(samples, 12, generator=torch.Generator().manual_seed(0)), torch.arange(samples) % 3


def net():
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


def report_of(model, **options):
    return hessinit.init_(model, batch(), "cross_entropy", **{"lr": 1.0, **options}, seed=0, return_report=True)[1]


def test_shares_of_the_curvature_are_those_of_its_trace():
    report = report_of(net())
    line = next(line for line in str(report).splitlines() if line.startswith("0.weight"))
    for column in ("curvature_before", "curvature"):
        whole = sum(getattr(report[name], column) for name in ("0.weight", "2.weight"))
        assert f"{getattr(report['0.weight'], column) / whole:.0%}" in line
    assert report.warnings == []
    assert "warning" not in str(report)


def test_a_budget_out_of_reach_is_a_warning():
    report = report_of(net(), lr=1e-9, max_scale=2.0)
    assert report.warnings[0].startswith("the budget was not met: bounded by max_scale: ρ = ")
    assert "at the largest scale: 2 of 2.weight" in report.warnings
    assert all(f"warning: {line}" in str(report) for line in report.warnings)


def test_a_weight_before_a_norm_is_at_its_bound_sooner():
    layers = net()
    normed = nn.Sequential(layers[0], nn.BatchNorm1d(layers[0].out_features), *layers[1:])
    assert report_of(normed, lr=1e-9).warnings[0] == "at the smallest scale: 0.0333333 of 0.weight"
    normed = nn.Sequential(layers[0], nn.Tanh(), *normed[1:])
    assert "at the smallest scale: 0.1 of 0.weight" in report_of(normed, lr=1e-9).warnings
    adam = {"lr": None, "optimizer": torch.optim.Adam(normed.parameters(), lr=1e-7)}
    assert "at the smallest scale: 0.05 of 0.weight" in report_of(normed, **adam).warnings


def test_zeros_that_a_norm_takes_are_a_warning_where_there_are_no_biases():
    x, y = torch.randn(64, 6, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    x[:, 4:] = 0

    def warned(bias, zero=False, **options):
        net = nn.Sequential(nn.Linear(8, 16, bias=bias), nn.LayerNorm(16), nn.Flatten(), nn.Linear(96, 3))
        if zero:
            nn.init.zeros_(net[0].bias)
        options = {"lr": 0.1, "seed": 0, "return_report": True, **options}
        _, report = hessinit.init_(net, (x, y), "cross_entropy", **options)
        return any("a norm takes zeros of 0.weight" in line for line in report.warnings)

    assert warned(bias=False)
    assert warned(bias=True, exclude="0.bias", zero=True)
    assert warned(bias=True, zero=True, base="current")
    assert not warned(bias=True, base="current")
    assert not warned(bias=True)


def test_units_that_no_sample_moves_are_a_warning():
    model = net()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = -1.0
    _, report = hessinit.rescale_(model, batch(), "cross_entropy", lr=1.0, seed=0, return_report=True)
    assert "dead units: 25% of 0.weight" in report.warnings


def test_units_of_tanh_in_its_flat_part_are_a_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        model[0].bias[:4] = 10.0
    x, y = batch()
    _, report = hessinit.rescale_(model, (x.double(), y), "cross_entropy", lr=1.0, seed=0, return_report=True)
    assert "saturated units: 25% of 0.weight" in report.warnings


def test_a_weight_that_hardly_matters_is_a_warning():
    class Faint(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(12, 3), nn.Linear(12, 3)

        def forward(self, x):
            return self.main(x) + 1e-6 * self.side(x)

    report = report_of(Faint(), lr=1e-2)
    assert report.warnings[-1] == "vanished signal, less than 1e-06 of all curvature: side.weight"


def test_the_plot_shows_weights_and_probes(tmp_path):
    report = report_of(net())
    made = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    std, curvature, probes = made.axes
    before, after = (list(line.get_xdata()) for line in std.get_lines())
    assert after == [report["0.weight"].std, report["2.weight"].std]
    scales = [report[name].scale for name in ("0.weight", "2.weight")]
    assert [b * s for b, s in zip(before, scales, strict=True)] == pytest.approx(after)
    assert list(curvature.get_lines()[1].get_xdata()) == [report["0.weight"].curvature, report["2.weight"].curvature]
    points = report.calibration.solution.points
    assert list(probes.get_lines()[0].get_ydata()) == [p.sharpness for p in points]
    assert probes.get_title() == "met"


def test_there_is_no_plot_of_the_closed_form():
    _, report = hessinit.init_(net(), seed=0, return_report=True)
    with pytest.raises(ValueError, match="^plot: report must be of a budget; got one of the closed form"):
        report.plot()
