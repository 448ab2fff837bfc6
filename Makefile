# One tool for everything a clone can do; `make help` lists it. CI runs these targets too (.ci/run).
# Needs Rust, Python 3.11 with pip and venv, a C compiler and make; everything else is installed into .venv/ and target/.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(CURDIR)/$(VENV)/bin
BINARY := target/release/iqoqo-dask-worker
# For `make test`: options for pytest, such as -k NAME; for `make demo` and `make bench`: options of theirs.
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build demo test test-rust test-python test-versions oracle lint format bench bench-work fuzz fuzz-smoke

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- what the other targets need -------------------------------------------------------------------------------------

# The stamp is newer than the pinned list when every package of the list is installed.
$(VENV)/.installed: requirements/test.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10: name another one with PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "installing python3-venv, which $(PYTHON) comes without"; apt-get install -y -q python3-venv; }
	[ -x $(VENV)/bin/python ] || "$(PYTHON)" -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/test.txt
	@touch $@

venv: $(VENV)/.installed

build: ## build the release binary
	cargo build --locked --release --bin iqoqo-dask-worker

# --- the two commands of the README ----------------------------------------------------------------------------------

demo: build $(VENV)/.installed ## run a real job on a stock scheduler and one worker of ours, and check the answers
	@$(RUN)/python -m demo $(ARGS)

test: test-rust test-python ## run all tests: units, the oracle, behaviour against a real scheduler

test-rust: $(VENV)/.installed
	PYTHON="$(RUN)/python" cargo test --locked

test-python: build $(VENV)/.installed
	IQOQO_DASK_WORKER="$(CURDIR)/$(BINARY)" $(RUN)/python -m pytest $(ARGS)

test-versions: build ## run a part of the behaviour tests on the oldest Dask and on newer Pythons
	@tests/versions

oracle: $(VENV)/.installed ## compare a million events of the state machine with Dask's own (ORACLE_EVENTS)
	ORACLE_EVENTS=$(or $(ORACLE_EVENTS),1000000) PYTHON="$(RUN)/python" \
	  cargo test --locked --test oracle -- --nocapture

# --- the rest --------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed ## check format and lints of Rust and Python
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	$(RUN)/ruff check
	$(RUN)/ruff format --check

format: $(VENV)/.installed ## format Rust and Python
	cargo fmt
	$(RUN)/ruff format

bench: build $(VENV)/.installed ## measure stock, ours and a worker that does nothing side by side
	cargo build --locked --release --example do_nothing_worker
	@$(RUN)/python -m benches.side_by_side $(ARGS)

bench-work: build $(VENV)/.installed ## measure arrays, dataframes, bags and futures on stock and ours
	@$(RUN)/python -m benches.real_work $(ARGS)

# Each target is one parser of bytes that a peer sends; FUZZ_SECONDS is for each of them.
FUZZ_TARGETS := $(notdir $(basename $(wildcard fuzz/src/bin/*.rs)))

fuzz: FUZZ_SECONDS ?= 1800
fuzz: ## fuzz every parser of a peer's bytes for half an hour (FUZZ_SECONDS)
fuzz-smoke: FUZZ_SECONDS ?= 10
fuzz-smoke: ## fuzz every parser of a peer's bytes for ten seconds
fuzz fuzz-smoke:
	cd fuzz && for target in $(FUZZ_TARGETS); do \
	  mkdir -p corpus/$$target artifacts && \
	  cargo run --locked --release --bin $$target -- corpus/$$target -artifact_prefix=artifacts/ \
	    -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -timeout=10 -print_final_stats=1 || exit 1; \
	done
