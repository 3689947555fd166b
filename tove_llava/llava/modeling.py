"""transformers' LLaVA with a ToVE tower, balance loss and routing."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from transformers import LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from tove_llava.core.errors import ConfigError
from tove_llava.llava.configuration import ToveLlavaConfig
from tove_llava.llava.loss import supervised_loss
from tove_llava.tower import GateInputs, ToveVisionModel, ToveVisionOutput, TowerFeatures
from tove_llava.tower.tower_model import clip_follows, local_folder

# The name of a language model's argument: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"


@dataclass
class VisionInputs:
    """A batch's images beyond their pixels: features, noise, and dummies.

    Args:
        features: output of ``tower.encode``, instead of ``pixel_values``.
        gate_noise: ``[images,N,S]`` noise of the gate in training, instead of a fresh draw.
        dummy: no placeholder stands for the images. Tower and projector run on them and get gradients of zero, so that
            a rank whose batch has no image touches the same parameters as the other ranks. Their gate inputs are not
            returned, and they have no part in the balance loss.
        further: number of images at the end without a placeholder, which still take part in the merge loss.
    """

    features: TowerFeatures | None = None
    gate_noise: torch.Tensor | None = None
    dummy: bool = False
    further: int = 0


@dataclass
class ToveLlavaOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output, with the parts of the loss and the routing.

    Args:
        lm_loss: only the language model's loss, when labels are given.
        aux_loss: balance loss of this batch before its coefficient; None when it was not asked for.
        routing: ``[images,N,S]`` float32 gate weights, when asked for.
        gate_inputs: input of ``tower.fusion.balance_statistics``; None without images or gate.
        merge_loss: ``[images]`` float32, in training while the tower is merged; ``[0]`` for dummy images.
    """

    lm_loss: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None
    routing: torch.FloatTensor | None = None
    gate_inputs: GateInputs | None = None
    merge_loss: torch.FloatTensor | None = None


class ToveLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """transformers' LLaVA with a :class:`~tove_llava.tower.ToveVisionModel` as its vision tower.

    Args:
        config: of tower, projector and language model; new weights are random. See :func:`tove_llava.build_model`.

    Attributes:
        origin: the checkpoint that the model was loaded from (:class:`~tove_llava.checkpoints.origin.Origin`), if any.

    Example:
        >>> model = tove_llava.ToveLlavaForConditionalGeneration.from_pretrained(folder)
        >>> model.get_routing(image).shape  # [images, tokens, experts]
        torch.Size([1, 36, 4])
    """

    config: ToveLlavaConfig
    config_class = ToveLlavaConfig
    origin: Any = None
    # The module that knows training's checkpoint folders. A name, not an import: this file also serves as remote code,
    # without the rest of the package, and then knows only plain transformers folders.
    folders: ClassVar[str | None] = None

    @property
    def tower(self) -> ToveVisionModel:
        return self.model.vision_tower

    def set_attn_implementation(self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Set the attention of the language model and of the tower's encoders."""
        with clip_follows(self.config.vision_config, attn_implementation):
            super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        load_backbones: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, then CLIP and the experts from recorded sources.

        It opens every kind of folder that training writes, and a repository that holds one.

        Args:
            load_backbones: False leaves them out; the tower then refuses to run until ``model.tower.load_backbones()``.

        Raises:
            CheckpointError: a folder of this package's is damaged, or names a source that is not there.
        """
        place, read = pretrained_model_name_or_path, partial(_read, super().from_pretrained, args)
        if cls.folders is None or place is None:
            loaded = read(place, **kwargs)
        else:
            loaded, place = importlib.import_module(cls.folders).open_folder(read, place, kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns a pair
        if load_backbones:
            model.tower.load_backbones(base_dir=local_folder(place))
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, self_contained: bool = False, **kwargs: Any
    ) -> None:
        """Write a folder that :meth:`from_pretrained` and ``tove_llava.load_model`` open as this model.

        Weights are saved by value. A model with LoRA adapters is written as training writes it: adapters, projector and
        the tower's parts, with the language model named by its source. CLIP and the experts are named by their sources,
        unless they came with the folder that this model was loaded from. A model card is written too.

        Args:
            self_contained: also write CLIP and the experts, and the language model that adapters belong to.

        Raises:
            CheckpointError: the folder would not be this model again; the message says why.
        """
        write = super().save_pretrained
        if self.folders is None:
            write(save_directory, **kwargs)
        else:
            folders = importlib.import_module(self.folders)
            folders.save_folder(self, write, save_directory, kwargs, self_contained=self_contained)

    def push_to_hub(self, repo_id: str, *, self_contained: bool = False, **kwargs: Any) -> Any:
        """Upload the model and its card; local sources go by value.

        Args:
            self_contained: upload every backbone by value.
            kwargs: those of transformers' ``push_to_hub``.
        """
        if self.folders is None:
            return super().push_to_hub(repo_id, **kwargs)
        return importlib.import_module(self.folders).push(self, repo_id, self_contained=self_contained, **kwargs)

    def encode_images(
        self,
        pixel_values: torch.Tensor | None = None,
        *,
        vision_features: TowerFeatures | None = None,
        gate_noise: torch.Tensor | None = None,
    ) -> ToveVisionOutput:
        """Run tower and projector; ``pooler_output`` holds the projected tokens, ``[N,d_text]`` per image.

        The result may be given to ``forward`` and ``generate`` as ``mm_encoder_outputs={"image": ...}``.
        """
        return self.model.get_image_features(
            pixel_values=pixel_values, features=vision_features, gate_noise=gate_noise, return_dict=True
        )

    def get_routing(
        self, pixel_values: Any = None, *, vision_features: TowerFeatures | None = None
    ) -> torch.Tensor | None:
        """Return float32 gate weights ``[B,N,S]`` in the current mode, or None."""
        with torch.no_grad():
            return self.tower(pixel_values, features=vision_features).routing

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        vision: VisionInputs | None = None,
        add_aux_loss: bool = True,
        output_routing: bool = False,
        supervised: torch.LongTensor | None = None,
        image_positions: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> ToveLlavaOutput:
        """Run LLaVA, and add the balance and merge losses of this batch.

        Args:
            vision: what is given of the images beyond ``pixel_values``.
            add_aux_loss: in training, with labels, add ``router_aux_loss_coef`` times the balance loss to ``loss``, and
                while the tower is merged its coefficient times the mean merge loss. A trainer that accumulates
                gradients or has several ranks passes False and adds the global batch's terms itself, from
                ``gate_inputs`` and ``merge_loss``.
            output_routing: return the gate weights.
            cache: transformers' name of ``past_key_values`` since 5.24.
            supervised: int64 ``[n]``, the indices in the flattened batch whose next label is supervised, as the
                collator gives them. Logits are computed only there, and none are returned.
            image_positions: int64 ``[images * N]``, the indices of the placeholders in the flattened batch, as the
                collator gives them; with ``supervised``. Nothing then waits for the device to count placeholders.
            num_items_in_batch: what the sum of cross-entropies is divided by, instead of their number.

        Raises:
            ConfigError: images are given in more than one way, or dummy images without any.
        """
        vision = vision or VisionInputs()
        images = self._encoded(pixel_values, vision, (mm_encoder_outputs or {}).get("image"))
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            CACHE: past_key_values if cache is None else cache,
            "mm_encoder_outputs": None if images is None else {"image": images},
            **kwargs,
            "return_dict": True,
        }
        if supervised is None:
            counted = {"num_items_in_batch": num_items_in_batch}
            output = super().forward(labels=labels, logits_to_keep=logits_to_keep, **given, **counted)
        else:
            if image_positions is not None:
                given |= self._embedded(input_ids, image_positions, images)
            output = self._loss_only(labels, supervised, num_items_in_batch, given)
        loss, aux_loss = output.loss, None
        seen = self._vision_outputs(images, vision.dummy, output_routing)
        if add_aux_loss and labels is not None:
            loss, aux_loss = self._with_losses(loss, seen["gate_inputs"], seen["merge_loss"])
        result = ToveLlavaOutput(**{**output, "loss": loss}, lm_loss=output.loss, aux_loss=aux_loss, **seen)
        return result if kwargs.get("return_dict") is not False else result.to_tuple()

    def _vision_outputs(self, images: ToveVisionOutput | None, dummy: bool, routing: bool) -> dict[str, Any]:
        """Return the tower's gate inputs, routing and merge loss."""
        merge_loss = None if images is None else images.merge_loss
        if images is None or dummy:
            if merge_loss is not None:
                merge_loss = merge_loss[:0]  # still with a graph: ZeRO-3 counts backward passes by outputs
            return {"gate_inputs": None, "routing": None, "merge_loss": merge_loss}
        gate_inputs = images.gate_inputs if self.training else None
        return {"gate_inputs": gate_inputs, "routing": images.routing if routing else None, "merge_loss": merge_loss}

    def _encoded(
        self, pixel_values: torch.Tensor | None, vision: VisionInputs, images: ToveVisionOutput | None
    ) -> ToveVisionOutput | None:
        """Encode the images; those without a placeholder stay out of the text."""
        if pixel_values is not None or vision.features is not None:
            if images is not None:
                raise ConfigError("give images once: as pixel_values, vision.features or mm_encoder_outputs")
            images = self.encode_images(pixel_values, vision_features=vision.features, gate_noise=vision.gate_noise)
        if vision.dummy and images is None:
            raise ConfigError("dummy images need at least one image to run")
        if images is not None and (vision.dummy or vision.further):
            # No row of theirs goes into the text. The same modules run in the same order, forward and backward, as on a
            # rank with images; ZeRO-3's collectives rely on that.
            kept = 0 if vision.dummy else len(images.pooler_output) - vision.further
            images.pooler_output = [
                tokens if index < kept else tokens[:0] for index, tokens in enumerate(images.pooler_output)
            ]
        return images

    def _with_losses(
        self, loss: torch.Tensor, gate_inputs: GateInputs | None, merge_loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss with balance and merge losses, and the balance loss."""
        aux_loss = None if gate_inputs is None else self.tower.balance_loss(gate_inputs)
        if aux_loss is not None:
            loss = loss + self.config.vision_config.router_aux_loss_coef * aux_loss.to(loss)
        if merge_loss is not None and len(merge_loss):
            loss = loss + self.tower.merge_coefficient * merge_loss.mean().to(loss)
        return loss, aux_loss

    def _embedded(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, images: ToveVisionOutput | None
    ) -> dict[str, Any]:
        """Return the text's embeddings with the images' tokens at their positions, as the model's arguments."""
        embeds = self.get_input_embeddings()(input_ids)  # [B,L,D]
        tokens = embeds[0, :0] if images is None else torch.cat(images.pooler_output).to(embeds)
        if len(tokens) != len(positions):
            raise ConfigError(f"the batch has {len(positions)} image placeholders and its images {len(tokens)} tokens")
        filled = embeds.flatten(0, 1).index_copy(0, positions, tokens).view_as(embeds)
        return {"input_ids": None, "inputs_embeds": filled, "mm_encoder_outputs": None}

    def _loss_only(
        self,
        labels: torch.Tensor | None,
        supervised: torch.Tensor,
        num_items: torch.Tensor | int | None,
        given: dict[str, Any],
    ) -> LlavaCausalLMOutputWithPast:
        if labels is None:
            raise ConfigError("supervised positions need labels")
        output = self.model(**given)
        loss = supervised_loss(output.last_hidden_state, labels, supervised, self.lm_head, num_items)
        return LlavaCausalLMOutputWithPast(loss=loss)


def _read(from_pretrained: Callable[..., Any], args: tuple[Any, ...], place: Any, **kwargs: Any) -> Any:
    return from_pretrained(place, *args, **kwargs)
