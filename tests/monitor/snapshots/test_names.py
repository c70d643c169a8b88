"""Names in snapshots against names in models, by hand and by real wrappers."""

import pytest
import torch
from torch import nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.names import aliases_of, match_names, optional_buffers, strip_wrappers

OWN = {"a.weight": "a.weight", "a.bias": "a.bias"}


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.layer.weight", "layer.weight"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.attn.q", "blocks.0.attn.q"),
        ("blocks.0._checkpoint_wrapped_module.mlp.bias", "blocks.0.mlp.bias"),
        ("_fsdp_wrapped_module._orig_mod.a._checkpoint_wrapped_module._fsdp_wrapped_module.b", "a.b"),
        ("module.layer.weight", "module.layer.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("weight", "weight"),
    ],
)
def test_strip_wrappers(name, bare):
    assert strip_wrappers(name) == bare


@pytest.mark.parametrize(
    "prefix", ["", "model.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "x.y."]
)
@pytest.mark.parametrize("inside", ["a.", "a._orig_mod.", "_fsdp_wrapped_module.a."])
def test_one_prefix_and_wrappers_anywhere(prefix, inside):
    saved = [f"{prefix}{inside}bias", f"{prefix}{inside}weight"]
    match = match_names(saved, OWN, step=5)
    assert match.names == {"a.bias": saved[0], "a.weight": saved[1]}
    assert match.left_out == ()


def test_wrappers_of_the_model_are_looked_through_too():
    wrapped = {name.replace("a.", "a._orig_mod."): name for name in OWN}
    assert match_names(["module.a.weight", "module.a.bias"], wrapped, step=5).names == {
        "a.weight": "module.a.weight",
        "a.bias": "module.a.bias",
    }


def test_names_as_they_are_win_over_names_without_wrappers():
    saved = ["a._orig_mod.weight", "a.weight", "a.bias"]
    match = match_names(saved, OWN, step=5)
    assert match.names == {"a.weight": "a.weight", "a.bias": "a.bias"}
    assert match.left_out == ("a._orig_mod.weight",)


def test_a_name_that_a_file_holds_in_two_wrappers_is_refused():
    saved = ["a._orig_mod.weight", "_orig_mod.a.weight", "a.bias"]
    words = r"step 5 holds a\.weight twice, as a\._orig_mod\.weight and as _orig_mod\.a\.weight\. Save the bare"
    with pytest.raises(PhasewatchError, match=words):
        match_names(saved, OWN, step=5)


def test_what_may_lack_and_what_may_not():
    assert match_names(["a.weight"], OWN, ["a.bias"], step=5).names == {"a.weight": "a.weight"}
    with pytest.raises(PhasewatchError, match=r"step 5 lacks a\.bias of the probe's model, and has a\.weight\. Build"):
        match_names(["a.weight"], OWN, step=5)
    with pytest.raises(PhasewatchError, match=r"lacks a\.weight, a\.bias of the probe's model, and has nothing"):
        match_names([], OWN, step=5)
    with pytest.raises(PhasewatchError, match=r"holds the probe's model 2 times, under x\., y\."):
        match_names([prefix + name for prefix in ("x.", "y.") for name in OWN], OWN, step=5)


class Shared(nn.Module):
    """A block under two names, once compiled; one buffer that is saved and one that isn't."""

    def __init__(self):
        super().__init__()
        self.block = nn.BatchNorm1d(2)
        self.fast = torch.compile(self.block, backend="eager")
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.register_buffer("absent", None, persistent=False)


def test_every_name_of_a_model():
    model = Shared()
    aliases = aliases_of(model)
    assert set(aliases) == {*model.state_dict(), "hidden"}
    assert set(aliases.values()) == {*dict(model.named_parameters()), *dict(model.named_buffers())}
    assert aliases["fast._orig_mod.weight"] == "block.weight"
    assert optional_buffers(model) == {"hidden"}
    for saved in (model.state_dict(), [f"fast.{name}" for name in model.block.state_dict()]):
        assert set(match_names(saved, aliases, {"hidden"}, step=1).names) == set(aliases.values()) - {"hidden"}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m)), lambda m: nn.ModuleList([m])]
)
def test_real_wrappers(wrap):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    match = match_names(wrap(model).state_dict(), aliases_of(model), step=1)
    assert set(match.names) == set(model.state_dict())
    assert match.left_out == ()
