"""What a run leaves behind: its history, the report at the end and the loss curve."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from trainer import Settings


@dataclasses.dataclass
class History:
    """The course of a run.

    Attributes:
        losses: Training loss of every step, in nats per byte.
        validation: Validation losses as (steps done before, nats per byte).
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "History":
        """The history from what `dataclasses.asdict` and JSON made of it."""
        return cls(fields["losses"], [(step, loss) for step, loss in fields["validation"]])


@dataclasses.dataclass(frozen=True)
class Timing:
    """The first steps of a run with one implementation.

    Attributes:
        implementation: Its name.
        compile_seconds: Time to compile the training step.
        step_seconds: Median time of a step.
        losses: Training loss of every step, in nats per byte.
    """

    implementation: str
    compile_seconds: float
    step_seconds: float
    losses: list[float]


@dataclasses.dataclass(frozen=True)
class Report:
    """The end of a run.

    Attributes:
        settings: What was trained.
        history: How it went.
        unigram_entropy: Of the validation text, in nats per byte.
        sample: Text that the model wrote.
        timings: The comparison, of "fused" and "xla" or of "xla" alone.
        fused_unavailable: Why there is no "fused" in the comparison, or "".
    """

    settings: Settings
    history: History
    unigram_entropy: float
    sample: str
    timings: list[Timing]
    fused_unavailable: str

    @property
    def validation_loss(self) -> float:
        """At the end, in nats per byte."""
        return self.history.validation[-1][1]

    @property
    def learned(self) -> bool:
        """Whether the model knows more than how often each byte occurs."""
        return self.validation_loss < self.unigram_entropy

    def save(self, path: Path) -> None:
        """Writes the report as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads what `save` wrote."""
        fields = json.loads(path.read_text())
        settings = Settings(**fields.pop("settings"))
        history = History.from_json(fields.pop("history"))
        timings = [Timing(**timing) for timing in fields.pop("timings")]
        return cls(settings=settings, history=history, timings=timings, **fields)

    def __str__(self) -> str:
        sample = "\n".join("  | " + line for line in self.sample.splitlines())
        verdict = "below" if self.learned else "NOT below"
        return (
            f"A sample of the model:\n\n{sample}\n\n{self._comparison()}\n\n"
            f"Validation loss {self.validation_loss:.3f} nats per byte: {verdict} the unigram "
            f"entropy {self.unigram_entropy:.3f}."
        )

    def _comparison(self) -> str:
        steps = len(self.timings[0].losses)
        lines = [
            f"The first {steps} steps from the same seed:",
            "",
            f"| implementation | compile [s] | step, median [ms] | loss 1 | loss {steps} |",
            "|----------------|-------------|-------------------|--------|---------|",
        ]
        for t in self.timings:
            lines.append(
                f"| {t.implementation:14} | {t.compile_seconds:11.1f} | "
                f"{1e3 * t.step_seconds:17.1f} | {t.losses[0]:6.4f} | {t.losses[-1]:7.4f} |"
            )
        if self.fused_unavailable:
            return "\n".join([*lines, "", f"No row for fused: {self.fused_unavailable}"])
        fused, xla = self.timings
        difference = max(abs(a - b) / abs(b) for a, b in zip(fused.losses, xla.losses, strict=True))
        ratio = xla.step_seconds / fused.step_seconds
        return "\n".join(
            [
                *lines,
                "",
                f"Largest relative difference of the losses: {difference:.1e}. "
                f"Step time of xla / fused: {ratio:.2f}.",
            ]
        )


def draw_losses(history: History, entropy: float, path: Path) -> None:
    """Draws the loss curve.

    Args:
        history: The course of the run.
        entropy: The unigram entropy, in nats per byte.
        path: The PNG to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(history.losses) + 1)
    axes.plot(steps, history.losses, color="tab:blue", alpha=0.6, linewidth=1, label="training")
    axes.plot(
        *zip(*history.validation, strict=True),
        color="tab:orange",
        marker="o",
        markersize=4,
        label="validation",
    )
    axes.axhline(
        entropy, color="tab:gray", linestyle="--", label=f"unigram entropy ({entropy:.2f})"
    )
    axes.set(
        title="Byte-level MoE language model on Python's reference manual",
        xlabel="step",
        ylabel="loss [nats per byte]",
        xlim=(0, len(history.losses)),
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
