"""Parts of a model, by name, pattern or mask: the weights that a refined local learning coefficient samples."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.names import aliases_of
from phasewatch.monitor.snapshots.snapshot import unwrap

Part: TypeAlias = str | Mapping[str, Tensor] | Sequence[str | Mapping[str, Tensor]]
"""The name or glob pattern of a parameter or module, such as "blocks.0.attn" or "blocks.*.mlp"; a mapping from the
names of parameters to boolean masks of their shape, True where sampled, such as `heads(model)["L0H3"]`; or a sequence
of these, which is all of them together. In a pattern, `*` also matches dots."""


def masks_of(model: nn.Module, part: Part) -> dict[str, Tensor]:
    """Which weights belong to a part of a model.

    The refined LLC (Wang et al., arXiv 2410.02984) samples these alone and holds all others at w*. A name is any that
    the parameter or a module above it goes by, in `named_parameters` or in `state_dict`; a tied parameter has several.
    Frozen parameters below a module are left out.

    Args:
        model: any module. A wrapper left by DDP or `torch.compile` is looked through.
        part: see `Part`.

    Returns:
        A boolean mask of the parameter's shape, on the CPU, for each trainable parameter of which some weight is
        selected, under its first name in `named_parameters` and in that order. Clone a mask before writing to it.

    Raises:
        PhasewatchError: if a name or pattern matches nothing, or only what isn't trained; for a mask of an unknown or
            untrained parameter or of another shape or dtype; or if nothing is selected.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(masks_of(model, "*.bias")), list(masks_of(model, "2"))
        (['0.bias', '2.bias'], ['2.weight', '2.bias'])
    """
    model = unwrap(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trainable = {name: p for name, p in trained if p.is_floating_point() or p.is_complex()}
    aliases = aliases_of(model)
    masks: dict[str, Tensor] = {}
    for single in part if isinstance(part, Sequence) and not isinstance(part, str) else [part]:
        if isinstance(single, str):
            selected = {name: _whole(trainable[name]) for name in _matched(single, aliases, trainable)}.items()
        elif isinstance(single, Mapping):
            selected = [_checked(name, mask, aliases, trainable) for name, mask in single.items()]
        else:
            raise PhasewatchError(
                "Probe(parts=...) takes a name or pattern, a mapping from parameter names to boolean masks, or a "
                f"list of these; a {type(single).__name__} came."
            )
        for name, mask in selected:
            masks[name] = masks[name] | mask if name in masks else mask
    masks = {name: masks[name] for name in trainable if name in masks and masks[name].any()}
    if not masks:
        raise PhasewatchError(
            "Probe(parts=...) selects no weight. Name a part of the model, or give masks that are True somewhere."
        )
    return masks


def _whole(parameter: Tensor) -> Tensor:
    return torch.tensor(True, device="cpu").expand(parameter.shape)


def _matched(pattern: str, aliases: Mapping[str, str], trainable: Mapping[str, Tensor]) -> list[str]:
    """The trainable parameters that a pattern names, by themselves or through a module above them."""
    matched = _reached(aliases, pattern.__eq__) or _reached(aliases, lambda name: fnmatchcase(name, pattern))
    if not matched:
        raise PhasewatchError(
            f"Probe(parts={pattern!r}) matches no parameter or module of the model. {_closest(pattern, aliases)}"
        )
    if found := [name for name in matched if name in trainable]:
        return found
    some = f"{next(iter(matched.values()))}{' and others' if len(matched) > 1 else ''}"
    raise PhasewatchError(
        f"Probe(parts={pattern!r}) matches only frozen parameters and buffers ({some}), which are never sampled. "
        "Name a part that is trained, or unfreeze it with requires_grad_()."
    )


def _reached(aliases: Mapping[str, str], wanted: Callable[[str], bool]) -> dict[str, str]:
    """The tensors of which a name, or that of a module above, is wanted: first name to the one found."""
    return {first: alias for alias, first in aliases.items() if any(wanted(name) for name in _with_modules(alias))}


def _checked(name: str, mask: Any, aliases: Mapping[str, str], trainable: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    call = f"Probe(parts={{{name!r}: ...}})"
    if not isinstance(mask, Tensor):
        several = f" These are several parts; give one, such as parts=parts[{name!r}]."
        raise PhasewatchError(
            f"{call} takes a boolean tensor of the parameter's shape, True where sampled; a {type(mask).__name__} came."
            + several * isinstance(mask, Mapping)
        )
    if name not in aliases:
        raise PhasewatchError(f"{call} names no parameter of the model. {_closest(name, aliases)}")
    first = aliases[name]
    if first not in trainable:
        raise PhasewatchError(
            f"{call} names a frozen parameter or a buffer, which is never sampled. "
            "Leave it out, or unfreeze it with requires_grad_()."
        )
    shape = trainable[first].shape
    if mask.dtype != torch.bool or mask.shape != shape:
        raise PhasewatchError(
            f"{call} takes a boolean mask of the parameter's shape {tuple(shape)}, True where sampled; "
            f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)} came."
        )
    return first, mask.cpu()


def _with_modules(name: str) -> list[str]:
    """A parameter's name, and those of the modules above it."""
    return [name[:i] for i, character in enumerate(name) if character == "."] + [name]


def _closest(name: str, aliases: Mapping[str, str]) -> str:
    known = dict.fromkeys(known for alias in aliases for known in _with_modules(alias))
    if close := difflib.get_close_matches(name, known, n=3):
        return f"Perhaps {' or '.join(map(repr, close))} is meant."
    return f"It has {', '.join(map(repr, list(known)[:5]))} and {'others' if len(known) > 5 else 'no others'}."
