"""Steer2Edit: change how a language model behaves by editing its weights, without training.

The public names are listed in `__init__.pyi`. Each is imported when it is first used, so that the command line answers
--help without loading torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
