# `make demo` and `make test` need nothing but Python 3.10 or newer with venv, and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Plain threads oversubscribe small machines when the tests run in parallel.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test test-kernels test-oldest fuzz leaks mutation audit lint bench bench-full bench-page clean

demo: $(BIN)/.installed
	$(BIN)/python -m captum_concepts demo --output demo_output

# ARGS: more of pytest's options. The end names what was skipped and why.
test: $(BIN)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# The suite under eleven settings of the kernels and threads that a CPU offers, and a table of what each comparison used
# of its tolerance (hours). ARGS="--numeric": only tests that compare numbers; ARGS='--settings "2 threads"': one setting.
test-kernels: $(BIN)/.installed
	$(BIN)/python tools/kernels.py $(ARGS)

# Ten thousand damaged and forged files against every entry point (about an hour); `make test` tries 40 each.
fuzz: $(BIN)/.installed
	FUZZ=10000 $(TEST_ENV) $(BIN)/python -m pytest -n auto tests/contract/test_hostile_files.py tests/visualization/test_explorer.py

# A thousand calls of every method, 300 of them with an exception in the middle; prints what is held afterwards.
leaks: $(BIN)/.installed
	CALLS=1000 $(TEST_ENV) $(BIN)/python -m pytest -s tests/contract/test_model_conditions.py -k piles

# 40 places of each room are changed, one after the other: a test must fail (hours; ARGS="concepts vlm" takes some).
mutation: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet cosmic-ray
	$(TEST_ENV) $(BIN)/python tools/mutation.py --sample 40 $(ARGS)

# Known vulnerabilities of the installed dependencies; needs the network.
audit: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --skip-editable

# The same tests with the oldest versions that pyproject.toml allows. Their own deprecations are no failures here.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint tests/oldest.txt --editable '.[dev]'
	$(TEST_ENV) $(VENV)-oldest/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -W ignore::DeprecationWarning \
	  -W ignore::PendingDeprecationWarning -W ignore::FutureWarning

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Minutes; `bench-full` about two hours on 2 cores. Both end with benchmarks/results/README.md and its plots.
bench: $(BIN)/.installed-benchmark
	$(BIN)/python -m benchmarks.run.suite

bench-full: $(BIN)/.installed-benchmark
	$(BIN)/python -m benchmarks.run.suite --full

# The page, the plots and the README's table again, from the records as they are.
bench-page: $(BIN)/.installed
	$(BIN)/python -m benchmarks.report.page
	$(BIN)/python docs/tools/written.py

# An editable install of the package with its development tools; done again when the dependencies change.
$(BIN)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(BIN)/.installed-benchmark: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,benchmark]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: docs pages tutorials

# Numbers of records, helps of commands and names of the reference, written into docs/; a test compares.
pages: $(BIN)/.installed
	$(BIN)/python docs/tools/written.py

# The site in site/: warnings are errors, nothing is fetched from elsewhere, links, descriptions and spelling are checked.
docs: $(BIN)/.installed-docs
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs tutorials/*.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/tools/check_site.py site

# Run all notebooks from their sources, and write them and the pictures of the documentation (some minutes).
tutorials: $(BIN)/.installed-tutorials
	$(BIN)/python tutorials/build.py
	$(BIN)/python docs/tools/written.py

$(BIN)/.installed-docs: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]'
	touch $@

$(BIN)/.installed-tutorials: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev,tutorials]'
	touch $@
