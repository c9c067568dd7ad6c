# `make demo` and `make test` are all that a fresh machine with Python 3.11 or newer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# By themselves, and first: s3fs and moto's boto3 pin versions of botocore, and pip, asked for everything at once, tries
# hundreds of others before it finds the ones that agree.
S3 := 's3fs>=2025.9' 'moto[s3]>=5' 'flask>=3' 'flask-cors>=4'
# What an export must load in too: the tests put it before the environment's own.
LOWEST_TIMM := $(shell sed -n 's/.*"timm>=\([0-9.]*\)".*/\1/p' pyproject.toml)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test check unit slow bench soak docs clean

install: $(VENV)/stamp

demo: $(VENV)/stamp
	OMP_WAIT_POLICY=PASSIVE python -m pipelines.demo demo-out

test: check unit

check: $(VENV)/stamp
	ruff check .
	ruff format --check .
	mypy

# What fails beside other tests is run once more by itself: kills, signals and timings feel a busy machine.
unit: $(VENV)/stamp
	pytest -m "not slow" -n auto --dist worksteal || pytest -m "not slow" --last-failed --last-failed-no-failures none

# Jobs of several processes that are killed, signalled and requeued in every way, and the demo.
slow: $(VENV)/stamp
	pytest -m slow -n auto --dist worksteal

bench: $(VENV)/stamp
	python -m benchmarks.step

soak: $(VENV)/stamp
	python -m benchmarks.soak

# The site, into site/. It is built without a network and needs none to be read; --strict: no broken link.
docs: $(VENV)/docs-stamp
	mkdocs build --strict --quiet
	@! grep -rlE --include='*.html' '<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//' site || \
	  { echo "these pages would fetch something from elsewhere"; exit 1; }

$(VENV)/docs-stamp: $(VENV)/stamp
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tec-cache needs Python 3.11 or newer; say which: make test PYTHON=python3.12"; exit 1; }
	@echo "installing into $(VENV): several minutes, several GB with a torch for CUDA"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(S3)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/timm-lowest timm==$(LOWEST_TIMM)
	touch $@

clean:
	rm -rf $(VENV) demo-out site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
