"""Intervals, paired tests and temperature against brute force, scipy, scikit-learn, simulation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk

from trainer.logits import sigmoid
from trainer.metrics import (
    average_precision,
    brier,
    calibration_error,
    evaluate_logits,
    log_loss,
    sweep_threshold,
)
from trainer.statistics import (
    TEMPERATURES,
    Clustered,
    bootstrap,
    fit_temperature,
    intervals,
    mcnemar,
    middle,
    paired_difference,
    percentiles,
    permutation,
    proportion_interval,
    reliability,
    threshold_interval,
)
from trainer.statistics.clustered import CHUNK_VALUES

# A coarse grid, so that ties and rows at a threshold are common.
rows_of_images = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.integers(0, 1), st.integers(-12, 12)),
    min_size=1,
    max_size=30,
)


def columns(rows: list[tuple[str, int, int]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    return [r[0] for r in rows], np.array([r[1] for r in rows]), np.array([r[2] for r in rows]) / 4


def made(images: int, rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of images that share an effect on how right the logits are."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"photo{i}" for i in range(images)], rows)
    labels = rng.integers(0, 2, images * rows)
    effect = np.repeat(rng.normal(1, 1.5, images), rows)
    return groups, labels, (2 * labels - 1) * effect + rng.normal(size=images * rows)


def draws_of(clustered: Clustered) -> np.ndarray:
    return np.concatenate(list(clustered.counts())).astype(int)


def resampled(clustered: Clustered) -> list[np.ndarray]:
    """The rows of each draw, written out."""
    return [np.repeat(np.arange(clustered.rows), n[clustered.image_of_row])
            for n in draws_of(clustered)]  # fmt: skip


def test_draws_are_of_images_and_depend_on_nothing_else() -> None:
    groups = ["b", "a", "b", "c", "c", "c"]
    draws = draws_of(Clustered(groups, draws=50))
    assert draws.shape == (50, 3)
    assert (draws.sum(axis=1) == 3).all()
    assert (draws_of(Clustered(["c", "a", "b"], draws=50)) == draws).all()
    assert (draws_of(Clustered(groups, draws=20)) == draws[:20]).all()
    assert (draws_of(Clustered(groups, draws=50, seed=1)) != draws).any()
    # Images are drawn alike.
    means = draws_of(Clustered(groups, draws=20_000)).mean(axis=0)
    assert means == pytest.approx([1, 1, 1], abs=0.03)


def test_draws_are_the_same_however_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, labels, logits = made(40, 3)
    clustered = Clustered(groups, draws=30)
    whole, figures = draws_of(clustered), intervals(labels, logits, 0.4, clustered)
    monkeypatch.setattr("trainer.statistics.clustered.CHUNK_VALUES", 7 * clustered.rows)
    assert len(list(clustered.counts())) == 5
    assert (draws_of(clustered) == whole).all()
    for name, found in intervals(labels, logits, 0.4, clustered).items():
        assert found == pytest.approx(figures[name])


def test_no_part_of_many_rows_is_large() -> None:
    clustered = Clustered(np.arange(60_000) % 30_000, draws=2000)
    counts = next(clustered.counts())
    assert counts.shape[0] * clustered.rows <= CHUNK_VALUES


@given(rows_of_images, st.sampled_from([0.0, 0.3, 0.5, 0.55]))
@settings(max_examples=40, deadline=None)
def test_each_draw_is_what_the_drawn_rows_give(
    rows: list[tuple[str, int, int]], threshold: float
) -> None:
    groups, labels, logits = columns(rows)
    clustered = Clustered(groups, draws=8)
    found = bootstrap(labels, logits, threshold, clustered)
    for draw, at in enumerate(resampled(clustered)):
        expected = evaluate_logits(labels[at], logits[at], threshold)
        flat = {
            **{name: expected[name] for name in ("auc", "average_precision", "brier", "loss")},
            "calibration_error": expected["calibration_error"],
            **{name: expected["at_threshold"][name] for name in ("accuracy", "macro_f1")},
            "accuracy_at_half": expected["at_half"]["accuracy"],
            "macro_f1_at_half": expected["at_half"]["macro_f1"],
        }
        assert flat.keys() == found.keys()
        for name, value in flat.items():
            shown = found[name][draw]
            assert np.isnan(shown) if value is None else shown == pytest.approx(value, abs=1e-9)


def of_three(count: int, images: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return groups, labels and logits of three classes; ties among them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count).astype(np.int8)
    logits = np.round(2 * rng.normal(size=(count, 3)) + 2 * np.eye(3)[labels], 1)
    return [f"i{i}" for i in rng.integers(0, images, count)], labels, logits


@pytest.mark.parametrize("seed", range(3))
def test_each_draw_of_three_classes_is_what_the_drawn_rows_give(seed: int) -> None:
    # So few rows that a draw may lack a class.
    groups, labels, logits = of_three(12, 5, seed)
    clustered = Clustered(groups, draws=12)
    found = bootstrap(labels, logits, None, clustered)
    for draw, at in enumerate(resampled(clustered)):
        expected = evaluate_logits(labels[at], logits[at])
        flat = {
            **{name: expected["at_argmax"][name] for name in ("accuracy", "macro_f1")},
            **{name: expected[name] for name in ("auc", "average_precision", "brier", "loss")},
            "calibration_error": expected["calibration_error"],
        }
        assert flat.keys() == found.keys()
        for name, value in flat.items():
            shown = found[name][draw]
            assert np.isnan(shown) if value is None else shown == pytest.approx(value, abs=1e-9)


def test_two_logits_of_two_classes_are_one() -> None:
    """The softmax of (0, z) is the sigmoid of z: every figure is the same either way."""
    groups, labels, logits = made(40, 6)
    clustered = Clustered(groups, draws=20)
    pairs = np.stack([np.zeros(len(logits)), logits], axis=1)
    one, two = (bootstrap(labels, z, t, clustered) for z, t in ((logits, 0.5), (pairs, None)))
    for name in ("accuracy", "macro_f1", "auc", "brier", "calibration_error", "loss"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-12, err_msg=name)
    assert fit_temperature(labels, pairs) == pytest.approx(fit_temperature(labels, logits))
    assert reliability(labels, np.stack([1 - sigmoid(logits), sigmoid(logits)], axis=1)) == [
        pytest.approx(line) for line in reliability(labels, sigmoid(logits))
    ]


def test_weights_agree_with_scikit_learn() -> None:
    groups, labels, logits = made(30, 4)
    logits = np.round(logits, 1)
    clustered = Clustered(groups, draws=20)
    found = bootstrap(labels, logits, 0.5, clustered)
    for draw, counts in enumerate(draws_of(clustered)):
        weights = counts[clustered.image_of_row]
        probabilities = sigmoid(logits)
        expected = {
            "auc": sk.roc_auc_score(labels, logits, sample_weight=weights),
            "average_precision": sk.average_precision_score(labels, logits, sample_weight=weights),
            "brier": sk.brier_score_loss(labels, probabilities, sample_weight=weights),
            "loss": sk.log_loss(labels, probabilities, sample_weight=weights),
            "macro_f1": sk.f1_score(
                labels, probabilities >= 0.5, average="macro", sample_weight=weights
            ),
        }
        for name, value in expected.items():
            assert found[name][draw] == pytest.approx(value), name


def test_one_row_an_image_is_scipys_bootstrap() -> None:
    _, labels, logits = made(300, 1)
    found = intervals(labels, logits, 0.4, Clustered(np.arange(300), draws=8000))
    of_rows = {
        "accuracy": (sigmoid(logits) >= 0.4) == labels,
        "brier": (sigmoid(logits) - labels) ** 2,
        "loss": np.logaddexp(0, np.where(labels == 1, -logits, logits)),
    }
    for name, values in of_rows.items():
        expected = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=8000,
            method="percentile",
            rng=np.random.default_rng(5),
        ).confidence_interval
        interval = found[name]
        assert interval is not None
        width = expected.high - expected.low
        assert interval["low"] == pytest.approx(expected.low, abs=0.06 * width), name
        assert interval["high"] == pytest.approx(expected.high, abs=0.06 * width), name


def test_intervals_by_image_cover_and_those_by_row_do_not() -> None:
    """400 data sets of 60 images whose eight rows are right together."""
    rng = np.random.default_rng(1)
    images, rows = 60, 8
    skill = rng.beta(1.5, 0.5, (400, images))
    right = rng.random((400, images, rows)) < skill[..., None]
    covered = {"image": 0, "row": 0}
    for data in right:
        for unit, groups in (
            ("image", np.repeat(np.arange(images), rows)),
            ("row", np.arange(images * rows)),
        ):
            clustered = Clustered(groups, draws=300)
            # Against zeros: the difference is the accuracy itself.
            found = paired_difference(data.reshape(-1), np.zeros(data.size), clustered)
            covered[unit] += found["low"] <= 0.75 <= found["high"]
    assert 0.91 <= covered["image"] / 400 <= 0.98
    assert covered["row"] / 400 < 0.8


@pytest.mark.parametrize(("images", "truth"), [(6, 0.9), (25, 0.97), (25, 0.6), (150, 0.98)])
def test_shares_of_few_images_are_covered(images: int, truth: float) -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(images), 2)
    clustered = Clustered(groups, draws=200)
    covered = 0
    for _ in range(300):
        # The second row of an image mostly goes with the first.
        first, again = rng.random((2, images)) < truth
        pairs = np.stack([first, np.where(rng.random(images) < 0.7, first, again)], axis=1)
        found = proportion_interval(pairs.reshape(-1), clustered)
        covered += found["low"] <= truth <= found["high"]
    assert covered / 300 >= 0.91


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.sampled_from([0.8, 0.95]))
@settings(deadline=None)
def test_few_rows_of_an_image_each_have_wilsons_interval(right: list[bool], level: float) -> None:
    found = proportion_interval(right, Clustered(range(len(right)), draws=50), level)
    few = min(sum(right), len(right) - sum(right)) < 10
    assert found["method"] == ("wilson" if few else "bootstrap")
    assert 0 <= found["low"] < found["high"] <= 1
    if few:
        expected = stats.binomtest(sum(right), len(right)).proportion_ci(level, method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("hits", [0.0, 0.5, 1.0])
def test_a_figure_that_no_draw_moves(hits: float) -> None:
    """All rows right, all wrong, and of each image one of both."""
    groups, images = np.repeat(np.arange(50), 2), 50
    labels = np.tile([0, 1], images)
    right = {0.0: [0, 0], 0.5: [1, 0], 1.0: [1, 1]}[hits] * images
    logits = np.where(np.equal(right, 1), 1, -1) * np.where(labels == 1, 2.0, -2.0)
    clustered = Clustered(groups, draws=200)
    found = intervals(labels, logits, 0.5, clustered)
    expected = stats.binomtest(int(hits * images), images).proportion_ci(method="wilson")
    for name in ("accuracy", "accuracy_at_half"):
        interval = found[name]
        assert interval is not None
        assert (interval["low"], interval["high"]) == pytest.approx((expected.low, expected.high))
    assert proportion_interval(right, clustered)["low"] == pytest.approx(expected.low)
    assert found["macro_f1"] is found["auc"] is found["average_precision"] is None
    # As the difference from a run that has all rows wrong.
    gap = paired_difference(right, np.zeros(len(right)), clustered)
    assert (gap["difference"], gap["method"]) == (hits, "agresti-min")
    assert gap["low"] < hits <= gap["high"]
    # A threshold that is always picked is told as what it is.
    tau = threshold_interval(labels, logits, clustered)
    assert tau is not None
    assert tau["low"] <= tau["high"]


@pytest.mark.parametrize("truth", [0.9, 0.97, 0.99])
def test_all_rows_right_is_covered(truth: float) -> None:
    """40 images, whose rows are right or wrong together: the worst case."""
    rng = np.random.default_rng(3)
    groups, labels = np.repeat(np.arange(40), 3), np.tile([0, 1, 1], 40)
    clustered, covered = Clustered(groups, draws=200), 0
    for _ in range(200):
        right = np.repeat(rng.random(40) < truth, 3)
        logits = np.where(right, 1, -1) * np.where(labels == 1, 2.0, -2.0)
        found = intervals(labels, logits, 0.5, clustered)["accuracy"]
        assert found is not None
        covered += found["low"] <= truth <= found["high"]
    assert covered / 200 >= 0.8


def test_rows_of_an_image_do_not_narrow_a_small_share() -> None:
    once = proportion_interval([1, 1, 0], Clustered(["a", "b", "c"]))
    often = proportion_interval([1, 1, 0] * 20, Clustered(["a", "b", "c"] * 20))
    assert often == once
    assert once["images"] == 3


@given(rows_of_images)
@settings(max_examples=30, deadline=None)
def test_the_threshold_is_swept_on_each_draw(rows: list[tuple[str, int, int]]) -> None:
    groups, labels, logits = columns(rows)
    clustered = Clustered(groups, draws=12)
    picked = [sweep_threshold(labels[at], sigmoid(logits[at]))[0] for at in resampled(clustered)]
    expected = middle(np.array(picked), clustered, 0.9)
    assert threshold_interval(labels, logits, clustered, 0.9) == expected


def test_the_interval_of_a_threshold_holds_the_threshold() -> None:
    groups, labels, logits = made(200, 3)
    found = threshold_interval(labels, logits, Clustered(groups, draws=500))
    assert found is not None
    assert found["low"] <= sweep_threshold(labels, sigmoid(logits))[0] <= found["high"]
    assert found["low"] < found["high"]


@given(rows_of_images.filter(lambda rows: len(rows) > 1))
@settings(deadline=None)
def test_the_temperature_is_the_best_there_is(rows: list[tuple[str, int, int]]) -> None:
    _, labels, logits = columns(rows)
    found = fit_temperature(labels, logits)
    low, high = np.log(TEMPERATURES)
    best = minimize_scalar(
        lambda log_t: log_loss(labels, logits / np.exp(log_t)),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    assert log_loss(labels, logits / found) <= best.fun + 1e-9


def test_the_temperature_of_a_run_that_is_too_sure() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, 100_000)
    labels = rng.random(len(logits)) < sigmoid(logits)
    assert fit_temperature(labels, 2.5 * logits) == pytest.approx(2.5, rel=0.02)
    assert fit_temperature(labels, 0.5 * logits) == pytest.approx(0.5, rel=0.02)
    assert fit_temperature([0, 1], [-1, 1]) == TEMPERATURES[0]
    assert fit_temperature([1, 0], [-1, 1]) == TEMPERATURES[1]


@given(rows_of_images, st.sampled_from([1, 4, 15]))
def test_the_reliability_curve_is_the_calibration_error(
    rows: list[tuple[str, int, int]], bins: int
) -> None:
    _, labels, logits = columns(rows)
    curve = reliability(labels, sigmoid(logits), bins)
    assert sum(row["rows"] for row in curve) == len(labels)
    for row in curve:
        assert row["rows"] > 0
        assert row["low"] < row["confidence"] + 1e-12
        assert row["confidence"] <= row["high"] + 1e-12
        assert row["high"] - row["low"] == pytest.approx(1 / bins)
    error = sum(row["rows"] * abs(row["accuracy"] - row["confidence"]) for row in curve)
    assert error / len(labels) == pytest.approx(calibration_error(labels, sigmoid(logits), bins))


def test_average_precision_and_brier() -> None:
    labels, scores = [0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]
    # Of two called at 0.4, half are right: 1/2 · 1 + 1/2 · 2/3.
    assert average_precision(labels, scores) == pytest.approx(0.5 + 1 / 3)
    assert average_precision([1, 1], [0.2, 0.3]) is None
    assert brier(labels, scores) == pytest.approx((0.01 + 0.36 + 0.16 + 0.04) / 4)
    assert brier([1, 1], [1, 0.5]) == pytest.approx(0.125)
    with pytest.raises(ValueError, match="are these logits"):
        brier([0, 1], [-3, 2])


def test_mcnemar_by_hand() -> None:
    a = np.array([1] * 10 + [0] * 2 + [1] * 30)
    b = np.array([0] * 10 + [1] * 2 + [1] * 30)
    found = mcnemar(a, b)
    assert (found["only_a"], found["only_b"]) == (10, 2)
    assert found["exact_p"] == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert found["chi2"] == pytest.approx((8 - 1) ** 2 / 12)
    assert found["chi2_p"] == pytest.approx(0.0433, abs=1e-4)
    same = mcnemar(a, a)
    assert (same["exact_p"], same["chi2"], same["chi2_p"]) == (1, 0, 1)
    assert mcnemar([1, 0], [0, 1])["chi2_p"] == 1


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans(), st.booleans()), min_size=1))
@settings(max_examples=40, deadline=None)
def test_the_permutation_test_flips_images(rows: list[tuple[str, bool, bool]]) -> None:
    groups = [row[0] for row in rows]
    a, b = (np.array([row[i] for row in rows]) for i in (1, 2))
    clustered = Clustered(groups, draws=1)
    sums = np.zeros(clustered.images)
    np.add.at(sums, clustered.image_of_row, a.astype(int) - b.astype(int))
    flips = [sums @ signs for signs in itertools.product((1, -1), repeat=len(sums))]
    expected = np.mean(np.abs(flips) >= abs(sums.sum()))
    found = permutation(a, b, clustered)
    assert found["exact"]
    assert found["differing_images"] == np.count_nonzero(sums)
    assert found["p"] == pytest.approx(expected)


def test_rows_of_an_image_do_not_add_evidence() -> None:
    """Every row twice: McNemar is surer, the permutation by image is not."""
    rng = np.random.default_rng(4)
    a, b = rng.random(200) < 0.7, rng.random(200) < 0.6
    groups = np.arange(200)
    once = permutation(a, b, Clustered(groups))
    twice = permutation(np.repeat(a, 2), np.repeat(b, 2), Clustered(np.repeat(groups, 2)))
    assert not once["exact"]
    assert twice == once
    doubled = mcnemar(np.repeat(a, 2), np.repeat(b, 2))
    assert doubled["exact_p"] < mcnemar(a, b)["exact_p"]
    # One row an image: both test the same thing.
    assert once["p"] == pytest.approx(mcnemar(a, b)["exact_p"], abs=0.02)


def test_a_difference_is_measured_on_the_same_draws() -> None:
    groups, labels, logits = made(50, 3)
    a, b = (logits > 0) == labels, (logits > 0.5) == labels
    clustered = Clustered(groups, draws=200)
    found = paired_difference(a, b, clustered)
    gaps = np.array([a[at].mean() - b[at].mean() for at in resampled(clustered)])
    assert found["difference"] == pytest.approx(a.mean() - b.mean())
    assert {"low": found["low"], "high": found["high"]} == pytest.approx(
        percentiles(gaps, clustered)
    )
    assert (found["method"], found["differing_images"] >= 10) == ("bootstrap", True)


def test_a_difference_on_few_images_is_agresti_and_mins() -> None:
    a, b = np.zeros((2, 30), bool)
    a[:3] = True
    found = paired_difference(a, b, Clustered(np.arange(30)))
    # Half a pair more in each cell: 3.5 alone right here, 0.5 there, of 32.
    centre, variance = 3 / 32, (4 - 3**2 / 32) / 32**2
    assert found["method"] == "agresti-min"
    assert found["differing_images"] == 3
    assert found["difference"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(centre - 1.959964 * variance**0.5)
    assert found["high"] == pytest.approx(centre + 1.959964 * variance**0.5)
    # Neither the same rows twice nor none that differs makes it sure.
    assert paired_difference(
        np.repeat(a, 2), np.repeat(b, 2), Clustered(np.repeat(np.arange(30), 2))
    ) == pytest.approx(found)
    same = paired_difference(a, a, Clustered(np.arange(30)))
    assert same["low"] == -same["high"] < 0
    one = paired_difference([1, 1, 1], [0, 0, 0], Clustered(["a", "a", "a"], draws=20))
    assert one["method"] == "agresti-min"
    assert -1 <= one["low"] < one["high"] == 1


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), min_size=1))
@settings(deadline=None)
def test_the_interval_of_few_images_holds_the_difference(
    rows: list[tuple[int, bool, bool]],
) -> None:
    """However many rows each image has."""
    groups, a, b = zip(*rows, strict=True)
    found = paired_difference(a, b, Clustered(groups, draws=5))
    assert found["method"] == "agresti-min"
    assert -1 <= found["low"] <= found["difference"] <= found["high"] <= 1


def test_one_image_says_nothing_of_others() -> None:
    one = Clustered(["a", "a", "a"], draws=20)
    labels, logits = [0, 1, 1], [0.5, -0.5, 2.0]
    assert set(intervals(labels, logits, 0.5, one).values()) == {None}
    assert threshold_interval(labels, logits, one) is None
    share = proportion_interval([1, 1, 1], one)
    assert share["low"] < 0.3
    assert share["high"] == 1


def test_draws_of_one_class_do_not_count_for_the_auc() -> None:
    found = bootstrap([0, 1], [-1, 1], 0.5, Clustered(["a", "b"], draws=40))
    known = found["auc"][~np.isnan(found["auc"])]
    assert 0 < len(known) < 40
    assert (known == 1).all()
    one_class = intervals([1, 1], [-1, 1], 0.5, Clustered(["a", "b"], draws=40))
    assert one_class["auc"] is None
    assert one_class["average_precision"] is None
    assert one_class["accuracy"] == {"low": 0, "high": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: intervals([0], [1.0], 0.5, c), "one value for each of 2 rows, found 1"),
        (lambda c: intervals([0, 1], [1.0, 2.0], 0.5, c, level=95), "such as 0.95, found 95"),
        (lambda c: proportion_interval([0.5, 1], c), "expected values 0 and 1"),
        (lambda c: paired_difference([1], [0], c), "for each of 2 rows"),
        (lambda c: paired_difference([1, 2], [0, 1], c), "expected values 0 and 1"),
        (lambda c: permutation([1, 0, 1], [0, 0, 1], c), "for each of 2 rows"),
        (lambda c: threshold_interval([0, -1], [1.0, 2.0], c), "expected labels 0 and 1"),
        (lambda c: mcnemar([1], [0, 1]), "one shape"),
        (lambda c: Clustered([]), "no rows"),
        (lambda c: Clustered(["a"], draws=0), "at least 1 draw"),
    ],
)
def test_what_cannot_be_measured_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(Clustered(["a", "b"], draws=5))
