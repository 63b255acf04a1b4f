"""What somebody without moelet gets from an exported model: run by its path, in a process of its own, by `parity`.

    python stranger.py hf|gguf JOB.json RESULT.json

It takes the folder or file as anybody would, and tells how its ids and logits differ from those that the job names.
It imports nothing of moelet, and can't.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def by_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """Return what `transformers` makes of a folder. Code is taken from it where we have just written some there."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(job["threads"])
    trust = {"trust_remote_code": job["own_code"]}
    tokenizer = AutoTokenizer.from_pretrained(job["path"], **trust)
    model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=torch.float32, **trust).eval()
    wrong = _different(job["ids"], [tokenizer(text)["input_ids"] for text in job["texts"]])
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    made = []
    with torch.no_grad():
        compared = _compared(job, (model(torch.tensor([row])).logits[0].numpy() for row in job["rows"]))
        for prompt, path in zip(job["prompts"], job["made_logits"], strict=True):
            ids = torch.tensor([prompt])
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["new_tokens"], **options
            )
            made.append(found.sequences[0, len(prompt) :].tolist())
            np.save(path, torch.stack(found.logits)[:, 0].numpy())
    return {
        "software": f"transformers {transformers.__version__}",
        "class": type(model).__name__,
        "wrong_ids": wrong,
        "made": made,
        **compared,
    }


def by_llama(job: dict[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp makes of a file, with keys and values kept in float32, as we keep them."""
    import llama_cpp

    options: dict[str, Any] = {"n_threads": job["threads"], "n_batch": job["context"], "verbose": False}
    kept = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    model = llama_cpp.Llama(job["path"], n_ctx=job["context"], logits_all=True, **kept, **options)
    wrong = _different(
        job["ids"], [model.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]]
    )
    compared = _compared(job, (_scores(model, row) for row in job["rows"]))
    made = []
    for prompt, path in zip(job["prompts"], job["made_logits"], strict=True):
        ids: list[int] = []
        logits = []
        model.reset()
        while len(ids) < job["new_tokens"] and job["end"] not in ids:
            model.eval(ids[-1:] or prompt)
            logits.append(model.scores[model.n_tokens - 1].copy())
            ids.append(int(np.argmax(_allowed(logits[-1], job["suppressed"]))))
        made.append(ids)
        np.save(path, np.stack(logits))
    return {
        "software": f"llama-cpp-python {llama_cpp.__version__}",
        "class": model.metadata["general.architecture"],
        "wrong_ids": wrong,
        "made": made,
        **compared,
    }


def _scores(model: Any, row: list[int]) -> np.ndarray:
    model.reset()
    model.eval(row)
    return model.scores[: len(row)].copy()


def _allowed(logits_V: np.ndarray, suppressed: list[int]) -> np.ndarray:
    logits_V = logits_V.copy()
    logits_V[suppressed] = -np.inf
    return logits_V


def _different(ours: list[list[int]], theirs: list[list[int]]) -> list[int]:
    """Return which texts have other ids; theirs begin with BOS, as generation wants them."""
    return [i for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)) if mine != other]


def _compared(job: dict[str, Any], theirs: Iterator[np.ndarray]) -> dict[str, Any]:
    """Return the largest difference of logits at each position of each row, and each row's loss."""
    differences, losses = [], []
    for row, path, logits_SV in zip(job["rows"], job["logits"], theirs, strict=True):
        apart_S = np.abs(np.load(path) - logits_SV).max(1)
        differences.append(np.nan_to_num(apart_S, nan=np.inf).tolist())
        wide_SV = logits_SV[:-1].astype(np.float64)
        wide_SV -= wide_SV.max(1, keepdims=True)
        log_totals_S = np.log(np.exp(wide_SV).sum(1))
        losses.append(float((log_totals_S - wide_SV[np.arange(len(row) - 1), row[1:]]).mean()))
    return {"differences": differences, "losses": losses}


if __name__ == "__main__":
    sys.modules["moelet"] = None  # type: ignore[assignment]  # so that nothing of it helps
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    result = {"hf": by_transformers, "gguf": by_llama}[sys.argv[1]](job)
    Path(sys.argv[3]).write_text(json.dumps(result), encoding="utf-8")
