"""Predict the cost of a sweep over features from sizes alone, without a model.

    entries = 1.25 L0 c          differing features, position by position, of a pair that differs over c positions
    D(c)    = 2.25 L0 c^0.52     distinct ones of them, patches in each direction; D(j) - D(j - 1) begin at the j-th position

L0 is the number of active features per position, c the number of positions from the first differing token to the answer. The
numbers are fitted to the shipped model's dictionaries above the embedding, on indirect objects (c about 5) and sentiment (c
about 14); `python benchmarks/prediction.py` prints their errors, there and on other tasks.
"""

from dataclasses import dataclass

from featpatch.engine.cost import BlockSize, pass_flops
from featpatch.engine.sweep import row_numbers
from featpatch.errors import FeatpatchError, check_numbers


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        layers: the number of layers.
        width: the width of the residual stream.
        heads: the number of attention heads.
        shared: the number of heads of keys and values.
        d_head: the width of a head.
        hidden: the number of neurons of an MLP.
        vocabulary: the number of tokens in the vocabulary.
        gated: whether an MLP has a gate, with as many neurons again.
        parallel: whether attention and the MLP read the same residual stream.
    """

    layers: int
    width: int
    heads: int
    shared: int
    d_head: int
    hidden: int
    vocabulary: int
    gated: bool = False
    parallel: bool = False

    @property
    def block(self) -> BlockSize:
        """The size of each of its layers."""
        queries, keys = self.width * self.heads * self.d_head, self.width * self.shared * self.d_head
        mlp = (3 if self.gated else 2) * self.width * self.hidden
        return BlockSize(queries, keys, keys, queries, mlp, self.heads * self.d_head, self.parallel)

    @property
    def parameters(self) -> int:
        """The number of parameters of the layers and the embedding."""
        block = self.block
        return self.layers * (block.query + block.key + block.value + block.out + block.mlp) + self.vocabulary * self.width


@dataclass(frozen=True)
class Device:
    """A device for which a sweep can be predicted.

    Attributes:
        peak: peak floating-point operations per second of dense matrix products, by dtype.
        memory: memory in bytes.
    """

    peak: dict[str, float]
    memory: float


SHAPES = {
    "gpt2-small": Shape(12, 768, 12, 12, 64, 3072, 50257),
    "pythia-1.4b": Shape(24, 2048, 16, 16, 128, 8192, 50304, parallel=True),
    "gemma-2-2b": Shape(26, 2304, 8, 4, 256, 9216, 256000, gated=True),
    "gemma-2-9b": Shape(42, 3584, 16, 8, 256, 14336, 256000, gated=True),
    "gemma-2-27b": Shape(46, 4608, 32, 16, 128, 36864, 256000, gated=True),
    "llama-3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, gated=True),
}

GPUS = {
    "l4": Device({"float32": 30.3e12, "bfloat16": 121e12}, 24e9),
    "rtx-4090": Device({"float32": 82.6e12, "bfloat16": 165e12}, 24e9),
    "a100": Device({"float32": 19.5e12, "bfloat16": 312e12}, 80e9),
    "h100": Device({"float32": 67e12, "bfloat16": 989e12}, 80e9),
    "h200": Device({"float32": 67e12, "bfloat16": 989e12}, 141e9),
}

DIFFERING, DISTINCT, POWER = 1.25, 2.25, 0.52
"""The fitted constants of the formulas in the module docstring."""

UTILISATION = 0.4
"""Fraction of a GPU's peak performance that is assumed to be reached; not yet benchmarked on a GPU."""

ROWS, TOKENS_AT_ONCE, SUMMED = 16384, 512, 256
"""Rows of a forward pass on a GPU, tokens that are run together, and features whose directions are checked together."""

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, repr=False)
class Prediction:
    """An estimate of the cost of a sweep from sizes.

    Attributes:
        patches: the number of exact runs, over all pairs, dictionaries and directions.
        flops: floating-point operations of the patches.
        other_flops: floating-point operations of runs of pairs, encoding and decoding.
        memory: bytes on each worker: weights, dictionaries and one forward pass.
        fits: whether the device has that much memory; None without a device.
        hours: duration on all workers together; None without a device.
    """

    patches: int
    flops: float
    other_flops: float
    memory: float
    fits: bool | None
    hours: float | None

    def __repr__(self) -> str:
        fit = "" if self.fits is None else f", {'fits' if self.fits else 'does not fit'}"
        time = "" if self.hours is None else f"; {self.hours:,.3g} hours"
        return (
            f"prediction of {self.patches:,} patches: {self.flops:.3g} operations, and {self.other_flops:.3g} for runs and "
            "dictionaries, "
            f"{self.memory / 1e9:,.1f} GB per worker{fit}{time}"
        )


def predict(
    shape: str | Shape,
    *,
    features: int,
    pairs: int,
    active: int = 64,
    tokens: int = 20,
    changed: int = 5,
    layers: int | list[int] | None = None,
    directions: int = 2,
    columns: int = 2,
    dtype: str = "float32",
    device: str | Device | None = None,
    workers: int = 1,
    utilisation: float = UTILISATION,
) -> Prediction:
    """Predict the cost of `rank_features` at all positions at once, with a residual-stream dictionary before some layers.

    Args:
        shape: `"gpt2-small"`, `"pythia-1.4b"`, `"gemma-2-2b"`, `"gemma-2-9b"`, `"gemma-2-27b"`, `"llama-3-8b"`, or a `Shape`.
        features: number of features of a dictionary.
        pairs: number of pairs.
        active: L0, the number of active features per position.
        tokens: number of tokens of a prompt, whose answer position is the last.
        changed: number of positions from the first differing token to the answer.
        layers: layers with a dictionary; the middle one by default.
        directions: 1 for denoising or noising, 2 for both.
        columns: number of logits that the metric reads.
        dtype: `"float32"` or `"bfloat16"`; the latter is for screening only.
        device: `"l4"`, `"rtx-4090"`, `"a100"`, `"h100"`, `"h200"`, or a `Device`.
        workers: number of devices that share the batches.
        utilisation: fraction of a device's peak performance that is reached.

    Raises:
        FeatpatchError: a name is unknown, or a number is out of range.
    """
    known = SHAPES.get(shape) if isinstance(shape, str) else shape
    if not isinstance(known, Shape):
        raise FeatpatchError(
            f"shape={shape!r}: expected one of {', '.join(SHAPES)}, or a Shape; for any other model, use fp.plan"
        )
    where = GPUS.get(device) if isinstance(device, str) else device
    if device is not None and not isinstance(where, Device):
        raise FeatpatchError(
            f"device={device!r}: expected one of {', '.join(GPUS)}, or a Device; for the device of this machine, use fp.plan"
        )
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise FeatpatchError(f"dtype={dtype!r}: expected one of {', '.join(BYTES)}")
    check_numbers(1, features=features, pairs=pairs, active=active, tokens=tokens, changed=changed)
    check_numbers(1, directions=directions, columns=columns, workers=workers)
    if isinstance(utilisation, bool) or not isinstance(utilisation, (int, float)) or not 0 < utilisation <= 1:
        raise FeatpatchError(f"utilisation={utilisation!r}: expected a fraction above 0 and at most 1")
    if directions > 2 or (where is not None and dtype not in where.peak):
        raise FeatpatchError(
            f"directions={directions}, dtype={dtype!r}: expected directions 1 or 2, and a dtype for which the device's peak "
            "is known"
        )
    chosen = [known.layers // 2] if layers is None else list(layers) if isinstance(layers, (list, tuple)) else [layers]
    if (
        changed > tokens
        or not chosen
        or not all(type(layer) is int and 0 <= layer < known.layers for layer in chosen)
        or len(set(chosen)) < len(chosen)
    ):
        raise FeatpatchError(
            f"changed={changed}, tokens={tokens}, layers={chosen}: expected changed up to tokens, and layers of 0 to "
            f"{known.layers - 1}, each once"
        )
    upto = [min(float(features), DISTINCT * active * position**POWER) for position in range(changed + 1)]
    distinct = round(upto[-1])
    patches = distinct * directions * pairs * len(chosen)
    each = max(1.0, DIFFERING * active * changed / distinct)
    flops = sum(
        _of_position(known, layer, upto[first + 1] - upto[first], each, changed - first, tokens, columns)
        for layer in chosen
        for first in range(changed)
    ) * (directions * pairs)
    other = pairs * _of_pair(known, features, distinct, tokens, changed, len(chosen))
    row = row_numbers(known.width, known.heads, known.d_head, known.hidden, tokens, columns)
    memory = float(BYTES[dtype]) * (known.parameters + ROWS * row) + len(chosen) * 4 * (
        2 * features * known.width + 4 * changed * features
    )
    hours = None if where is None else (flops + other) / (where.peak[dtype] * utilisation * workers) / 3600
    return Prediction(patches, flops, other, memory, None if where is None else memory <= where.memory, hours)


def _of_position(shape: Shape, layer: int, patches: float, changed: float, length: int, tokens: int, columns: int) -> float:
    """Return the operations for the patches of one pair and direction that begin at the same position."""
    one = pass_flops(
        [shape.block] * shape.layers, layer, "pre", patches=1000, changed=round(1000 * changed), length=length,
        answer=tokens - 1, logits=columns * shape.width,
    )  # fmt: skip
    return patches * one / 1000


def _of_pair(shape: Shape, features: int, distinct: int, tokens: int, changed: int, dictionaries: int) -> float:
    """Return the operations for a pair's two runs, and for encoding, decoding and checking directions, in survey and sweep."""
    runs = 2 * 2 * tokens * (shape.parameters - shape.vocabulary * shape.width)
    product = 2 * features * shape.width
    coded = (2 + 2 + 2) * changed * product
    directions = 3 * -(-distinct // SUMMED) * product
    return 2.0 * (runs + dictionaries * (coded + directions))
