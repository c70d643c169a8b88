"""λ̂ of three small trained models in mixed and half precision, against float32.

Each model is trained in float32, and with float16 autocast and a `GradScaler` for the row that says so. Its snapshot is
then measured by probes of the same seed that differ in precision alone: bfloat16 autocast in the loss or in the probe,
a model prepared by accelerate, float16 autocast in the loss, and a model whose weights are bfloat16. Each λ̂ has to be
within 10 % of float32, or have a verdict.

    python experiments/mixed_precision.py [--quick]
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from command_line import command_line
from torch import Tensor, nn
from torch.nn import functional as F

from phasewatch import Langevin, Point, Probe, Snapshot

SAMPLER = Langevin(kappa=0.5, localization=100.0, nbeta=100.0, chains=4, draws=150, burn_in=75, batch_size=64)
NEAR = 0.1
"""How far λ̂ may be from that of float32, relative to it, without a verdict."""


class Attending(nn.Module):
    """A causal transformer of one block, on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(8, 16), nn.Parameter(torch.randn(8, 16) / 10)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.unembed = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each place."""
        h = self.embed(tokens) + self.place[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=h.dtype)
        return self.unembed(self.norm(self.block(h, src_mask=mask))).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A model to train, with its data."""

    make: Callable[[], nn.Module]
    data: tuple[Tensor, Tensor]
    steps: int


def cases() -> dict[str, Case]:
    """The three models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 6, generator=generator)
    images = torch.randn(1024, 1, 8, 8, generator=generator)
    tokens = torch.randint(0, 8, (1024, 9), generator=generator)
    for place in range(2, 9):  # each is the sum of the two before it, but for a fifth drawn at random
        drawn = torch.rand(1024, generator=generator) < 0.2
        tokens[:, place] = torch.where(drawn, tokens[:, place], (tokens[:, place - 1] + tokens[:, place - 2]) % 8)

    def noisy(labels: Tensor, classes: int) -> Tensor:
        wrong = torch.rand(1024, generator=generator) < 0.15
        return torch.where(wrong, torch.randint(0, classes, (1024,), generator=generator), labels)

    quarters = images.unfold(2, 4, 4).unfold(3, 4, 4).square().mean((1, 4, 5)).flatten(1)
    return {
        "MLP": Case(
            lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), (x, noisy(x[:, :3].argmax(1), 3)), 600
        ),
        "conv net, BatchNorm": Case(
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
                nn.Linear(24, 4),
            ),
            (images, noisy(quarters.argmax(1), 4)),
            600,
        ),
        "transformer, LayerNorm": Case(Attending, (tokens[:, :-1], tokens[:, 1:]), 800),
    }  # fmt: skip


def plain(model: nn.Module, batch: Any) -> Tensor:
    """The loss in the precision of the weights."""
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def in_bfloat16(model: nn.Module, batch: Any) -> Tensor:
    """As a loop with bfloat16 autocast takes it."""
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, batch)


def in_float16(model: nn.Module, batch: Any) -> Tensor:
    """As a loop with float16 autocast takes it."""
    with torch.autocast("cpu", torch.float16):
        return plain(model, batch)


def from_half(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model whose weights, and so its inputs, are of half precision."""
    x = batch[0].to(next(model.parameters()).dtype) if batch[0].is_floating_point() else batch[0]
    return plain(model, (x, batch[1]))


def trained(case: Case, *, scaled: bool = False) -> nn.Module:
    """A trained model; with float16 autocast and a `GradScaler` if `scaled`."""
    torch.manual_seed(1)
    model = case.make()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, case.steps)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)  # pyright: ignore[reportPrivateImportUsage]
    for _ in range(case.steps):
        rows = torch.randint(0, 1024, (256,))
        optimizer.zero_grad()
        loss = (in_float16 if scaled else plain)(model, (case.data[0][rows], case.data[1][rows]))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return model


def prepared(case: Case) -> nn.Module:
    """A model that went through accelerate's `prepare` with bfloat16."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(case.make())


def measured(case: Case) -> Iterator[tuple[str, Point, Point]]:
    """The ways, each with its point and that of float32."""

    def point(model: Any, loss: Any, snapshot: Snapshot, **options: Any) -> Point:
        return Probe(model, loss, case.data, eval_batch=case.data, sampler=SAMPLER, threads=1, **options)(snapshot)

    snapshot = Snapshot.of(trained(case), case.steps)
    exact = point(case.make, plain, snapshot)
    yield "bfloat16 autocast in the loss", point(case.make, in_bfloat16, snapshot), exact
    yield "`Probe(autocast=torch.bfloat16)`", point(case.make, plain, snapshot, autocast=torch.bfloat16), exact
    yield "prepared by accelerate, bfloat16", point(prepared(case), plain, snapshot), exact
    half = Snapshot(
        snapshot.step, {n: t.bfloat16() if t.is_floating_point() else t for n, t in snapshot.tensors.items()}
    )
    yield "bfloat16 weights", point(lambda: case.make().bfloat16(), from_half, half), point(case.make, plain, half)
    scaled = Snapshot.of(trained(case, scaled=True), case.steps)
    yield "float16 autocast and `GradScaler`", point(case.make, in_float16, scaled), point(case.make, plain, scaled)


def holds(found: Point, exact: Point) -> bool:
    """Whether λ̂ is near that of float32, or has a verdict."""
    near = abs(found.llc.value - exact.llc.value) <= NEAR * abs(exact.llc.value)
    return near or found.llc.health.doubtful


def main() -> None:
    """Print the table."""
    arguments = command_line(__doc__, quick="the first model alone").parse_args()
    print("| model | precision | λ̂ | in float32 | verdicts | off |\n|---|---|---|---|---|---|")
    for name, case in list(cases().items())[: 1 if arguments.quick else None]:
        for way, found, exact in measured(case):
            off = found.llc.value / exact.llc.value - 1
            verdicts = f"{found.llc.health.name}, {exact.llc.health.name}"
            values = f"{found.llc.value:.2f} ± {found.llc.error:.2f} | {exact.llc.value:.2f} ± {exact.llc.error:.2f}"
            print(f"| {name} | {way} | {values} | {verdicts} | {100 * off:+.1f} % |", flush=True)
            assert holds(found, exact)


if __name__ == "__main__":
    main()
