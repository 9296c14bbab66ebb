"""Tests of GMem: numbers against an independent computation, a run against a run. They need no GPU
and no network.
"""

import argparse
import copy
import dataclasses
import errno
import fractions
import hashlib
import http.server
import inspect
import io
import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import fid
import memory
import model as model_file
import sample
import train
from memory import (
    Blocks,
    Images,
    MemoryBank,
    Pixels,
    center_crop,
    denormalize_latents,
    glyphs,
    mask,
    mix,
    normalize_latents,
    prepare,
    stats_tensor,
    thumbnail,
    to_float,
    to_rgb,
)
from model import (
    CONFIGS,
    AutoencoderKL,
    DINOv2,
    InputError,
    SiT,
    SiTConfig,
    SwiGLU,
    dinov2_features,
    flow_loss,
    guided,
    load_autoencoder,
    load_dinov2,
    load_sit,
    ode,
    sde,
)
from sample import decode, draw_rows, generate
from train import Loader, Trainer, learning_rate, merge_settings, split

# ====================================================================== shared helpers and fixtures

HERE = os.path.dirname(os.path.abspath(memory.__file__))
QUICK = "--model SiT-T/8 --image-size 16 --batch-size 16 --device cpu"  # a training of seconds
TINY = {
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
}
# one thread here as in the processes that are started: their numbers are the same to the last bit
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
torch.set_num_threads(1)

CPU = torch.device("cpu")
INPUT_ERRORS = (InputError, memory.InputError, fid.InputError)


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """Each test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------------- running commands


def start(command, *more, processes=1, **options):
    """A command of the README's kind in a process of its own, or in several by torchrun -> Popen"""
    file, *flags = command.split()
    argv = [sys.executable]
    if processes > 1:
        argv += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    argv += [os.path.join(HERE, file), *flags, *map(str, more)]
    return subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def run_here(command, *more, fails=False):
    """A command in this process, to save an import of seconds -> exit code, stdout, stderr"""
    argv = [*command.split(), *map(str, more)]
    modules = {"fid.py": fid, "train.py": train, "sample.py": sample, "memory.py": memory}
    module = modules[argv[0]]
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", argv)
        patch.setattr(signal, "signal", lambda *handler: None)  # pytest keeps its own handlers
        if fails:
            with pytest.raises(SystemExit) as stop:
                memory.cli(module.main)
            code = stop.value.code
        else:
            module.main()
    torch.set_float32_matmul_precision("highest")  # train.py's is less
    return code, out.getvalue(), err.getvalue()


def run_apart(command, *more, processes=1):
    """A command in processes of its own -> exit code, stdout, stderr"""
    process = start(command, *more, processes=processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run_python(*argv, path="", cwd=None, code=0, **environment):
    """python with these arguments, which finds modules beside its script and in `path` alone, and
    ends with this exit code -> stdout, stderr"""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


UNWRITABLE = ["2>&1 | true", ">&- 2>&-", "> /dev/full 2>&1"]  # where output cannot go


def run_redirected(command, redirect):
    """A command in bash, which has to end with exit code 0 wherever its output goes."""
    line = f"{sys.executable} {HERE}/{command} {redirect}"
    subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True, timeout=120)


def run(command, *more, processes=0, fails=False):
    """Runs a command, in this process (0) or in others -> its stdout; of one that has to fail, with
    exit code 2 and one line on stderr, that line"""
    if processes == 0:
        code, out, err = run_here(command, *more, fails=fails)
    else:
        code, out, err = run_apart(command, *more, processes=processes)
    lines = []
    for line in err.splitlines():
        if line.strip() and "/s]" not in line:  # bars have a rate
            lines.append(line)
    assert "FutureWarning" not in err, err
    if not fails:
        assert code == 0, out + err
        return out
    assert code == 2, out + err
    assert len(lines) == 1, err
    return lines[0]


def wait_for(condition, process):
    """Waits until condition() holds, as long as the process lives."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def refused(message, f, *args, error=INPUT_ERRORS, **options):
    """f(*args) raises an error, by default an InputError, whose text matches the message."""
    with pytest.raises(error, match=message):
        f(*args, **options)


def modification_times():
    """Of all files and folders below this one."""
    return {path: path.stat().st_mtime_ns for path in Path().rglob("*")}


def files_below(folder="."):
    """Every file with the time of its last change, and every folder."""
    times = {path: 0 for path in Path(folder).rglob("*")}
    for path in times:
        if path.is_file():
            times[path] = path.stat().st_mtime_ns
    return times


def assert_refused(folder, command, message, monkeypatch):
    """The command ends with one short line that holds the message, and has written nothing."""
    monkeypatch.chdir(folder)
    before = files_below()
    line = run(command, fails=True)
    assert message in line
    assert len(line) < 300
    assert files_below() == before


# --------------------------------------------------------------------------------- files and images


def load(path):
    return torch.load(path, weights_only=True)


def read_log(out):
    """The lines of OUT/log.jsonl."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def logged_numbers(out):
    """What two equal runs have in common in their logs: all but times."""
    rows = []
    for line in read_log(out):
        rows.append([line["step"], line["loss"], line["grad_norm"], line["lr"]])
    return rows


def images_of(path):
    """The images of an .npz by sample.py, as integers: differences are not taken modulo 256."""
    images = np.load(path)["arr_0"]
    assert images.dtype == np.uint8
    return images.astype(int)


def read_png(path):
    """An image file -> integers (H, W, 3)."""
    return np.array(Image.open(path)).astype(int)


def red():
    """An image of one colour."""
    return Image.new("RGB", (4, 4), (200, 10, 20))


def half_grey(dtype, value):
    """An image of one value."""
    return Image.fromarray(np.full((2, 2), value, dtype))


def saved(image, kind, **options):
    """image, after it was written as a file of this kind and opened"""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def folder_of_images(path, n=40, size=24):
    """Writes n glyphs as PNGs, into sub-folders class0 and class1 -> the images, their labels"""
    images, labels = memory.glyphs(n=n, size=size)
    for i in range(n):
        folder = f"{path}/class{labels[i] % 2}"
        os.makedirs(folder, exist_ok=True)
        Image.fromarray(images[i]).save(f"{folder}/{i:03d}.png")
    return images, labels


def save_images(path, n, size=16):
    """Writes n glyphs to an .npy or .npz."""
    images, _ = glyphs(n=n, size=size)
    if str(path).endswith(".npz"):
        np.savez(path, arr_0=images)
    else:
        np.save(path, images)


# ---------------------------------------------------------------------------- networks and features


def tiny_sit(**settings):
    """A network of 4 x 4 tokens; settings replace those of TINY, or add to them."""
    return SiT(SiTConfig(**{**TINY, **settings}))


def randomised(model):
    """Random parameters everywhere, also where they start at zero; in eval mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim < 2:
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def features(n=700, d=96, seed=0):
    """(n, d) unit-norm rows whose variances fall, direction by direction, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(n, d, generator=generator) * 0.9 ** torch.arange(d)
    turned = spread @ torch.randn(d, d, generator=generator)
    return F.normalize(turned + 1, dim=1)


def cosine(a, b):
    """Cosine of the rows of a and b (N, D) -> (N,)"""
    return (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)


def distances(a, b):
    """Distance of each row of a to the same row of b (N, D) -> (N,)"""
    return (a - b).norm(dim=1)


@contextmanager
def default_dtype(dtype):
    """Another default dtype of torch for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------------- prepared data and trainings

IMAGES = 30  # of 32 x 32; an autoencoder halves them, DINOv2 sees 16 x 16 patches of each


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """Images prepared by one process (0/) and by two (2/), by a small autoencoder and a small
    DINOv2 with random weights, whose files are in the official formats."""
    folder = tmp_path_factory.mktemp("encoded")
    autoencoder = randomised(AutoencoderKL(4, (32, 32), 1))
    dino = randomised(DINOv2(64, 2, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.save({"state_dict": autoencoder.state_dict()}, "vae.pt")
        torch.save(dino.state_dict(), "dino.pth")
        folder_of_images("images", IMAGES)
        command = (
            "memory.py --data images --tokenizer vae.pt --encoder dino.pth --image-size 32 --flip "
            "--patches --rank 16 --out"
        )
        run(command, 0)
        run(command, 2, processes=2)
        source = Images("images", 32)
        images = np.stack([source[i] for i in range(IMAGES)])
    images = np.concatenate([images, images[:, :, ::-1]])
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents, _ = autoencoder.encode(x / 127.5 - 1)
        class_tokens, patch_tokens = dinov2_features(dino, x)
    return argparse.Namespace(
        folder=folder,
        latents=latents,
        class_tokens=class_tokens,
        patch_tokens=patch_tokens.flatten(0, 1),
        meta=memory.read_json(folder / "0/meta.json"),
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with images/ of two classes, and out/ of a short training on them."""
    folder = tmp_path_factory.mktemp("trained")
    folder_of_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        text = run(f"train.py {QUICK} --steps 6 --log-every 2 --out out --data", folder / "images")
    assert "40 of [3, 16, 16], 2 classes" in text
    return folder


def give_random_weights(ckpt):
    """Replaces the EMA weights in a checkpoint, so that images depend on snippets and labels, which
    they hardly do after six steps of training."""
    checkpoint = load(ckpt)
    checkpoint["ema"] = randomised(load_sit(checkpoint)).state_dict()
    torch.save(checkpoint, ckpt)


@pytest.fixture(scope="session")
def baselines(trained, tmp_path_factory):
    """A folder with the runs none and class, of the models without memory; class has got random
    weights."""
    folder = tmp_path_factory.mktemp("baselines")
    for condition in ("none", "class"):
        run(
            f"train.py {QUICK} --data {trained}/images --steps 6 --no-preview "
            f"--out {folder}/{condition} --condition {condition}"
        )
    give_random_weights(folder / "class/ckpt.pt")
    return folder


def write_bad_files():
    """Writes, into this folder, files that cannot be used as their names promise: images/, of
    which 3 of 9 files do not decode, arrays, and a bank of snippets of 80 numbers."""
    folder_of_images("images", 6)
    whole = Path("images/class0/000.png").read_bytes()
    Path("images/class0/x.png").write_bytes(b"no")
    Path("images/class1/cut.png").write_bytes(whole[: len(whole) // 2])
    Path("images/class1/none.jpg").write_bytes(b"")
    os.mkdir("empty")
    Path("t.npy").write_bytes(b"a")
    Path("t.npz").write_bytes(b"")
    np.save("f.npy", np.zeros((4, 8, 8, 3), np.float32))
    np.savez("labels.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.zeros(3, int))
    np.savez("other.npz", x=np.zeros(3))
    MemoryBank.build(features(70, 80), 4).save("bank.pt")


@pytest.fixture(scope="session")
def with_bad_files(trained, baselines, tmp_path_factory):
    """A folder with bad files, banks and checkpoints, and with trainings: ok, none, class."""
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(baselines / "none", folder / "none")
    shutil.copytree(baselines / "class", folder / "class")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_bad_files()
        Path("file").write_bytes(b"")
        torch.save({"model": {}}, "c.pt")
        torch.save({"config": {"width": 8}, "ema": {}}, "y.pt")
        torch.save(nn.Linear(2, 2), "x.pt")  # a class, which weights_only refuses
        MemoryBank.build(features(70, 768), 4, encoder="another").save("another.pt")
        MemoryBank.build(features(70, 768), 4, encoder="thumbnail").save("unlabelled.pt")
        run(f"train.py {QUICK} --steps 2 --no-preview --data images --skip-bad --out ok")
    return folder


# ========================================================================================= model.py


def with_weights_of(network, other):
    """The network with the parameters and buffers that the other one has under the same names."""
    own = network.state_dict()
    shared = {key: value for key, value in other.state_dict().items() if key in own}
    network.load_state_dict({**own, **shared})
    return network.eval()


def linear(w, name, x):
    """The linear layer `name` of the weights w, applied to x (..., n)."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def softmax_attention(qkv, heads):
    """softmax(q k' / sqrt(d)) v of each head; qkv (T, 3 h) -> (T, h), the heads side by side."""
    q, k, v = qkv.chunk(3, dim=1)
    d = q.shape[1] // heads
    outputs = []
    for head in range(heads):
        columns = slice(head * d, (head + 1) * d)
        weights = torch.softmax(q[:, columns] @ k[:, columns].T / math.sqrt(d), dim=1)
        outputs.append(weights @ v[:, columns])
    return torch.cat(outputs, dim=1)


LIGHTNING = {"swiglu": True, "rmsnorm": True, "rope": True}
SWITCHES = [
    {},
    {"swiglu": True},
    {"rmsnorm": True},
    {"predict_x": True},
    {"rope": True},
    {"qk_norm": True},
    {"learn_sigma": True},
    {"num_classes": 5},
    {"memory_dim": 12},
    {"memory_dim": 12, "memory_tokens": True},
    {"memory_dim": 12, "num_classes": 5, "align_dim": 7, "align_depth": 1},
    {**LIGHTNING, "qk_norm": True, "zero_init": False, "memory_dim": 12},
]

EVERYTHING = {
    "memory_dim": 12,
    "memory_tokens": True,
    "memory_center": True,
    "num_classes": 5,
    **LIGHTNING,
    "qk_norm": True,
    "predict_x": True,
    "align_dim": 7,
    "align_depth": 1,
}

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def inputs_for(network):
    """x (3, 3, 8, 8), t, s, y for a tiny network: what it has no condition for is None."""
    x = torch.randn(3, 3, 8, 8)
    t = torch.rand(3)
    s = None
    y = None
    if network.config.memory_dim:
        s = torch.randn(3, 12)
    if network.config.num_classes:
        y = torch.tensor([0, 4, 5])  # 5 is the null label
    return x, t, s, y


# ------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize("input_size, patch_size", [(9, 2), (8, 3), (8, 16), (8, 0)])
def test_an_input_size_that_is_no_multiple_of_the_patch_is_refused(input_size, patch_size):
    message = f"input_size {input_size}: not a multiple of patch_size {patch_size}"
    refused(message, SiTConfig, input_size=input_size, patch_size=patch_size)


def test_a_hidden_size_that_is_no_multiple_of_the_heads_is_refused():
    refused("hidden_size 32: not a multiple of num_heads 3", SiTConfig, hidden_size=32, num_heads=3)


# ---------------------------------------------------------------------------------- initial weights


@pytest.mark.parametrize("switches", SWITCHES[:-1], ids=str)
def test_with_adaln_zero_the_initial_network_gives_zeros(switches):
    network = tiny_sit(**switches).eval()
    x, t, s, y = inputs_for(network)
    want = torch.zeros_like(x)
    if network.config.predict_x:
        want = -x / (1 - t).clamp_min(0.05)[:, None, None, None]
    assert torch.equal(network(x, t, s, y), want)


def test_without_zero_init_the_initial_velocity_is_not_zero():
    network = tiny_sit(**SWITCHES[-1]).eval()
    v = network(*inputs_for(network))
    assert v.std() > 0.1


def test_linear_layers_start_as_xavier_uniform_without_bias():
    qkv = tiny_sit(hidden_size=128).blocks[0].attn.qkv
    bound = math.sqrt(6 / (128 + 3 * 128))
    assert bound * 0.99 < qkv.weight.abs().max() <= bound
    assert qkv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # if uniform
    assert qkv.bias.abs().max() == 0


def test_the_patch_embedding_starts_as_a_linear_layer_of_flattened_patches():
    weight = tiny_sit(hidden_size=128).x_embedder.proj.weight
    bound = math.sqrt(6 / (3 * 2 * 2 + 128))
    assert bound * 0.98 < weight.abs().max() <= bound


def test_embeddings_of_time_and_label_start_with_a_std_of_0_02():
    network = tiny_sit(hidden_size=128, num_classes=99)
    for weight in (
        network.t_embedder.mlp[0].weight,
        network.t_embedder.mlp[2].weight,
        network.y_embedder.embedding_table.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_init_weights_fills_every_parameter_and_buffer_after_to_empty():
    with torch.device("meta"):
        network = tiny_sit(**EVERYTHING)
    network.to_empty(device="cpu")
    for value in network.state_dict().values():
        value.fill_(math.nan)
    torch.manual_seed(0)
    network.init_weights()
    want = tiny_sit(**EVERYTHING)
    for name, value in network.state_dict().items():
        assert value.isfinite().all(), name
    for name, value in network.named_buffers():
        assert torch.equal(value, want.get_buffer(name)), name
    bound = math.sqrt(6 / (32 + 3 * 32))
    assert bound * 0.98 < network.blocks[0].attn.qkv.weight.abs().max() <= bound


def test_sit_xl_2_has_the_size_of_the_official_one():
    with torch.device("meta"):
        network = SiT(SiTConfig(**CONFIGS["SiT-XL/2"], num_classes=1000, learn_sigma=True))
    count = sum(p.numel() for p in network.parameters())
    # The official 675,129,632 count the fixed position table, which is a buffer here.
    assert count + network.pos_embed.numel() == 675_129_632


def test_parameter_names_are_the_official_ones():
    network = tiny_sit(
        **LIGHTNING, memory_dim=4, num_classes=5, qk_norm=True, align_dim=4, align_depth=1
    )
    linear_of_network = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "condition_projection.linear",
        "projector.0.0",
        "projector.0.2",
        "projector.0.4",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    linear_of_block = ["attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1"]
    norms_of_block = ["norm1", "norm2", "attn.q_norm", "attn.k_norm"]
    want = {
        "pos_embed",
        "feat_rope.freqs_cos",
        "feat_rope.freqs_sin",
        "final_layer.norm_final.weight",
        "y_embedder.embedding_table.weight",
    }
    for name in linear_of_network:
        want |= {f"{name}.weight", f"{name}.bias"}
    for i in (0, 1):
        for name in linear_of_block:
            want |= {f"blocks.{i}.{name}.weight", f"blocks.{i}.{name}.bias"}
        for name in norms_of_block:
            want |= {f"blocks.{i}.{name}.weight"}
    assert set(network.state_dict()) == want


def test_position_table_is_the_official_one():
    x, y = np.meshgrid(np.arange(4.0), np.arange(4.0))  # x first, as in DiT
    w = 1 / 10000 ** (np.arange(8) / 8)
    x_angle = np.outer(x.ravel(), w)
    y_angle = np.outer(y.ravel(), w)
    parts = [np.sin(x_angle), np.cos(x_angle), np.sin(y_angle), np.cos(y_angle)]
    table = tiny_sit().pos_embed[0]
    assert np.allclose(table, np.concatenate(parts, axis=1), atol=1e-6)


# ---------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_gives_a_velocity_of_the_shape_of_x(switches):
    network = randomised(tiny_sit(**switches)).train()
    x, t, s, y = inputs_for(network)
    v = network(x, t, s, y)
    if network.config.align_dim:
        v, tokens = v
        assert tokens.shape == (3, 16, 7)
    assert v.shape == x.shape
    assert network.eval()(x, t, s, y).shape == x.shape


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_gives_every_parameter_a_gradient(switches):
    network = randomised(tiny_sit(**switches)).train()
    v = network(*inputs_for(network))
    if network.config.align_dim:
        v, tokens = v
        (v.square().sum() + tokens.square().sum()).backward()
    else:
        v.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def silu(x):
    """x sigmoid(x)"""
    return x / (1 + torch.exp(-x))


def layer_norm(x):
    """Over the last axis, without an affine map."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = (x - mean).square().mean(dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def gelu_tanh(x):
    """GELU in its approximation by tanh."""
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def patch_tokens(w, x):
    """x (3, 8, 8) -> 16 tokens: each patch of 2 x 2 pixels against each filter of the embedding."""
    tokens = []
    for row in range(4):
        for column in range(4):
            patch = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            product = (w["x_embedder.proj.weight"] * patch).sum(dim=(1, 2, 3))
            tokens.append(product + w["x_embedder.proj.bias"])
    return torch.stack(tokens)


def image_of_tokens(tokens):
    """16 tokens of 12 numbers -> (3, 8, 8): number 6 p + 3 q + c is row p, column q, channel c."""
    image = torch.empty(3, 8, 8, dtype=tokens.dtype)
    for row, column, p, q in np.ndindex(4, 4, 2, 2):
        for channel in range(3):
            number = tokens[4 * row + column, 6 * p + 3 * q + channel]
            image[channel, 2 * row + p, 2 * column + q] = number
    return image


def turned(vector, row, column):
    """The rotary embedding of a head's vector (16,). The angles of its first four pairs of numbers
    grow with the row, the angles of its last four with the column."""
    result = torch.empty_like(vector)
    for pair in range(8):
        position = row if pair < 4 else column
        angle = position * 10000 ** (-(pair % 4) / 4)
        a = vector[2 * pair]
        b = vector[2 * pair + 1]
        result[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        result[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return result


def with_rope(qkv):
    """qkv (16, 96) of 4 x 4 tokens, the queries and keys of both heads turned."""
    result = qkv.clone()
    for token in range(16):
        for first in (0, 16, 32, 48):  # of queries: head 0, head 1; of keys: head 0, head 1
            columns = slice(first, first + 16)
            result[token, columns] = turned(qkv[token, columns], token // 4, token % 4)
    return result


def plain_sit(w, x, t, s, rope):
    """A SiT of one block and two heads, written out for one x (3, 8, 8), time t, snippet s."""
    w_time = 10000 ** (-torch.arange(128).double() / 128)
    time = torch.cat([torch.cos(t * w_time), torch.sin(t * w_time)])
    time = linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", time)))
    c = silu(time + linear(w, "condition_projection.linear", s))
    h = patch_tokens(w, x) + w["pos_embed"][0]

    modulation = linear(w, "blocks.0.adaLN_modulation.1", c)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
    qkv = linear(w, "blocks.0.attn.qkv", layer_norm(h) * (1 + scale1) + shift1)
    if rope:
        qkv = with_rope(qkv)
    h = h + gate1 * linear(w, "blocks.0.attn.proj", softmax_attention(qkv, heads=2))
    inner = linear(w, "blocks.0.mlp.fc1", layer_norm(h) * (1 + scale2) + shift2)
    h = h + gate2 * linear(w, "blocks.0.mlp.fc2", gelu_tanh(inner))

    shift, scale = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2)
    return image_of_tokens(linear(w, "final_layer.linear", layer_norm(h) * (1 + scale) + shift))


@pytest.mark.parametrize("rope", [False, True])
def test_the_network_against_plain_formulas(rope):
    network = randomised(tiny_sit(depth=1, memory_dim=12, rope=rope)).double()
    x = torch.randn(1, 3, 8, 8).double()
    t = torch.tensor([0.3]).double()
    s = torch.randn(1, 12).double()
    want = plain_sit(network.state_dict(), x[0], t[0], s[0], rope)
    got = network(x, t, s)[0]
    assert torch.allclose(got, want, atol=1e-6 * want.abs().max())


def test_swiglu_is_the_gated_mlp_of_its_paper():  # W3 (silu(W1 x) * W2 x), arXiv 2002.05202
    layer = randomised(SwiGLU(8, 5))
    x = torch.randn(6, 8)
    w1, w2 = layer.w12.weight.chunk(2)
    b1, b2 = layer.w12.bias.chunk(2)
    want = (silu(x @ w1.T + b1) * (x @ w2.T + b2)) @ layer.w3.weight.T + layer.w3.bias
    assert torch.allclose(layer(x), want, atol=1e-5)


def test_rmsnorm_divides_by_the_root_mean_square():
    norm = randomised(tiny_sit(rmsnorm=True)).blocks[0].norm1
    x = torch.randn(6, 32)
    want = norm.weight * x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(norm(x), want, atol=1e-5)


def test_qk_norm_makes_attention_independent_of_the_scale_of_queries_and_keys():
    attention = randomised(tiny_sit(qk_norm=True)).blocks[0].attn
    x = torch.randn(1, 16, 32)
    before = attention(x)
    with torch.no_grad():  # of 96 outputs the first 32 are queries, the next 32 keys
        attention.qkv.weight[:64] *= 10
        attention.qkv.bias[:64] *= 10
    assert torch.allclose(attention(x), before, atol=1e-4)


def rotated(rope, vector, row, column):
    """The vector (16,), turned by the module as that of the token at row, column of 4 x 4."""
    at_every_token = rope(vector.expand(16, 16))
    return at_every_token[4 * row + column]


@pytest.mark.parametrize("down, right", [(0, 1), (1, 0), (2, 1)])
def test_rope_sees_relative_positions_only(down, right):
    rope = tiny_sit(rope=True).feat_rope
    q = torch.randn(16)
    k = torch.randn(16)
    at_corner = rotated(rope, q, 0, 0) @ rotated(rope, k, down, right)
    inside = rotated(rope, q, 1, 2) @ rotated(rope, k, 1 + down, 2 + right)
    assert torch.allclose(at_corner, inside, atol=1e-5)


def test_rope_distinguishes_rows_from_columns():
    rope = tiny_sit(rope=True).feat_rope
    torch.manual_seed(0)
    q = torch.randn(16)
    k = torch.randn(16)
    to_the_right = rotated(rope, q, 0, 0) @ rotated(rope, k, 0, 1)
    below = rotated(rope, q, 0, 0) @ rotated(rope, k, 1, 0)
    assert not torch.allclose(to_the_right, below, atol=1e-3)


def test_rope_rotates_pairs_of_numbers_by_row_and_column():
    rope = tiny_sit(rope=True).feat_rope
    q = torch.randn(16)
    assert torch.allclose(rotated(rope, q, 3, 2), turned(q, 3, 2), atol=1e-5)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.99])
def test_predict_x_is_the_velocity_that_leads_to_the_predicted_image(t):
    plain = randomised(tiny_sit())
    predicting = with_weights_of(tiny_sit(predict_x=True), plain)
    x_t = torch.randn(2, 3, 8, 8)
    times = torch.full((2,), t)
    x = plain(x_t, times)
    want = (x - x_t) / max(1 - t, 0.05)
    assert torch.allclose(predicting(x_t, times), want, rtol=1e-4, atol=1e-4)


def test_learn_sigma_uses_the_first_half_of_the_output_channels():
    network = randomised(tiny_sit(learn_sigma=True))
    plain = tiny_sit()
    shared = network.state_dict()
    for name in ("weight", "bias"):
        value = shared[f"final_layer.linear.{name}"]
        halves = value.unflatten(0, (4, 6))  # pixel of the patch, channel
        shared[f"final_layer.linear.{name}"] = halves[:, :3].flatten(0, 1)
    plain.load_state_dict(shared)
    x, t, _, _ = inputs_for(network)
    assert torch.allclose(network(x, t), plain.eval()(x, t), atol=1e-5)


def test_the_projector_takes_the_tokens_after_block_align_depth():
    network = randomised(tiny_sit(depth=3, align_dim=7, align_depth=2)).train()
    outputs = []
    network.blocks[1].register_forward_hook(lambda block, given, output: outputs.append(output))
    _, tokens = network(torch.randn(2, 3, 8, 8), torch.rand(2))
    assert torch.equal(tokens, network.projector[0](outputs[0]))


# ------------------------------------------------------------------------------ snippets and labels


@torch.no_grad()
def test_memory_tokens_add_to_each_token_its_own_linear_map_of_the_snippet():
    network = randomised(tiny_sit(memory_dim=12, memory_tokens=True)).double()
    plain = with_weights_of(tiny_sit(memory_dim=12).double(), network)
    x = torch.randn(2, 3, 8, 8).double()
    t = torch.rand(2)
    s = torch.randn(2, 12).double()
    weight = network.token_projection.weight
    bias = network.token_projection.bias
    positions = network.pos_embed.clone()
    got = network(x, t, s)
    for image in range(2):
        for token in range(16):
            for i in range(32):
                row = 32 * token + i
                shift = (weight[row] * s[image]).sum() + bias[row]
                plain.pos_embed[0, token, i] = positions[0, token, i] + shift
        want = plain(x[image : image + 1], t[image : image + 1], s[image : image + 1])
        assert torch.allclose(got[image], want[0], atol=1e-9 * want.abs().max())


@torch.no_grad()
def test_with_memory_tokens_the_null_snippet_is_still_zeros():
    network = randomised(tiny_sit(memory_dim=12, memory_tokens=True))
    x, t, s, _ = inputs_for(network)
    assert torch.equal(network(x, t), network(x, t, torch.zeros_like(s)))


def centred_and_plain():
    """Two networks of equal weights: one that centres snippets by a mean (12,), and one that does
    not -> both, and the mean."""
    centred = randomised(tiny_sit(memory_dim=12, memory_scale=3.0, memory_center=True))
    plain = with_weights_of(tiny_sit(memory_dim=12, memory_scale=3.0), centred)
    mean = torch.randn(12)
    centred.memory_mean.copy_(mean)
    return centred, plain, mean


def test_a_centred_network_sees_the_snippet_less_the_mean():
    centred, plain, mean = centred_and_plain()
    x, t, s, _ = inputs_for(plain)
    assert torch.allclose(centred(x, t, s), plain(x, t, s - mean), atol=1e-5)


def test_a_centred_network_sees_the_null_snippet_as_zeros():
    centred, plain, _ = centred_and_plain()
    x, t, s, _ = inputs_for(plain)
    assert torch.equal(centred(x, t), plain(x, t))
    assert torch.equal(centred(x, t, torch.zeros_like(s)), plain(x, t))


def test_memory_scale_multiplies_the_snippet():
    scaled = randomised(tiny_sit(memory_dim=12, memory_scale=3.0))
    plain = with_weights_of(tiny_sit(memory_dim=12), scaled)
    x, t, s, _ = inputs_for(plain)
    assert torch.allclose(scaled(x, t, s), plain(x, t, 3 * s), atol=1e-5)


def test_in_training_the_mask_zeroes_entries_and_divides_the_rest():
    network = tiny_sit(memory_dim=1000, mask_ratio=0.4).train()
    seen = network.shown_snippets(torch.ones(20, 1000))
    masked = seen == 0
    assert abs(masked.float().mean() - 0.4) < 0.02
    assert torch.allclose(seen[~masked], torch.tensor(1 / 0.6))


def test_in_sampling_nothing_is_masked():
    network = tiny_sit(memory_dim=1000, mask_ratio=0.4).eval()
    s = torch.randn(20, 1000)
    assert torch.equal(network.shown_snippets(s), s)


def test_no_label_is_the_null_label():
    network = randomised(tiny_sit(num_classes=5))
    x, t, _, y = inputs_for(network)
    assert torch.equal(network(x, t), network(x, t, y=torch.full_like(y, 5)))
    assert torch.equal(network(x, t), network(x, t, y=torch.full_like(y, -1)))
    assert not torch.equal(network(x, t), network(x, t, y=torch.full_like(y, 4)))


# ------------------------------------------------------------------------ the network in other code


@pytest.mark.parametrize("switches", [{"qk_norm": True}, EVERYTHING], ids=["SiT", "LightningDiT"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_network_computes_in_the_dtype_of_its_weights(dtype, switches):
    network = randomised(tiny_sit(**switches))
    x, t, s, y = inputs_for(network)
    want = network(x, t, s, y)
    network.to(dtype)
    for other in FLOATS:
        if s is not None:
            s = s.to(other)
        v = network(x.to(other), t.to(other), s, y)
        assert v.dtype == dtype
        assert (v - want).norm() < 0.05 * want.norm()


def test_a_network_has_the_default_dtype_under_which_it_is_made():
    with default_dtype(torch.float64):
        network = randomised(tiny_sit(**EVERYTHING))
    assert network(*inputs_for(network)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_are_of_any_integer_type(dtype):
    network = randomised(tiny_sit(num_classes=5))
    x, t, _, y = inputs_for(network)
    assert torch.equal(network(x, t, y=y.to(dtype)), network(x, t, y=y))
    torch.manual_seed(0)
    want = flow_loss(network, x, y=y, cond_drop_prob=0.5)
    torch.manual_seed(0)
    assert torch.equal(flow_loss(network, x, y=y.to(dtype), cond_drop_prob=0.5), want)


def test_an_empty_batch_has_an_empty_velocity():
    network = randomised(tiny_sit(**EVERYTHING))
    x, t, s, y = inputs_for(network)
    assert network(x[:0], t[:0], s[:0], y[:0]).shape == (0, 3, 8, 8)
    assert ode(guided(network, s[:0], y[:0], 2.0), x[:0], 2).shape == (0, 3, 8, 8)


def test_the_exported_network_takes_batches_of_any_size():
    network = randomised(tiny_sit(**EVERYTHING))
    x, t, s, y = inputs_for(network)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(network, (x, t, s, y), dynamic_shapes=(batch,) * 4).module()
    x = torch.randn(5, 3, 8, 8)
    t = torch.rand(5)
    s = torch.randn(5, 12)
    y = torch.tensor([0, 4, -1, 5, 1])
    assert torch.allclose(exported(x, t, s, y), network(x, t, s, y), atol=1e-5)


def test_network_and_loss_compile_without_a_graph_break():
    network = randomised(tiny_sit(**EVERYTHING)).train()
    x, _, s, y = inputs_for(network)
    torch.manual_seed(0)
    want = flow_loss(network, x, s, y)
    torch.manual_seed(0)
    compiled = torch.compile(flow_loss, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(network, x, s, y), want)


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_fsdp_trains_and_samples_in_mixed_precision(process_group):
    network = randomised(tiny_sit(**EVERYTHING))
    x, t, s, y = inputs_for(network)
    sharded = copy.deepcopy(network)
    policy = MixedPrecisionPolicy(torch.bfloat16)
    for block in sharded.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(sharded, mp_policy=policy)
    v = guided(sharded, s, y, cfg=2.0)
    assert v(x, t).dtype == torch.bfloat16
    want = ode(guided(network, s, y, cfg=2.0), x, 2)
    assert (ode(v, x, 2) - want).norm() < 0.1 * want.norm()
    flow_loss(sharded.train(), x, s, y).backward()
    assert all(parameter.grad is not None for parameter in sharded.parameters())


COMPILE = partial(torch.compile, backend="eager")
WRAPPERS = {  # name -> the functions that are applied to the network, one after the other
    "DDP": [DistributedDataParallel],
    "torch.compile": [COMPILE],
    "AveragedModel": [AveragedModel],
    "AveragedModel of torch.compile": [COMPILE, AveragedModel],
    "DDP of torch.compile": [COMPILE, DistributedDataParallel],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_loss_guidance_and_load_sit_take_wrapped_networks(name, process_group):
    network = randomised(tiny_sit(**EVERYTHING))
    x, _, s, y = inputs_for(network)
    wrapper = network
    for wrap in WRAPPERS[name]:
        wrapper = wrap(wrapper)
    want = ode(guided(network, s, y, cfg=2.0), x, 2)
    assert torch.allclose(ode(guided(wrapper, s, y, cfg=2.0), x, 2), want, atol=1e-4)
    loaded = load_sit(wrapper.state_dict(), network.config)
    assert torch.equal(ode(guided(loaded, s, y, cfg=2.0), x, 2), want)
    wrapper.train()
    for _ in range(2):  # DDP finds unused parameters in the second forward pass
        flow_loss(wrapper, x, s, y).backward()


# --------------------------------------------------------------------------------------------- loss


def cosine_over_channels(v, u):
    """cos(v, u), (B, C, H, W) -> (B, H, W), as defined: without a bound at v = 0."""
    return (v * u).sum(dim=1) / (v.norm(dim=1) * u.norm(dim=1))


def paper_loss(v, x, z):
    """|v - (x - z)|^2 + 1 - cos(v, x - z)"""
    u = x - z
    return ((v - u) ** 2).mean() + 1 - cosine_over_channels(v, u).mean()


def draws_of_flow_loss(x, cond_drop_prob):
    """What flow_loss draws after the same seed, in its order: times (B,), noise, kept images."""
    t = torch.randn(len(x)).sigmoid()
    z = torch.randn_like(x)
    keep = torch.rand(len(x)) >= cond_drop_prob
    return t, z, keep


class StubNetwork:
    """Stands in for a SiT: gives 2 x_t + s, one number of s a channel; keeps what it was shown."""

    def __init__(self):
        self.snippets = []
        self.labels = []
        self.times = []

    def __call__(self, x_t, t, s=None, y=None):
        self.times.append(t)
        self.snippets.append(s)
        self.labels.append(y)
        if s is None:
            return 2 * x_t
        return 2 * x_t + s[:, :, None, None]


def test_loss_is_mse_plus_cosine_at_the_drawn_times_and_noise():
    torch.manual_seed(0)
    network = StubNetwork()
    x = torch.randn(4000, 3, 8, 8)
    s = F.normalize(torch.randn(4000, 3), dim=1)
    torch.manual_seed(1)
    got = flow_loss(network, x, s, cond_drop_prob=0.25).item()

    torch.manual_seed(1)
    t, z, keep = draws_of_flow_loss(x, cond_drop_prob=0.25)
    t = t[:, None, None, None]
    x_t = (1 - t) * z + t * x
    shown = s * keep[:, None]
    v = 2 * x_t + shown[:, :, None, None]
    assert got == pytest.approx(paper_loss(v, x, z).item(), rel=1e-5)


def test_dropped_images_are_shown_the_null_snippet():
    network = StubNetwork()
    s = F.normalize(torch.randn(4000, 3), dim=1)
    flow_loss(network, torch.randn(4000, 3, 8, 8), s, cond_drop_prob=0.25)
    shown = network.snippets[0]
    kept = shown.any(dim=1)
    assert abs(kept.float().mean() - 0.75) < 0.03
    assert torch.equal(shown[kept], s[kept])
    assert torch.equal(shown[~kept], torch.zeros_like(s[~kept]))


@pytest.mark.parametrize("drop, shown", [(0, [0, -1, 4, 2]), (1, [-1, -1, -1, -1])])
def test_labels_are_shown_unless_their_images_are_dropped(drop, shown):
    network = StubNetwork()
    y = torch.tensor([0, -1, 4, 2])
    flow_loss(network, torch.randn(4, 3, 8, 8), y=y, cond_drop_prob=drop)
    assert network.labels[0].tolist() == shown


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.8)])
def test_the_logit_of_the_time_is_normal(mean, std):
    network = StubNetwork()
    torch.manual_seed(0)
    flow_loss(network, torch.zeros(20_000, 3, 8, 8), t_mean=mean, t_std=std)
    logit = torch.special.logit(network.times[0].double())
    assert logit.mean() == pytest.approx(mean, abs=0.03)
    assert logit.std() == pytest.approx(std, abs=0.03)
    assert stats.kstest(logit, "norm", (mean, std)).pvalue > 0.01


def test_snippet_and_label_of_an_image_are_dropped_together():
    network = StubNetwork()
    s = F.normalize(torch.randn(1000, 3), dim=1)
    y = torch.zeros(1000, dtype=torch.long)
    flow_loss(network, torch.randn(1000, 3, 8, 8), s, y, cond_drop_prob=0.5)
    without_snippet = ~network.snippets[0].any(dim=1)
    without_label = network.labels[0] == -1
    assert torch.equal(without_snippet, without_label)
    assert 400 < without_label.sum() < 600


def test_alignment_adds_the_weighted_cosine_of_projected_tokens_and_targets():
    network = randomised(tiny_sit(align_dim=7, align_depth=1)).train()
    x = torch.randn(4, 3, 8, 8)
    targets = torch.randn(4, 16, 7)
    torch.manual_seed(1)
    aligned = flow_loss(network, x, targets=targets, align=0.5).item()
    torch.manual_seed(1)
    unaligned = flow_loss(network, x).item()

    torch.manual_seed(1)
    t, z, _ = draws_of_flow_loss(x, cond_drop_prob=0.1)
    x_t = (1 - t)[:, None, None, None] * z + t[:, None, None, None] * x
    _, tokens = network(x_t, t)
    cosine = (tokens * targets).sum(dim=2) / (tokens.norm(dim=2) * targets.norm(dim=2))
    assert aligned == pytest.approx(unaligned - 0.5 * cosine.mean().item(), rel=1e-5)


def test_alignment_targets_for_a_network_without_a_projector_are_refused():
    network = tiny_sit().train()
    message = "targets: expected a model with align_dim, in training mode"
    refused(message, flow_loss, network, torch.randn(2, 3, 8, 8), targets=torch.randn(2, 16, 7))


def loss_of(network, x, s):
    """The loss, and its gradient of the first weights; the draws are always the same."""
    torch.manual_seed(1)
    loss = flow_loss(network, x, s)
    network.zero_grad()
    loss.backward()
    return loss, network.x_embedder.proj.weight.grad.float()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_loss_of_data_of_any_float_type_is_the_loss_in_float32(dtype, autocast):
    network = randomised(tiny_sit(memory_dim=12, predict_x=True))
    x = torch.randn(4, 3, 8, 8).to(dtype)
    s = torch.randn(4, 12).to(dtype)
    want, want_gradient = loss_of(network, x.float(), s.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, gradient = loss_of(network, x, s)
    assert loss.dtype == torch.float32
    tolerance = 0.03 if autocast else 1e-5  # bfloat16 has 8 bits
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    assert (gradient - want_gradient).norm() < 10 * tolerance * want_gradient.norm()


def test_the_loss_does_not_depend_on_the_default_dtype():
    network = randomised(tiny_sit(memory_dim=12))
    x = torch.randn(4, 3, 8, 8)
    s = torch.randn(4, 12)
    want, _ = loss_of(network, x, s)
    with default_dtype(torch.float64):
        loss, _ = loss_of(network, x, s)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_without_targets_the_projector_has_a_gradient_of_zeros():  # DDP fails where one has none
    network = randomised(tiny_sit(align_dim=7, align_depth=1)).train()
    flow_loss(network, torch.randn(4, 3, 8, 8)).backward()
    for parameter in network.projector.parameters():
        assert parameter.grad.abs().max() == 0


FRESH = {
    "SiT": {"input_size": 32, "patch_size": 2, "memory_dim": 768},
    "LightningDiT": {"input_size": 16, "patch_size": 1, "memory_dim": 768, **LIGHTNING},
    "SiT that predicts x": {
        "input_size": 32,
        "patch_size": 4,
        "memory_dim": 768,
        "memory_tokens": True,
        "predict_x": True,
    },
}


def fresh_loss(name):
    """A network of S's width and two blocks as initialised, and its first loss -> the network, the
    loss, and what was drawn for it: data x, times t, noise z."""
    torch.manual_seed(0)
    network = SiT(SiTConfig(hidden_size=384, depth=2, num_heads=6, **FRESH[name])).train()
    size = network.config.input_size
    x = torch.randn(8, 4, size, size)
    s = F.normalize(torch.randn(8, 768), dim=1)
    torch.manual_seed(1)
    loss = flow_loss(network, x, s)
    torch.manual_seed(1)
    t, z, _ = draws_of_flow_loss(x, cond_drop_prob=0.1)
    return network, loss, x, t, z


@pytest.mark.parametrize("name", FRESH)
def test_the_initial_gradient_is_moderate(name):
    network, loss, _, _, _ = fresh_loss(name)
    loss.backward()
    squares = 0.0
    for parameter in network.parameters():
        squares += parameter.grad.square().sum().item()
    norm = math.sqrt(squares)
    assert 0.1 < norm < 100


@pytest.mark.parametrize("name", ["SiT", "LightningDiT"])
def test_with_adaln_zero_the_initial_loss_is_the_loss_of_velocity_zero(name):
    _, loss, x, _, z = fresh_loss(name)
    want = (x - z).square().mean() + 1  # the cosine with nothing counts as 0
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


def test_unless_v_is_tiny_the_loss_is_the_one_of_the_paper():
    _, loss, x, t, z = fresh_loss("SiT that predicts x")
    t = t[:, None, None, None]
    x_t = (1 - t) * z + t * x
    v = -x_t / (1 - t).clamp_min(0.05)  # at first the network gives x = 0
    assert (v.norm(dim=1) * (x - z).norm(dim=1)).min() > 0.03
    assert loss.item() == pytest.approx(paper_loss(v, x, z).item(), rel=1e-5)


@pytest.fixture(scope="module")
def losses_on_glyphs():
    """Losses of a SiT-T/8 after 100 steps: with each image's own snippet, with another image's
    (shuffled), with the null snippet; and the loss of a guess of each image's mean colour (flat)."""
    torch.manual_seed(0)
    images, _ = glyphs(n=520, size=16)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    s = MemoryBank.build(thumbnail(x))[:]
    network = SiT(SiTConfig(**CONFIGS["SiT-T/8"], input_size=16, in_channels=3, memory_dim=768))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, betas=(0.9, 0.95))
    for _ in range(100):
        rows = torch.randint(len(x), (32,))
        flow_loss(network, x[rows], s[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    mean_colour = x.mean(dim=(2, 3), keepdim=True)

    def flat(x_t, t, s, y):
        """The best velocity that knows no shapes."""
        return (mean_colour - x_t) / (1 - t[:, None, None, None]).clamp_min(0.05)

    @torch.no_grad()
    def loss(network, s):
        torch.manual_seed(1)
        return flow_loss(network, x, s, cond_drop_prob=0).item()

    return {
        "own": loss(network, s),
        "shuffled": loss(network, s.roll(1, 0)),
        "null": loss(network, torch.zeros_like(s)),
        "flat": loss(flat, s),
    }


@pytest.mark.parametrize(
    "better, factor, worse",
    [("own", 0.35, "flat"), ("own", 0.9, "null"), ("null", 0.9, "shuffled")],
)
def test_a_snippet_lowers_the_loss_of_its_own_image_alone(losses_on_glyphs, better, factor, worse):
    assert losses_on_glyphs[better] < factor * losses_on_glyphs[worse]


# ----------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("sampler", [ode, sde])
def test_a_sampler_without_a_step_is_refused(sampler):
    refused("0 steps: expected 1 or more", sampler, lambda x, t: x, torch.zeros(1, 2), 0)


MU = 0.7  # mean and standard deviation of the data that samplers are given
SIGMA = 0.4


class GaussianFlow:
    """Where the data are N(MU, SIGMA^2), the velocity is linear in x:

        v(x, t) = MU + a(t) (x - t MU),  a(t) = (t SIGMA^2 - (1 - t)) / (t^2 SIGMA^2 + (1 - t)^2)

    So a sample is a sum over z, the noises of the steps, and 1. x (1, steps + 2) holds the
    coefficients of that sum: the law of the samples is known without sampling error."""

    def __init__(self, steps):
        self.steps = steps
        self.noises = 0

    def unit(self, i):
        """The coefficients of one term alone: 0 is z, then come the noises, and last is 1."""
        coefficients = torch.zeros(1, self.steps + 2, dtype=torch.float64)
        coefficients[0, i] = 1
        return coefficients

    def noise(self, x):
        """The next step's noise."""
        self.noises += 1
        return self.unit(self.noises)

    def velocity(self, x, t):
        t = t[:, None]
        mean = MU * self.unit(self.steps + 1)
        a = (t * SIGMA**2 - (1 - t)) / (t**2 * SIGMA**2 + (1 - t) ** 2)
        return mean + a * (x - t * mean)


def law_errors(sampler, method, steps):
    """How far mean and variance of the sampler's samples are from MU and SIGMA^2."""
    flow = GaussianFlow(steps)
    if sampler is sde:
        x = sde(flow.velocity, flow.unit(0), steps, method, noise=flow.noise, last_step=1e-4)
        assert flow.noises == steps
    else:
        x = ode(flow.velocity, flow.unit(0), steps, method)
    mean = x[0, -1].item()
    variance = x[0, :-1].square().sum().item()
    return abs(mean - MU), abs(variance - SIGMA**2)


SAMPLERS = [(ode, "euler", 1), (ode, "heun", 2), (sde, "euler", 1), (sde, "heun", 1)]


@pytest.mark.parametrize("sampler, method, order", SAMPLERS)
def test_samplers_reach_a_gaussian(sampler, method, order):
    mean_error, variance_error = law_errors(sampler, method, steps=800)
    assert mean_error < 2e-3
    assert variance_error < 2e-3


@pytest.mark.parametrize("sampler, method, order", SAMPLERS)
def test_samplers_have_their_order(sampler, method, order):
    _, coarse = law_errors(sampler, method, steps=200)
    _, fine = law_errors(sampler, method, steps=800)
    measured = math.log(coarse / fine) / math.log(4)
    assert order - 0.15 < measured < order + 0.5


class RecordedVelocity:
    """v(x, t) = factor x of a single number; keeps the times and places that it was asked for."""

    def __init__(self, factor):
        self.factor = factor
        self.times = []
        self.places = []

    def __call__(self, x, t):
        self.times.append(t.item())
        self.places.append(x.item())
        return self.factor * x


@pytest.mark.parametrize("method, calls", [("euler", 11), ("heun", 21)])
def test_the_sde_ends_with_a_step_of_one_evaluation(method, calls):
    v = RecordedVelocity(factor=0)
    sde(v, torch.ones(1, 1, dtype=torch.float64), 10, method)
    assert len(v.times) == calls
    assert v.times[-1] == pytest.approx(0.996)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_last_step_of_the_sde_has_no_noise(method):
    v = RecordedVelocity(factor=0)  # dx = -x dt + noise: the last step multiplies by 1 - 0.004
    x = sde(v, torch.ones(1, 1, dtype=torch.float64), 10, method)
    assert x.item() == pytest.approx(0.996 * v.places[-1])


POINTS = {  # where four steps evaluate the velocity; t = 1 is never asked for
    "euler": [0, 0.25, 0.5, 0.75],
    "heun": [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75],
}


@pytest.mark.parametrize("method", POINTS)
def test_the_ode_has_uniform_times_and_ends_with_an_euler_step(method):
    v = RecordedVelocity(factor=1)
    ode(v, torch.zeros(1, 1, dtype=torch.float64), 4, method)
    assert np.allclose(v.times, POINTS[method])


@pytest.mark.parametrize("method", POINTS)
def test_time_shift_is_the_official_map(method):
    v = RecordedVelocity(factor=1)
    ode(v, torch.zeros(1, 1, dtype=torch.float64), 4, method, shift=0.3)
    want = [0.3 * t / (1 + (0.3 - 1) * t) for t in POINTS[method]]
    assert np.allclose(v.times, want)


@pytest.mark.parametrize("sampler", [ode, sde])
def test_an_unknown_method_is_refused_with_the_known_ones(sampler):
    with pytest.raises(ValueError, match="unknown method huen; known: euler, heun"):
        sampler(RecordedVelocity(factor=1), torch.zeros(1, 1), 4, method="huen")


@pytest.mark.parametrize("sampler", [ode, sde])
def test_samplers_compute_no_gradients(sampler):
    network = randomised(tiny_sit())
    z = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert not sampler(network, z, 2).requires_grad


@pytest.mark.parametrize("sampler", [ode, sde])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samplers_keep_x_in_float32_between_their_steps(sampler, dtype):
    seen = []

    def v(x, t):
        seen.append((x.dtype, t.dtype))
        return x.to(dtype)

    x = sampler(v, torch.randn(2, 3, 8, 8, dtype=dtype), 4)
    assert {*seen, (x.dtype, x.dtype)} == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("sampler", [ode, sde])
def test_samplers_and_guidance_refuse_a_network_in_training_mode(sampler):
    network = tiny_sit(memory_dim=12, align_dim=7, align_depth=1).train()
    z = torch.randn(2, 3, 8, 8)
    message = "the network is in training mode: call its eval"
    refused(message, sampler, network, z, 2)
    refused(message, sampler, guided(network), z, 2)
    refused(message, guided(AveragedModel(network)), z, torch.rand(2))


# ----------------------------------------------------------------------------------------- guidance


class GuidedNetwork:
    """Stands in for a network: gives label + sum of the snippet, the null label being 5 and the
    null snippet 0; counts its evaluations."""

    def __init__(self):
        self.evaluations = 0

    def __call__(self, x, t, s=None, y=None):
        self.evaluations += 1
        if s is None:
            return torch.full_like(x, 5)
        return x + y[:, None] + s.sum(dim=1, keepdim=True)


def guided_by_stub(cfg, interval):
    """guided for labels 1 and 2 and snippets of sum 3: unguided 4 and 5, with the null condition 5
    -> v(x, t), the network."""
    network = GuidedNetwork()
    return guided(network, torch.ones(2, 3), torch.tensor([1, 2]), cfg, interval), network


@pytest.mark.parametrize("t, guidance", [(0.29, 0), (0.3, 1), (0.5, 1), (0.7, 1), (0.71, 0)])
def test_guidance_leads_away_from_the_null_condition_within_its_interval(t, guidance):
    v, _ = guided_by_stub(cfg=2.5, interval=(0.3, 0.7))  # the float32 nearest to 0.7 is less
    want = [[4 + guidance * 1.5 * (4 - 5)], [5.0]]
    assert torch.allclose(v(torch.zeros(2, 1), torch.full((2,), t)), torch.tensor(want))


def test_each_image_of_a_batch_is_guided_by_its_own_time():
    v, _ = guided_by_stub(cfg=2.5, interval=(0.3, 0.7))
    images = torch.zeros(2, 1)
    together = v(images, torch.tensor([0.5, 0.9]))
    assert torch.equal(together[0], v(images, torch.tensor([0.5, 0.5]))[0])
    assert torch.equal(together[1], v(images, torch.tensor([0.9, 0.9]))[1])


@pytest.mark.parametrize("cfg, evaluations", [(2.5, 15), (1.0, 10)])
def test_outside_of_its_interval_guidance_costs_no_second_evaluation(cfg, evaluations):
    v, network = guided_by_stub(cfg, interval=(0.3, 0.7))
    ode(v, torch.zeros(2, 1), 10, "euler")  # five of ten times are within
    assert network.evaluations == evaluations


def test_the_sampler_guides_within_the_interval():
    v, _ = guided_by_stub(cfg=2.5, interval=(0.3, 0.7))
    want = torch.zeros(2, 1)
    for i in range(10):
        want = want + 0.1 * v(want, torch.full((2,), i / 10))
    assert torch.allclose(ode(v, torch.zeros(2, 1), 10, "euler"), want, atol=1e-5)


def test_the_guided_velocity_compiles_to_one_graph_inside_and_one_outside_the_interval():
    network = randomised(tiny_sit(memory_dim=12))
    x, t, s, _ = inputs_for(network)
    v = guided(network, s, cfg=2.5, interval=(0.3, 0.7))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(v, fullgraph=True, backend=count)
    assert torch.allclose(ode(compiled, x, 12), ode(v, x, 12), atol=1e-4)
    assert len(graphs) == 2
    assert torch.allclose(compiled(x, t), v(x, t), atol=1e-4)


def test_guidance_has_the_dtype_of_the_network():
    network = randomised(tiny_sit(memory_dim=12)).bfloat16()
    x, t, s, _ = inputs_for(network)
    assert guided(network, s, cfg=2.0)(x, t).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ files and downloads


LOADERS = [  # function, what it loads, a name that it knows
    (load_dinov2, "DINOv2", "dinov2_vits14"),
    (load_autoencoder, "autoencoder", "sd-vae-ft-ema"),
    (load_sit, "SiT", ""),
]


@pytest.mark.parametrize("load, kind, known", LOADERS)
def test_a_missing_file_is_named_with_the_known_names(load, kind, known):
    refused(f"nowhere is no file.*{known}", load, "nowhere")


@pytest.mark.parametrize("load, kind, known", LOADERS)
def test_weights_of_another_kind_of_network_are_refused(load, kind, known):
    refused(f"no {kind}", load, {"a": torch.ones(2)})


def test_a_file_of_objects_other_than_weights_is_not_called_damaged():
    torch.save({"a": fractions.Fraction(1, 2)}, "other.pt")
    with pytest.raises(InputError) as error:
        load_sit("other.pt")
    message = str(error.value)
    assert message.startswith("other.pt holds an object that is neither weights nor numbers")
    assert "Unsupported global: GLOBAL fractions.Fraction" in message
    assert "damaged" not in message
    assert "\n" not in message


NOT_LOADED = {  # what a file holds -> what torch says about it
    "empty": (b"", "EOFError"),
    "text": (b"<!doctype html>" * 30, "Unsupported operand 60"),
    "half": (None, "OSError|RuntimeError"),
}


@pytest.mark.parametrize("name", NOT_LOADED)
def test_a_damaged_file_is_named_with_the_reason_that_torch_gives(name):
    content, reason = NOT_LOADED[name]
    if content is None:
        torch.save(torch.randn(5000), "whole.pt")
        content = Path("whole.pt").read_bytes()[:9000]
    Path("x.pt").write_bytes(content)
    refused(rf"^x.pt is damaged, or not written by torch.save \(.*{reason}", load_sit, "x.pt")


class WeightsServer(http.server.BaseHTTPRequestHandler):
    """Serves the bytes in content; /half: half of them; /chunks: half of them, without a length."""

    def do_GET(self):
        self.paths.append(self.path)
        sent = self.content if self.path == "/whole.pt" else self.content[: len(self.content) // 2]
        if self.path == "/gone.pt":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path == "/chunks.pt":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(self.content) + sent)  # the connection ends here
            return
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        time.sleep(0.1)  # others come meanwhile
        self.wfile.write(sent)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine of the weights of a DINOv2, and an empty cache -> address, handler,
    network, cache."""
    cache = Path("cache").absolute()
    monkeypatch.setenv("TORCH_HOME", str(cache))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    network = randomised(DINOv2(64, 1, 2))
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    handler = type("Handler", (WeightsServer,), {"content": buffer.getvalue(), "paths": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}"
        yield argparse.Namespace(
            address=address,
            handler=handler,
            network=network,
            cached=cache / "hub/checkpoints/dino.pt",
        )
        running.shutdown()


def load_from(server, monkeypatch, name):
    """load_dinov2 of the file of this name on the server."""
    monkeypatch.setitem(model_file.DINOV2, "dino", f"{server.address}/{name}")
    return load_dinov2("dino")


def files_in_cache(server):
    """Names of the files in the cache, without lock files, which are empty."""
    return [path.name for path in server.cached.parent.iterdir() if path.suffix != ".lock"]


def test_weights_are_downloaded_once_and_checked(server, monkeypatch):
    sha256 = hashlib.sha256(server.handler.content).hexdigest()
    for _ in range(2):
        loaded = load_from(server, monkeypatch, f"whole.pt#sha256={sha256}")
    assert torch.equal(loaded.pos_embed, server.network.pos_embed)
    assert server.handler.paths == ["/whole.pt"]
    assert files_in_cache(server) == ["dino.pt"]


BAD_DOWNLOADS = {  # name on the server -> the reason
    "half.pt": "the connection was cut after",
    "chunks.pt": "IncompleteRead",
    "gone.pt": "HTTP Error 404: Not Found",
    "whole.pt#sha256=00": "the SHA-256 is .*, expected 00",
}


@pytest.mark.parametrize("name", BAD_DOWNLOADS)
def test_a_failed_download_leaves_no_file_and_names_url_file_and_reason(server, monkeypatch, name):
    url = f"{server.address}/{name.partition('#')[0]}"
    message = rf"no download of {url} to {server.cached} \(.*{BAD_DOWNLOADS[name]}"
    with pytest.raises(InputError, match=message) as error:
        load_from(server, monkeypatch, name)
    assert "\n" not in str(error.value)
    assert files_in_cache(server) == []
    load_from(server, monkeypatch, "whole.pt")  # now it works


def test_a_server_that_does_not_answer_is_named_with_the_reason(server, monkeypatch):
    server.address = "http://127.0.0.1:9"
    refused("127.0.0.1:9/x.pt .*refused", load_from, server, monkeypatch, "x.pt")


def test_a_damaged_file_in_the_cache_is_named_with_its_place_and_url(server, monkeypatch):
    server.cached.parent.mkdir(parents=True)
    server.cached.write_bytes(b"half of it")
    message = f"{server.cached} is damaged.*; delete it, and it is downloaded again from http://127"
    refused(message, load_from, server, monkeypatch, "whole.pt")


def test_concurrent_downloads_of_one_file_download_it_once(server):
    url = f"{server.address}/whole.pt"
    with ThreadPoolExecutor(4) as pool:  # the lock is between open files, so between threads too
        done = [pool.submit(model_file.download, url, str(server.cached), "") for _ in range(4)]
    assert [future.result() for future in done] == [None] * 4
    assert server.handler.paths == ["/whole.pt"]
    assert server.cached.read_bytes() == server.handler.content


# --------------------------------------------------------------------------------- official weights

FAMILIES = {
    "SiT": {"num_classes": 9, "learn_sigma": True, "hidden_size": 384, "num_heads": 6},
    "LightningDiT": {**LIGHTNING, "num_classes": 9},
    "GMem": {**LIGHTNING, "memory_dim": 768, "align_dim": 768, "mlp_ratio": 2.7},
    "XL, with norms of q and k": {
        "num_classes": 9,
        "learn_sigma": True,
        "qk_norm": True,
        "hidden_size": 1152,
        "num_heads": 16,
        "depth": 1,
    },
}


def family_network(family):
    """A network of one of FAMILIES: four blocks, heads of 64 numbers (XL: of 72)."""
    return randomised(tiny_sit(**{"hidden_size": 128, "depth": 4, **FAMILIES[family]}))


def official_file(weights, form):
    """What an official checkpoint holds. form: "ema", with training state and the prefixes of DDP
    and torch.compile; "model", with DDP's; "weights", nothing else."""
    if form == "ema":
        return {
            "ema": {f"_orig_mod.module.{key}": value for key, value in weights.items()},
            "model": {"x": torch.randn(2, 3, 8, 8)},
            "args": argparse.Namespace(lr=1e-4),
            "config": {"model": {}},
        }
    if form == "model":
        return {"model": {f"module.{key}": value for key, value in weights.items()}}
    return weights


@pytest.mark.parametrize("form", ["ema", "model", "weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_of_official_weights_is_told_by_their_names_and_shapes(family, form):
    network = family_network(family)
    torch.save(official_file(network.state_dict(), form), "official.pt")
    loaded = load_sit("official.pt")
    x = torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    s = torch.randn(2, 768)
    y = torch.tensor([3, 8])
    assert torch.equal(loaded(x, t, s), network(x, t, s))
    assert torch.equal(loaded(x, t, s, y), network(x, t, s, y))


def test_a_gmem_checkpoint_of_two_blocks_with_a_projector_is_loaded():
    network = randomised(tiny_sit(**LIGHTNING, memory_dim=12, align_dim=7, align_depth=2))
    loaded = load_sit(network.state_dict())
    assert loaded.config.depth == 2
    assert loaded.config.align_depth == 2  # four, as in GMem, where there are as many blocks
    x, t, s, _ = inputs_for(network)
    assert torch.equal(loaded(x, t, s), network(x, t, s))
    _, tokens = loaded.train()(x, t, s)
    assert tokens.shape == (3, 16, 7)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_of_another_shape_is_named_with_both_shapes(family):
    network = family_network(family)
    weights = network.state_dict()
    rows, width = weights["final_layer.linear.weight"].shape
    message = (
        r"^1 weights do not fit this SiT: final_layer.linear.weight "
        rf"\(5, 7\), expected \({rows}, {width}\)$"
    )
    refused(message, load_sit, {**weights, "final_layer.linear.weight": torch.ones(5, 7)})


def test_missing_and_unknown_weights_are_named():
    weights = family_network("SiT").state_dict()
    del weights["blocks.3.attn.proj.bias"]
    weights["blocks.3.attn.proj.extra"] = torch.ones(2)
    with pytest.raises(InputError) as error:
        load_sit(weights)
    message = str(error.value)
    assert message.startswith("2 weights do not fit this SiT: ")
    assert "blocks.3.attn.proj.bias missing, expected (384,)" in message
    assert "blocks.3.attn.proj.extra (2,), expected none" in message


def same_network(loaded, network):
    """Whether both give the same velocities, with a snippet and without, and have one config."""
    x, t, s, y = inputs_for(network)
    with_snippet = torch.equal(loaded(x, t, s, y), network(x, t, s, y))
    return with_snippet and torch.equal(loaded(x, t), network(x, t))


SAVE_AND_LOAD = """
torch.save({"config": vars(model.config), "model": model.state_dict()}, "sit.pt")
model = load_sit("sit.pt")                        # in eval mode
model = load_sit(ema.state_dict(), model.config)  # weights alone, also DDP's or AveragedModel's
"""


@pytest.mark.parametrize("lines", [2, 3])
def test_the_lines_of_readme_save_and_load_a_network(lines):
    network = randomised(tiny_sit(**EVERYTHING))
    network.memory_mean.copy_(torch.randn(12))
    names = {"torch": torch, "load_sit": load_sit, "model": network, "ema": AveragedModel(network)}
    Path("use.py").write_text("\n".join(SAVE_AND_LOAD.strip().splitlines()[:lines]))
    model = runpy.run_path("use.py", names)["model"]
    assert model is not network
    assert not model.training
    assert same_network(model, network)


def test_load_sit_takes_a_path_a_loaded_file_and_a_config_as_a_dict():
    network = randomised(tiny_sit(**EVERYTHING))
    fields = vars(network.config)
    torch.save({"config": fields, "ema": network.state_dict()}, "sit.pt")
    assert same_network(load_sit(Path("sit.pt")), network)
    assert same_network(load_sit(load("sit.pt")), network)
    assert same_network(load_sit(network.state_dict(), fields), network)


NOT_OFFICIAL = {  # settings -> why their weights alone do not tell the network
    "tokens": ({"memory_dim": 12, "memory_tokens": True, "rope": True}, "token_projection.weight"),
    "mean": ({"memory_dim": 12, "memory_center": True, "rope": True}, "memory_mean"),
    "SiT-T": ({"hidden_size": 256, "num_heads": 8, "learn_sigma": True}, "hidden_size 256"),
    "memory": (
        {"hidden_size": 384, "num_heads": 6, "memory_dim": 12, "memory_scale": 9},
        "neither",
    ),
    "predict_x": ({"hidden_size": 384, "num_heads": 6, "predict_x": True}, "neither"),
}


@pytest.mark.parametrize("name", NOT_OFFICIAL)
def test_weights_that_do_not_determine_the_network_need_its_config(name):
    settings, why = NOT_OFFICIAL[name]
    network = randomised(tiny_sit(**settings))
    weights = network.state_dict()
    message = rf"these are no official weights \(.*{why}.*\): load_sit needs config"
    refused(message, load_sit, weights)
    assert same_network(load_sit(weights, network.config), network)


def test_a_config_of_unknown_settings_is_refused():
    refused("no SiT.*unexpected.*depths", load_sit, tiny_sit().state_dict(), {"depths": 3})


# ------------------------------------------------------------------------------------- autoencoders

# Names of the LDM code -> of diffusers, applied to a key in this order; levels of a decoder count
# from the finest in LDM's, from the coarsest in diffusers'.
DIFFUSERS_NAMES = {
    ".down.": ".down_blocks.",
    ".up.0": ".up_blocks.2",
    ".up.1": ".up_blocks.1",
    ".up.2": ".up_blocks.0",
    ".block.": ".resnets.",
    ".mid.": ".mid_block.",
    ".block_1": ".resnets.0",
    ".block_2": ".resnets.1",
    ".attn_1": ".attentions.0",
    ".attn.": ".attentions.",
    ".norm_out": ".conv_norm_out",
    ".downsample": ".downsamplers.0",
    ".upsample": ".upsamplers.0",
    ".nin_": ".conv_",
}
# In attention, of today and older.
DIFFUSERS_ATTENTION_NAMES = {
    "diffusers": {
        ".norm.": ".group_norm.",
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
        ".proj_out.": ".to_out.0.",
    },
    "older diffusers": {
        ".norm.": ".group_norm.",
        ".q.": ".query.",
        ".k.": ".key.",
        ".v.": ".value.",
        ".proj_out.": ".proj_attn.",
    },
}


def small_autoencoder():
    """Three levels, the last one with attention: a factor of 4."""
    return randomised(AutoencoderKL(4, (32, 64, 64), 1, (2,)))


def diffusers_weights(weights, attention_names):
    """A state dict of this code, with LDM's names -> one as diffusers saves it."""
    renamed = {}
    for key, value in weights.items():
        names = dict(DIFFUSERS_NAMES)
        if ".attn" in key:
            names.update(attention_names)
            if value.ndim == 4:  # a convolution of 1 x 1 there, a linear layer in diffusers
                value = value[:, :, 0, 0]
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("form", ["LDM", *DIFFUSERS_ATTENTION_NAMES])
def test_autoencoder_weights_are_loaded_in_the_key_formats_of_ldm_and_diffusers(form):
    network = small_autoencoder()
    if form == "LDM":  # a file, with parts that are of the training only
        training = {"loss.logvar": torch.ones(2), "foundation_model.bias": torch.ones(2)}
        torch.save({"state_dict": {**network.state_dict(), **training}}, "ldm.ckpt")
        source = "ldm.ckpt"
    else:
        source = diffusers_weights(network.state_dict(), DIFFUSERS_ATTENTION_NAMES[form])
        assert "encoder.mid_block.attentions.0.group_norm.weight" in source
        assert "decoder.up_blocks.0.upsamplers.0.conv.weight" in source
    loaded = load_autoencoder(source)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = torch.randn(2, 4, 4, 4)
    mean, log_variance = network.encode(x)
    loaded_mean, loaded_log_variance = loaded.encode(x)
    assert mean.shape == z.shape
    assert torch.equal(loaded_mean, mean)
    assert torch.equal(loaded_log_variance, log_variance)
    assert torch.equal(loaded.decode(z), network.decode(z))


@torch.no_grad()
def test_attention_of_the_autoencoder_against_plain_formulas():
    layer = small_autoencoder().encoder.mid.attn_1
    h = torch.randn(1, 64, 6, 6)
    n = F.group_norm(h, 32, layer.norm.weight, layer.norm.bias, 1e-6).reshape(64, 36)
    q = layer.q.weight[:, :, 0, 0] @ n + layer.q.bias[:, None]
    k = layer.k.weight[:, :, 0, 0] @ n + layer.k.bias[:, None]
    v = layer.v.weight[:, :, 0, 0] @ n + layer.v.bias[:, None]
    mixed = v @ torch.softmax(k.T @ q / 8, dim=0)  # 8 = sqrt(64)
    want = layer.proj_out.weight[:, :, 0, 0] @ mixed + layer.proj_out.bias[:, None]
    assert torch.allclose(layer(h), h + want.reshape(h.shape), atol=1e-5)


@torch.no_grad()
def test_downsampling_pads_at_the_right_and_below_only():
    level = small_autoencoder().encoder.down[1]
    level.block = nn.ModuleList()
    level.attn = nn.ModuleList()
    conv = level.downsample.conv
    h = torch.randn(1, 64, 6, 6)
    padded = F.pad(h, (0, 1, 0, 1))[0]
    out = level(h)[0]
    assert out.shape == (64, 3, 3)
    for row, column in np.ndindex(3, 3):
        window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
        want = (conv.weight * window).sum(dim=(1, 2, 3)) + conv.bias
        assert torch.allclose(out[:, row, column], want, atol=1e-5)


@torch.no_grad()
def test_upsampling_repeats_pixels_before_its_convolution():
    level = small_autoencoder().decoder.up[1]
    level.block = nn.ModuleList()
    level.attn = nn.ModuleList()
    conv = level.upsample.conv
    h = torch.randn(1, 64, 3, 3)
    repeated = h[0].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    window = repeated[:, 1:4, 2:5]  # around pixel (2, 3)
    want = (conv.weight * window).sum(dim=(1, 2, 3)) + conv.bias
    out = level(h)[0]
    assert out.shape == (64, 6, 6)
    assert torch.allclose(out[:, 2, 3], want, atol=1e-5)


# ------------------------------------------------------------------------------------------- DINOv2


def dinov2_norm(w, name, x):
    """The layer norm `name` of the weights w."""
    return F.layer_norm(x, [128], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


@torch.no_grad()
def test_dinov2_against_plain_formulas():
    w = randomised(DINOv2(128, 1, grid=5)).state_dict()
    network = load_dinov2({**w, "mask_token": torch.ones(1, 128)})
    x = torch.randn(2, 3, 70, 70)  # 5 x 5 patches: the position table's own grid
    classes, patches = network(x)
    for image in range(2):
        h = F.conv2d(x[image], w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], 14)
        h = torch.cat([w["cls_token"][0], h.flatten(1).T]) + w["pos_embed"][0]
        qkv = linear(w, "blocks.0.attn.qkv", dinov2_norm(w, "blocks.0.norm1", h))
        attended = linear(w, "blocks.0.attn.proj", softmax_attention(qkv, heads=2))
        h = h + w["blocks.0.ls1.gamma"] * attended
        inner = F.gelu(linear(w, "blocks.0.mlp.fc1", dinov2_norm(w, "blocks.0.norm2", h)))
        h = h + w["blocks.0.ls2.gamma"] * linear(w, "blocks.0.mlp.fc2", inner)
        want = dinov2_norm(w, "norm", h)
        assert torch.allclose(classes[image], want[0], atol=1e-4)
        assert torch.allclose(patches[image], want[1:], atol=1e-4)


@torch.no_grad()
def test_dinov2_resamples_its_position_table_as_pillow_does():  # bicubic, antialiased
    network = randomised(DINOv2(128, 1, grid=5))
    network.blocks = nn.Sequential()  # what is left: the positions, and the bias of the patches
    network.norm = nn.Identity()
    _, patches = network(torch.zeros(1, 3, 42, 42))
    got = patches[0] - network.patch_embed.proj.bias
    table = network.pos_embed[0, 1:, 7].reshape(5, 5).numpy()
    want = Image.fromarray(table).resize((3, 3), Image.BICUBIC)
    assert np.allclose(got[:, 7], np.ravel(want), atol=1e-5)


def cubic_convolution(size, new_size):
    """The matrix (new_size, size) of bicubic resampling without antialiasing, a = -0.75."""
    center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    d = np.abs(center[:, None] - np.arange(size))
    near = 1.25 * d**3 - 2.25 * d**2 + 1
    far = -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
    return np.where(d < 1, near, np.where(d < 2, far, 0))


@pytest.mark.parametrize(
    "channel, mean, std", [(0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)]
)
def test_dinov2_is_given_images_normalised_and_resized_to_224_pixels(channel, mean, std):
    images = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    seen = dinov2_features(nn.Identity(), images)
    assert seen.shape == (1, 3, 224, 224)
    matrix = cubic_convolution(256, 224)
    want = matrix @ ((images[0, channel].numpy() / 255 - mean) / std) @ matrix.T
    inside = slice(3, -3)  # at the border pixels are repeated
    assert np.allclose(seen[0, channel, inside, inside], want[inside, inside], atol=1e-3)


@pytest.mark.parametrize("size, seen_size", [(32, 224), (256, 224), (512, 448)])
def test_dinov2_is_given_224_pixels_for_every_256(size, seen_size):
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    seen = dinov2_features(nn.Identity(), images)
    assert seen.shape == (1, 3, seen_size, seen_size)


# ----------------------------------------------------------------------- model.py alone in a folder

USE_OF_MODEL_ALONE = """
import os
import torch
import model

assert os.path.dirname(os.path.abspath(model.__file__)) == os.getcwd()
config = model.SiTConfig(
    input_size=8, in_channels=3, hidden_size=32, depth=1, num_heads=2, memory_dim=4
)
network = model.SiT(config)
s = torch.nn.functional.normalize(torch.randn(2, 4), dim=1)
model.flow_loss(network, torch.randn(2, 3, 8, 8), s).backward()
assert network.final_layer.linear.weight.grad.abs().sum() > 0
torch.optim.SGD(network.parameters(), lr=0.1).step()
network.eval()
with torch.no_grad():
    v = model.guided(network, s, cfg=2.0)
    x = model.ode(v, torch.randn(2, 3, 8, 8), 2)
print(tuple(x.shape), bool(x.isfinite().all()))
"""


def test_model_py_works_when_it_is_copied_alone_into_an_empty_folder():
    shutil.copy(model_file.__file__, "model.py")
    Path("use.py").write_text(USE_OF_MODEL_ALONE)
    out, _ = run_python("use.py")
    assert out.strip() == "(2, 3, 8, 8) True"


# ======================================================================================== memory.py


@pytest.fixture(scope="module")
def bank():
    """A bank of features() of rank 24."""
    return MemoryBank.build(features(), 24, labels=np.arange(700) % 7, encoder="thumbnail")


# ------------------------------------------------------------------------------------- mask and mix


def test_mask_sets_a_part_to_zero_and_divides_the_rest():  # dropout
    masked = mask(torch.ones(200, 500), 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(masked.unique(), torch.tensor([0, 1 / 0.6]))
    zeros = (masked == 0).float()
    assert abs(zeros.mean() - 0.4) < 0.01


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_mask_of_all_entries_or_of_less_than_none_is_refused(ratio):
    refused(f"ratio {ratio}: expected a fraction", mask, torch.ones(2, 4), ratio)


def test_mask_takes_every_entry_equally_often():
    masked = mask(torch.ones(200, 500), 0.4, torch.Generator().manual_seed(0))
    zeros = (masked == 0).float()
    assert abs(zeros.mean(0) - 0.4).max() < 0.2


METHODS = ("slerp", "lerp", "concat", "mask")
ALPHA = torch.linspace(0, 1, 9)[:, None, None]


def pairs_to_mix():
    """-> a, b (7, 64), unit-norm; the first pair is equal, the second opposite, the third close"""
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(2, 7, 64), dim=-1)
    b[0] = a[0]
    b[1] = -a[1]
    b[2] = F.normalize(a[2] + 1e-7, dim=0)
    return a, b


def mixtures_by(method):
    """-> a, b (7, 64) and their mixes (9, 7, 64) at ALPHA"""
    a, b = pairs_to_mix()
    return a, b, mix(a.expand(9, 7, 64), b.expand(9, 7, 64), ALPHA, method)


@pytest.mark.parametrize("method", METHODS)
def test_mixes_have_unit_norm(method):
    _, _, m = mixtures_by(method)
    assert torch.allclose(m.norm(dim=-1), torch.ones(9, 7), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_mixes_go_from_a_to_b(method):
    a, b, m = mixtures_by(method)
    assert torch.allclose(m[0], a, atol=1e-5)
    assert torch.allclose(m[-1], b, atol=1e-5)


@pytest.mark.parametrize("method", ["slerp", "lerp", "concat"])
def test_mixes_leave_a_step_by_step(method):
    a, _, m = mixtures_by(method)
    cosine_to_a = (m * a).sum(-1)[:, 3:]
    assert (cosine_to_a[:-1] - cosine_to_a[1:] > -1e-5).all()


def test_slerp_goes_a_part_of_the_angle():
    a, b, m = mixtures_by("slerp")
    angle = torch.acos((a * b).sum(-1).clamp(-1, 1))
    cosine_to_a = (m * a).sum(-1)
    assert torch.allclose(cosine_to_a[:, 3:], (ALPHA[..., 0] * angle).cos()[:, 3:], atol=1e-5)


def test_slerp_between_opposite_snippets_makes_half_a_turn():
    a, _, m = mixtures_by("slerp")
    cosine_to_a = (m[:, 1] * a[1]).sum(-1)
    assert torch.allclose(cosine_to_a, (ALPHA[:, 0, 0] * np.pi).cos(), atol=1e-4)


def test_slerp_stays_in_the_plane_of_a_and_b():
    a, b, m = mixtures_by("slerp")
    for i in range(3, 7):
        plane = torch.linalg.qr(torch.stack([a[i], b[i]]).T)[0]
        within = m[:, i] @ plane @ plane.T
        assert torch.allclose(within, m[:, i], atol=1e-5)


def test_lerp_is_the_normalised_weighted_sum():
    a, b, m = mixtures_by("lerp")
    weighted = (1 - ALPHA) * a + ALPHA * b
    want = weighted / weighted.norm(dim=-1, keepdim=True)
    assert torch.allclose(m[:, 3:], want[:, 3:], atol=1e-5)


@pytest.mark.parametrize("method", ["concat", "mask"])
def test_concat_and_mask_take_every_entry_from_one_of_the_two(method):
    a, b, m = mixtures_by(method)
    from_a = m[4, 3:] / a[3:]  # up to the scale of the row, which is the same for both
    from_b = m[4, 3:] / b[3:]
    is_of_a = (from_a - from_a.median(1, keepdim=True)[0]).abs() < 1e-4
    scale = torch.where(is_of_a, from_a, from_b)
    assert torch.allclose(scale, scale[:, :1].expand_as(scale), atol=1e-3)


def test_concat_takes_the_first_entries_from_a_and_the_last_from_b():
    a, b, m = mixtures_by("concat")
    joined = torch.cat([a[:, :48], b[:, 48:]], dim=1)  # a quarter from b
    want = F.normalize(joined, dim=1)
    assert torch.allclose(m[2, 3:], want[3:], atol=1e-6)


def test_mixing_by_mask_depends_on_the_generator():
    a, b = pairs_to_mix()
    one = mix(a, b, 0.5, "mask", torch.Generator().manual_seed(1))
    again = mix(a, b, 0.5, "mask", torch.Generator().manual_seed(1))
    other = mix(a, b, 0.5, "mask", torch.Generator().manual_seed(2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_an_unknown_method_of_mixing_is_refused_with_the_known_ones():
    a, b = pairs_to_mix()
    refused("slurp.*slerp, lerp, concat, mask", mix, a, b, 0.5, "slurp")


# -------------------------------------------------------------------------------- the truncated SVD


def features_of_kind(kind):
    """Features (N, D) float64 of unit norm, among them such as make a covariance singular."""
    f = features().double()
    if kind == "repeated rows":
        return f[:50].repeat(4, 1)
    if kind == "fewer rows than numbers":
        return f[:60]
    if kind == "constant columns":
        constant = torch.full_like(f[:, 48:], 0.1)
        return F.normalize(torch.cat([f[:, :48], constant], dim=1), dim=1)
    return f


class Truncation:
    """The exact truncated SVD of the centred rows of f, and a bank of them."""

    def __init__(self, kind):
        self.f = features_of_kind(kind)
        self.mean = self.f.mean(0)
        U, S, V = torch.linalg.svd(self.f - self.mean, full_matrices=False)
        self.energy = S.square().cumsum(0) / S.square().sum()
        r = 24
        self.bank = MemoryBank.build(self.f, dtype="float32", rank=r)
        self.rows = (U[:, :r] * S[:r]) @ V[:r] + self.mean
        self.error = S[r:].square().sum().sqrt()  # Eckart and Young: no matrix of rank r has less


KINDS = ("plain", "repeated rows", "fewer rows than numbers", "constant columns")


@pytest.fixture(scope="module", params=KINDS)
def truncation(request):
    """The exact truncation of rank 24 and the bank, for features of each kind."""
    return Truncation(request.param)


def test_the_error_of_a_bank_is_that_of_the_truncated_svd(truncation):
    bank = truncation.bank
    coef = torch.tensor(bank.coef)
    approximation = coef @ torch.tensor(bank.basis) + torch.tensor(bank.mean)
    error = (approximation - truncation.f).norm()
    assert error <= truncation.error * 1.001 + 1e-5


def test_the_snippets_of_a_bank_are_the_normalised_rows_of_the_truncated_svd(truncation):
    want = F.normalize(truncation.rows, dim=1).float()
    assert torch.allclose(truncation.bank[:], want, atol=1e-4)


def test_a_bank_has_the_rank_asked_for(truncation):
    assert truncation.bank.rank == 24


def test_a_bank_knows_the_part_of_the_variance_that_it_keeps(truncation):
    want = truncation.energy[23].item()
    assert truncation.bank.energy == pytest.approx(want, rel=1e-5)


def test_the_basis_of_a_bank_is_orthonormal(truncation):
    basis = truncation.bank.basis
    assert np.allclose(basis @ basis.T, np.eye(24), atol=1e-5)


def test_features_far_from_zero_keep_the_digits_of_their_directions():
    f = 1000 + torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(
        16, 0, -1
    )
    s = F.normalize(f.double(), dim=1)
    _, size, directions = torch.linalg.svd(s - s.mean(0), full_matrices=False)
    bank = MemoryBank.build(f, 4, "float32")
    variance = size.square()
    assert bank.energy == pytest.approx((variance[:4].sum() / variance.sum()).item(), rel=1e-6)
    alignment = (torch.tensor(bank.basis) * directions[:4]).sum(1).abs()
    assert (alignment - 1).abs().max() < 1e-6


# ------------------------------------------------------------------------------------- quantisation

QUANTISATION = [("float32", 2e-6, 1e-6), ("float16", 5e-4, 2.5e-4), ("int8", 0.0105, 0.006)]


@pytest.mark.parametrize("dtype, worst, mean", QUANTISATION)
def test_quantisation_moves_a_snippet_by_a_bounded_distance(dtype, worst, mean):
    f = features()
    exact = MemoryBank.build(f.double(), 24, "float32")
    bank = MemoryBank.build(f, 24, dtype)
    assert bank.coef.dtype == dtype
    error = distances(bank[:], exact[:])
    assert error.max() < worst
    assert error.mean() < mean


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_quantisation_moves_a_coefficient_by_half_a_step_at_most(dtype):
    f = features()
    exact = MemoryBank.build(f.double(), 24, "float32")
    bank = MemoryBank.build(f, 24, dtype)
    if dtype == "int8":
        half_step = bank.scale[:, None] / 2
    elif dtype == "float16":
        half_step = 2.0**-11 * np.abs(exact.coef)
    else:
        half_step = 0
    coefficients = bank.coef * bank.scale[:, None]
    assert (np.abs(coefficients - exact.coef) <= half_step + 1e-6).all()


def test_the_int8_step_of_a_row_is_a_127th_of_its_largest_coefficient():
    f = features()
    exact = MemoryBank.build(f, 24, "float32")
    bank = MemoryBank.build(f, 24, "int8")
    want = np.abs(exact.coef).max(axis=1) / 127
    assert np.allclose(bank.scale, want, rtol=1e-5)
    assert want.max() > 2 * want.min()  # rows differ


def test_a_row_of_int8_does_not_depend_on_the_others():
    f = features()
    bank = MemoryBank.build(f, 24)
    more = bank.extend(bank[:5], limit=0)  # at the same mean and basis
    assert np.allclose(more.scale[700:], more.scale[:5], rtol=0.02)


def test_int8_costs_half_a_percent_of_the_truncation_error_at_most():
    torch.manual_seed(0)
    spread = torch.randn(5000, 128) / torch.arange(1, 129).sqrt()
    f = F.normalize(spread @ torch.linalg.qr(torch.randn(128, 128))[0] + 0.1, dim=1).double()
    mean = f.mean(0)
    singular_values = torch.linalg.svdvals(f - mean)
    exact = singular_values[64:].square().sum().sqrt()
    bank = MemoryBank.build(f, 64, "int8")
    coefficients = torch.tensor(bank.coef * bank.scale[:, None]).double()
    approximation = coefficients @ torch.tensor(bank.basis).double() + torch.tensor(bank.mean)
    error = (approximation - f).norm()
    assert 0.9999 * exact < error < 1.005 * exact


@pytest.mark.parametrize("rows, rank", [(700, 96), (40, 40)])
def test_a_full_bank_has_every_direction_in_float16_and_keeps_every_snippet(rows, rank):
    f = features(rows, 96)
    bank = MemoryBank.build(f, "full")
    assert bank.coef.dtype == np.float16
    assert bank.rank == rank
    assert bank.basis.shape == (rank, 96)
    assert torch.allclose(bank[:], f, atol=1e-3)


# ----------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("shape, lowest", [((70, 80), 70), ((80, 50), 50)])
def test_a_rank_above_rows_or_numbers_is_lowered_with_a_warning(shape, lowest):
    with pytest.warns(UserWarning, match=f"rank 81 lowered to {lowest}"):
        bank = MemoryBank.build(features(*shape), 81)
    assert bank.rank == lowest


def test_the_default_rank_is_lowered_with_a_warning_and_nothing_is_printed(capsys):
    with pytest.warns(UserWarning, match="rank 64 lowered to 20"):
        bank = MemoryBank.build(features(20, 80))
    assert bank.rank == 20
    assert capsys.readouterr().out == ""


def test_a_rank_that_fits_is_kept_without_a_warning(recwarn):
    bank = MemoryBank.build(features(70, 80), 70)
    assert bank.rank == 70
    assert len(recwarn) == 0


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_1_is_refused(rank):
    refused(
        f"rank {rank}: expected a whole number of at least 1",
        MemoryBank.build,
        features(70, 80),
        rank,
    )


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    refused("int16.*int8, float16, float32", MemoryBank.build, features(70, 80), 8, "int16")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0.0])
def test_features_that_are_not_finite_or_zero_are_refused_with_their_rows(value):
    f = features(9000, 8)
    f[5000] = value
    f[5003] = value
    refused("features of row 5000, 5003 hold NaN, infinity, or zeros alone", MemoryBank.build, f, 4)


def test_ten_features_of_many_numbers_need_no_covariance_matrix():
    f = torch.randn(10, 200_000)  # a covariance of 320 GB
    bank = MemoryBank.build(f, 9, "float32")
    assert torch.allclose(bank[:], F.normalize(f, dim=1), atol=1e-5)


def test_a_bank_is_not_extended_by_features_that_are_not_finite_or_zero():
    f = features(30, 16)
    bank = MemoryBank.build(f, 4)
    for value in (0.0, float("nan")):
        new = f[:4].clone()
        new[2] = value
        refused("features of row 2 hold NaN", bank.extend, new)


def test_features_may_require_a_gradient():
    f = features(100, 8).requires_grad_()
    bank = MemoryBank.build(f, 4)
    assert bank.id == MemoryBank.build(f.detach(), 4).id
    assert not bank.project(f).requires_grad


def test_features_may_have_any_norm():
    f = features()
    scaled = f * torch.linspace(0.1, 9, 700)[:, None]
    bank = MemoryBank.build(f, 24, "float32")
    assert torch.allclose(MemoryBank.build(scaled, 24, "float32")[:], bank[:], atol=1e-5)


@pytest.mark.parametrize("form", ["array", "memmap", "float64"])
def test_features_may_be_a_tensor_an_array_or_a_memmap_of_any_float_type(form):
    f = features()
    want = MemoryBank.build(f, 24, "float32")
    if form == "array":
        f = f.numpy()
    elif form == "memmap":
        np.save("f.npy", f.numpy())
        f = np.load("f.npy", mmap_mode="r")
    else:
        f = f.double().numpy()
    bank = MemoryBank.build(f, 24, "float32")
    assert bank.id == want.id


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2"])
def test_features_of_every_float_type_and_byte_order_make_a_bank(dtype):
    f = features(700, 48).numpy().astype(dtype)
    bank = MemoryBank.build(f, 24)
    want = MemoryBank.build(torch.tensor(f.astype(np.float32)), 24)
    assert bank.id == want.id
    assert torch.equal(bank.project(f[:2]), want.project(f[:2].astype(np.float32)))


def test_features_are_read_in_slices_of_bounded_size():
    f = features(9001, 48)
    sizes = []

    class Sliced:
        shape = (9001, 48)

        def __getitem__(self, rows):
            sizes.append(rows.stop - rows.start)
            return f[rows]

    bank = MemoryBank.build(Sliced(), 24)
    assert bank.id == MemoryBank.build(f, 24).id
    assert max(sizes) <= 4096
    assert sum(sizes) == 2 * 9001 + 4096  # twice, and the first block for the origin


def test_on_an_apple_gpu_the_bank_is_computed_on_the_cpu():
    f = features()
    on_mps = MemoryBank.build(f, 24, device="mps")
    assert on_mps.id == MemoryBank.build(f, 24, device="cpu").id


def test_a_bank_keeps_labels_and_encoder():
    bank = MemoryBank.build(features(), 24, labels=np.arange(700) % 7, encoder="thumbnail")
    assert bank.labels.dtype == np.int64
    assert (bank.labels == np.arange(700) % 7).all()
    assert bank.encoder == "thumbnail"
    assert len(MemoryBank.build(features(), 24).labels) == 0


def test_labels_that_are_not_as_many_as_rows_are_refused():
    refused("labels", MemoryBank.build, features(), 24, labels=range(699))


# ---------------------------------------------------------------------------- file and immutability


def test_a_bank_is_the_same_when_it_is_loaded(bank):
    bank.save("bank.pt")
    again = MemoryBank.load("bank.pt")
    assert again.id == bank.id
    assert len(again) == 700
    assert again.dim == 96
    assert again.rank == 24
    assert again.energy == bank.energy
    assert again.encoder == "thumbnail"
    assert (again.labels == bank.labels).all()
    assert torch.allclose(again[:], bank[:], atol=1e-6)


def test_the_id_of_a_loaded_bank_is_that_of_its_content(bank):
    bank.save("bank.pt")
    again = MemoryBank.load("bank.pt")
    assert again.id == bank.id == memory.content_hash(again)


@pytest.mark.parametrize(
    "change",
    [{"rank": 23}, {"dtype": "float16"}, {"encoder": "other"}, {"labels": range(700)}],
    ids=str,
)
def test_banks_of_other_content_have_other_ids(bank, change):
    options = {"rank": 24, "labels": np.arange(700) % 7, "encoder": "thumbnail", **change}
    assert MemoryBank.build(features(), **options).id != bank.id


def test_torch_load_reads_a_bank_without_this_file(bank):
    bank.save("bank.pt")
    state = load("bank.pt")
    assert torch.equal(state["coef"], torch.tensor(bank.coef))
    assert state["id"] == bank.id


def test_the_arrays_of_a_bank_are_read_only(bank):
    bank.save("bank.pt")
    for one in (bank, MemoryBank.load("bank.pt")):
        for name in ("mean", "basis", "coef", "scale", "labels"):
            refused("read-only", getattr(one, name).__setitem__, 0, 0, error=ValueError)


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "copy", "replace"])
def test_copies_of_a_bank_are_as_read_only_as_the_bank(bank, copied):
    bank.save("bank.pt")
    copies = {
        "pickle": partial(pickle.loads, pickle.dumps(bank)),
        "deepcopy": partial(copy.deepcopy, bank),
        "copy": partial(copy.copy, bank),
        "replace": partial(dataclasses.replace, bank),
    }
    for one in (copies[copied](), pickle.loads(pickle.dumps(MemoryBank.load("bank.pt")))):
        assert one.id == bank.id
        assert torch.equal(one[:9], bank[:9])
        for name in ("mean", "basis", "coef", "scale", "labels"):
            refused("read-only", getattr(one, name).__setitem__, 0, 0, error=ValueError)


def test_a_loaded_bank_is_sent_to_a_process_by_the_name_of_its_file(bank):
    bank.save("bank.pt")
    sent = pickle.dumps(MemoryBank.load("bank.pt"))
    assert len(sent) < 1000  # no rows
    MemoryBank.build(features(), 23).save("bank.pt", overwrite=True)
    refused("bank.pt holds the bank .* now, not", pickle.loads, sent)


def test_the_parts_of_a_bank_cannot_be_replaced(bank):
    bank.save("bank.pt")
    for one in (bank, MemoryBank.load("bank.pt")):
        refused("coef", setattr, one, "coef", one.coef * 2, error=AttributeError)


def test_snippets_that_are_changed_do_not_change_the_bank(bank):
    before = bank[:5].clone()
    bank[:5].zero_()
    bank[4].zero_()
    assert torch.equal(bank[:5], before)


def test_a_bank_is_not_saved_over_another_one(bank):
    bank.save("bank.pt")
    bank.save("bank.pt")  # over itself it is
    other = MemoryBank.build(features(), 23)
    refused("holds another bank", other.save, "bank.pt")
    assert MemoryBank.load("bank.pt").id == bank.id


def test_a_bank_is_saved_over_another_one_with_overwrite(bank):
    bank.save("bank.pt")
    other = MemoryBank.build(features(), 23)
    other.save("bank.pt", overwrite=True)
    assert MemoryBank.load("bank.pt").id == other.id


PEAK = """
import memory

def peak():  # ru_maxrss would begin with that of the process that started this one
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1])

before = peak()
bank = memory.MemoryBank.load("bank.pt")
bank[::100_000]  # few rows: the kernel maps up to 2 MB around each
bank.id
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells the peak")
def test_opening_and_indexing_a_bank_takes_far_less_memory_than_its_file():
    coef = np.lib.format.open_memmap("c.npy", "w+", np.float16, (400_000, 512))  # 410 MB
    bank = MemoryBank(
        mean=np.zeros(512, np.float32),
        basis=np.eye(512, dtype=np.float32),
        coef=coef,
        scale=np.ones(400_000, np.float32),
        labels=np.zeros(400_000, np.int64),
        energy=1.0,
        encoder="",
    )
    bank.save("bank.pt")
    out, _ = run_python("-c", PEAK, path=HERE)
    assert int(out) < 40_000  # KB


# ------------------------------------------------------------------------------------ damaged files


class Crafted:
    """An object whose pickle makes a folder when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.path.abspath("ran"),)


@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_crafted_file_is_refused_and_not_run(form):
    if form == "pickle":
        Path("crafted.pt").write_bytes(pickle.dumps(Crafted()))
    else:
        torch.save({"mean": Crafted()}, "crafted.pt")
    refused("crafted.pt is damaged", MemoryBank.load, "crafted.pt")
    assert not os.path.exists("ran")


def test_a_file_that_is_no_zip_is_refused():
    Path("no.pt").write_bytes(b"PK\x03\x04 nothing")
    refused("no.pt is damaged", MemoryBank.load, "no.pt")


def test_a_file_that_is_cut_off_anywhere_is_refused():
    MemoryBank.build(features(50, 16), 4, labels=range(50)).save("bank.pt")
    whole = Path("bank.pt").read_bytes()
    lengths = np.random.default_rng(0).integers(0, len(whole), 20).tolist()
    for length in [0, 1, 100, *lengths]:
        Path("cut.pt").write_bytes(whole[:length])
        refused("cut.pt is damaged", MemoryBank.load, "cut.pt")


@pytest.mark.parametrize("name", ["mean", "coef", "basis", "scale", "labels", "energy", "id"])
def test_a_file_with_a_wrong_part_is_refused(name):
    MemoryBank.build(features(50, 16), 4, labels=range(50)).save("bank.pt")
    state = load("bank.pt")
    wrong = {
        "mean": state["mean"][:3],
        "coef": state["coef"].long(),
        "basis": state["basis"][0],
        "scale": "4",
        "labels": state["labels"][1:],
        "energy": None,
        "id": 3,
    }
    torch.save({**state, name: wrong[name]}, "wrong.pt")
    refused("wrong.pt is damaged, or no memory bank", MemoryBank.load, "wrong.pt")


def test_a_file_without_a_part_is_refused_and_the_part_is_named():
    MemoryBank.build(features(50, 16), 4).save("bank.pt")
    state = load("bank.pt")
    del state["basis"]
    torch.save(state, "less.pt")
    refused("less.pt is no memory bank: it lacks .basis", MemoryBank.load, "less.pt")


def test_a_file_that_is_not_there_is_a_file_not_found_error():
    refused("gone.pt", MemoryBank.load, "gone.pt", error=FileNotFoundError)


def test_a_file_of_something_else_is_no_bank():
    torch.save({"model": {}}, "c.pt")
    refused("c.pt is no memory bank: it lacks .mean", MemoryBank.load, "c.pt")


# ----------------------------------------------------------------------------------------- indexing


def test_a_bank_has_its_length_dimension_and_rank(bank):
    assert len(bank) == 700
    assert bank.dim == 96
    assert bank.rank == 24


def test_an_index_gives_one_snippet_and_a_list_gives_several(bank):
    assert bank[3].shape == (96,)
    assert bank[3].dtype == torch.float32
    assert torch.equal(bank[3], bank[[3]][0])


def test_a_negative_index_counts_from_the_end(bank):
    assert torch.equal(bank[-1], bank[699])


@pytest.mark.parametrize(
    "index", [[5, 1], np.array([5, 1]), torch.tensor([5, 1]), slice(5, 0, -4)], ids=repr
)
def test_lists_arrays_tensors_and_slices_index_in_their_order(bank, index):
    assert torch.allclose(bank[index], bank[:][[5, 1]], atol=1e-6)


def test_an_empty_slice_gives_no_rows(bank):
    assert bank[0:0].shape == (0, 96)


def test_snippets_have_unit_norm(bank):
    assert torch.allclose(bank[:].norm(dim=1), torch.ones(700), atol=1e-5)


@pytest.mark.parametrize("index", [700, -701, [0, 700]], ids=str)
def test_an_index_out_of_range_is_an_index_error(bank, index):
    refused("700|701", bank.__getitem__, index, error=IndexError)


def test_decode_undoes_project(bank):
    coefficients = bank.project(bank[:9])
    assert coefficients.shape == (9, 24)
    assert torch.allclose(bank.decode(coefficients), bank[:9], atol=1e-4)


def test_project_and_decode_against_their_formulas(bank):
    f = 3 * features(5, 96, seed=1)
    mean = torch.tensor(bank.mean)
    basis = torch.tensor(bank.basis)
    want = (f / f.norm(dim=1, keepdim=True) - mean) @ basis.T
    assert torch.allclose(bank.project(f), want, atol=1e-5)
    snippets = want @ basis + mean
    snippets = snippets / snippets.norm(dim=1, keepdim=True)
    assert torch.allclose(bank.decode(want), snippets, atol=1e-5)


def test_the_text_of_a_bank_says_what_it_is(bank):
    text = str(bank)
    assert "N 700, D 96, rank 24" in text
    assert f"by thumbnail, id {bank.id}" in text


@pytest.mark.parametrize("rank", [24, "full"])
def test_nearest_is_the_largest_cosine(rank):
    bank = MemoryBank.build(features(9000, 48), rank)
    query = 3 * features(5, 48, seed=1)
    want = (F.normalize(query, dim=1) @ bank[:].T).topk(4)
    similarity, index = bank.nearest(query, 4)
    assert torch.allclose(similarity, want.values, atol=1e-5)
    assert torch.equal(index, want.indices)
    assert bank.nearest(query[:0], 4)[1].shape == (0, 4)


def test_every_method_of_a_bank_takes_one_vector_or_several(bank):
    f = features(2, 96, seed=1)
    assert torch.allclose(bank.project(f[0]), bank.project(f)[0], atol=1e-6)
    assert torch.allclose(bank.decode(bank.project(f[0])), bank.decode(bank.project(f))[0])
    for one, several in zip(bank.nearest(f[0], 3), bank.nearest(f, 3)):
        assert torch.allclose(one, several[0], atol=1e-6)
    noise = torch.randn(2, 5)
    assert torch.allclose(bank.around(3, noise[0]), bank.around([3, 4], noise)[0], atol=1e-6)
    assert len(bank.extend(f[0])) == 701


def test_a_bank_moved_to_a_device_gives_the_same_snippets(bank):
    moved = bank.to("cpu")  # goes the way of a GPU
    assert moved.id == bank.id
    for index in (3, -1, [5, 1], slice(5, 0, -4), torch.tensor([5, 1])):
        assert torch.equal(moved[index], bank[index])
    refused("700", moved.__getitem__, 700, error=IndexError)
    noise = torch.randn(2, 5)
    assert torch.equal(moved.around([3, 4], noise), bank.around([3, 4], noise))
    assert torch.equal(moved.nearest(bank[:3], 2)[1], bank.nearest(bank[:3], 2)[1])


@pytest.mark.parametrize("state", ["inference", "autocast", "float64"])
def test_a_bank_does_not_depend_on_the_ambient_state_of_torch(bank, state):
    bank.save("bank.pt")
    f = features(3, 96, seed=1)
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    want = [bank[:3], bank.project(f), bank.nearest(f, 2)[0], bank.around([1, 2, 3], noise)]
    states = {
        "inference": torch.inference_mode,
        "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
        "float64": partial(default_dtype, torch.float64),
    }
    fresh = MemoryBank.load("bank.pt")
    given = features()
    with states[state]():
        built = MemoryBank.build(given, 24, labels=np.arange(700) % 7, encoder="thumbnail")
        got = [fresh[:3], fresh.project(f), fresh.nearest(f, 2)[0], fresh.around([1, 2, 3], noise)]
    for a, b in zip(got, want):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    assert built.id == bank.id
    layer = nn.Linear(96, 1)
    layer(fresh[:3]).sum().backward()  # snippets of an inference mode could not be kept for this
    assert torch.allclose(layer.weight.grad[0], fresh[:3].sum(0))


# ------------------------------------------------------------------------------------- new snippets


def bank_of(coef, labels=()):
    """A bank whose coefficients are these numbers (N, r), in the directions of the axes, far from
    its mean, so that the nearest by angle are the nearest by distance."""
    N, r = coef.shape
    mean = np.zeros(r + 1, np.float32)
    mean[r] = 1000
    return MemoryBank(
        mean=mean,
        basis=np.eye(r, r + 1, dtype=np.float32),
        coef=np.array(coef, np.float32),
        scale=np.ones(N, np.float32),
        labels=np.array(labels, np.int64),
        energy=1.0,
        encoder="axes",
    )


def neighbours_of(bank, row, k, labels=None):
    """The k other rows of most cosine to a row, of its label, by comparing all."""
    others = []
    for i in range(len(bank)):
        if i != row and (labels is None or labels[i] == labels[row]):
            others.append(i)
    return torch.tensor(others)[(bank[others] @ bank[row]).topk(k).indices]


def test_a_new_snippet_is_a_row_plus_its_neighbours_deviations_times_noise(bank):
    coef = torch.tensor(bank.coef * bank.scale[:, None])
    rows = [0, 13, 699]
    noise = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    got = bank.around(rows, noise, spread=1.5)
    for i, row in enumerate(rows):
        c = coef[neighbours_of(bank, row, 6, bank.labels)]
        new = coef[row]
        for j in range(6):
            new = new + 1.5 / math.sqrt(6) * noise[i, j] * (c[j] - c.mean(0))
        s = torch.tensor(bank.mean) + new @ torch.tensor(bank.basis)
        assert torch.allclose(got[i], s / s.norm(), atol=1e-6)


def test_new_snippets_have_the_mean_of_the_row_and_the_covariance_of_its_neighbours():
    rng = np.random.default_rng(0)
    coef = rng.normal(size=(200, 3)) * [3, 1, 0.3]
    bank = bank_of(coef)
    s = bank.around([5] * 20_000, torch.randn(20_000, 10))
    new = (s[:, :3] / s[:, 3:] * 1000).numpy()  # back to coefficients
    neighbours = coef[neighbours_of(bank, 5, 10)]
    deviations = neighbours - neighbours.mean(0)
    assert np.allclose(new.mean(0), coef[5], atol=0.05)
    assert np.allclose(np.cov(new.T), deviations.T @ deviations / 10, atol=0.05)


def test_without_spread_or_neighbours_a_new_snippet_is_its_row(bank):
    assert torch.allclose(bank.around([3, 4], torch.randn(2, 5), spread=0), bank[[3, 4]])
    labels = [0, 1, 1, 2, 2, 2]
    few = bank_of(np.random.default_rng(0).normal(size=(6, 3)), labels)
    s = few.around(range(6), torch.ones(6, 4) * torch.tensor([1.0, -1, 2, 0]))
    same = torch.isclose(s, few[:], atol=1e-7).all(1)
    assert same.tolist() == [True, True, True, False, False, False]  # two others: one direction


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_duplicates_of_a_row_are_one_neighbour_and_no_row_is_its_own(dtype):
    distinct = features(40, 16)
    once = MemoryBank.build(distinct, 8, dtype)
    coef = np.concatenate([once.coef] * 3)
    thrice = MemoryBank(
        once.mean, once.basis, coef, np.tile(once.scale, 3), once.labels, once.energy, "thrice"
    )
    cosine_once, index = once.neighbours(range(40), 5)
    cosine_thrice, others = thrice.neighbours(range(40, 80), 5)
    assert (index != torch.arange(40)[:, None]).all()
    assert torch.equal(others, index)  # the first of each three
    assert torch.allclose(cosine_thrice, cosine_once, atol=1e-6)


def test_neighbours_of_all_classes_are_padded_when_there_are_too_few(bank):
    _, index = bank.neighbours([7, 8], 3, same_class=False)
    assert index[0].tolist() == neighbours_of(bank, 7, 3).tolist()
    few = bank_of(np.random.default_rng(0).normal(size=(3, 3)))
    cosine, index = few.neighbours([0], 4)
    assert (index[0, :2] >= 0).all()
    assert index[0, 2:].tolist() == [-1, -1]
    assert cosine[0, 2:].tolist() == [-1, -1]


def test_a_row_of_the_same_coefficients_in_another_class_is_no_neighbour():
    coef = np.random.default_rng(0).normal(size=(6, 3))
    once = bank_of(coef)
    twice = bank_of(np.concatenate([coef, coef]), [0] * 6 + [1] * 6)
    cosine, index = once.neighbours(range(6), 3)
    got, rows = twice.neighbours(range(6, 12), 3, same_class=False)
    assert torch.equal(rows, index)
    assert torch.allclose(got, cosine, atol=1e-6)
    assert torch.equal(twice.neighbours(range(6, 12), 3)[1], index + 6)  # of its own class


def test_a_row_without_a_label_has_neighbours_of_all_classes():
    coef = np.random.default_rng(0).normal(size=(9, 3))
    bank = bank_of(coef, [0, 0, 0, 0, 1, 1, 1, 1, -1])
    _, index = bank.neighbours([8], 4)
    assert index[0].tolist() == neighbours_of(bank, 8, 4).tolist()
    _, index = bank.neighbours([0], 4)
    assert sorted(index[0].tolist()) == [-1, 1, 2, 3]  # the row without a label is not of its class


# ---------------------------------------------------------------------------------------- extension

# rank and dtype of a bank -> the largest error of a row that is added
EXTENSIONS = [
    (64, "float32", 1e-5),
    (64, "float16", 2e-3),
    (64, "int8", 0.02),
    ("full", "float16", 2e-3),
]


def rows_in_64_columns():
    """(400, 96) of which the last 32 columns are zero."""
    return features(400, 96) * (torch.arange(96) < 64)


def new_rows():
    """(30, 96), in all columns."""
    return features(30, 96, seed=1)


@pytest.fixture(params=EXTENSIONS, ids=str)
def extension(request):
    """A bank, the snippets that it had, the extended bank, the largest error."""
    rank, dtype, worst = request.param
    bank = MemoryBank.build(
        rows_in_64_columns(), rank, dtype, encoder="e", labels=np.arange(400) % 5
    )
    before = bank[:]
    more = bank.extend(new_rows(), labels=[7] * 30)
    return argparse.Namespace(bank=bank, before=before, more=more, worst=worst)


def test_extending_leaves_the_bank_itself_as_it_was(extension):
    again = MemoryBank.build(
        rows_in_64_columns(),
        extension.bank.rank,
        extension.bank.coef.dtype.name,
        encoder="e",
        labels=np.arange(400) % 5,
    )
    assert extension.bank.id == again.id
    assert torch.equal(extension.bank[:], extension.before)
    assert extension.more.id != extension.bank.id


def test_extension_keeps_old_rows(extension):
    bank = extension.bank
    more = extension.more
    assert torch.allclose(more[:400], extension.before, atol=1e-6)
    assert (more.coef[:400, : bank.rank] == bank.coef).all()
    assert (more.scale[:400] == bank.scale).all()


def test_extension_adds_the_new_rows(extension):
    assert len(extension.more) == 430
    error = distances(extension.more[400:], F.normalize(new_rows(), dim=1))
    assert error.max() < extension.worst


def test_extension_keeps_encoder_labels_and_dtype(extension):
    bank = extension.bank
    more = extension.more
    assert more.encoder == "e"
    assert more.coef.dtype == bank.coef.dtype
    assert (more.labels[:400] == bank.labels).all()
    assert (more.labels[400:] == 7).all()


def test_the_basis_of_an_extended_bank_is_orthonormal(extension):
    basis = extension.more.basis
    assert np.allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-5)


def test_the_basis_is_orthonormal_where_new_rows_are_almost_within_it():
    old = rows_in_64_columns()
    bank = MemoryBank.build(old, 64)
    more = bank.extend(old[:5] + 5e-4 * new_rows()[:5])
    assert more.rank > 64
    assert np.allclose(more.basis @ more.basis.T, np.eye(more.rank), atol=1e-5)


def test_an_extended_full_bank_has_no_new_directions():
    bank = MemoryBank.build(rows_in_64_columns(), "full")
    assert bank.extend(new_rows()).rank == 96


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_30_rows_bring_30_new_directions_or_as_many_as_the_limit(dtype):
    bank = MemoryBank.build(rows_in_64_columns(), 64, dtype)
    assert bank.extend(new_rows()).rank == 94
    assert bank.extend(new_rows(), limit=5).rank == 69
    assert bank.extend(new_rows(), limit=0).rank == 64


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_within_the_basis_bring_no_new_direction(dtype):
    bank = MemoryBank.build(rows_in_64_columns(), 64, dtype)
    assert bank.extend(rows_in_64_columns()[:9]).rank == 64


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_mixes_of_rows_bring_no_new_direction(dtype):
    bank = MemoryBank.build(rows_in_64_columns(), 32, dtype)
    mixes = [mix(bank[i], bank[i + 1], 0.3, how) for i, how in ((3, "slerp"), (8, "lerp"))]
    more = bank.extend(torch.stack([*mixes, bank[5]]))
    assert more.rank == 32
    assert distances(more[400:], torch.stack([*mixes, bank[5]])).max() < 0.02


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_more_new_directions_keep_more_of_the_new_rows(dtype):
    bank = MemoryBank.build(rows_in_64_columns(), 64, dtype)
    errors = []
    for limit in (0, 5, 29):
        added = bank.extend(new_rows(), limit=limit)[400:]
        errors.append((added - new_rows()).square().sum())
    assert errors[0] > errors[1] > errors[2]


def test_added_rows_far_from_the_bank_are_accurate_in_int8():
    old = rows_in_64_columns()
    bank = MemoryBank.build(0.01 * old + old[:1], 64, "int8")  # all in one place
    wide = bank.extend(-old[:3])  # the opposite one
    want = -F.normalize(old[:3], dim=1)
    assert wide.coef.dtype == np.int8
    half_a_step = torch.tensor(wide.scale[400:]) / 2  # in each direction, at most
    assert (distances(wide[400:], want) < half_a_step * wide.rank**0.5).all()
    assert distances(wide[400:], want).max() < 0.025
    assert torch.allclose(wide[:400], bank[:], atol=1e-6)


@pytest.mark.parametrize(
    "labels, new_labels, expected",
    [
        (np.arange(400), None, [*range(400), *[-1] * 30]),
        (None, range(30), [*[-1] * 400, *range(30)]),
        (None, None, []),
    ],
    ids=["labels before", "labels added", "no labels"],
)
def test_in_an_extended_bank_rows_without_labels_have_the_label_minus_1(
    labels, new_labels, expected
):
    bank = MemoryBank.build(rows_in_64_columns(), 64, labels=labels)
    more = bank.extend(new_rows(), labels=new_labels)
    assert more.labels.tolist() == expected


def test_an_extended_bank_is_saved_and_loaded():
    more = MemoryBank.build(rows_in_64_columns(), 64).extend(new_rows())
    more.save("more.pt")
    assert torch.equal(MemoryBank.load("more.pt")[:], more[:])


# ------------------------------------------------------------------------------------------- images


def test_images_become_upright():
    wide = Image.new("RGB", (6, 4), (0, 0, 255))
    exif = wide.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    wide.save("wide.png", exif=exif)
    with Image.open("wide.png") as image:
        assert to_rgb(image).size == (4, 6)


def test_the_crop_is_the_centre():
    rows = np.arange(90, dtype=np.uint8).repeat(30).reshape(90, 30)  # row i is i
    crop = center_crop(Image.fromarray(rows).convert("RGB"), 10)
    assert crop.size == (10, 10)
    assert abs(np.asarray(crop).mean() - 44.5) < 1


# name of a file: (whether it has labels, whether it is mapped into memory)
ARRAYS = {"stored.npz": (True, False), "compressed.npz": (True, False), "plain.npy": (False, True)}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_images_and_labels_and_an_npy_is_mapped(name):
    has_labels, is_mapped = ARRAYS[name]
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    y = np.array([0, 1, 2, 1, 0])
    np.savez("stored.npz", arr_0=x, arr_1=y)
    np.savez_compressed("compressed.npz", images=x, labels=y)
    np.save("plain.npy", x)
    images = Images(name, 8)
    for i in range(5):
        assert (images[i] == x[i]).all()
    assert (images.labels == (y if has_labels else -1)).all()
    assert images.classes == (["0", "1", "2"] if has_labels else [])
    assert isinstance(images.array, np.memmap) == is_mapped


def test_a_flat_folder_has_no_labels():
    os.mkdir("flat")
    for i in range(3):
        red().save(f"flat/{i}.png")
    images = Images("flat", 4)
    assert (images.labels == [-1, -1, -1]).all()
    assert images.classes == []


def test_images_beside_class_folders_are_refused():
    folder_of_images("images", 4)
    red().save("images/beside.png")
    refused("images beside class folders", Images, "images", 4)


@pytest.mark.parametrize("name", ["images", "images/"])
def test_hidden_folders_are_passed_over(name):
    folder_of_images("images", 4)
    os.mkdir("images/.hidden")
    red().save("images/.hidden/no.png")
    images = Images(name, 4)
    assert len(images) == 4
    assert images.classes == ["class0", "class1"]


def test_a_batch_of_images_is_in_the_order_of_its_rows():
    folder_of_images("images", 8)
    images = Images("images", 16, flip=True)
    rows = [3, 12, 0, 15]
    batch = images.batch(rows)
    assert batch.shape == (4, 16, 16, 3)
    assert batch.dtype == torch.uint8
    for row, image in zip(rows, batch, strict=True):
        assert (image.numpy() == images[row]).all()


def test_images_without_a_defined_brightness_are_refused_by_name():
    os.mkdir("images")
    red().save("images/a.png")
    Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save("images/float.tiff")
    refused("do not decode: float.tiff; .*black and white are not defined", Images, "images", 4)


def test_a_link_to_the_folder_itself_adds_no_images_and_what_is_left_out_is_said(capsys):
    folder_of_images("images", 6)
    os.symlink("..", "images/class0/up", target_is_directory=True)
    Path("images/class1/photo.heic").write_bytes(b"")
    assert len(Images("images", 8)) == 6
    assert "images: files left out for their ending: 1 .heic" in capsys.readouterr().out


def test_files_are_in_the_order_of_image_folder():
    for name in ("a/2.png", "a/1.png", "a-b/0.png"):
        os.makedirs(f"images/{os.path.dirname(name)}", exist_ok=True)
        red().save(f"images/{name}")
    images = Images("images", 4)
    names = [os.path.relpath(file, "images") for file in images.files]
    assert names == ["a/1.png", "a/2.png", "a-b/0.png"]  # class by class, not path by path
    assert images.labels.tolist() == [0, 0, 1]


def test_folders_train_and_val_taken_for_classes_are_reported(capsys):
    for name in ("train", "val"):
        os.makedirs(f"images/{name}")
        red().save(f"images/{name}/0.png")
    Images("images", 4)
    assert "images: the classes are train, val; for one of these sets give its" in (
        capsys.readouterr().out
    )


def test_a_folder_called_glyphs_is_not_taken_for_the_data_set_and_that_is_said(capsys):
    os.mkdir("glyphs")
    red().save("glyphs/0.png")
    assert len(Images("./glyphs", 4)) == 1
    assert len(Images("glyphs:ab", 16)) == 10400
    assert capsys.readouterr().out == ""
    assert len(Images("glyphs", 16)) == 10400
    assert "glyphs is the embedded data set here; ./glyphs" in capsys.readouterr().out


def test_an_image_beyond_the_limit_of_pillow_is_refused_with_the_way_to_allow_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (40, 40)).save("large.png")
    refused("large.png .*1600 pixels.*--max-pixels N", Images, "large.png", 8)
    prepare("large.png", "data", image_size=8, max_pixels=800)
    assert np.load("data/latents.npy").shape == (1, 3, 8, 8)


def test_skip_bad_leaves_out_files_that_do_not_decode(capsys):
    folder_of_images("images", 6)
    Path("images/class0/x.png").write_bytes(b"no")
    message = "1 of 7 files in images do not decode: class0/x.png; .*cannot identify image file"
    refused(message, Images, "images", 8)
    assert len(Images("images", 8, skip_bad=True)) == 6
    assert "class0/x.png" in capsys.readouterr().out  # it is said


def test_a_preparation_with_skip_bad_leaves_out_files_that_do_not_decode():
    folder_of_images("images", 6)
    Path("images/class0/x.png").write_bytes(b"no")
    prepare("images", "data", image_size=16, skip_bad=True)
    assert memory.read_json("data/meta.json")["images"] == 6
    assert "N 6," in str(MemoryBank.load("data/bank.pt"))


# ------------------------------------------------------------------------------------------- glyphs


def test_glyphs_are_labelled_images():
    images, labels = glyphs(n=260, size=16)
    assert images.shape == (260, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.shape == (260,)


def test_glyphs_depend_on_their_seed_alone():
    first, _ = glyphs(n=260, size=16, seed=0)
    again, _ = glyphs(n=260, size=16, seed=0)
    other, _ = glyphs(n=260, size=16, seed=1)
    assert (first == again).all()
    assert not (first == other).all()


def test_every_character_of_the_glyphs_is_equally_frequent():
    _, labels = glyphs(n=260, size=16)
    assert (np.bincount(labels) == 10).all()


def test_no_two_glyphs_are_the_same():
    images, _ = glyphs(n=260, size=16)
    assert len(np.unique(images.reshape(260, -1), axis=0)) == 260


def test_every_glyph_shows_something():
    digits, _ = glyphs(n=10, size=16, characters="0123456789")
    assert digits.std(axis=(1, 2)).max(axis=1).min() > 10


def test_some_backgrounds_of_glyphs_are_flat_and_some_are_gradients():
    images, _ = glyphs(n=260, size=16)
    difference = images[:, 0, 0].astype(int) - images[:, -1, -1]  # of opposite corners
    flat = np.abs(difference).max(axis=1) < 2
    assert 0.3 < flat.mean() < 0.8


# ------------------------------------------------------------------------------------------ latents


CHANNEL_STATS = {"mean": [1.0, -2.0, 0.5], "std": [2.0, 0.5, 4.0]}


def stats_of(tokenizer):
    """The mean and standard deviation of latents that are known for a tokenizer."""
    mean, std = memory.known_stats({"tokenizer": tokenizer, "latent_stats": None})
    return stats_tensor({"mean": mean, "std": std}, "cpu")


def test_normalised_latents_are_less_the_mean_over_std_per_channel():
    stats = stats_tensor(CHANNEL_STATS, "cpu")
    z = torch.randn(5, 3, 4, 6)
    x = normalize_latents(z, stats)
    assert torch.allclose(x[:, 0], (z[:, 0] - 1.0) / 2.0)
    assert torch.allclose(x[:, 1], (z[:, 1] + 2.0) / 0.5)
    assert torch.allclose(x[:, 2], (z[:, 2] - 0.5) / 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_denormalising_undoes_normalising(dtype):
    stats = stats_tensor(CHANNEL_STATS, "cpu")
    z = (50 * torch.rand(5, 3, 4, 6)).to(dtype)
    x = normalize_latents(z, stats)
    assert x.dtype == torch.float32
    assert torch.allclose(denormalize_latents(x, stats), z.float(), atol=1e-5)


def test_normalising_undoes_denormalising():
    stats = stats_tensor(CHANNEL_STATS, "cpu")
    x = torch.randn(5, 3, 4, 6)
    assert torch.allclose(normalize_latents(denormalize_latents(x, stats), stats), x, atol=1e-5)


def test_pixels_are_normalised_to_minus_1_to_1():
    stats = stats_of("pixel")
    z = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    x = normalize_latents(z, stats)
    assert torch.equal(x[0], torch.full((3, 1, 1), -1.0))
    assert torch.equal(x[1], torch.full((3, 1, 1), 1.0))


def test_latents_of_sd_vae_are_multiplied_by_its_published_factor():
    stats = stats_of("sd-vae-ft-ema")
    z = torch.randn(2, 4, 3, 3)
    assert torch.allclose(normalize_latents(z, stats), 0.18215 * z)


# ------------------------------------------------------------------------------- preparing a folder

PREPARED_FILES = ["bank.pt", "files.txt", "labels.npy", "latents.npy", "meta.json"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """40 images of two classes, prepared with their mirror images, with two kinds of features."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        images, labels = folder_of_images("images")
        np.save("f.npy", features(80))
        meta = prepare("images", "data", image_size=24, flip=True)
        prepare("images", "own", image_size=24, flip=True, features="f.npy")
    order = np.argsort(labels % 2, kind="stable")  # the files of class0 come first
    return argparse.Namespace(
        folder=folder,
        images=images[order].transpose(0, 3, 1, 2),
        labels=labels[order] % 2,
        meta=meta,
        latents=np.load(folder / "data/latents.npy"),
    )


def test_latents_of_pixels_are_the_images_in_the_order_of_their_files(prepared):
    assert (prepared.latents[:40] == prepared.images).all()


def test_mirrored_images_come_after_the_others(prepared):
    assert len(prepared.latents) == 80
    assert (prepared.latents[40:] == prepared.latents[:40, :, :, ::-1]).all()


def test_class_folders_become_labels(prepared):
    labels = np.load(prepared.folder / "data/labels.npy")
    assert prepared.meta["classes"] == ["class0", "class1"]
    assert (labels == np.tile(prepared.labels, 2)).all()


def test_every_entry_has_its_own_snippet_and_label_in_the_bank(prepared):
    bank = MemoryBank.load(prepared.folder / "data/bank.pt")
    f = thumbnail(torch.from_numpy(prepared.latents).float() / 127.5 - 1)
    assert (cosine(bank[:], f) > 0.99).all()
    assert (bank.labels == np.tile(prepared.labels, 2)).all()


def test_meta_json_says_what_was_made(prepared):
    meta = memory.read_json(prepared.folder / "data/meta.json")
    assert meta == prepared.meta
    assert meta["bank"] == MemoryBank.load(prepared.folder / "data/bank.pt").id
    assert meta["images"] == 40
    assert meta["latent"] == [3, 24, 24]
    assert meta["class_counts"] == [2 * (prepared.labels == label).sum() for label in (0, 1)]


def test_a_prepared_folder_holds_five_files(prepared):
    assert sorted(os.listdir(prepared.folder / "data")) == PREPARED_FILES


def test_features_encoded_elsewhere_become_the_bank(prepared):
    bank = MemoryBank.load(prepared.folder / "own/bank.pt")
    assert (cosine(bank[:], features(80)) > 0.99).all()
    assert bank.encoder == "f.npy"


def test_features_encoded_elsewhere_change_nothing_else(prepared):
    assert (np.load(prepared.folder / "own/latents.npy") == prepared.latents).all()
    labels = np.load(prepared.folder / "own/labels.npy")
    assert (labels == np.tile(prepared.labels, 2)).all()
    assert sorted(os.listdir(prepared.folder / "own")) == PREPARED_FILES


def test_features_may_be_a_tensor_that_torch_saved():  # as the official banks are
    f = features(70, 80)
    torch.save(f, "f.pt")
    run("memory.py --features f.pt --rank 60 --out bank.pt")
    assert MemoryBank.load("bank.pt").id == MemoryBank.build(f, 60).id


def test_features_of_another_number_of_images_are_refused(prepared):
    images = str(prepared.folder / "images")
    file = str(prepared.folder / "f.npy")
    refused("80 rows for 40 entries", prepare, images, "no", image_size=24, features=file)
    assert not os.path.exists("no")


def test_a_folder_prepared_with_other_settings_is_refused(prepared):
    images = str(prepared.folder / "images")
    data = str(prepared.folder / "data")
    refused("image_size 24, not 16", prepare, images, data, image_size=16, flip=True)


def test_a_prepared_folder_is_taken_again_when_its_source_is_gone():
    folder_of_images("images", 6)
    meta = prepare("images", "data", image_size=16)
    before = modification_times()
    shutil.rmtree("images")
    assert prepare("images", "data", image_size=16) == meta
    for path, modified in modification_times().items():
        assert path == Path("images") or modified == before[path]  # nothing was written


def test_a_prepared_folder_is_refused_with_other_settings_when_its_source_is_gone():
    folder_of_images("images", 6)
    prepare("images", "data", image_size=16)
    shutil.rmtree("images")
    refused("image_size 16, not 24", prepare, "images", "data", image_size=24)
    refused("rank 64, not 8", prepare, "images", "data", image_size=16, rank=8)
    refused("source images, not other", prepare, "other", "data", image_size=16)


def test_files_txt_names_the_images_in_the_order_of_their_rows(prepared):
    names = Path(prepared.folder, "data/files.txt").read_text().splitlines()
    assert len(names) == 40
    for name, latent in zip(names, prepared.latents):
        image = np.asarray(Image.open(prepared.folder / "images" / name).convert("RGB"))
        assert (image.transpose(2, 0, 1) == latent).all()


def change_content(change):
    """Changes what a folder was prepared of."""
    if change == "an image more":
        red().save("images/class0/new.png")
    elif change == "an image less":
        os.remove("images/class0/000.png")
    elif change == "an image edited":
        red().save("images/class0/000.png")
    else:
        np.save("f.npy", features(6, 9))


CHANGES = {  # -> what the second preparation says of it
    "an image more": "source 6 files .*, not 7 files",
    "an image less": "source 6 files .*, not 5 files",
    "an image edited": "source 6 files .*, not 6 files",
    "other features": "features f.npy .*, not f.npy",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_prepared_folder_of_changed_content_is_refused_and_the_change_is_said(change):
    folder_of_images("images", 6)
    np.save("f.npy", features(6, 8))
    prepare("images", "data", image_size=16, features="f.npy", rank=4)
    change_content(change)
    again = partial(prepare, "images", "data", image_size=16, features="f.npy", rank=4)
    refused(f"data was prepared with {CHANGES[change]}", again)


def test_a_prepared_folder_of_moved_content_is_taken_again_from_anywhere(monkeypatch):
    folder_of_images("a/images", 6)
    np.save("a/f.npy", features(6, 8))
    meta = prepare("a/images", "a/data", image_size=16, features="a/f.npy", rank=4)
    os.rename("a", "b")
    monkeypatch.chdir("b")
    assert prepare("images", "data", image_size=16, features="f.npy", rank=4) == meta


def test_folders_may_have_the_names_of_tokenizer_and_encoder():
    folder_of_images("images", 6)
    os.mkdir("pixel")
    os.mkdir("thumbnail")
    meta = prepare("images", "data", image_size=16)
    assert meta["settings"]["tokenizer"] == "pixel"
    assert MemoryBank.load("data/bank.pt").encoder == "thumbnail"
    assert prepare("images", "data", image_size=16) == meta


def test_a_folder_may_hold_the_data_prepared_from_it():
    folder_of_images("images", 6)
    meta = prepare("images", "images/out", image_size=16)
    red().save("images/out/preview.png")
    assert prepare("images", "images/out", image_size=16) == meta


def test_a_preparation_that_ends_just_before_meta_json_resumes(monkeypatch, capsys):
    folder_of_images("images")
    write_json = memory.write_json

    def interrupted(path, value):
        if path.endswith("meta.json"):
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(memory, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("images", "data", image_size=24)
    monkeypatch.setattr(memory, "write_json", write_json)
    resumed = prepare("images", "data", image_size=24)
    assert "1 of 1 blocks of 256 are done already" in capsys.readouterr().out
    assert resumed == prepare("images", "whole", image_size=24)
    assert Path("data/latents.npy").read_bytes() == Path("whole/latents.npy").read_bytes()
    assert sorted(os.listdir("data")) == PREPARED_FILES


def test_leftovers_of_a_killed_preparation_are_removed():
    folder_of_images("images")
    prepare("images", "data", image_size=24)
    os.mkdir("data/parts")
    prepare("images", "data", image_size=24)
    assert not os.path.exists("data/parts")


def test_the_disk_space_needed_is_printed_before_the_first_image(capsys):
    folder_of_images("images", 6)
    prepare("images", "data", image_size=16)
    said = "data takes 0.000 GB of disk (latents.npy 0.000, features.npy 0.000)"
    assert said in capsys.readouterr().out


def test_an_image_that_breaks_when_a_thread_decodes_it_ends_as_one_line(monkeypatch):
    folder_of_images("images", 6)
    Path("images/class1/x.png").write_bytes(b"no")
    monkeypatch.setattr(memory, "fault_of", lambda file: "")
    line = run("memory.py --data images --image-size 16 --out data", fails=True)
    assert "images/class1/x.png cannot be read as an image" in line
    assert not os.path.exists("data/meta.json")


def kill_in_the_middle(command, done):
    """Starts a command and kills it once a block is done, of those that the file `done` counts."""

    def a_block_is_done():
        header = 128  # of an .npy
        return os.path.exists(done) and os.path.getsize(done) > header and np.load(done).any()

    process = start(command)
    wait_for(a_block_is_done, process)
    process.kill()
    process.communicate()


def test_a_preparation_goes_on_after_a_kill():
    folder_of_images("images", 1000, 40)
    command = "memory.py --image-size 32 --data images"
    kill_in_the_middle(f"{command} --out killed", "killed/parts/done.npy")
    assert not os.path.exists("killed/meta.json")
    assert "are done already" in run(f"{command} --out killed")
    run(f"{command} --out whole")
    for file in ("latents.npy", "labels.npy", "bank.pt", "meta.json"):
        assert Path("killed", file).read_bytes() == Path("whole", file).read_bytes()
    assert not os.path.exists("killed/parts")


# -------------------------------------------------------------------------- blocks of a preparation


def blocks_of_4(settings):
    """Blocks of 4 of 10 rows, in the folder b."""
    return Blocks("b", settings, {"x.npy": ((10, 2), "int64")}, 4)


def test_blocks_cover_all_rows():
    assert blocks_of_4({"a": 1}).todo == [range(4), range(4, 8), range(8, 10)]


def test_blocks_resume_after_a_killed_run():
    blocks_of_4({"a": 1}).write(range(4, 8), x=np.full((4, 2), 7))
    again = blocks_of_4({"a": 1})
    assert again.todo == [range(4), range(8, 10)]
    assert (again.arrays["x.npy"][4:8] == 7).all()


def test_finished_blocks_are_reported(capsys):
    blocks_of_4({"a": 1}).write(range(4, 8), x=np.full((4, 2), 7))
    assert capsys.readouterr().out == ""
    blocks_of_4({"a": 1})
    assert "1 of 3 blocks of 4 are done already" in capsys.readouterr().out


def test_missing_blocks_are_an_error():
    blocks = blocks_of_4({"a": 1})
    blocks.write(range(4, 8), x=np.full((4, 2), 7))
    refused("2 of 3 blocks", blocks.finish, error=RuntimeError)


def test_blocks_of_other_settings_are_refused_and_kept():
    blocks_of_4({"a": 1}).write(range(4, 8), x=np.full((4, 2), 7))
    refused("b is the unfinished work of a command with a 1, not 2", blocks_of_4, {"a": 2})
    assert len(blocks_of_4({"a": 1}).todo) == 2


def test_blocks_are_closed_before_they_are_removed(monkeypatch):
    blocks = blocks_of_4({"a": 1})
    open_files = []

    def rmtree(path):
        open_files.extend(os.readlink(file) for file in Path("/proc/self/map_files").iterdir())

    if not os.path.exists("/proc/self/map_files"):
        pytest.skip("Linux tells which files are mapped")
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    blocks.remove()
    assert not [name for name in open_files if name.startswith(os.getcwd())]


def test_missing_disk_space_is_an_error_before_anything_is_written(monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(r"b needs 0.000 GB of disk \(x.npy 0.000\); free are 0.000", blocks_of_4, {})
    assert os.listdir() == []


# --------------------------------------------------------------------------- autoencoder and DINOv2


def kept_patches(encoded, folder):
    """The patch tokens that were kept, (60 * 256, 64) unit-norm"""
    folder = encoded.folder / str(folder)
    coef = torch.from_numpy(np.load(folder / "patches.npy"))
    scale = torch.from_numpy(np.load(folder / "patch_scales.npy"))
    return MemoryBank.load(folder / "patches.pt").unpack(coef, scale).flatten(0, 1)


def test_latents_are_float16_and_of_the_autoencoders_size(encoded):
    latents = np.load(encoded.folder / "0/latents.npy")
    assert latents.shape == (60, 4, 16, 16)
    assert latents.dtype == np.float16
    assert encoded.meta["latent"] == [4, 16, 16]


def test_latents_are_the_means_of_the_autoencoder(encoded):
    latents = np.load(encoded.folder / "0/latents.npy")
    assert np.allclose(latents, encoded.latents, rtol=2e-3, atol=2e-3)


def test_two_processes_make_the_latents_labels_and_snippets_that_one_makes(encoded):
    one = np.load(encoded.folder / "0/latents.npy").astype(float)
    two = np.load(encoded.folder / "2/latents.npy").astype(float)
    assert np.abs(one - two).max() < 1e-3
    snippets = MemoryBank.load(encoded.folder / "0/bank.pt")[:]
    assert (cosine(snippets, MemoryBank.load(encoded.folder / "2/bank.pt")[:]) > 0.999).all()
    assert (cosine(kept_patches(encoded, 0), kept_patches(encoded, 2)) > 0.999).all()
    labels = Path(encoded.folder, "0/labels.npy").read_bytes()
    assert labels == Path(encoded.folder, "2/labels.npy").read_bytes()


def test_mean_and_std_of_latents_are_measured_per_channel(encoded):
    latents = np.load(encoded.folder / "0/latents.npy").astype(float)
    assert np.allclose(encoded.meta["mean"], latents.mean((0, 2, 3)), atol=1e-3)
    assert np.allclose(encoded.meta["std"], latents.std((0, 2, 3)), atol=1e-3)


def test_snippets_are_the_class_tokens_of_dinov2_also_of_mirrored_images(encoded):
    bank = MemoryBank.load(encoded.folder / "0/bank.pt")
    assert len(bank) == 60
    assert (cosine(bank[:], encoded.class_tokens) > 0.99).all()


def test_patch_tokens_are_kept_in_int8_as_well_as_in_a_bank_of_all_of_them_at_once(encoded):
    coef = np.load(encoded.folder / "0/patches.npy", mmap_mode="r")
    assert coef.shape == (60, 256, 64)  # rank 64, though that of the bank is 16
    assert coef.dtype == np.int8
    best = MemoryBank.build(encoded.patch_tokens, 64)
    kept = cosine(kept_patches(encoded, 0), encoded.patch_tokens).mean().item()
    want = cosine(best[:], encoded.patch_tokens).mean().item()
    assert kept == pytest.approx(want, abs=1e-3)
    assert kept > 0.99


def test_each_image_goes_through_the_encoder_once_and_a_sample_once_more(encoded, monkeypatch):
    folder = encoded.folder
    counts = []

    def noted(model, images):
        counts.append(len(images))
        return dinov2_features(model, images)

    monkeypatch.setattr(model_file, "dinov2_features", noted)
    prepare(
        str(folder / "images"),
        "data",
        image_size=32,
        encoder=str(folder / "dino.pth"),
        patches=True,
    )
    assert sum(counts) == 1 + IMAGES + IMAGES  # the first tells the shapes; all 30 are the sample


# --------------------------------------------------------------------- files that are written whole

TORCH_WRITER = "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"


@pytest.mark.parametrize("error", [TORCH_WRITER, "CUDA error: an illegal memory access"])
def test_a_failed_write_keeps_the_old_file_and_the_reason(error):
    Path("file").write_text("before")

    def write():
        with memory.atomic_write("file") as temporary:
            Path(temporary).write_text("half of what")
            raise RuntimeError(error)

    if error == TORCH_WRITER:
        refused("file cannot be written.*disk full.*what was there is kept", write, error=OSError)
    else:
        refused("^CUDA error", write, error=RuntimeError)
    assert Path("file").read_text() == "before"
    assert os.listdir() == ["file"]


def test_an_error_of_the_gpu_while_saving_is_not_taken_for_a_full_disk():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"), memory.atomic_write("x"):
        raise error
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------ devices


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): n GPUs are visible; tensors on them are made elsewhere."""

    def show(count):
        def empty(size, device):
            return argparse.Namespace(device=torch.device(device))

        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch, "empty", empty)

    return show


def test_the_only_gpu_that_a_process_sees_is_its_own(gpus, monkeypatch, capsys):
    gpus(1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert memory.best_device("cuda") == torch.device("cuda:0")
    text = capsys.readouterr().out
    assert text == "process 3 of this machine uses cuda:0, the only GPU that it sees\n"


def test_of_several_gpus_a_process_takes_that_of_its_local_rank(gpus, monkeypatch, capsys):
    gpus(4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert memory.best_device("cuda") == torch.device("cuda:3")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("supported, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_without_bfloat16_computes_in_float32_and_that_is_said(
    monkeypatch, capsys, supported, dtype
):
    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert memory.default_dtype(torch.device("cuda:0")) == dtype
    said = "cuda:0 does not compute in bfloat16: float32 is used\n"
    assert capsys.readouterr().out == ("" if supported else said)


# -------------------------------------------------------------------------------- several processes

TWO_PROCESSES = """
import os
import sys
import time

import numpy as np
import torch

import memory
from memory import InputError, MemoryBank

memory.init_distributed(torch.device("cpu"))
process, _ = memory.rank_world()

# the command
for flags in ("--rank 8 --out low2.pt", "--rank full --out full2.pt"):
    sys.argv = ["memory.py", "--features", "f.npy", *flags.split()]
    memory.main()

# a call by both
features = np.load("f.npy", mmap_mode="r")
bank = MemoryBank.build(features, 8, distributed=True)
memory.write_json(f"both{process}.json", None if bank is None else len(bank))

# an image that one of them finds to be broken
try:
    memory.prepare("images", "data", image_size=16)
except InputError as e:
    memory.write_json(f"broken{process}.json", str(e))

# a call by process 0 alone; the other is in no collective meanwhile
memory.barrier()
if process == 0:
    MemoryBank.build(features, 8, labels=range(9001)).save("alone.pt")
else:
    end = time.time() + 30
    while not os.path.exists("alone.pt"):
        if time.time() > end:
            sys.exit("process 0 does not return")
        time.sleep(0.1)
memory.barrier()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A folder with f.npy, and what TWO_PROCESSES, run by torchrun, has made of it."""
    folder = tmp_path_factory.mktemp("two")
    np.save(folder / "f.npy", features(9001, 48))  # three blocks for one, two for each of two
    folder_of_images(folder / "images", 6)
    Path(folder, "images/class0/bad.png").write_bytes(b"no image")
    Path(folder, "two.py").write_text(TWO_PROCESSES)
    environment = {**os.environ, "PYTHONPATH": HERE}
    process = start(f"{folder}/two.py", processes=2, cwd=folder, env=environment)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, out + err
    return folder


def test_two_processes_build_the_bank_that_one_builds(two_processes):
    run(f"memory.py --features {two_processes}/f.npy --rank 8 --out low1.pt")
    one = MemoryBank.load("low1.pt")
    two = MemoryBank.load(f"{two_processes}/low2.pt")
    assert np.allclose(one.mean, two.mean, atol=1e-7)
    assert np.allclose(one.basis, two.basis, atol=1e-6)
    assert np.allclose(one.scale, two.scale, rtol=1e-5)
    assert np.abs(one.coef.astype(int) - two.coef).max() <= 1
    assert (one.coef == two.coef).mean() > 0.999


def test_two_processes_build_the_full_bank_that_one_builds(two_processes):
    text = run(f"memory.py --features {two_processes}/f.npy --rank full --out full1.pt")
    assert "by unknown" in text
    one = MemoryBank.load("full1.pt")
    two = MemoryBank.load(f"{two_processes}/full2.pt")
    assert one.rank == two.rank == 48
    assert two.coef.dtype == np.float16
    assert torch.allclose(one[:], two[:], atol=1e-3)


def test_of_two_processes_the_first_gets_the_bank_and_the_other_none(two_processes):
    assert memory.read_json(two_processes / "both0.json") == 9001
    assert memory.read_json(two_processes / "both1.json") is None


def test_in_a_group_of_processes_one_alone_can_build_a_bank(two_processes):
    alone = MemoryBank.load(two_processes / "alone.pt")
    assert len(alone) == 9001  # all rows, not a share
    want = MemoryBank.build(np.load(two_processes / "f.npy"), 8)
    assert torch.allclose(alone[:], want[:], atol=1e-3)


def test_a_broken_image_is_known_to_all_processes(two_processes):
    for process in (0, 1):
        message = memory.read_json(two_processes / f"broken{process}.json")
        assert "1 of 7 files in images do not decode: class0/bad.png" in message


def test_preparing_on_several_nodes_is_refused(monkeypatch):
    np.save("x.npy", glyphs(n=4, size=16)[0])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(memory, "rank_world", lambda: (0, 2))
    refused("use one node", prepare, "x.npy", "data", image_size=16)
    assert os.listdir() == ["x.npy"]


# ----------------------------------------------------------------------------- one writer at a time

OUTPUTS = {
    "o": "o/.lock",
    "o/": "o/.lock",
    "o.cfg1.5": "o.cfg1.5/.lock",
    "f/s.npz": "f/.s.npz.lock",
}


@pytest.mark.parametrize("out, lock", OUTPUTS.items())
def test_an_output_has_one_writer_and_its_lock_file_goes_with_it(out, lock):
    with memory.one_writer(out):
        assert os.path.exists(lock)
        refused("is writing to", memory.one_writer(out).__enter__)
    assert list(Path().iterdir()) == []


def test_a_lock_leaves_a_folder_that_was_there_or_has_content():
    os.mkdir("empty")
    with memory.one_writer("empty"):
        pass
    with memory.one_writer("full"):
        Path("full/x").write_text("")
    assert sorted(os.listdir()) == ["empty", "full"]


def test_two_files_of_one_folder_have_two_writers():
    with memory.one_writer("a.npz"), memory.one_writer("b.npz"):
        assert len(os.listdir()) == 2


def test_a_lock_file_that_was_removed_before_it_was_locked_is_made_again():
    flock = memory.fcntl.flock
    removed = []

    def slow_flock(file, how):
        if not removed:  # the last holder removes it between open and flock
            removed.append(os.remove(file.name))
        flock(file, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.fcntl, "flock", slow_flock)
        first = memory.one_writer("o")
        first.__enter__()
        assert removed
    with ExitStack() as stack:
        stack.push(first)
        refused("is writing to", memory.one_writer("o").__enter__)


def test_a_system_without_locks_goes_without_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(memory, "fcntl", None)
    with memory.one_writer("o"):
        assert os.path.isdir("o")
    assert "no file locks" in capsys.readouterr().out
    assert os.listdir() == []


def test_a_file_system_without_locks_goes_without_and_says_so(monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(memory.fcntl, "flock", no_locks)
    with memory.one_writer("o"):
        pass
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["--data images --image-size 16 --out data", "--features g.npy --out bank.pt"]
)
def test_two_commands_do_not_write_to_one_output(command):
    folder_of_images("images", 6)
    np.save("g.npy", features(70, 80))
    out = command.split()[-1]
    with memory.one_writer(out):
        _, _, err = run_apart(f"memory.py {command}")
        assert f"is writing to {out}: wait, or name another --out" in err
    assert not os.path.exists(out)
    run(f"memory.py {command}")


# -------------------------------------------------------------------------------------- the command


def ends_as_one_line(main, capsys):
    """Runs memory.cli(main), which ends with exit code 2 and one line on stderr -> the line"""
    with pytest.raises(SystemExit) as stop:
        memory.cli(main)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


# the flags of memory.py -> what the message holds
BAD_MEMORY = {
    "--out out --features f.npy": "f.npy holds float32 (4, 8, 8, 3), expected floats (N, D)",
    "--out out --features g.npy --rank -1": "--rank: -1 is not in [1, inf)",
    "--out out --features g.npy --rank 0": "--rank: 0 is not in [1, inf)",
    "--out out --features g.npy --rank all": "--rank: invalid",
    "--out out --features g.npy --dtype int16": "--dtype: invalid choice: 'int16'",
    "--out bank.pt --features g.npy": "bank.pt holds another bank",
    "--out out --features nan.npy": "features of row 0, 1, 2, 3, 4 and 94 more",
    "--out out --features gone.npy": "gone.npy",
    "--out out --data 1.png --features g.npy": "70 rows for 1",
    "--out out --data images": "class0/x.png, class1/cut.png, class1/none.jpg; --skip-bad",
    "--out out --data ids.npz": "the largest label is 123456789 for 4 images",
    "--out out --data nowhere": "nowhere does not exist",
    "--out out --data images.zip": "expected a folder of images, an image, .npy or .npz",
    "--out out --data empty": "no images in the folder empty",
    "--out out --data f.npy": "float32 (4, 8, 8, 3); expected are images, uint8",
    "--out out --data other.npz": "holds x; images are expected under arr_0",
    "--out out --data labels.npz": "labels int64 (3,) for 4 images",
    "--out out --data t.npy": "t.npy is not an .npy file of numbers",
    "--out out --data t.npz": "t.npz is not an .npz of arrays, or damaged",
    "--out out --data glyphs --encoder clip": "clip is no file, and none of dinov2_vits14",
    "--out out --data glyphs --tokenizer vae": "vae is no file, and none of sd-vae-ft-ema",
    "--out out --data glyphs --patches": "thumbnail has no patch tokens (for --patches or --align)",
    "--out out --data glyphs --image-size 0": "--image-size: 0 is not in [1, inf)",
    "--out out --nonsense": "unrecognized arguments: --nonsense",
    "--features g.npy": "give --out",
    "--out out": "give --out, and --data (images) or --features",
}


@pytest.fixture
def bad_files():
    """Bad files, and features of many kinds, in this folder."""
    write_bad_files()
    shutil.copy("images/class0/000.png", "1.png")
    Path("images.zip").write_bytes(b"PK")
    np.save("nan.npy", np.full((99, 80), np.nan, np.float32))
    np.save("g.npy", features(70, 80).numpy())
    ids = np.array([1, 2, 3, 123456789])
    np.savez("ids.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=ids)


@pytest.mark.parametrize("flags", BAD_MEMORY)
def test_bad_input_of_memory_py_is_one_line_and_nothing_is_written(flags, bad_files):
    before = modification_times()
    line = run(f"memory.py {flags}", fails=True)
    assert BAD_MEMORY[flags] in line
    assert len(line) < 300
    assert modification_times() == before


def test_three_bad_files_of_nine_are_left_out_with_skip_bad(bad_files):
    text = run("memory.py --data images --image-size 16 --skip-bad --out data")
    assert "3 of 9 files in images do not decode" in text
    assert memory.read_json("data/meta.json")["images"] == 6
    assert "N 6," in str(MemoryBank.load("data/bank.pt"))


def test_the_command_lowers_a_rank_above_the_rows_and_says_so():
    np.save("g.npy", features(70, 80))
    code, _, err = run_apart("memory.py --features g.npy --rank 71 --out bank.pt")
    assert code == 0
    assert err == "memory.py: warning: rank 71 lowered to 70: 70 snippets of 80 numbers\n"
    assert MemoryBank.load("bank.pt").rank == 70


@pytest.mark.parametrize("redirect", UNWRITABLE)
def test_printing_does_not_end_a_preparation(redirect):
    folder_of_images("images", 6)
    run_redirected("memory.py --data images --image-size 16 --out data", redirect)
    assert os.path.exists("data/meta.json")


def test_a_value_error_of_numpy_keeps_its_traceback():
    def main():
        np.zeros(3).reshape(2)

    with pytest.raises(ValueError, match="cannot reshape") as caught:
        memory.cli(main)
    assert caught.traceback[-1].name == "main"


def test_a_value_error_of_torch_keeps_its_traceback():
    def main():
        F.cross_entropy(torch.zeros(2, 3), torch.zeros(5).long())

    with pytest.raises(ValueError, match="batch_size"):
        memory.cli(main)


@pytest.mark.parametrize("module", ["memory", "model"])
def test_an_input_error_ends_as_one_line_and_exit_code_2(module, capsys):
    error = sys.modules[module].InputError

    def main():
        raise error("what was given\ncannot be used")

    assert ends_as_one_line(main, capsys).endswith("error: what was given cannot be used")


def test_an_os_error_ends_as_one_line_and_exit_code_2(capsys):
    def main():
        open("gone.txt").close()

    assert "gone.txt" in ends_as_one_line(main, capsys)


# ---------------------------------------------------------------------- memory.py alone in a folder

ALONE = """
import importlib.util

import numpy as np
import torch

from memory import MemoryBank, mask, mix

assert importlib.util.find_spec("model") is None
features = np.load("f.npy")
MemoryBank.build(features, 8, labels=range(100)).save("saved.pt")
bank = MemoryBank.load("saved.pt")
assert bank[[1, 2]].shape == (2, 32)
assert bank.project(features[:3]).shape == (3, 8)
more = bank.extend(-features[:3], labels=[5, 6, 7])
assert len(more) == 103
similarity, index = more.nearest(-features[:3])
assert more.around([1, 2], torch.randn(2, 10)).shape == (2, 32)
assert index.flatten().tolist() == [100, 101, 102]
assert mask(bank[:4], 0.4).shape == (4, 32)
for method in ("slerp", "lerp", "concat", "mask"):
    assert mix(bank[0], bank[1], 0.5, method).shape == (32,)
print("all well")
"""


def test_memory_py_gives_bank_mask_and_mix_when_it_is_copied_alone_into_an_empty_folder():
    shutil.copy(os.path.join(HERE, "memory.py"), ".")
    np.save("f.npy", features(100, 32))
    Path("alone.py").write_text(ALONE)
    out, _ = run_python("alone.py")
    assert out == "all well\n"


def test_the_command_makes_a_bank_of_features_when_memory_py_is_copied_alone():
    shutil.copy(os.path.join(HERE, "memory.py"), ".")
    f = features(100, 32)
    np.save("f.npy", f)
    text, _ = run_python("memory.py", "--features", "f.npy", "--out", "bank.pt")
    assert "bank.pt: N 100, D 32, rank 32" in text
    assert (cosine(MemoryBank.load("bank.pt")[:], f) > 0.999).all()


@pytest.mark.parametrize("other", [None, "def train():\n    pass\n"], ids=["none", "another"])
def test_a_network_without_gmems_model_py_beside_memory_py_is_one_line(other):
    shutil.copy(os.path.join(HERE, "memory.py"), "bank.py")  # under another name, too
    if other is not None:
        Path("model.py").write_text(other)
    flags = "--data glyphs:ab --image-size 16 --encoder dinov2_vitb14 --out data"
    _, err = run_python("bank.py", *flags.split(), code=2)
    (line,) = err.splitlines()
    assert "load_dinov2 is in GMem's model.py: put that file into" in line
    assert not os.path.exists("data")


# ========================================================================================= train.py


def new_trainer(**changed):
    """A trainer of a tiny network."""
    settings = {"lr": 0.1, "warmup": 0, "decay": (0, 0), "ema": 0.9}
    args = argparse.Namespace(**{**memory.defaults(train.SETTINGS), **settings, **changed})
    return Trainer(args, SiTConfig(**TINY), None, CPU)


def draw_gradients(trainer):
    """Random gradients, as of a backward pass."""
    for parameter in trainer.parameters:
        parameter.grad = torch.randn_like(parameter)


def take_step(trainer, loss=1.0):
    """A step with random gradients, after this loss."""
    draw_gradients(trainer)
    trainer.update(torch.tensor(loss))


def tiny_trainer(**changed):
    """A trainer of a tiny network that has taken one step."""
    trainer = new_trainer(**changed)
    take_step(trainer)
    return trainer


def state_of(trainer):
    """A copy of the model, the EMA and the optimizer's state."""
    state = [
        trainer.model.state_dict(),
        trainer.ema.state_dict(),
        trainer.optimizer.state_dict()["state"],
    ]
    return copy.deepcopy(state)


def loader_of_50():
    """The loader of a prepared folder of 50 images."""
    save_images("x.npy", 50)
    prepare("x.npy", "data", image_size=16)
    return Loader("data", seed=3, device=CPU)


def no_step(*args):
    raise AssertionError("a step was begun")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with the data sets data0, prepared by this process, and data2, by two others, of the
    same images; and with trainings on data0: whole, of 8 steps; two, the same by two processes;
    cut, which ends after 5 of them; resumed, which goes on from there to 8."""
    folder = tmp_path_factory.mktemp("runs")
    save_images(folder / "x.npz", 300)  # two blocks, one for each process
    for processes in (0, 2):
        run(
            f"memory.py --data {folder}/x.npz --image-size 16 --out {folder}/data{processes}",
            processes=processes,
        )
    command = f"train.py {QUICK} --data {folder}/data0 --log-every 1 --micro-batch 4 --no-preview"
    command = f"{command} --decay 4 8"
    run(f"{command} --steps 8 --out {folder}/whole")
    run(f"{command} --steps 8 --out {folder}/two", processes=2)
    run(f"{command} --steps 5 --out {folder}/cut")
    shutil.copytree(folder / "cut", folder / "resumed")
    run(f"train.py --resume --steps 8 --out {folder}/resumed --device cpu")
    return folder


def assert_same_run(one, other):
    """Checkpoints and logs of two runs agree to the last bit."""
    a = load(f"{one}/ckpt.pt")
    b = load(f"{other}/ckpt.pt")
    torch.testing.assert_close(a["model"], b["model"], rtol=0, atol=0)
    torch.testing.assert_close(a["ema"], b["ema"], rtol=0, atol=0)
    moments_a = a["optimizer"]["state"]
    moments_b = b["optimizer"]["state"]
    torch.testing.assert_close(moments_a, moments_b, rtol=0, atol=0)
    numbers = logged_numbers(one)
    assert numbers == logged_numbers(other)
    assert len(numbers) > 0


# ----------------------------------------------------------------------------------------- settings


def test_flags_replace_a_preset():
    args, _ = merge_settings({"preset": "imagenet256-b", "lr": 3e-3, "batch_size": 64})
    assert args.lr == 3e-3
    assert args.batch_size == 64
    assert args.model == "LightningDiT-B/1"


def test_a_checkpoint_replaces_the_preset(runs):
    args, checkpoint = merge_settings({"resume": True, "out": f"{runs}/cut"})
    assert checkpoint["step"] == 5
    assert tuple(args.decay) == (4, 8)
    assert args.batch_size == 16
    assert args.log_every == 1
    assert args.preview is False


def test_flags_replace_a_checkpoint(runs):
    given = {"resume": True, "out": f"{runs}/cut", "lr": 0.5, "log_every": 3}
    args, _ = merge_settings(given)
    assert args.lr == 0.5
    assert args.log_every == 3
    assert args.batch_size == 16


def test_a_checkpoint_of_other_settings_is_refused(runs):
    checkpoint = load(runs / "cut/ckpt.pt")
    del checkpoint["settings"]["t_mean"]
    os.makedirs("older")
    torch.save(checkpoint, "older/ckpt.pt")
    refused("settings", merge_settings, {"resume": True, "out": "older"})


@pytest.mark.parametrize("name", ["flip", "rank", "resume"])
def test_a_folder_may_have_the_name_of_a_flag(name):
    folder_of_images("images", 6)
    run("memory.py --data images --image-size 16 --flip --out data")
    run(f"train.py {QUICK} --data data --no-preview --steps 2 --decay 0 0 --out {name}")
    run(f"train.py --resume --out {name} --steps 3 --device cpu")
    checkpoint = load(f"{name}/ckpt.pt")
    assert checkpoint["step"] == 3
    assert checkpoint["settings"]["flip"] is True  # as the folder was prepared
    assert checkpoint["settings"]["rank"] == 64


def test_a_file_may_be_named_relative_to_the_working_directory():
    folder_of_images("images", 6)
    stats = {"mean": torch.zeros(3), "std": torch.ones(3)}
    torch.save(stats, "stats.pt")
    command = f"train.py {QUICK} --no-preview --latent-stats stats.pt"
    run(f"{command} --steps 2 --decay 0 0 --data images --out out")
    run(f"{command} --steps 3 --resume --out out")
    assert load("out/ckpt.pt")["step"] == 3


def test_a_setting_that_is_a_number_is_not_taken_for_an_open_file():
    folder_of_images("images", 6)
    Path("text").write_text("x")
    command = f"train.py {QUICK} --no-preview --steps 2 --data images --out out"
    with open("text") as file:
        run(command, "--rank", file.fileno())  # os.path.isfile(its number) is true


def test_labels_are_needed_for_a_model_of_labels():
    save_images("x.npy", 6)
    prepare("x.npy", "data", image_size=16)
    before = files_below()
    line = run(f"train.py {QUICK} --data data --condition class", fails=True)
    assert "data has no labels (class sub-folders) for --condition class" in line
    assert files_below() == before


# ------------------------------------------------------------------------------------------ presets


def test_a_preset_replaces_defaults():
    args, _ = merge_settings({"preset": "imagenet256-b"})
    assert args.model == "LightningDiT-B/1"
    assert args.lr == 2e-4
    assert args.mask_ratio == 0.4  # of which the preset says nothing


@pytest.mark.parametrize("preset", ["imagenet256-b", "imagenet256-xl", "imagenet512-xl"])
def test_the_presets_for_imagenet_have_the_official_times(preset):
    args, _ = merge_settings({"preset": preset})
    assert (args.t_mean, args.t_std) == (0, 1)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_a_preset_holds_nothing_but_settings_with_values_of_their_types(preset):
    for name, value in train.PRESETS[preset].items():
        kind = train.SETTINGS[name][1]
        if isinstance(kind, tuple):
            assert value in kind
        elif kind is bool:
            assert isinstance(value, bool)
        elif not isinstance(kind, dict):
            assert kind(str(value)) == value


def network_of(preset, latent):
    """The SiTConfig that a preset gives on latents of this shape, with 768 numbers in a snippet."""
    args, _ = merge_settings({"preset": preset})
    tokens = (latent[1] // CONFIGS[args.model]["patch_size"]) ** 2
    bank = MemoryBank.build(features(3, 768), 2)
    loader = argparse.Namespace(bank=bank, patches=bank, meta={"latent": latent})
    loader.arrays = [np.empty((3, tokens))]  # patch_scales.npy
    return train.new_config(args, loader)


def test_the_network_of_official_xl_is_that_of_the_official_code():
    assert network_of("official-xl", (32, 16, 16)) == SiTConfig(
        input_size=16,
        patch_size=1,
        in_channels=32,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        memory_dim=768,
        mask_ratio=0.4,
        swiglu=True,
        rmsnorm=True,
        rope=True,
        zero_init=False,
        align_dim=768,
        align_depth=4,
    )


def test_the_network_of_sit_xl_is_sit_xl_2_without_alignment():
    expected = SiTConfig(**CONFIGS["SiT-XL/2"], input_size=32, in_channels=4, memory_dim=768)
    assert network_of("sit-xl", (4, 32, 32)) == expected


def test_sit_xl_is_28_epochs_of_imagenet():
    args, _ = merge_settings({"preset": "sit-xl"})
    assert args.steps * args.batch_size / 1_281_167 == pytest.approx(28, abs=0.05)


def test_a_folder_that_was_prepared_otherwise_than_the_preset_says_is_refused(trained):
    line = run(f"train.py --preset official-xl --data {trained}/out/data --device cpu", fails=True)
    assert "rank 64, not full" in line


# --------------------------------------------------------------------------------------------- data


def test_latents_are_mapped_into_memory():
    assert isinstance(loader_of_50().latents, np.memmap)


def test_batches_cover_every_image_once_in_an_epoch():
    loader = loader_of_50()
    rows = np.concatenate([loader.rows(start, 5) for start in range(0, 100, 5)])
    assert (np.sort(rows[:50]) == np.arange(50)).all()
    assert (np.sort(rows[50:]) == np.arange(50)).all()


def test_every_epoch_has_an_order_of_its_own():
    loader = loader_of_50()
    first = np.concatenate([loader.rows(start, 5) for start in range(0, 50, 5)])
    second = np.concatenate([loader.rows(start, 5) for start in range(50, 100, 5)])
    assert not (first == second).all()


def test_a_batch_may_reach_over_several_epochs():
    loader = loader_of_50()
    end_of_first = loader.rows(40, 10)
    second = np.arange(50)
    beginning_of_third = loader.rows(100, 20)
    expected = np.concatenate([end_of_first, second, beginning_of_third])
    assert (np.sort(loader.rows(40, 80)) == np.sort(expected)).all()


def test_a_batch_holds_latents_snippets_and_labels_of_its_rows():
    loader = loader_of_50()
    loader.begin([48], 5)
    x, s, y, targets = loader.next_batch()
    rows = loader.rows(48, 5)
    assert torch.equal(y, torch.full((5,), -1))
    assert torch.equal(s, loader.bank[rows])
    pixels = torch.from_numpy(loader.latents[rows])
    assert torch.allclose(x, pixels / 127.5 - 1, atol=1e-6)
    assert targets is None


def test_batches_come_in_the_order_that_is_asked_for():
    loader = loader_of_50()
    loader.begin([20, 0, 10], 5)
    for start in (20, 0, 10):
        _, s, _, _ = loader.next_batch()
        assert torch.equal(s, loader.bank[loader.rows(start, 5)])


# -------------------------------------------------------------------------------- the learning rate


@pytest.mark.parametrize(
    "warmup, decay, rates",
    [
        (10, (60, 100), {0: 0.2, 9: 2, 30: 2, 60: 2, 80: 1, 100: 0}),
        (0, (0, 0), {0: 2, 10**6: 2}),
    ],
)
def test_the_learning_rate_warms_up_stays_and_falls_by_its_decay(warmup, decay, rates):
    args = argparse.Namespace(lr=2.0, warmup=warmup, decay=decay)
    for step, rate in rates.items():
        assert learning_rate(step, args) == pytest.approx(rate)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 3000])
def test_the_learning_rate_reaches_0_at_the_last_step_only(steps):
    args, _ = merge_settings({"steps": steps})
    assert learning_rate(steps, args) == 0
    assert learning_rate(steps - 1, args) > 0


@pytest.mark.parametrize(
    "given, decay",
    [
        ({"steps": 2600}, (1500, 2600)),
        ({"preset": "imagenet256-xl", "steps": 100}, (0, 0)),  # a preset without a decay
        ({"steps": 2600, "decay": [100, 3000]}, (100, 3000)),
    ],
    ids=str,
)
def test_steps_scale_the_decay_of_the_preset_unless_it_is_given(given, decay):
    args, _ = merge_settings(given)
    assert tuple(args.decay) == decay


def test_a_decay_that_ends_before_the_steps_is_refused():
    refused("--decay A B", merge_settings, {"steps": 2600, "decay": [100, 2599]})


# ----------------------------------------------------------------------------------------- one step


def test_the_first_step_is_that_of_adam_with_clipped_gradients():
    trainer = new_trainer(warmup=4)
    draw_gradients(trainer)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    gradients = [parameter.grad.clone() for parameter in trainer.parameters]
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert trainer.update(torch.tensor(1.0)).item() == pytest.approx(norm.item(), rel=1e-5)
    for old, gradient, new in zip(before, gradients, trainer.parameters):
        g = gradient / norm
        step = g / (g.square().sqrt() + 1e-8)  # m / (1 - beta1), v / (1 - beta2) of one gradient
        torch.testing.assert_close(new.detach(), old - 0.1 / 4 * step, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit, decay", [(0.9999, 2 / 11), (0.1, 0.1)])
def test_a_good_step_moves_the_model_and_the_ema_by_its_formula(limit, decay):
    trainer = tiny_trainer(ema=limit)
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    ema_before = [parameter.clone() for parameter in trainer.ema.parameters()]
    take_step(trainer)
    parts = zip(before, trainer.parameters, ema_before, trainer.ema.parameters())
    for old, new, ema_old, ema_new in parts:
        assert not torch.equal(old, new)
        expected = decay * ema_old + (1 - decay) * new.detach()
        torch.testing.assert_close(ema_new, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ramp, decay", [(True, 1 / 10), (False, 0.9)])
def test_the_ema_has_a_ramp_with_ema_ramp_alone(ramp, decay):
    trainer = new_trainer(ema_ramp=ramp)
    before = [parameter.clone() for parameter in trainer.ema.parameters()]
    take_step(trainer)
    for old, new, ema in zip(before, trainer.parameters, trainer.ema.parameters()):
        torch.testing.assert_close(ema, decay * old + (1 - decay) * new.detach())


def test_a_good_step_moves_the_optimizer():
    trainer = tiny_trainer()
    before = state_of(trainer)[2]
    take_step(trainer)
    after = state_of(trainer)[2]
    for k in before:
        assert before[k]["step"] == 1
        assert after[k]["step"] == 2
        assert not torch.equal(before[k]["exp_avg"], after[k]["exp_avg"])
        assert not torch.equal(before[k]["exp_avg_sq"], after[k]["exp_avg_sq"])


def test_beta2_is_that_of_the_optimizer():
    trainer = new_trainer(beta2=0.75)
    draw_gradients(trainer)
    gradient = trainer.parameters[0].grad.clone()
    norm = trainer.update(torch.tensor(1.0))
    moment = trainer.optimizer.state[trainer.parameters[0]]["exp_avg_sq"]
    torch.testing.assert_close(moment, (1 - 0.75) * (gradient / norm).square())


def tensors_between_steps(trainer):
    """All tensors that a trainer holds."""
    tensors = [value for value in vars(trainer).values() if torch.is_tensor(value)]
    tensors += trainer.model.state_dict(keep_vars=True).values()
    tensors += trainer.ema.state_dict(keep_vars=True).values()
    for state in trainer.optimizer.state.values():
        tensors += state.values()
    return tensors


def test_no_tensor_between_steps_has_a_gradient_function():
    trainer = tiny_trainer()
    assert len(tensors_between_steps(trainer)) > 100
    assert all(tensor.grad_fn is None for tensor in tensors_between_steps(trainer))


# ------------------------------------------------------------------------ steps that are not finite


@pytest.fixture(scope="session")
def not_finite(tmp_path_factory):
    """A folder with data, where one of 48 latents is not a number (that is in one batch of three,
    and there in one micro-batch), and 10 steps on them by one process and by two; inf, where all
    latents are infinite."""
    folder = tmp_path_factory.mktemp("not_finite")
    save_images(folder / "x.npy", 48)
    prepare(f"{folder}/x.npy", f"{folder}/data", image_size=16)
    shutil.copytree(folder / "data", folder / "inf")
    latents = np.load(folder / "data/latents.npy").astype(np.float16)
    np.save(folder / "inf/latents.npy", np.full_like(latents, np.inf))
    latents[5] = np.nan
    np.save(folder / "data/latents.npy", latents)
    command = f"train.py {QUICK} --log-every 1 --micro-batch 8 --no-preview --data {folder}/data"
    run(f"{command} --steps 10 --out {folder}/one")
    run(f"{command} --steps 10 --out {folder}/two", processes=2)
    return folder


def test_a_step_with_a_number_that_is_not_finite_is_skipped(not_finite):
    one = load(not_finite / "one/ckpt.pt")
    assert one["skipped"] == 4  # 10 steps are 3 1/3 epochs
    assert all(state["step"] == 6 for state in one["optimizer"]["state"].values())


def test_skipped_steps_leave_finite_weights(not_finite):
    one = load(not_finite / "one/ckpt.pt")
    for weights in ("model", "ema"):
        assert all(value.isfinite().all() for value in one[weights].values())


def test_a_step_is_skipped_by_all_processes(not_finite):
    one = load(not_finite / "one/ckpt.pt")
    two = load(not_finite / "two/ckpt.pt")
    assert two["skipped"] == one["skipped"]
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-5, atol=5e-5)


def test_the_log_has_no_loss_of_skipped_steps_and_counts_them(not_finite):
    lines = read_log(not_finite / "one")
    without_loss = [line["step"] for line in lines if line["loss"] is None]
    assert len(without_loss) == 4
    epochs = [(step - 1) // 3 for step in without_loss]  # of three batches
    assert epochs == [0, 1, 2, 3]
    assert lines[-1]["skipped"] == 4


def test_a_run_without_a_finite_step_gives_up(not_finite):
    refused(
        "no finite loss or gradient in 50 steps, to 50",
        run,
        f"train.py {QUICK} --log-every 1 --no-preview --data {not_finite}/inf",
        error=SystemExit,
    )
    assert not os.path.exists("out/ckpt.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_changes_nothing(place, value):
    trainer = tiny_trainer()
    before = state_of(trainer)
    draw_gradients(trainer)
    loss = torch.tensor(1.0)
    if place == "loss":
        loss = torch.tensor(value)
    else:
        trainer.parameters[3].grad.view(-1)[0] = value
    trainer.update(loss)
    torch.testing.assert_close(state_of(trainer), before, rtol=0, atol=0)


def test_a_skipped_step_is_counted_and_its_gradients_are_dropped():
    trainer = tiny_trainer()
    take_step(trainer, float("nan"))
    assert trainer.step == 2
    assert int(trainer.skipped) == 1
    assert all(parameter.grad is None for parameter in trainer.parameters)


def test_a_skipped_step_does_not_change_the_next_step():
    one = tiny_trainer()
    other = tiny_trainer()
    torch.manual_seed(1)
    take_step(one)
    take_step(other, float("nan"))
    torch.manual_seed(1)
    take_step(other)
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def test_an_apple_gpu_whose_optimizer_ignores_found_inf_keeps_its_weights():
    trainer = tiny_trainer()
    step = trainer.optimizer.step

    def step_without_found_inf():
        del trainer.optimizer.found_inf
        step()

    trainer.optimizer.step = step_without_found_inf
    trainer.device = torch.device("mps")
    before = state_of(trainer)
    for loss in ("nan", "inf"):
        take_step(trainer, float(loss))
    torch.testing.assert_close(state_of(trainer), before, rtol=0, atol=0)
    take_step(trainer)
    assert not torch.equal(
        state_of(trainer)[0]["final_layer.linear.weight"], before[0]["final_layer.linear.weight"]
    )


# --------------------------------------------------------------------------- what a training writes


def test_a_training_logs_finite_numbers_every_log_every_steps(trained):
    assert [line["step"] for line in read_log(trained / "out")] == [2, 4, 6]
    assert np.isfinite(logged_numbers(trained / "out")).all()


def test_a_training_leaves_a_grid_of_64_samples(trained):
    assert Image.open(trained / "out/samples.png").size == (8 * 64, 8 * 64)


def test_memory_tokens_are_the_default_of_the_small_models(trained):
    ema = load(trained / "out/ckpt.pt")["ema"]
    assert ema["token_projection.weight"].shape == (2 * 2 * 256, 768)


def test_a_checkpoint_says_how_its_data_were_prepared(trained):
    settings = load(trained / "out/ckpt.pt")["meta"]["settings"]
    assert settings["encoder"] == "thumbnail"
    assert settings["tokenizer"] == "pixel"


def test_the_network_is_given_the_mean_of_its_bank(trained):
    bank = MemoryBank.load(trained / "out/data/bank.pt")
    checkpoint = load(trained / "out/ckpt.pt")
    for weights in ("model", "ema"):
        assert torch.equal(checkpoint[weights]["memory_mean"], torch.tensor(bank.mean))


def test_the_network_sees_snippets_of_unit_variance(trained):
    bank = MemoryBank.load(trained / "out/data/bank.pt")
    checkpoint = load(trained / "out/ckpt.pt")
    seen = bank[:] - checkpoint["ema"]["memory_mean"]
    seen = seen * checkpoint["config"]["memory_scale"]
    assert seen.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


def test_a_scale_that_is_a_number_multiplies_the_snippets(trained):
    run(
        f"train.py {QUICK} --data {trained}/out/data --steps 2 --no-preview --memory-scale 3 --out scaled"
    )
    checkpoint = load("scaled/ckpt.pt")
    assert checkpoint["config"]["memory_scale"] == 3
    assert checkpoint["config"]["memory_center"] is False


def test_a_training_draws_times_by_t_mean_and_t_std(trained, monkeypatch):
    asked = []

    def noted_loss(*args):
        asked.append(args[-2:])
        return flow_loss(*args)

    monkeypatch.setattr(train, "flow_loss", noted_loss)
    ask = "--steps 1 --t-mean 0.5 --no-preview --out o --data"
    run(f"train.py {QUICK} {ask} {trained}/out/data")
    assert asked == [(0.5, 0.8)]


@pytest.mark.parametrize("condition, classes", [("none", 0), ("class", 2)])
def test_a_baseline_has_no_memory(baselines, condition, classes):
    config = load(baselines / condition / "ckpt.pt")["config"]
    assert config["num_classes"] == classes
    assert config["memory_dim"] == 0


def test_keep_every_writes_the_ema_weights_of_its_step_and_sample_py_takes_them(trained):
    command = f"train.py {QUICK} --no-preview --data {trained}/out/data --decay 0 0"
    run(f"{command} --steps 5 --keep-every 2 --out a")
    run(f"{command} --steps 4 --out b")
    kept = sorted(path.name for path in Path("a").glob("ema-*"))
    assert kept == ["ema-0000002.pt", "ema-0000004.pt"]
    expected = load("b/ckpt.pt")
    checkpoint = load("a/ema-0000004.pt")
    torch.testing.assert_close(checkpoint["ema"], expected["ema"], rtol=0, atol=0)
    assert "model" not in checkpoint
    command = "sample.py --num-images 2 --steps 2 --device cpu"
    run(f"{command} --ckpt a/ema-0000004.pt --out a.npz")
    run(f"{command} --ckpt b --out b.npz")
    assert (images_of("a.npz") == images_of("b.npz")).all()


def test_alignment_to_another_number_of_patch_tokens_is_refused(encoded):
    flags = f"--data {encoded.folder}/0 --batch-size 2 --steps 2 --no-preview --align 0.5"
    line = run(f"train.py {flags} --model SiT-T/4 --out no", fails=True)
    assert "SiT-T/4 expects 16 patch tokens" in line


# --------------------------------------------------------------- several processes and resumed runs


@pytest.mark.parametrize("file", ["latents.npy", "labels.npy"])
def test_two_processes_prepare_the_files_that_one_prepares(runs, file):
    assert (runs / "data0" / file).read_bytes() == (runs / "data2" / file).read_bytes()


def test_two_processes_arrive_at_the_weights_of_one(runs):
    one = load(runs / "whole/ckpt.pt")
    two = load(runs / "two/ckpt.pt")
    for weights in ("model", "ema"):
        torch.testing.assert_close(one[weights], two[weights], rtol=1e-5, atol=2e-5)


def test_two_processes_log_the_numbers_of_one(runs):
    assert np.allclose(logged_numbers(runs / "whole"), logged_numbers(runs / "two"), rtol=2e-3)


def test_an_extended_run_takes_the_steps_of_one_long_run(runs):
    assert_same_run(runs / "whole", runs / "resumed")


def test_a_finished_run_has_nothing_to_do(runs):
    before = files_below(runs / "resumed")
    assert "nothing to do" in run(f"train.py --resume --out {runs}/resumed --device cpu")
    assert files_below(runs / "resumed") == before


@pytest.mark.parametrize("name", ["cut", "resumed"])
def test_a_resumed_run_that_goes_beyond_its_decay_is_refused(runs, name):
    line = run(f"train.py --resume --steps 9 --out {runs}/{name} --device cpu", fails=True)
    assert "falls to 0 from step 4 to 8, but --steps is 9" in line
    assert "--decay A B" in line


def test_a_resumed_run_goes_beyond_its_decay_with_another_one(runs):
    shutil.copytree(runs / "resumed", "out")
    run("train.py --resume --steps 9 --decay 4 12 --out out --device cpu")
    last = read_log("out")[-1]
    assert last["step"] == 9
    assert last["lr"] == pytest.approx(2e-3 * 9 / 50 * (12 - 8) / (12 - 4))


def test_a_resumed_run_keeps_its_learning_rate(runs):
    shutil.copytree(runs / "cut", "out")
    run("train.py --resume --steps 6 --out out --device cpu")
    assert logged_numbers("out") == logged_numbers(runs / "whole")[:6]


def test_a_resumed_run_takes_a_learning_rate_that_is_given(runs):
    shutil.copytree(runs / "cut", "out")
    run("train.py --resume --steps 6 --out out --device cpu --lr 0.5")
    expected = read_log(runs / "whole")[5]["lr"] * 0.5 / 2e-3
    assert read_log("out")[5]["lr"] == pytest.approx(expected)


@pytest.mark.parametrize("flags, warned", [("", False), ("--micro-batch 8", True)])
def test_a_resumed_run_warns_of_another_micro_batch(runs, flags, warned):
    shutil.copytree(runs / "cut", "out")
    text = run(f"train.py --resume --steps 6 --out out --device cpu {flags}")
    assert ("other noise" in text) == warned


def test_resume_begins_a_new_run_where_there_is_none():
    folder_of_images("images", 6)
    command = f"train.py {QUICK} --no-preview --data images --steps 2 --resume"
    assert "from step 0" in run(command)
    assert load("out/ckpt.pt")["step"] == 2
    assert "nothing to do" in run(command)  # the same command, again


# -------------------------------------------------------------------------------- signals and kills


def handlers_of_signals(monkeypatch, ignored=()):
    """-> the list of train.note_signals, the handlers that it has set"""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", {n: signal.SIG_IGN for n in ignored}.get)
    return train.note_signals(), handlers


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_is_noted_and_does_not_end_the_process(monkeypatch, name):
    times, handlers = handlers_of_signals(monkeypatch)
    number = getattr(signal, name)
    handlers[number](number, None)
    assert times == pytest.approx([time.time()], abs=60)


def test_many_signals_at_once_are_noted_once(monkeypatch):
    times, handlers = handlers_of_signals(monkeypatch)
    for _ in range(100):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert len(times) == 1


def test_a_second_signal_later_on_ends_the_process(monkeypatch):
    times, handlers = handlers_of_signals(monkeypatch)
    raised = []
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    times[0] -= 3
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert handlers[signal.SIGTERM] == signal.SIG_DFL
    assert raised == [signal.SIGTERM]


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):  # as SIGHUP under nohup
    _, handlers = handlers_of_signals(monkeypatch, ignored=[signal.SIGHUP])
    assert signal.SIGHUP not in handlers
    assert signal.SIGTERM in handlers


def signal_after_save(command, ckpt, wait, number):
    """Starts a training and sends it a signal, `wait` seconds after it has saved -> exit code,
    output"""
    before = ckpt.stat().st_mtime_ns if ckpt.exists() else 0
    process = start(command)
    wait_for(lambda: ckpt.exists() and ckpt.stat().st_mtime_ns > before, process)
    time.sleep(wait)
    process.send_signal(number)
    out, err = process.communicate()
    return process.returncode, out + err


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """A folder with two trainings of 60 steps: whole, and cut, which was killed twice, then
    stopped, and then ran to its end without the images it was prepared from. stopped.json holds
    what there was after the stop."""
    folder = tmp_path_factory.mktemp("interrupted")
    save_images(folder / "x.npz", 64)
    command = f"train.py {QUICK} --data {folder}/x.npz --log-every 1 --no-preview --steps 60"
    run(f"{command} --out {folder}/whole")
    command = f"{command} --save-every 2 --out {folder}/cut"
    resume = f"train.py --resume --out {folder}/cut --device cpu"
    ckpt = folder / "cut/ckpt.pt"
    for wait in (0.03, 0.2):  # mostly while it saves
        signal_after_save(command, ckpt, wait, signal.SIGKILL)
        command = resume
    code, text = signal_after_save(resume, ckpt, 0, signal.SIGTERM)
    steps = [line["step"] for line in read_log(folder / "cut")]
    stopped = {"code": code, "text": text, "step": load(ckpt)["step"], "logged": steps}
    (folder / "stopped.json").write_text(json.dumps(stopped))

    with open(folder / "cut/log.jsonl", "a") as file:
        file.write('{"step": 59}\n{"st')  # as left behind by a kill
    os.remove(folder / "x.npz")
    run(f"{resume} --preview --save-every 30")
    return folder


def test_a_signal_saves_and_ends_the_run_well(interrupted):
    stopped = json.loads((interrupted / "stopped.json").read_text())
    assert stopped["code"] == 0, stopped["text"]
    assert f"holds step {stopped['step']}: stopped by a signal" in stopped["text"]
    assert stopped["step"] < 60


def test_a_stopped_run_has_logged_the_steps_that_it_saved(interrupted):
    stopped = json.loads((interrupted / "stopped.json").read_text())
    assert stopped["logged"] == list(range(1, stopped["step"] + 1))


def test_killed_and_stopped_runs_end_like_an_uninterrupted_run(interrupted):
    assert_same_run(interrupted / "whole", interrupted / "cut")


def test_a_preview_is_written_unless_no_preview_is_given(interrupted):
    assert not (interrupted / "whole/samples.png").exists()
    pictures = {path.name for path in (interrupted / "cut").glob("*.png")}
    assert {"samples.png", "samples-0000060.png"} <= pictures


def test_killed_runs_leave_no_temporary_files(interrupted):
    assert list((interrupted / "cut").glob("*.tmp")) == []


def test_a_run_that_starts_anew_keeps_no_log_of_one_that_never_saved(trained):
    os.mkdir("out")
    Path("out/log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    command = f"train.py {QUICK} --data {trained}/out/data --no-preview --log-every 1"
    run(f"{command} --steps 2 --out out")
    assert [line["step"] for line in read_log("out")] == [1, 2]
    assert np.isfinite(logged_numbers("out")).all()


def test_a_dead_process_ends_the_others(trained):
    process = start(
        f"train.py {QUICK} --steps 9999 --decay 0 0 --save-every 1 --no-preview --out out",
        "--data",
        trained / "out/data",
        processes=2,
    )
    wait_for(lambda: os.path.exists("out/ckpt.pt"), process)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Signal 9" in message
    assert load("out/ckpt.pt")["step"] >= 1


@contextmanager
def file_size_limited_to(size):
    """No file of this process may become larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_checkpoint(trained):
    shutil.copytree(trained / "out", "out")
    before = Path("out/ckpt.pt").read_bytes()
    command = "train.py --resume --steps 8 --decay 3 8 --out out --device cpu"
    with file_size_limited_to(len(before) // 2):
        code, _, err = run_here(command, fails=True)
    assert code == 2, err
    assert "what was there is kept" in err.splitlines()[-1]
    assert Path("out/ckpt.pt").read_bytes() == before
    assert not os.path.exists("out/ckpt.pt.tmp")


# ------------------------------------------------------------------------------------ memory in use


def resident_megabytes():
    """Memory of this process that is in use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self"), reason="there is no /proc")


@needs_proc
def test_the_memory_of_a_training_does_not_grow_with_its_steps(monkeypatch):
    loader = loader_of_50()
    config = SiTConfig(**{**TINY, "input_size": 16, "patch_size": 8, "memory_dim": 768})
    defaults = memory.defaults(train.SETTINGS)
    args = argparse.Namespace(**{**defaults, "steps": 1500, "preview": False, "log_every": 300})
    trainer = Trainer(args, config, loader, CPU)
    megabytes = []

    def noted_report(*args):
        megabytes.append(resident_megabytes())
        return Trainer.report(trainer, *args)

    monkeypatch.setattr(trainer, "report", noted_report)
    monkeypatch.setattr(train, "note_signals", list)
    monkeypatch.setattr(trainer, "save", lambda *args: None)
    os.mkdir("out")
    train.train(trainer, trainer.model, loader, 4, 1, None)
    assert len(megabytes) == 5
    assert megabytes[-1] - megabytes[0] < 8


@needs_proc
def test_a_resumed_training_does_not_keep_its_checkpoint_open():
    trainer = tiny_trainer()
    loader = argparse.Namespace(folder="data", meta={})
    os.mkdir("out")
    trainer.save(loader, 4)
    other = new_trainer()
    other.load(model_file.load_file("out/ckpt.pt"))
    assert "ckpt.pt" not in Path("/proc/self/maps").read_text()
    torch.testing.assert_close(state_of(other), state_of(trainer), rtol=0, atol=0)


# ----------------------------------------------------------------------------- runs that were moved


@pytest.fixture
def moved(trained, monkeypatch):
    """A copy of the run of `trained` at another place, which is the working directory; its old place
    is gone. With data: a copy of its prepared folder, which elsewhere/out was trained on."""
    shutil.copytree(trained / "out/data", "old/data")
    monkeypatch.chdir("old")
    run(f"train.py {QUICK} --no-preview --data data --steps 2 --out elsewhere/out")
    folder_of_images("images", 6)
    run(f"train.py {QUICK} --no-preview --data images --steps 2 --out within")
    monkeypatch.chdir("..")
    os.rename("old", "new")
    monkeypatch.chdir("new")


RESUME = "train.py --resume --steps 3 --decay 0 0 --device cpu"


def test_a_run_goes_on_that_was_moved_together_with_its_data(moved):
    run(f"{RESUME} --out elsewhere/out")
    assert load("elsewhere/out/ckpt.pt")["step"] == 3


def test_a_run_goes_on_that_was_renamed_with_data_inside(moved):
    os.rename("within", "renamed")
    run(f"{RESUME} --out renamed")
    assert load("renamed/ckpt.pt")["step"] == 3
    assert not os.path.exists("within")


def test_a_run_goes_on_from_another_working_directory(moved, monkeypatch):
    os.mkdir("there")
    monkeypatch.chdir("there")
    run(f"{RESUME} --out ../within")
    assert load("../within/ckpt.pt")["step"] == 3
    assert os.listdir() == []


def test_a_run_in_the_default_folder_stays_there_when_it_was_renamed(moved):
    os.rename("within", "out")
    run(RESUME)
    assert load("out/ckpt.pt")["step"] == 3
    assert not os.path.exists("within")


def test_a_run_goes_on_that_was_moved_away_from_its_data(moved):
    os.rename("data", "first")
    run(f"train.py {QUICK} --no-preview --data first --steps 2 --out a/run")
    os.rename("a/run", "run")
    run(f"{RESUME} --out run")
    assert load("run/ckpt.pt")["step"] == 3
    assert os.path.exists(os.path.join("run", load("run/ckpt.pt")["bank"]))


def test_a_run_whose_data_were_moved_goes_on_where_they_are_given(moved):
    os.rename("data", "moved_data")
    line = run(f"{RESUME} --out elsewhere/out", fails=True)
    assert "give --data" in line
    run(f"{RESUME} --out elsewhere/out --data moved_data")
    run(f"{RESUME} --out elsewhere/out --steps 4")  # which is remembered
    assert load("elsewhere/out/ckpt.pt")["step"] == 4


def test_a_run_does_not_go_on_with_other_data(moved):
    before = files_below()
    line = run(f"{RESUME} --out elsewhere/out --data within/data", fails=True)
    assert "not what the run was begun with: other bank, images" in line
    assert files_below() == before


def test_a_run_goes_on_with_a_file_that_was_moved(moved):
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, "stats.pt")
    command = f"train.py {QUICK} --no-preview --decay 0 0 --data images --out out --resume"
    run(f"{command} --steps 2 --latent-stats stats.pt")
    os.mkdir("files")
    os.rename("stats.pt", "files/stats.pt")
    run(f"{command} --steps 3 --data out/data --latent-stats files/stats.pt")
    assert load("out/ckpt.pt")["step"] == 3


# ------------------------------------------------------------------------------------ micro-batches


SPLITS = {  # batch size, --micro-batch, processes -> size and number of micro-batches of a process
    (64, None, 2): (32, 1),
    (300, None, 1): (100, 3),
    (1024, None, 1): (128, 8),
    (1024, None, 4): (128, 2),  # the same micro-batches by 1, 4 and 8 processes
    (1024, None, 8): (128, 1),
    (64, 8, 2): (8, 4),
}


@pytest.mark.parametrize("given, expected", SPLITS.items())
def test_a_batch_is_split_into_micro_batches_of_128_or_as_given(given, expected):
    assert split(*given) == expected


@pytest.mark.parametrize("latent, expected", [(16, 128), (32, 32), (200, 1)])
def test_a_forward_pass_has_at_most_32768_tokens(monkeypatch, latent, expected):
    seen = []

    def noted_split(batch_size, micro_batch, num_processes, most=128, before=None):
        seen.append(most)
        return split(batch_size, micro_batch, num_processes, most, before)

    class NotedTrainer:
        """A trainer at the end of its run."""

        def __init__(self, *args):
            self.config = argparse.Namespace(input_size=latent, patch_size=1)
            self.step = 10**9

    monkeypatch.setattr(train, "split", noted_split)
    monkeypatch.setattr(train, "Trainer", NotedTrainer)
    monkeypatch.setattr(train, "introduce", lambda *args: None)
    save_images("x.npy", 6)
    run(f"train.py {QUICK} --data x.npy")
    assert seen[-1] == expected
    assert split(1024, None, 8, seen[-1]) == (expected, 128 // expected)


def test_a_resumed_run_keeps_its_micro_batch_on_another_number_of_processes():
    assert split(64, None, 2, before=8) == (8, 4)
    assert split(64, None, 8, before=16) == (8, 1)  # where it can


def test_a_batch_that_does_not_divide_among_the_processes_is_refused():
    refused("63 or 66", split, 64, None, 3)
    refused("for 8 processes give 8$", split, 4, None, 8)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused():
    refused("1, 2, 4, 8, 16, 32", split, 64, 5, 2)


def said_of_batch_size(batch_size, trained, monkeypatch):
    """What a training with this batch size prints before its first step."""

    def no_steps(*args):
        pass

    monkeypatch.setattr(train, "train", no_steps)
    return run(f"train.py {QUICK} --data {trained}/out/data --batch-size {batch_size}")


@pytest.mark.parametrize(
    "batch_size, split_into, better",
    [(262, "131 micro-batches of 2", 256), (131, "131 micro-batches of 1", 128)],
)
def test_a_batch_size_that_divides_badly_is_reported(
    trained, monkeypatch, batch_size, split_into, better
):
    text = said_of_batch_size(batch_size, trained, monkeypatch)
    assert split_into in text
    assert f"--batch-size {better} or {better + 128} divides well" in text


@pytest.mark.parametrize("batch_size", [16, 63, 128, 300, 1024])
def test_a_batch_size_that_divides_well_is_not_reported(trained, monkeypatch, batch_size):
    text = said_of_batch_size(batch_size, trained, monkeypatch)
    assert f"batch: {batch_size} = " in text
    assert "divides well" not in text


# --------------------------------------------------------------------- checks before the first step


def test_a_preview_without_its_tokenizer_is_refused_before_the_first_step(trained, monkeypatch):
    def no_tokenizer(name, device):
        raise memory.InputError("no download")

    monkeypatch.setattr(memory, "load_tokenizer", no_tokenizer)
    monkeypatch.setattr(train, "train", no_step)
    command = f"train.py {QUICK} --data {trained}/out/data"
    assert "no download" in run(command, fails=True)
    with pytest.raises(AssertionError, match="a step was begun"):
        run(f"{command} --no-preview")


def test_the_tokenizer_is_loaded_once(trained, monkeypatch):
    loaded = []

    def noted_tokenizer(name, device):
        loaded.append(name)
        return Pixels()

    monkeypatch.setattr(memory, "load_tokenizer", noted_tokenizer)
    run(f"train.py {QUICK} --data {trained}/out/data --steps 2 --save-every 1")
    assert loaded == ["pixel"]


@pytest.mark.parametrize("flags, copies", [("", 8), ("--keep-every 1", 10)])
def test_a_disk_without_room_for_checkpoints_is_refused_at_the_start(
    trained, monkeypatch, flags, copies
):
    config = SiTConfig(**load(trained / "out/ckpt.pt")["config"])
    size = copies * 4 * sum(p.numel() for p in SiT(config).parameters())
    free = argparse.Namespace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    monkeypatch.setattr(train, "train", no_step)
    command = f"train.py {QUICK} --data {trained}/out/data --steps 2 --no-preview {flags}"
    line = run(command, fails=True)
    assert f"the checkpoints of this run need {size / 1e9:.1f} GB more" in line
    free.free = size
    with pytest.raises(AssertionError, match="a step was begun"):
        run(command)


def test_out_of_memory_is_one_line_that_names_micro_batch(trained, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(train, "flow_loss", no_memory)
    line = run(f"train.py {QUICK} --data {trained}/out/data", fails=True)
    assert "too little memory for micro-batches of 16 images (4 tokens each)" in line
    assert "a smaller --micro-batch" in line


# ----------------------------------------------------------------------------------------- machines


@pytest.mark.parametrize("found", [None, "triton"])
def test_without_triton_the_network_is_not_compiled_and_that_is_said(monkeypatch, capsys, found):
    monkeypatch.setattr(train, "find_spec", {"triton": found}.get)
    monkeypatch.setattr(torch, "compile", lambda model: "compiled")
    net = train.wrapped("model", argparse.Namespace(compile=None), torch.device("cuda:0"))
    assert net == ("model" if found is None else "compiled")
    said = "Triton is not installed: the network is not compiled, and needs more memory\n"
    assert capsys.readouterr().out == (said if found is None else "")


LAUNCHES = {
    "RANK=0": "RANK in the environment without WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    "WORLD_SIZE=8": "WORLD_SIZE in the environment without RANK, MASTER_ADDR, MASTER_PORT",
    "RANK=a WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=1": "RANK is 'a' in the environment",
    "RANK=0 WORLD_SIZE= MASTER_ADDR=localhost MASTER_PORT=1": "WORLD_SIZE is '' in the environment",
}


@pytest.mark.parametrize("variables, message", LAUNCHES.items())
def test_an_incomplete_environment_of_torchrun_is_one_line(monkeypatch, variables, message):
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    assert message in run("train.py --device cpu", fails=True)


def test_a_local_rank_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    assert "LOCAL_RANK is 'first' in the environment" in run("train.py --device cuda", fails=True)


# ----------------------------------------------------------------------------- one writer at a time


@contextmanager
def training(out, data, steps=9999, **options):
    """A training in a process of its own, from its first checkpoint on."""
    command = f"train.py {QUICK} --steps {steps} --decay 0 0 --save-every 1 --no-preview"
    process = start(f"{command} --data {data} --out {out}", **options)
    wait_for(lambda: os.path.exists(f"{out}/ckpt.pt"), process)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_training_with_the_same_out_is_refused_and_the_first_goes_on(trained):
    with training("out", trained / "out/data") as first:
        line = run(f"train.py {QUICK} --resume --data {trained}/out/data", fails=True)
        assert f"train.py (process {first.pid} on " in line
        assert "is writing to out: wait, or name another --out" in line
        first.send_signal(signal.SIGTERM)
        text, _ = first.communicate()
        assert "stopped by a signal" in text
    assert not os.path.exists("out/.lock")


def test_a_training_that_was_killed_can_be_resumed_at_once(trained):
    with training("out", trained / "out/data") as first:
        first.send_signal(signal.SIGKILL)
        first.communicate()
        steps = load("out/ckpt.pt")["step"] + 1
        run(f"train.py --resume --steps {steps} --device cpu")
    assert load("out/ckpt.pt")["step"] == steps


def test_of_two_refused_processes_the_first_alone_says_so(trained):
    shutil.copytree(trained / "out", "out")
    with memory.one_writer("out"):
        code, _, err = run_apart(f"train.py {QUICK} --resume --steps 9", processes=2)
    assert code == 1  # torchrun's
    assert len([line for line in err.splitlines() if line.startswith("train.py: error:")]) == 1
    assert len(re.findall(r"exitcode *: 2", err)) >= 1
    assert "Error:" not in err.replace("ChildFailedError:", "")


SLOW_SAVE = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import datetime
import torch.distributed as dist
import memory, train

def impatient(*args, begin=dist.init_process_group, **options):
    begin(*args, timeout=datetime.timedelta(seconds=5), **options)

def slow_save(trainer, *args, save=train.Trainer.save):
    if trainer.step == 2:
        time.sleep(12)
    save(trainer, *args)

dist.init_process_group = impatient
train.Trainer.save = slow_save
memory.cli(train.main)
"""


def test_other_processes_wait_for_a_save_that_takes_longer_than_their_patience(trained):
    Path("slow.py").write_text(SLOW_SAVE)
    flags = f"{QUICK} --steps 3 --save-every 2 --no-preview --data {trained}/out/data"
    code, _, err = run_apart(f"{Path('slow.py').absolute()} {HERE} {flags}", processes=2)
    assert code == 0, err
    assert load("out/ckpt.pt")["step"] == 3


# ---------------------------------------------------------------------------------------- bad input


def test_a_training_with_skip_bad_leaves_out_files_that_do_not_decode(with_bad_files):
    assert memory.read_json(with_bad_files / "ok/data/meta.json")["images"] == 6  # of 9


# flags -> what the message holds
BAD_TRAIN = {
    # what is not a setting, or no value of one
    "--nonsense": "unrecognized arguments: --nonsense",
    "--model SiT-Q": "--model: invalid choice: 'SiT-Q' (choose from",
    "--cond-drop-prob 2": "--cond-drop-prob: 2 is not in [0, 1)",
    "--lr nan": "--lr: nan is not in",
    "--image-size 0": "--image-size: 0 is not in [1, inf)",
    "--steps x": "invalid whole number value: 'x'",
    "--batch-size -4": "--batch-size: -4 is not in",
    "--micro-batch 48": "--micro-batch 48 does not divide 128",
    "--memory-scale centred": "--memory-scale",
    "--steps 9999 --decay 100 200": "--decay A B",
    "--device cuda:99": "--device cuda:99 is unavailable",
    # of data
    "--data nowhere": "nowhere does not exist",
    "--data empty": "no images",
    "--data images": "3 of 9 files in",
    "--data f.npy": "float32 (4, 8, 8, 3); expected are images, uint8",
    "--data t.npy": "t.npy is not an .npy file of numbers",
    "--data t.npz": "t.npz is not an .npz of arrays, or damaged",
    "--data other.npz": "holds x; images are expected under arr_0",
    "--data labels.npz": "labels int64 (3,) for 4 images",
    "--image-size 24": "24 is no multiple of 16, SiT-T/16's patch",
    "--align 0.5": "has no patch tokens",
    # of a prepared folder
    "--data ok/data --rank 8": "was prepared with rank 64, not 8",
    "--data ok/data --image-size 32": "was prepared with image_size 16, not 32",
    "--data ok/data --flip": "was prepared with flip False, not True",
    # of a run that is there
    "--out ok": "--resume goes on",
    "--resume --out ok --batch-size 32": "cannot go on with batch_size 32, not 16",
    "--resume --out ok --model SiT-T/4": "cannot go on with model SiT-T/4, not SiT-T/8",
    "--resume --out ok --preset imagenet256-b": "cannot go on with preset imagenet256-b, not glyphs",
    "--resume --out ok --steps 3": "--decay A B",
}


@pytest.mark.parametrize("flags, message", BAD_TRAIN.items())
def test_bad_input_of_train_py(with_bad_files, monkeypatch, flags, message):
    command = f"train.py {flags}"
    if "--out" not in flags:
        command = f"{command} --out out"
    assert_refused(with_bad_files, command, message, monkeypatch)


def test_bad_input_of_a_process_is_one_line_and_exit_code_2(tmp_path):
    line = run("train.py --model SiT-Q", processes=1, fails=True)
    assert "invalid choice: 'SiT-Q'" in line
    assert list(tmp_path.iterdir()) == []


# ======================================================================================== sample.py

CLASSES = ["class0", "class1"]


def images_by(checkpoint, ids, s=None, **options):
    """The images (N, H, W, 3) that generate makes with the network of a checkpoint, as integers."""
    x = generate(load_sit(checkpoint), ids, s, **options)
    return decode(x, checkpoint["meta"], Pixels()).astype(int)


def assert_same_images(a, b):
    """Two arrays of images differ by rounding alone."""
    assert np.abs(a - b).max() <= 1


@pytest.fixture(scope="session")
def sampled(trained, tmp_path_factory):
    """A copy of the folder of `trained`, with random weights, and with ten images twice: in a.npz,
    made in batches of 4, and in b.npz, made in batches of 3 by two processes."""
    folder = tmp_path_factory.mktemp("sampled") / "copy"
    shutil.copytree(trained, folder)
    give_random_weights(folder / "out/ckpt.pt")
    command = (
        f"sample.py --ckpt {folder}/out/ckpt.pt --num-images 10 --steps 3 --device cpu "
        "--method sde-heun --cfg 1.5 --cfg-interval 0.2 1 --mask 0.3 --seed 5"
    )
    run(f"{command} --out {folder}/a.npz --batch-size 4")
    run(f"{command} --out {folder}/b.npz --batch-size 3", processes=2)
    return folder


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """A folder with a short training on the default data, o (on 1,300 of these letters, to save
    time), and with three digits, 0.png to 2.png."""

    def fewer_glyphs(**options):
        return glyphs(n=1300, **options)

    folder = tmp_path_factory.mktemp("letters")
    digits, _ = glyphs(n=3, size=32, characters="357")
    for i, image in enumerate(digits):
        Image.fromarray(image).save(folder / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "glyphs", fewer_glyphs)
        run(f"train.py --steps 40 --batch-size 64 --no-preview --device cpu --out {folder}/o")
    return folder


def medians(text):
    """What --audit prints -> {between which images: median of the distances}"""
    found = re.findall(r"^(.+?) +median ([\d.]+), least", text, re.MULTILINE)
    return {what: float(value) for what, value in found}


# ----------------------------------------------------------------------------------------- generate


def tiny_latents(**options):
    """Two latents of a tiny network with random weights, memory and labels."""
    network = randomised(SiT(SiTConfig(**TINY, memory_dim=16, num_classes=3)))
    given = {"ids": [4, 7], "s": features(2, 16), "y": torch.tensor([2, 0]), "steps": 3}
    return generate(network, **{**given, **options})


@pytest.mark.parametrize(
    "option",
    [
        {"ids": [4, 8]},
        {"s": features(2, 16, seed=1)},
        {"y": torch.tensor([2, 1])},
        {"seed": 1},
        {"method": "euler"},
        {"method": "sde-heun"},
        {"steps": 4},
        {"shift": 0.3},
        {"cfg": 3.0},
        {"mask": 0.5},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_option_of_generate_matters(option):
    assert not torch.allclose(tiny_latents(), tiny_latents(**option), rtol=0, atol=1e-4)


def test_guidance_outside_of_all_times_is_none():
    assert torch.equal(tiny_latents(), tiny_latents(cfg=3.0, cfg_interval=(1.5, 2.0)))


@pytest.mark.parametrize("method", ["huen", "sde-huen"])
def test_an_unknown_method_is_refused(method):
    refused("huen", tiny_latents, method=method)


class Seen(nn.Module):
    """A network that keeps the snippets it is shown, and whose velocity is 0."""

    def __init__(self, mean):
        super().__init__()
        self.config = SiTConfig(**TINY, memory_dim=len(mean), memory_center=True)
        self.memory_mean = nn.Parameter(mean, requires_grad=False)

    def forward(self, x, t, s=None, y=None):
        self.s = s
        return torch.zeros_like(x)


def test_a_mask_sets_entries_of_centred_snippets_to_the_mean():
    s = features(3, 16)
    mean = features(40, 16).mean(0)
    network = Seen(mean)
    generate(network, range(3), s, steps=1, mask=0.25)
    shown = network.s - mean
    kept = shown.abs() > 1e-6
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(shown[kept], ((s - mean) / 0.75)[kept], rtol=1e-4, atol=1e-5)


def test_the_mask_of_an_image_depends_on_its_number_alone():
    s = features(3, 16)
    network = Seen(torch.zeros(16))
    generate(network, [5, 6, 7], s, steps=1, mask=0.25)
    together = network.s
    generate(network, [6], s[1:2], steps=1, mask=0.25)
    assert torch.equal(network.s, together[1:2])
    assert not torch.equal(together[0] == 0, together[1] == 0)


# --------------------------------------------------------------------------- images of a checkpoint


def test_a_checkpoint_names_its_bank_relative_to_its_own_folder(sampled):
    checkpoint = load(sampled / "out/ckpt.pt")
    assert not os.path.isabs(checkpoint["bank"])
    bank = MemoryBank.load(sampled / "out" / checkpoint["bank"])
    assert checkpoint["meta"]["bank"] == bank.id


@pytest.mark.parametrize("out", ["imgs/", "samples_cfg1.5", "./a/../b"])
def test_images_are_written_to_a_folder_by_any_name(sampled, out):
    run(f"sample.py --ckpt {sampled}/out/ --num-images 2 --steps 1 --device cpu --out {out}")
    assert sorted(os.listdir(os.path.normpath(out))) == ["000000.png", "000001.png"]


def test_ten_images_are_ten_different_ones(sampled):
    images = images_of(sampled / "a.npz")
    assert images.shape == (10, 16, 16, 3)
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10


def test_an_image_depends_on_neither_batch_size_nor_processes(sampled):
    assert_same_images(images_of(sampled / "a.npz"), images_of(sampled / "b.npz"))


def test_generate_makes_the_images_of_the_command_line(sampled):
    ids = [7, 3]
    bank = MemoryBank.load(sampled / "out/data/bank.pt")
    expected = images_by(
        load(sampled / "out/ckpt.pt"),
        ids,
        bank[draw_rows(ids, 5, len(bank))],
        seed=5,
        method="sde-heun",
        steps=3,
        cfg=1.5,
        cfg_interval=(0.2, 1.0),
        mask=0.3,
    )
    assert_same_images(images_of(sampled / "a.npz")[ids], expected)


def test_sampling_leaves_nothing_but_its_images(sampled):
    assert sorted(os.listdir(sampled)) == ["a.npz", "b.npz", "images", "out"]


def test_a_checkpoint_of_the_ema_weights_alone_gives_the_same_images(sampled):
    checkpoint = load(sampled / "out/ckpt.pt")
    published = {key: checkpoint[key] for key in ("config", "meta", "bank", "ema")}
    shutil.copytree(sampled / "out/data", "data")
    torch.save(published, "published.pt")
    ask = "--num-images 3 --steps 2 --device cpu"
    run(f"sample.py --ckpt {sampled}/out/ckpt.pt {ask} --out whole.npz")
    run(f"sample.py --ckpt published.pt {ask} --out published.npz")
    assert (images_of("whole.npz") == images_of("published.npz")).all()


def test_the_same_command_may_write_its_folder_again(letters):
    command = (
        f"sample.py --ckpt {letters}/o --steps 1 --device cpu --out pngs --num-images 2 "
        f"--add {letters}/0.png {letters}/1.png"
    )
    run(command)
    run(command)
    assert sorted(os.listdir("pngs")) == [f"{i:06d}.png" for i in range(6)]


def test_float32_is_the_default_on_a_cpu_and_bfloat16_differs_by_rounding(letters):
    command = f"sample.py --ckpt {letters}/o --num-images 4 --steps 4 --device cpu"
    run(f"{command} --out default.npz")
    run(f"{command} --out float32.npz --dtype float32")
    run(f"{command} --out bfloat16.npz --dtype bfloat16")
    exact = images_of("float32.npz")
    assert (images_of("default.npz") == exact).all()
    difference = np.abs(images_of("bfloat16.npz") - exact)
    assert difference.max() > 0
    assert difference.mean() < 1


def test_sampling_goes_on_after_a_kill(trained):
    command = f"sample.py --ckpt {trained}/out --num-images 40 --batch-size 2 --steps 4"
    kill_in_the_middle(f"{command} --out killed.npz", "killed.npz.parts/done.npy")
    assert not os.path.isfile("killed.npz")
    assert "are done already" in run(f"{command} --out killed.npz")
    run(f"{command} --out whole.npz")
    assert Path("killed.npz").read_bytes() == Path("whole.npz").read_bytes()
    assert not os.path.exists("killed.npz.parts")


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("label", [0, 1])
def test_a_folder_of_pngs_of_one_label_are_the_images_that_generate_makes(baselines, label):
    run(f"sample.py --ckpt {baselines}/class --label {label} --num-images 2 --steps 2 --out pngs")
    assert sorted(os.listdir("pngs")) == ["000000.png", "000001.png"]
    checkpoint = load(baselines / "class/ckpt.pt")
    expected = images_by(checkpoint, [0, 1], y=torch.tensor([label, label]), steps=2)
    for i in (0, 1):
        assert_same_images(expected[i], read_png(f"pngs/00000{i}.png"))


def test_images_depend_on_the_label(baselines):
    for label in (0, 1):
        run(
            f"sample.py --ckpt {baselines}/class --label {label} --num-images 2 --steps 2 "
            f"--out {label}.npz"
        )
    assert np.abs(images_of("0.npz") - images_of("1.npz")).mean() > 1


def test_images_of_a_model_of_labels_have_the_labels_that_are_drawn(baselines):
    ids = range(8)
    run(f"sample.py --ckpt {baselines}/class --num-images 8 --steps 2 --seed 3 --out y.npz")
    checkpoint = load(baselines / "class/ckpt.pt")
    labels = np.sort(np.load(baselines / "class/data/labels.npy"))
    y = torch.from_numpy(labels[draw_rows(ids, 3, len(labels))])
    assert y.unique().tolist() == [0, 1]
    assert_same_images(images_of("y.npz"), images_by(checkpoint, ids, y=y, seed=3, steps=2))


def test_labels_are_drawn_as_often_as_there_are_images_of_each():
    args = argparse.Namespace(label=None, seed=0)
    labels = sample.draw_labels(args, range(3000), CLASSES, [1, 0, 3, 6])
    often = torch.bincount(labels, minlength=4) / 3000
    assert often[1] == 0
    assert (often - torch.tensor([0.1, 0.0, 0.3, 0.6])).abs().max() < 0.03


@pytest.mark.parametrize("label", ["class1", "1"])
def test_rows_of_a_label_are_all_of_this_class_and_no_others(label):
    labels = np.arange(30) % 3
    bank = MemoryBank.build(features(30, 16), 4, labels=labels)
    args = argparse.Namespace(seed=0, label=label)
    rows = sample.bank_rows(args, range(300), ["class0", "class1", "class2"], bank)
    assert rows.shape == (300,)
    assert sorted(set(rows.tolist())) == np.flatnonzero(labels == 1).tolist()


def test_a_class_without_a_row_in_the_bank_is_refused():
    bank = MemoryBank.build(features(30, 16), 4, labels=np.arange(30) % 2 * 2)
    args = argparse.Namespace(seed=0, label="b")
    message = "--label b: no such class; there are a, c"
    refused(message, sample.bank_rows, args, range(3), list("abc"), bank)


SIX_IMAGES = "--num-images 6 --steps 2 --device cpu --seed 5"


@pytest.mark.parametrize("label", ["class1", "1"])
def test_images_of_a_class_are_made_of_the_snippets_of_its_rows(sampled, label):
    run(f"sample.py --ckpt {sampled}/out {SIX_IMAGES} --label {label} --out a.npz")
    checkpoint = load(sampled / "out/ckpt.pt")
    bank = MemoryBank.load(sampled / "out/data/bank.pt")
    of_class = np.flatnonzero(bank.labels == 1)
    rows = of_class[draw_rows(range(6), 5, len(of_class))]
    expected = images_by(checkpoint, range(6), bank[rows], seed=5, steps=2)
    assert_same_images(images_of("a.npz"), expected)


# --------------------------------------------------------------------- external and internal memory


@pytest.fixture(scope="session")
def added(letters, tmp_path_factory):
    """A folder with a.npz, five images of each of the digits 0.png and 2.png, and with the bank
    that these extend, more.pt."""
    folder = tmp_path_factory.mktemp("added")
    run(
        f"sample.py --ckpt {letters}/o --steps 4 --device cpu --out {folder}/a.npz --num-images 5 "
        f"--add {letters}/0.png {letters}/2.png --save-bank {folder}/more.pt"
    )
    return folder


def thumbnails(*paths):
    """Image files -> their snippets, computed from the images alone."""
    images = torch.from_numpy(np.stack([read_png(path) for path in paths]))
    return F.normalize(thumbnail(to_float(images)), dim=1)


def test_a_row_of_added_images_begins_with_the_image(letters, added):
    rows = images_of(added / "a.npz").reshape(2, 6, 32, 32, 3)
    assert (rows[0, 0] == read_png(letters / "0.png")).all()
    assert (rows[1, 0] == read_png(letters / "2.png")).all()


def test_the_bank_that_is_saved_holds_the_old_snippets_and_the_added_ones(letters, added):
    bank = MemoryBank.load(letters / "o/data/bank.pt")
    more = MemoryBank.load(added / "more.pt")
    assert len(more) == len(bank) + 2
    assert torch.allclose(more[: len(bank)], bank[:], atol=1e-6)


def test_an_added_snippet_is_kept_exactly(letters, added):
    s = thumbnails(letters / "0.png", letters / "2.png")
    bank = MemoryBank.load(letters / "o/data/bank.pt")
    more = MemoryBank.load(added / "more.pt")
    assert ((s * more[-2:]).sum(1) > 0.999).all()
    cosine, _ = bank.nearest(s)
    assert (cosine < 0.999).all()  # it was not there before


@pytest.mark.parametrize("row", [0, 1])
def test_the_images_of_a_row_have_its_snippet_and_noises_from_0_on(letters, added, row):
    rows = images_of(added / "a.npz").reshape(2, 6, 32, 32, 3)
    more = MemoryBank.load(added / "more.pt")
    checkpoint = load(letters / "o/ckpt.pt")
    s = more[len(more) - 2 + row].expand(5, -1)
    assert_same_images(rows[row, 1:], images_by(checkpoint, range(5), s, steps=4))


@pytest.fixture(scope="session")
def mixed(letters, tmp_path_factory):
    """m.npz: five images on the chord from row 7 of the bank to the digit 1.png."""
    folder = tmp_path_factory.mktemp("mixed")
    run(
        f"sample.py --ckpt {letters}/o --steps 4 --device cpu --out {folder}/m.npz --num-images 5 "
        f"--mix 7 {letters}/1.png --mix-method lerp"
    )
    return folder / "m.npz"


def test_mixed_images_go_away_from_the_first_step_by_step(mixed):
    images = images_of(mixed)
    far = np.abs(images - images[:1]).mean((1, 2, 3))
    assert far[0] == 0
    assert (np.diff(far) > 0).all()


def test_mixed_images_begin_at_the_bank_row_and_end_at_the_exact_snippet_of_the_image(
    letters, mixed
):
    checkpoint = load(letters / "o/ckpt.pt")
    bank = MemoryBank.load(letters / "o/data/bank.pt")
    s = torch.cat([bank[[7]], thumbnails(letters / "1.png")])
    expected = images_by(checkpoint, [0, 0], s, steps=4)  # one noise
    assert_same_images(images_of(mixed)[[0, -1]], expected)


def test_a_mix_gives_the_unit_norm_feature_of_an_image_to_the_network(letters, monkeypatch):
    snippets = []

    def generate_noted(model, ids, s, *more, **options):
        snippets.append(s)
        return generate(model, ids, s, *more, **options)

    monkeypatch.setattr(sample, "generate", generate_noted)
    run(
        f"sample.py --ckpt {letters}/o --steps 1 --device cpu --out m.png --num-images 2 "
        f"--mix {letters}/0.png {letters}/1.png"
    )
    (given,) = snippets
    expected = thumbnails(letters / "0.png", letters / "1.png")
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- new snippets


@pytest.fixture(scope="session")
def new(sampled, tmp_path_factory):
    """A folder with six images of new snippets, a.npz, made in batches of 4 of the training in
    `sampled`, and with what was printed, new.txt."""
    folder = tmp_path_factory.mktemp("new")
    text = run(
        f"sample.py --ckpt {sampled}/out --new {SIX_IMAGES} --batch-size 4 --out {folder}/a.npz"
    )
    (folder / "new.txt").write_text(text)
    return folder


def new_snippets_of(bank, ids, seed=5, spread=1.0):
    """The new snippets that sample.py makes of the rows ids of a bank."""
    args = argparse.Namespace(seed=seed, spread=spread)
    return sample.new_snippets(args, list(ids), torch.tensor(list(ids)), bank, CPU)


@pytest.fixture
def letters_bank():
    """The bank of 260 letters, with their labels."""
    images, labels = glyphs(n=260, size=32)
    f = thumbnail(to_float(torch.from_numpy(images)))
    return MemoryBank.build(f, 32, labels=labels)


def test_new_images_are_different_ones(new):
    images = images_of(new / "a.npz")
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6


def test_a_new_image_depends_on_neither_batch_size_nor_number_nor_processes(sampled, new):
    more = SIX_IMAGES.replace("--num-images 6", "--num-images 9")
    run(f"sample.py --ckpt {sampled}/out --new {more} --batch-size 2 --out more.npz", processes=2)
    assert_same_images(images_of("more.npz")[:6], images_of(new / "a.npz"))


def test_new_snippets_depend_on_the_seed_and_grow_apart_with_the_spread(letters_bank):
    s = new_snippets_of(letters_bank, range(40), seed=5)
    other = new_snippets_of(letters_bank, range(40), seed=6)
    assert (distances(s, other) > 0.01).all()
    wide = new_snippets_of(letters_bank, range(40), seed=5, spread=2.0)
    rows = letters_bank[range(40)]
    assert distances(wide, rows).mean() > 1.5 * distances(s, rows).mean()


def test_new_images_are_generated_from_snippets_around_drawn_rows(sampled, new):
    checkpoint = load(sampled / "out/ckpt.pt")
    bank = MemoryBank.load(sampled / "out/data/bank.pt")
    noise = []
    for i in range(6):
        seed = np.random.SeedSequence([3, 5, i]).generate_state(1, np.uint64)[0]
        noise.append(torch.randn(10, generator=torch.Generator().manual_seed(int(seed))))
    s = bank.around(draw_rows(range(6), 5, len(bank)), torch.stack(noise))
    expected = images_by(checkpoint, range(6), s, seed=5, steps=2)
    assert_same_images(images_of(new / "a.npz"), expected)


def test_new_snippets_are_no_rows_of_the_bank_and_no_farther_than_rows_are(letters_bank, capsys):
    new_snippets_of(letters_bank, range(260))
    printed = re.search(r"nearest other row: ([\d.]+) ", capsys.readouterr().out)
    s = new_snippets_of(letters_bank, range(260))
    rows = letters_bank[:]
    to_rows = torch.cdist(s, rows).amin(1).median()
    between_rows = torch.cdist(rows, rows).fill_diagonal_(9).amin(1).median()
    assert float(printed[1]) == pytest.approx((to_rows / between_rows).item(), abs=0.01)
    assert 0.3 < float(printed[1]) < 1.5


def test_new_images_of_a_class_are_around_rows_of_this_class(sampled):
    command = f"sample.py --ckpt {sampled}/out --new {SIX_IMAGES}"
    run(f"{command} --label class1 --out name.npz")
    run(f"{command} --label 1 --out number.npz")
    run(f"{command} --label 0 --out other.npz")
    images = images_of("name.npz")
    assert (images_of("number.npz") == images).all()
    assert (images_of("other.npz") != images).any((1, 2, 3)).all()


def test_snippets_added_to_a_bank_are_used_for_new_snippets_at_once(letters_bank):
    digits, _ = glyphs(n=20, size=32, characters="5")
    more = letters_bank.extend(thumbnail(to_float(torch.from_numpy(digits))), labels=[99] * 20)
    s = new_snippets_of(more, range(260, 280))
    _, index = more.nearest(s)
    assert (more.labels[index[:, 0].numpy()] == 99).mean() > 0.7  # 20 of 280 rows


# ---------------------------------------------------------------------------------------- the audit


@pytest.fixture(scope="session")
def audited(letters, tmp_path_factory):
    """A folder with audit.png, of 20 images by two processes and of the digit 1.png as one that was
    held out, and with what was printed, audit.txt."""
    folder = tmp_path_factory.mktemp("audited")
    os.mkdir(folder / "held-out")
    shutil.copy(letters / "1.png", folder / "held-out")
    text = run(
        f"sample.py --ckpt {letters}/o --steps 4 --device cpu --out {folder}/audit.png "
        f"--audit {folder}/held-out --num-images 20",
        processes=2,
    )
    (folder / "audit.txt").write_text(text)
    return folder


def test_audit_prints_the_distance_of_held_out_images(letters, audited):
    data = np.load(letters / "o/data/latents.npy").reshape(1300, -1) / 127.5 - 1
    image = read_png(letters / "1.png").transpose(2, 0, 1).reshape(-1) / 127.5 - 1
    distance = np.sqrt(((data - image) ** 2).mean(1))
    printed = medians((audited / "audit.txt").read_text())
    held_out = printed["held-out image to the nearest training image"]
    assert held_out == pytest.approx(distance.min(), abs=2e-3)


def test_audit_finds_no_image_nearer_than_the_nearest(audited):
    printed = medians((audited / "audit.txt").read_text())
    assert len(printed) == 4
    nearest = printed["generated image to the nearest training image"]
    own = printed["generated image to the image of its snippet"]
    assert 0 < nearest <= own


def test_audit_shows_three_rows_of_images(audited):
    assert Image.open(audited / "audit.png").size == (16 * 64, 3 * 64)


def test_audit_of_a_training_on_glyphs_holds_out_glyphs_of_another_seed(letters):
    text = run(f"sample.py --ckpt {letters}/o --steps 1 --device cpu --num-images 12 --audit")
    data = np.load(letters / "o/data/latents.npy").reshape(1300, -1) / 127.5 - 1
    fresh, _ = glyphs(n=12, size=32, seed=1)
    fresh = fresh.transpose(0, 3, 1, 2).reshape(12, -1) / 127.5 - 1
    nearest = []
    for image in fresh:
        nearest.append(np.sqrt(((data - image) ** 2).mean(1)).min())
    held_out = medians(text)["held-out image to the nearest training image"]
    assert held_out == pytest.approx(np.sort(nearest)[5], abs=2e-3)  # torch's: the lower of the two


def test_audit_of_a_bank_of_one_row_is_refused(sampled):
    MemoryBank.build(features(2, 768)[:1], 1, encoder="thumbnail").save("one.pt")
    line = run(f"sample.py --ckpt {sampled}/out --bank one.pt --out a.png --audit", fails=True)
    assert "--audit compares the rows of a bank; one.pt has only one" in line


def test_audit_without_images_of_a_training_on_images_holds_out_none(sampled):
    text = run(f"sample.py --ckpt {sampled}/out --steps 1 --num-images 4 --out a.png --audit")
    assert len(medians(text)) == 3
    assert "held-out" not in text


def test_audit_of_new_images_knows_no_image_of_their_snippet(sampled):
    folder_of_images("held-out", 12, 16)
    text = run(f"sample.py --ckpt {sampled}/out --new {SIX_IMAGES} --out a.png --audit held-out")
    printed = medians(text)
    assert set(printed) == {
        "generated image to the nearest training image",
        "training image to the nearest other one",
        "held-out image to the nearest training image",
    }
    assert "image of its snippet" not in text
    relative = float(re.search("ratio of these two medians: ([\\d.]+)", text)[1])
    generated = printed["generated image to the nearest training image"]
    assert relative == pytest.approx(
        generated / printed["training image to the nearest other one"], abs=0.02
    )
    assert Image.open("a.png").size == (6 * 64, 2 * 64)  # the images, below them the nearest


def test_a_grid_may_end_in_capitals(sampled):
    run(f"sample.py --ckpt {sampled}/out {SIX_IMAGES} --out grid.PNG")
    assert Image.open("grid.PNG").size == (2 * 64, 3 * 64)


def test_audit_into_a_folder_replaces_the_images_of_an_audit_before(sampled):
    command = f"sample.py --ckpt {sampled}/out {SIX_IMAGES} --out pictures --audit"
    run(command)
    names = sorted(os.listdir("pictures"))
    assert len(names) == 18  # each image, that of its snippet, the nearest one
    run(command)
    assert sorted(os.listdir("pictures")) == names
    line = run(command.removesuffix(" --audit"), fails=True)  # 12 of the 18 would stay
    assert "the folder holds other files" in line


def test_distances_to_the_nearest_latents_are_those_of_all_comparisons():
    data = features(2500, 12).numpy()
    x = features(5, 12, seed=1)
    distance, rows = sample.nearest_latents(x, data, (0, 1))
    every = ((x[:, None] - torch.tensor(data)) ** 2).mean(2).sqrt()
    assert torch.allclose(distance, every.topk(2, largest=False).values, atol=1e-6)
    assert torch.equal(rows, every.topk(2, largest=False).indices)


# --------------------------------------------------- latents of an autoencoder and official weights


@pytest.fixture(scope="session")
def aligned(encoded):
    """encoded, and o/ckpt.pt of two steps with alignment; in official.pt and stats.pt its EMA
    weights and the statistics of the latents, as the official files have them."""
    data = encoded.folder / "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(encoded.folder)
        flags = "--batch-size 2 --steps 2 --no-preview --align 0.5 --model LightningDiT-S/1 --memory-scale 1"
        run(f"train.py {flags} --out o --data", data)
        weights = {f"module.{key}": value for key, value in load("o/ckpt.pt")["ema"].items()}
        torch.save({"ema": weights}, "official.pt")
        stats = {name: torch.tensor(encoded.meta[name]) for name in ("mean", "std")}
        stats = {name: value.view(1, 4, 1, 1) for name, value in stats.items()}
        torch.save(stats, "stats.pt")
    return encoded


def test_an_official_file_without_a_tokenizer_is_refused(aligned):
    ask = "--num-images 2 --steps 1 --device cpu --out b.npz"
    line = run(f"sample.py --ckpt {aligned.folder}/official.pt {ask}", fails=True)
    assert "name --tokenizer" in line


def test_an_official_file_gives_the_images_of_the_same_weights_in_a_checkpoint(aligned):
    folder = aligned.folder
    ask = "--num-images 2 --steps 1 --device cpu --out"
    run(f"sample.py --ckpt {folder}/o/ckpt.pt {ask} a.npz")
    run(
        f"sample.py --ckpt {folder}/official.pt --tokenizer {folder}/vae.pt "
        f"--bank {folder}/0/bank.pt --latent-stats {folder}/stats.pt {ask} b.npz"
    )
    a = images_of("a.npz")
    b = images_of("b.npz")
    assert a.shape == (2, 32, 32, 3)
    assert np.abs(a - b).max() <= 1
    assert a.std() > 5  # they show something


SAMPLE_MODES = {  # of sample.py -> the number of images
    "": 3,
    "--new": 3,
    "--add {images}/class0/000.png": 4,
    "--mix 1 {images}/class0/000.png": 3,
}


@pytest.mark.parametrize("mode", SAMPLE_MODES)
def test_every_mode_of_sample_py_works_on_latents_of_an_autoencoder(aligned, mode):
    folder = aligned.folder
    flags = mode.format(images=folder / "images")
    ask = f"--ckpt {folder}/o --num-images 3 --steps 1 --device cpu"
    run(f"sample.py {ask} {flags} --out a.npz")
    assert images_of("a.npz").shape == (SAMPLE_MODES[mode], 32, 32, 3)


def test_audit_works_on_latents_of_an_autoencoder(aligned):
    folder = aligned.folder
    ask = f"--ckpt {folder}/o --num-images 3 --steps 1 --device cpu --out a.png"
    text = run(f"sample.py {ask} --audit {folder}/images")
    assert len(medians(text)) == 4
    assert Image.open("a.png").size == (3 * 64, 3 * 64)


# ---------------------------------------------------------------------------------------- bad input

BAD_SAMPLE = {
    # of flags
    "--ckpt c --shift 0.3 --method sde-heun": "--shift 0.3 is of",
    f"--ckpt ok --out out --seed {2**64}": "--seed: 18446744073709551616 is not in [0, ",
    "--ckpt ok --out s.jpg": "neither a .png nor an .npz",
    "--ckpt ok --out out --num-images 0": "--num-images: 0 is not in",
    "--ckpt ok --out out --cfg nan": "--cfg: nan is not in",
    "--ckpt ok --out out --add images --audit": "exclude each other",
    "--ckpt ok --out out --new --add images": "--new and --add exclude each other",
    "--ckpt ok --out out --new --mix 0 1": "--new and --mix exclude each other",
    "--ckpt ok --out out --method heunn": "--method: invalid choice: 'heunn'",
    "--out out": "--ckpt",
    # of checkpoints and banks
    "--ckpt nowhere.pt": "nowhere.pt is no file",
    "--ckpt c.pt": "a checkpoint of no SiT",
    "--ckpt y.pt": "unexpected keyword argument 'width'",
    "--ckpt x.pt": "x.pt holds an object that is neither weights nor numbers",
    "--ckpt ok --out out --bank bank.pt": "have 80 numbers, not 768",
    "--ckpt ok --out out --bank another.pt": "of another, the model was trained on thumbnail",
    # of what the model has
    "--ckpt ok --out out --label 2": "--label 2: no such class; there are class0, class1",
    "--ckpt ok --out out --label A": "--label A: no such class; there are class0, class1",
    "--ckpt ok --out out --label 0 --bank unlabelled.pt": "--label 0: the bank has no labels",
    "--ckpt ok --out out --label 0 --mix 0 1": "--label 0: the snippets of --add and --mix are given",
    "--ckpt ok --out out --label 0 --add images": (
        "--label 0: the snippets of --add and --mix are given"
    ),
    "--ckpt class --out out --label 2": "--label 2: no such class; there are class0, class1",
    "--ckpt none --out out --label 0": "--label 0: this model has neither memory nor labels",
    "--ckpt class --out out --new": "--new: this model has no memory",
    "--ckpt none --out out --cfg 3": "--cfg 3.0: this model has neither memory nor labels",
    "--ckpt none --out out --mask 0.5": "--mask: this model has no memory",
    "--ckpt class --out out --mask 0.5": "--mask: this model has no memory",
    "--ckpt class --out out --add images": "--add: this model has no memory",
    "--ckpt class --out out --mix 0 1": "--mix: this model has no memory",
    "--ckpt class --out out --audit": "--audit: this model has no memory",
    # of images
    "--ckpt ok --out out --mix 0 6": "--mix 6 is no file, and no row of 6 in the bank",
    "--ckpt ok --out out --mix a.png 0": "a.png",
    "--ckpt ok --out out --add empty": "no images",
    "--ckpt ok --num-images 1 --out file": "file",
    "--ckpt ok --spread 0.5": "--spread goes with --new",
    "--ckpt ok --mix-method lerp": "--mix-method goes with --mix",
    "--ckpt ok --num-images 1 --out ok/data": "the folder holds other files, such as",
    "--ckpt ok --num-images 1 --out ok/data --add images/class0/000.png --save-bank more.pt": (
        "the folder holds other files, such as"
    ),
}


@pytest.mark.parametrize("flags, message", BAD_SAMPLE.items())
def test_bad_input_of_sample_py(with_bad_files, monkeypatch, flags, message):
    assert_refused(with_bad_files, f"sample.py {flags}", message, monkeypatch)


# =========================================================================================== fid.py

FID_IMAGES = np.random.default_rng(0).integers(0, 256, (4, 12, 10, 3), dtype=np.uint8)
LOW = FID_IMAGES[:, ::2]  # the same, of half the height


@pytest.fixture(scope="session")
def inception():
    return fid.load_inception("random")


def as_batch(images):
    """uint8 (N, H, W, 3), as files have them -> uint8 tensor (N, 3, H, W), as networks take them"""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


@pytest.fixture(scope="session")
def outputs(inception):
    """-> what Inception gives for FID_IMAGES and for LOW: pooled, spatial, logits, twice"""
    return inception(as_batch(FID_IMAGES)), inception(as_batch(LOW))


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def save_folder(path, images):
    """Images of different heights, as PNG, in a folder with a sub-folder"""
    os.makedirs(f"{path}/sub")
    for i, image in enumerate(images):
        Image.fromarray(image[i:]).save(f"{path}/sub/{i}.png")


def save_sets():
    np.savez("a.npz", arr_0=FID_IMAGES)
    np.savez_compressed("b.npz", arr_0=LOW)


def numbers(path="out.json"):
    return json.loads(Path(path).read_text())


def close(a, b, tolerance=1e-4):
    return abs(a - b) < tolerance * abs(b)


RANDOM = "--inception random --json out.json --batch-size 2"


def adm_reference(path, **images):
    """A file as ADM's reference batches are: it does not say of what network its statistics are"""
    mean, spatial_mean = np.zeros(2048), np.zeros(2023)
    np.savez(path, mu=mean, sigma=np.eye(2048), mu_s=spatial_mean, sigma_s=np.eye(2023), **images)


def weights_file_of(inception):
    """Its weights, by the names that pytorch-fid's file has"""
    return {name.replace(".+", ""): values for name, values in inception.state_dict().items()}


# -------------------------------------------------------------------------------------- the metrics


def squares(a, b):
    """(n, D), (m, D) -> (n, m) squared distances"""
    return ((a[:, None] - b[None]) ** 2).sum(2)


def precision_and_recall(ref, gen):
    """The parts of gen and of ref within the other set's radii to the third neighbour."""
    ref_radius = np.sort(squares(ref, ref), axis=1)[:, 3]
    gen_radius = np.sort(squares(gen, gen), axis=1)[:, 3]  # 0 where five images are the same
    precision = (squares(ref, gen) <= ref_radius[:, None]).any(0).mean()
    recall = (squares(ref, gen) <= gen_radius).any(1).mean()
    return precision, recall


def two_clouds():
    """Reference and generated features that overlap in part; some of the latter are one image"""
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(60, 4)) + 100
    gen = 1.5 * rng.normal(size=(80, 4)) + 101
    gen[20:25] = ref[0]
    return ref, gen


@pytest.mark.parametrize(("n", "m"), [(400, 500), (30, 20), (30, 500), (500, 30)])
def test_frechet_distance_is_its_formula_also_for_singular_covariances(n, m):
    # tr (S S')^1/2 is the sum of the singular values of X Y' where S = X' X, S' = Y' Y
    draw = np.random.default_rng(0).normal
    dim = 40
    x = draw(size=(n, dim))
    y = draw(size=(m, dim)) @ draw(size=(dim, dim))
    mu1, sigma1 = moments(x)
    mu2, sigma2 = moments(y)
    singular_values = np.linalg.svd((x - mu1) @ (y - mu2).T, compute_uv=False)
    root = singular_values.sum() / np.sqrt((n - 1) * (m - 1))
    want = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert abs(fid.frechet_distance(mu1, sigma1, mu2, sigma2) / want - 1) < 1e-6
    assert abs(fid.frechet_distance(mu2, sigma2, mu2, sigma2)) < 1e-9 * np.trace(sigma2)


def test_inception_score_is_the_mean_of_its_splits():
    logits = 3 * np.random.default_rng(0).normal(size=(25, 7))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        divergence = (part * np.log(part / part.mean(0))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert abs(fid.inception_score(logits, split=10) - np.mean(scores)) < 1e-9


def test_precision_and_recall_count_images_within_the_radius_of_the_third_neighbour():
    ref, gen = two_clouds()
    precision, recall = precision_and_recall(ref, gen)
    assert np.allclose(fid.precision_recall(ref, gen), (precision, recall))
    assert 0.1 < min(precision, recall) < max(precision, recall) < 0.99


def test_malformed_statistics_are_refused():
    eye = np.eye(3)
    for mu, sigma in (
        (np.zeros(()), np.zeros(())),
        (np.zeros((1, 3)), eye),
        (np.zeros(3), eye[:2]),
        (np.full(3, np.nan), eye),
        (np.zeros(3), np.full((3, 3), np.inf)),
    ):
        refused("expected finite", fid.frechet_distance, np.zeros(3), eye, mu, sigma)


def test_precision_and_recall_keep_their_digits_where_features_are_far_apart():
    # two groups, each of which has half of both sets: what counts are distances within a group
    rng = np.random.default_rng(0)
    groups = 1e4 * np.arange(100).reshape(-1, 1) % 2e4
    ref = rng.normal(size=(100, 4)) + groups
    gen = 0.8 + 1.5 * rng.normal(size=(100, 4)) + groups
    precision, recall = precision_and_recall(ref, gen)
    assert np.allclose(fid.precision_recall(ref, gen), (precision, recall))
    assert 0.1 < min(precision, recall) < max(precision, recall) < 1


def test_distances_come_in_blocks():
    ref, gen = (torch.tensor(x - 100) for x in two_clouds())
    blocks = list(fid.squared_distances(ref, gen, block=500))
    assert len(blocks) == 10
    together = torch.cat([squared for _, squared in blocks])
    assert np.allclose(together, squares(ref.numpy(), gen.numpy()), atol=1e-9)


def kid_of_pairs(x, y):
    """The unbiased estimate of MMD^2, pair by pair"""

    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(k(a, b) for a in x for b in y) / (n * m)
    return within_x + within_y - 2 * between


def test_kid_is_the_unbiased_estimate_from_all_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6))
    y = rng.normal(size=(30, 6)) + 0.5
    assert abs(fid.kid(x, y) / kid_of_pairs(x, y) - 1) < 1e-9
    assert abs(fid.kid(torch.tensor(x), torch.tensor(y)) / kid_of_pairs(x, y) - 1) < 1e-9


def test_kid_of_two_sets_of_one_distribution_is_about_zero_on_either_side():
    rng = np.random.default_rng(0)
    values = [fid.kid(rng.normal(size=(50, 6)), rng.normal(size=(50, 6))) for _ in range(20)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < np.std(values)


def test_kid_of_one_tensor_twice_is_that_of_two_equal_sets():
    x = np.random.default_rng(0).normal(size=(20, 6))
    tensor = torch.tensor(x)
    assert fid.kid(tensor, tensor) < 0
    assert abs(fid.kid(tensor, tensor) / kid_of_pairs(x, x) - 1) < 1e-9


@pytest.mark.parametrize("mean", [1e3, 1e4])
def test_kid_keeps_its_digits_far_from_zero(mean):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 8)) + mean
    y = rng.normal(size=(10, 8)) + mean + 0.1
    exact_x, exact_y = (np.vectorize(Fraction, otypes=[object])(a) for a in (x, y))
    want = kid_of_pairs(exact_x, exact_y)  # in rational numbers, without rounding
    assert abs(fid.kid(x, y) / float(want) - 1) < 1e-5


def test_too_few_or_malformed_features_are_refused():
    x = np.zeros((4, 2))
    for f, few in ((fid.kid, 1), (fid.precision_recall, 3)):
        refused(f"N {few + 1} or more", f, x, x[:few])
        refused("expected finite", f, x + np.inf, x)
        refused("expected finite", f, x, x[:, 0])
        refused("2 and 1 numbers", f, x, x[:, :1])


def test_kernel_sums_are_the_same_in_blocks():
    ref, gen = (torch.tensor(x - 100) for x in two_clouds())
    for a, b, same_set in ((ref, gen, False), (ref, ref, True)):
        whole = fid.kernel_sum(a, b, same_set)
        assert abs(fid.kernel_sum(a, b, same_set, block=500) / whole - 1) < 1e-12


# ------------------------------------------------------------------ images, features and statistics


def test_a_folder_is_read_in_order_with_its_sub_folders():
    save_folder("images", FID_IMAGES)
    Path("images/notes.txt").write_text("no image")
    images = fid.open_set("images")
    assert images.count == 4
    for i, image in enumerate(images.read(range(4))):
        assert np.array_equal(image, FID_IMAGES[i, i:])
    assert [len(image) for image in images.read(range(1, 3))] == [11, 10]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_gives_any_range_of_its_images(save):
    save("a.npz", arr_0=FID_IMAGES)
    images = fid.open_set("a.npz")
    assert images.count == 4
    for rows in (range(2, 4), range(2), range(1, 3)):
        assert np.array_equal(images.read(rows), FID_IMAGES[rows.start : rows.stop])


def test_the_only_array_of_images_in_an_npz_is_taken_whatever_its_name():
    np.savez("a.npz", labels=np.arange(4), images=FID_IMAGES, n=np.arange(3), weights=np.ones(4))
    images = fid.open_set("a.npz")
    assert images.count == 4 and images.stats == {}
    assert np.array_equal(images.read(range(4)), FID_IMAGES)


def test_features_are_an_npy_of_any_float_type():
    x = np.random.default_rng(0).normal(size=(5, 3))
    for dtype in ("f2", "<f4", ">f4", ">f8"):
        np.save("x.npy", np.asfortranarray(x.astype(dtype)))
        (got,) = fid.open_set("x.npy").outputs
        assert np.array_equal(got, x.astype(dtype).astype(np.float64))


def test_a_large_npz_is_not_read_whole():
    np.savez_compressed("large.npz", arr_0=np.zeros((1_000, 100, 100, 3), np.uint8))  # 30 MB
    tracemalloc.start()
    images = fid.open_set("large.npz")
    for start in range(0, 1_000, 20):
        images.read(range(start, start + 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


def damaged(path, source, at=500):
    """A copy of the file source with one byte changed"""
    data = bytearray(Path(source).read_bytes())
    data[at] = 255 - data[at]
    Path(path).write_bytes(data)


def read_all(path):
    images = fid.open_set(path)
    return images.read(range(images.count))


def test_sets_that_cannot_be_used_are_refused_by_name():
    save_folder("images", FID_IMAGES)
    Path("images/z.png").write_bytes(b"no image")
    os.mkdir("empty")
    np.savez("a.npz", arr_0=FID_IMAGES)
    damaged("c.npz", "a.npz")
    Path("half-loaded.npz").write_bytes(Path("a.npz").read_bytes()[:900])
    np.savez("float.npz", arr_0=FID_IMAGES / 255)
    np.savez("first.npz", arr_0=np.moveaxis(FID_IMAGES, 3, 1).copy())
    np.savez("two.npz", train=FID_IMAGES, test=FID_IMAGES)
    np.savez("nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    np.savez("half.npz", mu=np.zeros(8))
    np.savez("shapes.npz", mu=np.zeros(8), sigma=np.eye(7))
    np.savez("number.npz", mu=np.zeros(()), sigma=np.zeros(()))
    np.savez("n.npz", mu=np.zeros(8), sigma=np.eye(8), n=[1, 2])
    with zipfile.ZipFile("folder.zip", "w") as archive:
        archive.write("images/sub/0.png")
    Path("edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(8)}}))
    Path("page.npz").write_text("<!DOCTYPE html>")
    np.save("images.npy", FID_IMAGES)
    np.save("few.npy", np.zeros((3, 8)))
    np.save("integers.npy", np.zeros((5, 8), int))
    np.save("inf.npy", np.full((5, 8), np.inf))
    kinds = "expected a folder of images, an .npz .* or an .npy of features"
    for source, message in {
        "images": "z.png cannot be used",
        "images/sub/0.png": kinds,
        "empty": "0 images",
        "c.npz": "Bad CRC-32",
        "half-loaded.npz": kinds,
        "float.npz": f"arr_0 float64 .4, 12, 10, 3.; {kinds}",
        "first.npz": f"arr_0 uint8 .4, 3, 12, 10.; {kinds}",
        "two.npz": f"train uint8 .*, test uint8 .*; {kinds}",
        "nan.npz": "expected finite",
        "half.npz": "sigma",
        "shapes.npz": "sigma .7, 7.: expected finite .D,., .D, D.",
        "number.npz": "expected finite .D,.",
        "n.npz": "n.npz cannot be used",
        "folder.zip": f"unpack it; {kinds}",
        "edm2.pkl": f"{kinds}",
        "page.npz": f"<!DOCT.*{kinds}",
        "images.npy": f"uint8 .4, 12, 10, 3.*{kinds}",
        "few.npy": "N > 3",
        "integers.npy": f"int64 .5, 8.*{kinds}",
        "inf.npy": "not finite",
        "gone": "gone cannot be used",
    }.items():
        refused(message, read_all, source)


def test_a_real_folder_is_walked_once_and_what_is_hidden_is_passed_over():
    save_folder("images", FID_IMAGES)
    save_folder("elsewhere", FID_IMAGES[:2])
    Image.fromarray(FID_IMAGES[0]).save("images/.hidden.png")
    os.mkdir("images/.thumbnails")
    Image.fromarray(FID_IMAGES[0]).save("images/.thumbnails/0.png")
    os.mkdir("images/out")
    Image.fromarray(FID_IMAGES[0]).save("images/out/0.png")
    Path("images/a").symlink_to("sub")  # before sub in the alphabet, but no folder of its own
    Path("images/sub/parent").symlink_to("..")
    Path("images/sub/above").symlink_to(os.getcwd())
    Path("images/linked").symlink_to("../elsewhere")
    Path("images/linked again").symlink_to("../elsewhere")
    files, left_out = fid.image_files("images/", skip="images/out")
    assert files == [
        "images/linked/sub/0.png",
        "images/linked/sub/1.png",
        *[f"images/sub/{i}.png" for i in range(4)],
    ]
    assert left_out == ""


def test_files_left_out_for_their_ending_are_counted_and_said(capsys):
    save_folder("images", FID_IMAGES)
    for name in ("a.heic", "b.HEIC", "noending", ".DS_Store"):
        Path("images", name).write_text("")
    assert fid.open_set("images").count == 4
    assert "images: files left out for their ending: 2 .heic, 1 without" in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_an_error(monkeypatch):
    save_folder("images", FID_IMAGES)
    scandir = os.scandir

    def denied(place):
        if str(place).endswith("sub"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", denied)
    refused("images cannot be used: PermissionError", fid.open_set, "images")


def test_images_become_upright_also_of_16_bits():
    grey = Image.fromarray(np.array([[0, 65535]], np.uint16))
    exif = grey.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert fid.to_rgb(saved(grey, "PNG", exif=exif)).size == (1, 2)


def test_images_without_a_defined_range_are_refused_by_name():
    save_folder("images", FID_IMAGES)
    for mode, dtype in (("F", np.float32), ("I", np.int32)):
        half_grey(dtype, 0.5).save("images/z.tiff")
        message = f"z.tiff cannot be used: .*mode {mode}.*save it with 8 or 16 bits"
        refused(message, read_all, "images")


def test_max_pixels_allows_images_beyond_the_limit_of_pillow():
    save_folder("images", FID_IMAGES)
    bomb = f"fid.py images images {RANDOM} --max-pixels"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # which main() changes
        error = run(f"{bomb} 40", fails=True)
        assert "0.png cannot be used: DecompressionBombError" in error and "--max-pixels N" in error
        run(f"{bomb} 200")


# ---------------------------------------------------------------------------------------- Inception


def pixel_of_tensorflow_1(x, i, j, size=299):
    """Pixel (i, j) of x (H, W), resized to (size, size): bilinear, pixel i is at i H / size"""
    height, width = x.shape
    row, down = i * height // size, i * height % size / size
    column, right = j * width // size, j * width % size / size
    next_row = min(row + 1, height - 1)
    next_column = min(column + 1, width - 1)
    top = (1 - right) * x[row, column] + right * x[row, next_column]
    low = (1 - right) * x[next_row, column] + right * x[next_row, next_column]
    return (1 - down) * top + down * low


@pytest.mark.parametrize(("height", "width"), [(64, 5), (299, 400), (1, 31)])
def test_images_are_resized_as_by_tensorflow_1(height, width):
    x = np.random.default_rng(0).integers(0, 256, (height, width)).astype(np.float64)
    y = fid.resize_tf1(torch.tensor(x)[None, None].float())[0, 0].numpy()
    for i, j in ((0, 0), (298, 298), (100, 298), (17, 201)):
        assert abs(y[i, j] - pixel_of_tensorflow_1(x, i, j)) < 1e-3


def test_average_pooling_does_not_count_the_padding():
    assert fid.average_pool(torch.arange(12.0).view(1, 3, 4))[0, 0, 0] == (0 + 1 + 4 + 5) / 4


def test_only_the_last_block_takes_the_maximum(inception):
    x = torch.randn(1, 2048, 8, 8)
    assert torch.equal(inception.Mixed_7b.branch_pool.pool(x), fid.average_pool(x))
    largest = torch.nn.functional.max_pool2d(x, 3, 1, 1)
    assert torch.equal(inception.Mixed_7c.branch_pool.pool(x), largest)


def test_inception_has_the_names_and_sizes_of_the_weights_file(inception):
    state = weights_file_of(inception)
    names = {
        "Conv2d_1a_3x3.conv": (32, 3, 3, 3),
        "Conv2d_4a_3x3.conv": (192, 80, 3, 3),
        "Mixed_5b.branch5x5_2.conv": (64, 48, 5, 5),
        "Mixed_6a.branch3x3.conv": (384, 288, 3, 3),
        "Mixed_6d.branch7x7dbl_4.conv": (160, 160, 7, 1),
        "Mixed_7a.branch7x7x3_2.conv": (192, 192, 1, 7),
        "Mixed_7b.branch3x3dbl_3b.bn": (384,),
        "Mixed_7c.branch_pool.conv": (192, 2048, 1, 1),
        "fc": (1008, 2048),
    }
    for name, shape in names.items():
        assert state[name + ".weight"].shape == shape, name
    without_fc = 21_785_568  # torchvision's inception_v3 without its heads
    assert sum(p.numel() for p in inception.parameters()) == without_fc + 2048 * 1008 + 1008


def test_inception_gives_pooled_spatial_and_logits_without_the_bias(inception):
    x = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    seen = []
    layer = inception.Mixed_6d.branch1x1
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    pool, spatial, logits = inception(x)
    hook.remove()
    assert pool.shape == (2, 2048) and 0.05 < pool.mean() < 50
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0].permute(0, 2, 3, 1)[..., :7])
    assert torch.equal(logits, pool @ inception.fc.weight.T)


def test_a_state_dict_gives_the_network_that_it_is_from(inception):
    x = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    whole = weights_file_of(inception)
    state = {k: v.clone() for k, v in whole.items() if "num_batches" not in k}
    state["fc.bias"] += 1  # is not used
    for a, b in zip(fid.load_inception(state)(x), inception(x)):
        assert torch.equal(a, b)


def test_inception_takes_integers_from_0_to_255_only(inception):
    refused("torch.float32", inception, torch.rand(1, 3, 20, 20) * 2 - 1)


def test_random_weights_are_always_the_same_and_leave_the_generator_alone(inception):
    torch.manual_seed(3)
    again = fid.load_inception("random")
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    for a, b in zip(again.parameters(), inception.parameters()):
        assert torch.equal(a, b)


def test_files_without_inception_weights_are_refused():
    torch.save(argparse.Namespace(), "x.pth")  # a class: weights_only does not load it
    refused("x.pth", fid.load_inception, "x.pth")
    refused("keys are missing", fid.load_inception, {})
    refused("gone.pth", fid.load_inception, "gone.pth")


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with a.npz, b.npz, and what the command makes of them"""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_sets()
        text = run(f"fid.py a.npz b.npz {RANDOM} --save-stats ref.npz")
        Path("out.txt").write_text(text)
    return folder


def test_the_command_gives_the_numbers_of_all_images(outputs, measured):
    got = numbers(measured / "out.json")
    assert got["N_ref"] == got["N_samples"] == 4
    ref_pool, ref_spatial, _ = outputs[0]
    gen_pool, gen_spatial, gen_logits = outputs[1]
    fid_want = fid.frechet_distance(*moments(ref_pool.double()), *moments(gen_pool.double()))
    sfid_want = fid.frechet_distance(*moments(ref_spatial.double()), *moments(gen_spatial.double()))
    assert close(got["FID"], fid_want) and close(got["sFID"], sfid_want)
    assert (got["precision"], got["recall"]) == fid.precision_recall(ref_pool, gen_pool)
    assert close(got["KID"], fid.kid(ref_pool, gen_pool))
    assert close(got["IS"], fid.inception_score(gen_logits))
    saved = np.load(measured / "ref.npz")
    assert np.allclose(saved["mu"], ref_pool.mean(0), atol=1e-5)
    assert np.allclose(saved["sigma_s"], np.cov(ref_spatial.T), atol=1e-4)


def test_random_weights_are_named_in_each_line_and_no_temporary_file_is_left(measured):
    lines = Path(measured, "out.txt").read_text().splitlines()
    assert len(lines) == len(numbers(measured / "out.json"))
    assert all("random weights: comparable with nothing" in line for line in lines)
    assert {file.name for file in measured.iterdir()} == {
        "a.npz",
        "b.npz",
        "ref.npz",
        "out.json",
        "out.txt",
    }


def test_statistics_replace_images_except_for_precision_recall_and_kid(measured):
    shutil.copytree(measured, ".", dirs_exist_ok=True)
    of_images = numbers()
    text = run(f"fid.py ref.npz b.npz {RANDOM}")
    of_statistics = numbers()
    assert of_statistics["N_ref"] == 4
    assert close(of_statistics["FID"], of_images["FID"])
    assert close(of_statistics["sFID"], of_images["sFID"])
    assert close(of_statistics["IS"], of_images["IS"])
    for name in ("precision", "recall", "KID"):
        assert of_statistics[name] is None and f"{name}: unknown" in text


def test_two_files_of_statistics_need_no_network(measured, monkeypatch):
    monkeypatch.chdir(measured)
    monkeypatch.setattr(fid, "load_inception", None)
    text = run("fid.py ref.npz ref.npz --inception random")
    assert "FID: " in text and "KID: unknown" in text and "IS" not in text


def test_images_of_several_sizes_go_in_one_by_one(inception):
    save_folder("images", FID_IMAGES)
    outputs = fid.compute_outputs(fid.open_set("images"), inception, "cpu", batch_size=4)
    for i in (1, 3):
        alone = inception(as_batch(FID_IMAGES[i : i + 1, i:]))
        for values, want in zip(outputs, alone):
            assert torch.allclose(values[i], want[0], rtol=1e-4, atol=1e-5)


def test_features_that_are_not_finite_are_an_error():
    save_sets()
    refused(
        "not finite",
        fid.compute_outputs,
        fid.open_set("a.npz"),
        lambda x: [x.flatten(1) * torch.nan],
        "cpu",
        2,
    )


def published(path, monkeypatch):
    """Makes the file at path the published weights, which are those that statistics are of."""
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    monkeypatch.setattr(fid, "INCEPTION_URL", f"https://host/inception-{sha256[:8]}.pth")


def test_adm_reference_files_work_as_they_are(inception, outputs, monkeypatch):
    save_sets()
    adm_reference("adm.npz", arr_0=FID_IMAGES)
    torch.save(weights_file_of(inception), "weights.pth")
    published("weights.pth", monkeypatch)
    run("fid.py adm.npz b.npz --inception weights.pth --json out.json")
    got = numbers()
    pool = outputs[1][0]
    want = fid.frechet_distance(np.zeros(2048), np.eye(2048), *moments(pool.double()))
    assert close(got["FID"], want)  # of the statistics
    assert close(got["KID"], fid.kid(outputs[0][0], pool))  # of the images


def test_the_published_weights_are_the_same_downloaded_or_by_path(inception, monkeypatch):
    torch.save(weights_file_of(inception), "any name.pth")
    published("any name.pth", monkeypatch)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **b: load("any name.pth"))
    for source in (None, "any name.pth"):
        args = argparse.Namespace(network=None, inception=source, device="cpu")
        assert fid.load_network(args)[1] == "inception-2015-12-05"


def test_statistics_of_another_inception_are_refused_and_a_copy_of_it_is_the_same(inception):
    save_sets()
    adm_reference("adm.npz")
    state = weights_file_of(inception)
    torch.save(state, "other.pth")
    torch.save(dict(reversed(state.items())), "copy.pth")
    state["fc.weight"] = state["fc.weight"] + 1
    torch.save(state, "third.pth")
    error = run("fid.py adm.npz b.npz --inception other.pth", fails=True)
    assert "adm.npz is of inception-2015-12-05, expected: of inception " in error
    run("fid.py a.npz b.npz --inception other.pth --save-stats ref.npz")
    run("fid.py ref.npz b.npz --inception copy.pth --json out.json")
    assert numbers()["weights"].startswith("inception ")
    assert "ref.npz is of inception " in run(
        "fid.py ref.npz b.npz --inception third.pth", fails=True
    )


def test_statistics_of_another_network_are_refused_where_there_are_no_images():
    save_sets()
    adm_reference("adm.npz")
    error = run(f"fid.py adm.npz b.npz {RANDOM}", fails=True)
    assert "adm.npz is of inception-2015-12-05, expected: of random" in error


def test_statistics_of_different_sizes_are_refused():
    for size in (64, 65):
        np.savez(f"{size}.npz", mu=np.zeros(size), sigma=np.eye(size))
    assert "64 and of 65 features" in run("fid.py 64.npz 65.npz", fails=True)


def run_as_script(path, arguments, monkeypatch):
    """Runs a file as python does, with its own handling of errors"""
    monkeypatch.setattr(sys, "argv", [path, *arguments.split()])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # and stderr: the script replaces them
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    runpy.run_path(path, run_name="__main__")


def test_an_error_is_one_line_and_exits_with_2(monkeypatch, capfd):
    with pytest.raises(SystemExit) as stop:
        run_as_script(f"{HERE}/fid.py", "gone b.npz", monkeypatch)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fid.py: error: gone cannot be used")


def test_a_bug_keeps_its_traceback(monkeypatch):
    text = Path(HERE, "fid.py").read_text()
    broken = text.replace("    args = parse_arguments()\n", "    np.zeros(2).reshape(3)\n")
    Path("broken.py").write_text(broken)
    with pytest.raises(ValueError, match="reshape"):
        run_as_script("broken.py", "a b", monkeypatch)


def test_bad_arguments_are_one_line():
    save_sets()
    for arguments, message in {
        "a.npz": "SAMPLES",
        "a.npz b.npz --batch-size x": "--batch-size",
        "a.npz b.npz --batch-size 0": "--batch-size 0, expected 1 or more",
        "a.npz b.npz --max-pixels 0": "--max-pixels 0, expected 1 or more",
        "a.npz b.npz --json no/where": "no folder for no/where",
        "a.npz b.npz --json ./": "or it is one",
        "a.npz b.npz --save-stats ./b.npz": "b.npz is given, and would be overwritten",
        "a.npz b.npz --inception random --network x.pth": "not allowed with",
    }.items():
        assert message in run(f"fid.py {arguments}", fails=True)


# ---------------------------------------------------------------------- features of another network


def save_features(n=40, m=30, dim=6, mean=0.0):
    """Writes ref.npy and gen.npy -> what they hold"""
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(n, dim)) + mean
    gen = 1.2 * rng.normal(size=(m, dim)) + mean
    np.save("ref.npy", ref)
    np.save("gen.npy", gen)
    return ref, gen


@pytest.mark.parametrize("dim", [6, 1])
def test_features_give_fd_kid_precision_and_recall(dim):
    ref, gen = save_features(dim=dim, mean=1000)
    text = run("fid.py ref.npy gen.npy --json out.json")
    got = numbers()
    sigma1 = np.cov(ref.T).reshape(dim, dim)
    sigma2 = np.cov(gen.T).reshape(dim, dim)
    root = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).real).sum()
    mean_term = ((ref.mean(0) - gen.mean(0)) ** 2).sum()
    want = mean_term + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert close(got["FD"], want, tolerance=1e-9)
    assert got["KID"] == fid.kid(ref, gen)
    assert (got["precision"], got["recall"]) == fid.precision_recall(ref, gen)
    assert (got["weights"], got["N_ref"], got["N_samples"]) == ("features", 40, 30)
    assert "FID" not in text and "IS" not in text


def test_statistics_of_features_stand_for_them():
    save_features()
    run("fid.py ref.npy gen.npy --json out.json --save-stats ref.npz")
    want = numbers()["FD"]
    text = run("fid.py ref.npz gen.npy --json out.json")
    assert close(numbers()["FD"], want) and numbers()["N_ref"] == 40 and "KID: unknown" in text
    run("fid.py gen.npy gen.npy --save-stats gen.npz")
    run("fid.py ref.npz gen.npz --json out.json")
    assert close(numbers()["FD"], want)


def test_features_are_compared_with_no_images_and_with_no_statistics_of_a_network():
    save_features()
    np.savez("a.npz", arr_0=FID_IMAGES)
    adm_reference("adm.npz")
    adm_reference("both.npz", arr_0=FID_IMAGES)
    run("fid.py ref.npy gen.npy --save-stats ref.npz")
    for sets in ("ref.npy a.npz", "a.npz ref.npy", "both.npz ref.npy"):
        assert "expected features of both, or images" in run(f"fid.py {sets}", fails=True)
    error = run("fid.py adm.npz gen.npy", fails=True)
    assert "gen.npy is of features, expected: of inception-2015-12-05" in error
    error = run(f"fid.py ref.npz a.npz {RANDOM}", fails=True)
    assert "ref.npz is of features, expected: of random" in error
    np.save("narrow.npy", np.zeros((9, 5)))
    assert "6 and of 5 features" in run("fid.py ref.npy narrow.npy", fails=True)


def test_fewer_than_2048_features_are_warned_of(monkeypatch, capsys):
    save_features()
    monkeypatch.setattr(sys, "argv", ["fid.py", "ref.npy", "gen.npy"])
    fid.main()
    assert "fid.py: warning: N < 2,048" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- DINOv2


def save_dinov2(path):
    """Random weights of a small DINOv2, of 16 x 16 patches as the pretrained ones -> the network"""
    torch.manual_seed(0)
    network = DINOv2(128, 2, 16).eval()
    torch.save(network.state_dict(), path)
    return network


def test_dinov2_gives_its_class_token_after_the_preprocessing_of_edm2():
    network = save_dinov2("dino.pth")
    features = fid.ClassToken("dino.pth")
    x = as_batch(FID_IMAGES)
    with torch.no_grad():
        (got,) = features(x)
        resized = torch.nn.functional.interpolate(
            x.float(), (224, 224), mode="bicubic", antialias=True
        )
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        want = network((resized / 255 - mean) / std)[0]
    assert torch.allclose(got, want, atol=1e-4)


def test_the_command_takes_a_weights_file_of_dinov2():
    save_dinov2("dino.pth")
    np.savez("a.npz", arr_0=FID_IMAGES)
    run("fid.py a.npz a.npz --network dino.pth --json out.json --save-stats ref.npz")
    got = numbers()
    assert abs(got["FD"]) < 1e-3 and got["precision"] == got["recall"] == 1
    assert np.load("ref.npz")["mu"].shape == (128,)


def test_statistics_of_a_dinov2_are_of_its_weights_whatever_their_file_is_called():
    network = save_dinov2("dino.pth")
    np.savez("a.npz", arr_0=FID_IMAGES)
    adm_reference("adm.npz", arr_0=FID_IMAGES)
    run("fid.py adm.npz a.npz --network dino.pth --json out.json --save-stats ref.npz")
    assert abs(numbers()["FD"]) < 1e-6  # of the images: the statistics are Inception's
    torch.save(dict(reversed(network.state_dict().items())), "copy.pth")
    run("fid.py ref.npz a.npz --network copy.pth --json out.json")
    assert abs(numbers()["FD"]) < 1e-6
    assert "ref.npz is of dinov2 " in run(f"fid.py ref.npz a.npz {RANDOM}", fails=True)
    network.cls_token.data += 1
    torch.save(network.state_dict(), "dino.pth")
    assert "ref.npz is of dinov2 " in run("fid.py ref.npz a.npz --network dino.pth", fails=True)


def test_a_file_without_a_dinov2_is_one_line():
    np.savez("a.npz", arr_0=FID_IMAGES)
    torch.save({"x": torch.zeros(2)}, "x.pth")
    for name in ("x.pth", "gone.pth", "dinov3"):
        assert name in run(f"fid.py a.npz a.npz --network {name}", fails=True)


# ----------------------------------------------------------------------------------------- printing


def test_results_are_written_before_they_are_printed(monkeypatch):
    save_features()

    def report(result):
        assert numbers() == result and os.path.exists("ref.npz")
        Path("reported").touch()

    monkeypatch.setattr(fid, "report", report)
    run("fid.py ref.npy gen.npy --json out.json --save-stats ref.npz")
    assert os.path.exists("reported")


def test_results_are_printed_where_they_cannot_be_written(monkeypatch, capsys):
    save_features()

    def full(file, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    monkeypatch.setattr(sys, "argv", ["fid.py", "ref.npy", "gen.npy", "--save-stats", "ref.npz"])
    with pytest.raises(OSError, match="No space"):
        fid.main()
    assert "FD: " in capsys.readouterr().out
    assert not os.path.exists("ref.npz")


@pytest.mark.parametrize("redirect", UNWRITABLE)
def test_printing_ends_no_run(redirect):
    save_features()
    run_redirected("fid.py ref.npy gen.npy --json out.json", redirect)
    assert "FD" in numbers()


def test_a_progress_bar_whose_reader_has_gone_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    stream = fid.safe_output(os.fdopen(writer, "w"))
    images = fid.ImageSet("a", 8, lambda rows: np.zeros((len(rows), 4, 4, 3), np.uint8), {}, [])
    with redirect_stderr(stream):
        (got,) = fid.compute_outputs(images, lambda x: [x.float().flatten(1)], "cpu", 2)
    assert got.shape == (8, 48)


def test_a_name_that_the_terminal_cannot_show_ends_no_run():
    name = os.fsdecode(b"caf\xe9 \xc3\xa9")
    os.mkdir(name)
    Path(name, "text.txt").write_text("")
    out, err = run_python(f"{HERE}/fid.py", name, name, code=2, PYTHONIOENCODING="ascii")
    assert r"caf\udce9 \xe9: files left out for their ending: 1 .txt" in out
    assert r"fid.py: error: caf\udce9 \xe9 cannot be used: it holds 0 images" in err


# ------------------------------------------------------------------------- fid.py alone in a folder


def test_fid_works_alone_in_an_empty_folder(measured):
    os.mkdir("alone")
    for file in (f"{HERE}/fid.py", measured / "ref.npz", measured / "b.npz"):
        shutil.copy(file, "alone")
    run_python("fid.py", "ref.npz", "b.npz", *RANDOM.split(), cwd="alone")
    got, want = numbers("alone/out.json"), numbers(measured / "out.json")
    assert close(got["FID"], want["FID"]) and close(got["sFID"], want["sFID"])


@pytest.mark.parametrize("found", ["nothing", "another model", "one that needs timm"])
def test_without_the_projects_model_py_an_error_names_it(found, monkeypatch):
    np.savez("a.npz", arr_0=FID_IMAGES)
    os.mkdir("alone")
    texts = {"another model": "class SiT:\n    pass\n", "one that needs timm": "import no_timm\n"}
    if found in texts:
        Path("alone/model.py").write_text(texts[found])
    shutil.copy(f"{HERE}/fid.py", "alone/metrics.py")
    flags = "a.npz a.npz --network dinov2_vitl14"
    _, err = run_python("alone/metrics.py", *flags.split(), code=2)
    (line,) = err.splitlines()
    assert "--network needs GMem's model.py beside fid.py" in line


# ==================================================== README, and what several files have in common


# ----------------------------------------------------------------------------------- reading images


def test_one_rule_reads_an_image_in_memory_py_and_in_fid_py():
    for name in ("to_rgb", "image_files"):
        assert inspect.getsource(getattr(memory, name)) == inspect.getsource(getattr(fid, name))


def one_row_png(depth, color_type, row, transparency=b""):
    """A PNG of one row of pixels, of a kind that Pillow does not write, opened"""
    width = len(row) * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[color_type])
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0))]
    if transparency:
        parts.append((b"tRNS", transparency))
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in parts:
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(name + content))
    return Image.open(io.BytesIO(data))


def twelve_bit_tiff():
    """A TIFF of two pixels of 12 bits, white and black"""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 1, 279: 3}
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, value in tags.items():
        data += struct.pack("<HHII", tag, 4, 1, value)
    return Image.open(io.BytesIO(data + struct.pack("<I", 0) + b"\xff\xf0\x00"))


def png_of_pillow_10():
    """A 16-bit PNG, in the mode in which Pillow 10 opens it"""
    image = half_grey(np.int32, 0x8080)
    image.format = "PNG"
    return image


PALETTE = Image.new("P", (2, 2), 0)
PALETTE.putpalette([255, 0, 0, 0, 255, 0])
READ = {  # name: (image, the colour of all its pixels, or of each)
    "RGB": (red(), (200, 10, 20)),
    "palette": (red().quantize(4), (200, 10, 20)),
    "grey": (Image.new("L", (4, 4), 77), 77),
    "black and white": (Image.new("1", (4, 4), 1), 255),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), 255),
    "transparent": (Image.new("RGBA", (2, 2), (0, 0, 0, 0)), 255),
    "half transparent": (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), 127),
    "transparent grey": (Image.new("LA", (2, 2), (9, 0)), 255),
    "transparent palette": (Image.new("PA", (2, 2)), 255),
    "palette with a transparent colour": (saved(PALETTE, "PNG", transparency=0), 255),
    "palette with transparencies": (saved(PALETTE, "PNG", transparency=b"\x80"), (255, 127, 127)),
    "GIF": (saved(PALETTE, "GIF", transparency=0), 255),
    "16-bit grey": (half_grey(np.uint16, 0x8080), 128),
    "16-bit PNG": (one_row_png(16, 0, b"\x80\x80\x40\x40"), [[128], [64]]),
    "16-bit PNG, as Pillow 10 opens it": (png_of_pillow_10(), 128),
    "16-bit PNG, transparent": (
        one_row_png(16, 0, b"\x12\x34\x40\x40", b"\x12\x34"),
        [[255], [64]],
    ),
    "16-bit RGB, transparent": (one_row_png(16, 2, b"\x12\x34" * 3, b"\x12\x34" * 3), 255),
    "16-bit grey with alpha": (one_row_png(16, 4, b"\x12\x34\0\0"), 255),
    "16-bit TIFF": (saved(half_grey(np.uint16, 0x8080), "TIFF"), 128),
    "12-bit TIFF": (twelve_bit_tiff(), [[255], [0]]),
    "10-bit PGM": (Image.open(io.BytesIO(b"P5 1 1 1023 \x02\x00")), 128),
}


@pytest.mark.parametrize("to_rgb", [memory.to_rgb, fid.to_rgb], ids=["memory.py", "fid.py"])
@pytest.mark.parametrize("kind", READ)
def test_images_of_every_kind_become_rgb_on_white(kind, to_rgb):
    image, want = READ[kind]
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - want).max() <= 1


# ------------------------------------------------------------------------------------------- errors


def test_input_errors_are_value_errors():
    assert issubclass(memory.InputError, ValueError)


# ------------------------------------------------------------------------------------------- README

BEFORE_README = """
import numpy as np
import torch

torch.manual_seed(0)
features = torch.randn(200, 32)
new_features = torch.randn(20, 32)
x = torch.rand(200, 3, 16, 16) * 2 - 1
steps = 3
"""
AFTER_README = """
assert images.shape == (8, 3, 16, 16)
assert images.isfinite().all()
assert (s.norm(dim=1) - 1).abs().max() < 1e-5
assert index[:, 0].tolist() == list(range(8))
assert len(larger) == 220
"""


def test_the_code_that_readme_shows_runs():
    readme = Path(HERE, "README.md").read_text()
    block = readme.partition("```python\n")[2].partition("```")[0]
    Path("use.py").write_text(BEFORE_README + block + AFTER_README)
    out, _ = run_python("use.py", path=HERE)
    distance, kid = map(float, out.split())
    assert distance > 0
    assert abs(kid) < 1


def test_readme_is_as_long_as_it_may_be_and_says_where_the_cores_end():
    readme = Path(HERE, "README.md").read_text()
    assert len(readme) <= 14_000
    assert max(map(len, readme.splitlines())) <= 100
    for name in ("model.py", "memory.py", "train.py", "sample.py", "fid.py"):
        lines = Path(HERE, name).read_text().splitlines()
        (ruler,) = [i for i, line in enumerate(lines, 1) if line.startswith("# ====")]
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"({ruler})" in row
