# Two targets do everything, the set-up included: `make demo` and `make test`.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
CORES ?= $(shell nproc 2>/dev/null || echo 2)
GPUS ?= 2
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check $(if $(DMIR_VERBOSE),,-qq)

.PHONY: demo needed test test-faults test-slurm gpu check docs format graph architecture benchmark clean

# DMIR_VERBOSE=1 says everything, pip and Snakemake too
demo: needed .venv/.installed
	@$(BIN)/python envs/unchanged.py || { $(BIN)/dmir run config/config.yaml --cores $(CORES) \
		--resources gpu=$(GPUS) mem_mb=$$($(BIN)/python envs/needs.py --memory) \
		&& $(BIN)/python envs/unchanged.py --remember; }
	@$(BIN)/dmir show results

needed:
	@$(if $(wildcard .venv/.installed),$(BIN)/python,$(or $(PYTHON),true)) envs/needs.py

# one thread a process: the same numbers whatever else was imported, and processes side by side
test: .venv/.installed-for-tests check
	OMP_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1 \
		$(BIN)/pytest -m "not pipeline and not faults and not slurm and not gpu" -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/pytest -m pipeline

# what docs/reliability.md promises: killed processes, full disks, damaged files; those that need root say so
test-faults: .venv/.installed-for-tests
	$(BIN)/pytest -m faults

# the pipeline on a Slurm of one node that the test starts itself: needs root, and Debian's slurm-wlm and munge
test-slurm: .venv/.installed-for-tests
	$(BIN)/pytest -m slurm

# tests, benchmarks and trainings on a graphics card: MINUTES at most, and what is left by the same command again;
# SCANS is a file of packed scans to train on, OUT the folder of (small) results. Without a card it says what it would do.
MINUTES ?= 25
OUT ?= benchmarks/results/gpu
gpu: .venv/.installed-for-tests
	$(BIN)/python benchmarks/gpu.py --minutes $(MINUTES) --out $(OUT) $(if $(SCANS),--scans $(SCANS))

check: .venv/.installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# the documentation as a site that needs no network, built strictly: a link that leads nowhere is an error
docs: .venv/.installed-for-tests
	@$(BIN)/python docs/build.py

format: .venv/.installed-for-tests
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules
	$(BIN)/dmir docs

# The stamp is written last, and taken away before anything changes: a set-up or an upgrade that was interrupted is
# begun again from an empty folder, by the same command; a finished one is upgraded where it is. One at a time: a second
# `make` waits for the first, and then finds that all is done.
.venv/.installed: requirements.txt requirements-elastix.txt constraints.txt pyproject.toml
ifdef ALONE
	@test -n "$(PYTHON)" || { echo "Error: no python3.11, 3.12 or 3.13 found; name one with PYTHON=..."; exit 1; }
	@echo "Installing the packages into .venv, which takes some minutes once ..."
	@$(PYTHON) -m venv $(if $(wildcard $@),,--clear) .venv
	@rm -f $@ $@-for-tests
	@$(PIP) -r requirements.txt -c constraints.txt
	@$(PIP) --no-deps -r requirements-elastix.txt
	@$(PIP) --no-deps --editable .
	@touch $@
else ifneq ($(shell command -v flock),)
	@flock --nonblock Makefile true || echo "Another make installs the packages: waiting for it."
	@flock Makefile $(MAKE) --no-print-directory ALONE=yes $@
else
	@$(MAKE) --no-print-directory ALONE=yes $@
endif

# without its dependencies: it asks for a newer NumPy than antspyx allows, for an efficiency report alone
.venv/.installed-for-tests: .venv/.installed requirements-dev.txt requirements-slurm.txt
	@$(PIP) -r requirements-dev.txt -c constraints.txt
	@$(PIP) --no-deps -r requirements-slurm.txt
	@touch $@

# the picture of the workflow in docs/workflow.md
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
	$(BIN)/python benchmarks/registration.py --out benchmarks/results/registration

clean:
	rm -rf results .snakemake
