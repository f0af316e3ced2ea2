"""The public names of `featpatch`; lazy_loader imports a name from here when it is first used.

Classes of results, such as `Curve` or `Comparison`, are in the modules of the functions that return them.
"""

# fmt: off
from . import dictionaries as dictionaries
from . import diagram as diagram
from . import tasks as tasks
from .attribution.calibration import calibrate as calibrate
from .attribution.gradients import Gradients as Gradients
from .attribution.logits import logit_attribution as logit_attribution
from .checkpoints import load_demo as load_demo
from .circuits.circuit import Circuit as Circuit
from .circuits.find import find_circuit as find_circuit, load_circuit as load_circuit
from .circuits.scrubbing import Hypothesis as Hypothesis, scrub as scrub
from .comparison.compare import compare as compare
from .descriptions import max_activating as max_activating
from .effects.table import Effects as Effects
from .engine.path import SlowPathWarning as SlowPathWarning
from .engine.ray import Ray as Ray
from .errors import FeatpatchError as FeatpatchError
from .labels import load_labels as load_labels
from .loading import load as load
from .nodes import Edge as Edge, LOGITS as LOGITS, Node as Node, Patch as Patch
from .pairs.pair import Pair as Pair
from .pairs.pairs import Pairs as Pairs
from .patching.controls import random_controls as random_controls
from .patching.curves import top_k_curve as top_k_curve
from .patching.diagnostics import diagnose as diagnose
from .patching.do import do as do
from .patching.noise import Noise as Noise
from .patching.sets import interactions as interactions, select_features as select_features
from .ranking.graph_effects import graph_effects as graph_effects
from .ranking.groups import group_features as group_features
from .ranking.nodes import rank_nodes as rank_nodes
from .ranking.ablate import ablate as ablate
from .ranking.plan import plan as plan
from .ranking.rank import (
    rank_components as rank_components, rank_features as rank_features, rank_paths as rank_paths
)
from .ranking.screen import Screen as Screen
from .reporting.report import report as report
from .sae.baselines import direction as direction
from .sae.nodes import feature as feature
from .sae.loading import load_sae as load_sae
from .selfcheck import check as check
from .components import head as head
from .splicing import loss_recovered as loss_recovered
from .steering.doses import dose_response as dose_response
from .steering.steer import steer as steer
from .streaming.stored import Stored as Stored
from .streaming.stream import stream_features as stream_features
from .tracing.graph import attribution_graph as attribution_graph
from .tracing.query_key import qk_attribution as qk_attribution
from .verifying import verify as verify
from .views import active_features as active_features, attention_pattern as attention_pattern
