"""One rank of a training by `transformers.Trainer`, started by `test_trainer_ranks.py`; it prints what it left."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from trainer_runs import SAMPLER, Texts, arguments, digest, make_gpt2

import phasewatch as pw

ORDER, RANK = json.loads(sys.argv[1]), int(sys.argv[2])
FOLDER = Path(ORDER["folder"])


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(Texts()[row] for row in range(32))


def deepspeed_config(kind: str) -> dict[str, Any]:
    config: dict[str, Any] = {"zero_optimization": {"stage": int(kind[4])}, "zero_allow_untested_optimizer": True}
    return config | dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if not ORDER["kind"].startswith("zero3"):
        return dict(model.named_parameters())
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(folder: Path, callback: Any) -> dict[str, torch.Tensor]:
    kind = ORDER["kind"]
    of = {"deepspeed": deepspeed_config(kind)} if kind.startswith("zero") else {}
    args = arguments(folder, **of)  # before the model, so that `from_pretrained` loads it in shards
    model = make_gpt2()
    if kind == "zero3 loaded":
        if RANK == 0:
            model.save_pretrained(FOLDER / "saved")
        dist.barrier()
        model = transformers.GPT2LMHeadModel.from_pretrained(FOLDER / "saved")
    trainer = transformers.Trainer(
        model,
        args=args,
        train_dataset=Texts(),
        eval_dataset=Texts(8, seed=1),
        data_collator=collate,
        callbacks=[callback] if callback else [],
    )
    if ORDER.get("stream"):
        trainer.train_dataset = Stream()
    trainer.train()
    return parameters(trainer)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    left: dict[str, Any] = {}
    try:
        if not ORDER.get("stream"):
            left["without"] = digest(train(FOLDER / "without", None))
        for measure in ("inline", "background"):
            callback = pw.HuggingFaceCallback(at=pw.every(2), sampler=SAMPLER, measure=measure)
            trained = train(FOLDER / measure, callback)
            left[measure] = digest(trained)
            if RANK == 0:
                kept = load_file(FOLDER / measure / "phasewatch" / "snapshots" / "step-00000006.safetensors")
                trained.pop("lm_head.weight", None)  # the embedding
                assert trained.keys() == kept.keys(), trained.keys() ^ kept.keys()
                assert all(torch.equal(kept[name], tensor) for name, tensor in trained.items())
                assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)
    except pw.PhasewatchError as error:
        left["said"] = str(error)
    print(json.dumps(left), flush=True)
    os._exit(0)


main()
