"""Texts, tokens, rows and tasks: what they hold, and that what cannot be used is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lucid_attention.tasks.novel import packaged_novel
from lucid_attention.train.configuration import TrainConfig, TrainError
from lucid_attention.train.tasks import MemoryRows, NeedleRows
from lucid_attention.train.text import documents_of, load_tokenizer, train_tokenizer
from lucid_attention.train.tokens import Rows, Shuffled, Tokens, write_tokens


def documents(source: Path | str) -> list[str]:
    return list(documents_of(TrainConfig(text=str(source))))


def test_files_folders_patterns_and_lines(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b" / "c.md").write_text("\ufeffsecond", encoding="utf-8")
    (tmp_path / "b" / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    assert documents(tmp_path) == ["first", "second"]
    assert documents(tmp_path / "a.txt") == ["first"]
    assert documents(f"{tmp_path}/**/*.md") == ["second"]
    lines = tmp_path / "rows.jsonl"
    lines.write_text(
        json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "id": 3}) + "\n"
    )
    assert documents(lines) == ["one", "two"]
    lines.write_bytes(b'\xef\xbb\xbf{"text": "a \\ud800 b"}\n')
    assert documents(lines) == ["a ? b"]


def test_the_novel_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless there is a file of that name."""
    monkeypatch.chdir(tmp_path)
    assert documents("novel") == [packaged_novel()]
    (tmp_path / "novel").write_text("mine")
    assert documents("novel") == ["mine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder; expected a text file.* or novel"),
        ("latin.txt", "café".encode("latin-1"), "is not UTF-8 text .*iconv"),
        ("zeros.txt", b"a\0b", "is binary"),
        ("rows.jsonl", b'{"text": 3}\n', "line 1: expected a JSON object"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: expected a JSON object"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', "is not UTF-8"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:  # fmt: skip
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainError, match=message):
        documents(tmp_path / name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no files there"):
        documents(tmp_path)
    with pytest.raises(TrainError, match="no files there"):
        documents(f"{tmp_path}/*.txt")


def test_a_dataset_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = TrainConfig(dataset="allenai/c4:en")
    with pytest.raises(TrainError, match=r"dataset allenai/c4:en: .*HF_HUB_OFFLINE"):
        list(documents_of(wanted))
    monkeypatch.setattr("lucid_attention.train.text.find_spec", lambda name: None)
    with pytest.raises(TrainError, match=r"dataset allenai/c4:en: needs the datasets library"):
        list(documents_of(wanted))


def test_a_dataset_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    rows = [{"text": "one"}, {"text": " "}, {"text": "two"}]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(documents_of(TrainConfig(dataset=str(tmp_path / "data")))) == ["one", "two"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"words": "one"}')
    with pytest.raises(TrainError, match='expected a column "text", got words'):
        list(documents_of(TrainConfig(dataset=str(tmp_path / "other"))))


def test_tokenizers(tmp_path: Path) -> None:
    text = "the cat sat on the mat, naïvely\n" * 50
    trained = train_tokenizer([text], 300)
    assert trained.decode(trained(text)["input_ids"]) == text
    assert trained.eos_token_id is not None
    trained.save_pretrained(tmp_path / "t")
    loaded = load_tokenizer(TrainConfig(text="x", tokenizer=str(tmp_path / "t")))
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    with pytest.raises(TrainError, match=r"tokenizer .*none: cannot be loaded"):
        load_tokenizer(TrainConfig(text="x", tokenizer=str(tmp_path / "none")))
    trained.eos_token = None
    trained.save_pretrained(tmp_path / "endless")
    with pytest.raises(TrainError, match="has no end-of-text token"):
        load_tokenizer(TrainConfig(text="x", tokenizer=str(tmp_path / "endless")))


def test_the_tokenizer_does_not_see_what_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abab " * 2000 + "zqzq " * 300)
    seen = load_tokenizer(TrainConfig(text=str(path), vocabulary=270, validation_share=0.2))
    assert "zq" not in seen.get_vocab() and "ab" in seen.get_vocab()


def test_tokens_on_disk(tmp_path: Path) -> None:
    texts = ["the cat", "", "a <|endoftext|> mat"]
    tokenizer = train_tokenizer(texts, 300)
    tokens = write_tokens(texts, tokenizer, tmp_path, quiet=True)
    end = tokenizer.eos_token_id
    plain = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    expected = [i for ids in plain for i in [*ids, end]]
    assert expected.count(end) == 3  # what looks like the end is none
    assert tokens.ids.tolist() == expected and tokens.ids.dtype == np.uint16
    assert [expected[s - 1] for s in tokens.starts[1:]] == [end, end]
    again = Tokens.load(tmp_path)
    assert again.ids.tolist() == expected and again.starts.tolist() == tokens.starts.tolist()
    with pytest.raises(TrainError, match="is empty"):
        write_tokens([], tokenizer, tmp_path / "none", quiet=True)


def test_rows_by_hand() -> None:
    # Documents of 3, 1, 6 and 2 tokens in rows of 5: the third is cut by the row's end.
    tokens = Tokens(np.arange(12, dtype=np.uint16), np.array([0, 3, 4, 10]))
    rows = Rows(tokens, 5, document_masks=True)
    assert len(rows) == 2
    assert rows[0]["input_ids"].tolist() == [0, 1, 2, 3, 4]
    assert rows[0]["position_ids"].tolist() == [0, 1, 2, 0, 0]
    assert rows[0]["labels"].tolist() == [-100, 1, 2, -100, -100]
    assert rows[1]["position_ids"].tolist() == [0, 1, 2, 3, 4]
    assert rows[1]["labels"].tolist() == [-100, 6, 7, 8, 9]
    plain = Rows(tokens, 5, document_masks=False)[1]
    assert plain.keys() == {"input_ids", "labels"} and plain["labels"].tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(IndexError):
        rows[2]


def test_a_part_cuts_documents() -> None:
    tokens = Tokens(np.arange(12, dtype=np.uint16), np.array([0, 3, 4, 10]))
    part = tokens.part(2, 11)
    assert part.ids.tolist() == list(range(2, 11)) and part.starts.tolist() == [0, 1, 2, 8]
    assert tokens.part(12, 12).ids.tolist() == []


def test_an_order_for_every_epoch() -> None:
    rows = Rows(Tokens(np.arange(40, dtype=np.uint16), np.array([0])), 4, document_masks=False)
    shuffled, again, other = (Shuffled(rows, seed) for seed in (1, 1, 3))
    first = [int(shuffled[i]["input_ids"][0]) // 4 for i in range(30)]
    assert all(sorted(first[k : k + 10]) == list(range(10)) for k in (0, 10, 20))
    assert first[:10] != first[10:20] != first[20:]
    assert first[25] == int(again[25]["input_ids"][0]) // 4  # whatever was read before
    assert first[:10] != [int(other[i]["input_ids"][0]) // 4 for i in range(10)]


def test_memory_rows_are_solved_by_a_dictionary() -> None:
    options = {"keys": 5, "values": 7, "query_share": 0.4}
    rows = MemoryRows(options, 200, seed=3)
    assert rows.vocabulary == 13
    asked = 0
    for index in (0, 1, 99):
        row = rows[index]
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        memory: dict[int, int] = {}
        for place in range(0, 200, 2):
            key, value, label = ids[place], ids[place + 1], labels[place + 1]
            assert 0 <= key < 5 <= value < 13 and labels[place] == -100
            if label != -100:
                asked += 1
                assert label == value == memory[key]
            if value != 12:  # the blank answers a key that was never written
                memory[key] = value
    assert 60 < asked < 150


def test_memory_rows_repeat_and_differ() -> None:
    # 1 and 3 are one seed to a generator that keeps 32 bits of seed * 2^31.
    rows, other = MemoryRows(None, 64, seed=1), MemoryRows(None, 64, seed=3)
    held_out = MemoryRows(None, 64, seed=1, validation=True)
    assert torch.equal(rows[7]["input_ids"], MemoryRows(None, 64, seed=1)[7]["input_ids"])
    seen = {tuple(x["input_ids"].tolist()) for x in (rows[0], rows[1], other[0], held_out[0])}
    assert len(seen) == 4
    assert len(MemoryRows(None, 33, seed=0)[0]["input_ids"]) == 33


@pytest.mark.parametrize(
    ("options", "message"),
    [({"colour": 1}, "expected keys, values, query_share, got colour"), ({"keys": 0}, "keys must be at least 1"), ({"keys": 1.5}, "keys must be an int")],
)  # fmt: skip
def test_bad_task_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(TrainError, match=r"task_options: .*" + re.escape(message)):
        MemoryRows(options, 10, seed=0)


PROSE = " ".join(f"Sentence number {i} says nothing of interest." for i in range(400))


def test_needle_rows(tmp_path: Path) -> None:
    """The label is the answer, which a reader finds in the row; held-out rows are of other prose."""
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    tokenizer = train_tokenizer([PROSE + "Question: Which number belongs to the red door? 1234567890,."], 320)  # fmt: skip
    options = {"keys": 4, "queries": 2, "prose": str(path)}
    rows = NeedleRows(options, 700, tokenizer, seed=3)
    counts = set()
    for index in range(8):
        row = rows[index]
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        asked = re.findall(r"the (\w+ \w+)", text.split("Question: ")[1].split("?")[0])
        expected = [re.search(rf"of the {name} is (\d+)", text).group(1) for name in asked]  # type: ignore[union-attr]
        labels = row["labels"][row["labels"] != -100]
        said = tokenizer.decode(labels)
        assert said == f" {', '.join(expected)}.{tokenizer.eos_token}"
        known = (row["labels"] != -100).nonzero().flatten()
        assert torch.equal(row["input_ids"][known], labels) and len(row["input_ids"]) == 700
        assert (row["input_ids"][known[-1] :] == tokenizer.eos_token_id).all()
        assert 700 - int(known[-1]) < 60  # the text is as long as fits
        counts.add(len(asked))
    assert counts == {1, 2}
    held_out = NeedleRows(options, 700, tokenizer, seed=3, validation=True)[0]
    numbers = {int(n) for n in re.findall(r"Sentence number (\d+)", tokenizer.decode(held_out["input_ids"]))}  # fmt: skip
    assert min(numbers) >= 320
    assert torch.equal(rows[5]["input_ids"], NeedleRows(options, 700, tokenizer, seed=3)[5]["input_ids"])  # fmt: skip
    fixed = NeedleRows({**options, "vary": False}, 700, tokenizer, seed=3)[0]
    assert tokenizer.decode(fixed["input_ids"]).count("The number of the") == 4


@pytest.mark.parametrize(
    ("options", "length", "message"),
    [
        ({"colour": 1}, 500, "expected keys, values, queries, vary, prose, got colour"),
        ({"queries": 3, "vary": False}, 500, "queries must be at most keys"),
        ({}, 20, "length must"),
        ({"prose": "nowhere.txt"}, 500, "prose nowhere.txt: cannot be read"),
    ],
)
def test_bad_needle_options(options: dict[str, Any], length: int, message: str) -> None:
    tokenizer = train_tokenizer([PROSE], 300)
    with pytest.raises(TrainError, match="task_options: .*" + re.escape(message)):
        NeedleRows(options, length, tokenizer, seed=0)
