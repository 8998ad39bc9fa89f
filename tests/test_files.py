from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.files import free_name, write_whole


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# free_name


@given(st.sets(st.sampled_from(["a.json", "a-v1.json", "a-v2.json", "a-v3.json", "b.json"])))
def test_a_free_name_is_the_first_that_is_not_taken(names):
    free = free_name("a.json", names.__contains__)
    assert free == next(name for name in ("a.json", *(f"a-v{n}.json" for n in range(1, 5))) if name not in names)


def test_the_number_comes_before_the_last_suffix():
    assert free_name("epoch=1-step=2.5.ckpt", {"epoch=1-step=2.5.ckpt"}.__contains__) == "epoch=1-step=2.5-v1.ckpt"


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
