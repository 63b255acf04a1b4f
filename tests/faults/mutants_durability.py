"""What would break the promises about checkpoints, locks and signals: `python -m tests.mutants faults`."""

from tests.mutants import Mutant

POWER_CUT = "tests/faults/test_power_cut.py::test_the_power_fails_after_any_call"
KILLED = "tests/faults/test_power_cut.py::test_killed_at_any_call"
DAMAGED = "tests/faults/test_damaged_checkpoint.py::test_a_file_of_a_checkpoint_is_damaged"
RETENTION = "tests/faults/test_retention.py"
BEHIND = "tests/faults/test_written_behind.py"
SIGNALS = "tests/faults/test_stopped_by_signals.py::test_a_signal_asks_to_stop"

MUTANTS = [
    Mutant(
        "a checkpoint that fails behind training and that nobody misses",
        "moelet/storage/saving.py",
        'It was to be written while training went on.")\n            return False\n',
        'It was to be written while training went on.")\n            return True\n',
        BEHIND,
    ),
    Mutant(
        "a checkpoint that is taken for written while it is being written",
        "moelet/storage/saving.py",
        "        self._behind = made, outcome\n",
        "        self._behind = made, outcome\n        self.at = made.step\n",
        BEHIND,
    ),
    Mutant(
        "a file that isn't on the disk before it counts",
        "moelet/storage/disk.py",
        "        file.flush()\n        sync(file.fileno())\n",
        "        file.flush()\n",
        POWER_CUT,
    ),
    Mutant(
        "a name that isn't on the disk when the save returns",
        "moelet/storage/checkpoint.py",
        "            sync_folder(self._target.parent)\n",
        "",
        POWER_CUT,
    ),
    Mutant(
        "a run folder that a power cut takes with all in it",
        "moelet/storage/disk.py",
        "        sync_folder(folder.parent)\n",
        "        pass\n",
        POWER_CUT,
    ),
    Mutant(
        "a checkpoint that has its name before its files",
        "moelet/storage/checkpoint.py",
        "            self._temporary.mkdir()\n",
        "            self._temporary.mkdir()\n"
        "            os.rename(self._temporary, self._target)\n"
        "            self._temporary = self._target\n",
        KILLED,
    ),
    Mutant(
        "a manifest that is written first",
        "moelet/storage/checkpoint.py",
        "            for name, data in self._files.items():\n                write_synced(temporary / name, data)\n",
        "            files = {name: _part(data) for name, data in self._files.items()}\n"
        "            write_synced(temporary / MANIFEST, sealed(_manifest(self._made, files)))\n"
        "            for name, data in self._files.items():\n                write_synced(temporary / name, data)\n",
        "tests/faults/test_power_cut.py::test_the_manifest_is_written_last",
    ),
    Mutant(
        "an older checkpoint that is half removed under its name",
        "moelet/storage/manifest.py",
        '    shutil.rmtree(put_aside(folder, "tmp-old"), ignore_errors=True)',
        "    shutil.rmtree(folder, ignore_errors=True)",
        RETENTION,
    ),
    Mutant(
        "a hash that nobody checks",
        "moelet/storage/manifest.py",
        "        if actual != expected.sha256:\n",
        "        if False:\n",
        DAMAGED,
    ),
    Mutant(
        "tensors made before all files are verified",
        "moelet/storage/checkpoint.py",
        "open_verified(folder, name, part)) for",
        "open_inside(folder, name, 2**44)) for",
        DAMAGED,
    ),
    Mutant(
        "a checkpoint that isn't read back",
        "moelet/storage/checkpoint.py",
        "            verify(temporary, target.name)\n",
        "            pass\n",
        "tests/faults/test_damaged_checkpoint.py::test_the_disk_gives_back_other_bytes_than_it_took",
    ),
    Mutant(
        "order by the times of files",
        "moelet/storage/manifest.py",
        "    return sorted((step, path) for step, path in steps if path == folder_of(run, step))",
        "    return sorted(steps, key=lambda found: found[1].stat().st_mtime)",
        RETENTION,
    ),
    Mutant(
        "another run's checkpoints cleared out",
        "moelet/storage/manifest.py",
        "    return [step for step, folder in folders(run) if owner_of(folder) == run_id]",
        "    return [step for step, folder in folders(run)]",
        RETENTION,
    ),
    Mutant(
        "the last good checkpoint cleared out behind damaged ones",
        "moelet/storage/manifest.py",
        "        if step not in (best, good):",
        "        if step != best:",
        RETENTION,
    ),
    Mutant(
        "a lock that isn't taken",
        "moelet/storage/lock.py",
        "        fcntl.flock(file, kind | fcntl.LOCK_NB)\n",
        "        pass\n",
        "tests/faults/test_two_runs.py::test_the_process_that_had_the_folder_died",
    ),
    Mutant(
        "a save into a folder that another process took over",
        "moelet/storage/lock.py",
        "        if content != self._name:\n",
        "        if False:\n",
        "tests/faults/test_two_runs.py::test_somebody_removes_the_lock_file",
    ),
    Mutant(
        "SIGTERM that isn't answered by a checkpoint",
        "moelet/train.py",
        "            session.save(final=True)\n            interrupted =",
        "            interrupted =",
        SIGNALS,
    ),
    Mutant(
        "a signal that waits for the end of a long step",
        "moelet/step.py",
        "enumerate(until(training.enough, micro_batches)):\n        reduce_gradients",
        "enumerate(micro_batches):\n        reduce_gradients",
        SIGNALS,
    ),
    Mutant(
        "an evaluation that was left off and never made up for",
        "moelet/train.py",
        "            session.catch_up()\n",
        "",
        SIGNALS,
    ),
    Mutant(
        "a full disk that ends the run",
        "moelet/storage/saving.py",
        '            if final or self.hparams.train.on_save_failure == "stop":',
        "            if True:",
        "tests/faults/test_disk_full.py::test_the_disk_is_full_for_a_while",
    ),
    Mutant(
        "a run that ends with the reader of what it says",
        "moelet/console.py",
        "console or _Unheard(",
        "console or Console(",
        "tests/faults/test_disk_full.py::test_the_reader_of_what_a_run_says_goes_away",
    ),
    Mutant(
        "a run folder that a save makes anew",
        "moelet/storage/saving.py",
        "            self.check()\n",
        "            pass\n",
        "tests/faults/test_disk_full.py::test_the_folder_of_a_run_goes_away",
    ),
    Mutant(
        "a disk that stays full of the run's own checkpoints",
        "moelet/storage/saving.py",
        "                self._make_room(made, error)\n",
        "",
        "tests/faults/test_disk_full.py::test_a_disk_that_the_run_itself_fills",
    ),
    Mutant(
        "the best checkpoint given up for room",
        "moelet/storage/manifest.py",
        "    kept = {best, good, ",
        "    kept = {good, ",
        "tests/faults/test_disk_full.py::test_a_disk_that_the_run_itself_fills",
    ),
    Mutant(
        "a parked run removed that somebody has gone on with",
        "moelet/storage/saving.py",
        "            return known and (",
        "            return (",
        "tests/faults/test_disk_full.py::test_the_last_save_fails",
    ),
    Mutant(
        "a last save that fails with nothing parked",
        "moelet/storage/saving.py",
        "                raise self._parked(made, error) from error",
        "                raise",
        "tests/faults/test_disk_full.py::test_the_last_save_fails",
    ),
    Mutant(
        "a cut line of metrics left for the next to follow",
        "moelet/metrics.py",
        "                os.ftruncate(file.fileno(), before)",
        "                pass",
        "tests/faults/test_disk_full.py::test_metrics_do_not_fit_on_the_disk",
    ),
    Mutant(
        "a newer format passed over as if it were damage",
        "moelet/storage/manifest.py",
        "        raise OtherFormat(",
        "        raise Damaged(",
        "tests/faults/test_old_formats.py::test_a_checkpoint_of_a_newer_version",
    ),
]
