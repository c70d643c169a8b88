"""The training of `toy_tasks.language` models: fast on a GPU, and left at any step to be gone on with."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from phasewatch.toy_tasks import language
from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.language import LanguageModel, Shape

BLOCK = 1_000
"""Steps whose batches are drawn at once, by a seed of their own, so that a run that goes on draws the same."""

AGREE = 0.05
"""What is faster is used if its gradient differs from the plain one by less than this share of its length."""


@dataclass(frozen=True)
class Left:
    """Where a training stands.

    Attributes:
        step: steps taken.
        seconds: that they took, without what was done at the steps that were due.
    """

    step: int
    seconds: float


def train(
    model: LanguageModel,
    data: EnglishData,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    state: Path,
    after_each: Callable[[int], None],
    at: Callable[[int], bool],
    on_due: Callable[[int], None],
    deadline: float,
) -> Left:
    """Train a model in place, from where `state` says that it was left.

    Args:
        model: on its device.
        data: the text.
        seed: of the batches.
        steps: where training ends.
        batch_size: sequences in a batch.
        state: the beginning of the names of the two files that it is left in, and found in.
        after_each: is called after each step, inside of the time that counts.
        at: the steps that are due.
        on_due: is called at these, outside of the time that counts; before training at step 0.
        deadline: of `time.monotonic`, at which it is left.

    Returns:
        Where it stands.
    """
    device = next(model.parameters()).device
    optimizer = language.published_optimizer(model)
    left = load_state(state, model, optimizer)
    add_gradient = gradient_of(model, batch_size)
    if left.step == 0 and at(0):
        on_due(0)
    synchronize(device)
    step, seconds, begun = left.step, left.seconds, time.monotonic()
    starts = torch.empty(0)
    while step < steps:
        if step % BLOCK == 0 or not len(starts):
            starts = starts_of(data, seed, step // BLOCK, batch_size, device)
        add_gradient(data.windows(starts[step % BLOCK]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        after_each(step)
        if at(step):
            synchronize(device)
            seconds += time.monotonic() - begun
            on_due(step)
            synchronize(device)
            begun = time.monotonic()
        if step % 50 == 0:
            synchronize(device)
            if time.monotonic() > deadline:
                break
    synchronize(device)
    left = Left(step, seconds + time.monotonic() - begun)
    save_state(state, model, optimizer, left)
    return left


def starts_of(data: EnglishData, seed: int, block: int, batch_size: int, device: torch.device) -> Tensor:
    """Where the windows of a block's batches begin, shape (BLOCK, batch)."""
    generator = Generator().manual_seed(seed * 1_000_003 + block)
    last = data.trained_on - data.context
    return torch.randint(last + 1, (BLOCK, batch_size), generator=generator).to(device)


@cache
def gradient_of(model: LanguageModel, batch_size: int) -> Callable[[Tensor], None]:
    """What adds the loss's gradient on a batch to each parameter's `grad`; compiled on a GPU, and compared there."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return partial(_add_gradient, language.loss, nullcontext, nullcontext, model)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    generator = Generator(device).manual_seed(0)
    tokens = torch.randint(
        model.shape.vocabulary, (batch_size, model.shape.context), generator=generator, device=device
    )

    def gradient(add: Callable[[Tensor], None]) -> Tensor:
        add(tokens)
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return found

    flash = SDPBackend.FLASH_ATTENTION
    plain = partial(_add_gradient, language.loss, autocast, partial(sdpa_kernel, [flash]), model)
    expected = gradient(plain)
    for backend in dict.fromkeys([fastest_attention(model.shape, batch_size, device), flash]):
        torch._dynamo.reset()
        compiled = torch.compile(language.loss, dynamic=False)
        add = partial(_add_gradient, compiled, autocast, partial(sdpa_kernel, [backend]), model)
        apart = float((gradient(add) - expected).norm() / expected.norm())
        print(f"compiled with {backend.name}: gradient {apart:.1e} of its length from the plain one", flush=True)
        if apart < AGREE:
            return add
    return plain


def _add_gradient(
    loss: Callable[[nn.Module, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[Any]],
    attention: Callable[[], AbstractContextManager[Any]],
    model: nn.Module,
    tokens: Tensor,
) -> None:
    with attention():
        with autocast():
            value = loss(model, tokens)
        value.backward()


def fastest_attention(shape: Shape, batch_size: int, device: torch.device) -> SDPBackend:
    """Flash attention or cuDNN's, whichever is faster there, and right."""
    size = (batch_size, shape.context, shape.heads, shape.width // shape.heads)
    generator = Generator(device).manual_seed(0)
    inputs = [torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]
    outer = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16).transpose(1, 2)

    def gradients(backend: SDPBackend) -> tuple[Tensor, ...]:
        q, k, v = (each.transpose(1, 2).detach().requires_grad_() for each in inputs)
        with sdpa_kernel([backend]):
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), outer)

    def seconds(backend: SDPBackend) -> float:
        synchronize(device)
        begun = time.monotonic()
        for _ in range(5):
            gradients(backend)
        synchronize(device)
        return (time.monotonic() - begun) / 5

    flash, other = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    expected = gradients(flash)
    try:
        found = gradients(other)
    except RuntimeError as error:
        print(f"attention: flash, since cuDNN's failed: {str(error).splitlines()[0]}")
        return flash
    apart = max(float((b - a).norm() / a.norm()) for a, b in zip(expected, found, strict=True))
    times = seconds(flash), seconds(other)
    print(f"attention, forward and backward: flash {times[0] * 1e3:.2f} ms, cuDNN {times[1] * 1e3:.2f} ms; {apart:.1e}")
    return other if times[1] < times[0] and apart < AGREE else flash


def save_state(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer, left: Left) -> None:
    """Write two files, the weights and AdamW's moments in bfloat16, each below 16 MiB at the published size."""
    state.parent.mkdir(parents=True, exist_ok=True)
    moments = [optimizer.state[p] for p in model.parameters()] if optimizer.state else []
    kept = {name: [each[name].bfloat16() for each in moments] for name in ("exp_avg", "exp_avg_sq")}
    torch.save({"left": vars(left), "weights": model.state_dict()}, f"{state}-weights.pt")
    torch.save(kept, f"{state}-moments.pt")


def load_state(state: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Left:
    """Read them, if they are there."""
    files = [Path(f"{state}-{name}.pt") for name in ("weights", "moments")]
    if not all(file.exists() for file in files):
        return Left(0, 0.0)
    device = next(model.parameters()).device
    of_model, moments = (torch.load(file, map_location=device, weights_only=True) for file in files)
    model.load_state_dict(of_model["weights"])
    left = Left(**of_model["left"])
    for parameter, first, second in zip(model.parameters(), moments["exp_avg"], moments["exp_avg_sq"], strict=True):
        step = torch.tensor(float(left.step), device=device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[parameter] = {"step": step, "exp_avg": first.float(), "exp_avg_sq": second.float()}
    return left


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
