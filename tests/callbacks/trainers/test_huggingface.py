"""A training by transformers.Trainer: bit-identical with the callback, measured as the trainer trains, and resumed."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import environment
from torch.nn import functional as F
from torch.utils.data import IterableDataset
from trainer_runs import SAMPLER, MaskingCollator, Texts, arguments, differences, left_by, make_gpt2

import phasewatch as pw

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}:phasewatch.monitor.errors.PhasewatchWarning")
    for start in ("Probe.data", "3 points in a row are", "The chains run one after")
] + [pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")]
pytestmark += [pytest.mark.usefixtures("reported")]
pytestmark += [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Trainers collect garbage as they start and end, and go through all that was imported unless it is frozen."""
    from transformers import Trainer  # noqa: F401

    from phasewatch.callbacks.trainers.huggingface import HuggingFaceCallback  # noqa: F401

    gc.freeze()
    yield
    gc.unfreeze()


def make_adapted():
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(make_gpt2(), config)


def shifted(outputs, labels, num_items_in_batch=None):
    """A loss that only works with the count of tokens that the trainer gives."""
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def make_trainer(folder, callback=None, *, model=make_gpt2, collator=MaskingCollator, kind=None, given=None, **changes):
    import transformers

    return (kind or transformers.Trainer)(
        model() if callable(model) else model,
        args=arguments(folder, **changes),
        train_dataset=Texts(),
        eval_dataset=Texts(8, seed=1),
        data_collator=collator(),
        callbacks=[callback] if callback else [],
        **(given or {}),
    )


class PlainCollator:
    """Draws nothing, so that a training that resumes sees the same as one that never stopped."""

    def __call__(self, samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def train(folder, callback=None, resume=None, **changes):
    trainer = make_trainer(folder, callback, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def watching(**options):
    return pw.HuggingFaceCallback(**{"at": pw.every(2), "sampler": SAMPLER, **options})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"max_steps": -1, "num_train_epochs": 1}, id="epochs"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
        pytest.param({"label_smoothing_factor": 0.1}, id="label smoothing"),
        pytest.param({"given": {"compute_loss_func": shifted}}, id="compute_loss_func"),
        pytest.param({"model": make_adapted}, id="peft"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, id="torch_compile"),
    ],
)
def test_training_is_bit_identical_and_a_replay_gives_the_same(changes, tmp_path, reported):
    callback = watching()
    with_it = train(tmp_path / "with", callback, **changes)
    assert differences(left_by(train(tmp_path / "without", **changes)), left_by(with_it)) == []
    assert callback.monitor.run == tmp_path / "with" / "phasewatch"
    assert callback.monitor.trajectory.steps.tolist() == list(range(2, with_it.state.max_steps + 1, 2))
    assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)
    assert reported == [callback.monitor.run]


@pytest.mark.filterwarnings("ignore:Probe.loss:phasewatch.monitor.errors.PhasewatchWarning")
def test_mixed_precision_and_the_background_leave_no_trace_either(tmp_path):
    callback = watching(measure="background")
    with_it = train(tmp_path / "with", callback, bf16=True)
    assert differences(left_by(train(tmp_path / "without", bf16=True)), left_by(with_it)) == []
    assert callback.probe.settings["dtype"] == "bfloat16"
    assert list(pw.replay(callback.monitor.run, callback.probe)) == list(callback.monitor.trajectory)


def test_the_loss_is_that_of_the_trainer(tmp_path):
    for changes in ({}, {"label_smoothing_factor": 0.1}, {"given": {"compute_loss_func": shifted}}):
        trainer = make_trainer(tmp_path, collator=PlainCollator, **changes)
        probe = watching().make_probe(trainer)
        batch = trainer.data_collator([Texts()[row] for row in range(6)])
        model = trainer.model.eval()
        with torch.no_grad():
            items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
            expected = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
            assert torch.equal(probe.subject.given_loss(model, batch), expected)
        assert probe.settings["loss"] == "Trainer.compute_loss"
        assert len(probe.subject.eval_batch["labels"]) == 8  # the evaluation data


def test_what_compute_loss_notes_stays_out_of_the_trainer(tmp_path):
    import transformers

    class Noting(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.calls, self.noted = 0, {"train": []}

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.calls += 1
            self.noted["train"].append(self.calls)
            self.log({"noted": float(self.calls)})
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    watched = train(tmp_path, watching(), kind=Noting)
    assert (watched.calls, watched.noted) == (6, {"train": [1, 2, 3, 4, 5, 6]})
    assert [row["noted"] for row in watched.state.log_history if "noted" in row] == [1, 2, 3, 4, 5, 6]


def annealed(*, by_epoch):
    """A trainer whose loss changes by numbers of its state, and whose gradient doesn't."""
    import transformers

    class Annealed(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss + self.state.global_step + (100 * self.state.epoch if by_epoch else 0)

    return Annealed


def test_the_loss_has_the_state_of_the_snapshots_step(tmp_path):
    plain, by_step, by_epoch, late = watching(), watching(), watching(), watching(at=pw.Budget(1e-6, at=pw.every(2)))
    train(tmp_path / "plain", plain)
    train(tmp_path / "step", by_step, kind=annealed(by_epoch=False))
    with_it = train(tmp_path / "epoch", by_epoch, kind=annealed(by_epoch=True))
    assert differences(left_by(train(tmp_path / "without", kind=annealed(by_epoch=True))), left_by(with_it)) == []
    before = plain.monitor.trajectory.loss
    assert by_step.monitor.trajectory.loss - before == pytest.approx([2, 4, 6], abs=1e-4)
    assert by_epoch.monitor.trajectory.loss - before == pytest.approx([2 + 25, 4 + 50, 6 + 75], abs=1e-4)
    assert list(pw.replay(by_epoch.monitor.run, by_epoch.probe)) == list(by_epoch.monitor.trajectory)
    probe = watching().make_probe(make_trainer(tmp_path / "again", kind=annealed(by_epoch=False)))
    assert list(pw.replay(by_step.monitor.run, probe)) == list(by_step.monitor.trajectory)
    with pytest.warns(pw.PhasewatchWarning, match="left out by the budget"):
        train(tmp_path / "late", late, kind=annealed(by_epoch=True))
    assert list(pw.replay(late.monitor.run, late.probe)) == list(by_epoch.monitor.trajectory)  # measured later


@pytest.mark.slow
def test_a_state_that_cannot_be_known_is_named(tmp_path):
    with pytest.warns(
        pw.PhasewatchWarning, match=r"state\.epoch, which Annealed\.compute_loss reads, is 0\.25 at step 2"
    ):
        train(tmp_path, watching(measure="background"), kind=annealed(by_epoch=True))
    probe = watching().make_probe(make_trainer(tmp_path / "again", kind=annealed(by_epoch=True)))
    with pytest.warns(pw.PhasewatchWarning, match=r"state\.epoch, which .* was 0\.25 at step 2 .* is 0\.0 here"):
        pw.replay(tmp_path / "phasewatch", probe)


def test_a_state_from_before_a_training_was_resumed_is_named(tmp_path):
    saving = {"kind": annealed(by_epoch=True), "save_strategy": "steps", "save_steps": 3, "collator": PlainCollator}
    train(tmp_path, whole := watching(), **saving)
    (tmp_path / "phasewatch" / "points.jsonl").write_bytes(b"")  # as if killed before step 2 was measured
    with pytest.warns(
        pw.PhasewatchWarning, match=r"state\.epoch, .* was 0\.25 at step 2 of the training and is 0\.375"
    ):
        train(tmp_path, resumed := watching(), str(tmp_path / "checkpoint-3"), **saving)
    assert list(resumed.monitor.trajectory)[1:] == list(whole.monitor.trajectory)[1:]


def test_a_resumed_training_goes_on_with_the_run(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "collator": PlainCollator}
    whole = watching()
    train(tmp_path / "whole", whole, **saving)
    train(tmp_path / "resumed", first := watching(), **saving, max_steps=6)
    kept = (first.monitor.run / "points.jsonl").read_bytes()
    lines = kept.splitlines(keepends=True)
    (first.monitor.run / "points.jsonl").write_bytes(b"".join(lines[:1]))  # as if killed after step 2
    for step in (4, 6):
        (first.monitor.run / "snapshots" / f"step-{step:08d}.safetensors").unlink()
    resumed = watching()
    train(tmp_path / "resumed", resumed, str(tmp_path / "resumed" / "checkpoint-3"), **saving)
    assert resumed.monitor.run == tmp_path / "resumed" / "phasewatch"
    assert list(resumed.monitor.trajectory) == list(whole.monitor.trajectory)


def test_a_replay_elsewhere_has_its_probe_from_a_trainer_made_again(tmp_path):
    callback = watching()
    train(tmp_path, callback)
    probe = watching().make_probe(make_trainer(tmp_path))
    assert list(pw.replay(tmp_path / "phasewatch", probe, run=tmp_path / "phasewatch")) == list(
        callback.monitor.trajectory
    )
    assert list(pw.replay(tmp_path / "phasewatch", probe)) == list(callback.monitor.trajectory)


def test_a_probe_metrics_and_parts_of_ones_own(tmp_path):
    def ids(model, batch):
        return float(batch["input_ids"].float().mean())

    callback = watching(metrics={"ids": ids}, parts={"block": "transformer.h.0"}, run=tmp_path / "elsewhere")
    train(tmp_path / "a", callback)
    assert callback.monitor.run == tmp_path / "elsewhere"
    assert {*callback.monitor.trajectory[0].parts} == {"block"}
    assert callback.monitor.trajectory.signal("ids")[0] > 0
    data = torch.stack([Texts()[row]["input_ids"] for row in range(32)])
    own = pw.Probe(make_gpt2, lambda model, ids: model(input_ids=ids, labels=ids).loss, data, sampler=SAMPLER)
    callback = pw.HuggingFaceCallback(at=pw.every(3), probe=own)
    train(tmp_path / "b", callback)
    assert callback.probe is own
    assert callback.monitor.trajectory.steps.tolist() == [3, 6]


@pytest.mark.slow
def test_it_calibrates_by_itself(tmp_path):
    callback = pw.HuggingFaceCallback(at=pw.every(2))
    train(tmp_path, callback)
    assert callback.monitor.trajectory.steps.tolist() == [2, 4, 6]
    header = json.loads((tmp_path / "phasewatch" / "run.json").read_text())
    assert header["calibration"]["steps"] == [2, 4, 6]
    assert header["settings"]["sampler"]["batch_size"] == 4


def test_a_callback_can_be_added_later_and_used_again(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    trainer.add_callback(callback := watching())
    trainer.train()
    assert callback.monitor.trajectory.steps.tolist() == [2, 4, 6]


def test_misuse_is_named(tmp_path):
    with pytest.raises(
        pw.PhasewatchError, match=r"HuggingFaceCallback\(at=5\) must be a schedule such as every\(100\)"
    ):
        pw.HuggingFaceCallback(at=5)
    with pytest.raises(pw.PhasewatchError, match=r"HuggingFaceCallback\(sampler='none'\) must be pw.Langevin"):
        watching(sampler="none")
    with pytest.raises(pw.PhasewatchError, match=r"HuggingFaceCallback\(measure='beside'\) must be 'inline' or"):
        watching(measure="beside")
    with pytest.raises(pw.PhasewatchError, match=r"HuggingFaceCallback\(probe=...\) must be a Probe; a int came"):
        watching(sampler=None, probe=3)
    probe = pw.Probe(torch.nn.Linear(2, 1), lambda m, b: m(b).mean(), torch.randn(64, 2))
    with pytest.raises(pw.PhasewatchError, match=r"probe=..., sampler=...\) says it twice"):
        watching(probe=probe)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Texts()[row] for row in range(32))

    trainer = make_trainer(tmp_path, watching())
    trainer.train_dataset = Stream()
    with pytest.raises(pw.PhasewatchError, match=r"is a \w+, which can only be iterated.*data=batch_of_samples"):
        trainer.train()
    trainer = make_trainer(tmp_path / "given", watching(data={"input_ids": Texts().ids, "labels": Texts().ids}))
    trainer.train_dataset = Stream()
    trainer.train()
    with pytest.raises(pw.PhasewatchError, match=r"works in a transformers.Trainer"):
        watching().on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.slow
def test_sft_with_and_without_an_adapter(tmp_path):
    import datasets
    import peft
    import transformers
    import trl
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(32)}, unk_token="t0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t0")
    samples = datasets.Dataset.from_dict({"input_ids": Texts().ids.tolist()})
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)

    def run(folder, callback, adapter):
        of = {"max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False}
        quiet = {"save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 2}
        trainer = trl.SFTTrainer(
            make_gpt2(),
            args=trl.SFTConfig(str(folder), **of, **quiet),
            train_dataset=samples,
            eval_dataset=samples.select(range(8)),
            processing_class=tokenizer,
            callbacks=[callback] if callback else [],
            peft_config=adapter,
        )
        trainer.train()
        return left_by(trainer)

    for number, config in enumerate((None, adapter)):
        for measure in ("inline", "background"):
            callback = watching(measure=measure)
            with_it = run(tmp_path / f"{number}{measure}", callback, config)
            assert differences(run(tmp_path / "without", None, config), with_it) == []
            assert callback.monitor.trajectory.steps.tolist() == [2, 4, 6]


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
from test_huggingface import *
class Killer(__import__("transformers").TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
trainer = make_trainer(sys.argv[1], watching(), save_strategy="steps", save_steps=3, collator=PlainCollator)
trainer.add_callback(Killer())
trainer.train(resume_from_checkpoint=sys.argv[3] == "True")
"""


@pytest.mark.slow
def test_after_kill_9_a_resumed_training_ends_with_the_same_points(tmp_path):
    whole = watching()
    train(tmp_path / "whole", whole, save_strategy="steps", save_steps=3, collator=PlainCollator)
    for at, resumes in ((5, False), (0, True)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(at), str(resumes)],
            env=environment(PYTHONPATH=f"{Path(__file__).parent}:{environment()['PYTHONPATH']}"),
            capture_output=True,
            text=True,
        )
        assert done.returncode == (-9 if at else 0), done.stderr
    assert list(pw.Trajectory.read(tmp_path / "killed/phasewatch/points.jsonl")) == list(whole.monitor.trajectory)
