"""From rows of text to pairs of token ids: what the model sees, what is dropped, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes import arithmetic_ppo
from rlhf.config import Data
from rlhf.data import Renderer
from rlhf.recipe import load_recipe
from rlhf.reward_model.config import PairsSection, RewardModelConfig
from rlhf.reward_model.pairs import Pair, load_pair_rows, tokenize_pairs
from rlhf.reward_model.train import minibatches
from rollout_engine.models.checkpoint import load_tokenizer

SECTION = PairsSection(batch_size=4, steps=1)


def tokenize(folder: Path, rows: list[dict[str, Any]], data: Data | None = None, **pairs: Any) -> Any:
    render = Renderer(data or Data(chat_template="none"), load_tokenizer(folder))
    return tokenize_pairs(rows, render, SECTION.model_copy(update=pairs))


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": "1+1=", "chosen": "2", "rejected": "3", **columns}


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def test_what_the_model_sees(chat_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    (pair,), dropped = tokenize(chat_checkpoint, [row(margin=0.5, kind="digit")])
    assert [tokenizer.decode(ids) for ids in (pair.chosen, pair.rejected)] == [
        "<bos>1+1=2<|im_end|>",
        "<bos>1+1=3<|im_end|>",
    ]
    assert (pair.margin, pair.kind, set(dropped.values())) == (0.5, "digit", {0})


def test_chats_go_through_the_template(chat_checkpoint: Path) -> None:
    """Only the prompt: the answer follows what the template wrote for the assistant's turn, as a sampled one does."""
    tokenizer = load_tokenizer(chat_checkpoint)
    history = [said("1+1=", "user")]
    forms = [
        row(prompt=history),
        row(prompt=history, chosen=[said("2")], rejected=[said("3")]),
        row(chosen=[*history, said("2")], rejected=[*history, said("3")]),
        {"chosen": [*history, said("2")], "rejected": [*history, said("3")]},  # the prompt is in the answers
    ]
    pairs, _ = tokenize(chat_checkpoint, forms, Data())
    shown = "<bos><|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert {tokenizer.decode(pair.chosen) for pair in pairs} == {shown}
    assert len(set(pairs)) == 1


def test_an_unfinished_answer_has_no_end(chat_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    (pair,), _ = tokenize(chat_checkpoint, [row(rejected="2", rejected_finish_reason="length")])
    assert pair.chosen == (*pair.rejected, tokenizer.eos_token_id)
    with pytest.raises(ValueError, match="row 0: chosen_finish_reason is 'eos'; give stop or length"):
        tokenize(chat_checkpoint, [row(chosen_finish_reason="eos")])


def test_a_tokenizer_without_an_end_is_refused(chat_checkpoint: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0: the tokenizer has no end-of-sequence token"):
        tokenize_pairs([row()], Renderer(Data(chat_template="none"), tokenizer), SECTION)


def test_what_teaches_nothing_is_dropped_and_counted(chat_checkpoint: Path) -> None:
    rows = [
        row(),
        row(rejected="2"),
        row(chosen=""),
        row(rejected=""),  # that saying nothing is wrong can be learnt
        row(rejected="3" * 30),
        row(prompt="1" * 30),
    ]
    pairs, dropped = tokenize(chat_checkpoint, rows, max_tokens=20)
    assert [len(pair.rejected) - len(pair.chosen) for pair in pairs] == [0, -1]
    assert dropped == {"too long": 2, "equal": 1, "empty": 1}
    with pytest.raises(
        ValueError, match=r"none of 1 preference pairs is left: 0 too long, 1 equal, 0 empty \(pairs.max"
    ):
        tokenize(chat_checkpoint, [row(rejected="2")])


def test_the_longest_pair_that_fits(chat_checkpoint: Path) -> None:
    """<bos>, four characters of the prompt, one of the answer and its end: 7 tokens."""
    assert len(tokenize(chat_checkpoint, [row()], max_tokens=7)[0]) == 1
    with pytest.raises(ValueError, match="1 too long"):
        tokenize(chat_checkpoint, [row()], max_tokens=6)
    prompt_of_4 = Data(chat_template="none", max_prompt_tokens=4)
    with pytest.raises(ValueError, match=r"1 too long.*data.max_prompt_tokens=4"):
        tokenize(chat_checkpoint, [row()], prompt_of_4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 0: pairs want the column 'rejected'; the data has prompt, chosen"),
        ({"chosen": "b", "rejected": "c"}, "row 0: data.prompt wants 'prompt'; the data has chosen, rejected"),
        (row(chosen=None), "row 0: chosen is None; give a text, or a list of messages that ends with the assistant"),
        (row(chosen=[said("a", "user")]), "row 0: chosen is .*give a text, or a list of messages that ends with"),
        (row(chosen=[said("a", "user"), said("b")]), "row 0: chosen and rejected answer different conversations"),
        (row(margin="wide"), "row 0: could not convert string to float: 'wide'"),
        (row(margin=float("nan")), "row 0: margin is nan; give a finite number"),
    ],
)
def test_bad_rows_are_named(chat_checkpoint: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize(chat_checkpoint, [given])


def config(**sections: Any) -> RewardModelConfig:
    tree = {"run": {"name": "r"}, "pairs": {"batch_size": 4, "epochs": 2}, "train": {"lr": 1e-3}, **sections}
    return RewardModelConfig.model_validate(tree)


def test_held_out_prompts_are_in_no_training_pair(tmp_path: Path) -> None:
    import json

    rows = [row(prompt=f"{i % 20}+0=", rejected=str(i)) for i in range(100, 200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = config(data={"path": str(tmp_path / "pairs.jsonl")})
    train, held_out, source = load_pair_rows(asked, None)
    assert source.endswith("pairs.jsonl") and len(train) + len(held_out) == 100
    assert len(held_out) == 10 and not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row(rejected=str(i))) + "\n" for i in range(9)))
    with pytest.raises(ValueError, match=r"all preference pairs have the same prompt.*name a data.eval_split"):
        load_pair_rows(asked, None)
    with pytest.raises(ValueError, match=r"data.path and recipe.path are both missing"):
        load_pair_rows(config(), None)
    with pytest.raises(ValueError, match=r"no preferences; set data.path, or write preferences\(split\)"):
        load_pair_rows(config(), load_recipe("recipes.arithmetic"))


def test_an_epoch_shows_every_pair_once() -> None:
    pairs = [Pair((i,), (i, i)) for i in range(10)]
    stream = minibatches(pairs, 4, seed=0)
    seen = [pair.chosen[0] for _ in range(5) for pair in next(stream).pairs]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    again = minibatches(pairs, 4, seed=0)
    assert [pair.chosen[0] for _ in range(5) for pair in next(again).pairs] == seen
    assert [pair.chosen[0] for pair in next(minibatches(pairs, 4, seed=1)).pairs] != seen[:4]
    assert config().pairs.num_steps(10) == 5
    assert next(minibatches(pairs[:3], 8, seed=0)).weights == (1 / 8,) * 8


def test_made_pairs_hold_the_right_answer_and_a_wrong_one() -> None:
    kinds: dict[str, int] = {}
    prompts: dict[str, set[tuple[int, int]]] = {}
    for split in ("train", "eval"):
        for made in arithmetic_ppo.preferences(split):
            a, b = (int(part) for part in made["prompt"][:-1].split("+"))
            prompts.setdefault(split, set()).add((min(a, b), max(a, b)))
            assert int(made["chosen"][::-1]) == a + b and len(made["chosen"]) == 3
            assert made["rejected"] != made["chosen"] and len(made["rejected"]) <= 5
            assert (made["rejected_finish_reason"] == "length") == (len(made["rejected"]) == 5)
            kinds[made["kind"]] = kinds.get(made["kind"], 0) + 1
    assert not prompts["train"] & prompts["eval"] and len(prompts["eval"]) == 500
    assert set(kinds) == set(arithmetic_ppo.KINDS) and min(kinds.values()) > 500


@pytest.mark.parametrize(
    ("chosen", "rejected", "positions"),
    [
        ((5, 1, 2, 3), (5, 1, 9, 3), [(2, 2), (3, 3)]),
        ((5, 1, 2, 3), (5, 9, 3), [(1, 1), (2, 2), (3, 2)]),
        ((5, 1, 3), (5, 1), [(2, 1)]),  # one answer is the other's beginning
    ],
)
def test_what_the_loss_compares(
    chosen: tuple[int, ...], rejected: tuple[int, ...], positions: list[tuple[int, int]]
) -> None:
    assert Pair(chosen, rejected).compared("tokens") == positions
    assert Pair(chosen, rejected).compared("last") == positions[-1:]
    assert Pair(rejected, chosen).compared("tokens") == [(b, a) for a, b in positions]
