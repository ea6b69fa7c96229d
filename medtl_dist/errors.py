"""The errors a user can cause; every class carries the exit code of DESIGN's table and survives pickling.

An error is one message: what was given, what was expected, what to do next. The command line prints it
and exits with ``exit_code``; only an exception that is not a ``MedtlError`` (a bug) shows a traceback.
"""

from __future__ import annotations


class MedtlError(Exception):
    """Base of all expected errors. Takes exactly one message, so pickling and Ray keep it whole."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        return str(self.args[0])


class UserError(MedtlError):
    """The user's mistake: a bad option, table, config or file. Exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A config key or value that the typed tree refuses. Exit code 2."""


class DataError(MedtlError):
    """Data that is damaged or missing: a truncated shard, a checksum that differs. Exit code 3."""

    exit_code = 3


class LeakageError(MedtlError):
    """The same patient or image on both sides of a split. Exit code 4."""

    exit_code = 4


class TrainingError(MedtlError):
    """Training cannot go on, retries exhausted included. Exit code 5."""

    exit_code = 5


class Interrupted(MedtlError):
    """Stopped by preemption or infrastructure; the same command goes on from the last checkpoint. Exit code 75."""

    exit_code = 75


BY_NAME: dict[str, type[MedtlError]] = {
    cls.__name__: cls
    for cls in (MedtlError, UserError, ConfigError, DataError, LeakageError, TrainingError, Interrupted)
}
