"""Upper triangle of a symmetric matrix, as panels of rows: about half of its memory."""

from collections.abc import Iterable, Iterator

from torch import Tensor

# Rows of a panel. Gram matrices are computed and stored in panels of this size, and their square blocks on the diagonal
# are kept whole, so that a stored matrix has the same bits as the computed one.
PANEL = 1024


def upper_panels(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of each panel, and the panel: its rows, from the first column of their diagonal block on.

    Args:
        matrix: symmetric, shape ``(size, size)``.

    Returns:
        Views on the matrix, shapes ``(rows, size - first_row)``.
    """
    for first in range(0, len(matrix), PANEL):
        yield first, matrix[first : first + PANEL, first:]


def fill_symmetric(matrix: Tensor, panels: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Write the panels of a symmetric matrix and their mirror image into ``matrix``, and return it.

    Args:
        matrix: shape ``(size, size)``; overwritten.
        panels: first row and panel, in any order; consumed one at a time.
    """
    for first, panel in panels:
        stop = first + len(panel)
        matrix[first:stop, first:] = panel
        matrix[stop:, first:stop] = panel[:, stop - first :].T
    return matrix


def panel_entries(size: int) -> int:
    """Return the number of entries in all panels of a matrix of ``size`` rows."""
    return sum(min(PANEL, size - first) * (size - first) for first in range(0, size, PANEL))
