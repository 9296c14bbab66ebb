"""
Samples from a GMem checkpoint: draw snippets from the bank, follow the flow from noise (t=0) to data (t=1).

    ODE  dx = v dt
    SDE  dx = (v + w (t v - x) / (1 - t)) dt + sqrt(2 w) dW     w(t) = 1 - t, the score is (t v - x) / (1 - t)
    guidance  v = v_null + cfg (v_s - v_null)                   where LO <= t <= HI

    python sample.py --ckpt out/ckpt.pt                                  # a grid: out/samples.png
    python sample.py --ckpt out/ckpt.pt --num-images 50000 --out s.npz   # ADM: arr_0 uint8 (N, H, W, 3)
    torchrun --nproc_per_node=8 sample.py --ckpt out/ckpt.pt --num-images 50000 --out s.npz

Image i depends on (seed, i) alone: not on the batch size, nor on the number of processes (but for rounding).
"""
import argparse
import os
import shutil

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from memory import (Blocks, MemoryBank, best_device, cli, init_distributed, load_pt, mask, rank_world,
                    replacing)
from model import load_sit

# ----------------------------------------------------------------------------- samplers


def ode(v, z, steps, method="heun", shift=0.0):
    """
    v(x, t) -> velocity, t (B,); z: noise (B, ...); method: "euler" (order 1) or "heun" (order 2) -> x at t=1
    shift s > 0 maps the time grid by t -> s t / (1 + (s-1) t); s < 1 puts more steps near the noise
    """
    times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if shift > 0:
        times = shift * times / (1 + (shift - 1) * times)
    x, times = z, times.tolist()
    for t, t1 in zip(times, times[1:]):
        k = v(x, x.new_full((len(x),), t))
        if method == "heun":
            k = (k + v(x + (t1 - t) * k, x.new_full((len(x),), t1))) / 2
        x = x + (t1 - t) * k
    return x


def sde(v, z, steps, method="heun", noise=torch.randn_like, diffusion=1.0, last_step=0.004):
    """
    As ode, with noise of w(t) = diffusion (1 - t); method: "euler" (Euler-Maruyama) or "heun".
    noise(x) -> standard normal numbers of x's shape. The last step, of size last_step, has none ("mean").
    The defaults are the official GMem's; its num_steps are points, one more than our steps.
    """
    def drift(x, t):
        t = x.new_full((len(x),), t)
        k = v(x, t)
        return k + diffusion * (t.view(-1, *[1] * (x.ndim - 1)) * k - x)

    x, dt = z, (1 - last_step) / steps
    for i in range(steps):
        t = i * dt
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
        if not interval[0] - 1e-6 <= float(t[0]) <= interval[1] + 1e-6:  # t is float32
            return model(x, t, s, y)
        v_s, v_null = model(torch.cat([x, x]), torch.cat([t, t]), s2, y2).chunk(2)
        return torch.lerp(v_null, v_s, cfg)
    return v


# ----------------------------------------------------------------------------- images


def seed_of(*key):
    """whole numbers >= 0 -> a seed for torch that mixes all of them"""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@torch.no_grad()
def generate(model, ids, bank=None, seed=0, method="heun", steps=25, shift=0.0, cfg=1.0, interval=(0.0, 1.0),
             mask_ratio=0.0, label=None):
    """
    The images numbered ids of the stream `seed` -> (B, C, H, W) latents as the model was trained on.
    With memory the snippets are drawn from bank, with labels the labels uniformly (or all are `label`).
    """
    config, device = model.config, next(model.parameters()).device
    shape = (config.in_channels, config.input_size, config.input_size)
    streams = [torch.Generator().manual_seed(seed_of(1, seed, i)) for i in ids]  # 0: training
    draw = lambda f, *args: torch.stack([f(*args, generator=g) for g in streams])  # each image from its own
    s = y = None
    if config.memory_dim:
        s = bank[draw(torch.randint, len(bank), ()).numpy()]
        if mask_ratio:
            s = torch.cat([mask(a[None], mask_ratio, g) for a, g in zip(s, streams)])
        s = s.to(device)
    if config.num_classes:
        y = draw(torch.randint, config.num_classes, ()).to(device)
        y = y if label is None else torch.full_like(y, label)
    v, z = guided(model, s, y, cfg, interval), draw(torch.randn, shape).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        flow = lambda x, t: v(x, t).float()
        if method.startswith("sde-"):
            return sde(flow, z, steps, method[4:], noise=lambda x: draw(torch.randn, shape).to(device))
        return ode(flow, z, steps, method, shift)


def decode(x, meta):
    """latents as the model makes them (B, C, h, w) -> uint8 images (B, H, W, 3), numpy"""
    mean, std = (torch.tensor(meta[k], device=x.device)[:, None, None] for k in ("mean", "std"))
    return (x * std + mean).clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(images, columns=None):
    """uint8 (N, H, W, 3) -> PIL image; small images are enlarged by a whole number"""
    n, h, w, _ = images.shape
    columns = columns or max(1, round(n ** 0.5))
    rows, k = -(-n // columns), max(1, 64 // h)
    sheet = np.full((rows * columns, h, w, 3), 255, np.uint8)
    sheet[:n] = images
    sheet = sheet.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
    return Image.fromarray(sheet.repeat(k, 0).repeat(k, 1))


def save_images(images, out):
    """uint8 (N, H, W, 3), may be a memmap -> a grid (.png), an .npz, or a folder of PNGs"""
    if out.endswith(".png"):
        with replacing(out) as tmp:
            grid(images).save(tmp, format="PNG")
    elif out.endswith(".npz"):
        with replacing(out) as tmp, open(tmp, "wb") as f:
            np.savez(f, arr_0=images)
    else:
        os.makedirs(out, exist_ok=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(os.path.join(out, f"{i:06d}.png"))


def load_checkpoint(path):
    """A checkpoint of train.py, mapped into memory -> dict (keys: see train.py)"""
    return load_pt(path, ("step", "model", "ema", "optimizer", "config", "meta", "args", "bank"))


def main():
    parser = argparse.ArgumentParser(description="Samples from a GMem checkpoint.")
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--out", help=".png (a grid), .npz, or a folder (samples.png beside CKPT)")
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64, help="of one process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("euler", "heun", "sde-euler", "sde-heun"), default="heun")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--shift", type=float, default=0.0, help="of the time grid (ODE); official GMem: 0.3")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance; 1: none")
    parser.add_argument("--cfg-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"))
    parser.add_argument("--mask", type=float, default=0.0, help="part of the snippet's entries set to zero")
    parser.add_argument("--label", type=int, help="the label of all images (models with labels)")
    parser.add_argument("--bank", help="a bank other than the checkpoint's")
    parser.add_argument("--device")
    args = parser.parse_args()
    for name in ("num_images", "batch_size", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    lo, hi = args.cfg_interval
    if not 0 <= args.mask < 1 or args.seed < 0 or args.shift < 0 or lo > hi:
        raise ValueError("--mask must be in [0, 1), --seed and --shift not negative, LO not above HI")
    if args.shift and args.method.startswith("sde-"):
        raise ValueError(f"--shift {args.shift} is of the ODE's time grid; --method {args.method} has none")
    if os.path.isdir(args.ckpt):
        args.ckpt = os.path.join(args.ckpt, "ckpt.pt")
    home = os.path.dirname(os.path.realpath(args.ckpt))
    out = args.out or os.path.join(os.path.dirname(args.ckpt), "samples.png")
    if os.path.splitext(out)[1] not in ("", ".png", ".npz"):
        raise ValueError(f"--out {out} is neither a .png nor an .npz nor a folder")
    ckpt = load_checkpoint(args.ckpt)
    device = best_device(args.device)
    init_distributed(device)
    me = rank_world()[0]
    model, bank = load_sit(ckpt).to(device), None
    say = print if me == 0 else lambda *a: None
    count = sum(p.numel() for p in model.parameters())
    say(f"{args.ckpt}: step {ckpt['step']:,}, {count:,} parameters, on {device}")
    if args.label is not None and not 0 <= args.label < model.config.num_classes:
        raise ValueError(f"--label {args.label}: this model has {model.config.num_classes} labels, from 0")
    if model.config.memory_dim:
        path = args.bank or os.path.join(home, ckpt["bank"]["path"])
        if not os.path.exists(path):
            raise ValueError(f"the bank {path} is not there; give it by --bank")
        bank = MemoryBank.load(path)
        if bank.dim != model.config.memory_dim:
            raise ValueError(f"the bank's snippets have {bank.dim} numbers, not {model.config.memory_dim}")
        other = "" if bank.id == ckpt["bank"]["id"] else f"; not the bank of training, {ckpt['bank']['id']}"
        say(f"bank: {bank}{other}")
    size, stat = ckpt["meta"]["settings"]["image_size"], os.stat(args.ckpt)
    settings = {k: v for k, v in vars(args).items() if k not in ("ckpt", "out", "batch_size", "device")}
    settings.update(ckpt=[os.path.abspath(args.ckpt), stat.st_size, stat.st_mtime_ns], id=bank and bank.id)
    blocks = Blocks(out + ".parts", settings, {"images.npy": ((args.num_images, size, size, 3), "uint8")},
                    args.batch_size)
    bar = tqdm(total=sum(map(len, blocks.todo)), desc="sampling", unit="img", disable=me > 0)
    for rows in blocks.todo:
        x = generate(model, rows, bank, args.seed, args.method, args.steps, args.shift, args.cfg,
                     args.cfg_interval, args.mask, args.label)
        blocks.write(rows, images=decode(x, ckpt["meta"]))
        bar.update(len(rows))
    bar.close()
    blocks.finish()
    if me == 0:
        save_images(blocks.arrays["images.npy"], out)
        shutil.rmtree(out + ".parts")
        print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
