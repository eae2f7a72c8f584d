"""lm-evaluation-harness on a model: what it needs, what its results mean."""

from __future__ import annotations

import math
import os
import re
import urllib.error
import urllib.request
from importlib.util import find_spec
from typing import Any

__all__ = ["OFFLINE", "calls_of", "check_tasks", "rows_of", "run_harness"]

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")  # fmt: skip
"""RULER's tasks that need no data from elsewhere (lm-eval 0.4.13)."""

LEAST_LENGTH = 2048
"""Of RULER's tasks: below it the harness's generators of ruler_vt and ruler_cwe never end."""


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
            raise ValueError(
                f"{task}: is no task of lm-evaluation-harness; lm-eval ls tasks lists them"
            )
    short = [task for task in tasks if has_lengths(task)]
    if short and min(lengths) < LEAST_LENGTH:
        raise ValueError(
            f"{', '.join(short)}: expected lengths of at least {LEAST_LENGTH}, got {min(lengths)}: the harness would look for "
            "shorter texts for ever; needles and tracking take any length"
        )
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


def run_harness(
    model: Any,
    tokenizer: Any,
    source: str,
    tasks: list[str],
    lengths: list[int],
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """lm-eval's own results, samples left out.

    Raises:
        ValueError: a task's data cannot be had.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    # Other tasks are not cut to lengths that are not about them.
    longest = {"max_length": max(lengths)} if all(map(has_lengths, tasks)) else {}
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **longest)
    try:
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=tasks,
            limit=limit,
            metadata={"pretrained": source, "max_seq_lengths": lengths},
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except (ConnectionError, FileNotFoundError, LookupError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(f"{', '.join(tasks)}: the data cannot be had: {first}") from None
    return found


def has_lengths(task: str) -> bool:
    """Whether a task of the harness is made for lengths: RULER's are."""
    return task.startswith(("ruler", "niah"))


def calls_of(tasks: list[str], lengths: list[int]) -> list[tuple[list[str], list[int]]]:
    """What to run together: RULER length by length, the others at once.

    The harness makes one data set of all lengths and takes its first ``limit`` samples, which are the shortest length's.
    """
    long = [task for task in tasks if has_lengths(task)]
    rest = [task for task in tasks if not has_lengths(task)]
    calls = [(long, [length]) for length in lengths] if long else []
    return calls + ([(rest, lengths)] if rest else [])


def rows_of(found: dict[str, Any], lengths: list[int]) -> list[dict[str, Any]]:
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
            if length is not None and (length not in lengths or value == -1):
                continue
            stderr = results.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "version": found["versions"].get(task),
                    "length": length,
                    "metric": "accuracy" if length is not None else metric,
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
