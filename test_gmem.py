"""Tests of GMem: numbers against an independent computation, a run against a run; no GPU, no network."""
import argparse
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import fid
import memory
import sample
import train
from memory import (Blocks, DINOv2, Images, MemoryBank, center_crop, dinov2_features, glyphs, load_dinov2,
                    mask, mix, prepare, thumbnail, to_rgb)
from model import (CONFIGS, AutoencoderKL, SiT, SiTConfig, flow_loss, load_autoencoder, load_sit,
                   sincos_pos_embed)
from sample import decode, generate, guided, ode, sde
from train import Data, learning_rate, split

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2)
MU, SIGMA = 0.7, 0.4  # of the data that samplers are given
QUICK = "--model SiT-T/8 --image-size 16 --batch-size 16 --device cpu"
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
torch.set_num_threads(1)  # as in the processes that are started: their numbers are the same to the last bit

@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def start(command, *more, processes=1, **kw):  # -> Popen, of torchrun if there are to be several
    file, *flags = command.split()
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() * (processes > 1)
    return subprocess.Popen([sys.executable, *torchrun, os.path.join(HERE, file), *flags, *map(str, more)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

def run(command, *more, processes=0, fails=False):
    """Runs a command, in this process or in others -> stdout, or the one line of one that has to fail"""
    if processes:
        p = start(command, *more, processes=processes)
        (out, err), code = p.communicate(timeout=300), p.returncode
    else:
        argv, out, err = [*command.split(), *map(str, more)], io.StringIO(), io.StringIO()
        main = {"fid.py": fid, "train.py": train, "sample.py": sample, "memory.py": memory}[argv[0]].main
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", argv)
            patch.setattr(signal, "signal", lambda *a: None)  # pytest keeps its own handlers
            with pytest.raises(SystemExit) if fails else nullcontext() as stop:
                memory.cli(main) if fails else main()
        torch.set_float32_matmul_precision("highest")  # train.py's is less
        out, err, code = out.getvalue(), err.getvalue(), stop.value.code if fails else 0
    lines = [line for line in err.splitlines() if line.strip() and "/s]" not in line]  # no bars
    assert code == 2 * fails and (not fails or len(lines) == 1) and "FutureWarning" not in err, out + err
    return lines[0] if fails else out

def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)

def refused(message, f, *args, error=ValueError, **kw):
    with pytest.raises(error, match=message):
        f(*args, **kw)

load = lambda path: torch.load(path, weights_only=True)
log = lambda out: [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
numbers = lambda out: [[entry[k] for k in ("step", "loss", "grad_norm", "lr")] for entry in log(out)]

def made(path):
    images = np.load(path)["arr_0"]
    assert images.dtype == np.uint8
    return images.astype(int)

def folder_of_images(path, n=40, size=24):
    x, labels = glyphs(n=n, size=size)
    for i, (image, label) in enumerate(zip(x, labels)):
        os.makedirs(f"{path}/class{label % 2}", exist_ok=True)
        Image.fromarray(image).save(f"{path}/class{label % 2}/{i:03d}.png")
    return x, labels

@pytest.fixture(scope="session")
def trained(tmp_path_factory):  # -> a folder: images/ of two classes, out/ of a short training on them
    at = tmp_path_factory.mktemp("trained")
    folder_of_images(at / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        text = run(f"train.py {QUICK} --steps 6 --log-every 2 --out out --data", at / "images")
    assert "40 of [3, 16, 16], 2 classes" in text
    return at

# ----------------------------------------------------------------------------- model
@pytest.mark.parametrize("switches", [
    {}, dict(swiglu=True), dict(rmsnorm=True), dict(predict_x=True), dict(rope=True), dict(qk_norm=True),
    dict(learn_sigma=True), dict(num_classes=5), dict(memory_dim=12), dict(memory_dim=12, memory_tokens=True),
    dict(memory_dim=12, num_classes=5, align_dim=7, align_depth=1),
    dict(swiglu=True, rmsnorm=True, rope=True, qk_norm=True, zero_init=False, memory_dim=12)], ids=str)
def test_every_switch_has_its_shape_and_gradients(switches):
    model, x, t = SiT(SiTConfig(**TINY, **switches)), torch.randn(3, 3, 8, 8), torch.rand(3)
    s = torch.randn(3, 12) if model.config.memory_dim else None
    y = torch.tensor([0, 4, 5]) if model.config.num_classes else None
    if model.config.zero_init:  # adaLN-zero: the network gives nothing at first
        want = -x / (1 - t).clamp_min(0.05)[:, None, None, None] if model.config.predict_x else 0 * x
        assert torch.equal(model.eval()(x, t, s, y), want)
    out = randomised(model).train()(x, t, s, y)
    out, tokens = out if model.config.align_dim else (out, out)
    assert out.shape == x.shape and (not model.config.align_dim or tokens.shape == (3, 16, 7))
    (out.square().sum() + tokens.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name

def test_names_and_sizes_are_the_official_ones():
    with torch.device("meta"):
        model = SiT(SiTConfig(**CONFIGS["SiT-XL/2"], num_classes=1000, learn_sigma=True))
    # 675,129,632 of the official SiT-XL/2 count its fixed position table, which is a buffer here
    assert sum(p.numel() for p in model.parameters()) + model.pos_embed.numel() == 675_129_632
    names = set(SiT(SiTConfig(**TINY, memory_dim=4, swiglu=True, rmsnorm=True, rope=True, qk_norm=True,
                              align_dim=4, align_depth=1)).state_dict())
    both = ("attn.qkv attn.proj mlp.w12 mlp.w3 adaLN_modulation.1", "x_embedder.proj t_embedder.mlp.0 "
            "t_embedder.mlp.2 condition_projection.linear projector.0.0 projector.0.2 projector.0.4 "
            "final_layer.linear final_layer.adaLN_modulation.1")
    block, rest = ({f"{n}.{k}" for n in part.split() for k in ("weight", "bias")} for part in both)
    block |= {f"{n}.weight" for n in ("norm1", "norm2", "attn.q_norm", "attn.k_norm")}
    rest |= {"pos_embed", "final_layer.norm_final.weight", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    assert names == rest | {f"blocks.{i}.{n}" for i in (0, 1) for n in block}

def test_model_against_plain_formulas():  # one block written out, with loops where the model has reshapes
    model = randomised(SiT(SiTConfig(**{**TINY, "depth": 1}, memory_dim=12)))
    w = {k: v.double() for k, v in model.state_dict().items()}
    x, t, s = torch.randn(1, 3, 8, 8).double(), torch.tensor([0.3]).double(), torch.randn(1, 12).double()
    lin = lambda name, v: v @ w[name + ".weight"].T + w[name + ".bias"]
    silu = lambda v: v / (1 + torch.exp(-v))
    norm = lambda v: (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-6) ** 0.5
    freq = t[:, None] * 10000 ** (-torch.arange(128).double() / 128)
    c = lin("t_embedder.mlp.2", silu(lin("t_embedder.mlp.0", torch.cat([freq.cos(), freq.sin()], 1))))
    c = silu(c + lin("condition_projection.linear", s))
    h = torch.stack([(w["x_embedder.proj.weight"] * x[0, :, 2 * i:2 * i + 2, 2 * j:2 * j + 2]).sum((1, 2, 3))
                     for i in range(4) for j in range(4)]) + w["x_embedder.proj.bias"] + w["pos_embed"][0]
    m = lin("blocks.0.adaLN_modulation.1", c)[0].split(32)
    q, k, v = lin("blocks.0.attn.qkv", norm(h) * (1 + m[1]) + m[0]).split(32, dim=1)
    heads = [torch.softmax(q[:, a] @ k[:, a].T / 4, dim=1) @ v[:, a] for a in (slice(0, 16), slice(16, 32))]
    h = h + m[2] * lin("blocks.0.attn.proj", torch.cat(heads, 1))
    a = lin("blocks.0.mlp.fc1", norm(h) * (1 + m[4]) + m[3])
    a = a / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a ** 3)))
    h = h + m[5] * lin("blocks.0.mlp.fc2", a)
    shift, scale = lin("final_layer.adaLN_modulation.1", c)[0].split(32)
    h = lin("final_layer.linear", norm(h) * (1 + scale) + shift)
    want = torch.empty(3, 8, 8).double()
    for i, j, p, q in np.ndindex(4, 4, 2, 2):
        want[:, 2 * i + p, 2 * j + q] = h[4 * i + j, 6 * p + 3 * q:6 * p + 3 * q + 3]
    assert torch.allclose(model.double()(x, t, s)[0], want, atol=1e-6 * want.abs().max())

def test_the_network_sees_centred_snippets_and_the_null_snippet_as_zeros():
    plain, centred = (randomised(SiT(SiTConfig(**TINY, memory_dim=12, memory_scale=3.0, memory_center=c)))
                      for c in (False, True))
    x, t, s, mean = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 12), torch.randn(12)
    centred.memory_mean.copy_(mean)
    assert torch.allclose(centred(x, t, s), plain(x, t, s - mean), atol=1e-5)
    assert torch.equal(centred(x, t), plain(x, t)) and torch.equal(centred(x, t, 0 * s), plain(x, t))

def test_position_table_is_the_official_one_and_rope_sees_relative_positions_only():
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)))  # x first, as in DiT
    omega = 1 / 10000 ** (np.arange(8) / 8)
    want = np.concatenate([f(np.outer(g.ravel(), omega)) for g in grid for f in (np.sin, np.cos)], axis=1)
    assert np.allclose(sincos_pos_embed(32, 4), want, atol=1e-6)
    rope, (q, k) = SiT(SiTConfig(**TINY, rope=True)).feat_rope, torch.randn(2, 16)
    at = lambda v, row, column: rope(v.expand(16, 16))[4 * row + column]
    for dr, dc in ((0, 1), (1, 0), (2, 1)):
        assert torch.allclose(at(q, 0, 0) @ at(k, dr, dc), at(q, 1, 2) @ at(k, 1 + dr, 2 + dc), atol=1e-5)
    assert not torch.allclose(at(q, 0, 0) @ at(k, 0, 1), at(q, 0, 0) @ at(k, 1, 0), atol=1e-3)

def test_loss_is_mse_plus_cosine_at_the_drawn_noise_and_no_label_is_the_null_label():
    model = lambda x_t, t, s, y: 2 * x_t + s[:, :, None, None]
    model.config = SiTConfig(**TINY)
    x, s = torch.randn(4000, 3, 8, 8), F.normalize(torch.randn(4000, 3), dim=1)
    torch.manual_seed(1)
    got = flow_loss(model, x, s, drop=0.25).item()
    torch.manual_seed(1)  # the same draws, in the documented order: t, noise, drop
    t, z, keep = torch.randn(4000).sigmoid(), torch.randn_like(x), (torch.rand(4000) >= 0.25).float()[:, None]
    assert abs(keep.mean() - 0.75) < 0.03
    v = 2 * ((1 - t)[:, None, None, None] * z + t[:, None, None, None] * x) + (s * keep)[:, :, None, None]
    cos = (v * (x - z)).sum(1) / v.norm(dim=1) / (x - z).norm(dim=1)
    assert got == pytest.approx(((v - x + z) ** 2).mean().item() + 1 - cos.mean().item(), rel=1e-5)
    seen, model = [], lambda x_t, t, s, y: seen.append(y.tolist()) or x_t
    model.config = SiTConfig(**TINY, num_classes=5)
    for drop in (0, 1):
        flow_loss(model, x[:4], y=torch.tensor([0, -1, 4, 2]), drop=drop)
    assert seen == [[0, 5, 4, 2], [5, 5, 5, 5]]  # images without a label, and dropped ones

def test_loss_falls_and_the_snippets_matter():
    torch.manual_seed(0)
    x = torch.from_numpy(glyphs(n=520, size=16)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    s = MemoryBank.build(thumbnail(x))[:]
    model = SiT(SiTConfig(**CONFIGS["SiT-T/8"], input_size=16, in_channels=3, memory_dim=768))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    for _ in range(150):
        i = torch.randint(len(x), (64,))
        flow_loss(model, x[i], s[i]).backward()
        optimizer.step()
        optimizer.zero_grad()
    def loss(s, model=model.eval()):
        torch.manual_seed(1)
        return flow_loss(model, x, s, drop=0).item()
    mean = x.mean((2, 3), keepdim=True)  # the best that knows no shapes: each image in its own mean colour
    flat = lambda x_t, t, s, y: (mean - x_t) / (1 - t[:, None, None, None]).clamp_min(0.05)
    flat.config = model.config
    right, shuffled, null = loss(s), loss(s.roll(1, 0)), loss(torch.zeros_like(s))
    assert right < 0.35 * loss(s, flat) and right < 0.9 * null and null < 0.9 * shuffled

def randomised(model):
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.ndim == 1), std=0.3 if p.ndim < 2 else p[0].numel() ** -0.5)
    return model.eval()

@pytest.mark.parametrize("family", [
    dict(num_classes=9, learn_sigma=True), dict(num_classes=9, swiglu=True, rmsnorm=True, rope=True),
    dict(memory_dim=768, align_dim=768, swiglu=True, rmsnorm=True, rope=True, mlp_ratio=2.7),
    dict(num_classes=9, qk_norm=True, hidden_size=1152, num_heads=16, depth=1)])
def test_official_weights_are_known_by_their_names_and_shapes(family):
    model = randomised(SiT(SiTConfig(**{**TINY, **dict(hidden_size=128, depth=4), **family})))
    ema, x, t, s = model.state_dict(), torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 768)
    rest = dict(model={"x": x}, args=argparse.Namespace(lr=1e-4), config={"model": {}})
    for source in (dict(rest, ema={f"_orig_mod.module.{k}": v for k, v in ema.items()}),
                   dict(model={f"module.{k}": v for k, v in ema.items()}), ema):
        torch.save(source, "official.pt")
        assert torch.equal(load_sit("official.pt")(x, t, s), model(x, t, s))
    refused(r"^1 weights do not fit this SiT: final_layer.linear.weight \(5, ", load_sit,
            {**ema, "final_layer.linear.weight": torch.ones(5, 128)})

def test_autoencoder_in_both_key_formats_and_against_plain_formulas():
    model = randomised(AutoencoderKL(4, (32, 64, 64), 1, attn=(2,)))
    w, z, x = model.state_dict(), torch.randn(2, 4, 4, 4), torch.rand(2, 3, 16, 16) * 2 - 1
    torch.save({"state_dict": w | {"loss.logvar": x, "foundation_model.bias": x}}, "ldm.ckpt")
    sources = ["ldm.ckpt", {}, {}]  # and in the format of diffusers, of today and older
    pairs = ("down.:down_blocks. up.0:up_blocks.2 up.1:up_blocks.1 up.2:up_blocks.0 block.:resnets. "
             "mid.:mid_block. block_1:resnets.0 block_2:resnets.1 attn_1:attentions.0 attn.:attentions. "
             "norm_out:conv_norm_out downsample:downsamplers.0 upsample:upsamplers.0 nin_:conv_")
    for d, names in zip(sources[1:], (" norm.:group_norm. q.:to_q. k.:to_k. v.:to_v. proj_out.:to_out.0.",
                                      " norm.:group_norm. q.:query. k.:key. v.:value. proj_out.:proj_attn.")):
        for key, v in w.items():
            k = key
            for pair in (pairs + names * (".attn" in key)).split():
                k = k.replace(*(f".{part}" for part in pair.split(":")))
            d[k] = v[..., 0, 0] if ".attn" in key and v.ndim == 4 else v
    both_ways = lambda model: (model.encode(x)[1], model.decode(z))
    for source in sources:
        assert all(map(torch.equal, both_ways(load_autoencoder(source)), both_ways(model)))
    at, level, h = model.encoder.mid[1], model.encoder.down[1], torch.randn(1, 64, 6, 6)
    n = F.group_norm(h, 32, at.norm.weight, at.norm.bias, 1e-6).reshape(64, 36)
    q, k, v = (c.weight[..., 0, 0] @ n + c.bias[:, None] for c in (at.q, at.k, at.v))
    want = at.proj_out.weight[..., 0, 0] @ (v @ torch.softmax(k.T @ q / 8, dim=0)) + at.proj_out.bias[:, None]
    assert torch.allclose(at(h), h + want.reshape(h.shape), atol=1e-5)
    level.block, conv = nn.ModuleList(), level.downsample["conv"]  # padded at the right and below only
    want = torch.einsum("oikl,ikl->o", conv.weight, F.pad(h, (0, 1, 0, 1))[0, :, 2:5, 4:7]) + conv.bias
    assert torch.allclose(level(h)[0, :, 1, 2], want, atol=1e-5)

@torch.no_grad()
def test_dinov2_tokens_position_table_and_preprocessing():
    w, x = randomised(DINOv2(128, 1, grid=5)).state_dict(), torch.randn(2, 3, 70, 70)  # the table's own grid
    model, bias = load_dinov2({**w, "mask_token": torch.ones(1, 128)}), w["patch_embed.proj.bias"]
    lin = lambda name, a: F.linear(a, w[f"blocks.0.{name}.weight"], w[f"blocks.0.{name}.bias"])
    norm = lambda name, a: F.layer_norm(a, [128], w[name + ".weight"], w[name + ".bias"], 1e-6)
    h = F.conv2d(x, w["patch_embed.proj.weight"], bias, 14).flatten(2).mT
    h = torch.cat([w["cls_token"].expand(2, 1, 128), h], dim=1) + w["pos_embed"]
    q, k, v = (a.unflatten(2, (2, 64)).transpose(1, 2)
               for a in lin("attn.qkv", norm("blocks.0.norm1", h)).split(128, dim=2))
    h = h + w["blocks.0.ls1.gamma"] * lin("attn.proj", ((q @ k.mT / 8).softmax(3) @ v).mT.flatten(1, 2).mT)
    h = h + w["blocks.0.ls2.gamma"] * lin("mlp.fc2", F.gelu(lin("mlp.fc1", norm("blocks.0.norm2", h))))
    assert torch.allclose(torch.cat([model(x)[0][:, None], model(x)[1]], 1), norm("norm", h), atol=1e-4)
    model.blocks, model.norm = nn.Sequential(), nn.Identity()  # what is left: the positions
    want = Image.fromarray(w["pos_embed"][0, 1:, 7].reshape(5, 5).numpy()).resize((3, 3), Image.BICUBIC)
    assert np.allclose((model(torch.zeros(1, 3, 42, 42))[1][0] - bias)[:, 7], np.ravel(want), atol=1e-5)
    images = torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8)
    d = np.abs((np.arange(224)[:, None] + 0.5) * 256 / 224 - 0.5 - np.arange(256))
    m = np.where(d < 1, 1.25 * d**3 - 2.25 * d**2 + 1, (-0.75 * d**3 + 3.75 * d**2 - 6 * d + 3) * (d < 2))
    want = m @ ((images[0, ..., 2].numpy() / 255 - 0.406) / 0.225) @ m.T  # cubic convolution, a = -0.75
    assert np.allclose(dinov2_features(lambda x: x, images)[0, 2, 3:-3, 3:-3], want[3:-3, 3:-3], atol=1e-3)
    for load, known in (load_dinov2, ".*vits14"), (load_autoencoder, ".*sd-vae-ft-ema"), (load_sit, ""):
        for source, message in ("nowhere", "nowhere is no file" + known), ({"a": x}, "no (DINO|auto|SiT)"):
            refused(message, load, source)

# ----------------------------------------------------------------------------- samplers
def law(sampler, steps, **kw):
    """Mean and variance of the samples when the data are N(MU, SIGMA^2), without sampling error: there
    v = MU + a(t) (x - t MU) is linear, so x is carried as coefficients over (z, noise 1, noise 2, .., 1)."""
    unit, calls = lambda i: F.one_hot(torch.tensor([i]), steps + 2).double(), iter(range(1, steps + 1))
    def v(x, t):
        t, mean = t[:, None], MU * unit(steps + 1)
        a = (t * SIGMA ** 2 - (1 - t)) / (t ** 2 * SIGMA ** 2 + (1 - t) ** 2)
        return mean + a * (x - t * mean)
    kw |= dict(last_step=1e-4, noise=lambda x: unit(next(calls))) if sampler is sde else {}
    x = sampler(v, unit(0), steps, **kw)[0]
    return x[-1].item(), x[:-1].square().sum().item()

@pytest.mark.parametrize("sampler, method, order",
                         [(ode, "euler", 1), (ode, "heun", 2), (sde, "euler", 1), (sde, "heun", 1)])
def test_samplers_reach_a_gaussian_with_their_order(sampler, method, order):
    n, k = 200, 4
    coarse, fine = ([abs(got - want) for got, want in zip(law(sampler, m, method=method), (MU, SIGMA ** 2))]
                    for m in (n, k * n))
    assert max(fine) < 2e-3 and order - 0.15 < np.log(coarse[1] / fine[1]) / np.log(k) < order + 0.5

@pytest.mark.parametrize("method, calls", [("euler", 11), ("heun", 21)])
def test_the_sde_ends_with_a_step_without_noise(method, calls):
    # where v is zero, dx = -x dt + noise: the last step multiplies by 1 - 0.004
    seen, v = [], lambda x, t: seen.append((t.item(), x.item())) or torch.zeros_like(x)
    x = sde(v, torch.ones(1, 1, dtype=torch.float64), 10, method)
    t, before = seen[-1]
    assert len(seen) == calls and t == pytest.approx(0.996) and x.item() == pytest.approx(0.996 * before)

def test_time_shift_is_the_official_map():
    for method, points in ("euler", (0, 0.25, 0.5, 0.75)), ("heun", (0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75)):
        seen, z = [], torch.zeros(1, 1, dtype=torch.float64)  # t = 1 is never asked for
        ode(lambda x, t: seen.append(t.item()) or x, z, 4, method, shift=0.3)
        assert np.allclose(seen, [0.3 * t / (1 - 0.7 * t) for t in points])

def test_guidance_acts_in_its_interval_only_and_costs_nothing_outside():
    sizes, model = [], lambda x, t, s, y: sizes.append(len(x)) or y.double()[:, None] + s.sum(1, keepdim=True)
    model.config = SiTConfig(**TINY, num_classes=5)
    s, y = torch.ones(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    v = guided(model, s, y, cfg=2.5, interval=(0.3, 0.7))
    at = lambda t: v(torch.zeros(2, 1), torch.full((2,), t)).flatten()  # in float32 0.7 is less than 0.7
    plain = torch.tensor([4, 5]).double()
    assert torch.equal(at(0.29), plain) and torch.equal(at(0.71), plain) and sizes == [2, 2]
    for t in (0.3, 0.5, 0.7):  # null: label 5, s = 0
        assert torch.allclose(at(t).double(), 5 + 2.5 * (plain - 5)) and sizes.pop() == 4

# ----------------------------------------------------------------------------- memory
def features(n=700, d=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=g) * 0.9 ** torch.arange(d) @ torch.randn(d, d, generator=g)
    return F.normalize(f + 1, dim=1)

@pytest.mark.parametrize("kind", ["plain", "repeated rows", "fewer rows than numbers", "constant columns"])
def test_bank_is_the_truncated_svd(kind):
    f = features().double()
    f = {"plain": f, "repeated rows": f[:50].repeat(4, 1), "fewer rows than numbers": f[:60],
         "constant columns": F.normalize(torch.cat([f[:, :48], f[:, 48:] * 0 + 0.1], 1), dim=1)}[kind]
    mean = f.mean(0)
    U, S, V = torch.linalg.svd(f - mean, full_matrices=False)
    energy = S.square().cumsum(0) / S.square().sum()
    for r, how in ((24, dict(rank=24)), (int((energy < 0.9).sum()) + 1, dict(energy=0.9))):
        bank = MemoryBank.build(f, dtype="float32", **how)
        coef, basis, at = (torch.from_numpy(a.copy()) for a in (bank.coef, bank.basis, bank.mean))
        assert (coef @ basis + at - f).norm() <= S[r:].square().sum().sqrt() * 1.001 + 1e-5 and bank.rank == r
        assert bank.energy == pytest.approx(energy[r - 1].item(), rel=1e-5)
        want = F.normalize((U[:, :r] * S[:r]) @ V[:r] + mean, dim=1)
        assert torch.allclose(bank[:], want.float(), atol=1e-4)
        assert np.allclose(bank.basis @ bank.basis.T, np.eye(r), atol=1e-5)

@pytest.mark.parametrize("dtype, worst", [("float32", 2e-6), ("float16", 5e-4), ("int8", 0.01)])
def test_quantisation_error(dtype, worst):
    f = features()
    exact, bank = MemoryBank.build(f.double(), 24, "float32"), MemoryBank.build(f, 24, dtype)
    assert bank.coef.dtype == dtype and (bank[:] - exact[:]).norm(dim=1).max() < worst
    step = bank.scale[None] * (0.5 if dtype == "int8" else 1e-3 * np.abs(bank.coef))
    assert (np.abs(bank.coef * bank.scale - exact.coef) <= step + 1e-6).all()

def test_bank_indexing_file_and_immutability():
    f = features()
    bank = MemoryBank.build(f, 24, labels=np.arange(700) % 7, encoder="thumbnail")
    bank.save("bank.pt")
    again = MemoryBank.load("bank.pt")
    assert again.id == bank.id != MemoryBank.build(f, 23).id
    assert (len(again), again.dim, again.rank) == (700, 96, 24)
    assert again.encoder == "thumbnail" and (again.labels == bank.labels).all()
    assert bank[3].shape == (96,) and torch.equal(bank[3], bank[[3]][0]) and torch.equal(bank[-1], bank[699])
    assert torch.allclose(again[torch.tensor([5, 1])], bank[:][[5, 1]], atol=1e-6)
    assert again[0:0].shape == (0, 96) and torch.allclose(bank[:].norm(dim=1), torch.ones(700), atol=1e-5)
    assert torch.allclose(bank.decode(bank.project(bank[:9])), bank[:9], atol=1e-4)
    for bad in (700, -701, [0, 700]):
        refused("700|701", bank.__getitem__, bad, error=IndexError)
    for one in (bank, again):
        refused("read-only", one.coef.__setitem__, 0, 0)
        refused("coef", setattr, one, "coef", one.coef * 2, error=AttributeError)
    full = MemoryBank.build(f, None)
    assert full.coef.dtype == np.float16 and torch.allclose(full[:], f, atol=1e-3) and full.rank == 96

def test_two_processes_build_the_bank_that_one_builds():
    np.save("f.npy", features(9001, 48))  # three blocks for one, two for each of two
    for n in (0, 2):
        for flag in ("--energy 0.9", "--rank full"):
            run(f"memory.py --features f.npy {flag} --out {flag[2:6]}{n}", processes=n)
    one, two, full1, full2 = map(MemoryBank.load, ("ener0", "ener2", "rank0", "rank2"))
    assert np.allclose(one.basis, two.basis, atol=1e-6) and np.allclose(one.scale, two.scale, rtol=1e-5)
    assert np.abs(one.coef.astype(int) - two.coef).max() <= 1 and (one.coef == two.coef).mean() > 0.999
    assert full1.id == full2.id and "by unknown" in run("memory.py --info rank0")

def test_a_bank_file_is_far_larger_than_what_opening_and_indexing_it_takes():
    coef = np.lib.format.open_memmap("c.npy", "w+", np.float16, (400_000, 512))  # 410 MB
    zeros, ones, labels = np.zeros((1, 512), "f4"), np.ones(512, "f4"), np.zeros(400_000, int)
    MemoryBank(zeros[0], zeros[:0], ones, coef, labels, 1.0, "").save("bank.pt")
    code = ("import resource, memory; peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "was = peak(); b = memory.MemoryBank.load('bank.pt'); b[::20_000]; b.id; print(peak() - was)")
    out = subprocess.check_output([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=HERE))
    assert int(out) < 40_000  # KB

def test_extension_keeps_old_rows_and_new_directions():
    old, new = features(400, 96) * (torch.arange(96) < 64), features(30, 96, seed=1)
    for rank, dtype, worst in ((64, "float32", 1e-5), (64, "float16", 2e-3), (64, "int8", 0.02),
                               (None, "int8", 2e-3)):
        bank = MemoryBank.build(old, rank, dtype, encoder="e", labels=np.arange(400))
        before, at = bank.id, bank[:]
        more = bank.extend(new, labels=[7] * 30)
        assert bank.id == before != more.id and torch.equal(bank[:], at) and more.encoder == "e"
        assert len(more) == 430 and torch.allclose(more[:400], at, atol=1e-6) and more.labels[-1] == 7
        assert (more[400:] - F.normalize(new, dim=1)).norm(dim=1).max() < worst
        if rank:
            assert np.allclose(more.basis @ more.basis.T, np.eye(more.rank), atol=1e-5)
            assert more.rank == 94 and bank.extend(new, limit=5).rank == 69  # 30 new rows: 30 new directions
            assert bank.extend(old[:9]).rank == 64 and bank.extend(new, limit=0).rank == 64
            err = [(bank.extend(new, limit=k)[400:] - new).square().sum() for k in (0, 5, 29)]
            assert err[0] > err[1] > err[2]
    wide, want = MemoryBank.build(0.01 * old + old[:1], 64).extend(-old[:3]), -F.normalize(old[:3], dim=1)
    assert wide.coef.dtype == "float16" and (wide[400:] - want).norm(dim=1).max() < 0.02  # far outside

@pytest.mark.parametrize("rank", [24, None])
def test_nearest_is_the_largest_cosine(rank):
    f, q = features(9000, 48), 3 * features(5, 48, seed=1)
    bank = MemoryBank.build(f, rank)
    want = (F.normalize(q, dim=1) @ bank[:].T).topk(4)
    similarity, index = bank.nearest(q, 4)
    assert torch.allclose(similarity, want.values, atol=1e-5) and torch.equal(index, want.indices)

@pytest.mark.parametrize("method", ["slerp", "lerp", "concat", "mask"])
def test_mixes_go_from_a_to_b_on_the_sphere_and_mask_is_dropout(method):
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(2, 7, 64), dim=-1)
    b[0], b[1], b[2] = a[0], -a[1], F.normalize(a[2] + 1e-7, dim=0)
    alpha = torch.linspace(0, 1, 9)[:, None, None]
    m = mix(a.expand(9, 7, 64), b.expand(9, 7, 64), alpha, method)
    assert torch.allclose(m.norm(dim=-1), torch.ones(9, 7), atol=1e-5)
    assert torch.allclose(m[0], a, atol=1e-5) and torch.allclose(m[-1], b, atol=1e-5)
    away = (m * a).sum(-1)
    if method == "slerp":
        angle = torch.acos((a * b).sum(-1).clamp(-1, 1))
        assert torch.allclose(away[:, 3:], (alpha[..., 0] * angle).cos()[:, 3:], atol=1e-5)
        assert torch.allclose(away[:, 1], (alpha[:, 0, 0] * np.pi).cos(), atol=1e-4)  # half a turn
    if method in ("concat", "mask"):  # every entry is one of the two, up to the scale of the row
        k = m[4, 3:] / a[3:], m[4, 3:] / b[3:]
        scale = torch.where((k[0] - k[0].median(1, True)[0]).abs() < 1e-4, k[0], k[1])
        assert torch.allclose(scale, scale[:, :1].expand_as(scale), atol=1e-3)
    assert ((away[:-1] - away[1:])[:, 3:] > -1e-5).all() or method == "mask"
    m = mask(torch.ones(200, 500), 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(m.unique(), torch.tensor([0, 1 / 0.6])) and abs((m == 0).float().mean() - 0.4) < 0.01
    assert abs((m == 0).float().mean(0) - 0.4).max() < 0.2  # every entry, not always the same ones

def test_glyphs_are_deterministic_varied_and_labelled():
    (a, labels), (b, _), (c, _) = (glyphs(n=260, size=16, seed=seed) for seed in (0, 0, 1))
    digits, _ = glyphs(n=10, size=16, characters="0123456789")
    assert (a == b).all() and not (a == c).all() and a.shape == (260, 16, 16, 3) and a.dtype == np.uint8
    assert (np.bincount(labels) == 10).all() and len(np.unique(a.reshape(260, -1), axis=0)) == 260
    assert digits.std(axis=(1, 2)).max(axis=1).min() > 10  # every image shows something
    corner = a[:, 0, 0].astype(int) - a[:, -1, -1]
    assert 0.3 < (np.abs(corner).max(axis=1) < 2).mean() < 0.8  # flat backgrounds, and gradients

def test_images_of_every_mode_become_rgb():
    new = lambda mode, colour, size=(4, 4): Image.new(mode, size, colour)
    red, wide = new("RGB", (200, 10, 20)), new("RGB", (0, 0, 255), (6, 4))
    wide.getexif()[0x0112] = 6  # turned by 90 degrees
    for image, want in ((red, (200, 10, 20)), (red.quantize(4), (200, 10, 20)), (new("L", 77), 77),
                        (new("RGBA", (0,) * 4), 255), (new("CMYK", (0,) * 4), 255), (new("1", 1), 255),
                        (Image.fromarray(np.full((4, 4), 0x8080, np.uint16)), 128), (new("LA", (9, 0)), 255)):
        assert np.abs(np.asarray(to_rgb(image)).astype(int) - want).max() <= 1, image.mode
    wide.save("w.png", exif=wide.getexif())
    with Image.open("w.png") as image:
        assert to_rgb(image).size == (4, 6)
    tall = np.arange(90, dtype=np.uint8).repeat(30).reshape(90, 30)
    crop = center_crop(Image.fromarray(tall).convert("RGB"), 10)
    assert crop.size == (10, 10) and abs(np.asarray(crop).mean() - 44.5) < 1

def test_arrays_are_mapped_not_loaded():
    x, y = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), np.array([0, 1, 2, 1, 0])
    np.savez("a.npz", arr_0=x, arr_1=y)
    np.savez_compressed("b.npz", images=x, labels=y)
    np.save("c.npy", x)
    for name, labels, mapped in (("a.npz", y, True), ("b.npz", y, False), ("c.npy", -1, True)):
        images = Images(name, 8)
        assert all((images[i] == x[i]).all() for i in range(5)) and (images.labels == labels).all()
        assert isinstance(images.array, np.memmap) == mapped

def test_preparation_of_a_folder():
    x, labels = folder_of_images("images")
    meta = prepare("images", "data", 24, flip=True)
    latents, stored = np.load("data/latents.npy"), np.load("data/labels.npy")
    assert (latents[:40] == x[np.argsort(labels % 2, kind="stable")].transpose(0, 3, 1, 2)).all()
    assert (latents[40:] == latents[:40, :, :, ::-1]).all() and meta["classes"] == ["class0", "class1"]
    f = F.normalize(thumbnail(torch.from_numpy(latents).float() / 127.5 - 1), dim=1)
    bank = MemoryBank.load("data/bank.pt")  # a mirrored image has a snippet of its own
    assert bank.id == meta["bank"] and ((bank[:] * f).sum(1) > 0.99).all()
    assert sorted(os.listdir("data")) == ["bank.pt", "labels.npy", "latents.npy", "meta.json"]
    np.save("f.npy", features(80))
    prepare("images", "own", 24, flip=True, features="f.npy")
    bank = MemoryBank.load("own/bank.pt")
    assert ((bank[:] * features(80)).sum(1) > 0.99).all() and bank.encoder == os.path.abspath("f.npy")
    assert (np.load("own/latents.npy") == latents).all() and (stored == np.tile(np.sort(labels % 2), 2)).all()
    refused("80 rows for 40 entries", prepare, "images", "no", 24, features="f.npy")
    refused("image_size 24, not 16", prepare, "images", "data", 16, flip=True)

# ----------------------------------------------------------------------------- fid
def test_resize_pooling_names_and_sizes_are_those_of_tensorflow_1():
    for h, w in ((64, 5), (299, 400), (1, 31)):
        x = np.random.default_rng(0).integers(0, 256, (h, w)).astype(np.float64)
        y = fid.resize_tf1(torch.tensor(x)[None, None].float())[0, 0].numpy()
        for i, j in ((0, 0), (298, 298), (100, 298), (17, 201)):
            (a, p), (b, q) = ((k * n // 299, k * n % 299 / 299) for k, n in ((i, h), (j, w)))
            top, low = ((1 - q) * z[b] + q * z[min(b + 1, w - 1)] for z in (x[a], x[min(a + 1, h - 1)]))
            assert abs(y[i, j] - (top + p * (low - top))) < 1e-3
    assert fid.POOLS["mean"](torch.arange(12.0).view(1, 3, 4))[0, 0, 0] == (0 + 1 + 4 + 5) / 4  # no padding
    assert [text.split()[-1][:4] for _, text in fid.LAYERS[-2:]] == ["mean", "max="]
    net = fid.load_inception("random")
    state = {k: v.clone() for k, v in net.state_dict().items() if "num_batches" not in k}
    assert sum(p.numel() for p in net.parameters()) == 21_785_568 + 2048 * 1008 + 1008  # torchvision's, fc
    for name, shape in {"Conv2d_4a_3x3.conv": (192, 80, 3, 3), "Mixed_7b.branch3x3dbl_3b.bn": (384,),
                        "Mixed_6d.branch7x7dbl_4.conv": (160, 160, 7, 1), "fc": (1008, 2048)}.items():
        assert state[name + ".weight"].shape == shape, name
    x, seen = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8), []
    dict(net.named_modules())["Mixed_6d.branch1x1"].register_forward_hook(lambda *a: seen.append(a[2].relu()))
    pool, spatial, logits = net(x)
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0].permute(0, 2, 3, 1)[..., :7])
    assert 0.05 < pool.mean() < 50 and torch.equal(logits, pool @ state["fc.weight"].T)
    torch.manual_seed(3)
    state["fc.bias"] += 1  # is not used
    assert all(torch.equal(a, b) for a, b in zip(fid.load_inception(state)(x), (pool, spatial, logits)))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))

def test_distance_and_scores_against_plain_numpy():  # tr (X'X Y'Y)^1/2 = sum of svd(X Y'), singular or not
    draw, d = np.random.default_rng(0).normal, 40
    for n, m in ((400, 500), (30, 20), (30, 500), (500, 30)):
        x, y = draw(size=(n, d)), draw(size=(m, d)) @ draw(size=(d, d))
        a, b = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
        root = np.linalg.svd((x - a[0]) @ (y - b[0]).T, compute_uv=False).sum() / np.sqrt((n - 1) * (m - 1))
        want = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * root
        assert abs(fid.frechet_distance(*a, *b) / want - 1) < 1e-6
        assert abs(fid.frechet_distance(*b, *b)) < 1e-9 * np.trace(b[1])
    rng = np.random.default_rng(0)
    p = np.exp(logits := 3 * rng.normal(size=(25, 7))) / np.exp(logits).sum(1, keepdims=True)
    want = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p[:10], p[10:20], p[20:])]
    assert abs(fid.inception_score(logits, split=10) - np.mean(want)) < 1e-9
    ref, gen = rng.normal(size=(60, 4)) + 100, 1.5 * rng.normal(size=(80, 4)) + 100
    gen[20:25] = ref[0]  # radius 0, which still holds what is the same
    squares = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(2)
    r, g = (np.sort(squares(x, x), axis=1)[:, 3] for x in (ref, gen))
    want = (squares(ref, gen) <= r[:, None]).any(0).mean(), (squares(ref, gen) <= g).any(1).mean()
    assert np.allclose(fid.precision_recall(ref, gen), want) and 0.1 < min(want) < max(want) < 0.99
    blocks = list(fid.distances(*(torch.tensor(x - 100).float() for x in (ref, gen)), block=500))
    assert len(blocks) == 10 and np.allclose(torch.cat([d for _, d in blocks]), squares(ref, gen), atol=1e-4)

def test_sets_of_every_kind_give_the_same_numbers_and_bad_ones_an_error():
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 10, 3), dtype=np.uint8)
    np.savez("a.npz", arr_0=images)
    np.savez_compressed("b.npz", arr_0=images[:, ::2])
    tail = "b.npz --inception random --json out.json --batch-size 2"
    text = run(f"fid.py a.npz {tail} --save-stats ref.npz", processes=2)  # a share of the work each
    got, net = memory.read_json("out.json"), fid.load_inception("random")
    assert text.count("random weights") == len(text.splitlines()) and got["N_ref"] == got["N_samples"] == 5
    (x, u, _), (y, *_) = (net(torch.from_numpy(z).permute(0, 3, 1, 2)) for z in (images, images[:, ::2]))
    assert (got["precision"], got["recall"]) == fid.precision_recall(x, y)
    assert np.allclose(np.load("ref.npz")["sigma_s"], np.cov(u.T), atol=1e-4)
    run(f"fid.py ref.npz {tail}")
    new = memory.read_json("out.json")
    assert all(abs(new[k] - got[k]) < 1e-4 * got[k] for k in ("FID", "sFID")) and new["precision"] is None
    os.mkdir("images")
    for i, image in enumerate(images):
        Image.fromarray(image[i:]).save(f"images/{i}.png")
    assert [z.shape[0] for z in fid.open_set("images")[1](range(5))] == [12, 11, 10, 9, 8]
    Path("images/z.png").write_bytes(b"no image")
    changed = (255 - v if i == 500 else v for i, v in enumerate(Path("a.npz").read_bytes()))
    Path("c.npz").write_bytes(bytes(changed))
    np.savez("float.npz", arr_0=images / 255)
    np.savez("nan.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    torch.save(argparse.Namespace(), "x.pth")  # a class: weights_only refuses it
    read = lambda name: fid.open_set(name)[1](range(6))
    for f, source, message in ((read, "images", "z.png cannot be used"), (read, "images/z.png", "not a zip"),
                               (read, "c.npz", "Bad CRC-32"), (read, "float.npz", "arr_0 is float64"),
                               (read, "nan.npz", "not finite"), (fid.load_inception, "x.pth", "x.pth"),
                               (fid.load_inception, {}, "keys are missing")):
        refused(message, f, source)
    assert "gone cannot be used" in run("fid.py gone images", processes=1, fails=True)

# ----------------------------------------------------------------------------- from the command line
def test_folder_to_samples(trained):  # prepared, trained on and sampled from by the README's commands
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    assert [entry["step"] for entry in log("out")] == [2, 4, 6] and np.isfinite(numbers("out")).all()
    assert Image.open("out/samples.png").size == (8 * 64, 8 * 64)
    ckpt = load("out/ckpt.pt")
    assert ckpt["ema"]["token_projection.weight"].shape == (2 * 2 * 256, 768)  # SiT-T's own default
    assert {"encoder": "thumbnail", "tokenizer": "pixel"}.items() <= ckpt["meta"]["settings"].items()
    bank = MemoryBank.load(f"out/{ckpt['bank']['path']}")
    seen = (bank[:] - ckpt["ema"]["memory_mean"]) * ckpt["config"]["memory_scale"]
    assert ckpt["bank"]["id"] == bank.id and seen.mean(0).abs().max() < 1e-4
    assert seen.square().mean().item() == pytest.approx(1, abs=1e-4)
    # the same images from the command line, in other batches, by two processes, and from Python
    ask = ("sample.py --ckpt out/ckpt.pt --num-images 10 --steps 3 --device cpu --method sde-heun --cfg 1.5 "
           "--cfg-interval 0.2 1 --mask 0.3 --seed 5")
    run(f"{ask} --out a.npz --batch-size 4")
    run(f"{ask} --out b.npz --batch-size 3", processes=2)
    a, b = made("a.npz"), made("b.npz")
    x = generate(load_sit(ckpt), [7, 3], MemoryBank.load("out/data/bank.pt"), 5, "sde-heun", 3, cfg=1.5,
                 interval=(0.2, 1.0), mask_ratio=0.3)
    assert a.shape == (10, 16, 16, 3) and len(np.unique(a.reshape(10, -1), axis=0)) == 10
    assert np.abs(a - b).max() <= 1 and np.abs(a[[7, 3]] - decode(x, ckpt["meta"])).max() <= 1  # rounding
    assert sorted(os.listdir()) == ["a.npz", "b.npz", "images", "out"]
    # the baselines, through the same code
    for condition, classes in (("none", 0), ("class", 2)):
        run(f"train.py {QUICK} --data images --steps 6 --out {condition} --condition {condition}")
        ckpt = load(f"{condition}/ckpt.pt")
        assert (ckpt["config"]["num_classes"], ckpt["config"]["memory_dim"]) == (classes, 0)
    run("sample.py --ckpt class/ckpt.pt --label 1 --num-images 2 --steps 2 --out pngs")
    x = decode(generate(load_sit(ckpt), [0, 1], steps=2, label=1), ckpt["meta"]).astype(int)
    assert sorted(os.listdir("pngs")) == ["000000.png", "000001.png"]
    assert all(np.abs(x[i] - np.array(Image.open(f"pngs/00000{i}.png"))).max() <= 1 for i in (0, 1))

def same_run(*runs):  # their checkpoints and logs agree to the last bit
    a, b = ([x["model"], x["ema"], x["optimizer"]["state"]] for x in (load(f"{out}/ckpt.pt") for out in runs))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert numbers(runs[0]) == numbers(runs[1]) != []

def test_two_processes_and_a_resumed_run_take_the_same_steps():
    np.savez("x.npz", arr_0=glyphs(n=300, size=16)[0])  # two blocks, one for each process
    for n in (0, 2):
        run(f"memory.py --data x.npz --image-size 16 --out data{n}", processes=n)
    for file in ("latents.npy", "labels.npy"):
        assert Path("data0", file).read_bytes() == Path("data2", file).read_bytes()
    quick = f"train.py {QUICK} --data data0 --log-every 1 --micro-batch 4 --preview-every 0"
    run(f"{quick} --steps 8 --out one")
    run(f"{quick} --steps 8 --out two", processes=2)
    run(f"{quick} --steps 5 --out cut")
    run("train.py --resume --steps 8 --out cut --device cpu")
    same_run("one", "cut")
    one, two = ([x["model"], x["ema"]] for x in map(load, ("one/ckpt.pt", "two/ckpt.pt")))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-5)
    assert np.allclose(numbers("one"), numbers("two"), rtol=2e-3)
    assert "nothing to do" in run("train.py --resume --out cut --device cpu")

def test_schedule_split_and_batches_that_cover_every_image_once_an_epoch():
    args = argparse.Namespace(lr=2.0, warmup=10, decay=(60, 100))
    assert [learning_rate(k, args) for k in (0, 9, 30, 60, 80, 100)] == pytest.approx([0.2, 2, 2, 2, 1, 0])
    assert split(64, None, 2) == (32, 1) and split(64, 8, 2) == (8, 4) and split(300, None, 1) == (100, 3)
    assert [split(1024, None, n) for n in (1, 4, 8)] == [(128, 8), (128, 2), (128, 1)]
    refused("63 or 66", split, 64, None, 3)
    refused("1, 2, 4, 8, 16, 32", split, 64, 5, 2)
    np.save("x.npy", glyphs(n=50, size=16)[0])
    prepare("x.npy", "data", 16)
    data = Data("data", seed=3, device=torch.device("cpu"))
    rows = np.concatenate([data.rows(a, a + 5) for a in range(0, 100, 5)])
    assert (np.sort(rows[:50]) == np.arange(50)).all() and (np.sort(rows[50:]) == np.arange(50)).all()
    assert not (rows[:50] == rows[50:]).all() and isinstance(data.latents, np.memmap)
    parts = [data.rows(40, 50), np.arange(50), data.rows(100, 120)]
    assert (np.sort(data.rows(40, 120)) == np.sort(np.concatenate(parts))).all()
    i, ((x, s, y),) = data.rows(48, 53), data.batches([(48, 53)])
    assert torch.equal(y, torch.full((5,), -1)) and torch.equal(s, data.bank[i])
    assert torch.allclose(x, torch.from_numpy(data.latents[i]) / 127.5 - 1, atol=1e-6)

def test_blocks_go_on_after_a_kill_and_start_anew_with_other_settings():
    make = lambda settings: Blocks("b", settings, {"x.npy": ((10, 2), "int64")}, 4)
    blocks = make({"a": 1})
    assert blocks.todo == [range(0, 4), range(4, 8), range(8, 10)]
    blocks.write(range(4, 8), x=np.full((4, 2), 7))
    again = make({"a": 1})
    assert again.todo == [range(0, 4), range(8, 10)] and (again.arrays["x.npy"][4:8] == 7).all()
    refused("2 of 3 blocks", again.finish, error=RuntimeError)
    assert len(make({"a": 2}).todo) == 3

def test_killed_and_stopped_runs_end_as_if_nothing_had_happened():
    np.savez("x.npz", arr_0=glyphs(n=64, size=16)[0])
    command = f"train.py {QUICK} --data x.npz --log-every 1 --save-every 2 --steps 80"
    run(f"{command} --preview-every 0 --out one")
    command, ckpt = f"{command} --preview-every 20 --out cut", Path("cut/ckpt.pt")
    modified = lambda: ckpt.stat().st_mtime_ns if ckpt.exists() else 0
    for number, wait in zip([signal.SIGKILL] * 3 + [signal.SIGTERM], (0.03, 0.2, 0, 0)):  # mostly in saving
        was, p = modified(), start(command)
        wait_for(lambda: modified() > was, p)
        time.sleep(wait)
        p.send_signal(number)
        (stdout, stderr), command = p.communicate(), "train.py --resume --out cut --device cpu"
    step = load(ckpt)["step"]
    assert p.returncode == 0 and f"holds step {step}: stopped by a signal" in stdout, stdout + stderr
    assert step < 80 and len(log("cut")) == step and not os.path.exists("one/samples.png")
    with open("cut/log.jsonl", "a") as f:
        f.write('{"step": 79}\n{"st')  # as left behind by a kill
    os.remove("x.npz")  # what is prepared is enough
    run(command)
    same_run("one", "cut")
    assert {"samples.png", "samples-0000080.png"} <= {*os.listdir("cut")} and not [*Path("cut").glob("*.tmp")]

def test_a_dead_process_ends_the_others(trained):
    quick = f"train.py {QUICK} --steps 9999 --decay 0 0 --save-every 1 --out out --data"
    p = start(quick, trained / "out/data", processes=2)
    wait_for(lambda: os.path.exists("out/ckpt.pt"), p)
    workers = subprocess.run(["pgrep", "-P", str(p.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    message = p.communicate(timeout=60)[1]
    assert p.returncode not in (0, None) and "Signal 9" in message and load("out/ckpt.pt")["step"] >= 1

def test_a_full_disk_leaves_the_old_checkpoint(trained):
    shutil.copytree(trained / "out", "out")
    before = Path("out/ckpt.pt").read_bytes()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)
    p = start("train.py --resume --steps 8 --out out --device cpu", preexec_fn=limit)
    message = p.communicate()[1]
    assert p.returncode == 2 and "what was there is kept" in message.splitlines()[-1], message
    assert Path("out/ckpt.pt").read_bytes() == before and not os.path.exists("out/ckpt.pt.tmp")

def test_steps_that_are_not_finite_are_skipped_by_all_processes():
    np.save("x.npy", glyphs(n=96, size=16)[0])
    prepare("x.npy", "data", 16)
    latents = np.load("data/latents.npy").astype(np.float16)
    latents[5] = np.nan  # in one batch of six, and there in one micro-batch
    np.save("data/latents.npy", latents)
    quick = f"train.py {QUICK} --data data --log-every 1 --micro-batch 4 --preview-every 0"
    for name, processes in (("one", 0), ("two", 2)):
        run(f"{quick} --steps 20 --out {name}", processes=processes)
    one, two = load("one/ckpt.pt"), load("two/ckpt.pt")
    assert one["skipped"] == two["skipped"] == 4  # of 20 steps 3 1/3 epochs
    assert all(s["step"] == 16 for s in one["optimizer"]["state"].values())
    assert all(torch.isfinite(v).all() for v in one["model"].values())
    torch.testing.assert_close(one["model"], two["model"], rtol=1e-5, atol=5e-5)
    assert [entry["loss"] is None for entry in log("one")].count(True) == log("one")[-1]["skipped"] == 4
    np.save("data/latents.npy", np.full_like(latents, np.inf))
    refused("no finite loss or gradient in 50 steps, to 50", run, f"{quick} --out all", error=SystemExit)

def test_preparation_and_sampling_go_on_after_a_kill(trained):
    folder_of_images("images", 1200, 64)
    shutil.copytree(trained / "out", "out")
    for command, out, done, files in (
            ("memory.py --image-size 32 --data images", "data", "/parts/done.npy",
             ["/latents.npy", "/labels.npy", "/bank.pt", "/meta.json"]),
            ("sample.py --ckpt out --num-images 60 --batch-size 2", "s.npz", ".parts/done.npy", [""])):
        killed, whole, done = f"killed-{out}", f"whole-{out}", f"killed-{out}{done}"
        p = start(f"{command} --out {killed}")
        wait_for(lambda: os.path.exists(done) and os.path.getsize(done) > 128 and np.load(done).any(), p)
        p.kill()
        p.communicate()
        assert not os.path.isfile(killed) and not os.path.exists(f"{killed}/meta.json")
        assert "are done already" in run(f"{command} --out {killed}")
        run(f"{command} --out {whole}")
        assert all(Path(killed + f).read_bytes() == Path(whole + f).read_bytes() for f in files)
        assert not os.path.exists(done)

def test_damaged_and_crafted_files_are_refused():
    class Crafted:
        def __reduce__(self):
            return os.mkdir, (os.path.abspath("ran"),)
    Path("pickle.pt").write_bytes(pickle.dumps(Crafted()))
    torch.save({"mean": Crafted()}, "zip.pt")
    Path("no.pt").write_bytes(b"PK\x03\x04 nothing")
    MemoryBank.build(features(50, 16), 4, labels=range(50)).save("bank.pt")
    whole = Path("bank.pt").read_bytes()
    for cut in [0, 1, 100, *np.random.default_rng(0).integers(0, len(whole), 20).tolist()]:
        Path(f"{cut}.pt").write_bytes(whole[:cut])
    for name in set(os.listdir()) - {"bank.pt"}:
        refused(f"{name} is damaged", MemoryBank.load, name)
    state = load("bank.pt")
    for key, value in dict(mean=state["mean"][:3], coef=state["coef"].long(), basis=state["basis"][0],
                           scale="4", labels=state["labels"][1:], energy=None, id=3).items():
        torch.save({**state, key: value}, "wrong.pt")
        refused("wrong.pt is no memory bank", MemoryBank.load, "wrong.pt")
    assert not os.path.exists("ran")

def test_external_and_internal_memory_and_audit():
    digits, _ = glyphs(n=3, size=32, characters="357")
    for i, image in enumerate(digits):
        Image.fromarray(image).save(f"{i}.png")
    run("train.py --steps 40 --batch-size 64 --preview-every 0 --out o")
    ask = "sample.py --ckpt o --steps 4 --device cpu"
    run(f"{ask} --out a.npz --add 0.png 2.png --num-images 5 --save-bank more.pt")
    rows = made("a.npz").reshape(2, 6, 32, 32, 3)
    assert (rows[0, 0] == digits[0]).all() and (rows[1, 0] == digits[2]).all()
    bank, more = MemoryBank.load("o/data/bank.pt"), MemoryBank.load("more.pt")
    assert len(more) == len(bank) + 2 and torch.allclose(more[:99], bank[:99], atol=1e-6)
    s = thumbnail(torch.from_numpy(digits).permute(0, 3, 1, 2) / 127.5 - 1)
    assert ((F.normalize(s[[0, 2]], dim=1) * more[-2:]).sum(1) > 0.999).all()  # nothing of them is lost
    assert (bank.nearest(s[[0, 2]])[0] < 0.999).all()
    ckpt = load("o/ckpt.pt")
    want = decode(generate(load_sit(ckpt), range(5), None, steps=4, s=more[-2].expand(5, -1)), ckpt["meta"])
    assert np.abs(rows[0, 1:] - want).max() <= 1  # a row is that snippet with the noises 0 .. 4
    run(f"{ask} --out m.npz --mix 7 1.png --num-images 5 --mix-method lerp")
    mixed = made("m.npz")
    far = np.abs(mixed - mixed[:1]).mean((1, 2, 3))
    assert far[0] == 0 and (np.diff(far) > 0).all()  # one noise, from the one to the other
    ends = [generate(load_sit(ckpt), [0], steps=4, s=a) for a in (bank[[7]], F.normalize(s[1:2]))]
    assert np.abs(mixed[[0, -1]] - decode(torch.cat(ends), ckpt["meta"])).mean() < 1
    os.renames("1.png", "d/1.png")
    out = run(f"{ask} --out audit.png --audit d --num-images 20", processes=2)
    own, near, _, held = (float(median[:5]) for median in re.findall(r"\w +median (.*)", out))
    data = (np.load("o/data/latents.npy").reshape(10400, -1) - 127.5) / 127.5
    d = np.sqrt(((data - (digits[1].transpose(2, 0, 1).reshape(-1) - 127.5) / 127.5) ** 2).mean(1))
    assert held == pytest.approx(d.min(), abs=2e-3) and 0 < near <= own
    assert Image.open("audit.png").size == (16 * 64, 3 * 64)

def test_latents_dinov2_and_alignment_from_the_command_line():  # small random networks, official formats
    vae, dino = randomised(AutoencoderKL(4, (32, 32), 1)), randomised(DINOv2(64, 2, 8))
    torch.save({"state_dict": vae.state_dict()}, "vae.pt")
    torch.save(dino.state_dict(), "dino.pth")
    folder_of_images("images", 30)
    for n in (0, 2):
        run("memory.py --data images --tokenizer vae.pt --encoder dino.pth --image-size 32 --flip --patches "
            f"--rank 16 --out {n}", processes=n)
    z, meta = np.load("0/latents.npy"), memory.read_json("0/meta.json")
    assert z.shape == (60, 4, 16, 16) and z.dtype == np.float16 and meta["latent"] == [4, 16, 16]
    assert np.abs(z.astype(float) - np.load("2/latents.npy")).max() < 1e-3
    images = np.stack([Images("images", 32)[i] for i in range(30)])
    x = torch.from_numpy(np.concatenate([images, images[:, :, ::-1]])).permute(0, 3, 1, 2)
    with torch.no_grad():
        want, (f, tokens) = vae.encode(x / 127.5 - 1)[0], dinov2_features(dino.eval(), x)
    assert np.allclose(z, want, rtol=2e-3, atol=2e-3)
    assert np.allclose(meta["mean"], z.astype(float).mean((0, 2, 3)), atol=1e-3)
    bank, patches = MemoryBank.load("0/bank.pt"), MemoryBank.load("0/patches.pt")
    assert ((bank[:] * F.normalize(f, dim=1)).sum(1) > 0.99).all()  # a mirrored image has its own, last 30
    tokens = F.normalize(tokens.flatten(0, 1), dim=1)
    kept, best = ((b[:] * tokens).sum(1).mean().item() for b in (patches, MemoryBank.build(tokens, 16)))
    assert len(patches) == 60 * 256 and kept == pytest.approx(best, abs=1e-3) and kept > 0.9
    quick = f"train.py --data {os.path.abspath('0')} --batch-size 2 --steps 2 --preview-every 0 --align 0.5"
    assert "SiT-T/4 expects 16 patch tokens" in run(f"{quick} --model SiT-T/4 --out no", fails=True)
    run(f"{quick} --model LightningDiT-S/1 --scale 1 --out o")  # and then the same, as an official file
    torch.save({"ema": {f"module.{k}": v for k, v in load("o/ckpt.pt")["ema"].items()}}, "official.pt")
    torch.save({k: torch.tensor(meta[k]).view(1, 4, 1, 1) for k in ("mean", "std")}, "stats.pt")
    ask = "--num-images 2 --steps 1 --device cpu --out"
    run(f"sample.py --ckpt o/ckpt.pt {ask} a.npz")
    assert "name --tokenizer" in run(f"sample.py --ckpt official.pt {ask} b.npz", fails=True)
    run("sample.py --ckpt official.pt --tokenizer vae.pt --bank 0/bank.pt --latent-stats stats.pt "
        f"{ask} b.npz")
    a, b = made("a.npz"), made("b.npz")
    assert a.shape == (2, 32, 32, 3) and np.abs(a - b).max() <= 1 and a.std() > 5

BAD = {  # the beginning of a command -> its flags -> what the message holds
    "train.py --out out": {"--data f.npy": "float32 (4, 8, 8, 3); expected are images, uint8",
        "--resume --out ok --batch-size 32": "cannot go on with --batch-size 32, not 16",
        "--resume --out ok --model SiT-T/4": "cannot go on with --model SiT-T/4, not SiT-T/8",
        "--data other.npz": "holds x; images are expected under arr_0", "--align 0.5": "has no patch tokens",
        "--image-size 24": "24 is no multiple of 16, SiT-T/16's patch", "--data nowhere": "does not exist",
        "--micro-batch 48": "--micro-batch 48 does not divide 128", "--drop 2": "--drop: 2 is not in [0, 1)",
        "--device cuda:99": "cuda:99 is not to be had here, but 1 cpu", "--out ok": "--resume goes on",
        "--data t.npy": "t.npy is not an .npy file of numbers", "--data images": "3 of 9 files in",
        "--model SiT-Q": "unknown model SiT-Q; known: SiT-T/4", "--lr nan": "--lr: nan is not in",
        "--image-size 0": "--image-size: 0 is not in [1, inf)", "--steps 9999": "--decay A B",
        "--data labels.npz": "labels int64 (3,) for 4 images", "--data empty": "no images",
        "--data t.npz": "t.npz is not an .npz, or damaged", "--steps x": "invalid whole number value: 'x'",
        "--nonsense": "unrecognized arguments: --nonsense", "--batch-size -4": "--batch-size: -4 is not in",
        "--resume": "ckpt.pt", "--data ok/data --rank 8": "was prepared with rank 64, not 8"},
    "memory.py --out out": {"--features f.npy": "holds no floats (N, D) but float32 (4, 8, 8, 3)",
        **{f"--features g.npy --rank {r}": f"rank {r} of the bank is not in 1 .. 70" for r in (-1, 0, 71)},
        "--data images": "class0/x.png, class1/cut.png, class1/none.jpg; --",
        "--data glyphs --encoder clip": "clip is no file, and none of",
        "--data glyphs --tokenizer vae": "vae is no file, and none of",
        "--features g.npy --out bank.pt": "holds another bank", "--energy 95": "--energy: 95 is not in",
        "--features nan.npy": "features 0 to 98 hold NaN", "--data 1.png --features g.npy": "70 rows for 1"},
    "memory.py": {"--info c.pt": "it lacks basis, coef", "--features g.npy": "give --out"},
    "sample.py": {"--ckpt c --shift 0.3 --method sde-heun": "--shift 0.3 is of",
        "--ckpt ok --out s.jpg": "neither a .png nor an .npz", "--ckpt c.pt": "a checkpoint of no SiT",
        "--ckpt y.pt": "unexpected keyword argument 'width'", "--ckpt nowhere.pt": "nowhere.pt",
        "--ckpt x.pt": "x.pt is damaged", "--ckpt ok --num-images 1 --out ok/data": "more files than there"},
    "sample.py --ckpt ok --out out": {"--mix 0 6": "--mix 6 is no file, and no row of 6 in the bank",
        "--bank another.pt": "snippets of another, the model was trained on thumbnail",
        "--label 1": "--label 1: this model has 0 labels", "--num-images 0": "--num-images: 0 is not in",
        "--bank bank.pt": "have 80 numbers, not 768", "--add images --audit": "exclude each other",
        "--add empty": "no images", "--mix a.png 0": "a.png", "--cfg nan": "--cfg: nan is not in"}}

def test_bad_input_is_one_line_and_exit_code_2():
    os.mkdir("empty")
    folder_of_images("images", 6)
    whole = Path("images/class0/000.png").read_bytes()
    for name, content in (("images/class0/x.png", b"no"), ("images/class1/cut.png", whole[:len(whole) // 2]),
                          ("images/class1/none.jpg", b""), ("1.png", whole), ("t.npy", b"a"), ("t.npz", b"")):
        Path(name).write_bytes(content)
    np.save("f.npy", np.zeros((4, 8, 8, 3), np.float32))
    np.save("nan.npy", np.full((99, 80), np.nan, np.float32))
    np.save("g.npy", features(70, 80).numpy())
    np.savez("labels.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8), arr_1=np.zeros(3, int))
    np.savez("other.npz", x=np.zeros(3))
    for k, state in ("c", {"model": {}}), ("y", {"config": {"width": 8}, "ema": {}}), ("x", nn.Linear(2, 2)):
        torch.save(state, f"{k}.pt")  # x: a class, weights_only refuses it
    MemoryBank.build(features(70, 80), 4).save("bank.pt")
    MemoryBank.build(features(70, 768), 4, encoder="another").save("another.pt")
    run(f"train.py {QUICK} --steps 1 --preview-every 0 --data images --skip-bad --out ok")
    assert memory.read_json("ok/data/meta.json")["images"] == 6  # the three bad ones are left out
    assert "N 6," in run("memory.py --info ok/data/bank.pt")
    before = (files := lambda: {p: p.stat().st_mtime_ns for p in Path().rglob("*")})()
    for command, cases in BAD.items():
        for flags, message in cases.items():
            line = run(f"{command} {flags}", fails=True)
            assert message in line and len(line) < 300, line
            assert files() == before  # nothing written
    assert "unknown model" in run("train.py --model SiT-Q", processes=1, fails=True)  # as a process, too
