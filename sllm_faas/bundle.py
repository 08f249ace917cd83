"""A source tree as one deterministic archive, and back. Standard library only.

`pack` turns a directory into a gzipped tar whose bytes depend on names, contents and executable bits alone, so
`spec.digest` of them names the tree. `unpack` trusts nothing in an archive: it writes regular files below one
new directory, or nothing at all.

Left out by default: version control, environments, caches, keys and credentials (`DEFAULT_IGNORES`). A file
`.sllmignore` in the root adds to that, one pattern a line, a subset of gitignore: `#` comment, `!` takes back,
a trailing `/` means directories, a `/` elsewhere anchors to the root, `*` and `?` stay within a name, `[a-z]`,
`**` crosses directories; the last match wins, and nothing comes back out of an ignored directory. A directory that
keeps all of itself out of version control (`*` is its `.gitignore`), as caches, environments and a platform's state
directory do, is left out too.

Empty directories are not kept; links within the tree become what they point to; links out of it are refused.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sllm_faas.errors import BadSpec, StorageFull, TooLarge
from sllm_faas.spec import digest

MAX_PACKED = 64 * 1024 * 1024
MAX_UNPACKED = 512 * 1024 * 1024
MAX_FILES = 20_000
MAX_RATIO = 200
"""Unpacked to packed bytes, looked at beyond `RATIO_FLOOR`: source compresses 3-10 times."""
RATIO_FLOOR = 32 * 1024 * 1024

IGNORE_FILE = ".sllmignore"
DEFAULT_IGNORES = """
.git/ .hg/ .svn/ .venv/ venv/ env/ .tox/ .nox/ __pycache__/ .mypy_cache/ .pytest_cache/ .ruff_cache/ .hypothesis/
.ipynb_checkpoints/ node_modules/ .idea/ .vscode/ *.egg-info/ *.pyc *.pyo .DS_Store .#* *~ .sllmignore
.env .env.* .envrc .netrc .pypirc .npmrc .git-credentials .ssh/ .aws/ .gnupg/ .kube/ .azure/ .docker/ .config/gcloud/
*.pem *.key *.p12 *.pfx *.jks *.keystore id_rsa* id_dsa* id_ecdsa* id_ed25519* *.kdbx
""".split()  # noqa: SIM905 - one pattern per line would be fifty lines

_LIMIT_HINT = f"Name what is not needed in {IGNORE_FILE}; model weights belong in a checkpoint."


@dataclass(frozen=True, slots=True)
class Bundle:
    """A packed tree. `files` are the archived names, `unpacked` the sum of their sizes in bytes."""

    data: bytes
    digest: str
    files: tuple[str, ...]
    unpacked: int


# -- ignoring ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Pattern:
    regex: re.Pattern[str]
    negated: bool
    directories: bool


class Ignore:
    """Patterns of an ignore file, in order. `root` patterns match paths relative to the root, with `/`."""

    def __init__(self, lines: list[str]) -> None:
        self._patterns = [_parse(line) for raw in lines if (line := raw.rstrip()) and not line.startswith("#")]

    def ignored(self, path: str, is_dir: bool) -> bool:
        """Whether the last pattern that matches `path` leaves it out. Its parents are the caller's matter."""
        for pattern in reversed(self._patterns):
            if (is_dir or not pattern.directories) and pattern.regex.fullmatch(path):
                return not pattern.negated
        return False


def _parse(line: str) -> _Pattern:
    negated = line.startswith("!")
    text = line[1:] if negated else line
    directories = text.endswith("/")
    text = text.rstrip("/")
    anchored = "/" in text
    regex = _translate(text.lstrip("/"))
    try:
        return _Pattern(re.compile(regex if anchored else rf"(?:.*/)?{regex}", re.DOTALL), negated, directories)
    except re.error as error:
        raise BadSpec(f"{IGNORE_FILE}: pattern {line!r} is not one: {error}.") from None


def _translate(text: str) -> str:
    """A glob as a regular expression in which only `**` crosses a `/`."""
    regex, position = "", 0
    while position < len(text):
        char = text[position]
        if text.startswith("**/", position):
            regex, position = regex + "(?:.*/)?", position + 3
        elif text.startswith("**", position):
            regex, position = regex + ".*", position + 2
        elif char == "[" and "]" in text[position + 2 :]:
            end = text.index("]", position + 2)
            inner = re.sub(r"([\\^\[&~|])", r"\\\1", text[position + 1 : end])  # all but ranges are literal
            inner = "^" + inner[1:] if inner.startswith("!") else inner
            regex, position = regex + f"(?!/)[{inner}]", end + 1
        else:
            step = {"*": "[^/]*", "?": "[^/]"}.get(char) or re.escape(char)
            regex, position = regex + step, position + 1
    return regex


def load_ignore(root: Path) -> Ignore:
    """The default patterns and those of the root's ignore file. Raises BadSpec for one that cannot be read."""
    try:
        own = (root / IGNORE_FILE).read_text("utf-8").splitlines()
    except FileNotFoundError:
        own = []
    except (OSError, UnicodeDecodeError) as error:
        raise BadSpec(f"{root / IGNORE_FILE} cannot be read: {error}.") from None
    return Ignore([*DEFAULT_IGNORES, *own])


# -- packing ---------------------------------------------------------------------------------------------------


def list_files(root: Path, ignore: Ignore | None = None) -> Iterator[tuple[str, Path]]:
    """(archive name, path to read) of every file to pack, sorted by name within each directory. BadSpec."""
    top = root.resolve()
    yield from _walk(top, top, "", ignore or load_ignore(top), (top,))


def _walk(
    top: Path, directory: Path, prefix: str, ignore: Ignore, above: tuple[Path, ...]
) -> Iterator[tuple[str, Path]]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise BadSpec(f"{directory} cannot be read: {error.strerror}.") from None
    for entry in entries:
        name, path = prefix + entry.name, Path(entry.path)
        if ignore.ignored(name, entry.is_dir()):
            continue
        _check_packable_name(name)
        if entry.is_symlink():
            path = _follow(top, path, name)
        if path.is_dir():
            if path in above:
                raise BadSpec(f"{name} is a link to a directory above it; allowed: trees without loops.")
            if _keeps_out(path):
                continue
            yield from _walk(top, path, name + "/", ignore, (*above, path))
        elif path.is_file():
            yield name, path
        else:
            raise BadSpec(f"{name} is neither a file nor a directory.", hint=f"Name it in {IGNORE_FILE}.")


def _keeps_out(directory: Path) -> bool:
    """Whether it says of itself that nothing in it is source: its `.gitignore` is `*` and nothing else."""
    try:
        lines = (directory / ".gitignore").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")] == ["*"]


def _check_packable_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise BadSpec(f"{name!r} is not a UTF-8 name.", hint=f"Rename it or name it in {IGNORE_FILE}.") from None


def _follow(top: Path, link: Path, name: str) -> Path:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        raise BadSpec(f"{name} is a link to nothing.", hint=f"Remove it or name it in {IGNORE_FILE}.") from None
    if not target.is_relative_to(top):
        raise BadSpec(
            f"{name} is a link out of {top} (to {target}); allowed: links within it.",
            hint=f"Copy the file, or name the link in {IGNORE_FILE}.",
        )
    return target


def pack(root: Path) -> Bundle:
    """The tree under `root`. Same names, contents and executable bits: same bytes. Raises BadSpec for what
    cannot be packed and TooLarge beyond the limits."""
    if not root.is_dir():
        raise BadSpec(f"{root} is not a directory.")
    names: list[str] = []
    unpacked = 0
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, path in list_files(root):
            try:
                content = path.read_bytes() if path.stat().st_size <= MAX_UNPACKED else None
                executable = path.stat().st_mode & stat.S_IXUSR
            except OSError as error:
                raise BadSpec(
                    f"{path} cannot be read: {error.strerror}.", hint=f"Or name it in {IGNORE_FILE}."
                ) from None
            names.append(name)
            unpacked += MAX_UNPACKED + 1 if content is None else len(content)
            _check_limits(len(names), unpacked, buffer.tell(), f"{root} (at {name})")
            member = tarfile.TarInfo(name)
            member.size = len(content or b"")
            member.mode = 0o755 if executable else 0o644
            archive.addfile(member, io.BytesIO(content or b""))
    data = buffer.getvalue()
    _check_limits(len(names), unpacked, len(data), str(root))
    return Bundle(data, digest(data), tuple(names), unpacked)


def _check_limits(files: int, unpacked: int, packed: int, where: str) -> None:
    for value, limit, unit in (
        (files, MAX_FILES, "files"),
        (unpacked, MAX_UNPACKED, "bytes"),
        (packed, MAX_PACKED, "packed bytes"),
    ):
        if value > limit:
            raise TooLarge(f"the source in {where} has more than {limit} {unit}; allowed: {limit}.", hint=_LIMIT_HINT)


# -- unpacking ---------------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """The decompressed stream, refusing to go on beyond the limits, whatever the archive declares."""

    def __init__(self, data: bytes) -> None:
        self._source = gzip.GzipFile(fileobj=io.BytesIO(data))
        self._packed = len(data)
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        chunk = self._source.read(1 << 20 if size < 0 else min(size, 1 << 20))
        self._count += len(chunk)
        overhead = MAX_FILES * 2 * tarfile.BLOCKSIZE
        if self._count > MAX_UNPACKED + overhead:
            raise TooLarge(f"the bundle unpacks to more than {MAX_UNPACKED} bytes; allowed: {MAX_UNPACKED}.")
        if self._count > RATIO_FLOOR and self._count > self._packed * MAX_RATIO:
            raise BadSpec(f"the bundle unpacks to more than {MAX_RATIO} times its size; it is a bomb, not source.")
        return chunk


def unpack(data: bytes, directory: Path, expected: str = "") -> None:
    """Write the archive's files below `directory`, which appears whole or not at all; if it is there already,
    nothing is done. `expected` is the digest to check.

    Raises BadSpec for an archive that is damaged or holds anything but regular files with plain relative names,
    TooLarge beyond the limits, StorageFull, OSError.
    """
    if expected and digest(data) != expected:
        raise BadSpec(f"the bundle is damaged: its digest is {digest(data)}, not {expected}.")
    if len(data) > MAX_PACKED:
        raise TooLarge(f"the bundle has {len(data)} bytes; allowed: {MAX_PACKED}.")
    if directory.is_dir():
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpack-", dir=directory.parent))
    try:
        _extract(data, temporary)
        try:
            temporary.rename(directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # somebody else was as quick: same content
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"no space left in {directory.parent} for the bundle.") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _extract(data: bytes, directory: Path) -> None:
    source = _Bounded(data)
    seen: set[str] = set()
    total = 0
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                name = _check_member(member)
                if name in seen:
                    raise BadSpec(f"the bundle has two files named {name!r}.")
                seen.add(name)
                total += member.size
                _check_limits(len(seen), total, 0, "the bundle")
                content = archive.extractfile(member)
                _write(directory / name, content.read() if content else b"", executable=bool(member.mode & 0o100))
        while source.read():  # the rest, for the checksum at its end
            pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, UnicodeError, ValueError) as error:
        raise BadSpec(f"the bundle is damaged: {error or type(error).__name__}.") from error


def _check_member(member: tarfile.TarInfo) -> str:
    """The member's name. Raises BadSpec for all but regular files with plain relative names."""
    name = member.name
    if not member.isreg() or member.issparse() or member.type not in tarfile.REGULAR_TYPES:
        kind = "link" if member.issym() or member.islnk() else "directory, device or special file"
        raise BadSpec(f"the bundle holds {name!r}, a {kind}; allowed: regular files.")
    parts = name.split("/")
    if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise BadSpec(f"the bundle holds the name {name!r}; allowed: plain relative paths.")
    if len(name.encode()) > 4000 or any(len(part.encode()) > 255 for part in parts) or len(parts) > 100:
        raise BadSpec(f"the bundle holds the name {name[:80]!r}…, which is too long.")
    return str(PurePosixPath(name))


def _write(path: Path, content: bytes, *, executable: bool) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise BadSpec(f"the bundle has a file and a directory of one name: {path.name!r}.") from None
    path.chmod(0o755 if executable else 0o644)
