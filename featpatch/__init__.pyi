"""The public names of `featpatch`, by package; lazy_loader imports a name from here when it is first used."""

# fmt: off
from . import diagram as diagram
from . import tasks as tasks
from .attribution import (
    Calibration as Calibration, Gradients as Gradients, calibrate as calibrate, estimate_components as estimate_components,
    estimate_features as estimate_features, estimate_paths as estimate_paths
)
from .checkpoints import Demo as Demo, load_demo as load_demo
from .circuits import (
    Circuit as Circuit, FaithfulnessCurve as FaithfulnessCurve, Hypothesis as Hypothesis, Scrubbed as Scrubbed, find_circuit
    as find_circuit, scrub as scrub
)
from .comparison import Comparison as Comparison, compare as compare
from .cost import Plan as Plan, Prediction as Prediction, predict as predict
from .effects import Audit as Audit, Effects as Effects
from .engine import SlowPathWarning as SlowPathWarning
from .errors import FeatpatchError as FeatpatchError
from .execution import Ray as Ray
from .firing import Description as Description, describe as describe
from .lens import adapt as adapt, identity as identity, load_sae as load_sae, neurons as neurons, pca as pca
from .loading import Loaded as Loaded, load as load
from .pairs import Pair as Pair, Pairs as Pairs
from .patch import Edge as Edge, LOGITS as LOGITS, Node as Node, Patch as Patch
from .patching import (
    Controls as Controls, Curve as Curve, Noise as Noise, Selection as Selection, ablate as ablate, cumulative as cumulative,
    diagnose as diagnose, do as do, interactions as interactions, random_controls as random_controls, rank_components as
    rank_components, select_features as select_features
)
from .ranking import plan as plan, rank_features as rank_features, rank_paths as rank_paths
from .reporting import report as report
from .selfcheck import check as check
from .streaming import Stored as Stored, stream_features as stream_features
from .verdict import Check as Check
from .verifying import Verified as Verified, verify as verify
