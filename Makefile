# make demo   adapt SAM on real images and write a report       make test   run the test suite
# make bench  measure against eager PyTorch                     make lint   ruff, mypy, clang-format
# Each sets up .venv first; see CONTRIBUTING for the variables that the build reads.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test bench lint clean

demo: $(READY)
	$(VENV)/bin/vfmk demo --output report

test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal  # one thread each

bench: $(READY)
	$(RUN) -m pytest bench --benchmark-json build/bench.json
	$(RUN) -m bench.report build/bench.json

lint: $(READY)
	$(VENV)/bin/pre-commit run --all-files

# Again whenever what is compiled or required changes. Without build isolation, which would fetch a
# second torch to build against.
$(READY): pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet torch torchvision ninja "setuptools>=77" wheel
	$(RUN) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf build dist report *.egg-info vfmk/*.so $(READY)
