"""A linear-chain conditional random field over tags.

Source:
    Lafferty et al., "Conditional Random Fields: Probabilistic Models for Segmenting and Labeling Sequence Data", 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CRF(nn.Module):
    """Scores of tags that follow each other.

    score(y) = start[y₁] + Σ emission[i, yᵢ] + Σ transition[yᵢ, yᵢ₊₁] + end[yₙ]

    Places that the mask leaves out are no part of a sequence, wherever they are: those on both sides of a gap follow
    each other.

    Args:
        tags: C, at least 1.
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(tags))
        self.end = nn.Parameter(torch.zeros(tags))
        self.transitions = nn.Parameter(torch.zeros(tags, tags))

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """The negative log-likelihood of tags.

        Args:
            emissions: ``[B, T, C]``.
            tags: int64 ``[B, T]``; anything where the mask is False.
            mask: bool ``[B, T]``.

        Returns:
            float32 ``[B]``; 0 for a sequence of no places.
        """
        emissions, order, lengths = self._closed(emissions, mask)
        tags = torch.where(mask, tags, 0).gather(1, order)  # [B, T]
        inside = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]  # [B, T]
        scores = emissions.gather(2, tags[..., None]).squeeze(2)  # [B, T]
        steps = self.transitions[tags[:, :-1], tags[:, 1:]]  # [B, T - 1]
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)  # [B]
        path = (scores * inside).sum(1) + (steps * inside[:, 1:]).sum(1) + self.start[tags[:, 0]] + self.end[last]
        alpha = self.start + emissions[:, 0]  # [B, C]
        for place in range(1, tags.shape[1]):
            following = torch.logsumexp(alpha[:, :, None] + self.transitions, dim=1) + emissions[:, place]
            alpha = torch.where(inside[:, place, None], following, alpha)
        return torch.where(lengths > 0, torch.logsumexp(alpha + self.end, dim=1) - path, 0.0)

    @torch.no_grad()
    def decode(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """The tags with the highest score.

        Args:
            emissions: ``[B, T, C]``; minus infinity forbids a tag at a place.
            mask: bool ``[B, T]``.

        Returns:
            int64 ``[B, T]``, -1 where the mask is False.
        """
        emissions, order, lengths = self._closed(emissions, mask)
        batch, length, _ = emissions.shape
        best = self.start + emissions[:, 0]  # [B, C]
        came_from = []
        for place in range(1, length):
            value, source = (best[:, :, None] + self.transitions).max(dim=1)  # [B, C]
            inside = (place < lengths)[:, None]
            best = torch.where(inside, value + emissions[:, place], best)
            came_from.append(torch.where(inside, source, torch.arange(best.shape[1], device=best.device)))
        tag = (best + self.end).argmax(dim=1)  # [B]
        path = [tag]
        for source in reversed(came_from):
            tag = source.gather(1, tag[:, None]).squeeze(1)
            path.append(tag)
        # A sequence that has ended keeps its tag, so that all are read from the end.
        tags = torch.stack(path[::-1], dim=1)  # [B, T]
        found = torch.full((batch, length), -1, dtype=torch.int64, device=tags.device)
        return torch.where(mask, found.scatter(1, order, tags), -1)

    @staticmethod
    def _closed(emissions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Emissions with the mask's places in front, in float32; the places they come from; how many they are."""
        order = torch.argsort(~mask, dim=1, stable=True)  # [B, T]
        closed = emissions.float().gather(1, order[..., None].expand(-1, -1, emissions.shape[2]))
        return closed, order, mask.sum(1)
