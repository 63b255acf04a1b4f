"""Files that a stranger has made or changed: they are refused with an error that a person can act on, or do no harm."""

import json
import shutil
from pathlib import Path

import hostile  # beside this file
import pytest
import safetensors.torch
import torch
import victims
from code_in_files import STEP as STEP_OF_RUN
from conftest import TinySettings
from scorecard import Trials

from moelet import metrics, prepare
from moelet.cli import main
from moelet.console import Progress
from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.storage.checkpoint import load
from moelet.text.shards import Shards
from moelet.tokenizer import Tokenizer
from moelet.train import start

STEP = STEP_OF_RUN.removeprefix("run/")


@pytest.fixture(scope="module")
def whole(tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything that a stranger may give, and a file outside of these."""
    from test_export import SHAPES, make_run, settings_of, write_folder  # beside tests/conftest.py

    root = tmp_path_factory.mktemp("whole")
    tokenizer.save(root / "tokenizer.model")
    settings = tiny_settings(
        tokenizer={"file": str(root / "tokenizer.model")}, train={"train_steps": 2, "log_steps": 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "RATE_SECONDS", 0.0)
        patch.setitem(metrics.RATE_SIZE, "cpu", 8)
        start(make_hparams(settings), root / "run", Progress())
    (root / "run" / "accepted.jsonl").write_text(json.dumps({"step": 1, "from": {}, "to": {}, "changes": []}) + "\n")
    for name, shape in (("stock", "factorised"), ("own", "extras")):
        run = make_run(root / f"{name}-run", settings_of(SHAPES[shape], tiny_settings), tokenizer)
        write_folder(root / name, *load(run)[:2], name == "own")
    (root / "tiny.json").write_text(json.dumps(tiny_settings()))
    prepare.prepare(make_hparams(settings), root / "prepared", 3000, Progress())
    rows = [{"query": "a", "choices": ["b", "c"], "gold": k % 2} for k in range(20)]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = load(root / "run").model.state_dict()
    canary = {name: torch.full_like(tensor, hostile.CANARY) for name, tensor in model.items()}
    safetensors.torch.save_file(canary, root / "outside.safetensors")
    return root


def try_all(trials: Trials, kind: str, folder: Path, small: int, full: int) -> None:
    for seed, how in hostile.ask(kind, folder, range(trials.count(small, full))).items():
        with trials.one(f"{kind} {seed}"):
            assert how == "survived", how


@pytest.mark.check(31)
def test_a_run_folder_that_somebody_has_changed(trials: Trials, whole: Path, tmp_path: Path) -> None:
    """Weights, optimizer, state, manifest, settings, tokenizer or measurements: refused with exit code 78, or harmless;
    no crash, 2 seconds and 200 MB at most, and nothing read from outside of the folder."""
    try_all(trials, "run", Path(shutil.copytree(whole, tmp_path / "w")), 24, 3000)


@pytest.mark.check(31)
def test_an_exported_folder_that_somebody_has_changed(trials: Trials, whole: Path, tmp_path: Path) -> None:
    """`moelet import` refuses it, or makes a run of what lies in it and nowhere else."""
    try_all(trials, "import", Path(shutil.copytree(whole, tmp_path / "w")), 12, 1500)


@pytest.mark.check(31)
def test_prepared_text_that_somebody_has_changed(trials: Trials, whole: Path, tmp_path: Path) -> None:
    """No place or token outside of the arrays is ever used: training on it ends with exit code 78."""
    try_all(trials, "prepared", Path(shutil.copytree(whole, tmp_path / "w")), 12, 2500)


@pytest.mark.check(31)
def test_settings_tokenizers_and_tasks_of_a_stranger(trials: Trials, whole: Path, tmp_path: Path) -> None:
    """Each is refused, naming what is wrong with it, or used."""
    try_all(trials, "alone", Path(shutil.copytree(whole, tmp_path / "w")), 12, 2500)


def sealed_again(run: Path) -> Path:
    victims.reseal(run, whole=False)
    return run


@pytest.mark.parametrize(
    "change", [{"n_layers": 900}, {"d_ff": 4096}, {"n_experts": 8}, {"d_embed": None}, {"vocab_size": 2**26}]
)
def test_settings_of_a_model_that_isnt_the_saved_one(change: dict[str, int], whole: Path, tmp_path: Path) -> None:
    """Not even a network of that size is made: what the file holds counts."""
    run = Path(shutil.copytree(whole / "run", tmp_path / "run"))
    settings = json.loads((run / "hparams.json").read_text())
    settings["model"] |= change
    (run / "hparams.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="isn't that of the saved model"):
        load(sealed_again(run))


def test_tokens_outside_of_the_vocabulary(whole: Path, tmp_path: Path) -> None:
    """In a kernel they would be a place outside of the table."""
    place = Path(shutil.copytree(whole / "prepared", tmp_path / "prepared"))
    path = next(place.glob("shard-*/ids.npy"))
    data = bytearray(path.read_bytes())
    data[-2:] = (60_000).to_bytes(2, "little")
    path.write_bytes(data)
    found = Shards(place)
    with pytest.raises(UserError, match="the prepared text is damaged at piece"):
        for k in range(len(found)):
            found[k]


def test_a_checkpoint_that_lies_elsewhere(whole: Path, tmp_path: Path) -> None:
    """A link in place of a file, of a checkpoint or of all of them is refused, wherever it leads."""
    for name in ("checkpoints", f"{STEP}", f"{STEP}/model.safetensors", "hparams.json", "tokenizer.model"):
        run = Path(shutil.copytree(whole / "run", tmp_path / name.replace("/", "-")))
        (run / name).rename(run.with_name("aside"))
        (run / name).symlink_to(run.with_name("aside"))
        with pytest.raises(UserError, match="link"):
            load(run)
        shutil.rmtree(run)
        aside = run.with_name("aside")
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def test_words_of_a_file_cant_drive_the_terminal(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an error quotes of it is shown without the codes that move a cursor or set a title."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"\x1b]0;title\x07\x1b[2J": 1, "train": {"train_steps": 1}}))
    assert main(["train", str(path)]) == 78
    said = capsys.readouterr().err
    assert "title" in said and "\x1b" not in said and "\x07" not in said
