"""Training of the backbone that comes with deepfeat, without a dataset or another network.

    python -m pip install . scikit-image
    python examples/bundled_backbone/train.py

draws 32,800 pictures (1.6 GB of disk), trains on them, and writes `resnet10_slim.safetensors`, all
under `--work`. The published file took 7 + 65 minutes on two CPU cores that were also busy with
other jobs; no GPU is needed.

The loss has two parts: two views of a picture, with different crops and lighting, should have
similar features (NT-Xent: Chen et al., 2020), and the network should recognise the formula or
photograph that a view comes from. An interrupted run resumes when it is started again.
"""

import argparse
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pictures import FAMILIES, SIDE, crop, draw, photographs
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from deepfeat._backbones.resnet10_slim import SlimResNet

DRAWN, CROPPED = 2000, 400  # pictures of each family, crops of each photograph
VIEW = 64
PAIRS = 128
RATE, DECAY = 1.5e-3, 0.02
WARMUP, COOLDOWN = 300, 0.3  # steps; share of all steps
TEMPERATURE = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6800)
    parser.add_argument("--work", type=Path, default=Path("bundled-training"))
    parser.add_argument("--threads", type=int, default=1, help="besides the one that crops views")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    pictures, sources = load_bank(options.work)
    train(pictures, sources, options.steps, options.work)


# Pictures ---------------------------------------------------------------------------------------


def source_names() -> list[str]:
    return [*FAMILIES, *photographs()]


def load_bank(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Draw all pictures once, into a file; return them and the indices of their sources."""
    path, photos = folder / "pictures.npy", photographs()
    counts = [DRAWN] * len(FAMILIES) + [CROPPED] * len(photos)
    sources = np.repeat(np.arange(len(counts)), counts)
    if not path.exists():
        shape = (len(sources), SIDE, SIDE, 3)
        part = path.with_suffix(".part")
        bank = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        names = source_names()
        for number, source in enumerate(sources):
            rng = np.random.default_rng(number)
            name = names[source]
            bank[number] = crop(photos[name], rng) if name in photos else draw(name, rng)
        bank.flush()
        part.rename(path)
    return np.load(path, mmap_mode="r"), sources


def batches(pictures: np.ndarray, start: int, stop: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the indices of some pictures and two views of each, made in another thread."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(two_views, pictures, step) for step in range(start, start + 2)]
        for step in range(start, stop):
            ahead.append(pool.submit(two_views, pictures, step + 2))
            yield ahead.pop(0).result()


def two_views(pictures: np.ndarray, step: int) -> tuple[np.ndarray, Tensor]:
    rng = np.random.default_rng((1, step))
    numbers = rng.choice(len(pictures), PAIRS, replace=False)
    views = [random_view(pictures[number], rng) for _ in range(2) for number in numbers]
    batch = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    return numbers, change_light(batch, torch.Generator().manual_seed(step))


def random_view(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop 15 to 100 per cent of a picture, slightly stretched and possibly mirrored."""
    side = SIDE * math.sqrt(rng.uniform(0.15, 1))
    stretch = math.exp(rng.uniform(-0.25, 0.25))
    width, height = min(SIDE, side * stretch), min(SIDE, side / stretch)
    left, top = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - height)
    box = (left, top, left + width, top + height)
    view = Image.fromarray(picture).resize((VIEW, VIEW), Image.Resampling.BILINEAR, box)
    return np.asarray(view)[:, :: rng.choice([-1, 1])]


def change_light(views: Tensor, generator: torch.Generator) -> Tensor:
    """Change colour, brightness, contrast, gamma and sharpness; add noise; cover a patch."""
    count = len(views)

    def uniform(low: float, high: float, count: int = count) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) * (high - low) + low

    def some(share: float) -> Tensor:
        return torch.randperm(count, generator=generator)[: int(share * count)]

    x = views.float().div_(255).contiguous()
    mix = torch.eye(3) + 0.3 * torch.randn(count, 3, 3, generator=generator)
    mix /= mix.sum(2, keepdim=True).clamp(min=0.5)
    mix[some(0.6)] = torch.tensor([0.299, 0.587, 0.114])  # grey
    x = torch.bmm(mix, x.flatten(2)).view_as(x)
    mean = x.mean((1, 2, 3), keepdim=True)
    x.sub_(mean).mul_(uniform(0.4, 1.6)).add_(mean * uniform(0.6, 1.4)).clamp_(1e-3, 1)
    x.pow_(torch.exp(uniform(-0.5, 0.5)))
    inverted, softened, noisy, covered = some(0.1), some(0.5), some(0.25), some(0.3)
    x[inverted] = 1 - x[inverted]
    sharp = x[softened]
    soft = F.avg_pool2d(F.avg_pool2d(sharp, 3, 1, 1, False, False), 3, 1, 1, False, False)
    x[softened] = torch.lerp(sharp, soft, uniform(-0.5, 1, len(sharp)))
    noise = torch.randn(len(noisy), *x.shape[1:], generator=generator)
    x[noisy] += uniform(0, 0.1, len(noisy)) * noise
    for number in covered.tolist():
        left, top, width, height = torch.rand(4, generator=generator).mul_(VIEW).int().tolist()
        patch = x[number, :, top : top + height // 2, left : left + width // 2]
        patch.fill_(torch.rand(1, generator=generator).item())
    x.clamp_(0, 1).sub_(0.5).div_(0.25)
    return x.contiguous(memory_format=torch.channels_last)


# Training ---------------------------------------------------------------------------------------


class ContrastiveModel(nn.Module):
    """The network, and a projection in which views of the same picture should be similar."""

    def __init__(self, classes: int):
        super().__init__()
        self.network = SlimResNet(classes)
        width = self.network.fc.in_features
        self.projection = nn.Sequential(
            nn.Linear(width, 512, bias=False),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 128),
        )

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        handle = self.network.avgpool.register_forward_hook(lambda *call: outputs.append(call[-1]))
        logits = self.network(views)
        handle.remove()
        return F.normalize(self.projection(outputs[0].flatten(1)).float()), logits.float()


def contrast(points: Tensor) -> Tensor:
    """Compute NT-Xent (Chen et al., 2020); the second views follow all first views."""
    similarity = points @ points.T / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(points)).roll(len(points) // 2)
    return F.cross_entropy(similarity, partner)


def learning_rate(step: int, steps: int) -> float:
    """Rise, stay, then fall to zero, so that runs of any length share the steps before the fall."""
    return RATE * min(1, (step + 1) / WARMUP, (steps - step) / (COOLDOWN * steps))


def train(pictures: np.ndarray, sources: np.ndarray, steps: int, folder: Path) -> None:
    torch.manual_seed(0)
    classes = int(sources.max()) + 1
    model = ContrastiveModel(classes).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    )
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["learner"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began = saved_at = time.monotonic()
    totals = np.zeros(3)
    for step, (numbers, views) in enumerate(batches(pictures, first, steps), start=first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            points, logits = model(views)
        labels = torch.from_numpy(np.tile(sources[numbers], 2))
        contrastive, supervised = contrast(points), F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        (contrastive + 0.3 * supervised).backward()
        optimizer.step()
        accuracy = (logits.argmax(1) == labels).float().mean()
        totals += [contrastive.item(), supervised.item(), accuracy.item()]
        if (step + 1) % 100 == 0:
            means = " ".join(f"{total / 100:.3f}" for total in totals)
            pace = (time.monotonic() - began) / (step + 1 - first)
            print(f"{step + 1} {means} {pace:.2f} s per step {time.strftime('%H:%M')}", flush=True)
            totals[:] = 0
        if time.monotonic() - saved_at > 120 or step + 1 == steps:
            saved_at = time.monotonic()
            content = {"learner": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(content | {"step": step + 1}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    state = model.network.state_dict()
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in state.items()
    }
    save_file(half, folder / "resnet10_slim.safetensors")


if __name__ == "__main__":
    main()
