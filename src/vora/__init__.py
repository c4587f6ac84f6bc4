"""Vision as LoRA: sight for language models without a vision encoder."""

from vora.cpu_threads import configure_cpu_threads

configure_cpu_threads()

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from vora.baselines.llava import VoraLlavaConfig, VoraLlavaForConditionalGeneration, VoraLlavaModel
from vora.build.from_llm import from_llm, processor_from_llm, to_llm
from vora.build.lora import attach_vision_lora, merge_vision_lora
from vora.distill.teacher import Teacher
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration, VoraModel
from vora.model.processing_vora import VoraProcessor

__version__ = "0.1.0"
__all__ = [
    "Teacher",
    "VoraConfig",
    "VoraForConditionalGeneration",
    "VoraImageProcessor",
    "VoraModel",
    "VoraProcessor",
    "attach_vision_lora",
    "from_llm",
    "merge_vision_lora",
]

AutoConfig.register("vora", VoraConfig, exist_ok=True)
AutoModel.register(VoraConfig, VoraModel, exist_ok=True)
AutoModelForImageTextToText.register(VoraConfig, VoraForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(VoraConfig, image_processor_classes={"pil": VoraImageProcessor}, exist_ok=True)
AutoProcessor.register(VoraConfig, VoraProcessor, exist_ok=True)

AutoConfig.register("vora_llava", VoraLlavaConfig, exist_ok=True)
AutoModel.register(VoraLlavaConfig, VoraLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(VoraLlavaConfig, VoraLlavaForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(VoraLlavaConfig, image_processor_classes={"pil": VoraImageProcessor}, exist_ok=True)
AutoProcessor.register(VoraLlavaConfig, VoraProcessor, exist_ok=True)

# construction is not part of what ships; these names of before are set here
VoraForConditionalGeneration.from_llm = staticmethod(from_llm)
VoraForConditionalGeneration.to_llm = to_llm
VoraProcessor.from_llm = staticmethod(processor_from_llm)
