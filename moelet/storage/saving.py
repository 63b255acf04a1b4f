"""What follows when a checkpoint can't be written: it is tried again, then the run's settings decide, and at its end
what was learned is parked elsewhere.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moelet.console import Progress
from moelet.errors import TemporaryError
from moelet.metrics import METRICS_FILE
from moelet.storage.checkpoint import Checkpoint, SaveError, save, serialised
from moelet.storage.disk import sync_folder, write_synced
from moelet.storage.manifest import MODEL

PAUSES = (0.2, 1.0, 3.0)  # seconds before each further try: within a scheduler's grace, 30 s on most
PAUSED_SECONDS, REMIND_SECONDS = 5.0, 60.0  # between tries while a run is paused, between saying so


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
    ) -> None:
        """`belongings()` are the files that make a folder with a checkpoint a run; `lines()` writes what waits of its
        metrics and returns whether all is written."""
        self.run, self.policy, self.belongings, self.progress, self.enough = run, policy, belongings, progress, enough
        self.lines = lines

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
                save(self.run, made)
                return
            except SaveError:
                time.sleep(pause)
        save(self.run, made)

    def _wait(self, made: Checkpoint, error: SaveError) -> bool:
        """Try until it succeeds, without training on; return False as soon as a signal asks to stop."""
        reminded = float("-inf")
        while not self.enough():
            if time.monotonic() - reminded > REMIND_SECONDS:
                self._warn(f"{error.reason} Training is paused until it succeeds.")
                reminded = time.monotonic()
            time.sleep(PAUSED_SECONDS)
            try:
                save(self.run, made)
            except SaveError as again:
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
                f"{error.reason} All of the run is parked in {folder}; nothing is lost. Go on there: python -m moelet "
                f"train --resume {folder}"
            )
        for folder in self._places():
            try:
                write_synced(folder / MODEL, serialised(made)[MODEL])
                self._write_belongings(folder)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return TemporaryError(
                f"{error.reason} The weights of step {made.step} are parked in {folder}, without the optimizer. Mend "
                f"that, and go on from the last checkpoint: python -m moelet train --resume {self.run}"
            )
        return TemporaryError(f"{error} No other place takes it, either: step {made.step} is lost.")

    def _places(self) -> Iterator[Path]:
        """Yield new folders, where they can be made: on the temporary disk, at home, here, in memory."""
        for parent in (tempfile.gettempdir, Path.home, Path.cwd, lambda: "/dev/shm"):
            try:
                folder = tempfile.mkdtemp(prefix=f"moelet-parked-{self.run.name}-", dir=parent())
            except (OSError, RuntimeError):  # no place for temporary files, no home
                continue
            yield Path(folder)

    def _park_run(self, folder: Path, made: Checkpoint) -> None:
        save(folder, made)
        self._write_belongings(folder)

    def _write_belongings(self, folder: Path) -> None:
        for name, data in self.belongings().items():
            write_synced(folder / name, data)
        sync_folder(folder)
