"""What a run will do, checked and printed before anything heavy starts."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from rlhf.cluster.placement import num_bundles, seats
from rlhf.config import Config, spell
from rollout_engine.config import EngineConfig
from rollout_engine.models import family
from rollout_engine.models.config import DecoderConfig

GIB = 1 << 30
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    config: Config
    decoder: DecoderConfig
    judges: list[str]  # what the reward is the sum of, in words
    source: str  # of the prompts
    num_prompts: int
    num_dropped: int
    num_eval: int

    def __str__(self) -> str:
        c, d = self.config, self.decoder
        size = ELEMENT_BYTES[c.model.dtype]
        parameters = count_parameters(d)
        rows = c.rollout.prompts_per_step * c.rollout.samples_per_prompt
        algorithm = c.make_algorithm()
        axes = "  ".join(f"{key}={spell(value)}" for key, value in c.algorithm.items() if key != "name")
        models = [f"reward model {name}" for name in c.reward.models]
        roles = ", ".join(["policy (trainer + engine)", "reward", *models, *algorithm.roles])
        swap = "shared: the engine runs on the trainer's storage, 0 bytes a step"
        if c.train.zero_stage == 3:
            swap = f"copy: gathered and copied in place, {parameters * size / GIB:.3f} GiB a step and rank"
        bf16 = c.model.dtype == "bfloat16"
        lines = [
            f"run         {c.run.name}, seed {c.run.seed}, {c.run.steps} steps of "
            f"{c.rollout.prompts_per_step} prompts x {c.rollout.samples_per_prompt} samples = {rows} answers",
            f"data        {self.source}: {self.num_prompts} training prompts ({self.num_dropped} dropped as too long), "
            f"{self.num_eval} held out",
            f"model       {parameters / 1e6:.2f} M parameters, {c.model.dtype}, {parameters * size / GIB:.3f} GiB",
            f"roles       {roles}; cluster {c.cluster.kind}, {c.cluster.threads} threads each",
            f"placement   {self.placement}",
            *_wrapped(f"reward      {' + '.join(self.judges)}"),
            f"training    DeepSpeed ZeRO {c.train.stage(bf16=bf16)}, AdamW, "
            f"{parameters * (18 if bf16 else 12) / GIB:.3f} GiB of {'masters, ' if bf16 else ''}gradients and moments",
            f"weight swap {swap}",
            f"kv cache    {c.rollout.kv_cache_gib} GiB a rank = {self.kv_tokens} tokens, "
            f"pages of {c.rollout.page_size}",
            f"numerics    {numerics(c)}",
            *_wrapped(f"algorithm   {c.algorithm['name']}: {axes}"),
        ]
        return "\n".join(lines) + "\n"

    @property
    def placement(self) -> str:
        """Which role sits where."""
        cluster = self.config.cluster
        taken = seats(cluster.placement, self.config.ranks)
        count, kind = num_bundles(taken), "GPU" if cluster.gpus else "bundle"
        where = ", ".join(f"{role} {_span(taken[role])}" for role in self.config.ranks)
        return f"{cluster.placement} on {count} {kind}{'s' * (count > 1)}: {where}; reward function on none"

    @property
    def kv_tokens(self) -> int:
        per_token = self.decoder.kv_bytes_per_token(ELEMENT_BYTES[self.config.model.dtype])
        return int(self.config.rollout.kv_cache_gib * GIB) // per_token


def numerics(config: Config) -> str:
    """``exact`` or ``fast``: what ``rollout.numerics=auto`` comes to."""
    if config.rollout.numerics != "auto":
        return config.rollout.numerics
    return "exact" if config.model.dtype == "float32" and not config.cluster.gpus else "fast"


def _wrapped(line: str) -> list[str]:
    """Paths and addresses stay whole."""
    return textwrap.wrap(line, 120, subsequent_indent=" " * 12, break_on_hyphens=False, break_long_words=False)


def _span(bundles: range) -> str:
    return str(bundles[0]) if len(bundles) == 1 else f"{bundles[0]}-{bundles[-1]}"


def count_parameters(d: DecoderConfig) -> int:
    """Parameters of a decoder, norms and biases included."""
    q, kv = d.num_heads * d.head_dim, d.num_kv_heads * d.head_dim
    attention = (q + 2 * kv) * (d.hidden_size + d.attention_bias) + d.hidden_size * (q + d.output_bias)
    attention += 2 * d.head_dim * d.qk_norm
    mlp = 3 * d.hidden_size * d.intermediate_size + d.mlp_bias * (2 * d.intermediate_size + d.hidden_size)
    embedding = d.vocab_size * d.hidden_size * (1 if d.tie_embeddings else 2)
    norms = (4 if d.post_norms else 2) * d.hidden_size
    return embedding + d.num_layers * (attention + mlp + norms) + d.hidden_size


def check_placement(config: Config) -> None:
    """Ranks fit the devices. Raises ValueError as :func:`check`."""
    cluster, ranks = config.cluster, config.ranks
    keys = {role: "cluster.ranks" if role == "policy" else f"{role.partition('-')[0]}.ranks" for role in ranks}
    for role, count in ranks.items():
        if count > 1 and cluster.kind == "local":
            raise ValueError(f"{keys[role]}={count}: cluster.kind=local runs one rank; set cluster.kind=ray")
    given = ", ".join(f"{keys[role]}={count}" for role, count in ranks.items())
    if cluster.placement == "separate":
        if cluster.kind == "local":
            raise ValueError(
                "cluster.placement=separate: cluster.kind=local is one process; set cluster.kind=ray, or "
                "cluster.placement=colocated"
            )
        if cluster.gpus and sum(ranks.values()) != cluster.gpus:
            raise ValueError(
                f"cluster.placement=separate gives every rank a GPU of its own: {given} make {sum(ranks.values())}, "
                f"and cluster.gpus={cluster.gpus}; change one of them, or set cluster.placement=colocated"
            )
    elif cluster.gpus and max(ranks.values()) != cluster.gpus:
        raise ValueError(
            f"{given} do not divide over cluster.gpus={cluster.gpus}: each rank has one GPU, which roles share; "
            "the role with the most ranks must have as many as there are GPUs"
        )


def check(config: Config, hf_config: Any, tokenizer: Any, longest_prompt: int) -> DecoderConfig:
    """Refuse what can't work. Raises ValueError with what was given, what is allowed and the way out."""
    decoder = family(hf_config).decoder_config(hf_config)
    r = config.rollout
    algorithm = config.make_algorithm()
    updates = algorithm.updates_per_rollout
    answers = r.prompts_per_step * r.samples_per_prompt
    if answers % updates:
        raise ValueError(
            f"rollout.prompts_per_step={r.prompts_per_step} x samples_per_prompt={r.samples_per_prompt} = {answers} "
            f"answers do not divide into algorithm.updates_per_rollout={updates} equal parts; change one of the three"
        )
    check_placement(config)
    ranks = config.ranks["policy"]
    if r.prompts_per_step % ranks:
        raise ValueError(
            f"rollout.prompts_per_step={r.prompts_per_step} does not divide over cluster.ranks={ranks}; "
            "make it a multiple"
        )
    if r.samples_per_prompt < algorithm.min_samples_per_prompt:
        raise ValueError(
            f"rollout.samples_per_prompt={r.samples_per_prompt}: algorithm {config.algorithm['name']} compares the "
            f"answers to a prompt and needs at least {algorithm.min_samples_per_prompt}; raise it, or choose "
            "a baseline over the whole batch (algorithm.name=reinforce_pp)"
        )
    if r.truncates and not algorithm.corrects_sampling:
        raise ValueError(
            f"rollout.top_k={r.top_k}, top_p={r.top_p}, min_p={r.min_p} sample from a part of the vocabulary, and "
            "nothing corrects the policy loss for that; set algorithm.tis_clip=2.0 or algorithm.proximal=sampler, or "
            "sample from all of it (top_k=0, top_p=1, min_p=0)"
        )
    longest = longest_prompt + r.max_tokens
    if longest > decoder.max_position:
        raise ValueError(
            f"the longest prompt ({longest_prompt} tokens) and rollout.max_tokens={r.max_tokens} make {longest}; the "
            f"model's context is {decoder.max_position}. Lower data.max_prompt_tokens or rollout.max_tokens"
        )
    EngineConfig(page_size=r.page_size, kv_cache_gib=r.kv_cache_gib, numerics=r.numerics)
    page_bytes = r.page_size * decoder.kv_bytes_per_token(ELEMENT_BYTES[config.model.dtype])
    held = int(r.kv_cache_gib * GIB) // page_bytes * r.page_size
    if longest > held:
        raise ValueError(
            f"one answer may need {longest} tokens of KV, but rollout.kv_cache_gib={r.kv_cache_gib} holds {held}; "
            "raise it"
        )
    for key, samples in (("rollout.samples_per_prompt", r.samples_per_prompt), ("eval.samples", config.eval.samples)):
        if samples > r.max_num_seqs:
            raise ValueError(
                f"{key}={samples} answers run together, but rollout.max_num_seqs={r.max_num_seqs}; raise it"
            )
    if len(tokenizer) > decoder.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {decoder.vocab_size}; they don't belong together"
        )
    return decoder
