.PHONY: check test test-slow test-floor test-upstream bench

# Lint, format and types.
check:
	ruff check .
	ruff format --check .
	mypy

# The quick suite: no network, under 15 minutes on two cores.
test:
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m "not slow"

# What takes longer.
test-slow:
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m slow

# The quick suite on the oldest supported versions, in an environment of its own.
test-floor:
	python -m venv .venv-floor
	.venv-floor/bin/pip install --quiet -e ".[dev]" -c constraints-floor.txt
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -n 2 -m "not slow"

# Ratios to the peers, printed one by one.
bench:
	python benchmarks/compare_transformers.py
	python benchmarks/post_processing.py
	python benchmarks/metrics.py
	python benchmarks/model_sizes.py

# Transformers' own common model tests, from the source distribution of the installed version.
test-upstream:
	version=$$(python -c "import transformers; print(transformers.__version__)"); \
	mkdir -p .cache && pip download --quiet --no-deps --no-build-isolation --no-binary :all: -d .cache transformers==$$version && \
	tar -xzf .cache/transformers-$$version.tar.gz -C .cache && \
	HF_SEGVIT_TRANSFORMERS_TESTS=.cache/transformers-$$version/tests OMP_NUM_THREADS=1 \
	python -m pytest -o addopts=-ra tests/upstream
