"""A corpus in several files: a folder, or a pattern such as ``data/*.jsonl.gz``, on any storage that fsspec knows."""

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
from layerwise.tasks.texts.documents import BLANK_LINE, TEXT_LIMIT
from layerwise.tasks.texts.file_corpus import FileCorpus, known_format, listed_files

logger = logging.getLogger(__name__)

# Files are taken in the order of their names until they hold so many bytes together, and no others are looked at: the
# identity of a corpus must be known before it is read, and a thousand shards are not to be read for it. Sixteen bytes
# for every character of the largest text: shards with so little text in them are rare.
SHARD_BYTES = 16 * TEXT_LIMIT
# What stands next to shards: notes for people, by the name before the suffix, and what the package datasets writes.
NOTES = {"readme", "license", "licence", "notice"}
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
NAMED = 4  # files that an error names


@dataclass(frozen=True)
class ShardedCorpus:
    """Several files of one format, in the order of their names. It is known by their names, sizes and fingerprints.

    Attributes:
        files: the first ones, as many as a text can need.
        found: number of files that there are.
        url: folder or pattern, as it was given; may hold credentials.
    """

    files: tuple[FileCorpus, ...]
    found: int = field(compare=False)
    url: str = field(compare=False, repr=False)

    joint = BLANK_LINE

    @property
    def label(self) -> str:
        """The place of the files, for people: without user, password and query."""
        return without_credentials(self.url)

    @property
    def identity(self) -> dict[str, object]:
        """What a key may depend on."""
        # A digest: ten thousand small files would make every manifest of their windows megabytes large.
        return {"shards": len(self.files), "fingerprint": digest([file.identity for file in self.files])}

    @property
    def facts(self) -> dict[str, object]:
        """What a report says about the corpus."""
        return {"corpus": self.label, **self.identity, "shards_found": self.found}

    def documents(self) -> Iterator[str]:
        """The documents of all files, each file opened when the one before it is read.

        Raises:
            ValueError: as ``FileCorpus.documents``.
            OSError: as ``FileCorpus.documents``.
        """
        for file in self.files:
            yield from file.documents()
        if self.found > len(self.files):
            logger.warning(
                "%s: the text is that of the first %d of %d files, which hold at least %d bytes; the others are not "
                "read",
                self.label,
                len(self.files),
                self.found,
                SHARD_BYTES,
            )

    def require_unchanged(self) -> None:
        """Refuse to use what was read if a file was replaced, added or removed meanwhile."""
        if open_shards(self.url) != self:
            raise OSError(f"{self.label} changed while it was in use. Start the run again.")


def is_sharded(url: str) -> bool:
    """Whether ``url`` means several files: a folder, or a pattern that is not itself the name of a file."""
    if "http://" in url or "https://" in url:
        return False  # no folders there, and to ask whether there is one would fetch the file
    filesystem, path = open_filesystem(url)
    with reaching(filesystem, path):
        return not filesystem.isfile(path) if _is_pattern(url) else bool(filesystem.isdir(path))


def open_shards(url: str) -> ShardedCorpus:
    """Find the files of a folder or pattern, and the fingerprints of those that a text can need.

    Args:
        url: a folder, whose subfolders, hidden files and descriptions are left out; or a pattern, whose matches all
            have to be files of text.

    Raises:
        ValueError: no file of text, or files of several formats; names them.
        FileNotFoundError: nothing matches the pattern.
        OSError: the storage cannot be reached.
    """
    label = without_credentials(url)
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache()  # a listing that is remembered would hide a changed file
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
            f"{label} was written by datasets.save_to_disk, whose Arrow files are not read. Write Parquet or JSON "
            f"lines: datasets.load_from_disk({label!r}).to_parquet('text.parquet')."
        )
    entries = {row["name"]: row for row in rows if row["type"] == "file" and _may_be_text(row["name"])}
    if not entries:
        there = sorted(PurePosixPath(row["name"]).name + "/" * (row["type"] == "directory") for row in rows)
        raise ValueError(
            f"{label} holds no file of text ({_some(there) or 'it is empty'}). Name a folder with .txt, .jsonl, .json "
            "or .parquet files (compressed ones, too), or a pattern such as 'data/*/*.jsonl.gz'."
        )
    return dict(sorted(entries.items()))


def _entries_of_pattern(rows: Mapping[str, Mapping[str, Any]], label: str) -> dict[str, Mapping[str, Any]]:
    entries = {name: row for name, row in sorted(rows.items()) if row["type"] == "file"}
    if not entries:
        raise FileNotFoundError(f"no file matches {label}. Check the pattern, and quote it for the shell.")
    if others := [PurePosixPath(name).name for name in entries if known_format(name) is None]:
        raise ValueError(
            f"{label} matches {_some(others)}, which no corpus can be read from. Use a pattern that matches .txt, "
            ".jsonl, .json or .parquet files only."
        )
    return entries


def _may_be_text(path: str) -> bool:
    """Whether a file of a folder belongs to the corpus: not if it is hidden, or describes it."""
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
            f"{label} holds files of {len(first_of)} formats: {_some(list(first_of.values()))}. Give a pattern that "
            "matches those of one format, such as '*.jsonl'."
        )


def _url_of(filesystem: AbstractFileSystem, url: str, path: str, name: str) -> str:
    """The URL of a file that was found below ``url``, whose path on the file system is ``path``."""
    if is_local(filesystem):
        return name
    inside = path.strip("/")
    if inside not in url:  # the file system writes paths in another way
        return str(filesystem.unstrip_protocol(name))
    start = url.index(inside) if inside else url.index("://") + len("://")  # the root of an archive
    return f"{url[:start]}{name.strip('/')}{url[start + len(inside) :].lstrip('/')}"


def _is_pattern(url: str) -> bool:
    wild = "*[" if "://" in url else "*[?"  # after a question mark a URL has its query
    return any(character in url for character in wild)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"
