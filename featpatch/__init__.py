"""featpatch: which SAE features cause this behaviour?

The public names are listed in `__init__.pyi` and imported when they are first used, so that `import featpatch` is fast.

The examples in docstrings take these names as given: `import featpatch as fp`; `demo = fp.load_demo(progress=False)`; `model`,
its model; `saes`, the SAEs at `blocks.1.hook_resid_pre` and `blocks.3.hook_resid_post`; `pairs = demo.pairs("ioi", n=4)`;
`effects` and `components`, the tables of `fp.rank_features(model, saes, pairs, positions=["S2"])` and
`fp.rank_components(model, pairs, positions=["S2"])`; and `folder`, a `pathlib.Path` of an empty folder.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
