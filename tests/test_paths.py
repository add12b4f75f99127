"""Files of a model's directory: what may be read."""

import os

import pytest

from trainfw.errors import UserError
from trainfw.paths import check_file

# Where a file of the model lies, what it is a link to from there, and whether that may be read.
LINKS = {
    "beside it": ("model/file", "other", True),
    "below it": ("model/file", "deep/other", True),
    "the store of its cache": ("hub/snapshots/abc/file", "../../blobs/other", True),
    "from a folder of its cache": ("hub/snapshots/abc/text/file", "../../../blobs/other", True),
    "away": ("model/file", "../secret", False),
    "away by its full path": ("model/file", "/{root}/secret", False),
    "through another link": ("model/file", "away", False),
    "through a folder that is a link": ("model/file", "root/secret", False),
    "another snapshot": ("hub/snapshots/abc/file", "../def/other", False),
    "away from a cache": ("hub/snapshots/abc/file", "../../../secret", False),
    "a store that is no cache's": ("model/abc/file", "../../blobs/other", False),
    "a cache whose store is a link": ("trap/snapshots/abc/file", "../../blobs/secret", False),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_of_a_model(name, tmp_path):
    place, target, allowed = LINKS[name]
    file = tmp_path / place
    file.parent.mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "away").symlink_to("../secret")
    (tmp_path / "model" / "root").symlink_to("..")
    (tmp_path / "trap").mkdir(exist_ok=True)
    (tmp_path / "trap" / "blobs").symlink_to("..")
    file.symlink_to(target.replace("/{root}", str(tmp_path)))
    there = tmp_path / os.path.normpath(tmp_path / file.parent / file.readlink())
    if not there.exists():
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_text("other")
    check_file(file, named=True)
    if allowed:
        check_file(file)
    else:
        with pytest.raises(UserError, match=r"is a link to .*, outside of the model's directory"):
            check_file(file)
    linked = tmp_path / "linked"
    linked.symlink_to(file.parent)  # a directory that is named may be a link
    (file.parent / "own").write_text("own")
    check_file(linked / "own")
