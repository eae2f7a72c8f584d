"""`lucid eval`: its own tasks against generation by hand, the harness on offline tasks, and what is refused at once."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import pickle
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from typer.testing import CliRunner

from lucid_attention import cli
from lucid_attention.evaluate import EvalError, evaluate, harness
from lucid_attention.evaluate.harness import Call
from lucid_attention.evaluate.prose import parse_task
from lucid_attention.evaluate.run import table
from lucid_attention.hf import enable
from lucid_attention.results import FolderError
from lucid_attention.tasks import score
from lucid_attention.tasks.novel import packaged_novel
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
    # How it was made: another strength or prose is another result.
    assert facts["lengths"] == [300, 500] and facts["limit"] == 3 and facts["batch_size"] == 2
    assert facts["prose"] == str(prose) and facts["prose_sha256"] == hashlib.sha256(PROSE.encode()).hexdigest()  # fmt: skip
    assert facts["strength"] is None and "LUCID in 2 of 2 layers, float32" in facts["model"]
    assert facts["finished"] is True


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
        assert record["prompt_tokens"] == ids.shape[1]
        assert (
            sample.prompt.endswith(record["end_of_prompt"])
            and "Question:" in record["end_of_prompt"]
        )
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
        (["needles:keys=²"], {}, "got 'keys=²'"),
        (["neddles"], {}, "did you mean needles"),
        (["babilong_qa1"], {"lengths": [1024, 3000]}, "babilong: expected lengths among 1024, 2048, .*, got 3000"),
        ([], {}, "--tasks: expected at least one"),
        (["needles"], {"limit": 0}, "--limit: expected 1 or more"),
        (["needles"], {"batch_size": 0}, "--batch-size: expected 1 or more"),
        (["needles"], {"lengths": []}, "--lengths: expected numbers of tokens"),
        (["needles"], {"lengths": [20]}, "sample 0 of needles does not fit 20 tokens, of which 20 are for the answer: length must"),
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


def saved_samples(found: Any) -> list[dict[str, Any]]:
    lines = (found.folder / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_a_checkpoint_says_of_drawing_does_not_matter(
    checkpoint: str, prose: Path, tmp_path: Path
) -> None:
    """A penalty on repetitions is one on copying what is asked for."""
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    settings = json.loads((changed / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "num_beams": 2, "do_sample": True}  # fmt: skip
    (changed / "generation_config.json").write_text(json.dumps(settings))
    said = [
        [s["said"] for s in saved_samples(run(c, ["needles"], lengths=[200], limit=3, prose=prose, out=tmp_path / f"out{i}"))]
        for i, c in enumerate((checkpoint, str(changed)))
    ]  # fmt: skip
    assert said[0] == said[1] and any(said[0])


def test_a_tokenizer_that_ends_its_texts(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    """The model goes on from the prompt, not from an end of text after it."""
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    tokenizer = AutoTokenizer.from_pretrained(changed)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])  # fmt: skip
    tokenizer.save_pretrained(changed)
    assert AutoTokenizer.from_pretrained(changed)("door")["input_ids"][-1] == end[1]
    plain, ended = (
        saved_samples(run(c, ["needles"], lengths=[n], limit=2, prose=prose, out=tmp_path / f"out{n}"))
        for c, n in ((checkpoint, 200), (str(changed), 201))
    )  # fmt: skip
    assert all(e["prompt_tokens"] <= 200 for e in ended)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    plain_tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    task = parse_task("needles")
    assert task is not None and len(plain) == 2
    for record, sample in zip(ended, task.samples(PROSE, AutoTokenizer.from_pretrained(changed), 201, 2, 1), strict=True):  # fmt: skip
        ids = plain_tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        said = model.generate(ids, max_new_tokens=task.new_tokens, do_sample=False)[0, ids.shape[1] :]  # fmt: skip
        assert record["said"] == plain_tokenizer.decode(said, skip_special_tokens=True)


def test_a_tokenizer_without_padding_or_end(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (changed / name).exists():
            kept = json.loads((changed / name).read_text())
            kept = {k: v for k, v in kept.items() if k not in ("pad_token", "eos_token")}
            (changed / name).write_text(json.dumps(kept))
    assert AutoTokenizer.from_pretrained(changed).pad_token_id is None
    one, three = (
        saved_samples(run(str(changed), ["needles"], lengths=[200], limit=3, batch_size=n, prose=prose, out=tmp_path / f"out{n}"))
        for n in (1, 3)
    )  # fmt: skip
    assert one == three


def test_one_sample_has_no_spread(checkpoint: str, prose: Path, tmp_path: Path) -> None:
    found = run(checkpoint, ["needles"], lengths=[200], limit=1, prose=prose, out=tmp_path / "out")
    assert math.isnan(found.rows[0]["stderr"])
    assert json.loads((found.folder / "results.json").read_text())["rows"][0]["stderr"] is None
    assert "±" not in (found.folder / "results.md").read_text()


def test_names_with_spaces_and_twice(
    checkpoint: str, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint under ~, which a shell does not expand in quotes or in Python."""
    monkeypatch.setenv("HOME", str(Path(checkpoint).parent))
    tasks = ["needles", " tracking:hops=1", "needles "]
    found = run(f"~/{Path(checkpoint).name}", tasks, lengths=[200], limit=1, prose=prose, out=tmp_path / "out")  # fmt: skip
    assert [row["task"] for row in found.rows] == ["needles", "tracking:hops=1"]
    facts = json.loads((found.folder / "results.json").read_text())
    assert facts["checkpoint"] == checkpoint


def test_every_sample_of_the_shortest_length_is_made_first(
    checkpoint: str, prose: Path, tmp_path: Path
) -> None:
    """Names differ in length: one sample may fit where a later one does not."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    task = parse_task("needles")
    assert task is not None

    def fits(length: int, number: int) -> bool:
        try:
            return bool(list(task.samples(PROSE, tokenizer, length, number, 1)))
        except ValueError:
            return False

    length = next(n for n in range(40, 200) if fits(n, 1) and not fits(n, 50))
    with pytest.raises(EvalError, match=rf"sample \d+ of needles does not fit {length} tokens, of which {task.new_tokens} are"):  # fmt: skip
        run(checkpoint, ["needles"], lengths=[length], limit=50, prose=prose, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "prose",
    ["他来到了那扇门前。天已经很晚了。雨停了！", "value = compute(value, 3)\n", "and then "],
)
def test_prompts_are_full_whatever_the_prose(prose: str) -> None:
    """Without spaces after sentences, without sentences: as long as asked for."""
    tokenizer = train_tokenizer([PROSE + prose * 50], 330)
    task = parse_task("needles")
    assert task is not None
    for length in (500, 2000):
        (sample,) = task.samples(prose * 500, tokenizer, length, 1, 1)
        size = len(tokenizer(sample.prompt)["input_ids"])
        assert length - task.new_tokens - 120 < size <= length - task.new_tokens


def test_prompts_that_are_not_full_are_said(checkpoint: str, tmp_path: Path) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(("word " * 300 + "end. ") * 5)
    lines: list[str] = []
    evaluate(checkpoint, ["needles"], lengths=[400], limit=2, prose=path, out=tmp_path / "out", say=lines.append, quiet=True)  # fmt: skip
    assert any("its prompts have" in line for line in lines)


@pytest.mark.usefixtures("tasks_read_once")
def test_a_small_vocabulary_would_search_for_ever(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"ruler_vt: the harness's shortest example has up to .* tokens"):  # fmt: skip
        run(checkpoint, ["ruler_vt"], lengths=[4096], limit=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    state = random.getstate()
    harness.check_tokenizer(["ruler_vt"], train_tokenizer([packaged_novel()], 4096))
    assert random.getstate() == state


@pytest.mark.slow
@pytest.mark.usefixtures("tasks_read_once")
def test_the_same_seed_asks_the_same(checkpoint: str) -> None:
    """The twins are asked the same: the harness's generator of words would go on where the last call left it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompts: list[list[str]] = []
    for seed in (1, 1, 2):
        seen: list[str] = []
        prompts.append(seen)
        with model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(tokenizer.decode(kwargs["input_ids"][0])),
            with_kwargs=True,
        ):  # fmt: skip
            (call,) = harness.calls_of(["ruler_cwe"], [2048])
            harness.run_harness(model, tokenizer, checkpoint, call, limit=1, batch_size=1, seed=seed)  # fmt: skip
    assert prompts[0][0] == prompts[1][0] != prompts[2][0]


@pytest.mark.slow
@pytest.mark.usefixtures("tasks_read_once")
def test_prompts_keep_their_beginning(checkpoint: str, tmp_path: Path) -> None:
    """ruler_fwe's may fill the length and leave no room for the answer; with this tokenizer some do."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = train_tokenizer([packaged_novel()[:200_000]], 330)
    tokenizer.save_pretrained(tmp_path)
    seen: list[str] = []
    with model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tokenizer.decode(kwargs["input_ids"][0])), with_kwargs=True
    ):  # fmt: skip
        (call,) = harness.calls_of(["ruler_fwe"], [2048])
        harness.run_harness(model, tokenizer, str(tmp_path), call, limit=12, batch_size=1, seed=1)
    prompts = [text for text in seen if len(text) > 200]
    assert len(prompts) == 12
    assert all(text.lstrip().startswith("Read the following coded text") for text in prompts)


def test_nothing_is_overwritten(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FolderError, match="is not empty"):
        run(checkpoint, ["needles"], out=tmp_path)


def test_lengths_are_run_one_by_one() -> None:
    """The harness would take its first samples of all lengths together, which are the shortest's."""
    long = [
        Call([task], [n], None, {"max_seq_lengths": [n]})
        for task in ("ruler_vt", "niah_single_1")
        for n in (2048, 4096)
    ]
    rest = Call(["boolq", "babilong"], [], None, {})
    calls = harness.calls_of(["ruler_vt", "boolq", "niah_single_1", "babilong"], [2048, 4096])
    assert calls == [*long, rest]
    # Its lengths are names of configurations, one at a time.
    assert harness.calls_of(["babilong_qa1"], [1024, 131072]) == [
        Call(["babilong_qa1"], [], 1024, {"max_seq_lengths": "1k"}),
        Call(["babilong_qa1"], [], 131072, {"max_seq_lengths": "128k"}),
    ]


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


@pytest.mark.usefixtures("tasks_read_once")
def test_packages_of_tasks_are_looked_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "LONGBENCH", ("rouge_of_nobody",))
    with pytest.raises(ValueError, match=r"longbench: needs rouge_of_nobody; pip install 'lm_eval\[longbench\]'"):  # fmt: skip
        harness.check_tasks(["longbench"], [1024])


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
    rows = harness.rows_of(found, Call(["niah_single_1", "boolq"], [2048], None, {}))
    assert [(r["task"], r["length"], r["metric"], r["value"]) for r in rows] == [
        ("niah_single_1", 2048, "accuracy", 0.5), ("boolq", None, "acc", 0.25),
    ]  # fmt: skip
    assert math.isnan(rows[0]["stderr"]) and rows[1]["stderr"] == 0.01 and rows[1]["samples"] == 4
    found = {"results": {"babilong_qa1": {"acc,none": 0.5, "acc_stderr,none": 0.1}}, "versions": {}}
    (row,) = harness.rows_of(found, Call(["babilong_qa1"], [], 4096, {}))
    assert (row["length"], row["metric"], row["value"], row["stderr"]) == (4096, "accuracy", 0.5, 0.1)  # fmt: skip
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
