"""lm-eval tasks in files, tokenizers for their words, and answers of small models."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lm_eval_tasks.questions import Questions
from layerwise.tasks.lm_eval_tasks.task_loading import load_tasks
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.zero_shot import ZeroShotSettings, zero_shot

WORDS = [f"{colour}{thing}" for colour in ("red", "green", "blue") for thing in ("", "fox", "tree", "car")]
SPECIAL = ["<unk>", "<s>", "</s>"]


def some_documents(count: int, seed: int = 0) -> list[dict]:
    """Return questions of 1 to 20 words with three choices of 1 to 4 words; every fourth has one-word choices."""
    draw = random.Random(seed)
    return [
        {
            "question": " ".join(draw.choices(WORDS, k=draw.randint(1, 20))),
            "choices": [
                " ".join(draw.choices(WORDS, k=draw.randint(1, 4) if number % 4 else 1)) for _ in range(3)
            ],
            "answer": draw.randrange(3),
        }
        for number in range(count)
    ]


def write_task(folder: Path, name: str, documents: Sequence[Mapping], **changes: object) -> str:
    """Write a multiple-choice task with its documents; return the path of its YAML file."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    accuracy = {"aggregation": "mean", "higher_is_better": True}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(folder / "datasets"),
        },
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric, **accuracy} for metric in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task | changes, indent=1))  # all JSON is YAML
    return str(path)


def give_words(folder: Path, special: Mapping[str, str] | None = None) -> Path:
    """Replace the tokenizer of a saved model by one with ``WORDS`` that starts every text with ``<s>``.

    Args:
        folder: folder of the model.
        special: special tokens by role.
    """
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} if special is None else special
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return folder


def load_questions(*arguments, **options) -> list[Questions]:
    """Return the questions of tasks, see ``load_tasks``."""
    return list(load_tasks(*arguments, **options).questions)


def answered(
    store: ArtifactStore,
    folder: Path,
    tasks: Sequence[str],
    way: str = "streamed",
    documents: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    **execution,
) -> dict[str, Artifact]:
    """Return the answers of the model in ``folder``, by task."""
    checkpoint = import_checkpoint(store, str(folder))
    questions = load_questions(tasks, documents, seed)
    return zero_shot.fn(store, checkpoint, questions, ZeroShotSettings(dtype, way), Execution(**execution))


def write_generated_task(folder: Path, name: str, documents: Sequence[Mapping], **changes: object) -> str:
    """Write a task whose answers the model writes, with two filters; return the path of its YAML file.

    The right answer is the first word of the first choice, and examples are drawn from the documents themselves.
    """
    first = {"function": "take_first"}
    filters = {"whole": [first], "first-word": [{"function": "regex", "regex_pattern": r"^\s*(\w+)"}, first]}
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    task = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[0].split(' ')[0]}}",
        "fewshot_split": "validation",
        "generation_kwargs": {
            "until": ["redcar"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 12,
        },
        "filter_list": [{"name": name, "filter": steps} for name, steps in filters.items()],
        "metric_list": [metric],
    }
    return write_task(folder, name, documents, **(task | changes))
