"""Transformers of Llama's and of Pythia's architecture on the same text, watched through HuggingFaceCallback."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from language_runs import EXPERIMENT, Calls, Size, add_beside, beside, keep_points, text_questions
from language_training import Left
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from phasewatch import Budget, HuggingFaceCallback, ItemScores, Langevin, log_spaced
from phasewatch.toy_tasks.english import EnglishData
from phasewatch.toy_tasks.language import token_losses
from phasewatch.toy_tasks.language_scores import EARLY, LATE, around

CONTEXT, BATCH, RATE = 512, 64, 1e-3

SAMPLER = Langevin(step_size=1e-3, localization=300, nbeta=30, chains=3, draws=16, burn_in=8, batch_size=16)
"""The ε, γ and nβ that are published for Pythia's 14M (arXiv 2510.12077)."""


def llama(vocabulary: int, *, small: bool) -> nn.Module:
    """Llama's architecture with 10.7 million parameters: 6 layers of width 320."""
    size: dict[str, Any] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        if small
        else {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6, "num_attention_heads": 10}
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, **size))


def pythia(vocabulary: int, *, small: bool) -> nn.Module:
    """The shape of Pythia 14M, 6 layers of width 128, with this text's vocabulary: 2.5 million parameters."""
    size: dict[str, Any] = (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        if small
        else {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    )
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocabulary, max_position_embeddings=CONTEXT, **size))


MODELS: dict[str, Callable[..., nn.Module]] = {"llama": llama, "pythia": pythia}


class Windows(Dataset):
    """Windows of the text that don't overlap, as a causal language model of Hugging Face's takes them.

    Args:
        data: the text.
        held_out: windows of the part that is held out, so many; else of the other, all.
    """

    def __init__(self, data: EnglishData, held_out: int = 0) -> None:
        self._tokens = data.held_out(held_out) if held_out else None
        self._data = data

    def __len__(self) -> int:
        return self._data.trained_on // self._data.context if self._tokens is None else len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        context = self._data.context
        row = (
            self._data.tokens[index * context : (index + 1) * context] if self._tokens is None else self._tokens[index]
        )
        return {"input_ids": row.long(), "labels": row.long()}


class Until(TrainerCallback):
    """Stops a training at a time, and has it saved to be gone on with.

    Args:
        deadline: of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock."""
        if time.monotonic() > self._deadline:
            control.should_training_stop = control.should_save = True


class Timed(HuggingFaceCallback):
    """The callback, with the seconds that each of its measurements takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take a snapshot if one is due."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.monotonic()
        before = len(self.monitor.trajectory) if self.monitor else 0
        super().on_step_end(args, state, control, **kwargs)
        if self.monitor and len(self.monitor.trajectory) > before:
            self.seconds.append(time.monotonic() - begun)


def icl_score(model: nn.Module, batch: Any) -> float:
    """The loss around the position 500 / 1,024 of the context minus that around 50 / 1,024."""
    at = token_losses(model, batch["input_ids"]).mean(0)
    return (around(at, LATE) - around(at, EARLY)).item()


def train_model(
    model_name: str, seed: int, size: Size, *, steps: int, runs: Path, results: Path, device: str, deadline: float
) -> None:
    """Train one under the callback, as a user would, from where it was left, and keep its points.

    Args:
        model_name: "llama" or "pythia".
        seed: of the model and of the order of its batches.
        size: says which text, and whether everything is small.
        steps: of training.
        runs: the folder of run folders.
        results: the folder of points.
        device: "cpu" or "cuda", the only GPU that is visible.
        deadline: of `time.monotonic`, at which training stops.
    """
    name = f"{model_name}-seed-{seed}"
    trained = runs / f"{name}-trainer"
    left_at = get_last_checkpoint(str(trained)) if trained.exists() else None
    if left_at is not None and int(left_at.rsplit("-", 1)[-1]) >= steps:
        return
    context = 64 if size.quick else CONTEXT
    data = EnglishData(size.data.file, context=context)
    torch.manual_seed(seed)
    model = MODELS[model_name](data.vocabulary, small=size.quick)
    count = sum(p.numel() for p in model.parameters())
    items = ItemScores(text_questions(data), name="text", keep=runs / name)
    calls = Calls()
    at = log_spaced(1, steps, num=4 if size.quick else 16, linear=4 if size.quick else 8)
    callback = Timed(
        at=Budget(size.share, at=at) if size.share else at,
        sinks=[calls],
        sampler=size.sampler(SAMPLER),
        metrics={"icl_score": icl_score, **items.metrics},
        run=runs / name,
        seed=0,
    )
    arguments = TrainingArguments(
        output_dir=str(trained),
        max_steps=steps,
        per_device_train_batch_size=4 if size.quick else BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(100, steps // 10),
        weight_decay=0.05,
        bf16=device != "cpu",
        use_cpu=device == "cpu",
        save_strategy="steps",
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0 if size.quick else 2,
        seed=seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Windows(data),
        eval_dataset=Windows(data, held_out=size.held_out),
        callbacks=[callback, Until(deadline)],
    )
    begun = time.monotonic()
    trainer.train(resume_from_checkpoint=left_at)
    seconds = time.monotonic() - begun - sum(callback.seconds)
    monitor = callback.monitor
    assert monitor is not None
    assert callback.probe is not None
    keep_points(monitor.trajectory, results, EXPERIMENT, name)
    settings = callback.probe.settings
    left = Left(trainer.state.global_step, seconds + (beside(results, name)["training seconds"] if left_at else 0.0))
    add_beside(
        results, name, left, monitor.trajectory, callback.seconds, calls=calls.called, by_head={}, parameters=settings
    )
    print(
        f"{name}: {count / 1e6:.1f} million parameters, {left.step} of {steps} steps in {left.seconds:.1f} s, "
        f"{sum(callback.seconds):.1f} s of measuring {len(callback.seconds)} times, {callback.probe.path}",
        flush=True,
    )
