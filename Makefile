# Everything a fresh machine needs: `make demo` and `make test` set up by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test scripts notebooks run-notebooks export docs clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

setup: .venv/ready  ## a virtual environment with pinned packages

demo: .venv/ready  ## train both models on the embedded corpus, compare, draw: runs/demo
	$(BIN)/nanollada demo

test: .venv/ready  ## every notebook in a fresh kernel, then all tests
	$(BIN)/python .ci/notebooks.py test
	$(BIN)/python .ci/pages.py  # the site's pages, without Quarto
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadscope

scripts: .venv/ready  ## notebooks -> scripts/*.py, for editing
	$(BIN)/python .ci/notebooks.py scripts

notebooks: .venv/ready  ## scripts/*.py -> notebooks, cell ids kept
	$(BIN)/python .ci/notebooks.py notebooks

run-notebooks: .venv/ready  ## execute all notebooks and store what they print
	$(BIN)/python .ci/notebooks.py run

export: .venv/ready  ## notebooks -> package
	$(BIN)/nbdev_export

docs: .venv/ready  ## the site, in _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "Quarto is not installed: get it from https://quarto.org"; exit 1; }
	$(BIN)/python .ci/pages.py
	quarto render _proc --no-cache
	rm -rf _docs && mv _proc/_docs _docs

clean:  ## remove what the other targets made, except runs and data
	rm -rf .venv build scripts _proc _docs *.egg-info nanollada/__pycache__ tests/__pycache__
