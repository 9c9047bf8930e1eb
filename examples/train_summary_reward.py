"""Train the reward for the quality of summaries: a small network on a frozen sentence encoder.

    python examples/train_summary_reward.py --data FOLDER [--out examples/rewards/summary.safetensors]

It learns preferences (Bradley-Terry) of `summary_data.summary_pairs`; a few minutes on a core.
`evaluate_summary_rewards.py` measures it.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "rewards"))

from summary import WEIGHTS, features

from summary_data import read_documents, summary_pairs
from train_rewards import preference_loss

WIDTH, EPOCHS, BATCH, SMOOTHING = 32, 30, 256, 0.05


def main() -> None:
    """Train and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the source collections")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    rng = random.Random(0)
    torch.manual_seed(0)
    science, packages = (read_documents(args.data, "train", [source]) for source in ("scitldr", "debian"))
    pairs = summary_pairs([*science, *rng.sample(packages, len(science))], rng)
    print(f"{len(pairs)} pairs", flush=True)
    better, worse = (
        features([prompt for prompt, _ in texts], [text for _, text in texts])
        for texts in ([pair.better for pair in pairs], [pair.worse for pair in pairs])
    )
    hidden, out = nn.Linear(better.shape[1], WIDTH), nn.Linear(WIDTH, 1, bias=False)
    net = nn.Sequential(hidden, nn.Tanh(), nn.Dropout(0.2), out)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        total = 0.0
        for rows in torch.randperm(len(pairs)).split(BATCH):
            rewards = torch.cat([net(better[rows]), net(worse[rows])])[:, 0]
            loss = preference_loss(rewards, SMOOTHING, centering=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss) * len(rows)
        schedule.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: loss {total / len(pairs):.3f}", flush=True)
    weights = {"hidden": hidden.weight, "bias": hidden.bias, "out": out.weight[0]}
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, args.out)


if __name__ == "__main__":
    main()
