"""A head is seen here through hooks: its attention pattern, its output, and what it adds to the residual stream."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.model.heads import heads
from phasewatch.monitor.model.parts import masks_of
from phasewatch.toy_tasks.in_context_regression import RegressionTransformer

HEADS, SIZE, LAYERS = 6, 2, 2
WIDTH = HEADS * SIZE
TOKENS = torch.tensor([[1, 5, 2, 8, 3, 9], [4, 4, 7, 1, 6, 2]])
STREAM = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Seen(NamedTuple):
    """What an attention did in one forward pass."""

    pattern: Tensor
    """Shape (batch, head, query, key)."""
    outputs: Tensor
    """Shape (batch, position, head, size)."""
    added: Tensor
    """To the residual stream, by all heads and the bias, shape (batch, position, width)."""
    reading: Tensor
    """The output projection, shape (head, size, width)."""

    def contribution(self, head: int) -> Tensor:
        return self.outputs[:, :, head] @ self.reading[head]


class Case(NamedTuple):
    make: Callable[..., nn.Module]
    observe: Callable[[nn.Module], list[Seen]]
    """Its attentions in the order that they run."""
    labels: tuple[str, ...] = ("L0", "L1")
    biased: bool = False
    grouped: bool = False


def observed(
    model: nn.Module,
    out: tuple[str, ...],
    run: Callable[[nn.Module], Any] = lambda model: model(TOKENS),
    patterns: tuple[str, ...] = (),
) -> list[Seen]:
    """What attentions did, by the names of their output projections, and of the modules that patterns pass through."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0], output)})
        )
        for name in (*out, *patterns)
    ]
    returned = run(model)
    for handle in handles:
        handle.remove()
    return [
        Seen(pattern, inputs.unflatten(-1, (HEADS, SIZE)), added, reading(model.get_submodule(name)))
        for pattern, name in zip([seen[name][1] for name in patterns] or returned, out, strict=True)
        for inputs, added in [seen[name]]
    ]


def reading(projection: nn.Module) -> Tensor:
    projection = getattr(projection, "original_component", projection)
    weight = projection.weight.detach().clone()
    return (weight if type(projection).__name__ == "Conv1D" else weight.T).unflatten(0, (HEADS, SIZE))


def hugging_face(config: Any, out: str, run: Any = None, **case: Any) -> Case:
    return Case(
        lambda: transformers.AutoModel.from_config(config, attn_implementation="eager"),
        lambda model: observed(
            model,
            tuple(out.format(layer) for layer in range(LAYERS)),
            run or (lambda model: model(TOKENS, output_attentions=True).attentions),
        ),
        **case,
    )


def bridge(make: Callable[..., nn.Module], **case: Any) -> Case:
    out = tuple(f"blocks.{layer}.attn.o" for layer in range(LAYERS))
    patterns = tuple(f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS))
    return Case(make, lambda model: observed(model, out, patterns=patterns), **case)


def native(**more: Any) -> nn.Module:
    config = {"n_layers": LAYERS, "d_model": WIDTH, "n_ctx": 16, "d_head": SIZE, "n_heads": HEADS, "d_vocab": 11}
    config |= {"act_fn": "relu", "normalization_type": "LN", "seed": 0, "architecture": "TransformerLensNative"}
    return TransformerBridge.boot_native(TransformerBridgeConfig(**config | more))


def booted(config: Any, folder: str) -> nn.Module:
    """A bridge around a Hugging Face model, which asks for a config and a tokenizer on disk."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(11)}, unk_token="0"))
    special = dict.fromkeys(("unk_token", "bos_token", "eos_token", "pad_token"), "0")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=model, tokenizer=tokenizer, device="cpu")


class Stack(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options) for _ in "01")


def observed_stack(model: nn.Module) -> list[Seen]:
    """`nn.MultiheadAttention` calls its output projection as a function, which no hook sees: replace it by identity."""
    seen, stream = [], STREAM
    for attention in model.layers:
        added, pattern = attention(stream, stream, stream, average_attn_weights=False)
        projection = attention.out_proj.weight.detach().clone()
        bias = attention.out_proj.bias.detach().clone()
        attention.out_proj.weight.copy_(torch.eye(WIDTH))
        attention.out_proj.bias.zero_()
        outputs = attention(stream, stream, stream)[0].unflatten(-1, (HEADS, SIZE))
        attention.out_proj.weight.copy_(projection)
        attention.out_proj.bias.copy_(bias)
        seen.append(Seen(pattern, outputs, added, projection.T.unflatten(0, (HEADS, SIZE))))
        stream = stream + added
    return seen


class NanoAttention(nn.Module):
    """As in nanoGPT: fused, in blocks, in a plain linear layer called as GPT-2's transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2))
        pattern = (q @ k.mT).softmax(-1)
        return self.c_proj((pattern @ v).transpose(1, 2).flatten(2)), pattern


class Nano(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NanoAttention() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> list[Tensor]:
        patterns = []
        for block in self.blocks:
            added, pattern = block(x)
            x = x + added
            patterns.append(pattern)
        return patterns


def t5_patterns(model: nn.Module) -> Any:
    out = model(TOKENS, decoder_input_ids=TOKENS, output_attentions=True)
    return (*out.encoder_attentions, *out.decoder_attentions, *out.cross_attentions)


IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 11}
GPT2 = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 16} | IDS
USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS} | IDS
FULL = USUAL | {"intermediate_size": 16, "max_position_embeddings": 16}
GROUPED = FULL | {"num_key_value_heads": 2}
T5 = {"d_model": WIDTH, "d_kv": SIZE, "num_heads": HEADS, "num_layers": 1, "d_ff": 16, "decoder_start_token_id": 0}
T5_LABELS = ("encoder.block.0.layer.0.SelfAttention.", "decoder.block.0.layer.0.SelfAttention.")
T5_LABELS += ("decoder.block.0.layer.1.EncDecAttention.",)
NEO = {"hidden_size": WIDTH, "num_layers": LAYERS, "attention_types": [[["global"], LAYERS]], "num_heads": HEADS}
CASES = {
    "regression": Case(
        lambda: RegressionTransformer(examples=4, heads=HEADS, width=WIDTH),
        lambda model: observed(
            model,
            ("blocks.0.attn.out", "blocks.1.attn.out"),
            lambda model: model(STREAM[:, :4, :4], STREAM[:, :4, 5]),
            ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"),
        ),
    ),
    "torch": Case(Stack, observed_stack, biased=True),
    "torch-unequal": Case(lambda: Stack(kdim=WIDTH, vdim=WIDTH), observed_stack, biased=True),
    "nano": Case(
        Nano, lambda model: observed(model, ("blocks.0.c_proj", "blocks.1.c_proj"), lambda m: m(STREAM)), biased=True
    ),
    "native": bridge(native, biased=True),
    "native-grouped": bridge(lambda: native(n_key_value_heads=2), biased=True, grouped=True),
    "bridge-gpt2": bridge(lambda folder: booted(transformers.GPT2Config(**GPT2), folder), biased=True),
    "bridge-gpt-neox": bridge(
        lambda folder: booted(transformers.GPTNeoXConfig(**FULL, rotary_pct=1.0), folder), biased=True
    ),
    "bridge-qwen2": bridge(
        lambda folder: booted(transformers.Qwen2Config(**GROUPED), folder), biased=True, grouped=True
    ),
    "gpt2": hugging_face(transformers.GPT2Config(**GPT2), "h.{}.attn.c_proj", biased=True),
    "gpt-bigcode": hugging_face(
        transformers.GPTBigCodeConfig(**GPT2, multi_query=False), "h.{}.attn.c_proj", biased=True
    ),
    "gpt-bigcode-multi-query": hugging_face(
        transformers.GPTBigCodeConfig(**GPT2), "h.{}.attn.c_proj", biased=True, grouped=True
    ),
    "gpt-neox": hugging_face(
        transformers.GPTNeoXConfig(**FULL, rotary_pct=1.0), "layers.{}.attention.dense", biased=True
    ),
    "bloom": hugging_face(transformers.BloomConfig(**USUAL), "h.{}.self_attention.dense", biased=True),
    "falcon": hugging_face(
        transformers.FalconConfig(**USUAL, multi_query=False, bias=True), "h.{}.self_attention.dense", biased=True
    ),
    "falcon-multi-query": hugging_face(transformers.FalconConfig(**USUAL), "h.{}.self_attention.dense", grouped=True),
    "falcon-grouped": hugging_face(
        transformers.FalconConfig(**USUAL, new_decoder_architecture=True, num_kv_heads=2),
        "h.{}.self_attention.dense",
        grouped=True,
    ),
    "gpt-j": hugging_face(transformers.GPTJConfig(**GPT2, rotary_dim=2), "h.{}.attn.out_proj"),
    "gpt-neo": hugging_face(transformers.GPTNeoConfig(**NEO | IDS), "h.{}.attn.attention.out_proj"),
    "llama": hugging_face(transformers.LlamaConfig(**FULL), "layers.{}.self_attn.o_proj"),
    "llama-grouped": hugging_face(transformers.LlamaConfig(**GROUPED), "layers.{}.self_attn.o_proj", grouped=True),
    "mistral": hugging_face(transformers.MistralConfig(**GROUPED), "layers.{}.self_attn.o_proj", grouped=True),
    "qwen2": hugging_face(transformers.Qwen2Config(**GROUPED), "layers.{}.self_attn.o_proj", biased=True, grouped=True),
    "qwen3": hugging_face(
        transformers.Qwen3Config(**GROUPED, head_dim=SIZE), "layers.{}.self_attn.o_proj", grouped=True
    ),
    "gemma2": hugging_face(
        transformers.Gemma2Config(**GROUPED, head_dim=SIZE), "layers.{}.self_attn.o_proj", grouped=True
    ),
    "phi": hugging_face(
        transformers.PhiConfig(**FULL, partial_rotary_factor=1.0), "layers.{}.self_attn.dense", biased=True
    ),
    "phi3": hugging_face(transformers.Phi3Config(**FULL), "layers.{}.self_attn.o_proj"),
    "phi3-grouped": hugging_face(transformers.Phi3Config(**GROUPED), "layers.{}.self_attn.o_proj", grouped=True),
    "opt": hugging_face(
        transformers.OPTConfig(**USUAL, ffn_dim=16, word_embed_proj_dim=WIDTH, max_position_embeddings=16),
        "decoder.layers.{}.self_attn.out_proj",
        biased=True,
    ),
    "bert": hugging_face(transformers.BertConfig(**FULL), "encoder.layer.{}.attention.output.dense", biased=True),
    "distilbert": hugging_face(
        transformers.DistilBertConfig(dim=WIDTH, n_layers=LAYERS, n_heads=HEADS, hidden_dim=16, **IDS),
        "transformer.layer.{}.attention.out_lin",
        biased=True,
    ),
    "vit": hugging_face(
        transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS
        ),
        "layers.{}.attention.o_proj",
        lambda model: model(PIXELS, output_attentions=True).attentions,
        biased=True,
    ),
    "t5": Case(
        lambda: transformers.AutoModel.from_config(transformers.T5Config(**T5 | IDS), attn_implementation="eager"),
        lambda model: observed(model, tuple(f"{label}o" for label in T5_LABELS), t5_patterns),
        labels=T5_LABELS,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model(case, request, tmp_path):
    """With weights so large that patterns differ, and biases and norms in general position."""
    torch.manual_seed(0)
    model = case.make(str(tmp_path)) if request.node.callspec.params["case"].startswith("bridge-") else case.make()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(0.4 * torch.randn(parameter.shape))
    return model.eval()


@torch.no_grad()
def moved_by(model: nn.Module, masks: Any, observe: Callable[[nn.Module], list[Seen]]) -> list[Seen]:
    """What is seen after the masked weights were moved, before they are put back."""
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].clone() for name in masks}
    for name, mask in masks.items():
        parameters[name][mask] += torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(1))
    seen = observe(model)
    for name, tensor in before.items():
        parameters[name].copy_(tensor)
    return seen


@torch.no_grad()
def test_moving_a_head_moves_that_head_alone(case, model):
    before = case.observe(model)
    found = heads(model)
    assert list(found) == [f"{label}H{head}" for label in case.labels for head in range(HEADS)]
    for name, masks in found.items():
        label, head = name.rsplit("H", 1)
        layer, head = case.labels.index(label), int(head)
        after = moved_by(model, masks, case.observe)
        for a, b in zip(after[:layer], before[:layer], strict=True):
            torch.testing.assert_close(a.added, b.added)
        a, b = after[layer], before[layer]
        assert moved(a.pattern, b.pattern, 1) == [head], name
        assert moved(a.outputs, b.outputs, 2) == [head], name
        assert moved(a.reading, b.reading, 0) == [head], name
        torch.testing.assert_close(
            a.added - b.added, a.contribution(head) - b.contribution(head), rtol=1e-3, atol=1e-4, msg=name
        )


def moved(after: Tensor, before: Tensor, axis: int) -> list[int]:
    change = (after - before).abs().movedim(axis, 0).flatten(1).amax(1)
    assert not ((change > 1e-5) & (change < 1e-3)).any(), change
    return change.gt(1e-3).nonzero().flatten().tolist()


def test_heads_share_no_weight_and_leave_none_out(case, model):
    found = heads(model)
    everything = masks_of(model, list(found.values()))
    every_projection = WIDTH * WIDTH + WIDTH * case.biased
    expected = len(case.labels) * (every_projection * (1 if case.grouped else 3) + WIDTH * WIDTH)
    assert sum(int(mask.sum()) for mask in everything.values()) == expected
    assert sum(int(mask.sum()) for masks in found.values() for mask in masks.values()) == expected


@torch.no_grad()
def test_zeroing_a_head_silences_it(case, model):
    parameters = dict(model.named_parameters())
    for name, masks in heads(model).items():
        label, head = name.rsplit("H", 1)
        before = {name: parameters[name].clone() for name in masks}
        for parameter, mask in masks.items():
            parameters[parameter][mask] = 0
        seen = case.observe(model)[case.labels.index(label)]
        for parameter, tensor in before.items():
            parameters[parameter].copy_(tensor)
        assert not seen.contribution(int(head)).any()
        assert case.grouped or not seen.outputs[:, :, int(head)].any()


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (nn.MultiheadAttention(4, 2), ["L0H0", "L0H1"]),
        (nn.TransformerEncoderLayer(4, 2, 8), ["L0H0", "L0H1"]),
        (nn.Sequential(nn.Embedding(3, 4), nn.MultiheadAttention(4, 1)), ["L1H0"]),
        (nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(11))), [f"L{i}H0" for i in range(11)]),
        (nn.ModuleDict({"body": nn.ModuleList([nn.ModuleList([nn.MultiheadAttention(4, 1) for _ in "01"])])}),
         ["L0H0", "L1H0"]),
        (nn.TransformerDecoderLayer(4, 1, 8), ["self_attn.H0", "multihead_attn.H0"]),
        (nn.ModuleList([nn.TransformerDecoderLayer(4, 1, 8)]), ["0.self_attn.H0", "0.multihead_attn.H0"]),
    ],
)  # fmt: skip
def test_names_say_the_layer_or_else_the_module(model, labels):
    assert list(heads(model)) == labels


def test_torch_attention_with_added_keys_and_values_of_other_sizes():
    attention = nn.MultiheadAttention(6, 3, kdim=5, vdim=4, add_bias_kv=True)
    masks = heads(attention)["L0H1"]
    rows = [2, 3]
    for name, width in (("q_proj_weight", 6), ("k_proj_weight", 5), ("v_proj_weight", 4)):
        assert masks[name].nonzero().tolist() == [[row, column] for row in rows for column in range(width)]
    assert masks["in_proj_bias"].nonzero().flatten().tolist() == [2, 3, 8, 9, 14, 15]
    assert masks["bias_k"].nonzero().tolist() == masks["bias_v"].nonzero().tolist() == [[0, 0, 2], [0, 0, 3]]
    assert masks["out_proj.weight"].nonzero().tolist() == [[row, column] for row in range(6) for column in rows]
    assert "out_proj.bias" not in masks


def test_frozen_weights_are_no_part_of_a_head():
    model = Stack()
    model.layers[0].requires_grad_(False)
    model.layers[1].in_proj_weight.requires_grad_(False)
    found = heads(model)
    assert list(found) == [f"L1H{head}" for head in range(HEADS)]
    assert set(found["L1H0"]) == {"layers.1.in_proj_bias", "layers.1.out_proj.weight"}
    with pytest.raises(PhasewatchError, match=r"heads\(Stack\(\.\.\.\)\) found 2 attention modules.*frozen"):
        heads(model.requires_grad_(False))


def test_looks_through_wrappers_and_at_shapes_alone():
    expected = heads(Stack())
    for model in (nn.DataParallel(Stack()), Stack(device="meta")):
        found = heads(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[h][name], mask) for h in found for name, mask in expected[h].items())
    with torch.device("meta"):
        assert all(mask.device.type == "cpu" for masks in heads(Stack()).values() for mask in masks.values())


def test_many_heads_take_little_memory():
    found = heads(nn.MultiheadAttention(512, 64))
    assert sum(mask.untyped_storage().nbytes() for masks in found.values() for mask in masks.values()) < 64 * 4 * 2048


class Separate(nn.Module):
    def __init__(self, *outputs: int, **attributes: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, size) for size in outputs)
        self.o_proj = nn.Linear(8, 8)
        for name, value in attributes.items():
            setattr(self, name, value)


def test_a_model_without_known_attention_is_told_what_was_looked_for():
    with pytest.raises(PhasewatchError, match=r"heads\(Linear.*found no attention.*q_proj k_proj v_proj.*parts={name"):
        heads(nn.Linear(2, 2))


def test_an_attention_that_does_not_say_how_many_heads_it_has():
    with pytest.raises(PhasewatchError, match=r"heads of the model apart: neither it nor a config has num_heads,.*Set"):
        heads(Separate(8, 8, 8))


@pytest.mark.parametrize(
    ("outputs", "attributes"),
    [
        ((16, 8, 8), {"num_heads": 4}),  # a query and its gate
        ((8, 4, 4), {"num_heads": 4}),  # grouped, and not said
        ((8, 8, 8), {"num_heads": 4, "num_key_value_heads": 2}),
        ((8, 8, 8), {"num_heads": 3}),
        ((8, 6, 6), {"num_heads": 4, "num_key_value_heads": 3}),
    ],
)
def test_shapes_that_are_not_those_of_the_heads(outputs, attributes):
    with pytest.raises(
        PhasewatchError, match=rf"heads of 1 apart.*{attributes['num_heads']} heads.*q_proj \({outputs[0]}, 8"
    ):
        heads(nn.Sequential(nn.Linear(8, 8), Separate(*outputs, **attributes)))


def test_cross_attention_of_gpt2_is_not_taken_for_its_own_attention():
    model = transformers.AutoModel.from_config(transformers.GPT2Config(**GPT2, add_cross_attention=True))
    with pytest.raises(PhasewatchError, match=r"h\.0\.crossattention apart.*c_attn \(12, 24\)"):
        heads(model)


def test_projections_that_are_not_plain_linear_layers():
    attention = Separate(8, 8, 8, num_heads=2)
    parametrizations.weight_norm(attention.k_proj)
    with pytest.raises(PhasewatchError, match="its k_proj is parametrized, and not a plain linear layer"):
        heads(attention)
    attention = Separate(8, 8, 8, num_heads=2)
    attention.v_proj = nn.Conv1d(8, 8, 1)
    with pytest.raises(PhasewatchError, match="its v_proj is a Conv1d"):
        heads(attention)
