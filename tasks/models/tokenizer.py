"""Open the tokenizer that came with a model, without running code that comes with it."""

import os
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from layerwise.tasks.sources.checkpoint_files import CONFIG, GENERATION_CONFIG
from layerwise.tasks.sources.model_config import short_reason

WHOLE = "tokenizer.json"  # the file that the tokenizers library reads by itself
SENTENCEPIECE_START = (
    b"\n"  # a protobuf message whose first field has a length; tiktoken's files are lines of text
)


def open_tokenizer(folder: str | os.PathLike, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder.

    Args:
        folder: holds the tokenizer's files and ``config.json``; the files may be links.
        name: what errors call the model.

    Raises:
        ValueError: no tokenizer, a damaged one, one that needs a package that is not installed, or one that needs code
            which comes with it.
    """
    files = sorted(path.name for path in Path(folder).iterdir())
    own = [file for file in files if file not in (CONFIG, GENERATION_CONFIG)]
    if not own:
        raise ValueError(
            f"{name} has no tokenizer (it has {', '.join(files) or 'no files'}). Copy tokenizer.json and "
            "tokenizer_config.json beside the weights and import again."
        )
    _require_packages(Path(folder), own, name)
    return _opened(folder, name, f"its files: {', '.join(own)}")


def open_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the metadata of a GGUF file.

    Raises:
        ValueError: none that transformers can open.
    """
    return _opened(path.parent, path.name, "read from the file's metadata", gguf_file=path.name)


def _opened(folder: str | os.PathLike, name: str, origin: str, **options: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, **options
        )
        tokenizer("text")  # some values are looked at only then
    except (
        BaseException
    ) as error:  # each file is foreign, and the libraries have many kinds of exceptions for that
        panicked = type(error).__name__ == "PanicException"  # of the tokenizers library: no Exception
        if isinstance(error, MemoryError) or not (isinstance(error, Exception) or panicked):
            raise
        own_code = "trust_remote_code" in str(error)
        reason = "it needs code that comes with it, which is never run" if own_code else short_reason(error)
        raise ValueError(
            f"{name} has no tokenizer that transformers can open ({reason}; {origin}). Copy tokenizer.json and "
            "tokenizer_config.json beside the weights, from where the model comes from, and import again."
        ) from error
    return tokenizer


def _require_packages(folder: Path, files: list[str], name: str) -> None:
    """Name the package that transformers needs for a tokenizer without ``tokenizer.json``; it tells of another one."""
    if WHOLE in files:
        return
    for file in files:
        if file.endswith(".model"):
            with (folder / file).open("rb") as opened:
                packages = ["sentencepiece"] if opened.read(1) == SENTENCEPIECE_START else ["tiktoken"]
            packages += ["protobuf"] if packages == ["sentencepiece"] else []
        elif file.endswith(".tiktoken"):
            packages = ["tiktoken"]
        else:
            continue
        modules = {"protobuf": "google.protobuf"}
        missing = [package for package in packages if not _is_installed(modules.get(package, package))]
        if missing:
            raise ValueError(
                f"the tokenizer of {name} is {file}, which transformers reads with packages that are not installed. "
                f"Install them (pip install {' '.join(missing)}), or copy a tokenizer.json beside the weights."
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
