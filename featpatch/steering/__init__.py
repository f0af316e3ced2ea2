"""Set, move or scale features, heads and directions in every call of a model, also while it generates text."""
