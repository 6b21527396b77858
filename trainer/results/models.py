"""A run's model twice: over stored features, and from pixels and sentences, end to end."""

from __future__ import annotations

import dataclasses

import keras

from featstore.encoders.tower import TextEncoder, VisionEncoder
from trainer.model.end_to_end import build_end_to_end
from trainer.model.head import VISION_NAME
from trainer.model.weights import transfer_weights
from trainer.results.score import Scorer
from trainer.run.checkpoint import build_model
from trainer.run.step import Predictor, make_predictor


@dataclasses.dataclass
class Models:
    """Both models, with one run's weights, in float32."""

    cached: Predictor
    end_to_end: keras.Model
    vision: VisionEncoder
    text: TextEncoder


def load_models(scorer: Scorer) -> Models:
    """Build both models with the weights of a run."""
    config, best = scorer.run.config, scorer.model
    train = dataclasses.replace(config.train, dtype_policy="float32")
    predictor = scorer.predictor
    if config.train != train:
        row_shape = scorer.project.images().row_shape
        cached = build_model(dataclasses.replace(config, train=train), row_shape)
        transfer_weights(best, cached)
        predictor = make_predictor([cached])
    encoders, store = config.encoders, config.store
    vision = VisionEncoder(encoders.vit, scorer.project.vision_spec.tokens)
    text = TextEncoder(encoders.text, encoders.sequence_length)
    model = build_end_to_end(
        vision.backbone, text.backbone, train, store.tokens, config.data.classes
    )
    transfer_weights(best, model)
    outputs = {"features": model.get_layer(VISION_NAME).output, "logits": model.output}
    both = keras.Model(model.input, outputs)
    both.compile(jit_compile=False)
    return Models(predictor, both, vision, text)
