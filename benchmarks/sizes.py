"""The sizes that a benchmark runs at: the study's, and one where a figure means nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig


@dataclass(frozen=True)
class Size:
    """Encoders and batches of one size.

    Attributes:
        name: As the `--size` option calls it.
        image: Pixels of an image's side.
        patch: Pixels of a patch's side.
        width: Numbers of one token, of both encoders.
        heads: Attention heads of both encoders and of the fusion head.
        vit_layers, text_layers: Blocks of the encoders.
        vocabulary: Entries of the tokenizer.
        sequence_length: Tokens of a sentence, end to end.
        mlp_dim: Width of the head's hidden layer.
        rows: Rows of a step.
    """

    name: str
    image: int
    patch: int
    width: int
    heads: int
    vit_layers: int
    text_layers: int
    vocabulary: int
    sequence_length: int
    mlp_dim: int
    rows: int

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return (self.image // self.patch) ** 2

    @property
    def text_config(self) -> dict[str, Any]:
        """A text preset's `config.json`."""
        return {
            "class_name": "DistilBertBackbone",
            "config": {
                "vocabulary_size": self.vocabulary,
                "num_layers": self.text_layers,
                "num_heads": self.heads,
                "hidden_dim": self.width,
                "intermediate_dim": 4 * self.width,
                "dropout": 0.1,
                "max_sequence_length": 512,
            },
        }

    def train(self, k_txt: int, **settings: Any) -> TrainConfig:
        """Return a run's settings, the head in proportion."""
        head = {"head_dim": self.width // self.heads, "mlp_dim": self.mlp_dim}
        own = {"k_txt": k_txt, "batch_size": self.rows}
        return TrainConfig(**{**own, **head, **settings})

    def vision_backbone(self, **settings: Any) -> Any:
        """Return the vision encoder with random weights."""
        import keras_hub

        return keras_hub.models.ViTBackbone(
            image_shape=(self.image, self.image, 3),
            patch_size=self.patch,
            num_layers=self.vit_layers,
            num_heads=self.heads,
            hidden_dim=self.width,
            mlp_dim=4 * self.width,
            **settings,
        )

    def text_backbone(self, **settings: Any) -> Any:
        """Return the text encoder with random weights."""
        import keras_hub

        config = {**self.text_config["config"], **settings}
        return keras_hub.models.DistilBertBackbone.from_config(config)

    def write_vision_preset(self, folder: Path) -> Path:
        """Write the vision encoder with random weights, and its image converter."""
        import keras_hub

        self.vision_backbone().save_to_preset(str(folder))
        keras_hub.layers.ViTImageConverter(
            image_size=(self.image, self.image), scale=1 / 127.5, offset=-1.0
        ).save_to_preset(str(folder))
        return folder

    def write_text_preset(self, folder: Path) -> Path:
        """Write the text encoder with random weights, and a tokenizer that knows `word(i)`."""
        import keras_hub

        self.text_backbone().save_to_preset(str(folder))
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = [word(i) for i in range(self.vocabulary - len(special))]
        keras_hub.models.DistilBertTokenizer([*special, *words]).save_to_preset(str(folder))
        return folder


def word(number: int) -> str:
    """Return a word that is one token."""
    return f"w{number}"


STUDY = Size("study", 224, 16, 768, 12, 12, 6, 30522, 24, 512, 32)
TINY = Size("tiny", 32, 8, 16, 2, 2, 4, 64, 24, 8, 8)
SIZES = {size.name: size for size in (STUDY, TINY)}
