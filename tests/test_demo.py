"""The demo in its quick form, as a user runs it: artifacts, report, resumption, exit status."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
STEPS = 60

# By one worker: the runs share their result, and what they compile.
pytestmark = pytest.mark.xdist_group("demo")


# Of all runs, which compile the same programs.
CACHE = tempfile.TemporaryDirectory(prefix="flashmoe_demo_")


def demo(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/train_lm.py", "--quick", "--output", str(output), *options]
    # The demo makes its devices itself.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join(flags),
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def report(output: Path) -> dict[str, Any]:
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the printed text of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole") / "runs" / "demo"
    run = demo(output)
    assert run.returncode == 0, run.stderr
    return output, run.stdout


@pytest.mark.smoke
def test_the_model_learns(whole: tuple[Path, str]) -> None:
    got = report(whole[0])
    losses = got["history"]["losses"]
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    step, validation_loss = got["history"]["validation"][-1]
    assert step == STEPS
    assert validation_loss < got["unigram_entropy"] < np.log(256)


def test_the_loss_curve_shows_three_lines(whole: tuple[Path, str]) -> None:
    image = matplotlib.image.imread(whole[0] / "loss.png")
    height, width, _ = image.shape
    assert height >= 400
    assert width >= 600
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    training = (blue > red + 0.2) & (blue > green)
    validation = (red > green + 0.2) & (green > blue + 0.2)
    entropy = (
        (np.abs(red - 0.5) < 0.03) & (np.abs(red - green) < 0.02) & (np.abs(red - blue) < 0.02)
    )
    assert training.any(axis=0).sum() > width / 2
    assert validation.any(axis=0).sum() > width / 2
    assert (entropy.sum(axis=1) > width / 3).any()


@pytest.mark.smoke
def test_the_printed_report(whole: tuple[Path, str]) -> None:
    output, text = whole
    got = report(output)
    assert "8 devices" in text
    assert got["sample"].startswith("The ")
    assert len(got["sample"]) > 300
    rows = re.findall(
        r"^\| (fused|xla) +\| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \| +([\d.]+) \|$", text, re.M
    )
    assert [row[0] for row in rows] == ["fused", "xla"]
    assert all(float(number) > 0 for row in rows for number in row[1:])
    difference, ratio = re.search(
        r"difference of the losses: (\S+)\. Step time of xla / fused: (\S+)\.$", text, re.M
    ).groups()
    # Both compute in float32 and differ by the order of their sums, which 20 steps amplify.
    assert float(difference) < 1e-3
    assert float(ratio) > 0
    fused, xla = got["timings"]
    assert len(fused["losses"]) == len(xla["losses"]) == 20
    assert fused["losses"] == got["history"]["losses"][:20]


def test_resuming_changes_nothing(whole: tuple[Path, str], tmp_path: Path) -> None:
    first = demo(tmp_path, "--stop-after", "25", "--compare-steps", "1")
    assert first.returncode == 0, first.stderr
    assert "Stopped after 25 steps" in first.stdout
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "report.json").exists()

    other = demo(tmp_path, "--resume", "--width", "64")
    assert other.returncode == 2
    assert "width=32 instead of 64" in other.stderr

    second = demo(tmp_path, "--resume", "--compare-steps", "1")
    assert second.returncode == 0, second.stderr
    assert f"25 of {STEPS} steps are done" in second.stdout
    got, want = report(tmp_path), report(whole[0])
    assert got["history"] == want["history"]
    assert got["sample"] == want["sample"]

    before = (tmp_path / "report.json").read_bytes()
    third = demo(tmp_path, "--resume")
    assert third.returncode == 0, third.stderr
    assert "Nothing is left to train" in third.stdout
    assert "Compiled" not in third.stdout
    assert third.stdout.partition("A sample")[2] == second.stdout.partition("A sample")[2] != ""
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_model_that_has_not_learned(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("not of the demo")
    run = demo(tmp_path, "--steps", "2", "--compare-steps", "1")
    assert run.returncode == 1
    assert "NOT below the unigram entropy" in run.stdout
    assert "has not learned" in run.stderr

    again = demo(tmp_path, "--stop-after", "1")
    assert again.returncode == 0, again.stderr
    assert "removing the earlier run" in again.stdout
    assert (tmp_path / "keep.txt").exists()
    assert not (tmp_path / "report.json").exists()
