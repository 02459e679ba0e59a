"""Train the demo model from nothing: `python -m epd.demo.train`.

Everything follows from (seed, step): the data, the first weights and so, on one machine, the result up to the order of
sums. The learning rate warms up, stays, and falls linearly to zero over the last part; a run can be stopped and
resumed, and resuming with fewer `--steps` starts the fall earlier.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm  # type: ignore[import-untyped]

from epd.demo.architecture import new_model, save_checkpoint
from epd.demo.batches import GLYPHS, Batch, BatchMaker
from epd.demo.chat_format import ChatEncoder, build_tokenizer
from epd.demo.evaluate import report
from epd.demo.muon import BatchedMuon
from epd.demo.packed import forward
from epd.demo.pictures import COLOURS, SHAPES

WARMUP_STEPS = 100
PREFETCH = 4  # batches made ahead of time
# What the vision tower must name at each patch: glyph, shape, colour; class 0 is "nothing here".
PATCH_CLASSES = (1 + len(GLYPHS), 1 + len(SHAPES), 1 + len(COLOURS))
EMPTY_WEIGHT = 0.1  # most patches are empty: they count less


@lru_cache(maxsize=1)
def _maker(tokenizer: str, seed: int, rows: int, ramp: int, focus: int) -> BatchMaker:
    return BatchMaker(ChatEncoder(Tokenizer.from_str(tokenizer)), seed, rows, ramp, focus)


def _make(step: int, settings: tuple[str, int, int, int, int]) -> Batch:
    """Runs in the data process, which keeps its maker from step to step."""
    return _maker(*settings).make(step)


class PatchNamer(nn.Module):
    """A training aid, not part of the model: names what each patch shows, so that the vision tower learns early."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, sum(PATCH_CLASSES))

    def loss(self, states: list[Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy over glyph, shape and colour."""
        logits = torch.cat([self.head(state).flatten(0, 1) for state in states]).float()
        labels = torch.cat([torch.from_numpy(group.labels).flatten(0, 1) for group in batch.groups])
        total = logits.new_zeros(())
        for part, truth in zip(torch.split(logits, list(PATCH_CLASSES), dim=-1), labels.unbind(-1), strict=True):
            weight = torch.ones(part.shape[-1])
            weight[0] = EMPTY_WEIGHT
            total = total + functional.cross_entropy(part, truth, weight=weight)
        return total


class Trainer:
    """Model, optimizers and the step counter."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = new_model(args.seed)
        self.namer = PatchNamer(self.model.config.vision_config.hidden_size)
        self.step = 0
        self.optimizers = _optimizers(self.model, self.namer, args.lr, args.muon_lr)
        self.peaks = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    def learn(self, batch: Batch) -> tuple[float, float]:
        """One update. Returns the losses of the answers and of the patch names."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            hidden, states = forward(self.model, batch)
            target = torch.from_numpy(batch.target)
            learnt = target >= 0
            logits = self.model.lm_head(hidden[learnt])
            answer = functional.cross_entropy(logits.float(), target[learnt])
            names = self.namer.loss(states, batch) if states else answer.new_zeros(())
        (answer + self.args.patch_weight * names).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._set_rates()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(answer.detach()), float(names.detach())

    def _set_rates(self) -> None:
        args = self.args
        fall = max(1, round(args.steps * args.decay))
        factor = min(1.0, (self.step + 1) / WARMUP_STEPS, (args.steps - self.step) / fall)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * factor

    def save(self, path: Path) -> None:
        """Everything that resuming needs."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "namer": self.namer.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        """Go on where `save` left off."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.namer.load_state_dict(state["namer"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _optimizers(model: nn.Module, namer: nn.Module, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for embeddings, patch kernel, merger, norms and biases."""
    matrices: list[nn.Parameter] = []
    rest = list(namer.parameters())
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and (".layers." in name or ".blocks." in name)
        (matrices if inside else rest).append(parameter)
    return [BatchedMuon(matrices, lr=muon_lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(args: argparse.Namespace) -> None:
    """The whole run, as the command line describes it."""
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    trainer = Trainer(args)
    state = args.work / "state.pt"
    if args.resume:
        trainer.resume(args.resume)
    begun = time.monotonic()
    settings = (tokenizer.to_str(), args.seed, args.rows, args.ramp, args.focus)
    with ProcessPoolExecutor(1) as pool:
        ahead: deque[Future[Batch]] = deque()
        bar = tqdm(total=args.steps, initial=trainer.step, unit="step", smoothing=0.02)
        mean_answer, mean_names, upcoming = 0.0, 0.0, trainer.step
        while trainer.step < args.steps:
            while len(ahead) < PREFETCH and upcoming < args.steps:
                ahead.append(pool.submit(_make, upcoming, settings))
                upcoming += 1
            answer, names = trainer.learn(ahead.popleft().result())
            mean_answer += (answer - mean_answer) * (0.02 if mean_answer else 1)
            mean_names += (names - mean_names) * (0.02 if mean_names else 1)
            bar.update()
            bar.set_postfix(loss=f"{mean_answer:.3f}", patches=f"{mean_names:.3f}", refresh=False)
            _log(args.work / "log.jsonl", trainer.step, answer, names, time.monotonic() - begun)
            if trainer.step % args.save_every == 0 or trainer.step == args.steps:
                trainer.save(state)
                save_checkpoint(trainer.model, tokenizer, args.work / "latest")
        bar.close()
    save_checkpoint(trainer.model, tokenizer, args.out)
    if args.report:
        print(report(args.out, args.report))


def _log(path: Path, step: int, answer: float, names: float, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line: dict[str, Any] = {"step": step, "loss": round(answer, 4), "patches": round(names, 4), "s": round(seconds, 1)}
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="python -m epd.demo.train",
        description="Train the demo model on synthetic pictures, on the CPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    flags.add_argument(
        "--out", type=Path, default=Path("demo_train/checkpoint"), help="checkpoint folder to write at the end"
    )
    flags.add_argument("--work", type=Path, default=Path("demo_train"), help="folder for the log and resumable state")
    flags.add_argument("--resume", type=Path, help="state.pt of an earlier run to go on from")
    flags.add_argument("--steps", type=int, default=3650, help="steps in all")
    flags.add_argument("--rows", type=int, default=64, help="packed rows (about one picture each) per step")
    flags.add_argument("--ramp", type=int, default=800, help="steps over which printed words grow from 2 to 6 letters")
    flags.add_argument("--focus", type=int, default=2500, help="step from which hard questions come more often")
    flags.add_argument("--lr", type=float, default=2e-3, help="peak rate of AdamW (embeddings, norms, biases)")
    flags.add_argument("--muon-lr", type=float, default=3e-3, help="peak rate of Muon (matrices)")
    flags.add_argument("--decay", type=float, default=0.32, help="last part of the steps in which the rates fall to 0")
    flags.add_argument("--patch-weight", type=float, default=0.3, help="weight of naming what each patch shows")
    flags.add_argument("--seed", type=int, default=1, help="decides first weights and all data")
    flags.add_argument("--threads", type=int, default=2, help="torch threads")
    flags.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16")
    flags.add_argument("--save-every", type=int, default=250, help="steps between resumable states")
    flags.add_argument("--report", type=int, default=200, help="held-out questions per task at the end; 0 for none")
    return flags


if __name__ == "__main__":
    train(parser().parse_args())
