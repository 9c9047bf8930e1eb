"""Value heads: Q(s, a) from the hidden state that the base model has just computed. No second language model.

The base model's hidden state after one of its layers summarises s; a small network over it and the candidate's
embedding gives the value of choosing a. Nothing is prefilled or cached, so steering costs little more than plain
decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..backbone import Backbone
from ..backbone.fingerprint import Identity
from ..backbone.needs import Needs
from ..backbone.weights import WeakModel, execution_device, state_of
from ..core.objectives import ObjectivesMixin, check_objectives
from ..hub.files import load_complete
from ..hub.mixin import PushMixin

_CHUNK_ELEMENTS = 1 << 24  # of the [R, k, width] activations that are alive at once


class ValueHeadConfig(ObjectivesMixin, PreTrainedConfig):
    """Configuration of a `ValueHead`.

    Args:
        hidden_size: d, width of the base model's hidden state.
        embedding_size: width of its output embedding.
        vocab_size: V.
        width: of the head.
        num_layers: residual GELU layers.
        rank: None: these layers read state and candidate together, for every candidate anew; a number: they read the
            state alone, and a candidate's value is a product of so many factors of the state with as many of the
            candidate. That costs far less, and is the form of what a tuned output layer changes.
        dropout: while training.
        layer: after how many of the base model's layers the state is read, 1 to all; None: what enters the output
            embedding.
        base_fingerprint, base_sketch: of the base model's weights (`mavis_logits.backbone.fingerprint.Identity`).
        objectives, reward_mean, reward_scale, tokenizer_fingerprint, base_model, base_revision, recipe, iteration:
            see `ObjectivesMixin`.
    """

    model_type = "mavis_value_head"

    def __init__(
        self,
        hidden_size: int = 576,
        embedding_size: int = 576,
        vocab_size: int = 49152,
        width: int = 512,
        num_layers: int = 1,
        dropout: float = 0.0,
        layer: int | None = None,
        base_fingerprint: str | None = None,
        base_sketch: str | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, or None, got {rank}")
        self.hidden_size, self.embedding_size, self.vocab_size = hidden_size, embedding_size, vocab_size
        self.width, self.num_layers, self.dropout, self.rank = width, num_layers, dropout, rank
        self.layer, self.base_fingerprint, self.base_sketch = layer, base_fingerprint, base_sketch
        kwargs = self._take_objectives(kwargs)
        super().__init__(**kwargs)


class ValueHead(PushMixin, PreTrainedModel):
    """Value head over h, the base model's hidden state after `config.layer` of its layers, or what enters its output
    embedding, and e_a, the candidate's row of that embedding, both normalised.

    Pairwise, the default: z = LayerNorm(W_h h + W_e e_a), residual GELU layers, M outputs. With `config.rank`: z =
    LayerNorm(W_h h), residual GELU layers, and Q_m(s, a) = b_m(z) + u_m(z) . W_e e_a / sqrt(rank).

    A head belongs to one base model and must be bound to it (`bind`) before use.
    """

    config: ValueHeadConfig
    reads: Literal["states"] = "states"
    config_class = ValueHeadConfig
    base_model_prefix = "head"
    main_input_name = "hidden"

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__(config)
        self.state = nn.Linear(config.hidden_size, config.width)
        self.action = nn.Linear(config.embedding_size, config.rank or config.width, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.num_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(config.width, len(config.objectives))
        if config.rank is not None:
            self.factors = nn.Linear(config.width, len(config.objectives) * config.rank, bias=False)
        self._embedding: list[Tensor] = []  # in a list, so that it is no parameter: it belongs to the base model
        self._table: tuple[Any, Tensor, list[Tensor]] | None = None
        self._base = WeakModel()
        self._base_state: tuple[int, torch.device] | None = None  # when it was bound
        self._vouched: tuple[str, str] | None = None  # weights that the user has said are right
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is getattr(self, "factors", None):
            nn.init.zeros_(module.weight)  # nothing is steered before something is learned
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        objectives: Sequence[str],
        width: int = 512,
        num_layers: int = 1,
        dropout: float = 0.0,
        **config: Any,
    ) -> ValueHead:
        """A new head for `model`, bound to it.

        Args:
            model: the base causal language model.
            objectives: names of the M outputs.
            width, num_layers, dropout: of the head.
            config: further fields of `ValueHeadConfig`.
        """
        check_objectives(objectives)
        backbone, identity = Backbone.of(model), Identity(model)
        rows, columns = backbone.output_embedding.shape
        settings = {"base_model": backbone.model.config.name_or_path or None} | config
        head_config = ValueHeadConfig(
            hidden_size=columns if config.get("layer") is None else backbone.width,
            embedding_size=columns,
            vocab_size=rows,
            width=width,
            num_layers=num_layers,
            dropout=dropout,
            objectives=list(objectives),
            base_fingerprint=identity.fingerprint,
            base_sketch=identity.sketch,
            **settings,
        )
        head = cls(head_config).to(execution_device(backbone.output_layer))  # type: ignore[arg-type]
        return head.bind(model, check=False)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> ValueHead:
        """Load a head from the Hub or a folder, safetensors only; `bind` it before use.

        Args:
            pretrained_model_name_or_path: Hub id or folder.
            kwargs: as for every transformers model (`revision`, `token`, `cache_dir`, `subfolder`, `dtype`, ...).

        Raises:
            OSError: nothing there, a corrupt or incomplete file, or weights only as a pickle.
            ValueError: `quantization_config` is given.
        """
        name = str(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            raise ValueError("a value head is small, and is not quantised: leave quantization_config out")
        return load_complete(super().from_pretrained, name, "none", **kwargs)  # type: ignore[no-any-return]

    def bind(self, model: PreTrainedModel, check: bool = True) -> ValueHead:
        """Take candidates' embeddings from `model`; returns self.

        Args:
            model: the base model whose hidden states `forward` will be given.
            check: refuse a model with other weights than the head was trained on. Without it, the weights that `model`
                has now count as those from then on.

        Raises:
            ValueError: another width, vocabulary, device or (with `check`) other weights.
        """
        state = (state_of(model), self.device)
        if check and self._base() is model and self._base_state == state:
            return self
        needs, backbone = Needs.of(self.config), Backbone.of(model)
        needs.check_shape(model)
        device = execution_device(backbone.output_layer)
        if device != self.device:
            raise ValueError(f"the value head is on {self.device}, the base model on {device}: move one of them")
        if not check:
            identity = Identity(model)
            self._vouched = (identity.fingerprint, identity.sketch)
        elif self._vouched is None or Identity(model).difference(*self._vouched) is not None:
            needs.check_states(model)
        self._embedding = [backbone.output_embedding]
        self._base, self._base_state = WeakModel(model), state
        return self

    def bind_embedding(self, embedding: Tensor) -> ValueHead:
        """Take candidates' embeddings from the table of a model that is no transformers model; returns self.

        Whose states `forward` is then given, and of which weights, is for the caller to know.

        Args:
            embedding: [V, d], the output embedding of the base model.

        Raises:
            ValueError: another vocabulary, width or device.
        """
        expected = (self.config.vocab_size, self.config.embedding_size)
        if tuple(embedding.shape) != expected:
            raise ValueError(
                f"this value head is for an output embedding of {expected[0]} x {expected[1]}, but the model given has "
                f"{' x '.join(map(str, embedding.shape))}: use the head's own base model, {self.config.base_model}"
            )
        if embedding.device != self.device:
            raise ValueError(
                f"the value head is on {self.device}, the embedding on {embedding.device}: move one of them"
            )
        self._embedding, self._base, self._base_state = [embedding], WeakModel(), None
        return self

    def follow(self) -> None:
        """Bind again if the base model has changed since: for when it is about to write another text.

        Raises:
            ValueError: it is no longer a model that this head can be bound to; `bind` says why.
        """
        model = self._base()
        if model is not None:
            self.bind(model)

    @property
    def units(self) -> Tensor:
        """Of all objectives: mean and scale of the rewards, and what counts as one in a tilt, [3, M] on the CPU."""
        return self.config.units()

    @property
    def is_bound(self) -> bool:
        """Whether `bind` has been called."""
        return bool(self._embedding)

    def forward(self, hidden: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Values of candidates.

        Args:
            hidden: [R, d], the base model's state after `config.layer` at the last position of each row.
            candidates: [R, k] token ids, or None for the whole vocabulary.

        Returns:
            float32 [R, k, M] (k = V for None), in reward units.

        Raises:
            ValueError: the head is not bound to a base model, or `hidden` has another shape.
        """
        if not self.is_bound:
            raise ValueError("this value head is bound to no base model: call head.bind(model) first")
        if hidden.ndim != 2 or hidden.shape[1] != self.config.hidden_size:
            raise ValueError(f"hidden must be [rows, {self.config.hidden_size}], got {list(hidden.shape)}")
        state = self.state(_normalised(hidden.to(self.state.weight)))  # an inner layer may be on another device
        read = self._read_together(state) if self.config.rank is None else self._read_factors(state)
        if candidates is not None and self.training:
            return self._in_reward_units(read(self._learned_actions(candidates)))
        actions = self._actions()
        step = max(1, _CHUNK_ELEMENTS // (len(state) * actions.shape[1]))
        parts = actions.split(step) if candidates is None else (actions[part] for part in candidates.split(step, dim=1))
        return self._in_reward_units(torch.cat([read(part) for part in parts], dim=1))

    def _read_together(self, state: Tensor) -> Callable[[Tensor], Tensor]:
        """What gives outputs [R, k, M] of W_e e_a, [R, k, width] or [k, width], after W_h h [R, width]."""
        return lambda actions: self.out(self._through_layers(state[:, None] + actions))

    def _read_factors(self, state: Tensor) -> Callable[[Tensor], Tensor]:
        """The same by `config.rank` factors; the layers read each state once."""
        features = self._through_layers(state)
        own = self.out(features)[:, None]
        factors = self.factors(features).unflatten(1, (-1, self.action.out_features)) * self.action.out_features**-0.5
        return lambda actions: actions @ factors.mT + own

    def _through_layers(self, features: Tensor) -> Tensor:
        features = self.dropout(self.norm(features))
        for layer in self.layers:
            features = features + self.dropout(nn.functional.gelu(layer(features)))
        return features

    def _in_reward_units(self, said: Tensor) -> Tensor:
        mean, scale = self.config.reward_units(said.device)
        return mean + scale * said.float()

    def _learned_actions(self, candidates: Tensor) -> Tensor:
        """W_e e_a [R, k, .] of candidates, through which gradients flow; of every token once."""
        embedding = self._embedding[0]
        tokens, which = candidates.to(embedding.device).unique(return_inverse=True)
        return self.action(_normalised(embedding[tokens].to(self.action.weight)))[which]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _actions(self) -> Tensor:
        """W_e e_a of every token, [V, width or rank]: computed once, and again when the weights have changed."""
        weight, embedding = self.action.weight, self._embedding[0]
        version = [(_version(x), x.data_ptr(), x.dtype, x.device) for x in (weight, embedding)]
        kept = self._table
        if kept is None or kept[0] != version:
            with torch.autocast(weight.device.type, enabled=False):
                table = torch.cat([self.action(_normalised(rows.to(weight))) for rows in embedding.split(8192)])
            kept = self._table = (version, table, [_sample(x).clone() for x in (weight, embedding)])
        return kept[1]

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, thorough: bool = True) -> None:
        """Notice weights changed in ways that `forward` does not see (through `weight.data`), if `thorough`.

        Waits for the device.
        """
        kept = self._table  # another thread may forget it meanwhile
        if thorough and kept is not None and self.is_bound:
            now = [_sample(x) for x in (self.action.weight, self._embedding[0])]
            if any(a.device != b.device or not torch.equal(a, b) for a, b in zip(now, kept[2], strict=True)):
                self._table = None

    def __getstate__(self) -> dict[str, Any]:
        # A pickled head is bound to no base model.
        return {**self.__dict__, "_embedding": [], "_table": None, "_base": WeakModel(), "_base_state": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueHead:
        """A head of its own, bound to the same base model."""
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._embedding, twin._base_state = list(self._embedding), self._base_state
        twin._base = copy.deepcopy(self._base, memo)  # if that is copied too, the copy
        return twin


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sample(weight: Tensor) -> Tensor:
    """A few elements of a matrix."""
    return weight.detach()[:: max(1, len(weight) // 8), :: max(1, weight.shape[1] // 8)]


def _normalised(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:])


AutoConfig.register(ValueHeadConfig.model_type, ValueHeadConfig, exist_ok=True)
AutoModel.register(ValueHeadConfig, ValueHead, exist_ok=True)
