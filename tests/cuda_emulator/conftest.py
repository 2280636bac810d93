import shutil

import pytest

from tests.cuda_emulator.emulated import Emulated, build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if shutil.which("c++") is None:
        pytest.skip("no c++ on the path")
    return Emulated(build(tmp_path_factory.mktemp("emulated")))
