"""What can go wrong for a user, as types. Every message says where (file, key, row, tier, step) and what to do.

Mistakes of ours are `assert`s; anything here is the user's, the data's or the machine's doing, and ends a
command with one clear sentence and the exit code of its class.
"""

from collections.abc import Sequence


class MedscaleError(Exception):
    """Base of all errors that a command reports as one sentence; `exit_code` is the process's."""

    exit_code = 1


class ConfigError(MedscaleError):
    """A job file is wrong; `problems` holds every mistake found, each with file, line and key."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class GraphError(MedscaleError):
    """A file of a graph, raw or prepared, cannot be used; names file and line, row group or row."""

    exit_code = 3


class CheckpointError(MedscaleError):
    """A checkpoint is damaged, missing, or belongs to another model."""

    exit_code = 4


class NonFiniteError(MedscaleError):
    """A loss or a gradient is NaN or infinite; names step, term and sub-model. Nothing was updated."""

    exit_code = 5


class RunLockedError(MedscaleError):
    """Another process writes to this run directory."""

    exit_code = 6


class CapacityError(MedscaleError):
    """The job cannot fit in memory or on disk; names the number that breaks it."""

    exit_code = 7


class ExportError(MedscaleError):
    """An exported tier is damaged, tampered with, of an unknown format, or asked for what it lacks."""

    exit_code = 8


class MissingShardError(ExportError):
    """A tier that was fetched in part is asked for a shard that is not here; `file` is what to fetch."""

    def __init__(self, message: str, file: str) -> None:
        self.file = file
        super().__init__(message)


class UnknownNameError(ExportError):
    """A tier is asked for an entity, a relation or a type that it does not know, by name or id."""


class TierChainError(ExportError):
    """Tiers do not go on top of one another: in the wrong order, of different runs, or not exported together."""


class DamagedTierError(ExportError):
    """A tier's files are missing, damaged, tampered with, or not what its manifest promises; names the file."""


class UnsupportedError(MedscaleError):
    """The machine, or the installed set of libraries, cannot do what the job asks."""

    exit_code = 9


class WorkerError(MedscaleError):
    """Another worker of the run died, hangs, or failed; this one cannot go on without it."""

    exit_code = 10
