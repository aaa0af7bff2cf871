"""Tasks of lm-eval: found without its index, documents drawn by seed, identified by their full text."""

import sys
from pathlib import Path

import pytest

from layerwise.scoring.continuations import Score
from tests.lm_task_files import load_questions, some_documents, write_task


@pytest.fixture
def task(tmp_path) -> str:
    return write_task(tmp_path, "colours", some_documents(40))


def loaded(*arguments, **options):
    (questions,) = load_questions(*arguments, **options)
    return questions


def test_a_task_is_asked_document_by_document_and_choice_by_choice(task):
    questions = loaded([task])
    documents = some_documents(40)
    assert (questions.task, questions.version, questions.available, questions.count) == (
        "colours",
        "1.0",
        40,
        120,
    )
    assert questions.document_ids == tuple(range(40))
    assert questions.requests[7] == [
        (documents[7]["question"], f" {choice}") for choice in documents[7]["choices"]
    ]


def test_documents_are_drawn_by_seed_and_not_from_the_start_of_the_file(task):
    drawn = [loaded([task], 10, seed) for seed in (0, 0, 1)]
    assert drawn[0].document_ids == drawn[1].document_ids != drawn[2].document_ids
    assert drawn[0].document_ids != tuple(range(10))
    assert list(drawn[0].document_ids) == sorted(set(drawn[0].document_ids))
    assert len(drawn[0].document_ids) == 10


def test_document_ids_are_positions_in_the_data_set(task):
    questions, documents = loaded([task], 10, seed=3), some_documents(40)
    assert list(questions.documents) == [documents[number] for number in questions.document_ids]
    assert [requests[0][0] for requests in questions.requests] == [
        documents[number]["question"] for number in questions.document_ids
    ]


def test_with_the_same_seed_more_documents_include_the_fewer_ones(task):
    few, more = loaded([task], 5, seed=2), loaded([task], 20, seed=2)
    assert set(few.document_ids) < set(more.document_ids)


def test_a_task_with_fewer_documents_than_requested_gives_all_for_every_seed(task):
    every = [loaded([task], documents, seed) for documents, seed in ((None, 0), (40, 1), (1000, 2))]
    assert {questions.identity for questions in every} == {every[0].identity}


def test_changed_data_under_the_same_name_change_the_identity(tmp_path, task):
    before = loaded([task]).identity
    documents = some_documents(40)
    documents[7]["answer"] = (documents[7]["answer"] + 1) % 3
    assert loaded([write_task(tmp_path, "colours", documents)]).identity != before
    assert loaded([write_task(tmp_path, "colours", some_documents(40))]).identity == before


def test_changed_wording_and_another_version_change_the_identity(tmp_path):
    changes = [{"doc_to_text": "Q: {{question}}"}, {"metadata": {"version": 2.0}}]
    changed = [loaded([write_task(tmp_path, "colours", some_documents(40), **one)]) for one in changes]
    before = loaded([write_task(tmp_path, "colours", some_documents(40))])
    assert len({before.identity, *(questions.identity for questions in changed)}) == 3
    assert changed[0].requests[0][0][0] == f"Q: {before.requests[0][0][0]}"


def test_no_examples_are_given_even_if_the_task_sets_num_fewshot(tmp_path):
    task = write_task(tmp_path, "colours", some_documents(4), num_fewshot=2)
    assert loaded([task]).requests[0][0][0] == some_documents(4)[0]["question"]


def test_answers_are_graded_by_the_tasks_own_rules(tmp_path):
    document = {"question": "red", "choices": ["blue", "blue green red car"], "answer": 0}
    questions = loaded([write_task(tmp_path, "colours", [document])])
    # 2 nats against 4 characters, 6 nats against 18: the second is more probable per character.
    scores = [Score(-2.0, True), Score(-6.0, False)]
    assert questions.graded(scores) == [{"acc": True, "acc_norm": False}]


def test_an_unknown_task_is_refused_with_similar_names():
    with pytest.raises(ValueError, match=r"no task 'arc_esay' .* Did you mean arc_easy or "):
        load_questions(["arc_esay"])


def test_a_tag_of_tasks_is_refused():
    with pytest.raises(ValueError, match="no task 'ai2_arc' .*tags, .* are not supported"):
        load_questions(["ai2_arc"])


def test_a_task_without_answers_that_are_right_or_wrong_is_refused(tmp_path):
    changes = {"output_type": "loglikelihood_rolling", "metric_list": None, "doc_to_target": "question"}
    task = write_task(tmp_path, "writing", some_documents(4), **changes)
    with pytest.raises(
        ValueError, match="writing has the output type loglikelihood_rolling and the metrics word_perplexity"
    ):
        load_questions([task])


def test_the_error_about_missing_data_says_what_to_do(tmp_path, task):
    (tmp_path / "colours.jsonl").unlink()
    with pytest.raises(OSError, match=r"colours\.yaml cannot be loaded .* HF_DATASETS_CACHE"):
        load_questions([task])


def test_the_error_about_data_of_a_wrong_format_gives_the_reason(tmp_path):
    (tmp_path / "notes.jsonl").write_text("no JSON\n")
    path = write_task(
        tmp_path, "words", some_documents(3), dataset_kwargs={"data_files": f"{tmp_path}/notes.jsonl"}
    )
    with pytest.raises(ValueError, match=r"task .*words\.yaml cannot be loaded \(.*JSON"):
        load_questions([path])


def test_a_template_that_includes_another_is_refused_as_a_template(tmp_path):
    path = write_task(tmp_path, "words", some_documents(3), doc_to_text="{% include 'other' %}")
    with pytest.raises(ValueError, match="template of the task .* cannot be rendered"):
        load_questions([path])


def test_two_files_with_the_same_task_are_refused(tmp_path, task):
    copy = tmp_path / "copy.yaml"
    copy.write_text(Path(task).read_text())
    with pytest.raises(ValueError, match="are the tasks colours, colours, and some have the same name"):
        load_questions([task, str(copy)])


def test_the_error_without_lm_eval_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install layerwise-pruning\[zeroshot\]"):
        load_questions(["piqa"])


@pytest.mark.parametrize(
    "names, documents, message",
    [
        ([], None, "the tasks are none"),
        (["piqa", "piqa"], None, "each task only once"),
        (["piqa"], 0, "the number of documents is 0"),
        (["no/such/file.yaml"], None, "there is no task file no/such/file.yaml"),
    ],
)
def test_invalid_arguments_are_refused(names, documents, message):
    with pytest.raises(ValueError, match=message):
        load_questions(names, documents)
