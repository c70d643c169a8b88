"""A model's loss on kept minibatches, as chains sample it: in place, or at many sets of weights at once."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from phasewatch.monitor.errors import warn
from phasewatch.monitor.model.attention_masks import AS_GIVEN, MaskForm, forms_for
from phasewatch.monitor.model.captured import CapturedGradient
from phasewatch.monitor.model.gradients import Vector
from phasewatch.monitor.model.minibatches import Batches
from phasewatch.monitor.model.outputs import scalar_of
from phasewatch.monitor.model.pieces import in_pieces, is_a_mean, samples_in
from phasewatch.monitor.model.rounded import rounded_parameters
from phasewatch.monitor.model.vectorised import VectorisedLoss
from phasewatch.monitor.model.weights import SampledModel, Weights

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""`loss(model, batch)`, the mean over the batch as a scalar tensor."""

LARGEST_VECTORISED_ROW = 8 * 2**20
"""On a CPU, chains that take more than this many bytes each run one after another: they then stay in its caches."""

SHARE_OF_A_GPU = 0.5
"""On a GPU, chains are only tried together where two of them take less than this share of its free memory."""

WORTH_CAPTURING = 10**7
"""Parameters from which two rows fill a GPU, so that one after another as a CUDA graph may be as fast as together."""

WORTH_ITS_MEMORY = 0.8
"""On a GPU, rows are taken together where that takes less than this share of their time one after another."""

TRANSIENT = 1.2
"""Memory of a pass over that of the activations that it keeps: language models' logits and their gradient."""

TIMED = 3
"""Passes of each path that are timed on a GPU, after one that isn't; the fastest counts."""

AS_NEAR = 1.5
"""A mixed-precision gradient may be this many times as far from full precision as another one is (0.8 to 1.3 seen)."""


class ModelLoss:
    """What chains sample: the loss of a model on kept minibatches, by their number.

    Args:
        model: the model.
        loss: `loss(model, batch)`, a scalar tensor.
        compiled: whether chains in place take it as torch compiles it, on a GPU.

    Attributes:
        model: as given.
        loss: as given.
        for_chains: what chains in place take: the loss, or that as torch compiled it.
        to_compile: whether it is still to be compiled for them.
        at_rows: the loss at many sets of weights at once.
        mask_forms: how attention masks may be given to it.
        vectorised: whether chains use that.
        path: in a sentence, whether chains run together and why.
        way: in a sentence, how the last chains ran.
        captured: whether chains in place use a CUDA graph; None before it was tried.
        rounded: the parameters, by number, that their plain passes may be given in bfloat16.
        rounds: in a sentence, how many those are, and what that saves; empty without any.
        activations: bytes that a pass over a minibatch keeps for its backward pass; 0 where they can't be counted.
        with_gradient: whether it is evaluated as if a gradient were asked for, since it is another one without.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> loss = ModelLoss(SampledModel(model), lambda model, batch: model(batch).square().mean())
        >>> loss.add_gradient(torch.tensor([[2.0]])), model.weight.grad
        (tensor(36.), tensor([[24.]]))
    """

    def __init__(self, model: SampledModel, loss: Loss, *, compiled: bool = False) -> None:
        self.model = model
        self.loss = self.for_chains = loss
        self.to_compile = compiled and model.device.type == "cuda"
        self.vectorised = False
        self.with_gradient = False
        self.at_rows = VectorisedLoss(model, loss)
        self.mask_forms: list[MaskForm] = []
        self.path = ""
        self.way = ""
        self.activations = 0
        self.captured: bool | None = None
        self.rounded: list[int] = []
        self.rounds = ""
        self._splits: bool | None = None
        self._warned: set[str] = set()

    @property
    def vector(self) -> Vector:
        """The sampled parameters as one vector."""
        return Vector(self.model.parameters)

    def value(self, batch: Any, *, for_chains: bool = False) -> Tensor:
        """The loss at the weights that the model has now, a scalar tensor.

        Args:
            batch: of any size.
            for_chains: whether it is a whole minibatch of chains in place, for which the loss may be compiled.
        """
        torch.clear_autocast_cache()  # it may hold half-precision copies of other weights
        loss = self.for_chains if for_chains else self.loss
        if (self.with_gradient or loss is not self.loss) and not torch.is_grad_enabled():
            with torch.enable_grad():
                return scalar_of(loss(self.model.module, batch)).detach()
        return scalar_of(loss(self.model.module, batch))

    def add_gradient(self, batch: Any, scale: float = 1.0, *, pieces: int = 1, for_chains: bool = False) -> Tensor:
        """Add `scale` times the gradient to each parameter's `grad`, by one backward pass for each piece.

        Args:
            batch: a minibatch.
            scale: of the gradient.
            pieces: in which the minibatch is taken; more than 1 only where `splits` says that it can be.
            for_chains: as of `value`.

        Returns:
            The loss, a scalar without a gradient.
        """
        total = []
        for share, piece in in_pieces(batch, pieces):
            value = self.value(piece, for_chains=for_chains)
            self.backward(value if scale * share == 1.0 else scale * share * value)
            total.append(share * value.detach())
        return total[0] if pieces == 1 else torch.stack(total).sum()

    @torch.no_grad()
    def splits(self, batches: Sequence[Any]) -> bool:
        """Whether the loss of a minibatch is the mean of those of its samples, tried once.

        Args:
            batches: some minibatches.
        """
        if self._splits is None:
            self._splits = False
            if min(map(samples_in, batches)) < 2:
                return False
            try:
                with self.model.attributes_kept():
                    pieces = [[(s, self.value(piece)) for s, piece in in_pieces(batch, 2)] for batch in batches]
                    self._splits = is_a_mean([self.value(batch) for batch in batches], pieces, self.tolerance / 10)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # a loss that needs a minibatch of one size, say
                return False
        return self._splits

    def backward(self, value: Tensor) -> None:
        """The backward pass of a value, whatever layout a sparse embedding gives its gradient."""
        value.backward()
        for parameter in self.model.parameters:
            if parameter.grad is not None and parameter.grad.layout is not torch.strided:
                parameter.grad = parameter.grad.to_dense()

    def choose_path(self, batches: Batches, chosen: tuple[bool, str] | None = None) -> None:
        """Vectorise if the vectorised loss and gradient are those of the plain model; say so once if they aren't.

        Nothing is said of rows that are too large for a CPU's caches, or for two of them to share a GPU's memory: those
        run one after another without a trial. On a GPU, the faster path is taken.

        Args:
            batches: two or more minibatches.
            chosen: `vectorised` and `path` as they were chosen elsewhere on the same kind of machine. Timed again, they
                might be others, and round otherwise.
        """
        self.path = "Chains run one after another in the model's own parameters: "
        if batches.stacked is None:
            batches = Batches([batches[0]] * len(batches))
        too_large = self._too_large(batches[0])
        if chosen is not None and not chosen[0]:
            self.path = chosen[1]
            return
        if too_large:
            self.path += too_large
            return
        own, weights = self.model.weights(), self._nearby(len(batches))
        expected = self._one_by_one(weights, batches)
        self.model.set(own)
        self.vectorised = False
        reason = "its minibatches can't be stacked"
        self.mask_forms = []
        for form in forms_for(batches) if batches.stacked is not None else []:
            try:
                adapted = batches.changed(form)
                with self.model.attributes_kept() as left:
                    found = *self.at_rows.rows_and_gradients(weights, adapted), self.at_rows.rows(weights, adapted)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                reason = first_line(error) if form is AS_GIVEN else reason
                continue
            self.at_rows.leaves_something = bool(left)
            if self._agree(expected, found, self.tolerance, weights, batches):
                self.mask_forms.append(form)
                if form is AS_GIVEN:
                    break
            elif form is AS_GIVEN:
                reason = "its vectorised loss differs from its plain one"
        if self.mask_forms and chosen is not None:
            self.vectorised, self.path = chosen
            return
        if self.mask_forms:
            self.vectorised = self._is_faster(batches.changed(self.mask_forms[0]))
            return
        self.path += f"{type(self.model.module).__name__} can't be vectorised ({reason})."
        self.warn_once(
            f"The chains run one after another, which is slower: {type(self.model.module).__name__} "
            f"can't be vectorised ({reason}).",
            "path",
        )

    def choose_rounded(self, batches: Sequence[Any]) -> None:
        """Find the parameters that chains in place may give to passes in bfloat16, which then move fewer bytes.

        Args:
            batches: some minibatches.
        """
        if self.vectorised:
            return
        with self.model.attributes_kept():
            self.rounded = rounded_parameters(self.model.parameters, self.value, self.add_gradient, batches)
        if self.rounded:
            self.rounds = (
                f"Passes are given {len(self.rounded)} of {len(self.model.parameters)} parameters in bfloat16, as they "
                "use them."
            )

    def compile(self, batches: Batches) -> None:
        """Compile the vectorised loss for this many rows, on a GPU; where that can't be done right, say so once.

        Args:
            batches: a minibatch for each row.
        """
        rows = len(batches)
        if not self.vectorised or self.model.device.type != "cuda" or self.at_rows.is_compiled(rows):
            return
        weights = self._nearby(rows)
        losses, grads = self.at_rows.rows_and_gradients(weights, batches)
        try:
            self.at_rows.compile(rows)
            found = self.at_rows.rows_and_gradients(weights, batches)
            exact = torch.get_float32_matmul_precision() == "highest"
            tolerance = self.tolerance if exact else max(self.tolerance, 0.05)
            if self._agree((losses, grads, losses), (*found, losses), tolerance, weights, batches):
                return
            reason = "its compiled loss differs from its plain one"
        except torch.OutOfMemoryError:
            self.at_rows.forget_compiled(rows)
            raise
        except Exception as error:
            reason = first_line(error)
        self.at_rows.leave_uncompiled(rows)
        self.warn_once(
            f"The chains run uncompiled, which is slower: {type(self.model.module).__name__} can't be compiled "
            f"({reason}).",
            "compiled",
        )

    def bytes_of_a_pass(self, pieces: int) -> int:
        """Memory that a pass takes beside the weights, on a GPU; 0 where that isn't known.

        Args:
            pieces: in which a minibatch is taken.
        """
        return max(int(TRANSIENT * self.activations) // pieces, self.model.nbytes) if self.activations else 0

    def bytes_of_a_row(self, batch: Any) -> int:
        """Memory that one more row takes: what the backward pass needs, and the row's weights, gradient and noise.

        Args:
            batch: a minibatch.
        """
        kept: dict[int, Tensor] = {}

        def count(tensor: Tensor) -> None:  # a tensor that were returned would keep its own graph alive
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

        try:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda _: torch.empty(0)):
                self.value(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # derivatives inside the loss, by torch.func, can't be counted so
            kept.clear()
        for tensor in [*self.model.parameters, *self.model.fixed]:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        self.activations = saved
        return 2 * saved + 6 * self.model.size * self.model.dtype.itemsize

    def _too_large(self, batch: Any) -> str:
        """Why rows are run one after another without a trial, by what one takes; empty if they needn't be."""
        row = self.bytes_of_a_row(batch)
        if self.model.device.type != "cuda":
            return f"one takes {row / 2**20:.0f} MiB, more than caches hold." if row >= LARGEST_VECTORISED_ROW else ""
        free = torch.cuda.mem_get_info(self.model.device)[0]
        if 2 * row <= SHARE_OF_A_GPU * free:
            return ""
        return f"together two take {2 * row / 2**30:.1f} GiB, and the GPU has {free / 2**30:.1f} GiB left."

    def _is_faster(self, batches: Batches) -> bool:
        """Whether rows take less time together than one after another; on a CPU, rows of this size do."""
        rows, weights = len(batches), self._nearby(len(batches))
        if self.model.device.type != "cuda":
            self.path = "Chains run together."
            return True
        together = _seconds(lambda: self.at_rows.rows_and_gradients(weights, batches))
        alone = rows * _seconds(lambda: self.add_gradient(batches[0]))
        if self.model.size >= WORTH_CAPTURING:
            with suppress(Exception):  # a pass that asks for a number on the host, say
                graph = CapturedGradient(self.model.parameters, self.add_gradient, batches[0])
                alone = min(alone, rows * _seconds(lambda: graph(batches[0])))
        self.model.module.zero_grad(set_to_none=True)
        times = f"{rows} steps take {1000 * together:.1f} ms together and {1000 * alone:.1f} ms one after another."
        faster = together < WORTH_ITS_MEMORY * alone
        self.path = f"Chains run together: {times}" if faster else self.path + times
        return faster

    @property
    def tolerance(self) -> float:
        """How far a loss by another path may be from the plain one, by the coarsest type in it."""
        types = {parameter.dtype for parameter in self.model.parameters}
        types.add(getattr(self.loss, "autocast", self.model.dtype))
        if types == {torch.float64}:
            return 1e-6
        return 1e-3 if min(dtype.itemsize for dtype in types) > 2 else 0.05

    def _one_by_one(self, weights: Weights, batches: Batches) -> tuple[Tensor, Weights, Tensor]:
        """Losses, gradients and losses without a gradient of each row, by the plain model."""
        losses, grads, again = [], [torch.empty_like(weight) for weight in weights], []
        for row in range(len(batches)):
            self.model.set([weight[row] for weight in weights])
            self.model.module.zero_grad(set_to_none=True)
            losses.append(self.add_gradient(batches[row]).to(self.model.dtype))
            for into, parameter in zip(grads, self.model.parameters, strict=True):
                into[row] = 0 if parameter.grad is None else parameter.grad
            with torch.no_grad():
                again.append(self.value(batches[row]).to(self.model.dtype))
        self.model.module.zero_grad(set_to_none=True)
        return torch.stack(losses), grads, torch.stack(again)

    def _agree(
        self,
        expected: tuple[Tensor, Weights, Tensor],
        found: tuple[Tensor, Weights, Tensor],
        tolerance: float,
        weights: Weights,
        batches: Batches,
    ) -> bool:
        """Whether losses, gradients, and losses without a gradient are the expected ones but for rounding.

        At a minimum a gradient in mixed precision is a good part rounding, another on each path. There it must be as
        near to the one in full precision as the expected gradient is.
        """
        if not (_close(expected[:1], found[:1], tolerance) and _close(expected[2:], found[2:], tolerance)):
            return False
        if _close(expected[1], found[1], tolerance):
            return True
        if not hasattr(self.loss, "in_full_precision"):
            return False
        try:
            exact = self._in_full_precision(weights, batches)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a loss that needs autocast, of samples in half precision, say
            return False
        return _distance(found[1], exact) <= AS_NEAR * _distance(expected[1], exact)

    def _in_full_precision(self, weights: Weights, batches: Batches) -> Weights:
        own, mixed = self.model.weights(), self.loss
        self.loss = mixed.in_full_precision  # pyright: ignore[reportFunctionMemberAccess]
        try:
            return self._one_by_one(weights, batches)[1]
        finally:
            self.loss = mixed
            self.model.set(own)

    def _nearby(self, rows: int) -> Weights:
        """Weights close to the model's own, and no two rows alike; each of shape (row, ...)."""
        spread = torch.linspace(-1e-3, 1e-3, rows, dtype=self.model.dtype, device=self.model.device)
        return [weight * (1 + spread.view(-1, *[1] * weight.ndim)) for weight in self.model.weights()]

    def warn_once(self, message: str, topic: str) -> None:
        """Say something the first time that it comes up."""
        if topic not in self._warned:
            self._warned.add(topic)
            warn(message)


def _seconds(action: Callable[[], object]) -> float:
    """The time of an action on the GPU, the least of some."""
    times = []
    for _ in range(1 + TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def first_line(error: Exception) -> str:
    """Of a message of torch's, which may have hundreds."""
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _close(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two lists of tensors agree, relative to each element or to the largest of all."""
    largest = max(float(a.abs().nan_to_num().max()) if a.numel() else 0.0 for a in expected)
    return all(
        torch.allclose(a, b.to(a.dtype), rtol=tolerance, atol=tolerance * (largest or 1.0), equal_nan=True)
        for a, b in zip(expected, found, strict=True)
    )


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The Euclidean distance of two lists of tensors."""
    return float(torch.stack([(one - other).norm() for one, other in zip(a, b, strict=True)]).norm())
