"""What the user is told in one line. A module of its own: everything may import it."""

from __future__ import annotations


def reason(error: Exception) -> str:
    """Why something failed, in a line."""
    return getattr(error, "strerror", None) or str(error).strip().split("\n")[0] or type(error).__name__


def out_of_memory(error: Exception) -> str:
    """A few words on an error that means that memory is full, of a GPU or of the host; "" of any other error."""
    said = str(error)
    if "out of memory" in said:  # "CUDA out of memory. Tried to allocate …"
        return said.split("\n")[0].split(". ")[0]
    return "out of memory" if isinstance(error, MemoryError) or "can't allocate memory" in said else ""


class UserError(ValueError):
    """The user's mistake (a missing file, unusable data): one line, exit status 1."""

    status = 1

    def __init__(self, message: str):
        # A DataLoader hands on its worker's error with the worker's whole traceback as the message.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


class ConfigError(UserError):
    """A configuration that cannot be meant: one line, exit status 2."""

    status = 2
