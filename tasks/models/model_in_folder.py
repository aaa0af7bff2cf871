"""Open a checkpoint in a folder as one transformers model, with the checks of an import.

``from_pretrained`` of transformers is not used: it opens pickles if there are no safetensors, offers to run code from
the folder, applies adapters, and initialises missing weights at random.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from layerwise.models.experts import fused_tensors
from layerwise.tasks.models.folder_index import check_tied_copies, describe_folder, read_tensors_of
from layerwise.tasks.models.weight_conversion import Conversion, StoredNames, model_weights
from layerwise.tasks.models.whole_model import model_of_weights
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.checkpoint_files import GENERATION_CONFIG
from layerwise.tasks.sources.folder import Folder
from layerwise.tasks.sources.model_config import config_from_document, outline_from_document, short_reason


def model_in_folder(folder: Folder, dtype: torch.dtype) -> PreTrainedModel:
    """Open the model in ``folder`` on the CPU, computing in ``dtype``.

    Raises:
        ValueError: the files are not a model that can be pruned, see ``describe_folder``.
        Corrupt: a file contradicts its own header.
    """
    index = describe_folder(folder)
    check_tied_copies(folder, index)
    conversions: tuple[Conversion, ...] = ()
    model = outline_from_document(index.config, folder.name)
    if index.converted:
        conversions = StoredNames((tensor.name for tensor in index.tensors), model).conversions
    experts = fused_tensors(model)
    weights: dict[str, Tensor] = {}
    for layer in (None, *range(index.num_layers)):
        wanted = index.weights(layer)
        found = read_tensors_of(folder, index.stored_tensors(wanted.values()))
        made = model_weights(wanted, found, conversions, experts)
        weights |= {name: weight.to(dtype) for name, weight in made.items()}
    model = model_of_weights(
        config_from_document(index.config, folder.name), weights, Execution().torch_device
    )
    return with_generation_config(model, folder)


def with_generation_config(model: PreTrainedModel, folder: Folder) -> PreTrainedModel:
    """Give ``model`` the generation settings in the local ``folder``, if there are any, and return it.

    Raises:
        ValueError: the settings cannot be used.
    """
    if GENERATION_CONFIG in folder.files:
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder.root, local_files_only=True)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            OSError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{GENERATION_CONFIG} of {folder.name} cannot be used ({short_reason(error)}). Correct it, or remove "
                "it to use the defaults of transformers."
            ) from error
    return model
