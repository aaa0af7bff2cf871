"""What is raised when stored bytes are wrong."""

import errno


class Corrupt(OSError):
    """Stored bytes are not the bytes that were written. A storage that fails is ``Unreachable`` instead."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type["Corrupt"], tuple[str]]:
        return Corrupt, (str(self),)  # OSError would be unpickled with two arguments


class Missing(Corrupt):
    """A file that should be there is not.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is missing")
        self.path = path

    def __reduce__(self) -> tuple[type["Missing"], tuple[str]]:
        return Missing, (self.path,)


class Removed(Corrupt):
    """A file that this process wrote for an artifact was deleted by another one before the artifact was committed.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} was deleted while the artifact was being built")
        self.path = path

    def __reduce__(self) -> tuple[type["Removed"], tuple[str]]:
        return Removed, (self.path,)
