from __future__ import annotations

import pytest

from bert.files import is_remote


@pytest.mark.parametrize(
    ("name", "remote"),
    [("s3://bucket/c4", True), ("dbfs:/Volumes/c4", True), ("data/c4", False), ("/data/a:b", False), ("run:1", False)],
)
def test_what_is_a_remote(name: str, remote: bool) -> None:
    assert is_remote(name) == remote
