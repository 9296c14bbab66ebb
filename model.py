"""The backbone of GMem (arXiv 2412.08781): a flow-matching transformer that is shown one memory snippet.

    x_t = (1 - t) z + t x          z ~ N(0, I), t from 0 (noise) to 1 (data)
    v(x_t, t, s)  ->  x - z        s: the unit-norm snippet of x, a random part of its entries set to zero
    loss = |v - (x - z)|^2 + 1 - cos(v, x - z)

What is notable:
- one class is SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423), by switches of `SiTConfig`
- the network may predict x instead of v, for large patches (arXiv 2511.13720); what it returns is always v
- the snippet, centred (unless the weights are official ones), enters through one linear layer, is added to
  the time embedding, and reaches each block by adaLN; in small models another layer gives it to each token
- the null snippet is zeros, the null label one more row of the table; training shows both, for guidance
- parameters carry the names of the official code, so that official weights need no renaming
- the tokenizers of latent diffusion, sd-vae-ft-ema and VA-VAE, are one class, at the end
- nothing but torch is imported: this file can be copied into any other code"""
import argparse
import math
import os
import urllib.error
import zipfile
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

@dataclass
class SiTConfig:
    input_size: int = 32        # height and width of x, in latent pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    memory_dim: int = 0         # D of the snippets, 0: no memory
    memory_scale: float = 1.0   # what snippets are multiplied by (official: 1)
    memory_center: bool = False  # the network sees s - mean: masked entries are then the mean's, not zero
    memory_tokens: bool = False  # each token, too, sees the snippet, by a matrix of its own (not official)
    num_classes: int = 0        # 0: no labels
    mask_ratio: float = 0.4     # part of a snippet that is zeroed in training (official GMem: 0.4)
    learn_sigma: bool = False   # twice the output channels, the second half unused (official SiT weights)
    swiglu: bool = False        # the switches of LightningDiT
    rmsnorm: bool = False
    rope: bool = False
    qk_norm: bool = False
    zero_init: bool = True      # adaLN-zero: every block starts as the identity, the output as zero
    predict_x: bool = False     # the network gives x, and v = (x - x_t) / (1 - t): for patches wider than it
    align_dim: int = 0          # REPA: width of the features that block `align_depth` is projected to, 0: off
    align_depth: int = 4

    def __post_init__(self):
        for a, b in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
            if getattr(self, b) < 1 or getattr(self, a) % getattr(self, b):
                raise ValueError(f"{a} {getattr(self, a)} is not a multiple of {b} {getattr(self, b)}")
        if self.hidden_size % 4 or (self.rope and self.hidden_size // self.num_heads % 4):
            raise ValueError(f"hidden_size {self.hidden_size} (with rope: a head's) does not divide by 4")
        if not 0 <= self.mask_ratio < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} is not in [0, 1)")
        if self.align_dim and not 1 <= self.align_depth <= self.depth:
            raise ValueError(f"align_depth {self.align_depth} is not one of the {self.depth} blocks")

SIZES = {"T": (256, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
FAMILIES = (("SiT", "T/4 T/8 T/16", dict(predict_x=True, memory_tokens=True)),
            ("SiT", "S/2 B/2 L/2 XL/2", {}),
            ("LightningDiT", "S/1 B/1 B/2 L/2 XL/1 XL/2", dict(swiglu=True, rmsnorm=True, rope=True)))
CONFIGS = {  # the sizes of the SiT and LightningDiT papers, and one for a CPU
    f"{family}-{n}/{p}": dict(zip(("hidden_size", "depth", "num_heads"), SIZES[n]), patch_size=int(p),
                              **switches)
    for family, names, switches in FAMILIES for n, p in (name.split("/") for name in names.split())}

def modulate(x, shift, scale):
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])

def sincos_pos_embed(dim, size):
    """Fixed position table (size*size, dim): a quarter each of sin(x w), cos(x w), sin(y w), cos(y w)."""
    w = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    a, b = x.reshape(-1, 1) * w, y.reshape(-1, 1) * w
    return torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1).float()

def time_features(t):
    """t (B,) -> (B, 256): 128 each of cos(t w), sin(t w)"""
    a = t[:, None].float() * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
    return torch.cat([a.cos(), a.sin()], dim=1)

class Rope2d(nn.Module):
    """Rotary embedding: the first half of a head by the token's row, the second by its column."""
    def __init__(self, head_dim, size):
        super().__init__()
        w = 10000 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
        a = torch.outer(torch.arange(size).float(), w).repeat_interleave(2, dim=1)  # (size, head_dim/2)
        a = torch.cat([a.repeat_interleave(size, dim=0), a.repeat(size, 1)], dim=1)  # (size*size, head_dim)
        self.register_buffer("freqs_cos", a.cos())
        self.register_buffer("freqs_sin", a.sin())

    def forward(self, q):
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        return q * self.freqs_cos + torch.stack([-b, a], dim=-1).flatten(-2) * self.freqs_sin

class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, d, self.num_heads = config.hidden_size, config.hidden_size // config.num_heads, config.num_heads
        self.qkv, self.proj = nn.Linear(h, 3 * h), nn.Linear(h, h)
        norm, eps = (nn.RMSNorm, 1e-6) if config.rmsnorm else (nn.LayerNorm, 1e-5)
        self.q_norm, self.k_norm = (norm(d, eps=eps) if config.qk_norm else nn.Identity() for _ in "qk")

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, T, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q).type_as(v), rope(k).type_as(v)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, self.swiglu = config.hidden_size, config.swiglu
        inner = int(h * config.mlp_ratio)
        if self.swiglu:
            inner = int(2 / 3 * inner)
            self.w12, self.w3 = nn.Linear(h, 2 * inner), nn.Linear(inner, h)
        else:
            self.fc1, self.fc2 = nn.Linear(h, inner), nn.Linear(inner, h)

    def forward(self, x):
        if self.swiglu:
            a, b = self.w12(x).chunk(2, dim=-1)
            return self.w3(F.silu(a) * b)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))

def block_norm(config):
    norm, affine = (nn.RMSNorm, True) if config.rmsnorm else (nn.LayerNorm, False)
    return norm(config.hidden_size, eps=1e-6, elementwise_affine=affine)

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        h = config.hidden_size
        self.norm1, self.norm2 = block_norm(config), block_norm(config)
        self.attn, self.mlp = Attention(config), Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(h, 6 * h))

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, channels = config.hidden_size, config.in_channels * (2 if config.learn_sigma else 1)
        self.norm_final, self.linear = block_norm(config), nn.Linear(h, config.patch_size ** 2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(h, 2 * h))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))

class SiT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        h, p, size = config.hidden_size, config.patch_size, config.input_size // config.patch_size
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(config.in_channels, h, p, stride=p)))
        self.t_embedder = nn.ModuleDict(dict(mlp=nn.Sequential(
            nn.Linear(256, h), nn.SiLU(), nn.Linear(h, h))))
        if config.num_classes:  # the last row is the null label
            self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(config.num_classes + 1, h)))
        if config.memory_dim:
            self.condition_projection = nn.ModuleDict(dict(linear=nn.Linear(config.memory_dim, h)))
        if config.memory_dim and config.memory_tokens:
            self.token_projection = nn.Linear(config.memory_dim, size * size * h)
        if config.memory_center:  # set before training
            self.register_buffer("memory_mean", torch.zeros(config.memory_dim))
        self.register_buffer("pos_embed", sincos_pos_embed(h, size)[None])
        self.feat_rope = Rope2d(h // config.num_heads, size) if config.rope else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        if config.align_dim:
            self.projector = nn.ModuleList([nn.Sequential(
                nn.Linear(h, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(),
                nn.Linear(2048, config.align_dim))])
        self.final_layer = FinalLayer(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Xavier uniform, patch embedding flattened; time embedding, label table: normal, std 0.02; adaLN and
        final_layer.linear: 0 (with zero_init off Xavier, as in GMem's code); biases: 0"""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                m.bias.zero_()
        for name, w in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and w.ndim == 2:
                nn.init.normal_(w, std=0.02)
            if self.config.zero_init and ("adaLN" in name or name.startswith("final_layer.linear")):
                w.zero_()

    def forward(self, x, t, s=None, y=None):
        """x: (B, C, H, W); t: (B,) in [0, 1]; s: (B, D) unit-norm snippets, None: the null snippet, zeros;
        y: (B,) labels, None: the null label, index num_classes
        -> velocity (B, C, H, W); in training with align_dim, also the projected tokens (B, T, align_dim)"""
        cfg, B, p = self.config, len(x), self.config.patch_size
        c = self.t_embedder["mlp"](time_features(t).type_as(self.pos_embed))  # (B, h)
        if cfg.memory_dim:
            s = x.new_zeros(B, cfg.memory_dim) if s is None else s
            if cfg.memory_center:  # and zeros stay zeros
                s = (s - self.memory_mean) * s.any(1, keepdim=True)
            s = F.dropout(cfg.memory_scale * s, cfg.mask_ratio, self.training)
            c = c + self.condition_projection["linear"](s)
        if cfg.num_classes:
            y = x.new_full((B,), cfg.num_classes, dtype=torch.long) if y is None else y
            c = c + self.y_embedder["embedding_table"](y)
        h, proj = F.pixel_unshuffle(x, p).flatten(2).mT, self.x_embedder["proj"]  # (B, T, C*p*p)
        h = F.linear(h, proj.weight.flatten(1), proj.bias) + self.pos_embed   # a convolution, but faster
        if cfg.memory_dim and cfg.memory_tokens:
            h = h + self.token_projection(s).view(h.shape)
        for i, block in enumerate(self.blocks, 1):
            h = block(h, c, self.feat_rope)
            if self.training and cfg.align_dim and i == cfg.align_depth:
                tokens = self.projector[0](h)
        n = cfg.input_size // p
        v = self.final_layer(h, c).reshape(B, n, n, p, p, -1)[..., :cfg.in_channels]
        v = v.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
        if cfg.predict_x:
            v = (v - x) / (1 - t[:, None, None, None]).clamp_min(0.05)        # bounded as in that paper
        return (v, tokens) if self.training and cfg.align_dim else v

def flow_loss(model, x, s=None, y=None, drop=0.1, uniform_t=False, targets=None, align=0.0):
    """The training loss of one batch (module docstring); every draw comes from torch's default generator.
    x: (B, C, H, W) data; s: (B, D); y: (B,), -1: without a label; drop: part of the images that see the null
    condition; targets: (B, T, align_dim) features to align with (REPA), weighted by align -> scalar"""
    B = len(x)
    t = torch.rand(B, device=x.device) if uniform_t else torch.randn(B, device=x.device).sigmoid()
    z, keep = torch.randn_like(x), torch.rand(B, device=x.device) >= drop
    s = None if s is None else s * keep[:, None]
    if y is not None:
        y = torch.where(keep & (y >= 0), y, getattr(model, "module", model).config.num_classes)
    u, v = x - z, model(torch.lerp(z, x, t[:, None, None, None]), t, s, y)
    v, tokens = (v[0].float(), v[1]) if isinstance(v, tuple) else (v.float(), None)
    # written out, because F.cosine_similarity over channels takes a quarter of a step on a CPU
    cos = (v * u).sum(1) * (v.square().sum(1) * u.square().sum(1)).clamp_min(1e-8).rsqrt()
    loss = F.mse_loss(v, u) + 1 - cos.mean()
    if targets is not None:
        loss = loss - align * F.cosine_similarity(tokens.float(), targets, dim=-1).mean()
    return loss

# ----------------------------------------------------------------------------- weights made elsewhere

def load_file(source, urls={}, keys=()):
    """source: the path of a file that torch.save wrote, or a name in urls (-> URL), downloaded once; keys:
    what has to be in it -> what it holds, mapped into memory. ValueError where that is not to be had."""
    options = dict(map_location="cpu", weights_only=True)
    try:
        if source in urls:
            name = source + os.path.splitext(urls[source])[1]
            return torch.hub.load_state_dict_from_url(urls[source], file_name=name, **options)
        with torch.serialization.safe_globals([argparse.Namespace]):  # SiT's files hold their settings
            whole = torch.load(source, mmap=zipfile.is_zipfile(source), **options)
        missing = [k for k in sorted(keys) if k not in whole]
    except urllib.error.URLError as e:
        raise ValueError(f"no download ({e.reason}): give the path of a copy of {urls[source]}") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        known = f", and none of {', '.join(urls)}" if urls else ": give the path of one"
        raise ValueError(f"{source} is no file{known}") from e
    except Exception as e:  # of any type, where the bytes are none of torch's
        raise ValueError(f"{source} is damaged, or not written by torch.save ({type(e).__name__})") from e
    if missing:
        raise ValueError(f"{source} is no file of the kind expected: it lacks {', '.join(missing)}")
    return whole

def load_weights(source, urls={}):
    """source: a dict, or see load_file -> {key: tensor}, the EMA weights where there are several sets,
    without the prefixes of DDP and torch.compile; and all that source holds"""
    whole = source if isinstance(source, dict) else load_file(source, urls)
    if not isinstance(whole, dict):
        raise ValueError(f"{source} holds a {type(whole).__name__}, no weights by name")
    state = next((whole[k] for k in ("ema", "model", "state_dict") if isinstance(whole.get(k), dict)), whole)
    return {k.replace("_orig_mod.", "").removeprefix("module."): v
            for k, v in state.items() if torch.is_tensor(v)}, whole

def fit(weights, network, *args):
    """-> network(*args) with these weights, in eval mode; ValueError names keys and shapes that differ."""
    with torch.device("meta"):  # nothing is drawn or filled that is replaced at once
        model = network(*args)
    have, want = ({k: tuple(v.shape) for k, v in s.items()} for s in (weights, model.state_dict()))
    bad = [f"{k} {have.get(k, 'missing')}, expected {want.get(k, 'none')}"
           for k in {**want, **have} if want.get(k) != have.get(k)]
    if bad:
        raise ValueError(f"{len(bad)} weights do not fit this {network.__name__}: " + "; ".join(bad[:3]))
    model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in weights.items()}, assign=True)
    return model.eval()

def official_config(w):
    """The SiTConfig of weights of the official SiT, LightningDiT or GMem, read off names and shapes."""
    size = lambda key, axis=0: w[key].shape[axis] if key in w else 0
    (h, C, p, _), swiglu = w["x_embedder.proj.weight"].shape, size("blocks.0.mlp.w3.weight", 1)
    # the width of SwiGLU is int(2/3 int(h mlp_ratio)): aim at the middle
    inner = swiglu * 3 // 2 + 1 if swiglu else size("blocks.0.mlp.fc2.weight", 1)
    return SiTConfig(
        input_size=p * math.isqrt(w["pos_embed"].shape[1]), patch_size=p, in_channels=C, hidden_size=h,
        depth=len({k.split(".")[1] for k in w if k.startswith("blocks.")}),
        num_heads=16 if h == 1152 else h // 64, mlp_ratio=(inner + 0.5) / h, swiglu=swiglu > 0,
        memory_dim=size("condition_projection.linear.weight", 1), align_dim=size("projector.0.4.bias"),
        num_classes=max(0, size("y_embedder.embedding_table.weight") - 1),
        learn_sigma=size("final_layer.linear.bias") == 2 * C * p * p, rope="feat_rope.freqs_cos" in w,
        rmsnorm="blocks.0.norm1.weight" in w, qk_norm="blocks.0.attn.q_norm.weight" in w)

def load_sit(source):
    """source: a checkpoint of train.py or of the official SiT, LightningDiT or GMem, path or loaded dict
    -> SiT of the EMA weights, in eval mode. ValueError where keys or shapes do not fit."""
    w, whole = load_weights(source)
    config = whole.get("config")  # LightningDiT's and GMem's files have one too, of other settings
    try:
        config = official_config(w) if config is None or "model" in config else SiTConfig(**config)
    except (KeyError, TypeError) as e:
        raise ValueError(f"a checkpoint of no SiT, LightningDiT or GMem: {e}") from e
    return fit(w, SiT, config)

# ----------------------------------------------------------------------------- tokenizers

class ResnetBlock(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, n, eps=1e-6), nn.Conv2d(n, m, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, m, eps=1e-6), nn.Conv2d(m, m, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(n, m, 1) if n != m else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))

class AttnBlock(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm = nn.GroupNorm(32, n, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(n, n, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v))  # (B, 1 head, H*W, n)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape))

class Level(nn.Module):
    """The blocks of one resolution, and the way to the next: "down", "up" or None."""
    def __init__(self, n, m, blocks, attn, way):
        super().__init__()
        self.block = nn.ModuleList([ResnetBlock(m if j else n, m) for j in range(blocks)])
        self.attn = nn.ModuleList([AttnBlock(m) if attn else nn.Identity() for _ in range(blocks)])
        if way:
            conv = nn.Conv2d(m, m, 3, *((2, 0) if way == "down" else (1, 1)))  # stride, padding
            self.add_module(way + "sample", nn.ModuleDict(dict(conv=conv)))

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        if hasattr(self, "downsample"):
            return self.downsample["conv"](F.pad(x, (0, 1, 0, 1)))
        return self.upsample["conv"](F.interpolate(x, scale_factor=2)) if hasattr(self, "upsample") else x

class Coder(nn.Module):
    """Encoder (way "down") or decoder ("up"), n_in to n_out channels; levels count from the finest."""
    def __init__(self, n_in, n_out, widths, blocks, attn, way):
        super().__init__()
        order = [*range(len(widths))][::1 if way == "down" else -1]
        levels = [Level(widths[i], widths[j], blocks, j in attn, way if j != order[-1] else None)
                  for i, j in zip(order[:1] + order, order)]
        first, last, m = widths[order[0]], widths[order[-1]], widths[-1]
        self.conv_in = nn.Conv2d(n_in, first, 3, padding=1)
        self.mid = nn.Sequential(OrderedDict(
            block_1=ResnetBlock(m, m), attn_1=AttnBlock(m), block_2=ResnetBlock(m, m)))
        self.add_module(way, nn.ModuleList(levels if way == "down" else levels[::-1]))
        self.norm_out, self.conv_out = nn.GroupNorm(32, last, eps=1e-6), nn.Conv2d(last, n_out, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for f in [self.mid, *self.up[::-1]] if hasattr(self, "up") else [*self.down, self.mid]:
            x = f(x)
        return self.conv_out(F.silu(self.norm_out(x)))

class AutoencoderKL(nn.Module):
    """Images x (B, 3, H, W) in [-1, 1] <-> latents z (B, channels, H / factor, W / factor), as they are,
    unscaled (arXiv 2112.10752). By default sd-vae-ft-ema, f8d4; VA-VAE (arXiv 2501.01423), f16d32, is
    AutoencoderKL(32, (128, 128, 256, 256, 512), attn=(4,)), attn being the levels that have attention."""
    def __init__(self, channels=4, widths=(128, 256, 512, 512), blocks=2, attn=()):
        super().__init__()
        self.channels, self.factor = channels, 2 ** (len(widths) - 1)
        self.encoder = Coder(3, 2 * channels, widths, blocks, attn, "down")
        self.decoder = Coder(channels, 3, widths, blocks + 1, attn, "up")
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(n, n, 1) for n in (2 * channels, channels))

    def encode(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

AUTOENCODERS = {name: f"https://huggingface.co/{repo}/resolve/main/{file}" for name, repo, file in (
    ("sd-vae-ft-ema", "stabilityai/sd-vae-ft-ema", "diffusion_pytorch_model.bin"),
    ("vavae-f16d32", "hustvl/vavae-imagenet256-f16d32-dinov2", "vavae-imagenet256-f16d32-dinov2.pt"))}
DIFFUSERS = {  # its names -> those of the LDM code, which are used here
    "down_blocks": "down", "downsamplers.0": "downsample", "upsamplers.0": "upsample", "resnets": "block",
    "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2", "attentions": "attn",
    "mid_block.attn.0": "mid.attn_1", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out"}

def load_autoencoder(source):
    """source: a name in AUTOENCODERS, a path or a state dict, in the key format of diffusers or of LDM
    -> AutoencoderKL in eval mode. ValueError where keys or shapes do not fit."""
    state, w = load_weights(source, AUTOENCODERS)[0], {}
    levels = len({k.split(".")[2] for k in state if k.startswith(("encoder.down.", "encoder.down_blocks."))})
    for key, v in state.items():
        if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):  # else: for training
            for i in range(levels):  # diffusers counts from the coarsest
                key = key.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
            for old, new in DIFFUSERS.items():
                key = key.replace(f".{old}.", f".{new}.")
            w[key] = v[:, :, None, None] if ".attn" in key and v.ndim == 2 else v
    try:
        widths = [len(w[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
        blocks = sum(k.startswith("encoder.down.0.") and k.endswith("conv1.bias") for k in w)
        attn = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.bias" in w]
        return fit(w, AutoencoderKL, len(w["post_quant_conv.bias"]), widths, blocks, attn)
    except KeyError as e:
        raise ValueError(f"weights of no autoencoder in the format of diffusers or LDM: no {e}") from e
