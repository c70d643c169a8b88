"""What every layout of checkpoints answers, and what the layouts share."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from phasewatch.monitor.errors import PhasewatchError

_TRAINING_STATE = re.compile(
    r"(?<![a-z])(optim(izer)?s?|(lr_)?sched(uler)?s?|(grad_)?scaler|rng|random_states?|training_args|dataloaders?|"
    r"recipe_state|sampler|custom_checkpoint)(?![a-z])|^(train(er)?([-_]?state)?|opt\d*)$",
    re.I,
)


class Entry(NamedTuple):
    """One of the things in a folder that may be a checkpoint.

    Attributes:
        name: its name without suffix, or that of the git reference which points at it.
        path: the file or folder.
        within: the folder that no link may lead out of.
    """

    name: str
    path: Path
    within: Path | None


class Format(Protocol):
    """A layout of checkpoints. An instance has no state, so that it can be sent to another process."""

    def claims(self, path: Path) -> Path | None:
        """The file that is read for the weights of a file or folder, or None if it isn't of this layout."""
        ...

    def step(self, entry: Entry) -> int | None:
        """The step of an entry of this layout, from its metadata or else its name; None if neither has one.

        A `steps.Step` also tells what it counts.
        """
        ...

    def load(self, source: Path, within: Path | None) -> dict[str, Tensor]:
        """The tensors in a claimed file: contiguous copies on the CPU, without gradients, by the names in the file.

        Args:
            source: the file.
            within: the folder that no link may lead out of.

        Raises:
            PhasewatchError: if it can't be read or holds no weights.
        """
        ...


def is_training_state(name: str) -> bool:
    """Whether a name is that of an optimizer, scheduler or random state, which are no weights.

    Args:
        name: of a file without suffix, or a key in a file.
    """
    return _TRAINING_STATE.search(name) is not None


def is_weights_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a path is a regular file with one of the suffixes, neither hidden nor of training state.

    Args:
        path: any path.
        suffixes: in lower case.
    """
    if path.name.startswith(".") or not path.name.lower().endswith(suffixes) or not path.is_file():
        return False
    return not is_training_state(stem_of(path))


def stem_of(path: Path) -> str:
    """The name of a path without the suffix of a file: `a` of `a.pt` and of `a.pth.tar`; folders keep their name.

    Args:
        path: a file or folder.
    """
    if path.is_dir():
        return path.name
    return path.name[: -len(".pth.tar")] if path.name.lower().endswith(".pth.tar") else path.stem


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn whatever a damaged or foreign file makes its reader raise into a sentence.

    Args:
        file: that is read inside.

    Raises:
        PhasewatchError: instead of it.
    """
    try:
        yield
    except MemoryError:
        raise
    except PhasewatchError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise PhasewatchError(f"{file} is no longer there; put it back, or open the series again.") from error
        raise
    except OSError as error:
        raise PhasewatchError(f"{file} can't be read ({error.strerror or error}); check its permissions.") from error
    except Exception as error:
        raise PhasewatchError(
            f"{file} is empty, cut off, or not a checkpoint at all; copy it again, or move it out of the folder."
        ) from error


def some_tensors(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a file, of which there is at least one.

    Args:
        tensors: what was found.
        file: where.

    Raises:
        PhasewatchError: if there are none.
    """
    if not tensors:
        raise PhasewatchError(f"{file} holds no tensors; save model.state_dict() there, or move it out of the folder.")
    return tensors
