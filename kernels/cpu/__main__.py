"""``python -m kernels.cpu``: compile the C++ ops now rather than inside the first run."""

from __future__ import annotations

import sys

from kernels.cpu.loader import BuildError, build

if __name__ == "__main__":
    try:
        print(build())
    except BuildError as error:
        sys.exit(f"no C++ ops, plain torch will compute: {error}")
