"""Samples from a GMem checkpoint: snippets of the bank, and the flow from noise (t=0) to data (t=1).

    ODE  dx = v dt
    SDE  dx = (v + w (t v - x) / (1 - t)) dt + sqrt(2 w) dW     w(t) = 1 - t, the score is (t v - x) / (1 - t)
    guidance  v = v_null + cfg (v_s - v_null)                   where LO <= t <= HI

    python sample.py --ckpt out/ckpt.pt                                  # a grid: out/samples.png
    torchrun --nproc_per_node=8 sample.py --ckpt C --num-images 50000 --out s.npz  # ADM: uint8 (N, H, W, 3)
    python sample.py --ckpt C --add new.png photos/                      # external memory: unseen images
    python sample.py --ckpt C --mix a.png b.png                          # internal memory; bank rows also do
    python sample.py --ckpt C --audit                                    # does it copy the training data?
    python sample.py --ckpt SiT-XL-2-256.pt --tokenizer sd-vae-ft-ema    # official weights

Image i depends on (seed, i) alone, not on batch size or number of processes (but for rounding)."""
import os
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from memory import (PIXELS, Blocks, Images, MemoryBank, Parser, best_device, cli, encode_all, fraction,
                    init_distributed, latent_stats, load_array, load_encoder, load_tokenizer, mask,
                    mix, positive, rank_world, replacing, within)
from model import load_file, load_sit

# ----------------------------------------------------------------------------- samplers

def ode(v, z, steps, method="heun", shift=0.0):
    """v(x, t) -> velocity, t (B,); z: noise (B, ...); method: "euler" (order 1) or "heun" (2, but for
    the last step: no network has learned what to do at t=1) -> x at t=1
    shift s > 0 maps the time grid by t -> s t / (1 + (s-1) t); s < 1 puts more steps near the noise"""
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if shift > 0:
        times = shift * times / (1 + (shift - 1) * times)
    x, at = z, lambda t: z.new_full((len(z),), t)
    for t, t1 in zip(times.tolist(), times[1:].tolist()):
        k = v(x, at(t))
        if method == "heun" and t1 < times[-1]:
            k = (k + v(x + (t1 - t) * k, at(t1))) / 2
        x = x + (t1 - t) * k
    return x

def sde(v, z, steps, method="heun", noise=torch.randn_like, diffusion=1.0, last_step=0.004):
    """As ode, with noise of w(t) = diffusion (1 - t); method: "euler" (Euler-Maruyama) or "heun".
    noise(x) -> standard normal numbers of x's shape. The last step, of size last_step, has none ("mean").
    The defaults are the official GMem's; its num_steps are points, one more than our steps."""
    def drift(x, t):
        t = x.new_full((len(x),), t)
        k = v(x, t)
        return k + diffusion * (t.view(-1, *[1] * (x.ndim - 1)) * k - x)

    x, dt = z, (1 - last_step) / steps
    for t in (i * dt for i in range(steps)):
        dw = (2 * diffusion * (1 - t) * dt) ** 0.5 * noise(x)
        if method == "heun":
            x = x + dw
            k = drift(x, t)
            x = x + dt / 2 * (k + drift(x + dt * k, t + dt))
        else:
            x = x + dt * drift(x, t) + dw
    return x + last_step * drift(x, 1 - last_step)

def guided(model, s=None, y=None, cfg=1.0, interval=(0.0, 1.0)):
    """-> v(x, t), with guidance; the null half is computed only where guidance acts"""
    if cfg == 1:
        return lambda x, t: model(x, t, s, y)
    s2 = None if s is None else torch.cat([s, torch.zeros_like(s)])
    y2 = None if y is None else torch.cat([y, torch.full_like(y, model.config.num_classes)])

    def v(x, t):
        if interval[0] - 1e-6 <= float(t[0]) <= interval[1] + 1e-6:  # t is float32
            v_s, v_null = model(torch.cat([x, x]), torch.cat([t, t]), s2, y2).float().chunk(2)
            return torch.lerp(v_null, v_s, cfg)
        return model(x, t, s, y)
    return v

# ----------------------------------------------------------------------------- images

def seed_of(*key):
    """whole numbers >= 0 -> a seed for torch that mixes all of them"""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

def streams(ids, seed):
    """-> for each image its own generator, whose first draw is the row of the bank (with memory)"""
    return [torch.Generator().manual_seed(seed_of(1, seed, i)) for i in ids]  # 0: training

def draw(generators, f, *args):
    return torch.stack([f(*args, generator=g) for g in generators])

@torch.no_grad()
def generate(model, ids, bank=None, seed=0, method="heun", steps=25, shift=0.0, cfg=1.0, interval=(0.0, 1.0),
             mask_ratio=0.0, label=None, s=None):
    """The images numbered ids of the stream `seed` -> (B, C, H, W) latents as the model was trained on.
    With memory the snippets are drawn from bank, or are s (B, D); labels are drawn, or all are `label`."""
    config, device, g, y = model.config, next(model.parameters()).device, streams(ids, seed), None
    shape = config.in_channels, config.input_size, config.input_size
    if config.memory_dim:
        s = bank[draw(g, torch.randint, len(bank), ()).numpy()] if s is None else s
        if mask_ratio:
            mean = model.memory_mean.cpu() if config.memory_center else 0
            s = torch.cat([mean + mask(a[None] - mean, mask_ratio, b) for a, b in zip(s, g)])
        s = s.to(device)
    if config.num_classes:
        y = draw(g, torch.randint, config.num_classes, ()).to(device)
        y = y if label is None else torch.full_like(y, label)
    v = guided(model, s, y, cfg, interval)
    noise = lambda x=None: draw(g, torch.randn, shape).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        flow = lambda x, t: v(x, t).float()
        if method.startswith("sde-"):
            return sde(flow, noise(), steps, method[4:], noise=noise)
        return ode(flow, noise(), steps, method, shift)

def decode(x, meta, tokenizer=PIXELS):
    """latents as the model makes them (B, C, h, w) -> uint8 images (B, H, W, 3), numpy"""
    mean, std = (torch.tensor(meta[k], device=x.device)[:, None, None] for k in ("mean", "std"))
    images = torch.cat([tokenizer.decode(z) for z in (x * std + mean).split(16)])  # as many as fit
    return ((images + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

def grid(images, columns=None):
    """uint8 (N, H, W, 3) -> PIL image; small images are enlarged by a whole number"""
    n, h, w, _ = images.shape
    columns = columns or max(1, round(n ** 0.5))
    rows, k = -(-n // columns), max(1, 64 // h)
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    return Image.fromarray(sheet.repeat(k, 0).repeat(k, 1))

def save_images(images, out, columns=None):
    """uint8 (N, H, W, 3), may be a memmap -> a grid (.png), an .npz, or a folder of PNGs"""
    if out.endswith((".png", ".npz")):
        with replacing(out) as tmp, open(tmp, "wb") as f:
            np.savez(f, arr_0=images) if out.endswith(".npz") else grid(images, columns).save(f, "PNG")
    else:
        os.makedirs(out, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(os.path.join(out, f"{i:06d}.png"))

def scaled(latents, meta):
    """latents as they are stored (B, C, h, w) -> as the model is shown them; decode undoes it"""
    mean, std = (torch.tensor(meta[k])[:, None, None] for k in ("mean", "std"))
    return (torch.from_numpy(np.array(latents)).float() - mean) / std

# ----------------------------------------------------------------------------- the model and its memory

def load_checkpoint(path):
    """A checkpoint of train.py, mapped into memory -> dict (keys: see train.py)"""
    return load_file(path, {}, "step model ema optimizer config meta args bank skipped".split())

def load_model(args, device):
    """-> model, tokenizer, meta, bank and its path (None, None: has none), of a file of train.py or official
    weights; what those do not say (--tokenizer, --bank, --latent-stats) has to be in args"""
    ckpt = load_file(args.ckpt)
    model, path, was = load_sit(ckpt).to(device), args.bank, None
    if "meta" in ckpt:
        ckpt = load_checkpoint(args.ckpt)
        meta, about, was = ckpt["meta"], f"step {ckpt['step']:,}", ckpt["bank"]["id"]
        path = path or os.path.join(os.path.dirname(os.path.realpath(args.ckpt)), ckpt["bank"]["path"])
    elif not args.tokenizer or (model.config.memory_dim and not path):
        raise ValueError(f"{args.ckpt} is not by train.py: name --tokenizer, and with memory --bank")
    else:
        meta, about = dict(settings=dict(tokenizer=args.tokenizer)), "official weights"
        meta.update(zip(("mean", "std"), latent_stats(args.tokenizer, args.latent_stats)))
    tokenizer = load_tokenizer(args.tokenizer or meta["settings"]["tokenizer"], device)
    meta["settings"]["image_size"] = model.config.input_size * tokenizer.factor
    say = print if rank_world()[0] == 0 else lambda *a: None
    say(f"{args.ckpt}: {about}, {sum(p.numel() for p in model.parameters()):,} parameters, on {device}")
    if not model.config.memory_dim:
        return model, tokenizer, meta, None, None
    if not os.path.exists(path):
        raise ValueError(f"the bank {path} is not there; give it by --bank")
    bank, trained = MemoryBank.load(path), meta["settings"].get("encoder", "unknown")
    if bank.dim != model.config.memory_dim:
        raise ValueError(f"the snippets of {path} have {bank.dim} numbers, not {model.config.memory_dim}")
    if bank.encoder != trained and "unknown" not in (bank.encoder, trained):
        raise ValueError(f"{path} holds snippets of {bank.encoder}, the model was trained on {trained}")
    say(f"bank: {bank}" + (f"; not the bank of training, {was}" if was not in (None, bank.id) else ""))
    return model, tokenizer, meta, bank, path

def given(paths, meta):
    """image files, folders or arrays -> uint8 (N, S, S, 3)"""
    sets = [Images(path, meta["settings"]["image_size"]) for path in paths]
    return np.stack([x[i] for x in sets for i in range(len(x))])

def audit(x, own, data, meta, heldout):
    """Does the model copy? x: (B, ...) generated; own: (B,) rows of their snippets; data: latents (N, ...);
    heldout: latents of images that it never saw, or None. Prints distances, root mean squares over a latent
    as the model sees it -> (B,) the row of data nearest to each x"""
    flat = lambda z: scaled(z, meta).flatten(1)

    def nearest(x, skip=None):
        best, row = torch.full((len(x),), torch.inf), torch.zeros(len(x), dtype=torch.long)
        for i in tqdm(range(0, len(data), 1024), "comparing", unit="block", leave=False):
            d = torch.cdist(x, flat(data[i:i + 1024])) / x.shape[1] ** 0.5
            if skip is not None:
                d[skip[:, None] == torch.arange(i, i + d.shape[1])] = torch.inf
            d, at = d.min(1)
            best, row = torch.minimum(best, d), torch.where(d < best, at + i, row)
        return best, row

    x, some = x.flatten(1), torch.arange(0, len(data), -(-len(data) // len(x)))
    near, row = nearest(x)
    distances = {"generated image to the image of its snippet": (x - flat(data[own])).square().mean(1).sqrt(),
                 "generated image to the nearest training image": near,
                 "training image to the nearest other one": nearest(flat(data[some.numpy()]), some)[0]}
    if heldout is not None:
        distances["held-out image to the nearest training image"] = nearest(flat(heldout))[0]
    for what, d in distances.items():
        print(f"{what:<52} median {d.median():.3f}, least {d.min():.3f}")
    print(f"the image of its snippet is the nearest: {100 * (row.numpy() == own).mean():.1f} %")
    return row.numpy()

# ----------------------------------------------------------------------------- the command line

def main():
    parser = Parser(description="Samples from a GMem checkpoint.", allow_abbrev=False)
    add = parser.add_argument
    add("--ckpt", required=True)
    add("--out", help=".png (a grid), .npz, or a folder (default: a .png beside CKPT)")
    add("--num-images", type=positive, help="in all (64); with --add or --mix in each row (8)")
    add("--batch-size", type=positive, default=64, help="of one process")
    add("--seed", type=within(0), default=0)
    add("--method", choices=("euler", "heun", "sde-euler", "sde-heun"), default="heun")
    add("--steps", type=positive, default=25)
    add("--shift", type=within(0, kind=float), default=0.0, help="of the ODE's time grid")
    add("--cfg", type=within(-1e9, kind=float), default=1.0, help="guidance; 1: none")
    add("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"))
    add("--mask", type=fraction, default=0.0, help="part of the snippet's entries set to 0")
    add("--label", type=int, help="the label of all images (models with labels)")
    add("--add", nargs="+", metavar="IMAGES", help="files, folders: a row of images for each one")
    add("--save-bank", metavar="BANK", help="with --add: the bank extended by their snippets")
    add("--mix", nargs=2, metavar=("A", "B"), help="a row from A to B: images, or rows of the bank")
    add("--mix-method", choices=("slerp", "lerp", "concat", "mask"), default="slerp")
    add("--audit", nargs="?", const="", metavar="IMAGES", help="compare with the training data, and IMAGES")
    add("--bank", help="a bank other than the checkpoint's")
    add("--encoder", help="for --add and --mix: a file with the weights of the bank's encoder")
    add("--tokenizer", help="of official weights, or a file with the weights of the checkpoint's")
    add("--latent-stats", help="with official weights: .pt of mean and std of VA-VAE's latents")
    add("--device")
    add("--compile", action="store_true", help="the network, by torch.compile")
    args = parser.parse_args()
    if not args.cfg_interval[0] <= args.cfg_interval[1]:
        raise ValueError(f"--cfg-interval {args.cfg_interval}: LO is above HI")
    if args.shift and args.method.startswith("sde-"):
        raise ValueError(f"--shift {args.shift} is of the ODE's time grid; --method {args.method} has none")
    modes = [k for k in ("add", "mix", "audit") if getattr(args, k) is not None]
    if len(modes) > 1 or (args.save_bank and not args.add):
        raise ValueError("--add, --mix and --audit exclude each other; --save-bank goes with --add")
    if os.path.isdir(args.ckpt):
        args.ckpt = os.path.join(args.ckpt, "ckpt.pt")
    name = {"add": "added.png", "mix": "mixed.png", "audit": "audit.png"}.get("".join(modes), "samples.png")
    out = args.out or os.path.join(os.path.dirname(args.ckpt), name)
    if os.path.splitext(out)[1] not in ("", ".png", ".npz"):
        raise ValueError(f"--out {out} is neither a .png nor an .npz nor a folder")
    device = best_device(args.device)
    init_distributed(device)
    me = rank_world()[0]
    model, tokenizer, meta, bank, path = load_model(args, device)
    model = torch.compile(model) if args.compile else model
    config, size = model.config, meta["settings"]["image_size"]
    if args.label is not None and not 0 <= args.label < config.num_classes:
        raise ValueError(f"--label {args.label}: this model has {config.num_classes} labels, counted from 0")
    if modes and bank is None:
        raise ValueError(f"--{modes[0]}: this model has no memory")

    # what is made: with the noises ids, of the snippets s (None: drawn from the bank)
    n = args.num_images or (8 if args.add or args.mix else 64)
    ids, s, columns, images = range(n), None, None, np.empty(0)
    encode = lambda images: encode_all(load_encoder(args.encoder or bank.encoder, device), images, device)
    if args.add:  # a row for each image: its snippet, n noises
        images = given(args.add, meta)
        more = bank.extend(encode(images))
        ids, s, columns = [*ids] * len(images), more[len(bank):].repeat_interleave(n, 0), n + 1
    if args.audit is not None:
        data, others = load_array(os.path.join(os.path.dirname(path), "latents.npy")), None
        if data.shape != (len(bank), config.in_channels, *2 * [config.input_size]):
            raise ValueError(f"--audit needs the bank of training, and its latents: beside {path}, of "
                             f"{len(bank):,} rows, are latents {data.shape}")
        if args.audit:
            others = given([args.audit], meta)
            others = encode_all(tokenizer.encode, others[::-(-len(others) // n)], device).numpy()
    if args.mix:  # one row: from a snippet to the other, one noise
        def end(text):
            if not text.lstrip("-").isdigit() or os.path.exists(text):
                return bank.extend(encode(given([text], meta)))[-1].expand(n, -1)
            if not 0 <= int(text) < len(bank):
                raise ValueError(f"--mix {text} is no file, and no row of {len(bank):,} in the bank")
            return bank[int(text)].expand(n, -1)
        g, alpha = torch.Generator().manual_seed(args.seed), torch.linspace(0, 1, n)[:, None]
        ids, s, columns = [0] * n, mix(*map(end, args.mix), alpha, args.mix_method, g), n

    if not out.endswith((".png", ".npz")) and os.path.exists(out) and (
            not os.path.isdir(out) or len(os.listdir(out)) > len(ids) + len(images)):
        raise ValueError(f"--out {out} is a file, or a folder with more files than there will be images")
    if args.save_bank and me == 0:
        more.save(args.save_bank)

    # making it, batch by batch; a run with the same settings goes on with what a killed one has left
    skip, file = ("out", "batch_size", "device", "save_bank", "compile"), os.stat(args.ckpt)
    settings = {k: v for k, v in vars(args).items() if k not in skip}
    settings.update(ckpt=[os.path.abspath(args.ckpt), file.st_size, file.st_mtime_ns], id=bank and bank.id,
                    given=zlib.crc32(images))
    arrays = {"images.npy": ((len(ids), size, size, 3), "uint8")}
    if args.audit is not None:
        arrays["latents.npy"] = (len(ids), config.in_channels, *2 * [config.input_size]), "float32"
    blocks = Blocks(out + ".parts", settings, arrays, args.batch_size)
    total = sum(map(len, blocks.todo))
    with tqdm(total=total, desc="sampling", unit="img", disable=me > 0) as bar, ThreadPoolExecutor(1) as pool:
        def finish(rows, x):
            blocks.write(rows, images=decode(x, meta, tokenizer), latents=x.cpu())
            bar.update(len(rows))
        # a GPU makes the next batch while this one is decoded and written; on a CPU both would want the cores
        job, later = None, pool.submit if device.type == "cuda" else lambda f, *args: f(*args)
        for rows in blocks.todo:
            part = slice(rows.start, rows.stop)
            x = generate(model, ids[part], bank, args.seed, args.method, args.steps, args.shift, args.cfg,
                         args.cfg_interval, args.mask, args.label, None if s is None else s[part])
            if job:
                job.result()
            job = later(finish, rows, x)
        if job:
            job.result()
    blocks.finish()
    if me > 0:
        return

    # what is shown of it
    made = blocks.arrays["images.npy"]
    if args.add:  # each row begins with the image that was given
        made = np.hstack([images[:, None], made.reshape(-1, n, size, size, 3)]).reshape(-1, size, size, 3)
    if args.audit is not None:  # below the first images: those of their snippets, and the nearest ones
        own = draw(streams(ids, args.seed), torch.randint, len(bank), ()).numpy()
        near = audit(torch.from_numpy(np.array(blocks.arrays["latents.npy"])), own, data, meta, others)
        known = scaled(np.concatenate([data[own[:16]], data[near[:16]]]), meta).to(device)
        made, columns = np.concatenate([made[:16], decode(known, meta, tokenizer)]), min(16, n)
    save_images(made, out, columns)
    shutil.rmtree(out + ".parts")
    print(f"wrote {out}")

if __name__ == "__main__":
    cli(main)
