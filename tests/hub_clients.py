"""The client libraries of this process, pointed at the tests' Hub."""

import importlib
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.hub_server import HubServer


@contextmanager
def connected(hub: HubServer):
    """Send the clients to the server, with an empty cache and without waiting between attempts; then back again.

    They read the environment when they are imported, so their constants are computed anew from the changed environment.
    `hub.waits` collects the seconds they meant to wait.
    """
    import datasets.config
    import transformers.dynamic_module_utils
    from huggingface_hub import HfFileSystem, constants, file_download, hf_api
    from huggingface_hub.utils import _detect_agent, _http, close_session

    def anew():
        close_session()
        importlib.reload(constants)
        importlib.reload(datasets.config)
        HfFileSystem.clear_instance_cache()

    environment, modules = hub.environment(), set(sys.modules)
    clock = SimpleNamespace(**{**vars(time), "sleep": hub.waits.append})
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            anew()
            patch.setattr(hf_api.api, "endpoint", hub.url)
            patch.setattr(hf_api.api, "_whoami_cache", {})
            patch.setattr(transformers.utils.hub, "_hf_api", None)
            patch.setattr(_detect_agent, "_registry", None)
            for module in (_http, file_download):
                patch.setattr(module, "time", clock)
            for module in (transformers.utils, transformers.utils.hub, transformers.dynamic_module_utils):
                patch.setattr(module, "HF_MODULES_CACHE", str(Path(environment["HF_HOME"]) / "modules"))
            patch.setattr(sys, "path", [*sys.path])  # transformers adds the above
            yield
    finally:
        for name in sys.modules.keys() - modules:
            if name.startswith("transformers_modules"):
                del sys.modules[name]
        anew()
