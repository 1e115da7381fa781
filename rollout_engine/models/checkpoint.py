"""Hugging Face checkpoints in and out: one map of names and shapes, used both ways.

Our layout fuses q/k/v and gate/up; ``name_map`` of the family lists, for each parameter of ours, the
checkpoint tensors that are its consecutive row ranges.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollout_engine.models import family
from rollout_engine.models.config import NameMap
from rollout_engine.models.decoder import Backbone, Decoder, ScalarDecoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
MULTIMODAL = {"gemma3"}  # model types whose text half is loaded, and alone
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Model:
    """A decoder with all that belongs to it outside the weights."""

    decoder: Decoder
    hf_config: Any  # transformers PretrainedConfig
    tokenizer: Any | None  # transformers tokenizer; None when the caller works on token ids alone
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScalarModel:
    """A critic or a reward model."""

    decoder: ScalarDecoder
    hf_config: Any
    tokenizer: Any


def resolve(path: str | Path, revision: str = "main") -> Path:
    """Local folder of a checkpoint; a Hub id is downloaded (config, tokenizer and safetensors only)."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith("."):
        raise ValueError(f"model path {str(path)!r} is not a folder; give a folder with config.json or a Hub id")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
    return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))


def load_hf_config(folder: Path) -> Any:
    """The checkpoint's transformers config; of a multimodal one, that of its text half.

    Raises ValueError where it is missing or transformers refuses it.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; it is not a Hugging Face checkpoint")
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        raise ValueError(f"{folder} holds quantised weights, which aren't supported; use the unquantised checkpoint")
    try:
        hf_config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers has many kinds
        raise ValueError(f"{folder / 'config.json'} is not a config that transformers accepts: {error}") from error
    if hf_config.model_type not in MULTIMODAL:
        return hf_config
    text = hf_config.get_text_config()
    text.tie_word_embeddings = hf_config.tie_word_embeddings
    text.eos_token_id = hf_config.to_dict().get("eos_token_id", text.eos_token_id)
    return text


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises ValueError where there is none."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer (looked for {', '.join(TOKENIZER_FILES)}); copy the tokenizer files of the "
            "checkpoint there, or pass tokenizer=False and work on token ids"
        )
    return AutoTokenizer.from_pretrained(folder)


def load_model(
    path: str | Path,
    *,
    revision: str = "main",
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    tokenizer: bool = True,
) -> Model:
    """Load a checkpoint into our decoder.

    Args:
        path: folder or Hub id. dtype: of the weights, one of float32, bfloat16, float16.
        tokenizer: False skips the tokenizer; then every embedding row may be sampled.

    Raises ValueError for an unsupported family, a missing tokenizer, and missing, misshapen or truncated tensors.
    """
    with default_dtype(_dtype(dtype)):
        folder = resolve(path, revision)
        hf_config = load_hf_config(folder)
        tok = load_tokenizer(folder) if tokenizer else None
        config = family(hf_config).decoder_config(hf_config)
        with torch.device(device):
            decoder = Decoder(config, num_tokens=len(tok) if tok else config.vocab_size)
    _read_weights(decoder, folder, name_map(decoder, hf_config))
    return Model(decoder, hf_config, tok, _eos_ids(folder, hf_config, tok))


def load_scalar_model(
    path: str | Path, *, revision: str = "main", dtype: str = "float32", device: torch.device | str = "cpu"
) -> ScalarModel:
    """Load a checkpoint with a scalar head (``score.weight``, as transformers' sequence classifiers of one label have
    it), or of a language model, whose vocabulary head gives way to one of zeros. Raises ValueError as
    :func:`load_model`."""
    with default_dtype(_dtype(dtype)):
        folder = resolve(path, revision)
        hf_config = load_hf_config(folder)
        with torch.device(device):
            decoder = ScalarDecoder(family(hf_config).decoder_config(hf_config))
    names = name_map(decoder, hf_config)
    if not has_scalar_head(folder):
        del names["score.weight"]
    _read_weights(decoder, folder, names)
    return ScalarModel(decoder, hf_config, load_tokenizer(folder))


def has_scalar_head(folder: Path) -> bool:
    """Whether a checkpoint is a reward model's or a critic's. Raises ValueError for missing or damaged files."""
    return "score.weight" in open_weights(folder, {})


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not supported; choose one of {sorted(DTYPES)}")
    return DTYPES[name]


def name_map(decoder: Backbone, hf_config: Any) -> NameMap:
    """The family's, with the head that the decoder has."""
    names = family(hf_config).name_map(decoder.config)
    if isinstance(decoder, ScalarDecoder):
        names = {ours: parts for ours, parts in names.items() if ours != "head.weight"}
        names["score.weight"] = ("score.weight",)
    return names


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made inside have this dtype; no second copy of the weights is ever made."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _eos_ids(folder: Path, hf_config: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """generation_config.json first (it may list several), then config.json, then the tokenizer."""
    generation = folder / "generation_config.json"
    candidates = [json.loads(generation.read_text()).get("eos_token_id")] if generation.exists() else []
    candidates += [hf_config.eos_token_id, tokenizer.eos_token_id if tokenizer else None]
    found = next((c for c in candidates if c is not None), ())
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a checkpoint is read from. Raises ValueError naming those that aren't there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise ValueError(f"{folder} lacks the weight files {missing}; download the checkpoint again (safetensors only)")
    return files


def open_weights(folder: Path, names: NameMap) -> dict[str, Any]:
    """Every checkpoint tensor, unread, by the name it has in a text model. Reads headers only.

    Raises ValueError for missing, truncated or damaged files and for tensors that ``names`` calls for in vain.
    """
    tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        try:
            reader = safe_open(file, framework="pt")
        except SafetensorError as error:
            size = file.stat().st_size
            raise ValueError(f"{file} is truncated or damaged ({size} bytes: {error}); download it again") from error
        stored = reader.keys()
        # The text half of a multimodal checkpoint: language_model.model.* as published, model.language_model.* since.
        tensors.update({name.replace("language_model.", "", 1): reader.get_slice(name) for name in stored})
    missing = sorted(part for parts in names.values() for part in parts if part not in tensors)
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} tensors that its config.json calls for, first {missing[0]!r}")
    return tensors


def _read_weights(decoder: Backbone, folder: Path, names: NameMap) -> None:
    tensors = open_weights(folder, names)
    with torch.no_grad():
        for ours, parts in names.items():
            parameter = decoder.get_parameter(ours)
            for part, target in zip(parts, parameter.split(part_rows(decoder, ours, parts)), strict=True):
                found, wanted = tuple(tensors[part].get_shape()), tuple(target.shape)
                if found != wanted:
                    raise ValueError(
                        f"{part} has shape {found} in the checkpoint, but its config.json makes it {wanted}"
                    )
                target.copy_(tensors[part][:])


def part_rows(decoder: Backbone, ours: str, parts: tuple[str, ...]) -> list[int]:
    """Rows of each checkpoint tensor that our parameter is made of."""
    if len(parts) == 1:
        return [decoder.get_parameter(ours).shape[0]]
    config = decoder.config
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"qkv_proj": [q, kv, kv], "gate_up_proj": [config.intermediate_size] * 2}[ours.split(".")[-2]]


def export_tensors(decoder: Backbone, hf_config: Any) -> dict[str, Tensor]:
    """The decoder's parameters under their checkpoint names, on the CPU."""
    tensors: dict[str, Tensor] = {}
    for ours, parts in name_map(decoder, hf_config).items():
        value = decoder.get_parameter(ours).detach().cpu()
        for part, piece in zip(parts, value.split(part_rows(decoder, ours, parts)), strict=True):
            tensors[part] = piece.clone()
    return tensors


def save_model(model: Model | ScalarModel, folder: str | Path) -> None:
    """Write a checkpoint that transformers loads. Atomic: the folder appears whole or not at all.

    Raises ValueError if the folder exists.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; a checkpoint is never overwritten, choose another folder")
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    tensors = export_tensors(model.decoder, model.hf_config)
    plan = split_torch_state_dict_into_shards(
        tensors, max_shard_size=SHARD_BYTES, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, tmp / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (tmp / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    hf_config = type(model.hf_config).from_dict(model.hf_config.to_dict())
    if isinstance(model, ScalarModel):
        hf_config.num_labels = 1
        hf_config.architectures = [architecture(model.hf_config, scalar=True)]
        if model.tokenizer is not None and hf_config.pad_token_id == model.tokenizer.eos_token_id:
            hf_config.pad_token_id = None  # transformers would take the end for padding, and score the token before it
    else:
        hf_config.architectures = [architecture(model.hf_config)]
        (tmp / "generation_config.json").write_text(json.dumps({"eos_token_id": list(model.eos_ids)}))
    hf_config.dtype = model.decoder.norm.weight.dtype
    hf_config.save_pretrained(tmp)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(tmp)
    tmp.rename(folder)


def architecture(hf_config: Any, *, scalar: bool = False) -> str:
    """Class name under which transformers loads this config as a causal LM, or as a sequence classifier."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    names = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if scalar else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names[hf_config.model_type]
