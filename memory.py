"""
The memory of GMem (arXiv 2412.08781): from images to what training reads.

    snippet        s_i = f_i / |f_i|                       f_i: features of image i under a frozen encoder
    truncated SVD  s_i ~ mean + sum_k c_ik basis_k         k = 1 .. rank, then scaled to unit norm again
    mask           a random part of the entries of s set to zero, the rest divided by 1 - ratio

A bank is built once and never changes. It is one file, mapped into memory by all processes of a machine.

    python memory.py --data SRC --out DIR [--image-size 256] [--rank 64] [--dtype int8] [--flip]
    python memory.py --data SRC --out DIR --features F.npy # features (N, D) that were encoded elsewhere
    python memory.py --features F.npy --out bank.pt        # a bank alone

SRC is a folder of images (flat, or class sub-folders, which become labels), an .npy or .npz of uint8
(N, H, W, 3), or `glyphs`, a data set drawn on the spot. DIR gets latents.npy, labels.npy, bank.pt, meta.json.
"""
import argparse
import hashlib
import json
import os
import pickle
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

RANK = 64     # of a bank, by default
BLOCK = 4096  # rows that are worked on at a time

# ----------------------------------------------------------------------------- small pieces


def cli(main):
    """Runs main(); bad input ends as one line on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as e:
        text = str(e)
        if "Original Traceback" in text:  # from a DataLoader worker
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        print(f"{os.path.basename(sys.argv[0])}: error: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def replacing(path):
    """Gives a temporary name to write to, which takes the place of path once all is written."""
    tmp = f"{path}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        yield tmp
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def load_pt(path, keys):
    """torch.load of a dict with these keys, mapped into memory; ValueError for anything else"""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = ", ".join(sorted(set(keys) - set(state)))
    except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as e:
        raise ValueError(f"{path} is damaged, or not written by this program ({type(e).__name__})") from e
    if missing:
        raise ValueError(f"{path} is no file of the kind expected: it lacks {missing}")
    return state


def rank_world():
    """-> this process's rank, number of processes (0, 1 without torch.distributed)"""
    on = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if on else (0, 1)


def barrier():
    if rank_world()[1] > 1:
        dist.barrier()


def best_device(name=None):
    """-> torch.device: name, or the best there is; of several GPUs the one of this process"""
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = name or next(k for k in usable if usable[k])
    if not usable.get(name.split(":")[0]):
        raise ValueError(f"--device {name} is not to be had here, but {[k for k in usable if usable[k]]}")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)


def init_distributed(device):
    """Joins the processes that torchrun has started, if it has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


# ----------------------------------------------------------------------------- the memory bank


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """N unit-norm snippets of D numbers, as mean + coef @ basis; read-only. `full` banks have no basis."""
    mean: np.ndarray    # (D,) float32
    basis: np.ndarray   # (r, D) float32, orthonormal, most energy first; (0, D): coef is all
    scale: np.ndarray   # (r,) float32: what one step of coef is worth
    coef: np.ndarray    # (N, r) int8, float16 or float32
    labels: np.ndarray  # (N,) int64, -1 where there is none
    energy: float       # part of the variance that the basis keeps
    encoder: str        # what made the features

    def __post_init__(self):
        for a in (self.mean, self.basis, self.scale, self.coef, self.labels):
            a.setflags(write=False)
        self.__dict__["_copies"] = {}

    def __len__(self):
        return len(self.coef)

    @property
    def dim(self):
        return len(self.mean)

    @property
    def rank(self):
        return self.coef.shape[1]

    @cached_property
    def id(self):
        """hash of the content, 16 hexadecimal digits"""
        h = hashlib.sha256(self.encoder.encode())
        for a in (self.mean, self.basis, self.scale, self.coef, self.labels):
            h.update(np.ascontiguousarray(a))
        return h.hexdigest()[:16]

    @staticmethod
    def build(features, rank=RANK, dtype="int8", labels=None, encoder="unknown"):
        """
        features: (N, D) tensor, array or memmap of any float type; need not have unit norm
        rank: number of directions kept (see fit_rank); None: all features as they are, in float16
        dtype: of the coefficients, "int8", "float16" or "float32"; labels: (N,) integers
        One pass for mean and Gram matrix, its eigenvectors are the basis; one pass for the coefficients.
        """
        N, D = features.shape
        if dtype not in ("int8", "float16", "float32"):
            raise ValueError(f"dtype {dtype} of the bank is none of int8, float16, float32")
        rank = fit_rank(rank, N, D)
        labels = (np.full(N, -1) if labels is None else np.asarray(labels)).astype(np.int64)
        if rank is None:
            coef, (zeros, ones) = np.empty((N, D), np.float16), np.float32([[0] * D, [1] * D])
            for i, s in _blocks(features):
                coef[i:i + len(s)] = s
            return MemoryBank(zeros, np.empty((0, D), np.float32), ones, coef, labels, 1.0, encoder)
        total, gram = torch.zeros(D, dtype=torch.float64), torch.zeros(D, D, dtype=torch.float64)
        for _, s in _blocks(features):
            s = s.double()
            total += s.sum(0)
            gram.addmm_(s.T, s)
        mean = total / N
        values, vectors = torch.linalg.eigh(gram / N - torch.outer(mean, mean))
        values, basis = values.clamp_min(0), vectors[:, -rank:].flip(1).T.contiguous()  # eigh is ascending
        energy = float(values[-rank:].sum() / values.sum().clamp_min(1e-30))
        coef = np.empty((N, rank), np.float32)
        for i, s in _blocks(features):
            coef[i:i + len(s)] = (s.double() - mean) @ basis.T
        scale = np.ones(rank, np.float32)
        if dtype == "int8":
            scale = np.maximum(np.abs(coef).max(axis=0), 1e-12) / 127
            for i in range(0, N, BLOCK):
                coef[i:i + BLOCK] = np.rint(coef[i:i + BLOCK] / scale)
        return MemoryBank(mean.float().numpy(), basis.float().numpy(), scale, coef.astype(dtype, copy=False),
                          labels, energy, encoder)

    def save(self, path):
        """One file, readable by torch.load(weights_only=True)."""
        state = {k: getattr(self, k) for k in [f.name for f in fields(self)] + ["id"]}
        with replacing(path) as tmp:
            torch.save({k: torch.from_numpy(np.array(v)) if isinstance(v, np.ndarray) else v
                        for k, v in state.items()}, tmp)

    @staticmethod
    def load(path):
        """Maps the file: nothing is read until it is indexed."""
        keys = [f.name for f in fields(MemoryBank)]
        state = load_pt(path, keys + ["id"])
        bank = MemoryBank(*(v.numpy() if torch.is_tensor(v) else v for v in map(state.get, keys)))
        bank.__dict__["id"] = state["id"]  # as computed when it was built
        return bank

    def __getitem__(self, idx):
        """idx: int -> (D,); slice, list, array or tensor of B indices -> (B, D); unit-norm float32"""
        if torch.is_tensor(idx):
            idx = idx.cpu().numpy()
        s = self.unpack(torch.from_numpy(np.array(self.coef[idx], ndmin=2)))
        return s[0] if np.ndim(idx) == 0 and not isinstance(idx, slice) else s

    def unpack(self, rows):
        """rows of coef (B, r), a tensor on any device -> snippets (B, D)"""
        return self.decode(rows.float() * self._on(rows.device)[2])

    def decode(self, coef):
        """coefficients (B, r) float32 -> snippets (B, D), unit-norm"""
        mean, basis, _ = self._on(coef.device)
        return F.normalize(torch.addmm(mean, coef, basis) if len(basis) else coef, dim=-1)

    def project(self, features):
        """features (B, D), any norm -> coefficients (B, r) float32"""
        s = F.normalize(torch.as_tensor(features).float(), dim=-1)
        mean, basis, _ = self._on(s.device)
        return (s - mean) @ basis.T if len(basis) else s

    def _on(self, device):
        """-> mean, basis, scale as tensors, copied to a device once"""
        if device not in self._copies:
            arrays = self.mean, self.basis, self.scale
            self._copies[device] = [torch.tensor(a, device=device) for a in arrays]
        return self._copies[device]

    def __str__(self):
        size = sum(a.nbytes for a in (self.mean, self.basis, self.scale, self.coef))
        full = 4 * len(self) * self.dim
        return (f"N {len(self):,}, D {self.dim}, rank {self.rank} keeps {100 * self.energy:.1f} % of energy, "
                f"{self.coef.dtype}: {size / 1e6:,.1f} MB against {full / 1e6:,.1f} MB, id {self.id}")


def fit_rank(rank, N, D):
    """The default rank is lowered to what N snippets of D allow, and says so; any other is an error."""
    most = min(N, D)
    if rank == RANK > most:
        print(f"rank of the bank: {most} instead of {RANK}, for {N:,} snippets of {D}")
        return most
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(f"rank {rank} of the bank is not in 1 .. {most}, for {N:,} snippets of {D}")
    return rank


def _blocks(features):
    """Yields (first row, unit-norm float32 rows), a block at a time."""
    for i in range(0, len(features), BLOCK):
        s = features[i:i + BLOCK]
        s = (s if torch.is_tensor(s) else torch.from_numpy(np.array(s))).float()
        if not torch.isfinite(s).all():
            raise ValueError(f"features {i} to {i + len(s) - 1} hold NaN or infinity")
        yield i, F.normalize(s, dim=1)


def mask(s, ratio, generator=None):
    """Sets a random part of the entries of s (B, D) to zero and divides the rest by 1 - ratio, as dropout."""
    keep = torch.rand(s.shape, generator=generator) >= ratio
    return s * keep.to(s.device) / (1 - ratio)


# ----------------------------------------------------------------------------- images


def to_rgb(image):
    """PIL image of any mode -> RGB, upright, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """The crop of ADM and DiT: halved by box filter while twice too large, then bicubic, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    k = size / min(image.size)
    image = image.resize([round(side * k) for side in image.size], Image.BICUBIC)
    x, y = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((x, y, x + size, y + size))


def load_array(path):
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as e:
        raise ValueError(f"{path} is not an .npy file of numbers, or damaged") from e


def open_array(path):
    """-> (images, labels or None), of an .npy or .npz file; mapped into memory unless compressed."""
    if path.endswith(".npy"):
        return load_array(path), None
    try:
        with zipfile.ZipFile(path) as z:
            names = {i.filename.removesuffix(".npy"): i for i in z.infolist()}
    except zipfile.BadZipFile as e:
        raise ValueError(f"{path} is not an .npz, or damaged: {e}") from e
    found = np.load(path)
    labels = next((found[k] for k in ("labels", "arr_1") if k in names), None)
    info = names.get("arr_0") or names.get("images")
    if info is None:
        raise ValueError(f"{path} holds {', '.join(names)}; images are expected under arr_0 or images")
    if info.compress_type != zipfile.ZIP_STORED:
        return found[info.filename.removesuffix(".npy")], labels
    with open(path, "rb") as f:  # stored as it is: the array starts after the zip's and the .npy's header
        f.seek(info.header_offset + 26)
        f.seek(info.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist()))
        major, _ = np.lib.format.read_magic(f)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(f)
        return np.memmap(path, dtype, "r", f.tell(), shape, "F" if fortran else "C"), labels


def is_glyphs(src):
    return src.split(":")[0] == "glyphs"


class Images(torch.utils.data.Dataset):
    """images[i] -> uint8 (S, S, 3), from a folder, one file, an array file or `glyphs` (see the head)."""
    def __init__(self, src, size):
        self.size, self.array, self.files, labels, self.classes = size, None, None, None, []
        if is_glyphs(src):
            characters = src.partition(":")[2] or LETTERS
            self.array, labels = glyphs(size=size, characters=characters)
            self.classes = list(characters)
        elif os.path.isdir(src):
            known = Image.registered_extensions()
            self.files = sorted(os.path.join(d, f) for d, _, fs in os.walk(src, followlinks=True) for f in fs
                                if os.path.splitext(f)[1].lower() in known)
            if not self.files:
                raise ValueError(f"no images in the folder {src}")
            top = [os.path.relpath(f, src).split(os.sep)[:-1] for f in self.files]
            if all(top):
                self.classes = sorted({t[0] for t in top})
                number = {c: i for i, c in enumerate(self.classes)}
                labels = np.array([number[t[0]] for t in top])
            elif any(top):
                raise ValueError(f"{src} holds images beside class folders: put all of them in such, or none")
        elif src.endswith((".npy", ".npz")):
            self.array, labels = open_array(src)
            a = self.array
            if a.ndim != 4 or a.shape[3] != 3 or a.dtype != np.uint8 or not len(a):
                raise ValueError(f"{src} holds {a.dtype} {a.shape}; expected are images, uint8 (N, H, W, 3)")
            if labels is not None and (labels.shape != (len(a),) or labels.dtype.kind not in "iu"):
                raise ValueError(f"{src} holds labels {labels.dtype} {labels.shape} for {len(a)} images")
            self.classes = [] if labels is None else [str(i) for i in range(int(labels.max()) + 1)]
        else:
            self.files = [src]
        self.labels = np.full(len(self), -1) if labels is None else labels.astype(np.int64)

    def __len__(self):
        return len(self.files) if self.array is None else len(self.array)

    def __getitem__(self, i):
        if self.array is None:
            try:
                with Image.open(self.files[i]) as image:
                    image = to_rgb(image)
            except (OSError, Image.DecompressionBombError) as e:
                raise ValueError(f"{self.files[i]} cannot be read: {e}") from e
        elif self.array.shape[1:3] == (self.size, self.size):
            return np.array(self.array[i])
        else:
            image = Image.fromarray(self.array[i])
        return np.array(center_crop(image, self.size))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def glyphs(n=10400, size=16, seed=0, characters=LETTERS):
    """
    An embedded data set: characters in Pillow's own font, in turn, varied in size, place, angle and colours.
    -> images uint8 (n, size, size, 3), labels int64 (n,): index into characters
    Digits are left out, so that external memory has something never seen.
    """
    rng = np.random.default_rng([seed, size])
    labels, big = np.arange(n) % len(characters), 4 * size
    height, angle = (rng.uniform(0.8, 1, n) * big).astype(int), rng.uniform(-12, 12, n)
    place = rng.uniform(0.45, 0.55, (n, 2)) * big
    fonts = {h: ImageFont.load_default(h) for h in np.unique(height).tolist()}
    # light on dark or dark on light; half of the backgrounds are flat, half have a gradient in any direction
    front, back, end = rng.random((3, n, 3))
    end = np.where(rng.random((n, 1)) < 0.5, back, back + 0.6 * (end - back))
    dark, phi = rng.random((n, 1)) < 0.5, rng.uniform(0, 2 * np.pi, n)
    front = np.where(dark, 1 - 0.3 * front, 0.3 * front)
    back, end = (np.where(dark, 0.5 * c, 1 - 0.5 * c) for c in (back, end))
    y, x = np.mgrid[-0.35:0.35:size * 1j, -0.35:0.35:size * 1j][..., None]
    images = np.empty((n, size, size, 3), np.uint8)
    for i in tqdm(range(n), "drawing glyphs", unit="img", leave=False, disable=rank_world()[0] > 0):
        ink = Image.new("L", (big, big))
        ImageDraw.Draw(ink).text(tuple(place[i]), characters[labels[i]], 255, fonts[height[i]], "mm",
                                 stroke_width=round(0.03 * big))
        ink = ink.rotate(angle[i], Image.BILINEAR).resize((size, size), Image.BOX)
        paper = back[i] + (0.5 + np.cos(phi[i]) * x + np.sin(phi[i]) * y) * (end[i] - back[i])
        images[i] = np.rint(255 * paper + np.asarray(ink)[..., None] * (front[i] - paper))
    return images, labels


# ----------------------------------------------------------------------------- encoders


def thumbnail(x):
    """images (B, 3, H, W) in [-1, 1] -> (B, 768): colour thumbnails of 16x16. No semantics, no weights."""
    return F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).flatten(1)


ENCODERS = {"thumbnail": lambda device: thumbnail}

# ----------------------------------------------------------------------------- preparation


class Blocks:
    """
    Arrays in a folder that several processes fill block by block, and that a killed run goes on with:
    progress.json says what they are made of, done.npy which blocks are whole.
    arrays: name -> (shape, dtype), all of one length
    """
    def __init__(self, folder, settings, arrays, block):
        done, progress = os.path.join(folder, "done.npy"), os.path.join(folder, "progress.json")
        rank, world = rank_world()
        N = next(iter(arrays.values()))[0][0]
        settings = json.loads(json.dumps({**settings, "block": block, "arrays": str(arrays)}))
        if rank == 0 and not (os.path.exists(progress) and read_json(progress) == settings):
            os.makedirs(folder, exist_ok=True)
            for name, (shape, dtype) in arrays.items():
                np.lib.format.open_memmap(os.path.join(folder, name), "w+", dtype, shape)
            np.save(done, np.zeros(-(-N // block), bool))
            write_json(progress, settings)
        barrier()
        self.arrays = {name: np.load(os.path.join(folder, name), mmap_mode="r+") for name in arrays}
        self.done, self.block = np.load(done, mmap_mode="r+"), block
        starts = np.flatnonzero(~self.done)[rank::world] * block
        self.todo = [range(i, min(i + block, N)) for i in starts.tolist()]
        barrier()  # before anybody is done with a block

    def write(self, rows, **values):
        for name, a in self.arrays.items():
            a[rows.start:rows.stop] = values[name.split(".")[0]]
            a.flush()
        self.done[rows.start // self.block] = True
        self.done.flush()

    def finish(self):
        """Waits until all blocks of all processes are done."""
        barrier()
        if not self.done.all():
            raise RuntimeError(f"{(~self.done).sum()} of {len(self.done)} blocks were left out")


def read_json(path):
    with open(path) as f:
        return json.load(f)


def write_json(path, value):
    with replacing(path) as tmp, open(tmp, "w") as f:
        json.dump(value, f, indent=1)


def prepare(src, out, image_size=256, tokenizer="pixel", encoder="thumbnail", rank=RANK, dtype="int8",
            flip=False, features=None, device="cpu"):
    """
    Images -> out/latents.npy (N, C, h, w), labels.npy (N,), bank.pt, meta.json. -> meta, a dict
    What is there already is kept, a killed run is gone on with; of several processes each encodes a share.
    rank, dtype: of the bank, as in MemoryBank.build; flip: N more entries, of the mirrored images;
    features: path of an .npy (N, D) with a row for each entry, instead of an encoder
    """
    if not is_glyphs(src) and not os.path.exists(src):
        raise ValueError(f"{src} does not exist; give a folder of images, an .npy or .npz, or glyphs")
    if features:
        encoder, given = os.path.abspath(features), load_features(features)
    elif encoder not in ENCODERS:
        raise ValueError(f"unknown encoder {encoder}; known: {', '.join(ENCODERS)}")
    if tokenizer != "pixel":
        raise ValueError(f"unknown tokenizer {tokenizer}; known: pixel")
    if image_size < 1:
        raise ValueError(f"image size {image_size} is not positive")
    settings = dict(source=src if is_glyphs(src) else os.path.abspath(src), image_size=image_size,
                    tokenizer=tokenizer, encoder=encoder, rank=rank, dtype=dtype, flip=flip)
    path = os.path.join(out, "meta.json")
    if os.path.exists(path):
        meta = read_json(path)
        was = meta["settings"]
        differ = [f"{k} {was.get(k)}, not {v}" for k, v in settings.items() if was.get(k) != v]
        if differ:
            raise ValueError(f"{out} was prepared with {'; '.join(differ)}: name another, or delete it")
        return meta
    images = Images(src, image_size)
    N, latent = len(images), (3, image_size, image_size)
    M, arrays = 2 * N if flip else N, {}
    if features:
        D = given.shape[1]
        if len(given) != M:
            raise ValueError(f"{features} holds {len(given):,} rows for {M:,} entries of {src}")
    else:
        encode = ENCODERS[encoder](device)
        D = encode(torch.zeros(1, *latent, device=device)).shape[1]
        arrays = {"features.npy": ((M, D), "float32")}
    if rank != RANK:
        fit_rank(rank, M, D)  # an error now, not after the work
    blocks = Blocks(out, {**settings, "images": N}, {"latents.npy": ((M, *latent), "uint8"), **arrays}, 256)
    me, world = rank_world()
    workers = 0 if images.files is None else min(8, (os.cpu_count() or 1) // world)
    loader = torch.utils.data.DataLoader(images, num_workers=workers,
                                         batch_sampler=[[i % N for i in rows] for rows in blocks.todo])
    with tqdm(total=sum(map(len, blocks.todo)), desc="encoding", unit="img", disable=me > 0) as bar:
        for rows, x in zip(blocks.todo, loader):
            mirrored = torch.tensor([i >= N for i in rows])
            x[mirrored] = x[mirrored].flip(2)
            x = x.permute(0, 3, 1, 2).contiguous()
            f = None if features else encode(x.to(device).float() / 127.5 - 1).cpu()
            blocks.write(rows, latents=x, features=f)
            bar.update(len(rows))
    blocks.finish()
    if me == 0:
        labels = np.concatenate([images.labels] * (M // N))
        with replacing(os.path.join(out, "labels.npy")) as tmp, open(tmp, "wb") as f:
            np.save(f, labels)
        source = given if features else blocks.arrays["features.npy"]
        bank = MemoryBank.build(source, rank, dtype, labels, encoder)
        bank.save(os.path.join(out, "bank.pt"))
        write_json(path, dict(settings=settings, images=N, latent=latent, classes=images.classes,
                              bank=bank.id, mean=[127.5] * 3, std=[127.5] * 3))  # x = (latent - mean) / std
        for name in ("done.npy", "progress.json", *arrays):
            os.remove(os.path.join(out, name))
    barrier()
    return read_json(path)


def load_features(path):
    features = load_array(path)
    if features.ndim != 2 or features.dtype.kind != "f":
        raise ValueError(f"{path} holds {features.dtype} {features.shape}, not floats (N, D)")
    return features


def rank_argument(text):
    return None if text == "full" else int(text)


def main():
    parser = argparse.ArgumentParser(description="Images to latents and a memory bank.")
    parser.add_argument("--data", help="folder of images, .npy or .npz of uint8 (N,H,W,3), or glyphs")
    parser.add_argument("--features", help=".npy (N, D), encoded elsewhere; without --data OUT is a bank")
    parser.add_argument("--out", required=True)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--tokenizer", default="pixel")
    parser.add_argument("--encoder", default="thumbnail", help=", ".join(ENCODERS))
    parser.add_argument("--rank", type=rank_argument, default=RANK, help="directions kept, or full")
    parser.add_argument("--dtype", choices=("int8", "float16", "float32"), default="int8")
    parser.add_argument("--flip", action="store_true", help="mirrored images are entries of their own")
    args = parser.parse_args()
    if not args.data and not args.features:
        raise ValueError("give --data (images) or --features (a matrix), or both")
    if not args.data:
        bank = MemoryBank.build(load_features(args.features), args.rank, args.dtype)
        bank.save(args.out)
    else:
        device = best_device()
        init_distributed(device)
        prepare(args.data, args.out, args.image_size, args.tokenizer, args.encoder, args.rank, args.dtype,
                args.flip, args.features, device)
        bank = MemoryBank.load(os.path.join(args.out, "bank.pt"))
    if rank_world()[0] == 0:
        print(f"{args.out}: {bank}")


if __name__ == "__main__":
    cli(main)
