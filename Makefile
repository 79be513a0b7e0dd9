# Every target sets up .venv by itself; nothing has to be installed by hand but Python 3.11 or later with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all coverage lint bench-distill-smoke bench-real format schema docs docs-serve docs-version build release-check clean clean-venv

help:
	@echo "make quickstart  distil, export, verify and judge students of the shipped teacher: build/quickstart/report.html"
	@echo "make test        lint, then the tests"
	@echo "make coverage    the same, with the branch coverage of what they run"
	@echo "make test-all    the same with the tests that take minutes, all attacks among them, and their branch coverage"
	@echo "make lint        ruff, mypy and import-linter"
	@echo "make bench-distill-smoke  the whole comparison of methods at a toy budget"
	@echo "make bench-real  Stable Diffusion 1.5 and SDXL through import, export, images and training; hours"
	@echo "make format      let ruff rewrite the sources"
	@echo "make schema      write docs/schema anew from the code"
	@echo "make docs        the documentation site, in build/site; make docs-serve shows it while pages are written"
	@echo "make docs-version VERSION=0.1   that site as a version of the branch gh-pages, which is not pushed"
	@echo "make build       wheel and sdist, in dist/"
	@echo "make release-check  whether this can be released: build, metadata, wheel, changelog, version, documentation"
	@echo "make clean       remove what the targets above leave; make clean-venv removes .venv too"

# setuptools comes first and is used as it stands, so that its version is pinned like the others'. Nothing is compiled to
# bytecode ahead: that is two fifths of the installation, and most of it is never imported.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-compile --no-build-isolation --editable '.[all,dev]'
	@touch $@

quickstart: $(READY)
	$(BIN)/redif quickstart --output build/quickstart

# All parts run, whatever one of them says. The attacks fork and ring alarms, in a process of their own, while the linters
# have the other core; then the other tests have a process for each core. Coverage is of both, and the last part prints
# it; measuring costs a third to two thirds of the time, so make test leaves it out.
# Further arguments for pytest, such as --cpu-durations 50.
PYTEST_ARGS ?=
PARALLEL := -n auto --dist worksteal --max-worker-restart 0 --ignore tests/attacks
COVER := --cov --cov-report=

test: $(READY)
	@$(call run_tests,,)

coverage: $(READY)
	@$(call run_tests,$(COVER),--cov-append)

test-all: $(READY)
	@$(call run_tests,-m "slow or not slow" $(COVER),--cov-append)

define run_tests
	failed=0; mkdir -p build; \
	$(MAKE) --no-print-directory lint >build/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest $(1) tests/attacks || failed=1; \
	wait $$lint || failed=1; cat build/lint.log; \
	$(BIN)/python -m pytest $(1) $(2) $(PARALLEL) $(PYTEST_ARGS) || failed=1; \
	exit $$failed
endef

bench-distill-smoke: $(READY)
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_distillation_benchmark.py

# Real sizes through the whole chain: some hours, 60 GB of disk. What is there already is taken.
bench-real: $(READY)
	$(BIN)/python -m benchmarks.real_size sd15 --precision fp32,int8wo --rounds 1 --json docs/results/real-size-sd15.json
	$(BIN)/python -m benchmarks.real_training sd15 --json docs/results/real-training-sd15.json
	$(BIN)/python -m benchmarks.real_size sdxl --precision int8wo --rounds 1 --json docs/results/real-size-sdxl.json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(READY)
	$(BIN)/python -m redif_sdk.artifact.schema > docs/schema/redif-1.json.new
	mv docs/schema/redif-1.json.new docs/schema/redif-1.json
	$(BIN)/python -m redif_sdk.reward_server.protocol > docs/schema/reward.json.new
	mv docs/schema/reward.json.new docs/schema/reward.json

# A broken link, a missing anchor and any other warning is an error (not with --quiet, which
# mkdocs counts none under). Nothing is fetched. The variables silence what the
# theme says of mkdocs 2, and transformers of torchvision.
docs docs-serve docs-version: export NO_MKDOCS_2_WARNING := 1
docs docs-serve docs-version: export TRANSFORMERS_VERBOSITY := error

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict

docs-serve: $(READY)
	$(BIN)/python -m mkdocs serve

# One commit on gh-pages: the version, and "latest" for it. mike keeps the other versions.
docs-version: docs
	$(BIN)/mike deploy --update-aliases $(VERSION) latest
	$(BIN)/mike set-default latest

# The wheel is made from the sdist, so that nothing that an earlier build left behind gets into it.
build: $(READY)
	rm -rf dist
	$(BIN)/python -m build --quiet --no-isolation --outdir dist .

# RELEASE_ARGS=--rehearsal between releases: uncommitted changes and "Unreleased" are no faults then.
RELEASE_ARGS ?=
release-check: $(READY)
	$(BIN)/python .ci/release_check.py $(RELEASE_ARGS)

# build/ also holds the checkpoints of teachers in training: only what is named here is removed.
clean:
	rm -rf dist build/site build/quickstart build/test-cache build/lib build/bdist.* *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find models distill export demo zoo redif_sdk tests -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv: clean
	rm -rf $(VENV)
