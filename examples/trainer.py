"""Settings, sharded training state and compiled steps of the language model."""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import language_model
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flashmoe_jax as fm

EXPERT_AXIS = "expert"
SAMPLE_LENGTH = 400
SAMPLE_TEMPERATURE = 0.7


def _option(default: float, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained, and how. A run goes on only with the settings that it began with."""

    blocks: int = _option(3, "transformer blocks")
    width: int = _option(128, "width of the model (H)")
    heads: int = _option(4, "attention heads")
    experts: int = _option(16, "experts of every block (E)")
    experts_per_token: int = _option(2, "experts that every byte is sent to (K)")
    expert_width: int = _option(256, "width inside an expert (D)")
    length: int = _option(128, "bytes per window")
    batch: int = _option(16, "windows per step, over all devices")
    steps: int = _option(600, "training steps")
    learning_rate: float = _option(3e-3, "largest learning rate, reached after the warm-up")
    weight_decay: float = _option(0.1, "weight decay of AdamW")
    balance_weight: float = _option(1e-2, "weight of the load-balance loss")
    z_weight: float = _option(1e-3, "weight of the router's z-loss")
    seed: int = _option(0, "seed of parameters, batches and sample")


QUICK = Settings(
    blocks=2,
    width=32,
    heads=2,
    experts=8,
    expert_width=32,
    length=32,
    steps=60,
    learning_rate=1e-2,
)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What one training step tells.

    Attributes:
        loss: Cross entropy in nats per byte.
        balance: Rows of the busiest expert over the mean, averaged over the blocks; 1 is perfect.
    """

    loss: float
    balance: float


class Trainer:
    """A model in training: its state on a mesh, and what can be done with it.

    To be used under `jax.set_mesh(mesh)`.

    Args:
        settings: What is trained.
        mesh: Devices, along the one axis `EXPERT_AXIS`. Windows and experts are shared out over
            them, everything else is on all of them.
        implementation: Of the Mixture-of-Experts layers: "auto", "fused", "xla" or "dense".

    Attributes:
        settings: As given.
        state: Model and optimizer.
    """

    def __init__(
        self, settings: Settings, mesh: Mesh, implementation: language_model.Implementation
    ) -> None:
        self.settings = settings
        self._windows = NamedSharding(mesh, PartitionSpec(EXPERT_AXIS))
        model = language_model.LanguageModel(
            fm.MoEConfig(
                num_experts=settings.experts,
                experts_per_token=settings.experts_per_token,
                hidden_size=settings.width,
                intermediate_size=settings.expert_width,
            ),
            blocks=settings.blocks,
            heads=settings.heads,
            implementation=implementation,
            rngs=nnx.Rngs(settings.seed),
        )
        optimizer = nnx.Optimizer(model, _optimizer(settings), wrt=nnx.Param)
        self._graph, state = nnx.split((model, optimizer))
        # The experts are sharded already; this puts everything else on every device.
        self._shardings = nnx.get_named_sharding(state, mesh)
        self.state = jax.device_put(state, self._shardings)
        self._loss = jax.jit(self._evaluate, in_shardings=(self._shardings, self._windows))
        self._text = jax.jit(self._generate, in_shardings=(self._shardings, None, None))

    def compile(self) -> float:
        """Compiles the training step, for `step`; returns the seconds that it took."""
        start = time.perf_counter()
        step = jax.jit(
            self._train_step,
            donate_argnums=0,
            in_shardings=(self._shardings, self._windows),
            out_shardings=(self._shardings, None),
        )
        shape = (self.settings.batch, self.settings.length + 1)
        windows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._windows)
        self._step = step.lower(self.state, windows).compile()
        return time.perf_counter() - start

    def step(self, windows: np.ndarray) -> Metrics:
        """Trains on int32 windows [batch, length + 1]; returns when the step is complete."""
        self.state, metrics = self._step(self.state, jax.device_put(windows, self._windows))
        loss, balance = jax.device_get(metrics)
        return Metrics(float(loss), float(balance))

    def evaluate(self, batches: Iterable[np.ndarray]) -> float:
        """The mean loss, in nats per byte, of batches of int32 windows [batch, length + 1]."""
        losses = [self._loss(self.state, jax.device_put(b, self._windows)) for b in batches]
        return float(np.mean(jax.device_get(losses)))

    def sample(self, prompt: str) -> str:
        """Continues the prompt to a text of `SAMPLE_LENGTH` bytes."""
        tokens = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8), jnp.int32)
        text = self._text(self.state, tokens, jax.random.key(self.settings.seed))
        return bytes(np.asarray(text, np.uint8)).decode(errors="replace")

    def _train_step(
        self, state: nnx.State, windows: jax.Array
    ) -> tuple[nnx.State, tuple[jax.Array, jax.Array]]:
        model, optimizer = nnx.merge(self._graph, state)

        def objective(
            model: language_model.LanguageModel,
        ) -> tuple[jax.Array, tuple[jax.Array, fm.MoEAux]]:
            loss, aux = language_model.cross_entropy(model, windows)
            total = (
                loss
                + self.settings.balance_weight * aux.load_balance_loss.sum()
                + self.settings.z_weight * aux.z_loss.sum()
            )
            return total, (loss, aux)

        gradients, (loss, aux) = nnx.grad(objective, has_aux=True)(model)
        optimizer.update(model, gradients)
        rows = aux.tokens_per_expert
        balance = (rows.max(-1) / rows.mean(-1)).mean()
        return nnx.state((model, optimizer)), (loss, balance)

    def _evaluate(self, state: nnx.State, windows: jax.Array) -> jax.Array:
        model, _ = nnx.merge(self._graph, state)
        return language_model.cross_entropy(model, windows)[0]

    def _generate(self, state: nnx.State, prompt: jax.Array, key: jax.Array) -> jax.Array:
        model, _ = nnx.merge(self._graph, state)
        return language_model.generate(
            model, prompt, SAMPLE_LENGTH, self.settings.length, SAMPLE_TEMPERATURE, key
        )


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    warmup_steps = max(1, settings.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=settings.learning_rate / warmup_steps,
        peak_value=settings.learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 20,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=settings.weight_decay),
    )
