"""Prompts, feature cards and figures that a report shows with the effects, as plain text and numbers.

They are made by code that knows the model, so that a report can be written without it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from featpatch.page import Section
from featpatch.patch import Node


@dataclass(frozen=True)
class Prompt:
    """A pair as text.

    Attributes:
        clean, corrupted: the text of each token.
        differs: for each token, whether the prompts differ there.
        titles: for each token, a tooltip with its position and labels.
        correct, wrong: the texts of the right and wrong answers.
    """

    clean: Sequence[str]
    corrupted: Sequence[str]
    differs: Sequence[bool]
    titles: Sequence[str]
    correct: Sequence[str]
    wrong: Sequence[str]


@dataclass(frozen=True)
class Portrait:
    """A feature card: the activations of a feature in one pair, with further facts.

    Attributes:
        pair: the index of the pair whose activations are shown, one in which the feature differs.
        clean, corrupted: the activation on each token of that pair.
        facts: further facts about the feature, by name.
        link: the address of the feature's page on Neuronpedia; empty if there is none.
    """

    pair: int
    clean: Sequence[float]
    corrupted: Sequence[float]
    facts: Mapping[str, str] = field(default_factory=dict)
    link: str = ""


@dataclass(frozen=True)
class Material:
    """The content of a report other than the effects.

    Attributes:
        question: the question that the report answers, in a sentence.
        prompts: the text of every pair.
        features: the cards of the features that are shown, by node.
        checks: the outcome of the checklist for the pairs that are shown, one row per pair and rule; None without one.
        figures: further figures (`plotly.graph_objects.Figure`), by title.
        sections: further sections of the page.
    """

    question: str = ""
    prompts: Sequence[Prompt] = ()
    features: Mapping[Node, Portrait] = field(default_factory=dict)
    checks: pd.DataFrame | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    sections: Sequence[Section] = ()
