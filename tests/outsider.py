"""Loads exported folders as anybody would, in a process that can't import moelet: python outsider.py JOBS.json OUT.npz.

Each job: folder, own_code, texts, rows, prompts (one length), new_tokens. `moelet.export.stranger` has no part in it.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.modules["moelet"] = None  # whatever is imported from here on, a folder's files above all, can't import it


def main() -> None:
    results: dict[str, np.ndarray] = {}
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        name, options = Path(job["folder"]).name, {"trust_remote_code": job["own_code"]}
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], **options)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
        results[f"{name} ids"] = np.array([id for row in ids for id in row])
        results[f"{name} lengths"] = np.array([len(row) for row in ids])
        decoded = [tokenizer.decode(row) for row in ids]
        results[f"{name} decoded"] = np.array([a == b for a, b in zip(decoded, job["texts"], strict=True)])
        if not job["rows"]:
            continue
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, **options)
        rows, prompts = torch.tensor(job["rows"]), torch.tensor(job["prompts"])
        with torch.no_grad():
            results[f"{name} logits"] = model(rows).logits.numpy()
            # the longest prompt beside one with padding before it, as in a batch; then each way to search
            mask = (prompts != tokenizer.pad_token_id).long()
            length = {"attention_mask": mask, "max_new_tokens": job["new_tokens"]}
            results[f"{name} greedy"] = model.generate(prompts, do_sample=False, **length).numpy()
            results[f"{name} uncached"] = model.generate(prompts, do_sample=False, use_cache=False, **length).numpy()
            for cached in (True, False):
                beams = model.generate(prompts, do_sample=False, num_beams=3, use_cache=cached, **length)
                results[f"{name} beams {cached}"] = beams.numpy()
        saved = Path(job["folder"]).with_name(f"{name} again")
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
        again = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **options)
        with torch.no_grad():
            results[f"{name} saved again"] = (again(rows).logits - model(rows).logits).abs().max().numpy()
        results[f"{name} class"] = np.array([type(model).__name__, type(tokenizer).__name__])
    np.savez(sys.argv[2], **results)


if __name__ == "__main__":
    main()
