"""What a run reads and writes: every kind of input, every kind of bad row, in bounded memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from rollout_engine import LLM, SamplingParams
from rollout_engine.batch import Job, PromptForm, Source, generate
from rollout_engine.batch.output import Output, Record
from rollout_engine.batch.plan import plan

MakeJob = Callable[..., Job]
PROMPTS = [f"the end of day {i} — é" for i in range(9)]
ENGINE = {"kv_cache_gib": 0.01, "max_num_seqs": 6}


@pytest.fixture
def make_job(checkpoint: Path) -> MakeJob:
    def make(source: Path | str, *, split: str = "train", sampling: dict[str, Any] | None = None, **rest: Any) -> Job:
        params = SamplingParams(**{"n": 2, "max_tokens": 6, "seed": 3, **(sampling or {})})
        return Job(str(checkpoint), Source(str(source), split=split), params, engine=ENGINE, **rest)

    return make


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS])


def test_an_output_line_holds_what_the_engine_answered(
    lines: Path, tmp_path: Path, make_job: MakeJob, checkpoint: Path
) -> None:
    job = make_job(lines, token_ids=True, logprobs=True)
    summary = generate(job, tmp_path / "out.jsonl")
    llm = LLM(checkpoint, **ENGINE)
    expected = llm.generate(PROMPTS, job.params, sample_ids=[[2 * i, 2 * i + 1] for i in range(9)])
    assert read(tmp_path / "out.jsonl") == [
        {
            "id": i + 1,
            "index": index,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "prompt_tokens": len(out.prompt_token_ids),
            "completion_tokens": len(answer.token_ids),
            "token_ids": list(answer.token_ids),
            "logprobs": list(answer.policy_logprobs),
        }
        for i, out in enumerate(expected)
        for index, answer in enumerate(out.outputs)
    ]
    assert (summary.rows, summary.answers, summary.failed) == (9, 18, 0)
    assert summary.tokens == sum(len(answer.token_ids) for out in expected for answer in out.outputs)
    assert not (tmp_path / "out.errors.jsonl").exists()


def as_gzip(folder: Path) -> Path:
    path = folder / "in.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS).encode()))
    return path


def as_parquet(folder: Path) -> Path:
    table = pa.table({"prompt": PROMPTS, "messages": [None] * 9, "id": [None] * 9})
    pq.write_table(table, folder / "in.parquet", row_group_size=4)
    return folder / "in.parquet"


def as_saved(folder: Path) -> Path:
    Dataset.from_dict({"prompt": PROMPTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_splits(folder: Path) -> Path:
    DatasetDict(train=Dataset.from_dict({"prompt": PROMPTS}), test=Dataset.from_dict({"prompt": ["x"]})).save_to_disk(
        folder / "splits"
    )
    return folder / "splits"


def as_folder_of_files(folder: Path) -> Path:
    (folder / "files").mkdir()
    write_lines(folder / "files" / "train.jsonl", [{"prompt": text} for text in PROMPTS])
    return folder / "files"


@pytest.mark.parametrize("write", (as_gzip, as_parquet, as_saved, as_saved_splits, as_folder_of_files))
def test_every_kind_of_input_gives_the_same_bytes(
    write: Callable[[Path], Path], lines: Path, tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    generate(make_job(lines), tmp_path / "expected.jsonl")
    streamed = write in (as_gzip, as_folder_of_files)
    job = make_job(write(tmp_path))
    assert job.source.count() == (None if streamed else 9)
    assert generate(job, tmp_path / "out.jsonl").failed == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()


def test_messages_in_parquet_token_ids_and_named_columns(tmp_path: Path, make_job: MakeJob) -> None:
    messages = [[{"role": "user", "content": text}] for text in PROMPTS]
    ids = [[5, 6, 7 + i] for i in range(9)]
    pq.write_table(pa.table({"talk": messages, "ids": ids, "question": PROMPTS}), tmp_path / "in.parquet")
    rendered = {}
    for column in ("talk", "ids", "question"):
        form = PromptForm(column=column, chat=column == "question")
        assert generate(make_job(tmp_path / "in.parquet", form=form), tmp_path / f"{column}.jsonl").failed == 0
        rendered[column] = (tmp_path / f"{column}.jsonl").read_bytes()
    assert rendered["talk"] == rendered["question"] != rendered["ids"]
    assert {line["prompt_tokens"] for line in read(tmp_path / "ids.jsonl")} == {3}


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    (
        ({}, {"prompt": "hi"}, "hi"),
        ({"chat": True}, {"prompt": "hi"}, "<s>[user]hi[]"),
        ({"system": "be brief"}, {"prompt": "hi"}, "<s>[system]be brief[user]hi[]"),
        ({"system": "x"}, {"messages": [{"role": "system", "content": "own"}]}, "<s>[system]own[]"),
        ({"chat": True, "template_args": {"tone": "kind"}}, {"prompt": "hi"}, "<s>[user]hi[kind]"),
        ({"chat": True, "template": "{{ messages[0].content }}?"}, {"prompt": "hi"}, "hi?"),
        ({"template": "none"}, {"prompt": "hi"}, "hi"),
    ),
    ids=str,
)
def test_forms_of_a_prompt(
    form: dict[str, Any], row: dict[str, Any], expected: str, tmp_path: Path, make_job: MakeJob
) -> None:
    job = make_job(write_lines(tmp_path / "in.jsonl", [row]), form=PromptForm(**form))
    shown = plan(job, str(tmp_path / "out.jsonl"))
    assert shown.endswith(f"tokens\n{expected}")


# ---------------------------------------------------------------- rows that fail

BAD_ROWS: list[tuple[Any, str]] = [
    ("{oops", "not JSON"),
    ("[1, 2]", "must be a JSON object, not list"),
    ('{"prompt": "cut', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ({"text": "hi"}, "has only ['text']; --prompt-column"),
    ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "'prompt' and 'messages'"),
    ({"prompt": ""}, "empty"),
    ({"messages": []}, "empty"),
    ({"prompt_token_ids": [1.5]}, "must be integers"),
    ({"prompt_token_ids": [10**30]}, "span"),
    ({"prompt": 7}, "text, messages or token ids, not 7"),
    ({"prompt": [{"role": "user", "content": "x"}, 3]}, "text, messages or token ids"),
    ({"prompt": "a" * 300}, "the context of 256"),
    ({"prompt": "a", "id": [1]}, "'id' is text or an integer"),
    ({"prompt": "half a pair \ud83d"}, "the tokenizer refuses"),
    ({"messages": [{"role": "user"}], "id": "broken"}, "refuses the messages"),
]


def test_bad_rows_go_to_the_errors_file_and_end_nothing(tmp_path: Path, make_job: MakeJob) -> None:
    rows: list[Any] = []
    for i, (bad, _) in enumerate(BAD_ROWS):
        rows += [bad, {"prompt": f"good {i}", "id": f"\ud83d{i}"}]
    rows.insert(4, "   ")  # a blank line is no row, but counts as a line
    form = PromptForm(template="{{ messages[0].content.strip() }}")
    summary = generate(make_job(write_lines(tmp_path / "in.jsonl", rows), form=form), tmp_path / "out.jsonl")
    assert (summary.rows, summary.failed, summary.answers) == (32, 16, 32)
    answers, errors = read(tmp_path / "out.jsonl"), read(tmp_path / "out.errors.jsonl")
    assert [line["id"] for line in answers[::2]] == [f"\ud83d{i}" for i in range(16)]
    assert [error["line"] for error in errors] == [2 * i + 1 + (i >= 2) for i in range(16)]
    for error, (_, words) in zip(errors, BAD_ROWS, strict=True):
        assert words in error["error"]
        assert error["id"] == ("broken" if words == "refuses the messages" else error["line"])
    again = generate(make_job(tmp_path / "in.jsonl", form=form), tmp_path / "out.jsonl")
    assert (again.done_before, again.rows, again.failed) == (32, 0, 16)


def test_bytes_that_are_no_text_fail_their_line_alone(tmp_path: Path, make_job: MakeJob) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n{"prompt": "b"}')
    assert generate(make_job(tmp_path / "in.jsonl"), tmp_path / "out.jsonl").failed == 1
    assert [line["id"] for line in read(tmp_path / "out.jsonl")] == [1, 1, 3, 3]


def test_a_damaged_archive_keeps_what_came_before(tmp_path: Path, make_job: MakeJob) -> None:
    path = as_gzip(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(OSError, match="damaged after line"):
        generate(make_job(path), tmp_path / "out.jsonl")


@pytest.mark.parametrize(
    ("source", "message"),
    (
        ("missing.jsonl", "isn't there"),
        ("/nowhere/at/all", "isn't there"),
        ("./nowhere", "isn't there"),
        ("picture.png", "no kind of file"),
    ),
)
def test_inputs_that_cannot_be_read_are_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=message):
        Source(source)


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\], not 'dev'"):
        list(Source(str(as_saved_splits(tmp_path)), split="dev").rows())


def test_forms_that_contradict_themselves_are_refused() -> None:
    for form in ({"chat": True}, {"system": "x"}, {"template_args": {"a": 1}}):
        with pytest.raises(ValueError, match="none"):
            PromptForm(template="none", **form)
    with pytest.raises(ValueError, match="JSON object"):
        PromptForm(template_args=[1])  # type: ignore[arg-type]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
def test_reading_and_resuming_take_no_more_memory_for_a_bigger_file(kind: str, tmp_path: Path) -> None:
    """Rows of 400 bytes: 8 MB in, 3 MB out."""
    count, source = 20_000, tmp_path / f"in.{kind}"
    if kind == "jsonl":
        with source.open("w") as file:
            file.writelines(json.dumps({"prompt": "x" * 380, "number": i}) + "\n" for i in range(count))
    else:
        pq.write_table(pa.table({"prompt": ["x" * 380] * count}), source, row_group_size=1000)
    answer = {"index": 0, "text": "y" * 60, "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 4}
    settings = {"n": 1}
    with Output(tmp_path / "out.jsonl", 1) as output:
        output.open(settings, Source(str(source)).rows(), overwrite=False)
        for line in range(1, count - 4):
            output.write(Record((json.dumps({"id": line, **answer}) + "\n").encode(), failed=False))
    tracemalloc.start()
    with Output(tmp_path / "out.jsonl", 1) as output:
        done = output.open(settings, Source(str(source)).rows(), overwrite=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (done.rows, done.complete) == (count - 5, False)
    assert peak < 1_000_000  # one batch of Parquet rows, or a read buffer


def test_a_run_holds_a_window_of_rows_and_not_the_file(
    tmp_path: Path, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a" * (i % 50 + 1)} for i in range(120)])
    written, ahead = 0, []
    rows, write = Source.rows, Output.write

    def counted(self: Source) -> Any:
        for number, row in enumerate(rows(self)):
            ahead.append(number - written)
            yield row

    def noted(self: Output, record: Record) -> None:
        nonlocal written
        written += 1
        write(self, record)

    monkeypatch.setattr(Source, "rows", counted)
    monkeypatch.setattr(Output, "write", noted)
    assert generate(make_job(source, sampling={"max_tokens": 2}), tmp_path / "out.jsonl").rows == 120
    assert len(ahead) > 120 and max(ahead) <= 4 * 6 // 2  # max_num_seqs is 6, n is 2
