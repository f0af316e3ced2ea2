"""Exactness and cost of patches on a GPU: featpatch against the loops that users write, and against float64.

    python benchmarks/gpu.py                         # on a CUDA device, in at most 8 minutes
    python benchmarks/gpu.py --device cpu --small    # a test of this script, with small shapes

Models have the shapes of GPT-2 small and Gemma 2 2B and random weights, which bfloat16 represents exactly, so that all
precisions compute the same model. They run in float32 without and with TF32 and in bfloat16; the SAE is in float32, except in
loop (a) on a bfloat16 model. The prompts of the pair differ in one token. Every feature that differs is patched at every
position from there on, in both directions. Times are medians over repeats of wall times, from after a first sweep until the GPU
has finished, with everything included (checks, base runs); on the CPU they are CPU times. Loops and limit are those of
`sweep.py`.

A row is printed to standard error as soon as it is measured, and the tables at the end. What there is no time for is skipped
and listed below the tables. Differences are shares of the largest logit:

    from (a)       the largest difference of a value from loop (a), SAELens in the same precision
    from (b)       the same for loop (b), TransformerLens hooks
    from float64   the largest difference from the same changes made by hooks in a float64 model, and that of loop (b)
    z by hooks     the same as "from (b)" for outputs of heads
    recovery - 1   how far the recovery is from 1, its exact value, if the whole residual stream is replaced
    own pass       the largest difference of the fast forward pass from the model's own, which is used with hooks attached
"""

import argparse
import copy
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from memory import peak_of
from shapes import GEMMA2_SHAPES, SHAPES, Gemma2Shape, Shape, bridged, dictionary, gemma2, gpt2, hooked, sae_bridge
from sweep import CORRECT, WRONG, hook_loop, matrix_rate, products, read, saelens_loop, timed

import featpatch as fp

LENGTH = 20
CONTEXT = 64
REPEATS, TOP = 3, 20
LOOPED, BATCHED, FEW = 6, 64, 8
"""The number of patches that loops (a) and (b) run, that loop (c) runs, and that float64 runs."""
PRECISIONS = {
    "float32": (torch.float32, False),
    "float32 with TF32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
"""The dtype of the model, and whether matrix products in float32 are rounded to TF32."""
TABLES = {
    "Cost": ("per patch", "of the limit", "faster than (a)", "than (b)", "than (c)", "peak memory"),
    "Exactness": ("from (a)", "from (b)", "from float64", "(b) from float64", "z by hooks", "recovery - 1", "own pass"),
    "Screening": ("features", "full sweep", "estimates", "screened", "patched", "Pearson", "of the true top 20 patched"),
}
"""The columns of each table, after the first one, which names model and precision."""


@dataclass
class Session:
    """The tables measured so far, and the time that is left.

    Attributes:
        device: the device.
        deadline: when to stop, by `time.monotonic()`.
        rows: the rows of each table.
        skipped: what was not measured, and why.
        failed: whether anything failed for another reason than the time.
    """

    device: str
    deadline: float
    rows: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in TABLES})
    skipped: list[str] = field(default_factory=list)
    failed: bool = False

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.deadline - time.monotonic()

    def attempt(self, what: str, seconds: float, measure: Callable[[], Any]) -> Any:
        """Measure something if that many seconds are left; a failure is noted, and the next measurements go on."""
        if self.left < seconds:
            self.skipped.append(f"{what}: {max(self.left, 0):.0f} s were left, and it needs about {seconds:.0f} s")
            return None
        start = time.monotonic()
        try:
            return measure()
        except Exception as error:
            traceback.print_exc()
            self.skipped.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
            self.failed |= not isinstance(error, torch.OutOfMemoryError)
            return None
        finally:
            print(f"[{what}: {time.monotonic() - start:.1f} s, {self.left:.0f} s left]", file=sys.stderr, flush=True)

    def row(self, table: str, *cells: str) -> None:
        """Add a row to a table, and show it."""
        self.rows[table].append("| " + " | ".join(cells) + " |")
        print(f"{table}: {self.rows[table][-1]}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print all tables as Markdown, and what was skipped."""
        for name, columns in TABLES.items():
            print(f"\n{name}:\n\n| model, precision | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
            print("\n".join(self.rows[name]))
        print("\nSkipped:" if self.skipped else "\nNothing was skipped.")
        print("\n".join(f"- {what}" for what in self.skipped))


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products of float32 within this context, and restore the setting afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Case:
    """A model in a precision, with the patches that are measured.

    Attributes:
        name: a description.
        shape: the model's shape.
        model: the model.
        with_saes: the same model, for loop (a).
        exact: the same model in float64, or None.
        sae: the SAE.
        dtype: the dtype of the model.
        rate: the floating-point operations per second of a large matrix product in this precision.
        device: the device.
        change: the position of the token that differs.
    """

    name: str
    shape: Shape
    model: Any
    with_saes: Any
    exact: Any
    sae: Any
    dtype: torch.dtype
    rate: float
    device: str
    change: int = LENGTH // 2

    @property
    def hook(self) -> str:
        """The hook point of the SAE."""
        return str(self.sae.cfg.metadata.hook_name)

    def tokens(self, run: str) -> torch.Tensor:
        """Return the clean or the corrupted prompt, `[1, pos]`."""
        tokens = torch.randint(3, self.shape.vocab, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        if run == "corrupted":
            tokens[0, self.change] = 3 + (tokens[0, self.change] - 2) % (self.shape.vocab - 3)
        return tokens

    def pairs(self) -> fp.Pairs:
        """Return the pair."""
        return fp.Pairs.from_tokens(
            self.tokens("clean"), self.tokens("corrupted"), torch.tensor([CORRECT]), torch.tensor([WRONG])
        )

    def sweep(self) -> fp.Effects:
        """Patch every feature and the error at every position."""
        return fp.rank_features(self.model, self.sae, self.pairs(), positions=[*range(self.change, LENGTH)], progress=False)

    @torch.no_grad()
    def activations(self, hook: str, run: str) -> torch.Tensor:
        """Return activations `[pos, ...]` at a hook point."""
        kept: list[torch.Tensor] = []

        def keep(activation: torch.Tensor, hook: Any) -> None:
            kept.append(activation[0].clone())

        self.model.run_with_hooks(self.tokens(run).to(self.device), fwd_hooks=[(hook, keep)])
        return kept[0]

    def changes(self, nodes: list[fp.Node]) -> list[tuple[int, torch.Tensor]]:
        """Return the positions and changes of features that take their value of the clean run."""
        with torch.no_grad():
            clean, corrupted = (self.sae.encode(self.activations(self.hook, run).float()) for run in ("clean", "corrupted"))
            return [
                (int(at), (clean - corrupted)[at, node.index] * self.sae.W_dec[node.index])
                for node in nodes
                for at in [int(node.position)]
            ]

    def values(self, nodes: list[fp.Node]) -> list[tuple[int, int, float]]:
        """Return features, positions and values of the clean run."""
        with torch.no_grad():
            clean = self.sae.encode(self.activations(self.hook, "clean").float())
        return [(int(n.index), int(n.position), float(clean[n.position, n.index])) for n in nodes]

    def largest(self) -> float:
        """Return the largest logit of the corrupted prompt."""
        with torch.no_grad():
            return float(self.model(self.tokens("corrupted").to(self.device)).abs().max())


def denoised(effects: fp.Effects) -> dict[fp.Node, float]:
    """Return the metric of each node's patch of the corrupted run."""
    return {effects.nodes[row]: float(value) for row, value in zip(effects.row, effects.denoised, strict=True)}


def apart(one: list[float], other: list[float]) -> float:
    """Return the largest difference between two lists of values."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def measure(session: Session, case: Case, seconds: float) -> None:
    """Measure the cost and the exactness of a case, with repeats for about that many seconds."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", fp.SlowPathWarning)
        took, _ = timed(case.sweep, case.device)
    slow = [str(each.message) for each in warned if issubclass(each.category, fp.SlowPathWarning)]
    for message in slow:
        print(f"slow path: {message}", file=sys.stderr, flush=True)
    name = case.name + " (slow path)" * bool(slow)
    effects, peak = peak_of(case.sweep, case.device)
    values, patches = denoised(effects), 2 * len(effects.row)
    features = [node for node in values if node.kind == "feature"]
    print(f"{name}: {patches} patches; the first sweep took {took:.1f} s, digests included", file=sys.stderr, flush=True)

    tokens, draw = case.tokens("corrupted").to(case.device), random.Random(0)
    few, many = draw.sample(features, min(LOOPED, len(features))), draw.sample(features, min(BATCHED, len(features)))
    its_sae = case.sae if case.dtype == torch.float32 else copy.deepcopy(case.sae).to(dtype=case.dtype)
    asked, of_few, of_many = case.values(few), case.changes(few), case.changes(many)
    loops: dict[str, tuple[int, Callable[[], list[float]]]] = {
        "a": (len(few), lambda: saelens_loop(case.with_saes, its_sae, tokens, asked)),
        "b": (len(few), lambda: hook_loop(case.model, case.hook, tokens, of_few, 1)),
        "c": (len(many), lambda: hook_loop(case.model, case.hook, tokens, of_many, 32)),
    }
    for _, run in loops.values():
        run()  # the first one chooses kernels
    times: dict[str, list[float]] = {name: [] for name in ("featpatch", *loops)}
    found: dict[str, list[float]] = {}
    until = time.monotonic() + seconds
    for repeat in range(REPEATS):
        if repeat and time.monotonic() > until:
            break
        times["featpatch"].append(timed(case.sweep, case.device)[0] / patches)
        for loop, (count, run) in loops.items():
            of_loop, found[loop] = timed(run, case.device)
            times[loop].append(of_loop / count)
    median = {each: statistics.median(values) for each, values in times.items()}
    rows = 2 * sum(LENGTH - int(effects.nodes[row].position) for row in effects.row)
    limit = products(case.shape, rows, patches, patches) / patches / case.rate
    faster = [f"{median[loop] / median['featpatch']:.1f} x" for loop in loops]
    ours = median["featpatch"]
    session.row("Cost", name, f"{ours * 1e3:.4f} ms", f"{ours / limit:.2f} x", *faster, f"{peak:.0f} MB")

    largest, some = case.largest(), draw.sample(features, min(FEW, len(features)))
    loops_apart = [apart([values[node] for node in few], found[loop]) / largest for loop in "ab"]
    exact = ["", ""]
    if case.exact is not None:
        changes = case.changes(some)
        by_hooks = hook_loop(case.model, case.hook, tokens, changes, 1)
        true = hook_loop(case.exact, case.hook, tokens, [(at, change.double()) for at, change in changes], 1)
        exact = [f"{apart(each, true) / largest:.1e}" for each in ([values[node] for node in some], by_hooks)]
    others = [heads(case) / largest, stream(case), own_pass(case, effects) / largest]
    session.row(
        "Exactness", name, *(f"{each:.1e}" for each in loops_apart), *exact, *(f"{each:.1e}" for each in others)
    )  # fmt: skip


@torch.no_grad()
def heads(case: Case) -> float:
    """Return the largest difference from TransformerLens hooks for heads at the last position, patched at the SAE's layer."""
    hook, end = f"blocks.{case.shape.layer}.attn.hook_z", LENGTH - 1
    effects = fp.rank_components(
        case.model, case.pairs(), sites="z", layers=[case.shape.layer], positions=[end], progress=False
    )  # fmt: skip
    clean, by_hooks = case.activations(hook, "clean"), []
    values = denoised(effects)
    for node in values:

        def put(z: torch.Tensor, hook: Any, head: Any = node.index) -> torch.Tensor:
            z = z.clone()
            z.view(*z.shape[:2], case.shape.heads, -1)[0, end, head] = clean.view(LENGTH, case.shape.heads, -1)[end, head]
            return z

        logits = case.model.run_with_hooks(case.tokens("corrupted").to(case.device), fwd_hooks=[(hook, put)])
        by_hooks += read(logits).tolist()
    return apart([*values.values()], by_hooks)


def stream(case: Case) -> float:
    """Return how far the recovery is from 1 when the residual stream is replaced at all positions."""
    effects = fp.rank_components(case.model, case.pairs(), sites="resid_pre", layers=[case.shape.layer], progress=False)
    return float(max(abs(effects.pooled("recovery") - 1)))


def own_pass(case: Case, effects: fp.Effects) -> float:
    """Return the largest difference of some values when the model's own pass is used, as it is if a hook is attached."""
    end = LENGTH - 1
    case.model.add_hook("hook_embed", lambda activation, hook: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fp.SlowPathWarning)
            slow = fp.rank_features(case.model, case.sae, case.pairs(), positions=[end], progress=False)
    finally:
        case.model.reset_hooks()
    fast = denoised(effects)
    return max(abs(fast[node] - value) for node, value in denoised(slow).items())


def screened(session: Session, case: Case) -> None:
    """Measure a sweep of all features, their estimates and a screened sweep, and what screening found."""
    options: dict[str, Any] = {"positions": [*range(case.change, LENGTH)], "progress": False}
    subject = case.model, case.sae, case.pairs()
    fp.rank_features(*subject, method="atp", **options)
    sweeping, full = timed(lambda: fp.rank_features(*subject, **options), case.device)
    estimating, estimates = timed(lambda: fp.rank_features(*subject, method="atp", **options), case.device)
    features = full.where(kind="feature")
    screen = fp.Screen(k=len(features) // 4, audit=len(features) // 8, top=TOP)
    screening, chosen = timed(lambda: fp.rank_features(*subject, screen=screen, **options), case.device)
    top = set(features.top(TOP).nodes)
    session.row(
        "Screening", case.name, str(len(features)), f"{sweeping:.2f} s", f"{estimating:.2f} s", f"{screening:.2f} s",
        f"{screen.k} + {screen.audit}", f"{fp.calibrate(estimates, full).table(TOP).iloc[0]['pearson']:.3f}",
        str(len(top & set(chosen.nodes))),
    )  # fmt: skip


def built(shape: Shape, device: str) -> Any:
    """Return a Hugging Face model of a shape in float32, with weights that bfloat16 represents exactly."""
    with torch.device(device):
        source = gemma2(shape, CONTEXT) if isinstance(shape, Gemma2Shape) else gpt2(shape, CONTEXT)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(parameter.bfloat16())
    return source


def classes(source: Any, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    """Return a model in a dtype by model class, each as featpatch and as SAELens use it."""
    made: dict[str, tuple[Any, Any]] = {}
    of_bridge, of_saes = (copy.deepcopy(source).to(dtype) for _ in range(2))
    if not isinstance(shape, Gemma2Shape):
        of_class = hooked(of_bridge, shape, CONTEXT)
        made["HookedTransformer"] = of_class, of_class
    return {"TransformerBridge": (bridged(of_bridge), sae_bridge(of_saes)), **made}


def run_shape(session: Session, name: str, shape: Shape, seconds: float) -> None:
    """Measure a shape in all precisions, each for about that many seconds."""
    device = session.device
    source = session.attempt(f"{name}: a model with random weights", seconds, lambda: built(shape, device))
    if source is None:
        return
    exact = session.attempt(f"{name}: the model in float64", seconds, lambda: bridged(copy.deepcopy(source).double()))
    sae = dictionary(shape, device)
    for precision, (dtype, rounded) in PRECISIONS.items():
        models = session.attempt(f"{name}: the model in {precision}", seconds / 2, partial(classes, source, shape, dtype))
        with tf32(rounded):
            rate = matrix_rate(shape.width, device, dtype)
            for model_class, (model, with_saes) in (models or {}).items():
                called = f"{name}, {model_class}, {precision}"
                case = Case(called, shape, model, with_saes, exact, sae, dtype, rate, device)
                session.attempt(called, seconds, partial(measure, session, case, seconds / 2))
                if model_class == "TransformerBridge" and not rounded:
                    session.attempt(f"{called}, screening", seconds / 2, partial(screened, session, case))
                del case, model, with_saes
        del models
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def main() -> int:
    """Measure, and print the tables; return 1 if a measurement failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small shapes, to test this script")
    parser.add_argument("--minutes", type=float, default=8.0, help="the time limit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    session = Session(options.device, time.monotonic() + 60 * options.minutes)
    shapes: dict[str, Shape] = {"GPT-2 small": SHAPES["gpt2-small"], "Gemma 2 2B": GEMMA2_SHAPES["gemma-2-2b"]}
    if options.small:
        shapes = {"small GPT-2": SHAPES["demo"], "small Gemma 2": GEMMA2_SHAPES["gemma-2-demo"]}
    where = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    print(f"{where}, PyTorch {torch.__version__}, {LENGTH} tokens", flush=True)
    for (name, shape), seconds in zip(shapes.items(), (5.0, 5.0) if options.small else (15.0, 40.0), strict=True):
        run_shape(session, name, shape, seconds)
    session.show()
    return int(session.failed)


if __name__ == "__main__":
    sys.exit(main())
