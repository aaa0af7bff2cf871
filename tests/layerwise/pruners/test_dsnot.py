"""DSnoT against a direct reference in plain Python."""

import math

import pytest
import torch

from layerwise.pruners.dsnot import DSnoT


def reference(weight, tokens, removed_per_row, pruner, group=None):
    """Row by row, one exchange at a time, as in Algorithm 1 of the paper."""
    count, inputs = len(tokens), range(len(tokens[0]))
    mean = [sum(token[i] for token in tokens) / count for i in inputs]
    variance = [sum((token[i] - mean[i]) ** 2 for token in tokens) / count for i in inputs]
    norm = [math.sqrt(sum(token[i] ** 2 for token in tokens)) for i in inputs]
    factor = norm
    if pruner.initial == "sparsegpt":
        x = torch.tensor(tokens, dtype=torch.float64)
        hessian = x.T @ x
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
        upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
        factor = (1 / upper.diagonal()).tolist()
    rows = []
    for row in weight:
        size = group or len(row)
        mask = [False] * len(row)
        for start in range(0, len(row), size):
            order = sorted(range(start, start + size), key=lambda i: abs(row[i]) * factor[i])
            for i in order[: removed_per_row * size // len(row)]:
                mask[i] = True
        first = list(mask)
        moved = set()
        change = sum(row[i] * mean[i] for i in inputs if mask[i])
        first_change = change
        for _ in range(pruner.cycles):
            if abs(change) * 2048 <= pruner.threshold:
                break
            sign = 1 if change > 0 else -1
            gain = {i: sign * row[i] * mean[i] / variance[i] for i in inputs if first[i] and i not in moved}
            grow = max(gain, key=gain.get, default=None)
            if grow is None or gain[grow] <= 0:
                break
            kept = [i for i in inputs if not first[i] and i not in moved]
            if group:
                kept = [i for i in kept if i // group == grow // group]
                prune = min(kept, key=lambda i: abs(row[i]) * factor[i], default=None)
            else:
                kept = [i for i in kept if sign * row[i] * mean[i] < 0]
                prune = min(kept, key=lambda i: abs(row[i]) * norm[i], default=None)
            if prune is None:
                break
            after = change + row[prune] * mean[prune] - row[grow] * mean[grow]
            if group and after * first_change <= 0:
                break
            mask[grow], mask[prune] = False, True
            moved |= {grow, prune}
            change = after
        rows.append([0.0 if gone else value for gone, value in zip(mask, row, strict=True)])
    return rows


@pytest.mark.parametrize(
    ("pruner", "group"),
    [
        (DSnoT(), None),
        (DSnoT(cycles=3), None),
        (DSnoT(threshold=2000.0), None),
        (DSnoT(initial="sparsegpt"), None),
        (DSnoT(), 8),
        (DSnoT(cycles=0), 4),
    ],
    ids=str,
)
def test_weights_are_exchanged_as_by_a_direct_computation_row_by_row(pruner, group):
    tokens = torch.randn(64, 32) * torch.rand(32) + torch.randn(32)
    weight = torch.randn(24, 32)
    gram, sums = tokens.T @ tokens, tokens.sum(dim=0, dtype=torch.float64)
    prepared = pruner.prepare(gram, len(tokens), sums=sums)
    pruned = pruner.prune(weight, prepared, 16 * 24, group)
    expected = reference(weight.tolist(), tokens.tolist(), 16, pruner, group)
    assert torch.equal(pruned, torch.tensor(expected))
    assert (pruned == 0).sum(dim=1).tolist() == [16] * 24
    if group:
        assert set((pruned == 0).view(24, -1, group).sum(dim=2).reshape(-1).tolist()) == {group // 2}
    if pruner.cycles:  # the exchanges do what they are for
        plain = DSnoT(initial=pruner.initial, cycles=0)
        before = plain.prune(weight, prepared, 16 * 24, group)
        mean = sums.float() / len(tokens)
        assert ((weight - pruned) @ mean).abs().mean() < ((weight - before) @ mean).abs().mean()


def test_a_count_that_the_rows_do_not_divide_is_met_exactly():
    tokens = torch.randn(64, 16) + 1
    prepared = DSnoT().prepare(tokens.T @ tokens, 64, sums=tokens.sum(dim=0))
    pruned = DSnoT().prune(torch.randn(5, 16), prepared, 37)
    assert (pruned == 0).sum(dim=1).tolist() == [8, 8, 7, 7, 7]


def test_means_are_required():
    with pytest.raises(
        ValueError, match="DSnoT needs the means of the inputs, but they come from 4 tokens, with no sums"
    ):
        DSnoT().prepare(torch.eye(3), 4)
