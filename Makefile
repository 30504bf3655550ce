# make demo   the whole method on embedded data: creates .venv, installs, ends with the path of the report
# make test   the tests;  make check  format, lint, types, floors, knobs, sizes
# make faults kills, failing disks, damaged files and more, injected one after another; the tally in build/faults.json
# make bench  side-by-side measurements with other libraries, which it installs; about half an hour on 2 quiet cores
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check faults bench clean

.venv/demo.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/dev.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@ .venv/demo.stamp

.venv/bench.stamp: .venv/demo.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	touch $@

demo: .venv/demo.stamp
	$(BIN)/fewlabels demo

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist worksteal

check: .venv/dev.stamp
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_house.py

faults: .venv/dev.stamp
	mkdir -p build
	$(BIN)/python tests/faults --kills 100 --json build/faults.json

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks views --peers lightly pillow torchvision torchvision_batched kornia --threads 1
	$(BIN)/python -m benchmarks loss --peers lightly --threads 1
	$(BIN)/python -m benchmarks loss --peers lightly --threads 2
	$(BIN)/python -m benchmarks jpeg --peers lightly torchvision --threads 1
	$(BIN)/python -m benchmarks step --peers lightly --threads 2
	$(BIN)/python -m benchmarks distill --threads 2
	$(BIN)/python -m benchmarks curves --threads 2
	$(BIN)/python -m benchmarks plot
	$(BIN)/python benchmarks/digits.py

clean:
	rm -rf .venv build dist
