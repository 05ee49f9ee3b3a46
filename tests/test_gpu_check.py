"""What `make gpu-check` makes of what it runs, with small programs in place of those on a GPU."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_tools import load


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load("gpu_check")
    monkeypatch.setattr(module, "LOGS", tmp_path / "logs")
    return module


def program(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


def ignore(*_: object) -> None:
    pass


GOOD = "print('passed 0.1 s  one'); print('passed two')"


@pytest.mark.parametrize(
    ("text", "status", "complaint"),
    [
        (GOOD, "passed", None),
        (GOOD + "; print('FAILED three: off by one')", "failed", "three: off by one"),
        (GOOD + "; import sys; sys.exit(3)", "failed", "it ended with status 3"),
        (GOOD + "; import os; os.abort()", "failed", "it ended with status -6"),
        ("print('nothing of note')", "failed", "it has checked nothing"),
        (GOOD + "; import time; time.sleep(60)", "failed", "it took more than 2 s"),
        # It waits for another one, which has its output too.
        (
            GOOD + "; import subprocess; subprocess.run(['sleep', '60'])",
            "failed",
            "it took more than 2 s",
        ),
    ],
)
def test_a_program_of_checks(
    check: ModuleType, text: str, status: str, complaint: str | None
) -> None:
    shown = []
    step = check.Step("a step", program("import sys; " + text), check.lines, timeout=2.0)
    outcome = check.run(step, lambda findings, seconds: shown.append(findings.passed))
    assert outcome.status == status
    assert outcome.seconds < 60  # whoever is stopped does not sleep to the end
    if complaint is None:
        assert (outcome.findings.passed, outcome.findings.failed) == (2, [])
        assert shown == [1, 2]
    else:
        assert any(failure.startswith(complaint) for failure in outcome.findings.failed)


def test_a_step_that_this_machine_cannot_run(check: ModuleType) -> None:
    step = check.Step("a step", ("no-such-program",), check.lines, missing="no such card")
    outcome = check.run(step, ignore)
    assert outcome.status == "skipped"
    assert outcome.findings.skipped == ["no such card"]


def test_measurements(check: ModuleType) -> None:
    text = (
        """print('text'); print('{"ms": 1.5}'); print('{"baseline": "b", "skipped": "no room"}')"""
    )
    findings = check.run(check.Step("a step", program(text), check.json_lines), ignore).findings
    assert (findings.passed, findings.data) == (1, [{"ms": 1.5}])
    assert findings.skipped == ['{"baseline": "b", "skipped": "no room"}']
    broken = check.run(check.Step("a step", program("print('{')"), check.json_lines), ignore)
    assert broken.status == "failed"


@pytest.mark.parametrize(
    ("summary", "complaint"),
    [
        ("========= ERROR SUMMARY: 0 errors", None),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", None),
        ("========= ERROR SUMMARY: 12 errors", "12 errors"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "1 hazard"),
        ("", "compute-sanitizer has given no summary"),
    ],
)
def test_a_sanitizer(check: ModuleType, summary: str, complaint: str | None) -> None:
    findings = check.sanitizer(f"passed one\n========= Error: Race reported\n{summary}\n")
    assert findings.passed == 1
    if complaint is None:
        assert not findings.failed
    else:
        assert findings.failed[0].startswith(complaint)


def test_a_run_of_pytest(check: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_not_here(): pytest.skip('no such thing')\n"
    )
    file = tmp_path / "report.xml"
    command = (sys.executable, "-m", "pytest", str(tmp_path), f"--junitxml={file}")
    outcome = check.run(check.Step("a step", command, check.junit(file)), ignore)
    assert outcome.status == "failed"
    assert outcome.findings.passed == 1
    assert outcome.findings.skipped == ["test_not_here: no such thing"]
    (failure,) = outcome.findings.failed
    assert failure.startswith("test_wrong: ")
    assert check.junit(tmp_path / "none.xml")("").failed == ["pytest has written no report"]


def test_nothing_runs_after_a_build_that_fails(
    check: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = check.Step("build", program("import sys; sys.exit(1)"), check.last_line)
    good = check.Step("a step", program(GOOD), check.lines)
    outcomes = check.run_all([bad], [good])
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert outcomes[1].findings.failed == ["not tried, since 'build' failed"]
    assert "FAILED not tried, since 'build' failed" in capsys.readouterr().out
    # One that is no part of the build keeps nobody.
    assert [outcome.status for outcome in check.run_all([good], [bad, good])][1:] == [
        "failed",
        "passed",
    ]


MACHINE = ("NVIDIA Test 80GB", "580.1", "8.0")


def run_main(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, file: Path, *texts: str
) -> tuple[int, dict[str, object]]:
    steps = [check.Step(f"step {i}", program(text), check.lines) for i, text in enumerate(texts)]
    monkeypatch.setattr(check, "find_machine", lambda: check.Machine(*MACHINE))
    monkeypatch.setattr(check, "build_steps", lambda wheels: [])
    monkeypatch.setattr(check, "check_steps", lambda machine: steps)
    status = check.main(["--output", str(file)])
    return status, json.loads(file.read_text())


def test_the_report(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    status, report = run_main(check, monkeypatch, file, GOOD, GOOD)
    assert status == 0
    assert report["card"] == "NVIDIA Test 80GB"
    assert report["summary"] == {
        "steps passed": 2,
        "steps failed": 0,
        "steps skipped": 0,
        "checks passed": 4,
        "checks failed": 0,
        "checks skipped": 0,
    }
    assert str(check.ROOT) not in file.read_text()
    assert sys.executable not in file.read_text()

    # What was found stays if the next step never ends; and all that a step printed is kept.
    look = f"print('passed', 'steps passed\": 1' in open({str(file)!r}).read())"
    status, report = run_main(check, monkeypatch, file, GOOD, look)
    assert (tmp_path / "logs" / "step-1.log").read_text() == "passed True\n"

    status, report = run_main(check, monkeypatch, file, GOOD, "print('FAILED it')")
    assert status == 1
    assert report["steps"][1]["findings"]["failed"] == ["it"]


def test_only_some_steps(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    run_main(check, monkeypatch, file, GOOD, GOOD)
    assert check.main(["--output", str(file), "--only", "step 1"]) == 0
    report = json.loads(file.read_text())
    assert report["left_out"] == ["step 0"]
    assert [step["name"] for step in report["steps"]] == ["step 1"]
    assert check.main(["--only", "step 7"]) == 2


def test_without_a_gpu(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.shutil, "which", lambda name: None)
    assert check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().out


def test_the_steps(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_sanitizer", lambda: None)
    monkeypatch.setattr(check, "installed", lambda package: None)
    older = {step.name: step for step in check.check_steps(check.Machine(*MACHINE))}
    skipped = {name: step.missing for name, step in older.items() if step.missing}
    assert skipped == {
        "primitives against the emulator's": "needs a GPU of 9.0, not 8.0",
        "memcheck": "compute-sanitizer is not installed",
        "racecheck": "compute-sanitizer is not installed",
        "torch, measured": "torch is not installed",
    }
    monkeypatch.setattr(check, "find_sanitizer", lambda: "/opt/compute-sanitizer")
    monkeypatch.setattr(check, "installed", lambda package: "2.8")
    hopper = check.check_steps(check.Machine("H", "1", "9.0"))
    assert not any(step.missing for step in hopper)
    for step in hopper:
        sources = [Path(part) for part in step.command if part.startswith("tests/gpu")]
        assert all((check.ROOT / source).exists() for source in sources)
    # The layers that steps choose by parts of their names are there.
    layers = (check.ROOT / "tests" / "gpu" / "kernel_check.cc").read_text()
    kernel = str(check.PROGRAMS / "kernel_check")
    choices = [
        part
        for step in hopper
        if kernel in step.command
        for part in step.command[step.command.index(kernel) + 1 :]
        if not part.startswith("--")
    ]
    assert len(choices) == 5
    assert all(choice in layers for choice in choices)


def test_the_package_that_is_checked(check: ModuleType, tmp_path: Path) -> None:
    sources, package = tmp_path / "sources", tmp_path / "package"
    for folder in (sources, package):
        folder.mkdir()
    for name in ("api.py", "_ext.abi3.so"):
        (sources / name).write_text(f"of the sources: {name}")
    (sources / "layers").mkdir()
    (package / "_ext.abi3.so").write_text("built")
    for _ in range(2):
        check.link_package(sources, package)
    assert (package / "api.py").read_text() == "of the sources: api.py"
    assert (package / "layers").is_dir()
    assert (package / "_ext.abi3.so").read_text() == "built"
