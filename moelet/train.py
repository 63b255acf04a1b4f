"""Training: from settings to a run folder. One code path, whatever the machine.

`start` and `resume` make the run folder, the tokenizer and the identity; `train` is the loop, which stops on request.
What is done at each step is `moelet.session`'s.
"""

import math
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moelet.attention import ATTENTION
from moelet.budget import Clock
from moelet.console import Progress, duration, table
from moelet.data import PREFETCH_BATCHES, Batch, Validation, read_validation, training_batches, training_texts
from moelet.errors import Interrupted, UserError, pick
from moelet.experts import ACTIVATIONS, BACKENDS
from moelet.fit import find_batch_size
from moelet.hparams import Hparams, read_hparams, read_hparams_inside
from moelet.identity import (
    ACCEPTED,
    Marks,
    changes_text,
    described,
    identity,
    note_accepted,
    require_length,
    require_same,
    reread,
    with_batch_size_of,
    with_commits_of,
)
from moelet.kernels.native import why_not
from moelet.loss import BALANCE
from moelet.metrics import METRICS_FILE, cut_metrics, last_elapsed, matrix_rate
from moelet.moe import ROUTERS
from moelet.optim import OPTIMIZERS, SCHEDULES, Plan
from moelet.parallel.layout import layout_of, sizes_for
from moelet.parallel.orders import END, advice, build_everywhere, count_parameters, order_restore
from moelet.parallel.ranks import ALONE, Team
from moelet.parallel.watch import Watch
from moelet.precision import choose_device, choose_dtype
from moelet.session import Session
from moelet.state import Training, restore, snapshot
from moelet.stopping import StopAsked, stop_signals
from moelet.storage import checkpoint
from moelet.storage.checkpoint import HPARAMS, TOKENIZER, load_run_settings
from moelet.storage.disk import write_file
from moelet.storage.lock import LOCK, Held, lock
from moelet.storage.manifest import UNSAVED, checkpoint_steps, folders, name_run, note_unsaved, read_state, sweep
from moelet.text.documents import Cursor
from moelet.text.prefetch import Reader
from moelet.text.shards import folder_of, read_manifest
from moelet.text.sources import SOURCES
from moelet.tokenizer import Tokenizer
from moelet.trackers import TRACKERS, tracking

NAMED: dict[tuple[str, str], Mapping[str, Any]] = {  # settings that name something in a table
    ("data", "source"): SOURCES,
    ("optim", "optimizer"): OPTIMIZERS,
    ("optim", "schedule"): SCHEDULES,
    ("balance", "loss"): BALANCE,
    ("model", "activation"): ACTIVATIONS,
    ("model", "attention"): ATTENTION,
    ("model", "experts"): {**BACKENDS, "auto": None},
    ("model", "router"): ROUTERS,
    ("train", "track"): TRACKERS,
}


def check(hparams: Hparams, team: Team | None = ALONE) -> None:
    """Raise UserError, before any work, for a name that no table holds and for what this machine hasn't got, ranks
    included; None: nobody knows yet how many there will be."""
    if team is not None:
        sizes_for(hparams.parallel, hparams.model, team.size)
    if team is not None and hparams.train.batch_size == "auto" and not team.alone:
        raise UserError(
            f'train.batch_size is "auto" and there are {team.size} ranks. It is looked for by one process alone. Set '
            "train.batch_size to the sequences of a micro-step over all ranks."
        )
    for (section, key), known in NAMED.items():
        name = getattr(getattr(hparams, section), key)
        if name is not None:
            pick(known, name, f"{section}.{key}")
    for part in hparams.data.parts:
        pick(SOURCES, part.source, "data.mix.source")
    if hparams.train.track is not None:
        TRACKERS[hparams.train.track].check()
    choose_dtype(hparams.train.precision, choose_device(hparams.train.device))


def pinned(hparams: Hparams) -> Hparams:
    """Return the settings with all they name made explicit: absolute paths, the commit of a dataset.

    So the run can go on from anywhere, on the same text. Raises UserError and TemporaryError as the source does.
    """
    data = pick(SOURCES, hparams.data.source, "data.source").pin(hparams.data)
    tokenizer = hparams.tokenizer
    if tokenizer.file is not None:
        tokenizer = tokenizer.model_copy(update={"file": os.path.abspath(tokenizer.file)})
    return hparams.model_copy(update={"data": data, "tokenizer": tokenizer})


def make_tokenizer(hparams: Hparams) -> Tokenizer:
    """Return the tokenizer of the settings: loaded, or trained on the run's own training text.

    Raises UserError when the text was prepared with another, or cut in other pieces.
    """
    settings, data = hparams.tokenizer, hparams.data
    if data.source == "prepared":
        folder = folder_of(data)
        manifest = read_manifest(folder)
        tokenizer = Tokenizer.load(settings.file) if settings.file else Tokenizer.load_inside(folder, TOKENIZER)
        if (tokenizer.fingerprint, data.piece_chars) != (manifest["tokenizer"], manifest["piece_chars"]):
            raise UserError(
                f"{folder} was prepared with another tokenizer, or in pieces of {manifest['piece_chars']} characters. "
                f"Set tokenizer.file to null and data.piece_chars to {manifest['piece_chars']}, or prepare it again."
            )
        return tokenizer
    if settings.file is not None:
        return Tokenizer.load(Path(settings.file))
    texts = training_texts(data, hparams.train.seed)
    return Tokenizer.train(texts, settings.vocab_size, settings.algorithm, settings.sample_bytes)


def begin_run(run: Path, training: Training) -> None:
    """Make the folder of a run that stands at its first step."""
    hparams, tokenizer = training.hparams, training.tokenizer
    with lock(run):
        training.run_id = name_run(run)
        checkpoint.save(run, snapshot(training, identity(hparams, tokenizer)))
        write_file(run / TOKENIZER, tokenizer.model_bytes)
        write_file(run / HPARAMS, hparams.to_json().encode())  # last: without it a folder isn't a run


def refuse_folder(run: Path) -> None:
    """Raise UserError when there is something in the folder that an attempt cut short hasn't left."""
    cut_short = (run / LOCK).exists() and not (run / HPARAMS).exists()
    if run.exists() and not (run.is_dir() and (cut_short or not any(run.iterdir()))):
        raise UserError(
            f"{run} is there already and isn't an empty folder. The new run needs a folder of its own. Give another "
            "--run."
        )


def start(hparams: Hparams, run: Path, progress: Progress, began: float | None = None, team: Team = ALONE) -> None:
    """Train from the first step in folder `run`; `began` is when the process did, by time.monotonic(). Of several ranks
    the leader calls this, the others `moelet.follow.follow`.

    Raises UserError before any work when the settings don't fit, or the folder holds a complete checkpoint or files
    that are not a run's.
    """
    clock = Clock(0.0, time.monotonic() if began is None else began)
    check(hparams, team)
    if run.is_dir() and any(run.iterdir()) and not (run / LOCK).exists():
        raise UserError(
            f"{run} holds files that are not a run's. A new run needs a folder that is empty or not there yet. Give "
            "another --run."
        )
    with lock(run) as held:
        if folders(run):
            raise UserError(
                f"{run} holds a run with checkpoints. A new run needs a folder of its own: give another --run, or go "
                f"on with this one: python -m moelet train --resume {shlex.quote(str(run))}"
            )
        refuse_to_forget(run)
        train(_fresh(pinned(hparams), run, progress, team), run, progress, clock, held)


def refuse_to_forget(run: Path) -> None:
    """Raise UserError for a folder without checkpoints whose run has had some: they are elsewhere for the moment.

    A run that was killed before its first one has a note of that, and starts over.
    """
    if (run / UNSAVED).exists() or not any((run / name).exists() for name in (METRICS_FILE, TOKENIZER)):
        return
    raise UserError(
        f"{run} holds a run that has had checkpoints, and {run / 'checkpoints'} holds none now. To go on it needs "
        "them. Nothing was changed. Put them back (is a disk not mounted, was the folder moved?) and run the same "
        "command again; to start over, begin a new run: python -m moelet train "
        f"{shlex.quote(str(run / HPARAMS))} --run ANOTHER."
    )


def _fresh(hparams: Hparams, run: Path, progress: Progress, team: Team) -> Training:
    """Return a run at its first step: its folder cleared of what an earlier try left, its tokenizer made, its batch
    size found."""
    note_unsaved(run)
    for leftover in (METRICS_FILE, TOKENIZER, ACCEPTED):
        (run / leftover).unlink(missing_ok=True)
    sweep(run)
    write_file(run / HPARAMS, hparams.to_json().encode())
    run_id = name_run(run)
    tokenizer = make_tokenizer(hparams)
    write_file(run / TOKENIZER, tokenizer.model_bytes)
    hparams = find_batch_size(hparams, tokenizer, run / TOKENIZER, progress)
    write_file(run / HPARAMS, hparams.to_json().encode())
    training = build_everywhere(hparams, tokenizer, team, run)
    training.run_id = run_id
    return training


def resume(
    run: Path,
    changes: Sequence[str],
    progress: Progress,
    began: float | None = None,
    settings: Path | None = None,
    seconds: float | None = None,
    accept: bool = False,
    team: Team = ALONE,
) -> None:
    """Go on with the run in folder `run` from its newest checkpoint that verifies; from its start when it has none.

    The settings are the run's own, or those in the file `settings`, with `changes`. With `seconds` the run ends that
    long after this command began. Raises UserError when settings or files would make it another run, unless `accept`.
    """
    if not is_run(run):
        raise UserError(f"{run} is not a run folder: it holds no {HPARAMS}. Give the folder of a run to resume.")
    with lock(run) as held:
        spent = spent_on(run)
        limit = [] if seconds is None else [f"train.time_budget={spent + seconds}"]
        every = [*changes, *limit]
        hparams = read_hparams(settings, every) if settings else read_hparams_inside(run, HPARAMS, every)
        saved = read_hparams_inside(run, HPARAMS)
        if not any(change.startswith("train.batch_size=") for change in changes):
            hparams = with_batch_size_of(saved, hparams)
        hparams = pinned(with_commits_of(saved, hparams))
        check(hparams, team)
        if folders(run):
            training = _restored(hparams, run, progress, accept, team)
            total = training.total_steps
            progress.say(f"resumed at step {training.step}" + (f" of {total}" if total else ""))
            if total == training.step:
                progress.say("this run is finished: nothing is left to train, whatever the time.")
        else:
            refuse_to_forget(run)
            progress.say(f"{run} has no checkpoint yet: starting over.")
            training = _fresh(hparams, run, progress, team)
        train(training, run, progress, Clock(spent, time.monotonic() if began is None else began), held)


def is_run(run: Path) -> bool:
    """Return whether the folder holds a run, trained or only begun."""
    return (run / HPARAMS).is_file()


def spent_on(run: Path) -> float:
    """Return the seconds that earlier sessions of the run took, as far as they were noted."""
    steps = checkpoint_steps(run)
    state = read_state(run, steps[-1]) if steps else {}
    saved = state.get("elapsed")  # of a checkpoint that nobody has verified yet
    return max(last_elapsed(run), saved if isinstance(saved, float) and 0 <= saved < math.inf else 0.0)


def _restored(hparams: Hparams, run: Path, progress: Progress, accept: bool, team: Team) -> Training:
    """Return the run as its newest checkpoint that verifies has it, with the changes that are accepted; metrics.jsonl
    is cut back to that step."""
    saved_hparams, tokenizer = load_run_settings(run)
    if hparams.tokenizer != saved_hparams.tokenizer and hparams.tokenizer.file is not None:
        tokenizer = Tokenizer.load(Path(hparams.tokenizer.file))
    saved, passed = checkpoint.read_newest(run, layout_of(hparams, team).part)
    progress.say(*passed)
    if saved is None:
        raise UserError(
            f"no checkpoint of {run} verifies (see above). Nothing was changed. Restore one from a copy, or start "
            "a new run in another folder."
        )
    now = identity(hparams, tokenizer)
    changed = require_same(run, saved.identity, now, saved_hparams, hparams, accept)
    checkpoint.refuse_other_shapes(run, saved.shapes, saved_hparams, tokenizer)
    hparams = find_batch_size(hparams, tokenizer, run / TOKENIZER, progress)
    training = build_everywhere(hparams, tokenizer, team, run)
    plan = training.plan
    order_restore(training, run, saved.step)
    restore(training, saved)
    sweep(run)
    if changed:
        lines = described(changed, saved.identity, now, saved_hparams, hparams)
        _adopt(training, changed, plan, saved.identity)
        lines = note_accepted(run, saved.step, saved.identity, now, lines)
        progress.say(f"goes on from step {saved.step} with accepted changes, noted in {run / ACCEPTED}:", *lines)
    write_file(run / HPARAMS, hparams.to_json().encode())
    cut_metrics(run, saved.step if training.pending is None else saved.step - 1)
    return training


def _adopt(training: Training, changed: list[str], plan: Plan, before: Marks) -> None:
    """Make the run what the accepted changes say: of another length, or on another text, from that text's start."""
    if "length" in changed:
        require_length(training.step, plan)
        training.plan = plan
    if changes_text(changed, before):
        training.cursor = reread(training.cursor)


def train(training: Training, run: Path, progress: Progress, clock: Clock, held: Held) -> None:
    """Train to the last step.

    Raises Interrupted when a signal asks to stop and TemporaryError when the data's source is away, with everything
    saved; TemporaryError when it couldn't be saved.
    """
    hparams, tokenizer = training.hparams, training.tokenizer
    length, size, sizes = hparams.model.max_length, hparams.batch_size, hparams.micro_batches
    validation = read_validation(hparams.data, tokenizer, length, size, hparams.train.eval_tokens, "validation")
    introduce(training, run, validation, progress)
    rate = matrix_rate(training.device, training.dtype) * training.team.size

    def begin(cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        return training_batches(hparams.data, tokenizer, length, sizes, hparams.train.seed, cursor)

    with (
        stop_signals() as asked,
        Watch(training.team, advice(run)),
        Reader(begin, training.cursor, PREFETCH_BATCHES, hparams.data.reader_patience) as batches,
        tracking(run, hparams, progress) as tracked,
        progress,
    ):
        marks = identity(hparams, tokenizer)
        session = Session(training, run, progress, validation, rate, marks, clock, tracked, held, asked)
        with suppress(StopAsked):
            session.catch_up()
            while training.total_steps is None or training.step < training.total_steps:
                session.advance(batches)
                if asked.save:
                    asked.save = False
                    if session.save():
                        progress.say(f"saved at step {training.step}, as asked.")
                if asked:
                    break
        if asked.stop is not None and not ended(training):
            session.save(final=True)
            interrupted = Interrupted(
                asked.stop, f"interrupted and saved at step {training.step}. Go on with: {session.again}"
            )
            training.team.order(END, code=interrupted.exit_code)
            raise interrupted
        training.team.order(END, code=0)


def ended(training: Training) -> bool:
    """Return whether all is done: the last step made, and its evaluation."""
    return training.step == training.total_steps and training.pending is None


def introduce(training: Training, run: Path, validation: Validation, progress: Progress) -> None:
    """Say what is about to be trained, on what, where."""
    hparams = training.hparams
    count, settings = count_parameters(training), hparams.model
    budget = hparams.train.time_budget
    length = f"{training.total_steps:,} " if budget is None else f"{duration(budget)} in all, "
    experts = f"{settings.n_experts} experts top-{settings.top_k}" if settings.n_experts > 1 else "dense"
    rows = [
        ("run", str(run)),
        ("model", f"{settings.n_layers} layers x {settings.d_model}, {experts}, {count / 1e6:.1f}M parameters"),
        ("text", f"{hparams.data.source}, vocabulary {training.tokenizer.vocab_size}"),
        ("held out", f"{validation.n_tokens:,} tokens, {validation.n_bytes:,} bytes"),
        ("length", f"{length}steps of {hparams.tokens_per_step:,} tokens"),
        ("machine", f"{training.device.type}, {str(training.dtype).removeprefix('torch.')}"),
    ]
    if not training.team.alone:
        sizes = training.layout.sizes
        parts = "; no sample while training, as no rank has all of the model" if training.layout.divided else ""
        rows.append(("ranks", f"{sizes.data} data x {sizes.shard} shard x {sizes.expert} expert{parts}"))
    if training.device.type == "cpu" and (reason := why_not(training.dtype)) is not None:
        rows.append(("kernels", f"torch's, half as fast as ours: {reason}"))
    progress.say(*table("moelet", rows))
