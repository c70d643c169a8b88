"""Trainings by the trainers of other libraries, of models so small that a test can have many of them."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

import phasewatch as pw

VOCABULARY, LENGTH = 32, 8
SAMPLER = pw.SGLD(step_size=1e-5, nbeta=10.0, chains=2, draws=4, burn_in=1, batch_size=4)


def bits(value: Any) -> Any:
    """A tensor as something that == compares bit for bit."""
    if not isinstance(value, torch.Tensor):
        return value
    flat = value.detach().cpu().contiguous().flatten()
    return (value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes())


def streams() -> dict[str, Any]:
    """The global random streams."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (numpy_state[1].tolist(), *numpy_state[2:]),
        "torch": torch.get_rng_state().tolist(),
    }


def make_gpt2(**changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    of = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**{**of, "bos_token_id": 0, "eos_token_id": 0, **changes}))


class Texts(Dataset):
    """Samples of a language model; the last tokens of every second one are padding."""

    def __init__(self, count: int = 32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        labels = self.ids[row].clone()
        labels[6 + row % 2 * 2 :] = -100
        return {"input_ids": self.ids[row], "labels": labels}


class MaskingCollator:
    """Masks labels at random, by a generator of its own and by the global stream."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        hidden = torch.rand(batch["labels"].shape, generator=self.generator) < 0.1
        batch["labels"] = batch["labels"].masked_fill(hidden, -100)
        batch["input_ids"] = torch.where(torch.rand(hidden.shape) < 0.1, 1, batch["input_ids"])
        return batch


def arguments(folder: Any, **changes: Any) -> Any:
    from transformers import TrainingArguments

    of: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2, "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**{**of, **changes})


def left_by(trainer: Any) -> dict[str, Any]:
    """What a training leaves: weights, optimizer, streams, and its own logs."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state: dict[str, Any] = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    for number, held in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer {number} {name}": bits(value) for name, value in held.items()}
    times = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    state["logs"] = [{k: v for k, v in row.items() if k not in times} for row in trainer.state.log_history]
    state |= {name: module.training for name, module in model.named_modules()}
    collator = trainer.data_collator
    if isinstance(collator, MaskingCollator):
        state["collator"] = collator.generator.get_state().tolist()
    return state | streams()


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of tensors and of torch's random stream, bit for bit."""
    found = hashlib.sha256()
    for tensor in [*tensors.values(), torch.get_rng_state()]:
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])
