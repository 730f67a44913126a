# Thin: each target names what it needs and one command. A second `make` does only what changed.
# From a clean clone: `make test` or `make demo`. Needed: Python >= 3.11 with venv, cargo (Rust >= 1.89), gcc that links, make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Seconds for each fuzz target; seeds for each simulator test; how often a server is killed under a guest.
SECONDS ?= 600
SEEDS   ?= 1000000
KILLS   ?= 50

DEPS   := $(VENV)/.stamp-deps
ENGINE := $(VENV)/.stamp-engine
PEERS  := $(VENV)/.stamp-peers
RUST   := $(shell find crates -name '*.rs' -o -name Cargo.toml) Cargo.toml Cargo.lock rust-toolchain.toml
# Two cargo profiles on purpose. Tests want debug assertions and quick links: the dev profile builds them from nothing in 1 minute, where
# the release profile takes 2.5 although the engine's build has compiled the dependencies already (link-time optimisation of each test program).
# A million seeds want an optimised build, and every assertion.
SOAK_PROFILE := CARGO_PROFILE_RELEASE_DEBUG_ASSERTIONS=true CARGO_PROFILE_RELEASE_LTO=off
# The bindings are a shared library of an interpreter: Python tests them (tests/), cargo has nothing to run them in.
CARGO_TEST := cargo test --locked --workspace --exclude qpair-python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

.PHONY: help demo demo-vm test test-rust test-python lint format bench fuzz soak engine ready
help:
	@sed -n 's/^## //p' Makefile

## make demo       start the stack, attach a client through vhost-user, measure, stop
demo: $(ENGINE)
	$(BIN)/python -m qpair.demo

## make demo-vm    boot a real Linux guest on a qpair disk, make a file system, run fio with verify
demo-vm: ready
	PYTHONPATH=tools $(BIN)/python -m qpair.demo vm

## make test       everything that needs no hardware: the crates' tests, then the Python and interoperability tests
test: ready test-rust test-python
test-rust:
	$(CARGO_TEST)
test-python: ready
	QPAIR_TEST_ENGINE=real $(BIN)/python -m pytest

## make lint       ruff, mypy, stubtest, clippy, rustfmt
lint: $(ENGINE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tools
	$(BIN)/stubtest qpair._engine
	cargo fmt --all --check
	cargo fmt --all --check --manifest-path fuzz/Cargo.toml
	cargo clippy --locked --workspace --all-targets -- -D warnings

## make format     what lint's formatters would write
format: $(DEPS)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	cargo fmt --all

## make bench      the figures of docs/performance.md, on this machine
bench: ready
	$(BIN)/python benches/run.py

## make fuzz       each fuzz target for SECONDS seconds (default 600), Rust then Python
fuzz: $(ENGINE)
	tools/fuzz.sh $(SECONDS)

## make soak       KILLS kills of a server under a guest (default 50), then the simulator's tests with SEEDS seeds (default 1000000)
soak: ready
	QPAIR_CRASH_ROUNDS=$(KILLS) $(BIN)/python -m pytest tests/interop/test_crash.py
	QPAIR_SIM_SEEDS=$(SEEDS) $(SOAK_PROFILE) $(CARGO_TEST) --release --target-dir target/soak

engine: $(ENGINE)

# Compiling and fetching the test peers do not wait for each other.
ready:
	@$(MAKE) --no-print-directory -j2 $(ENGINE) $(PEERS)

$(DEPS): pyproject.toml tools/dev_requirements.py
	@tools/preflight.sh $(PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python tools/dev_requirements.py dev | $(BIN)/pip install --quiet --requirement /dev/stdin
	@touch $@

$(ENGINE): $(DEPS) $(RUST)
	$(BIN)/maturin develop --release --locked
	@touch $@

$(PEERS): $(DEPS) tools/setup-apt.sh tools/apt-packages.txt tools/setup-guest.sh
	tools/setup-apt.sh
	tools/setup-guest.sh
	@touch $@
