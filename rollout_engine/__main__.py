"""The command line ``rollout``. File-to-file generation isn't built yet; the Python API is."""

from __future__ import annotations

import sys


def main() -> int:
    """Say what there is instead, and fail."""
    print(
        "rollout: file-to-file generation is not built yet. From Python:\n"
        "  from rollout_engine import LLM, SamplingParams\n"
        '  LLM("path/to/checkpoint").generate(["Hello"], SamplingParams(n=4, max_tokens=64))',
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
