"""A folder in which files appear whole or not at all, on this machine or wherever fsspec reaches."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from lightning_unlearn.files import free_name

__all__ = ["Folder"]


class Folder:
    """A folder that may not exist yet.

    Args:
        url: a path, or an address such as ``s3://bucket/run`` whose file system is installed.

    Example:
        >>> from lightning_unlearn.folder import Folder
        >>> folder = Folder("memory://doctest")
        >>> with folder.whole("a.txt") as partial:
        ...     folder.fs.pipe(partial, b"all of it")
        >>> folder.free("a.txt"), folder.fs.cat(folder.path("a.txt"))
        ('a-v1.txt', b'all of it')
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.path.expanduser(os.fspath(url))  # as fsspec does; what reads a path later may not
        self.fs = url_to_fs(self.url)[0]

    def path(self, name: str) -> str:
        """A file of this folder, as the folder is addressed."""
        return os.path.join(self.url, name)

    def free(self, name: str) -> str:
        """The name itself, or the first of ``name-v1.ext``, ``name-v2.ext``, … that is not taken."""
        return free_name(name, lambda name: self.fs.lexists(self.path(name)))

    @contextmanager
    def whole(self, name: str) -> Iterator[str]:
        """Let the ``with`` block write to a hidden name, and give the file its own name when the block is done.

        Elsewhere than on a local disk that is a copy, which object stores make whole, too. After an exception nothing
        is left.

        Yields:
            Where to write.

        Raises:
            OSError: if the file system refused or was full, or somebody else has written a file of that name meanwhile.
        """
        partial = self.path(f".{name}.{secrets.token_hex(4)}.partial")  # others may write the same name
        try:
            self.fs.makedirs(self.url, exist_ok=True)
            yield partial
            if self.fs.lexists(self.path(name)):
                raise FileExistsError("it exists by now, written by somebody else; try again")
            self.fs.mv(partial, self.path(name))
        except OSError as error:
            raise OSError(
                f"output_dir: {self.path(name)!r} could not be written, and nothing of it is left there "
                f"({type(error).__name__}: {error})."
            ) from error
        finally:
            if self.fs.exists(partial):
                self.fs.rm(partial)

    def local(self) -> Path:
        """The folder as a path, for what can write nowhere else.

        Raises:
            ValueError: if it is not on this machine.
        """
        if not isinstance(self.fs, LocalFileSystem):
            raise ValueError(
                f"output-dir: {self.url!r} is not on this machine, and this command writes nowhere else; name a folder "
                "here."
            )
        return Path(self.fs._strip_protocol(self.url) if "://" in self.url else self.url)

    def refuse_used(self) -> None:
        """Make sure that nothing of the user's can be overwritten.

        Lightning's logs are not in the way: a run that failed leaves them, and the next has a version of its own there.

        Raises:
            FileExistsError: if it is a file or holds anything else.
        """
        if self.fs.exists(self.url) and (not self.fs.isdir(self.url) or self._others_than("lightning_logs")):
            raise FileExistsError(f"output-dir: {self.url!r} exists and is not an empty folder; name a new one.")

    def _others_than(self, name: str) -> bool:
        return any(PurePath(path).name != name for path in self.fs.ls(self.url, detail=False))

    def refuse_unwritable(self) -> None:
        """Find out now whether files can be written here, and leave no trace.

        Raises:
            OSError: if they cannot.
        """
        try:
            if isinstance(self.fs, LocalFileSystem):
                folder = Path(self.fs._strip_protocol(self.url))
                with tempfile.TemporaryFile(dir=next(f for f in (folder, *folder.parents) if os.path.lexists(f))):
                    pass
            else:
                probe = self.path(".unlearn-probe")
                self.fs.pipe(probe, b"")
                self.fs.rm(probe)
        except Exception as error:  # a remote file system has errors of its own
            raise OSError(
                f"output_dir: nothing can be written to {self.url!r} ({type(error).__name__}: {error}); name a folder "
                "where this process may write."
            ) from error
