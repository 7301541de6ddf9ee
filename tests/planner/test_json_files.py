"""One reader of the JSON files that users name."""

import pytest

from attention.errors import ConfigError
from planner.json_files import read_json


def test_what_a_file_holds_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b' {"seq": [1, 2.5, "\xc3\xa9"]}')
    assert read_json(path) == {"seq": [1, 2.5, "é"]}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"{'a': 1}", b"[" * 100_000])
def test_what_is_no_json_is_refused_by_name(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        read_json(path, "--config ")
    assert str(caught.value).startswith(f"--config {path} is no JSON: ")


def test_what_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=f"{path} cannot be read: "):
            read_json(path)
