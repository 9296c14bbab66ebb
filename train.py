r"""Trains GMem (arXiv 2412.08781): a flow-matching transformer, shown each image's masked snippet.

    python train.py                                        # the embedded glyphs, in minutes
    python train.py --data FOLDER --image-size 32 --out o  # any folder of images, prepared first
    python train.py --data FOLDER --init o/ckpt.pt --out p # fine-tuning: a new bank, step 0
    torchrun --nproc_per_node=8 train.py --preset imagenet256-xl --data data/imagenet256 --out xl
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py \
        --data PREPARED        # prepared first, on one node; PREPARED and OUT on a shared disk

One run per OUT. It holds ckpt.pt and bank.pt, which sample.py reads, log.jsonl and samples.png. On
SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 the run is saved, and ends with exit code 128 + number.

Random numbers depend on (seed, step, index of the micro-batch), not on the process: 1 process with
8 micro-batches and 8 processes with 1 each take the same steps, up to rounding.
"""

import argparse
import copy
import json
import os
import signal
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import memory
import sample
from memory import InputError, num_processes, process_rank
from model import CONFIGS, SiT, SiTConfig, flow_loss, load_file, load_sit, load_tokenizer

MICRO_BATCH = 128  # images of a forward pass, at most, where --micro-batch is not given
MICRO_TOKENS = 128 * 256  # tokens of a forward pass, at most: 32 images of 1,024
GIVE_UP = 50  # consecutive skipped steps that end a run
# settings of a prepared folder, and settings that define a network: a resumed run keeps both
PREPARED = ("image_size", "tokenizer", "latent_stats", "encoder", "rank", "flip")
NETWORK = ("preset", "model", "condition", "memory_scale", "memory_tokens", "align_depth")

# The preset imagenet256-xl, from which the others differ. Sources are files of the official GMem;
# "yaml" is its configs/gmem_sde_xl.yaml. Some defaults of the flags are official too: mask_ratio,
# align_depth (models/lightningdit.py), beta2, clip (yaml) and ema (engine/train.py: update_ema).
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
# no warm-up, no ramp of the EMA, each image with its condition: engine/train.py
BARE = {"warmup": 0, "ema_ramp": False, "cond_drop_prob": 0.0}
PRESETS = {
    "glyphs": {},
    # imagenet256-b: configs/gmem_sde_b.yaml; imagenet512-xl: README, 400 epochs
    "imagenet256-b": {**IMAGENET, "model": "LightningDiT-B/1", "steps": 80000, "save_every": 20000},
    "imagenet256-xl": IMAGENET,
    "imagenet512-xl": {**IMAGENET, "data": "data/imagenet512", "image_size": 512, "steps": 500_000},
    "official-xl": {
        **IMAGENET,
        **BARE,
        "data": "data/imagenet256-exact",  # by memory.py --rank full --dtype float32
        "rank": "full",  # datasets/img_latent_dataset.py: the class tokens themselves
        "zero_init": False,  # models/lightningdit.py: initialize_weights
    },
    "sit-xl": {  # GMem on SiT-XL/2; numbers marked SiT are of train.py of willisma/SiT
        **IMAGENET,
        **BARE,
        "data": "data/imagenet256-sd",
        "tokenizer": "sd-vae-ft-ema",  # SiT
        "model": "SiT-XL/2",
        "steps": 140_000,  # paper: 28 epochs
        "batch_size": 256,  # SiT
        "lr": 1e-4,  # SiT
        "beta2": 0.999,  # SiT
        "cond_drop_prob": 0.1,  # SiT, models.py: class_dropout_prob
        "align": 0.0,  # SiT; loss and times stay those of GMem (SiT: uniform times, no cosine)
    },
}


def make_parser():
    """The flags, with the defaults of the run on glyphs"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="glyphs", help="folder of images, or made by memory.py")
    memory.add_data_flags(group, image_size=32)

    add = parser.add_argument_group("network").add_argument
    add("--model", choices=CONFIGS, metavar="NAME", default="SiT-T/16", help="%(choices)s")
    add("--condition", choices=("memory", "class", "none"), default="memory", help="what is shown")
    add("--memory-scale", default="standard", help="factor on snippets; standard: variance 1")
    add("--memory-tokens", action=flag, help="add the snippet to each token (by default in SiT-T)")
    add("--mask-ratio", type=float, default=0.4, help="fraction of a snippet masked in training")
    add("--zero-init", action=flag, default=True, help="adaLN and the last layer start at zero")
    add("--align-depth", type=int, default=4, help="the block that --align compares with DINOv2")
    add("--init", metavar="CKPT", help="begin with its EMA weights, network and scale of snippets")

    add = parser.add_argument_group("optimisation").add_argument
    add("--steps", type=int, default=1300, help="training steps in all; --decay scales with it")
    add("--batch-size", type=int, default=128, help="images of one step, over all processes")
    add("--micro-batch", type=int, help="images of a forward pass, at most; chosen if not given")
    add("--checkpointing", action=flag, default=False, help="recompute blocks: less memory, slower")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    add("--beta2", type=float, default=0.95, help="decay rate of AdamW's second moments")
    add("--warmup", type=int, default=50, help="steps of linear warm-up of the learning rate")
    decay = {"type": int, "nargs": 2, "metavar": ("A", "B"), "default": [750, 1300]}
    add("--decay", **decay, help="the learning rate falls to 0 from step A to B; 0 0: it does not")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--ema", type=float, default=0.9999, help="decay rate of the average of the weights (EMA)")
    add("--ema-ramp", action=flag, default=True, help="--ema is at most (1 + step)/(10 + step)")
    add("--cond-drop-prob", type=float, default=0.1, help="fraction without snippet or label")
    add("--align", type=float, default=0.0, help="weight of REPA's loss; needs --encoder dinov2_*")
    add("--t-mean", type=float, default=-0.8, help="mean of the logit of t (official GMem: 0)")
    add("--t-std", type=float, default=0.8, help="deviation of the logit of t (official GMem: 1)")
    add("--seed", type=int, default=0, help="seed of weights, order of images, noise and masks")

    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=PRESETS, default="glyphs", help="defaults of a known run")
    add("--out", default="out", help="folder of all that is written")
    add("--resume", action=flag, default=False, help="go on at OUT/ckpt.pt, if there is one")
    add("--save-every", type=int, default=325, help="steps between writes of OUT/ckpt.pt")
    add("--keep-every", type=int, help="steps between EMA weights kept as OUT/ema-NNNNNNN.pt")
    add("--preview", action=flag, default=True, help="OUT/samples.png: bank above, --new below")
    add("--log-every", type=int, default=50, help="steps between lines of OUT/log.jsonl")
    add("--device", help="cuda, mps or cpu; the best there is if not given")
    add("--dtype", choices=("bfloat16", "float32"), help="dtype of the network; bfloat16 on CUDA")
    add("--compile", action=flag, help="compile the network by torch.compile; by default on CUDA")
    return parser


def read_settings():
    """-> args, the checkpoint or None. Later wins: preset, checkpoint, prepared folder, flags.
    InputError where a flag contradicts the folder, or the network of the checkpoint."""
    parser = make_parser()

    def parse(defaults):
        """-> the flags over these defaults, which replace earlier ones"""
        parser.set_defaults(**defaults)
        return parser.parse_args()

    args = parse({})
    args = parse(PRESETS[args.preset])
    path = f"{args.out}/ckpt.pt"
    checkpoint = None
    resumed = {}  # settings that are taken over from the checkpoint
    if os.path.exists(path):
        if not args.resume:
            raise InputError(f"{path} exists: --resume goes on with it, --out DIR begins elsewhere")
        checkpoint = load_file(path)
        saved = checkpoint["settings"]
        per_command = ("data", "out", "device", "resume")
        resumed = {name: saved[name] for name in saved if name in args and name not in per_command}
        own = f"{args.out}/data"  # goes before the saved path: OUT may have moved
        data = own if os.path.exists(f"{own}/meta.json") else saved["data"]
        args = parse({**resumed, "data": data})
    elif args.resume:
        say(f"--resume: {path} does not exist, the run begins at step 0")

    default_steps = parser.get_default("steps")  # the preset's or checkpoint's, as decay
    decay = [step * args.steps // default_steps for step in parser.get_default("decay")]
    args = parse({"decay": decay})
    if os.path.exists(f"{args.data}/meta.json"):
        prepared = json.loads(Path(args.data, "meta.json").read_text())["settings"]
        prepared = {name: prepared[name] for name in PREPARED}
        args = parse(prepared)
        memory.refuse_differences(prepared, vars(args), f"{args.data} was prepared")
    for name, value in resumed.items():
        now = getattr(args, name)
        if str(now) != str(value):
            if name in NETWORK:
                raise InputError(f"{path} is another network: its {name} is {value}, not {now}")
            say(f"resumed with {name} {now}, was {value}")
    return args, checkpoint


def say(text):
    if process_rank() == 0:
        tqdm.write(text, file=sys.stderr)


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, N):
    return np.random.default_rng([seed, epoch]).permutation(N)


class Loader:
    """Batches from memory maps: one gather each, in a thread that is one batch ahead."""

    def __init__(self, folder, seed, device, patches=False):
        self.seed = seed
        self.device = device
        self.meta = json.loads(Path(folder, "meta.json").read_text())
        self.bank = memory.MemoryBank.load(f"{folder}/bank.pt")
        self.arrays = {"coef": self.bank.coef.numpy(), "scale": self.bank.scale.numpy()}
        names = ["latents", "labels"]
        if patches:
            # patches.pt holds the basis, patches.npy the coefficients of all patch tokens
            self.patch_bank = memory.MemoryBank.load(f"{folder}/patches.pt")
            names += ["patches", "patch_scales"]
        for name in names:
            self.arrays[name] = np.load(f"{folder}/{name}.npy", mmap_mode="r")
        self.stats = memory.stats_tensor(self.meta, device)

    def rows(self, start, size):
        """Row numbers at positions start .. start + size - 1; sorted, as these reads are faster."""
        N = len(self.bank)
        positions = range(start, start + size)
        return np.sort([epoch_order(self.seed, p // N, N)[p % N] for p in positions])

    def read(self, rows):
        # numpy gathers: torch in a second thread would take the cores from the first
        batch = {name: torch.from_numpy(array[rows]) for name, array in self.arrays.items()}
        if self.device.type == "cuda":
            batch = {name: part.pin_memory() for name, part in batch.items()}
        return batch

    def batches(self, args, first_step, indices):
        """Yields, for each step and each micro-batch in indices, x (B, C, h, w) as the network sees
        it, s (B, D), y (B,), patch tokens or None."""
        steps = np.arange(first_step, args.steps)[:, None]
        starts = steps * args.batch_size + np.array(indices) * args.micro_batch
        rows = (self.rows(start, args.micro_batch) for start in starts.flatten().tolist())
        for batch in memory.ahead(self.read, rows):
            batch = {name: part.to(self.device, non_blocking=True) for name, part in batch.items()}
            x = memory.normalize_latents(batch["latents"], self.stats)
            s = self.bank.decode(batch["coef"].float() * batch["scale"][:, None])
            targets = None
            if "patches" in batch:
                c = batch["patches"].float() * batch["patch_scales"][..., None]
                targets = self.patch_bank.decode(c)
            yield x, s, batch["labels"], targets


def learning_rate(step, args):
    warmup = min(1, (step + 1) / max(1, args.warmup))
    a, b = args.decay
    decay = min(1, max(0, (b - step) / max(1, b - a))) if b > 0 else 1
    return args.lr * warmup * decay


class Trainer:
    """The network, its EMA, its optimizer, and counters."""

    def __init__(self, args, model, meta, device):
        self.args = args
        self.meta = meta
        self.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.model = model.train().to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=0, fused=True)
        self.step = 0
        self.skipped = 0  # steps without a finite loss and gradient
        self.consecutive_skips = 0
        self.losses = []  # of the finite steps since the last line of the log
        self.lines = []  # of the log

    def load(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.ema.load_state_dict(checkpoint["ema"])
        # load_state_dict keeps these tensors; a copy lets go of the mapped file
        self.optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))
        self.step = checkpoint["step"]
        self.skipped = checkpoint["skipped"]
        self.lines = checkpoint.get("log", [])

    def save(self, name):
        """Writes OUT/name: what sample.py needs; ckpt.pt holds also what --resume needs."""
        checkpoint = {"step": self.step, "ema": self.ema.state_dict(), "meta": self.meta}
        checkpoint.update(config=vars(self.model.config), settings=vars(self.args))
        if name == "ckpt.pt":
            checkpoint.update(model=self.model.state_dict(), optimizer=self.optimizer.state_dict())
            checkpoint.update(skipped=self.skipped, log=self.lines)
        with memory.atomic_write(f"{self.args.out}/{name}") as file:
            torch.save(checkpoint, file)

    @torch.no_grad()
    def update(self, loss):
        """One step by the gradients of the last backward pass -> gradient norm. Where the loss or
        the norm, which all processes share, is not finite, no weight changes."""
        lr = learning_rate(self.step, self.args)
        self.optimizer.param_groups[0].update(lr=lr, betas=(0.9, self.args.beta2))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.args.clip or torch.inf)
        if torch.isfinite(loss + norm):
            self.optimizer.step()
            ramp = (1 + self.step) / (10 + self.step) if self.args.ema_ramp else 1
            decay = min(self.args.ema, ramp)
            torch._foreach_lerp_(list(self.ema.parameters()), self.parameters, 1 - decay)
            self.losses.append(loss.item())
            self.consecutive_skips = 0
        else:
            self.skipped += 1
            self.consecutive_skips += 1
            say(f"warning: step {self.step} is skipped: its loss or gradient is not finite")
        self.optimizer.zero_grad()
        self.step += 1
        return norm

    def log(self, norm, seconds):
        """Appends a line about the steps since the last one, which took `seconds`, to log.jsonl."""
        loss = round(float(np.mean(self.losses)), 5) if self.losses else None
        norm = round(norm.item(), 5) if norm.isfinite() else None
        lr = learning_rate(self.step - 1, self.args)
        line = {"step": self.step, "loss": loss, "grad_norm": norm, "lr": lr}
        line.update(seconds=round(seconds, 2), skipped=self.skipped)
        self.losses = []
        self.lines.append(json.dumps(line) + "\n")
        try:
            with memory.atomic_write(f"{self.args.out}/log.jsonl") as file:
                file.write("".join(self.lines).encode())
        except OSError as e:  # such as a full disk: the checkpoint matters more
            say(f"warning: the log cannot be written: {e}")
        return line


def train(trainer, net, loader):
    """The loop; net is trainer.model, compiled and distributed where that is wanted. Returns 0 at
    the end of the training, or the number of a signal, with everything saved."""
    args = trainer.args
    # the micro-batches of process r in each step: r, r + num_processes, ..
    indices = range(process_rank(), args.batch_size // args.micro_batch, num_processes())
    batches = loader.batches(args, trainer.step, indices)
    signals = []  # the numbers of those that have come
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has the first two
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, frame: signals.append(number))
    device = loader.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=trainer.dtype == "bfloat16")
    loss_options = {"align": args.align, "t_mean": args.t_mean, "t_std": args.t_std}
    stop = 0
    began = time.perf_counter()
    with memory.progress(desc="train", total=args.steps, initial=trainer.step, unit="step") as bar:
        while trainer.step < args.steps and not stop:
            loss = torch.zeros((), device=device)
            for m in indices:
                x, s, y, targets = next(batches)
                torch.manual_seed(sample.mixed_seed(sample.TRAINING, args.seed, trainer.step, m))
                if num_processes() > 1:  # gradients are exchanged in the last micro-batch only
                    net.require_backward_grad_sync = m == indices[-1]
                with autocast:
                    part = flow_loss(net, x, s, y, args.cond_drop_prob, targets, **loss_options)
                part = part / len(indices)
                part.backward()
                loss += part.detach()
            memory.all_reduce(loss)
            norm = trainer.update(loss / num_processes())
            bar.update()
            stop = torch.tensor(signals[0] if signals else 0)
            memory.all_reduce(stop, torch.distributed.ReduceOp.MAX)
            last = stop or trainer.step == args.steps
            if process_rank() == 0 and (last or trainer.step % args.log_every == 0):
                line = trainer.log(norm, time.perf_counter() - began)
                bar.set_postfix(loss=line["loss"])
                began = time.perf_counter()
            if trainer.consecutive_skips >= GIVE_UP:
                raise InputError(f"{GIVE_UP} steps without a finite loss: try a lower --lr")
            if process_rank() == 0 and (last or trainer.step % args.save_every == 0):
                trainer.save("ckpt.pt")
                if args.preview and not stop:
                    preview(trainer, loader.bank)
            if process_rank() == 0 and args.keep_every and trainer.step % args.keep_every == 0:
                trainer.save(f"ema-{trainer.step:07d}.pt")
    return int(stop)


def preview(trainer, bank):
    """Writes samples.png by the EMA weights, each time from the same noise: above 32 images of
    snippets of the bank, below 32 of new snippets around these."""
    try:
        rows = sample.draw_indices(range(32), 0, len(bank))
        s = torch.cat([bank[rows], sample.new_snippets(bank, rows, range(32))])
        y = sample.draw_indices(range(64), 0, max(1, trainer.model.config.num_classes))
        x = sample.generate(trainer.ema, range(64), s, y, dtype=trainer.dtype)
        images = sample.decode(x, trainer.meta, load_tokenizer(trainer.args.tokenizer, x.device))
        for name in (f"samples-{trainer.step:07d}.png", "samples.png"):
            sample.save_images(images, f"{trainer.args.out}/{name}")
    except Exception as e:  # noqa: BLE001 - whatever it is, the training goes on
        say(f"warning: no preview: {type(e).__name__}: {e}")


def new_model(args, loader):
    """-> the network of a new run on these data, with random weights or those of --init"""
    initial = load_sit(args.init) if args.init else None
    fields = dict(vars(initial.config) if initial else CONFIGS[args.model])
    in_channels, input_size, _ = loader.meta["latent"]
    fields.update(input_size=input_size, in_channels=in_channels, mask_ratio=args.mask_ratio)
    fields.update(zero_init=args.zero_init, memory_dim=0, num_classes=0, align_dim=0)
    if args.condition == "memory":
        fields["memory_dim"] = loader.bank.dim
    new_memory = args.condition == "memory" and not (initial and initial.config.memory_dim)
    standardize = new_memory and args.memory_scale == "standard"
    if new_memory:  # else --init's centring and scale stay, which its weights know
        fields["memory_center"] = standardize
        fields["memory_scale"] = 1.0 if standardize else float(args.memory_scale)
    if args.memory_tokens is not None:
        fields["memory_tokens"] = args.memory_tokens
    if args.condition == "class":
        fields["num_classes"] = len(loader.meta["classes"])
        if not loader.meta["classes"]:
            raise InputError(f"{args.data} has no labels (class sub-folders) for --condition class")
    if args.align > 0:
        fields.update(align_dim=loader.patch_bank.dim, align_depth=args.align_depth)

    torch.manual_seed(args.seed)
    model = SiT(SiTConfig(**fields))
    if standardize:
        model.standardize_snippets(loader.bank)
    if initial:
        weights = initial.state_dict()
        if fields["num_classes"] != initial.config.num_classes:  # other classes
            weights.pop("y_embedder.embedding_table.weight", None)
        try:
            missing = model.load_state_dict(weights, strict=False).missing_keys
        except RuntimeError as e:
            raise InputError(f"--init is another network: {str(e).splitlines()[-1].strip()}") from e
        if missing:
            say(f"not in --init, drawn anew: {', '.join(missing)}")
    return model


def micro_batch_size(args, config):
    """Images of a forward pass: the largest divisor of one process's batch within the limits"""
    share, rest = divmod(args.batch_size, num_processes())
    if share == 0 or rest > 0:
        raise InputError(f"--batch-size {args.batch_size}: {num_processes()} does not divide it")
    tokens = (config.input_size // config.patch_size) ** 2
    most = args.micro_batch or max(1, min(MICRO_BATCH, MICRO_TOKENS // tokens))
    return max(size for size in range(1, most + 1) if share % size == 0)


def main():
    device = memory.init_distributed(make_parser().parse_args().device)  # before anything is said
    args, checkpoint = read_settings()
    if process_rank() == 0:
        lock = memory.lock_folder(args.out)  # noqa: F841 - held as long as this process runs
    if not os.path.exists(f"{args.data}/meta.json"):
        options = {name: getattr(args, name) for name in (*PREPARED, "skip_bad")}
        memory.prepare(args.data, f"{args.out}/data", device, patches=args.align > 0, **options)
        args.data = f"{args.out}/data"
    args.data = os.path.abspath(args.data)
    loader = Loader(args.data, args.seed, device, patches=args.align > 0)

    if checkpoint is None:
        trainer = Trainer(args, new_model(args, loader), loader.meta, device)
    else:
        now = {name: loader.meta[name] for name in ("bank", "images", "latent", "mean", "std")}
        memory.refuse_differences(checkpoint["meta"], now, f"{args.out} was begun")
        config = SiTConfig(**{**checkpoint["config"], "mask_ratio": args.mask_ratio})
        if args.align > 0 and config.align_dim == 0:
            raise InputError("--align: the run was begun without, and has no projector")
        trainer = Trainer(args, SiT(config), loader.meta, device)
        trainer.load(checkpoint)
        checkpoint = None  # lets go of the mapped file
    trainer.model.checkpointing = args.checkpointing
    micro_batch = micro_batch_size(args, trainer.model.config)
    if args.micro_batch not in (None, micro_batch):
        say(f"micro-batch {micro_batch}, not {args.micro_batch}: random numbers differ with it")
    args.micro_batch = micro_batch
    if process_rank() == 0:
        loader.bank.save(f"{args.out}/bank.pt")
        print(f"settings: {vars(args)}")
        print(f"data: {loader.meta['images']:,} images; bank: {loader.bank}")
        print(f"network: {sum(p.numel() for p in trainer.parameters):,} parameters, on {device}")
    torch.set_float32_matmul_precision("high")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    net = torch.compile(trainer.model) if compiled else trainer.model
    if num_processes() > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        # large buckets, as torch.compile cuts the network at each one
        net = DDP(net, device_ids, gradient_as_bucket_view=True, bucket_cap_mb=200)
        net.broadcast_buffers = False  # constants; torch 2.13 deprecates the argument
    try:
        stopped_by = train(trainer, net, loader)
    except torch.OutOfMemoryError as e:
        raise InputError(f"{device} has no memory: lower --micro-batch, or --checkpointing") from e
    say(f"{args.out}/ckpt.pt holds step {trainer.step:,}")
    if stopped_by:
        sys.exit(128 + stopped_by)


if __name__ == "__main__":
    memory.cli(main)
