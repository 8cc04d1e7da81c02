PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
# A module is compiled when it is first imported, and then kept, whatever the environment says: most files of the
# libraries never are, and without it each process would compile the whole package anew.
INSTALL = $(BIN)/python install.py
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-processes test-colab test-browser test-gpu test-machines lab bench bench-network lint badges site slides pages class

run: .venv/run
	@$(BIN)/python notebooks/run.py

test: .venv/ready
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-processes: .venv/teaching
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 3 --dist loadfile --no-loadscope-reorder -m processes

test-colab: .venv/ready
	@$(BIN)/python -m pytest tests/test_colab.py -m colab

test-browser: .venv/ready
	@$(INSTALL) -e ".[browser]" -- $(PIP_ARGS)
	@$(BIN)/python -m pytest tests/test_pages.py tests/test_browser.py -m browser

test-gpu: .venv/ready
	@$(BIN)/python -m pytest tests/test_gpu.py -m gpu -s

test-machines: .venv/ready
	@$(BIN)/python tests/hosts/machines.py -m pytest tests/hosts/test_machines.py -m machines -s

lab: .venv/run
	@$(BIN)/jupyter lab notebooks

bench: .venv/ready
	@for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

bench-network: .venv/ready
	@$(BIN)/python tests/hosts/machines.py tests/hosts/network.py

lint: .venv/ready
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

site: .venv/ready
	@$(BIN)/python docs/figure.py && $(BIN)/python docs/site.py

slides: .venv/ready
	@$(BIN)/python docs/teaching/decks.py

pages: site slides
	@rm -rf build/site/slides && cp -r build/slides build/site/slides

class: .venv/teaching
	@$(BIN)/python docs/teaching/bundle.py

badges: .venv/ready
	@$(BIN)/python notebooks/badges.py

.venv/run: pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else 'Python 3.11 to 3.13 is needed, and this is %d.%d: make PYTHON=python3.12 …' % v)"
	$(PYTHON) -m venv .venv
	$(INSTALL) -e ".[lab]" -- $(PIP_ARGS)
	@touch $@

.venv/ready: .venv/run
	$(INSTALL) -e ".[dev,lab,sim,site,track]" -- $(PIP_ARGS)
	@touch $@

.venv/teaching: .venv/ready
	$(INSTALL) -e ".[teaching]" -- $(PIP_ARGS)
	@touch $@
