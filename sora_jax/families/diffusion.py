"""Training of discrete diffusion, Gaussian or binomial, on examples of one shape: the line from 2015 to DDPM.

Each example of a batch of n draws a step of its own, spread evenly over the batch (arXiv:2107.00630, appendix I.1):

(1)  t_i = floor(T (u + i / n mod 1)),  u ~ U(0, 1)

and the loss is, averaged over examples,

(2)  `simple`  the squared error of the prediction, averaged over values               arXiv:2006.11239, Eq. 14
(3)  `hybrid`  (2) plus 0.001 T times the bound's term, in nats, for the variance alone arXiv:2102.09672, Eq. 16
(4)  `bound`   L_T + T L_t, in nats, whose mean over steps is the bound itself          arXiv:1503.03585, Eq. 13

The paper does not say the unit of (3); improved DDPM's code takes bits, which is 1 / log 2 = 1.44 times as much, and so
does DiT's task. Nats stay here, so that a run means what it did.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, Int, PyTree
from sora_jax.config import StudyConfig, check
from sora_jax.data.dead_leaves import DeadLeavesConfig
from sora_jax.data.images import StillsConfig
from sora_jax.data.toy import HeartbeatConfig, SwissRollConfig
from sora_jax.diffusion import binomial, likelihood, schedules
from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.likelihood import BoundTerms
from sora_jax.diffusion.process import DiscreteProcess, GaussianConfig
from sora_jax.diffusion.samplers import Denoise
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.mlp import MLPConfig, RBFConfig
from sora_jax.models.multiscale import MultiscaleConfig
from sora_jax.models.unet import UNetConfig
from sora_jax.training.task import Loss

ExampleConfig = SwissRollConfig | HeartbeatConfig | DeadLeavesConfig | StillsConfig
NetworkConfig = RBFConfig | MLPConfig | MultiscaleConfig | UNetConfig
HYBRID_SHARE = 0.001


@dataclasses.dataclass(frozen=True)
class BinomialConfig:
    """A binomial process (arXiv:1503.03585, Table App.1), trained on its bound.

    Attributes:
        num_levels: steps of the process, T.
    """

    kind: ClassVar[str] = "binomial"
    of_bits: ClassVar[Literal[True]] = True
    discrete: ClassVar[bool] = False
    variance: ClassVar[str] = "small"  # that of the posterior

    num_levels: int = 2000

    def __post_init__(self) -> None:
        check(self.num_levels >= 2, self, "num_levels", "at least 2")

    def betas(self) -> Float[np.ndarray, " steps"]:
        """Returns betas of which each erases the same share (section 2.4.1), float64."""
        return schedules.harmonic_betas(self.num_levels)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(StudyConfig):
    """Training and scoring of a discrete diffusion model on examples of one shape.

    Attributes:
        data: what it is trained on.
        model: the network.
        process: Gaussian, or binomial for bits.
        num_held_out: examples that the bound is taken over.
        num_draws: of the noise of all steps, for each of these.
        num_samples: that the report draws.
    """

    kind: ClassVar[str] = "diffusion"

    data: ExampleConfig = SwissRollConfig()  # noqa: RUF009
    model: NetworkConfig = MLPConfig()  # noqa: RUF009
    process: GaussianConfig | BinomialConfig = GaussianConfig()  # noqa: RUF009
    num_held_out: int = 1000
    num_draws: int = 1
    num_samples: int = 64
    sample_every: int = 0

    @property
    def process_kind(self) -> str:
        """What makes data noisy."""
        return self.process.kind

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not self.sample_every or len(self.data.shape) == 3, self, "sample_every", "0 for what is not an image")
        for field in ("num_held_out", "num_draws", "num_samples"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(len(self.data.eval_splits) >= 1, self.data, "eval_splits", "at least one; the first is what is scored")
        check(self.data.split not in self.data.eval_splits, self.data, "eval_splits", "without the split trained on")
        if (self.data.values == "bits") != self.process.of_bits:
            raise ValueError(
                f"process must be a BinomialConfig for bits and a GaussianConfig for numbers, got a "
                f"{type(self.process).__name__} for {type(self.data).__name__}."
            )
        self._check_network()
        discrete = self.process.discrete
        if discrete != (self.data.values == "8-bit"):
            works = "true for 8-bit stills and false for all else"
            raise ValueError(f"process.discrete must be {works}, got {discrete} for {type(self.data).__name__}.")

    def _check_network(self) -> None:
        """Raises ValueError where the network does not suit the data or the process."""
        images = len(self.data.shape) == 3
        if images != self.model.takes_images:
            works = "MultiscaleConfig or UNetConfig for images, RBFConfig or MLPConfig for vectors"
            kinds = f"{type(self.model).__name__} for {type(self.data).__name__}"
            raise ValueError(f"model must be a {works}, got {kinds}.")
        if self.model.takes_images:
            multiple = self.model.size_multiple
            check(self.data.shape[0] % multiple == 0, self.data, "size", f"a multiple of the network's {multiple}")
        channels = self.data.shape[-1]
        learns = self.process.variance == "learned"
        check(self.model.in_channels == channels, self.model, "in_channels", f"the {channels} of the data")
        out = 2 * channels if learns else channels
        check(self.model.out_channels == out, self.model, "out_channels", f"{out} for such data and such a variance")
        steps = self.process.num_levels
        known = getattr(self.model, "num_steps", steps)  # of networks that know how many there are
        check(known == steps, self.model, "num_steps", f"the {steps} of process.num_levels")


def spread_steps(key: jax.Array, rows: Int[Array, " rows"], num_rows: int, num_steps: int) -> Int[Array, " rows"]:
    """Returns the step of each row by equation 1, int32; `rows` are their numbers among `num_rows`."""
    u = jax.random.uniform(key) + rows / num_rows
    return jnp.minimum(jnp.floor((u % 1) * num_steps), num_steps - 1).astype(jnp.int32)


class DiffusionTask:
    """What the two processes share; a `sora_jax.training.task.Task`.

    Args:
        config: of the experiment.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.model = config.model.network()

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns {"network": its parameters}, boxed with their logical axes."""
        x = jnp.zeros((1, *self.config.data.shape))
        return {"network": self.model.init(key, x, jnp.zeros(1))["params"]}

    def abstract_batch(self, num_rows: int | None = None) -> jax.ShapeDtypeStruct:
        """Returns the shape and dtype of a batch of examples, (B, ...) float32."""
        rows = self.config.data.batch_size if num_rows is None else num_rows
        return jax.ShapeDtypeStruct((rows, *self.config.data.shape), jnp.float32)

    def rates(self, totals: Mapping[str, float], seconds: float, num_batches: int) -> dict[str, float]:
        """Returns the examples a second."""
        del num_batches
        return {"examples_per_second": totals["examples"] / seconds}

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns nothing: the loss says it all."""
        return {}

    def figures(self) -> dict[str, int]:
        """Returns nothing more."""
        return {}

    def network(
        self, params: PyTree, rows: tuple[()], x: Array, levels: Array, dropout: jax.Array | None = None
    ) -> Array:
        """Returns what the network says of examples, in training and in sampling.

        Args:
            params: of `init_params`.
            rows: nothing: examples are conditioned on nothing.
            x: (B, ...).
            levels: () or (B,), the step of each.
            dropout: key of the dropout; None leaves it out.
        """
        del rows
        steps = jnp.broadcast_to(levels, x.shape[:1])
        rngs = None if dropout is None else {"dropout": dropout}
        return self.model.apply({"params": params["network"]}, x, steps, deterministic=dropout is None, rngs=rngs)

    def draw(self, rows: Array, key: jax.Array, num_steps: int, training: bool) -> tuple[Array, jax.Array, jax.Array]:
        """Returns what the rows of a batch draw: steps (B,), a key for each row (B,), and one for all.

        Steps are spread over all rows that share the key: those of an update in training, else those of the batch.
        """
        shared, own = jax.random.split(key)
        total = len(rows) * (self.config.optimizer.accumulation_steps if training else 1)
        steps = spread_steps(shared, rows, total, num_steps)
        keys = jax.vmap(lambda row: jax.random.fold_in(own, row))(rows)
        return steps, keys, jax.random.fold_in(shared, rows[0])


class GaussianTask(DiffusionTask):
    """Gaussian diffusion of numbers.

    Args:
        config: of the experiment.
        process: the config's own; `diffusion_task` has told it from a `BinomialConfig`.
    """

    of_bits: ClassVar[Literal[False]] = False

    def __init__(self, config: DiffusionConfig, process: GaussianConfig) -> None:
        super().__init__(config)
        self._gaussian = process
        self._betas = process.betas()

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns `network` and, where the betas are learned, `betas`: logits (T - 1,), not decayed."""
        params = super().init_params(key)
        if self._gaussian.learn_betas:
            rest = self._betas[1:]
            params["betas"] = {"logits": jnp.asarray(np.log(rest) - np.log1p(-rest), jnp.float32)}
        return params

    def levels(self, params: PyTree) -> Levels:
        """Returns the T + 1 levels, from the noisiest to data."""
        if not self._gaussian.learn_betas:
            return discrete_levels(self._betas)
        betas = schedules.learned_betas(params["betas"]["logits"], float(self._betas[0]))
        # Through logarithms, since 1 - alpha_bar of the first steps would be lost.
        log_ab = jnp.append(jnp.cumsum(jnp.log1p(-betas))[::-1], 0.0)
        alpha, sigma = jnp.exp(log_ab / 2), jnp.sqrt(-jnp.expm1(log_ab))
        times = np.append(np.arange(len(self._betas))[::-1], 0).astype(np.float32)
        return Levels(times, alpha, sigma, jnp.ones_like(alpha))

    def denoise(self, params: PyTree, dropout: jax.Array | None = None, clip: bool = True) -> Denoise:
        """Returns the denoise function of parameters.

        Args:
            params: of `init_params`.
            dropout: key of the dropout; None leaves it out.
            clip: 8-bit values to [-1, 1]; not in training, where what is clipped would learn nothing.
        """
        return self.process(params).denoiser(lambda x, time: self.network(params, (), x, time, dropout), clip)

    def process(self, params: PyTree) -> DiscreteProcess:
        """Returns the process, whose levels depend on the parameters where betas are learned."""
        clip = (-1.0, 1.0) if self._gaussian.discrete else None
        return DiscreteProcess(self._gaussian, clip, self.levels(params))

    def loss(self, params: PyTree, batch: Array, rows: Int[Array, " rows"], key: jax.Array, training: bool) -> Loss:
        """Returns equation 2, 3 or 4."""
        process = self._gaussian
        steps, keys, shared = self.draw(rows, key, process.num_levels, training)
        noise = jax.vmap(lambda key: jax.random.normal(key, batch.shape[1:]))(keys)
        dropout = shared if training else None
        if process.loss == "bound":
            levels, denoise = self.levels(params), self.denoise(params, dropout, clip=False)
            floored = process.variance == "learned" or process.last_variance == "posterior"
            floor = likelihood.last_floor(levels) if floored else None
            now, to = self.process(params).at(steps)
            terms, _ = likelihood.step_term(denoise, batch, noise, now, to, process.variance, process.discrete, floor)
            terms = process.num_levels * terms + likelihood.prior_term(batch, Levels(*(a[0] for a in levels)))
            error = terms.reshape(len(batch), -1).sum(axis=1)
        else:
            network = lambda x, time: self.network(params, (), x, time, dropout)  # noqa: E731
            share = HYBRID_SHARE * process.num_levels
            error = self.process(params).error(network, batch, noise, steps, share)
        count = jnp.float32(len(batch))
        return Loss(error.sum(), count, {"examples": count})

    def bound(self, params: PyTree, x0: Float[Array, " batch *values"], key: jax.Array) -> BoundTerms:
        """Returns the terms of the bound of each example, in nats."""
        process = self._gaussian
        return likelihood.bound(
            self.denoise(params), x0, self.levels(params), key, variance=process.variance, discrete=process.discrete,
            last_variance=process.last_variance,
        )  # fmt: skip


class BinomialTask(DiffusionTask):
    """Binomial diffusion of bits; the network gives the logits of x_0."""

    of_bits: ClassVar[Literal[True]] = True

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self._betas = config.process.betas()
        a = binomial.kept(self._betas)
        self._tables = [np.float32(table) for table in (self._betas, a, np.append(1.0, a[:-1]))]

    def network_of(self, params: PyTree, dropout: jax.Array | None = None) -> Callable[[Array, Array], Array]:
        """Returns the function of (x, step) that `sora_jax.diffusion.binomial` takes."""
        return lambda x, step: self.network(params, (), x, step, dropout)

    def loss(self, params: PyTree, batch: Array, rows: Int[Array, " rows"], key: jax.Array, training: bool) -> Loss:
        """Returns equation 4 without L_T, which the network cannot change (and which is 0 where the last beta is 1)."""
        num_steps = len(self._betas)
        steps, keys, shared = self.draw(rows, key, num_steps, training)
        network = self.network_of(params, shared if training else None)

        def one(x0: Array, key: jax.Array, step: Array) -> Array:
            beta, a, before = (jnp.asarray(table)[step] for table in self._tables)
            return binomial.step_term(network, x0[None], key, step, beta, a, before)[0].sum()

        error = num_steps * jax.vmap(one)(batch, keys, steps)
        count = jnp.float32(len(batch))
        return Loss(error.sum(), count, {"examples": count})

    def bound(self, params: PyTree, x0: Float[Array, " batch *values"], key: jax.Array) -> BoundTerms:
        """Returns the terms of the bound of each example, in nats."""
        return binomial.bound(self.network_of(params), x0, self._betas, key)

    def sample(self, params: PyTree, num_samples: int, key: jax.Array) -> Float[Array, " samples *values"]:
        """Draws bits by the reverse chain."""
        return binomial.sample(self.network_of(params), (num_samples, *self.config.data.shape), self._betas, key)


def diffusion_task(config: DiffusionConfig, attention_fn: AttentionFn = xla_attention) -> GaussianTask | BinomialTask:
    """Returns the task of an experiment; its networks have no attention kernel to choose."""
    del attention_fn
    process = config.process
    return BinomialTask(config) if process.of_bits else GaussianTask(config, process)
