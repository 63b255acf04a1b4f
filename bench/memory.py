"""What a training step of the reference model holds at most, by rows a step: counted tensor by tensor, not run.

Prints a Markdown table; the counting is that of tests/test_memory.py. From the repository's root:

    PYTHONPATH=.:tests python bench/memory.py
"""

import torch
from test_memory import GIB, peak_of_steps
from torch._subclasses.fake_tensor import FakeTensorMode

from moelet.kernels.sorted_rows import fair_shares
from moelet.loss import linear_cross_entropy
from moelet.sections import ModelSettings

ROWS = (8, 16, 30, 64, 120, 240)  # of 512 tokens
VOCABULARY = 32_000


def main() -> None:
    print("| rows of 512 a step | GiB, fp16 | with checkpoint_activations |\n|---|---|---|")
    for rows in ROWS:
        with FakeTensorMode(), fair_shares():
            kept, again = (
                peak_of_steps(ModelSettings(), VOCABULARY, rows, torch.float16, linear_cross_entropy, again)
                for again in (False, True)
            )
        print(f"| {rows} | {kept / GIB:.1f} | {again / GIB:.1f} |")


if __name__ == "__main__":
    main()
