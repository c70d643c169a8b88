import json
import math
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import environment, gone
from wandb_items import AttachedSink, a_png, a_point, a_transition
from wandb_records import records, rows, values

from phasewatch.callbacks.sinks import wandb_feed, wandb_rows, wandb_run
from phasewatch.callbacks.sinks.wandb import WandbSink
from phasewatch.monitor.errors import PhasewatchError, PhasewatchWarning
from phasewatch.monitor.estimates.estimate import Estimate, Health
from phasewatch.monitor.trajectories.changes import Transition
from phasewatch.monitor.trajectories.trajectory import Point, Trajectory

FOLDERS = ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B in a folder of this test's own, without a key, without a network."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(wandb_feed, "POLL_SECONDS", 0.01)
    import wandb

    yield tmp_path
    wandb.teardown()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps that each drawing was made from; every drawing shows one transition."""
    calls: list[list[int]] = []

    def find_and_draw(points: Trajectory) -> tuple[list[Transition], bytes]:
        calls.append([point.step for point in points])
        return [a_transition(10, 20)], a_png()

    monkeypatch.setattr(wandb_rows, "find_and_draw", find_and_draw)
    return calls


def open_run(**settings: Any) -> Any:
    import wandb

    return wandb.init(project="theirs", **settings)


def read_back(*runs: Any) -> list[list[dict[str, Any]]]:
    """The records of each run, once W&B has written them."""
    import wandb

    folders = [Path(run.settings.sync_dir) for run in runs]
    wandb.teardown()
    return [records(folder) for folder in folders]


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit, "waited 20 s in vain"
        time.sleep(0.005)


def in_a_thread(work: Callable[[], None]) -> None:
    """A publisher calls its sinks from a thread that isn't the user's."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def send(sink: WandbSink, *items: Point | Transition) -> None:
    in_a_thread(lambda: [sink.write(item) for item in items] and None)


def send_and_close(sink: WandbSink, *items: Point | Transition) -> None:
    send(sink, *items)
    in_a_thread(sink.close)


# Which rows the user logs while points come, and with which arguments: (what run.log gets, when it is logged).
STYLES: dict[str, Callable[[Any, int], None]] = {
    "with step=": lambda run, i: run.log({"theirs": i}, step=i),
    "without": lambda run, i: run.log({"theirs": i}),
    "seldom, with step=": lambda run, i: run.log({"theirs": i}, step=i) if i % 25 == 0 else None,
    "twice a step": lambda run, i: (run.log({"theirs": i}, step=i), run.log({"also theirs": i}, step=i)) and None,
    "uncommitted": lambda run, i: (run.log({"theirs": i}, commit=False), run.log({"also theirs": i})) and None,
}


def test_nothing_of_the_users_is_lost_and_all_of_ours_arrives(offline: Path, drawn: list[list[int]]) -> None:
    # Every style has a run of its own; points come live, late, in bursts and out of order; logging outlives close().
    runs = {}
    for style, log in STYLES.items():
        run = runs[style] = open_run()
        sink = AttachedSink()
        for i in range(1, 31):
            log(run, i)
            if i == 10:
                send(sink, *(a_point(step, accuracy=step / 10) for step in (3, 1, 2)))
            if i in {12, 14}:
                send(sink, a_point(i))
            if i == 20:
                send(sink, a_transition(5, 9), a_point(20, Health.DIVERGED), a_point(16))
            if i in {11, 16, 17}:
                time.sleep(0.03)
        in_a_thread(sink.close)
        for i in range(31, 61):
            log(run, i)
        run.finish()
    found = dict(zip(runs, read_back(*runs.values()), strict=True))
    for style, written in found.items():
        theirs = [i for i in range(1, 61) if i % 25 == 0 or "seldom" not in style]
        assert values(written, "theirs") == theirs, style
        if "step" in style:
            assert [row["_step"] for row in rows(written) if "theirs" in row] == theirs, style
        if style in {"twice a step", "uncommitted"}:
            assert [row["also theirs"] for row in rows(written) if "theirs" in row] == theirs, style
        ours = [row for row in rows(written) if "phase/llc" in row]
        assert sorted(row["phase/step"] for row in ours) == [1, 2, 3, 12, 14, 16, 20], style
        assert {row["phase/step"]: row["phase/loss"] for row in ours}[12] == pytest.approx(1 / 13)
        assert not [key for row in rows(written) for key in row if key.startswith("phase/transition_")], style
        assert len([record for record in written if record["type"] == "alert"]) == 1, style
        assert 1 <= len(values(written, "phase/transitions._type")) <= 2, style
        assert len(values(written, "phase/figure._type")) == len(values(written, "phase/transitions._type")), style
    assert drawn[-1] == [1, 2, 3, 12, 14, 16, 20]


def test_results_join_the_users_rows_while_they_log(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run()
    sink = AttachedSink()
    for i in range(1, 4):
        run.log({"theirs": i}, step=i)
        send(sink, a_point(i))
    run.log({"theirs": 4}, step=4)
    run.finish()
    (written,) = read_back(run)
    assert [(row.get("theirs"), row.get("phase/step")) for row in rows(written)[:3]] == [(1, 1), (2, 2), (3, 3)]


def test_a_row_says_what_a_point_and_a_transition_are(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run()
    sink = AttachedSink(run=run)
    send(sink, a_point(4, accuracy=0.25, loss=7.0), a_point(5, Health.DRIFTING), a_transition(1, 3))
    send(sink, a_transition(1, 3), a_transition(4, 6, provisional=True))
    in_a_thread(sink.close)
    run.finish()
    (written,) = read_back(run)
    point, doubtful = (row for row in rows(written) if "phase/llc" in row)
    assert {key: value for key, value in point.items() if key.startswith("phase/")} == {
        "phase/step": 4,
        "phase/loss": 0.2,
        "phase/llc": 14.0,
        "phase/llc_low": 13.0,
        "phase/llc_high": 15.0,
        "phase/health": "OK",
        "phase/doubtful": 0,
        "phase/accuracy": 0.25,
        "phase/metrics/loss": 7.0,
    }
    assert (doubtful["phase/health"], doubtful["phase/doubtful"]) == ("DRIFTING", 1)
    # One alert a transition, however often it comes, and none for one that may still move.
    alerts = [record["alert"] for record in written if record["type"] == "alert"]
    assert [alert["title"] for alert in alerts] == ["phasewatch: transition of type B"]
    metrics = {m["name"]: m for r in written if r["type"] == "metric" for m in [r["metric"]]}
    assert metrics["phase/accuracy"]["step_metric"] == "phase/step"
    assert not any("*" in name or metrics[name].get("options", {}).get("step_sync") for name in metrics)
    media = Path(run.settings.sync_dir) / "files" / "media"
    table = json.loads(next(media.rglob("transitions_*.table.json")).read_text())
    assert table["columns"] == list(wandb_rows.TABLE_COLUMNS)
    assert table["data"][0][:3] == ["B", 10, 20]
    assert table["data"][0][-1] == str(a_transition(10, 20))
    assert next(media.rglob("figure_*.png")).stat().st_size > 0
    band = json.loads(next(media.rglob("llc_band_table_*.table.json")).read_text())
    assert band["data"][0] == [4, "llc - 2 errors", 13.0]


def test_a_run_of_its_own_stays_out_of_the_users_way(offline: Path, drawn: list[list[int]]) -> None:
    import wandb

    sink = AttachedSink(project="ours", name="measured", group="g")
    send(sink, a_point(1))
    assert wandb.run is None
    theirs = open_run(name="a-name")
    assert theirs is wandb.run
    assert theirs is not sink._feed.run
    beside = AttachedSink(own_run=True)
    send(beside, a_point(1))
    assert beside._feed.run is not None
    assert (beside._feed.run.project, beside._feed.run.name) == ("theirs", "a-name-phasewatch")
    assert open_run() is theirs
    theirs.log({"theirs": 1}, step=1)
    send(sink, a_point(2), a_transition(1, 2), a_point(3))
    in_a_thread(sink.close)
    in_a_thread(beside.close)
    sink.close()
    theirs.log({"theirs": 2}, step=2)
    assert wandb.run is theirs
    theirs.finish()
    ours, other, theirs = read_back(sink._feed.run, beside._feed.run, theirs)
    assert [row.get("phase/llc") for row in rows(ours)] == [11.0, 12.0, None, 13.0, None]
    assert [row["_step"] for row in rows(ours)] == list(range(5))
    assert drawn[:2] == [[1, 2], [1, 2, 3]]
    assert values(other, "phase/llc") == [11.0]
    assert [(row["_step"], row["theirs"]) for row in rows(theirs)] == [(1, 1), (2, 2)]
    (start,) = (record["run"] for record in ours if record["type"] == "run")
    assert (start["project"], start["display_name"], start["run_group"]) == ("ours", "measured", "g")


def test_no_key_means_offline_and_says_so_once(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(offline))
    sink = AttachedSink()
    with pytest.warns(PhasewatchWarning, match=r"no W&B API key.*offline, in .*wandb sync .*offline-run-"):
        sink.write(a_point(1))
    sink.write(a_point(2))
    sink.close()
    assert sink._feed.run is not None
    assert sink._feed.run.offline
    (written,) = read_back(sink._feed.run)
    assert values(written, "phase/llc") == [11.0, 12.0]


def test_a_key_in_the_environment_or_netrc_is_found(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    assert not wandb_run.has_key()
    (offline / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'a' * 40}\n")
    assert wandb_run.has_key()
    (offline / "netrc").unlink()
    assert not wandb_run.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "b" * 40)
    assert wandb_run.has_key()
    wandb.teardown()


def test_a_finished_run_costs_one_warning(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run()
    sink, late = AttachedSink(), AttachedSink(run=run)
    send(sink, a_point(1))
    run.finish()
    with pytest.warns(PhasewatchWarning, match=r"run .* is finished.*points\.jsonl.*own_run=True") as caught:
        send_and_close(sink, a_point(2), a_point(3))
    assert len(caught) == 1
    with pytest.warns(PhasewatchWarning, match="is finished"):
        late.write(a_point(1))
    (written,) = read_back(run)
    assert values(written, "phase/llc") == [11.0]
    assert drawn == [[1]]


def test_what_wandb_raises_comes_out_and_costs_nothing(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for own in (True, False):
        run = open_run()
        sink = AttachedSink(own_run=own)
        sink.write(a_point(1))
        run.log({"theirs": 1})
        with monkeypatch.context() as patch:
            patch.setattr(sink._feed.run, "log", _refuse)
            with pytest.raises(OSError, match="no space"):
                sink.write(a_point(2))
        with monkeypatch.context() as patch:
            patch.setattr(sink._feed.run, "alert", _refuse)
            with pytest.raises(OSError, match="no space"):
                sink.write(a_transition(1, 2))
        sink.close()
        run.finish()
        (written,) = read_back(sink._feed.run)
        assert sorted(values(written, "phase/llc")) == [11.0, 12.0]
        assert len([record for record in written if record["type"] == "alert"]) == 1
        assert len(values(written, "phase/figure._type")) == 1


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on the disk")


def test_what_fails_between_rows_comes_out_of_the_next_write(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    sink = AttachedSink()
    sink.write(a_point(1))
    sink.write(a_point(2))
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", _refuse)
        type(run).log(run, {"theirs": 1})
        wait_for(lambda: sink._feed.failure is not None)
    with pytest.raises(OSError, match="no space"):
        sink.write(a_point(3))
    sink.close()
    run.finish()
    (written,) = read_back(run)
    assert sorted(values(written, "phase/llc")) == [11.0, 12.0, 13.0]


def test_the_end_of_the_users_run_waits_seconds_for_what_wandb_does_not_take(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_feed, "CLOSE_SECONDS", 0.2)
    run, sink, over = open_run(), AttachedSink(), threading.Event()
    send(sink, a_point(1), a_point(2))
    warned = r"left its last results out of the W&B run \S+, since .* within 0\.2 seconds .* in points\.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(run, "log", lambda *row, **options: over.wait(100))
        with pytest.warns(PhasewatchWarning, match=warned) as caught:
            run.finish()
        assert not over.is_set()
        assert len(caught) == 1
        over.set()
        wait_for(lambda: all(thread.name != "phasewatch-wandb-end" for thread in threading.enumerate()))
    (written,) = read_back(run)
    assert values(written, "phase/llc") == [11.0]


def test_the_end_of_the_users_run_does_not_wait_again_for_a_sink_that_still_closes(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_feed, "CLOSE_SECONDS", 60.0)
    run, sink, over = open_run(), AttachedSink(), threading.Event()
    send(sink, a_point(1))
    with monkeypatch.context() as patch:
        patch.setattr(sink._feed, "deliver", lambda: over.wait(100))
        closing = threading.Thread(target=sink.close)
        closing.start()
        wait_for(lambda: sink._feed._closing is not None)
        sink._feed._closing -= 100
        with pytest.warns(PhasewatchWarning, match="left its last results out"):
            run.finish()
        assert closing.is_alive()
        over.set()
        closing.join()
    assert sink._feed._closing is None


def test_a_picture_that_cannot_be_drawn_costs_itself_alone(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_rows, "find_and_draw", _refuse)
    run = open_run()
    sink = AttachedSink()
    for step in (1, 2, 3):
        sink.write(a_point(step))
    with pytest.warns(PhasewatchWarning, match=r"its last results .*\(0 rows are left\): OSError: no space"):
        run.finish()
    own = AttachedSink(own_run=True)
    own.write(a_point(1))
    with pytest.raises(OSError, match="no space"):
        own.write(a_transition(1, 2))
    own.write(a_point(2))
    with pytest.raises(OSError, match="no space"):
        own.close()
    joined, alone = read_back(run, own._feed.run)
    assert values(joined, "phase/llc") == [11.0, 12.0, 13.0]
    assert values(alone, "phase/llc") == [11.0, 12.0]


def test_a_run_that_cannot_be_held_gets_a_run_beside_it(
    offline: Path, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_run()
    sink = AttachedSink()
    with monkeypatch.context() as patch:
        patch.delattr("wandb.sdk.wandb_run.TeardownHook")
        with pytest.warns(PhasewatchWarning, match=f"can't share the W&B run {run.id} safely"):
            sink.write(a_point(1))
    run.log({"theirs": 1}, step=1)
    sink.close()
    run.log({"theirs": 2}, step=2)
    run.finish()
    theirs, ours = read_back(run, sink._feed.run)
    assert [(row["_step"], row["theirs"]) for row in rows(theirs)] == [(1, 1), (2, 2)]
    assert values(ours, "phase/llc") == [11.0]


def test_a_disabled_run_takes_everything_and_keeps_nothing(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run(mode="disabled")
    sink = AttachedSink()
    send(sink, a_point(1), a_transition(1, 2))
    in_a_thread(sink.close)
    run.finish()
    assert not list(offline.rglob("*.wandb"))


def test_a_sink_that_never_saw_a_point_opens_no_run(offline: Path) -> None:
    AttachedSink().close()
    assert not list(offline.rglob("*.wandb"))


def test_random_streams_are_untouched(offline: Path, drawn: list[list[int]]) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    own = AttachedSink(own_run=True)
    own.write(a_point(1))
    own.write(a_transition(1, 2))
    own.close()
    run = open_run()
    sink = AttachedSink()
    sink.write(a_point(1))
    sink.close()
    run.finish()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == before


# A process that ends without run.finish(): W&B calls no hook. A monitor whose exit handler comes last sends more.
FORGETFUL = """
import atexit, sys
import wandb_items as t
from phasewatch.callbacks.sinks import wandb_rows
wandb_rows.find_and_draw = lambda points: ([], t.a_png())
import wandb
run = wandb.init(project="theirs")
sink, last = t.AttachedSink(), t.AttachedSink()
atexit.register(lambda: (sink.write(t.a_point(4)), sink.close()))
if "late" in sys.argv:
    atexit.register(lambda: [last.write(t.a_point(step)) for step in (5, 6)])
for step in (1, 2, 3):
    sink.write(t.a_point(step))
run.log({"theirs": 1}, step=5)
print(run.settings.sync_dir)
"""


@pytest.mark.parametrize("late", [[], ["late"]], ids=["open run", "first write at exit"])
def test_a_process_that_ends_without_finish_leaves_everything_behind(offline: Path, late: list[str]) -> None:
    script = textwrap.dedent(FORGETFUL)
    command = [sys.executable, "-c", script, *late]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment())
    written = records(Path(out.stdout.split()[-1]))
    assert sorted(values(written, "phase/llc")) == [11.0, 12.0, 13.0, 14.0, *([15.0, 16.0] if late else [])]
    assert [row["_step"] for row in rows(written) if "theirs" in row] == [5]
    assert values(written, "phase/figure._type")
    assert "Traceback" not in out.stderr


def test_importing_and_constructing_is_light() -> None:
    script = (
        "import sys; from phasewatch.callbacks.sinks.wandb import WandbSink; WandbSink(project='p');"
        "print(sorted({'wandb', 'matplotlib', 'PIL', 'torch'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ})
    assert out.stdout.strip() == "[]"


def test_a_transition_that_moved_a_little_is_still_the_same_one(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run()
    sink = AttachedSink()
    send(sink, a_point(1), a_transition(10, 20), a_transition(11, 20), a_transition(40, 50))
    in_a_thread(sink.close)
    run.finish()
    (written,) = read_back(run)
    assert len([record for record in written if record["type"] == "alert"]) == 2


def test_without_a_trajectory_the_table_holds_what_the_sink_was_told(offline: Path, drawn: list[list[int]]) -> None:
    sink = WandbSink(own_run=True)
    send_and_close(sink, a_point(1), a_transition(1, 2), a_transition(3, 5, provisional=True))
    assert sink._feed is not None
    (written,) = read_back(sink._feed.run)
    assert values(written, "phase/llc") == [11.0]
    table = json.loads(next(offline.rglob("transitions_*.table.json")).read_text())
    assert [(row[1], row[2], row[7]) for row in table["data"]] == [(1, 2, False), (3, 5, True)]
    assert drawn == []


def test_beside_a_trainer_each_result_has_a_row_of_its_own_at_once(offline: Path, drawn: list[list[int]]) -> None:
    run = open_run()
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)  # as the trainers' own loggers do
    sink = AttachedSink()
    sink.describe({"sampler": {"sampler": "Langevin", "chains": 4}, "seed": 3})
    sink.join_trainer()
    for i in range(1, 5):
        run.log({"train/loss": 1 / i, "train/global_step": 10 * i})
        if i > 1:
            send(sink, a_point(10 * i - 10), a_point(10 * i - 5))
    assert not sink._results.wait
    in_a_thread(sink.close)
    run.finish()
    (written,) = read_back(run)
    assert [row["train/global_step"] for row in rows(written) if "train/loss" in row] == [10, 20, 30, 40]
    ours = [row for row in rows(written) if "phase/llc" in row]
    assert [(row["phase/step"], row["phase/llc"]) for row in ours] == [(s, s + 10.0) for s in range(10, 40, 5)]
    assert not any("train/global_step" in row or "train/loss" in row for row in ours)
    last_of_theirs = max(i for i, row in enumerate(rows(written)) if "train/loss" in row)
    assert [row.get("phase/step") for row in rows(written)[:last_of_theirs]][-2:] == [20, 25]
    (config,) = (record["config"]["update"] for record in written if "Langevin" in json.dumps(record))
    assert config == {"phasewatch": {"sampler": {"chains": 4, "sampler": "Langevin"}, "seed": 3}}


def test_without_wandb_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        PhasewatchError, match=r"WandbSink\(\) needs the package wandb, .*pip install 'phasewatch\[wandb\]'"
    ):
        WandbSink()


def test_misuse_is_named() -> None:
    class Run:
        def log(self) -> None: ...

    with pytest.raises(PhasewatchError, match=r"WandbSink\(run=\.\.\., project=\.\.\.\) names a run and describes"):
        WandbSink(run=Run(), project="p")
    with pytest.raises(PhasewatchError, match=r"must be what wandb\.init\(\) returns, not str"):
        WandbSink(run="a-name")
    with pytest.raises(PhasewatchError, match="must be one of online, offline, disabled, not 'on'"):
        WandbSink(mode="on")
    sink = AttachedSink()
    sink.close()
    with pytest.raises(PhasewatchError, match="came after close"):
        sink.write(a_point(1))


def test_the_real_picture_and_the_real_transitions(offline: Path) -> None:
    pytest.importorskip("phasewatch.callbacks.figures.trajectory")
    transitions = pytest.importorskip("phasewatch.monitor.trajectories.transitions")
    if not hasattr(transitions, "find_transitions"):
        pytest.skip("find_transitions isn't there yet")
    rng = np.random.default_rng(0)
    sink = AttachedSink(own_run=True)
    for step in range(0, 600, 10):
        rise = 1 / (1 + math.exp(-(step - 300) / 20))
        chains = 10 + 30 * rise + rng.normal(0, 0.3, size=4)
        llc = Estimate(chains.mean(), 0.15, tuple(chains.tolist()), 60.0, 1.0, 50.0, Health.OK)
        sink.write(Point(step, 2 - rise + rng.normal(0, 0.003), llc))
    sink.write(a_point(600, Health.DIVERGED))
    sink.close()
    (written,) = read_back(sink._feed.run)
    assert len(values(written, "phase/llc")) == 61
    assert len(values(written, "phase/figure._type")) == len(values(written, "phase/transitions._type")) == 1
    table = json.loads(next(offline.rglob("transitions_*.table.json")).read_text())
    assert [row[0] for row in table["data"]] == ["A"]
    assert table["data"][0][1] < 300 < table["data"][0][2]


def test_a_watched_log_likelihood_that_has_turned_gives_one_alert(offline: Path, drawn: list[list[int]]) -> None:
    index = np.arange(40)
    log_p = -4 + np.log(index + 1) / 2 + 0.02 * np.random.default_rng(0).normal(size=40)
    log_p -= 0.03 * np.maximum(index - 25, 0)
    sink = AttachedSink(own_run=True)
    for i in index:
        sink.write(a_point(int(i) + 1, watch_greeting=log_p[i], watch_count=-5 + 0.1 * i))
    sink.close()
    assert sink._feed is not None
    (written,) = read_back(sink._feed.run)
    [alert] = [record["alert"] for record in written if record["type"] == "alert"]
    assert alert["title"] == "phasewatch: watch_greeting has turned"
    assert alert["text"].startswith("RED FLAG: watch_greeting has turned. It turned: highest at 2")


HANGING_SERVER = """
import os, socket, sys, threading, time
import wandb
import wandb_items as t
from phasewatch.callbacks.sinks.wandb import WandbSink
from phasewatch.monitor.runs.record import Recorder
listener = socket.create_server(("127.0.0.1", 0))
held = []
threading.Thread(target=lambda: [held.append(listener.accept()) for _ in range(1000)], daemon=True).start()
os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:%d" % listener.getsockname()[1]
recorder = Recorder([WandbSink(own_run=True, project="p", mode="online", close_seconds=1.0)])
for step in range(3):
    recorder.record(t.a_point(step))
from wandb.sdk import wandb_setup
while wandb_setup.singleton()._connection is None:
    time.sleep(0.05)
recorder.close()
from wandb.analytics.opentelemetry.opentelemetry_proxy import get_open_telemetry_proxy
assert get_open_telemetry_proxy() is None  # it would wait for the server once more
print("service", wandb_setup.singleton()._connection._proc._process.pid)
"""


def test_a_server_that_hangs_holds_neither_the_end_of_a_run_nor_that_of_the_process(offline: Path) -> None:
    """W&B alone would wait for more than two minutes."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING_SERVER],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment(WANDB_API_KEY="0" * 40, WANDB_MODE="online"),
    )
    assert done.returncode == 0, done.stderr
    assert "The sink WandbSink has not finished 1 seconds after the end and is left behind" in done.stderr
    assert "`phasewatch replay RUN --wandb` sends them" in done.stderr
    assert gone([int(done.stdout.split()[-1])], 10)


def test_a_run_that_was_measured_is_sent_afterwards(offline: Path) -> None:
    from phasewatch.cli import main

    Trajectory([a_point(step) for step in (1, 2, 3)]).write(offline / "points.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["phasewatch", "replay", str(offline), "--wandb"])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 0
    import wandb

    wandb.teardown()
    (folder,) = (path for path in (offline / "WANDB_DIR" / "wandb").iterdir() if path.name.startswith("offline-run"))
    assert [row["phase/step"] for row in rows(records(folder)) if "phase/llc" in row] == [1, 2, 3]


def test_the_current_folder_chooses_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from phasewatch.cli import main

    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nproject = a\nbase_url = http://evil.example\n")
    Trajectory([a_point(1)]).write(tmp_path / "points.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setattr(sys, "argv", ["phasewatch", "replay", ".", "--wandb"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "wandb/settings in the current folder sets base_url for W&B" in capsys.readouterr().err


def test_a_run_of_its_own_asks_no_git_of_the_current_folder(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration of a repository may name commands that git runs."""
    for command in (["git", "init", "-q", "."], ["git", "config", "core.fsmonitor", f"touch {offline}/PWNED; false"]):
        subprocess.run(command, cwd=offline, check=True)
    monkeypatch.chdir(offline)
    sink = WandbSink(own_run=True)
    sink.write(a_point(1))
    sink.close()
    assert not (offline / "PWNED").exists()
