"""Vision as LoRA: sight for language models without a vision encoder."""

from vora.threads import settle_threads

settle_threads()

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from vora.adapt.llava import VoraLlavaConfig, VoraLlavaForConditionalGeneration, VoraLlavaModel
from vora.adapt.lora import attach_vision_lora, merge_vision_lora
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
