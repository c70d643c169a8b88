PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint docs clean

demo: .venv/installed
	$(BIN)/phasewatch demo

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	PYTHONPATH=.typing $(BIN)/lint-imports --no-cache

docs: .venv/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info

.venv:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[wandb,report,toys]"
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@
