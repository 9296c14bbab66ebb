"""
The backbone of GMem (arXiv 2412.08781): a flow-matching transformer that is shown one memory snippet.

    x_t = (1 - t) z + t x          z ~ N(0, I), t from 0 (noise) to 1 (data)
    v(x_t, t, s)  ->  x - z        s: the unit-norm snippet of x, a random part of its entries set to zero
    loss = |v - (x - z)|^2 + 1 - cos(v, x - z)

One class is both SiT (arXiv 2401.08740) and LightningDiT (arXiv 2501.01423), by switches of `SiTConfig`.
What is notable:
- the network may predict x instead of v, for large patches (arXiv 2511.13720); what it returns is always v
- the snippet enters through one linear layer, added to the time embedding, and reaches each block by adaLN
- the null snippet is zeros, the null label one more row of the table; training shows both, for guidance
- parameters carry the names of the official code, so that official weights need no renaming
- nothing but torch is imported: this file can be copied into any other code
"""
import math
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


def _named(prefix, sizes, **switches):
    table = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    keys = "hidden_size", "depth", "num_heads"
    return {f"{prefix}-{n}/{p}": dict(zip(keys, table[n]), patch_size=p, **switches) for n, p in sizes}


CONFIGS = {  # the sizes of the SiT and LightningDiT papers, and one for a CPU
    **{f"SiT-T/{p}": dict(hidden_size=256, depth=4, num_heads=4, patch_size=p, predict_x=True)
       for p in (4, 8, 16)},
    **_named("SiT", [("S", 2), ("B", 2), ("L", 2), ("XL", 2)]),
    **_named("LightningDiT", [("S", 1), ("B", 1), ("B", 2), ("L", 2), ("XL", 1), ("XL", 2)],
             swiglu=True, rmsnorm=True, rope=True),
}


def modulate(x, shift, scale):
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def sincos_pos_embed(dim, size):
    """Fixed position table (size*size, dim): a quarter each of sin(x w), cos(x w), sin(y w), cos(y w)."""
    w = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*2 * [torch.arange(size, dtype=torch.float64)], indexing="ij")
    a, b = x.reshape(-1, 1) * w, y.reshape(-1, 1) * w
    return torch.cat([a.sin(), a.cos(), b.sin(), b.cos()], dim=1).float()


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.register_buffer("w", torch.exp(-math.log(10000) / 128 * torch.arange(128)), persistent=False)

    def forward(self, t):
        a = t[:, None].float() * self.w
        return self.mlp(torch.cat([a.cos(), a.sin()], dim=1))


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
        h, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(h, 3 * h)
        self.proj = nn.Linear(h, h)
        if not config.qk_norm:
            norm = nn.Identity
        elif config.rmsnorm:
            norm = lambda: nn.RMSNorm(head_dim, eps=1e-6)
        else:
            norm = lambda: nn.LayerNorm(head_dim, eps=1e-5)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, rope=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, n, T, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q).type_as(v), rope(k).type_as(v)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        h, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.swiglu = config.swiglu
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
    h = config.hidden_size
    return nn.RMSNorm(h, eps=1e-6) if config.rmsnorm else nn.LayerNorm(h, eps=1e-6, elementwise_affine=False)


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
        self.norm_final = block_norm(config)
        self.linear = nn.Linear(h, config.patch_size ** 2 * channels)
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
        self.t_embedder = TimestepEmbedder(h)
        if config.num_classes:  # the last row is the null label
            self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(config.num_classes + 1, h)))
        if config.memory_dim:
            self.condition_projection = nn.ModuleDict(dict(linear=nn.Linear(config.memory_dim, h)))
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
        """
        | what                                        | weight                                   | bias |
        | linear layers, patch embedding (flattened)  | Xavier uniform                           | 0    |
        | time embedding, label table                 | normal, std 0.02                         | 0    |
        | adaLN, final_layer.linear                   | 0 (Xavier in GMem's code: zero_init off) | 0    |
        """
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(m.weight.flatten(1))
                m.bias.zero_()
        for w in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(w, std=0.02)
        if self.config.num_classes:
            nn.init.normal_(self.y_embedder["embedding_table"].weight, std=0.02)
        if self.config.zero_init:
            for m in [b.adaLN_modulation[1] for b in self.blocks] + [
                    self.final_layer.adaLN_modulation[1], self.final_layer.linear]:
                m.weight.zero_()

    def forward(self, x, t, s=None, y=None):
        """
        x: (B, C, H, W); t: (B,) in [0, 1]; s: (B, D) unit-norm snippets, None: the null snippet, zeros;
        y: (B,) labels, None: the null label, index num_classes
        -> velocity (B, C, H, W); in training with align_dim, also the projected tokens (B, T, align_dim)
        """
        cfg, B, p = self.config, len(x), self.config.patch_size
        c = self.t_embedder(t)                                                # (B, h)
        if cfg.memory_dim:
            s = x.new_zeros(B, cfg.memory_dim) if s is None else s
            c = c + self.condition_projection["linear"](F.dropout(s, cfg.mask_ratio, self.training))
        if cfg.num_classes:
            y = x.new_full((B,), cfg.num_classes, dtype=torch.long) if y is None else y
            c = c + self.y_embedder["embedding_table"](y)
        h, proj = F.pixel_unshuffle(x, p).flatten(2).mT, self.x_embedder["proj"]  # (B, T, C*p*p)
        h = F.linear(h, proj.weight.flatten(1), proj.bias)                    # as a convolution, but faster
        h = h + self.pos_embed                                                # (B, T, h)
        for i, block in enumerate(self.blocks, 1):
            h = block(h, c, self.feat_rope)
            if self.training and cfg.align_dim and i == cfg.align_depth:
                tokens = self.projector[0](h)
        h, n = self.final_layer(h, c), cfg.input_size // p                    # (B, T, p*p*C)
        v = h.reshape(B, n, n, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(B, -1, n * p, n * p)
        v = v[:, :cfg.in_channels]
        if cfg.predict_x:
            v = (v - x) / (1 - t[:, None, None, None]).clamp_min(0.05)        # bounded as in that paper
        return (v, tokens) if self.training and cfg.align_dim else v


def flow_loss(model, x, s=None, y=None, drop=0.1, uniform_t=False, targets=None, align=0.0):
    """
    The training loss of one batch (module docstring); every draw comes from torch's default generator.
    x: (B, C, H, W) data; s: (B, D); y: (B,); drop: part of the images that see the null condition;
    targets: (B, T, align_dim) features to align with (REPA), weighted by align -> scalar
    """
    B = len(x)
    t = torch.rand(B, device=x.device) if uniform_t else torch.randn(B, device=x.device).sigmoid()
    z = torch.randn_like(x)
    keep = torch.rand(B, device=x.device) >= drop
    s = None if s is None else s * keep[:, None]
    num_classes = getattr(model, "module", model).config.num_classes
    y = None if y is None else torch.where(keep & (y >= 0), y, num_classes)  # -1: without a label
    x_t, u = torch.lerp(z, x, t[:, None, None, None]), x - z
    v = model(x_t, t, s, y)
    v, tokens = v if isinstance(v, tuple) else (v, None)
    v = v.float()
    # written out, because F.cosine_similarity over channels takes a quarter of a step on a CPU
    cos = (v * u).sum(1) * (v.square().sum(1) * u.square().sum(1)).clamp_min(1e-8).rsqrt()
    loss = F.mse_loss(v, u) + 1 - cos.mean()
    if targets is not None:
        loss = loss - align * F.cosine_similarity(tokens.float(), targets, dim=-1).mean()
    return loss


def load_sit(source):
    """
    source: a checkpoint of train.py, path or loaded dict -> SiT of the EMA weights, in eval mode
    ValueError where keys or shapes do not fit.
    """
    ckpt = source if isinstance(source, dict) else torch.load(source, map_location="cpu", weights_only=True)
    try:
        model = SiT(SiTConfig(**ckpt["config"]))
        model.load_state_dict(ckpt["ema"])
    except (RuntimeError, TypeError) as e:
        raise ValueError(f"a checkpoint that does not fit this model: {e}") from e
    return model.eval()
