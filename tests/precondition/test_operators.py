"""The operators as PyTorch sees them: registration, fakes, torch.compile, memory, determinism."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lucid_attention import (
    lucid_attention,
    lucid_attention_varlen,
    precondition,
    precondition_varlen,
)
from lucid_attention.blocked_softmax import blocked_softmax
from lucid_attention.precondition import blocked, operators
from tests.conftest import make_keys, relative_error
from tests.precondition.test_definition import pack

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")  # fmt: skip


def samples(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    key = make_keys("cos0.8", 2, 2, 20, 6, dtype=dtype).requires_grad_()
    value = torch.randn(2, 2, 20, 4, dtype=dtype, requires_grad=True)
    strength = torch.tensor([0.3, 1.0], requires_grad=True)
    return key, value, strength


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck_dense(dtype: torch.dtype, optional: bool) -> None:
    key, value, strength = samples(dtype)
    mask = torch.rand(2, 20) > 0.2
    past_key = make_keys("cos0.8", 2, 2, 7, 6, dtype=dtype).requires_grad_()
    past_y = torch.randn(2, 2, 7, 4, requires_grad=True)  # float32, also for bfloat16 values
    extra = (strength, mask, past_key, past_y) if optional else (None, None, None, None)
    torch.library.opcheck(
        operators.precondition.overload,
        (
            key,
            value,
            *extra,
            0.4,
            "auto",
            "high",
            torch.float64 if dtype == torch.float64 else torch.float32,
        ),
        test_utils=CHECKS,
    )
    y = operators.precondition(key, value, *extra, 0.4, "auto", "default", value.dtype).detach()
    backward = (torch.randn_like(y), key.detach(), y)
    detached = tuple(x if x is None else x.detach() for x in extra)
    torch.library.opcheck(
        operators.precondition_backward.overload,
        (*backward, *detached, 0.4, "auto", "default"),
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("longest", [None, 12])
def test_opcheck_packed(longest: int | None) -> None:
    key = make_keys("cos0.8", 20, 2, 6, dtype=torch.float32).requires_grad_()
    value = torch.randn(20, 2, 4, requires_grad=True)
    strength = torch.tensor([0.3, 1.0], requires_grad=True)
    args = (key, value, pack((8, 0, 12)), strength, longest, 0.4, "auto", "default")
    torch.library.opcheck(operators.precondition_varlen.overload, args, test_utils=CHECKS)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck_blocked_softmax(softcap: float | None) -> None:
    query = torch.randn(2, 4, 9, 6, requires_grad=True)
    key = torch.randn(2, 2, 12, 6, requires_grad=True)
    value = torch.randn(2, 2, 12, 5, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)
    position = torch.arange(9)
    mask = torch.rand(2, 12) > 0.2
    args = (query, key, value, position * 0, position + 3, mask, sinks, 0.4, softcap, None)
    torch.library.opcheck(blocked_softmax.overload, args, test_utils=CHECKS)


def test_fakes_cost_nothing() -> None:
    """Shapes follow on the meta device, where a million tokens take no memory."""
    with torch.device("meta"):
        query = torch.empty(1, 8, 1 << 20, 64)
        key, value = torch.empty(1, 4, 1 << 20, 64), torch.empty(1, 4, 1 << 20, 32)
        offsets = torch.empty(5, dtype=torch.int32)
    # Outside: a default device is a mode, and calls take another way under one.
    assert precondition(key, value).shape == value.shape
    assert lucid_attention(query, key, value).shape == (1, 8, 1 << 20, 32)
    packed = [x[0].transpose(0, 1) for x in (query, key, value)]
    assert precondition_varlen(*packed[1:], offsets).shape == (1 << 20, 4, 32)
    assert lucid_attention_varlen(*packed, offsets).shape == (1 << 20, 8, 32)


def test_compile_one_graph_for_all_lengths() -> None:
    compiled_graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        compiled_graphs.append(graph)
        return graph

    def function(query: Tensor, key: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        return lucid_attention(query, key, value, strength=strength)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for seq in (5, 130, 17, 300):
        query = torch.randn(2, 4, seq, 8)
        key, value, strength = samples(torch.float32)
        key, value = torch.randn(2, 2, 2, seq, 8).unbind(0)
        got = compiled(query, key, value, strength.detach())
        assert relative_error(got, function(query, key, value, strength)) < 1e-6
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_compile_gradients(padded: bool) -> None:
    mask = torch.rand(2, 20) > 0.3 if padded else None

    def function(key: Tensor, value: Tensor, strength: Tensor) -> Tensor:
        return lucid_attention(key, key, value, strength=strength, key_mask=mask).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    operands = samples(torch.float32)
    expected = torch.autograd.grad(function(*operands), operands)
    got = torch.autograd.grad(compiled(*operands), operands)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-5


@pytest.mark.parametrize("name", ["scale", "kernel_scale", "strength"])
def test_compile_meets_several_numbers(name: str) -> None:
    """At the second one a number becomes a symbol, in one graph all the same: two models of one process are enough."""
    query, (key, value, _) = torch.randn(2, 4, 20, 6), samples(torch.float32)
    operands = [query.requires_grad_(), key, value]

    def function(number: float, *operands: Tensor) -> Tensor:
        return lucid_attention(*operands, **{name: number}).square().sum()

    def alone(number: float, *operands: Tensor) -> Tensor:
        number = {} if name == "scale" else {name: number}
        return precondition(*operands[1:], **number).square().sum()

    for called, used in ((function, operands), (alone, operands[1:])):
        torch.compiler.reset()
        compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
        for number in (0.3, 0.6, 0.9):
            got = torch.autograd.grad(compiled(number, *operands), used)
            expected = torch.autograd.grad(called(number, *operands), used)
            for g, e in zip(got, expected, strict=True):
                assert relative_error(g, e) < 1e-5
    with pytest.raises(ValueError, match="kernel_scale must be finite, got inf"):
        precondition(key, value, kernel_scale=math.inf)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        lucid_attention(query, key, value, scale=math.nan)


def test_compile_packed_and_past_and_autocast() -> None:
    def packed(key: Tensor, value: Tensor, offsets: Tensor) -> Tensor:
        return precondition_varlen(key, value, offsets, max_seqlen=40)

    def chunk(key: Tensor, value: Tensor, past_key: Tensor, past_y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return precondition(key, value, past=(past_key, past_y))

    key, value = torch.randn(70, 2, 8), torch.randn(70, 2, 8)
    offsets = pack((30, 40))
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(key, value, offsets), packed(key, value, offsets))
    operands = [torch.randn(1, 2, n, 8) for n in (5, 5, 9, 9)]
    compiled = torch.compile(chunk, fullgraph=True, dynamic=True, backend="aot_eager")
    got = compiled(*operands)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, chunk(*operands))


def test_compile_whole_packed_attention() -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, n: int) -> Tensor:
        return lucid_attention_varlen(query, key, value, offsets, max_seqlen=n)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((30, 40), (5, 90), (200, 1)):
        total = sum(lengths)
        query, key, value = torch.randn(total, 4, 8), *torch.randn(2, total, 2, 8).unbind(0)
        arguments = (query, key, value, pack(lengths), max(lengths))
        assert relative_error(compiled(*arguments), function(*arguments)) < 1e-6


def test_a_schedule_of_floats_does_not_recompile_for_ever() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda key, value, b: precondition(key, value, strength=b), fullgraph=True, backend=count
    )
    key, value = torch.randn(2, 1, 2, 20, 8).unbind(0)
    for step in range(6):
        got = compiled(key, value, step / 10 + 0.05)
        expected = precondition(key, value, strength=step / 10 + 0.05)
        assert relative_error(got, expected) < 1e-6
    assert len(graphs) <= 2


@pytest.mark.parametrize("packed", [False, True])
def test_forward_mode_is_refused(packed: bool) -> None:
    key, value = torch.randn(2, 5, 1, 4).unbind(0)
    offsets = pack((2, 3))

    def solve(value: Tensor) -> Tensor:
        if packed:
            return precondition_varlen(key, value, offsets)
        return precondition(key.mT[None], value.mT[None])

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative .*impl='reference'"):
        torch.func.jvp(solve, (value,), (value,))
    dense = torch.func.jvp(
        lambda v: precondition(key[None], v[None], impl="reference"), (value,), (value,)
    )
    assert dense[1].abs().sum() > 0


def test_repeats_bit_for_bit() -> None:
    key, value, _ = (x.detach() for x in samples(torch.float32))
    key = make_keys("cos0.9", 2, 2, 500, 16, dtype=torch.float32).requires_grad_()
    value = torch.randn(2, 2, 500, 16)
    runs = []
    for _ in range(2):
        y = precondition(key, value)
        runs.append((y, *torch.autograd.grad(y.square().sum(), key)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_neither_pass_holds_a_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that either pass makes is linear in N (measured by a dispatch mode)."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)
            return out

    monkeypatch.setattr(blocked, "TILE_ELEMENTS_CPU", 1 << 12)
    sizes = []
    for seq in (1024, 4096):
        key, value = torch.randn(2, 1, 1, seq, 16).unbind(0)
        rows = blocked.Rows(None, None, None)
        keys = blocked.make_keys(key[0], key[0, :, :1], 0.25)
        with Largest() as largest:
            y = value[0].clone()
            blocked.solve(keys, y, None, rows, None)
            blocked.solve_adjoint(keys, y, torch.randn_like(y), None, rows, None)
        sizes.append(largest.elements)
    assert sizes[0] < 1024 * 1024 / 8
    assert sizes[1] <= 4.1 * sizes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_tensors_of_their_own(dtype: torch.dtype) -> None:
    """No views of something hidden: those could not be changed in place."""
    key, value = torch.randn(2, 1, 2, 5, 4, dtype=dtype).unbind(0)
    y = precondition(key.requires_grad_(), value.requires_grad_())
    assert not y._is_view()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # Y is what the gradients start from


class Listener:
    """Notes the names of what a mode is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def note(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Seen(Listener, TorchDispatchMode):
    """Hears of operators that reach the dispatcher."""

    __torch_dispatch__ = Listener.note


class Heard(Listener, TorchFunctionMode):
    """Hears of functions that PyTorch's users call."""

    __torch_function__ = Listener.note


class Wrapped(Tensor):
    """A subclass of a tensor, with nothing of its own but the name."""


def test_whoever_listens_hears_of_the_operator() -> None:
    """The way without the dispatcher is for calls that only autograd cares about; results are the same."""
    key, value = (x.requires_grad_() for x in torch.randn(2, 1, 2, 9, 4).unbind(0))
    grad = torch.randn(1, 2, 9, 4)
    y = precondition(key, value)
    expected = [y, *torch.autograd.grad(y, (key, value), grad)]
    with Seen() as seen:
        y = precondition(key, value)
        got = [y, *torch.autograd.grad(y, (key, value), grad)]
    for name in ("precondition", "precondition_backward"):
        assert f"lucid_attention.{name}.default" in seen.names
    with Heard() as heard:
        precondition(key, value)
    assert "lucid_attention.precondition.default" in heard.names
    through = operators.precondition.overload(
        key, value, None, None, None, None, 4**-0.5, "reference", "default", value.dtype
    )
    assert relative_error(through, expected[0]) < 1e-5 and through.requires_grad
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)
    assert type(precondition(key.as_subclass(Wrapped), value)) is Wrapped
    mode = FakeTensorMode()
    fake = mode.from_tensor(key.detach())
    with mode:
        assert precondition(fake, fake).shape == value.shape
    with torch.no_grad():
        assert not precondition(key, value).requires_grad
    with torch.inference_mode():
        assert torch.equal(precondition(key, value), expected[0])


@pytest.mark.parametrize("impl", ["blocked", "triton"])
def test_gradients_of_many_at_once(impl: str) -> None:
    """PyTorch's batched gradients: a batch looks like any tensor and has no memory of its own."""
    pytest.importorskip("triton")
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    key, value = (x.requires_grad_() for x in torch.randn(2, 1, 1, 9, 4).unbind(0))
    y = precondition(key, value, impl=impl)
    grads = torch.randn(3, *y.shape)
    many = torch.autograd.grad(y, (key, value), grads, is_grads_batched=True, retain_graph=True)
    for index, grad in enumerate(grads):
        one = torch.autograd.grad(y, (key, value), grad, retain_graph=True)
        for g, e in zip(many, one, strict=True):
            assert relative_error(g[index], e) < 1e-5


def test_a_negated_view_keeps_its_sign() -> None:
    pytest.importorskip("triton")
    key, value = torch.randn(2, 1, 1, 9, 4).unbind(0)
    impl = "blocked" if torch.cuda.is_available() else "triton"
    negated = torch._neg_view(value)
    assert torch.equal(precondition(key, negated, impl=impl), precondition(key, -value, impl=impl))


def test_profilers_name_the_operator() -> None:
    key = torch.randn(1, 1, 9, 4)
    with torch.profiler.profile() as profile:
        precondition(key, key)
    assert "lucid_attention::precondition" in {event.name for event in profile.events()}


def test_gradients_in_functorch_are_refused_by_name() -> None:
    key, value = torch.randn(2, 1, 2, 40, 16).unbind(0)
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"not for torch\.func .*impl='reference'"):
            transform(lambda x: precondition(x, value).sum())(key)
    wanted = torch.func.grad(lambda x: precondition(x, value, impl="reference").sum())(key)
    leaf = key.clone().requires_grad_()
    (found,) = torch.autograd.grad(precondition(leaf, value).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_second_derivatives_are_refused() -> None:
    key = torch.randn(1, 1, 9, 4, requires_grad=True)
    (first,) = torch.autograd.grad(precondition(key, key).sum(), key, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), key)


def test_reloading_defines_the_operators_anew() -> None:
    code = (
        "import importlib, torch, lucid_attention\n"
        "names = ['precondition.operators', 'precondition.registration', 'precondition.operators',\n"
        "         'blocked_softmax', 'precondition.api']\n"
        "key = torch.randn(1, 1, 5, 4, requires_grad=True)\n"
        "api = importlib.import_module('lucid_attention.precondition.api')\n"
        "for name in names:\n"
        "    importlib.reload(importlib.import_module('lucid_attention.' + name))\n"
        "    api.precondition(key, key).sum().backward()\n"
        "    assert key.grad.isfinite().all()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
