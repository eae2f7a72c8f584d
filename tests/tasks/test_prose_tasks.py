"""Needles and variable tracking: solved by reading, exact about what is where, as long as asked for, repeatable."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lucid_attention.tasks import Sample, needles_in_prose, score, variable_tracking
from lucid_attention.tasks.novel import packaged_novel
from lucid_attention.tasks.prose import sentences_of

NOVEL = packaged_novel()[2000:60_000]
SHORT = 'It was late. "Who is there?" Nobody came! The rain had stopped.'


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def read_needles(prompt: str) -> str:
    """Solves the needle task from the prompt alone."""
    body, question = prompt.split("\n\nQuestion: ")
    asked = re.findall(r"the (\w+ \w+)", question.split("?")[0])
    return " ".join(
        number
        for name in asked
        for number in re.findall(rf"The number of the {name} is (\d+)\.", body)
    )


def read_tracking(prompt: str) -> str:
    """Solves variable tracking from the prompt alone."""
    body, question = prompt.split("\n\nQuestion: ")
    (number,) = re.findall(r"\d{5}", question)
    held: dict[str, str] = {}
    for name, given in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?([A-Z]{3}|\d{5})\.", body):
        held[name] = given if given.isdigit() else held[given]
    return " ".join(name for name, value in held.items() if value == number)


@pytest.mark.parametrize("length", [120, 1000, 5000])
@pytest.mark.parametrize(("keys", "values", "queries"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (4, 2, 3)])  # fmt: skip
def test_needles_are_found_by_reading(length: int, keys: int, values: int, queries: int) -> None:
    sample = needles_in_prose(NOVEL, length, keys=keys, values=values, queries=queries, generator=seeded())  # fmt: skip
    assert len(sample.needles) == keys * values and len(sample.answers) == queries * values
    assert len(set(sample.answers)) == len(sample.answers)
    assert score(sample, read_needles(sample.prompt)) == 1.0
    for needle in sample.needles:
        assert sample.prompt[needle.start : needle.end] == f"The number of the {needle.key} is {needle.value}."  # fmt: skip
    assert [n.start for n in sample.needles] == sorted(n.start for n in sample.needles)
    assert length - 120 < len(sample.prompt.split()) <= length
    assert sum(a in sample.prompt for a in sample.answers) == len(sample.answers)


@pytest.mark.parametrize("length", [150, 3000])
@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 0)])
def test_tracking_is_solved_by_reading(length: int, chains: int, hops: int) -> None:
    sample = variable_tracking(NOVEL, length, chains=chains, hops=hops, generator=seeded(3))
    assert len(sample.answers) == hops + 1 and len(sample.needles) == chains * (hops + 1)
    assert score(sample, read_tracking(sample.prompt)) == 1.0
    assert set(read_tracking(sample.prompt).split()) == set(sample.answers)
    assert length - 120 < len(sample.prompt.split()) <= length


def test_depths_cover_the_text() -> None:
    depths = [needles_in_prose(NOVEL, 800, generator=seeded(s)).needles[0].depth for s in range(60)]
    assert min(depths) < 0.1 and max(depths) > 0.9
    assert abs(sum(depths) / 60 - 0.5) < 0.1


def test_seeds_repeat_and_differ() -> None:
    draws = [needles_in_prose(NOVEL, 300, keys=2, generator=seeded(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    # Pinned: the same seed must give the same data in every version of the task.
    pinned = needles_in_prose(SHORT, 40, keys=2, generator=seeded(5))
    assert pinned.prompt == PINNED


PINNED = (
    "The number of the rusty fiddle is 6754065. The number of the emerald ladder is 4680378. The rain had stopped. It was late.\n"
    "\n"
    "Question: Which number belongs to the emerald ladder?\n"
    "Answer: The number of the emerald ladder is"
)


def test_the_length_may_be_in_tokens_and_a_short_text_is_gone_through_again() -> None:
    sample = needles_in_prose(SHORT, 2000, count=len, generator=seeded())
    assert 1900 < len(sample.prompt) <= 2000 and sample.prompt.count("It was late.") > 10


def test_sentences() -> None:
    assert sentences_of(SHORT) == ("It was late.", '"Who is there?"', "Nobody came!", "The rain had stopped.")  # fmt: skip
    assert sentences_of("no end\nof it") == ("no end of it",)


def test_scores() -> None:
    sample = Sample("", ("1234567", "7654321"), ())
    assert score(sample, "1,234,567 and 7654321.") == 1.0
    assert score(sample, "12345678, 7654321") == 0.5
    assert score(sample, "") == 0.0


@pytest.mark.parametrize("task", [needles_in_prose, variable_tracking])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"length": 0}, ValueError, "length must be at least 1"),
        ({"length": 5}, ValueError, r"length must hold the sentences .* question, \d+, got 5"),
        ({"length": 1.5}, TypeError, "length must be an int"),
        ({"generator": None}, TypeError, "generator must be a torch.Generator"),
        ({"prose": "  "}, ValueError, "prose must have at least one sentence"),
    ],
)
def test_bad_arguments(task: Any, changes: dict[str, Any], error: type[Exception], message: str) -> None:  # fmt: skip
    with pytest.raises(error, match=message):
        task(**{"prose": SHORT, "length": 100, "generator": seeded(), **changes})


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (needles_in_prose, {"queries": 2}, "queries must be at most keys"),
        (needles_in_prose, {"keys": 3000}, "keys must be at most 2304, got 3000"),
        (needles_in_prose, {"values": 0}, "values must be at least 1"),
        (variable_tracking, {"hops": -1}, "hops must be at least 0"),
        (variable_tracking, {"chains": 20000}, "chains .* must be at most 17576"),
    ],
)  # fmt: skip
def test_bad_dials(task: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(SHORT, 100, generator=seeded(), **changes)


@pytest.mark.parametrize(
    ("answers", "said", "share"),
    [
        (("1296130", "2345678"), " 1296130,2345678.", 1.0),
        (("1296130", "2345678"), "1,296,130 and 2,345,678", 1.0),
        (("ABC", "DEF"), " ABC,DEF,GHI", 1.0),
        (("ABC", "DEF"), " VAR ABC,VAR DEF", 1.0),
        (("ABC",), " abc", 1.0),
        (("ABC",), "ABCD", 0.0),
        (("1234567",), "12345678", 0.0),
        (("1234567",), "123456", 0.0),
        (("12", "34"), "12,34", 1.0),
        (("1234567",), "1234,567", 1.0),
    ],
)
def test_answers_are_words(answers: tuple[str, ...], said: str, share: float) -> None:
    assert score(Sample("", answers, ()), said) == share


def test_what_has_no_sentences_is_cut_at_words() -> None:
    code = "\n".join(f"def f{i}(x): return x + {i}" for i in range(300))
    pieces = sentences_of(code)
    assert " ".join(pieces) == " ".join(code.split()) and max(map(len, pieces)) <= 150
    assert "".join(sentences_of("a" * 5001)) == "a" * 5001
    assert sentences_of("他来了。天晚了！雨停了？ 好。") == (
        "他来了。",
        "天晚了！",
        "雨停了？",
        "好。",
    )
    assert sentences_of("他说：“来了。”他走了。") == ("他说：“来了。”", "他走了。")
    assert max(map(len, sentences_of(packaged_novel()))) > 1000  # real sentences stay whole
