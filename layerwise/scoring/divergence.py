"""Kullback-Leibler divergence of a pruned model's distribution of the next token from that of the dense model."""

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from layerwise.models.streaming import StreamedModel, next_token_loss
from layerwise.scoring.perplexity import finite_loss

# Positions whose distributions are in memory at a time: 256 x 128k vocabulary x 4 bytes = 134 MB for each of a few tensors.
DIVERGENCE_POSITIONS = 256


def kl_per_token(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Return the divergence of a model from the dense model, ``sum p_dense log(p_dense / p)``, in nats, in float32.

    Args:
        logits, dense_logits: shape ``(..., vocab_size)``.

    Returns:
        Divergence of every token, shape ``(...)``.
    """
    log_p = logits.float().log_softmax(-1)
    log_dense = dense_logits.float().log_softmax(-1)
    terms = kl_div(log_p, log_dense, reduction="none", log_target=True)
    # A token that the model itself masks has probability 0 in both; 0 times infinity would be NaN.
    return terms.masked_fill(log_dense.isneginf(), 0).sum(-1)


def mean_divergence(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """Return the mean of ``kl_per_token`` over all positions, a scalar, with some positions in float32 at a time.

    Args:
        logits, dense_logits: shape ``(positions, vocab_size)``.
    """
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for some, some_dense in zip(
        logits.split(DIVERGENCE_POSITIONS), dense_logits.split(DIVERGENCE_POSITIONS), strict=True
    ):
        total += kl_per_token(some, some_dense).sum()
    return total / len(logits)


@torch.no_grad()
def losses_and_divergences(
    model: StreamedModel, hidden_states: Tensor, dense_states: Tensor, input_ids: Tensor
) -> tuple[list[float], list[float]]:
    """Return the loss of every window, as ``window_losses`` does, and its divergence from the dense model, in nats.

    The divergence is the mean over the same ``seqlen - 1`` next tokens as the loss. It is exact over the vocabulary: the
    model's norm and head, which pruning leaves unchanged, are applied to the hidden states of both models.

    Args:
        model: applies its norm and head.
        hidden_states: output of the last layer, shape ``(windows, seqlen, hidden_size)``.
        dense_states: the same of the dense model.
        input_ids: shape ``(windows, seqlen)``.

    Returns:
        Losses and divergences by window; ``DIVERGED`` where one is not finite.
    """
    if not len(input_ids):
        return [], []
    losses, divergences = [], []
    for number in range(len(input_ids)):
        logits, dense = (model.logits(states[number, None]) for states in (hidden_states, dense_states))
        losses.append(next_token_loss(logits, input_ids[number, None]))
        divergences.append(mean_divergence(logits[0, :-1], dense[0, :-1]))
    # Read together, because every reading waits for the device.
    both = torch.stack([torch.stack(losses), torch.stack(divergences)]).cpu().tolist()
    return [finite_loss(each) for each in both[0]], [finite_loss(each) for each in both[1]]
