# Two targets do everything, the set-up included: `make demo` and `make test`.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
CORES ?= $(shell nproc 2>/dev/null || echo 2)
GPUS ?= 2
BIN := .venv/bin

.PHONY: demo test test-faults test-slurm check format graph architecture benchmark clean

demo: .venv/.installed
	$(BIN)/snakemake --cores $(CORES) --resources gpu=$(GPUS)
	@$(BIN)/dmir table results/tables/comparison.csv
	@echo "The report is results/report.html: open it in a browser."

# one thread a process: the same numbers whatever else was imported, and processes side by side
test: .venv/.installed-for-tests check
	OMP_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1 \
		$(BIN)/pytest -m "not pipeline and not faults and not slurm" -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/pytest -m pipeline

# what docs/reliability.md promises: killed processes, full disks, damaged files; those that need root say so
test-faults: .venv/.installed-for-tests
	$(BIN)/pytest -m faults

# the pipeline on a Slurm of one node that the test starts itself: needs root, and Debian's slurm-wlm and munge
test-slurm: .venv/.installed-for-tests
	$(BIN)/pytest -m slurm

check: .venv/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src/dmir
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

format: .venv/.installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
	$(BIN)/dmir docs

# The stamp is written last, and taken away before anything changes: a set-up or an upgrade that was interrupted is
# begun again from an empty folder, by the same command; a finished one is upgraded where it is.
.venv/.installed: requirements.txt constraints.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Error: no python3.11, 3.12 or 3.13 found; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv
	rm -f $@ $@-for-tests
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --editable .
	touch $@

# without its dependencies: it asks for a newer NumPy than antspyx allows, for an efficiency report alone
.venv/.installed-for-tests: .venv/.installed requirements-dev.txt requirements-slurm.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps -r requirements-slurm.txt
	touch $@

# the picture of the workflow in the README
graph: .venv/.installed
	@$(BIN)/python workflow/rulegraph.py

# the figure of the proposed network in the documentation
architecture: .venv/.installed
	$(BIN)/python docs/figures/draw_architecture.py

# seconds, memory and work of every network and of the costly operations: tables, and files for later
benchmark: .venv/.installed
	$(BIN)/python benchmarks/networks.py --step --out benchmarks/results/networks.csv
	$(BIN)/python benchmarks/operations.py --out benchmarks/results/operations.csv
	$(BIN)/python benchmarks/data.py --out benchmarks/results/data.csv
	$(BIN)/python benchmarks/scoring.py --out benchmarks/results/scoring.csv

clean:
	rm -rf results .snakemake
