"""Bad input: every error names the argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lucid_attention import (
    lucid_attention,
    lucid_attention_varlen,
    precondition,
    precondition_varlen,
)
from lucid_attention.precondition import implementation


def dense(**changes: Any) -> dict[str, Any]:
    return {"key": torch.randn(2, 3, 10, 8), "value": torch.randn(2, 3, 10, 4), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    operands = {"key": torch.randn(10, 3, 8), "value": torch.randn(10, 3, 4), "cu_seqlens": offsets}
    return {**operands, **changes}


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


R = torch.randn
DENSE_CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": [1.0]}, TypeError, r"key must be a tensor \(batch, heads, seq, head_dim\), got list"),
    ({"value": None}, TypeError, r"value must be a tensor .* got None"),
    ({"key": R(3, 10, 8)}, ValueError, r"key must have 4 dimensions .* got 3 \(3, 10, 8\)"),
    ({"key": torch.ones(2, 3, 10, 8, dtype=torch.int64)}, TypeError, r"key must be float16.*int64.*key\.float\(\)"),
    ({"value": R(2, 3, 10, 4).to(torch.complex64)}, TypeError, r"value must be .* got torch.complex64"),
    ({"value": R(2, 3, 10, 4).double()}, TypeError, r"value must have key's dtype, expected torch.float32, got torch.float64"),
    ({"value": R(2, 3, 10, 4, device="meta")}, ValueError, r"value must be on key's device, expected cpu, got meta"),
    ({"value": R(1, 3, 10, 4)}, ValueError, r"value must have key's batch, expected 2, got 1"),
    ({"value": R(2, 6, 10, 4)}, ValueError, r"value must have key's heads, expected 3, got 6.*GQA"),
    ({"value": R(2, 3, 11, 4)}, ValueError, r"value must have key's seq, expected 10, got 11"),
    ({"key": R(2, 3, 10, 8).to_sparse()}, TypeError, r"key must be a dense tensor, got torch.sparse_coo"),
    ({"key": R(2, 3, 10, 0)}, ValueError, r"key must have head_dim >= 1"),
    ({"value": R(2, 3, 10, 0)}, ValueError, r"value must have head_dim >= 1"),
    ({"out_dtype": "float32"}, TypeError, r"out_dtype must be a torch.dtype or None, got str"),
    ({"out_dtype": torch.float16}, ValueError, r"out_dtype must be value's dtype \(torch.float32\).*got torch.float16"),
    ({"kernel_scale": 0.0}, ValueError, r"kernel_scale must be positive, got 0.0.*None"),
    ({"kernel_scale": -1}, ValueError, r"kernel_scale must be positive, got -1"),
    ({"kernel_scale": math.inf}, ValueError, r"kernel_scale must be finite, got inf"),
    ({"kernel_scale": math.nan}, ValueError, r"kernel_scale must be finite, got nan"),
    ({"kernel_scale": torch.tensor(1.0)}, TypeError, r"kernel_scale must be a Python float.*got Tensor"),
    ({"kernel_scale": True}, TypeError, r"kernel_scale must be a Python float.*got bool"),
    ({"strength": 1.5}, ValueError, r"strength must lie in \[0, 1\].*got 1.5"),
    ({"strength": -0.1}, ValueError, r"strength must lie in \[0, 1\].*got -0.1"),
    ({"strength": math.nan}, ValueError, r"strength must lie in \[0, 1\].*got nan"),
    ({"strength": "1"}, TypeError, r"strength must be None, a float .* got str"),
    ({"strength": True}, TypeError, r"strength must be None, a float .* got bool"),
    ({"strength": torch.ones(3, dtype=torch.bfloat16)}, TypeError, r"strength must be float32 .*strength\.float\(\)"),
    ({"strength": torch.ones(2)}, ValueError, r"strength must be .* expected \(3,\), got \(2,\)"),
    ({"strength": torch.tensor(0.5)}, ValueError, r"strength must be .* expected \(3,\), got \(\)"),
    ({"strength": torch.ones(3, device="meta")}, ValueError, r"strength must be on key's device"),
    ({"strength": torch.tensor([0.0, 1.0, 1.1])}, ValueError, r"strength must lie in \[0, 1\], got values from 0 to 1.1"),
    ({"strength": torch.tensor([0.0, -1e-3, 1.0])}, ValueError, r"strength must lie .* from -0.001 to 1.*Clamp"),
    ({"key_mask": [True]}, TypeError, r"key_mask must be a bool tensor or None, got list"),
    ({"key_mask": torch.ones(2, 10)}, TypeError, r"key_mask must be bool .* attention_mask\.bool\(\)"),
    ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, r"key_mask must have shape \(batch, seq\), expected \(2, 10\), got \(2, 9\)"),
    ({"key_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool)}, ValueError, r"key_mask .* 4-D mask has no bounded solve"),
    ({"key_mask": torch.ones(2, 10, dtype=torch.bool, device="meta")}, ValueError, r"key_mask must be on key's device"),
    ({"past": R(2, 3, 5, 8)}, TypeError, r"past must be None or a pair .* got Tensor"),
    ({"past": (R(2, 3, 5, 8),)}, TypeError, r"past must be None or a pair .* got 1 items"),
    ({"past": (R(2, 3, 5, 8), None)}, TypeError, r"past\[1\] \(past_preconditioned\) must be a tensor"),
    ({"past": (R(2, 3, 5, 7), R(2, 3, 5, 4))}, ValueError, r"past\[0\] \(past_key\) must have key's head_dim, expected 8, got 7"),
    ({"past": (R(2, 3, 5, 8), R(2, 3, 5, 5))}, ValueError, r"past\[1\] .* must have value's head_dim, expected 4, got 5"),
    ({"past": (R(1, 3, 5, 8), R(1, 3, 5, 4))}, ValueError, r"past\[0\] .* must have key's batch, expected 2, got 1"),
    ({"past": (R(2, 6, 5, 8), R(2, 6, 5, 4))}, ValueError, r"past\[0\] .* must have key's heads, expected 3, got 6"),
    ({"past": (R(2, 3, 5, 8), R(2, 3, 6, 4))}, ValueError, r"past must hold as many keys .* got 5 keys and 6 values"),
    ({"past": (R(2, 3, 5, 8).double(), R(2, 3, 5, 4))}, TypeError, r"past\[0\] .* must have key's dtype"),
    ({"past": (R(2, 3, 5, 8, device="meta"), R(2, 3, 5, 4))}, ValueError, r"past\[0\] .* must be on key's device"),
    ({"past": (R(2, 3, 5, 8), torch.ones(2, 3, 5, 4, dtype=torch.int32))}, TypeError, r"past\[1\] .* must be float16.*int32"),
    ({"precision": "highest"}, ValueError, r"precision must be one of .*'high'.* got 'highest'"),
    ({"precision": torch.float32}, TypeError, r"precision must be a string"),
    ({"impl": "fast"}, ValueError, r"impl must be one of .*'auto'.* got 'fast'"),
    ({"impl": None}, TypeError, r"impl must be a string"),
]  # fmt: skip

PACKED_CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"key": R(1, 10, 3, 8)}, ValueError, r"key must have 3 dimensions \(total, heads, head_dim\), got 4"),
    ({"value": R(9, 3, 4)}, ValueError, r"value must have key's total, expected 10, got 9"),
    ({"cu_seqlens": [0, 10]}, TypeError, r"cu_seqlens must be an int32 tensor, got list"),
    ({"cu_seqlens": torch.tensor([0, 10])}, TypeError, r"cu_seqlens must be int32, got torch.int64.*to\(torch.int32\)"),
    ({"cu_seqlens": ints(0, 10)[None]}, ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\), got \(1, 2\)"),
    ({"cu_seqlens": ints()}, ValueError, r"cu_seqlens must have shape \(sequences \+ 1,\), got \(0,\)"),
    ({"cu_seqlens": ints(0)}, ValueError, r"cu_seqlens of one offset holds no sequence.*One sequence is \[0, 10\]"),
    ({"cu_seqlens": ints(0), "max_seqlen": 10}, ValueError, r"holds no sequence, but there are 10 packed tokens"),
    ({"cu_seqlens": ints(0, 10).to("meta")}, ValueError, r"cu_seqlens must be on key's device"),
    ({"cu_seqlens": ints(1, 10)}, ValueError, r"cu_seqlens must start at 0, got 1"),
    ({"cu_seqlens": ints(0, 9)}, ValueError, r"cu_seqlens must end at .*expected 10, got 9"),
    ({"cu_seqlens": ints(0, 11)}, ValueError, r"cu_seqlens must end at .*expected 10, got 11"),
    ({"cu_seqlens": ints(0, 6, 4, 10)}, ValueError, r"cu_seqlens must not decrease, got 6 then 4 at positions 1 and 2"),
    ({"max_seqlen": 5}, ValueError, r"max_seqlen must be at least the longest packed sequence, expected 6 or more, got 5"),
    ({"max_seqlen": -1}, ValueError, r"max_seqlen must not be negative"),
    ({"max_seqlen": 6.0}, TypeError, r"max_seqlen must be an int or None, got float"),
    ({"max_seqlen": torch.tensor(6)}, TypeError, r"max_seqlen must be an int or None, got Tensor"),
    ({"strength": 2}, ValueError, r"strength must lie in"),
    ({"kernel_scale": 0}, ValueError, r"kernel_scale must be positive"),
]  # fmt: skip

QUERY_CASES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": 3}, TypeError, r"query must be a tensor .* got int"),
    ({"query": R(2, 3, 10, 8).double()}, TypeError, r"query must have key's dtype"),
    ({"query": R(2, 3, 10, 4)}, ValueError, r"query must have key's head_dim, expected 8, got 4"),
    ({"query": R(1, 3, 10, 8)}, ValueError, r"query must have key's batch, expected 2, got 1"),
    ({"query": R(2, 3, 1, 8)}, ValueError, r"query must have key's seq, expected 10, got 1.*past"),
    ({"query": R(2, 4, 10, 8)}, ValueError, r"query heads must be a multiple .* got 4 query heads for 3 KV heads"),
    ({"key": R(2, 0, 10, 8), "value": R(2, 0, 10, 4)}, ValueError, r"query heads must be a multiple .* got 6 query heads for 0 KV heads"),
    ({"query": R(2, 6, 10, 8, device="meta")}, ValueError, r"query must be on key's device"),
    ({"scale": math.inf}, ValueError, r"scale must be finite"),
    ({"scale": "1"}, TypeError, r"scale must be a Python float"),
    ({"key_mask": torch.ones(2, 10)}, TypeError, r"key_mask must be bool"),
]  # fmt: skip

Case = tuple[dict[str, Any], type[Exception], str]


def expect(function: Callable[..., Any], arguments: dict[str, Any], case: Case) -> None:
    changes, error, message = case
    with pytest.raises(error, match=message) as caught:
        function(**{**arguments, **changes})
    assert type(caught.value) is error
    assert str(caught.value).endswith((".", ")"))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("case", DENSE_CASES, ids=lambda case: case[2][:40])
def test_dense(impl: str, case: Case) -> None:
    expect(precondition, dense(impl=impl), case)


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda case: case[2][:40])
def test_packed(impl: str, case: Case) -> None:
    expect(precondition_varlen, packed(impl=impl), case)


@pytest.mark.parametrize("case", QUERY_CASES, ids=lambda case: case[2][:40])
def test_query(case: Case) -> None:
    expect(lucid_attention, dense(query=R(2, 6, 10, 8)), case)


def test_packed_query() -> None:
    arguments = packed(query=R(10, 6, 8))
    lucid_attention_varlen(**arguments)
    expect(
        lucid_attention_varlen,
        arguments,
        ({"query": R(9, 6, 8)}, ValueError, "query must have key's total, expected 10, got 9"),
    )
    expect(
        lucid_attention_varlen,
        arguments,
        ({"cu_seqlens": ints(0, 9)}, ValueError, "cu_seqlens must end at"),
    )


def test_good_input_passes() -> None:
    """The arguments that the cases above change are right as they stand."""
    precondition(**dense())
    precondition(**dense(), kernel_scale=np.float32(0.5), strength=np.float64(0.5))
    precondition(torch.randn(0, 3, 10, 8), torch.randn(0, 3, 10, 4))
    precondition(torch.randn(2, 0, 10, 8), torch.randn(2, 0, 10, 4))
    precondition_varlen(**packed())
    lucid_attention(**dense(query=R(2, 6, 10, 8)))
    lucid_attention(**dense(query=R(2, 6, 10, 8)), scale=-1.0)  # a softmax takes any finite scale


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, r"impl='triton' cannot serve this call: the kernels run on CUDA devices, .*Use impl='auto'"),
    ({"dtype": torch.float64}, r"cannot serve this call: the kernels take float16, .*got torch.float64"),
    ({"width": 260}, r"cannot serve this call: the kernels take head sizes up to 256, got 260"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_kernels_are_refused_by_name(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementation, "_interpreted", lambda: False)
    dtype, width = change.get("dtype", torch.float32), change.get("width", 8)
    key = torch.randn(1, 1, 10, width, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        precondition(key, key, impl="triton")
    with pytest.raises(ValueError, match=message):
        precondition_varlen(
            key[0].transpose(0, 1), key[0].transpose(0, 1), ints(0, 10), impl="triton"
        )
    assert precondition(key, key).shape == key.shape  # auto does without them
