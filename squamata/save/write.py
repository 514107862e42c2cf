"""Write a checkpoint: part by part into a temporary folder beside the target, which is renamed at the end."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from squamata.errors import SquamataError
from squamata.kernels.partition import Partition
from squamata.kernels.qtensor import QTensor, Value
from squamata.models.checkpoint import Checkpoint
from squamata.models.config import ModelConfig
from squamata.models.lm import model_layouts
from squamata.save.format import CONFIG, INDEX, TOKENIZER_FILES, describe, scale_name, sparse_names
from squamata.save.parts import LOCK, PartFiles, read_progress
from squamata.text import check_name

SHARD_BYTES = 2**30


class CheckpointWriter:
    """Takes tensors as they become ready and publishes the folder only when all are there.

    Use as a context manager and end with ``publish``: leaving it without removes the temporary folder, unless parts in
    it can be gone on with and nothing is wrong with what they are made of (an interruption, a full disk). A killed
    process leaves the old checkpoint or none; the next writer to the same place clears what it left (what no living
    writer has locked), and puts an old checkpoint back that was being replaced. ``force`` replaces a checkpoint or an
    empty folder, nothing else.

    ``resume``: what becomes of parts that a dead or interrupted writer finished. True: go on with those of the same
    ``work`` (``parts.count`` of them; start anew if there are none), SquamataError if all are of other work; False:
    throw them away; None: SquamataError that says they are there. ``work``: fingerprint of everything that decides
    the result.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
        work: str = "",
        resume: bool | None = None,
    ) -> None:
        self.folder = _real(folder)
        self.force, self.resume = force, resume
        self.own = secrets.token_hex(8)
        self.layouts = model_layouts(config)
        self.shard_bytes = shard_bytes
        self.parts = PartFiles(self.partial, work)
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.bytes = 0
        self.kept = False  # whatever happens, what is finished

    @property
    def partial(self) -> Path:
        return self._named("partial", self.own)

    @property
    def replaced(self) -> Path:
        return self._named("replaced", self.own)

    def __enter__(self) -> CheckpointWriter:
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with _alone_in(self.folder.parent):
                refuse_to_forget(self.folder, self.resume)
                self._clear_left_overs()
                refuse_to_replace(self.folder, self.force)
                self.partial.mkdir(exist_ok=True)
                self.lock = os.open(self.partial / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
                _try_lock(self.lock)
        except OSError as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise SquamataError(f"cannot write to {self.folder.parent}: {_reason(error)}") from None
        self.parts.folder = self.partial
        if self.resume and not self.parts.recover():
            os.close(self.lock)
            raise SquamataError(f"{self.partial}: what an interrupted run left is damaged: --no-resume throws it away")
        return self

    def _named(self, what: str, writer: str) -> Path:
        return _left_by(self.folder, what, writer)

    def _clear_left_overs(self) -> None:
        """Put an old checkpoint back that a dead writer was replacing, and remove what else dead writers left."""
        writers = _writers(self.folder)
        if self.resume:
            self._refuse_other_work(writers)
        furthest = 0
        for writer in writers:
            partial, replaced = self._named("partial", writer), self._named("replaced", writer)
            if _is_live(partial):
                continue
            if replaced.is_dir() and not self.folder.exists():
                try:
                    replaced.rename(self.folder)
                except OSError:  # another user's: it stays where it is
                    continue
            shutil.rmtree(replaced, ignore_errors=True)
            found = read_progress(partial) if self.resume else None
            if found is not None and found["work"] == self.parts.work and found["parts"] > furthest:
                furthest, partial, self.own = found["parts"], self.partial, writer
            shutil.rmtree(partial, ignore_errors=True)

    def _refuse_other_work(self, writers: list[str]) -> None:
        left = [self._named("partial", writer) for writer in writers]
        found = [what for path in left if not _is_live(path) and (what := read_progress(path)) is not None]
        if found and all(what["work"] != self.parts.work for what in found):
            raise SquamataError(
                f"{self.folder}: what an interrupted run left was made with other arguments, of another model or by "
                f"another version: repeat its own, or start anew with --no-resume, which throws it away"
            )

    def add(
        self,
        tensors: Mapping[str, Value],
        state: Mapping[str, Tensor] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the next part: tensors under their full names, and what its maker needs to go on after it.

        ``state`` None: whatever happens, nobody goes on with this part.
        """
        stored: dict[str, Tensor] = {}
        for name, value in tensors.items():
            stored |= self._stored(name, value)
        try:
            self.parts.finish(stored, state, record or {})
        except (OSError, safetensors.SafetensorError) as error:
            raise self._cannot_write(error) from None

    def _stored(self, name: str, value: Value) -> dict[str, Tensor]:
        if not isinstance(value, QTensor):
            return {name: value.contiguous().cpu()}
        partition = Partition(value.spec.granularity, self.layouts[name])
        stored = {name: value.data.contiguous().cpu()}
        if value.spec.tabulated:
            return stored | _table(name, value)
        scale = value.scale.cpu()
        if not value.spec.kept_channels:
            scale = scale.reshape(-1)[_representatives(partition)].reshape(partition.shape())
        stored[f"{name}.scale"] = scale.to(getattr(torch, value.spec.scale_dtype)).contiguous()
        if value.second is not None:
            second = value.second.cpu().reshape(-1)
            if not value.spec.second_level:
                second = second[_representatives(partition)].reshape(partition.shape())
            stored[f"{name}.{value.spec.second}"] = second
        return stored

    def _flush(self) -> None:
        path = self.partial / f"shard-{len(self.shards)}.safetensors"
        try:
            safetensors.torch.save_file(self.pending, path, metadata={"format": "pt"})
            path.chmod(os.fstat(self.lock).st_mode & 0o777)  # safetensors writes 0600, the umask says otherwise
        except (OSError, safetensors.SafetensorError) as error:
            raise self._cannot_write(error) from None
        self.bytes += sum(tensor.nbytes for tensor in self.pending.values())
        self.shards.append(list(self.pending))
        self.pending = {}

    def publish(self, description: Mapping[str, Any], tokenizer_folder: Path | None) -> None:
        """Write config, index and tokenizer, and rename the folder into place. The parts go last, so that nothing that
        goes wrong before costs them.
        """
        self._refuse_late()
        self._join_parts()
        try:
            self._name_shards()
            (self.partial / CONFIG).write_text(json.dumps(description, indent=1) + "\n")
            for name in TOKENIZER_FILES if tokenizer_folder else ():
                assert tokenizer_folder is not None
                if (tokenizer_folder / name).is_file():
                    shutil.copyfile(tokenizer_folder / name, self.partial / name)
            for path in set(self.partial.iterdir()) - set(self.parts.files()):
                _sync(path)
            self._replace()
        except OSError as error:
            raise self._cannot_write(error) from None

    def _refuse_late(self) -> None:
        """The folder may have been made meanwhile."""
        try:
            refuse_to_replace(self.folder, self.force)
        except SquamataError as error:
            raise SquamataError(f"{error}{self._keep()}") from None

    def _cannot_write(self, error: Exception) -> SquamataError:
        """What is said of a full disk or the like."""
        return SquamataError(f"cannot write {self.folder}: {_reason(error)}{self._keep() or '; nothing was changed'}")

    def _keep(self) -> str:
        """Keep what is finished, if somebody can go on with it, and say so."""
        self.kept = read_progress(self.partial) is not None
        return "; finished parts are kept, and --resume goes on with them" if self.kept else ""

    def _join_parts(self) -> None:
        """Parts -> shards: a new one wherever ``shard_bytes`` are full."""
        for tensors in self.parts.each():
            self.pending |= tensors
            if sum(tensor.nbytes for tensor in self.pending.values()) >= self.shard_bytes:
                self._flush()
        if self.pending or not self.shards:
            self._flush()

    def _name_shards(self) -> None:
        count = len(self.shards)
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        names = ["model.safetensors"] if count == 1 else names
        for number, name in enumerate(names):
            (self.partial / f"shard-{number}.safetensors").rename(self.partial / name)
        if count > 1:
            where = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(where.items()))}
            (self.partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")

    def _replace(self) -> None:
        with _alone_in(self.folder.parent):
            self._refuse_late()
            self.parts.clear()
            (self.partial / LOCK).unlink()
            _sync_folder(self.partial)
            try:
                if self.folder.exists():
                    self.folder.rename(self.replaced)
                self.partial.rename(self.folder)
            except BaseException:
                if self.replaced.exists():
                    self.replaced.rename(self.folder)
                raise
            _sync_folder(self.folder.parent)
            if self.replaced.exists():
                self.replaced.rename(self.partial)  # now it is rubbish, which nobody puts back

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        at_fault = kind is None or issubclass(kind, SquamataError)  # made of what must be put right first
        if (at_fault and not self.kept) or read_progress(self.partial) is None:
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self.lock)


def write_checkpoint(checkpoint: Checkpoint, folder: Path, force: bool = False) -> int:
    """Write a whole checkpoint at once; returns the bytes of its tensors."""
    with CheckpointWriter(folder, checkpoint.config, force) as writer:
        writer.add({**checkpoint.tensors, **checkpoint.site_tensors})
        description = describe(checkpoint.config, checkpoint.recipe.to_mapping(), checkpoint.provenance)
        writer.publish(description, checkpoint.folder)
        return writer.bytes


def check_target(folder: Path, force: bool = False, resume: bool | None = None) -> None:
    """Refuse a folder that a writer with these arguments would not write to; SquamataError says why."""
    refuse_to_forget(_real(folder), resume)
    refuse_to_replace(_real(folder), force)


def refuse_to_forget(folder: Path, resume: bool | None) -> None:
    """SquamataError if there are finished parts of a folder, and nobody has said what is to become of them."""
    if resume is None and (parts := parts_left(folder)):
        raise SquamataError(
            f"{folder}: an interrupted run has finished {parts} {'part' if parts == 1 else 'parts'} of it: --resume "
            f"goes on with them, --no-resume throws them away"
        )


def refuse_to_replace(folder: Path, force: bool) -> None:
    """SquamataError for a folder that exists, unless ``force`` is given and it is empty or a checkpoint of ours."""
    if not os.path.lexists(folder):
        return
    if not _replaceable(folder):
        raise SquamataError(
            f"{folder} exists and is no checkpoint, and --force replaces nothing else; choose another folder"
        )
    if not force:
        raise SquamataError(f"{folder} exists already; choose another folder or add --force to replace it")


def parts_left(folder: Path) -> int:
    """How many parts of a checkpoint that was to become ``folder`` a dead or interrupted writer left finished."""
    folder = _real(folder)
    left = [path for writer in _writers(folder) if not _is_live(path := _left_by(folder, "partial", writer))]
    return max((found["parts"] for path in left if (found := read_progress(path)) is not None), default=0)


def _real(folder: Path) -> Path:
    """The folder that a link names: it is replaced, not the link. SquamataError for a name that is not UTF-8."""
    check_name(folder)
    return Path(os.path.realpath(folder))


def _left_by(folder: Path, what: str, writer: str) -> Path:
    """Where a writer has what becomes the folder (``partial``), or what that replaces (``replaced``)."""
    return folder.parent / f".{folder.name}.{what}-{writer}"


def _writers(folder: Path) -> list[str]:
    """Names of the writers of a folder that left something beside it."""
    if not folder.parent.is_dir():  # nobody has got so far
        return []
    pattern = re.compile(re.escape(f".{folder.name}.") + "(?:partial|replaced)-([0-9a-f]+)")
    return sorted({match[1] for path in folder.parent.iterdir() if (match := pattern.fullmatch(path.name))})


def _table(name: str, value: QTensor) -> dict[str, Tensor]:
    """Tables of the rows, and the sparse part if there is one, of a weight."""
    stored = {scale_name(name, value.spec): value.scale.cpu().to(getattr(torch, value.spec.scale_dtype)).contiguous()}
    if (sparse := value.sparse) is not None:
        parts = (sparse.pointers, sparse.columns, sparse.values)
        stored |= {part: tensor.cpu() for part, tensor in zip(sparse_names(name), parts, strict=True)}
    return stored


def _representatives(partition: Partition) -> Tensor:
    """Where in an expanded scale each stored scale is found: the first element of its group."""
    count = torch.Size(partition.shape()).numel()
    numbers = partition.expand(torch.arange(count).reshape(partition.shape())).reshape(-1)
    first = torch.full((count,), len(numbers)).scatter_reduce(0, numbers, torch.arange(len(numbers)), "amin")
    return first


def _replaceable(folder: Path) -> bool:
    """True for a folder that is empty or holds a checkpoint of ours."""
    if not folder.is_dir():
        return False
    config = folder / CONFIG
    return not any(folder.iterdir()) or (config.is_file() and b'"squamata_format"' in config.read_bytes())


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Only one writer at a time looks for left-overs in a folder, or renames there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems have no locks: then left-overs count as live, see _is_live
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_live(partial: Path) -> bool:
    """Whether the writer of a temporary folder may still run: its lock cannot be taken."""
    try:
        descriptor = os.open(partial / LOCK, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder; its files are synced
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).splitlines()[0]
