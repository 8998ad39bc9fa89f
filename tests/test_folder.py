from __future__ import annotations

import errno
import os

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


def test_a_broken_link_is_in_the_way(tmp_path):
    (tmp_path / "a.ckpt").symlink_to("nowhere")
    assert Folder(tmp_path).free("a.ckpt") == "a-v1.ckpt"


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
