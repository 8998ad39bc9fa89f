from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.files import free_path, refuse_used_folder, write_whole


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# free_path


def test_a_free_path_is_taken_as_it_is(tmp_path):
    assert free_path(tmp_path / "model.ckpt") == tmp_path / "model.ckpt"


def test_a_used_path_gets_a_number(tmp_path):
    wanted = ["epoch=1-step=2.5.ckpt", "epoch=1-step=2.5-v1.ckpt", "epoch=1-step=2.5-v2.ckpt"]
    for name in wanted:
        path = free_path(tmp_path / wanted[0])
        assert path.name == name
        path.write_text("")


@given(st.sets(st.sampled_from(["a.json", "a-v1.json", "a-v2.json", "a-v3.json", "b.json"])))
def test_a_free_path_never_exists(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("used")
    for name in names:
        (folder / name).write_text("")
    path = free_path(folder / "a.json")
    assert path.parent == folder
    assert path.name not in names
    assert path.suffix == ".json"


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "broken link"])
def test_folders_and_broken_links_are_in_the_way_too(tmp_path, make):
    make(tmp_path / "report.json")
    assert free_path(tmp_path / "report.json").name == "report-v1.json"


# write_whole


def test_the_file_is_written(tmp_path):
    path = tmp_path / "new" / "folder" / "report.json"
    assert write_whole(path, lambda partial: partial.write_text("all of it")) == path
    assert path.read_text() == "all of it"
    assert os.listdir(path.parent) == ["report.json"]


def test_the_writer_gets_another_name_in_the_same_folder(tmp_path):
    path = tmp_path / "model.ckpt"

    def write(partial):
        assert partial.parent == tmp_path
        assert partial != path
        assert not path.exists()
        partial.write_text("")

    write_whole(path, write)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "half way"])
@pytest.mark.parametrize("there", [False, True])
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, error, when, there):
    path = tmp_path / "report.json"
    if there:
        path.write_text("old")

    def write(partial):
        if when == "half way":
            partial.write_text("hal")
        raise error("disk is full")

    with pytest.raises(error, match="disk is full"):
        write_whole(path, write)
    assert os.listdir(tmp_path) == (["report.json"] if there else [])
    if there:
        assert path.read_text() == "old"


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old and long")
    write_whole(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"


def test_whoever_reads_the_old_file_goes_on_reading_it(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with path.open() as reader:
        write_whole(path, lambda partial: partial.write_text("new"))
        assert reader.read() == "old"


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_honoured(tmp_path, umask, mask, wanted):
    umask(mask)
    path = write_whole(tmp_path / "report.json", lambda partial: partial.write_text(""))
    assert mode(path) == wanted


# refuse_used_folder


@pytest.mark.parametrize("kind", [str, Path])
def test_new_and_empty_folders_are_fine(tmp_path, kind):
    assert refuse_used_folder(kind(tmp_path)) == tmp_path
    assert refuse_used_folder(kind(tmp_path / "new")) == tmp_path / "new"
    assert not (tmp_path / "new").exists()


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(FileExistsError, match=r"^output-dir: '.*' exists and is not an empty folder; name a new one"):
        refuse_used_folder(tmp_path)
    with pytest.raises(FileExistsError, match=r"^output-dir: "):
        refuse_used_folder(tmp_path / ".hidden")
    assert os.listdir(tmp_path) == [".hidden"]
