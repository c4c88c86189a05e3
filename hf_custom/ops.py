"""Pure functions of tensors that the models share: heads and positions.

Shape letters, here and in every file: B batch, T query length, S key length, D hidden size, H heads, K head size,
V vocabulary.
"""

import torch


def is_traced() -> bool:
    """Whether a compiler or a transform of `torch.func` runs the code, for which only torch's own operators will do."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def split_heads(hidden_states: torch.Tensor, head_size: int) -> torch.Tensor:
    """(B, T, H·K) -> (B, H, T, K)."""
    return hidden_states.unflatten(-1, (-1, head_size)).transpose(1, 2)


def merge_heads(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, T, H, K) -> (B, T, H·K), the order in which the attention functions of the host return heads."""
    return hidden_states.flatten(2)


def keep_positions(hidden_states: torch.Tensor, positions_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Some positions of (B, T, D), as the host's `logits_to_keep` names them.

    Args:
        positions_to_keep: how many of the last (0: all); or indices (N,) for every row, or (B, N) for each, giving
            (B, N, D); or a boolean mask (B, T), giving (number of true, D).
    """
    if isinstance(positions_to_keep, int):
        return hidden_states[:, -positions_to_keep:] if positions_to_keep else hidden_states
    if positions_to_keep.dtype == torch.bool:
        return hidden_states[positions_to_keep]
    if positions_to_keep.ndim == 2:
        return hidden_states.take_along_dim(positions_to_keep[..., None], dim=1)
    return hidden_states[:, positions_to_keep]


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number the attended tokens of each row of a 0/1 mask (B, S) from 0; padding gets 0. Returns (B, S)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def padding_of(attention_mask: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """Where a batch of `shape` (..., T) is padding, as booleans; `None` for a mask that is no 0/1 mask (..., S)."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim not in (2, 3):
        return None
    return (attention_mask[..., -shape[-1] :] == 0).reshape(shape)


def first_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index (...) of the leftmost attended token of each row of a 0/1 mask (..., S)."""
    return attention_mask.to(torch.int32).argmax(-1)


def last_attended(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index (...) of the rightmost attended token of each row of a 0/1 mask (..., S), for left and right padding."""
    columns = torch.arange(attention_mask.shape[-1], device=attention_mask.device, dtype=torch.int32)
    return (columns * attention_mask.to(torch.int32)).argmax(-1)


def _angles(position_ids: torch.Tensor, size: int, base: float) -> torch.Tensor:
    """position · base^(-2i / size) for i < size / 2, in float32: (B, T) -> (B, T, size / 2)."""
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
    return position_ids[..., None].float() * base**-exponents


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Fixed position vectors, sines in the even and cosines in the odd coordinates: (B, T) -> (B, T, D).

    Vaswani et al. 2017, "Attention Is All You Need", section 3.5.
    """
    angles = _angles(position_ids, hidden_size, 10_000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rotary_positions(position_ids: torch.Tensor, head_size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles, each (B, 1, T, K): one head axis to broadcast over.

    Su et al. 2021, "RoFormer", equation 15, with coordinate i paired with i + K/2 as in the host's rotary models.
    """
    angles = _angles(position_ids, head_size, theta)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos(), angles.sin()


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (B, H, T, K) by their positions, in float32, and return their type."""
    first, second = states.float().chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (states.float() * cos + rotated * sin).to(states.dtype)


def relative_position_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    distances: torch.Tensor,
    has_key_term: bool,
    scaling: float,
) -> torch.Tensor:
    """What relative positions add to the scores of attention: (B, H, T, S).

    q_i · a_(i-j), the second term of Shaw et al. 2018, "Self-Attention with Relative Position Representations",
    equation 5; with `has_key_term` also k_j · a_(i-j) (Huang et al. 2020, equation 13); each times `scaling`.

    Args:
        query: (B, H, T, K); `key`: (B, H, S, K).
        query_positions: (B, T) or (1, T); `key_positions`: (B, S) or (1, S).
        distances: (2 · M - 1, K), a vector for each distance from -(M - 1) to M - 1; farther ones have the last.
    """
    index = query_positions[:, :, None] - key_positions[:, None, :] + len(distances) // 2  # (B, T, S)
    # Where columns stand for positions, padding and the empty slots of a cache may be farther; masks hide them.
    index = index.clamp(0, len(distances) - 1)
    if index.device.type == "cpu" and not is_traced():
        # Of a table for long texts, short ones need the middle.
        low, high = (int(bound) for bound in torch.aminmax(index))
        index, distances = index - low, distances[low : high + 1]
    shape = (*query.shape[:3], key.shape[2])
    index = index[:, None]
    scores = (query @ distances.t()).gather(-1, index.expand(shape))
    if has_key_term:
        by_key = (key @ distances.t()).gather(-1, index.transpose(-1, -2).expand(*shape[:2], shape[3], shape[2]))
        scores = scores + by_key.transpose(-1, -2)
    return scores * scaling
