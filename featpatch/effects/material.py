"""What a report shows beside the effects: prompts and features as text and numbers, made by whoever knows the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from featpatch.page import Section
from featpatch.patch import Node


@dataclass(frozen=True)
class Prompt:
    """One pair as text.

    Attributes:
        clean, corrupted: each token's text.
        differs: whether the two differ, by token.
        titles: what is said of each token's position: its index and labels.
        correct, wrong: answers.
    """

    clean: Sequence[str]
    corrupted: Sequence[str]
    differs: Sequence[bool]
    titles: Sequence[str]
    correct: Sequence[str]
    wrong: Sequence[str]


@dataclass(frozen=True)
class Portrait:
    """A feature.

    Attributes:
        pair: the pair whose activations are shown, one in which the feature differs.
        clean, corrupted: its activation on each token of that pair.
        facts: what else is known, by name.
        link: its page on Neuronpedia; empty if there is none.
    """

    pair: int
    clean: Sequence[float]
    corrupted: Sequence[float]
    facts: Mapping[str, str] = field(default_factory=dict)
    link: str = ""


@dataclass(frozen=True)
class Material:
    """Of one study.

    Attributes:
        question: in a sentence.
        prompts: of every pair.
        features: by node, those that are shown.
        checks: the checklist's verdicts on the pairs that are shown, one row per pair and item; None without one.
        figures: further figures (`plotly.graph_objects.Figure`) with their titles.
        sections: further parts of the page.
    """

    question: str = ""
    prompts: Sequence[Prompt] = ()
    features: Mapping[Node, Portrait] = field(default_factory=dict)
    checks: pd.DataFrame | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    sections: Sequence[Section] = ()
