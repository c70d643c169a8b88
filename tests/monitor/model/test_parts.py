import pytest
import torch
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.heads import heads
from phasewatch.monitor.model.parts import masks_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


class Model(nn.Module):
    """Blocks, a tied unembedding, a frozen layer, a norm with buffers, and a block reachable by two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(11))
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unembed = nn.Linear(4, 5)
        self.unembed.weight = self.embed.weight
        self.last = self.blocks[10]


@pytest.fixture
def model():
    return Model()


MLP = ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias")
ATTENTION = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias")


def under(prefix, names):
    return [f"{prefix}.{name}" for name in names]


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("blocks.0.mlp.2.weight", ["blocks.0.mlp.2.weight"]),
        ("blocks.0.mlp", under("blocks.0", MLP)),
        ("blocks.0.mlp.*", under("blocks.0", MLP)),
        ("blocks.1", under("blocks.1", ATTENTION + MLP)),  # and not blocks.10
        ("blocks.*.mlp.2.bias", [f"blocks.{i}.mlp.2.bias" for i in range(11)]),
        ("blocks.[02].attn.in_*", under("blocks.0", ATTENTION[:2]) + under("blocks.2", ATTENTION[:2])),
        ("*.attn", [name for i in range(11) for name in under(f"blocks.{i}", ATTENTION)]),
        ("unembed.weight", ["embed.weight"]),  # the second name of a tied parameter
        ("unembed", ["embed.weight", "unembed.bias"]),
        ("last.mlp", under("blocks.10", MLP)),  # the second name of a module
        ("frozen", None),
        (["unembed.bias", "blocks.0.mlp", "blocks.*.mlp.0.bias", "embed"],
         ["embed.weight", *under("blocks.0", MLP), *(f"blocks.{i}.mlp.0.bias" for i in range(1, 11)), "unembed.bias"]),
    ],
)  # fmt: skip
def test_names_and_patterns(model, part, names):
    if names is None:
        with pytest.raises(PhasewatchError, match=r"parts='frozen'\) matches only frozen.*frozen\.weight and others"):
            masks_of(model, part)
        return
    masks = masks_of(model, part)
    assert list(masks) == names
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert all(mask.dtype == torch.bool and mask.shape == shapes[name] and mask.all() for name, mask in masks.items())


def test_a_star_is_every_trainable_parameter(model):
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(masks_of(model, "*")) == trainable
    assert "frozen.weight" not in trainable


def test_names_with_the_characters_of_patterns_are_themselves():
    model = nn.ParameterDict({"w[0]": torch.ones(2), "w0": torch.ones(2)})
    assert list(masks_of(model, "w[0]")) == ["w[0]"]


def test_names_of_a_bridge_as_in_its_state_dict_and_as_in_its_parameters():
    config = {"n_layers": 2, "d_model": 8, "n_ctx": 4, "d_head": 4, "n_heads": 2, "d_vocab": 5, "act_fn": "relu"}
    config |= {"normalization_type": "LN", "seed": 0, "architecture": "TransformerLensNative"}
    model = TransformerBridge.boot_native(TransformerBridgeConfig(**config))
    inner = "layers.0._original_component.attn._original_component"
    expected = [f"{inner}.{p}._original_component.{kind}" for p in "qkvo" for kind in ("weight", "bias")]
    assert list(masks_of(model, "blocks.0.attn")) == expected
    assert list(masks_of(model, inner)) == expected
    assert list(masks_of(model, "blocks.0.attn.q.weight")) == expected[:1]


def test_masks_keep_their_values_and_empty_ones_are_left_out(model):
    mask = torch.tensor([[True, False, False, True]] * 5)
    masks = masks_of(model, {"norm.bias": torch.zeros(4, dtype=torch.bool), "unembed.weight": mask})
    assert list(masks) == ["embed.weight"]
    assert torch.equal(masks["embed.weight"], mask)


def test_a_sequence_is_all_of_its_parts(model):
    found = heads(model)
    row = torch.zeros(4, 4, dtype=torch.bool)
    row[3] = True
    masks = masks_of(model, (found["L0H1"], "norm.*", {"blocks.0.attn.out_proj.weight": row}))
    assert list(masks) == [*under("blocks.0", ATTENTION[:3]), "norm.weight", "norm.bias"]
    expected = torch.tensor([[False, False, True, True]] * 3 + [[True] * 4])
    assert torch.equal(masks["blocks.0.attn.out_proj.weight"], expected)
    assert torch.equal(masks["blocks.0.attn.in_proj_bias"], torch.tensor([False, False, True, True] * 3))


def test_looks_through_wrappers(model):
    assert list(masks_of(nn.DataParallel(model), "embed")) == ["embed.weight"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("blocks.0.mpl", r"Probe\(parts='blocks.0.mpl'\) matches no parameter or module.*Perhaps 'blocks.0.mlp' or"),
        ("zzz", r"Probe\(parts='zzz'\) matches no parameter.*It has 'embed', 'embed.weight', 'blocks'.*and others"),
        ("", r"Probe\(parts=''\) matches no parameter"),
        (["embed", "embedding"], r"Probe\(parts='embedding'\) matches no parameter.*'embed'"),
        ("frozen.bias", r"Probe\(parts='frozen.bias'\) matches only frozen.*\(frozen.bias\).*requires_grad_"),
        ("norm.running_*", r"matches only frozen parameters and buffers \(norm.running_mean and others\)"),
        ({"embed.wieght": torch.ones(5, 4).bool()}, r"parts={'embed.wieght': ...}\) names.*Perhaps 'embed.weight'"),
        ({"embed": torch.ones(5, 4).bool()}, r"parts={'embed': ...}\) names no parameter"),
        ({"embed.weight": torch.ones(4, 5).bool()}, r"shape \(5, 4\), True where sampled; bool of shape \(4, 5\) came"),
        ({"embed.weight": torch.ones(5, 4)}, r"shape \(5, 4\), True where sampled; float32 of shape \(5, 4\) came"),
        ({"embed.weight": [True] * 5}, r"{'embed.weight': ...}\) takes a boolean tensor.*a list came"),
        ({"frozen.bias": torch.ones(4).bool()}, r"{'frozen.bias': ...}\) names a frozen parameter"),
        ({"embed.weight": torch.zeros(5, 4).bool()}, r"Probe\(parts=...\) selects no weight"),
        ([], r"Probe\(parts=...\) selects no weight"),
        ({}, r"Probe\(parts=...\) selects no weight"),
        (3, r"Probe\(parts=...\) takes a name or pattern.*a int came"),
        (["embed", None], r"Probe\(parts=...\) takes a name or pattern.*a NoneType came"),
        (torch.ones(5, 4).bool(), r"Probe\(parts=...\) takes a name or pattern.*a Tensor came"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_part(model, part, message):
    with pytest.raises(PhasewatchError, match=message):
        masks_of(model, part)


def test_all_heads_at_once_are_told_to_be_several_parts(model):
    with pytest.raises(PhasewatchError, match=r"a dict came. These are several parts.*parts=parts\['L0H0'\]"):
        masks_of(model, heads(model))
