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
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from .backbone import Backbone
from .backbone.anatomy import name_of_class
from .fingerprint import weights_fingerprint
from .loading import commit_of, damage_is_os_error, find_file, find_weights, hub_arguments, load_complete, read_json
from .value_model import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HEAD_WEIGHTS,
    ValueModel,
    ValueModelConfig,
    load_adapter,
)

if TYPE_CHECKING:
    from torch import Tensor

_TRL_HEAD = "v_head.summary."


def load_value_model(
    cls: type[ValueModel],
    name: str,
    *,
    backbone: PreTrainedModel | str | None,
    merge: bool,
    objectives: Sequence[str] | None,
    **kwargs: Any,
) -> ValueModel:
    """Load the value model `name` (Hub id or folder); see `ValueModel.from_pretrained`."""
    hub = hub_arguments(kwargs)
    found: list[dict[str, Any]] = []
    for file in ("config.json", ADAPTER_CONFIG):
        path = find_file(name, file, hub)
        found.append({} if path is None else read_json(path))
        commit = commit_of(path)
        if commit is not None:  # all else comes from the same one
            hub["revision"] = kwargs["revision"] = commit
    config, adapter = found
    with damage_is_os_error(name):
        if config.get("model_type") == ValueModelConfig.model_type:
            if adapter:
                return _load_own_adapter(cls, name, config, backbone, merge, hub, kwargs)
            return load_complete(cls._from_own_checkpoint, name, **kwargs).eval()  # type: ignore[return-value]
        if adapter.get("task_type") == "SEQ_CLS" or _is_sequence_classifier(config):
            return _load_sequence_classifier(cls, name, adapter, backbone, merge, objectives, hub, kwargs)
        head = _trl_head(name, hub)
        if head:
            return _load_trl(cls, name, head, objectives, kwargs)
    if not adapter and find_file(name, "pytorch_model.bin", hub):
        raise OSError(
            f"{name} has its weights only as a pickle (pytorch_model.bin), which is not loaded: convert it to "
            "safetensors"
        )
    kind = config.get("model_type") or adapter.get("task_type") or "nothing with a config.json"
    raise ValueError(
        f"{name} is no value model (found: {kind}). Expected a saved ValueModel, a sequence-classification checkpoint "
        "or a causal model with TRL's value head; ValueModel.from_backbone makes a new one."
    )


def _of_another_repo(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` without those that say where in one repo something is."""
    return {key: value for key, value in arguments.items() if key not in ("revision", "subfolder")}


def _one_device(name: str, device_map: Any) -> Any:
    """The device that a `device_map` means for a small model; None for where it is."""
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise ValueError(f"{name} is an adapter repo, which is put on one device: got device_map={device_map!r}")
        return device_map[""]
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device_map


def _is_sequence_classifier(config: dict[str, Any]) -> bool:
    return any("ForSequenceClassification" in name for name in config.get("architectures") or ())


def _load_own_adapter(
    cls: type[ValueModel],
    name: str,
    config_json: dict[str, Any],
    backbone: PreTrainedModel | str | None,
    merge: bool,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> ValueModel:
    config = ValueModelConfig.from_dict(config_json)
    files = {file: find_file(name, file, hub) for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS)}
    missing = [file for file, path in files.items() if path is None]
    if missing:
        raise OSError(f"{name} is an adapter repo without {', '.join(missing)}: download or save it again")
    folder = files[ADAPTER_WEIGHTS].parent  # type: ignore[union-attr]
    source = config.backbone if backbone is None else backbone
    if source is None:
        raise ValueError(f"{name} is an adapter and its config names no backbone: pass backbone=MODEL")
    if isinstance(source, str):
        try:
            source = load_complete(AutoModel.from_pretrained, source, **_of_another_repo(hub))
        except OSError as error:
            raise OSError(
                f"{name} is an adapter on the first layers of {source}, which could not be loaded: pass the loaded "
                "model as backbone= (a processor that is given model= does so), or download it first"
            ) from error
    layers = config.backbone_config.num_hidden_layers
    trunk = Backbone.of(source).truncated(layers, kwargs.get("dtype") or torch.float32)
    if config.backbone_fingerprint not in (None, weights_fingerprint(trunk)):
        warnings.warn(
            f"{name} was trained on other weights of {config.backbone} than those given; its values will be off. Pass "
            "the model it was trained on as backbone=.",
            stacklevel=4,
        )
    lora = LoraConfig.from_pretrained(str(folder))
    model = load_adapter(cls._assemble(config, trunk), lora, folder, merge)
    device = _one_device(name, kwargs.get("device_map"))
    return model if device is None else model.to(device)


def _load_sequence_classifier(
    cls: type[ValueModel],
    name: str,
    adapter: dict[str, Any],
    backbone: PreTrainedModel | str | None,
    merge: bool,
    objectives: Sequence[str] | None,
    hub: dict[str, Any],
    kwargs: dict[str, Any],
) -> ValueModel:
    """The trunk and the `score` layer of a sequence classifier; its own pooling by padding ids is not used."""
    if not adapter:
        classifier = load_complete(AutoModelForSequenceClassification.from_pretrained, name, **kwargs)
    elif not merge:
        raise ValueError(f"{name} is a PEFT sequence classifier, which is read merged: use merge=True")
    else:
        score = _tensors(name, ADAPTER_WEIGHTS, "score.weight", hub)
        labels = len(next(iter(score.values()))) if score else len(objectives or ["reward"])
        base = _classifier_base(backbone or adapter["base_model_name_or_path"], labels, hub, kwargs)
        classifier = PeftModel.from_pretrained(base, name, **hub).merge_and_unload()  # type: ignore[operator]
    score_layer = getattr(classifier, "score", None)
    if not isinstance(score_layer, torch.nn.Linear):
        raise ValueError(
            f"{name}: {type(classifier).__name__} has no linear `score` layer on a decoder; it cannot be read"
        )
    names = _names(classifier, objectives, name)
    return _with_head(cls, Backbone.of(classifier).decoder, score_layer.weight, score_layer.bias, names)


def _classifier_base(
    backbone: PreTrainedModel | str, labels: int, hub: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """What a PEFT sequence classifier's adapter sits on; a copy, because PEFT changes the model it is given."""
    if isinstance(backbone, str):
        own = _of_another_repo(kwargs) | {"num_labels": labels, "use_safetensors": True}
        return AutoModelForSequenceClassification.from_pretrained(backbone, **own)
    if hasattr(backbone, "score"):
        return copy.deepcopy(backbone)
    config = copy.deepcopy(backbone.config)
    config.num_labels = labels
    classifier = AutoModelForSequenceClassification.from_config(config, dtype=backbone.dtype)
    Backbone.of(classifier).decoder.load_state_dict(Backbone.of(backbone).decoder.state_dict())
    return classifier


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
    head = _tensors(name, "model.safetensors", _TRL_HEAD, hub)
    return {key.rpartition(".")[2]: tensor for key, tensor in head.items()}


def _tensors(name: str, file: str, part: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors with `part` in their names, from a safetensors file or its shards."""
    found: dict[str, Tensor] = {}
    for path in find_weights(name, file, hub, part):
        with safe_open(path, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys() if part in key}  # noqa: SIM118
    return found


def _load_trl(
    cls: type[ValueModel], name: str, head: dict[str, Tensor], objectives: Sequence[str] | None, kwargs: dict[str, Any]
) -> ValueModel:
    """The trunk and value head of TRL; some versions wrote the trunk's weights as `pretrained_model.*`."""
    causal = load_complete(
        AutoModelForCausalLM.from_pretrained, name, **{"key_mapping": {r"^pretrained_model\.": ""}} | kwargs
    )
    return _with_head(
        cls, Backbone.of(causal).decoder, head["weight"], head.get("bias"), list(objectives or ["reward"])
    )


def _with_head(
    cls: type[ValueModel], trunk: PreTrainedModel, weight: Tensor, bias: Tensor | None, objectives: list[str]
) -> ValueModel:
    config = ValueModelConfig(
        backbone_config=trunk.config,
        backbone_class=name_of_class(trunk),
        objectives=objectives,
        pad_token_id=trunk.config.pad_token_id,
    )
    model = cls._assemble(config, trunk)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias if bias is not None else torch.zeros_like(model.head.bias))
    return model
