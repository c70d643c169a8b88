"""Steps in names, as people and libraries write them."""

import hashlib

import pytest

from phasewatch.monitor.snapshots.steps import step_in_name


@pytest.mark.parametrize(
    ("stem", "step"),
    [
        ("step143000", 143_000),
        ("epoch=3-step=400", 400),
        ("model_100", 100),
        ("checkpoint_0000100", 100),
        ("checkpoint-500", 500),
        ("stage1-step1000-tokens5B", 1000),
        ("gpt2_100", 100),
        ("step-00001234", 1234),
        ("global_step500", 500),
        ("step=3-global_step=400", 400),
        ("iter_0002000_rank3", 2000),
        ("Step 12 of stage 2", 12),
        ("step10k", 10_000),
        ("step2M-lr3", 2_000_000),
        ("step100_seed7", 100),
        ("gpt2-1000steps-seed3", 1000),
        ("stepsize0.1_250", 250),
        ("0000100-checkpoint", 100),
        ("ckpt_100_final", 100),
        ("gpt2_100_ema", 100),
        ("model.100", 100),
        ("100", 100),
        ("0", 0),
        ("final", None),
        ("best", None),
        ("gpt2-best", None),
        ("epoch=3-run=7-loss=0.25", None),
        ("step1.5", None),
        ("model-00001-of-00002", None),
        ("", None),
        ("ep0-ba100-rank0", 100),
        ("ep1-ba2000-rank0", 2000),
        ("checkpoint-1000-seed42", 1000),
        ("ckpt_1000_fold2", 1000),
        ("model_1000_v2", 1000),
        ("step1e4", 10_000),
        ("step_1_000", 1000),
        ("ckpt-0500-loss1.25e-03", 500),
        ("checkpoint-12-acc-0.93", 12),
        ("val_loss_0.5_step_30", 30),
        ("lr1e-3_300", 300),
        ("1000_1e-4", 1000),
        ("CKPT+2024-01-01+12-00-00+00", None),
        ("CKPT+2024-01-01+12-00-00+02:00_step7", 7),
        ("1e5", None),
        ("ckpt_1_000_000", 1_000_000),
        ("checkpoint_1_500", 500),
        ("step-1,000", 1000),
        ("8gpu-100", 100),
        ("attempt-2", None),
        ("shard_4", None),
        ("model (2)", None),
        ("checkpoint-100 (1)", 100),
        ("iter_num=500", 500),
        ("run-2024-01-05_700", 700),
        ("model-1a2b3c4d-300", 300),
        ("model-1a2b3c4d", None),
        ("2024-01-05", None),
        ("epoch_10", None),
        ("epoch10", None),
        ("seed42", None),
        ("fold-2", None),
        ("width=512", None),
        ("resnet50", None),
        ("model_v3", None),
        ("mp_rank_00_model_states", None),
        ("step" + "9" * 30, None),
        ("rank0-step100", 100),
        ("model_1000_rank3", 1000),
        ("run-20240105_123456-1x8k2m3q", None),
        ("model_20240105", None),
        ("2024-01-05T12:30:00_step5", 5),
        ("ckpt_1700000000", None),
        ("123e4567-e89b-12d3-a456-426614174000", None),
        ("model_10_epochs", None),
        ("100_tokens", None),
        ("model-batch32-1000", 1000),
        ("epoch1-batch200", 200),
        ("rl_model_100000_steps", 100_000),
        ("ppo_1000000_timesteps", 1_000_000),
        ("model_it100000", 100_000),
        ("NAME--val_loss=1.25-step=300-consumed_samples=9600", 300),
        ("ema_0.9999_010000", 10_000),
        ("checkpoint_3_1000", 1000),
        ("dp0_tp1_step7", 7),
        ("bs32_1000", 1000),
        ("split_1", None),
        ("global_step500_universal", 500),
    ],
)
def test_step_in_name(stem, step):
    assert step_in_name(stem) == step


@pytest.mark.parametrize(
    ("stem", "unit"),
    [
        ("step5", "steps"),
        ("global_step5", "steps"),
        ("iter_5", "iterations"),
        ("ep0-ba5-rank0", "batches"),
        ("update5", "updates"),
        ("model_5", ""),
    ],
)
def test_what_a_step_counts(stem, unit):
    assert step_in_name(stem).unit == unit


def test_no_commit_hash_is_a_step():
    hashes = (hashlib.sha1(str(i).encode()).hexdigest() for i in range(2000))
    assert {step_in_name(commit) for commit in hashes} == {None}
