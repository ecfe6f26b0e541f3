# Two commands do all the set-up: `make demo` and `make test`. `make` alone lists everything.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench proto clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.simulations ## a real federation of three hospitals on this machine, then the paradigms compared
	$(BIN)/fedzoo demo

test: check ## ruff, mypy and the default tests with coverage
	$(BIN)/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder --cov --cov-report=term

check: $(VENV)/.dev ## ruff and mypy alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev ## format and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev ## measure the simulator against a plain PyTorch loop
	$(BIN)/python benchmarks/simulator.py

proto: $(VENV)/.dev ## generate the enrollment service's Python code anew
	$(BIN)/pip install -q "grpcio-tools==1.71.2" "mypy-protobuf>=3.6,<4"
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. --mypy_grpc_out=. shared_models/enrollment.proto

clean: ## remove the virtual environment and what tools left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage* htmlcov dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "fedzoo needs Python 3.11 to 3.13, $(PYTHON) is `$(PYTHON) -V 2>&1`; use make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.simulations: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -e ".[simulations]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -q --disable-pip-version-check -e ".[simulations,dev]"
	@touch $@ $(VENV)/.simulations
