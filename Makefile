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

# What users have: vLLM's own numbers of threads and requests, compiled, the models' own type (benchmarks/conditions.py).
BENCH = TOKENTIMING_DATA="$(TOKENTIMING_DATA)" $(BIN)/python benchmarks
# A published pair comes first in the report, where `make published` has fetched it; or name folders of another one.
PUBLISHED_TARGET ?= $(wildcard $(PUBLISHED)/gemma3)
PUBLISHED_DRAFT ?= $(wildcard $(PUBLISHED)/smollm2)
PUBLISHED_PAIR ?= Gemma 3 270M <- SmolLM2-135M-Instruct
PUBLISHED_ARGS = --target "$(PUBLISHED_TARGET)" --draft "$(PUBLISHED_DRAFT)" --pair "$(PUBLISHED_PAIR)"
MEASURED = kernels overhead acceptance greedy repeatability speed draft_step \
	$(if $(PUBLISHED_TARGET),acceptance_published repeatability_published startup)
# Longer ones, which are asked for by name: make results-soak.
LONG = speed_published serving scaling exactness pairs soak soak_pressure

# Test files that run at a time.
WORKERS ?= 2

.PHONY: setup published demo test lint clean distclean results report $(MEASURED:%=results-%) $(LONG:%=results-%)

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
	$(TEST_ENV) $(if $(ALL),TOKENTIMING_ALL=1) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

results: $(MEASURED:%=results-%)  # A compact set; one part alone: make results-kernels. With -k, whatever works.
	$(MAKE) report

report:
	$(BIN)/python benchmarks/report.py

$(MEASURED:%=results-%) $(LONG:%=results-%) report: | $(READY) .venv/benchmarks

.venv/benchmarks: | $(READY)  # Pictures, and what the kernels are held against.
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[benchmarks]"
	@touch $@

results-kernels:
	$(BENCH)/kernels.py --samples 12 --rounds 2

results-overhead:
	$(BENCH)/overhead.py --steps 30
	$(BENCH)/overhead.py --steps 30 --batch 8 --name overhead_batch

results-acceptance:
	$(BENCH)/acceptance.py

results-acceptance_published:
	$(BENCH)/acceptance.py $(PUBLISHED_ARGS) --name acceptance_published --num-prompts 8 --group 4 --tokens 24 --temperatures 0 0.8 \
		--workloads heldout/english_stories heldout/python heldout/english_gsm8k heldout/russian_tinystories \
		heldout/multilingual_udhr --dtype float32  # Six times as fast without instructions for bfloat16.

results-greedy:  # In float32, where greedy output has to be plain decoding's.
	$(BENCH)/acceptance.py --dtype float32 --temperatures 0 --num-prompts 64 --name greedy \
		--methods plain "ngram (vLLM)" "tli (vLLM)" slem tokentiming

results-repeatability:
	$(BENCH)/repeatability.py

results-repeatability_published:
	$(BENCH)/repeatability.py $(PUBLISHED_ARGS) --name repeatability_published --num-prompts 8 --tokens 16

results-startup:
	$(BENCH)/startup.py $(PUBLISHED_ARGS)

results-speed:
	$(BENCH)/suite.py --grid short --fresh

results-draft_step:
	$(BENCH)/draft_step.py --repetitions 2

results-speed_published:
	$(BENCH)/suite.py --grid short --fresh $(PUBLISHED_ARGS) --name speed_published --ratios 0 --groups 6 --tokens 32 \
		--concurrencies 1 --methods plain "tli (vLLM)" slem tokentiming

results-serving:
	$(BENCH)/serving.py --target benchmarks/results/models/target-ratio-20

results-scaling:
	$(BENCH)/scaling.py

results-exactness:
	$(BENCH)/exactness.py --quick

results-pairs:
	$(BENCH)/pairs.py --tokenizers "$(TOKENTIMING_DATA)/tokenizers" --texts "$(TOKENTIMING_DATA)/multilingual"

results-soak:
	$(BENCH)/soak.py --texts "$(TOKENTIMING_DATA)" --as-users --requests 2000

results-soak_pressure:  # With too few blocks, in float32.
	$(BENCH)/soak.py --texts "$(TOKENTIMING_DATA)"

clean:  # What was built; the installed environment stays.
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache $(READY)
	rm -f csrc/*.c csrc/*.cpp csrc/*.html vllm_tokentiming/align/*.so

distclean: clean
	rm -rf .venv
