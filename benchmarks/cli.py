"""The command: chooses cases, has them measured in a clean process, and reports."""

import argparse
import dataclasses
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import memory, platform, plots, report, suites, targets
from benchmarks.cases import Group
from benchmarks.request import Options, Request, Setting
from benchmarks.results import CaseResult, GroupResult, Results, decode, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 1 if an opponent failed or was refused."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    groups = suites.select(suites.SUITES[options.suite](), options.filter, options.opponent)
    if options.list:
        for group in groups:
            for case in group.cases:
                print(f"{group.name}: {case.name}")
        return 0
    if options.report is not None:
        path, results = options.report, load(options.report)
    else:
        if not groups:
            print("no case matches; see --list", file=sys.stderr)
            return 2
        results = _measure(groups, options, given)
        path = options.output or _default_path(results)
    results = dataclasses.replace(results, targets=targets.evaluate(results))
    if options.report is None:
        results.save(path)
    # The documentation's pictures lie beside it, where its site finds them.
    beside = DOCUMENT.with_suffix("") / path.stem if options.update_docs else path.with_suffix("")
    pictures = plots.draw(results, beside)
    report.to_terminal(results)
    for written in (path, *pictures):
        print(f"{'read' if written == options.report else 'wrote'} {written}")
    if options.update_docs:
        report.update_document(DOCUMENT, results, pictures)
        print(f"wrote {DOCUMENT}")
    return 1 if _bad(results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, allow_abbrev=False
    )
    defaults = Options()
    parser.add_argument("--suite", choices=sorted(suites.SUITES), default="quick")
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="REGEX",
        help="only cases that it is found in, see --list; may be repeated",
    )
    parser.add_argument(
        "--opponent",
        action="append",
        default=[],
        choices=suites.ALL,
        help="only this one; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="list the cases and end")
    parser.add_argument(
        "--budget",
        type=float,
        default=defaults.budget,
        metavar="SECONDS",
        help="of repetitions, for each group of cases (default: %(default)g)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help=f"exactly so many of each call (default: {defaults.least} to {defaults.most})",
    )
    parser.add_argument(
        "--memory",
        nargs="?",
        const="",
        metavar="REGEX",
        help="measure peak memory too, each in its own process (of cases that it is found in)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="JSON", help=f"default: {RESULTS.name}/PROCESSOR-DATE.json"
    )
    parser.add_argument(
        "--report", type=Path, metavar="JSON", help="report earlier results; measure nothing"
    )
    parser.add_argument(
        "--update-docs",
        action="store_true",
        help=f"put tables and plots into {DOCUMENT.relative_to(ROOT)}",
    )
    return parser


def _measure(
    groups: Sequence[Group], arguments: argparse.Namespace, given: Sequence[str]
) -> Results:
    environment, warnings = platform.child_environment(os.environ)
    for warning in warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    options = Options(budget=arguments.budget)
    if arguments.repetitions is not None:
        count = arguments.repetitions
        options = dataclasses.replace(options, least=count, most=count)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    setting, found = measure_groups(groups, options, environment)
    if arguments.memory is not None:
        found = [_with_memory(group, arguments.memory, environment) for group in found]
    return Results(
        command=_command(given),
        date=date,
        commit=_commit(),
        machine=setting.machine,
        versions=setting.versions,
        environment=setting.environment,
        warnings=warnings,
        options=dataclasses.asdict(options),
        groups=tuple(found),
    )


def measure_groups(
    groups: Sequence[Group], options: Options, environment: Mapping[str, str]
) -> tuple[Setting, list[GroupResult]]:
    """Measures in one process; where it dies, the group is given up and another one goes on.

    Args:
        groups: What to measure.
        options: How thoroughly.
        environment: For the process.

    Raises:
        RuntimeError: The process could not even say where it runs.
    """
    left = list(groups)
    found: list[GroupResult] = []
    setting: Setting | None = None
    while left:
        request = Request(groups=tuple(left), options=options)
        with tempfile.TemporaryDirectory() as folder:
            answers = Path(folder) / "answers.jsonl"
            process = subprocess.run(
                [sys.executable, "-m", "benchmarks.measure", str(answers)],
                input=json.dumps(dataclasses.asdict(request)),
                text=True,
                env=dict(environment),
                cwd=ROOT,
                check=False,
            )
            lines = answers.read_text().splitlines() if answers.exists() else []
        if not lines:
            raise RuntimeError(f"the measuring process failed: status {process.returncode}")
        setting = decode(Setting, json.loads(lines[0]))
        measured = [decode(GroupResult, json.loads(line)) for line in lines[1:]]
        found += measured
        left = left[len(measured) :]
        if left:
            reason = f"the measuring process died in this group: status {process.returncode}"
            found.append(_lost(left.pop(0), reason))
    assert setting is not None  # there is at least one group
    return setting, found


def _lost(group: Group, reason: str) -> GroupResult:
    cases = (CaseResult(case=case, status="skipped", reason=reason) for case in group.cases)
    return GroupResult(name=group.name, cases=tuple(cases))


def _with_memory(group: GroupResult, pattern: str, environment: Mapping[str, str]) -> GroupResult:
    def with_memory(result: CaseResult) -> CaseResult:
        if not re.search(pattern, f"{group.name}: {result.case.name}"):
            return result
        runs = (
            dataclasses.replace(run, memory=memory.peak(result.case, run, environment, ROOT))
            if run.timing is not None
            else run
            for run in result.runs
        )
        return dataclasses.replace(result, runs=tuple(runs))

    return dataclasses.replace(group, cases=tuple(with_memory(case) for case in group.cases))


def _command(given: Sequence[str]) -> str:
    """What to type to measure the same; where the results went does not matter for that."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--output")
    _, rest = parser.parse_known_args(given)
    return shlex.join(["python", "-m", "benchmarks", *rest])


def _commit() -> str:
    """The commit of the sources, with "-dirty" if they were changed; empty outside of git."""

    def git(*arguments: str) -> str | None:
        process = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return process.stdout.strip() if process.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changes = git("status", "--porcelain", "--", "flashmoe_jax", "kernels", "benchmarks/*.py")
    except OSError:
        return ""
    return "" if commit is None else commit + ("-dirty" if changes else "")


def _default_path(results: Results) -> Path:
    name = platform.file_name(results.machine.processor)
    return RESULTS / f"{name}-{results.date[:10]}.json"


def _bad(results: Results) -> bool:
    """Whether an opponent failed or computed something wrong."""
    return any(
        case.status == "refused" or any(run.status == "failed" for run in case.runs)
        for group in results.groups
        for case in group.cases
    )
