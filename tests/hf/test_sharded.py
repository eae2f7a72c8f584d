"""FSDP2 on two gloo ranks gives the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from lucid_attention.hf import enable

RANKS = 2


def model_and_batch() -> tuple[LlamaForCausalLM, Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = enable(LlamaForCausalLM(config), strength=torch.tensor([[0.2, 0.6], [0.9, 0.4]]))
    return enable(model, strength="learned").train(), torch.randint(3, 64, (2 * RANKS, 13))


def gradients(model: LlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=RANKS
    )
    model, ids = model_and_batch()
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mine = ids[2 * rank : 2 * rank + 2]
    results = [gradients(model, mine)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    results.append(gradients(model, mine))
    if rank == 0:
        torch.save(results, f"{directory}/gradients.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch with gloo")
def test_fully_sharded_gradients_equal_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=RANKS)
    model, ids = model_and_batch()
    expected = gradients(model, ids)
    for sharded in torch.load(tmp_path / "gradients.pt"):
        assert sharded.keys() == expected.keys()
        assert any("lucid" in name for name in sharded)
        for name, grad in expected.items():
            scale = grad.abs().max().item()
            torch.testing.assert_close(sharded[name], grad, rtol=1e-4, atol=1e-5 * scale + 1e-8)
