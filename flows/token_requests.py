"""Which token windows a search needs, from which text."""

from collections.abc import Mapping

from flows.settings import Search
from storage.artifact import Artifact
from tasks.corpora import assign_parts, open_corpus
from tasks.documents import Role
from tasks.sample_tokens import TokenRequest


def token_requests(settings: Search) -> dict[Role, TokenRequest]:
    """Which windows each role needs."""
    names: dict[Role, str] = {
        "calibration": settings.calibration,
        "selection": settings.selection,
        "test": settings.test or settings.selection,
    }
    windows = {
        "calibration": settings.calibration_windows,
        "selection": settings.selection_windows,
        "test": settings.test_windows,
    }
    corpora = {role: open_corpus(name, role) for role, name in names.items()}
    parts = assign_parts(corpora)
    return {
        role: TokenRequest(
            role,
            corpus,
            windows[role],
            settings.seqlen,
            parts[role],
            settings.seed if role == "calibration" else None,
        )
        for role, corpus in corpora.items()
    }


def window_counts(settings: Search, windows: Mapping[str, Artifact | None]) -> dict[Role, int | None]:
    """How many windows each role has; None where that is all that the text gives, and nobody has counted it yet.

    Args:
        windows: by role, those that are in the store.
    """
    asked: dict[Role, int | None] = {
        "calibration": settings.calibration_windows,
        "selection": settings.selection_windows,
        "test": settings.test_windows,
    }
    there = {role: windows.get(role) for role in asked}
    return {
        role: int(str(artifact.facts["windows"])) if count is None and (artifact := there[role]) else count
        for role, count in asked.items()
    }
