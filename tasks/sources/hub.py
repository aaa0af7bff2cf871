"""Models on the Hugging Face Hub: resolve a name to a commit, and open its files for reading in ranges. The import copies them."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from layerwise.tasks.sources.checkpoint_files import SUBFOLDERS
from layerwise.tasks.sources.folder import Folder, list_folder

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
READ_AHEAD = 1 << 16  # bytes that HfFileSystem fetches beyond every range; its default is 5 MB


def resolve_commit(repo: str, revision: str | None) -> str:
    """Return the full commit of a revision of ``repo``.

    A full commit is returned without a request, so a pinned model that is already imported needs no network.

    Args:
        revision: branch, tag or commit; None for the main branch.

    Raises:
        OSError: the repository is missing or gated, the revision is unknown, or the hub cannot be reached.
    """
    if revision and FULL_COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    with _hub_errors(repo, revision):
        commit = HfApi(endpoint=_endpoint()).model_info(repo, revision=revision).sha
    assert commit, "the hub names the commit of every revision"
    return commit


def open_repository(repo: str, commit: str) -> Folder:
    """List the files of a model repository at one commit. They are read with range requests.

    Raises:
        OSError: see ``resolve_commit``.
    """
    from huggingface_hub import HfFileSystem

    with _hub_errors(repo, commit):
        fs = HfFileSystem(endpoint=_endpoint(), block_size=READ_AHEAD)
        folder = list_folder(fs, f"{repo}@{commit}", f"{repo}@{commit}", pinned=True, subfolders=SUBFOLDERS)
        # Anybody can list the files of a gated repository; only reading them is refused. So read one byte.
        largest = max(folder.files, key=lambda name: folder.files[name].size)
        fs.cat_file(folder.path(largest), 0, 1)
        return folder


def _endpoint() -> str | None:
    # Read at every call, because huggingface_hub reads it only when it is imported.
    return os.environ.get("HF_ENDPOINT") or None


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Replace the hub's errors by ones that say what to do. Their text never contains request headers."""
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
            f"{repo} is gated: only accounts that have accepted its terms may read it. Accept them on "
            f"https://huggingface.co/{repo} and set HF_TOKEN (or run `hf auth login`)."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{repo} has no revision {revision!r}. Give one of its branches, tags or commits, or remove @{revision}."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"the hub has no model {repo}, or the model is private. There is no local folder of this name either. "
            "Check the spelling (owner/name); for a private model set HF_TOKEN (or run `hf auth login`)."
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        raise ConnectionError(
            f"the hub answered a request for {wanted} with HTTP status {status}. Try again later. For status 401 or "
            "403, check HF_TOKEN."
        ) from error
    except (HTTPError, ConnectionError) as error:
        raise ConnectionError(
            f"the hub cannot be reached for {wanted} ({type(error).__name__}). Check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE. A model that is already imported needs no network if its commit is "
            f"given: {repo}@<full commit>."
        ) from error
