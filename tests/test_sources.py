"""Sources: each document once, in an order set by seed and epoch, resumed exactly from every cursor."""

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from moelet import sources
from moelet.errors import TemporaryError, UserError
from moelet.hparams import DataSettings
from moelet.sources import SOURCES, Cursor, Document, Skipped


def read(settings: DataSettings, seed: int = 0, epoch: int = 0, cursor: Cursor | None = None) -> list[Any]:
    return list(SOURCES[settings.source].documents(settings, seed, epoch, cursor))


def texts(settings: DataSettings, seed: int = 0, epoch: int = 0) -> list[str]:
    return [item.text for item, _ in read(settings, seed, epoch) if isinstance(item, Document)]


def assert_resumes_everywhere(settings: DataSettings) -> list[Any]:
    whole = read(settings, 3, 1)
    for k, (_, cursor) in enumerate(whole):
        assert read(settings, 3, 1, json.loads(json.dumps(cursor))) == whole[k + 1 :]
    return whole


def files(*patterns: object, field: str = "text") -> DataSettings:
    return DataSettings(source="files", files=[str(pattern) for pattern in patterns], text_field=field)


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files with ten documents, an empty file, and some that are no text."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("secret")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline\n")
    (tmp_path / "b.md").write_text("# second")
    (tmp_path / "deep" / "c.py").write_text("third = 3\n")
    (tmp_path / "deep" / "er" / "nothing.txt").write_text("")
    write_rows(tmp_path / "d.jsonl", {"text": "d1"}, {"text": "d2", "id": 2}, {"text": " "}, {"text": "d3"})
    write_rows(tmp_path / "deep" / "e.jsonl", *({"text": f"e{k}"} for k in range(3)))
    (tmp_path / "deep" / "f.jsonl").write_text('{"text": "f, whose last row has no newline"}')
    return tmp_path


# files


def test_files_come_once_each_and_resume_everywhere(folder: Path) -> None:
    whole = assert_resumes_everywhere(files(folder))
    found = sorted(item.text for item, _ in whole if isinstance(item, Document))
    rows = ["d1", "d2", "d3", "e0", "e1", "e2", "f, whose last row has no newline"]
    assert found == sorted(["first\r\nline\n", "# second", "third = 3\n", *rows])
    skipped = [item for item, _ in whole if isinstance(item, Skipped)]
    assert sorted((item.reason, Path(item.where).name) for item in skipped) == [
        ("empty", "d.jsonl:3"),
        ("empty", "nothing.txt"),
    ]


def test_the_order_of_files_depends_on_seed_and_epoch(folder: Path) -> None:
    orders = {(seed, epoch): texts(files(folder), seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) > 5
    assert all(sorted(order) == sorted(orders[0, 0]) for order in orders.values())
    assert texts(files(folder), 2, 1) == orders[2, 1]
    assert [text for text in orders[0, 0] if text[0] == "e"] == ["e0", "e1", "e2"]


def test_paths_globs_and_folders_together_name_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = texts(files(folder))
    assert texts(files(folder / "*.md", folder / "deep" / "..", folder / "a.txt")) == everything
    monkeypatch.chdir(folder)
    assert texts(DataSettings(source="files", files="*.md")) == ["# second"]
    assert sorted(texts(files("**/*.jsonl"))) == sorted(
        text for text in everything if text[0] in "de" or text[:2] == "f,"
    )
    (folder / "[1].txt").write_text("brackets")
    assert texts(files("[1].txt")) == ["brackets"]


def test_long_text_comes_in_parts_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PART", 20)
    long = "".join(f"line {k}: é\n" for k in range(9))
    unbroken = "€😀é" * 15
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + long.encode())
    (tmp_path / "unbroken.txt").write_text(unbroken, encoding="utf-8")
    (tmp_path / "exact.txt").write_text("x" * 20)
    by_name: dict[str, list[Document]] = {}
    for item, _ in assert_resumes_everywhere(files(tmp_path)):
        by_name.setdefault(Path(item.name).name, []).append(item)
    for name, text in {"long.txt": long, "unbroken.txt": unbroken, "exact.txt": "x" * 20}.items():
        parts = by_name[name]
        assert "".join(part.text for part in parts) == text
        assert [part.starts for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
        assert all(len(part.text.encode()) <= 20 for part in parts)
    assert len(by_name["exact.txt"]) == 1 and len(by_name["long.txt"]) > 4
    assert all(part.text.endswith("\n") for part in by_name["long.txt"])


def test_a_long_file_with_a_bad_byte_near_its_end_is_skipped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PART", 20)
    (tmp_path / "bad.txt").write_bytes(b"good line\n" * 9 + b"\xff")
    (tmp_path / "cut.txt").write_bytes("good line\né".encode()[:-1])
    (tmp_path / "good.txt").write_text("good")
    whole = assert_resumes_everywhere(files(tmp_path))
    reasons = sorted(item.reason for item, _ in whole if isinstance(item, Skipped))
    assert len(whole) == 3 and reasons == ["invalid UTF-8"] * 2


def test_each_bad_row_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_ROW", 500_000)
    monkeypatch.setattr(sources, "PART", 1000)
    rows: list[tuple[bytes, str | None]] = [
        (b'\xef\xbb\xbf{"text": "good"}', None),
        (b"", "empty"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\t "}', "empty"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "half', "invalid JSON"),
        (b"[" * 400_000, "invalid JSON"),
        (b'{"text": "big", "n": ' + b"1" * 5000 + b"}", "invalid JSON"),
        (b'{"body": "x"}', "no text field"),
        (b'["text"]', "no text field"),
        (b'{"text": null}', "not text"),
        (b'{"text": ["x"]}', "not text"),
        (b'{"text": "a\\ud800b"}', "lone surrogate"),
        (b'{"text": "' + b"x" * 500_000 + b'"}', "over-long"),
        (b'{"text": "' + b"x" * 499_987 + b'"}', None),
        (b'{"text": "\\u0000 \\ud83d\\ude00 caf\xc3\xa9"}\r', None),
        (b'{"text": "' + b"y" * 600_000, "over-long"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in rows))
    whole = assert_resumes_everywhere(files(path))
    reasons = [item.reason if isinstance(item, Skipped) else None for item, _ in whole]
    assert reasons == [reason for _, reason in rows]
    places = [item.where if isinstance(item, Skipped) else item.name for item, _ in whole]
    assert places == [f"{path}:{row}" for row in range(1, len(rows) + 1)]
    assert [item.text[:20] for item, _ in whole if isinstance(item, Document)] == ["good", "x" * 20, "\0 😀 café"]


def test_files_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches") as caught:
        read(files(tmp_path / "*.txt"))
    assert "*.txt" in str(caught.value) and os.getcwd() in str(caught.value)
    with pytest.raises(UserError, match="no file matches"):
        read(files(tmp_path))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"table\.csv doesn't end in \.txt, \.md, \.py, \.jsonl"):
        read(files(tmp_path / "table.csv"))
    path = write_rows(tmp_path / "rows.jsonl", {"body": "x", "id": 1}, {"text": "y"})
    with pytest.raises(UserError, match=r"row 1 of .*rows\.jsonl has no field 'text'.* 'body', 'id'"):
        read(files(path))
    assert [type(item) for item, _ in read(files(path, field="body"))] == [Document, Skipped]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere can't be read \(No such file"):
        read(files(tmp_path, field="body"))


def test_the_fingerprint_of_files_follows_names_text_and_field(folder: Path) -> None:
    fingerprint = SOURCES["files"].fingerprint
    before = fingerprint(files(folder))
    assert fingerprint(files(folder / "a.txt", folder)) == before
    assert fingerprint(files(folder, field="body")) != before
    assert fingerprint(files(folder / "deep")) != before
    (folder / "b.md").write_text("# Second")
    changed = fingerprint(files(folder))
    assert changed != before
    (folder / "b.md").rename(folder / "c.md")
    assert fingerprint(files(folder)) not in (before, changed)
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"y")
    one_end = fingerprint(files(folder / "long.txt"))
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"z")
    assert fingerprint(files(folder / "long.txt")) != one_end


# embedded


def test_embedded_is_the_standard_library_and_resumes() -> None:
    settings = DataSettings()
    whole = read(settings, 3, 1)
    names = [item.name if isinstance(item, Document) else item.where for item, _ in whole]
    assert len(names) == len(set(names)) > 500
    assert {"argparse.py", "json/decoder.py", "help(if)"} <= set(names)
    assert "pydoc_data/topics.py" not in names
    assert not any({"site-packages", "test", "tests", "idle_test"} & set(name.split("/")) for name in names)
    assert {item.reason for item, _ in whole if isinstance(item, Skipped)} <= {"empty", "invalid UTF-8", "unreadable"}
    for k in (0, 1, 99, len(whole) - 2, len(whole) - 1):
        rest = SOURCES["embedded"].documents(settings, 3, 1, whole[k][1])
        assert list(islice(rest, 20)) == whole[k + 1 : k + 21]
    other = read(settings, 3, 2)
    assert other != whole and sorted(item for item, _ in other) == sorted(item for item, _ in whole)
    fingerprint = SOURCES["embedded"].fingerprint(settings)
    assert len(fingerprint) == 64 and fingerprint == SOURCES["embedded"].fingerprint(settings)


# hub, with a local folder laid out like a dataset


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations a and b, each with splits train and test, each of three files of seven rows."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path_factory.mktemp("dataset")
    lines = ["---", "configs:"]
    for name in "ab":
        (root / name).mkdir()
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {name}/{split}-*.{request.param}"]
            for k in range(3):
                rows = [{"id": row, "text": f"{name} {split} {k} {row}"} for row in range(7)]
                path = root / name / f"{split}-{k}.{request.param}"
                if request.param == "parquet":
                    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
                else:
                    write_rows(path, *rows)
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No hub, a cache of our own, and without the 5 s that `datasets` sleeps at the end of a parquet stream."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def hub(folder: Path, **changes: Any) -> DataSettings:
    return DataSettings(**({"source": "hub", "dataset": str(folder), "name": "a"} | changes))


@pytest.mark.usefixtures("offline")
def test_the_hub_resumes_everywhere(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = read(hub(dataset), 3, 1)
    items = [item for item, _ in whole]
    assert sorted(item.text for item in items) == [f"a train {k} {row}" for k in range(3) for row in range(7)]
    assert len({item.text.split()[2] for item in items[:3]}) == 3, "rows of several files should alternate"
    assert items[4].name == f"{dataset}:5"
    for k, (_, cursor) in enumerate(whole):
        rest = read(hub(dataset), 3, 1, json.loads(json.dumps(cursor)))
        assert [item for item, _ in rest] == items[k + 1 :]
        if len(rest) > 2:  # once more, from a cursor that a resumed pass gave
            assert [item for item, _ in read(hub(dataset), 3, 1, rest[1][1])] == items[k + 3 :]
    for keys in ([(0, epoch) for epoch in range(5)], [(seed, 0) for seed in range(5)]):
        assert len({tuple(texts(hub(dataset), *key)) for key in keys}) > 1
    assert "shuffle buffer" not in caplog.text


@pytest.mark.usefixtures("offline")
def test_the_name_of_a_dataset_is_not_its_split(dataset: Path) -> None:
    for name in "ab":
        for split in ("train", "test"):
            found = texts(hub(dataset, name=name, split=split))
            assert len(found) == 21 and {text.rsplit(" ", 2)[0] for text in found} == {f"{name} {split}"}


@pytest.mark.usefixtures("offline")
def test_hub_rows_without_usable_text_are_skipped(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", {"text": "good"}, {"text": None}, {"text": " "}, {"text": "good too"})
    items = [item for item, _ in read(hub(tmp_path, name=None))]
    assert [item.reason if isinstance(item, Skipped) else item.text for item in items] == [
        "good",
        "not text",
        "empty",
        "good too",
    ]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_field": "body"}, r"has no field 'body'. Its fields are: 'id', 'text'"),
        ({"name": "c"}, r"'c' not found.*Set data\.name\."),
        ({"name": None}, r"Config name is missing.*Set data\.name\."),
        ({"split": "valid"}, r"Bad split: valid.*train.*Set data\.split\."),
        ({"dataset": "/no/such/folder"}, r"/no/such/folder.*Set data\.dataset\."),
    ],
)
def test_a_dataset_that_does_not_fit_is_an_error(dataset: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(hub(dataset, **changes))


@pytest.mark.usefixtures("offline")
def test_no_connection_is_temporary(dataset: Path) -> None:
    with pytest.raises(TemporaryError, match="Run the same command again"):
        read(hub(dataset, dataset="some-one/some-thing", name=None))


def test_the_fingerprint_of_a_dataset_is_its_names(dataset: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"name": "b"}, {"split": "test"}, {"revision": "abc"}, {"text_field": "body"}]
    prints = [SOURCES["hub"].fingerprint(hub(dataset, **change)) for change in changes]
    assert len(set(prints)) == len(prints) and prints[0] == SOURCES["hub"].fingerprint(hub(dataset))
