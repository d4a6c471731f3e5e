import json
from pathlib import Path

import pytest
from command_line import meswitch


@pytest.mark.parametrize(
    ("bits", "calibrated", "steps", "scale"),
    [
        ("2", False, "output-unbiased", "none"),
        ("2", True, "output-unbiased", "none"),
        ("1", True, "output-unbiased", "rms"),
        ("0.25", False, "output-unbiased", "none"),
    ],
)
def test_defaults_follow_bits_and_calibration(
    pair: tuple[Path, Path], tmp_path: Path, calibration_file: Path, bits: str, calibrated: bool, steps: str, scale: str
) -> None:
    data = ["--calibration", str(calibration_file), "--samples", "4", "--sequence-length", "32"] if calibrated else []
    arguments = ["--base", str(pair[0]), "--expert", str(pair[1]), "--out", str(tmp_path / "a"), "--bits", bits, *data]
    done = meswitch("compress", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)["settings"]
    assert (settings["steps"], settings["channel_scale"]) == (steps, scale)
    assert (settings["calibration"] == "random") is not calibrated
