"""Reading value models in every format in which people have them.

- our own: a full repo, or an adapter repo (LoRA adapter, head and config, without the backbone);
- `...ForSequenceClassification` with M labels, with or without a PEFT adapter: the authors' own value models, and most
  reward models on the Hub;
- a causal language model with a value head as TRL's `AutoModelForCausalLMWithValueHead` used to write it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ..backbone import Backbone, UnsupportedModel
from ..backbone.anatomy import name_of_class
from ..backbone.attention import implementation_of
from ..backbone.needs import Needs
from ..backbone.weights import copy_weights
from ..hub.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HEAD_WEIGHTS,
    WEIGHTS,
    commit_of,
    find_file,
    find_weights,
    hub_arguments,
    load_complete,
    read_json,
)
from .adapters import adapter_settings, folded, put_on
from .value_model_config import ValueModelConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_TRL_HEAD = "v_head.summary."


@dataclass(frozen=True)
class Options:
    """How a value model is read; see `ValueModel.from_pretrained`.

    Attributes:
        backbone: of an adapter, as the caller insists.
        base: a model that is used as an adapter's backbone if it is the one that the adapter was trained on.
        merge: fold an adapter into the weights.
        objectives: names of the outputs.
        check: refuse another backbone than an adapter was trained on.
    """

    backbone: PreTrainedModel | str | None = None
    base: PreTrainedModel | None = None
    merge: bool = True
    objectives: Sequence[str] | None = None
    check: bool = True


@dataclass(frozen=True)
class Found:
    """What lies under a name.

    Attributes:
        name: Hub id or folder.
        config, adapter: content of its `config.json` and `adapter_config.json`; {} where there is none.
        hub: arguments that say where and at which commit.
        arguments: all, as for transformers' models.
    """

    name: str
    config: dict[str, Any]
    adapter: dict[str, Any]
    hub: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def is_whole(self) -> bool:
        """Whether it is a value model as `save_pretrained` writes it, no adapter."""
        return self.is_own and not self.adapter

    @property
    def is_own(self) -> bool:
        """Whether its config is a value model's."""
        return self.config.get("model_type") == ValueModelConfig.model_type


@dataclass(frozen=True)
class Checkpoint:
    """A value model as it was read, before it is put together.

    Attributes:
        config: of the value model.
        trunk: its decoder, without the adapter.
        head: tensors of its linear head.
        folder: where they were found, for messages.
        lora, adapter: LoRA's settings and tensors; None and {} without one.
        attention, device: as asked for; None for what is there.
    """

    config: ValueModelConfig
    trunk: PreTrainedModel
    head: dict[str, Tensor]
    folder: Path | str = ""
    lora: LoraConfig | None = None
    adapter: dict[str, Tensor] = field(default_factory=dict)
    attention: str | None = None
    device: Any = None


def look(name: str, arguments: dict[str, Any]) -> Found:
    """What lies under `name` (Hub id or folder), with arguments as for transformers' models."""
    hub = hub_arguments(arguments)
    found: list[dict[str, Any]] = []
    for file in ("config.json", ADAPTER_CONFIG):
        path = find_file(name, file, hub)
        found.append({} if path is None else read_json(path))
        commit = commit_of(path)
        if commit is not None:  # all else comes from the same one
            hub["revision"] = arguments["revision"] = commit
    config, adapter = found
    return Found(name, config, adapter, hub, arguments)


def read(found: Found, options: Options) -> Checkpoint:
    """A value model that is not whole: an adapter of ours, a sequence classifier or TRL's.

    Raises:
        OSError, ValueError: as `ValueModel.from_pretrained`.
    """
    if found.is_own:
        return _own_adapter(found, options)
    if found.adapter.get("task_type") == "SEQ_CLS" or _is_sequence_classifier(found.config):
        return _sequence_classifier(found, options)
    head = _trl_head(found.name, found.hub)
    if head:
        return _trl(found, head, options.objectives)
    name = found.name
    if not found.adapter and find_file(name, "pytorch_model.bin", found.hub):
        raise OSError(
            f"{name} has its weights only as a pickle (pytorch_model.bin), which is not loaded: convert it to "
            "safetensors"
        )
    kind = found.config.get("model_type") or found.adapter.get("task_type") or "nothing with a config.json"
    raise ValueError(
        f"{name} is no value model (found: {kind}). Expected a saved ValueModel, a sequence-classification checkpoint "
        "or a causal model with TRL's value head; ValueModel.from_backbone makes a new one."
    )


def _of_another_repo(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` without those that say where in one repo something is."""
    return {key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}


def _is_sequence_classifier(config: dict[str, Any]) -> bool:
    return any("ForSequenceClassification" in name for name in config.get("architectures") or ())


def _own_adapter(found: Found, options: Options) -> Checkpoint:
    name, hub, kwargs = found.name, found.hub, found.arguments
    given = kwargs.get("config")  # AutoModel has read it already
    config = given if isinstance(given, ValueModelConfig) else ValueModelConfig.from_dict(found.config)
    files = {file: find_file(name, file, hub) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS)}
    missing = [file for file, path in files.items() if path is None]
    if missing:
        raise OSError(f"{name} is an adapter repo without {', '.join(missing)}: download or save it again")
    dtype, attention, device = adapter_settings(name, kwargs)
    trunk = _trunk(name, config, options, dtype or config.backbone_config.dtype or torch.float32, hub, kwargs)
    if Backbone.of(trunk).vocabulary != config.backbone_config.vocab_size:
        config.backbone_config = trunk.config  # the embedding has grown since
    folder = files[ADAPTER_WEIGHTS].parent  # type: ignore[union-attr]
    lora = LoraConfig.from_pretrained(str(folder))
    adapter, head = load_file(folder / ADAPTER_WEIGHTS), load_file(folder / HEAD_WEIGHTS)
    return Checkpoint(config, trunk, head, folder, lora, adapter, attention, device)


def _trunk(
    name: str, config: ValueModelConfig, options: Options, dtype: torch.dtype, hub: Mapping[str, Any], kwargs: Any
) -> PreTrainedModel:
    """The layers that an adapter was trained on.

    They are cut from the backbone that is insisted on, else from the base model if they are in it, else from what the
    config names.
    """
    layers, why_not = config.backbone_config.num_hidden_layers, None
    if options.backbone is None and options.base is not None and _may_be_in(config, options.base):
        trunk = Backbone.of(options.base).truncated(layers, dtype)
        why_not = Needs.of(config).backbone_difference(trunk)
        if why_not is None:
            return trunk
    source = config.backbone if options.backbone is None else options.backbone
    if source is None:
        raise ValueError(f"{name} is an adapter and its config names no backbone: pass backbone=MODEL")
    if isinstance(source, str):
        more = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
        try:
            source = load_complete(AutoModel.from_pretrained, source, **_of_another_repo(dict(hub)), **more)
        except OSError as error:
            instead = f". The base model given cannot take its place: {why_not}" if why_not is not None else ""
            raise OSError(
                f"{name} is an adapter on the first layers of {source}, which could not be loaded: pass the loaded "
                f"model as backbone= (a processor that is given model= does so), or download it first{instead}"
            ) from error
    trunk = Backbone.of(source).truncated(layers, dtype)
    difference = Needs.of(config).backbone_difference(trunk) if options.check else None
    if difference is not None:
        message = (
            f"the adapter {name} does not fit the backbone given: it was trained on other weights "
            f"({config.backbone or 'of no name'}), and its values would be off. Pass the model it was trained on as "
            "backbone="
        )
        if config.backbone_sketch is None:  # of version 1, which cannot tell a copy in float16 from another model
            warnings.warn(f"{message}. {difference[0].upper()}{difference[1:]}.", stacklevel=5)
        else:
            raise ValueError(
                f"{message}, or check=False if you know that they are the same. What is different: {difference}"
            )
    return trunk


def _may_be_in(config: ValueModelConfig, base: PreTrainedModel) -> bool:
    """Whether a model is worth comparing with the layers that an adapter was trained on."""
    try:
        backbone = Backbone.of(base)
    except UnsupportedModel:  # as vLLM has it, in layers of its own
        return False
    if config.backbone_fingerprint is None:  # nothing to compare: the name must do
        return config.backbone == backbone.model.config.name_or_path
    found, wanted = backbone.config, config.backbone_config
    names = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads")
    return all(getattr(found, name, None) == getattr(wanted, name, None) for name in names)


def _sequence_classifier(found: Found, options: Options) -> Checkpoint:
    """The trunk and the `score` layer of a sequence classifier; its own pooling by padding ids is not used."""
    name = found.name
    if not found.adapter:
        load = AutoModelForSequenceClassification.from_pretrained
        classifier = load_complete(load, name, "outside", **found.arguments)
    elif not options.merge:
        raise ValueError(f"{name} is a PEFT sequence classifier, which is read merged: use merge=True")
    else:
        classifier = _adapted_classifier(name, found.adapter, options, found.hub, found.arguments)
    score_layer = getattr(classifier, "score", None)
    if not isinstance(score_layer, torch.nn.Linear):
        raise ValueError(
            f"{name}: {type(classifier).__name__} has no linear `score` layer on a decoder; it cannot be read"
        )
    names = _names(classifier, options.objectives, name)
    return _with_head(Backbone.of(classifier).decoder, score_layer.weight, score_layer.bias, names)


def _adapted_classifier(
    name: str, adapter: dict[str, Any], options: Options, hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """A sequence classifier with a PEFT adapter folded into it."""
    dtype, attention, device = adapter_settings(name, kwargs)
    tensors = _tensors(name, ADAPTER_WEIGHTS, "", hub)
    score = [tensor for key, tensor in tensors.items() if key.endswith("score.weight")]
    labels = len(score[0]) if score else len(options.objectives or ["reward"])
    base = _classifier_base(
        options.backbone or adapter["base_model_name_or_path"], labels, bool(score), dtype, _of_another_repo(hub)
    )
    if attention is not None:
        base.set_attn_implementation(attention)
    lora = PeftConfig.from_pretrained(name, **hub)
    if lora.is_prompt_learning:
        raise ValueError(f"{name} is a soft prompt, which cannot be folded into a value model's weights: train a LoRA")
    model = get_peft_model(base, lora)
    put_on(model, name, tensors)  # type: ignore[arg-type]
    try:
        classifier: PreTrainedModel = folded(model, Backbone.of(base).vocabulary)  # type: ignore[assignment, arg-type]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return classifier if device is None else classifier.to(device)  # type: ignore[arg-type]


def _classifier_base(
    backbone: PreTrainedModel | str, labels: int, score_follows: bool, dtype: torch.dtype | None, hub: dict[str, Any]
) -> PreTrainedModel:
    """What a PEFT sequence classifier's adapter sits on; a copy, because PEFT changes the model it is given.

    Raises:
        OSError: there is none, or one without some of the weights. Its `score` layer may be lacking if the adapter
            brings one (`score_follows`).
    """
    if isinstance(backbone, str):
        own, replaced = hub | ({} if dtype is None else {"dtype": dtype}), ()
        if score_follows:
            own, replaced = own | {"num_labels": labels}, ("score.weight",)  # type: ignore[assignment]
        return load_complete(AutoModelForSequenceClassification.from_pretrained, backbone, replaced=replaced, **own)  # type: ignore[no-any-return]
    scored = hasattr(backbone, "score")
    if not scored and not score_follows:
        raise OSError(
            "the adapter brings no `score` layer, and the backbone given has none: pass the classifier that it was "
            "trained on as backbone="
        )
    config = copy.deepcopy(backbone.config)
    config.num_labels = backbone.config.num_labels if scored else labels
    classifier = AutoModelForSequenceClassification.from_config(
        config, dtype=dtype or backbone.dtype, attn_implementation=implementation_of(backbone.config)
    )
    if scored:
        copy_weights(backbone, classifier)
    else:
        copy_weights(Backbone.of(backbone).decoder, Backbone.of(classifier).decoder)
    return classifier  # type: ignore[no-any-return]


def _names(classifier: PreTrainedModel, objectives: Sequence[str] | None, name: str) -> list[str]:
    count = classifier.config.num_labels
    if objectives is not None:
        if len(objectives) != count:
            raise ValueError(
                f"{name} has {count} outputs, but {len(objectives)} objectives were named: {list(objectives)}"
            )
        return list(objectives)
    labels = [classifier.config.id2label[i] for i in range(count)]
    if count == 1 and labels[0] == "LABEL_0":
        return ["reward"]
    return labels


def _trl_head(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """Weight and bias of TRL's value head, if the checkpoint has one."""
    head = _tensors(name, WEIGHTS, _TRL_HEAD, hub)
    if head and not any(key.endswith("weight") for key in head):
        raise OSError(f"{name} lacks {_TRL_HEAD}weight: download or save it again")
    return {key.rpartition(".")[2]: tensor for key, tensor in head.items()}


def _tensors(name: str, file: str, part: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors with `part` in their names, from a safetensors file or its shards."""
    found: dict[str, Tensor] = {}
    for path in find_weights(name, file, hub, part):
        with safe_open(path, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys() if part in key}  # noqa: SIM118
    return found


def _trl(found: Found, head: dict[str, Tensor], objectives: Sequence[str] | None) -> Checkpoint:
    """The trunk and value head of TRL; some versions wrote the trunk's weights as `pretrained_model.*`."""
    arguments = {"key_mapping": {r"^pretrained_model\.": ""}} | found.arguments
    causal = load_complete(AutoModelForCausalLM.from_pretrained, found.name, "outside", **arguments)
    return _with_head(Backbone.of(causal).decoder, head["weight"], head.get("bias"), list(objectives or ["reward"]))


def _with_head(trunk: PreTrainedModel, weight: Tensor, bias: Tensor | None, objectives: list[str]) -> Checkpoint:
    if len(weight) != len(objectives):
        raise ValueError(f"{len(weight)} outputs were found, but {len(objectives)} objectives named: {objectives}")
    config = ValueModelConfig(
        backbone_config=trunk.config,
        backbone_class=name_of_class(trunk),
        objectives=objectives,
        pad_token_id=trunk.config.pad_token_id,
    )
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    return Checkpoint(config, trunk, {"weight": weight.detach(), "bias": bias.detach()})
