"""Which tensor of a snapshot belongs to which tensor of a model: the only place where names are compared.

Readers keep the names that a file has. A snapshot and a model differ in what was wrapped around the model, or around a
part of it, when its weights were saved.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from phasewatch.monitor.errors import PhasewatchError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "modules_to_save")
_ADAPTER = "default"
"""The name that PEFT gives an adapter unless told otherwise; it is in a model's names and not in its files'."""

_RENAMED_BY_PEFT = {
    "prompt_embeddings": "prompt_encoder.embedding.weight",
    "lora_magnitude_vector": "lora_magnitude_vector.weight",
}
"""Ends of names in files of PEFT, and what a model calls them."""


class NameMatch(NamedTuple):
    """The names of a model's tensors in a snapshot.

    Attributes:
        names: for each of the model's tensors that the snapshot holds, its own name and its name in the snapshot.
        left_out: names in the snapshot that belong to no tensor of the model.
    """

    names: dict[str, str]
    left_out: tuple[str, ...]


def match_names(
    saved: Collection[str], aliases: Mapping[str, str], optional: Collection[str] = (), *, step: int
) -> NameMatch:
    """Find a model's tensors among the names in a snapshot.

    Names match as they are, or without the parts that `torch.compile`, FSDP and activation checkpointing insert on
    either side. All of the snapshot's names may have one more prefix, such as `module.` (DDP) or `model.` (Lightning).

    Args:
        saved: the names in the snapshot.
        aliases: every name that a tensor of the model goes by, to its own name; see `aliases_of`.
        optional: own names that the snapshot may lack; see `optional_buffers`.
        step: the snapshot's, for messages.

    Returns:
        The match. A tied tensor that the snapshot holds under several names is matched to the first.

    Raises:
        PhasewatchError: if a tensor is missing, or the snapshot holds the model several times.

    Example:
        >>> match_names(["_orig_mod.weight", "_orig_mod.bias"], {"weight": "weight", "bias": "bias"}, step=7).names
        {'weight': '_orig_mod.weight', 'bias': '_orig_mod.bias'}
    """
    needed = set(aliases.values()) - set(optional)
    under: dict[str, set[str]] = {}
    for bare, known in (({name: name for name in saved}, aliases), (_bare(saved), _bare_aliases(aliases))):
        under = _by_prefix(bare.values(), known)
        whole = [prefix for prefix, own in under.items() if own >= needed]
        if "" in whole:
            return _matched(bare, known, "", step)
        if len(whole) > 1:
            raise PhasewatchError(
                f"The snapshot of step {step} holds the probe's model {len(whole)} times, under {_some(whole)}. "
                f"Choose one, as by open_series(..., key={whole[0].rstrip('.')!r}), or save it by itself."
            )
        if whole:
            return _matched(bare, known, whole[0], step)
    best = max(under.values(), key=len)
    missing = [own for own in dict.fromkeys(aliases.values()) if own in needed - best]
    raise PhasewatchError(
        f"The snapshot of step {step} lacks {_some(missing)} of the probe's model, and has {_some(saved)}. "
        "Build the probe with the model that was saved."
    )


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Every name that a tensor goes by, in `named_parameters`, `named_buffers` or `state_dict`, to its first one.

    Args:
        model: any module.
    """
    own = [*model.named_parameters(), *model.named_buffers()]
    first_name = {id(tensor): name for name, tensor in own}
    everything: list[Mapping[str, Any]] = [
        dict(model.named_parameters(remove_duplicate=False)),
        dict(model.named_buffers(remove_duplicate=False)),
        model.state_dict(keep_vars=True),
    ]
    return {
        alias: first_name[id(tensor)]
        for names in everything
        for alias, tensor in names.items()
        if isinstance(tensor, Tensor) and id(tensor) in first_name
    }


def optional_buffers(model: nn.Module) -> set[str]:
    """The first names of the buffers that `state_dict` leaves out (`register_buffer(..., persistent=False)`).

    Args:
        model: any module.
    """
    hidden = {
        id(module._buffers.get(name)) for module in model.modules() for name in module._non_persistent_buffers_set
    }
    return {name for name, buffer in model.named_buffers() if id(buffer) in hidden}


def constants_of(model: nn.Module) -> set[str]:
    """The first names of what training leaves as it is: frozen parameters, and buffers but for running statistics.

    Args:
        model: any module.
    """
    running = {
        id(buffer) for module in model.modules() if isinstance(module, _NormBase) for buffer in module._buffers.values()
    }
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    buffers = model.named_buffers()
    return frozen | {name for name, b in buffers if id(b) not in running and "parametrizations" not in name}


def without_inserted(name: str) -> str:
    """A tensor's name without the modules that `torch.compile`, FSDP, activation checkpointing and PEFT put around one.

    Args:
        name: such as `blocks.0._orig_mod.weight`.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def strip_wrappers(name: str) -> str:
    """A tensor's name without the parts that wrappers of modules insert, wherever they stand.

    The names of PEFT's adapters are left out as well, since its files leave them out: "default" anywhere but in front,
    and whatever stands behind `lora_A` and its like.

    Args:
        name: such as `blocks.0._orig_mod.weight`.
    """
    parts = without_inserted(name).split(".")
    kept = [part for i, part in enumerate(parts) if not (i and (part == _ADAPTER or _is_adapter(parts, i)))]
    if (last := _RENAMED_BY_PEFT.get(kept[-1] if kept else "")) is not None:
        kept[-1:] = last.split(".")
    return ".".join(kept)


def _is_adapter(parts: Sequence[str], i: int) -> bool:
    """Whether a part of a name is an adapter's: `mine` of `q.lora_A.mine.weight`."""
    return parts[i - 1].startswith("lora_") and parts[i] not in ("weight", "bias")


def _bare(saved: Iterable[str]) -> dict[str, str]:
    return {name: strip_wrappers(name) for name in saved}


def _bare_aliases(aliases: Mapping[str, str]) -> dict[str, str]:
    """Aliases without wrappers; a name that would stand for two tensors then stands for none."""
    owners: dict[str, set[str]] = {}
    for alias, own in aliases.items():
        owners.setdefault(strip_wrappers(alias), set()).add(own)
    return {alias: own.pop() for alias, own in owners.items() if len(own) == 1}


def _by_prefix(names: Iterable[str], known: Mapping[str, str]) -> dict[str, set[str]]:
    """The own names that are found under each prefix that ends at a dot."""
    under: dict[str, set[str]] = {"": set()}
    for name in names:
        for start in [0] + [i + 1 for i, character in enumerate(name) if character == "."]:
            if own := known.get(name[start:]):
                under.setdefault(name[:start], set()).add(own)
    return under


def _matched(bare: Mapping[str, str], known: Mapping[str, str], prefix: str, step: int) -> NameMatch:
    names: dict[str, str] = {}
    left_out: list[str] = []
    seen: dict[str, str] = {}
    for saved, name in bare.items():
        own = known.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if own is None:
            left_out.append(saved)
            continue
        if name in seen:
            raise PhasewatchError(
                f"The snapshot of step {step} holds {name} twice, as {seen[name]} and as {saved}. "
                "Save the bare model's state_dict()."
            )
        seen[name] = saved
        names.setdefault(own, saved)
    return NameMatch(names, tuple(left_out))


def _some(names: Collection[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(list(names)[:3]) + rest if names else "nothing"
