"""A corpus in one file, at any fsspec URL: plain text, JSON lines, a JSON array or Parquet."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from gzip import BadGzipFile
from importlib import import_module
from io import TextIOWrapper
from lzma import LZMAError
from typing import IO, Any, Literal
from zipfile import BadZipFile
from zlib import error as ZlibError

from fsspec import AbstractFileSystem
from fsspec.utils import infer_compression

from layerwise.storage.files.credentials import without_credentials
from layerwise.storage.files.errors import Corrupt, reaching
from layerwise.storage.files.filesystem import is_local, open_filesystem
from layerwise.storage.formats.large_file_pointer import refuse_pointers
from layerwise.tasks.sources.file_identity import fingerprints, require_target, state_of_entry
from layerwise.tasks.texts.documents import TEXT_FIELD, TEXT_LIMIT, Corpus, Document
from layerwise.tasks.texts.rows import document_of, fields_of_document
from layerwise.tasks.texts.text_mix import mix_hint

FileFormat = Literal["text", "json lines", "json", "parquet"]
SUFFIXES: dict[str, FileFormat] = {
    ".txt": "text",
    ".raw": "text",
    ".jsonl": "json lines",
    ".json": "json",  # JSON lines (as C4) or one array
    ".parquet": "parquet",
}
# Maximum length of an array, in characters: it is parsed as a whole, which takes several times its size in memory.
ARRAY_LIMIT = 256 * 2**20
# Local texts up to this many bytes are fingerprinted completely. A sample would miss a changed word, and times do not
# help: two files whose owner was changed by one command have equal times.
WHOLE_TEXT = 64 << 20
ZSTANDARD = ".zst"
# Exceptions of the decompressors for damaged data.
DAMAGED = (EOFError, BadGzipFile, BadZipFile, LZMAError, ZlibError)


@dataclass(frozen=True)
class FileCorpus(Corpus):
    """One file of text. Its identity is its name, size and fingerprint, but not its location.

    Attributes:
        size: in bytes.
        url: path or URL that opens the file; may contain credentials.
    """

    name: str
    size: int
    fingerprint: str
    file_format: FileFormat = field(compare=False)
    url: str = field(compare=False, repr=False)

    @property
    def label(self) -> str:
        return without_credentials(self.url)

    @property
    def identity(self) -> dict[str, object]:
        return {"file": self.name, "size": self.size, "fingerprint": self.fingerprint}

    def documents(self) -> Iterator[Document]:
        """Yield the documents in order. A plain text is one document: the unchanged file.

        Raises:
            ValueError: the file is not UTF-8 or not JSON, or a row has no document; names file and row.
            OSError: compressed data are cut off, or the storage fails.
        """
        filesystem, path = open_filesystem(self.url)
        try:
            with reaching(filesystem, path), self._naming_damage():
                match self.file_format:
                    case "text":
                        yield self._plain_text(filesystem, path)
                    case "json lines" | "json":
                        yield from self._json_rows(filesystem, path)
                    case "parquet":
                        yield from self._parquet_rows(filesystem, path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.label} is not valid UTF-8: byte {error.object[error.start]:#04x} ({error.reason}). "
                "Convert it, for example with iconv -f LATIN1 -t UTF-8."
            ) from None

    def require_unchanged(self) -> None:
        now = open_file(self.url)
        if now != self:
            raise OSError(
                f"{self.label} changed while it was in use, from {self.size} bytes ({self.fingerprint}) to "
                f"{now.size} bytes ({now.fingerprint}). Start the run again."
            )

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # bz2 raises a plain OSError. The package for Zstandard is imported only if it is needed.
            of_bz2, of_zstandard = str(error) == "Invalid data stream", type(error).__name__ == "ZstdError"
            if not (isinstance(error, DAMAGED) or of_bz2 or of_zstandard):
                raise
            raise Corrupt(
                f"{self.label} is cut off, damaged, or not compressed as its name says: {error}. Copy it again."
            ) from error

    def _open_text(self, filesystem: AbstractFileSystem, path: str) -> IO[str]:
        # newline="\n" keeps line ends. By default, CRLF would be changed.
        if path.lower().endswith(ZSTANDARD):
            # Without fsspec: with some packages it stops after the first frame, or accepts a file that is cut off.
            zstd = require_zstandard(self.label)
            long_windows = {zstd.DecompressionParameter.window_log_max: 31}
            raw = filesystem.open(path, "rb")
            return TextIOWrapper(zstd.ZstdFile(raw, options=long_windows), encoding="utf-8", newline="\n")
        file: IO[str] = filesystem.open(path, "rt", compression="infer", encoding="utf-8", newline="\n")
        return file

    def _plain_text(self, filesystem: AbstractFileSystem, path: str) -> str:
        with self._open_text(filesystem, path) as file:
            return file.read(TEXT_LIMIT + 1)  # the extra character shows that the text is truncated

    def _json_rows(self, filesystem: AbstractFileSystem, path: str) -> Iterator[Document]:
        with self._open_text(filesystem, path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                if number == 1 and self.file_format == "json" and line.lstrip().startswith("["):
                    yield from self._array(line + file.read(ARRAY_LIMIT + 1))
                    return
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ValueError(
                        f"{self.label}, row {number} is not valid JSON: {error}. Write one object on each line"
                        f"{', or one array of objects' if self.file_format == 'json' else ''}."
                    ) from None
                yield self._document_of(row, number)

    def _array(self, content: str) -> Iterator[Document]:
        """Yield the documents of a file that is one array."""
        if len(content) > ARRAY_LIMIT:
            raise ValueError(
                f"{self.label} is one array of more than {ARRAY_LIMIT} characters, too large to be parsed as a whole. "
                f"Write one object on each line (jq -c '.[]' {self.name} > documents.jsonl)."
            )
        try:
            rows = json.loads(content)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{self.label} is not valid JSON: {error}. Write one array of objects, or one object on each line."
            ) from None
        for number, row in enumerate(rows, start=1):
            yield self._document_of(row, number)

    def _document_of(self, row: object, number: int) -> Document:
        if not isinstance(row, dict):
            raise ValueError(
                f"{self.label}, row {number} holds {type(row).__name__}, not an object. "
                f'Write each document as {{"{TEXT_FIELD}": "..."}} on its own line.'
            )
        return document_of(row, number, self.label)

    def _parquet_rows(self, filesystem: AbstractFileSystem, path: str) -> Iterator[Document]:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            with filesystem.open(path, "rb") as file:
                table = ParquetFile(file)
                columns = fields_of_document(table.schema_arrow.names, f"{self.label}, schema")
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=list(columns)):
                    for row in batch.to_pylist():
                        number += 1
                        yield document_of(row, number, self.label)
        except ArrowInvalid as error:
            raise ValueError(
                f"{self.label} cannot be read as Parquet: {error} Write it again, or correct its suffix."
            ) from error


def open_file(url: str) -> FileCorpus:
    """Find a file and its fingerprint, see ``listed_files``.

    Args:
        url: local path or fsspec URL that ends in one of ``SUFFIXES``. All formats except Parquet may be compressed
            (``.gz``, ``.bz2``, ``.xz``, ``.zst`` ...).

    Raises:
        ValueError: the format is unknown, the path is not a file, the file is a Git LFS pointer, or the storage reports
            neither a checksum nor a time.
        FileNotFoundError: there is no such file.
        ImportError: the compression needs a package that is not installed.
    """
    format_of(url)  # refuse an unknown format before a missing file
    label = without_credentials(url)
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache(path)  # a cached listing would hide a replaced file
    try:
        require_target(filesystem, path)
        with reaching(filesystem, path):
            information = filesystem.info(path)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no corpus at {label}. Check the name, or use 'builtin'.{mix_hint(url)}"
        ) from None
    if information["type"] != "file":
        raise ValueError(f"{label} is a {information['type']}, not a file. Give one of its files.")
    return listed_files(filesystem, {path: (url, information)})[0]


def listed_files(
    filesystem: AbstractFileSystem, listed: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> tuple[FileCorpus, ...]:
    """Fingerprint the files of a listing.

    Local files of up to ``WHOLE_TEXT`` bytes in total are read completely; of other files a few MiB are read.

    Args:
        listed: URL that opens the file and the file system's entry of it, by path.

    Raises:
        ValueError: a format is unknown, a file is a Git LFS pointer, or the storage reports neither a checksum nor a
            time.
        ImportError: a compression needs a package that is not installed.
    """
    formats = {path: format_of(url) for path, (url, _) in listed.items()}
    labels = {path: without_credentials(url) for path, (url, _) in listed.items()}
    for path, label in labels.items():
        if path.lower().endswith(ZSTANDARD):
            require_zstandard(label)
    states = {path: state_of_entry(filesystem, entry) for path, (_, entry) in listed.items()}
    refuse_pointers(filesystem, {path: state.size for path, state in states.items()}, labels)
    small = is_local(filesystem) and sum(state.size for state in states.values()) <= WHOLE_TEXT
    found = fingerprints(filesystem, states, whole=states if small else ())
    return tuple(
        FileCorpus(path.rstrip("/").rpartition("/")[2], states[path].size, found[path], formats[path], url)
        for path, (url, _) in listed.items()
    )


def format_of(url: str) -> FileFormat:
    """Return the format that belongs to the suffix of a file.

    Raises:
        ValueError: the suffix is unknown; lists the formats.
    """
    file_format = known_format(url)
    if file_format is None:
        raise ValueError(
            f"{without_credentials(url)!r} is not a corpus. Use 'builtin', 'hf:owner/name[/config][:split]', "
            "'wikitext2', 'c4', 'ptb', a path or URL that ends in one of "
            f"{sorted(SUFFIXES)} (or in .txt.gz, .jsonl.gz, .json.gz, ...), a folder of such files, or a pattern such "
            f"as 'data/*.jsonl.gz'.{mix_hint(url)}"
        )
    return file_format


def known_format(url: str) -> FileFormat | None:
    """Return the format that belongs to the suffix of a file; None if the suffix is unknown."""
    for segment in url.split("::"):  # simplecache::s3://bucket/a.txt and zip://a.txt::s3://bucket/b.zip
        path = (segment.split("?")[0] if "://" in segment else segment).lower()
        compressed = infer_compression(path) is not None or path.endswith(ZSTANDARD)
        name = path.rpartition(".")[0] if compressed else path
        for suffix, file_format in SUFFIXES.items():
            if name.endswith(suffix) and not (compressed and file_format == "parquet"):
                return file_format
    return None


def require_zstandard(label: str) -> Any:
    """Import the module for Zstandard: Python's own from 3.14 on, its backport before that.

    Raises:
        ImportError: the backport is not installed.
    """
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ImportError(
        f"{label} is compressed with Zstandard, which needs a package that is not installed. "
        "Run pip install backports.zstd."
    )
