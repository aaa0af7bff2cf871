"""A task file from anybody: code that it names is refused unless the file is trusted, and plain tasks work."""

import json
from pathlib import Path

import jinja2
import pytest

from tests.lm_task_files import load_questions, some_documents, write_task


@pytest.fixture
def mark(tmp_path):
    """File that exists if code of the task was run."""
    return tmp_path / "it ran"


@pytest.fixture
def task(tmp_path):
    """A harmless task, next to a module that creates the mark when it is imported."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'it ran')!r}).touch()\n"
    (tmp_path / "code.py").write_text(f"{code}def process(documents):\n    return documents\n")
    return Path(write_task(tmp_path, "colours", some_documents(4)))


def refused(task, mark, match):
    with pytest.raises(ValueError, match=match) as error:
        load_questions([str(task)])
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 1000
    assert not mark.exists()


def add(task, text):
    """Write the task as YAML with one more entry."""
    entries = [f"{name}: {json.dumps(value)}" for name, value in json.loads(task.read_text()).items()]
    task.write_text("\n".join([*entries, text, ""]))


CODE = [
    "process_docs: !function code.process",
    "process_docs: !<!function> code.process",
    "metadata: {deep: [{deeper: !function code.process}]}",
    "!function code.process : 1",
    "doc_to_text: !function os.system",
    "class: !function code.process",
]


@pytest.mark.parametrize("text", CODE)
def test_code_is_refused_unless_the_file_is_trusted(task, mark, text):
    add(task, text)
    refused(
        task, mark, r"line 1\d of the task file .*'!function', which runs Python code.* --trust-task-code"
    )


def test_a_trusted_task_runs_its_code(task, mark):
    plain = load_questions([str(task)])[0].identity
    add(task, CODE[0])
    assert load_questions([str(task)], trust_task_code=True)[0].identity == plain
    assert mark.exists()


def test_code_in_an_included_file_is_refused(task, mark, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("include: ../more.yaml\n")
    (tmp_path / "more.yaml").write_text("\n\nprocess_docs: !function code.process\n")
    for text in ("include: deep/base.yaml", f"include: ['{tmp_path}/deep/base.yaml']"):
        add(task, text)
        refused(task, mark, r"line 3 of the task file .*more\.yaml has '!function'")
        task.write_text(Path(write_task(tmp_path, "colours", some_documents(4))).read_text())


def test_a_file_overrides_entries_of_the_file_that_it_includes(task, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"include: {task.name}\ntask: others\ndoc_to_text: 'Q: {{{{question}}}}'\n")
    plain, changed = load_questions([str(task), str(other)])
    assert (plain.task, changed.task) == ("colours", "others")
    assert changed.requests[0][0][0] == f"Q: {plain.requests[0][0][0]}"


def test_an_included_file_of_lm_eval_may_not_run_code_either(task, mark):
    import lm_eval.tasks

    own = Path(next(iter(lm_eval.tasks.__path__)), "hellaswag", "hellaswag.yaml")
    add(task, f"include: {own}")
    refused(task, mark, r"hellaswag\.yaml has '!function'")


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ question['__class__'] }}",
    "{{ question|attr('__class__') }}",
    "{{ [question]|map(attribute='__class__')|first }}",
    "{{ '{0.__class__}'.format(question) }}",
    "{{ range(10**9)|list }}",
    "{{ cycler.__init__.__globals__.os.mkdir(MARK) }}",
    "{{ self.__init__.__globals__ }}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ 1 // 0 }}",
    "{{ question",
]


@pytest.mark.parametrize("field", ["doc_to_text", "doc_to_choice", "doc_to_target", "description"])
@pytest.mark.parametrize("template", ESCAPES)
def test_templates_cannot_access_python(task, mark, template, field):
    template = template.replace("MARK", repr(str(mark)))
    document = json.loads(task.read_text())
    task.write_text(json.dumps(document | {field: template}))
    for trusted in (False, True):
        with pytest.raises(ValueError, match="colours.* cannot be (rendered|loaded)") as error:
            load_questions([str(task)], trust_task_code=trusted)
        assert len(str(error.value).splitlines()) == 1
    assert not mark.exists()


def test_a_template_could_create_the_mark_without_the_sandbox(mark):
    jinja2.Environment().from_string(ESCAPES[6].replace("MARK", repr(str(mark)))).render()
    assert mark.exists()


def test_plain_templates_work(tmp_path):
    templates = {
        "doc_to_text": "{% if question %}Q: {{question.strip()|upper}}{% else %}-{% endif %} {{choices[0]}}",
        "doc_to_choice": "{{choices|map('title')|list}}",
        "doc_to_target": "{{answer}}",
    }
    document = {"question": " red ", "choices": ["blue", "green"], "answer": 1}
    (questions,) = load_questions([write_task(tmp_path, "templates", [document], **templates)])
    assert questions.requests == [[("Q: RED blue", " Blue"), ("Q: RED blue", " Green")]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class": "code.Task"}, r"'class' \(a Python class\)"),
        ({"custom_dataset": "code.process"}, r"'custom_dataset' \(a Python function\)"),
        ({"unsafe_code": True}, r"'unsafe_code' \(running code that a model writes\)"),
        ({"use_prompt": "prompts.yaml:one"}, r"'use_prompt' \(prompts from another"),
        ({"metric_list": [{"metric": "./code.py"}]}, "metric './code.py', which is not one of lm-eval's"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "metric 'acc', which is not one of"),
        ({"metric_list": [{"metric": ["acc"]}]}, r"metric \['acc'\], which is not one of"),
        ({"metric_list": {"metric": "acc"}}, "which is not a list"),
        ({"dataset_path": "./code.py"}, "'./code.py', which may run code"),
        ({"dataset_path": "pandas"}, "'pandas', which may run code"),
        ({"dataset_path": "webdataset"}, "'webdataset', which may run code"),
        ({"dataset_path": ["json"]}, r"dataset_path \['json'\]"),
        ({"dataset_path": None}, "dataset_path None"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "'trust_remote_code' in its dataset_kwargs"),
        ({"dataset_kwargs": {"storage_options": {"fo": "x"}}}, "'storage_options' in its dataset_kwargs"),
        ({"dataset_kwargs": {"data_files": {"validation": ["reference://x"]}}}, "data at 'reference://x'"),
        ({"dataset_kwargs": {"data_files": "zip://a::file://x"}}, "data at 'zip://a::file://x'"),
        ({"dataset_kwargs": ["data_files"]}, r"dataset_kwargs \['data_files'\]"),
        ({"task": ["arc_easy"]}, "one task, not a group"),
        ({"task_list": [{"task": "x", "class": "y"}]}, "one task, not a group"),
        ({"group": "g"}, "the group 'g' .* has no list of its tasks"),
        ({"group": "g", "task": ["arc_easy"]}, "the group 'g' .* has no list of its tasks"),
        ({"group": "g", "task": [{"task": "x", "class": "y"}]}, r"'class' \(a Python class\)"),
        ({"group": "g", "class": "y", "task": [{"task": "x"}]}, r"'class' \(a Python class\)"),
        (
            {"group": "g", "task": [{"group": "h", "task": [{"task": "x", "unsafe_code": True}]}]},
            r"'unsafe_code' \(running code that a model writes\)",
        ),
        (
            {"output_type": "generate_until", "generation_kwargs": {"custom_generate": "./code"}},
            "'custom_generate' in its generation_kwargs, which may run code",
        ),
    ],
)
def test_other_entries_that_may_run_code_are_refused(task, mark, changes, message):
    task.write_text(json.dumps(json.loads(task.read_text()) | changes))
    refused(task, mark, message)


BOMB = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10) if n else 1}]" for n in range(12)])
MERGES = "\n".join(
    ["m0: &m0 {x: 1}"] + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 12)]
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB, "more than 100000 values"),
        (MERGES, "more than 100000 values"),
        ("[" * 5_000, "is not valid YAML"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels"),
        ("a: &a [*a]", "contains itself"),
        ("a: !!python/object/apply:os.system [x]", "is not plain data"),
        ("a: [", "is not valid YAML"),
        ("a: 1\n---\nb: 1", "is not valid YAML"),
        ("- a", "holds a list"),
        ("", "holds a NoneType"),
        ("\x00", "is not valid YAML"),
        ("include: colours.yaml", "includes itself"),
        ("include: missing.yaml", "includes 'missing.yaml', which is not a file"),
        ("include: /dev/zero", "includes '/dev/zero', which is not a file"),
        ("include: 1", "includes 1, which is not the path"),
        ("#" * (1 << 20) + "#", "more than 1048576 bytes"),
    ],
    ids=range(16),
)
def test_a_file_that_does_not_describe_a_task_is_refused(task, mark, text, message):
    task.write_text(text)
    refused(task, mark, message)
