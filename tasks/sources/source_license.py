"""The licence of a model, as far as the files that it comes with tell it."""

import re
from dataclasses import dataclass

from layerwise.tasks.sources.folder import Folder

CARD = "README.md"  # of a model: its first lines are YAML
LONGEST_CARD = 4 << 20  # bytes; what is longer is no model card
FRONT_MATTER = re.compile(r"\ufeff?---\r?\n(.*?)^---", re.DOTALL | re.MULTILINE)
# Plain words only: whatever else the YAML of a foreign card holds is not looked at.
ENTRY = re.compile(r"""^(license(?:_name|_link)?):[ ]*["']?([^\r\n"'\[\]#]+?)["']?[ ]*\r?$""", re.MULTILINE)


@dataclass(frozen=True)
class License:
    """A licence as model cards name it.

    Attributes:
        identifier: such as "apache-2.0" or "llama2"; "other" for one that the hub has no identifier for.
        name: of an "other" one.
        link: URL of its text.
    """

    identifier: str
    name: str | None = None
    link: str | None = None

    @property
    def title(self) -> str:
        """What people call it."""
        return self.name or self.identifier

    @property
    def facts(self) -> dict[str, str]:
        """The licence as a fact of an artifact; ``License(**facts)`` is the licence again."""
        return {name: value for name, value in vars(self).items() if value is not None}


def license_of_folder(folder: Folder) -> License | None:
    """What the model card in ``folder`` says; None without a card, or if the card does not tell."""
    if CARD not in folder.files or folder.files[CARD].size > LONGEST_CARD:
        return None
    return license_of_card(folder.read(CARD).decode(errors="replace"))


def license_of_card(text: str) -> License | None:
    """What a model card says in its YAML; None if it does not tell, or tells several."""
    yaml = FRONT_MATTER.match(text)
    entries = dict(ENTRY.findall(yaml[1])) if yaml else {}
    if "license" not in entries:
        return None
    link = entries.get("license_link", "")
    # A file of the source is not passed on, and a link to it would lead nowhere.
    return License(
        entries["license"], entries.get("license_name"), link if link.startswith("https://") else None
    )
