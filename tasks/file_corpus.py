"""A corpus in one file, on any storage that fsspec knows: plain text, JSON lines or Parquet."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from gzip import BadGzipFile
from typing import Literal

from fsspec import AbstractFileSystem
from fsspec.utils import infer_compression

from storage.files import open_filesystem
from storage.large_file_pointer import refuse_pointers
from storage.unreachable import reaching
from tasks.documents import BLANK_LINE, TEXT_FIELD, TEXT_LIMIT, missing_field, text_of
from tasks.file_identity import file_state, fingerprint, require_target

FileFormat = Literal["text", "json lines", "parquet"]
SUFFIXES: dict[str, FileFormat] = {
    ".txt": "text",
    ".raw": "text",
    ".jsonl": "json lines",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class FileCorpus:
    """One file of text. It is known by name, size and fingerprint; where it lies is not part of what it
    is."""

    name: str
    size: int
    fingerprint: str
    file_format: FileFormat = field(compare=False)
    url: str = field(compare=False, repr=False)  # may hold credentials

    joint = BLANK_LINE

    @property
    def label(self) -> str:
        """The place of the file, for people: without user, password and query."""
        return without_credentials(self.url)

    @property
    def identity(self) -> dict[str, object]:
        """What a key may depend on."""
        return {"file": self.name, "size": self.size, "fingerprint": self.fingerprint}

    @property
    def facts(self) -> dict[str, object]:
        """What a report says about the corpus."""
        return {"corpus": self.label, **self.identity}

    def documents(self) -> Iterator[str]:
        """The documents in order, read as they are asked for. A plain text is one document, the file as it
        is.

        Raises:
            ValueError: not UTF-8, not JSON, or rows without text; names file and row.
            OSError: compressed data are cut off, or the storage fails.
        """
        filesystem, path = open_filesystem(self.url)
        try:
            with reaching(filesystem, path):
                match self.file_format:
                    case "text":
                        yield self._plain_text(filesystem, path)
                    case "json lines":
                        yield from self._json_lines(filesystem, path)
                    case "parquet":
                        yield from self._parquet_rows(filesystem, path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.label} is not UTF-8: byte {error.object[error.start]:#04x} ({error.reason}). "
                "Convert it, for example with iconv -f LATIN1 -t UTF-8."
            ) from None
        except (EOFError, BadGzipFile) as error:
            raise OSError(f"{self.label} is cut off or not compressed: {error} Copy it again.") from error

    def require_unchanged(self) -> None:
        """Refuse to use what was read if the file was replaced meanwhile: it would be stored under a stale
        key."""
        now = open_file(self.url)
        if now != self:
            raise OSError(
                f"{self.label} changed while it was in use, from {self.size} bytes ({self.fingerprint}) to "
                f"{now.size} bytes ({now.fingerprint}). Start the run again."
            )

    def _plain_text(self, filesystem: AbstractFileSystem, path: str) -> str:
        # newline="\n": line ends stay as they are. In text mode a CRLF file would become another text.
        with filesystem.open(path, "rt", compression="infer", encoding="utf-8", newline="\n") as file:
            text: str = file.read(TEXT_LIMIT + 1)  # one more, so that a cut is noticed
            return text

    def _json_lines(self, filesystem: AbstractFileSystem, path: str) -> Iterator[str]:
        with filesystem.open(path, "rt", compression="infer", encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{self.label}, row {number} is not JSON: {error}. Write one object on each line."
                    ) from None
                if not isinstance(row, dict):
                    raise ValueError(
                        f"{self.label}, row {number} holds {type(row).__name__}, not an object. "
                        f'Write each document as {{"{TEXT_FIELD}": "..."}} on a line of its own.'
                    )
                yield text_of(row, number, self.label)

    def _parquet_rows(self, filesystem: AbstractFileSystem, path: str) -> Iterator[str]:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            with filesystem.open(path, "rb") as file:
                table = ParquetFile(file)
                if TEXT_FIELD not in table.schema_arrow.names:
                    raise ValueError(missing_field(table.schema_arrow.names, self.label, "schema"))
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=[TEXT_FIELD]):
                    for row in batch.to_pylist():
                        number += 1
                        yield text_of(row, number, self.label)
        except ArrowInvalid as error:
            raise ValueError(
                f"{self.label} can't be read as Parquet: {error} Write it again, or give it its real suffix."
            ) from error


def open_file(url: str) -> FileCorpus:
    """Find a file and its fingerprint; a few MiB of it are read.

    Args:
        url: local path or fsspec URL that ends in ``.txt``, ``.raw``, ``.jsonl`` or ``.parquet``; ``.txt``,
            ``.raw`` and ``.jsonl`` may be compressed (``.gz``, ``.bz2``, ``.xz`` ...).

    Raises:
        ValueError: unknown format, a folder, a Git LFS pointer, or a storage that tells neither checksum nor
            time.
        FileNotFoundError: there is no such file.
    """
    file_format = format_of(url)
    label = without_credentials(url)
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache(path)  # a bucket may answer from an earlier listing, even for a replaced file
    try:
        require_target(filesystem, path)
        with reaching(filesystem, path):
            information = filesystem.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no corpus at {label}. Check the name, or use 'builtin'.") from None
    if information["type"] != "file":
        raise ValueError(f"{label} is a {information['type']}, not a file. Name one file of it.")
    state = file_state(filesystem, path)
    refuse_pointers(filesystem, {path: state.size}, {path: label})
    name = path.rstrip("/").rpartition("/")[2]
    return FileCorpus(name, state.size, fingerprint(filesystem, path, state), file_format, url)


def format_of(url: str) -> FileFormat:
    """The format that a file's name tells.

    Raises:
        ValueError: a name that tells none; lists the formats.
    """
    for segment in url.split("::"):  # simplecache::s3://bucket/a.txt and zip://a.txt::s3://bucket/b.zip
        path = segment.split("?")[0] if "://" in segment else segment
        compressed = infer_compression(path) is not None
        name = path.lower().rpartition(".")[0] if compressed else path.lower()
        for suffix, file_format in SUFFIXES.items():
            if name.endswith(suffix) and not (compressed and file_format == "parquet"):
                return file_format
    raise ValueError(
        f"{without_credentials(url)!r} is no corpus. Use 'builtin', 'hf:owner/name[/config][:split]', "
        f"'wikitext2', 'c4', 'ptb', or a path or URL that ends in one of {sorted(SUFFIXES)} (or in .txt.gz, .raw.gz, "
        ".jsonl.gz)."
    )


AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs say container@account, which is no secret


def without_credentials(url: str) -> str:
    """``url`` without user, password, query and fragment, in every link of a chained URL."""
    return "::".join(_without_credentials(link) for link in url.split("::"))


def _without_credentials(link: str) -> str:
    protocol, separator, rest = link.partition("://")
    if not separator:
        return link
    rest = rest.split("?")[0].split("#")[0]
    before, at, after = rest.rpartition("@")
    if protocol in AZURE and ":" not in before:
        return f"{protocol}://{rest}"
    # AWS secrets hold slashes, so a password may reach beyond the first one: cut at the last "@".
    if at and (":" in before or "/" not in before):
        rest = after
    return f"{protocol}://{rest}"
