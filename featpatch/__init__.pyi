"""The public names of `featpatch`, by package; lazy_loader imports a name from here when it is first used."""

# fmt: off
from . import diagram as diagram
from . import tasks as tasks
from .attribution.calibration import Calibration as Calibration, calibrate as calibrate
from .attribution.gradients import Gradients as Gradients
from .checkpoints import Demo as Demo, load_demo as load_demo
from .circuits.circuit import Circuit as Circuit, FaithfulnessCurve as FaithfulnessCurve
from .circuits.find import find_circuit as find_circuit
from .circuits.scrubbing import Hypothesis as Hypothesis, Scrubbed as Scrubbed, scrub as scrub
from .comparison.compare import Comparison as Comparison, compare as compare
from .effects.audit import Audit as Audit
from .effects.table import Effects as Effects
from .engine.path import SlowPathWarning as SlowPathWarning
from .engine.ray import Ray as Ray
from .errors import FeatpatchError as FeatpatchError
from .firing import Description as Description, describe as describe
from .loading import Loaded as Loaded, load as load
from .nodes import Edge as Edge, LOGITS as LOGITS, Node as Node, Patch as Patch
from .pairs.pair import Pair as Pair
from .pairs.pairs import Pairs as Pairs
from .patching.ablation import ablate as ablate
from .patching.controls import Controls as Controls, random_controls as random_controls
from .patching.curves import Curve as Curve, cumulative as cumulative
from .patching.diagnostics import diagnose as diagnose
from .patching.do import do as do
from .patching.runs import Noise as Noise
from .patching.sets import Selection as Selection, interactions as interactions, select_features as select_features
from .ranking.plan import Plan as Plan, plan as plan
from .ranking.rank import (
    rank_components as rank_components, rank_features as rank_features, rank_paths as rank_paths
)
from .ranking.screen import Screen as Screen
from .reporting.report import report as report
from .sae.adapted import adapt as adapt
from .sae.baselines import identity as identity, neurons as neurons, pca as pca
from .sae.loading import load_sae as load_sae
from .selfcheck import Check as Check, check as check
from .streaming.stored import Stored as Stored
from .streaming.stream import stream_features as stream_features
from .verifying import Verified as Verified, verify as verify
