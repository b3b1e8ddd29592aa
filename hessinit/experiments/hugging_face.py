"""Small models of Hugging Face's transformers, as their configurations make them, without dropout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from hessinit.experiments.data import Dataset

if TYPE_CHECKING:
    from torch import nn


PACKAGE = "transformers"


class Kind(NamedTuple):
    """A type of model.

    Args:
        title: for tables and figures.
        activation: its own.
        options: what its configuration needs besides the sizes that all share.
    """

    title: str
    activation: str
    options: dict[str, Any]


WIDTHS = [16, 32, 48, 64]
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_EXPERTS = {"num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
TEXTS = {
    "gpt2": Kind("GPT-2", "gelu", {}),
    "opt": Kind("OPT", "relu", {"ffn_dim": 256, "word_embed_proj_dim": 64}),
    "bert": Kind("BERT", "gelu", {"is_decoder": True}),
    "llama": Kind("Llama", "silu", {}),
    "gemma": Kind("Gemma", "gelu", {"num_key_value_heads": 1, "head_dim": 16}),
    "falcon": Kind("Falcon", "gelu", {}),
    "gpt_neox": Kind("GPT-NeoX", "gelu", {}),
    "mixtral": Kind("Mixtral", "silu", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen3_moe": Kind("Qwen3 MoE", "silu", {**_EXPERTS, "num_experts": 8, "moe_intermediate_size": 64}),
    "gpt_oss": Kind("GPT-OSS", "silu", {**_EXPERTS, "num_local_experts": 4, "rope_parameters": _ROTARY}),
}
"""Causal language models of three blocks of width 64, by model type."""
_STAGES = {"hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1]}
_PYRAMID = {**_STAGES, "num_encoder_blocks": 4, "num_attention_heads": [1, 1, 2, 2], "sr_ratios": [2, 2, 1, 1]}
_CONVNEXT = {"patch_size": 2, "hidden_sizes": WIDTHS, "depths": [1, 1, 2, 1]}
_WINDOWS = {"patch_size": 2, "embed_dim": 16, "depths": [1, 1]}
_PATCHES = {"patch_size": 7, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_NECKS = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}
IMAGES = {
    "convnext": Kind("ConvNeXt", "gelu", _CONVNEXT),
    "regnet": Kind("RegNet", "relu", {**_STAGES, "embedding_size": 16, "groups_width": 8}),
    "poolformer": Kind("PoolFormer", "gelu", {**_STAGES, "num_encoder_blocks": 4}),
    "convnextv2": Kind("ConvNeXt V2", "gelu", _CONVNEXT),
    "segformer": Kind("SegFormer", "gelu", _PYRAMID),
    "pvt_v2": Kind("PVT v2", "gelu", {**_PYRAMID, "mlp_ratios": [2, 2, 2, 2]}),
    "swin": Kind("Swin", "gelu", {**_WINDOWS, "window_size": 7, "num_heads": [1, 2]}),
    "focalnet": Kind(
        "FocalNet", "gelu", {**_WINDOWS, "hidden_sizes": [16, 32], "focal_levels": [1, 1], "focal_windows": [3, 3]}
    ),
    "mobilevit": Kind("MobileViT", "silu", _NECKS),
    "bit": Kind("BiT", "relu", {**_STAGES, "embedding_size": 16, "num_groups": 4}),
    "mobilenet_v1": Kind("MobileNet", "relu", {"depth_multiplier": 0.25}),
    "mobilenet_v2": Kind("MobileNet V2", "relu", {"depth_multiplier": 0.35}),
    "beit": Kind("BEiT", "gelu", {**_PATCHES, "intermediate_size": 128}),
    "dinov2": Kind("DINOv2", "gelu", _PATCHES),
    "swinv2": Kind("Swin V2", "gelu", {**_WINDOWS, "window_size": 7, "num_heads": [1, 2]}),
}
"""Classifiers of images of 28 × 28, likewise."""
_SIZES = {
    **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "use_cache": False, "pad_token_id": None},  # every character is a real one
}


def model(kind: str, data: Dataset) -> nn.Module:
    """A model that takes the rows of a dataset, with the initial weights that the library gives it.

    Args:
        kind: one of ``TEXTS`` or ``IMAGES``.
        data: characters for the former, images for the latter.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

    class Logits(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inputs = x if kind in TEXTS else x.reshape(-1, 1, 28, 28)
            return self.inner(inputs).logits  # type: ignore[no-any-return]

    if kind in TEXTS:
        config = AutoConfig.for_model(kind, vocab_size=data.outputs, **_SIZES, **TEXTS[kind].options)
        made = AutoModelForCausalLM.from_config(config)
    else:
        config = AutoConfig.for_model(
            kind, num_channels=1, image_size=28, num_labels=data.outputs, drop_path_rate=0.0, **IMAGES[kind].options
        )
        made = AutoModelForImageClassification.from_config(config)
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return Logits(made)
