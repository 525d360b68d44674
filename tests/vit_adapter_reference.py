"""A plain implementation of the ViT-Adapter's formulas, with loops, under the public code's names of weights.

It shares nothing with the package: deformable attention reads every point on its own, and blocks are timm's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def adapter_features(weights: dict[str, Tensor], vit, pixels: Tensor, num_heads: int) -> list[Tensor]:
    """Features of strides 4, 8, 16 and 32 of one image (1, 3, H, W), by timm's ViT and an adapter's weights."""
    maps = _spatial_prior(weights, pixels)
    sizes = [tuple(each.shape[-2:]) for each in maps[1:]]
    c = torch.cat([each[0].flatten(1).T + level for each, level in zip(maps[1:], weights["level_embed"], strict=True)])
    rows, columns = pixels.shape[-2] // 16, pixels.shape[-1] // 16
    tokens = vit._pos_embed(vit.patch_embed(pixels))
    prefix, x = tokens[:, :1], tokens[0, 1:]
    taps = []
    for index in range(4):
        name = f"interactions.{index}.injector."
        attended = _deformable(
            weights, f"{name}attn.", _norm(weights, f"{name}query_norm", x), _norm(weights, f"{name}feat_norm", c),
            [(rows, columns)], sizes, num_heads,
        )  # fmt: skip
        x = x + weights[f"{name}gamma"] * attended
        tokens = torch.cat([prefix, x[None]], dim=1)
        depth = len(vit.blocks) // 4
        for block in vit.blocks[index * depth : (index + 1) * depth]:
            tokens = block(tokens)
        prefix, x = tokens[:, :1], tokens[0, 1:]
        extractors = [f"interactions.{index}.extractor."]
        if index == 3:
            extractors += [f"interactions.3.extra_extractors.{number}." for number in (0, 1)]
        for name in extractors:
            c = c + _deformable(
                weights, f"{name}attn.", _norm(weights, f"{name}query_norm", c), _norm(weights, f"{name}feat_norm", x),
                sizes, [(rows, columns)], num_heads,
            )  # fmt: skip
            c = c + _mlp(weights, f"{name}ffn.", _norm(weights, f"{name}ffn_norm", c), sizes)
        taps.append(x.T.reshape(1, -1, rows, columns))
    parts = c.split([height * width for height, width in sizes])
    scales = [part.T.reshape(1, -1, *size) for part, size in zip(parts, sizes, strict=True)]
    finest = maps[0] + F.conv_transpose2d(scales[0], weights["up.weight"], weights["up.bias"], stride=2)
    features = []
    for number, (each, tap, factor) in enumerate(zip([finest, *scales], taps, (4, 2, 1, 0.5), strict=True), start=1):
        if factor != 1:
            tap = F.interpolate(tap, scale_factor=factor, mode="bilinear", align_corners=False)
        features.append(_batch_norm(weights, f"norm{number}", each + tap))
    return features


def _spatial_prior(weights: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    x = pixels
    for convolution, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.conv2d(x, weights[f"spm.stem.{convolution}.weight"], stride=stride, padding=1)
        x = _batch_norm(weights, f"spm.stem.{convolution + 1}", x).relu()
    maps = [F.max_pool2d(x, 3, stride=2, padding=1)]
    for number in (2, 3, 4):
        x = F.conv2d(maps[-1], weights[f"spm.conv{number}.0.weight"], stride=2, padding=1)
        maps.append(_batch_norm(weights, f"spm.conv{number}.1", x).relu())
    return [
        F.conv2d(each, weights[f"spm.fc{number}.weight"], weights[f"spm.fc{number}.bias"])
        for number, each in enumerate(maps, start=1)
    ]


def _deformable(weights, name, queries, values, query_sizes, value_sizes, num_heads) -> Tensor:
    """Each query reads 4 points of each map of values in each head, one at a time."""
    levels = len(value_sizes)
    values = F.linear(values, weights[f"{name}value_proj.weight"], weights[f"{name}value_proj.bias"])
    values = values.unflatten(1, (num_heads, -1))  # cells, heads, channels
    offsets = F.linear(queries, weights[f"{name}sampling_offsets.weight"], weights[f"{name}sampling_offsets.bias"])
    offsets = offsets.unflatten(1, (num_heads, levels, 4, 2))
    shares = F.linear(queries, weights[f"{name}attention_weights.weight"], weights[f"{name}attention_weights.bias"])
    shares = shares.unflatten(1, (num_heads, levels * 4)).softmax(-1).unflatten(2, (levels, 4))
    centres = [
        ((column + 0.5) / columns, (row + 0.5) / rows)
        for rows, columns in query_sizes
        for row in range(rows)
        for column in range(columns)
    ]
    out = torch.zeros(len(queries), num_heads, values.shape[2])
    for query, (x, y) in enumerate(centres):
        for head in range(num_heads):
            first = 0
            for level, (rows, columns) in enumerate(value_sizes):
                cells = values[first : first + rows * columns, head].unflatten(0, (rows, columns))
                first += rows * columns
                for point in range(4):
                    # In cells, of which the first has its centre at 0.
                    column = x * columns + float(offsets[query, head, level, point, 0]) - 0.5
                    row = y * rows + float(offsets[query, head, level, point, 1]) - 0.5
                    out[query, head] += shares[query, head, level, point] * _bilinear(cells, row, column)
    return F.linear(out.flatten(1), weights[f"{name}output_proj.weight"], weights[f"{name}output_proj.bias"])


def _bilinear(cells: Tensor, row: float, column: float) -> Tensor:
    """Value of a map (rows, columns, channels) between its cells; 0 outside."""
    total = torch.zeros(cells.shape[2])
    for r in (int(row // 1), int(row // 1) + 1):
        for c in (int(column // 1), int(column // 1) + 1):
            if 0 <= r < cells.shape[0] and 0 <= c < cells.shape[1]:
                total += (1 - abs(row - r)) * (1 - abs(column - c)) * cells[r, c]
    return total


def _mlp(weights, name, tokens, sizes) -> Tensor:
    hidden = F.linear(tokens, weights[f"{name}fc1.weight"], weights[f"{name}fc1.bias"])
    kernel, bias = weights[f"{name}dwconv.dwconv.weight"], weights[f"{name}dwconv.dwconv.bias"]
    maps = []
    for part, size in zip(hidden.split([rows * columns for rows, columns in sizes]), sizes, strict=True):
        each = F.conv2d(part.T.reshape(1, -1, *size), kernel, bias, padding=1, groups=len(kernel))
        maps.append(each[0].flatten(1).T)
    return F.linear(F.gelu(torch.cat(maps)), weights[f"{name}fc2.weight"], weights[f"{name}fc2.bias"])


def _norm(weights, name, tokens) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _batch_norm(weights, name, x) -> Tensor:
    parameters = [
        weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    ]
    mean, variance, scale, shift = parameters
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift
