"""The weight swap between trainer and engine, and its order: begin (weights about to change) -> publish (they are
whole) -> generate. In between, generating raises.

``shared`` (ZeRO 0-2): the engine's decoder is a second set of modules over the trainer's own parameter storage;
the swap happens at the optimizer's step, and publishing is a version bump.
``copy`` (ZeRO 3): the engine has weights of its own that never move; publishing gathers the trainer's bucket by
bucket and copies them in place.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from rlhf.backends.deepspeed import DeepSpeedBackend
from rlhf.types import WeightUpdate
from rollout_engine.llm import LLM
from rollout_engine.models.decoder import Decoder

BUCKET_BYTES = 1 << 28  # gathered at a time: the extra memory of a copy swap


class TornSwapError(RuntimeError):
    """A swap ended before every weight had landed; the engine refuses to generate until a whole one does."""


class WeightSwap(Protocol):
    def begin(self) -> None:
        """Called before the optimizer's step: from here until :meth:`publish`, generating raises."""

    def publish(self, version: int | None = None) -> WeightUpdate:
        """Make the new weights generate, as ``version``, by default the next. Without a step since the last publish,
        nothing changes."""


def share_storage(trained: Decoder) -> Decoder:
    """A decoder whose parameters are the trained ones' storage, without gradients or hooks.

    Call it once the trainer has its final storage (after ``deepspeed.initialize``).
    """
    with torch.device("meta"):
        view = Decoder(trained.config, trained.head.num_tokens)
    view.load_state_dict(trained.state_dict(), assign=True)
    return view.requires_grad_(False)


class SharedSwap:
    """Nothing moves: the engine's weights are the trainer's storage, which is checked at every publish."""

    def __init__(self, trained: Decoder, llm: LLM) -> None:
        self.trained = trained
        self.llm = llm
        self.changed = False
        self.check_addresses()

    def check_addresses(self) -> None:
        """Every engine weight is the trainer's storage. Raises RuntimeError naming one that isn't."""
        addresses = self.llm.parameter_addresses()
        for name, parameter in self.trained.named_parameters():
            if addresses[name] != parameter.data_ptr():
                raise RuntimeError(
                    f"weight {name} left the trainer's storage; the engine would sample from old weights"
                )

    def begin(self) -> None:
        self.llm.invalidate("the optimizer has stepped since the last publish")
        self.changed = True

    def publish(self, version: int | None = None) -> WeightUpdate:
        begin = time.perf_counter()
        changed, self.changed = self.changed, False
        if changed:
            self.check_addresses()
            self.llm.publish(self.llm.weight_version + 1 if version is None else version)
        return WeightUpdate(self.llm.weight_version, changed, "shared", time.perf_counter() - begin, bytes_moved=0)


class CopySwap:
    """Gathers the trainer's weights in buckets and copies each into the engine's own, whose addresses stay.

    Every tensor is compared after its copy, while the source is still there; a publish that didn't see all of
    them land leaves the engine refusing to generate.
    """

    def __init__(self, backend: DeepSpeedBackend, llm: LLM, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.backend = backend
        self.llm = llm
        self.changed = False
        self.buckets = backend.buckets(bucket_bytes)
        self.addresses = llm.parameter_addresses()

    def begin(self) -> None:
        version = self.llm.weight_version
        self.llm.invalidate(f"the optimizer has stepped since version {version} was published")
        self.changed = True

    def publish(self, version: int | None = None) -> WeightUpdate:
        """Collective. Raises TornSwapError naming what didn't land, and between which versions."""
        begin = time.perf_counter()
        old = self.llm.weight_version
        new = old + 1 if version is None else version
        if not self.changed:
            return WeightUpdate(old, False, "copy", time.perf_counter() - begin, bytes_moved=0)
        landed: dict[str, int] = {}
        for number, names in enumerate(self.buckets, 1):
            where = f"weight swap {old} -> {new}, bucket {number} of {len(self.buckets)}"
            self.llm.invalidate(f"{where} has not landed")
            landed |= self.copy_bucket(names, where)
        missing = sorted(set(self.addresses) - set(landed))
        if missing or self.llm.parameter_addresses() != self.addresses:
            raise self.torn(f"weight swap {old} -> {new}: {missing or 'a moved tensor'} did not land")
        self.changed = False
        self.llm.publish(new)
        return WeightUpdate(new, True, "copy", time.perf_counter() - begin, sum(landed.values()))

    def copy_bucket(self, names: list[str], where: str) -> dict[str, int]:
        """Gather, copy, compare; bytes by name."""
        landed = {}
        with self.backend.gathered(names) as gathered:
            for name, source in gathered.items():
                target = self.llm.model.decoder.get_parameter(name)
                target.copy_(source)
                if not torch.equal(target, source.to(target.dtype)):
                    raise self.torn(f"{where}: {name} differs from its source")
                landed[name] = target.numel() * target.element_size()
        return landed

    def torn(self, reason: str) -> TornSwapError:
        self.llm.invalidate(reason)
        return TornSwapError(reason)
