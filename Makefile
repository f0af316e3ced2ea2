.PHONY: check format lint types test demo docs claims

check: format lint types test

format:
	ruff format --check .

lint:
	ruff check .

types:
	mypy

test:
	pytest

demo:
	featpatch demo

docs:
	python .ci/docs build/docs

claims:
	python benchmarks/claims.py
