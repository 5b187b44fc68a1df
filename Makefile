# `make demo` and `make test` are all a newcomer needs; both make the environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PEERS  ?= .peers
# Peers that were installed elsewhere are taken as they are.
PEERS_STAMP := $(if $(filter .peers,$(PEERS)),.peers/.installed,$(PEERS))

.PHONY: demo test test-slow soak interop-js fuzz lint format bench bench-cut bench-net bench-transfer bench-relay bench-wan bench-swarm bench-engine demo-model demo-manifest clean

# The main job end to end on the model in manifests/demo: add, seed, pin through the DHT, run over two machines' worth of processes.
demo: $(STAMP)
	@$(BIN)/python manifests/demo/demo.py

# What CI runs: lint, types, and every test that takes seconds.
test: lint
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not slow"

# Real js-libp2p and Helia nodes against ours; installs them, with Node 22, from npm.
interop-js: $(STAMP)
	cd tests/interop && npm install --silent --no-audit --no-fund --no-package-lock --no-save --ignore-scripts . \
		node-$$(uname -s | tr A-Z a-z)-$$(uname -m | sed 's/x86_64/x64/;s/aarch64/arm64/')@22
	$(BIN)/pytest -q tests/system/test_helia.py tests/system/test_js_libp2p.py tests/system/test_js_relay.py

# Crash loops and soaks that take minutes.
test-slow: $(STAMP)
	$(BIN)/pytest -q -m slow

# A swarm that is lived in, with deaths, a liar and a pest, for $(MINUTES); takes less than a core.
MINUTES ?= 30
soak: $(STAMP)
	$(BIN)/python -m tests.soak.soak --minutes $(MINUTES)

# Hundreds of pins in one running seed that evicts; objects by type and memory before and after.
.PHONY: soak-pins
soak-pins: $(STAMP)
	$(BIN)/python -m tests.soak.pins

# Coverage-guided, over what strangers' bytes reach first, each target for $(SECONDS); says so where atheris is not installed.
SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.run --seconds $(SECONDS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each prints its figures as ratios to limits measured in the same run.
bench: bench-cut bench-net bench-transfer bench-engine

bench-cut: $(STAMP)
	$(BIN)/python -m tests.bench.bench_cut

bench-net: $(STAMP)
	$(BIN)/python -m tests.bench.bench_net

bench-transfer: $(STAMP)
	$(BIN)/python -m tests.bench.bench_transfer

# Through a relay, as ratios to a direct connection.
bench-relay: $(STAMP)
	$(BIN)/python -m tests.bench.bench_relay

# 200 Mbit/s, 50 ms there and back, 1 % loss, between two network namespaces made here: needs root and TUN devices.
bench-wan: $(STAMP)
	$(BIN)/python -m tests.bench.bench_wan

# A flash crowd in virtual time; minutes of CPU at 50 leechers.
bench-swarm: $(STAMP)
	$(BIN)/python -m tests.bench.bench_swarm

# The same between processes on real sockets, at equal caps; two minutes.
.PHONY: bench-crowd
bench-crowd: $(STAMP)
	$(BIN)/python -m tests.bench.bench_crowd

# Processor time of the pure session, by the number of blocks.
.PHONY: bench-session
bench-session: $(STAMP)
	$(BIN)/python -m tests.bench.bench_session

bench-engine: $(STAMP)
	$(BIN)/python -m tests.bench.bench_engine_memory

# The ort engine beside llama.cpp on the same files, about a minute and a half for each of $(TYPES); PEERS is where llama-cpp-python is.
TYPES ?= Q4_0 Q8_0 Q4_K_M
.PHONY: bench-llama
bench-llama: $(STAMP) $(PEERS_STAMP)
	$(BIN)/python -m tests.bench.bench_engine --peers $(PEERS)/bin/python --types $(TYPES)

# mlx on the GPU of this machine (Metal, or CUDA with mlx[cuda13] in the environment): its contract, its parity, and tokens/s beside llama.cpp's.
.PHONY: bench-gpu
bench-gpu: $(STAMP)
	$(BIN)/python -m tests.bench.bench_engine --gpu --peers $(PEERS)/bin/python --types $(TYPES)
	$(BIN)/pytest -q tests/unit/engines/test_engine_contracts.py tests/conformance/test_engine_parity.py -k "TestMlxEngine or mlx" -m "not slow"

# What ort's repacking costs, type by type, beside a copy of the same bytes; two minutes.
.PHONY: bench-packing
bench-packing: $(STAMP)
	$(BIN)/python -m tests.bench.bench_packing

# Token ids for every pre-tokenizer, and each step of sampling, against llama.cpp's; PEERS is where llama-cpp-python is.
.PHONY: parity-tokens
parity-tokens: $(STAMP) $(PEERS_STAMP)
	PEERS=$(PEERS) $(BIN)/python -m tests.parity.tokens
	PEERS=$(PEERS) $(BIN)/python -m tests.parity.sampling

# Every architecture × type × engine against llama.cpp's logits; minutes.
.PHONY: parity
parity: $(STAMP) $(PEERS_STAMP)
	PEERS=$(PEERS) $(BIN)/python -m tests.parity.logits

# The same, kept as the table that README names.
.PHONY: parity-table
parity-table: $(STAMP) $(PEERS_STAMP)
	PEERS=$(PEERS) $(BIN)/python -m tests.parity.logits --table tests/conformance/parity/table.md
	$(BIN)/python -m tests.parity.unsupported --write

# What we are measured and compared against, in an environment of its own; builds llama.cpp: minutes.
.PHONY: peers
peers: .peers/.installed

.peers/.installed: tests/bench/peers.txt
	$(PYTHON) -m venv .peers
	.peers/bin/pip install --quiet --disable-pip-version-check -r tests/bench/peers.txt
	@touch $@

# omni beside curl and aria2c from nginx, libtorrent and iroh; what is not installed is skipped by name (see `make peers`).
.PHONY: bench-peers
bench-peers: $(STAMP)
	PEERS=$(PEERS) $(BIN)/python -m tests.bench.bench_peers

# Train the demo model again (minutes); the result is committed.
demo-model: $(STAMP)
	$(BIN)/python manifests/demo/train.py

# Sign the demo model's manifest again, under the identity of $$OMNI_HOME.
demo-manifest: $(STAMP)
	$(BIN)/python manifests/sign.py manifests/demo/omni-demo-F16.gguf

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "omni needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,tools]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
