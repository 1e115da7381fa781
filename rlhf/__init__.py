"""Onpolicy: RLHF in which the sampler and the trainer are the same model.

What a recipe needs is here; the loop is ``rlhf.train``. Importing this costs no torch.
"""

from rlhf.types import Completion, Score

__all__ = ["Completion", "Score"]
