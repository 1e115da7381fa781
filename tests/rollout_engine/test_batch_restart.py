"""Runs that end early: killed, torn, refused, continued by several processes. The bytes are those of one whole run."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest

from rollout_engine import LLM, SamplingParams
from rollout_engine.__main__ import main
from rollout_engine.batch import Job, PromptForm, Source, generate
from rollout_engine.batch.output import Output, Record
from rollout_engine.batch.parallel import WorkerDied
from rollout_engine.batch.rows import Row

ROOT = Path(__file__).parents[2]
SEEDED = {"n": 2, "max_tokens": 9, "seed": 3, "top_p": 0.9, "stop": ["e"]}
GREEDY = {"n": 1, "max_tokens": 9, "temperature": 0.0}
Files = tuple[bytes, bytes]


@pytest.fixture
def job(tmp_path: Path, checkpoint: Path) -> Job:
    """Thirty rows; some fail, some wait for a slow one."""
    rows: list[Any] = [{"prompt": f"the end of day {i}", "id": f"row {i}"} for i in range(30)]
    rows[4], rows[11], rows[12], rows[29] = {"no": "prompt"}, "{torn", {"prompt": "a" * 300}, {"prompt": ""}
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (tmp_path / "in.jsonl").write_text(text)
    engine = {"kv_cache_gib": 0.01, "max_num_seqs": 6}
    return Job(str(checkpoint), Source(str(tmp_path / "in.jsonl")), SamplingParams(**SEEDED), engine=engine)


def files(output: Path) -> Files:
    errors = output.with_suffix(".errors.jsonl")
    return output.read_bytes(), errors.read_bytes() if errors.exists() else b""


def whole(job: Job, folder: Path) -> Files:
    """What one run that nobody disturbs writes."""
    assert generate(job, folder / "whole.jsonl").rows == 30
    return files(folder / "whole.jsonl")


# ---------------------------------------------------------------- killed


def alive(pid: int) -> bool:
    """There is such a process, and it isn't a dead one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def kill_at(job: Job, output: Path, size: int, data_parallel: int = 1) -> int:
    """Run in a process of its own, and kill -9 that once the two files together have ``size`` bytes.

    Its children must end by themselves. How many there were.
    """
    context = multiprocessing.get_context("fork")  # torch is loaded already
    process = context.Process(target=generate, args=(job, output), kwargs={"data_parallel": data_parallel})
    process.start()
    assert process.pid is not None
    errors = output.with_suffix(".errors.jsonl")
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:
        if sum(file.stat().st_size for file in (output, errors) if file.exists()) >= size:
            break
        time.sleep(0.001)
    children = children_of(process.pid)
    process.kill()
    process.join(20)
    assert process.exitcode in (0, -signal.SIGKILL)
    deadline = time.monotonic() + 20
    try:
        while any(map(alive, children)):
            assert time.monotonic() < deadline, f"of {children}, {[*filter(alive, children)]} outlive their parent"
            time.sleep(0.01)
    finally:
        for child in filter(alive, children):
            os.kill(child, signal.SIGKILL)
    return len(children)


def kill_and_continue(job: Job, folder: Path, moments: int, rng: random.Random, data_parallel: int = 1) -> None:
    expected = whole(job, folder)
    output = folder / "out.jsonl"
    sizes = sorted(rng.randrange(sum(map(len, expected))) for _ in range(moments))
    reached = []
    for size in sizes:
        kill_at(job, output, size, data_parallel)
        reached.append(sum(map(len, files(output))))
    assert reached == sorted(reached) and reached[0] < sum(map(len, expected))
    summary = generate(job, output, data_parallel=data_parallel)
    assert summary.done_before + summary.rows == 30 and summary.failed == 4
    assert files(output) == expected


@pytest.mark.parametrize("sampling", (SEEDED, GREEDY), ids=("seeded", "greedy"))
def test_killed_runs_go_on_to_the_same_bytes(sampling: dict[str, Any], job: Job, tmp_path: Path) -> None:
    kill_and_continue(replace(job, params=SamplingParams(**sampling)), tmp_path, 3, random.Random(sampling["n"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "moments", "data_parallel"),
    ((SEEDED, 20, 1), (GREEDY, 20, 1), (SEEDED, 6, 2), (GREEDY, 6, 2)),
    ids=("seeded", "greedy", "seeded, two processes", "greedy, two processes"),
)
def test_runs_killed_at_random_moments_go_on_to_the_same_bytes(
    sampling: dict[str, Any], moments: int, data_parallel: int, job: Job, tmp_path: Path
) -> None:
    seed = random.randrange(1 << 32)
    print(f"moments of seed {seed}")
    job = replace(job, params=SamplingParams(**sampling))
    kill_and_continue(job, tmp_path, moments, random.Random(seed), data_parallel)


@dataclass(frozen=True)
class Stuck(Job):
    """Each of its processes answers three rows, and then works on without ever writing again."""

    def answer(self, llm: LLM, rows: Iterator[Row]) -> Iterator[Record]:
        yield from super().answer(llm, itertools.islice(rows, 3))
        time.sleep(600)


def test_the_processes_of_a_killed_run_end_with_it_and_the_next_run_gives_the_same_bytes(
    job: Job, tmp_path: Path
) -> None:
    expected = whole(job, tmp_path)
    output = tmp_path / "out.jsonl"
    stuck = Stuck(**{field.name: getattr(job, field.name) for field in fields(job)})
    first_six = 5 * 2  # lines; the fifth row fails
    size = len(b"".join(expected[0].splitlines(keepends=True)[:first_six]) + expected[1].splitlines(keepends=True)[0])
    assert kill_at(stuck, output, size, data_parallel=2) >= 2
    assert sum(map(len, files(output))) == size
    assert generate(job, output).done_before == 6
    assert files(output) == expected


def test_files_torn_anywhere_are_read_up_to_the_last_whole_row(job: Job, tmp_path: Path) -> None:
    """What a killed process can leave: rows in order, the last one torn."""
    expected = whole(job, tmp_path)
    rows = list(job.source.rows())
    output = tmp_path / "out.jsonl"
    target = Output(output, job.params.n)
    failing = (4, 11, 12, 29)
    answers, errors = (data.splitlines(keepends=True) for data in expected)
    done = [b"", b""]
    for number in range(30):
        failed = number in failing
        data = errors.pop(0) if failed else b"".join(answers.pop(0) for _ in range(2))
        for length in (0, 1, len(data) // 2, len(data) // 2 + 1, len(data) - 1):
            torn = [done[which] + (data[:length] if which == failed else b"") for which in (0, 1)]
            output.write_bytes(torn[0])
            target.errors.write_bytes(torn[1])
            found = target.done(rows)
            assert (found.rows, found.failed) == (number, sum(n < number for n in failing))
            assert [found.output_bytes, found.errors_bytes] == [len(data) for data in done]
        done[failed] += data
    assert tuple(done) == expected


def test_a_lost_error_line_or_one_too_many_is_noticed(job: Job, tmp_path: Path) -> None:
    """After a power cut one of the two files may lack more than the other."""
    expected = whole(job, tmp_path)
    output = tmp_path / "whole.jsonl"
    output.write_bytes(b"".join(expected[0].splitlines(keepends=True)[:20]))  # errors of later rows are known already
    generate(job, output)
    assert files(output) == expected
    output.with_suffix(".errors.jsonl").unlink()
    with pytest.raises(ValueError, match=r"answers to id 'row 5' where line 5 of the input has id 5"):
        generate(job, output)
    assert files(output)[0] == expected[0]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "named"),
    (
        ({"params": SamplingParams(**{**SEEDED, "temperature": 0.5})}, "temperature=1.0, and now it is 0.5"),
        ({"params": SamplingParams(**{**SEEDED, "n": 3})}, "n=2, and now it is 3"),
        ({"form": PromptForm(chat=True)}, "chat=False"),
        ({"logprobs": True}, "columns="),
        ({"model": "somebody/else"}, "model="),
        ({"threads": 2}, "threads=1"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_settings_are_refused_by_name(change: dict[str, Any], named: str, job: Job, tmp_path: Path) -> None:
    generate(replace(job, limit=3), tmp_path / "out.jsonl")
    before = files(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=named):
        generate(replace(job, **change), tmp_path / "out.jsonl")
    assert files(tmp_path / "out.jsonl") == before


def test_sizes_and_limits_may_change_between_runs(job: Job, tmp_path: Path) -> None:
    expected = whole(job, tmp_path)
    output = tmp_path / "out.jsonl"
    assert generate(replace(job, limit=13), output).rows == 13
    assert generate(replace(job, limit=13), output).rows == 0
    assert generate(replace(job, limit=5), output).done_before == 13
    small = replace(job, engine={"kv_cache_gib": 0.002, "max_num_seqs": 2, "max_batch_tokens": 16})
    assert generate(small, output).rows == 17
    assert files(output) == expected


def test_another_input_or_output_is_refused_and_overwriting_starts_afresh(job: Job, tmp_path: Path) -> None:
    expected = whole(job, tmp_path)
    output = tmp_path / "whole.jsonl"
    source = Path(job.source.path)
    text = source.read_text()
    source.write_text(text.replace("row 9", "row X"))  # as many bytes
    with pytest.raises(ValueError, match=r"answers to id 'row 9' where line 10 of the input has id 'row X'"):
        generate(job, output)
    source.write_text(text + '{"prompt": "one more"}\n')
    with pytest.raises(ValueError, match="input="):
        generate(job, output)
    source.write_text(text)
    (tmp_path / "notes.jsonl").write_text('{"mine": 1}\n')
    with pytest.raises(ValueError, match="which says how it was made"):
        generate(job, tmp_path / "notes.jsonl")
    output.write_bytes(expected[0].replace(b'"index": 1', b'"index": 0', 1))
    with pytest.raises(ValueError, match="line 2: expected answer 1"):
        generate(job, output)
    output.write_bytes(expected[0].replace(b"{", b"", 1))
    with pytest.raises(ValueError, match="line 1 is damaged"):
        generate(job, output)
    greedy = replace(job, params=SamplingParams(**GREEDY))
    assert generate(greedy, output, overwrite=True).rows == 30
    assert generate(job, output, overwrite=True).done_before == 0
    assert files(output) == expected
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        generate(job, tmp_path / "out.txt")


def test_two_runs_do_not_write_one_output(job: Job, tmp_path: Path) -> None:
    with Output(tmp_path / "out.jsonl", 2) as held:
        held.open(job.settings(), job.source.rows(), overwrite=False)
        with pytest.raises(ValueError, match="another process is writing"):
            generate(job, tmp_path / "out.jsonl")
    assert generate(job, tmp_path / "out.jsonl").rows == 30


# ---------------------------------------------------------------- several processes


def test_two_processes_give_the_bytes_of_one_and_continue_each_other(job: Job, tmp_path: Path) -> None:
    expected = whole(job, tmp_path)
    output = tmp_path / "out.jsonl"
    generate(replace(job, limit=7), output)
    assert generate(job, output, data_parallel=2).rows == 23
    assert files(output) == expected


def test_a_dead_process_ends_the_run_and_the_next_one_goes_on(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child is killed after its first row is written."""
    expected = whole(job, tmp_path)
    output, write = tmp_path / "out.jsonl", Output.write

    def write_and_kill(self: Output, record: Any) -> None:
        write(self, record)
        for child in multiprocessing.active_children()[1:]:
            child.kill()
            child.join(20)

    long = replace(job, engine={**job.engine, "max_num_seqs": 2})  # so that rows are left when the first is out
    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", write_and_kill)
        with pytest.raises(WorkerDied, match="exit code -9; what was answered before is written"):
            generate(long, output, data_parallel=2)
    assert not multiprocessing.active_children()
    assert 0 < len(files(output)[0]) < len(expected[0]) and expected[0].startswith(files(output)[0])
    generate(job, output)
    assert files(output) == expected


@pytest.mark.slow
def test_what_a_process_raises_reaches_the_caller(job: Job, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no page"):
        generate(replace(job, engine={"kv_cache_gib": 1e-6}), tmp_path / "out.jsonl", data_parallel=2)


# ---------------------------------------------------------------- the command line


def words(job: Job, output: Path, *more: str) -> list[str]:
    settings = ["--num-samples", "2", "--max-tokens", "9", "--seed", "3", "--top-p", "0.9", "--stop", "e"]
    engine = ["--threads", "1", "--kv-cache-gib", "0.01", "--max-num-seqs", "6"]
    places = ["--model", job.model, "--input", job.source.path, "--output", str(output)]
    return ["generate", *places, *settings, *engine, *more]


def test_the_command_killed_and_started_again_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    expected = whole(job, tmp_path)
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "rollout_engine", *words(job, output)]
    pipe = subprocess.PIPE
    first = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe)
    deadline = time.monotonic() + 120
    while first.poll() is None and time.monotonic() < deadline:
        if output.exists() and output.stat().st_size > 500:
            first.kill()
        time.sleep(0.001)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stderr) == (3, "")  # four rows fail
    assert "done before, 4 failed" in again.stdout and "tok/s" in again.stdout
    assert files(output) == expected


def test_the_exit_status_tells_how_a_run_ended(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    assert main(words(job, output, "--limit", "4")) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 4 rows, 0 failed; 8 answers")
    assert main(words(job, output)) == 3
    assert "26 rows after 4 done before, 4 failed" in capsys.readouterr().out
    for more in (["--temperature", "0.5"], ["--temperature", "0.5", "--dry-run"]):
        assert main(words(job, output, *more)) == 2
        text = f"rollout generate: {output} was begun with temperature=1.0, and now it is 0.5"
        assert capsys.readouterr().err.startswith(text)

    def fail(self: Output, record: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Output, "write", fail)
    assert main(words(job, tmp_path / "other.jsonl")) == 1
    assert "No space left" in capsys.readouterr().err


def test_the_command_line_says_where_answers_may_stop(job: Job, tmp_path: Path) -> None:
    """Not within three tokens; then at any token of the first half of the vocabulary."""
    stop_ids = [str(token) for token in range(150)]
    more = ["--limit", "4", "--token-ids", "--min-tokens", "3", "--stop-token-ids", *stop_ids]
    assert main(words(job, tmp_path / "out.jsonl", *more)) == 0
    answers = [json.loads(line)["token_ids"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert all(token >= 150 for ids in answers for token in (*ids[:3], *ids[:-1]))
    assert any(ids[-1] < 150 for ids in answers)


def test_dry_run_says_what_would_be_done_and_does_nothing(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(job, tmp_path / "out.jsonl", "--dry-run", "--limit", "20")) == 0
    out = capsys.readouterr().out
    assert f"{job.model}, float32, context 256, numerics exact" in out
    assert "30 rows, of these the first 20" in out and "0 rows done" in out and "kv cache  0.01 GiB = " in out
    assert "row row 0: " in out and "the end of day 0" in out
    assert not list(tmp_path.glob("out*"))
