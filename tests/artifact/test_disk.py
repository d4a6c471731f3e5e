"""A folder that appears whole or not at all, and what it replaces."""

from pathlib import Path

import pytest
from safetensors import SafetensorError

from meswitch_cli.artifact.disk import disk_errors, exclusive, whole_folder
from meswitch_cli.errors import ArtifactError


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that is there already."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    return tmp_path / "out"


def contents(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out.parent)) for path in out.parent.rglob("*") if path.is_file())


def test_it_replaces_what_was_there(out: Path) -> None:
    with whole_folder(out, "making") as folder:
        (folder / "new").touch()
        assert contents(out) == [".out.making/new/new", "out/old"]
    assert contents(out) == ["out/new"] and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_where_it_cannot_be_made_the_old_one_stays(out: Path, error: type[BaseException]) -> None:
    with pytest.raises(ArtifactError if error is OSError else error), whole_folder(out, "making") as folder:
        (folder / "new").touch()
        raise error
    assert contents(out) == ["out/old"] and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_refused_rename_puts_the_old_one_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ArtifactError, match="the disk is full"), whole_folder(out, "making"):
        pass
    assert contents(out) == ["out/old"]


def test_a_crash_between_the_two_renames_is_undone(out: Path) -> None:
    (out.parent / ".out.making").mkdir()
    out.rename(out.parent / ".out.making" / "replaced")
    with pytest.raises(ValueError), whole_folder(out, "making"):
        assert contents(out) == ["out/old"]
        raise ValueError
    assert contents(out) == ["out/old"]


def test_a_second_writer_is_refused(out: Path) -> None:
    with (
        exclusive(out.parent / ".out.making"),
        pytest.raises(ArtifactError, match="another meswitch is writing here"),
        whole_folder(out, "making"),
    ):
        raise AssertionError("the block must not run")
    assert contents(out) == ["out/old"]


def test_a_full_disk_that_safetensors_met_is_told_as_any(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="x: the disk is full; free some space"), disk_errors(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="incomplete metadata"), disk_errors(tmp_path / "x"):
        raise SafetensorError("Error while deserializing header: incomplete metadata")
