"""Tasks for `moelet evaluate`: files are scored here, names are lm-eval's, through our model in the shape it wants.

lm-eval (the extra `eval`) is imported only where a task is asked for by name; it fetches the task's text from the hub.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.choices import DELIMITER, read_task, score
from moelet.console import Progress
from moelet.errors import TemporaryError, UserError, nearest
from moelet.generate import Sampling, continuations
from moelet.likelihood import Likelihood, Note, Pair, likelihoods
from moelet.modelling import GPT
from moelet.tokenizer import Tokenizer

FILE_ENDING = ".jsonl"
BOOTSTRAPS = 1000  # resamplings for the errors of what isn't a mean, as a perplexity; lm-eval's 100,000 take minutes
LONGEST_WORDS = 300  # characters of an error of lm-eval's that ours repeats
Figures = dict[str, float | None]


class Subject(NamedTuple):
    """Who is examined, and how."""

    model: GPT
    tokenizer: Tokenizer
    batch_size: int
    dtype: torch.dtype

    def likelihoods(self, pairs: Sequence[Pair], note: Note) -> list[Likelihood]:
        return likelihoods(self.model, pairs, self.batch_size, self.dtype, note)

    def whole_texts(self, texts: Sequence[str], note: Note) -> list[float]:
        """Return the log-probability of each text; 0 for an empty one."""
        bos = [self.tokenizer.bos_id]
        pairs = {k: (bos, ids.tolist()) for k, ids in enumerate(self.tokenizer.encode_batch(texts)) if len(ids)}
        found = dict(zip(pairs, self.likelihoods(list(pairs.values()), note), strict=True))
        return [found[k].log_probability if k in found else 0.0 for k in range(len(texts))]

    def generate(self, prompts: Sequence[str], n_new: int, stops: Sequence[str], sampling: Sampling) -> list[str]:
        """Return what the model continues each prompt with: up to the first of `stops`, the end of the document, or
        `n_new` tokens.

        A prompt that leaves no room for these in the context loses its beginning, down to half of the context: past
        that the model forgets the older half as it goes on.
        """
        length, bos = self.model.settings.max_length, self.tokenizer.bos_id
        room = max(length - n_new, length // 2)
        prompt_ids = [[bos, *ids.tolist()][-room:] for ids in self.tokenizer.encode_batch(prompts)]
        rows: list[list[int]] = [[] for _ in prompts]
        texts, going = [""] * len(prompts), set(range(len(prompts)))
        for next_ids in continuations(self.model, prompt_ids, n_new, sampling):
            for k in sorted(going):
                if next_ids[k] == self.tokenizer.eos_id:
                    going.remove(k)
                    continue
                rows[k].append(next_ids[k])
                texts[k] = self.tokenizer.decode(rows[k])
                if any(stop in texts[k] for stop in stops):
                    going.remove(k)
            if not going:
                break
        return [text[: min((text.find(stop) for stop in stops if stop in text), default=None)] for text in texts]


def examine(
    subject: Subject, tasks: str, delimiter: str = DELIMITER, limit: int | None = None, progress: Progress | None = None
) -> dict[str, Figures]:
    """Return the figures of each of `tasks`, names and files parted by commas, of the first `limit` questions each.

    Raises UserError for what isn't there, before any scoring, and TemporaryError where the hub can't be reached.
    """
    asked = list(dict.fromkeys(name for part in tasks.split(",") if (name := part.strip())))
    if not asked:
        raise UserError(f"--tasks is {tasks!r}. It needs a file that ends in {FILE_ENDING}, or a name. Give one.")
    read = {name: read_task(Path(name), delimiter, limit) for name in asked if name.endswith(FILE_ENDING)}
    names = [name for name in asked if name not in read]
    found = _by_name(subject, names, limit, progress) if names else {}
    for name, questions in read.items():
        note = _teller(progress, Path(name).stem)
        found[name] = score(subject.model, subject.tokenizer, questions, subject.batch_size, subject.dtype, note)
    return {name: found[name] for name in [*read, *found]}


def _teller(progress: Progress | None, name: str) -> Note:
    def note(done: int, total: int) -> None:
        if progress is not None:
            progress.show(f"{name}: {done:,} of {total:,} texts", lasting=False)

    return note


def _by_name(
    subject: Subject, names: Sequence[str], limit: int | None, progress: Progress | None
) -> dict[str, Figures]:
    if find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks names {', '.join(names)}: no file that ends in {FILE_ENDING}, so lm-eval's tasks, and lm-eval is "
            "not installed. Install it with pip install 'moelet[eval]' (or lm-eval), or give files."
        )
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"--tasks names {name!r}. It must be one of lm-eval's tasks or a file that ends in {FILE_ENDING}."
                f"{nearest(name, manager.all_tasks)} All names: lm-eval ls tasks"
            )
    try:
        ended = simple_evaluate(
            adapter(subject, progress),
            tasks=list(names),
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
            task_manager=manager,
        )
    except UserError:
        raise
    except Exception as error:
        raise _explained(error, names) from error
    return figures_of(ended)


def _explained(error: Exception, names: Sequence[str]) -> Exception:
    """Return what a person can do about an error of lm-eval's; the error itself where it is a bug."""
    from huggingface_hub import constants

    words = " ".join(str(error).split())
    words = words if len(words) <= LONGEST_WORDS else f"{words[:LONGEST_WORDS]}..."
    said = f"the tasks {', '.join(names)} can't be had ({type(error).__name__}: {words})."
    if isinstance(error, ConnectionError | TimeoutError):
        if constants.HF_HUB_OFFLINE:
            return UserError(f"{said} HF_HUB_OFFLINE is set, and they aren't in the hub's cache. Unset that variable.")
        return TemporaryError(
            f"{said} lm-eval fetches them from the hub. Run the same command again when it can be reached, or give "
            f"files that end in {FILE_ENDING} (docs/evaluate.md says what is in them)."
        )
    if isinstance(error, ImportError):
        return UserError(f"{said} They need more of lm-eval: install what the message names, or choose others.")
    if isinstance(error, FileNotFoundError) or "unsafe" in words:  # no such dataset, or gated; code of a model's run
        return UserError(f"{said} That can't be helped here. Choose other tasks.")
    return error


def figures_of(results: Any) -> dict[str, Figures]:
    """Return lm-eval's results by task, with numbers alone: its names, without the filter where it is none."""
    tasks: dict[str, Figures] = {}
    for name, measured in results["results"].items():
        kept = {key.removesuffix(",none"): value for key, value in measured.items() if "," in key}
        counts = results.get("n-samples", {}).get(name, {})
        tasks[name] = {"n": counts["effective"]} if counts else {}
        tasks[name] |= {key: float(value) if isinstance(value, int | float) else None for key, value in kept.items()}
    return tasks


def told(figures: Figures) -> str:
    """Return figures in one line, each with its standard error."""
    parts = []
    for name, value in figures.items():
        if name == "perplexity" and value is None:
            parts.append("perplexity too large for a number")
        if value is not None and not name.endswith("_stderr") and "_stderr," not in name:
            head, comma, rest = name.partition(",")
            error = figures.get(f"{head}_stderr{comma}{rest}")
            number = f"{value:,.0f}" if name == "n" else f"{value:.4g}"
            parts.append(f"{name} {number}" + ("" if error is None else f" ± {error:.2g}"))
    return ", ".join(parts)


def adapter(subject: Subject, progress: Progress | None = None) -> Any:
    """Return the model as an `lm_eval.api.model.LM`: a text begins with BOS, as in training."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    note = _teller(progress, "lm-eval")

    class Moelet(TemplateLM):
        eot_token_id = Tokenizer.eos_id
        prefix_token_id = Tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
            ids = subject.tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False else [Tokenizer.bos_id, *ids]

        def _loglikelihood_tokens(self, requests: Any, **others: Any) -> list[Likelihood]:
            return subject.likelihoods([(context, goal) for _, context, goal in requests], note)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return subject.whole_texts([request.args[0] for request in requests], note)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            asked = [(request.args[0], normalize_gen_kwargs(request.args[1])) for request in requests]
            return generate_all(subject, asked, note)

    return Moelet()


def generate_all(subject: Subject, asked: Sequence[tuple[str, Any]], note: Note) -> list[str]:
    """Return the continuation of each prompt by its arguments; those of equal ones in batches of like lengths."""
    texts: dict[int, str] = {}
    order = sorted(range(len(asked)), key=lambda k: (repr(asked[k][1]), -len(asked[k][0])))
    while order:
        arguments = asked[order[0]][1]
        group = [k for k in order[: subject.batch_size] if asked[k][1] == arguments]
        order = order[len(group) :]
        sampling = Sampling(
            arguments.get("temperature", 1.0) if arguments["do_sample"] else 0.0,
            arguments.get("top_k"),
            arguments.get("top_p"),
            seed=group[0],  # equal prompts, as for pass@k, are drawn for anew in each batch
        )
        stops = [stop for stop in arguments["until"] if stop]
        made = subject.generate([asked[k][0] for k in group], arguments["max_gen_toks"], stops, sampling)
        texts |= zip(group, made, strict=True)
        note(len(texts), len(asked))
    return [texts[k] for k in range(len(asked))]
