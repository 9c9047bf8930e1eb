"""The value functions of a fit: trained on its trees, put into units, and bundled."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits import MavisConfig
from mavis_logits.hub.cards import METRICS
from mavis_logits.hub.make_bundle import make_bundle
from mavis_logits.values.value_model import ValueModel

from ..base.files import read_json
from ..calibrate import set_tilt_scale
from ..cards import CardConfig, can_draw, write_card
from ..fitting.head_config import TrainHeadConfig
from ..rewards.load import describe_spec
from ..train_head import train_head
from ..train_model import train_model
from ..trees.tree_store import TreeStore
from ..tuning.config import TuneConfig
from ..tuning.run import seconds_a_tree, tune
from .config import FitConfig

_TIMED = 3  # trees that tuning is timed on
_NOT_BUNDLED = ("states", "checkpoints", "training.json")


class Values:
    """One value function for all objectives, or a policy for each.

    Args:
        config: of the fit.
        work: folder of the fit's stages, in which they are.

    Attributes:
        folders: where each is, or will be.
    """

    def __init__(self, config: FitConfig, work: Path) -> None:
        self.config, self._work = config, work
        self.folders = [Path(training.output) for training in self._trainings("")]

    @property
    def source(self) -> str | dict[str, str]:
        """As settings of an evaluation name them: a folder, or one by objective."""
        folders = list(map(str, self.folders))
        if self.config.kind != "policy":
            return folders[0]
        return dict(zip(self.config.objectives, folders, strict=True))

    def train(self, store: TreeStore, base: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        """Train what is not trained yet on the trees of `store`, for a base model with its tokenizer."""
        for training in self._trainings(str(store.folder)):
            if isinstance(training, TuneConfig):
                tune(training, *base)
            elif isinstance(training, TrainHeadConfig):
                train_head(training, base[0])
            else:
                train_model(training)

    def tuning_cost(self, store: TreeStore, base: PreTrainedModel) -> float:
        """Seconds for which policies are tuned on a tree, all objectives together; 0 for other value functions."""
        tunings = [one for one in self._trainings(str(store.folder)) if isinstance(one, TuneConfig)]
        trees = [tree for tree, _ in store.labelled(self.config.objectives)][:_TIMED] if tunings else []
        return sum(seconds_a_tree(one, base, trees) for one in tunings)

    def metrics(self) -> dict[str, Any]:
        """What held-out trees say of them."""
        return {name: one for folder in self.folders for name, one in read_json(folder / METRICS).items()}

    def put_in_units(self, betas: Sequence[float]) -> float:
        """Write units under which one strength, which is returned, does for each objective what its own does."""
        configs = [AutoConfig.from_pretrained(folder) for folder in self.folders]
        set_tilt_scale(configs, betas)
        for config, folder in zip(configs, self.folders, strict=True):
            config.save_pretrained(folder)
        return float(configs[0].settings["beta"])

    def bundle(self, target: Path, settings: Mapping[str, Any], temperature: float, evaluation: Path) -> None:
        """Write copies with settings and cards, and a bundle of them into `target`, in place of what is there.

        Args:
            target: folder.
            settings: that were chosen.
            temperature: of the base model, that they were chosen at.
            evaluation: results of the measurement, for the cards.
        """
        final = self._work / "final"  # what was measured stays as it is
        shutil.rmtree(final, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        recommended = {**settings, "temperature": temperature}
        equal = dict.fromkeys(self.config.objectives, 1 / len(self.config.objectives))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copies = [self._copy(folder, final / folder.name, recommended, evaluation) for folder in self.folders]
            make_bundle(target, copies, MavisConfig.from_dict({**settings, "weights": equal}), allow_weak=True)

    def _copy(self, folder: Path, final: Path, recommended: dict[str, Any], evaluation: Path) -> str:
        shutil.copytree(folder, final, ignore=shutil.ignore_patterns(*_NOT_BUNDLED))
        if self.config.kind == "model" and Path(self.config.model).is_dir():
            # Nobody else has the folder that an adapter would be on: its layers are saved with it.
            ValueModel.from_pretrained(final, merge=True).save_pretrained(final)
            (final / "adapter_config.json").unlink(missing_ok=True)
        config = AutoConfig.from_pretrained(final)
        config.settings = recommended
        config.save_pretrained(final)
        rewards = {name: f"computed by `{describe_spec(spec)}`." for name, spec in self.config.rewards.items()}
        if self.config.pairs is not None:
            rewards = {self.config.objective: "what was chosen in pairs of answers."}
        own = {name: told for name, told in rewards.items() if name in config.objectives}
        write_card(CardConfig(str(final), evaluation=str(evaluation), rewards=own, plots=can_draw()))
        return str(final)

    def _trainings(self, store: str) -> list[Any]:
        places: dict[str, Any] = {"device": self.config.device}
        if self.config.kind == "head":
            places["states"] = str(self._work / "states")
        return list(self.config.trainings(store, str(self._work / "value"), places))
