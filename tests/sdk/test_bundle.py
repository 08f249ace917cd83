"""The same tree gives the same bundle; secrets stay out; nothing hostile gets out of an archive."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sllm_faas import bundle
from sllm_faas.bundle import Ignore, pack, unpack
from sllm_faas.config import Config
from sllm_faas.errors import BadSpec, SllmError, TooLarge
from sllm_faas.spec import digest


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_tree_packs_to_the_same_digest_whatever_times_and_modes(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"app.py": "x = 1\n", "pkg/__init__.py": "", "pkg/deep/data.bin": b"\x00\xff"}
    one, two = write(tmp_path / "one", files), write(tmp_path / "two", dict(reversed(files.items())))
    os.utime(two / "app.py", (1, 1))
    (two / "app.py").chmod(0o600)
    assert pack(one).digest == pack(two).digest == digest(pack(one).data)
    (two / "app.py").write_text("x = 2\n")
    assert pack(one).digest != pack(two).digest


def test_what_is_packed_is_unpacked(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "app.py": "x = 1\n",
        "a/b/" + "n" * 120 + ".txt": "long",
        "ü.txt": "name",
        "empty": "",
    }
    root = write(tmp_path / "source", files)
    (root / "app.py").chmod(0o755)
    packed = pack(root)
    unpack(packed.data, tmp_path / "out", packed.digest)
    assert tree(tmp_path / "out") == tree(root)
    assert (tmp_path / "out" / "app.py").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "empty").stat().st_mode & 0o777 == 0o644
    assert packed.unpacked == sum(map(len, tree(root).values()))


def test_secrets_caches_and_environments_are_left_out_by_default(tmp_path: Path) -> None:
    left_out = [
        ".git/config", ".env", ".env.local", "sub/.env", ".venv/bin/python", "venv/x.py", "__pycache__/a.pyc",
        "sub/__pycache__/b.pyc", "x.pyc", "server.pem", "sub/tls.key", "id_rsa", "id_ed25519.pub", ".ssh/config",
        ".aws/credentials", ".netrc", "node_modules/a.js", ".sllmignore", ".config/gcloud/token",
    ]  # fmt: skip
    kept = ["app.py", "environment.py", "keys.py", "sub/git.py", ".config/app.toml"]
    root = write(tmp_path, dict.fromkeys([*left_out, *kept], ""))
    assert sorted(pack(root).files) == sorted(kept)


def test_the_ignore_file_adds_and_takes_back(tmp_path: Path) -> None:
    root = write(tmp_path, {
        ".sllmignore": "# comment\n\n*.log\n/only_root.txt\ndata/\n!keep.log\n"
        "docs/**/draft.md\n!.env.example\nx[0-9].py\n",
        "a.log": "", "sub/b.log": "", "sub/keep.log": "", "only_root.txt": "", "sub/only_root.txt": "",
        "data/x": "", "sub/data/y": "", "docs/draft.md": "", "docs/a/b/draft.md": "", "docs/a/final.md": "",
        ".env.example": "", "x1.py": "", "xa.py": "", "app.py": "",
    })  # fmt: skip
    assert sorted(pack(root).files) == [
        ".env.example", "app.py", "docs/a/final.md", "sub/keep.log", "sub/only_root.txt", "xa.py"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "path", "is_dir", "matches"),
    [
        ("*.py", "a/b.py", False, True),
        ("a/*.py", "a/b.py", False, True),
        ("a/*.py", "a/c/b.py", False, False),
        ("a/**/b", "a/b", False, True),
        ("a/**", "a/x/y", False, True),
        ("**/z", "z", False, True),
        ("build/", "build", False, False),
        ("build/", "x/build", True, True),
        ("[!a]b", "cb", False, True),
        ("[!a]b", "ab", False, False),
        ("a?c", "a/c", False, False),
        ("a.b", "axb", False, False),
        ("a[", "a[", False, True),
    ],
)
def test_ignore_patterns_match_as_documented(pattern: str, path: str, is_dir: bool, matches: bool) -> None:
    assert Ignore([pattern]).ignored(path, is_dir) is matches


@given(st.lists(st.text(alphabet="ab*?[]!/.\\-#", max_size=8), max_size=4), st.text(alphabet="ab/.", max_size=8))
def test_any_ignore_pattern_is_taken_or_refused_clearly(patterns: list[str], path: str) -> None:
    try:
        Ignore(patterns).ignored(path, is_dir=False)
    except BadSpec as error:
        assert ".sllmignore" in str(error)


def test_links_within_the_tree_become_files_and_links_out_of_it_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "source", {"app.py": "x", "real/data.txt": "d"})
    (root / "alias.py").symlink_to("app.py")
    (root / "linked").symlink_to("real")
    assert sorted(pack(root).files) == ["alias.py", "app.py", "linked/data.txt", "real/data.txt"]
    (tmp_path / "secret.txt").write_text("s")
    (root / "out.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(BadSpec, match=r"out\.txt is a link out of"):
        pack(root)


@pytest.mark.parametrize(
    ("text", "out"),
    [("*\n", True), ("# made by a tool\n*\n", True), ("*.log\n", False), ("*\n!keep\n", False), ("", False)],
)
def test_a_directory_that_keeps_itself_out_of_version_control_is_left_out(tmp_path: Path, text: str, out: bool) -> None:
    root = write(tmp_path, {"app.py": "x", "made/.gitignore": text, "made/deep/admin.token": "secret"})
    os.mkfifo(root / "made" / "pipe") if out else None
    assert ("made/deep/admin.token" in pack(root).files) is not out


def test_a_platforms_state_directory_in_the_project_is_left_out(tmp_path: Path) -> None:
    root = write(tmp_path, {"app.py": "x"})
    for _ in range(2):
        Config(state_dir=root / "state").prepare()
    assert pack(root).files == ("app.py",)


def test_a_link_loop_a_dangling_link_and_a_pipe_are_refused_unless_ignored(tmp_path: Path) -> None:
    root = write(tmp_path, {"app.py": "x", "sub/a.py": ""})
    (root / "sub" / "up").symlink_to("..")
    with pytest.raises(BadSpec, match="loops"):
        pack(root)
    (root / "sub" / "up").unlink()
    (root / "gone").symlink_to("nowhere")
    with pytest.raises(BadSpec, match="link to nothing"):
        pack(root)
    (root / "gone").unlink()
    os.mkfifo(root / "pipe")
    with pytest.raises(BadSpec, match="neither a file nor a directory"):
        pack(root)
    (root / ".sllmignore").write_text("pipe\n")
    assert sorted(pack(root).files) == ["app.py", "sub/a.py"]


def test_limits_are_refused_with_the_value_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path, {f"f{i}.py": os.urandom(100) for i in range(5)})
    for name, value in (("MAX_FILES", 4), ("MAX_UNPACKED", 450), ("MAX_PACKED", 300)):
        with monkeypatch.context() as patch:
            patch.setattr(bundle, name, value)
            with pytest.raises(TooLarge, match=f"allowed: {value}"):
                pack(root)


def test_a_missing_directory_and_an_unreadable_ignore_file_are_bad_specs(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="not a directory"):
        pack(tmp_path / "none")
    (tmp_path / ".sllmignore").write_bytes(b"\xff\xfe")
    with pytest.raises(BadSpec, match="cannot be read"):
        pack(tmp_path)


# -- hostile archives ------------------------------------------------------------------------------------------


def archive(*members: tuple[tarfile.TarInfo, bytes], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=fmt) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = b"x", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


@pytest.mark.parametrize(
    "members",
    [
        [member("/etc/evil")],
        [member("../evil")],
        [member("a/../../evil")],
        [member("a/./b")],
        [member("a//b")],
        [member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
        [member("link", b"", type=tarfile.LNKTYPE, linkname="../x")],
        [member("dir", b"", type=tarfile.DIRTYPE)],
        [member("null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
        [member("disk", b"", type=tarfile.BLKTYPE)],
        [member("pipe", b"", type=tarfile.FIFOTYPE)],
        [member("a"), member("a")],
        [member("a"), member("a/b")],
        [member("a/b"), member("a")],
        [member("x" * 300)],
        [member("/".join("d" * 60 for _ in range(101)))],
        [member("sparse", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"})],
    ],
    ids=lambda members: members[-1][0].name[:12],
)
def test_hostile_members_are_refused_and_leave_nothing(members: Any, tmp_path: Path) -> None:
    with pytest.raises(SllmError):
        unpack(archive(*members), tmp_path / "deep" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "out").exists()
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_bomb_is_refused_by_what_it_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "RATIO_FLOOR", 1 << 20)
    with pytest.raises(BadSpec, match="bomb"):
        unpack(archive(member("zeros", bytes(8 << 20))), tmp_path / "out")
    monkeypatch.setattr(bundle, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(TooLarge):
        unpack(archive(member("zeros", bytes(2 << 20))), tmp_path / "out")
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    with pytest.raises(TooLarge):
        unpack(archive(*(member(f"f{i}") for i in range(4))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_size_that_lies_is_refused(tmp_path: Path) -> None:
    info, _ = member("big", b"")
    info.size = 1 << 30
    raw = info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)
    with pytest.raises(SllmError):
        unpack(gzip.compress(raw), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_digest_than_expected_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSpec, match="damaged"):
        unpack(archive(member("a")), tmp_path / "out", "0" * 64)


def test_unpacking_twice_is_harmless(tmp_path: Path) -> None:
    data = archive(member("a"))
    unpack(data, tmp_path / "out")
    unpack(data, tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": b"x"}


@pytest.mark.parametrize("cut", [0, 1, 5, 20, 60, -1, -4, -9])
def test_a_truncated_archive_is_refused(cut: int, tmp_path: Path) -> None:
    data = archive(*(member(f"f{i}", os.urandom(50)) for i in range(3)))[: cut or 0]
    with pytest.raises(BadSpec):
        unpack(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@given(st.data())
@settings(max_examples=150)
def test_a_mutated_archive_unpacks_beneath_its_directory_or_is_refused(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    raw = bytearray(gzip.decompress(archive(member("a/b.py", b"x = 1"), member("c.py", b"y"))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    top = tmp_path_factory.mktemp("mutated")
    try:
        unpack(gzip.compress(bytes(raw)), top / "out")
    except SllmError:
        assert not (top / "out").exists()
    assert {path.name for path in top.iterdir()} <= {"out"}


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from sllm_faas.errors import StorageFull

    def full(*_: object, **__: object) -> Callable[..., Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle, "_write", full)
    with pytest.raises(StorageFull):
        unpack(archive(member("a")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
