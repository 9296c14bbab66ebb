"""Samples from a GMem checkpoint: snippets of its memory, and the flow from noise to data.

    python sample.py --ckpt out                                        # a grid: out/samples.png
    torchrun --nproc_per_node=8 sample.py --ckpt C --num-images 50000 --out s.npz   # for fid.py
    python sample.py --ckpt C --new                                    # new images, around rows
    python sample.py --ckpt C --label A                                # of one class
    python sample.py --ckpt C --add new.png photos/ [--new]            # external memory
    python sample.py --ckpt C --mix a.png 17                           # from an image to row 17
    python sample.py --ckpt C --snippets s.npy                         # an image for each vector
    python sample.py --ckpt C --audit [HELD_OUT]                       # does it copy?
    python sample.py --ckpt SiT-XL-2-256x256.pt --tokenizer sd-vae-ft-ema  # official weights

CKPT is a checkpoint, or the folder of a training; the bank is the bank.pt beside it. An .npz is in
ADM's format: arr_0, uint8 (N, H, W, 3). Image i depends on (seed, i) alone, not on batch size or
the number of processes (but for rounding). A killed command, given again, goes on.
"""

import argparse
import json
import os
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import memory
from memory import InputError, MemoryBank, num_processes, process_rank
from model import guided, load_file, load_sit, load_tokenizer, ode, sde

NEIGHBOURS = 10  # nearest rows, whose covariance gives the step of --new
TRAINING, NOISE, NEW = 0, 1, 3  # streams: first numbers of mixed_seed (2 was used once)
SAMPLER = ("seed", "method", "steps", "shift", "cfg", "interval", "dtype")  # of generate
METHODS = ("euler", "heun", "sde-euler", "sde-heun")


def mixed_seed(*numbers):
    """Whole numbers -> one seed for torch, which depends on all of them."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generators_of(purpose, seed, ids):
    """-> a torch.Generator for each image"""
    return [torch.Generator().manual_seed(mixed_seed(purpose, seed, i)) for i in ids]


def draw_indices(ids, seed, count):
    """-> for each image number a random index below count: of a row of the bank, or a label"""
    return torch.tensor([int(np.random.default_rng([seed, i]).integers(count)) for i in ids])


def generate(
    model, ids, s, y, seed=0, method="heun", steps=25, shift=0, cfg=1, interval=(0, 1), dtype=None
):
    """-> latents (B, C, H, W) as the model sees them; image i begins with noise (seed, ids[i]).

    s, y    (B, D) snippets of any norm, (B,) labels; None, if the model has none
    method  one of METHODS; see model.ode, model.sde and model.guided for the others
    """
    config = model.config
    device = next(model.parameters()).device
    generators = generators_of(NOISE, seed, ids)

    def noise(x=None):  # sde gives x, which is not needed
        shape = (config.in_channels, config.input_size, config.input_size)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    s = None if s is None else s.to(device)
    y = None if y is None else y.to(device)
    v = guided(model, s, y, cfg, interval)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        if method.startswith("sde-"):
            return sde(v, noise(), steps, method.removeprefix("sde-"), noise)
        return ode(v, noise(), steps, method, shift)


def decode(x, meta, tokenizer):
    """Latents as the model makes them (B, C, h, w) -> uint8 images (B, H, W, 3), numpy"""
    if not x.isfinite().all():
        raise InputError("the samples are not finite: look at the weights and the snippets")
    latents = memory.denormalize_latents(x, memory.stats_tensor(meta, x.device))
    images = torch.cat([tokenizer.decode(part) for part in latents.split(16)])
    images = ((images + 1) * 127.5).clamp(0, 255).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


def new_snippets(bank, rows, ids, seed=0, spread=1.0):
    """Snippets (B, D), each around its row of the bank, that belong to no training image"""
    noise = [torch.randn(NEIGHBOURS, generator=g) for g in generators_of(NEW, seed, ids)]
    parts = zip(rows.split(8192), torch.stack(noise).split(8192))
    return torch.cat([bank.around(*part, spread) for part in parts]).cpu()


def novelty(bank, rows, s):
    """Median distance of new snippets to the nearest row of their class, divided by the median
    distance of their own rows to the nearest other row. 0: copies, 1: as far as images are apart"""
    of_new, _ = bank.neighbours(rows, 1, s)
    of_rows, _ = bank.neighbours(rows, 1)
    ratio = (1 - of_new).median() / (1 - of_rows).median()  # of squares: |a - b|^2 = 2 (1 - cos)
    return ratio.clamp_min(0).sqrt().item()


def read_images(paths, size):
    """Image files, folders or arrays -> uint8 (N, size, size, 3)"""
    sources = [memory.Images(path, size) for path in paths]
    return np.concatenate([source.batch(range(len(source))) for source in sources])


def end_of_mix(end, bank, features_of, size):
    """An image file, or the number of a row of the bank -> its features (1, D) of any norm"""
    if end.isdecimal() and not os.path.exists(end):
        return bank[[int(end)]].cpu()
    return features_of(read_images([end], size)[:1])


def class_number(label, names, counts):
    """--label, the name of a class or its number -> its number. InputError if it has no image."""
    number = int(label) if label.isdecimal() else -1
    if label in names:
        number = names.index(label)
    if not 0 <= number < len(counts) or counts[number] == 0:
        raise InputError(f"--label {label}: no such class of {', '.join(names) or len(counts)}")
    return number


def nearest_latents(x, data, stats, k):
    """x (B, C, h, w) as the model sees it, data (N, C, h, w) as it is stored -> root mean square
    distances (B, k) to the nearest of data, their rows (B, k)"""
    nearest = x.new_full((len(x), k), torch.inf)
    rows = torch.full((len(x), k), -1)
    for i in memory.progress(range(0, len(data), 1024), desc="comparing", unit="block"):
        block = memory.normalize_latents(torch.tensor(data[i : i + 1024]), stats)
        distance = torch.cdist(x.flatten(1), block.flatten(1)) / x[0].numel() ** 0.5
        rows = torch.cat([rows, torch.arange(i, i + len(block)).expand_as(distance)], dim=1)
        nearest, order = torch.cat([nearest, distance], dim=1).topk(k, largest=False)
        rows = rows.gather(1, order)
    return nearest, rows


def audit(made, data, stats, held_out=None, mirrored=0):
    """Does the model copy? Prints distances between latents as the model sees them, root mean
    squares. made, held_out: (B, C, h, w), held_out may be None; data (N, C, h, w): of the training,
    as it is stored; mirrored n > 0: rows n .. 2n-1 are the mirror images of 0 .. n-1.
    -> (B,) each: distance to the nearest training image; row of that; its distance to another"""
    distance, row = (part[:, 0] for part in nearest_latents(made, data, stats, 1))
    known = memory.normalize_latents(torch.tensor(data[row.numpy()]), stats)
    near, near_rows = nearest_latents(known, data, stats, 3)  # itself, its mirror image, another
    period = mirrored or len(data)  # modulo it, an image and its mirror image are one
    itself = near_rows % period == row[:, None] % period
    to_other = near.masked_fill(itself, torch.inf).amin(1)
    print(f"generated image to its nearest training image: median distance {distance.median():.3f}")
    print(f"that training image to its nearest other one: median distance {to_other.median():.3f}")
    if held_out is not None:
        of_held_out, _ = nearest_latents(held_out, data, stats, 1)
        close = int((distance < of_held_out.quantile(0.05)).sum())
        print(f"held-out image to its nearest: median distance {of_held_out.median():.3f}")
        print(f"likely copies, nearer than 95 % of held-out images: {close} of {len(made)}")
    return distance, row, to_other


def write_audit(out, images, unseen, meta, folder, tokenizer, device):
    """Compares images with latents.npy of the folder; unseen: held-out memory.Images or None. It
    writes a .json of each image, and a .png: the first ones, below them their nearest."""
    data = np.load(f"{folder}/latents.npy", mmap_mode="r")
    stats = memory.stats_tensor(meta, "cpu")

    def latents_of(images):
        latents = memory.in_batches(lambda x: [tokenizer.encode(x)], images, device)[0]
        return memory.normalize_latents(latents, stats)

    held_out = None
    if unseen is not None:
        count = min(len(unseen), len(images))
        held_out = latents_of(unseen.batch(np.linspace(0, len(unseen) - 1, count).astype(int)))
    elif meta["settings"]["source"] == "glyphs":
        glyphs, _ = memory.glyphs(len(images), images.shape[1], seed=1)
        held_out = latents_of(glyphs)
    mirrored = meta["images"] if meta["settings"]["flip"] else 0
    distance, row, to_other = audit(latents_of(images), data, stats, held_out, mirrored)

    names = (row % (mirrored or len(data))).tolist()
    if os.path.exists(f"{folder}/files.txt"):
        files = Path(folder, "files.txt").read_bytes().splitlines()
        names = [os.fsdecode(files[number]) for number in names]
    stem = out.removesuffix(".png").removesuffix(".npz") + "-audit"
    results = []
    for i, name in enumerate(names):
        result = {"image": i, "nearest": name, "distance": round(distance[i].item(), 4)}
        result["nearest_to_its_nearest"] = round(to_other[i].item(), 4)
        results.append(result)
    memory.write_json(f"{stem}.json", results)
    known = memory.normalize_latents(torch.tensor(data[row[:16].numpy()]), stats)
    known = decode(known.to(device), meta, tokenizer)
    save_images(np.concatenate([images[:16], known]), f"{stem}.png", len(known))
    print(f"wrote {stem}.json and {stem}.png: samples above, nearest training images below")


def grid(images, columns=None):
    """uint8 (N, H, W, 3) -> PIL image; small images are enlarged by a whole number"""
    N, height, width, _ = images.shape
    columns = columns or max(1, round(N**0.5))
    sheet = Image.new("RGB", (columns * width, -(-N // columns) * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(Image.fromarray(image), (column * width, row * height))
    zoom = max(1, 64 // height)
    return sheet.resize((zoom * sheet.width, zoom * sheet.height), Image.NEAREST)


def save_images(images, out, columns=None):
    """uint8 (N, H, W, 3), may be a memmap -> a grid (.png), an .npz, or a new folder of PNGs"""
    if out.lower().endswith((".png", ".npz")):
        with memory.atomic_write(out) as file:
            if out.lower().endswith(".png"):
                grid(images, columns).save(file, "PNG")
            else:
                np.savez(file, arr_0=images)
    else:
        os.makedirs(f"{out}.parts/png", exist_ok=True)  # becomes OUT when complete
        for i, image in enumerate(images):
            Image.fromarray(image).save(f"{out}.parts/png/{i:06d}.png")
        os.rename(f"{out}.parts/png", out)


def read_arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("files").add_argument
    add("--ckpt", required=True, help="checkpoint file, or the folder of a training")
    add("--out", help=".png (a grid), .npz or new folder; if not given, a .png beside CKPT")
    add("--num-images", type=int, help="number of images; 64, or with --add and --mix 8 a line")
    add("--batch-size", type=int, default=64, help="images of one forward pass")

    add = parser.add_argument_group("sampler").add_argument
    add("--seed", type=int, default=0, help="seed of everything that is random")
    add("--method", choices=METHODS, default="heun", help="integrator of the ODE, or of the SDE")
    add("--steps", type=int, default=25, help="steps of the integrator")
    add("--shift", type=float, default=0.0, help="a: times t -> a t / (1 + (a-1) t), ODE; 0: none")
    add("--cfg", type=float, default=1.0, help="guidance scale; 1: no guidance")
    pair = {"dest": "interval", "type": float, "nargs": 2, "metavar": ("LO", "HI")}
    add("--cfg-interval", **pair, default=[0, 1], help="apply guidance only while LO <= t <= HI")
    add("--dtype", choices=("bfloat16", "float32"), help="float32; on CUDA the network's bfloat16")

    group = parser.add_argument_group("what is made")
    add = group.add_argument
    add("--new", action="store_true", help="new images: variations of bank rows, or of --add")
    add("--spread", type=float, default=1.0, help="with --new: size of the step from the row")
    add("--save-bank", metavar="F", help="with --add: file for the bank extended by the images")
    audit_help = "copies? distance to nearest training image, of HELD_OUT too; .json beside OUT"
    add("--audit", nargs="?", const="", metavar="HELD_OUT", help=audit_help)
    add = group.add_mutually_exclusive_group().add_argument
    add("--label", help="class of all images: the name of its folder, or its number")
    add("--add", nargs="+", metavar="IMAGES", help="files or folders: a line of the grid for each")
    add("--mix", nargs=2, metavar=("A", "B"), help="from A to B, image files or rows of the bank")
    add("--snippets", metavar="F.npy", help="an image for each of (N, D) vectors of any norm")

    add = parser.add_argument_group("networks and device").add_argument
    add("--bank", help="bank file, in place of the one beside the checkpoint")
    add("--encoder", help="for --add and --mix: file with the weights of the bank's encoder")
    add("--tokenizer", help="autoencoder of official weights, or new place of the checkpoint's")
    add("--latent-stats", metavar="F", help="with official weights: mean and std of latents")
    add("--device", help="cuda, mps or cpu; the best there is if not given")
    add("--compile", action="store_true", help="compile the network by torch.compile")
    args = parser.parse_args()
    if args.new and (args.mix or args.snippets):
        parser.error("--new goes with rows of the bank or with --add")
    if args.save_bank and not args.add:
        parser.error("--save-bank goes with --add")
    if os.path.isdir(args.ckpt):
        args.ckpt = f"{args.ckpt}/ckpt.pt"
    if args.out is None:
        modes = [mode for mode in ("add", "mix", "snippets", "new") if getattr(args, mode)]
        args.out = os.path.join(os.path.dirname(args.ckpt), f"{[*modes, 'samples'][0]}.png")
    args.out = os.path.normpath(args.out)
    if not args.out.lower().endswith((".png", ".npz")) and os.path.exists(args.out):
        raise InputError(f"{args.out} exists: name a new folder, a .png or an .npz")
    if args.save_bank and os.path.exists(args.save_bank):
        raise InputError(f"--save-bank {args.save_bank} exists: name another file")
    return args


def load_checkpoint(args, device):
    """-> model; meta of the data that it was trained on; bank or None; the folder of the data"""
    content = load_file(args.ckpt)
    model = load_sit(content).to(device)
    if num_processes() > 1:  # a training may replace the file while they open it
        for weight in model.state_dict().values():
            dist.broadcast(weight, 0)
    folder = os.path.dirname(args.ckpt) or "."
    meta = content.get("meta")
    if meta is None:
        stats = memory.known_stats(args.tokenizer, args.latent_stats)
        if args.tokenizer is None or stats is None:
            raise InputError(f"{args.ckpt} is not by train.py: give --tokenizer and --latent-stats")
        settings = {"tokenizer": args.tokenizer, "encoder": "unknown", "source": ""}
        meta = {"settings": settings, "classes": [], "mean": stats[0], "std": stats[1]}
        meta["class_counts"] = [1] * model.config.num_classes
    bank = load_bank(args.bank or f"{folder}/bank.pt", meta) if model.config.memory_dim else None
    data = f"{folder}/data"  # moved with the training, or where it was
    if not os.path.exists(f"{data}/latents.npy"):
        data = content.get("settings", {}).get("data", data)
    return model, {**meta, "step": content.get("step")}, bank, data


def load_bank(path, meta):
    """-> the bank in the file path; prints it, and whether it is another one than the training's"""
    bank = MemoryBank.load(path)
    settings = meta["settings"]
    same_bank = meta.get("bank") == bank.id
    if same_bank and not bank.classes:  # of an older version
        mirrored = meta["images"] if settings["flip"] else 0
        bank = replace(bank, classes=meta["classes"], mirrored=mirrored)
    if process_rank() == 0:
        print(f"bank: {bank}{'' if same_bank else ', not the one of the training'}")
        trained_on = memory.last_part(settings.get("features") or settings["encoder"])
        if bank.encoder != trained_on:
            print(f"warning: its encoder is {bank.encoder}, that of the training {trained_on}")
    return bank


@dataclass
class Plan:
    """What is made: images of snippets s (B, D) and labels y (B,)"""

    ids: list  # image i begins with the noise numbered ids[i]
    s: torch.Tensor = None
    y: torch.Tensor = None
    given: np.ndarray = None  # added images (R, H, W, 3), at the start of the lines of the grid
    columns: int = None  # of the grid
    bank: MemoryBank = None  # extended by the given images


def make_plan(args, meta, bank, config, size, device):
    """-> Plan, as the flags have it"""
    n = args.num_images or (8 if args.add or args.mix else 64)
    plan = Plan(list(range(n)))

    def features_of(images):
        encoder = args.encoder or meta["settings"]["encoder"]
        if args.encoder is None and memory.last_part(encoder) != bank.encoder:
            raise InputError(f"the bank was made by {bank.encoder}: give its weights, --encoder")
        return memory.encode_features(images, encoder, device)

    rows = None  # of the bank, shown or (--new) varied below; None: plan.s is set here
    if args.add:  # a line for each image: its snippet, n noises
        plan.given = read_images(args.add, size)
        rows = torch.arange(len(bank), len(bank) + len(plan.given)).repeat_interleave(n)
        bank = bank.extend(features_of(plan.given))
        plan.ids = plan.ids * len(plan.given)
        plan.columns = n + 1
        plan.bank = bank
    elif args.mix:  # one line: from a snippet to the other, one noise
        a, b = (end_of_mix(end, bank, features_of, size) for end in args.mix)
        plan.s = memory.mix(a, b, torch.linspace(0, 1, n)[:, None])
        plan.ids = [0] * n
        plan.columns = n
    elif args.snippets:
        features = memory.float_tensor(memory.load_features(args.snippets), "cpu")
        plan.s = memory.unit_norm(features)
        plan.ids = list(range(len(plan.s)))
    elif bank is not None:
        rows = torch.arange(len(bank))
        if args.label is not None:
            counts = bank.labels[bank.labels >= 0].bincount().tolist()
            rows = rows[bank.labels == class_number(args.label, bank.classes, counts)]
        rows = rows[draw_indices(plan.ids, args.seed, len(rows))]
    if args.new:
        bank = bank.to(device)
        plan.s = new_snippets(bank, rows, plan.ids, args.seed, args.spread)
        if process_rank() == 0:
            ratio = novelty(bank, rows[:1000], plan.s[:1000])
            print(f"new snippets' distance to the bank, relative to that of its rows: {ratio:.2f}")
    elif rows is not None:
        plan.s = bank[rows]
    if plan.s is not None and plan.s.shape[1:] != (config.memory_dim,):
        raise InputError(f"snippets {tuple(plan.s.shape)}, expected (N, {config.memory_dim})")
    if config.num_classes:
        counts = meta["class_counts"]
        labels = torch.repeat_interleave(torch.tensor(counts))  # i stands counts[i] times
        if args.label is not None:
            labels = torch.tensor([class_number(args.label, meta["classes"], counts)])
        plan.y = labels[draw_indices(plan.ids, args.seed, len(labels))]
    return plan


def make_images(args, model, meta, tokenizer, plan):
    """Generates the images of a plan, batch by batch, in files of OUT.parts -> (N, H, W, 3)"""
    sampler = {name: getattr(args, name) for name in SAMPLER}
    settings = {**sampler, "step": meta["step"], "block": args.batch_size}  # must agree to go on
    settings.update(tokenizer=args.tokenizer, mean=meta["mean"], std=meta["std"])
    settings["weights"] = zlib.crc32(model.x_embedder.proj.weight.numpy(force=True))  # enough
    for name in ("ids", "s", "y"):
        values = getattr(plan, name)
        settings[name] = None if values is None else zlib.crc32(np.ascontiguousarray(values))
    size = model.config.input_size * tokenizer.factor
    n = len(plan.ids)
    arrays = {"images": ((n, size, size, 3), "uint8")}
    blocks = memory.ResumableArrays(f"{args.out}.parts", settings, arrays, n, args.batch_size)
    for rows in blocks.fill("sampling"):
        part = slice(rows.start, rows.stop)
        s = None if plan.s is None else plan.s[part]
        y = None if plan.y is None else plan.y[part]
        x = generate(model, plan.ids[part], s, y, **sampler)
        blocks.arrays["images"][part] = decode(x, meta, tokenizer)
    return blocks.arrays["images"]


def main():
    args = read_arguments()
    device = memory.init_distributed(args.device)
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, meta, bank, data = load_checkpoint(args, device)
    config = model.config
    name = args.tokenizer or meta["settings"]["tokenizer"]
    tokenizer = memory.process_zero_first(load_tokenizer, name, device)
    if not tokenizer.channels == len(meta["mean"]) == config.in_channels:
        raise InputError(f"{name} and its statistics: expected {config.in_channels} channels")
    needs_memory = args.new or args.add or args.mix or args.snippets
    if bank is None and (needs_memory or (args.label and not config.num_classes)):
        raise InputError(f"{args.ckpt} has no memory (for --new, --add, ..), no classes (--label)")
    size = config.input_size * tokenizer.factor
    unseen = memory.Images(args.audit, size) if args.audit else None
    if args.audit is not None:
        now = json.loads(Path(data, "meta.json").read_text())["bank"]
        memory.refuse_differences(meta, {"bank": now}, f"{args.ckpt} was trained")
    plan = make_plan(args, meta, bank, config, size, device)
    if args.compile:
        model = torch.compile(model)

    images = make_images(args, model, meta, tokenizer, plan)
    if process_rank() == 0:
        picture = images
        if plan.given is not None and args.out.lower().endswith(".png"):
            starts = range(0, len(images), plan.columns - 1)  # of the lines of the grid
            picture = np.insert(images, starts, plan.given, axis=0)
        save_images(picture, args.out, plan.columns)
        print(f"wrote {args.out}")
        if args.save_bank:
            plan.bank.save(args.save_bank)
        if args.audit is not None:
            write_audit(args.out, images, unseen, meta, data, tokenizer, device)
        del images, picture  # maps of a file that is removed
        shutil.rmtree(f"{args.out}.parts")


if __name__ == "__main__":
    memory.cli(main)
