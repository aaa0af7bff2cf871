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
