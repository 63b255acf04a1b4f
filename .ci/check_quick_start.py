"""Checks the run folder that the README's first command made: complete, trained, loadable."""

import json
import sys
from pathlib import Path

import moelet

run = Path(sys.argv[1])
for name in ("hparams.json", "tokenizer.model", "metrics.jsonl", "loss_curve.png", "report.html"):
    assert (run / name).stat().st_size > 0, f"{name} is empty"
files = {path.name for path in next((run / "checkpoints").iterdir()).iterdir()}
assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}, files
last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
bits, seconds = last["val_bits_per_byte"], last["seconds"]
print(f"quick start: {bits:.3f} bits/byte (gzip -9: {last['gzip_bits_per_byte']:.3f}) in {seconds:.0f} s of training")
assert bits < 2.2, f"the quick start reached {bits:.3f} bits/byte; it must stay below 2.2"
assert moelet.load(run).step == last["step"]
