"""Models on the Hugging Face Hub: which commit a name means, and its files."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from layerwise.tasks.sources.checkpoint_files import SUBFOLDERS
from layerwise.tasks.sources.folder import Folder, list_folder

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
READ_AHEAD = 1 << 16  # bytes that HfFileSystem fetches beyond every range; by default 5 MB


def resolve_commit(repo: str, revision: str | None) -> str:
    """The full commit that ``revision`` of ``repo`` (default: its main branch) means now.

    A full commit is returned without a request: a pinned model that is imported already needs no network.

    Raises:
        OSError: for a missing or gated repository, an unknown revision, or no connection.
    """
    if revision and FULL_COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with _hub_errors(repo, revision):
        commit = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision).sha
    assert commit, "the hub names the commit of every revision"
    return commit


def open_repository(repo: str, commit: str) -> Folder:
    """The files of a model repository at one commit, read by ranged requests.

    Raises:
        OSError: as ``resolve_commit``.
    """
    from huggingface_hub import HfFileSystem

    with _hub_errors(repo, commit):
        fs = HfFileSystem(endpoint=_endpoint(), block_size=READ_AHEAD)
        folder = list_folder(fs, f"{repo}@{commit}", f"{repo}@{commit}", pinned=True, subfolders=SUBFOLDERS)
        # A gated repository lists its files for everybody, and refuses only to give them: ask for one byte.
        largest = max(folder.files, key=lambda name: folder.files[name].size)
        fs.cat_file(folder.path(largest), 0, 1)
        return folder


def _endpoint() -> str | None:
    # Asked for at every call: huggingface_hub reads it once, when it is imported.
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into ones that say what to do; request headers never get into the text."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = f"{repo}@{revision}" if revision else repo
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo} is gated: the hub gives it only to accounts that accepted its terms. Accept them on "
            f"https://huggingface.co/{repo} and set HF_TOKEN (or run `hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}. Give a branch, tag or commit of it, or leave @{revision} "
            "out."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"the hub has no model {repo}, or it is private, and there is no local folder of this name. "
            "Check the spelling (owner/name); for a private model set HF_TOKEN (or run `hf auth login`)."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise ConnectionError(
            f"the hub answered a request for {wanted} with HTTP status {status}. Try again later; for 401 or "
            "403 check HF_TOKEN."
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"the hub cannot be reached for {wanted} ({type(error).__name__}). Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE. Already imported models need no network when pinned: "
            f"{repo}@<full commit>."
        ) from error
