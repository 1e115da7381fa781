"""A tiny checkpoint, a policy factory, and judges with their servers, in this process and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_http import Answer, Make, RewardHttp, Serve
from transformers import Qwen3Config, Qwen3ForSequenceClassification

from rlhf.algorithms import Algorithm
from rlhf.algorithms.grpo import GRPO
from rlhf.cluster.worker import Rendezvous, set_rendezvous
from rlhf.config import ModelSection, Reward, Rollout, Train
from rlhf.judging import Judges, ModelJudge
from rlhf.roles.policy import Policy
from rlhf.roles.reward import RewardFunction
from rollout_engine.models import qwen3
from rollout_engine.models.checkpoint import Model, save_model
from rollout_engine.models.decoder import Decoder


@pytest.fixture(scope="session")
def odd_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """qwen3 of odd widths: head_dim * heads != hidden, MLP 100, vocabulary 131, group of 3, tied."""
    hf_config = Qwen3Config(
        vocab_size=131,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    decoder = Decoder(qwen3.decoder_config(hf_config), 131)
    decoder.init_weights(0, std=0.1)
    folder = tmp_path_factory.mktemp("odd") / "hf"
    save_model(Model(decoder, hf_config, None, (0,)), folder)
    return folder


@pytest.fixture(scope="session")
def scored_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sequence classifier of one label, made and saved by transformers; a hidden size that vectors don't divide."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=131,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        num_labels=1,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("scored")
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def make_policy(odd_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Policy]:
    """Builds a Policy without a tokenizer on the odd checkpoint; keyword arguments reach Train and Rollout."""
    import rlhf.roles.policy as module
    from rollout_engine.models.checkpoint import load_model

    monkeypatch.setattr(module, "load_model", lambda *a, **k: load_model(*a, **k, tokenizer=False))
    if not torch.distributed.is_initialized():
        set_rendezvous(Rendezvous.here())

    def make(*, algorithm: Algorithm | None = None, **settings: object) -> Policy:
        train = {"lr": 1e-3, **{k: settings.pop(k) for k in list(settings) if k in Train.model_fields}}
        return Policy(
            checkpoint=odd_checkpoint,
            run_folder=tmp_path,
            model=ModelSection(),
            rollout=Rollout(
                **{"prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 24, "kv_cache_gib": 0.02, **settings}
            ),
            train=Train(**train),
            algorithm=algorithm or GRPO(),
            total_updates=100,
            seed=7,
            timeout_s=300,
        )

    return make


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve(answer, hang_up=0)``: a reward server that answers so."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[RewardHttp] = []

    def start(answer: Answer, hang_up: int = 0) -> RewardHttp:
        servers.append(RewardHttp(answer, hang_up))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def make_judges(tmp_path: Path) -> Make:
    """``make_judges(source, models, **section)``: on a recipe of this source, and on these reward models by name."""

    def make(source: str, models: dict[str, ModelJudge] | None = None, seed: int = 0, **settings: Any) -> Judges:
        (tmp_path / "mine.py").write_text(source)
        models = models or {}
        section = Reward(models={name: "checkpoint" for name in models}, **settings)
        return Judges(section, RewardFunction(recipe=str(tmp_path / "mine.py"), section=section), models, seed)

    return make
