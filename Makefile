.PHONY: check test mutants nightly bench

check:
	ruff check . && ruff format --check . && mypy

test:
	python -m pytest

mutants:
	python -m tests.mutants

nightly:
	python -m pytest -m nightly

bench:
	python -m moelet bench --variants all --rounds 5 --out bench/results
