"""What a model is calibrated on: C4, a mix, chats and the model's own text, at equal tokens, by every figure at once.

    .venv/bin/python tests/benchmarks/calibration_sources.py --data DATA --store /tmp/sources [--tasks arc_easy,piqa,...]

DATA has ``c4/exl3_c4.utf8``, ``wikitext2/wiki.{valid,test}.raw`` and ``openbookqa/{train,dev}.jsonl``. The chats are the
questions of OpenBookQA with their choices, and the right answer as the response; those of the test are from its dev split.
The model's own text are its responses to questions of the training split. Nothing of DATA is copied into the project:
texts that have to be made lie next to the store.

Plans are chosen by the KL divergence on the validation text of WikiText-2. Prints one row per sparsity and source: perplexity
on three test texts, perplexity of the responses of the chats, KL divergence on the three texts, and with ``--tasks`` the
average zero-shot accuracy, with its difference to C4 and McNemar's p. Everything in the store is reused. ``--tiny`` takes a few
small windows and questions, to try the script (7 minutes on a busy machine). At full size, a source at one sparsity takes 20
minutes on a busy machine with three short tasks, and the responses 25. Exits with 1 if a figure is missing.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefect import flow

from layerwise.flows.generate_calibration import GenerateCalibration, generate_calibration
from layerwise.flows.orchestration.embedded_server import ServerStart
from layerwise.flows.pipeline.finished_search import reopen_search
from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.runtime import Runtime, SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.generation.generate_calibration import TEXT_FILE
from layerwise.tasks.lm_eval_tasks.comparison import compare_zero_shot
from layerwise.tasks.lm_eval_tasks.task_loading import load_tasks
from layerwise.tasks.zero_shot import ZeroShotSettings
from layerwise.tasks.zero_shot import zero_shot as answer

SPARSITIES = (0.5, 0.6)
BETAS = (0.002, 0.004, 0.008)
# Windows of calibration, selection and test; tokens of a window; prompts to answer, tokens of an answer; documents of a task.
FULL = {
    "calibration": 32,
    "selection": 8,
    "test": 16,
    "seqlen": 512,
    "prompts": 500,
    "answer": 128,
    "documents": 200,
}
TINY = {
    "calibration": 4,
    "selection": 2,
    "test": 2,
    "seqlen": 64,
    "prompts": 16,
    "answer": 16,
    "documents": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tasks", default="", help="tasks of lm-eval, separated by commas")
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--calibrate-on", choices=("all", "responses"), default="all", help="for the chats alone"
    )
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    ServerStart().wait()
    size = TINY if arguments.tiny else FULL
    texts = written_texts(arguments, size)
    rows: list[dict[str, object]] = []
    for sparsity in SPARSITIES[:1] if arguments.tiny else SPARSITIES:
        answers: dict[str, Mapping[str, Artifact]] = {}
        for source, calibration in sources(texts, size).items():
            began = time.monotonic()
            results = searches(arguments, size, sparsity, source, calibration, texts)
            row, first = figures(sparsity, source, results), next(iter(results.values()))
            if arguments.tasks:
                answers[source] = answers_of(arguments, size, first, dense=False)
                row |= accuracy(arguments, answers, source)
            rows.append(row | {"seconds": round(time.monotonic() - began)})
            print(json.dumps(rows[-1]), flush=True)
    rows.append(dense_figures(results))
    if arguments.tasks:
        dense = {"c4": answers_of(arguments, size, first, dense=True)}
        rows[-1] |= accuracy(arguments, dense, "c4")
    show(rows)
    sys.exit(any(value is None for row in rows for value in row.values()))


def written_texts(arguments: argparse.Namespace, size: Mapping[str, int]) -> dict[str, str]:
    """Return the paths of all texts by name; chats are written, and the model's own text is generated."""
    data, folder = arguments.data, arguments.store.with_name(f"{arguments.store.name}-texts")
    folder.mkdir(parents=True, exist_ok=True)
    documents = (data / "c4" / "exl3_c4.utf8").read_text().splitlines()
    texts = {}
    for name, part in (
        ("c4", documents[: len(documents) // 2]),
        ("c4-test", documents[len(documents) // 2 :]),
    ):
        texts[name] = str(folder / f"{name}.jsonl")
        Path(texts[name]).write_text("\n".join(json.dumps({"text": document}) for document in part))
    for name, split in (("chats", "train"), ("chats-test", "dev")):
        rows = map(json.loads, (data / "openbookqa" / f"{split}.jsonl").read_text().splitlines())
        texts[name] = str(folder / f"{name}.jsonl")
        Path(texts[name]).write_text("\n".join(json.dumps({"messages": conversation(row)}) for row in rows))
    for name in ("valid", "test"):
        texts[f"wikitext2-{name}"] = str(data / "wikitext2" / f"wiki.{name}.raw")
    settings = GenerateCalibration(
        model=arguments.model,
        prompts=texts["chats"],
        documents=size["prompts"],
        max_tokens=size["answer"],
        batch=32,
    )
    generated = generate_calibration(settings, Runtime(store=str(arguments.store)))
    texts["own"] = ArtifactStore(str(arguments.store)).location(generated, TEXT_FILE)
    return texts


def conversation(row: Mapping[str, object]) -> list[dict[str, str]]:
    """Return a question of OpenBookQA with its choices, and the right one as the response."""
    question = row["question"]
    assert isinstance(question, dict), "the format of OpenBookQA"
    choices = {choice["label"]: choice["text"] for choice in question["choices"]}
    asked = "\n".join([question["stem"], *(f"{label}. {text}" for label, text in choices.items())])
    key = str(row["answerKey"])
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{key}. {choices[key]}"}]


def sources(texts: Mapping[str, str], size: Mapping[str, int]) -> dict[str, str]:
    """Return the calibrations to compare, with the same number of tokens each."""
    half = size["calibration"] // 2
    mix = f"file:{texts['c4']}:{half},file:{texts['chats']}:{size['calibration'] - half}"
    return {"c4": texts["c4"], "mix of c4 and chats": mix, "chats": texts["chats"], "own text": texts["own"]}


def searches(
    arguments: argparse.Namespace,
    size: Mapping[str, int],
    sparsity: float,
    source: str,
    calibration: str,
    texts: Mapping[str, str],
) -> dict[str, SearchResult]:
    """Search once for every test text. The searches share everything but the test."""
    found = {}
    for name in ("wikitext2-test", "c4-test", "chats-test"):
        settings = Search(
            model=arguments.model,
            sparsity=sparsity,
            betas=BETAS,
            criterion="kl",
            calibration=calibration,
            calibrate_on=arguments.calibrate_on if source == "chats" else "all",
            selection=texts["wikitext2-valid"],
            test=texts[name],
            calibration_windows=size["calibration"],
            selection_windows=size["selection"],
            test_windows=size["test"],
            seqlen=size["seqlen"],
            dtype="bfloat16",
        )
        found[name] = search(settings, SearchRuntime(store=str(arguments.store)))
    return found


def figures(sparsity: float, source: str, results: Mapping[str, SearchResult]) -> dict[str, object]:
    """Return the figures of the chosen plan on the test texts."""
    row: dict[str, object] = {"sparsity": sparsity, "calibration": source}
    for name, result in results.items():
        text = name.removesuffix("-test")
        row["plan"] = result.selection.name(result.selection.best)
        row[f"perplexity, {text}"] = round(result.test.best, 2)
        row[f"KL, {text}"] = None if result.test.kl is None else round(result.test.kl.best, 4)
    responses = results["chats-test"].test.responses
    row["perplexity, responses"] = None if responses is None else round(responses.best, 2)
    return row


def dense_figures(results: Mapping[str, SearchResult]) -> dict[str, object]:
    """Return the perplexities of the dense model on the test texts."""
    row: dict[str, object] = {"sparsity": 0, "calibration": "dense"}
    for name, result in results.items():
        row[f"perplexity, {name.removesuffix('-test')}"] = round(result.test.dense, 2)
    responses = results["chats-test"].test.responses
    row["perplexity, responses"] = None if responses is None else round(responses.dense, 2)
    return row


def answers_of(
    arguments: argparse.Namespace, size: Mapping[str, int], result: SearchResult, dense: bool
) -> Mapping[str, Artifact]:
    """Return the answers of the dense or the chosen model to the questions of all tasks."""
    runtime = Runtime(store=str(arguments.store))
    store, execution = ArtifactStore(runtime.store), runtime.execution()
    questions = load_tasks(tuple(arguments.tasks.split(",")), size["documents"]).questions

    @flow(name="answers of calibration_sources")
    def ask() -> Mapping[str, Artifact]:
        assert result.artifact is not None, "the search is in the store"
        finished = reopen_search(store, result.artifact.key, execution)
        captured = finished.scored.captured
        asked = captured.checkpoint if dense else finished.checkpoint(store, finished.best, execution)
        return answer(
            store, asked, questions, ZeroShotSettings(captured.pruning.dtype, "streamed"), execution
        )

    return ask()


def accuracy(
    arguments: argparse.Namespace, answers: Mapping[str, Mapping[str, Artifact]], source: str
) -> dict[str, object]:
    """Return the average accuracy in per cent, and the difference to the calibration on C4, with McNemar's p."""
    store = ArtifactStore(str(arguments.store))
    average = compare_zero_shot(store, answers["c4"], None, answers[source]).average
    row: dict[str, object] = {"accuracy, %": round(100 * average.best.value, 1)}
    if source != "c4":
        row |= {"above c4": round(average.to_dense.difference, 1), "p": round(average.to_dense.p_value, 3)}
    return row


def show(rows: Sequence[Mapping[str, object]]) -> None:
    """Print the rows as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(f"| {' | '.join(names)} |\n|{'--:|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(row.get(name, '')) for name in names)} |")


if __name__ == "__main__":
    main()
