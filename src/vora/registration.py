"""Makes transformers' auto classes know VoRA, once transformers is there; `import vora` does not load it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"  # every auto class imports it
WATCHED = ("transformers", "peft", "vora")  # what `register` imports from


def register() -> None:
    """Enter VoRA's classes into the auto classes, and give them their constructors."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from vora.baselines.llava import VoraLlavaConfig, VoraLlavaForConditionalGeneration, VoraLlavaModel
    from vora.build.from_llm import from_llm, processor_from_llm, to_llm
    from vora.build.template_limits import install, limited
    from vora.model.configuration_vora import VoraConfig
    from vora.model.image_processing_vora import VoraImageProcessor
    from vora.model.modeling_vora import VoraForConditionalGeneration, VoraModel
    from vora.model.processing_vora import VoraProcessor

    for config, base, head in (
        (VoraConfig, VoraModel, VoraForConditionalGeneration),
        (VoraLlavaConfig, VoraLlavaModel, VoraLlavaForConditionalGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForImageTextToText.register(config, head, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes={"pil": VoraImageProcessor}, exist_ok=True)
        AutoProcessor.register(config, VoraProcessor, exist_ok=True)
    # set from outside: the construction of a model is no part of the code that ships with it
    VoraForConditionalGeneration.from_llm = staticmethod(from_llm)
    VoraForConditionalGeneration.to_llm = to_llm
    VoraProcessor.from_llm = staticmethod(processor_from_llm)
    install()
    if not hasattr(VoraProcessor.apply_chat_template, "__wrapped__"):
        setattr(VoraProcessor, "apply_chat_template", limited(VoraProcessor.apply_chat_template))


def register_when_needed() -> None:
    """Register now if transformers' auto classes are loaded, otherwise as soon as they are."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Registers at the end of the import that brought the auto classes, and takes itself away.

    These are often loaded in the middle of another import, of `modeling_utils` or of VoRA's own modules, whose names
    are not there yet: so registering waits until the outermost import is through.
    """

    def __init__(self) -> None:
        self.depth = 0  # imports of watched modules that have begun and not ended

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            # on the loader itself, which stays the one that `inspect` and `importlib.resources` know
            setattr(spec.loader, "exec_module", self._counted(spec.loader, spec.loader.exec_module))
        return spec

    def _counted(self, loader: object, exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def run(module: ModuleType) -> None:
            delattr(loader, "exec_module")
            self.depth += 1
            try:
                exec_module(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register()

        return run
