"""The licence of a model, read from the model card next to its files."""

import re
from dataclasses import dataclass

from layerwise.tasks.sources.folder import Folder

CARD = "README.md"  # the model card; its first lines are YAML
LONGEST_CARD = 4 << 20  # bytes; a longer file is not a model card
FRONT_MATTER = re.compile(r"\ufeff?---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
# Plain words only. Nothing else of the YAML in a foreign card is read.
ENTRY = re.compile(r"""^(license(?:_name|_link)?):[ ]*["']?([^\r\n"'\[\]#]+?)["']?[ ]*\r?$""", re.MULTILINE)


@dataclass(frozen=True)
class License:
    """A licence, in the terms of model cards.

    Attributes:
        identifier: such as "apache-2.0" or "llama2"; "other" if the hub has no identifier for it.
        name: name of an "other" licence.
        link: URL of the text.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """Name for people."""
        return self.name or self.identifier

    @property
    def facts(self) -> dict[str, str]:
        """The licence as facts of an artifact; ``License(**facts)`` restores it."""
        return {name: value for name, value in vars(self).items() if value is not None}


def license_of_folder(folder: Folder) -> License | None:
    """Read the licence from the model card in ``folder``; None if there is no card or it names no licence."""
    if CARD not in folder.files or folder.files[CARD].size > LONGEST_CARD:
        return None
    return license_of_card(folder.read(CARD).decode(errors="replace"))


def license_of_card(text: str) -> License | None:
    """Read the licence from the YAML of a model card; None if it names no licence, or several."""
    yaml = FRONT_MATTER.match(text)
    entries = dict(ENTRY.findall(yaml[1])) if yaml else {}
    if "license" not in entries:
        return None
    link = entries.get("license_link", "")
    # Licence files of the source are not copied, so relative links to them would be broken.
    return License(
        entries["license"], entries.get("license_name"), link if link.startswith("https://") else None
    )
