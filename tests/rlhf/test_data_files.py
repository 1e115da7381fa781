"""Rows from files and folders, what a refusal says, and prompts through chat templates with one BOS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from rlhf.config import Config, Data, parse_config
from rlhf.data import Renderer, load_rows, read_split, tokenize
from rlhf.recipe import Recipe, load_recipe

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(24)]
TEST = [{"question": "And 7 + 1?", "answer": "#### 8"}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    (tmp_path / "task.py").write_text("def reward(completion, answer): return 1.0")
    return load_recipe(str(tmp_path / "task.py"))


def jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------- loading


def save_to_disk(folder: Path) -> str:
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(TEST)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return str(folder / "saved")


def folder_of_jsonl(folder: Path) -> str:
    jsonl(folder / "files" / "test.jsonl", TEST)
    jsonl(folder / "files" / "train.jsonl")
    return str(folder / "files")


def folder_of_parquet(folder: Path) -> str:
    for split, rows in (("train", ROWS), ("test", TEST)):
        datasets.Dataset.from_list(rows).to_parquet(folder / "parquet" / f"{split}.parquet")
    return str(folder / "parquet")


@pytest.mark.parametrize("make", [save_to_disk, folder_of_jsonl, folder_of_parquet])
def test_a_folder_has_splits(make: Callable[[Path], str], tmp_path: Path, recipe: Recipe) -> None:
    section = Data(path=make(tmp_path), prompt="question", eval_split="test")
    rows = load_rows(section, recipe, num_eval=5)
    assert (rows.train, rows.eval, rows.source) == (ROWS, TEST, section.path)
    with pytest.raises(ValueError, match=r"(?i)data\.eval_split='valid': .*valid"):
        read_split(section, "eval_split", "valid")


def single_jsonl(folder: Path) -> str:
    return jsonl(folder / "rows.jsonl")


def single_parquet(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def single_dataset(folder: Path) -> str:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return str(folder / "saved")


@pytest.mark.parametrize("make", [single_jsonl, single_parquet, single_dataset])
def test_what_has_one_split_holds_rows_out(make: Callable[[Path], str], tmp_path: Path, recipe: Recipe) -> None:
    section = Data(path=make(tmp_path), prompt="question")
    rows = load_rows(section, recipe, num_eval=100)
    assert len(rows.eval) == 2  # a tenth
    assert sorted(map(ROWS.index, rows.train + rows.eval)) == list(range(24))
    assert rows == load_rows(section, recipe, num_eval=100)
    assert len(load_rows(section, recipe, num_eval=1).eval) == 1


@pytest.mark.parametrize(("key", "value"), [("subset", "main"), ("eval_split", "test"), ("train_split", "test")])
def test_one_file_has_no_splits_and_subsets(key: str, value: str, tmp_path: Path, recipe: Recipe) -> None:
    section = Data(path=jsonl(tmp_path / "rows.jsonl"), prompt="question", **{key: value})
    way_out = "train" if key == "train_split" else "null"
    with pytest.raises(ValueError, match=rf"data\.{key}='{value}', but .*rows\.jsonl is one file.*{key}={way_out}"):
        load_rows(section, recipe, 5)


def test_one_row_can_not_be_divided(tmp_path: Path, recipe: Recipe) -> None:
    section = Data(path=jsonl(tmp_path / "one.jsonl", ROWS[:1]), prompt="question")
    with pytest.raises(ValueError, match=r"one\.jsonl has 1 row; .*data\.eval_split"):
        load_rows(section, recipe, 5)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": "a" "answer": "b"}', r"line 3 is not JSON: Expecting ',' delimiter.*it begins"),
        (b'{"question": "a", "answer"', "line 3 is not JSON"),
        (b'"just a text"', r"line 3 is no object .*just a text"),
        (b'{"question": "\xff"}', "line 3 is not JSON: 'utf-8' codec can't decode"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_bad_line_is_named(line: bytes, said: str, in_folder: bool, tmp_path: Path) -> None:
    path = Path(folder_of_jsonl(tmp_path)) / "train.jsonl"
    good = b'{"question": "a", "answer": "b"}\n'
    path.write_bytes(good + b"\n" + line + b"\n" + good)  # the empty line counts
    section = Data(path=str(path.parent if in_folder else path))
    with pytest.raises(ValueError, match=rf"train\.jsonl {said}"):
        read_split(section, "train_split", "train")


def test_lines_may_differ_and_hold_what_unicode_calls_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes("\N{BYTE ORDER MARK}".encode() + '{"a": "x\u2028y"}\r\n\r\n{"b": [1]}'.encode())
    assert read_split(Data(path=str(path)), "train_split", "train") == [{"a": "x\u2028y"}, {"b": [1]}]


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "./none"])
def test_a_path_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none"):
        read_split(Data(path=str(tmp_path / name)), "train_split", "train")


def test_columns_are_checked_against_the_reward(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("def reward(completion, solution, level=1): return 1.0")
    recipe, path = load_recipe(str(tmp_path / "task.py")), jsonl(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"^reward\(\) wants 'solution'; the data has question, answer"):
        load_rows(Data(path=path, prompt="question"), recipe, 5)
    with pytest.raises(ValueError, match=r"^data\.prompt wants 'prompt'; the data has question, answer"):
        load_rows(Data(path=path), recipe, 5)


def test_the_config_goes_before_the_recipes_prompts_which_may_have_no_splits(tmp_path: Path) -> None:
    source = "def reward(completion): return 1.0\ndef prompts(): return ({'prompt': str(i)} for i in range(30))"
    (tmp_path / "task.py").write_text(source)
    recipe = load_recipe(str(tmp_path / "task.py"))
    own = load_rows(Data(), recipe, 2)
    assert (len(own.train), len(own.eval), own.source) == (28, 2, "recipe_task.prompts")
    assert {row["prompt"] for row in own.train + own.eval} == {str(i) for i in range(30)}
    path = jsonl(tmp_path / "rows.jsonl")
    assert load_rows(Data(path=path, prompt="question"), recipe, 2).source == path


# ---------------------------------------------------------------- chat templates

HEAD = "<bos><|im_start|>system\nBe brief.<|im_end|>\n"
USER = "<|im_start|>user\nhi<|im_end|>\n"
TAIL = "<|im_start|>assistant\n"
TALK = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(chat_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_checkpoint)


@pytest.mark.parametrize(
    ("settings", "prompt", "text"),
    [
        ({}, "hi", f"<bos>{USER}{TAIL}"),
        ({}, TALK, f"<bos>{USER}{TAIL}"),
        ({"system": "Be brief."}, "hi", HEAD + USER + TAIL),
        ({"system": "Be brief."}, TALK, HEAD + USER + TAIL),
        ({"system": "Be long."}, [{"role": "system", "content": "Be brief."}, *TALK], HEAD + USER + TAIL),
        ({"template_args": {"enable_thinking": False}}, "hi", f"<bos>{USER}{TAIL}<think></think>"),
        ({"template_args": {"enable_thinking": True}}, "hi", f"<bos>{USER}{TAIL}"),
    ],
)
def test_a_prompt_goes_through_the_template_once(settings: Any, prompt: Any, text: str, tokenizer: Any) -> None:
    ((made,), dropped) = tokenize([{"prompt": prompt, "x": 1}], Renderer(Data(**settings), tokenizer))
    assert made.text == text and dropped == 0
    assert tokenizer.decode(made.token_ids) == text
    assert made.token_ids.count(tokenizer.bos_token_id) == 1 == text.count(TAIL)
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2  # so it could have gone wrong
    roles = [m["role"] for m in made.messages]
    assert roles == (["system", "user"] if "system" in text else ["user"]) and made.messages[-1] == TALK[0]
    assert made.columns == {"prompt": prompt, "x": 1}


@pytest.mark.parametrize("text", ["hi", "<bos>hi"])
def test_without_a_template_the_tokenizer_writes_the_one_bos(text: str, tokenizer: Any) -> None:
    ((made,), _) = tokenize([{"prompt": text}], Renderer(Data(chat_template="none"), tokenizer))
    assert tokenizer.decode(made.token_ids) == "<bos>hi" and made.token_ids.count(tokenizer.bos_token_id) == 1
    assert (made.text, made.messages) == (text, ())


def test_a_template_of_ones_own(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}>")
    section = Data(chat_template=str(tmp_path / "mine.jinja"), system="s")
    text, token_ids, _ = Renderer(section, tokenizer)("hi")
    assert text == tokenizer.decode(token_ids) == "[system] s\n[user] hi\n>"  # it writes no BOS, so there is none
    with pytest.raises(ValueError, match=r"chat_template='no\.jinja': no such file"):
        Renderer(Data(chat_template="no.jinja"), tokenizer)


def test_messages_come_through_parquet_as_they_were(tmp_path: Path, tokenizer: Any, recipe: Recipe) -> None:
    rows = [{"prompt": TALK, "answer": "1"}] * 4
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    loaded = load_rows(Data(path=str(tmp_path / "chat.parquet")), recipe, 1)
    assert tokenize(loaded.train, Renderer(Data(), tokenizer))[0][0].text == f"<bos>{USER}{TAIL}"


class Plain:
    bos_token = chat_template = None


@pytest.mark.parametrize("section", [Data(system="s"), Data(template_args={"a": 1})])
def test_what_needs_a_template_says_so_before_any_row(section: Data) -> None:
    with pytest.raises(ValueError, match=r"needs a chat template, and the tokenizer has none; set data\.chat_template"):
        Renderer(section, Plain())
    with pytest.raises(ValueError, match=r"chat template, and data\.chat_template is none; set auto"):
        Renderer(section.model_copy(update={"chat_template": "none"}), Plain())


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("  ", "give a text, or a list of messages"),
        ([], "give a text, or a list of messages"),
        (None, "give a text, or a list of messages"),
        (["hi"], "give a text, or a list of messages"),
        ([{"content": "hi"}], "with role and content"),
        ([*TALK, {"role": "assistant", "content": "hello"}], "end with the assistant's answer"),
    ],
)
def test_a_prompt_that_is_none_is_named_by_its_row(prompt: Any, said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=f"^row 1: .*{said}"):
        tokenize([{"prompt": "hi"}, {"prompt": prompt}], Renderer(Data(), tokenizer))
    with pytest.raises(ValueError, match=r"^row 0: messages need a chat template, and the tokenizer has none"):
        tokenize([{"prompt": TALK}], Renderer(Data(), Plain()))


def config(**data: Any) -> Config:
    rollout = {"prompts_per_step": 1, "samples_per_prompt": 2, "max_tokens": 2}
    tree = {"run": {"name": "a", "steps": 1}, "recipe": {"path": "x"}, "rollout": rollout, "train": {"lr": 1}}
    return parse_config({**tree, "algorithm": {"name": "grpo"}, "data": data})


def test_a_chat_template_that_is_neither_word_nor_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.chat_template='chatml'"):
        config(chat_template="chatml")
    assert config(template_args={"enable_thinking": False}).data.template_args == {"enable_thinking": False}
