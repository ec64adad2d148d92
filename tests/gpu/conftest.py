"""Everything in this folder needs an NVIDIA GPU and skips, with the reason, where torch finds none."""

from __future__ import annotations

import pytest
import torch

from pipeline.devices.environment import probe_model
from pipeline.devices.session import PROVIDERS, open_session
from pipeline.errors import ProviderError


@pytest.fixture(autouse=True)
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return "cuda"


@pytest.fixture(params=["cuda", "tensorrt"])
def provider(request: pytest.FixtureRequest, gpu: str) -> str:
    """Short names of the providers that really open here."""
    name = str(request.param)
    try:
        open_session(probe_model(), provider=PROVIDERS[name])
    except ProviderError as refused:
        pytest.skip(str(refused))
    return name
