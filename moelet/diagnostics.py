"""What is written down of a step in trouble, where it began and in which documents, and what its run ends with.

Nothing of this is noted while all is well. Which documents a step's rows came from follows from the cursor before it:
the window is read again.
"""

import json
import math
import shlex
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moelet.data import encoded, epochs, packed
from moelet.errors import UserError
from moelet.finite import Trouble
from moelet.hparams import Hparams
from moelet.sections import OptimSettings
from moelet.storage.disk import write_file
from moelet.text.documents import Cursor
from moelet.tokenizer import Tokenizer

FOLDER = "diagnostics"
SHOWN_DOCUMENTS, WORST_ROWS = 3, 8  # that the message names; that the file spells out


class RowOrigin(NamedTuple):
    """Where a row of a batch is from."""

    epoch: int
    window: int
    window_row: int  # before the window's rows are shuffled
    pieces: list[str]  # the names of its pieces of text: document, and the character that the piece begins at


def row_origins(hparams: Hparams, tokenizer: Tokenizer, at: Cursor, n_rows: int) -> list[RowOrigin]:
    """Return where each of the next `n_rows` rows behind cursor `at` is from, in their order."""
    length, seed = hparams.model.max_length, hparams.train.seed
    found: list[RowOrigin] = []
    for pieces, window in epochs(hparams.data, seed, at):
        names = [piece.name for piece in pieces]
        spans = _rows_of(encoded(pieces, tokenizer), length, hparams.data.packing)
        order = np.random.default_rng([seed, window["epoch"], window["window"]]).permutation(len(spans))
        for row in islice(order.tolist(), window["row"], None):
            found.append(RowOrigin(window["epoch"], window["window"], row, [names[k] for k in spans[row]]))
            if len(found) == n_rows:
                return found
    return found


def _rows_of(ids: list[np.ndarray], length: int, packing: bool) -> list[range]:
    """Return for each row of a window which pieces it holds."""
    if not packing:
        return [range(k, k + 1) for k, piece in enumerate(ids) for _ in packed([piece], length)]
    ends = np.cumsum([len(piece) for piece in ids])
    first = np.arange(math.ceil((ends[-1] - 1) / length)) * length
    last = np.minimum(first + length, ends[-1] - 1)  # a row has one id more than inputs
    return [range(a, b + 1) for a, b in zip(*(ends.searchsorted(at, "right") for at in (first, last)), strict=True)]


def report(hparams: Hparams, tokenizer: Tokenizer, at: Cursor, step: int, trouble: Trouble) -> dict[str, Any]:
    """Return what is known about the step in trouble that began at cursor `at`; its worst rows come first."""
    origins: list[RowOrigin] | str
    try:
        origins = row_origins(hparams, tokenizer, at, len(trouble.row_losses))
    except Exception as error:  # whatever the source says now, the trouble is to be told
        origins = f"not found out: {type(error).__name__}: {error}"
    worst = sorted(range(len(trouble.row_losses)), key=lambda row: _badness(trouble.row_losses[row]), reverse=True)
    rows = [
        {"row": row, "loss": _as_json(trouble.row_losses[row])}
        | (origins[row]._asdict() if isinstance(origins, list) else {"pieces": []})
        for row in worst
    ]
    return {
        "step": step,
        **trouble._asdict(),
        "loss": _as_json(trouble.loss),
        "grad_norm": _as_json(trouble.grad_norm),
        "row_losses": rows,
        "documents": origins if isinstance(origins, str) else "named at each row",
        "cursor": at,
        "seed": hparams.train.seed,
    }


def _as_json(number: float) -> float | str:
    """Return the number, in words where JSON has none for it."""
    return number if math.isfinite(number) else str(number)


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def keep(run: Path, number: int, found: dict[str, Any]) -> str:
    """Write the report of batch `number` and return in words what a person is told of it."""
    folder = run / FOLDER
    path = folder / f"batch-{number:08}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_file(path, (json.dumps(found, indent=1) + "\n").encode())
        where = f"Written down: {path}."
    except OSError as error:
        where = f"{path} can't be written ({error.strerror})."
    pieces = list(dict.fromkeys(name for row in found["row_losses"][:WORST_ROWS] for name in row["pieces"]))
    named = ", ".join(pieces[:SHOWN_DOCUMENTS]) + (
        f" and {more} more" if (more := len(pieces) - SHOWN_DOCUMENTS) > 0 else ""
    )
    layer = found["layer"] or "no layer that could be told"
    return f"It begins in {layer}; the worst rows are of {named or 'documents that could not be told'}. {where}"


def bad_step(error: UserError, words: str, run: Path, kept: list[int], optim: OptimSettings) -> UserError:
    """Return the error that a bad step ends a run with; `words` say what is known, `kept` are its checkpoints."""
    saved = f"The checkpoint of step {kept[-1]} is untouched" if kept else "Nothing is saved, as warned above"
    again = f"python -m moelet train --resume {shlex.quote(str(run))} --set"
    return UserError(
        f"{error}\n  {words}\n"
        f"  {saved}. Either\n"
        f"  pass this batch over: {again} train.bad_step=skip\n"
        f"  or go on more carefully: {again} optim.lr={optim.lr / 3:.1g} --accept-changes\n"
        f"  or start a new run with a longer optim.warmup_steps (it is {optim.warmup_steps}) or another "
        f"optim.grad_clip (it is {optim.grad_clip})."
    )


def no_memory(
    error: UserError, run: Path, kept: list[int], unsaved: str, step: int, peak: float, hparams: Hparams
) -> UserError:
    """Return the error that a run ends with when a single row doesn't fit; `kept` are its checkpoints, `peak` in MiB,
    `unsaved` why what came after them isn't saved."""
    saved = (f"saved are all steps up to {kept[-1]}" if kept else "nothing is saved") + unsaved
    again = f"python -m moelet train --resume {shlex.quote(str(run))}"
    recompute = "" if hparams.train.checkpoint_activations else f"  {again} --set train.checkpoint_activations=true\n"
    return UserError(
        f"{error}, at step {step + 1}; peak {peak:.0f} MiB; {saved}. Either:\n{recompute}"
        f"  {again}, where more memory is free: end what else uses it, or move {run} to another machine\n"
        "  or start a new run with a lower model.max_length (attention's memory grows with it), a lower "
        'model.d_ff or model.d_model, or train.precision "bf16"'
    )
