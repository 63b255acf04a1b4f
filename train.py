"""The quick start: `python train.py [FILE] [options]` is `moelet train [FILE] [options]`."""

import sys

from moelet.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
