# Commands of the README. The first one sets `.venv` up (a few minutes); after that only changed kernels are built again.

PYTHON ?= python3
BIN := .venv/bin
# Newer than everything that the environment is made from, or it is set up again.
READY := .venv/ready
# The embedded target at the cost of a larger one: with one as cheap as its draft, nothing can be won.
WIDE := .venv/demo-target
# Two published models, which the tests run on, too. Gemma's terms have to be accepted: ACCEPT_GEMMA_TERMS=1.
PUBLISHED := .venv/published
# Real vocabularies and prompts; tests that need them are skipped where they are absent.
TOKENTIMING_DATA ?= $(abspath $(wildcard ../shared/data))
# One thread: the embedded models are too small to share among threads that wait for each other.
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING VLLM_NO_USAGE_STATS=1 \
	TOKENTIMING_PUBLISHED="$(abspath $(PUBLISHED))" $(if $(TOKENTIMING_DATA),TOKENTIMING_DATA="$(TOKENTIMING_DATA)")

.PHONY: setup published demo test lint clean distclean

setup: $(READY)

$(READY): pyproject.toml setup.py scripts/setup_environment.py $(wildcard csrc/*.pyx csrc/*.pxd)
	$(PYTHON) scripts/setup_environment.py
	@touch $@

demo: $(READY) $(WIDE)/widened.json
	$(BIN)/python examples/demo.py --target $(WIDE) $(ARGS)

$(WIDE)/widened.json: benchmarks/widen.py | $(READY)
	$(TEST_ENV) $(BIN)/python benchmarks/widen.py --target examples/models/target --out $(WIDE) --hidden 512 --layers 21

published: $(READY)
	$(BIN)/python examples/published_models.py $(PUBLISHED) $(if $(ACCEPT_GEMMA_TERMS),--accept-gemma-terms)

test: $(READY)
	-@$(MAKE) --no-print-directory published
	$(TEST_ENV) $(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:  # What was built; the installed environment stays.
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache $(READY)
	rm -f csrc/*.c csrc/*.cpp csrc/*.html vllm_tokentiming/*.so

distclean: clean
	rm -rf .venv
