r"""Trains GMem (arXiv 2412.08781): a flow-matching transformer, shown each image's masked snippet.

    python train.py                                        # the embedded glyphs, in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    python train.py --data FOLDER --init o/ckpt.pt --out p # fine-tuning: a new bank, step 0
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py \
        --data PREPARED                                    # prepared first, on one node

OUT gets ckpt.pt and bank.pt, which sample.py needs, log.jsonl and samples.png (by the EMA weights:
images of the bank's snippets above, new ones below). SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1
save first; the exit code is then 128 + the signal's number. A step whose loss or gradient is not
finite changes nothing. One run per OUT.

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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import memory
import sample
from memory import InputError, rank_world
from model import CONFIGS, SiT, SiTConfig, flow_loss, load_file, load_sit, load_tokenizer

# ----------------------------------------------------------------------------------------- settings

MICRO_BATCH = 128  # images of a forward pass, at most, where --micro-batch is not given
MICRO_TOKENS = 128 * 256  # tokens of a forward pass, at most: 32 images of 1,024
GIVE_UP = 50  # consecutive skipped steps that end a run
CONDITIONS = ("memory", "class", "none")  # what the network is shown: a snippet, a label
# settings that a prepared folder has decided, and those that a resumed run cannot change
PREPARED = ("image_size", "tokenizer", "latent_stats", "encoder", "rank", "flip")
NETWORK = ("model", "condition", "memory_scale", "memory_tokens", "align_depth")

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
    "decay": [0, 0],  # engine/train.py: the learning rate is constant
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


def make_parser():
    """The flags, with the defaults of the run on glyphs"""
    parser = argparse.ArgumentParser(description="Trains GMem.")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="glyphs", help="prepared folder, or images, for OUT/data")
    memory.add_data_flags(group, image_size=32)

    add = parser.add_argument_group("network").add_argument
    add("--model", choices=CONFIGS, metavar="NAME", default="SiT-T/16", help="%(choices)s")
    add("--condition", choices=CONDITIONS, default="memory", help="what the network is shown")
    add("--memory-scale", default="unit", help="factor on snippets; unit: mean 0, variance 1")
    add("--memory-tokens", action=flag, help="add the snippet to each token (by default in SiT-T)")
    add("--mask-ratio", type=float, default=0.4, help="fraction of a snippet masked in training")
    add("--zero-init", action=flag, default=True, help="adaLN and the last layer start at zero")
    add("--align-depth", type=int, default=4, help="the block that --align compares with DINOv2")
    add("--init", metavar="CKPT", help="begin with these weights (EMA), ours or official")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=1300, help="training steps in all; --decay scales with it")
    add("--batch-size", type=int, default=128, help="images of one step, over all processes")
    add("--micro-batch", type=int, help="images of a forward pass, at most (128 if not given)")
    add("--checkpointing", action=flag, default=False, help="recompute blocks: less memory, slower")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--beta2", type=float, default=0.95, help="decay rate of AdamW's second moments")
    add("--warmup", type=int, default=50, help="steps of linear warm-up of the learning rate")
    decay_help = "the learning rate falls to 0 from step A to B; 0 0: it does not"
    add("--decay", type=int, nargs=2, default=[750, 1300], metavar=("A", "B"), help=decay_help)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, which is scaled")
    add("--ema", type=float, default=0.9999, help="decay rate of the average of the weights (EMA)")
    add(
        "--ema-ramp", action=flag, default=True, help="EMA's rate is at most (1 + step)/(10 + step)"
    )
    add("--cond-drop-prob", type=float, default=0.1, help="fraction shown the null condition")
    add("--align", type=float, default=0.0, help="weight of REPA's loss; needs --encoder dinov2_*")
    add("--t-mean", type=float, default=-0.8, help="mean of the logit of t (official GMem: 0)")
    add("--t-std", type=float, default=0.8, help="its standard deviation (official GMem: 1)")
    add("--seed", type=int, default=0, help="seed of weights, order of images, noise and masks")

    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, default="glyphs", help="defaults of a known run")
    add("--out", default="out", help="folder of all that is written")
    add("--resume", action=flag, default=False, help="go on at OUT/ckpt.pt, if there is one")
    add("--save-every", type=int, default=325, help="steps between checkpoints; the last one stays")
    add("--keep-every", type=int, help="steps between EMA weights kept as OUT/ema-NNNNNNN.pt")
    preview_help = "with each checkpoint OUT/samples.png: bank's snippets above, new ones below"
    add("--preview", action=flag, default=True, help=preview_help)
    add("--log-every", type=int, default=50, help="steps between lines of OUT/log.jsonl")
    add("--device", help="cuda, mps or cpu; the best there is if not given")
    add("--dtype", choices=("bfloat16", "float32"), help="of the network; bfloat16 on CUDA")
    add("--compile", action=flag, help="compile the network by torch.compile; by default on CUDA")
    return parser


def read_settings():
    """-> args: the defaults, then the preset, the checkpoint, the prepared folder, then the flags;
    the checkpoint that the run goes on from, or None"""
    parser = make_parser()
    parser.set_defaults(**PRESETS[parser.parse_args().preset])
    args = parser.parse_args()
    path = f"{args.out}/ckpt.pt"
    checkpoint = None
    was = {}
    if os.path.exists(path) and not args.resume:
        raise InputError(f"{path} exists: --resume goes on with it, --out DIR begins elsewhere")
    if os.path.exists(path):
        checkpoint = load_file(path)
        for name, value in checkpoint["settings"].items():
            if name in args and name not in ("data", "out", "device", "resume"):
                was[name] = value
        moved = os.path.exists(f"{args.out}/data/meta.json")  # with the run
        data = f"{args.out}/data" if moved else checkpoint["settings"]["data"]
        parser.set_defaults(**was, data=data)
    elif args.resume:
        say(f"--resume: {path} does not exist, the run begins at step 0")

    args = parser.parse_args()
    steps = parser.get_default("steps")
    if args.steps != steps:  # the decay goes with the steps
        scaled = [step * args.steps // steps for step in parser.get_default("decay")]
        parser.set_defaults(decay=scaled)
    if os.path.exists(f"{args.data}/meta.json"):
        made = json.loads(Path(args.data, "meta.json").read_text())["settings"]
        made = {name: made[name] for name in PREPARED}
        parser.set_defaults(**made)
        asked = {name: getattr(parser.parse_args(), name) for name in PREPARED}
        memory.refuse_differences(made, asked, f"{args.data} was prepared")
    args = parser.parse_args()
    for name, value in was.items():
        now = getattr(args, name)
        if str(now) != str(value) and name in NETWORK:
            raise InputError(f"{path} is another network: its {name} is {value}, not {now}")
        if str(now) != str(value):
            say(f"resumed with {name} {now}, was {value}")
    return args, checkpoint


def say(text):
    if rank_world()[0] == 0:
        tqdm.write(text, file=sys.stderr)


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
        self.meta = json.loads(Path(folder, "meta.json").read_text())
        self.bank = memory.MemoryBank.load(f"{folder}/bank.pt")
        self.arrays = {"coef": self.bank.coef.numpy(), "scale": self.bank.scale.numpy()}
        names = ["latents", "labels"]
        if patches:
            # patches.pt: a basis fitted to a sample of the tokens; patches.npy: all, in that basis
            self.patch_bank = memory.MemoryBank.load(f"{folder}/patches.pt")
            names += ["patches", "patch_scales"]
        for name in names:
            self.arrays[name] = np.load(f"{folder}/{name}.npy", mmap_mode="r")
        self.stats = memory.stats_tensor(self.meta, device)

    def rows(self, start, size):
        """Row numbers at positions start .. start + size - 1; sorted, as these reads are faster."""
        N = len(self.bank)
        stop = start + size
        parts = []
        for epoch in range(start // N, -(-stop // N)):
            order = epoch_order(self.seed, epoch, N)
            parts.append(order[max(0, start - epoch * N) : stop - epoch * N])
        return np.sort(np.concatenate(parts))

    def read(self, start):
        rows = self.rows(start, self.size)
        # numpy only: torch in a second thread would take the cores from the first
        batch = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        if self.device.type == "cuda":
            batch = {name: part.pin_memory() for name, part in batch.items()}
        return batch

    def batches(self, args, first_step, indices):
        """Yields, for each step and each micro-batch in indices, x (B, C, h, w) as the network sees
        it, s (B, D), y (B,), patch tokens or None."""
        self.size = args.micro_batch
        starts = []
        for m in indices:
            starts.append(range(m * self.size, args.steps * args.batch_size, args.batch_size))
        starts = np.stack(starts, axis=1)[first_step:].flatten()
        for batch in memory.ahead(self.read, starts):
            batch = {name: part.to(self.device, non_blocking=True) for name, part in batch.items()}
            x = memory.normalize_latents(batch["latents"], self.stats)
            s = self.bank.decode(batch["coef"].float() * batch["scale"][:, None])
            targets = None
            if "patches" in batch:
                c = batch["patches"].float() * batch["patch_scales"][..., None]
                targets = self.patch_bank.decode(c)
            yield x, s, batch["labels"], targets


# ----------------------------------------------------------------------------------------- training


def learning_rate(step, args):
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    if b > 0:
        lr = lr * min(1, max(0, (b - step) / (b - a)))
    return lr


class Trainer:
    """The network, its EMA, its optimizer, and counters."""

    def __init__(self, args, model, meta, device):
        self.args = args
        self.meta = meta
        self.device = device
        self.dtype = args.dtype or memory.default_dtype(device)  # of the forward pass
        self.model = model.train().to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, args.lr, betas=(0.9, args.beta2), weight_decay=0, fused=True
        )
        self.step = 0
        self.skipped = 0  # steps without a finite loss and gradient
        self.consecutive_skips = 0
        self.losses = []  # of the finite steps since the last line of the log

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        # a copy: the optimizer would keep the file mapped, which is soon replaced
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.optimizer.param_groups[0]["betas"] = (0.9, self.args.beta2)
        self.step = checkpoint["step"]
        self.skipped = checkpoint["skipped"]

    def save(self, name="ckpt.pt", ema_only=False):
        """Writes OUT/name: what sample.py needs and, without ema_only, what --resume needs."""
        checkpoint = {
            "step": self.step,
            "ema": self.ema.state_dict(),
            "config": asdict(self.model.config),
            "meta": self.meta,
            "settings": vars(self.args),
        }
        if not ema_only:
            checkpoint["model"] = self.model.state_dict()
            checkpoint["optimizer"] = self.optimizer.state_dict()
            checkpoint["skipped"] = self.skipped
        with memory.atomic_write(f"{self.args.out}/{name}") as file:
            torch.save(checkpoint, file)

    @torch.no_grad()
    def update(self, loss):
        """One step by the gradients of the last backward pass -> gradient norm. Where the loss or
        the norm is not finite, on all processes, nothing changes."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.args)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.clip)
        if torch.isfinite(loss + norm):
            self.optimizer.step()
            decay = self.args.ema
            if self.args.ema_ramp:
                decay = min(decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, 1 - decay)
            self.losses.append(loss.item())
            self.consecutive_skips = 0
        else:
            self.skipped += 1
            self.consecutive_skips += 1
        self.optimizer.zero_grad()
        self.step += 1
        return norm

    def log(self, norm, seconds):
        """Appends a line about the steps since the last one, which took `seconds`, to log.jsonl."""
        line = {
            "step": self.step,
            "loss": round(float(np.mean(self.losses)), 5) if self.losses else None,
            "grad_norm": round(norm.item(), 5) if norm.isfinite() else None,
            "lr": learning_rate(self.step - 1, self.args),
            "seconds": round(seconds, 2),
            "skipped": self.skipped,
        }
        self.losses = []
        try:
            with open(f"{self.args.out}/log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as e:  # such as a full disk: the checkpoint matters more
            say(f"warning: the log cannot be written: {e}")
        return line


def trim_log(path, step):
    """Removes lines after a step: a run that was killed has logged more than it saved."""
    if os.path.exists(path):
        lines = Path(path).read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        Path(path).write_text("".join(kept))


def note_signals():
    """-> a list, empty until SIGTERM, SIGINT, SIGHUP or SIGUSR1 comes, then with its number. A
    signal that is ignored, as SIGHUP is under nohup, stays ignored."""
    signals = []
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has the first two
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def train(trainer, net, loader, accumulate, tokenizer):
    """The loop; net is trainer.model, compiled and distributed where that is wanted. Returns 0 at
    the end of the training, or the number of a signal, with everything saved."""
    args = trainer.args
    device = loader.device
    process, num_processes = rank_world()
    # process r computes the micro-batches r, r + num_processes, .. of every step
    indices = range(process, accumulate * num_processes, num_processes)
    batches = loader.batches(args, trainer.step, indices)
    signals = note_signals()
    bar = memory.progress(desc="training", total=args.steps, initial=trainer.step, unit="step")
    skipped = trainer.skipped
    stop = 0
    began = time.perf_counter()
    while trainer.step < args.steps and not stop:
        loss = torch.zeros((), device=device)
        for m in indices:
            x, s, y, targets = next(batches)
            torch.manual_seed(sample.mixed_seed(sample.TRAINING, args.seed, trainer.step, m))
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
        bar.update()

        signal_number = torch.tensor(signals[0] if signals else 0)
        memory.all_reduce(signal_number, dist.ReduceOp.MAX)
        stop = int(signal_number)
        last = stop or trainer.step == args.steps
        if process == 0 and (last or trainer.step % args.log_every == 0):
            line = trainer.log(norm, time.perf_counter() - began)
            bar.set_postfix(loss=line["loss"])
            if trainer.skipped > skipped:
                say(
                    f"warning: {trainer.skipped - skipped} steps without a finite loss were skipped"
                )
            skipped = trainer.skipped
            began = time.perf_counter()
        if trainer.consecutive_skips >= GIVE_UP:
            raise InputError(f"{GIVE_UP} steps without a finite loss: try a lower --lr")
        if process == 0 and (last or trainer.step % args.save_every == 0):
            trainer.save()
            if args.preview and not stop:
                preview(trainer, loader.bank, tokenizer)
        if process == 0 and args.keep_every and trainer.step % args.keep_every == 0:
            trainer.save(f"ema-{trainer.step:07d}.pt", ema_only=True)
    bar.close()
    return stop


def preview(trainer, bank, tokenizer):
    """Writes samples.png, by the EMA weights, always of the same noise and snippets: 32 images of
    the bank's snippets, below them 32 of new snippets around these."""
    config = trainer.model.config
    ids = range(64)
    s = None
    y = None
    try:
        if config.memory_dim:
            rows = sample.draw_rows(range(32), 0, len(bank))
            s = torch.cat([bank[rows], sample.new_snippets(bank, rows, range(32))])
        if config.num_classes:
            y = sample.draw_rows(ids, 0, config.num_classes)
        x = sample.generate(trainer.ema, ids, s, y, dtype=trainer.dtype)
        images = sample.decode(x, trainer.meta, tokenizer)  # uint8 (64, H, W, 3)
        for name in (f"samples-{trainer.step:07d}.png", "samples.png"):
            sample.save_images(images, f"{trainer.args.out}/{name}")
    except Exception as e:  # noqa: BLE001 - whatever it is, the training goes on
        say(f"warning: no preview: {type(e).__name__}: {e}")


# ------------------------------------------------------------------------------- a run, step by step


def new_model(args, loader):
    """-> the network of a new run on these data, with random weights or those of --init"""
    initial = None if args.init is None else load_sit(args.init)
    settings = dict(CONFIGS[args.model]) if initial is None else asdict(initial.config)
    in_channels, input_size, _ = loader.meta["latent"]
    settings.update(input_size=input_size, in_channels=in_channels, mask_ratio=args.mask_ratio)
    has_memory = args.condition == "memory"
    settings.update(zero_init=args.zero_init, memory_dim=0, num_classes=0, align_dim=0)
    if args.memory_tokens is not None:
        settings["memory_tokens"] = args.memory_tokens
    if has_memory:
        settings["memory_dim"] = loader.bank.dim
    if args.condition == "class":
        settings["num_classes"] = len(loader.meta["classes"])
        if not loader.meta["classes"]:
            raise InputError(f"{args.data} has no labels (class sub-folders) for --condition class")
    if args.align > 0:
        settings.update(align_dim=loader.patch_bank.dim, align_depth=args.align_depth)
    # --init goes on with the centring and scale of snippets that it was trained on
    keep_scale = initial is not None and initial.config.memory_dim > 0
    settings["memory_center"] = has_memory and args.memory_scale == "unit"
    if keep_scale:
        settings["memory_center"] = has_memory and initial.config.memory_center
    elif args.memory_scale != "unit":
        settings["memory_scale"] = float(args.memory_scale)

    torch.manual_seed(args.seed)
    model = SiT(SiTConfig(**settings))
    if settings["memory_center"] and not keep_scale:
        model.standardize_snippets(loader.bank)
    if initial is not None:
        copy_weights(initial.state_dict(), model)
    return model


def copy_weights(weights, model):
    """Weights of --init. What they lack, and a label table of another size, is left random."""
    table = "y_embedder.embedding_table.weight"
    own = model.state_dict()
    if table in weights and table in own and weights[table].shape != own[table].shape:
        del weights[table]
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as e:
        raise InputError(f"--init has another network: {str(e).splitlines()[-1].strip()}") from e
    if missing:
        say(f"not in --init, drawn anew: {', '.join(missing)}")


def micro_batch_size(args, config):
    """The largest divisor of a process's share of the batch within the limits"""
    num_processes = rank_world()[1]
    tokens = (config.input_size // config.patch_size) ** 2
    most = args.micro_batch or max(1, min(MICRO_BATCH, MICRO_TOKENS // tokens))
    share = args.batch_size // num_processes
    if share == 0 or share * num_processes != args.batch_size:
        raise InputError(f"--batch-size {args.batch_size}: {num_processes} does not divide it")
    return max(size for size in range(1, most + 1) if share % size == 0)


def wrapped(model, args, device):
    """The model, compiled and distributed where that is wanted."""
    compiled = device.type == "cuda" if args.compile is None else args.compile
    net = torch.compile(model) if compiled else model
    if rank_world()[1] > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # large buckets, as torch.compile cuts the network at each one
        net = DDP(net, device_ids, gradient_as_bucket_view=True, bucket_cap_mb=200)
        net.broadcast_buffers = False  # ours are constants
    return net


def put_bank(folder, out):
    """OUT/bank.pt, which sample.py takes: a hard link to the bank of the data, or a copy."""
    if os.path.realpath(folder) == os.path.realpath(out):
        return
    Path(out, "bank.pt").unlink(missing_ok=True)
    try:
        os.link(f"{folder}/bank.pt", f"{out}/bank.pt")
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(f"{folder}/bank.pt", f"{out}/bank.pt")


def introduce(trainer, loader, accumulate):
    """Prints what is trained, on what."""
    args = trainer.args
    made = ", ".join(f"{name} {getattr(args, name)}" for name in PREPARED)
    classes = len(loader.meta["classes"])
    print(f"data: {loader.folder}, {loader.meta['images']:,} images, {classes} classes, {made}")
    print(f"bank: {loader.bank}")
    print(
        f"model: {args.init or args.model}, {sum(p.numel() for p in trainer.parameters):,} parameters"
    )
    batch = f"{rank_world()[1]} processes x {accumulate} micro-batches of {args.micro_batch}"
    print(f"batch: {args.batch_size} = {batch}, on {loader.device}; from step {trainer.step:,}")


def main():
    device = memory.init_distributed(make_parser().parse_args().device)
    args, checkpoint = read_settings()
    process, num_processes = rank_world()
    if process == 0:
        lock = memory.lock_folder(args.out)  # noqa: F841 - held as long as this process runs
    folder = args.data
    if not os.path.exists(f"{folder}/meta.json"):
        folder = f"{args.out}/data"
        options = {name: getattr(args, name) for name in (*PREPARED, "skip_bad")}
        memory.prepare(args.data, folder, device, patches=args.align > 0, **options)
    loader = Loader(folder, args.seed, device, patches=args.align > 0)
    args.data = os.path.abspath(folder)

    if checkpoint is None:
        trainer = Trainer(args, new_model(args, loader), loader.meta, device)
    else:
        for key in ("bank", "images", "latent", "mean", "std"):
            if loader.meta[key] != checkpoint["meta"][key]:
                raise InputError(f"{folder} is not what the run was begun with: another {key}")
        config = SiTConfig(**{**checkpoint["config"], "mask_ratio": args.mask_ratio})
        if args.align > 0 and config.align_dim == 0:
            raise InputError("--align: the run was begun without, and has no projector")
        trainer = Trainer(args, SiT(config), loader.meta, device)
        trainer.load(checkpoint)
        checkpoint = None  # frees memory
    trainer.model.checkpointing = args.checkpointing
    args.micro_batch = micro_batch_size(args, trainer.model.config)
    accumulate = args.batch_size // num_processes // args.micro_batch
    tokenizer = None
    if process == 0:
        put_bank(folder, args.out)
        trim_log(f"{args.out}/log.jsonl", trainer.step)
        introduce(trainer, loader, accumulate)
        tokenizer = load_tokenizer(args.tokenizer, device) if args.preview else None
    torch.set_float32_matmul_precision("high")
    try:
        net = wrapped(trainer.model, args, device)
        stopped_by = train(trainer, net, loader, accumulate, tokenizer)
    except torch.OutOfMemoryError as e:
        images = f"--micro-batch {args.micro_batch}"
        raise InputError(f"{device}: no memory for {images}: less, or --checkpointing") from e
    say(f"{args.out}/ckpt.pt holds step {trainer.step:,}")
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    memory.cli(main)
