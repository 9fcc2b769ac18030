# make demo   watch reinforcement learning work on two CPU cores, then open the page that it names
# make test   prove the numbers
# make lint   style, types, and the direction of the imports
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	rm -rf runs/demo
	$(BIN)/flowrl train quickstart output_dir=runs/demo
	$(BIN)/flowrl eval runs/demo --against tiny-sd3 --out runs/demo/eval.json
	$(BIN)/flowrl gallery tiny-sd3 runs/demo --out runs/demo/gallery --title "Reinforcement learning on two CPU cores"
	@echo "Open runs/demo/gallery/index.html: the same prompts and seeds, before and after."

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Types and imports are checked on an installed copy: the code folders stand at the top level and install as flowrl.*
lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install -q --no-deps --target build/installed .
	cd build/installed && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p flowrl
	cd build/installed && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml ../../benchmarks
	cd build/installed && ../../$(BIN)/lint-imports --config ../../pyproject.toml

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	@echo "Installing (torch is large: a minute or a few) ..."
	$(BIN)/python -m pip install -q -e .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	@echo "Installing (torch is large: a minute or a few) ..."
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@ .venv/installed

clean:
	rm -rf .venv build runs *.egg-info
