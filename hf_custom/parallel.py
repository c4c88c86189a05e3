"""What the host's tensor and pipeline parallelism does not know by itself: fused projections, and which models it fits.

A configuration says in `base_model_tp_plan` how each projection is divided: `colwise` by outputs, so that each process
computes some of the heads or of the inner units, `rowwise` by inputs, after which the processes' sums are added up
(Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

from torch import nn
from transformers import PreTrainedModel

# Of a fused projection whose outputs are [queries | keys | values], and of one with [keys | values].
FUSED_STYLES = {"fused_qkv_colwise": 3, "fused_kv_colwise": 2}
# Of an embedding that every head reads whole.
TABLE_STYLE = "whole_table"


def _register_styles():
    # Here and not above: torch and the host have these parts only where processes can be told apart.
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard
    from transformers.distributed.tensor_parallel import (
        ALL_PARALLEL_STYLES,
        PackedColwiseParallel,
        TensorParallelLayer,
    )

    class FusedColwiseParallel(PackedColwiseParallel):
        """Each process has its share of every part of a fused projection: of the weight and, unlike the host's style,
        of the bias, whose parts it divides as one."""

        def shard_param(self, module, param, mesh):
            whole = module._parameters.get(param)
            if whole is not None:
                placement = _StridedShard(dim=0, split_factor=self.split_factor)
                shard = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
                module._parameters[param] = nn.Parameter(shard, requires_grad=whole.requires_grad)

    class WholeTable(TensorParallelLayer):
        """Each process has all of it, and adds up what the heads of all of them add to its gradient."""

        def transform_output_post_forward(self, module, output, mesh):
            whole = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
            return whole.to_local(grad_placements=[Partial()])

    ALL_PARALLEL_STYLES.register(TABLE_STYLE, WholeTable())
    for name, parts in FUSED_STYLES.items():
        ALL_PARALLEL_STYLES.register(name, FusedColwiseParallel(split_factor=parts))


class Divisible:
    """Mixin of the models: `from_pretrained` refuses a division among processes that the model does not bear."""

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        if mesh_manager is not None:
            _check_tensor_parallel(model, distributed_config.tp_size)
            _check_pipeline(model, distributed_config.pp_size)
            if distributed_config.tp_size > 1:
                _register_styles()
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)


def _check_tensor_parallel(model: PreTrainedModel, tp_size: int) -> None:
    """Every part has projections that can be divided, and as many heads for each of `tp_size` processes."""
    if tp_size == 1:
        return
    for name, part in model.named_modules():
        if not isinstance(part, Divisible):
            continue
        config, where = part.config, f" of `{name}`" if name else ""
        if getattr(config, "projection_layout", "linear") != "linear":
            raise ValueError(
                f"tensor parallelism divides `nn.Linear`, but `projection_layout`{where} is "
                f"{config.projection_layout!r}. Set it to 'linear', by `from_pretrained(..., "
                "projection_layout='linear')` or, of a part, in its configuration; loading converts the weights."
            )
        heads = getattr(config, "num_attention_heads", tp_size)
        if heads % tp_size:
            field = config.attribute_map.get("num_attention_heads", "num_attention_heads")
            raise ValueError(
                f"`{field}`{where} is {heads}, which {tp_size} processes cannot share: `tp_size` has to divide it. "
                "Start another number of processes, or set `tp_size` in `DistributedConfig`."
            )


def _check_pipeline(model: PreTrainedModel, pp_size: int) -> None:
    """The host cuts a model at parts that it looks for by fixed names, whatever `base_model_pp_plan` says."""
    if pp_size > 1 and not hasattr(model.base_model, "layers"):
        raise ValueError(
            f"{type(model).__name__} cannot be cut into {pp_size} stages: Transformers cuts models whose parts are "
            "named `embed_tokens`, `layers` and `norm`. Set `pp_size=1`; `tp_size` divides the model otherwise."
        )


__all__ = ["FUSED_STYLES", "TABLE_STYLE", "Divisible"]
