"""`lucid eval`: its own tasks against generation by hand, the harness on offline tasks, and what is refused at once."""

from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from lucid_attention import cli
from lucid_attention.evaluate import EvalError, evaluate, harness
from lucid_attention.evaluate.prose import parse_task
from lucid_attention.evaluate.run import table
from lucid_attention.hf import enable
from lucid_attention.results import FolderError
from lucid_attention.tasks import score
from lucid_attention.train.text import train_tokenizer

PROSE = (
    "It was late. Nobody came to the door. The rain had stopped at last! She closed the book. " * 20
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that says digits: an untrained one would end its answers at random tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    names = "The number of the red door is 1234567. Question: Which numbers belong to? Answer: The VAR A = 5."
    tokenizer = train_tokenizer([PROSE + names], 330)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
                         num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    model = enable(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks_read_once() -> Iterator[None]:
    """The harness reads 13,000 files for its list of tasks, whenever it is asked: here once; everyone gets a copy."""
    from lm_eval.tasks._index import TaskIndex

    real, kept = TaskIndex.build, dict[tuple[Any, ...], bytes]()

    def build(paths: Any, **options: Any) -> Any:
        asked = (*paths, *sorted(options.items()))
        if asked not in kept:
            kept[asked] = pickle.dumps(real(paths, **options))
        return pickle.loads(kept[asked])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build))
        yield


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def run(checkpoint: str, tasks: list[str], **changes: Any) -> Any:
    return evaluate(checkpoint, tasks, say=lambda line: None, quiet=True, **changes)


def test_own_tasks(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    tasks = ["needles", "needles:keys=3:queries=2", "tracking:hops=1"]
    found = run(checkpoint, tasks, lengths=[500, 300], limit=3, batch_size=2, prose=prose, out=tmp_path / "out")  # fmt: skip
    assert [(r["task"], r["length"]) for r in found.rows] == [(t, n) for t in tasks for n in (300, 500)]  # fmt: skip
    assert {p.name for p in found.folder.iterdir()} == {"results.json", "results.csv", "results.md", "samples.jsonl", "accuracy.png"}  # fmt: skip
    saved = [json.loads(line) for line in (found.folder / "samples.jsonl").read_text().splitlines()]
    assert len(saved) == 18
    for row in found.rows:
        scores = [s["score"] for s in saved if (s["task"], s["length"]) == (row["task"], row["length"])]  # fmt: skip
        assert row["value"] == pytest.approx(sum(scores) / 3) and row["samples"] == 3
    rows = list(csv.DictReader((found.folder / "results.csv").open()))
    assert rows[0]["task"] == "needles" and rows[0]["version"] == "2"
    facts = json.loads((found.folder / "results.json").read_text())
    assert facts["seed"] == 1 and facts["torch"] == torch.__version__ and len(facts["rows"]) == 6


def test_samples_are_what_the_model_says(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    """One by one by hand, against batches with padding."""
    found = run(checkpoint, ["needles"], lengths=[200], limit=4, batch_size=3, prose=prose, out=tmp_path / "out")  # fmt: skip
    saved = [json.loads(line) for line in (found.folder / "samples.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    task = parse_task("needles")
    assert task is not None
    for record, sample in zip(saved, task.samples(PROSE, tokenizer, 200, 4, 1), strict=True):
        ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        assert 120 < ids.shape[1] + task.new_tokens <= 200
        said = model.generate(ids, max_new_tokens=task.new_tokens, do_sample=False)[0, ids.shape[1] :]  # fmt: skip
        assert record["said"] == tokenizer.decode(said, skip_special_tokens=True)
        assert record["answers"] == list(sample.answers)
        assert record["score"] == score(sample, record["said"])


def test_samples_depend_on_nothing_else() -> None:
    tokenizer = train_tokenizer([PROSE], 300)
    task = parse_task("needles:keys=2")
    assert task is not None and task.options == {"keys": 2}
    many = list(task.samples(PROSE, tokenizer, 400, 5, 1))
    few = list(task.samples(PROSE, tokenizer, 400, 2, 1))
    assert many[:2] == few and len({s.prompt for s in many}) == 5
    assert next(iter(task.samples(PROSE, tokenizer, 400, 1, 2))) != few[0]


def test_answers_have_room() -> None:
    for name, answers in (("needles", 1), ("needles:keys=4:values=2:queries=3", 6), ("tracking", 5), ("tracking:hops=1", 2)):  # fmt: skip
        task = parse_task(name)
        assert task is not None and task.answers == answers and task.new_tokens >= 12 * answers
    assert parse_task("niah_single_1") is None


@pytest.mark.usefixtures("tasks_read_once")
@pytest.mark.parametrize(
    ("tasks", "changes", "message"),
    [
        (["needles:colour=3"], {}, "--tasks: needles:colour=3: expected needles, or dials such as needles:keys=4"),
        (["tracking:hops=x"], {}, "got 'hops=x'"),
        ([], {}, "--tasks: expected at least one"),
        (["needles"], {"limit": 0}, "--limit: expected 1 or more"),
        (["needles"], {"batch_size": 0}, "--batch-size: expected 1 or more"),
        (["needles"], {"lengths": []}, "--lengths: expected numbers of tokens"),
        (["needles"], {"lengths": [20]}, "length must"),
        (["needles:queries=5"], {}, "queries must be at most keys"),
        (["needles"], {"prose": Path("nowhere.txt")}, "--prose nowhere.txt: No such file"),
        (["nonsense_task"], {}, "nonsense_task: is no task of lm-evaluation-harness"),
        (["niah_single_1"], {"lengths": [512, 4096]}, "niah_single_1: expected lengths of at least 2048, got 512"),
    ],
)  # fmt: skip
def test_bad_input(checkpoint: str, tmp_path: Path, tasks: list[str], changes: dict[str, Any], message: str) -> None:  # fmt: skip
    with pytest.raises(EvalError, match=message):
        run(checkpoint, tasks, out=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tasks_read_once")
def test_a_network_is_asked_for_at_once(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(harness, "_reaches_the_hub", lambda: False)
    with pytest.raises(EvalError, match=r"ruler: needs data from the Hugging Face hub, .* niah_single_1"):  # fmt: skip
        run(checkpoint, ["ruler", "niah_single_1"], lengths=[4096])
    harness.check_tasks(["niah_single_1", "ruler_fwe"], [4096])


def test_nothing_is_overwritten(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FolderError, match="is not empty"):
        run(checkpoint, ["needles"], out=tmp_path)


def test_lengths_are_run_one_by_one() -> None:
    """The harness would take its first samples of all lengths together, which are the shortest's."""
    assert harness.calls_of(["ruler_vt", "boolq", "niah_single_1"], [2048, 4096]) == [
        (["ruler_vt", "niah_single_1"], [2048]), (["ruler_vt", "niah_single_1"], [4096]), (["boolq"], [2048, 4096]),
    ]  # fmt: skip
    assert harness.calls_of(["boolq"], [100]) == [(["boolq"], [100])]


def test_a_mirror_counts_as_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    server = http.server.HTTPServer(("localhost", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://localhost:{server.server_port}")
    monkeypatch.setenv("no_proxy", "localhost")
    assert harness._reaches_the_hub()
    server.shutdown()
    server.server_close()
    assert not harness._reaches_the_hub()


def test_models_of_so_many_positions(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config

    folder = tmp_path / "gpt"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=150, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(EvalError, match="does not go beyond its 150 positions, and 400 were asked for"):  # fmt: skip
        run(str(folder), ["needles"], lengths=[400], limit=1, prose=prose, out=tmp_path / "out")


def test_rows_of_the_harness() -> None:
    """Lengths are names of metrics there, and lengths that were not run are -1."""
    found = {
        "results": {
            "niah_single_1": {"alias": "n", "2048,none": 0.5, "2048_stderr,none": "N/A", "4096,none": -1},
            "boolq": {"acc,none": 0.25, "acc_stderr,none": 0.01, "sample_len": 4},
        },
        "versions": {"niah_single_1": 1.0, "boolq": 2.0},
        "n-samples": {"boolq": {"original": 9, "effective": 4}},
    }  # fmt: skip
    rows = harness.rows_of(found, [2048])
    assert [(r["task"], r["length"], r["metric"], r["value"]) for r in rows] == [
        ("niah_single_1", 2048, "accuracy", 0.5), ("boolq", None, "acc", 0.25),
    ]  # fmt: skip
    assert math.isnan(rows[0]["stderr"]) and rows[1]["stderr"] == 0.01 and rows[1]["samples"] == 4
    text = table(rows)
    assert "| niah_single_1 | 50.0 |" in text and "| boolq | acc | 0.25 | 0.01 |" in text


@pytest.mark.usefixtures("tasks_read_once")
def test_the_harness_runs_offline(checkpoint: str, tmp_path: Path) -> None:
    """Through the command, as a user would: one of RULER's tasks beside one of ours."""
    out = tmp_path / "out"
    arguments = ["eval", checkpoint, "--tasks", "niah_single_1,needles", "--lengths", "2048,2304", "--limit", "1", "--out", str(out)]  # fmt: skip
    result = CliRunner().invoke(cli.build_app(), arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads((out / "results.json").read_text())["rows"]
    tasks = ("needles", "niah_single_1")
    assert [(r["task"], r["length"]) for r in rows] == [(t, n) for t in tasks for n in (2048, 2304)]
    own = json.loads((out / "lm_eval.json").read_text())
    assert own[0]["results"]["niah_single_1"]["2048,none"] == rows[2]["value"]
    assert own[1]["results"]["niah_single_1"]["2304,none"] == rows[3]["value"]
    assert own[0]["config"]["limit"] == 1 and (out / "accuracy.png").exists()
    bad = CliRunner().invoke(cli.build_app(), ["eval", checkpoint, "--lengths", "x"])
    assert bad.exit_code == 2 and "expected numbers such as 1024,4096" in bad.output
