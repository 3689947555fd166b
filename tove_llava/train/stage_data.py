"""Open the records, images and cached features of a stage."""

from pathlib import Path
from typing import Any, cast

from transformers import LlavaProcessor

from tove_llava.data import ImageTransform, LlavaDataset
from tove_llava.data.images import AspectRatio
from tove_llava.data.resize import ImageResize
from tove_llava.llava.build import torch_dtype
from tove_llava.tower import ToveVisionConfig
from tove_llava.train.feature_cache import FeatureCache
from tove_llava.train.merging import FurtherImages, ImagePool
from tove_llava.train.run_settings import Settings


def make_dataset(
    settings: Settings, processor: LlavaProcessor, vision: ToveVisionConfig, held_out: bool = False
) -> LlavaDataset:
    """Open and check the stage's records, or the held-out ones."""
    transform = ImageTransform(
        vision.image_size,
        cast(AspectRatio, settings.stage.image_aspect_ratio),
        mean=vision.image_mean,
        std=vision.image_std,
        image_resize=cast(ImageResize, settings.stage.image_resize),
    )
    cache, data, images = None, settings.data_path, settings.image_folder
    if held_out:
        assert settings.eval_data_path is not None
        data, images = settings.eval_data_path, settings.eval_image_folder
    elif settings.feature_cache is not None:
        cache = _open_cache(settings, settings.feature_cache, vision, settings.image_folder)
    return LlavaDataset(
        data,
        images,
        processor.tokenizer,
        settings.stage.template,
        transform,
        num_image_tokens=vision.num_image_tokens,
        model_max_length=settings.stage.model_max_length,
        allow_image_links=settings.allow_image_links,
        image_placeholder=settings.stage.image_placeholder,
        features=cache,
        read_pixels=cache is None or settings.stage.merge is not None,  # a student needs the images
    )


def _open_cache(settings: Settings, folder: Path, vision: ToveVisionConfig, images: Path) -> FeatureCache:
    dtype = settings.compute_dtype() or torch_dtype(settings.preset.language.dtype)
    return FeatureCache(folder, vision, settings.stage.image_aspect_ratio, images, dtype)


def make_further_images(settings: Settings, dataset: LlavaDataset, tower: Any, seed: int) -> FurtherImages | None:
    """Return the stage's images that only the merge loss sees."""
    merge = settings.stage.merge
    if merge is None or merge.images_per_record == 0:
        return None
    cache = None
    if settings.merge_feature_cache is not None:
        vision, images = tower.teacher.config, settings.merge_image_folder
        cache = _open_cache(settings, settings.merge_feature_cache, vision, images)
    folder, links = settings.merge_image_folder, settings.allow_image_links
    pool = ImagePool(settings.merge_data_path, folder, dataset.image_transform, cache, links)
    return FurtherImages(pool, merge.images_per_record, seed)
