"""Prepared text: the same items, batches and losses as the source, interrupted or not; what isn't it is refused."""

import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinySettings
from reading import read

from moelet import metrics, prepare, train
from moelet.cli import main
from moelet.console import Progress
from moelet.data import START, training_rows
from moelet.errors import TemporaryError, UserError
from moelet.hparams import Hparams, make_hparams, read_hparams
from moelet.sections import TokenizerSettings
from moelet.storage.disk import sealed
from moelet.text import shards
from moelet.text.documents import Document, Prepared, Skipped
from moelet.text.sources import SOURCES
from moelet.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RATE_SECONDS", 0.0)
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 8)
    monkeypatch.setattr(prepare, "GROUP", 7)


@pytest.fixture(scope="module")
def hparams(tiny_settings: TinySettings, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Hparams:
    """Settings of a run that reads a tenth of the corpus, in which two rows are bad."""
    bad = tmp_path_factory.mktemp("bad") / "bad.jsonl"
    bad.write_text('{"text": ""}\n{broken\n')
    files = [str(corpus), str(bad)]
    return make_hparams(
        tiny_settings(
            data={"files": files, "shuffle_window": 16, "piece_chars": 500, "validation_fraction": 0.2},
            train={"train_steps": 40, "eval_steps": 20, "eval_tokens": 500},
        )
    )


@pytest.fixture(scope="module")
def prepared(hparams: Hparams, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole corpus, prepared; nobody changes it."""
    path = tmp_path_factory.mktemp("once") / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "GROUP", 7)
        prepare.prepare(hparams, path, 10**9, Progress())
    return path


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A copy of it, as if it had been made there."""
    path = shutil.copytree(prepared, tmp_path / "prepared")
    settings = path / "hparams.json"
    settings.write_text(settings.read_text().replace(str(prepared), str(path)))
    return path


def plain(item: Prepared | Skipped | Document) -> Any:
    """All that an item holds, to be compared."""
    if not isinstance(item, Prepared):
        return item
    return item.name, item.ends, [(piece.ids.tobytes(), piece.digest) for piece in item.pieces]


def losses(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "val_loss", "val_bits_per_byte", "gzip_bits_per_byte", "documents", "skipped")
    return [[row.get(name) for name in names] for row in rows]


def test_items_come_back_as_they_were(hparams: Hparams, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    ready = read_hparams(folder / "hparams.json").data
    found, expected = [item for item, _ in read(ready)], [item for item, _ in read(hparams.data)]
    assert len(found) == len(expected) == 43
    for item, other in zip(found, expected, strict=True):
        if isinstance(other, Skipped):
            assert isinstance(item, Skipped) and item.reason == other.reason
            continue
        assert isinstance(item, Prepared) and item.ends == other.ends
        assert "".join(tokenizer.decode(piece.ids) for piece in item.pieces) == other.text
    assert Counter(item.reason for item in found if isinstance(item, Skipped)) == {"empty": 1, "invalid JSON": 1}


def test_training_is_the_same_as_on_the_source(hparams: Hparams, tmp_path: Path) -> None:
    """With just what the run needs: no step, evaluation or count differs."""
    manifest = prepare.prepare(hparams, tmp_path / "prepared", None, Progress())
    assert 40 * hparams.tokens_per_step < manifest["tokens"] < 150_000, "a part of the corpus is enough"
    train.start(hparams, tmp_path / "streamed", Progress())
    train.start(read_hparams(tmp_path / "prepared" / "hparams.json"), tmp_path / "ready", Progress())
    assert losses(tmp_path / "ready") == losses(tmp_path / "streamed")


def test_any_cursor_goes_on_at_once(folder: Path) -> None:
    ready = read_hparams(folder / "hparams.json").data
    for seed, epoch in ((0, 0), (0, 1), (5, 0)):
        whole = [plain(item) for item, _ in SOURCES["prepared"].documents(ready, seed, epoch, None)]
        for k in range(0, len(whole), 17):
            rest = SOURCES["prepared"].documents(ready, seed, epoch, {"next": k + 1})
            assert [plain(item) for item, _ in rest] == whole[k + 1 :]


def test_other_seeds_and_epochs_permute_everything(folder: Path) -> None:
    ready = read_hparams(folder / "hparams.json").data
    orders = {}
    for key in ((0, 0), (0, 1), (1, 0), (1, 1)):
        orders[key] = tuple(repr(plain(item)) for item, _ in SOURCES["prepared"].documents(ready, *key, None))
    assert len(set(orders.values())) == 4
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1


def test_rows_resume_from_any_cursor_over_epochs(folder: Path) -> None:
    given = read_hparams(folder / "hparams.json").data
    tokenizer = Tokenizer.load(folder / "tokenizer.model")

    def stream(at: Any, count: int) -> list[Any]:
        return [(row.tolist(), cursor) for row, cursor in islice(training_rows(given, tokenizer, 256, 3, at), count)]

    expected = stream(START, 1500)
    assert expected[-1][1]["epoch"] >= 1
    for k in (0, 10, 333, 1200):
        assert stream(json.loads(json.dumps(expected[k][1])), 100) == expected[k + 1 : k + 101]


@pytest.mark.parametrize("cut_at", [1, 20, 40])
def test_an_interrupted_preparation_goes_on(
    hparams: Hparams, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    """In small shards, cut by a source that goes away, with what a killed process left lying: the same items."""
    monkeypatch.setattr(shards, "SHARD_IDS", 3000)
    given = hparams.model_copy(update={"tokenizer": TokenizerSettings(file=str(folder / "tokenizer.model"))})
    real, cut = SOURCES["files"], tmp_path / "cut"

    def failing(*arguments: Any) -> Any:
        for count, found in enumerate(real.documents(*arguments)):
            if count == cut_at:
                raise TemporaryError("the source is away")
            yield found

    with monkeypatch.context() as patch, pytest.raises(TemporaryError):
        patch.setitem(SOURCES, "files", real._replace(documents=failing))
        prepare.prepare(given, cut, 10**9, Progress())
    with pytest.raises(UserError, match="is not complete.*Run the same command again"):
        shards.Shards(cut)
    begun = shards.read_manifest(cut)
    assert begun["items"] <= cut_at
    (cut / f"shard-{len(begun['shards']):05}").mkdir()
    whole = prepare.prepare(given, cut, 10**9, Progress())
    assert whole["complete"] and len(whole["shards"]) > 3
    shards.verify(cut)
    found, expected = shards.Shards(cut), shards.Shards(folder)
    assert [plain(found[k]) for k in range(len(found))] == [plain(expected[k]) for k in range(len(expected))]


def test_ctrl_c_at_any_moment_keeps_whole_groups(
    hparams: Hparams, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a group, whose items must not be there twice later."""
    given = hparams.model_copy(update={"tokenizer": TokenizerSettings(file=str(folder / "tokenizer.model"))})
    real = shards.ShardWriter.add
    for number, when in enumerate((3, 10, 30)):
        calls = []

        def add(self: Any, item: Any, when: int = when, calls: list[int] = calls) -> None:
            calls.append(1)
            if len(calls) == when:
                raise KeyboardInterrupt
            real(self, item)

        cut = tmp_path / f"cut-{number}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shards.ShardWriter, "add", add)
            prepare.prepare(given, cut, 10**9, Progress())
        prepare.prepare(given, cut, 10**9, Progress())
        found, expected = shards.Shards(cut), shards.Shards(folder)
        assert [plain(found[k]) for k in range(len(found))] == [plain(expected[k]) for k in range(len(expected))]


def test_preparing_again_changes_nothing_and_other_settings_are_refused(hparams: Hparams, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*/*.npy")}
    prepare.prepare(hparams, folder, 10**9, Progress())
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("shard-*/*.npy")}
    data = hparams.data.model_copy(update={"piece_chars": 400})
    with pytest.raises(UserError, match="other settings; these differ: data"):
        prepare.prepare(hparams.model_copy(update={"data": data}), folder, 10**9, Progress())
    with pytest.raises(UserError, match="these differ: tokens"):
        prepare.prepare(hparams, folder, 10**8, Progress())


def test_a_folder_of_other_things_is_left_alone(hparams: Hparams, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no prepared text"):
        prepare.prepare(hparams, tmp_path, None, Progress())
    with pytest.raises(UserError, match="encoded already"):
        ready = hparams.data.model_copy(update={"source": "prepared"})
        prepare.prepare(hparams.model_copy(update={"data": ready}), tmp_path / "new", None, Progress())


def test_training_refuses_another_tokenizer_or_other_pieces(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.train(["another text of a few words " * 50], 280)
    other.save(tmp_path / "other.model")
    for change in (f"tokenizer.file={tmp_path / 'other.model'}", "data.piece_chars=400"):
        with pytest.raises(UserError, match="another tokenizer, or in pieces of 500"):
            train.make_tokenizer(read_hparams(folder / "hparams.json", [change]))
    given = read_hparams(folder / "hparams.json", ["tokenizer.file=null"])
    assert train.make_tokenizer(given).fingerprint == Tokenizer.load(folder / "tokenizer.model").fingerprint


@pytest.mark.parametrize("damage", ["manifest", "array", "length", "gone", "object", "header"])
def test_damage_is_seen(folder: Path, damage: str) -> None:
    array = folder / "shard-00000" / "piece_ends.npy"
    content = bytearray(array.read_bytes())
    if damage == "manifest":
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"complete": true', '"complete": 1'))
    elif damage == "array":
        content[-5] ^= 1
        array.write_bytes(content)
    elif damage == "length":
        array.write_bytes(content[:-8])
    elif damage == "gone":
        array.unlink()
    elif damage == "header":
        array.write_bytes(content.replace(b"}", b"(", 1))
    else:
        with open(array, "wb") as file:
            np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    if damage != "array":
        with pytest.raises(UserError, match="repare"):
            shards.Shards(folder)
    with pytest.raises(UserError, match="repare"):
        shards.verify(folder)


def test_a_manifest_says_all_that_is_read(folder: Path) -> None:
    """Also one that somebody has sealed anew."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest.pop("sha256")
    for name in manifest:
        path.write_bytes(sealed({key: value for key, value in manifest.items() if key != name}))
        with pytest.raises(UserError, match=f"damaged or of another version.*{name}"):
            shards.Shards(folder)


def test_preparing_again_verifies(hparams: Hparams, folder: Path) -> None:
    array = folder / "shard-00000" / "ids.npy"
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    with pytest.raises(UserError, match=r"ids\.npy is missing or damaged"):
        prepare.prepare(hparams, folder, 10**9, Progress())


def test_the_command_says_how_to_train(
    hparams: Hparams, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("settings.json").write_text(hparams.to_json())
    assert main(["prepare", "settings.json", "--out", "ready made", "--json", "made.json"]) == 0
    assert "train   python -m moelet train 'ready made/hparams.json'" in capsys.readouterr().out
    assert json.loads(Path("made.json").read_text())["tokens"] > 40 * hparams.tokens_per_step
    assert main(["train", "ready made/hparams.json", "--run", "run"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", "../run"]) == 0
