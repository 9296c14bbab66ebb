"""The memory of GMem (arXiv 2412.08781): one snippet per training image, in an immutable bank.

    snippet        s_i = f_i / |f_i|                 f_i: features of image i under a frozen encoder
    truncated SVD  s_i ~ mean + c_i basis            c_i: r numbers, basis: r orthonormal rows; then
                   (of the centred snippets: PCA)    scaled to unit norm again
    storage        c_i ~ scale_i coef_i              coef int8, scale_i = max |c_i| / 127
    mask           a random fraction of the entries of s set to zero, the rest divided by 1 - ratio
    new snippet    c_i + spread / sqrt(k) sum_j noise_j (c_j - their mean)     j: k neighbours of i

    python memory.py --data SRC --out DIR [--image-size 256] [--rank 64] [--dtype int8] [--flip]
    python memory.py --data SRC --out DIR --features F.npy    # features encoded elsewhere
    python memory.py --features F.npy --out bank.pt           # a bank alone

SRC is a folder of images (flat, or class sub-folders, which become labels), one image, uint8
(N, H, W, 3) in an .npy or .npz (arr_0; labels: arr_1), or `glyphs`, a data set drawn on the spot.
DIR gets latents.npy, labels.npy, bank.pt, files.txt and meta.json.

The core comes first: mask, mix, the truncated SVD, MemoryBank. For these the file can be copied
alone; networks need model.py. Below the double ruler come images, tokenizers, encoders, the
preparation of a data set, and what the commands share.
"""

import argparse
import atexit
import hashlib
import io
import json
import os
import shutil
import socket
import sys
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache, cached_property, wraps
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

RANK = 64  # of a bank, by default
DTYPES = ("int8", "float16", "float32")  # of a bank's coefficients
BLOCK = 4096  # rows that are worked on at a time


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected."""


# ------------------------------------------------------------------------------------- mask and mix


def mask(s, ratio, generator=None):
    """Dropout: a random fraction of the entries of s (B, D) is zero, the rest divided by 1 - ratio.
    InputError unless 0 <= ratio < 1."""
    if not 0 <= ratio < 1:
        raise InputError(f"ratio {ratio}: expected a fraction, in [0, 1)")
    keep = torch.rand(s.shape, generator=generator, dtype=torch.float32, device="cpu") >= ratio
    return s * keep.to(s.device) / (1 - ratio)


def slerp(a, b, alpha):
    """From a to b along the great circle, by alpha times the angle between them; unit-norm."""

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
            a, the last from b) or mask (random entries from b); InputError for others
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
        mixed = torch.where(torch.linspace(1, 0, D + 1).to(a)[1:] < alpha, b, a)
    elif method == "mask":
        draws = torch.rand(D, generator=generator, dtype=torch.float32, device="cpu")
        mixed = torch.where(draws.to(a.device) < alpha, b, a)
    else:
        raise InputError(f"unknown method {method} of mixing; known: slerp, lerp, concat, mask")
    vanished = mixed.norm(dim=-1, keepdim=True) < 1e-4  # halfway between opposite ones
    return F.normalize(torch.where(vanished, arc, mixed), dim=-1)


# ------------------------------------------------------------------------- features to coefficients


def isolated(method):
    """The method without gradients, inference mode and autocast, whatever the caller has switched
    on: it computes in float32."""

    @wraps(method)
    def computed(*args, **options):
        cpu = torch.autocast("cpu", enabled=False)
        cuda = torch.autocast("cuda", enabled=False)
        mps = torch.autocast("mps", enabled=False)
        with torch.inference_mode(False), torch.no_grad(), cpu, cuda, mps:
            return method(*args, **options)

    return computed


def float_tensor(features, device):
    """(..., D) of any float type -> float32; an array becomes a tensor on device"""
    if not torch.is_tensor(features):
        features = torch.tensor(np.asarray(features, np.float32), device=device)
    return features.detach().float()


def quantize(c, dtype):
    """Coefficients (B, r) float32 -> as they are stored: coef (B, r), scale (B,), arrays. In int8
    each row is quantised by itself, in steps of a 127th of its largest number."""
    scale = torch.ones(len(c), dtype=torch.float32, device="cpu")
    if dtype == "int8":
        scale = c.abs().amax(dim=1).clamp_min(1e-12) / 127
        c = (c / scale[:, None]).round_()
    return c.numpy().astype(dtype), scale.numpy()


def snippet_blocks(features, row_range, device, what):
    """Yields a range of rows, and their snippets, unit-norm float32 (b, D), block by block.
    InputError with the row numbers where features are zero, infinite or NaN."""
    starts = range(0, len(row_range), BLOCK)
    for i in tqdm(starts, what, unit="block", leave=False, delay=2, disable=rank_world()[0] > 0):
        rows = row_range[i : i + BLOCK]
        block = float_tensor(features[rows.start : rows.stop], device).to(device)
        norm = block.norm(dim=1, keepdim=True)
        check_norms(norm, rows.start)
        yield rows, block / norm


def gram_sums(features, row_range, origin, device):
    """-> sum of d = s - origin (D,), sum of d d^T (D, D), its upper triangle alone; float64"""
    D = features.shape[1]
    total = torch.zeros(D, dtype=torch.float64, device=device)
    gram = torch.zeros(D, D, dtype=torch.float64, device=device)
    for _, s in snippet_blocks(features, row_range, device, "mean and Gram matrix"):
        if device.type != "cpu":
            s = s.double()
        d = s - origin
        total += d.sum(0)
        for i in range(0, D, 128):
            gram[i : i + 128, i:] += d[:, i : i + 128].T @ d[:, i:]
    return total, gram


def directions_by_covariance(features, row_range, distributed, device):
    """For N >= D, by the D x D covariance: see principal_directions."""
    N = features.shape[0]
    # near the mean: snippets that differ little would lose their digits in sums of s s^T
    origin = next(snippet_blocks(features, range(min(N, BLOCK)), device, "origin"))[1].mean(0)
    total, gram = gram_sums(features, row_range, origin, device)
    if distributed:
        all_reduce(total)
        all_reduce(gram)
    mean = total / N
    covariance = gram / N - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance, UPLO="U")  # ascending
    return origin + mean, vectors.flip(1).T.contiguous(), values.flip(0)


def directions_by_svd(features, device):
    """For N < D, by the SVD of the centred snippets: see principal_directions."""
    N = features.shape[0]
    s = torch.cat([s for _, s in snippet_blocks(features, range(N), device, "snippets")]).double()
    mean = s.mean(0)
    _, size, directions = torch.linalg.svd(s - mean, full_matrices=False)
    return mean, directions, size.square() / N


def principal_directions(features, row_range, distributed, device):
    """-> mean of the snippets (D,); eigenvectors of their covariance, orthonormal rows
    (min(N, D), D), largest variance first; the fraction of the variance that the first 1, 2, .. of
    them keep. All float64; the same on all processes."""
    N, D = features.shape
    if N >= D:
        mean, directions, values = directions_by_covariance(
            features, row_range, distributed, device
        )
    else:
        mean, directions, values = directions_by_svd(features, device)
    if distributed and rank_world()[1] > 1:
        dist.broadcast(directions, 0)  # the last bit may differ between processes
    values = values.clamp_min(0)
    kept = values.cumsum(0) / values.sum().clamp_min(1e-30)
    return mean, directions, kept.cpu()


# ---------------------------------------------------------------------------------- the memory bank


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """N unit-norm snippets of D numbers: scale_i coef_i @ basis + mean, normalised. Read-only.

    A full bank keeps all min(N, D) directions. A bank that is loaded is mapped into memory: nothing
    is read before it is indexed, and processes share it, also those that it is sent to (pickle).
    Wherever (B, D) is taken, one vector (D,) is taken, too. Nothing here has a gradient."""

    mean: np.ndarray  # (D,) float32
    basis: np.ndarray  # (r, D) float32, orthonormal rows, largest variance first
    coef: np.ndarray  # (N, r) int8, float16 or float32
    scale: np.ndarray  # (N,) float32: quantisation step of each row (1 for floats)
    labels: np.ndarray  # (N,) int64, -1 where there is none; (0,): the bank has none
    energy: float  # fraction of the variance that the basis kept when the bank was built
    encoder: str  # what made the features
    id: str = ""  # hash of the content; a bank that is loaded has that of its file
    file: str = None  # where it was loaded from
    on_device: tuple = None  # coef and scale as tensors, by to(device)

    def __post_init__(self):
        check_parts(self)
        for name in ARRAYS:
            getattr(self, name).setflags(write=False)
        if not self.id:
            object.__setattr__(self, "id", content_hash(self))

    @property
    def dim(self):
        return self.basis.shape[1]

    @property
    def rank(self):
        return self.basis.shape[0]

    def __len__(self):
        return len(self.coef)

    # ---- a bank is made, kept, and sent

    @staticmethod
    @isolated
    def build(
        features,
        rank=RANK,
        dtype="int8",
        labels=None,
        encoder="unknown",
        distributed=False,
        device=None,
    ):
        """A bank of features (N, D) of any float type and norm: a tensor, an array, a memmap larger
        than memory, or whatever has a shape and gives rows when sliced. They are read twice, in
        blocks: for mean and covariance, whose eigenvectors are the basis, and for coefficients.

        rank         directions kept, or "full": all, and float16 instead of int8; above min(N, D)
                     it is lowered, with a warning
        dtype        of the coefficients, one of DTYPES
        labels       (N,) integers
        encoder      a name for what made the features
        distributed  every process of torch.distributed calls this and reads its share of the rows;
                     process 0 gets the bank, the others None. Without it nothing is sent or awaited
        device       where it is computed; None: a GPU, where there is one
        InputError where a value is out of range, or features hold zeros alone, NaN or infinity.
        """
        rank, dtype = checked_rank(features.shape, rank, dtype, labels)
        N = features.shape[0]
        process, num_processes = rank_world() if distributed else (0, 1)
        device = float64_device(device)
        row_range = range(N * process // num_processes, N * (process + 1) // num_processes)
        mean, directions, kept = principal_directions(features, row_range, distributed, device)
        bank = MemoryBank(  # without rows yet
            mean=mean.float().cpu().numpy(),
            basis=directions[:rank].float().cpu().numpy(),
            coef=np.empty((0, rank), dtype),
            scale=np.empty(0, np.float32),
            labels=np.empty(0, np.int64),
            energy=float(kept[rank - 1]),
            encoder=encoder,
        )
        coef, scale = bank.stored_rows(features, row_range, device)
        if num_processes > 1:
            shares = [None] * num_processes if process == 0 else None
            dist.gather_object((coef, scale), shares, group=patient_group())
            if process > 0:
                return None
            coef = np.concatenate([share[0] for share in shares])
            scale = np.concatenate([share[1] for share in shares])
        labels = np.array([] if labels is None else labels, np.int64)
        return replace(bank, coef=coef, scale=scale, labels=labels, id="")

    def stored_rows(self, features, row_range, device):
        """Features of a range of rows -> coef (n, r), scale (n,), as this bank would store them"""
        coef = np.empty((len(row_range), self.rank), self.coef.dtype)
        scale = np.empty(len(row_range), np.float32)
        mean, basis = self.tensors_on(device)
        origin = -basis @ mean
        for rows, s in snippet_blocks(features, row_range, device, "coefficients"):
            c = torch.addmm(origin, s, basis.T)  # as project, without copies
            place = slice(rows.start - row_range.start, rows.stop - row_range.start)
            coef[place], scale[place] = quantize(c.cpu(), coef.dtype)
        return coef, scale

    def save(self, path, overwrite=False):
        """One file, which torch.load(weights_only=True) reads too. InputError where another bank
        would be lost."""
        if os.path.exists(path) and not overwrite and MemoryBank.load(path).id != self.id:
            raise InputError(f"{path} holds another bank: name another file, or delete it")
        state = {name: getattr(self, name) for name in STORED}
        state.update({name: torch.tensor(state[name], device="cpu") for name in ARRAYS})
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    @staticmethod
    def load(path):
        """Maps the file into memory. InputError where it is damaged, or holds something else."""
        return read_bank(path)

    def __reduce__(self):
        """Pickled by the name of its file, where it was loaded; else by its arrays."""
        parts = None
        if self.file is None:
            parts = {name: getattr(self, name) for name in STORED}
        return unpickled_bank, (self.file, parts, self.id, self.device)

    def __deepcopy__(self, memo):
        return self  # nobody can change it

    def to(self, device):
        """-> the same bank, whose rows are kept on device: bank[index] and the rest are then
        computed there. Mean, basis, coef and scale go on being arrays on the CPU, too."""
        stored = (torch.tensor(self.coef, device=device), torch.tensor(self.scale, device=device))
        return replace(self, on_device=stored)

    @property
    def device(self):
        """torch.device of the snippets that bank[index] gives"""
        return torch.device("cpu") if self.on_device is None else self.on_device[0].device

    @cached_property
    def device_tensors(self):
        return {}

    def tensors_on(self, device):
        """-> mean, basis as tensors, copied to a device once"""
        if device not in self.device_tensors:
            mean = torch.tensor(self.mean, device=device)
            self.device_tensors[device] = (mean, torch.tensor(self.basis, device=device))
        return self.device_tensors[device]

    # ---- rows to snippets, and back

    @isolated
    def coefficients(self, index):
        """Rows by any index -> c, float32 (..., r), on the bank's device; or IndexError"""
        if torch.is_tensor(index) and index.device.type == "cpu":
            index = index.numpy()
        if self.on_device is None:
            if torch.is_tensor(index):
                index = index.cpu().numpy()
            coef = torch.from_numpy(np.array(self.coef[index]))  # copies: the bank is read-only
            scale = torch.from_numpy(np.array(self.scale[index]))
        else:
            if not torch.is_tensor(index):  # IndexError here, not in a kernel
                index = torch.from_numpy(np.array(np.arange(len(self))[index])).to(self.device)
            coef, scale = [stored[index] for stored in self.on_device]
        return coef.float() * scale[..., None]

    def __getitem__(self, index):
        """An int -> (D,); a slice, list, array or tensor of B indices -> (B, D); unit-norm float32,
        on the bank's device. IndexError out of range."""
        return self.decode(self.coefficients(index))

    @isolated
    def unpack(self, coef, scale):
        """Stored rows, coef (..., r) and scale (...), on any device -> snippets (..., D)"""
        return self.decode(coef.float() * scale[..., None])

    @isolated
    def decode(self, coef):
        """coefficients (..., r), any float type -> snippets (..., D), unit-norm float32"""
        mean, basis = self.tensors_on(coef.device)
        return F.normalize(F.linear(coef.float(), basis.T, mean), dim=-1)

    @isolated
    def project(self, features):
        """features (..., D), any norm -> coefficients (..., r) float32"""
        s = F.normalize(float_tensor(features, self.device), dim=-1)
        mean, basis = self.tensors_on(s.device)
        return (s - mean) @ basis.T

    # ---- which rows are near

    @isolated
    def nearest(self, features, k=1):
        """features (B, D), any norm -> cosine (B, k), index (B, k) of the k most similar snippets,
        the most similar first; k at most N. B x 4096 cosines are held at once."""
        if k < 1:
            raise InputError(f"k {k}: expected 1 or more")
        s = F.normalize(float_tensor(features, self.device), dim=-1)
        cosine, index = self.search(s.reshape(-1, self.dim), k, np.arange(len(self)))
        shape = (*s.shape[:-1], cosine.shape[1])
        return cosine.reshape(shape), index.reshape(shape)

    def search(self, s, k, rows):
        """s (B, D) unit-norm; the indices of the rows that are compared, an array -> cosine (B, k),
        index (B, k). It takes r + 1 numbers of each, not D: with p = basis s and m = basis mean,

        cos(s, s_i) = (c_i.p + mean.s) / |c_i basis + mean|
                    = (c_i, 1).(p, mean.s) / sqrt(|c_i|^2 + 2 c_i.m + |mean|^2)
        """
        mean, basis = self.tensors_on(s.device)
        queries = torch.cat([s @ basis.T, (s @ mean)[:, None]], dim=1)  # (B, r + 1)
        cosine = s.new_empty(len(s), 0)
        index = torch.empty(len(s), 0, dtype=torch.int64, device=s.device)
        for i in range(0, len(rows), BLOCK):
            block = rows[i : i + BLOCK]
            c = self.coefficients(block).to(s.device)
            square = c.square().sum(1) + 2 * (c @ (basis @ mean)) + mean @ mean
            compared = torch.cat([c, c.new_ones(len(c), 1)], dim=1)
            compared /= square.clamp_min(1e-20).sqrt()[:, None]
            best, place = (queries @ compared.T).topk(min(k, len(block)))
            cosine = torch.cat([cosine, best], dim=1)
            index = torch.cat([index, torch.from_numpy(block).to(s.device)[place]], dim=1)
            cosine, place = cosine.topk(min(k, cosine.shape[1]))
            index = index.gather(1, place)
        return cosine, index

    @cached_property
    def distinct(self):
        """-> label of each row (N,), 0 where the bank has none; for each row the first row of the
        same coefficients (N,); the first rows of the same coefficients and label, by label (U,)"""
        labels = self.labels if len(self.labels) else np.zeros(len(self), np.int64)
        parts = [self.coef, self.scale[:, None]]
        stored = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
        row_bytes = np.ascontiguousarray(np.concatenate(stored, axis=1))
        row_bytes = row_bytes.view(np.dtype((np.void, row_bytes.shape[1]))).ravel()
        _, first, inverse = np.unique(row_bytes, return_index=True, return_inverse=True)
        content = first[inverse]
        _, first_rows = np.unique((labels + 1) * len(self) + content, return_index=True)
        return labels, content, first_rows

    @isolated
    def neighbours(self, rows, k, same_class=True):
        """rows (B,) -> cosine (B, k), index (B, k) of the k other rows most similar to each, the
        most similar first; of its own class, where it has a label. Equal rows count once.
        Where there are fewer than k: cosine -1, index -1."""
        rows = np.asarray(torch.as_tensor(rows).cpu()).reshape(-1)
        labels, content, first_rows = self.distinct
        content_of = torch.from_numpy(content).to(self.device)
        cosine = torch.full((len(rows), k), -1.0, dtype=torch.float32, device=self.device)
        index = torch.full((len(rows), k), -1, dtype=torch.int64, device=self.device)
        if not same_class:
            labels = np.full_like(labels, -1)
        sorted_labels = labels[first_rows]
        for label in np.unique(labels[rows]):
            start, stop = np.searchsorted(sorted_labels, [label, label + 1])
            candidates = first_rows[start:stop] if label >= 0 else np.unique(content)
            places = np.flatnonzero(labels[rows] == label)
            found = self.search(self[rows[places]], k + 1, candidates)
            own = torch.from_numpy(content[rows[places]]).to(self.device)
            other_cosine = found[0].masked_fill(content_of[found[1]] == own[:, None], -2)
            count = min(k, len(candidates) - 1)
            best, order = other_cosine.topk(count)
            places = torch.from_numpy(places).to(self.device)
            cosine[places, :count] = best
            index[places, :count] = found[1].gather(1, order)
        return cosine, index

    @isolated
    def around(self, rows, noise, spread=1.0):
        """New snippets (B, D) that belong to no row: each a row plus a Gaussian with the covariance
        of its k neighbours, times spread^2 (after manifold Parzen windows, Vincent and Bengio 2002)

            c_i + spread / sqrt(k) sum_j noise_j (c_j - mean of the c_j)     j: neighbours of row i

        rows   (B,) row numbers
        noise  (B, k) standard normal numbers; k is the number of neighbours, at most
        A row with fewer than k neighbours (of its class) uses all of them; one with fewer than two
        comes back unchanged."""
        noise = torch.as_tensor(noise, dtype=torch.float32, device=self.device)
        rows = torch.as_tensor(rows, device="cpu")
        k = noise.shape[-1]
        _, index = self.neighbours(rows, k)
        there = (index >= 0).float()[..., None]  # (B, k, 1)
        count = there.sum(1, keepdim=True).clamp_min(1)
        c_j = self.coefficients(index.clamp_min(0)) * there  # (B, k, r)
        deviation = (c_j - c_j.sum(1, keepdim=True) / count) * there
        step = (noise.reshape(-1, k, 1) * deviation / count.sqrt()).sum(1)
        new = self.coefficients(rows.reshape(-1)) + spread * step
        return self.decode(new).reshape(*rows.shape, self.dim)

    # ---- rows are added

    @isolated
    def extend(self, features, limit=None, labels=None):
        """-> a new bank: the rows of this one, which stay what they are, then features (B, D).
        Their part outside of the basis becomes new directions, largest first: up to one for each
        image, so the rank grows from call to call. The whole bank is copied: add images in one
        call rather than in many. Mixes of rows lie within the basis and add no direction.

        limit   how many new directions at most; None: all beyond rounding
        labels  (B,) of the new rows
        InputError where features hold zeros alone, NaN or infinity.
        """
        s = F.normalize(float_tensor(features, "cpu").cpu(), dim=-1).double().reshape(-1, self.dim)
        check_norms(s.norm(dim=1))
        mean, basis = (part.double() for part in self.tensors_on(torch.device("cpu")))
        c, rest = coefficients_and_rest(s, mean, basis)
        _, size, new = torch.linalg.svd(rest, full_matrices=False)
        new = new[size > 1e-4][:limit]
        new = new - new @ basis.T @ basis  # the basis is orthonormal to rounding only
        new = torch.linalg.qr(new.T)[0].T

        c = torch.cat([c, rest @ new.T], dim=1)
        coef, scale = quantize(c.float(), self.coef.dtype)
        old_labels = self.labels
        if labels is not None and len(old_labels) == 0:
            old_labels = np.full(len(self), -1)
        if labels is None:
            labels = np.full(len(s) if len(old_labels) else 0, -1)
        bank = replace(
            self,
            basis=torch.cat([basis, new]).float().numpy(),
            coef=np.concatenate([np.pad(self.coef, ((0, 0), (0, len(new)))), coef]),
            scale=np.concatenate([self.scale, scale]),
            labels=np.concatenate([old_labels, np.asarray(labels)]),
            id="",
            file=None,
            on_device=None,
        )
        return bank if self.device.type == "cpu" else bank.to(self.device)

    def __str__(self):
        size = sum(a.nbytes for a in (self.mean, self.basis, self.coef, self.scale)) / 1e6
        exact = 4e-6 * len(self) * self.dim
        return (
            f"N {len(self):,}, D {self.dim}, rank {self.rank} keeps {100 * self.energy:.1f} % of "
            f"the variance, {self.coef.dtype}: {size:,.1f} MB against {exact:,.1f} MB, "
            f"by {self.encoder}, id {self.id}"
        )


# ======================== end of the core: images, tokenizers, encoders, preparation, commands ====

# ----------------------------------------------------------------------- what serves the bank alone


ARRAYS = ("mean", "basis", "coef", "scale", "labels")
STORED = (*ARRAYS, "energy", "encoder", "id")  # what the file of a bank holds


def check_parts(bank):
    """InputError where shapes, dtypes or types of a bank are not those that MemoryBank states."""
    D = len(bank.mean)
    N, r = bank.coef.shape
    labels = N if len(bank.labels) else 0
    expected = {
        "mean": ((D,), ["float32"]),
        "basis": ((r, D), ["float32"]),
        "coef": ((N, r), DTYPES),
        "scale": ((N,), ["float32"]),
        "labels": ((labels,), ["int64"]),
    }
    for name, (shape, dtypes) in expected.items():
        array = getattr(bank, name)
        if array.shape != shape or array.dtype not in dtypes:
            given = f"{name} {array.dtype} {array.shape}"
            raise InputError(f"parts of a bank do not fit: {given}, expected {dtypes} {shape}")
    for name, kind in (("energy", float), ("encoder", str), ("id", str)):
        if not isinstance(getattr(bank, name), kind):
            raise InputError(f"parts of a bank do not fit: {name} is no {kind.__name__}")


def content_hash(bank):
    """16 hexadecimal digits"""
    content = hashlib.sha256(bank.encoder.encode())
    for name in ARRAYS:
        content.update(np.ascontiguousarray(getattr(bank, name)))
    return content.hexdigest()[:16]


def read_bank(path):
    """See MemoryBank.load."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        parts = {name: state[name] for name in STORED}
        parts.update({name: parts[name].numpy() for name in ARRAYS})
        return MemoryBank(**parts, file=os.path.abspath(path))
    except OSError:
        raise
    except KeyError as e:
        raise InputError(f"{path} is no memory bank: it lacks {e}") from e
    except Exception as e:  # of any type, where the bytes are not torch's
        reason = f"{type(e).__name__} {str(e)[:100]}"
        raise InputError(f"{path} is damaged, or no memory bank: {reason}") from e


def checked_rank(shape, rank, dtype, labels):
    """-> the rank and dtype that MemoryBank.build uses; InputError for what it cannot use."""
    if len(shape) != 2 or shape[0] == 0:
        raise InputError(f"features {tuple(shape)}: expected (N, D) with N > 0")
    if rank == "full":
        rank = min(shape)
        if dtype == "int8":
            dtype = "float16"
    if not isinstance(rank, (int, np.integer)) or rank < 1:
        raise InputError(f"rank {rank}: expected a whole number of at least 1, or full")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if labels is not None and len(labels) != shape[0]:
        raise InputError(f"{len(labels)} labels for {shape[0]} features")
    if rank > min(shape) and rank_world()[0] == 0:
        lowered = (
            f"rank {rank} lowered to {min(shape)}: {shape[0]:,} snippets of {shape[1]} numbers"
        )
        warnings.warn(lowered, stacklevel=4)
    return min(rank, *shape), dtype


def coefficients_and_rest(s, mean, basis):
    """Snippets s (B, D) -> c (B, r), rest (B, D): a * s = mean + c basis + rest, for some a > 0.

    Snippets differ by their directions alone, so a is free. For the rows of a bank and their mixes
    there is an a with which the rest is zero; for all others a is 1."""
    s_outside = s - s @ basis.T @ basis
    mean_outside = mean - mean @ basis.T @ basis
    if mean_outside.norm() > 1e-4:
        factor = s_outside @ mean_outside / s_outside.square().sum(1).clamp_min(1e-30)
        missing = (factor[:, None] * s_outside - mean_outside).norm(dim=1)
        within = (factor > 0) & (missing < 1e-4 * factor)
        s = torch.where(within[:, None], factor[:, None] * s, s)
    c = (s - mean) @ basis.T
    return c, s - mean - c @ basis


def check_norms(norm, first_row=0):
    """InputError where a norm (b, 1), of features from first_row on, is 0, infinite or NaN"""
    unusable = (~norm.isfinite() | (norm == 0)).flatten().nonzero().flatten()
    if len(unusable) > 0:
        numbers = ", ".join(str(first_row + int(row)) for row in unusable[:5])
        more = "" if len(unusable) <= 5 else f" and {len(unusable) - 5} more"
        raise InputError(f"features of row {numbers}{more} hold NaN, infinity, or zeros alone")


def float64_device(device):
    """The device, or by default a GPU; a CPU in place of Apple's GPUs, which have no float64."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return torch.device("cpu") if device.type == "mps" else device


def unpickled_bank(file, parts, id, device):
    """What a pickled bank becomes, in this process or another one."""
    bank = MemoryBank(**parts) if file is None else MemoryBank.load(file)
    if bank.id != id:
        raise InputError(f"{file} holds the bank {bank.id} now, not {id}, which was sent")
    return bank if device.type == "cpu" else bank.to(device)


# ------------------------------------------------------------------------------------------- images


def to_rgb(image):
    """PIL image -> RGB, 8 bits: upright, transparency on white, 16-bit grey scaled by 1 / 257.

    InputError: a mode in which black and white are not defined (floats, 32-bit integers).
    """
    # 16-bit grey is mode I;16, but I in a PGM, and in a PNG with Pillow 10.
    is_16_bit = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        is_16_bit = True
    if image.mode in ("I", "F") and not is_16_bit:
        raise InputError(
            f"black and white are not defined in mode {image.mode}: save it with 8 or 16 bits"
        )
    bits = getattr(image, "tag_v2", {}).get(258, [16])[0]  # 12 in some TIFF files
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        grey = np.asarray(image).astype(np.float64)
        alpha = np.where(grey == image.info.get("transparency"), 0, 255)
        grey = np.rint(grey * 255 / (2**bits - 1))
        image = Image.fromarray(np.stack([grey, alpha], 2).astype(np.uint8))  # of mode LA
    color = image.info.get("transparency")
    if isinstance(color, tuple) and max(color) > 255:  # of 16-bit RGB, which Pillow reads as 8-bit
        image.info["transparency"] = tuple(value >> 8 for value in color)
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


def read_image(path, draft=None):
    """-> RGB PIL image; draft: a size that is enough, so that a JPEG is decoded smaller.
    InputError, which says what is wrong with the file."""
    try:
        with Image.open(path) as file:
            if draft is not None:
                file.draft("RGB", (draft, draft))
            return to_rgb(file)
    except Exception as e:  # whatever the bytes of a damaged file make Pillow do
        reason = str(e)
        if isinstance(e, Image.DecompressionBombError):
            reason += "; for an image that you trust: --max-pixels N"
        raise InputError(f"{path} cannot be read as an image: {reason}") from e


def fault_of(path):
    """-> what is wrong with an image, "" if nothing is"""
    try:
        read_image(path, draft=64)
    except InputError as e:
        return str(e)
    return ""


def broken_images(files):
    """-> {path: what is wrong} of the files that cannot be read; of several processes each tries
    a share"""
    process, num_processes = rank_world()
    share = files[process::num_processes]
    faults = decoding_threads().imap(fault_of, share, 16)
    bar = tqdm(faults, "checking files", len(share), unit="img", disable=process > 0)
    broken = {file: fault for file, fault in zip(share, bar) if fault}
    if num_processes > 1:
        shares = [None] * num_processes
        dist.all_gather_object(shares, broken)
        for other in shares:
            broken.update(other)
    return broken


def image_files(folder, skip=None):
    """-> sorted paths of all images below a folder; in words, what is left out for its ending.

    What is hidden, and the folder `skip`, is passed over. Links are followed, but for those to what
    holds the folder itself. A real folder is read once, however many links lead to it.
    """
    top = os.path.realpath(folder)
    done = set()
    if skip is not None:
        done.add(os.path.realpath(skip))
    files = []
    places = [folder]
    while places:
        links = []  # they come after the real folders
        for place in places:  # which grows
            path = os.path.realpath(place)
            if path in done or top.startswith(os.path.join(path, "")):
                continue
            done.add(path)
            visible = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
            folders = [entry for entry in visible if entry.is_dir()]
            links += [entry.path for entry in folders if entry.is_symlink()]
            places += [entry.path for entry in folders if not entry.is_symlink()]
            files += [entry.path for entry in visible if not entry.is_dir()]
        places = sorted(links)

    images = []
    left_out = Counter()
    for file in sorted(files):
        ending = os.path.splitext(file)[1].lower()
        if ending in Image.registered_extensions():
            images.append(file)
        else:
            left_out[ending or "without"] += 1
    counts = [f"{count:,} {ending}" for ending, count in left_out.most_common(5)]
    return images, ", ".join(counts)


def read_folder(src, skip_bad=False, out=None):
    """-> paths of images, labels (list; -1: none), classes (the sub-folders); out: passed over"""
    files, left_out = image_files(src, out)
    if left_out:
        note(f"{src}: files left out for their ending: {left_out}")
    if not files:
        raise InputError(f"no images in the folder {src}; expected are files such as .png or .jpg")
    broken = broken_images(files)
    if broken:
        names = ", ".join(sorted(os.path.relpath(file, src) for file in broken))
        message = f"{len(broken):,} of {len(files):,} files in {src} do not decode: {names}"
        if not skip_bad or len(broken) == len(files):
            first = broken[min(broken)]
            raise InputError(f"{message}; --skip-bad goes on without them. The first: {first}")
        note(message)

    # in the order of torchvision's ImageFolder: class by class
    files = [file for file in files if file not in broken]
    files.sort(key=lambda path: path.split(os.sep)[:-1])
    folders = [os.path.dirname(os.path.relpath(file, src)).split(os.sep)[0] for file in files]
    classes = sorted(set(folders) - {""})
    if classes and "" in folders:
        raise InputError(
            f"{src} holds images beside class folders: put all of them in such, or none"
        )
    if not classes:
        return files, [-1] * len(files), []
    if {"train", "val", "valid", "validation", "test"}.issuperset(classes):
        note(f"{src}: the classes are {', '.join(classes)}; for one of these sets give its folder")
    number = {name: i for i, name in enumerate(classes)}
    return files, [number[folder] for folder in folders], classes


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
    if labels.max() > max(1000, len(images)):
        raise InputError(
            f"{src}: the largest label is {labels.max()} for {len(images):,} images; expected are "
            "classes 0, 1, 2, .. (-1: none): number them by numpy.unique(.., return_inverse=True)"
        )
    return images, labels, [str(i) for i in range(int(labels.max()) + 1)]


class Images:
    """images[i] -> uint8 (size, size, 3), of a source as the head of this file has it.

    With flip the mirrored images come after the others. labels: (N,) int64, -1 where there is none;
    classes: their names, [] without labels; files: their paths, None for arrays.
    """

    def __init__(self, src, size, skip_bad=False, flip=False, out=None):
        self.size = size
        self.flip = flip
        self.files = None
        if is_glyphs(src):
            if os.path.exists(src):
                note(f"{src} is the embedded data set here; ./{src} is what you have by that name")
            self.classes = list(src.partition(":")[2] or LETTERS)
            self.array, labels = glyphs(size=size, characters=self.classes)
        elif os.path.isdir(src):
            self.files, labels, self.classes = read_folder(src, skip_bad, out)
        elif src.endswith((".npy", ".npz")):
            self.array, labels, self.classes = read_array(src)
        else:
            fault = fault_of(src)
            if fault:
                raise InputError(f"{fault}; expected a folder of images, an image, .npy or .npz")
            self.files, labels, self.classes = [src], [-1], []
        self.labels = np.tile(labels, 1 + flip).astype(np.int64)
        self[0]  # errors come now

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """-> uint8 tensor (B, size, size, 3), decoded by several threads"""
        return torch.from_numpy(np.stack(decoding_threads().map(self.__getitem__, rows)))

    def __getitem__(self, i):
        mirrored = self.flip and i >= len(self) // 2
        if mirrored:
            i = i - len(self) // 2
        if self.files is None:
            image = Image.fromarray(self.array[i])
        else:
            image = read_image(self.files[i])
        x = np.array(center_crop(image, self.size))
        return x[:, ::-1].copy() if mirrored else x


@cache
def decoding_threads():
    threads = ThreadPool(min(8, os.cpu_count() or 1))
    atexit.register(threads.terminate)
    return threads


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


def from_model(name):
    """A function of model.py, which holds the networks. It is imported here and nowhere else."""
    try:
        import model

        return getattr(model, name)
    except (ImportError, AttributeError) as e:
        place = os.path.dirname(os.path.abspath(__file__))
        raise InputError(
            f"{name} is in GMem's model.py: put that file into {place}, under this name ({e})"
        ) from e


class Pixels:
    """No tokenizer: images (B, 3, H, W) in [-1, 1] <-> 0 .. 255, uint8 on disk."""

    channels = 3
    factor = 1
    dtype = "uint8"

    def encode(self, x):
        return ((x + 1) * 127.5).round()

    def decode(self, z, dtype="float32"):
        return z / 127.5 - 1


class Autoencoder:
    """Images in [-1, 1] <-> latents (B, C, h, w), the means, of a network that
    model.load_autoencoder takes; float16 on disk, computed in float32 as in the official code."""

    dtype = "float16"

    def __init__(self, source, device):
        self.model = from_model("load_autoencoder")(source).to(device)
        self.channels = self.model.channels
        self.factor = self.model.factor

    @torch.no_grad()
    def encode(self, x):
        return self.model.encode(x)[0]

    @torch.no_grad()
    def decode(self, z, dtype="float32"):
        with torch.autocast(z.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return self.model.decode(z.float()).float()


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
        state = from_model("load_file")(settings["latent_stats"], keys=("mean", "std"))
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

    model = from_model("load_dinov2")(name).to(device)
    dinov2_features = from_model("dinov2_features")

    @torch.no_grad()
    def encode(x):
        return dinov2_features(model, (x + 1) * 127.5)

    return encode


def to_float(images):
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]"""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def float_batches(images, device):
    """uint8 (N, H, W, 3) -> float32 (b, 3, H, W) in [-1, 1] on device, 64 images of 256 pixels or
    as many others as have as many pixels"""
    images = torch.as_tensor(images)
    batch_size = max(1, 64 * 256**2 // max(256**2, images.shape[1] ** 2))
    for batch in images.split(batch_size):
        yield to_float(batch.to(device))


def in_batches(f, images, device):
    """f(images in [-1, 1]) of uint8 (N, H, W, 3), batch by batch -> (N, ...) on the CPU"""
    return torch.cat([f(x).cpu() for x in float_batches(images, device)])


# ----------------------------------------------------------------------------- preparing a data set


def refuse_several_nodes():
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < rank_world()[1]:
        raise InputError("several nodes would write to the same pages of a file: use one node here")


class Blocks:
    """Arrays in a folder that the processes of one machine fill block by block, and that a killed
    run goes on with: progress.json says what they are made of, done.npy which blocks are whole.

    settings  what the content depends on; InputError where the folder has content of others
    arrays    file name -> (shape, dtype), all of one length
    block     rows of a block
    """

    def __init__(self, folder, settings, arrays, block):
        refuse_several_nodes()
        process, num_processes = rank_world()
        N = next(iter(arrays.values()))[0][0]
        self.folder = folder
        self.block = block
        on_first_process(self.begin, settings, arrays, -(-N // block))
        self.arrays = {name: np.load(os.path.join(folder, name), mmap_mode="r+") for name in arrays}
        self.done = np.load(os.path.join(folder, "done.npy"), mmap_mode="r+")
        mine = np.flatnonzero(~self.done)[process::num_processes]
        self.todo = [range(N)[i * block : (i + 1) * block] for i in mine]
        if self.done.any():
            done = f"{self.done.sum():,} of {len(self.done):,} blocks of {block}"
            note(f"{folder}: {done} are done already")
        barrier()  # before anybody is done with a block

    def begin(self, settings, arrays, num_blocks):
        """Makes the files, unless they are there, of the same settings."""
        made_of = {**settings, "block": self.block, "arrays": str(arrays)}
        made_of = json.loads(json.dumps(made_of))  # as they are read again: tuples become lists
        progress = os.path.join(self.folder, "progress.json")
        if not os.path.exists(progress):
            reserve(self.folder, arrays)
            np.save(os.path.join(self.folder, "done.npy"), np.zeros(num_blocks, bool))
            write_json(progress, made_of)
        differ = differences(read_json(progress), made_of)
        if differ:
            raise InputError(
                f"{self.folder} is the unfinished work of a command with {differ}: give that one "
                "again, or delete the folder"
            )

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

    def remove(self):
        """Deletes the folder, once all processes have closed its files: what is deleted while it is
        open leaves .nfs files behind."""
        self.arrays = None
        self.done = None
        barrier()
        if rank_world()[0] == 0:
            shutil.rmtree(self.folder)


def space_of(arrays):
    """-> bytes that these arrays, name -> (shape, dtype), take; the same in words"""
    sizes = {}
    for name, (shape, dtype) in arrays.items():
        sizes[os.path.basename(name)] = int(np.prod(shape)) * np.dtype(dtype).itemsize
    words = ", ".join(f"{name} {size / 1e9:,.3f}" for name, size in sizes.items())
    return sum(sizes.values()), f"{sum(sizes.values()) / 1e9:,.3f} GB of disk ({words})"


def reserve(folder, arrays):
    """Makes .npy files, name -> (shape, dtype), all of each, so that a disk that is too small is
    found out now."""
    os.makedirs(folder, exist_ok=True)
    needed, words = space_of(arrays)
    free = shutil.disk_usage(folder).free
    if needed > free:
        os.rmdir(folder)
        raise InputError(f"{folder} needs {words}; free are {free / 1e9:,.3f}")
    for name, (shape, dtype) in arrays.items():
        path = os.path.join(folder, name)
        np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def load_features(path):
    """-> (N, D), of an .npy (mapped), or a .pt with one tensor, as the official GMem's banks"""
    if path.endswith(".npy"):
        features = load_array(path)
    else:
        features = from_model("load_file")(path)
    dtype = getattr(features, "dtype", type(features))
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 2 or "float" not in str(dtype):
        raise InputError(f"{path} holds {dtype} {shape}, expected floats (N, D)")
    return features


def feature_source(settings):
    """What made the features of a prepared folder; unknown where it does not say."""
    made_by = settings.get("features") or settings.get("encoder", "unknown")
    return os.path.basename(made_by)


def size_and_time(stats):
    """Results of os.stat -> bytes in all, and the newest time of change, in words"""
    newest = max((stat.st_mtime_ns for stat in stats), default=0)
    when = datetime.fromtimestamp(newest / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    return f"{sum(stat.st_size for stat in stats):,} bytes, {when}"


def fingerprint(path):
    """What the content of a file is known by, wherever it is moved: name, size, time. None where
    there is no file: published names, too, which folders may have."""
    if path is None or not os.path.isfile(path):
        return None
    return f"{os.path.basename(path)} ({size_and_time([os.stat(path)])})"


def source_fingerprint(src, out):
    """The same of a folder of images, by all its files; out: a folder that is passed over"""
    if is_glyphs(src):
        return None
    if not os.path.isdir(src):
        return fingerprint(src)
    files, _ = image_files(src, out)
    stats = [os.stat(file) for file in files]
    content = hashlib.sha256()
    for file, stat in zip(files, stats):
        name = os.fsencode(os.path.relpath(file, src))
        content.update(b"%s %d %d/" % (name, stat.st_size, stat.st_mtime_ns))
    hashed = content.hexdigest()[:8]
    return f"{len(files):,} files ({size_and_time(stats)}, names and times {hashed})"


# the settings that name content: compared by its fingerprint, not by its place
CONTENT = ("source", "tokenizer", "latent_stats", "encoder", "features")


def prepare_settings(src, out, options):
    """-> all settings, with full paths, as meta.json keeps them; fingerprints of CONTENT"""
    settings = {**defaults(DATA_SETTINGS), **defaults(BANK_SETTINGS), **options, "source": src}
    max_pixels = settings.pop("max_pixels")
    if max_pixels is not None:
        Image.MAX_IMAGE_PIXELS = max_pixels
    made_of = {name: fingerprint(settings[name]) for name in CONTENT}
    made_of["source"] = source_fingerprint(src, out)
    for name in CONTENT:
        if made_of[name] is not None:
            settings[name] = os.path.abspath(settings[name])
    return settings, made_of


def without_place(name):
    if name is None or is_glyphs(name):
        return name
    return os.path.basename(os.path.normpath(name))


def is_prepared(out, settings, made_of):
    """Whether a folder was prepared, of this content with these settings; InputError if of others.
    Content that is no longer there is taken to be the same if its name is."""
    path = os.path.join(out, "meta.json")
    if not os.path.exists(path):
        return False
    meta = read_json(path)
    was = dict(meta["settings"])
    now = dict(settings)
    for name in CONTENT:
        if made_of[name] is None:
            was[name] = without_place(was[name])
            now[name] = without_place(now[name])
        else:
            was[name] = meta.get("made_of", {}).get(name)  # older folders do not have it
            now[name] = made_of[name]
    differ = differences(was, now)
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


def patch_basis(path, images, encode, device):
    """A bank of the patch tokens of 256 images, at path, whose basis all patch tokens are stored
    in. Process 0 makes it, unless it is there; all get it."""
    if rank_world()[0] == 0 and not os.path.exists(path):
        count = len(images) // (1 + images.flip)
        rows = np.linspace(0, count - 1, min(count, 256)).astype(int)
        tokens = in_batches(lambda x: encode(x)[1], images.batch(rows), device)
        MemoryBank.build(tokens.flatten(0, 1), min(RANK, tokens.shape[2]), device=device).save(path)
    barrier()
    return MemoryBank.load(path)


def encode_block(x, tokenizer, encode, patch_bank, names, device):
    """uint8 images (B, H, W, 3) -> what Blocks.write takes of the arrays of these names, each
    (B, ...). Each image goes through each network once."""
    parts = {name: [] for name in names}
    for batch in float_batches(x, device):
        parts["latents"].append(tokenizer.encode(batch).cpu())
        if "features" in names or "patches" in names:
            features, tokens = encode(batch)
        if "features" in names:
            parts["features"].append(features.cpu())
        if "patches" in names:
            c = patch_bank.project(tokens).cpu()
            coef, scale = quantize(c.flatten(0, 1), "int8")
            parts["patches"].append(torch.from_numpy(coef).view(c.shape))
            parts["patch_scales"].append(torch.from_numpy(scale).view(c.shape[:2]))
    return {name: torch.cat(part) for name, part in parts.items()}


def encode_images(images, tokenizer, encode, patch_bank, blocks, device):
    """Fills the arrays of blocks; the next block is decoded while one is encoded."""
    names = [os.path.basename(name).removesuffix(".npy") for name in blocks.arrays]
    with blocks.bar("encoding") as bar:
        for x, rows in zip(ahead(images.batch, blocks.todo), blocks.todo):
            values = encode_block(x, tokenizer, encode, patch_bank, names, device)
            blocks.write(rows, **values)
            bar.update(len(rows))


def prepare(src, out, device="cpu", **options):
    """Images of src -> out/latents.npy (N, C, h, w), labels.npy (N,), bank.pt, files.txt (their
    order) and meta.json; with patches also patches.npy (N, T, 64) and patch_scales.npy (N, T),
    int8 coefficients in the basis of patches.pt, which is a bank of a sample of them.

    options: see DATA_SETTINGS and BANK_SETTINGS. Returns meta, a dict. A killed run resumes; of
    several processes each encodes a share. InputError for what cannot be used.
    """
    out = os.path.normpath(out)
    settings, made_of = prepare_settings(src, out, options)
    if is_prepared(out, settings, made_of):  # then src itself may be gone
        shutil.rmtree(os.path.join(out, "parts"), ignore_errors=True)
        return read_json(os.path.join(out, "meta.json"))
    if made_of["source"] is None and not is_glyphs(src):
        raise InputError(
            f"{src} does not exist; give a folder of images, an .npy or .npz, or glyphs"
        )
    refuse_several_nodes()
    with one_writer(out):
        return prepare_anew(src, out, torch.device(device), settings, made_of)


def arrays_to_fill(images, tokenizer, features, tokens, settings):
    """-> name -> (shape, dtype), as Blocks takes them. Those that stay are where they stay, so that
    there is no moment at which a kill loses them."""
    N = len(images)
    size = settings["image_size"] // tokenizer.factor
    arrays = {"../latents.npy": ((N, tokenizer.channels, size, size), tokenizer.dtype)}
    if settings["features"] is None:
        arrays["features.npy"] = ((N, features.shape[1]), "float32")
    if settings["patches"]:
        T, D = tokens.shape[1:]
        arrays["../patches.npy"] = ((N, T, min(RANK, D)), "int8")
        arrays["../patch_scales.npy"] = ((N, T), "float32")
    return arrays


def prepare_anew(src, out, device, settings, made_of):
    """See prepare."""
    size = settings["image_size"]
    stats = known_stats(settings)
    tokenizer, encode = load_networks(settings, device)
    features, tokens = encode(torch.zeros(1, 3, size, size, device=device))
    if settings["patches"] and tokens is None:
        raise InputError(
            f"the encoder {settings['encoder']} has no patch tokens (for --patches or --align)"
        )
    images = Images(src, size, settings["skip_bad"], settings["flip"], out)
    arrays = arrays_to_fill(images, tokenizer, features, tokens, settings)
    note(f"{out} takes {space_of(arrays)[1]}")
    if settings["features"] is not None:
        features = load_features(settings["features"])
        if len(features) != len(images):
            raise InputError(
                f"{settings['features']} holds {len(features):,} rows for {len(images):,} entries "
                f"of {src}"
            )

    parts = os.path.join(out, "parts")
    options = {name: settings[name] for name in settings if name not in CONTENT}
    named = {name: without_place(settings[name]) for name in CONTENT if made_of[name] is None}
    blocks = Blocks(parts, {**options, **made_of, **named, "images": len(images)}, arrays, 256)
    patch_bank = None
    if settings["patches"]:
        patch_bank = patch_basis(os.path.join(parts, "patches.pt"), images, encode, device)
    encode_images(images, tokenizer, encode, patch_bank, blocks, device)
    blocks.finish()
    if settings["features"] is None:
        features = blocks.arrays["features.npy"]
    if stats is None:
        stats = measured_stats(blocks.arrays["../latents.npy"])
    meta = {
        "settings": settings,
        "made_of": made_of,
        "images": len(images) // (1 + images.flip),
        "latent": arrays["../latents.npy"][0][1:],
        "classes": images.classes,
        "class_counts": np.bincount(images.labels[images.labels >= 0]).tolist(),
        "mean": stats[0],  # the network sees (latent - mean) / std
        "std": stats[1],
    }
    save_prepared(out, meta, images, features, patch_bank, device)
    del features  # a map of a file that is removed
    blocks.remove()
    return read_json(os.path.join(out, "meta.json"))


def save_prepared(out, meta, images, features, patch_bank, device):
    """The banks, labels.npy, files.txt, and last meta.json, which says that the folder is whole."""
    settings = meta["settings"]
    bank = MemoryBank.build(
        features,
        settings["rank"],
        settings["dtype"],
        images.labels,
        feature_source(settings),
        distributed=True,
        device=device,
    )
    if bank is not None:
        bank.save(os.path.join(out, "bank.pt"), overwrite=True)
        if patch_bank is not None:
            patch_bank.save(os.path.join(out, "patches.pt"), overwrite=True)
        labels = os.path.join(out, "labels.npy")
        with atomic_write(labels) as temporary, open(temporary, "wb") as file:
            np.save(file, images.labels)
        if images.files is not None:
            write_order(os.path.join(out, "files.txt"), images.files, settings["source"])
        write_json(os.path.join(out, "meta.json"), {**meta, "bank": bank.id})
    barrier()


def write_order(path, files, source):
    """files.txt: a line for each image, its path within the source, in the order of the rows"""
    top = source if os.path.isdir(source) else os.path.dirname(source)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.writelines(os.fsencode(os.path.relpath(name, top) + "\n") for name in files)


# -------------------------------------------------------------------------- what the commands share


def note(text):
    """Prints a line, in one process of all."""
    if rank_world()[0] == 0:
        print(text)


def differences(was, now):
    """The settings of `now` that were others, in words."""
    return ", ".join(
        f"{name} {was.get(name)}, not {now[name]}" for name in now if was.get(name) != now[name]
    )


def in_range(low, high=float("inf"), kind=int):
    """-> a type for argparse: a number in [low, high)"""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high})")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def rank_or_full(text):
    return text if text == "full" else in_range(1)(text)


rank_or_full.__name__ = "rank"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(message)


def help_formatter(prog):
    return argparse.HelpFormatter(prog, max_help_position=32, width=100)


def read_flags(settings, description, groups=None):
    """-> the settings that the command line gives, and no others.

    settings  name -> (default, type, help); a type is what argparse takes as one, bool, a tuple of
              choices, or a dict of argparse's options
    groups    name of a setting -> title in --help for it and those that follow"""
    parser = Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.formatter_class = help_formatter
    group = parser
    for name, (default, kind, text) in settings.items():
        if groups is not None and name in groups:
            group = parser.add_argument_group(groups[name])
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, tuple):
            options = {"choices": kind, "metavar": name.upper()}
            text = f"{text} [{', '.join(kind)}]"
        elif isinstance(kind, dict):
            options = kind
        else:
            options = {"type": kind}
        if default is not None:
            text = f"{text} (default: {default})"
        group.add_argument(f"--{name.replace('_', '-')}", help=text, **options)
    return vars(parser.parse_args())


def defaults(settings):
    return {name: default for name, (default, _, _) in settings.items()}


def one_line_warning(message, *place):
    return f"{os.path.basename(sys.argv[0])}: warning: {message}\n"


class SafeFile(io.FileIO):
    """A file whose reader may have gone, as that of a pipe: this ends no run."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def safe_output(stream):
    """Standard output or error -> the same, which also takes characters that it cannot show"""
    if stream is None:  # it was closed
        return open(os.devnull, "w")
    file = io.BufferedWriter(SafeFile(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True)


def cli(main):
    """Runs main(); bad input ends as one line on stderr and exit code 2. Others: a traceback."""
    warnings.formatwarning = one_line_warning
    if sys.stdout is sys.__stdout__:
        sys.stdout = safe_output(sys.stdout)
        sys.stderr = safe_output(sys.stderr)
    try:
        main()
        barrier()
        leave_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as e:
        # by name, because model.py has an InputError of its own, so that it can be copied alone
        if isinstance(e, ValueError) and type(e).__name__ != "InputError":
            raise
        text = " ".join(str(e).split())
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        leave_group()
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
    except RuntimeError as e:
        if "inline_container" not in str(e) and "PytorchStreamWriter" not in str(e):
            raise
        # what torch.save makes of a full disk
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


def launch_number(name, default):
    """A variable of the environment that torchrun sets, or the default. InputError if no number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r} in the environment, expected a number from torchrun")
    return int(text)


def best_device(name=None):
    """-> torch.device: name, or the best there is; of several GPUs the one of this process"""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        name = "cpu" if accelerator is None else accelerator.type
    if name == "cuda":
        local_rank = launch_number("LOCAL_RANK", 0)
        if local_rank > 0 and torch.cuda.device_count() == 1:
            print(f"process {local_rank} of this machine uses cuda:0, the only GPU that it sees")
            local_rank = 0
        name = f"cuda:{local_rank}"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"--device {name} is unavailable ({reason}); --device cpu works") from e


def default_dtype(device):
    """The dtype of a forward pass: bfloat16 on GPUs that compute in it, float32 elsewhere"""
    if device.type != "cuda":
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    if rank_world()[0] == 0:
        print(f"{device} does not compute in bfloat16: float32 is used")
    return "float32"


def init_distributed(device):
    """Joins the processes that torchrun has started, if it has. InputError where the environment
    holds a part of what torchrun sets."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    expected = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in expected if name not in os.environ)
    given = ", ".join(name for name in expected[:2] if name in os.environ)
    if not given or dist.is_initialized():
        return
    if missing:
        raise InputError(
            f"{given} in the environment without {missing}: start with torchrun, or unset {given}"
        )
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        launch_number(name, 0)
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
    """Waits, up to a day, until all processes are here."""
    if rank_world()[1] > 1:
        dist.barrier(patient_group())


def leave_group():
    """Left to the interpreter's end, gloo's threads may abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_process(f, *args):
    """f(*args) on process 0 -> its result there, None on the others, which wait, up to a day.
    Where it raises, process 0 raises the error and the others end silently, with exit code 2."""
    result = None
    error = None
    if rank_world()[0] == 0:
        try:
            result = f(*args)
        except Exception as e:  # noqa: BLE001 - raised below, once the others know of it
            error = e
    failed = torch.tensor(float(error is not None))
    if rank_world()[1] > 1:
        dist.all_reduce(failed, group=patient_group())
    if error is not None:
        raise error
    if failed > 0:
        leave_group()
        sys.exit(2)
    return result


LOCK = ".lock"  # the lock file in a folder that a command writes to


def lock_path(out):
    """The lock file of an output: in a folder; beside a file (.npz, .png, .pt)"""
    out = os.path.abspath(out)  # without a slash at its end
    folder, name = os.path.split(out)
    if name.lower().endswith((".npz", ".png", ".pt")) and not os.path.isdir(out):
        return os.path.join(folder, f".{name}{LOCK}")
    return os.path.join(out, LOCK)


def is_at(path, file):
    """Whether an open file is the one at path."""
    return os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def take_lock(out):
    """-> the lock file of an output, open and locked by this process; None, which is said, on a
    system without locks. InputError where another process holds it."""
    path = lock_path(out)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while fcntl is not None:
        file = open(path, "a+")  # noqa: SIM115 - kept open; not emptied: it says who holds it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            holder = file.read() or "another process"
            raise InputError(f"{holder} is writing to {out}: wait, or name another --out") from e
        except OSError as e:
            print(f"{path} cannot be locked ({e}): take care that one command alone writes there")
            return None
        if is_at(path, file):  # else its last holder has just removed it
            file.truncate(0)
            command = os.path.basename(sys.argv[0])
            file.write(f"{command} (process {os.getpid()} on {socket.gethostname()})")
            file.flush()
            return file
        file.close()
    print(f"this system has no file locks: take care that one command alone writes to {out}")
    return None


@contextmanager
def one_writer(out):
    """Within the block no other command writes to the output `out`, a folder or a file.

    Of several processes, the first one holds the lock for all. The system releases it when that
    process ends, by kill -9 too. InputError, which says who writes, where another command does."""
    folder = os.path.dirname(lock_path(out))
    new_folder = rank_world()[0] == 0 and not os.path.isdir(folder)
    file = on_first_process(take_lock, out)
    try:
        yield
        barrier()  # all processes have written
    finally:
        if file is not None:
            if is_at(file.name, file):
                os.remove(file.name)
            file.close()
        if new_folder and os.path.isdir(folder) and not os.listdir(folder):
            os.rmdir(folder)


# name: (default, type, help)
DATA_SETTINGS = {
    "image_size": (256, in_range(1), "height and width that images are cropped to"),
    "tokenizer": ("pixel", str, "pixel, sd-vae-ft-ema, vavae-f16d32, or a file of an autoencoder"),
    "latent_stats": (None, str, "file with mean and std of latents, instead of measured ones"),
    "encoder": (
        "thumbnail",
        str,
        "thumbnail, dinov2_vits14, dinov2_vitb14, dinov2_vitl14, or a file of a DINOv2",
    ),
    "rank": (RANK, rank_or_full, "directions that the bank keeps, or full"),
    "flip": (False, bool, "add the mirror image of each image, with its own row of the bank"),
    "skip_bad": (False, bool, "leave out files that cannot be read as images"),
    "max_pixels": (
        None,
        in_range(1),
        "refuse images of over twice as many pixels (default: Pillow's)",
    ),
}
BANK_SETTINGS = {
    "features": (None, str, "features (N, D), .npy or .pt; without --data OUT is their bank"),
    "dtype": ("int8", DTYPES, "dtype of the bank's coefficients (with --rank full not int8)"),
    "patches": (False, bool, "keep the patch tokens too, for train.py --align"),
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
        with one_writer(args.out):
            bank = MemoryBank.build(features, args.rank, args.dtype, distributed=True)
            if bank is not None:
                bank.save(args.out)
    if rank_world()[0] == 0:
        print(f"{args.out}: {MemoryBank.load(bank_file)}")


if __name__ == "__main__":
    cli(main)
