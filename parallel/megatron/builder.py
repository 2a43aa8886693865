"""Builder of Phi-4-Mini as a Megatron-core model for a layout.

Only this module uses GPTModel, which is deprecated upstream in favour of HybridModel. The rest of the project uses
`Model`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from phimini.model.config import ModelConfig
from phimini.model.reference import initial_weights
from phimini.parallel.attention.core import CoreAttention
from phimini.parallel.megatron.fp8 import (
    Fp8,
    check_alignment,
    is_fp8_layer,
    te_config_values,
)
from phimini.parallel.megatron.fp8_emulated import (
    Fp8ColumnParallelLinear,
    Fp8RowParallelLinear,
    emulated,
)
from phimini.parallel.megatron.hf_weights import from_hf
from phimini.parallel.megatron.layers import (
    ColumnParallelLinear,
    FusedLayer,
    FusedSelfAttention,
    HeadWeight,
    NoNorm,
    RMSNorm,
    RowParallelLinear,
    SwiGLU,
    defer_adds,
    provide_fused_wgrad,
)
from phimini.parallel.megatron.recompute import (
    RecomputedRMSNorm,
    RecomputedSwiGLU,
    forgetting,
    saving_its_input,
)
from phimini.parallel.megatron.refused_settings import refuse_unmarked_norms, refuse_wrong_settings
from phimini.parallel.ranks.world import World

Recompute = Literal["none", "full", "selective"]


def only_known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` without the fields that this version of megatron-core lacks."""
    known = {f.name for f in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in known}


@dataclasses.dataclass(frozen=True, slots=True)
class _Linears:
    """Classes for a layer's slots. Transformer Engine's column linears contain the norm before them."""

    column: Any
    row: Any
    norm: Any = RMSNorm
    activation: Any = SwiGLU

    def selectively_recomputed(self) -> "_Linears":
        if (
            self.norm is NoNorm
        ):  # Transformer Engine: a norm is inside its linear, which keeps its output in FP8
            return _Linears(self.column, saving_its_input(self.row), NoNorm, RecomputedSwiGLU)
        return _Linears(
            forgetting(self.column), forgetting(self.row), RecomputedRMSNorm, RecomputedSwiGLU
        )


def _linears(fp8: Fp8 | None, is_fp8_layer: bool) -> _Linears:
    if fp8 is None or (fp8.emulate and not is_fp8_layer):
        return _Linears(ColumnParallelLinear, RowParallelLinear)
    if fp8.emulate:
        return _Linears(emulated(Fp8ColumnParallelLinear, fp8.recipe), emulated(Fp8RowParallelLinear, fp8.recipe))  # fmt: skip
    # Every layer: outside Megatron's FP8 context (the first and last) they compute in bf16.
    from megatron.core.extensions.transformer_engine import (
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return _Linears(TELayerNormColumnParallelLinear, TERowParallelLinear, NoNorm)


def _layer_spec(linears: _Linears) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=linears.column,
        core_attention=CoreAttention,  # pyright: ignore[reportArgumentType]
        linear_proj=linears.row,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    return ModuleSpec(
        module=FusedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.norm,
            self_attention=ModuleSpec(
                module=FusedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            pre_mlp_layernorm=linears.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linears.column,
                    linear_fc2=linears.row,
                    activation_func=linears.activation,  # pyright: ignore[reportArgumentType]
                ),
            ),
        ),
    )


def _transformer_config(
    config: ModelConfig,
    world: World,
    dtype: torch.dtype,
    recompute: Recompute,
    fp8: Fp8 | None = None,
    distributed_optimizer: bool = False,
) -> TransformerConfig:
    layout = world.layout
    # Two sends and two receives between the same pair of ranks in one batch are silently matched wrongly.
    two_stages_interleaved = layout.pipeline == 2 and layout.virtual_pipeline > 1
    layers = layout.layers_of_chunks(config)
    values: dict[str, Any] = dict(
        num_layers=config.num_layers,
        hidden_size=config.model_dim,
        num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.mlp_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # despite the name: use the spec's activation module, here SwiGLU
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline
        if layout.virtual_pipeline > 1
        else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # from_hf writes the weights; this init only sets Megatron's attributes on them.
        use_cpu_initialization=world.device.type == "cpu",
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        calculate_per_token_loss=True,
        overlap_p2p_comm=two_stages_interleaved,
        batch_p2p_comm=not two_stages_interleaved,
        # gloo reads the memory of an overlapped send after the call; NCCL's streams keep it alive.
        deallocate_pipeline_outputs=layout.pipeline > 1
        and not (two_stages_interleaved and world.device.type == "cpu"),
        # Products add the weights' gradients to main_grad, Transformer Engine's too.
        gradient_accumulation_fusion=world.device.type == "cuda",
        # Megatron's torch.compile'd and CUDA extensions are not used.
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        cross_entropy_loss_fusion=False,
    )
    if len(set(layers)) > 1:
        rows = [["decoder"] * n for n in layers]
        rows[0].insert(0, "embedding")
        rows[-1].append("loss")
        values["pipeline_model_parallel_layout"] = rows
    if fp8 is not None and not fp8.emulate:
        values |= te_config_values(fp8, distributed_optimizer=distributed_optimizer)
    if recompute == "full":
        values |= dict(
            recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
        )
    return TransformerConfig(**only_known(TransformerConfig, values))


def _leave(weight: Tensor) -> Tensor:
    return weight


class PhiGPT(GPTModel):
    """GPTModel that ends at the hidden states, because the head is fused with the loss.

    Its last stage returns hidden_TD, gathered over sequence-parallel ranks. The gradient for hidden_TD is complete on
    each tensor-parallel rank, because the head sums the parts of its vocabulary rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer.__class__ = HeadWeight

    def _postprocess(self, hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        assert hidden_states is not None, "the decoder returned nothing"
        if not self.post_process:
            return hidden_states
        hidden_T1D: Tensor = self.output_layer(hidden_states)
        if not self.config.sequence_parallel:
            return hidden_T1D.squeeze(1)
        whole = gather_from_sequence_parallel_region(hidden_T1D, tensor_parallel_output_grad=False)
        assert whole is not None
        return whole.squeeze(1)

    @property
    def head_weight_VD(self) -> Tensor:
        """This tensor-parallel rank's rows of the vocabulary, on the last stage only."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        assert weight is not None, "this stage has no head"
        return weight


class Model:
    """This rank's part of the model: a chunk per virtual pipeline stage, each in Megatron's DDP if trainable."""

    def __init__(
        self,
        config: ModelConfig,
        world: World,
        transformer_config: TransformerConfig,
        chunks: Sequence[nn.Module],
    ) -> None:
        self.config = config
        self.world = world
        self.transformer_config = transformer_config
        self.chunks: Sequence[nn.Module] = chunks
        self.num_updates = 0
        """number of optimizer steps, for error messages"""
        self.latest_step: tuple[Sequence[Any], Callable[..., Any]] | None = None
        """micro-batches and loss of the last backward, for the search after a non-finite gradient"""

    @property
    def gpts(self) -> list[PhiGPT]:
        """The chunks without their DDP wrapper."""
        return [c.module if isinstance(c, DistributedDataParallel) else c for c in self.chunks]  # pyright: ignore[reportReturnType]

    @property
    def head_weight_VD(self) -> Tensor:
        """This tensor-parallel rank's rows of the output embedding, on the last stage only."""
        return self.gpts[-1].head_weight_VD

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (Megatron name, parameter) of this rank; names of chunk i begin with `chunks.i.`"""
        for i, gpt in enumerate(self.gpts):
            for name, parameter in gpt.named_parameters():
                yield f"chunks.{i}.{name}", parameter

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            if isinstance(chunk, DistributedDataParallel):
                chunk.zero_grad_buffer()


def build_model(
    config: ModelConfig,
    world: World,
    *,
    seed: int | None = 0,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    recompute: Recompute = "none",
    distributed_optimizer: bool = False,
    overlap: bool = False,
    fp8: Fp8 | None = None,
) -> Model:
    """Build this rank's part of the model.

    seed: draws the weights of `Phi4Mini.init_weights(seed)` at any layout; None leaves them uninitialised.
    trainable: False makes a frozen model without gradient buffers (a DPO reference).
    dtype: of the parameters; None is bf16 on CUDA, fp32 elsewhere. Gradients are summed in fp32.
    recompute: recompute in backward whole layers (`full`), or the outputs of norms and SwiGLU (`selective`).
    distributed_optimizer: reduce-scatter gradients, for an optimizer built with the same option (ZeRO-1).
    overlap: run gradient reduction (and ZeRO-1's parameter gather) during the computation.
    fp8: precision of the linears between the first and the last layer.

    Raises ValueError if the shards of the linears do not fit `fp8`.
    """
    if fp8 is not None:
        check_alignment(config, world.layout, fp8)
    if dtype is None:
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    transformer_config = _transformer_config(
        config, world, dtype, recompute, fp8, distributed_optimizer
    )
    refuse_wrong_settings(transformer_config)
    if transformer_config.gradient_accumulation_fusion:
        provide_fused_wgrad()
    virtual = world.layout.virtual_pipeline
    gpts: list[nn.Module] = [
        _build_chunk(config, world, transformer_config, i if virtual > 1 else None, fp8, recompute)
        for i in range(virtual)
    ]
    for gpt in gpts:
        refuse_unmarked_norms(transformer_config, gpt)
        gpt.requires_grad_(trainable)
        if world.device.type == "cuda":
            gpt.cuda()
    model = Model(config, world, transformer_config, gpts)
    if seed is not None:
        # Every rank draws all weights, one at a time, and keeps its shards, so that all layouts start equal.
        from_hf(model, initial_weights(config, seed))
    if trainable:
        ddp_values = dict(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            use_distributed_optimizer=distributed_optimizer,
            overlap_param_gather=overlap and distributed_optimizer,
            fp8_param_gather=transformer_config.fp8_param,
        )
        ddp_config = DistributedDataParallelConfig(
            **only_known(DistributedDataParallelConfig, ddp_values)
        )
        model.chunks = [
            DistributedDataParallel(transformer_config, ddp_config, gpt, disable_bucketing=i > 0)  # pyright: ignore[reportArgumentType]
            for i, gpt in enumerate(gpts)
        ]
        if overlap:
            no_sync = [chunk.no_sync for chunk in model.chunks]
            transformer_config.no_sync_func = no_sync if virtual > 1 else no_sync[0]  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _build_chunk(
    config: ModelConfig,
    world: World,
    transformer_config: TransformerConfig,
    vp_stage: int | None,
    fp8: Fp8 | None,
    recompute: Recompute,
) -> PhiGPT:
    num_layers = get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
    chunk = (vp_stage or 0) * world.layout.pipeline + world.pipeline_rank
    before = sum(world.layout.layers_of_chunks(config)[:chunk])
    linears = [
        _linears(fp8, is_fp8_layer(before + i, config.num_layers)) for i in range(num_layers)
    ]
    if recompute == "selective":
        linears = [some.selectively_recomputed() for some in linears]
    spec = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(some) for some in linears],
        layer_norm=RMSNorm,  # pyright: ignore[reportArgumentType]
    )
    gpt = PhiGPT(
        transformer_config,
        spec,  # pyright: ignore[reportArgumentType]
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=config.tie_embeddings,
        position_embedding_type="none",  # CoreAttention rotates
        vp_stage=vp_stage,
    )
    if recompute != "full":
        defer_adds(gpt.decoder.layers)
    return gpt
