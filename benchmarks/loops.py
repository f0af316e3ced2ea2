"""The loops that users write, one forward pass per patch or a few patches in one, and the limit that matrix products set."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE
from shapes import Gemma2Shape, Shape


@dataclass(frozen=True)
class Products:
    """The multiply-adds of a layer's matrix products per row, without those within attention.

    Attributes:
        query, key_value, out, mlp: those of the queries, of keys and values, of the output of attention, and of the MLP.
    """

    query: int
    key_value: int
    out: int
    mlp: int

    @classmethod
    def of(cls, shape: Shape | Gemma2Shape) -> "Products":
        """Return those of a model with random weights."""
        queries = shape.width * shape.queries
        return cls(queries, 2 * shape.width * shape.keys, queries, shape.mlp)

    def needed(self, layers: int, rows: int, patches: int, changed: int) -> float:
        """Return the floating-point operations that patches of the residual stream that enters a layer need.

        The first layer needs queries, keys and values of the changed rows only; the last layer needs all but keys and values
        for the answer rows only.

        Args:
            layers: the number of layers from this one on.
            rows: the number of positions from the patched one on, over all patches.
            patches: the number of patches.
            changed: the number of patched positions, over all patches.
        """
        rest = self.out + self.mlp
        first = (self.query + self.key_value) * changed + rest * rows
        between = (self.query + self.key_value + rest) * rows * (layers - 2)
        return 2.0 * (first + between + self.key_value * rows + (self.query + rest) * patches)


def clock(device: str) -> float:
    """Return the current time in seconds: the CPU time of this process, or the wall time after the GPU has finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def timed(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    """Return the seconds that a call takes, and its result."""
    start = clock(device)
    result = run()
    return clock(device) - start, result


def read(logits: torch.Tensor, answers: tuple[int, int]) -> torch.Tensor:
    """Return the logit difference of a right and a wrong answer at the last token."""
    return logits[:, -1, answers[0]] - logits[:, -1, answers[1]]


@torch.no_grad()
def saelens_loop(
    model: Any, sae: SAE, tokens: torch.Tensor, answers: tuple[int, int], patches: list[tuple[int, int, float]]
) -> list[float]:
    """Run loop (a): one forward pass with the SAE and its error term attached for each (feature, position, value)."""
    found = []
    bridge = isinstance(model, SAETransformerBridge)
    hook = model.get_sae_hook_name(sae) if bridge else f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    sae.use_error_term = True
    for feature, position, value in patches:

        def put(acts: torch.Tensor, hook: Any, at: tuple[int, int] = (position, feature), value: float = value) -> torch.Tensor:
            acts[0, at[0], at[1]] = value
            return acts

        logits = model.run_with_hooks_with_saes(tokens, saes=[sae], fwd_hooks=[(hook, put)])
        found.append(float(read(logits, answers)))
    sae.use_error_term = False
    return found


@torch.no_grad()
def hook_loop(
    model: Any, hook: str, tokens: torch.Tensor, answers: tuple[int, int], patches: list[tuple[int, torch.Tensor]], batch: int
) -> list[float]:
    """Run loop (b) or (c): one row for each (position, change), with `batch` rows per forward pass."""
    found: list[float] = []
    for start in range(0, len(patches), batch):
        part = patches[start : start + batch]

        def add(activation: torch.Tensor, hook: Any, part: list[tuple[int, torch.Tensor]] = part) -> torch.Tensor:
            activation = activation.clone()
            for row, (position, change) in enumerate(part):
                activation[row, position] += change.view_as(activation[row, position])
            return activation

        logits = model.run_with_hooks(tokens.expand(len(part), -1), fwd_hooks=[(hook, add)])
        found += read(logits, answers).tolist()
    return found


def matrix_rate(width: int, hidden: int, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Measure the floating-point operations per second of a matrix product of many rows with the shape of the MLP."""
    rows, work = (16384, 5e12) if device.startswith("cuda") else (1024, 5e10)
    a, w = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, width), (width, hidden)))
    product, operations = torch.empty(rows, hidden, device=device, dtype=dtype), 2 * rows * hidden * width
    repeats = 1 + int(work // operations)

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(a, w, out=product)

    return statistics.median(repeats * operations / timed(multiply, device)[0] for _ in range(5))


def gelu_rate(hidden: int, device: str) -> float:
    """Measure the numbers per second of GELU, of as many rows as in `matrix_rate` on a CPU."""
    x, repeats = torch.randn(1024, hidden, device=device), 20

    def activate() -> None:
        for _ in range(repeats):
            torch.nn.functional.gelu(x, approximate="tanh")

    return statistics.median(repeats * x.numel() / timed(activate, device)[0] for _ in range(5))
