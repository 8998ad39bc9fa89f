from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lightning_unlearn.folder import Folder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        yield Folder(tmp_path / "new" / "folder")
        return
    remote = Folder("memory://bucket/run")
    yield remote
    if remote.fs.exists("memory://bucket"):
        remote.fs.rm("memory://bucket", recursive=True)


def names(folder: Folder) -> list[str]:
    return sorted(os.path.basename(path) for path in folder.fs.find(folder.url))


def test_whole_files(folder):
    for content in (b"one", b"two"):
        with folder.whole(folder.free("a.ckpt")) as partial:
            folder.fs.pipe(partial, content)
            assert os.path.basename(partial) not in ("a.ckpt", "a-v1.ckpt")
    assert names(folder) == ["a-v1.ckpt", "a.ckpt"]
    assert [folder.fs.cat(folder.path(name)) for name in ("a.ckpt", "a-v1.ckpt")] == [b"one", b"two"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("power cut"), OSError(errno.ENOSPC, "disk full")])
def test_broken_off(folder, error):
    def write():
        with folder.whole("a.ckpt") as partial:
            folder.fs.pipe(partial, b"hal")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert names(folder) == []
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"output_dir: {folder.path('a.ckpt')!r} could not be written, and nothing")
        assert "disk full" in str(caught.value)


def test_nothing_was_written(folder):
    with pytest.raises(OSError, match=r"a\.ckpt' could not be written"), folder.whole("a.ckpt"):
        pass
    assert names(folder) == []


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "broken link"])
def test_folders_and_broken_links_are_in_the_way_too(tmp_path, make):
    make(tmp_path / "a.ckpt")
    assert Folder(tmp_path).free("a.ckpt") == "a-v1.ckpt"


def test_new_and_empty_folders_are_not_used(folder):
    folder.refuse_used()
    assert not folder.fs.exists(folder.url)
    folder.fs.makedirs(folder.url)
    folder.refuse_used()


def test_a_used_folder_is_refused(folder):
    folder.fs.makedirs(folder.url)
    folder.fs.pipe(folder.path(".hidden"), b"mine")
    for used in (folder, Folder(folder.path(".hidden"))):
        with pytest.raises(FileExistsError, match=rf"^output-dir: '{used.url}' exists and is not an empty"):
            used.refuse_used()
    assert names(folder) == [".hidden"]


def test_what_a_run_that_failed_logged_is_in_nobodys_way(folder):
    """Each run logs to a version of its own there."""
    folder.fs.makedirs(folder.path("lightning_logs/version_0"))
    folder.fs.pipe(folder.path("lightning_logs/version_0/hparams.yaml"), b"mine")
    folder.refuse_used()
    folder.fs.pipe(folder.path("report.json"), b"mine")
    with pytest.raises(FileExistsError, match=r"exists and is not an empty folder"):
        folder.refuse_used()


def test_a_folder_on_this_machine_is_a_path(tmp_path):
    assert [Folder(url).local() for url in (tmp_path, f"file://{tmp_path}", "out")] == [tmp_path, tmp_path, Path("out")]
    with pytest.raises(ValueError, match=r"^output-dir: 'memory://bucket/run' is not on this machine, and this"):
        Folder("memory://bucket/run").local()


def test_a_writable_folder_is_left_as_it_is(folder):
    folder.refuse_unwritable()
    assert names(folder) == []
    assert not folder.fs.exists(folder.url) or folder.fs.protocol == "memory"


@pytest.mark.parametrize("place", ["file", "file/below/it", "loop"])
def test_where_nothing_can_be_written(tmp_path, place):
    """Root may write into any folder, so what is tried here is no folder."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"output_dir: nothing can be written to '.*; name a folder"):
        Folder(tmp_path / place).refuse_unwritable()
    assert sorted(os.listdir(tmp_path)) == ["file", "loop"]


def test_where_nothing_can_be_written_elsewhere(monkeypatch):
    folder = Folder("memory://bucket/run")
    monkeypatch.setattr(type(folder.fs), "pipe_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(OSError, match=r"output_dir: nothing can be written to 'memory://bucket/run' \(ZeroDivision"):
        folder.refuse_unwritable()


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Folder("~/new").local() == tmp_path / "new"
    assert Folder("~/new").path("a") == str(tmp_path / "new" / "a")


def test_two_who_write_the_same_name_at_once(folder):
    name = folder.free("report.json")

    def write_twice():
        with folder.whole(name) as first:
            folder.fs.pipe(first, b"first")
            with folder.whole(name) as second:
                assert second != first
                folder.fs.pipe(second, b"second")

    with pytest.raises(OSError, match=r"report\.json' could not be written.*exists by now"):
        write_twice()
    assert names(folder) == [name]
    assert folder.fs.cat(folder.path(name)) == b"second"
