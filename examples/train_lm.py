"""Trains a byte-level Mixture-of-Experts language model on Python's own reference manual.

Every block of the transformer has a `flashmoe_jax.MoE` layer whose experts are shared out over the
devices: 8 virtual CPU devices on a machine without an accelerator. The end compares the fused
implementation with the pure JAX one and checks that the model has learned: its validation loss must
lie below the unigram entropy of the validation text, which no model without context can beat.

    python examples/train_lm.py             # a few minutes on two CPU cores
    python examples/train_lm.py --resume    # goes on after an interruption
"""

import argparse
import dataclasses
import math
import os
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

# Concerns the CPU platform only, so it is harmless beside an accelerator. A value that is already
# in the environment comes later and wins.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)

import jax
import numpy as np
import reference_text
from checkpoints import Checkpoints, OtherSettingsError
from jax.sharding import AxisType, Mesh
from report import History, Report, Timing, draw_losses
from tqdm import tqdm
from trainer import EXPERT_AXIS, QUICK, Settings, Trainer

PROMPT = "The "
VALIDATIONS = 20
CHECKPOINTS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports. Returns the exit status: 0 if the model has learned."""
    args, settings = parse(argv)
    output: Path = args.output
    if not args.resume:
        remove_earlier_run(output)
    training, validation = reference_text.load()
    entropy = reference_text.unigram_entropy(validation)
    mesh = make_mesh(settings)
    print(
        f"{training.size:,} bytes of text to train on, {validation.size:,} to validate on.\n"
        f"{mesh.size} devices ({jax.devices()[0].device_kind}) share out the {settings.experts} "
        f"experts in each of {settings.blocks} blocks."
    )

    def batch(step: int) -> np.ndarray:
        return reference_text.training_batch(
            training, step, settings.batch, settings.length + 1, settings.seed
        )

    with jax.set_mesh(mesh), Checkpoints(output / "checkpoints", settings) as checkpoints:
        trainer = Trainer(settings, mesh, args.implementation)
        try:
            history = checkpoints.restore(trainer)
        except OtherSettingsError as error:
            print(error, file=sys.stderr)
            return 2
        done = len(history.losses)
        if args.resume:
            finished = " Nothing is left to train." if done == settings.steps else ""
            print(f"Resuming {output}: {done} of {settings.steps} steps are done.{finished}")
        end = settings.steps if args.stop_after is None else done + args.stop_after
        windows = reference_text.validation_windows(validation, settings.batch, settings.length + 1)
        train(trainer, history, checkpoints, batch, windows, min(end, settings.steps))
        draw_losses(history, entropy, output / "loss.png")
        if len(history.losses) < settings.steps:
            print(f"Stopped after {len(history.losses)} steps; --resume goes on.")
            return 0
        report_file = output / "report.json"
        if not report_file.exists():
            print(f"Training the first {args.compare_steps} steps again with fused and with xla.")
            timings, fused_unavailable = compare(settings, mesh, batch, args.compare_steps)
            print("Writing a sample.")
            sample = trainer.sample(PROMPT)
            Report(
                settings=settings,
                history=history,
                unigram_entropy=entropy,
                sample=sample,
                timings=timings,
                fused_unavailable=fused_unavailable,
            ).save(report_file)
    report = Report.load(report_file)
    print(f"\n{report}\nLoss curve: {output / 'loss.png'}")
    if not report.learned:
        print("The model has not learned: train longer (--steps).", file=sys.stderr)
    return 0 if report.learned else 1


def train(
    trainer: Trainer,
    history: History,
    checkpoints: Checkpoints,
    batch: Callable[[int], np.ndarray],
    validation: Sequence[np.ndarray],
    end: int,
) -> None:
    """Trains up to step `end`, validating and saving on the way, with a progress bar."""
    settings = trainer.settings
    done = len(history.losses)
    if done >= end:
        return
    if not done:
        history.validation.append((0, trainer.evaluate(validation)))
    print(f"Compiled the training step in {trainer.compile():.1f} s.")
    durations: deque[float] = deque(maxlen=20)
    with tqdm(initial=done, total=settings.steps, unit="step", dynamic_ncols=True) as bar:
        for step in range(done, end):
            start = time.perf_counter()
            metrics = trainer.step(batch(step))
            durations.append(time.perf_counter() - start)
            history.losses.append(metrics.loss)
            done = step + 1
            if done % max(1, settings.steps // VALIDATIONS) == 0 or done == settings.steps:
                history.validation.append((done, trainer.evaluate(validation)))
            if done % max(1, settings.steps // CHECKPOINTS) == 0 or done == end:
                checkpoints.save(trainer, history)
            rate = settings.batch * settings.length / statistics.median(durations)
            bar.set_postfix_str(
                f"loss {metrics.loss:.3f}, validation {history.validation[-1][1]:.3f}, "
                f"{rate:,.0f} tokens/s, busiest/mean expert {metrics.balance:.2f}",
                refresh=False,
            )
            bar.update()


def compare(
    settings: Settings, mesh: Mesh, batch: Callable[[int], np.ndarray], steps: int
) -> tuple[list[Timing], str]:
    """Trains the first steps with "fused" and "xla", in turns, so that both meet the same load.

    Returns:
        The timings, and why "fused" is not among them, or "".
    """
    fused_unavailable = ""
    trainers, compile_seconds = {}, {}
    for name in ("fused", "xla"):
        trainer = Trainer(settings, mesh, name)
        try:
            compile_seconds[name] = trainer.compile()
        except ValueError as error:
            if name != "fused":
                raise
            fused_unavailable = str(error)
        else:
            trainers[name] = trainer
    durations: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    for step in tqdm(range(steps), desc=" and ".join(trainers), unit="step", dynamic_ncols=True):
        windows = batch(step)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            losses[name].append(trainer.step(windows).loss)
            durations[name].append(time.perf_counter() - start)
    timings = [
        Timing(name, compile_seconds[name], statistics.median(durations[name]), losses[name])
        for name in trainers
    ]
    return timings, fused_unavailable


def make_mesh(settings: Settings) -> Mesh:
    """A mesh of as many devices as divide both the experts and the windows of a batch."""
    size = math.gcd(len(jax.devices()), settings.experts, settings.batch)
    return jax.make_mesh(
        (size,), (EXPERT_AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:size]
    )


def remove_earlier_run(output: Path) -> None:
    """Removes what an earlier run of this script left in its output folder, and nothing else."""
    checkpoints = output / "checkpoints"
    if checkpoints.exists():
        print(f"Beginning anew: removing the earlier run in {output} (--resume would go on).")
        shutil.rmtree(checkpoints)
    (output / "report.json").unlink(missing_ok=True)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Trains a small Mixture-of-Experts language model on the text of Python's own "
        "reference manual, and compares the fused implementation with the pure JAX one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/train_lm"), help="folder for everything written"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--stop-after",
        type=positive,
        metavar="N",
        help="stop after N more steps, as if time were up",
    )
    parser.add_argument(
        "--implementation",
        choices=("auto", "fused", "xla", "dense"),
        default="auto",
        help="of the Mixture-of-Experts layers",
    )
    parser.add_argument(
        "--compare-steps",
        type=positive,
        default=20,
        metavar="N",
        help="steps of the final comparison",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few steps, to see that it works"
    )
    training = parser.add_argument_group("training (defaults without --quick)")
    for field in dataclasses.fields(Settings):
        training.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            metavar="N" if isinstance(field.default, int) else "X",
            help=field.metadata["help"],
        )
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**dataclasses.asdict(QUICK))
        args = parser.parse_args(argv)
    return args, Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Settings)})


def positive(text: str) -> int:
    """A command line value that must be a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted; --resume goes on from the last checkpoint.")
