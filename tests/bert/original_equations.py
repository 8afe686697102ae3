"""The original model's equations, written down once more from its specification alone.

Plain loops and explicit matrices over a state dict in the original's names: shares no code with the package, so that
an agreement between the two says something.
"""

import math

import torch


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, state, name, eps):
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(x, state, name):
    y = x @ state[f"{name}.weight"].t()
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def block_diagonal(x, state, name, out_features):
    weight = state[f"{name}.weight"]
    if weight.ndim == 2:
        return linear(x, state, name)
    blocks, _, in_block = weight.shape
    padded = torch.zeros(*x.shape[:-1], blocks * in_block, dtype=x.dtype)
    padded[..., : x.shape[-1]] = x
    parts = [padded[..., j * in_block : (j + 1) * in_block] @ weight[j].t() for j in range(blocks)]
    y = torch.cat(parts, -1)[..., :out_features]
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def filter_taps(state, name, network, length, config):
    x = state[f"{name}.pos_emb.z"][0, :length]
    for depth in (0, 2, 4):
        x = linear(x, state, f"{name}.{network}.{depth}")
        x = torch.sin(config["hyena_w_mod"] * state[f"{name}.{network}.{depth + 1}.freq"][0] * x)
    x = linear(x, state, f"{name}.{network}.6")
    decay = torch.exp(-state[f"{name}.pos_emb.t"][0, :length] * state[f"{name}.modulation.deltas"][0].abs())
    return x * decay


def long_convolution(x, state, name, config):
    length = x.shape[1]
    ahead = filter_taps(state, name, "implicit_filter", length, config)
    back = filter_taps(state, name, "implicit_filter_rev", length, config) if config["bidirectional"] else None
    y = state[f"{name}.bias"] * x
    for t in range(length):
        for s in range(length):
            if s <= t:
                y[:, t] += ahead[t - s] * x[:, s]
            elif back is not None:
                y[:, t] += back[s - t - 1] * x[:, s]
    return y


def mixer(u, state, name, config, ahead=0):
    if config["hyena_training_additions"]:
        u = layer_norm(u, state, f"{name}.layernorm", 1e-5)
    p = linear(u, state, f"{name}.in_linear")
    weight, s = state[f"{name}.short_filter.weight"][:, 0], torch.zeros_like(p) + state[f"{name}.short_filter.bias"]
    for t in range(p.shape[1]):
        for tap in range(3):
            if 0 <= t - 2 + tap + ahead < p.shape[1]:
                s[:, t] += weight[:, tap] * p[:, t - 2 + tap + ahead]
    width = u.shape[-1]
    x1, x2, v = s[..., :width], s[..., width : 2 * width], s[..., 2 * width :]
    y = long_convolution(v * x1, state, f"{name}.filter_fn", config) * x2
    if config["residual_long_conv"]:
        y = y + long_convolution(u, state, f"{name}.filter_fn2", config)
    return linear(y, state, f"{name}.out_linear")


def alibi_slopes(heads):
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(power) + alibi_slopes(2 * power)[0::2][: heads - power]


def attention(x, mask, state, name, config):
    heads, width, length = config["num_attention_heads"], x.shape[-1], x.shape[1]
    size = width // heads
    q, k, v = linear(x, state, f"{name}.self.Wqkv").split(width, -1)
    out = torch.zeros_like(x)
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None]).abs()
    for head, slope in enumerate(alibi_slopes(heads)):
        part = slice(head * size, (head + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size) - slope * distance
        scores = scores + (1 - mask[:, None, :]) * -9984.0
        out[..., part] = scores.softmax(-1) @ v[..., part]
    return layer_norm(
        linear(out, state, f"{name}.output.dense") + x, state, f"{name}.output.LayerNorm", config["layer_norm_eps"]
    )


def mlp(x, state, name, config):
    inner = config["intermediate_size"]
    wide = block_diagonal(x, state, f"{name}.gated_layers", 2 * inner if config["use_glu_mlp"] else inner)
    middle = gelu(wide[..., :inner]) * wide[..., inner:] if config["use_glu_mlp"] else gelu(wide)
    y = block_diagonal(middle, state, f"{name}.wo", x.shape[-1])
    return layer_norm(y + x, state, f"{name}.layernorm", config["layer_norm_eps"])


def encode(state, config, input_ids, mask, ahead=0):
    name = "bert.embeddings"
    h = state[f"{name}.word_embeddings.weight"][input_ids] + state[f"{name}.token_type_embeddings.weight"][0]
    if config["use_positional_encodings"]:
        h = h + state[f"{name}.position_embeddings.weight"][: input_ids.shape[1]]
    h = layer_norm(h, state, f"{name}.LayerNorm", config["layer_norm_eps"])
    mask = mask.to(h.dtype)
    for layer in range(config["num_hidden_layers"]):
        name = f"bert.encoder.layer.{layer}"
        if config["monarch_mixer_sequence_mixing"]:
            h = mixer(h, state, f"{name}.attention", config, ahead)
        else:
            h = attention(h, mask, state, f"{name}.attention", config)
        h = mlp(h, state, f"{name}.mlp", config)
    return h if config["monarch_mixer_sequence_mixing"] else h * mask[..., None]


def masked_lm_logits(state, config, input_ids, mask, ahead=0):
    """Logits; `ahead` is no part of the original: positions by which the mixers' short convolution is shifted."""
    h = encode(state, config, input_ids, mask, ahead)
    h = gelu(linear(h, state, "cls.predictions.transform.dense"))
    h = layer_norm(h, state, "cls.predictions.transform.LayerNorm", 1e-12)
    return h @ state["cls.predictions.decoder.weight"].t() + state["cls.predictions.decoder.bias"]


def classification_logits(state, config, input_ids, mask):
    h = encode(state, config, input_ids, mask)
    if config["use_cls_token"]:
        return linear(h[:, 0], state, "classifier")
    if config["pool_all"]:
        weights = mask.to(h.dtype)[..., None]
        pooled = (h * weights).sum(1) / weights.sum(1)
    else:
        pooled = h[:, 0]
    return linear(torch.tanh(linear(pooled, state, "bert.pooler.dense")), state, "classifier")
