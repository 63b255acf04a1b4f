"""The command line: help, exit codes, what each mistake says, and the verbs end to end on a tiny run."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import TinySettings

from moelet import metrics
from moelet.cli import main
from moelet.storage import checkpoint, saving
from moelet.storage.lock import LOCK, lock
from moelet.tokenizer import Tokenizer

COMMANDS = ["train", "bench", "generate", "evaluate", "tokenizer"]
SCREEN = 24  # lines
ROOT = Path(__file__).parent.parent


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT, env=environment)


@pytest.fixture(autouse=True, scope="module")
def _quick_matrix_rate() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RATE_SECONDS", 0.0)
        patch.setitem(metrics.RATE_SIZE, "cpu", 8)
        yield


class Run(NamedTuple):
    path: Path
    settings: Path


@pytest.fixture(scope="module")
def settings(tiny_settings: TinySettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "tiny.json"
    path.write_text(json.dumps(tiny_settings(train={"eval_steps": 3, "sample_prompt": "def"})))
    return path


@pytest.fixture(scope="module")
def run(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps. No test changes it."""
    path = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", str(settings), "--run", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def given_pieces(run: Path) -> list[str]:
    """What makes another run take the tokenizer of `run`, instead of training the same again."""
    return ["--set", f"tokenizer.file={run / 'tokenizer.model'}"]


# help


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    said = "".join(capsys.readouterr())
    assert all(command in said for command in COMMANDS)


@pytest.mark.parametrize(
    "command",
    ["train", "bench", "generate", "evaluate", "tokenizer", "tokenizer train", "tokenizer encode", "tokenizer decode"],
)
def test_every_commands_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example: moelet " + command.split()[0] in said


def test_help_does_not_import_torch() -> None:
    code = """
import sys, time
began = time.perf_counter()
from moelet.cli import main
codes = [main([*command, "--help"]) for command in ([], ["train"], ["bench"], ["evaluate"], ["generate"])]
heavy = {"torch", "numpy", "sentencepiece", "datasets", "matplotlib"} & set(sys.modules)
print(codes, sorted(heavy), f"{time.perf_counter() - began:.2f} s", file=sys.stderr)
"""
    ended = python(code)
    assert ended.returncode == 0
    assert ended.stderr.startswith("[0, 0, 0, 0, 0] []"), ended.stderr


def test_python_m_moelet_is_moelet() -> None:
    ended = subprocess.run([sys.executable, "-m", "moelet", "trian"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2
    assert "trian" in ended.stderr and "train" in ended.stderr
    quick_start = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert quick_start.returncode == 0 and "--resume" in quick_start.stdout


# mistakes


class Mistake(NamedTuple):
    arguments: Callable[["World"], list[object]]
    code: int
    expected: list[str]  # in what is said: what was given, what is needed, what to do


class World(NamedTuple):
    settings: Path
    run: Path
    new: Path
    folder: Path

    def train(self, *changes: str) -> list[object]:
        return ["train", self.settings, "--run", self.new, *(part for change in changes for part in ("--set", change))]

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def misspelt(self) -> Path:
        return self.write("m.json", self.settings.read_text().replace('"optim"', '"optmi"'))


MISTAKES: dict[str, Mistake] = {
    "unknown command": Mistake(lambda w: ["evalute", w.run], 2, ["evalute", "No such command"]),
    "unknown flag": Mistake(lambda w: [*w.train(), "--stpes", "3"], 2, ["No such option", "--stpes"]),
    "flag without value": Mistake(lambda w: ["train", "--run"], 2, ["--run", "requires an argument"]),
    "resume and run": Mistake(lambda w: ["train", "--run", w.new, "--resume", w.run], 2, ["--resume", "one of them"]),
    "time without unit": Mistake(lambda w: [*w.train(), "--time-budget", "300"], 78, ["'300'", "units", "5h, 90m"]),
    "no time": Mistake(lambda w: [*w.train(), "--time-budget", "0h"], 78, ["'0h'", "needs some", "5h, 90m"]),
    "no settings file": Mistake(lambda w: ["train", w.folder / "none.json"], 78, ["none.json", "no settings", "Give"]),
    "unknown key": Mistake(lambda w: w.train("model.n_expert=4"), 78, ["model.n_expert", "no such", "'n_experts'"]),
    "misspelt section": Mistake(lambda w: ["train", w.misspelt(), "--run", w.new], 78, ["optmi", "mean 'optim'"]),
    "bad set": Mistake(lambda w: w.train("lr=3"), 78, ["'lr=3'", "no section", "Write --set section.key=value"]),
    "heads": Mistake(lambda w: w.train("model.d_model=30"), 78, ["d_model is 30", "evenly", "Set model.n_heads to 3"]),
    "top_k": Mistake(lambda w: w.train("model.top_k=5"), 78, ["top_k is 5", "can't use more", "to at most 4"]),
    "wrong type": Mistake(lambda w: w.train("train.seed=abc"), 78, ["train.seed", '"abc"', "must be", "default, 0"]),
    "unknown source": Mistake(lambda w: w.train("data.source=hbu"), 78, ["'hbu'", "must be one of", "'hub'"]),
    "unknown backend": Mistake(lambda w: w.train("model.experts=quick"), 78, ["quick", "must be", "reference"]),
    "missing data file": Mistake(
        lambda w: w.train("data.files=/nowhere/a.txt"), 78, ["'/nowhere/a.txt'", "no file", "Set data.files"]
    ),
    "wrong text field": Mistake(
        lambda w: w.train(f"data.files={w.write('r.jsonl', json.dumps({'body': 'x'}))}"),
        78,
        ["no field 'text'", "'body'", "Set data.text_field"],
    ),
    "empty data": Mistake(
        lambda w: w.train(f"data.files={w.write('e.txt', ' ')}"), 78, ["no text", "empty: 1", "Set data.files"]
    ),
    "vocabulary too large": Mistake(
        lambda w: w.train("tokenizer.vocab_size=90000"), 78, ["90000", "at most", "Set tokenizer.vocab_size to"]
    ),
    "vocabulary smaller than the tokenizer": Mistake(
        lambda w: w.train("model.vocab_size=300"), 78, ["vocab_size is 300", "400 pieces", "to null"]
    ),
    "no tokenizer file": Mistake(
        lambda w: w.train("tokenizer.file=/nowhere/t.model"), 78, ["/nowhere/t.model", "SentencePiece", "Train one"]
    ),
    "run folder is a file": Mistake(
        lambda w: ["train", w.settings, "--run", w.write("file", "")], 78, ["file", "A run needs", "--run"]
    ),
    "finished run": Mistake(
        lambda w: ["train", w.settings, "--run", w.run], 78, ["holds a run", "another --run", "--resume"]
    ),
    "resume of nothing": Mistake(
        lambda w: ["train", "--resume", w.folder], 78, ["is not a run folder", "hparams.json", "Give"]
    ),
    "resume with another tokenizer": Mistake(
        lambda w: ["train", "--resume", w.run, "--set", f"tokenizer.file={other_tokenizer(w.folder)}"],
        78,
        ["another run", "tokenizer: the run has", "given is", "tokenizer.file", "Resume with the run's own"],
    ),
    "resume with another seed": Mistake(
        lambda w: ["train", "--resume", w.run, "--set", "train.seed=9"],
        78,
        ["another run", "train.seed: the run has 0, given is 9", "Nothing was changed", "start a new run"],
    ),
    "generate from nothing": Mistake(
        lambda w: ["generate", w.folder, "--prompt", "x"], 78, ["is not a run folder", "Give the folder"]
    ),
    "temperature": Mistake(
        lambda w: ["generate", w.run, "--prompt", "x", "--temperature", "-1"],
        78,
        ["is -1", "must be", "0.7"],
    ),
    "evaluate on nothing": Mistake(
        lambda w: ["evaluate", w.run, "--data", "/nowhere"], 78, ["'/nowhere'", "no file", "must name"]
    ),
    "decode": Mistake(
        lambda w: ["tokenizer", "decode", w.run / "tokenizer.model", "999999"], 78, ["999999", "Ids are 0 to", "Check"]
    ),
    "not a tokenizer": Mistake(
        lambda w: ["tokenizer", "encode", w.write("t.model", "x"), "text"],
        78,
        ["t.model", "is not a", "Train"],
    ),
}


def other_tokenizer(folder: Path) -> Path:
    Tokenizer.train(["other words entirely " * 99], 300).save(folder / "other.model")
    return folder / "other.model"


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_before_any_training(
    name: str, settings: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake, world = MISTAKES[name], World(settings, run, tmp_path / "new", tmp_path)
    before = (run / "metrics.jsonl").read_bytes(), (run / "hparams.json").read_bytes()
    arguments = [str(argument) for argument in mistake.arguments(world)]
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr().err
    assert code == mistake.code, said
    flat = " ".join(said.replace("│", " ").split())
    for part in mistake.expected:
        assert part in flat
    assert "Traceback" not in said
    assert 0 < len(said.splitlines()) <= SCREEN
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("step-*")), "something was trained"
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "hparams.json").read_bytes())


def test_a_run_folder_in_use_is_refused(settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(tmp_path / "new"):
        assert main(["train", str(settings), "--run", str(tmp_path / "new")]) == 78
    said = capsys.readouterr().err
    assert f"in use by process {os.getpid()}" in said and "give another folder with --run" in said
    assert not (tmp_path / "new" / "hparams.json").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_saving_keeps_the_last_checkpoint(
    code: int,
    given_pieces: list[str],
    settings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "run"
    write = checkpoint.write_synced

    def full(file: Path, data: bytes) -> None:
        if "step-00000004" in str(file) and file.name == "optimizer.safetensors":
            write(file, data[:100])
            raise OSError(code, os.strerror(code))
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_synced", full)
        patch.setattr(saving, "PAUSES", (0, 0, 0))
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        ways = ["train.checkpoint_steps=2", "train.on_save_failure=stop"]
        saving_settings = [*(word for way in ways for word in ("--set", way)), *given_pieces]
        assert main(["train", str(settings), "--run", str(path), *saving_settings]) == 75
    said = capsys.readouterr().err
    assert os.strerror(code) in said and "MiB" in said and f"--resume {path}" in said
    assert "step 3 is untouched" in said and "Traceback" not in said  # the evaluation of step 3 was the best
    (parked,) = tmp_path.glob("moelet-parked-run-*/model.safetensors")
    assert f"The weights of step 4 are parked in {parked.parent}" in said
    assert checkpoint.newest(path) == (3, [])
    assert not [entry for entry in (path / "checkpoints").iterdir() if ".tmp" in entry.name]
    assert main(["train", "--resume", str(path)]) == 0
    assert checkpoint.newest(path) == (6, [])


def test_a_real_limit_on_the_size_of_files_ends_with_75(
    given_pieces: list[str],
    settings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saving, "PAUSES", (0, 0, 0))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # Python ignores the signal that goes with it
    try:
        code = main(["train", str(settings), "--run", str(tmp_path / "run"), *given_pieces])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert code == 75, said
    assert "File too large" in said and "--resume" in said and "Traceback" not in said
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


# the verbs


def test_train_writes_a_run_folder_with_what_the_design_says(run: Path) -> None:
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} - {LOCK}
    parts = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    assert files == {
        "hparams.json",
        "tokenizer.model",
        "metrics.jsonl",
        "loss_curve.png",
        "report.html",
        "run_id",
        *(f"checkpoints/step-{step:08}/{part}" for step in (3, 6) for part in parts),
    }


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_what_the_design_says(run: Path) -> None:
    always = "step tokens seconds loss balance_loss lr grad_norm tokens_per_second mfu expert_load".split()
    found = rows(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert all(set(always) <= set(row) for row in found)
    assert [row["step"] for row in found if {"val_loss", "val_bits_per_byte"} <= set(row)] == [3, 6]
    assert found[-1]["sample"].startswith("def")
    assert [len(layer) for layer in found[-1]["expert_load"]] == [4, 4]


def test_a_finished_run_resumes_to_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert main(["train", "--resume", str(copy)]) == 0
    assert rows(copy) == rows(run)
    assert checkpoint.newest(copy) == (6, [])


def test_what_is_only_looked_at_may_change_at_resume(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    assert (
        main(["train", "--resume", str(copy), "--set", "train.log_steps=7", "--set", "train.keep_checkpoints=5"]) == 0
    )
    assert json.loads((copy / "hparams.json").read_text())["train"]["log_steps"] == 7


def test_evaluate_of_the_held_out_text_is_the_last_validation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), "--json", str(tmp_path / "result.json")]) == 0
    result, last = json.loads((tmp_path / "result.json").read_text()), rows(run)[-1]
    assert set(result) == {"loss", "bits_per_byte", "perplexity", "tokens", "bytes", "expert_load"}
    assert result["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-6)
    assert result["tokens"] >= 1000 and result["bytes"] > result["tokens"]
    assert f"{result['loss']:.4f}" in capsys.readouterr().out


def test_evaluate_of_other_text_counts_all_of_it(run: Path, tmp_path: Path) -> None:
    text = "def naïve(x):\n    return '日本語'\n" * 40
    (tmp_path / "other.txt").write_text(text, encoding="utf-8")
    given = ["evaluate", str(run), "--data", str(tmp_path / "other.txt"), "--json", str(tmp_path / "result.json")]
    assert main(given) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bytes"] == len(text.encode())
    assert result["tokens"] == len(Tokenizer.load(run / "tokenizer.model").encode(text)) + 1


def test_generate_is_the_same_for_the_same_seed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in (1, 1, 2):
        given = ["generate", str(run), "--prompt", "def ", "--tokens", "20", "--seed", str(seed)]
        assert main([*given, "--json", str(tmp_path / "out.json")]) == 0
        ((found,),) = [json.loads((tmp_path / "out.json").read_text())]
        assert found["prompt"] == "def "
        assert capsys.readouterr().out == f"def {found['text']}\n"
        texts.append(found["text"])
    assert texts[0] == texts[1] != texts[2]


def test_tokenizer_train_encode_decode(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "t.model")
    assert main(["tokenizer", "train", str(corpus / "ast.txt"), "--vocab-size", "400", "--out", model]) == 0
    assert "400 pieces" in capsys.readouterr().out
    text = "  def f():\n\treturn 'naïve 日本語 \U0001f600'"
    assert main(["tokenizer", "encode", model, text]) == 0
    ids = capsys.readouterr().out.split()
    assert len(ids) > 10 and all(0 <= int(i) < 400 for i in ids)
    assert main(["tokenizer", "decode", model, *ids]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_command_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGPIPE)
    assert main(["evaluate", str(tmp_path / "no-run")]) == 78
    assert signal.getsignal(signal.SIGPIPE) == before
