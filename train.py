"""
Trains GMem (arXiv 2412.08781): a flow-matching transformer that is shown each image's masked snippet.

    python train.py                                        # the embedded glyphs: out/samples.png in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py ...

Writes OUT/ckpt.pt, samples.png (by the EMA weights) and log.jsonl; --resume goes on where OUT/ckpt.pt ends.
Randomness belongs to the micro-batch, (seed, step, index), never to the process: 1 process that accumulates 8
micro-batches and 8 processes with one each take the same steps, up to the rounding of sums.
"""
import argparse
import copy
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from memory import (ENCODERS, RANK, MemoryBank, best_device, cli, init_distributed, prepare, rank_argument,
                    rank_world, read_json, replacing)
from model import CONFIGS, SiT, SiTConfig, flow_loss
from sample import decode, generate, load_checkpoint, save_images, seed_of

# ----------------------------------------------------------------------------- settings

GLYPHS = dict(data="glyphs", image_size=32, model="SiT-T/16", steps=1300, batch_size=128, lr=1e-3, warmup=50,
              decay=(750, 1300), save_every=325, log_every=50)
OFFICIAL = dict(image_size=256, tokenizer="vavae-f16d32", encoder="dinov2_vitb14", flip=True, batch_size=1024,
                lr=2e-4, warmup=1000, decay=None, save_every=2500, log_every=100)
PRESETS = {  # imagenet256: configs/gmem_sde_{b,xl}.yaml of the official GMem, but for its bank of full rank
    "glyphs": GLYPHS,
    "imagenet256-b": dict(OFFICIAL, data="data/imagenet256", model="LightningDiT-B/1", steps=80_000,
                          save_every=20_000),
    "imagenet256-xl": dict(OFFICIAL, data="data/imagenet256", model="LightningDiT-XL/1", steps=200_000),
    "imagenet512-xl": dict(OFFICIAL, data="data/imagenet512", model="LightningDiT-XL/1", steps=200_000,
                           image_size=512),
}
FIXED = "preset image_size model condition batch_size seed mask".split()  # in a resumed run


def arguments():
    parser = argparse.ArgumentParser(description="Trains GMem; --preset gives the defaults of the rest.",
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="glyphs", help=" ")
    add("--data", help="a prepared folder, or what memory.py takes; that is prepared first, into OUT/data")
    add("--out", default="out", help="folder of everything that is written")
    add("--image-size", type=int, help="of the images, in preparing them")
    add("--tokenizer", default="pixel", help="known: pixel")
    add("--encoder", default="thumbnail", help=f"known: {', '.join(ENCODERS)}")
    add("--rank", type=rank_argument, default=RANK, help="of the bank, or full")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirrored images too")
    add("--model", help=f"one of {', '.join(CONFIGS)}")
    add("--condition", choices=("memory", "class", "none"), default="memory", help="class, none: plain SiT")
    add("--mask", type=float, default=0.4, help="part of the snippet's entries set to zero")
    add("--drop", type=float, default=0.1, help="part of the images shown with the null condition")
    add("--steps", type=int, help="in all, resumed ones included")
    add("--batch-size", type=int, help="of all processes together")
    add("--micro-batch", type=int, help="of one forward pass (None: batch size / processes)")
    add("--lr", type=float, help="of AdamW")
    add("--warmup", type=int, help="steps of linear warm-up")
    add("--decay", type=int, nargs=2, metavar=("A", "B"), help="where --lr falls to 0 (0 0: nowhere)")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--ema", type=float, default=0.9999, help="at most; the ramp is (1 + step) / (10 + step)")
    add("--seed", type=int, default=0, help="of weights, order, noise, masks")
    add("--resume", action="store_true", help="go on in --out")
    add("--save-every", type=int, help="steps between checkpoints, with a preview")
    add("--log-every", type=int, help="steps between lines of log.jsonl")
    add("--device", help="cuda, mps or cpu (None: the best there is)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the forward pass (None: bfloat16 on CUDA)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(None: on CUDA)")
    # what counts: flags, then (with --resume) those of the checkpoint, then the preset
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # only looks for --preset
    first.add_argument("--preset", default="glyphs")
    parser.set_defaults(**PRESETS.get(first.parse_known_args()[0].preset, {}))
    args, ckpt = parser.parse_args(), None
    path = os.path.join(args.out, "ckpt.pt")
    if args.resume:
        ckpt = load_checkpoint(path)
        parser.set_defaults(**{k: v for k, v in ckpt["args"].items() if k not in ("out", "device")})
        args = parser.parse_args()
        differ = [f"--{k.replace('_', '-')} {getattr(args, k)}, not {ckpt['args'][k]}" for k in FIXED
                  if getattr(args, k) != ckpt["args"][k]]
        if differ:
            raise ValueError(f"{path} cannot go on with {', '.join(differ)}: drop it, or name another --out")
    elif os.path.exists(path):
        raise ValueError(f"{path} exists: --resume goes on with it, --out DIR starts a run elsewhere")
    if args.model not in CONFIGS:
        raise ValueError(f"unknown model {args.model}; known: {', '.join(CONFIGS)}")
    for name in ("steps", "batch_size", "save_every", "log_every", "image_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    for name in ("mask", "drop", "ema"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is not in [0, 1)")
    args.decay = args.decay or (0, 0)
    a, b = args.decay
    if b > 0 and (a >= b or b < args.steps):
        raise ValueError(f"the learning rate falls to 0 from step {a} to {b}, but --steps is {args.steps}: "
                         "give --decay A B with A < B and B >= --steps, or 0 0")
    return args, ckpt


# ----------------------------------------------------------------------------- data


class Data:
    """Poor man's loader: memory maps, one gather per batch, and a thread that is one batch ahead."""
    def __init__(self, folder, seed, device):
        self.meta = read_json(os.path.join(folder, "meta.json"))
        self.latents = np.load(os.path.join(folder, "latents.npy"), mmap_mode="r")
        self.labels = np.load(os.path.join(folder, "labels.npy"), mmap_mode="r")
        self.bank = MemoryBank.load(os.path.join(folder, "bank.pt"))
        self.mean, self.std = (torch.tensor(self.meta[k]).to(device)[:, None, None] for k in ("mean", "std"))
        self.device, self.thread, N = device, ThreadPoolExecutor(1), len(self.latents)
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(N))

    def rows(self, a, b):
        """positions a .. b-1 of the endless stream of epochs -> row numbers"""
        N, out = len(self.latents), []
        while a < b:
            epoch, k = divmod(a, N)
            out.append(self.order(epoch)[k:k + b - a])
            a += len(out[-1])
        return np.sort(np.concatenate(out))  # the order within a batch is free, and sorted reads are fast

    def read(self, a, b):
        i = self.rows(a, b)  # numpy only: OpenMP in a second thread would take the cores from the first
        batch = [torch.from_numpy(np.asarray(v[i])) for v in (self.latents, self.bank.coef, self.labels)]
        return [v.pin_memory() for v in batch] if self.device.type == "cuda" else batch

    def batches(self, positions):
        """Yields x (B, C, h, w) normalised, s (B, D), y (B,) on the device, for each (a, b) of positions."""
        ahead = None
        for a, b in positions:  # the next read is under way while the last one is used
            ahead, now = self.thread.submit(self.read, a, b), ahead
            if now:
                yield self.to_device(now.result())
        yield self.to_device(ahead.result())

    def to_device(self, batch):
        x, s, y = (v.to(self.device, non_blocking=True) for v in batch)
        return (x.float() - self.mean) / self.std, self.bank.unpack(s), y


# ----------------------------------------------------------------------------- training


def learning_rate(step, args):
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    return lr * min(1, max(0, (b - step) / (b - a))) if b else lr


def split(batch_size, micro_batch, world):
    """-> micro-batch size, micro-batches of each process"""
    if batch_size % world:
        less = batch_size // world * world
        raise ValueError(f"--batch-size {batch_size} does not divide among {world} processes; "
                         f"{less or world} or {less + world} would")
    share = batch_size // world
    micro = micro_batch or share
    if micro < 1 or share % micro:
        fits = [str(k) for k in range(1, share + 1) if share % k == 0]
        raise ValueError(f"--micro-batch {micro} does not divide {share}, the share of one of {world} "
                         f"processes in the batch; {', '.join(fits)} would")
    return micro, share // micro


def main():
    args, ckpt = arguments()
    device = best_device(args.device)
    init_distributed(device)
    me, world = rank_world()
    say = print if me == 0 else lambda *a: None
    args.micro_batch, accumulate = split(args.batch_size, args.micro_batch, world)
    os.makedirs(args.out, exist_ok=True)

    # data and bank
    folder = args.data
    if not os.path.exists(os.path.join(folder, "meta.json")):
        folder, p = os.path.join(args.out, "data"), CONFIGS[args.model]["patch_size"]
        if args.tokenizer == "pixel" and args.image_size % p:
            raise ValueError(f"--image-size {args.image_size} is no multiple of {p}, {args.model}'s patch")
        prepare(args.data, folder, args.image_size, args.tokenizer, args.encoder, args.rank, flip=args.flip,
                device=device)
    data = Data(folder, args.seed, device)
    meta, bank, classes = data.meta, data.bank, len(data.meta["classes"])
    for k in ("image_size", "tokenizer", "encoder", "rank", "flip"):  # of a prepared folder, its own
        setattr(args, k, meta["settings"][k])
    made = ", ".join(f"{k} {v}" for k, v in meta["settings"].items())
    say(f"data: {len(data.latents):,} of {meta['latent']}, {classes} classes, in {folder} ({made})")
    say(f"bank: {bank}")
    if args.condition == "class" and not classes:
        raise ValueError(f"{args.data} has no labels (class sub-folders) for --condition class")

    # model
    if ckpt:
        config = SiTConfig(**ckpt["config"])
        if ckpt["bank"]["id"] != bank.id:
            raise ValueError(f"{folder} holds bank {bank.id}, the run was begun with {ckpt['bank']['id']}")
        if ckpt["args"]["micro_batch"] != args.micro_batch:
            say(f"micro-batch {args.micro_batch}, was {ckpt['args']['micro_batch']}: other noise from now on")
    else:
        C, size, _ = meta["latent"]
        config = SiTConfig(**CONFIGS[args.model], input_size=size, in_channels=C, mask_ratio=args.mask,
                           memory_dim=bank.dim if args.condition == "memory" else 0,
                           num_classes=classes if args.condition == "class" else 0)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = SiT(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    start = 0
    if ckpt:
        model.load_state_dict(ckpt["model"])
        ema.load_state_dict(ckpt["ema"])
        optimizer.load_state_dict(ckpt["optimizer"])
        start = ckpt["step"]
        say(f"resuming {args.out} at step {start:,}")
        if start >= args.steps:
            return say(f"nothing to do: --steps {args.steps:,} in all; give more to go on")
    ckpt = None  # free the memory
    count = sum(p.numel() for p in parameters)
    say(f"model: {args.model}, {count:,} parameters, condition {args.condition}, on {device}")
    say(f"batch: {args.batch_size} = {world} processes x {accumulate} micro-batches of {args.micro_batch}")
    net = torch.compile(model) if (device.type == "cuda" if args.compile is None else args.compile) else model
    if world > 1:
        net = DDP(net, device_ids=[device.index] if device.type == "cuda" else None)
    half = args.dtype == "bfloat16" or (args.dtype is None and device.type == "cuda")

    def save(step):
        where = folder  # relative to the checkpoint, unless it was given as an absolute path
        if not os.path.isabs(folder):
            where = os.path.relpath(os.path.realpath(folder), os.path.realpath(args.out))
        state = dict(step=step, model=model.state_dict(), ema=ema.state_dict(),
                     optimizer=optimizer.state_dict(), config=asdict(config), meta=meta, args=vars(args),
                     bank=dict(path=os.path.join(where, "bank.pt"), id=bank.id))
        with replacing(os.path.join(args.out, "ckpt.pt")) as tmp:
            torch.save(state, tmp)
        save_images(decode(generate(ema, range(64), bank), meta), os.path.join(args.out, "samples.png"))

    # the loop; rank r computes the micro-batches m = r, r + world, .. of every step
    B, size, todo = args.batch_size, args.micro_batch, range(me, accumulate * world, world)
    begins = (step * B + m * size for step in range(start, args.steps) for m in todo)
    batches = data.batches((a, a + size) for a in begins)
    log = open(os.path.join(args.out, "log.jsonl"), "a") if me == 0 else None
    bar = tqdm(range(start, args.steps), "training", args.steps, initial=start, unit="step", disable=me > 0)
    total, counted, t0 = torch.zeros((), device=device), 0, time.time()
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for m in todo:
            x, s, y = next(batches)
            torch.manual_seed(seed_of(0, args.seed, step, m))
            with net.no_sync() if world > 1 and m != todo[-1] else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    loss = flow_loss(net, x, s if config.memory_dim else None,
                                     y if config.num_classes else None, args.drop) / accumulate
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in parameters], 1 - keep)
        counted += 1
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean = total / counted
            if world > 1:
                dist.all_reduce(mean)
                mean /= world
            seconds = time.time() - t0
            line = dict(step=step + 1, loss=round(mean.item(), 5), grad_norm=round(norm.item(), 4),
                        lr=learning_rate(step, args), images_per_s=round(B * counted / seconds, 1),
                        seconds=round(seconds, 2))
            if me == 0:
                log.write(json.dumps(line) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{line['loss']:.4f}", img_s=f"{line['images_per_s']:.0f}")
            total, counted, t0 = torch.zeros((), device=device), 0, time.time()
        if me == 0 and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            began = time.time()
            save(step + 1)
            t0 += time.time() - began  # not the training's
    say(f"wrote {args.out}/ckpt.pt, samples.png, log.jsonl")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    cli(main)
