"""Counted tokens: a mask of the calibration tokens that statistics, targets and losses use, such as those of responses.

A mask is boolean, ``True`` for a token that counts, shape ``(windows, seqlen)``; None means that all tokens count.
"""

from collections.abc import Iterator
from itertools import repeat

from torch import Tensor

from layerwise.models.experts import COUNT_ALL
from layerwise.models.hidden_states import batches


def counted_rows(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the rows of the tokens that count, shape ``(tokens, features)``, in their order; ``values`` itself if all do.

    Args:
        values: one row per token, shape ``(..., features)``.
        counted: mask of the same tokens, any shape; None for all.

    Raises:
        ValueError: the mask is of another number of tokens.
    """
    if counted is None:
        return values
    rows = values.reshape(-1, values.shape[-1])
    if counted.numel() != len(rows):
        raise ValueError(
            f"a linear received {len(rows)} rows for {counted.numel()} tokens, so it is not known which tokens they are. "
            f"{COUNT_ALL}"
        )
    return rows[counted.reshape(-1).to(rows.device)]


def counted_batches(counted: Tensor | None) -> Iterator[Tensor | None]:
    """Return the parts of a mask for the batches of windows, see ``batches``; None without end if all tokens count."""
    return repeat(None) if counted is None else iter(batches(counted))


def predicting(counted: Tensor) -> Tensor:
    """Return the positions whose next token counts. The last position, whose next token is unknown, is as its own token.

    Args:
        counted: mask of tokens, shape ``(..., seqlen)``.
    """
    positions = counted.roll(-1, dims=-1)
    positions[..., -1] = counted[..., -1]
    return positions
