"""What a run shows of itself: lines where stderr is a file, a bar at a terminal, and counts that mean what they say."""

from __future__ import annotations

import gzip
import io
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rollout_engine import LLM, SamplingParams, progress
from rollout_engine.batch import Job, Source, generate
from rollout_engine.progress import LINE_EVERY_S, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(total: int | None, counts: list[tuple[float, int, int]], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is written for (seconds that pass, answers, tokens)."""
    clock = Clock()
    with Progress("answers", total, clock=clock) as bar:
        for seconds, answers, tokens in counts:
            clock.now += seconds
            bar.advance(answers, tokens)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_says_how_many_how_fast_and_how_long_it_will_take(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1,200 answers 100 in 40 s: 11 times as many in 440 s. Then 900 in 150 s: a third of that."""
    counts = [(10, 60, 30_000), (30, 40, 50_000), (29, 100, 1), (1, 0, 20_000), (80, 700, 199_999)]
    assert lines(1200, counts, capsys) == [
        "answers  100/1,200  2,000 tok/s  ETA 0:07:20",  # 80,000 tokens in 40 s
        "answers  200/1,200  1,429 tok/s  ETA 0:05:50",  # 100,001 in 70 s; five times as many as there are
        "answers  900/1,200  2,000 tok/s  ETA 0:00:50",  # 300,000 in 150 s
    ]


def test_a_stream_has_no_end_to_wait_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(None, [(60, 1500, 6000)], capsys) == ["answers  1,500  100 tok/s"]


def test_before_the_first_answer_there_is_no_telling(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(8, [(60, 0, 600)], capsys) == ["answers  0/8  10 tok/s  ETA -"]


def test_a_run_of_days_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """4 s each, and 45,000 to come: 2 days, 2 hours."""
    assert lines(45_010, [(40, 10, 0)], capsys) == ["answers  10/45,010  0 tok/s  ETA 2 days, 2:00:00"]


def test_a_short_run_leaves_stderr_empty_and_so_does_one_without_a_label(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(3, [(LINE_EVERY_S - 0.5, 3, 9)], capsys) == []
    clock = Clock()
    with Progress(None, 3, clock=clock) as bar:
        clock.now += 100
        bar.advance(1, 9)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_there_is_a_bar_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with Progress("answers", 4, clock=clock) as bar:
        clock.now += 60
        bar.advance(1, 600)
    shown = sys.stderr.getvalue()
    assert "1/4" in shown and "10 tok/s" in shown and "━" in shown
    assert "answers  1/4" not in shown


# ---------------------------------------------------------------- who counts what


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line with every count."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)


def done(err: str) -> list[str]:
    """Counts of the lines of ``generate``; nothing else is there."""
    return [re.fullmatch(r"generate  (\S+)  \S+ tok/s(  ETA .+)?", line)[1] for line in err.splitlines()]  # type: ignore[index]


@pytest.mark.usefixtures("at_once")
def test_a_continued_run_counts_the_rows_that_are_left(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "the end"}\n' * 9 + "{torn\n")
    engine = {"kv_cache_gib": 0.01, "max_num_seqs": 4}
    params = SamplingParams(n=2, max_tokens=4, seed=3)
    job = Job(str(checkpoint), Source(str(tmp_path / "in.jsonl")), params, engine=engine)
    generate(replace(job, limit=4), tmp_path / "out.jsonl", progress="generate")
    assert done(capsys.readouterr().err) == ["1/4", "2/4", "3/4", "4/4"]
    generate(job, tmp_path / "out.jsonl", progress="generate")
    assert done(capsys.readouterr().err) == ["1/6", "2/6", "3/6", "4/6", "5/6", "6/6"]  # a row that fails is a row
    generate(job, tmp_path / "out.jsonl", progress="generate", overwrite=True)
    assert done(capsys.readouterr().err)[-1] == "10/10"
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.write('{"prompt": "the end"}\n' * 3)
    streamed = replace(job, source=Source(str(tmp_path / "in.jsonl.gz")))
    generate(streamed, tmp_path / "other.jsonl", progress="generate")
    assert done(capsys.readouterr().err) == ["1", "2", "3"]


@pytest.mark.usefixtures("at_once")
def test_the_engine_counts_answers_and_all_their_tokens(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    advance = Progress.advance

    def spy(self: Progress, answers: int, tokens: int) -> None:
        counted.append(tokens)
        advance(self, answers, tokens)

    monkeypatch.setattr(Progress, "advance", spy)
    params = SamplingParams(n=3, max_tokens=5, ignore_eos=True)
    LLM(checkpoint, kv_cache_gib=0.01).generate(["the end", "of the day"], params, progress="generate")
    assert done(capsys.readouterr().err)[-1] == "6/6"
    assert sum(counted) == 2 * 3 * 5
