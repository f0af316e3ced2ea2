"""Cost of one exact patch in SmolLM2-135M-Instruct beside the loops that users write, and the time that other steps take.

    python benchmarks/sweep.py --model real

The pairs are indirect objects. Features of each SAE and the heads of some layers are patched at every position, in both
directions. The loops are those of `sweep.py`, with SAELens' SAETransformerBridge for (a). Times are CPU times of one thread,
medians over the repeats, and include checks and base runs. The other steps are timed on two threads, in wall time; each should
take at most `MOST` s.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import Any

import torch
from bound import bound
from estimators import head, line
from loops import Products, hook_loop, matrix_rate, saelens_loop, timed
from real_model import tasks
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

import featpatch as fp
from examples.real_model.findings import SAES, saes_in, texts
from examples.real_model.prepare import LABEL, MODEL, load

PAIRS, CHECKED = 8, 32
"""The number of pairs that are patched, and of those that are checked and planned for."""
HEADS = (0, 10, 20)
"""The layers whose heads are patched."""
TEXTS = 10
"""The number of texts in which max-activating examples are found."""
MOST = 10
"""The number of seconds that a step may take."""

Loop = tuple[int, Callable[[Sequence[fp.Node]], list[float]]]
"""A number of patches, and a function that runs patches of the first pair (denoising) and returns the metric."""


@torch.no_grad()
def activations(model: Any, tokens: torch.Tensor, hooks: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the activations of one prompt at some hook points, `[pos, width]`."""
    found: dict[str, torch.Tensor] = {}
    keep = [(name, lambda x, hook, name=name: found.update({name: x[0].flatten(1).clone()})) for name in hooks]
    model.run_with_hooks(tokens, fwd_hooks=keep)
    return found


def beside(
    rank: Callable[[], fp.Effects], loops: Mapping[str, Loop], repeats: int, largest: float
) -> tuple[fp.Effects, float, list[str]]:
    """Time a ranking and the loops in turns, and compare their results.

    Args:
        largest: the size of a logit with which differences are compared.

    Returns:
        The effects, the seconds per patch, and cells of a table: the number of patches, milliseconds per patch, how much
        faster than each loop, and the largest difference.
    """
    draw, worst = random.Random(0), 0.0
    times: dict[str, list[float]] = {name: [] for name in ("ours", *loops)}
    for _ in range(repeats):
        seconds, effects = timed(rank)
        times["ours"].append(seconds / (2 * len(effects.row)))
        alone = effects.take(effects.ranked).of_pairs([0])
        values = dict(zip([alone.nodes[row] for row in alone.row], alone.denoised.tolist(), strict=True))
        for name, (count, run) in loops.items():
            drawn = draw.sample(sorted(values, key=str), min(count, len(values)))
            seconds, found = timed(lambda run=run, drawn=drawn: run(drawn))
            times[name].append(seconds / len(drawn))
            worst = max(worst, *(abs(values[node] - value) for node, value in zip(drawn, found, strict=True)))
    median = {name: statistics.median(values) for name, values in times.items()}
    ours = median["ours"]
    faster = [f"{median[loop] / ours:.1f} x" if loop in loops else "" for loop in "abc"]
    return effects, ours, [f"{2 * len(effects.row):,}", f"{1e3 * ours:.2f} ms", *faster, bound(worst / largest)]


def patches(model: Any, bridge: Any, saes: Sequence[Any], pairs: fp.Pairs, repeats: int, count: int) -> Iterator[str]:
    """Yield the rows of the table of patches.

    Args:
        bridge: the same model as a SAETransformerBridge, for loop (a).
        count: the number of patches per repeat of the loops (a) and (b).
    """
    pair, answers = pairs[0], (pairs[0].correct[0], pairs[0].wrong[0])
    clean, corrupted = (torch.tensor([tokens]) for tokens in (pair.clean, pair.corrupted))
    with torch.no_grad():
        largest = float(model(corrupted).abs().max())
    cfg = model.cfg
    keys = 2 * cfg.d_model * cfg.d_head * cfg.n_key_value_heads
    products = Products(cfg.d_model**2, keys, cfg.d_model**2, 3 * cfg.d_model * cfg.d_mlp)
    rate, options = matrix_rate(cfg.d_model, cfg.d_mlp, "cpu"), {"positions": "each", "progress": False}
    yield from head(
        "patches of", "patches", "per patch", "faster than (a)", "than (b)", "than (c)", "largest difference", "of the limit"
    )
    for sae in saes:
        hook = sae.cfg.metadata.hook_name
        f_clean, f_corrupted = (sae.encode(activations(model, tokens, [hook])[hook]).detach() for tokens in (clean, corrupted))

        def moved(nodes: Sequence[fp.Node], sae: Any = sae, difference: Any = f_clean - f_corrupted) -> list[Any]:
            return [(int(n.position), difference[n.position, n.index] * sae.W_dec[n.index].detach()) for n in nodes]

        def by_saelens(nodes: Sequence[fp.Node], sae: Any = sae, values: Any = f_clean) -> list[float]:
            asked = [(n.index, int(n.position), float(values[n.position, n.index])) for n in nodes]
            return saelens_loop(bridge, sae, corrupted, answers, asked)

        def by_hooks(batch: int, hook: str = hook, moved: Any = moved) -> Callable[[Sequence[fp.Node]], list[float]]:
            return lambda nodes: hook_loop(model, hook, corrupted, answers, moved(nodes), batch)

        def rank(sae: Any = sae) -> fp.Effects:
            return fp.rank_features(model, sae, pairs, **options)

        loops: dict[str, Loop] = {"a": (count, by_saelens), "b": (count, by_hooks(1)), "c": (64, by_hooks(32))}
        effects, ours, cells = beside(rank, loops, repeats, largest)
        number, layers = 2 * len(effects.row), cfg.n_layers - 1 - int(hook.split(".")[1])
        rows = 2 * sum(len(pair) - int(effects.nodes[row].position) for row in effects.row)
        limit = products.needed(layers, rows, number, number) / rate / number
        yield line(f"features of `{hook}`", *cells, f"{ours / limit:.2f} x")
    hooks = [f"blocks.{layer}.attn.hook_z" for layer in HEADS]
    z_clean, z_corrupted = (activations(model, tokens, hooks) for tokens in (clean, corrupted))

    def by_head(nodes: Sequence[fp.Node]) -> list[float]:
        found = []
        for node in nodes:
            number, change = int(node.index or 0), torch.zeros(cfg.d_head * cfg.n_heads)
            at = slice(number * cfg.d_head, (number + 1) * cfg.d_head)
            change[at] = (z_clean[node.site] - z_corrupted[node.site])[node.position, at]
            found += hook_loop(model, node.site, corrupted, answers, [(int(node.position), change)], 1)
        return found

    def heads() -> fp.Effects:
        return fp.rank_components(model, pairs, sites="z", layers=HEADS, **options)

    *_, cells = beside(heads, {"b": (count, by_head)}, repeats, largest)
    yield line(f"heads of layers {', '.join(map(str, HEADS))}", *cells, "")


def steps(folder: Path, saes: Path) -> Iterator[str]:
    """Yield the rows of the table of the other steps."""
    torch.set_num_threads(2)
    places = sorted(saes.glob("*.hook_resid_post"))
    yield from head("step", "time", "CPU time", "")

    def step(run: Callable[[], Any]) -> tuple[Any, str]:
        start, busy = perf_counter(), process_time()
        result = run()
        seconds, busy = perf_counter() - start, process_time() - busy
        return result, f"{seconds:.1f} s | {busy:.1f} s{f' | more than {MOST} s' if seconds > MOST else ' |'}"

    (model, found), seconds = step(lambda: fp.load(folder, places, progress=False))
    yield line("load the model and three SAEs, and check that they fit", seconds)
    pairs = fp.tasks.ioi(model, CHECKED)
    yield line(f"checklist of {CHECKED} pairs", step(lambda: pairs.check(model))[1])
    yield line(f"plan of features in {CHECKED} pairs", step(lambda: fp.plan(model, found, pairs))[1])
    few = pairs[:PAIRS]
    effects = fp.rank_features(model, found, few, progress=False)
    nodes = effects.top(20, kind="feature").nodes
    described = step(lambda: fp.max_activating(model, found, nodes, texts()[:TEXTS]))
    yield line(f"describe {len(nodes)} features in {TEXTS} texts", described[1])
    with TemporaryDirectory() as name:
        page = Path(name) / "report.html"
        reported = step(lambda: fp.report(effects, page, model=model, pairs=few, saes=found))
    yield line(f"report of {PAIRS} pairs", reported[1])
    torch.set_num_threads(1)


def real(folder: Path | None, saes: Path | None, repeats: int, count: int) -> None:
    """Print both tables.

    Args:
        folder: the folder of the prepared model; by default that of examples/real_model.
        saes: the folder of the SAEs, one folder per hook point; likewise.
        repeats: how often featpatch and the loops run.
        count: the number of patches per repeat of the loops (a) and (b).
    """
    folder, saes = folder or MODEL, saes or SAES
    model, found = load(folder), saes_in(saes)
    bridge = SAETransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    print(LABEL)
    pairs = tasks(model, PAIRS)["indirect objects"]
    for table in (patches(model, bridge, found, pairs, repeats, count), steps(folder, saes)):
        print()
        for row in table:
            print(row, flush=True)
