"""Checks the CUDA kernel on this machine's GPU, and measures it. Needs no network.

usage: python tools/gpu_check.py [--only PART ...] [--wheels FOLDER] [--output FILE] [--limit S]

Builds the package and the programs of tests/gpu into build/gpu with this interpreter, whose
environment must have jax for CUDA, cmake, ninja, nanobind and pytest; --wheels adds those of a
folder. Everything found goes into one JSON file, named after the card and written anew after each
step, and what each step printed into build/gpu/logs. Exit status: 0 if nothing failed, 1 if
something did, 2 if nothing could be checked.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
SITE = BUILD / "site"
PACKAGES = BUILD / "packages"
PROGRAMS = BUILD / "tests" / "gpu"
LOGS = BUILD / "logs"
RESULTS = ROOT / "benchmarks" / "results"
_LISTED = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "nvidia-nvshmem-cu13")
_LAST_LINES = 30


class Machine(NamedTuple):
    """The GPU, as nvidia-smi describes it."""

    card: str
    driver: str
    capability: str


@dataclasses.dataclass
class Findings:
    """What the output of a step says.

    Attributes:
        passed: Checks that passed.
        failed: What is wrong, a text for each check that failed.
        skipped: Why checks were not made, a text for each.
        data: Measurements.
    """

    passed: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    data: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that checks something.

    Attributes:
        name: For people.
        command: What is run.
        read: Finds in its whole output what was checked.
        missing: Why it cannot run here, or None.
        timeout: Seconds.
    """

    name: str
    command: tuple[str, ...]
    read: Callable[[str], Findings]
    missing: str | None = None
    timeout: float = 3600.0


@dataclasses.dataclass
class Outcome:
    """How a step went; `status` is "passed", "failed" or "skipped"."""

    name: str
    status: str
    seconds: float
    findings: Findings
    command: str


def find_machine() -> Machine | None:
    """The first GPU, or None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    process = subprocess.run(query, capture_output=True, text=True, check=False)
    lines = process.stdout.splitlines()
    if process.returncode != 0 or not lines:
        return None
    card, driver, capability = (part.strip() for part in lines[0].split(","))
    return Machine(card, driver, capability)


def lines(output: str) -> Findings:
    """Lines that begin with "passed" or "FAILED", as the programs of tests/gpu print them."""
    findings = Findings()
    for line in output.splitlines():
        if line.startswith("passed "):
            findings.passed += 1
        elif line.startswith("FAILED "):
            findings.failed.append(line.removeprefix("FAILED ").strip())
        elif line.startswith("time "):
            findings.data.append(line.removeprefix("time "))
    return findings


def json_lines(output: str) -> Findings:
    """Measurements, an object in each line; one that says why it is "skipped" has none."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    data = [one for one in found if "skipped" not in one]
    skipped = [json.dumps(one) for one in found if "skipped" in one]
    return Findings(passed=len(data), skipped=skipped, data=data)


def sanitizer(output: str) -> Findings:
    """What compute-sanitizer says besides the program that it watches."""
    findings = lines(output)
    summaries = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    if not summaries:
        findings.failed.append("compute-sanitizer has given no summary")
    for summary in summaries:
        if int(re.match(r"\d+", summary)[0]):  # type: ignore[index]
            complaints = re.findall(r"^=+ ((?:Error|Warning|Invalid|Race).*)", output, re.M)
            findings.failed.append("; ".join([summary, *complaints[:5]]))
    return findings


def junit(file: Path) -> Callable[[str], Findings]:
    """Reads what pytest has written into a file, not its output."""

    def read(_: str) -> Findings:
        findings = Findings()
        if not file.exists():
            return Findings(failed=["pytest has written no report"])
        for case in xml.etree.ElementTree.parse(file).iter("testcase"):
            name = case.get("name", "?")
            problem = (
                case.find("failure") if case.find("failure") is not None else case.find("error")
            )
            skipped = case.find("skipped")
            if problem is not None:
                findings.failed.append(f"{name}: {problem.get('message', '')}")
            elif skipped is not None:
                findings.skipped.append(f"{name}: {skipped.get('message', '')}")
            else:
                findings.passed += 1
        return findings

    return read


def last_line(output: str) -> Findings:
    """For a step that is a check by its exit status alone."""
    return Findings(passed=1, data=output.splitlines()[-1:])


def run(step: Step, show: Callable[[Findings, float], None]) -> Outcome:
    """Runs a step; `show` is told of its progress."""
    command = " ".join(step.command)
    if step.missing is not None:
        return Outcome(step.name, "skipped", 0.0, Findings(skipped=[step.missing]), command)
    begin = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,
    )
    late = threading.Event()

    def kill() -> None:
        # Those that it has started too: its output ends only with them.
        os.killpg(process.pid, signal.SIGKILL)

    def stop() -> None:
        late.set()
        kill()

    timer = threading.Timer(step.timeout, stop)
    timer.start()
    output = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.append(line)
            show(lines("".join(output)), time.monotonic() - begin)
        status = process.wait()
    except KeyboardInterrupt:
        kill()
        raise
    finally:
        timer.cancel()
    seconds = time.monotonic() - begin
    text = "".join(output)
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / (re.sub(r"\W+", "-", step.name) + ".log")).write_text(text)
    try:
        findings = step.read(text)
    except (ValueError, xml.etree.ElementTree.ParseError) as error:
        findings = Findings(failed=[f"its output cannot be read: {error}"])
    last = "".join(output[-_LAST_LINES:])
    if late.is_set():
        findings.failed.append(f"it took more than {step.timeout:.0f} s\n{last}")
    elif status != 0 and not findings.failed:
        findings.failed.append(f"it ended with status {status}\n{last}")
    elif findings.passed == 0 and not findings.failed and not findings.skipped:
        findings.failed.append("it has checked nothing")
    verdict = "passed" if findings.passed else "skipped"
    return Outcome(step.name, "failed" if findings.failed else verdict, seconds, findings, command)


def environment() -> dict[str, str]:
    """For all steps: the package that was built comes first."""
    path = [str(SITE), str(PACKAGES), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        # cmake and ninja of this interpreter's environment rather than of the system.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "PYTHONUNBUFFERED": "1",
        # Leaves room for symmetric heaps.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }


def build_steps(wheels: Path | None) -> list[Step]:
    """What must pass before anything else is tried."""
    python = sys.executable
    script = str(Path(__file__).resolve())
    steps = []
    if wheels is not None:
        files = [str(file) for file in sorted(wheels.glob("*.whl"))]
        pip = (python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade")
        steps.append(Step("wheels", (*pip, "--target", str(PACKAGES), *files), last_line))
    return [
        *steps,
        Step("build", (python, script, "--build"), last_line),
        Step(
            "the package",
            # Without the folder of the sources, which has no extension modules.
            (python, "-P", "-c", "import flashmoe_jax._cuda as m; print(m.__file__, m.gpu(0))"),
            last_line,
        ),
    ]


def build() -> None:
    """Builds everything, and makes a package of the sources and the modules in SITE."""
    ask = "import jax, nanobind; print(jax.ffi.include_dir(), nanobind.cmake_dir(), sep='\\n')"
    answer = subprocess.run(
        [sys.executable, "-c", ask], env=environment(), check=True, capture_output=True, text=True
    )
    headers, nanobind = answer.stdout.split("\n")[:2]
    options = {
        "FLASHMOE_CUDA": "ON",
        "FLASHMOE_GPU_TESTS": "ON",
        "FLASHMOE_INTROSPECTION": "OFF",
        # The modules are for this jaxlib alone.
        "FLASHMOE_FFI_INCLUDE_DIR": headers,
        "nanobind_DIR": nanobind,
        "Python_EXECUTABLE": sys.executable,
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *defines],
        ["cmake", "--build", str(BUILD)],
        ["cmake", "--install", str(BUILD), "--prefix", str(SITE)],
    ):
        subprocess.run(command, env=environment(), check=True)
    link_package(ROOT / "flashmoe_jax", SITE / "flashmoe_jax")


def link_package(sources: Path, package: Path) -> None:
    """Puts links to the Python sources beside the extension modules."""
    for source in sources.iterdir():
        link = package / source.name
        if source.suffix == ".so" or source.name == "__pycache__" or link.exists():
            continue
        link.symlink_to(source)


def check_steps(machine: Machine) -> list[Step]:
    """Checks, then measurements."""
    hopper = (
        None if machine.capability == "9.0" else f"needs a GPU of 9.0, not {machine.capability}"
    )
    tool = find_sanitizer()
    no_tool = "compute-sanitizer is not installed" if tool is None else None
    python = (sys.executable, "-P")
    kernel = str(PROGRAMS / "kernel_check")
    report = BUILD / "pytest.xml"
    report.unlink(missing_ok=True)
    plugins = ("-p", "no:cacheprovider", "-p", "tests.gpu.failures")
    pytest = (*python, "-m", "pytest", *plugins, "-v", f"--junitxml={report}")
    # Processes that share the GPU and its memory: most of the time is XLA's compiler's. It need not
    # look for the fastest products.
    workers = min(14, os.cpu_count() or 1) if installed("pytest-xdist") else 1
    memory = f"XLA_PYTHON_CLIENT_MEM_FRACTION={0.6 / workers:.3f}"
    shared = ("env", memory, "XLA_FLAGS=--xla_gpu_autotune_level=0")
    parallel = ("-n", str(workers), "--dist", "worksteal") if workers > 1 else ()
    steps = [
        Step("primitives against the emulator's", (str(PROGRAMS / "primitives"),), lines, hopper),
        Step("gate", (str(PROGRAMS / "gate"),), lines),
        Step("kernel on 1 to 8 virtual PEs", (kernel,), lines),
        Step("1000 epochs", (kernel, "--epochs=1000", "small blocks"), lines),
    ]
    for name, options, layers in (
        ("memcheck", (), "small blocks"),
        ("racecheck", ("--racecheck-report", "all"), "each stage once"),
    ):
        watched = (kernel, "--epochs=1", "--deadline=600", "P=2", layers)
        command = (tool or "compute-sanitizer", "--tool", name, *options, *watched)
        steps.append(Step(name, command, sanitizer, no_tool))
    no_torch = None if installed("torch") else "torch is not installed"
    return [
        *steps,
        Step("through JAX", (*shared, *pytest, *parallel, "tests/gpu"), junit(report)),
        Step("kernel alone, measured", (str(PROGRAMS / "kernel_bench"),), json_lines),
        Step("through JAX, measured", (*python, "tests/gpu/jax_baseline.py"), json_lines),
        Step("torch, measured", (*python, "tests/gpu/torch_baseline.py"), json_lines, no_torch),
    ]


def find_sanitizer() -> str | None:
    """compute-sanitizer, which CUDA's toolkit does not put on PATH by itself."""
    found = shutil.which("compute-sanitizer")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    for home in filter(None, homes):
        found = found or shutil.which("compute-sanitizer", path=f"{home}/bin")
    return found


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    path = [str(PACKAGES), *sys.path]
    for distribution in importlib.metadata.distributions(name=package, path=path):
        return distribution.version
    return None


class Progress:
    """One line for each step, kept up to date on a terminal."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.number = 0
        self.last = 0.0

    def begin(self, step: Step) -> None:
        """A step starts."""
        self.number += 1
        self.step = step
        self.show(Findings(), 0.0)

    def show(self, findings: Findings, seconds: float) -> None:
        """The state of a running step; at most ten times a second, and only on a terminal."""
        if not sys.stdout.isatty() or time.monotonic() - self.last < 0.1:
            return
        self.last = time.monotonic()
        counts = f"{findings.passed} passed, {len(findings.failed)} failed, {seconds:.0f} s"
        print(f"\r\x1b[K[{self.number}/{self.steps}] {self.step.name}: {counts}", end="")
        sys.stdout.flush()

    def end(self, outcome: Outcome) -> None:
        """The step has ended: its line stays."""
        found = outcome.findings
        counts = f"{found.passed} passed, {len(found.failed)} failed, {len(found.skipped)} skipped"
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        title = f"[{self.number}/{self.steps}] {outcome.status:7} {outcome.name}"
        print(f"{start}{title}: {counts}, {outcome.seconds:.0f} s")
        for failure in found.failed:
            print(f"    FAILED {failure}")
        for reason in found.skipped:
            print(f"    skipped: {reason}")
        sys.stdout.flush()


def run_all(
    first: Sequence[Step],
    then: Sequence[Step],
    report: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Runs all steps; if one of the first fails, those after it do not run, and count as failed.

    `report` is given all outcomes so far after each step.
    """
    progress = Progress(len(first) + len(then))
    outcomes: list[Outcome] = []
    blocked = None
    for step in (*first, *then):
        progress.begin(step)
        if blocked is None:
            outcome = run(step, progress.show)
        else:
            reason = Findings(failed=[f"not tried, since {blocked!r} failed"])
            outcome = Outcome(step.name, "failed", 0.0, reason, " ".join(step.command))
        progress.end(outcome)
        outcomes.append(outcome)
        report(outcomes)
        if step in first and outcome.status == "failed":
            blocked = blocked or step.name
    return outcomes


def summary(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many steps, and how many of their checks, ended how."""
    counts = {f"steps {status}": 0 for status in ("passed", "failed", "skipped")}
    for outcome in outcomes:
        counts[f"steps {outcome.status}"] += 1
    for status in ("passed", "failed", "skipped"):
        each = (getattr(outcome.findings, status) for outcome in outcomes)
        counts[f"checks {status}"] = sum(n if isinstance(n, int) else len(n) for n in each)
    return counts


def write(file: Path, machine: Machine, outcomes: Sequence[Outcome], left_out: list[str]) -> None:
    """Writes the report."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    report = {
        **machine._asdict(),
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "python": sys.version.split()[0],
        "packages": {name: installed(name) for name in _LISTED},
        "summary": summary(outcomes),
        "left_out": left_out,
        "steps": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another machine need not know where this one keeps the project.
    text = json.dumps(report, indent=1).replace(str(ROOT), ".")
    file.write_text(text.replace(sys.executable, "python") + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="of steps' names")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="packages to be used too")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the JSON report")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds that a step may take")
    parser.add_argument("--build", action="store_true", help="only build")
    options = parser.parse_args(arguments)
    if options.build:
        build()
        return 0
    machine = find_machine()
    if machine is None:
        print("gpu-check needs an NVIDIA GPU, and nvidia-smi finds none. Nothing was checked.")
        return 2
    print(f"{machine.card}, compute capability {machine.capability}, driver {machine.driver}")
    steps = check_steps(machine)
    chosen = [s for s in steps if not options.only or any(p in s.name for p in options.only)]
    if not chosen:
        print(f"No step has such a name; they are: {', '.join(step.name for step in steps)}")
        return 2
    if options.limit is not None:
        chosen = [dataclasses.replace(step, timeout=options.limit) for step in chosen]
    left_out = [step.name for step in steps if step.name not in {one.name for one in chosen}]
    slug = re.sub(r"\W+", "-", machine.card.lower()).strip("-")
    today = datetime.date.today().isoformat()
    file = options.output or RESULTS / f"gpu-check-{slug}-{today}.json"
    outcomes = run_all(
        build_steps(options.wheels),
        chosen,
        lambda outcomes: write(file, machine, outcomes, left_out),
    )
    counts = summary(outcomes)
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"-> {file}")
    return 1 if counts["steps failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
