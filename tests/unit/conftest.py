"""Tiny bases and an adapter that the tests of adapters share."""

from __future__ import annotations

import pytest

from hetcomp.adapters.base_model import BaseModel, import_base
from tests.reference.peft_adapters import everything, make_adapter
from tests.reference.tiny_models import build, save_tiny


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folder, base model and parameters of a tiny model; made once."""
    made = {}

    def get(family: str, odd: bool = False):
        if (family, odd) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{odd}") / "hf"
            model = save_tiny(family, folder, odd=odd)
            parameters = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            made[family, odd] = folder, BaseModel.of(import_base(folder)), parameters
        return made[family, odd]

    return get


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """An adapter of everything in a Qwen3-MoE, for tests that damage copies of it."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    make_adapter(build("qwen3_moe"), folder, **everything("qwen3_moe"))
    return folder
