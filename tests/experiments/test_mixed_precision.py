"""λ̂ in mixed and half precision is that of float32, or has a verdict."""

from dataclasses import replace

import pytest


@pytest.mark.filterwarnings("ignore:The chains run one after another")
@pytest.mark.parametrize(
    "name",
    [
        "MLP",
        pytest.param("conv net, BatchNorm", marks=pytest.mark.slow),
        pytest.param("transformer, LayerNorm", marks=pytest.mark.slow),
    ],
)
def test_lambda_hat_is_that_of_float32_or_has_a_verdict(name, script, monkeypatch):
    mixed = script("mixed_precision")
    case = mixed.cases()[name]
    if name == "MLP":
        monkeypatch.setattr(mixed, "SAMPLER", replace(mixed.SAMPLER, draws=40, burn_in=20, chains=2))
        case = replace(case, steps=200)
    found = list(mixed.measured(case))
    assert len(found) == 5
    for way, point, exact in found:
        assert exact.llc.value > 1
        assert mixed.holds(point, exact), (way, point.llc, exact.llc)
        assert point.loss == pytest.approx(exact.loss, rel=0.02)
