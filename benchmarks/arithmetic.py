"""What one training step of the fast path computes and moves, counted from its algebra.

`trainer.model.fastpath` in matrix products. A product of (m, k) by (k, n) takes
2·m·k·n operations. Backwards there is one more for each operand that has a
gradient: cached features and hidden states have none, so the products over
them are cheaper than those over trained states. tests/test_benchmarks.py holds
the count against the products in the compiled step's own graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.sizes import Size
from trainer.model.sizes import count_parameters

# Of Keras's AdamW for each parameter: clipping 3, the two moments 7, decay 2, the update 5.
ADAMW_OPERATIONS = 17
# Forward and backward read the weight, and the latter writes a gradient. The optimizer reads that
# for its norm; then it reads weight, gradient and moments, and writes all but the gradient.
PARAMETER_PASSES = 2 + 1 + 1 + 4 + 3


@dataclass(frozen=True)
class Product:
    """Equal matrix products of the forward pass.

    Attributes:
        part: Where they belong.
        count: How many.
        m, k, n: Shapes (m, k) and (k, n).
        gradients: Operands that have a gradient, 1 or 2.
    """

    part: str
    count: int
    m: int
    k: int
    n: int
    gradients: int

    @property
    def operations(self) -> int:
        """Floating-point operations, forwards and backwards."""
        return 2 * self.count * self.m * self.k * self.n * (1 + self.gradients)

    @property
    def results(self) -> int:
        """Numbers that the forward products give."""
        return self.count * self.m * self.n


def _single_query(
    part: str, over: str, rows: int, tokens: int, size: Size, query_has: bool, tokens_have: bool
) -> list[Product]:
    """Return the products of `single_query_attention`; those over the tokens go to `over`."""
    width, heads = size.width, size.heads
    head_dim = width // heads
    scores = 2 if tokens_have else 1
    return [
        Product(part, 1, rows, width, width, 2 if query_has else 1),
        Product(part, heads, rows, head_dim, width, 2),
        Product(over, rows, tokens, width, heads, scores),
        Product(over, rows, heads, tokens, width, scores),
        Product(part, heads, rows, width, head_dim, 2),
        Product(part, 1, rows, width, width, 2),
    ]


def _feed_forward(part: str, rows: int, size: Size) -> list[Product]:
    width = size.width
    return [Product(part, 1, rows, a, b, 2) for a, b in ((width, 4 * width), (4 * width, width))]


def products(size: Size, k_txt: int, rows: int, length: int) -> list[Product]:
    """Return the matrix products of one step.

    Args:
        size: Of the encoders and of the head; DistilBERT's layers.
        k_txt: Text layers that train.
        rows: Rows of the batch.
        length: Tokens that it is padded to.
    """
    width, heads = size.width, size.heads
    head_dim = width // heads
    found: list[Product] = []
    for layer in range(k_txt):
        trained_below = layer > 0
        if layer < k_txt - 1:
            part = "text layers"
            flat = rows * length
            found += 3 * [Product(part, 1, flat, width, width, 2 if trained_below else 1)]
            found += [
                Product(part, rows * heads, length, head_dim, length, 2),
                Product(part, rows * heads, length, length, head_dim, 2),
                Product(part, 1, flat, width, width, 2),
                *_feed_forward(part, flat, size),
            ]
        else:
            part = "last text layer"
            found += _single_query(part, part, rows, length, size, trained_below, trained_below)
            found += _feed_forward(part, rows, size)
    found += _single_query("head", "attention", rows, size.tokens, size, k_txt > 0, False)
    found += [
        Product("head", 1, rows, width, size.mlp_dim, 2),
        Product("head", 1, rows, size.mlp_dim, 1, 2),
    ]
    return found


def parameters(size: Size, k_txt: int) -> int:
    """Return the numbers that train: the head and the last text layers."""
    return count_parameters(size.text_config, {"hidden_dim": size.width}, size.train(k_txt))


def operations(size: Size, k_txt: int, rows: int, length: int) -> dict[str, int]:
    """Return the floating-point operations of one step by part.

    Matrix products are counted exactly, and AdamW; softmax, norms, activations
    and dropout are left out, as they are small beside either.
    """
    parts = {"attention": 0, "head": 0, "text layers": 0, "last text layer": 0}
    for product in products(size, k_txt, rows, length):
        parts[product.part] += product.operations
    return {**parts, "AdamW": ADAMW_OPERATIONS * parameters(size, k_txt)}


def bytes_moved(size: Size, k_txt: int, rows: int, length: int) -> dict[str, int]:
    """Return the bytes that one step must move between memory and processor, by part.

    Features are read once forwards and once backwards in the stored dtype;
    each forward product's result but those over image tokens is written and
    read again in float32; parameters are passed over `PARAMETER_PASSES` times.
    """
    results = sum(p.results for p in products(size, k_txt, rows, length) if p.part != "attention")
    stored = rows * (size.tokens * size.width + length * size.width)
    return {
        "features": 2 * 2 * stored,
        "activations": 2 * 4 * results,
        "parameters": PARAMETER_PASSES * 4 * parameters(size, k_txt),
    }
