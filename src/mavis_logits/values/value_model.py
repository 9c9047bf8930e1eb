"""Value models: a decoder with a linear head that predicts the final reward of every prefix (section 3.2).

V_m(s) estimates the expected final reward, under objective m, of a completion that continues s. Since appending a token
is a deterministic transition, Q_m(s, a) = V_m(s + a), so a decoder that reads s + a gives the value of choosing a.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from ..backbone import Backbone
from ..backbone.anatomy import build, class_of_config, is_quantized, name_of_class
from ..backbone.attention import implementation_of
from ..backbone.fingerprint import Identity
from ..core.objectives import check_objectives
from ..hub.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS, WEIGHTS, damage_is_os_error, load_complete
from ..hub.mixin import PushMixin
from .adapters import check_tensors, fold, put_on, some_ids
from .checkpoints import Checkpoint, Options, look, read
from .value_model_config import ValueModelConfig


@dataclass
class ValueModelOutput(ModelOutput):
    """Output of `ValueModel`.

    Attributes:
        values: float32 [R, T, M], in reward units; `values[:, t]` belongs to the sequence that ends at token t.
        cache: the backbone's, if one was used; also under its older name, `past_key_values`.
    """

    values: Tensor | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """`cache`."""
        return self.cache


class ValueModel(PushMixin, PreTrainedModel):
    """A decoder backbone of its own and a linear head, one output per objective (section 4.1, "Value Models").

    It needs nothing of the base model but its tokens. Training regresses standardised rewards; `values` are in reward
    units: mean + scale * head(hidden state).
    """

    config: ValueModelConfig
    config_class = ValueModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules: ClassVar = ["head"]  # in float16; and not quantised, for `values_of` reads its weights
    reads: Literal["tokens"] = "tokens"
    copies = 1  # of every row in the cache; `FusedValueModel` has one for each adapter

    def __init__(self, config: ValueModelConfig) -> None:
        super().__init__(config)
        self.backbone = build(class_of_config(config.backbone_config, config.backbone_class), config.backbone_config)
        self.head = nn.Linear(Backbone.of(self.backbone).output_width, len(config.objectives))
        self._peft: list[PeftModel] = []  # in a list, so that it is no submodule: it wraps the backbone itself
        self.post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # it is a matter of the backbone's, whose configuration is part of this one's

    def _init_weights(self, module: nn.Module) -> None:
        """A new head says the mean reward everywhere; the backbone initialises itself."""
        if module is getattr(self, "head", None):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(self, "backbone"):
            self.backbone._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: initialising heeds what has been loaded, as in transformers' own classes, and reaches every buffer."""
        return False

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        objectives: Sequence[str],
        num_layers: int | None = None,
        lora: LoraConfig | None = None,
        **config: Any,
    ) -> ValueModel:
        """A new value model on (a copy of) a pretrained decoder, its head still at zero.

        Args:
            backbone: Hub id or folder of any causal decoder, or a loaded model, which is copied.
            objectives: names of the M outputs.
            num_layers: keep only the first layers of the backbone.
            lora: train this adapter and the head, and nothing else; saved as an adapter repo.
            config: further fields of `ValueModelConfig`.

        Raises:
            ValueError: `num_layers` out of range, or objectives that are no list of distinct names.
        """
        check_objectives(objectives)
        given = load_complete(AutoModel.from_pretrained, backbone) if isinstance(backbone, str) else backbone
        source = Backbone.of(given)
        source.require_causal()
        trunk = source.truncated(num_layers)
        identity = Identity(trunk, vocabulary=getattr(trunk.config, "vocab_size", None))
        settings: dict[str, Any] = {
            "pad_token_id": source.special()[0],
            "backbone": source.model.config.name_or_path or None,
        } | config
        value_config = ValueModelConfig(
            backbone_config=trunk.config,
            backbone_class=name_of_class(trunk),
            backbone_fingerprint=identity.fingerprint,
            backbone_sketch=identity.sketch,
            objectives=list(objectives),
            **settings,
        )
        model = cls._assemble(value_config, trunk)
        if lora is not None:
            model.add_lora(lora)
        return model

    @classmethod
    def _assemble(cls, config: ValueModelConfig, backbone: PreTrainedModel) -> ValueModel:
        config._attn_implementation = implementation_of(backbone.config)  # else a default would be put in its place
        with torch.device("meta"):  # the backbone is at hand: make no second one
            model = cls(config)
        model.backbone = backbone
        # Not model.to(dtype): that would round the backbone's rotary frequencies too, which stay in float32.
        model.head.to(backbone.dtype).to_empty(device=backbone.device)
        model._init_weights(model.head)
        return model.eval()

    def add_lora(self, lora: LoraConfig) -> None:
        """Freeze the backbone and put a trainable LoRA adapter on it."""
        if self._peft:
            raise ValueError("this value model has a LoRA adapter already; merge it first (load it with merge=True)")
        if Backbone.of(self.backbone).shares_layers:
            raise ValueError(
                f"{type(self.backbone).__name__} uses some layers several times, which an adapter cannot tell apart: "
                "train all weights (lora=None; in a recipe lora.rank: 0)"
            )
        self._peft = [PeftModel(self.backbone, lora)]

    @property
    def lora(self) -> PeftModel | None:
        """PEFT's view of the backbone, if an adapter is on it."""
        return self._peft[0] if self._peft else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ValueModelOutput:
        """Values of every prefix.

        Args:
            input_ids: [R, T] tokens.
            attention_mask: [R, T] 1 for tokens and 0 for padding, or a ready 4-D mask (a dictionary of them for
                backbones with several kinds of attention).
            position_ids: [R, T], as the backbone itself counts them; by default from each row's first unmasked token.
            past_key_values: cache of the tokens before `input_ids`; `cache` is the same.
            use_cache: whether to return the cache; by default if one is given.

        Returns:
            `ValueModelOutput` with `values` [R, T, M] in float32.
        """
        backbone, shift = Backbone.of(self.backbone), None
        past_key_values = kwargs.pop("cache", past_key_values)
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            assert input_ids is not None
            if past_key_values is not None:
                if backbone.takes("position_ids"):
                    position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            elif not attention_mask[:, 0].all():
                # Who counts positions, and from which number, differs by backbone. So padding goes to the right, where
                # nothing sees it, and every backbone counts as it does without padding.
                shift = attention_mask.argmax(dim=1)
                input_ids, attention_mask = _rolled(input_ids, -shift), _rolled(attention_mask, -shift)
        hidden, cache = backbone.states(
            input_ids,
            attention_mask,
            position_ids,
            cache=past_key_values,
            use_cache=False if past_key_values is None and use_cache is None else use_cache,
            **kwargs,
        )
        values = self.values_of(hidden)
        return ValueModelOutput(values if shift is None else _rolled(values, shift), cache)

    @property
    def units(self) -> Tensor:
        """Of all objectives: mean and scale of the rewards, and what counts as one in a tilt, [3, M] on the CPU."""
        return self.config.units()

    def refresh(self, thorough: bool = True) -> None:
        """Do nothing: it keeps nothing of its weights, and who keeps what it computed watches it (`backbone.watch`)."""

    def join(self, values: Tensor) -> Tensor:
        """[1, R, k, M] -> [R, k, M]: what a scorer makes of `forward`'s values."""
        return values[0]

    def merge_lora(self) -> None:
        """Fold the LoRA adapter into the backbone's weights, which makes it faster and no longer trainable.

        Raises:
            ValueError: values would be others then; the adapter stays as it is.
        """
        if self.lora is not None:
            ids, mode = some_ids(Backbone.of(self.backbone).vocabulary, self.device), self.training
            self.eval()
            try:
                self.backbone = fold(self.lora, lambda: self(ids).values)
            finally:
                self.train(mode)
            self._peft = []
            self.requires_grad_(False)

    def merge_lora_if_exact(self) -> None:
        """`merge_lora`, unless values would be others: what cannot be folded is right as it is, and a little slower."""
        with contextlib.suppress(ValueError):
            self.merge_lora()

    def values_of(self, hidden: Tensor) -> Tensor:
        """Values [..., M] in float32 and reward units, from the backbone's last hidden states [..., d]."""
        with torch.autocast(hidden.device.type, enabled=False):  # training may be in bfloat16, values are not
            standardised = nn.functional.linear(hidden.float(), self.head.weight.float(), self.head.bias.float())
        mean, scale = self.config.reward_units(hidden.device)
        return mean + scale * standardised

    def _save(self, folder: Path, **kwargs: Any) -> None:
        """With a LoRA adapter, save an adapter repo (adapter, head, config; no copy of the backbone).

        What a folder held of the other kind goes first: half of each would be read as something that nobody saved.
        """
        if is_quantized(self) and getattr(self, "hf_quantizer", None) is None:
            raise ValueError(
                "this value model was quantised when it was read from another format, and cannot be saved so: load it "
                "without quantization_config, save that, and give quantization_config when you load what was saved"
            )
        of_adapter, of_whole = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS), (WEIGHTS, f"{WEIGHTS}.index.json")
        for file in of_adapter if self.lora is None else of_whole:
            (folder / file).unlink(missing_ok=True)
        if self.lora is None:
            super()._save(folder, **kwargs)
        else:
            self._save_adapter(folder, self.lora)

    def _save_adapter(self, folder: Path, peft: PeftModel) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = get_peft_model_state_dict(peft, adapter_name=peft.active_adapter)
        adapter = {k: v.detach().contiguous().cpu() for k, v in state.items()}
        lora = copy.deepcopy(peft.active_peft_config)
        lora.base_model_name_or_path, lora.inference_mode = self.config.backbone, True
        lora.save_pretrained(str(folder))
        save_file(adapter, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        head = {k: v.detach().contiguous().cpu() for k, v in self.head.state_dict().items()}
        save_file(head, folder / HEAD_WEIGHTS, metadata={"format": "pt"})
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        backbone: PreTrainedModel | str | None = None,
        merge: bool = True,
        objectives: Sequence[str] | None = None,
        check: bool = True,
        **kwargs: Any,
    ) -> ValueModel:
        """Load a value model from the Hub or a folder.

        Reads what `save_pretrained` writes (full or adapter repo), a `...ForSequenceClassification` checkpoint with M
        labels, with or without a PEFT adapter, and a causal model with TRL's value head. Safetensors only.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            backbone: for adapter repos, the model (or its id) whose first layers the adapter sits on; by default it is
                loaded from where the config says.
            merge: fold a LoRA adapter into the weights, which is faster; False keeps it trainable.
            objectives: names of the outputs, for checkpoints that do not name them.
            check: for adapter repos, refuse a backbone with other weights than the adapter was trained on.
            kwargs: as for every transformers model (`revision`, `token`, `cache_dir`, `subfolder`, `dtype`,
                `attn_implementation`, ...). An adapter repo takes these and `device_map`.

        Raises:
            OSError: nothing there, a corrupt file, one with tensors too few or too many, or weights only as pickles.
            ValueError: neither a value model nor one of the formats above, a missing backbone or (with `check`) another
                one, or an argument that has no effect on this format.
        """
        return cls.load(str(pretrained_model_name_or_path), Options(backbone, None, merge, objectives, check), **kwargs)

    @classmethod
    def load(cls, name: str, options: Options, **kwargs: Any) -> ValueModel:
        """`from_pretrained` with all its options in one; raises as it."""
        found = look(name, kwargs)
        with damage_is_os_error(name):
            if found.is_whole:
                own = super().from_pretrained
                return load_complete(own, name, "none", **found.arguments).eval()  # type: ignore[arg-type, no-any-return]
            return cls._of(read(found, options), options.merge)

    @classmethod
    def _of(cls, checkpoint: Checkpoint, merge: bool) -> ValueModel:
        """What was read, put together; an adapter is folded into the weights if `merge`."""
        model = cls._assemble(checkpoint.config, checkpoint.trunk)
        if checkpoint.lora is not None:
            checkpoint.lora.inference_mode = merge
            try:
                model.add_lora(checkpoint.lora)
            except (RuntimeError, ValueError) as error:  # PEFT's words for layers that are not there
                raise ValueError(
                    f"the adapter in {checkpoint.folder} does not fit the backbone given: {error}"
                ) from error
            assert model.lora is not None
            put_on(model.lora, checkpoint.folder, checkpoint.adapter)
        check_tensors(checkpoint.folder, checkpoint.head, model.head.state_dict())
        model.head.load_state_dict(checkpoint.head)
        model.eval()
        if merge:
            model.merge_lora_if_exact()
        if checkpoint.attention is not None:
            model.set_attn_implementation(checkpoint.attention)
        return model if checkpoint.device is None else model.to(checkpoint.device)


def _rolled(x: Tensor, shift: Tensor) -> Tensor:
    """[R, T, ...] with row r moved by `shift[r]` places to the right, around the end."""
    places = (torch.arange(x.shape[1], device=x.device) - shift[:, None]) % x.shape[1]
    return x[torch.arange(len(x), device=x.device)[:, None], places]


AutoConfig.register(ValueModelConfig.model_type, ValueModelConfig, exist_ok=True)
AutoModel.register(ValueModelConfig, ValueModel, exist_ok=True)
