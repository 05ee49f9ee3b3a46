"""Checkpoints of a run: the training state and the history that led to it, kept together."""

import dataclasses
from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp
from report import History
from trainer import Settings, Trainer


class OtherSettingsError(ValueError):
    """A checkpoint belongs to a run with other settings."""


class Checkpoints:
    """The latest checkpoints of a run in a folder; a context manager.

    Args:
        folder: Where they are; made if it does not exist.
        settings: Of the run.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._folder = folder
        self._settings = dataclasses.asdict(settings)
        # Synchronous: the training step donates the very buffers that are being written.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def save(self, trainer: Trainer, history: History) -> None:
        """Writes a checkpoint under the number of steps done."""
        run = {"settings": self._settings, "history": dataclasses.asdict(history)}
        self._manager.save(
            len(history.losses),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(trainer.state), run=ocp.args.JsonSave(run)
            ),
        )

    def restore(self, trainer: Trainer) -> History:
        """Puts the latest checkpoint into the trainer and returns its history.

        Without a checkpoint the trainer stays as it is and the history is empty. The devices may be
        others than those that wrote the checkpoint.

        Raises:
            OtherSettingsError: The checkpoint belongs to a run with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return History()
        run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        differences = [
            f"{name}={run['settings'].get(name)!r} instead of {value!r}"
            for name, value in self._settings.items()
            if run["settings"].get(name) != value
        ]
        if differences:
            raise OtherSettingsError(
                f"the checkpoint in {self._folder} was written with {', '.join(differences)}; "
                "resume with its settings or choose another --output"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trainer.state)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        trainer.state = restored.state
        return History.from_json(run["history"])
