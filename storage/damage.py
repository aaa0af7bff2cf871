"""Damage: what was committed to a store is not there any more as it was written."""

from layerwise.storage.files.corrupt import Corrupt


class Damaged(Corrupt):
    """An artifact or a resume point is damaged; its key says which one, so that it can be built anew.

    Attributes:
        key: of the artifact, as in its manifest; a resume point's ends with the name of its file.
        token: of the manifest or resume point that was judged; "" for one that could not be read.
    """

    def __init__(self, message: str, key: str, token: str = "") -> None:
        super().__init__(message)
        self.key, self.token = key, token

    def __reduce__(self) -> tuple[type["Damaged"], tuple[str, str, str]]:  # type: ignore[override]
        return Damaged, (str(self), self.key, self.token)
