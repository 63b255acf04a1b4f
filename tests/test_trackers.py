"""Trackers hold what metrics.jsonl holds, after cuts and resumes too; and nothing they do wrong stops a run."""

import importlib.util
import json
import math
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinySettings

from moelet import errors, metrics, session, trackers, train
from moelet.cli import main
from moelet.console import Progress
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.tokenizer import Tokenizer
from moelet.trackers import TRACKERS, Row, Tracking, WeightsAndBiases, numbers

History = list[tuple[int, dict[str, float]]]  # (step, numbers), in the order that they are shown in


def read_tensorboard(run: Path) -> History:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), {SCALARS: 0}, purge_orphaned_data=False)
    events.Reload()
    found: dict[int, dict[str, float]] = {}
    count = 0
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
            count += 1
    assert count == sum(map(len, found.values())), "nothing is there twice"
    return sorted(found.items())


def read_wandb(run: Path) -> History:
    """Read the one file of an offline run, which Weights & Biases' own process may end a moment after we do."""
    [path] = (run / "wandb").glob("offline-run-*/run-*.wandb")
    found: History = []
    deadline, ended = time.monotonic() + 20, False
    while not ended and time.monotonic() < deadline:
        records = list(wandb_records(path.read_bytes()))
        ended = any(record.WhichOneof("record_type") == "exit" for record in records)
        time.sleep(0.02)
    assert ended, "the file of the run has its end"
    for record in records:
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            found.append((items["_step"], {key: items[key] for key in items if not key.startswith("_")}))
    return found


def wandb_records(data: bytes) -> Iterator[Any]:
    """Yield the Record messages of a file, which is a log in LevelDB's format after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that no header fits in
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_trackio(run: Path) -> History:
    import trackio

    name = f"{run.name}-{json.loads((run / trackers.IDENTITY).read_text())['id']}"
    assert [known.name for known in trackio.Api().runs(trackers.PROJECT)].count(name) == 1
    logs = trackio.SQLiteStorage.get_logs(trackers.PROJECT, name)
    return [(log["step"], {key: log[key] for key in log if key not in ("step", "timestamp")}) for log in logs]


READERS: dict[str, Callable[[Path], History]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
}
INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} isn't installed")
    )
    for name in TRACKERS
]


def expected(run: Path, name: str = "") -> History:
    """Return what metrics.jsonl holds, in the precision of a tracker."""
    return of_rows([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()], name)


def of_rows(rows: list[Row], name: str) -> History:
    exact = [(row["step"], numbers(row)) for row in rows]
    if name != "tensorboard":
        return exact
    with np.errstate(over="ignore"):
        return [(step, {key: float(np.float32(found[key])) for key in found}) for step, found in exact]


@pytest.fixture(scope="module", autouse=True)
def at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the trackers' own files out of the home folder, and everything on this machine."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {
            "TRACKIO_DIR": folder / "trackio",  # read when it is first imported
            "WANDB_MODE": "offline",
            "WANDB_CACHE_DIR": folder / "cache",
            "WANDB_CONFIG_DIR": folder / "config",
            "WANDB_SILENT": "true",
        }.items():
            patch.setenv(variable, str(value))
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)


@pytest.fixture
def settings(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Any]:
    tokenizer.save(tmp_path / "given.model")
    train = {"train_steps": 7, "eval_steps": 4, "checkpoint_steps": 3, "keep_checkpoints": 9}
    return tiny_settings(tokenizer={"file": str(tmp_path / "given.model")}, train=train)


class Killed(BaseException):
    pass


def train_until(step: int | None, run: Path, settings: dict[str, Any] | None, changes: Sequence[str] = ()) -> None:
    """Begin a run, or go on with it where `settings` is None; let it die, with no time to close anything, at `step`."""
    real = session.train_step

    def dying(training: Any, batches: Any) -> Any:
        if training.step == step:
            raise Killed
        return real(training, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "train_step", dying)
        if step is not None:
            patch.setattr(Tracking, "close", lambda self, finished: None)
        try:
            if settings is None:
                train.resume(run, changes, Progress())
            else:
                train.start(make_hparams(settings), run, Progress())
        except Killed:
            for package in ("wandb", "trackio"):  # as if the process were gone, and had shown everything before
                if package in sys.modules:
                    with suppress(RuntimeError):  # Trackio's, where no run was begun
                        sys.modules[package].finish()


def test_numbers_have_a_name_each() -> None:
    row = {"step": 3, "loss": 2.5, "tokens": 7, "expert_load": [[1, 0.5], [2.0]], "sample": "x", "bits": None}
    row |= {"mix": [{"documents": 1}], "alarms": [{"layer": 1}], "fine": True}
    assert numbers(row) == {
        "loss": 2.5,
        "tokens": 7,
        "expert_load/0/0": 1,
        "expert_load/0/1": 0.5,
        "expert_load/1/0": 2.0,
    }


@pytest.mark.parametrize("name", INSTALLED)
def test_a_tracker_holds_metrics_jsonl_after_every_cut(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    settings["train"]["track"] = name
    run = tmp_path / "run"
    train_until(5, run, settings)
    assert [row["step"] for row in metrics.read_rows(run)] == [1, 2, 3, 4, 5]
    train_until(6, run, None)  # from step 4, the best so far: steps 5 and 6 are shown anew
    train_until(None, run, None)
    assert READERS[name](run) == expected(run, name)
    assert [step for step, _ in expected(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert {"val_loss", "expert_load/1/3", "loss"} <= set(expected(run)[-1][1])


@pytest.mark.parametrize("name", INSTALLED)
def test_a_tracker_that_comes_later_gets_it_all(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_until(5, run, settings)
    train_until(None, run, None, [f"train.track={name}"])
    assert READERS[name](run) == expected(run, name) and len(expected(run)) == 7


@pytest.mark.parametrize("name", INSTALLED)
def test_numbers_come_back_as_they_are(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    rows: list[Row] = [
        {"step": 1, "elapsed": 0.5, "loss": 0.1 + 0.2, "tokens": 2**53 - 1, "tiny": 5e-324, "big": 1.7e308},
        {"step": 20, "elapsed": 1.5, "loss": math.pi, "tokens": 2**40 + 1, "shares": [1 / 3, 0]},
    ]
    tracker = TRACKERS[name](tmp_path, make_hparams(settings), rows[:1])
    tracker.log(rows[1])
    tracker.close(True)
    assert READERS[name](tmp_path) == of_rows(rows, name)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_loss_that_is_no_number_is_no_fault(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    tracker = TRACKERS[name](tmp_path, make_hparams(settings), [])
    tracker.log({"step": 1, "elapsed": 0.5, "loss": float("nan"), "norm": float("inf")})
    tracker.close(True)
    [(step, found)] = READERS[name](tmp_path)
    assert step == 1 and not math.isfinite(float(found["loss"])) and not math.isfinite(float(found["norm"]))


class Faulty:
    """A tracker that fails where it is told to."""

    at = ""
    heard: list[str]

    def __init__(self, run: Path, hparams: Any, rows: Any) -> None:
        self._fail("open")

    @staticmethod
    def check() -> None:
        pass

    def _fail(self, place: str) -> None:
        Faulty.heard.append(place)
        if place == Faulty.at:
            raise ConnectionError("no route")

    def log(self, row: Row) -> None:
        self._fail("log")

    def close(self, finished: bool) -> None:
        self._fail("close")


@pytest.mark.parametrize(("place", "heard"), [("open", 1), ("log", 2), ("close", 9)])
def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(
    place: str,
    heard: int,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TRACKERS, "faulty", Faulty)
    monkeypatch.setattr(Faulty, "at", place)
    monkeypatch.setattr(Faulty, "heard", [], raising=False)
    settings["train"]["track"] = "faulty"
    train.start(make_hparams(settings), tmp_path / "run", Progress())
    assert len(expected(tmp_path / "run")) == 7
    assert capsys.readouterr().out.count("faulty failed and gets no more of this run (ConnectionError: no route)") == 1
    assert len(Faulty.heard) == heard


def test_an_interrupted_run_is_not_a_finished_one(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Tracking, "close", lambda self, finished: closed.append(finished))
    real = session.train_step

    def refusing(training: Any, batches: Any) -> Any:
        if training.step == 2:
            raise UserError("enough")
        return real(training, batches)

    with monkeypatch.context() as patch:
        patch.setattr(session, "train_step", refusing)
        with pytest.raises(UserError, match="enough"):
            train.start(make_hparams(settings), tmp_path / "run", Progress())
    train.resume(tmp_path / "run", [], Progress())
    assert closed == [False, True]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_told_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda package: None)
    assert main(["train", "recipes/cpu-tiny.json", "--run", str(tmp_path / "run"), "--track", name]) == 78
    said = capsys.readouterr().err
    assert f"{name} isn't installed" in said and f"pip install {name}" in said and ".[track]" in said
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_told_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "recipes/cpu-tiny.json", "--run", str(tmp_path / "run"), "--track", "tensorbord"]
    assert main(given) == 78
    said = capsys.readouterr().err
    assert "train.track is 'tensorbord'" in said and "Did you mean 'tensorboard'?" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb isn't installed")
def test_weights_and_biases_without_a_login_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    with pytest.raises(UserError, match="wandb login, or set the variable WANDB_MODE to offline"):
        WeightsAndBiases.check()
