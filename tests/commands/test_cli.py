"""The command line as a user meets it: a real process, real files, exit status, streams."""

import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from command_line import ENVIRONMENT, fails, in_process, meswitch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.app import COMMANDS
from zoo.tiny import Pair, make_pair


def test_the_main_job(pair: Pair, tmp_path: Path) -> None:
    art, back = tmp_path / "art", tmp_path / "back"
    made = meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", art, "--salient", 4)
    assert made.returncode == 0, made.stderr
    assert "times smaller" in made.stdout and "largest output error" in made.stdout
    assert "expected size" in made.stderr
    shown = meswitch("inspect", art, "--plot", tmp_path / "art.png")
    assert shown.returncode == 0 and "q_proj" in shown.stdout
    assert (tmp_path / "art.png").read_bytes().startswith(b"\x89PNG")
    proven = meswitch("verify", art, "--base", pair[0])
    assert proven.returncode == 0 and proven.stdout.count("ok:") == 2
    restored = meswitch("restore", art, "--base", pair[0], "--out", back)
    assert restored.returncode == 0 and restored.stdout.strip() == str(back)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(back), AutoTokenizer.from_pretrained(back)
    assert torch.isfinite(model(**tokenizer("hello there", return_tensors="pt")).logits).all()


def test_json_is_json_and_alone_on_stdout(pair: Pair, tmp_path: Path) -> None:
    made = meswitch(
        "compress", "--base", pair[0], "--expert", pair[1], "--out", tmp_path / "a", "--salient", 4, "--json"
    )
    value = json.loads(made.stdout)
    assert value["ratio"] > 3 and value["bits_per_weight"] < 6 and value["errors"]["q_proj"]["weight_error"] < 0.5
    shown = json.loads(meswitch("inspect", tmp_path / "a", "--json").stdout)
    assert shown["bytes"] == value["bytes"] and len(shown["tensor_list"]) == shown["tensors"]
    proven = json.loads(meswitch("verify", tmp_path / "a", "--json").stdout)
    assert proven["base_checked"] is False and proven["tensors"] == shown["tensors"]


def test_calibrated_and_plot_as_svg(pair: Pair, tmp_path: Path, calibration_file: Path) -> None:
    options = ("--calibration", calibration_file, "--samples", 4, "--sequence-length", 32, "--salient", 4)
    made = meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", tmp_path / "a", *options)
    assert made.returncode == 0, made.stderr
    assert "largest output error" in made.stdout
    assert meswitch("inspect", tmp_path / "a", "--plot", tmp_path / "a.svg").returncode == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawn and "relative output error" in drawn and "q_proj" in drawn


def test_identical_expert_says_so(pair: Pair, tmp_path: Path) -> None:
    made = meswitch("compress", "--base", pair[0], "--expert", pair[0], "--out", tmp_path / "a", "--salient", 4)
    assert made.returncode == 0 and "identical to its base" in made.stdout
    back = meswitch("restore", tmp_path / "a", "--base", pair[0], "--out", tmp_path / "b")
    assert back.returncode == 0, back.stderr
    base, same = (safetensors.torch.load_file(path / "model.safetensors") for path in (pair[0], tmp_path / "b"))
    assert all(torch.equal(base[name], same[name]) for name in same)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    probe = "import sys; from meswitch_cli.app import build_app; build_app(['--help']); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    for module in ("torch", "transformers", "numpy", "meswitch_cli.commands"):
        assert f"'{module}'" not in loaded
    shown = meswitch("--help", anew=True)
    assert all(name in shown.stdout for name in COMMANDS)
    # Against what no command line of Typer's can do without, in turns: other work on the machine slows both.
    helps, imports = zip(*(_seconds_of_both() for _ in range(5)), strict=True)
    wall, work = (min(values) for values in zip(*helps, strict=True))
    wall_of_imports, work_of_imports = (min(values) for values in zip(*imports, strict=True))
    assert wall < 8 * wall_of_imports  # 2.5 when the machine is quiet
    assert work < 5 * work_of_imports


Seconds = tuple[float, float]


def _seconds_of_both() -> tuple[Seconds, Seconds]:
    """Of `meswitch --help`, and of a program that imports Typer and Rich."""
    return _seconds("-m", "meswitch_cli", "--help"), _seconds("-c", "import typer, rich")


def _seconds(*words: str) -> Seconds:
    """Seconds that Python takes, and that it is on a core."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=True, env=ENVIRONMENT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    work = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, work


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (("compress", "--bits", "3"), ""),
        (("serve", "--base", "x"), "MESWITCH_SERVE_GATE"),
        (("eval", "--dtype", "int8"), ""),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_value_that_is_no_choice_is_told_in_our_words(
    arguments: tuple[str, ...], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "3")
    done = in_process(*arguments)
    fails(done, 2, "is not one of")
    assert "Value error" not in done.stderr


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str) -> None:
    shown = meswitch(command, "--help")
    assert shown.returncode == 0 and "--help" in shown.stdout


def test_wrong_calls_are_status_two(pair: Pair, tmp_path: Path) -> None:
    inputs = ("--base", pair[0], "--expert", pair[1], "--out", tmp_path / "a")
    fails(meswitch("compress"), 2, "Missing option")
    fails(meswitch("nonsense"), 2, "No such command")
    fails(meswitch("compress", *inputs, "--bits", 3), 2, "'3'")
    memory = ("--experts", 1, "--device-memory", "much")
    fails(
        meswitch("plan", "--base", "./none", *memory), 2, "--device-memory: 'much' is no amount of bytes"
    )  # before any file
    fails(meswitch("compress", "--base", "./none", *inputs[2:], "--size", "small"), 2, "--size: 'small' is no amount")
    fails(meswitch("compress", *inputs, "--salient", -1), 2, "--salient")
    fails(meswitch("compress", *inputs, "--salient", 5000), 2, "salient")
    fails(meswitch("compress", *inputs, "--salient", 500), 2, "has only")
    fails(meswitch("compress", *inputs, "--group-size", 33), 2, "multiple of 32")
    fails(meswitch("compress", *inputs, "--steps", "layerwise"), 2, "needs calibration data")
    fails(meswitch("compress", *inputs, "--device", "tpu"), 2, "--device")
    fails(meswitch("compress", *inputs, "--device", "cuda:99"), 2, "CUDA devices found")
    assert not list(tmp_path.iterdir())


def test_bad_inputs_are_status_one(pair: Pair, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "a")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\nnonsense\n')
    compress = ("compress", "--base", pair[0], "--expert", pair[1], *out, "--salient", 4)
    fails(meswitch("compress", "--base", empty, "--expert", pair[1], *out), 1, "config.json")
    fails(meswitch("compress", "--base", "./none", "--expert", pair[1], *out), 1, "no such folder")
    fails(meswitch("compress", "--base", "nobody/nothing", "--expert", pair[1], *out), 1, "the Hub does not give it")
    fails(meswitch(*compress, "--calibration", tmp_path / "empty.jsonl"), 1, "no line with data")
    fails(meswitch(*compress, "--calibration", tmp_path / "bad.jsonl"), 1, "line 2")
    fails(meswitch(*compress, "--calibration", tmp_path / "none.jsonl"), 1, "cannot be read")
    fails(meswitch("verify", empty), 1, "not an artifact")
    fails(meswitch("inspect", tmp_path / "none"), 1, "not an artifact")
    fails(meswitch("restore", empty, "--base", pair[0], *out), 1, "not an artifact")
    assert not (tmp_path / "a").exists()


def test_wrong_base_and_damage(pair: Pair, tmp_path: Path) -> None:
    art = tmp_path / "art"
    assert meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", art, "--salient", 4).returncode == 0
    (tmp_path / "other").mkdir()
    other, _ = make_pair(tmp_path / "other", seed=3)
    fails(meswitch("verify", art, "--base", other), 1, "wrong base")
    fails(meswitch("restore", art, "--base", other, "--out", tmp_path / "b"), 1, "wrong base")
    fails(meswitch("inspect", art, "--plot", tmp_path / "x.pdf"), 2, ".png or .svg")
    fails(meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", art, "--salient", 4), 1, "--force")
    at_once = meswitch("compress", "--base", "./none", "--expert", pair[1], "--out", art)
    fails(at_once, 1, "an artifact is there already")  # before a model is read
    fails(meswitch("compress", "--base", pair[0], "--expert", art, "--out", tmp_path / "b"), 1, "meswitch restore")
    shard = art / "delta-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    fails(meswitch("verify", art), 1, shard.name)
    fails(meswitch("restore", art, "--base", pair[0], "--out", tmp_path / "b"), 1, shard.name)
    assert not (tmp_path / "b").exists() and not (tmp_path / ".b.restoring").exists()


def test_no_permission(pair: Pair) -> None:
    forbidden = Path("/sys/kernel/meswitch-test/a")  # not even root may make a folder there
    result = meswitch("compress", "--base", pair[0], "--expert", pair[1], "--out", forbidden, "--salient", 4)
    fails(result, 1, "/sys/kernel/meswitch-test")


def test_full_disk_on_a_real_small_file_system(pair: Pair, tmp_path: Path) -> None:
    """A file size limit of the operating system stands for the full disk: the same write fails in the same place."""
    art = tmp_path / "art"
    arguments = ["compress", "--base", str(pair[0]), "--expert", str(pair[1]), "--out", str(art), "--salient", "4"]
    limited = subprocess.run(
        [
            sys.executable,
            "-c",
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); from meswitch_cli.app import main; main()",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    fails(limited, 1, "delta-00001-of-00003.safetensors")
    assert not art.exists()
    assert meswitch(*arguments).returncode == 0
    assert meswitch("verify", art).returncode == 0
    shutil.rmtree(art)
