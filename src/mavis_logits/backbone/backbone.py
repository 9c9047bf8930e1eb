"""`Backbone`: one language model as this library sees it. The only way to a user's model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from . import anatomy, probe, weights
from .anatomy import UnsupportedModel
from .attention import holding, implementation_of
from .cache import RaggedCache, Windows
from .hooks import after, before
from .probe import Reading

_INPUTS = ("input_ids", "attention_mask", "position_ids", "cache", "use_cache")


class Backbone:
    """A transformers model: where its parts are, and how it may be read. Make it with `Backbone.of`.

    It holds the model and nothing else; what had to be tried is known for each class and configuration.

    Attributes:
        model: what generates, without PEFT's, torch.compile's and DistributedDataParallel's wrappers.
        decoder: what maps token ids to last hidden states and takes the cache; the model itself if it has no scores.
        config: of the decoder's text side.
    """

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel) -> None:
        self.model, self.decoder = model, decoder
        self.config: PreTrainedConfig = anatomy.text_config(decoder)

    @classmethod
    def of(cls, model: nn.Module) -> Backbone:
        """The backbone of a causal language model or of a bare decoder.

        Raises:
            UnsupportedModel: no transformers model, or one without a decoder.
        """
        inner = anatomy.unwrapped(model)
        return cls(inner, anatomy.find_decoder(inner))

    @property
    def name(self) -> str:
        """The class of the model, for messages."""
        return type(self.model).__name__

    # What there is

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of the decoder, in order; without those that only images pass.

        Raises:
            UnsupportedModel: they cannot be told.
        """
        place = self._place
        every: nn.ModuleList = self.decoder.get_submodule(place.name)  # type: ignore[assignment]
        if not place.skipped:
            return every
        return nn.ModuleList(layer for layer in every if type(layer) not in place.skipped)

    @property
    def width(self) -> int:
        """d, of the states after every layer."""
        place = probe.layers_of(self.decoder)
        return int(self.config.hidden_size) * (1 if isinstance(place, str) else place.times)

    @property
    def output_width(self) -> int:
        """d of the last hidden states, where these are of another width than inner ones (OPT-350m)."""
        return anatomy.output_width(self.config)

    def takes(self, name: str) -> bool:
        """Whether the decoder's forward has an argument of this name."""
        return name in anatomy.arguments_of(self.decoder).names

    @property
    def vocabulary(self) -> int:
        """How many token ids the decoder knows."""
        return anatomy.embedding_rows(self.decoder)

    @property
    def scores(self) -> int:
        """V, how many scores the model gives."""
        rows = getattr(self.output_layer, "out_features", None)
        return int(rows if rows is not None else self.output_embedding.shape[0])

    @property
    def longest(self) -> int | None:
        """The tokens that there are positions for; None if unknown or unlimited."""
        return anatomy.longest_sequence(self.config)

    @property
    def windows(self) -> Windows:
        """Every kind of attention layer with its reach in tokens (None: unlimited), for `attention_masks`."""
        return anatomy.attention_windows(self.config) or {"full_attention": None}

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompt is read by an encoder of its own."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def output_layer(self) -> nn.Module:
        """The layer that makes scores of hidden states.

        Raises:
            UnsupportedModel: the model has none.
        """
        layer = anatomy.output_layer(self.model)
        if layer is None or getattr(layer, "weight", None) is None:
            raise UnsupportedModel(f"{self.name} has no output embedding; steering needs a causal language model")
        return layer

    @property
    def output_embedding(self) -> Tensor:
        """The weights [V, d] of the output layer, detached: as it computes, were they packed, adapted or offloaded.

        Raises:
            UnsupportedModel: they cannot be told.
        """
        weight = weights.weight_of(self.output_layer)
        if weight is None:
            raise UnsupportedModel(f"the output embedding of {self.name} cannot be read: load its weights unquantised")
        return weight

    @property
    def shares_layers(self) -> bool:
        """Whether linear layers at several places are one, or share their weights (Zamba)."""
        every = self.decoder.named_modules(remove_duplicate=False)
        weights = [layer.weight for _, layer in every if isinstance(layer, nn.Linear)]
        return len(weights) != len(set(weights))

    # How it may be read

    @property
    def reading(self) -> Reading:
        """How candidates after cached rows may be read, found by trial (`probe`)."""
        return probe.reading_of(self.decoder)

    @property
    def trees(self) -> Reading:
        """Whether trees packed into one sequence may be read without a cache; training asks this."""
        return probe.trees_of(self.decoder)

    @property
    def stable_length(self) -> int | None:
        """The length from which on cached keys are off, since rotary frequencies depend on it; None if never."""
        return anatomy.frequencies_change_at(self.config)

    @property
    def hands_mask_on(self) -> bool:
        """Whether `generate` gives the model the attention mask of a prompt; some types prepare inputs without."""
        if self.is_encoder_decoder:
            return True
        ones = torch.ones(1, 2, dtype=torch.long, device=self.model.device)
        try:
            prepare: Any = self.model.prepare_inputs_for_generation
            inputs = prepare(ones, attention_mask=ones, use_cache=False)
        except Exception:  # made for arguments that only generate has
            return True
        return inputs.get("attention_mask") is not None

    @property
    def drifts(self) -> bool:
        """Whether from `stable_length` on frequencies change with every token, and `generate` keeps stale keys."""
        return anatomy.frequencies_drift(self.config)

    def require_causal(self) -> None:
        """Raise `UnsupportedModel` if states depend on later tokens too."""
        if not probe.is_causal(self.decoder):
            raise UnsupportedModel(
                f"{type(self.decoder).__name__} reads text in both directions, so a state depends on what comes after: "
                "load a causal language model (for BERT and its kin: is_decoder=True in its config)"
            )

    def why_not_handed_on(self, device: torch.device) -> str | None:
        """Why masks, positions and a cache given to the model would not reach its decoder; None if they do.

        Found by a call of the model that is cut off at its decoder, so that nothing but the embedding is computed.

        Args:
            device: of the tokens that it is given.
        """
        if self.model is self.decoder:
            return None
        if "prepare_inputs_for_generation" in vars(self.model):
            return "a soft prompt is put before its input"
        cache = RaggedCache(1, device)
        one = torch.ones(1, dtype=torch.long, device=device)
        feed = cache.prepare(one[None], one)
        given = feed.inputs(self.windows, self.decoder.dtype) | {"cache": cache, "use_cache": True}
        arrived: dict[str, Any] = {}
        thread = threading.get_ident()

        def cut_off(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if threading.get_ident() == thread:  # others may be using the model
                arrived.update(kwargs or {})
                raise _Reached

        handle = before(self.decoder, cut_off, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(**self._bound(self.model, {**dict.fromkeys(_INPUTS), **given}, handed_on=True))
        except _Reached:
            pass
        except (UnsupportedModel, TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
            return f"{self.name} takes no ragged cache ({error})"
        finally:
            handle.remove()
        mask = arrived.get("attention_mask")
        same = mask is given["attention_mask"] or (isinstance(mask, dict) and mask == given["attention_mask"])
        positions = arrived.get("position_ids")
        if not same or positions is None or anatomy.given_cache(arrived) is not cache:
            return f"{self.name} does not hand mask, positions and cache on to its {type(self.decoder).__name__}"
        return None

    # Reading

    def states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        """Read tokens: the only call of a decoder's forward.

        Returns:
            its last hidden states [R, T, d], and its cache if it gave one.

        Raises:
            UnsupportedModel: an input given is none that the decoder takes. Nothing is dropped in silence.
        """
        output = self.decoder(**self._bound(self.decoder, locals(), handed_on=False), **more)
        return output.last_hidden_state, anatomy.cache_of(output)

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        every: bool = False,
        **more: Any,
    ) -> Tensor:
        """Next-token scores [R, T, V]; unless `every`, of the last position alone where the model can spare others."""
        if self.model._supports_logits_to_keep() and not every:
            more = {"logits_to_keep": 1} | more
        return self.model(**self._bound(self.model, locals(), handed_on=True), **more).logits

    def encoded(self, source: Tensor) -> Any:
        """What the encoder of an encoder-decoder makes of prompts [R, S] without padding."""
        return self.model.get_encoder()(input_ids=source, return_dict=True)

    def decoded(self, encoded: Any, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Next-token scores [R, V] of an encoder-decoder, and its cache.

        Args:
            encoded: as from `encoded`.
            tokens: [R, T] of the answers, those that `cache` has not yet.
            cache: of an earlier call.
        """
        output = self.model(encoder_outputs=encoded, decoder_input_ids=tokens, past_key_values=cache, use_cache=True)
        return output.logits[:, -1].float(), output.past_key_values

    def _bound(self, module: nn.Module, given: dict[str, Any], handed_on: bool) -> dict[str, Any]:
        wanted = {name: given[name] for name in _INPUTS}
        return anatomy.arguments_of(module).bind(type(module).__name__, wanted, handed_on)

    def packed_attention(self) -> AbstractContextManager[Any]:
        """While it is open, the decoder runs `ragged_attention`."""
        return holding(self.decoder)

    def catch(self, layer: int | None, catch: Callable[[Tensor], None]) -> RemovableHandle:
        """Have `catch` called with the states of every forward pass.

        Args:
            layer: after how many layers the states are read, 1 to all; None: what enters the output layer.
            catch: given [R, T, d], or [R, d] where only the last position goes on to the output layer. Of parallel
                residual streams it is given the mean.

        Returns:
            What takes the hook off again.
        """
        if layer is None:
            # ProphetNet foresees several tokens; the first of its streams [R, streams, T, d] is of the next one.
            return before(
                self.output_layer, lambda args: catch((args[0][:, 0] if args[0].ndim == 4 else args[0]).detach())
            )
        place = self._place
        if not 1 <= layer <= len(self.layers):
            raise UnsupportedModel(f"{self.name} has {len(self.layers)} layers: name one of 1 to {len(self.layers)}")
        return after(
            self.layers[layer - 1], lambda _, output: catch(place.arranged(anatomy.states_of(output)).detach())
        )

    @property
    def _place(self) -> probe.LayerPlace:
        place = probe.layers_of(self.decoder)
        if isinstance(place, str):
            raise UnsupportedModel(
                f"the layers of {type(self.decoder).__name__} cannot be read from ({place}): use value heads that read "
                "what enters the output embedding (layer: output in training)"
            )
        return place

    # Copies

    def truncated(self, num_layers: int | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A copy of the decoder with only its first `num_layers` layers (None: all), in `dtype` (None: its own).

        Raises:
            ValueError: so many layers are not there, or the decoder cannot be cut.
        """
        decoder = self.decoder
        config = copy.deepcopy(decoder.config)
        if num_layers == anatomy.field(self.config, "num_hidden_layers"):
            num_layers = None  # all there are, whether or not they can be told apart
        if num_layers is not None:
            total = len(self.layers)
            if not 1 <= num_layers <= total:
                raise ValueError(
                    f"num_layers must be 1 to {total} (the layers that {type(decoder).__name__} has), got {num_layers}"
                )
            if num_layers < total:
                why = probe.cut_of(decoder, total, num_layers)
                if why is not None:
                    raise ValueError(
                        f"{type(decoder).__name__} cannot be cut to {num_layers} layers ({why}): leave num_layers out"
                    )
                anatomy.cut_config(config, total, num_layers)
        with torch.random.fork_rng(devices=[]):  # of weights that are overwritten
            trunk = anatomy.build(
                type(decoder),
                config,
                attn_implementation=implementation_of(decoder.config),
                dtype=dtype or decoder.dtype,
            )
        try:
            weights.copy_weights(decoder, trunk)
        except ValueError as error:
            raise ValueError(f"{type(decoder).__name__} cannot be cut to fewer layers: {error}") from error
        return trunk.eval() if not decoder.training else trunk

    def special(
        self, pad: int | None = None, eos: int | Iterable[int] | None = None
    ) -> tuple[int | None, frozenset[int]]:
        """The padding token and the EOS tokens: as given, else of the generation config, else of the config.

        Padding is never made up of EOS.
        """
        configs = [getattr(self.model, "generation_config", None), self.model.config, self.config]

        def first(name: str, given: Any) -> Any:
            found = (getattr(config, name, None) for config in configs)
            return given if given is not None else next((value for value in found if value is not None), None)

        ends = first("eos_token_id", eos)
        return first("pad_token_id", pad), frozenset([ends] if isinstance(ends, int) else ends or ())


class _Reached(Exception):
    """Leaves a forward pass at the decoder."""
