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
from contextlib import suppress
from pathlib import Path

from moelet.console import Progress
from moelet.errors import TemporaryError
from moelet.metrics import METRICS_FILE, read_rows
from moelet.storage.checkpoint import Checkpoint, SaveError, save, serialised
from moelet.storage.disk import sync_folder, write_synced
from moelet.storage.manifest import MODEL, folders, make_room, run_id_of

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
        policy: str,
        belongings: Callable[[], dict[str, bytes]],
        progress: Progress,
        enough: Callable[[], bool],
        lines: Callable[[], bool],
        check: Callable[[], None],
    ) -> None:
        """`belongings()` are the files that make a folder with a checkpoint a run; `lines()` writes what waits of its
        metrics and returns whether all is written; `check()` raises UserError where another process has the folder by
        now, and OSError where that can't be told."""
        self.run, self.policy, self.belongings, self.progress, self.enough = run, policy, belongings, progress, enough
        self.lines, self.check = lines, check

    def save(self, made: Checkpoint, final: bool) -> bool:
        """Write a checkpoint; return whether it is there.

        Where it isn't, after all tries, `train.on_save_failure` says what follows. Raises TemporaryError where that is
        `stop` and where the checkpoint is the run's last one, `final`: parked elsewhere, if anything takes it.
        """
        written = self.lines() or not final or self._insist()
        try:
            self._try(made)
            if written:
                return True
            raise SaveError(f"the last lines of {self.run / METRICS_FILE} can't be written.", self.run)
        except SaveError as error:
            if final or self.policy == "stop":
                raise self._parked(made, error) from error
            if self.policy == "pause":
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
        try:
            self.check()
        except OSError as error:
            raise SaveError(
                f"the checkpoint of step {made.step} can't be written: the run folder {self.run} can't be used "
                f"({error.strerror}).",
                self.run,
            ) from error
        save(self.run, made)

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
