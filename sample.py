"""Samples from a GMem checkpoint: snippets of its memory, and the flow from noise to data.

    python sample.py --ckpt out                                        # a grid: out/samples.png
    torchrun --nproc_per_node=8 sample.py --ckpt C --num-images 50000 --out s.npz   # for fid.py
    python sample.py --ckpt C --new                                    # new images, around rows
    python sample.py --ckpt C --label A                                # of one class
    python sample.py --ckpt C --add new.png photos/                    # external memory
    python sample.py --ckpt C --mix a.png 17                           # from an image to row 17
    python sample.py --ckpt C --audit                                  # does it copy?
    python sample.py --ckpt SiT-XL-2-256x256.pt --tokenizer sd-vae-ft-ema  # official weights

An .npz is in ADM's format: arr_0, uint8 (N, H, W, 3). Image i depends on (seed, i) alone, not on
the batch size or the number of processes (but for rounding). A killed run, started again, resumes.

A snippet of --new is a row of the bank plus a random step, of the size --spread, in the directions
in which the neighbours of the row differ (MemoryBank.around).

The core is `generate`. Below the double ruler come loading, where snippets come from, the audit,
files, and last the command line.
"""

import argparse
import os
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import memory
from memory import InputError, MemoryBank, in_range, note, rank_world
from model import guided, load_file, load_sit, ode, sde

NEIGHBOURS = 10  # nearest rows, whose covariance gives the step of --new

# -------------------------------------------------------------------------- from snippets to images


def mixed_seed(*numbers):
    """Whole numbers -> one seed for torch, which depends on all of them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def draw_rows(ids, seed, count):
    """-> for each image number a random index below count: of a row of the bank, or a label"""
    return torch.tensor([int(np.random.default_rng([seed, i]).integers(count)) for i in ids])


TRAINING, NOISE, MASK, NEW = range(4)  # each purpose has its own stream of random numbers


def generators_of(purpose, seed, ids):
    """-> a torch.Generator for each image; purpose: NOISE, MASK or NEW, its new snippet"""
    return [torch.Generator().manual_seed(mixed_seed(purpose, seed, i)) for i in ids]


def generate(
    model,
    ids,
    s=None,
    y=None,
    seed=0,
    method="heun",
    steps=25,
    shift=0.0,
    cfg=1.0,
    cfg_interval=(0.0, 1.0),
    mask=0.0,
    dtype="float32",
):
    """The images numbered ids of the stream `seed` -> latents (B, C, H, W), as the model sees them.

    s       (B, D) snippets, if the model has memory
    y       (B,) labels, if it has these
    method  euler, heun, sde-euler, sde-heun; see model.ode, model.sde and model.guided
    mask    fraction of a snippet's entries set to zero (to the mean's, where snippets are centred)
    dtype   of the network: bfloat16 or float32
    """
    config = model.config
    device = next(model.parameters()).device
    generators = generators_of(NOISE, seed, ids)

    def noise(x=None):  # sde passes x, whose shape is known
        shape = (config.in_channels, config.input_size, config.input_size)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    if s is not None and mask > 0:
        mean = model.memory_mean.to(s.device) if config.memory_center else 0
        masked = [
            memory.mask(row, mask, g) for row, g in zip(s - mean, generators_of(MASK, seed, ids))
        ]
        s = mean + torch.stack(masked)
    if s is not None:
        s = s.to(device)
    if y is not None:
        y = y.to(device)
    v = guided(model, s, y, cfg, cfg_interval)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        if method.startswith("sde-"):
            return sde(v, noise(), steps, method.removeprefix("sde-"), noise)
        return ode(v, noise(), steps, method, shift)


def decode(x, meta, tokenizer, dtype="float32"):
    """Latents as the model makes them (B, C, h, w) -> uint8 images (B, H, W, 3), numpy"""
    latents = memory.denormalize_latents(x, memory.stats_tensor(meta, x.device))
    return to_images(latents, tokenizer, dtype)


def to_images(latents, tokenizer, dtype="float32"):
    """Latents as they are stored (B, C, h, w) -> uint8 images (B, H, W, 3), numpy"""
    images = torch.cat([tokenizer.decode(part, dtype) for part in latents.split(16)])
    images = ((images + 1) * 127.5).clamp(0, 255).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


# ====================== end of the core: loading, snippets, the audit, the command line ==========

# ------------------------------------------------------------------------- the model and its memory


def load_model(args, device):
    """-> model, meta, path of its bank (None: unknown), of a checkpoint of train.py or official
    weights; what these do not say, --tokenizer and --latent-stats, is taken from args"""
    content = load_file(args.ckpt)
    model = load_sit(content).to(device)
    count = sum(p.numel() for p in model.parameters())
    note(f"{args.ckpt}: {count:,} parameters, on {device}")
    if "meta" in content:
        load_file(args.ckpt, keys=("config", "meta", "bank", "ema"))  # names what is missing
        folder = os.path.dirname(os.path.realpath(args.ckpt))
        return model, content["meta"], args.bank or os.path.join(folder, content["bank"])

    settings = {"tokenizer": args.tokenizer, "latent_stats": args.latent_stats}
    stats = memory.known_stats(settings)
    if args.tokenizer is None or (model.config.memory_dim and args.bank is None):
        raise InputError(
            f"{args.ckpt} is not by train.py: name --tokenizer, and with memory --bank"
        )
    if stats is None:
        raise InputError(f"mean and std of {args.tokenizer}'s latents: give --latent-stats FILE")
    return model, {"settings": settings, "mean": stats[0], "std": stats[1]}, args.bank


def load_bank(path, model, meta):
    """The bank at path, if model can use it; None for a model without memory."""
    if not model.config.memory_dim:
        return None
    if not os.path.exists(path):
        raise InputError(f"the bank {path} is not there; give it by --bank")
    bank = MemoryBank.load(path)
    dim = model.config.memory_dim
    if bank.dim != dim:
        raise InputError(f"the snippets of {path} have {bank.dim} numbers, not {dim}")
    trained = memory.feature_source(meta["settings"])
    if "unknown" not in (bank.encoder, trained) and bank.encoder != trained:
        given = f"{path} holds snippets of {bank.encoder}"
        raise InputError(f"{given}, the model was trained on {trained}")
    other = "" if meta.get("bank", bank.id) == bank.id else "; not the bank of its training"
    note(f"bank: {bank}{other}")
    return bank


def encoder_name(args, bank, meta):
    """What load_encoder takes to encode as the bank's features were: --encoder; or what the
    checkpoint was prepared with, if that made the features of the bank"""
    prepared_with = meta["settings"].get("encoder")
    if args.encoder is None and memory.without_place(prepared_with) == bank.encoder:
        return prepared_with
    return args.encoder or bank.encoder


def read_images(paths, size):
    """Image files, folders or arrays -> uint8 (N, size, size, 3)"""
    sources = [memory.Images(path, size) for path in paths]
    return np.concatenate([source.batch(range(len(source))) for source in sources])


def snippet_at(end, bank, encode, size):
    """An end of --mix, an image file or the number of a bank row -> its snippet (D,)"""
    is_number = end.lstrip("-").isdecimal()
    if os.path.exists(end) and is_number:
        note(f"--mix {end}: the file of this name; for the row of the bank, work in another folder")
    if os.path.exists(end) or not is_number:
        images = read_images([end], size)
        if len(images) > 1:
            raise InputError(f"--mix {end} holds {len(images)} images, expected one")
        return F.normalize(encode(images)[0], dim=0)
    if not 0 <= int(end) < len(bank):
        raise InputError(f"--mix {end} is no file, and no row of {len(bank):,} in the bank")
    return bank[int(end)]


def mixed_snippets(args, bank, encode, size):
    """A row of snippets from one end of --mix to the other."""
    n = args.num_images
    a, b = [snippet_at(end, bank, encode, size).expand(n, -1) for end in args.mix]
    alpha = torch.linspace(0, 1, n)[:, None]
    return memory.mix(a, b, alpha, args.mix_method, torch.Generator().manual_seed(args.seed))


def label_number(label, names, counts):
    """--label, the name of a class or its number (None: any) -> its number

    counts  how many snippets there are of each class"""
    if label is None:
        return None
    if len(counts) == 0:
        raise InputError(f"--label {label}: the bank has no labels")
    number = -1
    if label in names:
        number = names.index(label)
    elif label.isdecimal():
        number = int(label)
    if not 0 <= number < len(counts) or counts[number] == 0:
        known = [name for name, count in zip(names, counts) if count > 0]
        classes = ", ".join(known) or f"0 to {len(counts) - 1}"
        raise InputError(f"--label {label}: no such class; there are {classes}")
    return number


def class_counts(bank):
    """-> how many rows each class has; empty without labels"""
    return np.bincount(bank.labels[bank.labels >= 0])


def draw_labels(args, ids, names, counts):
    """The labels of images (B,): --label for all; or each class as often as counts has it."""
    label = label_number(args.label, names, counts)
    if label is not None:
        return torch.full((len(ids),), label)
    up_to = torch.tensor(counts).cumsum(0)
    row = draw_rows(ids, args.seed, int(up_to[-1]))
    return torch.searchsorted(up_to, row, right=True)


def bank_rows(args, ids, names, bank):
    """-> the row of the bank whose snippet each image is made of (B,); of --label's class"""
    label = label_number(args.label, names, class_counts(bank))
    if label is None:
        return draw_rows(ids, args.seed, len(bank))
    rows = np.flatnonzero(bank.labels == label)
    return torch.from_numpy(rows)[draw_rows(ids, args.seed, len(rows))]


def new_snippets(args, ids, rows, bank, device):
    """Snippets (B, D) that belong to no training image: each around its row of the bank."""
    if device.type != "cpu":
        bank = bank.to(device)
    parts = []
    starts = range(0, len(ids), 1024)
    for i in tqdm(starts, "snippets", unit="batch", leave=False, disable=rank_world()[0] > 0):
        generators = generators_of(NEW, args.seed, ids[i : i + 1024])
        noise = torch.stack([torch.randn(NEIGHBOURS, generator=g) for g in generators])
        parts.append(bank.around(rows[i : i + 1024], noise, args.spread).cpu())
    s = torch.cat(parts)
    note(
        "distance of new snippets to the bank, relative to that of its rows to their nearest other "
        f"row: {novelty(s[:1000], bank):.2f} (0: copies, 1: as new as another image of the data)"
    )
    return s


def novelty(s, bank):
    """Median distance of snippets s (B, D) to the bank, over that of 1,000 of its rows to their
    nearest other row; distances are those of unit-norm snippets, sqrt(2 - 2 cos)"""
    cosine, _ = bank.nearest(s)
    rows = np.linspace(0, len(bank) - 1, min(len(bank), 1000)).astype(int)
    of_rows, _ = bank.neighbours(rows, 1, same_class=False)
    distance = (2 - 2 * cosine).clamp_min(0).sqrt().median()
    return (distance / (2 - 2 * of_rows).clamp_min(1e-12).sqrt().median()).item()


# ------------------------------------------------------------------------------------ does it copy?


def audit_data(args, bank_path, bank, config, meta, tokenizer, device):
    """-> latents of the training, beside its bank; and of images that it never saw: those of
    --audit, or glyphs of another seed for a training on glyphs; or None"""
    if len(bank) < 2:
        raise InputError(f"--audit compares the rows of a bank; {bank_path} has only one")
    data = memory.load_array(os.path.join(os.path.dirname(bank_path), "latents.npy"))
    expected = (len(bank), config.in_channels, config.input_size, config.input_size)
    if data.shape != expected:
        there = f"beside {bank_path}, of {len(bank):,} rows, are latents {data.shape}"
        raise InputError(f"--audit needs the bank of training, and its latents; {there}")
    size = config.input_size * tokenizer.factor
    if args.audit:
        images = read_images([args.audit], size)
        images = images[:: -(-len(images) // args.num_images)]
    elif memory.is_glyphs(meta["settings"].get("source", "")):
        images, _ = memory.glyphs(args.num_images, size, seed=1, characters=meta["classes"])
    else:
        return data, None
    return data, memory.in_batches(tokenizer.encode, images, device)


def flat_latents(latents, stats):
    """Latents as they are stored, an array or a tensor -> as the model sees them, (B, n) float32"""
    if not torch.is_tensor(latents):
        latents = torch.from_numpy(np.array(latents))  # a copy, as files are mapped read-only
    return memory.normalize_latents(latents, stats).flatten(1)


def nearest_latents(x, data, stats):
    """x (B, n) flat -> root mean square distances (B, 2) to the two nearest of data, their rows"""
    nearest = x.new_empty(len(x), 0)
    rows = torch.empty(len(x), 0, dtype=torch.int64)
    for i in tqdm(range(0, len(data), 1024), "comparing", unit="block", leave=False):
        distance = torch.cdist(x, flat_latents(data[i : i + 1024], stats))
        nearest = torch.cat([nearest, distance], dim=1)
        rows = torch.cat([rows, torch.arange(i, i + distance.shape[1]).expand_as(distance)], dim=1)
        nearest, order = nearest.topk(min(2, nearest.shape[1]), largest=False)
        rows = rows.gather(1, order)
    return nearest / x.shape[1] ** 0.5, rows


def audit(made, own, data, stats, held_out=None):
    """Does the model copy? Prints distances, root mean squares over a latent as the model sees it.

    made      (B, ...) latents of generated images
    own       (B,) rows of their snippets; None: these are new
    data      (N, ...) latents of the training images, N > 1
    held_out  latents of images that it never saw, or None
    -> (B,) the row of data nearest to each generated image
    """

    def report(what, distance):
        print(f"{what:<52} median {distance.median():.3f}, least {distance.min():.3f}")

    x = flat_latents(made, stats)
    near, rows = nearest_latents(x, data, stats)
    if own is not None:
        to_own = (x - flat_latents(data[own], stats)).square().mean(1).sqrt()
        report("generated image to the image of its snippet", to_own)
    to_nearest = near[:, 0]
    report("generated image to the nearest training image", to_nearest)
    some = flat_latents(data[:: -(-len(data) // len(x))], stats)
    near, _ = nearest_latents(some, data, stats)  # the nearest is the image itself
    report("training image to the nearest other one", near[:, 1])
    relative = (to_nearest.median() / near[:, 1].median().clamp_min(1e-9)).item()
    print(f"ratio of these two medians: {relative:.2f} (0: copies, 1: as far as training images)")
    if held_out is not None:
        near, _ = nearest_latents(flat_latents(held_out, stats), data, stats)
        report("held-out image to the nearest training image", near[:, 0])
    nearest = rows[:, 0]
    if own is not None:
        same = 100 * (nearest == own).float().mean()
        print(f"the image of its snippet is the nearest: {same:.1f} %")
    return nearest


def audit_images(images, rows, data, held_out, meta, tokenizer, device):
    """-> the first images, below them those of their snippets, then the nearest of the training"""
    made = memory.in_batches(tokenizer.encode, images, device)
    nearest = audit(made, rows, data, memory.stats_tensor(meta, "cpu"), held_out)
    known = [data[nearest[:16]]]
    if rows is not None:
        known = [data[rows[:16]], *known]
    known = torch.from_numpy(np.concatenate(known)).to(device)
    return np.concatenate([images[:16], to_images(known, tokenizer)])


# ------------------------------------------------------------------------------- pictures and files


def grid(images, columns=None):
    """uint8 (N, H, W, 3) -> PIL image; small images are enlarged by a whole number"""
    N, height, width, _ = images.shape
    if columns is None:
        columns = max(1, round(N**0.5))
    sheet = Image.new("RGB", (columns * width, -(-N // columns) * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (column * width, row * height))
    zoom = max(1, 64 // height)
    return sheet.resize((zoom * sheet.width, zoom * sheet.height), Image.NEAREST)


def save_images(images, out, columns=None):
    """uint8 (N, H, W, 3), may be a memmap -> a grid (.png), an .npz, or a folder of PNGs"""
    if out.lower().endswith(".png"):
        with memory.atomic_write(out) as temporary:
            grid(images, columns).save(temporary, "PNG")
    elif out.lower().endswith(".npz"):
        with memory.atomic_write(out) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=images)
    else:
        os.makedirs(out, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(os.path.join(out, f"{i:06d}.png"))


# --------------------------------------------------------------------------------- the command line

METHODS = ("euler", "heun", "sde-euler", "sde-heun")
MIXES = ("slerp", "lerp", "concat", "mask")
# name: (default, type, help)
SAMPLER = {  # of generate
    "seed": (0, in_range(0, 2**63), "seed of everything that is random"),
    "method": ("heun", METHODS, "integrator of the ODE, or with sde- of the SDE"),
    "steps": (25, in_range(1), "steps of the integrator"),
    "shift": (
        0.0,
        in_range(0, kind=float),
        "t -> a t / (1 + (a-1) t) of the ODE's times; a < 1: more steps near the noise; 0: none",
    ),
    "cfg": (1.0, in_range(-1e9, kind=float), "guidance scale; 1: no guidance"),
    "cfg_interval": (
        (0.0, 1.0),
        {"type": float, "nargs": 2, "metavar": ("LO", "HI")},
        "apply guidance only while LO <= t <= HI",
    ),
    "mask": (0.0, in_range(0, 1, float), "fraction of a snippet's entries masked"),
    "dtype": (
        None,
        ("bfloat16", "float32"),
        "dtype of network and decoder, by default float32, but bfloat16 for the network on CUDA",
    ),
}
SETTINGS = {
    "ckpt": (None, {"required": True}, "checkpoint file, or the folder of a training"),
    "out": (None, str, ".png (a grid), .npz, or a folder (default: a .png beside CKPT)"),
    "num_images": (None, in_range(1), "number of images (default: 64; with --add, --mix 8 a row)"),
    "batch_size": (64, in_range(1), "images of one forward pass"),
    **SAMPLER,
    "label": (None, str, "class of all images: the name of its folder, or its number"),
    "new": (False, bool, "new images: snippets around rows of the bank"),
    "spread": (1.0, in_range(0, kind=float), "with --new: size of the step away from the row"),
    "add": (
        None,
        {"nargs": "+", "metavar": "IMAGES"},
        "make images of these files or folders, a line of the grid for each",
    ),
    "save_bank": (None, str, "with --add: file for the bank extended by their snippets"),
    "mix": (
        None,
        {"nargs": 2, "metavar": ("A", "B")},
        "interpolate from A to B, each an image file or a row number of the bank",
    ),
    "mix_method": ("slerp", MIXES, "with --mix: the way from A to B"),
    "audit": (
        None,
        {"nargs": "?", "const": "", "metavar": "HELD_OUT"},
        "measure distances to the nearest training images, also those of HELD_OUT images",
    ),
    "bank": (None, str, "bank file, in place of the checkpoint's"),
    "encoder": (None, str, "for --add and --mix: file with the weights of the bank's encoder"),
    "tokenizer": (None, str, "autoencoder of official weights, or new place of the checkpoint's"),
    "latent_stats": (None, str, "with official weights: file with mean and std of latents"),
    "device": (None, str, "cuda, mps or cpu (default: the best there is)"),
    "compile": (False, bool, "compile the network by torch.compile"),
}
# the first setting of each group of --help
GROUPS = {
    "ckpt": "files",
    "seed": "sampler",
    "label": "what is made",
    "bank": "networks and device",
}


def arguments():
    args = argparse.Namespace(**memory.defaults(SETTINGS))
    vars(args).update(memory.read_flags(SETTINGS, "Samples from a GMem checkpoint.", GROUPS))
    low, high = args.cfg_interval
    if not low <= high:
        raise InputError(f"--cfg-interval {low} {high}: LO is above HI")
    if args.shift > 0 and args.method.startswith("sde-"):
        raise InputError(f"--shift {args.shift} is of the ODE's times; {args.method} has none")
    modes = [mode for mode in ("add", "mix", "audit") if getattr(args, mode) is not None]
    if len(modes) > 1:
        raise InputError("--add, --mix and --audit exclude each other")
    if args.new:
        modes.append("new")
    if args.new and (args.add is not None or args.mix is not None):
        raise InputError(f"--new and --{modes[0]} exclude each other: both say which snippets")
    for flag, mode in (("save_bank", "add"), ("mix_method", "mix"), ("spread", "new")):
        default = SETTINGS[flag][0]
        if getattr(args, flag) != default and mode not in modes:
            raise InputError(f"--{flag.replace('_', '-')} goes with --{mode}")
    if os.path.isdir(args.ckpt):
        args.ckpt = os.path.join(args.ckpt, "ckpt.pt")
    if args.out is None:
        names = {"add": "added.png", "mix": "mixed.png", "audit": "audit.png", "new": "new.png"}
        name = names[modes[0]] if modes else "samples.png"
        args.out = os.path.join(os.path.dirname(args.ckpt), name)
    args.out = os.path.normpath(args.out)
    if args.out.lower().endswith((".jpg", ".jpeg", ".npy", ".pt", ".zip", ".gif", ".webp")):
        raise InputError(f"--out {args.out} is neither a .png nor an .npz nor a folder")
    if args.num_images is None:
        args.num_images = 64 if args.add is None and args.mix is None else 8
    return args


def check(args, config):
    """InputError where a flag asks for something that this model does not have."""
    if not config.memory_dim:
        for flag in ("add", "mix", "audit", "mask", "new"):
            if getattr(args, flag) not in (None, 0):
                raise InputError(f"--{flag}: this model has no memory")
    if args.label is not None and not config.num_classes:
        if not config.memory_dim:
            raise InputError(f"--label {args.label}: this model has neither memory nor labels")
        if args.add is not None or args.mix is not None:
            raise InputError(f"--label {args.label}: the snippets of --add and --mix are given")
    if args.cfg != 1 and not config.memory_dim and not config.num_classes:
        raise InputError(f"--cfg {args.cfg}: this model has neither memory nor labels to guide it")


def check_out(out, count):
    """InputError where a folder holds what would be mixed with the images."""
    if out.lower().endswith((".png", ".npz")) or not os.path.exists(out):
        return
    if not os.path.isdir(out):
        raise InputError(f"--out {out} is a file: give a .png, an .npz, or the name of a folder")
    foreign = set(os.listdir(out)) - {f"{i:06d}.png" for i in range(count)} - {memory.LOCK}
    if foreign:
        raise InputError(f"--out {out}: the folder holds other files, such as {min(foreign)}")


def image_settings(args, meta, tokenizer_name, ids, s, y):
    """What the pixels of a sampling depend on: a killed run resumes with the same only."""
    settings = {name: getattr(args, name) for name in SAMPLER}
    settings["decoder_dtype"] = args.decoder_dtype
    settings["checkpoint"] = memory.fingerprint(args.ckpt)
    settings["tokenizer"] = memory.fingerprint(tokenizer_name) or tokenizer_name
    settings["latent_stats"] = [meta["mean"], meta["std"]]
    settings["checksum_of_numbers"] = zlib.crc32(np.array(ids))
    settings["checksum_of_snippets"] = None if s is None else zlib.crc32(s.numpy())
    settings["checksum_of_labels"] = None if y is None else zlib.crc32(y.numpy())
    return settings


def make_images(args, model, meta, tokenizer, settings, ids, s, y):
    """Generates, batch by batch, the images numbered ids -> Blocks with images (N, H, W, 3)"""
    device = next(model.parameters()).device
    size = model.config.input_size * tokenizer.factor
    arrays = {"images.npy": ((len(ids), size, size, 3), "uint8")}
    blocks = memory.Blocks(f"{args.out}.parts", settings, arrays, args.batch_size)
    sampler = {name: getattr(args, name) for name in SAMPLER}

    def latents(rows):
        batch = slice(rows.start, rows.stop)
        s_batch = None if s is None else s[batch]
        y_batch = None if y is None else y[batch]
        return generate(model, ids[batch], s_batch, y_batch, **sampler)

    made = map(latents, blocks.todo)
    if device.type == "cuda":  # the next batch is made while one is decoded and written
        made = memory.ahead(latents, blocks.todo)
    with blocks.bar("sampling") as bar:
        for rows, x in zip(blocks.todo, made):
            blocks.write(rows, images=decode(x, meta, tokenizer, args.decoder_dtype))
            bar.update(len(rows))
    blocks.finish()
    return blocks


def rows_with_given(given, images):
    """(R, H, W, 3) and R rows of images (R*n, H, W, 3) -> (R*(n+1), H, W, 3): each row begins with
    the image that was given"""
    rows = images.reshape(len(given), -1, *given.shape[1:])
    return np.concatenate([given[:, None], rows], axis=1).reshape(-1, *given.shape[1:])


@dataclass
class Plan:
    """What is made: the images numbered ids, of snippets s (B, D) and labels y (B,)."""

    ids: list
    s: torch.Tensor = None
    y: torch.Tensor = None
    rows: torch.Tensor = None  # (B,) the rows of the bank that s are
    given: np.ndarray = ()  # images (R, H, W, 3) that stand at the head of R rows of the grid
    columns: int = None  # of the grid
    extended: MemoryBank = None  # by the snippets of the given images


def planned(args, config, meta, bank, encode, size, device):
    """-> Plan, as the flags have it"""
    n = args.num_images
    names = meta.get("classes", [])
    plan = Plan(list(range(n)))
    if args.add is not None:  # a row for each image: its snippet, n noises
        plan.given = read_images(args.add, size)
        plan.extended = bank.extend(encode(plan.given))
        plan.ids = list(range(n)) * len(plan.given)
        plan.s = plan.extended[len(bank) :].repeat_interleave(n, dim=0)
        plan.columns = n + 1
    elif args.mix is not None:  # one row: from a snippet to the other, one noise
        plan.s = mixed_snippets(args, bank, encode, size)
        plan.ids = [0] * n
        plan.columns = n
    elif args.new:
        rows = bank_rows(args, plan.ids, names, bank)
        plan.s = new_snippets(args, plan.ids, rows, bank, device)
    elif bank is not None:
        plan.rows = bank_rows(args, plan.ids, names, bank)
        plan.s = bank[plan.rows]
    if config.num_classes:
        counts = meta.get("class_counts", [1] * config.num_classes)
        plan.y = draw_labels(args, plan.ids, names, counts)
    return plan


def main():
    args = arguments()
    device = memory.best_device(args.device)
    memory.init_distributed(device)
    args.decoder_dtype = args.dtype or "float32"  # as in the official code
    args.dtype = args.dtype or memory.default_dtype(device)
    model, meta, bank_path = load_model(args, device)
    config = model.config
    check(args, config)
    tokenizer_name = args.tokenizer or meta["settings"]["tokenizer"]
    tokenizer = memory.load_tokenizer(tokenizer_name, device)
    size = config.input_size * tokenizer.factor
    bank = load_bank(bank_path, model, meta)

    def encode(images):
        encoder = memory.load_encoder(encoder_name(args, bank, meta), device)
        return memory.in_batches(lambda x: encoder(x)[0], images, device)

    plan = planned(args, config, meta, bank, encode, size, device)
    count = len(plan.ids) + len(plan.given)
    if args.audit is not None:  # see audit_images
        count = min(count, 16) * (2 if plan.rows is None else 3)
    check_out(args.out, count)
    if args.audit is not None:
        data, held_out = audit_data(args, bank_path, bank, config, meta, tokenizer, device)
    if args.compile:
        model = torch.compile(model)
    settings = image_settings(args, meta, tokenizer_name, plan.ids, plan.s, plan.y)
    with memory.one_writer(args.out):
        if args.save_bank is not None and rank_world()[0] == 0:
            plan.extended.save(args.save_bank)
        blocks = make_images(args, model, meta, tokenizer, settings, plan.ids, plan.s, plan.y)
        if rank_world()[0] == 0:
            images = blocks.arrays["images.npy"]
            columns = plan.columns
            if args.add is not None:
                images = rows_with_given(plan.given, images)
            if args.audit is not None:
                images = audit_images(images, plan.rows, data, held_out, meta, tokenizer, device)
                columns = min(16, args.num_images)
            save_images(images, args.out, columns)
            del images  # a map of a file that is removed
        blocks.remove()
    note(f"wrote {args.out}")


if __name__ == "__main__":
    memory.cli(main)
