"""The ops that trainer and rollout engine share. One meaning each, in ``kernels.reference``.

Callers write ``from kernels import rms_norm``, and get the fast twin where there is one (``kernels.cpu``).
Importing this package costs torch and nothing more; it carries no ``__version__`` on purpose (another
distribution called ``kernels`` exists, and transformers asks for its version).
"""

from kernels.reference import *  # noqa: F403
from kernels.reference import __all__ as __all__

# isort: split
from kernels.cpu import *  # noqa: F403
