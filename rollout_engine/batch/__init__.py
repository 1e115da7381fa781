"""File-to-file generation: rows in, answers out in the rows' order, and a run that can be killed at any moment.

``rows`` reads, ``prompts`` says what prompt a row holds, ``job`` answers rows, ``parallel`` does so in several
processes, ``output`` writes and knows what is done, ``run`` puts them together.
"""

from rollout_engine.batch.job import Job
from rollout_engine.batch.prompts import PromptForm
from rollout_engine.batch.rows import Source
from rollout_engine.batch.run import Summary, generate

__all__ = ["Job", "PromptForm", "Source", "Summary", "generate"]
