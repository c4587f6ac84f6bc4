"""A processor and a model of a tiny LLM, as most tests of messages and images want them."""

import pytest
from messages import SIZES

from vora import VoraForConditionalGeneration, VoraProcessor


@pytest.fixture(scope="module")
def processor(llm_folder):
    return VoraProcessor.from_llm(llm_folder, **SIZES)


@pytest.fixture(scope="module")
def model(llm_folder):
    return VoraForConditionalGeneration.from_llm(llm_folder, **SIZES)
