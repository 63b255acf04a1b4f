"""What a run is, as fingerprints; how two differ; and what may change on the way where somebody says so.

A checkpoint carries the fingerprints of its run. A resume whose own differ is refused before any work, with both;
`--accept-changes` lets pass what the weights survive, and the folder keeps a record of it.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moelet.data import START
from moelet.errors import UserError, pick
from moelet.hparams import Hparams
from moelet.optim import Plan
from moelet.precision import choose_device, choose_dtype
from moelet.sections import LENGTHS, READING
from moelet.storage.disk import write_file
from moelet.storage.intake import lines_inside
from moelet.text.documents import Cursor
from moelet.text.sources import SOURCES, earlier_fingerprint
from moelet.tokenizer import Tokenizer

Marks = dict[str, str]  # fingerprints by what they are of

# what may change at any resume: nothing that the weights depend on, or only where the run would have ended
FREE_SETTINGS = {
    "run", "device", "eval_steps", "eval_tokens", "log_steps", "checkpoint_steps", "keep_checkpoints", "sample_prompt",
    "track", "memory_limit_gb", "checkpoint_activations", "spike_deviations", "bad_step",
    "on_save_failure",
}  # fmt: skip
FIXED = ("model", "tokenizer", "optimizer")  # what saved numbers are numbers of: nobody can accept another
ACCEPTED = "accepted.jsonl"  # in the run's folder: which changes somebody accepted, and at what step
SHOWN = 16  # characters of a fingerprint in messages


def identity(hparams: Hparams, tokenizer: Tokenizer) -> Marks:
    """Return the fingerprints that a checkpoint and the run resuming it must share.

    Where files lie doesn't count, only what is in them: text and tokenizer have fingerprints of their own. Nor does
    how a step is cut into micro-steps, where the settings give its size as a whole, or how many ranks make it. "auto"
    counts as what it means.
    """
    settings = _counted(hparams)
    text = pick(SOURCES, hparams.data.source, "data.source").fingerprint(hparams.data)
    steps = hparams.total_steps
    dtype = choose_dtype(hparams.train.precision, choose_device(hparams.train.device))
    return {
        "settings": _digest(settings),
        "model": hparams.model.fingerprint,
        "length": "a time budget" if steps is None else f"{steps} steps",
        "precision": str(dtype).removeprefix("torch."),
        "optimizer": hparams.optim.optimizer,
        "order": _digest([settings["data"], hparams.train.seed, text]),
        "tokenizer": tokenizer.fingerprint,
        "data": text,
    }


def _counted(hparams: Hparams) -> dict[str, Any]:
    """Return the settings that make the run this one and no other."""
    unread: Any = {"files": True, "mix": {"__all__": {"files"}}, **dict.fromkeys(READING, True)}
    cut = {"global_batch_size"} if hparams.train.global_batch_size is None else {"batch_size", "gradient_accumulation"}
    left_out: Any = {"train": FREE_SETTINGS.union(LENGTHS, cut), "data": unread, "tokenizer": {"file"}}
    left_out |= {"parallel": True}
    left_out |= {name: getattr(hparams, name).unsaid for name in ("model", "optim", "balance")}
    return hparams.model_dump(mode="json", exclude=left_out)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def differing(saved: Marks, now: Marks) -> list[str]:
    """Return the names of the fingerprints that differ, of those that the checkpoint has.

    A run may always be put on a time budget: from there on the clock decides how long it is.
    """
    budget = now["length"] == "a time budget"
    return [name for name in saved if saved[name] != now.get(name) and not (name == "length" and budget)]


def described(names: Collection[str], saved: Marks, now: Marks, before: Hparams, after: Hparams) -> list[str]:
    """Return a line for each fingerprint of `names`, and one for each setting that may be why."""
    same = FREE_SETTINGS | READING | (set() if "length" in names else set(LENGTHS))
    lines = [f"{name}: the run has {saved[name][:SHOWN]}, given is {str(now.get(name))[:SHOWN]}" for name in names]
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return lines + [
        f"{section}.{key}: the run has {json.dumps(value)}, given is {json.dumps(new[section][key])}"
        for section, settings in old.items()
        for key, value in settings.items()
        if value != new[section][key] and key not in same and section != "parallel"
    ]


def require_same(run: Path, saved: Marks, now: Marks, before: Hparams, after: Hparams, accept: bool) -> list[str]:
    """Return the names of what has changed and was accepted, now or in an earlier session: none, most of the time.

    Raises UserError, before anything is changed, where nobody has accepted it, or nobody can.
    """
    different = differing(saved, now)
    if "data" in different and "order" not in saved and saved["data"] == earlier_fingerprint(after.data):
        different.remove("data")
    if not different:
        return []
    agreed = _agreed(run, saved, now)
    last = agreed[-1] if agreed else saved  # what the settings in the folder are those of
    new = [name for name in differing(last, now) if name in different]
    lines = "\n  ".join(described(new or different, last if new else saved, now, before, after))
    differ = f"{run} can't go on as another run; these differ:\n  {lines}\nNothing was changed. "
    fixed = [name for name in different if name in FIXED]
    if fixed:
        raise UserError(
            f"{differ}Resume with the run's own settings, tokenizer and data, or start a new run. --accept-changes "
            f"doesn't help: what is saved is of the run's own {' and '.join(fixed)}."
        )
    if not (accept or any(not differing(marks, now) for marks in agreed)):
        raise UserError(
            f"{differ}Resume with the run's own settings, tokenizer and data, start a new run, or go on with what is "
            "given, as a run that is no longer the one begun: --accept-changes."
        )
    return different


def _agreed(run: Path, saved: Marks, now: Marks) -> list[Marks]:
    """Return what the run may be by changes that were accepted since, in order: each has the names that `now` has."""
    reached = [saved]
    for entry in read_accepted(run):
        if entry["from"] in reached and isinstance(entry["to"], dict) and entry["to"].keys() == now.keys():
            reached.append({name: str(mark) for name, mark in entry["to"].items()})
    return reached[1:]


def read_accepted(run: Path) -> list[dict[str, Any]]:
    """Return the changes that were accepted in the life of a run, in order; [] where none can be read."""
    try:
        lines = lines_inside(run, ACCEPTED)
        return [entry for line in lines if {"step", "from", "to", "changes"} <= set(entry := json.loads(line))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def note_accepted(run: Path, step: int, saved: Marks, now: Marks, changes: list[str]) -> list[str]:
    """Keep the record of accepted changes, on the disk before anything acts on them; return what it says of these."""
    entries = read_accepted(run)
    known = next((entry for entry in entries if (entry["from"], entry["to"]) == (saved, now)), None)
    if known is not None:  # a second resume from there, which finds the new settings in the folder already
        return list(known["changes"])
    entries.append({"step": step, "from": saved, "to": now, "changes": changes})
    write_file(run / ACCEPTED, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
    return changes


def require_length(step: int, plan: Plan) -> None:
    """Raise UserError where the run has made more steps than it is now to have."""
    if plan and step > plan[-1][1]:
        raise UserError(
            f"the run has made {step} steps and is now to have {plan[-1][1]} in all. It can't be shorter than it is. "
            f"Set train.train_steps to at least {step}, or train.train_tokens to as many tokens."
        )


def changes_text(changed: list[str], before: Marks) -> bool:
    """Return whether a cursor is of no use after the changes. Runs from before `order` was noted don't say."""
    return bool({"order", "data"} & set(changed)) or ("order" not in before and "settings" in changed)


def reread(cursor: Cursor) -> Cursor:
    """Return the cursor of a run whose text has changed: the start of it, in the order of a pass not yet made."""
    return {**START, "epoch": cursor["epoch"] + 1}


def with_commits_of(saved: Hparams, hparams: Hparams) -> Hparams:
    """Return `hparams` where a dataset without a revision stays at the commit that the run began with."""

    def keep(old: Any, new: Any) -> Any:
        same = (old.dataset, old.name) == (new.dataset, new.name) and new.revision is None
        return new.model_copy(update={"revision": old.revision}) if same else new

    data = keep(saved.data, hparams.data)
    if data.parts and len(saved.data.parts) == len(data.parts):
        data = data.model_copy(update={"mix": list(map(keep, saved.data.parts, data.parts))})
    return hparams.model_copy(update={"data": data})


def with_batch_size_of(saved: Hparams, hparams: Hparams) -> Hparams:
    """Return `hparams` where "auto" stays at the size that the run has found, as long as a step's is the same."""
    old, new = saved.train, hparams.train
    if new.batch_size != "auto" or old.batch_size == "auto" or old.global_batch_size != new.global_batch_size:
        return hparams
    kept = new.model_copy(update={"batch_size": old.batch_size, "memory_limit_gb": None})
    return hparams.model_copy(update={"train": kept})
