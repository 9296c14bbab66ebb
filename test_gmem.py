"""Tests of GMem: numbers against an independent computation, a run against a run; no GPU, no network."""
import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import memory
import sample
import train
from memory import Blocks, Images, MemoryBank, center_crop, glyphs, mask, prepare, thumbnail, to_rgb
from model import CONFIGS, SiT, SiTConfig, flow_loss, load_sit, sincos_pos_embed
from sample import decode, generate, guided, ode, sde
from train import Data, learning_rate, split

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2)
QUICK = ["--model", "SiT-T/8", "--image-size", "16", "--batch-size", "16", "--device", "cpu"]


def run(*command, processes=1, fails=False):
    """Runs a command by python or torchrun -> stdout, or the message of a run that has to fail."""
    launch = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    p = subprocess.run(launch + [os.path.join(HERE, command[0]), *map(str, command[1:])], capture_output=True,
                       text=True, env=env, timeout=300)
    if fails:
        message = p.stderr.strip().splitlines()
        assert p.returncode == 2 and len(message) == 1, p.stderr
        return message[0]
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


def load(path):
    return torch.load(path, weights_only=True)


# ----------------------------------------------------------------------------- model


@pytest.mark.parametrize("switches", [
    {}, dict(swiglu=True), dict(rmsnorm=True), dict(predict_x=True), dict(rope=True), dict(qk_norm=True),
    dict(learn_sigma=True), dict(num_classes=5), dict(memory_dim=12),
    dict(memory_dim=12, num_classes=5, align_dim=7, align_depth=1),
    dict(swiglu=True, rmsnorm=True, rope=True, qk_norm=True, zero_init=False, memory_dim=12)], ids=str)
def test_every_switch_has_its_shape_and_gradients(switches):
    torch.manual_seed(0)
    model = SiT(SiTConfig(**TINY, **switches))
    x, t = torch.randn(3, 3, 8, 8), torch.rand(3)
    s = torch.randn(3, 12) if model.config.memory_dim else None
    y = torch.tensor([0, 4, 5]) if model.config.num_classes else None
    if model.config.zero_init:  # adaLN-zero: the network gives nothing at first
        want = -x / (1 - t).clamp_min(0.05)[:, None, None, None] if model.config.predict_x else 0 * x
        assert torch.equal(model.eval()(x, t, s, y), want)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    out = model.train()(x, t, s, y)
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
    block = {f"blocks.{i}.{n}" for i in (0, 1) for n in (
        "norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.q_norm.weight",
        "attn.k_norm.weight", "attn.proj.weight", "attn.proj.bias", "mlp.w12.weight", "mlp.w12.bias",
        "mlp.w3.weight", "mlp.w3.bias", "adaLN_modulation.1.weight", "adaLN_modulation.1.bias")}
    assert names == block | {f"{n}.{k}" for k in ("weight", "bias") for n in (
        "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "condition_projection.linear",
        "projector.0.0", "projector.0.2", "projector.0.4", "final_layer.linear",
        "final_layer.adaLN_modulation.1")} | {
        "pos_embed", "final_layer.norm_final.weight", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}


def test_model_against_plain_formulas():
    """One block of one SiT written out once more, with loops where the model has reshapes."""
    torch.manual_seed(0)
    model = SiT(SiTConfig(**{**TINY, "depth": 1}, memory_dim=12)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
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
    for i in range(4):
        for j in range(4):
            for p in range(2):
                for q in range(2):
                    want[:, 2 * i + p, 2 * j + q] = h[4 * i + j, 6 * p + 3 * q:6 * p + 3 * q + 3]
    got = model.double()(x, t, s)[0]
    assert torch.allclose(got, want, atol=1e-6 * want.abs().max()), (got - want).abs().max()


def test_rope_depends_on_relative_positions_only():
    rope = SiT(SiTConfig(**TINY, rope=True)).feat_rope
    q, k = torch.randn(2, 16)
    at = lambda v, row, column: rope(v.expand(16, 16))[4 * row + column]
    for dr, dc in ((0, 1), (1, 0), (2, 1)):
        assert torch.allclose(at(q, 0, 0) @ at(k, dr, dc), at(q, 1, 2) @ at(k, 1 + dr, 2 + dc), atol=1e-5)
    assert not torch.allclose(at(q, 0, 0) @ at(k, 0, 1), at(q, 0, 0) @ at(k, 1, 0), atol=1e-3)


def test_position_table_is_the_official_one():
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)))  # x first, as in DiT
    omega = 1 / 10000 ** (np.arange(8) / 8)
    want = np.concatenate([f(np.outer(g.ravel(), omega)) for g in grid for f in (np.sin, np.cos)], axis=1)
    assert np.allclose(sincos_pos_embed(32, 4), want, atol=1e-6)


def test_loss_is_mse_plus_cosine_at_the_drawn_noise():
    model = lambda x_t, t, s, y: 2 * x_t + s[:, :, None, None]
    model.config = SiTConfig(**TINY)
    x, s = torch.randn(4000, 3, 8, 8), F.normalize(torch.randn(4000, 3), dim=1)
    torch.manual_seed(1)
    got = flow_loss(model, x, s, drop=0.25).item()
    torch.manual_seed(1)  # the same draws, in the documented order: t, noise, drop
    t, z = torch.randn(4000).sigmoid(), torch.randn_like(x)
    keep = (torch.rand(4000) >= 0.25).float()[:, None]
    assert abs(keep.mean() - 0.75) < 0.03
    v = 2 * ((1 - t)[:, None, None, None] * z + t[:, None, None, None] * x) + (s * keep)[:, :, None, None]
    cos = (v * (x - z)).sum(1) / v.norm(dim=1) / (x - z).norm(dim=1)
    assert got == pytest.approx(((v - x + z) ** 2).mean().item() + 1 - cos.mean().item(), rel=1e-5)


def test_images_without_a_label_and_dropped_ones_see_the_null_label():
    seen = []
    model = lambda x_t, t, s, y: seen.append(y) or x_t
    model.config = SiTConfig(**TINY, num_classes=5)
    for drop in (0, 1):
        flow_loss(model, torch.ones(4, 3, 8, 8), y=torch.tensor([0, -1, 4, 2]), drop=drop)
    assert [y.tolist() for y in seen] == [[0, 5, 4, 2], [5, 5, 5, 5]]


def test_loss_falls_and_the_snippets_matter():
    torch.manual_seed(0)
    x = torch.from_numpy(glyphs(n=520, size=16)[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    s = MemoryBank.build(thumbnail(x))[:]
    config = SiTConfig(**CONFIGS["SiT-T/8"], input_size=16, in_channels=3, memory_dim=768)
    model = SiT(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95))
    for _ in range(150):
        i = torch.randint(len(x), (64,))
        flow_loss(model, x[i], s[i]).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def loss(s, model=model.eval()):
        torch.manual_seed(1)
        return flow_loss(model, x, s, drop=0).item()

    def flat(x_t, t, s, y):  # the best that knows no shapes: each image in its own mean colour
        return (x.mean((2, 3), keepdim=True) - x_t) / (1 - t[:, None, None, None]).clamp_min(0.05)
    flat.config = model.config
    right, shuffled, null = loss(s), loss(s.roll(1, 0)), loss(torch.zeros_like(s))
    assert right < 0.35 * loss(s, flat) and right < 0.9 * null and null < 0.9 * shuffled


# ----------------------------------------------------------------------------- samplers

MU, SIGMA = 0.7, 0.4


def law(sampler, steps, **kw):
    """
    Mean and variance of the samples when the data are N(MU, SIGMA^2), without sampling error: there
    v = MU + a(t) (x - t MU) is linear, so x is carried as its coefficients over (z, noise 1, noise 2, .., 1).
    """
    def v(x, t):
        t = t[:, None]
        a = (t * SIGMA ** 2 - (1 - t)) / (t ** 2 * SIGMA ** 2 + (1 - t) ** 2)
        one = torch.zeros_like(x)
        one[:, -1] = MU
        return one + a * (x - t * one)
    z, calls = torch.zeros(1, steps + 2, dtype=torch.float64), iter(range(1, steps + 1))
    z[0, 0] = 1
    if sampler is sde:
        noise = lambda x: F.one_hot(torch.tensor([next(calls)]), steps + 2).double()
        kw = dict(kw, last_step=1e-4, noise=noise)
    x = sampler(v, z, steps, **kw)[0]
    return x[-1].item(), x[:-1].square().sum().item()


@pytest.mark.parametrize("sampler, method, order",
                         [(ode, "euler", 1), (ode, "heun", 2), (sde, "euler", 1), (sde, "heun", 1)])
def test_samplers_reach_a_gaussian_with_their_order(sampler, method, order):
    n, k = 200, 4
    coarse, fine = ([abs(got - want) for got, want in zip(law(sampler, m, method=method), (MU, SIGMA ** 2))]
                    for m in (n, k * n))
    assert max(fine) < 2e-3
    assert order - 0.15 < np.log(coarse[1] / fine[1]) / np.log(k) < order + 0.5, (coarse, fine)


@pytest.mark.parametrize("method, calls", [("euler", 11), ("heun", 21)])
def test_the_sde_ends_with_a_step_without_noise(method, calls):
    """Where v is zero, dx = -x dt + noise: the last step multiplies by 1 - 0.004."""
    seen = []
    v = lambda x, t: seen.append((t.item(), x.item())) or torch.zeros_like(x)
    x = sde(v, torch.ones(1, 1, dtype=torch.float64), 10, method)
    t, before = seen[-1]
    assert len(seen) == calls and t == pytest.approx(0.996) and x.item() == pytest.approx(0.996 * before)


def test_time_shift_is_the_official_map():
    seen = []
    z = torch.zeros(1, 1, dtype=torch.float64)
    ode(lambda x, t: seen.append(t.item()) or x, z, 4, "euler", shift=0.3)
    assert np.allclose(seen, [0.3 * t / (1 - 0.7 * t) for t in (0, 0.25, 0.5, 0.75)])


def test_guidance_acts_in_its_interval_only_and_costs_nothing_outside():
    config, sizes = SiTConfig(**TINY, num_classes=5), []

    def model(x, t, s, y):
        sizes.append(len(x))
        return y.double().view(-1, 1) + s.sum(1, keepdim=True)
    model.config = config
    s, y = torch.ones(2, 3, dtype=torch.float64), torch.tensor([1, 2])
    v = guided(model, s, y, cfg=2.5, interval=(0.3, 0.7))
    at = lambda t: v(torch.zeros(2, 1), torch.full((2,), t)).flatten()  # in float32 0.7 is less than 0.7
    plain = torch.tensor([4, 5]).double()
    assert torch.equal(at(0.29), plain) and torch.equal(at(0.71), plain) and sizes == [2, 2]
    for t in (0.3, 0.5, 0.7):  # null: label 5, s = 0
        assert torch.allclose(at(t), 5 + 2.5 * (plain - 5)) and sizes.pop() == 4


# ----------------------------------------------------------------------------- memory


def features(n=700, d=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=g) * 0.9 ** torch.arange(d) @ torch.randn(d, d, generator=g)
    return F.normalize(f + 1, dim=1)


@pytest.mark.parametrize("kind", ["plain", "repeated rows", "fewer rows than numbers", "constant columns"])
def test_bank_is_the_truncated_svd(kind):
    f, r = features(), 24
    f = {"plain": f, "repeated rows": f[:50].repeat(4, 1), "fewer rows than numbers": f[:60],
         "constant columns": F.normalize(torch.cat([f[:, :48], f[:, 48:] * 0 + 0.1], 1), dim=1)}[kind]
    f = f.double()
    bank = MemoryBank.build(f, r, "float32")
    mean = f.mean(0)
    U, S, V = torch.linalg.svd(f - mean, full_matrices=False)
    coef, basis, at = (torch.from_numpy(a.copy()) for a in (bank.coef, bank.basis, bank.mean))
    error = (coef @ basis + at - f).norm()
    best = S[r:].square().sum().sqrt()
    assert error <= best * 1.001 + 1e-5
    assert bank.energy == pytest.approx((S[:r].square().sum() / S.square().sum()).item(), rel=1e-5)
    want = F.normalize((U[:, :r] * S[:r]) @ V[:r] + mean, dim=1)
    assert torch.allclose(bank[:], want.float(), atol=1e-4)
    gram = bank.basis @ bank.basis.T
    assert np.allclose(gram, np.eye(r), atol=1e-5)


@pytest.mark.parametrize("dtype, worst", [("float32", 2e-6), ("float16", 5e-4), ("int8", 0.01)])
def test_quantisation_error(dtype, worst):
    f = features()
    exact, bank = MemoryBank.build(f.double(), 24, "float32"), MemoryBank.build(f, 24, dtype)
    assert bank.coef.dtype == dtype and (bank[:] - exact[:]).norm(dim=1).max() < worst
    step = bank.scale[None] * (0.5 if dtype == "int8" else 1e-3 * np.abs(bank.coef))
    assert (np.abs(bank.coef * bank.scale - exact.coef) <= step + 1e-6).all()


def test_bank_indexing_file_and_immutability(tmp_path):
    f = features()
    bank = MemoryBank.build(f, 24, labels=np.arange(700) % 7, encoder="thumbnail")
    bank.save(tmp_path / "bank.pt")
    again = MemoryBank.load(tmp_path / "bank.pt")
    assert again.id == bank.id != MemoryBank.build(f, 23).id
    assert (len(again), again.dim, again.rank) == (700, 96, 24)
    assert again.encoder == "thumbnail" and (again.labels == bank.labels).all()
    assert bank[3].shape == (96,) and torch.equal(bank[3], bank[[3]][0]) and torch.equal(bank[-1], bank[699])
    assert torch.allclose(again[torch.tensor([5, 1])], bank[:][[5, 1]], atol=1e-6)
    assert again[0:0].shape == (0, 96)
    assert torch.allclose(bank[:].norm(dim=1), torch.ones(700), atol=1e-5)
    assert torch.allclose(bank.decode(bank.project(bank[:9])), bank[:9], atol=1e-4)
    for bad in (700, -701, [0, 700]):
        with pytest.raises(IndexError):
            bank[bad]
    for one in (bank, again):
        with pytest.raises(ValueError):
            one.coef[0] = 0
        with pytest.raises(AttributeError):
            one.coef = one.coef * 2
    full = MemoryBank.build(f, None)
    assert full.coef.dtype == np.float16 and torch.allclose(full[:], f, atol=1e-3) and full.rank == 96


def test_bank_refuses_bad_input(tmp_path):
    f = features(20, 8)
    for rank in (0, 9, -1):
        with pytest.raises(ValueError, match="1 .. 8"):
            MemoryBank.build(f, rank)
    with pytest.raises(ValueError, match="NaN"):
        MemoryBank.build(f.clone().fill_(float("nan")), 4)
    (tmp_path / "bank.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="bank.pt is damaged"):
        MemoryBank.load(tmp_path / "bank.pt")


def test_mask_is_dropout():
    s = torch.ones(200, 500)
    m = mask(s, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(m.unique(), torch.tensor([0, 1 / 0.6])) and abs((m == 0).float().mean() - 0.4) < 0.01
    assert abs((m == 0).float().mean(0) - 0.4).max() < 0.2  # every entry, not always the same ones


# ----------------------------------------------------------------------------- images


def test_glyphs_are_deterministic_varied_and_labelled():
    a, labels = glyphs(n=260, size=16)
    b, _ = glyphs(n=260, size=16)
    c, _ = glyphs(n=260, size=16, seed=1)
    digits, _ = glyphs(n=10, size=16, characters="0123456789")
    assert (a == b).all() and not (a == c).all() and a.shape == (260, 16, 16, 3) and a.dtype == np.uint8
    assert (np.bincount(labels) == 10).all() and len(np.unique(a.reshape(260, -1), axis=0)) == 260
    assert digits.std(axis=(1, 2)).max(axis=1).min() > 10  # every image shows something
    corner = a[:, 0, 0].astype(int) - a[:, -1, -1]
    assert 0.3 < (np.abs(corner).max(axis=1) < 2).mean() < 0.8  # flat backgrounds, and gradients


def test_images_of_every_mode_become_rgb(tmp_path):
    red = Image.new("RGB", (4, 4), (200, 10, 20))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    grey = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    wide = Image.new("RGB", (6, 4), (0, 0, 255))
    wide.getexif()[0x0112] = 6  # turned by 90 degrees
    cases = [(red, (200, 10, 20)), (red.quantize(4), (200, 10, 20)), (clear, (255, 255, 255)),
             (grey, (128, 128, 128)),
             (Image.new("L", (4, 4), 77), (77, 77, 77)), (Image.new("LA", (4, 4), (9, 0)), (255, 255, 255)),
             (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (255, 255, 255)),
             (Image.new("1", (4, 4), 1), (255, 255, 255))]
    for image, want in cases:
        assert np.abs(np.asarray(to_rgb(image)).astype(int) - want).max() <= 1, image.mode
    wide.save(tmp_path / "w.png", exif=wide.getexif())
    with Image.open(tmp_path / "w.png") as image:
        assert to_rgb(image).size == (4, 6)
    tall = np.arange(90, dtype=np.uint8).repeat(30).reshape(90, 30)
    crop = center_crop(Image.fromarray(tall).convert("RGB"), 10)
    assert crop.size == (10, 10) and abs(np.asarray(crop).mean() - 44.5) < 1


def test_arrays_are_mapped_not_loaded(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    y = np.array([0, 1, 2, 1, 0])
    np.savez(tmp_path / "a.npz", arr_0=x, arr_1=y)
    np.savez_compressed(tmp_path / "b.npz", images=x, labels=y)
    np.save(tmp_path / "c.npy", x)
    for name, labelled in (("a.npz", True), ("b.npz", True), ("c.npy", False)):
        images = Images(str(tmp_path / name), 8)
        assert all((images[i] == x[i]).all() for i in range(5))
        assert isinstance(images.array, np.memmap) == (name != "b.npz")
        assert (images.labels == (y if labelled else -1)).all()


def folder_of_images(path, n=40):
    x, labels = glyphs(n=n, size=24)
    for i, (image, label) in enumerate(zip(x, labels)):
        os.makedirs(path / f"class{label % 2}", exist_ok=True)
        Image.fromarray(image).save(path / f"class{label % 2}" / f"{i:03d}.png")
    return x, labels


def test_preparation_of_a_folder(tmp_path):
    x, labels = folder_of_images(tmp_path / "images")
    meta = prepare(str(tmp_path / "images"), str(tmp_path / "data"), 24, flip=True)
    latents, stored = np.load(tmp_path / "data" / "latents.npy"), np.load(tmp_path / "data" / "labels.npy")
    order = np.argsort(labels % 2, kind="stable")
    assert (latents[:40] == x[order].transpose(0, 3, 1, 2)).all()
    assert (stored == np.tile(np.sort(labels % 2), 2)).all()
    assert (latents[40:] == latents[:40, :, :, ::-1]).all() and meta["classes"] == ["class0", "class1"]
    f = F.normalize(thumbnail(torch.from_numpy(latents).float() / 127.5 - 1), dim=1)
    bank = MemoryBank.load(tmp_path / "data" / "bank.pt")  # a mirrored image has a snippet of its own
    assert bank.id == meta["bank"] and ((bank[:] * f).sum(1) > 0.99).all()
    assert sorted(os.listdir(tmp_path / "data")) == ["bank.pt", "labels.npy", "latents.npy", "meta.json"]
    np.save(tmp_path / "f.npy", features(80))
    prepare(str(tmp_path / "images"), str(tmp_path / "own"), 24, flip=True, features=str(tmp_path / "f.npy"))
    bank = MemoryBank.load(tmp_path / "own" / "bank.pt")
    assert ((bank[:] * features(80)).sum(1) > 0.99).all() and bank.encoder == str(tmp_path / "f.npy")
    assert (np.load(tmp_path / "own" / "latents.npy") == latents).all()
    with pytest.raises(ValueError, match="80 rows for 40 entries"):
        prepare(str(tmp_path / "images"), str(tmp_path / "no"), 24, features=str(tmp_path / "f.npy"))
    with pytest.raises(ValueError, match="image_size 24, not 16"):
        prepare(str(tmp_path / "images"), str(tmp_path / "data"), 16, flip=True)


# ----------------------------------------------------------------------------- from the command line


def test_folder_to_samples(tmp_path):
    """A folder with labels, prepared, trained on and sampled from, by the commands of the README."""
    folder_of_images(tmp_path / "images")
    out = tmp_path / "out"
    quick = ["train.py", *QUICK, "--data", tmp_path / "images", "--steps", "6", "--log-every", "2", "--out"]
    assert "40 of [3, 16, 16], 2 classes" in run(*quick, out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4, 6] and all(np.isfinite(e["loss"]) for e in log)
    assert Image.open(out / "samples.png").size == (8 * 64, 8 * 64)
    ckpt = load(out / "ckpt.pt")
    made = ckpt["meta"]["settings"]
    assert (made["encoder"], made["tokenizer"], made["image_size"]) == ("thumbnail", "pixel", 16)
    assert ckpt["bank"]["id"] == MemoryBank.load(out / ckpt["bank"]["path"]).id

    # the same images from the command line, in other batches, by two processes, and from Python
    sample = ["sample.py", "--ckpt", out / "ckpt.pt", "--num-images", "10", "--steps", "3", "--device", "cpu",
              "--method", "sde-heun", "--cfg", "1.5", "--cfg-interval", "0.2", "1", "--mask", "0.3",
              "--seed", "5"]
    run(*sample, "--out", tmp_path / "a.npz", "--batch-size", "4")
    run(*sample, "--out", tmp_path / "b.npz", "--batch-size", "3", processes=2)
    a, b = np.load(tmp_path / "a.npz")["arr_0"], np.load(tmp_path / "b.npz")["arr_0"]
    x = generate(load_sit(ckpt), [7, 3], MemoryBank.load(out / "data" / "bank.pt"), 5, "sde-heun", 3, cfg=1.5,
                 interval=(0.2, 1.0), mask_ratio=0.3)
    assert a.shape == (10, 16, 16, 3) and a.dtype == np.uint8
    assert len(np.unique(a.reshape(10, -1), axis=0)) == 10
    assert np.abs(a.astype(int) - b).max() <= 1  # rounding of sums
    assert np.abs(a[[7, 3]].astype(int) - decode(x, ckpt["meta"])).max() <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz", "images", "out"]

    # the baselines, through the same code
    for condition in ("class", "none"):
        run(*quick, tmp_path / condition, "--condition", condition)
        ckpt = load(tmp_path / condition / "ckpt.pt")
        assert ckpt["config"]["num_classes"] == (2 if condition == "class" else 0)
        assert ckpt["config"]["memory_dim"] == 0
    ckpt = tmp_path / "class" / "ckpt.pt"
    pngs = tmp_path / "pngs"
    run("sample.py", "--ckpt", ckpt, "--label", 1, "--num-images", 2, "--steps", 2, "--out", pngs)
    x = decode(generate(load_sit(load(ckpt)), [0, 1], steps=2, label=1), load(ckpt)["meta"]).astype(int)
    assert sorted(os.listdir(pngs)) == ["000000.png", "000001.png"]
    assert all(np.abs(x[i] - np.array(Image.open(pngs / f"00000{i}.png"))).max() <= 1 for i in (0, 1))


def test_two_processes_and_a_resumed_run_take_the_same_steps(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=glyphs(n=300, size=16)[0])
    quick = ["train.py", *QUICK, "--data", tmp_path / "x.npz", "--log-every", "1"]
    run(*quick, "--steps", "8", "--micro-batch", "4", "--out", tmp_path / "one")
    run(*quick, "--steps", "8", "--micro-batch", "4", "--out", tmp_path / "two", processes=2)
    run(*quick, "--steps", "5", "--micro-batch", "4", "--out", tmp_path / "cut")
    run("train.py", "--resume", "--steps", "8", "--out", tmp_path / "cut", "--device", "cpu")
    one, two, cut = (load(tmp_path / name / "ckpt.pt") for name in ("one", "two", "cut"))
    for name in ("latents.npy", "bank.pt", "meta.json"):  # 300 images are two blocks, one for each process
        assert (tmp_path / "one/data" / name).read_bytes() == (tmp_path / "two/data" / name).read_bytes()
    for part in ("model", "ema"):
        for k, v in one[part].items():
            assert torch.equal(v, cut[part][k]), k
            assert torch.allclose(v, two[part][k], atol=2e-5), (k, (v - two[part][k]).abs().max())
    one, two, cut = ([[json.loads(line)[k] for k in ("step", "loss", "grad_norm", "lr")] for line in open(
        tmp_path / name / "log.jsonl")] for name in ("one", "two", "cut"))
    assert one == cut and np.allclose(one, two, rtol=2e-3)
    assert "nothing to do" in run("train.py", "--resume", "--out", tmp_path / "cut", "--device", "cpu")
    assert "cannot go on with --batch-size 32, not 16" in run(
        "train.py", "--resume", "--out", tmp_path / "cut", "--batch-size", "32", fails=True)


def test_batches_cover_every_image_once_an_epoch(tmp_path):
    np.save(tmp_path / "x.npy", glyphs(n=50, size=16)[0])
    prepare(str(tmp_path / "x.npy"), str(tmp_path / "data"), 16)
    data = Data(str(tmp_path / "data"), seed=3, device=torch.device("cpu"))
    rows = np.concatenate([data.rows(a, a + 5) for a in range(0, 100, 5)])
    assert (np.sort(rows[:50]) == np.arange(50)).all() and (np.sort(rows[50:]) == np.arange(50)).all()
    assert not (rows[:50] == rows[50:]).all()
    parts = [data.rows(40, 50), np.arange(50), data.rows(100, 120)]
    assert (np.sort(data.rows(40, 120)) == np.sort(np.concatenate(parts))).all()
    i = data.rows(48, 53)
    (x, s, y), = data.batches([(48, 53)])
    assert torch.equal(y, torch.full((5,), -1)) and torch.equal(s, data.bank[i])
    assert torch.allclose(x, torch.from_numpy(data.latents[i]) / 127.5 - 1, atol=1e-6)
    assert isinstance(data.latents, np.memmap)


def test_schedule_and_split():
    args = argparse.Namespace(lr=2.0, warmup=10, decay=(60, 100))
    assert [learning_rate(k, args) for k in (0, 9, 30, 60, 80, 100)] == pytest.approx([0.2, 2, 2, 2, 1, 0])
    assert split(64, None, 2) == (32, 1) and split(64, 8, 2) == (8, 4)
    with pytest.raises(ValueError, match="63 or 66"):
        split(64, None, 3)
    with pytest.raises(ValueError, match="1, 2, 4, 8, 16, 32"):
        split(64, 5, 2)


def test_blocks_go_on_after_a_kill_and_start_anew_with_other_settings(tmp_path):
    make = lambda settings: Blocks(str(tmp_path / "b"), settings, {"x.npy": ((10, 2), "int64")}, 4)
    blocks = make({"a": 1})
    assert blocks.todo == [range(0, 4), range(4, 8), range(8, 10)]
    blocks.write(range(4, 8), x=np.full((4, 2), 7))
    again = make({"a": 1})
    assert again.todo == [range(0, 4), range(8, 10)] and (again.arrays["x.npy"][4:8] == 7).all()
    with pytest.raises(RuntimeError, match="2 of 3 blocks"):
        again.finish()
    assert len(make({"a": 2}).todo) == 3


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    out = ["--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    np.save(tmp_path / "f.npy", np.zeros((4, 8, 8, 3), np.float32))
    (tmp_path / "t.npy").write_text("no numbers")
    torch.save({"model": {}}, tmp_path / "c.pt")
    torch.save({**dict.fromkeys(("step", "model", "ema", "optimizer", "meta", "args", "bank")),
                "config": {"width": 8}}, tmp_path / "y.pt")
    torch.save(argparse.Namespace(), tmp_path / "x.pt")  # a class: weights_only refuses it
    for command, message in [
            (["train.py", "--data", tmp_path / "nowhere", *out], "does not exist"),
            (["train.py", "--data", tmp_path / "empty", *out], "no images"),
            (["train.py", "--data", tmp_path / "broken", *out], "x.png cannot be read"),
            (["train.py", "--data", tmp_path / "f.npy", *out],
             "float32 (4, 8, 8, 3); expected are images, uint8"),
            (["train.py", "--model", "SiT-Q", *out], "unknown model SiT-Q; known: SiT-T/4"),
            (["train.py", "--device", "cuda:99", *out], "--device cuda:99 is not to be had"),
            (["train.py", "--drop", "2", *out], "--drop 2.0 is not in [0, 1)"),
            (["train.py", "--steps", "9999", *out], "--decay A B"),
            (["train.py", "--data", tmp_path / "t.npy", *out], "t.npy is not an .npy file of numbers"),
            (["train.py", "--image-size", "0", *out], "--image-size 0 is not positive"),
            (["train.py", "--resume", *out], "ckpt.pt"),
            (["train.py", "--image-size", "24", *out], "24 is no multiple of 16, SiT-T/16's patch"),
            (["memory.py", "--data", tmp_path / "empty", "--encoder", "clip", *out], "known: thumbnail"),
            (["memory.py", "--features", tmp_path / "f.npy", *out], "not floats (N, D)"),
            (["sample.py", "--ckpt", tmp_path / "nowhere.pt"], "nowhere.pt"),
            (["sample.py", "--ckpt", "c", "--shift", "0.3", "--method", "sde-heun"], "--shift 0.3 is of"),
            (["sample.py", "--ckpt", tmp_path / "x.pt"], "x.pt is damaged"),
            (["sample.py", "--ckpt", tmp_path / "y.pt"], "unexpected keyword argument 'width'"),
            (["sample.py", "--ckpt", tmp_path / "c.pt"], "it lacks args, bank, config")]:
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        with pytest.raises(SystemExit) as stop:
            memory.cli({"train.py": train, "sample.py": sample, "memory.py": memory}[command[0]].main)
        shown = capsys.readouterr().err.splitlines()
        shown = [line for line in shown if line.strip() and "img/s]" not in line]  # no bars
        assert stop.value.code == 2 and message in shown[0] and len(shown) == 1 and len(shown[0]) < 250, shown
    assert not (tmp_path / "out" / "ckpt.pt").exists()
    assert "unknown model" in run("train.py", "--model", "SiT-Q", *out, fails=True)  # as a process, too
