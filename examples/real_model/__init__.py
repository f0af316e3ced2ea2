"""A real pretrained language model, SmolLM2-135M-Instruct, prepared without a model hub from a package of PyPI."""
