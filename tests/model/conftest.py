"""A model of a tiny LLM, as most tests of messages and images want it."""

import pytest
from messages import SIZES

from vora import VoraForConditionalGeneration


@pytest.fixture(scope="module")
def model(llm_folder):
    return VoraForConditionalGeneration.from_llm(llm_folder, **SIZES)
