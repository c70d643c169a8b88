"""λ̂ of a language model whose weights are spread over processes by FSDP2, on any number of them.

Claims: λ̂ doesn't depend on how many processes there are. Compare the lines that it prints, which are those of one
snapshot:

    torchrun --nproc-per-node 1 experiments/sharded.py
    torchrun --nproc-per-node 2 experiments/sharded.py
    torchrun --nproc-per-node 2 experiments/sharded.py --width 2048 --layers 24 --context 512   # GPUs

The processes use GPUs where there is one for each, and CPU cores elsewhere. The weights are random: it is about the
cost and the rounding, and not about the model.
"""

import os
import time

import torch
import torch.distributed as dist
from command_line import command_line
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import phasewatch as pw

WORDS = 999


class Transformer(nn.Module):
    """A causal transformer whose output layer is its embedding."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        kind = {"dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(width, 4, **kind) for _ in range(layers)])
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, words: Tensor) -> Tensor:
        """Logits of the next words."""
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1], device=words.device)
        x = self.embedding(words) + self.place[: words.shape[1]]
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x)


def loss(model: nn.Module, words: Tensor) -> Tensor:
    """The mean cross-entropy of the next word."""
    return F.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def main() -> None:
    """Measure one snapshot, and print λ̂ and the time from the first process."""
    parser = command_line(__doc__, quick="fewer steps, to see that it runs")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=32)
    arguments = parser.parse_args()
    shape = arguments.width, arguments.layers, arguments.context
    rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])  # of torchrun
    kind = "cuda" if torch.cuda.device_count() >= ranks else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    mesh = init_device_mesh(kind, (ranks,))

    def make_sharded() -> nn.Module:
        model = Transformer(*shape).to(kind)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    data = torch.randint(WORDS, (600, arguments.context), generator=torch.Generator().manual_seed(1))
    draws = 4 if arguments.quick else 50
    sampler = pw.Langevin(
        step_size=1e-3, nbeta=30.0, localization=10.0, chains=2, draws=draws, burn_in=2, batch_size=12
    )
    probe = pw.Probe(make_sharded, loss, data, sampler=sampler)
    snapshot = pw.Snapshot.of(Transformer(*shape), step=0)
    began = time.perf_counter()
    point = probe(snapshot)
    if dist.get_rank() == 0:
        seconds = time.perf_counter() - began
        print(f"{ranks} processes on {kind}: llc {point.llc.value:.6g}, loss {point.loss:.6g}, {seconds:.1f} s")
        print(probe.path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
