"""Trains GMem (arXiv 2412.08781): a flow-matching transformer, shown each image's masked snippet.

    python train.py                                        # the embedded glyphs, in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py \\
        --data PREPARED                                    # prepared first, on one node

Writes OUT/ckpt.pt, samples.png (by the EMA weights) and log.jsonl; --resume goes on where
OUT/ckpt.pt ends. A signal (Ctrl-C, SIGTERM) saves first. A step whose loss or gradient is not
finite changes nothing.
Randomness belongs to the micro-batch, (seed, step, index), never to the process: 1 process that
accumulates 8 micro-batches and 8 processes with one each take the same steps, up to rounding.

It reads as nanoGPT's train.py does: settings, data, training, and main, which calls them in turn.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from functools import lru_cache

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from memory import (
    DATA_SETTINGS,
    InputError,
    MemoryBank,
    ahead,
    all_reduce,
    atomic_write,
    best_device,
    cli,
    default_dtype,
    defaults,
    differences,
    full_path,
    init_distributed,
    load_array,
    load_tokenizer,
    normalize_latents,
    number,
    prepare,
    rank_world,
    read_flags,
    read_json,
    stats_tensor,
)
from model import CONFIGS, SiT, SiTConfig, flow_loss, load_file
from sample import decode, draw_rows, generate, mixed_seed, save_images

# ----------------------------------------------------------------------------------------- settings

# the values of configs/gmem_sde_{b,xl}.yaml of the official GMem; README says what differs
OFFICIAL = {
    "data": "data/imagenet256",
    "image_size": 256,
    "tokenizer": "vavae-f16d32",
    "encoder": "dinov2_vitb14",
    "flip": True,
    "model": "LightningDiT-XL/1",
    "steps": 200_000,
    "batch_size": 1024,
    "lr": 2e-4,
    "warmup": 1000,
    "decay": (0, 0),
    "align": 0.5,
    "scale": 1.0,
    "t_mean": 0.0,
    "t_std": 1.0,
    "save_every": 2500,
    "log_every": 100,
}
PRESETS = {
    "glyphs": {},
    "imagenet256-b": {
        **OFFICIAL,
        "model": "LightningDiT-B/1",
        "steps": 80_000,
        "save_every": 20_000,
    },
    "imagenet256-xl": OFFICIAL,
    "imagenet512-xl": {**OFFICIAL, "data": "data/imagenet512", "image_size": 512, "steps": 500_000},
}
MICRO_BATCH = 128  # images of one forward pass, at most, where nothing else is asked for
GIVE_UP = 50  # consecutive skipped steps that end a run
# what a resumed run cannot change
FIXED = ["preset", "image_size", "model", "condition", "batch_size", "seed", "mask", "align"]
FIXED += ["scale", "memory_tokens"]
# what a prepared folder has decided
PREPARED = ("image_size", "tokenizer", "latent_stats", "encoder", "rank", "flip")


positive = number(1e-9, kind=float)


def scale(text):
    return text if text == "unit" else positive(text)


fraction = number(0, 1, float)
steps_from_to = {"type": number(0), "nargs": 2, "metavar": ("A", "B")}
# name: (default, type, help)
SETTINGS = {
    "preset": ("glyphs", tuple(PRESETS), "another set of defaults than this one"),
    "out": ("out", str, "folder of everything that is written"),
    "data": (
        "glyphs",
        str,
        "a prepared folder, or what memory.py takes, which is prepared into OUT/data",
    ),
    **DATA_SETTINGS,
    "image_size": (32, number(1), "height and width that images are cropped to"),
    "model": ("SiT-T/16", tuple(CONFIGS), "a name in CONFIGS of model.py"),
    "condition": (
        "memory",
        ("memory", "class", "none"),
        "class, none: the same network without memory",
    ),
    "scale": (
        "unit",
        scale,
        "snippets are shown centred, at unit variance (unit), or s times a number",
    ),
    "memory_tokens": (None, bool, "the snippet enters at each token, too (default: in SiT-T)"),
    "mask": (0.4, fraction, "part of the snippet's entries set to zero"),
    "drop": (0.1, fraction, "part of the images shown with the null condition"),
    "align": (0.0, number(0, kind=float), "weight of REPA's loss; needs patches.pt"),
    "t_mean": (-0.8, number(-1e9, kind=float), "of the logit of t (0: as in GMem)"),
    "t_std": (0.8, positive, "of the logit of t (1: as in GMem)"),
    "steps": (1300, number(1), "in all, resumed ones included"),
    "batch_size": (128, number(1), "of all processes together"),
    "micro_batch": (
        None,
        number(1),
        f"of one forward pass (default: the largest to {MICRO_BATCH})",
    ),
    "lr": (2e-3, positive, "of AdamW"),
    "warmup": (50, number(0), "steps of linear warm-up"),
    "decay": ((750, 1300), steps_from_to, "where --lr falls to 0 (0 0: nowhere)"),
    "clip": (1.0, positive, "largest gradient norm"),
    "ema": (0.9999, fraction, "at most; the ramp is (1 + step) / (10 + step)"),
    "seed": (0, number(0), "of weights, order, noise, masks"),
    "resume": (False, bool, "go on in --out"),
    "save_every": (325, number(1), "steps between checkpoints"),
    "preview": (True, bool, "a grid of samples with every checkpoint"),
    "log_every": (50, number(1), "steps between lines of log.jsonl"),
    "device": (None, str, "cuda, mps or cpu (default: the best there is)"),
    "dtype": (None, ("bfloat16", "float32"), "of the forward pass (default: bfloat16 on CUDA)"),
    "compile": (None, bool, "the network, by torch.compile (default: on CUDA)"),
}


def merge_settings(given):
    """Defaults, then the preset, then (with --resume) the checkpoint, then the flags
    -> args, checkpoint or None"""
    settings = {**defaults(SETTINGS), **PRESETS[given.get("preset", "glyphs")]}
    path = os.path.join(given.get("out", settings["out"]), "ckpt.pt")
    checkpoint = None
    if given.get("resume"):
        checkpoint = load_file(path, keys=("model", "optimizer", "settings"))
        was = checkpoint["settings"]
        if set(was) != set(SETTINGS):
            raise InputError(f"{path} is by a train.py of other settings: go on with that one")
        asked = {name: given.get(name, was[name]) for name in FIXED}
        differ = differences(asked, {name: was[name] for name in FIXED})
        if differ:
            raise InputError(f"{path} cannot go on with {differ}: drop it, or name another --out")
        settings = {**was, "device": None}
    elif os.path.exists(path):
        raise InputError(
            f"{path} exists: --resume goes on with it, --out DIR starts a run elsewhere"
        )
    elif "steps" in given:  # the preset's decay, for a run of this length
        a, b = settings["decay"]
        a = a * given["steps"] // settings["steps"]
        b = b * given["steps"] // settings["steps"]
        settings["decay"] = (a, b)
    args = argparse.Namespace(**{**settings, **given})
    a, b = args.decay
    if b > 0 and (a >= b or b < args.steps):
        raise InputError(
            f"the learning rate falls to 0 from step {a} to {b}, but --steps is {args.steps}: "
            "give --decay A B with A < B and B >= --steps, or 0 0"
        )
    return args, checkpoint


# --------------------------------------------------------------------------------------------- data


def prepared_folder(args, given, device):
    """--data, if it is a prepared folder; else OUT/data, prepared now, if it is not yet."""
    folder = args.data
    if not os.path.exists(os.path.join(folder, "meta.json")):
        folder = os.path.join(args.out, "data")
        patch_size = CONFIGS[args.model]["patch_size"]
        if args.tokenizer == "pixel" and args.image_size % patch_size != 0:
            size = f"--image-size {args.image_size}"
            raise InputError(f"{size} is no multiple of {patch_size}, {args.model}'s patch")
        options = {name: getattr(args, name) for name in DATA_SETTINGS}
        prepare(args.data, folder, device, patches=args.align > 0, **options)
    made = read_json(os.path.join(folder, "meta.json"))["settings"]
    differ = differences(made, {name: full_path(given.get(name, made[name])) for name in PREPARED})
    if differ:
        raise InputError(f"{folder} was prepared with {differ}")
    vars(args).update({name: made[name] for name in PREPARED})
    return folder


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, N):
    return np.random.default_rng([seed, epoch]).permutation(N)


class Loader:
    """Batches from memory maps: one gather each, in a thread that is one batch ahead."""

    def __init__(self, folder, seed, device, patches=False):
        self.seed = seed
        self.device = device
        self.folder = folder
        self.meta = read_json(os.path.join(folder, "meta.json"))
        self.bank = MemoryBank.load(os.path.join(folder, "bank.pt"))
        self.latents = load_array(os.path.join(folder, "latents.npy"))
        labels = load_array(os.path.join(folder, "labels.npy"))
        N = len(self.latents)
        if self.bank.id != self.meta["bank"] or not N == len(labels) == len(self.bank):
            raise InputError(f"{folder}: latents, labels and bank are not those of one preparation")
        self.arrays = [self.latents, labels, self.bank.coef, self.bank.scale]
        self.patches = None
        if patches:
            self.patches = MemoryBank.load(os.path.join(folder, "patches.pt"))
            self.arrays.append(self.patches.coef.reshape(N, -1, self.patches.rank))
            self.arrays.append(self.patches.scale.reshape(N, -1))
        self.stats = stats_tensor(self.meta, device)

    def rows(self, start, size):
        """Row numbers at positions start .. start + size - 1; sorted, as these reads are faster."""
        N = len(self.latents)
        stop = start + size
        parts = []
        for epoch in range(start // N, -(-stop // N)):
            order = epoch_order(self.seed, epoch, N)
            parts.append(order[max(0, start - epoch * N) : stop - epoch * N])
        return np.sort(np.concatenate(parts))

    def read(self, start):
        rows = self.rows(start, self.size)
        # numpy only: torch in a second thread would take the cores from the first
        batch = [torch.from_numpy(np.asarray(array[rows])) for array in self.arrays]
        if self.device.type == "cuda":
            batch = [part.pin_memory() for part in batch]
        return batch

    def begin(self, starts, size):
        """next_batch will give batches of this size, from these places in the stream of epochs."""
        self.size = size
        self.batches = ahead(self.read, starts)

    def next_batch(self):
        """-> x (B, C, h, w) as the network sees it, s (B, D), y (B,), patch tokens or None"""
        batch = [part.to(self.device, non_blocking=True) for part in next(self.batches)]
        latents, y, coef, scale, *patches = batch
        x = normalize_latents(latents, self.stats)
        s = self.bank.unpack(coef, scale)
        targets = self.patches.unpack(*patches) if patches else None
        return x, s, y, targets


# ----------------------------------------------------------------------------------------- training


def new_config(args, loader):
    """The network for these data."""
    bank = loader.bank
    in_channels, input_size, _ = loader.meta["latent"]
    config = {
        **CONFIGS[args.model],
        "input_size": input_size,
        "in_channels": in_channels,
        "mask_ratio": args.mask,
    }
    if args.memory_tokens is not None:
        config["memory_tokens"] = args.memory_tokens
    if args.condition == "memory":
        config["memory_dim"] = bank.dim
        config["memory_scale"] = args.scale
        if args.scale == "unit":
            some = bank[np.linspace(0, len(bank) - 1, min(len(bank), 10_000)).astype(int)]
            deviation = (some - torch.tensor(bank.mean)).square().mean().sqrt().item()
            config["memory_center"] = True
            config["memory_scale"] = 1 / max(deviation, 1e-6)
    if args.condition == "class":
        config["num_classes"] = len(loader.meta["classes"])
        if not config["num_classes"]:
            raise InputError(f"{args.data} has no labels (class sub-folders) for --condition class")
    if args.align > 0:
        config["align_dim"] = loader.patches.dim
        tokens = (input_size // config["patch_size"]) ** 2
        given = len(loader.patches) // len(bank)
        if given != tokens:
            asked = f"{args.model} expects {tokens} patch tokens of an image"
            raise InputError(f"--align: {asked}, there are {given}")
    return SiTConfig(**config)


def split(batch_size, micro_batch, num_processes):
    """-> micro-batch size, micro-batches of each process"""
    if batch_size % num_processes != 0:
        less = batch_size // num_processes * num_processes
        fits = f"{less or num_processes} or {less + num_processes}"
        divided = f"--batch-size {batch_size} does not divide among {num_processes} processes"
        raise InputError(f"{divided}; {fits} would")
    share = batch_size // num_processes
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if micro_batch is None:
        micro_batch = max(size for size in sizes if size <= MICRO_BATCH)
    if micro_batch not in sizes:
        fits = ", ".join(map(str, sizes))
        whole = f"{share}, the share of one of {num_processes} processes in the batch"
        raise InputError(f"--micro-batch {micro_batch} does not divide {whole}; {fits} would")
    return micro_batch, share // micro_batch


def learning_rate(step, args):
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    if b > 0:
        lr = lr * min(1, max(0, (b - step) / (b - a)))
    return lr


def note_signals():
    """-> a list, of the times at which SIGTERM and SIGINT come. A second one ends the process, but
    not within 2 s: that is torchrun passing on what a scheduler has sent to all processes."""
    times = []

    def note(number, frame):
        times.append(time.time())
        if times[-1] > times[0] + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return times


class Trainer:
    """The network, its EMA, its optimizer, and what is counted."""

    def __init__(self, args, config, loader, device):
        self.args = args
        self.config = config
        torch.manual_seed(args.seed)
        self.model = SiT(config).to(device)
        if config.memory_center:
            self.model.memory_mean.copy_(torch.tensor(loader.bank.mean))
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True
        )
        self.step = 0
        self.logged = 0  # bytes of log.jsonl
        self.zero = torch.zeros((), device=device)
        self.skipped = self.zero.clone()  # steps without a finite loss and gradient
        self.consecutive_skips = self.zero.clone()
        self.loss_sum = self.zero.clone()  # since the last line of the log
        self.finite_steps = self.zero.clone()

    def load(self, checkpoint):
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.step = checkpoint["step"]
        self.logged = checkpoint["logged"]
        self.skipped += checkpoint["skipped"]

    def save(self, loader, micro_batch):
        bank = os.path.join(loader.folder, "bank.pt")
        checkpoint = {
            "step": self.step,
            "logged": self.logged,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": int(self.skipped),
            "config": asdict(self.config),
            "settings": vars(self.args),
            "micro_batch": micro_batch,
            "meta": loader.meta,
            "bank": os.path.relpath(os.path.realpath(bank), os.path.realpath(self.args.out)),
        }
        with atomic_write(os.path.join(self.args.out, "ckpt.pt")) as temporary:
            torch.save(checkpoint, temporary)

    def update(self, loss):
        """One step by the gradients there are -> gradient norm. Without a finite loss and norm
        nothing changes. All of it stays on the device, which is not waited for."""
        args = self.args
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, args)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, args.clip)
        finite = torch.isfinite(loss + norm)  # the same on all processes
        self.optimizer.found_inf = (~finite).float()  # then the fused AdamW changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        weights = [(1 - decay) * finite] * len(self.parameters)
        torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, weights)

        self.step += 1
        self.skipped += ~finite
        self.consecutive_skips = (self.consecutive_skips + 1) * ~finite
        self.loss_sum += torch.where(finite, loss, 0)
        self.finite_steps += finite
        return norm

    def report(self, norm, seconds, steps):
        """-> a line for the log: the mean loss of the last steps, which took so long"""
        loss = self.loss_sum / self.finite_steps
        self.loss_sum = self.zero.clone()
        self.finite_steps = self.zero.clone()
        return {
            "step": self.step,
            "loss": rounded(loss),
            "grad_norm": rounded(norm),
            "lr": learning_rate(self.step - 1, self.args),
            "seconds": round(seconds, 2),
            "images_per_s": round(self.args.batch_size * steps / seconds, 1),
            "skipped": int(self.skipped),
        }


def rounded(number):
    """None where it is not finite: JSON has no NaN."""
    return round(number.item(), 5) if number.isfinite() else None


def micro_batch_starts(trainer, micro_batch, indices):
    """Where the micro-batches of one process begin, in the endless stream of epochs."""
    for step in range(trainer.step, trainer.args.steps):
        for m in indices:
            yield step * trainer.args.batch_size + m * micro_batch


def train(trainer, net, loader, micro_batch, accumulate):
    """The loop; net is trainer.model, compiled and distributed where that is wanted. Returns at the
    end of the training, or after a signal, with everything saved."""
    args = trainer.args
    device = loader.device
    process, num_processes = rank_world()
    # process r computes the micro-batches r, r + num_processes, .. of every step
    indices = range(process, accumulate * num_processes, num_processes)
    loader.begin(micro_batch_starts(trainer, micro_batch, indices), micro_batch)
    dtype = args.dtype or default_dtype(device)
    log = os.path.join(args.out, "log.jsonl")
    if process == 0:
        with open(log, "a") as file:  # a run that was cut off may have logged more than it saved
            file.truncate(min(file.tell(), trainer.logged))
    signals = note_signals()
    steps = range(trainer.step, args.steps)
    bar = tqdm(steps, "training", args.steps, initial=steps.start, unit="step", disable=process > 0)
    last_line = trainer.step
    t0 = time.time()
    for step in bar:
        loss = torch.zeros((), device=device)
        for m in indices:
            x, s, y, targets = loader.next_batch()
            torch.manual_seed(mixed_seed(0, args.seed, step, m))
            if num_processes > 1:  # gradients are exchanged in the last micro-batch only
                net.require_backward_grad_sync = m == indices[-1]
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                part = flow_loss(
                    net, x, s, y, args.drop, targets, args.align, args.t_mean, args.t_std
                )
            (part / accumulate).backward()
            loss += part.detach() / accumulate
        all_reduce(loss)
        norm = trainer.update(loss / num_processes)

        stop = torch.tensor(float(len(signals) > 0))
        all_reduce(stop)  # on the CPU: the GPU is not waited for
        last = trainer.step == args.steps or stop > 0
        if last or trainer.step % args.log_every == 0:
            line = trainer.report(norm, time.time() - t0, trainer.step - last_line)
            bar.set_postfix(loss=line["loss"], images_per_s=line["images_per_s"])
            if process == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                    trainer.logged = file.tell()
            if trainer.consecutive_skips >= GIVE_UP:
                sys.exit(
                    f"train.py: error: no finite loss or gradient in {GIVE_UP} steps, to "
                    f"{trainer.step:,}; {args.out}/ckpt.pt is kept; a lower --lr may help"
                )
            last_line = trainer.step
            t0 = time.time()
        if process == 0 and (last or trainer.step % args.save_every == 0):
            began = time.time()
            trainer.save(loader, micro_batch)
            if args.preview and not stop:
                preview(trainer, loader, dtype)
            t0 += time.time() - began  # not the training's
        if stop:
            break


def preview(trainer, loader, dtype):
    """samples.png, by the EMA weights; always of the same noise and snippets"""
    out = trainer.args.out
    config = trainer.config
    s = None
    y = None
    if config.memory_dim:
        s = loader.bank[draw_rows(range(64), 0, len(loader.bank))]
    if config.num_classes:
        y = draw_rows(range(64), 0, config.num_classes)
    x = generate(trainer.ema, range(64), s, y, dtype=dtype)
    tokenizer = load_tokenizer(trainer.args.tokenizer, loader.device)
    images = decode(x, loader.meta, tokenizer)
    save_images(images, os.path.join(out, f"samples-{trainer.step:07d}.png"))
    save_images(images, os.path.join(out, "samples.png"))


def wrapped(model, args, device):
    """The model, compiled and distributed where that is wanted."""
    compiled = device.type == "cuda" if args.compile is None else args.compile
    net = torch.compile(model) if compiled else model
    if rank_world()[1] > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # large buckets, as torch.compile cuts the network at each one
        net = DDP(net, device_ids, gradient_as_bucket_view=True, bucket_cap_mb=200)
        # they are constants; as an argument it warns, from torch 2.13 on
        net.broadcast_buffers = False
    return net


def introduce(trainer, loader, micro_batch, accumulate):
    """Prints what is trained, on what."""
    args = trainer.args
    meta = loader.meta
    num_processes = rank_world()[1]
    made = ", ".join(f"{name} {meta['settings'][name]}" for name in PREPARED)
    count = sum(p.numel() for p in trainer.parameters)
    print(f"data: {len(loader.latents):,} of {meta['latent']}, {len(meta['classes'])} classes")
    print(f"prepared in {loader.folder}: {made}")
    print(f"bank: {loader.bank}")
    print(f"model: {args.model}, {count:,} parameters, condition {args.condition}")
    batch = f"{num_processes} processes x {accumulate} micro-batches of {micro_batch}"
    print(f"batch: {args.batch_size} = {batch}, on {loader.device}; from step {trainer.step:,}")
    if micro_batch < MICRO_BATCH // 2 < args.batch_size // num_processes:
        good = MICRO_BATCH * num_processes
        less = max(1, args.batch_size // good) * good
        print(f"--batch-size {less} or {less + good} divides well, and would be faster")


def main():
    # settings
    given = read_flags(SETTINGS, "Trains GMem.")
    args, checkpoint = merge_settings(given)

    # set-up
    device = best_device(args.device)
    init_distributed(device)
    process, num_processes = rank_world()
    micro_batch, accumulate = split(args.batch_size, args.micro_batch, num_processes)

    # data
    folder = prepared_folder(args, given, device)
    loader = Loader(folder, args.seed, device, patches=args.align > 0)

    # model
    if checkpoint is None:
        trainer = Trainer(args, new_config(args, loader), loader, device)
    else:
        differ = differences(checkpoint["meta"], loader.meta)
        if differ:
            raise InputError(f"{folder} is not what the run was begun with: {differ}")
        trainer = Trainer(args, SiTConfig(**checkpoint["config"]), loader, device)
        trainer.load(checkpoint)
    net = wrapped(trainer.model, args, device)
    torch.set_float32_matmul_precision("high")
    if process == 0:
        introduce(trainer, loader, micro_batch, accumulate)
        if checkpoint is not None and checkpoint["micro_batch"] != micro_batch:
            print(f"micro-batch {micro_batch}, was {checkpoint['micro_batch']}: other noise now")
    checkpoint = None  # free the memory
    if trainer.step >= args.steps:
        if process == 0:
            print(f"nothing to do: --steps {args.steps:,} in all; give more to go on")
        return

    # loop
    os.makedirs(args.out, exist_ok=True)
    train(trainer, net, loader, micro_batch, accumulate)
    if process == 0:
        why = "" if trainer.step >= args.steps else ": stopped by a signal"
        print(f"{args.out}/ckpt.pt holds step {trainer.step:,}{why}")


if __name__ == "__main__":
    cli(main)
