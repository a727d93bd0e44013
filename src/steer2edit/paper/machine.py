"""How long a machine takes for the work of a suite, and how much memory a model needs.

A machine is a few speeds. They are measured with the model itself, or follow from its shape:

    forward pass   t = 2·N / (F · s_c)                                            a token
    decoding       t = max(w / (B · s_b), R · 2·N' / (F · s_d)) + R · kv · L / (B · s_b)    a step of R rows
    training       t = 3 · 2·N' / (F · s_c), of LoRA 2 · 2·N' / (F · s_c)         a token of a step

N are the parameters without embedding and head, N' those with the head, w the bytes of all weights. F are the machine's
operations a second and B its bytes of memory, s_c, s_d and s_b the shares of them that are reached, kv the bytes of the
keys and values of a token, and L the mean length of a row. docs/paper.md says how well this fits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from .facts import Shape


@dataclass(frozen=True)
class Work:
    """What is to be done.

    Attributes:
        written: tokens by the model. read: those of prompts, and of traces in the probe. scored: those of given texts.
        lora, full: tokens that steps of training take in, of rank-1 LoRA and of every weight.
        loads: how often the model is loaded. stored: bytes of checkpoints that are written to the disk and synced.
        fixed: seconds that no speed of the model says: figures, intervals, packages that are imported.
    """

    written: float = 0.0
    read: float = 0.0
    scored: float = 0.0
    lora: float = 0.0
    full: float = 0.0
    loads: float = 0.0
    stored: float = 0.0
    fixed: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * getattr(self, f.name) for f in fields(Work)))

    @property
    def tokens(self) -> float:
        """Those that are written, read or scored."""
        return self.written + self.read + self.scored


@dataclass(frozen=True)
class Speed:
    """What a model does a second, in the units of `Work`, and the seconds of loading it once.

    Attributes:
        lora, full: tokens of training steps; 0 is not known, and no time is counted. stored: bytes; 0 likewise.
    """

    written: float
    read: float
    scored: float
    load: float = 0.0
    lora: float = 0.0
    full: float = 0.0
    stored: float = 0.0

    def seconds(self, work: Work) -> float:
        """How long the work takes.

        >>> Speed(written=10, read=100, scored=50, load=3).seconds(Work(written=20, read=300, scored=100, loads=2))
        13.0
        """
        known = ("written", "read", "scored", "lora", "full", "stored")
        speeds = {name: getattr(self, name) for name in known}
        taken = sum(getattr(work, name) / speed for name, speed in speeds.items() if speed)
        return taken + work.loads * self.load + work.fixed


# What a step of training costs in forward passes: the backward pass to the activations costs one more, that to the
# weights another. Of rank-1 LoRA the weights that take a gradient are few.
STEP_OF_LORA, STEP_OF_ALL = 2.0, 3.0


def parameters(shape: Shape, embedding: bool = True) -> int:
    """All numbers of a gated decoder (Llama, Mistral, Gemma, Qwen) but its norms and biases.

    >>> llama = Shape(model_type="llama", layers=32, d=4096, heads=32, kv_heads=32, head_dim=128, neurons=11008,
    ...               vocabulary=32000, tied=False)
    >>> parameters(llama)
    6738149376
    """
    attention = shape.d * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    of_layers = shape.layers * (attention + 3 * shape.d * shape.neurons)
    table = shape.d * shape.vocabulary
    return of_layers + (table * (1 if shape.tied else 2) if embedding else 0)


def edit_numbers(shape: Shape) -> int:
    """The numbers of scores: k̂ and g of every component, and v̂ of every block."""
    components = shape.heads + shape.neurons
    return shape.layers * (shape.heads * shape.head_dim + shape.neurons + components + 2 * shape.d)


def cache_bytes(shape: Shape, bytes_each: int = 2) -> int:
    """The keys and values of one token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_each


@dataclass(frozen=True)
class Hardware:
    """What bounds a model on a machine.

    Attributes:
        compute: operations a second that are reached. bandwidth: bytes a second that are reached. disk: bytes a second.
        memory: bytes; None does not bound. bytes_each: of a weight. decoding: the share of these operations that steps
            of decoding reach, whose products are small.
    """

    compute: float
    bandwidth: float
    disk: float
    memory: float | None = None
    bytes_each: int = 2
    decoding: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A model on a machine.

    Attributes:
        weights: bytes. rows: how many are decoded at once. needed: bytes in all. fits: whether they do.
    """

    speed: Speed
    weights: float
    rows: int
    needed: float
    fits: bool


# What the probe's sums, the logits and the machine's own software take, in bytes.
_RESERVE = 1.5e9


def estimate(shape: Shape, hardware: Hardware, rows: int, length: float) -> Estimate:
    """The speeds of a model of a shape, by the formulas at the top of this file.

    Args:
        rows: the recipe's; fewer where memory holds fewer. length: the mean tokens of a row, prompt and answer.
    """
    weights = float(parameters(shape) * hardware.bytes_each)
    cache = cache_bytes(shape, hardware.bytes_each) * length
    fits = True
    if hardware.memory is not None:
        left = hardware.memory - weights - _RESERVE
        fits = left >= cache
        rows = max(1, min(rows, int(left / cache))) if fits else 1
    inner = 2.0 * parameters(shape, embedding=False)
    head = 2.0 * shape.d * shape.vocabulary
    forward = inner / hardware.compute
    step = max(weights / hardware.bandwidth, rows * (inner + head) / (hardware.compute * hardware.decoding))
    step += rows * cache / hardware.bandwidth
    scored = 1 / (forward + head / hardware.compute)
    speed = Speed(
        rows / step,
        1 / forward,
        scored,
        weights / hardware.disk,
        scored / STEP_OF_LORA,
        scored / STEP_OF_ALL,
        hardware.disk,
    )
    return Estimate(speed, weights, rows, weights + rows * cache + _RESERVE, fits)
