"""Puts each known trap into a scratch copy of the package and shows that a test fails: `python -m tests.mutants`.

The traps are those of public code for this very architecture. `python -m tests.mutants faults` does the same with what
would break the promises of the scorecard, against tests/faults. A mutant that survives, or whose place in the code is
no longer found, makes the command fail.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = min(4, os.cpu_count() or 1)  # each of one thread


class Mutant(NamedTuple):
    trap: str
    file: str
    old: str
    new: str
    tests: str  # what pytest is given; it must fail


MUTANTS = [
    Mutant(
        "heads by view, without transpose",
        "moelet/modelling.py",
        "return prepare_heads(x_BSHC, weight, NORM_EPS, place.angles, place.positions_BS).transpose(1, 2)",
        "return x_BSD.reshape(x_BSD.shape[0], -1, x_BSD.shape[1], self.head_width)",
        "tests/test_modelling.py",
    ),
    Mutant(
        "a mask that adds 1 to the allowed scores",
        "moelet/attention.py",
        'scores_BHSL.masked_fill_(~allowed, float("-inf"))',
        "(scores_BHSL + allowed)",
        "tests/test_modelling.py",
    ),
    Mutant(
        "attention across the documents of a packed row",
        "moelet/attention.py",
        "segments_BL[:, n_keys - n_queries :, None] == segments_BL[:, None, :]",
        "(segments_BL[:, n_keys - n_queries :, None] > 0) == (segments_BL[:, None, :] > 0)",
        "tests/test_mask_documents.py",
    ),
    Mutant(
        "positions that count on across the documents of a packed row",
        "moelet/modelling.py",
        "segments_BL[:, 1:] != segments_BL[:, :-1]",
        "(segments_BL[:, 1:] > 0) != (segments_BL[:, :-1] > 0)",
        "tests/test_mask_documents.py",
    ),
    Mutant(
        "tying that nobody reads",
        "moelet/modelling.py",
        "self.lm_head = None if settings.tie_embeddings else nn.Linear(",
        "self.lm_head = nn.Linear(",
        "tests/test_modelling.py",
    ),
    Mutant(
        "gradients zeroed each micro-step",
        "moelet/step.py",
        "        with _micro_step(training, index):\n            output =",
        "        training.optimizer.zero_grad()\n        with _micro_step(training, index):\n            output =",
        "tests/test_step.py",
    ),
    Mutant(
        "generation that was never run",
        "moelet/modelling.py",
        "            cache.length += n_new\n",
        "            pass\n",
        "tests/test_generate.py",
    ),
    Mutant(
        "capacity that lets a later token evict an earlier one",
        "moelet/kernels/sorted_rows.py",
        "    y_TD: Tensor = _ExpertMLP.apply(",
        "    kept_TK = rows.bounds[ids_TK + 1] - rows.slot_TK <= max(1, ids_TK.numel() // w_in_EID.shape[0])\n"
        "    weights_TK = weights_TK * kept_TK\n"
        "    y_TD: Tensor = _ExpertMLP.apply(",
        "tests/test_modelling.py",
    ),
    Mutant(
        "balance loss computed on padding",
        "moelet/moe.py",
        "self.gate(x_TD, real_T)",
        "self.gate(x_TD, None)",
        "tests/test_step.py",
    ),
    Mutant(
        "balance loss reported as part of the validation loss",
        "moelet/evaluate.py",
        "        totals = add_stats(",
        "        nats += 0.01 * sum(stats.probability.square().sum().item() for stats in output.router)\n"
        "        totals = add_stats(",
        "tests/test_evaluate.py",
    ),
    Mutant(
        "a z-loss that counts padding",
        "moelet/kernels/router.c",
        "counts ? 2 * grad_squares * log_totals[t] : 0, slope",
        "2 * grad_squares * log_totals[t], slope",
        "tests/test_step.py",
    ),
    Mutant(
        "a z-loss of each micro-batch's own tokens",
        "moelet/step.py",
        "squares.mean() / n_routed",
        "squares.mean() / output.router[0].tokens",
        "tests/test_step.py",
    ),
    Mutant(
        "a bias that counts in the weights, not in the choice alone",
        "moelet/moe.py",
        "    weights_TK = probability_TE.gather(1, ids_TK)",
        "    weights_TK = (logits_TE if bias_E is None else logits_TE + bias_E).softmax(-1).gather(1, ids_TK)",
        "tests/test_c_kernels.py",
    ),
    Mutant(
        "biases that move away from a fair share",
        "moelet/step.py",
        "(1 - load).sign()",
        "(load - 1).sign()",
        "tests/test_step.py",
    ),
    Mutant(
        "a turn whose gradient turns the same way",
        "moelet/kernels/rotary.c",
        "store_floats(slope + c, a * load_floats(cos + c) + b * load_floats(sin + c));",
        "store_floats(slope + c, a * load_floats(cos + c) - b * load_floats(sin + c));",
        "tests/test_c_kernels.py",
    ),
    Mutant(
        "the gradient of the norm of queries and keys dropped",
        "moelet/kernels/rotary.py",
        "return grad_x_BSHC, grad_weight, None",
        "return grad_x_BSHC, None, None",
        "tests/test_c_kernels.py",
    ),
    Mutant(
        "a gradient read as if it lay otherwise",
        "moelet/kernels/rotary.py",
        "grad_BSHC = grad_BSHC.contiguous()",
        "grad_BSHC = grad_BSHC",
        "tests/test_c_kernels.py",
    ),
    Mutant(
        "rotary frequencies that fall half as fast",
        "moelet/rotary.py",
        "torch.arange(0, head_width, 2, dtype=torch.float64)",
        "torch.arange(head_width // 2, dtype=torch.float64)",
        "tests/test_rotary.py",
    ),
    Mutant(
        "a token smeared into the next document",
        "moelet/modelling.py",
        ".sigmoid() * (positions_BS > 0)[..., None]",
        ".sigmoid()",
        "tests/test_modern.py::test_documents_of_a_packed_row_are_apart",
    ),
    Mutant(
        "Muon without Nesterov's look ahead",
        "moelet/muon.py",
        "gradient.lerp(momentum, MOMENTUM).contiguous()",
        "momentum",
        "tests/test_muon.py",
    ),
    Mutant(
        "a tall matrix that isn't laid down for Muon",
        "moelet/muon.py",
        "return matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices",
        "return matrices",
        "tests/test_muon.py",
    ),
    Mutant(
        "expert stacks turned as one matrix",
        "moelet/muon.py",
        "torch.linalg.vector_norm(matrices_MIO, dim=(1, 2), keepdim=True, dtype=torch.float32)",
        "torch.linalg.vector_norm(matrices_MIO, dtype=torch.float32)",
        "tests/test_muon.py",
    ),
    Mutant(
        "bf16 on a card that emulates it",
        "moelet/precision.py",
        "modern = torch.cuda.get_device_capability(device) >= BF16_CAPABILITY",
        "modern = torch.cuda.is_bf16_supported()",
        "tests/test_precision.py",
    ),
    Mutant(
        "GradScaler left on for bf16",
        "moelet/precision.py",
        "if dtype == torch.float16 else None",
        "if dtype != torch.float32 else None",
        "tests/test_precision.py",
    ),
    Mutant(
        "a split used as the configuration's name",
        "moelet/text/hub.py",
        "name=settings.name",
        "name=settings.split",
        "tests/test_hub.py",
    ),
    Mutant(
        "rows of the hub that come again after a resume",
        "moelet/text/hub.py",
        "item, lane[1], lane[2] = found",
        "item, lane[1], _ = found",
        "tests/test_hub.py",
    ),
    Mutant(
        "a mix that forgets its shares at a resume",
        "moelet/text/sources.py",
        'empty=bool(state.get("empty")))',
        'empty=bool(state.get("empty")), taken=0)',
        "tests/test_sources.py",
    ),
    Mutant(
        "a schedule that starts over at each plan of a time budget",
        "moelet/optim.py",
        "        progress += (1 - progress) * made / (total - start)",
        "        progress = made / (total - start)",
        "tests/test_optim.py",
    ),
    Mutant(
        "a saved checkpoint that nothing can load",
        "moelet/state.py",
        "            model[name + place] = local(tensor)",
        '            model["module." + name + place] = local(tensor)',
        "tests/test_step.py",
    ),
    Mutant(
        "data position not saved",
        "moelet/state.py",
        '"skipped_in_a_row", "cursor", "best")',
        '"skipped_in_a_row", "best")',
        "tests/test_resume.py",
    ),
    Mutant(
        "the cursor of the prefetched batch saved",
        "moelet/text/prefetch.py",
        "            found, cursor = item\n",
        "            found, cursor = item\n"
        "            if not self._queue.empty() and not isinstance(self._queue.queue[-1], BaseException):\n"
        "                cursor = self._queue.queue[-1][1]\n",
        "tests/test_data.py",
    ),
    Mutant(
        "upcycled experts whose weights don't sum to 1",
        "moelet/upcycle.py",
        '"normalize_top_k": True',
        '"normalize_top_k": False',
        "tests/test_upcycle.py",
    ),
    Mutant(
        "an alarm only at logged steps",
        "moelet/session.py",
        "if alarms or evaluates",
        "if evaluates",
        "tests/test_health.py",
    ),
    Mutant(
        "chance worded as a win",
        "moelet/study/verdict.py",
        "certain = half_width is not None and abs(mean) > half_width",
        "certain = True",
        "tests/test_verdict.py",
    ),
    Mutant(
        "a study's short run on the schedule of the long one",
        "moelet/study/study.py",
        "    tokens = job_tokens(plan, job)\n    settings",
        "    tokens = plan.tokens\n    settings",
        "tests/test_study.py",
    ),
    Mutant(
        "gate and up swapped at the export",
        "moelet/export/names.py",
        '("mlp.experts.gate_proj", "mlp.experts.{expert}.gate_proj.weight", "ffn_gate_exps.weight"),\n'
        '            ("mlp.experts.up_proj", "mlp.experts.{expert}.up_proj.weight", "ffn_up_exps.weight"),',
        '("mlp.experts.gate_proj", "mlp.experts.{expert}.up_proj.weight", "ffn_gate_exps.weight"),\n'
        '            ("mlp.experts.up_proj", "mlp.experts.{expert}.gate_proj.weight", "ffn_up_exps.weight"),',
        "tests/test_export.py",
    ),
    Mutant(
        "an exported model that isn't told to scale the chosen weights",
        "moelet/export/hf.py",
        '"norm_topk_prob": s.normalize_top_k,',
        "",
        "tests/test_export.py",
    ),
    Mutant(
        "a folded table without its scale",
        "moelet/export/names.py",
        "inward_VD * old.embed_scale",
        "inward_VD",
        "tests/test_export.py",
    ),
    Mutant(
        "heads reordered for llama.cpp, as LLaMA's are",
        "moelet/export/names.py",
        "yield name.gguf.format(**place), tensor",
        "swapped = tensor.unflatten(0, (model.settings.n_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape) "
        'if "attn_q." in name.gguf else tensor\n        yield name.gguf.format(**place), swapped.contiguous()',
        "tests/test_export.py",
    ),
    Mutant(
        "a generated token that looks at the wrong one before",
        "moelet/export/modeling_moelet.py",
        "(positions_BS[:, :1] + steps_S).clamp(min=0)",
        "positions_BS[:, :1] * 0 + steps_S * 0",
        "tests/test_export.py",
    ),
    Mutant(
        "an imported folder that leads out of itself",
        "moelet/storage/intake.py",
        "    if stat.S_ISLNK(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):",
        "    if False:",
        "tests/test_importing.py",
    ),
]


def timed_kill(mutant: Mutant) -> tuple[bool, str, float]:
    started = time.perf_counter()
    return *kill(mutant), time.perf_counter() - started


def kill(mutant: Mutant) -> tuple[bool, str]:
    """Return whether a test fails with the trap put in, and what pytest said of the first failure."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("moelet", "tests", "recipes", "pyproject.toml", "hparams.json"):
            source, target = ROOT / name, Path(scratch) / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
        path = Path(scratch) / mutant.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutant.old) != 1:
            return False, f"its place is {text.count(mutant.old)} times in {mutant.file}: mend tests/mutants.py"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", mutant.tests]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=scratch, env=alone, capture_output=True, text=True, timeout=600)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        if done.returncode == 1 and lines:
            return True, lines[0].removeprefix("FAILED ").split(" - ")[0]
        return False, f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


def fault_mutants(area: str = "*") -> list[Mutant]:
    """Return the lists of all tests/faults/mutants_<area>.py, each a MUTANTS of its own."""
    areas = sorted((ROOT / "tests" / "faults").glob(f"mutants_{area}.py"))
    return [mutant for area in areas for mutant in importlib.import_module(f"tests.faults.{area.stem}").MUTANTS]


def main() -> int:
    mutants = fault_mutants(*sys.argv[2:]) if sys.argv[1:2] == ["faults"] else MUTANTS
    survivors = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for mutant, (killed, what, seconds) in zip(mutants, pool.map(timed_kill, mutants), strict=True):
            survivors += not killed
            verdict = "killed  " if killed else "SURVIVED"
            print(f"{verdict} {mutant.trap} ({seconds:.0f} s)\n         {what}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
