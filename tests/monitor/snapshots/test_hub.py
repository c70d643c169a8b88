"""Series on a hub, against one that the test serves itself: commits pinned, one stage, shapes first, nothing kept."""

import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from safetensors.torch import save
from torch import nn

import phasewatch as pw
from phasewatch.monitor.errors import PhasewatchError
from phasewatch.monitor.snapshots.series import open_series

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    served = Hub()
    monkeypatch.setenv("HF_ENDPOINT", served.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield served
    served.close()
    assert list(tmp_path.glob("phasewatch-*")) == []


def weights(step: int, width: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(width, 40, generator=generator), "bias": torch.randn(width, generator=generator)}


def push(hub, branch, step, **more):
    files = {"model.safetensors": save(weights(step)), "config.json": b"{}", "flax_model.msgpack": bytes(5000)}
    return hub.push("org/pythia", branch, files | more)


def assert_weights(snapshot, step):
    assert snapshot.step == step
    assert snapshot.tensors.keys() == weights(step).keys()
    assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in weights(step).items())


def test_branches_are_checkpoints_and_only_their_weights_are_fetched(hub, tmp_path):
    for step in (0, 512, 1000):
        push(hub, f"step{step}", step)
    series = pickle.loads(pickle.dumps(open_series("hf://org/pythia")))
    assert series.steps == (0, 512, 1000)
    assert series.left_out == ("main",)
    assert hub.fetched() == []
    commit = hub.branches["org/pythia"]["step512"]
    push(hub, "step512", 7)  # the branch moves on
    assert_weights(series.load(512), 512)
    assert hub.fetched() == [f"/org/pythia/resolve/{commit}/model.safetensors"]
    assert not (tmp_path / "cache").exists()
    assert open_series("hf://org/pythia", revisions="step?").steps == (0,)
    assert open_series(Path("hf://org/pythia")).steps == (0, 512, 1000)


def test_what_is_kept_is_opened_again_without_the_hub(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    for step in (1, 2):
        push(hub, f"step{step}", step)
    for _ in open_series("hf://org/pythia", keep=True):
        pass
    hub.close()
    assert_weights(open_series(tmp_path / "cache" / "models--org--pythia").load(2), 2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    series = open_series("hf://org/pythia")
    assert series.steps == (1, 2)
    assert_weights(series.load(1), 1)
    with pytest.raises(PhasewatchError, match=r"HF_HUB_OFFLINE is set, and .*models--org--other isn't there"):
        open_series("hf://org/other")


def test_what_is_in_the_cache_is_not_fetched_again(hub):
    push(hub, "step1", 1)
    open_series("hf://org/pythia", keep=True).load(1)
    hub.asked.clear()
    assert_weights(open_series("hf://org/pythia").load(1), 1)
    assert hub.fetched() == []


def test_two_stages_are_refused_and_one_is_chosen(hub):
    for name in ("stage1-step1000-tokens5B", "stage1-step2000-tokens9B", "stage2-ingredient1-step1000-tokens3B"):
        push(hub, name, 1)
    with pytest.raises(PhasewatchError, match=r"stage2-ingredient1-step1000-tokens3B starts again after stage1-step2000"
                                              r".*revisions= \(such as 'stage1-\*'\)"):  # fmt: skip
        open_series("hf://org/pythia")
    assert open_series("hf://org/pythia", revisions="stage1-*").steps == (1000, 2000)
    push(hub, "stage2-step3000-tokens12B", 1)
    assert open_series("hf://org/pythia", revisions="stage?-step*").steps == (1000, 2000, 3000)


def test_shards_and_old_files_of_torch(hub, tmp_path):
    torch.save(weights(1), tmp_path / "old.bin")
    hub.push("org/pythia", "step1", {"pytorch_model.bin": (tmp_path / "old.bin").read_bytes()})
    shards = {
        f"model-0000{i}-of-00002.safetensors": {name: weights(2)[name]} for i, name in ((1, "weight"), (2, "bias"))
    }
    index = {name: shard for shard, tensors in shards.items() for name in tensors}
    files = {shard: save(tensors) for shard, tensors in shards.items()}
    hub.push(
        "org/pythia",
        "step2",
        files | {"model.safetensors.index.json": str({"weight_map": index}).replace("'", '"').encode()},
    )
    series = open_series("hf://org/pythia")
    assert_weights(series.load(1), 1)
    assert_weights(series.load(2), 2)
    assert series.shapes(1) is None
    assert series.shapes(2) == {"weight": (40, 40), "bias": (40,)}


def test_folders_of_one_revision(hub):
    files = {f"checkpoint-{step}/model.safetensors": save(weights(step)) for step in (5, 10)}
    hub.push("org/pythia", "main", files | {"model.safetensors": save(weights(10)), "README.md": b"a"})
    for address in ("hf://org/pythia", "hf://org/pythia@main"):
        assert_weights(open_series(address).load(5), 5)
    hub.push("org/pythia", "main", {f"runs/a/{name}": content for name, content in files.items()})
    series = open_series("hf://org/pythia/runs/a")
    assert series.steps == (5, 10)
    assert_weights(series.load(10), 10)


def loss(model, x):
    return model(x).square().mean()


def test_a_probe_of_another_model_is_refused_before_anything_is_fetched(hub):
    for step in (1, 2):
        push(hub, f"step{step}", step)
    series = open_series("hf://org/pythia")
    sampler = pw.SGLD(step_size=1e-5, chains=2, draws=5, burn_in=2, batch_size=16)
    with pytest.raises(PhasewatchError, match=r"bias has shape \(40,\) where the probe's model has \(3,\)"):
        list(pw.replay(series, pw.Probe(lambda: nn.Linear(40, 3), loss, torch.randn(64, 40), sampler=sampler)))
    assert hub.fetched() == []
    probe = pw.Probe(lambda: nn.Linear(40, 40), loss, torch.randn(64, 40), sampler=sampler)
    assert [point.step for point in pw.replay("hf://org/pythia", probe)] == [1, 2]


def test_the_command_line_takes_the_same(hub, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from phasewatch.cli import app

    for step in (1, 2):
        push(hub, f"step{step}", step)
    push(hub, "other-step3", 3)
    (tmp_path / "hub_probe.py").write_text(
        "import torch, phasewatch as pw\n"
        "sampler = pw.SGLD(step_size=1e-5, chains=2, draws=5, burn_in=2, batch_size=16)\n"
        "def loss(model, x):\n    return model(x).square().mean()\n"
        "probe = pw.Probe(lambda: torch.nn.Linear(40, 40), loss, torch.randn(64, 40), sampler=sampler)\n"
    )
    monkeypatch.chdir(tmp_path)
    command = ["replay", "hf://org/pythia", "--probe", "hub_probe.py:probe", "--revisions", "step*", "--keep"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [p.step for p in pw.Trajectory.read(tmp_path / "org--pythia-replay" / "points.jsonl")] == [1, 2]
    assert (tmp_path / "cache" / "models--org--pythia" / "refs" / "step2").exists()


def test_a_revision_of_another_shape_is_not_fetched(hub):
    push(hub, "step1", 1)
    hub.push("org/pythia", "step2", {"model.safetensors": save(weights(2, width=50))})
    series = open_series("hf://org/pythia")
    with pytest.raises(
        PhasewatchError, match=r"step2 of hf://org/pythia isn't fetched: bias has the shape \(50,\) ther"
    ):
        series.load(2)
    assert hub.fetched() == []


@pytest.mark.parametrize("address", ["hf://pythia", "hf://org/../x", "hf://", "hf://a/b@c@d"])
def test_no_address(hub, address):
    with pytest.raises(PhasewatchError, match=r"must be hf://ORG/NAME|gave no answer"):
        open_series(address)


def test_no_repository_and_no_hub(hub, monkeypatch):
    with pytest.raises(PhasewatchError, match=r"open_series\('hf://org/none'\): the hub gave no answer"):
        open_series("hf://org/none")
    hub.close()
    with pytest.raises(PhasewatchError, match=r"open_series\('hf://org/pythia'\): the hub gave no answer"):
        open_series("hf://org/pythia")


def test_what_holds_no_checkpoint_says_so(hub):
    hub.push("org/pythia", "step1", {"README.md": b"a"})
    hub.push("org/pythia", "step2", {"tf_model.h5": b"a"})
    series = open_series("hf://org/pythia")
    with pytest.raises(PhasewatchError, match="step1 of hf://org/pythia holds no checkpoint"):
        series.load(1)
    with pytest.raises(PhasewatchError, match=r"step2 of hf://org/pythia .*is a file of Keras"):
        series.load(2)


def test_hostile_names_stay_inside(hub, tmp_path):
    hub.push("org/pythia", "step1", {"model.safetensors": save(weights(1)), "../../outside": b"a"})
    hub.branches["org/pythia"]["../../step2"] = hub.branches["org/pythia"]["step1"]
    series = open_series("hf://org/pythia")
    for step in (1, 2):
        with pytest.raises(PhasewatchError, match="names no file in"):
            series.load(step)
    assert not Path(tmp_path.parent, "outside").exists()
