"""A resume with other settings, another tokenizer or other text: refused before any work, or told to go on with it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TinySettings
from cuts import Step, files_of, in_process, train_until
from processes import last_step, newest, rows
from scorecard import Trials

from moelet import cli, session, train
from moelet.console import Progress
from moelet.errors import UserError
from moelet.identity import read_accepted
from moelet.tokenizer import Tokenizer

ADVICE = (
    "Nothing was changed. Resume with the run's own settings, tokenizer and data, start a new run, or go on with what "
    "is given, as a run that is no longer the one begun: --accept-changes."
)
FIXED = (
    "Nothing was changed. Resume with the run's own settings, tokenizer and data, or start a new run. --accept-changes "
    "doesn't help: what is saved is of the run's own {}."
)
HASHES = "{0}: the run has <hash>, given is <hash>".format


class Case(NamedTuple):
    """A change: what is done to the folder that holds run and text, what is given, what is said."""

    change: Callable[[Path], list[str]]
    lines: list[str]
    ends: str = ADVICE


def setting(name: str, value: Any) -> Callable[[Path], list[str]]:
    return lambda folder: [f"{name}={json.dumps(value)}"]


def told(name: str, old: Any, new: Any) -> str:
    return f"{name}: the run has {json.dumps(old)}, given is {json.dumps(new)}"


def edit_tokenizer(folder: Path) -> list[str]:
    """Change one byte that leaves a tokenizer that loads: the name of what it was trained on."""
    path = folder / "run" / "tokenizer.model"
    whole = path.read_bytes()
    for place in range(len(whole) - 1, 0, -1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            Tokenizer.load(path)
        except UserError:
            continue
        return []
    raise AssertionError("no byte can be changed")


def other_vocabulary(folder: Path) -> list[str]:
    Tokenizer.train(["other words entirely " * 99], 300).save(folder / "other.model")
    return [f"tokenizer.file={folder}/other.model"]


def edit_text(folder: Path) -> list[str]:
    path = folder / "text" / "two" / "b.txt"
    path.write_text(path.read_text().replace("e", "E", 1))
    return []


def rename_text(folder: Path) -> list[str]:
    (folder / "text" / "two" / "b.txt").rename(folder / "text" / "two" / "c.txt")
    return []


def add_text(folder: Path) -> list[str]:
    (folder / "text" / "one" / "new.txt").write_text("a new file")
    return []


def mix(folder: Path, *parts: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"source": "files", "files": str(folder / "text" / name), "weight": weight} for name, weight in parts]


def mixed(*parts: tuple[str, float]) -> Callable[[Path], list[str]]:
    return lambda folder: [f"data.mix={json.dumps(mix(folder, *parts))}"]


TEXT = [HASHES("order"), HASHES("data")]
MIX = "data.mix: the run has <mix>, given is <mix>"
SETTINGS = HASHES("settings")
CASES = {
    "tokenizer byte": Case(edit_tokenizer, [HASHES("tokenizer")], FIXED.format("tokenizer")),
    "vocabulary": Case(
        other_vocabulary,
        [HASHES("tokenizer"), 'tokenizer.file: the run has "<file>", given is "<file>"'],
        FIXED.format("tokenizer"),
    ),
    "expert width": Case(
        setting("model.d_ff", 128),
        [SETTINGS, HASHES("model"), told("model.d_ff", 64, 128)],
        FIXED.format("model"),
    ),
    "layers": Case(
        setting("model.n_layers", 3),
        [SETTINGS, HASHES("model"), told("model.n_layers", 2, 3)],
        FIXED.format("model"),
    ),
    "context": Case(
        setting("model.max_length", 16),
        [SETTINGS, HASHES("model"), told("model.max_length", 32, 16)],
        FIXED.format("model"),
    ),
    "optimizer": Case(
        setting("optim.optimizer", "muon"),
        [SETTINGS, "optimizer: the run has adamw, given is muon", told("optim.optimizer", "adamw", "muon")],
        FIXED.format("optimizer"),
    ),
    "a file changed": Case(edit_text, TEXT),
    "a file renamed": Case(rename_text, TEXT),
    "a file more": Case(add_text, TEXT),
    "sources in another order": Case(mixed(("two", 1.0), ("one", 2.0)), [SETTINGS, *TEXT, MIX]),
    "other weights": Case(mixed(("one", 2.0), ("two", 3.0)), [SETTINGS, *TEXT, MIX]),
    "a source less": Case(mixed(("one", 2.0)), [SETTINGS, *TEXT, MIX]),
    "seed": Case(setting("train.seed", 9), [SETTINGS, HASHES("order"), told("train.seed", 0, 9)]),
    "packing": Case(setting("data.packing", False), [SETTINGS, HASHES("order"), told("data.packing", True, False)]),
    "accumulation": Case(
        setting("train.gradient_accumulation", 3), [SETTINGS, told("train.gradient_accumulation", 1, 3)]
    ),
    "batch size": Case(setting("train.batch_size", 8), [SETTINGS, told("train.batch_size", 4, 8)]),
    "dtype": Case(
        setting("train.precision", "bf16"),
        [SETTINGS, "precision: the run has float32, given is bfloat16", told("train.precision", "fp32", "bf16")],
    ),
    "dropout": Case(setting("model.dropout", 0.2), [SETTINGS, told("model.dropout", 0.1, 0.2)]),
    "warm-up": Case(setting("optim.warmup_steps", 3), [SETTINGS, told("optim.warmup_steps", 2, 3)]),
    "learning rate": Case(setting("optim.lr", 0.02), [SETTINGS, told("optim.lr", 0.01, 0.02)]),
    "length": Case(
        setting("train.train_steps", 10),
        ["length: the run has 8 steps, given is 10 steps", told("train.train_steps", 8, 10)],
    ),
}
QUICK = ("tokenizer byte", "layers", "a file changed", "sources in another order", "seed", "dtype", "length")


def plain(said: str, folder: Path) -> str:
    """Return a message with what differs from test to test taken out."""
    said = re.sub(r"\b[0-9a-f]{16}\b", "<hash>", said.replace(str(folder), "DIR"))
    said = re.sub(r"(data\.mix: the run has )\[.*?\](, given is )\[.*\]", r"\1<mix>\2<mix>", said)
    return re.sub(r'(tokenizer\.file: the run has )\S+(, given is )".*"', r'\1"<file>"\2"<file>"', said)


@pytest.fixture(scope="module")
def begun(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text in `text` and a run of eight steps in `run`, killed at its sixth."""
    folder = tmp_path_factory.mktemp("begun")
    corpus = Path(tiny_settings()["data"]["files"])
    for name, source in (("one/a.txt", "argparse.txt"), ("two/b.txt", "textwrap.txt"), ("one/d.jsonl", "rows.jsonl")):
        (folder / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(corpus / source, folder / "text" / name)
    tokenizer.save(folder / "given.model")
    settings = tiny_settings(
        tokenizer={"file": str(folder / "given.model")},
        data={"source": "mix", "files": None, "mix": mix(folder, ("one", 2.0), ("two", 1.0))},
        train={"train_steps": 8, "checkpoint_steps": 2, "eval_tokens": 200},
    )
    with pytest.MonkeyPatch.context() as patch:
        in_process.__wrapped__(patch)
        train_until(patch, folder / "run", settings, 5)
    return folder


def moved(begun: Path, to: Path) -> Path:
    """Copy text and run to another folder; the run then finds its text there."""
    shutil.copytree(begun, to)
    path = to / "run" / "hparams.json"
    path.write_text(path.read_text().replace(str(begun), str(to)))
    return to


@pytest.mark.check(12)
@pytest.mark.usefixtures("in_process")
def test_a_resume_with_other_settings_tokenizer_or_text(
    trials: Trials, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before any work (exit 78), with both fingerprints, what differs, and how to go on all the same."""
    monkeypatch.setattr(session, "train_step", lambda *given: pytest.fail("it trained"))
    for index, name in enumerate(CASES if trials.full else QUICK):
        with trials.one(name):
            folder, case = moved(begun, tmp_path / str(index)), CASES[name]
            changes = [part for change in case.change(folder) for part in ("--set", change)]
            before = dict(files_of(folder / "run"))
            capsys.readouterr()
            assert cli.main(["train", "--resume", str(folder / "run"), *changes]) == 78
            expected = "\n  ".join(["moelet: DIR/run can't go on as another run; these differ:", *case.lines])
            assert plain(capsys.readouterr().err, folder) == f"{expected}\n{case.ends}\n"
            assert dict(files_of(folder / "run")) == before
            if case.ends != ADVICE:
                assert cli.main(["train", "--resume", str(folder / "run"), "--accept-changes", *changes]) == 78
                assert dict(files_of(folder / "run")) == before


@pytest.mark.check(12)
@pytest.mark.usefixtures("in_process")
def test_changes_that_somebody_accepts(
    trials: Trials, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with them, keeps a record of them, and needs no second yes after it was killed again."""
    acceptable = [name for name, case in CASES.items() if case.ends == ADVICE]
    for index, name in enumerate(acceptable if trials.full else ["a file changed", "length"]):
        with trials.one(name):
            folder = moved(begun, tmp_path / str(index))
            run, changes = folder / "run", CASES[name].change(folder)
            first: list[Step] = []
            train_until(monkeypatch, run, None, 5, first, changes=changes, accept=True)  # before any new checkpoint
            assert last_step(run) == 5 and newest(run).name == "step-00000004"
            second: list[Step] = []
            train_until(monkeypatch, run, None, None, second)
            assert second[: len(first)] == first and second[-1].number == (10 if name == "length" else 8)
            (entry,) = read_accepted(run)
            assert entry["step"] == 4 and entry["from"] != entry["to"]
            assert [plain(line, folder) for line in entry["changes"]] == CASES[name].lines
            train_until(monkeypatch, run, None, None)  # finished, and the same run now


@pytest.mark.check(11)
@pytest.mark.usefixtures("in_process")
def test_a_run_made_longer_or_warmed_up_longer_on_the_way(
    trials: Trials, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, and once accepted, every further step has the learning rate of a run that was so from the start."""
    steps = [6, 12] if trials.full else [12]
    cases = [(f"train.train_steps={total}", total, 2) for total in steps] + [("optim.warmup_steps=7", 8, 7)]
    for index, (change, total, warmup) in enumerate(cases):
        with trials.one(change):
            run = moved(begun, tmp_path / str(index)) / "run"
            with pytest.raises(UserError, match="--accept-changes"):
                train.resume(run, [change], Progress())
            train_until(monkeypatch, run, None, None, changes=[change], accept=True)
            found = {row["step"]: row["lr"] for row in rows(run) if row["step"] > 4}
            assert found == {step: cosine(step, total, warmup) for step in range(5, total + 1)}
    with trials.one("shorter than it is"):
        run = moved(begun, tmp_path / "shorter") / "run"
        before = dict(files_of(run))
        with pytest.raises(UserError, match=r"has made 4 steps and is now to have 3 .* at least 4"):
            train.resume(run, ["train.train_steps=3"], Progress(), accept=True)
        assert dict(files_of(run)) == before


def cosine(step: int, total: int, warmup: int) -> float:
    """The learning rate of the step-th step, from 0.01 down to 0.001."""
    if step <= warmup:
        return 0.01 * step / warmup
    return 0.001 + (0.01 - 0.001) * (0.5 * (1 + math.cos(math.pi * ((step - warmup) / (total - warmup)))))


@pytest.mark.check(12)
@pytest.mark.usefixtures("in_process")
def test_a_changed_text_begins_anew(
    trials: Trials, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No place in the old text means anything in the new one: reading begins at its start, in a new order."""
    for name in ("a file changed", "seed", "sources in another order") if trials.full else ("seed",):
        with trials.one(name):
            folder = moved(begun, tmp_path / name.replace(" ", "-"))
            steps: list[Step] = []
            train_until(monkeypatch, folder / "run", None, None, steps, changes=CASES[name].change(folder), accept=True)
            state = json.loads((newest(folder / "run") / "state.json").read_text())
            assert state["cursor"]["epoch"] == 1 and len({step.batches for step in steps}) == 4


@pytest.mark.check(12)
@pytest.mark.usefixtures("in_process")
def test_checkpoints_that_are_away(
    trials: Trials, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that isn't mounted, or moved: refused with 78 and nothing changed; once they are back, the run goes on.
    A run killed before its first checkpoint starts over."""
    run = moved(begun, tmp_path / "moved") / "run"
    settings = run / "hparams.json"
    for index in range(trials.count(small=2, full=4)):
        with trials.one(f"{index}"):
            before = dict(files_of(run))
            (run / "checkpoints").rename(tmp_path / "away")
            if index % 2:
                (run / "checkpoints").mkdir()  # where the disk belongs
            left = dict(files_of(run))
            for command in (
                ["--resume", str(run)],
                [str(settings), "--resume", str(run)],
                [str(settings), "--run", str(run)],
            ):
                assert cli.main(["train", *command]) == 78
                said = capsys.readouterr().err
                assert f"{run}/checkpoints holds none now" in said and "to start over" in said, said
            assert dict(files_of(run)) == left
            if index % 2:
                (run / "checkpoints").rmdir()
            (tmp_path / "away").rename(run / "checkpoints")
            assert dict(files_of(run)) == before
    with trials.one("before the first checkpoint"):
        early = tmp_path / "early"
        train_until(monkeypatch, early, json.loads(settings.read_text()), 1)
        assert last_step(early) == 1 and not (early / "checkpoints").exists()
        (early / "checkpoints").mkdir()  # a first save that was cut short
        train_until(monkeypatch, early, None, 3)
        assert last_step(early) == 3 and newest(early).name == "step-00000002"
    with trials.one("once they are back"):
        train_until(monkeypatch, run, None, None)
        assert last_step(run) == 8
