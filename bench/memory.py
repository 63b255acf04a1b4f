"""What a training step of the reference model holds at most, by rows a step: counted tensor by tensor, not run.

Prints a Markdown table; the counting is that of tests/test_memory.py. From the repository's root:

    PYTHONPATH=.:tests python bench/memory.py
"""

import torch
from test_memory import GIB, fair_share, peak_of_steps
from torch._subclasses.fake_tensor import FakeTensorMode

from moelet.kernels import sorted_rows
from moelet.loss import linear_cross_entropy
from moelet.sections import ModelSettings

ROWS = (8, 16, 30, 64, 120, 240)  # of 512 tokens
VOCABULARY = 32_000


def main() -> None:
    # fake tensors have no values to count, so every expert gets its fair share
    sorted_rows.rows_per_expert = fair_share
    print("| rows of 512 a step | GiB, fp16 | with checkpoint_activations |\n|---|---|---|")
    for rows in ROWS:
        with FakeTensorMode():
            kept, again = (
                peak_of_steps(ModelSettings(), VOCABULARY, rows, torch.float16, linear_cross_entropy, again)
                for again in (False, True)
            )
        print(f"| {rows} | {kept / GIB:.1f} | {again / GIB:.1f} |")


if __name__ == "__main__":
    main()
