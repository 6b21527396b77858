"""What turns sentences into the token ids of a text preset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from featstore.encoders.families import FAMILIES
from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import TOKENIZER_FILE, Preset, load_failure

# Tokens of a whole sentence are counted up to here, so many sentences at a time. Most have fewer
# than `FEW_COUNTED`, and need no row of thousands.
MOST_COUNTED, COUNTED_ROWS = 4096, 256
FEW_COUNTED = 64


class StartEndPreprocessor:
    """Start token, sentence, end token, padding: how a causal encoder's sentences are packed.

    Called as keras-hub's own preprocessors, which has none for such an encoder alone.

    Args:
        tokenizer: A keras-hub tokenizer with a start and an end token; sentences are given to
            it in lower case, as CLIP's preprocessor does.
        sequence_length: Tokens of a row; of a longer sentence the end token stays.
    """

    def __init__(self, tokenizer: Any, sequence_length: int) -> None:
        import keras_hub

        self.tokenizer = tokenizer
        self._packer = keras_hub.layers.StartEndPacker(
            sequence_length,
            start_value=tokenizer.start_token_id,
            end_value=tokenizer.end_token_id,
            pad_value=tokenizer.pad_token_id,
            return_padding_mask=True,
        )

    def __call__(self, sentences: Any) -> dict[str, Any]:
        """Pack sentences: a list of `str`, or in a graph a string tensor of shape (batch,).

        Returns:
            `token_ids` and `padding_mask`, of shape (batch, sequence_length).
        """
        if isinstance(sentences, list):
            lower: Any = [sentence.lower() for sentence in sentences]
        else:
            import tensorflow as tf

            lower = tf.strings.lower(sentences, encoding="utf-8")
        token_ids, padding_mask = self._packer(self.tokenizer(lower))
        return {"token_ids": token_ids, "padding_mask": padding_mask}


def load_preprocessor(preset: Preset, sequence_length: int) -> Any:
    """Load what turns sentences of a preset into token ids, without its backbone.

    Args:
        preset: A text preset, or the text tower of one.
        sequence_length: Tokens of a row.

    Returns:
        From a list of sentences to `token_ids` and `padding_mask`; its `tokenizer` is
        keras-hub's.

    Raises:
        PresetError: The tokenizer cannot be loaded.
    """
    import keras
    import keras_hub

    try:
        if FAMILIES[preset.class_name].query == "first":
            return keras_hub.models.TextClassifierPreprocessor.from_preset(
                preset.location, sequence_length=sequence_length
            )
        # By its own class: keras-hub knows of a lone tower's no tokenizer.
        tokenizer = keras.saving.deserialize_keras_object(preset.read_json(TOKENIZER_FILE))
        tokenizer.load_preset_assets(preset.location)
        return StartEndPreprocessor(tokenizer, sequence_length)
    except Exception as error:
        raise load_failure(preset, "tokenizer", error) from error


@pinned_framework()
def token_counts(preset: Preset, sentences: Sequence[str]) -> list[int]:
    """Return the tokens of whole sentences, start and end included; `MOST_COUNTED` at most.

    Raises:
        PresetError: The tokenizer cannot be loaded.
    """
    counts = _counts(preset, sentences, FEW_COUNTED)
    longer = [i for i, count in enumerate(counts) if count == FEW_COUNTED]
    again = _counts(preset, [sentences[i] for i in longer], MOST_COUNTED) if longer else []
    for i, count in zip(longer, again, strict=True):
        counts[i] = count
    return counts


def _counts(preset: Preset, sentences: Sequence[str], most: int) -> list[int]:
    """Count tokens, those past `most` of a sentence not."""
    preprocessor = load_preprocessor(preset.tower("text"), most)
    counts: list[int] = []
    for start in range(0, len(sentences), COUNTED_ROWS):
        packed = preprocessor(list(sentences[start : start + COUNTED_ROWS]))
        counts += np.asarray(packed["padding_mask"]).sum(axis=1).tolist()
    return counts
