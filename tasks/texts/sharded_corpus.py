"""A corpus in several files: a folder, or a pattern such as ``data/*.jsonl.gz``, at any fsspec URL."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from layerwise.storage.files.credentials import without_credentials
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.filesystem import is_local, open_filesystem
from layerwise.storage.formats.canonical_json import digest
from layerwise.tasks.sources.file_identity import resolve_link
from layerwise.tasks.texts.documents import TEXT_LIMIT, Corpus, Document
from layerwise.tasks.texts.file_corpus import FileCorpus, known_format, listed_files

logger = logging.getLogger(__name__)

# Files are used in the order of their names until they have this many bytes together; the others are ignored. The
# identity of a corpus must be known before it is read, and it should not require reading a thousand shards. This is
# sixteen bytes per character of the largest text; shards with less text than that are rare.
SHARD_BYTES = 16 * TEXT_LIMIT
# Files next to shards that are not part of the text: notes (by the name before the suffix), and those that the package
# datasets writes.
NOTES = {"readme", "license", "licence", "notice"}
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
NAMED = 4  # maximum number of files named in a message


@dataclass(frozen=True)
class ShardedCorpus(Corpus):
    """Several files of one format, in the order of their names. Its identity is their names, sizes and fingerprints.

    Attributes:
        files: the first files, as many as a text can need.
        found: number of all files.
        url: folder or pattern as given; may contain credentials.
    """

    files: tuple[FileCorpus, ...]
    found: int = field(compare=False)
    url: str = field(compare=False, repr=False)

    @property
    def label(self) -> str:
        return without_credentials(self.url)

    @property
    def identity(self) -> dict[str, object]:
        # A digest, because the identities of ten thousand files would add megabytes to every manifest of their windows.
        return {"shards": len(self.files), "fingerprint": digest([file.identity for file in self.files])}

    @property
    def facts(self) -> dict[str, object]:
        return {**super().facts, "shards_found": self.found}

    def documents(self) -> Iterator[Document]:
        """Yield the documents of all files. Each file is opened after the one before it has been read.

        Raises:
            ValueError: see ``FileCorpus.documents``.
            OSError: see ``FileCorpus.documents``.
        """
        for file in self.files:
            yield from file.documents()
        if self.found > len(self.files):
            logger.warning(
                "%s: only the first %d of %d files are read, because they have at least %d bytes together",
                self.label,
                len(self.files),
                self.found,
                SHARD_BYTES,
            )

    def require_unchanged(self) -> None:
        if open_shards(self.url) != self:
            raise OSError(f"{self.label} changed while it was in use. Start the run again.")


def is_sharded(url: str) -> bool:
    """Return whether ``url`` is a folder, or a pattern that is not itself the name of a file."""
    if "http://" in url or "https://" in url:
        return False  # HTTP has no folders, and asking for one would download the file
    filesystem, path = open_filesystem(url)
    with reaching(filesystem, path):
        return not filesystem.isfile(path) if _is_pattern(url) else bool(filesystem.isdir(path))


def open_shards(url: str) -> ShardedCorpus:
    """Find the files of a folder or pattern, and the fingerprints of those that a text can need.

    Args:
        url: a folder, whose subfolders, hidden files and descriptions are ignored; or a pattern that matches only text
            files.

    Raises:
        ValueError: there are no text files, or files of several formats; names them.
        FileNotFoundError: nothing matches the pattern.
        OSError: the storage cannot be reached.
    """
    label = without_credentials(url)
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()  # a cached listing would hide a changed file
    with reaching(filesystem, path):
        if filesystem.isdir(path):
            listed = [resolve_link(filesystem, row) for row in filesystem.ls(path, detail=True)]
            entries = _entries_of_folder(listed, label)
        else:
            matches = filesystem.glob(path, detail=True)
            entries = _entries_of_pattern(
                {name: resolve_link(filesystem, matches[name]) for name in matches}, label
            )
    _require_one_format(entries, label)
    needed: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, entry in entries.items():
        needed[name] = (_url_of(filesystem, url, path, name), entry)
        if sum(each["size"] for _, each in needed.values()) >= SHARD_BYTES:
            break
    return ShardedCorpus(listed_files(filesystem, needed), len(entries), url)


def _entries_of_folder(rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, Mapping[str, Any]]:
    names = {PurePosixPath(row["name"]).name for row in rows}
    if any(name.endswith(".arrow") for name in names) and names & {"dataset_info.json", "state.json"}:
        raise ValueError(
            f"{label} was written by datasets.save_to_disk, and Arrow files are not supported. Write Parquet or JSON "
            f"lines: datasets.load_from_disk({label!r}).to_parquet('text.parquet')."
        )
    entries = {row["name"]: row for row in rows if row["type"] == "file" and _may_be_text(row["name"])}
    if not entries:
        there = sorted(PurePosixPath(row["name"]).name + "/" * (row["type"] == "directory") for row in rows)
        raise ValueError(
            f"{label} contains no text file ({_some(there) or 'it is empty'}). Give a folder with .txt, .jsonl, .json "
            "or .parquet files (optionally compressed), or a pattern such as 'data/*/*.jsonl.gz'."
        )
    return dict(sorted(entries.items()))


def _entries_of_pattern(rows: Mapping[str, Mapping[str, Any]], label: str) -> dict[str, Mapping[str, Any]]:
    entries = {name: row for name, row in sorted(rows.items()) if row["type"] == "file"}
    if not entries:
        raise FileNotFoundError(f"no file matches {label}. Check the pattern, and quote it for the shell.")
    if others := [PurePosixPath(name).name for name in entries if known_format(name) is None]:
        raise ValueError(
            f"{label} matches {_some(others)}, which are not text files. Use a pattern that matches only .txt, "
            ".jsonl, .json or .parquet files."
        )
    return entries


def _may_be_text(path: str) -> bool:
    """Return whether a file of a folder may be part of the corpus, that is, neither hidden nor a description."""
    name = PurePosixPath(path).name
    if name.startswith((".", "_")) or name in DESCRIPTIONS or name.lower().partition(".")[0] in NOTES:
        return False
    return known_format(path) is not None


def _require_one_format(entries: Mapping[str, object], label: str) -> None:
    first_of: dict[str | None, str] = {}
    for path in entries:
        first_of.setdefault(known_format(path), PurePosixPath(path).name)
    if len(first_of) > 1:
        raise ValueError(
            f"{label} contains files of {len(first_of)} formats: {_some(list(first_of.values()))}. Give a pattern that "
            "matches one format, such as '*.jsonl'."
        )


def _url_of(filesystem: AbstractFileSystem, url: str, path: str, name: str) -> str:
    """Return the URL of the file ``name`` that was found below ``url``.

    Args:
        path: path of ``url`` on the file system.
    """
    if is_local(filesystem):
        return name
    inside = path.strip("/")
    if inside not in url:  # the file system writes paths differently
        return str(filesystem.unstrip_protocol(name))
    start = url.index(inside) if inside else url.index("://") + len("://")  # the root of an archive
    return f"{url[:start]}{name.strip('/')}{url[start + len(inside) :].lstrip('/')}"


def _is_pattern(url: str) -> bool:
    wild = "*[" if "://" in url else "*[?"  # in a URL, a question mark starts the query
    return any(character in url for character in wild)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
