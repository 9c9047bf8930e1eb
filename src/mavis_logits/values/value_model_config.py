"""What a value model is: its backbone, its objectives, and where both come from."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..core.objectives import ObjectivesMixin


class ValueModelConfig(ObjectivesMixin, PreTrainedConfig):
    """Configuration of a `ValueModel`: its backbone and what it predicts.

    Args:
        backbone_config: configuration of the decoder, or the same as a dictionary.
        backbone: Hub id of the model that an adapter repo's backbone is taken from (its first layers).
        backbone_class: name of the decoder's class where `AutoModel` would make another of its configuration.
        backbone_fingerprint, backbone_sketch: of those weights before training (`fingerprint.Identity`), so that an
            adapter on other weights is noticed.
        pad_token_id: of the tokenizer; tells left padding apart.
        objectives, reward_mean, reward_scale, tokenizer_fingerprint, base_model, base_revision, recipe, iteration:
            see `ObjectivesMixin`.
    """

    model_type = "mavis_value"
    sub_configs: ClassVar = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        backbone: str | None = None,
        backbone_class: str | None = None,
        backbone_fingerprint: str | None = None,
        backbone_sketch: str | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            settings = self._decode_special_floats(dict(backbone_config))
            backbone_config = CONFIG_MAPPING[settings.pop("model_type")](**settings)
        self.backbone_config: PreTrainedConfig = backbone_config or CONFIG_MAPPING["llama"]()
        self.backbone, self.backbone_class = backbone, backbone_class
        self.backbone_fingerprint, self.backbone_sketch = backbone_fingerprint, backbone_sketch
        kwargs = self._take_objectives(kwargs)
        for name in ("attn_implementation", "experts_implementation"):  # those of the backbone would be taken from it
            kwargs.setdefault(name, getattr(self.backbone_config, f"_{name}", None))
        super().__init__(pad_token_id=pad_token_id, **kwargs)
