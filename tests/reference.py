"""Naive float64 versions, written as loops over the published formulas, and what it means to agree with them."""

import math
from itertools import combinations

import torch

# --- Attention (Vaswani et al. 2017, equation 1) ---


def allowed_keys(query_length: int, padding_mask: torch.Tensor, is_causal: bool = True) -> torch.Tensor:
    """(B, T, S) of booleans: a query, the last of which is the newest token, sees the real keys not after it."""
    batch, key_length = padding_mask.shape
    allowed = torch.zeros(batch, query_length, key_length, dtype=torch.bool)
    for b in range(batch):
        for t in range(query_length):
            for s in range(key_length):
                is_past = s <= t + key_length - query_length
                allowed[b, t, s] = bool(padding_mask[b, s]) and (is_past or not is_causal)
    return allowed


def attention(query, key, value, allowed, scaling, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, T, H, K) and weights (B, H, T, S); a query that may attend to nothing gets zeros.

    Args:
        bias: (B, H, T, S), added to the scores.
    """
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, _ = query.shape
    if bias is None:
        bias = torch.zeros(batch, heads, length, key.shape[2])
    outputs, weights = [], []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                row = _attend_once(query[b, h, t], key[b, h], allowed[b, t], scaling, bias[b, h, t])
                weights.append(row)
                outputs.append(sum(row[s] * value[b, h, s] for s in range(len(row))))
    output = torch.stack(outputs).view(batch, heads, length, -1).transpose(1, 2)
    return output, torch.stack(weights).view(batch, heads, length, -1)


def _attend_once(query, keys, allowed, scaling, bias):
    scores = [query @ keys[s] * scaling + bias[s] for s in range(len(keys))]
    highest = max((score.item() for score, is_allowed in zip(scores, allowed, strict=True) if is_allowed), default=0.0)
    powers = [
        (score - highest).exp() if is_allowed else score * 0.0
        for score, is_allowed in zip(scores, allowed, strict=True)
    ]
    total = sum(powers)
    return torch.stack([power / total if allowed.any() else power for power in powers])


# --- Positions and activation ---


def sinusoids(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Vaswani et al. 2017, section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i / D)), PE(pos, 2i + 1) the cosine."""
    batch, length = position_ids.shape
    table = torch.zeros(batch, length, hidden_size, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            for i in range(hidden_size // 2):
                angle = position_ids[b, t].item() / 10000 ** (2 * i / hidden_size)
                table[b, t, 2 * i], table[b, t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def rotate(states: torch.Tensor, position_ids: torch.Tensor, theta: float) -> torch.Tensor:
    """RoFormer, equation 15, on (B, H, T, K): the plane of coordinates i and i + K/2 turns by pos · theta^(-2i / K)."""
    states = states.double()
    batch, heads, length, size = states.shape
    half = size // 2
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                x, pos = states[b, h, t], position_ids[b, t].item()
                angles = [pos * theta ** (-2 * i / size) for i in range(half)]
                rows += [x[i] * math.cos(angles[i]) - x[i + half] * math.sin(angles[i]) for i in range(half)]
                rows += [x[i] * math.sin(angles[i]) + x[i + half] * math.cos(angles[i]) for i in range(half)]
    return torch.stack(rows).view(batch, heads, length, size)


def relative_scores(query, key, query_positions, key_positions, distances, has_key_term, scaling) -> torch.Tensor:
    """What the vectors `distances` (2 M - 1, K) of the distances from -(M - 1) to M - 1 add to the scores (B, H, T, S).

    Shaw et al. 2018, equation 5: (q_i · k_j + q_i · a_ij) / sqrt(K), of which this is the second term; Huang et al.
    2020, method 4 (equation 13), adds k_j · a_ij to the numerator. Farther distances count as M - 1 (Shaw, equation 6).
    """
    query, key, distances = query.double(), key.double(), distances.double()
    batch, heads, length, _ = query.shape
    middle, scores = len(distances) // 2, []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                for j in range(key.shape[2]):
                    distance = query_positions[b, i].item() - key_positions[b, j].item()
                    a_ij = distances[middle + max(-middle, min(middle, distance))]
                    score = query[b, h, i] @ a_ij + (key[b, h, j] @ a_ij if has_key_term else 0.0)
                    scores.append(score * scaling)
    return torch.stack(scores).view(batch, heads, length, -1)


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """Hendrycks and Gimpel 2016: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# --- Losses: a sum over what counts, divided by `num_items` or by how many that was ---


def _mean(terms, num_items):
    return sum(terms) / (len(terms) if num_items is None else num_items)


def cross_entropy(logits, labels, num_items=None):
    """Of rows (N, V) with labels (N,); a label that is no class, like -100, is ignored."""
    logits = logits.double()
    kept = [n for n in range(len(labels)) if 0 <= labels[n] < logits.shape[-1]]
    return _mean([logits[n].exp().sum().log() - logits[n, labels[n]] for n in kept], num_items)


def smoothed_cross_entropy(logits, labels, num_items=None, label_smoothing=0.0, z_loss=0.0):
    """As `cross_entropy`, with a share of the target on every class, and the squared log-partition function."""
    logits, terms = logits.double(), []
    for n in range(len(labels)):
        if not 0 <= labels[n] < logits.shape[-1]:
            continue
        partition = logits[n].exp().sum().log()
        chances = [partition - logit for logit in logits[n]]
        spread = sum(chances) / len(chances)
        terms.append(
            (1 - label_smoothing) * chances[labels[n]] + label_smoothing * spread + z_loss * partition * partition
        )
    return _mean(terms, num_items)


def next_token_loss(logits, labels, num_items=None):
    """Of (B, T, V) with labels (B, T): position t predicts label t + 1."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items)


def squared_error(logits, labels, num_items=None):
    differences = logits.double().flatten() - labels.double().flatten()
    return _mean([difference**2 for difference in differences], num_items)


def binary_cross_entropy(logits, labels, num_items=None):
    chances = logits.double().flatten().sigmoid()
    labels = labels.double().flatten()
    return _mean([-y * p.log() - (1 - y) * (1 - p).log() for p, y in zip(chances, labels, strict=True)], num_items)


# --- Batches without padding ---


def real_places(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the ones of (B, T), row by row."""
    return [(b, t) for b in range(mask.shape[0]) for t in range(mask.shape[1]) if mask[b, t] != 0]


def documents(position_ids: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Places (row, column) of each document of (B, T): a new one at each row and where a position does not follow."""
    found = []
    for b in range(position_ids.shape[0]):
        for t in range(position_ids.shape[1]):
            if t == 0 or position_ids[b, t] != position_ids[b, t - 1] + 1:
                found.append([])
            found[-1].append((b, t))
    return found


def cost_of_groups(groups: list[list[int]], cost_of_a_call: int) -> int:
    """Of attention over groups of sequences, each padded to its longest: pairs of query and key, and calls."""
    return sum(len(group) * max(group) ** 2 + cost_of_a_call for group in groups)


def cheapest_grouping(lengths: list[int], most_groups: int, cost_of_a_call: int) -> int:
    """The least `cost_of_groups` of all ways to cut the sorted lengths into groups."""
    lengths, best = sorted(lengths), math.inf
    steps = [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    for count in range(min(most_groups, len(steps) + 1)):
        for cuts in combinations(steps, count):
            bounds = [0, *cuts, len(lengths)]
            groups = [lengths[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)]
            best = min(best, cost_of_groups(groups, cost_of_a_call))
    return best


# --- Products ---


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, I) · weight (I, O) + bias (O,), row by row."""
    rows = [sum(x[n, i].double() * weight[i].double() for i in range(x.shape[1])) for n in range(x.shape[0])]
    return torch.stack(rows) if bias is None else torch.stack(rows) + bias.double()


def best_fit(lengths: list[int], room: int) -> list[int]:
    """How full the rows are when each document, longest first, goes where it leaves least room."""
    rows = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i in range(len(rows)) if rows[i] + length <= room]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += length
        else:
            rows.append(length)
    return rows


# --- Agreement ---


def assert_near(actual, expected, tolerance: float = 1e-5, name: str = "", scale_floor: float = 1.0) -> None:
    """Within `tolerance` times the largest entry of `expected`, or times `scale_floor` where that is larger."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    bound = tolerance * max(scale_floor, expected.abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= bound, f"{name}: off by {error:.2e}, allowed {bound:.2e}"


def assert_gradients_near(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Gradients by parameter name, each within `tolerance` of its own largest entry.

    Some are zero in exact arithmetic (a bias that moves all logits of a softmax alike); of these only the rounding of
    the terms that cancel is left, which has the scale of the model's largest gradient: both sides must be as small.
    """
    assert actual.keys() == expected.keys()
    rounding = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.abs().max() <= rounding:
            assert actual[name].abs().max() <= rounding, f"{name}: {actual[name].abs().max():.2e} instead of zero"
        else:
            assert_near(actual[name], gradient, tolerance, name, scale_floor=0.0)


def gradients_of(model: torch.nn.Module, objective: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of `objective` by parameter name, for the parameters it reaches."""
    model.zero_grad()
    objective.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def at_real_positions(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What `output` (..., T, ...) holds where `mask` (..., T) is 1; an output a sequence, not a token, stays whole.

    Of attention maps (B, H, T, S) the rows of real queries are kept. Leading axes may be flattened in `output`.
    """
    flat = mask.flatten(end_dim=-2).bool()
    if output.ndim == 4 and output.shape[0] == len(flat) and output.shape[2] == flat.shape[1]:
        return output.transpose(1, 2)[flat]
    if output.shape[: mask.ndim] == mask.shape:
        return output[mask.bool()]
    return output[flat] if output.shape[:2] == flat.shape else output


def real_outputs(model: torch.nn.Module, inputs: dict, **kwargs) -> dict[str, torch.Tensor]:
    """The model's output tensors by name at the real positions of `inputs`, and tuples of them as `name.index`.

    With an image an output is of the text or of text and patches, all of which are real.
    """
    found, mask = {}, inputs["attention_mask"]
    for name, output in model(**inputs, **kwargs).items():
        items = enumerate(output) if isinstance(output, tuple) else [("", output)]
        for i, item in items:
            if isinstance(item, torch.Tensor):
                num_patches = item.shape[-2] - mask.shape[-1] if "pixel_values" in inputs and item.ndim > 2 else 0
                joined = torch.nn.functional.pad(mask, (0, max(num_patches, 0)), value=1)
                found[f"{name}.{i}" if i != "" else name] = at_real_positions(item, joined)
    return found


def assert_outputs_near(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys() and expected
    for name in expected:
        assert_near(actual[name], expected[name], tolerance, name)


def weighted_sum(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A number that depends on each entry of each output in its own way: an objective for models without a loss."""
    total = 0.0
    for output in outputs.values():
        weights = torch.arange(1.0, output.numel() + 1, device=output.device).sin()
        total += (output * weights.view_as(output)).sum()
    return total
