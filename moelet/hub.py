"""Text from the Hugging Face Hub: any dataset there, streamed."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from moelet.documents import Cursor, Items, checked, no_field
from moelet.errors import TemporaryError, UserError
from moelet.hparams import SourceSettings


def read_hub(settings: SourceSettings, seed: int, epoch: int, cursor: Cursor | None) -> Items:
    """A cursor is the stream's own state, exact because its shuffle buffer holds one row, and the rows read."""
    logging.getLogger("datasets.iterable_dataset").addFilter(_is_no_false_alarm)
    row = cursor["row"] if cursor else 0
    with _hub_errors(settings):
        import datasets

        rows = datasets.load_dataset(
            settings.dataset, name=settings.name, split=settings.split, revision=settings.revision, streaming=True
        )
        fields = rows.column_names or list(next(iter(rows), {settings.text_field: None}))
        if settings.text_field not in fields:
            raise no_field(f"dataset {settings.dataset}", settings.text_field, fields)
        rows = rows.select_columns([settings.text_field])
        rows = rows.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=10)  # mixes up to 10 files, row by row
        rows.set_epoch(epoch)
        if cursor:
            rows.load_state_dict(cursor["stream"])
        for record in rows:
            row += 1
            item = checked(record[settings.text_field], f"{settings.dataset}:{row}")
            yield item, {"stream": rows.state_dict(), "row": row}


def _is_no_false_alarm(record: logging.LogRecord) -> bool:
    """Drop the warning that a shuffle buffer's content is lost at a resume: ours holds one row, already yielded."""
    return "state dict of a shuffle buffer" not in record.getMessage()


@contextmanager
def _hub_errors(settings: SourceSettings) -> Iterator[None]:
    """Turn what `datasets` raises into UserError (the settings are wrong) or TemporaryError (no connection)."""
    from huggingface_hub import errors

    http_error: type[Exception] = getattr(errors, "HTTPError")  # noqa: B009  that of whichever HTTP client it uses
    given = f"data.dataset is {settings.dataset!r}, name {settings.name!r}, split {settings.split!r}"
    try:
        yield
    except UserError:
        raise
    except (ValueError, FileNotFoundError) as error:
        reason = " ".join(str(error).split())
        blamed = {"Bad split": "split", "BuilderConfig": "name", "Config name": "name"}
        setting = next((setting for words, setting in blamed.items() if reason.startswith(words)), "dataset")
        raise UserError(f"{given}. That doesn't fit: {reason} Set data.{setting}.") from error
    except (OSError, http_error) as error:
        raise TemporaryError(f"{given} can't be reached now ({error}). Run the same command again.") from error


def fingerprint_hub(settings: SourceSettings) -> str:
    """The names alone: the commit behind a branch is known only once the network answered. Set data.revision to pin."""
    names = [settings.dataset, settings.name, settings.split, settings.revision, settings.text_field]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()
