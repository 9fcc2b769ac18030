"""Weight gradients of many weighted sums of samples, from one backward pass.

A linear layer y_i = W x_i that sees the samples i side by side has, for any factors c_ki, the gradient

    grad_W sum_i c_ki L_i = sum_i c_ki (dL_i / dy_i) x_i^T

and one backward pass of sum_i L_i gives every dL_i / dy_i, since the samples do not meet. For the two thin layers of a LoRA the
outer products are small, so that more rows of factors cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LinearTape:
    """Keeps what the trained linear layers of some modules were given and gave.

    Raises ValueError where something else than the weight of a linear layer trains.
    """

    def __init__(self, modules: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter]):
        self.layers = [m for root in modules for m in root.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        places = {id(p): k for k, p in enumerate(parameters.values())}
        self.places = [places[id(layer.weight)] for layer in self.layers]
        if len(set(self.places)) != len(places):
            names = [name for k, name in enumerate(parameters) if k not in self.places]
            raise ValueError(
                f"balance.gram=lora reads the weights of linear layers, and {names[0]} is none: use balance.gram=exact"
            )
        self.calls: list[tuple[int, Tensor, Tensor]] = []
        self.nested: bool | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Forward passes with graph inside the block are kept, until the next block."""
        self.calls = []

        def keep(place: int) -> Any:
            def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if output.requires_grad:
                    self.calls.append((place, inputs[0].detach(), output))

            return hook

        handles = [layer.register_forward_hook(keep(place)) for layer, place in zip(self.layers, self.places, strict=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, into: Sequence[Tensor], v: Tensor, q: Tensor, factors: Tensor) -> set[int]:
        """Add the gradients of sum_i factors_ki <q_i, v_i> to into[place][k] (fp32). Returns the places that have one.

        v: (B, ...) what the recorded passes led to. q: (B, ...). factors: (K, B).
        """
        if self.nested is None:
            self.nested = self._find_order(v)
        touched = set()
        outputs = [output for *_, output in self.calls]
        deltas = torch.autograd.grad(v, outputs, q.to(v), retain_graph=True, allow_unused=True)
        for (place, x, _), delta in zip(self.calls, deltas, strict=True):
            if delta is None:
                continue
            rows = len(x)
            outer = torch.bmm(delta.reshape(rows, -1, delta.shape[-1]).float().mT, x.reshape(rows, -1, x.shape[-1]).float())
            of_sample = outer.unflatten(0, (len(v), -1)).sum(1) if self.nested else outer.unflatten(0, (-1, len(v))).sum(0)
            into[place].add_(torch.einsum("kb,boi->koi", factors.float(), of_sample).view_as(into[place]))
            touched.add(place)
        return touched

    def _find_order(self, v: Tensor) -> bool:
        """Whether the rows that a layer sees for one sample follow each other (frames), or are B apart (guidance).

        Found from the gradient of the first sample alone. Raises ValueError where they are neither.
        """
        q = torch.zeros_like(v)
        q[0] = torch.randn(v.shape[1:], generator=torch.Generator().manual_seed(0)).to(v)
        deltas = torch.autograd.grad(v, [output for *_, output in self.calls], q, retain_graph=True, allow_unused=True)
        apart = follow = True
        for (_, x, _), delta in zip(self.calls, deltas, strict=True):
            rows, B = len(x), len(v)
            if rows % B:
                apart = follow = False
            elif delta is not None:
                alive = set(delta.flatten(1).abs().sum(1).nonzero().flatten().tolist())
                apart &= alive <= set(range(0, rows, B))
                follow &= alive <= set(range(rows // B))
        if not (apart or follow):
            raise ValueError(
                "balance.gram=lora cannot tell which rows of a layer belong to a sample (states that samples share, as with "
                "branches, or an unusual model): use balance.gram=exact"
            )
        return not apart
