"""What a probe measures: a copy of the model, its loss, its data and its parts, checked and ready."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves

from phasewatch.monitor.errors import PhasewatchError, in_words, warn
from phasewatch.monitor.model.autocast import under_autocast
from phasewatch.monitor.model.clock import clock_of
from phasewatch.monitor.model.complex_weights import in_real_parts, masks_in_real_parts
from phasewatch.monitor.model.copying import copy_of, is_lazy, padding_rows
from phasewatch.monitor.model.data import HeldData, Minibatches, as_minibatches, is_a_source, move
from phasewatch.monitor.model.isolation import matmul_precision, measuring
from phasewatch.monitor.model.loss import Loss, ModelLoss
from phasewatch.monitor.model.minibatches import Batches, keep_minibatches
from phasewatch.monitor.model.parts import Part, masks_of
from phasewatch.monitor.model.random_state import generators_in, parts_of, reseeded
from phasewatch.monitor.model.sharded_model import ShardedLoss, ShardedModel, class_name
from phasewatch.monitor.model.weights import Mask, SampledModel, Weights
from phasewatch.monitor.probing.preflight import Given, check, check_rows
from phasewatch.monitor.probing.sharded_preflight import check_sharded
from phasewatch.monitor.sampling.random_streams import Stream, chain_seed
from phasewatch.monitor.sampling.settings import Sampler
from phasewatch.monitor.snapshots.sharded import is_sharded
from phasewatch.monitor.snapshots.snapshot import Snapshot, unwrap

WHOLE = ""
"""The name of what `Point.llc` is of, among the parts."""

EVAL_SAMPLES = 1024
"""Samples of the evaluation batch that is drawn where none is given, or all if there are fewer: the loss of a point is
then known to about 3 % of the spread of a sample's loss."""

GLANCED = 256
"""Elements of each tensor, about, by which the processes of a sharded model see that they were given one snapshot."""

Metric: TypeAlias = Callable[[nn.Module, Any], float | Mapping[str, float]]
Parts: TypeAlias = Part | Mapping[str, Part] | None


@dataclass(frozen=True)
class Arguments:
    """What a probe was made with, checked; another process makes the same subject of it.

    Attributes:
        model: a module, or a function of no arguments that builds one.
        loss: `loss(model, batch)`.
        data: a source of minibatches.
        eval_batch: what the loss and the metrics of a point are taken on; None to draw one.
        sampler: the settings.
        parts: what is sampled.
        seed: of the minibatches and the noise.
        device: where to measure; None for the model's own.
        autocast: the type that the loss is taken in; None for the weights' own.
        threads: of torch's CPU operators while measuring.
        precision: of float32 matrix products while measuring; None where torch has no one word for it.
        dtype: torch's default type while measuring.
        compiled: whether chains in place take the loss as torch compiles it, on a GPU.
        path: whether chains run together, and why, where that was chosen by timing both; None to choose.
    """

    model: nn.Module | Callable[[], nn.Module]
    loss: Loss
    data: Minibatches
    eval_batch: Any
    sampler: Sampler
    parts: Parts
    seed: int
    device: torch.device | None
    autocast: torch.dtype | None
    threads: int
    compiled: bool = False
    precision: str | None = field(default_factory=matmul_precision)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    path: tuple[bool, str] | None = None


class Subject:
    """What is measured, ready: it belongs to the probe alone, in evaluation mode.

    Args:
        arguments: what the probe was made with.

    Attributes:
        loss: the model's loss, chosen to run vectorised or not.
        parts: the names of what is sampled, `WHOLE` first, each with its mask.
        eval_batch: what the loss and the metrics of a point are taken on.
        trains: whether each parameter is trained, by its name in snapshots.

    Raises:
        PhasewatchError: for a model, loss or data that can't be measured.
    """

    def __init__(self, arguments: Arguments) -> None:
        self._arguments = arguments
        sampler = arguments.sampler
        self._source = arguments.data
        self._batch_size = sampler.batch_size or cast(HeldData, self._source).size
        self._kept: dict[tuple[Any, ...], Batches] = {}
        self._generators: list[Any] = []
        if isinstance(self._source, HeldData):  # the first call makes the generator of many a collate function
            with self._isolated(arguments.device or torch.device("cpu")):
                self._source.rows(torch.arange(min(self._batch_size, self._source.size), device="cpu"))
        self._generators = generators_in(arguments.loss, self._source, arguments.model)
        generators = [Generator().manual_seed(chain_seed(0, number, Stream.MINIBATCHES)) for number in range(3)]
        with self._isolated(arguments.device or torch.device("cpu")):
            given, masks = self._copied()
            batches = [self._draw(generator) for generator in generators[:2]]
            if isinstance(self.loss, ShardedLoss):
                with self.loss.vector.together():
                    self._agree(batches)
                    check_sharded(self.loss, batches[0])
            else:
                self._check(batches[0], given)
            check_rows(self._source, self._batch_size, self.model.device)
            by_name = arguments.parts if are_parts(arguments.parts) else {WHOLE: arguments.parts}
            self.parts: dict[str, Mask] = {
                name: self.loss.model.mask(masks.get(name)) for name in {WHOLE: None, **by_name}
            }
            self._chosen = {name or "llc": fingerprint(mask, *mask) for name, mask in masks.items()}
            self._generators += generators_in(given.copied.module)
        with self.measuring():
            self.loss.choose_path(Batches(batches), arguments.path)
            self.loss.choose_rounded(batches)
            self.eval_batch = self._evaluation_batch(generators[2])
            self._fingerprint = fingerprint([batches, self.eval_batch])

    def _check(self, batch: Any, given: Given) -> None:
        """Refuse what can't be measured, and hold fast what no gradient reaches."""
        undifferentiated, rows = check(self.loss, batch, given)
        self.model.hold_rows(rows)
        if undifferentiated:
            self.model.hold(undifferentiated)
            fewer = ModelLoss(self.model, self.loss.loss, compiled=self._arguments.compiled)
            fewer.with_gradient, self.loss = self.loss.with_gradient, fewer

    def _agree(self, batches: Sequence[Any]) -> None:
        """Have all processes that hold a sharded model make the same probe of it."""
        arguments, model = self._arguments, cast(ShardedModel, self.model)
        self.loss.vector.agree(
            **model.description,
            seed=arguments.seed,
            sampler=arguments.sampler.as_json(),
            data=fingerprint(batches),
            buffers=fingerprint(model.own_buffers),
            parts=str(arguments.parts),
            autocast=arguments.autocast,
            batch_size=self._batch_size,
        )

    @property
    def model(self) -> SampledModel:
        """The copy of the model."""
        return self.loss.model

    def anchor(self, snapshot: Snapshot) -> Weights:
        """The sampled weights of a snapshot that is loaded: copied, or on a GPU without room for them, its own."""
        return self.model.weights() if self._has_room_for_an_anchor else self.model.weights_in(snapshot)

    @property
    def _has_room_for_an_anchor(self) -> bool:
        """Whether there's room for a copy of the weights beside a pass."""
        if self.model.device.type != "cuda" or self.loss.vectorised:
            return True
        needed = 2 * self.loss.activations + 2 * sum(parameter.nbytes for parameter in self.model.parameters)
        return needed < torch.cuda.mem_get_info()[0]

    @property
    def given_loss(self) -> Loss:
        """The loss as the user gave it."""
        return self._arguments.loss

    @property
    def samples(self) -> int | None:
        """How many samples the data has; None where a function draws them."""
        return self._source.size if isinstance(self._source, HeldData) else None

    @property
    def settings(self) -> dict[str, Any]:
        """What a point depends on besides the snapshot, the sampler and the metrics."""
        loss = self.loss.loss
        return {
            "seed": self._arguments.seed,
            "loss": getattr(loss, "__name__", type(loss).__name__),
            "model": class_name(self.model.module),
            "parameters": self.model.size,
            "parts": self._chosen,
            "data": self._fingerprint,
            "device": self.model.device.type,
            "dtype": str(self._arguments.autocast or self.model.dtype).removeprefix("torch."),
        }

    def size_of(self, part: str) -> int:
        """How many numbers of a part are sampled."""
        return self.loss.vector.count(self.parts[part])

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The same arithmetic wherever this is measured, and no trace of it outside."""
        with self._isolated(self.model.device), self.loss.vector.together():
            yield

    def kept(self, sampler: Sampler) -> Batches:
        """The minibatches that chains of a sampler see, drawn once; its batch size is this subject's."""
        key = (sampler.nbeta, sampler.chains, sampler.burn_in + sampler.draws)
        if key not in self._kept:
            self._kept = {
                key: keep_minibatches(
                    self._source,
                    self._batch_size,
                    nbeta=sampler.nbeta,
                    chains=sampler.chains,
                    steps=sampler.burn_in + sampler.draws,
                    generator=Generator().manual_seed(chain_seed(self._arguments.seed, 0, Stream.MINIBATCHES)),
                    device=self.model.device,
                )
            }
        return self._kept[key]

    def agree_on(self, snapshots: Sequence[Snapshot], sampler: Sampler) -> None:
        """Have all processes that hold a sharded model measure the same.

        Raises:
            PhasewatchError: on every process, if one of them measures something else.
        """
        if self.loss.vector.ranks > 1:
            steps = [snapshot.step for snapshot in snapshots]
            weights = [_glance(snapshot) for snapshot in snapshots]
            self.loss.vector.agree(steps=steps, sampler=sampler.as_json(), weights=weights, data=self._fingerprint)

    def alike(self, snapshots: Sequence[Snapshot]) -> bool:
        """Whether the snapshots differ in what is sampled alone, so that one model and one loss serve them all."""
        fixed = self.model.fixed
        if not self._has_one_loss(snapshots):
            return False
        if not fixed:
            return True
        self.model.load(snapshots[0])
        first = [tensor.clone() for tensor in fixed]
        for snapshot in snapshots[1:]:
            self.model.load(snapshot)
            if not self.loss.vector.all(all(map(torch.equal, first, fixed))):
                return False
        return True

    def load(self, snapshot: Snapshot) -> None:
        """Have the model's tensors of a snapshot, and what the loss's trainer was at its step."""
        self.model.load(snapshot)
        if (clock := clock_of(self.given_loss)) is not None:
            clock.at(snapshot.step)

    def _has_one_loss(self, snapshots: Sequence[Snapshot]) -> bool:
        """Whether what the loss's trainer was at the steps of snapshots makes no difference to the loss."""
        clock = clock_of(self.given_loss)
        if clock is None or not clock.seen:
            return True
        losses = set()
        for snapshot in snapshots:
            clock.at(snapshot.step)
            with torch.no_grad(), self.model.attributes_kept():
                losses.add(float(self.loss.value(self.eval_batch)))
        return len(losses) == 1

    def hold_random_state_of(self, *things: Any) -> None:
        """Have generators that objects hold start anew in each measurement, and leave them as they were."""
        self._generators += generators_in(*things)

    def _copied(self) -> tuple[Given, dict[str, dict[str, Tensor]]]:
        """Copy the model and make its loss; what was copied, and the masks of the parts."""
        arguments = self._arguments
        model, loss = arguments.model, arguments.loss
        built = not isinstance(model, nn.Module)
        own = unwrap(_built(model) if built else model)
        if built and is_sharded(own) and _holds(model, own):
            raise PhasewatchError(
                f"Probe(model={getattr(model, '__name__', model)!r}) returned a sharded model that it holds and didn't "
                "build, perhaps the one in training, whose weights the chains would move. Have the function build "
                "one of its own."
            )
        copied = copy_of(own, built=built)
        mine, lazy = copied.module, is_lazy(own)
        if lazy:
            self._materialise(mine)
        sharded = is_sharded(mine)
        low = {p.dtype for p in mine.parameters() if p.is_floating_point() and p.dtype.itemsize == 2}
        if not sharded:
            self._in_single_precision(mine, low)
        by_name = arguments.parts if are_parts(arguments.parts) else {WHOLE: cast(Part, arguments.parts)}
        masks = {name: masks_of(mine, part) for name, part in by_name.items() if part is not None}
        order = [name for name, _ in mine.named_parameters()]
        self.trains = {name: parameter.requires_grad for name, parameter in mine.named_parameters()}
        held, renamed = padding_rows(mine), in_real_parts(mine)
        held, *of_parts = (masks_in_real_parts(some, renamed) for some in (held, *masks.values()))
        masks = dict(zip(masks, of_parts, strict=True))
        if arguments.autocast is not None:
            device_type = (arguments.device or next(mine.parameters()).device).type
            loss = under_autocast(loss, device_type, arguments.autocast)
        only = set(masks[WHOLE]) if WHOLE in masks else None
        how: dict[str, Any] = {"held": held, "renamed": renamed, "order": order}
        if sharded:
            if arguments.compiled:
                raise PhasewatchError(
                    "Probe(compiled=True) is for a model on one GPU, and this one is sharded. Leave it out."
                )
            self.loss = ShardedLoss(ShardedModel(mine, arguments.device, only, **how), loss)
        else:
            self.loss = ModelLoss(SampledModel(mine, arguments.device, only, **how), loss, compiled=arguments.compiled)
        return Given(None if lazy or own is mine else own, copied, renamed, copied.rounded or bool(low)), masks

    def _materialise(self, model: nn.Module) -> None:
        """Have lazy layers take their shapes from a minibatch."""
        batch = self._source(Generator().manual_seed(chain_seed(0, 0, Stream.MINIBATCHES)), self._batch_size)
        try:
            with torch.no_grad():
                self._arguments.loss(model.eval(), batch)
        except Exception as error:
            raise PhasewatchError(
                f"Probe(model={type(model).__name__}(...)) has lazy layers, whose shapes couldn't be taken from a "
                f"minibatch ({in_words(error)}). Run the model once before the probe is made."
            ) from error

    @contextmanager
    def _isolated(self, device: torch.device) -> Iterator[None]:
        arguments = self._arguments
        with (
            measuring(arguments.seed, device, threads=arguments.threads, precision=arguments.precision),
            reseeded(self._generators, arguments.seed),
        ):
            yield

    def _draw(self, generator: Generator) -> Any:
        return move(self._source(generator, self._batch_size), self.model.device)

    def _evaluation_batch(self, generator: Generator) -> Any:
        batch = self._arguments.eval_batch
        if is_a_source(batch):
            held = cast(HeldData, as_minibatches(batch, None))
            batch = held.rows(torch.arange(min(EVAL_SAMPLES, held.size), device="cpu"))
        elif batch is None:
            size = max(EVAL_SAMPLES, self._batch_size)
            batch = self._source(generator, size if self.samples is None else min(size, self.samples))
        return move(batch, self.model.device)

    def _in_single_precision(self, model: nn.Module, low: Collection[torch.dtype]) -> None:
        """Turn a model of half precision into one of single precision, since chains move by less than it can hold."""
        if not low:
            return
        batch = self._source(Generator().manual_seed(chain_seed(0, 0, Stream.MINIBATCHES)), self._batch_size)
        parameters = [(parameter, parameter.dtype) for parameter in model.parameters()]
        buffers = [(m, n, b) for m in model.modules() for n, b in m._buffers.items() if b is not None]
        model.float().eval()
        try:
            with torch.no_grad():
                self._arguments.loss(model, move(batch, parameters[0][0].device))
        except Exception as error:
            for parameter, dtype in parameters:
                parameter.data = parameter.data.to(dtype)
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            warn(
                f"Probe(model={type(model).__name__}(...)) has {str(next(iter(low))).removeprefix('torch.')} weights "
                f"and can't run with float32 ones ({in_words(error)}), so losses are rounded to 3 digits and λ̂ is "
                "rough."
            )


def are_parts(parts: Parts) -> TypeGuard[Mapping[str, Part]]:
    """Whether it is several parts by name, and not one part's masks by parameter."""
    return isinstance(parts, Mapping) and not any(isinstance(part, Tensor) for part in parts.values())


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors anywhere in nested lists, tuples and dicts."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def fingerprint(tree: Any, *names: str) -> str:
    """A short hash of tensors and names, to tell one data set or part of a model from another."""
    digest = hashlib.sha256(repr(names).encode() if names else b"")
    for tensor in tensors_in(tree):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _glance(snapshot: Snapshot) -> str:
    """A hash of a snapshot's shapes and of a few elements of each tensor: all of them would take long."""
    tensors = {name: tensor.flatten() for name, tensor in sorted(snapshot.tensors.items())}
    shapes = [(name, tuple(snapshot.tensors[name].shape)) for name in tensors]
    return fingerprint([flat[:: max(1, len(flat) // GLANCED)] for flat in tensors.values()], repr(shapes))


def _holds(make_model: Callable[[], nn.Module], model: nn.Module) -> bool:
    """Whether a function that built a model keeps it."""
    return any(part is model for part in parts_of((make_model,)))


def _built(make_model: Callable[[], nn.Module]) -> nn.Module:
    model = make_model()
    if not isinstance(model, nn.Module):
        raise PhasewatchError(
            f"Probe(model={getattr(make_model, '__name__', make_model)!r}) was called to build the model and "
            f"returned a {type(model).__name__}; it must return a torch.nn.Module."
        )
    return model
