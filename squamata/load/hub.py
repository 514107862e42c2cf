"""Where a model is: a local folder, the bundled model, or a name on the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from squamata.errors import SquamataError
from squamata.text import check_name

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SMALL_FILES = ["*.json", "*.model"]
_SAFETENSORS = ["model*.safetensors"]
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_PICKLES = ["pytorch_model*.bin", "*/mp_rank_*/model_optim_rng.pt"]
_HUB_ERRORS: tuple[
    type[Exception], ...
] = (  # the client has no common base; its HTTP library's, which differs by version, is among them
    OSError,
    *(value for value in vars(hub_errors).values() if isinstance(value, type) and issubclass(value, Exception)),
)


def bundled() -> Path:
    """Folder of the 5-million-parameter Mamba-2 that comes with the package."""
    return Path(__file__).parent.parent / "assets" / "mamba2-5m"


def calibration_of(path_or_name: str | Path, given: str | Path | None) -> str | Path | None:
    """The calibration text of a model: the one given, or else the one that comes with the bundled model."""
    if given is None and path_or_name == "bundled" and resolve(path_or_name) == bundled():
        return bundled() / "calibration.jsonl"
    return given


def resolve(path_or_name: str | Path) -> Path:
    """Return the local folder of a model, fetching it from the hub if ``path_or_name`` is a hub name.

    A local path is never taken for a hub name. Local is: a ``Path`` object; anything that exists; anything that
    starts with ``.``, ``~`` or ``/`` or ends with ``/``; and anything whose first folder exists. The word ``bundled``
    is the model that comes with the package. Only ``owner/name`` is left for the hub. SquamataError if there is none.
    """
    if not str(path_or_name):
        raise SquamataError("the name of the model is empty; give a folder, a hub name or 'bundled'")
    check_name(path_or_name)
    path = Path(os.path.expanduser(path_or_name))
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that no file can have
        return path
    if os.path.exists(path):
        raise SquamataError(f"{path_or_name}: is a file; give the folder that holds config.json and the weights")
    if path_or_name == "bundled":
        return bundled()
    if isinstance(path_or_name, Path) or not _HUB_NAME.fullmatch(path_or_name):
        raise SquamataError(f"{path_or_name}: no such folder (hub names are OWNER/NAME; 'bundled' is always there)")
    if os.path.isdir(path.parent):
        raise SquamataError(
            f"{path_or_name}: no such folder (not taken for a hub name, because the folder '{path.parent}' exists here)"
        )
    return _fetch(path_or_name)


def _fetch(name: str) -> Path:
    """Download what is not in the hub's local cache yet; pickled weights only where there are no safetensors."""
    try:
        folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES + _SAFETENSORS))
        if not any(folder.glob(_SAFETENSORS[0])):
            folder = Path(snapshot_download(name, allow_patterns=_SMALL_FILES + _PICKLES))
    except (RepositoryNotFoundError, HFValidationError):
        raise SquamataError(
            f"{name}: no such folder here, and no such public model on the hub (a private one needs 'hf auth login')"
        ) from None
    except HfHubHTTPError as error:
        raise SquamataError(f"{name}: the hub answered '{_first_line(error)}'; try again later") from None
    except _HUB_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise SquamataError(f"{name}: cannot be stored in the hub's cache ({error.strerror})") from None
        raise SquamataError(
            f"{name}: no such folder here, and the hub could not be reached ({_first_line(error)}); "
            f"a local folder works too"
        ) from None
    return folder


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
