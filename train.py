"""Trains GMem (arXiv 2412.08781): a flow-matching transformer that is shown each image's masked snippet.

    python train.py                                        # the embedded glyphs: out/samples.png in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py ...

Writes OUT/ckpt.pt, samples.png (by the EMA weights) and log.jsonl; --resume goes on where OUT/ckpt.pt ends. A
signal (Ctrl-C, SIGTERM) saves first. A step whose loss or gradient is not finite changes no weight.
Randomness belongs to the micro-batch, (seed, step, index), never to the process: 1 process that accumulates 8
micro-batches and 8 processes with one each take the same steps, up to the rounding of sums."""
import argparse
import copy
import importlib.util
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from memory import (MemoryBank, Parser, best_device, cli, data_flags, fraction, init_distributed, load_array,
                    load_tokenizer, positive, prepare, rank_world, read_json, replacing, together, within)
from model import CONFIGS, SiT, SiTConfig, flow_loss
from sample import decode, generate, load_checkpoint, save_images, seed_of

# ----------------------------------------------------------------------------- settings

OFFICIAL = dict(data="data/imagenet256", image_size=256, tokenizer="vavae-f16d32", encoder="dinov2_vitb14",
                flip=True, model="LightningDiT-XL/1", steps=200_000, batch_size=1024, lr=2e-4, warmup=1000,
                decay=None, save_every=2500, log_every=100, align=0.5, scale=1.0)
PRESETS = {  # imagenet256: configs/gmem_sde_{b,xl}.yaml of the official GMem, but for its bank of full rank
    "glyphs": dict(data="glyphs", image_size=32, model="SiT-T/16", steps=1300, batch_size=128, lr=1e-3,
                   warmup=50, decay=(750, 1300), save_every=325, log_every=50),
    "imagenet256-b": dict(OFFICIAL, model="LightningDiT-B/1", steps=80_000, save_every=20_000),
    "imagenet256-xl": OFFICIAL,
    "imagenet512-xl": dict(OFFICIAL, data="data/imagenet512", image_size=512)}
FIXED = "preset image_size model condition batch_size seed mask scale memory_tokens align".split()  # resumed
GIVE_UP = 50  # skipped steps in a row that end a run
MICRO = 128   # images of one forward pass, at most, where nothing else is asked for

def arguments():
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=PRESETS, default="glyphs", help=" ")
    parser = Parser(description="Trains GMem; --preset gives the defaults of the rest.", allow_abbrev=False,
                    parents=[first], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", help="a prepared folder, or what memory.py takes; that is prepared first, into OUT/data")
    add("--out", default="out", help="folder of everything that is written")
    data_flags(add)
    add("--model", help=f"one of {', '.join(CONFIGS)}")
    add("--condition", choices=("memory", "class", "none"), default="memory", help="class, none: plain SiT")
    add("--scale", type=within(0, kind=float), help="of the snippets (None: centred, of norm sqrt(D))")
    add("--memory-tokens", action=argparse.BooleanOptionalAction,
        help="the snippet enters at each token, too (None: in SiT-T)")
    add("--mask", type=fraction, default=0.4, help="part of the snippet's entries set to zero")
    add("--align", type=within(0, kind=float), default=0.0, help="weight of REPA's loss; needs patches.pt")
    add("--drop", type=fraction, default=0.1, help="part of the images shown with the null condition")
    add("--steps", type=positive, help="in all, resumed ones included")
    add("--batch-size", type=positive, help="of all processes together")
    add("--micro-batch", type=positive, help=f"of one forward pass (None: the most to {MICRO})")
    add("--lr", type=within(0, kind=float), help="of AdamW")
    add("--warmup", type=within(0), help="steps of linear warm-up")
    add("--decay", type=within(0), nargs=2, metavar=("A", "B"), help="where --lr falls to 0 (0 0: nowhere)")
    add("--clip", type=within(0, kind=float), default=1.0, help="largest gradient norm")
    add("--ema", type=fraction, default=0.9999, help="at most; the ramp is (1 + step) / (10 + step)")
    add("--seed", type=within(0), default=0, help="of weights, order, noise, masks")
    add("--resume", action="store_true", help="go on in --out")
    add("--save-every", type=positive, help="steps between checkpoints")
    add("--preview-every", type=within(0), help="steps between grids (None: as --save-every; 0: none)")
    add("--log-every", type=positive, help="steps between lines of log.jsonl")
    add("--tensorboard", action="store_true", help="write OUT/tensorboard too")
    add("--device", help="cuda, mps or cpu (None: the best there is)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the forward pass (None: bfloat16 on CUDA)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(None: on CUDA)")
    # what counts: flags, then (with --resume) those of the checkpoint, then the preset
    parser.set_defaults(**PRESETS[first.parse_known_args()[0].preset])
    args, ckpt = parser.parse_args(), None
    path = os.path.join(args.out, "ckpt.pt")
    if args.resume:
        ckpt = load_checkpoint(path)
        was = ckpt["args"]
        parser.set_defaults(**{k: v for k, v in was.items() if k not in ("out", "device")})
        args = parser.parse_args()
        differ = [f"--{k.replace('_', '-')} {getattr(args, k)}, not {was[k]}" for k in FIXED
                  if getattr(args, k) != was[k]]
        if differ:
            raise ValueError(f"{path} cannot go on with {', '.join(differ)}: drop it, or name another --out")
    elif os.path.exists(path):
        raise ValueError(f"{path} exists: --resume goes on with it, --out DIR starts a run elsewhere")
    if args.model not in CONFIGS:
        raise ValueError(f"unknown model {args.model}; known: {', '.join(CONFIGS)}")
    if args.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise ValueError("--tensorboard needs a package: pip install tensorboard")
    if args.memory_tokens is None:
        args.memory_tokens = CONFIGS[args.model].get("memory_tokens", False)
    args.preview_every = args.save_every if args.preview_every is None else args.preview_every
    a, b = args.decay = args.decay or (0, 0)
    if b > 0 and (a >= b or b < args.steps):
        raise ValueError(f"the learning rate falls to 0 from step {a} to {b}, but --steps is {args.steps}: "
                         "give --decay A B with A < B and B >= --steps, or 0 0")
    return args, ckpt

# ----------------------------------------------------------------------------- data

class Data:
    """Poor man's loader: memory maps, one gather per batch, and a thread that is one batch ahead."""
    def __init__(self, folder, seed, device, patches=False):
        self.device, path = device, lambda name: os.path.join(folder, name)
        self.meta, self.bank = read_json(path("meta.json")), MemoryBank.load(path("bank.pt"))
        self.latents, labels = load_array(path("latents.npy")), load_array(path("labels.npy"))
        if self.bank.id != self.meta["bank"] or not len(self.latents) == len(labels) == len(self.bank):
            raise ValueError(f"{folder}: latents, labels and bank are not those of one preparation")
        self.sources, N = [self.latents, self.bank.coef, labels], len(self.latents)
        if patches:
            self.patches = MemoryBank.load(path("patches.pt"))
            self.sources.append(self.patches.coef.reshape(N, -1, self.patches.rank))
        self.mean, self.std = (torch.tensor(self.meta[k]).to(device)[:, None, None] for k in ("mean", "std"))
        self.order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(N))

    def rows(self, a, b):
        """positions a .. b-1 of the endless stream of epochs -> row numbers"""
        N = len(self.latents)
        parts = [self.order(e)[max(0, a - e * N):b - e * N] for e in range(a // N, -(-b // N))]
        return np.sort(np.concatenate(parts))  # the order within a batch is free, and sorted reads are fast

    def read(self, a, b):
        i = self.rows(a, b)  # numpy only: OpenMP in a second thread would take the cores from the first
        batch = [torch.from_numpy(np.asarray(v[i])) for v in self.sources]
        return [v.pin_memory() for v in batch] if self.device.type == "cuda" else batch

    def batches(self, positions):
        """Yields x (B, C, h, w) normalised, s (B, D), y (B,), with patches (B, T, D) too, on the device."""
        thread = ThreadPoolExecutor(1)
        reads = (thread.submit(self.read, a, b) for a, b in positions)
        now = next(reads)
        for ahead in chain(reads, [None]):  # is under way while this one is used
            x, s, y, *patches = (v.to(self.device, non_blocking=True) for v in now.result())
            patches = [self.patches.unpack(c.flatten(0, 1)).unflatten(0, c.shape[:2]) for c in patches]
            yield (x.float() - self.mean) / self.std, self.bank.unpack(s), y, *patches
            now = ahead

# ----------------------------------------------------------------------------- training

def learning_rate(step, args):
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    return lr * min(1, max(0, (b - step) / (b - a))) if b else lr

def note_signals():
    """-> a list of the times at which SIGTERM and SIGINT come. A second one ends the process, but not within
    2 s: that is torchrun passing on what a scheduler has sent to all processes."""
    times = []
    def note(number, frame):
        times.append(time.time())
        if times[-1] - times[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return times

def open_log(path, step):
    """-> the file, without what a run that was cut off has logged after its last checkpoint, at `step`"""
    log = open(path, "a+", buffering=1)
    log.seek(0)
    kept = [line for line in log if line.endswith("\n") and json.loads(line)["step"] <= step]
    log.truncate(sum(map(len, kept)))
    return log

def split(batch_size, micro_batch, world):
    """-> micro-batch size, micro-batches of each process"""
    if batch_size % world:
        less = batch_size // world * world
        raise ValueError(f"--batch-size {batch_size} does not divide among {world} processes; "
                         f"{less or world} or {less + world} would")
    share = batch_size // world
    micro = micro_batch or max(k for k in range(1, MICRO + 1) if share % k == 0)
    if share % micro:
        fits = ", ".join(str(k) for k in range(1, share + 1) if share % k == 0)
        raise ValueError(f"--micro-batch {micro} does not divide {share}, the share of one of {world} "
                         f"processes in the batch; {fits} would")
    return micro, share // micro

def ideal_speed(model, device, n=8192):
    """-> images per second, if all of a step ran at the measured rate of a matrix product; for an image it
    takes 6 operations per weight and token, and 12 T^2 h per block for attention"""
    from torch.utils.benchmark import Timer  # looks for compilers, which it may warn of, as it is imported
    T = (model.config.input_size // model.config.patch_size) ** 2
    weights = sum(p.numel() for b in model.blocks for m in (b.attn, b.mlp) for p in m.parameters())
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    rate = 2 * n ** 3 / Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=0.5).median
    return rate / (6 * T * weights + 12 * model.config.depth * model.config.hidden_size * T ** 2)

def main():
    args, ckpt = arguments()
    device = best_device(args.device)
    init_distributed(device)
    me, world = rank_world()
    say = print if me == 0 else lambda *a: None
    cuda = device.type == "cuda"
    args.micro_batch, accumulate = split(args.batch_size, args.micro_batch, world)

    # data and bank
    folder, patch, S = args.data, CONFIGS[args.model]["patch_size"], args.image_size
    if not os.path.exists(os.path.join(folder, "meta.json")):
        folder = os.path.join(args.out, "data")
        if args.tokenizer == "pixel" and S % patch:
            raise ValueError(f"--image-size {S} is no multiple of {patch}, {args.model}'s patch")
        if not (ckpt and ckpt["args"]["data"] == args.data and os.path.exists(f"{folder}/meta.json")):
            prepare(args.data, folder, S, args.tokenizer, args.encoder, args.rank, flip=args.flip,
                    patches=args.align > 0, stats=args.latent_stats, skip_bad=args.skip_bad, device=device)
    data = Data(folder, args.seed, device, args.align > 0)
    meta, bank, N = data.meta, data.bank, len(data.latents)
    made, classes, (C, side, _) = meta["settings"], len(meta["classes"]), meta["latent"]
    tokenizer, tokens = load_tokenizer(made["tokenizer"], device), (side // patch) ** 2
    said = {arg.split("=")[0].removeprefix("--no-").strip("-").replace("-", "_") for arg in sys.argv}
    for k in ("image_size", "tokenizer", "encoder", "rank", "flip"):
        v = getattr(args, k)
        if k in said and made[k] not in (v, os.path.abspath(str(v))):
            raise ValueError(f"{folder} was prepared with {k} {made[k]}, not {v}")
        setattr(args, k, made[k])
    say(f"data: {N:,} of {meta['latent']}, {classes} classes, in {folder} "
        f"({', '.join(f'{k} {v}' for k, v in made.items())})\nbank: {bank}")
    if args.condition == "class" and not classes:
        raise ValueError(f"{args.data} has no labels (class sub-folders) for --condition class")
    if args.align and (have := len(data.patches) / N) != tokens:
        raise ValueError(f"--align: {args.model} expects {tokens} patch tokens of an image, {folder} has "
                         f"{have:g}")

    # model, begun or resumed
    some = bank[np.linspace(0, len(bank) - 1, min(len(bank), 10_000)).astype(int)]
    spread = (some - some.mean(0)).square().mean().sqrt().clamp_min(1e-6).item()
    config = SiTConfig(**ckpt["config"]) if ckpt else SiTConfig(
        **CONFIGS[args.model] | dict(memory_tokens=args.memory_tokens), input_size=side, in_channels=C,
        mask_ratio=args.mask, align_dim=data.patches.dim if args.align else 0,
        memory_dim=bank.dim if args.condition == "memory" else 0, memory_scale=args.scale or 1 / spread,
        memory_center=args.condition == "memory" and not args.scale,
        num_classes=classes if args.condition == "class" else 0)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = SiT(config).to(device)
    if config.memory_center:
        model.memory_mean.copy_(some.mean(0))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True)
    skipped, total, good, row, zero = torch.zeros(5, device=device)  # row: skipped of late
    start, counted = 0, 0
    if ckpt:
        if ckpt["meta"] != meta:
            differ = [f"{k} {meta[k]}, not {v}" for k, v in ckpt["meta"].items() if meta[k] != v]
            raise ValueError(f"--data {folder} is not what the run was begun with: {'; '.join(differ)}")
        if (was := ckpt["args"]["micro_batch"]) != args.micro_batch:
            say(f"micro-batch {args.micro_batch}, was {was}: other noise from now on")
        for part, name in (model, "model"), (ema, "ema"), (optimizer, "optimizer"):
            part.load_state_dict(ckpt[name])
        start, skipped = ckpt["step"], skipped + ckpt["skipped"]
        say(f"resuming {args.out} at step {start:,}")
        if start >= args.steps:
            return say(f"nothing to do: --steps {args.steps:,} in all; give more to go on")
    ckpt = None  # free the memory
    count = sum(p.numel() for p in parameters)
    say(f"model: {args.model}, {count:,} parameters, condition {args.condition}, on {device}\n"
        f"batch: {args.batch_size} = {world} processes x {accumulate} micro-batches of {args.micro_batch}")
    net = torch.compile(model) if (cuda if args.compile is None else args.compile) else model
    if world > 1:
        net = DDP(net, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True,
                  bucket_cap_mb=200)  # torch.compile cuts the network at each bucket
        net.broadcast_buffers = False  # they are constants; as an argument it warns, from torch 2.13 on
    half = args.dtype == "bfloat16" or (args.dtype is None and cuda)
    peak = ideal_speed(model, device) * world if cuda else None

    def save(step):
        where = os.path.relpath(os.path.realpath(folder), os.path.realpath(args.out))  # from the checkpoint
        where = folder if folder == args.data and os.path.isabs(folder) else where
        state = dict(step=step, model=model.state_dict(), ema=ema.state_dict(), skipped=int(skipped),
                     optimizer=optimizer.state_dict(), config=asdict(config), meta=meta, args=vars(args),
                     bank=dict(path=os.path.join(where, "bank.pt"), id=bank.id))
        with replacing(os.path.join(args.out, "ckpt.pt")) as tmp:
            torch.save(state, tmp)

    def preview(step):
        images = decode(generate(ema, range(64), bank), meta, tokenizer)
        for name in (f"samples-{step:07d}.png", "samples.png"):
            save_images(images, os.path.join(args.out, name))

    # the loop; rank r computes the micro-batches m = r, r + world, .. of every step
    B, size, todo = args.batch_size, args.micro_batch, range(me, accumulate * world, world)
    begins = (step * B + m * size for step in range(start, args.steps) for m in todo)
    batches = data.batches((a, a + size) for a in begins)
    stop, writer = note_signals(), None
    if me == 0:
        os.makedirs(args.out, exist_ok=True)
        log = open_log(os.path.join(args.out, "log.jsonl"), start)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(os.path.join(args.out, "tensorboard"), purge_step=start + 1)
    bar = tqdm(range(start, args.steps), "training", args.steps, initial=start, unit="step", disable=me > 0)
    t0 = time.time()
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, args)
        if cuda and step == start + 1:  # the first has compiled
            torch.cuda.synchronize()
            t0, counted = time.time(), 0
        loss = zero.clone()
        for m in todo:
            x, s, y, *patches = next(batches)
            torch.manual_seed(seed_of(0, args.seed, step, m))
            with net.no_sync() if world > 1 and m != todo[-1] else nullcontext():
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    part = flow_loss(net, x, s, y, args.drop, False, *patches, align=args.align) / accumulate
                part.backward()
            loss += part.detach()
        together("all_reduce", loss)
        loss /= world
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        bad = ~torch.isfinite(loss + norm)     # the same on all processes
        optimizer.found_inf = bad.float()      # then the fused AdamW changes nothing
        optimizer.step()
        optimizer.zero_grad()
        keep = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in parameters], 1 - keep)
        skipped, row, counted = skipped + bad, (row + 1) * bad, counted + 1
        total, good = total + loss.nan_to_num(0, 0, 0) * ~bad, good + ~bad
        stopping = torch.tensor(float(bool(stop)))
        together("all_reduce", stopping)  # on the CPU: the GPU is not waited for
        last = step + 1 == args.steps or stopping > 0
        due = lambda every: every and (last or (step + 1) % every == 0)
        if due(args.log_every):
            loss, norm = (round(v.item(), 5) if v.isfinite() else None for v in (total / good, norm))
            seconds = time.time() - t0
            line = dict(step=step + 1, loss=loss, grad_norm=norm, lr=lr, seconds=round(seconds, 2),
                        images_per_s=round(B * counted / seconds, 1), skipped=int(skipped))
            if peak:  # model FLOPs utilisation, against the measured rate
                line["mfu"] = round(line["images_per_s"] / peak, 3)
            if me == 0:
                log.write(json.dumps(line) + "\n")
                bar.set_postfix({k: line[k] for k in ("loss", "images_per_s", "mfu") if k in line})
            for k, v in line.items() if writer else ():
                if v is not None:
                    writer.add_scalar(k, v, step + 1)
            total, good, counted, t0 = zero, zero, 0, time.time()
            if row >= GIVE_UP:
                sys.exit(f"train.py: error: no finite loss or gradient in {int(row)} steps, to {step + 1:,}; "
                         f"what {args.out}/ckpt.pt holds is kept; a lower --lr may help")
        began = time.time()
        if me == 0 and due(args.save_every):
            save(step + 1)
        if me == 0 and due(args.preview_every) and not stopping:
            preview(step + 1)
        t0 += time.time() - began  # not the training's
        if stopping:
            break
    say(f"{args.out}/ckpt.pt holds step {step + 1:,}" + (": stopped by a signal" if stopping else ""))

if __name__ == "__main__":
    cli(main)
