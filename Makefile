.PHONY: check test mutants nightly

check:
	ruff check . && ruff format --check . && mypy

test:
	python -m pytest

mutants:
	python -m tests.mutants

nightly:
	python -m pytest -m nightly
