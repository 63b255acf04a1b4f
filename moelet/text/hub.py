"""Text from the Hugging Face Hub: any dataset there, streamed, whatever the connection does.

The hub's own clients find the files of a configuration and split, and fetch their bytes. Which file comes when, and
where a pass goes on, is decided here: a pass permutes the files and reads up to LANES of them at once, a row from each
in turn, so that a window holds all parts of the dataset. A cursor is plain numbers:

    {"lanes": [[file, row group, rows read], ...] as they are read, "turn": whose is next, "next": first file unread}

A parquet file goes on at its row group, so a resume reads one row group a lane, however far the pass has come. Other
formats are read by `datasets`, which knows no way into the middle of a file: it is read again up to the row.
"""

import errno
import hashlib
import json
import logging
import os
import random
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from time import monotonic, sleep, time
from typing import Any, NamedTuple, TypeVar

import fsspec
import numpy as np
from pyarrow import ArrowException

from moelet.errors import TemporaryError, UserError
from moelet.sections import SourceSettings
from moelet.text.documents import Cursor, Document, Items, Parts, Skipped, checked, is_count, no_field, place_in
from moelet.text.pulse import beat
from moelet.text.tables import fields_of, read_table

LANES = 10  # files read at once; what `datasets` interleaves by default
PATIENCE = 600.0  # seconds that the hub may be away, after which the run is saved and ends
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries, doubling; after the clients' own five tries
HEARTBEAT = 10.0  # seconds that a wait is silent
COMMIT = re.compile("[0-9a-f]{40}")
LONGEST_WORDS = 300  # characters of a client's error that ours repeats
LOG = logging.getLogger("moelet")

GARBLED = (ArrowException, json.JSONDecodeError)  # what a login page in place of a file, or half a file, raises

OUR_SIDE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # this machine's disk, not the hub

T = TypeVar("T")
S = TypeVar("S", bound=SourceSettings)
Place = tuple[int, int]  # the row group to go on in, and the rows of the file read


class _Dataset(NamedTuple):
    """The files of one split, and how to read each from a place."""

    n_files: int
    rows: Callable[[int, Place], Parts]


def read_hub(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """Yield the rows of all files of the split, those of up to LANES files in turn."""
    dataset = _persevere(lambda: _find(settings), settings)
    order = np.random.default_rng([seed, epoch]).permutation(dataset.n_files).tolist()
    lanes: list[list[int]] = _lanes(cursor, len(order)) if cursor else [[k, 0, 0] for k in order[:LANES]]
    turn, unread = (cursor["turn"], cursor["next"]) if cursor else (0, len(lanes))
    readers: dict[int, Parts] = {}  # by file
    while lanes:
        turn %= len(lanes)
        lane = lanes[turn]
        found = _persevere(lambda: _next_row(dataset, readers, lane), settings)  # noqa: B023  called at once
        if found is None:
            lanes[turn : turn + 1] = [[order[unread], 0, 0]] if unread < len(order) else []
            unread += 1
            continue
        item, lane[1], lane[2] = found
        turn += 1
        yield item, {"lanes": [list(lane) for lane in lanes], "turn": turn, "next": unread}


def _lanes(cursor: Cursor, n_files: int) -> list[list[int]]:
    """Return the saved lanes. Raises UserError where these, or the cursor, aren't of a pass over so many files."""
    lanes = place_in(cursor, "turn", "next").get("lanes")
    if not isinstance(lanes, list) or not all(
        isinstance(lane, list) and len(lane) == 3 and all(map(is_count, lane)) and lane[0] < n_files for lane in lanes
    ):
        raise UserError(f"the saved place isn't one in {n_files} files of a dataset. Resume from another checkpoint.")
    return [list(lane) for lane in lanes]


def _next_row(
    dataset: _Dataset, readers: dict[int, Parts], lane: list[int]
) -> tuple[Document | Skipped, int, int] | None:
    """Return the lane's next row, None at its file's end; after an error the next call opens the file anew."""
    file, group, row = lane
    reader = readers.pop(file, None) or dataset.rows(file, (group, row))
    found = next(reader, None)
    if found is not None:
        readers[file] = reader
    return found


def _find(settings: SourceSettings) -> _Dataset:
    """Return the dataset that the settings name. Raises what the clients raise, and UserError for a missing field."""
    import datasets

    builder = datasets.load_dataset_builder(settings.dataset, name=settings.name, revision=settings.revision)
    files = (builder.config.data_files or {}).get(settings.split)
    if files and all(str(file).endswith(".parquet") for file in files):
        _require_field(_table_fields(str(files[0])), settings)
        return _Dataset(len(files), lambda k, place: _table_rows(str(files[k]), settings, place))
    stream = builder.as_streaming_dataset(split=settings.split)  # raises for a split that isn't there
    _require_field(stream.column_names or list(next(iter(stream), {settings.text_field: None})), settings)
    count = stream.num_shards
    names = [str(file) for file in files] if files and len(files) == count else [f"file {k}" for k in range(count)]
    return _Dataset(count, lambda k, place: _stream_rows(stream.shard(count, k), names[k], settings, place))


def _require_field(fields: list[str], settings: SourceSettings) -> None:
    if settings.text_field not in fields:
        raise no_field(f"dataset {settings.dataset}", settings.text_field, fields)


def _table_fields(url: str) -> list[str]:
    with fsspec.open(url, "rb") as file:
        return fields_of(file)


def _table_rows(url: str, settings: SourceSettings, place: Place) -> Parts:
    with fsspec.open(url, "rb") as file:
        yield from read_table(file, url, settings.text_field, *place)


def _stream_rows(stream: Any, name: str, settings: SourceSettings, place: Place) -> Parts:
    """Yield the rows of one file of a dataset in another format; the rows before `place` are read and dropped."""
    rows = stream.select_columns([settings.text_field])
    for row, record in enumerate(rows, 1):
        beat()
        if row > place[1]:
            yield checked(record[settings.text_field], f"{name}:{row}"), 0, row


def _persevere(work: Callable[[], T], settings: SourceSettings) -> T:
    """Return what `work` returns, tried again for up to PATIENCE seconds while the hub is away.

    The pauses double, with jitter, or are what the hub asks for. Raises UserError where waiting doesn't help, and
    TemporaryError when patience is over.
    """
    began, pause = monotonic(), FIRST_PAUSE
    while True:
        try:
            return work()
        except UserError:
            raise
        except Exception as error:
            if (mistake := _mistake(error, settings)) is not None:
                raise mistake from error
            if not _may_pass(error):
                raise
            waited, words, asked = monotonic() - began, _words(error), _asked_to_wait(error)
            left = PATIENCE - waited
            if left <= 0 or asked > left:
                wish = f", and asks to wait {asked:.0f} s more" if asked > left else ""
                raise TemporaryError(
                    f"hub unreachable for {waited:.0f} s{wish} ({words}): {_named(settings)}. Nothing is lost: run the "
                    "same command again."
                ) from error
            wait = min(max(pause * random.uniform(0.5, 1.5), asked), left)
        LOG.warning(f"{settings.dataset} can't be reached ({words}); trying again in {wait:.1f} s")
        _sleep(wait, settings, waited)
        pause = min(2 * pause, LONGEST_PAUSE)


def _sleep(wait: float, settings: SourceSettings, waited: float) -> None:
    """Wait with a sign of life every HEARTBEAT seconds, and one that people see every LONGEST_PAUSE."""
    told, end = waited, waited + wait
    while waited < end:
        beat(f"the hub, waiting for {settings.dataset}")
        pause = min(HEARTBEAT, end - waited)
        sleep(pause)
        waited += pause
        if waited - told >= LONGEST_PAUSE:
            told = waited
            LOG.warning(f"still waiting for {settings.dataset}: {waited:.0f} s of {PATIENCE:.0f}")
    beat()


def _may_pass(error: Exception) -> bool:
    """Return whether this is the world's fault, not the program's: the connection, or bytes that make no sense."""
    from huggingface_hub import errors

    if isinstance(error, OSError) and error.errno in OUR_SIDE:
        return False
    http_error: type[Exception] = getattr(errors, "HTTPError")  # noqa: B009  that of whichever HTTP client it uses
    return isinstance(error, (OSError, EOFError, http_error, *GARBLED)) or _misread(error)


def _misread(error: Exception) -> bool:
    """Return whether the hub's client stumbled over JSON of another kind than the hub's, such as a list: over an answer
    of whoever stands between. A mistake of ours isn't raised in the client's own lines."""
    if not isinstance(error, (AttributeError, KeyError, TypeError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("huggingface_hub.")


def _mistake(error: Exception, settings: SourceSettings) -> UserError | None:
    """Return what to tell the user where no waiting helps: the settings are wrong, or the hub refuses."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE and isinstance(error, ConnectionError):
        return UserError(f"{_named(settings)}, and HF_HUB_OFFLINE is set. The hub is needed. Unset that variable.")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{_named(settings)}. The dataset has no revision {settings.revision!r}. Set data.revision.")
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return UserError(
            f"{_named(settings)}. The hub has no such dataset, or it is private. Set data.dataset, or log in with `hf "
            "auth login`."
        )
    status = next((found for response in _responses(error) if (found := response.status_code)), None)
    if status in (401, 403):
        return UserError(
            f"{_named(settings)}, and the hub refuses access ({_words(error)}). The dataset may be gated: accept its "
            "terms on its page and log in with `hf auth login`, or set data.dataset to another."
        )
    wrong = isinstance(error, (ValueError, FileNotFoundError)) and not isinstance(error, GARBLED)
    wrong = wrong or "Dataset scripts are no longer supported" in str(error)  # which would be a stranger's code
    if status != 404 and (status is not None or not wrong):
        return None
    blamed = {"Bad split": "split", "BuilderConfig": "name", "Config name": "name", "Revision": "revision"}
    setting = next((setting for words, setting in blamed.items() if _words(error).startswith(words)), "dataset")
    return UserError(f"{_named(settings)}. That doesn't fit: {_words(error)} Set data.{setting}.")


def _responses(error: BaseException) -> Iterator[Any]:
    """Yield the HTTP responses behind an error, its own and those of the errors that caused it."""
    cause: BaseException | None = error
    while cause is not None:
        if (response := getattr(cause, "response", None)) is not None:
            yield response
        cause = cause.__cause__ or cause.__context__


def _asked_to_wait(error: Exception) -> float:
    """Return the seconds that the hub's Retry-After asks for; 0 where it asks for none."""
    for response in _responses(error):
        value = str(response.headers.get("retry-after", ""))
        if value.isdecimal():
            return float(value)
        with suppress(ValueError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    return 0.0


def _words(error: Exception) -> str:
    """Return an error in one line that fits a screen."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= LONGEST_WORDS else f"{words[:LONGEST_WORDS]}..."


def _named(settings: SourceSettings) -> str:
    return f"data.dataset is {settings.dataset!r}, name {settings.name!r}, split {settings.split!r}"


def pin_hub(settings: S) -> S:
    """Return the settings with the commit that their revision means today, so that the text never changes on the way.

    A local folder has none, but an absolute path. Raises UserError and TemporaryError as reading does.
    """
    if settings.dataset and os.path.exists(settings.dataset):
        return settings.model_copy(update={"dataset": os.path.abspath(settings.dataset)})
    if COMMIT.fullmatch(settings.revision or ""):
        return settings
    from huggingface_hub import HfApi

    found = _persevere(lambda: HfApi().dataset_info(str(settings.dataset), revision=settings.revision), settings)
    return settings.model_copy(update={"revision": found.sha})


def fingerprint_hub(settings: SourceSettings) -> str:
    """The names alone, the commit among them once a run has pinned it."""
    names = [settings.dataset, settings.name, settings.split, settings.revision, settings.text_field]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
