"""How far generated images are from real ones: FID, sFID, Inception Score, precision and recall as
ADM's evaluator.py (openai/guided-diffusion) defines them, and KID.

    FID        |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2), of mean and covariance of pooled features
    sFID       the same of 7 channels of an inner layer, at 17 x 17 places
    IS         exp of the mean KL(p(y|x) || p(y)), averaged over splits of 5,000 images
    precision  the fraction of the samples within the 3rd-neighbour radius of some reference image
    recall     the fraction of the reference images within that radius of some sample
    KID        E k(x, x') + E k(y, y') - 2 E k(x, y), k(x, y) = (x.y / D + 1)^3

    python fid.py REF SAMPLES

REF and SAMPLES are each one of these:
    a folder of images
    an .npz of images: uint8 (N, H, W, 3), named arr_0, or the only such array in the file
    an .npz of statistics: mu, sigma, and for sFID mu_s, sigma_s
    an .npy of features: float (N, D), of any network; FD, KID, precision and recall are of these
ADM's reference batches hold images and statistics: FID and sFID are of the latter, the rest of the
images.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import linalg
from torch import nn
from tqdm import tqdm


class InputError(ValueError):
    """Something that was given cannot be used; the message says what, and what was expected."""


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (D,), covariances (D, D), arrays or tensors -> float (arXiv 1706.08500, eq. 6).

    The covariances may be singular. InputError: other shapes, different D, numbers not finite.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(x).detach().cpu().double().numpy() for x in (mu1, sigma1, mu2, sigma2)
    )
    check_statistics(mu1, sigma1)
    check_statistics(mu2, sigma2)
    if len(mu1) != len(mu2):
        raise InputError(f"statistics of {len(mu1)} and of {len(mu2)} features, expected the same")
    # With sigma = U' U, tr (sigma1 sigma2)^1/2 is the sum of the singular values of U1 U2'.
    roots = linalg.svdvals(pivoted_cholesky(sigma1) @ pivoted_cholesky(sigma2).T)
    mean_term = np.square(mu1 - mu2).sum()
    return float(mean_term + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def pivoted_cholesky(sigma):
    """(D, D) -> U (rank, D) with sigma = U' U. It pivots, so that zeros do not become noise."""
    factor, pivot, rank, _ = linalg.lapack.dpstrf(sigma)
    return np.triu(factor)[:rank, np.argsort(pivot)]


def inception_score(logits, split=5000):
    """Logits (N, classes), array or tensor -> float, 1 or more (arXiv 1606.03498)"""
    scores = []
    for part in torch.as_tensor(logits).cpu().double().split(split):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def precision_recall(ref, gen, k=3):
    """Features (N, D), (M, D), arrays or tensors -> two floats in [0, 1] (arXiv 1904.06991).

    N and M are more than k; an image is not its own neighbour. InputError as float64_features.
    """
    ref, gen = float64_features(ref, gen, least=k + 1)
    center = ref.mean(0)  # smaller numbers round less
    ref = ref - center
    gen = gen - center
    ref_radius = kth_squared_distance(ref, k)
    gen_radius = kth_squared_distance(gen, k)

    gen_inside = torch.zeros_like(gen_radius, dtype=torch.bool)
    ref_inside = torch.zeros_like(ref_radius, dtype=torch.bool)
    for rows, squared in squared_distances(ref, gen):
        gen_inside |= (squared <= ref_radius[rows, None]).any(0)
        ref_inside[rows] = (squared <= gen_radius).any(1)
    return gen_inside.sum().item() / len(gen), ref_inside.sum().item() / len(ref)


def kth_squared_distance(x, k):
    """(N, D) -> (N,), squared distance of each row to its k-th neighbour, itself being the 0th"""
    blocks = squared_distances(x, x)
    return torch.cat([squared.topk(k + 1, largest=False)[0][:, k] for _, squared in blocks])


def squared_distances(a, b, block=2**25):
    """(n, D), (m, D) -> for each block of rows of a: their slice, squared distances (rows, m)"""
    b_norm = b.square().sum(1)
    step = max(1, block // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        norm = a[rows].square().sum(1, keepdim=True)
        squared = torch.addmm(b_norm, a[rows], b.T, alpha=-2) + norm
        squared[squared < 1e-10 * norm] = 0  # one image twice: outputs differ by 1e-6
        yield rows, squared


def kid(ref, gen):
    """Features (N, D), (M, D), arrays or tensors, N and M > 1 -> float (arXiv 1801.01401, eq. 4).

    The unbiased estimate from all rows at once; it may be negative. In float64, because k is large
    where features are far from zero, and KID a small difference. InputError as float64_features.
    """
    ref, gen = float64_features(ref, gen, least=2)
    n, m = len(ref), len(gen)
    within_ref = kernel_sum(ref, ref, same_set=True) / (n * (n - 1))
    within_gen = kernel_sum(gen, gen, same_set=True) / (m * (m - 1))
    return within_ref + within_gen - 2 * kernel_sum(ref, gen, same_set=False) / (n * m)


def kernel_sum(a, b, same_set, block=2**24):
    """(n, D), (m, D) -> the sum of k over all pairs; in one set, over pairs of different rows"""
    total = 0.0
    step = max(1, block // len(b))
    for start in range(0, len(a), step):
        values = (a[start : start + step] @ b.T / a.shape[1] + 1) ** 3
        if same_set:
            values.diagonal(start).zero_()
        total += values.sum().item()
    return total


# ======= end of the core: the metrics; images, networks and the command follow ====================


def check_statistics(mu, sigma):
    """InputError unless they are finite numbers, (D,) and (D, D)."""
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
        raise InputError(f"mu {mu.shape}, sigma {sigma.shape}: expected finite (D,), (D, D)")


def float64_features(ref, gen, least):
    """Arrays or tensors (N, D), (M, D) -> both in float64, and so on the CPU if they were on an
    Apple GPU. InputError: other shapes, not finite, N or M < least."""
    pair = []
    for x in (ref, gen):
        x = torch.as_tensor(x).detach()
        if x.ndim != 2 or len(x) < least or not x.isfinite().all():
            raise InputError(f"features {list(x.shape)}: expected finite (N, D), N {least} or more")
        if x.device.type == "mps":
            x = x.cpu()
        pair.append(x.double())
    ref, gen = pair
    if ref.shape[1] != gen.shape[1]:
        raise InputError(
            f"features of {ref.shape[1]} and {gen.shape[1]} numbers, expected the same"
        )
    return ref, gen


@contextmanager
def input_errors(name):
    """Whatever a library finds wrong with the file `name` becomes an InputError of one line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name} cannot be used: {error}") from error
    except Exception as error:
        reason = f"{type(error).__name__}, {str(error)[:250]}"
        if isinstance(error, Image.DecompressionBombError):
            reason += " --max-pixels N allows it, for images that you trust"
        raise InputError(f"{name} cannot be used: {reason}") from error


# --------------------------------------------------------------------- images, features, statistics


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


ImageSet = namedtuple("ImageSet", "path count read stats outputs")  # read(range) -> uint8 (H, W, 3)
SUFFIXES = ("", "_s")  # of mu and sigma: pooled features, and those of sFID
STANDARD = "inception-2015-12-05"  # statistics that do not say of what network they are
EXPECTED = (
    "expected a folder of images, an .npz of images (uint8 N, H, W, 3; arr_0 if there are several) "
    "or of statistics (mu, sigma; no pickle), or an .npy of features (float N, D)"
)
POOL = ThreadPoolExecutor(8)  # decodes


def open_set(path):
    """-> ImageSet, of the kinds that the head of this file lists"""
    with input_errors(path):
        if os.path.isdir(path):
            return open_folder(path)
        with open(path, "rb") as file:
            start = file.read(6)
        if start == b"\x93NUMPY":
            return open_npy(path)
        if zipfile.is_zipfile(path):
            return open_npz(path)
        raise InputError(f"it begins with {start}; {EXPECTED}")


def open_folder(path):
    files, left_out = image_files(path)
    if left_out:
        print(f"{path}: files left out for their ending: {left_out}")
    if len(files) < 4:
        raise InputError(f"it holds {len(files)} images, expected 4 or more")

    def read(rows):
        return list(POOL.map(decode, files[rows.start : rows.stop]))

    return ImageSet(path, len(files), read, {}, [])


def decode(path):
    with input_errors(path), Image.open(path) as image:
        return np.array(to_rgb(image))


def open_npy(path):
    features = np.load(path, mmap_mode="r")
    if features.ndim != 2 or features.dtype.kind != "f" or len(features) < 4:
        raise InputError(f"it is {features.dtype} {features.shape}, N > 3; {EXPECTED}")
    features = torch.from_numpy(features.astype(np.promote_types(features.dtype, np.float32)))
    if not features.isfinite().all():
        raise InputError("it holds numbers that are not finite")
    return ImageSet(path, 0, None, {"n": len(features), "weights": "features"}, [features])


def open_npz(path):
    archive = np.lib.npyio.NpzFile(path)
    if not all(part.endswith(".npy") for part in archive.zip.namelist()):
        raise InputError(f"it is an archive of other files: unpack it; {EXPECTED}")
    stats = {}
    if "mu" in archive.files:
        names = ("mu", "sigma", "mu_s", "sigma_s", "n")
        stats = {name: archive[name] for name in names if name in archive.files}
        check_statistics(stats["mu"], stats["sigma"])
        if "mu_s" in stats:
            check_statistics(stats["mu_s"], stats["sigma_s"])
        if "n" in stats:
            stats["n"] = int(stats["n"])
        stats["weights"] = str(archive.get("weights", STANDARD))

    given = []
    images = {}
    for name in archive.files:
        with archive.zip.open(name + ".npy") as stream:
            np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            given.append(f"{name} {dtype} {shape}")
            if dtype == np.uint8 and shape[3:] == (3,) and shape[0] > 3 and not fortran_order:
                images[name] = (shape, stream.tell())
    if not images and "mu" in stats:
        return ImageSet(path, 0, None, stats, [])
    if len(images) != 1 and "arr_0" not in images:
        raise InputError(f"it holds {', '.join(given)[:150]}; {EXPECTED}")
    name = "arr_0" if "arr_0" in images else next(iter(images))
    shape, start = images[name]
    size = int(np.prod(shape[1:]))
    stream = archive.zip.open(name + ".npy")  # the images are never all in memory

    def read(rows):
        with input_errors(path):
            stream.seek(start + rows.start * size)
            data = stream.read(len(rows) * size)
            return np.frombuffer(data, np.uint8).reshape(len(rows), *shape[1:])

    return ImageSet(path, shape[0], read, stats, [])


# ---------------------------------------------------------- Inception, as TensorFlow had it in 2015
# The figures are those of arXiv 1512.00567, the names those of pytorch-fid's weights file.

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"  # ends with the start of the file's SHA-256
)
average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
max_pool = nn.MaxPool2d(3, stride=1, padding=1)
halve = nn.MaxPool2d(3, stride=2)


def conv_bn(in_channels, out_channels, kernel, stride=1, padding="same", pool=None):
    layer = nn.Sequential()
    if pool is not None:
        layer.pool = pool
    layer.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    layer.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
    layer.relu = nn.ReLU(inplace=True)
    nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")
    return layer


def chain(channels, *layers):
    """Layers (width, kernel, stride, padding), one after another; the file names them _1, _2 ..."""
    branch = nn.Sequential()
    for number, (width, *shape) in enumerate(layers, 1):
        branch.add_module(f"+_{number}", conv_bn(channels, width, *shape))
        channels = width
    return branch


class Branches(nn.Module):
    """What its modules make of x, side by side"""

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.children()], 1)


def inception_a(channels, pool_width):
    """Figure 5: 35 x 35"""
    block = Branches()
    block.branch1x1 = conv_bn(channels, 64, 1)
    block.branch5x5 = chain(channels, (48, 1), (64, 5))
    block.branch3x3dbl = chain(channels, (64, 1), (96, 3), (96, 3))
    block.branch_pool = conv_bn(channels, pool_width, 1, pool=average_pool)
    return block


def inception_b(channels):
    """Figure 10: from 35 x 35 to 17 x 17"""
    block = Branches()
    block.branch3x3 = conv_bn(channels, 384, 3, 2, 0)
    block.branch3x3dbl = chain(channels, (64, 1), (96, 3), (96, 3, 2, 0))
    block.pool = halve
    return block


def inception_c(channels, width):
    """Figure 6: 17 x 17"""
    block = Branches()
    block.branch1x1 = conv_bn(channels, 192, 1)
    block.branch7x7 = chain(channels, (width, 1), (width, (1, 7)), (192, (7, 1)))
    block.branch7x7dbl = chain(
        channels, (width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))
    )
    block.branch_pool = conv_bn(channels, 192, 1, pool=average_pool)
    return block


def inception_d(channels):
    """As figure 10: from 17 x 17 to 8 x 8"""
    block = Branches()
    block.branch3x3 = chain(channels, (192, 1), (320, 3, 2, 0))
    block.branch7x7x3 = chain(channels, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, 0))
    block.pool = halve
    return block


def inception_e(channels, pool):
    """Figure 7: 8 x 8. The last layers of two branches are 1 x 3 and 3 x 1, side by side."""
    block = Branches()
    block.branch1x1 = conv_bn(channels, 320, 1)
    block.branch3x3 = chain(channels, (384, 1))
    block.branch3x3dbl = chain(channels, (448, 1), (384, 3))
    for number, branch in ((2, block.branch3x3), (3, block.branch3x3dbl)):
        last = Branches()
        last.add_module("+a", conv_bn(384, 384, (1, 3)))
        last.add_module("+b", conv_bn(384, 384, (3, 1)))
        branch.add_module(f"+_{number}", last)
    block.branch_pool = conv_bn(channels, 192, 1, pool=pool)
    return block


class Inception(nn.Module):
    """Inception v3, its layers in the order in which they run"""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = conv_bn(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = conv_bn(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = conv_bn(32, 64, 3)
        self.Conv2d_3b_1x1 = conv_bn(64, 80, 1)
        self.Conv2d_4a_3x3 = conv_bn(80, 192, 3, padding=0)
        self.Mixed_5b = inception_a(192, 32)
        self.Mixed_5c = inception_a(256, 64)
        self.Mixed_5d = inception_a(288, 64)
        self.Mixed_6a = inception_b(288)
        self.Mixed_6b = inception_c(768, 128)
        self.Mixed_6c = inception_c(768, 160)
        self.Mixed_6d = inception_c(768, 160)
        self.Mixed_6e = inception_c(768, 192)
        self.Mixed_7a = inception_d(768)
        self.Mixed_7b = inception_e(1280, average_pool)
        self.Mixed_7c = inception_e(2048, max_pool)  # TensorFlow's, not the paper's
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        """uint8 (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008), no bias"""
        if x.dtype != torch.uint8:
            raise InputError(f"images are {x.dtype}, expected torch.uint8, 0 to 255")
        x = (resize_tf1(x.float()) - 128) / 128  # (B, 3, 299, 299)
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = halve(x)
            if name != "fc":
                x = layer(x)
            if name == "Mixed_6d":  # 7 channels of its branch1x1, channels last: (B, 17 * 17 * 7)
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.fc.weight.T


def resize_tf1(x, size=299):
    """Float (B, C, H, W) -> (B, C, size, size), bilinear as TensorFlow 1: pixel i at i H / size"""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")  # beyond the last pixel is the last pixel
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[:, :, :size, :size]


def load_inception(source=None):
    """-> Inception in eval mode, without gradients. InputError where there are no such weights.

    source  path of pytorch-fid's weights file, its state dict, None (downloaded), or "random" (of a
            fixed seed)
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Inception().eval().requires_grad_(False)
    if source != "random":
        with input_errors(f"the weights (--inception {source or 'PATH'}, of {INCEPTION_URL})"):
            if source is None:
                download = torch.hub.load_state_dict_from_url
                source = download(INCEPTION_URL, check_hash=True, weights_only=True)
            elif not isinstance(source, dict):
                source = torch.load(source, map_location="cpu", weights_only=True)
            names = {name.replace(".+", ""): name for name in model.state_dict()}
            state = {names.get(name, name): values for name, values in source.items()}
            missing = model.load_state_dict(state, strict=False).missing_keys
            if missing:
                raise InputError(f"{len(missing)} keys are missing, such as {missing[0]}")
    return model.to(memory_format=torch.channels_last)


# ------------------------------------------------------------------------ from networks to numbers


class ClassToken(nn.Module):
    """DINOv2 as in EDM2. source: its name, or the path of its weights"""

    def __init__(self, source):
        super().__init__()
        try:
            from model import load_dinov2
        except ImportError as error:
            raise InputError(f"--network needs GMem's model.py beside fid.py: {error}") from error
        with input_errors(f"--network {source}"):
            self.dino = load_dinov2(source)
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53])[:, None, None])
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375])[:, None, None])

    def forward(self, x):
        """uint8 (B, 3, H, W) -> [(B, D)]"""
        x = F.interpolate(x.float(), (224, 224), mode="bicubic", antialias=True)
        return self.dino((x - self.mean) / self.std)[:1]


def load_network(args):
    """-> network: uint8 (B, 3, H, W) to outputs (B, D), the first of which are the features; the
    name of its weights. Statistics are stored with the name: those of one name are comparable."""
    if args.network:
        network = ClassToken(args.network).to(args.device)
        return network, f"dinov2 {fingerprint(network)}"
    network = load_inception(args.inception).to(args.device)
    if args.inception == "random":
        return network, "random"
    if args.inception:
        with open(args.inception, "rb") as file:
            sha256 = hashlib.sha256(file.read()).hexdigest()
        if not INCEPTION_URL.endswith(f"{sha256[:8]}.pth"):
            return network, f"inception {fingerprint(network)}"
    return network, STANDARD


def fingerprint(network):
    """-> hexadecimal digits that tell its weights, from whatever file they were read"""
    digest = hashlib.sha256()
    for name, values in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # not all files have these
            digest.update(values.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


@torch.no_grad()
def compute_outputs(images, network, device, batch_size):
    """ImageSet -> the outputs of the network, (N, D) each, float32, on the CPU"""
    rows = range(images.count)
    outputs = []
    pending = POOL.submit(images.read, rows[:batch_size])
    with tqdm(total=len(rows), desc=images.path, unit="img") as bar:
        for start in rows[::batch_size]:
            batch = pending.result()  # the next one is read while the network has this one
            pending = POOL.submit(images.read, rows[start + batch_size : start + 2 * batch_size])
            groups = [batch]
            if len({image.shape for image in batch}) > 1:
                groups = [[image] for image in batch]
            for group in groups:  # of images of one size
                x = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2)
                outputs.append([values.float().cpu() for values in network(x.to(device))])
            bar.update(len(batch))
    outputs = [torch.cat(values) for values in zip(*outputs)]
    if not all(values.isfinite().all() for values in outputs):
        raise InputError(f"the features of {images.path} are not finite; are the weights?")
    return outputs


def complete(ref, gen, args):
    """Computes the outputs for the images and the statistics that their files do not have."""
    network = None
    name = ref.stats.get("weights")
    if ref.count or gen.count:
        if ref.outputs or gen.outputs:
            raise InputError(f"{ref.path}, {gen.path}: expected features of both, or images")
        network, name = load_network(args)
    for images in (ref, gen):
        made_by = images.stats.setdefault("weights", name)
        if made_by != name and not images.count:
            raise InputError(f"{images.path} is of {made_by}, expected: of {name}")
        if made_by != name:  # the images are there
            images.stats.clear()
        images.stats["weights"] = name

    for images in (ref, gen):
        if images.count:
            images.outputs.extend(compute_outputs(images, network, args.device, args.batch_size))
        images.stats.setdefault("n", images.count)
        for suffix, values in zip(SUFFIXES, images.outputs):
            if "mu" + suffix not in images.stats:
                images.stats["mu" + suffix] = values.mean(0, dtype=torch.float64).numpy()
                images.stats["sigma" + suffix] = np.atleast_2d(np.cov(values.T))


def evaluate(ref, gen, device):
    """Complete ImageSets -> numbers by name. None: they take images or features of both"""
    name = gen.stats["weights"]
    result = {"weights": name, "N_ref": ref.stats["n"], "N_samples": gen.stats["n"]}
    distances = ("FD",)
    if name == "random" or name.startswith("inception"):
        distances = ("FID", "sFID")
    for suffix, distance in zip(SUFFIXES, distances):
        mu = "mu" + suffix
        sigma = "sigma" + suffix
        if mu in ref.stats and mu in gen.stats:
            result[distance] = frechet_distance(
                ref.stats[mu], ref.stats[sigma], gen.stats[mu], gen.stats[sigma]
            )
    if len(gen.outputs) == 3:
        result["IS"] = inception_score(gen.outputs[2])
    result.update(precision=None, recall=None, KID=None)
    if ref.outputs and gen.outputs:
        if device == "mps":
            device = "cpu"  # for float64
        features = (ref.outputs[0].to(device), gen.outputs[0].to(device))
        result["precision"], result["recall"] = precision_recall(*features)
        result["KID"] = kid(*features)
    return result


def report(result):
    note = ""
    if result["weights"] == "random":
        note = "  (random weights: comparable with nothing)"
    for key, value in result.items():
        if value is None:
            value = "unknown: it takes images or features, there are only statistics"
        print(f"{key}: {value}{note}")
    if 0 < result["N_ref"] < 2048 or 0 < result["N_samples"] < 2048:
        warning = "N < 2,048: the distances are biased, and the covariances singular where N < D"
        print(f"fid.py: warning: {warning}{note}", file=sys.stderr)


@contextmanager
def atomic_write(path):
    with open(path + ".tmp", "wb") as file:
        yield file
    os.replace(path + ".tmp", path)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists what there is)")


def parse_arguments():
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = Parser(usage="fid.py REF SAMPLES [options]")
    add = parser.add_argument
    kinds = "a folder of images, an .npz of images or statistics, or an .npy of features"
    add("ref", metavar="REF", help=f"the real images: {kinds}")
    add("samples", metavar="SAMPLES", help=f"the generated images: {kinds}")
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--inception", help="weights file (default: a download), or random")
    networks.add_argument("--network", help="a DINOv2 instead: dinov2_vitl14, or a weights file")
    add("--save-stats", metavar="F.npz", help="write the statistics of REF, which stand for it")
    add("--json", metavar="F", help="write the numbers as JSON")
    add("--batch-size", type=int, default=64, metavar="N", help="images in a batch (default: 64)")
    add("--max-pixels", type=int, metavar="N", help="take images of up to twice N pixels")
    add("--device", choices={"cpu", best}, default=best, help=f"where it runs (default: {best})")
    args = parser.parse_args()
    for name, number in (("batch-size", args.batch_size), ("max-pixels", args.max_pixels)):
        if number is not None and number < 1:
            raise InputError(f"--{name} {number}, expected 1 or more")
    inputs = (os.path.realpath(args.ref), os.path.realpath(args.samples))
    for path in (args.save_stats, args.json):
        if path and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or ".")):
            raise InputError(f"there is no folder for {path}, or it is one")
        if path and os.path.realpath(path) in inputs:
            raise InputError(f"{path} is given, and would be overwritten")
    return args


def main():
    args = parse_arguments()
    if args.max_pixels:
        Image.MAX_IMAGE_PIXELS = args.max_pixels  # Pillow warns of more, and refuses twice as many
    torch.backends.cudnn.allow_tf32 = False
    ref = open_set(args.ref)
    gen = open_set(args.samples)
    complete(ref, gen, args)
    result = evaluate(ref, gen, args.device)
    try:
        if args.json:
            with atomic_write(args.json) as file:
                file.write(json.dumps(result, indent=1).encode())
        if args.save_stats:
            with atomic_write(args.save_stats) as file:
                np.savez(file, **ref.stats)
    finally:  # the numbers are shown also where they cannot be written
        report(result)


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


if __name__ == "__main__":
    sys.stdout = safe_output(sys.stdout)
    sys.stderr = safe_output(sys.stderr)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (InputError, OSError) as error:
        print(f"fid.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
