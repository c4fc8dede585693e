"""Parameters of one recognition model as the beginning of another: of other classes, another size, or of clips."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from sora_jax.array_types import PyTree
from sora_jax.models.navit import NaViTConfig
from sora_jax.models.vit import ViTConfig, reset_head, resize_images
from sora_jax.models.vivit import ViViTConfig, init_from_vit

RecognitionModelConfig = ViTConfig | ViViTConfig | NaViTConfig

# What may differ without a parameter being of another shape.
_FREE = {"norm_eps", "exact_gelu", "dtype", "remat", "attention", "num_classes", "representation_dim"}


def start_from(
    target: RecognitionModelConfig, source: RecognitionModelConfig, params: PyTree, key: jax.Array
) -> PyTree:
    """Returns parameters of `target` that begin where those of `source` ended.

    A head of another shape, or behind another hidden layer, is all zeros. A ViT's positions are interpolated to
    another size of images (arXiv:2010.11929, section 3.2), and a ViViT may begin with a ViT (arXiv:2103.15691,
    section 3.4).

    Args:
        target: of the model that is to be trained.
        source: of the model that was.
        params: its parameters, unboxed.
        key: of what the source does not have.

    Raises:
        ValueError: models that have nothing to do with each other, or differ in more than their classes and sizes;
            the message names the first field that does.
    """
    if len(target.example_shape or ()) == 4 and len(source.example_shape or ()) == 3:  # of clips, of images
        return init_from_vit(target, key, source, params)
    if type(target) is not type(source):
        raise ValueError(f"a {type(target).__name__} cannot begin with the parameters of a {type(source).__name__}.")
    resizable = target.patch is not None and target.takes_any_size
    free = _FREE | ({"image_size"} if resizable else set())
    for field in dataclasses.fields(target):
        values = getattr(source, field.name), getattr(target, field.name)
        if field.name not in free and values[0] != values[1]:
            raise ValueError(f"the given model's {field.name} must be {values[1]}, got {values[0]}.")
    if resizable and source.image_size != target.image_size:
        source, params = resize_images(source, params, target.image_size)
    if resizable:
        heads = [(model.num_classes, model.representation_dim) for model in (source, target)]
        if heads[0] == heads[1]:
            return params
        if target.representation_dim:
            raise ValueError(
                f"the given model's representation_dim must be {target.representation_dim}, got "
                f"{source.representation_dim}: a new head is a single layer."
            )
        return reset_head(source, params, target.num_classes)[1]
    if source.num_classes != target.num_classes:
        kernel = np.zeros((target.width, target.num_classes), np.float32)
        params = {**params, "head": {"kernel": kernel, "bias": np.zeros(target.num_classes, np.float32)}}
    return params
