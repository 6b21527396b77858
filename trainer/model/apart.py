"""A cached model taken apart: what enters its head, what its attention weighs, its gradients.

The layers are the model's own, called one after the other as its graph calls them; the logits
are the model's, and the attention weights are those that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from featstore.encoders.framework import pinned_framework
from trainer.batches import Batch
from trainer.model.head import (
    POOL_NAME,
    TAIL_NAME,
    VISION_TAIL_NAME,
    fusion_layers,
    fusion_names,
)

FloatArray = NDArray[np.float32]

CHUNK_BYTES = 64 << 20
"""Of the tokens that the head is given at once."""
LENGTH_STEP = 4
"""Sentences are padded to a multiple of it, so that few lengths are compiled."""


@dataclass(frozen=True, eq=False)
class Entering:
    """What enters the layers of a cached model for one row.

    Attributes:
        tokens: float32 of shape (1, tokens, width): the image's tokens as the head reads them,
            after the vision blocks that train.
        hidden: float32 of shape (1, length, width): what enters the text layers that train.
        mask: bool of shape (1, length): where a text token is real.
    """

    tokens: FloatArray
    hidden: FloatArray
    mask: NDArray[np.bool_]


class Apart:
    """A cached model's layers.

    Args:
        model: From `build_cached_model`, with the weights to look at.
    """

    def __init__(self, model: keras.Model) -> None:
        layers = {layer.name: layer for layer in model.layers}
        self.text_tail, self.vision_tail = layers[TAIL_NAME], layers.get(VISION_TAIL_NAME)
        count = fusion_layers(model)
        self.fusion = [[layers[n] for n in fusion_names(i)] for i in range(1, count + 1)]
        self.pool = layers.get(POOL_NAME)
        names = [] if self.pool is not None else ["flatten_cls"]
        self.after = [layers[name] for name in (*names, "mlp_1", "logit")]
        self.outputs = int(model.output.shape[-1])
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @pinned_framework()
    def entering(self, batch: Batch) -> Entering:
        """Return what enters the layers for a batch of one row."""
        # As the graph widens them; see `Numbers.plain`.
        features, hidden = (
            np.asarray(numbers.plain()).astype(np.float32)
            for numbers in (batch.features, batch.hidden)
        )
        if self.vision_tail is not None:
            tail = self.vision_tail(ops.convert_to_tensor(features), training=False)
            features = np.asarray(ops.convert_to_numpy(ops.cast(tail, "float32")))
        mask, length = batch.padding_mask, batch.padding_mask.shape[1]
        missing = -length % LENGTH_STEP if length > 1 else 0
        hidden = np.pad(hidden, ((0, 0), (0, missing), (0, 0)))
        return Entering(features, hidden, np.pad(mask, ((0, 0), (0, missing))))

    @pinned_framework()
    def look(self, row: Entering) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Run the layers for one row.

        Returns:
            The logits, float32 of shape (outputs,); the weights of each cross-attention, float32
            of shape (layers, heads, queries, tokens), which sum to 1 over the tokens; and the
            text states that ask, float32 of shape (1, queries, width). Queries are the one text
            token that asks, or every real one.
        """

        def run(hidden: Any, tokens: Any, mask: Any) -> Any:
            weights: list[Any] = []
            states = self._states(hidden, mask)
            return self._logits(states, tokens, mask, weights), weights, states

        logits, weights, states = self._run("look", run, row.hidden, row.tokens, row.mask)
        found = np.stack([_array(own)[0] for own in weights])
        if self.pool is not None:
            found = found[:, :, : int(row.mask.sum())]
        return _array(logits)[0], found, _array(states)

    @pinned_framework()
    def without(self, row: Entering, states: FloatArray, kept: NDArray[np.bool_]) -> FloatArray:
        """Run the head with some of an image's tokens set to zero, many choices at a time.

        Args:
            row: The row.
            states: The text states that ask, as `look` returns them.
            kept: bool of shape (choices, tokens): the tokens that stay.

        Returns:
            float32 of shape (choices, outputs): the logits.
        """
        size = max(1, CHUNK_BYTES // row.tokens.nbytes)
        found = []
        for start in range(0, len(kept), size):
            chosen = kept[start : start + size]
            tokens = row.tokens * chosen[:, :, None]
            asking, mask = (np.repeat(x, len(chosen), axis=0) for x in (states, row.mask))
            found.append(_array(self._run("without", self._logits, asking, tokens, mask)))
        return np.concatenate(found)

    @pinned_framework()
    def gradients(self, row: Entering, label: int) -> tuple[FloatArray, FloatArray]:
        """Return the gradients of a row's log odds; see `log_odds`.

        Args:
            row: The row.
            label: Of three classes, whose.

        Returns:
            float32 of the shapes of `row.tokens` and `row.hidden`. What no number depends on has
            zeros.
        """

        def score(tokens: Any, hidden: Any, mask: Any) -> Any:
            logits = self._logits(self._states(hidden, mask), tokens, mask)
            if self.outputs == 1:
                return ops.sum(logits)
            others = [i for i in range(self.outputs) if i != label]
            rest = ops.stack([logits[:, i] for i in others], axis=-1)
            return ops.sum(logits[:, label] - ops.logsumexp(rest, axis=-1))

        def run(tokens: Any, hidden: Any, mask: Any) -> Any:
            if keras.backend.backend() == "jax":
                import jax

                return jax.grad(score, argnums=(0, 1))(tokens, hidden, mask)
            import tensorflow as tf

            with tf.GradientTape() as tape:
                tape.watch([tokens, hidden])
                value = score(tokens, hidden, mask)
            return tape.gradient(value, [tokens, hidden], unconnected_gradients="zero")

        name = f"gradients {label if self.outputs > 1 else ''}"
        of_tokens, of_hidden = map(_array, self._run(name, run, row.tokens, row.hidden, row.mask))
        return of_tokens, of_hidden

    def _run(self, name: str, function: Callable[..., Any], *arrays: NDArray[Any]) -> Any:
        """Call a function of arrays (rows, length, ...), which is traced once.

        Of JAX once for each shape.
        """
        if name not in self._compiled:
            if keras.backend.backend() == "jax":
                import jax

                self._compiled[name] = jax.jit(function)
            else:
                import tensorflow as tf

                # A length of 1, that of the one token that asks, is always 1.
                signature = [
                    tf.TensorSpec([None, 1 if x.shape[1] == 1 else None, *x.shape[2:]], x.dtype)
                    for x in arrays
                ]
                self._compiled[name] = tf.function(
                    function, input_signature=signature, autograph=False
                )
        return self._compiled[name](*map(ops.convert_to_tensor, arrays))

    def _states(self, hidden: Any, mask: Any) -> Any:
        return self.text_tail(hidden, padding_mask=mask, training=False)

    def _logits(self, states: Any, tokens: Any, mask: Any, weights: list[Any] | None = None) -> Any:
        """Run the head; add each attention's weights to `weights`, if given."""
        x = states
        for attention, residual, norm in self.fusion:
            if weights is None:
                attended = attention(x, tokens, training=False)
            else:
                attended, own = attention(x, tokens, return_attention_scores=True, training=False)
                weights.append(own)
            x = norm(residual([x, attended]))
        if self.pool is not None:
            x = self.pool(x, mask=mask)
        for layer in self.after:
            x = layer(x)
        return x


def _array(tensor: Any) -> FloatArray:
    return np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))


def log_odds(logits: FloatArray, label: int) -> NDArray[np.float64]:
    """Return the log odds that logits give.

    Args:
        logits: Float of shape (rows, outputs).
        label: Of three classes, whose.

    Returns:
        float64 of shape (rows,): the one logit, which is log(p / (1 - p)) of entailment; of three
        classes log(p / (1 - p)) of `label`. Unlike one logit of several, it does not change when
        the same number is added to all of them.
    """
    values = logits.astype(np.float64)
    if values.shape[1] == 1:
        return np.asarray(values[:, 0])
    rest = np.delete(values, label, axis=1)
    top = rest.max(axis=1, keepdims=True)
    return np.asarray(values[:, label] - top[:, 0] - np.log(np.exp(rest - top).sum(axis=1)))
