"""What would let a stranger's file do harm, put in one at a time: python -m tests.mutants faults."""

from tests.mutants import Mutant

INTAKE, HOSTILE = "tests/test_intake.py", "tests/faults/test_hostile_files.py"
MUTANTS = [
    Mutant(
        "containment not checked: a name that leads out of its folder",
        "moelet/storage/intake.py",
        '    if not parts or any(part in ("", ".", "..") for part in parts):',
        "    if not parts:",
        INTAKE,
    ),
    Mutant(
        "a link followed on the way to a file",
        "moelet/storage/intake.py",
        "below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)",
        "below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)",
        f"{INTAKE}::test_a_link_put_in_place_of_a_file_or_folder_while_it_is_opened",
    ),
    Mutant(
        "documents that lie outside of their folder",
        "moelet/text/files.py",
        "    if not any(target.is_relative_to(place) for place in (top, *blobs)):",
        "    if False:",
        "tests/test_files.py::test_links_out_of_a_folder_and_pipes_are_left_out_with_a_word",
    ),
    Mutant(
        "a run whose checkpoints lie elsewhere",
        "moelet/storage/manifest.py",
        "        if path.is_symlink():",
        "        if False:",
        f"{HOSTILE}::test_a_checkpoint_that_lies_elsewhere",
    ),
    Mutant(
        "a pipe or folder taken for a file",
        "moelet/storage/intake.py",
        "    if not stat.S_ISREG(found.st_mode):",
        "    if False:",
        f"{INTAKE}::test_links_and_what_is_no_file",
    ),
    Mutant(
        "a file of any size read",
        "moelet/storage/intake.py",
        "        if found.st_size > most:",
        "        if False:",
        f"{INTAKE}::test_sizes_are_bounded_before_reading",
    ),
    Mutant(
        "a header of any size read",
        "moelet/storage/tensor_file.py",
        "length > min(size - 8, LARGEST_HEADER)",
        "length > size - 8",
        f"{INTAKE}::test_a_header_of_five_million_tensors_costs_nothing",
    ),
    Mutant(
        "tensors that overlap",
        "moelet/storage/tensor_file.py",
        "            if begin != at:",
        "            if begin < start:",
        f"{INTAKE}::test_a_tensor_file_that_is_none",
    ),
    Mutant(
        "keys that are there twice: the last one wins, elsewhere the first",
        "moelet/storage/intake.py",
        "    if len(found) != len(pairs):",
        "    if False:",
        f"{INTAKE}::test_json_is_json",
    ),
    Mutant(
        "a tokenizer's map of characters given to the library",
        "moelet/text/tokenizer_file.py",
        "part[0] in (CHARACTER_MAP, RULES) and part[2]",
        "False",
        f"{INTAKE}::test_a_tokenizer_that_is_none",
    ),
    Mutant(
        "a network made before its shape is held against the file",
        "moelet/storage/checkpoint.py",
        "        if odd is None:",
        "        if True:",
        f"{HOSTILE}::test_settings_of_a_model_that_isnt_the_saved_one",
    ),
    Mutant(
        "weights used whatever their hash",
        "moelet/storage/manifest.py",
        "        if actual != expected.sha256:",
        "        if False:",
        "tests/test_checkpoint.py",
    ),
    Mutant(
        "prepared tokens outside of the vocabulary",
        "moelet/text/shards.py",
        '<= ids.max() < self.manifest["vocab_size"]',
        "<= ids.max()",
        f"{HOSTILE}::test_tokens_outside_of_the_vocabulary",
    ),
    Mutant(
        "counts below zero in a checkpoint's state",
        "moelet/storage/saved_state.py",
        "Count = Annotated[int, Field(ge=0, lt=2**53)]",
        "Count = Annotated[int, Field(lt=2**53)]",
        "tests/test_saved_state.py",
    ),
    Mutant(
        "codes for the terminal in what an error quotes",
        "moelet/errors.py",
        'print(f"moelet: {printable(text)}", file=sys.stderr, flush=True)',
        'print(f"moelet: {text}", file=sys.stderr, flush=True)',
        f"{HOSTILE}::test_words_of_a_file_cant_drive_the_terminal",
    ),
]
