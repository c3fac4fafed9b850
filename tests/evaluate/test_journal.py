"""What a long run is resumed from: whole lines only, the last of a key."""

import json

import pytest

from kvjax.evaluate.journal import Journal


def test_records_come_back(tmp_path):
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    assert journal.records == {} and not path.exists()
    for i, key in enumerate("ab\u0430"):  # the third is a letter outside ASCII
        journal.append({"key": key, "value": i})
    journal.append({"key": "a", "value": 9})
    again = Journal(path)
    assert again.records == journal.records
    assert [again.records[key]["value"] for key in "ab\u0430"] == [9, 1, 2] and again.notes == []


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_line_without_its_end_is_cut_off(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.append({"key": "a"})
    whole = path.read_bytes()
    journal.append({"key": "b", "value": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path)
    assert set(again.records) == {"a"} and "cut off" in again.notes[0] and path.read_bytes() == whole
    again.append({"key": "c"})
    assert set(Journal(path).records) == {"a", "c"} and Journal(path).notes == []


def test_damaged_lines_are_told_and_left(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n{"key\n[1]\n{"quant": "b"}\n{"key": "c"}\n')
    journal = Journal(path)
    assert set(journal.records) == {"a", "c"}
    assert [note.split("line ")[1][0] for note in journal.notes] == ["2", "3", "4"]
    assert path.read_text().count("\n") == 5


def test_no_number_that_is_none_is_written(tmp_path):
    path = tmp_path / "results.jsonl"
    with pytest.raises(ValueError):
        Journal(path).append({"key": "a", "value": float("nan")})
    assert not path.exists()
    Journal(path).append({"key": "a", "value": 1.5})
    assert json.loads(path.read_text()) == {"key": "a", "value": 1.5}
