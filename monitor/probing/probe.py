"""From a snapshot to a point: the only code that measures."""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeGuard, cast

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from phasewatch.monitor.errors import PhasewatchError, in_words, warn, whole_number
from phasewatch.monitor.estimates.verdict import estimate_from_losses
from phasewatch.monitor.model.data import HeldData, as_minibatches, move
from phasewatch.monitor.model.isolation import matmul_precision, measuring
from phasewatch.monitor.model.minibatches import Batches, keep_minibatches
from phasewatch.monitor.model.parts import Part, masks_of
from phasewatch.monitor.model.weights import FlatModel, Loss, LossOnBatches, own_copy, under_autocast
from phasewatch.monitor.probing.second_opinion import run_devinterp_chains
from phasewatch.monitor.sampling.chains import Chains, Stream, chain_seed, orders, run_chains
from phasewatch.monitor.sampling.settings import SGLD
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point

Metric = Callable[[nn.Module, Any], float]

WHOLE = ""
"""The name of what `Point.llc` is of, among the parts."""

MOST_TOGETHER = 32
"""Snapshots that are measured at once at most; what is measured is kept when all of them are."""

SHARE_OF_GPU = 0.7
"""Of the free memory of a GPU, what chains may take if nobody says otherwise."""


class Probe:
    """Measures snapshots: the loss on a fixed batch, the local learning coefficient, and metrics of your own.

    It works on a copy of the model, in evaluation mode, and touches neither the model in training nor any random
    stream. The minibatches and the noise depend on `seed` alone, so that neighbouring snapshots share them.

    Args:
        model: a module, or a function of no arguments that builds one. The function is what another process needs:
            measuring in the background and replaying with several workers ask for it.
        loss: `loss(model, batch)`, the mean over the batch as a scalar tensor.
        data: what minibatches are drawn from: a tensor, a tuple or dict of tensors with the sample axis first, a
            map-style Dataset, a DataLoader over one, or a function `(generator, batch_size) -> batch`.
        eval_batch: the batch that `Point.loss` and the metrics are taken on; drawn once from `data` if not given.
        sampler: how to sample, the same for a whole trajectory.
        metrics: name to `f(model, eval_batch) -> float`.
        seed: of the minibatches and the noise.
        weights: the part of the model that is sampled, all other weights held fast: a name or pattern of parameters or
            modules, several, or masks by parameter. A dict of such parts by a name of their own, as `heads(model)`
            gives, adds their refined estimates to that of the whole model, as `Point.refined`.
        device: where to measure, such as "cuda:1"; the model's own if not given.
        threads: of torch's CPU operators while measuring; as many as torch uses now if not given. They decide the
            order of floating-point sums, so a replay repeats a run bit for bit with the same number only.
        memory: bytes that chains may take at a time, beside the model and the data; as many chains run together as fit.
            All of a snapshot's if not given, and fewer where memory runs out.
        autocast: the type that the loss is taken in, such as torch.bfloat16, under `torch.autocast` as in training that
            uses it; the weights' own if not given.

    Raises:
        PhasewatchError: for a model, loss, data, device or metric that can't be measured, when the probe is made.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        loss: Loss,
        data: Any,
        *,
        eval_batch: Any = None,
        sampler: SGLD | None = None,
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
        weights: Part | Mapping[str, Part] | None = None,
        device: str | torch.device | None = None,
        threads: int | None = None,
        memory: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        sampler = sampler or SGLD()
        threads = torch.get_num_threads() if threads is None else threads
        threads = whole_number("Probe(threads=...)", threads, least=1, most=2**15)
        seed = whole_number("Probe(seed=...)", seed, least=0, most=2**63 - 1)
        self._arguments: dict[str, Any] = {
            "model": model,
            "loss": loss,
            "data": data,
            "eval_batch": eval_batch,
            "sampler": sampler,
            "metrics": metrics,
            "seed": seed,
            "weights": weights,
            "device": device,
            "threads": threads,
            "memory": memory,
            "autocast": autocast,
        }
        self.sampler = sampler
        self.seed = seed
        self.threads = threads
        self.memory = None if memory is None else whole_number("Probe(memory=...)", memory, least=1)
        self.metrics = dict(metrics or {})
        if taken := [name for name in self.metrics if name in {"step", "loss"} or name.startswith("llc")]:
            raise PhasewatchError(
                f"Probe(metrics={{{taken[0]!r}: ...}}) has a name that a point's own columns have. Choose another."
            )
        self._precision, self._dtype = matmul_precision(), torch.get_default_dtype()
        self._complained: set[str] = set()
        if not isinstance(model, nn.Module) and not callable(model):
            raise PhasewatchError(
                f"Probe(model=...) takes a module or a function that builds one; a {type(model).__name__} came."
            )
        wanted_device = None if device is None else _device(device)
        self._minibatches = self._arguments["data"] = as_minibatches(data, sampler.batch_size)
        self._batch_size = sampler.batch_size or cast(HeldData, self._minibatches).size
        with measuring(seed, wanted_device or torch.device("cpu"), threads=threads, precision=self._precision):
            mine = own_copy(model if isinstance(model, nn.Module) else _built(model))
            mine = self._in_single_precision(mine, loss)
            parts: dict[str, Part | None] = (
                {WHOLE: None, **weights} if _are_parts(weights) else {WHOLE: cast(Part, weights)}
            )
            masks = {name: masks_of(mine, part) for name, part in parts.items() if part is not None}
            only = None if WHOLE not in masks else set(masks[WHOLE])
            if autocast is not None:
                device_type = (wanted_device or next(mine.parameters()).device).type
                loss = under_autocast(loss, device_type, autocast)
            self.model = FlatModel(mine, loss, wanted_device, only=only)
            self._masks = self.model.flat_masks([masks.get(name) for name in parts])
            self._parts = list(parts)
            self._chosen = {name or "llc": _fingerprint(mask, *mask) for name, mask in masks.items()}
        generators = [Generator().manual_seed(chain_seed(0, number, Stream.MINIBATCHES)) for number in range(3)]
        with self._measuring():
            batches = [self._draw(generator) for generator in generators[:2]]
            self._check_loss(batches[0])
            self.model.choose_path(Batches(batches))
            if eval_batch is None:
                size = max(1024, self._batch_size)
                if isinstance(self._minibatches, HeldData):
                    size = min(size, self._minibatches.size)
                eval_batch = self._minibatches(generators[2], size)
            self.eval_batch = move(eval_batch, self.model.device)
            self._fingerprint = _fingerprint([batches, self.eval_batch])

    def __call__(self, snapshot: Snapshot) -> Point:
        """Measure a snapshot.

        Args:
            snapshot: of the probe's model.

        Returns:
            The point. A failed estimate is a point too, with a verdict in `point.llc.health`.

        Raises:
            PhasewatchError: if the snapshot isn't one of this model.
        """
        return self.measure([snapshot])[0]

    def measure(self, snapshots: Sequence[Snapshot]) -> list[Point]:
        """Measure several snapshots at once, with all of their chains as one vectorised axis.

        Args:
            snapshots: of the probe's model.

        Returns:
            A point for each.

        Raises:
            PhasewatchError: if one of the snapshots isn't of this model, or there is no memory for one chain.
        """
        if len(snapshots) > 1 and not self._alike(snapshots):
            return [self(snapshot) for snapshot in snapshots]
        losses, metrics, anchors = [], [], []
        for snapshot in snapshots:
            with self._measuring():
                self.model.load(snapshot)
                with torch.no_grad():
                    losses.append(float(self.model.loss(self.model.model, self.eval_batch)))
                    metrics.append(
                        {name: self._metric(name, metric, snapshot) for name, metric in self.metrics.items()}
                    )
                self.model.load(snapshot)
                anchors += [self.model.weights()] * len(self._parts)
        with self._measuring():
            chains = self._sampled(anchors)
        estimates = iter(
            [
                estimate_from_losses(
                    of_one.losses,
                    of_one.reference,
                    nbeta=self.sampler.nbeta,
                    acceptance=of_one.acceptance,
                    parameters=size,
                    checks=of_one.checks,
                )
                for of_one, size in zip(chains, self._masks.sizes * len(snapshots), strict=True)
            ]
        )
        points = []
        for snapshot, loss, scores in zip(snapshots, losses, metrics, strict=True):
            found = {name: next(estimates) for name in self._parts}
            points.append(Point(snapshot.step, loss, found.pop(WHOLE), scores, found))
        return points

    def with_sampler(self, sampler: SGLD) -> "Probe":
        """This probe with another sampler: what `Probe` with the same arguments and that sampler would be.

        Args:
            sampler: how to sample.

        Returns:
            A probe. It shares this one's copy of the model, unless the two differ in their batch size.
        """
        arguments = self._arguments | {"sampler": sampler}
        if sampler.batch_size != self.sampler.batch_size:
            return _rebuild(arguments, self._precision, self._dtype)
        other = self._twin()
        other.sampler, other._arguments = sampler, arguments
        return other

    def without_extras(self) -> "Probe":
        """This probe without metrics and without the refined estimates of parts: loss and λ̂ alone."""
        other = self._twin()
        other.metrics, other._arguments = {}, self._arguments | {"metrics": None}
        if _are_parts(self._arguments["weights"]):
            other._arguments["weights"], other._parts, other._chosen = None, [WHOLE], {}
            other._masks = other.model.flat_masks([None])
        return other

    def _twin(self) -> "Probe":
        """A probe of the same parts, but for the kept minibatches, which depend on the sampler."""
        other = object.__new__(Probe)
        vars(other).update({name: value for name, value in vars(self).items() if name not in {"_batches", "_rows"}})
        return other

    @property
    def samples(self) -> int | None:
        """How many samples the data has; None where a function draws them."""
        return self._minibatches.size if isinstance(self._minibatches, HeldData) else None

    @property
    def minibatches(self) -> int:
        """How many minibatches are kept for the chains; drawn at the first call."""
        with self._measuring():
            return len(self._batches)

    @property
    def settings(self) -> dict[str, Any]:
        """What a point depends on besides the snapshot; points of different settings are never compared."""
        return {
            "sampler": self.sampler.as_json(),
            "seed": self.seed,
            "metrics": sorted(self.metrics),
            "loss": getattr(self.model.loss, "__name__", type(self.model.loss).__name__),
            "model": type(self.model.model).__name__,
            "parameters": self.model.size,
            "weights": self._chosen,
            "data": self._fingerprint,
            "device": self.model.device.type,
            "dtype": str(self._arguments["autocast"] or self.model.dtype).removeprefix("torch."),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the function that builds the model, never as the module."""
        if isinstance(self._arguments["model"], nn.Module):
            raise PhasewatchError(
                f"Probe(model={type(self.model.model).__name__}(...)) holds a module, which is never sent to another "
                "process. To measure in the background or with workers, give the function that builds it: "
                "Probe(make_model, ...)."
            )
        return _rebuild, (self._arguments, self._precision, self._dtype)

    def _sampled(self, anchors: list[Tensor]) -> list[Chains]:
        target = LossOnBatches(self.model, self._batches)
        if self.sampler.backend == "vectorised":
            return run_chains(target, anchors, self.sampler, self.seed, masks=self._masks, rows=self._rows)
        order = orders(self.sampler, self.seed, target).T.numpy()
        parts = len(self._parts)
        return [
            run_devinterp_chains(
                self.model, anchor, self._batches, order, self.sampler, self.seed, self._masks[i % parts]
            )
            for i, anchor in enumerate(anchors)
        ]

    @property
    def together(self) -> int:
        """How many snapshots `measure` best takes at once: as many as fit in memory on a GPU, and one on a CPU."""
        if self.model.device.type != "cuda" or not self.model.vectorised:
            return 1
        with self._measuring():
            return min(MOST_TOGETHER, max(1, self._rows // (self.sampler.chains * len(self._parts))))

    @cached_property
    def _batches(self) -> Batches:
        sampler = self.sampler
        return keep_minibatches(
            self._minibatches,
            self._batch_size,
            nbeta=sampler.nbeta,
            chains=sampler.chains,
            steps=sampler.burn_in + sampler.draws,
            generator=Generator().manual_seed(chain_seed(self.seed, 0, Stream.MINIBATCHES)),
            device=self.model.device,
        )

    @cached_property
    def _rows(self) -> int:
        """Chains that fit in memory together."""
        free = self.memory
        if free is None and self.model.device.type == "cuda":
            free = int(SHARE_OF_GPU * torch.cuda.mem_get_info(self.model.device)[0])
        # One after another, more chains than those of one estimate only take more memory.
        most = self.sampler.chains * (len(self._parts) if self.model.vectorised else 1)
        if free is None:
            return most
        fitting = max(1, free // self.model.bytes_of_a_row(self._batches[0]))
        return fitting if self.model.vectorised else min(fitting, most)

    def _alike(self, snapshots: Sequence[Snapshot]) -> bool:
        """Whether the snapshots differ in what is sampled alone, so that one model serves them all."""
        self.model.load(snapshots[0])
        first = [tensor.clone() for tensor in self.model.held]
        for snapshot in snapshots[1:] if first else ():
            self.model.load(snapshot)
            if not all(map(torch.equal, first, self.model.held)):
                return False
        return True

    def _measuring(self) -> Any:
        return measuring(self.seed, self.model.device, threads=self.threads, precision=self._precision)

    def _draw(self, generator: Generator) -> Any:
        return move(self._minibatches(generator, self._batch_size), self.model.device)

    def _check_loss(self, batch: Any) -> None:
        name = getattr(self.model.loss, "__name__", "loss")
        value = self.model.loss(self.model.model, batch)
        if not isinstance(value, Tensor) or value.ndim != 0:
            came = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise PhasewatchError(
                f"Probe(loss={name}): {name}(model, batch) returned {came}; "
                "it must return a scalar tensor, the mean over the batch"
                f"{', so perhaps .mean() is missing' if isinstance(value, Tensor) else ''}."
            )
        if not value.isfinite():
            raise PhasewatchError(
                f"Probe(loss={name}): {name}(model, batch) returned {value.item()} on a minibatch of data. "
                "Check the data and the model's weights for values that are not finite."
            )
        if not value.requires_grad:
            raise PhasewatchError(
                f"Probe(loss={name}): {name}(model, batch) returned a tensor that needs no gradient. "
                "Sampling follows the gradient, so return it without .detach(), .item() or torch.no_grad()."
            )
        if not self.model.reaches(value):
            raise PhasewatchError(
                f"Probe(loss={name}): the gradient of {name}(model, batch) reaches no parameter of the model it was "
                "given. Call the model that comes as its argument, not another one, such as the one in training."
            )

        again = self.model.loss(self.model.model, batch)
        if not torch.allclose(again, value, rtol=1e-3, equal_nan=True):
            warn(
                f"Probe(loss={name}): {name}(model, batch) returned {value.item():g} and then {again.item():g} "
                "for the same weights and minibatch. What is drawn inside it adds noise to λ̂; draw it in data instead."
            )
        elif _is_a_sum(self.model, batch, value):
            warn(
                f"Probe(loss={name}): {name}(model, batch) doubles when the minibatch comes twice, so it is a sum and "
                "not the mean over the minibatch. λ̂ is then that of nbeta * batch_size; divide by the batch size."
            )

    def _in_single_precision(self, model: nn.Module, loss: Loss) -> nn.Module:
        """A model of half precision as one of single precision, since chains move by less than it can hold."""
        low = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize == 2}
        if not low:
            return model
        batch = self._minibatches(Generator().manual_seed(chain_seed(0, 0, Stream.MINIBATCHES)), self._batch_size)
        single = copy.deepcopy(model).float().eval()
        try:
            with torch.no_grad():
                loss(single, move(batch, next(single.parameters()).device))
        except Exception as error:
            warn(
                f"Probe(model={type(model).__name__}(...)) has {str(low.pop()).removeprefix('torch.')} weights and "
                f"can't run with float32 ones ({in_words(error)}), so losses are rounded to 3 digits and λ̂ is rough."
            )
            return model
        return single

    def _metric(self, name: str, metric: Metric, snapshot: Snapshot) -> float:
        """A metric at the snapshot itself, whatever the one before it did to the model; NaN if it fails."""
        self.model.load(snapshot)
        try:
            return float(metric(self.model.model, self.eval_batch))
        except Exception as error:
            if name not in self._complained:
                self._complained.add(name)
                warn(f"Probe(metrics={{{name!r}: ...}}) failed and is recorded as NaN: {type(error).__name__}: {error}")
            return math.nan


def _is_a_sum(model: FlatModel, batch: Any, value: Tensor) -> bool:
    """Whether a loss doubles with a minibatch that holds every sample twice; False where that can't be tried."""
    try:
        doubled = tree_map(lambda leaf: torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) else leaf, batch)
        with torch.no_grad():
            twice = model.loss(model.model, doubled)
        return bool(abs(twice - 2 * value) < 1e-3 * abs(value))
    except Exception:
        return False


def _rebuild(arguments: dict[str, Any], precision: str | None, dtype: torch.dtype) -> Probe:
    """A probe as it was made where it comes from, whatever torch's own defaults are here."""
    here = matmul_precision(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    if precision:
        torch.set_float32_matmul_precision(precision)
    try:
        return Probe(**arguments)
    finally:
        torch.set_default_dtype(here[1])
        if here[0]:
            torch.set_float32_matmul_precision(here[0])


def _device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        here = "'cpu' or 'cuda'" if torch.cuda.is_available() else "'cpu'"
        raise PhasewatchError(
            f"Probe(device={str(device)!r}) is not a device that torch can use here ({reason}). "
            f"Use {here}, or leave it out to measure where the model is."
        ) from error
    if wanted.type == "meta":
        raise PhasewatchError("Probe(device='meta') would hold shapes and no weights; use 'cpu' or 'cuda'.")
    return wanted


def _are_parts(weights: Part | Mapping[str, Part] | None) -> TypeGuard[Mapping[str, Part]]:
    """Whether it is several parts by name, and not one part's masks by parameter."""
    return isinstance(weights, Mapping) and not any(isinstance(part, Tensor) for part in weights.values())


def _built(make_model: Callable[[], nn.Module]) -> nn.Module:
    model = make_model()
    if not isinstance(model, nn.Module):
        raise PhasewatchError(
            f"Probe(model={getattr(make_model, '__name__', make_model)!r}) was called to build the model and "
            f"returned a {type(model).__name__}; it must return a torch.nn.Module."
        )
    return model


def _fingerprint(batches: Any, *names: str) -> str:
    """A short hash of tensors and names, to tell one data set or part of a model from another."""
    digest = hashlib.sha256(repr(names).encode() if names else b"")
    for leaf in tree_leaves(batches):
        if isinstance(leaf, Tensor):
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
