"""Every family on a tiny random model: against transformers on the same weights, and engine against trainer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from kernels import cpu
from rollout_engine import LLM, SamplingParams
from rollout_engine.models import families, family
from rollout_engine.models.checkpoint import load_model, save_model
from rollout_engine.models.context import PackedAttention
from rollout_engine.models.decoder import Decoder

VOCAB, WINDOW, CONTEXT = 83, 24, 512
SIZES = {"vocab_size": VOCAB, "intermediate_size": 52, "num_hidden_layers": 3, "max_position_embeddings": CONTEXT}
# hidden 44 is not heads * head_dim = 80; the families without a head_dim of their own take 48 / 4 = 12
WIDE = {**SIZES, "hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
PLAIN = {**SIZES, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
ENDS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 4.0, 9.0],
    "original_max_position_embeddings": 128,
}
GEMMA2 = {**WIDE, **ENDS, "sliding_window": WINDOW, "query_pre_attn_scalar": 30}
GEMMA3_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA3 = {**WIDE, **ENDS, "sliding_window": WINDOW, "query_pre_attn_scalar": 30, "layer_types": GEMMA3_TYPES}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "mistral": lambda: MistralConfig(**WIDE, **ENDS, sliding_window=WINDOW),
    "mistral_full": lambda: MistralConfig(**PLAIN, **ENDS, sliding_window=None, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**PLAIN, **ENDS, **WINDOWED),
    "qwen2_full_tied": lambda: Qwen2Config(**PLAIN, **ENDS, tie_word_embeddings=True),
    "qwen3_windowed": lambda: Qwen3Config(**WIDE, **ENDS, **WINDOWED),
    "gemma2": lambda: Gemma2Config(**GEMMA2, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    "gemma2_uncapped": lambda: Gemma2Config(
        **GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None, attention_bias=True
    ),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA3, rope_parameters=GEMMA3_ROPE),
    "gemma3_capped_untied": lambda: Gemma3TextConfig(
        **GEMMA3, rope_parameters=GEMMA3_ROPE, final_logit_softcapping=4.0, tie_word_embeddings=False
    ),
    "phi3": lambda: Phi3Config(**PLAIN, **ENDS, sliding_window=WINDOW),
    "phi3_longrope": lambda: Phi3Config(
        **PLAIN, **ENDS, rope_parameters=LONGROPE, partial_rotary_factor=0.5, original_max_position_embeddings=128
    ),
    "llama_linear_rope": lambda: LlamaConfig(**WIDE, **ENDS, rope_parameters=LINEAR),
    "llama_gelu": lambda: LlamaConfig(**WIDE, **ENDS, hidden_act="gelu_pytorch_tanh"),
}


def random_model(config: Any, seed: int = 0) -> Any:
    """Weights of a size that makes every part count, so that a swapped norm or a dropped bias shows."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    center = 0 if config.model_type.startswith("gemma") else 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if "norm" in name:
                parameter.copy_(center + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5))
        model.get_input_embeddings().weight.mul_(0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def token_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def our_logits(decoder: Decoder, prompts: list[list[int]]) -> list[Tensor]:
    lengths = [len(ids) for ids in prompts]
    hidden = decoder.hidden(torch.tensor(list(itertools.chain(*prompts))), PackedAttention.from_lengths(lengths))
    return list(decoder.head.logits(hidden).split(lengths))


def test_every_family_is_here() -> None:
    assert {CONFIGS[name]().model_type for name in CONFIGS} == set(families())


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name]())
    model = load_model(save(theirs, tmp_path / "model"), tokenizer=False)
    prompts = token_ids(1, 33, 100)  # the longest is four windows
    ours = our_logits(model.decoder, prompts)
    expected = [theirs(torch.tensor([ids])).logits[0] for ids in prompts]
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.log_softmax(-1), other.log_softmax(-1), rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(ids), VOCAB, generator=generator) for ids in prompts]
    for logits in (ours, expected):
        sum((z.log_softmax(-1) * u).sum() for z, u in zip(logits, upstream, strict=True)).backward()
    named = dict(theirs.named_parameters())
    for parameter, parts in family(model.hf_config).name_map(model.decoder.config).items():
        mine, other = model.decoder.get_parameter(parameter).grad, torch.cat([named[part].grad for part in parts])
        assert (mine - other).abs().max() < 1e-5 * other.abs().max() + 1e-6, parameter


@pytest.mark.parametrize("name", CONFIGS)
def test_token_logprobs_train_the_logits_that_are_sampled(name: str, tmp_path: Path) -> None:
    """The trainer's chunked backward (``Decoder.forward``) against autograd through the logits."""
    model = load_model(save(random_model(CONFIGS[name]()), tmp_path / "model"), tokenizer=False)
    (ids,) = token_ids(40)
    rows, targets, heat = torch.arange(39), torch.tensor(ids[1:]), torch.full((39,), 0.7)
    logp = (our_logits(model.decoder, [ids])[0][:-1] / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    parameters = list(model.decoder.parameters())
    expected = torch.autograd.grad(logp.sum(), parameters)
    ctx = PackedAttention.from_lengths([40])
    scored, _ = model.decoder(torch.tensor(ids), ctx, rows, targets, heat)
    torch.testing.assert_close(scored, logp, rtol=0, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(scored.sum(), parameters), expected, strict=True):
        assert (mine - other).abs().max() < 1e-5 * other.abs().max() + 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name]())
    prompts = token_ids(1, 20, 40)
    llm = LLM(save(theirs, tmp_path / "model"), tokenizer=False, kv_cache_gib=0.05)
    params = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    theirs.generation_config.eos_token_id = None
    for ids, answer in zip(prompts, answers, strict=True):
        rest = {"attention_mask": torch.ones(1, len(ids)), "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=28, **rest)
        assert list(answer.outputs[0].token_ids) == expected[0, len(ids) :].tolist()
    assert len({token for answer in answers for token in answer.outputs[0].token_ids}) > 5


# ---------------------------------------------------------------- out and in again


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_checkpoint_holds_the_same_bits(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save(random_model(CONFIGS[name]()).to(getattr(torch, dtype)), tmp_path / "in")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)  # .to() rounded the RoPE frequencies
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    model = load_model(folder, dtype=dtype, tokenizer=False)
    save_model(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    assert back.generation_config.eos_token_id == [2, 7]
    ids = torch.tensor(token_ids(50))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, theirs(ids).logits)
    again = load_model(tmp_path / "out", dtype=dtype, tokenizer=False)
    assert again.decoder.config == model.decoder.config and again.eos_ids == (2, 7)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_half_of_a_multimodal_gemma3_loads_alone(prefix: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS["gemma3"]())
    save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    renamed |= {"vision_tower.vision_model.post_layernorm.weight": torch.ones(3)}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = Gemma3Config(text_config=theirs.config.to_dict(), eos_token_id=[1, 4])
    (tmp_path / "generation_config.json").unlink()
    whole.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gemma3"
    model = load_model(tmp_path, tokenizer=False)
    assert model.eos_ids == (1, 4)
    (ids,) = token_ids(60)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(our_logits(model.decoder, [ids])[0], expected, rtol=0, atol=1e-5)
    save_model(model, tmp_path / "out")
    with torch.no_grad():
        back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(back(torch.tensor([ids])).logits[0], expected)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda: Gemma3TextConfig(**GEMMA3, attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
        (lambda: Gemma2Config(**GEMMA2, use_bidirectional_attention=True), "use_bidirectional_attention"),
        (lambda: Gemma2Config(**GEMMA2, hidden_activation="gelu"), "'gelu'"),
        (lambda: Qwen2Config(**PLAIN, layer_types=["full_attention"] * 2 + ["sliding_attention"]), "no sliding_window"),
        (lambda: Qwen2Config(**PLAIN, layer_types=["chunked_attention"] * 3), "'chunked_attention'"),
        (lambda: MistralConfig(**WIDE, sliding_window=0), "sliding_window=0"),
        (lambda: Phi3Config(**PLAIN, partial_rotary_factor=0.3), "odd"),
        (lambda: LlamaConfig(**WIDE, rope_parameters={**LINEAR, "rope_type": "dynamic"}), "'dynamic'"),
    ],
    ids=["gemma3_cap", "bidirectional", "gelu", "windowless", "chunked", "no_window", "odd_rotary", "dynamic"],
)
def test_what_is_not_built_is_refused(config: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf = config()
        family(hf).decoder_config(hf)


def test_longrope_ends_at_the_original_context(tmp_path: Path) -> None:
    theirs = random_model(CONFIGS["phi3_longrope"]())
    llm = LLM(save(theirs, tmp_path / "model"), tokenizer=False, kv_cache_gib=0.05)
    (ids,) = token_ids(127)
    (answer,) = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(answer.outputs[0].token_ids) == 1
    with pytest.raises(ValueError, match="context of 128"):
        llm.generate([{"prompt_token_ids": token_ids(128)[0]}])


# ---------------------------------------------------------------- engine and trainer, bit for bit


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_the_trainers(
    name: str, make_llm: Callable[..., LLM], compare: Callable[..., Any], tmp_path: Path
) -> None:
    """Prefill in small chunks and a pool so tight that sequences are preempted and recomputed."""
    model = load_model(save(random_model(CONFIGS[name]()), tmp_path / "model"), tokenizer=False)
    llm = make_llm(model=model, max_batch_tokens=50, pages=10)
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True)
    outputs = llm.generate([token_ids(n)[0] for n in (1, 31, 33, 70)], params)
    result = compare(model.decoder, outputs)
    assert result.tokens == 4 * 2 * 30
    assert result.gap == 0.0
    assert llm.stats().preemptions > 0
    llm.check_integrity()


def test_logprobs_are_the_trainers_without_a_compiler(
    make_llm: Callable[..., LLM], compare: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In plain torch too, with all that a family may add: windows, soft caps, GeGLU, norms behind the blocks."""
    monkeypatch.setattr(cpu, "extension", lambda: None)
    test_logprobs_are_the_trainers("gemma2", make_llm, compare, tmp_path)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_a_token_beyond_the_window_changes_nothing_in_one_layer(name: str) -> None:
    """Of one layer, that is: every further layer sees a window further."""
    config = family(CONFIGS[name]()).decoder_config(CONFIGS[name]())
    decoder = Decoder(replace(config, layers=config.layers[:1]), VOCAB)
    decoder.init_weights(0, std=0.3)
    (ids,) = token_ids(80)
    other = [*ids[:5], (ids[5] + 1) % VOCAB, *ids[6:]]
    with torch.no_grad():
        differs = (our_logits(decoder, [ids])[0] != our_logits(decoder, [other])[0]).any(1)
    assert differs.tolist() == [5 <= t < 5 + WINDOW for t in range(80)]


# ---------------------------------------------------------------- bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_is_no_further_from_the_truth_than_transformers(name: str, tmp_path: Path) -> None:
    folder = save(random_model(CONFIGS[name]()).bfloat16(), tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    model = load_model(folder, dtype="bfloat16", tokenizer=False)
    exact = load_model(tmp_path / "model", dtype="float32", tokenizer=False)
    (ids,) = token_ids(100)
    with torch.no_grad():
        truth = our_logits(exact.decoder, [ids])[0].double()
        their_error = (theirs(torch.tensor([ids])).logits[0].double() - truth).abs()
        our_error = (our_logits(model.decoder, [ids])[0].double() - truth).abs()
    assert 0 < our_error.mean() < 2 * their_error.mean()
    assert our_error.max() < 2 * their_error.max()


def test_bfloat16_generates(tmp_path: Path) -> None:
    folder = save(random_model(CONFIGS["gemma2"]()).bfloat16(), tmp_path / "model")
    with pytest.raises(ValueError, match="numerics='fast'"):
        LLM(folder, tokenizer=False, dtype="bfloat16", kv_cache_gib=0.01, numerics="exact")
    llm = LLM(folder, tokenizer=False, dtype="bfloat16", kv_cache_gib=0.01)
    (answer,) = llm.generate([{"prompt_token_ids": token_ids(40)[0]}], SamplingParams(n=2, max_tokens=12))
    assert llm.kv_cache.k.dtype == torch.bfloat16 and all(out.token_ids for out in answer.outputs)
