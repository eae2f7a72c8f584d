"""The decode operator against float64: kernels in Triton's interpreter or compiled, and by PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from lucid_attention import (
    decode_workspace,
    lucid_attention,
    lucid_attention_with_kvcache,
    precondition,
)
from lucid_attention.decode import launch
from tests.conftest import make_keys, relative_error
from tests.decode.cases import CASES, Case, Step

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),  # nothing unwritten may be read
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # interpreter
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NaN beyond the lengths
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
IMPLS = ["triton", "blocked", "reference"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU; here the kernels are compiled")
    name: str = request.param
    return name


def tolerances(case: Case, impl: str) -> tuple[float, float]:
    """Of the output and of ``y``: twice what rounding to the outputs' dtypes and to P's costs, and a band."""
    rounding = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}
    if impl == "triton" and not torch.cuda.is_available():
        rounding[torch.bfloat16] *= 2  # the interpreter cuts where the card rounds
    weights = max(rounding[case.y_dtype], 1e-6)
    return 2 * (2 * rounding[case.dtype] + weights), 2 * weights + 2e-6


def check(step: Step, impl: str, **more: object) -> None:
    """Output, appended rows, and that nothing else was written."""
    output, new = step.expected()
    before = [x.clone() for x in step.dense()]
    raw = step.key_cache.clone(), step.y_cache.clone()
    got = step.run(impl, **more)
    near_output, near_y = tolerances(step.case, impl)
    assert got.dtype == step.query.dtype
    assert relative_error(got.cpu(), output) < near_output
    key, y = step.added()
    assert relative_error(y.cpu(), new) < near_y
    assert torch.equal(key.nan_to_num(), step.key.double().nan_to_num())
    for x, was in zip(step.dense(), before, strict=True):
        for b, n in enumerate(step.case.lengths):
            keep = torch.ones(x.shape[2], dtype=torch.bool)
            keep[n : n + step.case.tokens] = False
            assert torch.equal(x[b, :, keep].nan_to_num(9e9), was[b, :, keep].nan_to_num(9e9))
    written = sum(1 for x, was in zip((step.key_cache, step.y_cache), raw, strict=True)
                  for _ in range(int((x.nan_to_num(9e9) != was.nan_to_num(9e9)).any(-1).sum())))  # fmt: skip
    assert written <= 2 * len(step.case.lengths) * step.case.kv_heads * step.case.tokens


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, impl: str, device: str) -> None:
    check(Step(CASES[name], device), impl)


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 7, 16])
@pytest.mark.parametrize(
    "case",
    [
        Case((400, 70, 0), kv_heads=3, group=2, tokens=2),
        Case((500,), kv_heads=2, uniform=True, strength=True),
        Case((300, 300), kv_heads=1, uniform=True, width=64, value_width=64, page=64),
    ],
    ids=["ragged", "one length", "pages"],
)
def test_every_split(case: Case, programs: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """However the list of tiles is cut, and the parts of a head added up."""
    monkeypatch.setattr(launch, "slots", lambda device: programs)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: programs)
    check(Step(case, device), "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_one_by_one_equals_all_at_once(impl: str, device: str) -> None:
    """A prompt and then tokens, in ones and in small chunks, is the whole sequence."""
    batch, heads, group, seq, prompt, width = 2, 2, 3, 90, 60, 32
    query = torch.randn(batch, heads * group, seq, width, device=device)
    key = make_keys("cos0.8", batch, heads, seq, width, dtype=torch.float32, device=device)
    value = torch.randn(batch, heads, seq, width, device=device)
    expected = lucid_attention(*(x.double() for x in (query, key, value)), impl="reference")
    key_cache = torch.full((batch, heads, 96, width), math.nan, device=device)
    y_cache = key_cache.clone()
    key_cache[:, :, :prompt] = key[:, :, :prompt]
    y_cache[:, :, :prompt] = precondition(key[:, :, :prompt], value[:, :, :prompt])
    workspace = decode_workspace(batch, heads, device)
    length, outputs = prompt, []
    for size in [1, 1, 3, 1, 5, 16, 1, 2]:
        new = [x[:, :, length : length + size] for x in (query, key, value)]
        outputs.append(
            lucid_attention_with_kvcache(
                *new, key_cache, y_cache, length, workspace=workspace, impl=impl
            )
        )
        length += size
    assert length == seq
    assert relative_error(torch.cat(outputs, 2), expected[:, :, prompt:]) < 5e-6
    assert int(workspace.abs().sum()) == 0


def test_a_prompt_of_any_length_goes_by_pytorch() -> None:
    """More tokens than the kernels take: ``auto`` falls back, a named choice does not."""
    case = Case((40, 0), tokens=300, dtype=torch.float64, y_dtype=torch.float64)
    step = Step(case)
    output, new = step.expected()
    assert relative_error(step.run("auto"), output) < 1e-12
    assert relative_error(step.added()[1], new) < 1e-12
    long = Step(Case((40, 0), tokens=300))
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call"):
        long.run("triton")


@pytest.mark.parametrize("impl", ["triton", "blocked"])
@pytest.mark.parametrize("where", ["key", "y", "query", "value"])
def test_nan_stays_in_its_row_and_head(impl: str, where: str, device: str) -> None:
    step = Step(Case((90, 50), kv_heads=2, group=2), device)
    clean = step.run(impl).clone()
    step = Step(step.case, device)
    if where == "key":
        step.key_cache[1, 0, 7] = math.nan
    elif where == "y":
        step.y_cache[1, 0, 7] = math.nan
    else:
        getattr(step, where)[1, 0] = math.nan
    got = step.run(impl)
    touched = torch.zeros(2, 4, dtype=torch.bool, device=device)
    touched[1, : 1 if where == "query" else 2] = True
    assert bool(got[touched].isnan().all())
    assert torch.equal(got[~touched], clean[~touched])


def test_where_padding_holds_nan(device: str) -> None:
    """What padded tokens hold must not matter, cached or new."""
    case = Case((60, 70), padding="left", tokens=2)
    for impl in ("triton", "blocked"):
        step = Step(case, device)
        assert step.mask is not None
        step.mask[0, 60] = False  # the first new token of row 0
        output, new = step.expected()
        for b in range(2):
            step.key_cache[b, :, ~step.mask[b]] = math.nan
        step.key[0, :, 0] = step.value[0, :, 0] = math.nan
        step.query[0, :, 0] = math.nan
        got = step.run(impl)
        assert relative_error(got.cpu(), output) < 1.5e-3
        assert relative_error(step.added()[1].cpu(), new) < 1e-3
        assert float(got[0, :, 0].abs().max()) == 0.0


@pytest.mark.parametrize("impl", ["triton", "blocked"])
def test_any_strides(impl: str, device: str) -> None:
    """Operands and caches laid out as (batch, seq, heads, width), and with gaps."""
    case = Case((100, 30), tokens=2)
    plain, strided = Step(case, device), Step(case, device)
    for name in ("query", "key", "value", "key_cache", "y_cache"):
        x = getattr(strided, name)
        wide = torch.zeros(
            x.shape[0], x.shape[2], x.shape[1] + 1, x.shape[3] + 8, dtype=x.dtype, device=device
        )
        view = wide.transpose(1, 2)[:, : x.shape[1], :, : x.shape[3]]
        view.copy_(x)
        setattr(strided, name, view)
    assert torch.equal(plain.run(impl), strided.run(impl))
    assert torch.equal(plain.y_cache.nan_to_num(), strided.y_cache.nan_to_num())


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_a_full_cache_on_the_host_raises(impl: str) -> None:
    step = Step(Case((10, 12), capacity=15, tokens=2))
    step.lengths[1] = 14
    before = step.key_cache.clone(), step.y_cache.clone()
    with pytest.raises(ValueError, match=r"the cache is full: 14 cached and 2 new .* of 15"):
        step.run(impl)
    for was, now in zip(before, (step.key_cache, step.y_cache), strict=True):
        assert torch.equal(was.nan_to_num(9.0), now.nan_to_num(9.0))


@pytest.mark.parametrize("impl", ["triton", "blocked"])
def test_a_full_cache_that_the_host_cannot_see(impl: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Its row's output is NaN and its cache untouched; the other row is right."""
    monkeypatch.setattr("lucid_attention.decode.api.check_room", lambda *args: None)
    for lengths in ((10, 14), (10, 99), (10, -3)):
        step = Step(Case((10, 12), capacity=15, tokens=2), device)
        output, _ = step.expected()
        step.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        before = step.key_cache.clone(), step.y_cache.clone()
        got = step.run(impl)
        assert relative_error(got[:1].cpu(), output[:1]) < 1e-3
        assert bool(got[1].isnan().all())
        for was, now in zip(before, (step.key_cache, step.y_cache), strict=True):
            assert torch.equal(was[1].nan_to_num(9.0), now[1].nan_to_num(9.0))


def test_softmax_at_strength_0(device: str) -> None:
    """Then Y is V, and the step is softmax attention."""
    step = Step(Case((50, 50), group=2, dtype=torch.float32, y_dtype=torch.float32), device)
    got = step.run("triton", strength=0.0)
    assert torch.equal(step.added()[1], step.value.double())
    keys, values = (x[:, :, :51] for x in step.dense())
    expected = torch.nn.functional.scaled_dot_product_attention(
        step.query.double(), keys, values, enable_gqa=True
    )
    assert relative_error(got, expected) < 2e-6


def test_no_tokens_and_no_batch() -> None:
    for batch, heads, tokens in ((2, 2, 0), (0, 2, 1), (2, 0, 1)):
        new = torch.zeros(batch, heads, tokens, 16)
        cache = torch.zeros(batch, heads, 8, 16)
        out = lucid_attention_with_kvcache(new, new, new, cache, cache.clone(), 3)
        assert out.shape == new.shape


def test_without_queries_it_only_appends() -> None:
    step = Step(Case((20, 7)))
    _, new = step.expected()
    step.query = step.query[:, :0]
    assert step.run("auto").shape == (2, 0, 1, 32)
    assert relative_error(step.added()[1], new) < 1e-3


def test_tokens_far_apart_in_memory() -> None:
    """Strides times tokens beyond 2^31: nothing of it is touched but the tokens."""
    step, twin = (Step(Case((9,), kv_heads=1, group=1, tokens=16, width=16, value_width=16)) for _ in range(2))  # fmt: skip
    stride = (1 << 31) // 15 + 8
    for name in ("query", "key", "value"):
        x = getattr(step, name)
        # Memory that is reserved and, but for the tokens, never touched.
        storage = torch.UntypedStorage(2 * (15 * stride + 16))
        far = torch.tensor([], dtype=x.dtype).set_(storage, 0, x.shape, (stride, stride, stride, 1))
        far.copy_(x)
        setattr(step, name, far)
    assert torch.equal(step.run("triton" if not torch.cuda.is_available() else "blocked"), twin.run("triton" if not torch.cuda.is_available() else "blocked"))  # fmt: skip


def test_scale_and_kernel_scale() -> None:
    step = Step(Case((40,), dtype=torch.float64, y_dtype=torch.float64))
    query, key, value = torch.randn(3, 1, 2, 41, 32, dtype=torch.float64).unbind(0)
    scales = {"scale": 0.3, "kernel_scale": 0.1}
    expected = lucid_attention(query, key, value, **scales, impl="reference")[:, :, 40:]
    y = precondition(key, value, kernel_scale=0.1, impl="reference")
    caches = [torch.cat([x[:, :, :40], torch.zeros(1, 2, 4, 32)], 2) for x in (key, y)]
    for impl in ("blocked", "reference"):
        got = lucid_attention_with_kvcache(
            query[:, :, 40:], key[:, :, 40:], value[:, :, 40:], *caches, 40, **scales, impl=impl
        )
        assert relative_error(got, expected) < 1e-12
    got = lucid_attention_with_kvcache(
        *(x[:, :, 40:].float() for x in (query, key, value)),
        *(x.float() for x in caches), 40, **scales, impl="triton" if not torch.cuda.is_available() else "blocked",
    )  # fmt: skip
    assert relative_error(got, expected) < 5e-6
    assert step.case.tokens == 1
