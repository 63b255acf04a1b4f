"""What would break an exact resume, each against the test that finds it."""

from tests.mutants import Mutant

MUTANTS = [
    Mutant(
        "the cursor of the batch that is ready next",
        "moelet/text/prefetch.py",
        "            found, cursor = item\n",
        "            found, cursor = item\n"
        "            if not self._queue.empty() and not isinstance(self._queue.queue[-1], BaseException):\n"
        "                cursor = self._queue.queue[-1][1]\n",
        "tests/faults/test_every_document_once.py",
    ),
    Mutant(
        "a loss scale that starts over",
        "moelet/state.py",
        "        training.scaler.load_state_dict(saved.state[",
        "        str(saved.state[",
        "tests/faults/test_resumed_exactly.py",
    ),
    Mutant(
        "dropout that doesn't depend on the step",
        "moelet/step.py",
        "derived_seed(*place, *([] if training.team.leads else [training.team.rank]))",
        "torch.randint(2**40, ()).item()",
        "tests/faults/test_resumed_exactly.py",
    ),
    Mutant(
        "Adam's moments that start over",
        "moelet/state.py",
        "        training.optimizer.state[parameters[name]][entry] = value.to(training.device)\n",
        "        training.optimizer.state[parameters[name]][entry] = value.to(training.device) * (entry == 'step')\n",
        "tests/faults/test_resumed_exactly.py",
    ),
    Mutant(
        "a skipped step that advances the schedule",
        "moelet/step.py",
        "    lr = learning_rate(hparams.optim, training.step, training.plan)",
        "    lr = learning_rate(hparams.optim, training.step + training.skipped_steps, training.plan)",
        "tests/faults/test_learning_rate.py",
    ),
    Mutant(
        "skipped batches that a resume forgets",
        "moelet/state.py",
        '"plan", "skipped_steps", "skipped_in_a_row"',
        '"plan", "skipped_in_a_row"',
        "tests/faults/test_learning_rate.py",
    ),
    Mutant(
        "rows of a window that come again after a resume",
        "moelet/data.py",
        'for index in range(window["row"], len(rows)):',
        "for index in range(len(rows)):",
        "tests/faults/test_every_document_once.py",
    ),
    Mutant(
        "a number format that may change unseen",
        "moelet/identity.py",
        '        "precision": str(dtype).removeprefix("torch."),\n',
        "",
        "tests/faults/test_identity.py",
    ),
    Mutant(
        "fingerprints of text that look at names and sizes alone",
        "moelet/text/files.py",
        "                file.seek(int(start))\n                digest.update(file.read(SAMPLE))",
        "                file.seek(int(start))",
        "tests/faults/test_identity.py",
    ),
    Mutant(
        "accepted changes that are forgotten",
        "moelet/identity.py",
        '        if entry["from"] in reached and ',
        "        if False and ",
        "tests/faults/test_identity.py",
    ),
    Mutant(
        "another text read from a place in the old one",
        "moelet/train.py",
        "    if changes_text(changed, before):",
        "    if False:",
        "tests/faults/test_identity.py",
    ),
    Mutant(
        "checkpoints that are away taken for a run that has none",
        "moelet/train.py",
        "    if (run / UNSAVED).exists() or not any(",
        "    if True or not any(",
        "tests/faults/test_identity.py::test_checkpoints_that_are_away",
    ),
    Mutant(
        "a run locked out that was killed before its first checkpoint",
        "moelet/train.py",
        "    note_unsaved(run)\n",
        "",
        "tests/faults/test_identity.py::test_checkpoints_that_are_away",
    ),
]
