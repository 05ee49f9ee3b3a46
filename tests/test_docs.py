"""The examples of the documentation run, in the order of their page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe_jax as fm

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples(page: Path) -> str:
    """All examples of a page as one program, each at its line of the page."""
    text, program = page.read_text(), ""
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        program += "\n" * (line - program.count("\n")) + block.group(1)
    return program


def run(page: Path) -> None:
    exec(compile(examples(page), page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize(
    "page", [page for page in PAGES if _BLOCK.search(page.read_text())], ids=lambda page: page.stem
)
def test_examples_run(page: Path) -> None:
    run(page)


def test_every_page_on_use_has_examples() -> None:
    with_examples = {page.stem for page in PAGES if _BLOCK.search(page.read_text())}
    assert {"index", "flax", "routing", "meshes", "checkpoints", "errors"} <= with_examples


def test_a_broken_example_fails_at_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\nText.\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as failure:
        run(page)
    assert failure.traceback[-1].lineno == 9  # counted from 0


def build_site(folder: Path, page: str) -> "subprocess.CompletedProcess[str]":
    """Builds a site of one page with the settings of `make docs`."""
    (folder / "docs").mkdir(exist_ok=True)
    (folder / "docs" / "index.md").write_text(page)
    (folder / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nsite_dir: site\nnav: [index.md]\n"
    )
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", folder / "mkdocs.yml"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("[elsewhere](nowhere.md)", "nowhere.md"),
        ("[there](#no-such-part)", "no-such-part"),
        ("::: flashmoe_jax.no_such_function", "no_such_function"),
    ],
    ids=["page", "anchor", "name of the API"],
)
def test_the_site_is_not_built_with_a_broken_link(
    tmp_path: Path, fault: str, complaint: str
) -> None:
    right = build_site(tmp_path, "# Title\n\n[here](#title)\n\n::: flashmoe_jax.moe\n")
    assert right.returncode == 0, right.stderr
    wrong = build_site(tmp_path, f"# Title\n\n{fault}\n")
    assert wrong.returncode != 0
    assert complaint in wrong.stderr


def test_the_reference_has_everything_public() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    named = set(re.findall(r"^::: flashmoe_jax\.(\S+)$", reference, re.MULTILINE))
    layers = {f"layers.{api}.MoE" for api in ("nnx", "linen")}
    public = {name for name in fm.__all__ if not name.startswith("__")} - {"MoE"}
    assert named == public | layers | {"profiling", "runtime"}


def test_every_message_on_the_page_of_errors_exists() -> None:
    """What the table of errors quotes is what the sources say."""
    sources = "\n".join(
        path.read_text()
        for folder, pattern in (("flashmoe_jax", "*.py"), ("kernels", "*.cc"))
        for path in (ROOT / folder).rglob(pattern)
    )
    # Numbers, names of variables and adjacent string literals differ.
    joined = re.sub(r'"\s*\n?\s*(\+ )?f?"', "", sources)
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    assert len(rows) > 5
    for row in rows:
        for quoted in re.findall(r"`([^`]+)`", row):
            words = re.split(r"PEs?|\d+|'\w+'|…|nan|[()]|FLASHMOE_\w+", quoted)
            for part in (word.strip(" :,=") for word in words):
                assert part in joined or not part, f"{part!r} of {quoted!r}"


def test_the_page_of_errors_has_every_failure_of_the_kernel() -> None:
    cuda = ROOT / "kernels" / "cuda"
    raised = {
        name
        for header in cuda.glob("*.h")
        if header.name != "workspace.h"
        for name in re.findall(r"Failure::k(\w+)", header.read_text())
    }
    cases = re.findall(
        r"case Failure::k(\w+):\s*return (.*?);", (cuda / "failure.cc").read_text(), re.DOTALL
    )
    page = (ROOT / "docs" / "errors.md").read_text()
    described = set()
    for name, message in cases:
        # What the page quotes of the first literal: numbers stand where the literal ends.
        text = re.findall(r'"([^"]+)"', message)[0].strip(" (")
        if text in page:
            described.add(name)
    assert "Counts" in raised
    assert raised <= described, raised - described
