"""What follows when a checkpoint can't be written: it is tried again, then the run's settings decide, and at its end
what was learned is parked elsewhere.
"""

import errno
import os
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from threading import Thread

from moelet.console import Progress
from moelet.errors import TemporaryError
from moelet.hparams import Hparams
from moelet.metrics import METRICS_FILE, read_rows
from moelet.storage.checkpoint import Checkpoint, SaveError, Writing, save, serialised
from moelet.storage.disk import sync_folder, write_synced
from moelet.storage.manifest import MODEL, folders, make_room, retain, run_id_of

PAUSES = (0.2, 1.0, 3.0)  # seconds before each further try: within a scheduler's grace, 30 s on most
PAUSED_SECONDS, REMIND_SECONDS = 5.0, 60.0  # between tries while a run is paused, between saying so


PARKED = "moelet-parked-"  # what the names of folders begin with that runs are parked in


def _parents() -> Iterator[Path]:
    """Yield where folders may be made that a run is parked in: on the temporary disk, at home, here, in memory."""
    for parent in (tempfile.gettempdir, Path.home, Path.cwd, lambda: "/dev/shm"):
        with suppress(OSError, RuntimeError):  # no place for temporary files, no home
            yield Path(parent())


class Saver:
    """Writes a run's checkpoints, and knows what to do when that fails."""

    def __init__(
        self,
        run: Path,
        hparams: Hparams,
        whole: Callable[[], Checkpoint],
        belongings: Callable[[], dict[str, bytes]],
        progress: Progress,
        enough: Callable[[], bool],
        lines: Callable[[], bool],
        check: Callable[[], None],
    ) -> None:
        """`whole()` is the run as it stands; `belongings()` are the files that make a folder with a checkpoint a run;
        `lines()` writes what waits of its metrics and returns whether all is written; `check()` raises UserError where
        another process has the folder by now, and OSError where that can't be told."""
        self.run, self.hparams, self.whole, self.belongings = run, hparams, whole, belongings
        self.progress, self.enough, self.lines, self.check = progress, enough, lines, check
        self.at: int | None = None  # the step of the newest checkpoint
        self._behind: tuple[Checkpoint, Future[None]] | None = None  # one that is being written while training goes on

    def save(self, step: int, final: bool) -> bool:
        """Write a checkpoint of the present step, unless there is one, and remove those no longer kept; return whether
        there is one.

        Where there isn't, after all tries, `train.on_save_failure` says what follows. Raises TemporaryError where that
        is `stop` and where the checkpoint is the run's last one, `final`: parked elsewhere, if anything takes it.
        """
        self.settle(wait=True)
        if self.at == step:
            return True
        made = self.whole()
        if not self._save(made, final):
            return False
        self._saved(made)
        return True

    def begin(self, step: int) -> None:
        """Have a checkpoint of the present step written while training goes on, in one try; `settle` says how that
        went. Where the one before failed, it is written at once."""
        if not self.settle(wait=True):
            self.save(step, final=False)
        if self.at == step:
            return
        self.lines()
        made, outcome = self.whole(), Future[None]()
        self._behind = made, outcome

        def finish(writing: Writing) -> None:
            try:
                writing.finish()
                outcome.set_result(None)
            except Exception as error:
                outcome.set_exception(error)

        try:
            self._ours(made)
            writing = Writing(self.run, made)
        except SaveError as error:
            outcome.set_exception(error)
        else:  # where other ranks write theirs, it may wait for one that is lost
            Thread(target=finish, args=[writing], daemon=made.others is not None).start()

    def settle(self, wait: bool = False) -> bool:
        """See how the checkpoint ended that was begun last, if it has, or `wait` until it has. Return False, once,
        where it failed."""
        if self._behind is None or not (wait or self._behind[1].done()):
            return True
        (made, outcome), self._behind = self._behind, None
        try:
            outcome.result()
        except SaveError as error:
            self._warn(f"{error.reason} It was to be written while training went on.")
            return False
        self._saved(made)
        return True

    def _saved(self, made: Checkpoint) -> None:
        self.at, best = made.step, made.state["best"]
        retain(self.run, self.hparams.train.keep_checkpoints, int(best["step"]) if best else None, good=made.step)

    def _save(self, made: Checkpoint, final: bool) -> bool:
        written = self.lines() or not final or self._insist()
        try:
            self._try(made)
            if written:
                return True
            raise SaveError(f"the last lines of {self.run / METRICS_FILE} can't be written.", self.run)
        except SaveError as error:
            if final or self.hparams.train.on_save_failure == "stop":
                raise self._parked(made, error) from error
            if self.hparams.train.on_save_failure == "pause":
                return self._wait(made, error)
            self._warn(f"{error.reason} Training goes on; the next checkpoint is the next try.")
            return False

    def _insist(self) -> bool:
        """Try to write the last lines as often as a checkpoint; return whether it succeeded."""
        for pause in PAUSES:
            time.sleep(pause)
            if self.lines():
                return True
        return False

    def _try(self, made: Checkpoint) -> None:
        for pause in PAUSES:
            try:
                self._write(made)
                return
            except SaveError as error:
                self._make_room(made, error)
                time.sleep(pause)
        self._write(made)

    def _write(self, made: Checkpoint) -> None:
        """Write a checkpoint into a folder that is still this process's."""
        self._ours(made)
        save(self.run, made)

    def _ours(self, made: Checkpoint) -> None:
        try:
            self.check()
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {made.step} can't be written: the run folder {self.run} can't be used "
                f"({error.strerror}).",
                self.run,
            ) from error

    def _make_room(self, made: Checkpoint, error: SaveError) -> None:
        """Where the disk is full, remove what it can do without: older checkpoints of this run."""
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            return
        best = made.state.get("best")
        removed = make_room(self.run, best["step"] if best else None)
        if removed:
            steps = f"step{'s' * (len(removed) > 1)} {', '.join(map(str, removed))}"
            self._warn(f"the disk is full. This run's checkpoint{'s' * (len(removed) > 1)} of {steps} made room.")

    def _wait(self, made: Checkpoint, error: SaveError) -> bool:
        """Try until it succeeds, without training on; return False as soon as a signal asks to stop."""
        reminded = float("-inf")
        while not self.enough():
            if time.monotonic() - reminded > REMIND_SECONDS:
                self._warn(f"{error.reason} Training is paused until it succeeds.")
                reminded = time.monotonic()
            time.sleep(PAUSED_SECONDS)
            try:
                self._write(made)
            except SaveError as again:
                self._make_room(made, again)
                error = again
                continue
            self.progress.say(f"the checkpoint of step {made.step} is written; training goes on.")
            return True
        return False

    def _warn(self, text: str) -> None:
        self.progress.say(f"WARNING: {text}")

    def _parked(self, made: Checkpoint, error: SaveError) -> TemporaryError:
        """Return the error to end with: what failed, where the run or its weights are parked, how to go on."""
        for folder in self._places():
            try:
                self._park_run(folder, made)
            except (SaveError, OSError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return TemporaryError(
                f"{error.reason} All of the run is parked in {folder}{self._replaced(folder, made)}; nothing is lost. "
                f"Go on there: python -m moelet train --resume {shlex.quote(str(folder))}"
            )
        for folder in self._places():
            try:
                write_synced(folder / MODEL, serialised(made)[MODEL])
                self._write_belongings(folder)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return TemporaryError(
                f"{error.reason} The weights of step {made.step} are parked in {folder}{self._replaced(folder, made)}, "
                "without the optimizer. Mend that, and go on from the last checkpoint: python -m moelet train --resume "
                f"{shlex.quote(str(self.run))}"
            )
        return TemporaryError(f"{error} No other place takes it, either: step {made.step} is lost.")

    def _places(self) -> Iterator[Path]:
        """Yield new folders, where they can be made."""
        for parent in _parents():
            with suppress(OSError):
                yield Path(tempfile.mkdtemp(prefix=f"{PARKED}{self.run.name}-", dir=parent))

    def _replaced(self, folder: Path, made: Checkpoint) -> str:
        """Remove what earlier sessions of this run have parked, now that `folder` is there; return words for that."""
        earlier = sorted({path for parent in _parents() for path in parent.glob(f"{PARKED}*") if path != folder})
        removed = [path for path in earlier if self._needless(path, made, (folder / "checkpoints").exists())]
        for path in removed:
            shutil.rmtree(path, ignore_errors=True)
        return f" (in place of {', '.join(map(str, removed))})" if removed else ""

    def _needless(self, folder: Path, made: Checkpoint, whole: bool) -> bool:
        """Return whether this very run has parked what is in a folder, no further on than `made`, and nobody has used
        it since; weights alone stand in for no whole run."""
        try:
            found, names = os.lstat(folder), set(os.listdir(folder))
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or run_id_of(folder) != made.run_id:
                return False
            steps = [*(step for step, _ in folders(folder)), *(row["step"] for row in read_rows(folder))]
            known = names <= {"checkpoints", MODEL, *self.belongings()}  # a lock or a report means that it was used
            return known and (whole or "checkpoints" not in names) and max(steps) <= made.step
        except (OSError, ValueError, TypeError):  # ValueError: UserError too, and a folder that holds no step
            return False

    def _park_run(self, folder: Path, made: Checkpoint) -> None:
        save(folder, made)
        self._write_belongings(folder)

    def _write_belongings(self, folder: Path) -> None:
        for name, data in self.belongings().items():
            write_synced(folder / name, data)
        sync_folder(folder)
