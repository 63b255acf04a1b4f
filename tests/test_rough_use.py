"""What people do with a tool that its author did not think of first; each of these once went wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinySettings

from moelet import metrics
from moelet.cli import main

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _quick_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)


@pytest.fixture
def project(tiny_settings: TinySettings, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text and settings for it, as the current directory."""
    text = max(corpus.glob("*.txt"), key=lambda path: path.stat().st_size)
    shutil.copy(text, tmp_path / "book.txt")
    settings = tiny_settings(train={"train_steps": 2, "sample_prompt": None})
    settings["data"] |= {"source": "files", "files": "book.txt"}
    (tmp_path / "hparams.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_goes_on_from_another_directory(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", "--run", "run"]) == 0
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    assert main(["train", "--resume", "../run"]) == 0
    assert main(["evaluate", "../run", "--json", "result.json"]) == 0


def test_a_run_goes_on_with_its_text_moved_but_not_with_another(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run", "run"]) == 0
    (project / "moved").mkdir()
    moved = (project / "book.txt").rename(project / "moved" / "book.txt")
    resume = ["train", "--resume", "run", "--set", f"data.files={moved}"]
    assert main(resume) == 0
    moved.write_text(moved.read_text() + "One line more.\n")
    capsys.readouterr()
    assert main(resume) == 78
    assert "data: the run has" in capsys.readouterr().err


def test_a_run_inside_the_data_folder_does_not_become_data(project: Path) -> None:
    assert main(["train", "--run", "runs/a", "--set", "data.files=."]) == 0
    assert main(["train", "--resume", "runs/a"]) == 0
    assert main(["evaluate", "runs/a"]) == 0


@pytest.mark.parametrize("key", ["activation", "attention", "experts", "router"])
def test_a_wrong_name_is_refused_before_the_tokenizer_is_trained(
    project: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--run", "run", "--set", f"model.{key}=foo"]) == 78
    assert f"model.{key} is 'foo'" in capsys.readouterr().err
    assert not (project / "run").exists()


def test_a_small_text_is_told_how_to_be_trained_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "book.txt").write_text("A small text, of a few lines.\n" * 60)
    small = ["train", "--run", "run", "--set", "tokenizer.vocab_size=280"]
    assert main(small) == 78
    assert "Lower data.piece_chars" in capsys.readouterr().err
    assert main([*small, "--set", "data.piece_chars=32", "--set", "data.validation_fraction=0.5"]) in (0, 78)


def test_evaluating_an_empty_file_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--run", "run"]) == 0
    (project / "empty.txt").write_text("")
    capsys.readouterr()
    assert main(["evaluate", "run", "--data", "empty.txt"]) == 78
    said = capsys.readouterr().err
    assert "the data holds no text (empty: 1)" in said and "validation_fraction" not in said


@pytest.mark.parametrize("ending", ['{"step": 2, "tok', "5\n", "null\n", "{}\n", '{"step": 1}\n'])
def test_a_damaged_metrics_file_does_not_stop_a_resume(project: Path, ending: str) -> None:
    assert main(["train", "--run", "run"]) == 0
    path = project / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]) + ending)
    assert main(["train", "--resume", "run"]) == 0


@pytest.mark.parametrize("target", ["no/such/folder/x.json", "."])
def test_an_unwritable_result_is_refused_before_the_work(
    project: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "nowhere", "--prompt", "a", "--json", target]) == 78
    assert "can't be written" in capsys.readouterr().err
    assert main(["tokenizer", "train", "book.txt", "--out", target]) == 78


@pytest.mark.parametrize("arguments", [["--temperature", "1e300"], ["--seed", str(10**22)], ["--top-k", "0"]])
def test_absurd_sampling_is_refused(project: Path, arguments: list[str]) -> None:
    assert main(["generate", "nowhere", "--prompt", "a", *arguments]) in (2, 78)


def test_an_id_past_every_integer_is_a_mistake_of_the_command_line(project: Path) -> None:
    assert main(["tokenizer", "decode", "any.model", str(10**22)]) == 2


def test_a_reader_that_goes_away_is_no_bug(project: Path) -> None:
    assert main(["train", "--run", "run"]) == 0
    command = f"{sys.executable} -m moelet generate run --prompt a --tokens 100 | head -c 1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, cwd=project)
    assert done.returncode in (0, 128 + 13) and "Traceback" not in done.stderr


def test_a_sample_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from moelet.console import printable

    assert printable("a\x1b[31mb\rc\x07\n\t\u00e9\U0001f600") == "a\ufffd[31mb\ufffdc\ufffd\n\t\u00e9\U0001f600"


def test_the_examples_of_the_help_are_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option that an example uses is one that the command knows."""
    for command in (["train"], ["generate"], ["evaluate"], ["tokenizer", "train"], ["tokenizer", "encode"]):
        main([*command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        example = re.search(r"Example: moelet (.*)", said)
        assert example is not None
        options, known = (
            set(re.findall(r"--[a-z-]+", example[1])),
            set(re.findall(r"--[a-z-]+", said[: example.start()])),
        )
        assert options <= known, f"{command}: {options - known}"
        words = re.sub(r"'[^']*'|\"[^\"]*\"|--[a-z-]+ \S+", "", example[1]).split()
        assert "=" not in "".join(words), f"{command}: a setting without --set"


def test_one_line_begins_a_run_and_goes_on_with_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "hparams.json", "--resume", "run", "--set", "train.train_steps=4"]
    assert main(line) == 0 and "resumed" not in capsys.readouterr().out
    assert main([*line, "--set", "train.eval_steps=1"]) == 0
    assert "resumed at step 4 of 4" in capsys.readouterr().out
    assert json.loads((project / "run" / "hparams.json").read_text())["train"]["eval_steps"] == 1
    for changed in ("optim.lr=0.02", "train.train_steps=5"):
        assert main([*line, "--set", changed]) == 78
        said = capsys.readouterr().err
        name, _, value = changed.partition("=")
        assert name in said and f"given is {value}" in said


def test_a_time_budget_from_the_command_line(project: Path) -> None:
    """It takes the place of the steps, also where the run began without it."""
    assert main(["train", "--run", "run", "--time-budget", "1s", "--set", "train.batch_size=1"]) == 0
    last = json.loads((project / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == last["total_steps"] and last["lr"] == 0.001
    saved = json.loads((project / "run" / "hparams.json").read_text())["train"]
    assert (saved["train_steps"], saved["time_budget"]) == (None, 1.0)
