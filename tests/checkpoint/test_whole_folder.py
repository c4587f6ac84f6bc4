"""Folders that are written whole: wherever they are, for whom the umask says, or not at all."""

import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory as Scratch

import pytest

from vora.checkpoint.pretrained import committed_model
from vora.checkpoint.save import merge, whole_folder


def test_all_files_of_a_folder_may_be_read_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").touch(0o600)
            (folder / "config.json").touch()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o644}


def written(out):
    with whole_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
    return sorted(str(file.relative_to(out)) for file in Path(out).rglob("*"))


def test_a_folder_may_be_a_link_the_one_at_hand_or_one_above_which_nothing_can_be_written(tmp_path, monkeypatch):
    for name in ("empty", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "here")
    made = []
    noted = lambda **given: made.append(given) or Scratch(**given)  # noqa: E731
    monkeypatch.setattr("vora.checkpoint.save.TemporaryDirectory", noted)
    for out in (tmp_path / "new" / "deep", tmp_path / "link", "."):
        assert written(out) == ["sub", "sub/a.txt"]
    assert (tmp_path / "link").is_symlink() and written_in(tmp_path / "empty") == ["sub"]
    # within what is there, so that nothing beside it, perhaps another disk, is written
    assert [given["dir"] for given in made] == [tmp_path / "new", tmp_path / "empty", tmp_path / "here"]
    with pytest.raises(ValueError, match="is not empty"):
        written(tmp_path / "link")


def written_in(folder):
    return [file.name for file in folder.iterdir()]


def test_nothing_is_left_of_what_is_ended(tmp_path):
    for out in (tmp_path / "new", tmp_path):
        with pytest.raises(SystemExit), whole_folder(out) as folder:
            (folder / "half").touch()
            raise SystemExit(143)  # as SIGTERM ends a command
    assert list(tmp_path.iterdir()) == []


def test_folders_within_each_other_are_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match="--llm-out .*m/llm lies in --out .*/m: each needs its own folder"):
        merge(committed_model(), tmp_path / "m", llm_out=tmp_path / "m" / "llm")
    assert list(tmp_path.iterdir()) == []
