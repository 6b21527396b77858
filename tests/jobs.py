"""What the tests ask extraction for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import ImageIndex
from featstore.encoders.spec import text_spec, vision_spec
from featstore.extract.plan import Job

Load = Callable[[], Any]


def image_job(
    encoders: EncodersConfig,
    store: StoreConfig,
    ids: Sequence[str],
    index: ImageIndex,
    load: Load | None = None,
) -> Job:
    """Return the job of photos."""
    return Job(vision_spec(encoders, store), encoders.vit, store, ids, index, load)


def text_job(
    encoders: EncodersConfig,
    store: StoreConfig,
    sentences: Sequence[str],
    k_txt: int,
    load: Load | None = None,
) -> Job:
    """Return the job of sentences."""
    spec = text_spec(encoders, store, k_txt)
    return Job(spec, encoders.text, store, sentences, load=load)
