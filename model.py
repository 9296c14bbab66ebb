"""The networks of GMem (arXiv 2412.08781): a flow-matching transformer that is shown one snippet.

    x_t = (1 - t) z + t x          z ~ N(0, I), time t runs from noise (0) to data (1)
    v(x_t, t, s)  ->  x - z        s: the unit-norm snippet of x, masked by dropout
    loss = |v - (x - z)|^2 + 1 - cos(v, x - z)       mean over pixels; the cosine is over channels

    ODE  dx_t = v dt
    SDE  dx_t = (v + w score) dt + sqrt(2 w) dW      w(t) = 1 - t, score = (t v - x_t) / (1 - t)
    guidance  v = v_null + cfg (v_s - v_null)        where LO <= t <= HI

- class SiT is SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423), by switches of SiTConfig
- the snippet is projected, added to the time embedding, and reaches each block by adaLN; in the
  small models it is also projected to each token
- then official weights, whose names of parameters are kept here, the autoencoders and DINOv2
- only torch and the standard library are imported: this file can be copied into any other code
"""

import argparse
import math
import os
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """What a user gave cannot be used; the message says what was expected."""


@dataclass
class SiTConfig:
    """Everything that defines a network."""

    input_size: int = 32  # height and width of x, in latent pixels
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    memory_dim: int = 0  # D of the snippets; 0: no memory
    memory_scale: float = 1.0  # factor on snippets (official: 1); see standardize_snippets
    memory_center: bool = False  # the network sees s - mean: a masked entry is the mean, not zero
    memory_tokens: bool = False  # s is also added to the image tokens, by a linear layer (ours)
    num_classes: int = 0  # 0: no labels
    mask_ratio: float = 0.4  # dropout of a snippet's entries in training (official GMem: 0.4)
    learn_sigma: bool = False  # twice the output channels, half unused (official SiT weights)
    swiglu: bool = False  # this and the next three: the switches of LightningDiT
    rmsnorm: bool = False
    rope: bool = False
    qk_norm: bool = False
    zero_init: bool = True  # adaLN-zero: every block starts as the identity, the output as zero
    predict_x: bool = False  # the last layer gives x, not v: for large patches (arXiv 2511.13720)
    align_dim: int = 0  # REPA: block align_depth is projected to features of this width; 0: off
    align_depth: int = 4

    def __post_init__(self):
        if self.input_size % self.patch_size != 0:
            raise InputError(f"patch_size {self.patch_size} does not divide {self.input_size}")
        assert self.hidden_size % (4 * self.num_heads) == 0, "heads are not 4, 8, 12, .. wide"
        assert not self.align_dim or 1 <= self.align_depth <= self.depth, "align_depth"


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

RMSNorm = partial(nn.RMSNorm, eps=1e-6)


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
        patches = F.pixel_unshuffle(x, self.stride[0]).flatten(2).mT  # (B, T, C*p*p)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Rope2d(nn.Module):
    """Rotary embedding: half of a head is turned by the token's row, half by its column."""

    def __init__(self, head_dim, size):
        super().__init__()
        column, row = position_angles(head_dim, size)
        angle = torch.cat([row, column], dim=1).repeat_interleave(2, dim=1)  # (size*size, head_dim)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, q):
        a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-b, a], dim=-1).flatten(-2)
        return q * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention; norm: a module class, made for queries and for keys."""

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
        return RMSNorm(config.hidden_size)
    return nn.LayerNorm(config.hidden_size, eps=1e-6, elementwise_affine=False)


class Block(nn.Module):
    """Attention and MLP, each with a shift, a scale and a gate from the condition c (adaLN)."""

    def __init__(self, config):
        super().__init__()
        h = config.hidden_size
        head_norm = nn.Identity
        if config.qk_norm:
            head_norm = RMSNorm if config.rmsnorm else nn.LayerNorm
        self.norm1 = block_norm(config)
        self.attn = Attention(h, config.num_heads, head_norm)
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
    """v(x_t, t, s): see forward. With memory_center, standardize_snippets comes before training."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: recompute each block in the backward pass
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
        if config.memory_dim and config.memory_center:
            self.register_buffer("memory_mean", torch.zeros(config.memory_dim))
        x, y = position_angles(h, size)
        table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
        self.register_buffer("pos_embed", table[None].float())  # (1, T, h)
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
        t_embedder, y_embedder                        normal, std 0.02
        adaLN, final_layer.linear                     0; zero_init=False (official GMem): Xavier
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                module.bias.zero_()
        for name, weight in self.named_parameters():
            if name.startswith(("t_embedder", "y_embedder")) and weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            if self.config.zero_init and ("adaLN" in name or name.startswith("final_layer.linear")):
                weight.zero_()

    @torch.no_grad()
    def standardize_snippets(self, bank):
        """Sets memory_mean, a buffer, and config.memory_scale so that the snippets of a bank, as
        the network sees them, have mean 0 and variance 1. bank: a MemoryBank or tensor (N, D), of
        unit norm; up to 10,000 rows of it are used."""
        if not self.config.memory_center:
            raise InputError("standardize_snippets: the config needs memory_center=True")
        rows = torch.linspace(0, len(bank) - 1, min(len(bank), 10_000), dtype=torch.float64)
        s = bank[rows.long()]
        self.memory_mean.copy_(s.mean(dim=0))
        std = (s - s.mean(dim=0)).square().mean().sqrt().item()
        self.config.memory_scale = 1 / max(std, 1e-6)

    def shown_snippets(self, s):
        """Snippets (B, D) as the network sees them: centred (not the null one), scaled, masked"""
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

        x  (B, C, H, W); as t and s of any float type: cast to that of the weights, or autocast's
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
            if self.checkpointing and self.training:
                tokens = checkpoint(block, tokens, c, self.feat_rope, use_reentrant=False)
            else:
                tokens = block(tokens, c, self.feat_rope)
            if self.training and config.align_dim and i == config.align_depth:
                projected = self.projector[0](tokens)

        out = self.unpatchify(self.final_layer(tokens, c))
        if config.predict_x:  # the data; v = (data - x_t) / (1 - t), 1 - t >= 0.05
            out = (out - x) / (1 - t[:, None, None, None]).clamp_min(0.05).to(dtype)
        return out if projected is None else (out, projected)


# -------------------------------------------------------------------------------- loss and samplers


def cosine(v, u):
    """Cosine over channels, (B, C, H, W) -> (B, H, W). |v| counts as 0.1 at least: the gradient
    grows as 1 / |v|. F.cosine_similarity would take 25 % of a training step's time on a CPU."""
    v_square = v.square().sum(1).clamp_min(1e-2)
    u_square = u.square().sum(1).clamp_min(1e-8)
    return (v * u).sum(1) * (v_square * u_square).rsqrt()


def has_sit(model, training):
    """Whether a model is or wraps a SiT whose mode, .training, is this one"""
    modules = model.modules() if isinstance(model, nn.Module) else []
    return any(isinstance(m, SiT) and m.training == training for m in modules)


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
    Eval mode, which has no mask, is for validation under torch.no_grad().
    """
    if torch.is_grad_enabled() and has_sit(model, training=False):
        raise InputError("flow_loss: the network is in eval mode and has no mask: call its train()")
    x = x.float()
    t = (t_mean + t_std * torch.randn(len(x), device=x.device, dtype=x.dtype)).sigmoid()
    z = torch.randn_like(x)
    keep = torch.rand(len(x), device=x.device, dtype=x.dtype) >= cond_drop_prob
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
    if targets is not None and projected is not None:  # in eval mode it is None
        cosines = F.cosine_similarity(projected.float(), targets.float(), dim=-1)
        loss = loss - align * cosines.mean()
    elif projected is not None:
        loss = loss + 0 * projected.float().sum()  # --align 0: DDP wants gradients of all
    return loss


@torch.no_grad()
def ode(v, z, steps, method="heun", shift=0.0):
    """From noise z (B, ...) to data, by a function v(x, t) -> velocity, t a float. -> x at t = 1

    method  "euler" (order 1) or "heun" (order 2; its last step is Euler's, because no network has
            learned what to do at t = 1)
    shift   a > 0 maps the times by t -> a t / (1 + (a-1) t): a < 1 puts more steps near the noise
    x is float32 between the steps; no graph is kept.
    """
    assert steps >= 1 and method in ("euler", "heun"), (steps, method)
    x = z.float()
    times = [i / steps for i in range(steps + 1)]
    if shift > 0:
        times = [shift * t / (1 + (shift - 1) * t) for t in times]
    for i in range(steps):
        dt = times[i + 1] - times[i]
        k = v(x, times[i])
        if method == "heun" and i + 1 < steps:
            k = (k + v(x + dt * k, times[i + 1])) / 2
        x = x + dt * k
    return x


@torch.no_grad()
def sde(v, z, steps, method="heun", noise=torch.randn_like, last_step=0.004):
    """As ode, with noise of strength w(t) = 1 - t; "euler" is Euler-Maruyama.

    noise      noise(x) -> standard normal numbers of x's shape
    last_step  the size of the last step, which has no noise
    w and last_step are the official GMem's, whose num_steps is steps + 1.
    """
    assert steps >= 1 and method in ("euler", "heun"), (steps, method)
    x = z.float()

    def drift(x, t):
        velocity = v(x, t)
        return velocity + (t * velocity - x)  # the brackets are w score

    dt = (1 - last_step) / steps
    for i in range(steps):
        t = i * dt
        dw = math.sqrt(2 * (1 - t) * dt) * noise(x)
        if method == "euler":
            x = x + dt * drift(x, t) + dw
        else:
            x = x + dw
            k = drift(x, t)
            x = x + dt / 2 * (k + drift(x + dt * k, t + dt))
    return x + last_step * drift(x, 1 - last_step)


def guided(model, s=None, y=None, cfg=1.0, interval=(0.0, 1.0)):
    """-> v(x, t) for ode and sde, with guidance, in float32; t a float.

    model     SiT, or what wraps it (DDP, FSDP, torch.compile, AveragedModel), in eval mode
    s, y      snippets (B, D) of any norm: they are normalised here, zeros are null; labels (B,)
    cfg       guidance scale, on all channels; 1: no guidance
    interval  LO, HI: guidance only while LO <= t <= HI, elsewhere one evaluation instead of two
    """
    if has_sit(model, training=True):
        raise InputError("guided: the network is in training mode and would mask: call its eval()")
    if s is not None:
        s = F.normalize(s.float(), dim=1)

    def v(x, t):
        times = x.new_full((x.shape[0],), t)
        v_s = model(x, times, s, y).float()
        if cfg == 1 or not interval[0] <= t <= interval[1]:
            return v_s
        v_null = model(x, times).float()
        return torch.lerp(v_null, v_s, cfg)

    return v


# --------------------------------------------------------------------------------- official weights


def load_file(source, urls=()):
    """-> what torch.save wrote into a file: tensors and plain values, mapped into memory.

    source  a path, or a name in urls; anything else is returned as it is
    urls    {name: (URL, first digits of the SHA-256)}: downloaded once, into torch.hub's folder
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    if source in urls:
        url, sha256 = urls[source]
        source = os.path.join(torch.hub.get_dir(), "checkpoints", source + os.path.splitext(url)[1])
        if not os.path.exists(source):
            os.makedirs(os.path.dirname(source), exist_ok=True)
            torch.hub.download_url_to_file(url, source, hash_prefix=sha256)
    with torch.serialization.safe_globals([argparse.Namespace]):  # in SiT's files
        mapped = zipfile.is_zipfile(source)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def weights_of(content):
    """The content of a file -> {key: tensor}, without what DDP, torch.compile and AveragedModel
    add to names. EMA weights are preferred over raw ones."""
    state = content.get("ema", content.get("model", content.get("state_dict", content)))
    weights = {}
    for key, value in state.items():
        if torch.is_tensor(value) and key != "n_averaged":
            weights[key.replace("_orig_mod.", "").replace("module.", "")] = value
    return weights


def load_into(weights, network, *args):
    """-> network(*args) with these weights, in eval mode"""
    with torch.device("meta"):  # there no random weights are drawn
        model = network(*args)
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def official_config(weights):
    """The SiTConfig of official weights (SiT, LightningDiT, GMem), read off names and shapes."""

    def shape(key):  # zeros where the weights lack it
        return weights[key].shape if key in weights else (0, 0)

    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    return SiTConfig(
        input_size=patch_size * math.isqrt(shape("pos_embed")[1]),
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=16 if hidden_size == 1152 else hidden_size // 64,
        memory_dim=shape("condition_projection.linear.weight")[1],
        num_classes=max(0, shape("y_embedder.embedding_table.weight")[0] - 1),
        learn_sigma=shape("final_layer.linear.bias")[0] == 2 * in_channels * patch_size**2,
        swiglu="blocks.0.mlp.w12.weight" in weights,
        rmsnorm="blocks.0.norm1.weight" in weights,
        rope="feat_rope.freqs_cos" in weights,
        qk_norm="blocks.0.attn.q_norm.weight" in weights,
        align_dim=shape("projector.0.4.bias")[0],
        align_depth=min(4, depth),
    )


def load_sit(source, config=None):
    """-> SiT of the EMA weights, in eval mode.

    source  a file, what torch.load gives for it, or a state dict: official, or of this code, then
            with its config: {"config": vars(model.config), "model": model.state_dict()}
    config  SiTConfig or its fields: needed for a bare state dict of this code, because predict_x,
            memory_scale and others cannot be read off it
    """
    content = load_file(source)
    weights = weights_of(content)
    config = config or content.get("config")
    if isinstance(config, dict) and "model" not in config:  # official: a yaml
        config = SiTConfig(**config)
    if not isinstance(config, SiTConfig):
        if "token_projection.weight" in weights or "memory_mean" in weights:
            raise InputError("weights without their config: give load_sit config=")
        config = official_config(weights)
    return load_into(weights, SiT, config)


# ------------------------------------------------------------------------------------- autoencoders

group_norm = partial(nn.GroupNorm, 32, eps=1e-6)
conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = conv3x3(width_in, width)
        self.norm2 = group_norm(width)
        self.conv2 = conv3x3(width, width)
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
        q, k, v = [f(h).flatten(2).mT[:, None] for f in (self.q, self.k, self.v)]  # (B, 1, H*W, h)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h[:, 0].mT.reshape(x.shape))


class Level(nn.Module):
    """The blocks of one resolution, with attention or without, then the way to the next one."""

    def __init__(self, width_in, width, num_blocks, attention, downsample=False, upsample=False):
        super().__init__()
        attn = AttnBlock if attention else nn.Identity
        widths_in = [width_in] + [width] * (num_blocks - 1)
        self.block = nn.ModuleList([ResnetBlock(w, width) for w in widths_in])
        self.attn = nn.ModuleList([attn(width) for _ in widths_in])
        pad = nn.ZeroPad2d((0, 1, 0, 1))  # at right and below only
        down = named(pad=pad, conv=nn.Conv2d(width, width, 3, stride=2))
        up = named(enlarge=nn.Upsample(scale_factor=2), conv=conv3x3(width, width))
        self.downsample = down if downsample else nn.Identity()
        self.upsample = up if upsample else nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


def middle(width):
    first = ResnetBlock(width, width)
    return named(block_1=first, attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))


class AutoencoderKL(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H / factor, W / factor), unscaled.
    The default is sd-vae-ft-ema, f8d4 (arXiv 2112.10752). VA-VAE, f16d32 (arXiv 2501.01423), is
    AutoencoderKL(32, (128, 128, 256, 256, 512), attention_levels=(4,)).
    """

    dtype = "float16"  # of latents on disk

    def __init__(self, channels=4, widths=(128, 256, 512, 512), num_blocks=2, attention_levels=()):
        super().__init__()
        last = len(widths) - 1
        self.channels = channels
        self.factor = 2**last
        down = []
        up = []
        for i, width in enumerate(widths):  # from the finest level to the coarsest
            attention = i in attention_levels
            finer = widths[max(i - 1, 0)]
            coarser = widths[min(i + 1, last)]
            down.append(Level(finer, width, num_blocks, attention, downsample=i < last))
            up.append((str(i), Level(coarser, width, num_blocks + 1, attention, upsample=i > 0)))
        self.encoder = named(
            conv_in=conv3x3(3, widths[0]),
            down=nn.Sequential(*down),
            mid=middle(widths[-1]),
            norm_out=group_norm(widths[-1]),
            act=nn.SiLU(),
            conv_out=conv3x3(widths[-1], 2 * channels),
        )
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = named(
            conv_in=conv3x3(channels, widths[-1]),
            mid=middle(widths[-1]),
            up=nn.Sequential(OrderedDict(reversed(up))),
            norm_out=group_norm(widths[0]),
            act=nn.SiLU(),
            conv_out=conv3x3(widths[0], 3),
        )

    def encode(self, x):
        """-> the mean of the latents' distribution; computed in float32, as in the official code"""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z.float()))


SD_VAE = "https://huggingface.co/stabilityai/sd-vae-ft-ema/resolve/main"
VAVAE = "https://huggingface.co/hustvl/vavae-imagenet256-f16d32-dinov2/resolve/main"
AUTOENCODERS = {  # with the SHA-256 that Hugging Face shows
    "sd-vae-ft-ema": (f"{SD_VAE}/diffusion_pytorch_model.bin", "7c98ebcd7ca5cb69"),
    "vavae-f16d32": (f"{VAVAE}/vavae-imagenet256-f16d32-dinov2.pt", "2088e07378d26047"),
}
# fmt: off
DIFFUSERS_NAMES = {  # of weights -> those of LDM, which are used here; replaced in this order
    "down_blocks": "down", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    "resnets": "block", "mid_block.block.0": "mid.block_1", "mid_block.block.1": "mid.block_2",
    "attentions": "attn", "mid_block.attn.0": "mid.attn_1", "group_norm": "norm",
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out",
}
# fmt: on


def load_autoencoder(source):
    """-> AutoencoderKL in eval mode. source: a name in AUTOENCODERS, a file or a state dict"""
    given = weights_of(load_file(source, AUTOENCODERS))
    downs = ("encoder.down.", "encoder.down_blocks.")
    levels = len({key.split(".")[2] for key in given if key.startswith(downs)})
    weights = {}
    for key, value in given.items():
        for i in range(levels):  # diffusers counts the decoder's levels from the coarsest
            key = key.replace(f"up_blocks.{i}.", f"up.{levels - 1 - i}.")
        for old, new in DIFFUSERS_NAMES.items():
            key = key.replace(f".{old}.", f".{new}.")
        if ".attn" in key and value.ndim == 2:  # linear in diffusers, a 1x1 convolution here
            value = value[:, :, None, None]
        if key.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):
            weights[key] = value  # others are of the training
    channels = len(weights["post_quant_conv.bias"])
    widths = [len(weights[f"encoder.down.{i}.block.0.conv1.bias"]) for i in range(levels)]
    blocks = {key.split(".")[4] for key in weights if key.startswith("encoder.down.0.block.")}
    attention = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.bias" in weights]
    return load_into(weights, AutoencoderKL, channels, widths, len(blocks), attention)


# ------------------------------------------------------------------------------------------- DINOv2


class DINOv2Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, width // 64)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        inner = 4 * width
        self.mlp = named(fc1=nn.Linear(width, inner), act=nn.GELU(), fc2=nn.Linear(inner, width))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x):
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class DINOv2(nn.Module):
    """ViT with patches of 14 pixels and LayerScale (arXiv 2304.07193), with the official names.

    x (B, 3, H, W), multiples of 14, normalised -> class token (B, D), patch tokens
    (B, H/14 * W/14, D), both after the last norm. The position table is resampled by bicubic
    interpolation: antialiased as in the official GMem, or (hub_positions) as in torch.hub's DINOv2.
    """

    def __init__(self, width=768, depth=12, grid=37, hub_positions=False):
        super().__init__()
        self.grid = grid  # the position table's height and width
        self.hub_positions = hub_positions
        self.patch_embed = named(proj=nn.Conv2d(3, width, 14, stride=14))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.Sequential(*[DINOv2Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x):
        patches = self.patch_embed(x)  # (B, D, H/14, W/14)
        table = self.pos_embed[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        size = patches.shape[2:]
        if self.hub_positions and size != table.shape[2:]:
            scale = [(n + 0.1) / self.grid for n in size]  # 0.1: against rounding down
            table = F.interpolate(table.float(), scale_factor=scale, mode="bicubic")
        elif size != table.shape[2:]:
            table = F.interpolate(table.float(), size, mode="bicubic", antialias=True)
        patches = (patches + table).flatten(2).mT
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([first, patches], dim=1)))
        return tokens[:, 0], tokens[:, 1:]


META = "https://dl.fbaipublicfiles.com/dinov2"
DINOV2 = {  # Meta publishes no SHA-256; these are what other projects have recorded
    "dinov2_vits14": (f"{META}/dinov2_vits14/dinov2_vits14_pretrain.pth", "b938bf1bc15cd2ec"),
    "dinov2_vitb14": (f"{META}/dinov2_vitb14/dinov2_vitb14_pretrain.pth", "0b8b82f85de91b42"),
    "dinov2_vitl14": (f"{META}/dinov2_vitl14/dinov2_vitl14_pretrain.pth", "d5383ea8f4877b24"),
}


def load_dinov2(source, hub_positions=False):
    """-> DINOv2 in eval mode. source: a name in DINOV2, a file or a state dict, official names"""
    weights = weights_of(load_file(source, DINOV2))
    weights.pop("mask_token", None)  # of its training
    width = weights["cls_token"].shape[2]
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    grid = math.isqrt(weights["pos_embed"].shape[1] - 1)
    return load_into(weights, DINOv2, width, depth, grid, hub_positions)


def dinov2_features(model, images):
    """images: 0 .. 255 (B, 3, H, H) -> class token (B, D), patch tokens (B, T, D), as the official
    GMem's: ImageNet's mean and std, then bicubic (not antialiased) to 224 pixels (512: 448)"""
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device)[:, None, None]
    size = 224 * max(1, images.shape[-1] // 256)
    x = (images / 255 - mean) / std
    return model(F.interpolate(x, (size, size), mode="bicubic"))


# --------------------------------------------------------------------------- tokenizer and encoder


class Pixels:
    """No tokenizer: images (B, 3, H, W) in [-1, 1] <-> 0 .. 255, uint8 on disk."""

    channels = 3
    factor = 1
    dtype = "uint8"

    def encode(self, x):
        return ((x + 1) * 127.5).round()

    def decode(self, z):
        return z / 127.5 - 1


def load_tokenizer(name, device):
    """-> Pixels or AutoencoderKL. name: pixel, or a name or file of an autoencoder"""
    if name == "pixel":
        return Pixels()
    return load_autoencoder(name).to(device).requires_grad_(False)


def thumbnail(x):
    """Images (B, 3, H, W) in [-1, 1] -> (B, 768): 16 x 16 pixels. No semantics, no weights."""
    return F.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).flatten(1)


def load_encoder(name, device):
    """-> f(images (B, 3, H, W) in [-1, 1]) -> features (B, D), patch tokens (B, T, D) or None

    A snippet is the unit vector of the features: for name "thumbnail", 768 numbers in [-1, 1] in
    the order 3 channels, 16 rows, 16 columns; for a name or file of a DINOv2, its class token.
    """
    if name == "thumbnail":
        return lambda images: (thumbnail(images), None)
    dinov2 = load_dinov2(name).to(device).requires_grad_(False)
    return lambda images: dinov2_features(dinov2, (images + 1) * 127.5)
