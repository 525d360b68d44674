# All targets run in one environment: the active one, or else `.venv`, which the first of them makes.
.PHONY: demo check docs test test-slow test-floor test-upstream bench environment

# Which Python makes `.venv`: `make PYTHON=python3.12 test`.
PYTHON ?= python3
ifdef VIRTUAL_ENV
run := "$(VIRTUAL_ENV)/bin/python"
else
run := .venv/bin/python
endif

# From nothing to a trained model on generated scenes, drawn in outputs/demo/demo.png.
demo: environment
	$(run) -m hf_segvit demo --output outputs/demo

# Lint, format and types.
check: environment
	$(run) -m ruff check .
	$(run) -m ruff format --check .
	$(run) -m mypy

# The documentation, as a site in site/; a link or reference that leads nowhere is an error.
docs: environment
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs build --strict

# The quick suite: no network, under 15 minutes on two cores.
test: environment
	OMP_NUM_THREADS=1 $(run) -m pytest -n 2 -m "not slow"

# What takes longer.
test-slow: environment
	OMP_NUM_THREADS=1 $(run) -m pytest -n 2 -m slow

# The quick suite on the oldest supported versions, in an environment of its own.
test-floor: .venv-floor/installed
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n 2 -m "not slow"

# Ratios to the peers, printed one by one.
bench: environment
	$(run) benchmarks/compare_transformers.py
	$(run) benchmarks/post_processing.py
	$(run) benchmarks/metrics.py
	$(run) benchmarks/model_sizes.py

# Transformers' own common model tests, from the source distribution of the installed version.
test-upstream: environment
	version=$$($(run) -c "import transformers; print(transformers.__version__)"); \
	mkdir -p .cache && $(run) -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d .cache transformers==$$version && \
	tar -xzf .cache/transformers-$$version.tar.gz -C .cache && \
	HF_SEGVIT_TRANSFORMERS_TESTS=.cache/transformers-$$version/tests OMP_NUM_THREADS=1 \
	$(run) -m pytest -o addopts=-ra tests/upstream

# An active environment is used as it is, and gets the package only if it has none.
ifdef VIRTUAL_ENV
environment:
	@$(run) -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('hf_segvit') is None)" \
	|| $(run) -m pip install --quiet --editable ".[dev]"
else
environment: .venv/installed
endif

# The check runs before anything is made, and in the syntax of any Python: pip would say less, and later.
define require_python
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not there; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hf_segvit needs Python 3.11 or newer, and $(PYTHON) is ' + sys.version.split()[0] + '; name a newer one: make PYTHON=python3.12')"
endef

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/installed: pyproject.toml
	$(require_python)
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

.venv-floor/installed: pyproject.toml constraints-floor.txt
	$(require_python)
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --editable ".[dev]" --constraint constraints-floor.txt
	@touch $@
