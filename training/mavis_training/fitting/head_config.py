"""How to train a value head."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from transformers import PreTrainedModel

from mavis_logits.backbone import Backbone, UnsupportedModel
from mavis_logits.models import DEFAULT_MODEL
from mavis_logits.values.value_head import ValueHeadConfig

from ..trees.targets import Penalty
from .settings import FittingSettings

Rule = Literal["positions", "sums", "gain", "pairs", "balance"]


@dataclass(frozen=True)
class TrainHeadConfig(FittingSettings):
    """How to train a value head. Dropout, bootstrap and weight decay are by default what steers best in docs/results.

    Attributes:
        store: folder of the labelled tree store, or several, which are trained on together.
        objectives: rewards to predict, one output each.
        trees: of each store that are read, a sample by prompt; None for all.
        answers: of each of these trees that are read, of as many first branches as may be; None for all. Time goes into
            tokens: a few answers of many prompts teach more than many of a few.
        output: folder for the head and its metrics.
        model: Hub id or folder of the base model, or "smollm2".
        states: folder of hidden states, computed if missing, or one for each store; None for `<output>/states`.
        initial: folder or Hub id of a head to go on from (Algorithm 1: that of the iteration before); its base model
            and objectives must be the same. None for a new head.
        layer: of the base model, whose states a new head reads: after how many of its layers; "third": after a third of
            them, by the study in docs/results, and at a third of the prefill pass; "output": what enters the
            output embedding.
        width: of a new head.
        num_layers: residual layers of a new head.
        rank: of a new head that multiplies factors of state and candidate; None for one that reads both together.
        dropout: while training.
        bootstrap: share of a position's target that is the value of the state after its token, said by a small network
            of states alone which is trained first, in place of the completions' rewards; 0 is equation 6 alone.
        zeta: KL penalty multiplier of equation 6.
        penalty: "completion": zeta penalises all of a completion, as in equation 6; "continuation": what follows the
            sequence only, as in Theorem 1.
        drop_leaves: share of the leaves left out (balancing).
        epochs: passes over the training positions, at most.
        patience: epochs without a smaller validation loss after which training stops; the best epoch is kept.
        batch_size: positions per step.
        learning_rate: of AdamW, at its peak; decays to 0 along a cosine.
        dtype: of the base model in the prefill pass.
        iteration: of Algorithm 1, recorded with the head.
        rule: "positions": every position regresses the reward (equation 6); "sums", "gain", "pairs", "balance": after
            that, a rule on the sums of advantages along whole completions (`fitting.paths`), which takes a whole
            forward pass over the trees.
        anchor: weight of equation 6 beside such a rule.
        actions: tokens of the reference at each state, by which such a rule centres values.
        teachers: by objective, a policy tuned for it (`mavis tune`), whose log pi / pi_ref a new head learns at every
            state in place of rewards (`fitting.policies`), in nats: a pass of each policy over the trees. What they say
            has no noise: little dropout and weight decay, no `bootstrap`.
        tokens: at each state, that the teachers are asked about: the likeliest.
        sharpen: let the reference's own log pi_ref count beside values as much as the validation trees call for
            (`log_prob_weight` of the head's config, `fitting.efficiency`).
        reward_share: how much the rewards of the trees count beside the teachers, by path consistency over the answers
            of each tree; 0 leaves them out.
    """

    store: str | list[str]
    objectives: list[str]
    output: str
    model: str = DEFAULT_MODEL
    states: str | list[str] | None = None
    initial: str | None = None
    layer: int | Literal["third", "output"] = "third"
    width: int = 512
    num_layers: int = 1
    rank: int | None = field(default=None, kw_only=True)
    dropout: float = 0.5
    bootstrap: float = 0.5
    zeta: float = 0.0
    penalty: Penalty = "completion"
    drop_leaves: float = 0.5
    epochs: int = 6
    patience: int = 2
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = field(default=1.0, kw_only=True)
    iteration: int = 0
    rule: Rule = field(default="positions", kw_only=True)
    anchor: float = field(default=0.1, kw_only=True)
    actions: int = field(default=4, kw_only=True)
    teachers: dict[str, str] = field(default_factory=dict, kw_only=True)
    tokens: int = field(default=32, kw_only=True)
    reward_share: float = field(default=0.0, kw_only=True)
    sharpen: bool = field(default=True, kw_only=True)
    trees: int | None = field(default=None, kw_only=True)
    answers: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.objectives:
            raise ValueError("objectives is empty: name at least one that the store has been labelled for.")
        for name in ("width", "num_layers", "epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, or null, got {self.rank}.")
        if self.layer not in ("third", "output") and not (isinstance(self.layer, int) and self.layer >= 1):
            raise ValueError(f"layer must be a number from 1 on, 'third' or 'output', got {self.layer!r}.")
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}.")
        if self.anchor < 0 or self.actions < 2:
            raise ValueError(f"anchor must be at least 0 and actions at least 2, got {self.anchor} and {self.actions}.")
        if self.teachers and (sorted(self.teachers) != sorted(self.objectives) or self.rule != "positions"):
            raise ValueError(
                f"teachers must name a policy for each of the objectives {self.objectives} and none else, and take the "
                f"place of a rule, got teachers for {sorted(self.teachers)} and rule {self.rule!r}."
            )
        if self.teachers and self.initial is not None:
            raise ValueError("a head that teachers are to teach begins anew: leave initial out.")
        if not 0 <= self.reward_share < float("inf") or (self.reward_share and not self.teachers):
            raise ValueError(
                f"reward_share must be a number of at least 0, beside teachers, got {self.reward_share} with teachers "
                f"for {sorted(self.teachers)}: without teachers a head learns from the rewards alone."
            )
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, got {self.tokens}.")
        if not 0 <= self.bootstrap <= 1:
            raise ValueError(f"bootstrap must be from 0 to 1, got {self.bootstrap}.")
        if self.states is not None and len(_listed(self.states)) != len(_listed(self.store)):
            raise ValueError(
                f"states names {len(_listed(self.states))} folders for {len(_listed(self.store))} stores: give one "
                "for each store, in the same order, or none."
            )

    def layer_of(self, model: PreTrainedModel) -> int | None:
        """`ValueHeadConfig.layer` of the head that is trained, for `model`."""
        if self.initial is not None:
            return ValueHeadConfig.from_pretrained(self.initial).layer  # type: ignore[no-any-return]
        if self.layer == "third":
            try:
                return max(1, round(len(Backbone.of(model).layers) / 3))
            except UnsupportedModel:
                return None  # what enters the output embedding is there in every model
        return None if self.layer == "output" else self.layer

    def states_folders(self) -> list[Path]:
        """Where each store's hidden states lie."""
        if self.states is not None:
            return [Path(folder) for folder in _listed(self.states)]
        folder, count = Path(self.output) / "states", len(_listed(self.store))
        return [folder] if count == 1 else [folder / str(i) for i in range(count)]


def _listed(folders: str | list[str]) -> list[str]:
    return [folders] if isinstance(folders, str) else folders
