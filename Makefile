# The project's commands; `make` alone lists them. The two that the README names are `make serve` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# pip's indexes, certificates and proxies come from its own configuration. The two variables pin what builds the
# package as well: before pip 25.3 the first one reaches into the isolated build, since then the second does.
CONSTRAINTS := $(strip $(PIP_CONSTRAINT) constraints.txt)
PIP := PIP_CONSTRAINT="$(CONSTRAINTS)" PIP_BUILD_CONSTRAINT="$(CONSTRAINTS)" \
    $(BIN)/python -m pip --disable-pip-version-check -q install

# What a new installation depends on. It is editable: a change of a Python file needs none.
BUILD_INPUTS := pyproject.toml constraints.txt $(wildcard CMakeLists.txt) $(shell find nanogpt -path '*/kernels/*' -type f)

# Commands that the tests call and the Debian packages they come from. CI also runs the tests that are slow on a desk.
SERVICES := chromium:chromium curl:curl nginx:nginx openssl:openssl prometheus:prometheus redis-server:redis-server \
    systemctl:systemd
ifneq ($(filter true 1 yes,$(CI)),)
SERVICES += qemu-aarch64:qemu-user aarch64-linux-gnu-g++:g++-aarch64-linux-gnu redis-server:redis-server
endif

# Images for containers often set it. Every process that is started would then compile the whole package anew: a server
# takes half as long again to come up, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help install serve test image-test ray-test check format docs site bench bench-cpu demo test-lowest constraints services wheel clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

install: $(VENV)/.installed ## Create .venv and install the package, and PyTorch where the compiled CPU runner is missing

# On loopback there are no clients to protect against each other: no limit there, unless RATE_LIMIT says one.
serve: install ## Serve on http://localhost:5000 (MODEL_CHECKPOINT, HOST, PORT and RATE_LIMIT are honoured)
	@case "$${HOST:-127.0.0.1}" in 127.*|localhost|::1) export RATE_LIMIT="$${RATE_LIMIT:-off}" ;; esac; \
	exec $(BIN)/python -m web.serve

test: $(VENV)/.installed-dev services ## Run every test (PYTEST_ARGS="-k tokenizer" for some)
	@exec $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

image-test: $(VENV)/.installed-dev ## Build the CPU image and drive it (minutes; docker or podman)
	$(BIN)/python -m pytest -q -s --timeout 3600 tests/images/build_and_run.py

ray-test: $(VENV)/.installed-dev ## Serve with Ray on a cluster of this machine (two minutes)
	$(BIN)/python -m pytest -q --cluster tests/services/test_ray.py

check: $(VENV)/.installed-dev ## Lint, formatting, types, and documentation in step with the code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/docs.py --check

format: $(VENV)/.installed-dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(VENV)/.installed-dev ## Write docs/settings.md and docs/cli.md anew from the code
	$(BIN)/python tools/docs.py

site: $(VENV)/.installed-dev ## Build the documentation as a site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: bench-cpu bench-http ## Run the benchmarks (benchmarks/*/README.md tell what they measure)

bench-cpu: $(VENV)/.installed-dev ## Run the benchmarks of the CPU runner
	$(BIN)/python -m benchmarks.cpu

bench-http: $(VENV)/.installed-dev ## Run the benchmark of streams over HTTP
	$(BIN)/python -m benchmarks.http

# The text is nanoGPT's: https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
DEMO_TEXT ?= ../shared/data/tinyshakespeare.txt

demo: $(VENV)/.installed-dev ## Train the embedded model anew into build/demo/model (an hour; goes on where it was stopped)
	test -f build/demo/data/dataset.json || \
	    $(BIN)/nanogpt prepare text $(DEMO_TEXT) --tokenizer characters --out build/demo/data
	$(BIN)/nanogpt train configs/demo.toml --resume auto
	$(BIN)/nanogpt convert build/demo/log/best_checkpoint.pt build/demo/model --force

test-lowest: $(VENV)/.installed-dev ## Run the unit tests with the oldest versions that pyproject.toml admits
	$(BIN)/python tools/test_lowest.py $(PYTEST_ARGS)

constraints: ## Write constraints.txt anew with the newest versions that pip finds (PyTorch stays)
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip -q install '.[dev]' $(shell grep ^torch== constraints.txt)
	build/constraints/bin/python tools/constraints.py > constraints.txt.new && mv constraints.txt.new constraints.txt

services: ## Install the system packages that the tests use (root on Debian or Ubuntu; says so otherwise)
	@tools/services.sh $(SERVICES)

wheel: $(VENV)/.installed-dev ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## Remove what was built; .venv stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nanogpt web tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@tools/create_venv.sh $(PYTHON) $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created $(BUILD_INPUTS)
	@echo "Installing nano-gpt-api into $(VENV); the first time takes a minute or two."
	@$(PIP) -e . || { echo "make: pip could not install the package; its message is above. Indexes and proxies are pip's own settings (PIP_INDEX_URL, PIP_CERT, …)." >&2; exit 1; }
	@if $(BIN)/python -c 'import nanogpt.runner.native' 2>/dev/null; then \
	    echo "Runner: the compiled one for this CPU; PyTorch is not needed."; \
	elif $(BIN)/python -c 'import torch' 2>/dev/null; then \
	    echo "Runner: PyTorch, which is installed (the compiled runner is not in this build)."; \
	else \
	    echo "Runner: PyTorch, which is installed now (the compiled runner is not in this build)."; \
	    $(PIP) torch; \
	fi
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests and checks need."
	@$(BIN)/python tools/requirements.py dev | $(PIP) -r /dev/stdin
	@touch $@
