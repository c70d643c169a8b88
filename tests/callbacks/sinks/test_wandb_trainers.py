"""A real offline run of W&B that a trainer opens and a sink joins, read back from its file."""

import subprocess
import sys
import textwrap

import pytest
from processes import environment

import phasewatch as pw
from phasewatch.monitor.trajectories.logs.wandb_files import read_history

pytestmark = pytest.mark.slow

HUGGING_FACE = """
    import sys, transformers
    from trainer_runs import *
    callback = pw.HuggingFaceCallback(at=pw.every(3), sampler=SAMPLER, sinks=[pw.WandbSink()], measure=sys.argv[1])
    args = arguments("out", report_to=["wandb"], eval_strategy="steps", eval_steps=4, max_steps=12)
    trainer = transformers.Trainer(
        make_gpt2(), args=args, train_dataset=Texts(), eval_dataset=Texts(8), callbacks=[callback]
    )
    trainer.train()
    trainer.log({"after": 1.0})
"""
LIGHTNING = """
    import lightning, sys, torch
    from law_models import labelled
    from lightning.pytorch.loggers import WandbLogger
    from torch.utils.data import DataLoader, TensorDataset
    from trainer_runs import *

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(6, 3)
        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = pw.LightningCallback(at=pw.every(3), sampler=SAMPLER, sinks=[pw.WandbSink()], measure=sys.argv[1])
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", log_every_n_steps=2, logger=WandbLogger(offline=True), callbacks=[callback],
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(*labelled()), batch_size=8))
    trainer.logger.log_metrics({"after": 1.0})
"""


@pytest.mark.parametrize("measure", ["inline", "background"])
@pytest.mark.parametrize(
    ("script", "needs", "step_of", "steps"),
    [
        pytest.param(HUGGING_FACE, "transformers", "train/global_step", {2, 4, 6, 8, 10, 12}, id="transformers"),
        pytest.param(LIGHTNING, "lightning", "trainer/global_step", {1, 3, 5, 7, 9, 11}, id="lightning"),
    ],
)
def test_a_point_has_a_row_of_its_own_in_the_trainers_run(script, needs, step_of, steps, measure, tmp_path):
    pytest.importorskip(needs)
    pytest.importorskip("wandb")
    environ = environment(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_DIR=str(tmp_path))
    environ.pop("WANDB_API_KEY", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), measure],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")  # the trainer's run and no other
    (run,) = tmp_path.glob("**/phasewatch")
    points = pw.Trajectory.read(run / "points.jsonl")
    assert points.steps.tolist() == [3, 6, 9, 12]
    rows = [row for _, row in read_history(file, None)]
    ours = [row for row in rows if any(name.startswith("phase/") for name in row)]
    measured = [row for row in ours if "phase/llc" in row]
    assert [(row["phase/step"], row["phase/llc"], row["phase/loss"]) for row in measured] == [
        (point.step, point.llc.value, point.loss) for point in points
    ]
    assert [name for row in measured for name in row if not name.startswith(("phase/", "_"))] == []
    drawn = [row for row in ours if row not in measured]  # W&B itself adds the last step to tables and pictures
    assert {name for row in drawn for name in row if not name.startswith(("phase/", "_"))} <= {step_of}
    assert all(row[step_of] >= row["phase/step"] - 1 for row in drawn if step_of in row)
    theirs = [row for row in rows if row not in ours]
    assert {row[step_of] for row in theirs if step_of in row} >= steps
    assert [value for row in rows for name, value in row.items() if name.endswith("after")] == [1.0]
    assert [row["_step"] for row in rows] == sorted(row["_step"] for row in rows)
    if measure == "inline":  # a point comes before what the trainer logs later
        assert rows.index(measured[0]) < max(rows.index(row) for row in theirs)
