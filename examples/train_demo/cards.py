"""README cards, written from the measurements."""

from pathlib import Path
from typing import Any

from .files import dictionary_folders, read_json
from .measure_dictionary import DOCUMENTS, STRONG
from .measure_model import PAIRS
from .pairs import PAIRS_PER_TASK
from .targets import Target, dictionary_targets, heads, model_targets

HEADER = """\
---
license: mit
language: en
library_name: {library}
---
"""
DATA = """\
Synthetic English-like documents from `examples/train_demo` (no data of anyone else): who receives a gift (indirect
object identification, ABBA and BABA order, 70 % with a second, competing pair of names), facts about 24 countries
(capital, language, currency), years that must be greater than a start year, reviews with a verdict, fillers. The
grammar has about 420 words, 24 names, one token per word; the four digits of a year are two tokens.
"""


def table(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def targets_table(targets: list[Target]) -> str:
    """Targets, with what was not reached said openly."""
    lines = [[t.goal, t.value, "reached" if t.reached else "**not reached**"] for t in targets]
    return table(["target", "measured", ""], lines)


def settings_table(settings: dict[str, Any]) -> str:
    """Every setting of a training."""
    return table(["setting", "value"], [[name, str(value)] for name, value in settings.items()])


def _both(recovery: list[float]) -> str:
    return f"{recovery[0]:.2f} / {recovery[1]:.2f}"


def steps_section(task: str, steps: dict[str, Any]) -> str:
    """Recoveries of one task: residual stream by position, heads, MLPs."""
    residual = {hook: places for hook, places in steps["recovery"].items() if "resid" in hook}
    labels = list(next(iter(residual.values())))
    lines = [[hook, *(_both(places[label]) for label in labels)] for hook, places in residual.items()]
    mlps = [f"{hook.split('.')[1]}: {_both(places['all'])}" for hook, places in steps["recovery"].items() if "mlp" in hook]
    strong = [f"{name}: {_both(recovery)}" for name, recovery in heads(steps)]
    return (
        f"### {task}\n\nMetric: clean {steps['clean']:.2f}, corrupted {steps['corrupted']:.2f}.\n\n"
        f"{table(['residual stream at', *labels], lines)}\n\n"
        f"Heads (layer.head) above .1: {'; '.join(strong) or 'none'}.\n\nMLPs by layer: {'; '.join(mlps)}.\n"
    )


def seeds_table(chosen: str, seeds: dict[str, dict[str, Any]]) -> str:
    """All seeds that were trained, with what was measured."""
    tasks = list(next(iter(seeds.values()))["measured"]["accuracy"])
    lines = []
    for seed, record in seeds.items():
        measured = record["measured"]
        targets = model_targets(measured)
        after_first = measured["steps"]["ioi"]["recovery"]["blocks.1.hook_resid_pre"]
        lines.append(
            [
                f"**{seed}** (shipped)" if seed == chosen else seed,
                *(f"{measured['accuracy'][task]:.3f}" for task in tasks),
                f"{after_first['S2'][0]:.2f}",
                f"{after_first['end'][0]:.2f}",
                ", ".join(name for name, _ in heads(measured["steps"]["ioi"])) or "none",
                f"{sum(t.reached for t in targets)} of {len(targets)}",
                str(record["training"]["cpu_seconds"]),
            ]
        )
    more = ["S2 after layer 0", "end after layer 0", "IOI heads", "targets", "CPU s"]
    return table(["seed", *tasks, *more], lines)


def model_card(folder: Path) -> str:
    """The card of the language model."""
    record = read_json(folder / "measurements.json")
    chosen, seeds = record["seed"], record["seeds"]
    training, measured = seeds[chosen]["training"], seeds[chosen]["measured"]
    config = read_json(folder / "config.json")
    accuracy = [[task, f"{score:.4f}"] for task, score in measured["accuracy"].items()]
    sections = [steps_section(task, steps) for task, steps in measured["steps"].items()]
    return f"""{HEADER.format(library="transformers")}
# featpatch-demo: a small GPT-2 for tests and examples

A language model of {config["n_layer"]} layers, width {config["n_embd"]}, {config["n_head"]} heads, MLPs of
{config["n_inner"]}, {config["vocab_size"]} words and {measured["parameters"]:,} parameters. It knows only the four
tasks below; it is made for learning about and testing causal patching, not for use.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformer_lens.model_bridge import TransformerBridge

path = "checkpoints/model"
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
bridge = TransformerBridge.boot_transformers(path, hf_model=model, tokenizer=tokenizer, device="cpu")
```

## Data

{DATA}
Never seen in training: 24 of 276 pairs of names (in any sentence), 8 of 120 combinations of templates about gifts, for
each fact one sentence and one story that would tell it, about one start year in six, and for each noun one adjective
and one verb of praise and of blame.

## Training

Seed {chosen}, {training["cpu_seconds"]} CPU seconds on one thread. The loss weighs answers more, and a small penalty on
far attention of the first layer from the word before an answer (`locality`) keeps the tasks from being solved at once.

{settings_table(training["settings"])}

## Choice of the seed

All seeds that were trained with these settings. Shipped is the one that reaches most targets, among equals the one with
the best mean accuracy. Every accuracy is about held-out questions, the recoveries are denoising.

{seeds_table(chosen, seeds)}

Earlier settings, tried and dropped: the penalty as a mean over all words and heads (seeds 1 and 2: the last word alone
recovers 1.00 after the first layer, accuracy with a rival pair .98); the penalty on every word, those before an answer
counted five times (near 3, seed 2: accuracy with a rival pair .45; near 1, seed 1: all accuracies reached, one head of
layer 2 alone above .1).

## Held-out accuracy

1,000 questions per task (facts: 24 countries, one sentence and one story each). Every IOI question but those of
"unseen template" is about an unseen pair of names; years: probability of the years above the start minus those at or
below it.

{table(["task", "accuracy"], accuracy)}

## Steps

Patching on {PAIRS} held-out pairs of prompts per task: recovery by denoising / noising. IOI: the corrupted prompt names
the other one of the pair at S2; a rival pair of names is always present.

{chr(10).join(sections)}
## Targets

{targets_table(model_targets(measured))}
"""


def dictionary_card(folder: Path) -> str:
    """The card of a dictionary."""
    training, measured = read_json(folder / "training.json"), read_json(folder / "measurements.json")
    settings = training["settings"]
    reads, writes = settings["reads"], settings["writes"]
    transcoder = reads != writes
    title = f"transcoder from `{reads}` to `{writes}`" if transcoder else f"sparse autoencoder at `{reads}`"
    trainer = "a loop of its own (sae-lens has the class and no trainer)" if transcoder else "sae-lens' `SAETrainer`"
    quality = [
        ["words measured", f"{measured['words']:,}"],
        ["features", f"{measured['features']}"],
        ["L0 (features per word)", f"{measured['l0']:.2f}"],
        ["explained variance", f"{measured['explained_variance']:.4f}"],
        ["dead features (never fire)", f"{measured['dead_features']}"],
        ["loss of the model", f"{measured['loss']:.4f}"],
        ["loss with the dictionary in place", f"{measured['loss_with_dictionary']:.4f}"],
        ["loss with zero in place", f"{measured['loss_without_activation']:.4f}"],
        ["loss recovered", f"{measured['loss_recovered']:.4f}"],
    ]
    return f"""{HEADER.format(library="saelens")}
# featpatch-demo: {title}

{settings["width"]} features for the model in `checkpoints/model`, {settings["k"]} firing per word on average (BatchTopK,
saved as JumpReLU with a fixed threshold). Load it with `SAE.load_from_disk` of sae-lens.

## Training

With {trainer}, on activations of {settings["rows"]:,} rows of {settings["length"]} words of the model's corpus that the
model was not trained on; <bos> is left out. Seed {training["seed"]}, {training["cpu_seconds"]} CPU seconds on one thread.

{settings_table(settings)}

## Measured

On {DOCUMENTS:,} held-out documents, each read alone after <bos>; <bos> is left out and kept as it is.

{table(["", ""], quality)}

{words_section(measured)}
## Targets

{targets_table(dictionary_targets(reads if not transcoder else writes, measured))}
"""


def words_section(measured: dict[str, Any]) -> str:
    """Which single features stand for single words."""
    kinds = measured["best_features"]
    medians = [
        [kind, f"{found['median_f1']:.2f}", f"{found['median_f1_strong']:.2f}", f"{found['over_0.8']} of {len(found['words'])}"]
        for kind, found in kinds.items()
    ]
    return f"""## Do single features stand for single words?

For each name and country the feature whose firing matches best, over **all words** of these documents, not only in
prompts of a task. F1 when firing means above zero, and when it means above {STRONG} of the feature's maximum. A name
that "follows" is often not decided by what stands before; "is decided" takes only those that are.

{table(["property", "median F1", "median F1, strong firing", "F1 > .8"], medians)}

{chr(10).join(_feature_list(kind, found["words"]) for kind, found in kinds.items())}"""


def _feature_list(kind: str, words: dict[str, dict[str, Any]]) -> str:
    items = [f"{word} {found['f1']:.2f} (feature {found['feature']})" for word, found in words.items()]
    return f"**{kind}**: {', '.join(items)}.\n"


def cross_card(folder: Path) -> str:
    """The card of a cross-layer transcoder or a crosscoder."""
    training, measured = read_json(folder / "training.json"), read_json(folder / "measurements.json")
    settings = training["settings"]
    reads, writes, layers = settings["reads"], settings["writes"], len(settings["reads"])
    if settings["by_layer"]:
        title, kind = f"cross-layer transcoder from `{reads[0]}` to `{writes[-1]}`", "cross-layer transcoder"
        size = f"{layers} x {settings['width']} features for the model in `checkpoints/model`, {settings['k']} of each layer"
        shape = "The features of a layer read the input of its MLP and write to the outputs of this MLP and of all above"
    else:
        title, kind = f"crosscoder of `{reads[0]}` to `{writes[-1]}`", "crosscoder"
        size = f"{settings['width']} features for the model in `checkpoints/model`, {settings['k']}"
        shape = "Every feature reads the residual stream at all of these hook points and writes to all of them"
    quality = [
        ["words measured", f"{measured['words']:,}"],
        ["features", f"{measured['features']}"],
        ["L0 (features per word)", f"{measured['l0']:.2f}"],
        *([["L0 by layer", ", ".join(f"{l0:.2f}" for l0 in measured["l0_by_group"])]] if settings["by_layer"] else []),
        ["dead features (never fire)", f"{measured['dead_features']}"],
    ]
    at = [
        [f"`{hook}`", f"{found['explained_variance']:.4f}", *_losses(found)] for hook, found in measured["hook_points"].items()
    ]
    if measured["together"]:
        at.append(["all together", "", *_losses(measured["together"])])
    together = " (all together: each layer reads what the reconstructions below make)" if measured["together"] else ""
    plain = {name: ", ".join(value) if isinstance(value, list) else value for name, value in settings.items()}
    targets = [
        Target(f"`{hook}`: {target.goal}", target.value, target.reached)
        for hook, found in measured["hook_points"].items()
        for target in dictionary_targets(hook, found)
    ]
    return f"""{HEADER.format(library="featpatch")}
# featpatch-demo: {title}

{size} firing per word on
average (BatchTopK, saved as JumpReLU with fixed thresholds, weights in {settings["dtype"]}).
{shape}.

```python
import featpatch as fp

demo = fp.load_demo()
demo.{folder.name}  # or fp.load_sae("checkpoints/{folder.name}", dtype="float32")
```

## Training

With a loop of its own (`examples/train_demo/batch_top_k.py`), on activations of {settings["rows"]:,} rows of
{settings["length"]} words of the model's corpus that the model was not trained on; <bos> is left out. Seed
{training["seed"]}, {training["cpu_seconds"]} CPU seconds on one thread.

{settings_table(plain)}

## Measured

On {DOCUMENTS:,} held-out documents, each read alone after <bos>; <bos> is left out and kept as it is.

{table(["", ""], quality)}

The loss of the model is {measured["hook_points"][writes[0]]["loss"]:.4f}. With the {kind}'s reconstruction, or with zero, in
place at one hook point alone{together}:

{table(["hook point", "explained variance", "loss with it", "loss with zero", "loss recovered"], at)}

{words_section(measured)}
## Targets

{targets_table(targets)}
"""


def _losses(found: dict[str, float]) -> list[str]:
    return [f"{found[name]:.4f}" for name in ("loss_with_dictionary", "loss_without_activation", "loss_recovered")]


def overview(root: Path) -> str:
    """The card of the whole folder."""
    lines = []
    for folder in dictionary_folders(root):
        measured = read_json(folder / "measurements.json")
        kinds, place = measured["best_features"], folder.relative_to(root).as_posix()
        each = list(measured.get("hook_points", {"": measured}).values())
        lines.append(
            [
                f"[`{folder.name}`]({place}/README.md)",
                f"{measured['l0']:.1f}",
                _range(each, "explained_variance"),
                f"{measured['dead_features']}",
                _range(each, "loss_recovered"),
                f"{kinds['name here']['median_f1']:.2f}",
                f"{kinds['name follows and is decided']['median_f1']:.2f}",
            ]
        )
    head = ["dictionary", "L0", "explained variance", "dead", "loss recovered", "F1 name here", "F1 name decided next"]
    return f"""# Checkpoints

A small trained model, its sparse autoencoders and prompt pairs; `featpatch.load_demo()` loads them. All of it is made by
`python -m examples.train_demo` from nothing but a seed, and every number in the cards is measured by the same command
(again, without training: `python -m examples.train_demo.again`).

- [`model/`](model/README.md): GPT-2 in Hugging Face format.
- `saes/`: dictionaries in sae-lens' format, one folder per hook that is read (`demo.saes`).
- `transcoders/`: transcoders of the MLPs of layers 1 to 3; that of layer 0 is in `saes/` (`demo.transcoders`: all four).
- `clt/`: a cross-layer transcoder of all MLPs, in circuit-tracer's format (`demo.clt`).
- `crosscoder/`: a crosscoder of the residual stream, in featpatch's format (`demo.crosscoder`).
- `pairs/`: {PAIRS_PER_TASK} held-out prompt pairs per task, JSON lines; labels count `<bos>` as position 0.
- `text/held_out.txt`: held-out documents, one per line.
- `digests.json`: SHA-256 of every file except the cards.

<!-- claim: python -m examples.train_demo.again -->
{table(head, lines)}

F1: median over the names of the best feature's F1 over all words of held-out text. A range is that over the hook points that
are written.
<!-- /claim -->
"""


def _range(measured: list[dict[str, float]], name: str) -> str:
    """The smallest and the largest of some values."""
    ends = {f"{end(found[name] for found in measured):.3f}": None for end in (min, max)}
    return " to ".join(ends)


def write_cards(root: Path) -> None:
    """Writes every README.md of the checkpoints."""
    (root / "model" / "README.md").write_text(model_card(root / "model"), encoding="utf-8")
    for folder in dictionary_folders(root):
        card = cross_card if folder.parent == root else dictionary_card
        (folder / "README.md").write_text(card(folder), encoding="utf-8")
    (root / "README.md").write_text(overview(root), encoding="utf-8")
