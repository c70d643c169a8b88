"""From a snapshot to a point: the only code that measures."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from phasewatch.monitor.errors import PhasewatchError, warn, whole_number
from phasewatch.monitor.estimates.estimate import Estimate
from phasewatch.monitor.estimates.verdict import estimate_from_losses
from phasewatch.monitor.model.data import as_minibatches
from phasewatch.monitor.model.isolation import matmul_precision
from phasewatch.monitor.model.loss import Loss
from phasewatch.monitor.model.on_batches import LossOnBatches
from phasewatch.monitor.model.weights import Weights
from phasewatch.monitor.probing.subject import WHOLE, Arguments, Metric, Parts, Subject
from phasewatch.monitor.sampling.chains import VERSION, Chains, run_chains
from phasewatch.monitor.sampling.settings import Langevin, Sampler
from phasewatch.monitor.snapshots.repeats import Repeats
from phasewatch.monitor.snapshots.snapshot import Snapshot
from phasewatch.monitor.trajectories.trajectory import Point

MOST_TOGETHER = 32
"""Snapshots that are measured at once at most; a run that is killed loses no more than these."""

SHARE_OF_GPU = 0.7
"""Share of the free memory of a GPU that chains may take. The rest is for what the estimate of a chain's memory, by the
tensors that one backward pass keeps, leaves out."""


class Probe:
    """Measures snapshots: the loss on a fixed batch, the local learning coefficient, and metrics of your own.

    It works on a copy of the model, in evaluation mode, and touches neither the model in training nor any random
    stream. The minibatches and the noise depend on `seed` alone, so that neighbouring snapshots share them.

    Args:
        model: a module, or a function of no arguments that builds one. The function is what another process needs:
            measuring in the background and replaying with several workers ask for it.
        loss: `loss(model, batch)`, the mean over the batch as a scalar tensor.
        data: what minibatches are drawn from: a tensor, a tuple or dict of tensors with the sample axis first, a
            map-style Dataset or a list of samples that are tuples or dicts, a DataLoader over one, or a function
            `(generator, batch_size) -> batch`.
        eval_batch: the batch that `Point.loss` and the metrics are taken on; drawn once from `data` if not given.
        sampler: how to sample, the same for a whole trajectory: `Langevin(...)` or `SGLD(...)`.
        metrics: name to `f(model, eval_batch)`, which returns a number, or several in a dict: {"accuracy": 0.8} of the
            metric "quiz" is recorded as quiz_accuracy. One with a method `at(step)` is told the step first.
        parts: the part of the model that is sampled, all other weights held fast: a name or pattern of parameters or
            modules, several, or masks by parameter. A dict of such parts by a name of their own, as `heads(model)`
            gives, adds their refined estimates to that of the whole model, as `Point.parts` (Wang et al. 2024).
        seed: of the minibatches and the noise.
        device: where to measure, such as "cuda:1"; the model's own if not given.
        autocast: the type that the loss is taken in, such as torch.bfloat16, under `torch.autocast` as in training that
            uses it; the weights' own if not given.
        threads: of torch's CPU operators while measuring; as many as torch uses now if not given. They decide the
            order of floating-point sums, so a replay repeats a run bit for bit with the same number only.
        compiled: whether chains that run in place on a GPU take the loss as `torch.compile` makes it. Steps take less
            time, and the first snapshot a minute or more: for a series of snapshots of a large model
            (docs/large_models.md has times). Stacked chains are compiled where that pays, without being asked.

    Raises:
        PhasewatchError: for a model, loss, data, device or metric that can't be measured, when the probe is made.

    Example:
        >>> import torch, phasewatch as pw
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1, bias=False), torch.randn(64, 3)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> def loss(model, batch):
        ...     return model(batch).square().mean()
        >>> probe = pw.Probe(model, loss, x, sampler=pw.Langevin(batch_size=16, draws=20, burn_in=10))
        >>> point = probe(pw.Snapshot.of(model, step=0))
        >>> point.step, point.llc.value > 0
        (0, True)
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        loss: Loss,
        data: Any,
        *,
        eval_batch: Any = None,
        sampler: Sampler | None = None,
        metrics: Mapping[str, Metric] | None = None,
        parts: Parts = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        autocast: torch.dtype | None = None,
        threads: int | None = None,
        compiled: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module) and not callable(model):
            raise PhasewatchError(
                f"Probe(model=...) takes a module or a function that builds one; a {type(model).__name__} came."
            )
        if sampler is not None and not isinstance(sampler, Sampler):
            raise PhasewatchError(
                f"Probe(sampler=...) takes pw.Langevin(...) or pw.SGLD(...); a {type(sampler).__name__} came."
            )
        sampler = sampler or Langevin()
        threads = torch.get_num_threads() if threads is None else threads
        self.metrics = dict(metrics or {})
        if taken := [name for name in self.metrics if name in {"step", "loss"} or name.startswith("llc")]:
            raise PhasewatchError(
                f"Probe(metrics={{{taken[0]!r}: ...}}) has a name that a point's own columns have. Choose another."
            )
        self._make(
            Arguments(
                model=model,
                loss=loss,
                data=as_minibatches(data, sampler.batch_size, type(sampler).__name__),
                eval_batch=eval_batch,
                sampler=sampler,
                parts=parts,
                seed=whole_number("Probe(seed=...)", seed, least=0, most=2**63 - 1),
                device=None if device is None else _device(device),
                autocast=autocast,
                threads=whole_number("Probe(threads=...)", threads, least=1, most=2**15),
                compiled=compiled,
            )
        )

    def _make(self, arguments: Arguments) -> None:
        self._arguments = arguments
        self.subject = Subject(arguments)
        self.subject.hold_random_state_of(self.metrics)
        self._told_of_metrics: set[tuple[str, str]] = set()
        self._names_of_metric: dict[str, list[str]] = {}
        self._repeats = Repeats()

    @property
    def sampler(self) -> Sampler:
        """How it samples."""
        return self._arguments.sampler

    @property
    def seed(self) -> int:
        """Of the minibatches and the noise."""
        return self._arguments.seed

    @property
    def threads(self) -> int:
        """Of torch's CPU operators while measuring."""
        return self._arguments.threads

    @property
    def settings(self) -> dict[str, Any]:
        """What a point depends on besides the snapshot; points of different settings are never compared."""
        own = {"sampler": self.sampler.as_json(), "chains": VERSION, "metrics": sorted(self.metrics)}
        return own | self.subject.settings

    @property
    def is_sharded(self) -> bool:
        """Whether its model is spread over several processes, each of which has to measure along."""
        return self.subject.loss.vector.ranks > 1

    @property
    def path(self) -> str:
        """How its chains run, and why; once a snapshot has been measured, in which way memory let them."""
        loss = self.subject.loss
        return " ".join(filter(None, (loss.path, loss.rounds, loss.way)))

    @property
    def together(self) -> int:
        """How many snapshots `measure` best takes at once: as many as fit in memory on a GPU, and one on a CPU."""
        if self.subject.model.device.type != "cuda" or not self.subject.loss.vectorised:
            return 1
        with self.subject.measuring():
            rows = _rows(self.subject, self.sampler)
            return min(MOST_TOGETHER, max(1, rows // (self.sampler.chains * len(self.subject.parts))))

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

        Example:
            >>> import torch, phasewatch as pw
            >>> _ = torch.manual_seed(0)
            >>> model, x = torch.nn.Linear(3, 1), torch.randn(64, 3)
            >>> def loss(model, batch):
            ...     return model(batch).square().mean()
            >>> probe = pw.Probe(model, loss, x, sampler=pw.Langevin(batch_size=16, draws=20, burn_in=10))
            >>> snapshots = [pw.Snapshot.of(model, step=0), pw.Snapshot.of(torch.nn.Linear(3, 1), step=1)]
            >>> [point.step for point in probe.measure(snapshots)]
            [0, 1]
        """
        subject, model = self.subject, self.subject.model
        subject.agree_on(snapshots, self.sampler)
        if len(snapshots) > 1:
            with subject.measuring():
                alike = subject.alike(snapshots)
            if not alike:
                return [self(snapshot) for snapshot in snapshots]
        losses, metrics, anchors = [], [], []
        for snapshot in snapshots:
            self._repeats.see(snapshot)
            with subject.measuring():
                subject.load(snapshot)
                with torch.no_grad():
                    with model.attributes_kept():
                        losses.append(float(subject.loss.value(subject.eval_batch)))
                    metrics.append(self._scores(snapshot))
                anchors.append(subject.anchor(snapshot))
        of_parts = _estimates(subject, anchors, self.sampler, self.seed, subject.parts)
        return [
            Point(snapshot.step, loss, found.pop(WHOLE), scores, found)
            for snapshot, loss, scores, found in zip(snapshots, losses, metrics, of_parts, strict=True)
        ]

    def with_sampler(self, sampler: Sampler) -> "Probe":
        """A probe of the same with another sampler.

        Args:
            sampler: how to sample.

        Returns:
            A probe.

        Example:
            >>> import torch, phasewatch as pw
            >>> def loss(model, batch):
            ...     return model(batch).square().mean()
            >>> probe = pw.Probe(torch.nn.Linear(3, 1), loss, torch.randn(64, 3))
            >>> print(probe.with_sampler(pw.SGLD(step_size=1e-3, draws=200)).sampler)
            SGLD(step_size=0.001, localization=100.0, nbeta=100.0, chains=4, draws=200, burn_in=50, batch_size=64)
        """
        arguments = replace(self._arguments, sampler=sampler, path=None)
        if not isinstance(sampler, Sampler) or sampler.batch_size != self.sampler.batch_size:
            return _rebuild(arguments, self.metrics)
        other = object.__new__(Probe)
        vars(other).update(vars(self), _arguments=arguments, _repeats=Repeats())  # of the model, checked already
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the function that builds the model, never as the module."""
        if isinstance(self._arguments.model, nn.Module):
            raise PhasewatchError(
                f"Probe(model={type(self.subject.model.module).__name__}(...)) holds a module, which is never sent to "
                "another process. To measure in the background or with workers, give the function that builds it: "
                "Probe(make_model, ...)."
            )
        loss = self.subject.loss
        chosen = (loss.vectorised, loss.path) if self.subject.model.device.type == "cuda" else None
        return _received, (replace(self._arguments, path=chosen), self.metrics)

    def _scores(self, snapshot: Snapshot) -> dict[str, float]:
        """The metrics at a snapshot, whose weights the model has afterwards too."""
        if not self.metrics:
            return {}
        snapshot = self.subject.model.nearby(snapshot)
        scores: dict[str, float] = {}
        for name, metric in self.metrics.items():
            found = self._metric(name, metric, snapshot)
            if twice := sorted(found.keys() & scores.keys()):
                self._warn_once(
                    name, "twice", f"gives {twice[0]!r}, which another metric is called, and is left out there."
                )
            scores = found | scores
        self.subject.model.load(snapshot)
        return scores

    def _metric(self, name: str, metric: Metric, snapshot: Snapshot) -> dict[str, float]:
        """A metric at the snapshot itself, whatever the one before it did to the model; NaN if it fails."""
        self.subject.model.load(snapshot)
        try:
            if callable(at := getattr(metric, "at", None)):
                at(snapshot.step)
            found = metric(self.subject.model.module, self.subject.eval_batch)
            if not isinstance(found, Mapping):
                return {name: float(found)}
            scores = {f"{name}_{key}": float(value) for key, value in found.items()}
            self._names_of_metric[name] = list(scores)
            return scores
        except Exception as error:
            self._warn_once(name, "failed", f"failed and is recorded as NaN: {type(error).__name__}: {error}")
            return dict.fromkeys(self._names_of_metric.get(name, [name]), math.nan)

    def _warn_once(self, name: str, what: str, text: str) -> None:
        """Say what is wrong with a metric, the first time that it is that."""
        if (name, what) not in self._told_of_metrics:
            self._told_of_metrics.add((name, what))
            warn(f"Probe(metrics={{{name!r}: ...}}) {text}")


def measure_whole(probe: Probe, snapshot: Snapshot, sampler: Sampler) -> Point:
    """A snapshot's loss and its λ̂ by another sampler, without metrics and parts.

    Args:
        probe: what is measured.
        snapshot: of its model.
        sampler: of its sampler's batch size.

    Returns:
        The point.
    """
    subject = probe.subject
    with subject.measuring():
        subject.load(snapshot)
        with torch.no_grad():
            loss = float(subject.loss.value(subject.eval_batch))
        anchor = subject.anchor(snapshot)
    (found,) = _estimates(subject, [anchor], sampler, probe.seed, [WHOLE])
    return Point(snapshot.step, loss, found[WHOLE])


def _estimates(
    subject: Subject, anchors: Sequence[Weights], sampler: Sampler, seed: int, parts: Collection[str]
) -> list[dict[str, Estimate]]:
    """The local learning coefficients of some parts around several sets of weights, by the parts' names."""
    with subject.measuring():
        target = LossOnBatches(subject.loss, subject.kept(sampler))
        repeated = [anchor for anchor in anchors for _ in parts]
        masks, rows = [subject.parts[name] for name in parts], _rows(subject, sampler)
        chains = iter(run_chains(target, repeated, sampler, seed, masks=masks, rows=rows))
    return [{name: _estimate_of(next(chains), sampler, subject.size_of(name)) for name in parts} for _ in anchors]


def _estimate_of(chains: Chains, sampler: Sampler, size: int) -> Estimate:
    return estimate_from_losses(
        chains.losses, chains.reference, nbeta=sampler.nbeta, parameters=size, checks=chains.checks
    )


def _rows(subject: Subject, sampler: Sampler) -> int:
    """Chains that fit in memory together on a GPU; on a CPU those of all parts of one snapshot."""
    if subject.model.device.type != "cuda":
        return sampler.chains * len(subject.parts)
    free = int(SHARE_OF_GPU * torch.cuda.mem_get_info(subject.model.device)[0])
    return max(1, free // subject.loss.bytes_of_a_row(subject.kept(sampler)[0]))


def _rebuild(arguments: Arguments, metrics: Mapping[str, Metric]) -> Probe:
    """A probe of the arguments that were given, checked again."""
    given = {name: value for name, value in vars(arguments).items() if name not in {"precision", "dtype", "path"}}
    with _defaults_of(arguments):
        return Probe(**given, metrics=metrics)


def _received(arguments: Arguments, metrics: Mapping[str, Metric]) -> Probe:
    """A probe as it was made where it comes from."""
    probe = object.__new__(Probe)
    probe.metrics = dict(metrics)
    if arguments.device is not None:
        _device(arguments.device)
    with _defaults_of(arguments):
        probe._make(arguments)
    return probe


@contextmanager
def _defaults_of(arguments: Arguments) -> Iterator[None]:
    """Torch's defaults as they were where a probe was made, whatever they are here."""
    here = matmul_precision(), torch.get_default_dtype()
    torch.set_default_dtype(arguments.dtype)
    if arguments.precision:
        torch.set_float32_matmul_precision(arguments.precision)
    try:
        yield
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
