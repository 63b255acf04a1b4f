"""Somebody presses Ctrl-C, a scheduler sends SIGTERM, a terminal closes: in whatever a run is doing."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinySettings
from paused import Place, Runs
from processes import assert_same_run, digests, last_step, rows
from scorecard import Trials

from moelet import cli, hparams
from moelet.errors import UserError
from moelet.storage.manifest import checkpoint_steps, newest
from moelet.tokenizer import Tokenizer

STEPS, PARTS = 8, 3  # steps of three micro-steps; evaluated and sampled at each fourth, saved at each second
# seeds are drawn once a micro-step, and with a balance loss twice: in the pass ahead, then in the real one
DOING = {
    "the first step": [Place("step", 1)],
    "warm-up": [Place("step", 2)],
    "accumulation": [Place("micro-step", at) for at in (2, 5, 8, 11, 17)],
    "an evaluation": [Place("evaluation", at) for at in (1, 2, 4)],
    "a sample": [Place("sample", at) for at in (1, 9, 13)],
    "a save": [Place("half of a file", at) for at in (1, 3, 4, 7)],
    "clearing out": [Place("while clearing out", 1)],
    "waiting for data": [Place("data", at) for at in (12, 14, 20)],
}
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def whole(
    runs: Runs, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nobody has stopped; its settings lie beside it."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer.save(folder / "given.model")
    settings = tiny_settings(
        tokenizer={"file": str(folder / "given.model")},
        train={
            "train_steps": STEPS, "gradient_accumulation": PARTS, "checkpoint_steps": 2, "eval_steps": 4,
            "keep_checkpoints": 1, "eval_tokens": 300, "sample_prompt": "def",
        },
    )  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    runs.run("train", folder / "settings.json", "--run", folder / "run")
    assert [row["step"] for row in rows(folder / "run") if "sample" in row] == [4, 8]
    return folder / "run"


def stop(runs: Runs, whole: Path, run: Path, place: Place, signals: tuple[signal.Signals, ...], *more: str) -> int:
    """Start a run, send it and its process group the signals at the place, and let it go; return its exit code."""
    (process,) = runs.start(["train", whole.parent / "settings.json", "--run", run, *more], place=place)
    runs.come_to()
    for number in signals:
        runs.send(process, number)
        time.sleep(0.02)  # two of a kind at once would be one
    if place.name != "data":  # data that doesn't come stays away
        runs.go.touch()
    began = time.monotonic()
    code = runs.wait()[1]
    assert code == 0 or time.monotonic() - began < 10, "it hangs"
    return code


def saved_and_the_same(runs: Runs, whole: Path, run: Path, name: str) -> None:
    said = runs.said()
    step, passed = newest(run)
    assert passed == [] and f"interrupted and saved at step {step}" in said and f"--resume {run}" in said, said
    assert "Traceback" not in said
    assert step is not None and last_step(run) <= step, "saved at the last step made"
    runs.run("train", "--resume", run)
    assert_same_run(run, whole)


@pytest.mark.check(5)
def test_a_signal_asks_to_stop(trials: Trials, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """The run is saved at the last whole step, within a micro-step, and ends with 128 + the signal's number; resumed,
    it ends to the last bit as if it had not been stopped. So too when the signal comes twice."""
    doing = list(DOING) * trials.count(small=1, full=5)
    for index, name in enumerate(doing):
        place = trials.random.choice(DOING[name])
        number = STOPPING[(index + index // len(DOING)) % len(STOPPING)]
        twice = index % 4 == 3
        with trials.one(f"{index}: {number.name}{' twice' if twice else ''} during {name}, {place}"):
            run = tmp_path / f"{index}"
            assert stop(runs, whole, run, place, (number,) * (2 if twice else 1)) == 128 + number, runs.said()
            if name == "accumulation":
                made = (place.at - 1) // (2 * PARTS)
                assert newest(run)[0] == made, "the step was made to its end first"
            saved_and_the_same(runs, whole, run, name)


@pytest.mark.check(5)
def test_three_signals_ask_to_stop(trials: Trials, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """The third ends the process at once, unsaved; resumed, the run ends as if it had not been stopped."""
    doing = ["a save", "waiting for data", "an evaluation", "accumulation"][: trials.count(small=1, full=4)]
    for index, name in enumerate(doing):
        with trials.one(f"during {name}"):
            run, number = tmp_path / f"{index}", STOPPING[index % 3]
            (process,) = runs.start(["train", whole.parent / "settings.json", "--run", run], place=DOING[name][-1])
            runs.come_to()
            for _ in range(3):
                runs.send(process, number)
                time.sleep(0.05)
            began = time.monotonic()
            assert runs.wait()[1] == -number
            assert time.monotonic() - began < 10
            runs.run("train", "--resume", run)
            assert_same_run(run, whole)


@pytest.mark.check(5)
def test_a_signal_asks_for_a_checkpoint(trials: Trials, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """SIGUSR1: there is one of the step being made, training goes on, and ends as if nobody had asked."""
    doing = [name for name in DOING if name != "waiting for data"] * trials.count(small=1, full=2)
    for index, name in enumerate(doing[: trials.count(small=2, full=14)]):
        with trials.one(f"during {name}"):
            run, place = tmp_path / f"{index}", trials.random.choice(DOING[name])
            more = ("--set", "train.keep_checkpoints=100", "--set", "train.checkpoint_steps=null")
            if name in ("a save", "clearing out"):
                more = ()
            assert stop(runs, whole, run, place, (signal.SIGUSR1,), *more) == 0, runs.said()
            said = runs.said()
            assert "as asked" in said
            asked = int(said.partition("saved at step ")[2].partition(",")[0])
            assert asked in checkpoint_steps(run) or not more
            assert rows(run) == rows(whole) and digests(run) == digests(whole)


@pytest.mark.check(5)
def test_a_checkpoint_is_asked_for_before_there_is_a_run(trials: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 as soon as the command has begun: it ends nothing, and nothing is saved."""
    trials.count(small=1, full=1)
    with trials.one("while settings are read"):
        heard: list[int] = []

        def read(*given: object) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise UserError("read")

        monkeypatch.setattr(hparams, "read_hparams", read)
        before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
        try:
            assert cli.main(["train", "no.json"]) == 78
            assert heard == [], "what would end the process"
        finally:
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.check(5)
def test_a_checkpoint_is_asked_for_while_there_is_no_data(
    trials: Trials, runs: Runs, whole: Path, tmp_path: Path
) -> None:
    """It is written at once, and no row is lost or read twice when the data comes."""
    trials.count(small=1, full=1)
    with trials.one("SIGUSR1 while the reader stands still"):
        run = tmp_path / "run"
        (process,) = runs.start(["train", whole.parent / "settings.json", "--run", run], place=Place("data", 14))
        runs.come_to()
        limit = time.monotonic() + 30
        while last_step(run) < 1 and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.5)  # until what was read ahead is used up
        runs.send(process, signal.SIGUSR1)
        while "as asked" not in runs.said():
            assert time.monotonic() < limit, runs.said()
            time.sleep(0.01)
        assert newest(run)[0] is not None
        runs.go.touch()
        assert runs.wait()[1] == 0, runs.said()
        assert_same_run(run, whole)
