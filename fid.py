"""How far generated images are from real ones: FID, sFID, Inception Score, precision and recall as
ADM's evaluator.py (openai/guided-diffusion) defines them, KID, and FD-DINOv2 as EDM2's.

    FID        |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2), of mean and covariance of pooled features
    sFID       the same of 7 channels of an inner layer, at 17 x 17 places
    FD         the same of other features, as DINOv2's
    IS         exp of the mean KL(p(y|x) || p(y)), averaged over splits of 5,000 images
    precision  the fraction of the samples within the 3rd-neighbour radius of some reference image
    recall     the fraction of the reference images within that radius of some sample
    KID        E k(x, x') + E k(y, y') - 2 E k(x, y), k(x, y) = (x.y / D + 1)^3

In `python fid.py REF SAMPLES` each is a folder of images, an .npz of images (arr_0: uint8 N, H, W,
3), an .npz of statistics (mu, sigma, and for sFID mu_s, sigma_s), or an .npy of features (float N,
D). ADM's reference batches hold images and statistics: FID and sFID are of the statistics.
"""

import argparse
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import linalg
from tqdm import tqdm

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"  # ends with the start of the file's SHA-256
)
STANDARD = "inception-2015-12-05"  # the network of statistics that do not name one
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")  # of the features, and of those of sFID


class InputError(ValueError):
    """An input cannot be used; the message says what was given, and what was expected."""


# ------------------------------------------------------------------------------------- the metrics


def float64_tensor(x):
    """Finite numbers, array or tensor -> float64 tensor: metrics are small differences of them"""
    x = torch.as_tensor(x).detach()
    if not x.isfinite().all():  # comparisons with NaN would count as plain False
        raise InputError("features or statistics hold NaN or infinity")
    return x.double()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Means (D,), covariances (D, D), which may be singular -> float (arXiv 1706.08500, eq. 6)"""
    mean_term = (float64_tensor(mu1) - float64_tensor(mu2)).square().sum().item()
    sigma1 = float64_tensor(sigma1).cpu().numpy()
    sigma2 = float64_tensor(sigma2).cpu().numpy()
    # The squared singular values of U1 U2' are the eigenvalues of sigma1 sigma2.
    roots = linalg.svdvals(pivoted_cholesky(sigma1) @ pivoted_cholesky(sigma2).T)
    return float(mean_term + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def pivoted_cholesky(sigma):
    """(D, D), may be singular -> U (rank, D) with sigma = U' U, cut off at the numerical rank"""
    factor, pivot, rank, _ = linalg.lapack.dpstrf(sigma)
    return np.triu(factor)[:rank, np.argsort(pivot)]


def inception_score(logits, split=5000):
    """Logits (N, classes) -> float, 1 or more (arXiv 1606.03498)"""
    scores = []
    for part in float64_tensor(logits).split(split):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores))


def precision_recall(ref, gen, k=3):
    """Features (N, D), (M, D), N and M > k -> two floats in [0, 1] (arXiv 1904.06991)"""
    ref = float64_tensor(ref)
    gen = float64_tensor(gen)
    return fraction_within(gen, ref, k), fraction_within(ref, gen, k)


def fraction_within(points, others, k):
    """The fraction of the points that lie within the k-th-neighbour radius of some other"""
    # each of the others is its own 0th neighbour
    radius = torch.cat([block.kthvalue(k + 1).values for block in distance_blocks(others, others)])
    within = torch.cat([(block <= radius).any(1) for block in distance_blocks(points, others)])
    return within.double().mean().item()


def distance_blocks(a, b, rows=500):
    """(n, D), (m, D) -> for each block of rows of a: distances (rows, m)"""
    center = b.mean(0)  # smaller numbers round less
    b = b - center
    for part in (a - center).split(rows):
        distance = torch.cdist(part, b)
        equal = distance < 1e-5 * part.norm(dim=1, keepdim=True)  # but for rounding
        distance[equal] = 0
        yield distance


def kid(ref, gen):
    """Features (N, D), (M, D), N and M > 1 -> float, also below zero (arXiv 1801.01401, eq. 4)"""
    ref = float64_tensor(ref)
    gen = float64_tensor(gen)
    across = kernel_sum(ref, gen) / (len(ref) * len(gen))
    return kernel_within(ref) + kernel_within(gen) - 2 * across


def kernel_within(x):
    """(n, D) -> the mean of k over all pairs of two different rows"""
    same = ((x.square().mean(1) + 1) ** 3).sum().item()  # of k(x, x)
    return (kernel_sum(x, x) - same) / (len(x) * (len(x) - 1))


def kernel_sum(a, b, rows=500):
    """(n, D), (m, D) -> the sum of k(x, y) over all pairs"""
    blocks = [((part @ b.T / a.shape[1] + 1) ** 3).sum() for part in a.split(rows)]
    return torch.stack(blocks).sum().item()


# --------------------- reading REF and SAMPLES (to_rgb and image_files are those of memory.py, too)


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
    try:
        with Image.open(path) as image:
            return np.array(to_rgb(image))
    except Exception as error:  # many of Pillow's errors do not name the file
        raise InputError(f"{path}: {error}") from error


def open_images(path, batch_size):
    """Folder or .npz -> number of images; generator of batches, each a list or an array of images,
    uint8 (H, W, 3). All images together may not fit into memory."""
    if os.path.isdir(path):
        pool = ThreadPoolExecutor(8)
        files = image_files(path)
        parts = (files[start : start + batch_size] for start in range(0, len(files), batch_size))
        return len(files), (list(pool.map(read_image, part)) for part in parts)

    archive = zipfile.ZipFile(path)
    file = archive.open("arr_0.npy")
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or shape[3:] != (3,) or fortran_order:
        raise InputError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
    batch_bytes = batch_size * int(np.prod(shape[1:]))
    parts = (file.read(batch_bytes) for _ in range(0, shape[0], batch_size))
    return shape[0], (np.frombuffer(part, np.uint8).reshape(-1, *shape[1:]) for part in parts)


class InputSet:
    """REF or SAMPLES: what its path holds, and later what a network makes of its images"""

    def __init__(self, path, batch_size, network):
        self.path = path
        self.made_by = network  # what made the outputs and statistics
        self.count = 0  # the number of images or features; 0: unknown
        self.batches = None  # of images
        self.sizes = set()  # of images
        self.outputs = []  # of the network, (N, D) each, features first
        self.statistics = []  # in the order of STATISTICS
        if os.path.isdir(path):
            self.count, self.batches = open_images(path, batch_size)
        elif path.endswith(".npy"):
            self.outputs = [np.load(path).astype(np.float64)]
            self.count = len(self.outputs[0])
            self.made_by = "features"
        else:
            archive = np.load(path)
            statistics_by = str(archive.get("weights", STANDARD))
            if "arr_0" in archive or "mu" not in archive:
                self.count, self.batches = open_images(path, batch_size)
            else:
                self.count = int(archive.get("n", 0))
                self.made_by = statistics_by
            if statistics_by == self.made_by:  # else those of the images are computed
                self.statistics = [archive[name] for name in STATISTICS if name in archive]
        if self.count < 4 and (self.batches is not None or self.outputs):
            raise InputError(f"{path} holds {self.count} images, expected 4 or more")


LAYER = ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
average_pool = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


class Inception:
    """Inception v3 as TensorFlow had it in 2015; the figures are those of arXiv 1512.00567.

    weights: the state dict of pytorch-fid's file, which also says how wide the layers are
    """

    def __init__(self, weights, device):
        self.weights = {name: values.to(device) for name, values in weights.items()}

    def conv(self, x, name, stride=1, padding="same"):
        """Convolution, batch norm, ReLU"""
        kernel, *batch_norm = [self.weights[f"{name}.{part}"] for part in LAYER]
        x = F.conv2d(x, kernel, None, stride, padding)
        return F.batch_norm(x, *batch_norm, eps=1e-3).relu()

    def chain(self, x, name, count):
        """Layers name_1, name_2 ..., one after another"""
        for number in range(1, count + 1):
            x = self.conv(x, f"{name}_{number}")
        return x

    def __call__(self, x):
        """uint8 (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008), no bias"""
        assert x.dtype == torch.uint8, f"images are {x.dtype}, expected torch.uint8"
        x = (resize_tf1(x.float()) - 128) / 128  # (B, 3, 299, 299)
        x = self.conv(x, "Conv2d_1a_3x3", stride=2, padding=0)
        x = self.conv(x, "Conv2d_2a_3x3", padding=0)
        x = self.conv(x, "Conv2d_2b_3x3")
        x = F.max_pool2d(x, 3, stride=2)
        x = self.conv(x, "Conv2d_3b_1x1")
        x = self.conv(x, "Conv2d_4a_3x3", padding=0)
        x = F.max_pool2d(x, 3, stride=2)  # (B, 192, 35, 35)

        for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):  # figure 5
            branch1x1 = self.conv(x, block + ".branch1x1")
            branch5x5 = self.chain(x, block + ".branch5x5", 2)
            branch3x3dbl = self.chain(x, block + ".branch3x3dbl", 3)
            branch_pool = self.conv(average_pool(x), block + ".branch_pool")
            x = torch.cat([branch1x1, branch5x5, branch3x3dbl, branch_pool], 1)
        branch3x3 = self.conv(x, "Mixed_6a.branch3x3", stride=2, padding=0)  # figure 10
        branch3x3dbl = self.chain(x, "Mixed_6a.branch3x3dbl", 2)
        branch3x3dbl = self.conv(branch3x3dbl, "Mixed_6a.branch3x3dbl_3", stride=2, padding=0)
        x = torch.cat([branch3x3, branch3x3dbl, F.max_pool2d(x, 3, stride=2)], 1)

        for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):  # figure 6
            branch1x1 = self.conv(x, block + ".branch1x1")  # (B, 192, 17, 17)
            branch7x7 = self.chain(x, block + ".branch7x7", 3)
            branch7x7dbl = self.chain(x, block + ".branch7x7dbl", 5)
            branch_pool = self.conv(average_pool(x), block + ".branch_pool")
            x = torch.cat([branch1x1, branch7x7, branch7x7dbl, branch_pool], 1)
            if block == "Mixed_6d":  # ADM: mixed_6/conv
                spatial = branch1x1[:, :7].permute(0, 2, 3, 1).flatten(1)
        branch3x3 = self.conv(x, "Mixed_7a.branch3x3_1")
        branch3x3 = self.conv(branch3x3, "Mixed_7a.branch3x3_2", stride=2, padding=0)
        branch7x7x3 = self.chain(x, "Mixed_7a.branch7x7x3", 3)
        branch7x7x3 = self.conv(branch7x7x3, "Mixed_7a.branch7x7x3_4", stride=2, padding=0)
        x = torch.cat([branch3x3, branch7x7x3, F.max_pool2d(x, 3, stride=2)], 1)  # 8 x 8

        x = self.figure_7(x, average_pool(x), "Mixed_7b")
        x = self.figure_7(x, F.max_pool2d(x, 3, stride=1, padding=1), "Mixed_7c")
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.weights["fc.weight"].T

    def figure_7(self, x, pooled, block):
        branch3x3 = self.conv(x, block + ".branch3x3_1")
        branch3x3dbl = self.chain(x, block + ".branch3x3dbl", 2)
        branches = [
            self.conv(x, block + ".branch1x1"),
            self.conv(branch3x3, block + ".branch3x3_2a"),
            self.conv(branch3x3, block + ".branch3x3_2b"),
            self.conv(branch3x3dbl, block + ".branch3x3dbl_3a"),
            self.conv(branch3x3dbl, block + ".branch3x3dbl_3b"),
            self.conv(pooled, block + ".branch_pool"),
        ]
        return torch.cat(branches, 1)


def resize_tf1(x, size=299):
    """Float (B, C, H, W) -> (B, C, size, size), bilinear as TensorFlow 1: pixel i is read at
    i H / size. With one more pixel at the end of both, align_corners does that."""
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")  # beyond the last pixel is the last pixel
    x = F.interpolate(x, (size + 1, size + 1), mode="bilinear", align_corners=True)
    return x[:, :, :size, :size]


def load_network(args):
    """-> function: uint8 (B, 3, H, W) -> outputs (B, D), the first of which are the features"""
    if args.network:
        return load_dinov2_features(args.network, args.device)
    if args.inception is None:
        download = torch.hub.load_state_dict_from_url
        weights = download(INCEPTION_URL, map_location="cpu", check_hash=True, weights_only=True)
    else:
        weights = torch.load(args.inception, map_location="cpu", weights_only=True)
    return Inception(weights, args.device)


def load_dinov2_features(source, device):
    """-> function: uint8 (B, 3, H, W) -> [class token (B, D)], as EDM2 computes it"""
    from model import load_dinov2

    dino = load_dinov2(source, hub_positions=True).to(device)
    mean = torch.tensor([123.675, 116.28, 103.53], device=device)[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375], device=device)[:, None, None]

    def class_token(x):
        x = F.interpolate(x.float(), (224, 224), mode="bicubic", antialias=True)
        return dino((x - mean) / std)[:1]

    return class_token


def network_name(args):
    """-> the name of the network; main refuses to compare two different ones"""
    source = args.network or args.inception or STANDARD
    if not os.path.isfile(source):
        return source
    with open(source, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()[:8]
    if INCEPTION_URL.endswith(f"-{digest}.pth"):
        return STANDARD
    return f"dinov2-{digest}" if args.network else f"inception-{digest}"


@torch.no_grad()
def compute_outputs(one, network, device):
    """InputSet of N images -> the outputs of the network, (N, D) each, on the CPU"""
    outputs = []
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines, which a log keeps
    bar = tqdm(total=one.count, desc=one.path, unit="img", mininterval=interval, miniters=1)
    with bar:
        for batch in one.batches:
            sizes = {image.shape for image in batch}
            one.sizes |= sizes
            groups = [batch] if len(sizes) == 1 else [[image] for image in batch]
            for group in groups:
                x = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).to(device)
                outputs.append([values.float().cpu() for values in network(x)])
            bar.update(len(batch))
    return [torch.cat(values) for values in zip(*outputs)]


def evaluate(ref, gen, device):
    """InputSets with statistics -> numbers by name; None: they need images or features of both"""
    result = {"weights": gen.made_by, "N_ref": ref.count, "N_samples": gen.count}
    is_inception = gen.made_by.startswith("inception")
    distance = frechet_distance(*ref.statistics[:2], *gen.statistics[:2])
    result["FID" if is_inception else "FD"] = distance
    if len(ref.statistics) == 4 and len(gen.statistics) == 4:
        result["sFID"] = frechet_distance(*ref.statistics[2:], *gen.statistics[2:])
    if is_inception and gen.outputs:
        result["IS"] = inception_score(gen.outputs[2])
    result.update(precision=None, recall=None, KID=None)
    if ref.outputs and gen.outputs:
        features = [torch.as_tensor(one.outputs[0], device=device) for one in (ref, gen)]
        result["precision"], result["recall"] = precision_recall(*features)
        result["KID"] = kid(*features)
    return result


def main():
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    parser = argparse.ArgumentParser()
    kinds = "a folder, an .npz of images or statistics, or an .npy of features"
    parser.add_argument("ref", metavar="REF", help=f"the real images: {kinds}")
    parser.add_argument("samples", metavar="SAMPLES", help="the generated images, likewise")
    networks = parser.add_mutually_exclusive_group()
    networks.add_argument("--inception", help="weights file (default: a download)")
    networks.add_argument("--network", help="DINOv2 instead: dinov2_vitl14, or a weights file")
    parser.add_argument("--save-stats", metavar="F.npz", help="write the statistics of REF")
    parser.add_argument("--json", metavar="F", help="write the numbers as JSON")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a batch")
    parser.add_argument("--device", default=best, help=f"where it runs (default: {best})")
    args = parser.parse_args()

    torch.backends.cudnn.allow_tf32 = False
    name = network_name(args)
    ref = InputSet(args.ref, args.batch_size, name)
    gen = InputSet(args.samples, args.batch_size, name)
    if ref.made_by != gen.made_by:
        raise InputError(f"{args.ref} is of {ref.made_by}, {args.samples} of {gen.made_by}")
    with_images = [one for one in (ref, gen) if one.batches is not None]
    if with_images:
        network = load_network(args)
    for one in with_images:
        one.outputs = compute_outputs(one, network, args.device)
    for one in (ref, gen):
        if not one.statistics:
            for values in one.outputs[:2]:  # of FID, of sFID
                values = float64_tensor(values).numpy()
                one.statistics += [values.mean(0), np.atleast_2d(np.cov(values.T))]

    device = "cpu" if args.device == "mps" else args.device  # MPS has no float64
    result = evaluate(ref, gen, device)
    for name, value in result.items():
        print(f"{name}: {value}")
    if 0 < min(ref.count, gen.count) < 2048:
        print("fid.py: warning: N < 2,048: the distances are biased", file=sys.stderr)
    if ref.sizes and gen.sizes and ref.sizes != gen.sizes:
        print("fid.py: warning: image sizes differ: crop REF as in training", file=sys.stderr)
    if args.json:
        with open(args.json + ".tmp", "w") as file:
            json.dump(result, file, indent=1)
        os.replace(args.json + ".tmp", args.json)
    if args.save_stats:
        with open(args.save_stats + ".tmp", "wb") as file:
            np.savez(
                file, weights=ref.made_by, n=ref.count, **dict(zip(STATISTICS, ref.statistics))
            )
        os.replace(args.save_stats + ".tmp", args.save_stats)


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"fid.py: error: {error}", file=sys.stderr)
        sys.exit(2)
