"""Known traps of runs on several ranks, each found by a test of tests/faults. See tests/mutants.py."""

from tests.mutants import Mutant

ALIKE = "tests/faults/test_ranks_alike.py::test_ranks_make_the_steps_that_one_makes"
READ = "tests/faults/test_ranks_alike.py::test_a_checkpoint_of_any_layout_is_read_in_any"
MORE = "tests/faults/test_ranks_alike.py::test_a_run_goes_on_with_more_and_fewer_ranks"
DIE = "tests/faults/test_ranks_that_die.py"
LAYOUT, STEP = "moelet/parallel/layout.py", "moelet/step.py"

MUTANTS = [
    Mutant(
        "parts of a model whose numbers are others than one process draws",
        "moelet/modelling.py",
        "_Unset(draws=True)",
        "_Unset()",
        ALIKE,
    ),
    Mutant(
        "parts of a model that all have the first rows",
        LAYOUT,
        "copy_(whole[layout.part(name, len(whole))])",
        "copy_(whole[: len(whole[layout.part(name, len(whole))])])",
        ALIKE,
    ),
    Mutant(
        "gradients that are taken before they have come back from other ranks",
        "moelet/parallel/exchange.py",
        "        return ctx.trip.arrive(), None\n",
        "        return torch.zeros_like(ctx.trip.arrive()), None\n",
        ALIKE,
    ),
    Mutant(
        "replicas whose gradients are never added up",
        LAYOUT,
        "(root.set_requires_all_reduce if layout.divided else root.set_requires_gradient_sync)(now)",
        "(root.set_requires_all_reduce if layout.divided else root.set_requires_gradient_sync)(False)",
        ALIKE,
    ),
    Mutant(
        "a mean of gradients where each rank's loss is its part of the sum",
        LAYOUT,
        "    module.set_gradient_divide_factor(1.0)",
        "    module.set_gradient_divide_factor(2.0)",
        ALIKE,
    ),
    Mutant(
        "a loss divided by one rank's tokens",
        STEP,
        "n_tokens, n_routed = max(1, n_targets), max(1, n_routed)",
        "n_tokens, n_routed = max(1, len(targets)), max(1, n_routed)",
        ALIKE,
    ),
    Mutant(
        "balance over one rank's rows",
        STEP,
        "routing = routing or stats_of_all(training.team, output.router)",
        "routing = routing or add_stats([], output.router)",
        ALIKE,
    ),
    Mutant(
        "a clip norm that counts what several ranks have alike several times",
        LAYOUT,
        ".square() / self.copies(name)",
        ".square()",
        ALIKE,
    ),
    Mutant(
        "rows of padding that count in the loss",
        "moelet/parallel/rows.py",
        "(batch.labels, IGNORE)",
        "(batch.labels, 1)",
        ALIKE,
    ),
    Mutant(
        "experts that are all taken for the first rank's",
        "moelet/parallel/exchange.py",
        "sent_P = torch.bincount(flat_N // self.n_local, minlength=self.size)",
        "sent_P = torch.bincount(flat_N * 0, minlength=self.size)",
        ALIKE,
    ),
    Mutant(
        "a checkpoint of parts where each says that it begins at row 0",
        LAYOUT,
        'return f"@{part.start}" if part.stop > part.start else None',
        'return "@0" if part.stop > part.start else None',
        READ,
    ),
    Mutant(
        "optimizer state of other rows put back",
        "moelet/storage/checkpoint.py",
        'lambda key, n: part(key.rpartition(":")[0], n)',
        'lambda key, n: slice(0, len(range(n)[part(key.rpartition(":")[0], n)]))',
        READ,
    ),
    Mutant(
        "other ranks that a resume leaves at the first weights",
        "moelet/train.py",
        "    order_restore(training, run, saved.step)\n",
        "",
        MORE,
    ),
    Mutant(
        "a silent rank that nobody misses",
        "moelet/parallel/watch.py",
        "if silent >= SILENT_SECONDS:",
        "if silent >= 1000 * SILENT_SECONDS:",
        DIE,
    ),
    Mutant(
        "a rank that fails and tells nobody",
        "moelet/parallel/watch.py",
        "                self.team.give_up(error)\n",
        "                pass\n",
        "tests/test_parallel.py::test_a_rank_that_fails_tells_the_others",
    ),
]
