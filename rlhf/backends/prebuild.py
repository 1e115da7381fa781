"""``python -m rlhf.backends.prebuild``: build DeepSpeed's CPU collective op once, before ranks race for it."""

from __future__ import annotations

from rlhf.doctor import stale_locks


def main() -> None:
    """Build the op; a stale lock of a build that died is removed first, or this would wait for it for ever."""
    for lock in stale_locks():
        print(f"removing the stale build lock {lock}")
        lock.unlink()
    from rlhf.backends.deepspeed import prebuild_ops

    prebuild_ops()


if __name__ == "__main__":
    main()
