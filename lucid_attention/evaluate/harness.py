"""lm-evaluation-harness on a model: what it needs, what its results mean."""

from __future__ import annotations

import difflib
import math
import os
import random
import re
import sys
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any, NamedTuple

__all__ = [
    "OFFLINE",
    "Call",
    "calls_of",
    "check_tasks",
    "check_tokenizer",
    "rows_of",
    "run_harness",
]

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")  # fmt: skip
"""RULER's tasks that need no data from elsewhere (lm-eval 0.4.13)."""

LEAST_LENGTH = 2048
"""Of RULER's tasks: below it the harness's generators of ruler_vt and ruler_cwe never end."""

EXAMPLE_TOKENS = 500
"""At most, of the example that ruler_vt begins with: its generator looks for one for ever."""

ANSWER_TOKENS = 128
"""The most that a task of RULER asks for; the harness cuts prompts to what is left of a model's length."""

BABILONG = ("babilong_longctx", *(f"babilong_qa{n}" for n in range(1, 6)))
"""Of BABILong's tasks those that have lengths."""

BABILONG_LENGTHS = {1024 << n: f"{1 << n}k" for n in range(8)}

LONGBENCH = ("jieba", "fuzzywuzzy", "rouge")
"""What LongBench's scores import."""


class Call(NamedTuple):
    """What the harness is asked for at once.

    Attributes:
        tasks: their names.
        lengths: RULER's.
        length: of the rows where the harness does not say it.
        metadata: handed to the tasks.
    """

    tasks: list[str]
    lengths: list[int]
    length: int | None
    metadata: dict[str, Any]


def check_tasks(tasks: list[str], lengths: list[int]) -> None:
    """Raise ValueError, before anything is loaded, for what cannot be run."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"{', '.join(tasks)}: needs lm-evaluation-harness; pip install 'lucid-attention[eval]', or take needles "
            "or tracking, which need nothing"
        )
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    for task in tasks:
        if task not in known:
            like = difflib.get_close_matches(task, ["needles", "tracking", *known], n=1)
            raise ValueError(
                f"{task}: is no task of lm-evaluation-harness; lm-eval ls tasks lists them"
                + (f" (did you mean {like[0]}?)" if like else "")
            )
    short = [task for task in tasks if has_lengths(task)]
    if short and min(lengths) < LEAST_LENGTH:
        raise ValueError(
            f"{', '.join(short)}: expected lengths of at least {LEAST_LENGTH}, got {min(lengths)}: the harness would look for "
            "shorter texts for ever; needles and tracking take any length"
        )
    odd = [length for length in lengths if length not in BABILONG_LENGTHS]
    if odd and any(task in BABILONG for task in tasks):
        raise ValueError(
            f"babilong: expected lengths among {', '.join(map(str, BABILONG_LENGTHS))}, got {odd[0]}"
        )
    lacking = [name for name in LONGBENCH if find_spec(name) is None]
    if lacking and any(task.startswith("longbench") for task in tasks):
        raise ValueError(f"longbench: needs {', '.join(lacking)}; pip install 'lm_eval[longbench]'")
    if any(task.startswith("scrolls") for task in tasks) and find_spec("transformers.data.metrics") is None:  # fmt: skip
        raise ValueError(
            "scrolls: the harness imports transformers.data.metrics, which newer transformers do not have; it runs with "
            "transformers 5.17"
        )
    online = [task for task in tasks if task not in OFFLINE]
    said_offline = any(os.environ.get(n, "0") not in ("", "0") for n in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"))  # fmt: skip
    if online and not said_offline and not _reaches_the_hub():
        raise ValueError(
            f"{', '.join(online)}: needs data from the Hugging Face hub, which cannot be reached; without a network there are "
            f"{', '.join(OFFLINE)}, needles and tracking (HF_DATASETS_OFFLINE=1 takes what is cached)"
        )


def check_tokenizer(tasks: list[str], tokenizer: Any) -> None:
    """Raise ValueError where the harness's generator of ruler_vt would never end: tokenizers of small vocabularies."""
    if not {"ruler", "ruler_vt"} & set(tasks):
        return
    import numpy as np
    from lm_eval.tasks.ruler.vt_utils import CONFIG, generate_input_output

    room = CONFIG["variable_tracking"]["tokens_to_generate"]
    before = random.getstate(), np.random.get_state()
    random.seed(1)
    np.random.seed(1)
    # The example of fewest words; its names are drawn, and one draw decides.
    found = [generate_input_output(5, 1, 4, is_icl=True) for _ in range(8)]
    random.setstate(before[0])
    np.random.set_state(before[1])
    tokens = room + max(len(tokenizer(f"{text} {answer}").input_ids) for text, answer in found)
    if tokens > EXAMPLE_TOKENS:
        raise ValueError(
            f"ruler_vt: the harness's shortest example has up to {tokens} tokens of this tokenizer, and it would look for "
            f"one of {EXAMPLE_TOKENS} for ever; take tracking, or a tokenizer of more than some thousand tokens"
        )


def run_harness(
    model: Any,
    tokenizer: Any,
    source: str,
    call: Call,
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """lm-eval's own results, samples left out.

    Raises:
        ValueError: a task's data, or what it imports, cannot be had; the model does not go so far.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = call.tasks
    # It has a generator of its own, which would go on from call to call: other questions for the second model.
    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)
    # Other tasks are not cut to lengths that are not about them; ruler_fwe's prompts leave no room for the answer.
    longest = {"max_length": max(call.lengths) + ANSWER_TOKENS} if call.lengths else {}
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **longest)
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            limit=limit,
            metadata={"pretrained": source, **call.metadata},
            bootstrap_iters=100,  # 0 drops the standard errors of means, too
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except IndexError:
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if most is None or not call.lengths or max(call.lengths) + ANSWER_TOKENS <= most:
            raise
        raise ValueError(
            f"{', '.join(tasks)}: the model does not go beyond its {most} positions, and {max(call.lengths)}, with up to "
            f"{ANSWER_TOKENS} of the answer, were asked for; take a smaller length"
        ) from None
    except (OSError, ImportError, LookupError) as error:
        if isinstance(error, KeyError):
            raise
        first = str(error).strip().split("\n")[0]
        what = "what it imports" if isinstance(error, ImportError) else "the data"
        raise ValueError(f"{', '.join(tasks)}: {what} cannot be had: {first}") from None
    return found


def has_lengths(task: str) -> bool:
    """Whether a task of the harness is made for lengths: RULER's are."""
    return task.startswith(("ruler", "niah"))


def calls_of(tasks: list[str], lengths: list[int]) -> list[Call]:
    """What to run together: RULER and BABILong by task and length, the others at once.

    The harness makes one data set of all lengths and takes its first ``limit`` samples, which are the shortest length's;
    and what it asks in one of RULER's tasks depends on the tasks before it.
    """
    calls, rest = [], []
    for task in tasks:
        if has_lengths(task):
            calls += [Call([task], [n], None, {"max_seq_lengths": [n]}) for n in lengths]
        elif task in BABILONG:
            names = [(n, BABILONG_LENGTHS[n]) for n in lengths]
            calls += [Call([task], [], n, {"max_seq_lengths": name}) for n, name in names]
        else:
            rest.append(task)
    return calls + ([Call(rest, [], None, {})] if rest else [])


def rows_of(found: dict[str, Any], call: Call) -> list[dict[str, Any]]:
    """A row for each task and metric, or for each length where a metric is one.

    The harness reports RULER under lengths as names of metrics, and -1 for lengths that were not run.
    """
    rows = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            length = int(metric) if re.fullmatch(r"\d+", metric) else None
            if length is not None and (length not in call.lengths or value == -1):
                continue
            stderr = results.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "version": found["versions"].get(task),
                    "length": call.length if length is None else length,
                    "metric": "accuracy" if length is not None or call.length else metric,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else math.nan,
                    "samples": found.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    return rows


def _reaches_the_hub() -> bool:
    """By HTTP, so that a mirror (HF_ENDPOINT) and proxies count."""
    place = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        with urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it answers
    except (OSError, ValueError):
        return False
