"""Where text comes from: the table of sources, the one that needs nothing, and mixes of others.

Seed and epoch permute files, not their rows.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelet.errors import UserError, pick
from moelet.sections import DataSettings, MixedSource, SourceSettings
from moelet.text.documents import Cursor, Document, Items, Skipped, Source, checked, place_in
from moelet.text.files import fingerprint_ends, fingerprint_files, pin_files, read_files
from moelet.text.hub import fingerprint_hub, pin_hub, read_hub
from moelet.text.shards import fingerprint_prepared, read_prepared

PASSES = 2**20  # passes over one part of a mix while another has not ended once


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
    for k in range(place_in(cursor, "next")["next"] if cursor else 0, len(order)):
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


def read_mix(settings: DataSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """Yield documents of all parts, always from the one furthest behind its weight: no share is ever off by more
    than one document. A part that ends starts over in another order; the pass ends when every part has ended once.

    A cursor holds each part's pass of its own, cursor in it, and what was taken from it, in `mix_unit`.
    """
    parts = settings.parts
    fresh = {"pass": 0, "cursor": None, "taken": 0, "empty": True}
    states: list[Cursor] = _states(cursor, len(parts)) if cursor else [dict(fresh) for _ in parts]
    streams = [_pass_of(part, seed, epoch, state) for part, state in zip(parts, states, strict=True)]
    while any(state["pass"] == 0 for state in states):
        k = min(range(len(parts)), key=lambda k: states[k]["taken"] / parts[k].weight)
        found, state = next(streams[k], None), states[k]
        if found is None:
            if state["empty"]:
                raise UserError(
                    f"source {k} of data.mix ({label_of(parts[k])}) holds no text. Take it out, or mend it."
                )
            state |= {"pass": state["pass"] + 1, "cursor": None, "empty": True}
            streams[k] = _pass_of(parts[k], seed, epoch, state)
            continue
        item, state["cursor"] = found
        if isinstance(item, Document):
            size = len(item.text) if settings.mix_unit == "characters" else int(item.ends)
            state |= {"taken": state["taken"] + size, "empty": False}
            item = item._replace(part=k)
        yield item, {"parts": [dict(state) for state in states]}


def _states(cursor: Cursor, count: int) -> list[Cursor]:
    """Return the saved states of a mix's parts. Raises UserError where there aren't as many, or they are none."""
    states = cursor.get("parts")
    if not isinstance(states, list) or len(states) != count:
        raise UserError(f"the saved place in the text isn't that of a mix of {count}. Resume from another checkpoint.")
    return [
        dict(place_in(state, "pass", "taken"), cursor=state.get("cursor"), empty=bool(state.get("empty")))
        for state in states
    ]


def _pass_of(part: MixedSource, seed: int, epoch: int, state: Cursor) -> Items:
    number = epoch * PASSES + state["pass"]  # no pass of one epoch is that of another
    return pick(SOURCES, part.source, "data.mix.source").documents(part, seed, number, state["cursor"])


def label_of(settings: SourceSettings) -> str:
    """Return what a person calls the source."""
    files = [settings.files] if isinstance(settings.files, str) else settings.files or []
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return settings.dataset or (f"{files[0]}{more}" if files else settings.source)


def mix_shares(settings: DataSettings, documents: Sequence[int], characters: Sequence[int]) -> list[dict[str, Any]]:
    """Return for each part of a mix the share that was asked for and those that it got, given what was read of it."""
    parts, weights = settings.parts, sum(part.weight for part in settings.parts)
    totals = max(1, sum(documents)), max(1, sum(characters))
    return [
        {
            "source": label_of(part),
            "asked": part.weight / weights,
            "documents": documents[k] / totals[0],
            "characters": characters[k] / totals[1],
        }
        for k, part in enumerate(parts)
    ]


def _fingerprint_mix(settings: DataSettings) -> str:
    return _digest_of_mix(settings, [SOURCES[part.source].fingerprint(part) for part in settings.parts])


def earlier_fingerprint(settings: DataSettings) -> str:
    """Return the fingerprint that checkpoints without an `order` have of the text: that of both ends of files."""

    def of(part: SourceSettings) -> str:
        return (fingerprint_ends if part.source == "files" else SOURCES[part.source].fingerprint)(part)

    return _digest_of_mix(settings, [of(part) for part in settings.parts]) if settings.parts else of(settings)


def _digest_of_mix(settings: DataSettings, found: list[str]) -> str:
    parts = [[part.weight, fingerprint] for part, fingerprint in zip(settings.parts, found, strict=True)]
    return hashlib.sha256(json.dumps([settings.mix_unit, parts]).encode()).hexdigest()


def _pin_mix(settings: DataSettings) -> DataSettings:
    parts = [pick(SOURCES, part.source, "data.mix.source").pin(part) for part in settings.parts]
    return settings.model_copy(update={"mix": parts})


SOURCES: dict[str, Source] = {
    "embedded": Source(_read_embedded, _fingerprint_embedded),
    "files": Source(read_files, fingerprint_files, pin_files),
    "hub": Source(read_hub, fingerprint_hub, pin_hub),
    "prepared": Source(read_prepared, fingerprint_prepared, pin_files),
    "mix": Source(read_mix, _fingerprint_mix, _pin_mix),
}
