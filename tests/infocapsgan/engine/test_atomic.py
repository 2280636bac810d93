import pytest

from infocapsgan.engine.atomic import atomic_file, atomic_folder, remove_unfinished


def write_half(context, name):
    with context as temporary:
        (temporary / name).write_text("half")
        raise KeyError


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyError):
        write_half(atomic_file(path), "")
    assert path.read_text() == "before"
    with atomic_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(KeyError):
        write_half(atomic_folder(path), "a")
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / "a").write_text(content)
        assert (path / "a").read_text() == content
    with atomic_folder(path, keep=True) as temporary:
        (temporary / "a").write_text("third")
    assert (path / "a").read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder"
    path.mkdir()
    for name in "ab":
        (path / name).touch()
    monkeypatch.setattr("os.replace", None)  # as if killed at the first thing that is done to the folder
    with pytest.raises(TypeError), atomic_folder(path) as temporary:
        (temporary / "a").touch()
    assert sorted(file.name for file in path.iterdir()) == ["a", "b"]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / "best").mkdir()
    for path in (tmp_path / "best" / ".weights.safetensors.7.tmp", tmp_path / "best" / "weights.safetensors"):
        path.touch()
    for name in (".step-00000003.7.tmp", "step-00000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").touch()
    remove_unfinished(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "best",
        "best/weights.safetensors",
        "step-00000002",
        "step-00000002/state.json",
    ]
