"""The attention heads of a transformer, each as masks over the weights that are its own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.snapshot import unwrap

_SEPARATE = (
    ("q", "k", "v", "o"),  # TransformerLens, T5
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, Gemma, ViT
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, GPT-J, GPT-Neo
    ("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
)
"""Names of the query, key, value and output projections, as seen from the attention module."""

_FUSED = (
    ("c_attn", "c_proj"),  # GPT-2, nanoGPT, GPT-BigCode
    ("query_key_value", "dense"),  # GPT-NeoX and Pythia, BLOOM, Falcon
    ("qkv_proj", "o_proj"),  # Phi-3
    ("qkv", "out"),  # phasewatch.toy_tasks.in_context_regression
)
"""Names of the projection to queries, keys and values in one, and of the output projection."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_key_value_heads", "n_kv_heads")
_BY_HAND = "A head can be given by hand: Probe(parts={name: mask, ...}), with boolean masks of the parameters' shapes."


class _Projection(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    output_axis: int

    @property
    def outputs(self) -> int:
        return self.weight.shape[self.output_axis]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1 - self.output_axis]

    def dealt(self, indices: Tensor) -> "list[_Slices]":
        """Its outputs, by head."""
        slices = [_Slices(self.weight, self.output_axis, indices)]
        return slices if self.bias is None else [*slices, _Slices(self.bias, 0, indices)]

    def read_by(self, count: int) -> "_Slices":
        """Its inputs, by head."""
        return _Slices(self.weight, 1 - self.output_axis, _range(self.inputs).view(count, -1))


class _Slices(NamedTuple):
    """How a tensor is dealt out to the heads: the indices along one axis that are each head's."""

    tensor: Tensor
    axis: int
    indices: Tensor
    """Shape (head, index)."""


def heads(model: nn.Module) -> dict[str, Mapping[str, Tensor]]:
    """The attention heads of a model, each as a part of it for `Probe(parts=...)`.

    A head is its rows of the query, key and value projections, with their biases, and the columns of the output
    projection that read it. What heads share belongs to none of them: the output projection's bias, norms and
    position biases, and in grouped-query attention the keys and values. So heads never overlap, and moving one's
    weights changes what that head adds to the residual stream and nothing else in its layer.

    Known by the names and shapes of their weights: TransformerLens 4 bridges; Hugging Face's GPT-2, GPT-BigCode,
    GPT-NeoX and Pythia, BLOOM, Falcon, GPT-J, GPT-Neo, Llama, Mistral, Qwen, Gemma, Phi, OPT, BERT, DistilBERT, ViT,
    T5 and those built like them; `torch.nn.MultiheadAttention` and what contains it; nanoGPT; and this project's
    in-context regression. In a model of your own, a fused projection called `c_attn` or `qkv` is taken to hold all
    queries, then all keys, then all values, and one called `query_key_value` to hold the three head by head.

    Args:
        model: any module. A wrapper left by DDP or `torch.compile` is looked through.

    Returns:
        Masks as `masks_of` returns them, by the head's name: "L0H3" is head 3 of layer 0, TransformerLens's label,
        with the layer as numbered in the module's name. Where no number tells the attention modules apart, as in an
        encoder-decoder, the name is the module's, such as "decoder.layers.0.multihead_attn.H3". Heads without a
        trainable weight are left out.

    Raises:
        PhasewatchError: if no attention is found, all of it is frozen, or one doesn't have the shapes of its kind.

    Example:
        >>> import torch, phasewatch as pw
        >>> parts = pw.heads(torch.nn.MultiheadAttention(8, num_heads=2))
        >>> {name: sum(int(mask.sum()) for mask in masks.values()) for name, masks in parts.items()}
        {'L0H0': 140, 'L0H1': 140}
    """
    model = unwrap(model)
    call = f"heads({type(model).__name__}(...))"
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    attentions: dict[str, list[_Slices]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        where = f"{call} can't tell the heads of {module_name or 'the model'} apart"
        slices = _slices(where, getattr(model, "config", None), module)
        # A bridge and the attention it wraps share the output projection; the bridge, which comes first, is what runs.
        if slices and id(slices[-1].tensor) not in seen:
            seen.add(id(slices[-1].tensor))
            attentions[module_name] = slices
    if not attentions:
        looked_for = "; ".join(" ".join(layout) for layout in (*_SEPARATE, *_FUSED))
        raise PhasewatchError(
            f"{call} found no attention: no torch.nn.MultiheadAttention, and no module with the projections "
            f"{looked_for}. {_BY_HAND}"
        )
    found: dict[str, Mapping[str, Tensor]] = {}
    for label, slices in zip(_labels(list(attentions)), attentions.values(), strict=True):
        for head in range(len(slices[0].indices)):
            masks = {trainable[id(s.tensor)]: _mask(s, head) for s in slices if id(s.tensor) in trainable}
            if masks:
                found[f"{label}H{head}"] = masks
    if not found:
        raise PhasewatchError(
            f"{call} found {len(attentions)} attention modules, and all their weights are frozen. "
            "Unfreeze what is trained with requires_grad_()."
        )
    return found


def _slices(where: str, config: Any, module: nn.Module) -> list[_Slices]:
    """How an attention module's weights are dealt out to its heads, the output projection's last; [] if it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return _multihead(module)
    for layout in (*_SEPARATE, *_FUSED):
        if not (projections := _projections(where, module, layout)):
            continue
        count, shared = _head_counts(where, config, module, layout)
        if len(layout) == 4:
            slices = _separate(projections, count, shared)
        else:
            by_head = layout[0] == "query_key_value" or hasattr(module, "multi_query")  # GPT-BigCode isn't GPT-2
            slices = _fused(projections, count, shared, by_head)
        if not slices:
            shapes = ", ".join(f"{path} {tuple(p.weight.shape)}" for path, p in zip(layout, projections, strict=True))
            raise PhasewatchError(
                f"{where}: {count} heads with {shared} of keys and values don't have weights of the shapes "
                f"{shapes}. {_BY_HAND}"
            )
        return slices
    return []


def _multihead(module: nn.MultiheadAttention) -> list[_Slices]:
    own = _range(module.embed_dim).view(module.num_heads, -1)
    fused = _range(3 * module.embed_dim).view(3, *own.shape).transpose(0, 1).flatten(1)
    candidates = [
        (module.in_proj_weight, 0, fused),
        (module.in_proj_bias, 0, fused),
        (module.q_proj_weight, 0, own),
        (module.k_proj_weight, 0, own),
        (module.v_proj_weight, 0, own),
        (module.bias_k, 2, own),
        (module.bias_v, 2, own),
        (module.out_proj.weight, 1, own),
    ]
    return [_Slices(tensor, axis, indices) for tensor, axis, indices in candidates if tensor is not None]


def _separate(projections: list[_Projection], count: int, shared: int) -> list[_Slices]:
    """Projections of their own for queries, keys and values; [] if the shapes don't fit."""
    q, k, v, o = projections
    size, value_size = q.outputs // count, v.outputs // shared
    expected = [count * size, shared * size, shared * value_size, count * value_size]
    if [q.outputs, k.outputs, v.outputs, o.inputs] != expected or count % shared:
        return []
    own = [q, k, v] if shared == count else [q]
    return [*(s for p in own for s in p.dealt(_range(p.outputs).view(count, -1))), o.read_by(count)]


def _fused(projections: list[_Projection], count: int, shared: int, by_head: bool) -> list[_Slices]:
    """One projection for queries, keys and values, in three blocks or head by head; [] if the shapes don't fit."""
    qkv, o = projections
    size = o.inputs // count
    if [qkv.outputs, o.inputs] != [(count + 2 * shared) * size, count * size] or count % shared:
        return []
    indices = _range(qkv.outputs)
    if by_head:
        groups = indices.view(shared, -1, size)  # each its queries, one key and one value
        own = groups if shared == count else groups[:, :-2]
    elif shared == count:
        own = indices.view(3, count, size).transpose(0, 1)
    else:
        own = indices[: count * size]
    return [*qkv.dealt(own.reshape(count, -1)), o.read_by(count)]


def _projections(where: str, module: nn.Module, layout: tuple[str, ...]) -> list[_Projection]:
    """The projections of a layout; [] if the module lacks one."""
    children = [child for path in layout if (child := _child(module, path)) is not None]
    if len(children) < len(layout):
        return []
    projections = []
    for path, child in zip(layout, children, strict=True):
        while (wrapped := child._modules.get("_original_component")) is not None:  # of a TransformerLens bridge
            child = wrapped
        transposed = type(child).__name__ == "Conv1D"  # Hugging Face's: y = x W, not x Wᵀ
        weight, bias = child._parameters.get("weight"), child._parameters.get("bias")
        if weight is None or not (isinstance(child, nn.Linear) or transposed):
            kind = "parametrized" if parametrize.is_parametrized(child, "weight") else f"a {type(child).__name__}"
            raise PhasewatchError(f"{where}: its {path} is {kind}, and not a plain linear layer. {_BY_HAND}")
        projections.append(_Projection(weight, bias, int(transposed)))
    return projections


def _child(module: nn.Module, path: str) -> nn.Module | None:
    child: nn.Module | None = module
    for attribute in path.split("."):
        child = child._modules.get(attribute) if child is not None else None
    return child


def _head_counts(where: str, config: Any, module: nn.Module, layout: tuple[str, ...]) -> tuple[int, int]:
    """How many heads of queries, and of keys and values, by the attention itself, its config or the model's."""
    inner = _child(module, layout[0].rpartition(".")[0]) if "." in layout[0] else module
    owners = [inner, getattr(inner, "config", None), config]
    count = _first_number(owners, _HEADS)
    if count is None:
        raise PhasewatchError(
            f"{where}: neither it nor a config has {', '.join(_HEADS[:-1])} or {_HEADS[-1]}, their number. "
            f"Set one of them on the module. {_BY_HAND}"
        )
    return count, _first_number(owners, _KEY_VALUE_HEADS) or count


def _first_number(owners: list[Any], attributes: tuple[str, ...]) -> int | None:
    numbers = (getattr(owner, attribute, None) for owner in owners for attribute in attributes)
    return next((number for number in numbers if isinstance(number, int)), None)


def _range(size: int) -> Tensor:
    return torch.arange(size, device="cpu")


def _mask(slices: _Slices, head: int) -> Tensor:
    """An expanded view, so that a large model's many heads fit in memory."""
    shape = slices.tensor.shape
    along = torch.zeros(shape[slices.axis], dtype=torch.bool, device="cpu")
    along[slices.indices[head]] = True
    return along.view([-1 if axis == slices.axis else 1 for axis in range(len(shape))]).expand(shape)


def _labels(names: list[str]) -> list[str]:
    """What comes before "H3": the first number in the modules' names that tells them apart, or else the names."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    for layers in zip(*numbers, strict=False):
        if len(set(layers)) == len(names):
            return [f"L{layer}" for layer in layers]
    return ["L0"] if len(names) == 1 else [f"{name}." for name in names]
