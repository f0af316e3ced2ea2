"""Cost of a sweep: floating-point operations, and predictions of time and memory from sizes alone, without a model."""

from featpatch.cost.flops import BlockSize, pass_flops, row_numbers
from featpatch.cost.known import GPUS, SHAPES, Device, Shape
from featpatch.cost.plan import Plan
from featpatch.cost.prediction import Prediction, predict

__all__ = ["GPUS", "SHAPES", "BlockSize", "Device", "Plan", "Prediction", "Shape", "pass_flops", "predict", "row_numbers"]
