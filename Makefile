# Two commands for a fresh machine with Python 3.11+: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
ONE_WORKER := distributed.num_workers=1 distributed.deepspeed=null train.per_device_train_batch_size=32 train.max_steps=80

.PHONY: demo compare test soak lint install

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[demo,dev]"
	touch $@

demo: install  ## the main job, end to end, on the sample set
	$(BIN)/python -m flipkd_dist.samples.demo

compare: install  ## the table on the sample set: L_sup alone, flip and its ablations, three seeds each
	$(BIN)/python -m flipkd_dist.samples.demo --pairs
	$(BIN)/python -m flipkd_dist compare flipkd_dist/samples/demo.yaml $(ONE_WORKER) \
	  --rows lora_sup,flip,no_mcl,no_dist,no_filter --seeds 3 --jobs 2

test: install lint
	tests/system/install.sh
	$(BIN)/python -m pytest -m "not soak" --numprocesses 2

soak: install
	tests/system/install.sh
	$(BIN)/python -m pytest -m soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/lint-imports
