"""Convert config.json of a Hugging Face model to a GPTShape."""

from __future__ import annotations

from pathlib import Path

from megaphase.convert.hugging_face.config_file import CONFIG_FILE, ConfigFile
from megaphase.convert.hugging_face.families import FAMILIES
from megaphase.convert.hugging_face.family import Family
from megaphase.model.shape import GPTShape

# What models of unknown types with these keys are.
_OTHER_KINDS = {
    "kv_lora_rank": ", multi-head latent attention",
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts"), ", a mixture of experts"
    ),
}
# Types of models that take images too, and that of the family's models of text alone.
_WITH_IMAGES = {"gemma3": "gemma3_text"}


def read_config(directory: Path) -> tuple[Family, GPTShape]:
    """Return the family and the shape of the model in a directory.

    Raises:
        InputError: there is no config.json, or it has an unsupported key or value; names the key.
    """
    config = ConfigFile(directory / CONFIG_FILE)
    if config.get("quantization_config") is not None:
        remedy = "use the model's unquantized weights"
        raise config.refusal("quantization_config", "the weights are quantized", remedy)
    if config.get("auto_map") is not None:
        raise config.refusal("auto_map", "names custom code")
    model_type = config.get("model_type")
    family = next((each for each in FAMILIES if each.model_type == model_type), None)
    if family is None:
        if model_type in _WITH_IMAGES:
            problem = f"is {model_type!r}, a model with images"
            text = _WITH_IMAGES[model_type]
            remedy = f"megaphase reads the models of text alone, whose model_type is {text}"
            raise config.refusal("model_type", problem, remedy)
        known = ", ".join(each.model_type for each in FAMILIES)
        kind = next((what for key, what in _OTHER_KINDS.items() if config.get(key)), "")
        raise config.refusal("model_type", f"is {model_type!r}{kind}; known are {known}")
    shape = family.shape(config)
    config.refuse_others(family.harmless)
    return family, _checked(config, shape)


def _checked(config: ConfigFile, shape: GPTShape) -> GPTShape:
    """Reject inconsistent sizes."""
    if shape.head_dim is None and shape.hidden % shape.heads:
        problem = f"{shape.heads} heads do not divide the hidden size, {shape.hidden}"
    elif shape.heads % shape.kv_heads:
        problem = f"{shape.kv_heads} heads of keys and values do not divide {shape.heads} heads"
    elif shape.position == "rotary" and shape.rotary_size % 2:
        problem = f"a head of {shape.head_size} numbers cannot be rotated in pairs"
    else:
        return shape
    raise config.refusal("num_attention_heads", problem, "copy the model again")
