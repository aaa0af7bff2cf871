"""Comparison of layerwise with transformers on a tiny random model of any type."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PretrainedConfig, PreTrainedModel

from layerwise.models.skeleton import UnsupportedModel, auto_class, check_supported
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.import_checkpoint import inspect_source
from layerwise.tasks.results.evaluation import read_test
from tests.tasks.conftest import SmallRun, lively, run_of
from tests.tiny_configs import tiny_config

ROUNDING = 1e-5  # relative; sums in another order

# Types in the lists of transformers that are no encoders or encoder-decoders, and no language models by themselves.
NO_LANGUAGE_MODELS = {
    "blip": "needs an image",
    "blip-2": "needs an image",
    "diffusion_gemma": "writes blocks of tokens by diffusion; tokens attend to later tokens",
    "evolla": "needs a protein",
    "gemma4_assistant": "drafts tokens for another model from its hidden states",
    "gemma4_unified_assistant": "drafts tokens for another model from its hidden states",
    "idefics": "needs an image",
    "instructblip": "needs an image",
    "instructblipvideo": "needs a video",
    "kosmos-2": "needs an image",
    "kyutai_speech_to_text": "needs sound",
    "moshi": "needs sound",
    "musicgen": "writes music",
    "musicgen_melody": "writes music",
    "pi0": "moves a robot",
    "qwen2_5_omni": "has no forward pass of its own; its language model is qwen2_5_omni_thinker",
    "qwen3_omni_moe": "has no forward pass of its own; its language model is qwen3_omni_moe_thinker",
    "shieldgemma2": "classifies images",
    "voxtral_realtime": "needs sound",
    "xlm": "encoder: tokens attend to later tokens",
    "xlnet": "writes tokens in any order; tokens attend to later tokens",
}
# Packages without which transformers cannot build a type.
NEEDS_PACKAGE = {"fast_vlm": "timm", "gemma3n": "timm", "perception_lm": "timm"}
# Types whose tiny model transformers saves but does not load again.
NOT_LOADED = {
    "nemo_speechlm": "transformers does not load the tiny model again: sizes of its timestamp encoder"
}

Result = Literal["equal", "refused", "not tested", "not decoder-only"]


@dataclass(frozen=True)
class Outcome:
    """Result of a comparison, with the reason if it is not "equal"."""

    result: Result
    reason: str = ""


class Differs(AssertionError):
    """layerwise and transformers disagree, or layerwise does not refuse a model that it cannot prune."""


def compare(model_type: str, folder: Path) -> Outcome:
    """Compare both on a tiny model of ``model_type``: perplexities, masks, and the pruned model.

    Args:
        folder: an empty folder.

    Raises:
        Differs: see there.
    """
    torch.manual_seed(0)
    config = tiny_config(model_type)
    if model_type in NO_LANGUAGE_MODELS:
        require_refused_files(config, folder)
        return Outcome("not decoder-only", NO_LANGUAGE_MODELS[model_type])
    if (kind := encoder_kind(config)) is not None:
        require_refused(check_supported, config)
        return Outcome("not decoder-only", kind)
    source, opener = folder / "model", getattr(transformers, auto_class(config))
    try:
        model = lively(opener.from_config(config, dtype=torch.float32)).eval()
    except ImportError:
        if model_type not in NEEDS_PACKAGE:
            raise
        return Outcome(
            "not tested", f"transformers needs the package {NEEDS_PACKAGE[model_type]} to build it"
        )
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    require(bool(logits.isfinite().all()), "the tiny model of transformers has no finite logits")
    model.save_pretrained(source)
    try:
        inspect_source(str(source))
    except UnsupportedModel as error:
        return Outcome("refused", str(error))
    if model_type in NOT_LOADED:
        return Outcome("not tested", NOT_LOADED[model_type])
    run = run_of(ArtifactStore(str(folder / "store")), source)
    compare_run(run, opener)
    return Outcome("equal")


def encoder_kind(config: PretrainedConfig) -> str | None:
    """Return what a type is that is not decoder-only; None for all others."""
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "decoder"))]
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        return "encoder-decoder"
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        return "encoder"
    return None


def require_refused(check: Callable[[PretrainedConfig], object], config: PretrainedConfig) -> None:
    try:
        check(config)
    except UnsupportedModel:
        return
    raise Differs("is not decoder-only, but is not refused")


def require_refused_files(config: PretrainedConfig, folder: Path) -> None:
    """Require that a model is refused in one line before the import, also where transformers can save it."""
    try:
        check_supported(config)
    except UnsupportedModel:
        return
    try:
        model = getattr(transformers, auto_class(config)).from_config(config)
    except (ValueError, AttributeError):  # transformers cannot build it either
        return
    model.save_pretrained(folder)
    try:
        inspect_source(str(folder))
    except ValueError:
        return
    raise Differs("is not a language model by itself, but is not refused")


def compare_run(run: SmallRun, opener: type) -> None:
    """Compare the stages of a search with transformers' own model, masked by hand.

    Args:
        opener: class of transformers that opens the checkpoint.

    Raises:
        Differs: see there.
    """
    opened, info = opener.from_pretrained(run.folder, dtype=torch.float32, output_loading_info=True)
    require(not info["missing_keys"], f"transformers saves without {info['missing_keys']}")
    model = opened.eval()
    (lane,) = run.branch(0.0)
    tested = read_test(run.store, run.evaluate(0.0, 0.01))
    require_close(tested.dense, perplexity(run, model), "perplexity of the dense model")
    exported = Path(run.store.location(run.export(lane)))
    pruned, info = opener.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    require(not info["missing_keys"], f"the export lacks {info['missing_keys']}")
    require_masked_by_hand(run, model, pruned.eval())
    require_close(tested.uniform, perplexity(run, pruned), "perplexity of the pruned model")


def require_masked_by_hand(run: SmallRun, model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Require that ``pruned`` is ``model`` without the half of every row of its linears that Wanda removes."""
    prefix = run.checkpoint.layer_prefix
    linears = {
        f"{prefix}.{index}.{each.name}": each for index, layer in enumerate(run.linears) for each in layer
    }
    before, after = dict(model.state_dict()), dict(pruned.state_dict())
    modules = dict(model.named_modules())
    own = {name: linear for name, linear in linears.items() if name in modules}  # the others are experts
    norms = input_norms(run, model, list(own))
    for name, linear in own.items():
        mask = linear.oriented(after[f"{name}.weight"]) == 0
        weight = linear.oriented(before[f"{name}.weight"])
        require_lowest(mask, weight.abs() * norms[name], name)
        before[f"{name}.weight"] = linear.oriented(weight.masked_fill(mask, 0))
    different = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    fused = [name for name in different if ".experts." in name or before[name].ndim == 3]
    require(different == fused, f"the export is not masking by hand: {different[:3]}")
    for name in fused:
        kept = after[name] != 0
        require(torch.equal(before[name][kept], after[name][kept]), f"{name}: kept weights differ")
    zeros = sum(int((after[name] == 0).sum()) for name in fused)
    experts = sum(linear.numel for name, linear in linears.items() if name not in own)
    require(2 * zeros == experts, f"experts: {zeros} of {experts} weights are removed")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Differs(message)


def require_close(found: float, expected: float, name: str) -> None:
    close = abs(found - expected) <= ROUNDING * expected
    require(close, f"{name}: {found:.7g}, but transformers {expected:.7g}")


def require_lowest(mask: Tensor, scores: Tensor, name: str) -> None:
    """Require that ``mask`` has the lower half of the scores of every row, up to rounding."""
    half = scores.shape[1] // 2
    require(bool((mask.sum(dim=1) == half).all()), f"{name}: a row has not exactly half of its weights")
    highest_removed = scores.masked_fill(~mask, 0).amax(dim=1)
    lowest_kept = scores.masked_fill(mask, torch.inf).amin(dim=1)
    require(
        bool((highest_removed <= lowest_kept * (1 + ROUNDING)).all()), f"{name}: other weights are removed"
    )


@torch.no_grad()
def perplexity(run: SmallRun, model: PreTrainedModel) -> float:
    losses = []
    for window in run.input_ids("test"):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses.append(nn.functional.cross_entropy(logits, window[1:]))
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def input_norms(run: SmallRun, model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """Return the norm of every input of the named linears over the calibration windows."""
    squares: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].float().flatten(0, -2).square().sum(dim=0)

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(adding(name)) for name in names]
    for window in run.input_ids("calibration"):
        model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: total.sqrt() for name, total in squares.items()}
