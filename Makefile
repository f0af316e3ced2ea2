.PHONY: check format lint types test extended coverage mutants demo docs notebooks claims

check: format lint types test

format:
	ruff format --check .

lint:
	ruff check .

types:
	mypy

test:
	pytest

extended:
	pytest -m "extended or not extended"

coverage:
	pytest --cov=featpatch --cov-report=term:skip-covered

mutants:
	.ci/mutants/run.py

demo:
	featpatch demo

docs:
	pip install -q -r docs/requirements.txt
	mkdocs build --strict

notebooks:
	PLOTLY_RENDERER=png PYTHONWARNINGS=ignore jupyter execute --inplace examples/*.ipynb

claims:
	python benchmarks/claims.py
