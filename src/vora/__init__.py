"""Vision as LoRA: sight for language models without a vision encoder.

The public names are loaded when they are first used: `import vora` itself imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vora.registration import register_when_needed

if TYPE_CHECKING:
    from vora.build.from_llm import from_llm
    from vora.build.lora import attach_vision_lora, merge_vision_lora
    from vora.checkpoint.load import load_model
    from vora.checkpoint.reference import import_reference
    from vora.data.readers import load_source
    from vora.distill.blockwise import BlockwiseDistillation
    from vora.distill.objective import Objective
    from vora.distill.teacher import Teacher
    from vora.eval.run import evaluate
    from vora.model.configuration_vora import VoraConfig
    from vora.model.image_processing_vora import VoraImageProcessor
    from vora.model.modeling_vora import VoraForConditionalGeneration, VoraModel
    from vora.model.processing_vora import VoraProcessor
    from vora.train.recipe import load_recipe
    from vora.train.run import train

__version__ = "0.1.0"
__all__ = [
    "BlockwiseDistillation", "Objective", "Teacher", "VoraConfig", "VoraForConditionalGeneration",
    "VoraImageProcessor", "VoraModel", "VoraProcessor", "__version__", "attach_vision_lora", "evaluate", "from_llm",
    "import_reference", "load_model", "load_recipe", "load_source", "merge_vision_lora", "train",
]  # fmt: skip

_MODULES = {
    "vora.build.from_llm": ["from_llm"],
    "vora.build.lora": ["attach_vision_lora", "merge_vision_lora"],
    "vora.checkpoint.load": ["load_model"],
    "vora.checkpoint.reference": ["import_reference"],
    "vora.data.readers": ["load_source"],
    "vora.distill.blockwise": ["BlockwiseDistillation"],
    "vora.distill.objective": ["Objective"],
    "vora.distill.teacher": ["Teacher"],
    "vora.eval.run": ["evaluate"],
    "vora.model.configuration_vora": ["VoraConfig"],
    "vora.model.image_processing_vora": ["VoraImageProcessor"],
    "vora.model.modeling_vora": ["VoraForConditionalGeneration", "VoraModel"],
    "vora.model.processing_vora": ["VoraProcessor"],
    "vora.train.recipe": ["load_recipe"],
}


def __getattr__(name: str) -> Any:
    if name == "train":  # the function and the package of this name are one: see there
        return import_module("vora.train")
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'vora' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_needed()
