"""
FID, sFID, Inception Score, precision and recall as ADM's evaluator.py (openai/guided-diffusion) defines them.

    FID        |mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2)    of Inception's 2048 pooled features
    sFID       the same of 7 channels of an inner layer at 17x17 places
    IS         exp of the mean KL(p(y|x) | p(y)) within 5000 images, then the mean over such splits
    precision  part of the samples within the 3-neighbour radius of some reference image; recall: the reverse

REF, SAMPLES: a folder of images; an .npz with arr_0, uint8 (N, H, W, 3), or mu, sigma, mu_s, sigma_s, or both
as in ADM's reference batches: FID and sFID are then of these statistics, precision and recall of the images.
"""
import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from scipy import linalg
from tqdm import tqdm

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")  # ends with the start of the file's SHA-256
MISSING = f"Inception's weights ({URL}; give the file by --inception PATH, or try --inception random)"
STATS = {"FID": ("", 0, 2048), "sFID": ("_s", 1, 2023), "FD-DINOv2": ("_d", 3, 1024)}  # mu.., output, D
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
POOL = ThreadPoolExecutor(8)  # decodes

def need(condition, text):
    if not condition:
        raise ValueError(text)

@contextmanager
def reading(name):  # whatever a library finds wrong with a file becomes one line that names it
    try:
        yield
    except Exception as e:
        raise ValueError(f"{name} cannot be used: {type(e).__name__}, {str(e)[:150]}") from e

# ----------------------------------------------------------------------------- Inception
A = "1x1=64.1.1 5x5=48.1.1,64.5.5 3x3dbl=64.1.1,96.3.3,96.3.3 mean={}.1.1"  # branches, each a chain of layers
B = "3x3=384.3.3.2 3x3dbl=64.1.1,96.3.3,96.3.3.2 halve="  # 384 channels of 3x3, stride 2, no padding
C = "1x1=192.1.1 7x7={0}.1.1,{0}.1.7,192.7.1 7x7dbl={0}.1.1,{0}.7.1,{0}.1.7,{0}.7.1,192.1.7 mean=192.1.1"
D = "3x3=192.1.1,320.3.3.2 7x7x3=192.1.1,192.1.7,192.7.1,192.3.3.2 halve="
E = "1x1=320.1.1 3x3=384.1.1,384.1.3+384.3.1 3x3dbl=448.1.1,384.3.3,384.1.3+384.3.1 {}=192.1.1"  # +: a fork
STEM = "1a_3x3=32.3.3.2 2a_3x3=32.3.3.1 2b_3x3=64.3.3 halve= 3b_1x1=80.1.1 4a_3x3=192.3.3.1 halve="
LAYERS = [("Conv2d_", text) for text in STEM.split()] + [(f"Mixed_{k}.branch", t.format(n)) for k, t, n in (
    ("5b", A, 32), ("5c", A, 64), ("5d", A, 64), ("6a", B, 0), ("6b", C, 128), ("6c", C, 160), ("6d", C, 160),
    ("6e", C, 192), ("7a", D, 0), ("7b", E, "mean"), ("7c", E, "max"))]
POOLS = dict(mean=nn.AvgPool2d(3, 1, 1, False, False), max=nn.MaxPool2d(3, 1, 1), halve=nn.MaxPool2d(3, 2))

def resize_tf1(x, size=299):
    """float (B, C, H, W) -> (B, C, size, size), bilinear as TensorFlow 1: pixel i is taken at i * H / size"""
    def weights(n):  # (size, n)
        at = (torch.arange(size, device=x.device) * (n / size)).clamp_max(n - 1)
        return (1 - (at[:, None] - torch.arange(n, device=x.device)).abs()).clamp_min(0)
    return weights(x.shape[2]) @ x @ weights(x.shape[3]).T

class Inception(nn.Module):  # TensorFlow's of 2015, with the names of pytorch-fid's file
    def conv(self, x, name, text):
        if name not in self._modules:  # made in the first call; add_module would take no name with a dot
            width, *size = map(int, text.split("."))
            layer = self._modules[name] = nn.Sequential()
            rest = size[2:] or (1, [n // 2 for n in size])  # stride, padding
            layer.conv = nn.Conv2d(x.shape[1], width, size[:2], *rest, bias=False)
            layer.bn = nn.BatchNorm2d(width, eps=1e-3).eval()
            nn.init.kaiming_normal_(layer.conv.weight, nonlinearity="relu")
        return torch.relu_(self._modules[name](x))

    def forward(self, x):
        """uint8 (B, 3, H, W) -> pool (B, 2048), spatial (B, 2023), logits (B, 1008) without the bias"""
        x = (resize_tf1(x.float()) - 128) / 128
        for prefix, text in LAYERS:
            out = []
            for branch, chain in (part.split("=") for part in text.split()):
                h = [POOLS[branch](x) if branch in POOLS else x]
                for i, step in enumerate(filter(None, chain.split(",")), 1):
                    name = prefix + ("_pool" if branch in POOLS else branch) + f"_{i}" * ("," in chain)
                    h = [self.conv(h[0], name + k * ("+" in step), t) for k, t in zip("ab", step.split("+"))]
                out += h
            x = torch.cat(out, 1)
            if "6d" in prefix:  # TensorFlow's mixed_6/conv, the 1x1 branch, channels last
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        return x.mean((2, 3)), spatial, x.mean((2, 3)) @ self.fc.weight.T

@torch.no_grad()
def load_inception(source=None):
    """source: pytorch-fid's weights file or its state dict, None: downloaded, "random": of a fixed seed"""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = Inception().eval()
        model.fc = nn.Linear(2048, 1008)
        model(torch.zeros(1, 3, 8, 8))
    if source != "random":
        with reading("the state dict" if isinstance(source, dict) else source or MISSING):
            if source is None:
                source = torch.hub.load_state_dict_from_url(URL, check_hash=True, weights_only=True)
            elif not isinstance(source, dict):
                source = torch.load(source, map_location="cpu", weights_only=True)
            missing = model.load_state_dict(dict(source), strict=False).missing_keys
            need(not missing, f"{len(missing)} keys are missing, such as {missing[:1]}")
    return model.requires_grad_(False).to(memory_format=torch.channels_last)

# ----------------------------------------------------------------------------- the numbers
def frechet_distance(mu1, sigma1, mu2, sigma2):
    """of two normal distributions: means (D,), covariances (D, D), which may be singular -> float"""
    mu1, s1, mu2, s2 = (torch.as_tensor(x).double().cpu().numpy() for x in (mu1, sigma1, mu2, sigma2))
    try:  # with s2 = L L', the eigenvalues of s1 s2 are those of the symmetric L' s1 L
        roots = np.sqrt(linalg.eigvalsh(s1, s2, type=2, driver="gv").clip(0))
    except linalg.LinAlgError:  # s2 is singular: U (rank, D) by pivoting, so that zeros do not round to noise
        u1, u2 = (np.triu(u)[:r, np.argsort(pivot)] for u, pivot, r, _ in map(linalg.lapack.dpstrf, (s1, s2)))
        roots = np.linalg.svd(u1 @ u2.T, compute_uv=False)
    return float(np.square(mu1 - mu2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum())

def inception_score(logits, split=5000):
    """logits (N, classes) -> float"""
    logs = (part.double().log_softmax(1) for part in torch.as_tensor(logits).split(split))
    kl = [(p.exp() * (p - p.logsumexp(0) + np.log(len(p)))).sum(1).mean() for p in logs]
    return float(np.exp(kl).mean())

def distances(a, b, block=2 ** 26):  # (n, D), (m, D) -> squared, by blocks: (slice of rows of a, (rows, m))
    square, step = b.square().sum(1), max(1, block // len(b))
    for i in range(0, len(a), step):
        norm = a[i:i + step].square().sum(1, keepdim=True)
        d = torch.addmm(square, a[i:i + step], b.T, alpha=-2).add_(norm)
        yield slice(i, i + step), d.masked_fill_(d < 1e-5 * norm, 0)  # rounding, where images are the same

def precision_recall(ref, gen, k=3):
    """features (N, D), (M, D), N and M > k, on any device -> two floats; an image is not its own neighbour"""
    center = torch.as_tensor(ref).float().mean(0)  # smaller numbers round less
    ref, gen = (torch.as_tensor(x).float() - center for x in (ref, gen))
    r, g = (torch.cat([d.topk(k + 1, 1, False)[0][:, k] for _, d in distances(x, x)]) for x in (ref, gen))
    inside, reached = zip(*(((d <= r[i, None]).any(0), (d <= g).any(1)) for i, d in distances(ref, gen)))
    return torch.stack(inside).any(0).double().mean().item(), torch.cat(reached).double().mean().item()

# ----------------------------------------------------------------------------- images in, numbers out
def decode(path):
    with reading(path), Image.open(path) as image:
        return np.array(image.convert("RGB"))

def open_set(path):  # -> number of images, read(range) -> list of uint8 (H, W, 3), dict of statistics
    with reading(path):
        if os.path.isdir(path):
            files = sorted(os.path.join(d, f) for d, _, fs in os.walk(path, followlinks=True) for f in fs
                           if os.path.splitext(f)[1].lower() in Image.registered_extensions())
            need(len(files) > 3, f"{len(files)} images, less than 4")
            return len(files), lambda ids: list(POOL.map(decode, files[ids.start:ids.stop])), {}
        npz = np.lib.npyio.NpzFile(path)
        stats = {k: npz[k] for k in npz.files if k.split("_")[0] in ("mu", "sigma", "n", "weights")}
        for end, _, size in STATS.values():
            a, want = [stats[k + end] for k in ("mu", "sigma") if k + end in stats], [(size,), (size, size)]
            need([v.shape for v in a] in ([], want) and np.isfinite([v.sum() for v in a]).all(),
                 f"mu{end}, sigma{end} are not finite numbers {want}, but {[v.shape for v in a]}")
        if stats and "arr_0" not in npz.files:
            return 0, None, stats
        stream = npz.zip.open("arr_0.npy")
        header = getattr(np.lib.format, f"read_array_header_{np.lib.format.read_magic(stream)[0]}_0")
        shape, fortran, dtype = header(stream)
        need(dtype == np.uint8 and not fortran and len(shape) == 4 and shape[3] == 3 and shape[0] > 3,
             f"arr_0 is {dtype} {shape}, not uint8 (N, H, W, 3), N > 3, in C order")
        start, size = stream.tell(), int(np.prod(shape[1:]))
    def read(ids):
        with reading(path):  # only ever forward: a compressed one is a stream
            stream.seek(start + ids.start * size)
            return list(np.frombuffer(stream.read(len(ids) * size), np.uint8).reshape(len(ids), *shape[1:]))
    return shape[0], read, stats

@torch.no_grad()
def extract(name, n, read, net, batch_size):  # -> (n, D) of each output of net; rank 0 gets all the shares
    out = [torch.zeros(n, v.shape[1]) for v in net(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))]
    todo = [range(n)[i:i + batch_size] for i in range(0, n, batch_size)][RANK::WORLD] + [range(n, n)]
    with tqdm(total=sum(map(len, todo)), desc=name, unit="img", disable=RANK > 0) as bar:
        ahead = POOL.submit(read, todo[0])
        for ids, later in zip(todo, todo[1:]):
            batch, ahead = ahead.result(), POOL.submit(read, later)
            for shape in {image.shape for image in batch}:
                rows, images = zip(*((i, image) for i, image in zip(ids, batch) if image.shape == shape))
                for a, v in zip(out, net(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))):
                    a[list(rows)] = v.float().cpu()
            bar.update(len(ids))
    for a in out:
        need(a.isfinite().all(), f"the features of {name} are not finite; are the weights?")
        if WORLD > 1:
            torch.distributed.reduce(a, 0)
    return out

def main():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="fid.py REF SAMPLES [options]")
    parser.add_argument("sets", nargs=2, metavar="REF SAMPLES", help="each a folder of images or an .npz")
    parser.add_argument("--inception", metavar="PATH", help="weights file (else downloaded), or random")
    parser.add_argument("--dinov2", nargs="?", const="dinov2_vitl14", metavar="PATH", help="also FD-DINOv2")
    parser.add_argument("--save-stats", metavar="F.npz", help="the statistics of REF, which can stand for it")
    parser.add_argument("--json", metavar="F", help="the numbers, for programs")
    parser.add_argument("--batch-size", type=int, default=64, help="of one process")
    devices = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    args = parser.parse_args()
    need(args.batch_size > 0, f"--batch-size {args.batch_size} is not positive")
    for path in filter(None, (args.json, args.save_stats)):
        need(os.path.isdir(os.path.dirname(path) or ".") and not os.path.isdir(path), f"no place for {path}")
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    torch.backends.cudnn.allow_tf32 = False
    sets = [(path, *open_set(path)) for path in args.sets]
    (_, n, _, ref), (_, m, _, gen) = sets
    weights = "random" if args.inception == "random" else "inception-2015-12-05"
    note = "  (random weights: comparable with nothing)" * (weights == "random")
    same = all(s.setdefault("weights", weights) == weights for s in (ref, gen))
    need(same, f"the statistics in {' or '.join(args.sets)} are not by {weights} weights")
    if WORLD > 1:
        torch.distributed.init_process_group("gloo")
    nets = [load_inception(args.inception).to(device)] if n or m else []
    if args.dinov2:  # resized and normalised as in EDM2
        from memory import load_dinov2
        resize = lambda x: nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        mean, std = 255 * torch.tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None].to(device)
        dino = load_dinov2(args.dinov2).to(device)
        nets.append(lambda x: dino((resize(x.float()) - mean) / std)[:1])
    net = lambda x: [v for f in nets for v in f(x.to(device))]
    features = [extract(path, n, read, net, args.batch_size) if n else [] for path, n, read, _ in sets]
    if WORLD > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if RANK:
        return
    result = dict(weights=weights, N_ref=int(ref.setdefault("n", n)), N_samples=int(gen.setdefault("n", m)))
    for name, (end, i, _) in STATS.items():
        for s, f in (ref, features[0]), (gen, features[1]):
            if i < len(f) and "mu" + end not in s:
                s["mu" + end], s["sigma" + end] = f[i].mean(0, dtype=torch.float64).numpy(), np.cov(f[i].T)
        if "mu" + end in ref and "mu" + end in gen:
            result[name] = frechet_distance(*(s[k + end] for s in (ref, gen) for k in ("mu", "sigma")))
    result.update(IS=inception_score(features[1][2]) if m else None, precision=None, recall=None)
    if n and m:
        result["precision"], result["recall"] = precision_recall(*(f[0].to(device) for f in features))
    for key, value in result.items():
        print(f"{key}: {'not without images' if value is None else value}{note}")
    if min(result["N_ref"] or 2048, result["N_samples"] or 2048) < 2048:
        print(f"fid.py: warning: N < 2,048: singular covariances, biased FID and sFID{note}", file=sys.stderr)
    for path, save in ((args.json, lambda f: f.write(json.dumps(result, indent=1).encode())),
                       (args.save_stats, lambda f: np.savez(f, **ref))):
        if path:
            with open(path + ".tmp", "wb") as f:
                save(f)
            os.replace(path + ".tmp", path)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as e:
        print(f"fid.py: error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
