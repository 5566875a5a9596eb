# make quickstart   set everything up and run an adapter's whole life on a real 135M model
# make test         set everything up and run the tests          (make test-all: the slow ones, too)
# make test-older   tests of methods and models on transformers 4.57
# make test-oldest  tests on the oldest versions that pyproject.toml allows
# make test-numerics  tests of numbers again, with sums in another order: what is green on one processor alone is red here
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# Tests use one worker per core; torch gets one thread in each.
WORKERS ?= auto
# An environment with transformers 4.57, and what is run there: what depends on the release of transformers most.
OLDER ?= $(VENV)/older
OLDER_TESTS = tests/compat tests/plugins/test_prefix.py tests/plugins/test_prompt.py tests/plugins/test_lora.py \
  tests/tensors/front tests/tensors/live/test_attached.py tests/peft/test_virtual_tokens.py tests/peft/test_encoders.py \
  tests/verbs/test_trainer_callback.py tests/tensors/base/test_map.py tests/tensors/base/test_formats.py
# Rows of the table of docs/bases.md that transformers 4.57 has reasons of its own to spoil; scripts/bases tries them all.
OLDER_BASES = mixtral or deepseek_v3 or bamba or recurrent_gemma or apertus or llava or qwen2_vl or gemma3 or document

# An environment with the oldest versions that pyproject.toml allows, and what is run there.
OLDEST ?= $(VENV)/oldest
OLDEST_TESTS = tests/compat tests/documents tests/artifact tests/registry tests/methods tests/cli tests/tensors tests/training \
  tests/plugins tests/peft/test_heads.py tests/peft/test_agreement.py tests/verbs/test_train.py \
  tests/verbs/test_codec.py tests/verbs/test_quantized.py tests/verbs/test_vocabulary.py tests/test_torch_floor.py

# Where numbers are compared: run once more under another order of sums (MKL's kernels for any x86 processor).
NUMERICS = tests/tensors tests/plugins tests/methods tests/training/test_attention.py tests/training/test_loss.py \
  tests/verbs/test_merge.py tests/verbs/test_mix.py tests/verbs/test_codec.py tests/verbs/test_attach.py \
  tests/verbs/test_predict_embedding.py tests/verbs/test_seq2seq.py tests/peft/test_tasks.py

.PHONY: setup quickstart test test-all test-older test-oldest test-numerics lint format bench clean

setup: $(READY)

$(READY): scripts/setup constraints.txt pyproject.toml
	scripts/setup $(VENV)
	touch $@

quickstart: $(READY)
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart/run

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS)

$(OLDER)/.ready: $(READY) scripts/older
	scripts/older $(OLDER) $(VENV)
	touch $@

test-older: $(OLDER)/.ready
	$(OLDER)/bin/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not oracle" $(OLDER_TESTS)
	$(OLDER)/bin/python -m pytest -n $(WORKERS) -m slow -k "$(OLDER_BASES)" tests/bases

$(OLDEST)/.ready: $(READY) scripts/oldest constraints-oldest.txt pyproject.toml
	scripts/oldest $(OLDEST) $(VENV)
	touch $@

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not slow and not gpu and not model and not oracle" $(OLDEST_TESTS)

test-numerics: $(READY)
	MKL_CBWR=COMPATIBLE $(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not gpu" $(NUMERICS)

lint: $(READY)
	$(BIN)/ruff check . scripts/bases scripts/errors scripts/rooms scripts/torch-floor
	$(BIN)/ruff format --check . scripts/bases scripts/errors scripts/rooms scripts/torch-floor
	$(BIN)/mypy
	$(BIN)/mypy --strict plugins examples tests
	MYPYPATH=tests $(BIN)/mypy --strict scripts/bases
	$(BIN)/mypy --strict scripts/errors
	$(BIN)/mypy --strict scripts/rooms
	$(BIN)/mypy --strict scripts/torch-floor
	$(BIN)/python scripts/errors

format: $(READY)
	$(BIN)/ruff check --fix . scripts/bases scripts/errors scripts/rooms scripts/torch-floor
	$(BIN)/ruff format . scripts/bases scripts/errors scripts/rooms scripts/torch-floor

bench: $(READY)
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf $(VENV) .cache build
