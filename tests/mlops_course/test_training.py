"""Chapter 2: pipelines, metrics, gates, packaging. Each section protects one promise of the training."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer

from mlops_course import blueprint, training
from mlops_course.blueprint import (
    CATEGORICAL,
    COLUMNS,
    CRITERIA,
    FALSE_WARNING_COST,
    FEATURES,
    INPUTS,
    LABEL,
    MISS_COST,
    MODEL_NAME,
    NUMERIC,
    Manifest,
    VersionError,
    add_derived,
    artifact_digest,
    canonical_json,
    discard_version,
    features_sha256,
    model_input,
    read_registry,
    releases_folder,
    sha256_file,
    split_ledger,
    verify_artifact,
)
from mlops_course.training import (
    MAX_MISSING,
    MIN_TRAIN_ROWS,
    RECIPES,
    THRESHOLDS,
    GateRefusal,
    GateResult,
    Recipe,
    Trained,
    as_request,
    assess,
    baseline_scores,
    boosting_pipeline,
    by_segment,
    calibration_error,
    calibration_table,
    choose_threshold,
    cost_per_flight,
    criterion_gate,
    data_summary,
    day_bootstrap,
    day_weights,
    decision_metrics,
    error_samples,
    fit,
    golden_cases,
    golden_flights,
    headline_metrics,
    last_approved,
    logistic_pipeline,
    middle_95,
    model_card,
    onnx_scores,
    package,
    parity,
    png,
    provenance,
    recall_at_budget,
    release_record,
    repeat_gate,
    require,
    run_gates,
    scores,
    search,
    to_onnx,
    warned_first,
)

# skl2onnx hands True and False to a field of whole numbers, which protobuf 7.34 will refuse; protobuf 6 is locked.
pytestmark = pytest.mark.filterwarnings("ignore:Field onnx.AttributeProto.ints. Expected an int, got a boolean")

Splits = dict[str, pd.DataFrame]
Evidence = dict[str, Any]
VERSIONS = list(RECIPES)
USED = ("train", "validation", "test")


def one_setting(version: str, **changes: Any) -> Recipe:
    """Return a recipe that tries the chosen setting only, so that a test fits one model instead of three."""
    recipe = RECIPES[version]
    return recipe.model_copy(update={"search": recipe.search[:1], **changes})


@pytest.fixture(scope="session")
def logistic(splits: Splits) -> Trained:
    """Return version 1.0.0, trained on all rows with its chosen setting. Tests must not change it."""
    recipe = one_setting("1.0.0")
    pipeline, tried = search(recipe, splits["train"], splits["validation"])
    return assess(recipe, pipeline, tried, splits, rounds=20)


@pytest.fixture(scope="session")
def shelf(artifacts_root: Path) -> Path:
    """Return the folder of the built versions."""
    return artifacts_root / MODEL_NAME


@pytest.fixture(scope="session")
def stored(shelf: Path) -> dict[str, Pipeline]:
    """Return the packaged pipelines, verified before they are unpickled."""
    registry = read_registry(shelf)
    for version in VERSIONS:
        verify_artifact(shelf / version, registry.versions[version])
    return {version: joblib.load(shelf / version / "model.joblib") for version in VERSIONS}


@pytest.fixture(scope="session")
def awkward(splits: Splits) -> pd.DataFrame:
    """Return every test row, then some with nothing measured, and some with airlines and airports never seen."""
    test = splits["test"]
    nullable = [c.name for c in INPUTS if c.nullable]
    blank = test.sample(200, random_state=1).assign(**dict.fromkeys(nullable, np.nan))
    foreign = test.sample(200, random_state=2).assign(carrier="ZZ", origin="XXX", dest="ZZZ")
    return pd.concat([test, blank, foreign, blank.assign(carrier="", dest="ü")], ignore_index=True)


# --- Pipelines --------------------------------------------------------------------------------------------------


def packages_needed(pipeline: Any) -> set[str]:
    """Return the top packages of everything that unpickling the pipeline imports."""
    names = set()

    class Recording(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            names.add(module.partition(".")[0])
            return super().find_class(module, name)

    Recording(io.BytesIO(pickle.dumps(pipeline))).load()
    return names


@pytest.mark.parametrize("version", VERSIONS)
def test_a_packaged_pipeline_holds_library_classes_only(stored, version):
    assert packages_needed(stored[version]) <= {"builtins", "joblib", "numpy", "scipy", "sklearn"}


@pytest.mark.parametrize("build", [logistic_pipeline, boosting_pipeline])
def test_a_new_pipeline_holds_library_classes_only(build):
    assert packages_needed(build()) <= {"builtins", "joblib", "numpy", "scipy", "sklearn"}


def test_a_function_of_our_own_in_a_pipeline_would_be_seen():
    homemade = Pipeline([("ours", FunctionTransformer(cost_per_flight))])
    assert "mlops_course" in packages_needed(homemade)


@pytest.mark.parametrize("source", ["trained now", "packaged"])
def test_the_logistic_pipeline_learned_from_training_rows_only(logistic, stored, splits, flights, source):
    pipeline = logistic.pipeline if source == "trained now" else stored["1.0.0"]
    prepare = pipeline.named_steps["prepare"]
    numbers, categories = (prepare.named_transformers_[name] for name in ("numbers", "categories"))
    train, everything = (model_input(table)[list(NUMERIC)] for table in (splits["train"], flights))
    medians = train.median().to_numpy()
    np.testing.assert_allclose(numbers.named_steps["impute"].statistics_, medians, rtol=1e-6)
    filled = train.fillna(train.median()).astype(float)
    scale = numbers.named_steps["scale"]
    np.testing.assert_allclose(scale.mean_, filled.mean(), rtol=1e-5)
    np.testing.assert_allclose(scale.scale_, filled.std(ddof=0), rtol=1e-5)
    # All flights together have other medians, so that a pipeline fitted on them would be noticed.
    assert not np.allclose(everything.median().to_numpy(), medians, rtol=1e-6)
    for name, known in zip(CATEGORICAL, categories.categories_, strict=True):
        assert list(known) == sorted(splits["train"][name].unique())


def test_the_boosting_pipeline_knows_the_categories_of_the_training_rows_only(stored, splits, flights):
    encoder = stored["1.1.0-rc.1"].named_steps["prepare"].named_transformers_["categories"]
    for name, known in zip(CATEGORICAL, encoder.categories_, strict=True):
        assert list(known) == sorted(splits["train"][name].unique())
    # Some airports appear only later in the year.
    assert set(flights["dest"]) - set(encoder.categories_[2])


def risks_by_delay(score: Callable[[pd.DataFrame], np.ndarray], rows: pd.DataFrame) -> np.ndarray:
    """Return the risk of real flights, one row for each of several recent delays in rising order."""
    delays = (-120.0, -20.0, -5.0, 0.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 1500.0)
    return np.array([score(rows.assign(recent_origin_delay_min=delay)) for delay in delays])


@pytest.mark.parametrize("source", ["trained now", "packaged", "ONNX"])
def test_boosted_risk_never_falls_when_the_recent_delay_rises(stored, shelf, splits, source):
    graph, pipeline = (shelf / "1.1.0-rc.1" / "model.onnx").read_bytes(), stored["1.1.0-rc.1"]
    if source == "trained now":
        pipeline = fit(boosting_pipeline(trees=40), splits["train"].iloc[::8])
    rows = splits["test"].sample(300, random_state=3)
    risks = risks_by_delay(lambda t: onnx_scores(graph, t) if source == "ONNX" else scores(pipeline, t), rows)
    # 32-bit sums of trees may differ in the last digit.
    assert np.diff(risks, axis=0).min() >= (-1e-6 if source == "ONNX" else 0)
    # The delay matters: a constant model would be monotone too.
    assert (risks[-1] - risks[0]).min() > 0.02


def test_the_search_keeps_the_best_setting_on_validation_and_records_all(splits):
    recipe = RECIPES["1.0.0"].model_copy(update={"search": ({"C": 100.0}, {"C": 1e-7}, {"C": 1.0})})
    few = {name: splits[name].iloc[::20] for name in USED}
    pipeline, tried = search(recipe, few["train"], few["validation"])
    assert [one["C"] for one in tried] == [100.0, 1e-7, 1.0]
    assert pipeline.named_steps["model"].C == 1e-7
    best = roc_auc_score(few["validation"][LABEL], scores(pipeline, few["validation"]))
    assert tried[1]["validation_roc_auc"] == pytest.approx(best, abs=1e-6)
    assert tried[1]["validation_roc_auc"] == max(one["validation_roc_auc"] for one in tried)


# --- Threshold: chosen by cost, on validation -------------------------------------------------------------------


def slow_cost(label: list[int], score: list[float], threshold: float) -> float:
    """Return the mean cost by looking at one flight after the other."""
    total = 0.0
    for bad, risk in zip(label, score, strict=True):
        if bad and risk < threshold:
            total += MISS_COST
        if not bad and risk >= threshold:
            total += FALSE_WARNING_COST
    return total / len(label)


def test_cost_per_flight_by_hand():
    label, score = np.array([1, 1, 0, 0], dtype=np.int8), np.array([0.9, 0.3, 0.5, 0.1])
    # One miss (0.3) and one false warning (0.5, which is on the threshold) among four flights.
    assert cost_per_flight(label, score, 0.5) == (MISS_COST + FALSE_WARNING_COST) / 4


def test_the_threshold_is_the_cheapest_on_validation(logistic, splits):
    label = splits["validation"][LABEL].to_numpy()
    score = scores(logistic.pipeline, splits["validation"])
    few = slice(None, None, 10)
    costs = [slow_cost(label[few].tolist(), score[few].tolist(), t) for t in THRESHOLDS]
    assert choose_threshold(label[few], score[few]) == THRESHOLDS[int(np.argmin(costs))]
    assert logistic.threshold == choose_threshold(label, score)
    # Every other threshold costs as much at least; the ends of the range cost more.
    chosen = cost_per_flight(label, score, logistic.threshold)
    others = [cost_per_flight(label, score, t) for t in THRESHOLDS]
    assert chosen == min(others)
    assert chosen < min(others[0], others[-1])


def test_the_threshold_does_not_look_at_the_test_month(logistic, splits):
    """With all labels of the test month turned round, the same threshold is chosen."""
    test = splits["test"]
    other = {**splits, "test": test.assign(**{LABEL: 1 - test[LABEL]})}
    again = assess(logistic.recipe, logistic.pipeline, [], other, rounds=2)
    assert again.threshold == logistic.threshold
    assert again.metrics["validation"] == logistic.metrics["validation"]
    assert again.metrics["test"]["metrics"]["roc_auc"] < 0.5


def test_the_lowest_of_equally_cheap_thresholds_is_chosen():
    assert choose_threshold(np.array([0, 1], dtype=np.int8), np.array([0.2, 0.8])) == 0.205


# --- Metrics, against examples that can be checked by hand ------------------------------------------------------


def day_of_flights(day: str, labels: list[int]) -> pd.DataFrame:
    """Return flights of one day, an hour apart."""
    when = pd.date_range(day, periods=len(labels), freq="h")
    return pd.DataFrame({"scheduled_departure": when, LABEL: np.array(labels, dtype=np.int8)})


def test_recall_at_budget_counts_the_riskiest_of_each_day():
    table = pd.concat([day_of_flights("2013-08-01", [1, 1, 0, 0]), day_of_flights("2013-08-02", [0, 0, 0, 1])])
    # On the second day all scores are lower, but its riskiest flight is warned all the same.
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    assert warned_first(table, score, 0.25).tolist() == [True, False, False, False, False, False, False, True]
    assert recall_at_budget(table, score, 0.25) == pytest.approx(2 / 3)
    assert recall_at_budget(table, score, 1.0) == 1.0
    # Never more than the budget: a quarter of three flights is none.
    assert not warned_first(table.head(3), score[:3], 0.25).any()


def test_decisions_by_hand():
    label = np.array([1, 1, 1, 0, 0], dtype=np.int8)
    found = decision_metrics(label, np.array([0.9, 0.5, 0.1, 0.6, 0.2]), 0.5)
    assert found == {
        "warned_disrupted": 2,
        "missed": 1,
        "false_warnings": 1,
        "left_alone": 1,
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "false_warnings_per_1000": pytest.approx(200),
        "warned_share": pytest.approx(0.6),
        "cost_per_flight": pytest.approx((MISS_COST + FALSE_WARNING_COST) / 5),
    }


def test_decisions_without_any_warning_have_no_division_by_zero():
    found = decision_metrics(np.array([0, 0], dtype=np.int8), np.array([0.1, 0.2]), 0.5)
    assert (found["precision"], found["recall"], found["left_alone"]) == (0, 0, 2)


def test_calibration_by_hand():
    label, score = np.array([1, 0, 1, 1]), np.array([0.8, 0.2, 0.4, 0.6])
    table = calibration_table(label, score, bins=2)
    assert table == [{"score": 0.3, "disrupted": 0.5, "rows": 2}, {"score": 0.7, "disrupted": 1.0, "rows": 2}]
    assert calibration_error(table) == pytest.approx((0.2 + 0.3) / 2)
    # A group counts by its rows.
    uneven = [{"score": 0.5, "disrupted": 0.6, "rows": 1}, {"score": 0.5, "disrupted": 0.9, "rows": 3}]
    assert calibration_error(uneven) == pytest.approx((0.1 + 3 * 0.4) / 4)


def test_brier_skill_is_zero_for_the_training_average_and_one_for_certainty():
    table = day_of_flights("2013-08-01", [1, 0, 0, 1, 0, 0, 0, 0, 0, 1])
    label = table[LABEL].to_numpy(float)
    assert headline_metrics(table, np.full(10, 0.3), base_rate=0.3)["brier_skill"] == pytest.approx(0)
    assert headline_metrics(table, label, base_rate=0.3)["brier_skill"] == pytest.approx(1)
    # Squared errors 0.25 everywhere against 0.3 * 0.49 + 0.7 * 0.09 = 0.21.
    assert headline_metrics(table, np.full(10, 0.5), base_rate=0.3)["brier_skill"] == pytest.approx(1 - 0.25 / 0.21)


def test_headline_metrics_of_a_perfect_ranking():
    table = day_of_flights("2013-08-01", [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
    found = headline_metrics(table, table[LABEL].to_numpy(float), base_rate=0.2)
    assert next(iter(found)) == "roc_auc"
    assert {name: found[name] for name in ("roc_auc", "average_precision", "recall_at_budget")} == {
        "roc_auc": 1.0,
        "average_precision": 1.0,
        "recall_at_budget": 1.0,
    }


def test_segments_by_hand():
    table = day_of_flights("2013-08-01", [1, 0, 1, 0])
    found = by_segment(table, np.array([0.9, 0.1, 0.2, 0.8]), pd.Series(["a", "a", "b", "b"]))
    assert found == {
        "a": {"rows": 2, "disrupted": 0.5, "mean_score": 0.5, "roc_auc": 1.0},
        "b": {"rows": 2, "disrupted": 0.5, "mean_score": 0.5, "roc_auc": 0.0},
    }


def test_error_samples_are_the_most_confident_mistakes(logistic, splits):
    test, score = splits["test"], scores(logistic.pipeline, splits["test"])
    samples = error_samples(test, score, rows=5)
    missed, false = (samples[samples["mistake"] == kind] for kind in ("missed", "false warning"))
    assert (len(missed), len(false)) == (5, 5)
    assert (missed[LABEL] == 1).all()
    assert (false[LABEL] == 0).all()
    label = test[LABEL].to_numpy()
    assert missed["probability"].tolist() == sorted(score[label == 1])[:5]
    assert false["probability"].tolist() == sorted(score[label == 0])[:-6:-1]


def test_intervals_draw_whole_days_and_the_same_ones_every_time(splits):
    rows = splits["test"].iloc[::30]
    weights = list(day_weights(rows, 3))
    day = rows["scheduled_departure"].dt.normalize()
    for weight in weights:
        per_day = pd.Series(weight, index=rows.index).groupby(day)
        # Every flight of a day is drawn as often as the others, and as many days are drawn as there are.
        assert (per_day.nunique() == 1).all()
        assert per_day.first().sum() == day.nunique() == 31
    assert not np.array_equal(weights[0], weights[1])
    for first, second in zip(weights, day_weights(rows, 3), strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_resample_equals_repeating_the_rows_of_the_drawn_days(logistic, splits):
    rows = splits["test"].iloc[::30]
    score, base = scores(logistic.pipeline, rows), 0.28
    draws = day_bootstrap(rows, score, base, rounds=2)
    pd.testing.assert_frame_equal(draws, day_bootstrap(rows, score, base, rounds=2))
    label, first = rows[LABEL].to_numpy(), warned_first(rows, score)
    for weight, (_, draw) in zip(day_weights(rows, 2), draws.iterrows(), strict=True):
        drawn = np.repeat(np.arange(len(rows)), weight.astype(int))
        assert draw["roc_auc"] == pytest.approx(roc_auc_score(label[drawn], score[drawn]))
        error, reference = ((score - label)[drawn] ** 2).mean(), ((base - label)[drawn] ** 2).mean()
        assert draw["brier_skill"] == pytest.approx(1 - error / reference)
        assert draw["recall_at_budget"] == pytest.approx(first[drawn][label[drawn] == 1].mean())


def test_middle_95_by_hand():
    assert middle_95(pd.DataFrame({"auc": np.linspace(0, 1, 41)})) == {"auc": [0.025, 0.975]}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_release_beats_the_baselines_and_its_interval_holds_its_value(shelf, version):
    metrics = json.loads((shelf / version / "metrics.json").read_text())
    found = metrics["test"]["metrics"]
    assert metrics["baselines_roc_auc"]["always on time"] == 0.5
    assert found["roc_auc"] > metrics["baselines_roc_auc"]["recent delay"] + 0.01
    for name, (low, high) in metrics["intervals"].items():
        assert low < found[name] < high


def test_baselines_need_no_training_and_no_complete_rows():
    table = pd.DataFrame({"recent_origin_delay_min": [5.0, np.nan, -3.0]})
    found = baseline_scores(table)
    assert found["always on time"].tolist() == [0, 0, 0]
    assert found["recent delay"].tolist() == [5, 0, -3]


# --- ONNX: the same model in another runtime, the same bytes every time -----------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_onnx_agrees_with_scikit_learn_on_every_row(stored, shelf, awkward, version):
    graph = (shelf / version / "model.onnx").read_bytes()
    assert parity(stored[version], graph, awkward) <= CRITERIA["onnx_parity"].limit


def test_parity_is_the_largest_difference_and_nan_stays_nan(logistic, splits, monkeypatch):
    rows = splits["test"].head(50)
    wrong = scores(logistic.pipeline, rows).copy()
    wrong[7] += 0.25
    monkeypatch.setattr(training, "onnx_scores", lambda *_: wrong)
    assert parity(logistic.pipeline, b"", rows) == pytest.approx(0.25)
    wrong[9] = np.nan
    assert math.isnan(parity(logistic.pipeline, b"", rows))


@pytest.mark.parametrize("version", VERSIONS)
def test_converting_again_gives_the_packaged_bytes_with_ordered_opsets(stored, shelf, version):
    graph = to_onnx(stored[version])
    assert graph == (shelf / version / "model.onnx").read_bytes()
    domains = [entry.domain for entry in onnx.load_from_string(graph).opset_import]
    assert domains == sorted(domains)
    assert len(domains) > 1


@pytest.mark.parametrize("version", VERSIONS)
def test_the_graph_takes_text_and_32_bit_floats_in_the_order_of_the_contract(shelf, version):
    graph = onnx.load(shelf / version / "model.onnx").graph
    found = {
        one.name: (one.type.tensor_type.elem_type, one.type.tensor_type.shape.dim[1].dim_value) for one in graph.input
    }
    assert found == {
        "categories": (onnx.TensorProto.STRING, len(CATEGORICAL)),
        "numbers": (onnx.TensorProto.FLOAT, len(NUMERIC)),
    }


FRESH = """
import sys
import pandas as pd
from mlops_course.blueprint import canonical_json
from mlops_course.training import RECIPES, training_hashes

splits = {name: pd.read_pickle(f"{sys.argv[1]}/{name}.pickle") for name in ("train", "validation")}
hashes = {v: training_hashes(r.model_copy(update={"search": r.search[:1]}), splits) for v, r in RECIPES.items()}
print(canonical_json(hashes).decode())
"""


def test_fresh_processes_with_other_seeds_and_threads_write_the_same_bytes(splits, root, tmp_path):
    """Part of the rows is enough to see an order that depends on the process; chapter 2 does it with all."""
    for name in ("train", "validation"):
        splits[name].iloc[::6].to_pickle(tmp_path / f"{name}.pickle")
    running = []
    for seed, threads in (("0", "1"), ("1", "2")):
        changes = {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        environment = {**os.environ, "PYTHONPATH": str(root), **changes}
        command = [sys.executable, "-c", FRESH, str(tmp_path)]
        running.append(
            subprocess.Popen(
                command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first == second
    assert set(first) == set(VERSIONS)
    assert all(set(hashes) == {"model.onnx", "model.joblib"} for hashes in first.values())
    assert len({digest for hashes in first.values() for digest in hashes.values()}) == 4


# --- Gates: each passes on real evidence, and each is seen to refuse --------------------------------------------


@pytest.fixture(scope="session")
def real(shelf: Path) -> dict[str, Evidence]:
    """Return metrics.json of the built versions. Tests must not change them: copy first."""
    return {version: json.loads((shelf / version / "metrics.json").read_text()) for version in VERSIONS}


def refused(metrics: Evidence, folder: Path | None = None) -> list[str]:
    """Return the names of the gates that refuse."""
    return [result.gate for result in run_gates(metrics, folder) if not result.passed]


def answer(metrics: Evidence, gate: str, folder: Path | None = None) -> GateResult:
    """Return the answer of one gate."""
    return next(result for result in run_gates(metrics, folder) if result.gate == gate)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_gate_passes_on_the_real_evidence(real, version):
    results = run_gates(real[version])
    assert {r.gate: r.detail for r in results if not r.passed} == {}
    require(version, results)
    names = [r.gate for r in results]
    assert len(set(names)) == len(names) == 10


def put(*path: str, value: Any) -> Callable[[Evidence], None]:
    """Return a change that sets one value of the evidence."""

    def change(metrics: Evidence) -> None:
        place = metrics
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


# What is changed in real evidence, the one gate that refuses, and what it says.
PLANTED = {
    "weak ranking": (
        put("test", "metrics", "roc_auc", value=0.6),
        ["test_roc_auc", "roc_auc_drop"],
        "ROC AUC on the locked test month is 0.6, must be at least 0.68, missed by 0.08",
    ),
    "poor probabilities": (
        put("test", "metrics", "brier_skill", value=-0.02),
        ["brier_skill"],
        "Brier skill on the locked test month is -0.02, must be at least 0.05, missed by 0.07",
    ),
    "promises not kept": (
        put("test", "metrics", "calibration_error", value=0.1),
        ["calibration_error"],
        "expected calibration error on the locked test month is 0.1, must be at most 0.06, missed by 0.04",
    ),
    "calibration unknown": (
        put("test", "metrics", "calibration_error", value=math.nan),
        ["calibration_error"],
        "is nan, must be at most 0.06",
    ),
    "another model in ONNX": (
        put("onnx_parity", value=3e-5),
        ["onnx_parity"],
        "largest difference between scikit-learn and ONNX on any test row is 3e-05, must be at most 1e-05, "
        "missed by 2e-05",
    ),
    "parity unknown": (put("onnx_parity", value=math.nan), ["onnx_parity"], "is nan, must be at most 1e-05"),
    "too few rows": (
        put("data", "rows", value=MIN_TRAIN_ROWS - 1),
        ["data"],
        "99,999 training rows, at least 100,000 expected",
    ),
    "repeated rows": (put("data", "repeated", value=1200), ["data"], "1,200 repeated flights"),
    "a column mostly missing": (
        put("data", "missing", "humidity_pct", value=MAX_MISSING + 0.01),
        ["data"],
        "humidity_pct is missing for 26.0%",
    ),
    "too few disrupted": (
        put("data", "disrupted", value=0.099),
        ["data"],
        "9.9% disrupted, expected between 10% and 45%",
    ),
    "too many disrupted": (
        put("data", "disrupted", value=0.46),
        ["data"],
        "46.0% disrupted, expected between 10% and 45%",
    ),
    "disrupted share unknown": (put("data", "disrupted", value=math.nan), ["data"], "nan% disrupted"),
    "a broken row": (put("data", "schema_problem", value="row 7 is bad"), ["data"], "row 7 is bad"),
    "validation begins too early": (
        put("ledger", "validation", "first", value="2013-06-10T05:00"),
        ["splits"],
        "train ends 2013-06-30T23:59, validation begins 2013-06-10T05:00: they overlap",
    ),
    "test begins with validation's last flight": (
        put("ledger", "test", "first", value="2013-07-31T23:59"),
        ["splits"],
        "validation ends 2013-07-31T23:59, test begins 2013-07-31T23:59: they overlap",
    ),
    "a leak": (
        put("features", value=[*FEATURES, "dep_delay"]),
        ["features"],
        "feature 'dep_delay' is a leak: it is known at departure",
    ),
}


@pytest.mark.parametrize(("change", "gates", "text"), PLANTED.values(), ids=PLANTED)
def test_a_planted_failure_is_refused_by_its_gate_alone_with_value_limit_and_cause(real, change, gates, text):
    metrics = copy.deepcopy(real["1.1.0-rc.1"])
    change(metrics)
    assert refused(metrics) == gates
    result = answer(metrics, gates[0])
    assert text in result.detail
    with pytest.raises(GateRefusal) as refusal:
        require(metrics["version"], run_gates(metrics))
    lines = str(refusal.value).splitlines()
    assert lines[0] == "version 1.1.0-rc.1 is refused:"
    assert lines[1] == f"- {gates[0]}: {result.detail}. Likely causes: {result.causes}"
    assert len(lines) == 1 + len(gates)
    assert len(result.causes.split()) > 4


@pytest.mark.parametrize("name", ["test_roc_auc", "roc_auc_drop", "brier_skill", "onnx_parity"])
def test_a_criterion_gate_passes_on_its_limit_and_refuses_just_beyond(name):
    c = CRITERIA[name]
    worse = -1 if c.rule == "at least" else 1
    assert criterion_gate(name, c.limit, "why").passed
    beyond = criterion_gate(name, c.limit * (1 + worse * 0.1), "why")
    assert not beyond.passed
    assert beyond.detail.endswith(f"must be {c.rule} {c.limit:g}, missed by {c.limit * 0.1:.3g}")


def test_1_shuffled_labels_are_refused(splits):
    few = {**splits, "train": splits["train"].iloc[::4]}
    mixed = few["train"].assign(**{LABEL: few["train"][LABEL].sample(frac=1, random_state=0).to_numpy()})
    nonsense = assess(one_setting("1.1.0-rc.1"), fit(logistic_pipeline(), mixed), [], splits, rounds=2)
    found = refused(nonsense.metrics)
    assert {"test_roc_auc", "roc_auc_drop", "brier_skill"} <= set(found)
    # Nothing is wrong with data, splits, features or conversion.
    assert set(found) <= {"test_roc_auc", "roc_auc_drop", "brier_skill", "calibration_error"}
    assert "labels joined to the wrong rows" in answer(nonsense.metrics, "test_roc_auc").causes


def test_3_a_crippled_model_is_refused(splits):
    stump = fit(boosting_pipeline(leaves=2, trees=2), splits["train"].iloc[::4])
    crippled = assess(RECIPES["1.1.0-rc.1"], stump, [], splits, rounds=2)
    found = refused(crippled.metrics)
    assert {"test_roc_auc", "roc_auc_drop"} <= set(found)
    assert set(found) <= {"test_roc_auc", "roc_auc_drop", "brier_skill", "calibration_error"}


def test_4_a_drop_against_the_approved_release_is_refused(real):
    """0.684 is a fine model for a first release, and a step back after one with 0.695."""
    metrics = copy.deepcopy(real["1.1.0-rc.1"])
    before = json.loads((releases_folder() / "1.0.0" / "metrics.json").read_text())["test"]["metrics"]
    metrics["test"]["metrics"]["roc_auc"] = before["roc_auc"] - 0.0105
    assert refused(metrics) == ["roc_auc_drop"]
    text = answer(metrics, "roc_auc_drop").detail
    assert "ROC AUC lost against the last approved release is 0.0105, must be at most 0.01, missed by 0.0005" in text
    assert f"(1.0.0: {before['roc_auc']:.4f}, now {before['roc_auc'] - 0.0105:.4f})" in text


@pytest.mark.parametrize("before", [0.69, 0.7, 0.71, 0.72, 0.73])
def test_a_drop_of_exactly_the_limit_is_allowed(real, before):
    approved, metrics = copy.deepcopy(real["1.0.0"]), copy.deepcopy(real["1.1.0-rc.1"])
    approved["test"]["metrics"]["roc_auc"] = before
    metrics["test"]["metrics"]["roc_auc"] = round(before - 0.01, 6)
    assert training.drop_gate(metrics, approved).passed
    metrics["test"]["metrics"]["roc_auc"] = round(before - 0.010001, 6)
    assert not training.drop_gate(metrics, approved).passed


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda t: t.assign(temperature_f=t["temperature_f"] * 10), "column 'temperature_f': .* is outside -60 to 130"),
        (lambda t: t.assign(distance_miles=0), r"column 'distance_miles': 0 is outside 1 to 6000 miles"),
        (lambda t: t.assign(carrier=t["carrier"].where(t["carrier"] != "UA")), "column 'carrier': .* is missing"),
        (lambda t: t.drop(columns="origin"), "column 'origin' is missing; rebuild the data"),
        (lambda t: pd.concat([t, t.tail(10)]), "10 repeated flights"),
        (lambda t: t.assign(humidity_pct=np.nan), "humidity_pct is missing for 100.0%"),
        (lambda t: t.head(1000), "1,000 training rows, at least 100,000 expected"),
        (lambda t: t.assign(**{LABEL: 0}), "0.0% disrupted, expected between 10% and 45%"),
    ],
    ids=["unit", "range", "null", "column", "repeats", "missing", "rows", "label"],
)
def test_5_corrupted_training_rows_are_refused(real, splits, damage, text):
    metrics = {**real["1.1.0-rc.1"], "data": data_summary(damage(splits["train"]))}
    assert refused(metrics) == ["data"]
    assert re.search(text, answer(metrics, "data").detail)


def test_6_splits_that_overlap_in_time_are_refused(real, flights, splits):
    june_and_july = flights[flights["scheduled_departure"].between("2013-06-10", "2013-07-31")]
    metrics = {**real["1.1.0-rc.1"], "ledger": split_ledger({**splits, "validation": june_and_july})}
    assert refused(metrics) == ["splits"]
    shuffled = flights.sample(frac=1, random_state=0)
    at_random = {"train": shuffled[:200_000], "validation": shuffled[200_000:250_000], "test": shuffled[250_000:]}
    metrics = {**real["1.1.0-rc.1"], "ledger": split_ledger(at_random)}
    # Its test rows are not those of the approved release either.
    assert refused(metrics) == ["splits", "roc_auc_drop"]
    assert answer(metrics, "splits").detail.count("they overlap") == 2


# Feature engineering that a refactoring might have changed, and one column that a request might gain.
CHANGED_FEATURES = "the feature engineering or its data changed since 1.0.0: raise the minor version"
CHANGED_INPUTS = "the input contract changed since 1.0.0: raise the major version"


@pytest.mark.parametrize(
    ("version", "field", "problem"),
    [
        ("1.0.1", "features_sha256", CHANGED_FEATURES),
        ("1.0.1-rc.1", "features_sha256", CHANGED_FEATURES),
        ("1.1.0-rc.1", "features_sha256", ""),
        ("2.0.0", "features_sha256", ""),
        ("1.0.1", "inputs_sha256", CHANGED_INPUTS),
        ("1.1.0", "inputs_sha256", CHANGED_INPUTS),
        ("2.0.0-rc.1", "inputs_sha256", ""),
    ],
)
def test_7_a_change_of_features_or_inputs_needs_its_version(real, version, field, problem):
    metrics = {**real["1.1.0-rc.1"], "version": version, field: "0" * 64}
    assert refused(metrics) == (["version"] if problem else [])
    assert answer(metrics, "version").detail == (problem or "follows 1.0.0")


def test_7_real_feature_engineering_changed_under_a_patch_version(real, splits):
    sunday_first = splits["train"].assign(day_of_week=(splits["train"]["day_of_week"] + 1) % 7)
    metrics = {**real["1.0.0"], "version": "1.0.1", "features_sha256": features_sha256(sunday_first)}
    assert refused(metrics) == ["version"]
    unchanged = {**metrics, "features_sha256": features_sha256(splits["train"])}
    assert refused(unchanged) == []


def test_a_candidate_is_not_compared_on_other_test_rows(real):
    metrics = copy.deepcopy(real["1.1.0-rc.1"])
    metrics["ledger"]["test"]["rows_sha256"] = "0" * 64
    assert refused(metrics) == ["roc_auc_drop"]
    assert answer(metrics, "roc_auc_drop").detail == "not the rows of 1.0.0"


@pytest.mark.parametrize("field", ["features_sha256", "inputs_sha256", "dataset_sha256", "parameters", "threshold"])
def test_an_approved_version_is_trained_again_from_the_same_inputs_and_settings(real, field):
    """Its metrics need not move: a linear model does not notice a day of the week that starts at 1."""
    metrics = {**real["1.0.0"], field: "something else"}
    assert refused(metrics) == ["reproducibility"]
    assert answer(metrics, "reproducibility").detail == f"{field} changed under the approved version 1.0.0"


def test_training_an_approved_version_again_must_give_its_metrics(real):
    metrics = copy.deepcopy(real["1.0.0"])
    limit = CRITERIA["reproducibility"].limit
    metrics["test"]["metrics"]["average_precision"] += limit * 0.9
    assert refused(metrics) == []
    metrics["test"]["metrics"]["average_precision"] += limit * 0.2
    assert refused(metrics) == ["reproducibility"]
    text = answer(metrics, "reproducibility").detail
    assert text.startswith(f"{CRITERIA['reproducibility'].metric} is 0.0022, must be at most 0.002, missed by 0.0002")
    assert text.endswith("(largest: average_precision)")


@pytest.mark.parametrize("name", ["roc_auc", "average_precision", "recall_at_budget"])
def test_a_metric_that_cannot_be_computed_is_not_reproduced(real, name):
    metrics = copy.deepcopy(real["1.0.0"])
    metrics["test"]["metrics"][name] = math.nan
    assert not repeat_gate(metrics, real["1.0.0"]).passed


# --- Which release a candidate is compared with -----------------------------------------------------------------


@pytest.fixture
def approved(tmp_path, real):
    """Return a function that adds an approved release to a folder of its own."""
    folder: Path = tmp_path / "releases"

    def add(version: str) -> Path:
        (folder / version).mkdir(parents=True)
        (folder / version / "metrics.json").write_bytes(canonical_json({**real["1.0.0"], "version": version}))
        return folder

    return add


def test_a_candidate_is_compared_with_the_newest_release_before_it(approved):
    for version in ("1.0.0", "1.9.0", "1.10.0-rc.1", "2.0.0"):
        folder = approved(version)

    def compared(version: str) -> str | None:
        found = last_approved(version, folder)
        return found["version"] if found else None

    assert compared("1.0.0") is None
    assert compared("1.0.1") == "1.0.0"
    assert compared("1.10.0") == "1.10.0-rc.1"
    assert compared("1.10.0-rc.1") == "1.9.0"
    assert compared("3.0.0") == "2.0.0"


def test_the_first_release_has_nothing_to_be_compared_with(real, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert refused(real["1.0.0"], folder) == []
        assert answer(real["1.0.0"], "roc_auc_drop", folder).detail == "first release: nothing to compare with"


def test_what_is_no_release_in_the_releases_folder_is_left_alone(approved):
    """An approval that was killed leaves a hidden folder behind; the next training must not stumble over it."""
    folder = approved("1.0.0")
    (folder / "README.md").write_text("about releases")
    approved(".1.1.0.writing")
    found = last_approved("2.0.0", folder)
    assert found is not None
    assert found["version"] == "1.0.0"


# --- Golden cases: raw requests with the training path's answers ------------------------------------------------


def test_a_flight_as_a_request_is_plain_json_without_nan(splits):
    row = splits["test"].assign(pressure_mb=np.nan).iloc[0].to_dict()
    request = as_request(row)
    assert list(request) == [c.name for c in INPUTS]
    assert request["pressure_mb"] is None
    assert datetime.fromisoformat(request["scheduled_departure"]).utcoffset() is None
    assert {type(value) for value in request.values()} <= {str, float, type(None)}
    assert json.loads(json.dumps(request, allow_nan=False)) == request


def as_flights(requests: list[dict[str, Any]]) -> pd.DataFrame:
    """Return requests as a table with all features, as a service would have to read them."""
    table = pd.DataFrame(requests).assign(
        scheduled_departure=[datetime.fromisoformat(one["scheduled_departure"]) for one in requests]
    )
    return add_derived(table.astype({c.name: float for c in INPUTS if c.kind == "number"}))


def replay(graph: bytes, golden: dict[str, Any]) -> float:
    """Return the largest difference between the recorded probabilities and those of an ONNX graph."""
    expected = [case["probability"] for case in golden["cases"]]
    found = onnx_scores(graph, as_flights([case["request"] for case in golden["cases"]]))
    return float(np.abs(found - expected).max())


def test_golden_cases_cover_missing_numbers_and_unknown_names_and_survive_json(logistic, splits):
    golden = golden_cases(logistic.pipeline, splits["test"])
    assert json.loads(canonical_json(golden)) == golden
    requests = [case["request"] for case in golden["cases"]]
    nullable = [c.name for c in INPUTS if c.nullable]
    assert sum(all(one[name] is None for name in nullable) for one in requests) == 3
    assert sum(one["carrier"] == "ZZ" and one["dest"] == "ZZZ" for one in requests) == 3
    assert len(requests) == len(golden_flights(splits["test"])) == 46
    # Flights without a single missing number are there too.
    assert any(None not in one.values() for one in requests)
    assert golden["tolerance"] == CRITERIA["onnx_parity"].limit
    assert replay(logistic.graph, golden) <= golden["tolerance"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_packaged_graph_answers_the_packaged_golden_requests(shelf, version):
    golden = json.loads((shelf / version / "golden.json").read_text())
    assert replay((shelf / version / "model.onnx").read_bytes(), golden) <= golden["tolerance"]


def test_golden_cases_tell_the_two_models_apart(shelf):
    golden = json.loads((shelf / "1.0.0" / "golden.json").read_text())
    assert replay((shelf / "1.1.0-rc.1" / "model.onnx").read_bytes(), golden) > 0.05


# --- Packaging --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def packaged(logistic: Trained, splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the folder and digest of a package of the freshly trained 1.0.0, as the first release."""
    folder = tmp_path_factory.mktemp("packaged")
    return package(logistic, splits, folder / "shelf", folder / "releases")


def test_a_package_describes_itself(packaged, logistic, splits):
    folder, digest = packaged
    manifest = verify_artifact(folder, digest)
    assert read_registry(folder.parent).versions == {"1.0.0": digest}
    assert set(manifest.files) == {
        "model.onnx",
        "model.joblib",
        "metrics.json",
        "reference.json",
        "golden.json",
        "release.json",
        "model_card.md",
        "predictions.parquet",
        "errors.csv",
        "calibration.png",
        "confusion.png",
        "scores.png",
    }
    assert manifest.features == [COLUMNS[name] for name in FEATURES]
    assert manifest.inputs == list(INPUTS)
    assert manifest.threshold == logistic.threshold
    metrics = json.loads((folder / "metrics.json").read_bytes())
    assert manifest.metrics == metrics["test"]["metrics"]
    told = pd.read_parquet(folder / "predictions.parquet")
    assert told["identity"].tolist() == splits["test"]["identity"].tolist()
    assert int((told["warned"] & (told[LABEL] == 0)).sum()) == metrics["test"]["decisions"]["false_warnings"]
    assert (folder / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_package_can_be_used_for_analysis(packaged, logistic, splits):
    pipeline = joblib.load(packaged[0] / "model.joblib")
    rows = splits["production"].head(100)
    np.testing.assert_array_equal(scores(pipeline, rows), scores(logistic.pipeline, rows))


def test_packaging_again_changes_nothing(packaged, logistic, splits):
    folder, digest = packaged
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.name != "registry.json"}
    assert package(logistic, splits, folder.parent, folder.parent.parent / "releases") == (folder, digest)
    after = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*") if path.name != "registry.json"}
    assert after == before


def test_packaging_elsewhere_gives_the_same_digest(packaged, logistic, splits, tmp_path):
    assert package(logistic, splits, tmp_path, tmp_path / "releases")[1] == packaged[1]


def test_a_refused_candidate_leaves_nothing_behind(logistic, splits, tmp_path):
    metrics = copy.deepcopy(logistic.metrics)
    metrics["test"]["metrics"]["roc_auc"] = 0.5
    weak = logistic.model_copy(update={"metrics": metrics})
    with pytest.raises(GateRefusal, match=r"^version 1.0.0 is refused:\n- test_roc_auc: ") as refusal:
        package(weak, splits, tmp_path / "shelf", tmp_path / "releases")
    # The claimed value is too low, and it is not what the graph reaches.
    assert [result.gate for result in refusal.value.failed] == ["test_roc_auc", "evidence"]
    assert list(tmp_path.iterdir()) == []


def test_the_evidence_of_another_model_is_refused(logistic, shelf, splits, tmp_path):
    other = logistic.model_copy(update={"graph": (shelf / "1.1.0-rc.1" / "model.onnx").read_bytes()})
    with pytest.raises(
        GateRefusal, match=r"^version 1.0.0 is refused:\n- evidence: model.onnx reaches 0\.\d{4}, "
    ) as no:
        package(other, splits, tmp_path / "shelf", tmp_path / "releases")
    assert [result.gate for result in no.value.failed] == ["evidence"]
    assert list(tmp_path.iterdir()) == []


def test_other_content_under_the_same_version_is_refused(packaged, logistic, splits):
    folder, digest = packaged
    other = logistic.model_copy(update={"threshold": 0.9})
    text = r"version 1.0.0 exists with other content \(.*predictions.parquet.*\); raise the version"
    with pytest.raises(VersionError, match=text):
        package(other, splits, folder.parent, folder.parent.parent / "releases")
    assert read_registry(folder.parent).versions == {"1.0.0": digest}
    verify_artifact(folder, digest)


@pytest.fixture
def emptied(packaged, tmp_path):
    """Return a shelf whose only version is registered, but its folder was deleted."""
    shelf: Path = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "registry.json").write_bytes((packaged[0].parent / "registry.json").read_bytes())
    return shelf


def test_a_version_in_use_whose_folder_was_deleted_comes_back_only_with_its_digest(
    emptied, packaged, logistic, splits, tmp_path
):
    registry = read_registry(emptied).model_copy(update={"channels": {"staging": "1.0.0"}})
    (emptied / "registry.json").write_bytes(canonical_json(registry.model_dump()))
    other = logistic.model_copy(update={"threshold": 0.9})
    with pytest.raises(VersionError, match=f"version 1.0.0 is registered as {packaged[1]}, not sha256:"):
        package(other, splits, emptied, tmp_path / "releases")
    assert [path.name for path in emptied.iterdir()] == ["registry.json"]
    assert package(logistic, splits, emptied, tmp_path / "releases") == (emptied / "1.0.0", packaged[1])


def test_a_version_that_was_never_used_can_be_discarded_and_made_again(
    emptied, packaged, logistic, splits, tmp_path, monkeypatch
):
    """That is what the refusal of other content advises."""
    other = logistic.model_copy(update={"threshold": 0.9})
    monkeypatch.setattr(blueprint, "approved_versions", lambda: [])
    discard_version(emptied, "1.0.0")
    folder, digest = package(other, splits, emptied, tmp_path / "releases")
    assert digest != packaged[1]
    assert read_registry(emptied).versions == {"1.0.0": digest}
    verify_artifact(folder, digest)


def approve_record(folder: Path, releases: Path, **changes: Any) -> Manifest:
    """Copy the record of a packaged version to a releases folder, as if built elsewhere; return its manifest."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    born = manifest.provenance.model_copy(update={"git_sha": "an earlier commit", "platform": "another machine"})
    manifest = manifest.model_copy(update={"provenance": born, **changes})
    target = releases / manifest.version
    target.mkdir(parents=True)
    (target / "manifest.json").write_bytes(canonical_json(manifest.model_dump(mode="json")))
    (target / "metrics.json").write_bytes((folder / "metrics.json").read_bytes())
    return manifest


def test_an_approved_version_packaged_again_carries_the_approved_manifest(packaged, logistic, splits, tmp_path):
    manifest = approve_record(packaged[0], tmp_path / "releases")
    folder, digest = package(logistic, splits, tmp_path / "shelf", tmp_path / "releases")
    assert (folder / "manifest.json").read_bytes() == (tmp_path / "releases/1.0.0/manifest.json").read_bytes()
    assert verify_artifact(folder, digest) == manifest
    assert digest != packaged[1]


def test_a_manifest_of_other_content_is_not_carried(packaged, logistic, splits, tmp_path):
    approve_record(packaged[0], tmp_path / "releases", threshold=0.9)
    folder, _ = package(logistic, splits, tmp_path / "shelf", tmp_path / "releases")
    manifest = verify_artifact(folder)
    assert manifest.threshold == logistic.threshold
    assert manifest.provenance.git_sha != "an earlier commit"


def test_the_release_record_does_not_change_when_the_release_is_approved(packaged, logistic, tmp_path):
    releases = tmp_path / "releases"
    before = release_record(logistic, run_gates(logistic.metrics, releases), releases)
    approve_record(packaged[0], releases)
    after = release_record(logistic, run_gates(logistic.metrics, releases), releases)
    assert canonical_json(after) == canonical_json(before)
    written = json.loads((packaged[0] / "release.json").read_bytes())
    # Only packaging itself can compare the evidence with the graph.
    assert [gate for gate in written.pop("gates") if gate["gate"] != "evidence"] == before["gates"]
    assert written == {name: value for name, value in before.items() if name != "gates"}
    assert before["compared_with"] is None
    assert before["decisions"] == {"now": logistic.metrics["test"]["decisions"], "before": None}
    assert {gate["passed"] for gate in before["gates"]} == {True}


def test_the_candidate_says_which_release_it_was_compared_with(shelf):
    record = json.loads((shelf / "1.1.0-rc.1" / "release.json").read_text())
    assert record["compared_with"] == "1.0.0"
    assert record["changes"] == RECIPES["1.1.0-rc.1"].changes


def test_the_model_card_states_the_evidence(logistic):
    card = model_card(logistic.metrics, logistic.recipe)
    assert card.startswith("# flight-disruption 1.0.0: regularised logistic regression\n")
    assert f"ROC AUC {logistic.metrics['test']['metrics']['roc_auc']:.3f}" in card
    assert f"Warn from probability {logistic.threshold:g} on" in card
    assert [origin for origin in ("EWR", "JFK", "LGA") if f"| {origin} |" not in card] == []


def test_a_plot_is_the_same_bytes_every_time():
    first, second = (png(lambda ax: ax.plot([0, 1])) for _ in range(2))
    assert first == second
    assert first != png(lambda ax: ax.plot([1, 0]))


# --- Provenance -------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Return a small repository, committed by someone two hours ahead of UTC, that takes the project's place."""
    (tmp_path / "mlops_course").mkdir()
    for name in ("requirements.lock", "mlops_course/training.py", "notes.md"):
        (tmp_path / name).write_text("first\n")
    when = {"GIT_AUTHOR_DATE": "2026-01-02T01:30:00+02:00", "GIT_COMMITTER_DATE": "2026-01-02T01:30:00+02:00"}
    someone = ["-c", "user.name=Ann", "-c", "user.email=ann@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*someone, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, env={**os.environ, **when}, check=True)
    monkeypatch.setattr(training, "project_root", lambda: tmp_path)
    return tmp_path


def test_provenance_names_the_commit_and_says_when_its_sources_were_changed(repository):
    clean = provenance()
    assert re.fullmatch("[0-9a-f]{40}", clean.git_sha)
    (repository / "notes.md").write_text("not a source of the model\n")
    assert provenance() == clean
    (repository / "mlops_course" / "training.py").write_text("second\n")
    assert provenance().git_sha == f"{clean.git_sha}-dirty"


def test_the_training_time_is_that_of_the_commit_in_utc(repository):
    at = datetime.fromisoformat(provenance().trained_at)
    assert at == datetime.fromisoformat("2026-01-01T23:30:00+00:00")
    assert at.utcoffset() == timedelta(0)


def test_a_download_without_git_still_trains(tmp_path, monkeypatch):
    (tmp_path / "requirements.lock").write_text("")
    monkeypatch.setattr(training, "project_root", lambda: tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    born = provenance()
    assert (born.git_sha, born.trained_at) == ("unknown", "unknown")
    assert born.dependencies["scikit-learn"] != ""


# --- The committed release and what was built from this code ----------------------------------------------------


@pytest.fixture(scope="session")
def record(root: Path) -> Path:
    """Return the committed record of the approved release."""
    return root / "ops" / "releases" / "1.0.0"


def test_the_committed_record_agrees_with_itself(record):
    manifest = Manifest.model_validate_json((record / "manifest.json").read_bytes())
    digests = {name: sha256_file(record / name) for name in ("metrics.json", "golden.json", "release.json")}
    assert {name: manifest.files[name] for name in digests} == digests
    approval = json.loads((record / "approval.json").read_text())
    assert approval["version"] == manifest.version == record.name
    assert approval["digest"] == artifact_digest((record / "manifest.json").read_bytes())


def test_what_was_built_has_the_quality_that_was_approved(record, real):
    approved = json.loads((record / "metrics.json").read_text())
    limit = CRITERIA["reproducibility"].limit
    for rows in ("test", "validation"):
        before, now = approved[rows]["metrics"], real["1.0.0"][rows]["metrics"]
        assert {name: now[name] for name in before if abs(now[name] - before[name]) > limit} == {}
    assert real["1.0.0"]["threshold"] == pytest.approx(approved["threshold"], abs=0.011)
    for fingerprint in ("dataset_sha256", "features_sha256", "inputs_sha256", "ledger"):
        assert real["1.0.0"][fingerprint] == approved[fingerprint]


def test_what_was_built_behaves_as_was_approved(record, shelf):
    """On the platform of the record to 1e-5, the limit of the two runtimes; elsewhere training rounds differently."""
    golden = json.loads((record / "golden.json").read_text())
    born = [
        Manifest.model_validate_json((folder / "manifest.json").read_bytes()).provenance.platform
        for folder in (record, shelf / "1.0.0")
    ]
    tolerance = golden["tolerance"] if born[0] == born[1] else 1e-3
    assert replay((shelf / "1.0.0" / "model.onnx").read_bytes(), golden) <= tolerance
