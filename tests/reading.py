"""Reading sources in tests: whole, as texts, and from every cursor."""

import json
from pathlib import Path
from typing import Any

from moelet.sections import DataSettings
from moelet.text.documents import Cursor, Document
from moelet.text.sources import SOURCES


def read(settings: DataSettings, seed: int = 0, epoch: int = 0, cursor: Cursor | None = None) -> list[Any]:
    return list(SOURCES[settings.source].documents(settings, seed, epoch, cursor))


def texts(settings: DataSettings, seed: int = 0, epoch: int = 0) -> list[str]:
    return [item.text for item, _ in read(settings, seed, epoch) if isinstance(item, Document)]


def assert_resumes_everywhere(settings: DataSettings) -> list[Any]:
    whole = read(settings, 3, 1)
    for k, (_, cursor) in enumerate(whole):
        assert read(settings, 3, 1, json.loads(json.dumps(cursor))) == whole[k + 1 :]
    return whole


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
