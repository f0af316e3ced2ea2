"""Importers of the pair files of other projects, one module per project with the same signature."""

from featpatch.pairs.importers.auto_circuit import auto_circuit
from featpatch.pairs.importers.eap_ig import eap_ig
from featpatch.pairs.importers.feature_circuits import feature_circuits

__all__ = ["auto_circuit", "eap_ig", "feature_circuits"]
