"""Who may read what is saved: as anything else that its user writes."""

import os
import stat

from vora.checkpoint.save import whole_folder


def test_all_files_of_a_folder_may_be_read_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        with whole_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").touch(0o600)
            (folder / "config.json").touch()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()} == {0o644}
