"""The embedded source, and what holds for all."""

from itertools import islice

from reading import read

from moelet.documents import Document, Skipped
from moelet.hparams import DataSettings
from moelet.sources import SOURCES


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
