"""The networks of GMem (arXiv 2412.08781): a flow-matching transformer that is shown one snippet.

    x_t = (1 - t) z + t x          z ~ N(0, I), time t runs from noise (0) to data (1)
    v(x_t, t, s)  ->  x - z        s: the unit-norm snippet of x, random entries of it zero
    loss = |v - (x - z)|^2 + 1 - cos(v, x - z)       mean over pixels; the cosine is over channels

    ODE  dx_t = v dt
    SDE  dx_t = (v + w score) dt + sqrt(2 w) dW      w(t) = 1 - t, score = (t v - x_t) / (1 - t)
    guidance  v = v_null + cfg (v_s - v_null)        where LO <= t <= HI

- class SiT is SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423), by switches of SiTConfig
- the network may predict x instead of v, for large patches (arXiv 2511.13720); it returns v
- the snippet is projected, added to the time embedding, and reaches each block by adaLN; in the
  small models it is also projected to each token
- parameters carry the names of the official code, so that official weights need no renaming
- only torch and the standard library are imported: this file can be copied into any other code
"""

import argparse
import hashlib
import math
import os
import urllib.request
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from http.client import HTTPException

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected."""


# ----------------------------------------------------------------------------------------- settings


@dataclass
class SiTConfig:
    """Everything that defines a network. InputError where the values do not go together."""

    input_size: int = 32  # height and width of x, in latent pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    memory_dim: int = 0  # D of the snippets; 0: no memory
    memory_scale: float = 1.0  # what snippets are multiplied by (official: 1)
    memory_center: bool = False  # the network sees s - mean: a masked entry is the mean, not zero
    memory_tokens: bool = False  # s is also added to the tokens, by D -> T*h (not official)
    num_classes: int = 0  # 0: no labels
    mask_ratio: float = 0.4  # dropout of a snippet's entries in training (official GMem: 0.4)
    learn_sigma: bool = False  # twice the output channels, half unused (official SiT weights)
    swiglu: bool = False  # this and the next three: the switches of LightningDiT
    rmsnorm: bool = False
    rope: bool = False
    qk_norm: bool = False
    zero_init: bool = True  # adaLN-zero: every block starts as the identity, the output as zero
    # the network gives x, v = (x - x_t) / max(1 - t, 0.05): for large patches
    predict_x: bool = False
    align_dim: int = 0  # REPA: block align_depth is projected to features of this width; 0: off
    align_depth: int = 4

    def __post_init__(self):
        check_config(self)


# the sizes of the SiT and LightningDiT papers, and one for a CPU
TINY = {"hidden_size": 256, "depth": 4, "num_heads": 4, "predict_x": True, "memory_tokens": True}
SMALL = {"hidden_size": 384, "depth": 12, "num_heads": 6}
BASE = {"hidden_size": 768, "depth": 12, "num_heads": 12}
LARGE = {"hidden_size": 1024, "depth": 24, "num_heads": 16}
XLARGE = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
LIGHTNING = {"swiglu": True, "rmsnorm": True, "rope": True}
CONFIGS = {
    "SiT-T/4": {**TINY, "patch_size": 4},
    "SiT-T/8": {**TINY, "patch_size": 8},
    "SiT-T/16": {**TINY, "patch_size": 16},
    "SiT-S/2": {**SMALL, "patch_size": 2},
    "SiT-B/2": {**BASE, "patch_size": 2},
    "SiT-L/2": {**LARGE, "patch_size": 2},
    "SiT-XL/2": {**XLARGE, "patch_size": 2},
    "LightningDiT-S/1": {**SMALL, "patch_size": 1, **LIGHTNING},
    "LightningDiT-B/1": {**BASE, "patch_size": 1, **LIGHTNING},
    "LightningDiT-B/2": {**BASE, "patch_size": 2, **LIGHTNING},
    "LightningDiT-L/2": {**LARGE, "patch_size": 2, **LIGHTNING},
    "LightningDiT-XL/1": {**XLARGE, "patch_size": 1, **LIGHTNING},
    "LightningDiT-XL/2": {**XLARGE, "patch_size": 2, **LIGHTNING},
}

# ---------------------------------------------------------------------------------- the transformer


def named(**modules):
    """A chain of modules with names: parameters then carry those of the official code."""
    return nn.Sequential(OrderedDict(modules))


def modulate(x, shift, scale):
    """Tokens x (B, T, h), shift and scale (B, h)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def position_angles(dim, size):
    """Columns and rows of size x size tokens, times dim/4 frequencies: (size*size, dim/4) each."""
    w = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    position = torch.arange(size, dtype=torch.float64)
    y, x = torch.meshgrid(position, position, indexing="ij")
    return x.reshape(-1, 1) * w, y.reshape(-1, 1) * w


def timestep_embedding(t):
    """t (B,) -> (B, 256): 128 each of cos(t w), sin(t w)."""
    steps = torch.arange(128, device=t.device, dtype=torch.float32)
    angle = t[:, None].float() * torch.exp(-math.log(10000) / 128 * steps)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class PatchEmbed(nn.Conv2d):
    """x (B, C, H, W) -> tokens (B, T, h): a convolution with stride p, as a (faster) product."""

    def forward(self, x):
        p = self.stride[0]
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, n, p, n, p)
        patches = x.permute(0, 1, 3, 5, 2, 4).flatten(4).flatten(1, 3).mT  # (B, T, C*p*p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Rope2d(nn.Module):
    """Rotary embedding: half of a head is turned by the token's row, half by its column."""

    def __init__(self, head_dim, size):
        super().__init__()
        self.size = size
        self.register_buffer("freqs_cos", torch.empty(size * size, head_dim))
        self.register_buffer("freqs_sin", torch.empty(size * size, head_dim))

    def reset_parameters(self):
        column, row = position_angles(self.freqs_cos.shape[1], self.size)
        angle = torch.cat([row, column], dim=1).repeat_interleave(2, dim=1)  # (size*size, head_dim)
        self.freqs_cos.copy_(angle.cos())
        self.freqs_sin.copy_(angle.sin())

    def forward(self, q):
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
        return q * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention; norm(width) -> the norm of queries, or keys."""

    def __init__(self, width, num_heads, norm=nn.Identity):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm = norm(width // num_heads)
        self.k_norm = norm(width // num_heads)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rope(q).type_as(v)
            k = rope(k).type_as(v)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.w12 = nn.Linear(width, 2 * inner)
        self.w3 = nn.Linear(inner, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def block_norm(config):
    if config.rmsnorm:
        return nn.RMSNorm(config.hidden_size, eps=1e-6)
    return nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)


def head_norm(config):
    """-> function: width -> the norm of queries, or keys"""
    if not config.qk_norm:
        return nn.Identity
    if config.rmsnorm:
        return lambda width: nn.RMSNorm(width, eps=1e-6)
    return nn.LayerNorm


class Block(nn.Module):
    """Attention and MLP, each with a shift, a scale and a gate from the condition c (adaLN)."""

    def __init__(self, config):
        super().__init__()
        h = config.hidden_size
        self.norm1 = block_norm(config)
        self.attn = Attention(h, config.num_heads, head_norm(config))
        self.norm2 = block_norm(config)
        inner = int(h * config.mlp_ratio)
        if config.swiglu:
            self.mlp = SwiGLU(h, int(2 / 3 * inner))
        else:
            self.mlp = named(fc1=nn.Linear(h, inner), act=nn.GELU("tanh"), fc2=nn.Linear(inner, h))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(h, 6 * h))

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        h = config.hidden_size
        channels = 2 * config.in_channels if config.learn_sigma else config.in_channels
        self.norm_final = block_norm(config)
        self.linear = nn.Linear(h, config.patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(h, 2 * h))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """v(x_t, t, s): see forward. With memory_center, first set memory_mean, the snippets' mean."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        h = config.hidden_size
        p = config.patch_size
        size = config.input_size // p  # tokens in a row
        self.x_embedder = named(proj=PatchEmbed(config.in_channels, h, p, stride=p))
        self.t_embedder = named(mlp=nn.Sequential(nn.Linear(256, h), nn.SiLU(), nn.Linear(h, h)))
        if config.num_classes:  # the last row is the null label
            self.y_embedder = named(embedding_table=nn.Embedding(config.num_classes + 1, h))
        if config.memory_dim:
            self.condition_projection = named(linear=nn.Linear(config.memory_dim, h))
        if config.memory_dim and config.memory_tokens:
            self.token_projection = nn.Linear(config.memory_dim, size * size * h)
        if config.memory_center:
            self.register_buffer("memory_mean", torch.empty(config.memory_dim))
        self.register_buffer("pos_embed", torch.empty(1, size * size, h))
        self.feat_rope = Rope2d(h // config.num_heads, size) if config.rope else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        if config.align_dim:  # three layers, as in REPA (arXiv 2410.06940)
            layers = [nn.Linear(h, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU()]
            layers.append(nn.Linear(2048, config.align_dim))
            self.projector = nn.ModuleList([nn.Sequential(*layers)])
        self.final_layer = FinalLayer(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """linear layers, patch embedding (flattened)    Xavier uniform, bias 0
        norms                                         1, bias 0
        t_embedder, y_embedder                        normal, std 0.02
        adaLN, final_layer.linear                     0 (zero_init=False, GMem: as linear layers)
        buffers                                       position tables; memory_mean 0
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                module.bias.zero_()
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, Rope2d)):
                module.reset_parameters()
        for name, weight in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            if self.config.zero_init and ("adaLN" in name or name.startswith("final_layer.linear")):
                weight.zero_()
        size = self.config.input_size // self.config.patch_size
        x, y = position_angles(self.config.hidden_size, size)
        self.pos_embed.copy_(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1))
        if self.config.memory_center:
            self.memory_mean.zero_()

    def shown_snippets(self, s):
        """Snippets (B, D) as the network sees them: centred, scaled, masked; zeros stay zeros."""
        if self.config.memory_center:
            s = (s - self.memory_mean) * s.any(dim=1, keepdim=True)
        return F.dropout(self.config.memory_scale * s, self.config.mask_ratio, self.training)

    def unpatchify(self, tokens):
        """(B, T, p*p*channels) -> (B, C, H, W), without the unused channels of learn_sigma."""
        p = self.config.patch_size
        n = self.config.input_size // p
        x = tokens.unflatten(2, (p, p, -1)).unflatten(1, (n, n))[..., : self.config.in_channels]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x, t, s=None, y=None):
        """-> velocity (B, C, H, W); in training with align_dim, also tokens (B, T, align_dim).

        x  (B, C, H, W); x, t, s of any float type; computed in that of the weights, or autocast's
        t  (B,) in [0, 1]
        s  (B, D) unit-norm snippets; None: the null snippet, zeros; ignored without memory
        y  (B,) labels; None or negative: the null label, index num_classes; ignored without labels
        """
        config = self.config
        dtype = self.t_embedder.mlp[0].weight.dtype  # FSDP casts weights, not buffers
        x = x.to(dtype)
        c = self.t_embedder(timestep_embedding(t).to(dtype))  # (B, h)
        tokens = self.x_embedder(x) + self.pos_embed.to(dtype)  # (B, T, h)
        if config.memory_dim:
            if s is None:
                s = x.new_zeros(x.shape[0], config.memory_dim)
            s = self.shown_snippets(s).to(dtype)
            c = c + self.condition_projection(s)
            if config.memory_tokens:
                tokens = tokens + self.token_projection(s).view(tokens.shape)
        if config.num_classes:
            if y is None:
                y = torch.full((x.shape[0],), -1, device=x.device)
            c = c + self.y_embedder(torch.where(y < 0, config.num_classes, y.long()))

        projected = None
        for i, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, c, self.feat_rope)
            if self.training and config.align_dim and i == config.align_depth:
                projected = self.projector[0](tokens)

        out = self.unpatchify(self.final_layer(tokens, c))
        if config.predict_x:  # out is x (arXiv 2511.13720); the bound keeps v finite
            out = (out - x) / (1 - t[:, None, None, None]).clamp_min(0.05).to(dtype)
        return out if projected is None else (out, projected)


# -------------------------------------------------------------------------------- loss and samplers


def cosine(v, u):
    """Cosine over channels, (B, C, H, W) -> (B, H, W). |v| counts as at least 0.1, because the
    gradient is 1 / |v|. F.cosine_similarity would take 25 % of a training step's time on a CPU."""
    v_square = v.square().sum(1).clamp_min(1e-2)
    u_square = u.square().sum(1).clamp_min(1e-8)
    return (v * u).sum(1) * (v_square * u_square).rsqrt()


def flow_loss(
    model, x, s=None, y=None, cond_drop_prob=0.1, targets=None, align=0.0, t_mean=0.0, t_std=1.0
):
    """The training loss of one batch (see the head of this file), a scalar; always in float32.

    x               (B, C, H, W) data, of any float type; s (B, D) snippets
    y               (B,) labels, -1 where there is none
    cond_drop_prob  fraction of the images that are shown with the null condition
    targets         (B, T, align_dim) features for the projected tokens (REPA); align: their weight
    t_mean, t_std   mean and standard deviation of the logit of t, which is normal
    All draws are from torch's default generator: t, z, which images to drop; then the model's mask.
    """
    x = x.float()
    B = x.shape[0]
    t = (t_mean + t_std * torch.randn(B, device=x.device, dtype=x.dtype)).sigmoid()
    z = torch.randn_like(x)
    keep = torch.rand(B, device=x.device, dtype=x.dtype) >= cond_drop_prob
    if s is not None:
        s = s * keep[:, None]
    if y is not None:
        y = torch.where(keep, y.long(), -1)
    x_t = torch.lerp(z, x, t[:, None, None, None])
    u = x - z
    v = model(x_t, t, s, y)
    v, projected = v if isinstance(v, tuple) else (v, None)
    v = v.float()
    loss = F.mse_loss(v, u) + 1 - cosine(v, u).mean()
    if targets is not None:
        if projected is None:
            raise InputError("targets: expected a model with align_dim, in training mode")
        cosines = F.cosine_similarity(projected.float(), targets.float(), dim=-1)
        loss = loss - align * cosines.mean()
    elif projected is not None:
        loss = loss + 0 * projected.float().sum()  # DDP wants a gradient of every parameter
    return loss


def at_time(v, x, t):
    """v(x, t) in the dtype of x, for a t that is one number for all of the batch."""
    times = x.new_full((x.shape[0],), t)
    if not hasattr(v, "guidance_interval"):
        return v(x, times).to(x.dtype)
    low, high = v.guidance_interval
    return v(x, times, outside=not low <= t <= high).to(x.dtype)


@torch.no_grad()
def ode(v, z, steps, method="heun", shift=0.0):
    """From noise z (B, ...) to data, by v(x, t) -> velocity, t (B,). Returns x at t = 1.

    v       a network in eval mode, what guided returns, or a function; its values of any float type
    method  "euler" (order 1) or "heun" (order 2; its last step is Euler's, because no network has
            learned what to do at t = 1)
    shift   a > 0 maps the times by t -> a t / (1 + (a-1) t): a < 1 puts more steps near the noise,
            a > 1 near the data; 0: as 1, uniform
    No graph is kept. x is float32 (float64 where z is) between the steps, also under autocast.
    """
    x = checked_noise(v, z, steps, method)
    times = [i / steps for i in range(steps + 1)]
    if shift > 0:
        times = [shift * t / (1 + (shift - 1) * t) for t in times]
    for i in range(steps):
        dt = times[i + 1] - times[i]
        k = at_time(v, x, times[i])
        if method == "heun" and i + 1 < steps:
            k = (k + at_time(v, x + dt * k, times[i + 1])) / 2
        x = x + dt * k
    return x


@torch.no_grad()
def sde(v, z, steps, method="heun", noise=torch.randn_like, diffusion=1.0, last_step=0.004):
    """As ode, with noise of strength w(t) = diffusion (1 - t); "euler" is Euler-Maruyama.

    noise      noise(x) -> standard normal numbers of x's shape
    last_step  the size of the last step, which has no noise ("mean")
    The defaults are the official GMem's, whose num_steps are points: one more than these steps.
    """
    x = checked_noise(v, z, steps, method)

    def drift(x, t):
        velocity = at_time(v, x, t)
        return velocity + diffusion * (t * velocity - x)

    dt = (1 - last_step) / steps
    for i in range(steps):
        t = i * dt
        dw = math.sqrt(2 * diffusion * (1 - t) * dt) * noise(x)
        if method == "euler":
            x = x + dt * drift(x, t) + dw
        else:
            x = x + dw
            k = drift(x, t)
            x = x + dt / 2 * (k + drift(x + dt * k, t + dt))
    return x + last_step * drift(x, 1 - last_step)


def guided(model, s=None, y=None, cfg=1.0, interval=(0.0, 1.0)):
    """-> v(x, t), the velocity under snippets s (B, D) and labels y (B,), with guidance.

    model     SiT, or what wraps it (DDP, FSDP, torch.compile, AveragedModel), in eval mode
    cfg       guidance scale, on all channels; 1: no guidance
    interval  LO, HI: guidance only while LO <= t <= HI
    Called by itself with cfg != 1, v evaluates the network twice: it cannot see t without waiting
    for a GPU. ode and sde know t as a number: outside of the interval they evaluate it once.
    """
    low = interval[0] - 1e-6  # t is float32
    high = interval[1] + 1e-6

    def v(x, t, outside=False):
        check_eval(model)
        v_s = model(x, t, s, y)
        if cfg == 1 or outside:
            return v_s
        v_null = model(x, t)
        within = ((low <= t) & (t <= high)).view(-1, *[1] * (x.ndim - 1))
        return torch.where(within, torch.lerp(v_null, v_s, cfg), v_s)

    v.guidance_interval = (low, high)  # see at_time
    return v


# ================ end of the core: checks, and networks made elsewhere, follow ====================


def check_config(config):
    """InputError where the values of a SiTConfig do not go together."""
    size = config.input_size
    p = config.patch_size
    h = config.hidden_size
    if p < 1 or size % p != 0:
        raise InputError(f"input_size {size}: not a multiple of patch_size {p}")
    if config.num_heads < 1 or h % config.num_heads != 0:
        raise InputError(f"hidden_size {h}: not a multiple of num_heads {config.num_heads}")
    head_dim = h // config.num_heads
    if h % 4 != 0 or (config.rope and head_dim % 4 != 0):
        raise InputError(
            f"hidden_size {h}, {head_dim} for each head: tables of positions in two dimensions "
            "need multiples of 4"
        )
    if not 0 <= config.mask_ratio < 1:
        raise InputError(f"mask_ratio {config.mask_ratio}: expected a fraction, in [0, 1)")
    if config.align_dim and not 1 <= config.align_depth <= config.depth:
        raise InputError(f"align_depth {config.align_depth}: not one of {config.depth} blocks")


def check_eval(model):
    """InputError where a SiT is in training mode: it would mask the snippets that it is given."""
    modules = model.modules() if isinstance(model, nn.Module) else []
    if any(isinstance(module, SiT) and module.training for module in modules):
        raise InputError("the network is in training mode: call its eval() before sampling")


def checked_noise(v, z, steps, method):
    """-> z in float32, or float64. InputError for arguments that no sampler takes."""
    check_eval(v)
    if steps < 1:
        raise InputError(f"{steps} steps: expected 1 or more")
    if method not in ("euler", "heun"):
        raise InputError(f"unknown method {method}; known: euler, heun")
    return z.to(torch.promote_types(z.dtype, torch.float32))


def fetch(url, path, sha256):
    """The file at url -> path. OSError where its length, or the head of its SHA-256, is wrong."""
    partial = f"{path}.{os.urandom(8).hex()}.partial"
    request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(request, timeout=60) as response, open(partial, "wb") as file:
            length = response.headers["Content-Length"]
            print(f"downloading {url} to {path}", flush=True)
            total = None if length is None else int(length)
            bar = torch.hub.tqdm(total=total, unit="B", unit_scale=True)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
            bar.close()
        if length is not None and os.path.getsize(partial) != int(length):
            raise OSError(f"the connection was cut after {os.path.getsize(partial)} bytes")
        if not digest.hexdigest().startswith(sha256):
            raise OSError(f"the SHA-256 is {digest.hexdigest()}, expected {sha256}")
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def download(url, path, sha256):
    """The file at url -> path, by one process: others wait. InputError where that fails."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.lock", "w") as lock:
            if os.name == "posix":  # elsewhere each process downloads a copy of its own
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            if not os.path.exists(path):
                fetch(url, path, sha256)
    except (OSError, HTTPException) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"no download of {url} to {path} ({reason}): put a copy there") from e


def load_failure(error):
    """Why torch.load raised this error, in one line."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    first = text.partition("\n")[0].partition(" Please use")[0]
    reason = f"{type(error).__name__}: {first}"
    if "Unsupported global" in first:
        return f"holds an object that is neither weights nor numbers, and is not loaded ({reason})"
    if isinstance(error, (PermissionError, MemoryError)):
        return f"cannot be read ({reason})"
    return f"is damaged, or not written by torch.save ({reason})"


def load_file(source, urls=(), keys=()):
    """What a file of torch.save holds, mapped into memory.

    source  its path, or a name in urls, which is downloaded once, to torch's cache; what is
            neither str nor path is returned as it is
    urls    name -> URL, which may end in "#sha256=" and the first digits of the file's SHA-256
    keys    what has to be in it
    InputError where it cannot be had.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = os.fspath(source)
    advice = ""
    if path in urls:
        url, _, sha256 = urls[path].partition("#sha256=")
        name = path + os.path.splitext(url)[1]
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
        advice = f"; delete it, and it is downloaded again from {url}"
        if not os.path.exists(path):
            download(url, path, sha256)
    if not os.path.isfile(path):
        known = f", and none of {', '.join(urls)}" if urls else ": give the path of one"
        raise InputError(f"{path} is no file{known}")
    options = {"map_location": "cpu", "weights_only": True, "mmap": zipfile.is_zipfile(path)}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # SiT's files hold one
            content = torch.load(path, **options)
    except Exception as e:  # of any type, where the bytes are not torch's
        raise InputError(f"{path} {load_failure(e)}{advice}") from e
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{path} is no file of the kind expected: it lacks {', '.join(missing)}")
    return content


def weights_of(content):
    """What a file of weights holds -> {key: tensor}: the EMA weights where there are several sets,
    without what DDP, torch.compile and AveragedModel add."""
    if not isinstance(content, dict):
        raise InputError(f"expected weights by name, not a {type(content).__name__}")
    state = content
    for name in ("state_dict", "model", "ema"):  # the last one in the file is taken
        if isinstance(content.get(name), dict):
            state = content[name]
    weights = {}
    for key, value in state.items():
        if torch.is_tensor(value) and key != "n_averaged":
            key = key.replace("_orig_mod.", "")
            while key.startswith("module."):
                key = key.removeprefix("module.")
            weights[key] = value
    return weights


def load_into(weights, network, *args):
    """-> network(*args) with these weights, in eval mode. InputError: keys or shapes differ."""
    with torch.device("meta"):  # nothing is drawn or filled that is replaced at once
        model = network(*args)
    wanted = model.state_dict()
    wrong = []
    for key in {**wanted, **weights}:
        given = tuple(weights[key].shape) if key in weights else "missing"
        expected = tuple(wanted[key].shape) if key in wanted else "none"
        if given != expected:
            wrong.append(f"{key} {given}, expected {expected}")
    if wrong:
        first = "; ".join(wrong[:3])
        raise InputError(f"{len(wrong)} weights do not fit this {network.__name__}: {first}")
    copies = {key: value.to(wanted[key].dtype, copy=True) for key, value in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


OFFICIAL_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by hidden_size


def check_official(weights, config):
    """InputError where the weights may be of a network of which they do not tell everything."""
    foreign = [key for key in weights if key.startswith(("memory_mean", "token_projection"))]
    lightning = config.swiglu and config.rmsnorm and config.rope  # LightningDiT and GMem
    if foreign:
        why = foreign[0]
    elif not (config.rope or config.qk_norm or config.hidden_size in OFFICIAL_HEADS):
        why = f"the number of heads of hidden_size {config.hidden_size} is unknown"
    elif not lightning and (config.memory_dim or not config.learn_sigma):
        why = "neither SiT nor LightningDiT nor GMem"
    else:
        return
    raise InputError(f"these are no official weights ({why}): load_sit needs config, see there")


def official_config(weights):
    """The SiTConfig of official weights (SiT, LightningDiT, GMem), read off names and shapes."""

    def length(key, axis=0):
        return weights[key].shape[axis] if key in weights else 0

    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    head_dim = length("feat_rope.freqs_cos", 1) or length("blocks.0.attn.q_norm.weight")
    heads = hidden_size // head_dim if head_dim else OFFICIAL_HEADS.get(hidden_size, 1)
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    inner = length("blocks.0.mlp.fc2.weight", axis=1)
    swiglu = "blocks.0.mlp.w3.weight" in weights
    if swiglu:
        # its width is int(2/3 int(hidden_size mlp_ratio)): aim at the middle of what gives that
        inner = length("blocks.0.mlp.w3.weight", axis=1) * 3 // 2 + 1
    config = SiTConfig(
        input_size=patch_size * math.isqrt(length("pos_embed", axis=1)),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads,
        mlp_ratio=(inner + 0.5) / hidden_size,
        memory_dim=length("condition_projection.linear.weight", axis=1),
        num_classes=max(0, length("y_embedder.embedding_table.weight") - 1),
        learn_sigma=length("final_layer.linear.bias") == 2 * in_channels * patch_size**2,
        swiglu=swiglu,
        rmsnorm="blocks.0.norm1.weight" in weights,
        rope="feat_rope.freqs_cos" in weights,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        align_dim=length("projector.0.4.bias"),
        align_depth=min(4, depth),
    )
    check_official(weights, config)
    return config


def load_sit(source, config=None):
    """-> SiT of the EMA weights, in eval mode.

    source  path of a file, what torch.load gives for it, or a state dict: this code's where it is
            {"config": vars(model.config), "model": model.state_dict()}; official without "config"
    config  SiTConfig, or its fields: needed with a state dict alone, if it is not official (it
            does not tell predict_x, memory_scale and the like)
    InputError where keys or shapes do not fit, or where config is needed.
    """
    content = load_file(source)
    weights = weights_of(content)
    if config is None:
        config = content.get("config")
    try:
        if isinstance(config, dict) and "model" not in config:  # "model": in official settings
            config = SiTConfig(**config)
        elif not isinstance(config, SiTConfig):
            config = official_config(weights)
    except (KeyError, TypeError) as e:
        raise InputError(f"a checkpoint of no SiT, LightningDiT or GMem: {e}") from e
    return load_into(weights, SiT, config)


# ------------------------------------------------------------------------------------- autoencoders


def group_norm(width):
    return nn.GroupNorm(32, width, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Attention among all places, with one head."""

    def __init__(self, width):
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        h = self.norm(x)
        q = self.q(h).flatten(2).mT[:, None]  # (B, 1, H*W, width)
        k = self.k(h).flatten(2).mT[:, None]
        v = self.v(h).flatten(2).mT[:, None]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """The blocks of one resolution, with attention or without, then the way to the next one."""

    def __init__(self, width_in, width, num_blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResnetBlock(width_in if i == 0 else width, width))
            self.attn.append(AttnBlock(width) if attention else nn.Identity())
        self.downsample = nn.Identity()
        self.upsample = nn.Identity()
        if downsample:  # padded at the right and below only
            conv = nn.Conv2d(width, width, 3, stride=2)
            self.downsample = named(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv)
        if upsample:
            conv = nn.Conv2d(width, width, 3, padding=1)
            self.upsample = named(enlarge=nn.Upsample(scale_factor=2), conv=conv)

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def middle(width):
    first = ResnetBlock(width, width)
    return named(block_1=first, attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))


def encoder(channels, widths, num_blocks, attention_levels):
    """From the finest level to the coarsest, a chain."""
    levels = nn.Sequential()
    width_in = widths[0]
    for i, width in enumerate(widths):
        last = i == len(widths) - 1
        attention = i in attention_levels
        levels.append(Level(width_in, width, num_blocks, attention, downsample=not last))
        width_in = width
    return named(
        conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
        down=levels,
        mid=middle(width),
        norm_out=group_norm(width),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(width, 2 * channels, 3, padding=1),
    )


def decoder(channels, widths, num_blocks, attention_levels):
    """From the coarsest level to the finest, a chain; levels are numbered as the encoder's."""
    levels = nn.Sequential()
    width_in = widths[-1]
    for i in reversed(range(len(widths))):
        level = Level(width_in, widths[i], num_blocks, i in attention_levels, upsample=i > 0)
        levels.add_module(str(i), level)
        width_in = widths[i]
    return named(
        conv_in=nn.Conv2d(channels, widths[-1], 3, padding=1),
        mid=middle(widths[-1]),
        up=levels,
        norm_out=group_norm(width_in),
        act=nn.SiLU(),
        conv_out=nn.Conv2d(width_in, 3, 3, padding=1),
    )


class AutoencoderKL(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H / factor, W / factor), unscaled.

    The default is sd-vae-ft-ema, f8d4 (arXiv 2112.10752). VA-VAE, f16d32 (arXiv 2501.01423), is
    AutoencoderKL(32, (128, 128, 256, 256, 512), attention_levels=(4,)).
    """

    def __init__(self, channels=4, widths=(128, 256, 512, 512), num_blocks=2, attention_levels=()):
        super().__init__()
        self.channels = channels
        self.factor = 2 ** (len(widths) - 1)
        self.encoder = encoder(channels, widths, num_blocks, attention_levels)
        self.decoder = decoder(channels, widths, num_blocks + 1, attention_levels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, x):
        """-> mean and log variance of the latents' distribution"""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))


HUB = "https://huggingface.co"
VAVAE = "vavae-imagenet256-f16d32-dinov2"
AUTOENCODERS = {
    "sd-vae-ft-ema": f"{HUB}/stabilityai/sd-vae-ft-ema/resolve/main/diffusion_pytorch_model.bin",
    "vavae-f16d32": f"{HUB}/hustvl/{VAVAE}/resolve/main/{VAVAE}.pt",
}
# fmt: off
DIFFUSERS_NAMES = {  # -> those of the LDM code, which are used here; replaced in this order
    "down_blocks": "down", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    "resnets": "block", "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2",
    "attentions": "attn", "mid_block.attn.0": "mid.attn_1", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
}
# fmt: on


def ldm_key(key, levels):
    """A key in the format of diffusers or LDM -> in the format of LDM."""
    for i in range(levels):  # diffusers counts the decoder's levels from the coarsest
        key = key.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
    for old, new in DIFFUSERS_NAMES.items():
        key = key.replace(f".{old}.", f".{new}.")
    return key


def load_autoencoder(source):
    """-> AutoencoderKL in eval mode. source: a name in AUTOENCODERS, a path or a state dict, with
    the names of diffusers or LDM. InputError where names or shapes do not fit."""
    given = weights_of(load_file(source, AUTOENCODERS))
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # others: of the training
    given = {key: value for key, value in given.items() if key.startswith(parts)}
    downs = ("encoder.down.", "encoder.down_blocks.")
    levels = len({key.split(".")[2] for key in given if key.startswith(downs)})
    weights = {}
    for key, value in given.items():
        key = ldm_key(key, levels)
        if ".attn" in key and value.ndim == 2:  # linear in diffusers, a 1x1 convolution here
            value = value[:, :, None, None]
        weights[key] = value
    try:
        channels = len(weights["post_quant_conv.bias"])
        widths = [len(weights[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
    except KeyError as e:
        raise InputError(f"weights of no autoencoder, as diffusers or LDM names them: {e}") from e
    blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.bias" in weights]
    return load_into(weights, AutoencoderKL, channels, widths, len(blocks), attention)


# ------------------------------------------------------------------------------------------- DINOv2


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gamma * x


class DINOv2Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, width // 64)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        inner = 4 * width
        self.mlp = named(fc1=nn.Linear(width, inner), act=nn.GELU(), fc2=nn.Linear(inner, width))
        self.ls2 = LayerScale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DINOv2(nn.Module):
    """ViT with patches of 14 pixels and LayerScale (arXiv 2304.07193), with the official names.

    x (B, 3, H, W), multiples of 14, normalised -> class token (B, D), patch tokens
    (B, H/14 * W/14, D), both after the last norm. The position table is resampled as in the
    official GMem: bicubic, antialiased.
    """

    def __init__(self, width=768, depth=12, grid=37):
        super().__init__()
        self.grid = grid  # the position table's height and width
        self.patch_embed = named(proj=nn.Conv2d(3, width, 14, stride=14))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.Sequential(*[DINOv2Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        patches = self.patch_embed(x)  # (B, D, H/14, W/14)
        table = self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        if patches.shape[2:] != table.shape[2:]:
            table = F.interpolate(table.float(), patches.shape[2:], mode="bicubic", antialias=True)
        patches = (patches + table).flatten(2).mT
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([first, patches], dim=1)))
        return tokens[:, 0], tokens[:, 1:]


META = "https://dl.fbaipublicfiles.com/dinov2"
# Meta publishes no hashes of them; these are what other projects have recorded
DINOV2 = {
    "dinov2_vits14": f"{META}/dinov2_vits14/dinov2_vits14_pretrain.pth#sha256=b938bf1bc15cd2ec",
    "dinov2_vitb14": f"{META}/dinov2_vitb14/dinov2_vitb14_pretrain.pth#sha256=0b8b82f85de91b42",
    "dinov2_vitl14": f"{META}/dinov2_vitl14/dinov2_vitl14_pretrain.pth#sha256=d5383ea8f4877b24",
}


def load_dinov2(source):
    """-> DINOv2 in eval mode. source: a name in DINOV2, a path or a state dict, with the official
    names. InputError where names or shapes do not fit."""
    weights = weights_of(load_file(source, DINOV2))
    weights.pop("mask_token", None)  # of its training
    try:
        width = weights["cls_token"].shape[2]
        positions = weights["pos_embed"].shape[1]
    except (KeyError, IndexError) as e:
        raise InputError(f"weights of no DINOv2: {e}") from e
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return load_into(weights, DINOv2, width, depth, math.isqrt(positions - 1))


def dinov2_features(model, images):
    """images: uint8 (B, 3, H, H) -> class token (B, D), patch tokens (B, T, D), as the official
    GMem's: ImageNet's mean and std, then bicubic (not antialiased) to 224 pixels for every 256"""
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    size = 224 * max(1, images.shape[-1] // 256)
    x = (images / 255 - mean) / std
    return model(F.interpolate(x, (size, size), mode="bicubic"))
