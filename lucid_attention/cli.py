"""The ``lucid`` command: reads options, calls the library, turns outcomes into exit codes."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import lucid_attention

if TYPE_CHECKING:
    import typer

__all__ = ["main"]

_EXTRA = "demo"
_NEEDED = ("typer", "rich", "tqdm", "matplotlib", "transformers", "accelerate", "tokenizers")
_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130


def main() -> None:
    """Entry point of the ``lucid`` command."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"lucid: needs {', '.join(missing)}; run: pip install 'lucid-attention[{_EXTRA}]'",
            file=sys.stderr,
        )
        sys.exit(_FAILED)
    try:
        build_app()()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def build_app() -> typer.Typer:
    """The commands; typer is imported here so that importing this module needs torch only."""
    import typer

    app = typer.Typer(
        help="LUCID attention from the command line.", no_args_is_help=True, add_completion=False
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"lucid-attention {lucid_attention.__version__}")
            raise typer.Exit()

    version_option = typer.Option(
        False, "--version", callback=show_version, is_eager=True, help="Print the version."
    )
    out_option = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="Folder for the results, new or empty. [default: results/demo-YYYYmmdd-HHMMSS]",
    )
    text_option = typer.Option(
        None,
        "--text",
        metavar="FILE",
        help="Plain UTF-8 text for the language model, at least 20,000 characters; the last tenth "
        "is held out. [default: Jane Austen, Persuasion]",
    )
    seed_option = typer.Option(1, "--seed", min=0, help="Seed of weights, data and sampling.")
    quick_option = typer.Option(
        False, "--quick", help="A look in about a minute: the models stay undertrained."
    )

    model_argument = typer.Argument(..., help="A checkpoint's folder, or a model id on the hub.")
    dtype_option = typer.Option(
        "auto", "--dtype", help="auto (the checkpoint's), float32, bfloat16 or float16."
    )
    device_option = typer.Option(
        None, "--device", show_default="cuda where there is one", help="Where it runs."
    )
    strength_option = typer.Option(
        None,
        "--strength",
        show_default="as the model was saved",
        help="Switch to LUCID of this strength, 0 to 1.",
    )
    config_argument = typer.Argument(None, help="A YAML file; recipes/ has some.")
    changes_option = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="A setting, over what the file says."
    )
    run_option = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="Folder of the run, new or empty. [default: results/train-YYYYmmdd-HHMMSS]",
    )
    resume_option = typer.Option(
        None, "--resume", metavar="DIR", help="Go on with the run in this folder."
    )
    prose_option = typer.Option(
        None,
        "--prose",
        metavar="FILE",
        help="Text that needles are hidden in. [default: Persuasion]",
    )
    eval_option = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="Folder for the results, new or empty. [default: results/eval-YYYYmmdd-HHMMSS]",
    )
    reproduce_option = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="Folder of the experiment, new, empty, or to go on with. [default: results/NAME-YYYYmmdd-HHMMSS]",
    )
    shared_option = typer.Option(
        None,
        "--shared",
        metavar="DIR",
        help="Keeps the corpus and the models trained on it, for other experiments too.",
    )
    inspect_option = typer.Option(
        None,
        "--out",
        metavar="DIR",
        help="Folder for the results, new or empty. [default: results/inspect-YYYYmmdd-HHMMSS]",
    )
    file_option = typer.Option(
        None,
        "--file",
        "-f",
        metavar="FILE",
        help="UTF-8 text to continue; - is standard input.",
    )

    text_file_option = typer.Option(
        None, "--file", "-f", metavar="FILE", help="UTF-8 text to look at; - is standard input."
    )

    @app.callback()
    def lucid(version: bool = version_option) -> None:
        pass

    @app.command()
    def demo(
        out: Path | None = out_option,
        text: Path | None = text_option,
        seed: int = seed_option,
        quick: bool = quick_option,
    ) -> None:
        """Show LUCID beside softmax attention: a memory task and a language model on a novel.

        Takes about three minutes on two quiet CPU cores and needs no network.

        1. Memory. Sequences of writes and queries to 128 keys; a query asks for the latest value
        of its key. Four one-layer models, softmax and LUCID, without position encoding and with
        RoPE, are trained at length 128 and tested to length 2048.

        2. Language model. A tiny Llama with LUCID and its softmax twin are trained by
        transformers' Trainer on the text. The LUCID model is saved and loaded again, generates
        text with the LUCID cache, and its cached tokens are compared with uncached ones.

        Written to the results folder, which is never overwritten: results.json (all numbers,
        sizes and versions), memory.csv, loss.csv, memory.png, language_model.png, summary.png
        (both), summary.txt, generated.txt, checkpoint/ (the LUCID model and its tokenizer).

        Ctrl-C stops early and keeps what is finished.

        Exit codes: 0 done, 1 the checkpoint check failed, 2 bad input (nothing is written),
        130 interrupted.
        """
        from lucid_attention.demo.configuration import DemoConfig
        from lucid_attention.demo.runner import run_demo
        from lucid_attention.demo.text import TextError
        from lucid_attention.results import FolderError

        config = DemoConfig.quick(seed=seed) if quick else DemoConfig(seed=seed)
        try:
            outcome = run_demo(config, text=text, out=out)
        except (TextError, FolderError) as error:
            print(f"lucid demo: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        if outcome.record.status == "interrupted":
            raise typer.Exit(_INTERRUPTED)
        if outcome.record.checkpoint is None or not outcome.record.checkpoint.passed:
            raise typer.Exit(_FAILED)

    @app.command()
    def train(
        config: Path | None = config_argument,
        changes: list[str] = changes_option,
        out: Path | None = run_option,
        resume: Path | None = resume_option,
        dry_run: bool = typer.Option(
            False, "--dry-run", help="Say how large and how costly it would be; train nothing."
        ),
    ) -> None:
        """Train a language model with LUCID or softmax attention, by transformers' Trainer.

        CONFIG is flat YAML. Its keys are those of lucid_attention.train.TrainConfig (attention, position, layers, width,
        heads, head_dim, text, dataset or task, length, ...) and of transformers.TrainingArguments (max_steps,
        learning_rate, per_device_train_batch_size, bf16, gradient_checkpointing, ...).

        The folder of the run holds config.yaml, the tokens, checkpoints, log.csv, loss.png, tensorboard's runs/ and, at the
        end, model/, a Hugging Face checkpoint. It is never overwritten. Ctrl-C finishes the step and saves; --resume goes on as
        if nothing had happened, after a kill from the last checkpoint.

        On several GPUs: accelerate launch --config_file recipes/fsdp2.yaml -m lucid_attention train CONFIG

        Exit codes: 0 done, 2 bad input (nothing is trained), 130 interrupted.
        """
        from lucid_attention.results import FolderError
        from lucid_attention.train import TrainError, load_config
        from lucid_attention.train import run as library

        try:
            if (config is None) == (resume is None):
                raise TrainError("give either a configuration file or --resume")
            if resume is not None:
                if out is not None or dry_run:
                    raise TrainError("--resume: neither --out nor --dry-run goes with it")
                outcome = library.continue_training(resume, changes)
            else:
                assert config is not None
                settings, arguments = load_config(config, changes)
                if dry_run:
                    print("\n".join(library.describe(settings, arguments)))
                    return
                outcome = library.train(settings, arguments, out=out)
        except (TrainError, FolderError) as error:
            if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
                print(f"lucid train: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        if not outcome.finished:
            raise typer.Exit(_INTERRUPTED)
        print(f"lucid train: {outcome.model}", file=sys.stderr)

    @app.command()
    def generate(
        model: str = model_argument,
        prompt: str | None = typer.Option(None, "--prompt", "-p", help="The text to continue."),
        file: Path | None = file_option,
        new_tokens: int = typer.Option(200, "--new-tokens", "-n", help="At most so many."),
        temperature: float = typer.Option(
            0.0,
            "--temperature",
            "-t",
            help="0 takes the likeliest token; otherwise tokens are drawn.",
        ),
        top_k: int | None = typer.Option(None, "--top-k", help="Draw from the K likeliest."),
        top_p: float | None = typer.Option(
            None, "--top-p", help="Draw from the likeliest that make up P."
        ),
        seed: int = typer.Option(0, "--seed", min=0, help="Seed of the drawing."),
        cache: str = typer.Option(
            "dynamic", "--cache", help="dynamic, static (compiled on a GPU) or offloaded."
        ),
        strength: float | None = strength_option,
        dtype: str = dtype_option,
        device: str | None = device_option,
    ) -> None:
        """Continue a prompt with a LUCID checkpoint, or any other causal language model.

        The text goes to standard output as it comes, and nothing else does; a line about tokens and tokens/s
        goes to standard error at the end. Ctrl-C stops early.

        Exit codes: 0 done, 2 bad input, 130 interrupted.
        """
        from lucid_attention import generate as library

        try:
            settings = library.Settings(new_tokens, temperature, top_k, top_p, seed, cache)
            text = library.read_prompt(prompt, file)
            loaded = library.load(model, dtype=dtype, device=device, strength=strength)
            summary = library.generate(*loaded, text, settings)
        except library.GenerateError as error:
            print(f"lucid generate: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        print(f"\nlucid generate: {summary}", file=sys.stderr)
        if summary.interrupted:
            raise typer.Exit(_INTERRUPTED)

    @app.command("eval")
    def eval_command(
        model: str = model_argument,
        tasks: str = typer.Option(
            "needles", "--tasks", "-t", help="needles, tracking:hops=2, niah_single_1, ruler, ..."
        ),
        lengths: str = typer.Option("1024", "--lengths", help="In tokens: 1024,4096."),
        limit: int = typer.Option(100, "--limit", help="Samples of each task and length."),
        batch_size: int = typer.Option(1, "--batch-size", help="Rows at once."),
        seed: int = typer.Option(1, "--seed", min=0, help="Of the samples."),
        prose: Path | None = prose_option,
        strength: float | None = strength_option,
        dtype: str = dtype_option,
        device: str | None = device_option,
        out: Path | None = eval_option,
    ) -> None:
        """Evaluate a checkpoint: needles in prose, variable tracking, and lm-evaluation-harness.

        Tasks, with commas between them: needles and tracking, with dials (needles:keys=4:values=2:queries=2,
        tracking:chains=2:hops=4), need nothing; any other name is lm-evaluation-harness's (ruler, babilong, longbench,
        scrolls_qasper, ...). Of RULER, niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe and
        ruler_fwe need no network; others say so at once where there is none.

        Written to the results folder, which is never overwritten: results.json, .csv and .md, accuracy.png, samples.jsonl (the end
        of each prompt, what was said) and lm_eval.json (the harness's own results).

        Exit codes: 0 done, 2 bad input.
        """
        from lucid_attention.evaluate import EvalError, evaluate
        from lucid_attention.evaluate.run import table
        from lucid_attention.results import FolderError

        try:
            try:
                wanted = [int(x) for x in lengths.split(",")]
            except ValueError:
                raise EvalError(f"--lengths: expected numbers such as 1024,4096, got {lengths!r}") from None  # fmt: skip
            found = evaluate(
                model, [t for t in tasks.split(",") if t], lengths=wanted, limit=limit, batch_size=batch_size, seed=seed,
                prose=prose, dtype=dtype, device=device, strength=strength, out=out,
            )  # fmt: skip
        except (EvalError, FolderError) as error:
            print(f"lucid eval: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        print(f"{table(found.rows)}\n{found.folder}")

    @app.command("reproduce")
    def reproduce_command(
        name: str | None = typer.Argument(None, help="An experiment; --list names them."),
        listed: bool = typer.Option(
            False, "--list", help="All experiments, their claims and times."
        ),
        seeds: int = typer.Option(3, "--seeds", help="1 to so many, the same for both attentions."),
        tiny: bool = typer.Option(False, "--tiny", help="Check the machinery, not the claim."),
        only: str | None = typer.Option(
            None,
            "--only",
            help="Run such cells alone: position=rope,head_dim=64. The tables are of all that are finished.",
        ),
        minutes: float | None = typer.Option(
            None, "--minutes", help="Begin no cell after so long; the same command goes on."
        ),
        device: str | None = device_option,
        shared: Path | None = shared_option,
        out: Path | None = reproduce_option,
    ) -> None:
        """Reproduce a row of docs/evidence.md: LUCID beside softmax, paired seeds, spread.

        Written to the folder: cells/ (what is finished; the same command with the same --out goes on), results.csv,
        summary.md (means, deviations, paired differences with their standard errors) and plot.png. Several processes with the
        same --out (one for each GPU: CUDA_VISIBLE_DEVICES) share the cells among them. Where every seed is a cell of its own (all but
        memory and two-phase), more --seeds go on with what fewer have left.

        Exit codes: 0 done, 2 bad input.
        """
        from lucid_attention.reproduce import EXPERIMENTS, ReproduceError, reproduce
        from lucid_attention.results import FolderError

        if listed:
            for one in EXPERIMENTS.values():
                cpu = "" if one.cpu_minutes is None else f", {one.cpu_minutes:g} min on a CPU"
                each = " for each seed" if one.per_seed else ""
                took = "" if one.measured else ", estimated"
                print(
                    f"{one.name:14} {one.gpu_minutes:g} min on a GPU{cpu}{each}{took}: {one.claim}"
                )
            return
        try:
            if name is None or name not in EXPERIMENTS:
                raise ReproduceError(f"expected one of {', '.join(EXPERIMENTS)}, got {name}")
            folder = reproduce(
                EXPERIMENTS[name], out=out, seeds=seeds, device=device, tiny=tiny, shared=shared, only=only,
                most_seconds=None if minutes is None else 60 * minutes,
            )  # fmt: skip
        except (ReproduceError, FolderError) as error:
            print(f"lucid reproduce: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        summary = folder / "summary.md"
        print(summary.read_text() if summary.exists() else "no cell is finished")
        print(folder)

    @app.command("inspect")
    def inspect_command(
        model: str = model_argument,
        prompt: str | None = typer.Option(None, "--prompt", "-p", help="The text to look at."),
        file: Path | None = text_file_option,
        needle: str | None = typer.Option(
            None, "--needle", help="A part of the text that its end ought to attend to."
        ),
        layers: str | None = typer.Option(
            None,
            "--layers",
            show_default="first, middle, last",
            help="Whose maps are drawn: 0,5,11. All layers are measured.",
        ),
        strength: float | None = typer.Option(
            None,
            "--strength",
            show_default="the model's own; 1 in softmax layers",
            help="Of the preconditioner that is looked at, 0 to 1.",
        ),
        dtype: str = dtype_option,
        device: str | None = device_option,
        out: Path | None = inspect_option,
    ) -> None:
        """Look inside a checkpoint: its attention on a text, before and after preconditioning.

        Written to the results folder, which is never overwritten: page.html (every head's maps, the text coloured by what a token
        attends to, the numbers; it needs nothing else), maps.png (means over heads), diagnostics.csv and .json: for each KV
        head the mean cosine of keys, row sums of P, ||Y||/||V||, the condition number of L, the attention on the first token, the
        error of the solve, and with --needle the attention on it, of A and of A L^-1.

        Exit codes: 0 done, 2 bad input.
        """
        from lucid_attention.generate import GenerateError, load, read_prompt
        from lucid_attention.probes.inspect import InspectError, inspect_text
        from lucid_attention.results import FolderError

        try:
            chosen = None if layers is None else [int(x) for x in layers.split(",")]
        except ValueError:
            print(f"lucid inspect: --layers: expected numbers such as 0,5,11, got {layers!r}", file=sys.stderr)  # fmt: skip
            raise typer.Exit(_BAD_INPUT) from None
        try:
            text = read_prompt(prompt, file)
            loaded, tokenizer = load(model, dtype=dtype, device=device)
            found = inspect_text(
                loaded, tokenizer, text, out=out, needle=needle, layers=chosen, strength=strength
            )
        except (GenerateError, InspectError, FolderError) as error:
            print(f"lucid inspect: {error}", file=sys.stderr)
            raise typer.Exit(_BAD_INPUT) from None
        print(f"{found.note}\n{found.folder / 'page.html'}")

    return app
