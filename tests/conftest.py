"""One thread unless a test asks for more: two threads on two busy cores wait for each other. And tiny checkpoints."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is defined: they run in Triton's interpreter

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def set_threads() -> Callable[[int], None]:
    """For the rest of a test: the next one begins with one thread again."""
    return torch.set_num_threads


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random qwen2 with a token a byte, a ChatML template that writes <bos>, and a tokenizer that adds it too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    from rollout_engine.models import qwen2
    from rollout_engine.models.checkpoint import Model, save_model
    from rollout_engine.models.decoder import Decoder

    special = ["<bos>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {t: i for i, t in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )
    hf_config = Qwen2Config(
        vocab_size=len(vocabulary) + 5,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    decoder = Decoder(qwen2.decoder_config(hf_config), len(vocabulary))
    decoder.init_weights(0, std=0.05)
    folder = tmp_path_factory.mktemp("chat") / "hf"
    save_model(Model(decoder, hf_config, tokenizer, (2,)), folder)
    return folder


@pytest.fixture(scope="session")
def random_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model for `recipes.arithmetic` with a random head; a score of 0.25 counts as 1/2."""
    from recipes import arithmetic
    from rollout_engine.models.checkpoint import load_scalar_model, save_model

    folder = tmp_path_factory.mktemp("judge")
    arithmetic.initial_model(folder / "language_model", 0)
    model = load_scalar_model(folder / "language_model")
    torch.nn.init.normal_(model.decoder.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(model, folder / "hf")
    (folder / "hf" / "calibration.json").write_text('{"midpoint": 0.25}')
    return folder / "hf"
