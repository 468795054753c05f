import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side, one a core; on tiny models threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from luthier.cached import cache_folder


def _own_cache() -> None:
    """Rows that tests prepare go into a cache of their own; downloads stay where they are."""
    real, own = cache_folder().absolute(), Path(tempfile.mkdtemp(prefix="luthier-tests-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    for name in ("bases", "downloads"):
        (real / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(real / name)
    os.environ["LUTHIER_CACHE"] = str(own)


_own_cache()

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Public data and gold values kept beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED
