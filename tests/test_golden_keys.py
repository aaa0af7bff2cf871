"""Keys that stand in users' stores: a change of one means that finished work is not found any more.

Every key below was taken at commit 8f252e1, but for those of token windows, which were changed on purpose after it, and
for what was new after it (recovery, distillation, mixes, generated texts, the criterion kl, the watcher). A new value is a decision that stands in CHANGELOG.md.
"""

from dataclasses import replace

import pytest

from layerwise.allocators.owl import OWL
from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.settings import Search
from layerwise.flows.watcher.started_searches import started_stage
from layerwise.models.skeleton import Linear
from layerwise.pruners.alps import ALPS
from layerwise.pruners.sparsegpt import SparseGPT
from layerwise.pruners.wanda import Wanda
from layerwise.recovery.refit import Refit
from layerwise.recovery.train import Train
from layerwise.scoring.theorem_plans import TheoryPlan
from layerwise.storage.artifact import Artifact, StoredFile
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import AllocateSettings, allocate_stage
from layerwise.tasks.branch import joined_stage, lane_stage
from layerwise.tasks.capture import CaptureSettings, capture_stage
from layerwise.tasks.capture_grams import grams_stage
from layerwise.tasks.compress import compress_stage
from layerwise.tasks.evaluate import evaluate_stage
from layerwise.tasks.export import RecoveredExport, export_stage
from layerwise.tasks.generation.generate_calibration import generate_stage
from layerwise.tasks.generation.generation_settings import GenerationSettings
from layerwise.tasks.generation.prompts import Prompt
from layerwise.tasks.import_checkpoint import import_stage
from layerwise.tasks.lanes.dense_states import dense_states_stage
from layerwise.tasks.lanes.group_membership import group_stage
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import recovered_layer_stage
from layerwise.tasks.measure import measure_stage
from layerwise.tasks.models.checkpoint import INDEX_FILE, Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex, IndexedTensor
from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.recovery.distill import DistillInputs, distill_stage
from layerwise.tasks.recovery.student import DistillSettings
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.sample_tokens import MixRequest, TokenRequest, token_stage
from layerwise.tasks.select import select_stage
from layerwise.tasks.texts.hub_corpus import HubCorpus
from layerwise.tasks.theory import page_stage, theory_stage
from layerwise.tasks.zero_shot import ZeroShotSettings, zero_shot_stage

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LINEARS = [[Linear("self_attn.q_proj", 4, 4, False), Linear("mlp.down_proj", 4, 8, False)]] * 2
UNIFORM, ASCENDING = SparsityPlan(0.0, (0.5, 0.5)), SparsityPlan(0.1, (0.45, 0.55))
WANDA = PruneSettings(0.5, Wanda(), "dense", "bfloat16")


def artifact(stage: str, number: int, **facts: object) -> Artifact:
    """An artifact that only its key, its content and its facts are asked of."""
    names = {"capture": "statistics/layer_000.parquet", "checkpoint": "tokenizer.json"}
    name = names.get(stage, "data.bin")
    return Artifact(
        f"{stage}/{number:032x}", {name: StoredFile(f"{stage}/{name}", 8, f"{number:032x}")}, dict(facts)
    )


class FixedQuestions:
    """Inputs of a key of zero-shot answers, without lm-eval and its data sets."""

    task, identity, generated = "arc_easy", "f" * 32, False


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """The key of every kind of stage, for fixed inputs."""
    store = ArtifactStore("memory://golden-keys")
    tensors = (
        IndexedTensor(
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            0,
            "model.safetensors",
            TensorEntry("BF16", (4, 8), 128, "a" * 32),
        ),
    )
    index = CheckpointIndex({"model_type": "llama"}, "model.layers", 2, False, tensors)

    def write(draft):
        draft.write(INDEX_FILE, index.to_json())
        draft.write("tokenizer.json", b"{}")
        draft.write("tokenizer_config.json", b"{}")
        draft.write("config.json", b"{}")
        draft.facts["source"] = "owner/name"

    checkpoint = Checkpoint(store, store.get_or_build(Stage("golden", 1), write), None)
    capture = artifact("capture", 1, **{DENSE_PERPLEXITY: 11.5})
    calibration, selection, grams = (
        artifact("sample_tokens", 2),
        artifact("sample_tokens", 3),
        artifact("grams", 4),
    )
    inputs = LaneInputs(checkpoint, capture, calibration, selection, grams)
    score = LaneScore(ASCENDING, artifact("lane", 5), (3.5, 3.25), 0.5)
    uniform = LaneScore(UNIFORM, artifact("lane", 6), (3.75, 3.5), 0.5)
    text = HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1", "train", COMMIT)
    card = ModelCard("owner/name", None, "wanda", None, "atp", (0.45, 0.55), 0.5)
    settings = Search(
        model="demo",
        sparsity=0.5,
        calibration_windows=128,
        selection_windows=64,
        test_windows=None,
        seqlen=2048,
    )
    refit = replace(WANDA, recover=Refit())
    stages = {
        "import, demo": import_stage("demo"),
        "import, hub": import_stage(f"owner/name@{COMMIT}"),
        "calibration windows": token_stage(
            checkpoint.encoding_identity, TokenRequest("calibration", text, 128, 2048, (0.0, 0.5), 0)
        ),
        "calibration windows of a mix": token_stage(
            checkpoint.encoding_identity,
            MixRequest(
                (
                    TokenRequest("calibration", text, 64, 2048, (0.0, 0.5), 0),
                    TokenRequest("calibration", replace(text, split="validation"), 64, 2048, (0.0, 1.0), 0),
                )
            ),
        ),
        "test windows": token_stage(checkpoint.encoding_identity, TokenRequest("test", text, None, 2048)),
        "capture": capture_stage(checkpoint.identity, calibration, selection, CaptureSettings("bfloat16")),
        "grams": grams_stage(checkpoint.identity, calibration, "bfloat16"),
        "measure": measure_stage(checkpoint, capture, grams, OWL(), False, LINEARS),
        "allocate": allocate_stage(LINEARS, AllocateSettings(0.5, step=0.002), None),
        "allocate, offsets": allocate_stage(
            LINEARS,
            AllocateSettings(0.5, betas=(0.1,), offsets=(0.1,), allocator=OWL()),
            artifact("measure", 7),
        ),
        "lane": lane_stage(ASCENDING, inputs, WANDA),
        "lane, sequential": lane_stage(ASCENDING, inputs, replace(WANDA, calibration_mode="sequential")),
        "lane, sparsegpt": lane_stage(ASCENDING, inputs, replace(WANDA, pruner=SparseGPT())),
        "lane, alps": lane_stage(ASCENDING, inputs, replace(WANDA, pruner=ALPS())),
        "lane, pattern and exclusion": lane_stage(
            ASCENDING, inputs, replace(WANDA, pattern="2:4", exclude="down_proj$")
        ),
        "lane, a round": lane_stage(ASCENDING, replace(inputs, windows=(0, 8)), WANDA),
        "dense_states": dense_states_stage(checkpoint.identity, selection, "bfloat16"),
        "lane, kl": lane_stage(
            ASCENDING, replace(inputs, criterion="kl", dense_states=artifact("dense_states", 12)), WANDA
        ),
        "evaluate, kl": evaluate_stage(replace(inputs, criterion="kl"), UNIFORM, ASCENDING, WANDA),
        "lane_group": group_stage([lane_stage(plan, inputs, WANDA) for plan in (UNIFORM, ASCENDING)]),
        "lane_rounds": joined_stage([score, uniform]),
        "select": select_stage([uniform, score], 11.5, "beta"),
        "export": export_stage(inputs, score, uniform, WANDA),
        "lane, recovered": lane_stage(ASCENDING, inputs, refit),
        "lane, recovered on some windows": lane_stage(ASCENDING, replace(inputs, recovery_windows=4), refit),
        "recovered_layer": recovered_layer_stage(ASCENDING, 1, inputs, refit),
        "recovered_layer, trained": recovered_layer_stage(
            ASCENDING, 1, inputs, replace(WANDA, recover=Train())
        ),
        "export, recovered": export_stage(
            inputs,
            score,
            uniform,
            refit,
            RecoveredExport(artifact("recovered", 11), artifact("evaluate", 10).key, selection),
        ),
        "evaluate": evaluate_stage(inputs, UNIFORM, ASCENDING, WANDA),
        "compress": compress_stage(artifact("export", 8).key, card),
        "compress, distilled": compress_stage(artifact("distill", 13).key, card, distillation="4 steps."),
        "generate_calibration": generate_stage(
            checkpoint,
            [Prompt(None, "text", (1, 2)), Prompt([{"role": "user", "content": "Why?"}], "Why?", (3,))],
            [2],
            GenerationSettings("bfloat16", 512, 1.0, 8, 0),
        ),
        "distill": distill_stage(
            DistillInputs(
                checkpoint,
                artifact("export", 8),
                calibration,
                selection,
                artifact("evaluate", 10),
                "bfloat16",
            ),
            DistillSettings(64, 0.002, 4, 8, 8, 4, 0),
            card,
        ),
        "theory": theory_stage(inputs, [TheoryPlan("ascending", 0.5, ASCENDING)], WANDA),
        "theory_page": page_stage(artifact("theory", 9), "title", {"sparsity": 0.5}),
        "zero_shot": zero_shot_stage(checkpoint, FixedQuestions(), ZeroShotSettings("bfloat16")),  # type: ignore[arg-type]
        "watch": started_stage(
            settings, "c" * 32
        ),  # with another key, all watched checkpoints would be searched again
    }
    return {name: stage.key for name, stage in stages.items()} | {
        "identity of a checkpoint": checkpoint.identity,
        "identity of a tokenizer": checkpoint.tokenizer_identity,
        "settings of a search": digest(settings.model_dump(mode="json")),
        "settings of a search by kl": digest(
            settings.model_copy(update={"criterion": "kl"}).model_dump(mode="json")
        ),
        "settings of a grid": digest(
            settings.model_copy(update={"strategy": "grid"}).model_dump(mode="json")
        ),
    }


GOLDEN = {
    "import, demo": "import_checkpoint/4c9ea97c6cd3226a3322436ca22b74c9",
    "import, hub": "import_checkpoint/78a662bcaa03862f140a2856a5bf9670",
    "calibration windows": "sample_tokens/370c75663fccffd2658cd2be447ca4c2",
    "calibration windows of a mix": "mix_tokens/e9f8c02b7ee3dccf9025baf8a2aaacab",
    "test windows": "sample_tokens/f15a06fe206d8a527cc390f775e316ea",
    "capture": "capture/00f4ee86783ce48ca5ea92e9d1776b38",
    "grams": "grams/27740f962eeecdc381561b299ca84147",
    "measure": "measure/7b66d6f7c27ab990b94e54993995ae97",
    "allocate": "allocate/05aaa57209abf47f90cce061ffe0f3e2",
    "allocate, offsets": "allocate/730981252f444217d88a569622dbce42",
    "lane": "lane/65967dfa8de14f79df57e26afd829129",
    "lane, sequential": "lane/bb3919f4d264e51f46627efe06a6db24",
    "lane, sparsegpt": "lane/40e64d0c36d2068c26a8292c2ef097a6",
    "lane, alps": "lane/e24b0dabbeaacd851d9783f9fae3fcd6",
    "lane, pattern and exclusion": "lane/30b362f6379aab03153321c56d572ad5",
    "lane, a round": "lane/b51fbe40aa73f619a01b308acd16fa71",
    "lane_group": "lane_group/e5c0e399c1c0f9999e21f1b7df54c581",
    "lane_rounds": "lane_rounds/982792a6871635432d7cb044c12b412e",
    "select": "select/a4c6c4a570d7a622c4eaca72238e9958",
    "export": "export/917947c0ef88ef4b9451a86dfaef6dbe",
    "lane, recovered": "lane/17ea4a0e66ab626d018f438ecb2f89fb",
    "lane, recovered on some windows": "lane/7577fa217f56eb87164dc21de9eafb42",
    "recovered_layer": "recovered_layer/76b048c2b2f3a837bfd326f86fadb09e",
    "recovered_layer, trained": "recovered_layer/15b64b306264f836356b2b50a0f48b29",
    "export, recovered": "export/7a72f34fb565262bf4518fb122df4043",
    "evaluate": "evaluate/e60e777ab3b25aa8d9af9ff878188112",
    "compress": "compress/bfa52348d82b7164d6700b6e1885d1f8",
    "compress, distilled": "compress/b84474c21b32ee22c355a4f69feca1d9",
    "generate_calibration": "generate_calibration/27b76a3bd997d70f38ba935ecaae0ad7",
    "distill": "distill/acdfc494ca07669cdc552f8dd29c7849",
    "theory": "theory/ac73bfc4bba7b4c56b8b011c933f0dd9",
    "theory_page": "theory_page/8bc8456465fcab42c310db7186a00dbb",
    "zero_shot": "zero_shot/d8b9eae30a3cfce9d344b08163905543",
    "watch": "watch/ffb2655ca87dced6b368823e735d5137",
    "identity of a checkpoint": "4eb37c8ea08b8bae7a0cfaa333a06b57",
    "identity of a tokenizer": "c499c195b44d0b3b3e69dffc935c3452",
    "settings of a search": "a7bee34486f7c103dbb1cfbb50091856",
    "dense_states": "dense_states/45381bca5369f03dce458dd83fd2f906",
    "lane, kl": "lane/71603260619c90a7f1e0c3ba2f328dcd",
    "evaluate, kl": "evaluate/498e67358b7d1f5aaa7251aca9ccb846",
    "settings of a search by kl": "a495fc192e8a1dedaa377fe6aa874de7",
    "settings of a grid": "15eca869bf95776acd7fadb219f630e6",  # grid was the default
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_stage_has_the_key_that_stands_in_users_stores(keys, name):
    assert keys[name] == GOLDEN[name]


def test_every_kind_of_stage_is_pinned(keys):
    assert keys.keys() == GOLDEN.keys()
