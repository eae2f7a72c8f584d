"""`lucid generate` as a user runs it, with a tiny checkpoint of random weights."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from lucid_attention import cli
from lucid_attention.generate import GenerateError, Settings, Summary, _Streamer, load, read_prompt
from lucid_attention.hf import enable, strengths

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model saved as LUCID and as softmax, with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([PROMPT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=32, num_hidden_layers=2, eos_token_id=None,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    found = {name: tmp_path_factory.mktemp(name) for name in ("softmax", "lucid")}
    for name, folder in found.items():
        if name == "lucid":
            enable(model)
        model.save_pretrained(folder)
        fast.save_pretrained(folder)
    return found


def lucid(*arguments: str, **more: Any) -> Any:
    result = CliRunner().invoke(cli.build_app(), ["generate", *arguments], **more)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def test_text_to_stdout_and_a_line_to_stderr(checkpoints: dict[str, Path]) -> None:
    result = lucid(str(checkpoints["lucid"]), "-p", PROMPT, "-n", "20")
    assert result.exit_code == 0
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith(
        "lucid generate: LucidLlamaForCausalLM (LUCID in 2 of 2 layers, float32, cpu)"
    )
    assert "20 new tokens" in line and "tokens/s" in line
    assert "lucid" not in result.stdout
    again = lucid(str(checkpoints["lucid"]), "-p", PROMPT, "-n", "20")
    assert again.stdout == result.stdout


def test_it_is_what_the_model_generates(checkpoints: dict[str, Path]) -> None:
    """Every cache gives the tokens that the model gives without one; another attention gives others."""
    folder = checkpoints["lucid"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=20, do_sample=False, use_cache=False)
    expected = tokenizer.decode(tokens[0, ids["input_ids"].shape[1] :])
    texts = {
        cache: lucid(str(folder), "-p", PROMPT, "-n", "20", "--cache", cache).stdout
        for cache in ("dynamic", "static")
    }
    assert {text.rstrip("\n") for text in texts.values()} == {expected.rstrip("\n")}
    softmax = str(checkpoints["softmax"])
    assert lucid(softmax, "-p", PROMPT, "-n", "20").stdout != texts["dynamic"]
    switched = lucid(softmax, "-p", PROMPT, "-n", "20", "--strength", "1")
    assert switched.stdout == texts["dynamic"] and "LUCID in 2 of 2" in switched.stderr
    plain = lucid(softmax, "-p", PROMPT, "-n", "3")
    assert "LlamaForCausalLM (softmax attention" in plain.stderr


def test_drawing_repeats_with_its_seed(checkpoints: dict[str, Path]) -> None:
    folder = str(checkpoints["lucid"])
    draw = ("-p", PROMPT, "-n", "20", "-t", "1.5", "--top-k", "50", "--top-p", "0.9")
    texts = [lucid(folder, *draw, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_file_and_standard_input(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = str(checkpoints["lucid"])
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    outputs = [
        lucid(folder, *how, "-n", "5", **more).stdout
        for how, more in ((("-p", PROMPT), {}), (("-f", str(path)), {}), (("-f", "-"), {"input": PROMPT}))
    ]  # fmt: skip
    assert outputs[0] == outputs[1] == outputs[2]


def test_more_than_the_positions_is_said(checkpoints: dict[str, Path]) -> None:
    result = lucid(str(checkpoints["lucid"]), "-p", PROMPT, "-n", "70")
    assert result.exit_code == 0
    assert "more than the 64 positions" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere", "-p", "a"], "./nowhere: no such folder"),
        (["no-such/model", "-p", "a"], "no-such/model: cannot be loaded: "),
        (["LUCID"], "give either --prompt or --file"),
        (["LUCID", "-p", "a", "-f", "b"], "give either --prompt or --file"),
        (["LUCID", "-p", "  "], "--prompt: is empty"),
        (["LUCID", "-f", "missing.txt"], "--file missing.txt: No such file"),
        (["LUCID", "-p", "a", "-n", "0"], "--new-tokens: expected 1 or more"),
        (["LUCID", "-p", "a", "-t", "-1"], "--temperature: expected 0 (the likeliest token)"),
        (["LUCID", "-p", "a", "-t", "1e-300"], "or 0.0001 and more, got 1e-300"),
        (["LUCID", "-p", "a\udcff"], "--prompt: is not UTF-8 text"),
        (["LUCID", "-p", "a", "--top-k", "5"], "give a --temperature as well"),
        (["LUCID", "-p", "a", "-t", "1", "--top-p", "2"], r"--top-p: expected a number in (0, 1]"),
        (["LUCID", "-p", "a", "--cache", "paged"], "--cache: expected one of dynamic, static"),
        (["LUCID", "-p", "a", "--dtype", "int8"], "--dtype: expected one of auto"),
        (["LUCID", "-p", "a", "--device", "tpu:0"], ": "),
        (["LUCID", "-p", "a", "--device", "meta"], "--device: expected a device that computes"),
        (
            ["LUCID", "-p", "a", "--cache", "offloaded", "--device", "cpu"],
            "--cache: offloaded moves",
        ),
        (["LUCID", "-p", "a", "--seed", "4294967296"], "--seed: expected 0 to 2^32 - 1"),
        (["LUCID", "-p", "a", "--strength", "2"], "strength"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = lucid(*[str(checkpoints["lucid"]) if x == "LUCID" else x for x in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("lucid generate: ") and message in last


def test_corrupt_weights_are_one_line(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "corrupt"
    shutil.copytree(checkpoints["lucid"], folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    result = lucid(str(folder), "-p", PROMPT)
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "quantized"},
        {"output_attentions": True, "return_dict_in_generate": True},
    ],
)
def test_what_a_stream_cannot_have_does_not_matter(
    settings: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["lucid"], folder)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    expected = lucid(str(checkpoints["lucid"]), "-p", PROMPT, "-n", "20")
    result = lucid(str(folder), "-p", PROMPT, "-n", "20")
    assert result.stdout == expected.stdout


def test_tokens_come_one_by_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A lookup takes several at once where a text repeats, which would be one step of the clock."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["lucid"])
    with torch.no_grad():  # it says its last token again
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.generation_config.prompt_lookup_num_tokens = 3
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(checkpoints["lucid"]).save_pretrained(tmp_path)
    result = lucid(str(tmp_path), "-p", "aaaa", "-n", "30")
    assert result.stdout.rstrip("\n") == 30 * "a"
    assert " 30 new tokens" in result.stderr.strip().splitlines()[-1]


def test_stop_strings_of_a_checkpoint_stop(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["lucid"], folder)
    text = lucid(str(folder), "-p", PROMPT, "-n", "20").stdout.rstrip("\n")
    stop = text[1]
    (folder / "generation_config.json").write_text(json.dumps({"stop_strings": [stop]}))
    result = lucid(str(folder), "-p", PROMPT, "-n", "20")
    assert result.exit_code == 0
    assert len(text) > 2 and result.stdout.rstrip("\n") == text[: text.index(stop) + 1] != text


def test_settings_that_do_not_go_together_are_one_line(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["lucid"], folder)
    (folder / "generation_config.json").write_text('{"max_time": "soon"}')
    result = lucid(str(folder), "-p", PROMPT)
    assert result.exit_code == 2
    assert result.stderr.strip().splitlines()[-1].startswith("lucid generate: ")


@pytest.mark.parametrize("tensor", ["k_proj", "strength_bias"])
def test_weights_that_lack_something_are_refused(
    tensor: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """They would be random, or a learned strength 0 again, whatever was learned."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints["lucid"])
    enable(model, strength="learned")
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(checkpoints["lucid"]).save_pretrained(tmp_path)
    assert lucid(str(tmp_path), "-p", PROMPT, "-n", "2").exit_code == 0
    weights = load_file(tmp_path / "model.safetensors")
    lacking = {name: x for name, x in weights.items() if f"layers.1.self_attn.{tensor}" not in name.replace("lucid.", "")}  # fmt: skip
    assert len(lacking) == len(weights) - 1
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    result = lucid(str(tmp_path), "-p", PROMPT, "-n", "2")
    assert result.exit_code == 2 and result.stdout == ""
    assert "1 tensors that it needs are not among its weights" in result.stderr.splitlines()[-1]
    assert tensor in result.stderr.splitlines()[-1]


def test_another_models_tokenizer_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoints["lucid"], tmp_path, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(checkpoints["softmax"])
    config.vocab_size = 100
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = lucid(str(tmp_path), "-p", PROMPT)
    assert result.exit_code == 2
    assert "the tokenizer is another model's" in result.stderr.splitlines()[-1]


def test_an_output_that_cannot_say_everything(monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Path]) -> None:  # fmt: skip
    """What its encoding lacks is escaped."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoints["lucid"])
    streamer = _Streamer(tokenizer, Summary("model", 1, [0.0]))
    streamer.put(torch.tensor([[0]]))  # the prompt
    for token in tokenizer("naïve ☃")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    sys.stdout.flush()
    assert raw.getvalue() == rb"na\xefve \u2603" + b"\n"


def adapter_of(base: Path, place: Path, strength: float | None = None) -> Path:
    """A LoRA of a checkpoint, with its learned strengths at a value."""
    from peft import LoraConfig, get_peft_model

    saved = ["lucid"] if strength is not None else None
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=saved),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ("strength_bias" in name and "modules_to_save" in name):
            torch.nn.init.constant_(parameter, 0.02 if "lora_B" in name else strength)
    model.save_pretrained(place)
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(place)
    return place


def test_an_adapter_and_what_it_saved_whole(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """As PEFT loads it: a learned strength of the adapter is not forgotten, nor what its base lacks."""
    from peft import AutoPeftModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints["lucid"])
    enable(model, strength="learned")
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast.from_pretrained(checkpoints["lucid"]).save_pretrained(tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", tmp_path / "adapter", strength=0.7)
    loaded, tokenizer = load(str(adapter), device="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = AutoPeftModelForCausalLM.from_pretrained(adapter)(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-4, rtol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(base(ids).logits, expected, atol=1e-2)
    assert (strengths(loaded) == strengths(loaded)[0]).all() and not torch.equal(strengths(loaded), strengths(base))  # fmt: skip

    decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "base").model
    decoder.save_pretrained(tmp_path / "base")  # without its head
    with pytest.raises(GenerateError, match=r"is no complete causal language model: .*lm_head"):
        load(str(adapter), device="cpu")


def test_an_adapter_that_cannot_be_merged(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(checkpoints["softmax"])
    get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path)  # fmt: skip
    PreTrainedTokenizerFast.from_pretrained(checkpoints["softmax"]).save_pretrained(tmp_path)
    with pytest.raises(GenerateError, match="cannot be loaded: its adapter cannot be merged"):
        load(str(tmp_path), device="cpu")


def test_a_mark_at_a_files_beginning_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(PROMPT.encode("utf-8-sig"))
    assert read_prompt(None, path) == PROMPT


def test_a_closed_standard_input_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(GenerateError, match="standard input is closed"):
        read_prompt(None, Path("-"))


def test_a_model_of_learned_positions_ends_with_them(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoints["lucid"])
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=8, n_layer=1, n_head=1, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = lucid(str(tmp_path), "-p", PROMPT, "-n", "40")
    assert result.exit_code == 2
    assert "does not go beyond its 16 positions" in result.stderr.strip().splitlines()[-1]


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\x80\x81")
    with pytest.raises(GenerateError, match="is not UTF-8 text"):
        read_prompt(None, path)


def test_rate_is_by_the_median_interval() -> None:
    summary = Summary("model", 5, [0.0, 1.0, 9.0, 9.5, 10.0, 10.5])
    assert (summary.new_tokens, summary.first_token_seconds) == (5, 1.0)
    assert summary.tokens_per_second == pytest.approx(2.0)  # the 8 seconds were compiling
    assert "tokens/s" not in str(Summary("model", 5, [0.0, 1.0]))
    assert Settings().temperature == 0.0


def test_ctrl_c_keeps_what_is_there(checkpoints: dict[str, Path]) -> None:
    """A real interrupt of a real process, once text has come."""
    config = checkpoints["lucid"] / "config.json"
    assert json.loads(config.read_text())["model_type"] == "lucid_llama"
    child = subprocess.Popen(
        [sys.executable, "-c", "from lucid_attention.cli import main; main()", "generate", str(checkpoints["lucid"]), "-p", PROMPT, "-n", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
        # A shell's background jobs ignore interrupts, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout is not None
    first = child.stdout.read(1)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert first
    assert b"interrupted" in err.splitlines()[-1]
    assert out
