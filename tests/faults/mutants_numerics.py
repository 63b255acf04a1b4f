"""Traps of numbers and memory: `python -m tests.mutants faults` shows that tests/faults sees each."""

from tests.mutants import Mutant


def of(file: str, name: str) -> str:
    """Return a small test of tests/faults, as pytest is given it."""
    return f"tests/faults/test_{file}.py::{name}[small]"


MUTANTS = [
    Mutant(
        "a mask that lets see the future alone",
        "moelet/attention.py",
        "device=device).tril(n_keys - n_queries)",
        "device=device).triu(n_keys - n_queries)",
        of("unseen", "test_a_changed_token"),
    ),
    Mutant(
        "documents of a packed row that see each other",
        "moelet/attention.py",
        "return (allowed_SL & together_BSL)[:, None]",
        "return (allowed_SL | together_BSL)[:, None].tril(n_keys - n_queries)",
        of("unseen", "test_a_changed_token_among_packed_documents"),
    ),
    Mutant(
        "experts without a token that have what was in memory as their gradient",
        "moelet/kernels/sorted_rows.py",
        "        torch.mm(one.T, other, out=y_OI)\n",
        "        one.numel() and torch.mm(one.T, other, out=y_OI)\n",
        of("experts_float64", "test_any_shape_of_experts"),
    ),
    Mutant(
        "ties that go to the highest id",
        "moelet/moe.py",
        "torch.sort(ranked_TE, dim=-1, descending=True, stable=True).indices[:, :top_k]",
        "len(ranked_TE.T) - 1 - ranked_TE.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :top_k]",
        of("same_numbers", "test_scores_that_are_equal"),
    ),
    Mutant(
        "a loss divided by the number of micro-batches once more",
        "moelet/step.py",
        "loss = cross_entropy / n_tokens\n",
        "loss = cross_entropy / n_tokens / len(micro_batches)\n",
        of("split_steps", "test_a_step_in_any_parts"),
    ),
    Mutant(
        "padding that counts in the router's statistics",
        "moelet/moe.py",
        "    if real_T is not None:\n        real_T1",
        "    if real_T is not None and False:\n        real_T1",
        of("split_steps", "test_padding_in_the_router"),
    ),
    Mutant(
        "biases of choice that move twice a step",
        "moelet/step.py",
        "        router.bias += rate * (1 - load).sign()\n",
        "        router.bias += 2 * rate * (1 - load).sign()\n",
        of("split_steps", "test_what_evaluations_report"),
    ),
    Mutant(
        "gradients that aren't finite and are taken all the same",
        "moelet/finite.py",
        "    if not math.isfinite(grad_norm):\n",
        "    if False:\n",
        of("not_finite", "test_a_number_that_is_not_finite"),
    ),
    Mutant(
        "one gradient that isn't finite and spoils all, so that nobody can tell which it was",
        "moelet/step.py",
        "    usable = norm.where(norm.isfinite(), 0)",
        "    usable = norm * 0 + norm",
        of("not_finite", "test_a_number_that_is_not_finite"),
    ),
    Mutant(
        "a scale of fp16 that is never halved",
        "moelet/step.py",
        '{"scale": state["scale"] * state["backoff_factor"], ',
        "{",
        of("not_finite", "test_a_number_that_is_not_finite"),
    ),
    Mutant(
        "a checkpoint that takes in weights that aren't finite",
        "moelet/session.py",
        '        require_finite(whole.model, "the weight")\n',
        "",
        of("not_finite", "test_weights_that_went_bad_on_their_own"),
    ),
    Mutant(
        "going back to a checkpoint in name alone",
        "moelet/session.py",
        "        restore(training, read(self.run, step, training.layout.part))\n",
        "        training.step = step\n",
        "tests/faults/test_not_finite.py::test_a_loss_that_jumps[small-rewind]",
    ),
    Mutant(
        "the documents of another batch named as those of the bad one",
        "moelet/diagnostics.py",
        'for row in islice(order.tolist(), window["row"], None):',
        'for row in islice(order.tolist(), window["row"] + 1, None):',
        of("not_finite", "test_documents_of_a_batch"),
    ),
    Mutant(
        "memory that runs out and takes rows with it",
        "moelet/shortage.py",
        "parts = zip(*(item.split(rows) for item in whole), strict=True)",
        "parts = zip(*(item.split(rows)[: len(item) // rows] for item in whole), strict=True)",
        of("out_of_memory", "test_out_of_memory_at_any_place"),
    ),
    Mutant(
        "a step made again on top of the gradients of the one that broke off",
        "moelet/shortage.py",
        "        clear()  #",
        "        #",
        of("out_of_memory", "test_out_of_memory_at_any_place"),
    ),
    Mutant(
        "a resume that has forgotten how batches were cut",
        "moelet/state.py",
        '    "micro_rows": None,\n',
        "",
        of("out_of_memory", "test_out_of_memory_from_some_step_on"),
    ),
    Mutant(
        "an optimizer that ran out of memory half-way and is asked again",
        "moelet/step.py",
        "        if not is_shortage(error):\n            raise\n        raise UserError(",
        "        if True:\n            raise\n        raise UserError(",
        of("out_of_memory", "test_out_of_memory_in_the_optimizer"),
    ),
    Mutant(
        "a cached token one place too early",
        "moelet/modelling.py",
        "torch.arange(start, start + n_new, device=device)",
        "(torch.arange(start, start + n_new, device=device) - (start > 0))",
        of("cached_generation", "test_a_prompt_in_chunks"),
    ),
    Mutant(
        "an alarm for starved experts that comes late",
        "moelet/health.py",
        "watch.average += (number - watch.average) / HORIZON",
        "watch.average += (number - watch.average) / (1.1 * HORIZON)",
        of("starved_experts", "test_experts_that_starve"),
    ),
    Mutant(
        "dropout of a seed that no setting gives",
        "moelet/step.py",
        "place = (training.hparams.train.seed, training.step,",
        "place = (__import__('os').getpid(), training.step,",
        of("same_numbers", "test_the_same_settings_in_three_processes"),
    ),
]
