"""The parameters of a model that are sampled, as a list of tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from phasewatch.monitor.errors import PhasewatchError, warn
from phasewatch.monitor.snapshots.names import NameMatch, aliases_of, constants_of, match_names, optional_buffers
from phasewatch.monitor.snapshots.snapshot import Snapshot, named_tensors
from phasewatch.monitor.snapshots.transfers import onto, transfer

Weights: TypeAlias = list[Tensor]
"""One tensor for each sampled parameter, in the order of `SampledModel.names`."""

Mask: TypeAlias = list[Tensor | None] | None
"""Which weights move: booleans of each parameter's shape, None for all of a parameter's or of all parameters'."""


class SampledModel:
    """A model of our own in evaluation mode, whose trainable parameters can be read, replaced and sampled.

    Args:
        module: it is kept and changed, so give a copy (see `own_copy`).
        device: where to keep it; the model's own if None.
        only: the trainable parameters that are sampled, by their first names; all if None.
        held: elements that are never sampled, since no gradient reaches them: by parameter, a mask that is False there.
        renamed: names in snapshots that stand for other ones here, as `in_real_parts` returns them.
        order: of the parameters by their names in snapshots, in which noise is drawn; that of the module if empty.

    Attributes:
        module: the model.
        names: the sampled parameters, by their first names.
        parameters: the sampled parameters themselves.
        device: where they lie.

    Raises:
        PhasewatchError: if the model has no trainable parameters, or lies on the `meta` device.

    Example:
        >>> model = SampledModel(nn.Linear(3, 2), only={"bias"})
        >>> model.names, model.size
        (['bias'], 2)
        >>> model.set([torch.tensor([1.0, 2.0])])
        >>> model.weights()
        [tensor([1., 2.])]
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | None = None,
        only: Collection[str] | None = None,
        *,
        held: Mapping[str, Tensor] | None = None,
        renamed: Mapping[str, str] | None = None,
        order: Sequence[str] = (),
    ) -> None:
        tensors = dict(named_tensors(module))
        if any(tensor.is_meta for tensor in tensors.values()):
            raise PhasewatchError(
                "Probe(model=...) lies on the meta device, which holds shapes and no weights. "
                "Build it on a real device, or call model.to_empty(device=...) and load its weights first."
            )
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad and p.numel()]
        names = [name for name, parameter in trained if parameter.is_floating_point()]
        _refuse_unsampled(module)
        if not names:
            raise PhasewatchError(
                f"Probe(model={type(module).__name__}(...)) has no parameters with requires_grad=True, so there is "
                "nothing to sample. Give the model that is trained, with the parameters that are trained unfrozen."
            )
        constants = constants_of(module)
        place = {(renamed or {}).get(name, name): number for number, name in enumerate(order)}
        names.sort(key=lambda name: place.get(name, len(place)))
        self.names = [name for name in names if only is None or name in only]
        self.device = device or tensors[self.names[0]].device
        elsewhere = any(tensor.device != self.device for tensor in tensors.values())
        self.module = (module.to(self.device) if elsewhere else module).eval()
        _separate_overlapping_buffers(self.module)
        self._tensors = dict(named_tensors(self.module))
        self.parameters = [self._tensors[name] for name in self.names]
        is_sampled = frozenset(self.names)
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in is_sampled)
        self._aliases = aliases_of(self.module) | dict(renamed or {})
        self._held = dict(held or {})
        self._optional = {name: self._tensors[name].clone() for name in optional_buffers(self.module)}
        self._constants = constants
        self._told: set[str] = set()
        self._attributes = self._as_they_are()

    @property
    def size(self) -> int:
        """How many numbers are sampled."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def nbytes(self) -> int:
        """The bytes that the sampled parameters take."""
        return sum(parameter.nbytes for parameter in self.parameters)

    @property
    def fixed(self) -> list[Tensor]:
        """The parameters and buffers that are not sampled."""
        is_sampled = frozenset(self.names)
        return [tensor for name, tensor in self._tensors.items() if name not in is_sampled]

    @property
    def dtype(self) -> torch.dtype:
        """The type that chains are kept in: float64 if a parameter has it, else float32, also for half precision."""
        return torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32

    def weights(self) -> Weights:
        """A copy of the sampled parameters, in `dtype`."""
        dtype = self.dtype
        return [parameter.detach().to(dtype, copy=True) for parameter in self.parameters]

    def weights_in(self, snapshot: Snapshot) -> Weights:
        """What `weights` gives once a snapshot is loaded, where the snapshot's tensors are, and not copied if possible.

        Args:
            snapshot: of this model or one built like it.
        """
        found, dtype = self.fitting(snapshot), self.dtype
        some = zip(self.names, self.parameters, strict=True)
        return [self._here(name, found[name].detach()).to(own.dtype).to(dtype) for name, own in some]

    def hold(self, names: Collection[str]) -> None:
        """Sample these parameters no longer."""
        for name in names:
            self._tensors[name].requires_grad_(False)
        self.names = [name for name in self.names if name not in names]
        self.parameters = [self._tensors[name] for name in self.names]

    def hold_rows(self, rows: Mapping[str, Sequence[int]]) -> None:
        """Sample these rows of parameters no longer."""
        for name, some in rows.items():
            mask = self._held.get(name, torch.ones(self._tensors[name].shape, dtype=torch.bool)).clone()
            mask[list(some)] = False
            self._held[name] = mask

    @torch.no_grad()
    def set(self, weights: Sequence[Tensor]) -> None:
        """Replace the sampled parameters' values."""
        for parameter, value in zip(self.parameters, weights, strict=True):
            transfer(parameter, value)

    def mask(self, masks: Mapping[str, Tensor] | None) -> Mask:
        """A part's masks by parameter name as a list in the order of `names`.

        Args:
            masks: booleans of the parameters' shapes; a parameter that is missing doesn't move. None for all.

        Returns:
            None if everything moves; else one mask for each parameter, None where all of it moves, and of no axes where
            none of it does, so that the masks of many parts weigh nothing.
        """
        if masks is None and not self._held:
            return None
        still, moving = torch.zeros((), dtype=torch.bool), torch.ones((), dtype=torch.bool)
        found: list[Tensor | None] = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            mask = (moving if masks is None else masks.get(name, still)).expand(parameter.shape)
            mask = mask & self._held[name] if name in self._held else mask
            found.append(None if mask.all() else (mask if mask.any() else still).to(self.device))
        return None if all(mask is None for mask in found) else found

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's weights, whichever of a tensor's names the snapshot uses, in evaluation mode.

        Non-persistent buffers that the snapshot lacks become what they were when the model was given, and so do the
        attributes of its modules, which an evaluation may have set.

        Args:
            snapshot: of this model or one built like it.

        Raises:
            PhasewatchError: if a tensor is missing or has another shape.
        """
        _put_back(self._attributes)
        for name, tensor in self.fitting(snapshot).items():
            self._take(name, tensor)
        self.module.eval()

    def _take(self, name: str, tensor: Tensor) -> None:
        transfer(self._tensors[name], tensor)

    def _here(self, name: str, tensor: Tensor) -> Tensor:
        """What this process holds of a tensor."""
        return tensor

    def nearby(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot to load many times: copied to the model's GPU, if it has one and two more such copies would fit.

        Args:
            snapshot: of this model or one built like it.
        """
        if self.device.type != "cuda":
            return snapshot
        size = sum(tensor.nbytes for tensor in snapshot.tensors.values())
        if 2 * size > torch.cuda.mem_get_info(self.device)[0]:
            return snapshot
        return Snapshot(snapshot.step, {name: onto(self.device, tensor) for name, tensor in snapshot.tensors.items()})

    def fitting(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """A snapshot's tensors by the model's own names; those on the `meta` device tell whether others would fit.

        Args:
            snapshot: of this model or one built like it.

        Raises:
            PhasewatchError: if a tensor is missing or has another shape.
        """
        match = self._match(snapshot)
        if match.left_out:
            self._tell_once(f"{match.left_out[0]} of the snapshots is not in the probe's model and is left out.")
        found = self._optional | {own: snapshot.tensors[saved] for own, saved in match.names.items()}
        for name, tensor in list(found.items()):
            own = self._tensors[name]
            if tensor.is_complex() and not own.is_complex():
                found[name] = tensor = torch.view_as_real(tensor.resolve_conj())
            if own.shape != tensor.shape:
                raise PhasewatchError(
                    f"In the snapshot of step {snapshot.step}, {name} has shape {tuple(tensor.shape)} where the "
                    f"probe's model has {tuple(own.shape)}. Build the probe with the model that was saved."
                )
        return found

    @contextmanager
    def attributes_kept(self) -> Iterator[list[str]]:
        """Put the modules' attributes back after what is done inside, which may leave its own there.

        Yields:
            The names of those that were put back, once they are.
        """
        before, names = self._as_they_are(), []
        try:
            yield names
        finally:
            names += _put_back(before)

    def _as_they_are(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The modules' variables and registered buffers, each with its content now."""
        found = [variables for module in self.module.modules() for variables in (vars(module), module._buffers)]
        return [(variables, dict(variables)) for variables in found]

    def _match(self, snapshot: Snapshot) -> NameMatch:
        """Names of the snapshot; what training leaves as it is may be missing, and is then the probe's own."""
        saved, step = snapshot.tensors.keys(), snapshot.step
        try:
            return match_names(saved, self._aliases, self._optional, step=step)
        except PhasewatchError:
            try:
                match = match_names(saved, self._aliases, self._constants | self._optional.keys(), step=step)
            except PhasewatchError:
                match = None
            if match is None:
                raise
        lacking = sorted(self._constants - self._optional.keys() - match.names.keys())
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        self._tell_once(
            f"The snapshots lack {lacking[0]}{more} of the probe's model, which training leaves as it is. The probe's "
            "own values are used."
        )
        return match

    def _tell_once(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warn(message)


def _put_back(kept: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[str]:
    """Restore mappings, and name what had changed in them."""
    names = []
    for variables, before in kept:
        changed = [name for name in variables.keys() | before.keys() if variables.get(name) is not before.get(name)]
        if changed or variables.keys() != before.keys():
            variables.clear()
            variables.update(before)
            names += changed
    return names


def _refuse_unsampled(module: nn.Module) -> None:
    """Name trained weights of a kind that can't be sampled."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (parameter.is_quantized or parameter.dtype.itemsize < 2):
            raise PhasewatchError(
                f"Probe(model=...): {name} is trained as {str(parameter.dtype).removeprefix('torch.')}, which is too "
                "coarse to be sampled. Give the model with its weights in float32 or bfloat16."
            )


def _separate_overlapping_buffers(model: nn.Module) -> None:
    """Give expanded buffers memory of their own: several elements in one place can't be written to."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and any(
                stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
            ):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def mask_of(masks: Mask, parameter: int) -> Tensor | None:
    """A parameter's mask among all; None where all of it moves."""
    return None if masks is None else masks[parameter]
