"""Replicas are what they would be alone; the Jacobian's probe is the Jacobian."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lucid_attention.reproduce.replicas import Replayed, Replicas, clip_each
from lucid_attention.reproduce.two_phase import off_diagonal


def model(seeds: list[int], **changes: Any) -> Replicas:
    return Replicas(**{"vocabularies": (7, 5), "outputs": 3, "width": 16, "heads": 2, "depth": 2, "attention": "lucid",
                       "position": "rope", "seeds": seeds, **changes})  # fmt: skip


def trained(seeds: list[int], steps: int = 5, **changes: Any) -> Replicas:
    made = model(seeds, **changes)
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    for step in range(steps):
        draws = [torch.Generator().manual_seed(100 * seed + step) for seed in seeds]
        a, b, target = (torch.stack([torch.randint(n, (4, 9), generator=g) for g in draws]) for n in (7, 5, 3))  # fmt: skip
        logits = made(a, b)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")  # fmt: skip
        optimizer.zero_grad()
        loss.view(len(seeds), -1).mean(1).sum().backward()
        clip_each(made, 0.05)  # so small that it always clips
        optimizer.step()
    return made


@pytest.mark.parametrize("attention", ["lucid", "softmax"])
@pytest.mark.parametrize("position", ["rope", "nope"])
def test_side_by_side_is_alone(attention: str, position: str) -> None:
    together = trained([3, 1, 8], attention=attention, position=position)
    for place, seed in enumerate((3, 1, 8)):
        alone = trained([seed], attention=attention, position=position)
        for name, weight in alone.weights.items():
            torch.testing.assert_close(together.weights[name][place], weight[0], rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["lucid", "softmax"])
def test_a_replayed_step_is_the_step(attention: str) -> None:
    """Twelve steps with the graph and without: the same weights; a rate that is filled in is followed."""
    found = {}
    for replayed in (True, False):
        made = model([3, 1, 8], attention=attention).cuda()
        rate = torch.tensor(0.0, device="cuda")
        optimizer = torch.optim.AdamW(made.parameters(), lr=rate, capturable=True)

        def step(a: torch.Tensor, b: torch.Tensor, target: torch.Tensor, made: Replicas = made, optimizer: Any = optimizer) -> torch.Tensor:  # fmt: skip
            logits = made(a, b)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            clip_each(made, 0.05)
            optimizer.step()
            return loss.detach()

        call = Replayed(step, torch.device("cuda")) if replayed else step
        losses = []
        for number in range(12):
            rate.fill_(1e-2 / (number + 1))
            draws = torch.Generator().manual_seed(number)
            inputs = [torch.randint(n, (3, 4, 9), generator=draws).cuda() for n in (7, 5, 3)]
            losses.append(float(call(*inputs)))
        found[replayed] = [torch.tensor(losses), *(w.detach().cpu() for w in made.weights.values())]
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(set(found[True][0].tolist())) == 12


def test_attentions_begin_alike_and_differ() -> None:
    ours, theirs = model([1, 2]), model([1, 2], attention="softmax")
    assert all(torch.equal(a, theirs.weights[n]) for n, a in ours.weights.items())
    ids = torch.randint(7, (2, 3, 20)), torch.randint(5, (2, 3, 20))
    assert not torch.allclose(ours(*ids), theirs(*ids), atol=1e-4)
    first = ours(*(x[..., :11] for x in ids))
    torch.testing.assert_close(first, ours(*ids)[:, :, :11], rtol=1e-4, atol=1e-5)  # causal


def test_a_gain_is_of_what_attention_adds() -> None:
    made = model([1, 2], position="nope")
    hidden = torch.randn(2, 3, 20, 16)
    once, gained = made.attend(hidden, 0), made(*(torch.zeros(2, 3, 20, dtype=torch.int64),) * 2)
    made.gain = 4.0
    torch.testing.assert_close(made.attend(hidden, 0), 4 * once)
    assert not torch.allclose(made(*(torch.zeros(2, 3, 20, dtype=torch.int64),) * 2), gained)


def test_a_head_norm_makes_heads_one_size() -> None:
    """What attention adds no longer depends on the size of the values."""
    plain, normed = model([1]), model([1], head_norm=True)
    hidden = torch.randn(1, 3, 20, 16)
    added = normed.attend(hidden, 0)
    assert not torch.allclose(added, plain.attend(hidden, 0), atol=1e-3)
    with torch.no_grad():
        normed.weights["qkv0"][..., 32:] *= 100
    torch.testing.assert_close(normed.attend(hidden, 0), added, rtol=1e-3, atol=1e-4)


def test_clipping_by_hand() -> None:
    made = model([1, 2])
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.weights["read"].grad[0] += 2.0  # type: ignore[index]
    made.weights["read"].grad[1, 0, 0] = 0.3  # type: ignore[index]
    clip_each(made, 1.0)
    gradient = made.weights["read"].grad
    assert gradient is not None
    assert float(gradient[0].norm()) == pytest.approx(1.0, rel=1e-4)
    assert float(gradient[1].norm()) == pytest.approx(0.3)


def test_correlated_keys() -> None:
    for cosine in (0.0, 0.9):
        made = Replicas(vocabularies=(400,), outputs=1, width=256, heads=1, depth=1, attention="lucid", position="nope",
                        seeds=[1], cosine=cosine)  # fmt: skip
        rows = torch.nn.functional.normalize(made.weights["table0"][0].detach(), dim=-1)
        mean = (rows @ rows.T).triu(1).sum() / (400 * 399 / 2)
        assert float(mean) == pytest.approx(cosine, abs=0.03)


@pytest.mark.parametrize("attention", ["lucid", "softmax"])
def test_the_probe_is_the_jacobian(attention: str) -> None:
    made = Replicas(vocabularies=(10,), outputs=1, width=8, heads=1, depth=1, attention=attention, position="nope",
                    seeds=[1, 2])  # fmt: skip
    with torch.no_grad():
        made.weights["qkv0"].mul_(15)
    found = off_diagonal(made, 6, draws=400)
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (1, 400, 6), generator=generator)[:, :60]
    for replica in (0, 1):
        total = torch.zeros(6, 6)
        for row in range(60):
            hidden = made.embed(digits[:, row : row + 1].expand(2, -1, -1)).detach()

            def attended(x: torch.Tensor, hidden: torch.Tensor = hidden, replica: int = replica) -> torch.Tensor:  # fmt: skip
                whole = torch.stack([x if r == replica else hidden[r, 0] for r in (0, 1)])[:, None]
                return made.attend(whole, 0)[replica, 0]

            jacobian = torch.autograd.functional.jacobian(attended, hidden[replica, 0])
            total += jacobian.square().sum((1, 3))
        assert (total.triu(1) == 0).all()
        exact = 1 - float(total.diagonal().sum() / total.sum())
        assert float(found[replica]) == pytest.approx(exact, abs=0.06) and 0.05 < exact < 0.95
