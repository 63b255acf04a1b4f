"""The hub source, with a local folder laid out like a dataset."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from reading import read, texts, write_rows

from moelet.errors import UserError
from moelet.sections import DataSettings
from moelet.text.documents import Skipped
from moelet.text.sources import SOURCES


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
def test_the_hub_resumes_everywhere(dataset: Path) -> None:
    whole = read(hub(dataset), 3, 1)
    items = [item for item, _ in whole]
    assert sorted(item.text for item in items) == [f"a train {k} {row}" for k in range(3) for row in range(7)]
    assert len({item.text.split()[2] for item in items[:3]}) == 3, "rows of several files should alternate"
    assert [re.search(r"\d\D+(\d+)$", item.name)[1] for item in items[:4]] == ["1", "1", "1", "2"]  # type: ignore
    for k, (_, cursor) in enumerate(whole):
        rest = read(hub(dataset), 3, 1, json.loads(json.dumps(cursor)))
        assert [item for item, _ in rest] == items[k + 1 :]
        if len(rest) > 2:  # once more, from a cursor that a resumed pass gave
            assert [item for item, _ in read(hub(dataset), 3, 1, rest[1][1])] == items[k + 3 :]
    for keys in ([(0, epoch) for epoch in range(5)], [(seed, 0) for seed in range(5)]):
        assert len({tuple(texts(hub(dataset), *key)) for key in keys}) > 1


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
def test_the_hub_needs_to_be_allowed(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set.*Unset"):
        read(hub(dataset, dataset="some-one/some-thing", name=None))


def test_the_fingerprint_of_a_dataset_is_its_names(dataset: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"name": "b"}, {"split": "test"}, {"revision": "abc"}, {"text_field": "body"}]
    prints = [SOURCES["hub"].fingerprint(hub(dataset, **change)) for change in changes]
    assert len(set(prints)) == len(prints) and prints[0] == SOURCES["hub"].fingerprint(hub(dataset))


def test_a_local_dataset_is_found_from_anywhere(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    assert SOURCES["hub"].pin(hub(dataset, dataset=dataset.name)).dataset == str(dataset)
