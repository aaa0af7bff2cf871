"""The table of zero-shot accuracies: paired by document, and only for the same questions."""

import json
from dataclasses import asdict

import pytest

from layerwise.scoring.continuations import Score
from layerwise.storage.stage import Stage
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lm_eval_tasks.answers import read_answers, write_answers
from layerwise.tasks.lm_eval_tasks.comparison import (
    TABLE_FILE,
    compare_zero_shot,
    has_distilled,
    is_plain,
    read_comparison,
    store_comparison,
    without_distilled,
)
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.zero_shot import ZeroShotSettings, zero_shot
from tests.lm_task_files import give_words, load_questions, some_documents, write_task


@pytest.fixture
def questions(tmp_path):
    tasks = [write_task(tmp_path, name, some_documents(8, seed)) for seed, name in enumerate(("one", "two"))]
    return load_questions(tasks)


@pytest.fixture
def answer(local_store):
    """Return a function that commits artifacts, by task, of a model that is right on the given documents only."""

    def make(questions, right: dict[str, set[int]]):
        artifacts = {}
        for of_task in questions:
            scores = [
                Score(
                    0.0 if (choice == document["answer"]) == (number in right[of_task.task]) else -9.0, False
                )
                for number, document in enumerate(of_task.documents)
                for choice in range(3)
            ]
            stage = Stage("zero_shot", 1, {"right": sorted(right[of_task.task])}, {"q": of_task.identity})
            artifacts[of_task.task] = local_store.get_or_build(
                stage, lambda draft, q=of_task, s=scores: write_answers(draft, q, s)
            )
        return artifacts

    return make


def test_differences_are_paired_by_document_and_in_percentage_points(local_store, questions, answer):
    dense = answer(questions, {"one": {0, 1, 2, 3, 4, 5}, "two": set(range(8))})
    uniform = answer(questions, {"one": {0}, "two": {0, 1}})
    best = answer(questions, {"one": {0, 1, 2, 7}, "two": {1, 2}})
    one, two = compare_zero_shot(local_store, dense, uniform, best).rows
    assert (one.task, one.documents, one.dense.value, one.uniform.value, one.best.value) == (
        "one",
        8,
        0.75,
        0.125,
        0.5,
    )
    # In "one", only the best model got 7 right, and only the dense model 3, 4 and 5: 2 * (1 + 4) / 16.
    assert (one.to_dense.difference, one.to_dense.p_value) == (-25, pytest.approx(0.625))
    # Only the best model got 1, 2 and 7 right: 2 / 8.
    assert (one.to_uniform.difference, one.to_uniform.p_value) == (37.5, pytest.approx(0.25))
    # In "two", only the dense model got six documents right: 2 / 64.
    assert (two.to_dense.difference, two.to_dense.p_value) == (-75, pytest.approx(0.03125))
    assert two.to_dense.significant
    assert not two.to_uniform.significant


def test_the_distilled_model_is_compared_with_the_best_and_the_dense_one(local_store, questions, answer):
    dense = answer(questions, {"one": {0, 1, 2, 3, 4, 5}, "two": set(range(8))})
    best = answer(questions, {"one": {0, 1, 2, 7}, "two": {1, 2}})
    distilled = answer(questions, {"one": {0, 1, 2, 3, 4, 7}, "two": {1, 2, 3}})
    comparison = compare_zero_shot(local_store, dense, None, best, distilled=distilled)
    one, _ = comparison.rows
    assert one.distilled.value == 0.75
    # Only the distilled model got 3 and 4 right: 2 / 4. And only it got 7 right, only the dense model 5.
    assert (one.distilled_to_best.difference, one.distilled_to_best.p_value) == (25, pytest.approx(0.5))
    assert (one.distilled_to_dense.difference, one.distilled_to_dense.p_value) == (0, 1)
    assert comparison.average.distilled_to_best.difference == pytest.approx((25 + 12.5) / 2)
    search, folder, other = (
        local_store.get_or_build(Stage(name, 1, None, {}), lambda draft: draft.write("file", b""))
        for name in ("search", "distill", "later")
    )
    answers = {"dense": dense, "best": best, "distilled": distilled}
    table = store_comparison(local_store, search, answers, comparison, distilled=folder)
    assert read_comparison(local_store, table) == comparison
    assert (has_distilled(table, folder), has_distilled(table, other)) == (True, False)
    assert without_distilled(comparison) == compare_zero_shot(local_store, dense, None, best)


def test_the_average_weights_tasks_equally_and_tests_all_documents_together(local_store, questions, answer):
    dense = answer(questions, {"one": set(range(8)), "two": set(range(4))})
    best = answer(questions, {"one": set(range(2)), "two": {7}})
    average = compare_zero_shot(local_store, dense, None, best).average
    assert (average.task, average.documents) == ("average", 16)
    assert (average.dense.value, average.best.value) == (0.75, (0.25 + 0.125) / 2)
    assert average.to_dense.difference == pytest.approx(-100 * (0.75 + 0.375) / 2)
    assert average.to_dense.p_value == pytest.approx(2 * (1 + 11) / 2**11)  # one against ten
    assert (average.uniform, average.to_uniform) == (None, None)


def test_a_table_of_a_version_without_few_shot_tasks_and_distilled_model_is_still_read(
    local_store, questions, answer
):
    models = [answer(questions, {"one": right, "two": right}) for right in ({0, 1}, {1}, {1, 2})]
    comparison = compare_zero_shot(local_store, *models)
    added = {"metric", "shots", "truncated", "group", "lengths"}
    added |= {"distilled", "distilled_to_best", "distilled_to_dense"}

    def older(row):
        return {name: value for name, value in row.items() if name not in added}

    found = asdict(comparison)
    table = {"rows": [older(row) for row in found["rows"]], "average": older(found["average"])}
    stage = Stage("zero_shot_table", 1, None, {"search": "search/old"})
    stored = local_store.get_or_build(
        stage, lambda draft: draft.write(TABLE_FILE, json.dumps(table).encode())
    )
    assert read_comparison(local_store, stored) == comparison
    assert is_plain(comparison)


def test_answers_to_different_documents_are_not_compared(local_store, tmp_path, questions, answer):
    dense = answer(questions, {"one": {0}, "two": {0}})
    others = load_questions(
        [write_task(tmp_path, name, some_documents(8, seed=9)) for name in ("one", "two")]
    )
    best = answer(others, {"one": {0}, "two": {0}})
    with pytest.raises(
        ValueError, match="one: the best model was asked the questions .* but the dense model"
    ):
        compare_zero_shot(local_store, dense, None, best)


def test_answers_to_different_tasks_are_not_compared(local_store, questions, answer):
    right = {"one": {0}, "two": {0}}
    with pytest.raises(ValueError, match="the best model answered one, but the dense model one, two"):
        compare_zero_shot(local_store, answer(questions, right), None, answer(questions[:1], right))


def test_an_exported_model_is_compared_with_the_one_it_was_pruned_from(
    small_run, save_model, questions, llama
):
    run = small_run(give_words(save_model(llama(num_hidden_layers=3, initializer_range=0.2))))
    uniform, best = run.branch(0.0, 0.25)
    exported = [run.store.location(run.export(lane, uniform)) for lane in (uniform, best)]
    checkpoints = [run.checkpoint, *(import_checkpoint(run.store, folder) for folder in exported)]
    settings = ZeroShotSettings("float32")
    models = [
        zero_shot.fn(run.store, checkpoint, questions, settings, Execution()) for checkpoint in checkpoints
    ]
    assert len({model["one"].key for model in models}) == 3
    comparison = compare_zero_shot(run.store, *models)
    for row in comparison.rows:
        accuracies = [read_answers(run.store, model[row.task]).metrics.acc for model in models]
        assert [row.dense, row.uniform, row.best] == accuracies
        assert row.to_dense.difference == pytest.approx(100 * (row.best.value - row.dense.value))
