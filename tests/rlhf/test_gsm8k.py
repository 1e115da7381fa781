"""Answers to grade-school mathematics: what counts as the same number, and what doesn't count."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.gsm8k import marked_number, number, reward
from rlhf.types import Completion, Score

RIGHT = Score(1.0, {"right": 1.0, "format": 1.0})
WRONG = Score(0.1, {"right": 0.0, "format": 1.0})  # one number, where it should be
NOTHING = Score(0.0, {"right": 0.0, "format": 0.0})
LOOSE = Score(1.0, {"right": 1.0, "format": 0.0})  # right, but not the last word


def judge(text: str, answer: str = "16 - 3 = 13, 13 + 5 = 18\n#### 18", reason: str = "stop") -> Score:
    return reward(Completion("q", text, (1,), reason), answer)


@pytest.mark.parametrize(
    "text",
    [
        "She has 16 - 3 + 5 = 18.\n#### 18", "####18", "#### 18.", "#### 18.0", "#### 018", "#### 18.000 ", "##### 18",
        "#### $18", "#### $18.00", r"#### \$18", "#### 18%", "#### 18 apples", "#### 18 km per hour.", "#### €18",
        "#### 36/2", "#### 36 / 2", "**#### 18**", "#### **18**", "####\n18", "#### x = 18", "#### The answer is 18.",
        r"\boxed{18}", r"So it is $\boxed{18}$.", r"\[ \boxed{18\text{ dollars}} \]", r"\boxed{\frac{36}{2}}",
        r"\boxed{\dfrac{36}{2}}", r"#### \boxed{18}", "#### 3\n#### 18", r"\boxed{3} no, \boxed{18}",
        r"\boxed{\mathbf{18}}", r"\boxed{3} #### 18",
    ],
)  # fmt: skip
def test_the_right_number_however_it_is_written(text: str) -> None:
    assert judge(text) == RIGHT


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 19", WRONG), ("#### -18", WRONG), ("#### 1.8", WRONG), ("#### 180", WRONG), ("#### 18\n#### 19", WRONG),
        (r"#### 18 \boxed{19}", WRONG), ("#### 1,800", WRONG), ("#### 18/2", WRONG), ("18 #### 1", WRONG),
        # no number marked
        ("18", NOTHING), ("The answer is 18.", NOTHING), ("", NOTHING), ("####", NOTHING), ("### 18", NOTHING),
        ("#### eighteen", NOTHING), (r"\boxed{}", NOTHING), (r"\boxed{18", NOTHING), ("#### 18 ####", NOTHING),
        # several numbers: one of them is bound to be right
        ("#### 17 18 19", NOTHING), ("#### 17, 18, 19", NOTHING), ("#### 18 or 19", NOTHING), ("#### 18 18", NOTHING),
        ("#### 17-19", NOTHING), ("#### 9 * 2", NOTHING), ("#### 9 + 9 = 18", NOTHING), (r"\boxed{17, 18}", NOTHING),
        ("#### " + " ".join(map(str, range(100))), NOTHING), ("#### 1 8", NOTHING), ("#### 17/18/19", NOTHING),
        # not that number
        ("#### 18²", NOTHING), ("#### 18½", NOTHING), ("#### 18e0", NOTHING), ("#### 0x18", NOTHING),
        ("#### 18:00", NOTHING), ("#### 1,8", NOTHING), ("#### 1,8000", NOTHING), ("#### 18.0.0", NOTHING),
        ("#### 18/0", NOTHING),
        (r"\boxed{\frac18}", NOTHING), ("#### ١٨", NOTHING), ("#### 18!2", NOTHING), ("#### 18" + "0" * 9999, NOTHING),
        # right, and then it goes on
        ("#### 18\nBut maybe it is 19.", LOOSE), (r"\boxed{18} I think, or 19", LOOSE),
    ],
)  # fmt: skip
def test_what_is_not_the_right_number_earns_next_to_nothing(text: str, score: Score) -> None:
    assert judge(text) == score


def test_a_cut_off_answer_has_not_the_form() -> None:
    assert judge("#### 18", reason="length") == LOOSE
    assert judge("#### 19", reason="length") == NOTHING


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("#### 1,234", "#### 1234"), ("#### 1234", "#### $1,234.00"), ("#### 1234567", r"\boxed{1{,}234{,}567}"),
        ("#### 1234", r"\boxed{1\,234}"), ("#### -5", "#### -5"), ("#### -5", "#### -$5"), ("#### -5", "#### \u22125"),
        ("#### 0.75", "#### 3/4"), ("#### 3/4", r"\boxed{\frac{3}{4}}"), ("#### 0.5", "#### .50"), ("3.0", "#### 3"),
        ("#### 0", "#### 0.0"), ("#### 0", "#### -0"), ("#### 25%", "#### 25"), ("7", "#### 7"),
    ],
)  # fmt: skip
def test_equal_numbers_are_equal(answer: str, text: str) -> None:
    assert judge(text, answer) == RIGHT


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from(["{}", "${}", "{} apples", "{}.", " {}% "]))
def test_any_decimal_is_read_as_it_was_written(digits: int, places: int, frame: str) -> None:
    value = Fraction(digits, 10**places)
    text = f"{'-' * (digits < 0)}{abs(digits) // 10**places:,}"
    if places:
        text += f".{abs(digits) % 10**places:0{places}d}"
    assert number(frame.format(text)) == value
    assert marked_number(f"so\n#### {frame.format(text)}") == (value, True)
    assert marked_number(rf"so \boxed{{{frame.format(text)}}}") == (value, True)


@settings(deadline=None)
@given(st.text(max_size=80))
def test_nothing_breaks_it(text: str) -> None:
    for around in (text, f"#### {text}", rf"\boxed{{{text}", rf"\frac{{{text}}}{{{text}}}"):
        assert judge(around).value in (0.0, 0.1, 1.0)


@pytest.mark.parametrize("answer", ["", "#### many", "#### 1 or 2"])
def test_data_without_a_number_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="the data's answer"):
        judge("#### 18", answer)
