"""featpatch: which SAE features cause this behaviour?

The public names are listed in `__init__.pyi` and imported when they are first used, so that `import featpatch` is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
