"""How far generated images are from real ones: FID, sFID, Inception Score, precision and recall as
ADM's evaluator.py (openai/guided-diffusion) defines them, and KID.

    FID        |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2), of mean and covariance of pooled features
    sFID       the same of 7 channels of an inner layer, at 17 x 17 places
    IS         exp of the mean KL(p(y|x) | p(y)) within 5,000 images, averaged over such splits
    precision  the part of the samples within the 3rd-neighbour radius of some reference image
    recall     the part of the reference images within that radius of some sample
    KID        E k(x, x') + E k(y, y') - 2 E k(x, y), k(x, y) = (x.y / D + 1)^3

    python fid.py REF SAMPLES

Each is a folder of images; an .npz with arr_0, uint8 (N, H, W, 3); or an .npz of statistics: mu,
sigma, mu_s, sigma_s. ADM's reference batches hold both: FID and sFID are then of the statistics,
the rest is of the images.
"""

import argparse
import glob
import io
import json
import os
import re
import sys
import zipfile
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import nn
from tqdm import tqdm


class InputError(ValueError):
    """Something that was given cannot be used; the message says what, and what was expected."""


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (D,), covariances (D, D), arrays or tensors -> float (arXiv 1706.08500, eq. 6).

    The covariances may be singular. InputError: statistics of different sizes.
    """
    mu1, sigma1, mu2, sigma2 = (
        torch.as_tensor(x).cpu().double().numpy() for x in (mu1, sigma1, mu2, sigma2)
    )
    if len(mu1) != len(mu2):
        raise InputError(
            f"statistics of {len(mu1)} features and of {len(mu2)}: expected one network's"
        )
    try:
        # With sigma2 = L L', sigma1 sigma2 has the eigenvalues of the symmetric L' sigma1 L.
        eigenvalues = linalg.eigvalsh(sigma1, sigma2, type=2, driver="gv")
        roots = np.sqrt(eigenvalues.clip(0))
    except linalg.LinAlgError:
        # sigma2 is singular. With sigma = U' U, the roots are the singular values of U1 U2'.
        roots = linalg.svdvals(cholesky_of_singular(sigma1) @ cholesky_of_singular(sigma2).T)
    mean_term = np.square(mu1 - mu2).sum()
    return float(mean_term + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def cholesky_of_singular(sigma):
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

    N and M are more than k; an image is not its own neighbour. Nothing is in float64, which Apple's
    GPUs do not have.
    """
    ref = torch.as_tensor(ref).float()
    center = ref.mean(0)  # smaller numbers round less
    ref = ref - center
    gen = torch.as_tensor(gen).float() - center
    ref_radius = neighbour_distance(ref, k)
    gen_radius = neighbour_distance(gen, k)

    gen_inside = torch.zeros_like(gen_radius, dtype=torch.bool)
    ref_inside = torch.zeros_like(ref_radius, dtype=torch.bool)
    for rows, squared in squared_distances(ref, gen):
        gen_inside |= (squared <= ref_radius[rows, None]).any(0)
        ref_inside[rows] = (squared <= gen_radius).any(1)
    return gen_inside.sum().item() / len(gen), ref_inside.sum().item() / len(ref)


def neighbour_distance(x, k):
    """(N, D) -> (N,), squared distance of each row to its k-th neighbour, itself being the 0th"""
    blocks = squared_distances(x, x)
    return torch.cat([squared.topk(k + 1, largest=False)[0][:, k] for _, squared in blocks])


def squared_distances(a, b, block=2**26):
    """(n, D), (m, D) -> for each block of rows of a: their slice, squared distances (rows, m)"""
    b_norm = b.square().sum(1)
    step = max(1, block // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        norm = a[rows].square().sum(1, keepdim=True)
        squared = torch.addmm(b_norm, a[rows], b.T, alpha=-2) + norm
        squared[squared < 1e-5 * norm] = 0  # the same image: what is left is rounding
        yield rows, squared


def kid(ref, gen):
    """Features (N, D), (M, D), arrays or tensors, N and M > 1 -> float (arXiv 1801.01401, eq. 4).

    The unbiased estimate from all rows at once; it may be negative."""
    ref = torch.as_tensor(ref).float()
    gen = torch.as_tensor(gen).float()
    n, m = len(ref), len(gen)
    ref_mean = kernel_sum(ref, ref) / (n * (n - 1))
    gen_mean = kernel_sum(gen, gen) / (m * (m - 1))
    return ref_mean + gen_mean - 2 * kernel_sum(ref, gen) / (n * m)


def kernel_sum(a, b, block=2**24):
    """(n, D), (m, D) -> the sum of k over all pairs; of one set, over pairs of different rows"""
    total = 0.0
    step = max(1, block // len(b))
    for start in range(0, len(a), step):
        values = (a[start : start + step] @ b.T / a.shape[1] + 1) ** 3
        if a is b:
            values.diagonal(start).zero_()
        total += values.sum(1).cpu().double().sum().item()
    return total


# ---------------------------------------------------------- Inception, as TensorFlow had it in 2015
# The figures are those of arXiv 1512.00567, the names those of pytorch-fid's weights file.

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"  # ends with the start of the file's SHA-256
)
average_pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
max_pool = nn.MaxPool2d(3, stride=1, padding=1)
halve = nn.MaxPool2d(3, stride=2)


def conv_bn(in_channels, out_channels, kernel, stride=1, padding="same"):
    layer = nn.Sequential()
    layer.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
    layer.bn = nn.BatchNorm2d(out_channels, eps=1e-3)
    layer.relu = nn.ReLU(inplace=True)
    nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")
    return layer


class Block(nn.Module):
    """Layers, each (what it reads, width, kernel, stride, padding): x, which comes in, pool, which
    is x pooled, or another layer. What none of them reads goes out, side by side."""

    def __init__(self, channels, pool, **layers):
        super().__init__()
        self.pool = pool
        self.sources = {}
        widths = {"x": channels, "pool": channels}
        for name, (source, width, *shape) in layers.items():
            self.add_module(name, conv_bn(widths[source], width, *shape))
            self.sources[name] = source
            widths[name] = width

    def forward(self, x):
        values = {"x": x, "pool": self.pool(x)}
        for name, source in self.sources.items():
            values[name] = self.get_submodule(name)(values[source])
        read = self.sources.values()
        return torch.cat([values[name] for name in [*self.sources, "pool"] if name not in read], 1)


def inception_a(channels, pool_width):
    """Figure 5: 35 x 35"""
    return Block(
        channels,
        average_pool,
        branch1x1=("x", 64, 1),
        branch5x5_1=("x", 48, 1),
        branch5x5_2=("branch5x5_1", 64, 5),
        branch3x3dbl_1=("x", 64, 1),
        branch3x3dbl_2=("branch3x3dbl_1", 96, 3),
        branch3x3dbl_3=("branch3x3dbl_2", 96, 3),
        branch_pool=("pool", pool_width, 1),
    )


def inception_b(channels):
    """Figure 10: from 35 x 35 to 17 x 17"""
    return Block(
        channels,
        halve,
        branch3x3=("x", 384, 3, 2, 0),
        branch3x3dbl_1=("x", 64, 1),
        branch3x3dbl_2=("branch3x3dbl_1", 96, 3),
        branch3x3dbl_3=("branch3x3dbl_2", 96, 3, 2, 0),
    )


def inception_c(channels, width):
    """Figure 6: 17 x 17"""
    return Block(
        channels,
        average_pool,
        branch1x1=("x", 192, 1),
        branch7x7_1=("x", width, 1),
        branch7x7_2=("branch7x7_1", width, (1, 7)),
        branch7x7_3=("branch7x7_2", 192, (7, 1)),
        branch7x7dbl_1=("x", width, 1),
        branch7x7dbl_2=("branch7x7dbl_1", width, (7, 1)),
        branch7x7dbl_3=("branch7x7dbl_2", width, (1, 7)),
        branch7x7dbl_4=("branch7x7dbl_3", width, (7, 1)),
        branch7x7dbl_5=("branch7x7dbl_4", 192, (1, 7)),
        branch_pool=("pool", 192, 1),
    )


def inception_d(channels):
    """As figure 10: from 17 x 17 to 8 x 8"""
    return Block(
        channels,
        halve,
        branch3x3_1=("x", 192, 1),
        branch3x3_2=("branch3x3_1", 320, 3, 2, 0),
        branch7x7x3_1=("x", 192, 1),
        branch7x7x3_2=("branch7x7x3_1", 192, (1, 7)),
        branch7x7x3_3=("branch7x7x3_2", 192, (7, 1)),
        branch7x7x3_4=("branch7x7x3_3", 192, 3, 2, 0),
    )


def inception_e(channels, pool):
    """Figure 7: 8 x 8"""
    return Block(
        channels,
        pool,
        branch1x1=("x", 320, 1),
        branch3x3_1=("x", 384, 1),
        branch3x3_2a=("branch3x3_1", 384, (1, 3)),
        branch3x3_2b=("branch3x3_1", 384, (3, 1)),
        branch3x3dbl_1=("x", 448, 1),
        branch3x3dbl_2=("branch3x3dbl_1", 384, 3),
        branch3x3dbl_3a=("branch3x3dbl_2", 384, (1, 3)),
        branch3x3dbl_3b=("branch3x3dbl_2", 384, (3, 1)),
        branch_pool=("pool", 192, 1),
    )


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
        with reading(f"the weights (--inception {source or 'PATH'}, of {INCEPTION_URL})"):
            if source is None:
                download = torch.hub.load_state_dict_from_url
                source = download(INCEPTION_URL, check_hash=True, weights_only=True)
            elif not isinstance(source, dict):
                source = torch.load(source, map_location="cpu", weights_only=True)
            missing = model.load_state_dict(dict(source), strict=False).missing_keys
            if missing:
                raise InputError(f"{len(missing)} keys are missing, such as {missing[0]}")
    return model.to(memory_format=torch.channels_last)


@contextmanager
def reading(name):
    """Whatever a library finds wrong with a file becomes one line that names it."""
    try:
        yield
    except Exception as error:
        message = f"{name} cannot be used: {type(error).__name__}, {str(error)[:150]}"
        raise InputError(message) from error


# ----------------------------------------------------------------------------------- other networks


def load_class_token(source, device):
    """A DINOv2 (its name, or the path of its weights) -> uint8 (B, 3, H, W) to its class token [(B,
    D)], as in EDM2"""
    with reading(f"--network {source}"):
        from model import load_dinov2

        dino = load_dinov2(source).to(device)
    mean = torch.tensor([123.675, 116.28, 103.53], device=device)[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375], device=device)[:, None, None]

    def class_token(x):
        x = F.interpolate(x.float(), (224, 224), mode="bicubic", antialias=True)
        return dino((x - mean) / std)[:1]

    return class_token


def load_program(path, device):
    """A file of torch.export.save -> its program, uint8 (B, 3, H, W) to [(B, D)]"""
    from torch.export.passes import move_to_device_pass  # slow to import

    with reading(path):
        exported = torch.export.load(harmless_copy(path))
        program = move_to_device_pass(exported, device).module()
        (argument,) = program.graph.find_nodes(op="placeholder")
        expected = list(argument.meta["val"].shape)

    def features(x):
        for size, given in zip(expected, x.shape):
            if isinstance(size, int) and size != given:
                message = f"{path} takes images {expected}, not {list(x.shape)}"
                raise InputError(f"{message}: resize them, or export it with a dynamic batch size")
        with reading(path):
            return [program(x)]

    return features


# torch.export.load unpickles parts of an archive, evaluates its expressions, and makes Python code
# of its names.
# So it gets a copy without the pickled parts, in which each text has to match what is harmless.
PARTS = (
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/\w+|models/\w+\.json"
    r"|data/sample_inputs/\w+\.pt|data/(weights|constants)/(\w+\.json|(weight|tensor)_\d+))"
)
NAME = r"[\w.@+-]*"
TREE = r'(\b(type|context|children_spec|null|builtins|tuple|list|dict|\d)\b|[][{}:,." ])*'
OPERATOR = (
    r"torch\.ops\.aten\.(?!save|from_file)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_\w+"
    r"|_operator\.(add|sub|mul|floordiv|mod|neg|getitem|eq|ne|ge|gt|le|lt)"
)
TEXTS = {
    "use_pickle": "False",
    "target": OPERATOR,
    "as_operator": OPERATOR,
    "in_spec": TREE,
    "out_spec": TREE,
    "as_string": r"[\w.,> -]*",
    "expr_str": r"(\b(Symbol|Integer|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|positive|integer"
    r"|nonnegative|True|[su]?\d+)\b|[-+*/(),=' ])*",
}


def harmless_copy(path):
    """The archive at path -> a file in memory. InputError: loading it might run code."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as clean:
        for part in archive.namelist():
            if not re.fullmatch(PARTS, part):
                raise InputError(f"loading it might run code: it holds {part}")
            data = archive.read(part)
            if part.endswith(".json"):
                data = json.dumps(harmless(json.loads(data)))
            if part.endswith(".pt"):
                data = b""  # the sample inputs, pickled, and not needed
            clean.writestr(part, data)
    copy.seek(0)
    return copy


def harmless(content, key=""):
    """JSON -> the same without what only serves debugging"""
    if key in ("metadata", "guards_code"):
        return type(content)()
    if isinstance(content, dict):
        return {harmless(name): harmless(value, name) for name, value in content.items()}
    if isinstance(content, list):
        return [harmless(value, key) for value in content]
    if not re.fullmatch(TEXTS.get(key, NAME), str(content), re.ASCII):
        raise InputError(f"loading it might run code: {key} is {content}")
    return content


# -------------------------------------------------------------------------- images in, features out

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
POOL = ThreadPoolExecutor(8)  # decodes
ImageSet = namedtuple("ImageSet", "path count read stats")  # read(range) -> uint8 arrays (H, W, 3)
SUFFIXES = ("", "_s")  # of mu and sigma: pooled features, and those of sFID


def open_set(path):
    """A folder of images, or an .npz of images, statistics or both -> ImageSet"""
    with reading(path):
        if os.path.isdir(path):
            return open_folder(path)
        return open_npz(path)


def open_folder(path):
    endings = tuple(Image.registered_extensions())
    names = sorted(glob.glob(glob.escape(path) + "/**", recursive=True))
    files = [name for name in names if name.lower().endswith(endings)]
    if len(files) < 4:
        raise InputError(f"it holds {len(files)} images, expected 4 or more")

    def read(rows):
        return list(POOL.map(decode, files[rows.start : rows.stop]))

    return ImageSet(path, len(files), read, {})


def decode(path):
    with reading(path), Image.open(path) as image:
        return np.array(image.convert("RGB"))


def open_npz(path):
    archive = np.lib.npyio.NpzFile(path)
    names = ("mu", "sigma", "mu_s", "sigma_s", "n", "weights")
    stats = {name: archive[name] for name in names if name in archive.files}
    for suffix in SUFFIXES:
        if "mu" + suffix in stats:
            mu = stats["mu" + suffix]
            sigma = stats["sigma" + suffix]
            if sigma.shape != 2 * mu.shape or not np.isfinite(mu.sum() + sigma.sum()):
                raise InputError(f"mu{suffix}, sigma{suffix}: not finite numbers (D,), (D, D)")
    if stats and "arr_0" not in archive.files:
        return ImageSet(path, 0, list, stats)

    stream = archive.zip.open("arr_0.npy")  # the images are never all in memory
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.uint8 or fortran or shape[3:] != (3,) or shape[0] < 4:
        raise InputError(f"arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3), N > 3, C order")
    start = stream.tell()
    size = int(np.prod(shape[1:]))

    def read(rows):
        with reading(path):
            stream.seek(start + rows.start * size)
            data = stream.read(len(rows) * size)
            return np.frombuffer(data, np.uint8).reshape(len(rows), *shape[1:])

    return ImageSet(path, shape[0], read, stats)


@torch.no_grad()
def extract(images, network, device, batch_size):
    """-> the outputs of the network, (N, D) each, float32, on the CPU; [] without images"""
    first = images.count * RANK // WORLD
    last = images.count * (RANK + 1) // WORLD
    parts = []
    with tqdm(total=last - first, desc=images.path, unit="img", disable=RANK > 0) as bar:
        for batch in read_ahead(images.read, range(first, last), batch_size):
            parts += run(network, batch, device)
            bar.update(len(batch))
    if WORLD > 1:
        shares = [None] * WORLD
        torch.distributed.all_gather_object(shares, parts)
        parts = []
        for share in shares:
            parts += share
    return [torch.cat(values) for values in zip(*parts)]


def read_ahead(read, rows, batch_size):
    """-> batches of images; each is read while the network has the one before"""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(read, rows[:batch_size])
        for start in range(batch_size, len(rows) + batch_size, batch_size):
            batch = pending.result()
            pending = thread.submit(read, rows[start : start + batch_size])
            yield batch


def run(network, batch, device):
    """uint8 arrays (H, W, 3) -> list of outputs, (b, D) each: images of one size go in together"""
    if len({image.shape for image in batch}) > 1:
        return [run(network, [image], device)[0] for image in batch]
    x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
    outputs = [values.float().cpu() for values in network(x.to(device))]
    if not all(values.isfinite().all() for values in outputs):
        raise InputError("the features are not finite; are the weights?")
    return [outputs]


# -------------------------------------------------------------------------------------- numbers out


def load_network(args):
    """-> a function of uint8 (B, 3, H, W): outputs (B, D), the first of which are the features"""
    if args.network is None:
        return load_inception(args.inception).to(args.device)
    if args.network.endswith(".pt2"):
        return load_program(args.network, args.device)
    return load_class_token(args.network, args.device)


def network_name(args):
    """Statistics are stored with it; those of one name are comparable."""
    if args.inception == "random":
        return "random"
    if args.network is None:
        return "inception-2015-12-05"
    name = os.path.basename(args.network)
    if os.path.isfile(args.network):
        with open(args.network, "rb") as file:
            name += f" {zlib.crc32(file.read()):08x}"
    return name


def check_network(images, name):
    """Statistics of another network are left aside, where there are images, or an error."""
    made_by = str(images.stats.setdefault("weights", "inception-2015-12-05"))
    if made_by == name:
        return
    if images.count == 0:
        raise InputError(f"the statistics in {images.path} are of {made_by}, not of {name}")
    images.stats.clear()
    images.stats["weights"] = name


def add_statistics(images, outputs):
    """Those that its file does not have, of outputs (N, D)"""
    images.stats.setdefault("n", images.count)
    for suffix, values in zip(SUFFIXES, outputs):
        if "mu" + suffix not in images.stats:
            images.stats["mu" + suffix] = values.mean(0, dtype=torch.float64).numpy()
            images.stats["sigma" + suffix] = np.cov(values.T)


def evaluate(ref, gen, ref_outputs, gen_outputs, distances, device):
    """ImageSets and their outputs, [pool, spatial, logits], [features] or [] -> numbers by name.

    The distances are named in the order of SUFFIXES. None: it takes images, there are statistics.
    """
    add_statistics(ref, ref_outputs)
    add_statistics(gen, gen_outputs)
    result = {
        "weights": gen.stats["weights"],
        "N_ref": int(ref.stats["n"]),
        "N_samples": int(gen.stats["n"]),
    }
    for suffix, name in zip(SUFFIXES, distances):
        mu = "mu" + suffix
        sigma = "sigma" + suffix
        if mu in ref.stats and mu in gen.stats:
            result[name] = frechet_distance(
                ref.stats[mu], ref.stats[sigma], gen.stats[mu], gen.stats[sigma]
            )
    if len(gen_outputs) == 3:
        result["IS"] = inception_score(gen_outputs[2])
    result.update(precision=None, recall=None, KID=None)
    if ref_outputs and gen_outputs:
        ref_pool = ref_outputs[0].to(device)
        gen_pool = gen_outputs[0].to(device)
        result["precision"], result["recall"] = precision_recall(ref_pool, gen_pool)
        result["KID"] = kid(ref_pool, gen_pool)
    return result


def report(result):
    note = ""
    if result["weights"] == "random":
        note = "  (random weights: comparable with nothing)"
    for key, value in result.items():
        if value is None:
            value = "unknown: it takes images, there are only statistics"
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
    parser.add_argument("sets", nargs=2, metavar="SET", help="a folder of images or an .npz")
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--inception", help="its weights file (else downloaded), or random")
    networks.add_argument("--network", help="another: dinov2_vitl14, its weights file, F.pt2")
    parser.add_argument("--save-stats", metavar="F.npz", help="REF's statistics, to stand for it")
    parser.add_argument("--json", metavar="F", help="the numbers, for programs")
    parser.add_argument("--batch-size", type=int, default=64, help="of one process")
    parser.add_argument("--device", choices={"cpu", best}, default=best)
    args = parser.parse_args()
    if args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}, expected 1 or more")
    for path in (args.save_stats, args.json):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise InputError(f"there is no folder for {path}")
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return args


def main():
    args = parse_arguments()
    name = network_name(args)
    ref, gen = (open_set(path) for path in args.sets)
    check_network(ref, name)
    check_network(gen, name)

    torch.backends.cudnn.allow_tf32 = False
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    network = None
    if ref.count or gen.count:
        network = load_network(args)
    ref_outputs = extract(ref, network, args.device, args.batch_size)
    gen_outputs = extract(gen, network, args.device, args.batch_size)
    if WORLD > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if RANK > 0:
        return

    distances = ("FID", "sFID")
    if args.network:
        distances = ("FD",)
    result = evaluate(ref, gen, ref_outputs, gen_outputs, distances, args.device)
    report(result)
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(result, indent=1).encode())
    if args.save_stats:
        with atomic_write(args.save_stats) as file:
            np.savez(file, **ref.stats)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (InputError, OSError) as error:
        print(f"fid.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
