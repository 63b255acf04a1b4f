"""What would lose text, repeat it or take something else for it, each against the test that finds it."""

from tests.mutants import Mutant

MUTANTS = [
    Mutant(
        "a row's offset that isn't kept",
        "moelet/text/files.py",
        '                yield item, {"file": k, "offset": offset, "row": row}',
        '                yield item, {"file": k, "offset": cursor["offset"], "row": row}',
        "tests/faults/test_bad_rows.py::test_rows_of_every_wrong_kind",
    ),
    Mutant(
        "a bad row that nobody counts",
        "moelet/text/tally.py",
        "        self.counts[item.reason] += 1\n",
        '        self.counts[item.reason] += item.reason != "invalid JSON"\n',
        "tests/faults/test_bad_rows.py::test_a_few_bad_rows",
    ),
    Mutant(
        "any share of bad rows",
        "moelet/text/tally.py",
        "        if count <= max(FEW * passes, allowed * rows):",
        "        if count <= max(FEW * passes, rows):",
        "tests/faults/test_bad_rows.py::test_more_bad_rows_than_allowed",
    ),
    Mutant(
        "the hub's wish to wait ignored",
        "moelet/text/hub.py",
        "            wait = min(max(pause * random.uniform(0.5, 1.5), asked), left)",
        "            wait = min(pause * random.uniform(0.5, 1.5), left)",
        "tests/test_hub_faults.py::test_it_waits_as_long_as_the_hub_asks",
    ),
    Mutant(
        "a login page taken for a damaged file",
        "moelet/text/hub.py",
        "    return isinstance(error, (OSError, EOFError, http_error, *GARBLED))",
        "    return isinstance(error, (OSError, EOFError, http_error)) and not isinstance(error, GARBLED)",
        "tests/faults/test_hub_away.py::test_requests_that_fail",
    ),
    Mutant(
        "a hub that is waited for in silence",
        "moelet/text/hub.py",
        "        if waited - told >= LONGEST_PAUSE:",
        "        if False:",
        "tests/faults/test_hub_away.py::test_a_hub_that_stays_away",
    ),
    Mutant(
        "rows of a table decoded together whatever their length",
        "moelet/text/tables.py",
        "    rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, longest)))",
        "    rows = BATCH_ROWS",
        "tests/faults/test_bad_rows.py::test_bombs",
    ),
    Mutant(
        "a row group that ends early taken for whole",
        "moelet/text/tables.py",
        "            if number != end:",
        "            if False:",
        "tests/test_files.py::test_a_wrong_byte_anywhere_in_a_table_loses_no_row_unsaid",
    ),
    Mutant(
        "a reader that is begun anew from where the run began",
        "moelet/text/prefetch.py",
        "                self._at = found[1]\n",
        "",
        "tests/faults/test_reader.py::test_the_reader_dies_or_hangs_now_and_then",
    ),
    Mutant(
        "a reader that is waited for whatever happens",
        "moelet/text/prefetch.py",
        "                if patience is not None and silent >= patience:",
        "                if False:",
        "tests/faults/test_reader.py::test_a_thread_that_was_left_alone_wakes_up",
    ),
    Mutant(
        "a process that was stopped taken for a reader that hangs",
        "moelet/text/prefetch.py",
        "        return silent + min(passed, 2 * POLL_SECONDS)",
        "        return silent + passed",
        "tests/faults/test_reader.py::test_the_process_is_stopped_and_goes_on",
    ),
    Mutant(
        "a row of any number of values",
        "moelet/text/files.py",
        'if len(line) > MOST_OPENED and line.count(b"[") + line.count(b"{") > MOST_OPENED:',
        "if False:",
        "tests/faults/test_bad_rows.py::test_bombs",
    ),
    Mutant(
        "control ids from text that spells them",
        "moelet/tokenizer.py",
        "        counts = (text.count(SPACE) + 1 for text in texts)",
        '        encoded = (np.array([self.bos_id], np.int32) if part == "<s>" else ids\n'
        "                   for part, ids in zip(parts, encoded, strict=True))\n"
        "        counts = (text.count(SPACE) + 1 for text in texts)",
        "tests/faults/test_any_text.py::test_text_that_looks_like_a_control_piece",
    ),
    Mutant(
        "the character that stands for a space taken for one",
        "moelet/tokenizer.py",
        "        parts = [part for text in texts for part in text.split(SPACE)]",
        '        texts = [text.replace(SPACE, " ") for text in texts]\n'
        "        parts = [part for text in texts for part in text.split(SPACE)]",
        "tests/faults/test_any_text.py::test_any_text_through_the_tokenizer",
    ),
]
