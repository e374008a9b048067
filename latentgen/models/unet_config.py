"""The UNet's configuration: diffusers' `unet/config.json`, and the geometry that follows from it."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, model_validator

from latentgen.models.config import StageConfig, check_size

# Four times the largest UNet that the library knows (SDXL base, 2.6e9): more is a mistake or an attack.
MAX_PARAMETERS = 10**10
# Over ten times SDXL's 70. Each is some 20 modules, which take time and memory to build however small they are.
MAX_TRANSFORMER_BLOCKS = 1000

T = TypeVar("T")

Channels = Annotated[int, Field(ge=1, le=16384)]
Size = Annotated[int, Field(ge=1, le=65536)]
Layers = Annotated[int, Field(ge=1, le=16)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Depth = Annotated[int, Field(ge=1, le=64)]
DownBlock = Literal["CrossAttnDownBlock2D", "DownBlock2D"]
UpBlock = Literal["CrossAttnUpBlock2D", "UpBlock2D"]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]


class UNetStage(NamedTuple):
    """One resolution of the UNet: what its down block and its up block are made of.

    `down` and `up` hold (channels in, channels out) of each resnet block, in the order of the forward pass.
    """

    channels: int
    heads: int
    depth: int
    only_cross_attention: bool
    down: tuple[tuple[int, int], ...]
    down_attention: bool
    up: tuple[tuple[int, int], ...]
    up_attention: bool


class UNetConfig(StageConfig):
    """A diffusers `unet/config.json`. Where a field's type allows a single value, others are not implemented.

    Covers SD 1.x and 2.x, SDXL base and refiner, inpainting, instruct-pix2pix, the x4 upscaler, class labels
    (`num_class_embeds`), a continuous scalar (`class_embed_type="timestep"`), FiLM resnet blocks
    (`resnet_time_scale_shift="scale_shift"`) and latent consistency models (`time_cond_proj_dim`).
    `attention_head_dim` is, as in the files, the number of heads.
    """

    diffusers_class: ClassVar[str] = "UNet2DConditionModel"

    sample_size: Size | tuple[Size, Size] | None = None
    in_channels: Channels = 4
    out_channels: Channels = 4
    center_input_sample: Literal[False] = False
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Field(ge=0, le=1)] = 0
    down_block_types: tuple[DownBlock, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[UpBlock, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: Annotated[tuple[Channels, ...], Field(min_length=1, max_length=8)] = (
        320,
        640,
        1280,
        1280,
    )
    layers_per_block: Layers | tuple[Layers, ...] = 2
    downsample_padding: Annotated[int, Field(ge=0, le=1)] = 1
    mid_block_scale_factor: One = 1
    dropout: Zero = 0
    act_fn: Literal["silu"] = "silu"
    norm_num_groups: Annotated[int, Field(ge=1, le=1024)] = 32
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    cross_attention_dim: Channels = 1280
    transformer_layers_per_block: Depth | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: Heads | tuple[Heads, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: Literal[False] = False
    use_linear_projection: bool = False
    class_embed_type: Literal["timestep", "identity", "projection"] | None = None
    addition_embed_type: Literal["text_time"] | None = None
    addition_time_embed_dim: Channels | None = None
    num_class_embeds: Annotated[int, Field(ge=1, le=10**6)] | None = None
    # Kept for diffusers; here every attention kernel accumulates its softmax in float32.
    upcast_attention: bool | None = False
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    resnet_skip_time_act: Literal[False] = False
    resnet_out_scale_factor: One = 1
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: Annotated[int, Field(ge=4, le=16384)] | None = None
    conv_in_kernel: Literal[3] = 3
    conv_out_kernel: Literal[3] = 3
    projection_class_embeddings_input_dim: Channels | None = None
    attention_type: Literal["default"] = "default"
    class_embeddings_concat: Literal[False] = False
    mid_block_only_cross_attention: Literal[False] | None = None
    cross_attention_norm: None = None
    # Read by diffusers only for an addition_embed_type that is refused above.
    addition_embed_type_num_heads: Heads = 64

    @property
    def time_embed_dim(self) -> int:
        """Channels of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def spatial_factor(self) -> int:
        """Latent pixels at the input per pixel at the lowest resolution, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def stages(self) -> tuple[UNetStage, ...]:
        """The resolutions, highest first."""
        channels, count = self.block_out_channels, len(self.block_out_channels)
        layers = _per_stage(self.layers_per_block, count)
        heads = _per_stage(self.attention_head_dim, count)
        depths = _per_stage(self.transformer_layers_per_block, count)
        only_cross = _per_stage(self.only_cross_attention, count)
        # Channels of the resnet blocks on the way down, each of which leaves a skip connection for the way up.
        down = [
            tuple(pairwise((inputs, *(outputs,) * depth)))
            for inputs, outputs, depth in zip((channels[0], *channels), channels, layers, strict=False)
        ]
        skips = [channels[0]]
        for i in range(count):
            skips += [channels[i]] * (layers[i] + (i < count - 1))
        up, width = {}, channels[-1]
        for i in reversed(range(count)):
            widths = (width, *(channels[i],) * layers[i])
            up[i] = tuple((inputs + skips.pop(), channels[i]) for inputs in widths)
            width = channels[i]
        return tuple(
            UNetStage(
                channels=channels[i],
                heads=heads[i],
                depth=depths[i],
                only_cross_attention=only_cross[i],
                down=down[i],
                down_attention=self.down_block_types[i] == "CrossAttnDownBlock2D",
                up=up[i],
                up_attention=self.up_block_types[-1 - i] == "CrossAttnUpBlock2D",
            )
            for i in range(count)
        )

    @cached_property
    def is_sdxl(self) -> bool:
        """Whether the UNet takes SDXL's added conditioning: pooled embeddings and time ids."""
        return self.addition_embed_type is not None

    def time_id_count(self, pooled_width: int) -> int:
        """The number of time ids that the UNet takes; 0 without added conditioning, -1 if the widths do not match."""
        width, embed_dim = self.projection_class_embeddings_input_dim, self.addition_time_embed_dim
        if not self.is_sdxl:
            return 0
        assert width is not None
        assert embed_dim is not None
        numbers, rest = divmod(width - pooled_width, embed_dim)
        return numbers if rest == 0 else -1

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        self._check_lengths()
        stages, groups = self.stages, self.norm_num_groups
        for stage in stages:
            if stage.channels % groups:
                raise ValueError(
                    f"block_out_channels: {stage.channels} is not a multiple of norm_num_groups {groups}"
                )
            in_middle = self.mid_block_type is not None and stage is stages[-1]
            attends = stage.down_attention or stage.up_attention or in_middle
            if attends and stage.channels % stage.heads:
                raise ValueError(
                    f"attention_head_dim: {stage.heads} heads do not divide the {stage.channels} channels"
                )
        if self.block_out_channels[0] // 2 <= self.freq_shift:
            raise ValueError(
                f"block_out_channels: {self.block_out_channels[0]} is too few for a time embedding"
            )
        self._check_conditioning()
        self._check_size()
        return self

    def _check_lengths(self) -> None:
        count = len(self.block_out_channels)
        names = ("down_block_types", "up_block_types", "layers_per_block", "attention_head_dim")
        for name in (*names, "transformer_layers_per_block", "only_cross_attention"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(f"{name}: {len(value)} entries for the {count} block_out_channels")

    def _check_conditioning(self) -> None:
        width = self.projection_class_embeddings_input_dim
        if self.class_embed_type == "projection" and width is None:
            raise ValueError(
                "projection_class_embeddings_input_dim is required by class_embed_type projection"
            )
        if self.addition_embed_type == "text_time" and None in (width, self.addition_time_embed_dim):
            raise ValueError(
                "addition_embed_type text_time requires addition_time_embed_dim and "
                "projection_class_embeddings_input_dim"
            )

    def _check_size(self) -> None:
        """Limit the number of transformer blocks and parameters; biases, norms and time embedding are not counted."""
        resnets = [pair for stage in self.stages for pair in (*stage.down, *stage.up)]
        transformers = [
            stage
            for stage in self.stages
            for attends, pairs in ((stage.down_attention, stage.down), (stage.up_attention, stage.up))
            if attends
            for _ in pairs
        ]
        if self.mid_block_type is not None:
            transformers.append(self.stages[-1])
            resnets += [(self.stages[-1].channels,) * 2] * 2
        if (blocks := sum(stage.depth for stage in transformers)) > MAX_TRANSFORMER_BLOCKS:
            raise ValueError(
                f"transformer_layers_per_block: the model would have {blocks:,} transformer blocks; "
                f"at most {MAX_TRANSFORMER_BLOCKS:,} are allowed"
            )
        parameters = self.time_embed_dim * (self.num_class_embeds or 0)
        parameters += sum(9 * outputs * (inputs + outputs) for inputs, outputs in resnets)
        parameters += sum(_transformer_size(stage, self.cross_attention_dim) for stage in transformers)
        check_size(parameters, MAX_PARAMETERS)


def _per_stage(value: T | tuple[T, ...], count: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * count


def _transformer_size(stage: UNetStage, context: int) -> int:
    """Projections in and out; in each block two attentions and a feed-forward of 4 times the width, gated."""
    width = stage.channels
    return 2 * width**2 + stage.depth * width * (18 * width + 2 * context)
