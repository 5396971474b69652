"""The families of models: which parts make each, and which sizes these generate together.

A family is found by the `_class_name` of its transformer's config.json, and only then are its modules imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .checkpoint.atomic import PREFIX
from .checkpoint.checkpoint import OWN_FILES, Checkpoint, Files
from .checkpoint.files import read_json
from .checkpoint.layout import Layout
from .checkpoint.names import class_of
from .config import SizeRule
from .errors import CheckpointError, ConfigError
from .models.architecture import Architecture
from .models.config import reading
from .models.meta_device import meta_device
from .sampling.scheduler import FILE, SCM, Scheduler, flux2_mu
from .stages.text import TextEncoder, TextStage
from .stages.text_encoders import Flux2Text, OpenUniText, QwenImageTokenizer, SanaText, SD3Text
from .stages.tokenizer import ChatTokenizer
from .stages.vae import VaeDecoder

Z_IMAGE_TOKENS = 1024  # of a prompt, as TwinFlow asks diffusers for; the released axes_lens leave room for 992
QWEN_IMAGE_DEFAULT = 83  # tokens per axis: 1328 pixels, the square that Qwen-Image was released for
QWEN_IMAGE_LARGEST = 256  # tokens per axis: 4096 pixels
CONNECTOR = "connector"  # OpenUni's folder, whose config.json names no kind
SPRINT_STEPS = 2  # evaluations that SANA-Sprint was published with
FLUX2_LARGEST = 256  # tokens per axis: 4096 pixels
SANA_LARGEST = 4096  # pixels per axis: the largest that SANA was published for


@dataclass(frozen=True)
class Family:
    """A family of models.

    config, network, layout: the velocity network's config class, class, and how its files are read. autoencoder: of the
    VAE. parts: it and the text encoders, by _class_name or model_type of their config.json. text(folder, config,
    files): opens the text stage of a model folder whose transformer has this config, unread. sizes(config, text, vae):
    the image sizes that the three make together; raises CheckpointError where they belong to different models. steps:
    evaluations that the ordinary model was published with. evenly, mu: see `Scheduler`.
    """

    name: str
    config: Any
    network: Any  # a subclass of VelocityNetwork
    layout: Layout
    autoencoder: Architecture
    parts: Mapping[str, Architecture]
    text: Callable[[Path, Any, Files], TextStage]
    sizes: Callable[[Any, Any, VaeDecoder], SizeRule]
    steps: int
    evenly: bool = False
    mu: Callable[[int, int], float] | None = None

    def build(self, config: Any, **options: Any) -> Any:
        """Return network(config, **options) on the meta device. Raises ConfigError for a config that builds none."""
        with reading("transformer/config.json"), meta_device():
            return self.network(config, **options)

    def scheduler(self, folder: Path, checkpoint: Checkpoint) -> Scheduler | None:
        """Return what samples the network in `checkpoint`, of a model folder, if it is an ordinary flow model, and say
        so in its config (`twinflow`); None for TwinFlow's: with a key of the second time embedder, in the folder's own
        files if `checkpoint` is of others, or called TwinFlow by folder, files, scheduler or config, unless the config
        says otherwise; SimpleTuner's, by `enable_time_sign_embed`, has no second embedder. With adapters it can be
        what upstream trains, so that it takes TwinFlow's samplers where those are asked for (`averaged_time`). Raises
        CheckpointError, ConfigError for a scheduler that is absent or another model's."""
        config, path = checkpoint.config, folder / FILE
        names, averaged = set(checkpoint), bool(checkpoint.loras)
        if checkpoint.files is not None:
            with suppress(CheckpointError):  # which need not be there
                names |= set(Checkpoint(folder / "transformer"))
        if any(name.startswith(self.network.second_embedder + ".") for name in names):
            return None
        if config.get("enable_time_sign_embed") is True:
            config["twinflow"] = False
            return None
        settings, said = read_json(path, infinite=True) if path.exists() else {}, config.get("twinflow")
        called = [folder.name.removeprefix(PREFIX), *(part for part in folder.parts if part.startswith("models--"))]
        called += [file.name for file in checkpoint.paths]
        called += [str(settings), str({key: value for key, value in config.items() if key != "twinflow"})]
        if said is not False and (said is not None or "twinflow" in str(called).lower()):
            return None
        config |= {"twinflow": False, "averaged_time": averaged}
        sprint = bool(config.get("guidance_embeds"))
        distilled = read_json(folder / "model_index.json").get("is_distilled") is True
        steps = SPRINT_STEPS if sprint else self.steps
        scheduler = Scheduler(settings or read_json(path), steps, self.evenly, self.mu, sprint or distilled)
        if (scheduler.kind == SCM) != sprint:
            raise ConfigError(f"{FILE} says _class_name {scheduler.kind}: {SCM} goes with SANA-Sprint, and it alone")
        return scheduler

    def open(
        self, folder: Path, raw: dict[str, Any], files: Files = OWN_FILES
    ) -> tuple[TextStage, VaeDecoder, SizeRule]:
        """Return text stage, VAE and sizes of a model folder whose transformer/config.json holds `raw`. Reads file
        headers, no weights. files: of networks that come from elsewhere. Raises CheckpointError, ConfigError."""
        config = self.config.from_dict(raw)
        with reading(f"{folder}: the parts' config.json"):
            text = self.text(folder, config, files)
            vae = VaeDecoder(folder / "vae", self.autoencoder, files)
            return text, vae, self.sizes(config, text, vae)


def must_equal(*pairs: tuple[str, int, str, int]) -> None:
    """Raise CheckpointError unless each (name, value, other name, value) agrees."""
    for name, value, other, wanted in pairs:
        if value != wanted:
            raise CheckpointError(
                f"{name} {value} does not fit the transformer's {other} {wanted}: parts of two models; "
                "download one whole"
            )


@cache
def z_image() -> Family:
    """Return the family of Z-Image: Qwen3 behind its chat template, AutoencoderKL (diffusers: ZImagePipeline)."""
    from .models.autoencoders import autoencoder_kl
    from .models.text_encoders import qwen3
    from .models.transformers.z_image import LAYOUT, SEQ_MULTIPLE, ZImageConfig, ZImageTransformer

    def text(folder: Path, config: ZImageConfig, files: Files) -> TextStage:
        positions = (config.axes_lens[0] - 2) // SEQ_MULTIPLE * SEQ_MULTIPLE  # of prompts, before the image's
        return TextEncoder(folder, qwen3.MODEL, ChatTokenizer, files, max_tokens=min(Z_IMAGE_TOKENS, positions))

    def sizes(config: ZImageConfig, text: TextStage, vae: VaeDecoder) -> SizeRule:
        """Latents are cut in 2x2 patches, and rope counts at most axes_lens[1] x axes_lens[2] of them. The default is
        the size that the VAE was trained at (`sample_size`): 1024 for Z-Image, 64 for the demo."""
        must_equal(
            ("text_encoder hidden_size", text.width, "cap_feat_dim", config.cap_feat_dim),
            ("vae latent_channels", vae.channels, "in_channels", config.in_channels),
        )
        multiple = 2 * vae.scale
        most = multiple * config.axes_lens[1], multiple * config.axes_lens[2]
        default = max(vae.config.sample_size // multiple, 1) * multiple
        return SizeRule(multiple, *most, default=min(default, *most))

    vae = autoencoder_kl.MODEL
    parts = {"qwen3": qwen3.MODEL, "AutoencoderKL": vae}
    return Family("z-image", ZImageConfig, ZImageTransformer, LAYOUT, vae, parts, text, sizes, steps=8, evenly=True)


@cache
def qwen_image() -> Family:
    """Return the family of Qwen-Image: Qwen2.5-VL's language model behind a fixed instruction, whose 34 tokens up to
    the prompt are left out of the embeddings, and AutoencoderKLQwenImage (diffusers: QwenImagePipeline)."""
    from .models.autoencoders import autoencoder_qwen
    from .models.text_encoders import qwen2_5_vl
    from .models.transformers.qwen_image import LAYOUT, QwenImageConfig, QwenImageTransformer

    def text(folder: Path, config: QwenImageConfig, files: Files) -> TextStage:
        return TextEncoder(folder, qwen2_5_vl.MODEL, QwenImageTokenizer, files, max_tokens=1024, dropped=34)

    def sizes(config: QwenImageConfig, text: TextStage, vae: VaeDecoder) -> SizeRule:
        """Latents are packed 2x2; positions are computed, so nothing but memory bounds a size."""
        must_equal(
            ("text_encoder hidden_size", text.width, "joint_attention_dim", config.joint_attention_dim),
            ("vae z_dim", vae.channels, "out_channels", config.out_channels),
        )
        multiple = 2 * vae.scale
        most = QWEN_IMAGE_LARGEST * multiple
        return SizeRule(multiple, most, most, default=QWEN_IMAGE_DEFAULT * multiple)

    vae = autoencoder_qwen.MODEL
    parts = {"qwen2_5_vl": qwen2_5_vl.MODEL, "AutoencoderKLQwenImage": vae}
    network = QwenImageTransformer
    return Family("qwen-image", QwenImageConfig, network, LAYOUT, vae, parts, text, sizes, steps=50, evenly=True)


@cache
def sd3() -> Family:
    """Return the family of Stable Diffusion 3.5: two CLIP towers, and T5 where the folder has it; AutoencoderKL
    (diffusers: StableDiffusion3Pipeline)."""
    from .models.autoencoders import autoencoder_kl
    from .models.text_encoders import clip_text, t5
    from .models.transformers.sd3 import LAYOUT, SD3Config, SD3Transformer

    def text(folder: Path, config: SD3Config, files: Files) -> SD3Text:
        return SD3Text(folder, clip_text.MODEL, t5.MODEL, config.joint_attention_dim, files)

    def sizes(config: SD3Config, text: SD3Text, vae: VaeDecoder) -> SizeRule:
        """Latents are cut in 2x2 patches, and the checkpoint has positions for so many of them."""
        must_equal(
            ("pooled width of text_encoder and text_encoder_2", text.pooled_width, "pooled_projection_dim",
             config.pooled_projection_dim),
            ("vae latent_channels", vae.channels, "in_channels", config.in_channels),
        )  # fmt: skip
        if text.t5_width is not None:
            must_equal(("text_encoder_3 d_model", text.t5_width, "joint_attention_dim", config.joint_attention_dim))
        if text.clip_width > config.joint_attention_dim:
            raise CheckpointError(
                f"the {text.clip_width} features of text_encoder and text_encoder_2 exceed the transformer's "
                f"joint_attention_dim {config.joint_attention_dim}: parts of two models"
            )
        most = config.pos_embed_max_size * 2 * vae.scale
        return SizeRule(2 * vae.scale, most, most, default=min(config.sample_size * vae.scale, most))

    parts = {"clip_text_model": clip_text.MODEL, "t5": t5.MODEL, "AutoencoderKL": autoencoder_kl.MODEL}
    return Family("sd3.5", SD3Config, SD3Transformer, LAYOUT, autoencoder_kl.MODEL, parts, text, sizes, steps=28)


@cache
def sana() -> Family:
    """Return the family of SANA and SANA-Sprint: Gemma 2 (diffusers: SanaPipeline), or where the folder has a connector
    OpenUni's InternVL3; AutoencoderDC."""
    from .models.autoencoders import autoencoder_dc
    from .models.text_encoders import gemma2, openuni
    from .models.transformers.sana import LAYOUT, SanaConfig, SanaTransformer

    def text(folder: Path, config: SanaConfig, files: Files) -> TextStage:
        if (folder / CONNECTOR).is_dir():
            return OpenUniText(folder, openuni.LANGUAGE, openuni.CONNECTOR, files)
        return SanaText(folder, gemma2.MODEL, files)

    def sizes(config: SanaConfig, text: TextStage, vae: VaeDecoder) -> SizeRule:
        """A latent is a token; its position is nowhere but in its neighbours, so nothing bounds a size."""
        must_equal(
            ("width of prompt embeddings", text.width, "caption_channels", config.caption_channels),
            ("vae latent_channels", vae.channels, "in_channels", config.in_channels),
        )
        return SizeRule(vae.scale, SANA_LARGEST, SANA_LARGEST, default=config.sample_size * vae.scale)

    parts = {"gemma2": gemma2.MODEL, "AutoencoderDC": autoencoder_dc.MODEL, CONNECTOR: openuni.CONNECTOR}
    parts |= {"qwen2": openuni.LANGUAGE, "internvl_chat": openuni.LANGUAGE}
    return Family("sana", SanaConfig, SanaTransformer, LAYOUT, autoencoder_dc.MODEL, parts, text, sizes, steps=20)


@cache
def flux2() -> Family:
    """Return the family of FLUX.2-klein: three states of Qwen3, AutoencoderKLFlux2 (diffusers: Flux2KleinPipeline)."""
    from .models.autoencoders import autoencoder_flux2
    from .models.text_encoders import qwen3
    from .models.transformers.flux2 import LAYOUT, Flux2Config, Flux2Transformer

    def text(folder: Path, config: Flux2Config, files: Files) -> Flux2Text:
        return Flux2Text(folder, qwen3.FLUX2, files)

    def sizes(config: Flux2Config, text: TextStage, vae: VaeDecoder) -> SizeRule:
        """A patch of 2x2 latents is a token; positions are computed, so nothing but memory bounds a size."""
        must_equal(
            ("width of prompt embeddings", text.width, "joint_attention_dim", config.joint_attention_dim),
            ("channels of a patch of vae latents", vae.channels, "in_channels", config.in_channels),
        )
        most = FLUX2_LARGEST * vae.scale
        return SizeRule(vae.scale, most, most, default=64 * vae.scale)

    vae = autoencoder_flux2.MODEL
    return Family(
        "flux2-klein", Flux2Config, Flux2Transformer, LAYOUT, vae, {"AutoencoderKLFlux2": vae}, text, sizes, steps=4,
        evenly=True, mu=flux2_mu,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Family]] = {
    "ZImageTransformer2DModel": z_image, "QwenImageTransformer2DModel": qwen_image, "SD3Transformer2DModel": sd3,
    "SanaTransformer2DModel": sana, "Flux2Transformer2DModel": flux2,
}  # fmt: skip


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a transformer's config.json content. Raises CheckpointError for any other."""
    name = config.get("_class_name")
    name = class_of(name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"transformer/config.json says _class_name {name!r}, which is none of the supported families: "
            + ", ".join(FAMILIES)
        )
    return FAMILIES[name]()


def parts_by_kind() -> dict[str, Architecture]:
    """Return the text encoders and autoencoders of all families, by _class_name or model_type of their config.json."""
    return {kind: part for family in FAMILIES.values() for kind, part in family().parts.items()}
