"""Sizes of models and devices that a sweep can be predicted for, from their public configurations and data sheets."""

from dataclasses import dataclass

from featpatch.cost.flops import BlockSize


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        width, heads, shared, d_head: of the stream; of attention, with keys and values of `shared` heads.
        hidden: neurons of an MLP, `gated` by as many more.
        parallel: whether attention and MLP read the same stream.
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
        """Each of its blocks."""
        queries, keys = self.width * self.heads * self.d_head, self.width * self.shared * self.d_head
        mlp = (3 if self.gated else 2) * self.width * self.hidden
        return BlockSize(queries, keys, keys, queries, mlp, self.heads * self.d_head, self.parallel)

    @property
    def parameters(self) -> int:
        """Of blocks and embedding."""
        block = self.block
        return self.layers * (block.query + block.key + block.value + block.out + block.mlp) + self.vocabulary * self.width


@dataclass(frozen=True)
class Device:
    """Peak floating-point operations per second of dense matrix products by type, and bytes of memory."""

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
