"""Where checkpoints lie: a folder of this machine, as `pathlib.Path`, or one in a store that fsspec knows.

Readers use the few methods that both have, so that they need not know which one it is.
"""

from __future__ import annotations

import contextlib
import errno
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from longspan.errors import UsageError

_ADDRESS = re.compile(r"^([a-z][a-z0-9+.-]+):/+(.*)$", re.IGNORECASE)
# store -> its schemes, and the extra that installs what fsspec needs for them
STORES = {
    "S3": (("s3", "s3a"), "s3"),
    "Google Cloud Storage": (("gs", "gcs"), "gcs"),
    "Azure": (("az", "abfs", "abfss"), "azure"),
    "this process's memory": (("memory",), None),
}


class RemotePath:
    """A folder or object in a store: `s3://bucket/runs/a`, `gs://...`, `memory://...`.

    Folders exist as far as something is in them. What a store's client raises comes out as OSError.
    """

    def __init__(self, files: Any, path: str) -> None:
        """Args: files: fsspec file system; path: without the scheme."""
        self._files, self._path = files, path.rstrip("/")

    @classmethod
    def of(cls, address: str) -> RemotePath:
        """The place that an address names.

        Raises:
            UsageError: fsspec does not know the scheme, or what it needs is not installed.
        """
        import fsspec  # only addresses of this kind need it

        try:
            # a listing from before another process's save would hide it
            files, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
        except ImportError as error:
            scheme = address.partition(":")[0]
            extra = next((extra for schemes, extra in STORES.values() if scheme in schemes), None)
            advice = f"Install it with: pip install 'longspan[{extra}]'" if extra else "Install what fsspec asks for"
            raise UsageError(f"{address}: {error}. {advice}") from error
        except (ValueError, OSError) as error:
            known = ", ".join(f"{schemes[0]}:// ({name})" for name, (schemes, _) in STORES.items())
            raise UsageError(
                f"{address}: {str(error).partition(chr(10))[0]}. Use a folder of this machine, an address like "
                f"s3://BUCKET/FOLDER, or another scheme: {known}; others that fsspec knows are not tested."
            ) from error
        return cls(files, path)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._files, f"{self._path}/{name}")

    def __str__(self) -> str:
        return str(self._files.unstrip_protocol(self._path))

    __fspath__ = None  # os and open() must not take it for a path of this machine

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return posixpath.basename(self._path)

    @property
    def parent(self) -> RemotePath:
        """The folder around it."""
        return RemotePath(self._files, posixpath.dirname(self._path))

    def absolute(self) -> RemotePath:
        """Itself: addresses are always whole."""
        return self

    @property
    def is_volatile(self) -> bool:
        """Whether it goes away with this process, and no other process sees it."""
        return "memory" in self._files.protocol

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it. Raises OSError if the store does not say."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether there is an object of this name. Raises OSError if the store does not say."""
        return self._kind() == "file"

    def _kind(self) -> str | None:
        """What fsspec calls the type. Its own `isfile` takes a store that is down for a file that is not there."""
        with _as_os_errors():
            try:
                return str(self._files.info(self._path)["type"])
            except FileNotFoundError:
                return None

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        return any(True for _ in self.iterdir())

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly in it, objects and folders; nothing if it does not exist."""
        with _as_os_errors():
            try:
                names = self._files.ls(self._path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                names = []
        for name in sorted(name.rstrip("/") for name in names):
            if name != self._path and len(name) > len(self._path):
                yield RemotePath(self._files, name)

    def read_bytes(self) -> bytes:
        """The whole object. Raises OSError, FileNotFoundError if there is none."""
        with _as_os_errors():
            return bytes(self._files.cat_file(self._path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[BinaryIO]:
        """The object as a file to read from front to back."""
        with _as_os_errors(), self._files.open(self._path, mode) as file:
            yield file

    def write_bytes(self, content: bytes | bytearray) -> None:
        """Create or replace the object: readers see all of the new one, or what was there before.

        Raises:
            OSError: the store refused, or has not as many bytes as it was given.
        """
        with _as_os_errors():
            self._files.pipe_file(self._path, content)
            size = self._files.info(self._path)["size"]
        if size != len(content):
            raise OSError(errno.EIO, f"the store has {size:,} of {len(content):,} bytes", str(self))

    def create_bytes(self, content: bytes) -> bool:
        """Create the object unless there is one; whether it now has this content.

        Stores that do not know conditional writes leave a moment in which two writers both believe to be first; all
        but the last of them see it when they look again.

        Raises:
            OSError: the store refused, or cannot be reached.
        """
        try:
            with _as_os_errors():
                self._files.pipe_file(self._path, content, mode="create")
        except OSError:  # perhaps an earlier attempt of the client has succeeded and its answer was lost
            if not self.is_file():
                raise
        return self.read_bytes() == content

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            with _as_os_errors():
                self._files.rm_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def touch(self) -> None:
        """Make an empty object."""
        self.write_bytes(b"")

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: folders come with what is in them."""

    def remove_tree(self) -> None:
        """Remove everything below it; nothing happens if there is nothing."""
        with _as_os_errors(), contextlib.suppress(FileNotFoundError):
            for name in self._files.find(self._path):
                self._files.rm_file(name)  # `rm` would take brackets in a name for a pattern

    def modified(self) -> float:
        """When the object was written, unix seconds, by the store's clock."""
        with _as_os_errors():
            return float(self._files.modified(self._path).timestamp())


Place = Path | RemotePath
P = TypeVar("P", bound=Place)


def place_of(address: str | Place) -> Place:
    """The place that a person names: a path of this machine, or an address with a scheme.

    A `Path` made of an address has lost one of its slashes; it stands for the address unless there is such a path.

    Raises:
        UsageError: fsspec does not know the scheme, or what it needs is not installed.
    """
    if isinstance(address, RemotePath):
        return address
    match = _ADDRESS.match(str(address))
    if match is None or Path(address).exists():
        return Path(address)
    scheme = match[1].lower()
    if scheme == "file":
        return Path(f"/{match[2]}")
    return RemotePath.of(f"{scheme}://{match[2]}")


def children(place: P) -> list[P]:
    """What lies directly in a folder; nothing if it does not exist. One question to a store."""
    if isinstance(place, Path) and not place.is_dir():
        return []
    return cast(list[P], list(place.iterdir()))


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Clients have errors of their own for what is an input/output error to us."""
    try:
        yield
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise OSError(errno.EIO, str(error) or type(error).__name__) from error
        raise
    except (GeneratorExit, MemoryError, TypeError, AttributeError, AssertionError):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
