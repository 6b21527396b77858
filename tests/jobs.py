"""What the tests ask extraction for."""

from __future__ import annotations

from collections.abc import Sequence

from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import ImageIndex
from featstore.encoders.spec import FeatureSpec, text_spec, vision_spec
from featstore.extract.plan import Job


def image_job(
    encoders: EncodersConfig,
    store: StoreConfig,
    ids: Sequence[str],
    index: ImageIndex,
    spec: FeatureSpec | None = None,
) -> Job:
    """Return the job of photos; None: by the spec of the settings."""
    return Job(spec or vision_spec(encoders, store), encoders.vit, store, ids, index)


def text_job(
    encoders: EncodersConfig, store: StoreConfig, sentences: Sequence[str], k_txt: int
) -> Job:
    """Return the job of sentences."""
    return Job(text_spec(encoders, store, k_txt), encoders.text, store, sentences)
