"""Where text comes from: the table of sources, and the one that needs nothing.

Seed and epoch permute files, not their rows.
"""

import hashlib
import os
import sysconfig
from pathlib import Path

import numpy as np

from moelet.documents import Cursor, Items, Skipped, Source, checked
from moelet.files import fingerprint_files, read_files
from moelet.hparams import SourceSettings
from moelet.hub import fingerprint_hub, read_hub


def _standard_library() -> dict[str, Path | str]:
    """Return the standard library's files and the topics of Python's help, by name, sorted."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found: dict[str, Path | str] = {f"help({topic})": text for topic, text in topics.items()}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            found[path.relative_to(root).as_posix()] = path
    found.pop("pydoc_data/topics.py", None)
    return dict(sorted(found.items()))


def _read_embedded(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    found = list(_standard_library().items())
    order = np.random.default_rng([seed, epoch]).permutation(len(found))
    for k in range(cursor["next"] if cursor else 0, len(order)):
        name, text = found[order[k]]
        try:
            item = checked(text if isinstance(text, str) else text.read_bytes().decode("utf-8-sig"), name)
        except UnicodeDecodeError:
            item = Skipped("invalid UTF-8", name)
        except OSError:
            item = Skipped("unreadable", name)
        yield item, {"next": k + 1}


def _fingerprint_embedded(settings: SourceSettings) -> str:
    """It reads the text as the source does; an unreadable file counts by that."""
    digest = hashlib.sha256()
    for item, _ in _read_embedded(settings, 0, 0, None):
        digest.update("\0".join(map(str, item)).encode() + b"\0")
    return digest.hexdigest()


SOURCES: dict[str, Source] = {
    "embedded": Source(_read_embedded, _fingerprint_embedded),
    "files": Source(read_files, fingerprint_files),
    "hub": Source(read_hub, fingerprint_hub),
}
