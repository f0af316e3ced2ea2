"""featpatch: which SAE features cause this behaviour?

Its names stand in `__init__.pyi`, each once; they are imported when they are first used, so that `import featpatch` is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
