"""Access to models, and the only package that uses TransformerLens: read, edit and resume a forward pass, and load weights."""
