"""How often kernels are compiled when batches differ in size. Runs as ``compile_only`` does, without a GPU.

``shipped/<op>.py`` has ``launch_batch(tokens)``, which calls the op's wrappers once for a batch of that size.
"""

from __future__ import annotations

import importlib
import json
import random
import sys

from compile_only import CompileOnly, compiled, kernels_of
from triton.runtime.driver import driver

LONGEST, BATCHES = 3000, 50
SPECIAL = (1, 16, 17)  # what the compiler would make code of its own for: one, multiples of 16, the rest


def main(name: str) -> None:
    """Print, as JSON, how many times each of the op's kernels was compiled over 50 batches."""
    driver.set_active(CompileOnly())
    shipped = importlib.import_module(f"shipped.{name}")
    sizes = [*SPECIAL, *random.Random(0).sample(range(1, LONGEST), BATCHES - len(SPECIAL))]
    for tokens in sizes:
        shipped.launch_batch(tokens)
    kernels = kernels_of(importlib.import_module(f"kernels.triton.{name}"))
    print(json.dumps({kernel.__name__: len(compiled(kernel)) for kernel in kernels}))


if __name__ == "__main__":
    main(sys.argv[1])
