"""The decode operator as PyTorch sees it: opcheck, compiling, autocast, its place in a graph."""

from __future__ import annotations

import pytest
import torch

from lucid_attention import decode_workspace, lucid_attention_with_kvcache
from lucid_attention.decode.api import with_kvcache
from tests.conftest import relative_error
from tests.decode.cases import Case, Step

CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional: bool) -> None:
    case = Case(
        (9, 5), dtype=torch.float32, y_dtype=torch.float16 if optional else torch.float32, width=8,
        value_width=6, padding="left" if optional else "", strength=optional, sinks=optional,
        page=4 if optional else 0,
    )  # fmt: skip
    step = Step(case)
    for cache in (step.key_cache, step.y_cache):
        cache.nan_to_num_()  # the checks compare tensors, and NaN is not NaN
    args = (
        step.query, step.key, step.value, step.key_cache, step.y_cache, step.lengths,
        decode_workspace(2, 2, "cpu"), step.scale, step.mask, step.table, step.strength, step.sinks,
        0.3, 0.4, 2.0 if optional else 0.0, "blocked",
    )  # fmt: skip
    torch.library.opcheck(with_kvcache.overload, args, test_utils=CHECKS)


def test_compiled_in_one_graph() -> None:
    """The caches are written in place through the compiled call, and its lengths do not recompile it."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def call(*args: torch.Tensor) -> torch.Tensor:
        return lucid_attention_with_kvcache(*args, impl="blocked") * 2

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    case = Case((9, 5), capacity=16, dtype=torch.float32, y_dtype=torch.float32)
    step, twin = Step(case), Step(case)
    for _ in range(3):
        got, expected = (
            f(x.query, x.key, x.value, x.key_cache, x.y_cache, x.lengths)
            for f, x in ((compiled, step), (call, twin))
        )
        assert torch.equal(got, expected)
        assert torch.equal(step.y_cache.nan_to_num(), twin.y_cache.nan_to_num())
        step.lengths += 1
        twin.lengths += 1
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["scale", "kernel_scale", "softcap", "strength"])
def test_compiled_with_several_numbers(name: str) -> None:
    """A second value makes the number a symbol."""
    case = Case((9, 5), capacity=16, dtype=torch.float32, y_dtype=torch.float32)

    def call(number: float, *args: torch.Tensor) -> torch.Tensor:
        return lucid_attention_with_kvcache(*args, impl="blocked", **{name: number}) * 2

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (0.3, 0.6, 0.9):
        got, expected = (
            f(number, x.query, x.key, x.value, x.key_cache, x.y_cache, x.lengths)
            for f, x in ((compiled, Step(case)), (call, Step(case)))
        )
        assert torch.equal(got, expected)


def test_autocast_casts_as_sdpa_does() -> None:
    case = Case((40,), dtype=torch.bfloat16, y_dtype=torch.float32)
    step, twin = Step(case), Step(case)
    expected = step.run("blocked")
    twin.query, twin.value = twin.query.float(), twin.value.float()
    twin.key = twin.key.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = twin.run("blocked")
    assert got.dtype == torch.bfloat16
    assert relative_error(got, expected) == 0.0


def test_no_gradient_is_recorded() -> None:
    step = Step(Case((20,)))
    step.key_cache.nan_to_num_()
    assert not step.run("blocked").requires_grad
    with torch.inference_mode():
        step.run("blocked")
