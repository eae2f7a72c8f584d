"""Small transformers, one for each seed, trained side by side as one: seeds cost a GPU next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lucid_attention import lucid_attention
from lucid_attention.attention import softmax_attention

__all__ = ["Replayed", "Replicas", "clip_each"]


class Replayed:
    """A training step, replayed as a CUDA graph after three calls: of so small a model, launching takes longer than computing.

    Elsewhere each call runs the step. A call that returns has trained exactly one step either way.

    Args:
        step: takes tensors of the same shapes each time and returns one; it may read nothing back from the device, and its
            optimizer is made with ``capturable``.
        device: of the tensors.
    """

    _BEFORE = 3

    def __init__(self, step: Callable[..., Tensor], device: torch.device) -> None:
        self.step, self.device = step, device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What ``step`` returns; the next call overwrites it."""
        if self.device.type != "cuda":
            return self.step(*inputs)
        if self.graph is None:
            if self.calls == 0:
                self.stream = torch.cuda.Stream(self.device)
            self.calls += 1
            if self.calls <= self._BEFORE:
                # On the stream of the capture, which gradients remember.
                self.stream.wait_stream(torch.cuda.current_stream(self.device))
                with torch.cuda.stream(self.stream):
                    found = self.step(*inputs)
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                return found
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self.step(*self.inputs)
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.found


class Replicas(nn.Module):
    """Transformers that share nothing but their shape; every parameter has a leading axis of seeds, R.

    Each is pre-norm, with RMS norms, and an MLP in every block: ``hidden = sum of embeddings``, then ``depth`` blocks, a norm and a
    linear read-out. Replica ``r`` begins as a model of ``seeds[r]`` alone would, and is trained as it would be: gradients do
    not mix, as long as the loss is a sum over replicas and `clip_each` clips.

    Args:
        vocabularies: sizes of the input's tables, one for each tensor of ids.
        outputs: of the read-out.
        width, heads, depth: of the model; heads divides width.
        attention: "lucid" or "softmax"; it has no parameters.
        position: "rope" or "nope".
        scale: of the scores; None is ``head_dim ** -0.5``.
        head_norm: an RMS norm, without weights, on what each head returns.
        seeds: of the weights.
        cosine: of any two rows of the first table at the beginning; 0 for independent rows.
    """

    def __init__(
        self,
        *,
        vocabularies: Sequence[int],
        outputs: int,
        width: int,
        heads: int,
        depth: int,
        attention: str,
        position: str,
        seeds: Sequence[int],
        cosine: float = 0.0,
        scale: float | None = None,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.depth, self.attention, self.position = heads, depth, attention, position
        self.scale, self.head_norm = scale, head_norm
        self.gain = (
            1.0  # of what attention adds; other values for tests of what makes an answer fail
        )
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def drawn(*shape: int) -> Tensor:
            return torch.stack([0.05 * torch.randn(*shape, generator=g) for g in generators])

        tables = [drawn(size, width) for size in vocabularies]
        if cosine:
            tables[0] = (1 - cosine) ** 0.5 * tables[0] + cosine**0.5 * drawn(1, width)
        weights = {f"table{i}": table for i, table in enumerate(tables)}
        for block in range(depth):
            weights |= {
                f"qkv{block}": drawn(width, 3 * width),
                f"out{block}": drawn(width, width),
                f"up{block}": drawn(width, 4 * width),
                f"down{block}": drawn(4 * width, width),
                f"norm{block}": torch.ones(len(seeds), 2, width),
                f"bias{block}": torch.zeros(len(seeds), 5 * width),
            }
        weights["read"] = drawn(width, outputs)
        weights["read_bias"] = torch.zeros(len(seeds), outputs)
        weights["read_norm"] = torch.ones(len(seeds), width)
        self.weights = nn.ParameterDict(weights)

    def forward(self, *ids: Tensor) -> Tensor:
        """Ids ``(R, batch, length)``, one tensor for each table; returns ``(R, batch, length, outputs)``."""
        return self.read(self.blocks(self.embed(*ids)))

    def embed(self, *ids: Tensor) -> Tensor:
        """``(R, batch, length, width)``."""
        return torch.stack([_rows_of(self.weights[f"table{i}"], x) for i, x in enumerate(ids)]).sum(0)  # fmt: skip

    def blocks(self, hidden: Tensor) -> Tensor:
        """All blocks."""
        for block in range(self.depth):
            hidden = hidden + self.attend(hidden, block)
            hidden = hidden + self._mlp(hidden, block)
        return hidden

    def read(self, hidden: Tensor) -> Tensor:
        """The read-out."""
        normal = _norm(hidden, self.weights["read_norm"])
        return _linear(normal, self.weights["read"]) + self.weights["read_bias"][:, None, None]

    def attend(self, hidden: Tensor, block: int) -> Tensor:
        """What a block's attention adds."""
        replicas, batch, length, width = hidden.shape
        normal = _norm(hidden, self.weights[f"norm{block}"][:, 0])
        split = _linear(normal, self.weights[f"qkv{block}"])
        split = split.view(replicas * batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if self.position == "rope":
            query, key = _rotate(query), _rotate(key)
        function: Callable[..., Tensor] = lucid_attention if self.attention == "lucid" else softmax_attention  # fmt: skip
        found = function(query, key, value, scale=self.scale)
        if (
            self.head_norm
        ):  # what it undoes is a factor of one over the length: the usual epsilon would hide it
            found = torch.nn.functional.rms_norm(found, found.shape[-1:], eps=1e-8)
        found = found.transpose(1, 2).reshape(hidden.shape)
        added = _linear(found, self.weights[f"out{block}"])
        return added if self.gain == 1.0 else self.gain * added

    def _mlp(self, hidden: Tensor, block: int) -> Tensor:
        width = hidden.shape[-1]
        bias = self.weights[f"bias{block}"][:, None, None]
        normal = _norm(hidden, self.weights[f"norm{block}"][:, 1])
        up = torch.nn.functional.gelu(_linear(normal, self.weights[f"up{block}"]) + bias[..., : 4 * width])  # fmt: skip
        return _linear(up, self.weights[f"down{block}"]) + bias[..., 4 * width :]


def clip_each(model: Replicas, largest: float) -> None:
    """Scale each replica's gradient to a norm of at most ``largest``, by itself."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))


def _rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """``table[r, ids[r]]``, as a product: a gradient by index adds up thousands of positions a key one after another."""
    chosen = ids.flatten(1)[..., None] == torch.arange(table.shape[1], device=ids.device)
    return torch.bmm(chosen.to(table.dtype), table).view(*ids.shape, -1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    replicas, batch, length, width = x.shape
    return torch.bmm(x.reshape(replicas, batch * length, width), weight).view(*x.shape[:3], -1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:]) * weight[:, None, None]


def _rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary position encoding, ``(.., length, head_dim)``; Su et al., arXiv 2104.09864."""
    length, width = x.shape[-2:]
    frequency = base ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = torch.arange(length, device=x.device)[:, None] * frequency
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), -1)
