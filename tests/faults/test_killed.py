"""The process is killed, at any time and in the middle of writing a checkpoint: nobody catches SIGKILL."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TinySettings
from paused import Place, Runs
from processes import assert_same_run, last_step
from scorecard import Trials

from moelet.storage.manifest import newest
from moelet.tokenizer import Tokenizer

STEPS = {False: 40, True: 300}  # of a run that is killed again and again, at small and at full figures
# in the middle of writing a checkpoint or beside it; each child comes to them at its first, second, ... step
FORCED = [Place("half of a file", at) for at in (1, 2, 3, 4, 6)]
FORCED += [Place("behind a file", at) for at in (1, 2, 3, 4, 8)]
FORCED += [
    Place("before reading back"),
    Place("before the name", 1),
    Place("before the name", 2),
    Place("behind the name"),
]
FORCED += [
    Place("while clearing out"),
    Place("behind clearing out"),
    Place("half a line of metrics", 3),
    Place("settings"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("runs"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(trials: Trials, runs: Runs, tiny_settings: TinySettings, tokenizer: Tokenizer, folder: Path) -> Path:
    """A run that nobody has killed; its settings lie beside it."""
    folder = folder / f"{STEPS[trials.full]}"
    if folder.exists():
        return folder / "run"
    folder.mkdir()
    tokenizer.save(folder / "given.model")
    saving = {"train_steps": STEPS[trials.full], "checkpoint_steps": 1, "log_steps": 1, "eval_tokens": 200}
    settings = tiny_settings(tokenizer={"file": str(folder / "given.model")}, train=saving)
    settings["model"] |= {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "d_embed": 8}
    (folder / "settings.json").write_text(json.dumps(settings))
    runs.run("train", folder / "settings.json", "--run", folder / "run")
    return folder / "run"


def begin(runs: Runs, whole: Path, run: Path, place: Place | None = None) -> int:
    """Start the run or go on with it; return its process."""
    return runs.start(["train", whole.parent / "settings.json", "--resume", run], place=place)[0]


def check(run: Path) -> int:
    """Return the step of the newest checkpoint, which is whole and at most one step behind what was logged."""
    step, passed = newest(run) if run.exists() else (None, [])
    assert passed == []
    assert last_step(run) - (step or 0) <= 1, "more than a save interval is lost"
    return step or 0


@pytest.mark.check(1)
def test_killed_at_any_time(trials: Trials, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """At most one save interval is lost, nobody has to mend anything, and the run ends to the last bit as if it had not
    been killed."""
    kills, chain, reached = trials.count(small=3, full=200), 0, 0
    run, start_up = tmp_path / "0", 1.0
    while trials.tried < kills:
        with trials.one(f"kill {trials.tried} of run {chain}, from step {reached} on"):
            began = time.monotonic()
            process = begin(runs, whole, run)
            # somewhere between its start and as long again behind its first step
            time.sleep(trials.random.uniform(0, 2 * start_up))
            runs.send(process, signal.SIGKILL)
            code = runs.wait()[1]
            assert code in (-signal.SIGKILL, 0), runs.said()
            step = check(run)
            assert step >= reached
            if step > reached:
                start_up = min(start_up, time.monotonic() - began)
            reached = step
        if reached >= STEPS[trials.full] - 30 or trials.tried == kills:
            with trials.one(f"the end of run {chain}"):
                begin(runs, whole, run)
                assert runs.wait()[1] == 0, runs.said()
                assert_same_run(run, whole)
                assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name], "not swept"
            chain, reached = chain + 1, 0
            run = tmp_path / f"{chain}"


@pytest.mark.check(1)
def test_killed_inside_the_writer(trials: Trials, runs: Runs, whole: Path, tmp_path: Path) -> None:
    """With half a file written, before and behind the manifest, before and behind the new name, while older checkpoints
    are removed: the checkpoint before is whole, and the run ends to the last bit as if it had not been killed."""
    run, count = tmp_path / "run", trials.count(small=4, full=54)
    for index, place in enumerate(trials.random.sample(FORCED * (1 + count // len(FORCED)), count)):
        with trials.one(f"{index}: {place}"):
            process = begin(runs, whole, run, place)
            runs.come_to()
            runs.send(process, signal.SIGKILL)
            assert runs.wait()[1] == -signal.SIGKILL
            check(run)
    with trials.one("the end"):
        begin(runs, whole, run)
        assert runs.wait()[1] == 0, runs.said()
        assert_same_run(run, whole)
        assert not [path for path in (run / "checkpoints").iterdir() if ".tmp" in path.name], "not swept"
