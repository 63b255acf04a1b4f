"""`python -m moelet` is `moelet`."""

from moelet.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
