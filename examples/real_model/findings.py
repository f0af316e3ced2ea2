"""What carries four behaviours of SmolLM2? `python -m examples.real_model.findings`, after the model is prepared.

For each task: how well the model masters it; where the behaviour is, by layer and position; which heads carry it; how much the
features and the error term of each SAE recover; the first features, what they detect, and whether they are sufficient or
necessary; how many of them recover 80 % of what all of them do; groups; a circuit of edges; and the response to steering.
Effects are exact, with 95 % bootstrap intervals over pairs; scores of edges are estimates, and the circuit's faithfulness is
exact.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer

import featpatch as fp
from featpatch.cli.app import clear_errors
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.dictionary import dictionaries as dictionaries_of
from featpatch.views import promoted

from .prepare import LABEL, MODEL, load
from .tasks import TASKS

SAES = Path(__file__).parent / "saes"
TEXTS = Path(__file__).parent / "texts.jsonl"
"""Texts that the model wrote and that no SAE was trained on, in which features are described."""
POSITIONS = {
    "capitals": ("subject", -1),
    "indirect objects": ("S2", "end"),
    "agreement": ("subject", "end"),
    "greater than": ("start_year", "end"),
}
LAYERS = (0, 5, 10, 15, 20, 22, 24, 26, 28)
"""Layers whose input is patched in the map."""
HEADS, FEATURES, EDGES = 5, 6, 200
WHERE: Literal["recovery_where_changed"] = "recovery_where_changed"
PROMOTED = 4
SHARE = 0.8
DOSES = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Task:
    """A task with the pairs that the model masters.

    Attributes:
        name: the name of the task.
        pairs: the pairs without those that fail the checklist.
        made: the number of pairs that were made.
        positions: the positions at which nodes are patched; the last is that of the answer.
    """

    name: str
    pairs: fp.Pairs
    made: int
    positions: Sequence[int | str]

    @classmethod
    def of(cls, model: Any, name: str) -> "Task":
        """Make the pairs of a task and drop those on which the model does not show the behaviour."""
        pairs = TASKS[name](model)
        return cls(name, pairs.drop(pairs.check(model), "fail"), len(pairs), POSITIONS[name])


def saes_in(folder: Path = SAES) -> list[Any]:
    """Return the SAEs of the residual stream in a folder."""
    return [fp.load_sae(each) for each in sorted(folder.glob("*.hook_resid_post"))]


def texts() -> list[str]:
    """Return the texts in which features are described."""
    return [json.loads(line)["text"] for line in TEXTS.read_text(encoding="utf-8").splitlines()]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def with_interval(effects: fp.Effects, direction: str, row: int = 0) -> str:
    """Return an effect with its 95 % interval."""
    low, high = effects.interval(direction)[row]
    return f"{effects.pooled(direction)[row]:.2f} [{low:.2f}, {high:.2f}]"


def where(model: Any, task: Task) -> str:
    """Return the recovery of the residual stream by layer and position."""
    found = fp.rank_components(
        model, task.pairs, sites="resid_pre", layers=LAYERS, positions=task.positions, directions=["denoising"], progress=False
    )
    value = dict(zip(((node.site, node.position) for node in found.nodes), found.pooled("recovery"), strict=True))
    rows = [
        [layer, *(f"{value.get((f'blocks.{layer}.hook_resid_pre', position), 0.0):.2f}" for position in task.positions)]
        for layer in LAYERS
    ]
    return table(["before layer", *(f"at {position}" for position in task.positions)], rows)


def heads(model: Any, task: Task) -> str:
    """Return the heads that recover most at the position of the answer."""
    found = fp.rank_components(model, task.pairs, sites="z", positions=[task.positions[-1]], progress=False)
    top = found.top(HEADS)
    rows = [
        [f"{node.site.split('.')[1]}.{node.index}", with_interval(top, "recovery", row), with_interval(top, "degradation", row)]
        for row, node in enumerate(top.nodes)
    ]
    return table([f"head ({task.name})", "recovery", "degradation"], rows)


def sites(effects: fp.Effects) -> str:
    """Return the recovery of the activation, of all features and of the error term, by hook point and position."""
    columns = ["sae", "position", "changed_features", "recovery_activation", "recovery_all_features", "recovery_error"]
    rows = [
        [cell if isinstance(cell, str | int) else f"{cell:.2f}" for cell in row] for row in effects.sites()[columns].to_numpy()
    ]
    return table(["SAE", "position", "features that differ", "activation", "all features", "error term"], rows)


def features(model: Any, dictionaries: Sequence[Any], effects: fp.Effects) -> str:
    """Return the first features over all pairs, and the first over the pairs in which each differs.

    With each are the tokens on which it is most active, and those whose logits its decoder direction raises most.
    """
    header = ["feature", "position", "recovery", "degradation", "pairs", "recovery there", "most active on", "promotes"]
    lens = wrap(model)
    by_name = {each.name: each for each in dictionaries_of(lens, dictionaries)}
    tops = effects.top(FEATURES, kind="feature"), effects.top(FEATURES, kind="feature", by=WHERE, least_changed=2)
    nodes = list(dict.fromkeys(node for top in tops for node in top.nodes))
    described = fp.max_activating(model, dictionaries, nodes, texts(), contexts=6)
    found = []
    for top in tops:
        there = top.pooled("recovery", over="changed")
        found.append(
            table(
                header,
                [
                    [
                        f"{node.sae.split('.')[1]}/{node.index}",
                        node.position,
                        with_interval(top, "recovery", row),
                        with_interval(top, "degradation", row),
                        int(top.changed_pairs[row]),
                        f"{there[row]:.2f}",
                        tokens(described[node]),
                        raised(lens, by_name[node.sae], node),
                    ]
                    for row, node in enumerate(top.nodes)
                ],
            )
        )
    return "\n\n".join(found)


def tokens(description: Any) -> str:
    """Return the tokens on which a feature is most active."""
    return quoted(example.tokens[int(np.argmax(example.values))] for example in description.examples)


def raised(lens: Lens, dictionary: Dictionary, node: fp.Node) -> str:
    """Return the tokens whose logits a feature's decoder direction raises most."""
    (found,) = promoted(lens, dictionary, [dictionary.number(node)], PROMOTED).values()
    return quoted(token for token, _ in found)


def quoted(words: Iterable[str]) -> str:
    """Return words side by side, without repetition."""
    return ", ".join(dict.fromkeys(f"`{word.strip()}`" for word in words if word.strip())).replace("|", "/")


def counts(model: Any, dictionaries: Sequence[Any], task: Task) -> str:
    """Return how many features, in the order of their effects, recover the share `SHARE` of what all features do."""
    curve = fp.top_k_curve(
        model, dictionaries, task.pairs, most=256, positions=task.positions, directions=["denoising"], progress=False
    ).table()
    rows = []
    for (sae, position), group in curve.groupby(["sae", "position"], sort=False):
        enough = group[group["recovery_of_all_features"] >= SHARE]
        rows.append([sae, position, int(enough["k"].iloc[0]) if len(enough) else f"over {group['k'].iloc[-1]}"])
    return table(["hook point", "position", f"features for {SHARE:.0%} of all features"], rows)


def groups(model: Any, dictionaries: Sequence[Any], task: Task, effects: fp.Effects) -> str:
    """Return the joint effects of groups of features that are active together."""
    found = fp.group_features(
        model,
        dictionaries,
        task.pairs,
        effects.top(60, kind="feature"),
        similarity="coactivation",
        texts=texts(),
        progress=False,
    ).to_pandas()
    found = found.reindex(found["recovery"].abs().sort_values(ascending=False).index).head(5)
    columns = [name for name in ("group", "members", "recovery", "recovery_sum", "recovery_interaction") if name in found]
    return table(columns, [[f"{v:.2f}" if isinstance(v, float) else v for v in row] for row in found[columns].to_numpy()])


def circuit(model: Any, task: Task) -> str:
    """Return a sentence about a circuit of edges; its scores are estimates, and its faithfulness is exact."""
    return f"{task.name}: " + repr(
        fp.find_circuit(model, task.pairs, over="edges", scores="eap_ig_inputs", size=EDGES, progress=False)
    )


def steering(model: Any, dictionaries: Sequence[Any], task: Task, effects: fp.Effects) -> str:
    """Return what adding multiples of the first feature's mean activation does to the metric, and what it costs."""
    first = effects.top(1, kind="feature").nodes
    doses = fp.dose_response(
        model,
        task.pairs,
        first,
        DOSES,
        saes=dictionaries,
        unit="mean",
        reference=task.pairs,
        positions=[first[0].position],
        progress=False,
    ).table()
    rows = [[f"{row.dose:g}", f"{row.effect:.2f}", f"{row.kl:.3f}"] for row in doses.itertuples()]
    return f"{first[0].sae} {first[0].index} at {first[0].position}:\n\n" + table(
        ["times its mean", "change of the metric", "KL divergence"], rows
    )


def main(
    folder: Annotated[Path, typer.Option("--model", help="Folder of the prepared model.")] = MODEL,
    saes: Annotated[Path, typer.Option(help="Folder of the SAEs of the residual stream.")] = SAES,
    only: Annotated[str, typer.Option("--task", help="One task only.")] = "",
) -> None:
    """Print the findings as Markdown."""
    torch.set_num_threads(1)
    with clear_errors():
        model = load(folder)
        found = saes_in(saes)
        print(f"# {LABEL}")
        for name in [only] if only else TASKS:
            task = Task.of(model, name)
            print(f"\n## {name}\n\nThe model masters {len(task.pairs)} of {task.made} pairs.\n", flush=True)
            print(where(model, task), flush=True)
            print(f"\n{heads(model, task)}", flush=True)
            effects = fp.rank_features(model, found, task.pairs, positions=task.positions, progress=False)
            print(f"\n{sites(effects)}\n\n{features(model, found, effects)}", flush=True)
            print(f"\n{counts(model, found, task)}\n\n{groups(model, found, task, effects)}", flush=True)
            print(f"\n{circuit(model, task)}\n\n{steering(model, found, task, effects)}", flush=True)


if __name__ == "__main__":
    typer.run(main)
