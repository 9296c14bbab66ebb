"""The memory of GMem (arXiv 2412.08781): one snippet per training image, in an immutable bank.

    snippet        s_i = f_i / |f_i|                 f_i: features of image i under a frozen encoder
    truncated SVD  s_i ~ mean + sum_k c_ik basis_k   k = 1 .. rank; then scaled to unit norm again
    storage        c_i ~ scale_i coef_i              coef int8, scale_i = max_k |c_ik| / 127
    mask           a random part of the entries of s set to zero, the rest divided by 1 - ratio

    python memory.py --data SRC --out DIR [--image-size 256] [--rank 64] [--dtype int8] [--flip]
    python memory.py --data SRC --out DIR --features F.npy    # features encoded elsewhere
    python memory.py --features F.npy --out bank.pt           # a bank alone

SRC is a folder of images (flat, or class sub-folders, which become labels), one image, an .npy or
.npz of uint8 (N, H, W, 3), or `glyphs`, a data set drawn on the spot. DIR gets latents.npy,
labels.npy, bank.pt and meta.json.

The core comes first: MemoryBank, mask, mix; with these the file can be copied alone. After it come
images, tokenizers, encoders, the preparation of a data set, and what the commands share.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import cache, cached_property
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.optim.lr_scheduler import LinearLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

RANK = 64  # of a bank, by default
DTYPES = ("int8", "float16", "float32")  # of a bank's coefficients
BLOCK = 4096  # rows that are worked on at a time
THREADS = min(8, os.cpu_count() or 1)  # that decode images


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected."""


# ---------------------------------------------------------------------------------- the memory bank


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """N unit-norm snippets of D numbers: scale_i coef_i @ basis + mean, normalised. Read-only.

    A full bank is one of rank D in float16. Several processes may share the file of a bank: it is
    mapped into memory, and nothing is read before it is indexed."""

    mean: np.ndarray  # (D,) float32
    basis: np.ndarray  # (r, D) float32, orthonormal rows, most energy first
    coef: np.ndarray  # (N, r) int8, float16 or float32
    scale: np.ndarray  # (N,) float32: what one step of a row is worth (1 for floats)
    labels: np.ndarray  # (N,) int64, -1 where there is none; (0,): the bank has none
    energy: float  # part of the variance that the basis kept when the bank was built
    encoder: str  # what made the features
    id: str = ""  # hash of the content; a bank that is loaded has that of its file

    def __post_init__(self):
        D = len(self.mean)
        N, r = self.coef.shape
        labels = N if len(self.labels) else 0
        expected = {
            "mean": ((D,), ["float32"]),
            "basis": ((r, D), ["float32"]),
            "coef": ((N, r), DTYPES),
            "scale": ((N,), ["float32"]),
            "labels": ((labels,), ["int64"]),
        }
        for name, (shape, dtypes) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype not in dtypes:
                given = f"{name} {array.dtype} {array.shape}"
                raise InputError(f"parts of a bank do not fit: {given}, expected {dtypes} {shape}")
            array.setflags(write=False)
        for name, kind in (("energy", float), ("encoder", str), ("id", str)):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"parts of a bank do not fit: {name} is no {kind.__name__}")
        if not self.id:
            object.__setattr__(self, "id", self.content_hash())

    @property
    def dim(self):
        return self.basis.shape[1]

    @property
    def rank(self):
        return self.basis.shape[0]

    def __len__(self):
        return len(self.coef)

    def content_hash(self):
        """16 hexadecimal digits"""
        content = hashlib.sha256(self.encoder.encode())
        for array in (self.mean, self.basis, self.coef, self.scale, self.labels):
            content.update(np.ascontiguousarray(array))
        return content.hexdigest()[:16]

    @staticmethod
    def build(
        features,
        rank=RANK,
        dtype="int8",
        labels=None,
        encoder="unknown",
        energy=None,
        distributed=False,
        device=None,
    ):
        """A bank of features (N, D) of any float type and norm: a tensor, an array, a memmap larger
        than memory, or whatever has a shape and gives rows when sliced. They are read twice, in
        blocks: for mean and Gram matrix, whose eigenvectors are the basis, and for coefficients.

        rank         directions kept, at most min(N, D), or "full": all, and float16 instead of int8
        dtype        of the coefficients, one of DTYPES
        labels       (N,) integers
        encoder      a name for what made the features
        energy       in (0, 1): instead of a rank, the part of the variance that is kept
        distributed  every process of torch.distributed calls this and reads its share of the rows;
                     process 0 gets the bank, the others None. Without it nothing is sent or awaited
        device       where it is computed; None: a GPU, where there is one
        InputError where a value is out of range, or features hold NaN or infinity.
        """
        N, D = features.shape
        process, num_processes = rank_world() if distributed else (0, 1)
        if rank == "full":
            rank = min(N, D)
            if dtype == "int8":
                dtype = "float16"
        check_build(N, rank, dtype, labels, energy)
        if rank > min(N, D):
            if process == 0 and energy is None:
                print(
                    f"rank {rank} lowered to {min(N, D)}: there are {N:,} snippets of {D} numbers"
                )
            rank = min(N, D)
        device = float64_device(device)
        bounds = [N * k // num_processes for k in range(num_processes + 1)]
        share = range(bounds[process], bounds[process + 1])
        mean, directions, kept = principal_directions(features, share, distributed, device)
        if energy is not None:
            rank = min(int((kept < energy).sum()) + 1, N, D)
        bank = MemoryBank(
            mean=mean.float().cpu().numpy(),
            basis=directions[:rank].float().cpu().numpy(),
            coef=np.empty((0, rank), dtype),
            scale=np.empty(0, np.float32),
            labels=np.empty(0, np.int64),
            energy=float(kept[rank - 1]),
            encoder=encoder,
        )
        coef, scale = stored_rows(bank, features, share, device)
        if num_processes > 1:
            coef = gather_rows(coef, bounds, device)
            scale = gather_rows(scale, bounds, device)
        if process > 0:
            return None
        labels = np.array([] if labels is None else labels, np.int64)
        return replace(bank, coef=coef, scale=scale, labels=labels, id="")

    def save(self, path, overwrite=False):
        """One file, which torch.load(weights_only=True) reads too. InputError where another bank
        would be lost."""
        if os.path.exists(path) and not overwrite and MemoryBank.load(path).id != self.id:
            raise InputError(f"{path} holds another bank: name another file, or delete it")
        state = {}
        for field in fields(self):
            value = getattr(self, field.name)
            state[field.name] = torch.tensor(value) if isinstance(value, np.ndarray) else value
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    @staticmethod
    def load(path):
        """Maps the file into memory. InputError where it is damaged, or holds something else."""
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            parts = {}
            for field in fields(MemoryBank):
                value = state[field.name]
                parts[field.name] = value.numpy() if torch.is_tensor(value) else value
            return MemoryBank(**parts)
        except OSError:
            raise
        except KeyError as e:
            raise InputError(f"{path} is no memory bank: it lacks {e}") from e
        except Exception as e:  # of any type, where the bytes are not torch's
            reason = f"{type(e).__name__} {str(e)[:100]}"
            raise InputError(f"{path} is damaged, or no memory bank: {reason}") from e

    def __getitem__(self, index):
        """An int -> (D,); a slice, list, array or tensor of B indices -> (B, D); unit-norm float32.
        IndexError out of range."""
        if torch.is_tensor(index):
            index = index.cpu().numpy()
        coef = torch.from_numpy(np.array(self.coef[index]))  # copies, as the bank is read-only
        scale = torch.from_numpy(np.array(self.scale[index]))
        return self.unpack(coef, scale)

    def unpack(self, coef, scale):
        """Stored rows, coef (..., r) and scale (...), on any device -> snippets (..., D)"""
        return self.decode(coef.float() * scale[..., None])

    def decode(self, coef):
        """coefficients (..., r) float32 -> snippets (..., D), unit-norm"""
        mean, basis = self.on(coef.device)
        return F.normalize(F.linear(coef, basis.T, mean), dim=-1)

    def project(self, features):
        """features (B, D), any norm -> coefficients (B, r) float32"""
        s = unit_norm(features)
        mean, basis = self.on(s.device)
        return (s - mean) @ basis.T

    def nearest(self, features, k=1):
        """features (B, D), any norm -> cosine (B, k), index (B, k) of the k most similar snippets.
        All B x N cosines are held at once."""
        s = unit_norm(features)
        starts = range(0, len(self), BLOCK)
        cosine = torch.cat([s @ self[i : i + BLOCK].to(s.device).T for i in starts], dim=1)
        return cosine.topk(min(k, len(self)))

    def extend(self, features, limit=None, labels=None):
        """-> a new bank: the rows of this one, which stay what they are, then features (B, D).
        What the basis lacks of them becomes new directions, most energy first.

        limit   how many new directions at most; None: all beyond rounding
        labels  (B,) of the new rows
        """
        s = unit_norm(features).double()
        mean, basis = (part.double() for part in self.on(s.device))
        c = (s - mean) @ basis.T
        rest = s - mean - c @ basis
        _, size, new = torch.linalg.svd(rest, full_matrices=False)
        new = new[size > 1e-4][:limit]
        new = new - new @ basis.T @ basis  # the basis is orthonormal to rounding only
        new = torch.linalg.qr(new.T)[0].T

        c = torch.cat([c, rest @ new.T], dim=1)
        coef, scale = pack(c.float().cpu(), self.coef.dtype)
        old_labels = self.labels
        if labels is not None and len(old_labels) == 0:
            old_labels = np.full(len(self), -1)
        if labels is None:
            labels = np.full(len(s) if len(old_labels) else 0, -1)
        return replace(
            self,
            basis=torch.cat([basis, new]).float().cpu().numpy(),
            coef=np.concatenate([np.pad(self.coef, ((0, 0), (0, len(new)))), coef]),
            scale=np.concatenate([self.scale, scale]),
            labels=np.concatenate([old_labels, labels]),
            id="",
        )

    @cached_property
    def copies(self):
        return {}

    def on(self, device):
        """-> mean, basis as tensors, copied to a device once"""
        if device not in self.copies:
            mean = torch.tensor(self.mean, device=device)
            self.copies[device] = (mean, torch.tensor(self.basis, device=device))
        return self.copies[device]

    def __str__(self):
        size = sum(a.nbytes for a in (self.mean, self.basis, self.coef, self.scale)) / 1e6
        exact = 4e-6 * len(self) * self.dim
        return (
            f"N {len(self):,}, D {self.dim}, rank {self.rank} keeps {100 * self.energy:.1f} % of "
            f"energy, {self.coef.dtype}: {size:,.1f} MB against {exact:,.1f} MB, "
            f"by {self.encoder}, id {self.id}"
        )


def check_build(N, rank, dtype, labels, energy):
    """InputError for what MemoryBank.build cannot use."""
    if N == 0:
        raise InputError("a bank of no features; expected (N, D), N > 0")
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"rank {rank}: expected a whole number of at least 1, or full")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if labels is not None and len(labels) != N:
        raise InputError(f"{len(labels)} labels for {N} features")
    if energy is not None and not 0 < energy < 1:
        raise InputError(f"energy {energy}: expected a part of the variance, between 0 and 1")


def float64_device(device):
    """The device, or by default a GPU; a CPU in place of Apple's GPUs, which have no float64."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def unit_norm(features):
    """(B, D) of any float type -> float32 rows of norm 1"""
    return F.normalize(torch.as_tensor(features).float(), dim=-1)


def snippet_blocks(features, share, device, what):
    """Yields (row, counted from the share's first; unit-norm float32 rows), a block at a time."""
    starts = range(0, len(share), BLOCK)
    for i in tqdm(starts, what, unit="block", leave=False, delay=2, disable=rank_world()[0] > 0):
        rows = share[i : i + BLOCK]
        block = features[rows.start : rows.stop]
        if not torch.is_tensor(block):
            block = torch.from_numpy(np.array(block))
        block = block.to(device).float()
        norm = block.norm(dim=1, keepdim=True)
        if not norm.isfinite().all():
            raise InputError(f"features {rows.start} to {rows.stop - 1} hold NaN or infinity")
        yield i, block / norm.clamp_min(1e-12)


def principal_directions(features, share, distributed, device):
    """-> mean of the snippets (D,); eigenvectors of their covariance (D, D), as rows, most energy
    first; the part of the variance that the first 1 .. D of them keep (D,); all float64"""
    N, D = features.shape
    total = torch.zeros(D, dtype=torch.float64, device=device)
    gram = torch.zeros(D, D, dtype=torch.float64, device=device)  # sum of s s^T
    for _, s in snippet_blocks(features, share, device, "mean and Gram matrix"):
        if device.type != "cpu":
            s = s.double()  # products in float32 may be rounded to TF32
        total += s.sum(0)
        for i in range(0, D, 128):  # the upper triangle is enough
            gram[i : i + 128, i:] += s[:, i : i + 128].T @ s[:, i:]
    if distributed:
        all_reduce(total)
        all_reduce(gram)
    mean = total / N
    values, vectors = torch.linalg.eigh(gram / N - torch.outer(mean, mean), UPLO="U")  # ascending
    directions = vectors.flip(1).T.contiguous()
    if distributed and rank_world()[1] > 1:
        dist.broadcast(directions, 0)  # the last bit may differ between processes
    values = values.flip(0).clamp_min(0)
    kept = values.cumsum(0) / values.sum().clamp_min(1e-30)
    return mean, directions, kept.cpu()


def pack(c, dtype):
    """Coefficients (B, r) float32 -> as they are stored: coef (B, r), scale (B,), arrays. In int8
    each row is quantised by itself, in steps of a 127th of its largest number."""
    scale = torch.ones(len(c))
    if dtype == "int8":
        scale = c.abs().amax(dim=1).clamp_min(1e-12) / 127
        c = (c / scale[:, None]).round_()
    return c.numpy().astype(dtype), scale.numpy()


def stored_rows(bank, features, share, device):
    """-> coef, scale of the rows of a share, by the basis and in the dtype of a bank"""
    coef = np.empty((len(share), bank.rank), bank.coef.dtype)
    scale = np.empty(len(share), np.float32)
    mean, basis = bank.on(device)
    origin = -basis @ mean
    for i, s in snippet_blocks(features, share, device, "coefficients"):
        c = torch.addmm(origin, s, basis.T)  # as project, without copies
        rows = slice(i, i + len(s))
        coef[rows], scale[rows] = pack(c.cpu(), coef.dtype)
    return coef, scale


def gather_rows(share, bounds, device, block=2**20):
    """-> the rows of all processes on process 0, None on the others.

    bounds  where the share of each process begins, and where the last one ends
    Rows travel through the device, as nccl takes no others.
    """
    if rank_world()[0] > 0:
        for rows in torch.from_numpy(share).split(block):
            dist.send(rows.to(device), 0)
        return None
    whole = np.empty((bounds[-1], *share.shape[1:]), share.dtype)
    whole[: len(share)] = share
    for k in range(1, len(bounds) - 1):
        for rows in torch.from_numpy(whole[bounds[k] : bounds[k + 1]]).split(block):
            received = torch.empty_like(rows, device=device)
            dist.recv(received, k)
            rows.copy_(received)
    return whole


def mask(s, ratio, generator=None):
    """Dropout: a random part of the entries of s (B, D) is zero, the rest divided by 1 - ratio."""
    keep = torch.rand(s.shape, generator=generator) >= ratio
    return s * keep.to(s.device) / (1 - ratio)


def slerp(a, b, alpha):
    """From a to b along the great circle, by a part alpha of the angle between them; unit-norm."""

    def across(v):
        return v - (v * a).sum(-1, keepdim=True) * a

    side = across(b)
    gap = side.norm(dim=-1, keepdim=True)
    angle = alpha * torch.atan2(gap, (a * b).sum(-1, keepdim=True))
    axis = F.one_hot(a.abs().argmin(-1), a.shape[-1]).to(a)
    side = torch.where(gap < 1e-5, across(axis), side)  # equal or opposite: any way round will do
    return angle.cos() * a + angle.sin() * F.normalize(side, dim=-1)


def mix(a, b, alpha, method="slerp", generator=None):
    """Snippets between a and b (..., D) -> (..., D), unit-norm.

    alpha   0 is a, 1 is b; a number or (..., 1)
    method  slerp (along the great circle), lerp (along the chord), concat (the first entries from
            a, the last from b) or mask (a random part of the entries from b); InputError for others
    """
    a = F.normalize(a, dim=-1)
    b = F.normalize(b, dim=-1)
    D = a.shape[-1]
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device)
    arc = slerp(a, b, alpha)
    if method == "slerp":
        return arc
    if method == "lerp":
        mixed = torch.lerp(a, b, alpha)
    elif method == "concat":
        mixed = torch.where(torch.linspace(1, 0, D + 1, device=a.device)[1:] < alpha, b, a)
    elif method == "mask":
        mixed = torch.where(torch.rand(D, generator=generator).to(a.device) < alpha, b, a)
    else:
        raise InputError(f"unknown method {method} of mixing; known: slerp, lerp, concat, mask")
    vanished = mixed.norm(dim=-1, keepdim=True) < 1e-4  # halfway between opposite ones
    return F.normalize(torch.where(vanished, arc, mixed), dim=-1)


def coefficients(bank, rows):
    """-> (B, r) float32"""
    return torch.from_numpy(bank.coef[rows] * bank.scale[rows, None])


def new_prior(bank, rows):
    """-> model.SnippetPrior, not fitted yet; the labels of all rows (N,), the null label where
    there is none; rows: those that it will be fitted to"""
    from model import SnippetPrior

    num_classes = 0
    labels = np.zeros(len(bank), np.int64)
    if len(bank.labels) > 0:
        num_classes = int(bank.labels.max()) + 1
        labels = np.where(bank.labels < 0, num_classes, bank.labels)
    prior = SnippetPrior(bank.rank, num_classes)
    some = coefficients(bank, rows[:100_000])
    prior.mean.copy_(some.mean(0))
    prior.std.copy_((some - prior.mean).std().clamp_min(1e-8))
    prior.counts.copy_(torch.from_numpy(np.bincount(labels, minlength=num_classes + 1)))
    return prior, labels


def median_distance(c, rows):
    """Median distance of coefficients c (B, r) to the nearest of rows (N, r)"""
    return torch.cdist(c, rows).amin(1).quantile(0.5).item()


@torch.no_grad()
def judge_prior(prior, c, z, t, y, rows):
    """-> the loss on held-out coefficients c (B, r), with noise z, times t, labels y; and how far
    what the prior draws is from the fitted rows (N, r), as a multiple of what held-out rows are"""
    loss = prior.loss(c, z, t, y).item()
    drawn = prior.sample(z[:512], y[:512], steps=10)
    return loss, median_distance(drawn, rows) / max(median_distance(c[:512], rows), 1e-9)


def fit_prior(bank, steps=5500, batch_size=256, lr=4e-3, seed=0, device=None):
    """The distribution of a bank's snippets, by label where it has labels -> model.SnippetPrior

    A tenth of the rows (at most 4,096) is held out, and says which moving average of the weights is
    returned: the one of least loss on them, or, where that one draws snippets farther from the
    fitted rows than held-out rows are, the first later one that does not. (Still later ones draw
    the bank's rows again.) The fit ends after 500 steps without a better one. It seeds torch's
    default generator. InputError for a bank of less than 10 rows.
    """
    N = len(bank)
    if N < 10:
        raise InputError(f"a prior over {N} snippets: at least 10 are needed")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    held_out, rows = np.split(rng.permutation(N), [min(N // 10, BLOCK)])
    prior, labels = new_prior(bank, rows)
    prior.to(device)

    def read(rows):
        """-> coefficients (B, r), labels (B,)"""
        return coefficients(bank, rows).to(device), torch.from_numpy(labels[rows]).to(device)

    ema = AveragedModel(prior, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(prior.parameters(), lr, weight_decay=0, fused=True)
    schedule = LinearLR(optimizer, 1, 0, steps)

    # each held-out row several times, with other noise
    held_c, held_y = read(np.resize(held_out, BLOCK))
    held = (held_c, torch.randn_like(held_c), torch.rand(BLOCK, device=device), held_y)
    fitted_c, _ = read(rows[:30_000])
    kept_distance = float("inf")
    least_loss = float("inf")
    bar = tqdm(range(1, steps + 1), "fitting the prior", unit="step")
    for step in bar:
        c, y = read(rng.choice(rows, batch_size))
        z = torch.randn_like(c)
        t = torch.rand(batch_size, device=device)
        keep = torch.rand(batch_size, device=device) >= 0.1
        loss = prior.loss(c, z, t, torch.where(keep, y, prior.num_classes))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.update_parameters(prior)
        if step % 100 == 0 or step == steps:
            held_loss, distance = judge_prior(ema.module, *held, fitted_c)
            bar.set_postfix(loss=loss.item(), held_out=held_loss, distance=distance)
            if held_loss < least_loss or kept_distance > 1:
                kept = copy.deepcopy(ema.module)
                kept_step = step
                kept_distance = distance
                least_loss = min(held_loss, least_loss)
            elif step - kept_step >= 500:
                bar.close()
                break
    print(
        f"prior: held-out loss at best {least_loss:.4f}; after {kept_step:,} steps, of {step:,}, "
        f"what it draws is {kept_distance:.2f} times as far from the rows as held-out ones are"
    )
    return kept.eval()


# ------------------------------------------------------------------------------------------- images


def to_rgb(image):
    """PIL image of any mode -> RGB, upright, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """The crop of ADM and DiT: box filter while twice too large, then bicubic, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_broken(file):
    try:
        with Image.open(file) as image:
            image.draft("RGB", (64, 64))  # a JPEG at an eighth of its size: errors show as well
            image.load()
    except Exception:  # noqa: BLE001 - whatever the bytes of a damaged file make Pillow do
        return True
    return False


def broken_images(files):
    """-> the set of those files that do not decode; of several processes each tries a share"""
    process, num_processes = rank_world()
    share = files[process::num_processes]
    with ThreadPool(THREADS) as pool:
        found = pool.imap(is_broken, share, 16)
        bar = tqdm(found, "checking files", len(share), unit="img", disable=process > 0)
        broken = [file for file, bad in zip(share, bar) if bad]
    shares = [broken]
    if num_processes > 1:
        shares = [None] * num_processes
        dist.all_gather_object(shares, broken)
    return set().union(*shares)


def image_files(folder):
    """-> sorted paths of all images below a folder; hidden folders are passed over"""
    known = Image.registered_extensions()
    files = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(place, n) for n in names if os.path.splitext(n)[1].lower() in known]
    return sorted(files)


def read_folder(src, skip_bad=False):
    """-> paths of images, labels (list; -1: none), classes (the sub-folders)"""
    files = image_files(src)
    if not files:
        raise InputError(f"no images in the folder {src}")
    broken = broken_images(files)
    if broken:
        names = ", ".join(sorted(os.path.relpath(file, src) for file in broken))
        message = f"{len(broken):,} of {len(files):,} files in {src} do not decode: {names}"
        if not skip_bad or len(broken) == len(files):
            raise InputError(f"{message}; --skip-bad goes on without them")
        print(message)

    files = [file for file in files if file not in broken]
    folders = [os.path.dirname(os.path.relpath(file, src)).split(os.sep)[0] for file in files]
    classes = sorted(set(folders) - {""})
    if classes and "" in folders:
        raise InputError(
            f"{src} holds images beside class folders: put all of them in such, or none"
        )
    if not classes:
        return files, [-1] * len(files), []
    return files, [classes.index(folder) for folder in folders], classes


def read_array(src):
    """-> images uint8 (N, H, W, 3) of an .npy (mapped into memory) or .npz, labels (N,), classes"""
    if src.endswith(".npy"):
        content = {"images": load_array(src)}
    else:
        try:
            content = dict(np.load(src))
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as e:
            raise InputError(f"{src} is not an .npz of arrays, or damaged") from e
    images = content.get("arr_0", content.get("images"))
    labels = content.get("arr_1", content.get("labels"))
    if images is None:
        names = ", ".join(content)
        raise InputError(f"{src} holds {names}; images are expected under arr_0 or images")
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or len(images) == 0:
        given = f"{images.dtype} {images.shape}"
        raise InputError(f"{src} holds {given}; expected are images, uint8 (N, H, W, 3)")
    if labels is None:
        return images, [-1] * len(images), []
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{src} holds labels {labels.dtype} {labels.shape} for {len(images)} images"
        )
    return images, labels, [str(i) for i in range(int(labels.max()) + 1)]


class Images:
    """images[i] -> uint8 (size, size, 3), of a source as the head of this file has it.

    With flip the mirrored images come after the others. labels: (N,) int64, -1 where there is none;
    classes: their names, [] without labels.
    """

    def __init__(self, src, size, skip_bad=False, flip=False):
        self.size = size
        self.flip = flip
        self.files = None
        if is_glyphs(src):
            self.classes = list(src.partition(":")[2] or LETTERS)
            self.array, labels = glyphs(size=size, characters=self.classes)
        elif os.path.isdir(src):
            self.files, labels, self.classes = read_folder(src, skip_bad)
        elif src.endswith((".npy", ".npz")):
            self.array, labels, self.classes = read_array(src)
        else:
            self.files, labels, self.classes = [src], [-1], []
        self.labels = np.tile(labels, 1 + flip).astype(np.int64)
        self.threads = ThreadPool(THREADS)
        self[0]  # errors come now

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """-> uint8 tensor (B, size, size, 3), decoded by several threads"""
        return torch.from_numpy(np.stack(self.threads.map(self.__getitem__, rows)))

    def __getitem__(self, i):
        mirrored = self.flip and i >= len(self) // 2
        if mirrored:
            i = i - len(self) // 2
        if self.files is None:
            image = Image.fromarray(self.array[i])
        else:
            try:
                with Image.open(self.files[i]) as file:
                    image = to_rgb(file)
            except Exception as e:  # whatever the bytes of a damaged file make Pillow do
                raise InputError(f"{self.files[i]} cannot be read as an image: {e}") from e
        x = np.array(center_crop(image, self.size))
        return x[:, ::-1].copy() if mirrored else x


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_glyphs(src):
    return src.split(":")[0] == "glyphs"


def glyphs(n=10400, size=16, seed=0, characters=LETTERS):
    """An embedded data set: characters in Pillow's own font; size, place, angle and colours vary.

    -> images uint8 (n, size, size, 3), labels int64 (n,): index into characters, in turn
    Digits are left out by default, so that external memory has something that was never seen.
    """
    rng = np.random.default_rng([seed, size])
    labels = np.arange(n) % len(characters)
    big = 4 * size  # each is drawn four times as large
    height = (rng.uniform(0.8, 1, n) * big).astype(int)
    angle = rng.uniform(-12, 12, n)
    place = rng.uniform(0.45, 0.55, (n, 2)) * big
    fonts = {h: ImageFont.load_default(h) for h in np.unique(height).tolist()}

    # light on dark or dark on light; half of the backgrounds are flat, half go from `back` to `end`
    front, back, end = rng.random((3, n, 3))
    end = np.where(rng.random((n, 1)) < 0.5, back, back + 0.6 * (end - back))
    dark = rng.random((n, 1)) < 0.5
    front = np.where(dark, 1 - 0.3 * front, 0.3 * front)
    back = np.where(dark, 0.5 * back, 1 - 0.5 * back)
    end = np.where(dark, 0.5 * end, 1 - 0.5 * end)
    direction = rng.uniform(0, 2 * np.pi, n)
    y, x = np.mgrid[-0.35 : 0.35 : size * 1j, -0.35 : 0.35 : size * 1j][..., None]

    images = np.empty((n, size, size, 3), np.uint8)
    for i in tqdm(range(n), "drawing glyphs", unit="img", leave=False, disable=rank_world()[0] > 0):
        ink = Image.new("L", (big, big))
        draw = ImageDraw.Draw(ink)
        font = fonts[height[i]]
        bold = round(0.03 * big)
        draw.text(tuple(place[i]), characters[labels[i]], 255, font, "mm", stroke_width=bold)
        ink = ink.rotate(angle[i], Image.BILINEAR).resize((size, size), Image.BOX)
        along = 0.5 + np.cos(direction[i]) * x + np.sin(direction[i]) * y
        paper = back[i] + along * (end[i] - back[i])
        images[i] = np.rint(255 * paper + np.asarray(ink)[..., None] * (front[i] - paper))
    return images, labels


# -------------------------------------------------------------------------- tokenizers and encoders


class Pixels:
    """No tokenizer: images (B, 3, H, W) in [-1, 1] <-> 0 .. 255, uint8 on disk."""

    channels = 3
    factor = 1
    dtype = "uint8"

    def encode(self, x):
        return ((x + 1) * 127.5).round()

    def decode(self, z):
        return z / 127.5 - 1


class Autoencoder:
    """Images in [-1, 1] <-> latents (B, C, h, w), the means, of a network that
    model.load_autoencoder takes; float16 on disk."""

    dtype = "float16"

    def __init__(self, source, device):
        from model import load_autoencoder

        self.model = load_autoencoder(source).to(device)
        self.channels = self.model.channels
        self.factor = self.model.factor
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    @torch.no_grad()
    def encode(self, x):
        with self.autocast:
            return self.model.encode(x)[0].float()

    @torch.no_grad()
    def decode(self, z):
        with self.autocast:
            return self.model.decode(z).float()


def load_tokenizer(name, device):
    """name: pixel, or a name or file of an autoencoder"""
    if name == "pixel":
        return Pixels()
    return Autoencoder(name, device)


def known_stats(settings):
    """-> mean and std per channel of latents, two lists: from a file (VA-VAE's latents_stats.pt),
    or known ones; None where they have to be measured"""
    if settings["tokenizer"] == "pixel":
        return [127.5] * 3, [127.5] * 3
    if settings["latent_stats"] is not None:
        from model import load_file

        state = load_file(settings["latent_stats"], keys=("mean", "std"))
        return state["mean"].flatten().tolist(), state["std"].flatten().tolist()
    if settings["tokenizer"] == "sd-vae-ft-ema":
        return [0.0] * 4, [1 / 0.18215] * 4
    return None


def measured_stats(latents):
    """-> mean and std per channel of 10,000 of the latents"""
    few = np.linspace(0, len(latents) - 1, min(len(latents), 10_000)).astype(int)
    some = latents[few].astype(np.float64)
    return some.mean((0, 2, 3)).tolist(), some.std((0, 2, 3)).tolist()


def stats_tensor(meta, device):
    """meta: of a prepared folder -> tensor (2, C, 1, 1): mean and std per channel"""
    return torch.tensor([meta["mean"], meta["std"]], device=device)[..., None, None]


def normalize_latents(latents, stats):
    """Latents as they are stored (B, C, h, w) -> as the network sees them, float32"""
    mean, std = stats
    return (latents.float() - mean) / std


def denormalize_latents(x, stats):
    mean, std = stats
    return x * std + mean


def thumbnail(x):
    """images (B, 3, H, W) in [-1, 1] -> (B, 768): 16x16 thumbnails. No semantics, no weights."""
    return F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).flatten(1)


def load_encoder(name, device):
    """name: thumbnail, or a name or file of a DINOv2
    -> f(images (B, 3, H, W) in [-1, 1]) -> features (B, D), patch tokens (B, T, D) or None"""
    if name == "thumbnail":
        return lambda x: (thumbnail(x), None)

    from model import dinov2_features, load_dinov2

    model = load_dinov2(name).to(device)

    @torch.no_grad()
    def encode(x):
        return dinov2_features(model, (x + 1) * 127.5)

    return encode


def to_float(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def in_batches(f, images, device, batch_size=64):
    """f(images in [-1, 1]) of uint8 (N, H, W, 3), batch by batch -> (N, ...) on the CPU"""
    parts = []
    for batch in torch.as_tensor(images).split(batch_size):
        parts.append(f(to_float(batch.to(device))).cpu())
    return torch.cat(parts)


# ----------------------------------------------------------------------------- preparing a data set


class Blocks:
    """Arrays in a folder that the processes of one machine fill block by block, and that a killed
    run goes on with: progress.json says what they are made of, done.npy which blocks are whole.

    settings  what the content depends on
    arrays    file name -> (shape, dtype), all of one length
    block     rows of a block
    """

    def __init__(self, folder, settings, arrays, block):
        process, num_processes = rank_world()
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < num_processes:
            raise InputError(
                "several nodes would write to the same pages of a file: use one node here"
            )
        N = next(iter(arrays.values()))[0][0]
        done_file = os.path.join(folder, "done.npy")
        progress = os.path.join(folder, "progress.json")
        made_of = json.dumps({**settings, "block": block, "arrays": str(arrays)})
        if process == 0 and not (os.path.exists(progress) and read_json(progress) == made_of):
            os.makedirs(folder, exist_ok=True)
            for name, (shape, dtype) in arrays.items():
                reserve(os.path.join(folder, name), shape, dtype)
            np.save(done_file, np.zeros(-(-N // block), bool))
            write_json(progress, made_of)
        barrier()
        self.arrays = {name: np.load(os.path.join(folder, name), mmap_mode="r+") for name in arrays}
        self.done = np.load(done_file, mmap_mode="r+")
        self.block = block
        mine = np.flatnonzero(~self.done)[process::num_processes]
        self.todo = [range(N)[i * block : (i + 1) * block] for i in mine]
        if process == 0 and self.done.any():
            done = f"{self.done.sum():,} of {len(self.done):,} blocks of {block}"
            print(f"{folder}: {done} are done already")
        barrier()  # before anybody is done with a block

    def write(self, rows, **values):
        for name, array in self.arrays.items():
            array[rows.start : rows.stop] = values[os.path.basename(name).removesuffix(".npy")]
            array.flush()
        self.done[rows.start // self.block] = True
        self.done.flush()

    def bar(self, what):
        total = sum(map(len, self.todo))
        return tqdm(total=total, desc=what, unit="img", disable=rank_world()[0] > 0)

    def finish(self):
        """Waits until all blocks of all processes are done."""
        barrier()
        if not self.done.all():
            raise RuntimeError(f"{(~self.done).sum()} of {len(self.done)} blocks were left out")


def reserve(path, shape, dtype):
    """Makes an .npy file, all of it, so that a disk that is too small is found out now."""
    np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


@dataclass
class PatchTokens:
    """The patch tokens of all images as a matrix (N*T, D): a slice is encoded when it is read."""

    images: Images
    encode: callable
    num_tokens: int  # T
    dim: int  # D
    device: torch.device

    @property
    def shape(self):
        return len(self.images) * self.num_tokens, self.dim

    def __getitem__(self, rows):
        first = rows.start // self.num_tokens
        last = (rows.stop - 1) // self.num_tokens
        x = self.images.batch(range(first, last + 1))
        _, tokens = self.encode(to_float(x.to(self.device)))
        skipped = first * self.num_tokens
        return tokens.flatten(0, 1)[rows.start - skipped : rows.stop - skipped]


def load_features(path):
    """-> (N, D), of an .npy (mapped), or a .pt with one tensor, as the official GMem's banks"""
    if path.endswith(".npy"):
        features = load_array(path)
    else:
        from model import load_file

        features = load_file(path)
    dtype = getattr(features, "dtype", type(features))
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or "float" not in str(dtype):
        raise InputError(f"{path} holds {dtype} {shape}, expected floats (N, D)")
    return features


def feature_source(settings):
    """What made the features of a prepared folder; unknown where it does not say."""
    return settings.get("features") or settings.get("encoder", "unknown")


def prepare_settings(src, options):
    """All settings, with full paths, as meta.json keeps them."""
    settings = {**defaults(DATA_SETTINGS), **defaults(BANK_SETTINGS), **options, "source": src}
    if not is_glyphs(src):
        settings["source"] = os.path.abspath(src)
    for name in ("tokenizer", "encoder", "features", "latent_stats"):
        settings[name] = full_path(settings[name])
    return settings


def is_prepared(out, settings):
    """Whether a folder was prepared, with these settings; InputError if with others."""
    path = os.path.join(out, "meta.json")
    if not os.path.exists(path):
        return False
    differ = differences(read_json(path)["settings"], settings)
    if differ:
        raise InputError(f"{out} was prepared with {differ}: name another, or delete it")
    return True


def load_networks(settings, device):
    """-> the tokenizer and the encoder of a preparation"""
    tokenizer = load_tokenizer(settings["tokenizer"], device)
    size = settings["image_size"]
    if size % tokenizer.factor != 0:
        raise InputError(
            f"image size {size} is no multiple of {tokenizer.factor}, as the tokenizer needs"
        )
    return tokenizer, load_encoder(settings["encoder"], device)


def encode_images(images, tokenizer, encode, blocks, device):
    """Fills latents.npy, and features.npy where that is wanted, block by block."""
    with blocks.bar("encoding") as bar:
        for x, rows in zip(ahead(images.batch, blocks.todo), blocks.todo):
            values = {"latents": in_batches(tokenizer.encode, x, device)}
            if "features.npy" in blocks.arrays:
                values["features"] = in_batches(lambda batch: encode(batch)[0], x, device)
            blocks.write(rows, **values)
            bar.update(len(rows))


def prepare(src, out, device="cpu", **options):
    """Images of src -> out/latents.npy (N, C, h, w), labels.npy (N,), bank.pt, meta.json.

    options: see DATA_SETTINGS and BANK_SETTINGS. Returns meta, a dict. A killed run resumes; of
    several processes each encodes a share. InputError for what cannot be used.
    """
    settings = prepare_settings(src, options)
    if is_prepared(out, settings):  # then src itself may be gone
        shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)
        return read_json(os.path.join(out, "meta.json"))
    if not is_glyphs(src) and not os.path.exists(src):
        raise InputError(
            f"{src} does not exist; give a folder of images, an .npy or .npz, or glyphs"
        )

    device = torch.device(device)
    size = settings["image_size"]
    stats = known_stats(settings)
    tokenizer, encode = load_networks(settings, device)
    feature, tokens = encode(torch.zeros(1, 3, size, size, device=device))
    if settings["patches"] and tokens is None:
        raise InputError(f"the encoder {settings['encoder']} has no patch tokens for --patches")
    images = Images(src, size, settings["skip_bad"], settings["flip"])
    N = len(images)
    latent = (tokenizer.channels, size // tokenizer.factor, size // tokenizer.factor)
    # latents.npy is where it stays, so that there is no moment at which a kill loses it
    arrays = {"../latents.npy": ((N, *latent), tokenizer.dtype)}
    features = None
    if settings["features"] is None:
        arrays["features.npy"] = ((N, feature.shape[1]), "float32")
    else:
        features = load_features(settings["features"])
        if len(features) != N:
            raise InputError(
                f"{settings['features']} holds {len(features):,} rows for {N:,} entries of {src}"
            )

    blocks = Blocks(os.path.join(out, "parts"), {**settings, "images": N}, arrays, block=256)
    encode_images(images, tokenizer, encode, blocks, device)
    blocks.finish()
    sources = {"bank.pt": features if features is not None else blocks.arrays["features.npy"]}
    if settings["patches"]:
        sources["patches.pt"] = PatchTokens(images, encode, *tokens.shape[1:], device)
    if stats is None:
        stats = measured_stats(blocks.arrays["../latents.npy"])
    meta = {
        "settings": settings,
        "images": N // (1 + images.flip),
        "latent": latent,
        "classes": images.classes,
        "class_counts": np.bincount(images.labels[images.labels >= 0]).tolist(),
        "mean": stats[0],  # the network sees (latent - mean) / std
        "std": stats[1],
    }
    save_prepared(out, meta, images.labels, sources, device)
    return read_json(os.path.join(out, "meta.json"))


def save_prepared(out, meta, labels, sources, device):
    """The banks, labels.npy, and last meta.json, which says that the folder is whole."""
    settings = meta["settings"]
    for name, features in sources.items():
        bank = MemoryBank.build(
            features,
            settings["rank"],
            settings["dtype"],
            labels if name == "bank.pt" else None,
            feature_source(settings),
            settings["energy"],
            distributed=True,
            device=device,
        )
        if bank is not None:
            bank.save(os.path.join(out, name), overwrite=True)
            if name == "bank.pt":
                meta["bank"] = bank.id
    if rank_world()[0] == 0:
        with (
            atomic_write(os.path.join(out, "labels.npy")) as temporary,
            open(temporary, "wb") as file,
        ):
            np.save(file, labels)
        write_json(os.path.join(out, "meta.json"), meta)
        shutil.rmtree(os.path.join(out, "parts"))
    barrier()


# -------------------------------------------------------------------------- what the commands share


def full_path(name):
    """The absolute path of a file; other values stay what they are."""
    if isinstance(name, str) and os.path.isfile(name):
        return os.path.abspath(name)
    return name


def differences(was, now):
    """The settings of `now` that were others, in words."""
    return ", ".join(
        f"{name} {was.get(name)}, not {now[name]}" for name in now if was.get(name) != now[name]
    )


def number(low, high=float("inf"), kind=int):
    """-> a type for argparse: a number in [low, high)"""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def rank_or_full(text):
    return text if text == "full" else number(1)(text)


rank_or_full.__name__ = "rank"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def read_flags(settings, description):
    """-> the settings that the command line gives, and no others.

    settings: name -> (default, type, help); a type is what argparse takes as one, bool, a tuple of
    choices, or a dict of argparse's options"""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, (default, kind, text) in settings.items():
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            options = {"choices": kind}
        elif isinstance(kind, dict):
            options = kind
        else:
            options = {"type": kind}
        if default is not None:
            text = f"{text} (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **options)
    return vars(parser.parse_args())


def defaults(settings):
    return {name: default for name, (default, _, _) in settings.items()}


def cli(main):
    """Runs main(); bad input ends as one line on stderr and exit code 2. Others: a traceback."""
    try:
        main()
        # left to the interpreter's end, gloo's threads may abort the process
        if dist.is_initialized():
            barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as e:
        # by name, because model.py has an InputError of its own, so that it can be copied alone
        if isinstance(e, ValueError) and type(e).__name__ != "InputError":
            raise
        text = " ".join(str(e).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        sys.exit(2)


def ahead(f, items):
    """Yields f(item) for each item; a thread works on the next one while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending = None
        for item in items:
            begun = thread.submit(f, item)
            if pending is not None:
                yield pending.result()
            pending = begun
        if pending is not None:
            yield pending.result()


@contextmanager
def atomic_write(path):
    """Gives a temporary name to write to, which takes the place of path once all is written."""
    temporary = f"{path}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except RuntimeError as e:  # what torch.save makes of a full disk
        raise OSError(f"{path} cannot be written (disk full?), what was there is kept: {e}") from e
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load_array(path):
    """An .npy file, mapped into memory."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as e:
        raise InputError(f"{path} is not an .npy file of numbers, or damaged") from e


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as e:
        raise InputError(f"{path} is damaged: {e}") from e


def write_json(path, value):
    with atomic_write(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1)


def best_device(name=None):
    """-> torch.device: name, or the best there is; of several GPUs the one of this process"""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        name = "cpu" if accelerator is None else accelerator.type
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name} is unavailable ({reason}); --device cpu works") from e


def default_dtype(device):
    """Of a forward pass."""
    return "bfloat16" if device.type == "cuda" else "float32"


def init_distributed(device):
    """Joins the processes that torchrun has started, if it has."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        patient_group()


def rank_world():
    """-> this process's rank, number of processes (0, 1 without torch.distributed)"""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(tensor):
    """Sums a tensor over all processes, in place."""
    if rank_world()[1] > 1:
        dist.all_reduce(tensor)


@cache
def patient_group():
    """All processes, waiting up to a day: rank 0 alone saves banks, or writes 50,000 PNGs."""
    return dist.new_group(timeout=timedelta(days=1), backend="gloo")


def barrier():
    if rank_world()[1] > 1:
        dist.barrier(patient_group())


# name: (default, type, help)
DATA_SETTINGS = {
    "image_size": (256, number(1), "height and width that images are cropped to"),
    "tokenizer": ("pixel", str, "pixel, sd-vae-ft-ema, vavae-f16d32, or a file of an autoencoder"),
    "latent_stats": (None, str, "file with mean and std of latents, instead of measured ones"),
    "encoder": (
        "thumbnail",
        str,
        "thumbnail, dinov2_vits14, _vitb14, _vitl14, or a file of a DINOv2",
    ),
    "rank": (RANK, rank_or_full, "of the bank: directions kept, or full"),
    "flip": (False, bool, "as many entries more, of the mirrored images"),
    "skip_bad": (False, bool, "leave out files that do not decode"),
}
BANK_SETTINGS = {
    "features": (None, str, ".npy or .pt (N, D), encoded elsewhere; without --data OUT is a bank"),
    "dtype": ("int8", DTYPES, "of the bank's coefficients"),
    "energy": (
        None,
        number(1e-6, 1, float),
        "instead of a rank: part of the variance that is kept",
    ),
    "patches": (False, bool, "a bank of the patch tokens too, for train.py --align"),
}


def main():
    settings = {
        "data": (None, str, "folder of images, .npy or .npz of uint8 (N,H,W,3), or glyphs"),
        "out": (None, str, "folder, or without --data the file of a bank"),
        **DATA_SETTINGS,
        **BANK_SETTINGS,
    }
    args = argparse.Namespace(**defaults(settings))
    vars(args).update(read_flags(settings, "Images to latents and a memory bank."))
    if args.out is None or (args.data is None and args.features is None):
        raise InputError("give --out, and --data (images) or --features (a matrix) or both")

    device = best_device()
    init_distributed(device)
    bank_file = args.out
    if args.data is not None:
        names = [*DATA_SETTINGS, *BANK_SETTINGS]
        prepare(args.data, args.out, device, **{name: getattr(args, name) for name in names})
        bank_file = os.path.join(args.out, "bank.pt")
    else:
        features = load_features(args.features)
        bank = MemoryBank.build(
            features, args.rank, args.dtype, energy=args.energy, distributed=True
        )
        if bank is not None:
            bank.save(args.out)
    if rank_world()[0] == 0:
        print(f"{args.out}: {MemoryBank.load(bank_file)}")


if __name__ == "__main__":
    cli(main)
