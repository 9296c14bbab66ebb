"""The memory of GMem (arXiv 2412.08781): from images to what training reads.

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
import shutil
import sys
import zipfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cached_property
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from model import AUTOENCODERS, Attention, SiTConfig, fit, load_autoencoder, load_file, load_weights

RANK = 64     # of a bank, by default
CPU = torch.device("cpu")
BLOCK = 4096  # rows that are worked on at a time
LEAST = 4e-3  # what 127 steps of int8 are worth at least; 2, the most there is, then fits in float16
DTYPES = "int8", "float16", "float32"  # of a bank's coefficients
THREADS = min(8, os.cpu_count() or 1)  # that decode images

# ----------------------------------------------------------------------------- small pieces

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)

def within(low, high=float("inf"), kind=int):
    """-> a type for a Parser's flag: a number in [low, high)"""
    def number(text):
        if not low <= kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return kind(text)
    number.__name__ = "whole number" if kind is int else "number"
    return number

positive, fraction = within(1), within(0, 1, float)

def rank_argument(text):
    return None if text == "full" else int(text)

def cli(main):
    """Runs main(); bad input ends as one line on stderr and exit code 2."""
    try:
        main()
        if dist.is_initialized():  # left to the interpreter's end, gloo's threads may abort the process
            dist.barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where this one was")
    except (ValueError, OSError) as e:
        worker = "Original Traceback" in str(e)  # of a DataLoader
        text = str(e).splitlines()[-1].removeprefix("ValueError: ") if worker else str(e)
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
    except RuntimeError as e:  # what torch.save makes of a full disk
        raise OSError(f"{path} cannot be written (disk full?), what was there is kept: {e}") from e
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)

def load_array(path):
    """an .npy file, mapped into memory"""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as e:
        raise ValueError(f"{path} is not an .npy file of numbers, or damaged") from e

def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path} is damaged: {e}") from e

def write_json(path, value):
    with replacing(path) as tmp, open(tmp, "w") as f:
        json.dump(value, f, indent=1)

def rank_world():
    """-> this process's rank, number of processes (0, 1 without torch.distributed)"""
    on = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if on else (0, 1)

def together(name, *args):
    """Calls torch.distributed's function of that name, if there are several processes."""
    if rank_world()[1] > 1:
        getattr(dist, name)(*args)

def best_device(name=None):
    """-> torch.device: name, or the best there is; of several GPUs the one of this process"""
    usable = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available()), cpu=1)
    kind, _, index = (name or next(k for k in usable if usable[k])).partition(":")
    index = index or os.environ.get("LOCAL_RANK", "0") * (kind == "cuda") or "0"
    if not index.isdigit() or int(index) >= usable.get(kind, 0):
        have = ", ".join(f"{n} {k}" for k, n in usable.items() if n)
        raise ValueError(f"--device {name or kind + ':' + index} is not to be had here, but {have}")
    return torch.device(kind, int(index)) if kind == "cuda" else torch.device(kind)

def init_distributed(device):
    """Joins the processes that torchrun has started, if it has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))  # rank 0 may write 50,000 PNGs

# ----------------------------------------------------------------------------- the memory bank

@dataclass(frozen=True, eq=False)
class MemoryBank:
    """N unit-norm snippets of D numbers, as mean + coef @ basis; read-only. `full` banks have no basis."""
    mean: np.ndarray    # (D,) float32
    basis: np.ndarray   # (r, D) float32, orthonormal, most energy first; (0, D): coef is all
    scale: np.ndarray   # (r,) float32: what one step of coef is worth
    coef: np.ndarray    # (N, r) int8, float16 or float32
    labels: np.ndarray  # (N,) int64, -1 where there is none; (0,): there are none
    energy: float       # part of the variance that the basis keeps
    encoder: str        # what made the features

    def __post_init__(self):
        (D,), (N, r), f32 = self.mean.shape, self.coef.shape, ["float32"]
        parts = dict(mean=((D,), f32), basis=((r if len(self.basis) else 0, D), f32), scale=((r,), f32),
                     coef=((N, r), DTYPES), labels=((N if len(self.labels) else 0,), ["int64"]))
        wrong = [k for k, (shape, dtypes) in parts.items()
                 if getattr(self, k).shape != shape or getattr(self, k).dtype not in dtypes]
        if wrong or not isinstance(self.energy, float) or not isinstance(self.encoder, str):
            raise ValueError(f"parts of the bank do not fit: {', '.join(wrong) or 'energy or encoder'}")
        for k in parts:
            getattr(self, k).setflags(write=False)
        self.__dict__.update(dim=D, rank=r, _copies={})  # not by assignment: the class is frozen

    def __len__(self):
        return len(self.coef)

    @cached_property
    def id(self):
        """hash of the content, 16 hexadecimal digits"""
        h = hashlib.sha256(self.encoder.encode())
        for a in (self.mean, self.basis, self.scale, self.coef, self.labels):
            h.update(np.ascontiguousarray(a))
        return h.hexdigest()[:16]

    @staticmethod
    def build(features, rank=RANK, dtype="int8", labels=None, encoder="unknown", energy=None, device=None):
        """features: (N, D) of any float type and norm: a tensor, an array or memmap, or whatever has a shape
        and gives rows when sliced; read twice, in blocks. Of several processes each reads its part.
        rank: directions kept (see fit_rank), None: all features as they are, in float16; energy in (0, 1):
        instead, as many directions as keep this part of the variance; dtype: of coef; labels: (N,) integers
        One pass for mean and Gram matrix, whose eigenvectors are the basis; one for the coefficients."""
        N, D = features.shape
        rank = 1 if energy else fit_rank(rank, N, D)
        if dtype not in DTYPES or not 0 < (energy or 1) < 1 + (not energy):
            raise ValueError(f"dtype {dtype} is not in {DTYPES}, or energy {energy} not in (0, 1)")
        me, world = rank_world()
        parts = [slice(N * k // world, N * (k + 1) // world) for k in range(world)]
        device = device or best_device("cuda" if torch.cuda.is_available() else "cpu")
        exact = torch.float32 if device.type == "cpu" else torch.float64  # no TF32
        if rank is None:
            dtype, rank, kept, mean, basis = "float16", D, 1.0, torch.zeros(D), torch.zeros(0, D)
        else:
            sums = torch.zeros(1 + D, D, dtype=torch.float64, device=device)  # of s, and of s s^T
            for _, s in unit_blocks(features, parts[me], device, "mean and Gram matrix"):
                s = s.to(exact)
                sums[0] += s.sum(0)
                for i in range(0, D, 128):  # the upper triangle is enough
                    sums[1 + i:129 + i, i:] += s[:, i:i + 128].T @ s[:, i:]
            together("all_reduce", sums)
            mean = sums[0] / N
            values, vectors = torch.linalg.eigh(sums[1:] / N - torch.outer(mean, mean), "U")  # ascending
            values = values.flip(0).clamp_min(0)
            part = (values.cumsum(0) / values.sum().clamp_min(1e-30)).cpu()
            rank = min(int((part < energy).sum()) + 1, N, D) if energy else rank
            basis, kept = vectors.flip(1)[:, :rank].T.contiguous(), float(part[rank - 1])
            together("broadcast", basis, 0)
        coef, scale, most = np.empty((N, rank), dtype), np.ones(rank, np.float32), torch.full((rank,), LEAST)
        mine = coef[parts[me]]
        c = np.empty(mine.shape, np.float32) if dtype == "int8" else mine  # int8 has to wait for its scale
        origin, turn = (v.to(exact) for v in (-mean @ basis.T, basis.T))
        for rows, s in unit_blocks(features, parts[me], device, "coefficients"):
            s = (torch.addmm(origin, s.to(exact), turn).float() if len(basis) else s).cpu()
            c[rows], most = s, torch.maximum(most, s.abs().amax(0))
        if dtype == "int8":
            together("all_reduce", most, dist.ReduceOp.MAX)
            scale = (most / 127).numpy()
            mine[:] = np.rint(np.divide(c, scale, out=c), out=c)
        for k, rows in enumerate(parts):
            together("broadcast", torch.from_numpy(coef[rows]), k)
        mean, basis = mean.float().cpu().numpy(), basis.float().cpu().numpy()
        labels = np.array([] if labels is None else labels, np.int64)
        return MemoryBank(mean, basis, scale, coef, labels, kept, encoder)

    def save(self, path, overwrite=False):
        """One file, readable by torch.load(weights_only=True); ValueError where another bank would be lost"""
        if os.path.exists(path) and not overwrite and MemoryBank.load(path).id != self.id:
            raise ValueError(f"{path} holds another bank: name another file (memory.py also has --overwrite)")
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        state = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in parts.items()}
        with replacing(path) as tmp:
            torch.save(state | {"id": self.id}, tmp)

    @staticmethod
    def load(path):
        """Maps the file: nothing is read until it is indexed."""
        keys = [f.name for f in fields(MemoryBank)]
        state = load_file(path, keys=keys + ["id"])
        try:
            bank = MemoryBank(*(v.numpy() if torch.is_tensor(v) else v for v in map(state.get, keys)))
            bank.__dict__["id"] = state["id"] + ""  # as computed when it was built
        except (AttributeError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is no memory bank: {e}") from e
        return bank

    def __getitem__(self, idx):
        """idx: int -> (D,); slice, list, array or tensor of B indices -> (B, D); unit-norm float32"""
        rows = np.array(self.coef[idx.cpu().numpy() if torch.is_tensor(idx) else idx])
        return self.unpack(torch.from_numpy(np.atleast_2d(rows))).view(*rows.shape[:-1], self.dim)

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

    def nearest(self, features, k=1):
        """features (B, D), any norm -> cosine (B, k), index (B, k) of the k most similar snippets"""
        f = F.normalize(torch.as_tensor(features).float(), dim=-1)
        mean, basis, scale = self._on(f.device)
        f_r, mean_r = (f @ basis.T, basis @ mean) if self.basis.size else (f, mean)  # r numbers, not D
        best, index = f.new_zeros(len(f), 0), f.new_zeros(len(f), 0).long()
        for i in range(0, len(self), BLOCK):
            c = torch.from_numpy(np.array(self.coef[i:i + BLOCK])).to(f.device).float() * scale
            norm = (mean @ mean + 2 * c @ mean_r + c.square().sum(1)).clamp_min(1e-12).sqrt()
            rows = torch.arange(i, i + len(c), device=f.device).expand(len(f), -1)
            cosine = ((f @ mean)[:, None] + f_r @ c.T) / norm
            best, at = torch.cat([best, cosine], 1).topk(min(k, i + len(c)))
            index = torch.cat([index, rows], 1).gather(1, at)
        return best, index

    def extend(self, features, limit=None, labels=None):
        """-> a new bank: the rows of this one, which stay what they are, then features (B, D) of any norm.
        What the basis lacks of them becomes new directions, most energy first, at most `limit` (None: all
        beyond rounding). Where the new coefficients do not fit in int8, the new bank's are float16."""
        s = F.normalize(torch.as_tensor(features).double(), dim=-1)
        mean, basis, scale = (v.double() for v in self._on(CPU))
        if len(self.labels) or labels is not None:
            old = self.labels if len(self.labels) else np.full(len(self), -1)
            labels = np.concatenate([old, np.full(len(s), -1) if labels is None else labels])
        labels = self.labels if labels is None else labels
        if not len(basis):
            return replace(self, coef=np.concatenate([self.coef, s.half().numpy()]), labels=labels)
        c = (s - mean) @ basis.T
        rest = s - mean - c @ basis
        size, new = torch.linalg.svd(rest, full_matrices=False)[1:]
        new = new[:min(int((size > 1e-4).sum()), len(size) if limit is None else limit)]
        lost = (rest - rest @ new.T @ new).square().sum() / (s - mean).square().sum().clamp_min(1e-30)
        new = torch.linalg.qr((new - new @ basis.T @ basis).T)[0].T  # basis is orthonormal to rounding only
        c_new, dtype = rest @ new.T, self.coef.dtype
        steps = (self.scale != 1).any()  # of int8, or of float16 where they did not fit
        worth = c_new.abs().amax(0).clamp_min(LEAST) / 127 if steps else torch.ones(len(new))
        scale = torch.cat([scale, worth]).float().numpy()
        c = torch.cat([c, c_new], 1).float().numpy()
        if steps:
            c = np.rint(c / scale)
            dtype = dtype if np.abs(c).max() <= 127 else np.dtype("float16")
        coef = np.zeros((len(self) + len(c), c.shape[1]), dtype)
        coef[:len(self), :self.rank], coef[len(self):] = self.coef, c
        kept = (self.energy * len(self) + float(1 - lost) * len(c)) / len(coef)
        basis = torch.cat([basis, new]).float().numpy()
        return replace(self, basis=basis, scale=scale, coef=coef, labels=labels, energy=kept)

    def _on(self, device):
        """-> mean, basis, scale as tensors, copied to a device once"""
        if device not in self._copies:
            arrays = self.mean, self.basis, self.scale
            self._copies[device] = [torch.tensor(a, device=device) for a in arrays]
        return self._copies[device]

    def __str__(self):
        size = sum(a.nbytes for a in (self.mean, self.basis, self.scale, self.coef)) / 1e6
        return (f"N {len(self):,}, D {self.dim}, rank {self.rank} keeps {100 * self.energy:.1f} % of energy, "
                f"{self.coef.dtype}: {size:,.1f} MB against {4e-6 * len(self) * self.dim:,.1f} MB, "
                f"by {self.encoder}, id {self.id}")

def fit_rank(rank, N, D):
    """The default rank is lowered to what N snippets of D allow, and says so; any other is an error."""
    most = min(N, D)
    if rank == RANK > most:
        print(f"rank of the bank: {most} instead of {RANK}, for {N:,} snippets of {D}")
        return most
    if rank is not None and not 1 <= rank <= most:
        raise ValueError(f"rank {rank} of the bank is not in 1 .. {most}, for {N:,} snippets of {D}")
    return rank

def unit_blocks(features, rows, device, what):
    """Yields (slice, counted from rows.start; unit-norm float32 rows on the device), a block at a time."""
    for i in tqdm(range(rows.start, rows.stop, BLOCK), what, unit="block", leave=False, delay=2,
                  disable=rows.start > 0):
        s = features[i:min(i + BLOCK, rows.stop)]
        s = (s if torch.is_tensor(s) else torch.from_numpy(np.array(s))).to(device).float()
        norm = s.norm(dim=1, keepdim=True)
        if not norm.isfinite().all():
            raise ValueError(f"features {i} to {i + len(s) - 1} hold NaN or infinity")
        yield slice(i - rows.start, i - rows.start + len(s)), s / norm.clamp_min(1e-12)

def mask(s, ratio, generator=None):
    """Sets a random part of the entries of s (B, D) to zero and divides the rest by 1 - ratio, as dropout."""
    return s * (torch.rand(s.shape, generator=generator) >= ratio).to(s.device) / (1 - ratio)

def mix(a, b, alpha, method="slerp", generator=None):
    """a, b: snippets (..., D); alpha: 0 (a) to 1 (b), a number or (..., 1) -> (..., D), unit-norm
    method: slerp (along the great circle), lerp (along the chord), concat (the first entries from a, the last
    from b) or mask (a random part of the entries from b)"""
    a, b, D = F.normalize(a, dim=-1), F.normalize(b, dim=-1), a.shape[-1]
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device)
    across = lambda v: v - (v * a).sum(-1, keepdim=True) * a
    side, axis = across(b), F.one_hot(a.abs().argmin(-1), D).to(a)
    gap = side.norm(dim=-1, keepdim=True)
    angle = alpha * torch.atan2(gap, (a * b).sum(-1, keepdim=True))
    side = torch.where(gap < 1e-5, across(axis), side)  # equal or opposite: any way round will do
    turned = angle.cos() * a + angle.sin() * F.normalize(side, dim=-1)
    ways = dict(slerp=lambda: turned, lerp=lambda: torch.lerp(a, b, alpha),
                concat=lambda: torch.where(torch.linspace(1, 0, D + 1)[1:].to(a.device) < alpha, b, a),
                mask=lambda: torch.where(torch.rand(a.shape, generator=generator).to(a.device) < alpha, b, a))
    if method not in ways:
        raise ValueError(f"unknown method {method} of mixing; known: {', '.join(ways)}")
    v = ways[method]()
    return F.normalize(torch.where(v.norm(dim=-1, keepdim=True) < 1e-4, turned, v), dim=-1)

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

def unreadable(files):
    """-> those image files that do not decode; of several processes each tries a share"""
    def broken(file):
        try:
            with Image.open(file) as image:
                image.draft("RGB", (64, 64))  # a JPEG at an eighth of its size: truncation shows as well
                image.load()
        except Exception:  # whatever the bytes of a damaged file make Pillow do
            return file
    me, world = rank_world()
    share = files[me::world]
    with ThreadPool(THREADS) as pool:
        found = pool.imap(broken, share, 16)
        bad = [f for f in tqdm(found, "checking files", len(share), unit="img", disable=me > 0) if f]
    together("all_gather_object", everybodys := [bad] * world, bad)
    return sum(everybodys, [])

def read_folder(src, skip_bad=False):
    """-> paths of the images in src, labels (N,), classes: the sub-folders; -1 and [] where there are none"""
    known = Image.registered_extensions()
    files = sorted(os.path.join(d, f) for d, _, fs in os.walk(src, followlinks=True) for f in fs
                   if os.path.splitext(f)[1].lower() in known and "/." not in d.removeprefix(src))
    if not files:
        raise ValueError(f"no images in the folder {src}")
    top = {f: os.path.dirname(os.path.relpath(f, src)).split(os.sep)[0] for f in files}
    classes = sorted(set(top.values()) - {""})
    if classes and "" in top.values():
        raise ValueError(f"{src} holds images beside class folders: put all of them in such, or none")
    if bad := set(unreadable(files)):
        names = ", ".join(sorted(os.path.relpath(f, src) for f in bad))
        message = f"{len(bad):,} of {len(files):,} files in {src} do not decode: {names}"
        if not skip_bad or len(bad) == len(files):
            raise ValueError(f"{message}; --skip-bad goes on without them")
        print(message)
    files, number = [f for f in files if f not in bad], {"": -1} | {c: i for i, c in enumerate(classes)}
    return files, [number[top[f]] for f in files], classes

def read_npz(path):
    """-> images, mapped into memory unless they are compressed, and labels or None"""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz, or damaged")
    file = np.load(path)
    key, labels = "arr_0" if "arr_0" in file else "images", file.get("labels", file.get("arr_1"))
    if key not in file:
        raise ValueError(f"{path} holds {', '.join(file)}; images are expected under arr_0 or images")
    entry = file.zip.getinfo(f"{key}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return file[key], labels
    with open(path, "rb") as f:  # the array starts after two headers: the zip entry's and the .npy's
        f.seek(entry.header_offset + 26)
        f.seek(entry.header_offset + 30 + sum(np.frombuffer(f.read(4), "<u2").tolist()))
        major, _ = np.lib.format.read_magic(f)
        shape, fortran, dtype = getattr(np.lib.format, f"read_array_header_{major}_0")(f)
        return np.memmap(f, dtype, "r", f.tell(), shape, "F" if fortran else "C"), labels

def read_array(src):
    """-> images uint8 (N, H, W, 3), labels (N,), classes, of an .npy or .npz; -1, [] where there are none"""
    images, labels = (load_array(src), None) if src.endswith(".npy") else read_npz(src)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or not len(images):
        what = f"{images.dtype} {images.shape}"
        raise ValueError(f"{src} holds {what}; expected are images, uint8 (N, H, W, 3)")
    if labels is None:
        return images, np.full(len(images), -1), []
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(f"{src} holds labels {labels.dtype} {labels.shape} for {len(images)} images")
    return images, labels, [str(i) for i in range(int(labels.max()) + 1)]

class Images(torch.utils.data.Dataset):
    """images[i] -> uint8 (S, S, 3), from a folder, one file, an array file or `glyphs` (see the head); with
    flip, as many mirrored ones come after them."""
    def __init__(self, src, size, skip_bad=False, flip=False):
        self.size, self.flip, self.files, self.array, labels, self.classes = size, flip, None, None, [-1], []
        if is_glyphs(src):
            self.classes = list(src.partition(":")[2] or LETTERS)
            self.array, labels = glyphs(size=size, characters=self.classes)
        elif os.path.isdir(src):
            self.files, labels, self.classes = read_folder(src, skip_bad)
        elif src.endswith((".npy", ".npz")):
            self.array, labels, self.classes = read_array(src)
        else:
            self.files = [src]
        self.labels = np.tile(labels, 1 + flip).astype(np.int64)
        if self.files == [src]:
            self[0]  # errors come now

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        mirrored = self.flip and i >= len(self) // 2
        i = i - len(self) // 2 if mirrored else i
        if self.files is None:
            image = Image.fromarray(self.array[i])
        else:
            try:
                with Image.open(self.files[i]) as file:
                    image = to_rgb(file)
            except Exception as e:  # as above
                raise ValueError(f"{self.files[i]} cannot be read: {e}") from e
        x = np.array(center_crop(image, self.size))
        return x[:, ::-1].copy() if mirrored else x

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

def is_glyphs(src):
    return src.split(":")[0] == "glyphs"

def glyphs(n=10400, size=16, seed=0, characters=LETTERS):
    """An embedded data set: characters in Pillow's own font, in turn; size, place, angle and colours vary.
    -> images uint8 (n, size, size, 3), labels int64 (n,): index into characters
    Digits are left out, so that external memory has something never seen."""
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

# ----------------------------------------------------------------------------- DINOv2

DINOV2 = {f"dinov2_{v}14": f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{v}14/dinov2_{v}14_pretrain.pth"
          for v in ("vits", "vitb", "vitl")}

class DINOv2Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(SiTConfig(hidden_size=width, num_heads=width // 64))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, 4 * width), fc2=nn.Linear(4 * width, width)))
        self.ls1, self.ls2 = (nn.ParameterDict(dict(gamma=torch.ones(width))) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))

class DINOv2(nn.Module):
    """ViT with patches of 14 and LayerScale (arXiv 2304.07193); parameters carry the official names.
    x (B, 3, H, W), multiples of 14, normalised -> class token (B, D), patch tokens (B, H/14 * W/14, D), both
    after the last norm. The position table is resampled as in the official GMem: bicubic, antialiased."""
    def __init__(self, width=768, depth=12, grid=37):
        super().__init__()
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, width, 14, stride=14)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid ** 2, width))
        self.blocks = nn.Sequential(*[DINOv2Block(width) for _ in range(depth)])
        self.norm, self.grid = nn.LayerNorm(width, eps=1e-6), grid

    def forward(self, x):
        x = self.patch_embed.proj(x)                                          # (B, D, H/14, W/14)
        first, table = self.pos_embed[:, :1], self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        if x.shape[2:] != table.shape[2:]:
            table = F.interpolate(table.float(), x.shape[2:], mode="bicubic", antialias=True)
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), (x + table).flatten(2).mT], dim=1)
        x = self.norm(self.blocks(x))
        return x[:, 0], x[:, 1:]

def load_dinov2(source):
    """source: a name in DINOV2, a path or a state dict in the official key format -> DINOv2 in eval mode"""
    w = load_weights(source, DINOV2)[0]
    w.pop("mask_token", None)  # of its training
    try:
        width, tokens = w["cls_token"].shape[2], w["pos_embed"].shape[1]
    except (KeyError, IndexError) as e:
        raise ValueError(f"{source if isinstance(source, str) else 'this'} is no DINOv2: {e}") from e
    depth = len({k.split(".")[1] for k in w if k.startswith("blocks.")})
    return fit(w, DINOv2, width, depth, round((tokens - 1) ** 0.5))

def dinov2_features(model, images):
    """images: uint8 (B, H, H, 3) or (B, 3, H, H) -> class token, patch tokens, as the official GMem's:
    ImageNet mean and std, then bicubic (not antialiased) to 224 for every 256 pixels"""
    images = images if images.shape[1] == 3 else images.permute(0, 3, 1, 2)
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)
    x, size = images / 255, 224 * max(1, images.shape[-1] // 256)
    return model(F.interpolate((x - mean[:, None, None]) / std[:, None, None], (size, size), mode="bicubic"))

# ----------------------------------------------------------------------------- tokenizers and encoders

Tokenizer = namedtuple("Tokenizer", "encode decode channels factor dtype")  # images in [-1, 1] <-> latents
PIXELS = Tokenizer(lambda x: ((x + 1) * 127.5).round(), lambda z: z / 127.5 - 1, 3, 1, "uint8")

def load_tokenizer(name, device):
    """name: pixel, or what model.load_autoencoder takes; its latents are means, float16 on disk"""
    if name == "pixel":
        return PIXELS
    model = load_autoencoder(name).to(device)
    half = lambda f: torch.no_grad()(torch.autocast(device.type, torch.bfloat16, device.type == "cuda")(f))
    return Tokenizer(half(lambda x: model.encode(x)[0].float()), half(lambda z: model.decode(z).float()),
                     model.channels, model.factor, "float16")

def latent_stats(tokenizer, path=None, latents=None):
    """-> mean and std per channel of latents, two lists: known ones, from the file path, or measured"""
    known = {"pixel": ([127.5] * 3, [127.5] * 3), "sd-vae-ft-ema": ([0.0] * 4, [1 / 0.18215] * 4)}
    if path and tokenizer != "pixel":  # VA-VAE's latents_stats.pt
        state = load_file(path, keys=("mean", "std"))
        return state["mean"].flatten().tolist(), state["std"].flatten().tolist()
    if tokenizer in known:
        return known[tokenizer]
    if latents is None:
        raise ValueError(f"mean and std of {tokenizer}'s latents are not known: give --latent-stats FILE")
    few = np.linspace(0, len(latents) - 1, min(len(latents), 10_000)).astype(int)
    some = latents[few].astype(np.float64)
    return some.mean((0, 2, 3)).tolist(), some.std((0, 2, 3)).tolist()

def thumbnail(x):
    """images (B, 3, H, W) in [-1, 1] -> (B, 768): colour thumbnails of 16x16. No semantics, no weights."""
    return F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).flatten(1)

def load_encoder(name, device):
    """name: thumbnail, or what load_dinov2 takes -> f(images in [-1, 1]) -> features (B, D), patch tokens"""
    if name == "thumbnail":
        return lambda x: (thumbnail(x), None)
    model = load_dinov2(name).to(device)
    return torch.no_grad()(lambda x: dinov2_features(model, (x + 1) * 127.5))

def to_unit(x):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]"""
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1

def encode_all(f, images, device):
    """f of a tokenizer or encoder; images: uint8 (N, S, S, 3) -> (N, ...) on the CPU"""
    out = [f(to_unit(part.to(device))) for part in torch.as_tensor(images).split(64)]
    return torch.cat([(part[0] if isinstance(part, tuple) else part).cpu() for part in out])

# ----------------------------------------------------------------------------- preparation

class Blocks:
    """Arrays in a folder that several processes fill block by block, and that a killed run goes on with:
    progress.json says what they are made of, done.npy which blocks are whole.
    arrays: name -> (shape, dtype), all of one length"""
    def __init__(self, folder, settings, arrays, block):
        done, progress = os.path.join(folder, "done.npy"), os.path.join(folder, "progress.json")
        rank, world = rank_world()
        N = next(iter(arrays.values()))[0][0]
        settings = json.loads(json.dumps({**settings, "block": block, "arrays": str(arrays)}))
        if rank == 0 and not (os.path.exists(progress) and read_json(progress) == settings):
            os.makedirs(folder, exist_ok=True)
            for name, (shape, dtype) in arrays.items():
                a = np.lib.format.open_memmap(os.path.join(folder, name), "w+", dtype, shape)
                if hasattr(os, "posix_fallocate"):  # a disk that is too small is found out now
                    with open(a.filename, "r+b") as f:
                        os.posix_fallocate(f.fileno(), 0, os.path.getsize(a.filename))
            np.save(done, np.zeros(-(-N // block), bool))
            write_json(progress, settings)
        together("barrier")
        self.arrays = {name: np.load(os.path.join(folder, name), mmap_mode="r+") for name in arrays}
        self.done, self.block = np.load(done, mmap_mode="r+"), block
        self.todo = [range(N)[i * block:(i + 1) * block] for i in np.flatnonzero(~self.done)[rank::world]]
        if rank == 0 and self.done.any():
            print(f"{folder}: {self.done.sum():,} of {len(self.done):,} blocks of {block} are done already")
        together("barrier")  # before anybody is done with a block

    def write(self, rows, **values):
        for name, a in self.arrays.items():
            a[rows.start:rows.stop] = values[os.path.basename(name)[:-4]]
            a.flush()
        self.done[rows.start // self.block] = True
        self.done.flush()

    def finish(self):
        """Waits until all blocks of all processes are done."""
        together("barrier")
        if not self.done.all():
            raise RuntimeError(f"{(~self.done).sum()} of {len(self.done)} blocks were left out")

class PatchTokens:
    """The patch tokens of all images as a matrix (N*T, D) that is encoded when it is read, by slices."""
    def __init__(self, images, encode, T, D, device):
        self.images, self.encode, self.T, self.device = images, encode, T, device
        self.shape, self.pool = (len(images) * T, D), ThreadPool(THREADS)

    def __getitem__(self, rows):
        i, j = rows.start // self.T, -(-rows.stop // self.T)
        x = np.stack(self.pool.map(self.images.__getitem__, range(i, j)))
        tokens = self.encode(to_unit(torch.from_numpy(x).to(self.device)))[1].flatten(0, 1)
        return tokens[rows.start - i * self.T:rows.stop - i * self.T]

def prepare(src, out, image_size=256, tokenizer="pixel", encoder="thumbnail", rank=RANK, dtype="int8",
            energy=None, flip=False, features=None, patches=False, stats=None, skip_bad=False, device=CPU):
    """Images -> out/latents.npy (N, C, h, w), labels.npy (N,), bank.pt, meta.json. -> meta, a dict
    What is there already is kept, a killed run is gone on with; of several processes each encodes a share.
    tokenizer, encoder, stats: see load_tokenizer, load_encoder, latent_stats; rank, dtype, energy: of the
    bank, see MemoryBank.build; flip: N more entries, of the mirrored images; features: file with a row for
    each entry, instead of the encoder's; patches: patches.pt too, a bank of the encoder's patch tokens"""
    if not is_glyphs(src) and not os.path.exists(src):
        raise ValueError(f"{src} does not exist; give a folder of images, an .npy or .npz, or glyphs")
    given = load_features(features) if features else None
    whole = lambda k: os.path.abspath(k) if k and os.path.isfile(k) else k
    tokenizer, encoder, name, stats = map(whole, (tokenizer, encoder, features or encoder, stats))
    settings = dict(source=src if is_glyphs(src) else os.path.abspath(src), image_size=image_size, rank=rank,
                    tokenizer=tokenizer, latent_stats=stats, encoder=name, dtype=dtype, energy=energy,
                    flip=flip, patches=patches)
    path, parts = os.path.join(out, "meta.json"), os.path.join(out, "parts")
    if os.path.exists(path):
        was = read_json(path)["settings"]
        if differ := [f"{k} {was.get(k)}, not {v}" for k, v in settings.items() if was.get(k) != v]:
            raise ValueError(f"{out} was prepared with {'; '.join(differ)}: name another, or delete it")
        shutil.rmtree(parts, ignore_errors=True)
        return read_json(path)
    latent_stats(tokenizer, stats, np.zeros((1, 1, 1, 1)))  # errors come now, not after the work
    tok, encode = load_tokenizer(tokenizer, device), load_encoder(encoder, device)
    if image_size % tok.factor:
        raise ValueError(f"image size {image_size} is no multiple of {tok.factor}, as {tokenizer} needs")
    f, tokens = encode(torch.zeros(1, 3, image_size, image_size, device=device))
    if patches and tokens is None:
        raise ValueError(f"the encoder {encoder} has no patch tokens for --patches")
    images = Images(src, image_size, skip_bad, flip)
    N, side = len(images), image_size // tok.factor
    n, latent = N // (1 + flip), (tok.channels, side, side)
    if features and len(given) != N:
        raise ValueError(f"{features} holds {len(given):,} rows for {N:,} entries of {src}")
    if rank != RANK and not energy:
        fit_rank(rank, N, (given if features else f).shape[1])
    arrays = {} if features else {"features.npy": ((N, f.shape[1]), "float32")}
    arrays["../latents.npy"] = ((N, *latent), tok.dtype)
    blocks = Blocks(parts, {**settings, "images": n}, arrays, 256)
    me, world = rank_world()
    workers = min(8, (os.cpu_count() or 1) // world) if images.files else 0
    loader = torch.utils.data.DataLoader(images, num_workers=workers, batch_sampler=blocks.todo)
    bar = tqdm(loader, "encoding", len(blocks.todo), unit="img", unit_scale=blocks.block, disable=me > 0)
    for x, rows in zip(bar, blocks.todo):
        blocks.write(rows, latents=encode_all(tok.encode, x, device),
                     features=None if features else encode_all(encode, x, device))
    blocks.finish()
    source = given if features else blocks.arrays["features.npy"]
    banks = {"bank.pt": MemoryBank.build(source, rank, dtype, images.labels, name, energy, device)}
    if patches:
        source = PatchTokens(images, encode, *tokens.shape[1:], device)
        banks["patches.pt"] = MemoryBank.build(source, rank, dtype, None, encoder, energy, device)
    if me == 0:
        with replacing(os.path.join(out, "labels.npy")) as tmp, open(tmp, "wb") as f:
            np.save(f, images.labels)
        for file, bank in banks.items():
            bank.save(os.path.join(out, file), overwrite=True)
        mean, std = latent_stats(tokenizer, stats, blocks.arrays["../latents.npy"])
        write_json(path, dict(settings=settings, images=n, latent=latent, classes=images.classes,
                              bank=banks["bank.pt"].id, mean=mean, std=std))  # x = (latent - mean) / std
        shutil.rmtree(parts)
    together("barrier")
    return read_json(path)

def load_features(path):
    """-> (N, D), mapped into memory, of an .npy or of a .pt with one tensor, as the official GMem's banks"""
    features = load_array(path) if path.endswith(".npy") else load_file(path)
    dtype, shape = getattr(features, "dtype", type(features)), tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or "float" not in str(dtype):
        raise ValueError(f"{path} holds no floats (N, D) but {dtype} {shape}")
    return features

def data_flags(add, size=None):  # of train.py, too
    add("--image-size", type=positive, default=size, help="of the images, in preparing them")
    add("--tokenizer", default="pixel", help=f"pixel, {', '.join(AUTOENCODERS)}, or a file")
    add("--latent-stats", metavar="FILE", help="mean and std of the latents, instead of measured ones")
    add("--encoder", default="thumbnail", help=f"thumbnail, {', '.join(DINOV2)}, or a file")
    add("--rank", type=rank_argument, default=RANK, help="of the bank: directions kept, or full")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirrored images too")
    add("--skip-bad", action="store_true", help="leave out files that are not readable")

def main():
    parser = Parser(description="Images to latents and a memory bank.", allow_abbrev=False)
    add = parser.add_argument
    add("--data", help="folder of images, .npy or .npz of uint8 (N,H,W,3), or glyphs")
    add("--features", help=".npy or .pt (N, D), encoded elsewhere; without --data OUT is a bank")
    add("--out")
    add("--info", metavar="BANK", help="print what this bank is, and nothing else")
    data_flags(add, 256)
    add("--energy", type=within(1e-6, 1, float), help="as many directions as keep this part of the variance")
    add("--dtype", choices=DTYPES, default="int8")
    add("--patches", action="store_true", help="a bank of the patch tokens too, for train.py --align")
    add("--overwrite", action="store_true", help="another bank in OUT may be lost")
    args = parser.parse_args()
    if args.info:
        return print(MemoryBank.load(args.info))
    if not args.out or not (args.data or args.features):
        raise ValueError("give --out, and --data (images) or --features (a matrix) or both; or --info BANK")
    device = best_device()
    init_distributed(device)
    if args.data:
        prepare(args.data, args.out, args.image_size, args.tokenizer, args.encoder, args.rank, args.dtype,
                args.energy, args.flip, args.features, args.patches, args.latent_stats, args.skip_bad, device)
        bank = MemoryBank.load(os.path.join(args.out, "bank.pt"))
    else:
        features = load_features(args.features)
        bank = MemoryBank.build(features, args.rank, args.dtype, energy=args.energy)
        if rank_world()[0] == 0:
            bank.save(args.out, args.overwrite)
            i = np.linspace(0, len(bank) - 1, min(len(bank), 10_000)).astype(int)
            true = F.normalize(torch.as_tensor(features[i]).float(), dim=1)
            print(f"cosine similarity of stored to true snippets: {(bank[i] * true).sum(1).mean():.4f}")
    if rank_world()[0] == 0:
        print(f"{args.out}: {bank}")

if __name__ == "__main__":
    cli(main)
