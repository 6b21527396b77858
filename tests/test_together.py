"""Heads that share the products with the image's tokens compute what each computes alone."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

import keras
import numpy as np
import pytest
from on_jax import run_on_jax

from benchmarks.sizes import TINY
from featstore.store.numbers import Numbers
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.model import fastpath
from trainer.model.cached import build_cached_model
from trainer.run.optimizer import make_optimizer
from trainer.run.step import make_stepper

ROWS, TOKENS = 6, 5
SETTINGS = (
    TrainConfig(k_txt=0, lr=1e-2, num_heads=2, head_dim=8, mlp_dim=8, dropout=0.2),
    TrainConfig(
        k_txt=0, lr=3e-3, num_heads=1, head_dim=4, mlp_dim=5, dropout=0.0, weight_decay=0.1
    ),
    TrainConfig(
        k_txt=0, lr=1e-3, num_heads=3, head_dim=8, mlp_dim=8, attention_dropout=0.3, seed=4
    ),
    TrainConfig(k_txt=0, lr=1e-2, num_heads=2, head_dim=4, mlp_dim=4, fusion_layers=2),
)
# Where the number format is what counts: of one fusion layer and of two.
PAIR = (SETTINGS[0], SETTINGS[3])


def batch_of(dtype: str, seed: int) -> Batch:
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> Numbers:
        return Numbers.rounded(rng.normal(size=shape), dtype)

    labels, weights = rng.integers(0, 2, ROWS).astype(np.float32), np.ones(ROWS, np.float32)
    features, hidden = numbers(ROWS, TOKENS, TINY.width), numbers(ROWS, 1, TINY.width)
    mask = np.ones((ROWS, 1), bool)
    return Batch(features, hidden, mask, labels, weights, np.arange(ROWS))


def train(
    together: bool,
    policy: str = "float32",
    dtype: str = "float16",
    models: tuple[TrainConfig, ...] = SETTINGS,
    **changes: Any,
) -> Any:
    """Take three steps; return each model's losses, last logits and weights."""
    members = []
    for settings in models:
        settings = dataclasses.replace(settings, dtype_policy=policy, **changes)
        model = build_cached_model(
            TINY.text_config, TINY.width, TOKENS, settings, feature_dtype=dtype
        )
        members.append((model, make_optimizer(settings)))
    groups = [members] if together else [[member] for member in members]
    found = []
    for group in groups:
        stepper = make_stepper(group)
        losses = [stepper.train(batch_of(dtype, seed)) for seed in range(3)]
        stepper.sync()
        logits = stepper.predict(batch_of(dtype, 9))
        for i, (model, _) in enumerate(group):
            weights = [np.asarray(keras.ops.convert_to_numpy(w)) for w in model.trainable_variables]
            found.append(([float(loss[i]) for loss in losses], logits[i], weights))
    return found


@pytest.mark.parametrize(
    ("policy", "dtype", "close", "models"),
    [
        ("float32", "float16", 1e-5, SETTINGS),
        ("float32", "int8", 1e-5, PAIR),
        ("mixed_bfloat16", "float16", 0.05, PAIR),
        ("mixed_float16", "float16", 0.01, PAIR),
    ],
    ids=lambda given: f"{len(given)} models" if isinstance(given, tuple) else str(given),
)
def test_heads_together_are_the_heads_alone(
    policy: str,
    dtype: str,
    close: float,
    models: tuple[TrainConfig, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products: list[int] = []
    scores = fastpath._token_scores
    monkeypatch.setattr(fastpath, "_token_scores", lambda *a: products.append(1) or scores(*a))
    alone, taken = train(False, policy, dtype, models), len(products)
    products.clear()
    together = train(True, policy, dtype, models)
    # Of a step and of a prediction; those of building the models are the same.
    assert taken - len(products) == 2 * (len(models) - 1)
    for (losses, logits, weights), (own_losses, own_logits, own) in zip(
        together, alone, strict=True
    ):
        np.testing.assert_allclose(losses, own_losses, rtol=close)
        np.testing.assert_allclose(logits, own_logits, atol=10 * close)
        for one, two in zip(weights, own, strict=True):
            np.testing.assert_allclose(one, two, atol=10 * close)
    assert alone[0][0] != alone[1][0]


@pytest.mark.parametrize("changes", [{"fast_path": False}, {"queries": "all"}], ids=str)
def test_others_are_called_one_after_the_other(changes: dict[str, Any]) -> None:
    together, alone = (train(way, models=PAIR, **changes) for way in (True, False))
    assert [losses for losses, *_ in together] == [losses for losses, *_ in alone]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_the_same_under_jax() -> None:
    program = (
        "import json, test_together as t;"
        "print(json.dumps([[losses for losses, *_ in t.train(way)] for way in (True, False)]))"
    )
    together, alone = json.loads(run_on_jax("-c", program, timeout=300).splitlines()[-1])
    np.testing.assert_allclose(together, alone, rtol=1e-5)
