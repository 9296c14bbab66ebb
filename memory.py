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
DIR gets latents.npy, labels.npy, bank.pt, files.txt (the order of the images) and meta.json. A
folder is prepared once; a preparation that was killed goes on when the command is given again.

For mask, mix and MemoryBank this file can be copied alone; tokenizers and encoders are in model.py.
"""

import argparse
import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

RANK = 64  # of a bank, by default
DTYPES = ("int8", "float16", "float32")  # of a bank's coefficients
BLOCK = 4096  # rows of a bank are computed so many at a time
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the data set of glyphs
THREADS = ThreadPoolExecutor(min(16, os.cpu_count() or 1))  # they decode images


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected."""


def mask(s, ratio, generator=None):
    """A random fraction of the entries of s (B, D) is zero, the rest divided by 1 - ratio, which is
    in [0, 1). SiT does the same by dropout; this is for other networks."""
    keep = torch.rand(s.shape, generator=generator, dtype=torch.float32) >= ratio
    return s * keep.to(s.device) / (1 - ratio)


def mix(a, b, alpha, method="slerp"):
    """Snippets between a and b, (..., D), unit-norm.

    alpha   0 is a, 1 is b; a number or (..., 1)
    method  slerp: along the great circle, by alpha times the angle; lerp: along the chord
    """
    assert method in ("slerp", "lerp"), method
    a = F.normalize(a, dim=-1)
    b = F.normalize(b, dim=-1)
    alpha = torch.as_tensor(alpha, dtype=a.dtype, device=a.device)
    if method == "lerp":
        return F.normalize(torch.lerp(a, b, alpha), dim=-1)
    cosine = (a * b).sum(-1, keepdim=True)
    across = b - cosine * a  # the part of b at right angles to a
    angle = alpha * torch.atan2(across.norm(dim=-1, keepdim=True), cosine)
    return F.normalize(angle.cos() * a + angle.sin() * F.normalize(across, dim=-1), dim=-1)


@contextmanager
def full_float32():
    """Within it: no gradients, autocast, TF32 or inference mode, whatever the caller has set."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    cpu = torch.autocast("cpu", enabled=False)
    cuda = torch.autocast("cuda", enabled=False)
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.inference_mode(False), torch.no_grad(), cpu, cuda:
            yield
    finally:
        for backend, precision in zip(backends, before):
            backend.fp32_precision = precision


def float_tensor(features, device):
    """(..., D) of any float type -> float32 on device; an array is copied"""
    if not torch.is_tensor(features):
        features = torch.tensor(np.asarray(features, np.float32))
    return features.detach().to(device, torch.float32)


def unit_norm(features, first_row=0):
    """Features (B, D) of the rows from first_row on -> snippets (B, D)"""
    norm = features.norm(dim=1)
    bad = (~norm.isfinite() | (norm == 0)).nonzero().flatten() + first_row
    if len(bad) > 0:
        raise InputError(f"features of {len(bad)} rows are NaN, infinite or 0: {bad[:5].tolist()}")
    return features / norm[:, None]


def snippet_blocks(features, device, what):
    """Yields slices of rows and their snippets, float32 (b, D), block by block"""
    starts = range(0, features.shape[0], BLOCK)
    for i in progress(starts, desc=what, unit="block", leave=False, delay=2):
        rows = slice(i, i + BLOCK)
        yield rows, unit_norm(float_tensor(features[rows], device), i)


def principal_directions(features, device):
    """-> mean of the snippets (D,); eigenvectors of their covariance, rows (min(N, D), D), largest
    variance first; variances (min(N, D),). All float64."""
    N, D = features.shape
    if N < D:
        s = torch.cat([s for _, s in snippet_blocks(features, device, "snippets")]).double()
        mean = s.mean(0)
        _, size, directions = torch.linalg.svd(s - mean, full_matrices=False)
        return mean, directions, size.square() / N
    total = torch.zeros(D, dtype=torch.float64, device=device)
    gram = torch.zeros(D, D, dtype=torch.float64, device=device)
    for _, s in snippet_blocks(features, device, "mean and covariance"):
        s = s.double()
        total += s.sum(0)
        gram += s.T @ s
    mean = total / N
    variances, vectors = torch.linalg.eigh(gram / N - torch.outer(mean, mean))  # ascending
    return mean, vectors.flip(1).T, variances.flip(0).clamp_min(0)


def quantize(c, dtype):
    """Coefficients (..., r) -> as they are stored: coef (..., r) of dtype, scale (...). int8 counts
    in steps of a 127th of a row's largest coefficient."""
    if dtype != torch.int8:
        return c.to(dtype), c.new_ones(c.shape[:-1])
    scale = c.abs().amax(-1).clamp_min(1e-12) / 127
    return (c / scale[..., None]).round().to(dtype), scale


@dataclass(frozen=True, eq=False)
class MemoryBank:
    """N unit-norm snippets of D numbers: scale_i coef_i @ basis + mean, normalised. A bank never
    changes: extend() and to() make new ones. Where (B, D) is taken, one vector (D,) is, too."""

    mean: torch.Tensor  # (D,) float32
    basis: torch.Tensor  # (r, D) float32, orthonormal rows, largest variance first
    coef: torch.Tensor  # (N, r) int8, float16 or float32
    scale: torch.Tensor  # (N,) float32: quantisation step of each row (1 for floats)
    labels: torch.Tensor  # (N,) int64, -1 where there is none
    energy: float  # fraction of the variance that the basis kept when the bank was built
    encoder: str = "unknown"  # what made the features
    id: str = ""  # hash of the content
    classes: tuple = ()  # names of the labels 0, 1, ..
    mirrored: int = 0  # n > 0: rows n .. 2n-1 are of the mirror images of rows 0 .. n-1

    @property
    def dim(self):
        return self.basis.shape[1]

    @property
    def rank(self):
        return self.basis.shape[0]

    def __len__(self):
        return len(self.coef)

    # ---- a bank is made and kept

    @staticmethod
    @full_float32()
    def build(features, rank=RANK, dtype="int8", labels=None, device="cpu", **fields):
        """A bank of features (N, D) of any float type and norm: a tensor, an array, a memmap larger
        than memory, or whatever has a shape and gives rows when sliced. They are read twice.

        rank    directions kept, at most min(N, D); "full": all, in float16 at least, to be exact
        dtype   of the coefficients, one of DTYPES
        labels  (N,) integers, -1: none
        device  of the computation; the bank that is returned is on the CPU
        fields  encoder, classes and mirrored of the bank
        """
        N, D = features.shape
        labels = torch.tensor(np.full(N, -1) if labels is None else np.asarray(labels)).long()
        if labels.shape != (N,) or dtype not in DTYPES:
            raise InputError(f"{len(labels)} labels, {dtype}: expected {N}, one of {DTYPES}")
        if rank == "full":
            rank = min(N, D)
            dtype = "float16" if dtype == "int8" else dtype
        rank = min(int(rank), N, D)
        dtype = getattr(torch, dtype)
        if torch.device(device).type == "mps":
            device = "cpu"  # Apple's GPUs have no float64

        mean, directions, variances = principal_directions(features, device)
        mean = mean.float()
        basis = directions[:rank].float().contiguous()
        coef = torch.empty(N, rank, dtype=dtype)
        scale = torch.empty(N, dtype=torch.float32)
        for rows, s in snippet_blocks(features, device, "coefficients"):
            coef[rows], scale[rows] = quantize((s - mean) @ basis.T, dtype)
        energy = float(variances[:rank].sum() / variances.sum().clamp_min(1e-30))
        bank = MemoryBank(mean.cpu(), basis.cpu(), coef, scale, labels, energy, **fields)
        return replace(bank, id=bank.content_hash())

    def content_hash(self):
        """16 hexadecimal digits"""
        content = hashlib.sha256(self.encoder.encode())
        for tensor in (self.mean, self.basis, self.coef, self.scale, self.labels):
            content.update(np.ascontiguousarray(tensor.cpu().numpy()))
        return content.hexdigest()[:16]

    def save(self, path):
        with atomic_write(path) as file:
            torch.save(vars(self.to("cpu")), file)

    @staticmethod
    def load(path):
        """Maps the file into memory: rows are read when they are used, and processes share them."""
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(content, dict) or "basis" not in content:
            raise InputError(f"{path} is no memory bank")
        if len(content["labels"]) == 0:  # of an older version
            content["labels"] = torch.full((len(content["coef"]),), -1)
        return MemoryBank(**content)

    def to(self, device):
        """-> the same bank on device, where its rows are then computed"""
        tensors = {name: x.to(device) for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors)

    # ---- rows to snippets, and back

    @full_float32()
    def coefficients(self, index):
        """Rows by any index -> c (..., r) float32"""
        if torch.is_tensor(index):
            index = index.to(self.coef.device)
        return self.coef[index].float() * self.scale[index][..., None]

    def __getitem__(self, index):
        """An int -> (D,); a slice, list, array or tensor of B indices -> (B, D); unit-norm float32,
        on the bank's device."""
        return self.decode(self.coefficients(index))

    @full_float32()
    def decode(self, c):
        """Coefficients (..., r), on any device -> snippets (..., D), unit-norm float32"""
        return F.normalize(c.float() @ self.basis.to(c.device) + self.mean.to(c.device), dim=-1)

    @full_float32()
    def project(self, features):
        """Features (..., D) of any norm -> coefficients (..., r) float32"""
        s = F.normalize(float_tensor(features, self.coef.device), dim=-1)
        return (s - self.mean) @ self.basis.T

    # ---- which rows are near

    @full_float32()
    def nearest(self, features, k=1):
        """Features (B, D) of any norm -> cosine (B, k), index (B, k) of the k most similar rows,
        the most similar first. B x 4096 cosines are held at once."""
        s = F.normalize(float_tensor(features, self.coef.device), dim=-1)
        return self.search(s, torch.arange(len(self)), min(k, len(self)))

    def search(self, s, rows, k, leave_out_equal=False):
        """s (B, D) unit-norm -> cosine (B, k), index (B, k) of the most similar of the rows (n,).
        Where there are fewer than k: cosine -1, index -1. Rows are not decoded; c_i suffices:

        cos(s, s_i) = (c_i.(basis s) + mean.s) / |c_i basis + mean|
        """
        projected = s @ self.basis.T
        mean_basis = self.basis @ self.mean
        cosine = s.new_full((*s.shape[:-1], k), -1)
        index = torch.full_like(cosine, -1, dtype=torch.int64)
        for block in rows.to(s.device).split(BLOCK):
            c = self.coefficients(block)
            square = c.square().sum(1) + 2 * (c @ mean_basis) + self.mean @ self.mean
            block_cosine = projected @ c.T + (s @ self.mean)[..., None]
            block_cosine /= square.clamp_min(1e-20).sqrt()
            if leave_out_equal:
                block_cosine[block_cosine > 1 - 1e-6] = -1
            index = torch.cat([index, block.expand_as(block_cosine)], dim=-1)
            cosine, place = torch.cat([cosine, block_cosine], dim=-1).topk(k)
            index = index.gather(-1, place)
        return cosine, index.masked_fill(cosine == -1, -1)

    @full_float32()
    def neighbours(self, rows, k, s=None):
        """rows (B,) -> cosine, index (B, k) of the k most similar candidates; -1: there are fewer.
        Candidates are the rows of its class and its half (originals or mirror images), or, without
        a label or with fewer than 3, all rows of its half. Equal rows (itself, duplicates) are left
        out. With s (B, D): most similar to s[i] among these candidates, none left out."""
        rows = torch.as_tensor(rows, device=self.coef.device).reshape(-1)
        queries = self[rows] if s is None else s.to(self.coef.device)
        cosine = queries.new_empty(len(rows), k)
        index = torch.empty_like(cosine, dtype=torch.int64)
        half = torch.zeros_like(self.labels)
        half[self.mirrored : 2 * self.mirrored] = 1  # 0: originals, 1: mirror images
        groups = torch.stack([self.labels, half], dim=1)
        for group in groups[rows].unique(dim=0):
            places = (groups[rows] == group).all(1)
            candidates = (groups == group).all(1).nonzero().flatten()
            if group[0] < 0 or len(candidates) < 3:
                candidates = (half == group[1]).nonzero().flatten()
            found = self.search(queries[places], candidates, k, leave_out_equal=s is None)
            cosine[places], index[places] = found
        return cosine, index

    @full_float32()
    def around(self, rows, noise, spread=1.0):
        """New snippets (B, D) that belong to no row: each a row plus a Gaussian with the covariance
        of its k neighbours, times spread^2 (after manifold Parzen windows, Vincent and Bengio 2002)

            c_i + spread / sqrt(k) sum_j noise_j (c_j - mean of the c_j)     j: neighbours of row i

        rows (B,); noise (B, k): standard normal numbers. A row with fewer than k neighbours uses
        those; with fewer than two it comes back unchanged."""
        noise = torch.as_tensor(noise, dtype=torch.float32, device=self.coef.device)
        rows = torch.as_tensor(rows, device=self.coef.device)
        _, index = self.neighbours(rows, noise.shape[-1])
        c_j = self.coefficients(index)  # (B, k, r)
        c_j[index < 0] = torch.nan  # no neighbour: left out below
        deviation = c_j - c_j.nanmean(1, keepdim=True)
        k = (index >= 0).float().sum(1, keepdim=True).clamp_min(1)
        step = (noise[..., None] * deviation).nansum(1) / k.sqrt()
        return self.decode(self.coefficients(rows) + spread * step.reshape(*rows.shape, -1))

    @full_float32()
    def extend(self, features, labels=None):
        """-> a new bank: the rows of this one, which stay what they are, then features (B, D), with
        labels (B,) or none. What of them is outside of the basis becomes new directions: up to one
        for each image. The whole bank is copied: add images in one call."""
        s = unit_norm(float_tensor(features, "cpu").reshape(-1, self.dim)).double()
        old = self.to("cpu")
        basis = old.basis.double()
        c = (s - old.mean) @ basis.T
        rest = s - old.mean - c @ basis
        _, size, new = torch.linalg.svd(rest, full_matrices=False)
        new = new[size > 1e-4]
        new = new - new @ basis.T @ basis  # the basis is orthonormal to rounding only

        coef, scale = quantize(torch.cat([c, rest @ new.T], dim=1).float(), old.coef.dtype)
        labels = torch.as_tensor(-1 if labels is None else labels).expand(len(s))
        bank = replace(
            old,
            basis=torch.cat([old.basis, new.float()]),
            coef=torch.cat([F.pad(old.coef, (0, len(new))), coef]),
            scale=torch.cat([old.scale, scale]),
            labels=torch.cat([old.labels, labels]),
        )
        return replace(bank, id=bank.content_hash()).to(self.coef.device)

    def __str__(self):
        stored = sum(x.nbytes for x in (self.mean, self.basis, self.coef, self.scale)) / 1e6
        exact = 4e-6 * len(self) * self.dim
        return (
            f"N {len(self):,}, D {self.dim}, rank {self.rank} keeps {100 * self.energy:.1f} % of "
            f"the variance, {str(self.coef.dtype)[6:]}: {stored:,.1f} MB against {exact:,.1f} MB, "
            f"by {self.encoder}, id {self.id}"
        )


def to_rgb(image):
    """PIL image -> RGB, 8 bits: upright, transparency on white, 16-bit grey scaled to 8 bits.
    InputError for floats and 32-bit integers, in which black and white are not defined."""
    is_16_bit = image.mode.startswith("I;16")
    is_16_bit |= image.mode == "I" and image.format in ("PNG", "PPM")  # so Pillow opens 16 bits
    if image.mode in ("I", "F") and not is_16_bit:
        raise InputError(f"mode {image.mode} has no black and white: save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_files(folder):
    """-> paths of all images below a folder, folder by folder, as torchvision's ImageFolder sorts
    them. Links are followed, each real folder once; hidden and system folders are passed over."""
    passed_over = (".", "@", "$RECYCLE.BIN", "__MACOSX", "lost+found")
    endings = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp")
    endings += (".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".tga")
    visited = set()
    files = []
    for place, folders, names in os.walk(folder, onerror=print, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(passed_over))
        if os.path.realpath(place) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(place))
        for name in sorted(names):
            if os.path.splitext(name.lower())[1] in endings and not name.startswith(passed_over):
                files.append(os.path.join(place, name))
    return files


def read_image(path):
    with Image.open(path) as file:
        return to_rgb(file)


def center_crop(image, size):
    """The crop of ADM and DiT: box filter while twice too large, then bicubic, then the centre."""
    longest = 8 * min(image.size)  # a banner is cut first: enlarged as a whole it takes gigabytes
    image = ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    ratio = size / min(image.size)
    image = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def fault_of(path):
    """-> what is wrong with an image file, "" if nothing is"""
    try:
        read_image(path)
    except Exception as e:  # noqa: BLE001 - whatever the bytes of a damaged file make Pillow raise
        return f"{path} ({type(e).__name__}: {e})"
    return ""


def read_folder(src, skip_bad=False):
    """-> paths, labels (-1: none), classes. All images are decoded, to name the broken ones."""
    files = image_files(src)
    faults = THREADS.map(fault_of, files)
    faults = list(progress(faults, desc="checking images", total=len(files), unit="img"))
    broken = [fault for fault in faults if fault]
    if broken:
        message = f"{len(broken):,} of {len(files):,} images do not decode: {'; '.join(broken)}"
        if not skip_bad:
            raise InputError(f"{message}; a preparation with --skip-bad leaves them out")
        print(message)
    files = [file for file, fault in zip(files, faults) if not fault]
    folders = [os.path.dirname(os.path.relpath(file, src)).split(os.sep)[0] for file in files]
    classes, labels = np.unique(folders, return_inverse=True)
    if not files or (len(classes) > 1 and "" in classes):
        raise InputError(f"{src}: expected images (.png, .jpg, ..), all in class folders or none")
    if classes[0] == "":
        return files, [-1] * len(files), []
    return files, labels, classes.tolist()


def read_array(src):
    """-> images uint8 (N, H, W, 3) of an .npy (mapped into memory) or .npz, labels (N,), classes"""
    content = np.load(src, mmap_mode="r")
    if src.endswith(".npy"):
        content = {"arr_0": content}
    images = content["arr_0"]
    labels = content.get("arr_1", np.full(len(images), -1))
    if images.shape[3:] != (3,) or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        arrays = f"{images.dtype} {images.shape} and labels {labels.shape}"
        raise InputError(f"{src} holds {arrays}: expected uint8 (N, H, W, 3) and (N,)")
    return images, labels, [str(i) for i in range(int(labels.max()) + 1)]


class Images:
    """images[i] -> uint8 (size, size, 3), of a source as the head of this file has it. labels (N,)
    int64, -1: none; classes: their names; files: paths of the images, None for arrays."""

    def __init__(self, src, size, skip_bad=False):
        self.size = size
        self.files = None
        if src == "glyphs":
            self.classes = list(LETTERS)
            self.array, labels = glyphs(size=size)
        elif os.path.isdir(src):
            self.files, labels, self.classes = from_process_zero(read_folder, src, skip_bad)
        elif src.endswith((".npy", ".npz")):
            self.array, labels, self.classes = read_array(src)
        else:
            Image.open(src).close()  # errors come now
            self.files, labels, self.classes = [src], [-1], []
        self.labels = np.array(labels, np.int64)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = Image.fromarray(self.array[i]) if self.files is None else read_image(self.files[i])
        return np.array(center_crop(image, self.size))

    def batch(self, rows):
        """-> uint8 tensor (B, size, size, 3), decoded by several threads"""
        return torch.from_numpy(np.stack(list(THREADS.map(self.__getitem__, rows))))


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
    for i in progress(range(n), desc="drawing glyphs", unit="img", leave=False):
        ink = Image.new("L", (big, big))
        draw = ImageDraw.Draw(ink)
        font = fonts[height[i]]
        draw.text(place[i], characters[labels[i]], 255, font, "mm", stroke_width=round(0.03 * big))
        ink = ink.rotate(angle[i], Image.BILINEAR).resize((size, size), Image.BOX)
        along = 0.5 + np.cos(direction[i]) * x + np.sin(direction[i]) * y
        paper = back[i] + along * (end[i] - back[i])
        images[i] = np.rint(255 * paper + np.asarray(ink)[..., None] * (front[i] - paper))
    return images, labels


def known_stats(tokenizer, latent_stats):
    """Names or files -> mean and std per channel of latents, two lists; None: to be measured"""
    if tokenizer == "pixel":
        return [127.5] * 3, [127.5] * 3
    if latent_stats is not None:  # such as VA-VAE's latents_stats.pt
        from model import load_file

        stats = load_file(latent_stats)
        return stats["mean"].flatten().tolist(), stats["std"].flatten().tolist()
    if tokenizer == "sd-vae-ft-ema":
        return [0.0] * 4, [1 / 0.18215] * 4
    return None


def stats_tensor(meta, device):
    """meta: of a prepared folder -> tensor (2, C, 1, 1): mean and std per channel"""
    return torch.tensor([meta["mean"], meta["std"]], device=device)[..., None, None]


def normalize_latents(latents, stats):
    """Latents as they are stored (B, C, h, w) -> as the network sees them, float32"""
    return (latents.float() - stats[0]) / stats[1]


def denormalize_latents(x, stats):
    return x * stats[1] + stats[0]


def in_batches(f, images, device):
    """uint8 images (N, H, W, 3) -> f of all, on the CPU, computed in batches of 64, or fewer above
    256 pixels. f: images (b, 3, H, W) in [-1, 1] -> list of tensors (b, ..)"""
    batch_size = max(1, 64 * 256**2 // max(256**2, images.shape[1] ** 2))
    results = []
    for batch in torch.as_tensor(images).split(batch_size):
        x = batch.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        results.append([part.cpu() for part in f(x)])
    return [torch.cat(parts) for parts in zip(*results)]


def encode_features(images, encoder, device="cpu"):
    """uint8 (N, H, W, 3), the encoder's name or file (see model.load_encoder) -> features (N, D)"""
    from model import load_encoder

    encode = process_zero_first(load_encoder, encoder, device)
    return in_batches(lambda x: encode(x)[:1], images, device)[0]


class ResumableArrays:
    """Arrays in .npy files of a folder, which the processes of one machine fill, `size` rows at a
    time. A killed command goes on where it stopped.

    arrays  {name: (shape, dtype)}, kept as {name: memmap}; "done" is added, one bool per block
    todo    the ranges of rows that are left to this process
    InputError where another command fills the folder now, or began to, with other settings."""

    def __init__(self, folder, settings, arrays, num_rows, size):
        self.size = size
        path = f"{folder}/progress.json"
        arrays = {**arrays, "done": ((-(-num_rows // size),), "bool")}
        if process_rank() == 0:
            self.lock = lock_folder(folder)
            if not os.path.exists(path):
                for name, (shape, dtype) in arrays.items():
                    np.lib.format.open_memmap(f"{folder}/{name}.npy", "w+", dtype, shape)
                write_json(path, settings)
            was = json.loads(Path(path).read_text())
            refuse_differences(was, settings, f"{folder} was begun", "delete it")
        barrier()
        self.arrays = {name: np.load(f"{folder}/{name}.npy", mmap_mode="r+") for name in arrays}
        left = np.flatnonzero(~self.arrays["done"])[process_rank() :: num_processes()]
        self.todo = [range(num_rows)[i * size : (i + 1) * size] for i in left]
        barrier()  # all have read `done` before a process writes it

    def fill(self, desc):
        """Yields the blocks of todo. A block is done when the next one is asked for."""
        with progress(desc=desc, total=sum(map(len, self.todo)), unit="img") as bar:
            for rows in self.todo:
                yield rows
                self.arrays["done"][rows.start // self.size] = True
                bar.update(len(rows))
        barrier()


def is_prepared(out, src, settings):
    """Whether a folder was prepared with these settings. InputError where it was with others, or
    where src has another number of images now."""
    if not os.path.exists(f"{out}/meta.json"):
        return False
    meta = json.loads(Path(out, "meta.json").read_text())
    was = {**meta["settings"], "images": meta["images"]}
    if os.path.isdir(src) and not settings["skip_bad"]:
        settings = {**settings, "images": len(image_files(src))}
    elif os.path.isfile(src) and src.endswith((".npy", ".npz")):
        settings = {**settings, "images": len(read_array(src)[0])}
    if not settings["patches"]:
        was.pop("patches", None)  # a folder with them serves a run without, too
    refuse_differences(was, settings, f"{out} was prepared")
    return True


def load_features(path):
    """-> (N, D), of an .npy (mapped), or a .pt that holds one tensor, as official banks do"""
    from model import load_file

    features = np.load(path, mmap_mode="r") if path.endswith(".npy") else load_file(path)
    if len(features.shape) != 2:
        raise InputError(f"{path} holds {tuple(features.shape)}, expected features (N, D)")
    return features


def patch_basis(path, images, encode, device):
    """Writes a bank of the patch tokens of 256 images, whose mean and basis compress all tokens."""
    if not os.path.exists(path):
        rows = np.linspace(0, len(images) - 1, min(len(images), 256)).astype(int)
        tokens = in_batches(lambda x: encode(x)[1:], images.batch(rows), device)[0]
        MemoryBank.build(tokens.flatten(0, 1), device=device).save(path)


def encode_images(images, tokenizer, encode, out, settings, device):
    """Fills latents.npy, encoded.npy (features), with patches also patches.npy, patch_scales.npy;
    each image is decoded once, for itself and its mirror image. -> ResumableArrays"""
    n = len(images)
    N = n * (1 + settings["flip"])
    blank = torch.zeros(1, 3, images.size, images.size, device=device)
    features, tokens = encode(blank)
    arrays = {"latents": ((N, *tokenizer.encode(blank).shape[1:]), tokenizer.dtype)}
    if settings["features"] is None:
        arrays["encoded"] = ((N, features.shape[1]), "float32")
    if settings["patches"]:
        if tokens is None:
            raise InputError(f"the encoder {settings['encoder']} has no patch tokens")
        arrays["patches"] = ((N, tokens.shape[1], min(RANK, tokens.shape[2])), "int8")
        arrays["patch_scales"] = ((N, tokens.shape[1]), "float32")
    blocks = ResumableArrays(out, {**settings, "images": n}, arrays, n, 256)
    if settings["patches"]:
        from_process_zero(patch_basis, f"{out}/patches.pt", images, encode, device)
        patch_bank = MemoryBank.load(f"{out}/patches.pt").to(device)

    def encode_batch(x):
        """images (b, 3, H, W) in [-1, 1] -> what each of the arrays keeps of them"""
        parts = {"latents": tokenizer.encode(x).to(getattr(torch, tokenizer.dtype))}
        parts["encoded"], tokens = encode(x)
        if settings["patches"]:
            c = patch_bank.project(tokens)
            parts["patches"], parts["patch_scales"] = quantize(c, torch.int8)
        return [parts[name] for name in arrays]

    batches = ahead(images.batch, blocks.todo)
    for rows in blocks.fill("encoding"):
        x = next(batches)
        for mirror in range(1 + settings["flip"]):
            values = in_batches(encode_batch, x.flip(2) if mirror else x, device)
            finite = values[0].isfinite().flatten(1).all(1)  # arrays begins with the latents
            if not finite.all():
                i = rows[int(finite.long().argmin())]
                name = i if images.files is None else images.files[i]
                raise InputError(f"image {name}: its latents overflow {tokenizer.dtype}")
            for name, value in zip(arrays, values):
                blocks.arrays[name][mirror * n + rows.start : mirror * n + rows.stop] = value
    return blocks


def prepare(data, out, device="cpu", **options):
    """Images of data -> out/latents.npy (N, C, h, w), labels.npy (N,), bank.pt, files.txt (their
    order) and meta.json; with patches also patches.npy (N, T, 64) and patch_scales.npy (N, T),
    int8 coefficients in the basis of patches.pt.

    options: flags of the command, as image_size=64. With flip the mirror images come after the
    others. A killed preparation goes on; of several processes on one machine each encodes a share.
    """
    from model import load_encoder, load_tokenizer

    settings = vars(make_parser().parse_args([f"--out={out}"]))  # defaults of the command's flags
    assert set(options) <= set(settings), options
    source = data if data == "glyphs" else os.path.abspath(data)
    settings = {**settings, **options, "source": source}
    del settings["data"], settings["out"]
    for name in ("tokenizer", "latent_stats", "encoder", "features"):
        if os.path.isfile(settings[name] or ""):
            settings[name] = os.path.abspath(settings[name])
    if from_process_zero(is_prepared, out, data, settings):
        return
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < num_processes():
        raise InputError("several nodes cannot fill one file: prepare on one node")
    tokenizer = process_zero_first(load_tokenizer, settings["tokenizer"], device)
    encode = process_zero_first(load_encoder, settings["encoder"], device)
    images = Images(data, settings["image_size"], settings["skip_bad"])
    labels = np.tile(images.labels, 1 + settings["flip"])
    stats = known_stats(settings["tokenizer"], settings["latent_stats"])
    if stats is not None and len(stats[0]) != tokenizer.channels:
        raise InputError(f"latents have {tokenizer.channels} channels, their mean {len(stats[0])}")
    if settings["features"] is not None:
        features = load_features(settings["features"])
        if len(features) != len(labels):
            raise InputError(f"{len(features):,} rows of features for {len(labels):,} images")

    blocks = encode_images(images, tokenizer, encode, out, settings, device)
    if process_rank() == 0:
        latents = blocks.arrays["latents"]
        if stats is None:
            rows = np.linspace(0, len(latents) - 1, min(len(latents), 10_000)).astype(int)
            sample = latents[rows].astype(np.float64)
            stats = sample.mean((0, 2, 3)).tolist(), sample.std((0, 2, 3)).tolist()
        if settings["features"] is None:
            features = blocks.arrays["encoded"]
        fields = {"encoder": last_part(settings["features"] or settings["encoder"])}
        fields.update(classes=tuple(images.classes), mirrored=len(images) * settings["flip"])
        rank = settings["rank"]
        bank = MemoryBank.build(features, rank, settings["dtype"], labels, device, **fields)
        meta = {"settings": settings, "images": len(images), "latent": latents.shape[1:]}
        meta.update(classes=images.classes, mean=stats[0], std=stats[1])
        save_prepared(out, bank, meta, images.files)
    barrier()


def save_prepared(out, bank, meta, files):
    """Writes the bank, labels and files.txt, and last meta.json: then the folder is prepared."""
    bank.save(f"{out}/bank.pt")
    np.save(f"{out}/labels.npy", bank.labels.numpy())
    if files is not None:
        source = meta["settings"]["source"]
        top = source if os.path.isdir(source) else os.path.dirname(source)
        lines = [os.path.relpath(file, top) + "\n" for file in files]
        Path(out, "files.txt").write_bytes(os.fsencode("".join(lines)))
    counts = torch.bincount(bank.labels[bank.labels >= 0]).tolist()
    write_json(f"{out}/meta.json", {**meta, "class_counts": counts, "bank": bank.id})
    for name in ("encoded.npy", "done.npy", "progress.json"):
        Path(out, name).unlink(missing_ok=True)


def progress(items=None, **options):
    """A bar, in process 0; where stderr is no terminal, at most a line in 30 s."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, disable=process_rank() > 0, mininterval=interval, maxinterval=30, **options)


def last_part(path):
    """A name without its folder, because folders move"""
    return os.path.basename(os.path.normpath(str(path)))


def refuse_differences(was, now, what, otherwise="name another folder"):
    """InputError where a setting in both differs, as text; of paths the last part, as they move"""
    differ = []
    for name in now:
        if name in was and last_part(was[name]) != last_part(now[name]):
            differ.append(f"{name} {was[name]}, not {now[name]}")
    if differ:
        raise InputError(f"{what} with {', '.join(differ)}: give the same, or {otherwise}")


def ahead(f, items):
    """Yields f(item) for each item; a thread works on the next one while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        previous = None
        for item in items:
            begun = thread.submit(f, item)
            if previous is not None:
                yield previous.result()
            previous = begun
        if previous is not None:
            yield previous.result()


@contextmanager
def atomic_write(path):
    """Gives a temporary file, which takes the place of path once all is on the disk."""
    path = os.path.realpath(path)  # a link stays a link
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_json(path, value):
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def lock_folder(folder):
    """-> a file that locks the folder as long as it is open. InputError where another command has
    locked it."""
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/.lock", "w")  # noqa: SIM115 - it stays open
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise InputError(f"another command is writing to {folder}") from e
    except (ImportError, OSError):
        pass  # Windows and some network file systems have no such locks
    return file


def init_distributed(device=None):
    """Joins the processes that torchrun has started, if it has. They wait for each other for a day
    at most, as process 0 alone reads folders and writes files.
    -> torch.device: that name, or the best there is; of several GPUs the one of this process"""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0")) % max(1, torch.cuda.device_count())
        device = torch.device("cuda", index if device.index is None else device.index)
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return device


def process_rank():
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sums a tensor over all processes, in place."""
    if num_processes() > 1:
        dist.all_reduce(tensor, op)


def barrier():
    """Waits until all processes are here."""
    all_reduce(torch.zeros(1))


def process_zero_first(f, *args):
    """f(*args) on process 0, then on the others, which find what it has downloaded."""
    if process_rank() > 0:
        barrier()
    result = f(*args)
    if process_rank() == 0:
        barrier()
    return result


def from_process_zero(f, *args):
    """-> on all processes, what f(*args) returns on process 0"""
    results = [f(*args) if process_rank() == 0 else None]
    if num_processes() > 1:
        dist.broadcast_object_list(results, device="cpu")
    return results[0]


def cli(main):
    """Runs main(). An InputError or OSError ends as one line on stderr, with exit code 2."""
    try:
        main()
    except Exception as e:
        # by name, because model.py has an InputError of its own, so that it can be copied alone
        if not isinstance(e, OSError) and type(e).__name__ != "InputError":
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_or_full(text):
    if text != "full" and int(text) < 1:
        raise ValueError(text)
    return text if text == "full" else int(text)


def add_data_flags(parser, image_size):
    """The flags that memory.py and train.py have in common"""
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--image-size", type=int, default=image_size, help="images are scaled and cropped to it")
    add("--tokenizer", default="pixel", help="pixel, sd-vae-ft-ema, vavae-f16d32, or a file")
    add("--latent-stats", metavar="F", help="file with mean and std of the latents' channels")
    add("--encoder", default="thumbnail", help="thumbnail (16 x 16 pixels), dinov2_vitb14, a file")
    add("--rank", type=rank_or_full, default=RANK, help="numbers kept of a snippet, or full")
    add("--flip", action=flag, default=False, help="add mirror images, with snippets of their own")
    add("--skip-bad", action=flag, default=False, help="leave out images that do not decode")


def make_parser():
    parser = argparse.ArgumentParser(description="Images to latents and a memory bank.")
    add = parser.add_argument
    add("--data", metavar="SRC", help="a folder, .npy or .npz of uint8 (N, H, W, 3), or glyphs")
    add("--out", required=True, help="folder for train.py --data; without --data a bank file")
    add_data_flags(parser, image_size=256)
    add("--features", metavar="F", help="features (N, D), .npy or .pt, instead of --encoder")
    add("--dtype", choices=DTYPES, default="int8", help="dtype of the bank's coefficients")
    add("--patches", action="store_true", help="keep the patch tokens, for train.py --align")
    return parser


def main():
    args = make_parser().parse_args()
    if args.data is None and args.features is None:
        raise InputError("give --data (images) or --features (a matrix), or both")
    device = init_distributed()
    if args.data is not None:
        prepare(device=device, **vars(args))
        if process_rank() == 0:
            print(f"{args.out}: {MemoryBank.load(f'{args.out}/bank.pt')}")
    elif os.path.exists(args.out):
        raise InputError(f"{args.out} exists: name another file for the bank, or delete it")
    elif process_rank() == 0:
        features = load_features(args.features)
        name = last_part(args.features)
        bank = MemoryBank.build(features, args.rank, args.dtype, device=device, encoder=name)
        bank.save(args.out)
        print(f"{args.out}: {bank}")


if __name__ == "__main__":
    cli(main)
