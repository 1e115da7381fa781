"""``python -m rlhf.backends.prebuild``: build DeepSpeed's CPU collective op once, before ranks race for it."""

from __future__ import annotations

from rlhf.backends.deepspeed import prebuild_ops

if __name__ == "__main__":
    prebuild_ops()
