"""The weight swap between trainer and engine. One mode is built: ``shared``.

The engine's decoder is a second set of modules over the trainer's own parameter storage, so that nothing
is copied: the swap happens at the optimizer's step, and publishing is a version bump.
"""

from __future__ import annotations

import time

import torch

from rlhf.types import WeightUpdate
from rollout_engine.llm import LLM
from rollout_engine.models.decoder import Decoder


def share_storage(trained: Decoder) -> Decoder:
    """A decoder whose parameters are the trained ones' storage, without gradients or hooks.

    Call it once the trainer has its final storage (after ``deepspeed.initialize``).
    """
    with torch.device("meta"):
        view = Decoder(trained.config, trained.head.num_tokens)
    view.load_state_dict(trained.state_dict(), assign=True)
    return view.requires_grad_(False)


class SharedSwap:
    """Guards the order: begin (weights about to change) -> publish (they are whole) -> generate."""

    mode = "shared"

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
        """Called before the optimizer's step: from here until :meth:`publish`, generating raises."""
        self.llm.invalidate("the optimizer has stepped since the last publish")
        self.changed = True

    def publish(self) -> WeightUpdate:
        """Make the new weights generate. Without a step since the last publish, nothing changes."""
        begin = time.perf_counter()
        changed, self.changed = self.changed, False
        if changed:
            self.check_addresses()
            self.llm.publish(self.llm.weight_version + 1)
        return WeightUpdate(self.llm.weight_version, changed, self.mode, time.perf_counter() - begin, bytes_moved=0)
