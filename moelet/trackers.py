"""Trackers: the numbers of metrics.jsonl as they come, in TensorBoard, Weights & Biases or Trackio.

The run folder has all of them with or without a tracker. Each time a run begins or goes on, a tracker is first brought
to what metrics.jsonl holds, which is cut back to the checkpoint, and then gets every new row. What a tracker's package
does wrong never ends a run.

`train.track` names one of TRACKERS. Their packages (the extra `track`) are imported only where one is asked for.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from moelet.console import Progress
from moelet.errors import UserError, require
from moelet.hparams import Hparams
from moelet.metrics import read_rows
from moelet.storage.disk import write_file
from moelet.storage.intake import lines_inside

PROJECT = "moelet"  # what Weights & Biases and Trackio file runs under
IDENTITY = "tracker.json"  # in the run folder: what a tracker calls the run, so that a resume goes on with it
FINISH_SECONDS = 60.0  # what Weights & Biases may take to upload what is left when a run ends
Row = dict[str, Any]


def numbers(row: Row) -> dict[str, float]:
    """Return the numbers of a row by name: `expert_load/0/3` is that of layer 0, expert 3. Not the step."""
    found: dict[str, float] = {}

    def gather(name: str, value: Any) -> None:
        if isinstance(value, list):
            for place, part in enumerate(value):
                gather(f"{name}/{place}", part)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value

    for name, value in row.items():
        if name != "step":
            gather(name, value)
    return found


class Tracker(Protocol):
    """Somewhere that rows are shown; made with those there are."""

    def __init__(self, run: Path, hparams: Hparams, rows: Sequence[Row]) -> None: ...
    @staticmethod
    def check() -> None:
        """Raise UserError where its package, or what that needs, isn't there."""

    def log(self, row: Row) -> None: ...
    def close(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, in single precision, written anew at each start: no step is there twice."""

    def __init__(self, run: Path, hparams: Hparams, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import text

        folder = run / "tensorboard"
        before = list(folder.glob("events.out.tfevents.*"))
        # rows say how long a run has trained, not when: the pauses between its sessions are left out
        self.began = time.time() - (rows[-1]["elapsed"] if rows else 0.0)
        self.writer = FileWriter(str(folder))
        # for a TensorBoard that is open meanwhile: what it has read so far is void
        self.writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), 0, self.began)
        self.writer.add_summary(text("hparams.json", f"```json\n{hparams.to_json()}```"), 0, self.began)
        for row in rows:
            self._add(row)
        self.writer.flush()
        for path in before:
            path.unlink()

    @staticmethod
    def check() -> None:
        require("tensorboard", "track")

    def _add(self, row: Row) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        # float32: TensorBoard's page shows nothing of what is stored in double precision
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
        summary = Summary(value=values)
        self.writer.add_summary(summary, row["step"], self.began + row["elapsed"])

    def log(self, row: Row) -> None:
        self._add(row)
        self.writer.flush()

    def close(self, finished: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. Offline it is a file in RUN/wandb, written anew at each start; online it goes on where
    it stands, as a service that forgets nothing: steps that it has already are not sent again."""

    def __init__(self, run: Path, hparams: Hparams, rows: Sequence[Row]) -> None:
        import wandb

        identity = identity_of(run, fresh=not rows)
        offline = wandb.setup().settings.mode != "online"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=run,
            id=identity,
            name=run.resolve().name,
            config=hparams.model_dump(mode="json"),
            resume=None if offline else "allow",
            settings=wandb.Settings(console="off", finish_timeout=FINISH_SECONDS),
        )
        for row in rows:
            self.log(row)
        if offline:
            for folder in (run / "wandb").glob(f"offline-run-*-{identity}*"):  # "-1" behind it within the same second
                if not Path(self.run.dir).is_relative_to(folder.resolve()):
                    shutil.rmtree(folder)

    @staticmethod
    def check() -> None:
        require("wandb", "track")
        import wandb

        if wandb.setup().settings.mode != "online":
            return
        with suppress(wandb.errors.AuthenticationError):  # also where the network is away: not what the person can mend
            if not wandb.login(prompt=False):
                raise UserError(
                    "train.track is wandb, and Weights & Biases doesn't know who you are. It needs a login, or to stay "
                    "on this machine. Run wandb login, or set the variable WANDB_MODE to offline."
                )

    def log(self, row: Row) -> None:
        if row["step"] >= self.run.step:
            self.run.log(numbers(row), step=row["step"])

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class Trackio:
    """A run of Trackio's, in its own folder (TRACKIO_DIR), written anew at each start; on a Space (TRACKIO_SPACE_ID) or
    a server (TRACKIO_SERVER_URL) it goes on as it stands."""

    def __init__(self, run: Path, hparams: Hparams, rows: Sequence[Row]) -> None:
        import trackio

        name = f"{run.resolve().name}-{identity_of(run, fresh=not rows)}"
        away = any(os.environ.get(variable) for variable in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
        with suppress(ValueError):  # there is no such project yet
            for known in [] if away else trackio.Api().runs(PROJECT):
                if known.name == name:
                    known.delete()
        settings = hparams.model_dump(mode="json")
        self.run = trackio.init(project=PROJECT, name=name, config=settings, resume="allow", embed=False)
        for row in [] if away else rows:
            self.log(row)

    @staticmethod
    def check() -> None:
        require("trackio", "track")

    def log(self, row: Row) -> None:
        self.run.log(numbers(row), step=row["step"])

    def close(self, finished: bool) -> None:
        import trackio

        trackio.finish()  # run.finish() would be called again when the process ends


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


def identity_of(run: Path, fresh: bool) -> str:
    """Return what trackers call the run, another for a run that begins anew."""
    path = run / IDENTITY
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError, StopIteration):
        if not fresh:
            return str(json.loads(next(lines_inside(run, IDENTITY)))["id"])
    identity = secrets.token_hex(4)
    write_file(path, json.dumps({"id": identity}).encode())
    return identity


class Tracking:
    """Where rows go besides metrics.jsonl: to a tracker, until that fails."""

    def __init__(self, run: Path, hparams: Hparams, progress: Progress) -> None:
        self.name, self.progress = hparams.train.track, progress
        self.tracker: Tracker | None = None
        if self.name is not None:
            with self._forgiving():
                self.tracker = TRACKERS[self.name](run, hparams, read_rows(run))

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.tracker = None
            self.progress.say(
                f"{self.name} failed and gets no more of this run ({type(error).__name__}: {error}). Training goes on, "
                "metrics.jsonl has it all, and a resume tries again."
            )

    def log(self, row: Row) -> None:
        """Pass a row on."""
        if self.tracker is not None:
            with self._forgiving():
                self.tracker.log(row)

    def close(self, finished: bool) -> None:
        """Have everything out of the process's hands."""
        if self.tracker is not None:
            with self._forgiving():
                self.tracker.close(finished)


@contextmanager
def tracking(run: Path, hparams: Hparams, progress: Progress) -> Iterator[Tracking]:
    """Give a run its tracker for as long as it trains."""
    tracked, finished = Tracking(run, hparams, progress), False
    try:
        yield tracked
        finished = True
    finally:
        tracked.close(finished)
