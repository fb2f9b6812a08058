from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# before numpy is imported: on matrices as small as these its threads spend their time waiting, and ours with them
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# before anything imports llama_cpp: it loads the library that llama_cpp then uses
import refreekv_cpp  # noqa: F401, I001
from refreekv_cpp._cache_dir import VARIABLE, cache_dir
from tiny_architectures import tiny_models

# the one of the person who runs the tests, where the real model stays from one run to the next
_USERS_CACHE = cache_dir()

# the steps of each state machine: by default the same ones in every run
_stateful = {"stateful_step_count": 40, "deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=8, derandomize=True, database=None, **_stateful)
settings.register_profile("long", max_examples=125, print_blob=True, **_stateful)
settings.load_profile("short")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cold stores are not left in the user's folders, nor taken from there."""
    os.environ[VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _away_from_the_sources(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that tests start import the package that is installed, not the folder of a clone."""
    os.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The GGUF of a model in `TINY_MODELS` or `ARCHITECTURES`, by its name; written when first asked for."""
    return tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny: Callable[[str], Path]) -> Path:
    """The GGUF of the tiny model that most tests run."""
    return tiny("gqa")


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The real model of tests marked `model`."""
    from refreekv_cpp.default_model import default_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(_USERS_CACHE))
        return default_model()
