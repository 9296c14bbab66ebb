r"""Trains GMem (arXiv 2412.08781): a flow-matching transformer, shown each image's masked snippet.

    python train.py                                        # the embedded glyphs, in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py \
        --data PREPARED                                    # prepared first, on one node

Writes OUT/ckpt.pt, log.jsonl, samples.png and samples-NNNNNNN.png (of the bank's snippets, by the
EMA weights). With --resume it goes on where OUT/ckpt.pt ends, or begins if that file does not exist
yet: one command for a scheduler that restarts jobs. SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1
save first. A step whose loss or gradient is not finite changes nothing.
Randomness belongs to the micro-batch, (seed, step, index), never to the process: 1 process that
accumulates 8 micro-batches and 8 processes with one each take the same steps, up to rounding.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import memory
from memory import DATA_SETTINGS, InputError, in_range, on_first_process, rank_world
from model import CONFIGS, SiT, SiTConfig, flow_loss, load_file
from sample import TRAINING, decode, draw_rows, generate, mixed_seed, save_images

# ----------------------------------------------------------------------------------------- settings

MICRO_BATCH = 128  # images of a forward pass, at most, where --micro-batch is not given
MICRO_TOKENS = 128 * 256  # tokens of a forward pass, at most: 32 images of 1,024
GIVE_UP = 50  # consecutive skipped steps that end a run, at the next line of the log

# The preset imagenet256-xl, from which the others differ. Sources are files of the official GMem;
# "yaml" is its configs/gmem_sde_xl.yaml.
IMAGENET = {
    "data": "data/imagenet256",
    "image_size": 256,  # yaml
    "tokenizer": "vavae-f16d32",  # yaml: vae.model_name
    "encoder": "dinov2_vitb14",  # models/dinov2.py
    "flip": True,  # extract_features.py encodes each image mirrored, too
    "model": "LightningDiT-XL/1",  # yaml: model_type
    "memory_scale": 1.0,  # engine/train.py: unit-norm snippets
    "steps": 200_000,  # yaml: max_steps
    "batch_size": 1024,  # yaml: global_batch_size
    "lr": 2e-4,  # yaml
    "warmup": 1000,  # ours
    "decay": (0, 0),  # engine/train.py: the learning rate is constant
    "align": 0.5,  # yaml: proj_loss_weight
    "t_mean": 0.0,  # transport/transport.py: sample_logit_normal(0, 1)
    "t_std": 1.0,
    "save_every": 2500,  # yaml: ckpt_every
    "log_every": 100,  # yaml
}
PRESETS = {
    "glyphs": {},
    # configs/gmem_sde_b.yaml
    "imagenet256-b": {**IMAGENET, "model": "LightningDiT-B/1", "steps": 80000, "save_every": 20000},
    "imagenet256-xl": IMAGENET,
    # README: 400 epochs
    "imagenet512-xl": {**IMAGENET, "data": "data/imagenet512", "image_size": 512, "steps": 500_000},
    "official-xl": {
        **IMAGENET,
        "data": "data/imagenet256-exact",  # by memory.py --rank full --dtype float32
        "rank": "full",  # datasets/img_latent_dataset.py: the class tokens themselves
        "mask_ratio": 0.4,  # models/lightningdit.py: FeatureEmbedder(dropout_prob=0.4)
        "zero_init": False,  # models/lightningdit.py: initialize_weights
        "align_depth": 4,  # models/lightningdit.py: encoder_depth
        "beta2": 0.95,  # yaml
        "warmup": 0,  # engine/train.py has none
        "clip": 1.0,  # yaml: max_grad_norm
        "ema": 0.9999,  # engine/train.py: update_ema
        "ema_ramp": False,  # engine/train.py: update_ema
        "cond_drop_prob": 0.0,  # engine/train.py shows each image with its snippet
    },
    "sit-xl": {  # the paper's comparison with SiT; "SiT" is train.py of willisma/SiT
        **IMAGENET,
        "data": "data/imagenet256-sd",
        "tokenizer": "sd-vae-ft-ema",  # SiT
        "model": "SiT-XL/2",
        "steps": 140_000,  # paper: 28 epochs
        "batch_size": 256,  # SiT
        "lr": 1e-4,  # SiT
        "beta2": 0.999,  # SiT
        "warmup": 0,  # SiT
        "align": 0.0,  # SiT
        "ema_ramp": False,  # SiT: 0.9999 from the first step on
        "cond_drop_prob": 0.0,  # as official-xl
    },
}

positive = in_range(1e-9, kind=float)
not_negative = in_range(0, kind=float)


def scale(text):
    return text if text == "unit" else positive(text)


fraction = in_range(0, 1, float)
any_number = in_range(-1e9, kind=float)
steps_from_to = {"type": in_range(0), "nargs": 2, "metavar": ("A", "B")}
CONDITIONS = ("memory", "class", "none")
# name: (default, type, help)
SETTINGS = {
    "data": ("glyphs", str, "prepared folder, or images, which are prepared into OUT/data"),
    **DATA_SETTINGS,
    "image_size": (32, in_range(1), "height and width that images are cropped to"),
    "model": ("SiT-T/16", tuple(CONFIGS), "network"),
    "condition": ("memory", CONDITIONS, "what the network sees: a snippet, a label, or nothing"),
    "memory_scale": ("unit", scale, "factor on snippets; unit: centred, scaled to unit variance"),
    "memory_tokens": (None, bool, "add the snippet to each token too (default: in SiT-T)"),
    "mask_ratio": (0.4, fraction, "fraction of each snippet's entries masked in training"),
    "zero_init": (True, bool, "adaLN and the last layer start at zero (official GMem: no)"),
    "align_depth": (4, in_range(1), "number of the block that --align compares with DINOv2"),
    "steps": (1300, in_range(1), "training steps in all; without --resume --decay scales with it"),
    "batch_size": (128, in_range(1), "images of one step, over all processes"),
    "micro_batch": (None, in_range(1), "images of a forward pass (default: up to 128)"),
    "lr": (2e-3, positive, "peak learning rate of AdamW"),
    "beta2": (0.95, fraction, "decay rate of AdamW's second moments"),
    "warmup": (50, in_range(0), "steps of linear warm-up of the learning rate"),
    "decay": ((750, 1300), steps_from_to, "the rate falls to 0 from step A to B; 0 0: never"),
    "clip": (1.0, positive, "largest gradient norm; larger gradients are scaled down to it"),
    "ema": (0.9999, fraction, "decay rate of the moving average of the weights (EMA)"),
    "ema_ramp": (True, bool, "the EMA's decay rate is at most (1 + step) / (10 + step)"),
    "cond_drop_prob": (0.1, fraction, "fraction of images shown with the null condition"),
    "align": (0.0, not_negative, "weight of REPA's alignment loss; needs --encoder dinov2_*"),
    "t_mean": (-0.8, any_number, "mean of the logit of the times t (official GMem: 0)"),
    "t_std": (0.8, positive, "standard deviation of the logit of t (official GMem: 1)"),
    "seed": (0, in_range(0, 2**63), "seed of initial weights, order of images, noise and masks"),
    "preset": ("glyphs", tuple(PRESETS), "defaults of a known run, which other flags replace"),
    "out": ("out", str, "folder of all that is written"),
    "resume": (False, bool, "go on where OUT/ckpt.pt ends, or begin if it does not exist"),
    "save_every": (325, in_range(1), "steps between checkpoints, each of which replaces the last"),
    "keep_every": (None, in_range(1), "steps between EMA weights kept as OUT/ema-NNNNNNN.pt"),
    "preview": (True, bool, "write OUT/samples.png with each checkpoint"),
    "log_every": (50, in_range(1), "steps between lines of OUT/log.jsonl"),
    "device": (None, str, "device: cuda, mps or cpu (default: the best available)"),
    "dtype": (None, ("bfloat16", "float32"), "dtype of the network, by default bfloat16 on CUDA"),
    "compile": (None, bool, "compile the network by torch.compile (default: on CUDA)"),
}
# the first setting of each group of --help
GROUPS = {"data": "data", "model": "network", "steps": "optimisation", "preset": "run"}


# --------------------------------------------------------------------------------------------- data


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, N):
    return np.random.default_rng([seed, epoch]).permutation(N)


class Loader:
    """Batches from memory maps: one gather each, in a thread that is one batch ahead."""

    def __init__(self, folder, seed, device, patches=False):
        self.seed = seed
        self.device = device
        self.folder = folder
        self.meta = memory.read_json(os.path.join(folder, "meta.json"))
        self.bank = memory.MemoryBank.load(os.path.join(folder, "bank.pt"))
        self.latents = memory.load_array(os.path.join(folder, "latents.npy"))
        labels = memory.load_array(os.path.join(folder, "labels.npy"))
        N = len(self.latents)
        if self.bank.id != self.meta["bank"] or not N == len(labels) == len(self.bank):
            raise InputError(f"{folder}: latents, labels and bank are not those of one preparation")
        self.arrays = [self.latents, labels, self.bank.coef, self.bank.scale]
        self.patches = None
        if patches:
            # patches.pt: a basis fitted to a sample of the tokens; patches.npy: all, in that basis
            self.patches = memory.MemoryBank.load(os.path.join(folder, "patches.pt"))
            for name in ("patches.npy", "patch_scales.npy"):
                self.arrays.append(memory.load_array(os.path.join(folder, name)))
        self.stats = memory.stats_tensor(self.meta, device)

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
        self.batches = memory.ahead(self.read, starts)

    def next_batch(self):
        """-> x (B, C, h, w) as the network sees it, s (B, D), y (B,), patch tokens or None"""
        batch = [part.to(self.device, non_blocking=True) for part in next(self.batches)]
        latents, y, coef, scale, *patches = batch
        x = memory.normalize_latents(latents, self.stats)
        s = self.bank.unpack(coef, scale)
        targets = self.patches.unpack(*patches) if patches else None
        return x, s, y, targets


# ----------------------------------------------------------------------------------------- training


def learning_rate(step, args):
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    if b > 0:
        lr = lr * min(1, max(0, (b - step) / (b - a)))
    return lr


class Trainer:
    """The network, its EMA, its optimizer, and counters."""

    def __init__(self, args, config, loader, device):
        self.args = args
        self.config = config
        self.device = device
        self.dtype = args.dtype or memory.default_dtype(device)  # of the forward pass
        torch.manual_seed(args.seed)
        self.model = SiT(config).to(device)
        if config.memory_center:
            self.model.memory_mean.copy_(torch.tensor(loader.bank.mean))
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True
        )
        self.step = 0
        self.logged = 0  # bytes of log.jsonl
        self.zero = torch.zeros((), device=device)
        self.skipped = self.zero.clone()  # steps without a finite loss and gradient
        self.consecutive_skips = self.zero.clone()
        self.loss_sum = self.zero.clone()  # since the last line of the log
        self.finite_steps = self.zero.clone()

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        # a copy: the optimizer would keep the file mapped, which is soon replaced
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.step = checkpoint["step"]
        self.logged = checkpoint["logged"]
        self.skipped += checkpoint["skipped"]

    def save(self, loader, micro_batch, name="ckpt.pt", ema_only=False):
        """Writes OUT/name: what sample.py needs and, without ema_only, what --resume needs."""
        bank = os.path.realpath(os.path.join(loader.folder, "bank.pt"))
        checkpoint = {
            "step": self.step,
            "ema": self.ema.state_dict(),
            "config": asdict(self.config),
            "meta": loader.meta,
            "bank": os.path.relpath(bank, os.path.realpath(self.args.out)),
        }
        if not ema_only:
            checkpoint["model"] = self.model.state_dict()
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint["skipped"] = int(self.skipped)
            checkpoint["logged"] = self.logged
            checkpoint["settings"] = vars(self.args)
            checkpoint["micro_batch"] = micro_batch
        with memory.atomic_write(os.path.join(self.args.out, name)) as temporary:
            torch.save(checkpoint, temporary)

    @torch.no_grad()
    def update(self, loss):
        """One step by the gradients of the last backward pass -> gradient norm. Where the loss or
        the norm is not finite, nothing changes. The device is not waited for."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.args)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.clip)
        finite = torch.isfinite(loss + norm)  # the same on all processes
        # as GradScaler does: with found_inf set, fused AdamW changes nothing; on Apple's GPUs it
        # ignores found_inf (pytorch/pytorch#186360): there the loss is waited for
        self.optimizer.found_inf = (~finite).float()
        if self.device.type != "mps" or finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_ema(finite)
        self.count(loss, finite)
        return norm

    def update_ema(self, finite):
        """ema = decay ema + (1 - decay) model; finite: a tensor, 0 (nothing changes) or 1"""
        decay = self.args.ema
        if self.args.ema_ramp:
            decay = min(decay, (1 + self.step) / (10 + self.step))
        weights = [(1 - decay) * finite] * len(self.parameters)
        torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, weights)

    def count(self, loss, finite):
        self.step += 1
        self.skipped += ~finite
        self.consecutive_skips = (self.consecutive_skips + 1) * ~finite
        self.loss_sum += torch.where(finite, loss, 0)
        self.finite_steps += finite

    def report(self, norm, seconds, steps):
        """-> a line for the log: the mean loss of the last steps, which took `seconds` in all"""
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


def train(trainer, net, loader, micro_batch, accumulate, tokenizer):
    """The loop; net is trainer.model, compiled and distributed where that is wanted. Returns at the
    end of the training, or after a signal, with everything saved."""
    args = trainer.args
    device = loader.device
    process, num_processes = rank_world()
    # process r computes the micro-batches r, r + num_processes, .. of every step
    indices = range(process, accumulate * num_processes, num_processes)
    loader.begin(micro_batch_starts(trainer, micro_batch, indices), micro_batch)
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
            torch.manual_seed(mixed_seed(TRAINING, args.seed, step, m))
            if num_processes > 1:  # gradients are exchanged in the last micro-batch only
                net.require_backward_grad_sync = m == indices[-1]
            with torch.autocast(device.type, torch.bfloat16, enabled=trainer.dtype == "bfloat16"):
                part = flow_loss(
                    net, x, s, y, args.cond_drop_prob, targets, args.align, args.t_mean, args.t_std
                )
            (part / accumulate).backward()
            loss += part.detach() / accumulate
        memory.all_reduce(loss)
        norm = trainer.update(loss / num_processes)

        stop = torch.tensor(float(len(signals) > 0))
        memory.all_reduce(stop)  # on the CPU: the GPU is not waited for
        last = trainer.step == args.steps or stop > 0
        if last or trainer.step % args.log_every == 0:
            line = trainer.report(norm, time.time() - t0, trainer.step - last_line)
            bar.set_postfix(loss=line["loss"], images_per_s=line["images_per_s"])
            if process == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
                    trainer.logged = file.tell()
            if trainer.consecutive_skips >= GIVE_UP:
                what = f"no finite loss or gradient in {GIVE_UP} steps, to {trainer.step:,}"
                sys.exit(f"train.py: error: {what}; ckpt.pt is kept; a lower --lr may help")
            last_line = trainer.step
            t0 = time.time()
        began = time.time()
        if last or trainer.step % args.save_every == 0:
            on_first_process(trainer.save, loader, micro_batch)
            if args.preview and not stop:
                on_first_process(preview, trainer, loader, tokenizer)
        if args.keep_every is not None and trainer.step % args.keep_every == 0:
            on_first_process(trainer.save, loader, micro_batch, f"ema-{trainer.step:07d}.pt", True)
        t0 += time.time() - began  # saving is not training time
        if stop:
            break


# ======================================= end of the core ==========================================


def note_signals():
    """-> a list, empty until SIGTERM, SIGINT, SIGHUP or SIGUSR1 comes, then with the time of it.

    A second one ends the process, but not within 2 s: torchrun passes on what a scheduler has sent
    to all processes. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""
    times = []

    def note(number, frame):
        if not times:
            times.append(time.time())
        elif time.time() > times[0] + 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has the first two
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)
    return times


def preview(trainer, loader, tokenizer):
    """Writes samples.png, by the EMA weights, always of the same noise and snippets."""
    out = os.path.join(trainer.args.out, "samples")
    config = trainer.config
    s = None
    y = None
    if config.memory_dim:
        s = loader.bank[draw_rows(range(64), 0, len(loader.bank))]
    if config.num_classes:
        y = draw_rows(range(64), 0, config.num_classes)
    x = generate(trainer.ema, range(64), s, y, dtype=trainer.dtype)
    images = decode(x, loader.meta, tokenizer)  # uint8 (64, H, W, 3)
    save_images(images, f"{out}-{trainer.step:07d}.png")
    save_images(images, f"{out}.png")


# what a resumed run cannot change
FIXED = ["preset", "image_size", "model", "condition", "batch_size", "seed", "mask_ratio"]
FIXED += ["align", "memory_scale", "memory_tokens", "zero_init", "align_depth", "beta2"]


def merge_settings(given):
    """Defaults, then the preset, then (with --resume) the checkpoint, then the flags
    -> args; the checkpoint that the run goes on from, or None"""
    settings = {**memory.defaults(SETTINGS), **PRESETS[given.get("preset", "glyphs")]}
    out = given.get("out", settings["out"])
    path = os.path.join(out, "ckpt.pt")
    checkpoint = None
    if os.path.exists(path) and not given.get("resume"):
        raise InputError(f"{path} exists: --resume goes on with it, --out DIR begins elsewhere")
    if os.path.exists(path):
        checkpoint = load_file(path, keys=("model", "optimizer", "settings"))
        was = checkpoint["settings"]
        if set(was) != set(SETTINGS):
            raise InputError(f"{path} is by a train.py of other settings: go on with that one")
        asked = {name: given.get(name, was[name]) for name in FIXED}
        differ = memory.differences(asked, {name: was[name] for name in FIXED})
        if differ:
            raise InputError(f"{path} cannot go on with {differ}: drop it, or name another --out")
        settings = {**was, "out": out, "device": None}
    elif "steps" in given:  # the preset's decay, for a run of this length
        scaled = [step * given["steps"] // settings["steps"] for step in settings["decay"]]
        settings["decay"] = tuple(scaled)
    args = argparse.Namespace(**{**settings, **given})
    a, b = args.decay
    if b > 0 and (a >= b or b < args.steps):
        raise InputError(
            f"the learning rate falls to 0 from step {a} to {b}, but --steps is {args.steps}: "
            "give --decay A B with A < B and B >= --steps, or 0 0"
        )
    return args, checkpoint


# what a prepared folder has decided
PREPARED = ("image_size", "tokenizer", "latent_stats", "encoder", "rank", "flip")
# what has to be the same when a run goes on; where it is does not matter
CONTENT = ("bank", "images", "classes", "latent", "mean", "std")


def is_prepared(folder):
    return os.path.exists(os.path.join(folder, "meta.json"))


def base_names(settings):
    """Settings without the folders of files, which may move."""
    return {name: os.path.basename(str(value)) for name, value in settings.items()}


def prepared_folder(args, given, checkpoint, device):
    """-> the prepared folder of a run: --data, or OUT/data, which is prepared now if need be"""
    folder = args.data
    if checkpoint is not None and "data" not in given:
        with_run = os.path.join(args.out, os.path.dirname(checkpoint["bank"]))
        if is_prepared(with_run):  # it moved with the run
            folder = with_run
        if not is_prepared(folder):
            raise InputError(f"the data of this run are not in {folder}: give --data, their place")
    if not is_prepared(folder):
        folder = os.path.join(args.out, "data")
        patch_size = CONFIGS[args.model]["patch_size"]
        if args.tokenizer == "pixel" and args.image_size % patch_size != 0:
            size = f"--image-size {args.image_size}"
            raise InputError(f"{size} is no multiple of {patch_size}, {args.model}'s patch")
        options = {name: getattr(args, name) for name in DATA_SETTINGS}
        memory.prepare(args.data, folder, device, patches=args.align > 0, **options)

    meta = memory.read_json(os.path.join(folder, "meta.json"))
    made = {name: meta["settings"][name] for name in PREPARED}
    asked = {**PRESETS[args.preset], **given} if checkpoint is None else given
    asked = {name: asked[name] for name in PREPARED if name in asked}
    differ = memory.differences(base_names(made), base_names(asked))
    if differ:
        raise InputError(f"{folder} was prepared with {differ}")
    if checkpoint is not None:
        differ = ", ".join(key for key in CONTENT if meta[key] != checkpoint["meta"][key])
        if differ:
            raise InputError(f"{folder} is not what the run was begun with: other {differ}")
    vars(args).update({**made, **asked, "data": os.path.abspath(folder)})
    return folder


def new_config(args, loader):
    """The SiTConfig of a new run on these data"""
    bank = loader.bank
    in_channels, input_size, _ = loader.meta["latent"]
    config = {
        **CONFIGS[args.model],
        "input_size": input_size,
        "in_channels": in_channels,
        "mask_ratio": args.mask_ratio,
        "zero_init": args.zero_init,
    }
    if args.memory_tokens is not None:
        config["memory_tokens"] = args.memory_tokens
    if args.condition == "memory":
        config["memory_dim"] = bank.dim
        config["memory_scale"] = args.memory_scale
        if args.memory_scale == "unit":
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
        config["align_depth"] = args.align_depth
        tokens = (input_size // config["patch_size"]) ** 2
        given = loader.arrays[-1].shape[1]  # patch_scales.npy: (N, tokens)
        if given != tokens:
            raise InputError(f"--align: {args.model} expects {tokens} patch tokens, not {given}")
    return SiTConfig(**config)


def split(batch_size, micro_batch, num_processes, most=MICRO_BATCH, before=None):
    """-> micro-batch size, micro-batches of each process

    Without a micro_batch it is `before`, the one of a resumed run, as the noise depends on it;
    where that does not divide the batch, it is the largest up to `most` that does."""
    if batch_size % num_processes != 0:
        less = batch_size // num_processes * num_processes
        fits = f"{less} or {less + num_processes}" if less else str(num_processes)
        raise InputError(f"--batch-size {batch_size}: for {num_processes} processes give {fits}")
    share = batch_size // num_processes
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    if micro_batch is None and before in sizes:
        micro_batch = before
    if micro_batch is None:
        micro_batch = max(size for size in sizes if size <= most)
    if micro_batch not in sizes:
        fits = ", ".join(map(str, sizes))
        raise InputError(f"--micro-batch {micro_batch} does not divide {share} images; {fits} do")
    return micro_batch, share // micro_batch


def wrapped(model, args, device):
    """The model, compiled and distributed where that is wanted."""
    process, num_processes = rank_world()
    compiled = args.compile
    if compiled is None:
        compiled = device.type == "cuda" and find_spec("triton") is not None
        if device.type == "cuda" and not compiled and process == 0:
            print("Triton is not installed: the network is not compiled, and needs more memory")
    net = torch.compile(model) if compiled else model
    if num_processes > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # large buckets, as torch.compile cuts the network at each one
        net = DDP(net, device_ids, gradient_as_bucket_view=True, bucket_cap_mb=200)
        net.broadcast_buffers = False  # ours are constants
    return net


def check_disk(trainer):
    """InputError where the disk of OUT has no room for the checkpoints of the run."""
    args = trainer.args
    weights = sum(p.nbytes for p in trainer.parameters)
    needed = 2 * 4 * weights  # the old and the new ckpt.pt: weights, EMA, two moments
    for path in (f"{args.out}/ckpt.pt", f"{args.out}/ckpt.pt.tmp"):
        if os.path.exists(path):
            needed -= os.path.getsize(path)
    if args.keep_every is not None:
        needed += (args.steps // args.keep_every - trainer.step // args.keep_every) * weights
    free = shutil.disk_usage(args.out).free
    if free < needed:
        there = f"the disk of {args.out} has {free / 1e9:.1f} GB left"
        raise InputError(f"{there}, the checkpoints of this run need {needed / 1e9:.1f} GB more")


def introduce(trainer, loader, micro_batch, accumulate, before, most):
    """Prints what is trained, on what."""
    args = trainer.args
    meta = loader.meta
    num_processes = rank_world()[1]
    count = sum(p.numel() for p in trainer.parameters)
    print(f"data: {len(loader.latents):,} of {meta['latent']}, {len(meta['classes'])} classes")
    made = ", ".join(f"{name} {meta['settings'][name]}" for name in PREPARED)
    print(f"prepared in {loader.folder}: {made}")
    print(f"bank: {loader.bank}")
    print(f"model: {args.model}, {count:,} parameters, condition {args.condition}")
    batch = f"{num_processes} processes x {accumulate} micro-batches of {micro_batch}"
    print(f"batch: {args.batch_size} = {batch}, on {loader.device}; from step {trainer.step:,}")
    if before not in (None, micro_batch):
        print(f"micro-batch {micro_batch}, was {before}: other noise now")
    if micro_batch < most // 2 < args.batch_size // num_processes:
        good = most * num_processes
        less = max(1, args.batch_size // good) * good
        print(f"--batch-size {less} or {less + good} divides well, and would be faster")


def run(given, device):
    """A whole run, by the flags of the command line; no other command writes to its --out."""
    # settings and data
    args, checkpoint = merge_settings(given)
    process, num_processes = rank_world()
    split(args.batch_size, given.get("micro_batch"), num_processes)  # errors before the preparation
    folder = prepared_folder(args, given, checkpoint, device)
    loader = Loader(folder, args.seed, device, patches=args.align > 0)

    before = None
    if checkpoint is None:
        trainer = Trainer(args, new_config(args, loader), loader, device)
    else:
        trainer = Trainer(args, SiTConfig(**checkpoint["config"]), loader, device)
        trainer.load(checkpoint)
        before = checkpoint["micro_batch"]
        checkpoint = None  # free the memory
    tokens = (trainer.config.input_size // trainer.config.patch_size) ** 2
    most = max(1, min(MICRO_BATCH, MICRO_TOKENS // tokens))
    asked = given.get("micro_batch")
    micro_batch, accumulate = split(args.batch_size, asked, num_processes, most, before)
    if process == 0:
        introduce(trainer, loader, micro_batch, accumulate, before, most)
    if trainer.step >= args.steps:
        if process == 0:
            print(
                f"nothing to do: --steps {args.steps:,} in all; to go on give more, and --decay A B"
            )
        return

    # what would otherwise fail after hours
    on_first_process(check_disk, trainer)
    tokenizer = None
    if args.preview:
        tokenizer = on_first_process(memory.load_tokenizer, args.tokenizer, device)
    net = wrapped(trainer.model, args, device)
    torch.set_float32_matmul_precision("high")

    # loop
    try:
        train(trainer, net, loader, micro_batch, accumulate, tokenizer)
    except torch.OutOfMemoryError as e:
        images = f"micro-batches of {micro_batch} images ({tokens} tokens each)"
        less = "a smaller --micro-batch needs less, and draws other noise"
        raise InputError(f"{device} has too little memory for {images}: {less}") from e
    if process == 0:
        why = "" if trainer.step >= args.steps else ": stopped by a signal"
        print(f"{args.out}/ckpt.pt holds step {trainer.step:,}{why}")


def main():
    given = memory.read_flags(SETTINGS, "Trains GMem.", GROUPS)
    device = memory.best_device(given.get("device"))
    memory.init_distributed(device)
    with memory.one_writer(given.get("out", "out")):
        run(given, device)


if __name__ == "__main__":
    memory.cli(main)
