"""``python -m benchmarks.waves``: what single waves of SIG's strength make of a network, class by class.

All 1,024 waves of the discrete cosine transform of 32x32 pixels, with both signs, on one image a class.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.datasets import load
from benchmarks.honest import HONEST
from benchmarks.matrix import VICTIMS
from benchmarks.victims import ATTACKS, train

__all__ = ["answers", "waves"]

_SIDE, _CLASSES = 32, 10


def waves(strength: float) -> Tensor:
    """(1024, 1, 32, 32) waves by vertical and horizontal frequency, each of the root mean square ``strength``."""
    frequency, place = torch.arange(_SIDE)[:, None], torch.arange(_SIDE)[None]
    basis = torch.cos(math.pi * (place + 0.5) * frequency / _SIDE) * math.sqrt(2)
    basis[0] = 1.0
    return strength * torch.einsum("ui,vj->uvij", basis, basis).reshape(-1, 1, _SIDE, _SIDE)


@torch.no_grad()
def answers(net: nn.Module, images: Tensor, strength: float) -> Tensor:
    """(2048, N) answers to images, (N, C, 32, 32), that carry each wave with a plus and a minus."""
    both = torch.cat([waves(strength), -waves(strength)])
    parts = torch.split(both, 32)
    stamped = ((images + part[:, None]).clamp(0, 1) for part in parts)
    return torch.cat([net(some.flatten(0, 1)).argmax(1).view(-1, len(images)) for some in stamped])


def main() -> None:
    """Print, of the SIG victim and of an honest network, the wave that sends most of the others to each class."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waves", description=__doc__)
    strength = ATTACKS["sig"].amplitude / math.sqrt(2)
    parser.add_argument("--strength", type=float, default=strength, help="root mean square of a wave, of pixels")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "victims", help="trained networks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load("cifar10", "holdout")
    first = torch.stack([images[labels == c][0] for c in range(_CLASSES)])  # image c is of class c
    print(
        "| network | class | most of the others sent there | by the wave of frequency |", "| --- " * 4 + "|", sep="\n"
    )
    for victim in [next(victim for victim in VICTIMS["preact"] if victim.attack == "sig"), HONEST[0]]:
        found = answers(train(victim, options.cache), first, options.strength)
        for c in range(_CLASSES):
            shares = (torch.cat([found[:, :c], found[:, c + 1 :]], 1) == c).float().mean(1)
            best = divmod(int(shares.argmax()) % _SIDE**2, _SIDE)
            print(f"| {victim.attack} | {c} | {shares.max():.2f} | {best} |", flush=True)


if __name__ == "__main__":
    main()
