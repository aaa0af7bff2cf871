"""Check that a model can be streamed, before any work: its parts outside of the decoder layers run on made-up weights."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PretrainedConfig

from layerwise.models.layer_state import StateLayout
from layerwise.models.skeleton import UnsupportedModel
from layerwise.models.streaming import StreamedModel


class MadeUpTensors(Mapping[str, Tensor]):
    """Tensors of given shapes that take the memory of a row and a column.

    Rows differ, also after they are normalized, so that hidden states and layer arguments that depend on the tokens are
    noticed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if not shape:
            return torch.ones((), dtype=self._dtype)
        rows, columns = shape[0], shape[-1] if len(shape) > 1 else 1
        values = 0.5 + torch.arange(rows + columns) ** 2 % 89 / 89
        matrix = values.to(self._dtype).as_strided((rows, columns), (1, 1))
        return matrix.view(rows, *(1 for _ in shape[1:-1]), *shape[-1:][: len(shape) - 1]).expand(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


# What `layout_of` found, by configuration: a process opens the same model several times.
_layouts: dict[tuple[str, torch.dtype], StateLayout] = {}


def layout_of(
    config: PretrainedConfig, outer: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> StateLayout:
    """Return the layout of the state between the layers, computed in ``dtype``.

    Raises if the model does not call its decoder layers as streaming requires.

    Args:
        outer: shapes of the weights outside the decoder layers, by state-dict name.

    Raises:
        UnsupportedModel: see ``StreamedModel.layout``; or the model does not run on tokens alone.
    """
    of_model = config.to_json_string(use_diff=False)
    known = _layouts.get((of_model, dtype), _layouts.get((of_model, torch.float32)))
    if known is not None and (known.is_plain or known.dtype == dtype):
        return replace(known, dtype=dtype)
    try:
        layout = StreamedModel(config, MadeUpTensors(outer, dtype), dtype, torch.device("cpu")).layout
    except UnsupportedModel:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnsupportedModel(
            f"{config.model_type} does not run on text without its decoder layers ({type(error).__name__}: {error}), so they "
            "cannot be streamed. Use another model."
        ) from error
    _layouts[of_model, dtype] = layout
    return layout
