"""DiT in PyTorch, of diffusers' `DiTTransformer2DModel`: what the suite `dit` measures ours beside.

Importing this needs the extra `.[parity]`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers import DiTTransformer2DModel
from flax import traverse_util

from sora_jax.array_types import Float, Int, NumpyArray, PyTree
from sora_jax.config import OptimizerConfig
from sora_jax.convert.dit import diffusers_config, from_diffusers
from sora_jax.diffusion.schedules import alpha_bar, linear_betas, respaced_betas, respaced_steps
from sora_jax.models.dit import DiTConfig

Noise = Callable[[int], torch.Tensor]
FREQUENCY_DIM = 256  # diffusers has no other


def diffusers_options(config: DiTConfig) -> dict[str, object]:
    """Returns the options of the `DiTTransformer2DModel` that computes what `DiT(config)` does.

    Raises:
        ValueError: there is none, naming the field that diffusers has no other value of.
    """
    for field, value in (
        ("conditioning", "adaln_zero"),
        ("mlp_dim", 4 * config.width),
        ("frequency_dim", FREQUENCY_DIM),
        ("norm_eps", 1e-6),
        ("image_size", (config.image_size[0],) * 2),
    ):
        if getattr(config, field) != value:
            raise ValueError(f"{field} must be {value!r}, diffusers' own, got {getattr(config, field)!r}.")
    return dict(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.image_size[0],
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.norm_eps,
    )


def random_model(config: DiTConfig, seed: int) -> tuple[DiTTransformer2DModel, DiTConfig, PyTree]:
    """Returns a network with diffusers' own fresh weights, none of which is zero, and the same for us.

    All blocks share one embedding of timestep and class, as they do in weights that were trained, so that the two have
    the same parameters. The network is in evaluation mode, in which diffusers drops no classes by itself.

    Args:
        config: of the network; its computation (dtype, kernel) is kept.
        seed: of the weights.

    Returns:
        diffusers' network, the config of ours and its parameters as NumPy arrays.

    Raises:
        ValueError: like `diffusers_options`.
    """
    options = diffusers_options(config)
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**options).eval()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
    converted = diffusers_config({"_class_name": "DiTTransformer2DModel", **options})
    kept = {field: getattr(config, field) for field in ("dtype", "remat", "attention")}
    config = dataclasses.replace(converted, **kept)
    return model, config, as_params({n: v.numpy() for n, v in model.state_dict().items()}, config)


def as_params(state: Mapping[str, NumpyArray], config: DiTConfig) -> PyTree:
    """Returns the tensors of a `DiTTransformer2DModel`, or their gradients, as the parameters of `DiT(config)`."""
    return traverse_util.unflatten_dict(from_diffusers(state, config), sep=".")


def to_torch(x: NumpyArray, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns images (N, H, W, C), or anything of fewer axes, as PyTorch has them: (N, C, H, W)."""
    x = np.moveaxis(x, -1, 1) if x.ndim == 4 else x
    return torch.from_numpy(np.ascontiguousarray(x)).to(device, dtype)


def to_numpy(x: torch.Tensor) -> Float[np.ndarray, "batch height width channels"]:
    """Returns images (N, C, H, W) as (N, H, W, C) float32."""
    return np.moveaxis(x.detach().float().cpu().numpy(), 1, -1)


class TorchTraining:
    """The training step of `sora_jax.training.step` with the loss `simple`, in PyTorch's fastest form of each part.

    Args:
        model: is trained; on its device, float32.
        network: computes it, such as the compiled model.
        config: of the optimizer; clipping, AdamW and the average of the parameters are taken of it.
        dtype: of the computation; bfloat16 by autocast, since parameters stay float32 as ours do.
        class_dropout: probability of training on the null class.
    """

    def __init__(
        self,
        model: DiTTransformer2DModel,
        network: Callable[..., object],
        config: OptimizerConfig,
        dtype: torch.dtype,
        class_dropout: float,
    ) -> None:
        self._model, self._network, self._config = model, network, config
        self._dtype, self._class_dropout = dtype, class_dropout
        self._params = list(model.parameters())  # shared ones once
        self._averages = [copy.deepcopy(p.detach()) for p in self._params]
        self._optimizer = torch.optim.AdamW(
            self._params,
            lr=config.learning_rate,
            betas=(config.b1, config.b2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._alpha_bar = torch.from_numpy(alpha_bar(linear_betas())).to(model.device, torch.float32)
        self._count = 0

    def loss(self, x0: torch.Tensor, labels: torch.Tensor, steps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Returns the mean squared error of the predicted noise.

        Args:
            x0: (N, C, H, W), the data.
            labels: (N,), of the classes.
            steps: (N,), of the process.
            noise: of the shape of `x0`.
        """
        bar = self._alpha_bar[steps][:, None, None, None]
        xt = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
        with torch.autocast(x0.device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = self._network(xt, steps, labels).sample
        return torch.nn.functional.mse_loss(output.float(), noise)

    def step(self, x0: torch.Tensor, labels: torch.Tensor) -> None:
        """Makes one update at drawn steps, noise and dropped classes."""
        steps = torch.randint(0, len(self._alpha_bar), labels.shape, device=x0.device)
        dropped = torch.rand(labels.shape, device=x0.device) < self._class_dropout
        labels = torch.where(dropped, self._model.config.num_embeds_ada_norm, labels)
        self._optimizer.zero_grad(set_to_none=True)
        self.loss(x0, labels, steps, torch.randn_like(x0)).backward()
        torch.nn.utils.clip_grad_norm_(self._params, self._config.clip_norm)
        self._optimizer.step()
        decay = min(self._config.ema_decay, (1 + self._count) / (10 + self._count))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._params, 1 - decay)
        self._count += 1

    def gradient(
        self, x0: torch.Tensor, labels: torch.Tensor, steps: torch.Tensor, noise: torch.Tensor
    ) -> tuple[float, dict[str, NumpyArray]]:
        """Returns `loss` and its gradient by the names of diffusers."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x0, labels, steps, noise)
        loss.backward()
        named = self._model.named_parameters(remove_duplicate=False)
        return loss.item(), {name: param.grad.cpu().numpy() for name, param in named}


def guided_chain(
    network: Callable[..., object],
    noise: Noise,
    labels: Int[torch.Tensor, " samples"],
    null: int,
    scale: float,
    guided_channels: int,
    num_steps: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Samples as the official code does: respaced ancestral steps of a learned range, guided on a doubled batch.

    Args:
        network: diffusers' network of images in `dtype`.
        noise: (N, C, H, W) float32 of a number, 0 for what the chain starts from and n for its n-th step.
        labels: (N,), classes.
        null: the null class.
        scale: of the guidance.
        guided_channels: so many of the first channels are guided.
        num_steps: that are visited of the linear process of 1000.
        dtype: of the computation; the chain itself is float32.

    Returns:
        (N, C, H, W) float32.
    """
    kept = respaced_steps(1000, num_steps, "linspace")
    betas = respaced_betas(linear_betas(), kept)
    bars = np.cumprod(1 - betas)
    classes = torch.cat([labels, torch.full_like(labels, null)])
    x = noise(0)
    channels = x.shape[1]
    for n in reversed(range(num_steps)):
        bar, before, beta = bars[n], bars[n - 1] if n else 1.0, betas[n]
        times = torch.full_like(classes, int(kept[n]))
        output = network(torch.cat([x, x]).to(dtype), times, classes).sample.float()
        conditional, unconditional = output.chunk(2)
        eps, place = conditional.split(channels, dim=1)
        first = unconditional[:, :guided_channels]
        eps = torch.cat([first + scale * (eps[:, :guided_channels] - first), eps[:, guided_channels:]], dim=1)
        x0 = (x - (1 - bar) ** 0.5 * eps) / bar**0.5
        x = beta * before**0.5 / (1 - bar) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - bar) * x
        if n:
            low, high = np.log(beta * (1 - before) / (1 - bar)), np.log(beta)
            x = x + torch.exp(0.5 * (low + (place + 1) / 2 * (high - low))) * noise(num_steps - n)
    return x
