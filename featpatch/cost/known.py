"""Sizes of models and devices for which a sweep can be predicted, from their public configurations and data sheets."""

from dataclasses import dataclass

from featpatch.cost.flops import BlockSize


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
