"""Grade-school mathematics (GSM8K, Cobbe et al. 2021, arXiv 2110.14168): the number after ``####`` is the answer.

Data with columns ``question`` and ``answer``, such as ``openai/gsm8k``; the answer column ends in ``#### NUMBER``.
One answer counts, the last that is marked by ``####`` or ``\\boxed{}``, and it has to be one number: who lists several
has given none. 18, 18.0, $18, 18%, 36/2 and 18 apples are the same number.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from rlhf import Completion, Score

FORMAT_REWARD = 0.1  # for a wrong number in the form asked for, so that there is something to climb
MAX_DIGITS = 40  # nobody's answer is longer, and to multiply out what is costs time

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(rf"(-?(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+))(?:\s*/\s*({_INTEGER}))?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX = (("{,}", ","), (r"\,", ""), (r"\!", ""), (r"\$", ""), ("$", ""), ("\N{MINUS SIGN}", "-"))


def reward(completion: Completion, answer: str) -> Score:
    """1 for the right number, else ``FORMAT_REWARD`` for one number that ends a finished answer, else 0.

    Raises ValueError where the data's own answer holds no number.
    """
    wanted = marked_number(answer)[0] if "####" in answer else number(answer)
    if wanted is None:
        raise ValueError(f"the data's answer {answer!r:.200} is no number, nor has it one after ####")
    given, is_last = marked_number(completion.text)
    tidy = given is not None and is_last and completion.finish_reason == "stop"
    right = given == wanted
    return Score(1.0 if right else FORMAT_REWARD * tidy, {"right": float(right), "format": float(tidy)})


def marked_number(text: str) -> tuple[Fraction | None, bool]:
    """The number that the last ``####`` or ``\\boxed{}`` marks, if it is one, and whether nothing comes after it."""
    hashes, box = text.rfind("####"), text.rfind(r"\boxed{")
    if max(hashes, box) < 0:
        return None, False
    if hashes > box:
        marked, _, rest = text[hashes + len("####") :].strip().partition("\n")
    else:
        start = box + len(r"\boxed{")
        end = _closing_brace(text, start)
        if end is None:
            return None, False
        marked, rest = text[start:end], text[end + 1 :]
    return number(marked), not rest.strip(" \n\t.*$\\])")


def number(text: str) -> Fraction | None:
    """The one number in a text, whatever currency or unit stands beside it; None where there is none, or several."""
    text = _FRACTION.sub(r"\1/\2", text)
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    found = _NUMBER.search(text)
    if found is None or r"\frac" in text or len(found[0]) > MAX_DIGITS:
        return None
    beside = text[: found.start()] + text[found.end() :]
    if any(unicodedata.category(character) in ("Nd", "No") for character in beside):  # 3 4, 3² and 3½ aren't 3
        return None
    top, bottom = (Fraction((part or "1").replace(",", "")) for part in found.groups())
    return top / bottom if bottom else None


def _closing_brace(text: str, start: int) -> int | None:
    """Index of the brace that closes the one before ``start``."""
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return None
